"""What would break for somebody who asks later what ran: a record that lies, a run that is "running" for ever, a list that takes a minute."""

import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import psutil
import pytest
from patience import until

from mlops_nb.core.errors import Conflict, Invalid, NotFound
from mlops_nb.core.files import timestamp
from mlops_nb.core.settings import project
from mlops_nb.pipeline import history
from mlops_nb.pipeline.history import (ID, RUN, STEP, alone, as_it_is, code_state, folder_of, ids, indexed, is_alive, new_record, process, reap, recent, record, records,
                                       runs, save, sending, summaries, unsent)
from projects import shop as project_folder  # noqa: F401

NOW = datetime(2026, 1, 5, 6, tzinfo=UTC)
ENV = {key: value for key, value in os.environ.items() if not key.startswith("MLOPS_")}


@pytest.fixture
def shop(project_folder, monkeypatch):  # noqa: F811
    monkeypatch.chdir(project_folder)
    return project_folder


def a_run(at=0, **facts):
    "A saved run of two steps, so many minutes after a fixed time."
    began = NOW + timedelta(minutes=at)
    steps = [STEP | {"step": name, "verdict": "passed", "outputs": {"rows": at}, "seconds": 1.0} for name in ("prepare", "train")]
    record = RUN | {"id": f"{began:%Y%m%d-%H%M%S}-{at % 65536:04x}", "pipeline": "weekly", "source": "pipeline.toml", "status": "passed", "started_at": timestamp(began),
                    "seconds": 90.0, **process(), "steps": steps}
    return save(record | facts)


def ended():
    "What `process` would have said of a process that is no more."
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        child.wait(120)
    return process() | {"pid": child.pid}


def git(folder, *arguments):
    subprocess.run(["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments], check=True, capture_output=True, timeout=300)


# --- which code ----------------------------------------------------------------------------------------------------------------------


def test_a_clean_a_changed_and_an_unknown_notebook(tmp_path):
    git(tmp_path, "init", "-q", "-b", "main")
    (tmp_path / "train.ipynb").write_text("one\n")
    git(tmp_path, "add", "."), git(tmp_path, "commit", "-qm", "first")
    clean = code_state(tmp_path, ["train.ipynb", tmp_path / "train.ipynb"])
    assert re.fullmatch("[0-9a-f]{40}", clean["commit"]) and clean["branch"] == "main" and not clean["dirty"] and clean["diff"] == ""
    (tmp_path / "other.ipynb").write_text("new\n")
    assert not code_state(tmp_path, [tmp_path / "train.ipynb"])["dirty"], "a file that the pipeline does not use"
    assert code_state(tmp_path, [tmp_path / "train.ipynb", tmp_path / "other.ipynb"])["dirty"]
    (tmp_path / "train.ipynb").write_text("two\n")
    changed = code_state(tmp_path)
    assert changed["dirty"] and "-one\n+two" in changed["diff"] and changed["commit"] == clean["commit"]


def test_a_diff_is_kept_within_bounds(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "data.csv").write_text("")
    git(tmp_path, "add", "."), git(tmp_path, "commit", "-qm", "first")
    (tmp_path / "data.csv").write_text("0123456789é\n" * 300_000)
    found = code_state(tmp_path)
    assert found["dirty"] and 900_000 < len(found["diff"]) < 1_000_100 and found["diff"].endswith("cut here\n")


def test_without_git_a_repository_or_a_commit_all_is_empty(tmp_path, monkeypatch):
    empty = {"commit": "", "branch": "", "dirty": False, "diff": ""}
    assert code_state(tmp_path) == empty and code_state(tmp_path / "missing") == empty
    git(tmp_path, "init", "-q")
    assert code_state(tmp_path) == empty
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    assert code_state(tmp_path)["commit"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_state(tmp_path) == empty


def test_a_git_that_hangs_or_a_hook_that_calls_us_do_not_matter(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as it is set inside a hook
    assert code_state(tmp_path)["commit"]
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert history.git(tmp_path, "status", timeout_s=0.2) is None


# --- who is at work ------------------------------------------------------------------------------------------------------------------


def test_liveness_survives_a_reused_number_a_restart_and_a_corrected_clock(monkeypatch):
    me = process()
    assert is_alive(me) and not is_alive(ended())
    assert not is_alive(me | {"process_started": me["process_started"] - 60}), "another process has the number now"
    assert is_alive(me | {"host": "another"}) and is_alive({}), "another machine's word is taken"
    if history.BOOT.exists():
        assert not is_alive(me | {"boot": "an earlier start of this machine"})
    real = psutil.boot_time()
    created = psutil.Process().create_time()  # psutil derives both from the clock: a jump moves them together
    monkeypatch.setattr(psutil, "boot_time", lambda: real + 3600)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: created + 3600)
    assert is_alive(me)


def test_a_zombie_does_not_work():
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    try:
        started = psutil.Process(child.pid).create_time() - psutil.boot_time()
        until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
        assert not is_alive(process() | {"pid": child.pid, "process_started": started})
    finally:
        child.wait(120)


# --- records -------------------------------------------------------------------------------------------------------------------------


def test_a_new_record_is_complete_and_knows_its_code(shop):
    (shop / "train.ipynb").write_text("{}")
    git(shop, "init", "-q"), git(shop, "commit", "-q", "--allow-empty", "-m", "first")
    one = new_record(project(), "weekly", "pipeline.toml", {"week": 4}, [{"step": "train", "notebook": "train.ipynb"}], trigger="schedule:weekly@2026", resumed_from="x")
    assert RUN.keys() <= one.keys() and STEP.keys() == one["steps"][0].keys() and ID.fullmatch(one["id"])
    assert one["dirty"] and re.fullmatch("[0-9a-f]{40}", one["commit"]) and one["trigger"] and one["resumed_from"] == "x" and "diff" not in one
    assert is_alive(one) and save(one) is one and record(one["id"]) == json.loads(json.dumps(one))


def test_ids_are_unique_and_sort_by_age(shop):
    made = [new_record(project(), "weekly", "pipeline.toml", {}, [])["id"] for _ in range(30)]
    assert len(set(made)) == 30 and made == sorted(made) and ids() == made[::-1]


def test_a_record_of_an_earlier_version_is_still_read(shop):
    old = {"id": "20251123-101500-abcd", "pipeline": "weekly", "source": "pipeline.toml", "status": "passed", "problem": "", "started_at": "2025-11-23T10:15:00Z",
           "seconds": 61.5, "params": {"week": 4}, "host": "there", "pid": 1, "process_started": 1763892900.0,
           "steps": [{"step": "train", "verdict": "passed", "seconds": 2.0, "outputs": {"rows": 3}, "report": "", "problem": ""}]}
    folder_of(old["id"]).mkdir(parents=True)
    (folder_of(old["id"]) / "run.json").write_text(json.dumps(old))
    found = record("last")
    assert found["ended_at"] == "2025-11-23T10:16:01Z" and found["trigger"] == "" and found["steps"][0] == STEP | old["steps"][0]
    assert runs().facts["runs"][0]["steps"] == "1 of 1" and runs(old["id"]).passed and unsent() == []
    alive = old | {"id": "20251123-101600-abcd", "status": "running", "host": platform.node(), "pid": os.getpid(), "process_started": psutil.Process().create_time()}
    folder_of(alive["id"]).mkdir()
    (folder_of(alive["id"]) / "run.json").write_text(json.dumps(alive))
    assert record(alive["id"])["status"] == "running"


def test_what_a_list_shows_of_each_kind_of_run(shop):
    a_run(0), a_run(1, status="failed", problem="train failed"), a_run(2, status="running"), a_run(3, pipeline="other", source="other.toml")
    assert [row["status"] for row in runs().facts["runs"]] == ["passed", "running", "failed", "passed"]
    assert [row["id"] for row in runs(pipeline="weekly", status="passed").facts["runs"]] == ["20260105-060000-0000"]
    assert [one["id"] for one in records(source="other.toml")] == ["20260105-060300-0003"]
    assert len(recent(2)) == 2 and list(recent(1)[0]) == ["id", "pipeline", "status", "started_at", "seconds"] and recent(0) == []
    with pytest.raises(Invalid, match="no run has the status 'faild'; expected one of running, passed"):
        runs(status="faild")
    assert "No run fits" in str(runs(pipeline="nothing"))


def test_a_run_is_found_by_pieces_of_its_id(shop):
    with pytest.raises(NotFound, match="there is no run 'last'; there are none yet"):
        record("last")
    a_run(0), a_run(1, status="failed"), a_run(2)
    assert record()["id"] == "20260105-060200-0002" and record("last-failed")["id"] == "20260105-060100-0001"
    assert record("20260105-0601")["id"] == record("0001")["id"] == "20260105-060100-0001"
    with pytest.raises(Invalid, match="'2026' fits 3 runs, such as 20260105-060200-0002, .* give more of the id"):
        record("2026")
    for wrong in ("20260105-060100-0009", "", "../..", "20260105-060100-0001/../x"):
        with pytest.raises(NotFound, match="there is no run"):
            record(wrong)


def test_a_run_has_a_page(shop):
    one = a_run(0, params={"week": 4}, commit="c" * 40, dirty=True, status="failed", problem="train failed in cell 5")
    one["steps"][0] |= {"why": "orders@4 replaced orders@3", "inputs": {"orders@4": "d" * 64}, "models": ["recommender@2"], "kernel": "warm", "cpu_s": 1.25, "peak_mb": 310.0,
                        "executed": ".mlops/runs/x/prepare/prepare.ipynb"}
    page = runs(save(one)["id"])
    assert not page.passed and page.facts["steps"][0]["why"] == "orders@4 replaced orders@3" and page.facts["parameters"] == {"week": 4}
    assert page.facts["inputs"] == [{"step": "prepare", "address": "orders@4", "digest": "d" * 64}] and page.facts["uncommitted_changes"]
    text = str(page)
    assert all(part in text for part in ("train failed in cell 5", "warm", "1.25", "310", "prepare.ipynb", "recommender@2", "cccccccccccc", ".mlops/runs/20260105-060000-0000"))
    under_way = a_run(1, status="running")
    under_way["steps"][1]["verdict"] = "running"
    under_way["steps"][1]["outputs"] = {}
    save(under_way)
    (folder_of(under_way["id"]) / "train").mkdir()
    (folder_of(under_way["id"]) / "train" / "events.jsonl").write_text('{"cell": 2, "of": 9, "at": "x"}\n{"cell": 3, "of": 9, "at": "x"}\n')
    assert runs("last").facts["steps"][1]["key_figures"] == "cell 3 of 9"


# --- runs that died ------------------------------------------------------------------------------------------------------------------


def test_a_run_whose_process_was_killed_is_written_down_as_died(shop):
    code = ("import os, signal; from mlops_nb.core.settings import project; from mlops_nb.pipeline.history import new_record, save\n"
            "one = new_record(project(), 'weekly', 'pipeline.toml', {}, [{'step': 'a', 'verdict': 'running'}, {'step': 'b'}])\nsave(one); os.kill(os.getpid(), signal.SIGKILL)")
    assert subprocess.run([sys.executable, "-c", code], cwd=shop, env=ENV, timeout=300).returncode == -9
    file = folder_of(ids()[0]) / "run.json"
    assert json.loads(file.read_text())["status"] == "running"
    dead = reap()
    assert [one["status"] for one in dead] == ["died"] and [row["verdict"] for row in dead[0]["steps"]] == ["interrupted", "skipped"]
    assert json.loads(file.read_text())["status"] == "died" and dead[0]["ended_at"] >= dead[0]["started_at"] and "was killed" in dead[0]["problem"]
    assert reap() == [] and indexed().keys() == set(ids())


def test_whoever_looks_first_writes_it_down(shop):
    one = a_run(0, status="running", **ended())
    assert recent(1)[0]["status"] == "died" and json.loads((folder_of(one["id"]) / "run.json").read_text())["status"] == "died"


def test_a_run_that_ended_between_two_looks_has_not_died(shop, monkeypatch):
    one = a_run(0, status="running")

    def gone(record):
        save(record | {"status": "passed"})
        return False

    monkeypatch.setattr(history, "is_alive", gone)
    assert as_it_is(folder_of(one["id"]))["status"] == "passed" and record()["status"] == "passed"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser writes anywhere")
def test_a_read_only_project_is_listed_all_the_same(shop):
    a_run(0), a_run(1, status="running", **ended())
    for folder in (shop / ".mlops/runs", folder_of(ids()[0])):
        folder.chmod(0o555)
    try:
        assert [row["status"] for row in recent()] == ["died", "passed"]
    finally:
        for folder in (shop / ".mlops/runs", folder_of(ids()[0])):
            folder.chmod(0o755)


def test_a_write_that_fails_leaves_the_list_true(shop, monkeypatch):
    one = a_run(0, status="running", **ended())

    def full(*arguments, **options):
        raise history.MlopsError("the disk is full")

    monkeypatch.setattr(history, "write_atomic", full)
    assert recent(1)[0]["status"] == "died" and json.loads((folder_of(one["id"]) / "run.json").read_text())["status"] == "running"


# --- the index -----------------------------------------------------------------------------------------------------------------------


def index(shop):
    return shop / ".mlops" / "runs" / "index.jsonl"


def test_the_index_can_be_lost_torn_or_stale(shop):
    made = [a_run(at) for at in range(6)]
    whole = summaries()
    lines = index(shop).read_bytes()
    for damage in (b"", lines[: len(lines) // 2], lines + b'\n{"id": "2026', b"\0\0\n[1]\n3\n{}\n\xff\n" + lines, lines * 2, b"\n".join(reversed(lines.split(b"\n")))):
        index(shop).write_bytes(damage)
        assert summaries() == whole and indexed().keys() == {one["id"] for one in made}, damage[:40]
        assert summaries() == whole
    index(shop).unlink()
    assert [row["id"] for row in summaries(2)] == [made[5]["id"], made[4]["id"]] and len(indexed()) == 2, "only what was asked for is read"
    assert summaries() == whole


def test_a_line_after_a_torn_one_is_whole(shop):
    a_run(0)
    with index(shop).open("ab") as file:
        file.write(b'\n{"id": "20260105-06')
    a_run(1)
    assert len(indexed()) == 2


def test_runs_deleted_by_hand_are_gone_and_damaged_ones_are_named(shop):
    import shutil

    gone, torn, empty = a_run(0), a_run(1), a_run(2)
    shutil.rmtree(folder_of(gone["id"]))
    index(shop).unlink()
    (folder_of(torn["id"]) / "run.json").write_text('{"id": "2026')
    (folder_of(empty["id"]) / "run.json").unlink()
    (shop / ".mlops/runs/20260105-060900-0009").write_text("a file of somebody else")
    (shop / ".mlops/runs/notes").mkdir()
    assert [(row["id"], row["status"]) for row in runs().facts["runs"]] == [(torn["id"], "damaged")] and "is damaged" in runs().facts["runs"][0]["problem"]
    assert indexed() == {}


def test_the_last_word_on_a_run_counts(shop):
    one = a_run(0, status="died")
    save(one | {"status": "passed"})
    assert recent(1)[0]["status"] == "passed" and len(index(shop).read_bytes().split(b"\n")) == 3


def test_two_writers_do_not_tear_each_others_lines(shop):
    code = "import sys; from test_history import a_run\nfor at in range(int(sys.argv[1]), 120, 3): a_run(at, problem='é' * 250)"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(first)], env=ENV | {"PYTHONPATH": os.path.dirname(__file__)}) for first in range(3)]
    assert [one.wait(600) for one in writers] == [0, 0, 0]
    assert len(indexed()) == 120 and len(index(shop).read_bytes().split(b"\n")) == 121 and len(summaries()) == 120


def test_ten_thousand_runs_are_read_from_the_index_alone(shop, monkeypatch):
    one = a_run(0)
    rows = []
    for at in range(1, 10_000):
        began = NOW + timedelta(minutes=at)
        rows.append(history.summary(one | {"id": f"{began:%Y%m%d-%H%M%S}-{at:04x}", "status": "failed" if at % 100 == 0 else "passed"}))
        folder_of(rows[-1]["id"]).mkdir()
    history.add_to_index(rows)
    under_way = a_run(10_000, status="running")
    opened = []
    monkeypatch.setattr(history, "read", lambda folder, read=history.read: opened.append(folder.name) or read(folder))
    assert len(runs(limit=10_000).facts["runs"]) == 10_000 and opened == [under_way["id"]]
    assert len(summaries(status="failed")) == 99 and [row["id"] for row in recent(2)] == [under_way["id"], rows[-1]["id"]]


# --- one at a time, and what is not sent ---------------------------------------------------------------------------------------------


def test_one_run_of_a_pipeline_at_a_time(shop):
    one = a_run(0, status="running")
    with alone(project(), "weekly"), alone(project(), "a/b ü"):
        with pytest.raises(Conflict, match=rf"another run \({one['id']}, since 2026-01-05T06:00:00Z\) of weekly is under way in .*; wait for it"), alone(project(), "weekly"):
            pass
    with pytest.raises(Conflict, match="the body's own"), alone(project(), "weekly"):
        raise Conflict("the body's own")
    with alone(project(), "weekly"):
        pass


def test_what_mlflow_does_not_know_is_said(shop):
    one = new_record(project(), "weekly", "pipeline.toml", {}, [])
    assert unsent() == [] and (shop / ".mlops/unsent" / one["id"]).exists(), "not even saved"
    save(one)
    assert unsent() == [] and "MLflow" not in str(runs()), "it is under way"
    save(one | {"status": "passed"})
    assert unsent() == [one["id"]] and "1 run is not in MLflow yet; `mlops runs --sync` sends it." in str(runs())
    (folder_of(one["id"]) / "mlflow.json").write_text(json.dumps({"problem": "no server answers"}))
    assert "The last attempt ended with: no server answers" in runs().facts["summary"] and runs("last").facts["mlflow"] == "no server answers"
    (folder_of(one["id"]) / "mlflow.json").write_text(json.dumps({"by": process()}))
    assert unsent() == [], "somebody is at it"
    (folder_of(one["id"]) / "mlflow.json").write_text("{")
    assert sending(one["id"])["steps"] == {} and unsent() == [one["id"]]
    import shutil

    shutil.rmtree(folder_of(one["id"]))
    assert unsent() == [] and not (shop / ".mlops/unsent" / one["id"]).exists()


def test_listing_runs_is_light(shop):
    a_run(0)
    code = "import sys; from mlops_nb.pipeline.history import runs; runs(); print([n for n in ('mlflow', 'papermill', 'pandas', 'numpy', 'matplotlib') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENV, cwd=shop, timeout=300).stdout.strip() == "[]"
