"Versions as selections of rows: what `restore` gives is what `find` was given, bit for bit, whatever was edited."
from __future__ import annotations

import io
from datetime import date, datetime, timedelta
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlops_nb.core.errors import Invalid
from mlops_nb.data import fingerprint, selection
from mlops_nb.data.fingerprint import differs, row_keys, table_digest
from mlops_nb.data.selection import decode, encode, find, restore
from mlops_nb.data.tables import from_table, to_table, write_table

NAN2 = np.array([0x7FF8000000000001], np.uint64).view(float)[0]  # a NaN with another payload
VALUES = {
    pa.int64(): lambda r: int(r.integers(-5, 5)), pa.uint8(): lambda r: int(r.integers(0, 4)), pa.bool_(): lambda r: bool(r.integers(0, 2)),
    pa.float64(): lambda r: [0.0, -0.0, float("nan"), NAN2, float("inf"), 1.5][r.integers(0, 6)], pa.float32(): lambda r: float(r.integers(0, 3)),
    pa.float16(): lambda r: np.float16(r.integers(0, 3)),
    pa.string(): lambda r: ["", "a", "é" * 70, "x" * 200, "x" * 100 + "y" + "x" * 99][r.integers(0, 5)], pa.large_string(): lambda r: str(r.integers(0, 9)),
    pa.binary(): lambda r: bytes(r.integers(0, 3, 3, dtype=np.uint8)), pa.binary(3): lambda r: bytes(r.integers(0, 3, 3, dtype=np.uint8)),
    pa.timestamp("us"): lambda r: datetime(2024, 1, int(r.integers(1, 9))), pa.timestamp("ns", "Europe/Berlin"): lambda r: datetime(2024, 1, int(r.integers(1, 9))),
    pa.timestamp("s"): lambda r: datetime(2024, 1, int(r.integers(1, 9))),
    pa.date32(): lambda r: date(2024, 1, int(r.integers(1, 9))), pa.duration("ms"): lambda r: timedelta(seconds=int(r.integers(0, 9))),
    pa.decimal128(9, 2): lambda r: Decimal(int(r.integers(-9, 9))) / 100, pa.decimal256(50, 2): lambda r: Decimal(int(r.integers(-9, 9))) / 100,
    pa.null(): lambda r: None, pa.list_(pa.int32()): lambda r: [None if x == 0 else int(x) for x in r.integers(0, 3, r.integers(0, 4))],
    pa.large_list(pa.string()): lambda r: ["ab"[x] for x in r.integers(0, 2, r.integers(0, 3))], pa.list_(pa.float64(), 2): lambda r: [float(x) for x in r.integers(0, 3, 2)],
    pa.struct([("a", pa.int64()), ("b", pa.string())]): lambda r: {"a": int(r.integers(0, 2)), "b": None if r.random() < 0.3 else "q"},
    pa.list_(pa.struct([("x", pa.list_(pa.float32()))])): lambda r: [{"x": [float(r.integers(0, 2))] * int(r.integers(0, 3))}] * int(r.integers(0, 3)),
    pa.map_(pa.string(), pa.int64()): lambda r: [("k", int(r.integers(0, 3)))] * int(r.integers(0, 2)),
}


def column(kind: pa.DataType, n: int, r: np.random.Generator) -> pa.Array:
    gaps = 0 if pa.types.is_fixed_size_list(kind) else r.choice([0.0, 0.3])  # Parquet cannot hold nulls among lists of fixed size
    return pa.array([None if r.random() < gaps else VALUES[kind](r) for _ in range(n)], kind)


def random_table(seed: int) -> pa.Table:
    r = np.random.default_rng(seed)
    n, kinds = int(r.choice([1, 7, 60, 300])), list(VALUES)
    names = ["a", "a.b", "ä", "", "id", "z 1", "a.b.c"][:int(r.integers(1, 8))]
    table = pa.table({name: column(kinds[r.integers(len(kinds))], n, r) for name in names})
    if r.random() < 0.7:
        table = table.append_column("key", pa.array(r.permutation(n)))
    return table.replace_schema_metadata({b"mlops_nb": b"{}", b"more": bytes([r.integers(256)])} if r.random() < 0.8 else None)


def edited(table: pa.Table, seed: int) -> pa.Table:
    r = np.random.default_rng(seed)
    for step in r.choice(["drop", "sample", "sort", "append", "cells", "column", "rename", "retype", "block", "twice", "order", "nothing"], r.integers(1, 4)):
        n = len(table)
        if step in ("drop", "sample", "sort", "block", "twice"):
            rows = {"drop": np.flatnonzero(r.random(n) > 0.1), "sample": r.permutation(n)[:n // 2 + 1], "sort": r.permutation(n),
                    "block": np.delete(np.arange(n), slice(n // 3, n // 2)), "twice": np.r_[np.arange(n), r.integers(0, n, n // 4)] if n else np.arange(0)}[step]
            table = table.take(pa.array(rows, pa.int64()))
        elif step == "append":
            table = pa.concat_tables([table, pa.table([column(kind, n // 5, r) for kind in table.schema.types], schema=table.schema)])
        elif step == "cells" and table.num_columns:
            i = int(r.integers(table.num_columns))
            change = r.random(n) < 0.1
            other = column(table.schema.types[i], n, r)
            mix = pa.array([new if yes else old for yes, new, old in zip(change, other.to_pylist(), table.column(i).to_pylist())], table.schema.types[i])
            table = table.set_column(i, table.schema.field(i), mix)
        elif step == "column":
            table = table.append_column(f"new {table.num_columns}", column(list(VALUES)[r.integers(len(VALUES))], n, r))
        elif step == "rename" and table.num_columns > 1:
            table = table.rename_columns(["renamed", *table.column_names[1:]]) if "renamed" not in table.column_names else table
        elif step == "retype" and "key" in table.column_names:
            table = table.set_column(table.column_names.index("key"), "key", table["key"].cast(pa.int32()))
        elif step == "order":
            table = table.select(list(r.permutation(table.column_names)))
    return table


def parquet(table: pa.Table, **how: object) -> pq.ParquetFile:
    file = io.BytesIO()
    pq.write_table(table, file, **how)
    return pq.ParquetFile(io.BytesIO(file.getvalue()))


def parts_of(table: pa.Table, r: np.random.Generator) -> list[pq.ParquetFile]:
    cut = int(r.integers(0, len(table) + 1))
    pieces = [table] if r.random() < 0.5 else [table.slice(0, cut), table.slice(cut)]
    return [parquet(piece, row_group_size=int(r.choice([5, 1000])), use_content_defined_chunking=True) for piece in pieces]


@pytest.mark.parametrize("seed", range(150))
def test_what_is_restored_is_what_was_given(seed, monkeypatch):
    r = np.random.default_rng(seed)
    if seed % 2:  # many pieces in a small table
        monkeypatch.setattr(selection, "ROWS", 16)
        monkeypatch.setattr(fingerprint, "PIECE", 8)
    old = random_table(seed)
    new, parts = edited(old, seed + 1000), parts_of(old, r)
    found = find(parts, new)
    if found is None:
        return
    positions = decode(encode(found.positions))
    assert np.array_equal(positions, found.positions)
    assert len(found.fresh) == (positions < 0).sum() and 2 * (positions >= 0).sum() >= len(new)
    fresh, extra = (found.fresh, found.extra) if seed % 3 else (parquet(found.fresh), found.extra and parquet(found.extra))
    again = restore(parts, positions, fresh, extra, new.schema)
    again.validate(full=True)
    assert again.schema.equals(new.schema, check_metadata=True)
    assert table_digest(again) == table_digest(new)
    assert repr(again.to_pylist()) == repr(new.to_pylist())  # independent of our digest: nulls, NaN and -0.0 by their text
    some = list(r.permutation(new.column_names)[:2])
    assert table_digest(restore(parts, positions, fresh, extra, new.schema, some)) == table_digest(new.select(some))


def test_most_random_edits_are_found():
    "The property above must not hold because nothing is ever found."
    found = 0
    for seed in range(60):
        old = random_table(seed)
        found += find(parts_of(old, np.random.default_rng(seed)), edited(old, seed + 1000)) is not None
    assert found >= 40


@pytest.fixture(scope="module")
def frame():
    r, n = np.random.default_rng(0), 5000
    return pd.DataFrame({"id": np.arange(n) * 3, "user": r.integers(0, 50, n), "price": r.normal(size=n), "weight": np.where(r.random(n) < 0.1, np.nan, r.random(n)),
                         "city": pd.Categorical(r.choice(["Rome", "Oslo"], n)), "text": pd.Series(r.choice(["one", "two", "three"], n), dtype="str"),
                         "time": pd.date_range("2024", periods=n, freq="min", tz="Asia/Tokyo")})


@pytest.mark.parametrize("edit, fresh, extra", [
    (lambda f: f.copy(), 0, []),
    (lambda f: pd.concat([f, f.tail(50).assign(id=range(90_000, 90_050))], ignore_index=True), 50, []),
    (lambda f: f.assign(price=f.price.where(f.index % 100 != 7, 1.0)), 50, []),
    (lambda f: f.drop(range(2000, 2100)), 0, ["__index_0__"]),
    (lambda f: f.drop(range(2000, 2100)).reset_index(drop=True), 0, []),
    (lambda f: f.assign(more=1.0), 0, ["more"]),
    (lambda f: f.sample(500, random_state=0), 0, ["__index_0__"]),
    (lambda f: f.sort_values("text"), 0, ["__index_0__"]),
    (lambda f: f[["text", "id"]], 0, []),
    (lambda f: f[f.user < 40].assign(price=lambda g: g.price * 2), 0, ["price", "__index_0__"]),
    (lambda f: f[f.user < 40].assign(id=lambda g: range(len(g))), 0, ["id", "__index_0__"]),
    (lambda f: f.sample(9000, replace=True, random_state=0).reset_index(drop=True), 0, []),
], ids=["same", "append", "cells", "drop", "drop and count anew", "column", "sample", "sort", "columns", "filter and rescale", "filter and renumber", "bootstrap"])
def test_daily_edits_cost_only_what_is_new(frame, tmp_path, edit, fresh, extra):
    write_table(to_table(frame), tmp_path / "old.parquet")
    new = edit(frame)
    table, part = to_table(new), pq.ParquetFile(tmp_path / "old.parquet")
    found = find([part], table)
    assert (len(found.fresh), found.extra.column_names if found.extra is not None else []) == (fresh, extra)
    again = restore([part], found.positions, found.fresh, found.extra, table.schema)
    pd.testing.assert_frame_equal(from_table(again), new, check_freq=True)


@pytest.mark.parametrize("new", [pa.table({"other": [1, 2, 3]}), pa.table({"a": [7, 8, 9]}), pa.table({"a": pa.array([1, 2, 3], pa.int8())}), pa.table({"a": pa.array([], pa.int64())}),
                                 pa.table({}), pa.table({"a": [1, 8, 9]})], ids=["no column", "no row", "other type", "empty", "no columns", "a third"])
def test_nothing_worth_selecting(new):
    assert find([parquet(pa.table({"a": [1, 2, 3]}))], new) is None
    assert find([parquet(pa.table({"a": pa.array([], pa.int64())}))], new) is None
    assert find([], new) is None


def test_equal_numbers_are_not_believed(frame, monkeypatch):
    "Every row gets one of eight numbers: what is restored is right all the same."
    table = to_table(frame.head(400))
    monkeypatch.setattr(selection, "row_keys", lambda column, keys=None: row_keys(column, keys) & np.uint64(7 << 40))
    part, new = parquet(table), table.take(pa.array(np.r_[0:300, 390:400, 5, 300:380]))
    found = find([part], new)
    if found is not None:
        assert restore([part], found.positions, found.fresh, found.extra, new.schema).equals(new, check_metadata=True)


def test_repeated_rows_stay_in_runs():
    "A block cut out of a table with few different rows is two runs, not a search through all the equal ones."
    table = pa.table({"a": np.arange(10_000) % 7, "b": np.arange(10_000) % 3})
    found = find([parquet(table)], table.take(pa.array(np.delete(np.arange(10_000), np.s_[4000:4100]))))
    assert len(found.fresh) == 0 and len(encode(found.positions)) < 200


def test_rows_dropped_at_random_stay_runs_among_repeated_ones():
    "A tenth of the rows stand twice; 1% dropped cost about two bytes each, as they would without repetition."
    r, n = np.random.default_rng(0), 40_000
    values = np.where(r.random(n) < 0.1, r.integers(0, n, n), np.arange(n))
    kept = np.flatnonzero(r.random(n) > 0.01)
    found = find([parquet(pa.table({"a": values}))], pa.table({"a": values[kept]}))
    assert len(found.fresh) == 0 and len(encode(found.positions)) < 1.5 * len(encode(kept))


def test_a_selection_of_other_files_is_refused():
    table = pa.table({"a": np.arange(100)})
    found = find([parquet(table)], table.slice(20))
    for other in (table.slice(50), table.slice(0, 0)):
        with pytest.raises(Invalid, match="does not belong to these files"):
            restore([parquet(other)], found.positions, found.fresh, None, table.schema)
    with pytest.raises(Invalid, match="does not belong"):
        restore([parquet(table)], found.positions, table, None, table.schema)


def test_a_damaged_part_is_named(tmp_path):
    write_table(pa.table({"a": np.random.default_rng(0).random(1000)}), tmp_path / "a.parquet")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[50:90] = bytes(40)
    part = pq.ParquetFile(io.BytesIO(bytes(data)))
    with pytest.raises(Invalid, match="not a readable Parquet file"):
        restore([part], np.arange(1000), pa.table({"a": pa.array([], pa.float64())}), None, pa.schema([("a", pa.float64())]))


# --- positions as bytes -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("positions", [[], [-1], [0], [5, 4, 3], [-1, -1, 0, 1, -1, 7, 8, 9, 2**40, -1], list(range(1000)), [3] * 50], ids=str)
def test_positions_come_back(positions):
    assert decode(encode(np.array(positions, np.int64))).tolist() == positions


def test_positions_are_small():
    r, n = np.random.default_rng(0), 400_000
    dropped = np.flatnonzero(r.random(n) >= 0.005)
    assert len(encode(dropped)) < 6_000  # a tenth of 4M rows' 40-60 KB
    assert len(encode(np.delete(np.arange(n), np.s_[1000:1400]))) < 200
    assert len(encode(r.permutation(n))) < 1_300_000


def test_a_damaged_byte_is_noticed():
    data = encode(np.array([1, 2, 3, -1, 9]))
    for i in range(len(data)):
        with pytest.raises(Invalid, match="whole bytes of a selection"):
            decode(data[:i] + bytes([data[i] ^ 1]) + data[i + 1:])
        with pytest.raises(Invalid):
            decode(data[:i])


# --- digests, keys, differences ----------------------------------------------------------------------------------------------------------------

def elsewhere(array: pa.Array, r: np.random.Generator) -> pa.ChunkedArray:
    "The same values in other places: behind an offset, in several chunks."
    n = len(array)
    cut = int(r.integers(0, n + 1))
    padded = pa.concat_arrays([array.slice(0, min(3, n)), array])
    return pa.chunked_array([padded.slice(min(3, n), cut), pa.array([], array.type), array.slice(cut)], array.type)


@pytest.mark.parametrize("kind", VALUES, ids=str)
def test_digest_and_numbers_depend_on_values_only(kind):
    r = np.random.default_rng(1)
    for n in (0, 1, 9, 40):
        array = column(kind, n, r)
        table, moved = pa.table({"a": array}), pa.table({"a": elsewhere(array, r)})
        assert table_digest(moved) == table_digest(table)
        assert np.array_equal(row_keys(moved["a"]), row_keys(array))
        other = pa.array(array.to_pylist()[::-1], kind)
        texts = [repr(value) for value in array.to_pylist()]
        wrong = differs(array, other)
        same = [a == b for a, b in zip(texts, texts[::-1])]
        assert all(not no or yes for no, yes in zip(~wrong, same))  # what is called equal looks equal
        assert all(no == (not yes) for no, yes in zip(wrong, same) if kind != pa.float64())  # two NaNs look alike
        assert (table_digest(pa.table({"a": other})) != table_digest(table)) == bool(wrong.any())
        assert not wrong[row_keys(array) != row_keys(other)].size or wrong[row_keys(array) != row_keys(other)].all()


def test_what_lies_under_nulls_does_not_count():
    mask = pa.array([True, False, True]).buffers()[1]
    one, two = (pa.Array.from_buffers(pa.int64(), 3, [mask, pa.array([1, under, 3]).buffers()[1]]) for under in (2, 99))
    assert one.null_count == 1 and table_digest(pa.table({"a": one})) == table_digest(pa.table({"a": two})) and not differs(one, two).any()
    text, blank = (pa.Array.from_buffers(pa.string(), 3, [mask, *pa.array(["a", under, "c"]).buffers()[1:]]) for under in ("garbage", ""))
    assert table_digest(pa.table({"a": text})) == table_digest(pa.table({"a": blank})) and np.array_equal(row_keys(text), row_keys(blank))
    lists, plain = (pa.Array.from_buffers(kind, 3, [mask, pa.array([0, 1, 2 if items[1] else 1, 3 if items[1] else 2], pa.int32()).buffers()[1]], children=[pa.array([1, 5, 3] if items[1] else [1, 3])])
                    for kind, items in ((pa.list_(pa.int64()), (1, 1)), (pa.list_(pa.int64()), (1, 0))))
    assert lists.to_pylist() == plain.to_pylist() == [[1], None, [3]]
    assert table_digest(pa.table({"a": lists})) == table_digest(pa.table({"a": plain})) and not differs(lists, plain).any()


def test_what_the_digest_tells_apart():
    base = pa.table({"a": [1.0, 2.0]})
    others = [pa.table({"b": [1.0, 2.0]}), pa.table({"a": pa.array([1.0, 2.0], pa.float32())}), base.replace_schema_metadata({"x": "y"}), base.slice(0, 1),
              pa.table({"a": [1.0, None]}), pa.table({"a": [1.0, float("nan")]}), pa.table({"a": [1.0, NAN2]}), pa.table({"a": [0.0, 2.0]}), pa.table({"a": [-0.0, 2.0]}),
              pa.table([base["a"]], schema=pa.schema([pa.field("a", pa.float64(), nullable=False)])), pa.table({"a": ["1", "2"]}), pa.table({"a": ["12", ""]}), pa.table({}),
              pa.table({"a": pa.array(["1", "2"], pa.large_string())}), pa.table({"a": [[1.0], [2.0]]}), pa.table({"a": [[1.0, 2.0], []]}), pa.table({"a": [[1.0, 2.0], None]})]
    digests = [table_digest(table) for table in [base, *others]]
    assert len(set(digests)) == len(digests)


def test_digest_is_the_same_everywhere():
    "A known value: a change of the digest would make every saved version look damaged."
    table = pa.table({"a": pa.array([1, None, 3]), "b": pa.array(["x", "", None]), "c": pa.array([[1.5], None, []])}, metadata={"k": "v"})
    assert table_digest(table) == "f6be8f281ed9c0b1a98fca4db09c1355df12255dd282522e5e2eea5b93f90f0a"


def test_dictionaries_and_views_are_their_values():
    text = pa.array(["a", None, "b", "a"] * 20)
    for kind in (pa.string_view(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())):
        assert np.array_equal(row_keys(text.cast(kind) if not pa.types.is_dictionary(kind) else text.dictionary_encode().cast(kind)), row_keys(text))


def test_numbers_of_different_values_differ():
    r = np.random.default_rng(0)
    whole, texts = pa.array(np.arange(200_000)), pa.array([f"{a} {b}" for a, b in zip(r.integers(0, 9, 100_000), range(100_000))])
    assert len(np.unique(row_keys(whole))) == 200_000 and len(np.unique(row_keys(texts))) == 100_000
    assert len(np.unique(row_keys(pa.array([""] * 3 + ["\0", "\0\0"])))) == 3
    assert len(set(row_keys(pa.array([[1, 2], [2, 1], [1], [], [[1, 2][0], 2, 0]])).tolist())) == 5
