"""What would break for somebody who saves a frame: values, types, indexes and labels that come back as something else."""

import datetime as dt
import sys
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from frames import orders, same, shop  # noqa: F401
from mlops_nb.core.errors import Unavailable
from mlops_nb.data.store import load, save

when = pd.Timestamp("2011-03-27 00:30")
COLUMNS = {
    **{f"{kind}": np.array([0, 1, np.iinfo(kind).max], kind) for kind in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
    **{kind: np.array([-0.0, np.nan, np.inf], kind) for kind in ("float16", "float32", "float64")},
    "complex": np.array([1 + 2j, complex(np.nan, 0), 0]),
    "bool": np.array([True, False, True]),
    **{f"time {unit}": pd.Series([when, pd.NaT, when]).astype(f"datetime64[{unit}]") for unit in ("s", "ms", "us", "ns")},
    **{f"delta {unit}": pd.Series([pd.Timedelta("1h"), pd.NaT, pd.Timedelta(0)]).astype(f"timedelta64[{unit}]") for unit in ("s", "ms", "us", "ns")},
    "time zone": pd.Series([when, pd.NaT, when]).dt.tz_localize("Europe/London", ambiguous="NaT", nonexistent="shift_forward"),
    "utc": pd.Series([when, pd.NaT, when]).dt.tz_localize("UTC"),
    "offset": pd.Series([when, pd.NaT, when]).dt.tz_localize(dt.timezone(dt.timedelta(hours=5, minutes=30))),
    "text": pd.Series(["a", None, "ü☃"], dtype="str"),
    "text NA": pd.Series(["a", None, ""], dtype="string"),
    "text python": pd.Series(["a", None, ""], dtype=pd.StringDtype("python")),
    "Int64": pd.array([1, None, 2**62], "Int64"),
    "UInt8": pd.array([1, None, 255], "UInt8"),
    "Float64": pd.array([1.5, None, np.inf], "Float64"),
    "boolean": pd.array([True, None, False], "boolean"),
    "arrow int": pd.array([1, None, 3], "int64[pyarrow]"),
    "arrow text": pd.array(["a", None, "b"], pd.ArrowDtype(pa.string())),
    "arrow time": pd.array([when, None, when], pd.ArrowDtype(pa.timestamp("us", "Europe/Paris"))),
    "arrow list": pd.array([[1], None, [2, 3]], pd.ArrowDtype(pa.list_(pa.int64()))),
    "arrow decimal": pd.array([Decimal("2.55"), None, Decimal("1.00")], pd.ArrowDtype(pa.decimal128(9, 2))),
    "category": pd.Categorical(["b", None, "b"], categories=["z", "b", "a"]),
    "ordered": pd.Categorical(["m", "s", None], categories=["s", "m", "l"], ordered=True),
    "category int": pd.Categorical([3, 1, 3], categories=[3, 2, 1]),
    "category object": pd.Categorical(["b", 1, None], categories=pd.Index(["z", 1, "b"], dtype=object)),
    "category object text": pd.Categorical(["b", "b", None], categories=pd.Index(["z", "b"], dtype=object)),
    "category interval": pd.cut([1, 5, np.nan], [0, 2, 6, 9]),
    "category time": pd.Categorical([when, None, when], categories=[when, pd.Timestamp(0)]),
    "category time zone": pd.Categorical(pd.DatetimeIndex([when, None, when], tz="Asia/Tokyo")),
    "period": pd.PeriodIndex(["2011-01", None, "2011-03"], freq="M"),
    "interval": pd.arrays.IntervalArray.from_tuples([(0, 1), None, (1, 2)], closed="left"),
    "sparse": pd.arrays.SparseArray([0.0, 0.0, 1.5], fill_value=0.0),
    "object text None": pd.Series(["a", None, "b"], dtype=object),
    "object text NaN": pd.Series(["a", np.nan, "b"], dtype=object),
    "object text NA": pd.Series(["a", pd.NA, "b"], dtype=object),
    "object text both": pd.Series(["a", np.nan, None], dtype=object),
    "object surrogate": pd.Series(["\ud800", "a", None], dtype=object),
    "object int": pd.Series([1, None, 2**70], dtype=object),
    "object float": pd.Series([1.5, None, np.nan], dtype=object),
    "object bool": pd.Series([True, None, False], dtype=object),
    "object bytes": pd.Series([b"\x00\xff", None, b""], dtype=object),
    "object date": pd.Series([dt.date(2011, 3, 27), None, dt.date(1, 1, 1)], dtype=object),
    "object datetime": pd.Series([dt.datetime(2011, 3, 27, 1, tzinfo=dt.timezone.utc), pd.NaT, when], dtype=object),
    "object time": pd.Series([dt.time(1, 2, 3, 4), None, dt.timedelta(1, 2, 3)], dtype=object),
    "object decimal": pd.Series([Decimal("2.50"), None, Decimal("NaN")], dtype=object),
    "object mixed": pd.Series(["536365", 536365, 1.5], dtype=object),
    "object numpy": pd.Series([np.int8(1), np.float32(2.5), np.datetime64("2011-03-27")], dtype=object),
    "object nothing": pd.Series([None, None, None], dtype=object),
    "object period": pd.Series([pd.Period("2011Q1"), pd.Interval(0, 1.5), pd.Timedelta("1h")], dtype=object),
}
NESTED = {"list": [[1, 2.5], [], None], "dict": [{"a": 1}, {}, {"b": [None, {"c": (1, "x")}]}], "tuple": [(1, 2), ("a",), ()]}


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_comes_back_exactly(shop, kind):
    frame = pd.DataFrame({"x": COLUMNS[kind]})
    save(frame, "t")
    back = load("t")
    same(back, frame)
    assert save(frame, "t").new is False
    if kind != "sparse":
        back.iloc[0, 0] = back.iloc[1, 0]  # whoever loads a frame may change it
    same(load("t"), frame)


@pytest.mark.parametrize("kind", COLUMNS)
def test_an_empty_column_keeps_its_type(shop, kind):
    frame = pd.DataFrame({"x": COLUMNS[kind]}).iloc[:0].reset_index(drop=True)
    save(frame, "t")
    same(load("t"), frame)


@pytest.mark.parametrize("kind", NESTED)
def test_nested_cells_come_back(shop, kind):
    frame = pd.DataFrame({"x": pd.Series(NESTED[kind], dtype=object)})
    save(frame, "t")
    back = load("t")
    assert back["x"].tolist() == NESTED[kind] and [type(one) for one in back["x"]] == [type(one) for one in NESTED[kind]]


def test_arrays_in_cells_come_back(shop):
    frame = pd.DataFrame({"x": pd.Series([np.array([[1, 2]], "int16"), np.array([np.nan])], dtype=object)})
    save(frame, "t")
    for one, two in zip(load("t")["x"], frame["x"]):
        np.testing.assert_array_equal(one, two)
        assert one.dtype == two.dtype and one.shape == two.shape


def test_missing_and_nan_differ_where_pandas_can_tell(shop):
    values = pd.arrays.FloatingArray(np.array([1.0, np.nan, np.nan]), np.array([False, False, True]))
    save(pd.DataFrame({"x": values}), "t")
    back = load("t")["x"].array
    assert back._mask.tolist() == [False, False, True] and np.isnan(back._data[1])


n = 5
INDEXES = {
    "range": pd.RangeIndex(n), "range step": pd.RangeIndex(10, 0, -2, name="step"), "int": pd.Index([5, 3, 3, -1, 2**40]), "named": pd.Index(list("abcde"), name="code"),
    "object": pd.Index(["a", 1, None, 2.5, ("x", 1)], dtype=object, tupleize_cols=False), "dates": pd.date_range("2011-01-01", periods=n, freq="MS", name="month"),
    "zone": pd.date_range("2011-03-26 22:00", periods=n, freq="h", tz="Europe/Paris"), "category": pd.CategoricalIndex(list("abcab"), categories=list("cbaz"), name=("t", 1)),
    "period": pd.period_range("2011Q1", periods=n, freq="Q"), "interval": pd.interval_range(0, n), "delta": pd.timedelta_range("1h", periods=n, freq="h"),
    "levels": pd.MultiIndex.from_product([["a"], [1, 2, 3, 4, 5]], names=["one", None]), "float": pd.Index([0.5, np.nan, np.inf, 1, 2]), "bool": pd.Index([True, False] * 2 + [True]),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_comes_back(shop, kind):
    frame = pd.DataFrame({"x": range(n), "y": 1.5}, index=INDEXES[kind])
    save(frame, "t")
    same(load("t"), frame)
    same(load("t", columns=["y"]), frame[["y"]])


LABELS = {"numbers": pd.Index([0, 2, 1]), "range": pd.RangeIndex(3), "twice": pd.Index(["a", "a", "b"]), "dates": pd.date_range("2011", periods=3), "levels": pd.MultiIndex.from_tuples([("a", 1), ("a", 2), ("b", 1)], names=["x", None]),
          "mixed": pd.Index(["1", 1, None], dtype=object), "like an index": pd.Index(["__index_0__", "index", ""]), "named": pd.Index(list("abc"), name="what"), "category": pd.CategoricalIndex(list("abc"))}


@pytest.mark.parametrize("kind", LABELS)
def test_column_labels_come_back(shop, kind):
    frame = pd.DataFrame(np.arange(6).reshape(2, 3), columns=LABELS[kind], index=["r1", "r2"])
    save(frame, "t")
    same(load("t"), frame)


def test_order_attrs_and_empty_frames_come_back(shop, orders):
    frame = orders.sample(frac=0.1, random_state=0)
    frame.attrs = {"source": "UCI 352", "licence": ["CC0", 1]}
    save(frame, "t")
    same(load("t"), frame)
    for empty in (pd.DataFrame(), pd.DataFrame(index=[1, 2]), orders.iloc[:0]):
        save(empty, "t")
        same(load("t"), empty)


def test_saving_does_not_touch_the_frame(shop, orders):
    frame = orders.copy()
    save(frame, "t")
    same(frame, orders)


def test_chunks_of_arrow_do_not_make_another_version(shop, orders):
    table = pa.Table.from_pandas(orders, preserve_index=False)
    pieces = pa.concat_tables([table.slice(0, 1000), table.slice(1000, 7), table.slice(1007)])
    assert save(table, "t").new and not save(pieces, "t").new
    save(orders, "u")
    assert not save(pd.concat([orders.iloc[:1000], orders.iloc[1000:1007], orders.iloc[1007:]]), "u").new


def test_arrow_tables_come_back(shop):
    schema = pa.schema([pa.field("d", pa.dictionary(pa.int8(), pa.string(), ordered=True)), pa.field("l", pa.list_(pa.int32()), metadata={"unit": "kg"}),
                        pa.field("s", pa.struct([("a", pa.int8())]), nullable=False), pa.field("n", pa.null()), pa.field("f", pa.float64()), pa.field("m", pa.decimal256(50, 3)),
                        pa.field("t", pa.time32("s")), pa.field("u", pa.uint64()), pa.field("ts", pa.timestamp("s", "Asia/Kolkata"))], metadata={"source": "sensor"})
    table = pa.table([pa.DictionaryArray.from_arrays(pa.array([1, None, 1], pa.int8()), ["z", "b"], ordered=True), [[1], None, []], [{"a": 1}, {"a": None}, {"a": 2}], [None] * 3,
                      [float("nan"), None, 1.5], [Decimal("1.500"), None, Decimal("2.000")], [dt.time(1), None, dt.time(2)], [2**64 - 1, 0, None], [when, None, when]], schema=schema)
    save(table, "t")
    back = load("t")
    assert isinstance(back, pa.Table) and back.schema.equals(table.schema, check_metadata=True) and back["f"].null_count == 1
    assert back.drop_columns("f").equals(table.drop_columns("f")) and np.isnan(back["f"][0].as_py())
    assert load("t", columns=["l", "d"]).column_names == ["l", "d"]
    assert load("t", as_="pandas")["d"].cat.categories.tolist() == ["z", "b"]


def test_pandas_data_for_other_libraries(shop, orders):
    save(orders, "t")
    table = load("t", as_="arrow", columns=["Country", "CustomerID"])
    assert table.column_names == ["Country", "CustomerID"] and table["CustomerID"].null_count == 27_298  # known.json of the data set
    path = load("t", as_="path")
    assert path.suffix == ".parquet" and len(pd.read_parquet(path)) == 107_867


def test_polars(shop, orders):
    import polars as pl

    frame = pl.from_pandas(orders).with_columns(pl.col("Country").cast(pl.Categorical), pl.lit(["a"]).alias("list"), (pl.col("UnitPrice") / 0 * 0).alias("nan"))
    save(frame, "t")
    back = load("t")
    assert isinstance(back, pl.DataFrame) and back.equals(frame) and back.schema == frame.schema
    assert load("t", as_="pandas")["Country"].dtype == "category"
    save(orders, "u")
    assert load("u", as_="polars").height == 107_867


def test_without_polars_it_says_how_to_get_it(shop, orders, monkeypatch):
    monkeypatch.setitem(sys.modules, "polars", None)  # as if it were not installed
    save(orders.head(), "t")
    with pytest.raises(Unavailable, match="pip install"):
        load("t", as_="polars")
