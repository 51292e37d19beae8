"""What would break for somebody who trusts a check of data larger than memory: parts that do not add up, figures that differ from those of a frame."""

import datetime as dt
import os
import subprocess
import sys
from collections import Counter
from decimal import Decimal
from functools import reduce
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlops_nb.core.errors import GateFailed, Invalid, NotFound, Unavailable
from mlops_nb.core.settings import in_project, init
from mlops_nb.data.profiles import Counts, Distinct, Moments, Quantiles, Repeats, middle_and_scale, mixed, profile, quantile, weighted
from mlops_nb.data.quality import check
from mlops_nb.data.scans import streamed_check
from mlops_nb.data.streams import added_up, larger_than_memory, on_cluster, parts_of, read_part

SMALL = Path(__file__).parent.parent / "examples" / "recommender" / "data" / "online_retail_small.parquet"


@pytest.fixture
def shop(tmp_path):
    init(str(tmp_path), name="shop")
    with in_project(tmp_path):
        yield tmp_path


def cut(values, pieces, seed=0):
    """The values in pieces of random sizes (some may be empty)."""
    places = np.sort(np.random.default_rng(seed).integers(0, len(values) + 1, pieces - 1))
    return np.split(values, places)


def in_three_orders(items, merge):
    """Merged from the left, in pairs, and shuffled."""
    shuffled = [items[i] for i in np.random.default_rng(1).permutation(len(items))]
    return reduce(merge, items), added_up(items, merge), reduce(lambda late, early: merge(early, late), shuffled)


@pytest.mark.parametrize("offset", [0, 1e9], ids=["around zero", "far from zero"])
def test_moments_are_those_of_numpy(offset):
    values = np.random.default_rng(0).normal(size=50_000) + offset
    for found in in_three_orders([Moments.of(part) for part in cut(values, 17)], Moments.merge):
        assert (found.n, found.low, found.high) == (len(values), values.min(), values.max())
        assert found.mean == pytest.approx(values.mean(), rel=1e-13) and found.deviation == pytest.approx(values.std(ddof=1), rel=1e-7)


RNG = np.random.default_rng(7)
SHAPES = {
    "normal": RNG.normal(size=300_000), "sorted": np.sort(RNG.normal(size=300_000)), "falling": np.arange(300_000.0)[::-1], "heavy tail": RNG.pareto(0.5, 300_000),
    "few values": RNG.integers(0, 5, 300_000).astype(float), "mostly zero": np.where(RNG.random(300_000) < 0.7, 0, RNG.lognormal(size=300_000)),
    "organ pipe": np.concatenate([np.arange(150_000.0), np.arange(150_000.0)[::-1]]), "constant": np.full(300_000, 3.0), "up and down": np.where(np.arange(300_000) % 2, 1.0, -1.0) * np.arange(300_000)}


@pytest.mark.parametrize("shape", SHAPES)
def test_no_rank_is_further_off_than_a_sketch_says_of_itself(shape):
    values = SHAPES[shape]
    ordered = np.sort(values)
    for found in in_three_orders([Quantiles.of(part, 1024) for part in cut(values, 40)], Quantiles.merge):
        kept, weights = weighted(found)
        assert weights.sum() == len(values) and len(kept) < 12 * 1024
        assert found.error / len(values) < 0.01
        estimated = np.cumsum(weights)
        last = np.flatnonzero(np.append(kept[1:] != kept[:-1], True))  # of equal values the last has the rank
        truth = np.searchsorted(ordered, kept[last], side="right")
        assert np.abs(estimated[last] - truth).max() <= found.error
        for share in (0.01, 0.25, 0.5, 0.75, 0.99):
            value = quantile(kept, weights, share)
            low, high = np.searchsorted(ordered, value, side="left"), np.searchsorted(ordered, value, side="right")
            assert low - found.error - 1 <= share * len(values) <= high + found.error + 1


def test_quantiles_of_few_values_are_numpys():
    values = np.random.default_rng(3).lognormal(size=999)
    sketch = reduce(Quantiles.merge, map(Quantiles.of, cut(values, 5)))
    assert sketch.error == 0
    assert [quantile(*weighted(sketch), share) for share in (0, 0.25, 0.5, 1)] == list(np.quantile(values, [0, 0.25, 0.5, 1]))
    assert middle_and_scale(*weighted(sketch)) == (np.median(values), np.median(np.abs(values - np.median(values))))


def test_hashes_are_splitmix64():
    # First outputs of splitmix64 from the states 0 and 1234567 (Vigna's reference code; the second is Rosetta Code's example).
    assert [int(one) for one in mixed(np.array([0, 1234567], np.uint64))] == [0xE220A8397B1DCDAF, 6457827717110365317]


@pytest.mark.parametrize("n", [0, 1, 1000, 5000, 200_000])
def test_distinct_counts_do_not_depend_on_order_or_cuts(n):
    values = np.random.default_rng(n).integers(0, max(n, 1), n)
    hashes, truth = mixed(values), len(set(values.tolist()))
    counts = {found.count for found in in_three_orders([Distinct.of(part, 4096) for part in cut(hashes, 9)], Distinct.merge)} | {Distinct.of(hashes, 4096).count}
    assert len(counts) == 1
    assert counts == {truth} if truth <= 4096 else abs(counts.pop() / truth - 1) < 5 / 4094**0.5  # five standard errors of Beyer et al. 2007


@pytest.mark.parametrize("times", [1, 2, 5])
def test_repeated_rows_are_those_of_pandas(times):
    rng = np.random.default_rng(times)
    rows = rng.permutation(np.r_[np.arange(60_000), np.tile(rng.integers(0, 60_000, 3000), times)])
    truth = int(pd.Series(rows).duplicated().sum())
    pieces = cut(mixed(rows), 11)
    for found in in_three_orders([Repeats.of(part) for part in pieces], Repeats.merge):
        assert (int(found.times.sum()), len(found.seen.hashes), found.seen.over) == (truth, 60_000, False)
    sampled = {found.share for found in in_three_orders([Repeats.of(part, 20_000) for part in pieces], Repeats.merge)} | {Repeats.of(mixed(rows), 20_000).share}
    assert len(sampled) == 1 and sampled.pop() == pytest.approx(truth / len(rows), rel=0.15)


def test_frequent_values_are_never_lost():
    values = np.random.default_rng(5).zipf(1.3, 100_000) % 5000
    truth = Counter(values.tolist())

    def of(part, kept):
        found, counts = np.unique(part, return_counts=True)
        return Counts.of(pa.array(found), counts, kept)

    for found in in_three_orders([of(part, 10_000) for part in cut(values, 13)], Counts.merge):
        assert found.short == 0 and dict(found.top()) == dict(truth)
    for found in in_three_orders([of(part, 200) for part in cut(values, 13)], Counts.merge):
        kept = dict(found.top())
        assert len(kept) <= 200 and 0 < found.short <= len(values) / 201  # Misra & Gries 1982
        assert all(0 <= truth[value] - count <= found.short for value, count in kept.items())
        assert all(value in kept for value, count in truth.items() if count > found.short)


def mixed_table(n=20_000, seed=11):
    rng = np.random.default_rng(seed)
    gaps = rng.random(n) < 0.1
    numbers = rng.normal(5, 2, n)
    numbers[:3] = [np.inf, -np.inf, -0.0]
    words = np.array(["Paris", "paris", "Rome ", "n/a", "Löwen", "", "Oslo"])[rng.integers(0, 7, n)]
    times = np.datetime64("2020-01-01", "us") + rng.integers(0, 10**14, n).astype("m8[us]")
    return pa.table({
        "number": pa.array(numbers, mask=gaps), "nan": pa.array(np.where(gaps, np.nan, numbers)), "whole": pa.array(rng.integers(-3, 10**6, n)), "small": pa.array(rng.integers(0, 9, n), pa.int8(), mask=gaps),
        "large": pa.array(rng.integers(2**53, 2**62, n)), "unsigned": pa.array(rng.integers(0, 2**63, n).astype(np.uint64) * 2), "single": pa.array(numbers.astype(np.float32)),
        "decimal": pa.array([Decimal(int(value)) / 100 for value in rng.integers(0, 10**5, n)], pa.decimal128(12, 2)), "flag": pa.array(rng.random(n) < 0.3, mask=gaps), "text": pa.array(words, mask=gaps),
        "category": pa.array(words).dictionary_encode(), "time": pa.array(times, mask=gaps), "zoned": pa.array(times, pa.timestamp("us", "Europe/Paris")), "day": pa.array(times.astype("M8[D]"), pa.date32()),
        "nothing": pa.nulls(n), "no text": pa.nulls(n, pa.string()), "list": pa.array([[int(value)] for value in rng.integers(0, 3, n)]), "bytes": pa.array([b"\xff", b"a"] * (n // 2)),
        "a.dot": pa.array(rng.integers(0, 3, n)), "wait": pa.array(rng.integers(0, 99, n), pa.duration("s"))})


EXACT = ("rows", "missing", "zeros", "negatives", "infinite", "whole", "patterns")


def test_profiles_of_parts_add_up_to_the_profile_and_to_pandas():
    table = mixed_table()
    for name in table.column_names:
        column = table[name].combine_chunks()
        column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        whole = profile(name, column)[0]
        edges = [0, *sorted(np.random.default_rng(2).integers(0, len(column), 6)), len(column)]
        for found in in_three_orders([profile(name, column.slice(a, b - a))[0] for a, b in zip(edges, edges[1:])], lambda one, other: one.merge(other)):
            assert {key: getattr(found, key) for key in EXACT} == {key: getattr(whole, key) for key in EXACT}, name
            assert (found.distinct.count, found.moments.n, found.moments.low, found.moments.high) == (whole.distinct.count, whole.moments.n, whole.moments.low, whole.moments.high), name
            if not found.counts.short:
                assert dict(found.counts.top()) == dict(whole.counts.top()), name
        series = column.to_pandas()
        assert whole.missing == series.isna().sum(), name
        if name not in ("list", "nothing", "no text"):
            assert whole.distinct.count == series.nunique(), name
        if whole.kind == "number":
            finite = np.array([float(value) if isinstance(value, Decimal) else value for value in column.to_pylist() if value is not None and np.isfinite(float(value))])
            assert (whole.moments.low, whole.moments.high) == (finite.min(), finite.max()) and whole.moments.mean == pytest.approx(float(finite.astype(float).mean())), name
            assert whole.infinite == (~np.isfinite(series.dropna().astype(float))).sum() and whole.negatives == (series < 0).sum(), name


def test_a_cell_has_the_same_hash_wherever_it_stands():
    for values in (["a", "b", None], [1.5, 0.0, None], [True, None, False], [dt.datetime(2020, 1, 1), None], [b"x", b"\xff"], [[1], None]):
        forwards, backwards = (profile("x", pa.array(values[::step]))[1] for step in (1, -1))
        assert forwards.tolist() == backwards[::-1].tolist() and len(set(forwards.tolist())) == len(values)
    assert profile("x", pa.array([0.0]))[1] == profile("x", pa.array([-0.0]))[1]  # equal, as pandas has it


def findings(report):
    return {(row["column"], row["finding"]): (row["severity"], row["count"]) for row in report.facts.get("findings", [])}


def test_published_figures_of_online_retail(shop):
    # Counted independently (Chen 2015, UCI 352), as published with the data.
    report = streamed_check(str(SMALL))
    facts, figures = report.facts, report.facts["figures"]
    by_column = {row["column"]: row for row in facts["column_by_column"]}
    assert (facts["rows"], facts["duplicate_rows"], by_column["CustomerID"]["missing"], by_column["Description"]["missing"]) == (107_867, 1_155, 27_298, 281)
    assert by_column["StockCode"]["distinct"] == 3_617 and figures["missing"] == figures["missing.CustomerID"] == 27_298 / 107_867
    numbers = {row["column"]: row for row in facts["numbers"]}
    assert (numbers["Quantity"]["min"], numbers["Quantity"]["max"]) == (-5_368, 4_800)


@pytest.mark.parametrize("group", [None, 10_000, 1_777], ids=["one row group", "ten", "sixty"])
def test_the_report_is_that_of_a_frame(shop, group):
    frame = pd.read_parquet(SMALL)
    frame.to_parquet(shop / "orders.parquet", row_group_size=group)
    streamed, whole = streamed_check(shop / "orders.parquet"), check(frame)
    ours, theirs = findings(streamed), findings(whole)
    assert len(ours) >= 12 and {key: ours.get(key) for key in theirs if key in ours} == {key: theirs[key] for key in theirs if key in ours}
    assert set(ours) <= set(theirs)
    shared = set(streamed.facts["figures"]) & set(whole.facts["figures"]) - {"errors", "warnings", "notes"}
    assert {name: streamed.facts["figures"][name] for name in shared} == pytest.approx({name: whole.facts["figures"][name] for name in shared})
    assert {"rows", "columns", "missing", "duplicates", "outliers", "missing.CustomerID", "outliers.Quantity"} <= shared
    rows = {(row["column"], row["finding"]): row["rows"] for row in whole.facts["findings"]}
    for row in streamed.facts["findings"]:  # the furthest outliers may tie; the others are the first ones
        if "outliers" not in row["finding"]:
            assert row["rows"] == rows[row["column"], row["finding"]], row


def test_faults_in_generated_data_are_found_with_their_rows(shop):
    n, rng = 30_000, np.random.default_rng(4)
    frame = pd.DataFrame({
        "flat": np.where(rng.random(n) < 0.7, 0.0, rng.normal(size=n)), "city": rng.choice(["Rome", "Oslo"], n).astype(object), "seen": pd.Timestamp("2021-05-05") + pd.to_timedelta(rng.integers(0, 9999, n), "s"),
        "same": "x", "nearly": np.where(np.arange(n) == 777, 2, 1), "id": np.arange(n), "sum": rng.normal(100, 1, n), "digits": rng.integers(10, 500, n).astype(str), "gone": pd.Series([None] * n, dtype="float64")})
    frame.loc[[5, 29_999], "flat"] = 500.0
    frame.loc[17, "city"], frame.loc[18, "city"], frame.loc[19, "city"] = "rome ", "N/A", " Oslo"
    frame["seen"] = frame["seen"].astype("datetime64[us]")
    frame.loc[100, "seen"], frame.loc[25_000, "seen"] = pd.Timestamp("2999-01-01"), pd.Timestamp("1750-01-01")
    frame.loc[[3, 4], "sum"] = [np.inf, -1]
    frame.to_parquet(shop / "d.parquet", row_group_size=4_000)
    streamed, whole = streamed_check(shop / "d.parquet"), check(frame)
    theirs = {(row["column"], row["finding"]): (row["severity"], row["count"], set(row["rows"])) for row in whole.facts["findings"]}
    ours = {(row["column"], row["finding"]): (row["severity"], row["count"], set(row["rows"])) for row in streamed.facts["findings"]}
    names = {key[0]: [] for key in ours}
    for column, words in ours:
        names[column].append(words)
    assert {"flat", "city", "seen", "same", "nearly", "id", "sum", "digits", "gone"} <= set(names)
    assert len(names["seen"]) == 2 and len(names["city"]) == 3 and len(names["sum"]) == 3
    for key in ours:
        assert key in theirs, key
        assert ours[key][:2] == theirs[key][:2], key
        if "outliers" not in key[1] or key[0] == "sum":
            assert ours[key][2] == theirs[key][2], key
    flat = {row["column"]: row for row in streamed.facts["numbers"]}["flat"]
    expected = {row["column"]: row for row in whole.facts["numbers"]}["flat"]
    assert flat["largest_robust_z"] == pytest.approx(expected["largest_robust_z"]) and {"5", "29999"} <= set(ours["flat", "outliers (robust z over 3.5)"][2])


def test_every_type_is_checked(shop):
    table = mixed_table(4_000)
    pq.write_table(table, shop / "t.parquet", row_group_size=700)
    report = streamed_check(shop / "t.parquet")
    frame = table.to_pandas()
    assert {row["column"]: row["missing"] for row in report.facts["column_by_column"]} == {name: int(frame[name].isna().sum()) for name in frame}
    assert report.facts["columns"] == table.num_columns and str(report) and report.save(shop / "t.json").exists()


def test_a_file_a_folder_and_batches_give_the_same(shop):
    table = pq.read_table(SMALL)
    (shop / "months" / "deep").mkdir(parents=True)
    pq.write_table(table.slice(0, 60_000), shop / "months" / "a.parquet", row_group_size=9_000)
    pq.write_table(table.slice(60_000), shop / "months" / "deep" / "b.parquet")
    (shop / "months" / "_SUCCESS").write_text("")
    (shop / "months" / "._a.parquet").write_text("left by a file system")
    before = set(os.listdir(Path(os.environ.get("TMPDIR", "/tmp"))))
    folder, batches = streamed_check(shop / "months"), streamed_check(iter(table.to_batches(max_chunksize=10_000)))
    file = streamed_check(SMALL)
    for facts in (folder.facts, batches.facts):
        assert findings(file) == {(row["column"], row["finding"]): (row["severity"], row["count"]) for row in facts["findings"]}
        assert facts["figures"] == pytest.approx(file.facts["figures"])
    assert folder.facts["title"] == "Check of months" and batches.facts["title"] == "Check of the data"
    assert any(row["rows"][0].startswith(("a.parquet:", os.path.join("deep", "b.parquet:"))) for row in folder.facts["findings"])
    assert not [name for name in set(os.listdir(Path(os.environ.get("TMPDIR", "/tmp")))) - before if (Path(os.environ.get("TMPDIR", "/tmp")) / name / "data.parquet").exists()]


def test_an_index_is_not_a_column(shop):
    frame = pd.DataFrame({"a": [1, 1]}, index=pd.Index(["x", "y"], name="key"))
    frame.to_parquet(shop / "a.parquet")
    report = streamed_check(shop / "a.parquet")
    assert report.facts["columns"] == 1 and report.facts["duplicate_rows"] == 1


def test_files_that_differ_a_little_are_read_as_one(shop):
    folder = shop / "d"
    folder.mkdir()
    pq.write_table(pa.table({"a": pa.array([1, 2]), "b": ["x", "y"]}), folder / "1.parquet")
    pq.write_table(pa.table({"b": pa.array(["x", None], pa.large_string()), "a": pa.array([1.0, None])}), folder / "2.parquet")
    pq.write_table(pa.table({"a": pa.array([7.5])}), folder / "3.parquet")
    pq.write_table(pa.table({"a": pa.array([], pa.float64()), "b": pa.array([], pa.string())}), folder / "4.parquet")
    rows = {row["column"]: row for row in streamed_check(folder).facts["column_by_column"]}
    assert (rows["a"]["distinct"], rows["a"]["missing"], rows["b"]["distinct"], rows["b"]["missing"]) == (3, 1, 2, 2)
    assert streamed_check(folder).facts["duplicate_rows"] == 1  # (1, x) and (1.0, x)


def test_sources_that_cannot_be_read_say_why(shop):
    folder = shop / "d"
    folder.mkdir()
    with pytest.raises(NotFound, match="there is no Parquet file in"):
        streamed_check(folder)
    with pytest.raises(NotFound, match="there is no file"):
        streamed_check(shop / "nowhere.parquet")
    pq.write_table(pa.table({"a": [1]}), folder / "1.parquet")
    (folder / "2.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(Invalid, match="2.parquet cannot be read as Parquet"):
        streamed_check(folder)
    pq.write_table(pa.table({"a": ["text"]}), folder / "2.parquet")
    with pytest.raises(Invalid, match="2.parquet does not fit the files before it"):
        streamed_check(folder)
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), shop / "twice.parquet")
    with pytest.raises(Invalid, match="more than one column 'a'"):
        streamed_check(shop / "twice.parquet")
    for source in (42, [1, 2], iter([]), pd.DataFrame({"a": [1]})):
        with pytest.raises(Invalid, match="cannot be streamed; expected a Parquet file"):
            streamed_check(source)
    with pytest.raises(Invalid, match="batch 1 has other columns"):
        streamed_check([pa.record_batch({"a": [1]}), pa.record_batch({"b": [1]})])


def test_a_flipped_byte_in_a_row_group_names_the_file(shop):
    pq.write_table(pa.table({"a": np.random.default_rng(0).random(50_000)}), shop / "a.parquet", compression="zstd", use_dictionary=False)
    content = bytearray((shop / "a.parquet").read_bytes())
    content[4:2_000] = bytes(1_996)
    (shop / "a.parquet").write_bytes(content)
    with pytest.raises(Invalid, match="a.parquet cannot be read"):
        streamed_check(shop / "a.parquet")


@pytest.mark.parametrize("table", [pa.table({"a": pa.array([], pa.int64())}), pa.table({})], ids=["no rows", "no columns"])
def test_nothing_is_an_error_and_not_a_crash(shop, table):
    pq.write_table(table, shop / "a.parquet")
    report = streamed_check(shop / "a.parquet", gates={"missing": "1%"})
    assert [row["severity"] for row in report.facts["findings"]] == ["error"] and report.facts["rows"] == 0


def test_gates_judge_and_stop_a_pipeline(shop, monkeypatch):
    assert streamed_check(SMALL, gates={"missing": "30%", "outliers.Quantity": 0.2}).passed
    report = streamed_check(SMALL, gates={"missing.CustomerID": "5%"})
    assert not report.passed and (shop / ".mlops" / "reports" / "check-online_retail_small.html").exists()
    with pytest.raises(Invalid, match="was not measured"):
        streamed_check(SMALL, gates={"misssing": 1})
    (shop / "settings.ini").write_text("[project]\nname = shop\n[gates]\ncheck.duplicates = 0.5%\n")
    (shop / "step").mkdir()
    monkeypatch.setenv("MLOPS_STEP_FOLDER", str(shop / "step"))
    with pytest.raises(GateFailed, match="duplicates"):
        streamed_check(SMALL)
    assert (shop / "step" / "check-online_retail_small.json").exists()


def test_one_huge_row_group_does_not_fill_the_memory(tmp_path):
    file, n = tmp_path / "a.parquet", 3_000_000
    rng = np.random.default_rng(0)
    pq.write_table(pa.table({f"c{i}": rng.random(n) for i in range(6)}), file, row_group_size=n, use_dictionary=False)
    code = (f"import pyarrow as pa\nfrom mlops_nb.data.streams import parts_of, read_part\nparts, schema = parts_of({str(file)!r})\n"
            "read_part(parts[0], schema)\nprint(len(parts), pa.default_memory_pool().max_memory())")
    parts, peak = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout.split())
    assert parts == 1 and peak < 6 * 8 * n / 2  # the row group is 144 MB


def test_a_dask_cluster_says_the_same(shop, monkeypatch):
    distributed = pytest.importorskip("distributed")
    pq.write_table(pq.read_table(SMALL), shop / "orders.parquet", row_group_size=20_000)
    monkeypatch.setattr("mlops_nb.data.streams.PART_BYTES", 1)  # every row group its own part
    here = streamed_check(shop / "orders.parquet")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", protocol="tcp://", dashboard_address=None) as cluster:
        (shop / "settings.ini").write_text(f"[project]\nname = shop\n[cluster]\ndask = {cluster.scheduler_address}\n")
        there = streamed_check(shop / "orders.parquet")
        assert there.facts == here.facts and len(parts_of(shop / "orders.parquet")[0]) == 6
        with distributed.Client(cluster) as client:
            parts, schema = parts_of(shop / "orders.parquet")
            (shop / "orders.parquet").unlink()
            with pytest.raises(Unavailable, match="workers of the cluster do not find"):
                list(on_cluster(client, lambda part: read_part(part, schema), parts))
    with pytest.raises(Unavailable, match="does not answer"):
        monkeypatch.setattr("mlops_nb.data.streams.CONNECT_S", 1)
        streamed_check(SMALL)


def test_a_cluster_without_dask_says_what_to_install(shop, monkeypatch):
    (shop / "settings.ini").write_text("[project]\nname = shop\n[cluster]\ndask = tcp://127.0.0.1:1\n")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(Unavailable, match=r"pip install 'mlops_nb\[dask\]'"):
        streamed_check(SMALL)


def test_what_is_streamed_and_what_is_loaded(shop):
    file = shop / "a.parquet"
    pq.write_table(pa.table({"a": pa.array(np.zeros(100_000)), "b": pa.array(["x"] * 100_000)}), file)  # a few kB packed, some 4 MB as a frame
    (shop / "csv").mkdir()
    (shop / "csv" / "a.csv").write_text("a\n1\n")
    assert larger_than_memory(shop, free=2**40) and larger_than_memory(str(file), free=8_000_000)
    for data in (file, str(file)):
        assert not larger_than_memory(data, free=20_000_000)
    for data in (shop / "csv", shop / "csv" / "a.csv", "orders@3", pd.DataFrame({"a": [1]}), shop / "nowhere.parquet"):
        assert not larger_than_memory(data, free=1)
