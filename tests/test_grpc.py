"""The gRPC service, asked by Triton's client: tensors, tokens, errors, bounds, TLS, several processes on one port."""

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from patience import next_line

from mlops_nb.core.errors import Conflict, Invalid, NotFound, Unavailable, known
from mlops_nb.serve.access import Grant
from mlops_nb.serve.batching import Busy, Late
from mlops_nb.serve.inputs import Inputs, columns_of

grpc = pytest.importorskip("grpc", reason="gRPC is not installed: pip install 'mlops_nb[grpc]'")
triton = pytest.importorskip("tritonclient.grpc", reason="the client of Triton is not installed: pip install 'tritonclient[grpc]'")

from tritonclient.utils import np_to_triton_dtype  # noqa: E402

from mlops_nb.serve.grpc import CODES, MESSAGES, STATUS, grpc_server, hold_port, infer_response, messages, parse_request  # noqa: E402

WAIT_S = 180
GRANTS = {b"secret": Grant("anna", frozenset(["predict"])), b"boss": Grant("ben", frozenset(["admin"]))}
ERRORS = {"busy": Busy("32 requests are waiting already; try again in 3 s.", 3), "late": Late("the request waited too long; try again later."), "gone": Unavailable("no model is loaded yet; wait."),
          "bug": RuntimeError("SECRET row 17")}


class Shelf:
    "An endpoint of the interface that the service expects, whose answers can be worked out by hand."
    models, stuck = ["shelf", "any"], False
    columns = {"shelf": columns_of({"pieces": "long", "price": "double", "country": "string"}), "any": ()}

    def served(self, model="", version=""):
        if (model or "shelf") not in self.models or version not in ("", "3"):
            raise NotFound(f"there is no model {model!r} version {version!r} here; {known(model, self.models)}")
        return SimpleNamespace(name=model or "shelf", version="3", columns=self.columns[model or "shelf"], answers=[{"total": 1.5, "where": "France"}])

    async def parsed(self, parse, body):
        return parse(body)

    async def predict(self, table, *, model="", version="", key="", request="", **more):
        served = self.served(model, version)
        inputs = Inputs(served.columns)
        rows = inputs.rows(table)
        if table.params.get("fail") in ERRORS:
            raise ERRORS[table.params["fail"]]
        if table.params.get("sleep_s"):
            await asyncio.sleep(table.params["sleep_s"])
        if served.name == "any":
            return SimpleNamespace(model="any@3", answers=[list(row) for row in rows], request=request)
        answers = [{"total": None if price is None else pieces * price, "where": country, "key": key} for pieces, price, country in rows]
        return SimpleNamespace(model="shelf@3", answers=answers, request=request)


@contextlib.contextmanager
def serving(endpoint=None, grant=GRANTS.get, **more):
    "A server in a loop of its own, in a thread."
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    answering = asyncio.run_coroutine_threadsafe(grpc_server(endpoint or Shelf(), grant, **more), loop).result(WAIT_S)
    try:
        yield answering
    finally:
        asyncio.run_coroutine_threadsafe(answering.stop(0), loop).result(WAIT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
        loop.close()


@pytest.fixture(scope="module")
def calls():
    return []


@pytest.fixture(scope="module")
def port(calls):
    with serving(on_call=calls.append, rates=lambda name: 0.0) as answering:
        yield answering.port


@pytest.fixture(scope="module")
def client(port):
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as asking:
        yield asking


TOKEN = {"authorization": "Bearer secret"}


def sent(name, array):
    one = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    one.set_data_from_numpy(array)
    return one


def order(n=2):
    return [sent("pieces", np.arange(1, n + 1)), sent("price", np.full((n, 1), 0.5, np.float32)), sent("country", np.array(["Zoë ☕"] * n, dtype=object))]


def noted(calls, code):
    "Whether the call was noted with this code, which happens just after its answer has left."
    latest = time.monotonic() + WAIT_S
    while (not calls or calls[-1]["code"] != code) and time.monotonic() < latest:
        time.sleep(0.01)
    return calls[-1]["code"] == code and calls[-1]["status"] == STATUS[code]


def test_the_messages_are_those_of_the_published_service():
    "Field by field against the descriptors in Triton's client"
    from tritonclient.grpc import service_pb2

    theirs = {message.name: message for message in service_pb2.DESCRIPTOR.message_types_by_name.values()}
    theirs |= {nested.name: nested for message in list(theirs.values()) for nested in message.nested_types if nested.name != "ParametersEntry"}

    def facts(message):
        return {field.name: (field.number, field.type, field.is_repeated, field.message_type.name if field.message_type else "", field.containing_oneof.name if field.containing_oneof else "")
                for field in message.fields}

    for name in MESSAGES:
        assert facts(messages()[name].DESCRIPTOR) == facts(theirs[name]), name


def test_a_prediction(client, calls):
    answer = client.infer("shelf", order(), request_id="mine", headers=TOKEN | {"x-mlops-key": "17850"})
    assert answer.as_numpy("total").tolist() == [0.5, 1.0] and answer.as_numpy("where").tolist() == ["Zoë ☕".encode()] * 2 and answer.as_numpy("key").tolist() == [b"17850"] * 2
    response = answer.get_response()
    assert (response.model_name, response.model_version, response.id) == ("shelf", "3", "mine")
    assert noted(calls, "OK")
    assert {key: calls[-1][key] for key in ("method", "model", "rows", "code", "status", "token")} == {"method": "ModelInfer", "model": "shelf@3", "rows": 2, "code": "OK", "status": 200, "token": "anna"}


@pytest.mark.parametrize("array", [np.array([[1.5, -2], [0.1, 3]], "f4"), np.array([[1.5, -2]], "f2"), np.array([[2**40, -1]]), np.array([[True, False]]), np.array([["a", "Zoë"], ["", "b"]], dtype=object),
                                   np.array([[255, 0]], "u1"), np.array([[0.1, 1e-320]])], ids=lambda array: str(array.dtype))
def test_matrices_come_back_as_they_were_sent(client, array):
    back = client.infer("any", [sent("x", array)], headers=TOKEN).as_numpy("prediction").tolist()
    assert back == ([[text.encode() for text in row] for row in array] if array.dtype == object else array.tolist())


def test_only_the_outputs_that_were_asked_for(client):
    answer = client.infer("shelf", order(), outputs=[triton.InferRequestedOutput("where")], headers=TOKEN)
    assert [one.name for one in answer.get_response().outputs] == ["where"]
    with pytest.raises(triton.InferenceServerException, match="no output 'wher'; did you mean where") as refused:
        client.infer("shelf", order(), outputs=[triton.InferRequestedOutput("wher")], headers=TOKEN)
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_missing_values_in_and_out(client):
    price = np.array([0.5, np.nan])
    assert np.isnan(client.infer("shelf", [sent("pieces", np.array([1, 2])), sent("price", price), sent("country", np.array(["a", "b"], dtype=object))], headers=TOKEN).as_numpy("total")).tolist() == [False, True]


def test_typed_contents_are_answered_with_typed_contents(port):
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    request = service_pb2.ModelInferRequest(model_name="shelf", id="typed")
    for name, datatype, contents in (("pieces", "INT16", {"int_contents": [1, 2]}), ("price", "FP32", {"fp32_contents": [0.5, 0.25]}), ("country", "BYTES", {"bytes_contents": [b"France", "Zoë".encode()]})):
        request.inputs.add(name=name, datatype=datatype, shape=[2], contents=contents)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, metadata=tuple(TOKEN.items()), timeout=WAIT_S)
    assert not answer.raw_output_contents and list(answer.outputs[0].contents.fp64_contents) == [0.5, 0.5] and list(answer.outputs[1].contents.bytes_contents) == [b"France", "Zoë".encode()]


def test_who_is_there(client):
    assert client.is_server_live(TOKEN) and client.is_server_ready(TOKEN) and client.is_model_ready("shelf", "3", TOKEN)
    assert "binary_tensor_data" in client.get_server_metadata(TOKEN).extensions
    about = client.get_model_metadata("shelf", headers=TOKEN)
    assert [(one.name, one.datatype, list(one.shape)) for one in about.inputs] == [("pieces", "INT64", [-1]), ("price", "FP64", [-1]), ("country", "BYTES", [-1])]
    assert [(one.name, one.datatype) for one in about.outputs] == [("total", "FP64"), ("where", "BYTES")] and list(about.versions) == ["3"]
    assert [(one.name, one.state) for one in client.get_model_repository_index(TOKEN).models] == [("shelf", "READY"), ("any", "READY")]


@pytest.mark.parametrize("headers", [None, {}, {"authorization": ""}, {"authorization": "Bearer"}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}, {"authorization": "secret"},
                                     {"authorization": "Bearer secretx"}, {"authorization-bin": b"Bearer secret"}])
def test_no_call_answers_without_the_token(client, headers):
    asks = [lambda: client.infer("shelf", order(), headers=headers), lambda: client.is_server_live(headers), lambda: client.is_server_ready(headers), lambda: client.is_model_ready("shelf", headers=headers),
            lambda: client.get_server_metadata(headers), lambda: client.get_model_metadata("shelf", headers=headers), lambda: client.get_model_repository_index(headers)]
    for ask in asks:
        with pytest.raises(triton.InferenceServerException) as refused:
            ask()
        assert refused.value.status() == "StatusCode.UNAUTHENTICATED" and "Bearer" in refused.value.message()


def test_a_token_needs_the_scope_and_keeps_its_rate():
    with serving(rates=lambda name: 4.2 if name == "anna" else 0, open_health=True) as answering, triton.InferenceServerClient(f"127.0.0.1:{answering.port}") as client:
        with pytest.raises(triton.InferenceServerException, match="'ben' allows admin") as refused:
            client.infer("shelf", order(), headers={"authorization": "bearer boss"})
        assert refused.value.status() == "StatusCode.PERMISSION_DENIED"
        with pytest.raises(triton.InferenceServerException, match="over its rate; try again in 4 s") as refused:
            client.infer("shelf", order(), headers=TOKEN)
        assert refused.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
        assert client.is_server_live() and client.is_server_ready()
        with pytest.raises(triton.InferenceServerException, match="Bearer"):
            client.is_model_ready("shelf")


WRONG = [({"parameters": {"fail": "busy"}}, "RESOURCE_EXHAUSTED", "32 requests"), ({"parameters": {"fail": "late"}}, "DEADLINE_EXCEEDED", "waited too long"), ({"parameters": {"fail": "gone"}}, "UNAVAILABLE", "no model"),
         ({"model_name": "shelve"}, "NOT_FOUND", "did you mean shelf"), ({"model_version": "9"}, "NOT_FOUND", "version '9'"), ({"inputs": order()[:2]}, "INVALID_ARGUMENT", "country"),
         ({"inputs": [*order(), sent("pieces", np.array([1, 2]))]}, "INVALID_ARGUMENT", "two inputs"), ({"inputs": [*order(2)[:2], *order(3)[2:]]}, "INVALID_ARGUMENT", "3 rows"),
         ({"inputs": [sent("pieces", np.array([0.5, 1])), *order()[1:]]}, "INVALID_ARGUMENT", "row 0, column 'pieces'"), ({"inputs": []}, "INVALID_ARGUMENT", "no inputs")]


@pytest.mark.parametrize("more, code, words", WRONG, ids=[words for *_, words in WRONG])
def test_each_error_has_its_code_and_a_sentence(client, calls, more, code, words):
    with pytest.raises(triton.InferenceServerException) as refused:
        client.infer(**{"model_name": "shelf", "inputs": order(), "headers": TOKEN} | more)
    assert refused.value.status() == f"StatusCode.{code}" and words in refused.value.message()
    assert noted(calls, code)


def test_a_models_own_failure_says_nothing_of_the_rows(client, caplog):
    with pytest.raises(triton.InferenceServerException) as refused:
        client.infer("shelf", order(), parameters={"fail": "bug"}, headers=TOKEN)
    assert refused.value.status() == "StatusCode.INTERNAL" and "RuntimeError" in refused.value.message()
    assert "SECRET" not in refused.value.message() and "SECRET" not in caplog.text and "RuntimeError" in caplog.text


def test_busy_says_when_to_come_again_and_every_answer_has_an_id(port):
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        request = service_pb2.ModelInferRequest(model_name="any")
        request.inputs.add(name="x", datatype="FP64", shape=[1], contents={"fp64_contents": [1]})
        request.parameters["fail"].string_param = "busy"
        with pytest.raises(grpc.RpcError) as refused:
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, metadata=tuple(TOKEN.items()), timeout=WAIT_S)
        trailing = dict(refused.value.trailing_metadata())
    assert trailing["retry-after"] == "3" and trailing["grpc-retry-pushback-ms"] == "3000" and len(trailing["x-request-id"]) == 32


def raw_call(port, method, body, metadata=tuple(TOKEN.items())):
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(method)(body, metadata=metadata, timeout=WAIT_S)
    return refused.value.code().name, refused.value.details()


def request_with(**more):
    request = messages()["ModelInferRequest"](model_name="any")
    request.inputs.add(**{"name": "x", "datatype": "FP32", "shape": [2], "contents": {"fp32_contents": [1, 2]}} | more)
    return request


def test_malformed_messages(port):
    infer = "/inference.GRPCInferenceService/ModelInfer"
    assert raw_call(port, "/inference.GRPCInferenceService/ModelConfig", b"")[0] == raw_call(port, "/other.Service/ModelInfer", b"")[0] == "UNIMPLEMENTED"
    for body in (b"\xff" * 50, b"\x0a\xff", b"nonsense"):
        assert raw_call(port, infer, body) == ("INVALID_ARGUMENT", "the message is no inference.ModelInferRequest; expected the service's own message.")
        assert raw_call(port, "/inference.GRPCInferenceService/ModelReady", body)[0] == "INVALID_ARGUMENT"
    both = request_with()
    both.raw_input_contents.append(b"12345678")
    some = request_with(contents=None)
    some.raw_input_contents.extend([b"12345678", b"1"])
    cases = [(both, "raw_input_contents"), (some, "2 raw_input_contents for 1 inputs"), (request_with(shape=[3]), "2 entries"), (request_with(shape=[]), "shape"), (request_with(shape=[-1]), "shape"),
             (request_with(shape=[2**62]), "2 entries"), (request_with(datatype="FP16"), "raw_input_contents"), (request_with(datatype="X"), "'X'"), (request_with(name=""), "at least one character"),
             (request_with(datatype="INT64"), "0 entries"), (request_with(datatype="INT8", contents={"int_contents": [1, 300]}), "from -128 to 127"),
             (request_with(datatype="BYTES", contents={"bytes_contents": [b"a", b"\xff"]}), "UTF-8"), (request_with(parameters={"shared_memory_region": {"string_param": "a"}}), "shared_memory_region")]
    for request, words in cases:
        code, said = raw_call(port, infer, request.SerializeToString())
        assert code == "INVALID_ARGUMENT" and words in said, said


def test_large_messages_are_refused_also_when_they_are_small_on_the_way(client):
    "7 MB of zeros, which are 7 kB when compressed"
    zeros = sent("x", np.zeros((900_000, 1)))
    for compression in (None, "gzip", "deflate"):
        with pytest.raises(triton.InferenceServerException) as refused:
            client.infer("any", [zeros], headers=TOKEN, compression_algorithm=compression)
        assert refused.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    assert len(client.infer("any", [sent("x", np.zeros((1000, 12)))], headers=TOKEN, compression_algorithm="gzip").as_numpy("prediction")) == 1000


def test_the_clients_deadline_ends_the_call(client, calls):
    with pytest.raises(triton.InferenceServerException) as refused:
        client.infer("any", [sent("x", np.array([1.0]))], parameters={"sleep_s": 300}, headers=TOKEN, client_timeout=3)
    assert refused.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    assert noted(calls, "CANCELLED") and client.infer("any", [sent("x", np.array([1.0]))], headers=TOKEN).as_numpy("prediction").tolist() == [[1.0]]


def test_half_a_message_is_waited_for_only_so_long():
    with serving(read_s=0.2) as answering, grpc.insecure_channel(f"127.0.0.1:{answering.port}") as channel:
        held = threading.Event()

        def nothing():
            held.wait(WAIT_S)
            yield b""

        with pytest.raises(grpc.RpcError) as refused:
            channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")(nothing(), metadata=tuple(TOKEN.items()), timeout=WAIT_S)
        held.set()
        assert refused.value.code().name == "DEADLINE_EXCEEDED" and "did not arrive within 0.2 s" in refused.value.details()


def test_too_many_calls_at_once_are_told_to_come_later():
    async def crowd(port):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            request = request_with()
            request.parameters["sleep_s"].double_param = 0.5
            ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            return [await one.code() for one in [ask(request.SerializeToString(), metadata=tuple(TOKEN.items()), timeout=WAIT_S) for _ in range(12)]]

    with serving(calls=4) as answering:
        codes = [code.name for code in asyncio.run(crowd(answering.port))]
    assert set(codes) <= {"OK", "RESOURCE_EXHAUSTED"} and codes.count("OK") >= 4


def test_it_listens_on_loopback_and_a_taken_port_is_named():
    held = hold_port()
    number = held.getsockname()[1]
    assert held.getsockname()[0] == "127.0.0.1"
    with pytest.raises(Conflict, match=f"port {number} on 127.0.0.1"):
        hold_port(port=number)
    held.close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        for ask in (lambda: hold_port(port=number), lambda: asyncio.run(grpc_server(Shelf(), GRANTS.get, number))):
            with pytest.raises(Conflict, match=str(number)):
                ask()
    for host, number in (("256.0.0.1", 0), ("127.0.0.1", 99999)):
        with pytest.raises(Conflict, match="choose another"):
            hold_port(host, number)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    trustme = pytest.importorskip("trustme", reason="trustme makes the certificates: pip install trustme")
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    made = authority.issue_cert("localhost")
    made.private_key_pem.write_to_path(folder / "key.pem")
    for number, blob in enumerate(made.cert_chain_pems):
        blob.write_to_path(folder / "cert.pem", append=number > 0)
    authority.cert_pem.write_to_path(folder / "ca.pem")
    return folder


def test_tls(certificates):
    files = {"cert_file": str(certificates / "cert.pem"), "key_file": str(certificates / "key.pem")}
    with serving(**files) as answering:
        with triton.InferenceServerClient(f"localhost:{answering.port}", ssl=True, root_certificates=str(certificates / "ca.pem")) as client:
            assert client.infer("any", [sent("x", np.array([1.0]))], headers=TOKEN).as_numpy("prediction").tolist() == [[1.0]]
        with triton.InferenceServerClient(f"localhost:{answering.port}") as client, pytest.raises(triton.InferenceServerException):
            client.infer("any", [sent("x", np.array([1.0]))], headers=TOKEN, client_timeout=5)
    (certificates / "junk.pem").write_text("no certificate")
    for wrong in ({"cert_file": files["cert_file"]}, {"key_file": files["key_file"]}, files | {"cert_file": str(certificates / "junk.pem")}, files | {"key_file": str(certificates / "ca.pem")},
                  files | {"key_file": str(certificates / "absent.pem")}):
        with pytest.raises(Invalid, match="TLS needs a certificate and its key"):
            asyncio.run(grpc_server(Shelf(), GRANTS.get, **wrong))


def test_stopping_lets_calls_finish():
    began = asyncio.Event()

    class Told(Shelf):
        async def predict(self, *args, **more):
            began.set()
            return await super().predict(*args, **more)

    async def scene():
        answering = await grpc_server(Told(), GRANTS.get)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{answering.port}") as channel:
            request = request_with()
            request.parameters["sleep_s"].double_param = 0.5
            asked = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(request.SerializeToString(), metadata=tuple(TOKEN.items()), timeout=WAIT_S)
            await asyncio.wait_for(began.wait(), WAIT_S)
            await answering.stop(WAIT_S)
            return await asked.code()

    assert asyncio.run(scene()).name == "OK"


WORKERS = """
import asyncio, os, sys
sys.path.insert(0, {tests!r})
import grpc  # imported before the fork, as a parent that shares its memory with its workers does
from test_grpc import GRANTS, Shelf
from mlops_nb.serve.grpc import grpc_server, hold_port

held = hold_port()
port = held.getsockname()[1]

async def work():
    answering = await grpc_server(Shelf(), GRANTS.get, port)
    os.write(1, f"ready {{os.getpid()}} {{port}}".encode() + bytes([10]))
    await asyncio.Event().wait()

for _ in range(2):
    if os.fork() == 0:
        asyncio.run(work())
sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT") or not hasattr(os, "fork"), reason="several processes share a port on POSIX only")
def test_forked_workers_share_the_port_and_one_may_die():
    parent = subprocess.Popen([sys.executable, "-c", WORKERS.format(tests=os.path.dirname(__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
    pids, said = [], b""
    try:
        while said.count(b"\n") < 2:
            assert select.select([parent.stdout], [], [], WAIT_S)[0], "the workers did not get ready"
            assert (part := os.read(parent.stdout.fileno(), 1000)), f"the workers ended; they said {said}"
            said += part
        pids = [int(line.split()[1]) for line in said.splitlines() if line.startswith(b"ready")]
        port = int(said.split()[-1])
        assert len(pids) == 2, said

        def ask():
            with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
                return client.infer("shelf", order(), headers=TOKEN, client_timeout=WAIT_S).as_numpy("total").tolist()

        assert all(ask() == [0.5, 1.0] for _ in range(10))
        os.kill(pids[0], signal.SIGKILL)
        latest, well = time.monotonic() + WAIT_S, 0  # calls in flight may fail while the system takes the process apart
        while well < 10 and time.monotonic() < latest:
            try:
                well = well + 1 if ask() == [0.5, 1.0] else 0
            except triton.InferenceServerException as error:
                assert error.status() == "StatusCode.UNAVAILABLE"
                well = 0
        assert well == 10
    finally:
        os.killpg(parent.pid, signal.SIGKILL)  # its own session: it and its workers
        parent.wait(WAIT_S)
        parent.stdin.close()
        parent.stdout.close()


POOL = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from mlops_nb.core.files import digest_of
from mlops_nb.serve.grpc import hold_port
from mlops_nb.serve.plan import planned, write_plan
from mlops_nb.serve.server import listen
from mlops_nb.serve.workers import Pool

plan, web = Path({folder!r}) / "plan.json", listen()
with hold_port() as free:
    rpc = free.getsockname()[1]
write_plan(plan, planned("shelf@champion"), by="test", why="first")
pool = Pool(dict(source="test_openinference:source", plan=str(plan), token_digests=[digest_of(b"secret")], host="127.0.0.1", grpc=rpc), 2)
pool.start([web])
pool.ready({wait_s})
os.write(1, f"{{web.getsockname()[1]}} {{rpc}}".encode() + bytes([10]))
os.set_blocking(0, False)
pool.run_until(lambda: sys.stdin.buffer.raw.read(1) == b"")
pool.drain()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="several workers on POSIX only")
def test_a_server_with_two_workers_speaks_http_and_grpc(tmp_path):
    web = pytest.importorskip("tritonclient.http", reason="the client of Triton is not installed: pip install 'tritonclient[http]'")
    parent = subprocess.Popen([sys.executable, "-c", POOL.format(tests=os.path.dirname(__file__), folder=str(tmp_path), wait_s=WAIT_S)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        ports = next_line(parent).split()
        for kind, port in zip((web, triton), ports):
            for _ in range(4):
                with kind.InferenceServerClient(f"127.0.0.1:{int(port)}") as client:
                    inputs = [kind.InferInput(name, [2], datatype) for name, datatype in (("pieces", "INT64"), ("price", "FP64"), ("country", "BYTES"))]
                    for one, values in zip(inputs, (np.array([1, 2]), np.array([0.5, 1.25]), np.array(["a", "b"], dtype=object))):
                        one.set_data_from_numpy(values)
                    assert client.infer("shelf", inputs, headers=dict(TOKEN)).as_numpy("total").tolist() == [0.5, 2.5]
    finally:
        parent.stdin.close()
        try:
            parent.wait(WAIT_S)
        finally:
            parent.kill()
            parent.stdout.close()
    assert parent.returncode == 0


def test_without_the_extra_it_says_what_to_install():
    code = ("import sys, asyncio\nsys.modules['grpc'] = None\nfrom mlops_nb.serve.grpc import grpc_server\nfrom mlops_nb.core.errors import Unavailable\n"
            "try: asyncio.run(grpc_server(None, None))\nexcept Unavailable as error: print(error)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=WAIT_S).stdout
    assert "pip install 'mlops_nb[grpc]'" in out


def test_every_error_has_a_code_of_grpc():
    assert {*CODES.values()} <= {code.name for code in grpc.StatusCode} and {*CODES.values()} <= set(STATUS)


KSERVE = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest

async def conversation(port, headers):
    client, inputs = InferenceGRPCClient("127.0.0.1:" + port), []
    for name, datatype, array in (("pieces", "INT64", np.array([1, 2])), ("price", "FP32", np.array([0.5, 1.5], np.float32)), ("country", "BYTES", np.array(["France", "Spain"], dtype=object))):
        inputs.append(InferInput(name, [2], datatype))
        inputs[-1].set_data_from_numpy(array)
    live = [await client.is_server_live(headers=headers), await client.is_server_ready(headers=headers), await client.is_model_ready("shelf", headers=headers)]
    response = await client.infer(InferRequest("shelf", inputs, request_id="a"), headers=headers)
    await client.close()
    return [live, response.id, {one.name: np.asarray(one.as_numpy()).tolist() for one in response.outputs}["total"]]

print("said", json.dumps(asyncio.run(conversation(sys.argv[1], [("authorization", "Bearer secret")]))))
"""


def test_kserves_client(port):
    "In a process of its own: KServe and Triton describe the same messages, so Python cannot hold both clients"
    python = os.environ.get("KSERVE_PYTHON", sys.executable)  # an interpreter with the package kserve, which brings 60 others
    if subprocess.run([python, "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('kserve') is None)"], timeout=WAIT_S).returncode:
        pytest.skip("KServe's client is not installed: make an environment with `pip install kserve` and name its python in KSERVE_PYTHON")
    done = subprocess.run([python, "-c", KSERVE, str(port)], capture_output=True, text=True, timeout=3 * WAIT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'said [[true, true, true], "a", [0.5, 3.0]]' in done.stdout


def test_the_servers_own_endpoint_and_tokens(tmp_path):
    from test_openinference import Shelf as Source

    from mlops_nb.serve.access import Tokens, add_token
    from mlops_nb.serve.endpoint import Endpoint
    from mlops_nb.serve.plan import planned

    endpoint, token = Endpoint(Source(), lambda: planned("shelf@champion")), add_token(tmp_path / "tokens.json", "anna")
    endpoint.follow()
    with serving(endpoint, grant=Tokens(tmp_path / "tokens.json").grant) as answering:
        with triton.InferenceServerClient(f"127.0.0.1:{answering.port}") as client:
            headers = {"authorization": f"Bearer {token}", "x-request-id": "r7"}
            answer = client.infer("shelf", order(3), model_version="champion", headers=headers)
            assert answer.as_numpy("total").tolist() == [0.5, 1.0, 1.5] and answer.get_response().id == "r7"
            assert client.is_server_ready(headers) and client.is_model_ready("shelf", headers=headers) and [one.name for one in client.get_model_metadata("shelf", headers=headers).outputs] == ["total", "where"]
            many = client.infer("shelf", order(10_000), headers=headers)
            assert len(many.as_numpy("total")) == 10_000
            with pytest.raises(triton.InferenceServerException, match="10,001 rows") as refused:
                client.infer("shelf", order(10_001), headers=headers)
            assert refused.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
            with pytest.raises(triton.InferenceServerException, match="compare their columns|the model failed"):
                client.infer("shelf", [*order()[:2], sent("country", np.array(["RuntimeError", "a"], dtype=object))], headers=headers)


def test_why_and_the_best_few(tmp_path):
    "Through the server's own endpoint; scikit-learn's decision function and probabilities are the reference"
    import pandas as pd
    from running import Shelf as Source
    from sklearn.linear_model import LogisticRegression

    from mlops_nb.serve.endpoint import Endpoint
    from mlops_nb.serve.plan import planned

    X = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 2)), columns=["pieces", "age, in days"])
    model = LogisticRegression().fit(X, np.where(X["pieces"] > 0, "yes", "no"))
    endpoint = Endpoint(Source({"flowers": (model, dict.fromkeys(X.columns, "double"), X.head(2).to_dict("records"))}), lambda: planned("flowers@1"))
    endpoint.follow()
    with serving(endpoint) as answering, triton.InferenceServerClient(f"127.0.0.1:{answering.port}") as client:
        inputs = [sent(name, X[name].head(3).to_numpy()) for name in X]
        answer = client.infer("flowers", inputs, headers=TOKEN, parameters={"explain": True, "top": 2})
        assert json.loads(answer.get_output("contributions").parameters["columns"].string_param) == list(X.columns)
        np.testing.assert_allclose(answer.as_numpy("base") + answer.as_numpy("contributions").sum(axis=1), model.decision_function(X.head(3)))
        np.testing.assert_allclose(answer.as_numpy("top_probability"), np.sort(model.predict_proba(X.head(3)), axis=1)[:, ::-1])
        assert answer.as_numpy("top_class")[:, 0].tolist() == answer.as_numpy("prediction").tolist() and answer.as_numpy("explains").tolist() == [b"log-odds of yes"] * 3
        assert [one.name for one in client.infer("flowers", inputs, headers=TOKEN).get_response().outputs] == ["prediction"]
        assert [one.name for one in client.get_model_metadata("flowers", headers=TOKEN).outputs] == ["prediction"] and {"explain", "top"} <= set(client.get_server_metadata(TOKEN).extensions)
        for wrong in ({"explain": "yes"}, {"top": True}, {"top": 0.5}):
            with pytest.raises(triton.InferenceServerException, match="explain is true or false, and top is a whole number") as refused:
                client.infer("flowers", inputs, headers=TOKEN, parameters=wrong)
            assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_the_pure_functions_agree_with_the_wire():
    request = request_with(parameters={"content_type": {"string_param": "np"}})
    infer = parse_request(request.SerializeToString())
    answer = messages()["ModelInferResponse"].FromString(infer_response(infer, SimpleNamespace(model="any@3", answers=[[1.0], [2.0]], request="r")))
    assert infer.table.rows == [(1.0,), (2.0,)] and list(answer.outputs[0].contents.fp64_contents) == [1.0, 2.0] and answer.id == "r"
