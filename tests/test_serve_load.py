"""A real pool in a process of its own under load, under attack, and with a worker killed: who fails, and who does not."""

import asyncio
import http.client
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from patience import finished, next_line, started

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from benchmarks.serving.client import Load, request  # noqa: E402  the client that the benchmark counts with

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a pool forks")
TOKEN = "a-token-for-tests"
AUTH = {"authorization": f"Bearer {TOKEN}"}
ROW = {"pieces": 2, "price": 1.5, "country": "France", "gift": True}
RECORDS = json.dumps({"dataframe_records": [ROW]}).encode()
MB = 2**20

PROGRAM = """
import json, sys, time
from pathlib import Path
from mlops_nb.core.errors import NotFound
from mlops_nb.serve.inputs import columns_of
from mlops_nb.serve.plan import planned, write_plan
from mlops_nb.serve.server import listen
from mlops_nb.serve.sources import Version
from mlops_nb.serve.workers import answer_until_stopped

INPUTS = {"pieces": "long", "price": "double", "country": "string", "gift": "boolean"}


class Priced:
    "A model that takes its time, row by row."

    def __init__(self, row_s):
        self.row_s = row_s

    def predict(self, rows, k: int = 10):
        time.sleep(self.row_s * len(rows))
        return (rows["pieces"] * rows["price"]).to_numpy()


class Alias:
    "A source whose champion is the version that a file names."

    def __init__(self, order):
        self.file, self.row_s = Path(order["alias"]), order["row_s"]

    def resolve(self, name, selector):
        if name != "shelf" or selector not in ("champion", "1", "2"):
            raise NotFound(f"there is no {name}@{selector}.")
        return Version(name, self.file.read_text() if selector == "champion" else selector, "", columns_of(INPUTS))

    def load(self, version):
        return Priced(self.row_s)

    def stamp(self):
        return self.file.stat().st_mtime_ns


if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    write_plan(order["plan"], planned("shelf@champion"), why="a test")
    port = listen()
    answer_until_stopped(order, port, order["workers"], lambda: print(port.getsockname()[1], flush=True))
"""


@contextmanager
def pool(folder, *, workers=1, row_s=0.0, limits=None, files=0):
    "A pool of workers; its port, its process, and where its champion is named."
    folder.mkdir(exist_ok=True)
    (folder / "program.py").write_text(PROGRAM)
    (folder / "champion").write_text("1")
    order = {"source": "program:Alias", "alias": str(folder / "champion"), "plan": str(folder / "plan.json"), "token_digests": [digest(TOKEN)], "workers": workers, "row_s": row_s, "limits": limits or {}, "polite_s": 0.1, "patience_s": 3}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])}
    few = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([sys.executable, str(folder / "program.py"), json.dumps(order)], stdout=subprocess.PIPE, stderr=log, env=environment, cwd=folder, preexec_fn=few)
    try:
        said = next_line(process)
        assert said, (folder / "log").read_text()
        yield SimpleNamespace(port=int(said), process=psutil.Process(process.pid), champion=folder / "champion", log=folder / "log")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.communicate(timeout=120)


def digest(token):
    from mlops_nb.core.files import digest_of

    return digest_of(token.encode())


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "One worker that most tests share; a body has to arrive within a second."
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1]), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with pool(tmp_path_factory.mktemp("shop"), limits={"read_s": 1.0}) as found:
        yield found


def ask(port, body=RECORDS, path="/invocations", timeout=120, **headers):
    "Status and JSON answer of one request on a connection of its own."
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST" if body is not None else "GET", path, body, {"content-type": "application/json", **AUTH, **headers})
        got = connection.getresponse()
        return got.status, json.loads(got.read() or b"null")
    finally:
        connection.close()


def works(port):
    return ask(port) == (200, {"predictions": [3.0]})


def workers_of(found):
    return found.process.children()


def memory(found):
    return sum(child.memory_info().rss for child in workers_of(found))


@contextmanager
def under(load):
    "A load that goes on while the block does something."
    loop = asyncio.new_event_loop()
    threads = started(lambda: loop.run_until_complete(load.run()))
    try:
        wait_for(lambda: load.statuses[200] > 50)
        yield load
    finally:
        loop.call_soon_threadsafe(load.stop)
        finished(threads)
        loop.close()


def wait_for(happened, timeout_s=120):
    until = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


# ---------------------------------------------------------------- load
def test_ten_swaps_under_load_fail_no_request(shop):
    load = Load(shop.port, request("/invocations", RECORDS, AUTH), connections=8)
    with under(load):
        for turn in range(10):
            version = str(2 - turn % 2)
            before = load.models[f"shelf@{version}"]
            shop.champion.with_suffix(".new").write_text(version)
            shop.champion.with_suffix(".new").replace(shop.champion)
            wait_for(lambda: load.models[f"shelf@{version}"] > before)
    assert set(load.statuses) == {200} and not load.failures and not load.refused
    assert set(load.models) == {"shelf@1", "shelf@2"} and load.statuses[200] == sum(load.models.values())


def test_an_overloaded_server_answers_what_it_can_and_sends_the_rest_away(tmp_path):
    with pool(tmp_path / "busy", row_s=0.002, limits={"queue": {"requests": 8}}) as busy:
        for turn in range(2):
            with under(Load(busy.port, request("/invocations", RECORDS, AUTH), connections=80)) as load:
                wait_for(lambda: load.statuses[200] > 400 and load.statuses[429] > 400)
            before = before if turn else memory(busy)
            assert set(load.statuses) == {200, 429} and not load.failures and not load.refused and not load.bare_429
        assert memory(busy) - before < 10 * MB and works(busy.port)
        calm = asyncio.run(Load(busy.port, request("/invocations", RECORDS, AUTH), connections=4).run(0.5))
        assert set(calm.statuses) == {200}


def held_by(process, port):
    with suppress(psutil.Error):
        return {one.raddr.port for one in process.net_connections("tcp") if one.status == "ESTABLISHED" and one.laddr.port == port}
    return set()


def test_a_killed_worker_takes_only_its_own_requests_with_it(tmp_path):
    with pool(tmp_path / "pair", workers=2) as pair:
        load = Load(pair.port, request("/invocations", RECORDS, AUTH), connections=12)
        with under(load):
            victim = max(workers_of(pair), key=lambda one: len(held_by(one, pair.port)))
            survivors, held = {one.pid for one in workers_of(pair)} - {victim.pid}, len(held_by(victim, pair.port))
            victim.kill()
            wait_for(lambda: answered_by_new(pair, survivors))
            count = load.statuses[200]
            wait_for(lambda: load.statuses[200] > count + 50)
        assert held and len(load.failures) <= held and set(load.statuses) == {200} and not load.refused
        assert len(workers_of(pair)) == 2 and survivors < {one.pid for one in workers_of(pair)}
        assert "ended (signal 9)" in pair.log.read_text()


def answered_by_new(found, survivors):
    "Whether a worker that was not there before answers a connection of ours."
    connection = http.client.HTTPConnection("127.0.0.1", found.port, timeout=60)
    try:
        connection.request("GET", "/ping", headers=AUTH)
        assert connection.getresponse().read()
        mine = connection.sock.getsockname()[1]
        return any(mine in held_by(one, found.port) for one in workers_of(found) if one.pid not in survivors)
    finally:
        connection.close()


# ---------------------------------------------------------------- hostile clients
def connected(port, said=b""):
    made = socket.create_connection(("127.0.0.1", port), timeout=20)
    if said:
        made.sendall(said)
    return made


def rest_of(made):
    "What still comes until the other side closes."
    text = b""
    with suppress(OSError):
        while part := made.recv(65536):
            text += part
    return text


def test_slow_clients_keep_nobody_waiting_and_are_sent_away(shop):
    head = request("/invocations", RECORDS, AUTH)[: -len(RECORDS)]
    headers, bodies = [connected(shop.port, head[:20]) for _ in range(150)], [connected(shop.port, head + RECORDS[:5]) for _ in range(150)]
    trickling = True

    def trickle():
        while trickling:
            for made, part in [(one, b"x-a: b\r\n"[:1]) for one in headers] + [(one, b" ") for one in bodies]:
                with suppress(OSError):
                    made.send(part)
            time.sleep(0.2)

    threads = started(trickle)
    try:
        assert all(works(shop.port) for _ in range(20))
        answers = [rest_of(made) for made in bodies]
        assert all(b" 408 " in answer.split(b"\r\n")[0] and b"did not arrive within 1 s" in answer for answer in answers), Counter(answer.split(b"\r\n")[0] for answer in answers)
        assert all(works(shop.port) for _ in range(20))
        assert all(b" 200 " not in rest_of(made) for made in headers)  # the server closes them after ten seconds
    finally:
        trickling = False
        finished(threads)
        for made in headers + bodies:
            made.close()
    assert works(shop.port)


def test_huge_bodies_are_refused_before_they_are_taken_in(shop):
    open_ended = {**AUTH, "content-type": "application/json"}
    for turn in range(30):
        if turn == 10:
            before = memory(shop)
        with connected(shop.port, request("/invocations", b"", {**open_ended, "content-length": str(10**12)}).replace(b"GET", b"POST", 1)) as made:
            assert b" 413 " in made.recv(65536).split(b"\r\n")[0]
        with connected(shop.port, request("/predict", b"", {**open_ended, "transfer-encoding": "chunked"}).replace(b"GET", b"POST", 1)) as made:
            with suppress(OSError):
                for _ in range(200):  # 20 MB
                    made.sendall(b"%x\r\n" % 100_000 + b" " * 100_000 + b"\r\n")
            assert b" 413 " in rest_of(made).split(b"\r\n")[0]
    assert memory(shop) - before < 60 * MB and works(shop.port)  # 400 MB more were sent


def test_a_client_that_says_it_is_done_still_gets_an_answer_or_an_end(shop):
    with connected(shop.port, request("/invocations", RECORDS, AUTH)) as made:
        made.shutdown(socket.SHUT_WR)
        answer = rest_of(made)
        assert not answer or b" 200 " in answer.split(b"\r\n")[0]
    for cut in (5, 30, len(request("/invocations", RECORDS, AUTH)) - 3):
        with connected(shop.port, request("/invocations", RECORDS, AUTH)[:cut]) as made:
            made.shutdown(socket.SHUT_WR)
            assert b" 200 " not in (answer := rest_of(made)) and b" 500 " not in answer
    for _ in range(100):  # gone before the answer
        connected(shop.port, request("/invocations", RECORDS, AUTH)).close()
    wait_for(lambda: works(shop.port))  # theirs may fill the queue for a moment


def test_pipelined_requests_are_answered_in_order(shop):
    bodies = [json.dumps({"dataframe_records": [{**ROW, "pieces": i}]}).encode() for i in range(20)]
    with connected(shop.port, b"".join(request("/invocations", body, AUTH) for body in bodies) + request("/ping", headers={**AUTH, "connection": "close"})) as made:
        answers = [json.loads(part.partition(b"\r\n\r\n")[2]) for part in rest_of(made).split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert [one["predictions"] for one in answers[:-1]] == [[i * 1.5] for i in range(20)] and answers[-1]["status"] == "healthy"


def test_thousands_of_idle_connections_keep_nobody_out(shop):
    idle = [connected(shop.port) for _ in range(1000)] + [connected(shop.port, request("/ping", headers=AUTH)) for _ in range(1000)]
    try:
        assert all(works(shop.port) for _ in range(20))
        assert all(still_open(made) for made in idle)  # nobody had to go first
    finally:
        for made in idle:
            made.close()
    (worker,) = workers_of(shop)
    wait_for(lambda: worker.num_fds() < 200)
    assert works(shop.port)


def still_open(made):
    made.setblocking(False)
    with suppress(BlockingIOError):
        return made.recv(65536) != b""  # an answer, or the end
    return True


def test_a_server_out_of_file_descriptors_recovers(tmp_path):
    with pool(tmp_path / "few", files=200) as few:
        crowd = []
        with suppress(OSError):
            for _ in range(400):
                crowd.append(connected(few.port))
        time.sleep(0.5)
        for made in crowd:
            made.close()
        wait_for(lambda: answers_at_all(few.port))
        assert works(few.port)


def answers_at_all(port):
    with suppress(OSError, http.client.HTTPException):
        return ask(port, timeout=20)[0] == 200
    return False


# ---------------------------------------------------------------- fuzz
ROUTES = ["/predict", "/predict?explain=true", "/predict?top=2", "/invocations", "/models/shelf/predict", "/models/shelf/invocations", "/models/x/predict", "/v2/models/shelf/infer", "/v2/models/shelf/versions/1/infer",
          "/admin/traffic", "/admin/shadow", "/admin/rollback"]
V2 = {"id": "1", "inputs": [{"name": name, "shape": [1], "datatype": kind, "data": [ROW[name]]} for name, kind in (("pieces", "INT64"), ("price", "FP64"), ("country", "BYTES"), ("gift", "BOOL"))]}
SEEDS = [(json.dumps(body).encode(), paths) for body, paths in (
    ([ROW], ROUTES[:3]), ({"records": [ROW], "params": {"k": 3}}, ROUTES[:3]), ({"dataframe_split": {"columns": list(ROW), "data": [list(ROW.values())]}}, ROUTES[3:4]), ({"dataframe_records": [ROW] * 9}, ROUTES[3:4]),
    ({"instances": [ROW]}, ROUTES[5:6]), ({"inputs": {name: [value] for name, value in ROW.items()}}, ROUTES[5:6]), (V2, ROUTES[7:9]), ({"model": "shelf", "traffic": {"champion": 50, "2": 60}}, ROUTES[9:10]),
    ({"selector": "2", "percent": 500}, ROUTES[10:11]))] + [(b"pieces,price,country,gift\n2,1.5,France,true\n", ROUTES[3:4])]
ODD = [None, True, -1, 0, 2**63, 2**70, 1e308, -0.0, "", "\u0000", "é" * 50, "a" * 5000, [], {}, [[]], [{}], {"": None}, [1, [2]], "NaN", {"a": {"b": {"c": []}}}, ["x"] * 300]
KINDS = ["application/json", "application/json", "application/json; charset=utf-8", "text/csv", "text/plain", "application/octet-stream", "multipart/form-data; boundary=x", "", "application/json; charset=utf-16"]


def replaced(value, chance):
    "The same structure with something odd in one place or another."
    if chance.random() < 0.15:
        return chance.choice(ODD)
    if isinstance(value, dict):
        return {chance.choice([key, key, key, key, "odd", ""]): replaced(one, chance) for key, one in value.items()}
    if isinstance(value, list):
        return [replaced(one, chance) for one in value] * chance.choice([1, 1, 1, 0, 2])
    return value


def spoilt(chance):
    "A body that is probably wrong, its path and its headers."
    seed, paths = chance.choice(SEEDS)
    aimed = chance.random() < 0.7
    way = chance.randrange(5)
    if way == 0:
        body = chance.randbytes(chance.randrange(200))
    elif way == 1:
        body = bytearray(seed)
        for _ in range(chance.randint(1, 6)):
            body[chance.randrange(len(body))] = chance.randrange(256)
    elif way == 2:
        body = seed[: chance.randrange(len(seed))] + chance.choice([b"", b"}", b"]" * 3, b"[" * 3000, seed])
    else:
        body = json.dumps(replaced(json.loads(seed), chance)).encode() if seed[:1] in b"[{" else seed * chance.randrange(3)
    headers = {"content-type": ("application/json" if seed[:1] in b"[{" else "text/csv") if aimed else chance.choice(KINDS)}
    if chance.random() < 0.2:
        headers["inference-header-content-length"] = chance.choice(["0", "-1", "9999999", "x", str(len(seed) // 2), "1e3"])
    if chance.random() < 0.1:
        headers[chance.choice(["x-request-id", "traceparent", "x-mlops-key", "accept", "content-encoding", "expect"])] = chance.choice(["", "a" * 3000, "00-0-0-0", "gzip", "é".encode().decode("latin-1")])
    return bytes(body), chance.choice(paths if aimed else ROUTES), headers


def test_a_fuzz_of_bodies_gets_4xx_and_leaves_no_memory_behind(shop):
    chance, answers, connection = random.Random(0), Counter(), http.client.HTTPConnection("127.0.0.1", shop.port, timeout=120)
    for turn in range(4000):
        if turn == 1000:
            before = memory(shop)
        body, path, headers = spoilt(chance)
        connection.request("POST", path, body, {**AUTH, **headers})
        got = connection.getresponse()
        content = got.read()
        answers[got.status] += 1
        assert got.status == 200 or 400 <= got.status < 500, (got.status, path, headers, body[:300], content[:300])
        if got.status != 200:
            said = json.loads(content)["error"]
            assert said and "Traceback" not in said and len(said) < 1500, content[:300]
    connection.close()
    assert answers[200] > 10 and answers[422] > 100 and min(answers[400], answers[415]) > 500, answers
    assert memory(shop) - before < 25 * MB and ask(shop.port)[0] == 200


HEADS = [b"", b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST /invocations\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"G\x00T / HTTP/1.1\r\nhost: a\r\n\r\n",
         b"GET /\xff HTTP/1.1\r\nhost: a\r\n\r\n", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 300 + b"\r\n", b"GET / HTTP/1.1\r\na: " + b"b" * 500_000 + b"\r\n\r\n",
         b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: -5\r\n\r\n", b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcdef", b"GET / HTTP/1.1\r\nhost: a\r\n b: c\r\n\r\n",
         b"POST /predict HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", b"POST /predict HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n", b"GET / HTTP/1.1\r\nhost: a\r\nb\r\n\r\n",
         b"BREW /predict HTTP/1.1\r\nhost: a\r\n\r\n", b"GET http://[::1 HTTP/1.1\r\nhost: a\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n"]


def test_a_fuzz_of_heads_gets_4xx_or_an_end(shop):
    chance, good = random.Random(1), request("/invocations", RECORDS, AUTH)
    for turn in range(600):
        said = HEADS[turn] if turn < len(HEADS) else bytearray(good)
        if turn >= len(HEADS):
            for _ in range(chance.randint(1, 5)):
                said[chance.randrange(len(good) - len(RECORDS))] = chance.randrange(256)
        with connected(shop.port) as made:
            with suppress(OSError):
                made.sendall(bytes(said))
                made.shutdown(socket.SHUT_WR)
            answer = rest_of(made)
            status = answer.split(b" ")[1:2] or [b""]
            assert status[0][:1] in (b"", b"2", b"4"), (bytes(said)[:200], answer[:300])
    assert works(shop.port)
