"""What a deployment's verbs do on any target: plans, traffic, rollback, scale, history, tokens, and a unit that brings it back."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

import httpx
import psutil
import pytest
from test_deploy import ROWS, gone, registered, shop  # noqa: F401

from mlops_nb.core.errors import Conflict, GateFailed, Invalid, NotFound, Unavailable
from mlops_nb.core.files import read_json, write_json
from mlops_nb.core.settings import in_project
from mlops_nb.deploy import deployments, swap, systemd, targets
from mlops_nb.deploy.deployments import arms, deploy, deployment, deployment_rollback, logs, rollback, scale, traffic, undeploy
from mlops_nb.deploy.targets import Change, folder_of, record_of, require_able, states, target_named
from mlops_nb.deploy.tokens import access_file, token_file, token_of, tokens

posix = pytest.mark.skipif(os.name != "posix", reason="local deployments hand over ports as POSIX systems do")


class Shelf:
    "A target of a few lines, which remembers what it was asked."

    def __init__(self, name="shelf", can=("traffic", "rollback", "scale", "logs")):
        self.name, self.can, self.calls, self.fails = name, frozenset(can), [], None

    def plan(self, wanted, before):
        old = (before["model"], before["traffic"], before["replicas"]) if before and not before["stopped_at"] else None
        new = (wanted.found.address, wanted.split, wanted.replicas)
        return [Change("keep", "shelf") if old == new else Change("update" if old else "create", "shelf", f"{old and old[0]} -> {new[0]}")]

    def apply(self, wanted, before):
        self.calls.append(("apply", wanted.name, wanted.split))
        if self.fails:
            raise self.fails
        return {"url": "http://127.0.0.1:9", "pending": self}

    def keep(self):
        self.calls.append(("keep",))

    def abandon(self):
        self.calls.append(("abandon",))

    def status(self, record):
        return {"state": "running", "model": record["model"], "replicas": record["replicas"]}

    def logs(self, record, lines):
        return f"{lines} lines of {record['name']}"

    def traffic(self, record, split, shadow=None):
        self.calls.append(("traffic", record["by"], record["why"]))
        return {"traffic": dict(split)}

    def rollback(self, record):
        return {"traffic": record["history"][-2]["traffic"]}

    def scale(self, record, replicas=None, autoscale=None):
        return {}

    def delete(self, record):
        self.calls.append(("delete", record["name"]))


@pytest.fixture
def shelf(shop, monkeypatch):  # noqa: F811
    "A project where shelf and board are targets."
    for name in ("shelf", "board"):
        module = ModuleType(f"mlops_nb.deploy.{name}")
        module.TARGET = Shelf(name)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(targets.TARGETS, name, name)
    return target_named("shelf")


def test_a_dry_run_says_what_would_change_and_touches_nothing(shelf):
    report = deploy("large@1", to="shelf", traffic={"1": 90, "2": 10}, dry_run=True)
    assert report.facts["summary"] == "1 change; nothing has been touched" and report.facts["changes"] == [{"action": "create", "what": "shelf", "detail": "None -> large@1"}]
    assert "1 90%, 2 10%" in str(report) and shelf.calls == [] and states() == [] and not folder_of("large").exists()


def test_the_same_again_changes_nothing(shelf):
    deploy("large@1", to="shelf", why="the first")
    again = deploy("large@1", name="large")
    assert again.summary.startswith("nothing to change") and "nothing to change" in str(again)
    assert [call[0] for call in shelf.calls] == ["apply", "keep"] and len(record_of("large")["history"]) == 1 and again.target == "shelf"


def test_each_change_is_in_the_history_with_who_and_why(shelf, monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "ann")
    deploy("large@1", to="shelf", why="the first")
    traffic("large", {"1": "90", "large@2": 10}, why="how good is it?")
    scale("large", 3)
    deployment_rollback("large", "not good")
    undeploy("large")
    history = deployment("large").history
    assert [(one["model"], one["traffic"], one["why"], one["by"], one["replicas"]) for one in history] == [
        ("large@1", {"1": 100}, "the first", "ann", 1), ("large@1", {"1": 90, "2": 10}, "how good is it?", "ann", 1), ("large@1", {"1": 90, "2": 10}, "3 replicas", "ann", 3),
        ("large@1", {"1": 90, "2": 10}, "not good", "ann", 3)]
    assert all(one["until"] for one in history) and history[-1]["ended_by"] == "ann" and ("traffic", "ann", "how good is it?") in shelf.calls
    assert history[1]["changes"] == ["update traffic: traffic 1 90%, 2 10%"]


def test_a_target_without_shadows_refuses_the_whole_step(shelf):
    deploy("large@1", to="shelf")
    before = record_of("large"), list(shelf.calls)
    with pytest.raises(Unavailable, match="shelf cannot copy requests to a shadow"):
        traffic("large", {"1": 90, "2": 10}, shadow="3")
    assert (record_of("large"), shelf.calls) == before


@pytest.mark.parametrize("to", ["docker", "compose", "kubernetes"])
def test_one_rollback_undoes_a_split_and_its_shadow(shop, to, monkeypatch, tmp_path):  # noqa: F811
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))  # no engine: the files are the deployment
    if to == "kubernetes":
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
        (shop / "settings.ini").write_text("[project]\nname = shop\n[deploy.large]\nimage = registry.example/shop/all:1\n")
    one = deploy("large@1", to=to)
    one.shadow("2")
    one.traffic({"1": 60, "2": 40}, shadow="large@3", why="a bold step")
    now = record_of("large")
    assert (now["traffic"], now["shadow"]) == ({"1": 60, "2": 40}, "3") and [entry["why"] for entry in now["history"]][2:] == ["a bold step"]
    assert now["history"][-1]["changes"] == ["update traffic: traffic 1 60%, 2 40%, shadow 3"]
    one.rollback(why="too bold")
    back = record_of("large")
    assert (back["traffic"], back["shadow"], len(back["history"])) == ({"1": 100}, "2", 4)
    one.traffic({"2": 100})
    assert (record_of("large")["traffic"], record_of("large")["shadow"]) == ({"2": 100}, ""), "a shadow that gets a share is no shadow any more"


def test_another_target_is_put_up_first_and_then_the_old_one_is_taken_down(shelf):
    board = target_named("board")
    deploy("large@1", to="shelf")
    report = deploy("large@1", to="board", dry_run=True)
    assert [one["action"] for one in report.facts["changes"]] == ["create", "delete"] and board.calls == []
    moved = deploy("large@1", to="board")
    assert moved.target == "board" and shelf.calls[-1] == ("delete", "large") and [call[0] for call in board.calls] == ["apply", "keep"] and len(moved.history) == 2
    board.fails = Unavailable("no room on the board.")
    with pytest.raises(Unavailable):
        deploy("large@2")
    assert record_of("large")["model"] == "large@1"


def test_a_record_that_cannot_be_written_undoes_what_was_put_up(shelf, monkeypatch):
    monkeypatch.setattr(deployments, "write_record", lambda record: (_ for _ in ()).throw(Unavailable("the disk is full.")))
    with pytest.raises(Unavailable, match="disk is full"):
        deploy("large@1", to="shelf")
    assert [call[0] for call in shelf.calls] == ["apply", "abandon"] and states() == []


def test_a_section_of_the_settings_is_a_target_and_a_name(shelf):
    settings = SimpleNamespace(deploy={"staging": SimpleNamespace(target="shelf"), "cloud": SimpleNamespace(target="vertex")})
    assert target_named("staging", settings) is shelf
    with pytest.raises(Unavailable, match="vertex does not exist yet"):
        target_named("cloud", settings)
    with pytest.raises(Invalid, match="staging"):
        target_named("stagin", settings)


@pytest.mark.parametrize("call, error, words", [
    (lambda: deploy("large@1", to="shelf", shadow="2"), Unavailable, "shelf cannot copy requests to a shadow.*local"),
    (lambda: deploy("large@1", to="shelf", autoscale={"min": 1, "max": 3}), Unavailable, "cannot scale by itself"),
    (lambda: deploy("large@1", to="shelf", traffic={"1": 90, "2": 20}), Invalid, "sum to 100"), (lambda: deploy("large@1", to="shelf", traffic={"1": 50, "9": 50}), NotFound, "there are"),
    (lambda: deploy("large@1", to="shelf", traffic={"1": "all"}), Invalid, "expected percent by version"), (lambda: deploy("large@1", to="shelf", replicas=-1), Invalid, "replicas"),
    (lambda: traffic("large", {"1": 100}), NotFound, "there is no deployment"), (lambda: logs("large"), NotFound, "there is no deployment"), (lambda: arms("large", {}), Invalid, "add up"),
    (lambda: scale("large", 0), Invalid, "undeploy large"), (lambda: scale("large", "two"), Invalid, "replicas is 'two'; expected a whole number"),
    (lambda: deploy("large@1", to="shelf", replicas="2"), Invalid, "replicas is '2'; expected"), (lambda: deploy("large@1", to="shelf", port="80a"), Invalid, "port is '80a'; expected a whole number"),
    (lambda: deploy("large@1", to="shlf"), Invalid, "did you mean shelf"), (lambda: rollback("large"), NotFound, "there is no deployment 'large'.*A data set goes back.*large@1")])
def test_what_cannot_be_is_said_before_anything_is_touched(shelf, call, error, words):
    with pytest.raises(error, match=words):
        call()
    assert shelf.calls == [] and states() == []


def test_every_version_that_gets_traffic_passes_the_gate(shelf):
    from mlops_nb.model.registry import attach

    attach("large@2", "validation", {"title": "Validation", "passed": False})
    with pytest.raises(GateFailed, match="large@2"):
        deploy("large@1", to="shelf", traffic={"1": 90, "2": 10})
    deploy("large@1", to="shelf")
    with pytest.raises(GateFailed, match="large@2"):
        traffic("large", {"1": 90, "2": 10})
    forced = deploy("large@1", traffic={"1": 90, "2": 10}, force=True, why="a test of the gate")
    assert forced.history[-1]["why"] == "a test of the gate (large@1 not validated, large@2 forced: validation failed)"


def test_a_stopped_deployment_cannot_be_changed(shelf):
    deploy("large@1", to="shelf")
    undeploy("large")
    with pytest.raises(Unavailable, match="was stopped; deploy large@1 again"):
        traffic("large", {"1": 100})
    assert deploy("large@1", to="shelf").summary == "large@1: None -> large@1"


@pytest.mark.parametrize("name", ["local", "docker", "compose", "kubernetes", "kserve"])
def test_every_target_keeps_to_the_protocol(name):
    target = target_named(name)
    assert target.name == name and target.can <= set(targets.ABILITIES)
    for verb in ("plan", "apply", "status", "logs", "delete", *({"traffic", "shadow", "rollback"} & target.can), *(["scale"] if {"scale", "autoscale"} & target.can else [])):
        assert callable(getattr(target, verb))
    for ability in set(targets.ABILITIES) - target.can:
        with pytest.raises(Unavailable, match=f"^{name} cannot .*[a-z)]\\.$"):
            require_able(target, ability)


def test_a_record_of_an_older_version_is_read(shop):  # noqa: F811
    write_json(folder_of("large") / "state.json", {"name": "large", "model": "large@1", "digest": "0" * 64, "target": "local", "host": "127.0.0.1", "port": 9, "instance": "large-1-00", "url": "http://127.0.0.1:9",
                                                   "pid": 2**30, "created_at": 1e9, "since": "2026-01-01T00:00:00Z", "stopped_at": "",
                                                   "history": [{"model": "large@1", "instance": "large-1-00", "since": "2026-01-01T00:00:00Z", "until": "", "why": "not validated"}]})
    one = deployment("large")
    assert one.status()["state"] == "died" and "not validated" in str(one) and deploy("large@1", dry_run=True).facts["changes"][0]["action"] == "run"


def eventually(what, patience_s=180):
    latest = time.monotonic() + patience_s
    while not (found := what()) and time.monotonic() < latest:
        time.sleep(0.1)
    return found


def answered(one, n=40):
    with httpx.Client(trust_env=False, timeout=60, headers={"Authorization": f"Bearer {token_of(one.name)}"}) as client:
        return {client.post(f"{one.url}/invocations", json={"instances": [[2, 1.5]]}).json()["predictions"][0] for _ in range(n)}


@posix
def test_traffic_shadow_rollback_and_scale_of_a_running_deployment(shop):  # noqa: F811
    from mlops_nb.monitor.predictions import predictions_of

    one = deploy("large@1")
    one.traffic({"1": 50, "2": 50}, why="half of it")
    assert eventually(lambda: answered(one) == {1, 2}) and deployment("large").pid == one.pid and one.status()["traffic"] == {"1": 50, "2": 50}
    one.rollback(why="not convinced")
    assert eventually(lambda: answered(one) == {1}) and record_of("large")["traffic"] == {"1": 100} and [entry["why"] for entry in one.history][1:] == ["half of it", "not convinced"]
    revision = one.status()["revision"]
    one.traffic({"1": 50, "2": 50}, shadow="3", why="both at once")
    assert one.status()["revision"] == revision + 1 and (one.status()["traffic"], one.status()["shadow"]) == ({"1": 50, "2": 50}, "3")
    one.rollback()
    assert (one.status()["traffic"], one.status()["shadow"]) == ({"1": 100}, "") and one.status()["revision"] == revision + 2
    one.shadow("3")
    assert eventually(lambda: answered(one) == {1} and predictions_of("large.shadow").days())
    shadowed = predictions_of("large.shadow").read()
    assert set(shadowed["model"]) == {"large@3"} and set(shadowed["prediction"]) == {3} and set(predictions_of("large").read()["model"]) <= {"large@1", "large@2"}
    more = one.scale(2, why="the sale")
    assert more.url == one.url and more.pid != one.pid and gone(one.pid) and record_of("large")["replicas"] == 2 and more.status()["shadow"] == "3"
    worker = eventually(lambda: psutil.Process(more.pid).children() if len(psutil.Process(more.pid).children()) == 2 else [])[0]
    os.kill(worker.pid, signal.SIGKILL)
    assert eventually(lambda: more.status().get("restarts") == 1 and more.status().get("workers") == 2) and answered(more) == {1}
    assert "another starts" in more.logs() and deploy("large@1").summary == "large@1: shadow 3 -> none", "the shadow goes when it is not asked for again"
    assert deploy("large@1").summary.startswith("nothing to change")


@posix
def test_each_withdrawal_is_one_alert_and_nothing_else_is(shop, monkeypatch):  # noqa: F811
    from mlops_nb.deploy.local import alarm
    from mlops_nb.monitor import alerts
    from mlops_nb.serve.plan import planned, rollback, split, withdraw, write_plan

    order = {"project": str(shop), "name": "large", "plan": str(shop / "plan.json")}
    write_plan(order["plan"], planned("large@1"))
    split(order["plan"], "large", {"1": 90, "2": 10})
    withdraw(order["plan"], "large", "2", by="canary", why="large@2 was slow.")  # before this server started
    look = alarm(order)
    said = lambda: [one["message"] for one in reversed(alerts.recent())]
    split(order["plan"], "large", {"1": 90, "2": 10}, by="canary", why="a token may be called so")
    look(), rollback(order["plan"], "large"), look()
    assert said() == []
    for version in ("2", "3"):
        split(order["plan"], "large", {"1": 90, version: 10})
        for _ in range(3):  # workers
            withdraw(order["plan"], "large", version, by="canary", why=f"large@{version} fails too often.")
    real = alerts.append_lines
    monkeypatch.setattr(alerts, "append_lines", lambda *given: (_ for _ in ()).throw(Unavailable("the disk is full.")))
    with pytest.raises(Unavailable):
        look()
    monkeypatch.setattr(alerts, "append_lines", real)
    look(), look()
    assert said() == [f"a canary of large was withdrawn: large@{version} fails too often." for version in ("2", "3")]
    (shop / "plan.json").write_text("{")
    look(), alarm(order)()
    assert len(said()) == 2


@posix
def test_what_all_workers_answered_is_added_up_and_a_withdrawn_canary_raises_one_alert(shop):  # noqa: F811
    from mlops_nb.interface.status import status
    from mlops_nb.monitor.alerts import recent
    from mlops_nb.serve.plan import history

    one = deploy("large@1", traffic={"1": 50, "2": 50}, replicas=2)
    sent, latest, headers = 0, time.monotonic() + 120, {"Authorization": f"Bearer {token_of('large')}", "Connection": "close"}  # so that either worker is asked
    while len(read_json(record_of("large")["plan"])["models"][0]["traffic"]) == 2 and time.monotonic() < latest:
        assert httpx.post(f"{one.url}/invocations", json={"instances": [[2, 1.5]] * 20}, headers=headers, trust_env=False).status_code == 200
        sent += 1
    assert eventually(recent), "the second version answers 2 where the first answers 1"
    alert, = recent()
    assert (alert["subject"], alert["severity"]) == ("large", "warning") and alert["message"].startswith("a canary of large was withdrawn: large@2 predicts something else than 1")
    assert status().facts["alerts"] == [alert] and "a canary of large was withdrawn" in str(status())
    asked = [httpx.get(f"{one.url}/metrics", headers=headers, trust_env=False).text for _ in range(8)]
    assert all("mlops_workers 2.0" in page for page in asked)
    assert eventually(lambda: one.status()["answered"] >= sent + len(asked)) and one.status()["log_errors"] == 0, "one worker alone has not answered them all"
    revisions = history(record_of("large")["plan"])
    assert [row["by"] == "canary" for row in revisions].count(True) == 1


@posix
def test_an_alias_is_followed_without_a_restart(shop):  # noqa: F811
    from mlops_nb.model.registry import promote

    promote("large@1")
    one = deploy("large@champion")
    assert one.model == "large@1" and answered(one, 3) == {1}
    promote("large@2")
    assert eventually(lambda: answered(one, 3) == {2}) and one.status()["model"] == "large@2" and deployment("large").pid == one.pid
    again = deploy("large@champion")
    assert again.pid == one.pid and again.model == "large@2" and "large@champion" in str(again)
    assert [row["model"] for row in states()] == ["large@2"]
    again.rollback(why="worse than the one before")
    assert eventually(lambda: answered(one, 3) == {1}) and deployment("large").pid == one.pid and [row["model"] for row in states()] == ["large@1"]


@posix
def test_tokens_come_and_go_while_it_runs(shop):  # noqa: F811
    one = deploy("large@1")
    report = tokens("large", add="shop-page")
    page = open(report.facts["file"]).read()

    def ask(token):
        return httpx.post(f"{one.url}/invocations", json={"instances": [[2, 1.5]]}, headers={"Authorization": f"Bearer {token}"}, trust_env=False, timeout=60).status_code

    assert page not in str(report) and os.stat(report.facts["file"]).st_mode & 0o777 == 0o600 and eventually(lambda: ask(page) == 200)
    new = open(tokens("large", rotate="shop-page").facts["file"]).read()
    assert new != page and eventually(lambda: ask(new) == 200) and ask(page) == 200
    old = token_of("large")
    tokens("large", rotate="owner")
    assert token_of("large") != old and eventually(lambda: ask(token_of("large")) == 200) and one.predict(ROWS) == [1, 1]
    tokens("large", revoke="shop-page")
    assert eventually(lambda: ask(new) == 401 and ask(page) == 401)
    assert not access_file("large").is_relative_to(shop) and token_file("large").read_text() not in access_file("large").read_text()
    with pytest.raises(Invalid, match="rotate it instead"):
        tokens("large", revoke="owner")
    tokens("large", rotate="owner")
    assert one.predict(ROWS) == [1, 1], "our own client waits until the servers have looked"


def test_tokens_are_changed_one_at_a_time_and_only_as_they_can_be(shelf):
    with pytest.raises(NotFound, match="there is no deployment 'larg'"):
        tokens("larg")
    assert not access_file("larg").parent.exists()
    deploy("large@1", to="shelf")
    with pytest.raises(Invalid, match="'admn' is no scope of a token; did you mean admin?"):
        tokens("large", add="page", scopes="predict,admn")
    with pytest.raises(Invalid, match="add page and revoke owner are 2 changes.*one at a time"):
        tokens("large", add="page", revoke="owner")
    assert {one.name for one in access_file("large").parent.glob("large@*")} == {"large@access.json"}
    found = tokens("large", add="page", scopes=["predict", "metrics"]).facts
    assert {one["name"]: one["scopes"] for one in found["tokens"]} == {"owner": "admin, metrics, predict", "page": "metrics, predict"}
    kept = open(found["file"]).read()
    with pytest.raises(Conflict, match="already"):
        tokens("large", add="page")
    assert open(found["file"]).read() == kept


@posix
def test_a_unit_takes_over_and_brings_it_back(shop, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(systemd, "systemctl", lambda *words: False)
    one = deploy("large@1")
    report = systemd.keep_running("large")
    file = systemd.unit_file("large")
    assert "written" in report.facts["summary"] and file.is_relative_to(tmp_path)
    command = shlex.split(next(line for line in file.read_text().splitlines() if line.startswith("ExecStart=")).removeprefix("ExecStart=").replace("%%", "%").replace("$$", "$"))
    started = []

    def as_systemd_would():
        started.append(subprocess.Popen(command, cwd=shop, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return started[-1]

    try:
        unit = as_systemd_would()
        assert eventually(lambda: record_of("large")["pid"] == unit.pid) and gone(one.pid) and answered(one, 3) == {1} and one.status()["state"] == "running"
        unit.kill()
        unit.wait(120)
        assert one.status()["state"] == "died"
        unit = as_systemd_would()
        assert eventually(lambda: record_of("large")["pid"] == unit.pid) and eventually(lambda: answered(one, 3) == {1})
        two = deploy("large@2")
        assert two.url == one.url and unit.wait(180) == 0 and answered(one, 3) == {2}
        undeploy("large")
        assert as_systemd_would().wait(300) == systemd.NOTHING_TO_DO and not file.exists()
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
                process.wait(30)


def test_a_unit_of_another_project_of_the_same_name_stays(shelf, shop, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(systemd, "systemctl", lambda *words: False)
    deploy("large@1", to="shelf")
    write_json(folder_of("large") / "state.json", {**record_of("large"), "target": "local"})
    other = tmp_path / "a 100% other" / "shop"
    shutil.copytree(shop, other)
    with in_project(other):
        systemd.keep_running("large")
        systemd.keep_running("large")  # its own may be written again
    file = systemd.unit_file("large")
    theirs = file.read_text()
    with pytest.raises(Conflict, match="a 100% other.shop running; give this project another name"):
        systemd.keep_running("large")
    systemd.released("large")
    assert file.read_text() == theirs
    shutil.rmtree(other)
    systemd.keep_running("large")  # nobody is there any more
    assert f"WorkingDirectory={shop}" in file.read_text()
    systemd.released("large")
    assert not file.exists()
    write_json(folder_of("large") / "state.json", {**record_of("large"), "target": "shelf"})


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="checked where systemd is installed")
def test_systemd_accepts_the_unit(shop, tmp_path, monkeypatch):  # noqa: F811
    odd = tmp_path / "a shop 100% $new"
    shutil.copytree(shop, odd)
    monkeypatch.delenv("MLOPS_PROJECT", raising=False)
    with in_project(odd):
        text = systemd.unit_text("large")
    file = tmp_path / "mlops-shop-large.service"
    file.write_text(text)
    said = subprocess.run(["systemd-analyze", "--user", "verify", str(file)], capture_output=True, text=True, timeout=60, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)})
    assert said.returncode == 0 and "mlops-shop-large" not in said.stderr, said.stderr


def test_a_unit_is_only_for_what_runs_here(shelf):
    deploy("large@1", to="shelf")
    with pytest.raises(Invalid, match="restarts it by itself"):
        systemd.keep_running("large")
    assert read_json(folder_of("large") / "state.json")["target"] == "shelf" and swap.TARGET.name == "local"
