"""What would break for somebody who asks which data a model learned from, and which models learned from some data."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from patience import next_line, until
from sklearn.linear_model import LogisticRegression

from mlops_nb.core.errors import Invalid, NotFound, Unavailable
from mlops_nb.core.settings import in_project, init
from mlops_nb.data.lineage import append, entries, loaded, noted, record_of, recording, used, used_by, users_of
from mlops_nb.data.store import load, log, save
from mlops_nb.data.versions import version
from mlops_nb.model.backend import tracking
from mlops_nb.model.registry import model, promote, register
from mlops_nb.model.tracking import recalled, track, trained_on
from models import database, new_shop, shop  # noqa: F401

ENV = {key: value for key, value in os.environ.items() if not key.startswith("MLOPS_")} | {"PYTHONWARNINGS": "ignore"}


def rows(n=50, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame({"units": rng.normal(size=n), "price": rng.gamma(2, 3, n)})


def small():
    return LogisticRegression().fit([[0.0], [1.0]], [0, 1])


@pytest.fixture
def orders(shop):  # noqa: F811
    """orders@1, @2 and @3, of which the last is the first again."""
    for seed in (0, 1, 0):
        save(rows(seed=seed), "orders")
    assert version("orders@1").digest == version("orders@3").digest
    return shop


@pytest.fixture
def step(tmp_path, monkeypatch):
    """This process runs the step `train` of a pipeline run."""
    for key, value in {"MLOPS_RUN": "2026-01-02-ab", "MLOPS_STEP": "train", "MLOPS_STEP_FOLDER": str(tmp_path)}.items():
        monkeypatch.setenv(key, value)


def who(address):
    return [(one["kind"], one["name"]) for one in users_of(address)]


def inputs_in_mlflow(run):
    """(name, digest, version tag) as MLflow's own client reads them."""
    with tracking() as client:
        found = client.get_run(run.id).inputs.dataset_inputs
    return sorted((one.dataset.name, one.dataset.digest, {tag.key: tag.value for tag in one.tags}["mlops.address"]) for one in found)


def test_a_run_knows_what_it_loaded_and_mlflow_too(orders):
    save(rows(seed=5), "orders:clean")
    with track("buys", params={"C": 1}) as run:
        load("orders@2")
        load("orders@2", columns=["units"])
        load("orders:clean")
        made = register(small(), "buys", run=run)
    expected = {one: version(one).digest for one in ("orders@2", "orders:clean@1")}
    assert run.inputs == expected and made.data_digests == expected == model("buys").data_digests and made.data == tuple(expected)
    assert inputs_in_mlflow(run) == sorted((address.partition("@")[0], digest[:36], address) for address, digest in expected.items())
    assert recalled(run.id).inputs == expected and trained_on(recalled(run.id)) == expected
    assert who("orders@2") == who("orders:clean@1") == [("model", "buys@1"), ("run", "buys")]
    assert load("orders@2") is not None and who("orders@1") == [], "a look outside of a run is no use"


def test_mlflows_own_reader_finds_the_address(orders):
    import mlflow

    with track("buys", data=["orders@2"]) as run:
        pass
    with tracking() as client:
        kept = client.get_run(run.id).inputs.dataset_inputs[0].dataset
    assert mlflow.data.get_source(kept).to_dict()["tags"] == {"mlops.address": "orders@2", "mlops.digest": version("orders@2").digest}


def test_the_same_content_under_two_numbers_keeps_its_number(orders):
    with track("before", data=["orders@1"]) as before:
        pass
    with track("after") as after:
        load("orders@3")
    assert [one[2] for run in (before, after) for one in inputs_in_mlflow(run)] == ["orders@1", "orders@3"], "MLflow keeps the data set once, the input twice"
    assert list(recalled(after.id).inputs) == ["orders@3"]
    assert who("orders@1") == who("orders@3") == [("run", "after"), ("run", "before")] and who("orders@2") == []


def test_what_was_said_is_what_it_learned_from(orders):
    save(rows(seed=9), "holdout")
    with track("buys", data=["orders"]) as run:
        load("orders@2")
        load("holdout")
        made = register(small(), "buys", run=run)
    assert made.data == ("orders@3",) and sorted(run.inputs) == ["holdout@1", "orders@2", "orders@3"]
    assert who("holdout@1") == [("run", "buys")], "the holdout was used by the run, not learned from"
    assert recalled(run.id).data == ("orders@3",)
    assert register(small(), "buys", run=run.id, data=["orders@2"]).data == ("orders@3", "orders@2")
    assert recalled(run.id).data == ("orders@3", "orders@2")


def test_an_address_becomes_the_version_it_means_at_that_moment(orders):
    first = register(small(), "buys", data=["orders"])
    by_hash = register(small(), "buys", data=[f"orders@{version('orders@2').digest[:8]}"])
    save(rows(seed=7), "orders")
    assert (first.data, by_hash.data, model("buys@1").data) == (("orders@3",), ("orders@2",), ("orders@3",))
    assert first.facts["data_digests"] == {"orders@3": version("orders@3").digest}
    assert register(small(), "buys", data=["orders"]).data == ("orders@4",)


@pytest.mark.parametrize(("given", "error", "says"), [
    (["order"], NotFound, "there is no data set 'order'; did you mean orders"),
    (["orders@9"], NotFound, "data set 'orders' has no '9'; there are: 1, 2, 3"),
    (["orders@2", "orders:mine"], NotFound, "has no branch"),
    (["a b"], Invalid, "is not an address"),
])
def test_data_that_is_not_there_is_refused_before_anything_is_written(orders, given, error, says):
    for call in (lambda: track("buys", data=given), lambda: register(small(), "buys", data=given)):
        with pytest.raises(error, match=says):
            call()
    with pytest.raises(NotFound, match="there is no model"):
        model("buys")
    with tracking() as client:
        assert client.get_experiment_by_name("shop") is None
    assert entries("orders") == []


def test_a_failed_run_used_its_data_too(orders):
    with pytest.raises(ZeroDivisionError), track("breaks") as run:
        load("orders@1")
        1 / 0  # noqa: B018
    assert loaded() == {} and who("orders@1") == [("run", "breaks")] and len(inputs_in_mlflow(run)) == 1
    with tracking() as client:
        assert client.get_run(run.id).info.status == "FAILED"


def test_a_sweep_and_its_trials(orders):
    with track("sweep") as sweep:
        load("orders@1")
        with track("trial") as trial:
            load("orders@2")
        plain = track("plain")
        made = register(small(), "buys")
    assert list(trial.inputs) == list(sweep.inputs) == list(plain.inputs) == list(made.data) == ["orders@1", "orders@2"]
    assert [len(inputs_in_mlflow(run)) for run in (sweep, trial, plain)] == [2, 2, 2]


def test_blocks_in_threads_do_not_mix(orders):
    barrier, found = threading.Barrier(2), {}

    def work(address):
        with recording() as collected:
            barrier.wait(timeout=300)
            load(address)
            barrier.wait(timeout=300)
        found[address] = list(collected)

    threads = [threading.Thread(target=in_this_project(orders, work), args=(address,)) for address in ("orders@1", "orders@2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)
    assert found == {"orders@1": ["orders@1"], "orders@2": ["orders@2"]}


def in_this_project(folder, function):
    def inside(*args):
        with in_project(folder):
            function(*args)

    return inside


def test_a_step_notes_what_it_loads_once(orders, step):
    for _ in range(3):
        load("orders@2")
    assert [(one["kind"], one["name"], one["run"]) for one in entries("orders")] == [("step", "train", "2026-01-02-ab")]
    assert "train" in used_by("orders@2").text() and "2026-01-02-ab" in used_by("orders@2").text()


def test_the_report_names_models_with_their_aliases(orders):
    empty = used_by("orders@2")
    assert empty.facts == {"title": "What used orders@2", "summary": empty.facts["summary"]} and empty.facts["summary"].startswith("Nothing has used orders@2 yet")
    for address in ("orders@1", "orders@2", "orders@2"):
        register(small(), "buys", data=[address])
    promote("buys@2")
    report = used_by("orders@2")
    assert [(row["model"], row["aliases"]) for row in report.facts["models"]] == [("buys@3", "challenger"), ("buys@2", "champion")]
    assert [row["run_id"] for row in report.facts["runs"]] == [model("buys@3").run, model("buys@2").run]
    assert report.facts["summary"] == "orders@2 was used by 2 models, 2 runs."
    promote("buys@3")
    assert [row["aliases"] for row in used_by("orders@2").facts["models"]] == ["challenger, champion", ""]
    assert [row["model"] for row in used_by("orders").facts["models"]] == ["buys@3", "buys@2", "buys@1"], "without a version: all of them"
    assert "buys@3" in log("orders@2", used_by=True).html()


@pytest.mark.parametrize(("call", "error", "says"), [
    (lambda: used_by("orders@9"), NotFound, "has no '9'"),
    (lambda: used_by("odrers"), NotFound, "did you mean orders"),
    (lambda: used("orders@1", "dashboard", "sales"), Invalid, "'dashboard' is not known to use data; expected one of model, run, step, notebook"),
])
def test_mistakes_get_one_sentence(orders, call, error, says):
    with pytest.raises(error, match=says):
        call()


WRITE = """
import sys
from pathlib import Path
from mlops_nb.data.lineage import append
file, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True); sys.stdin.readline()
for i in range(count):
    append(file, {"data": "orders@1", "digest": "d", "kind": "run", "name": f"{name}-{i}", "run": name * 900, "at": "2026-01-01T00:00:00Z"})
"""


def writer(file, name, count):
    process = subprocess.Popen([sys.executable, "-c", WRITE, str(file), name, str(count)], env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert next_line(process)
    return process


def test_processes_that_write_at_once_lose_and_mix_nothing(tmp_path):
    with in_project(init(str(tmp_path / "shop"), name="shop").folder):
        file, count = record_of("orders"), 400
        both = [writer(file, name, count) for name in "abcd"]
        for process in both:
            process.stdin.write("\n")
            process.stdin.flush()
        assert [process.wait(timeout=300) for process in both] == [0] * 4
        found = [one["name"] for one in entries("orders")]
    assert Counter(found) == Counter(f"{name}-{i}" for name in "abcd" for i in range(count))
    assert [one for one in found if one[0] == "b"] == [f"b-{i}" for i in range(count)], "each in its own order"


def test_a_killed_process_leaves_a_readable_record(tmp_path):
    with in_project(init(str(tmp_path / "shop"), name="shop").folder):
        file = record_of("orders")
        for _ in range(3):
            process = writer(file, "k", 10**6)
            before = file.stat().st_size if file.exists() else 0
            process.stdin.write("\n")
            process.stdin.flush()
            until(lambda: file.exists() and file.stat().st_size >= before + 30_000, process=process)
            process.send_signal(signal.SIGKILL)
            process.wait(120)
            lines = [line for line in file.read_bytes().split(b"\n") if line]
            assert len(entries("orders")) >= len(lines) - 1 and len(lines) > 10


def test_half_a_line_spoils_only_itself(orders):
    used("orders@1", "notebook", "before.ipynb")
    whole = record_of("orders").read_bytes()
    used("orders@1", "notebook", "torn.ipynb")
    line = record_of("orders").read_bytes()[len(whole):]
    for length in (1, 2, len(line) // 2, len(line) - 1):
        record_of("orders").write_bytes(whole + line[:length])
        used("orders@1", "notebook", "after.ipynb")
        assert [name for _, name in who("orders@1")] == ["after.ipynb", "before.ipynb"]
    for damage in (b"\n\xff\xfe\x00", b"\n[1, 2]", b'\n{"data": "orders@1"}', b"\nnull"):
        record_of("orders").write_bytes(whole + damage)
        assert [name for _, name in who("orders@1")] == ["before.ipynb"]


def test_a_line_stays_under_the_size_that_is_written_at_once(orders):
    used("orders@1", "run", "é€𝄞\n\0" * 3000, run="r")
    used("orders@1", "run", "short")
    lines = record_of("orders").read_bytes().split(b"\n")[1:]
    assert [len(line) < 4096 for line in lines] == [True, True] and len(users_of("orders@1")) == 2
    append(record_of("orders"), {"odd": "\udcff"})
    assert json.loads(record_of("orders").read_bytes().split(b"\n")[-1]) == {"odd": "?"}


def test_a_number_that_was_given_anew_is_other_data(orders):
    used("orders@2", "model", "old@1", digest="f" * 64)
    assert who("orders@2") == []


def test_a_record_that_cannot_be_written_says_so(orders, step):
    record_of("orders").parent.parent.joinpath("lineage").write_text("a file stands here")
    with pytest.raises(Unavailable, match="a file stands where a folder was expected"):
        load("orders@1")
    one = version("orders@1")
    record_of("orders").parent.unlink()
    noted(one)
    assert len(entries("orders")) == 1, "what could not be noted is noted the next time"


def test_lineage_needs_no_mlflow_and_no_pandas(orders):
    code = ("import sys; from mlops_nb.data.lineage import recording, noted, used_by; from mlops_nb.data.versions import version\n"
            "with recording() as found: noted(version('orders@1'))\n"
            "assert list(found) == ['orders@1']; used_by('orders@1')\n"
            "assert not {'mlflow', 'pandas', 'numpy', 'pyarrow', 'sklearn'} & set(sys.modules), 'heavy'")
    done = subprocess.run([sys.executable, "-c", code], cwd=orders, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
