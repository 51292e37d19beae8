"""A model behind HTTP: requests and rows a second, waiting times, memory and cold start beside the peers; then swaps, overload and a killed worker of ours alone.

The peers are where MLOPS_BENCH_PEERS says, each in an environment of its own (mlflow, vetiver, bentoml, litserve, and bare with granian, uvloop and orjson; each with joblib, pandas and our
scikit-learn); one that is absent is left out with a word. wrk makes the load; where it is absent an asyncio client of ours does, which is slower and says so. MLOPS_BENCH_ROUNDS (3) and
MLOPS_BENCH_SECONDS (5, each measurement) say how long it takes: about nine minutes as it is.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from benchmarks.measure import PYTHON, Figure, record
from benchmarks.serving.client import Load, request
from benchmarks.serving.model import customers, fitted
from benchmarks.serving.processes import Server, answered, memory_mb, tree

ROUNDS, SECONDS = int(os.environ.get("MLOPS_BENCH_ROUNDS", 3)), float(os.environ.get("MLOPS_BENCH_SECONDS", 5))
OVERLOAD_S = float(os.environ.get("MLOPS_BENCH_OVERLOAD", 60))
CONNECTIONS, HERE = 16, Path(__file__).parent / "serving"
TIMES = {"mlflow": 20, "vetiver": 5, "bentoml": 5, "bentoml batching": 5, "litserve": 3, "litserve batching": 3, "bare ASGI": 1.5}  # requests/s, ours to theirs
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "BENTOML_DO_NOT_TRACK": "true", "PYTHONDONTWRITEBYTECODE": ""}

WRK = """
local file = io.open("%s"); wrk.method = "POST"; wrk.body = file:read("*a"); file:close()
%s
done = function(summary, latency, requests)
  io.write(string.format('{"requests": %%d, "us": %%d, "p50": %%d, "p99": %%d, "refused": %%d, "broken": %%d}\\n', summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    summary.errors.status, summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout))
end
"""


# ---------------------------------------------------------------- who is compared
def split_of(columns: list[str], rows: list[list]) -> bytes:
    return json.dumps({"dataframe_split": {"columns": columns, "data": rows}}).encode()


def records_of(columns: list[str], rows: list[list]) -> list[dict]:
    return [dict(zip(columns, row)) for row in rows]


def saved(folder: Path) -> dict:
    "The model in the forms that the peers want, and rows to ask about."
    import joblib
    import mlflow
    from mlflow.models import infer_signature

    frame, spent = customers()
    model = fitted(frame, spent)
    joblib.dump(model, folder / "model.joblib")
    mlflow.sklearn.save_model(model, str(folder / "mlflow"), signature=infer_signature(frame, model.predict(frame)), serialization_format="cloudpickle")
    (folder / "rows.json").write_text(json.dumps({"columns": list(frame), "data": frame.head(5).to_numpy().tolist()}))
    many = frame.sample(1000, replace=True, random_state=0).to_numpy().tolist()
    return {"frame": frame, "spent": spent, "model": model, "columns": list(frame), "one": many[:1], "many": many}


def peers(folder: Path) -> Iterator[Server]:
    "The servers of others that are installed."
    place = Path(os.environ.get("MLOPS_BENCH_PEERS", "/nowhere"))
    environment = {**QUIET, "MODEL": str(folder / "model.joblib"), "ROWS": str(folder / "rows.json")}

    def at(name: str, tool: str = "python") -> str:
        return str(place / name / "bin" / tool)

    def one(name: str, command: Callable[[int], list[str]], path: str, body: Callable, **more: object) -> Server:
        environment_of = {**environment, "PATH": f"{place / name.split()[0] / 'bin'}:{os.environ['PATH']}", **more.pop("environment", {})}
        return Server(name, command, path, body, environment=environment_of, folder=str(folder), log=str(folder / f"{name}.log"), **more)

    found = [
        one("mlflow", lambda port: [at("mlflow", "mlflow"), "models", "serve", "-m", str(folder / "mlflow"), "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"], "/invocations", split_of),
        one("vetiver", lambda port: [at("vetiver"), str(HERE / "vet.py"), str(port)], "/predict", lambda columns, rows: json.dumps(records_of(columns, rows)).encode()),
        one("bentoml", lambda port: [at("bentoml", "bentoml"), "serve", "bento:Customers", "--working-dir", str(HERE), "--host", "127.0.0.1", "--port", str(port)], "/predict",
            lambda columns, rows: json.dumps({"rows": records_of(columns, rows)}).encode(), ping="/readyz", environment={"BENTOML_HOME": str(folder / "bentoml")}),
        one("litserve", lambda port: [at("litserve"), str(HERE / "lit.py"), str(port)], "/predict", lambda columns, rows: json.dumps({"row": records_of(columns, rows)[0]}).encode(), ping="/health"),
        one("bentoml batching", lambda port: [at("bentoml", "bentoml"), "serve", "bento:Customers", "--working-dir", str(HERE), "--host", "127.0.0.1", "--port", str(port)], "/shared",
            lambda columns, rows: json.dumps({"rows": records_of(columns, rows)}).encode(), ping="/readyz", environment={"BENTOML_HOME": str(folder / "bentoml")}),
        one("litserve batching", lambda port: [at("litserve"), str(HERE / "lit.py"), str(port)], "/predict", lambda columns, rows: json.dumps({"row": records_of(columns, rows)[0]}).encode(), ping="/health", environment={"BATCH": "16"}),
        one("bare ASGI", lambda port: [at("bare", "granian"), "--interface", "asginl", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--loop", "uvloop", "--http", "1", "--no-ws", "--no-log",
                                       "--working-dir", str(HERE), "bare:app"], "/invocations", split_of),
    ]
    for server in found:
        if (place / server.name.split()[0] / "bin" / "python").exists():
            yield server
        elif "batching" not in server.name:
            print(f"{server.name} is left out: MLOPS_BENCH_PEERS names no folder with {server.name.split()[0]}/bin/python.")


# ---------------------------------------------------------------- ours, as a user has it
def project_with(folder: Path, found: dict) -> Path:
    "A project whose registry holds the model twice, the first version being the champion."
    from mlops_nb.core.settings import in_project, init
    from mlops_nb.model.registry import promote, register

    place = init(str(folder / "shop"), name="shop").folder
    with in_project(place):
        for alpha in (1.0, 2.0):
            register(fitted(found["frame"], found["spent"], alpha), "customers", example=found["frame"].head(5))
        promote("customers@1")
    return place


@contextmanager
def deployed(place: Path, name: str, workers: int = 1) -> Iterator[Server]:
    "The deployment of the champion: checks of the input, prediction log and metrics are on."
    from mlops_nb.core.settings import in_project
    from mlops_nb.deploy.deployments import deploy, undeploy
    from mlops_nb.deploy.tokens import token_of

    with in_project(place):
        made = deploy("customers@champion", name=name, to="local", replicas=workers)
        server = Server("ours", lambda port: [], "/invocations", split_of, headers={"authorization": f"Bearer {token_of(name)}"}, port=int(made.url.rpartition(":")[2]), pid=made.pid)
    try:
        yield server
    finally:
        server.rest(False)
        with in_project(place):
            undeploy(name)


def foreground(place: Path) -> Server:
    "`mlops serve`, for the cold start."
    return Server("mlops serve", lambda port: [str(Path(PYTHON).with_name("mlops")), "--project", str(place), "serve", "customers@champion", "--workers", "1", "--port", str(port)], "/invocations", split_of,
                  headers={"authorization": "Bearer of-the-benchmark"}, environment={**QUIET, "MLOPS_TOKEN": "of-the-benchmark"}, folder=str(place), log=str(place / "serve.log"))


# ---------------------------------------------------------------- load
def asked(server: Server, found: dict, rows: str) -> dict:
    "One measurement: requests/s, milliseconds at 50 and 99%, and the memory in the middle of it."
    body = server.body(found["columns"], found[rows])
    with ThreadPoolExecutor(1) as beside:
        memory = beside.submit(lambda: time.sleep(SECONDS / 2) or memory_mb(server.pid))
        told = (wrk if shutil.which("wrk") else plain)(server, body)
    if told["refused"] or told["broken"]:
        print(f"{server.name} refused {told['refused']} and broke {told['broken']} of {told['requests']} requests; only the others count.")
    return {"rate": (told["requests"] - told["refused"]) / told["us"] * 1e6, "p50": told["p50"] / 1e3, "p99": told["p99"] / 1e3, "memory": memory.result()}


def wrk_command(server: Server, body: bytes, folder: str, connections: int, seconds: float) -> list[str]:
    Path(folder, "body").write_bytes(body)
    headers = {"content-type": "application/json", **server.headers}
    Path(folder, "wrk.lua").write_text(WRK % (Path(folder, "body"), "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in headers.items())))
    return ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s", "-s", str(Path(folder, "wrk.lua")), f"http://127.0.0.1:{server.port}{server.path}"]


def wrk(server: Server, body: bytes, connections: int = CONNECTIONS, seconds: float = SECONDS) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(wrk_command(server, body, folder, connections, seconds), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def plain(server: Server, body: bytes, connections: int = CONNECTIONS, seconds: float = SECONDS) -> dict:
    load = asyncio.run(Load(server.port, request(server.path, body, server.headers), connections).run(seconds))
    return {"requests": sum(load.statuses.values()), "us": load.took_s * 1e6, "p50": load.percentile(0.5) * 1e6, "p99": load.percentile(0.99) * 1e6, "refused": sum(load.statuses.values()) - load.statuses[200],
            "broken": len(load.failures)}


def awake(server: Server, others: list[Server]) -> None:
    "Only this one runs."
    for one in others:
        one.rest(one is not server)


# ---------------------------------------------------------------- beside the peers
def compared(ours: Server, others: list[Server], found: dict) -> list[Figure]:
    "All in turn, some rounds; the medians of the ratios."
    taken: dict[tuple[str, str], list[dict]] = {}
    servers, load = [ours, *others], wrk if shutil.which("wrk") else plain
    for rows in ("one", "many"):  # the memory of those that are asked for single rows is not that of thousands
        asked_for = [one for one in servers if rows == "one" or one.name in ("ours", "mlflow", "bare ASGI")]
        for turn in range(ROUNDS + 1):
            for server in asked_for:
                awake(server, servers)
                if turn:
                    taken.setdefault((server.name, rows), []).append(asked(server, found, rows))
                else:
                    load(server, server.body(found["columns"], found[rows]), seconds=1)
    for one in servers:
        one.rest(False)
    middle = {key: {what: statistics.median(one[what] for one in all_of) for what in all_of[0]} for key, all_of in taken.items()}
    for (name, rows), one in middle.items():
        print(f"{name:<20}{rows:<6}{one['rate']:>9,.0f} requests/s   p50 {one['p50']:>8.2f} ms   p99 {one['p99']:>8.2f} ms   {one['memory']:>6.0f} MB")

    def ratio(name: str, rows: str, what: str) -> float:
        return statistics.median(a[what] / b[what] for a, b in zip(taken["ours", rows], taken[name, rows]))

    def against(promise: str, name: str, rows: str, what: str, unit: str, *, times: float = 0, of_it: float = 0, scale: float = 1) -> Figure:
        it = ratio(name, rows, what)
        target, kept = (f"at least {times:g} times", it >= times) if times else (f"at most {of_it:g} of it", it <= of_it)
        return Figure(promise, middle["ours", rows][what] * scale, name, middle[name, rows][what] * scale, it, target, kept, unit)

    figures = [against("one row a request, 16 connections", server.name, "one", "rate", "requests/s", times=TIMES[server.name]) for server in others]
    names = {server.name for server in others}
    if "mlflow" in names:
        figures += [against("the same, 99% within", "mlflow", "one", "p99", "ms", of_it=0.1), against("1,000 rows a request", "mlflow", "many", "rate", "rows/s", times=3, scale=1000),
                    against("memory under load", "mlflow", "one", "memory", "MB", of_it=0.7), against("the same, with 1,000 rows a request", "mlflow", "many", "memory", "MB", of_it=0.7)]
    return figures


def cold(place: Path, mlflow: Server | None) -> Figure:
    "From the command to the first answer of /ping."
    times: dict[str, list[float]] = {"ours": [], "mlflow": []}
    for turn in range(ROUNDS + 1):
        for name, server in (("ours", foreground(place)), ("mlflow", mlflow)):
            if server is not None:
                taken = server.start()
                server.stop()
                if turn:
                    times[name].append(taken)
    ours = statistics.median(times["ours"])
    if mlflow is None:
        return Figure("cold start of `mlops serve`", ours, "no peer", None, None, "at most 0.5 of MLflow's", None)
    theirs, ratio = statistics.median(times["mlflow"]), statistics.median(a / b for a, b in zip(times["ours"], times["mlflow"]))
    return Figure("cold start of `mlops serve`", ours, "mlflow models serve", theirs, ratio, "at most 0.5 of it", ratio <= 0.5)


# ---------------------------------------------------------------- ours alone
@contextmanager
def under(load: Load) -> Iterator[Load]:
    "A load that runs in a thread of its own while the block does something to the server."
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(load.run()))
    thread.start()
    time.sleep(1)
    try:
        yield load
    finally:
        loop.call_soon_threadsafe(load.stop)
        thread.join(70)
        loop.close()


def promise(text: str, value: float, target: str, kept: bool, unit: str = "", note: str = "no peer") -> Figure:
    return Figure(text, value, note, None, None, target, bool(kept), unit)


def swaps(place: Path, server: Server, found: dict) -> Iterator[Figure]:
    "Ten promotions while sixteen connections never stop asking."
    from mlops_nb.core.settings import in_project
    from mlops_nb.model.registry import promote

    load, seen = Load(server.port, request(server.path, split_of(found["columns"], found["one"]), server.headers), CONNECTIONS), 0
    with under(load):
        for turn in range(10):
            address = f"customers@{2 - turn % 2}"
            before = load.models[address]
            with in_project(place):
                promote(address)
            until = time.monotonic() + 20
            while load.models[address] == before and time.monotonic() < until:
                time.sleep(0.02)
            seen += load.models[address] > before
    failed = len(load.failures) + load.refused + sum(load.statuses.values()) - load.statuses[200]
    print(f"swaps: {seen} of 10 seen, {load.statuses[200]:,} requests answered by {dict(load.models)}, statuses {dict(load.statuses)}, {load.failures[:3]}")
    yield promise("ten swaps of the champion under full load: failed requests", failed, "0", failed == 0 and seen == 10)


def overload(server: Server, found: dict) -> Iterator[Figure]:
    "Ten times as many connections as before, none of which waits when it is refused."
    sent = request(server.path, split_of(found["columns"], found["one"]), server.headers)
    calm = asyncio.run(Load(server.port, sent, CONNECTIONS).run(max(2, SECONDS)))
    memory: list[float] = []
    with ExitStack() as stack:
        crowd = stack.enter_context(crowding(server, found, 9 * CONNECTIONS, OVERLOAD_S))
        probe = stack.enter_context(under(Load(server.port, sent, CONNECTIONS)))
        until = time.monotonic() + OVERLOAD_S - 2
        while time.monotonic() < until:
            memory.append(memory_mb(server.pid))
            time.sleep(min(1, OVERLOAD_S / 20))
    told = json.loads(crowd.stdout.read().splitlines()[-1])
    early, late = (statistics.median(part) for part in (memory[: len(memory) // 4 + 1], memory[-(len(memory) // 4 + 1):]))
    ratio, others = probe.percentile(0.99) / calm.percentile(0.99), {status: n for status, n in probe.statuses.items() if status not in (200, 429)}
    print(f"overload: {told} and {dict(probe.statuses)}; p99 {calm.percentile(0.99) * 1e3:.1f} -> {probe.percentile(0.99) * 1e3:.1f} ms (p50 {calm.percentile(0.5) * 1e3:.1f} -> {probe.percentile(0.5) * 1e3:.1f}); "
          f"memory {early:.1f} -> {late:.1f} MB, at most {max(memory):.1f}; {probe.bare_429} of 429 without Retry-After; failures {probe.failures[:3]}")
    yield Figure("160 connections for a minute: accepted requests, 99% within", probe.percentile(0.99) * 1e3, "16 connections", calm.percentile(0.99) * 1e3, ratio, "at most 3 times", ratio <= 3, "ms")
    yield Figure("and memory, its last quarter against its first", late, "first quarter", early, late / early, "at most 1.05 of it", late / early <= 1.05, "MB")
    yield promise("and answers that are neither 200 nor 429 with Retry-After", len(probe.failures) + sum(others.values()) + probe.bare_429 + told["broken"], "0", not (probe.failures or others or probe.bare_429 or told["broken"]))


@contextmanager
def crowding(server: Server, found: dict, connections: int, seconds: float) -> Iterator[subprocess.Popen]:
    "wrk in the background; the asyncio client in another process where there is none."
    with tempfile.TemporaryDirectory() as folder:
        body = split_of(found["columns"], found["one"])
        command = wrk_command(server, body, folder, connections, seconds) if shutil.which("wrk") else [
            PYTHON, "-c", f"import json; from benchmarks.serve import *; print(json.dumps(plain(Server('ours', None, {server.path!r}, None, headers={server.headers!r}, port={server.port}), open({folder + '/body'!r}, 'rb').read(), {connections}, {seconds})))"]
        Path(folder, "body").write_bytes(body)
        crowd = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            yield crowd
            crowd.wait(seconds + 60)
        finally:
            if crowd.poll() is None:
                crowd.kill()


def killed(place: Path, found: dict) -> Iterator[Figure]:
    "One of two workers is killed under load."
    with deployed(place, "pair", 2) as server:
        load = Load(server.port, request(server.path, split_of(found["columns"], found["one"]), server.headers), CONNECTIONS)
        with under(load):
            victim = max(tree(server.pid)[1:], key=lambda one: len(held_by(one, server.port)))
            held, survivors = len(held_by(victim, server.port)), {one.pid for one in tree(server.pid)[1:]} - {victim.pid}
            at = time.monotonic()
            victim.kill()
            back = at_work_again(server, survivors, at)
            time.sleep(1)
        failed = len(load.failures) + sum(load.statuses.values()) - load.statuses[200]
        late = [when for when, _ in load.failures if load.began + when > at + 1]
        print(f"kill -9: {held} connections were the victim's, {failed} requests failed, statuses {dict(load.statuses)}, both workers answered again after {back:.2f} s, failures after the first second: {late}")
        yield promise("kill -9 of one of two workers: failed requests", failed, f"at most the {held} that were in flight there", failed <= held and not late)
        yield promise("and until both answer again", back, "at most 2 s", back <= 2, "s")


def held_by(process: psutil.Process, port: int) -> set[int]:
    "The client's ports of the connections that a server process holds."
    try:
        return {one.raddr.port for one in process.net_connections("tcp") if one.status == "ESTABLISHED" and one.laddr.port == port}
    except psutil.Error:
        return set()


def at_work_again(server: Server, survivors: set[int], since: float) -> float:
    "Seconds until a worker that was not there has answered a connection of ours."
    import http.client

    while time.monotonic() - since < 30:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        try:
            connection.request("GET", "/ping", headers=server.headers)
            connection.getresponse().read()
            mine = connection.sock.getsockname()[1]
            if any(mine in held_by(one, server.port) for one in tree(server.pid)[1:] if one.pid not in survivors):
                return time.monotonic() - since
        except OSError:
            continue
        finally:
            connection.close()
    return time.monotonic() - since


def main() -> None:
    if not shutil.which("wrk"):
        print("wrk is not installed: a slower client of our own makes the load, so that fast servers are measured too slow.")
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as where, ExitStack() as stack:
        folder = Path(where)
        os.environ["MLOPS_HOME"], os.environ["MLOPS_PROGRESS"] = str(folder / "home"), "0"
        found = saved(folder)
        place = project_with(folder, found)
        others = list(peers(folder))
        mlflow = next((one for one in others if one.name == "mlflow"), None)
        wanted = set(sys.argv[2:]) or {"compared", "cold", "swaps", "overload", "killed"}
        if "cold" in wanted:
            figures.append(cold(place, mlflow))
        with deployed(place, "customers") as ours:
            if "compared" in wanted:
                for one in others:
                    one.start()
                    stack.callback(one.stop)
                figures = compared(ours, others, found) + figures
                stack.close()
            if "swaps" in wanted:
                figures += swaps(place, ours, found)
            if "overload" in wanted:
                figures += overload(ours, found)
        if "killed" in wanted:
            figures += killed(place, found)
        record("serve", figures)


if __name__ == "__main__":
    main()
