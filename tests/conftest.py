"""What all tests share: warm parents of their own, which end with them, and states of failed notebooks that do not outlive them."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

PLACE = "MLOPS_TEST_PLACE"


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the process that was started; those of xdist inherit its environment
        os.environ[PLACE] = tempfile.mkdtemp(prefix="mlops-t-")
        for name, folder in (("XDG_RUNTIME_DIR", "run"), ("XDG_CACHE_HOME", "cache")):
            os.environ[name] = str(Path(os.environ[PLACE]) / folder)
            Path(os.environ[name]).mkdir(mode=0o700)
        os.environ.setdefault("MLOPS_SNAPSHOT_S", "120")  # long enough for a busy machine to come back to one
        os.environ.setdefault("MLOPS_SNAPSHOT_BUDGET_S", "60")  # and each cell has one, however long the machine took for the others


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        from mlops_nb.pipeline.warm import stop

        stop()
        for one in psutil.process_iter(["name"]):
            with suppress(psutil.Error):
                if one.info["name"] == "mlops-snapshot" and one.environ().get("XDG_CACHE_HOME") == os.environ["XDG_CACHE_HOME"]:
                    one.kill()
