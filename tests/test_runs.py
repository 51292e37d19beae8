"""Runs: side by side, not again when nothing changed, again when something failed; and what the user sees when things go wrong."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import nbformat
import pytest
from patience import until

from mlops_nb.core.errors import GateFailed, Invalid, MlopsError, NotFound, RunFailed
from mlops_nb.core.settings import init
from mlops_nb.monitor.alerts import recent as alerts
from mlops_nb.pipeline.history import record
from mlops_nb.pipeline.resume import resume
from mlops_nb.pipeline.runs import run

OUTPUT = "from mlops_nb.core.step import output\n"


@pytest.fixture
def shop(tmp_path, monkeypatch):
    init(tmp_path / "shop", name="shop")
    monkeypatch.chdir(tmp_path / "shop")
    monkeypatch.setenv("MLOPS_PROGRESS", "0")
    monkeypatch.setenv("MLOPS_TRACKING_RUNS", "no")
    return tmp_path / "shop"


def write(name, *cells, tags=None):
    "A notebook whose first cell holds its parameters."
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell, id=f"cell-{i}", metadata={"tags": list((tags or {}).get(i, []))}) for i, cell in enumerate(cells)])
    made.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(made, Path(name))
    return Path(name)


def pipeline(text):
    Path("pipeline.toml").write_text(text, encoding="utf-8")


def step(name, **more):
    keys = {"notebook": f"{name}.ipynb", **more}
    return f'[[step]]\nname = "{name}"\n' + "".join(f"{key} = {value if isinstance(value, str) and value[:1] in '[{' else json.dumps(value)}\n" for key, value in keys.items())


def verdicts(one):
    return [row["verdict"] for row in one.steps]


# --- side by side ---------------------------------------------------------------------------------------------------------------------

MEET = """from pathlib import Path
import time
Path(f"{me}.here").touch()
until = time.monotonic() + 300
while not Path(f"{other}.here").exists():
    assert time.monotonic() < until, "the other step never began"
    time.sleep(0.05)"""


def test_steps_that_do_not_wait_for_each_other_run_at_the_same_time(shop):
    for me, other in (("left", "right"), ("right", "left")):
        write(f"{me}.ipynb", f"me: str = '{me}'\nother: str = '{other}'", MEET)
    write("last.ipynb", "", OUTPUT + "output(done=True)")
    pipeline(step("left") + step("right") + step("last", needs='["left", "right"]'))
    done = run(jobs=2)
    assert verdicts(done) == ["passed"] * 3 and done.outputs["last"] == {"done": True}
    assert done.steps[2]["started_at"] >= max(row["started_at"] for row in done.steps[:2])


def test_one_at_a_time_is_one_at_a_time_and_a_large_step_has_the_machine_to_itself(shop):
    busy = "from pathlib import Path\nimport time\nassert not Path('busy').exists()\nPath('busy').touch()\ntime.sleep(0.3)\nPath('busy').unlink()"
    for name in ("a", "b"):
        write(f"{name}.ipynb", "", busy)
    pipeline(step("a", cache=False) + step("b", cache=False))
    assert run(jobs=1).passed
    pipeline(step("a", resources="{ cpus = 64 }", cache=False) + step("b", cache=False))
    assert run(jobs=4).passed


UNTIL_ONE_FAILED = """import json, time
from pathlib import Path
def verdicts():
    return [step.get("verdict") for file in Path(".mlops/runs").glob("*/run.json") for step in json.loads(file.read_text())["steps"]]
until = time.monotonic() + 300
while "failed" not in verdicts():
    assert time.monotonic() < until, "the other step never failed"
    time.sleep(0.05)
"""


def test_when_a_step_fails_those_under_way_finish_and_the_rest_is_skipped(shop):
    write("slow.ipynb", "", UNTIL_ONE_FAILED + OUTPUT + "output(done=True)")
    write("bad.ipynb", "", "1 / 0")
    write("after.ipynb", "")
    pipeline(step("slow") + step("bad") + step("after", needs='["slow"]'))
    with pytest.raises(RunFailed, match="step bad failed in cell 2") as caught:
        run(jobs=2)
    assert verdicts(caught.value.run) == ["passed", "failed", "skipped"]
    again = pytest.raises(RunFailed, run, jobs=2)
    assert verdicts(again.value.run)[0] == "cached" and "the last run failed" in again.value.run.steps[1]["why"]


def test_a_sweep_runs_each_choice_and_hands_on_a_list(shop):
    write("train.ipynb", "C: float = 1.0\ndata: str = ''", OUTPUT + "output(score=C * 2)")
    write("pick.ipynb", "scores: list = []", OUTPUT + "output(best=max(scores))")
    pipeline(step("train", matrix="{ C = [0.5, 1.5] }") + step("pick", params='{ scores = "{train.score}" }'))
    done = run()
    assert done.outputs == {"train[C=0.5]": {"score": 1.0}, "train[C=1.5]": {"score": 3.0}, "pick": {"best": 3.0}}
    assert sorted(path.name for path in done.folder.iterdir() if path.is_dir()) == ["pick", "train-C=0.5", "train-C=1.5"]
    pipeline(step("train", matrix="{ C = [0.5, 2.5] }") + step("pick", params='{ scores = "{train.score}" }'))
    assert verdicts(run()) == ["cached", "passed", "passed"], "only what is new in the sweep runs"


# --- not again ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(shop):
    "Two steps; the second takes what the first hands on and reads a module of the project."
    write("prepare.ipynb", "weeks: int = 4", OUTPUT + "output(rows=weeks * 100)")
    Path("helpers.py").write_text("def half(x):\n    return x / 2\n")
    write("train.ipynb", "rows: int = 0", "import helpers\n" + OUTPUT + "output(score=helpers.half(rows))")
    pipeline("[params]\nweeks = 4\n" + step("prepare", params='{ weeks = "{weeks}" }') + step("train", params='{ rows = "{prepare.rows}" }'))
    return run()


def test_nothing_runs_when_nothing_changed_and_what_it_left_is_linked(two):
    again = run(jobs=1)
    assert verdicts(again) == ["cached", "cached"] and again.outputs == two.outputs
    assert [row["cached_from"] for row in again.steps] == [two.id, two.id] and [row["report"] for row in again.steps] == [row["report"] for row in two.steps]
    assert verdicts(run(force=True)) == ["passed", "passed"] and "--force" in record()["steps"][0]["why"]


@pytest.mark.parametrize(("change", "expected", "why"), [
    (lambda: write("prepare.ipynb", "weeks: int = 4  # how many", "\n" + OUTPUT + "# count them\noutput(rows = weeks*100)\n\n"), ["cached", "cached"], ""),
    (lambda: Path("helpers.py").write_text("# a note\ndef half(x):\n\n    return x / 2\n"), ["cached", "cached"], ""),
    (lambda: Path("helpers.py").write_text("def half(x):\n    return x / 2.5\n"), ["cached", "passed"], "helpers.py changed"),
    (lambda: write("prepare.ipynb", "weeks: int = 4", OUTPUT + "output(rows=int(weeks * 100.0))"), ["passed", "cached"], "cell 2 changed"),
    (lambda: write("prepare.ipynb", "weeks: int = 4", OUTPUT + "output(rows=weeks * 200)"), ["passed", "passed"], "rows = 800 replaced 400"),
])
def test_a_step_runs_again_for_a_reason_and_says_which(two, change, expected, why):
    change()
    planned = run(dry_run=True)
    again = run()
    assert verdicts(again) == expected and why in " ".join(row["why"] for row in again.steps)
    assert planned.steps[0]["verdict"] == ("cached" if expected[0] == "cached" else "would run")


def test_other_values_run_and_old_ones_are_remembered(two):
    assert verdicts(run(params={"weeks": "8"})) == ["passed", "passed"] and "weeks = 8 replaced 4" in record()["steps"][0]["why"]
    back = run(params={"weeks": "4"})
    assert verdicts(back) == ["cached", "cached"] and back.steps[0]["cached_from"] == two.id


def test_a_new_version_of_the_data_is_a_reason(shop):
    import pandas as pd

    from mlops_nb.data.store import save

    save(pd.DataFrame({"x": [1, 2, 3]}), "orders")
    write("count.ipynb", "", "from mlops_nb.data.store import load\n" + OUTPUT + "output(rows=len(load('orders')))")
    pipeline(step("count"))
    assert verdicts(run()) == ["passed"] and verdicts(run()) == ["cached"] and list(record()["steps"][0]["inputs"]) == ["orders@1"]
    save(pd.DataFrame({"x": [1, 2, 3, 4]}), "orders")
    again = run()
    assert again.outputs["count"] == {"rows": 4} and again.steps[0]["why"] == "re-runs because orders@2 replaced orders@1"


def test_data_saved_by_a_step_of_the_same_run_is_a_reason_for_those_after_it(shop):
    import pandas as pd

    from mlops_nb.data.store import save

    save(pd.DataFrame({"x": [1]}), "orders")
    load = "from mlops_nb.data.store import load, save\n" + OUTPUT
    write("before.ipynb", "", load + "output(rows=len(load('orders')))")
    write("add.ipynb", "rows: int = 1", "import pandas as pd\n" + load + "saved = save(pd.DataFrame({'x': range(rows)}), 'orders')")
    write("after.ipynb", "", load + "output(rows=len(load('orders')))")
    pipeline("[params]\nrows = 1\n" + step("before") + step("add", needs='["before"]', params='{ rows = "{rows}" }') + step("after", needs='["add"]'))
    run()
    again = run(params={"rows": "5"})
    assert verdicts(again)[1:] == ["passed", "passed"] and again.outputs["after"] == {"rows": 5}


def test_a_step_may_say_that_it_is_never_taken_from_an_earlier_run(shop):
    write("deploy.ipynb", "", OUTPUT + "output(done=True)")
    pipeline(step("deploy", cache=False))
    run()
    assert verdicts(run()) == ["passed"] and "cache = false" in record()["steps"][0]["why"]
    assert verdicts(run("deploy.ipynb")) == verdicts(run("deploy.ipynb")) == ["passed"], "a notebook asked for by name always runs"


# --- again ----------------------------------------------------------------------------------------------------------------------------

FLAKY = """from pathlib import Path
tries = Path("tries")
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
print("try", len(tries.read_text()))
if len(tries.read_text()) < good:
    raise ConnectionError("the database does not answer")
"""


def test_a_step_is_tried_again_and_each_attempt_is_kept(shop):
    write("load.ipynb", "good: int = 3", FLAKY + OUTPUT + "output(rows=10)")
    pipeline(step("load", retries=2, retry_delay_s=0.01))
    done = run()
    assert verdicts(done) == ["passed"] and done.steps[0]["attempts"] == 3
    assert sorted(path.name for path in (done.folder / "load").glob("*.ipynb")) == ["load.attempt-1.ipynb", "load.attempt-2.ipynb", "load.ipynb"]


def test_retries_end_and_the_last_words_of_the_cell_are_shown(shop):
    write("load.ipynb", "good: int = 9", FLAKY)
    pipeline(step("load", retries=1, retry_delay_s=0.01))
    with pytest.raises(RunFailed, match=r"at `raise ConnectionError\(\"the database does not answer\"\)`: ConnectionError: the database does not answer(.|\n)*\| try 2$") as caught:
        run()
    assert caught.value.run.steps[0]["attempts"] == 2


def test_a_gate_and_a_mistake_are_not_tried_again(shop):
    write("train.ipynb", "", OUTPUT + "output(score=0.2)")
    pipeline(step("train", retries=3, gates="{ score = 0.3 }"))
    with pytest.raises(GateFailed, match=r"step train failed its gates: score 0\.2 \(expected >= 0\.3\); the report is .*gates\.html\.") as caught:
        run()
    assert caught.value.run.steps[0]["attempts"] == 1 and caught.value.run.steps[0]["report"].endswith("gates.html")
    pipeline(step("train", gates="{ accuracy = 0.3 }"))
    with pytest.raises(Invalid, match="a figure that was not measured"):
        run()
    pipeline(step("train", gates='{ score = ">= 0.1" }'))
    assert run().passed


def test_whoever_asked_to_be_told_is_told(shop, monkeypatch):
    heard = []

    class Chat(BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Chat)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("CHAT_URL", f"http://127.0.0.1:{server.server_port}/hook")
    monkeypatch.setenv("MLOPS_TRIGGER", "schedule:nightly@2026-11-23T06:00:00Z")
    write("bad.ipynb", "", "1 / 0")
    pipeline('[pipeline]\nname = "nightly"\non_failure = ["$CHAT_URL", "exit 3"]\n' + step("bad", on_failure='["echo $MLOPS_STEP > told.txt"]'))
    with pytest.raises(RunFailed):
        run()
    server.shutdown()
    assert heard[0]["step"] == "bad" and "ZeroDivisionError" in heard[0]["text"] and Path("told.txt").read_text() == "bad\n"
    messages = " ".join(one["message"] for one in alerts())
    assert "of nightly failed" in messages and "the hook 'exit 3' failed: exit code 3" in messages and "127.0.0.1" not in messages
    assert record()["trigger"].startswith("schedule:nightly")


# --- secrets and copies ---------------------------------------------------------------------------------------------------------------


def test_no_secret_reaches_a_file(shop, monkeypatch):
    word = "hunter" + "2-" + "9f8e7d6c"
    monkeypatch.setenv("SHOP_DB_PASSWORD", word)
    write("load.ipynb", "password: str = ''\nurl: str = ''", "import os, sys\nprint(os.environ['SHOP_DB_PASSWORD'], password, url)",
          "os.write(2, os.environ['SHOP_DB_PASSWORD'].encode() + b' to the log\\n' * 20)", "raise ValueError('cannot log in with ' + password)")
    with pytest.raises(RunFailed) as caught:
        run("load.ipynb", params={"password": "short-" + word[::-1], "url": f"postgres://me:{word}@db/shop"})
    for text in (str(caught.value), *(path.read_text(errors="replace") for path in (shop / ".mlops" / "runs").rglob("*") if path.is_file())):
        assert word not in text and word[::-1] not in text
    copy = (caught.value.run.folder / "load" / "load.ipynb").read_text()
    assert "‹SHOP_DB_PASSWORD›" in copy and "‹password›" in copy


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_what_a_step_left_is_copied_wherever_one_wishes(shop, tmp_path, scheme):
    write("a.ipynb", "", OUTPUT + "output(x=1)")
    write("b.ipynb", "", "1 / 0")
    pipeline(step("a") + step("b", needs='["a"]'))
    with pytest.raises(RunFailed) as caught:
        run(to=f"{scheme}{tmp_path / 'far'}")
    there = tmp_path / "far" / caught.value.run.id
    assert {path.name for path in (there / "a").iterdir()} >= {"a.ipynb", "a.ipynb.html", "outputs.json"} and "ZeroDivisionError" in (there / "b" / "b.ipynb").read_text()


def test_a_place_that_cannot_be_written_is_said_before_anything_runs(shop):
    write("a.ipynb", "")
    pipeline(step("a"))
    with pytest.raises(MlopsError, match="nosuch://bucket"):
        run(to="nosuch://bucket/runs")
    assert not (shop / ".mlops" / "runs").exists()


# --- faults ---------------------------------------------------------------------------------------------------------------------------


def test_nobody_reading_the_lines_does_not_end_a_run(shop):
    write("a.ipynb", "")
    pipeline(step("a"))
    reading, writing = os.pipe()
    os.close(reading)
    subprocess.run([sys.executable, "-m", "mlops_nb", "run"], stderr=writing, stdout=subprocess.DEVNULL, env={**os.environ, "MLOPS_PROGRESS": "1"}, timeout=300)
    os.close(writing)
    assert record()["status"] == "passed"


def test_a_segfault_is_one_sentence_and_the_notebook_is_kept(shop):
    write("crash.ipynb", "", "kept = 'before the crash'\nkept", "import ctypes\nctypes.string_at(0)")
    with pytest.raises(RunFailed, match="step crash lost its kernel, which ran out of memory or crashed in native code") as caught:
        run("crash.ipynb")
    assert "before the crash" in (caught.value.run.folder / "crash" / "crash.ipynb").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_step_that_wants_too_much_memory_is_refused_it(shop):
    write("large.ipynb", "", "import numpy as np\nnp.ones(400_000_000)")
    pipeline(step("large", resources="{ memory_gb = 1.5 }"))
    with pytest.raises(RunFailed, match="MemoryError"):
        run()


def test_an_endless_loop_that_heeds_nothing_is_stopped_at_its_limit(shop):
    write("loop.ipynb", "", "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True:\n    pass")
    pipeline(step("loop", timeout_s=2))
    with pytest.raises(RunFailed, match="took longer than its limit of 2 s"):
        run()


def test_a_gigabyte_of_printing_is_cut_and_said_so(shop):
    write("noisy.ipynb", "", "line = 'x' * 1_000_000\nfor _ in range(1000):\n    print(line)", OUTPUT + "output(done=True)")
    done = run("noisy.ipynb")
    copy = done.folder / "noisy" / "noisy.ipynb"
    assert done.outputs["noisy"] == {"done": True} and copy.stat().st_size < 30_000_000 and "the rest was dropped" in copy.read_text()


def test_a_notebook_that_is_edited_or_deleted_while_it_runs_runs_as_it_was(shop):
    waits = "from pathlib import Path\nimport time\nPath('begun').touch()\nwhile not Path('go').exists():\n    time.sleep(0.05)"
    for change in (lambda path: path.write_text("{ half a note"), Path.unlink):
        path = write("slow.ipynb", "", waits, OUTPUT + "output(done='as it was')")
        running = subprocess.Popen([sys.executable, "-m", "mlops_nb", "run", "slow.ipynb", "--json"], stdout=subprocess.DEVNULL)
        until(Path("begun").exists, process=running)
        change(path)
        Path("go").touch()
        assert running.wait(300) == 0
        Path("go").unlink(), Path("begun").unlink()


def test_a_notebook_deleted_before_its_turn_is_named(shop):
    write("first.ipynb", "", "from pathlib import Path\nPath('second.ipynb').unlink()")
    write("second.ipynb", "")
    pipeline(step("first") + step("second", needs='["first"]'))
    with pytest.raises(MlopsError, match=r"there is no notebook .*second\.ipynb"):
        run()
    assert [row["verdict"] for row in record()["steps"]] == ["passed", "failed"] and record()["status"] == "failed"


def test_a_full_disk_is_one_sentence_and_nothing_else_is_lost(shop, tmp_path, monkeypatch):
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, timeout=300).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        init(place, name="small")
        monkeypatch.chdir(place)
        write("fills.ipynb", "", "import os\nprint(os.urandom(3_000_000).hex()[:4_000_000])")
        done = subprocess.run([sys.executable, "-m", "mlops_nb", "run", "fills.ipynb"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 2 and "the disk is full; free some space and try again" in done.stderr and "Traceback" not in done.stderr
        assert record()["status"] in ("failed", "died") and nbformat.read("fills.ipynb", as_version=4).cells
    finally:
        monkeypatch.undo()
        subprocess.run(["umount", "-l", str(place)], check=True, timeout=300)


# --- going on -------------------------------------------------------------------------------------------------------------------------

DIARY = "from pathlib import Path\ndef wrote(word):\n    with Path('diary').open('a') as file:\n        file.write(word + ' ')\n"


def test_a_run_goes_on_with_the_failed_step_from_the_failed_cell(shop):
    write("prepare.ipynb", "", DIARY + "wrote('prepare')\n" + OUTPUT + "output(rows=3)")
    train = ["rows: int = 0", DIARY, "wrote('work')\nstate = {'rows': rows, 'list': [1]}", "state['list'].append(2)\n1 / 0", OUTPUT + "output(state=state)"]
    write("train.ipynb", *train)
    write("after.ipynb", "state: dict = {}", DIARY + "wrote('after')")
    pipeline(step("prepare") + step("train", params='{ rows = "{prepare.rows}" }') + step("after", params='{ state = "{train.state}" }'))
    with pytest.raises(RunFailed):
        run()
    train[3] = "state['list'].append(3)"
    write("train.ipynb", *train)
    done = resume()
    assert verdicts(done) == ["cached", "passed", "passed"] and Path("diary").read_text() == "prepare work after "
    assert done.outputs["train"] == {"state": {"rows": 3, "list": [1, 3]}}, "the state is from before the failed cell, not from its middle"
    assert done.steps[1]["resumed"].startswith("from cell 4") and record()["resumed_from"]
    copy = nbformat.read(done.folder / "train" / "train.ipynb", as_version=4)
    assert copy.cells[2].metadata["papermill"]["status"] == "completed" and not any("1 / 0" in cell.source for cell in copy.cells)
    with pytest.raises(Invalid, match="passed; expected one that failed"):
        resume("last")


def test_code_changed_before_the_failed_cell_runs_again_from_there(shop):
    train = ["", DIARY, "wrote('a')\nx = 1", "wrote('b')\ny = x + 1", "z = y + missing"]
    write("train.ipynb", *train)
    pytest.raises(RunFailed, run, "train.ipynb")
    write("train.ipynb", *train[:3], "wrote('b2')\ny = x + 10", OUTPUT + "output(z=y)")
    done = resume()
    assert done.outputs["train"] == {"z": 11} and Path("diary").read_text().split()[-1] == "b2"


@pytest.mark.parametrize("end", ["kernel", "runner"])
def test_a_run_that_was_killed_goes_on_from_its_state(shop, end):
    kill = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)" if end == "kernel" else "Path('begun').touch()\nimport time\ntime.sleep(600)"
    train = ["", DIARY, "wrote('work')\nbig = list(range(1000))", kill, OUTPUT + "output(total=sum(big))"]
    write("train.ipynb", *train)
    runner = subprocess.Popen([sys.executable, "-m", "mlops_nb", "run", "train.ipynb"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if end == "runner":
        until(Path("begun").exists, process=runner)
        runner.kill()
    assert runner.wait(600)
    write("train.ipynb", *train[:3], "pass", train[4])
    done = resume("last-failed")
    assert done.outputs["train"] == {"total": 499500} and Path("diary").read_text() == "work "


def test_without_a_living_process_the_checkpoint_file_is_used_and_what_is_missing_is_named(shop, monkeypatch):
    train = ["", DIARY, "wrote('work')\nbig = list(range(1000))\nhandle = open('diary')", "1 / 0", OUTPUT + "output(total=sum(big))"]
    write("train.ipynb", *train, tags={2: ["checkpoint"]})
    monkeypatch.setenv("MLOPS_SNAPSHOT_S", "0")
    with pytest.raises(RunFailed):
        run("train.ipynb")
    write("train.ipynb", *train[:3], "pass", train[4], tags={2: ["checkpoint"]})
    done = resume()
    assert done.outputs["train"] == {"total": 499500} and Path("diary").read_text() == "work "
    assert "checkpoint" in done.steps[0]["resumed"] and "handle" in done.steps[0]["resumed"]


def test_only_a_run_that_failed_can_be_gone_on_with(shop):
    with pytest.raises(NotFound):
        resume()
    with pytest.raises(NotFound):
        resume("20200101")
