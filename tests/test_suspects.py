"""What would break for somebody who repairs data by the list of suspects: wrong cells unseen, right cells accused, a list that changes."""

import numpy as np
import pandas as pd
import pytest

from mlops_nb.core.errors import Invalid
from mlops_nb.core.settings import in_project, init
from mlops_nb.data import quality
from mlops_nb.data.dependencies import broken, codes_of, rules, strength
from mlops_nb.data.detectors import Column, columns_of
from mlops_nb.data.freshness import volume
from mlops_nb.data.quality import check
from mlops_nb.data.rows import duplicated, row_hashes, shared
from mlops_nb.data.store import save
from mlops_nb.data.suspects import misprints, one_edit, suspects, typos


@pytest.fixture
def shop(tmp_path):
    init(str(tmp_path), name="shop")
    with in_project(tmp_path):
        yield tmp_path


TOWNS = ["Hannover", "Göttingen", "Wolfsburg", "Braunschweig", "Oldenburg", "Osnabrück", "Lüneburg", "Hildesheim"]


def deliveries(n: int = 4000, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    place, article = rng.integers(0, len(TOWNS), n), rng.integers(0, 30, n)
    return pd.DataFrame({"order": [f"{i:06d}" for i in range(n)], "postcode": (30000 + 111 * place).astype(str), "town": np.array(TOWNS)[place], "article": [f"A{i:03d}" for i in article],
                         "price": np.round(2.5 * 1.2 ** article * rng.uniform(0.97, 1.03, n), 2), "pieces": rng.poisson(6, n) + 1, "when": pd.Timestamp("2025-01-01") + pd.to_timedelta(rng.integers(0, 3 * 10**7, n), "s")})


def spoilt() -> tuple[pd.DataFrame, dict[tuple[int, str], str]]:
    frame = deliveries()
    towns = list(frame["town"])
    wrong = {(10, "town"): "Hannovr", (21, "town"): "Wlofsburg", (33, "town"): next(town for town in TOWNS if town != towns[33]), (40, "order"): "0O0040", (55, "postcode"): "3O111", (70, "price"): frame["price"][70] * 100,
             (81, "pieces"): 4000, (92, "when"): pd.Timestamp("1753-01-01"), (99, "when"): pd.Timestamp("2091-01-01")}
    frame["when"] = frame["when"].astype("datetime64[s]")
    for (row, column), value in wrong.items():
        frame.loc[row, column] = value
    return frame, wrong


def test_the_wrong_cells_and_no_others():
    frame, wrong = spoilt()
    found = suspects(frame, now="2026-01-01")
    found["column"] = found["column"].mask((found["row"] == 33) & (found["column"] == "postcode"), "town")  # each follows from the other: nobody can tell which of the two is wrong
    assert set(zip(found["row"], found["column"])) == set(wrong) and len(found) == len(wrong)
    kinds = {(row, column): kind for row, column, kind in zip(found["row"], found["column"], found["kind"])}
    assert (kinds[10, "town"], kinds[33, "town"], kinds[40, "order"], kinds[70, "price"], kinds[81, "pieces"], kinds[92, "when"]) == (
        "typo", "dependency", "pattern", "outlier in its group", "outlier", "impossible date")
    assert found["score"].between(0, 1).all() and found["score"].is_monotonic_decreasing
    pd.testing.assert_frame_equal(found.drop(columns="column"), suspects(frame.copy(), now="2026-01-01").drop(columns="column"))


def test_clean_data_have_no_suspects():
    assert suspects(deliveries(seed=3), now="2026-01-01").empty


@pytest.mark.parametrize(("a", "b", "same"), [("hospital", "hospitl", True), ("hospital", "hospittal", True), ("hospital", "hosiptal", True), ("hospital", "hospitals", False), ("hospital", "hospice", False),
                                              ("a", "a", False), ("xeart", "heart", True), ("heart", "eart", True)])
def test_one_edit(a, b, same):
    assert one_edit(a, b) == one_edit(b, a) == same


def test_codes_and_short_words_are_not_misprints():
    assert misprints({"size12": 500, "size13": 1, "blue": 400, "bluer": 1}, rare=3) == {}
    codes = Column("state", pd.Series(["AL_RATE-1"] * 500 + ["AK_RATE-1"] * 2 + ["AL_RATE-2"] * 500 + ["NY"] * 9 + ["NC"]))
    assert typos(codes) == {}


def test_strength_of_a_dependency():
    """μ⁺ by its definition (Parciak et al., ICDE 2024): 1 - (1 - pdep(X→Y)) / (1 - pdep(Y)) * (n - 1) / (n - |X|), at least 0."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 20, 1000), rng.integers(0, 5, 1000)
    assert strength(x, x % 5) == 1 and strength(x, y) < 0.02 and strength(np.arange(1000), y) == 0
    y = np.where(rng.random(1000) < 0.1, y, x % 5)
    table = pd.crosstab(x, y).to_numpy().astype(float)
    given, alone = (table**2 / table.sum(axis=1, keepdims=True)).sum() / 1000, ((table.sum(axis=0) / 1000) ** 2).sum()
    assert strength(x, y) == pytest.approx(1 - (1 - given) / (1 - alone) * 999 / 980)


def test_a_pair_of_columns_can_determine_a_third_and_a_gap_is_seen():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 8, 3000), rng.integers(0, 8, 3000)
    frame = pd.DataFrame({"a": a.astype(str), "b": b.astype(str), "c": ((a * 3 + b * 5) % 7).astype(str), "d": rng.integers(0, 5, 3000).astype(str)})
    found = {(rule.given, rule.then) for rule in rules(columns_of(frame))}
    assert ((0, 1), 2) in found and all(len(given) == 2 and 3 not in (*given, then) for given, then in found)
    then = np.array([1, 1, 1, -1, 1, 2, 0, -1])
    assert broken(np.array([0, 0, 0, 0, 0, 0, 1, 1]), then)[0].tolist() == [5]  # four of six agree: clear enough against row 5, not enough to fill row 3
    assert broken(np.array([0] * 6), np.array([1, 1, 1, 1, -1, 1]))[0].tolist() == [4]


def test_an_exception_with_a_reason_is_no_suspect():
    frame = pd.DataFrame({"article": ["pen", "ink", "nib"] * 400, "price": ["2.00", "5.00", "1.00"] * 400, "shop": (["town"] * 8 + ["port"] * 7) * 80})
    frame.loc[frame.index >= 1170, "shop"] = "airport"
    frame.loc[frame["shop"] == "airport", "price"] = "9.00"
    assert not (suspects(frame)["kind"] == "dependency").any()


# ---------------------------------------------------------------- whole rows
def test_hashes_agree_with_pandas_about_repeated_rows():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.integers(0, 4, 2000), "b": rng.choice(["x", "y", None], 2000), "c": rng.choice([0.0, -0.0, np.nan, 1.5], 2000), "d": pd.Categorical(rng.choice(["u", "v"], 2000)),
                          "e": pd.Timestamp("2025-01-01") + pd.to_timedelta(rng.integers(0, 2, 2000), "D"), "f": 2**53 + rng.integers(0, 2, 2000)})
    frame["b"] = frame["b"].astype("str")
    assert (duplicated(frame) == frame.duplicated().to_numpy()).all()
    assert len(set(row_hashes(columns_of(pd.DataFrame({"a": [2**53, 2**53 + 1]}))).tolist())) == 2


def test_overlap_of_rows_keys_and_contradicting_targets(shop):
    frame = deliveries().assign(late=lambda f: f["pieces"] > 6)
    train, test = frame.iloc[:3000], frame.iloc[2990:].assign(order=lambda f: f["order"].astype(object))
    turned = test.assign(late=lambda f: f["late"] ^ (f.index == 2995))
    found = shared(turned, train, key="town", target="late")
    assert (found["rows"].sum(), found["contradictions"].sum(), found["key"].sum()) == (9, 1, len(test))
    report = check(turned, against=train, target="late", key="order", gates={"overlap": "<= 0", "overlap.key": "<= 0.1"}, labels=False)
    assert [row["passed"] for row in report.facts["checks"]] == [False, True] and report.facts["figures"]["overlap.key"] == 10 / len(test)
    save(train, "train")
    assert check(turned, against="train", gates={}).facts["figures"]["overlap"] == 9 / len(test)
    with pytest.raises(Invalid, match="the key 'ordr' is not a column of both data sets; did you mean order"):
        shared(test, train, key="ordr")


# ---------------------------------------------------------------- earlier versions
def test_a_stale_short_and_emptied_delivery_is_told_from_a_good_one(shop):
    frame = deliveries().sort_values("when", ignore_index=True)
    for part in (frame.iloc[:1000], frame.iloc[1000:2000], frame.iloc[2000:3000]):
        save(part, "deliveries")
    assert not [row for row in check("deliveries").facts.get("findings", []) if "deliveries@2" in row["finding"]]
    save(frame.iloc[500:800].assign(town=lambda f: f["town"].where(f.index % 2 == 0)).drop(columns="pieces"), "deliveries")
    said = {row["column"]: row for row in check("deliveries@4").facts["findings"] if "deliveries@3" in row["finding"] or "versions before" in row["finding"]}
    assert "is older than that of deliveries@3" in said["when"]["finding"] and "more missing values than in deliveries@3: 50.0% instead of 0.0%" in said["town"]["finding"]
    assert {row["finding"] for row in check("deliveries@4").facts["findings"] if not row["column"]} >= {"300 rows where the 3 versions before had about 1,000", "1 column of deliveries@3 is gone"}
    assert not volume(700, [1000, 900, 1100]) and volume(400, [1000, 900, 1100]) and volume(2500, [1000])


# ---------------------------------------------------------------- faults of the checks themselves
def test_a_failing_detector_hides_nothing(shop, monkeypatch):
    def bad(column):
        raise RuntimeError("out of order")
        yield

    monkeypatch.setattr(quality, "DETECTORS", (bad, *quality.DETECTORS))
    monkeypatch.setattr(quality, "suspect_cells", lambda *args, **kwargs: 1 / 0)
    report = check(pd.DataFrame({"a": [1.0, None, 3.0], "b": ["x", "x", "y"]}))
    said = [row["finding"] for row in report.facts["findings"]]
    assert "could not be checked for bad (a): RuntimeError: out of order" in said and "could not be checked for suspect cells: ZeroDivisionError: division by zero" in said and "missing values" in said


def test_gates_may_be_numbers(shop):
    frame = pd.DataFrame({"a": [1.0, None, 3.0], "b": ["x", "x", "y"]})
    assert not check(frame, gates={"missing": 0.02}).passed and check(frame, gates={"missing": 0.4, "suspects": "<= 0"}).passed


def test_codes_of_cells_that_cannot_be_compared():
    assert codes_of(pd.Series([[1], [2]])) is None
