"""What happens to a deployment when versions change, processes die and people hurry."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import httpx
import pandas as pd
import psutil
import pytest
from patience import finished, started, until

pytestmark = pytest.mark.skipif(os.name != "posix", reason="local deployments hand over ports as POSIX systems do")

from mlops_nb.core.errors import Conflict, GateFailed, Invalid, NotFound, Unavailable, Untrusted
from mlops_nb.core.files import digest_of, read_json, write_json
from mlops_nb.core.settings import init
from mlops_nb.deploy import local
from mlops_nb.deploy.deployments import deploy, deployment, deployments, folder_of, record_of, states, undeploy
from mlops_nb.deploy.engine import free_port
from mlops_nb.deploy.tokens import private_token, token_file, token_of, tokens
from mlops_nb.serve.server import listen

ROWS = pd.DataFrame({"pieces": [2, 30], "price": [1.5, 3.75]})


@pytest.fixture(scope="session")
def registered(tmp_path_factory):
    "A project with three versions of a model that can be told apart by what they answer: its own number."
    from sklearn.dummy import DummyRegressor

    from mlops_nb.model.registry import register

    folder = tmp_path_factory.mktemp("template") / "shop"
    init(str(folder), name="shop")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for version in (1, 2, 3):
            register(DummyRegressor(strategy="constant", constant=version).fit(ROWS, [0, 1]), "large", example=ROWS)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def shop(registered, tmp_path, monkeypatch):
    folder = tmp_path / "shop"
    shutil.copytree(registered, folder)
    monkeypatch.setenv("MLOPS_HOME", str(tmp_path / "home"))
    for name in ("MLOPS_PROJECT", "MLOPS_TOKEN", "MLOPS_STEP_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    yield folder
    monkeypatch.chdir(folder)
    for file in folder.glob(".mlops/deployments/*/state.json"):
        record = read_json(file)
        local.stop(record.get("pid", 0), record.get("created_at", 0), patience_s=5)


def gone(pid: int, patience_s: float = 180) -> bool:
    latest = time.monotonic() + patience_s
    while local.created(pid) and time.monotonic() < latest:
        time.sleep(0.05)
    return not local.created(pid)


def test_a_deployment_answers_is_replaced_at_the_same_address_and_stopped(shop):
    first = deploy("large@1")
    assert first.predict(ROWS) == [1, 1] and first.predict(ROWS.to_dict("records")) == [1, 1] and first.predict(ROWS.head(1).to_numpy()) == [1]
    second = deploy("large@2", name="large")
    assert second.url == first.url and second.pid != first.pid and first.predict(ROWS) == [2, 2]
    assert gone(first.pid) and second.status()["state"] == "running"
    assert [(one["model"], bool(one["until"])) for one in record_of("large")["history"]] == [("large@1", True), ("large@2", False)]
    assert deployments().facts["summary"] == "1 of 1 running" and "large@2" in str(deployment("large"))
    undeploy("large")
    assert gone(second.pid) and [row["state"] for row in states()] == ["stopped"] and undeploy("large").facts["summary"] == "was stopped already"
    with pytest.raises(Unavailable, match="was stopped"):
        second.predict(ROWS)
    third = deploy("large@3")
    assert third.url == first.url and third.predict(ROWS) == [3, 3] and len(record_of("large")["history"]) == 3


def test_many_rows_go_in_several_requests_and_into_the_prediction_log(shop):
    from mlops_nb.monitor.predictions import predictions_of

    one = deploy("large@1")
    many = pd.DataFrame({"pieces": range(2500), "price": 1.0})
    assert one.predict(many) == [1] * 2500
    one.stop()  # waits for the log of the last answer
    log = predictions_of("large").read()
    assert sorted(log["pieces"]) == list(range(2500)) and set(log["model"]) == {"large@1"} and log["request"].nunique() == 3


def test_replacing_under_load_fails_no_request(shop):
    one = deploy("large@1")
    token, stop, answers, failures = token_of("large"), threading.Event(), [], []

    def customer(keeps_connection: bool):
        headers = {"Authorization": f"Bearer {token}"} | ({} if keeps_connection else {"Connection": "close"})
        with httpx.Client(trust_env=False, timeout=60, headers=headers) as client:
            while not stop.is_set():
                try:
                    got = client.post(f"{one.url}/invocations", json={"instances": [[2, 1.5]]})
                    (answers if got.status_code == 200 else failures).append(got.json().get("predictions"))
                except httpx.HTTPError as error:
                    failures.append(repr(error))

    customers = started(*(partial(customer, i % 2 == 0) for i in range(4)))
    try:
        for version in (2, 3, 1):
            deploy(f"large@{version}", name="large")
            n_before = len(answers)
            until(lambda: len(answers) >= n_before + 100)
    finally:
        stop.set()
        finished(customers)
    assert failures == [] and {tuple(one) for one in answers} == {(1,), (2,), (3,)}


def example(shop: Path, version: int, rows: dict) -> None:
    """The example rows that a version of the model was registered with."""
    record = shop / ".mlops" / "models" / "large" / f"{version}.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"example": rows}))


@pytest.mark.parametrize("fault", ["changed file", "refuses its example", "lost file"])
def test_a_version_that_fails_leaves_the_old_one_running(shop, fault):
    from mlops_nb.model.registry import model

    one = deploy("large@1")
    if fault == "changed file":
        file = shop / model("large@2").file
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    elif fault == "refuses its example":
        example(shop, 2, {"columns": ["pieces", "price"], "data": [["two", 1.5]]})
    else:
        (shop / model("large@2").file).unlink()
    before = record_of("large")
    with pytest.raises(Unavailable, match=r"large@2 was not deployed.*large@1 keeps answering"):
        deploy("large@2")
    assert record_of("large") == before and one.predict(ROWS) == [1, 1]
    ours = {process.pid: process.info["ppid"] for process in psutil.process_iter(["cmdline", "cwd", "ppid"])
            if "mlops_nb.deploy.local" in (process.info["cmdline"] or []) and process.info["cwd"] == str(shop)}
    assert [pid for pid, parent in ours.items() if parent not in ours] == [one.pid]


def test_the_try_out_is_not_in_the_prediction_log(shop):
    from mlops_nb.monitor.predictions import predictions_of

    example(shop, 1, {"columns": ["pieces", "price"], "data": [[2, 1.5]]})
    deploy("large@1").stop()
    assert predictions_of("large").days() == []


def test_the_gate(shop):
    from mlops_nb.model.registry import attach

    attach("large@1", "validation", {"title": "Validation", "checks": [{"name": "ndcg", "passed": False, "value": 0.1, "expected": "> 0.3"}]})
    with pytest.raises(GateFailed, match="ndcg.*force"):
        deploy("large@1")
    assert states() == []
    attach("large@2", "validation", {"title": "Validation", "passed": False})
    with pytest.raises(GateFailed):
        deploy("large@2")
    deploy("large@1", force=True)
    assert record_of("large")["history"][0]["why"] == "forced: validation failed"


def test_kill_9_is_seen_and_the_next_deploy_has_the_same_address(shop):
    one = deploy("large@1")
    os.kill(one.pid, signal.SIGKILL)
    assert gone(one.pid) and one.status()["state"] == "died" and [row["state"] for row in states()] == ["died"]
    with pytest.raises(Unavailable, match="has died; deploy large@1 again"):
        one.predict(ROWS)
    two = deploy("large@2")
    assert two.url == one.url and two.predict(ROWS) == [2, 2]
    os.kill(two.pid, signal.SIGKILL)
    assert gone(two.pid) and "died already" in undeploy("large").facts["summary"]


def test_a_stranger_under_the_same_number_is_left_alone(shop):
    one = deploy("large@1")
    undeploy("large")
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        record = record_of("large")
        write_json(folder_of("large") / "state.json", record | {"pid": stranger.pid, "created_at": record["created_at"] - 60, "stopped_at": ""})  # a number comes back after a while, not at once
        assert [row["state"] for row in states()] == ["died"]
        undeploy("large")
        assert stranger.poll() is None and one.pid != stranger.pid
    finally:
        stranger.kill()
        stranger.wait(120)


def test_two_deploys_at_once_take_turns(shop):
    errors = []

    def go(version):
        try:
            deploy(f"large@{version}", name="large")
        except Exception as error:
            errors.append(error)

    finished(started(*(partial(go, version) for version in (1, 2))))
    history = record_of("large")["history"]
    assert errors == [] and sorted(one["model"] for one in history) == ["large@1", "large@2"] and [bool(one["until"]) for one in history] == [True, False]
    assert deployment("large").predict(ROWS)[0] == int(history[-1]["model"][-1])


def test_a_candidate_whose_deployer_died_ends_itself(shop):
    from mlops_nb.serve.plan import planned, write_plan

    write_plan(shop / "plan.json", planned("large@1"))
    script = f"""
import os
from pathlib import Path
from mlops_nb.deploy.local import start
candidate = start({{"project": {str(shop)!r}, "name": "large", "instance": "orphan-{os.getpid()}", "plan": "plan.json", "tokens": None, "token_digests": ["0" * 64], "workers": 2}}, log=Path("server.log"))
candidate.hear(120)
print(candidate.process.pid, flush=True)
os._exit(9)
"""
    said = subprocess.run([sys.executable, "-c", script], cwd=shop, capture_output=True, text=True, timeout=600)
    assert said.returncode == 9, said.stderr
    assert gone(int(said.stdout))


def test_it_survives_the_process_that_deployed(shop):
    said = subprocess.run([sys.executable, "-c", "from mlops_nb.deploy.deployments import deploy; print(deploy('large@1').pid)"], capture_output=True, text=True, timeout=600, start_new_session=True)
    one = deployment("large")
    assert int(said.stdout) == one.pid and one.predict(ROWS) == [1, 1]
    undeploy("large")
    assert gone(one.pid)


def test_ports(shop):
    with listen() as taken:
        with pytest.raises(Conflict, match="taken by another process"):
            deploy("large@1", port=taken.getsockname()[1])
    assert states() == []
    one = deploy("large@1")
    port = free_port("127.0.0.1")
    two = deploy("large@2", port=port)
    assert two.url.endswith(f":{port}") and gone(one.pid) and two.predict(ROWS) == [2, 2]
    undeploy("large")
    with listen("127.0.0.1", port):
        assert f"port {port} is taken by another process; unless" in str(deploy("large@1", dry_run=True))
        moved = deploy("large@1")
        assert moved.url != two.url and moved.predict(ROWS) == [1, 1]
        assert moved.summary == f"large@2 -> large@1; the URL changed to {moved.url}" and f"port {port} is taken by another process, so the URL changed to {moved.url}" in str(moved)


def settings(shop: Path, **values: object) -> None:
    file = shop / "settings.ini"
    file.write_text(file.read_text().partition("\n[deploy.large]")[0] + "\n[deploy.large]\n" + "".join(f"{key} = {value}\n" for key, value in values.items()))


def planned(*words: object, **options: object) -> list[str]:
    return [one["detail"] for one in deploy(*words, **options, dry_run=True).facts["changes"] if one["action"] != "keep"]


def test_a_plan_says_where_the_address_moves_and_deploy_moves_it_there(shop):
    one = deploy("large@1")
    before, port = httpx.URL(one.url).port, free_port("127.0.0.1")
    settings(shop, port=port)
    assert planned("large@1") == [f"port {before} -> {port}"]
    settings(shop, port=port, rate_per_s=1000)
    assert planned("large@1") == [f"port {before} -> {port}", "settings of [deploy.large]"]
    settings(shop, port=port)
    two = deploy("large@1")
    assert two.url == f"http://127.0.0.1:{port}" and two.summary == f"large@1: port {before} -> {port}; the URL changed to {two.url}" and two.predict(ROWS) == [1, 1]
    assert planned("large@1") == [] and planned("large@1", port=before) == [f"port {port} -> {before}"]
    settings(shop, host="0.0.0.0")
    assert planned("large@1") == ["host 127.0.0.1 -> 0.0.0.0", f"port {port} -> a free one"]
    undeploy("large")
    settings(shop, port=before)
    assert planned("large@1") == ["stopped -> large@1, 1 worker", f"port {port} -> {before}"]


@pytest.mark.parametrize("values, words", [
    ({"origins": "https://shop.example/"}, "shop.example/"), ({"collector": "nowhere"}, "the collector 'nowhere' is no address"), ({"host": "192.0.2.7"}, "192.0.2.7.*expected an address of this machine"),
    ({"port": 8199, "grpc_port": 8199}, "8199 is to be that of HTTP and of gRPC"), ({"token_env": "SHORT_TOKEN"}, "SHORT_TOKEN can be guessed.*at least 16")])
def test_a_dry_run_sees_what_deploy_would_refuse(shop, monkeypatch, values, words):
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    settings(shop, **values)
    for dry_run in (True, False):
        with pytest.raises(Invalid, match=words):
            deploy("large@1", dry_run=dry_run)
    assert states() == [] and not token_file("large").exists()


def test_no_more_processes_than_the_cores_can_use(shop, monkeypatch):
    monkeypatch.setattr("mlops_nb.serve.image.cores", lambda: 2)
    for dry_run in (True, False):
        with pytest.raises(Invalid, match="workers is 9; expected 1 to 8 on this machine, which is 4 a core"):
            deploy("large@1", replicas=9, dry_run=dry_run)
    assert "8 workers" in planned("large@1", replicas=8)[0] and states() == []
    one = deploy("large@1")
    with pytest.raises(Invalid, match="workers is 500"):
        one.scale(500)
    for rows in (None, 5, "two"):
        with pytest.raises(Invalid, match="is no rows; expected a frame"):
            one.predict(rows)
    with pytest.raises(Invalid, match="lines is 'x'; expected a whole number"):
        one.logs("x")
    assert one.predict(ROWS) == [1, 1] and deployment("large").pid == one.pid


def test_a_refused_trial_leaves_a_sentence_in_the_log_and_no_traceback(shop):
    example(shop, 1, {"columns": ["pieces", "price"], "data": [["two", 1.5]]})
    with pytest.raises(Unavailable, match="column 'pieces': expected an integer"):
        deploy("large@1")
    log = folder_of("large") / "server.log"
    until(lambda: "the server ends: " in log.read_text())
    until(lambda: not any("mlops_nb.deploy.local" in (process.info["cmdline"] or []) and process.info["cwd"] == str(shop) for process in psutil.process_iter(["cmdline", "cwd"])))
    assert "Traceback" not in log.read_text() and "column 'pieces': expected an integer" in log.read_text()


@pytest.mark.parametrize("call, error, words", [
    (lambda: deploy("large@1", to="sagemaker"), Unavailable, "does not exist yet"), (lambda: deploy("large@1", to="moon"), Invalid, "no target"), (lambda: deploy("large@9"), NotFound, "there are"),
    (lambda: deploy("larg"), NotFound, "did you mean large"), (lambda: deploy("large@1", name="a@b"), Invalid, "plain deployment"), (lambda: deploy("large@1", port=99999), Invalid, "65535"),
    (lambda: undeploy("large"), NotFound, "there are none yet"), (lambda: deployment("../x"), Invalid, "not an address")])
def test_mistakes_of_a_person(shop, call, error, words):
    with pytest.raises(error, match=words):
        call()
    assert states() == []


def everything_under(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_the_token_is_nowhere_in_the_project_nor_in_the_process(shop, capfd):
    one = deploy("large@1")
    one.predict(ROWS)
    assert httpx.get(f"{one.url}/ping", trust_env=False, timeout=60).status_code == 401
    file, token = token_file("large"), token_of("large")
    assert file.stat().st_mode & 0o777 == 0o600 and not file.is_relative_to(shop) and len(token) >= 43
    process = psutil.Process(one.pid)
    assert token not in " ".join(process.cmdline()) and token not in process.environ().values()
    one.stop()
    seen = everything_under(shop) + "".join(capfd.readouterr()).encode() + repr(one).encode() + str(one).encode()
    assert token.encode() not in seen and digest_of(token.encode()).encode() not in seen


def test_a_token_from_the_environment(shop, monkeypatch):
    settings = shop / "settings.ini"
    settings.write_text(settings.read_text() + "\n[deploy.large]\ntoken_env = SHOP_TOKEN\n")
    with pytest.raises(Invalid, match="SHOP_TOKEN, which is not set"):
        deploy("large@1")
    monkeypatch.setenv("SHOP_TOKEN", "from-the-secret-store")
    monkeypatch.setenv("MLOPS_STEP_FOLDER", str(shop))
    one = deploy("large@1")
    assert one.predict(ROWS) == [1, 1] and not token_file("large").exists()
    assert not {"SHOP_TOKEN", "MLOPS_STEP_FOLDER"} & set(psutil.Process(one.pid).environ())
    monkeypatch.setenv("SHOP_TOKEN", "another-from-the-store")
    assert planned("large@1") == ["the owner's token"] and deploy("large@1").summary == "large@1: the owner's token"
    assert one.predict(ROWS) == [1, 1] and planned("large@1") == []
    tokens("large", add="page")
    monkeypatch.delenv("SHOP_TOKEN")
    with pytest.raises(Invalid, match="SHOP_TOKEN, which is not set"):
        deploy("large@1", dry_run=True)
    assert [one["name"] for one in tokens("large", revoke="page").facts["tokens"]] == ["owner"], "another program's token goes without ours"
    one.stop()
    assert b"from-the-s" not in everything_under(shop)


def test_a_token_file_that_others_can_read_is_refused(shop):
    file = token_file("large")
    made = []
    finished(started(*[lambda: made.append(private_token(file))] * 8))
    assert len(set(made)) == 1 and [one.name for one in file.parent.iterdir()] == ["large"]
    file.chmod(0o640)
    with pytest.raises(Untrusted, match="chmod 600"):
        deploy("large@1")


def test_states_are_cheap(shop):
    code = "import sys; from mlops_nb.deploy.deployments import states; states(); print([m for m in ('mlflow', 'pandas', 'sklearn', 'starlette', 'httpx', 'numpy', 'granian') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300).stdout.strip() == "[]"


def test_a_damaged_record_says_so(shop):
    (folder_of("large")).mkdir(parents=True)
    (folder_of("large") / "state.json").write_text('{"name": "lar')
    with pytest.raises(Invalid, match="damaged"):
        states()
    (folder_of("large") / "state.json").unlink()
