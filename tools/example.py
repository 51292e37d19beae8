"""Run the example's notebooks in order in a project of their own and keep their outputs: `python tools/example.py`.

A cell marked NBVAL_IGNORE_OUTPUT shows what differs from run to run (a port, a date); its output is not kept.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
EXAMPLE = Path("examples/recommender")


def lasting(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with what would be the same on another day."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            kept = [output for output in cell.outputs if output.output_type != "stream"]
            cell.outputs = [] if "NBVAL_IGNORE_OUTPUT" in cell.source else kept
            cell.metadata.pop("execution", None)
    return notebook


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "examples", Path(folder) / "examples")
        shutil.copy(ROOT / "settings.ini", folder)
        os.environ |= {"MLOPS_HOME": f"{folder}/home", "MLOPS_PROJECT": folder, "MLOPS_PROGRESS": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
        try:
            for path in sorted((ROOT / EXAMPLE).glob("0*.ipynb")):
                print(path.name, flush=True)
                notebook = nbformat.read(path, as_version=4)
                NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": f"{folder}/{EXAMPLE}"}}).execute()
                notebook.metadata.pop("language_info", None)
                path.write_text(nbformat.writes(lasting(notebook), indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        finally:
            subprocess.run([sys.executable, "-m", "mlops_nb", "undeploy", "recommender"], capture_output=True)


if __name__ == "__main__":
    main()
