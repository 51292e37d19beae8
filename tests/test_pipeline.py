"""Pipelines: what a run does with good notebooks, bad ones, and a process that is killed in the middle."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from mlops_nb.core.errors import Conflict, GateFailed, Invalid, NotFound, RunFailed, Unavailable
from mlops_nb.core.files import read_json
from mlops_nb.core.settings import init
from mlops_nb.pipeline.history import recent, runs
from mlops_nb.pipeline.notebook import execute
from mlops_nb.pipeline.pages import page
from mlops_nb.pipeline.runs import run

NOTEBOOKS = Path(__file__).parent / "notebooks"


@pytest.fixture
def shop(tmp_path, monkeypatch):
    "A project with copies of the notebooks, its name chosen to be awkward."
    folder = tmp_path / "the shop {é}"
    shutil.copytree(NOTEBOOKS, folder)
    init(folder, name="shop")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLOPS_PROGRESS", "0")
    monkeypatch.setenv("MLOPS_TRACKING_RUNS", "no")
    return folder


def pipeline(folder, text):
    (folder / "pipeline.toml").write_text(text, encoding="utf-8")
    return folder / "pipeline.toml"


def notebook(path, *cells):
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(made, path)
    return path


INTERRUPTIBLE = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background job ignores it, and so would all that it starts


def in_background(code, **environment):
    "A runner in a process of its own."
    return subprocess.Popen([sys.executable, "-c", f"{INTERRUPTIBLE}\nfrom mlops_nb.pipeline.runs import run\n{code}"], stderr=subprocess.PIPE, text=True,
                            env={**os.environ, **environment})


def wait_for(condition, timeout_s=300):
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def outputs_of_slow(folder):
    "What the slow notebook handed on before it began to wait."
    found = list(folder.glob(".mlops/runs/*/slow/outputs.json"))
    return read_json(found[0]) if found else None


# --- the graph ------------------------------------------------------------------------------------------------------------------------

GOOD = """
[pipeline]
name = "two"
[params]
start = 3
[[step]]
name = "second"
notebook = "gate.ipynb"
params = { share = "{first.total}" }
[[step]]
name = "first"
notebook = "add.ipynb"
params = { a = "{start}" }
"""


def test_a_dry_run_fills_what_is_known_and_runs_nothing(shop):
    planned = run(pipeline(shop, GOOD), params={"start": "5"}, dry_run=True)
    assert planned.status == "planned" and [row["parameters"] for row in planned.steps] == [{"a": 5}, {"share": "{first.total}"}]
    assert recent() == [] and "would run" in str(planned)


# --- running --------------------------------------------------------------------------------------------------------------------------

AWKWARD = "it's \"quoted\" \\ and \\n\nsecond line\t{braces} '''triple''' \u00e9\u4e2d\U0001f600 \x00\x1b"
VALUES = {"quote\"'\\": [1, -2.5, 1e-300, True, None, {"deep": ["\n"]}], "big": 10**30, "inf": float("inf")}


def test_parameters_arrive_as_they_were_given_in_a_kernel_of_this_python(shop):
    before, environment = (shop / "echo.ipynb").read_bytes(), dict(os.environ)
    done = run(shop / "echo.ipynb", params={"text": AWKWARD, "values": VALUES})
    got = done.outputs["echo"]
    assert got["text"] == AWKWARD
    assert eval(got["values_repr"], {"inf": float("inf")}) == VALUES
    assert (got["executable"], got["folder"], got["step"], got["progress"]) == (sys.executable, str(shop), "echo", "0")
    assert (shop / "echo.ipynb").read_bytes() == before and dict(os.environ) == environment
    copy = nbformat.read(done.folder / "echo" / "echo.ipynb", as_version=4)
    assert "injected-parameters" in copy.cells[2].metadata["tags"]
    assert sorted(path.name for path in (done.folder / "echo").iterdir()) == ["echo.ipynb", "echo.ipynb.html", "events.jsonl", "outputs.json", "result.json"]
    assert done.steps[0]["report"] == f".mlops/runs/{done.id}/echo/echo.ipynb.html" and (shop / done.steps[0]["report"]).exists()


def test_what_one_step_hands_on_reaches_the_next_and_the_table_says_so(shop, capfd, monkeypatch):
    monkeypatch.setenv("MLOPS_PROGRESS", "1")
    done = run(pipeline(shop, GOOD))
    assert done.passed and done.outputs == {"first": {"total": 5.0}, "second": {"share": 5.0}}
    assert done.steps[1]["report"].endswith("/second/gate.html"), "a step's own report comes before its notebook"
    assert [row["key_figures"] for row in done.facts["steps"]] == ["total 5", "share 5"]
    said = capfd.readouterr().err
    assert re.fullmatch(r"\[1/2\] first … [\d.]+ s  total 5\n\[2/2\] second … [\d.]+ s  share 5\n", said), "nothing but our two lines"
    assert read_json(done.folder / "run.json")["status"] == "passed"
    assert runs().facts["runs"][0]["steps"] == "2 of 2" and recent(1)[0]["id"] == done.id
    alone = run(shop / "pipeline.toml", only=["second"])
    assert alone.outputs == {"second": {"share": 5.0}}, "the first step's result comes from the run before"


def test_a_failed_notebook_is_saved_and_named_and_later_steps_are_skipped(shop):
    text = '[[step]]\nname = "{0}"\nnotebook = "{0}.ipynb"\nneeds = {1}\n'
    file = pipeline(shop, text.format("add", "[]") + text.format("fail", '["add"]') + text.format("gate", '["fail"]'))
    with pytest.raises(RunFailed) as caught:
        run(file)
    error = caught.value
    assert re.match(r"step fail failed in cell 5 \(In \[4\]\), at `return whole / divisor`: ZeroDivisionError: division by zero; the notebook .* is .*fail\.ipynb\.$", str(error))
    copy = nbformat.read(error.notebook, as_version=4)
    assert any("41" in str(cell.get("outputs")) for cell in copy.cells) and "ZeroDivisionError" in Path(f"{error.notebook}.html").read_text()
    assert [row["verdict"] for row in error.run.steps] == ["passed", "failed", "skipped"]
    saved = read_json(error.run.folder / "run.json")
    assert saved["status"] == "failed" and "cell 5" in saved["problem"] and recent()[0]["status"] == "failed"


def test_a_failed_gate_stays_a_failed_gate(shop):
    with pytest.raises(GateFailed, match=r"^Shares failed: share 0\.1 \(expected >= 0\.2\); the report is .*gate\.html\.$") as caught:
        run(shop / "gate.ipynb", params={"share": "0.1"})
    assert caught.value.exit_code == 1 and caught.value.report.facts["steps"][0]["verdict"] == "failed"
    assert (shop / caught.value.run.steps[0]["report"]).name == "gate.html"


def test_a_step_that_forgot_to_hand_on_a_result_is_named(shop):
    with pytest.raises(RunFailed, match=r"step second takes \{first\.totl\}, but first handed on no 'totl'; did you mean total\?"):
        run(pipeline(shop, GOOD.replace("first.total", "first.totl")))
    assert [row["verdict"] for row in recent_steps(shop)] == ["passed", "failed"]


def recent_steps(folder):
    return read_json(folder / ".mlops" / "runs" / recent(1)[0]["id"] / "run.json")["steps"]


def test_one_step_alone_without_an_earlier_run_says_what_is_missing(shop):
    with pytest.raises(Invalid, match=r"\{first\.total\} is needed, but no earlier run"):
        run(pipeline(shop, GOOD), only=["second"])
    with pytest.raises(NotFound, match="did you mean second"):
        run(shop / "pipeline.toml", only=["secnd"])


def test_a_time_limit_stops_the_step_and_keeps_what_was_done(shop):
    with pytest.raises(RunFailed, match=r"step slow took longer than its limit of 3 s"):
        run(pipeline(shop, '[[step]]\nname = "slow"\nnotebook = "slow.ipynb"\ntimeout_s = 3\n'))
    folder = shop / ".mlops" / "runs" / recent(1)[0]["id"] / "slow"
    assert "TimeLimit" in (folder / "slow.ipynb").read_text() and "TimeLimit" in (folder / "slow.ipynb.html").read_text()
    if (folder / "outputs.json").exists():
        wait_for(lambda: not psutil.pid_exists(read_json(folder / "outputs.json")["pid"]))


def test_a_kernel_that_dies_is_said_to_have_died(shop):
    with pytest.raises(RunFailed, match="step crash lost its kernel"):
        run(shop / "crash.ipynb")
    copy = nbformat.read(next(shop.glob(".mlops/runs/*/crash/crash.ipynb")), as_version=4)
    assert copy.cells[-1].outputs[-1].ename == "DeadKernelError"


def test_a_second_run_is_refused_and_a_killed_one_is_known_to_be_dead(shop):
    runner = in_background("run('slow.ipynb')")
    kernel = wait_for(lambda: outputs_of_slow(shop))["pid"]
    started = recent()[0]
    assert started["status"] == "running"
    copy = shop / ".mlops" / "runs" / started["id"] / "slow" / "slow.ipynb"
    wait_for(lambda: "'seen before the wait'\"" in copy.read_text())  # within a moment of the cell
    with pytest.raises(Conflict, match=rf"another run \({started['id']}, since {re.escape(started['started_at'])}\) of slow is under way in"):
        run("slow.ipynb")
    runner.kill()
    runner.communicate(timeout=120)
    assert [row["status"] for row in runs().facts["runs"]] == ["died"] and recent()[0]["id"] == started["id"]
    left = nbformat.read(copy, as_version=4)
    assert "seen before the wait" in str(left.cells[3].outputs), "the copy is readable and holds what was done"
    assert run("add.ipynb").passed
    assert [row["status"] for row in recent()] == ["passed", "died"]
    wait_for(lambda: not psutil.pid_exists(kernel))


def test_control_c_stops_cleanly_and_is_recorded(shop):
    text = '[[step]]\nname = "{0}"\nnotebook = "{0}.ipynb"\nneeds = {1}\n'
    pipeline(shop, text.format("slow", "[]") + text.format("add", '["slow"]'))
    runner = in_background("try:\n    run()\nexcept KeyboardInterrupt as error:\n    raise SystemExit(error.run.status)", MLOPS_PROGRESS="1")
    kernel = wait_for(lambda: outputs_of_slow(shop))["pid"]
    runner.send_signal(signal.SIGINT)
    said = runner.communicate(timeout=300)[1]
    assert re.fullmatch(r"\[1/2\] slow … interrupted  [\d.]+ s  pid [\d,]+\ninterrupted\n", said)
    assert recent()[0]["status"] == "interrupted" and [row["verdict"] for row in recent_steps(shop)] == ["interrupted", "skipped"]
    wait_for(lambda: not psutil.pid_exists(kernel))


def test_a_run_inside_a_run_is_refused(shop):
    notebook(shop / "nested.ipynb", "x = 1", "from mlops_nb.pipeline.runs import run", "run('nested.ipynb')")
    with pytest.raises(RunFailed, match=r"another run \(.*\) of nested is under way"):
        run("nested.ipynb")


def test_a_state_folder_that_cannot_be_written_is_one_sentence(shop):
    (shop / ".mlops" / "runs").write_text("a file stands where the runs should be")
    with pytest.raises(Unavailable, match="cannot write"):
        run("add.ipynb")


@pytest.mark.parametrize(("what", "error", "says"), [
    ("nowhere", NotFound, "expected a pipeline.toml"), ("settings.ini", Invalid, "cannot be run"), (".", NotFound, r"pipeline\.toml"), (3.5, Invalid, "a float cannot be run"),
])
def test_what_cannot_be_run_says_what_can(shop, what, error, says):
    with pytest.raises(error, match=says):
        run(what)


# --- the page and the history ---------------------------------------------------------------------------------------------------------


def test_the_page_of_a_notebook_asks_the_network_for_nothing(tmp_path):
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "a", "version_major": 2, "version_minor": 0}, "text/html": "<b>static</b>", "text/plain": "text"}
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("A formula $x^2$\n\n```mermaid\ngraph LR; a-->b\n```"),
                                           nbformat.v4.new_code_cell("widget", outputs=[nbformat.v4.new_output("display_data", data=view)])])
    made.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}, "version_major": 2, "version_minor": 0}}
    nbformat.write(made, tmp_path / "page.ipynb")
    text = page(tmp_path / "page.ipynb").read_text()
    assert "<b>static</b>" in text and "widget-view" not in text
    assert not re.findall(r"<script", text), "no script is left to load anything"
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//|@import|url\([\"']?(?:https?:)?//|import\(", text)


def test_listing_runs_loads_no_heavy_library(shop):
    code = "import sys; from mlops_nb.pipeline.runs import run; from mlops_nb.pipeline.history import recent, runs; recent(); runs(); print([n for n in " \
           "('papermill', 'nbclient', 'nbconvert', 'nbformat', 'jupyter_client', 'pandas', 'numpy', 'IPython', 'matplotlib', 'mlflow') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ast.literal_eval(done.stdout) == [], done.stderr


def test_execute_alone_needs_no_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "step"
    folder.mkdir()
    done = execute(NOTEBOOKS / "add.ipynb", folder / "add.ipynb", parameters={"b": 0.5}, environment={"MLOPS_STEP_FOLDER": str(folder)})
    assert read_json(done.parent / "outputs.json") == {"total": 1.5}
