"""What would break for somebody who asks what changed: a change that is not told, one that is made up, a figure that is wrong."""

import json
import math
from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import stats

from mlops_nb.core.errors import Invalid, NotFound
from mlops_nb.core.report import Report
from mlops_nb.core.settings import in_project, init
from mlops_nb.data.diff import diff
from mlops_nb.data.matching import differing, match, match_content, numbered, row_numbers
from mlops_nb.data.shifts import shift
from mlops_nb.data.store import save


@pytest.fixture
def shop(tmp_path):
    init(str(tmp_path), name="shop")
    with in_project(tmp_path):
        yield tmp_path


def facts(old, new, **options):
    report = diff(old, new, **options)
    for view in (report.text(), report.markdown(), report.html(), report.json()):
        assert view and "nan" not in view.split("changed cells")[0].lower().replace("nan,", "")[:200]
    return json.loads(report.json())


def text(value):
    return "nan" if isinstance(value, float) and math.isnan(value) else repr(value)


def reference(old, new, keys):
    """The slow and obvious comparison of two lists of dicts."""
    if not keys:
        bags = [Counter(tuple(map(text, row.values())) for row in rows) for rows in (old, new)]
        return {"rows_added": sum((bags[1] - bags[0]).values()), "rows_removed": sum((bags[0] - bags[1]).values()), "rows_changed": 0, "cells_changed": 0}
    sides = [{tuple(row[name] for name in keys): row for row in rows} for rows in (old, new)]
    both = [key for key in sides[1] if key in sides[0]]
    cells = {key: sum(text(sides[0][key][name]) != text(sides[1][key][name]) for name in sides[0][key]) for key in both}
    return {"rows_added": len(sides[1]) - len(both), "rows_removed": len(sides[0]) - len(both), "rows_changed": sum(map(bool, cells.values())), "cells_changed": sum(cells.values()),
            "row_order": "the same" if [key for key in sides[0] if key in sides[1]] == both else "changed"}


def sample(rng, n):
    numbers = [None if rng.random() < 0.1 else math.nan if rng.random() < 0.1 else float(rng.integers(0, 5)) for _ in range(n)]
    return {"id": [int(value) for value in rng.permutation(n * 2)[:n]], "word": [str(value) for value in rng.choice(["a", "b", None], n)], "x": numbers, "small": [int(value) for value in rng.integers(0, 3, n)],
            "when": [pd.Timestamp("2024-01-01").to_pydatetime() + pd.Timedelta(days=int(value)).to_pytimedelta() for value in rng.integers(0, 9, n)], "list": [[int(value)] for value in rng.integers(0, 3, n)]}


def edited(rows, rng):
    rows = [dict(row) for row in rows]
    for row in rng.integers(0, len(rows), int(rng.integers(0, 12))):
        rows[row][rng.choice(["word", "x", "small", "list"])] = None if rng.random() < 0.3 else 0
    for row in rows:
        row["word"] = None if row["word"] is None else str(row["word"])
        row["list"] = [0] if row["list"] == 0 else row["list"]
        row["x"] = float(row["x"]) if row["x"] is not None else None
    rows = [row for row in rows if rng.random() > rng.choice([0, 0.1])]
    rows += [{**rows[0], "id": 10_000 + i} for i in range(int(rng.integers(0, 4)))] if rows else []
    return [rows[i] for i in rng.permutation(len(rows))] if rng.random() < 0.3 else rows


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("seed", range(25))
def test_it_counts_as_the_obvious_comparison_does(seed, keyed):
    rng = np.random.default_rng(seed)
    old = pa.table(sample(rng, 60))
    if not keyed:  # content needs repeated rows
        old = pa.concat_tables([old, old.slice(0, 20)]).drop_columns(["id"] if seed % 2 else [])
    rows = old.to_pylist() if "id" in old.column_names else [{**row, "id": 0} for row in old.to_pylist()]
    later = [{name: row[name] for name in old.column_names} for row in edited(rows, rng)]
    new = pa.Table.from_pylist(later, old.schema)
    expected = reference(old.to_pylist(), later, ["id"] if keyed else [])
    found = facts(old, new, key="id" if keyed else "")
    assert {name: found[name] for name in expected} == expected


def test_several_columns_of_several_types_are_a_key():
    old = pd.DataFrame({"day": pd.to_datetime(["2024-01-01", "2024-01-01", None]), "shop": pd.Categorical(["n", "s", "s"]), "at": [0.5, np.nan, np.nan], "sum": [1, 2, 3]})
    new = old.iloc[::-1].assign(sum=[3, 2, 9]).astype({"shop": "str"})
    found = facts(old, new, key="day, shop,at")
    assert (found["rows_added"], found["rows_removed"], found["rows_changed"], found["row_order"]) == (0, 0, 1, "changed")
    assert found["changed_cells"] == [{"key": "2024-01-01 00:00:00, n, 0.5", "column": "sum", "before": "1", "after": "9"}]


@pytest.mark.parametrize("before, after, differ", [
    (pa.array([math.nan]), pa.array([math.nan]), False), (pa.array([math.nan]), pa.array([None], pa.float64()), True), (pa.array([None], pa.float64()), pa.array([None], pa.float64()), False),
    (pa.array([np.float64("nan")]), pa.array(np.array([0x7FF8000000000001], "u8").view("f8")), False), (pa.array([0.1 + 0.2]), pa.array([0.3]), True), (pa.array([0.0]), pa.array([-0.0]), True),
    (pa.array([1.5], pa.float16()), pa.array([1.5], pa.float16()), False), (pa.array([math.nan, 1.0], pa.float16()), pa.array([math.nan, 2.0], pa.float16()), True),
    (pa.array([""]), pa.array([None], pa.string()), True), (pa.array([None]), pa.array([None]), False), (pa.array([[1, None]]), pa.array([[1, 2]]), True),
    (pa.array([{"a": math.nan}]), pa.array([{"a": math.nan}]), False), (pa.array([b"a"]), pa.array([b"b"]), True), (pa.array([True, None]), pa.array([True, False]), True)])
def test_which_cells_differ(before, after, differ):
    assert bool(differing(pa.chunked_array([before]), pa.chunked_array([after])).any()) is differ


@pytest.mark.parametrize("before, after, cells, retyped", [
    (pd.Categorical(["a", "b"]), pd.Categorical(["a", "b"], categories=["c", "b", "a"]), 0, 0), (pd.Categorical(["a", "b"]), ["a", "b"], 0, 1),
    (pd.array([1, 2], "int32"), [1, 2], 0, 1), ([1, 2], [1.0, 2.5], 1, 1), ([1, 2], ["1", "2"], 0, 1),
    (pd.to_datetime(["2024-07-01 10:00", "2024-07-02 00:00"]).tz_localize("UTC"), pd.to_datetime(["2024-07-01 12:00", "2024-07-02 02:00"]).tz_localize("Europe/Berlin"), 0, 1),
    (pd.to_datetime(["2024-07-01", "2024-07-02"]).tz_localize("UTC"), pd.to_datetime(["2024-07-01", "2024-07-02"]).tz_localize("Europe/Berlin"), 2, 1),
    (pd.array(["a", None], "string"), np.array(["a", None], dtype=object), 0, 0)])
def test_values_and_types_are_told_apart(before, after, cells, retyped):
    found = facts(pd.DataFrame({"id": [1, 2], "x": before}), pd.DataFrame({"id": [1, 2], "x": after}), key="id")
    assert (found["cells_changed"], found["columns_retyped"]) == (cells, retyped)


def test_text_against_numbers_is_said_to_be_incomparable():
    found = facts(pd.DataFrame({"id": [1], "x": [1]}), pd.DataFrame({"id": [1], "x": ["1"]}), key="id")
    assert found["schema"] == [{"column": "x", "change": "retyped, values not comparable", "before": "int64", "after": "string"}]


def test_columns_added_removed_and_in_another_order():
    found = facts(pd.DataFrame({"a": [1], "b": [2], "c": [3]}), pd.DataFrame({"d": [0.5], "b": [2], "a": [1]}))
    assert [(row["column"], row["change"]) for row in found["schema"]] == [("d", "added"), ("c", "removed"), ("(order)", "reordered")]
    assert (found["columns_added"], found["columns_removed"], found["rows_added"]) == (1, 1, 0)


def test_only_the_order_is_said_as_such():
    frame = pd.DataFrame({"id": range(9), "x": 1.0})
    turned = frame.iloc[::-1].reset_index(drop=True)
    for options in ({"key": "id"}, {}):
        found = facts(frame, turned, **options)
        assert found["summary"].startswith("Only the order of the rows differs.") and found["rows_changed"] == found["rows_added"] == 0
    assert facts(frame, frame[["x", "id"]], key="id")["summary"] == "Only the order of the columns differs."
    assert facts(frame, frame.copy(), key="id")["summary"] == "Nothing differs."


def test_nothing_in_common_and_nothing_at_all():
    assert facts(pd.DataFrame({"a": [1, 2]}), pd.DataFrame({"b": [1]}))["rows_removed"] == 2
    empty = pd.DataFrame({"a": pd.Series([], dtype="int64"), "b": pd.Series([], dtype="str")})
    assert facts(empty, empty, key="a")["summary"] == "Nothing differs."
    assert facts(empty, pd.DataFrame({"a": [1], "b": ["x"]}), key="a")["rows_added"] == 1
    assert facts(pd.DataFrame({"a": [1], "b": ["x"]}), empty)["rows_removed"] == 1
    assert facts(pd.DataFrame(), pd.DataFrame())["rows_added"] == 0


def test_a_key_that_is_not_unique(shop):
    frame = pd.DataFrame({"id": [1, 1, 2], "x": [1, 2, 3]})
    with pytest.raises(Invalid, match=r"the key id is not unique in old: 1 of its values are there more than once \(such as 1\)"):
        diff(frame, frame, key="id")
    save(frame.drop(index=1), "orders", key="id")
    found = facts("orders", frame)
    assert found["matched_by"] == "content" and "not unique in new" in found["summary"] and found["rows_added"] == 1
    with pytest.raises(Invalid, match="no column 'ident'.*did you mean"):
        diff(frame.assign(idents=1), frame, key="ident")


def test_versions_use_their_own_key(shop):
    frame = pd.DataFrame({"id": [1, 2], "x": [1.0, 2.0]})
    save(frame, "orders", key="id")
    save(frame.assign(x=[1.0, 3.0]), "orders", key="id")
    found = facts("orders@1", "orders@2")
    assert found["title"] == "orders@1 → orders@2" and found["changed_cells"] == [{"key": "2", "column": "x", "before": "2.0", "after": "3.0"}]
    assert diff("orders@1", "orders@2").figures["cells_changed"] == 1
    with pytest.raises(NotFound):
        diff("orders@1", "orders@9")


def test_folders_and_files(shop, tmp_path):
    folder = tmp_path / "pictures"
    (folder / "in").mkdir(parents=True)
    for name, content in {"a": "one", "in/b": "two", "c": "three", "d": "four", "same1": "x", "same2": "x"}.items():
        (folder / name).write_text(content)
    save(folder, "pictures")
    (folder / "a").rename(folder / "in" / "renamed")
    (folder / "in/b").write_text("TWO")
    (folder / "c").unlink()
    (folder / "new").write_text("a new one")
    (folder / "same1").rename(folder / "copy1")
    save(folder, "pictures")
    found = facts("pictures@1", "pictures@2")
    assert {row["file"]: row["change"] for row in found["files"]} == {"in/b": "changed", "in/renamed": "renamed from a", "copy1": "renamed from same1", "new": "added", "c": "removed"}
    assert (found["files_before"], found["files_after"], found["files_renamed"], found["bytes_after"]) == (6, 6, 2, 3 + 3 + 4 + 1 + 1 + 9)
    assert facts("pictures@2", "pictures@2")["summary"] == "Nothing differs."
    one, two = tmp_path / "one.bin", tmp_path / "two.bin"
    one.write_bytes(b"12"), two.write_bytes(b"13")
    found = facts(one, two)
    assert found["same"] is False and found["bytes_before"] == 2
    with pytest.raises(Invalid, match="is a folder and .* is a file; expected two tables"):
        diff(folder, two)
    with pytest.raises(Invalid, match="is a folder and new is a table"):
        diff(folder, pd.DataFrame({"a": [1]}))
    with pytest.raises(NotFound, match="check the path"):
        diff(tmp_path / "nothing.csv", two)


def test_csv_and_parquet_files_are_tables(shop, tmp_path):
    frame = pd.DataFrame({"id": [1, 2], "x": [1.5, 2.5]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.assign(x=[1.5, 3.5]).to_parquet(tmp_path / "b.parquet")
    assert facts(tmp_path / "a.csv", tmp_path / "b.parquet", key="id")["cells_changed"] == 1
    save(tmp_path / "a.csv", "table")
    assert facts("table", frame, key="id")["summary"] == "Nothing differs."


def parts(old, new):
    """The values that went and came, by counting."""
    bags = Counter(old.to_pylist()), Counter(new.to_pylist())
    return [pa.chunked_array([pa.array(list((bags[one] - bags[1 - one]).elements()), old.type)]) for one in (0, 1)]


def chunked(values):
    return pa.chunked_array([pa.array(values)])


def test_shifts_of_numbers_agree_with_scipy():
    rng = np.random.default_rng(0)
    old, new = chunked(rng.normal(size=5000).round(2)), chunked(rng.normal(0.3, 1.2, size=4000).round(2))
    found = shift(old, new, *parts(old, new))
    a, b = old.to_numpy(), new.to_numpy()
    assert found["shift"] == pytest.approx(stats.ks_2samp(a, b).statistic, abs=0.02)  # scipy.stats.ks_2samp; ours is exact at 50 quantiles only
    assert found["shift"] <= stats.ks_2samp(a, b).statistic + 1e-12
    assert found["std_mean_difference"] == pytest.approx((b.mean() - a.mean()) / a.std())
    assert found["psi"] == pytest.approx(np.sum([(q - p) * np.log(q / p) for p, q in zip(*decile_shares(a, b))]), rel=0.15)  # PSI over deciles by its definition (Siddiqi 2006)


def decile_shares(a, b):
    edges = np.quantile(a, np.linspace(0, 1, 11)[1:-1])
    return [np.bincount(np.searchsorted(edges, side), minlength=10) / len(side) for side in (a, b)]


def test_shifts_of_few_numbers_are_exact():
    old, new = chunked([1, 1, 2, 3, None]), chunked([1, 2, 3, 3, 3, 3])
    found = shift(old, new, *parts(old, new))
    assert found["shift"] == pytest.approx(stats.ks_2samp([1, 1, 2, 3], [1, 2, 3, 3, 3, 3]).statistic)
    assert (found["missing_before"], found["missing_after"]) == (0.2, 0)


def test_shifts_of_categories_follow_their_definition():
    old, new = chunked(["a"] * 6 + ["b"] * 4), chunked(["a"] * 3 + ["b"] * 6 + ["c"])
    found = shift(old, new, *parts(old, new))
    assert found["shift"] == pytest.approx((0.3 + 0.2 + 0.1) / 2)  # half the sum of |p - q|
    p, q = (np.array(counts) + 0.5 for counts in ((6, 4, 0), (3, 6, 1)))
    assert found["psi"] == pytest.approx(stats.entropy(q, p) + stats.entropy(p, q))  # the PSI is the symmetric Kullback-Leibler divergence


def test_the_column_that_moved_is_first_and_drawn():
    rng = np.random.default_rng(1)
    old = pd.DataFrame({"id": range(2000), "calm": rng.normal(size=2000), "moved": rng.normal(size=2000), "when": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 90, 2000), unit="D"),
                        "kind": rng.choice(["a", "b"], 2000), "text": [f"text {i}" for i in range(2000)], "gaps": 1.0})
    new = old.assign(moved=old["moved"] + 1, kind=np.where(rng.random(2000) < 0.2, "c", old["kind"]), when=old["when"] + pd.Timedelta(days=30), gaps=np.where(rng.random(2000) < 0.5, np.nan, 1.0),
                     text=[f"other {i}" for i in range(2000)])
    found = facts(old, new, key="id")
    rows = {row["column"]: row for row in found["shifts"]}
    assert found["shifts"][0]["column"] in ("moved", "gaps") and "calm" not in rows and "id" not in rows
    assert rows["gaps"]["missing_after"] == pytest.approx(0.5, abs=0.05) and rows["text"]["shift"] is None
    assert rows["when"]["mean_after"] > rows["when"]["mean_before"] and {plot["plot"] for plot in found["plots"]} == {"histogram", "lines", "bars"}
    assert diff(old, new, key="id").html().count("<svg") == 3


@pytest.mark.parametrize("values", [[0.0, math.inf, -math.inf, math.nan], [None, None, None, None], [math.nan] * 4, [7.0] * 4, [1e308, -1e308, 0.0, 1.0]])
def test_odd_numbers_do_not_break_the_report(values):
    old = pa.table({"id": [0, 1, 2, 3], "x": pa.array(values, pa.float64())})
    for other in ([1.0, 2.0, 3.0, 4.0], [None] * 4, [math.inf] * 4):
        facts(old, pa.table({"id": [0, 1, 2, 3], "x": pa.array(other, pa.float64())}), key="id")


@pytest.mark.parametrize("kind", [pa.date32(), pa.date64(), pa.timestamp("ns", "Europe/Berlin"), pa.duration("s"), pa.time64("us"), pa.decimal128(25, 2), pa.bool_(), pa.binary(), pa.uint64(), pa.int8(), pa.list_(pa.int8()),
                                  pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_every_type_is_compared_shifted_and_a_key(kind):
    def column(numbers):
        if pa.types.is_nested(kind):
            return pa.array([[number] for number in numbers], kind)
        if pa.types.is_dictionary(kind):
            return pa.array([str(number) for number in numbers]).dictionary_encode().cast(kind)
        if pa.types.is_binary(kind) or str(kind).endswith(("string", "string_view")):
            return pa.array([str(number) for number in numbers]).cast(kind)
        if pa.types.is_date64(kind):
            return pa.array([number * 86_400_000 for number in numbers], pa.int64()).cast(kind)
        small = pa.int32() if kind == pa.date32() else pa.int64()
        return pa.array(numbers, small).cast(pa.bool_()) if kind == pa.bool_() else pa.array([number % 100 for number in numbers], small).cast(kind, safe=False)

    old, new = (pa.table({"id": range(50), "x": column(numbers)}) for numbers in (list(range(50)), [99, *range(1, 49), 98]))
    expected = 2 - 1 * (kind == pa.bool_())
    found = facts(old, new, key="id")
    assert found["cells_changed"] == expected and found["columns_retyped"] == 0
    if kind != pa.bool_():
        swapped = facts(old, new, key="x")
        assert (swapped["rows_added"], swapped["rows_removed"]) == (2, 2)


def test_huge_and_sparse_numbers_are_a_key():
    old = pa.table({"id": pa.array([2**64 - 1, 0, 5], pa.uint64())})
    assert match(old, old.slice(1), ["id"]).removed.tolist() == [0]
    old = pa.table({"id": pa.array([-2**63, 2**63 - 1, None])})
    assert match(old, old.slice(1), ["id"]).removed.tolist() == [0]
    assert numbered(pa.chunked_array([[2**62, -2**62, 2**62]]))[0].tolist() == [0, 1, 0]


def test_many_key_columns_do_not_run_over():
    rng = np.random.default_rng(0)
    table = pa.table({str(i): rng.normal(size=2000) for i in range(12)})
    (one, two), bound = row_numbers([table, table.take(pa.array(rng.permutation(2000)))], table.column_names)
    assert sorted(one) == sorted(two) and len(set(one.tolist())) == 2000 and bound <= 4000


def test_rows_in_many_pieces_are_found():
    rng = np.random.default_rng(0)
    old = pa.concat_tables([pa.table({"id": range(i * 100, i * 100 + 100), "x": rng.random(100)}) for i in range(30)])
    new = old.filter(rng.random(3000) > 0.1)
    assert match_content(old, new, ["id", "x"]).removed.tolist() == match(old, new, ["id"]).removed.tolist()


def test_a_report_is_a_report():
    assert isinstance(diff(pd.DataFrame({"a": [1]}), pd.DataFrame({"a": [2]})), Report)
