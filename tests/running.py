"""A real server over estimators made in a test: the app, its endpoint and tokens, answering on a free port from a thread of its own."""

import asyncio
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

from mlops_nb.core.files import digest_of
from mlops_nb.serve.access import Tokens
from mlops_nb.serve.app import app
from mlops_nb.serve.door import Desk
from mlops_nb.serve.endpoint import Endpoint
from mlops_nb.serve.inputs import columns_of
from mlops_nb.serve.observe import Metrics
from mlops_nb.serve.plan import planned, write_plan
from mlops_nb.serve.server import Answering, listen
from mlops_nb.serve.sources import Version

TOKEN = "a-token-for-tests"


class Shelf:
    "A source of models that a test has made: name -> (estimator, recorded inputs, example rows)."

    def __init__(self, models: dict):
        self.models = models

    def resolve(self, name: str, selector: str) -> Version:
        _, inputs, rows = self.models[name]
        example = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]} if rows else None
        return Version(name, "1", "9f2c41d07be3", columns_of(inputs), example)

    def load(self, version: Version) -> object:
        return self.models[version.name][0]

    def stamp(self) -> int:
        return 0


@contextmanager
def running(models: dict):
    "The address of a server that answers for these models with TOKEN, until the block ends."
    with tempfile.TemporaryDirectory() as folder:
        plan, file = planned(*(f"{name}@1" for name in models)), Path(folder) / "plan.json"
        write_plan(file, plan, by="a test", why="")
        desk = Desk(Endpoint(Shelf(models), lambda: plan), Tokens(None, also=[digest_of(TOKEN.encode())]), plan_file=file, metrics=Metrics(Path(folder) / "metrics"))
        desk.endpoint.follow()
        with answering_from(desk) as address:
            yield address


@contextmanager
def answering_from(desk: Desk):
    "The address at which a desk's app answers."
    port, ready, loops = listen(), threading.Event(), []

    async def work():
        stop = asyncio.Event()
        loops.append((asyncio.get_running_loop(), stop))
        answering = Answering(app(desk), port)
        answering.start()
        ready.set()
        await stop.wait()
        await answering.stop()
        for placed in desk.endpoint.placed.values():
            placed.main.batcher.close(asyncio.get_running_loop())

    thread = threading.Thread(target=lambda: asyncio.run(work()), daemon=True)
    thread.start()
    try:
        assert ready.wait(120)
        yield f"http://127.0.0.1:{port.getsockname()[1]}"
    finally:
        loop, stop = loops[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join(120)
        port.close()
