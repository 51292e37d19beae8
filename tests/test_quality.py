"""What would break for somebody who trusts a check: faults that go unseen, counts that are wrong, a verdict that does not hold."""

import datetime as dt
import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import stats

from mlops_nb.core.errors import GateFailed, Invalid, MlopsError, NotFound
from mlops_nb.core.settings import in_project, init
from mlops_nb.data.detectors import DETECTORS, Column, fences, impossible_dates, robust_z
from mlops_nb.data.quality import check
from mlops_nb.data.store import save

DATA = Path(__file__).parent.parent / "examples" / "recommender" / "data"

# Independently counted figures of Online Retail (Chen 2015, UCI 352), as published with the data (known.json of its data card).
KNOWN = {"full": {"rows": 541_909, "CustomerID": 135_080, "Description": 1_454, "duplicates": 5_268, "negative": 10_624, "cancelled": 9_288, "max": 80_995, "min": -80_995, "stock_codes": 4_070},
         "small": {"rows": 107_867, "CustomerID": 27_298, "Description": 281, "duplicates": 1_155, "negative": 2_162, "cancelled": 1_904, "max": 4_800, "min": -5_368, "stock_codes": 3_617}}


@pytest.fixture
def shop(tmp_path):
    init(str(tmp_path), name="shop")
    with in_project(tmp_path):
        yield tmp_path


def one(report, column, words):
    rows = [row for row in report.facts.get("findings", []) if row["column"] == column and words in row["finding"]]
    assert len(rows) == 1, (column, words, report.facts.get("findings"))
    return rows[0]


def found(report, column):
    return [row["finding"] for row in report.facts.get("findings", []) if row["column"] == column]


@pytest.mark.parametrize("size", KNOWN)
def test_published_figures_of_online_retail(shop, size):
    known, frame = KNOWN[size], pd.read_parquet(DATA / f"online_retail_{size}.parquet")
    report = check(str(DATA / f"online_retail_{size}.parquet"))
    facts, figures = report.facts, report.facts["figures"]
    by_column = {row["column"]: row for row in facts["column_by_column"]}
    assert (facts["rows"], facts["duplicate_rows"]) == (known["rows"], known["duplicates"])
    assert one(report, "", "repeat an earlier row")["count"] == known["duplicates"] and figures["duplicates"] == known["duplicates"] / known["rows"]
    for column in ("CustomerID", "Description"):
        assert by_column[column]["missing"] == one(report, column, "missing values")["count"] == known[column]
    assert figures["missing"] == figures["missing.CustomerID"] == known["CustomerID"] / known["rows"]
    assert one(report, "CustomerID", "missing values")["severity"] == "warning" and one(report, "Description", "missing values")["severity"] == "note"
    assert one(report, "Quantity", "negative values")["count"] == known["negative"]
    others = 3 if size == "full" else 0  # three bad-debt lines begin with A
    assert one(report, "InvoiceNo", "text among numbers")["count"] == known["cancelled"] + others
    numbers = {row["column"]: row for row in facts["numbers"]}
    assert (numbers["Quantity"]["max"], numbers["Quantity"]["min"]) == (known["max"], known["min"]) and by_column["StockCode"]["distinct"] == known["stock_codes"]
    # robust z against scipy, fences against numpy's quartiles
    for column in ("Quantity", "UnitPrice"):
        x = frame[column].to_numpy(float)
        z = (x - np.median(x)) / stats.median_abs_deviation(x, scale="normal")
        assert numbers[column]["robust_z_over_3.5"] == (np.abs(z) > 3.5).sum() == one(report, column, "outliers")["count"]
        low, high = np.quantile(x, 0.25) - 1.5 * stats.iqr(x), np.quantile(x, 0.75) + 1.5 * stats.iqr(x)
        assert numbers[column]["outside_fences"] == ((x < low) | (x > high)).sum()
    furthest = frame["Quantity"].sub(frame["Quantity"].median()).abs().nlargest(5)
    assert sorted(one(report, "Quantity", "outliers")["rows"], key=int)[:2] and int(one(report, "Quantity", "outliers")["rows"][0]) == furthest.index[0]
    spelt = frame.groupby(frame["StockCode"].str.upper())["StockCode"].agg(lambda codes: len(codes) - codes.value_counts().iloc[0])
    assert one(report, "StockCode", "in several spellings")["count"] == spelt.sum()
    assert report.passed and all("dependency" in what for what in found(report, "InvoiceDate") + found(report, "Country"))  # an invoice has one moment, but for a few


def test_robust_z_where_half_of_the_values_are_equal():
    """Iglewicz & Hoaglin (1993): with a MAD of zero the mean absolute deviation, times 1.253314, takes its place."""
    x = np.array([5.0] * 10 + [6, 7, 50])
    np.testing.assert_allclose(robust_z(x), (x - 5) / (1.253314137 * np.mean(np.abs(x - 5))))
    assert not robust_z(np.array([3.0, 3.0, np.nan]))[:2].any() and np.isnan(robust_z(np.array([1.0, 2.0, np.nan]))[2])
    assert fences(np.array([1.0, 2, 3, 4, np.nan])) == (1.75 - 2.25, 3.25 + 2.25)


def test_injected_faults_are_found_in_the_rows_where_they_are(shop):
    rng = np.random.default_rng(0)
    frame = pd.read_parquet(DATA / "online_retail_small.parquet").head(5_000).reset_index(drop=True)
    frame = frame.drop_duplicates(ignore_index=True).assign(price=rng.normal(10, 1, len(frame.drop_duplicates())), weight=1.5, when=pd.Timestamp("2011-01-01"), only="GBP")
    frame["weight"] = frame["weight"] + rng.normal(0, 0.1, len(frame))
    frame.loc[[17, 40], "price"] = [1000, -1000]
    frame.loc[5, "weight"] = np.inf
    frame["when"] = frame["when"].astype("datetime64[s]") + pd.to_timedelta(np.arange(len(frame)), "s")
    frame.loc[7, "when"], frame.loc[8, "when"] = pd.Timestamp("1753-01-01"), pd.Timestamp.now() + pd.Timedelta("400D")
    frame["mixed"] = pd.Series(["a"] * len(frame), dtype=object)
    frame.loc[9, "mixed"] = 1.5
    frame["country"] = frame["Country"].where(frame.index != 11, " united kingdom")
    frame["gap"] = frame["Country"].where(~frame.index.isin([3, 4]), "N/A")
    frame["gone"] = np.nan
    frame["id"] = np.arange(len(frame)) * 7
    frame = pd.concat([frame, frame.iloc[[20]]], ignore_index=True)
    report = check(frame)
    assert one(report, "", "repeat")["rows"] == [str(len(frame) - 1)] and report.facts["duplicate_rows"] == 1
    assert set(one(report, "price", "outliers")["rows"][:2]) == {"17", "40"} and one(report, "price", "outliers")["severity"] == "warning"
    for column, words, severity, rows in [("weight", "infinite", "error", ["5"]), ("when", "before 1900", "error", ["7"]), ("when", "future", "error", ["8"]), ("mixed", "mixed types: float, str", "error", ["9"]),
                                          ("country", "several spellings", "warning", ["11"]), ("country", "white space", "note", ["11"]), ("gap", "stands for a missing value: 'N/A'", "warning", ["3", "4"])]:
        finding = one(report, column, words)
        assert (finding["severity"], finding["rows"], finding["count"]) == (severity, rows, len(rows)) and finding["action"]
    assert one(report, "gone", "no values")["severity"] == "error" and "constant" in found(report, "only")[0]
    assert "nearly every value differs" in found(report, "id")[0]
    assert [row["severity"] for row in report.facts["findings"]] == sorted((row["severity"] for row in report.facts["findings"]), key=["error", "warning", "note"].index)
    assert report.facts["figures"]["errors"] == 5 and report.facts["figures"]["missing"] == 1


def test_clean_data_give_no_finding(shop):
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"x": rng.uniform(size=1000), "n": rng.integers(0, 50, 1000), "flag": rng.random(1000) > 0.5, "c": rng.choice(["a", "b"], 1000),
                          "t": pd.Timestamp("2011-01-01") + pd.to_timedelta(rng.integers(0, 10**6, 1000), "s")})
    report = check(frame, target="c")
    assert "findings" not in report.facts and "Nothing was found" in report.facts["summary"] and report.passed


@pytest.mark.parametrize("kind", ["text", "flag", "category", "number"])
def test_imbalance_and_missing_labels(shop, kind):
    labels = {"text": ["yes"] * 20 + ["no"] * 980, "flag": [True] * 20 + [False] * 980, "category": pd.Categorical(["y"] * 20 + ["n"] * 980), "number": [1] * 20 + [0] * 980}[kind]
    frame = pd.DataFrame({"x": np.arange(1000) * 1.5, "y": labels})
    report = check(frame, target="y")
    assert one(report, "y", "class imbalance")["count"] == 20 and report.facts["figures"]["smallest_class"] == 0.02
    gappy = frame.astype({"y": object}).assign(y=lambda f: f["y"].where(f.index != 999, None))
    assert one(check(gappy, target="y"), "y", "without a label")["rows"] == ["999"]
    assert not any("imbalance" in row["finding"] for row in check(frame).facts.get("findings", []))


STRANGE = {
    "empty": pd.DataFrame({"a": pd.Series(dtype="float64"), "b": pd.Series(dtype="str")}), "no columns": pd.DataFrame(index=range(3)), "nothing": pd.DataFrame(), "one row": pd.DataFrame({"a": [1], "b": ["x"]}),
    "twice named": pd.DataFrame([[1, 2], [3, 4]], columns=["a", "a"]), "numbered": pd.DataFrame(np.eye(3)), "levels": pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", 1), ("a", 2)])),
    "lists": pd.DataFrame({"a": [[1], [1], None], "b": [{"x": 1}, {"x": 1}, None]}), "nullable": pd.DataFrame({"a": pd.array([1, None, 9], "Int64"), "b": pd.array([1.5, None, np.inf], "Float64"), "c": pd.array([True, None, False], "boolean")}),
    "arrow": pd.DataFrame({"a": pd.array([1, None, 3], "int64[pyarrow]"), "b": pd.array(["a", "A", None], pd.ArrowDtype(pa.string())), "c": pd.array([[1], None, []], pd.ArrowDtype(pa.list_(pa.int64())))}),
    "decimals": pd.DataFrame({"a": pd.Series([Decimal("1.5"), None, Decimal("2")], dtype=object)}), "big": pd.DataFrame({"a": pd.Series([2**70, 1, None], dtype=object)}),
    "dates": pd.DataFrame({"a": pd.Series([dt.date(1, 1, 1), None, dt.date(2011, 1, 1)], dtype=object), "b": pd.to_datetime(["2011-01-01", None, "1800-01-01"], utc=True)}),
    "delta": pd.DataFrame({"a": pd.to_timedelta(["1h", None, "2h"]), "b": pd.period_range("2011", periods=3, freq="M"), "c": pd.interval_range(0, 3), "d": [1j, 2, 3]}),
    "categories": pd.DataFrame({"a": pd.Categorical([1, 2, None], categories=[3, 2, 1]), "b": pd.Categorical(["x", "X", None]), "c": pd.cut([1, 2, 3], 2)}),
    "bytes": pd.DataFrame({"a": pd.Series([b"1", b"2", None], dtype=object)}), "surrogate": pd.DataFrame({"a": pd.Series(["\ud800", "a", None], dtype=object)}),
    "all infinite": pd.DataFrame({"a": [np.inf, -np.inf, np.inf, np.nan]}), "huge": pd.DataFrame({"a": [1e308, -1e308, 1e308, 0]}), "sparse": pd.DataFrame({"a": pd.arrays.SparseArray([0.0, 0, 5])}),
    "labels": pd.DataFrame({"a": [1.0, None, 3]}, index=pd.MultiIndex.from_tuples([("x", 1), ("x", 1), ("y", 2)])), "numpy text": pd.DataFrame({"a": np.array(["a", "b"], dtype=object)}), "float16": pd.DataFrame({"a": np.array([1, 2, 60000], "float16")}),
}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("kind", STRANGE)
def test_any_frame_can_be_checked_and_shown(shop, kind):
    before = STRANGE[kind].copy(deep=True)
    report = check(STRANGE[kind])
    assert report.facts["rows"] == len(before) and report.html() and report.markdown() and str(report)
    json.loads(report.json())
    pd.testing.assert_frame_equal(STRANGE[kind], before)
    if kind in ("empty", "nothing", "no columns"):
        assert report.facts["figures"]["errors"] >= 1


def test_strange_frames_have_the_right_findings(shop):
    assert check(STRANGE["lists"]).facts["duplicate_rows"] == 1
    assert one(check(STRANGE["nullable"]), "b", "infinite")["rows"] == ["2"]
    assert one(check(STRANGE["arrow"]), "b", "spellings")["count"] == 1 and one(check(STRANGE["categories"]), "b", "spellings")["count"] == 1
    assert one(check(STRANGE["dates"]), "a", "before 1900")["rows"] == ["0"] and one(check(STRANGE["dates"]), "b", "before 1900")["rows"] == ["2"]
    assert set(check(STRANGE["twice named"]).facts["figures"]) >= {"missing.a", "missing.a.1"}


def test_a_time_without_a_zone_is_not_called_future_because_of_the_zone():
    now = pd.Timestamp("2026-11-23 12:00")
    late = Column("t", pd.Series([now + pd.Timedelta("14h"), now + pd.Timedelta("40h")]))
    assert [row["rows"] for row in impossible_dates(late, now)] == [["1"]]


# ---------------------------------------------------------------- gates and the surroundings
def test_gates_decide_and_come_from_the_settings(shop):
    frame = pd.DataFrame({"a": [1.0, None, 3, 4], "b": list("wxyz")})
    assert check(frame).passed and "checks" not in check(frame).facts
    (shop / "settings.ini").write_text("[project]\nname = shop\n[gates]\ncheck.missing = 10%\ncheck.rows = >= 4\ncheck.missing.b = 0\n")
    report = check(frame)
    assert not report.passed and [(row["name"], row["passed"]) for row in report.facts["checks"]] == [("missing", False), ("rows", True), ("missing.b", True)]
    assert check(frame, gates={"missing": "30%"}).passed and "checks" not in check(frame, gates={}).facts
    assert json.loads((shop / ".mlops" / "reports" / "check-data.json").read_text())["title"] == "Check of the data"


def test_a_failed_gate_stops_a_pipeline_after_the_report_is_saved(shop, monkeypatch):
    save(pd.DataFrame({"a": [1.0, None]}), "orders")
    (shop / "step").mkdir()
    monkeypatch.setenv("MLOPS_STEP_FOLDER", str(shop / "step"))
    with pytest.raises(GateFailed, match="Check of orders@1 failed: missing 0.5"):
        check("orders", gates={"missing": "10%"})
    assert json.loads((shop / "step" / "check-orders@1.json").read_text())["passed"] is False and (shop / "step" / "check-orders@1.html").exists()
    assert check("orders", gates={"missing": "60%"}).passed


def test_frames_paths_and_addresses_are_checked_alike(shop):
    frame = pd.read_parquet(DATA / "online_retail_small.parquet").head(500)
    save(frame, "orders")
    frame.to_csv(shop / "my orders.csv", index=False)
    frame.to_parquet(shop / "o.parquet")
    reports = [check(frame), check("orders"), check(shop / "o.parquet"), check(pa.Table.from_pandas(frame, preserve_index=False)), check(str(shop / "my orders.csv"))]
    assert len({json.dumps(report.facts["figures"]) for report in reports}) == 1
    assert reports[1].facts["title"] == "Check of orders@1" and reports[4].saved.name == "check-my-orders.html"


def test_without_a_project_a_check_still_reports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLOPS_PROJECT", raising=False)
    assert check(pd.DataFrame({"a": [1, 2, 3]})).saved is None


def test_every_mistake_gets_one_sentence(shop):
    frame = pd.DataFrame({"amount": [1.0, 2.0], "label": ["a", "b"]})
    save(frame, "orders")
    (shop / "torn.parquet").write_bytes((DATA / "online_retail_small.parquet").read_bytes()[:10_000])
    (shop / "text.csv").write_bytes(b"\xff\xfe\x00")
    for kind, pattern, call in [
        (Invalid, r"no column 'lable' to be the target; did you mean label\?", lambda: check(frame, target="lable")),
        (Invalid, r"asks for a figure that was not measured; did you mean missing.amount", lambda: check(frame, gates={"missing.amounts": "1%"})),
        (Invalid, r"missing = 'few' is not valid", lambda: check(frame, gates={"missing": "few"})),
        (NotFound, r"no data set 'order'; did you mean orders\?", lambda: check("order")),
        (NotFound, r"'orders' has no '4'; there are: 1", lambda: check("orders@4")),
        (NotFound, r"there is no file", lambda: check("orders.csv")),
        (Invalid, r"torn.parquet (is not a readable|cannot be read as) Parquet", lambda: check(shop / "torn.parquet")),
        (Invalid, r"text.csv is not a readable CSV file", lambda: check(shop / "text.csv")),
        (Invalid, r"Series is not a table", lambda: check(frame["amount"])),
        (Invalid, r"not a table \(settings.ini\)", lambda: check("settings.ini" if Path("settings.ini").exists() else shop / "settings.ini")),
    ]:
        with pytest.raises(MlopsError, match=pattern) as caught:
            call()
        assert type(caught.value) is kind and "\n" not in str(caught.value)


def test_detectors_agree_on_the_shape_of_a_finding():
    column = Column("x", pd.Series(["a", "A ", None, "N/A", "1"] * 3, dtype=object))
    rows = [row for detector in DETECTORS for row in detector(column)]
    assert rows and all(list(row) == ["severity", "column", "finding", "count", "share", "rows", "action"] for row in rows)
