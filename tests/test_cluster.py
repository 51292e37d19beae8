"""Steps on a real Dask cluster: a scheduler and workers in processes of their own, killed, starved and cut off from the project's folder."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from mlops_nb.core.errors import Conflict, Invalid, RunFailed, Unavailable
from mlops_nb.core.settings import init, project
from mlops_nb.data.lineage import used_by
from mlops_nb.data.store import load, save
from mlops_nb.data.versions import versions
from mlops_nb.pipeline import cluster, travel
from projects import SMALL, shop

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the workers of these tests are ended by POSIX signals")
distributed = pytest.importorskip("distributed")
RUN = "20260105-080000-1a2b"
APART = shutil.which("unshare") and subprocess.run(["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"], capture_output=True, timeout=300).returncode == 0
LIGHT = """
import json, os, time
from pathlib import Path

def sleep(folder, parameters, **_):
    "A step that does not end; it says who it is."
    with open(parameters["pids"].removeprefix("at "), "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(600)

def second_time(folder, parameters, **job):
    "A step that ends when it is run a second time."
    count, place = Path(parameters["count"].removeprefix("at ")), Path(folder)
    with count.open("a") as file:
        file.write("x")
    first = len(count.read_text()) == 1
    (place / "outputs.json").write_text(json.dumps({"lost": 1} if first else {"kept": 2}))
    (place / "lost.txt" if first else place / "kept.txt").write_text("")
    if first:
        sleep(folder, parameters)
    (place / "result.json").write_text('{"verdict": "passed"}')

def resumed(folder, earlier, **_):
    "A step that goes on with an earlier one."
    (Path(folder) / "outputs.json").write_text(json.dumps({"found": sorted(os.listdir(earlier))}))
    (Path(folder) / "result.json").write_text('{"verdict": "passed"}')

def quick(folder, step, **_):
    "A step with an event and an output."
    (Path(folder) / "events.jsonl").write_text(json.dumps({"cell": 1, "of": 1, "step": step}) + "\\n")
    time.sleep(0.5)
    (Path(folder) / "outputs.json").write_text(json.dumps({"name": step}))
    (Path(folder) / "result.json").write_text('{"verdict": "passed"}')
"""
HIDE = 'mount -t tmpfs none "$0" && exec "$@"'


class Cluster:
    """A scheduler, and workers by name; each is a process that a test may kill."""

    def __init__(self, folder):
        self.folder, self.processes = Path(folder), {}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "light.py").write_text(LIGHT)  # steps without a notebook, for what has nothing to do with notebooks
        self.client = None
        self.file = self.folder / "scheduler.json"
        self.start("scheduler", "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(self.file))
        try:
            self.wait(lambda: self.file.exists() and self.file.read_text().strip().endswith("}"))
        except BaseException:
            self.close()
            raise
        self.address = json.loads(self.file.read_text())["address"]

    def start(self, name, kind, *options, environment=(), before=()):
        log = open(self.folder / f"{name}.log", "ab")
        command = [*before, sys.executable, "-m", f"distributed.cli.dask_{kind}", "--no-dashboard", *options]
        variables = {key: value for key, value in os.environ.items() if not key.startswith("MLOPS_")}
        self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log, env={**variables, "PYTHONPATH": str(self.folder), **dict(environment)}, cwd=self.folder)
        log.close()

    def workers(self, *names, **how):
        for name in names:
            self.begin(name, **how)
        self.wait(lambda: set(names) <= set(self.names()))

    def begin(self, name, *options, hide="", nanny=False, **environment):
        before = ["unshare", "-rm", "sh", "-c", HIDE, str(hide)] if hide else []
        self.start(name, "worker", self.address, "--host", "127.0.0.1", "--name", name, "--nthreads", "2", "--nanny" if nanny else "--no-nanny", "--local-directory", str(self.folder / name),
                   *options, environment=environment, before=before)

    def names(self):
        self.client = self.client or distributed.Client(self.address, set_as_default=False, timeout=120)
        return {one["name"]: address for address, one in self.client.scheduler_info(n_workers=-1)["workers"].items()}

    def wait(self, what, timeout_s=300):
        deadline = time.monotonic() + timeout_s
        while not (found := what()):
            assert time.monotonic() < deadline, {path.name: path.read_text()[-2000:] for path in self.folder.glob("*.log")}
            time.sleep(0.1)
        return found

    def kill(self, name):
        if name == "scheduler" and self.client:
            self.client.close()
        self.processes[name].kill()
        self.processes.pop(name).wait(120)

    def close(self):
        if self.client:
            self.client.close()
        for process in self.processes.values():
            process.kill()
            process.wait(120)


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_S", 120)


@pytest.fixture(scope="module")
def near(tmp_path_factory):
    """Two workers that see the projects' folders."""
    one = Cluster(tmp_path_factory.mktemp("near"))
    one.workers("a", "b", SHOP_API_KEY="s3cr3t-of-the-worker")
    yield one
    one.close()


@pytest.fixture
def own(tmp_path):
    """A cluster for a test that breaks it."""
    one = Cluster(tmp_path / "dask")
    yield one
    one.close()


def notebook(folder, *cells, name="step", parameters="n = 5"):
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(one) for one in (parameters, *cells)])
    made.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(made, folder / f"{name}.ipynb")


def job_of(folder, *, name="step", run=RUN, **more):
    return {"project_folder": str(folder), "run": run, "step": name, "notebook": str(folder / f"{name}.ipynb"), "folder": str(folder / ".mlops" / "runs" / run / name),
            "parameters": {}, "timeout_s": 0, "warm": False, "earlier": "", "environment": {}, **more}


def run(job, cluster_, **how):
    """What `on_cluster` returns, and the events it told of."""
    events = []
    result = cluster.on_cluster(job, cluster_.address, on_event=how.pop("on_event", events.append), stop=how.pop("stop", threading.Event()), **how)
    return result, events


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] if Path("/proc").exists() else True


def test_a_step_runs_in_the_project_when_the_workers_see_it(near, shop):
    (shop / "tools.py").write_text("def half(n):\n    return n / 2\n")
    notebook(shop, "import os, tools\nfrom mlops_nb.core.step import output\noutput(half=tools.half(n), pid=os.getppid(), variables=sorted(os.environ))")
    job = job_of(shop, parameters={"n": 9})
    result, events = run(job, near)
    folder = Path(job["folder"])
    outputs = json.loads((folder / "outputs.json").read_text())
    assert result["verdict"] == "passed" and outputs["half"] == 4.5 and result["worker"] in near.names().values()
    assert {path.name for path in folder.iterdir()} >= {"step.ipynb", "step.ipynb.html", "events.jsonl", "result.json", "outputs.json"}
    assert outputs["pid"] not in {process.pid for process in near.processes.values()}, "a notebook does not run in the worker's own process"
    assert [event["cell"] for event in events if "cell" in event] == [1, 2, 3] and events[0]["cluster"] == "began"
    assert [path.name for path in folder.parent.iterdir()] == ["step"], "nothing is left beside the step's folder"
    assert not list((shop / ".mlops").glob("probe-*")) and cluster.slots(near.address) == 4


PIPELINE = """
[[step]]
name = "first"
notebook = "first.ipynb"
matrix = { n = [1, 2, 3] }

[[step]]
name = "last"
notebook = "last.ipynb"
params = { found = "{first.twice}" }
"""


def test_a_pipeline_runs_on_the_cluster_by_one_setting(near, shop, monkeypatch):
    "The whole of `mlops run`: three steps at once, their outputs handed on, nothing run again, and a failure gone on with."
    from mlops_nb.core.errors import RunFailed
    from mlops_nb.pipeline.resume import resume
    from mlops_nb.pipeline.runs import run as run_pipeline

    monkeypatch.setenv("MLOPS_CLUSTER_DASK", near.address)
    monkeypatch.setenv("MLOPS_TRACKING_RUNS", "no")
    monkeypatch.chdir(shop)
    notebook(shop, "import mlops_nb as mlops", "mlops.output(twice=2 * n)", name="first")
    notebook(shop, "import mlops_nb as mlops", "mlops.output(best=max(found), wrong=1 / bottom)", name="last", parameters="found: list = []\nbottom: int = 0")
    (shop / "pipeline.toml").write_text(PIPELINE)
    with pytest.raises(RunFailed, match="step last failed in cell 3.*ZeroDivisionError"):
        run_pipeline()
    notebook(shop, "import mlops_nb as mlops", "mlops.output(best=max(found))", name="last", parameters="found: list = []\nbottom: int = 0")
    done = resume()
    assert done.outputs["last"] == {"best": 6} and [row["verdict"] for row in done.steps] == ["cached"] * 3 + ["passed"]
    assert (done.folder / "last" / "last.ipynb.html").exists()


def test_a_failing_notebook_comes_back_as_it_would_here(near, shop):
    notebook(shop, "1 / 0")
    job = job_of(shop)
    result, _ = run(job, near)
    assert result["verdict"] == "failed" and "ZeroDivisionError" in result["problem"] and result["exit_code"] == 1
    assert str(Path(job["folder"]) / "step.ipynb") in result["problem"], "the sentence names a file that is here"
    assert "ZeroDivisionError" in (Path(job["folder"]) / "step.ipynb").read_text()


def test_a_credential_travels_by_name(near, shop, monkeypatch):
    monkeypatch.setenv("SHOP_API_KEY", "s3cr3t-of-this-machine")
    notebook(shop, "import os\nfrom mlops_nb.core.step import output\noutput(same=os.environ['SHOP_API_KEY'] == 's3cr3t-' + 'of-the-worker')")
    job = job_of(shop, environment={"SHOP_API_KEY": "s3cr3t-of-this-machine"})
    run(job, near)
    assert json.loads((Path(job["folder"]) / "outputs.json").read_text())["same"]
    written = [path for path in [*(shop / ".mlops").rglob("*"), *near.folder.rglob("*")] if path.is_file() and b"s3cr3t-of-this-machine" in path.read_bytes()]
    assert written == []
    monkeypatch.setenv("OTHER_API_TOKEN", "s3cr3t-of-this-machine")
    notebook(shop, "import os\nos.environ['OTHER_API_TOKEN']")
    with pytest.raises(Invalid, match=r"OTHER_API_TOKEN, which is not set in the environment of the worker tcp://127.0.0.1:\d+; set it there"):
        run(job_of(shop), near)


def test_a_crash_in_native_code_is_the_steps_and_not_the_workers(near, shop):
    before = near.names()
    notebook(shop, "import os, signal\nos.kill(os.getppid(), signal.SIGKILL) if False else os.kill(os.getpid(), signal.SIGSEGV)")
    result, _ = run(job_of(shop), near)
    assert result["verdict"] == "failed" and near.names() == before


def test_a_process_that_ends_without_a_word(near, shop, monkeypatch):
    monkeypatch.setattr(cluster, "WORK", "sys:exit")
    notebook(shop, "1")
    result, _ = run(job_of(shop), near)
    assert result["verdict"] == "failed" and "ended without a result (exit code 1): TypeError" in result["problem"]


def test_a_step_that_is_stopped_leaves_no_process(near, shop):
    stop, pids = threading.Event(), shop / "pids"
    notebook(shop, f"import os, time\nopen({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{os.getppid()}}')\ntime.sleep(600)")

    def watch(event):
        threading.Thread(target=lambda: (near.wait(lambda: len(pids_in(pids)) == 2), stop.set())).start() if event.get("cell") == 2 else None

    job = job_of(shop)
    result, _ = run(job, near, on_event=watch, stop=stop)
    assert result["verdict"] == "interrupted" and (Path(job["folder"]) / "step.ipynb").exists()
    near.wait(lambda: not any(map(alive, pids_in(pids))))
    assert run(job, near, stop=stop)[0]["verdict"] == "interrupted", "stopped before it began"


def pids_in(file):
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def test_many_steps_at_once(near, shop, monkeypatch):
    monkeypatch.setattr(cluster, "WORK", "light:quick")
    notebook(shop, "1")
    with ThreadPoolExecutor(6) as pool:
        names = [f"step-{i}" for i in range(6)]
        for name, (result, events) in zip(names, pool.map(lambda name: run({**job_of(shop), "step": name, "folder": str(shop / ".mlops" / "runs" / RUN / name)}, near), names)):
            assert result["verdict"] == "passed" and [event["step"] for event in events if "cell" in event] == [name]
            assert json.loads((shop / ".mlops" / "runs" / RUN / name / "outputs.json").read_text()) == {"name": name}
    assert sorted(path.name for path in (shop / ".mlops" / "runs" / RUN).iterdir()) == names


def test_a_client_that_dies_takes_its_step_along(near, shop):
    pids = shop / "pids"
    notebook(shop, "1")
    code = ("import json, sys, threading\nfrom mlops_nb.pipeline import cluster\ncluster.WORK = 'light:sleep'\n"
            "cluster.on_cluster(json.loads(sys.argv[1]), sys.argv[2], on_event=print, stop=threading.Event())")
    job = job_of(shop, parameters={"pids": str(pids)})
    client = subprocess.Popen([sys.executable, "-c", code, json.dumps(job), near.address], stdout=subprocess.DEVNULL)
    try:
        near.wait(lambda: pids_in(pids))
    finally:
        client.kill()
        client.wait(120)
    near.wait(lambda: not any(map(alive, pids_in(pids))))


@pytest.mark.parametrize("nanny", [False, True], ids=["elsewhere", "the nanny's next"])
def test_a_worker_killed_in_a_step(own, shop, monkeypatch, nanny):
    monkeypatch.setattr(cluster, "WORK", "light:second_time")
    own.workers(*("a" if nanny else "ab"), nanny=nanny)
    notebook(shop, "1")
    pids, events = shop / "pids", []

    def hear(event):
        events.append(event)
        if len(events) == 1:
            pid = own.client.run(os.getpid, workers=[event["worker"]])[event["worker"]]
            threading.Thread(target=lambda: (own.wait(lambda: pids_in(pids)), os.kill(pid, signal.SIGKILL))).start()

    job = job_of(shop, parameters={"pids": str(pids), "count": str(shop / "count")})
    result, _ = run(job, own, on_event=hear)
    assert result["verdict"] == "passed" and json.loads((Path(job["folder"]) / "outputs.json").read_text()) == {"kept": 2}
    assert (Path(job["folder"]) / "kept.txt").exists() and not (Path(job["folder"]) / "lost.txt").exists()
    assert [event["cluster"] for event in events] == ["began", "lost", "began"] and events[0]["worker"] != events[2]["worker"]
    assert "it is tried again elsewhere" in events[1]["said"] and (shop / "count").read_text() == "xx"
    own.wait(lambda: not any(map(alive, pids_in(pids))))
    assert [path.name for path in Path(job["folder"]).parent.iterdir()] == ["step"]


def test_a_step_that_kills_its_workers_is_not_tried_for_ever(own, shop, monkeypatch):
    monkeypatch.setattr(cluster, "WORK", "light:sleep")
    own.workers("a", "b")
    notebook(shop, "1")
    pids = shop / "pids"

    def hear(event):
        if event["cluster"] == "began":
            before, name = len(pids_in(pids)), {address: name for name, address in own.names().items()}[event["worker"]]
            threading.Thread(target=lambda: (own.wait(lambda: len(pids_in(pids)) > before), own.kill(name))).start()

    with pytest.raises(RunFailed, match="lost its worker 2 times"):
        run(job_of(shop, parameters={"pids": str(pids)}), own, on_event=hear, retries=1)
    assert len(pids_in(pids)) == 2 and [path.name for path in (shop / ".mlops" / "runs" / RUN).iterdir()] == ["step"]
    own.wait(lambda: not any(map(alive, pids_in(pids))))


def test_a_scheduler_that_dies_while_a_step_runs(own, shop, monkeypatch, capfd):
    monkeypatch.setattr(cluster, "WORK", "light:sleep")
    own.workers("a")
    notebook(shop, "1")
    pids = shop / "pids"

    def hear(event):
        threading.Thread(target=lambda: (own.wait(lambda: pids_in(pids)), own.kill("scheduler"))).start()

    with pytest.raises(RunFailed, match="the Dask scheduler tcp://.* went away while the step was running"):
        run(job_of(shop, parameters={"pids": str(pids)}), own, on_event=hear)
    own.wait(lambda: not any(map(alive, pids_in(pids))))
    assert "Traceback" not in capfd.readouterr().err


def test_what_a_cluster_must_have(own, shop, monkeypatch):
    notebook(shop, "1")
    monkeypatch.setattr(cluster, "CONNECT_S", 8)
    with pytest.raises(Unavailable, match="has no workers; start one with `dask worker tcp://"):
        run(job_of(shop), own)
    monkeypatch.setattr(cluster, "CONNECT_S", 120)
    own.begin("a", "--resources", "GPU=1", "--memory-limit", "2GB")
    own.wait(own.names)
    with pytest.raises(Invalid, match=r"no worker of the cluster has gpus = 2 \(they declare GPU=1\)"):
        run(job_of(shop), own, resources={"gpus": 2})
    with pytest.raises(Invalid, match="has memory_gb = 64"):
        run(job_of(shop), own, resources={"memory_gb": 64})
    monkeypatch.setattr(cluster, "WORK", "light:quick")
    assert run(job_of(shop), own, resources={"gpus": 1, "memory_gb": 1, "cpus": 2})[0]["verdict"] == "passed"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        own.address = f"tcp://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(cluster, "CONNECT_S", 2)
        with pytest.raises(Unavailable, match="does not answer"):
            run(job_of(shop), own)


def test_client_and_workers_have_one_version():
    ours = {"host": {"python": "3.12.4.final.0"}, "packages": {"mlops_nb": "0.1.0"}}
    cluster.agree({"client": ours, "workers": {"tcp://w:1": {**ours, "host": {"python": "3.12.9.final.0"}}}})
    for other in ({"host": {"python": "3.11.4.final.0"}, "packages": {"mlops_nb": "0.1.0"}}, {**ours, "packages": {"mlops_nb": None}}, {**ours, "packages": {"mlops_nb": "0.2.0"}}):
        with pytest.raises(Unavailable, match=r"the worker tcp://w:1 has Python .* but this machine has Python 3.12 and mlops_nb 0.1.0"):
            cluster.agree({"client": ours, "workers": {"tcp://w:1": other}})


# ---- workers that do not see the project's folder


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    """Two workers that see a shared remote, and nothing of the projects."""
    base = tmp_path_factory.mktemp("far")
    (base / "projects").mkdir()
    (base / "remote").mkdir()
    one = Cluster(base / "dask")
    one.base = base
    one.workers("a", "b", hide=base / "projects" if APART else "")
    yield one
    one.close()


@pytest.fixture
def abroad(far, tmp_path, monkeypatch):
    """A project with a remote that the workers share; without mount namespaces they are only told that they do not see it."""
    for name in [name for name in os.environ if name.startswith("MLOPS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLOPS_PROGRESS", "0")
    folder = far.base / "projects" / tmp_path.name
    init(str(folder), name="shop")
    (folder / "settings.ini").write_text(f"[project]\nname = shop\n[data]\nremote = {far.base / 'remote' / tmp_path.name}\n[tracking]\nuri = http://127.0.0.1:9\n")
    (far.base / "remote" / tmp_path.name).mkdir()
    monkeypatch.chdir(folder)
    if not APART:
        plain = cluster.surveyed
        monkeypatch.setattr(cluster, "surveyed", lambda client, folders, names: {worker: {**said, "sees": [False]} if folders[0].name == ".mlops" else said
                                                                                for worker, said in plain(client, folders, names).items()})
    return folder


def test_a_step_travels_and_its_data_come_and_go(far, abroad):
    for rows in (40_000, 50_000):
        save(pd.read_parquet(SMALL).head(rows), "orders")
    save(pd.DataFrame({"a": [1]}), "other")
    (abroad / "shopping").mkdir()
    (abroad / "shopping" / "__init__.py").write_text("")
    (abroad / "shopping" / "best.py").write_text("def best(orders, n):\n    return orders['CustomerID'].value_counts().head(n).reset_index()\n")
    notebook(abroad, "import os, random\nfrom mlops_nb import load, save, output\nfrom mlops_nb.core.report import Report\nfrom shopping.best import best",
             "small, whole = load(orders), load('orders')\none = save(best(whole, n), 'best')\nagain = save(whole.head(10), 'orders')",
             "open('plot.png', 'wb').write(bytes(10))\nopen(os.environ['MLOPS_STEP_FOLDER'] + '/big.bin', 'wb').write(random.Random(0).randbytes(20_000_000))\n"
             "output(best=one.address, orders=again.address, rows=[len(small), len(whole)], folder=os.getcwd(), projects=os.listdir(os.environ['MLOPS_PROJECT'] + '/.mlops/data/datasets'))",
             parameters="n = 5\norders = 'orders@1'")
    job = job_of(abroad, parameters={"n": 3, "orders": "orders@1"})
    result, events = run(job, far)
    assert result["verdict"] == "passed", result
    outputs = json.loads((Path(job["folder"]) / "outputs.json").read_text())
    assert outputs["best"] == "best@1" and outputs["orders"] == "orders@3" and outputs["rows"] == [40_000, 50_000]
    assert outputs["folder"] == str(abroad), "paths are those of this machine again"
    assert len(load("best@1")) == 3 and len(load("orders@3")) == 10 and len(versions("orders")) == 3
    assert "other" not in outputs["projects"], "only what is named is fetched"
    assert "step" in str(used_by("orders@1")), "what was used there is known here"
    assert result["left"] == ["plot.png"]
    assert [event["cell"] for event in events if "cell" in event] == [1, 2, 3, 4, 5]
    assert (Path(job["folder"]) / "big.bin").read_bytes() == random.Random(0).randbytes(20_000_000), "more than one piece"
    assert [path.name for path in Path(job["folder"]).parent.iterdir()] == ["step"]
    far.wait(lambda: not list(far.folder.glob("*/*/*/mlops/attempts/*")))


def test_a_resumed_step_takes_along_what_the_failed_one_left(far, abroad, monkeypatch):
    monkeypatch.setattr(cluster, "WORK", "light:resumed")
    notebook(abroad, "1")
    earlier = abroad / ".mlops" / "runs" / "20260104-080000-1a2b" / "step"
    earlier.mkdir(parents=True)
    (earlier / "step.checkpoint").write_bytes(bytes(10))
    job = job_of(abroad, earlier=str(earlier))
    assert run(job, far)[0]["verdict"] == "passed"
    assert json.loads((Path(job["folder"]) / "outputs.json").read_text()) == {"found": ["step.checkpoint"]}


def test_a_travelling_step_whose_worker_is_killed(far, abroad, monkeypatch):
    monkeypatch.setattr(cluster, "WORK", "light:second_time")
    notebook(abroad, "1")
    pids, events = far.base / "pids", []

    def hear(event):
        events.append(event)
        if len(events) == 1:
            name = {address: name for name, address in far.names().items()}[event["worker"]]
            threading.Thread(target=lambda: (far.wait(lambda: pids_in(pids)), far.kill(name))).start()

    job = job_of(abroad, parameters={"pids": f"at {pids}", "count": f"at {far.base / 'count'}"})
    result, _ = run(job, far, on_event=hear)
    assert result["verdict"] == "passed" and {path.name for path in Path(job["folder"]).iterdir()} == {"result.json", "outputs.json", "kept.txt"}
    assert [event["cluster"] for event in events] == ["began", "lost", "began"]
    far.wait(lambda: not any(map(alive, pids_in(pids))))


@pytest.mark.skipif(not APART, reason="needs mount namespaces")
def test_a_remote_that_the_workers_do_not_see(far, abroad):
    (abroad / "settings.ini").write_text(f"[project]\nname = shop\n[data]\nremote = {abroad / 'remote'}\n[tracking]\nuri = http://127.0.0.1:9\n")
    notebook(abroad, "1")
    with pytest.raises(Invalid, match="is a folder that the workers of .* do not see"):
        run(job_of(abroad), far)


# ---- what travels


@pytest.fixture
def home(shop, monkeypatch):
    """A project as the working directory."""
    monkeypatch.chdir(shop)
    return shop


REMOTE, SERVER = "[data]\nremote = s3://shop/data\n", "[tracking]\nuri = http://mlflow:5000\n"


@pytest.mark.parametrize("settings, parameters, said", [
    (SERVER, {}, "set \\[data\\] remote in settings.ini"),
    (SERVER + "[data]\nremote = memory://shop\n", {}, "set \\[data\\] remote in settings.ini"),
    (REMOTE, {}, "would be lost; start an MLflow server"),
    (REMOTE + SERVER + "[data.sales]\ndelta = sales\n", {}, "\\[data.sales\\] delta = sales is a folder of this machine"),
    (REMOTE + SERVER, {"orders": ["export.csv"]}, "orders = 'export.csv' is a file of this machine"),
])
def test_what_would_be_lost_is_refused(home, settings, parameters, said):
    (home / "settings.ini").write_text(f"[project]\nname = shop\n{settings}")
    (home / "export.csv").write_text("a\n1\n")
    notebook(home, "1")
    here = project()
    with pytest.raises(Invalid, match=said):
        travel.refuse(here, travel.code_of(here, home / "step.ipynb"), home / "step.ipynb", parameters)


@pytest.mark.parametrize("git", [True, False])
def test_code_travels_and_nothing_else(home, tmp_path, git):
    for name in ("tools.py", "sql/orders.sql", "conf/base.yaml", "data/big.parquet", "data/orders.csv", ".env", ".hidden/x.py", "scratch/try.py", ".mlops/data/x.json", "other.ipynb"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("1")
    (home / "venv" / "lib").mkdir(parents=True)
    (home / "venv" / "pyvenv.cfg").write_text("")
    (home / "venv" / "lib" / "x.py").write_text("")
    notebook(tmp_path, "1", name="outside")
    if git:
        (home / ".gitignore").write_text("scratch\nvenv\n")
        subprocess.run(["git", "init", "-q", str(home)], check=True, timeout=300)
    code = travel.code_of(project(), tmp_path / "outside.ipynb")
    travel.may_travel(project(), code)
    assert set(code) == {"settings.ini", "tools.py", "sql/orders.sql", "conf/base.yaml", "outside.ipynb", *([] if git else ["scratch/try.py"])}
    (home / "conf" / "account.json").write_text(json.dumps({"key": "-----BEGIN PRIVATE KEY-----\nMIIE"}))
    with pytest.raises(Invalid, match="conf/account.json holds a password or a private key, which does not travel"):
        travel.may_travel(project(), travel.code_of(project(), tmp_path / "outside.ipynb"))
    (home / "conf" / "account.json").unlink()
    (home / "settings.ini").write_text("[project]\nname = shop\n[tracking]\nuri = http://ann:pa55word@mlflow:5000\n")
    with pytest.raises(Invalid, match="settings.ini holds a password") as error:
        travel.may_travel(project(), travel.code_of(project(), tmp_path / "outside.ipynb"))
    assert "pa55word" not in str(error.value)


def test_names_of_data_are_found_where_they_are_written(home):
    frame = pd.DataFrame({"a": [1, 2]})
    for rows in (1, 2):
        save(frame.head(rows), "orders")
    for name in ("customers", "weather", "unused", "before"):
        save(frame, name)
    (home / "tools.py").write_text("from mlops_nb import load\n\ndef customers():\n    return load('customers')\n")
    notebook(home, 'load("orders@1")', "load('nothing'), 'no name of data'")
    (folder := home / ".mlops" / "runs" / RUN / "step").mkdir(parents=True)
    (folder / "inputs.jsonl").write_text('{"asked": "before", "address": "before@1", "digest": "x"}\n')
    found = travel.data_of(project(), travel.code_of(project(), home / "step.ipynb"), {"tables": ["weather@1"], "n": 1}, "step")
    assert found == ["before@1", "customers@1", "orders@1", "orders@2", "weather@1"]


def test_records_of_models_go_and_come(home, tmp_path):
    models = home / ".mlops" / "models" / "best"
    models.mkdir(parents=True)
    for number in (1, 2, 3):
        (models / f"{number}.json").write_text(json.dumps({"version": number, "file": f".mlops/models/best/{number}.skops"}))
        (models / f"{number}.skops").write_bytes(bytes(number))
    (models / "aliases.json").write_text(json.dumps([{"alias": "champion", "version": 2}, {"alias": "champion", "version": 1}]))
    (home / ".mlops" / "alerts.jsonl").write_text('{"alert": 1}\n')
    sent = travel.models_of(project())
    assert {Path(name).name for name in sent} == {"1.json", "2.json", "3.json", "aliases.json", "1.skops", "3.skops"}, "the champion and the newest"
    there = tmp_path / "there"
    marks = {name: travel.mark(there / name) for name in travel.unpack(travel.pack(sent, tmp_path / "there.zip"), there)}
    far_away = there / ".mlops" / "models" / "best"
    (far_away / "4.json").write_text("{}")
    (far_away / "aliases.json").write_text(json.dumps([*json.loads((models / "aliases.json").read_text()), {"alias": "challenger", "version": 4}]))
    (there / ".mlops" / "alerts.jsonl").write_text('{"alert": 2}\n')
    state, left = travel.state_of(there, marks)
    (models / "aliases.json").write_text(json.dumps([{"alias": "champion", "version": 2}, {"alias": "champion", "version": 1}, {"alias": "old", "version": 1}]))
    travel.settle(project(), there, state)
    assert {Path(name).name for name in state} == {"4.json", "aliases.json", "alerts.jsonl"} and left == []
    assert [move["alias"] for move in json.loads((models / "aliases.json").read_text())] == ["champion", "champion", "old", "challenger"]
    assert [json.loads(line)["alert"] for line in (home / ".mlops" / "alerts.jsonl").read_text().split("\n") if line] == [1, 2]


def saves(project_folder, folder, parameters, **_):
    """A step that saves a frame, as a stand-in for the process of a notebook."""
    Path(folder).mkdir(parents=True)
    one = save(pd.DataFrame({"a": parameters["a"]}), "orders")
    (Path(folder) / "saved.jsonl").write_text(json.dumps({"address": one.address, "digest": one.digest}) + "\n")
    (Path(folder) / "result.json").write_text(json.dumps({"verdict": "passed", "error": "", "problem": ""}))


def test_two_steps_that_save_under_one_name_at_once(tmp_path, home):
    remote, results = tmp_path / "remote", []
    for name, values in (("one", [1]), ("two", [2])):
        there = init(str(tmp_path / name), name="shop").folder
        (there / "settings.ini").write_text(f"[project]\nname = shop\n[data]\nremote = {remote}\n")
        job = {"project_folder": str(there), "step": name, "folder": str(there / "step"), "parameters": {"a": values}}
        travel.away(job, [], f"{__name__}:saves")
        results.append(json.loads((there / "step" / "result.json").read_text()))
    assert [one["verdict"] for one in results] == ["passed", "failed"]
    assert results[1]["error"] == "Conflict" and "step two: orders@1 at" in results[1]["problem"]
    (home / "settings.ini").write_text(f"[project]\nname = shop\n[data]\nremote = {remote}\n")
    save(pd.DataFrame({"a": [3]}), "orders")
    with pytest.raises(Conflict, match="saved orders@1 at a worker, but another orders@1 was saved here"):
        travel.fetch_saved(tmp_path / "one" / "step")


def test_a_suitcase_does_not_write_elsewhere(tmp_path):
    with zipfile.ZipFile(tmp_path / "bag.zip", "w") as bag:
        bag.writestr("step/../../evil.txt", "x")
    with pytest.raises(Invalid, match="outside of it"):
        travel.unpack(tmp_path / "bag.zip", tmp_path / "home" / "here")
    assert not (tmp_path / "evil.txt").exists()
