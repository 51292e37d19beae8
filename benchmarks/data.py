"""What a version costs: bytes added and seconds, beside DVC and Oxen doing the same with the same table; and a folder of many small files.

The peers are looked for in folders of their own below MLOPS_BENCH_PEERS (`dvc/bin/dvc`, `oxen/bin/python`), because they do not live in one environment with us.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.measure import Figure, record

ROWS = int(os.environ.get("MLOPS_BENCH_ROWS", 4_000_000))
FILES = int(os.environ.get("MLOPS_BENCH_FILES", 100_000))
PEERS = Path(os.environ.get("MLOPS_BENCH_PEERS", "/nonexistent"))


def table(rows: int = ROWS, seed: int = 0) -> pd.DataFrame:
    """Ids, times, skewed categories, floats with gaps, text: 16 columns."""
    dice = np.random.default_rng(seed)
    words = np.array(["".join(dice.choice(list("abcdefghijklmnopqrstuvwxyz"), dice.integers(3, 9))) for _ in range(5000)], dtype=object)
    skewed = lambda kinds, power: np.minimum(dice.zipf(power, rows) - 1, kinds - 1)
    word = lambda: pd.Series(words[dice.integers(0, 5000, rows)], dtype="str")
    return pd.DataFrame({
        "id": np.arange(rows), "customer": dice.integers(0, 300_000, rows), "item": skewed(50_000, 1.3), "session": dice.integers(0, 2**40, rows),
        "time": np.datetime64("2024-01-01T00:00:00", "us") + np.sort(dice.integers(0, 365 * 86_400_000_000, rows)).astype("timedelta64[us]"),
        "country": pd.Categorical.from_codes(skewed(40, 1.5), [f"country {i}" for i in range(40)]), "channel": pd.Series(np.array(["web", "app", "shop", "phone"])[skewed(4, 2.0)], dtype="str"),
        "price": np.round(dice.lognormal(2, 1, rows), 2), "quantity": skewed(100, 2.0).astype("int32") + 1, "score": dice.normal(size=rows), "embedding": dice.normal(size=rows),
        "weight": np.where(dice.random(rows) < 0.05, np.nan, dice.gamma(2, 1, rows)), "discount": np.where(dice.random(rows) < 0.3, np.nan, np.round(dice.random(rows), 2)),
        "returned": dice.random(rows) < 0.1, "latitude": dice.normal(48, 3, rows).astype("float32"), "text": word() + " " + word() + " " + word(),
    })


def edits(frame: pd.DataFrame) -> dict[str, Callable[[], pd.DataFrame]]:
    """The daily life of a table."""
    rows, dice = len(frame), np.random.default_rng(1)

    def edited() -> pd.DataFrame:
        changed = frame.copy()
        at = dice.choice(rows, rows // 100, replace=False)
        changed.loc[at, "price"] = np.round(dice.lognormal(2, 1, len(at)), 2)
        return changed

    return {
        "A 1% appended": lambda: pd.concat([frame, table(rows // 100, seed=2).assign(id=np.arange(rows, rows + rows // 100))], ignore_index=True).astype(frame.dtypes.to_dict()),
        "B 1% of one column edited": edited,
        "C a block of 0.1% deleted": lambda: frame.drop(frame.index[rows // 2: rows // 2 + rows // 1000]),
        "D one column added": lambda: frame.assign(margin=dice.normal(size=rows)),
        "E 0.5% of rows deleted": lambda: frame.drop(dice.choice(rows, rows // 200, replace=False)),
    }


LIMITS = {"A": 0.03, "B": 0.06, "C": 0.20, "D": 0.10, "E": 0.10}


def timed(call: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    return (lambda result: (time.perf_counter() - start, result))(call())


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Dvc:
    """DVC, as one uses it: write Parquet, add it; check it out and read it."""

    def __init__(self, folder: Path):
        self.folder, self.program = folder, PEERS / "dvc" / "bin" / "dvc"
        folder.mkdir()
        run = lambda *words: subprocess.run(words, cwd=folder, check=True, capture_output=True)
        run("git", "init", "-q")
        run(str(self.program), "init", "-q")
        run(str(self.program), "config", "core.analytics", "false")

    def __call__(self, *words: str) -> None:
        subprocess.run([str(self.program), *words], cwd=self.folder, check=True, capture_output=True)

    def stored(self) -> int:
        return size_of(self.folder / ".dvc" / "cache")

    def save(self, frame: pd.DataFrame) -> None:
        path = self.folder / "orders.parquet"
        path.unlink(missing_ok=True)
        frame.to_parquet(path)
        self("add", "-q", "orders.parquet")

    def load(self) -> pd.DataFrame:
        (self.folder / "orders.parquet").unlink()
        self("checkout", "-q", "orders.parquet.dvc")
        return pd.read_parquet(self.folder / "orders.parquet")


OXEN = """
import sys, oxen
repo = oxen.Repo(sys.argv[1])
if sys.argv[2] == "init":
    oxen.user.config_user("b", "b@b") if hasattr(oxen, "user") else None
    repo.init()
else:
    repo.add("orders.parquet"); repo.commit(sys.argv[2])
"""


class Oxen:
    """Oxen's own Python package, in its own environment."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        self.python("init")

    def python(self, what: str) -> None:
        done = subprocess.run([str(PEERS / "oxen" / "bin" / "python"), "-c", OXEN, str(self.folder), what], capture_output=True, text=True, env={**os.environ, "HOME": str(self.folder.parent)})
        if done.returncode:
            raise RuntimeError(done.stderr[-500:])

    def save(self, frame: pd.DataFrame) -> None:
        frame.to_parquet(self.folder / "orders.parquet")
        self.python("version")


def peer(kind: type, folder: Path) -> object | None:
    name = kind.__name__.lower()
    if not (PEERS / name).is_dir():
        print(f"{name} is not there (MLOPS_BENCH_PEERS), so it is not compared with")
        return None
    try:
        return kind(folder)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        print(f"{name} does not run here: {error}")
        return None


def figure(promise: str, ours: float, name: str, theirs: float | None, at_most: float, unit: str = "s") -> Figure:
    ratio = ours / theirs if theirs else None
    return Figure(promise, ours, name if theirs else f"{name}: not there", theirs, ratio, f"at most {at_most:g} of it", ratio <= at_most if ratio is not None else None, unit)


def tables(folder: Path) -> list[Figure]:
    """Bytes and seconds of five edits to one large table."""
    from mlops_nb.data.branches import rollback
    from mlops_nb.data.diff import diff
    from mlops_nb.data.store import load, save

    frame = table()
    dvc, oxen, figures, times = peer(Dvc, folder / "dvc"), peer(Oxen, folder / "oxen"), [], {"ours": [], "dvc": [], "oxen": [], "load": [], "checkout": []}
    save(frame.head(1000), "warm-up")
    taken, first = timed(lambda: save(frame, "orders", key="id"))
    times["ours"].append(taken)
    for name, tool in (("dvc", dvc), ("oxen", oxen)):
        times[name] += [timed(lambda: tool.save(frame))[0]] if tool else []
    print(f"{len(frame):,} rows x {frame.shape[1]} columns, {frame.memory_usage(deep=True).sum() / 1e6:,.0f} MB in memory, {first.added_bytes / 1e6:,.0f} MB stored by us, "
          f"{dvc.stored() / 1e6 if dvc else 0:,.0f} MB by DVC; first save: ours {taken:.2f} s" + "".join(f", {name} {times[name][0]:.2f} s" for name in ("dvc", "oxen") if times[name]))
    for name, make in edits(frame).items():
        changed = make()
        before = dvc.stored() if dvc else 0
        taken, saved = timed(lambda: save(changed, "orders"))
        times["ours"].append(taken)
        for other, tool in (("dvc", dvc), ("oxen", oxen)):
            times[other] += [timed(lambda: tool.save(changed))[0]] if tool else []
        added = dvc.stored() - before if dvc else None
        figures.append(figure(f"stored by {name}", saved.added_bytes / 1e6, "dvc add", added and added / 1e6, LIMITS[name[0]], "MB"))
        pd.testing.assert_frame_equal(load("orders"), changed)
        turns = [(timed(lambda: load("orders"))[0], timed(dvc.load)[0] if dvc else None) for _ in range(3)]  # in turn: the first reader of fresh memory pays for it
        times["load"].append(statistics.median(ours for ours, _ in turns))
        times["checkout"] += [statistics.median(theirs for _, theirs in turns)] if dvc else []
        print(f"  {name}: save {times['ours'][-1]:.2f} s, load {times['load'][-1]:.2f} s" + (f"; DVC {times['dvc'][-1]:.2f} s, {times['checkout'][-1]:.2f} s" if dvc else ""), flush=True)
        del changed
        rollback("orders@1")
    median = lambda name: statistics.median(times[name]) if times[name] else None
    changes, _ = timed(lambda: diff("orders@1", "orders@4"))
    return [*figures, figure("first save of a frame", times["ours"][0], "to_parquet + dvc add", times["dvc"][0] if dvc else None, 0.5),
            figure("saving an edited version, median", statistics.median(times["ours"][1:]), "to_parquet + dvc add", median("dvc"), 0.5),
            figure("first save of a frame", times["ours"][0], "to_parquet + oxen add, commit", times["oxen"][0] if oxen else None, 1.0),
            figure("saving an edited version, median", statistics.median(times["ours"][1:]), "to_parquet + oxen add, commit", median("oxen"), 1.0),
            figure("loading a version, median", median("load"), "dvc checkout + read_parquet", median("checkout"), 0.5),
            Figure("diff of two versions with a key", changes, "no peer", None, None, "at most 10 s", changes <= 10)]


def folders(folder: Path) -> list[Figure]:
    """Many small files, saved twice with one of them changed."""
    from mlops_nb.data.store import save

    dvc, dice = peer(Dvc, folder / "dvc-files"), np.random.default_rng(3)
    place = (dvc.folder if dvc else folder) / "files"
    for i in range(FILES):
        (place / f"{i // 1000:03}").mkdir(parents=True, exist_ok=True)
        (place / f"{i // 1000:03}" / f"{i}.bin").write_bytes(dice.bytes(200))
    time.sleep(2.5)
    ours, theirs = [], []
    for turn in range(2):
        ours.append(timed(lambda: save(place, "files"))[0])
        theirs += [timed(lambda: dvc("add", "-q", "files"))[0]] if dvc else []
        (place / "000" / "7.bin").unlink()
        (place / "000" / "7.bin").write_bytes(b"changed")
    return [figure(f"{FILES:,} small files", ours[0], "dvc add", theirs[0] if dvc else None, 0.3),
            figure("the same with one file changed", ours[1], "dvc add", theirs[1] if dvc else None, 0.1)]


MEMORY = """
import gc, sys
sys.path.insert(0, sys.argv[1])
import pyarrow, pyarrow.parquet, mlops_nb.data.stored, mlops_nb.data.selection, mlops_nb.data.fingerprint
from benchmarks.data import table
from mlops_nb.data.store import save
frame = table()
save(frame.head(1000), "warm-up")
gc.collect(), pyarrow.default_memory_pool().release_unused()
size, data = frame.memory_usage(deep=True).sum(), frame if sys.argv[2] == "first" else frame.iloc[:-1000]
open("/proc/self/clear_refs", "w").write("5")
now = int(open("/proc/self/statm").read().split()[1]) * 4096
save(data, "memory")
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
print((peak - now + size) / size)
"""


def memory(folder: Path) -> list[Figure]:
    """The peak of a save, the frame itself included, each in a process of its own (Linux)."""
    figures = []
    for what, promise in (("first", "peak memory of a first save"), ("edited", "peak memory of saving an edited version")):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY, str(Path(__file__).parent.parent), what], cwd=folder, capture_output=True, text=True, env={**os.environ, "MLOPS_PROGRESS": "0"})
        if done.returncode:
            print(done.stderr[-800:])
            continue
        ratio = float(done.stdout)
        figures.append(Figure(promise, ratio, "the frame in memory", 1.0, ratio, "at most 1.5 of it", ratio <= 1.5, "times the frame"))
    return figures


def main() -> None:
    from mlops_nb.core.settings import init

    os.environ["MLOPS_PROGRESS"] = "0"
    folder, here = Path(tempfile.mkdtemp(prefix="mlops-bench-")), Path.cwd()
    try:
        init(str(folder), name="bench")
        os.chdir(folder)
        figures = tables(folder) + folders(folder) + memory(folder)
    finally:
        os.chdir(here)
        shutil.rmtree(folder, ignore_errors=True)
    record("data", figures)


if __name__ == "__main__":
    main()
