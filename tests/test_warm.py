"""Processes forked from a warm parent: the same as fresh ones, safe, and gone when they should be.

Every test has a runtime and a cache folder of its own (XDG_RUNTIME_DIR, XDG_CACHE_HOME), so that no parent is shared with another test or with the person at the machine.
MLOPS_WARM_ALWAYS keeps what the parents import small, MLOPS_WARM_WAIT_S lets a slow machine take its time.
"""

import asyncio
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from mlops_nb.core.errors import Invalid, NotFound
from mlops_nb.pipeline import preloads, processes, warm
from mlops_nb.pipeline.processes import start

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
ROOT = Path(__file__).parent.parent
PATIENCE = 300
PROBE = '''
import atexit, json, os, signal, sys, threading, time

def say(**facts):
    os.write(1, json.dumps(facts, default=str).encode() + b"\\n")

def end(how):
    if how == "raise":
        raise ValueError("no baskets today")
    if how == "text":
        sys.exit("no baskets today")
    if how == "code":
        sys.exit(3)
    if how == "late":
        atexit.register(print, "last words")
        threading.Thread(target=lambda: (time.sleep(0.1), print("a thread's words"))).start()
    if how.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, how))
        time.sleep(60)

def length(text):
    say(length=len(text))

def family():
    import subprocess
    other = subprocess.Popen(["sleep", "300"])
    say(pid=os.getpid(), other=other.pid, parent=os.getppid())
    time.sleep(300)

def loaded(names):
    say(loaded=[name in sys.modules for name in names], parent=os.getppid())

def use(mb, seconds):
    block = bytearray(mb * 2**20)
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass

def draw():
    import random, uuid
    import numpy
    say(random=random.random(), numpy=float(numpy.random.random()), uuid=uuid.uuid4().hex)

def where():
    import numpy
    say(file=numpy.__file__)

def look():
    import gc, locale, logging, resource, tempfile
    import numpy, matplotlib
    say(folder=os.getcwd(), variables=dict(os.environ), argv=sys.argv, path=sys.path, main=sorted(vars(sys.modules["__main__"])),
        signals={number.name: str(signal.getsignal(number)) for number in signal.valid_signals() if isinstance(number, signal.Signals)},
        blocked=sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), mask=os.umask(0o022), files=sorted(os.listdir("/proc/self/fd"))[:-1],
        stdin=os.readlink("/proc/self/fd/0"), streams=[[one.encoding, one.errors, one.line_buffering, one is kept] for one, kept in
        [(sys.stdin, sys.__stdin__), (sys.stdout, sys.__stdout__), (sys.stderr, sys.__stderr__)]], zone=time.tzname, limit=resource.getrlimit(resource.RLIMIT_NOFILE),
        leader=os.getsid(0) == os.getpid() == os.getpgrp(), nice=os.nice(0), temporary=tempfile.gettempdir(), backend=matplotlib.rcParams._get_backend_or_none(),
        handlers=logging.getLogger().handlers, threads=threading.active_count(), collecting=gc.isenabled(), locale=locale.getlocale(), flags=str(sys.flags),
        wakeup=signal.set_wakeup_fd(-1), hooks=[str(sys.excepthook), str(sys.displayhook)], recursion=sys.getrecursionlimit(), switch=sys.getswitchinterval())
'''


@pytest.fixture
def home(monkeypatch):
    """A folder with a short path, and an environment in which warm parents are this test's own; they are stopped at the end."""
    folder = Path(tempfile.mkdtemp(prefix="w"))
    (folder / "probe.py").write_text(PROBE)
    for name in ("run", "cache"):
        (folder / name).mkdir(mode=0o700)
    for name in [name for name in os.environ if name.startswith("MLOPS_") or name in ("MPLBACKEND", "PYTHONPATH")]:
        monkeypatch.delenv(name)
    wishes = {"XDG_RUNTIME_DIR": str(folder / "run"), "XDG_CACHE_HOME": str(folder / "cache"), "MLOPS_WARM_ALWAYS": "numpy", "MLOPS_WARM_WAIT_S": "300", "MLOPS_WARM": "1"}
    for name, value in wishes.items():
        monkeypatch.setenv(name, value)
    yield folder
    for parent in parents(folder):
        parent.kill()
        psutil.wait_procs([parent], 60)
    shutil.rmtree(folder, ignore_errors=True)


def parents(folder: Path) -> list[psutil.Process]:
    """The warm parents of a test, by the socket on their command line; their forked children are not counted."""
    found = [one for one in psutil.process_iter(["cmdline", "ppid"])
             if "mlops_nb.pipeline.warm" in (one.info["cmdline"] or []) and any(str(folder) in part for part in one.info["cmdline"])]
    return [one for one in found if one.info["ppid"] not in {other.pid for other in found}]


def begin(folder: Path, target: str, payload: dict | None = None, **how) -> processes.Child:
    return start(f"probe:{target}", payload or {}, environment=how.pop("environment", None) or dict(os.environ), folder=folder, **how)


def told(folder: Path, target: str, payload: dict | None = None, **how) -> tuple[dict, processes.Child]:
    """What a probe says, and its ended child."""
    with (folder / "said").open("w+b") as said:
        child = begin(folder, target, payload, stdout=said.fileno(), **how)
        ended = child.wait(PATIENCE)
        said.seek(0)
        lines = said.read().decode().splitlines()
    assert ended.code == 0, ended
    return json.loads(lines[-1]), child


def first_line(child: processes.Child, reader: int) -> dict:
    assert select.select([reader], [], [], PATIENCE)[0]
    return json.loads(os.read(reader, 10_000))


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def soon(condition, patience_s: float = PATIENCE) -> bool:
    until = time.monotonic() + patience_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return bool(condition())


both = pytest.mark.parametrize("forked", [True, False], ids=["warm", "cold"])


# ---- the same as a fresh process

FACTS = ("folder variables argv path main signals blocked mask files stdin streams zone limit leader nice temporary backend handlers threads collecting locale flags wakeup hooks "
         "recursion switch").split()


@pytest.mark.parametrize("wish", [{}, {"MPLBACKEND": "svg", "PYTHONPATH": "libraries", "TZ": "Asia/Tokyo", "SHOP": "café \udcff"}], ids=["plain", "wishes"])
def test_a_forked_process_is_as_a_fresh_one(home, monkeypatch, wish):
    for name in ("libraries", "elsewhere"):
        (home / name).mkdir()
    monkeypatch.setenv("MLOPS_WARM_ALWAYS", "numpy matplotlib.pyplot")
    environment = {**os.environ, "TMPDIR": str(home / "elsewhere"), **wish}
    fresh, cold = told(home, "look", environment=environment, warm=False)
    forked, child = told(home, "look", environment=environment)
    assert child.cold_because == "" and cold.cold_because == "asked for"
    assert {name: forked[name] for name in FACTS} == {name: fresh[name] for name in FACTS}
    assert forked["variables"] == environment and forked["folder"] == str(home) and forked["leader"]
    assert forked["backend"] == wish.get("MPLBACKEND")


def test_random_numbers_differ_between_brothers(home):
    drawn = [told(home, "draw")[0] for _ in range(3)]
    for name in ("random", "numpy", "uuid"):
        assert len({one[name] for one in drawn}) == 3, name


def test_matrices_and_forests_work_after_a_fork(home, monkeypatch):
    """OpenBLAS's threads and OpenMP's: both libraries were loaded before the fork."""
    monkeypatch.setenv("MLOPS_WARM_ALWAYS", "numpy sklearn.ensemble")
    (home / "forest.py").write_text(textwrap.dedent("""
        import json, os, sys
        def grow():
            before = [name in sys.modules for name in ("numpy", "sklearn.ensemble")]
            import numpy as np
            from sklearn.ensemble import HistGradientBoostingRegressor
            x = np.random.default_rng(0).normal(size=(600, 600))
            y = x[:, 0] * 2 + x[:, 1] ** 2
            model = HistGradientBoostingRegressor(max_iter=10, random_state=0).fit(x[:, :5], y)
            os.write(1, json.dumps({"before": before, "trace": float(np.trace(x @ x.T)), "score": model.score(x[:, :5], y)}).encode())
    """))
    found = []
    for how in (True, False):
        with (home / "said").open("w+b") as said:
            child = start("forest:grow", {}, environment=dict(os.environ), folder=home, stdout=said.fileno(), warm=how)
            assert child.wait(PATIENCE * 2).code == 0
            said.seek(0)
            found.append(json.loads(said.read()))
    assert [one.pop("before") for one in found] == [[True, True], [False, False]]
    assert found[0]["trace"] == pytest.approx(found[1]["trace"]) and found[0]["score"] == pytest.approx(found[1]["score"])


# ---- how it ends

@both
@pytest.mark.parametrize(("how", "code", "says"), [("", 0, ""), ("code", 3, ""), ("text", 1, "no baskets today"), ("raise", 1, "ValueError: no baskets today"), ("late", 0, "a thread's words\nlast words"),
                                                   ("SIGINT", -2, "KeyboardInterrupt"), ("SIGTERM", -15, ""), ("SIGKILL", -9, ""), ("SIGSEGV", -11, "")])
def test_exit_codes_and_last_words(home, forked, how, code, says):
    with (home / "said").open("w+b") as said:
        child = begin(home, "end", {"how": how}, stdout=said.fileno(), stderr=said.fileno(), warm=forked)
        ended = child.wait(PATIENCE)
        said.seek(0)
        text = said.read().decode().strip()
    assert (child.cold_because == "") == forked
    assert ended.code == code and child.poll() == code and child.wait(120) is ended
    assert text.endswith(says) if says else text == ""


@both
def test_time_and_memory_are_accounted_for(home, forked):
    ended = begin(home, "use", {"mb": 300, "seconds": 0.3}, warm=forked).wait(PATIENCE)
    assert 0.3 <= ended.cpu_s < 30 and 300 <= ended.peak_mb < 900


@both
def test_a_big_payload(home, forked):
    assert told(home, "length", {"text": "é" * 15_000_000}, warm=forked)[0] == {"length": 15_000_000}


@both
def test_a_child_can_be_waited_for_from_threads_and_by_asyncio(home, forked):
    child = begin(home, "end", {"how": "code"}, warm=forked)
    codes = []
    threads = [threading.Thread(target=lambda: codes.append(child.wait(PATIENCE).code)) for _ in range(5)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(PATIENCE)
    assert codes == [3] * 5

    async def watched() -> int:
        late, ended = begin(home, "end", {"how": "late"}, warm=forked, stdout=writer), asyncio.Event()
        asyncio.get_running_loop().add_reader(late.fileno(), ended.set)
        await asyncio.wait_for(ended.wait(), PATIENCE)
        asyncio.get_running_loop().remove_reader(late.fileno())
        return late.poll()

    reader, writer = os.pipe()
    assert asyncio.run(watched()) == 0
    os.close(reader), os.close(writer)


def test_waiting_has_a_limit(home):
    child = begin(home, "family")
    with pytest.raises(TimeoutError, match="still runs after 0.05 s"):
        child.wait(0.05)
    child.close()


# ---- who ends with whom

STARTER = """
import os, sys, time
from mlops_nb.pipeline.processes import start
children = [start("probe:family", {}, environment=dict(os.environ), folder=sys.argv[1], stdout=int(sys.argv[2]), warm=sys.argv[3] == "True", tied=tied) for tied in (True, False)]
time.sleep(300)
"""


@both
def test_a_killed_starter_takes_its_tied_children_along_and_no_others(home, forked):
    reader, writer = os.pipe()
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(home), str(writer), str(forked)], pass_fds=[writer], cwd=ROOT)
    text = b""
    while text.count(b"\n") < 2:
        assert select.select([reader], [], [], PATIENCE * 2)[0]
        text += os.read(reader, 10_000)
    tied, untied = map(json.loads, text.splitlines())
    try:
        starter.send_signal(signal.SIGKILL)
        starter.wait(120)
        assert soon(lambda: gone(tied["pid"]) and gone(tied["other"]))
        time.sleep(0.2)
        assert not gone(untied["pid"]) and not gone(untied["other"])
    finally:
        os.killpg(untied["pid"], signal.SIGKILL)
        os.close(reader), os.close(writer)


@both
def test_closing_ends_a_tied_child_with_all_it_started(home, forked):
    reader, writer = os.pipe()
    child = begin(home, "family", stdout=writer, warm=forked)
    family = first_line(child, reader)
    child.close()
    assert soon(lambda: gone(family["pid"]) and gone(family["other"]))
    os.close(reader), os.close(writer)


@both
def test_what_watches_over_a_child_is_killed(home, forked):
    """The warm parent, or the guard of a cold start, ends by kill -9: the child is reported as killed, and the next start works."""
    reader, writer = os.pipe()
    child = begin(home, "family", stdout=writer, warm=forked)
    family = first_line(child, reader)
    os.kill(family["parent"], signal.SIGKILL)
    assert child.wait(PATIENCE).code == -9
    assert soon(lambda: gone(family["pid"]) and gone(family["other"]))
    again, following = told(home, "loaded", {"names": ["numpy"]}, warm=forked)
    assert again["loaded"] == [forked] and again["parent"] != family["parent"] and (following.cold_because == "") == forked
    os.close(reader), os.close(writer)


def test_an_untied_child_outlives_its_parent(home):
    reader, writer = os.pipe()
    child = begin(home, "family", stdout=writer, tied=False)
    family = first_line(child, reader)
    os.kill(family["parent"], signal.SIGKILL)
    assert soon(lambda: gone(family["parent"]))
    assert child.poll() is None and not gone(family["pid"])
    child.signal(signal.SIGKILL)
    assert child.wait(PATIENCE).code == -9
    os.close(reader), os.close(writer)


# ---- the parent

def test_two_runners_start_one_parent(home):
    code = "import os, sys; from mlops_nb.pipeline.processes import start; start('probe:loaded', {'names': ['numpy']}, environment=dict(os.environ), folder=sys.argv[1]).wait()"
    runners = [subprocess.Popen([sys.executable, "-c", code, str(home)], stdout=subprocess.PIPE, cwd=ROOT) for _ in range(3)]
    said = [json.loads(one.communicate(timeout=PATIENCE * 2)[0]) for one in runners]
    assert len({one["parent"] for one in said}) == 1 and all(one["loaded"] == [True] for one in said)
    assert soon(lambda: len(parents(home)) == 1)


def test_a_parent_that_hangs_is_not_waited_for_and_forks_nothing_later(home, monkeypatch):
    told(home, "loaded", {"names": []})
    parent, reach = psutil.Process(warm.status()["pid"]), warm.reach
    monkeypatch.setattr(processes, "ANSWER_S", 2)
    monkeypatch.setattr(warm, "reach", lambda environment: (reach(environment), parent.suspend())[0])
    try:
        child = begin(home, "family", tied=False)
    finally:
        parent.resume()
    assert child.cold_because == "the warm parent did not answer within 2 s" and child.poll() is None
    child.signal(signal.SIGKILL)
    assert child.wait(PATIENCE).code == -9
    assert warm.status()["pid"] == parent.pid and warm.status()["children"] == []


def test_status_and_stop(home):
    assert warm.status() == {} and warm.stop() is False
    said, _ = told(home, "loaded", {"names": []})
    assert soon(lambda: warm.status()["children"] == [])
    state = warm.status()
    assert state["pid"] == said["parent"] and state["modules"] > 100 and state["unsafe"] == ""
    assert warm.stop() is True
    assert soon(lambda: gone(state["pid"])) and warm.status() == {}


def test_a_stopped_parent_watches_its_children_to_their_end_and_another_takes_its_place(home):
    child = begin(home, "family")
    old = warm.status()["pid"]
    assert warm.stop() and not gone(old)
    said, following = told(home, "loaded", {"names": ["numpy"]})
    assert following.cold_because == "" and said["parent"] != old
    child.signal(signal.SIGTERM)
    assert child.wait(PATIENCE).code == -15
    assert soon(lambda: gone(old))


def test_it_goes_when_nobody_comes(home, monkeypatch):
    monkeypatch.setenv("MLOPS_WARM_IDLE_S", "0.3")
    said, _ = told(home, "loaded", {"names": []})
    assert soon(lambda: gone(said["parent"]) and not list((home / "run/mlops_nb.warm").glob("*.sock")))


def copied(home: Path) -> dict:
    """A package of our own to edit: the folder of the copy, and how to run something with it."""
    shutil.copytree(ROOT / "mlops_nb", home / "copy/mlops_nb", ignore=shutil.ignore_patterns("labextension", "__pycache__"))
    code = ("import json, os, sys; sys.path.insert(0, sys.argv[2]); from mlops_nb.pipeline.processes import start; "
            "child = start('probe:loaded', {'names': ['numpy']}, environment={**os.environ, 'PYTHONPATH': sys.argv[2]}, folder=sys.argv[1]); child.wait(); print(json.dumps(child.cold_because))")
    return {"args": [sys.executable, "-c", code, str(home), str(home / "copy")], "capture_output": True, "text": True, "cwd": home}


def run_copied(how: dict) -> tuple[dict, str]:
    lines = subprocess.run(**how, timeout=PATIENCE * 2, check=True).stdout.splitlines()
    return json.loads(lines[0]), json.loads(lines[1])


def test_a_stale_parent_is_replaced(home):
    how = copied(home)
    (before, why), (same, _) = run_copied(how), run_copied(how)
    assert why == "" and same["parent"] == before["parent"]
    with (home / "copy/mlops_nb/core/errors.py").open("a") as file:
        file.write("\n# edited\n")
    after, why = run_copied(how)
    assert why == "" and after["parent"] != before["parent"]
    assert soon(lambda: gone(before["parent"]))


def test_a_module_that_starts_a_thread_makes_forking_unsafe_once(home):
    how = copied(home)
    (home / "copy/mlops_nb/pipeline/restless.py").write_text("import threading\nthreading.Thread(target=threading.Event().wait, name='pulse', daemon=True).start()\n")
    said, why = run_copied(how)
    assert why == "importing mlops_nb.pipeline.restless: a thread runs (pulse)" and said["loaded"] == [False]
    assert soon(lambda: not parents(home))
    said, why = run_copied(how)
    assert why == "" and said["loaded"] == [True]
    assert json.loads(preloads.memory_file().read_text())["never"] == {"mlops_nb.pipeline.restless": "importing mlops_nb.pipeline.restless: a thread runs (pulse)"}


def test_a_project_file_with_a_library_s_name_starts_cold(home):
    (home / "numpy.py").write_text("")
    said, child = told(home, "where")
    assert child.cold_because.startswith("numpy.py in the folder of the process hides the library numpy")
    assert said["file"] == str(home / "numpy.py")


def test_a_broken_parent_is_given_up(home, monkeypatch):
    monkeypatch.setattr(warm, "OURS", home / "nothing/here")
    said, child = told(home, "loaded", {"names": ["numpy"]})
    assert said["loaded"] == [False] and child.cold_because


@pytest.mark.parametrize(("wish", "why"), [({"MLOPS_WARM": "0"}, "MLOPS_WARM=0 turns warm processes off"), ({"MLOPS_WARM_WAIT_S": "0.001"}, "takes over 0.001 s to import")], ids=["off", "slow"])
def test_it_says_why_it_starts_cold(home, wish, why):
    said, child = told(home, "loaded", {"names": ["numpy"]}, environment={**os.environ, **wish})
    assert why in child.cold_because and said["loaded"] == [False]


def test_an_open_graphics_card_makes_forking_unsafe():
    """Told from the open files, so that no library has to be asked. (The link is pretended: test machines have no such card.)"""
    code = "import os; from mlops_nb.pipeline.preloads import unsafe; before = unsafe(); os.readlink = lambda _: '/dev/nvidia0'; print([before, unsafe()])"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout
    assert said.strip() == "['', 'the graphics card is open']"


# ---- private

def test_secrets_are_on_no_command_line_and_not_in_the_parent(home):
    secret = "s3cr3t-of-the-shop"
    for how in (True, False):
        child = begin(home, "use", {"mb": 1, "seconds": 300}, warm=how, environment={**os.environ, "SHOP_TOKEN": secret})
        for one in psutil.process_iter(["cmdline"]):
            assert secret not in " ".join(one.info["cmdline"] or [])
        if how:
            assert secret not in str(psutil.Process(warm.status()["pid"]).environ())
        child.close()


def test_an_open_folder_is_not_trusted(home):
    (home / "run/mlops_nb.warm").mkdir(mode=0o777)
    (home / "run/mlops_nb.warm").chmod(0o777)
    said, child = told(home, "loaded", {"names": ["numpy"]})
    assert "is open to others" in child.cold_because and said["loaded"] == [False]


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED") or os.getuid() != 0, reason="needs root, to become somebody else")
def test_another_user_is_refused(tmp_path):
    place = Path(tempfile.mkdtemp(prefix="w"))
    place.chmod(0o777)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(place / "door"))
        (place / "door").chmod(0o777)
        door.listen()
        code = "import os, socket, sys; os.setuid(65534); line = socket.socket(socket.AF_UNIX); line.connect(sys.argv[1]); line.recv(1)"
        stranger = subprocess.Popen([sys.executable, "-c", code, str(place / "door")])
        door.settimeout(PATIENCE)
        visitor, _ = door.accept()
        with visitor:
            assert not warm.same_user(visitor)
        stranger.wait(PATIENCE)
    shutil.rmtree(place)


def test_a_long_runtime_path_gives_way(home, monkeypatch):
    long = home / ("long" * 30)
    long.mkdir()
    places = [warm.meeting_place({**os.environ, "XDG_RUNTIME_DIR": str(one)}) for one in (long, home / "missing", home / "run")]
    assert all(len(bytes(place)) < 100 and place.parent.stat().st_mode & 0o777 == 0o700 for place in places)
    assert len({place.parent for place in places}) == 3, "parents of different runtime folders do not meet"
    for place in places[:2]:
        place.parent.rmdir()


# ---- what it imports

def test_a_runner_prepares_what_its_notebooks_import(home):
    warm.prepare(["yaml", "tqdm.auto", "probe", "no_such_module"])
    said, child = told(home, "loaded", {"names": ["yaml", "tqdm.auto", "probe"]})
    assert child.cold_because == "" and said["loaded"][:2] == [True, True]
    assert list(preloads.recall()["modules"]) == ["yaml", "tqdm.auto"]


def test_an_idle_parent_imports_what_is_learnt(home):
    first, _ = told(home, "loaded", {"names": ["cronsim"]})
    preloads.remember(["cronsim"], runs=1)
    assert first["loaded"] == [False]
    assert soon(lambda: told(home, "loaded", {"names": ["cronsim"]})[0] == {"loaded": [True], "parent": first["parent"]})


def test_a_kernel_tells_what_it_used(home):
    (home / "kernel.py").write_text(textwrap.dedent("""
        import sys
        def run(names):
            import probe  # a project's own module
            main = vars(sys.modules["__main__"])
            for name in names:
                main[name] = __import__(name)
            from mlops_nb.pipeline import warm
            warm.learn()
    """))
    preloads.remember(["yaml", "tqdm"], runs=1)
    for names in (["yaml", "psutil"], ["psutil"]):
        child = start("kernel:run", {"names": names}, environment=dict(os.environ), folder=home)
        assert child.wait(PATIENCE).code == 0 and child.cold_because == ""
    memory = preloads.recall()
    modules = {name: memory["modules"].get(name) for name in ("yaml", "tqdm", "psutil", "probe", "kernel", "json")}
    assert memory["runs"] == 3 and modules == {"yaml": 2, "tqdm": 1, "psutil": 3, "probe": None, "kernel": None, "json": None}


def test_many_kernels_tell_at_once(home):
    code = "from mlops_nb.pipeline.preloads import remember; import sys; [remember([f'library{sys.argv[1]}.part{i}'], runs=1) for i in range(10)]"
    tellers = [subprocess.Popen([sys.executable, "-c", code, str(i)], cwd=ROOT) for i in range(3)]
    assert [one.wait(PATIENCE) for one in tellers] == [0] * 3
    assert preloads.recall()["runs"] == 30 and len(preloads.recall()["modules"]) == 30


def test_a_damaged_memory_is_begun_anew(home):
    preloads.remember(["yaml"])
    preloads.memory_file().write_text("{")
    assert preloads.recall()["modules"] == {}
    assert told(home, "loaded", {"names": ["numpy"]})[0]["loaded"] == [True]


# ---- where nothing can be forked

def test_without_fork(home, monkeypatch):
    monkeypatch.setattr(processes, "FORKS", False)
    said, child = told(home, "length", {"text": "é" * 100_000})
    assert said == {"length": 100_000} and child.cold_because == "this system cannot fork"
    assert begin(home, "end", {"how": "code"}).wait(PATIENCE).code == 3
    reader, writer = os.pipe()
    child = begin(home, "family", stdout=writer)
    family = first_line(child, reader)
    child.close()
    assert soon(lambda: gone(family["pid"]))
    os.kill(family["other"], signal.SIGKILL)
    os.close(reader), os.close(writer)


def test_what_cannot_be_started(home):
    with pytest.raises(NotFound, match="create it first"):
        begin(home / "nowhere", "end")
    with pytest.raises(Invalid, match="cannot be written as JSON"):
        begin(home, "end", {"how": {1, 2}})
    with (home / "said").open("w+b") as said:
        child = start("no_such_module:run", {}, environment=dict(os.environ), folder=home, stderr=said.fileno())
        assert child.wait(PATIENCE).code == 1
        said.seek(0)
        assert b"No module named 'no_such_module'" in said.read()
