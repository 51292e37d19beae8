"""Explanations add up to the model's raw output, and agree with the `shap` package and with the definition of Shapley values."""

import importlib
import os
import subprocess
import sys
import warnings
from itertools import combinations
from math import factorial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn import ensemble, linear_model, svm, tree
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor, make_column_selector, make_column_transformer
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.feature_selection import SelectKBest, VarianceThreshold
from sklearn.impute import KNNImputer, SimpleImputer
from sklearn.model_selection import GridSearchCV, TunedThresholdClassifierCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import (FunctionTransformer, KBinsDiscretizer, MinMaxScaler, Normalizer, OneHotEncoder, OrdinalEncoder, PolynomialFeatures,
                                   PowerTransformer, QuantileTransformer, RobustScaler, StandardScaler, TargetEncoder)

from mlops_nb.core.errors import Invalid
from mlops_nb.serve import trees
from mlops_nb.serve.explain import Explainer, explainer, origins, raw_outputs, why_not
from mlops_nb.serve.topk import has_top, top_answers
from mlops_nb.serve.trees import TreeModel, from_tree

shap = pytest.importorskip("shap")
rng = np.random.default_rng(0)
N = 300
NUMBERS = rng.normal(size=(N, 5)).astype(np.float32).astype(float)
SIGNAL = NUMBERS[:, 0] * 2 + np.where(NUMBERS[:, 1] > 0, NUMBERS[:, 2], -1) + rng.normal(0, 0.3, N)
TARGETS = {"regressor": SIGNAL, "two classes": np.where(SIGNAL > 0, "yes", "no"), "three classes": np.digitize(SIGNAL, [-1, 1])}
KINDS = {"DecisionTree": tree, "ExtraTree": tree, "RandomForest": ensemble, "ExtraTrees": ensemble, "GradientBoosting": ensemble, "HistGradientBoosting": ensemble}
SMALL = {"DecisionTree": {"max_depth": 5}, "ExtraTree": {}, "RandomForest": {"n_estimators": 12}, "ExtraTrees": {"n_estimators": 12, "max_depth": 6},
         "GradientBoosting": {"n_estimators": 20, "subsample": 0.8}, "HistGradientBoosting": {"max_iter": 20}}


def fitted(kind: str, target: str, X=NUMBERS, **more):
    made = getattr(KINDS[kind], kind + ("Regressor" if target == "regressor" else "Classifier"))(**SMALL[kind], random_state=0, **more)
    return made.fit(X, TARGETS[target], sample_weight=np.linspace(0.5, 2, N) if kind != "HistGradientBoosting" else None)


def raw(model, X) -> np.ndarray:
    "What scikit-learn itself calls the output, per class."
    return model.predict(X)[:, None] if not hasattr(model, "classes_") else raw_outputs(model, X)


@pytest.mark.parametrize(("kind", "target"), [(kind, target) for kind in KINDS for target in TARGETS if (kind, target) != ("GradientBoosting", "three classes")])  # shap has no answer there
def test_trees_agree_with_the_shap_package(kind, target):
    model = fitted(kind, target)
    ours, theirs = TreeModel(model), shap.TreeExplainer(model)  # Lundberg et al.: the package of the paper
    x, outputs = NUMBERS[:20], raw(model, NUMBERS[:20])
    reference = np.asarray(theirs.shap_values(x, check_additivity=False)).reshape(20, 5, -1)
    bases = np.ravel(theirs.expected_value)
    assert len(ours.base) == outputs.shape[1] == len(bases)
    for k in range(len(bases)):
        found = ours.explain(x, np.full(20, k))
        np.testing.assert_allclose(ours.base[k] + found.sum(axis=1), outputs[:, k], atol=1e-6)
        np.testing.assert_allclose(found, reference[:, :, k], atol=1e-6)
        np.testing.assert_allclose(ours.base[k], bases[k], atol=1e-6)


def expectation(nodes, x, S, node=0):
    "What a tree answers when only the features in S are known: algorithm 1 of Lundberg et al. 2018, from scikit-learn's arrays."
    if nodes.children_left[node] < 0:
        return nodes.value[node].ravel()
    left, right, feature = nodes.children_left[node], nodes.children_right[node], nodes.feature[node]
    if feature in S:
        goes = bool(nodes.missing_go_to_left[node]) if np.isnan(x[feature]) else x[feature] <= nodes.threshold[node]
        return expectation(nodes, x, S, left if goes else right)
    share = nodes.weighted_n_node_samples[left] / nodes.weighted_n_node_samples[node]
    return share * expectation(nodes, x, S, left) + (1 - share) * expectation(nodes, x, S, right)


def by_definition(nodes, x, n=5) -> np.ndarray:
    found = []
    for j in range(n):
        rest = [k for k in range(n) if k != j]
        found.append(sum(factorial(len(S)) * factorial(n - len(S) - 1) / factorial(n) * (expectation(nodes, x, {*S, j}) - expectation(nodes, x, set(S)))
                         for size in range(n) for S in combinations(rest, size)))
    return np.array(found)


@pytest.mark.parametrize("target", TARGETS)
def test_trees_agree_with_the_definition_also_where_values_are_missing(target):
    gaps = np.where(rng.random(NUMBERS.shape) < 0.2, np.nan, NUMBERS)
    model = fitted("DecisionTree", target, gaps)
    ours = TreeModel(model)
    for x in gaps[:6]:
        defined = by_definition(model.tree_, x.astype(np.float32))
        for k in range(len(ours.base)):
            np.testing.assert_allclose(ours.explain(x[None], [k])[0], defined[:, k], atol=1e-9)


def test_boosting_for_many_classes_agrees_with_the_definition():
    model = fitted("GradientBoosting", "three classes")
    ours, x = TreeModel(model), NUMBERS[7]
    np.testing.assert_allclose([ours.base[k] + ours.explain(x[None], [k]).sum() for k in range(3)], model.decision_function(x[None])[0], atol=1e-6)
    for k in range(3):
        defined = sum(by_definition(one.tree_, x.astype(np.float32))[:, 0] * model.learning_rate for one in model.estimators_[:, k])
        np.testing.assert_allclose(ours.explain(x[None], [k])[0], defined, atol=1e-9)


def test_a_category_is_explained_as_boosting_decides_it():
    colours = pd.Series(rng.choice([f"c{i}" for i in range(40)], N), dtype="category")
    X = pd.DataFrame({"size": np.where(rng.random(N) < 0.1, np.nan, NUMBERS[:, 0]), "colour": colours, "age": NUMBERS[:, 1]})
    model = ensemble.HistGradientBoostingRegressor(max_iter=30, random_state=0, min_samples_leaf=5).fit(X, SIGNAL + colours.cat.codes % 3)
    found = Explainer(model)
    rows = X.head(60).copy()
    rows.loc[3, "colour"] = np.nan
    rows["colour"] = rows["colour"].cat.add_categories(["unheard"])
    rows.loc[4, "colour"] = "unheard"
    answers = found(rows)
    np.testing.assert_allclose([one["output"] for one in answers], model.predict(rows), atol=1e-6)
    assert list(answers[0]["contributions"]) == ["size", "colour", "age"]
    moved = rows.assign(age=0.0)  # what depends on age alone may change; a mix-up of the columns would move the others to age
    without = ensemble.HistGradientBoostingRegressor(max_iter=30, random_state=0).fit(X.assign(age=0.0), SIGNAL)
    assert {one["contributions"]["age"] for one in Explainer(without)(moved)} == {0.0}


def test_ties_missing_values_and_stumps():
    edge = np.float32(0.1)  # the trees of scikit-learn see 32 bits: this value and its neighbour above fall on different sides only there
    X = np.array([[edge, 0], [np.nextafter(edge, 1), 0], [edge, 1], [1, 1]], dtype=np.float64)
    for model in (tree.DecisionTreeRegressor(), ensemble.RandomForestRegressor(5, random_state=0), ensemble.GradientBoostingRegressor(n_estimators=3)):
        model.fit(X, [0, 1, 2, 3])
        ours = TreeModel(model)
        np.testing.assert_allclose(ours.base[0] + ours.explain(X).sum(axis=1), model.predict(X), atol=1e-9)
    for model in (tree.DecisionTreeRegressor(), ensemble.HistGradientBoostingRegressor(), ensemble.GradientBoostingRegressor(init="zero")):
        constant = TreeModel(model.fit(np.zeros((30, 2)), np.full(30, 7.0)))  # nothing but a root
        np.testing.assert_allclose([constant.base[0], *constant.explain(np.ones((1, 2)))[0]], [model.predict(np.ones((1, 2)))[0], 0, 0], atol=1e-6)
    deep = tree.DecisionTreeRegressor(random_state=0).fit(rng.normal(size=(2000, 40)), rng.normal(size=2000))
    x = rng.normal(size=(5, 40))
    ours = TreeModel(deep)  # paths of more than a dozen features: the quadrature stays exact
    np.testing.assert_allclose(ours.base[0] + ours.explain(x).sum(axis=1), deep.predict(x), atol=1e-9)
    assert from_tree(deep.tree_).value.shape == (deep.tree_.node_count, 1)


def test_a_forest_of_many_groups_of_trees_is_explained_as_one(monkeypatch):
    monkeypatch.setattr(trees, "NODES", 700)
    model = fitted("RandomForest", "three classes")
    ours, x = TreeModel(model), NUMBERS[:10]
    assert 1 < len(ours.paths) < len(model.estimators_)  # some groups hold several trees
    reference = shap.TreeExplainer(model).shap_values(x, check_additivity=False)
    for k in range(3):
        np.testing.assert_allclose(ours.explain(x, np.full(10, k)), reference[:, :, k], atol=1e-9)
        np.testing.assert_allclose(ours.base[k] + ours.explain(x, np.full(10, k)).sum(axis=1), model.predict_proba(x)[:, k], atol=1e-9)


LINEAR = [(linear_model.LinearRegression(), "regressor"), (linear_model.Ridge(), "regressor"), (linear_model.LassoCV(), "regressor"), (linear_model.ElasticNet(0.01), "regressor"),
          (linear_model.HuberRegressor(), "regressor"), (linear_model.SGDRegressor(random_state=0), "regressor"), (linear_model.BayesianRidge(), "regressor"),
          (svm.LinearSVR(random_state=0), "regressor"), (linear_model.LogisticRegression(), "two classes"), (linear_model.LogisticRegression(), "three classes"),
          (linear_model.LogisticRegressionCV(l1_ratios=(0,), use_legacy_attributes=False), "two classes"), (linear_model.RidgeClassifier(), "three classes"),
          (linear_model.SGDClassifier(random_state=0), "two classes"), (svm.LinearSVC(random_state=0), "three classes"), (LinearDiscriminantAnalysis(), "three classes")]


@pytest.mark.parametrize(("model", "target"), LINEAR, ids=lambda one: one if isinstance(one, str) else type(one).__name__)
def test_linear_models_add_up(model, target):
    X = pd.DataFrame(NUMBERS, columns=list("abcde"))
    whole = make_pipeline(StandardScaler(), model).fit(X, TARGETS[target])
    outputs = raw(whole[-1], whole[:-1].transform(X)) if target != "regressor" else whole.predict(X)[:, None]
    expected = outputs[:, 0] if outputs.shape[1] == 1 else outputs.max(axis=1)
    for reference in (None, X):
        found = Explainer(whole, reference=reference)(X)
        np.testing.assert_allclose([one["output"] for one in found], expected, atol=1e-6)
        np.testing.assert_allclose([one["base"] + sum(one["contributions"].values()) for one in found], expected, atol=1e-6)


def test_a_linear_model_starts_where_the_reference_is():
    X = pd.DataFrame(NUMBERS, columns=list("abcde"))
    model = linear_model.LinearRegression().fit(X, SIGNAL)
    found = Explainer(model, reference=X)(X.head(30))
    theirs = shap.LinearExplainer(model, shap.maskers.Independent(X, max_samples=N))  # coefficients against the mean of a background
    np.testing.assert_allclose([list(one["contributions"].values()) for one in found], theirs.shap_values(X.head(30)), atol=1e-9)
    assert found[0]["base"] == pytest.approx(SIGNAL.mean()) == pytest.approx(theirs.expected_value)
    plain = Explainer(model)(X.head(1))[0]
    assert plain["base"] == pytest.approx(model.intercept_) and plain["contributions"]["a"] == pytest.approx(model.coef_[0] * X["a"][0])


def shop(n=N):
    one = np.random.default_rng(1)
    return pd.DataFrame({"price": np.where(one.random(n) < 0.1, np.nan, one.gamma(2, 3, n)), "country": one.choice(["France", "Spain", "Malta", "Peru"], n, p=[0.5, 0.3, 0.15, 0.05]),
                         "country_France": one.normal(size=n), "pieces": one.integers(1, 9, n).astype(float), "size": one.choice(["S", "M", "L"], n), "words": one.choice(["red cup", "blue cup", "red bag"], n)})


NUMERIC = ["price", "country_France", "pieces"]
STEPS = {
    "one-hot, scaled, imputed": make_column_transformer((OneHotEncoder(), ["country"]), (make_pipeline(SimpleImputer(add_indicator=True), StandardScaler()), NUMERIC)),
    "names that collide": make_column_transformer((OneHotEncoder(drop="first"), ["country", "size"]), ("passthrough", ["country_France", "pieces"]), verbose_feature_names_out=False),
    "rare ones together": make_column_transformer((OneHotEncoder(min_frequency=0.2, handle_unknown="infrequent_if_exist", sparse_output=False), ["size", "country"]), (KNNImputer(), NUMERIC)),
    "the rest dropped": ColumnTransformer([("o", OrdinalEncoder(), ["size", "country"]), ("none", "drop", ["words"]), ("n", RobustScaler(), slice(2, 4))]),
    "the rest passed": ColumnTransformer([("o", OrdinalEncoder(), ["words", "size", "country"])], remainder=SimpleImputer()),
    "by type and by mask": make_column_transformer((OneHotEncoder(), make_column_selector(dtype_include=["object", "str"])), (SimpleImputer(), [True, False, True, True, False, False])),
    "words": make_column_transformer((CountVectorizer(), "words"), (make_pipeline(SimpleImputer(), KBinsDiscretizer(3, encode="onehot", quantile_method="averaged_inverted_cdf")), ["price"]), ("passthrough", ["pieces"])),
    "selected": make_pipeline(make_column_transformer((OneHotEncoder(), ["country", "size"]), (SimpleImputer(), NUMERIC)), VarianceThreshold(0.05), SelectKBest(k=5)),
    "joined": make_pipeline(make_column_transformer((SimpleImputer(), NUMERIC)), FeatureUnion([("a", MinMaxScaler()), ("b", make_pipeline(QuantileTransformer(n_quantiles=9), PowerTransformer()))])),
    "a target encoder": make_column_transformer((TargetEncoder(random_state=0), ["country"]), (FunctionTransformer(np.log1p, feature_names_out="one-to-one"), ["pieces"])),
    "as frames": make_column_transformer((OneHotEncoder(sparse_output=False), ["country"]), (SimpleImputer(), NUMERIC)).set_output(transform="pandas"),
}


@pytest.mark.parametrize("words", STEPS)
@pytest.mark.parametrize("final", [linear_model.LogisticRegression(max_iter=2000), ensemble.RandomForestClassifier(15, random_state=0), ensemble.HistGradientBoostingClassifier(max_iter=15)], ids=lambda one: type(one).__name__)
def test_through_pipelines_to_the_columns_of_the_client(words, final):
    X = shop()
    y = np.where(X["price"].fillna(0) * X["pieces"] + (X["country"] == "France") * 9 > 25, 1, 0)
    whole = make_pipeline(STEPS[words], final)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole.fit(X, y)
        found = explainer(whole)(X.head(25))
        outputs = raw_outputs(whole[-1], whole[:-1].transform(X.head(25)).toarray() if hasattr(whole[:-1].transform(X.head(2)), "toarray") else whole[:-1].transform(X.head(25)))[:, -1]
    np.testing.assert_allclose([one["output"] for one in found], outputs, atol=1e-6)
    assert all(list(one["contributions"]) == list(X.columns) for one in found)
    # which transformed columns move when an input column is exchanged: only those that are said to come from it
    whence, before = np.array(origins(whole[:-1], X.shape[1])), whole[:-1].transform(X)
    for i, column in enumerate(X.columns):
        changed = X.copy()
        changed[column] = X[column].to_numpy()[::-1]
        after = whole[:-1].transform(changed)
        before_, after_ = (np.asarray(one.toarray() if hasattr(one, "toarray") else one, float) for one in (before, after))
        moved = ~np.isclose(before_, after_, equal_nan=True).all(axis=0)
        if "KNNImputer" in str(STEPS[words]):  # it fills a gap from the other columns: that is the one way they touch
            moved &= ~np.isin(whence, [0])
        assert set(whence[moved]) <= {i}, column


def test_a_search_and_a_threshold_are_looked_into():
    X = pd.DataFrame(NUMBERS, columns=list("abcde"))
    search = GridSearchCV(make_pipeline(StandardScaler(), linear_model.LogisticRegression()), {"logisticregression__C": [0.1, 1]}, cv=2).fit(X, TARGETS["two classes"])
    tuned = TunedThresholdClassifierCV(ensemble.RandomForestClassifier(10, random_state=0), cv=2).fit(X, TARGETS["two classes"] == "yes")
    np.testing.assert_allclose([one["output"] for one in explainer(search)(X.head(9))], search.decision_function(X.head(9)), atol=1e-6)
    np.testing.assert_allclose([one["output"] for one in explainer(tuned)(X.head(9))], tuned.predict_proba(X.head(9))[:, 1], atol=1e-6)


def test_the_answer_says_what_it_explains():
    X = pd.DataFrame(NUMBERS, columns=list("abcde"))
    words = {}
    for kind, target in (("RandomForest", "two classes"), ("GradientBoosting", "two classes"), ("HistGradientBoosting", "three classes"), ("DecisionTree", "regressor")):
        model = fitted(kind, target, X)
        answers = Explainer(model)(X.head(40))
        if target == "three classes":  # each row is explained for the class it is given
            assert [one["explains"] for one in answers] == [f"log-odds of {one}" for one in model.predict(X.head(40))]
        words[kind] = answers[0]["explains"]
    assert words["RandomForest"] == "probability of yes" and words["GradientBoosting"] == "log-odds of yes" and words["DecisionTree"] == "prediction"
    poisson = linear_model.PoissonRegressor().fit(X, np.exp(SIGNAL / 4))
    assert explainer(poisson)(X.head(1))[0]["explains"] == "log of the prediction"
    np.testing.assert_allclose(np.exp([one["output"] for one in explainer(poisson)(X.head(9))]), poisson.predict(X.head(9)))


def test_names_come_from_the_registered_columns_when_the_model_has_none():
    from mlops_nb.serve.inputs import columns_of

    model = fitted("RandomForest", "regressor")
    rows = pd.DataFrame(NUMBERS[:3], columns=list("vwxyz"))
    assert list(explainer(model, columns_of(dict.fromkeys("vwxyz", "double")))(rows)[0]["contributions"]) == list("vwxyz")
    whole = fitted("RandomForest", "regressor", pd.DataFrame(NUMBERS, columns=list("abcde")))
    shuffled = pd.DataFrame(NUMBERS[:3], columns=list("abcde"))[list("edcba")]
    np.testing.assert_allclose([one["output"] for one in explainer(whole)(shuffled)], whole.predict(shuffled[list("abcde")]))


NOT = [(KNeighborsClassifier(), "KNeighborsClassifier has no exact explanation"), (make_pipeline(PCA(2), linear_model.LogisticRegression()), "the step PCA mixes columns"),
       (make_pipeline(PolynomialFeatures(), linear_model.LogisticRegression()), "PolynomialFeatures mixes"), (make_pipeline(Normalizer(), tree.DecisionTreeClassifier()), "Normalizer mixes"),
       (make_pipeline(FunctionTransformer(lambda X: X[:, ::-1]), tree.DecisionTreeClassifier()), "FunctionTransformer mixes"), (svm.SVC(kernel="linear"), "SVC has no exact"),
       (ensemble.GradientBoostingClassifier(init=linear_model.LogisticRegression(), n_estimators=3), "has no exact")]


@pytest.mark.parametrize(("model", "words"), NOT, ids=lambda one: one if isinstance(one, str) else "")
def test_what_cannot_be_explained_is_not_and_a_sentence_says_why(model, words):
    model.fit(NUMBERS, TARGETS["two classes"])
    assert explainer(model) is None and words in why_not(model)
    with pytest.raises(Invalid):
        Explainer(model)


def test_several_numbers_a_row_are_not_explained():
    for model in (linear_model.LinearRegression(), ensemble.RandomForestRegressor(3), ensemble.RandomForestClassifier(3)):
        y = np.stack([SIGNAL, SIGNAL], axis=1) if not hasattr(model, "predict_proba") else np.stack([SIGNAL > 0, SIGNAL > 1], axis=1)
        assert explainer(model.fit(NUMBERS, y)) is None
    assert explainer(TransformedTargetRegressor(linear_model.LinearRegression()).fit(NUMBERS, SIGNAL)) is None and explainer(MLPRegressor((2,), max_iter=5)) is None


@pytest.fixture(scope="module")
def recommender():
    from mlops_nb.model.recommender import Recommender

    one = np.random.default_rng(3)
    purchases = pd.DataFrame({"user": one.integers(0, 60, 4000), "item": one.integers(0, 40, 4000) ** 2 // 40, "time": pd.Timestamp("2024-01-01") + pd.to_timedelta(one.integers(0, 200, 4000), "D")})
    return Recommender(n_windows=2, max_iter=15).fit(purchases)


@pytest.mark.parametrize("params", [{}, {"new_only": True}])
def test_the_best_items_are_those_of_predict_with_their_scores(recommender, params):
    rows = pd.DataFrame({"user": [5, 999_999, 7, 5]})  # 999999 never bought anything
    found = top_answers(recommender, rows, 4, params)
    assert [one["prediction"] for one in found] == recommender.predict(rows, k=4, **params).tolist()
    assert all(sorted((item["score"] for item in one["top"]), reverse=True) == [item["score"] for item in one["top"]] for one in found)
    reasons = explainer(recommender)(rows, k=4, **params)
    assert reasons[1]["items"] == [] and reasons[0] == reasons[3]
    for one, why in zip((found[0], found[2]), (reasons[0], reasons[2])):  # the classifier's log-odds are those of the score
        assert [item["item"] for item in why["items"]] == [item["item"] for item in one["top"]]
        np.testing.assert_allclose([1 / (1 + np.exp(-item["output"])) for item in why["items"]], [item["score"] for item in one["top"]], atol=1e-6)
        for item in why["items"]:
            assert item["base"] + sum(item["contributions"].values()) == pytest.approx(item["output"])


def test_the_most_probable_classes_and_what_the_model_predicts():
    X = pd.DataFrame(NUMBERS, columns=list("abcde"))
    model = ensemble.RandomForestClassifier(20, random_state=0).fit(X, TARGETS["three classes"])
    for one, chances in zip(top_answers(model, X.head(30), 2), model.predict_proba(X.head(30))):
        assert [best["probability"] for best in one["top"]] == sorted(chances.tolist(), reverse=True)[:2]
        assert one["top"][0]["class"] == one["prediction"]
    assert len(top_answers(model, X.head(1), 100)[0]["top"]) == 3
    careful = TunedThresholdClassifierCV(linear_model.LogisticRegression(), scoring="recall", cv=2).fit(X, (SIGNAL > 2).astype(int))
    answers = top_answers(careful, X, 1)
    assert [one["prediction"] for one in answers] == careful.predict(X).tolist() != [one["top"][0]["class"] for one in answers]  # its threshold is not a half
    tied = tree.DecisionTreeClassifier(max_depth=1).fit([[0], [0]], ["b", "a"])
    assert [best["class"] for best in top_answers(tied, pd.DataFrame({"x": [0]}), 2)[0]["top"]] == ["a", "b"]


@pytest.mark.parametrize("n", [0, -1, 101, 10**9])
def test_how_many_has_bounds(n):
    with pytest.raises(Invalid, match="expected from 1 to 100"):
        top_answers(fitted("DecisionTree", "two classes"), NUMBERS[:1], n)


@pytest.mark.parametrize("model", [linear_model.LinearRegression(), svm.LinearSVC(), linear_model.RidgeClassifier()], ids=lambda one: type(one).__name__)
def test_a_model_without_second_thoughts_says_so(model):
    model.fit(NUMBERS, TARGETS["two classes"] == "yes")
    assert not has_top(model)
    with pytest.raises(Invalid, match=f"a {type(model).__name__} gives no probabilities"):
        top_answers(model, NUMBERS[:1], 3)


def test_a_ranker_of_somebody_else_is_asked_for_k():
    class Ranker:
        def predict(self, rows, k=10, *, shop="main"):
            return [[shop] * k] * len(rows)

    assert top_answers(Ranker(), NUMBERS[:2], 2, {"shop": "north", "k": 7}) == [{"prediction": ["north", "north"]}] * 2
    with pytest.raises(Invalid, match="takes no param"):
        top_answers(Ranker(), NUMBERS[:2], 2, {"shops": "north"})


def library_of(name):
    "XGBoost or LightGBM; the latter also wants OpenMP of the system."
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        pytest.skip(f"{name} cannot be imported ({type(error).__name__}): pip install {name}")


def xgboost_models():
    "One of each kind of output, and where the library itself goes other ways."
    xgb = library_of("xgboost")
    few, y3 = dict(n_estimators=8, n_jobs=1), TARGETS["three classes"]
    yield xgb.XGBRegressor(**few).fit(NUMBERS, SIGNAL), "prediction"
    yield xgb.XGBRegressor(**few, objective="count:poisson").fit(NUMBERS, np.exp(SIGNAL / 4)), "log of the prediction"
    yield xgb.XGBRegressor(**few, booster="dart", rate_drop=0.3).fit(NUMBERS, SIGNAL), "prediction"
    yield xgb.XGBRegressor(n_estimators=90, n_jobs=1, early_stopping_rounds=2).fit(NUMBERS[:200], SIGNAL[:200], eval_set=[(NUMBERS[200:], -SIGNAL[200:])], verbose=False), "prediction"
    yield xgb.XGBClassifier(**few).fit(NUMBERS, SIGNAL > 0), "log-odds of 1"
    yield xgb.XGBClassifier(**few).fit(NUMBERS, y3), "log-odds of"
    yield xgb.XGBRFClassifier(**few).fit(NUMBERS, y3), "log-odds of"
    yield xgb.XGBClassifier(**few, objective="binary:hinge").fit(NUMBERS, SIGNAL > 0), "score of 1"
    yield xgb.XGBRanker(**few).fit(NUMBERS, (SIGNAL > 0).astype(int), group=[30] * 10), "score"


def lightgbm_models():
    lgb = library_of("lightgbm")
    few, y3 = dict(n_estimators=8, n_jobs=1, verbose=-1), TARGETS["three classes"]
    yield lgb.LGBMRegressor(**few).fit(NUMBERS, SIGNAL), "prediction"
    yield lgb.LGBMRegressor(**few, objective="tweedie").fit(NUMBERS, np.exp(SIGNAL / 4)), "log of the prediction"
    yield lgb.LGBMRegressor(**few, reg_sqrt=True).fit(NUMBERS, SIGNAL), "score"
    yield lgb.LGBMRegressor(**few, boosting_type="rf", bagging_freq=1, bagging_fraction=0.7).fit(NUMBERS, SIGNAL), "prediction"
    yield lgb.LGBMRegressor(**few | {"n_estimators": 90}).fit(NUMBERS[:200], SIGNAL[:200], eval_set=[(NUMBERS[200:], -SIGNAL[200:])], callbacks=[lgb.early_stopping(2, verbose=False)]), "prediction"
    yield lgb.LGBMClassifier(**few).fit(NUMBERS, TARGETS["two classes"]), "log-odds of yes"
    yield lgb.LGBMClassifier(**few).fit(NUMBERS, y3), "log-odds of"
    yield lgb.LGBMRanker(**few).fit(NUMBERS, (SIGNAL > 0).astype(int), group=[30] * 10), "score"


@pytest.mark.parametrize("models", [xgboost_models, lightgbm_models])
def test_boosters_add_up_and_agree_with_the_shap_package(models):
    rows = pd.DataFrame(np.where(rng.random((25, 5)) < 0.1, np.nan, NUMBERS[:25]), columns=list("abcde"))
    for model, words in models():
        found, outputs = Explainer(model)(rows), raw_outputs(model, rows.to_numpy())
        which = np.full(25, outputs.shape[1] - 1) if outputs.shape[1] <= 2 else outputs.argmax(axis=1)
        np.testing.assert_allclose([one["base"] + sum(one["contributions"].values()) for one in found], outputs[range(25), which], atol=1e-5)
        assert all(one["explains"].startswith(words) and one["output"] == pytest.approx(one["base"] + sum(one["contributions"].values())) for one in found)
        if outputs.shape[1] > 2:
            assert [one["explains"] for one in found] == [f"log-odds of {name}" for name in model.predict(rows.to_numpy())]
        if getattr(model, "booster", "") == "dart":
            continue  # the shap package knows no weights of trees
        theirs = np.asarray(shap.TreeExplainer(model).shap_values(rows.to_numpy())).reshape(25, 5, -1)
        theirs = theirs[range(25), :, which if theirs.shape[2] > 2 else -1]
        np.testing.assert_allclose([list(one["contributions"].values()) for one in found], theirs, atol=1e-5)


def parts_of(model):
    "The trees of a booster for `expectation`, from the table in which each library writes down its own."
    table = model.get_booster().trees_to_dataframe() if hasattr(model, "get_booster") else model.booster_.trees_to_dataframe()
    for _, one in table.groupby("Tree" if "Tree" in table else "tree_index"):
        if "Tree" in one:  # XGBoost: below a threshold is left, and a leaf has its answer as its gain
            ids, leaf = one["ID"], one["Feature"] == "Leaf"
            left, right, feature, threshold, missing = one["Yes"], one["No"], one["Feature"].str[1:], np.nextafter(one["Split"].astype("f4"), np.float32(-np.inf)), one["Missing"] == one["Yes"]
            value, cover = one["Gain"], one["Cover"]
        else:
            ids, leaf = one["node_index"], one["split_feature"].isna()
            left, right, feature, threshold, missing = one["left_child"], one["right_child"], one["split_feature"].str.rpartition("_")[2], one["threshold"], one["missing_direction"] == "left"
            value, cover = one["value"], one["count"]
        places = {name: i for i, name in enumerate(ids)}
        yield SimpleNamespace(children_left=np.array([places.get(name, -1) for name in left]), children_right=np.array([places.get(name, -1) for name in right]), missing_go_to_left=missing.to_numpy(),
                              feature=np.where(leaf, -1, pd.to_numeric(feature, errors="coerce").fillna(-1)).astype(int), threshold=np.asarray(threshold, float), value=value.to_numpy()[:, None], weighted_n_node_samples=cover.to_numpy(float))


@pytest.mark.parametrize("models", [xgboost_models, lightgbm_models])
def test_boosters_agree_with_the_definition(models):
    model = next(models())[0]
    for x in NUMBERS[:4]:
        found = Explainer(model)(pd.DataFrame(x[None], columns=list("abcde")))[0]
        defined = sum(by_definition(one, x) for one in parts_of(model))
        np.testing.assert_allclose(list(found["contributions"].values()), np.ravel(defined), atol=1e-5)


@pytest.mark.parametrize("library", ["xgboost", "lightgbm"])
@pytest.mark.parametrize("words", STEPS)
def test_boosters_are_explained_through_pipelines(library, words):
    made = library_of(library)
    X = shop()
    final = made.XGBClassifier(n_estimators=8, n_jobs=1) if library == "xgboost" else made.LGBMClassifier(n_estimators=8, n_jobs=1, verbose=-1)
    whole = make_pipeline(STEPS[words], final)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole.fit(X, np.where(X["price"].fillna(0) * X["pieces"] + (X["country"] == "France") * 9 > 25, 1, 0))
        found, seen = explainer(whole)(X.head(25)), whole[:-1].transform(X.head(25))
        outputs = whole[-1].predict(seen, **{"output_margin" if library == "xgboost" else "raw_score": True})  # sparse ones too, where XGBoost takes a zero for missing
    np.testing.assert_allclose([one["output"] for one in found], outputs, atol=1e-5)
    assert all(list(one["contributions"]) == list(X.columns) for one in found)


def test_columns_of_boosters_are_those_of_the_client():
    from mlops_nb.serve.inputs import columns_of

    lgb = library_of("lightgbm")
    X = pd.DataFrame(NUMBERS, columns=["unit price", *"bcde"])
    model = lgb.LGBMRegressor(n_estimators=5, n_jobs=1, verbose=-1).fit(X, SIGNAL)  # it keeps the name as unit_price
    found = explainer(model, columns_of(dict.fromkeys(X.columns, "double")))(X.head(9))
    assert list(found[0]["contributions"]) == list(X.columns)
    np.testing.assert_allclose([one["output"] for one in found], model.predict(X.head(9)), atol=1e-9)
    lined = lgb.LGBMRegressor(n_estimators=5, n_jobs=1, verbose=-1, linear_tree=True).fit(X, SIGNAL)
    assert explainer(lined) is None and "without linear_tree" in why_not(lined)


def test_categories_of_boosters():
    lgb = library_of("lightgbm")
    xgb = library_of("xgboost")
    X = pd.DataFrame({"size": NUMBERS[:, 0], "colour": pd.Series(rng.choice(list("rgb"), N), dtype="category")})
    for model in (lgb.LGBMRegressor(n_estimators=5, n_jobs=1, verbose=-1), xgb.XGBRegressor(n_estimators=5, n_jobs=1, enable_categorical=True)):
        model.fit(X, SIGNAL + X["colour"].cat.codes)
        np.testing.assert_allclose([one["output"] for one in explainer(model)(X.head(30))], model.predict(X.head(30)), atol=1e-5)


def test_several_numbers_a_row_of_xgboost_are_not_explained():
    xgb = library_of("xgboost")
    two = np.stack([SIGNAL, -SIGNAL], axis=1)
    for model, y in ((xgb.XGBRegressor(n_estimators=3), two), (xgb.XGBRegressor(n_estimators=3, multi_strategy="multi_output_tree"), two), (xgb.XGBClassifier(n_estimators=3), (two > 0).astype(int)),
                     (xgb.XGBRegressor(n_estimators=3, objective="reg:quantileerror", quantile_alpha=[0.1, 0.9]), SIGNAL)):
        assert explainer(model.fit(NUMBERS, y)) is None and "2 numbers a row" in why_not(model)


SERVED = """
import sys
from pathlib import Path
import httpx, numpy as np, pandas as pd, time
import mlops_nb as mlops
from mlops_nb.core.errors import Untrusted
from mlops_nb.model.registry import load_model

X = pd.DataFrame(np.random.default_rng(0).normal(size=(200, 3)), columns=["pieces", "price", "age"])
y = (X["pieces"] > 0).astype(int)
if sys.argv[1] == "xgboost":
    from xgboost import XGBClassifier
    model = XGBClassifier(n_estimators=5, n_jobs=1).fit(X, y)
else:
    from lightgbm import LGBMClassifier
    model = LGBMClassifier(n_estimators=5, n_jobs=1, verbose=-1).fit(X, y)
try:
    mlops.register(model, "shelf", example=X.head())
    raise SystemExit("it was registered without a word")
except Untrusted as error:
    said = str(error)
trust = eval(said[said.index("trust=") + 6:said.rindex("]") + 1])  # what a person copies from the sentence
mlops.register(model, "shelf", example=X.head(), trust=trust)
assert load_model("shelf@1").predict(X).tolist() == model.predict(X).tolist()
deployed = mlops.deploy("shelf@1")
try:
    token = Path(mlops.tokens("shelf", add="test").facts["file"]).read_text()
    with httpx.Client(base_url=deployed.url, headers={"Authorization": f"Bearer {token}"}, timeout=120) as asking:
        latest = time.monotonic() + 120
        while asking.get("/ping").status_code == 401 and time.monotonic() < latest:
            time.sleep(0.1)
        answer = asking.post("/predict?explain=true", json=X.head(3).to_dict("records"))
        assert answer.status_code == 200, answer.text
        records = answer.json()["records"]
finally:
    mlops.undeploy("shelf")
raw = model.predict(X.head(3), **{"output_margin" if sys.argv[1] == "xgboost" else "raw_score": True})
for one, expected in zip(records, raw):
    why = one["explanation"]
    assert list(why["contributions"]) == list(X.columns) and why["explains"] == "log-odds of 1", why
    assert abs(why["base"] + sum(why["contributions"].values()) - expected) < 1e-5, (why, expected)
assert [one["prediction"] for one in records] == model.predict(X.head(3)).tolist()
print("served")
"""


@pytest.mark.parametrize("library", ["xgboost", "lightgbm"])
def test_a_booster_is_registered_served_and_explained(tmp_path, library):
    "As a user does it: refused with the sentence that says what to trust, then trusted, deployed and asked."
    from mlops_nb.core.settings import init

    library_of(library)
    init(str(tmp_path / "shop"), name="shop")
    done = subprocess.run([sys.executable, "-c", SERVED, library], cwd=tmp_path / "shop", capture_output=True, text=True, timeout=600,
                          env={**{name: value for name, value in os.environ.items() if name != "MLOPS_PROJECT"}, "MLOPS_HOME": str(tmp_path / "home")})
    assert done.returncode == 0 and "served" in done.stdout, done.stdout + done.stderr[-3000:]
