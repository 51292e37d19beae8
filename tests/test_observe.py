"""What a server says of itself: figures of several real processes on one page, lines in a log, ids and traces."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from patience import next_line, until
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from mlops_nb.core.errors import Invalid
from mlops_nb.core.secrets import Redactor
from mlops_nb.serve.logs import AccessLog, payload_of, request_id, trace_of
from mlops_nb.serve.observe import ROWS, SECONDS, Metrics

posix = pytest.mark.skipif(os.name != "posix", reason="signals")
ROUTES = ["/invocations", "/predict"]
SERVED = {"shelf@1": {"version": "1", "digest": "d1", "alias": "champion"}}


def read(page: bytes) -> dict[tuple, float]:
    "(name, labels) -> value, by prometheus_client's own parser."
    return {(sample.name, frozenset(sample.labels.items())): sample.value for family in text_string_to_metric_families(page.decode()) for sample in family.samples}


def value(page: bytes | dict, name: str, **labels) -> float:
    "The sum of what has these labels."
    found = page if isinstance(page, dict) else read(page)
    return sum(one for (other, given), one in found.items() if other == name and labels.items() <= dict(given).items())


def series(page: bytes) -> int:
    return len(read(page))


# one process


def test_the_page_is_what_prometheus_client_would_have_counted():
    draws, registry = random.Random(3), CollectorRegistry()
    requests = Counter("mlops_requests", "x", ["route", "model", "status"], registry=registry)
    seconds = Histogram("mlops_request_seconds", "x", ["route", "model"], buckets=SECONDS, registry=registry)
    rows_total, batches = Counter("mlops_rows", "x", ["model"], registry=registry), Histogram("mlops_batch_rows", "x", ["model"], buckets=ROWS, registry=registry)
    metrics = Metrics(routes=ROUTES)
    metrics.serving(SERVED | {"shelf@2": {}})
    for _ in range(3000):
        route, model, status = draws.choice(ROUTES), draws.choice(["shelf@1", "shelf@2"]), draws.choice([200, 422, 500])
        took, rows = draws.choice([*SECONDS, 0, 99, draws.expovariate(20)]), draws.choice([1, 3, 50, 20_000])
        metrics.answered(route, model, status, took, rows)
        metrics.batched(model, rows)
        requests.labels(route, model, status).inc()
        seconds.labels(route, model).observe(took)
        rows_total.labels(model).inc(rows)
        batches.labels(model).observe(rows)
    theirs = {key: value for key, value in read(generate_latest(registry)).items() if not key[0].endswith("_created")}
    ours = {key: value for key, value in read(metrics.page()).items() if key[0].startswith(("mlops_requests", "mlops_request_seconds", "mlops_rows", "mlops_batch"))}
    assert ours.keys() == theirs.keys() and all(ours[key] == pytest.approx(theirs[key]) for key in theirs)


def test_what_the_page_says_besides():
    metrics = Metrics(routes=ROUTES)
    metrics.serving(SERVED)
    for reason in ("queue", "queue", "rate", "no such reason", "x" * 1000):
        metrics.rejected(reason)
    metrics.swapped("swapped")
    metrics.log_failed()
    metrics.log_failed("access", lines=40)
    metrics.queued("shelf@1", 17)
    metrics.queued("nobody", 5)
    page = read(metrics.page())
    assert value(page, "mlops_rejected_total", reason="queue") == 2 == value(page, "mlops_rejected_total", reason="other")
    assert value(page, "mlops_swaps_total", outcome="swapped") == 1 and value(page, "mlops_queue_rows") == 17
    assert value(page, "mlops_log_errors_total", log="predictions") == 1 and value(page, "mlops_log_errors_total", log="access") == 40
    assert page["mlops_model_info", frozenset({"model": "shelf@1", "version": "1", "digest": "d1", "alias": "champion"}.items())] == 1
    assert value(page, "mlops_workers") == 1 and value(page, "process_cpu_seconds_total") > 0 and value(page, "process_resident_memory_bytes") > 1e6
    assert abs(value(page, "process_start_time_seconds") - time.time()) < 86400 and value(page, "process_open_fds") > 0


def test_strangers_make_no_series_and_no_memory():
    metrics = Metrics(routes=ROUTES)
    metrics.serving(SERVED)
    metrics.answered("/predict", "shelf@1", 200, 0.001, 1)
    metrics.answered("/x", "x", 404, 0.001)
    before = series(metrics.page())
    for n in range(5000):
        metrics.answered(f"/{n}", f"model-{n}", 404, 0.001)
        metrics.answered("/predict", f"shelf@{n + 2}", 404, 0.001)
        metrics.batched(f"model-{n}", 1)
        metrics.answered("/predict", "", 1000 + n, 0.001)
        metrics.queued(f"model-{n}", 1)
    page = metrics.page()
    assert series(page) < before + 100 and len(metrics.hot) == 1
    assert value(page, "mlops_requests_total") == 15_002 and value(page, "mlops_requests_total", model="other") == 10_001


@pytest.mark.parametrize("name", ['a"b', "a\nb", "a\\b", "Größe", "{}", "a,b=c"])
def test_odd_names_are_written_so_that_they_are_read_back(name):
    metrics = Metrics(routes=[name])
    metrics.serving({name: {"version": name, "digest": name, "alias": name}})
    metrics.answered(name, name, 200, 0.001, 1)
    assert value(metrics.page(), "mlops_requests_total", route=name, model=name) == 1 == value(metrics.page(), "mlops_model_info", alias=name)


def test_a_life_of_swaps_fills_no_page():
    metrics, sizes = Metrics(routes=ROUTES), []
    for version in range(200):
        metrics.serving({f"shelf@{version}": {}})
        metrics.answered("/predict", f"shelf@{version}", 200, 0.001, 1)
        metrics.batched(f"shelf@{version}", 1)
        sizes.append(series(metrics.page()))
    assert sizes[60:] == [sizes[60]] * 140
    page = metrics.page()
    assert value(page, "mlops_requests_total", model="shelf@199") == 1 == value(page, "mlops_requests_total", model="shelf@198"), "an answer of the version before is still its own"
    metrics.answered("/predict", "shelf@198", 200, 0.001, 1)
    assert value(metrics.page(), "mlops_requests_total", model="shelf@198") == 2


def test_threads_count_everything():
    metrics = Metrics(routes=ROUTES)
    metrics.serving(SERVED)

    def work(n):
        for _ in range(3000):
            metrics.answered("/predict", "shelf@1", 200 + n, 0.001, 2)
            metrics.batched("shelf@1", 2)
            metrics.rejected("rate")

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(work, n) for n in range(4)]
        while not all(one.done() for one in running):
            metrics.page()
    page = read(metrics.page())
    assert value(page, "mlops_requests_total") == value(page, "mlops_batch_rows_count") == value(page, "mlops_rejected_total") == 12_000 and value(page, "mlops_rows_total") == 24_000


# several processes

WORKER = """
import sys
from mlops_nb.serve.observe import Metrics
metrics = Metrics(sys.argv[1], routes=["/invocations", "/predict"])
metrics.serving({sys.argv[2]: {"version": "1", "digest": "d1", "alias": "champion"}})
for line in sys.stdin:
    order, _, n = line.strip().partition(" ")
    if order == "answer":
        for _ in range(int(n)): metrics.answered("/predict", "shelf@1", 200, 0.003, 2)
        metrics.queued("shelf@1", int(n)); metrics.rejected("queue"); metrics.flush()
        print("done", flush=True)
    elif order == "serve":
        metrics.serving({n: {}}); metrics.flush(); print("done", flush=True)
    elif order == "page":
        print(metrics.page().decode().replace("\\n", "\\x1f"), flush=True)
    elif order == "totals":
        metrics.log_failed("predictions", int(n)); print(*metrics.totals().values(), flush=True)
    elif order == "end":
        metrics.end(); print("done", flush=True)
"""


class Worker:
    def __init__(self, folder, model):
        self.process = subprocess.Popen([sys.executable, "-c", WORKER, str(folder), model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, order: str) -> str:
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return next_line(self.process).strip("\n")

    def page(self) -> dict:
        return read(self.ask("page").replace("\x1f", "\n").encode())

    def kill(self):
        self.process.kill()
        self.process.communicate(timeout=120)


@pytest.fixture
def workers(tmp_path):
    started = []

    def start(model: str = "shelf@1") -> Worker:
        started.append(Worker(tmp_path / "figures", model))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def test_any_worker_answers_for_all_also_after_one_was_killed(workers):
    three = [workers() for _ in range(3)]
    for worker, n in zip(three, (100, 20, 3)):
        worker.ask(f"answer {n}")
    for worker in three:
        page = worker.page()
        assert value(page, "mlops_requests_total", route="/predict", model="shelf@1", status="200") == 123 == value(page, "mlops_queue_rows")
        assert value(page, "mlops_request_seconds_count") == 123 and value(page, "mlops_request_seconds_sum") == pytest.approx(123 * 0.003)
        assert value(page, "mlops_rows_total") == 246 and value(page, "mlops_rejected_total") == 3 == value(page, "mlops_workers") and value(page, "mlops_model_info") == 1
    assert [worker.ask(f"totals {n}") for worker, n in zip(three, (5, 0, 2))] == ["123 5", "123 5", "123 7"], "the health page adds up the same"
    before = page
    three[0].kill()
    for worker in three[1:]:
        page = worker.page()
        assert value(page, "mlops_requests_total") == 123 and value(page, "mlops_rows_total") == 246 and value(page, "mlops_rejected_total") == 3, "counters never go back"
        assert value(page, "mlops_queue_rows") == 23 and value(page, "mlops_workers") == 2, "what was true of the dead is not true any more"
        assert value(page, "process_cpu_seconds_total") >= value(before, "process_cpu_seconds_total")
    assert three[1].ask("totals 0") == three[2].ask("totals 0") == "123 7"
    assert value(page, "mlops_request_seconds_sum") >= value(before, "mlops_request_seconds_sum")
    successor = workers()
    successor.ask("answer 1000")
    for worker in (three[1], successor):
        assert value(worker.page(), "mlops_requests_total") == 1123 and value(worker.page(), "mlops_workers") == 3
    assert three[1].ask("end") == "done"
    assert value(successor.page(), "mlops_requests_total") == 1123 and value(successor.page(), "mlops_workers") == 2


def test_times_do_not_go_back_by_a_digit(tmp_path):
    "Sums of floats depend on their order: with 0.1, 0.2 and 0.3 they differ in the last digit."
    three = [Metrics(tmp_path, routes=ROUTES) for _ in range(3)]
    for metrics, seconds in zip(three, (0.1, 0.2, 0.3)):
        metrics.serving(SERVED)
        metrics.answered("/predict", "shelf@1", 200, seconds, 1)
        metrics.flush()
    seen = [value(three[2].page(), "mlops_request_seconds_sum")]
    for metrics in three[:2]:
        metrics.end()
        seen.append(value(three[2].page(), "mlops_request_seconds_sum"))
    assert seen == sorted(seen) and seen[0] == 0.6 != 0.1 + 0.2 + 0.3
    three[2].end()


def test_a_folder_that_cannot_be_read_leaves_a_worker_its_own_sums(tmp_path):
    one, other = (Metrics(tmp_path, routes=ROUTES) for _ in range(2))
    for metrics in (one, other):
        metrics.answered("/predict", "", 200, 0.001, 1)
        metrics.log_failed("access", 9)  # the access log is another log
        metrics.flush()
    assert one.totals() == {"answered": 2, "log_errors": 0} == Metrics(tmp_path).totals()
    (tmp_path / "all.lock").unlink()
    (tmp_path / "all.lock").mkdir()
    assert one.totals() == {"answered": 1, "log_errors": 0}
    for metrics in (one, other):
        metrics.end()


def test_generations_of_workers_leave_no_heap_of_files(workers, tmp_path):
    reader = workers()
    for n in range(4):
        worker = workers()
        worker.ask("answer 10")
        worker.kill()
        assert value(reader.page(), "mlops_requests_total") == 10 * (n + 1)
    assert {path.name for path in (tmp_path / "figures").iterdir() if not path.name.startswith(str(reader.process.pid))} == {"all.lock", "all.past"}


def test_killed_while_it_put_the_dead_away(workers, tmp_path):
    "The dead's numbers were added up and their file was not yet removed."
    reader, worker = workers(), workers()
    worker.ask("answer 10")
    (file,) = (tmp_path / "figures").glob(f"{worker.process.pid}-*.json")
    content = file.read_bytes()
    worker.kill()
    assert value(reader.page(), "mlops_requests_total") == 10 and not file.exists()
    file.write_bytes(content)
    for _ in range(2):
        assert value(reader.page(), "mlops_requests_total") == 10


def test_a_file_emptied_by_a_power_cut_spoils_no_page(workers, tmp_path):
    reader, worker = workers(), workers()
    worker.ask("answer 10")
    reader.ask("answer 5")
    (file,) = (tmp_path / "figures").glob(f"{worker.process.pid}-*.json")
    file.write_bytes(b"")
    (tmp_path / "figures" / "77-abcd.json").write_bytes(b"{")
    assert value(reader.page(), "mlops_requests_total") == 5
    (tmp_path / "figures" / "all.past").write_bytes(b"")
    worker.ask("answer 1")
    assert value(reader.page(), "mlops_requests_total") == 16


def test_a_version_is_retired_by_all_workers(workers):
    one, other = workers(), workers()
    one.ask("answer 7")
    other.ask("answer 7")
    for worker in (one, other):
        worker.ask("serve shelf@2")
        assert value(one.page(), "mlops_requests_total", model="shelf@1") == 14
    third = workers("shelf@2")  # knows nothing of the old version: its series ends, and does not go back to a part
    assert [value(worker.page(), "mlops_requests_total", model="shelf@1") for worker in (third, one, other)] == [0, 0, 0]


def test_counters_never_go_back_while_workers_come_and_go(workers):
    reader, total, seen = workers(), 0, [0.0]
    for n in range(5):
        worker = workers()
        worker.ask(f"answer {n + 1}")
        total += n + 1
        os.kill(worker.process.pid, signal.SIGTERM)
        until(lambda: seen.append(value(reader.page(), "mlops_requests_total")) or worker.process.poll() is not None)
        seen.append(value(reader.page(), "mlops_requests_total"))
        assert seen == sorted(seen) and seen[-1] == total


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    metrics = Metrics(tmp_path / "figures", routes=ROUTES)
    metrics.serving(SERVED)
    metrics.flush()
    moved = (tmp_path / "figures").rename(tmp_path / "moved")
    for _ in range(3):
        metrics.answered("/predict", "shelf@1", 200, 0.001, 1)
        metrics.flush()
    assert len(caplog.records) == 1 and "counted on" in caplog.text
    moved.rename(tmp_path / "figures")
    assert value(metrics.page(), "mlops_requests_total") == 3
    metrics.end()


def test_importing_starts_nothing():
    code = "import sys, threading; import mlops_nb.serve.access, mlops_nb.serve.observe; print(threading.active_count(), 'prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout.split() == ["1", "False"]


# a line a request

KEYS = ["request", "trace", "method", "route", "model", "status", "seconds", "rows", "token"]


def saw(log, n=0, status=200, payload=b"", route="/predict"):
    log.saw(f"request-{n}", "", "POST", route, "shelf@1", status, 0.00123456789, 2, "shop", payload)


def lines(*paths) -> list[dict]:
    return [json.loads(line) for path in paths if path.exists() for line in path.read_bytes().splitlines()]


def rotated(path) -> list:
    return sorted(one for one in path.parent.iterdir() if one.name.startswith(path.name) and not one.name.endswith(".lock"))


def test_a_line_says_what_happened(tmp_path):
    path = tmp_path / "logs" / "access.jsonl"
    log = AccessLog(path)
    log.saw("r1", "4bf92f3577b34da6a3ce929d0e0e4736", "POST", "/predict", "shelf@1", 200, 0.00123456789, 2, "shop", b"SECRET")
    saw(log, 2, status=500)
    log.end(60)
    first, second = lines(path)
    assert first.pop("at").endswith("Z") and first == dict(zip(KEYS, ["r1", "4bf92f3577b34da6a3ce929d0e0e4736", "POST", "/predict", "shelf@1", 200, 0.001235, 2, "shop"]))
    assert "trace" not in second and second["status"] == 500 and b"SECRET" not in path.read_bytes()
    assert os.name != "posix" or path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("route", ['/"}\n{"status": 200, "x": "', "/\udcff\ud800", "/" + "x" * 5000, "/‮\x00\x1b[31m", "/Größe"])
def test_no_path_breaks_a_line(tmp_path, route):
    path = tmp_path / "access.jsonl"
    log = AccessLog(path)
    saw(log, route=route)
    saw(log, 1)
    log.end(60)
    assert [line["request"].strip("'") for line in lines(path)] == ["request-0", "request-1"] and path.stat().st_size < 2000
    assert b"\x1b" not in path.read_bytes()


def test_off_is_off(tmp_path):
    log = AccessLog()
    saw(log)
    log.end()
    assert log.thread is None and not log.queue


def test_errors_are_written_all_and_the_rest_by_sample(tmp_path):
    path = tmp_path / "access.jsonl"
    log = AccessLog(path, sample=0.1)
    for n in range(4000):
        saw(log, n, status=500 if n % 100 == 0 else 200)
    log.end(60)
    written = lines(path)
    good = sum(line["status"] == 200 for line in written)
    assert sum(line["status"] == 500 for line in written) == 40 and abs(good - 396) < 5 * (3960 * 0.1 * 0.9) ** 0.5  # five sigma of a binomial
    for wrong in ({"sample": 2}, {"file_mb": 0}, {"files": 0}):
        with pytest.raises(Invalid, match="access log wants"):
            AccessLog(path, **wrong)


PAYLOADS = [
    (b'{"records": [{"country": "France"}]}', {"records": [{"country": "France"}]}),
    (b'{"password": "hunter22", "api_key": ["k1"], "n": 3}', {"password": "‹password›", "api_key": "‹api_key›", "n": 3}),
    (b'{"note": "it is Tr0ub4dor-and-3, you know"}', {"note": "it is ‹SHOP_TOKEN›, you know"}),
    (b'{"dataframe_split": {"columns": ["country", "client_secret"], "data": [["France", "hunter22"]]}}', "‹rows with client_secret›"),
    (b"country,client_secret\nFrance,hunter22", "‹rows with client_secret›"),
    (b'{"password": "hunter22', '{"password": "‹password›"'),
    (b'{"client_secret": ["hunter22", "hun', '{"client_secret": "‹client_secret›"'),
    (b"\xff\xfe", "\ufffd\ufffd"),
]


@pytest.mark.parametrize("payload, written", PAYLOADS)
def test_a_payload_holds_no_secret(tmp_path, monkeypatch, payload, written):
    monkeypatch.setenv("SHOP_TOKEN", "Tr0ub4dor-and-3")
    path = tmp_path / "access.jsonl"
    log = AccessLog(path, payloads=True)
    saw(log, payload=payload)
    log.end(60)
    assert lines(path)[0]["payload"] == written


@pytest.mark.parametrize("before", range(4070, 4100))
def test_a_payload_is_not_cut_inside_a_secret(before):
    redactor = Redactor({"SHOP_TOKEN": "Tr0ub4dor-and-3"})
    payload = (b"x" * before + b"Tr0ub4dor-and-3 and more")[:4096]
    assert "Tr0u" not in payload_of(redactor, payload) and len(payload_of(redactor, payload)) < 4200


@pytest.mark.parametrize("payload", [b"[" * 4000, b"[" * 900 + b"]" * 900, b'{"a":' * 300 + b"1" + b"}" * 300, b"9" * 400, b'"' * 4096, b'"a":' * 1024, b"\x00" * 4096, b'"password":' * 300])
def test_no_payload_stops_the_log(tmp_path, payload):
    path = tmp_path / "access.jsonl"
    log = AccessLog(path, payloads=True)
    saw(log, payload=payload)
    saw(log, 1)
    log.end(20)
    assert [line["request"] for line in lines(path)] == ["request-0", "request-1"] and path.stat().st_size < 40_000


def test_the_files_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("mlops_nb.serve.logs.PAUSE_S", 0.01)
    path = tmp_path / "access.jsonl"
    log = AccessLog(path, file_mb=0.02, files=3)
    for batch in range(12):
        for n in range(100):
            saw(log, batch * 100 + n)
        assert within(60, lambda: path.exists() and f'"request-{batch * 100 + 99}"'.encode() in path.read_bytes())
    log.end(60)
    files = rotated(path)
    assert [one.name for one in files] == ["access.jsonl", "access.jsonl.1", "access.jsonl.2"] and sum(one.stat().st_size for one in files) < 3 * (20_000 + 15_000 + 200)
    written = [line["request"] for one in reversed(files) for line in lines(one)]
    assert written == [f"request-{n}" for n in range(1200)][-len(written):] and log.dropped == 0, "the newest, whole and in order"


def within(seconds: float, true) -> bool:
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


MANY = """
import sys, time
from mlops_nb.serve import logs
logs.PAUSE_S = 0.01
log = logs.AccessLog(sys.argv[1], file_mb=0.05, files=50)
for n in range(3000):
    log.saw(f"{sys.argv[2]}-{n}", "", "POST", "/predict", "shelf@1", 200, 0.001, 2, "shop")
    while n % 100 == 0 and log.queue: time.sleep(0.001)
log.end(60)
print(log.dropped)
"""


def test_processes_share_a_file_and_turn_it_over(tmp_path):
    path = tmp_path / "access.jsonl"
    running = [subprocess.Popen([sys.executable, "-c", MANY, str(path), f"p{n}"], stdout=subprocess.PIPE, text=True) for n in range(3)]
    assert [one.communicate(timeout=300)[0].strip() for one in running] == ["0", "0", "0"]
    files = rotated(path)
    requests = [line["request"] for line in lines(*files)]
    assert len(requests) == len(set(requests)) == 9000 and len(files) > 3


def test_a_log_moved_away_is_begun_anew(tmp_path):
    path = tmp_path / "access.jsonl"
    log = AccessLog(path)
    saw(log, 1)
    assert within(60, lambda: len(lines(path)) == 1)
    path.rename(tmp_path / "old")
    saw(log, 2)
    log.end(60)
    assert [line["request"] for line in lines(tmp_path / "old")] == ["request-1"] and [line["request"] for line in lines(path)] == ["request-2"]


@posix
def test_a_pipe_that_nobody_reads_stops_nothing():
    "The log goes to the standard output, which is full; requests go on and lines are counted as lost."
    code = ("import sys\nfrom mlops_nb.serve.logs import AccessLog\nlog = AccessLog('-')\n"
            "for n in range(60_000): log.saw('r' * 60, '', 'POST', '/predict', 'shelf@1', 200, 0.001, 2, 'shop')\nlog.end(0.5)\n"
            "print(log.lost + log.dropped > 30_000, len(log.queue) <= 10_000, file=sys.stderr)")
    ran = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert ran.wait(300) == 0 and ran.stderr.read().split() == ["True", "True"]
    ran.stdout.close()
    ran.stderr.close()


@posix
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_said_once_and_counted(tmp_path, caplog):
    (tmp_path / "access.jsonl").symlink_to("/dev/full")
    told = []
    log = AccessLog(tmp_path / "access.jsonl", on_drop=told.append)
    for n in range(3):
        saw(log, n)
        assert within(60, lambda: log.dropped == n + 1)
    (tmp_path / "access.jsonl").unlink()
    saw(log, 3)
    log.end(60)
    assert [line["request"] for line in lines(tmp_path / "access.jsonl")] == ["request-3"] and sum(told) == 3
    assert len(caplog.records) == 1 and "lines are dropped" in caplog.text


# ids and traces of others


@pytest.mark.parametrize("given, kept", [(b"order-4711", True), (b"a" * 64, True), (b"8f14e45f-ceea-467f-a34b-2e5ce1a2b3c4", True), (b"", False), (b"a" * 65, False), (b"two words", False), (b"x\ny", False),
                                         (b"<b>", False), (b'"', False), (b"\xff", False), (b"a\r\nSet-Cookie: b", False), ("ä".encode(), False)])
def test_ids_that_are_kept(given, kept):
    found = request_id(given)
    assert (found == given.decode()) if kept else (len(found) == 32 and set(found) <= set("0123456789abcdef"))


def test_ids_of_forked_workers_differ():
    code = ("import os, sys\nfrom mlops_nb.serve.logs import request_id\nrequest_id()\n"
            "for _ in range(3):\n    if os.fork() == 0:\n        os.write(1, (''.join(request_id() + '\\n' for _ in range(500))).encode()); os._exit(0)\nfor _ in range(3): os.wait()")
    if os.name == "posix":
        ids = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout.split()
        assert len(ids) == len(set(ids)) == 1500


T, P = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize("given, found", [  # the cases of the standard (W3C Trace Context, section 3.2, and its own test suite)
    (f"00-{T}-{P}-01", (T, P, True)), (f"00-{T}-{P}-00", (T, P, False)), (f"00-{T}-{P}-03", (T, P, True)), (f"cc-{T}-{P}-01", (T, P, True)), (f"cc-{T}-{P}-01-what-the-future-will-be-like", (T, P, True)),
    (f"cc-{T}-{P}-01.what", None), (f"ff-{T}-{P}-01", None), (f"00-{T}-{P}-01-extra", None), (f"00-{'0' * 32}-{P}-01", None), (f"00-{T}-{'0' * 16}-01", None), (f"00-{T.upper()}-{P}-01", None),
    (f"00-{T[1:]}-{P}-01", None), (f"00-{T}-{P}", None), (f"0-{T}-{P}-01", None), (f"00-{T}-{P}-.1", None), (f" 00-{T}-{P}-01", None), ("", None)])
def test_traceparent(given, found):
    trace = trace_of(given.encode())
    assert (trace and (trace.trace_id, trace.parent_id, trace.recorded)) == found
    if trace:
        onward = trace_of(trace.onward().encode())
        assert (onward.trace_id, onward.recorded) == (trace.trace_id, trace.recorded) and onward.parent_id != trace.parent_id
