"""The OpenAPI document is true: what it allows the server takes, what it forbids the server refuses. Judges: jsonschema, the OpenAPI schema itself, schemathesis."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import jsonschema
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import TOKEN, running
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mlops_nb.core.errors import Invalid
from mlops_nb.serve.app import CHANGES, ROUTES, plain_records
from mlops_nb.serve.inputs import Inputs, columns_of, taken, takes_of
from mlops_nb.serve.openapi import KIND_SCHEMA, column_schema, openapi, prediction_schema

KINDS = {"pieces": "long", "price": "double", "country": "string", "gift": "boolean", "day": "datetime", "extra": "binary"}
INPUTS = [{"name": name, "type": kind, "required": required} for required in (True, False) for name, kind in
          ((name if required else f"maybe {name}", kind) for name, kind in KINDS.items())]
ROW = {"pieces": 2, "price": 1.5, "country": "France", "gift": True, "day": "2011-12-09T12:50:00", "extra": None}


class Sums:
    "A model that takes params of each kind and answers with a number."

    def predict(self, rows, *, k: int = 10, rate: float = 0.5, deep: bool = False, words: str = "x", free=None):
        return [[float(one)] * min(max(k, 1), 50) for one in rows["pieces"]]


def served(estimator=None, inputs=INPUTS, name="orders", example=None) -> SimpleNamespace:
    return SimpleNamespace(name=name, version="3", columns=columns_of(inputs), estimator=estimator or Sums(), example=example or {"columns": list(ROW), "data": [list(ROW.values())]})


DOCUMENT = openapi([served()], version="1.0", rows=5)


def judge(part: str, document=DOCUMENT) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({**document, "$ref": f"#/components/schemas/{part}"})


JUDGE, CHECK, TAKES = judge("orders.Request"), Inputs(columns_of(INPUTS)), takes_of(Sums().predict)


def sent(body: object) -> bytes:
    return json.dumps(body).encode()


def taken_by_the_server(body: object) -> bool:
    "What the server does with a body before the model sees it."
    try:
        table = plain_records(sent(body))
        rows = CHECK.rows(table)
        taken(TAKES, table.params)
        return len(CHECK.frame(rows)) <= 5
    except Invalid:
        return False


TIMES = ["2011-12-09", "2011-12-09T12:50:00", "2011-12-09 12:50", "2012-02-29T00:00:00Z", "2011-12-09T12:50:00.123456+05:30", "2011-02-29", "2011-13-01", "2011-12-09T24:61:00",
         "0000-01-01", "1900-02-29", "2000-02-29", "2011-04-31", "tomorrow", "", "2011-12-09T12:50:00+25:00", "9999-12-31T23:59:59", "0001-01-01"]
NUMBERS = [0, -1, 2**53, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 0.5, 2.0, -0.0, 1e300, 1e-300, 0.1, 2**64 - 1, 2**64, 10**30]
VALUES = st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TIMES), st.text(max_size=4), st.integers(-(2**63), 2**63 - 1),
                   st.floats(-1e9, 1e9), st.just([]), st.just([1, None]), st.just({}), st.just({"a": 1}))
GOOD = {"integer": st.integers(-(2**63), 2**63 - 1), "number": st.none() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False), "string": st.none() | st.text(max_size=5),
        "boolean": st.booleans(), "datetime": st.none() | st.datetimes().map(lambda one: one.isoformat()) | st.dates().map(str), "any": VALUES}


@st.composite
def rows(draw) -> dict:
    "A row that fits, and often one thing about it that may not."
    row = {column.name: draw(GOOD[column.kind]) for column in CHECK.columns if column.required or draw(st.booleans())}
    if draw(st.booleans()):
        column = draw(st.sampled_from([*CHECK.names, "another"]))
        if draw(st.integers(0, 3)):
            row[column] = draw(VALUES)
        else:
            row.pop(column, None)
    return row


PARAMS = st.dictionaries(st.sampled_from([*TAKES, "other"]), st.none() | st.booleans() | st.integers(-5, 20) | st.sampled_from([0.5, -2.25]) | st.text(max_size=3) | st.just([]), max_size=2)
BODIES = st.one_of(st.lists(rows(), max_size=6), st.fixed_dictionaries({"records": st.lists(rows(), min_size=1, max_size=2)}, optional={"params": st.none() | PARAMS}),
                   st.sampled_from([None, {}, [], [[]], [1], "x", 5, {"records": {}}, {"records": [[1]]}, {"rows": []}, [{}], {"records": [ROW], "more": 1}, {"records": [ROW], "params": [1]}, {"records": [ROW], "params": "k"}]))


@settings(max_examples=600, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=BODIES)
def test_schema_and_server_take_and_refuse_the_same_bodies(body):
    text = sent(body)
    assert JUDGE.is_valid(json.loads(text)) == taken_by_the_server(body), text.decode()


def test_the_generated_bodies_are_of_both_kinds():
    "A test that compares refusals with refusals would prove nothing."
    found = []

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(body=BODIES)
    def look(body):
        found.append(JUDGE.is_valid(json.loads(sent(body))))

    look()
    assert 0.2 < sum(found) / len(found) < 0.8


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_column_alone(name, required):
    column = next(one for one in CHECK.columns if one.name == (name if required else f"maybe {name}"))
    alone = Inputs([column])
    one = jsonschema.Draft202012Validator(column_schema(column))
    for value in [None, True, False, *NUMBERS, *TIMES, "text", [], {}, [1]]:
        try:
            alone.frame(alone.rows(plain_records(sent([{column.name: value}]))))
            fits = True
        except Invalid:
            fits = False
        assert one.is_valid(value) == fits, (value, column.kind)


def test_whole_numbers_in_any_spelling():
    for text in ("5.0", "5", "1e3", "-0.0"):
        body = f'[{json.dumps({**ROW, "pieces": 0})}]'.replace('"pieces": 0', f'"pieces": {text}')
        assert JUDGE.is_valid(json.loads(body)) and CHECK.rows(plain_records(body.encode()))


def test_the_document_is_openapi_3_1():
    judges = pytest.importorskip("openapi_spec_validator")  # holds the OpenAPI initiative's own schema; comes with moto's server
    for models in ([], [served()], [served(), served(name="b.2-c")]):
        judges.validate(openapi(models, version="1.0"))


def test_every_reference_leads_somewhere_and_names_are_unique():
    text, ids = json.dumps(DOCUMENT), [one["operationId"] for methods in DOCUMENT["paths"].values() for one in methods.values()]
    for part in text.split('"$ref": "#/')[1:]:
        at = DOCUMENT
        for step in part.split('"')[0].split("/"):
            at = at[step]
    assert len(ids) == len(set(ids))


def test_every_route_is_described_and_every_description_has_its_route():
    described = {(method.upper(), path.replace("/models/orders/", "/models/{model}/")) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert described == {(method, path) for method, path, *_ in ROUTES}
    scopes = {(method, path): scope for method, path, _, scope in ROUTES}
    for path, methods in DOCUMENT["paths"].items():
        for method, one in methods.items():
            assert one["security"][0] == {"token": [scopes[method.upper(), path.replace("/models/orders/", "/models/{model}/")]]}, path


def test_an_admins_request_is_described_as_it_is_taken():
    bodies = {name: jsonschema.Draft202012Validator(DOCUMENT["paths"][f"/admin/{name}"]["post"]["requestBody"]["content"]["application/json"]["schema"]) for name in CHANGES}
    assert {name: set(one.schema["properties"]) for name, one in bodies.items()} == CHANGES
    split = {"traffic": {"champion": 90, "2": 10}}
    for more, fits in (({}, True), ({"shadow": "3"}, True), ({"shadow": "3", "shadow_percent": 0.5}, True), ({"shadow_percent": 5}, False), ({"shadow": "3", "shadow_percent": 0}, False),
                       ({"shadow": 3}, False), ({"selector": "3"}, False), ({"traffic": {}}, False), ({"traffic": {"champion": 101}}, False), ({"why": None}, False)):
        assert bodies["traffic"].is_valid(split | more) == fits, more


def test_examples_are_the_recorded_rows_and_fit():
    for one in ({}, {"columns": list(ROW), "data": [list(ROW.values()), list(ROW.values())]}):
        document = openapi([served(example=one)], version="1.0")
        body = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]
        judge("orders.Request", document).validate(body["example"])
        assert len(body["example"]["records"]) == (2 if one else 1)
        for name, column in document["components"]["schemas"]["orders.Row"]["properties"].items():
            for example in column.get("examples", []):
                jsonschema.Draft202012Validator(column).validate(example)


def test_a_model_that_recorded_nothing_takes_any_object():
    document = openapi([served(inputs=None, example={"columns": [], "data": []})], version="1.0")
    assert judge("orders.Request", document).is_valid([{"whatever": 1}]) and not judge("orders.Request", document).is_valid([1])
    assert set(KIND_SCHEMA) == {"integer", "number", "string", "boolean", "datetime"}


X, Y = np.random.default_rng(0).normal(size=(60, 2)), np.arange(60)
PREDICT = [(LogisticRegression().fit(X, Y % 3), {"enum": [0, 1, 2]}), (RandomForestClassifier(3).fit(X, Y % 2 == 0), {"enum": [False, True]}),
           (make_pipeline(StandardScaler(), LogisticRegression()).fit(X, np.where(Y % 2, "a", "b")), {"enum": ["a", "b"]}), (RandomForestRegressor(3).fit(X, Y), None), (Sums(), None),
           (LinearRegression().fit(X, np.stack([Y, Y], axis=1)), None), (make_pipeline(StandardScaler(), LinearRegression()).fit(X, Y), None)]


@pytest.mark.parametrize(("estimator", "schema"), PREDICT, ids=lambda one: "" if isinstance(one, dict | None) else type(one).__name__)
def test_answers_are_as_described(estimator, schema):
    found = prediction_schema(estimator)
    assert schema is None or found == schema
    rows = pd.DataFrame(X[:5], columns=["pieces", "b"]) if isinstance(estimator, Sums) else X[:5]
    for answer in np.asarray(estimator.predict(rows)).tolist():
        jsonschema.Draft202012Validator(found).validate(answer)
    assert not isinstance(estimator, LogisticRegression) or not jsonschema.Draft202012Validator(found).is_valid("x")


def test_without_models_there_is_a_document_still():
    empty = openapi([], version="1.0")
    assert "/predict" not in empty["paths"] and "/health" in empty["paths"]


@pytest.fixture(scope="module")
def url():
    frame = pd.DataFrame({"pieces": np.arange(1, 90), "price": np.linspace(1, 9, 89)})
    trees = HistGradientBoostingClassifier(max_iter=10, random_state=0).fit(frame, np.digitize(frame["pieces"] * frame["price"], [40, 200]))
    kinds = [{"name": "pieces", "type": "long"}, {"name": "price", "type": "double"}]
    with running({"orders": (trees, kinds, [{"pieces": 3, "price": 1.5}]), "sums": (Sums(), INPUTS, [ROW])}) as address:
        yield address


def test_the_server_gives_the_document_and_keeps_it(url):
    asking = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120)
    document = asking.get("/openapi.json").json()
    for query in ("", "?explain=true", "?top=2", "?top=100"):
        got = asking.post(f"/models/orders/predict{query}", json=[{"pieces": 3, "price": 1.5}, {"pieces": 80, "price": 9}])
        assert got.status_code == 200, got.text
        judge("orders.Answer", document).validate(got.json())
        assert {"": "prediction", "?explain=true": "explanation"}.get(query, "top") in got.json()["records"][0]
    for query in ("?top=101", "?explain=maybe", "?top=-1", "?top=²", "?top=" + "9" * 5000):
        got = asking.post(f"/models/orders/predict{query}", json=[{"pieces": 3, "price": 1.5}])
        assert got.status_code in (400, 422) and set(got.json()) == {"error", "request"}, query[:20]
    offered = {path: [one["name"] for one in methods["post"].get("parameters", ())] for path, methods in document["paths"].items() if path.endswith("/predict")}
    assert offered == {"/predict": ["explain", "top"], "/models/orders/predict": ["explain", "top"], "/models/sums/predict": ["top"]}
    assert asking.post("/models/sums/predict?explain=true", json=[ROW]).status_code == 422
    assert asking.post("/models/sums/predict?top=2", json={"records": [ROW], "params": {"k": 3}}).json()["records"] == [{"prediction": [2.0, 2.0]}]


def schemathesis(url: str, tmp_path: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "-H", f"Authorization: Bearer {TOKEN}", "--phases", "examples,coverage,fuzzing", "--seed", "7", "--no-color",
               "--max-examples", os.environ.get("SCHEMATHESIS_EXAMPLES", "25"), "--continue-on-failure", *options]
    (tmp_path / "schemathesis.toml").write_text('[checks]\nnegative_data_rejection.expected-statuses = ["400", "401", "403", "404", "405", "413", "415", "422"]\n'  # too many rows is 413, and so are more than a hundred to explain
                                             'positive_data_acceptance.expected-statuses = ["2xx", "413"]\n')
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200)


def test_schemathesis_finds_nothing_wrong_with_predict(url, tmp_path):
    "Everything it knows to ask: no 500, no answer beside the schema, nothing allowed refused, nothing forbidden taken."
    said = schemathesis(url, tmp_path, "--include-path-regex", "predict$")
    assert said.returncode == 0, said.stdout[-6000:]


def test_schemathesis_finds_no_500_and_no_schema_violation_anywhere(url, tmp_path):
    "Tables by place and tensors by name have rules that a schema cannot say, so what it allows may be refused there, with a described 4xx."
    said = schemathesis(url, tmp_path, "--exclude-path-regex", "predict$", "--exclude-checks", "positive_data_acceptance,negative_data_rejection")
    assert said.returncode == 0, said.stdout[-6000:]
