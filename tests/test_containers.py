"""The docker and compose targets against an engine that is played by a program of ours: it keeps containers, and runs each as a real server process.

With a docker-compatible engine, the same is done for real: `MLOPS_TEST_IMAGES=1 pytest tests/test_containers.py -k real_engine`. The engine is the one that answers (docker, then podman; `MLOPS_TEST_ENGINE` names
one, `DOCKER_HOST` another socket), the image is built on Python's own slim one or on `MLOPS_TEST_BASE`, and packages come from wherever `PIP_INDEX_URL` says."""

import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the played engine is a POSIX program")

from mlops_nb.core.errors import Conflict, Invalid, NotFound, Unavailable
from mlops_nb.core.files import read_json, write_atomic
from mlops_nb.core.settings import DeploySection, in_project
from mlops_nb.deploy.containers import TARGETS
from mlops_nb.deploy.context import HEALTH
from mlops_nb.deploy.deployments import deploy, deployment, undeploy
from mlops_nb.deploy.engine import Container, begun, build_words, built, called, compose_file, composer, engine, in_yaml, own_user, reason_in, rootless, run_words
from mlops_nb.deploy.requirements import our_wheel
from mlops_nb.deploy.targets import Wanted, artifacts_of, record_of, recorded, write_record
from mlops_nb.deploy.tokens import token_of
from mlops_nb.monitor.alerts import recent
from mlops_nb.monitor.predictions import predictions_of
from mlops_nb.serve import plan
from test_deploy import ROWS, registered as three, shop as copied  # noqa: F401

PLAYED = r'''#!{python}
"""A container engine, as far as our targets can see: state in a folder, each container a process of its own."""
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path

HERE = Path({here!r})
ARGS = sys.argv[1:]
with open(HERE / "calls", "a") as file:
    file.write(json.dumps(ARGS) + "\n")


def file_of(name): return HERE / "containers" / (name + ".json")


def alive(pid):
    try:
        return Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[0] != "Z" if Path("/proc").exists() else os.kill(pid, 0) is None
    except OSError:
        return False


def fail(text):
    print(text, file=sys.stderr)
    sys.exit(1)


def load(name):
    if not file_of(name).exists():
        fail(f"Error: No such container: {{name}}")
    one = json.loads(file_of(name).read_text())
    one["status"] = "running" if one["pid"] and alive(one["pid"]) else "exited"
    return one


def launch(one):
    environment = {{key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH", "MLFLOW_DISABLE_TELEMETRY") if key in os.environ}}
    environment |= {{"MLOPS_PORT": one["port"], "MLOPS_HOST": "127.0.0.1", "MLOPS_MODELS": "/opt/mlops/models", "HOME": str(HERE)}} | one["environment"]
    for here, inside in one["volumes"]:
        if not Path(here).is_dir():
            fail(f"Error: bind source path does not exist: {{here}}")
        environment = {{key: here + value.removeprefix(inside) if value.startswith(inside) else value for key, value in environment.items()}}
    broken = (HERE / "broken").read_text().split() if (HERE / "broken").exists() else []
    words = [sys.executable, "-m", "mlops_nb.serve.image", "serve"]
    if one["image"] in broken or one["name"] in broken:
        words = [sys.executable, "-c", "raise SystemExit('ModuleNotFoundError: No module named shop')"]
    with open(HERE / "containers" / (one["name"] + ".log"), "ab") as log:
        one["pid"] = subprocess.Popen(words, env=environment, cwd=HERE, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True).pid
    file_of(one["name"]).write_text(json.dumps(one))


def halt(one, patience=30):
    if one["pid"] and alive(one["pid"]):
        os.kill(one["pid"], signal.SIGTERM)
        latest = time.monotonic() + patience
        while alive(one["pid"]) and time.monotonic() < latest:
            time.sleep(0.02)
    if one["pid"]:  # an engine ends a container with all its processes
        try:
            os.killpg(one["pid"], signal.SIGKILL)
        except ProcessLookupError:
            pass
        latest = time.monotonic() + 20
        while taken(one["port"]) and time.monotonic() < latest:
            time.sleep(0.02)


def taken(port):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", int(port))) == 0


def create(name, image, ports, volumes, environment, labels):
    if file_of(name).exists():
        fail(f'Error: Conflict. The container name "/{{name}}" is already in use')
    if not (HERE / "images" / image.replace(":", "@")).exists():
        fail(f"Unable to find image '{{image}}' locally")
    host, port, inside = ports.rsplit(":", 2)
    assert host == "127.0.0.1" and inside == "8080"
    launch({{"name": name, "image": image, "port": port, "volumes": volumes, "environment": environment, "labels": labels}})


if ARGS[0] in ("info", "version"):
    sys.exit(1 if (HERE / "down").exists() else 0)
elif ARGS[0] == "image":
    sys.exit(0 if (HERE / "images" / ARGS[2].replace(":", "@")).exists() else 1)
elif ARGS[0] == "build":
    if not (Path(ARGS[3]) / "Dockerfile").exists():
        fail("ERROR: failed to read dockerfile: no such file")
    (HERE / "images" / ARGS[2].replace(":", "@")).write_text(ARGS[3])
elif ARGS[0] == "run":
    flags, options, rest = {{"--detach", "--init", "--read-only"}}, [], ARGS[1:]
    while rest[0].startswith("--"):
        options.append((rest[0], None if rest[0] in flags else rest[1]))
        rest = rest[1 if rest[0] in flags else 2:]
    many = lambda name: [value for key, value in options if key == name]
    files = [line.split("=", 1) for path in many("--env-file") for line in Path(path).read_text().split()]
    create(many("--name")[0], rest[0], many("--publish")[0], [one.split(":")[:2] for one in many("--volume")], dict(one.split("=", 1) for one in many("--env")) | dict(files), dict(one.split("=", 1) for one in many("--label")))
elif ARGS[:2] == ["container", "inspect"]:
    one = load(ARGS[2])
    print(json.dumps([{{"State": {{"Status": one["status"], "Health": {{"Status": "healthy"}}}}, "Config": {{"Image": one["image"], "Labels": one["labels"]}}, "RestartCount": 0}}]))
elif ARGS[0] == "stop":
    halt(load(ARGS[-1]))
elif ARGS[0] == "start":
    launch(load(ARGS[-1]))
elif ARGS[0] == "rename":
    one = load(ARGS[1])
    file_of(ARGS[1]).unlink()
    file_of(ARGS[2]).write_text(json.dumps({{**one, "name": ARGS[2]}}))
elif ARGS[0] == "rm":
    halt(load(ARGS[-1]), 0)
    file_of(ARGS[-1]).unlink()
elif ARGS[0] == "logs":
    load(ARGS[-1])
    print("\n".join((HERE / "containers" / (ARGS[-1] + ".log")).read_text().splitlines()[-int(ARGS[2]):]))
elif ARGS[0] == "compose" and "up" in ARGS:
    import yaml

    file = Path(ARGS[ARGS.index("--file") + 1])
    one = yaml.safe_load(file.read_text())["services"]["model"]
    if file_of(one["container_name"]).exists():
        halt(load(one["container_name"]))
        file_of(one["container_name"]).unlink()
    create(one["container_name"], one["image"], one["ports"][0], [[str(file.parent / volume["source"]), volume["target"]] for volume in one["volumes"]], one["environment"], one["labels"])
elif ARGS[0] == "compose":
    pass
else:
    fail(f"unknown command {{ARGS[0]}}")
'''


@pytest.fixture(scope="session")
def registered(three):
    "The project of the local deployments' tests, with a champion and a fourth version that asks for other columns."
    from sklearn.dummy import DummyRegressor

    from mlops_nb.model.registry import promote, register

    other = ROWS.assign(weight=1.0)
    with in_project(three):
        register(DummyRegressor(strategy="constant", constant=4).fit(other, [0, 1]), "large", example=other)
        promote("large@1")
    return three


@pytest.fixture
def shop(copied, monkeypatch):
    for name in ("MLOPS_PLATFORM", "MLOPS_AUTH"):
        monkeypatch.delenv(name, raising=False)
    wheel = our_wheel()
    monkeypatch.setattr("mlops_nb.deploy.context.our_wheel", lambda: wheel)  # the package may change while it is developed, and the image's tag with it
    return copied


class Played:
    "What a test sees of the engine."

    def __init__(self, here: Path):
        self.here = here
        for name in ("containers", "images", "bin"):
            (here / name).mkdir(parents=True)
        self.program = here / "bin" / "docker"
        self.program.write_text(PLAYED.format(python=sys.executable, here=str(here)))
        self.program.chmod(self.program.stat().st_mode | stat.S_IXUSR)

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.here / "calls").read_text().splitlines()] if (self.here / "calls").exists() else []

    def told(self, *words: str) -> list[list[str]]:
        return [call for call in self.calls if call[:len(words)] == list(words)]

    @property
    def containers(self) -> list[str]:
        return sorted(file.stem for file in (self.here / "containers").glob("*.json"))

    def stop_all(self) -> None:
        for name in self.containers:
            subprocess.run([str(self.program), "rm", "--force", name], timeout=30)


@pytest.fixture
def played(tmp_path, monkeypatch):
    one = Played(tmp_path / "engine")
    monkeypatch.setenv("PATH", f"{one.program.parent}{os.pathsep}{os.environ['PATH']}")
    yield one
    one.stop_all()


@pytest.fixture
def no_engine(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def model(address):
    from mlops_nb.model.registry import model

    return model(address)


def put_up(address, before=None, to="docker", **more):
    "What `deploy` does with a target, with options that settings would bring."
    found = model(address)
    wanted = Wanted("large", address, found, why="a test", versions={str(found.version): found}, **more)
    facts = {**TARGETS[to].apply(wanted, before), "name": "large", "model": found.address, "target": to, "replicas": wanted.replicas, "traffic": wanted.split, "shadow": ""}
    write_record(recorded(before, facts, why="a test"))
    return record_of("large")


def test_it_runs_hardened_answers_is_updated_without_another_container_and_ends(shop, played):
    one = deploy("large@1", to="docker")
    assert one.predict(ROWS) == [1, 1] and one.status()["state"] == "running" and one.status()["model"] == "large@1" and "large" in one.logs()
    (run,) = played.told("run")
    text = " ".join(run)
    for words in ("--read-only", "--cap-drop ALL", "--security-opt no-new-privileges", "--init", "--tmpfs /tmp:", "--memory 2048m", "--pids-limit 512", "--restart unless-stopped", "--publish 127.0.0.1:", "models:/opt/mlops/models:ro"):
        assert words in text, words
    assert run[run.index("--user") + 1].split(":")[0] not in ("0", "root") and token_of("large") not in text
    failures, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            try:
                if set(one.predict(ROWS)) - {1, 2}:
                    failures.append("another answer")
            except Exception as error:
                failures.append(repr(error))

    asking = threading.Thread(target=ask)
    asking.start()
    two = deploy("large@2", name="large", to="docker")
    stop.set()
    asking.join(30)
    assert failures == [] and two.predict(ROWS) == [2, 2] and two.url == one.url
    assert len(played.told("run")) == 1 and len(played.told("build")) == 1 and played.containers == ["mlops-shop-large"]  # the plan changed, no container
    assert "nothing to change" in deploy("large@2", name="large", to="docker").summary and len(played.told("run")) == 1
    undeploy("large")
    assert played.containers == [] and record_of("large")["stopped_at"]
    assert deploy("large@2", name="large", to="docker").predict(ROWS) == [2, 2] and record_of("large")["url"] == one.url
    assert len(played.told("build")) == 1


def test_traffic_shadow_and_rollback_are_the_plans(shop, played):
    one = deploy("large@champion", to="docker")
    one.traffic({"champion": 50, "2": 50})
    assert {one.predict(ROWS)[0] for _ in range(60)} == {1, 2}
    one.shadow("3")
    assert read_json(record_of("large")["plan"])["models"][0]["shadow"] == "3" and (artifacts_of("large", "docker") / "models" / "large-3").is_dir()
    one.rollback()
    assert read_json(record_of("large")["plan"])["models"][0]["shadow"] == ""
    one.rollback()
    assert {one.predict(ROWS)[0] for _ in range(30)} == {1} and record_of("large")["model"] == "large@1" and len(played.told("run")) == 1


def test_what_a_canary_inside_withdraws_is_history_and_one_alert_outside(shop, played):
    one = deploy("large@1", to="docker")
    one.traffic({"1": 90, "2": 10})
    record = record_of("large")
    plan.withdraw(record["plan"], "large", "2", by="canary", why="large@2 fails too often")  # as a worker inside does
    shown = deploy("large@1", to="docker", traffic={"1": 90, "2": 10}, dry_run=True).facts["changes"]
    assert any("1 100% -> 1 90%, 2 10%" in str(change) for change in shown), "the withdrawn version would get a share again"
    assert recent() == []
    for _ in range(2):
        status = one.status()
        assert (status["traffic"], status["withdrawn"]) == ({"1": 100}, "large@2 fails too often")
        assert [alert["message"] for alert in recent()] == ["a canary of large was withdrawn: large@2 fails too often"]
    last = record_of("large")["history"][-1]
    assert (last["by"], last["traffic"], len(record_of("large")["history"])) == ("canary", {"1": 100}, len(record["history"]) + 1)
    one.traffic({"1": 80, "2": 20})
    assert one.status()["traffic"] == {"1": 80, "2": 20} and "withdrawn" not in one.status() and len(recent()) == 1


def test_scaling_replaces_the_container_at_the_same_address(shop, played):
    one = deploy("large@1", to="docker")
    one.scale(2)
    assert one.predict(ROWS) == [1, 1] and played.containers == ["mlops-shop-large"] and record_of("large")["replicas"] == 2
    first, second = played.told("run")
    assert "MLOPS_WORKERS=1" in first and "MLOPS_WORKERS=2" in second and first[first.index("--publish") + 1] == second[second.index("--publish") + 1]
    assert [call[0] for call in played.calls if call[0] in ("stop", "rename", "run")] == ["run", "stop", "rename", "run"]


def test_another_image_is_proved_first_and_rollback_takes_the_one_before(shop, played):
    before = put_up("large@1", options={"base": "python:3.11.7-slim"})
    after = put_up("large@2", before, options={"base": "python:3.11.8-slim"})
    assert after["image"] != before["image"] and after["url"] == before["url"] and len(played.told("build")) == 2
    assert [call[2:4] for call in played.told("run")] == [["--name", "mlops-shop-large"], ["--name", "mlops-shop-large-trial"], ["--name", "mlops-shop-large"]] and played.containers == ["mlops-shop-large"]
    assert deployment("large").predict(ROWS) == [2, 2] and after["gap_s"] > 0
    deployment("large").rollback()
    back = record_of("large")
    assert back["image"] == before["image"] and back["model"] == "large@1" and deployment("large").predict(ROWS) == [1, 1] and len(played.told("build")) == 2
    assert not (artifacts_of("large", "docker") / "trial").exists()


def test_a_broken_image_never_replaces_the_one_that_answers(shop, played):
    before = put_up("large@1", options={"base": "python:3.11.7-slim"})
    with pytest.raises(Unavailable, match="not deployed.*No module named shop"):
        (played.here / "broken").write_text("mlops-shop-large-trial")
        put_up("large@2", before, options={"base": "python:3.11.8-slim"})
    assert deployment("large").predict(ROWS) == [1, 1] and played.containers == ["mlops-shop-large"] and len(played.told("stop")) == 0
    assert read_json(before["plan"])["models"][0]["traffic"] == {"1": 100}


def test_one_that_breaks_after_its_proof_is_taken_back(shop, played, monkeypatch):
    before = put_up("large@1", options={"base": "python:3.11.7-slim"})
    monkeypatch.setattr("mlops_nb.deploy.containers.proved", lambda found, container, *more: (played.here / "broken").write_text(container.image))  # good while it is tried, broken afterwards
    with pytest.raises(Unavailable, match="answers again"):
        put_up("large@2", before, options={"base": "python:3.11.8-slim"})
    time.sleep(1)  # in which the servers would take the new plan, if it had stayed
    assert deployment("large").predict(ROWS) == [1, 1] and played.containers == ["mlops-shop-large"]
    assert json.loads((played.here / "containers" / "mlops-shop-large.json").read_text())["image"] == before["image"]


def test_a_version_that_the_servers_refuse_is_taken_back(shop, played, monkeypatch):
    from mlops_nb.deploy.mounted import state_written

    one, file = deploy("large@1", to="docker"), artifacts_of("large", "docker") / "models" / "large-2" / "model.skops"

    def damaged(*given, **planned):
        file.write_bytes(file.read_bytes()[:-40])  # the disk was full, and nobody noticed
        state_written(*given, **planned)

    monkeypatch.setattr("mlops_nb.deploy.containers.state_written", damaged)
    with pytest.raises(Unavailable, match="large@2 was not deployed, and the plan before it stays.*its digest is"):
        deploy("large@2", name="large", to="docker")
    assert one.predict(ROWS) == [1, 1] and record_of("large")["model"] == "large@1" and read_json(record_of("large")["plan"])["models"][0]["traffic"] == {"1": 100}


def test_a_damaged_bundle_is_written_again(shop, played):
    from mlops_nb.deploy.mounted import laid_out

    (folder,) = laid_out({"1": model("large@1")}, shop / "place")
    whole = (folder / "model.skops").read_bytes()
    (folder / "model.skops").write_bytes(whole[:-40])
    assert (laid_out({"1": model("large@1")}, shop / "place")[0] / "model.skops").read_bytes() == whole


def test_a_version_that_needs_another_image_is_refused_for_traffic(shop, played):
    one = deploy("large@1", to="docker")
    page = artifacts_of("large", "docker") / "context" / "context.json"
    about = read_json(page)
    write_atomic(page, json.dumps({**about, "packages": {"numpy": "2.4.6"}}))
    with pytest.raises(Conflict, match="scikit-learn.*builds another image"):
        one.traffic({"1": 50, "2": 50})
    assert {one.predict(ROWS)[0] for _ in range(10)} == {1}


def test_compose_does_the_same_with_its_file(shop, played):
    one = deploy("large@1", to="compose")
    file = artifacts_of("large", "compose") / "compose.yaml"
    assert one.predict(ROWS) == [1, 1] and played.told("compose", "--file", str(file), "up", "--detach", "--no-build") and not played.told("run")
    assert deploy("large@2", name="large", to="compose").predict(ROWS) == [2, 2] and len(played.told("compose", "--file")) == 1
    one.scale(2)
    assert one.predict(ROWS) == [2, 2] and "MLOPS_WORKERS: '2'" in file.read_text()
    kept = file.read_bytes()
    (played.here / "broken").write_text("mlops-shop-large")

    def mend():
        while "No module named shop" not in (played.here / "containers" / "mlops-shop-large.log").read_text():
            time.sleep(0.01)
        (played.here / "broken").write_text("")

    threading.Thread(target=mend, daemon=True).start()
    with pytest.raises(Unavailable, match="answers again"):
        one.scale(3)
    assert file.read_bytes() == kept and record_of("large")["replicas"] == 2
    undeploy("large")
    assert played.containers == []


def until(look, patience_s=60):
    "What a look finds, once it finds something."
    latest = time.monotonic() + patience_s
    while not (found := look()) and time.monotonic() < latest:
        time.sleep(0.05)
    return found


def asked(one, **headers):
    return httpx.post(f"{one.url}/invocations", json={"instances": [[2, 1.5]]}, headers={"Authorization": f"Bearer {token_of(one.name)}", **headers}, trust_env=False, timeout=60)


@pytest.mark.parametrize("to", ["docker", "compose"])
def test_what_a_local_deployment_honours_a_container_honours(shop, played, to):
    with open("settings.ini", "a") as file:
        file.write("\n[deploy.large]\norigins = https://shop.example, https://www.shop.example\naccess_log = access.jsonl\npayloads = yes\n")
    one = deploy("large@1", to=to)
    assert one.predict(ROWS) == [1, 1]
    origin = lambda page: asked(one, Origin=page).headers.get("access-control-allow-origin")
    assert origin("https://www.shop.example") == "https://www.shop.example" and origin("https://elsewhere.example") is None
    line = until(lambda: next((line for line in one.logs(200).splitlines() if line.startswith("{") and "/invocations" in line), ""))
    assert json.loads(line)["status"] == 200 and json.loads(line)["payload"]["dataframe_split"]["data"] == [[2, 1.5], [30, 3.75]] and token_of("large") not in one.logs(200) and not (shop / "access.jsonl").exists()
    one.shadow("2")
    until(lambda: one.predict(ROWS) and predictions_of("large.shadow").days())
    one.scale(2)  # another container, the same log
    assert one.predict(ROWS) == [1, 1]
    one.stop()  # waits for the log of the last answer
    found, shadows = predictions_of("large").read(), predictions_of("large.shadow").read()
    assert found.attrs["damaged"] == 0 and set(found["model"]) == {"large@1"} and len(found) >= 8 and set(found["prediction"]) == {1}
    assert list(found[["pieces", "price"]].iloc[:2].itertuples(index=False, name=None)) == [(2, 1.5), (30, 3.75)]
    assert set(shadows["model"]) == {"large@2"} and set(shadows["request"]) <= set(found["request"])
    assert not (artifacts_of("large", to) / "state" / "predictions").exists()


def test_a_rate_limit_holds_for_all_workers_and_a_new_one_takes_another_container(shop, played):
    settings = Path("settings.ini").read_text()
    Path("settings.ini").write_text(f"{settings}\n[deploy.large]\nrate_per_s = 0.001\nworkers = 2\n")
    one = deploy("large@1", to="docker")
    assert [asked(one).status_code for _ in range(4)] == [200, 429, 429, 429] and int(asked(one).headers["retry-after"]) > 500
    Path("settings.ini").write_text(f"{settings}\n[deploy.large]\nworkers = 2\n")
    assert "replaced" in str(deploy("large@1", to="docker", dry_run=True))
    assert [asked(deploy("large@1", to="docker")).status_code for _ in range(2)] == [200, 200] and len(predictions_of("large").read()) >= 1
    assert [call[call.index("--name") + 1] for call in played.told("run")] == ["mlops-shop-large", "mlops-shop-large-trial", "mlops-shop-large"]
    assert not [word for word in played.told("run")[1] if "predictions" in word], "a request to try it is no prediction"


def test_an_origin_that_is_none_is_said_before_anything_is_touched(shop, played):
    with open("settings.ini", "a") as file:
        file.write("\n[deploy.large]\norigins = shop.example\n")
    with pytest.raises(Invalid, match="the origin 'shop.example' is not one"):
        deploy("large@1", to="docker")
    assert played.containers == [] and not played.told("build")


def test_a_container_of_an_older_record_is_replaced_and_remembers_from_then_on(shop, played):
    put_up("large@1")
    record = record_of("large")
    older = {key: value for key, value in record["settings"].items() if key not in ("predictions", "variables")}
    write_record({**record, "settings": older, "signature": "of an older version"})
    assert deploy("large@1", to="docker").predict(ROWS) == [1, 1] and len(played.told("run")) == 3
    assert until(lambda: len(predictions_of("large").read()) >= 2)


def test_without_an_engine_it_says_what_is_left_to_do(shop, no_engine):
    for to, command in (("docker", "docker run --detach"), ("compose", "docker compose --file")):
        name = f"large-{to}"
        report = deploy("large@1", name=name, to=to, dry_run=True)
        assert "no container engine answers" in str(report) and not artifacts_of(name, to).exists()
        one = deploy("large@1", name=name, to=to)
        record, status = record_of(name), one.status()
        assert record["note"] == "written, not running: no container engine answers; run these commands" and any(command in line for line in record["commands"])
        assert status["state"] == "written, not running" and status["commands"] == record["commands"]
        with pytest.raises(Unavailable, match="never started"):
            one.logs()
        one.traffic({"1": 90, "2": 10})  # the files are the deployment
        assert read_json(record["plan"])["models"][0]["traffic"] == {"1": 90, "2": 10}
        one.rollback()
        one.scale(2)
        assert any("MLOPS_WORKERS=2" in line for line in record_of(name)["commands"]) or "MLOPS_WORKERS: '2'" in (artifacts_of(name, to) / "compose.yaml").read_text()
        undeploy(name)


def test_what_was_written_runs_once_there_is_an_engine_and_again_after_it_was_lost(shop, played):
    (played.here / "down").write_text("")
    if engine():
        pytest.skip("another engine answers")
    one = deploy("large@1", to="docker")
    assert record_of("large")["engine"] == "" and played.containers == []
    (played.here / "down").unlink()
    assert deploy("large@1", to="docker").predict(ROWS) == [1, 1] and record_of("large")["url"] == one.url
    played.stop_all()
    assert one.status()["state"] == "gone"
    assert deploy("large@1", to="docker").predict(ROWS) == [1, 1] and len(played.told("run")) == 2


def test_a_strangers_container_of_that_name_is_left_alone(shop, played):
    put_up("large@1")
    page = played.here / "containers" / "mlops-shop-large.json"
    page.write_text(json.dumps({**json.loads(page.read_text()), "labels": {"mlops.folder": "elsewhere"}}))
    for change in (lambda: put_up("large@2", record_of("large")), lambda: deployment("large").scale(2), lambda: undeploy("large")):
        with pytest.raises(Conflict, match="another name"):
            change()
    assert not played.told("stop") and deployment("large").predict(ROWS) == [1, 1]


def test_a_client_without_its_engine_counts_as_none(shop, played):
    assert engine() == "docker" and composer("docker") == ["docker", "compose"]
    (played.here / "down").write_text("")
    assert engine() in ("", "podman") and engine("docker") == ""
    with pytest.raises(Invalid, match="docker or podman"):
        engine("lxc")


def test_no_token_is_in_the_folder_or_in_the_words(shop, played, monkeypatch):
    deploy("large@1", to="docker")
    deploy("large@2", name="large-file", to="compose")
    for name, to in (("large", "docker"), ("large-file", "compose")):
        token, place = token_of(name).encode(), artifacts_of(name, to)
        assert not [file for file in place.rglob("*") if file.is_file() and token in file.read_bytes()]
        assert token.decode() not in json.dumps(played.calls) and token.decode() not in json.dumps(record_of(name))
        assert stat.S_IMODE((place / "state" / "tokens.json").stat().st_mode) == 0o600


def test_a_plan_touches_nothing(shop, played):
    tree = lambda: sorted((str(file), file.stat().st_mtime_ns) for file in shop.rglob("*") if ".lock" not in file.name and "mlflow.db" not in file.name)
    before = tree()
    report = deploy("large@1", to="docker", dry_run=True)
    assert tree() == before and played.containers == [] and not played.told("build") and {row["action"] for row in report.facts["changes"]} == {"create"}
    deploy("large@1", to="docker")
    changes = deploy("large@2", name="large", to="docker", traffic={"1": 75, "2": 25}, dry_run=True).facts["changes"]
    assert [(row["action"], row["what"], row["detail"]) for row in changes] == [("update", "traffic", "1 100% -> 1 75%, 2 25%")]


def test_an_env_file_is_given_to_the_engine_and_must_be_there(shop, played):
    section = DeploySection()
    with pytest.raises(NotFound, match="env_file"):
        put_up("large@1", options={"env_file": "shop.env"}, section=section)
    (shop / "shop.env").write_text("SHOP_CURRENCY=EUR\n")
    record = put_up("large@1", options={"env_file": "shop.env", "memory_gb": 0.5, "cpu": 1.5}, section=section)
    (run,) = played.told("run")
    assert run[run.index("--env-file") + 1] == str(shop / "shop.env") and "512m" in run and "1.5" in run and "SHOP_CURRENCY" not in json.dumps([run, record])
    assert not list((artifacts_of("large", "docker") / "context").rglob("*.env"))


CONTAINER = Container("mlops-large", "mlops-large:1-abc", 8300, Path("place"), workers=2, user="10001:10001", predictions="../../predictions/large", variables={"MLOPS_ORIGINS": "https://a.example,https://b.example"})


def test_the_compose_file_is_valid_and_hardened(tmp_path):
    "Against the schema of the Compose specification, as check-jsonschema ships it."
    file = tmp_path / "compose.yaml"
    for container in (CONTAINER, Container(**{**vars(CONTAINER), "env_file": "/run/shop.env", "cpus": 0.5, "host": "0.0.0.0", "grpc_port": 8301})):
        file.write_text(in_yaml(compose_file(container), "a test"))
        done = subprocess.run([sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout
    service = compose_file(CONTAINER)["services"]["model"]
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"] and service["user"] == "10001:10001"
    assert service["ports"] == ["127.0.0.1:8300:8080"] and service["restart"] == "unless-stopped" and service["deploy"]["resources"]["limits"] == {"cpus": "2", "memory": "2048M", "pids": 512}
    assert service["healthcheck"]["test"][:3] == ["CMD", "python", "-c"] and "$" not in service["healthcheck"]["test"][3].replace("$$", "")
    assert service["volumes"][0]["read_only"] and not service["volumes"][1]["read_only"] and "MLOPS_TOKEN" not in service["environment"]


@pytest.mark.parametrize("grpc_port", [0, 8301])
def test_both_spellings_say_the_same(grpc_port):
    container = Container(**{**vars(CONTAINER), "grpc_port": grpc_port})
    words, service = run_words(container), compose_file(container)["services"]["model"]
    after = lambda flag: [words[i + 1] for i, word in enumerate(words) if word == flag]
    assert after("--user") == [service["user"]] and after("--publish") == service["ports"] and after("--tmpfs") == service["tmpfs"] and after("--cap-drop") == service["cap_drop"]
    assert dict(one.split("=", 1) for one in after("--env")) == service["environment"] and words[-1] == service["image"]
    assert [one.split(":")[1:] for one in after("--volume")] == [[volume["target"], f"{'ro' if volume['read_only'] else 'rw'},{volume['bind']['selinux']}"] for volume in service["volumes"]]


def test_an_engines_failure_is_a_sentence(shop, played):
    with pytest.raises(Unavailable, match="`docker container` failed: Error: No such container: nobody"):
        called("docker", "container", "inspect", "nobody")
    with pytest.raises(Unavailable, match="cannot be run"):
        called("no-such-engine")
    with pytest.raises(Unavailable, match="did not finish"):
        called(sys.executable, "-c", "import time; time.sleep(30)", timeout_s=0.2)


def test_grpc_and_traces_are_in_the_image_and_at_the_door(shop, no_engine):
    section = "\n[deploy.large]\ngrpc_port = 28001\ncollector = http://otel.example:4318\n"
    Path("settings.ini").write_text(f"{(settings := Path('settings.ini').read_text())}{section}")
    deploy("large@1", to="docker")
    (build, run), packages = record_of("large")["commands"], (artifacts_of("large", "docker") / "context" / "requirements.txt").read_text()
    for words in ("--publish 127.0.0.1:28001:8001", "MLOPS_GRPC_PORT=8001", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=http://otel.example:4318/v1/traces", "OTEL_SERVICE_NAME=large"):
        assert words in run, words
    assert "grpcio==" in packages and "opentelemetry-sdk==" in packages and build.startswith("docker build ")
    Path("settings.ini").write_text(settings + section.replace("otel.example", "127.0.0.1"))
    with pytest.raises(Invalid, match="is the container itself"):
        deploy("large@1", to="docker")


BUILDS = [
    ("\x1b[91mERROR: Could not find a version\n\x1b[0m\x1b[91mERROR: No matching distribution found for six==1.17.0\n\x1b[0mThe command '/bin/sh -c pip' returned a non-zero code: 1", "ERROR: No matching distribution found for six==1.17.0"),  # docker 20.10
    ("#9 2.1 ERROR: No matching distribution found for six==1.17.0\nERROR: failed to solve: process \"/bin/sh -c pip\" did not complete successfully: exit code: 1\n", "#9 2.1 ERROR: No matching distribution found for six==1.17.0"),  # BuildKit
    ("STEP 4/8: RUN pip\nERROR: No matching distribution found for six==1.17.0\nError: building at STEP \"RUN pip\": while running runtime: exit status 1\n", "ERROR: No matching distribution found for six==1.17.0"),  # podman 4.3
    ("pull access denied for python, repository does not exist\n", "pull access denied for python, repository does not exist"), ("", "it wrote nothing")]


@pytest.mark.parametrize("wrote, reason", BUILDS)
def test_the_reason_of_a_failed_build_is_found(wrote, reason):
    assert reason_in(wrote) == reason


def program(file: Path, text: str) -> str:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


def test_a_failed_build_says_why_and_keeps_all_that_was_written(tmp_path):
    failing = program(tmp_path / "docker", "echo 'ERROR: No matching distribution found for six==1.17.0'; echo 'exit code: 1' >&2; exit 1")
    with pytest.raises(Unavailable, match=r"six==1\.17\.0; all that it wrote is in .*build\.log"):
        built(failing, "mlops-large:1", tmp_path / "context")
    log = tmp_path / "build.log"
    assert "exit code: 1" in log.read_text() and stat.S_IMODE(log.stat().st_mode) == 0o600
    built(program(tmp_path / "docker", "exit 0"), "mlops-large:1", tmp_path / "context")
    assert not log.exists()


def test_a_port_that_is_held_a_moment_longer_is_waited_for(tmp_path):
    "As podman's rootlessport does after a stop."
    held = program(tmp_path / "podman", f"echo \"$1\" >> '{tmp_path}/told'\n[ \"$1\" = run ] && [ $(grep -c run '{tmp_path}/told') -lt 3 ] && {{ echo 'Error: rootlessport listen tcp 127.0.0.1:8300: bind: address already in use' >&2; exit 126; }}\nexit 0")
    begun(held, CONTAINER)
    assert (tmp_path / "told").read_text().split() == ["run", "rm", "run", "rm", "run"]
    with pytest.raises(Unavailable, match="address already in use"):
        begun(program(tmp_path / "podman", "echo 'bind: address already in use' >&2; exit 126"), CONTAINER, timeout_s=0)
    with pytest.raises(Unavailable, match="no space"):
        begun(program(tmp_path / "podman", "echo 'no space left on device' >&2; exit 125"), CONTAINER)


def test_an_index_is_named_and_its_address_is_not(monkeypatch):
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST"):
        monkeypatch.delenv(name, raising=False)
    assert build_words("docker", "mlops-large:1", Path("context")) == ["docker", "build", "--tag", "mlops-large:1", "context"]
    monkeypatch.setenv("PIP_INDEX_URL", "https://ann:p4ss@packages.example/simple")
    assert build_words("/usr/bin/podman", "mlops-large:1", Path("context"))[1:6] == ["build", "--format", "docker", "--build-arg", "PIP_INDEX_URL"]
    assert "p4ss" not in str(build_words("docker", "mlops-large:1", Path("context")))


@pytest.mark.parametrize("said, without", [(" Security Options:\n  seccomp\n   Profile: builtin\n  rootless\n", True), ("  security:\n    rootless: true\n    seccompEnabled: true\n", True),  # docker 20.10, podman 4.3
                                           (" Security Options:\n  seccomp\n   Profile: default\n", False), ("  security:\n    rootless: false\n", False)])
def test_inside_a_rootless_engine_whoever_deploys_is_user_0(tmp_path, said, without):
    "Another user inside would be a third one outside, who may not read the tokens."
    (tmp_path / "said").write_text(said)
    found = program(tmp_path / "podman", f"cat '{tmp_path / 'said'}'")
    assert rootless(found) == without and (own_user(found) == "0:0") == without


@pytest.mark.skipif(not os.environ.get("MLOPS_TEST_IMAGES"), reason="builds a real image: set MLOPS_TEST_IMAGES=1 where an engine answers")
@pytest.mark.parametrize("to", ["docker", "compose"])
def test_a_real_engine_builds_and_runs_it(shop, to):
    asked, name = os.environ.get("MLOPS_TEST_ENGINE", ""), f"test-{os.getpid()}-{to}"
    if not TARGETS[to].tool(asked):
        pytest.skip("no container engine answers")
    with open("settings.ini", "a") as file:
        file.write(f"\n[deploy.{name}]\nengine = {asked}\nbase = {os.environ.get('MLOPS_TEST_BASE', '')}\n")
    try:
        one = deploy("large@1", name=name, to=to)
        container = record_of(name)["container"]
        assert one.predict(ROWS) == [1, 1] and deploy("large@2", name=name, to=to).predict(ROWS) == [2, 2]
        one.traffic({"1": 50, "2": 50})
        assert {one.predict(ROWS)[0] for _ in range(60)} == {1, 2}
        one.rollback()
        assert one.predict(ROWS) == [2, 2] and one.status()["state"] == "running" and "answers as" in one.logs()
        inside = lambda code: subprocess.run([record_of(name)["engine"], "exec", container, "python", "-c", code], capture_output=True, text=True, timeout=120)
        assert inside("open('/opt/mlops/models/x', 'w')").returncode and inside("open('/x', 'w')").returncode and inside("open('/var/lib/mlops/tokens.json').read()").returncode == 0
        assert inside(HEALTH).returncode == 0
        one.scale(2)
        assert one.predict(ROWS) == [2, 2]
    finally:
        undeploy(name)
