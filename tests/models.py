"""A project whose MLflow database is made once and copied, for tests that register models."""

import shutil

import numpy as np
import pandas as pd
import pytest

from mlops_nb.core.settings import in_project, init
from mlops_nb.model.backend import make_database, talking


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    """An empty MLflow database; making it takes seconds, copying it nothing."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with talking(str(file)):
        make_database(file)
    return file


def new_shop(folder, database):
    init(str(folder), name="shop")
    shutil.copy(database, folder / ".mlops" / "mlflow.db")
    return folder


@pytest.fixture
def shop(tmp_path, database):
    """A project called shop, and it is the current one."""
    folder = new_shop(tmp_path / "shop", database)
    with in_project(folder):
        yield folder


def customers(n=120, seed=0):
    """A small frame with numbers, text and gaps, and what to predict from it."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"value": rng.gamma(2, 30, n), "pieces": rng.integers(1, 40, n).astype(float),
                          "country": rng.choice(["France", "Norway", None], n), "channel": rng.choice(["web", "shop"], n)})
    frame.loc[::9, "value"] = np.nan
    bought = (frame.value.fillna(40) * frame.pieces + rng.normal(0, 300, n) > 900).to_numpy()
    return frame, bought
