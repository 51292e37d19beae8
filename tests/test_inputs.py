"""The rows of a request against a model's columns: held against a slow reference, whatever the form, the order and the number of rows."""

import asyncio
import json
import math
import random
import struct
from contextlib import suppress
from datetime import datetime

import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from starlette.testclient import TestClient

from mlops_nb.core.errors import Invalid
from mlops_nb.deploy.client import bodies
from mlops_nb.serve.inputs import Column, Inputs, columns_of, taken, takes_of
from mlops_nb.serve.protocol import Malformed, Table, TooLarge, from_records, named, parse_csv, plain_records
from serving import TOKEN, asking_app, endpoint_of

TYPES = ["long", "double", "string", "boolean", "datetime", "binary"]
GOOD = {"long": [0, 7, -3, 2**63 - 1, -(2**63), 5.0, -0.0], "double": [0, 1.5, -2, 2**60, 1e300, None], "string": ["", "a", "é\u0000", None], "boolean": [True, False],
        "datetime": ["2011-11-09", "2011-11-09T10:00:00Z", "2011-11-09T10:00:00.123+02:00", None], "binary": [1, "x", None, [1], {"a": 1}, True]}
ODD = [None, True, False, 0, 1, -1, 2**53, 2**63, -(2**63) - 1, 10**400, 0.5, 3.0, 1e30, float("inf"), float("nan"), "", "1", "true", "2011-11-09", "2011-02-30", "now", [], [1], {}, {"a": 1}]


def reference(value, kind, required, there=True):
    "What the documentation says about a value, as plainly as it can be written."
    if not there or (value is None and not required):
        return not required
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "integer":
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if isinstance(value, float):
            return math.isfinite(value) and value == math.floor(value) and abs(value) < 2**53
        return -(2**63) <= value <= 2**63 - 1
    if kind == "any" or value is None:
        return True
    if kind == "number":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "string":
        return isinstance(value, str)
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return True


def random_case(seed):
    "Columns, and rows as dicts that are mostly right."
    rng = random.Random(seed)
    columns = columns_of([{"name": f"c{i}", "type": rng.choice(TYPES), "required": rng.random() < 0.7} for i in range(rng.randrange(1, 6))])
    wrong = rng.random() < 0.6
    rows = []
    for _ in range(rng.choice([1, 2, 7, 8, 9, 30])):
        row = {}
        for column in columns:
            if not column.required and rng.random() < 0.2 or wrong and rng.random() < 0.02:
                continue
            row[column.name] = rng.choice(ODD if wrong and rng.random() < 0.05 else GOOD[column.dtype] + ([] if column.required else [None]))
        for i in range(rng.randrange(3)):
            row[f"extra{i}"] = rng.choice(ODD)
        rows.append(dict(rng.sample(list(row.items()), len(row))))
    return columns, rows


def faults(columns, rows):
    return {(i, column.name) for i, row in enumerate(rows) for column in columns if not reference(row.get(column.name), column.kind, column.required, column.name in row)}


def said(inputs, table):
    "The rows, or the row and column that were refused."
    try:
        return inputs.rows(table)
    except Invalid as error:
        words = str(error)
        assert words.startswith("row ") and ": expected " in words and ", got " in words and len(words) < 200
        return int(words.split()[1].rstrip(",")), words.split("'")[1]


@pytest.mark.parametrize("part", range(4))
def test_random_tables_are_judged_as_the_reference_does(part):
    good = bad = 0
    for seed in range(part * 1000, part * 1000 + 1000):
        columns, rows = random_case(seed)
        inputs, wrong = Inputs(columns), faults(columns, rows)
        got = said(inputs, from_records(rows, "records", {}))
        if wrong:
            assert got in wrong, seed
            bad += 1
        else:
            for row, sent in zip(got, rows, strict=True):
                assert all(sent[name] is value if name in sent else not column.required for name, value, column in zip(inputs.names, row, columns)), seed
            good += 1
            if part == 0 and not any(value == 10**400 for row in got for value in row):  # which no body can hold
                check_frame(inputs, columns, rows, got)
        again = said(inputs, from_records(rows, "records", {}))  # with what was remembered
        assert again in wrong if wrong else isinstance(again, list), seed
    assert good > 200 and bad > 200


def check_frame(inputs, columns, rows, tuples):
    "Each value arrives, as the column's type."
    frame = inputs.frame(tuples)
    assert list(frame) == list(inputs.names) and len(frame) == len(rows)
    for column in columns:
        for row, value in zip(rows, frame[column.name]):
            sent = row.get(column.name)
            if column.kind == "any":
                continue  # pandas finds a type for them
            if sent is None or sent != sent:
                assert value is None or value != value
            elif column.kind == "datetime":
                moment = pd.Timestamp(sent)
                assert value == (moment.tz_convert("UTC").tz_localize(None) if moment.tzinfo else moment)
            elif column.kind == "number" or column.kind == "integer" and not column.required:
                assert value == float(sent)
            else:
                assert value == sent


def test_one_row_and_many_rows_agree():
    for seed in range(1000):
        columns, rows = random_case(seed)
        one = [said(Inputs(columns), from_records([row], "records", {})) for row in rows]
        many = said(Inputs(columns), from_records((rows * 8)[:max(8, len(rows))], "records", {}))
        if isinstance(many, list):
            assert many[:len(rows)] == [answer[0] for answer in one], seed
        else:
            assert isinstance(one[many[0] % len(rows)], tuple) and many in {(i, name) for i, name in faults(columns, (rows * 8)[:max(8, len(rows))])}, seed


@pytest.mark.parametrize("n", [1, 8])
def test_any_order_and_any_form_mean_the_same(n):
    rng = random.Random(n)
    columns = columns_of({"n": "long", "x": "double", "s": "string", "b": "boolean"})
    row = {"n": 4, "x": 2, "s": "a", "b": False, "more": [1]}
    expected = [(4, 2, "a", False)] * n
    for _ in range(30):
        names = rng.sample(list(row), len(row))
        inputs = Inputs(columns)
        assert inputs.rows(from_records([{name: row[name] for name in names}] * n, "records", {})) == expected
        assert inputs.rows(named(names, [[row[name] for name in names]] * n, "split", {})) == expected
        assert inputs.rows(Table(None, [[4, 2, "a", False]] * n, {})) == expected
        mixed = [{name: row[name] for name in rng.sample(list(row), len(row))} for _ in range(n)]
        assert inputs.rows(from_records(mixed, "records", {})) == expected


def test_a_remembered_combination_of_types_still_looks_at_values():
    inputs = Inputs(columns_of({"n": "long", "t": "datetime"}))
    for _ in range(2):
        assert inputs.rows(Table(None, [[1.0, "2011-11-09"]], {}))
        for row, words in (([1.5, "2011-11-09"], "got a number with a fraction"), ([2.0, "the ninth"], "got another string"), ([1e300, "2011-11-09"], "beyond 64 bits"), ([float("inf"), "2011-11-09"], "column 'n'")):
            with pytest.raises(Invalid, match=words):
                inputs.rows(Table(None, [row], {}))
    for i in range(3000):
        with pytest.raises(Invalid):
            inputs.rows(Table(None, [[i, type(f"Type{i}", (), {})()]], {}))
    assert len(inputs.seen) <= 256


def test_whole_numbers_of_any_size_are_refused_in_words():
    asking = TestClient(asking_app(lambda rows: rows["n"], {"n": "long"}), headers={"Authorization": f"Bearer {TOKEN}", "Content-Type": "text/csv"})
    for digits in (19, 20, 400, 4299, 4301, 100_000):
        got = asking.post("/invocations", content=f"n\n{'9' * digits}\n")
        assert got.status_code == 422 and "column 'n'" in got.json()["error"], digits
    assert asking.post("/invocations", content=f"n\n{2**63 - 1}\n").json() == {"predictions": [2**63 - 1]}


def test_an_answer_does_not_depend_on_the_rows_beside_it():
    frame = pd.DataFrame({"s": ["a", "b", None, "a", None]})
    model = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LinearRegression()).fit(frame, [1, 2, 30, 1, 30])
    endpoint = endpoint_of(model, [{"name": "s", "type": "string", "required": False}])

    async def test():
        one = lambda value: endpoint.predict(from_records([{"s": value}], "records", {}))
        alone = (await one(None)).answers
        beside = [answer.answers for answer in await asyncio.gather(one(None), one("a"), one(None))]
        assert beside[0] == beside[2] == pytest.approx([30.0]) and alone == pytest.approx([30.0])
    asyncio.run(test())


@pytest.mark.parametrize("kind, value, neighbour", [("string", None, "x"), ("string", "x", None), ("long", 2**53 - 1, None), ("long", 3, None), ("double", None, 1.0), ("datetime", None, "2011-11-09"), ("datetime", "2011-11-09", "2011-11-09T10:00:00.123456Z")])
def test_a_column_has_one_type_whatever_is_in_it(kind, value, neighbour):
    inputs = Inputs(columns_of([{"name": "c", "type": kind, "required": False}]))
    alone, beside = inputs.frame([(value,)]), inputs.frame([(value,), (neighbour,)])
    assert alone["c"].dtype.kind == beside["c"].dtype.kind
    pd.testing.assert_frame_equal(alone, beside[:1], check_dtype=kind != "datetime")


def test_dates_beyond_what_pandas_holds_are_refused_not_failed():
    inputs = Inputs(columns_of({"t": "datetime"}))
    for text in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2011-W45-3", "20111109T101112"):
        try:
            assert len(inputs.frame(inputs.rows(Table(None, [[text]], {})))) == 1
        except Invalid as error:
            assert "column 't'" in str(error)


# ---------------------------------------------------------------- models without recorded columns

def test_without_columns_anything_goes_in_the_order_it_comes():
    inputs = Inputs()
    table = from_records([{"a": 1}, {"b": 2, "a": 3}], "records", {})
    assert inputs.named(table) == ("a", "b") and inputs.rows(table) == [(1, None), (3, 2)]
    assert inputs.rows(Table(None, [[1, 2]], {})) == [(1, 2)] and inputs.named(Table(None, [[1, 2]], {})) == ("x0", "x1")
    assert list(inputs.frame([(1, 2)], ("x0", "x1"))) == ["x0", "x1"]


def test_without_columns_the_work_grows_with_the_rows_not_with_their_square():
    rows = [{"a": 1, "b": 2} for _ in range(300)]
    inputs, calls = Inputs(), []
    inputs.named = lambda table: calls.append(1) or ("a", "b")
    assert len(inputs.rows(Table(None, rows, {}))) == 300 and len(calls) <= 1


def test_rows_that_all_have_other_columns_cannot_fill_the_memory():
    table = from_records([{f"c{i}_{j}": 1 for j in range(10)} for i in range(3000)], "records", {})
    with pytest.raises((TooLarge, Invalid), match="column"):
        Inputs().rows(table)


# ---------------------------------------------------------------- params and CSV

def test_params_by_name_type_and_default():
    def predict(rows, k: int = 10, *, share: float = 0.5, free=None, **more):
        "What a bound method looks like."
    takes = takes_of(predict)
    assert takes == {"k": 10, "share": 0.5, "free": None}
    assert taken(takes, {"k": 2, "share": 1, "free": [1]}) == {"k": 2, "share": 1, "free": [1]}
    for params in ({"k": True}, {"k": 2.5}, {"share": True}, {"share": "1"}, {"K": 1}, {"x" * 1000: 1}):
        with pytest.raises(Invalid) as found:
            taken(takes, params)
        assert len(str(found.value)) < 200


def test_csv_and_json_mean_the_same():
    columns = columns_of({"n": "long", "x": "double", "s": "string", "b": "boolean", "t": "datetime"})
    table = parse_csv(b"t,b,s,x,n\n2011-11-09,true,a,1e2,3\n2011-11-10,0,,,4\n", columns)
    inputs = Inputs(columns)
    assert inputs.rows(table) == [(3, 100.0, "a", True, "2011-11-09"), (4, None, None, False, "2011-11-10")]
    frame = inputs.frame(inputs.rows(table))
    assert frame.dtypes["n"] == np.int64 and frame.dtypes["b"] == bool and frame["x"].isna().tolist() == [False, True]


def test_names_are_any_text():
    columns = (Column("", "number"), Column("a b", "number"), Column("__class__", "number"), Column("é'\"", "number"))
    inputs = Inputs(columns)
    row = {column.name: float(i) for i, column in enumerate(columns)}
    assert inputs.rows(from_records([row], "records", {})) == [(0.0, 1.0, 2.0, 3.0)]
    assert list(inputs.frame([(0.0, 1.0, 2.0, 3.0)])) == [column.name for column in columns]


# ---------------------------------------------------------------- text and categories

TEXTS = ["late again", "well packed", "broken on arrival", "lovely colours"]
MOOD = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(TEXTS * 5, ["bad", "good", "bad", "good"] * 5)


def binary_texts(texts):
    "The body of Open Inference with bytes behind its JSON, and the length of that."
    raw = b"".join(struct.pack("<I", len(one)) + one.encode() for one in texts)
    head = json.dumps({"inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(texts), 1], "parameters": {"binary_data_size": len(raw)}}]}).encode()
    return head + raw, {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}


@pytest.mark.parametrize("inputs", [[{"name": "text", "type": "string", "required": True, "form": "series"}], [{"type": "string"}], []], ids=["recorded", "by an earlier version", "not at all"])
def test_each_text_gets_its_own_answer_on_every_protocol(inputs):
    "What was recorded before models of text were known, or nothing, is enough: the model says what it is."
    asking, right = TestClient(asking_app(MOOD, inputs), headers={"Authorization": f"Bearer {TOKEN}"}), ["bad", "good", "bad", "good"]
    records = [{"text": one} for one in TEXTS]
    for body in ({"inputs": TEXTS}, {"instances": TEXTS}, {"instances": [[one] for one in TEXTS]}, {"inputs": {"text": TEXTS}}, {"dataframe_records": records},
                 {"dataframe_split": {"columns": ["text"], "data": [[one] for one in TEXTS]}}):
        assert asking.post("/invocations", json=body).json() == {"predictions": right}, body
    assert asking.post("/invocations", content="text\n" + "\n".join(TEXTS), headers={"Content-Type": "text/csv"}).json() == {"predictions": right}
    assert [one["prediction"] for one in asking.post("/predict", json=records).json()["records"]] == right
    for i, text in enumerate(TEXTS):
        assert asking.post("/predict", json=[{"text": text}]).json()["records"] == [{"prediction": right[i]}]
    for name in ("text", "input-0"):
        body = {"inputs": [{"name": name, "datatype": "BYTES", "shape": [4], "data": TEXTS}]}
        assert asking.post("/v2/models/shelf/infer", json=body).json()["outputs"][0]["data"] == right
    body, headers = binary_texts(TEXTS)
    assert asking.post("/v2/models/shelf/infer", content=body, headers=headers).json()["outputs"][0]["data"] == right


def test_a_text_that_is_none_is_named():
    asking = TestClient(asking_app(MOOD, [{"name": "text", "type": "string", "form": "series"}]), headers={"Authorization": f"Bearer {TOKEN}"})
    for value, status, words in ((5, 422, "row 1, column 'text': expected a string, got an integer"), (None, 422, "the model cannot predict these rows"), ([], 422, "row 1")):
        got = asking.post("/predict", json=[{"text": "late"}, {"text": value}])
        assert (got.status_code, words in got.json()["error"]) == (status, True), got.text
    assert "column 'text'" in asking.post("/predict", json=[{"comment": "late"}]).json()["error"]
    assert asking.post("/predict?top=2", json=[{"text": "late"}]).json()["records"][0]["top"][0]["class"] == "bad"


def library_models():
    kinds = {"forest": HistGradientBoostingClassifier(categorical_features="from_dtype", min_samples_leaf=5)}
    with suppress(ImportError):
        from lightgbm import LGBMClassifier

        kinds["lightgbm"] = LGBMClassifier(n_estimators=15, min_child_samples=5, verbose=-1, n_jobs=1)
    with suppress(ImportError):
        from xgboost import XGBClassifier

        kinds["xgboost"] = XGBClassifier(n_estimators=15, enable_categorical=True, n_jobs=1)
    return kinds


@pytest.mark.parametrize("kind", ["forest", "lightgbm", "xgboost"])
def test_a_category_means_the_same_whatever_rows_come_with_it(kind):
    "Reference: the model itself, asked with the categories of its training."
    if kind not in (known := library_models()):
        pytest.skip(f"{kind} is not installed")
    rng = np.random.default_rng(5)
    frame = pd.DataFrame({"kind": pd.Categorical(rng.choice(["a", "b", "z", None], 200)), "size": pd.Categorical(rng.integers(1, 5, 200)), "n": rng.random(200)})
    target = ((frame["kind"] == "z") ^ (frame["size"].astype(int) > 2)).astype(int)
    model = known[kind].fit(frame, target)
    inputs = Inputs(columns_of([{"name": "kind", "type": "string", "form": "category", "categories": ["a", "b", "z"]}, {"name": "size", "type": "long", "form": "category", "categories": [1, 2, 3, 4]}, {"name": "n", "type": "double"}]))
    rows = [tuple(None if value != value else value for value in row) for row in frame.astype(object).itertuples(index=False, name=None)]
    right = model.predict_proba(frame)
    assert np.ptp(right[:, 0]) > 0.5
    for some in (slice(0, 1), slice(3, 4), slice(10, 13), slice(0, 200), slice(7, 8)):
        checked = inputs.rows(Table(None, [list(row) for row in rows[some]], {}))
        np.testing.assert_array_equal(model.predict_proba(inputs.frame(checked)), right[some])
    missing = next(i for i, row in enumerate(rows) if row[0] is None)
    np.testing.assert_array_equal(model.predict_proba(inputs.frame([rows[missing]])), right[[missing]])
    unknown = inputs.frame([("q", 1, 0.5), ("a", 1, 0.5)])
    assert unknown["kind"].cat.categories.tolist() == ["a", "b", "z", "q"], "it is the model that says what an unknown one means"


# ---------------------------------------------------------------- hints

def test_a_wish_for_probabilities_is_shown_the_way():
    for params in ({"method": "predict_proba"}, {"predict_proba": True}):
        with pytest.raises(Invalid, match="takes no param .* ask /predict.top=3"):
            taken({"k": 10}, params)


@pytest.mark.parametrize(("body", "words"), [
    (b'{"a": 1}', "send a list: .{…}."), (b'{"instances": [{"a": 1}]}', "that form goes to /invocations"), (b'{"inputs": ["late"]}', "'inputs': that form goes to /invocations"),
    (b'["late"]', "go to /invocations as instances"), (b'{"records": [{"a": 1}], "extra": 1}', "has the key 'extra'"), (b'{"records": {"a": 1}}', "one object a row")])
def test_another_form_is_shown_the_way(body, words):
    with pytest.raises(Malformed, match=words):
        plain_records(body)


@pytest.mark.parametrize("route, says", [("/", "</html>"), ("/openapi.json", '"text"'), ("/v2/models/shelf", '"BYTES"'), ("/version", "shelf@3")])
def test_a_text_model_can_be_looked_at(route, says):
    answer = text_model().get(route)
    assert answer.status_code == 200 and says in answer.text


def test_a_text_model_answers_each_text_and_says_why_it_cannot_explain():
    asking, texts = text_model(), ["late again", "well packed", "broken on arrival"]
    for body in bodies(pd.Series(texts)) + bodies(texts) + bodies(pd.DataFrame({"text": texts})):
        assert asking.post("/invocations", content=body, headers={"Content-Type": "application/json"}).json() == {"predictions": ["bad", "good", "bad"]}
    refused = asking.post("/predict?explain=true", json=[{"text": "late"}])
    assert refused.status_code == 422 and "reads texts and no columns" in refused.json()["error"]


def text_model():
    texts = ["late again", "well packed", "broken on arrival", "lovely colours"]
    model = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts * 5, ["bad", "good"] * 10)
    return TestClient(asking_app(model, [{"name": "text", "type": "string", "form": "series"}]), headers={"Authorization": f"Bearer {TOKEN}"})


@pytest.mark.parametrize(("value", "words"), [([1], "got a list"), ([], "got a list"), ({}, "got an object")])
def test_what_can_be_no_category_is_refused(value, words):
    asking = TestClient(asking_app(lambda rows: rows["c"], [{"name": "c", "type": "any", "form": "category", "categories": [True, "b"]}]), headers={"Authorization": f"Bearer {TOKEN}"})
    got = asking.post("/predict", json=[{"c": value}])
    assert got.status_code == 422 and f"column 'c': expected one of its categories, {words}" in got.json()["error"]
