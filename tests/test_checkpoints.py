"""A failed notebook's state: from a snapshot of its process, from a file, and in a live session."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from patience import next_line, until

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="snapshots are forked processes")

import psutil  # noqa: E402
from test_kernels import clean, run  # noqa: E402

from mlops_nb.core.errors import NotFound, Unavailable, Untrusted  # noqa: E402
from mlops_nb.pipeline import checkpoints, snapshots  # noqa: E402
from mlops_nb.pipeline.checkpoints import points  # noqa: E402


@pytest.fixture
def step(tmp_path, monkeypatch):
    """A step's folder; at its end no snapshot may be left."""
    monkeypatch.setenv("MLOPS_HOME", str(tmp_path / "home"))
    folders = []

    def folder(name="first"):
        (tmp_path / name).mkdir(exist_ok=True)
        folders.append(tmp_path / name)
        return tmp_path / name

    yield folder
    for one in folders:
        snapshots.forget(one)
    until(lambda: not sleepers(tmp_path))


def sleepers(folder):
    "The living processes that were started for these tests, by a variable in their environment."
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE and process.environ().get("MLOPS_HOME") == str(folder / "home"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kept(folder, *sources, **how):
    return run(*sources, checkpoint={"folder": str(folder)}, **how)


FIRST = ["import pandas as pd\nimport random\nrandom.seed(7)\nframe = pd.DataFrame({'n': range(5)})\nnames = ['a']", "names.append('b')\nframe.loc[0, 'n'] = 100\nalias = frame"]
ENDS = {"an error": "1 / 0", "a kill": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "a crash": "import ctypes\nctypes.string_at(0)",
        "a kill of its whole session": "import os, signal\nos.killpg(0, signal.SIGKILL)"}


@pytest.mark.parametrize("end", ENDS)
def test_a_failed_cell_is_resumed_with_the_values_before_it(step, end):
    ran = kept(step(), *FIRST, f"names.clear()\nframe.loc[:, 'n'] = 0\ndel alias\n{ENDS[end]}")
    assert ran.error is not None
    point = points(step())[0]
    assert (point.kind, point.after, point.digest, point.missing) == ("snapshot", 1, "digest 1", {})
    again = kept(step("second"), "print((names, frame['n'].tolist(), alias is frame, random.random()))", "len(In), get_ipython().execution_count", first=2, restore=point)
    assert again.text(0) == "(['a', 'b'], [100, 1, 2, 3, 4], True, 0.32383276483316237)\n"  # random.Random(7).random()
    assert again.text(1) == "(5, 5)"  # four cells and the empty one; the fifth prompt comes next
    assert again.usage.code == 0
    assert points(step("second")) == []


def test_a_snapshot_is_used_twice_and_each_use_begins_anew(step):
    kept(step(), *FIRST, "1 / 0")
    point = points(step())[0]
    for _ in range(2):
        assert kept(step("second"), "names.append('c')\nnames", first=2, restore=point).text() == "['a', 'b', 'c']"


def test_a_resumed_step_that_fails_again_can_be_resumed_again(step):
    kept(step(), *FIRST, "1 / 0")
    kept(step("second"), "1 / 0", first=2, restore=points(step())[0])
    snapshots.forget(step())
    assert points(step()) == []
    point = points(step("second"))[0]
    assert (point.after, point.digest) == (1, "digest 1")
    third = kept(step("third"), "names.append('c')", "1 / 0", first=2, restore=point)
    assert third.error is not None
    assert points(step("third"))[0].after == 2
    assert kept(step("fourth"), "names", first=3, restore=points(step("third"))[0]).text() == "['a', 'b', 'c']"


def test_nothing_is_left_after_success(step):
    assert kept(step(), *FIRST, "names").error is None
    assert points(step()) == [] and not list(step().glob("snapshot-*"))


def test_only_the_newest_snapshot_is_kept(step):
    kept(step(), *(f"x{i} = {i}" for i in range(6)), "1 / 0")
    assert [(point.kind, point.after) for point in points(step())] == [("snapshot", 5)]
    assert len(list(step().glob("snapshot-*"))) == 1


def test_a_resumed_kernel_dies_with_its_runner_and_the_snapshot_stays(step):
    kept(step(), *FIRST, "1 / 0")
    code = (f"import os, sys, time\nfrom mlops_nb.pipeline import snapshots, checkpoints\npoint = checkpoints.points({str(step())!r})[0]\n"
            f"child = snapshots.wake(point.record, {str(step() / 'k.json')!r}, environment=dict(os.environ))\nprint(child.pid, flush=True)\ntime.sleep(600)")
    runner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=clean())
    pid = int(next_line(runner))
    runner.kill()
    runner.wait(120)
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    assert [point.kind for point in points(step())] == ["snapshot"]


def test_a_snapshot_ends_by_itself(step):
    kept(step(), *FIRST, "1 / 0", environment={"MLOPS_SNAPSHOT_S": "0.5"})
    until(lambda: not list(step().glob("snapshot-*")))
    assert points(step()) == []


def test_a_snapshot_that_was_killed_is_no_point_to_go_back_to(step, tmp_path):
    kept(step(), *FIRST, "1 / 0")
    point = points(step())[0]
    for process in (left := sleepers(tmp_path)):
        process.kill()
    psutil.wait_procs(left, timeout=120)
    assert points(step()) == []
    with pytest.raises(Unavailable, match="snapshot has ended"):
        run("1", restore=point)


def test_threads_of_the_notebook_forbid_a_snapshot_and_it_says_so(step):
    kept(step(), "import threading, time\nthreading.Thread(target=time.sleep, args=(30,), name='feeder', daemon=True).start()", "x = 1", "1 / 0")
    assert points(step()) == []
    assert "feeder" in json.loads((step() / "no-snapshot.json").read_text())["why"]


def test_large_outputs_do_not_end_the_keeping(step):
    """zeromq would send them without a copy, by a thread of its own that runs from then on."""
    kept(step(), "x = 1", "print('x' * 200_000)", "y = 2", "1 / 0")
    assert [point.after for point in points(step())] == [2]


def test_a_copy_that_hangs_holds_up_no_notebook_and_the_snapshot_before_it_stays(step):
    """A lock that another thread holds while a process is forked is never released in the copy; here a hook waits for one, as a library's may."""
    hook = "import os, threading\nfrom mlops_nb.pipeline import snapshots\nsnapshots.WAKING_S = 3\nheld = threading.Lock()\nheld.acquire()\nos.register_at_fork(after_in_child=held.acquire)"
    ran = kept(step(), *FIRST, hook, "names.clear()\n1 / 0")
    assert "ZeroDivisionError" in str(ran.error)
    assert json.loads((step() / "no-snapshot.json").read_text()) == {"after": 2, "why": "a copy of the notebook's process did not come to life"}
    point, = points(step())
    assert (point.kind, point.after) == ("snapshot", 1) and len(list(step().glob("snapshot-*"))) == 1
    assert kept(step("second"), "names", first=2, restore=point).text() == "['a', 'b']"


def test_a_snapshot_that_hangs_is_not_waited_for(step, tmp_path, monkeypatch):
    kept(step(), *FIRST, "1 / 0")
    point, = points(step())
    sleeper, = until(lambda: len(found := sleepers(tmp_path)) == 1 and found)  # the failed kernel is gone
    sleeper.suspend()
    monkeypatch.setattr(snapshots, "WAKING_S", 2)
    try:
        with pytest.raises(Unavailable, match="has ended or hangs"):
            snapshots.wake(point.record, str(tmp_path / "kernel.json"), environment=dict(os.environ))
        snapshots.forget(step())
    finally:
        sleeper.resume()
    until(lambda: not sleepers(tmp_path))  # it finds out that nobody waits any more for the kernel, and then that it is to end


def test_parallel_loops_work_after_a_resume(step):
    """OpenMP's threads do not survive a fork; without help the copy hangs in its next loop."""
    fit = "from sklearn.ensemble import HistGradientBoostingClassifier\nimport numpy as np\nX = np.random.default_rng(0).random((4000, 8))\nmodel = HistGradientBoostingClassifier(max_iter=5).fit(X, X[:, 0] > 0.5)"
    kept(step(), fit, "1 / 0", environment={"OMP_NUM_THREADS": "2"})
    assert kept(step("second"), "HistGradientBoostingClassifier(max_iter=5).fit(X, X[:, 1] > 0.5).score(X, X[:, 1] > 0.5) > 0.9", first=1, restore=points(step())[0]).text() == "True"


# --- files ---

HARD = """
import dataclasses, os, threading, collections, sqlite3
import numpy as np, pandas as pd
frame = pd.DataFrame({"word": ["a", None, "c"], "n": [1, 2, 3], "when": pd.date_range("2026-01-01", periods=3, tz="UTC")})
other_name = frame
by_name = {"frame": frame, "column": frame["n"]}
array = np.arange(12).reshape(3, 4).T
rate = 2
def double(x):
    "Reads a global name."
    return x * rate
half = lambda x: x / rate
@dataclasses.dataclass
class Basket:
    items: list
basket = Basket(["tea"])
Pair = collections.namedtuple("Pair", "a b")
pair = Pair(1, basket)
shared = [1]; left = [shared]; right = [shared]
log = open(os.devnull); lock = threading.Lock(); rows = (row for row in [1]); base = sqlite3.connect(":memory:"); holder = {"fine": 1, "lock": lock}
np.random.seed(3); np.random.random(2)
_private = "kept too"
"""
CHECK = ("other_name is frame, by_name['frame'] is frame, frame['when'].dt.tz is not None, array.tolist() == np.arange(12).reshape(3, 4).T.tolist(), isinstance(basket, Basket), pair.b is basket, "
         "type(pair) is Pair, left[0] is right[0], _private, double(4), half(4), os.path.basename('a/b'), double.__doc__, len(In) > 2")


def test_a_checkpoint_keeps_what_can_be_kept_and_names_the_rest(step):
    kept(step(), HARD, "x = 1", tags={0: ["checkpoint"]})
    point = points(step())[0]
    assert (point.kind, point.after, point.digest) == ("checkpoint", 0, "digest 0")
    assert point.missing == {"log": "it is an open file", "lock": "it is a lock", "rows": "it is a generator", "base": "it is a connection", "holder": "it holds a lock"}
    again = kept(step("second"), f"print(({CHECK}))", "rate = 10\ndouble(4), half(4), Basket(['a']).items", "bool(np.random.random() == np.random.RandomState(3).random(3)[2])", "array[0, 0] = 5; frame.loc[0, 'n'] = 9",
                 "repr(rows)", "for row in rows: pass", first=1, restore=point)
    assert again.text(0) == "(True, True, True, True, True, True, True, True, 'kept too', 8, 2.0, 'b', 'Reads a global name.', True)\n"
    assert again.text(1) == "(40, 0.4, ['a'])"
    assert again.text(2) == "True"
    assert not again.cells[3].outputs
    assert "rows could not be restored" in again.text(4)
    assert "Unavailable" in str(again.error) and "rows could not be restored from the checkpoint (it is a generator)" in str(again.error)


def test_a_long_cell_gets_a_checkpoint_of_its_own_accord(step):
    kept(step(), "x = 1", "import time\ntime.sleep(4)", "y = 2", environment={"MLOPS_CHECKPOINT_S": "3"})
    assert [(point.kind, point.after) for point in points(step())] == [("checkpoint", 1)]


def test_a_checkpoint_that_is_too_large_is_not_written_and_says_so(step):
    kept(step(), "import numpy as np\nx = np.zeros(1_000_000)", tags={0: ["checkpoint"]}, environment={"MLOPS_CHECKPOINT_GB": "0.001"})
    assert points(step()) == []
    assert "over the limit" in json.loads((step() / "checkpoint-0.json").read_text())["why"]


def test_older_checkpoints_make_room(step):
    code = "import numpy as np\nx = np.zeros(1_000_000)"
    kept(step(), *[code] * 4, tags={i: ["checkpoint"] for i in range(4)}, environment={"MLOPS_CHECKPOINT_GB": "0.017"})
    assert [point.after for point in points(step())] == [3, 2]


def shell(**names):
    return SimpleNamespace(user_ns={"In": [""], "Out": {}} | names, user_ns_hidden={}, execution_count=1, extension_manager=SimpleNamespace(loaded=set()))


def tampered(path, kind):
    if kind == "a flipped bit":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif kind == "cut off":
        path.write_bytes(path.read_bytes()[:-20])
    elif kind == "writable by others":
        path.chmod(0o666)
    else:  # from another user or machine: sealed with another key
        os.environ["MLOPS_HOME"] += "-of-somebody-else"


@pytest.mark.parametrize("kind", ["a flipped bit", "cut off", "writable by others", "another user's"])
def test_a_checkpoint_that_is_not_ours_is_not_loaded(step, kind, monkeypatch):
    monkeypatch.setenv("MLOPS_HOME", os.environ["MLOPS_HOME"])
    record = checkpoints.save(shell(x=list(range(1000))), step(), after=0)
    assert (step() / "checkpoint-0.state").stat().st_mode & 0o777 == record.stat().st_mode & 0o777 == 0o600
    tampered(step() / "checkpoint-0.state", kind)
    with pytest.raises(Untrusted, match="not loaded"):
        checkpoints.load(shell(), step(), points(step())[0].record)


def test_a_class_that_is_gone_costs_only_its_own_values(step, tmp_path, monkeypatch):
    module = tmp_path / "shelves.py"
    module.write_text("class Shelf:\n    def __init__(self): self.n = [1]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import shelves

    shared = [1, 2]
    checkpoints.save(shell(before=shared, shelf=shelves.Shelf(), after={"of": shared}, shelves=shelves), step(), after=0)
    module.unlink()
    monkeypatch.delitem(sys.modules, "shelves")
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one != str(tmp_path)])
    found = shell()
    sys.path_importer_cache.clear()
    missing = checkpoints.load(found, step(), points(step())[0].record)
    assert set(missing) == {"shelf", "shelves"} and "shelves" in missing["shelf"]
    assert found.user_ns["before"] is found.user_ns["after"]["of"] and found.user_ns["before"] == [1, 2]
    with pytest.raises(Unavailable, match="shelf could not be restored"):
        found.user_ns["shelf"].n


@pytest.mark.parametrize("use", [len, bool, iter, list, str.format, lambda lost: lost.columns, lambda lost: lost + 1, lambda lost: 1 + lost, lambda lost: lost == 1, lambda lost: lost(), lambda lost: lost["a"]])
def test_using_a_lost_value_names_it(use):
    with pytest.raises((Unavailable, TypeError) if use is str.format else Unavailable):
        use(checkpoints.Lost("frame", "it is a lock"))


# --- live sessions ---


@pytest.fixture
def failed(step, tmp_path, monkeypatch):
    """A step whose notebook failed in its last cell, with its source and the executed copy."""
    import nbformat
    from nbformat.v4 import new_notebook

    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    folder = step("run") / "train"
    folder.mkdir()
    (tmp_path / "project").mkdir()
    ran = kept(folder, *FIRST, "names.clear()\n1 / 0", tags={0: ["checkpoint"]})
    for path in (tmp_path / "project/train.ipynb", folder / "train.ipynb"):
        nbformat.write(new_notebook(cells=ran.cells), path)
    yield folder, tmp_path / "project/train.ipynb"
    snapshots.forget(folder)


def in_jupyter(notebook, code):
    "What a cell shows in the kernel that Jupyter starts for a notebook."
    from jupyter_client.manager import KernelManager

    manager = KernelManager(kernel_name=json.loads(notebook.read_text())["metadata"]["kernelspec"]["name"])
    manager.start_kernel(env=clean() | {"JPY_SESSION_NAME": str(notebook)}, cwd=str(notebook.parent))
    client = manager.client()
    client.start_channels()
    said = []
    try:
        client.wait_for_ready(timeout=300)
        client.execute_interactive(code, timeout=300, output_hook=lambda message: said.append(message["content"]))
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    return [one.get("text") or one["data"]["text/plain"] for one in said if "text" in one or "data" in one]


@pytest.mark.parametrize("left", ["snapshot", "checkpoint"])
def test_a_live_session_stands_where_it_failed(failed, left):
    from mlops_nb.pipeline.live import live

    folder, source = failed
    if left == "checkpoint":
        snapshots.forget(folder)
    notebook = live(folder, source)
    assert notebook.name == "train.resume.ipynb"
    note, value = in_jupyter(notebook, "names, frame['n'].tolist()")
    assert f"after cell {2 if left == 'snapshot' else 1}" in note
    assert value == ("(['a', 'b'], [100, 1, 2, 3, 4])" if left == "snapshot" else "(['a'], [0, 1, 2, 3, 4])")


def test_a_live_session_can_be_interrupted_and_ended(failed, tmp_path):
    from jupyter_client.manager import KernelManager

    from mlops_nb.pipeline.live import live

    notebook = live(*failed)
    manager = KernelManager(kernel_name="mlops-resume")
    manager.start_kernel(env=clean() | {"JPY_SESSION_NAME": str(notebook)}, cwd=str(tmp_path))
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=300)
    client.execute("import time\nprint('begun')\ntime.sleep(600)")
    while client.get_iopub_msg(timeout=300)["msg_type"] != "stream":
        pass
    manager.interrupt_kernel()
    while (reply := client.get_shell_msg(timeout=300))["msg_type"] != "execute_reply":
        pass
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    os.kill(manager.provisioner.pid, signal.SIGKILL)  # as when the Jupyter server dies
    client.stop_channels()
    manager.cleanup_resources()
    until(lambda: len(sleepers(tmp_path)) == 1)  # the snapshot stays, the kernel went


def test_a_live_session_without_any_state_left_says_so(failed, step):
    from mlops_nb.pipeline.live import live

    notebook = live(*failed)
    snapshots.forget(failed[0])
    for path in failed[0].glob("checkpoint-*"):
        path.unlink()
    assert any("Nothing is left" in text for text in in_jupyter(notebook, "1"))
    with pytest.raises(NotFound, match="tag a cell"):
        live(*failed)
