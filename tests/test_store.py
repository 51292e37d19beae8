"""What would break for somebody who saves data: values that change, versions that vanish, damage that goes unseen."""

import datetime as dt
import json
import os
import random
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlops_nb.core.errors import Conflict, Invalid, MlopsError, NotFound, Unavailable
from mlops_nb.core.settings import in_project, init
from mlops_nb.data.objects import Objects
from mlops_nb.data.store import as_frame, datasets, load, log, manifests, save, store, version, versions

DATA = Path(__file__).parent.parent / "examples" / "recommender" / "data"


@pytest.fixture
def shop(tmp_path):
    init(str(tmp_path), name="shop")
    with in_project(tmp_path):
        yield tmp_path


@pytest.fixture(scope="module")
def orders():
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


# ---------------------------------------------------------------- exactness
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


# ---------------------------------------------------------------- versions
def test_versions_count_up_and_identical_data_make_none(shop, orders):
    one = save(orders, "orders", message="first")
    assert (one.address, one.rows, one.columns, one.kind, one.new) == ("orders@1", 107_867, 8, "table", True)
    again = save(orders.copy(), "orders", message="second")
    assert again.address == "orders@1" and not again.new and "Nothing has changed since orders@1" in str(again)
    two = save(orders.iloc[:-1], "orders")
    back_to_one = save(orders, "orders", message="back")
    assert (two.version, back_to_one.version, back_to_one.added_bytes) == (2, 3, 0)
    assert back_to_one.digest == one.digest and version(f"orders@{one.digest[:8]}").version == 3
    rows = log("orders").facts["versions"]
    assert [row["version"] for row in rows] == [3, 2, 1] and rows[0]["message"] == "back" and rows[2]["digest"] == one.digest[:8]
    assert log().facts["data_sets"][0]["versions"] == 3 and datasets() == ["orders"]
    dt.datetime.fromisoformat(one.saved_at.replace("Z", "+00:00"))


def test_commit_and_run_are_noted(shop, orders, monkeypatch):
    run = lambda *words: subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=shop, check=True, capture_output=True, text=True).stdout.strip()
    run("init", "-q")
    assert save(orders.head(1), "t").commit == ""
    run("commit", "-q", "--allow-empty", "-m", "x")
    monkeypatch.setenv("MLOPS_STEP_FOLDER", str(shop))
    monkeypatch.setenv("MLOPS_RUN", "run-7")
    noted = save(orders.head(2), "t")
    assert noted.commit == run("rev-parse", "HEAD") and noted.run == "run-7" and noted.by


def test_files_and_folders_come_back(shop, tmp_path):
    folder = tmp_path / "src"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "empty").mkdir()
    (folder / "deep" / "er" / "ä b.bin").write_bytes(b"\x00" * 10)
    (folder / "zero").write_bytes(b"")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    one = save(folder, "files")
    back = load("files")
    listing = lambda place: {path.relative_to(place).as_posix(): (path.read_bytes() if path.is_file() else None, os.access(path, os.X_OK)) for path in place.rglob("*")}
    assert one.kind == "folder" and listing(back) == listing(folder)
    (back / "deep" / "er" / "ä b.bin").chmod(0o644)
    (back / "deep" / "er" / "ä b.bin").write_bytes(b"scribbled over")
    (back / "stray").write_text("x")
    assert listing(load("files")) == listing(folder)
    (folder / "zero").write_bytes(b"1")
    two = save(str(folder), "files")
    assert two.version == 2 and two.added_bytes == 1
    assert (load("files@1") / "zero").read_bytes() == b"" and (load("files@2") / "zero").read_bytes() == b"1"


def test_a_file_is_a_path_and_a_frame_when_asked(shop, orders):
    orders.head(100).to_csv(shop / "o.csv", index=False)
    orders.head(100).to_parquet(shop / "o.parquet")
    orders.head(100).to_csv(shop / "o.csv.gz", index=False)
    for name in ("o.csv", "o.parquet", "o.csv.gz"):
        save(shop / name, "file")
        assert load("file").read_bytes() == (shop / name).read_bytes() and load("file").name == name
        assert load("file", as_="pandas", columns=["Quantity"])["Quantity"].equals(orders["Quantity"].head(100).astype(load("file", as_="pandas")["Quantity"].dtype))
    assert versions("file")[1].rows == 100
    assert as_frame("file@2")[1] == "file@2" and as_frame(shop / "o.csv")[0].shape == (100, 8) and as_frame(pa.table({"a": [1]}))[0].shape == (1, 1)


def test_other_versions_survive_a_damaged_manifest(shop, orders):
    save(orders.head(5), "t"), save(orders.head(6), "t")
    file = manifests("t")[2]
    file.chmod(0o644)
    file.write_text(file.read_text().replace('"size"', '"sise"', 1).replace('"digest": "', '"digest": "0', 1))
    assert len(load("t@1")) == 5
    with pytest.raises(Invalid, match="t@2 has a damaged manifest"):
        load("t@2")
    assert save(orders.head(7), "t").version == 3 and len(load("t")) == 7
    file.write_text("{")
    with pytest.raises(Invalid, match="damaged"):
        load("t@2")


def test_a_later_format_is_not_guessed_at(shop, orders):
    save(orders.head(5), "t")
    file = manifests("t")[1]
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    with pytest.raises(Invalid, match="newer mlops_nb"):
        load("t")


# ---------------------------------------------------------------- mistakes
def test_every_mistake_gets_one_sentence(shop, orders):
    save(orders.head(5), "orders"), save(DATA, "folder")
    (shop / "torn.parquet").write_bytes((DATA / "online_retail_small.parquet").read_bytes()[:200_000])
    damaged = bytearray((DATA / "online_retail_small.parquet").read_bytes())
    damaged[len(damaged) // 2: len(damaged) // 2 + 64] = bytes(64)
    (shop / "damaged.parquet").write_bytes(damaged)
    (shop / "broken.csv").write_bytes(b'a,b\n"1,2\n')
    (shop / "link").symlink_to(shop)
    (shop / "loop").mkdir()
    (shop / "loop" / "in").symlink_to(shop)
    (shop / "dangling").mkdir()
    (shop / "dangling" / "in").symlink_to(shop / "nowhere")
    before = sorted(store().rglob("*.json"))
    for kind, pattern, call in [
        (NotFound, r"no data set 'order'; did you mean orders", lambda: load("order")),
        (NotFound, r"no data set 'x'; there are: folder, orders", lambda: log("x")),
        (NotFound, r"'orders' has no '7'; there are: 1", lambda: load("orders@7")),
        (Invalid, r"'orders@1' has a version", lambda: save(orders, "orders@1")),
        (Invalid, r"not an address", lambda: save(orders, "../orders")),
        (Invalid, r"no column 'Preis'; there are: Country, CustomerID", lambda: load("orders", columns=["Preis"])),
        (Invalid, r"no column 'x'", lambda: save(orders, "orders", key="InvoiceNo, x")),
        (Invalid, r"as_ = 'numpy' is not known", lambda: load("orders", as_="numpy")),
        (Invalid, r"folder and cannot be loaded as pandas", lambda: load("folder", as_="pandas")),
        (Invalid, r"leave columns out", lambda: load("folder", columns=["x"])),
        (Invalid, r"Series is not a table", lambda: save(orders["Quantity"], "orders")),
        (Invalid, r"list is not a table", lambda: save([1, 2], "orders")),
        (Invalid, r"column 'x' cannot be saved", lambda: save(pd.DataFrame({"x": [object()]}), "orders")),
        (NotFound, r"there is no file or folder", lambda: save("nowhere.csv", "orders")),
        (Invalid, r"torn.parquet is not a readable Parquet file", lambda: save(shop / "torn.parquet", "orders")),
        (Invalid, r"damaged.parquet is not a readable Parquet file", lambda: save(shop / "damaged.parquet", "orders")),
        (Invalid, r"torn.parquet is not a readable Parquet file", lambda: as_frame(shop / "torn.parquet")),
        (Invalid, r"broken.csv is not a readable CSV file", lambda: as_frame(shop / "broken.csv")),
        (Invalid, r"contains the data store itself", lambda: save(shop, "orders")),
        (Invalid, r"link to a folder", lambda: save(shop / "loop", "orders")),
        (Invalid, r"broken link", lambda: save(shop / "dangling", "orders")),
        (NotFound, r"there is no file .*orders.csv", lambda: as_frame("orders.csv")),
    ]:
        with pytest.raises(kind, match=pattern) as caught:
            call()
        assert type(caught.value) is kind and str(caught.value).count("\n") == 0
    assert sorted(store().rglob("*.json")) == before and len(load("orders")) == 5


# ---------------------------------------------------------------- damage
def test_a_flipped_byte_anywhere_is_named_and_mended(shop, orders):
    save(orders.head(2000), "orders"), save(orders.tail(10), "orders")
    digest = json.loads(manifests("orders")[1].read_text())["files"][0]["digest"]
    path = Objects(store() / "objects").path(digest)
    whole = path.read_bytes()
    path.chmod(0o644)
    dice = random.Random(0)
    for at in [0, len(whole) - 1, *(dice.randrange(len(whole)) for _ in range(30))]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << dice.randrange(8)]) + whole[at + 1:])
        with pytest.raises(Invalid, match=rf"orders@1 .*damaged: object {digest[:12]}"):
            load("orders@1")
        with pytest.raises(Invalid):
            load("orders@1", as_="path")
    path.write_bytes(whole[:-1])
    with pytest.raises(Invalid, match="damaged"):
        load("orders@1")
    path.unlink()
    with pytest.raises(Invalid, match="missing"):
        load("orders@1")
    assert len(load("orders@2")) == 10
    save(orders.head(2000), "other")  # the same content again mends what was damaged
    same(load("orders@1"), orders.head(2000))


FORKS = """
import os, random, signal, sys, time, traceback
import blake3, filelock, numpy as np, pandas as pd, pyarrow as pa, pyarrow.compute, pyarrow.parquet
import mlops_nb.data.tables
from mlops_nb.core.settings import in_project
from mlops_nb.data.store import load, manifests, save, versions

def child(call):
    "A process of its own, without the seconds that importing takes."
    if pid := os.fork():
        return pid
    try:
        with in_project(sys.argv[1]):
            call()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def values(who, i):
    return np.random.default_rng([who, i]).normal(size=20_000)

def write(who, n, done=None):
    for i in range(n):
        save(pd.DataFrame({"x": values(who, i)}), "orders", message=f"{who}:{i}")
        if done is not None:
            os.write(done, b".")

def verify(n=None):
    "Every version that is there is what was saved under it, and the numbers have no gap."
    if there := manifests("orders"):
        for one in versions("orders"):
            np.testing.assert_array_equal(load(one.address)["x"], values(*map(int, one.message.split(":"))))
    assert sorted(there) == list(range(1, len(there) + 1)) and n in (None, len(there)), there
"""


def forked(shop, script):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS + script, str(shop)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_four_writers_at_once_all_land(shop):
    forked(shop, """
writers = [child(lambda who=who: write(who, 5)) for who in range(4)]
assert [ended(pid) for pid in writers] == [0] * 4
assert ended(child(lambda: verify(20))) == 0
""")
    assert {one.message for one in versions("orders")} == {f"{who}:{i}" for who in range(4) for i in range(5)}


def test_killed_at_any_time_every_version_is_good(shop):
    forked(shop, """
dice = random.Random(1)
for attempt in range(15):
    heard, done = os.pipe()
    writers = [child(lambda who=who: write(2 * attempt + who, 1000, done)) for who in range(2)]
    for _ in range(dice.randrange(4)):  # not before so many versions are there, however slow this machine is
        os.read(heard, 1)
    time.sleep(dice.uniform(0, 0.1))
    for pid in writers:
        os.kill(pid, signal.SIGKILL)
    assert [ended(pid) for pid in writers] == [-9, -9]
    assert ended(child(verify)) == 0
assert ended(child(lambda: write(99, 1))) == 0  # the lock of a killed writer holds nobody up
assert ended(child(verify)) == 0
""")
    assert len(versions("orders")) > 5


def test_killed_at_every_write_rename_and_sync(shop):
    """SIGKILL at the 1st, 2nd, 3rd … call that changes the disk, until a save gets through without meeting it."""
    deaths = forked(shop, """
calls = ["replace", "fsync", "chmod", "fchmod", "mkdir", "open", "unlink", "fdopen", "close"]

def save_until(at):
    count = 0
    def deadly(call):
        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return counted
    for name in calls:
        setattr(os, name, deadly(getattr(os, name)))
    write(1, 1)

assert ended(child(lambda: write(0, 1))) == 0
at, code = 0, -9
while code == -9:
    at += 1
    code = ended(child(lambda: save_until(at)))
    assert code in (0, -9) and at < 100
    assert ended(child(verify)) == 0
print(at)
""")
    assert int(deaths[0]) > 10 and [one.message for one in versions("orders")] == ["0:0", "1:0"]


# ---------------------------------------------------------------- disks
@pytest.fixture
def small_disk(shop):
    place = shop / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small disk takes root")
    (shop / "settings.ini").write_text("[project]\nname = shop\n[data]\nstore = disk/store\n")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(small_disk, orders):
    save(orders, "orders")
    noise = np.random.default_rng(0).integers(0, 2**62, 1_000_000)
    (small_disk.parent / "noise.bin").write_bytes(noise.tobytes())
    for data in (pd.DataFrame({"x": noise}), small_disk.parent / "noise.bin"):
        with pytest.raises(Unavailable, match="the disk is full; free some space.*unharmed") as caught:
            save(data, "orders")
        assert "\n" not in str(caught.value)
    assert [one.version for one in versions("orders")] == [1]
    same(load("orders"), orders)
    assert save(orders.head(10), "orders").version == 2  # the failed attempts left no litter behind


def test_a_read_only_disk(small_disk, orders):
    save(orders, "orders")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for data in (orders.head(3), DATA / "online_retail_small.parquet"):
        with pytest.raises(Unavailable, match="read-only; choose another folder"):
            save(data, "orders")
    same(load("orders"), orders)
    assert load("orders", as_="path").exists() and datasets() == ["orders"]


def test_a_file_where_the_store_should_be(shop, orders):
    (shop / ".mlops" / "data").write_text("")
    with pytest.raises(Unavailable, match="a file stands where a folder was expected"):
        save(orders, "orders")


def test_somebody_else_who_never_finishes(shop, orders, monkeypatch):
    import mlops_nb.data.store as module
    from mlops_nb.core.files import locked
    (store() / "datasets" / "orders").mkdir(parents=True)
    monkeypatch.setattr(module, "locked", lambda path, **known: locked(path, timeout_s=0, **known))
    with locked(store() / "datasets" / "orders" / ".lock"), pytest.raises(Conflict, match="somebody else is saving 'orders'"):
        save(orders.head(1), "orders")


def test_old_drafts_are_swept_young_ones_are_not(shop, orders):
    save(orders.head(1), "t")
    drafts = store() / "objects" / "drafts"
    for name, age_s in (("old", 90_000), ("young", 60)):
        (drafts / name).write_text("x")
        os.utime(drafts / name, (time.time() - age_s,) * 2)
    save(orders.head(2), "t")
    assert [path.name for path in drafts.iterdir()] == ["young"]


def test_nothing_heavy_at_import():
    done = subprocess.run([sys.executable, "-c", "import sys, mlops_nb.data.store; print(sorted({'pandas', 'pyarrow', 'numpy', 'polars'} & set(sys.modules)))"],
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_errors_are_of_one_family():
    assert all(issubclass(kind, MlopsError) for kind in (Conflict, Invalid, NotFound, Unavailable))


def test_a_row_put_in_near_the_top_leaves_most_pages_as_they_were(shop):
    """What issue 3 will build on: the pages are cut by content, so a changed row changes the pages around it only."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"x": rng.integers(0, 2**62, 500_000)})
    more = pd.concat([frame.iloc[:1000], pd.DataFrame({"x": [7]}), frame.iloc[1000:]], ignore_index=True)
    one, two = (load(save(data, "t").address, as_="path").read_bytes() for data in (frame, more))
    assert pq.ParquetFile(pa.BufferReader(one)).metadata.row_group(0).column(0).compression == "ZSTD"
    assert one[len(one) // 2: len(one) * 9 // 10] in two
