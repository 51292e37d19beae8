"""A project to save frames in, real data to save, and what it means for two frames to be the same."""

from pathlib import Path

import pandas as pd
import pytest

from mlops_nb.core.settings import in_project, init

DATA = Path(__file__).parent.parent / "examples" / "recommender" / "data"


@pytest.fixture
def shop(tmp_path):
    """An empty project called shop, without changing the working directory."""
    init(str(tmp_path), name="shop")
    with in_project(tmp_path):
        yield tmp_path


@pytest.fixture(scope="module")
def orders():
    """The small real data set."""
    return pd.read_parquet(DATA / "online_retail_small.parquet")


def same(one, two):
    pd.testing.assert_frame_equal(one, two, check_freq=True)
    assert one.attrs == two.attrs
    assert one.columns.equals(two.columns) and one.columns.names == two.columns.names and type(one.columns) is type(two.columns)
    assert type(one.index) is type(two.index)
    for i in range(one.shape[1]):
        if one.dtypes.iloc[i] == object:
            for a, b in zip(one.iloc[:, i], two.iloc[:, i]):
                assert type(a) is type(b) and (a is b or pd.api.types.is_list_like(a) or a == b or a != a)
