"""What would break for somebody whose disk, machine or colleague fails at the wrong moment: damage that goes unseen, versions that are lost."""

import os
import random
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from frames import DATA, orders, same, shop  # noqa: F401
from mlops_nb.core.errors import Conflict, Invalid, Unavailable
from mlops_nb.data.store import load, save
from mlops_nb.data.upkeep import verify
from mlops_nb.data.versions import datasets, packs_of, store, versions


def test_a_flipped_byte_anywhere_is_named_and_mended(shop, orders):
    save(orders.head(2000), "orders"), save(orders.tail(10), "other")
    pack = max(packs_of().paths, key=lambda path: path.stat().st_size)
    whole, dice = pack.read_bytes(), random.Random(0)
    pack.chmod(0o644)
    for at in [0, len(whole) - 1, *(dice.randrange(len(whole)) for _ in range(40))]:
        pack.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << dice.randrange(8)]) + whole[at + 1:])
        report = verify()
        assert report.passed == (at < 8) and (at < 8 or any("orders@1" in row["versions"] for row in report.facts["damage"])), at
        for as_ in ("", "path"):
            if at >= 8:
                with pytest.raises(Invalid, match=r"orders@1 .*(damaged|incomplete): chunk [0-9a-f]{12}"):
                    load("orders@1", as_=as_)
        assert len(load("other")) == 10
    pack.write_bytes(whole[:-1])
    with pytest.raises(Invalid, match="incomplete"):
        load("orders@1")
    pack.unlink()
    assert not verify().passed
    with pytest.raises(Invalid, match="incomplete"):
        load("orders@1")
    save(orders.head(2000), "orders")  # the same content again mends what was damaged
    same(load("orders@1"), orders.head(2000))
    assert verify().passed


FORKS = """
import os, random, signal, sys, time, traceback
import blake3, filelock, numpy as np, pandas as pd, pyarrow as pa, pyarrow.compute, pyarrow.parquet
import mlops_nb.data.tables
from mlops_nb.core.settings import in_project
from mlops_nb.data.store import load, save
from mlops_nb.data.versions import manifests, versions


def child(call):
    "A process of its own, without the seconds that importing takes."
    if pid := os.fork():
        return pid
    try:
        with in_project(sys.argv[1]):
            call()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def die_at(at):
    "SIGKILL at the so-manieth call that changes the disk."
    count = 0
    def deadly(call):
        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return counted
    for name in ["replace", "fsync", "chmod", "fchmod", "mkdir", "open", "unlink", "fdopen", "close", "rmdir", "utime"]:
        setattr(os, name, deadly(getattr(os, name)))

def values(who, i):
    return np.random.default_rng([who, i]).normal(size=20_000)

def write(who, n, done=None):
    for i in range(n):
        save(pd.DataFrame({"x": values(who, i)}), "orders", message=f"{who}:{i}")
        if done is not None:
            os.write(done, b".")

def verify(n=None):
    "Every version that is there is what was saved under it, and the numbers have no gap."
    if there := manifests("orders"):
        for one in versions("orders"):
            np.testing.assert_array_equal(load(one.address)["x"], values(*map(int, one.message.split(":"))))
    assert sorted(there) == list(range(1, len(there) + 1)) and n in (None, len(there)), there
"""


def forked(shop, script):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS + script, str(shop)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_eight_writers_at_once_all_land(shop):
    forked(shop, """
writers = [child(lambda who=who: write(who, 3)) for who in range(8)]
assert [ended(pid) for pid in writers] == [0] * 8
assert ended(child(lambda: verify(24))) == 0
""")
    assert {one.message for one in versions("orders")} == {f"{who}:{i}" for who in range(8) for i in range(3)}


def test_killed_at_any_time_every_version_is_good(shop):
    forked(shop, """
dice = random.Random(1)
for attempt in range(15):
    heard, done = os.pipe()
    writers = [child(lambda who=who: write(2 * attempt + who, 1000, done)) for who in range(2)]
    for _ in range(dice.randrange(4)):  # not before so many versions are there, however slow this machine is
        os.read(heard, 1)
    time.sleep(dice.uniform(0, 0.1))
    for pid in writers:
        os.kill(pid, signal.SIGKILL)
    assert [ended(pid) for pid in writers] == [-9, -9]
    assert ended(child(verify)) == 0
assert ended(child(lambda: write(99, 1))) == 0  # the lock of a killed writer holds nobody up
assert ended(child(verify)) == 0
""")
    assert len(versions("orders")) > 5


def test_killed_at_every_write_rename_and_sync(shop):
    """SIGKILL at the 1st, 2nd, 3rd … call that changes the disk, until a save gets through without meeting it."""
    deaths = forked(shop, """
def save_until(at):
    die_at(at)
    write(1, 1)

assert ended(child(lambda: write(0, 1))) == 0
at, code = 0, -9
while code == -9:
    at += 1
    code = ended(child(lambda: save_until(at)))
    assert code in (0, -9) and at < 100
    assert ended(child(verify)) == 0
print(at)
""")
    assert int(deaths[0]) > 10 and [one.message for one in versions("orders")] == ["0:0", "1:0"]


# ---------------------------------------------------------------- disks
@pytest.fixture
def small_disk(shop):
    place = shop / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True, timeout=300)
    if done.returncode:
        pytest.skip("mounting a small disk takes root")
    (shop / "settings.ini").write_text("[project]\nname = shop\n[data]\nstore = disk/store\n")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True, timeout=300)


def test_a_full_disk(small_disk, orders):
    save(orders, "orders")
    noise = np.random.default_rng(0).integers(0, 2**62, 1_000_000)
    (small_disk.parent / "noise.bin").write_bytes(noise.tobytes())
    for data in (pd.DataFrame({"x": noise}), small_disk.parent / "noise.bin"):
        with pytest.raises(Unavailable, match="the disk is full; free some space.*unharmed") as caught:
            save(data, "orders")
        assert "\n" not in str(caught.value)
    assert [one.version for one in versions("orders")] == [1]
    same(load("orders"), orders)
    assert save(orders.head(10), "orders").version == 2  # the failed attempts left no litter behind


def test_a_read_only_disk(small_disk, orders):
    save(orders, "orders")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, timeout=300)
    for data in (orders.head(3), DATA / "online_retail_small.parquet"):
        with pytest.raises(Unavailable, match="read-only; choose another folder"):
            save(data, "orders")
    same(load("orders"), orders)
    assert load("orders", as_="path").exists() and datasets() == ["orders"]


def test_a_file_where_the_store_should_be(shop, orders):
    (shop / ".mlops" / "data").write_text("")
    with pytest.raises(Unavailable, match="a file stands where a folder was expected"):
        save(orders, "orders")


def test_somebody_else_who_never_finishes(shop, orders, monkeypatch):
    import mlops_nb.data.versions as module
    from mlops_nb.core.files import locked
    monkeypatch.setattr(module, "locked", lambda path, **known: locked(path, timeout_s=0, **known))
    with locked(store() / ".lock"), pytest.raises(Conflict, match="somebody else is writing to the data store"):
        save(orders.head(1), "orders")


def test_old_drafts_are_swept_young_ones_are_not(shop, orders):
    save(orders.head(1), "t")
    drafts = store() / "packs" / "drafts"
    for name, age_s in (("old", 90_000), ("young", 60)):
        (drafts / name).write_text("x")
        os.utime(drafts / name, (time.time() - age_s,) * 2)
    save(orders.head(2), "t")
    assert [path.name for path in drafts.iterdir()] == ["young"]


def test_killed_at_every_step_of_going_back_merging_dropping_and_cleaning_up(shop):
    """SIGKILL at the 1st, 2nd, 3rd … call that changes the disk; after each the versions that were there are good."""
    deaths = forked(shop, """
from mlops_nb.data.branches import drop, merge, rollback, tag
from mlops_nb.data.upkeep import gc, verify as whole
import mlops_nb.data.selection, mlops_nb.data.merging
frames = [pd.DataFrame({"id": range(300 - i), "x": values(0, i)[:300 - i]}) for i in range(3)]

def prepare():
    for frame in frames:
        save(frame, "t", key="id")
    save(frames[0].assign(x=1.0), "t:b"), save(frames[0].assign(y=2.0), "t:c")

def work():
    rollback("t@1"), tag("t@2", "gold"), merge("t:c"), drop("t:b"), gc(grace_days=0), gc(grace_days=0)

def work_until(at):
    die_at(at)
    work()

def good():
    for number, frame in enumerate(frames, 1):
        pd.testing.assert_frame_equal(load(f"t@{number}"), frame)
    assert whole().passed

assert ended(child(prepare)) == 0
at, code = 0, -9
while code == -9:
    at += 5  # every fifth: the cases in between are alike
    code = ended(child(lambda: work_until(at)))
    assert code in (0, -9, 1) and at < 1000, (at, code)
    assert ended(child(good)) == 0, at
    if code == 1:
        code = -9 if at < 200 else 0  # the branch is gone already: what was done before the kill stays done
print(at)
""")
    assert int(deaths[0]) > 10
