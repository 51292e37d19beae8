"""What would break for somebody who registers models: predictions that change, versions that mix, a file nobody may trust."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from patience import until
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.ensemble import (ExtraTreesRegressor, GradientBoostingClassifier, HistGradientBoostingClassifier, HistGradientBoostingRegressor, IsolationForest,
                              RandomForestClassifier, StackingRegressor, VotingClassifier)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.feature_selection import SelectKBest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, WhiteKernel
from sklearn.impute import KNNImputer, SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge, SGDClassifier
from sklearn.model_selection import GridSearchCV, TimeSeriesSplit
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, OrdinalEncoder, PowerTransformer, SplineTransformer, StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

from mlops_nb.core.errors import Conflict, Invalid, MlopsError, NotFound, Unavailable, Untrusted
from mlops_nb.core.settings import in_project
from mlops_nb.data.store import save
from mlops_nb.deploy.engine import free_port
from mlops_nb.model.backend import tracking
from mlops_nb.model.registry import alias_history, attach, attached, load_model, model, model_versions, models, promote, register, summary, track
from models import customers, database, new_shop, shop  # noqa: F401

NUMBERS, ROWS = ["value", "pieces"], customers(40, seed=1)[0]
ENV = {key: value for key, value in os.environ.items() if not key.startswith("MLOPS_")} | {"PYTHONWARNINGS": "ignore"}


def save_versions(**counts):
    """Data sets with so many versions each; the digests by address."""
    saved = [save(pd.DataFrame({"row": range(number + 1)}), name) for name, count in counts.items() for number in range(count)]
    return {one.address: one.digest for one in saved}


def columns(*, scale=True):
    numbers = make_pipeline(SimpleImputer(strategy="median"), StandardScaler()) if scale else SimpleImputer()
    return ColumnTransformer([("numbers", numbers, NUMBERS), ("words", OneHotEncoder(handle_unknown="ignore"), ["country", "channel"])])


def imputed(estimator):
    return make_pipeline(columns(), estimator)


def dense(estimator):
    return make_pipeline(ColumnTransformer([("n", KNNImputer(), NUMBERS)]), estimator)


MODELS = {
    "logistic": imputed(LogisticRegression()),
    "forest": imputed(RandomForestClassifier(20, random_state=0)),
    "tree": imputed(DecisionTreeClassifier(max_depth=4, random_state=0)),
    "extra-trees": imputed(ExtraTreesRegressor(10, random_state=0)),
    "gradient-boosting": imputed(GradientBoostingClassifier(n_estimators=10, random_state=0)),
    "hist-classifier": make_pipeline(ColumnTransformer([("w", OrdinalEncoder(encoded_missing_value=-1), ["country", "channel"])], remainder="passthrough"),
                                     HistGradientBoostingClassifier(max_iter=20, categorical_features=[0, 1])),
    "hist-regressor": make_pipeline(FunctionTransformer(check_inverse=False), HistGradientBoostingRegressor(max_iter=20, loss="poisson")),
    "neighbours": dense(KNeighborsClassifier(5)),
    "neighbours-ball": dense(KNeighborsRegressor(5, algorithm="ball_tree", metric="manhattan")),
    "network": imputed(MLPClassifier((8,), solver="lbfgs", max_iter=2000, random_state=0)),
    "adam": dense(make_pipeline(StandardScaler(), MLPClassifier((4,), max_iter=600, early_stopping=True, random_state=0))),
    "svc": imputed(SVC()),
    "sgd": imputed(SGDClassifier(random_state=0)),
    "calibrated": imputed(CalibratedClassifierCV(RandomForestClassifier(5, random_state=0), method="isotonic", cv=3)),
    "sigmoid": imputed(CalibratedClassifierCV(LogisticRegression(), cv=3)),
    "grid": GridSearchCV(imputed(LogisticRegression()), {"logisticregression__C": [0.1, 1]}, scoring="roc_auc", cv=TimeSeriesSplit(3)),
    "kmeans": dense(KMeans(3, n_init=2, random_state=0)),
    "isolation": dense(IsolationForest(n_estimators=10, random_state=0)),
    "gaussian": dense(GaussianProcessRegressor(RBF() + WhiteKernel())),
    "target": dense(TransformedTargetRegressor(Ridge(), func=np.log1p, inverse_func=np.expm1, check_inverse=False)),
    "splines": dense(make_pipeline(PowerTransformer(), SplineTransformer(), SelectKBest(k=4), LogisticRegression())),
    "voting": imputed(VotingClassifier([("a", LogisticRegression()), ("b", RandomForestClassifier(5, random_state=0))])),
    "stacking": imputed(StackingRegressor([("r", Ridge()), ("k", KNeighborsRegressor())])),
}
LOAD_ALL = """
import sys, warnings; warnings.simplefilter("ignore")
import numpy as np, pandas as pd
from mlops_nb.model.registry import load_model, summary
rows = pd.read_parquet(sys.argv[1])
said = {one["name"]: np.asarray(load_model(one["name"] + "@challenger").predict(rows[["value", "pieces"]] if one["name"] == "hist-regressor" else rows)) for one in summary()}
assert "mlflow" not in sys.modules, "loading a model must not need mlflow"
np.savez(sys.argv[2], **said)
"""


def run_python(code, *args, folder, **options):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=folder, env=ENV, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory, database):  # noqa: F811
    """Every model registered here, and what another process says after loading it: name -> (here, there)."""
    folder = new_shop(tmp_path_factory.mktemp("all") / "shop", database)
    frame, bought = customers()
    here = {}
    with in_project(folder):
        for name, estimator in MODELS.items():
            rows, asked = (frame[NUMBERS], ROWS[NUMBERS]) if name == "hist-regressor" else (frame, ROWS)
            estimator.fit(rows, bought)
            here[name] = np.asarray(estimator.predict(asked))
            assert register(estimator, name, example=rows).version == 1
    ROWS.to_parquet(folder / "rows.parquet")
    done = run_python(LOAD_ALL, folder / "rows.parquet", folder / "said.npz", folder=folder)
    assert done.returncode == 0, done.stderr
    there = np.load(folder / "said.npz", allow_pickle=False)
    return {name: (here[name], there[name]) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_another_process_predicts_the_same(reloaded, name):
    here, there = reloaded[name]
    assert here.dtype == there.dtype and np.array_equal(here, there)


@pytest.fixture
def fitted():
    frame, bought = customers()
    return imputed(LogisticRegression()).fit(frame, bought)


def test_mlflows_own_loader_reads_it_and_knows_its_inputs(shop, fitted, monkeypatch):  # noqa: F811
    registered = register(fitted, "buys", example=ROWS)
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{shop}/.mlops/mlflow.db")
    plain = mlflow.pyfunc.load_model("models:/buys@challenger")
    assert np.array_equal(plain.predict(ROWS), fitted.predict(ROWS))
    assert np.array_equal(mlflow.sklearn.load_model("models:/buys/1").predict_proba(ROWS), fitted.predict_proba(ROWS))
    assert [one["name"] for one in registered.inputs] == list(ROWS.columns) == plain.metadata.get_input_schema().input_names()
    assert registered.inputs[0]["type"] == "double" and registered.inputs[2] == {"required": False, "type": "string", "name": "country"}


def test_the_record_says_what_it_was_made_of(shop, fitted):  # noqa: F811
    digests = save_versions(orders=3, customers=2)
    with track("tuning", params={"C": 1}, data=["orders@3"]) as run:
        run.log(metrics={"ndcg@10": "0.36"})
    made = register(fitted, "buys", run=run, params={"seed": 7}, data=["customers@2"])
    assert made == model("buys") == model("buys@challenger") == model(f"buys@{made.digest[:8]}") == model("buys@1")
    assert (made.data, made.metrics, made.params) == (("orders@3", "customers@2"), {"ndcg@10": 0.36}, {"C": 1, "seed": 7})
    assert made.data_digests == {one: digests[one] for one in made.data}
    assert made.run == run.id and made.kind == "Pipeline(LogisticRegression)" and made.by
    with tracking() as client:
        kept = client.get_run(run.id)
        assert kept.info.status == "FINISHED" and kept.data.metrics == {"ndcg_at_10": 0.36} and kept.data.params == {"C": "1", "seed": "7"}
        assert client.get_model_version_by_alias("buys", "challenger").tags["mlops.digest"] == made.digest
    assert "ndcg@10 0.36" in models("buys").text()
    again = register(fitted, "buys", run=run.id)
    assert again.version == 2 and again.file != made.file and (shop / made.file).exists()


def test_a_run_fails_with_its_block(shop):  # noqa: F811
    with pytest.raises(ZeroDivisionError), track("breaks") as run:
        1 / 0  # noqa: B018
    with track("works") as fine, tracking() as client:
        assert client.get_run(fine.id).info.status == "RUNNING"
    with tracking() as client:
        assert client.get_run(run.id).info.status == "FAILED"
        assert "ZeroDivisionError" in client.get_run(run.id).data.tags["mlops.error"]
        assert client.get_run(fine.id).info.status == "FINISHED"
        assert client.get_run(track("plain").id).info.status == "FINISHED"


def test_many_figures_and_odd_names_are_kept(shop, tmp_path):  # noqa: F811
    run = track("wide", params={f"p{i}": i for i in range(230)}, metrics={f"m{i}": i for i in range(1100)} | {"f1 (macro)": 0.5, "gap": float("nan")})
    (tmp_path / "notes.txt").write_text("tried on a rainy day")
    run.artifact(tmp_path / "notes.txt")
    with tracking() as client:
        kept = client.get_run(run.id)
        assert len(kept.data.params) == 230 and len(kept.data.metrics) == 1102 and kept.data.metrics["f1 _macro_"] == 0.5
        assert [one.path for one in client.list_artifacts(run.id)] == ["notes.txt"]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "swapped", "gone"])
def test_a_file_that_changed_is_refused(shop, fitted, damage):  # noqa: F811
    file = shop / register(fitted, "buys").file
    whole = file.read_bytes()
    other = (shop / register(imputed(LogisticRegression(C=0.01)).fit(*customers()), "other").file).read_bytes()
    {"flipped": lambda: file.write_bytes(whole[:99] + bytes([whole[99] ^ 1]) + whole[100:]), "truncated": lambda: file.write_bytes(whole[:-100]),
     "swapped": lambda: file.write_bytes(other), "gone": file.unlink}[damage]()
    with pytest.raises(NotFound if damage == "gone" else Untrusted, match=r"buys@1.*restore it from a backup, or register"):
        load_model("buys")
    assert summary()[0]["name"] == "buys"


def test_a_moved_project_keeps_its_models(shop, fitted, tmp_path):  # noqa: F811
    first = register(fitted, "buys", example=ROWS)
    moved = tmp_path / "elsewhere" / "kept"
    moved.parent.mkdir()
    shutil.move(shop, moved)
    with in_project(moved):
        assert np.array_equal(load_model("buys@1").predict(ROWS), fitted.predict(ROWS))
        second = register(fitted, "buys", example=ROWS)
        assert (moved / second.file).exists() and not shop.exists(), "new files must not go to the old place"
        attach("buys@1", "validation", {"passed": True})
        with tracking() as client:
            assert Path(client.download_artifacts(first.run, "buys/MLmodel")).exists()
    assert not shop.exists()


CUSTOM = "import numpy as np\nclass Rule:\n    def __init__(self, bound=10.0):\n        self.bound = bound\n    def predict(self, rows):\n        return np.asarray(rows['pieces'] > self.bound)\n"


def test_a_class_of_ones_own_needs_a_word(shop, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "house_rules.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    from house_rules import Rule

    with pytest.raises(Untrusted, match=r"house_rules\.Rule.*trust=\['house_rules\.Rule'\]"):
        register(Rule(), "rule", example=ROWS)
    assert summary() == [], "nothing is registered when it is refused"
    made = register(Rule(20.0), "rule", example=ROWS, trust=["house_rules.Rule"])
    assert made.trusted == ("house_rules.Rule",) and load_model("rule").bound == 20
    done = run_python("from mlops_nb.model.registry import load_model; load_model('rule')", folder=shop)
    assert "needs the module 'house_rules', which is not installed here" in done.stderr


def test_a_class_from_a_notebook_is_sent_to_a_module(shop):  # noqa: F811
    done = run_python(CUSTOM + "from mlops_nb.model.registry import register\nregister(Rule(), 'rule')", folder=shop)
    assert "Invalid: this Rule uses __main__.Rule from this notebook" in done.stderr and "move it into a module" in done.stderr


@pytest.mark.parametrize(("given", "error", "says"), [
    ({"a": 1}, Invalid, "a dict is not a model; expected an object with predict"),
    (LogisticRegression(), Invalid, "cannot predict its own example"),
    ("nowhere.skops", NotFound, "there is no file nowhere.skops"),
])
def test_what_is_not_a_model_is_refused(shop, given, error, says):  # noqa: F811
    with pytest.raises(error, match=says):
        register(given, "odd", example=ROWS[NUMBERS].fillna(0))
    assert summary() == []


def test_a_pickle_is_refused_whatever_it_is_called(shop, tmp_path):  # noqa: F811
    import pickle

    for name in ("model.pkl", "model.skops"):
        (tmp_path / name).write_bytes(pickle.dumps(LogisticRegression().fit([[0], [1]], [0, 1])))
        with pytest.raises(Untrusted, match="pickle"):
            register(str(tmp_path / name), "odd")


class Moody:
    "Predicts something else every time."
    def predict(self, rows):
        return np.random.random(len(rows))


def test_a_model_that_answers_differently_each_time_is_refused(shop):  # noqa: F811
    with pytest.raises(Invalid, match="predicts otherwise"):
        register(Moody(), "moody", example=ROWS, trust=[f"{Moody.__module__}.Moody"])


def test_aliases_move_and_remember(shop, fitted):  # noqa: F811
    for _ in range(3):
        register(fitted, "buys")
    assert promote("buys@1").aliases == ("champion",)
    assert promote("buys@challenger").version == 3 and promote("buys").aliases == ("challenger", "champion")
    promote("buys@2", "canary")
    assert [(one["previous"], one["version"]) for one in alias_history("buys") if one["alias"] == "champion"] == [(None, 1), (1, 3)]
    assert summary() == [{"name": "buys", "version": 3, "aliases": {"canary": 2, "challenger": 3, "champion": 3}, "run": model("buys").run, "created_at": model("buys").created_at}]
    assert [row["model"] for row in models().facts["models"]] == ["buys@2", "buys@3"]


@pytest.mark.parametrize(("call", "error", "says"), [
    (lambda: promote("bys@1"), NotFound, r"there is no model 'bys'; did you mean buys\?"),
    (lambda: promote("buys@7"), NotFound, "model 'buys' has no '7'; there are: 1, challenger"),
    (lambda: promote("buys@champion"), NotFound, "has no 'champion'"),
    (lambda: promote("buys", "latest"), Invalid, "'latest' cannot be an alias"),
    (lambda: promote("buys", "3"), Invalid, "'3' cannot be an alias"),
    (lambda: promote("buys", "v2"), Invalid, "'v2' cannot be an alias"),
    (lambda: promote("buys", "has space"), Invalid, "cannot be an alias"),
    (lambda: load_model("nothing"), NotFound, "there is no model 'nothing'; there are: buys."),
    (lambda: register(LogisticRegression(), "buys@2"), Invalid, "has a version, but a plain model name"),
    (lambda: track(" "), Invalid, "a run needs a name"),
    (lambda: track("x", data=["a b"]), Invalid, "is not an address"),
    (lambda: track("x", metrics={"ok": "yes"}), Invalid, "the metric ok = 'yes' is not a number"),
    (lambda: track("x").log(params={"a": 1}).log(params={"a": 2}), Invalid, "refused it"),
    (lambda: attach("buys", "no good", {}), Invalid, "is not an address"),
])
def test_mistakes_get_one_sentence(shop, fitted, call, error, says):  # noqa: F811
    register(fitted, "buys")
    with pytest.raises(error, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_facts_stay_with_their_version(shop, fitted):  # noqa: F811
    for _ in range(2):
        register(fitted, "buys")
    attach("buys@1", "validation", {"ndcg@10": np.float64(0.36), "passed": True})
    assert attached("buys@1", "validation") == {"ndcg@10": 0.36, "passed": True} and attached(model("buys@2"), "validation") is None
    with tracking() as client:
        assert [one.path for one in client.list_artifacts(model("buys@1").run, "reports/buys-1")] == ["reports/buys-1/validation.json"]


def test_looking_makes_nothing_and_needs_no_mlflow(tmp_path):
    from mlops_nb.core.settings import init

    folder = init(str(tmp_path / "new")).folder
    done = run_python("import sys; from mlops_nb.model import registry as r; assert r.summary() == [] and r.models().facts['models'] == []; "
                      "assert not {'mlflow', 'pandas', 'sklearn', 'skops'} & set(sys.modules)", folder=folder)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (folder / ".mlops").iterdir()) == [".gitignore"]


TRAIN = """
import sys, warnings; warnings.simplefilter("ignore")
from sklearn.linear_model import LogisticRegression
from mlops_nb.model.registry import promote, register, track
with track("first", params={"C": 1}, metrics={"auc": 0.5}): pass
print(promote(register(LogisticRegression().fit([[0.0], [1.0]], [0, 1]), "tiny").address).version)
"""


@pytest.fixture
def empty(tmp_path):
    from mlops_nb.core.settings import init

    return init(str(tmp_path / "shop"), name="shop").folder


def test_two_first_runs_at_once_and_in_silence(empty):
    both = [subprocess.Popen([sys.executable, "-c", TRAIN], cwd=empty, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate(timeout=300) for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert sorted(out.strip() for out, _ in said) == ["1", "2"]
    assert [err for _, err in said] == ["", ""], "MLflow's narration is not for the reader"
    with in_project(empty):
        assert [one.version for one in model_versions("tiny")] == [1, 2]
        assert [load_model(f"tiny@{i}").predict([[1.0]])[0] for i in (1, 2)] == [1, 1]
    assert not (empty / "mlruns").exists()


NEVER_DONE = """
import os, time
real = os.replace
os.replace = lambda new, file: time.sleep(600) if str(new).endswith("mlflow.db.new") else real(new, file)
"""


def test_a_killed_first_run_leaves_nothing_in_the_way(empty):
    process = subprocess.Popen([sys.executable, "-c", NEVER_DONE + TRAIN], cwd=empty, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    half = empty / ".mlops" / "mlflow.db.new"
    until(lambda: half.exists() and half.stat().st_size > 50_000, process=process)
    process.send_signal(signal.SIGKILL)
    process.wait(120)
    assert half.exists() and not (empty / ".mlops" / "mlflow.db").exists(), "killed in the middle of the migrations"
    done = run_python(TRAIN, folder=empty)
    assert done.returncode == 0 and done.stdout.strip() == "1", done.stderr


@pytest.mark.parametrize("content", [b"this is no database, whatever its name says" * 100, b"SQLite format 3\x00" + bytes(4080)])
def test_a_damaged_database_says_so(empty, content):
    (empty / ".mlops" / "mlflow.db").write_bytes(content)
    with in_project(empty):
        for call in (summary, lambda: track("x")):
            with pytest.raises((Invalid, Unavailable), match=r"mlflow\.db"):
                call()


def test_a_locked_database_is_a_conflict_or_waits(shop, fitted):  # noqa: F811
    track("before")
    holder = sqlite3.connect(shop / ".mlops" / "mlflow.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(MlopsError, match="mlflow.db"):
            track("meanwhile")
    finally:
        holder.execute("ROLLBACK")
        holder.close()
    assert track("after").id


@pytest.mark.parametrize(("uri", "error", "says"), [
    ("./mlruns", Invalid, "is a folder of files; expected sqlite"),
    ("file:///tmp/mlruns", Invalid, "is a folder of files; expected sqlite"),
    ("http://ann:secret@127.0.0.1:9/team", Unavailable, r"no MLflow server answers at http://127\.0\.0\.1:9/team"),
])
def test_an_address_that_does_not_work(shop, monkeypatch, uri, error, says):  # noqa: F811
    monkeypatch.setenv("MLOPS_TRACKING_URI", uri)
    for call in (summary, lambda: track("x"), lambda: load_model("buys")):
        with pytest.raises(error, match=says) as caught:
            call()
        assert "secret" not in str(caught.value)


def test_a_server_that_takes_the_call_and_says_nothing(shop, monkeypatch):  # noqa: F811
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        monkeypatch.setenv("MLOPS_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(Unavailable, match=r"no MLflow server answers at http://127\.0\.0\.1:\d+ any more"):
            track("x")


@pytest.fixture
def server(tmp_path, database):  # noqa: F811
    """A real MLflow server with its own database and artifact store."""
    port = free_port("127.0.0.1")
    place = tmp_path / "server"
    place.mkdir()
    shutil.copy(database, place / "mlflow.db")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{place}/mlflow.db", "--artifacts-destination", str(place / "files"),
               "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=place, env=ENV | path, stdout=log, stderr=log, start_new_session=True)
    for _ in range(6000):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert process.poll() is None, (place / "log").read_text()
            time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=120)


def test_a_team_server_and_a_colleague(server, tmp_path, monkeypatch, fitted, empty):
    from mlops_nb.core.settings import init

    monkeypatch.setenv("MLOPS_TRACKING_URI", server)
    forest = imputed(RandomForestClassifier(5, random_state=0)).fit(*customers())
    with in_project(empty):
        digests = save_versions(orders=3)
        register(fitted, "buys", example=ROWS, data=["orders"], metrics={"auc": 0.8})
        promote(register(forest, "buys", example=ROWS).address)
        attach("buys@2", "validation", {"passed": True})
        assert np.array_equal(load_model("buys@champion").predict(ROWS), forest.predict(ROWS))
    with in_project(init(str(tmp_path / "colleague"), name="shop").folder):
        assert summary()[0]["aliases"] == {"challenger": 2, "champion": 2}
        assert model("buys@1").data_digests == {"orders@3": digests["orders@3"]}
        assert model("buys@1").data == ("orders@3",) and model("buys@1").kind == "Pipeline(LogisticRegression)"
        assert np.array_equal(load_model("buys@1").predict(ROWS), fitted.predict(ROWS))
        with pytest.raises(Untrusted, match="sklearn.tree._tree.Tree"):
            load_model("buys@2")
        assert np.array_equal(load_model("buys@2", trust=["sklearn.tree._tree.Tree"]).predict(ROWS), forest.predict(ROWS))
        assert np.array_equal(load_model("buys@2").predict(ROWS), forest.predict(ROWS)), "trusted once, by its digest"
        promote("buys@1")
        with tracking() as client:
            assert client.get_model_version_by_alias("buys", "champion").version in (1, "1")
        again = register(fitted, "buys", run=model("buys@1").run)
        assert again.data_digests == {"orders@3": digests["orders@3"]}, "the run says what it was trained on, though the data is not here"


def test_a_server_follows_a_team_server_and_outlives_it(server, monkeypatch, fitted, empty):
    from mlops_nb.serve.endpoint import Endpoint
    from mlops_nb.serve.plan import planned
    from mlops_nb.serve.sources import RegistrySource

    monkeypatch.setenv("MLOPS_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with in_project(empty):
        for _ in range(2):
            register(fitted, "buys", example=ROWS)
        promote("buys@1")
    endpoint = Endpoint(RegistrySource(empty), lambda: planned("buys@champion"))

    def answers(address):
        endpoint.follow()
        return endpoint.placed["buys"].main.address == address

    assert answers("buys@1") and not endpoint.refused
    with in_project(empty):
        promote("buys@2")
    until(lambda: answers("buys@2"))
    monkeypatch.setenv("MLOPS_TRACKING_URI", f"http://127.0.0.1:{free_port('127.0.0.1')}")
    until(lambda: answers("buys@2") and endpoint.refused)
    assert "no MLflow server answers" in endpoint.refused["buys@champion"]
    monkeypatch.setenv("MLOPS_TRACKING_URI", server)
    with in_project(empty):
        promote("buys@1")
    until(lambda: answers("buys@1") and not endpoint.refused)


def test_a_version_that_mlflow_pickled_is_refused(shop, tmp_path):  # noqa: F811
    import mlflow

    monkey = LogisticRegression().fit([[0.0], [1.0]], [0, 1])
    mlflow.sklearn.save_model(monkey, tmp_path / "pickled", serialization_format="cloudpickle", pip_requirements=[])
    from mlops_nb.model.backend import add_version

    add_version("theirs", (tmp_path / "pickled").as_uri(), "", {})
    with pytest.raises(Untrusted, match="theirs@1 was not saved by mlops_nb, and may be a pickle"):
        load_model("theirs")


def test_a_busy_registry_says_so(shop, fitted, monkeypatch):  # noqa: F811
    import mlops_nb.model.registry as registry
    from mlops_nb.core.files import locked

    register(fitted, "buys")
    monkeypatch.setattr(registry, "locked", lambda path, **options: locked(path, **options | {"timeout_s": 0.1}))
    with locked(shop / ".mlops" / "models" / ".lock"), pytest.raises(Conflict, match="another process is changing the model registry"):
        promote("buys@1")


def test_the_example_rows_are_kept_as_a_server_is_asked(shop):
    from sklearn.linear_model import LogisticRegression

    rows = pd.DataFrame({"units": [1.0, 2.0, 3.0, 4.0], "since": [1, 2, 3, 4]})
    registered = register(LogisticRegression().fit(rows, [0, 0, 1, 1]), "small", example=rows)
    assert model("small").example == registered.example == {"columns": ["units", "since"], "data": [[1.0, 1], [2.0, 2], [3.0, 3], [4.0, 4]]}


TEXTS = pd.Series(["late again", "well packed", "broken on arrival", "lovely colours"] * 6, name="comment")


@pytest.mark.parametrize(("example", "name"), [(TEXTS, "comment"), (TEXTS.head(1), "comment"), (list(TEXTS), "text"), (TEXTS.to_numpy(), "text"), (None, "text")])
def test_a_model_of_text_is_registered_whole(shop, example, name):
    import mlflow

    estimator = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(TEXTS, [0, 1, 0, 1] * 6)
    made = register(estimator, "mood", example=example)
    assert model("mood").inputs == made.inputs == ({"name": name, "type": "string", "required": True, "form": "series"},)
    assert made.example == ({} if example is None else {"columns": [name], "data": [[one] for one in TEXTS[:min(5, len(example))]]})
    np.testing.assert_array_equal(load_model("mood").predict(TEXTS), estimator.predict(TEXTS))
    np.testing.assert_array_equal(mlflow.pyfunc.load_model(made.source).predict(list(TEXTS)), estimator.predict(TEXTS))


@pytest.mark.parametrize("example", [TEXTS.to_frame(), TEXTS.to_frame().head(1), []])
def test_an_example_that_is_refused_leaves_nothing_behind(shop, example):
    estimator = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(TEXTS, [0, 1, 0, 1] * 6)
    with pytest.raises(Invalid):
        register(estimator, "mood", example=example)
    with tracking() as client:
        experiments = [one.experiment_id for one in client.search_experiments()]
        assert summary() == [] and client.search_runs(experiments) == []


def test_a_category_column_is_recorded_as_one(shop):
    frame = pd.DataFrame({"kind": pd.Categorical(["a", "b", "c"] * 20), "size": pd.Categorical([1, 2] * 30), "n": np.arange(60.0)})
    made = register(HistGradientBoostingClassifier(categorical_features="from_dtype").fit(frame, frame["kind"] == "b"), "kinds", example=frame.head(1))
    assert [(one["name"], one["type"], one.get("form", ""), one.get("categories")) for one in made.inputs] == [
        ("kind", "string", "category", ["a", "b", "c"]), ("size", "long", "category", [1, 2]), ("n", "double", "", None)]
