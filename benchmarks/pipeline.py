"""What running notebooks costs: `mlops run`, as whole processes, beside papermill run one notebook after another from the same environment.

`MLOPS_BENCH_TURNS` is how often each is measured (3); papermill's long ones are measured once.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat

from benchmarks.measure import PYTHON, Figure, record

TURNS = int(os.environ.get("MLOPS_BENCH_TURNS", 3))
MLOPS = str(Path(PYTHON).with_name("mlops"))
COLD = {"MLOPS_WARM": "0"}

CHAIN = {  # six notebooks, each with a little real work on what the one before it left
    "prepare": "frame = pd.DataFrame(datasets.make_classification(20_000, 12, n_informative=6, random_state=0)[0]).rename(columns=str).assign(target=datasets.make_classification(20_000, 12, n_informative=6, random_state=0)[1])",
    "clean": "frame = pd.read_parquet(source)\nframe = frame[(frame.drop(columns='target').abs() < 4).all(axis=1)].reset_index(drop=True)",
    "features": "frame = pd.read_parquet(source)\nframe['product'] = frame['0'] * frame['1']\nframe['rank'] = frame['2'].rank(pct=True)",
    "train": "frame = pd.read_parquet(source)\nmodel = linear_model.LogisticRegression(max_iter=200).fit(frame.drop(columns='target'), frame['target'])\nframe['score'] = model.predict_proba(frame.drop(columns='target'))[:, 1]",
    "validate": "frame = pd.read_parquet(source)\nscores = model_selection.cross_val_score(linear_model.LogisticRegression(max_iter=200), frame[['0', '1', '2', 'rank']], frame['target'], cv=3)",
    "report": "frame = pd.read_parquet(source)\nsummary = frame.groupby(pd.qcut(frame['score'], 10))['target'].agg(['mean', 'size'])\nmetrics.roc_auc_score(frame['target'], frame['score'])",
}


def notebook(path: Path, *cells: str, tags: dict[int, str] | None = None) -> Path:
    "A notebook whose first cell holds its parameters."
    made = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    for place, cell in enumerate(cells):
        made.cells.append(nbformat.v4.new_code_cell(cell, metadata={"tags": [{0: "parameters", **(tags or {})}.get(place, "")]} if place in {0, *(tags or {})} else {}))
    nbformat.write(made, path)
    return path


def run(command: list[str], folder: Path, *, fails: bool = False, **environment: str) -> float:
    "Wall time of a whole process; `RuntimeError` with its last words when it does not end as expected."
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLOPS_PROGRESS": "0", "PYDEVD_DISABLE_FILE_VALIDATION": "1", **environment})
    taken = time.perf_counter() - began
    if bool(done.returncode) != fails:
        raise RuntimeError(f"{' '.join(command[:4])} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-600:]}")
    return taken


def told(folder: Path) -> None:
    "Wait until the process in the background has told MLflow about the run, so that it does not work during the next turn."
    until = time.monotonic() + 60
    while any((folder / ".mlops" / "unsent").glob("*")) and time.monotonic() < until:
        time.sleep(0.1)


def median(command: list[str], folder: Path, turns: int = TURNS, **environment: str) -> float:
    times = []
    for _ in range(turns):
        times.append(run(command, folder, **environment))
        told(folder)
    return statistics.median(times)


def papermill(notebooks: list[Path], folder: Path) -> float:
    "papermill's own command, one notebook after another."
    return sum(run([PYTHON, "-m", "papermill", "--no-progress-bar", str(path), str(folder / "executed.ipynb")], folder) for path in notebooks)


def place(folder: Path, name: str) -> Path:
    "A new project."
    from mlops_nb.core.settings import init

    return init(str(folder / name), name=name).folder


def against(promise: str, ours: float, theirs: float, at_most: float, peer: str = "papermill") -> Figure:
    return Figure(promise, ours, peer, theirs, ours / theirs, f"at most {at_most:g} of it", ours / theirs <= at_most)


def within(promise: str, ours: float, at_most_s: float, note: str = "no peer") -> Figure:
    return Figure(promise, ours, note, None, None, f"at most {at_most_s:g} s", ours <= at_most_s)


def chain(folder: Path) -> Iterator[Figure]:
    """Six chained notebooks that import pandas and scikit-learn."""
    here, paths, before = place(folder, "chain"), [], ""
    text = '[pipeline]\nname = "chain"\n'
    for name, work in CHAIN.items():
        imports = "import pandas as pd\nfrom sklearn import datasets, linear_model, metrics, model_selection"
        paths.append(notebook(here / f"{name}.ipynb", f"source = {before + '.parquet' if before else ''!r}", imports, work, f"frame.to_parquet('{name}.parquet')\nlen(frame)"))
        text += f'\n[[step]]\nname = "{name}"\nnotebook = "{name}.ipynb"\n' + (f'needs = ["{before}"]\n' if before else "")
        before = name
    (here / "pipeline.toml").write_text(text)
    run([MLOPS, "run", "."], here)  # the first run finds out what the notebooks import
    told(here)
    warm = median([MLOPS, "run", ".", "--force"], here, TURNS + 2)
    cached = median([MLOPS, "run", "."], here, TURNS + 2)
    theirs = papermill(paths, here)
    yield against("six chained notebooks, warm", warm, theirs, 0.08)
    yield against("six chained notebooks, all cached", cached, theirs, 0.02)
    yield against("six chained notebooks, cold (MLOPS_WARM=0)", median([MLOPS, "run", ".", "--force"], here, 2, **COLD), theirs, 0.9)


def many(folder: Path) -> Iterator[Figure]:
    """40 independent trivial notebooks."""
    here = place(folder, "many")
    paths = [notebook(here / f"n{i}.ipynb", f"number = {i}", "number * number") for i in range(40)]
    (here / "pipeline.toml").write_text('[pipeline]\nname = "many"\n' + "".join(f'\n[[step]]\nname = "n{i}"\nnotebook = "n{i}.ipynb"\n' for i in range(40)))
    run([MLOPS, "run", "."], here)
    ours, failed = [], 0
    for _ in range(TURNS):
        ours.append(run([MLOPS, "run", ".", "--force"], here))
        failed += sum(step["verdict"] != "passed" for step in newest(here)["steps"])
    theirs = papermill(paths, here)
    yield against("40 independent trivial notebooks on this machine's cores", statistics.median(ours), theirs, 0.10)
    yield Figure("steps that failed among them", failed, "no peer", None, None, "0", failed == 0, "")


def newest(here: Path) -> dict:
    "The newest run's record."
    return json.loads(max(here.glob(".mlops/runs/*/run.json")).read_text())


NBCLIENT = "import sys, nbformat, nbclient; book = nbformat.read(sys.argv[1], 4); nbclient.NotebookClient(book, kernel_name='python3').execute(); nbformat.write(book, 'executed.ipynb')"


def cells(folder: Path) -> Iterator[Figure]:
    """A notebook of 200 cells. It takes its own time from the first to the last, so that starting a process and a kernel does not count."""
    here, code = place(folder, "cells"), "values = sorted(range(20_000), key=lambda x: -x)\nlen(values)"
    path = notebook(here / "long.ipynb", "seed = 0", "import time\nbegan = time.time()", *[code] * 198, "time.time() - began")
    taken = lambda file: float(nbformat.read(file, 4).cells[-1].outputs[0]["data"]["text/plain"])
    ours, theirs, whole, their_whole = [], [], [], []
    for turn in range(TURNS + 3):
        times = run([MLOPS, "run", str(path), "--force"], here), run([PYTHON, "-c", NBCLIENT, str(path)], here)
        if turn:
            ours.append(taken(max(here.glob(".mlops/runs/*/long/long.ipynb"))))
            theirs.append(taken(here / "executed.ipynb"))
            whole.append(times[0])
            their_whole.append(times[1])
    yield against("200 cells, from the first to the last", statistics.median(ours), statistics.median(theirs), 1.05, "nbclient")
    yield against("a notebook of 200 cells, whole process", statistics.median(whole), statistics.median(their_whole), 1.05, "nbclient")


def graph(folder: Path) -> Iterator[Figure]:
    """A graph of 1,000 steps, ten wide: read, checked and planned."""
    here = place(folder, "graph")
    notebook(here / "step.ipynb", "number = 0", "number")
    steps = [f'\n[[step]]\nname = "s{i}"\nnotebook = "step.ipynb"\nparams = {{ number = {i} }}\n' + (f'needs = ["s{i - 10}", "s{i - i % 10 - 1}"]\n' if i >= 10 else "") for i in range(1000)]
    (here / "pipeline.toml").write_text('[pipeline]\nname = "graph"\n' + "".join(steps))
    yield within("a plan of 1,000 steps (mlops run --dry-run), whole process", median([MLOPS, "run", ".", "--dry-run"], here), 1.0)


def history(folder: Path) -> Iterator[Figure]:
    """10,000 runs, written as runs write them."""
    from mlops_nb.core.settings import in_project
    from mlops_nb.pipeline.history import RUN, STEP, add_to_index, runs, summary

    here = place(folder, "history")
    with in_project(here):
        lines = []
        for number in range(10_000):
            name = f"202611{1 + number // 1000:02}-{number // 60 % 24:02}{number % 60:02}{number // 1440 % 60:02}-{number % 65536:04x}"
            one = RUN | {"id": name, "pipeline": "weekly", "source": "pipeline.toml", "status": "passed" if number % 7 else "failed", "started_at": f"2026-11-{1 + number // 1000:02}T06:00:00Z", "ended_at": f"2026-11-{1 + number // 1000:02}T06:01:00Z",
                         "seconds": 60.0, "steps": [STEP | {"step": f"s{i}", "notebook": f"s{i}.ipynb", "verdict": "passed", "seconds": 10.0} for i in range(6)]}
            (here / ".mlops" / "runs" / name).mkdir(parents=True)
            (here / ".mlops" / "runs" / name / "run.json").write_text(json.dumps(one, indent=1))
            lines.append(summary(one))
        add_to_index(lines)
        listing = []
        for _ in range(TURNS + 2):
            began = time.perf_counter()
            report = runs()
            listing.append(time.perf_counter() - began)
            assert len(report.facts["runs"]) == 20
    yield within("10,000 runs in history, listed", statistics.median(listing), 0.3)
    whole = median([MLOPS, "runs"], here)
    yield Figure("mlops runs among 10,000, whole process", whole, "with the start of Python", None, None, "for comparison", None)


LONG = """import numpy as np, pandas as pd, time
from sklearn.ensemble import RandomForestClassifier
dice = np.random.default_rng(0)
frame = pd.DataFrame({f"c{i}": dice.normal(size=1_000_000) for i in range(12)})
model = RandomForestClassifier(20, max_depth=8, random_state=0).fit(frame.head(20_000), frame["c0"].head(20_000) > 0)
open("calls", "a").write("long\\n")
time.sleep(5)"""


def resume(folder: Path) -> Iterator[Figure]:
    """A notebook that fails in its last cell. The ten minutes of work are stood for by 100 MB of frame and a fitted forest, made in a cell
    tagged `checkpoint` that also waits: what resuming costs is bringing the state back, not how long it took to make."""
    here = place(folder, "resume")
    path = notebook(here / "long.ipynb", "name = 'x'", LONG, "top = model.feature_importances_.argmax()", "import os\nassert os.path.exists('ready'), 'not ready yet'\nfloat(frame['c1'].sum()), int(top)", tags={1: "checkpoint"})
    taken = []
    for _ in range(TURNS):
        (here / "ready").unlink(missing_ok=True)
        run([MLOPS, "run", str(path), "--force"], here, fails=True)
        (here / "ready").touch()
        taken.append(run([MLOPS, "resume", newest(here)["id"]], here))
    again = (here / "calls").read_text().count("long") - TURNS
    yield within("resume in the last cell, 100 MB of state restored", statistics.median(taken), 10)
    yield Figure("long cells run again by it", again, "no peer", None, None, "0", again == 0, "")


SECTIONS: dict[str, Callable[[Path], Iterator[Figure]]] = {"chain": chain, "many": many, "cells": cells, "graph": graph, "history": history, "resume": resume}


def main() -> None:
    folder, figures = Path(tempfile.mkdtemp(prefix="mlops-bench-")), []
    wanted = os.environ.get("MLOPS_BENCH_ONLY", " ".join(SECTIONS)).split()
    try:
        for name in wanted:
            began = time.perf_counter()
            try:
                for figure in SECTIONS[name](folder):
                    figures.append(figure)
            except (RuntimeError, ImportError) as error:
                print(f"{name} could not be measured: {error}")
            print(f"({name}: {time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if len(wanted) == len(SECTIONS):
        record("pipeline", figures)
    else:
        print(*(figure.line() for figure in figures), sep="\n")


if __name__ == "__main__":
    main()
