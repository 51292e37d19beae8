"""Timing whole processes, ours and a peer's in turn, so that a drifting machine treats both alike; medians and ratios."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results.json"


@dataclass
class Figure:
    """One promise: what was measured, ours and the peer's median in a unit, their ratio and the ratio promised."""

    promise: str
    ours: float
    peer: str
    theirs: float | None
    ratio: float | None
    target: str
    kept: bool | None
    unit: str = "s"

    def line(self) -> str:
        theirs = f"{self.peer} {self.theirs:.3g} {self.unit}, ratio {self.ratio:.3g}" if self.theirs is not None else self.peer
        verdict = {True: "kept", False: "MISSED", None: "not compared"}[self.kept]
        return f"{self.promise}: {self.ours:.3g} {self.unit} ({theirs}; promised {self.target}) {verdict}"


def seconds(command: list[str], **options: object) -> float:
    """Wall time of a command that must succeed."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}, **options)
    return time.perf_counter() - start


def compare(promise: str, ours: list[str], peer: str, theirs: list[str], *, at_most: float, runs: int = 7, floor: list[str] | None = None, **options: object) -> Figure:
    """Run both in turn after a warm-up; `floor` is a command whose time (starting Python, say) is taken off both."""
    times: dict[str, list[float]] = {"ours": [], "theirs": [], "floor": []}
    commands = {"ours": ours, "theirs": theirs} | ({"floor": floor} if floor else {})
    for turn in range(runs + 1):
        for name, command in commands.items():
            taken = seconds(command, **options)
            if turn:
                times[name].append(taken)
    base = statistics.median(times["floor"]) if floor else 0.0
    a, b = (max(statistics.median(times[name]) - base, 0.0) for name in ("ours", "theirs"))
    return Figure(promise, a, peer, b, a / b, f"at most {at_most:g} of it", a / b <= at_most)


def record(name: str, figures: list[Figure]) -> None:
    """Print the figures and keep them for the documentation."""
    for figure in figures:
        print(figure.line())
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept[name] = [asdict(figure) for figure in figures]
    RESULTS.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


PYTHON = sys.executable
