"""What would break for somebody who loads a model: an ordinary one that is refused, or a hostile one that is not."""

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import skops.io
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfVectorizer
from sklearn.feature_selection import SelectKBest, f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import get_scorer, get_scorer_names
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer

from mlops_nb.core.errors import Invalid, Untrusted
from mlops_nb.model.trust import FORGEABLE, REVIEWED, SEARCHED, as_asked, keep_promise, model_bytes, model_from, reviewed, takes_text, types_in

X, y = np.random.default_rng(0).random((60, 3)), np.arange(60) % 2


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def renamed(data: bytes, old: dict, new: dict) -> bytes:
    """The same model file with another class or function named in its description."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(target, "w") as out:
        for name in source.namelist():
            content = source.read(name)
            if name == "schema.json":
                def walk(node):
                    if isinstance(node, dict):
                        if all(node.get(key) == value for key, value in old.items()):
                            node.update(new)
                        for value in node.values():
                            walk(value)
                    elif isinstance(node, list):
                        for value in node:
                            walk(value)

                schema = json.loads(content)
                walk(schema)
                content = json.dumps(schema).encode()
                assert json.dumps(new)[1:-1].split(", ")[0] in content.decode(), "nothing was renamed"
            out.writestr(name, content)
    return target.getvalue()


def test_the_lists_do_not_overlap_and_name_no_whole_module():
    names = [f"{module}.{name}" for one in (REVIEWED, SEARCHED, FORGEABLE) for module, names in one.items() for name in names.split()]
    assert len(names) == len(set(names)) == len(reviewed())
    assert not any("*" in name for name in names)
    assert reviewed(ours=False) < reviewed()


@pytest.mark.parametrize("name", ["posix.system", "os.system", "builtins.eval", "builtins.exec", "builtins.getattr", "subprocess.Popen", "importlib.import_module",
                                  "operator.methodcaller", "operator.attrgetter", "joblib.numpy_pickle.load", "numpy.load", "pandas.read_pickle",
                                  "scipy.stats._distn_infrastructure.rv_continuous_frozen"])
def test_nothing_that_runs_something_is_on_a_list(name):
    assert name not in reviewed()


@pytest.mark.parametrize("name", sorted(get_scorer_names()))
def test_every_named_scorer_of_scikit_learn_is_fine(name):
    assert set(types_in(skops.io.dumps(get_scorer(name)))) <= reviewed()


def test_a_function_that_runs_a_command_is_refused_and_named(tmp_path):
    with pytest.raises(Untrusted, match=r"posix\.system.*trust=\['posix\.system'\]"):
        model_bytes(make_pipeline(FunctionTransformer(os.system), LogisticRegression()))


def hostile_files(mark):
    """(what it tries, the file)"""
    searched = skops.io.dumps(make_pipeline(SelectKBest(f_classif, k=1), LogisticRegression()).fit(X, y))
    yield "a function swapped for os.system", renamed(searched, {"__class__": "f_classif"}, {"__module__": "posix", "__class__": "system"})
    estimator = skops.io.dumps(LogisticRegression().fit(X, y))
    for module, name in (("subprocess", "Popen"), ("builtins", "eval"), ("posix", "system"), ("joblib.memory", "Memory"), ("code", "InteractiveInterpreter")):
        yield f"a class swapped for {name}", renamed(estimator, {"__class__": "LogisticRegression"}, {"__class__": name, "__module__": module})
    yield "a pickle", pickle.dumps(Bomb(f"touch {mark}"))
    yield "an old pickle", pickle.dumps(Bomb(f"touch {mark}"), protocol=0)


def test_a_hostile_file_is_refused_without_running(tmp_path):
    mark, tried = tmp_path / "pwned", []
    for attempt, data in hostile_files(mark):
        with pytest.raises((Untrusted, Invalid)):
            model_from(data, reviewed())
        assert not mark.exists(), attempt
        tried.append(attempt)
    assert len(tried) == 8


def test_a_pickle_inside_a_model_file_is_never_opened(tmp_path):
    mark = tmp_path / "pwned"
    source, target = zipfile.ZipFile(io.BytesIO(skops.io.dumps(LogisticRegression().fit(X, y)))), io.BytesIO()
    with zipfile.ZipFile(target, "w") as out:
        for name in source.namelist():
            out.writestr(name, source.read(name) if name == "schema.json" else pickle.dumps(Bomb(f"touch {mark}")))
    with pytest.raises((Untrusted, Invalid)):
        model_from(target.getvalue(), reviewed())
    assert not mark.exists()


def test_a_frozen_distribution_is_refused_because_scipy_executes_its_template(tmp_path):
    mark = tmp_path / "pwned"
    frozen = scipy.stats.loguniform(0.1, 1)
    frozen.dist._parse_arg_template = f"import os; os.system('touch {mark}')"
    data = skops.io.dumps(RandomizedSearchCV(LogisticRegression(), {"C": frozen}))
    assert not mark.exists()
    with pytest.raises(Untrusted, match="rv_continuous_frozen"):
        model_from(data, reviewed())
    assert not mark.exists()
    with pytest.raises(KeyError):
        skops.io.loads(data, trusted=types_in(data))  # the danger is real: it runs before this error is raised
    assert mark.exists()


def test_a_strangers_forest_needs_a_word_and_ours_does_not():
    data, types = model_bytes(RandomForestClassifier(3, random_state=0).fit(X, y))
    assert types == ["sklearn.tree._tree.Tree"]  # https://github.com/scikit-learn/scikit-learn/pull/34558: forged node indices crash the process
    with pytest.raises(Untrusted, match="sklearn.tree._tree.Tree"):
        model_from(data, reviewed(ours=False))
    assert np.array_equal(model_from(data, types).predict(X), RandomForestClassifier(3, random_state=0).fit(X, y).predict(X))


@pytest.mark.parametrize("damage", [b"", b"PK", b"not a model at all", b"\x80\x04.", b"\x1f\x8b\x08\x00" + bytes(20)])
def test_a_file_that_is_no_model_says_so(damage):
    with pytest.raises((Invalid, Untrusted), match="model|pickle"):
        model_from(damage, reviewed())
    with pytest.raises((Invalid, Untrusted), match="model|pickle"):
        types_in(damage)


def test_a_truncated_model_says_so():
    data, types = model_bytes(LogisticRegression().fit(X, y))
    for size in (10, len(data) // 2, len(data) - 5):
        with pytest.raises((Invalid, Untrusted)):
            model_from(data[:size], types)


def test_what_skops_cannot_write_says_why():
    model = LogisticRegression().fit(X, y)
    model.history = (row for row in [1])
    with pytest.raises(Invalid, match="this LogisticRegression cannot be written"):
        model_bytes(model)


# ---------------------------------------------------------------- what a model says of its example

@pytest.mark.parametrize(("estimator", "expected"), [
    (make_pipeline(TfidfVectorizer(), LogisticRegression()), True), (make_pipeline("passthrough", HashingVectorizer(), LogisticRegression()), True),
    (make_pipeline(make_union(CountVectorizer(), TfidfVectorizer()), LogisticRegression()), True), (GridSearchCV(make_pipeline(TfidfVectorizer(), LogisticRegression()), {}), True),
    (LogisticRegression(), False), (RandomForestClassifier(), False), (make_pipeline(FunctionTransformer(), LogisticRegression()), False), (object(), False)])
def test_a_model_of_text_is_known_by_how_it_begins(estimator, expected):
    assert takes_text(estimator) is expected


@pytest.mark.parametrize("example", [["late", "fine"], ("late", "fine"), np.array(["late", "fine"]), np.array(["late", "fine"], dtype=object), pd.Series(["late", "fine"], index=[7, 7]), pd.Series(["late", "fine"], dtype="category")], ids=lambda one: type(one).__name__)
def test_single_values_become_a_named_series(example):
    pd.testing.assert_series_equal(as_asked(example), pd.Series(["late", "fine"], name="text"))


def test_what_has_columns_stays_as_it_is():
    for example in (X, pd.DataFrame(X), X.tolist(), [], None):
        assert as_asked(example) is example
    assert as_asked(pd.Series([1.5, 2], name="weight")).name == "weight" and as_asked([1.5, 2]).name == "value"


class Lumps:
    """One answer, however many rows."""

    def predict(self, rows):
        return [1]


def promised(estimator, example):
    with pytest.raises(Invalid) as refused:
        keep_promise(estimator, b"", [], example)
    said = str(refused.value)
    assert "\n" not in said and said.endswith(".") and len(said) < 400
    return said


def test_answers_that_are_not_one_a_row_are_refused():
    assert "gives 1 predictions for the 3 rows" in promised(Lumps(), pd.DataFrame(X[:3]))
    assert "gives 1 predictions for the 2 rows" in promised(Lumps(), ["a", "b"])


@pytest.mark.parametrize("rows", [1, 5])
def test_a_frame_is_no_example_for_a_model_of_text(rows):
    "One row is the worst: its one answer looks right and is that about the column's name."
    texts = pd.DataFrame({"text": ["late again", "well packed"] * 5})
    assert 'such as example=frame["text"]' in promised(make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts["text"], [0, 1] * 5), texts.head(rows))


def test_a_wrong_example_is_refused_in_one_sentence():
    model = LogisticRegression().fit(pd.DataFrame(X, columns=["a", "b", "c"]), y)
    assert "it lacks 'a', 'c'" in promised(model, pd.DataFrame({"b": [1.0], "x": [2.0]}))
    assert "3 features" in promised(model, X[:, :2]) and "NaN" in promised(model, X * np.nan) and "not fitted" in promised(LogisticRegression(), X)
    many = pd.DataFrame(np.random.default_rng(0).random((9, 40)), columns=[f"a rather long name {i}" for i in range(40)])
    assert "and more" in promised(LogisticRegression().fit(many, [0, 1, 0, 1, 0, 1, 0, 1, 0]), many.iloc[:, :3])


class Ordered:
    """Looks at the order of a category, which JSON does not carry; so does LightGBM."""

    def predict(self, rows):
        return rows["kind"].cat.codes.to_numpy() * (1 + rows["kind"].cat.ordered)


def test_a_model_that_needs_more_than_plain_categories_is_refused(monkeypatch):
    monkeypatch.setattr("mlops_nb.model.trust.model_from", lambda data, types: Ordered())
    for kinds in (pd.Categorical(["b", "c"], ["a", "b", "c"], ordered=True), pd.Categorical(pd.to_datetime(["2011-11-09", "2011-11-10"]))):
        assert "needs more of 'kind' than plain categories" in promised(Ordered(), pd.DataFrame({"kind": kinds}))
    assert list(keep_promise(Ordered(), b"", [], pd.DataFrame({"kind": pd.Categorical(["b", "c"], ["a", "b", "c"])}))) == [1, 2]
