"""validation: the verdict on recommenders, classifiers and regressors, against published baselines, scikit-learn and a champion."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline

from mlops_nb.core.errors import GateFailed, Invalid, NotFound
from mlops_nb.core.settings import in_project
from mlops_nb.model.recommender import Recommender
from mlops_nb.model.registry import register
from mlops_nb.validate.baselines import ItemKNN, Popularity
from mlops_nb.validate.validation import purchase_figures, validate
from projects import SMALL, shop  # noqa: F401

QUICK = {"n_boot": 200}


@pytest.fixture
def inside(shop):
    with in_project(shop):
        yield shop


@pytest.fixture(scope="module")
def split():
    """Purchases of the small set, cut at 2011-11-09, cleaned as the published baselines were."""
    orders = pd.read_parquet(SMALL)
    orders = orders[orders.CustomerID.notna() & ~orders.InvoiceNo.str.startswith("C") & (orders.Quantity > 0) & (orders.UnitPrice > 0) & orders.StockCode.str.match(r"^\d{5}[A-Za-z]*$")]
    purchases = pd.DataFrame({"user": orders.CustomerID.astype(int), "item": orders.StockCode, "time": orders.InvoiceDate})
    return purchases[purchases.time < "2011-11-09"], purchases[purchases.time >= "2011-11-09"]


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=800), "b": rng.normal(size=800)})
    frame["y"] = (frame.a + 0.5 * frame.b + rng.normal(size=800) > 0).astype(int)
    return frame.iloc[:400], frame.iloc[400:]


# -- recommenders ----------------------------------------------------------------------------------

def test_figures_are_the_published_ones(split):
    """known.json of the data set, 'small, cutoff 2011-11-09': item-kNN as the model, popularity of 28 days and buy again beside it."""
    history, holdout = split
    facts = validate(ItemKNN().fit(history), holdout, history=history, **QUICK).facts
    assert (facts["users"], facts["users new"]) == (305, 277)
    assert (facts["ndcg@10"], facts["recall@10"], facts["precision@10"], facts["hit@10"]) == pytest.approx((0.154617, 0.075369, 0.147869, 0.567213), abs=2e-6)
    assert (facts["ndcg@10 new"], facts["recall@10 new"]) == pytest.approx((0.051286, 0.037057), abs=2e-6)
    everyone = {row["model"]: row for row in facts["all items"]["models"]}
    assert everyone["popularity, 28 days"]["ndcg@10"] == pytest.approx(0.143854, abs=2e-6)
    assert everyone["buy again"]["ndcg@10"] == pytest.approx(0.366069, abs=2e-3), "orders told apart by their moment, there by their number"
    assert {row["model"]: row for row in facts["new items only"]["models"]}["popularity, 28 days"]["ndcg@10"] == pytest.approx(0.085327, abs=2e-6)


def test_the_gain_is_over_the_strongest_baseline_and_its_lower_bound(split):
    history, holdout = split
    facts = validate(ItemKNN().fit(history), holdout, history=history, **QUICK).facts
    rows = {row["over"]: row for row in facts["gains"] if (row["protocol"], row["metric"]) == ("all items", "ndcg@10")}
    worst = min(rows.values(), key=lambda row: row["gain"])
    assert worst["over"] == "buy again, decayed" and facts["gain ndcg@10"] == worst["low"] < worst["gain"] < worst["high"] < 0
    assert rows["buy again"]["gain"] == pytest.approx(0.154617 - 0.366069, abs=2e-3)  # reference figures of the set


class Perfect:
    "Recommends what will be bought."

    def __init__(self, holdout):
        self.user, self.item, self.bought = "customer", "article", holdout.drop_duplicates(["user", "item"])

    def recommend(self, users, k=10, *, new_only=False):
        mine = self.bought[self.bought.user.isin(users)].assign(rank=lambda frame: frame.groupby("user").cumcount() + 1)
        return mine[mine["rank"] <= k].rename(columns={"user": "customer", "item": "article"})[["customer", "article", "rank"]]


def test_a_model_names_its_own_columns_and_a_perfect_one_is_perfect(split, inside):
    history, holdout = (part.rename(columns={"user": "customer", "item": "article"}) for part in split)
    report = validate(Perfect(split[1]), holdout, history=history, gates={"ndcg@10": "1", "gain ndcg@10": "> 0.3"}, **QUICK)
    assert report.passed and report.facts["ndcg@10"] == report.facts["map@10"] == 1
    assert (inside / ".mlops/reports/validate-Perfect.html").exists()


def test_a_holdout_before_the_end_of_the_history_fails(split):
    history, holdout = split
    report = validate(Popularity(days=28).fit(history), holdout, history=pd.concat([history, holdout.head(500)]), **QUICK)
    assert [check["name"] for check in report.failures] == ["time order"]


def test_purchase_figures_are_scikit_learns(split):
    history, holdout = split
    some = history.user.unique()[::4]
    history, holdout = history[history.user.isin(some)], holdout[holdout.user.isin(some)]
    model = Recommender(n_windows=1, max_iter=5, n_candidates=20, max_items=300).fit(history)
    from mlops_nb.validate.ranking import relevant_items

    relevant = relevant_items(holdout, history)
    found = purchase_figures(model, relevant, {"n_boot": 50, "alpha": 0.05, "seed": 0})
    pairs = model.candidates(relevant.user.unique())
    chance = model.purchase_probability(pairs)
    truth = pd.MultiIndex.from_frame(pairs[["user", "item"]]).isin(pd.MultiIndex.from_frame(relevant)).astype(int)
    called = (chance >= found["threshold"]).astype(int)
    assert called.sum() == pytest.approx(chance.sum(), rel=0.2)
    assert found["precision"].value == pytest.approx(sk.precision_score(truth, called)) and found["recall"].value == pytest.approx(sk.recall_score(truth, called))
    assert found["f1"].value == pytest.approx(sk.f1_score(truth, called)) and found["accuracy"].value == pytest.approx(sk.accuracy_score(truth, called))
    assert found["roc_auc"] == pytest.approx(sk.roc_auc_score(truth, chance)) and found["f1"].low <= found["f1"].value <= found["f1"].high


# -- classifiers and regressors ----------------------------------------------------------------------

def test_a_classifier_is_judged_against_ignoring_its_inputs(rows):
    train, holdout = rows
    model = LogisticRegression().fit(train[["a", "b"]], train.y)
    facts = validate(model, holdout, target="y", history=train, **QUICK).facts
    said, dummy = model.predict(holdout[["a", "b"]]), DummyClassifier(strategy="prior").fit(train[["a", "b"]], train.y)
    assert facts["accuracy"] == pytest.approx(sk.accuracy_score(holdout.y, said))
    assert facts["roc_auc"] == pytest.approx(sk.roc_auc_score(holdout.y, model.predict_proba(holdout[["a", "b"]])[:, 1]))
    row = next(row for row in facts["gains"] if row["metric"] == "log_loss")
    assert row["gain"] == pytest.approx(sk.log_loss(holdout.y, dummy.predict_proba(holdout)) - facts["log_loss"])
    assert row["low"] == facts["gain log_loss"] > 0


def test_a_regressor_is_judged_too_and_unlabelled_rows_are_counted(rows):
    train, holdout = rows
    holdout = holdout.assign(a=holdout.a.mask(np.arange(len(holdout)) < 50))
    model = LinearRegression().fit(train[["b", "y"]], train.a)
    facts = validate(model, holdout, target="a", **QUICK).facts
    kept = holdout.dropna()
    assert facts["unlabelled_rows"] == 50 and facts["rmse"] == pytest.approx(sk.root_mean_squared_error(kept.a, model.predict(kept[["b", "y"]])))
    assert facts["gain rmse"] > 0


def test_a_class_that_training_never_saw_counts_against_the_model(rows):
    train, holdout = rows
    model = LogisticRegression().fit(train[["a", "b"]], train.y.map({0: "no", 1: "yes"}))
    labels = holdout.y.map({0: "no", 1: "yes"}).mask(np.arange(len(holdout)) < 40, "perhaps")
    facts = validate(model, holdout.assign(y=labels), target="y", **QUICK).facts
    assert facts["accuracy"] == pytest.approx((model.predict(holdout[["a", "b"]]) == labels).mean()) and facts["log_loss"] > 3


# -- gates, champion, registry -----------------------------------------------------------------------

def test_champion_and_challenger(inside, rows, monkeypatch, tmp_path):
    """A weak champion, a good challenger, a worse one; the settings' gate on the gain holds from the second version on."""
    from mlops_nb.data.store import save
    from mlops_nb.model.registry import attached, promote

    train, holdout = rows
    save(train, "train")
    save(holdout, "holdout")
    with (inside / "settings.ini").open("a") as file:
        file.write("[gates]\nvalidate.gain over champion = > 0\nvalidate.accuracy = 60%\n")
    good, weak = LogisticRegression().fit(train[["a", "b"]], train.y), LogisticRegression().fit(train[["b"]], train.y)
    register(weak, "buyer", data=["train@1"], example=train[["b"]].head(3))
    report = validate("buyer@challenger", "holdout@1", target="y", **QUICK)
    assert report.passed and "there is no champion yet" in report.facts["summary"]
    promote("buyer@1")
    assert "is the champion itself" in validate("buyer", "holdout@1", target="y", **QUICK).facts["summary"]

    register(good, "buyer", data=["train@1"], example=train[["a", "b"]].head(3))
    report = validate("buyer@challenger", "holdout@1", target="y", **QUICK)
    assert report.passed and report.facts["champion"] == "buyer@1" and report.facts["gain over champion"] > 0
    kept = attached("buyer@2", "validation")
    assert kept["passed"] and kept["accuracy"] == report.facts["accuracy"]
    promote("buyer@2")

    register(weak, "buyer", data=["train@1", "holdout@1"], example=train[["b"]].head(3))
    monkeypatch.setenv("MLOPS_STEP_FOLDER", str(tmp_path / "step"))
    with pytest.raises(GateFailed, match="gain over champion"):
        validate("buyer@challenger", "holdout@1", target="y", **QUICK)
    saved = json.loads((tmp_path / "step/validate-buyer@3.json").read_text())
    assert not saved["passed"] and attached("buyer@3", "validation")["passed"] is False
    assert {check["name"] for check in saved["checks"] if not check["passed"]} == {"gain over champion", "holdout new to buyer@3"}


def test_an_outsider_may_be_compared_with_an_address(inside, rows):
    train, holdout = rows
    register(LogisticRegression().fit(train[["b"]], train.y), "buyer", example=train[["b"]].head(3))
    model = LogisticRegression().fit(train[["a", "b"]], train.y)
    assert validate(model, holdout, target="y", against="buyer@1", **QUICK).facts["gain over champion"] > 0
    with pytest.raises(NotFound):
        validate(model, holdout, target="y", against="buyer@9", **QUICK)


def test_a_holdout_may_be_any_table(inside, rows):
    import pyarrow as pa


    train, holdout = rows
    register(LogisticRegression().fit(train[["a", "b"]], train.y), "buyer", example=train[["a", "b"]].head(3))
    (inside / "weeks").mkdir()
    holdout.to_csv(inside / "weeks/holdout.csv.gz", index=False)
    found = [validate("buyer@1", one, target="y", **QUICK) for one in (holdout, pa.Table.from_pandas(holdout), str(inside / "weeks/holdout.csv.gz"))]
    assert len({report.facts["accuracy"] for report in found}) == 1
    assert not any(check["name"].startswith("holdout new") for report in found for check in report.facts.get("checks", [])), "only a saved data set is known by its address"


def test_mistakes_are_one_sentence(split, rows, tmp_path):
    (history, holdout), (train, later) = split, rows
    model, ranker = LogisticRegression().fit(train[["a", "b"]], train.y), Popularity(days=28).fit(history)
    for call, error, words in [
        (lambda: validate(object(), later), Invalid, "object cannot be validated; expected a recommender"),
        (lambda: validate(model, later, target="label"), Invalid, "the holdout has no column 'label'"),
        (lambda: validate(model, later.drop(columns="b"), target="y"), Invalid, "the holdout has no column 'b'"),
        (lambda: validate(model, later.assign(z=1)), Invalid, "which column of the holdout holds the labels? expected target, one of y, z"),
        (lambda: validate(model, later.assign(y=None), target="y"), Invalid, "has no labels"),
        (lambda: validate(model, later, target="y", gates={"ndcg@10": "0.3"}), Invalid, "was not measured"),
        (lambda: validate(model, str(tmp_path / "gone.parquet"), target="y"), NotFound, "there is no file"),
        (lambda: validate(ranker, holdout), Invalid, "expected history"),
        (lambda: validate(ranker, holdout.rename(columns={"item": "sku"}), history=history), Invalid, "the holdout has no column 'item'"),
        (lambda: validate(ranker, holdout, history=history.drop(columns="time")), Invalid, "the history has no column 'time'"),
        (lambda: validate(ranker, holdout.assign(user=-1), history=history), Invalid, "0 users of the holdout"),
        (lambda: validate(ranker, holdout.head(0), history=history), Invalid, "the holdout has no rows"),
    ]:
        with pytest.raises(error, match=re.escape(words)):
            call()


def test_validating_twice_says_the_same(rows):
    train, holdout = rows
    model = LogisticRegression().fit(train[["a", "b"]], train.y)
    once, again = (validate(model, holdout, target="y", **QUICK).json() for _ in range(2))
    assert once == again


# -- models of text --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def described():
    """What a product is called, and whether it costs more than 2.50: odd products to learn from, even ones to try."""
    lines = pd.read_parquet(SMALL).dropna(subset=["Description"]).drop_duplicates("Description").reset_index(drop=True)
    found = pd.DataFrame({"name": lines.Description.astype(str), "dear": lines.UnitPrice > 2.5})
    return found.iloc[1::2], found.iloc[::2]


def test_a_model_of_text_gets_the_texts(inside, described):
    learned, tried = described
    model = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=500)).fit(learned.name, learned.dear)
    facts = validate(model, tried, target="dear", **QUICK).facts
    assert facts["accuracy"] == pytest.approx(sk.accuracy_score(tried.dear, model.predict(tried.name))) and facts["rows"] == len(tried) and facts["gain accuracy"] > 0
    register(model, "dear", example=learned.name.head(3))
    stored = validate("dear@1", tried.assign(row=1), target="dear", **QUICK).facts  # the column that was registered is found among others
    assert stored["accuracy"] == facts["accuracy"]
    with pytest.raises(Invalid, match=r"takes one column beside 'dear', and the holdout has 2 \(name, row\); give the text and the labels alone"):
        validate(model, tried.assign(row=1), target="dear", **QUICK)
