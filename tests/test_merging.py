"""What would break for two people who changed the same data: a change that is lost, a contradiction that goes unseen, a frame that is not what it was."""

import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mlops_nb.core.errors import Conflict, Invalid
from mlops_nb.data.merging import merge_tables
from mlops_nb.data.tables import from_table, to_table

GONE = object()


def cell(value):
    """A cell as something that compares: NaN equals NaN, missing is missing."""
    if value is None or value is pd.NA or value is pd.NaT or isinstance(value, float) and math.isnan(value):
        return None
    return value.item() if hasattr(value, "item") else value


def rows_by_key(frame, keys):
    """{key: {column: cell}} in the order of the frame."""
    rows = [{str(name): cell(value) for name, value in zip(frame.columns, row)} for row in frame.itertuples(index=False)]
    return {tuple(row[name] for name in keys): row for row in rows}


def reference(base, ours, theirs, keys):
    """The slow and obvious merge: rows as dicts, or "conflict"."""
    names = [name for name in dict.fromkeys([*ours.columns, *theirs.columns])]
    b, o, t = (rows_by_key(frame, keys) for frame in (base, ours, theirs))
    for side, frame in ((o, ours), (t, theirs)):
        for name in set(base.columns) - set(frame.columns):  # a column that one side removed
            other, other_frame = (t, theirs) if side is o else (o, ours)
            if name in other_frame.columns and any(key in side and key in b and other[key][name] != b[key][name] for key in other):
                return "conflict"
            names = [one for one in names if one != name]
    merged = []
    for key in dict.fromkeys([*o, *t]):
        was, here, there = b.get(key), o.get(key), t.get(key)
        if was is not None and (here is None or there is None):
            left = here if here is not None else there
            if any(name in left and left[name] != was[name] for name in was):
                return "conflict"
            continue
        row = {}
        for name in names:
            values = [side.get(name, GONE) if side is not None else GONE for side in (was, here, there)]
            if values[1] is GONE or values[2] is GONE or values[1] == values[2]:
                value = values[1] if values[1] is not GONE else values[2]
            elif values[0] is not GONE and values[2] == values[0]:
                value = values[1]
            elif values[0] is not GONE and values[1] == values[0]:
                value = values[2]
            else:
                return "conflict"
            row[name] = None if value is GONE else value
        merged.append(row)
    return merged


def sample(rng, n):
    frame = pd.DataFrame({
        "id": rng.permutation(n * 3)[:n], "shop": rng.choice(["north", "south"], n), "price": np.where(rng.random(n) < 0.2, np.nan, np.round(rng.random(n), 2)),
        "count": rng.integers(0, 5, n), "flag": rng.random(n) < 0.5, "kind": pd.Categorical(rng.choice(["a", "b", "c"], n)),
        "time": pd.Timestamp("2024-01-01", tz="Europe/Berlin") + pd.to_timedelta(rng.integers(0, 99, n), unit="h"), "note": pd.Series(rng.choice(["x", "y", None], n), dtype="str")})
    frame["mixed"] = pd.Series([rng.choice([1, 2]) if rng.random() < 0.5 else "text" for _ in range(n)], dtype=object)
    return frame


def edited(frame, rng, name, edits, n_new, n_gone, column):
    """Cells changed, rows dropped, rows added, rows shuffled, a column added or removed."""
    frame = frame.copy()
    for row, column_name in zip(rng.integers(0, len(frame), edits), rng.choice(["price", "count", "kind", "note", "flag"], edits)):
        frame.loc[row, column_name] = {"price": round(rng.random(), 1), "count": int(rng.integers(0, 3)), "kind": rng.choice(["a", "b"]), "note": rng.choice(["x", "z"]), "flag": bool(rng.random() < 0.5)}[column_name]
    frame = frame.drop(index=rng.choice(len(frame), n_gone, replace=False)).reset_index(drop=True)
    fresh = sample(rng, n_new)
    fresh["id"] = 1000 + rng.permutation(50)[:n_new]
    frame = pd.concat([frame, fresh], ignore_index=True) if n_new else frame
    frame["kind"] = frame["kind"].astype(pd.CategoricalDtype(["a", "b", "c"]))
    if column == "added":
        frame[f"extra_{name}"] = rng.integers(0, 9, len(frame))
    elif column == "removed":
        frame = frame.drop(columns="time")
    return frame.sample(frac=1, random_state=int(rng.integers(99))).reset_index(drop=True) if rng.random() < 0.3 else frame


def scenario(seed):
    rng = np.random.default_rng(seed)
    base = sample(rng, 40)
    sides = [edited(base, rng, name, int(rng.integers(0, 3 + 12 * (seed % 4))), int(rng.integers(0, 3)), int(rng.integers(0, 3)), rng.choice(["added", "removed", "kept", "kept"])) for name in ("ours", "theirs")]
    return base, *sides, ["id"] if seed % 3 else ["id", "shop"]


SEEDS = range(80)


@pytest.mark.parametrize("seed", SEEDS)
def test_it_merges_as_the_obvious_merge_does(seed):
    *frames, keys = scenario(seed)
    expected = reference(*frames, keys)
    tables = [to_table(frame) for frame in frames]
    if expected == "conflict":
        with pytest.raises(Conflict):
            merge_tables(*tables, ",".join(keys))
        return
    merged = from_table(merge_tables(*tables, ",".join(keys)))
    assert list(rows_by_key(merged, keys).values()) == expected
    assert merged.index.equals(pd.RangeIndex(len(merged)))


def test_neither_outcome_is_rare():
    outcomes = [reference(*scenario(seed)) == "conflict" for seed in SEEDS[::2]]
    assert len(outcomes) / 8 < sum(outcomes) < len(outcomes) * 3 / 4


@pytest.fixture
def frame():
    return pd.DataFrame({"id": [1, 2, 3], "price": [1.0, np.nan, 3.0], "kind": pd.Categorical(["a", "b", "a"]), "count": [1, 2, 3]})


def merged(base, ours, theirs, key="id", **options):
    return from_table(merge_tables(*(to_table(one) for one in (base, ours, theirs)), key, **options))


def test_merging_nothing_gives_ours_exactly(frame):
    out = merged(frame, frame, frame)
    pd.testing.assert_frame_equal(out, frame, check_index_type="exact")


def test_one_side_alone_is_taken_whole(frame):
    theirs = frame.assign(price=[1.5, np.nan, 9.0], extra=["x", "y", "z"]).drop(index=1).reset_index(drop=True)
    pd.testing.assert_frame_equal(merged(frame, frame, theirs), theirs, check_index_type="exact")
    pd.testing.assert_frame_equal(merged(frame, theirs, frame), theirs, check_index_type="exact")


def test_the_message_names_what_contradicts(frame):
    ours, theirs = frame.copy(), frame.copy()
    ours.loc[0, "price"], theirs.loc[0, "price"] = 2.5, 3.5
    theirs.loc[1, "count"] = 7
    ours = ours.drop(index=1)
    with pytest.raises(Conflict, match=r"orders@3 and orders:x@1 cannot be merged: 1 cell changed differently on both sides \(id 1: price is 2.5 in orders@3 and 3.5 in orders:x@1\), "
                                       r"and 1 row changed on one side and removed on the other \(id 2: changed in orders:x@1, removed in orders@3\)\. Decide"):
        merged(frame, ours, theirs, what=("orders@2", "orders@3", "orders:x@1"))


def test_many_contradictions_are_counted_and_not_all_listed():
    base = pd.DataFrame({"id": range(1000), "x": 0})
    with pytest.raises(Conflict) as caught:
        merged(base, base.assign(x=1), base.assign(x=2))
    assert "1,000 cells" in str(caught.value) and len(str(caught.value)) < 600


def test_the_same_change_on_both_sides_is_fine(frame):
    both = frame.assign(price=[9.0, 8.0, np.nan])
    pd.testing.assert_frame_equal(merged(frame, both, both), both)


def test_nan_and_null_are_two_things():
    base = pa.table({"id": [1, 2], "x": pa.array([0.0, 0.0])})
    nan, null = pa.table({"id": [1, 2], "x": pa.array([math.nan, 0.0])}), pa.table({"id": [1, 2], "x": pa.array([None, 0.0], pa.float64())})
    assert merge_tables(*map(to_table, (base, nan, nan)), "id")["x"].to_pylist()[1] == 0.0
    with pytest.raises(Conflict, match="x is nan in ours and None in theirs"):
        merge_tables(*map(to_table, (base, nan, null)), "id")


def test_a_column_removed_here_and_changed_there_is_a_conflict(frame):
    with pytest.raises(Conflict, match="1 column changed on one side and removed or retyped on the other .count: changed in theirs, removed in ours"):
        merged(frame, frame.drop(columns="count"), frame.assign(count=[1, 2, 9]))
    assert list(merged(frame, frame.drop(columns="count"), frame.assign(price=5.0)).columns) == ["id", "price", "kind"]


def test_gaps_in_an_added_column_do_not_change_its_numbers(frame):
    ours = frame.assign(big=[2**60 + 1, 2, 3], yes=True)
    theirs = pd.concat([frame, frame.head(1).assign(id=4)], ignore_index=True)
    out = merged(frame, ours, theirs)
    assert out["big"].dtype == "Int64" and out["big"].tolist()[:3] == [2**60 + 1, 2, 3] and out["big"].isna().tolist() == [False, False, False, True]
    assert out["yes"].dtype == "boolean"


def test_categories_of_both_sides_are_kept(frame):
    ours = frame.assign(kind=pd.Categorical(["c", "b", "a"]))
    theirs = pd.concat([frame.astype({"kind": "str"}), pd.DataFrame({"id": [4], "price": [0.0], "kind": ["d"], "count": [0]})], ignore_index=True).astype({"kind": "category"})
    out = merged(frame, ours, theirs)
    assert out["kind"].tolist() == ["c", "b", "a", "d"] and set(out["kind"].cat.categories) == {"a", "b", "c", "d"}


def test_a_side_that_retyped_a_column_prevails(frame):
    theirs = frame.astype({"count": "float64"})
    theirs.loc[0, "count"] = 1.5
    out = merged(frame, frame.assign(price=0.0), theirs)
    assert out["count"].tolist() == [1.5, 2.0, 3.0] and out["price"].tolist() == [0.0] * 3
    with pytest.raises(Conflict, match="'count' is .*string in theirs|column 'count'"):
        merged(frame, frame.astype({"count": "float64"}), frame.assign(count=["one", "two", "three"]))


def test_mixed_objects_meet_plain_ones(frame):
    base = frame.assign(o=pd.Series(["a", "b", None], dtype=object))
    theirs = frame.assign(o=pd.Series(["a", 7, None], dtype=object))
    assert merged(base, base.assign(price=0.0), theirs)["o"].tolist() == ["a", 7, None]


def test_a_filtered_branch_comes_back_under_plain_row_numbers(frame):
    branch = frame[frame["id"] != 2]
    assert not isinstance(branch.index, pd.RangeIndex) or branch.index.step != 1
    newer = pd.concat([frame, frame.head(1).assign(id=4)], ignore_index=True)
    out = merged(frame, newer, branch)
    assert out["id"].tolist() == [1, 3, 4] and out.index.tolist() == [0, 1, 2]


def test_a_named_index_on_one_side_only_is_refused(frame):
    with pytest.raises(Invalid, match="different indexes"):
        merged(frame, frame, frame.set_index(pd.Index(["x", "y", "z"], name="label")))


def test_a_named_index_on_all_sides_stays(frame):
    base = frame.set_index(pd.Index(["x", "y", "z"], name="label"))
    theirs = pd.concat([base, frame.head(1).assign(id=9).set_index(pd.Index(["w"], name="label"))])
    assert merged(base, base, theirs).index.tolist() == ["x", "y", "z", "w"]


def test_odd_labels_and_duplicates_of_labels_survive():
    base = pd.DataFrame([[1, 2, 3]], columns=["id", 0, "0"])
    theirs = base.assign(**{"new": 5})
    out = merged(base, base, theirs)
    assert list(out.columns) == ["id", 0, "0", "new"]


@pytest.mark.parametrize("key, told", [("nope", "no column 'nope'"), ("", "no key to merge by"), ("count", "not unique in base")])
def test_a_key_that_does_not_hold_is_refused(frame, key, told):
    frame = frame.assign(count=1)
    with pytest.raises(Invalid, match=told):
        merged(frame, frame, frame, key)


def test_arrow_tables_keep_their_schema():
    schema = pa.schema([pa.field("id", pa.int32(), nullable=False), pa.field("kind", pa.dictionary(pa.int8(), pa.string())), pa.field("tags", pa.list_(pa.int16()))], metadata={b"made": b"here"})
    base = pa.table({"id": [1, 2], "kind": ["a", "b"], "tags": [[1], [2]]}, schema=schema)
    ours = pa.table({"id": [1, 2], "kind": ["c", "b"], "tags": [[1], [2]]}, schema=schema)
    theirs = pa.table({"id": [1, 2, 3], "kind": ["a", "b", "d"], "tags": [[1], [2, 3], []]}, schema=schema)
    out = from_table(merge_tables(*map(to_table, (base, ours, theirs)), "id"))
    assert out.schema.equals(schema, check_metadata=True)
    assert out.to_pydict() == {"id": [1, 2, 3], "kind": ["c", "b", "d"], "tags": [[1], [2, 3], []]}


def test_text_in_views_is_merged():
    base = pa.table({"id": range(300), "text": pa.array([str(i) for i in range(300)], pa.string_view())})
    theirs = pa.table({"id": range(0, 300, 2), "text": pa.array([str(i) for i in range(0, 300, 2)], pa.string_view())})
    assert from_table(merge_tables(*map(to_table, (base, base, theirs)), "id")).equals(theirs)


def test_tables_without_notes_merge_too():
    base, theirs = pa.table({"id": [1], "x": [1]}), pa.table({"id": [1, 2], "x": [1, 2]})
    assert merge_tables(base, base, theirs, "id").equals(theirs)


def test_pandas_and_arrow_sides_meet(frame):
    frame = frame.drop(columns="kind")
    theirs = pa.Table.from_pandas(frame.assign(price=[0.0, 0.0, 0.0]), preserve_index=False)
    out = from_table(merge_tables(to_table(frame), to_table(frame), to_table(theirs), "id"))
    assert isinstance(out, pd.DataFrame) and out["price"].tolist() == [0.0] * 3


def test_an_empty_side():
    base = pd.DataFrame({"id": pd.Series([], dtype="int64"), "x": pd.Series([], dtype="float64")})
    theirs = pd.DataFrame({"id": [1], "x": [2.0]})
    pd.testing.assert_frame_equal(merged(base, base, theirs), theirs)
    pd.testing.assert_frame_equal(merged(theirs, base, theirs), base)
