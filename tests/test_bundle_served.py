"""A bundle holds what a server needs and nothing else; a changed, missing or foreign file is named, never loaded."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import skops.io
from models import customers, database, shop  # noqa: F401
from sklearn.compose import make_column_transformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from mlops_nb.core.errors import Conflict, Invalid, NotFound, Untrusted
from mlops_nb.core.files import digest_of
from mlops_nb.core.settings import in_project, init, project
from mlops_nb.model import registry
from mlops_nb.serve.bundle import ABOUT, MODEL, bundles_in, installed, load_bundle, read_bundle, vouched, write_bundle
from mlops_nb.serve.sources import BundleSource, tried


def forest():
    frame, bought = customers()
    numbers = make_pipeline(SimpleImputer(), RandomForestClassifier(5, max_depth=3, random_state=0))
    return numbers.fit(frame[["value", "pieces"]], bought), frame[["value", "pieces"]]


@pytest.fixture
def made(shop):  # noqa: F811
    estimator, frame = forest()
    found = registry.register(estimator, "buyers", example=frame.head(3))
    return found, estimator, frame, write_bundle(found, shop / "bundle")


def test_it_answers_as_the_registered_model_does(made):
    found, estimator, frame, bundled = made
    assert (load_bundle(bundled.folder).predict(frame) == estimator.predict(frame)).all()
    assert (bundled.name, bundled.version, bundled.digest, bundled.trusted) == (found.name, found.version, found.digest, found.trusted)
    assert [(one.name, one.kind) for one in bundled.columns] == [("value", "number"), ("pieces", "number")]
    assert bundled.example == found.example and bundled.kind == found.kind and bundled.validation == ""
    assert bundled.warnings == [] and bundled.versions["scikit-learn"] == installed("scikit-learn") and "mlflow" not in bundled.versions
    assert read_bundle(str(bundled.folder)) == bundled


def test_the_same_version_gives_the_same_bytes_anywhere(made, shop, tmp_path):  # noqa: F811
    found, *_, bundled = made
    write_bundle(found, bundled.folder)
    write_bundle(registry.model("buyers@challenger"), tmp_path / "deep" / "er")
    assert sorted(os.listdir(bundled.folder)) == [ABOUT, MODEL]
    for name in (ABOUT, MODEL):
        assert (bundled.folder / name).read_bytes() == (tmp_path / "deep" / "er" / name).read_bytes()
    text = (bundled.folder / ABOUT).read_text()
    assert str(shop) not in text and os.path.expanduser("~") not in text and found.run not in text


@pytest.mark.parametrize("verdicts, expected", [([{"name": "auc", "passed": True}], "passed"), ([{"name": "auc", "passed": True}, {"name": "psi", "passed": False}], "failed")])
def test_the_verdict_goes_along(made, verdicts, expected):
    found, *_, bundled = made
    registry.attach(found.address, "validation", {"title": "Validation", "verdicts": verdicts})
    assert write_bundle(found, bundled.folder).validation == expected


def test_text_columns_gaps_and_names(shop):  # noqa: F811
    frame, bought = customers()
    encode = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["country", "channel"]), (SimpleImputer(), ["value", "pieces"]))
    estimator = make_pipeline(encode, LinearRegression()).fit(frame, bought)
    bundled = write_bundle(registry.register(estimator, "text", example=frame.head(4)), shop / "text")
    np.testing.assert_array_equal(load_bundle(bundled.folder).predict(frame), estimator.predict(frame))
    assert {one.name: one.kind for one in bundled.columns} == {"value": "number", "pieces": "number", "country": "string", "channel": "string"}


@pytest.mark.parametrize("with_example", [True, False])
def test_a_model_of_text_is_a_bundle_that_is_asked_with_texts(shop, with_example):  # noqa: F811
    texts, mood = ["late again", "well packed", "broken on arrival", "lovely colours"], [0, 1, 0, 1]
    estimator = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, mood)
    bundled = write_bundle(registry.register(estimator, "mood", example=texts if with_example else None), shop / "mood")
    assert [(one.name, one.kind, one.form) for one in bundled.columns] == [("text", "string", "series")]
    source = BundleSource(bundled.folder)
    said = tried(version := source.resolve("mood", "1"), source.load(version))
    assert said == mood if with_example else len(said) == 1


def test_a_version_of_another_project_is_taken_when_it_is_harmless(made, shop, tmp_path):  # noqa: F811
    "Its record is not here, only MLflow's folder: a linear model is, a forest is not."
    frame, bought = customers()
    linear = LinearRegression().fit(frame[["pieces"]], bought)
    there = registry.register(linear, "line", example=frame[["pieces"]].head(2))
    other = tmp_path / "other"
    init(str(other), name="other")
    shutil.copy(shop / ".mlops" / "mlflow.db", other / ".mlops" / "mlflow.db")
    with in_project(other):
        assert not registry.model("line").ours
        bundled = write_bundle(registry.model("line"), tmp_path / "line")
        np.testing.assert_array_equal(load_bundle(bundled.folder).predict(frame[["pieces"]]), linear.predict(frame[["pieces"]]))
        assert bundled.digest == there.digest and bundled.trusted == ()
        with pytest.raises(Untrusted, match="Tree"):
            write_bundle(registry.model("buyers"), tmp_path / "buyers")
        assert not (tmp_path / "buyers").exists()


def test_a_registered_file_that_changed_gives_no_bundle(made, tmp_path):
    found, *_ = made
    file = project().path(found.file)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(Untrusted, match="has changed since it was registered"):
        write_bundle(found, tmp_path / "late")
    assert not (tmp_path / "late").exists()


def test_other_files_are_left_alone(made, tmp_path):
    found, *_ = made
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(Conflict, match="thesis.tex"):
        write_bundle(found, tmp_path / "home")
    assert os.listdir(tmp_path / "home") == ["thesis.tex"]


def flip(folder, at):
    content = bytearray((folder / MODEL).read_bytes())
    content[at] ^= 1
    (folder / MODEL).write_bytes(content)


def about(folder, **changes):
    facts = json.loads((folder / ABOUT).read_text()) | changes
    (folder / ABOUT).write_text(json.dumps({key: value for key, value in facts.items() if value is not ...}))


FAULTS = {
    "first byte": (lambda folder: flip(folder, 0), Untrusted, "is not the file of buyers@1"),
    "a byte in the middle": (lambda folder: flip(folder, 5000), Untrusted, "is not the file of buyers@1"),
    "last byte": (lambda folder: flip(folder, -1), Untrusted, "is not the file of buyers@1"),
    "cut": (lambda folder: (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:1000]), Untrusted, "is not the file"),
    "empty": (lambda folder: (folder / MODEL).write_bytes(b""), Untrusted, "is not the file"),
    "no model": (lambda folder: (folder / MODEL).unlink(), NotFound, "has no model.skops"),
    "a folder for a model": (lambda folder: ((folder / MODEL).unlink(), (folder / MODEL).mkdir()), NotFound, "has no model.skops"),
    "no page": (lambda folder: (folder / ABOUT).unlink(), NotFound, "has no model.json"),
    "page cut": (lambda folder: (folder / ABOUT).write_text((folder / ABOUT).read_text()[:80]), Invalid, "is damaged"),
    "page empty": (lambda folder: (folder / ABOUT).write_text(""), Invalid, "is damaged"),
    "page not text": (lambda folder: (folder / ABOUT).write_bytes(b"\xff\xfe\x00"), Invalid, "is damaged"),
    "page a list": (lambda folder: (folder / ABOUT).write_text("[1]"), Invalid, "'no object'"),
    "no format": (lambda folder: about(folder, format=...), Invalid, "'no format'"),
    "later format": (lambda folder: about(folder, format=2), Invalid, "says '2' and this mlops_nb reads format 1"),
    "no digest": (lambda folder: about(folder, digest=...), Invalid, "no valid 'digest'"),
    "version as text": (lambda folder: about(folder, version="3"), Invalid, "no valid 'version'"),
    "version as true": (lambda folder: about(folder, version=True), Invalid, "no valid 'version'"),
    "columns unnamed": (lambda folder: about(folder, inputs=[{"type": "long"}]), Invalid, "no valid 'inputs'"),
    "types not text": (lambda folder: about(folder, trusted=[["os.system"]]), Invalid, "no valid 'inputs' or 'trusted'"),
    "a path as name": (lambda folder: about(folder, name="../../etc"), Invalid, "is not an address"),
    "types forgotten": (lambda folder: about(folder, trusted=[]), Untrusted, "sklearn.tree._tree.Tree"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_bundle_is_named_and_never_loaded(made, fault):
    *_, bundled = made
    spoil, kind, words = FAULTS[fault]
    spoil(bundled.folder)
    with pytest.raises(kind, match=words) as caught:
        load_bundle(bundled.folder)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_pickle_in_its_place_is_never_read(made):
    import pickle

    class Bomb:
        def __reduce__(self):
            return os.mkdir, ("exploded",)

    *_, bundled = made
    content = pickle.dumps(Bomb())
    bundled.file.write_bytes(content)
    about(bundled.folder, digest=digest_of(content))
    with pytest.raises((Untrusted, Invalid)):
        load_bundle(bundled.folder)
    with pytest.raises(Untrusted, match="pickle"):
        vouched(read_bundle(bundled.folder))
    assert not os.path.exists("exploded")


def test_a_strangers_bundle_needs_a_person(made):
    *_, bundled = made
    with pytest.raises(Untrusted, match=f"MLOPS_TRUST={bundled.digest[:16]}"):
        vouched(bundled)
    for digests in (["0" * 16], [bundled.digest[:11]], [bundled.digest[1:20]], [""]):
        with pytest.raises(Untrusted):
            vouched(bundled, digests)
    for digests in ([bundled.digest[:12]], ["0" * 12, bundled.digest]):
        assert vouched(bundled, digests) is bundled
    flip(bundled.folder, 100)
    with pytest.raises(Untrusted, match="is not the file of"):
        vouched(bundled, [bundled.digest])


def test_a_strangers_page_cannot_vouch_for_its_file(made, tmp_path):
    "A page that trusts os.system beside a file that would call it."
    from sklearn.preprocessing import FunctionTransformer

    *_, bundled = made
    content = skops.io.dumps(FunctionTransformer(os.system))
    types = skops.io.get_untrusted_types(data=content)
    assert types
    bundled.file.write_bytes(content)
    about(bundled.folder, digest=digest_of(content), trusted=types)
    with pytest.raises(Untrusted, match="could be forged"):
        vouched(read_bundle(bundled.folder))


def test_another_scikit_learn_is_a_warning(made):
    *_, bundled = made
    about(bundled.folder, versions={"scikit-learn": "0.24.2", "numpy": "1.0", "skops": installed("skops")})
    assert [line.split(" and ")[0] for line in read_bundle(bundled.folder).warnings] == ["buyers@1 was saved with scikit-learn 0.24.2"]


def test_several_in_one_folder(made, tmp_path):
    found, estimator, frame, bundled = made
    write_bundle(registry.register(estimator, "buyers", example=frame.head(2)), tmp_path / "all" / "buyers" / "2")
    write_bundle(found, tmp_path / "all" / "first")
    write_bundle(registry.register(estimator, "another"), tmp_path / "all" / "z")
    (tmp_path / "all" / "lost+found").mkdir()
    (tmp_path / "all" / "note.txt").write_text("not a model")
    assert [one.address for one in bundles_in(tmp_path / "all")] == ["another@1", "buyers@1", "buyers@2"]
    assert [one.address for one in bundles_in(tmp_path / "all" / "first")] == ["buyers@1"]
    assert bundles_in(tmp_path / "all")[0].columns == ()  # registered without an example: nothing is checked
    write_bundle(found, tmp_path / "all" / "again")
    with pytest.raises(Conflict, match="buyers@1 is in .* twice"):
        bundles_in(tmp_path / "all")
    with pytest.raises(NotFound, match="there is no model in"):
        bundles_in(tmp_path / "all" / "lost+found")


def test_reading_needs_only_what_an_image_has(made):
    "No MLflow, no Jupyter, no settings, no web framework: those imports are made to fail."
    *_, frame, bundled = made
    code = f"""
import sys
class Closed:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mlflow", "IPython", "jupyter_client", "papermill", "matplotlib", "pydantic", "starlette", "granian", "pyarrow", "sqlalchemy"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Closed())
import pandas as pd
from mlops_nb.serve.bundle import bundles_in, load_bundle, vouched
bundled = bundles_in({str(bundled.folder)!r})[0]
vouched(bundled, [bundled.digest])
print(load_bundle(bundled).predict(pd.DataFrame(bundled.example["data"], columns=bundled.example["columns"])).tolist())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == str(made[1].predict(frame.head(3)).tolist())


def test_predict_on_frames_without_names(shop):  # noqa: F811
    "A model fitted on arrays has no column names: its bundle checks nothing, and still loads."
    estimator = LinearRegression().fit(np.arange(8.0).reshape(4, 2), [1, 2, 3, 4])
    bundled = write_bundle(registry.register(estimator, "bare", example=pd.DataFrame([[1.0, 2.0]], columns=["a", "b"])), shop / "bare")
    assert len(bundled.columns) == 2 and load_bundle(bundled).predict([[0.0, 1.0]]) == pytest.approx([1.0])
