"""Spans of a request, as a collector gets them: in memory by the SDK's own exporter, and over HTTP on a real port."""

import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from patience import finished, started

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mlops_nb.core.errors import Invalid
from mlops_nb.serve.logs import trace_of
from mlops_nb.serve.traces import Batched, Traces, collector, traces_to

T, P = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def answered(traces, given: bytes = b"", state: bytes = b"", status: int = 200):
    step = traces.begin("POST", "/predict", traceparent=given, tracestate=state, request="r1")
    queued = time.perf_counter()
    time.sleep(0.002)
    started = time.perf_counter()
    time.sleep(0.004)
    traces.ended(step, status=status, model="shelf@1", rows=2, batch=Batched(queued, started, time.perf_counter(), rows=12))
    return step


def spans_of(**more) -> tuple[Traces, InMemorySpanExporter]:
    memory = InMemorySpanExporter()
    return Traces(memory, service="shelf", **more), memory


def test_request_batch_and_model_lie_in_each_other():
    traces, memory = spans_of()
    step = answered(traces, f"00-{T}-{P}-01".encode(), b"vendor=abc,other=1")
    traces.end()
    spans = {span.name: span for span in memory.get_finished_spans()}
    request, batch, predict = spans["POST /predict"], spans["batch"], spans["predict"]
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {T} == {step.trace.trace_id}
    assert f"{request.parent.span_id:016x}" == P and request.parent.is_remote and request.context.trace_state["vendor"] == "abc"
    assert batch.parent.span_id == request.context.span_id and predict.parent.span_id == batch.context.span_id
    assert request.start_time <= batch.start_time < predict.start_time < predict.end_time == batch.end_time <= request.end_time
    assert 2e6 <= predict.start_time - batch.start_time and 4e6 <= predict.end_time - predict.start_time
    assert abs(request.end_time - time.time_ns()) < 60e9
    assert request.attributes == {"http.request.method": "POST", "http.route": "/predict", "mlops.request_id": "r1", "http.response.status_code": 200, "mlops.model": "shelf@1", "mlops.rows": 2}
    assert request.kind.name == "SERVER" and batch.attributes["mlops.batch_rows"] == 12 and request.resource.attributes["service.name"] == "shelf"
    onward = trace_of(step.trace.onward(step.trace.parent_id).encode())
    assert onward.trace_id == T and onward.parent_id == f"{request.context.span_id:016x}" and onward.recorded


@pytest.mark.parametrize("given, spans", [(f"00-{T}-{P}-01", 3), (f"00-{T}-{P}-00", 0), ("", 0), ("rubbish", 0)])
def test_the_asker_decides_and_of_the_rest_a_share_is_recorded(given, spans):
    traces, memory = spans_of(sample=0)
    step = answered(traces, given.encode())
    traces.end()
    assert len(memory.get_finished_spans()) == spans and len(step.trace.trace_id) == 32 and step.trace.recorded == (spans > 0)
    assert step.trace.trace_id == T or not given.startswith("00")


def test_a_request_of_its_own_begins_a_trace():
    traces, memory = spans_of()
    first, second = answered(traces, b"rubbish"), answered(traces, status=500)
    traces.end()
    requests = [span for span in memory.get_finished_spans() if span.name == "POST /predict"]
    assert [span.parent for span in requests] == [None, None] and first.trace.trace_id != second.trace.trace_id
    assert [span.status.status_code.name for span in requests] == ["UNSET", "ERROR"]


@pytest.mark.parametrize("endpoint, environment, address", [
    ("", {}, ""), ("http://c:4318", {}, "http://c:4318/v1/traces"), ("http://c:4318/", {}, "http://c:4318/v1/traces"), ("http://c/v1/traces", {}, "http://c/v1/traces"),
    ("", {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://c/base"}, "https://c/base/v1/traces"), ("", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/as-it-is"}, "http://c/as-it-is"),
    ("", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b/x"}, "http://b/x"), ("http://c", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a"}, "http://c/v1/traces"),
    ("http://c", {"OTEL_SDK_DISABLED": "true"}, ""), ("http://c", {"OTEL_TRACES_EXPORTER": "none"}, "")])
def test_where_spans_go(endpoint, environment, address):
    "As OpenTelemetry's specification of its exporters has it: the one variable is a start, the other is taken as it is."
    assert collector(endpoint, environment) == address
    if not address:
        assert traces_to(endpoint, environment=environment) is None


def test_settings_that_cannot_be_meant():
    for endpoint in ("collector:4318", "ftp://c", "http://"):
        with pytest.raises(Invalid, match="http://127.0.0.1:4318"):
            traces_to(endpoint, environment={})
    with pytest.raises(Invalid, match="from 0 to 1"):
        traces_to("http://127.0.0.1:9", sample=2, environment={})


@pytest.fixture
def stub():
    "A collector: it keeps what it gets."
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, self.headers["content-type"], self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threads = started(server.serve_forever)
    yield f"http://127.0.0.1:{server.server_address[1]}", got
    server.shutdown()
    finished(threads)
    server.server_close()


FORKED = """
import os, sys, time
from mlops_nb.serve.traces import Batched, traces_to
for n in range(2):
    if os.fork() == 0:
        traces = traces_to(sys.argv[1], service="shelf")
        for _ in range(5):
            step = traces.begin("POST", "/predict")
            now = time.perf_counter()
            traces.ended(step, status=200, model="shelf@1", rows=1, batch=Batched(now - 0.002, now - 0.001, now, 1))
        traces.end(120)
        os._exit(0)
sys.exit(max(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_collector_gets_the_spans_of_all_workers(stub):
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    address, got = stub
    ran = subprocess.run([sys.executable, "-c", FORKED, address], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and ran.stderr == "", ran.stderr
    assert {(path, kind) for path, kind, _ in got} == {("/v1/traces", "application/x-protobuf")}
    resources = [one for _, _, body in got for one in ExportTraceServiceRequest.FromString(body).resource_spans]
    spans = [span for one in resources for scope in one.scope_spans for span in scope.spans]
    assert sorted(span.name for span in spans) == ["POST /predict"] * 10 + ["batch"] * 10 + ["predict"] * 10
    assert len({span.trace_id for span in spans}) == 10 and len({span.span_id for span in spans}) == 30
    said = [{attribute.key: attribute.value.string_value for attribute in one.resource.attributes} for one in resources]
    assert {one["service.name"] for one in said} == {"shelf"} and len({one["service.instance.id"] for one in said}) == 2


def test_a_collector_that_is_not_there_stops_nothing():
    "More spans than the queue holds, to a closed port: all of it ends soon, and the process too."
    code = ("import sys, logging, threading, time; logging.disable()\nfrom mlops_nb.serve.traces import traces_to\ntraces = traces_to('http://127.0.0.1:9', environment={})\n"
            "for _ in range(5000): traces.ended(traces.begin('POST', '/predict'), status=200)\ntraces.end(1)\nprint('ended')")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.stdout == "ended\n"


def test_without_the_extra_it_says_how_to_get_it(monkeypatch):
    from mlops_nb.core.errors import Unavailable

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(Unavailable, match=r"mlops_nb\[otel\]"):
        traces_to("http://127.0.0.1:9", environment={})


def test_importing_it_imports_nothing():
    code = "import sys, threading; import mlops_nb.serve.traces; print(threading.active_count(), any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout.split() == ["1", "False"]
