"""The Open Inference protocol: what Triton's and KServe's own encoders send is understood, what they decode is what the model said."""

import asyncio
import os
import random
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import orjson
import pandas as pd
import pytest

from mlops_nb.core.errors import Invalid, NotFound
from mlops_nb.core.files import digest_of
from mlops_nb.serve.inputs import Inputs, columns_of
from mlops_nb.serve.openinference import Infer, infer_answer, model_metadata, parse_infer, ready, repository_index, server_metadata, tensors_of
from mlops_nb.serve.protocol import Malformed, Table
from mlops_nb.serve.tensors import DATATYPES, Tensor, from_binary, packed

triton = pytest.importorskip("tritonclient.http", reason="the client of Triton is not installed: pip install 'tritonclient[http]'")

# one array for each datatype of the protocol, with the edges of its range
VALUES = {
    "BOOL": np.array([True, False, True]), "FP16": np.array([0.5, -65504, 6e-8], np.float16), "FP32": np.array([0.1, -3e38, 1e-45], np.float32),
    "FP64": np.array([0.1, -1.7e308, 5e-324]), "BYTES": np.array(["", "Zoë ☕", "a,b\"\n"], dtype=object),
    **{f"{sign}{bits}": np.array([np.iinfo(f"{sign.lower()}{bits}").min, 7, np.iinfo(f"{sign.lower()}{bits}").max], f"{sign.lower()}{bits}") for sign in ("INT", "UINT") for bits in (8, 16, 32, 64)}}


def sent(name, array, binary=True):
    kind = "BYTES" if array.dtype == object else triton.np_to_triton_dtype(array.dtype)
    one = triton.InferInput(name, list(array.shape), kind)
    one.set_data_from_numpy(array, binary_data=binary)
    return one


def asked(*inputs, **more):
    return triton.InferenceServerClient.generate_request_body(list(inputs), **more)


def said(answers, infer=None, model="shelf@3"):
    body, header_length = infer_answer(infer or Infer(Table(None, [], {})), SimpleNamespace(model=model, answers=answers, request="r1"))
    return triton.InferResult.from_response_body(body, header_length=header_length)


def test_every_datatype_of_the_protocol_is_tried():
    assert set(VALUES) | {"BF16"} == set(DATATYPES)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
@pytest.mark.parametrize("datatype", VALUES)
def test_tritons_encoder_is_understood(datatype, shape, binary):
    "numpy's own tolist is the reference"
    body, header_length = asked(sent("x", VALUES[datatype].reshape(shape), binary))
    table = parse_infer(body, header_length).table
    assert table.names == ("x",) and [row[0] for row in table.rows] == VALUES[datatype].tolist()


def test_half_floats_of_the_brain_kind():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes has the reference for BF16: pip install ml_dtypes")
    array = np.array([1.5, -2.25, 3e38, np.nan], ml_dtypes.bfloat16)
    assert from_binary("x", "BF16", [4], raw=array.tobytes()).values == [*array[:3].astype(np.float64).tolist(), None]


def test_a_matrix_is_taken_row_by_row_and_columns_may_be_mixed():
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    for binary in (True, False):
        table = parse_infer(*asked(sent("features", matrix, binary))).table
        assert table.names is None and table.rows == matrix.tolist()
    body = asked(sent("pieces", np.array([1, 2])), sent("country", np.array(["France", "Spain"], dtype=object), False), sent("price", np.array([[0.5], [1.5]], np.float32)), request_id="a")
    infer = parse_infer(*body)
    assert infer.id == "a" and infer.binary and Inputs(columns_of({"price": "double", "country": "string", "pieces": "long"})).rows(infer.table) == [(0.5, "France", 1), (1.5, "Spain", 2)]


def test_nested_lists_and_a_lone_column_of_any_name():
    def body(**more):
        return orjson.dumps({"inputs": [{"name": "x", "datatype": "INT32", **more}]})

    assert parse_infer(body(shape=[2, 2], data=[[1, 2], [3, 4]])).table.rows == [[1, 2], [3, 4]]
    lone = columns_of({"pieces": "long"})
    assert parse_infer(body(shape=[2, 1], data=[[1], [2]]), columns=lone).table == Table(None, [[1], [2]], {})
    assert parse_infer(orjson.dumps({"inputs": [{"name": "pieces", "datatype": "INT32", "shape": [2], "data": [1, 2]}]}), columns=lone).table.names == ("pieces",)


@pytest.mark.parametrize("binary", [True, False])
def test_not_a_number_is_missing(binary):
    "Triton's client writes the word NaN into its JSON"
    rows = parse_infer(*asked(sent("x", np.array([1.5, np.nan], np.float32), binary))).table.rows
    assert [row[0] for row in rows] == [1.5, None]
    matrix = parse_infer(*asked(sent("x", np.array([[1.5, np.nan], [np.nan, 2]], np.float16), binary))).table.rows
    assert matrix == [[1.5, None], [None, 2.0]]
    assert np.isnan(said([1.5, None]).as_numpy("prediction")[1]) and np.isnan(said([1.5, None], Infer(Table(None, [], {}), binary=True)).as_numpy("prediction")[1])


def test_the_word_nan_in_a_text_stays_there():
    for name in ("NaN", "a, NaN", 'a "NaN" \\', "\\", 'NaN\\"', "banana NaNa"):
        body = orjson.dumps({"id": name, "inputs": [{"name": name, "datatype": "FP64", "shape": [2], "data": [None, 2]}]})
        read = parse_infer(body.replace(b"null", b"NaN"))
        assert (read.id, read.table.names, read.table.rows) == (name, (name,), [(None,), (2,)])


def test_a_long_text_that_never_ends_is_read_once():
    "Each of its quotes looks like a beginning; a pattern that came back to each of them would take days"
    with pytest.raises(Malformed, match="not JSON"):
        parse_infer(b'NaN"' + b'\\"' * 2_000_000)


def test_what_is_not_for_triton_is_for_the_model():
    body = asked(sent("x", np.array([1.0])), request_id="7", sequence_id=5, sequence_start=True, priority=2, timeout=1000, parameters={"k": 5, "new_only": True})
    assert parse_infer(*body).table.params == {"k": 5, "new_only": True}


ANSWERS = [([1, 2], "INT64", [1, 2]), ([1, 2.5], "FP64", [1.0, 2.5]), (["a", "Zoë"], "BYTES", [b"a", "Zoë".encode()]), ([True, False], "BOOL", [True, False]), ([None, "a"], "BYTES", [b"", b"a"]),
           ([["a", "b"], ["c", None]], "BYTES", [[b"a", b"b"], [b"c", b""]]), ([["a", "b"], []], "BYTES", [[b"a", b"b"], [b"", b""]]), ([[1, 2], [3, 4]], "INT64", [[1, 2], [3, 4]]),
           ([[0.1], [0.2]], "FP64", [[0.1], [0.2]]), ([2**63, 1], "FP64", None), ([True, 1.5], "BYTES", [b"true", b"1.5"]), ([[[1, 2]], [[3, 4]]], "BYTES", [[b"[1,2]"], [b"[3,4]"]])]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("answers, datatype, expected", ANSWERS)
def test_tritons_decoder_reads_the_answers(answers, datatype, expected, binary):
    result = said(answers, Infer(Table(None, [], {}), binary=binary))
    output = result.get_output("prediction")
    got = result.as_numpy("prediction").tolist()
    if datatype == "BYTES" and not binary:  # in JSON they are strings
        got = np.array([text.encode() for text in np.array(got, dtype=object).ravel()], dtype=object).reshape(np.shape(got)).tolist()
    assert output["datatype"] == datatype and output["shape"] == list(np.shape(got)) and (expected is None or got == expected)


def test_records_become_one_output_a_key_and_only_those_asked_for_are_sent():
    answers = [{"label": "web", "score": 0.5, "top": ["a", "b"]}, {"label": "shop", "score": 1, "top": ["c"]}]
    assert [(one.name, one.datatype, one.shape) for one in tensors_of(answers)] == [("label", "BYTES", (2,)), ("score", "FP64", (2,)), ("top", "BYTES", (2, 2))]
    ranked = [[{"item": "a", "score": 0.5}, {"item": "b", "score": 0.25}], [{"item": "c", "score": 1.0}]]
    assert [(one.name, one.shape) for one in tensors_of(ranked)] == [("item", (2, 2)), ("score", (2, 2))]
    infer = parse_infer(*asked(sent("x", np.array([1.0, 2.0])), request_id="mine", outputs=[triton.InferRequestedOutput("score"), triton.InferRequestedOutput("label", binary_data=False)]))
    result = said(answers, infer)
    response = result.get_response()
    assert (response["model_name"], response["model_version"], response["id"], [one["name"] for one in response["outputs"]]) == ("shelf", "3", "mine", ["score", "label"])
    assert result.as_numpy("score").tolist() == [0.5, 1.0] and result.as_numpy("label").tolist() == ["web", "shop"] and result.as_numpy("top") is None
    with pytest.raises(Invalid, match="no output 'scores'; did you mean score"):
        said(answers, Infer(infer.table, outputs={"scores": True}))


def test_bytes_are_packed_as_triton_packs_them():
    from tritonclient.utils import serialize_byte_tensor

    for values in (["", "Zoë ☕", "x" * 300], ["1"]):
        assert packed(Tensor("x", "BYTES", (len(values),), values)) == serialize_byte_tensor(np.array(values, dtype=object)).item()


def one(**more):
    return orjson.dumps({"inputs": [{"name": "x", "datatype": "INT64", "shape": [2], "data": [1, 2], **more}]})


def raw(size, behind, **more):
    header = orjson.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": size}, **more}]})
    return header + behind, len(header)


GOOD = orjson.dumps({"name": "y", "datatype": "INT64", "shape": [1], "data": [1]})
MALFORMED = [
    (b"", None, "not JSON"), (b"", "0", "Inference-Header-Content-Length"), (b"{}", 0, "Inference-Header-Content-Length"), (b"{}", 3, "Inference-Header-Content-Length"), (b"{}", "two", "Inference-Header-Content-Length"),
    (b"{}", "²", "Inference-Header-Content-Length"), (b"{}", "-1", "Inference-Header-Content-Length"), (b"{}", "9" * 5000, "Inference-Header-Content-Length"),
    (b"{", None, "not JSON"), (b"NaN", None, "not an object"), (b"[" * 5000 + b"NaN", None, "not JSON"),
    (b'{"id": "NaN', None, "not JSON"), (b'{"id": NaNs}', None, "not JSON"), (b'{"inputs": [NaN, Infinity]}', None, "not JSON"), (b'{"inputs": NaN, "id": "\\ud800"}', None, "surrogate"), (b'{"id": NaN}', None, "not an object of"),
    (b"[]", None, "not an object"), (b"{}", None, "no inputs"), (b'{"inputs": []}', None, "no inputs"),
    (b'{"inputs": {}}', None, "no inputs"), (b'{"inputs": 5}', None, "list"), (b'{"inputs": [5]}', None, "without a name"), (b'{"inputs": [{}]}', None, "without a name"), (b'{"id": 5}', None, "not an object of"),
    (b'{"parameters": []}', None, "no inputs"), (b'{"parameters": [1]}', None, "not an object of"), (one(parameters=[1]), None, "parameters"), (one(name=""), None, "at least one character"),
    (one(name=5), None, "without a name"), (one(datatype="INT128"), None, "datatype 'INT128'"), (one(datatype=None), None, "datatype"), (one(datatype=[]), None, "datatype"), (one(shape=2), None, "shape"),
    (one(shape=[]), None, "shape"), (one(shape=[0]), None, "shape"), (one(shape=[-1]), None, "shape"), (one(shape=[2.0]), None, "shape"), (one(shape=[True]), None, "shape"), (one(shape=[1, 1, 2]), None, "shape"),
    (one(shape=[10**12, 10**12], data=[]), None, "0 entries"), (one(shape=[3]), None, "2 entries"), (one(data=5), None, "an integer as its data"), (one(data=None), None, "null as its data"),
    (one(data=[[1], [2]]), None, "entries"), (one(shape=[2, 2], data=[[1, 2], [3]]), None, "entries"), (one(shape=[2, 1], data=[[1], 2]), None, "entries"), (one(data=[1, "2"]), None, "value 1: expected an integer"),
    (one(data=[1, 2.0]), None, "value 1"), (one(data=[1, True]), None, "value 1"), (one(data=[None, 1]), None, "value 0"), (one(data=[1, {}]), None, "an object"),
    (one(datatype="UINT8", data=[1, 256]), None, "from 0 to 255, as UINT8 is, got an integer 256"), (one(datatype="INT8", data=[-129, 1]), None, "from -128 to 127"), (one(datatype="UINT64", data=[-1, 1]), None, "from 0"),
    (one(datatype="BOOL"), None, "true or false"), (one(datatype="FP32", data=["1", 2]), None, "a number"), (one(datatype="BYTES"), None, "a string"),
    (b'{"inputs": [' + GOOD + b"," + GOOD + b"]}", None, "two inputs"), (b'{"inputs": [' + GOOD + b"," + one()[11:-2] + b"]}", None, "2 rows and 'y' 1"),
    (b'{"inputs": [' + GOOD + b"," + one(shape=[1, 2])[11:-2] + b"]}", None, "beside others"), (one(parameters={"shared_memory_region": "a"}), None, "shared_memory_region"),
    (b'{"inputs": [' + GOOD + b'], "outputs": [{"name": "a", "parameters": {"classification": 3}}]}', None, "classification"), (b'{"inputs": [' + GOOD + b'], "outputs": [{}]}', None, "outputs"),
    (*raw(8, b"1234567"), "within the 7 bytes"), (*raw(7, b"1234567"), "expected 8"), (*raw(8, b"123456789"), "1 bytes more"), (*raw(-8, b"12345678"), "binary_data_size"), (*raw(8.0, b"12345678"), "binary_data_size"),
    (*raw(True, b"1"), "binary_data_size"), (*raw("8", b"12345678"), "binary_data_size"), (*raw(8, b"12345678", data=[1, 2]), "either data or"), (*raw(2, b"\x00\x02", datatype="BOOL"), "neither 0 nor 1"),
    (*raw(4, b"\x00\x00\x00\x00", datatype="BYTES"), "inside value 1 of 2"), (*raw(3, b"\x00\x00\x00", datatype="BYTES"), "inside value 0"), (*raw(8, b"\xff\xff\xff\xff1234", datatype="BYTES"), "inside value 0"),
    (*raw(9, b"\x00\x00\x00\x00\x00\x00\x00\x001", datatype="BYTES"), "1 bytes after"), (*raw(9, b"\x01\x00\x00\x00\xff\x00\x00\x00\x00", datatype="BYTES"), "UTF-8"),
    (*raw(0, b"", shape=[10**12], datatype="BYTES"), "inside value 0"), (*raw(0, b"", shape=[10**12]), "expected 4,000,000,000,000"), (*raw(0, b"", shape=[10**12, 0]), "shape")]


@pytest.mark.parametrize("body, header_length, words", MALFORMED)
def test_a_bad_request_gets_a_sentence(body, header_length, words):
    with pytest.raises(Malformed) as refused:
        parse_infer(body, header_length)
    text = str(refused.value)
    assert words in text and len(text) < 400 and "\n" not in text


@pytest.mark.parametrize("seed", range(5))
def test_flipped_cut_and_swapped_bytes_never_surprise(seed):
    "300 damaged requests a seed: a table, or Malformed"
    rng = random.Random(seed)
    body, header_length = asked(sent("pieces", np.array([1, 2, 3])), sent("country", VALUES["BYTES"]), sent("price", np.array([0.5, 1, 2], np.float32), False), parameters={"k": 5})
    for _ in range(300):
        damaged = bytearray(body)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(damaged))
            damaged[at:at + rng.choice((0, 1, 1, 5))] = rng.choice((b"", bytes([rng.randrange(256)]), b"9", b"null", b"-", b"[", b'"', b"NaN"))
        try:
            infer = parse_infer(bytes(damaged), header_length + rng.choice((0, 0, 0, 1, -1, len(damaged) - len(body))))
        except Malformed as error:
            assert len(str(error)) < 400
        else:
            assert isinstance(infer.table, Table) and len(infer.table) >= 1


def test_metadata():
    columns = columns_of([{"name": "a", "type": "long"}, {"name": "b", "type": "double"}, {"name": "c", "type": "string"}, {"name": "d", "type": "boolean"}, {"name": "e", "type": "datetime"},
                          {"name": "f", "type": "float"}, {"name": "g", "type": "integer"}, {"name": "h", "type": "uint8"}, {"name": "i", "type": "binary"}])
    about = model_metadata(SimpleNamespace(name="shelf", version="3", columns=columns, answers=[{"label": "web", "top": ["a", "b"]}]))
    assert [one["datatype"] for one in about["inputs"]] == ["INT64", "FP64", "BYTES", "BOOL", "BYTES", "FP32", "INT32", "UINT8", "BYTES"]
    assert about["outputs"] == [{"name": "label", "datatype": "BYTES", "shape": [-1]}, {"name": "top", "datatype": "BYTES", "shape": [-1, 2]}] and about["versions"] == ["3"]
    unknown = model_metadata(SimpleNamespace(name="shelf", version="", columns=()))
    assert unknown["inputs"] == [{"name": "inputs", "datatype": "FP64", "shape": [-1, -1]}] and unknown["outputs"] == []
    endpoint = SimpleNamespace(models=["shelf", "till"], stuck=False, served=lambda name: SimpleNamespace(name=name, version="1"))
    assert ready(endpoint) == {"ready": True} and [one["name"] for one in repository_index(endpoint)] == ["shelf", "till"]
    assert ready(SimpleNamespace(models=[], stuck=False)) == ready(SimpleNamespace(models=["shelf"], stuck=True)) == {"ready": False}
    assert server_metadata()["extensions"] == ["binary_tensor_data", "explain", "top"]


TOKEN = {"Authorization": "Bearer a-token-for-tests"}  # Triton's client writes into the headers it is given, so it gets a copy
WAIT_S = 60


class Till:
    "A model whose answers can be worked out by hand."

    def predict(self, rows, round_to: int = 2):
        if (rows["country"] == "RuntimeError").any():
            raise RuntimeError("SECRET")
        return pd.DataFrame({"total": (rows["pieces"] * rows["price"]).round(round_to), "where": rows["country"]})


class Shelf:
    "A source with one model."

    def resolve(self, name, selector):
        from mlops_nb.serve.sources import Version

        if name != "shelf" or selector not in ("champion", "3"):
            raise NotFound("there is only shelf.")
        return Version("shelf", "3", columns=columns_of({"pieces": "long", "price": "double", "country": "string"}))

    def load(self, version):
        return Till()

    def stamp(self):
        return 0


def source(order):
    "For the order of a pool."
    return Shelf()


@pytest.fixture(scope="module")
def address():
    "The application with that model on a free port."
    from mlops_nb.serve.access import Tokens
    from mlops_nb.serve.app import Desk, app
    from mlops_nb.serve.endpoint import Endpoint
    from mlops_nb.serve.plan import planned
    from mlops_nb.serve.server import Answering, listen

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    endpoint = Endpoint(Shelf(), lambda: planned("shelf@champion"), loop=loop)
    endpoint.follow()
    port = listen()
    answering = Answering(app(Desk(endpoint, Tokens(None, also=[digest_of(b"a-token-for-tests")]))), port)
    loop.call_soon_threadsafe(answering.start)
    yield f"127.0.0.1:{port.getsockname()[1]}"
    asyncio.run_coroutine_threadsafe(answering.stop(), loop).result(WAIT_S)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(WAIT_S)
    port.close()


@pytest.fixture
def client(address):
    with triton.InferenceServerClient(address) as asking:
        yield asking


def order(binary=True):
    return [sent("pieces", np.array([1, 2]), binary), sent("price", np.array([[0.5], [1.25]], np.float32), binary), sent("country", np.array(["Zoë ☕", "Spain"], dtype=object), binary)]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("version", ["", "3", "champion"])
def test_tritons_client_asks_the_server(client, binary, version):
    answer = client.infer("shelf", order(binary), model_version=version, request_id="mine", headers=dict(TOKEN))
    assert answer.as_numpy("total").tolist() == [0.5, 2.5] and answer.as_numpy("where").tolist() == ["Zoë ☕".encode(), b"Spain"]
    assert answer.get_response().items() >= {"model_name": "shelf", "model_version": "3", "id": "mine"}.items()
    outputs = [triton.InferRequestedOutput("total", binary_data=binary)]
    answer = client.infer("shelf", order(binary), model_version=version, outputs=outputs, headers=dict(TOKEN), parameters={"round_to": 0})
    assert answer.as_numpy("total").tolist() == [0.0, 2.0] and answer.as_numpy("where") is None  # numpy rounds half to even


def test_tritons_client_asks_who_is_there(client):
    assert client.is_server_live(TOKEN) and client.is_server_ready(TOKEN) and client.is_model_ready("shelf", headers=dict(TOKEN)) and client.is_model_ready("shelf", "3", TOKEN)
    assert client.get_server_metadata(TOKEN) == server_metadata()
    about = client.get_model_metadata("shelf", headers=dict(TOKEN))
    assert about["name"] == "shelf" and about["versions"] == ["3"] and [(one["name"], one["datatype"]) for one in about["inputs"]] == [("pieces", "INT64"), ("price", "FP64"), ("country", "BYTES")]
    assert not client.is_model_ready("shelve", headers=dict(TOKEN)) and not client.is_model_ready("shelf", "9", TOKEN)


WRONG = [({"headers": None}, "401", "Bearer"), ({"headers": {"Authorization": "Bearer x"}}, "401", "Bearer"), ({"model_name": "shelve"}, "404", "did you mean shelf"), ({"model_version": "9"}, "404", "version '9'"),
         ({"inputs": order()[:2]}, "422", "column 'country'"), ({"inputs": [sent("pieces", np.array([0.5, 1])), *order()[1:]]}, "422", "row 0, column 'pieces'"),
         ({"inputs": [sent("pieces", np.array([1])), *order()[1:]]}, "400", "2 rows"), ({"outputs": [triton.InferRequestedOutput("totals")]}, "422", "did you mean total"),
         ({"outputs": [triton.InferRequestedOutput("total", class_count=2)]}, "400", "classification"), ({"parameters": {"k": 5}}, "422", "takes no param 'k'"),
         ({"inputs": [*order()[:2], sent("country", np.array(["RuntimeError", "a"], dtype=object))]}, "500", "RuntimeError")]


@pytest.mark.parametrize("more, status, words", WRONG, ids=[words for *_, words in WRONG])
def test_each_mistake_has_its_status_and_a_sentence(client, more, status, words):
    with pytest.raises(triton.InferenceServerException) as refused:
        client.infer(**{"model_name": "shelf", "inputs": order(), "headers": dict(TOKEN)} | more)
    assert refused.value.status() == status and words in refused.value.message() and "SECRET" not in refused.value.message()


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_a_compressed_request_is_answered_or_refused_in_words(client, compression):
    try:
        assert client.infer("shelf", order(), headers=dict(TOKEN), request_compression_algorithm=compression).as_numpy("total").tolist() == [0.5, 2.5]
    except triton.InferenceServerException as refused:
        assert refused.status() in ("400", "415") and len(refused.message()) > 20


FLOWERS = pd.DataFrame(np.random.default_rng(0).normal(size=(150, 3)), columns=["pieces", "unit price", "age, in days"])
KIND = np.digitize(FLOWERS["pieces"] + FLOWERS["unit price"], [-0.5, 0.5])


@pytest.fixture(scope="module")
def explaining():
    "A classifier of three classes, the recommender, and a model with nothing to say, on a free port."
    from running import running
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsRegressor

    from mlops_nb.model.recommender import Recommender

    one = np.random.default_rng(3)
    purchases = pd.DataFrame({"user": one.integers(0, 60, 4000), "item": one.integers(0, 40, 4000) ** 2 // 40, "time": pd.Timestamp("2024-01-01") + pd.to_timedelta(one.integers(0, 200, 4000), "D")})
    models = {"flowers": (LogisticRegression().fit(FLOWERS, KIND), dict.fromkeys(FLOWERS.columns, "double"), FLOWERS.head(2).to_dict("records")),
              "shop": (Recommender(n_windows=2, max_iter=10).fit(purchases), {"user": "long"}, [{"user": 5}]),
              "mute": (KNeighborsRegressor().fit(FLOWERS, KIND), dict.fromkeys(FLOWERS.columns, "double"), [])}
    with running(models) as address, triton.InferenceServerClient(address.removeprefix("http://"), network_timeout=WAIT_S, connection_timeout=WAIT_S) as client:
        yield client, models


def flowers(n, binary=True):
    return [sent(name, FLOWERS[name].head(n).to_numpy(), binary) for name in FLOWERS]


@pytest.mark.parametrize("binary", [True, False])
def test_a_request_may_ask_why(explaining, binary):
    "base + contributions = scikit-learn's decision function, of the class that is predicted"
    client, models = explaining
    model, headers = models["flowers"][0], {"Authorization": "Bearer a-token-for-tests"}
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("prediction", "contributions", "base", "explains")]
    answer = client.infer("flowers", flowers(4, binary), outputs=outputs, headers=dict(headers), parameters={"explain": True})
    contributions, base, predicted = answer.as_numpy("contributions"), answer.as_numpy("base"), answer.as_numpy("prediction")
    assert contributions.shape == (4, 3) and contributions.dtype == base.dtype == np.float64 and base.shape == (4,)
    assert orjson.loads(answer.get_output("contributions")["parameters"]["columns"]) == list(FLOWERS.columns)
    np.testing.assert_allclose(base + contributions.sum(axis=1), model.decision_function(FLOWERS.head(4)).max(axis=1))
    assert predicted.tolist() == model.predict(FLOWERS.head(4)).tolist()
    assert [one.decode() if isinstance(one, bytes) else one for one in answer.as_numpy("explains")] == [f"log-odds of {one}" for one in predicted]


def test_a_request_may_ask_for_the_best_few(explaining):
    client, models = explaining
    model, headers = models["flowers"][0], {"Authorization": "Bearer a-token-for-tests"}
    chances = np.sort(model.predict_proba(FLOWERS.head(5)), axis=1)[:, ::-1]
    answer = client.infer("flowers", flowers(5), headers=dict(headers), parameters={"top": 2, "explain": True})
    assert [one["name"] for one in answer.get_response()["outputs"]] == ["prediction", "top_class", "top_probability", "contributions", "base", "explains"]
    np.testing.assert_allclose(answer.as_numpy("top_probability"), chances[:, :2])
    assert answer.as_numpy("top_class")[:, 0].tolist() == answer.as_numpy("prediction").tolist() == model.predict(FLOWERS.head(5)).tolist()
    plain = client.infer("flowers", flowers(5), headers=dict(headers), parameters={"top": 0, "explain": False})
    assert [one["name"] for one in plain.get_response()["outputs"]] == ["prediction"]


def test_each_item_of_a_ranking_is_explained(explaining):
    client, models = explaining
    asked_for = [sent("user", np.array([5, 999_999, 7]))]  # 999999 never bought anything
    answer = client.infer("shop", asked_for, headers={"Authorization": "Bearer a-token-for-tests"}, parameters={"top": 4, "explain": True})
    contributions, base, items, scores = (answer.as_numpy(name) for name in ("contributions", "base", "top_item", "top_score"))
    columns = orjson.loads(answer.get_output("contributions")["parameters"]["columns"])
    assert items.shape == scores.shape == base.shape == (3, 4) and contributions.shape == (3, 4, len(columns))
    assert items[0].tolist() == answer.as_numpy("prediction")[0].tolist() == list(models["shop"][0].predict(pd.DataFrame({"user": [5]}), k=4)[0])
    np.testing.assert_allclose(1 / (1 + np.exp(-(base + np.nansum(contributions, axis=2))))[[0, 2]], scores[[0, 2]], atol=1e-6)  # the classifier's log-odds are those of the score
    assert np.isnan(base[1]).all() and np.isnan(contributions[1]).all()


ODD = [("mute", {"explain": True}, "422", "KNeighborsRegressor has no exact explanation"), ("mute", {"top": 2}, "422", "gives no probabilities"), ("flowers", {"explain": "yes"}, "400", "explain is true or false"),
       ("flowers", {"explain": 1}, "400", "explain is true or false"), ("flowers", {"top": True}, "400", "top is a whole number"), ("flowers", {"top": 2.5}, "400", "top is a whole number"),
       ("flowers", {"top": -1}, "422", "from 1 to 100"), ("flowers", {"top": 10**12}, "422", "from 1 to 100"), ("flowers", {"explained": True}, "422", "takes no param 'explained'")]


@pytest.mark.parametrize("model, parameters, status, words", ODD, ids=[str(parameters) for _, parameters, *_ in ODD])
def test_what_cannot_be_explained_or_asked_for_gets_a_sentence(explaining, model, parameters, status, words):
    with pytest.raises(triton.InferenceServerException, match=words) as refused:
        explaining[0].infer(model, flowers(2), headers={"Authorization": "Bearer a-token-for-tests"}, parameters=parameters)
    assert refused.value.status() == status


def test_only_so_many_rows_are_explained_and_metadata_says_who_can(explaining):
    client, headers = explaining[0], {"Authorization": "Bearer a-token-for-tests"}
    with pytest.raises(triton.InferenceServerException, match="101 rows to explain; expected at most 100"):
        client.infer("flowers", flowers(101), headers=dict(headers), parameters={"explain": True})
    with pytest.raises(triton.InferenceServerException, match="no output 'contributions'"):
        client.infer("flowers", flowers(2), outputs=[triton.InferRequestedOutput("contributions")], headers=dict(headers))
    takes = {name: client.get_model_metadata(name, headers=dict(headers))["parameters"] for name in ("flowers", "shop", "mute")}
    assert takes == {"flowers": {"explain": True, "top": True}, "shop": {"explain": True, "top": True}, "mute": {"explain": False, "top": False}}
    assert [one["name"] for one in client.get_model_metadata("flowers", headers=dict(headers))["outputs"]] == ["prediction"]


def test_an_output_of_the_model_is_never_replaced():
    answers = [{"prediction": {"base": 1.0}, "explanation": {"explains": "prediction", "base": 0.5, "contributions": {"x": 0.5}, "output": 1.0}}]
    with pytest.raises(Invalid, match="own outputs have names that explain or top use"):
        said(answers, Infer(Table(None, [], {}), explain=True))


KSERVE = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

def request(binary):
    inputs = []
    for name, datatype, array in (("pieces", "INT64", np.array([1, 2])), ("price", "FP32", np.array([0.5, 1.25], np.float32)), ("country", "BYTES", np.array(["France", "Spain"], dtype=object))):
        inputs.append(InferInput(name, [2], datatype))
        inputs[-1].set_data_from_numpy(array, binary_data=binary)
    return InferRequest("shelf", inputs, request_id="a", parameters={"binary_data_output": binary})

async def conversation(url, headers):
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0))
    said = [await client.is_server_live(url, headers), await client.is_server_ready(url, headers), await client.is_model_ready(url, "shelf", headers)]
    for binary in (True, False):
        response = await client.infer(url, request(binary), headers=dict(headers), model_name="shelf")
        said.append([response.id, response.model_name, {one.name: np.asarray(one.as_numpy()).astype(object).ravel().tolist() for one in response.outputs}])
    await client.close()
    return said

print("said", json.dumps(asyncio.run(conversation("http://" + sys.argv[1], json.loads(sys.argv[2]))), default=lambda value: value.decode()))
"""


def test_kserves_client_asks_the_server(address):
    "In a process of its own: KServe and Triton describe the same messages, so Python cannot hold both clients"
    python = os.environ.get("KSERVE_PYTHON", sys.executable)  # an interpreter with the package kserve, which brings 60 others
    if subprocess.run([python, "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('kserve') is None)"], timeout=WAIT_S).returncode:
        pytest.skip("KServe's client is not installed: make an environment with `pip install kserve` and name its python in KSERVE_PYTHON")
    done = subprocess.run([python, "-c", KSERVE, address, orjson.dumps(TOKEN).decode()], capture_output=True, text=True, timeout=3 * WAIT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    said = orjson.loads(next(line for line in done.stdout.splitlines() if line.startswith("said ")).removeprefix("said "))
    assert said[:3] == [True, True, True] and said[3] == said[4] == ["a", "shelf", {"total": [0.5, 2.5], "where": ["France", "Spain"]}]
