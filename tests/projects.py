"""Fixtures for tests that need a project of their own."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "examples/recommender/data/online_retail_small.parquet"
FULL = ROOT / "examples/recommender/data/online_retail_full.parquet"


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """An empty project called shop, as the working directory."""
    from mlops_nb.core.settings import init

    for name in [name for name in os.environ if name.startswith("MLOPS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLOPS_PROGRESS", "0")
    monkeypatch.setenv("MLOPS_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return init(str(tmp_path / "shop"), name="shop").folder
