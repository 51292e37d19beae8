"""A run that failed, opened in a real JupyterLab at the point of failure."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from browser import chromium, jupyter_lab, page  # noqa: F401 (fixtures)

from mlops_nb.core.errors import RunFailed
from mlops_nb.core.settings import init
from mlops_nb.pipeline.resume import resume
from mlops_nb.pipeline.runs import run

pytestmark = [pytest.mark.browser]
CONNECTED = "() => { const session = window.jupyterapp.shell.currentWidget?.sessionContext?.session; return session?.kernel?.connectionStatus === 'connected' && session.kernel.status === 'idle'; }"


def test_a_failed_notebook_opens_with_its_variables(tmp_path, monkeypatch, page):  # noqa: F811
    home, shop = tmp_path / "home", tmp_path / "shop"
    init(shop, name="shop")
    monkeypatch.chdir(shop)
    monkeypatch.setenv("MLOPS_TRACKING_RUNS", "no")
    monkeypatch.setenv("MLOPS_SNAPSHOT_S", "600")
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(home / "data"))
    cells = ["weeks: int = 4", "sales = {'France': weeks * 100}\nsales['Spain'] = 7", "sales['France'] = 0\nsales['Italy']"]
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(made, "train.ipynb")
    with pytest.raises(RunFailed):
        run("train.ipynb", params={"weeks": "5"})
    assert "train.resume.ipynb" in resume(live=True).facts["summary"]
    with jupyter_lab(shop, home) as lab:
        lab.open(page, "lab/tree/train.resume.ipynb")
        cell = page.locator(".jp-NotebookPanel .jp-CodeCell").nth(len(cells))  # papermill has added one
        cell.locator(".jp-OutputArea-output", has_text="KeyError").wait_for()  # all of it is drawn
        page.wait_for_function(CONNECTED, timeout=300_000)
        cell.locator(".cm-content").click()
        page.keyboard.press("Control+A")
        page.keyboard.type("sorted(sales.items())")
        shown = cell.locator(".jp-OutputArea-output").filter(has_text=re.compile(r"\[\('France', 500\), \('Spain', 7\)\]"))
        for _ in range(60):  # JupyterLab drops what is run while it changes from one kernel to another
            lab.execute(page, "notebook:run-cell")
            page.wait_for_timeout(1000)
            if shown.count():
                break
        page.screenshot(path=Path(os.environ.get("SCREENSHOTS", tmp_path)) / "live.png")
        assert shown.count()
    assert not page.faults
