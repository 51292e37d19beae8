"""Ranking figures and baselines against an independent script, scikit-learn and scipy."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlops_nb.core.errors import Invalid
from mlops_nb.validate.baselines import BuyAgain, DecayedBuyAgain, ItemKNN, Popularity
from mlops_nb.validate.ranking import Interval, paired_bootstrap, ranking_metrics, relevant_items
from scipy.stats import bootstrap
from sklearn.metrics import ndcg_score

DATA = Path(__file__).parent.parent / "examples" / "recommender" / "data"
CUTOFF = "2011-11-09"

# Source: a separate per-user loop over the same protocol, kept with the data set's own figures (its popularity rows were checked with
# scikit-learn's ndcg_score). (recall@10, precision@10, ndcg@10, hit@10, mrr within the top 20, users) by data set, question and model.
KNOWN = {
    ("full", False, "popularity"): (0.031022, 0.072258, 0.08069, 0.448746, 0.20422, 1395),
    ("full", False, "popularity_28"): (0.057991, 0.126237, 0.143899, 0.645161, 0.317902, 1395),
    ("full", False, "buy_again"): (0.173516, 0.288387, 0.339586, 0.834409, 0.535358, 1395),
    ("full", False, "item_knn"): (0.078775, 0.163441, 0.178884, 0.590681, 0.323385, 1395),
    ("full", True, "popularity"): (0.01907, 0.030448, 0.033744, 0.22643, 0.089204, 1294),
    ("full", True, "popularity_28"): (0.043296, 0.068547, 0.081792, 0.428903, 0.199988, 1294),
    ("full", True, "item_knn"): (0.045125, 0.055487, 0.068572, 0.332303, 0.15179, 1294),
    ("small", False, "popularity"): (0.030449, 0.076066, 0.084964, 0.455738, 0.211865, 305),
    ("small", False, "popularity_28"): (0.057277, 0.12623, 0.143854, 0.586885, 0.308086, 305),
    ("small", False, "buy_again"): (0.192042, 0.302295, 0.366069, 0.895082, 0.584728, 305),
    ("small", False, "item_knn"): (0.075369, 0.147869, 0.154617, 0.567213, 0.266077, 305),
    ("small", True, "popularity"): (0.016795, 0.031408, 0.034374, 0.238267, 0.093797, 277),
    ("small", True, "popularity_28"): (0.042682, 0.070758, 0.085327, 0.422383, 0.207438, 277),
    ("small", True, "item_knn"): (0.037057, 0.039711, 0.051286, 0.267148, 0.123825, 277),
}
MODELS = {"popularity": Popularity, "popularity_28": lambda: Popularity(28), "buy_again": lambda: BuyAgain(order="order"), "item_knn": ItemKNN}


def purchases(size: str) -> pd.DataFrame:
    raw = pd.read_parquet(DATA / f"online_retail_{size}.parquet")
    product = raw.StockCode.str.match(r"^\d{5}[A-Za-z]*$")
    raw = raw[raw.CustomerID.notna() & ~raw.InvoiceNo.str.startswith("C") & (raw.Quantity > 0) & (raw.UnitPrice > 0) & product]
    return raw.rename(columns={"CustomerID": "user", "StockCode": "item", "InvoiceDate": "time", "InvoiceNo": "order"})


@pytest.fixture(scope="module", params=["small", "full"])
def split(request):
    data = purchases(request.param)
    return request.param, data[data.time < CUTOFF], data[data.time >= CUTOFF]


@pytest.mark.parametrize("model", MODELS)
def test_baselines_and_figures_agree_with_the_independent_script(split, model):
    size, history, holdout = split
    fitted = MODELS[model]().fit(history)
    for new_only in (False, True):
        if (size, new_only, model) not in KNOWN:
            continue
        relevant = relevant_items(holdout, history, new_only=new_only)
        lists = fitted.recommend(relevant.user.unique(), 20, new_only=new_only)
        at_10, at_20 = ranking_metrics(lists, relevant, k=10), ranking_metrics(lists, relevant, k=20)
        ours = (*at_10[["recall", "precision", "ndcg", "hit"]].mean(), at_20.mrr.mean(), len(at_10))
        assert np.round(ours, 6) == pytest.approx(KNOWN[size, new_only, model], abs=1.01e-6)


def test_ndcg_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    truth, score = rng.random((40, 30)) < 0.2, rng.permuted(np.tile(np.arange(30.0), (40, 1)), axis=1)
    truth[:, 0] = True
    lists = pd.DataFrame({"user": np.repeat(np.arange(40), 30), "item": np.tile(np.arange(30), 40), "rank": (30 - score).astype(int).ravel()})
    relevant = pd.DataFrame(np.argwhere(truth), columns=["user", "item"])
    for k in (1, 5, 10):
        ours = ranking_metrics(lists, relevant, k=k).ndcg
        theirs = [ndcg_score(truth[[i]].astype(float), score[[i]], k=k) for i in range(40)]
        assert ours.to_numpy() == pytest.approx(theirs, abs=1e-12)


def test_figures_by_hand():
    lists = pd.DataFrame({"user": "a", "item": ["x", "y", "z", "w"], "rank": [1, 2, 3, 4]})
    relevant = pd.DataFrame({"user": ["a"] * 3 + ["b"], "item": ["y", "w", "q", "x"]})
    figures = ranking_metrics(lists, relevant, k=4)
    ideal = 1 + 1 / np.log2(3) + 0.5
    assert figures.loc["a"].tolist() == pytest.approx([(1 / np.log2(3) + 1 / np.log2(5)) / ideal, 2 / 3, 2 / 4, (1 / 2 + 2 / 4) / 3, 1, 1 / 2])
    assert figures.loc["b"].tolist() == [0] * 6, "a user without recommendations counts, with nothing"


def test_relevant_items_leave_strangers_out_and_keep_unknown_items():
    history = pd.DataFrame({"user": [1, 1, 2], "item": ["x", "y", "x"]})
    holdout = pd.DataFrame({"user": [1, 1, 1, 2, 3], "item": ["x", "x", "never seen", "x", "y"]})
    assert relevant_items(holdout, history).to_numpy().tolist() == [[1, "never seen"], [1, "x"], [2, "x"]]
    assert relevant_items(holdout, history, new_only=True).to_numpy().tolist() == [[1, "never seen"]]


@pytest.mark.parametrize("sample", [
    np.random.default_rng(1).exponential(0.2, 200) - 0.17,
    np.random.default_rng(2).normal(0.01, 0.1, 1395),
    np.where(np.random.default_rng(3).random(500) < 0.9, 0.0, 0.5),
])
def test_interval_agrees_with_scipy(sample):
    ours = paired_bootstrap(sample + 1, np.ones(len(sample)), n_boot=20_000)
    theirs = bootstrap((sample,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(7)).confidence_interval
    width = theirs.high - theirs.low
    assert ours.mean == pytest.approx(sample.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width) and ours.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_interval_covers_what_it_promises():
    worlds = np.random.default_rng(5).exponential(0.2, (300, 200))
    inside = [low <= 0.2 <= high for _, low, high in (paired_bootstrap(world, np.zeros(200), n_boot=600, seed=i) for i, world in enumerate(worlds))]
    assert 0.91 <= np.mean(inside) <= 0.98  # 0.95 within three standard errors (0.0126 each)


def test_interval_pairs_by_user_and_repeats_with_the_seed():
    ours = pd.Series(np.linspace(0, 1, 50), index=range(50))
    shuffled = (ours - 0.1).sample(frac=1, random_state=0)
    assert paired_bootstrap(ours, shuffled) == pytest.approx(Interval(0.1, 0.1, 0.1))
    other = ours.sample(frac=1, random_state=1).set_axis(range(50))
    assert paired_bootstrap(ours, other, seed=3) == paired_bootstrap(ours, other, seed=3) != paired_bootstrap(ours, other, seed=4)
    assert paired_bootstrap(ours, ours) == (0, 0, 0)


@pytest.mark.parametrize(("call", "says"), [
    (lambda: ranking_metrics(pd.DataFrame({"user": [1], "item": [1]}), pd.DataFrame({"user": [1], "item": [1]})), "no column rank"),
    (lambda: ranking_metrics(pd.DataFrame({"user": [1, 1], "item": [1, 1], "rank": [1, 2]}), pd.DataFrame({"user": [1], "item": [1]})), "twice"),
    (lambda: relevant_items(pd.DataFrame({"who": [1]}), pd.DataFrame({"user": [1], "item": [1]})), "holdout has no column user, item"),
    (lambda: paired_bootstrap(pd.Series([1.0, 2.0]), pd.Series([1.0, 2.0, 3.0])), "not the same ones"),
    (lambda: paired_bootstrap([1.0, np.nan], [1.0, 2.0]), "missing or infinite"),
    (lambda: paired_bootstrap([1.0, 2.0], [1.0, 2.0], alpha=5), "alpha is 5"),
    (lambda: Popularity().recommend([1], 0), "k is 0"),
    (lambda: Popularity(item="sku").fit(pd.DataFrame({"user": [1], "item": [1], "time": pd.to_datetime(["2020-01-01"])})), "sku"),
    (lambda: BuyAgain(order="no").fit(pd.DataFrame({"user": [1], "item": [1], "time": pd.to_datetime(["2020-01-01"])})), "no column no"),
])
def test_bad_input_is_told_in_a_sentence(call, says):
    with pytest.raises(Invalid, match=says):
        call()


@pytest.mark.parametrize("model", [Popularity(), Popularity(7), BuyAgain(), DecayedBuyAgain(), ItemKNN()], ids=lambda model: type(model).__name__)
def test_every_baseline_serves_strangers_and_new_items(model):
    time = pd.date_range("2020-01-01", periods=6, freq="D")
    frame = pd.DataFrame({"user": ["a", "a", "b", "b", "b", "c"], "item": ["x", "y", "x", "y", "z", "x"], "time": time})
    model.fit(frame)
    lists = model.recommend(["a", "nobody", "b"], 3)
    assert lists.user.tolist() == ["a"] * 3 + ["nobody"] * 3 + ["b"] * 3 and lists["rank"].tolist() == [1, 2, 3] * 3
    new = model.recommend(["a", "b"], 3, new_only=True)
    assert new[["user", "item"]].to_numpy().tolist() == [["a", "z"]], "b owns everything"
