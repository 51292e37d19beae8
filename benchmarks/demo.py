"""The founding example after installation, on a fresh project: within four minutes on two cores."""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.measure import PYTHON, ROOT, Figure, record


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "demo"
        shutil.copytree(ROOT / "examples", project / "examples")
        shutil.copy(ROOT / "settings.ini", project)
        mlops = [str(Path(PYTHON).parent / "mlops"), "--project", str(project)]
        environment = {**os.environ, "MLOPS_HOME": str(Path(folder) / "home")}
        figures = []
        try:
            for promise in ("make demo, first run", "make demo, second run (a champion to challenge)"):
                start = time.perf_counter()
                subprocess.run([*mlops, "run", str(project / "examples" / "recommender")], check=True, stdout=subprocess.DEVNULL, env=environment)
                taken = time.perf_counter() - start
                figures.append(Figure(promise, taken, "no peer", None, None, "within 240 s on 2 cores", taken <= 240))
        finally:
            subprocess.run([*mlops, "undeploy", "recommender"], stdout=subprocess.DEVNULL, env=environment)
        record("demo", figures)


if __name__ == "__main__":
    main()
