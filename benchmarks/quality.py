"""Which wrong cells and labels a check finds, beside a plain IQR + null check; and how long it takes on a million rows, beside other tools."""

from __future__ import annotations

import os
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.measure import ROOT, Figure, record

SEED, SHARE = 0, 0.005
Cells = set[tuple[int, str]]


# ---------------------------------------------------------------- what was found, against what is true
def scores(found: set, truth: set) -> dict[str, float]:
    hit = len(found & truth)
    precision, recall = hit / len(found) if found else 0.0, hit / len(truth) if truth else 0.0
    return {"precision": precision, "recall": recall, "F1": 2 * precision * recall / (precision + recall) if hit else 0.0}


def plain_check(frame: pd.DataFrame) -> Cells:
    """What anybody would write: missing cells, and numbers outside Tukey's fences."""
    found: Cells = set()
    for name in frame:
        wrong = frame[name].isna().to_numpy(copy=True)
        if pd.api.types.is_numeric_dtype(frame[name]) and not pd.api.types.is_bool_dtype(frame[name]):
            low, high = frame[name].quantile([0.25, 0.75])
            wrong |= ((frame[name] < low - 1.5 * (high - low)) | (frame[name] > high + 1.5 * (high - low))).fillna(False).to_numpy(dtype=bool)
        found |= {(int(row), name) for row in np.flatnonzero(wrong)}
    return found


def our_check(frame: pd.DataFrame) -> Cells:
    from mlops_nb.data.suspects import suspects

    table = suspects(frame, seed=SEED)
    return set(zip(table["row"].tolist(), table["column"].tolist()))


# ---------------------------------------------------------------- spoiling clean data, with a seed
def misprint(text: str, rng: np.random.Generator) -> str:
    """One letter replaced, left out, doubled or exchanged with the next."""
    letters = [i for i, letter in enumerate(text) if letter.isalnum()]
    if not letters:
        return text
    i, other = int(rng.choice(letters)), str(rng.choice(list(string.ascii_lowercase)))
    return [text[:i] + other + text[i + 1:], text[:i] + text[i + 1:], text[:i] + text[i] + text[i:], text[:i] + text[i + 1:i + 2] + text[i] + text[i + 2:]][rng.integers(4)]


def spoil(frame: pd.DataFrame, kind: str, *, share: float = SHARE, seed: int = SEED) -> tuple[pd.DataFrame, Cells]:
    """A copy with a share of each fitting column's cells made wrong, and which cells these are."""
    rng, dirty = np.random.default_rng(seed), frame.copy()
    for name in frame:
        column, rows = frame[name], np.sort(rng.choice(len(frame), max(1, int(share * len(frame))), replace=False))
        number = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
        moment, text = pd.api.types.is_datetime64_any_dtype(column), pd.api.types.is_string_dtype(column)
        if kind == "misprints" and text:
            new = [misprint(value, rng) for value in column.iloc[rows]]
        elif kind == "swaps":
            new = column.iloc[rng.permutation(rows)].to_numpy()
        elif kind == "outliers" and number:
            dirty[name] = dirty[name].astype(float)
            new = column.iloc[rows].to_numpy(float) * rng.choice([-10, 100, 1000], len(rows)) + rng.choice([-1, 1], len(rows)) * 10 * column.std()
        elif kind == "dates" and moment:
            new = pd.to_datetime(rng.choice(["1899-12-30", "1753-01-01", "2099-01-01", "1970-01-01"], len(rows))).astype(column.dtype)
        elif kind == "gaps":
            dirty[name] = (column.astype(float) if number else column).mask(np.isin(np.arange(len(frame)), rows))
            continue
        else:
            continue
        dirty.iloc[rows, dirty.columns.get_loc(name)] = new
    changed = (dirty != frame) & ~(dirty.isna() & frame.isna())
    return dirty, {(int(row), frame.columns[column]) for row, column in zip(*np.nonzero(changed.to_numpy()))}


def together(frame: pd.DataFrame) -> tuple[pd.DataFrame, Cells]:
    dirty, truth = frame, set()
    for turn, kind in enumerate(("misprints", "swaps", "outliers", "dates", "gaps")):
        dirty, cells = spoil(dirty, kind, share=SHARE / 2, seed=SEED + turn)
        truth |= cells
    return dirty, truth


def spoilt_sets() -> dict[str, tuple[pd.DataFrame, Cells]]:
    clean = pd.read_parquet(ROOT / "examples" / "recommender" / "data" / "online_retail_small.parquet").dropna().drop_duplicates().head(50_000).reset_index(drop=True)
    return {**{f"online retail, {kind}": spoil(clean, kind) for kind in ("misprints", "swaps", "outliers", "dates", "gaps")}, "online retail, all of these": together(clean)}


# ---------------------------------------------------------------- further data sets
def folder() -> Path | None:
    given = os.environ.get("MLOPS_BENCH_DATA", "")
    if not given:
        print("MLOPS_BENCH_DATA is not set: the real dirty data sets are left out (a folder of */*_dirty.parquet with *_errors.parquet, and of parquet files with given_label, p0, p1, … and is_error).")
    return Path(given) if given else None


def real_sets(place: Path) -> dict[str, tuple[pd.DataFrame, Cells]]:
    found = {}
    for path in sorted(place.rglob("*_dirty.parquet")):
        errors = pd.read_parquet(path.with_name(path.name.replace("_dirty", "_errors")))
        found[path.name.replace("_dirty.parquet", "")] = (pd.read_parquet(path), set(zip(errors["row"].astype(int).tolist(), errors["column"].tolist())))
    return found


def label_sets(place: Path) -> dict[str, pd.DataFrame]:
    from pyarrow import parquet

    wanted = {"given_label", "p0", "is_error"}
    return {path.stem: pd.read_parquet(path) for path in sorted(place.rglob("*.parquet")) if wanted <= set(parquet.read_schema(path).names)}


def cells_found(sets: dict[str, tuple[pd.DataFrame, Cells]]) -> None:
    print(f"\n{'wrong cells in':<32}{'rows':>9}{'wrong':>8} | {'ours':^26} | {'IQR + null check':^26}")
    for name, (dirty, truth) in sets.items():
        ours, theirs = scores(our_check(dirty), truth), scores(plain_check(dirty), truth)
        row = " | ".join("  ".join(f"{word[0]} {value:.3f}" for word, value in one.items()).center(26) for one in (ours, theirs))
        print(f"{name:<32}{len(dirty):>9,}{len(truth):>8,} | {row} | {'kept' if ours['F1'] > theirs['F1'] else 'MISSED'}")


def labels_found(sets: dict[str, pd.DataFrame]) -> None:
    """Only reviewed rows have a known truth; so precision counts among those."""
    from mlops_nb.data.labels import label_issues

    print(f"\n{'wrong labels in':<32}{'rows':>9}{'wrong':>8} | {'ours':^26} | {'IQR + null check':^26}")
    for name, frame in sets.items():
        columns = sorted((column for column in frame if column[:1] == "p" and column[1:].isdigit()), key=lambda column: int(column[1:]))
        reviewed = frame["reviewed"].to_numpy(bool) if "reviewed" in frame else np.ones(len(frame), bool)
        truth = set(np.flatnonzero(frame["is_error"] & reviewed).tolist())
        known = set(np.flatnonzero(reviewed).tolist())
        ours = scores(set(np.flatnonzero(label_issues(frame["given_label"].to_numpy(int), frame[columns].to_numpy(float))).tolist()) & known, truth)
        theirs = scores({row for row, _ in plain_check(frame[[*columns, "given_label"]])} & known, truth)
        row = " | ".join("  ".join(f"{word[0]} {value:.3f}" for word, value in one.items()).center(26) for one in (ours, theirs))
        print(f"{name:<32}{len(frame):>9,}{len(truth):>8,} | {row} | {'kept' if ours['F1'] > theirs['F1'] else 'MISSED'}")


# ---------------------------------------------------------------- how long it takes
def wide_table(n: int = 1_000_000) -> pd.DataFrame:
    """A million rows and thirty columns, seeded: floats with gaps, whole numbers, categories, times, flags, a class that follows from some of them."""
    rng = np.random.default_rng(SEED)
    columns: dict[str, object] = {f"x{i}": rng.normal(i, 1 + i, n).round(3) for i in range(12)}
    columns |= {f"n{i}": rng.integers(0, 10 ** (i + 2), n) for i in range(6)}
    columns |= {f"c{i}": np.array([f"value {j}" for j in range(5 * 4**i)])[rng.zipf(1.6, n) % (5 * 4**i)] for i in range(6)}
    columns |= {f"t{i}": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 31_000_000, n), "s") for i in range(2)}
    columns |= {f"f{i}": rng.random(n) < 0.3 for i in range(2)}
    frame = pd.DataFrame(columns)
    frame["x3"] = frame["x3"].mask(rng.random(n) < 0.05)
    frame["group"] = "g" + (frame["n1"] % 40).astype(str)
    frame["label"] = np.where(frame["x0"] + frame["x1"] / 2 + rng.normal(0, 0.3, n) > 0.5, "yes", "no")
    return frame


WHOLE = """
import sys, time, warnings
warnings.filterwarnings("ignore")
import pandas as pd
import pyarrow
from mlops_nb.data.quality import check
memory = lambda what: int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1]) / 2**10
import cleanlab.filter, sklearn.ensemble, matplotlib.figure  # libraries are no part of the data's memory
frame = pd.read_parquet(sys.argv[1])
pyarrow.default_memory_pool().release_unused()
size, before = frame.memory_usage(deep=True).sum() / 2**20, memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak of reading the file is forgotten
start, cpu = time.perf_counter(), time.process_time()
check(frame, target="label")
print(time.perf_counter() - start, time.process_time() - cpu, size, before, memory("VmHWM"))
"""

PEERS = {
    "plain numpy": """
def run(frame):
    for name in frame:
        values = frame[name]
        values.isna().any()
        values.isin(values.drop_duplicates().head(100)).all() if values.dtype.kind not in "ifMb" else (values.min(), values.max())
""",
    "pandera": """
import pandera.pandas as pa
def schema_of(frame):
    def column(values):
        if values.dtype.kind in "if":
            return pa.Column(checks=[pa.Check.in_range(float(values.min()), float(values.max()))], nullable=bool(values.isna().any()))
        return pa.Column(checks=[pa.Check.isin(list(values.unique()))] if values.dtype.kind not in "Mb" else [], nullable=bool(values.isna().any()))
    return pa.DataFrameSchema({name: column(frame[name]) for name in frame})
def prepare(frame):
    return schema_of(frame)
def run(frame):
    state.validate(frame, lazy=True)
""",
}
TIMED = """
import sys, time, warnings
warnings.filterwarnings("ignore")
import pandas as pd
frame = pd.read_parquet(sys.argv[1])
{code}
state = prepare(frame) if "prepare" in globals() else None
times = []
for _ in range(3):
    start = time.perf_counter()
    run(frame)
    times.append(time.perf_counter() - start)
    if times[0] > 5:
        break
print(sorted(times)[len(times) // 2])
"""
GREAT_EXPECTATIONS = """
import great_expectations as gx
def prepare(frame):
    context = gx.get_context(mode="ephemeral")
    batch = context.data_sources.add_pandas("p").add_dataframe_asset("a").add_batch_definition_whole_dataframe("b")
    suite = gx.ExpectationSuite(name="s")
    for name in frame:
        values = frame[name]
        suite.add_expectation(gx.expectations.ExpectColumnValuesToNotBeNull(column=name, mostly=0.9))
        if values.dtype.kind in "if":
            suite.add_expectation(gx.expectations.ExpectColumnValuesToBeBetween(column=name, min_value=float(values.min()), max_value=float(values.max())))
        elif values.dtype.kind not in "Mb":
            suite.add_expectation(gx.expectations.ExpectColumnValuesToBeInSet(column=name, value_set=list(values.unique())))
    return batch.get_batch({"dataframe": frame}), suite
def run(frame):
    state[0].validate(state[1])
"""
POINTBLANK = """
import pointblank as pb
def run(frame):
    check = pb.Validate(frame)
    for name in frame:
        values = frame[name]
        check = check.col_vals_not_null(name)
        if values.dtype.kind in "if":
            check = check.col_vals_between(name, float(values.min()), float(values.max()), na_pass=True)
        elif values.dtype.kind not in "Mb":
            check = check.col_vals_in_set(name, list(values.unique()))
    check.interrogate()
"""
OURS = """
from mlops_nb.data.schema import Schema
def prepare(frame):
    return Schema.infer(frame)
def run(frame):
    state.check(frame)
"""


def taken(python: str, code: str, *arguments: str) -> list[float]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} if python == sys.executable else dict(os.environ)
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, cwd=Path(arguments[0]).parent, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}")
    return [float(one) for one in done.stdout.split()]


def peers() -> dict[str, tuple[str, str]]:
    """Name -> interpreter and code; the big ones live in environments of their own."""
    found = {name: (sys.executable, code) for name, code in PEERS.items()}
    place = os.environ.get("MLOPS_BENCH_PEERS", "")
    for name, code in (("great_expectations", GREAT_EXPECTATIONS), ("pointblank", POINTBLANK)):
        python = Path(place) / name / "bin" / "python"
        if place and python.exists():
            found[name] = (str(python), code)
        else:
            print(f"{name} is left out: MLOPS_BENCH_PEERS names no folder with {name}/bin/python.")
    return found


def timed() -> list[Figure]:
    figures = []
    with tempfile.TemporaryDirectory() as place:
        table = Path(place) / "wide.parquet"
        wide_table().to_parquet(table)
        seconds, cpu, size, before, peak = taken(sys.executable, WHOLE, str(table))
        grown = (peak - before + size) / size
        print(f"\nthe whole report on 1M x 30: {seconds:.1f} s ({cpu:.1f} s of processor time); the frame {size:.0f} MB, peak {peak:.0f} MB, {grown:.2f} times the frame with it, the libraries left out")
        figures.append(Figure("the whole report on 1M x 30", seconds, f"peak memory {grown:.2f} of the frame", None, None, "at most 15 s, 1.3 of the frame", seconds <= 15 and grown <= 1.3))
        limits = {"great_expectations": 0.2, "pandera": 1.0, "pointblank": 0.02}
        try:
            ours = taken(sys.executable, TIMED.format(code=OURS), str(table))[0]
        except RuntimeError as error:
            print(f"ours for ranges, sets and nulls could not be timed: {error}")
            return figures
        for name, (python, code) in peers().items():
            try:
                theirs = taken(python, TIMED.format(code=code), str(table))[0]
            except RuntimeError as error:
                print(f"{name} could not be timed: {error}")
                continue
            limit = limits.get(name)
            figures.append(Figure("ranges, sets and nulls of 1M x 30", ours, name, theirs, ours / theirs, f"at most {limit:g} of it" if limit else "for comparison", ours / theirs <= limit if limit else None))
    return figures


def main() -> None:
    place = folder()
    cells_found({**(real_sets(place) if place else {}), **spoilt_sets()})
    if place:
        labels_found(label_sets(place))
    record("quality", timed())


if __name__ == "__main__":
    main()
