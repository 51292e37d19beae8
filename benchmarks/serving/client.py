"""A client that keeps some connections busy and counts what became of every single request; wrk hides what failed and was tried again."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


def request(path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, host: str = "127.0.0.1") -> bytes:
    "The bytes of a POST, or of a GET when there is no body."
    said = {"host": host, **({"content-type": "application/json", "content-length": str(len(body))} if body else {}), **(headers or {})}
    return f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\n{''.join(f'{name}: {value}' + chr(13) + chr(10) for name, value in said.items())}\r\n".encode() + body


@dataclass
class Load:
    "Connections to one server, each sending its next request when the last one is answered."
    port: int
    sent: bytes  # the request
    connections: int = 16
    pause_s: float = 0.0  # between an answer and the next request
    statuses: Counter = field(default_factory=Counter)
    models: Counter = field(default_factory=Counter)  # which version answered
    failures: list = field(default_factory=list)  # (when, what): a connection that ended with a request under way
    refused: int = 0  # connections that could not be opened
    bare_429: int = 0  # 429 without Retry-After
    latencies: list = field(default_factory=list)  # seconds, of accepted requests
    stopped: bool = False
    began: float = 0.0
    took_s: float = 0.0

    async def run(self, seconds: float = 0.0) -> Load:
        "Load the server for so long, or until `stop`."
        loop, self.began = asyncio.get_running_loop(), time.monotonic()
        self.over, self.open = loop.create_future(), 0
        if seconds:
            loop.call_later(seconds, self.stop)
        await asyncio.gather(*(self.connect() for _ in range(self.connections)))
        await self.over
        self.took_s = time.monotonic() - self.began
        return self

    def stop(self) -> None:
        "No further requests; those under way are waited for."
        self.stopped = True
        if not self.open and not self.over.done():
            self.over.set_result(None)

    async def connect(self) -> None:
        self.open += 1
        while not self.stopped:
            try:
                return await asyncio.get_running_loop().create_connection(lambda: Connection(self), "127.0.0.1", self.port) and None
            except OSError:
                self.refused += 1
                await asyncio.sleep(0.02)
        self.left()

    def left(self) -> None:
        self.open -= 1
        if self.stopped and not self.open and not self.over.done():
            self.over.set_result(None)

    def percentile(self, share: float) -> float:
        "Seconds within which this share of the accepted requests was answered."
        found = sorted(self.latencies)
        return found[min(len(found) - 1, int(len(found) * share))] if found else 0.0


class Connection(asyncio.Protocol):
    "One connection of a load."

    def __init__(self, load: Load):
        self.load, self.buffer, self.missing, self.under_way = load, b"", 0, False

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        if self.load.stopped or self.transport.is_closing():
            return self.transport.close()
        self.under_way, self.at = True, time.perf_counter()
        self.transport.write(self.load.sent)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, end, body = self.buffer.partition(b"\r\n\r\n")
        if not end:
            return
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        if len(body) < int(fields.get(b"content-length", 0)):
            return
        load, status, self.buffer, self.under_way = self.load, int(head[9:12]), b"", False
        load.statuses[status] += 1
        if status == 200:
            load.latencies.append(time.perf_counter() - self.at)
            load.models[fields.get(b"x-mlops-model", b"").decode()] += 1
        elif status == 429:
            load.bare_429 += b"retry-after" not in fields
        if fields.get(b"connection") == b"close":
            return self.transport.close()
        if load.pause_s:
            asyncio.get_running_loop().call_later(load.pause_s, self.ask)
        else:
            self.ask()

    def connection_lost(self, error: Exception | None) -> None:
        if self.under_way:
            self.load.failures.append((time.monotonic() - self.load.began, type(error).__name__ if error else "closed"))
        if self.load.stopped:
            self.load.left()
        else:
            self.load.open -= 1
            asyncio.ensure_future(self.load.connect())
