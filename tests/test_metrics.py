"""metrics: every figure against scikit-learn, intervals against exact coverage and scipy's bootstrap, paired gains."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from mlops_nb.core.errors import Invalid
from mlops_nb.core.gates import Gate
from mlops_nb.validate.metrics import classification_metrics, gain, lower_is_better, regression_metrics

QUICK = {"n_boot": 20}


def labels(seed, n=400, classes=2):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    score = rng.normal(size=(n, classes)) + 1.2 * (np.arange(classes) == y[:, None])
    probability = np.exp(score) / np.exp(score).sum(axis=1, keepdims=True)
    return y, probability.argmax(axis=1), probability


@pytest.mark.parametrize("seed", range(4))
def test_two_classes_are_scikit_learns(seed):
    y, p, probability = labels(seed)
    probability = probability.round(2) if seed % 2 else probability  # ties in every other draw
    found = {name: one.value for name, one in classification_metrics(y, p, probability, **QUICK).items()}
    expected = {"accuracy": sk.accuracy_score(y, p), "balanced_accuracy": sk.balanced_accuracy_score(y, p), "precision": sk.precision_score(y, p),
                "recall": sk.recall_score(y, p), "f1": sk.f1_score(y, p), "roc_auc": sk.roc_auc_score(y, probability[:, 1]),
                "average_precision": sk.average_precision_score(y, probability[:, 1]), "brier_loss": sk.brier_score_loss(y, probability[:, 1])}
    expected["log_loss"] = -np.log(np.clip(probability[np.arange(len(y)), y], np.finfo(float).eps, 1)).mean()
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_several_classes_are_scikit_learns_macro_means(seed):
    y, p, probability = labels(seed, classes=4)
    found = {name: one.value for name, one in classification_metrics(y, p, probability, **QUICK).items()}
    assert found == pytest.approx({"accuracy": sk.accuracy_score(y, p), "balanced_accuracy": sk.balanced_accuracy_score(y, p), "precision": sk.precision_score(y, p, average="macro"),
                                   "recall": sk.recall_score(y, p, average="macro"), "f1": sk.f1_score(y, p, average="macro"), "log_loss": sk.log_loss(y, probability)}, abs=1e-12)


@pytest.mark.parametrize("n", [200, 201])
def test_amounts_are_scikit_learns(n):
    rng = np.random.default_rng(n)
    y = rng.normal(10, 3, n)
    p = y + rng.normal(0, 1, n)
    found = {name: one.value for name, one in regression_metrics(y, p, **QUICK).items()}
    assert found == pytest.approx({"mae": sk.mean_absolute_error(y, p), "mse": sk.mean_squared_error(y, p), "rmse": sk.root_mean_squared_error(y, p), "r2": sk.r2_score(y, p),
                                   "mape": sk.mean_absolute_percentage_error(y, p), "median_absolute_error": sk.median_absolute_error(y, p)}, rel=1e-9)


def test_a_resample_is_the_metric_of_the_rows_it_drew():
    """The same draws, row by row, through scikit-learn."""
    y, p, probability = labels(5, n=60)
    found = classification_metrics(y, p, probability, n_boot=30, seed=11)
    drawn = np.random.default_rng(11).integers(0, 60, (30, 60))
    assert found["roc_auc"].draws == pytest.approx([sk.roc_auc_score(y[rows], probability[rows, 1]) for rows in drawn])
    assert found["average_precision"].draws == pytest.approx([sk.average_precision_score(y[rows], probability[rows, 1]) for rows in drawn])
    assert found["f1"].draws == pytest.approx([sk.f1_score(y[rows], p[rows]) for rows in drawn])
    amounts = regression_metrics(y + probability[:, 0], probability[:, 1], n_boot=30, seed=11)
    assert amounts["median_absolute_error"].draws == pytest.approx([sk.median_absolute_error(y[rows] + probability[rows, 0], probability[rows, 1]) for rows in drawn])


def test_intervals_agree_with_scipys_percentile_bootstrap():
    rng = np.random.default_rng(1)
    y = rng.normal(size=300)
    p = y + rng.exponential(size=300)
    ours = regression_metrics(y, p, n_boot=4000)["mae"]
    scipys = stats.bootstrap((np.abs(y - p),), np.mean, method="percentile", n_resamples=4000, rng=2).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((scipys.low, scipys.high), abs=0.01)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """An accuracy of exactly 0.8, 200 draws of 150 rows: 95% coverage within binomial error (at least 180 with chance 0.999)."""
    rng, inside = np.random.default_rng(0), 0
    for i in range(200):
        y = rng.integers(0, 2, 150)
        p = np.where(rng.random(150) < 0.8, y, 1 - y)
        one = classification_metrics(y, p, n_boot=300, seed=i)["accuracy"]
        inside += one.low <= 0.8 <= one.high
    assert inside >= 178


def test_paired_gains_are_sharper_than_two_intervals():
    y, p, _ = labels(2, n=1000)
    worse = np.where(np.random.default_rng(0).random(1000) < 0.03, 1 - y, p)
    ours, theirs = classification_metrics(y, p), classification_metrics(y, worse)
    one = gain(ours, theirs)["accuracy"]
    assert one.value == pytest.approx(sk.accuracy_score(y, p) - sk.accuracy_score(y, worse))
    assert one.high - one.low < ours["accuracy"].high - ours["accuracy"].low


def test_a_gain_in_an_error_is_a_fall():
    y = np.arange(50.0)
    gains = gain(regression_metrics(y, y + 1, **QUICK), regression_metrics(y, y + 3, **QUICK))
    assert gains["mae"].value == pytest.approx(2) and gains["rmse"].low > 0 and gains["r2"].value > 0


def test_gates_and_gains_agree_on_which_way_is_better():
    y, p, probability = labels(0)
    for name in [*classification_metrics(y, p, probability, **QUICK), *regression_metrics(y, p, **QUICK)]:
        assert (Gate.parse(name, 1).comparison == "<=") == lower_is_better(name), name


@pytest.mark.parametrize("y, p", [(["no", "yes", "yes"], ["no", "yes", "no"]), ([False, True, True], [False, True, False]), ([1, 2, 2], [1, 2, 1])])
def test_labels_may_be_anything_in_order(y, p):
    assert classification_metrics(y, p, **QUICK)["recall"].value == 0.5


def test_one_class_only_has_no_ranking_but_no_traceback():
    found = classification_metrics([1, 1, 1], [1, 1, 0], [0.9, 0.8, 0.2], classes=[0, 1], **QUICK)
    assert np.isnan(found["roc_auc"].value) and found["accuracy"].value == pytest.approx(2 / 3)
    assert not Gate.parse("roc_auc", 0.5).holds(found["roc_auc"].value)


@pytest.mark.parametrize("call, words", [
    (lambda: classification_metrics([1, 0], [1]), "y_true has 2, y_pred has 1"),
    (lambda: classification_metrics([], []), "at least one"),
    (lambda: classification_metrics([1, 0], [1, 0], np.ones((2, 3))), "3 columns for 2 classes"),
    (lambda: classification_metrics([1, 0], [1, 0], classes=[1, 0, 2], alpha=0), "alpha = 0"),
    (lambda: regression_metrics([1, np.nan], [1, 2]), "1 labels and 0 predictions are missing"),
    (lambda: gain(regression_metrics([1, 2], [1, 2], n_boot=5), regression_metrics([1, 2], [1, 2], n_boot=6)), "5 and 6 resamples"),
])
def test_mistakes_are_one_sentence(call, words):
    with pytest.raises(Invalid, match=words):
        call()
