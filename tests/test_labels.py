"""What would break for somebody who trusts the list of wrong labels, or the warning that a column gives the target away."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mlops_nb.core.errors import Invalid
from mlops_nb.core.settings import in_project, init
from mlops_nb.data.detectors import Column, columns_of
from mlops_nb.data.labels import folds_of, label_errors, label_issues
from mlops_nb.data.leaks import binned, class_power, predictive_power
from mlops_nb.data.quality import check


@pytest.fixture
def shop(tmp_path):
    init(str(tmp_path), name="shop")
    with in_project(tmp_path):
        yield tmp_path


def labelled(n: int = 2000, wrong: int = 40) -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(0)
    x, kind = rng.normal(size=(n, 2)), rng.choice(["a", "b", "c"], n)
    label = np.where(x[:, 0] + (kind == "a") > 0.3, "yes", "no")
    turned = np.sort(rng.choice(np.flatnonzero(np.abs(x[:, 0] + (kind == "a") - 0.3) > 0.5), wrong, replace=False))
    label[turned] = np.where(label[turned] == "yes", "no", "yes")
    return pd.DataFrame({"x": x[:, 0], "noise": x[:, 1], "kind": kind, "label": label}), turned


def test_turned_labels_are_found_again():
    frame, turned = labelled()
    found = label_errors(frame, "label")
    hit = np.isin(found["row"], turned)
    assert hit.mean() > 0.8 and hit.sum() > 0.75 * len(turned)
    assert (found["label"] != found["suggested"]).all() and (found["label"].to_numpy() == frame["label"].iloc[found["row"]].to_numpy()).all()
    pd.testing.assert_frame_equal(found, label_errors(frame.copy(), "label"))


def test_labels_that_nothing_explains_are_not_doubted():
    frame, _ = labelled(600)
    assert label_errors(frame[["noise", "label"]].assign(label=np.random.default_rng(1).choice(["yes", "no"], 600)), "label").empty
    assert label_errors(frame.assign(label="yes"), "label").empty and label_errors(frame[["label"]], "label").empty
    few = frame.assign(label=[f"class {i}" for i in range(len(frame))])
    assert label_errors(few, "label").empty


def test_the_same_rows_as_cleanlab():
    from cleanlab.filter import find_label_issues

    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([0.4] * 4, 500)
    labels = np.where(rng.random(500) < 0.1, rng.integers(0, 4, 500), probabilities.argmax(axis=1))
    expected = find_label_issues(labels, probabilities, filter_by="confident_learning", n_jobs=1)
    assert (label_issues(labels, probabilities * 3) == expected).all() and expected.any()
    with pytest.raises(Invalid, match="labels do not fit probabilities of shape"):
        label_issues(labels, probabilities[:, :2])
    with pytest.raises(Invalid, match="no column 'lable' to be the target; did you mean label"):
        label_errors(labelled(50, 2)[0], "lable")
    nested = pa.array([[1], [2]] * 25)
    for cells in (nested.to_pylist(), [{"a": 1}, "b"] * 25, pd.Series(nested, dtype=pd.ArrowDtype(nested.type))):
        frame = pd.DataFrame({"x": range(50), "label": cells})
        for ask in (label_errors, check):
            with pytest.raises(Invalid, match="'label' has cells that cannot be told apart"):
                ask(frame, target="label")


def test_folds_hold_every_class_alike():
    classes = np.repeat([0, 1, 2], [500, 50, 10])
    table = pd.crosstab(folds_of(classes, 0), classes).to_numpy()
    assert (table.max(axis=0) - table.min(axis=0) <= 1).all()


def leaky(n: int = 3000) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    y = rng.random(n) < 0.2
    return pd.DataFrame({"copy": np.where(y, "B", "A"), "number": y * 10 + rng.normal(0, 0.5, n), "gap": np.where(y, rng.random(n), np.nan), "many": np.char.add(np.where(y, "y", "n"), rng.integers(0, 30, n).astype(str)),
                         "id": [f"id {i}" for i in range(n)], "noise": rng.normal(size=n), "hint": y + rng.normal(0, 0.7, n), "y": y})


def test_columns_that_know_the_target_are_told_from_those_that_learn_it_by_heart(shop):
    frame = leaky()
    columns = columns_of(frame)
    power = predictive_power(columns, columns[-1], classes=True)
    assert min(power[name] for name in ("copy", "number", "gap", "many")) > 0.9 and max(power[name] for name in ("id", "noise", "hint")) < 0.5
    found = {row["column"] for row in check(frame, target="y", labels=False).facts["findings"] if "predicts the target" in row["finding"]}
    assert found == {"copy", "number", "gap", "many"}


def test_power_against_a_number():
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 9, 4000)
    columns = columns_of(pd.DataFrame({"square": x**2, "noise": rng.normal(size=4000), "x": x}))
    power = predictive_power(columns, columns[-1], classes=False)
    assert power["square"] > 0.999 and power["noise"] < 0.01


def test_class_power_is_accuracy_above_the_most_frequent_class():
    """By hand: one class of 60%, a column that is right in 90% of the rows: (0.9 - 0.6) / (1 - 0.6)."""
    classes = np.repeat([0, 1], [600, 400])
    bins = np.where(np.arange(1000) % 10 == 0, 1 - classes, classes)
    assert class_power(bins, classes, np.arange(1000) // 7 % 5) == pytest.approx(0.75)
    assert binned(Column("x", pd.Series([3.0, np.nan, 3.0]))).tolist() == [1, 0, 1]


def test_label_errors_reach_the_report(shop):
    frame, turned = labelled()
    report = check(frame, target="label")
    row = next(row for row in report.facts["findings"] if "labels that are probably wrong" in row["finding"])
    assert {int(one) for one in row["rows"]} <= set(turned.tolist()) and report.facts["figures"]["label_errors"] == row["count"] / len(frame)
    assert "label_errors" not in check(frame, target="label", labels=False).facts["figures"]
