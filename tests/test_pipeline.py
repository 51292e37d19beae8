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
from mlops_nb.pipeline import runs as runs_module
from mlops_nb.pipeline.graph import Pipeline, diagram, references, resolved
from mlops_nb.pipeline.notebook import arguments, execute, page, signature
from mlops_nb.pipeline.runs import recent, run, runs

NOTEBOOKS = Path(__file__).parent / "notebooks"


@pytest.fixture
def shop(tmp_path, monkeypatch):
    "A project with copies of the notebooks, its name chosen to be awkward."
    folder = tmp_path / "the shop {é}"
    shutil.copytree(NOTEBOOKS, folder)
    init(folder, name="shop")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLOPS_PROGRESS", "0")
    return folder


def pipeline(folder, text):
    (folder / "pipeline.toml").write_text(text, encoding="utf-8")
    return folder / "pipeline.toml"


def notebook(path, *cells):
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(made, path)
    return path


def in_background(code, **environment):
    "A runner in a process of its own."
    return subprocess.Popen([sys.executable, "-c", f"from mlops_nb.pipeline.runs import run, runs\n{code}"], stderr=subprocess.PIPE, text=True,
                            env={**os.environ, **environment})


def wait_for(condition, timeout_s=90):
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


# --- signatures and values, no kernel -------------------------------------------------------------------------------------------------


def test_a_signature_is_read_and_never_executed(tmp_path):
    path = notebook(tmp_path / "a.ipynb", """%matplotlib inline
from typing import Literal
open("executed", "w")
# how strong
# the penalty is
C: float = 1.0
names: list[str] = ["a"]  # which ones
kind: Literal["x", "y"] = "x"
start = make_date()  # when
a = b = 3
limit: "int | None" = None""")
    found = {one.name: (one.annotation, one.default, one.help) for one in signature(path)}
    assert found == {"C": ("float", "1.0", "the penalty is"), "names": ("list[str]", "['a']", "which ones"), "kind": ("Literal['x', 'y']", "'x'", ""),
                     "start": ("", "make_date()", "when"), "limit": ("'int | None'", "None", "")}
    assert not Path("executed").exists()


@pytest.mark.parametrize(("declared", "text", "value"), [
    ("v = 1.5", "0.5", 0.5), ("v = 1.5", "1e-7", 1e-7), ("v = 1.5", "3", 3.0), ("v = 1", "10", 10), ("v = True", "false", False), ("v = True", "0", False),
    ("v = ''", "10", "10"), ("v = ''", "'quoted'", "'quoted'"), ("v = ''", "None", "None"), ("v = ''", "", ""), ("v: str | None = None", "None", None),
    ("v: str | None = None", "x", "x"), ("v: list[int] = []", "1,2", [1, 2]), ("v: list[str] = []", "1,2", ["1", "2"]), ("v: list[str] = []", "a", ["a"]),
    ("v: dict[str, float] = {}", '{"a": 1}', {"a": 1.0}), ("v = {}", '{"a": [true, null]}', {"a": [True, None]}), ("v = None", "5", 5), ("v = None", "x y", "x y"),
    ("v: Literal['a', 'b'] = 'a'", "b", "b"), ("v: pd.Timestamp = None", "2011-12-01", "2011-12-01"), ("v: Optional[int] = 3", "none", Invalid),
    ("v = 1", "0.5", Invalid), ("v = 1", "a week", Invalid), ("v = 1.5", "", Invalid), ("v = True", "maybe", Invalid), ("v: Literal['a', 'b'] = 'a'", "c", Invalid),
    ("v: list[int] = []", "a,b", Invalid), ("v = {}", "[1]", Invalid), ("v = {}", "{1: 2}", Invalid), ("v = None", "b'bytes'", "b'bytes'"),
])
def test_text_becomes_the_type_of_the_parameter_or_is_refused(tmp_path, declared, text, value):
    takes = signature(notebook(tmp_path / "a.ipynb", declared))
    if value is Invalid:
        with pytest.raises(Invalid, match=r"a\.ipynb: v = .* does not fit; expected .* Its signature: a\.ipynb\(v"):
            arguments(takes, {"v": text}, notebook="a.ipynb")
    else:
        found = arguments(takes, {"v": text})["v"]
        assert found == value and type(found) is type(value)


def test_an_unknown_parameter_is_refused_with_the_signature():
    with pytest.raises(Invalid, match=r"add\.ipynb has no parameter 'c'; .* add\.ipynb\(a: int = 1, b: float = 2\.0\)"):
        arguments(signature(NOTEBOOKS / "add.ipynb"), {"c": "1"}, notebook="add.ipynb")


@pytest.mark.parametrize(("content", "error", "says"), [
    ("{", Invalid, "damaged"), ('{"worksheets": []}', Invalid, "format 4"), ("[]", Invalid, "format 4"),
    ('{"cells": [], "metadata": {"kernelspec": {"language": "R"}}}', Unavailable, "written in R"),
    ('{"cells": [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "C = = 1"}]}', Invalid, "cannot be read"),
])
def test_a_file_that_is_no_usable_notebook_is_named(tmp_path, content, error, says):
    (tmp_path / "bad.ipynb").write_text(content)
    with pytest.raises(error, match=says):
        signature(tmp_path / "bad.ipynb")


def test_a_missing_notebook_says_which_there_are():
    with pytest.raises(NotFound, match="did you mean add.ipynb"):
        signature(NOTEBOOKS / "ad.ipynb")


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


def test_steps_come_after_those_they_refer_to_and_otherwise_as_written(shop):
    assert [step.name for step in Pipeline.read(pipeline(shop, GOOD)).steps] == ["first", "second"]
    text = "".join(f'[[step]]\nname = "{name}"\nnotebook = "add.ipynb"\nneeds = {needs}\n' for name, needs in (("a", []), ("b", ["a"]), ("c", []), ("d", ["b", "c"])))
    assert [step.name for step in Pipeline.read(pipeline(shop, text)).steps] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(("right", "wrong", "error", "says"), [
    ("", "", NotFound, "expected a pipeline.toml"), ("start = 3", "start =", Invalid, "cannot be read"), ("[pipeline]", "[pipelines]", Invalid, "did you mean pipeline"),
    ("name = \"first\"", "name = \"second\"", Invalid, "two steps 'second'"), ("name = \"first\"", "nam = \"first\"", Invalid, "no key 'nam'; did you mean name"),
    ("name = \"first\"", "name = \"fi/rst\"", Invalid, "cannot name a step"), ("name = \"first\"", "name = \"first\"\nretries = 2", Unavailable, "retries is not available yet"),
    ("name = \"first\"", "name = \"first\"\nneeds = [\"zero\"]", Invalid, "waits for 'zero'"), ("name = \"first\"", "name = \"first\"\nneeds = \"zero\"", Invalid, "expected a list"),
    ("name = \"first\"", "name = \"first\"\nneeds = [\"second\"]", Invalid, "in a circle"), ("name = \"first\"", "name = \"first\"\nneeds = [\"first\"]", Invalid, "in a circle"),
    ("name = \"first\"", "name = \"first\"\ntimeout_s = -1", Invalid, "timeout_s = 0 or more"), ("notebook = \"add.ipynb\"", "", Invalid, "lacks 'notebook'"),
    ("add.ipynb", "sum.ipynb", NotFound, "no notebook"), ("{start}", "{stat}", Invalid, "did you mean start"), ("{start}", "{start", Invalid, "brace"),
    ("{start}", "{start:>3}", Invalid, "plain reference"), ("{start}", "7", Invalid, r"\[params\] start is used by no step"), ("start = 3", "start = 'x'", Invalid, "expected int"),
    ("a = ", "c = ", Invalid, "has no parameter 'c'"), ("{first.total}", "many", Invalid, "step second: gate.ipynb: share = 'many' does not fit"),
])
def test_every_mistake_in_a_pipeline_is_found_before_anything_runs(shop, right, wrong, error, says):
    file = pipeline(shop, GOOD.replace(right, wrong, 1))
    with pytest.raises(error, match=says):
        run(str(file) if right else "nothing.toml")
    assert recent() == []


def test_references_keep_the_type_and_doubled_braces_are_plain():
    values = {"a.x": [1, 2], "n": 3}
    assert resolved({"whole": "{a.x}", "part": ["n={n}"], "plain": "{{n}}", "empty": "", "number": 1.5}, values) == {
        "whole": [1, 2], "part": ["n=3"], "plain": "{n}", "empty": "", "number": 1.5}
    assert list(references({"one": "{a.x} and {n}", "two": ["{{no}}"]})) == ["a.x", "n"]


def test_a_drawing_has_every_step_once_and_escapes_names(shop):
    drawn = diagram(Pipeline.read(pipeline(shop, GOOD.replace('"two"', '"<two>"'))), {"first": "passed", "second": "failed"})
    assert drawn.count("<rect") == 2 and drawn.count("<path") == 1 and "✓ first" in drawn and "✗ second" in drawn and "<two>" not in drawn


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
    assert sorted(path.name for path in (done.folder / "echo").iterdir()) == ["echo.ipynb", "echo.ipynb.html", "outputs.json"]
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
    with pytest.raises(Conflict, match=rf"another run \({started['id']} of slow, since {re.escape(started['started_at'])}\) is under way in"):
        run("add.ipynb")
    runner.kill()
    runner.communicate()
    assert [row["status"] for row in runs().facts["runs"]] == ["died"] and recent()[0]["id"] == started["id"]
    left = nbformat.read(shop / ".mlops" / "runs" / started["id"] / "slow" / "slow.ipynb", as_version=4)
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
    said = runner.communicate(timeout=60)[1]
    assert re.fullmatch(r"\[1/2\] slow … interrupted  [\d.]+ s  pid [\d,]+\ninterrupted\n", said)
    assert recent()[0]["status"] == "interrupted" and [row["verdict"] for row in recent_steps(shop)] == ["interrupted", "skipped"]
    wait_for(lambda: not psutil.pid_exists(kernel))


def test_a_run_inside_a_run_is_refused(shop):
    notebook(shop / "nested.ipynb", "x = 1", "from mlops_nb.pipeline.runs import run", "run('add.ipynb')")
    with pytest.raises(RunFailed, match=r"another run \(.* of nested, since"):
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


def test_history_reads_only_what_it_shows(shop, monkeypatch):
    folder = shop / ".mlops" / "runs"
    for i in range(10_000):
        (folder / f"20260101-{i // 3600:02}{i // 60 % 60:02}{i % 60:02}-{i:04x}").mkdir(parents=True)
    facts = {"pipeline": "p", "status": "passed", "started_at": "2026-01-01T00:00:00+00:00", "seconds": 1.0, "steps": [], "problem": ""}
    newest = sorted(path.name for path in folder.iterdir())[-25:]
    for name in newest:
        (folder / name / "run.json").write_text(json.dumps({"id": name, **facts}))
    (folder / newest[-1] / "run.json").write_text("{ half a rec")
    (folder / "not-a-run").mkdir()
    read = []
    monkeypatch.setattr(runs_module, "read_json", lambda path: read.append(path) or read_json(path))
    rows = runs(limit=20).facts["runs"]
    assert [row["id"] for row in rows] == newest[:-21:-1] and len(read) == 20
    assert rows[0]["status"] == "damaged" and rows[1]["status"] == "passed"
    assert runs(limit=0).facts["runs"] == []


def test_listing_runs_loads_no_heavy_library(shop):
    code = "import sys; from mlops_nb.pipeline.runs import recent, runs; recent(); print([n for n in " \
           "('papermill', 'nbclient', 'nbconvert', 'nbformat', 'jupyter_client', 'pandas', 'numpy', 'IPython', 'matplotlib', 'mlflow') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ast.literal_eval(done.stdout) == [], done.stderr


def test_execute_alone_needs_no_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "step"
    folder.mkdir()
    done = execute(NOTEBOOKS / "add.ipynb", folder / "add.ipynb", parameters={"b": 0.5}, environment={"MLOPS_STEP_FOLDER": str(folder)})
    assert read_json(done.parent / "outputs.json") == {"total": 1.5}
