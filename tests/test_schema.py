"""What would break for somebody who trusts a schema: bad data let in, good data refused, a schema that changes on its way to a file and back."""

import datetime as dt
import json
from decimal import Decimal
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pandera.pandas as pa
import polars as pl
import pyarrow
import pytest
from pandera.errors import SchemaErrors
from pydantic import BaseModel

from mlops_nb.core.errors import GateFailed, Invalid, NotFound
from mlops_nb.core.settings import in_project, init
from mlops_nb.data.fields import Field, inferred, violations
from mlops_nb.data.schema import Schema, schema

DATA = Path(__file__).parent.parent / "examples" / "recommender" / "data"
RICH = Schema((
    Field("id", "integer", nullable=False, minimum=0, maximum=2**60 + 1),
    Field("price", "number", minimum=-0.5, maximum=99.9),
    Field("grade", "integer", nullable=False, values=(1, 2, 3)),
    Field("share", "number", values=(0.25, 0.5)),
    Field("paid", "flag", nullable=False),
    Field("country", "text", values=("Malta", "Österreich")),
    Field("note", "text", required=False, unique=True),
    Field("at", "time", nullable=False, zone="Europe/London", minimum="2011-03-27 03:00", maximum="2012-01-01T00:00:00.123456789"),
    Field("day", "time", minimum="2011-01-01"),
    Field("took", "duration"),
    Field("anything"),
    Field("something", nullable=False)), ("id", "at"), False)


def wrong(values, one):
    """What a one-column check finds: words -> count."""
    frame = pd.DataFrame({one.name: values})
    return {row["finding"]: row["count"] for row in Schema((one,)).check(frame).facts.get("findings", [])}


# ---------------------------------------------------------------- inferred
INFERRED = {
    "widened by a tenth": (pd.Series([100, 200]), Field("x", "integer", False, minimum=90, maximum=210)),
    "rounded outwards": (pd.Series([11, 14]), Field("x", "integer", False, minimum=10, maximum=15)),
    "not across zero": (pd.Series([0.5, 10.5]), Field("x", "number", False, minimum=0.0, maximum=11.5)),
    "not across zero from below": (pd.Series([-10, -1]), Field("x", "integer", False, minimum=-11, maximum=0)),
    "through zero where it was seen": (pd.Series([-10, 10]), Field("x", "integer", False, minimum=-12, maximum=12)),
    "constant": (pd.Series([5.0, 5.0]), Field("x", "number", False, minimum=4.5, maximum=5.5)),
    "small unsigned": (pd.Series([3, 250], dtype="uint8"), Field("x", "integer", False, minimum=0, maximum=275)),
    "large and exact": (pd.Series([2**62, 2**62 + 1]), Field("x", "integer", False, minimum=2**62 - 1, maximum=2**62 + 2)),
    "too large for a bound": (pd.Series([-1.7e308, 1.7e308]), Field("x", "number", False)),
    "infinite": (pd.Series([np.inf, 1.0, 2.0]), Field("x", "number", False, minimum=0.9, maximum=2.1)),
    "infinite only": (pd.Series([np.inf]), Field("x", "number", False)),
    "whole numbers with gaps": (pd.Series([1, None, 11], dtype="Int64"), Field("x", "integer", True, minimum=0, maximum=12)),
    "whole numbers with gaps in Arrow": (pd.Series([1, None, 11], dtype="int64[pyarrow]"), Field("x", "integer", True, minimum=0, maximum=12)),
    "objects": (pd.Series([1, None, 11], dtype=object), Field("x", "integer", True, minimum=0, maximum=12)),
    "decimals": (pd.Series([Decimal("1.5"), Decimal("2.5")]), Field("x", "number", False, minimum=1.4, maximum=2.6)),
    "flags": (pd.Series([True, None], dtype="boolean"), Field("x", "flag")),
    "text": (pd.Series(["a", "b"]), Field("x", "text", False)),
    "text of few values": (pd.Series(["b", "a"] * 10), Field("x", "text", False, values=("a", "b"))),
    "categories": (pd.Series(pd.Categorical(["b"], ["a", "b"])), Field("x", "text", False, values=("a", "b"))),
    "categories of numbers": (pd.Series(pd.Categorical([3, None], [1, 3])), Field("x", "integer", values=(1, 3))),
    "categories of times": (pd.Series(pd.Categorical(pd.to_datetime(["2011-01-01"]))), Field("x", "time", False)),
    "times begin and do not end": (pd.Series(pd.to_datetime(["2011-01-11 00:00", "2011-01-21 12:00"])), Field("x", "time", False, minimum="2011-01-09T00:00:00")),
    "days": (pd.Series([dt.date(2011, 1, 11), None]), Field("x", "time", minimum="2011-01-11")),
    "the earliest time there is": (pd.Series([pd.Timestamp.min, pd.Timestamp.max]), Field("x", "time", False, minimum=pd.Timestamp.min.isoformat())),
    "time zone": (pd.Series(pd.to_datetime(["2011-07-11"]).tz_localize("Europe/London")), Field("x", "time", False, zone="Europe/London", minimum="2011-07-11T00:00:00+01:00")),
    "durations": (pd.Series(pd.to_timedelta(["1h"])), Field("x", "duration", False)),
    "gaps only": (pd.Series([np.nan, np.nan]), Field("x", "number")),
    "gaps only among objects": (pd.Series([None, None], dtype=object), Field("x", "any")),
    "categories with gaps only": (pd.Series(pd.Categorical([None])), Field("x", "any")),
    "mixed": (pd.Series(["a", 1], dtype=object), Field("x", "any", False)),
    "lists": (pd.Series([[1], [2]]), Field("x", "any", False)),
    "no rows": (pd.Series([], dtype="int8"), Field("x", "integer")),
    "sparse": (pd.Series(pd.arrays.SparseArray([0, 0, 10])), Field("x", "integer", False, minimum=0, maximum=11)),
    "complex": (pd.Series([1j]), Field("x", "any", False)),
}


@pytest.mark.parametrize("case", INFERRED)
def test_inferred(case):
    values, expected = INFERRED[case]
    one = inferred("x", values, 0.1)
    close = {edge: pytest.approx(getattr(expected, edge)) for edge in ("minimum", "maximum") if isinstance(getattr(expected, edge), float)}
    assert {**vars(one)} == {**vars(expected), **close}
    assert Schema((one,)).check(pd.DataFrame({"x": values})).passed == (case != "infinite"), "data fit their own schema, but for an infinite value"


def test_no_slack_gives_what_was_seen():
    one = Schema.infer(pd.DataFrame({"x": [3.0, 4.0]}), slack=0)["x"]
    assert (one.minimum, one.maximum) == (3, 4)
    for slack in (-1, "much", float("nan")):
        with pytest.raises(Invalid, match="slack"):
            Schema.infer(pd.DataFrame({"x": [3.0]}), slack=slack)


def test_columns_of_one_name_and_names_that_are_no_text():
    with pytest.raises(Invalid, match="two columns named 'a'"):
        Schema.infer(pd.DataFrame([[1, 2]], columns=["a", "a"]))
    with pytest.raises(Invalid, match="two columns named '1'"):
        Schema.infer(pd.DataFrame([[1, 2]], columns=[1, "1"]))
    numbered = Schema.infer(pd.DataFrame([[1, 2]]))
    assert numbered.names == ["0", "1"] and numbered.check(pd.DataFrame([[1, 2]])).passed
    report = numbered.check(pd.DataFrame([[1, 2]], columns=[0, 0]))
    assert [row["finding"] for row in report.facts["findings"]] == ["there are two columns of this name", "the column is missing"]


def test_frames_without_rows_or_columns():
    empty = pd.DataFrame({"x": pd.Series([], dtype="int64")})
    assert Schema.infer(empty)["x"] == Field("x", "integer") and Schema.infer(pd.DataFrame()) == Schema()
    assert RICH.without("something").with_key("").check(pd.DataFrame(columns=[name for name in RICH.names if name != "something"])).passed
    assert Schema().check(pd.DataFrame()).passed and not Schema((Field("x"),)).check(pd.DataFrame()).passed


# ---------------------------------------------------------------- kinds
when, summer = pd.Timestamp("2011-06-01"), pd.Timestamp("2011-06-01", tz="Europe/London")
KINDS = [
    ("integer", [1.0, 2.0, np.nan], 0), ("integer", [1.5, 2.0, np.inf], 2), ("integer", pd.array([1, None], "Int8"), 0), ("integer", pd.array([1.5, None], "Float64"), 1), ("integer", ["1", "2"], 2),
    ("integer", pd.Series([1, 2.0, Decimal(3), True, "4", None, 5.5], dtype=object), 3), ("integer", [True, False], 2), ("integer", [2**63, 2**64 - 1], 0),
    ("number", [1, 2], 0), ("number", pd.Series([1, 2.5, Decimal("0.1"), "x", np.bool_(True)], dtype=object), 2), ("number", [when], 1), ("number", pd.array([Decimal(1)], pd.ArrowDtype(pyarrow.decimal128(9, 2))), 0),
    ("flag", [True, False], 0), ("flag", pd.array([True, None], "boolean"), 0), ("flag", pd.Series([True, None, 0], dtype=object), 1), ("flag", [0, 1], 2),
    ("text", ["a", None], 0), ("text", pd.Series(["a", 1, None], dtype=object), 1), ("text", [1.0, np.nan], 1), ("text", pd.Categorical(["a", None]), 0), ("text", pd.Categorical([1, 1, None]), 2), ("text", [None, None], 0),
    ("time", [when, pd.NaT], 0), ("time", pd.Series([when, dt.date(2011, 1, 1), dt.datetime(2011, 1, 1), "2011", None], dtype=object), 1), ("time", [summer], 1), ("time", pd.Series([summer, when], dtype=object), 1),
    ("time", pd.array([dt.date(2011, 1, 1)], pd.ArrowDtype(pyarrow.date32())), 0), ("time", pd.Categorical([when, None]), 0),
    ("duration", pd.to_timedelta(["1h", None]), 0), ("duration", pd.Series([dt.timedelta(1), 1], dtype=object), 1), ("duration", [1, 2], 2),
    ("any", pd.Series([1, "a", [], None], dtype=object), 0), ("any", [1j], 0)]


@pytest.mark.parametrize("kind, values, count", KINDS)
def test_a_kind_is_told_in_every_guise(kind, values, count):
    found = wrong(values, Field("x", kind))
    assert sum(found.values()) == count and (not count or " instead of " in next(iter(found)))


def test_times_with_and_without_a_zone_are_two_things_and_the_zone_does_not_matter():
    zoned = Field("x", "time", zone="Europe/London", minimum="2011-06-01 12:00", maximum="2011-06-02")
    assert wrong([when, when], zoned) == {"times without a time zone instead of times in Europe/London": 2}
    noon = pd.Series(pd.to_datetime(["2011-06-01 10:59", "2011-06-01 11:00", "2011-06-01 23:00", "2011-06-01 23:01"]).tz_localize("UTC"))
    for values in (noon, noon.dt.tz_convert("Asia/Tokyo"), noon.astype(object), noon.astype(pd.ArrowDtype(pyarrow.timestamp("us", "UTC")))):
        assert wrong(values, zoned) == {"below 2011-06-01T12:00:00+01:00": 1, "above 2011-06-02T00:00:00+01:00": 1}
    assert wrong(pd.Series([dt.date(1900, 1, 1), dt.date(2011, 1, 2), None]), Field("x", "time", minimum="2011-01-01")) == {"below 2011-01-01T00:00:00": 1}
    assert wrong(pd.Series([dt.datetime(9999, 12, 31), dt.datetime(2011, 1, 1)], dtype=object), Field("x", "time", maximum="2012-01-01")) == {"above 2012-01-01T00:00:00": 1}


def test_bounds_are_included_and_large_whole_numbers_are_exact():
    top = 2**60 + 1
    assert wrong([top - 1, top, top + 1], Field("x", "integer", maximum=top)) == {f"above {top:,}": 1}
    assert wrong(pd.array([top, top + 1, None], "UInt64"), Field("x", "integer", maximum=top)) == {f"above {top:,}": 1}
    assert wrong(np.array([0, 255], "uint8"), Field("x", "integer", minimum=-5, maximum=300)) == {}
    assert wrong([1.0, 2.0, np.nan, -np.inf], Field("x", "number", minimum=1, maximum=2)) == {"below 1": 1}
    assert wrong(pd.Series([1, "a", 9], dtype=object), Field("x", "integer", maximum=5)) == {"str instead of whole numbers": 1, "above 5": 1}
    assert wrong(pd.Categorical([1, 9, 9, None]), Field("x", "integer", maximum=5)) == {"above 5": 2}


def test_values_gaps_and_repetitions():
    one = Field("x", "text", nullable=False, unique=True, values=("a", "b"))
    assert wrong(["a", "b", "c", "c", None, None, "a"], one) == {"not among the allowed values: 'c'": 2, "missing values where none are allowed": 2, "values that occurred before": 2}
    assert wrong(pd.Series(["a", [1], None], dtype=object), Field("x", "text", values=("a",))) == {"list instead of text": 1}
    assert wrong(pd.Series([[1], [1], [2]]), Field("x", unique=True)) == {"values that occurred before": 1}
    assert wrong([1, 2, 3], Field("x", "number", values=(1.0, 2.0))) == {"not among the allowed values: 3": 1}
    assert wrong(pd.array([True, False, None], "boolean"), Field("x", "flag", values=(True,))) == {"not among the allowed values: False": 1}
    found = Schema((one,)).check(pd.DataFrame({"x": ["q", "a"]}, index=["first", "second"])).facts["findings"][0]
    assert found["rows"] == ["first"] and found["count"] == 1 and found["share"] == 0.5 and found["severity"] == "error" and found["action"]


# ---------------------------------------------------------------- whole tables
def test_missing_renamed_and_additional_columns():
    one = Schema((Field("Price", "number"), Field("Id"), Field("Note", required=False)))
    report = one.check(pd.DataFrame({"price": [1.0], "more": [2]}))
    assert not report.passed and [row["name"] for row in report.failures] == ["Price", "Id"]
    actions = {row["column"]: row["action"] for row in report.facts["findings"]}
    assert actions["Price"] == "rename 'price', if that is what it is" and "required=False" in actions["Id"]
    assert {row["column"]: row["severity"] for row in report.facts["findings"]} == {"Price": "error", "Id": "error", "price": "note", "more": "note"}
    assert [row["name"] for row in one.with_extra(False).check(pd.DataFrame({"Price": [1.0], "Id": [1], "more": [2]})).failures] == ["more"]
    assert one.check(pd.DataFrame({"Id": [1], "Price": [1.0], "more": [2]})).passed, "the order of columns does not matter"


def test_a_key_tells_rows_apart():
    frame = pd.DataFrame({"a": [1, 1, 2], "b": ["x", "y", "x"], "c": 0})
    keyed = Schema.infer(frame, key="a, b")
    assert keyed.key == ("a", "b") and not keyed["a"].nullable and keyed.check(frame).passed
    report = keyed.check(pd.concat([frame, frame.iloc[:2]], ignore_index=True))
    assert report.failures[0]["name"] == "a, b" and report.facts["findings"][0]["rows"] == ["3", "4"] and report.facts["invalid_rows"] == 2
    for wrong_key, words in (("a", "1 rows repeat"), ("z", "no column 'z'")):
        with pytest.raises(Invalid, match=words):
            Schema.infer(frame, key=wrong_key)
    with pytest.raises(Invalid, match="belongs to the key"):
        keyed.without("a")
    assert keyed.with_key("").without("a").names == ["b", "c"]


def test_enforce_is_silent_or_says_it_in_one_sentence():
    one = Schema((Field("n", "integer", nullable=False, minimum=0), Field("t", "text"), Field("u"), Field("v")))
    one.enforce(pd.DataFrame({"n": [1], "t": ["a"], "u": [1], "v": [2], "w": [3]}))
    with pytest.raises(Invalid) as error:
        one.enforce(pd.DataFrame({"n": [-1, -2, None, -3, -4], "t": [1] * 5}), "orders")
    assert str(error.value) == ("orders does not fit its schema – n: below 0 in 4 rows (0, 1, 3, …); n: missing values where none are allowed in 1 row (2); "
                                "t: whole numbers instead of text in 5 rows (0, 1, 2, …); and 2 more. Correct the data, or change the schema; schema.check(data) shows every row concerned.")


def test_pandas_polars_arrow_and_files_are_judged_alike(tmp_path):
    frame = pd.DataFrame({"n": [1, -2, None], "t": pd.to_datetime(["2011-01-01", None, "2012-01-01"]), "c": ["a", "b", None], "f": [True, False, True]})
    one = Schema((Field("n", "integer", minimum=0), Field("t", "time", nullable=False, maximum="2011-06-01"), Field("c", "text", values=("a",)), Field("f", "text")))
    frame.to_parquet(tmp_path / "x.parquet")
    expected = [(row["column"], row["finding"], row["count"], row["rows"]) for row in one.check(frame).facts["findings"]]
    assert [count for _, _, count, _ in expected] == [1, 1, 1, 1, 3]
    for data in (pl.from_pandas(frame), pyarrow.Table.from_pandas(frame), pl.from_pandas(frame).with_columns(pl.col("c").cast(pl.Categorical)), str(tmp_path / "x.parquet")):
        assert [(row["column"], row["finding"], row["count"], row["rows"]) for row in one.check(data).facts["findings"]] == expected
    assert Schema.infer(pl.from_pandas(frame)) == Schema.infer(frame)


# ---------------------------------------------------------------- against pandera and jsonschema
def random_frame(seed, n=400):
    r = np.random.default_rng(seed)
    frame = pd.DataFrame({"x": r.normal(0, 10, n).round(2), "k": r.integers(-5, 30, n), "c": r.choice(list("abcdé"), n), "d": pd.Timestamp("2011-01-01") + pd.to_timedelta(r.integers(0, 9000, n), unit="h"),
                          "i": pd.array(r.integers(0, 9, n), "Int64"), "b": pd.array(r.random(n) < 0.5, "boolean")})
    for name in frame:
        frame.loc[r.random(n) < 0.05, name] = None
    return frame


def random_schema(seed):
    r = np.random.default_rng(seed + 1000)
    gaps = lambda: bool(r.random() < 0.7)
    return Schema((Field("x", "number", gaps(), minimum=float(r.integers(-20, 0)), maximum=float(r.integers(0, 20))), Field("k", "integer", gaps(), minimum=int(r.integers(-5, 2))),
                   Field("c", "text", gaps(), values=tuple(r.choice(list("abcdé"), 3, replace=False).tolist())), Field("d", "time", gaps(), unique=bool(r.random() < 0.5), minimum="2011-02-01", maximum="2011-11-01"),
                   Field("i", "integer", gaps(), values=(0, 1, 2, 3, 4, 5)), Field("b", "flag", gaps())), extra=False)


@pytest.mark.parametrize("seed", range(6))
def test_counts_are_those_of_pandera(seed):
    """The pandera schema is written by hand here, not by to_pandera; the one of to_pandera must agree with it as well."""
    frame, one = random_frame(seed), random_schema(seed)
    time = lambda value: pd.Timestamp(value)
    by_hand = pa.DataFrameSchema({
        "x": pa.Column(float, pa.Check.in_range(one["x"].minimum, one["x"].maximum), nullable=one["x"].nullable),
        "k": pa.Column(float, pa.Check.ge(one["k"].minimum), nullable=one["k"].nullable),
        "c": pa.Column(None, pa.Check.isin(one["c"].values), nullable=one["c"].nullable),
        "d": pa.Column(None, [pa.Check.ge(time(one["d"].minimum)), pa.Check.le(time(one["d"].maximum))], nullable=one["d"].nullable, unique=one["d"].unique, report_duplicates="exclude_first"),
        "i": pa.Column("Int64", pa.Check.isin(one["i"].values), nullable=one["i"].nullable),
        "b": pa.Column("boolean", nullable=one["b"].nullable)}, strict=True)

    def failing(schema, column):
        try:
            schema.validate(frame, lazy=True)
        except SchemaErrors as errors:
            cases = errors.failure_cases
            assert cases["index"].notna().all(), cases
            return set(cases[cases["column"] == column]["index"])
        return set()

    every = set()
    for name in frame:
        ours = {place for _, rows, _ in violations(frame[name], one[name]) for place in np.flatnonzero(rows)}
        theirs = failing(by_hand, name)
        assert theirs == failing(one.to_pandera(), name)
        if one[name].unique and one[name].nullable:  # to pandera a second gap is a repetition; here a gap is no value
            theirs -= set(np.flatnonzero(frame[name].isna()))
        assert ours == theirs, name
        every |= ours
    assert one.check(frame).facts["invalid_rows"] == len(every) > 0


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_fail_are_the_records_that_jsonschema_refuses(seed):
    frame = random_frame(seed, 200).drop(columns="d")  # JSON Schema has no word for bounds of times
    one = random_schema(seed).without("d")
    judge = jsonschema.Draft202012Validator(one.to_json_schema())
    records = json.loads(frame.to_json(orient="records"))
    refused = [bool(list(judge.iter_errors(record))) for record in records]
    ours = [one.check(frame.iloc[[place]]).facts["invalid_rows"] == 1 for place in range(len(frame))]
    assert refused == ours and one.check(frame).facts["invalid_rows"] == sum(refused) > 0


# ---------------------------------------------------------------- there and back
@pytest.mark.parametrize("one", [RICH, Schema(), Schema.infer(DATA / "online_retail_small.parquet")], ids=["rich", "empty", "orders"])
def test_every_form_comes_back_the_same(one, tmp_path):
    text = lambda value: json.loads(json.dumps(value, allow_nan=False))
    assert Schema.from_dict(text(one.to_dict())) == one
    record = one.to_json_schema(title="A record")
    jsonschema.Draft202012Validator.check_schema(record)
    assert Schema.from_json_schema(text(record)) == one
    (tmp_path / "s.json").write_text(json.dumps(record), encoding="utf-8")
    assert Schema.from_json_schema(str(tmp_path / "s.json")) == Schema.from_json_schema(tmp_path / "s.json") == one
    assert Schema.from_pandera(one.to_pandera()) == one
    assert one.report().text().startswith("Schema") and "<table>" in one.report().html() or one == Schema()


def test_a_schema_written_elsewhere():
    class Order(BaseModel):
        number: int
        price: float | None = None
        country: str = "Malta"
        at: dt.datetime

    one = Schema.from_json_schema(Order.model_json_schema())
    assert one == Schema((Field("number", "integer", False), Field("price", "number", True, False), Field("country", "text", False, False), Field("at", "time", False, zone="UTC")))
    other = Schema.from_json_schema({"type": "object", "additionalProperties": False, "required": ["a"], "properties": {
        "a": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10, "description": "how many"}, "b": {"type": "number", "exclusiveMinimum": 0}, "c": {"const": "x"}, "d": {"enum": ["x", None]}, "e": {"type": ["integer", "number"]}, "f": {}}})
    assert other == Schema((Field("a", "integer", False, minimum=1, maximum=9), Field("b", "number", False, False, minimum=5e-324), Field("c", "text", False, False, values=("x",)),
                            Field("d", "text", True, False, values=("x",)), Field("e", "number", False, False), Field("f", "any", True, False)), extra=False)


@pytest.mark.parametrize("properties, words", [
    ({"x": {"type": "string", "pattern": "a"}}, "'pattern' of 'x'"), ({"x": {"type": "array"}}, "types array"), ({"x": {"type": ["string", "integer"]}}, "types integer, string"), ({"x": {"enum": [1, "a"]}}, "types integer, string"),
    ({"x": {"not": {"const": 1}}}, "'not' of 'x'"), ({"x": {"$ref": "#/$defs/y"}}, "ref' of 'x'"), ({"x": {"anyOf": [{"type": "string"}, {"type": "integer"}]}}, "'anyOf' of 'x'"), (None, "does not describe a record")])
def test_what_json_schema_says_beyond_columns_is_refused(properties, words):
    with pytest.raises(Invalid, match=words):
        Schema.from_json_schema({"type": "object", "properties": properties})


def test_json_schema_files_that_are_none(tmp_path):
    with pytest.raises(NotFound, match="there is no file"):
        Schema.from_json_schema(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(Invalid, match="is not a JSON file"):
        Schema.from_json_schema(tmp_path / "bad.json")


def test_a_schema_written_with_pandera():
    class Order(pa.DataFrameModel):
        number: int = pa.Field(gt=0, lt=10)
        price: float = pa.Field(in_range={"min_value": 0, "max_value": 5, "include_min": False}, nullable=True)
        country: str = pa.Field(isin=["a", "b"], unique=True)
        grade: pd.CategoricalDtype = pa.Field(dtype_kwargs={"categories": ["x", "y"], "ordered": False})
        at: pd.DatetimeTZDtype = pa.Field(dtype_kwargs={"unit": "ns", "tz": "UTC"}, ge=pd.Timestamp("2011-01-01", tz="UTC"))

        class Config:
            strict = True

    assert Schema.from_pandera(Order) == Schema((
        Field("number", "integer", False, minimum=1, maximum=9), Field("price", "number", True, minimum=5e-324, maximum=5.0), Field("country", "text", False, unique=True, values=("a", "b")),
        Field("grade", "text", False, values=("x", "y")), Field("at", "time", False, zone="UTC", minimum="2011-01-01T00:00:00+00:00")), extra=False)


@pytest.mark.parametrize("schema_, words", [
    (pa.DataFrameSchema({"x": pa.Column(str, pa.Check.str_matches("a"))}), "check 'str_matches' on 'x'"), (pa.DataFrameSchema({"x": pa.Column(int, pa.Check(lambda x: x > 1))}), "on 'x'"),
    (pa.DataFrameSchema({}, checks=pa.Check(lambda x: True)), "whole rows"), (pa.DataFrameSchema({}, index=pa.Index(int)), "an index"), (pa.DataFrameSchema({"x.*": pa.Column(int, regex=True)}), "by a pattern"), (3, "is no pandera schema")])
def test_what_pandera_says_beyond_columns_is_refused(schema_, words):
    with pytest.raises(Invalid, match=words):
        Schema.from_pandera(schema_)


# ---------------------------------------------------------------- mistakes
@pytest.mark.parametrize("make, words", [
    (lambda: RICH.column("pric", minimum=1), "no column 'pric'; did you mean price"), (lambda: RICH.column("price", minimun=1), "no 'minimun'; did you mean minimum"), (lambda: RICH["x"], "no column 'x'"),
    (lambda: RICH.without("x"), "no column 'x'"), (lambda: RICH.with_key("x"), "no column 'x'"), (lambda: Field("x", "int"), "kind 'int'"), (lambda: Field("x", "text", minimum=1), "have no minimum"),
    (lambda: Field("x", "time", values=["a"]), "have no values"), (lambda: Field("x", "text", zone="UTC"), "have no zone"), (lambda: RICH.column("price", minimum=100), "minimum must not be larger"),
    (lambda: Field("x", "integer", minimum="1"), "give a finite number"), (lambda: Field("x", "number", minimum=float("nan")), "give a finite number"), (lambda: Field("x", "integer", maximum=True), "give a finite number"),
    (lambda: Field("x", "time", minimum="soon"), "no bound for the times"), (lambda: Field("x", "time", minimum="2011-01-01T00:00+01:00"), "no time zone"), (lambda: Field("x", "time", zone="Mars", minimum="2011-01-01"), "Mars"),
    (lambda: Field("x", "time", zone="Mars"), "Mars"), (lambda: Field("x", "text", values="abc"), "give a list"), (lambda: Field("x", "text", values=[]), "at least one"), (lambda: Field("x", "text", values=["a", None]), "nullable=True"),
    (lambda: Field("x", "integer", values=[True]), "True is not allowed"), (lambda: Field("x", nullable=1), "True or False"), (lambda: Field(3), "no name of a column"), (lambda: Schema.from_dict({}), "no schema"), (lambda: Schema.from_dict([]), "no schema"),
    (lambda: Schema.from_dict({"fields": [{"name": "x", "what": 1}], "key": [], "extra": True}), "no schema"), (lambda: Schema.from_dict({"fields": [{"name": "x"}, {"name": "x"}], "key": [], "extra": True}), "no schema"),
    (lambda: RICH.check([1]), "not a table"), (lambda: RICH.with_key(["id", 3]), "no column '3'")])
def test_each_mistake_is_one_clear_sentence(make, words):
    with pytest.raises(Invalid, match=words) as error:
        make()
    assert len(str(error.value)) < 400 and "Error" not in str(error.value).removeprefix("this is no schema (")[12:]


def test_an_edit_makes_a_new_schema_and_bounds_are_settled():
    before = RICH.to_dict()
    new = RICH.column("id", minimum=0.5, maximum=9.5).column("price", maximum=None).column("note", kind="integer", minimum=np.int64(3)).column("added", kind="text")
    assert RICH.to_dict() == before and new["id"].minimum == 1 and new["id"].maximum == 9 and new["price"].maximum is None and new["note"] == Field("note", "integer", True, False, True, minimum=3) and new.names[-1] == "added"
    assert RICH.column("country", kind="integer")["country"] == Field("country", "integer") and type(new["note"].minimum) is int
    assert RICH.column("price", kind="integer")["price"] == Field("price", "integer", minimum=0, maximum=99), "bounds hold on between kinds of numbers"
    with pytest.raises(AttributeError):
        RICH["id"].minimum = 3


# ---------------------------------------------------------------- the verb
def test_the_verb_writes_and_judges(tmp_path, monkeypatch):
    init(str(tmp_path), name="shop")
    file = tmp_path / "deep" / "orders.schema.json"
    good = pd.DataFrame({"id": [1, 2], "n": [5, 6]})
    with in_project(tmp_path):
        assert schema(good, key="id", to=str(file)) == Schema.from_json_schema(file)
        assert schema(good, against=str(file)).passed
        report = schema(good.assign(n=100), against=str(file))
        assert not report.passed and report.saved.exists()
        with pytest.raises(Invalid, match="leave them out"):
            schema(good, against=str(file), to="x.json")
        (tmp_path / "step").mkdir()
        monkeypatch.setenv("MLOPS_STEP_FOLDER", str(tmp_path / "step"))
        with pytest.raises(GateFailed, match="n 2"):
            schema(good.assign(n=100), against=str(file))
        assert list((tmp_path / "step").glob("*.html"))
