"""Servers as whole process trees: start one, find out when it answers, how much memory it has, let it rest while others are measured."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import psutil


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def answered(port: int, path: str, headers: Mapping[str, str]) -> int:
    "The status of a GET, 0 when nobody answers."
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", path, headers=dict(headers))
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0


def tree(pid: int) -> list[psutil.Process]:
    "A process and all that came from it."
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []


def memory_mb(pid: int) -> float:
    "Proportional resident memory of a process tree: what processes share is counted once."
    total = 0
    for process in tree(pid):
        with suppress(OSError), open(f"/proc/{process.pid}/smaps_rollup") as file:
            total += next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return total / 1024


@dataclass
class Server:
    "One of those that are compared."
    name: str
    command: Callable[[int], list[str]]  # for a port
    path: str  # where to ask for predictions
    body: Callable[[list[str], list[list]], bytes]  # of columns and rows
    ping: str = "/ping"
    headers: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    folder: str = "."
    log: str = os.devnull
    port: int = 0
    pid: int = 0
    process: subprocess.Popen | None = None

    def start(self, timeout_s: float = 120) -> float:
        "Seconds from the command to the first answer."
        self.port = free_port()
        with open(self.log, "ab") as out:
            began = time.perf_counter()
            self.process = subprocess.Popen(self.command(self.port), env={**os.environ, **self.environment}, cwd=self.folder, stdout=out, stderr=out, start_new_session=True)
        self.pid = self.process.pid
        while (status := answered(self.port, self.ping, self.headers)) != 200:
            if self.process.poll() is not None or time.perf_counter() - began > timeout_s:
                self.stop()
                raise RuntimeError(f"{self.name} does not answer (status {status}); its log is {self.log}")
            time.sleep(0.01)
        return time.perf_counter() - began

    def rest(self, sleeping: bool = True) -> None:
        "Stop or continue the whole tree, so that it takes no time from the one that is measured."
        for process in tree(self.pid):
            with suppress(psutil.Error):
                process.send_signal(signal.SIGSTOP if sleeping else signal.SIGCONT)

    def stop(self) -> None:
        if self.process is None:
            return
        self.rest(False)
        family = tree(self.pid)
        with suppress(ProcessLookupError):
            self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        for one in family:
            with suppress(psutil.Error):
                one.kill()
        self.process.wait(5)
        self.process = None
