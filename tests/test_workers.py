"""Real processes: workers that are killed, that cannot start, that drain, that follow their files; and the command that starts them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
from patience import next_line

from mlops_nb.core.errors import Invalid
from mlops_nb.core.files import digest_of
from mlops_nb.deploy.engine import free_port
from mlops_nb.serve.access import add_token, rotate_token
from mlops_nb.serve.image import affordable
from mlops_nb.serve.plan import ModelPlan, Plan, planned, read_plan, split, write_plan
from mlops_nb.serve.workers import Pool, Worker

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a pool forks")
ROOT, TOKEN, ROUTE = Path(__file__).parent.parent, "a-token-for-tests", "/models/{model}/predict"

PROGRAM = """
import json, os, sys, threading, time
from pathlib import Path
from mlops_nb.core.errors import NotFound
from mlops_nb.serve.plan import planned, write_plan
from mlops_nb.serve.server import listen
from mlops_nb.serve.sources import Version
from mlops_nb.serve.workers import answer_until_stopped


class Slow:
    def __init__(self, version, folder):
        self.version, self.folder = version, folder

    def predict(self, rows):
        if "wait" in rows:  # until a file is there
            (self.folder / "waiting").touch()
            while not (self.folder / "go").exists():
                time.sleep(0.02)
        if "fail" in rows and self.version == "2":
            raise RuntimeError("broken")
        return [f"{self.version} {os.getpid()}"] * len(rows)


class Alias:
    def __init__(self, order):
        self.folder = Path(order["folder"])

    def resolve(self, name, selector):
        if (self.folder / "crash").exists():
            os._exit(3)
        return Version(name, (self.folder / "champion").read_text() if selector == "champion" else selector)

    def load(self, version):
        return Slow(version.version, self.folder)

    def stamp(self):
        return (self.folder / "champion").stat().st_mtime_ns


if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    port = listen()
    answer_until_stopped(order, port, order["workers"], lambda: print(port.getsockname()[1], flush=True))
"""


def until(happened, timeout_s=180):
    latest = time.monotonic() + timeout_s
    while not (found := happened()):
        assert time.monotonic() < latest, "it did not happen"
        time.sleep(0.05)
    return found


def alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@contextmanager
def started(command, folder, env=None):
    "A process and what it says first; it and its children end with the block."
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), **(env or {})})
    family = psutil.Process(process.pid)
    try:
        yield process, family
    finally:
        children = family.children(recursive=True) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in children:
            if child.is_running():
                child.kill()
        process.communicate(timeout=120)


@contextmanager
def pool(folder, *, workers=2, plan=None, **more):
    folder.mkdir(exist_ok=True)
    (folder / "program.py").write_text(PROGRAM)
    (folder / "champion").write_text("1")
    (folder / "metrics").mkdir(exist_ok=True)
    write_plan(folder / "plan.json", plan or planned("slow@champion"), why="a test")
    order = {"source": "program:Alias", "folder": str(folder), "plan": str(folder / "plan.json"), "token_digests": [digest_of(TOKEN.encode())], "workers": workers, "metrics": str(folder / "metrics"),
             "polite_s": 0.1, "patience_s": 20, **more}
    with started([sys.executable, str(folder / "program.py"), json.dumps(order)], folder) as (process, family):
        said = next_line(process)
        assert said, (folder / "log").read_text()
        yield SimpleNamespace(folder=folder, process=process, family=family, url=f"http{'s' * ('tls' in more)}://127.0.0.1:{int(said)}", plan=folder / "plan.json", log=folder / "log")


def ask(url, path="/predict", body=({"a": 1},), token=TOKEN, timeout=120, **more):
    "One request on a connection of its own, so that any worker may get it."
    with httpx.Client(trust_env=False, timeout=timeout, headers={"Authorization": f"Bearer {token}"}, **more) as asking:
        return asking.post(url + path, json=list(body)) if body is not None else asking.get(url + path)


def answered(url, **row):
    got = ask(url, body=[{"a": 1, **row}])
    assert got.status_code == 200, got.text
    return tuple(got.json()["records"][0]["prediction"].split())


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    with pool(tmp_path_factory.mktemp("pool") / "shop") as found:
        yield found


# ---------------------------------------------------------------- life and death

def test_both_workers_answer_and_a_killed_one_is_replaced(shop):
    pids = {child.pid for child in shop.family.children()}
    assert len(pids) == 2
    until(lambda: {int(answered(shop.url)[1]) for _ in range(20)} == pids)
    gone = pids.pop()
    os.kill(gone, signal.SIGKILL)
    until(lambda: len([child for child in shop.family.children() if alive(child.pid)]) == 2 and gone not in {child.pid for child in shop.family.children()})
    until(lambda: len({answered(shop.url)[1] for _ in range(20)}) == 2)
    assert pids < {child.pid for child in shop.family.children()} and f"signal {signal.SIGKILL.value}" in shop.log.read_text()


def test_all_workers_follow_an_alias_and_the_plan(shop):
    (shop.folder / "next").write_text("7")
    (shop.folder / "next").replace(shop.folder / "champion")  # whole at every moment
    until(lambda: {answered(shop.url)[0] for _ in range(20)} == {"7"})
    split(shop.plan, "slow", {"champion": 50, "3": 50}, why="try")
    until(lambda: {answered(shop.url)[0] for _ in range(40)} == {"3", "7"})
    split(shop.plan, "slow", {"champion": 100})
    until(lambda: {answered(shop.url)[0] for _ in range(40)} == {"7"})


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b'{"models": []}', b'{"models": [{"model": "slow", "traffic": {"champion": 40}}]}', b"null", None])
def test_a_plan_that_was_spoiled_by_hand_changes_nothing(shop, content):
    kept = shop.plan.read_bytes()
    shop.plan.unlink() if content is None else shop.plan.write_bytes(content)
    try:
        for _ in range(12):
            assert answered(shop.url)[0] in "17"
            time.sleep(0.1)
    finally:
        shop.plan.write_bytes(kept)


def test_the_metrics_of_all_workers_sum_up(shop):
    from prometheus_client.parser import text_string_to_metric_families

    def counted():
        page = ask(shop.url, "/metrics", None)
        assert page.status_code == 200
        return sum(sample.value for family in text_string_to_metric_families(page.text) for sample in family.samples if sample.name.endswith("requests_total") and sample.labels.get("route") == ROUTE)
    assert counted() == 0  # nobody else asks there
    with ThreadPoolExecutor(4) as several:
        assert all(got.status_code == 200 for got in several.map(lambda i: ask(shop.url, "/models/slow/predict"), range(40)))
    until(lambda: counted() == 40)


def test_a_worker_that_cannot_start_is_tried_again_ever_more_seldom_and_the_other_answers(tmp_path):
    with pool(tmp_path / "shop") as found:
        (found.folder / "crash").touch()
        gone = found.family.children()[0].pid
        os.kill(gone, signal.SIGKILL)
        until(lambda: found.log.read_text().count("(code 3)") >= 3)
        pauses = [float(line.split("in ")[-1].split()[0]) for line in found.log.read_text().splitlines() if "(code 3)" in line]
        assert pauses == sorted(pauses) and pauses[-1] > pauses[0]
        assert answered(found.url)[0] == "1"
        (found.folder / "crash").unlink()
        until(lambda: len({answered(found.url)[1] for _ in range(20)}) == 2)


def test_workers_end_when_their_parent_is_killed(tmp_path):
    with pool(tmp_path / "shop") as found:
        pids = [child.pid for child in found.family.children()]
        found.process.kill()
        until(lambda: not any(map(alive, pids)))


def test_a_request_that_is_answered_when_told_to_stop_is_finished(tmp_path):
    with pool(tmp_path / "shop", workers=1) as found, ThreadPoolExecutor(2) as several:
        coming = several.submit(ask, found.url, body=[{"wait": 1}])
        until((found.folder / "waiting").exists)
        queued = several.submit(ask, found.url)
        until(lambda: len(accepted(found)) == 2)
        assert ask(found.url, "/health", None).status_code == 200
        found.process.terminate()
        time.sleep(0.5)
        assert not coming.done() and found.process.poll() is None
        (found.folder / "go").touch()
        assert coming.result(120).status_code == 200 and coming.result().headers["connection"] == "close" and queued.result(120).status_code == 200
        assert found.process.wait(120) == 0 and "Traceback" not in found.log.read_text()


def accepted(found):
    "The connections that the only worker has taken."
    port = int(found.url.rpartition(":")[2])
    return [one for one in found.family.children()[0].net_connections("tcp") if one.status == psutil.CONN_ESTABLISHED and one.laddr.port == port]


def test_tokens_rotate_without_a_restart(tmp_path):
    tokens = tmp_path / "tokens.json"
    old = add_token(tokens, "shop", scopes=("predict",))
    with pool(tmp_path / "shop", tokens=str(tokens)) as found:
        pids = {child.pid for child in found.family.children()}
        assert ask(found.url, token=old).status_code == 200 and ask(found.url, token="other").status_code == 401
        new = rotate_token(tokens, "shop", grace_s=0)
        until(lambda: {ask(found.url, token=new).status_code for _ in range(10)} == {200} and {ask(found.url, token=old).status_code for _ in range(10)} == {401})
        assert pids == {child.pid for child in found.family.children()}


def test_a_canary_withdraws_itself_from_all_workers(tmp_path):
    plan = Plan((ModelPlan("slow", {"1": 50, "2": 50}),))
    with pool(tmp_path / "shop", plan=plan) as found:
        def withdrawn():
            for _ in range(10):
                assert ask(found.url, body=[{"fail": 1}]).status_code in (200, 500)
            return read_plan(found.plan).of("slow").traffic == {"1": 100}
        until(withdrawn)
        written = read_plan(found.plan)
        assert written.by == "canary" and "fails too often" in written.why and written.revision == 2
        until(lambda: {ask(found.url, body=[{"fail": 1}]).status_code for _ in range(20)} == {200})


# ---------------------------------------------------------------- TLS and gRPC

def test_tls_and_grpc_beside_it(tmp_path):
    trustme, tritonclient = pytest.importorskip("trustme"), pytest.importorskip("tritonclient.grpc")
    import ssl

    authority, files = trustme.CA(), [tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem")]
    server = authority.issue_cert("127.0.0.1", "localhost")
    files[0].write_bytes(b"".join(blob.bytes() for blob in server.cert_chain_pems))
    files[1].touch(mode=0o600)
    server.private_key_pem.write_to_path(files[1])
    authority.cert_pem.write_to_path(files[2])
    number = free_port("127.0.0.1")
    with pool(tmp_path / "shop", tls=[str(files[0]), str(files[1])], grpc=number) as found:
        context = ssl.create_default_context(cafile=str(files[2]))
        assert ask(found.url, verify=context).status_code == 200
        with pytest.raises(httpx.ConnectError):
            ask(found.url)  # nobody vouches for it here
        with pytest.raises(httpx.HTTPError):
            ask(found.url.replace("https", "http"), timeout=10)
        asking = tritonclient.InferenceServerClient(f"localhost:{number}", ssl=True, root_certificates=str(files[2]))
        assert asking.is_model_ready("slow", headers={"authorization": f"Bearer {TOKEN}"})
        asking.close()


# ---------------------------------------------------------------- the parent alone

def dead_worker(index=0, ready=False):
    "A worker of a pool that has just ended with code 3."
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        os._exit(3)
    theirs.close()
    return Worker(index, pid, ours, time.monotonic(), ready)


def test_pauses_grow_to_half_a_minute_and_no_further():
    pauses = []
    for failures in (0, 1, 5, 8, 9, 500, 1100, 100_000):
        made = Pool({}, 1, failures=failures)
        made.held[0] = dead_worker()
        made.heard(made.held[0])
        pauses.append(made.due[0][0] - time.monotonic())
    assert all(pause <= 30 for pause in pauses) and pauses[-1] > 25 and pauses[0] < 1


def test_a_parent_without_means_to_fork_tries_again(monkeypatch):
    made = Pool({}, 1)
    made.due = [(0.0, 0)]

    def fork(index):
        raise BlockingIOError(11, "Resource temporarily unavailable")
    monkeypatch.setattr(made, "fork", fork)
    made.step(0.0)
    assert made.due and made.due[0][0] > time.monotonic() and made.due[0][1] == 0


def test_the_number_of_workers_has_a_bound(monkeypatch):
    monkeypatch.setattr("mlops_nb.serve.image.cores", lambda: 2)
    assert [affordable(count) for count in (0, 1, 2, 8)] == [2, 1, 2, 8]
    for count in (-1, 9, 500):
        with pytest.raises(Invalid, match=f"workers is {count}; expected 1 to 8 on this machine, which is 4 a core, or 0 for one a core"):
            affordable(count)


def test_a_worker_that_is_replaced_says_why_once(caplog):
    made = Pool({}, 1)
    made.held[0] = dead_worker(ready=True)
    made.held[0].error = "there is no line@champion."
    made.heard(made.held[0])
    assert [one.getMessage() for one in caplog.records] == ["worker 0 ended (there is no line@champion); another starts at once"] and made.due


def test_a_worker_that_never_gets_ready_is_replaced(monkeypatch, caplog):
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        time.sleep(300)
        os._exit(0)
    theirs.close()
    made = Pool({}, 1)
    made.held[0] = Worker(0, pid, ours, time.monotonic() - 100)
    made.step(0.0)
    assert made.held, "it may take its time"
    monkeypatch.setattr("mlops_nb.serve.workers.HANGS_S", 99)
    made.step(5.0)
    assert not made.held and made.due and [one.getMessage() for one in caplog.records] == ["worker 0 ended (not ready after 99 s); another starts in 0.2 s"]


# ---------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    "A project with two models, one of them as a bundle too."
    import numpy as np
    import pandas as pd
    from sklearn.linear_model import LinearRegression

    from mlops_nb.core.settings import in_project, init
    from mlops_nb.model.registry import model, promote, register
    from mlops_nb.serve.bundle import write_bundle

    folder, frame = Path(init(str(tmp_path_factory.mktemp("served") / "shop"), name="shop").folder), pd.DataFrame({"x": np.arange(5.0)})
    with in_project(folder):
        for name in ("line", "other"):
            for slope in (1, 2):
                register(LinearRegression().fit(frame, slope * frame["x"]), name, example=frame)
            promote(f"{name}@1")
        write_bundle(model("line@1"), folder / "bundle")
    return folder


@contextmanager
def command(folder, *arguments):
    env = {"MLOPS_TOKEN": TOKEN, "PYTHONUNBUFFERED": "1"}
    with started([sys.executable, "-m", "mlops_nb", "serve", *arguments, "--port", "0", "--workers", "2"], folder, env) as (process, family):
        log = folder / "log"
        size = log.stat().st_size if log.exists() else 0
        said = until(lambda: [line for line in log.read_text().splitlines() if " answers on " in line] or process.poll() is not None and [""], 300)[-1]
        assert said, log.read_text()[-2000:]
        yield process, said.split(" answers on ")[1].split()[0], log


def test_the_command_serves_two_models_follows_a_promotion_and_ends_at_ctrl_c(registered):
    from mlops_nb.core.settings import in_project
    from mlops_nb.model.registry import promote

    (registered / "log").unlink(missing_ok=True)
    with command(registered, "line@champion,other@2") as (process, url, log):
        def slopes(name):
            return {round(ask(url, f"/models/{name}/predict", [{"x": 3}]).json()["records"][0]["prediction"]) for _ in range(8)}
        assert slopes("line") == {3} and slopes("other") == {6}
        with in_project(registered):
            promote("line@2")
        until(lambda: slopes("line") == {6})
        process.send_signal(signal.SIGINT)
        assert process.wait(120) in (0, 130) and "Traceback" not in log.read_text()


def test_the_command_serves_a_bundle(registered):
    (registered / "log").unlink(missing_ok=True)
    with command(registered, "./bundle") as (process, url, log):
        assert round(ask(url, body=[{"x": 3}]).json()["records"][0]["prediction"]) == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0 and "Traceback" not in log.read_text()


@pytest.mark.parametrize(("arguments", "words"), [(["line@nix", "--workers", "2"], "model 'line' has no 'nix'"), (["line@champion", "--workers", "500"], "workers is 500")])
def test_what_cannot_be_served_is_said_once(registered, arguments, words):
    done = subprocess.run([sys.executable, "-m", "mlops_nb", "serve", *arguments, "--port", "0"], cwd=registered, env={**os.environ, "MLOPS_TOKEN": TOKEN}, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode and len(said.strip().splitlines()) == 1 and words in said, said
