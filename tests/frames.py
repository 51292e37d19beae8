"""What it means for two frames to be the same."""

import pandas as pd


def same(one, two):
    pd.testing.assert_frame_equal(one, two, check_freq=True)
    assert one.attrs == two.attrs
    assert one.columns.equals(two.columns) and one.columns.names == two.columns.names and type(one.columns) is type(two.columns)
    assert type(one.index) is type(two.index)
    for i in range(one.shape[1]):
        if one.dtypes.iloc[i] == object:
            for a, b in zip(one.iloc[:, i], two.iloc[:, i]):
                assert type(a) is type(b) and (a is b or pd.api.types.is_list_like(a) or a == b or a != a)
