"""The containers of SageMaker, Vertex AI and Azure ML: which port, route and body each cloud's contract asks for, and what is refused."""

import csv
import io
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.tree import DecisionTreeRegressor

from mlops_nb.core.errors import Conflict, Invalid, NotFound, Untrusted
from mlops_nb.core.files import digest_of, write_json
from mlops_nb.model.trust import model_bytes
from mlops_nb.serve.inputs import Inputs, columns_of
from mlops_nb.serve.platforms import azure_answer, parse_azure, parse_vertex, platform_from, spoken, vertex_answer
from mlops_nb.serve.protocol import Malformed, Unsupported
from mlops_nb.serve.sagemaker import CUSTOM, Catalogue, NoRoom, NotAcceptable, free_bytes, parse_sagemaker, sagemaker_answer, wanted

COLUMNS = columns_of([{"name": "pieces", "type": "long"}, {"name": "price", "type": "double"}, {"name": "country", "type": "string"}])
ROWS = [(2, 1.5, "France"), (3, 2.0, "Côte d'Ivoire")]
SAGEMAKER = {"SAGEMAKER_BIND_TO_PORT": "8080", "SAGEMAKER_SAFE_PORT_RANGE": "21000-22000"}
VERTEX = {"AIP_HTTP_PORT": "8080", "AIP_HEALTH_ROUTE": "/v1/endpoints/7/deployedModels/9", "AIP_PREDICT_ROUTE": "/v1/endpoints/7/deployedModels/9:predict", "AIP_MODE": "PREDICTION"}
AZURE = {"AZUREML_MODEL_DIR": "/var/azureml-app/azureml-models/shop/3"}


def rows(table):
    "What the model would get."
    return [tuple(row) for row in Inputs(COLUMNS).rows(table)]


# -- the environment ----------------------------------------------------------------------------------------------------------------
ENVIRONMENTS = [
    ({}, {"name": "plain", "port": 8080, "host": "0.0.0.0", "predict_route": "/invocations", "model_folder": "", "authenticates": False}),
    ({"MLOPS_PORT": "9000", "MLOPS_HOST": "127.0.0.1"}, {"name": "plain", "port": 9000, "host": "127.0.0.1"}),
    ({"PORT": "3000"}, {"port": 3000}),
    ({"PORT": "3000", "MLOPS_PORT": "9000"}, {"port": 9000}),
    (SAGEMAKER, {"name": "sagemaker", "port": 8080, "health_route": "/ping", "predict_route": "/invocations", "model_folder": "/opt/ml/model", "body_bytes": 6_291_456, "authenticates": True}),
    ({"SAGEMAKER_BIND_TO_PORT": "8081", "MLOPS_PORT": "9000"}, {"port": 8081}),
    ({**SAGEMAKER, "PORT": "3000"}, {"port": 8080}),
    ({"MLOPS_PLATFORM": "sagemaker"}, {"name": "sagemaker", "port": 8080, "authenticates": False}),
    ({**SAGEMAKER, "SAGEMAKER_MULTI_MODEL": "true"}, {"multi_model": True, "model_folder": "/opt/ml/models"}),
    ({**SAGEMAKER, "SAGEMAKER_MULTI_MODEL": "False"}, {"multi_model": False, "model_folder": "/opt/ml/model"}),
    (VERTEX, {"name": "vertex", "port": 8080, "health_route": VERTEX["AIP_HEALTH_ROUTE"], "predict_route": VERTEX["AIP_PREDICT_ROUTE"], "body_bytes": 1_572_864, "authenticates": True}),
    ({"AIP_HTTP_PORT": "8501", "AIP_ENDPOINT_ID": "12", "AIP_DEPLOYED_MODEL_ID": "34"},
     {"port": 8501, "health_route": "/v1/endpoints/12/deployedModels/34", "predict_route": "/v1/endpoints/12/deployedModels/34:predict"}),
    ({**VERTEX, "AIP_PREDICT_ROUTE": "/predict", "AIP_HEALTH_ROUTE": "/"}, {"predict_route": "/predict", "health_route": "/"}),
    ({**VERTEX, "AIP_STORAGE_URI": "gs://shop/models"}, {"model_folder": ""}),
    ({**VERTEX, "AIP_STORAGE_URI": "file:///mnt/a%20model"}, {"model_folder": "/mnt/a model"}),
    ({**VERTEX, "AIP_STORAGE_URI": "/mnt/model"}, {"model_folder": "/mnt/model"}),
    (AZURE, {"name": "azureml", "port": 8080, "predict_route": "/score", "health_route": "/health", "model_folder": AZURE["AZUREML_MODEL_DIR"], "authenticates": True}),
    ({**AZURE, "MLOPS_PORT": "5001"}, {"port": 5001}),
    # several at once: Vertex AI before SageMaker before Azure ML, unless somebody decides
    ({**AZURE, **SAGEMAKER, **VERTEX}, {"name": "vertex", "authenticates": True}),
    ({**AZURE, **SAGEMAKER}, {"name": "sagemaker"}),
    ({**AZURE, **SAGEMAKER, "MLOPS_PLATFORM": "azureml"}, {"name": "azureml", "authenticates": True}),
    ({**SAGEMAKER, "MLOPS_PLATFORM": "plain"}, {"name": "plain", "authenticates": False}),
    ({**SAGEMAKER, "MLOPS_PLATFORM": "vertex"}, {"name": "vertex", "authenticates": False}),
    # empty is not set
    ({"AIP_HTTP_PORT": "", "SAGEMAKER_BIND_TO_PORT": " ", "MLOPS_PORT": "", "MLOPS_PLATFORM": ""}, {"name": "plain", "port": 8080}),
    ({**VERTEX, "MLOPS_BODY_BYTES": "10000000"}, {"body_bytes": 10_000_000}),
]


@pytest.mark.parametrize("environ, expected", ENVIRONMENTS)
def test_each_cloud_is_known_by_its_variables(environ, expected):
    found = vars(platform_from(environ, ["serve"]))
    assert {key: found[key] for key in expected} == expected
    assert platform_from(environ) == platform_from(environ, ["serve"])
    assert found["stop_s"] < 30  # SageMaker kills 30 s after SIGTERM


ODD = [
    ({"SAGEMAKER_BIND_TO_PORT": "http"}, "SAGEMAKER_BIND_TO_PORT is 'http'"), ({"SAGEMAKER_BIND_TO_PORT": "0"}, "from 1 to 65,535"), ({"SAGEMAKER_BIND_TO_PORT": "-1"}, "-1"),
    ({"SAGEMAKER_BIND_TO_PORT": "65536"}, "65536"), ({"AIP_HTTP_PORT": "8080.0"}, "AIP_HTTP_PORT"), ({"AIP_HTTP_PORT": "８０８０"}, "AIP_HTTP_PORT"), ({"AIP_HTTP_PORT": "9" * 5000}, "AIP_HTTP_PORT"),
    ({"MLOPS_PORT": "1e3"}, "MLOPS_PORT"), ({"MLOPS_BODY_BYTES": "6MB"}, "MLOPS_BODY_BYTES"), ({"MLOPS_BODY_BYTES": "0"}, "MLOPS_BODY_BYTES"),
    ({**VERTEX, "AIP_PREDICT_ROUTE": "predict"}, "AIP_PREDICT_ROUTE is 'predict'"), ({**VERTEX, "AIP_HEALTH_ROUTE": "/a b"}, "AIP_HEALTH_ROUTE"), ({**VERTEX, "AIP_HEALTH_ROUTE": "/{anything}"}, "AIP_HEALTH_ROUTE"),
    ({**VERTEX, "AIP_PREDICT_ROUTE": "/x?y=1"}, "AIP_PREDICT_ROUTE"), ({**VERTEX, "AIP_PREDICT_ROUTE": "/x\n/y"}, "AIP_PREDICT_ROUTE"), ({**SAGEMAKER, "SAGEMAKER_MULTI_MODEL": "many"}, "SAGEMAKER_MULTI_MODEL"),
    ({"MLOPS_PLATFORM": "aws"}, "MLOPS_PLATFORM is 'aws'"), ({"MLOPS_PLATFORM": "SageMaker"}, "did you mean sagemaker"),
]


@pytest.mark.parametrize("environ, words", ODD)
def test_an_odd_value_is_refused_in_one_sentence(environ, words):
    with pytest.raises(Invalid, match=words) as caught:
        platform_from(environ)
    assert len(str(caught.value)) < 250 and str(caught.value)[-1] in ".?"


@pytest.mark.parametrize("argv, words", [(["train"], "does not train"), (["serve", "--fast"], "serve --fast"), (["bash"], "'bash'"), ([""], "expected `serve`")])
def test_only_serve_is_an_argument(argv, words):
    with pytest.raises(Invalid, match=words):
        platform_from({}, argv)


def test_routes_to_mount():
    def routes(environ):
        return {(one.method, one.path): one.does for one in spoken(platform_from(environ))}

    assert routes({}) == {}
    assert routes(SAGEMAKER) == {("GET", "/ping"): "health", ("POST", "/invocations"): "predict", ("GET", "/execution-parameters"): "facts"}
    assert routes(VERTEX) == {("GET", VERTEX["AIP_HEALTH_ROUTE"]): "health", ("POST", VERTEX["AIP_PREDICT_ROUTE"]): "predict"}
    assert routes(AZURE) == {("GET", "/health"): "health", ("POST", "/score"): "predict"}
    assert routes({**SAGEMAKER, "SAGEMAKER_MULTI_MODEL": "true"}) == {
        ("GET", "/ping"): "health", ("GET", "/models"): "list", ("POST", "/models"): "load", ("GET", "/models/{model}"): "model", ("DELETE", "/models/{model}"): "unload",
        ("POST", "/models/{model}/invoke"): "invoke"}
    for environ in (SAGEMAKER, VERTEX, AZURE):
        for one in spoken(platform_from(environ)):
            assert (one.does == "predict") == (one.parse is not None and one.answer is not None)
    batches = next(one.facts for one in spoken(platform_from(SAGEMAKER)) if one.does == "facts")
    assert set(batches) == {"MaxConcurrentTransforms", "BatchStrategy", "MaxPayloadInMB"} and batches["MaxPayloadInMB"] == 6


# -- Vertex AI and Azure ML ----------------------------------------------------------------------------------------------------------
RECORDS = [dict(zip(("pieces", "price", "country"), row)) for row in ROWS]
LISTS = [list(row) for row in ROWS]


@pytest.mark.parametrize("instances", [RECORDS, LISTS, [{**row, "pieces": float(row["pieces"])} for row in RECORDS], [dict(reversed(row.items())) for row in RECORDS]])
@pytest.mark.parametrize("parameters", [None, {}, {"k": 3}])
def test_vertex_instances(instances, parameters):
    body = {"instances": instances} | ({} if parameters is None else {"parameters": parameters})
    table = parse_vertex(json.dumps(body).encode())
    assert rows(table) == ROWS and dict(table.params) == (parameters or {})


AZURE_FORMS = [{"columns": ["pieces", "price", "country"], "data": LISTS}, {"columns": ["pieces", "price", "country"], "data": LISTS, "index": [5, 9]},
               {"columns": ["country", "price", "pieces"], "data": [row[::-1] for row in LISTS], "index": ["a", "b"]}, RECORDS, LISTS,
               {name: [row[k] for row in ROWS] for k, name in enumerate(("pieces", "price", "country"))}]


@pytest.mark.parametrize("given", AZURE_FORMS)
@pytest.mark.parametrize("params", [None, {"k": 3}])
def test_azure_input_data(given, params):
    table = parse_azure(json.dumps({"input_data": given} | ({"params": params} if params else {})).encode())
    assert rows(table) == ROWS and dict(table.params) == (params or {})


@pytest.mark.parametrize("given", AZURE_FORMS[:3])
def test_azure_splits_are_read_as_mlflow_reads_them(given):
    "Source: mlflow.pyfunc.scoring_server.infer_and_parse_data, which Azure's scoring script calls."
    from mlflow.pyfunc.scoring_server import infer_and_parse_data

    frame = infer_and_parse_data({"dataframe_split": given})
    assert list(frame[["pieces", "price", "country"]].itertuples(index=False, name=None)) == rows(parse_azure(json.dumps({"input_data": given}).encode()))


def test_answers_of_vertex_and_azure():
    answers = [1.5, None, {"item": "A"}, [1, 2]]
    assert json.loads(vertex_answer(answers)[0]) == {"predictions": answers} and vertex_answer(answers)[1] == {"content-type": "application/json"}
    assert json.loads(vertex_answer([True], deployed_model="9")[0]) == {"predictions": [True], "deployedModelId": "9"}
    assert json.loads(azure_answer(answers)[0]) == answers
    assert json.loads(azure_answer([float("nan"), float("inf")])[0]) == [None, None]  # JSON has no such numbers


BROKEN = [b"", b"{", b"[]", b"null", b'"text"', b"\xff", b'{"a": 1}', b"[" * 100_000]
WRONG = {
    parse_vertex: [b'{"instances": {}}', b'{"instances": []}', b'{"instances": "x"}', b'{"instances": [1, {"a": 1}]}', b'{"instances": [[1], [1, 2]]}', b'{"instances": [{"a": 1}], "params": {}}',
                   b'{"instances": [{"a": 1}], "parameters": [1]}', b'{"instances": [{"a": 1}], "parameters": "k"}'],
    parse_azure: [b'{"input_data": null}', b'{"input_data": 3}', b'{"input_data": []}', b'{"input_data": {}}', b'{"input_data": {"columns": ["a"], "data": [[1, 2]]}}', b'{"input_data": {"columns": ["a", "a"], "data": [[1, 2]]}}',
                  b'{"input_data": {"columns": "a", "data": [[1]]}}', b'{"input_data": {"columns": ["a"], "data": []}}', b'{"input_data": {"a": [1], "b": [1, 2]}}', b'{"input_data": [[1]], "params": [1]}',
                  b'{"input_data": [[1]], "dataframe_split": {}}'],
}


@pytest.mark.parametrize("parse, body", [(parse, body) for parse in WRONG for body in BROKEN + WRONG[parse]])
def test_a_body_in_another_form_is_malformed(parse, body):
    with pytest.raises(Malformed) as caught:
        parse(body)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


# -- SageMaker's content types ---------------------------------------------------------------------------------------------------------
def as_csv(values, header=None, end="\n"):
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows([*([header] if header else []), *values])
    return text.getvalue().encode()


NAMES = ["pieces", "price", "country"]
CSVS = [
    ("text/csv", as_csv(ROWS)), ("text/csv", as_csv(ROWS, end="\r\n")), ("text/csv", as_csv(ROWS).rstrip()), ("text/csv;header=absent", as_csv(ROWS)), ("TEXT/CSV; Header=Absent; charset=UTF-8", as_csv(ROWS)),
    ('text/csv; header="absent"', as_csv(ROWS)), ("text/csv; label_size=0", as_csv(ROWS)), ("text/csv", b"\xef\xbb\xbf" + as_csv(ROWS)), ("text/csv", as_csv(ROWS, NAMES)), ("text/csv; header=present", as_csv(ROWS, NAMES)),
    ("text/csv", as_csv([row[::-1] for row in ROWS], NAMES[::-1])), ("text/csv", as_csv([(*row, "x") for row in ROWS], [*NAMES, "note"])), ("text/csv", b"\xef\xbb\xbf" + as_csv(ROWS, NAMES)),
]


@pytest.mark.parametrize("kind, body", CSVS)
def test_csv_with_and_without_names(kind, body):
    assert rows(parse_sagemaker(body, {"content-type": kind}, COLUMNS)) == ROWS


def test_csv_as_the_sdk_sends_an_array():
    "sagemaker.serializers.CSVSerializer writes an array with csv.writer, one row a line, without names."
    table = parse_sagemaker(as_csv(np.array([[1.0, 2.5], [3.0, 4.0]]).tolist()), {"content-type": "text/csv"}, columns_of({"a": "double", "b": "double"}))
    assert [tuple(row) for row in table.rows] == [(1.0, 2.5), (3.0, 4.0)] and table.names == ("a", "b")
    nameless = parse_sagemaker(b"1,x\n2,\n", {"content-type": "text/csv; header=absent"})
    assert nameless.names is None and nameless.rows == [[1, "x"], [2, None]]


def test_csv_with_one_column_of_text_that_looks_like_its_name():
    columns = columns_of({"country": "string"})
    assert parse_sagemaker(b"country\nFrance\n", {"content-type": "text/csv"}, columns).rows == [["France"]]
    assert parse_sagemaker(b"country\nFrance\n", {"content-type": "text/csv;header=absent"}, columns).rows == [["country"], ["France"]]


LINED = [
    "\n".join(json.dumps(row) for row in RECORDS), "\n".join(json.dumps(row) for row in LISTS) + "\n", "\r\n".join(json.dumps(row) for row in RECORDS), "\n\n".join(json.dumps(row) for row in RECORDS) + "\n\n",
    "\n".join(json.dumps({"features": row}) for row in LISTS)]


@pytest.mark.parametrize("kind", ["application/jsonlines", "application/x-jsonlines", "application/x-ndjson", "application/jsonl; charset=utf-8"])
@pytest.mark.parametrize("body", LINED)
def test_json_lines(kind, body):
    assert rows(parse_sagemaker(body.encode(), {"content-type": kind}, COLUMNS)) == ROWS


@pytest.mark.parametrize("body", [{"instances": RECORDS}, {"dataframe_split": {"columns": NAMES, "data": LISTS}}, {"inputs": {name: [row[k] for row in ROWS] for k, name in enumerate(NAMES)}}, RECORDS, LISTS,
                                  {"dataframe_records": RECORDS, "params": {"k": 3}}])
def test_json_is_mlflow_or_a_bare_list(body):
    table = parse_sagemaker(b" \n" + json.dumps(body).encode(), {"content-type": "application/json"}, COLUMNS)
    assert rows(table) == ROWS and dict(table.params) == (body.get("params", {}) if isinstance(body, dict) else {})


REFUSED = [
    (b"1,2\n", {}, Unsupported, "content type is ''"), (b"1", {"content-type": "application/x-npy"}, Unsupported, "x-npy"), (b"1", {"content-type": "text/csv; charset=latin-1"}, Unsupported, "latin-1"),
    (b"", {"content-type": "text/csv"}, Malformed, "lines"), (b"\n\n", {"content-type": "text/csv"}, Malformed, "lines"), (b"1,2\n", {"content-type": "text/csv"}, Malformed, "row 0 of the CSV has 2 values; expected 3"),
    (b"1,2,x\n1,2\n", {"content-type": "text/csv"}, Malformed, "row 1"), (b"\xff,2,x\n", {"content-type": "text/csv"}, Malformed, "UTF-8"), (b'1,2,"x\n', {"content-type": "text/csv"}, Malformed, "CSV"),
    (b"1", {"content-type": "text/csv; header=maybe"}, Malformed, "header=maybe"), (b"", {"content-type": "application/jsonlines"}, Malformed, "not a list of rows"),
    (b'{"a": 1}\n{"a"', {"content-type": "application/jsonlines"}, Malformed, "line 2"), (b'{"a": 1}\n[1]', {"content-type": "application/jsonlines"}, Malformed, "mixes"),
    (b"{}", {"content-type": "application/json"}, Malformed, "exactly one"), (b"[", {"content-type": "application/json"}, Malformed, "not JSON"), (b"[]", {"content-type": "application/json"}, Malformed, "at least one"),
    (b"1,2,x", {"content-type": "text/csv", "accept": "image/png"}, NotAcceptable, "image/png"), (b"1,2,x", {"content-type": "text/csv", "accept": "text/csv;q=0"}, NotAcceptable, "text/csv"),
    (b"1,2,x", {"content-type": "text/csv", "accept": "text/csv;q=high"}, Malformed, "q=high"),
]


@pytest.mark.parametrize("body, headers, kind, words", REFUSED)
def test_what_is_refused(body, headers, kind, words):
    with pytest.raises(kind, match=words) as caught:
        parse_sagemaker(body, headers, COLUMNS)
    assert type(caught.value) is kind


ACCEPTS = [("", "json"), ("*/*", "json"), ("application/json", "json"), ("application/*", "json"), ("text/csv", "csv"), ("text/*", "csv"), ("TEXT/CSV; charset=utf-8", "csv"), ("application/jsonlines", "lines"),
           ("application/x-jsonlines", "lines"), ("text/csv, application/json", "csv"), ("text/csv;q=0.5, application/json", "json"), ("image/png, text/csv;q=0.2, */*;q=0.1", "csv"), ("application/x-npy, */*;q=0.1", "json"),
           ("text/csv;q=0, */*", "json"), (" , text/csv", "csv")]
TYPES = {"json": "application/json", "csv": "text/csv", "lines": "application/jsonlines"}


@pytest.mark.parametrize("accept, expected", ACCEPTS)
def test_what_the_client_accepts(accept, expected):
    assert wanted(accept) == TYPES[expected]
    body, headers = sagemaker_answer([1.5, 2.0], {"accept": accept})
    assert headers == {"content-type": TYPES[expected]}
    assert body == {"json": b'{"predictions":[1.5,2.0]}', "csv": b"1.5\n2.0\n", "lines": b'{"prediction":1.5}\n{"prediction":2.0}\n'}[expected]


def test_csv_answers_are_read_back_by_pandas():
    answers = [["a, b", 1.5, None, True], ['say "x"', -1e-300, float("nan"), False], ["two\nlines", 3, 4, True]]
    body, _ = sagemaker_answer(answers, {"accept": "text/csv"})
    frame = pd.read_csv(io.BytesIO(body), header=None)
    assert frame[0].tolist() == ["a, b", 'say "x"', "two\nlines"] and frame[1].tolist() == [1.5, -1e-300, 3.0] and frame[2].isna().tolist() == [True, True, False] and frame[3].tolist() == [True, False, True]
    records, _ = sagemaker_answer([{"item": "A", "score": 0.5}], {"accept": "text/csv"})
    assert records == b"A,0.5\n"
    nested, _ = sagemaker_answer([{"items": ["A", "B"]}], {"accept": "text/csv"})
    assert next(csv.reader(io.StringIO(nested.decode()))) == ['["A","B"]']


@pytest.mark.parametrize("given", ["", "trace=7a3", "x" * 1024, "~ !"])
def test_custom_attributes_come_back(given):
    assert sagemaker_answer([1], {CUSTOM: given})[1][CUSTOM] == given


@pytest.mark.parametrize("given", ["x" * 1025, "a\r\nset-cookie: b", "é", "\x00", "\x7f", "tab\t"])
def test_custom_attributes_that_sagemaker_would_not_pass_on(given):
    with pytest.raises(Malformed, match="1,024 of ASCII"):
        sagemaker_answer([1], {CUSTOM: given})


# -- many models behind one endpoint -----------------------------------------------------------------------------------------------------
def put(folder, estimator=None, version=1):
    content, types = model_bytes(estimator or LinearRegression().fit([[0.0], [1.0]], [0.0, 2.0]))
    folder.mkdir(parents=True)
    (folder / "model.skops").write_bytes(content)
    write_json(folder / "model.json", {"format": 1, "name": "double", "version": version, "digest": digest_of(content), "kind": "", "inputs": [], "example": {}, "trusted": types, "validation": "", "versions": {}})
    return folder


@pytest.fixture
def place(tmp_path):
    root = tmp_path / "opt" / "ml" / "models"
    put(root / "4f1a" / "model")
    put(root / "9c2e" / "model", version=2)
    return root


def order(name, url):
    return json.dumps({"model_name": name, "url": str(url)}).encode()


def test_load_list_get_unload(place):
    empty = Catalogue(root=place)
    one, bundled = empty.load(order("4f1a", place / "4f1a" / "model"))
    two, _ = one.load(order("9c2e", place / "9c2e" / "model"))
    assert bundled.address == "double@1" and empty.folders == {} and list(one.folders) == ["4f1a"]  # a change gives a new catalogue
    assert two.listed() == {"models": [{"modelName": name, "modelUrl": str(place / name / "model")} for name in ("4f1a", "9c2e")]}
    assert two.of("9c2e") == {"modelName": "9c2e", "modelUrl": str(place / "9c2e" / "model")}
    assert list(two.unload("4f1a").folders) == ["9c2e"] and empty.listed() == {"models": []}
    with pytest.raises(Conflict, match="loaded already"):  # 409
        two.load(order("4f1a", place / "4f1a" / "model"))
    for call in (two.unload, two.of):
        with pytest.raises(NotFound, match="no model 'other'"):  # 404
            call("other")
    again, _ = two.unload("4f1a").load(order("4f1a", place / "4f1a" / "model"))
    assert again.folders == two.folders


def test_the_list_comes_in_pages():
    catalogue = Catalogue({f"m{i:03}": "/x" for i in range(250)})
    seen, token, pages = [], "", 0
    while pages == 0 or token:
        page = catalogue.listed(token)
        seen, token, pages = seen + [one["modelName"] for one in page["models"]], page.get("nextPageToken", ""), pages + 1
    assert seen == sorted(catalogue.folders) and pages == 3
    assert "nextPageToken" not in Catalogue({f"m{i:03}": "/x" for i in range(100)}).listed()


def test_no_room_is_said_before_anything_is_loaded(place):
    with pytest.raises(NoRoom, match="unload another model"):  # 507: SageMaker unloads one and asks again
        Catalogue(root=place, room=lambda: 1 << 20).load(order("4f1a", place / "4f1a" / "model"))
    with pytest.raises(NoRoom):
        size = (place / "4f1a" / "model" / "model.skops").stat().st_size
        Catalogue(root=place, room=lambda: (32 << 20) + 3 * size - 1).load(order("4f1a", place / "4f1a" / "model"))
    assert 0 <= free_bytes() <= 1 << 62


def link(place, kind):
    outside = put(place.parent / "elsewhere")
    folder = place / "bad"
    if kind == "a link out":
        folder.symlink_to(outside)
    elif kind == "a link inside out":
        folder.mkdir()
        (folder / "model").symlink_to(outside)
    elif kind == "a model file out":
        shutil.copytree(place / "4f1a" / "model", folder)
        (folder / "model.skops").unlink()
        (folder / "model.skops").symlink_to(outside / "model.skops")
    elif kind == "a page out":
        shutil.copytree(place / "4f1a" / "model", folder)
        (folder / "model.json").unlink()
        (folder / "model.json").symlink_to(outside / "model.json")
    elif kind == "dots":
        return place / ".." / "elsewhere"
    elif kind == "absolute":
        return outside
    elif kind == "a neighbour":  # the root's name is a prefix of its own
        return put(place.parent / "models-of-others")
    return folder


@pytest.mark.parametrize("kind", ["a link out", "a link inside out", "a model file out", "a page out", "dots", "absolute", "a neighbour"])
def test_no_folder_leads_out_of_the_root(place, kind):
    with pytest.raises(Untrusted, match="leads out of 'models'"):
        Catalogue(root=place).load(order("bad", link(place, kind)))


def test_links_inside_the_root_are_fine(place):
    "Kubernetes lays volumes down as links to a folder beside them."
    (place / "linked").symlink_to(place / "4f1a" / "model")
    assert Catalogue(root=place).load(order("linked", place / "linked"))[1].address == "double@1"


def test_a_damaged_or_missing_model(place):
    with pytest.raises(NotFound, match="there is no model in"):
        Catalogue(root=place).load(order("gone", place / "gone" / "model"))
    file = place / "4f1a" / "model" / "model.skops"
    content = bytearray(file.read_bytes())
    content[77] ^= 1
    file.write_bytes(content)
    with pytest.raises(Untrusted, match="is not the file of double@1"):
        Catalogue(root=place).load(order("4f1a", place / "4f1a" / "model"))
    page = place / "9c2e" / "model" / "model.json"
    page.write_text(page.read_text()[:60])
    with pytest.raises(Invalid, match="is damaged"):
        Catalogue(root=place).load(order("9c2e", place / "9c2e" / "model"))


def test_what_a_bucket_brings_is_a_strangers(place):
    "A tree's arrays could be forged: somebody has to answer for the file."
    folder = put(place / "tree" / "model", DecisionTreeRegressor(max_depth=2).fit([[0.0], [1.0], [2.0]], [0.0, 2.0, 4.0]))
    with pytest.raises(Untrusted, match="MLOPS_TRUST="):
        Catalogue(root=place).load(order("tree", folder))
    digest = digest_of((folder / "model.skops").read_bytes())
    assert "tree" in Catalogue(root=place, trust=(digest[:16],)).load(order("tree", folder))[0].folders


ORDERS = [b"", b"{", b"[]", b"3", b"{}", b'{"model_name": "a"}', b'{"url": "/opt/ml/models/a"}', b'{"model_name": 3, "url": "/x"}', b'{"model_name": "", "url": "/x"}', b'{"model_name": "../a", "url": "/x"}',
          b'{"model_name": "a/b", "url": "/x"}', b'{"model_name": "a", "url": 3}', b'{"model_name": "a", "url": "s3://bucket/a"}', b'{"model_name": "a", "url": "model"}', b'{"model_name": "a", "url": "/x\\u0000"}',
          json.dumps({"model_name": "a" * 101, "url": "/x"}).encode()]


@pytest.mark.parametrize("body", ORDERS)
def test_a_malformed_order(place, body):
    with pytest.raises(Malformed):
        Catalogue(root=place).load(body)


def test_nothing_here_needs_the_web_framework():
    import subprocess
    import sys

    code = "import sys, mlops_nb.serve.platforms; print([m for m in ('starlette', 'granian', 'mlflow', 'pandas', 'sklearn', 'pydantic') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env={**os.environ})
    assert out.stdout.strip() == "[]", out.stderr
