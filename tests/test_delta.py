"""Data sets that are Delta tables: every type, other readers, tables of others, writers at once, damage and loss."""

import base64
import datetime as dt
import json
import multiprocessing
import socket
import struct
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mlops_nb.core.errors import Conflict, Invalid, NotFound, Unavailable
from mlops_nb.core.settings import in_project, init
from mlops_nb.data import delta
from mlops_nb.data.tables import to_table
from mlops_nb.deploy.engine import free_port

deltalake = pytest.importorskip("deltalake")


@pytest.fixture
def shop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    init(str(tmp_path), name="shop")
    with in_project(tmp_path):
        yield tmp_path


def sales(rows: int = 200, seed: int = 0) -> pd.DataFrame:
    made = np.random.default_rng(seed)
    return pd.DataFrame({"id": np.arange(rows), "amount": made.normal(size=rows), "country": made.choice(["FR", "ES", None], rows)})


def written(place, *frames, **options) -> str:
    """A table of somebody else's: one append for each frame."""
    for frame in frames:
        deltalake.write_deltalake(str(place), pa.Table.from_pandas(frame, preserve_index=False), mode="append", **options)
    return str(place)


FRAMES = {
    "unsigned": pd.DataFrame({kind: np.array([0, 1, np.iinfo(kind).max], kind) for kind in ("uint8", "uint16", "uint32", "uint64")}),
    "small numbers": pd.DataFrame({"half": np.array([1.5, np.nan, -np.inf], "float16"), "byte": np.array([-128, 0, 127], "int8"), "single": np.array([0.1, -0.0, np.nan], "float32")}),
    "nullable": pd.DataFrame({"i": pd.array([1, None, 3], "Int64"), "u": pd.array([1, None, 255], "UInt8"), "f": pd.array([1.5, None, 0], "Float32"), "b": pd.array([True, None, False], "boolean")}),
    "categories": pd.DataFrame({"c": pd.Categorical(["b", None, "a"], ["a", "b", "unused"], ordered=True), "n": pd.Categorical([3, 1, 3])}),
    "times": pd.DataFrame({"paris": pd.to_datetime(["2026-03-29 00:30", None, "2026-10-25 00:30"]).tz_localize("UTC").tz_convert("Europe/Paris"), "ns": pd.to_datetime(["2026-01-01", None, "1999-12-31 23:59:59.999999"], format="ISO8601").astype("datetime64[ns]"),
                           "s": pd.to_datetime(["2026-01-01", None, "1900-01-01"]).astype("datetime64[s]"), "took": pd.to_timedelta([1, None, 3], "s").astype("timedelta64[ns]")}),
    "python objects": pd.DataFrame({"o": pd.Series([{"a": 1}, [1, 2], None], dtype=object), "d": [dt.date(2026, 1, 1), None, dt.date(1, 1, 1)], "x": [Decimal("1.10"), Decimal("2"), None], "t": [dt.time(1, 2, 3), None, dt.time(4)]}),
    "bytes and text": pd.DataFrame({"b": pd.Series([b"\x00\xff", None, b""], dtype=object), "s": pd.array(["", None, "snow ☃"], "string"), "z": ["a\x00b", "", "c"]}),
    "periods and intervals": pd.DataFrame({"p": pd.period_range("2026-01", periods=3, freq="M"), "i": pd.interval_range(0, 3)}),
    "an index": pd.DataFrame({"v": [1.0, 2.0, 3.0]}, index=pd.MultiIndex.from_tuples([("a", 1), ("a", 2), ("b", 1)], names=["k", "n"])),
    "a dated index": pd.DataFrame({"v": [1, 2, 3]}, index=pd.date_range("2026-01-01", periods=3, freq="D", tz="Asia/Tokyo", name="day")),
    "labels": pd.DataFrame([[1, 2, 3]], columns=[0, "two words", ("a", 1)]),
    "two of one name": pd.DataFrame([[1, 2]], columns=["a", "a"]),
    "no rows": pd.DataFrame({"a": pd.Series([], dtype="uint8"), "b": pd.Series([], dtype="category")}),
    "arrow types": pd.DataFrame({"l": pd.array([[1, 2], None, []], pd.ArrowDtype(pa.list_(pa.uint16()))), "s": pd.array([{"x": 1}, None, {"x": 2}], pd.ArrowDtype(pa.struct([("x", pa.int8())])))}),
    "attrs": pd.DataFrame({"a": [1]}).assign(b="x"),
}
FRAMES["attrs"].attrs = {"source": "till 4"}


@pytest.mark.parametrize("kind", FRAMES)
def test_a_frame_comes_back_as_it_was(shop, kind):
    delta.save(FRAMES[kind], "t")
    back = delta.load("t")
    pd.testing.assert_frame_equal(back, FRAMES[kind], check_freq=True, check_column_type="exact", check_index_type="exact")
    assert back.attrs == FRAMES[kind].attrs


@pytest.mark.parametrize("kind", FRAMES)
def test_an_arrow_table_comes_back_as_it_was(shop, kind):
    table = pa.table({f"c{i}": column for i, column in enumerate(to_table(FRAMES[kind]).columns)}).replace_schema_metadata({b"who": b"me"})
    delta.save(table, "t")
    back = delta.load("t")
    assert back.schema.equals(table.schema, check_metadata=True)
    assert back.to_pydict().keys() == table.to_pydict().keys() and repr(back.to_pylist()) == repr(table.to_pylist())


ARROW = [pa.large_string(), pa.string_view(), pa.large_binary(), pa.binary(3), pa.date64(), pa.time32("ms"), pa.time64("ns"), pa.duration("us"), pa.decimal128(38, 10), pa.decimal256(20, 2), pa.null(),
         pa.large_list(pa.uint8()), pa.map_(pa.string(), pa.uint32()), pa.struct([("a", pa.timestamp("ms", "Asia/Tokyo"))]), pa.dictionary(pa.int8(), pa.string()), pa.timestamp("ns", "+02:00")]


@pytest.mark.parametrize("kind", ARROW, ids=str)
def test_every_arrow_type_comes_back_even_when_all_is_missing(shop, kind):
    table = pa.table({"id": [1, 2], "x": pa.array([None, None], kind)})
    delta.save(table, "t")
    assert delta.load("t").schema == table.schema and delta.load("t").column("x").null_count == 2


def test_polars_comes_back_as_polars(shop):
    pl = pytest.importorskip("polars")
    from polars.testing import assert_frame_equal

    frame = pl.DataFrame({"u": pl.Series([1, 2], dtype=pl.UInt8), "c": pl.Series(["a", "b"], dtype=pl.Categorical), "t": [dt.time(1), None], "n": [None, None]})
    delta.save(frame, "t")
    assert_frame_equal(delta.load("t"), frame)
    assert isinstance(delta.load("t", as_="pandas"), pd.DataFrame) and isinstance(delta.load("t", as_="arrow"), pa.Table)


@pytest.mark.parametrize("table, said", [
    (pa.table({"t": pa.array([1], pa.timestamp("ns"))}), "'t'.*whole microseconds"),
    (pa.table({"x": pa.array([Decimal("1")], pa.decimal256(50, 0))}), "'x'.*Decimal256"),
    (pa.table({"x": pa.array([None], pa.month_day_nano_interval())}), "'x'.*Interval"),
    (pa.table({"a": [1], "A": [2]}), "case only"),
    (pa.table({}), "no columns"),
    (object(), "is not a table"),
    (pa.table({"a": [1]}), "no column 'b'"),
])
def test_what_cannot_be_kept_is_refused_and_leaves_nothing(shop, table, said):
    with pytest.raises(Invalid, match=said):
        delta.save(table, "t", key="b" if said.startswith("no column '") else "")
    assert delta.tables() == {} and not (shop / ".mlops" / "delta").exists()


def test_versions_are_the_tables_own_and_carry_who_and_why(shop):
    one, two = delta.save(sales(), "s", message="first", key="id"), delta.save(sales(300), "s", message="more")
    again = delta.save(sales(300), "s", message="again")
    assert (one.version, two.version, again.version) == (0, 1, 1) and two.new and not again.new
    assert (two.rows, two.columns, two.key, two.by) == (300, 3, "id", one.by) and one.by
    assert two.digest != one.digest and delta.load(f"s@{one.digest[:8]}").equals(sales())
    assert two.size_bytes == two.added_bytes == sum(file.stat().st_size for file in (shop / ".mlops/delta/s").glob("*.parquet")) - one.size_bytes
    log = json.loads((shop / ".mlops/delta/s/_delta_log/00000000000000000001.json").read_text().splitlines()[0])
    assert log["commitInfo"]["userMetadata"] == "more", "DESCRIBE HISTORY shows the message"
    assert delta.versions("s") == [one, delta.version("s@1")] and delta.version("s").facts["operation"] == "WRITE (Overwrite)"


def test_columns_may_change_from_save_to_save(shop):
    first, second = sales(), pd.DataFrame({"id": ["a", "b"], "late": [True, False]})
    delta.save(first, "s")
    delta.save(second, "s")
    pd.testing.assert_frame_equal(delta.load("s@0"), first)
    pd.testing.assert_frame_equal(delta.load("s"), second)
    delta.rollback("s@0")
    pd.testing.assert_frame_equal(delta.load("s"), first)


CONDITIONS = ["u > 200 and c == 'FR'", "c in ('ES', 'IT')", "c is None", "at >= '2026-01-01 12:00'", "not (x < 0) and u <= 3", "ns < '2026-01-01 02:00:00'"]


@pytest.mark.parametrize("where", CONDITIONS)
def test_filters_say_the_same_as_pandas(shop, where):
    made, n = np.random.default_rng(1), 400
    frame = pd.DataFrame({"u": made.integers(0, 256, n).astype("uint8"), "c": pd.Categorical(made.choice(["FR", "ES", "IT", None], n)), "x": made.normal(size=n),
                          "at": pd.date_range("2026-01-01", periods=n, freq="5min", tz="America/Lima"), "ns": pd.date_range("2026-01-01", periods=n, freq="1min").astype("datetime64[ns]")}, index=pd.RangeIndex(10, 10 + n))
    delta.save(frame, "f")
    c, u, x, at, ns = frame["c"], frame["u"], frame["x"], frame["at"], frame["ns"]
    wanted = dict(zip(CONDITIONS, [(u > 200) & (c == "FR"), c.isin(["ES", "IT"]), c.isna(), at >= pd.Timestamp("2026-01-01 12:00", tz="America/Lima"), ~(x < 0) & (u <= 3), ns < "2026-01-01 02:00:00"]))[where]
    assert 0 < wanted.sum() < n
    pd.testing.assert_frame_equal(delta.load("f", where=where, columns=["x", "c"]), frame.loc[wanted, ["x", "c"]].reset_index(drop=True))


def test_filtered_rows_of_a_dated_index_keep_their_days(shop):
    frame = pd.DataFrame({"a": range(10)}, index=pd.date_range("2026-01-01", periods=10, freq="D"))
    delta.save(frame, "f")
    pd.testing.assert_frame_equal(delta.load("f", where="a in (1, 5)"), frame[frame["a"].isin([1, 5])], check_freq=False)


def test_a_filter_reads_only_the_files_that_can_match(shop):
    place = written(shop / "lake", sales(100), sales(100).assign(id=lambda f: f["id"] + 1000))
    delta.register("s", place)
    late = max(Path(shop / "lake").glob("*.parquet"), key=lambda file: pd.read_parquet(file)["id"].max())
    late.write_bytes(b"not Parquet at all")
    assert len(delta.load("s", where="id < 50")) == 50
    with pytest.raises(Invalid, match="s refuses or is damaged"):
        delta.load("s")


# Others

def test_duckdb_polars_and_dask_read_the_same(shop):
    frame = FRAMES["times"].assign(u=FRAMES["unsigned"]["uint64"], c=["a", "b", "a"], n=[1.5, np.nan, -1])
    delta.save(frame.iloc[:2], "t")
    delta.save(frame, "t")
    place = delta.table_of("t")
    instants = [None if pd.isna(one) else one.tz_convert("UTC").to_pydatetime() for one in frame["paris"]]
    pl = pytest.importorskip("polars")
    theirs = pl.scan_delta(place).collect()
    assert theirs["paris"].to_list() == instants and [int(one) for one in theirs["u"]] == frame["u"].tolist() and theirs["took"].to_list() == [10**9, None, 3 * 10**9]
    assert len(pl.scan_delta(place, version=0).collect()) == 2
    duckdb = pytest.importorskip("duckdb")
    table = deltalake.DeltaTable(place).to_pyarrow_dataset()
    with duckdb.connect() as connection:
        connection.register("t", table)
        assert connection.sql("select c, sum(u), count(took) from t group by c order by c").fetchall() == [("a", 2**64 - 1, 2), ("b", 1, 0)]
        assert [row[0] for row in connection.sql("select epoch_us(paris) from t").fetchall()] == [one and round(one.timestamp() * 1e6) for one in instants]
    dask = pytest.importorskip("dask.dataframe")
    assert dask.read_parquet(deltalake.DeltaTable(place).file_uris()).compute()["c"].tolist() == ["a", "b", "a"]


def test_a_table_of_others_is_listed_loaded_and_rolled_back(shop):
    place = written(shop / "lake", sales(10), sales(20, 1))
    deltalake.DeltaTable(place).delete("id >= 5")
    deltalake.DeltaTable(place).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=True)
    delta.register("s", place)
    found = delta.versions("s")
    assert [(one.version, one.rows, one.operation) for one in found] == [(0, 10, "WRITE (Append)"), (1, 30, "WRITE (Append)"), (2, 10, "DELETE")]
    assert all(one.kind == "delta" and one.by.startswith("delta-rs") and one.saved_at for one in found)
    pd.testing.assert_frame_equal(delta.load("s@0"), sales(10))
    assert len(delta.load("s@1", as_="arrow")) == 30 and sorted(delta.load("s")["id"]) == sorted([*range(5)] * 2)
    assert delta.load(f"s@{found[1].digest[:8]}").shape == (30, 3)
    back = delta.rollback("s@0", message="oops")
    assert (back.version, back.rows, back.operation, back.message, back.digest, back.added_bytes) == (3, 10, "RESTORE", "oops", found[0].digest, 0)
    pd.testing.assert_frame_equal(delta.load("s"), sales(10))
    assert len(deltalake.DeltaTable(place).history()) == 4


def test_ours_and_theirs_in_one_table(shop):
    ours = sales().astype({"country": "category", "id": "uint32"})
    delta.save(ours, "s")
    place = delta.table_of("s")
    deltalake.DeltaTable(place).alter.set_table_properties({"delta.appendOnly": "false"})
    pd.testing.assert_frame_equal(delta.load("s@1"), ours), "a property changes no row"
    assert not delta.save(ours, "s").new
    theirs = pa.table({"id": pa.array([7], pa.int64()), "amount": [1.0], "country": ["somewhere new"]})
    deltalake.write_deltalake(place, theirs, mode="append")
    assert "somewhere new" in set(delta.load("s")["country"]), "a category of ours must not swallow their value"
    deltalake.DeltaTable(place).restore(0)
    pd.testing.assert_frame_equal(delta.load("s"), ours)
    deltalake.DeltaTable(place).optimize.compact()
    deltalake.DeltaTable(place).create_checkpoint()
    assert delta.load("s").dtypes.equals(ours.dtypes)
    assert delta.save(sales(5), "s").rows == 5


def test_a_partitioned_table_keeps_its_partitions(shop):
    place = written(shop / "lake", sales().fillna("none"), partition_by=["country"])
    delta.register("s", place)
    made = delta.save(sales(50, 3).fillna("none"), "s")
    assert deltalake.DeltaTable(place).metadata().partition_columns == ["country"]
    assert made.rows == 50 and delta.load("s").dtypes.equals(sales(50, 3).dtypes)
    pd.testing.assert_frame_equal(delta.load("s").sort_values("id", ignore_index=True), sales(50, 3).fillna("none"))


def test_the_order_of_rows_survives_many_files_and_a_checkpoint(shop):
    frame = pd.DataFrame({"i": np.random.default_rng(0).permutation(200_000)})
    place, exact = delta.register("big"), to_table(frame)
    note = {"digest": "", "schema": base64.b64encode(exact.schema.serialize()).decode()}
    deltalake.write_deltalake(place, exact, target_file_size=100_000, commit_properties=delta.commit_note(note, ""))
    deltalake.DeltaTable(place).create_checkpoint()
    assert len(deltalake.DeltaTable(place).file_uris()) > 2
    pd.testing.assert_frame_equal(delta.load("big"), frame)


# Writers at once

def overwrite(folder: str, place: str, seed: int, ready, results) -> None:
    with in_project(folder):
        ready.wait(600)
        try:
            results.put(("saved", seed, delta.save(sales(50_000, seed), "s").version))
        except Conflict as error:
            results.put(("conflict", seed, str(error)))


@pytest.mark.parametrize("there", [False, True])
def test_of_two_writers_at_once_each_lands_or_is_told(shop, there):
    if there:
        delta.save(sales(10), "s")
    else:
        delta.register("s")
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(2), context.Queue()
    writers = [context.Process(target=overwrite, args=(str(shop), "", seed, ready, results), daemon=True) for seed in (1, 2)]
    [writer.start() for writer in writers]
    outcomes = [results.get(timeout=600) for _ in writers]
    [writer.join(120) for writer in writers]
    saved = [one for one in outcomes if one[0] == "saved"]
    assert saved and all("in the meantime" in one[2] for one in outcomes if one[0] == "conflict")
    assert len(delta.versions("s")) == len(saved) + there
    for _, seed, number in saved:
        pd.testing.assert_frame_equal(delta.load(f"s@{number}"), sales(50_000, seed))


def test_a_save_never_lands_on_top_of_what_it_has_not_seen(shop, monkeypatch):
    delta.save(sales(10), "s")
    real = delta.commit_note

    def slow(*args):
        deltalake.write_deltalake(delta.table_of("s"), to_table(sales(10)).replace_schema_metadata(None), mode="append")
        return real(*args)

    monkeypatch.setattr(delta, "commit_note", slow)
    with pytest.raises(Conflict, match="in the meantime"):
        delta.save(sales(30), "s")
    with pytest.raises(Conflict, match="in the meantime"):
        delta.rollback("s@0")
    monkeypatch.undo()
    assert [one.rows for one in delta.versions("s")] == [10, 20, 30] and delta.versions("s")[-1].operation == "WRITE (Append)"


def test_a_killed_save_leaves_the_version_before(shop):
    delta.save(sales(10), "s")
    code = f"""if True:
        import os, pandas as pd, numpy as np
        from mlops_nb.data import delta
        delta.commit_note = lambda *a: os.kill(os.getpid(), 9)
        delta.save(pd.DataFrame({{"a": np.arange(10)}}), "s")"""
    assert subprocess.run([sys.executable, "-c", code], cwd=shop, timeout=300).returncode == -9
    assert len(delta.versions("s")) == 1 and delta.load("s").equals(sales(10))


# Loss and damage

def test_a_vacuumed_version_is_gone_and_the_newest_is_not(shop):
    for rows in (10, 20, 30):
        delta.save(sales(rows), "s")
    deltalake.DeltaTable(delta.table_of("s")).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    for call in (delta.load, delta.rollback):
        with pytest.raises(NotFound, match="vacuumed; take a later version"):
            call("s@1")
    pd.testing.assert_frame_equal(delta.load("s"), sales(30))
    assert not delta.save(sales(30), "s").new and delta.load("s@2").equals(sales(30))


def test_our_tables_keep_their_history_unless_it_is_forced(shop):
    for rows in (10, 20):
        delta.save(sales(rows), "s")
    assert deltalake.DeltaTable(delta.table_of("s")).vacuum(dry_run=False) == []
    assert delta.load("s@0").equals(sales(10))


def test_a_log_that_was_cleaned_up(shop):
    place = written(shop / "lake", *[sales(5, seed) for seed in range(4)])
    deltalake.DeltaTable(place, version=2).create_checkpoint()
    for number in (0, 1):
        (shop / f"lake/_delta_log/{number:020d}.json").unlink()
    delta.register("s", place)
    assert [one.version for one in delta.versions("s")] == [2, 3]
    with pytest.raises(NotFound, match="no version 1, or its log was cleaned up; there are: 2, 3"):
        delta.load("s@1")


def test_a_flipped_byte_is_found(shop):
    frame = pd.DataFrame({"i": np.random.default_rng(0).integers(0, 2**62, 5000)})
    delta.save(frame, "s")
    file, = Path(delta.table_of("s")).glob("*.parquet")
    good = file.read_bytes()
    for position in np.random.default_rng(1).integers(8, len(good) * 9 // 10, 12):
        bad = bytearray(good)
        bad[position] ^= 4
        file.write_bytes(bad)
        with pytest.raises(Invalid, match="damaged"):
            delta.load("s")
    file.write_bytes(good)
    assert delta.load("s").equals(frame)


def test_a_damaged_log_is_one_sentence(shop):
    delta.save(sales(), "s")
    (shop / ".mlops/delta/s/_delta_log/00000000000000000000.json").write_text("{nonsense")
    with pytest.raises(Invalid, match="s refuses or is damaged"):
        delta.load("s")


# Names

def test_wrong_names_and_versions(shop):
    from mlops_nb.data import store

    delta.save(sales(), "sales")
    with pytest.raises(NotFound, match="'sale' is not a Delta table; did you mean sales"):
        delta.load("sale")
    for wrong in ("sales@7", "sales@99999999999999999999999"):
        with pytest.raises(NotFound, match="no version .* there are: 0"):
            delta.load(wrong)
    with pytest.raises(NotFound, match="no 'gold'"):
        delta.load("sales@gold")
    with pytest.raises(Invalid, match="no branches"):
        delta.table_of("sales:test")
    with pytest.raises(Invalid, match="no column 'Amount'; did you mean amount"):
        delta.load("sales", columns=["Amount"])
    with pytest.raises(Invalid, match="whose files lie at"):
        delta.load("sales", as_="path")
    with pytest.raises(Invalid, match="has a version"):
        delta.save(sales(), "sales@1")
    with pytest.raises(Conflict, match="is the Delta table at"):
        delta.save(sales(), "sales", location="elsewhere")
    store.save(sales(), "plain")
    with pytest.raises(Conflict, match="has versions in the data store"):
        delta.save(sales(), "plain")
    assert delta.table_of("plain") is None and list(delta.tables()) == ["sales"]


@pytest.mark.parametrize("place, error, said", [("nowhere", NotFound, "there is no Delta table at"), ("foo://x/y", NotFound, "there is no Delta table at"), ("settings.ini", (NotFound, Invalid, Unavailable), "s")])
def test_a_place_without_a_table(shop, place, error, said):
    delta.register("s", place)
    with pytest.raises(error, match=said):
        delta.load("s")
    assert not (shop / "nowhere").exists()


def test_the_settings_name_a_table(shop):
    place = written(shop / "lake", sales())
    with open(shop / "settings.ini", "a") as settings:
        settings.write("\n[data.s]\ndelta = lake\n")
    assert delta.table_of("s") == place and delta.tables() == {"s": "lake"}
    assert delta.save(sales(3), "s").version == 1 and len(delta.load("s@0")) == 200
    assert not (delta.place_of("s") / "delta.json").exists()


def test_tags_are_names_of_versions(shop):
    from mlops_nb.core.files import write_json

    delta.save(sales(10), "s"), delta.save(sales(20), "s")
    write_json(delta.place_of("s") / "tags.json", {"gold": 0})
    assert len(delta.load("s@gold")) == 10 and delta.version("s@gold").aliases == ("gold",) and delta.version("s@1").aliases == ()


def test_without_the_extra_it_says_what_to_install(shop, monkeypatch):
    delta.save(sales(), "s")
    monkeypatch.setitem(sys.modules, "deltalake", None)
    for call in (lambda: delta.load("s"), lambda: delta.versions("s"), lambda: delta.save(sales(), "s"), lambda: delta.rollback("s@0")):
        with pytest.raises(Unavailable, match=r"mlops_nb\[delta\]"):
            call()


def test_a_file_is_saved_as_the_frame_it_holds(shop):
    sales().to_parquet(shop / "sales.parquet")
    delta.save(shop / "sales.parquet", "s")
    assert delta.load("s").equals(pd.read_parquet(shop / "sales.parquet"))


def test_a_save_that_fails_claims_no_name(shop):
    with pytest.raises((NotFound, Invalid, Unavailable)):
        delta.save(sales(), "s", location="settings.ini/below")
    assert delta.tables() == {}


def with_deletion_vector(folder: Path, gone: list[int]) -> None:
    """Add the commit with which Spark deletes rows of the only file without rewriting it (Delta protocol, "Deletion Vectors": an inline RoaringBitmap in Z85)."""
    bitmap = struct.pack("<IQI", 1681511377, 1, 0) + struct.pack("<IIHHI", 12346, 1, 0, len(gone) - 1, 16) + struct.pack(f"<{len(gone)}H", *gone)
    letters, text = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#", ""
    for word, in struct.iter_unpack(">I", bitmap + b"\0" * (-len(bitmap) % 4)):
        text += "".join(letters[word // 85**i % 85] for i in range(4, -1, -1))
    add = next(json.loads(line)["add"] for line in (folder / f"_delta_log/{0:020d}.json").read_text().splitlines() if '"add"' in line)
    vector = {"storageType": "i", "pathOrInlineDv": text, "sizeInBytes": len(bitmap), "cardinality": len(gone)}
    actions = [{"commitInfo": {"timestamp": 1, "operation": "DELETE", "userName": "ana"}}, {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}},
               {"remove": {"path": add["path"], "deletionTimestamp": 1, "dataChange": True}}, {"add": {**add, "deletionVector": vector}}]
    (folder / f"_delta_log/{1:020d}.json").write_text("\n".join(map(json.dumps, actions)))


def test_rows_that_spark_deleted_by_a_vector_are_gone(shop):
    delta.register("s", written(shop / "lake", sales(10)))
    with_deletion_vector(shop / "lake", [2, 5])
    first, second = delta.versions("s")
    assert (first.rows, second.rows, second.by) == (10, 8, "ana") and first.digest != second.digest
    assert sorted(delta.load("s")["id"]) == [0, 1, 3, 4, 6, 7, 8, 9]
    assert sorted(delta.load("s", columns=["id"], where="id < 5")["id"]) == [0, 1, 3, 4]
    assert len(delta.load("s@0")) == 10
    delta.save(sales(3), "s")
    assert delta.load("s").equals(sales(3))


@pytest.fixture
def bucket(monkeypatch):
    """A bucket called lake on a real S3 API server (moto in server mode), in a process of its own: deltalake keeps Python's lock while it asks."""
    pytest.importorskip("moto")
    boto3 = pytest.importorskip("boto3")
    port = free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    for name, value in {"AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    server = subprocess.Popen([sys.executable, "-c", f"from moto.server import main; main(['-p', '{port}'])"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(3000):
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        boto3.client("s3", endpoint_url=url, region_name="us-east-1").create_bucket(Bucket="lake")
        yield "s3://lake"
    finally:
        server.kill()
        server.wait(120)


def test_a_table_in_a_bucket(shop, bucket):
    frame = FRAMES["categories"]
    delta.save(frame.iloc[:1], "s", location=f"{bucket}/sales")
    delta.save(frame, "s", message="all of it")
    assert delta.tables() == {"s": f"{bucket}/sales"} and [one.rows for one in delta.versions("s")] == [1, 3]
    pd.testing.assert_frame_equal(delta.load("s"), frame)
    assert delta.rollback("s@0").rows == 1 and len(delta.load("s@1", where="n == 3")) == 2
    with pytest.raises(NotFound, match="no version 9"):
        delta.load("s@9")
    delta.register("other", f"{bucket}/nothing/here")
    with pytest.raises(NotFound, match="there is no Delta table at s3://lake/nothing/here"):
        delta.load("other")


def test_what_a_delta_table_cannot_do_is_said(shop):  # noqa: F811
    from mlops_nb.data.branches import merge
    from mlops_nb.data.bundles import export
    from mlops_nb.data.remotes import push
    from mlops_nb.data.store import save as save_to

    save_to(pd.DataFrame({"x": [1, 2]}), "sales", backend="delta")
    for call in (lambda: push("sales", to=str(shop / "there")), lambda: export("sales@0"), lambda: merge("sales:b")):
        with pytest.raises(Invalid, match="Delta Lake table|branch"):
            call()
