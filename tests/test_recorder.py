"""What would break for somebody who looks for a run in MLflow: it is missing, it is there twice, or it never ends; all with a real MLflow."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from patience import next_line

from mlops_nb.core.errors import Unavailable
from mlops_nb.core.settings import project
from mlops_nb.deploy.engine import free_port
from mlops_nb.model.backend import experiment_id, inputs_of, tagged, tracking
from mlops_nb.model.tracking import track
from mlops_nb.pipeline.history import folder_of, new_record, record, runs, save, sending, unsent
from mlops_nb.pipeline.recorder import follow, send, sync
from models import database, shop  # noqa: F401

ENV = {key: value for key, value in os.environ.items() if not key.startswith("MLOPS_")} | {"PYTHONWARNINGS": "ignore"}


def a_run(status="passed", **rows):
    "A saved run with a row for each step: its name and what is said of it."
    steps = [{"step": name, "notebook": f"{name}.ipynb"} | row for name, row in rows.items()]
    return save(new_record(project(), "weekly", "pipeline.toml", {"week": 4}, steps) | {"status": status, "seconds": 3.0})


def left(run, step, **files):
    "What a step left in its folder."
    folder = folder_of(run) / step
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def known(run):
    "What MLflow has of a run: the run itself, its steps by name, and the others."
    with tracking() as client:
        found = tagged(client, experiment_id(client, project()), "mlops.run", run)
    steps = {one.data.tags["mlops.step"]: one for one in found if one.data.tags.get("mlops.kind") == "step"}
    assert len(steps) == sum(one.data.tags.get("mlops.kind") == "step" for one in found), "a step is there twice"
    parents = [one for one in found if one.data.tags.get("mlops.kind") == "run"]
    assert len(parents) < 2, "the run is there twice"
    return parents[0] if parents else None, steps, [one for one in found if "mlops.kind" not in one.data.tags]


def artifacts(run, path=None):
    with tracking() as client:
        return {one.path for one in client.list_artifacts(run.info.run_id, path)}


def wait_for(condition, timeout_s=300):
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def in_background(code, folder, **environment):
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=ENV | environment)


def recorder(run, folder, **options):
    "A recorder in a process of its own."
    code = f"from mlops_nb.pipeline.recorder import follow; follow({run!r}, {str(folder)!r}, **{({'pause_s': 0.1} | options)!r})"
    return in_background(code, folder)


# --- what MLflow is told -------------------------------------------------------------------------------------------------------------


def test_a_run_and_its_steps(shop, monkeypatch):  # noqa: F811
    monkeypatch.chdir(shop)
    for command in (["init", "-q", "-b", "main"], ["add", "settings.ini"], ["-c", "user.name=a", "-c", "user.email=a@b.org", "commit", "-qm", "first"]):
        subprocess.run(["git", *command], check=True, capture_output=True, timeout=300)
    (shop / "settings.ini").open("a").write("# edited\n")
    (shop / "pipeline.toml").write_text("[pipeline]\n")
    one = a_run("failed", prepare={"verdict": "passed", "started_at": "2026-01-05T06:00:00Z", "seconds": 2.5, "cpu_s": 2.0, "peak_mb": 300.0, "attempts": 2, "kernel": "warm",
                                   "why": "orders@4 replaced orders@3", "parameters": {"week": 4, "columns": ["a", "b"]}, "inputs": {"orders@4": "d" * 64},
                                   "outputs": {"rows": 10, "ndcg@10": 0.5, "data": "features@2", "good": True, "huge": 10**400, "none": None, "a//b": 1, "../up": 2}},
                train={"verdict": "failed", "seconds": 0.5, "problem": "cell 5: ValueError", "models": [{"address": "recommender@2", "digest": "e" * 64}]},
                card={"verdict": "skipped"})
    left(one["id"], "prepare", prepare__ipynb="{}", prepare__ipynb__html="<p>", check__html="<p>", events__jsonl="{}", state__pkl="x", outputs__json="{}")
    save(one | {"problem": "train failed"})
    state = send(one["id"])
    parent, steps, others = known(one["id"])
    assert state["sent"] and state["parent"] == parent.info.run_id and state["steps"] == {name: step.info.run_id for name, step in steps.items()} and others == []
    assert parent.info.run_name == f"weekly {one['id']}" and parent.info.status == "FAILED" and parent.info.end_time >= parent.info.start_time
    tags = parent.data.tags
    assert tags["mlflow.source.git.commit"] == one["commit"] and tags["mlflow.source.git.branch"] == "main" and tags["mlops.dirty"] == "true" and tags["mlops.problem"] == "train failed"
    assert parent.data.params == {"week": "4"} and parent.data.metrics == {"seconds": 3, "cpu_s": 2, "peak_mb": 300, "steps_passed": 1, "steps_cached": 0, "steps_failed": 1}
    assert artifacts(parent) == {"code.diff", "pipeline.toml", "run.json"} and "orders@4 replaced orders@3" in tags["mlflow.note.content"]
    step = steps["prepare"]
    assert set(steps) == {"prepare", "train"} and step.data.tags["mlflow.parentRunId"] == parent.info.run_id and step.info.status == "FINISHED"
    assert (step.info.start_time, step.info.end_time) == (1767592800000, 1767592802500)  # 2026-01-05T06:00:00Z by `date -d … +%s`
    assert step.data.metrics == {"rows": 10, "ndcg_at_10": 0.5, "a__b": 1, "___up": 2, "seconds": 2.5, "cpu_s": 2, "peak_mb": 300, "attempts": 2}
    assert step.data.params == {"week": "4", "columns": "['a', 'b']"} and inputs_of(step) == {"orders@4": "d" * 64}
    assert artifacts(step) == {"prepare.ipynb", "prepare.ipynb.html", "check.html"}
    assert step.data.tags["mlops.kernel"] == "warm" and json.loads(step.data.tags["mlops.outputs"])["data"] == "features@2"
    train = steps["train"].data.tags
    assert steps["train"].info.status == "FAILED" and train["mlops.problem"] == "cell 5: ValueError" and train["mlops.models"] == "recommender@2"
    assert "#/models/recommender/versions/2" in train["mlflow.note.content"] and unsent() == []


def test_sent_again_it_is_the_same(shop):  # noqa: F811
    one = a_run(prepare={"verdict": "passed", "seconds": 1.0, "outputs": {"rows": 10}, "parameters": {"a": 1}, "inputs": {"orders@4": "d" * 64}})
    left(one["id"], "prepare", prepare__ipynb="{}")
    first = send(one["id"])
    for state in ("{}", "{", json.dumps(first | {"sent": False, "done": [], "steps": {}})):
        (folder_of(one["id"]) / "mlflow.json").write_text(state)
        again = send(one["id"])
        assert {key: again[key] for key in ("sent", "parent", "steps", "done")} == {key: first[key] for key in ("sent", "parent", "steps", "done")}
    _, steps, _ = known(one["id"])
    with tracking() as client:
        assert len(client.get_metric_history(steps["prepare"].info.run_id, "rows")) == 1


@pytest.mark.parametrize(("status", "expected"), [("running", "RUNNING"), ("passed", "FINISHED"), ("failed", "FAILED"), ("interrupted", "KILLED"), ("died", "KILLED")])
def test_every_status_has_one_of_mlflows(shop, status, expected):  # noqa: F811
    one = a_run(status, a={"verdict": {"died": "interrupted"}.get(status, status)})
    send(one["id"])
    parent, steps, _ = known(one["id"])
    assert parent.info.status == expected and steps["a"].info.status == expected and sending(one["id"])["sent"] == (status != "running")


def test_a_cached_step_leads_to_the_run_that_it_comes_from(shop):  # noqa: F811
    first = a_run(train={"verdict": "passed", "seconds": 1.0})
    second = a_run(train={"verdict": "cached", "cached_from": first["id"], "outputs": {"ndcg@10": 0.5}, "why": "nothing changed"})
    left(second["id"], "train", train__ipynb="{}")
    assert sync() == {"sent": [first["id"], second["id"]], "problem": ""}
    _, steps, _ = known(second["id"])
    source = sending(first["id"])["steps"]["train"]
    tags = steps["train"].data.tags
    assert tags["mlops.verdict"] == "cached" and tags["mlops.cached_from"] == first["id"] and f"/runs/{source})" in tags["mlflow.note.content"]
    assert artifacts(steps["train"]) == set() and steps["train"].data.metrics["ndcg_at_10"] == 0.5 and steps["train"].info.status == "FINISHED"


def test_what_a_notebook_tracks_itself_hangs_below_its_step(shop, monkeypatch):  # noqa: F811
    one = a_run("running", train={"verdict": "running"}, other={"verdict": "running"})
    monkeypatch.setenv("MLOPS_RUN", one["id"])
    monkeypatch.setenv("MLOPS_STEP", "train")
    monkeypatch.setenv("MLOPS_STEP_FOLDER", str(folder_of(one["id"]) / "train"))
    mine = [track("tuning", params={"depth": depth}, metrics={"ndcg": 0.5}) for depth in (3, 5)]
    send(one["id"])
    late = track("tuning", params={"depth": 7})
    save(one | {"status": "passed", "steps": [row | {"verdict": "passed"} for row in one["steps"]]})
    send(one["id"])
    _, steps, others = known(one["id"])
    assert {run.info.run_id for run in others} == {run.id for run in (*mine, late)}
    assert {run.data.tags["mlflow.parentRunId"] for run in others} == {steps["train"].info.run_id} and {run.info.status for run in others} == {"FINISHED"}


def test_a_step_of_a_sweep_and_one_of_several_pipelines(shop):  # noqa: F811
    (shop / "pipeline.toml").write_text("[pipeline.weekly]\n")
    one = a_run(**{"train[C=0.1]": {"verdict": "passed"}})
    left(one["id"], "train-C=0.1", train__ipynb="{}")
    save(one | {"source": "pipeline.toml:weekly"})
    send(one["id"])
    parent, steps, _ = known(one["id"])
    assert artifacts(steps["train[C=0.1]"]) == {"train.ipynb"} and artifacts(parent) == {"pipeline.toml", "run.json"}


def test_a_project_may_keep_its_runs_to_itself(shop):  # noqa: F811
    with (shop / "settings.ini").open("a") as file:
        file.write("[tracking]\nruns = no\n")
    a_run(train={"verdict": "passed"})
    assert unsent() == [] and "MLflow" not in str(runs())


def test_secrets_are_taken_out(shop, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SHOP_TOKEN", "s3cr3t-of-the-shop")
    one = a_run(train={"verdict": "failed", "parameters": {"api_key": "k3y-in-the-params", "week": 4}, "outputs": {"url": "x?t=s3cr3t-of-the-shop"},
                       "problem": "refused k3y-in-the-params"})
    save(one | {"params": {"db_password": "p4ss-in-the-params"}, "problem": "p4ss-in-the-params is wrong"})
    send(one["id"])
    with tracking() as client:
        parent, steps, _ = known(one["id"])
        told = str((parent.to_dictionary(), {name: step.to_dictionary() for name, step in steps.items()})) + Path(client.download_artifacts(parent.info.run_id, "run.json")).read_text()
    for secret in ("s3cr3t-of-the-shop", "k3y-in-the-params", "p4ss-in-the-params"):
        assert secret not in told
    assert steps["train"].data.params["week"] == "4"


def test_a_thousand_parameters_and_a_long_text_fit(shop):  # noqa: F811
    one = a_run(train={"verdict": "passed", "parameters": {f"p{i}": "x" * 7000 for i in range(250)}, "outputs": {f"m{i}": i for i in range(1200)}, "why": "y" * 9000})
    send(one["id"])
    _, steps, _ = known(one["id"])
    assert len(steps["train"].data.params) == 250 and len(steps["train"].data.params["p7"]) == 6000 and steps["train"].data.metrics["m1199"] == 1199
    assert len(steps["train"].data.tags["mlops.why"]) == 5000


# --- the process in the background ---------------------------------------------------------------------------------------------------


def test_a_long_run_is_seen_while_it_goes_on(shop):  # noqa: F811
    one = a_run("running", prepare={"verdict": "running"}, train={})
    child = recorder(one["id"], shop, patience_s=0)
    try:
        parent, steps, _ = wait_for(lambda: (found := known(one["id"])) and found[1] and found)
        assert parent.info.status == "RUNNING" and {name: step.info.status for name, step in steps.items()} == {"prepare": "RUNNING"}
        assert unsent() == [] and (folder_of(one["id"]) / "requirements.txt").read_text().count("\nmlflow==") == 1
        one["steps"][0] |= {"verdict": "passed", "seconds": 1.0, "outputs": {"rows": 3}}
        one["steps"][1]["verdict"] = "running"
        save(one)
        wait_for(lambda: known(one["id"])[1]["prepare"].info.status == "FINISHED" and "train" in known(one["id"])[1])
        one["steps"][1]["verdict"] = "passed"
        save(one | {"status": "passed"})
        assert child.wait(300) == 0
    finally:
        child.kill()
    parent, steps, _ = known(one["id"])
    assert parent.info.status == "FINISHED" and artifacts(parent) >= {"requirements.txt", "run.json"} and sending(one["id"])["sent"]


def test_a_short_run_is_told_once_it_is_over_and_a_killed_one_as_killed(shop):  # noqa: F811
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as runner:
        import psutil

        started = round(psutil.Process(runner.pid).create_time() - psutil.boot_time(), 2)
        one = save(a_run("running", train={"verdict": "running"}) | {"pid": runner.pid, "process_started": started})
        child = recorder(one["id"], shop, patience_s=3600)
        try:
            wait_for(lambda: sending(one["id"])["by"])
            assert record(one["id"])["status"] == "running" and known(one["id"])[0] is None
            runner.kill()
            runner.wait(120)
            assert child.wait(300) == 0
        finally:
            child.kill()
    parent, steps, _ = known(one["id"])
    assert parent.info.status == "KILLED" and steps["train"].info.status == "KILLED" and record(one["id"])["status"] == "died"


def test_one_recorder_serves_all_runs_of_a_project(shop):  # noqa: F811
    waiting = a_run(train={"verdict": "passed"})
    first, second = (a_run("running", train={"verdict": "running"}) for _ in range(2))
    children = [recorder(one["id"], shop, patience_s=0) for one in (first, second)]
    try:
        wait_for(lambda: any(child.poll() == 0 for child in children))
        for one in (first, second):
            save(one | {"status": "passed", "steps": [one["steps"][0] | {"verdict": "passed"}]})
        assert [child.wait(300) for child in children] == [0, 0]
    finally:
        [child.kill() for child in children]
    for one in (waiting, first, second):
        assert sending(one["id"])["sent"] and known(one["id"])[0].info.status == "FINISHED"


@pytest.mark.parametrize(("kill_after", "time_"), [("create_run", "1"), ("create_run", "2"), ("log_inputs", "1"), ("set_terminated", "1")])
def test_a_recorder_killed_at_any_point_leaves_no_doubles(shop, kill_after, time_):  # noqa: F811
    one = a_run(prepare={"verdict": "passed", "outputs": {"rows": 3}, "inputs": {"orders@4": "d" * 64}, "parameters": {"a": 1}}, train={"verdict": "passed"})
    left(one["id"], "prepare", prepare__ipynb="{}")
    code = ("import os, signal, sys\nfrom mlflow import MlflowClient\nfrom mlops_nb.pipeline.recorder import send\ncount = [0]\n"
            f"real = MlflowClient.{kill_after}\ndef kill(*arguments, **options):\n    done = real(*arguments, **options)\n    count[0] += 1\n"
            f"    if count[0] == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)\n    return done\nMlflowClient.{kill_after} = kill\nsend({one['id']!r})")
    assert subprocess.run([sys.executable, "-c", code, time_], cwd=shop, env=ENV, timeout=300).returncode == -signal.SIGKILL
    assert send(one["id"])["sent"] and unsent() == []
    parent, steps, _ = known(one["id"])
    assert parent.info.status == "FINISHED" and set(steps) == {"prepare", "train"} and {step.info.status for step in steps.values()} == {"FINISHED"}
    assert steps["prepare"].data.metrics["rows"] == 3 and inputs_of(steps["prepare"]) == {"orders@4": "d" * 64} and artifacts(steps["prepare"]) == {"prepare.ipynb"}


def test_notebooks_write_to_the_same_database_meanwhile(shop):  # noqa: F811
    one = a_run("running", **{f"step{i}": {"verdict": "passed", "outputs": {"rows": i}} for i in range(6)})
    code = ("from mlops_nb.model.tracking import track\n"
            "for i in range(15): track('tuning', params={'i': i}, metrics={'m': i})")
    writers = [in_background(code, shop, MLOPS_RUN=one["id"], MLOPS_STEP=f"step{i}", MLOPS_STEP_FOLDER=str(shop)) for i in range(2)]
    child = recorder(one["id"], shop, patience_s=0)
    try:
        assert [writer.wait(300) for writer in writers] == [0, 0]
        save(one | {"status": "passed"})
        assert child.wait(300) == 0
    finally:
        [process.kill() for process in (*writers, child)]
    _, steps, others = known(one["id"])
    assert Counter(run.data.tags["mlflow.parentRunId"] for run in others) == {steps[f"step{i}"].info.run_id: 15 for i in range(2)}


def test_a_locked_database_is_tried_again(shop):  # noqa: F811
    one = a_run(train={"verdict": "passed"})
    code = ("import sqlite3, sys, time\ndb = sqlite3.connect('.mlops/mlflow.db', isolation_level=None)\ndb.execute('BEGIN EXCLUSIVE')\n"
            "print('locked', flush=True)\ntime.sleep(7)\ndb.execute('COMMIT')")
    with subprocess.Popen([sys.executable, "-c", code], cwd=shop, stdout=subprocess.PIPE) as holder:
        assert next_line(holder)
        assert send(one["id"])["sent"]
    assert known(one["id"])[0].info.status == "FINISHED"


# --- a tracking server that goes away ------------------------------------------------------------------------------------------------


class Server:
    "A real `mlflow server` on a free port, started and stopped by its process id."

    def __init__(self, folder, database):
        self.port = free_port("127.0.0.1")
        self.uri, self.folder, self.process = f"http://127.0.0.1:{self.port}", folder, None
        (folder / "server").mkdir()
        (folder / "server" / "mlflow.db").write_bytes(Path(database).read_bytes())

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.folder}/server/mlflow.db", "--artifacts-destination",
                   str(self.folder / "server" / "artifacts"), "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        self.process = subprocess.Popen(command, cwd=self.folder / "server", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                                        env=ENV | {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})

        def healthy():
            try:
                return urllib.request.urlopen(f"{self.uri}/health", timeout=20).status == 200
            except OSError:
                return False

        wait_for(healthy, timeout_s=180)

    def stop(self):
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process:
            self.process.wait(120)


@pytest.fixture
def server(tmp_path, database):  # noqa: F811
    made = Server(tmp_path, database)
    try:
        yield made
    finally:
        made.stop()


def test_a_server_that_is_down_is_waited_for_and_told_later(shop, server, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MLOPS_TRACKING_URI", server.uri)
    monkeypatch.setitem(ENV, "MLOPS_TRACKING_URI", server.uri)
    lost = a_run(train={"verdict": "passed", "outputs": {"rows": 1}})
    child = recorder(lost["id"], shop, give_up_s=1)
    assert child.wait(300) == 0, "it gives up in the end"
    assert unsent() == [lost["id"]] and f"no MLflow server answers at {server.uri}" in runs().facts["summary"] and runs("last").passed
    with pytest.raises(Unavailable):
        send(lost["id"])

    server.start()
    one = a_run("running", prepare={"verdict": "running"}, train={})
    child = recorder(one["id"], shop, patience_s=0)
    try:
        wait_for(lambda: sending(one["id"])["steps"] and sending(lost["id"])["sent"])  # the next run's recorder sends what was left
        server.stop()
        one["steps"][0] |= {"verdict": "passed", "outputs": {"rows": 3}, "inputs": {"orders@4": "d" * 64}}
        left(one["id"], "prepare", prepare__ipynb="{}")
        save(one)  # the run goes on, and knows nothing of it
        wait_for(lambda: sending(one["id"])["problem"])
        one["steps"][1]["verdict"] = "passed"
        save(one | {"status": "passed"})
        assert record(one["id"])["status"] == "passed" and "1 run is not in MLflow yet" in runs().facts["summary"]
        server.start()
        assert child.wait(300) == 0
    finally:
        child.kill()
    parent, steps, _ = known(one["id"])
    assert unsent() == [] and parent.info.status == "FINISHED" and {step.info.status for step in steps.values()} == {"FINISHED"} and set(steps) == {"prepare", "train"}
    assert artifacts(steps["prepare"]) == {"prepare.ipynb"} and "MLflow" not in str(runs()) and known(lost["id"])[0].info.status == "FINISHED"

    server.stop()
    a_run(train={"verdict": "passed"})
    assert f"no MLflow server answers at {server.uri} any more; start it" in str(runs(sync=True))


def test_a_project_that_is_gone_ends_its_recorder(shop):  # noqa: F811
    import shutil

    one = a_run("running", train={"verdict": "running"})
    child = recorder(one["id"], shop, patience_s=3600)
    try:
        wait_for(lambda: sending(one["id"])["by"])
        shutil.rmtree(shop)
        assert child.wait(300) == 0 and not shop.exists()
    finally:
        child.kill()


def test_one_run_that_cannot_be_sent_does_not_hold_up_the_others(shop):  # noqa: F811
    bad = a_run(train={"verdict": "passed", "inputs": {"no address!": "d" * 64}})
    good = a_run(train={"verdict": "passed"})
    found = sync()
    assert found["sent"] == [good["id"]] and "no address!" in found["problem"] and unsent() == [bad["id"]]
    follow(good["id"], str(shop), nice=0, give_up_s=0, pause_s=0.05)
    assert "no address!" in runs().facts["summary"]
