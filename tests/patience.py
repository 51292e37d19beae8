"""Waits that have an end: a test that would hang fails instead, and holds up no other."""

import threading
import time

PATIENCE_S = 300


def until(happened, *, timeout_s=PATIENCE_S, process=None):
    "What `happened` returns once it is true; a process that has to be alive meanwhile may be named."
    latest = time.monotonic() + timeout_s
    while not (found := happened()):
        assert process is None or process.poll() is None, f"the process ended with {process.returncode}"
        assert time.monotonic() < latest, f"it did not happen within {timeout_s} s"
        time.sleep(0.005)
    return found


def started(*tasks):
    "Threads that call these, and that hold up no interpreter that wants to end."
    threads = [threading.Thread(target=task, daemon=True) for task in tasks]
    for one in threads:
        one.start()
    return threads


def finished(threads, *, timeout_s=PATIENCE_S):
    "Wait until all these threads, or processes of multiprocessing, are done."
    latest = time.monotonic() + timeout_s
    for one in threads:
        one.join(max(0, latest - time.monotonic()))
        assert not one.is_alive(), f"{one.name} still works after {timeout_s} s"


def next_line(process, *, timeout_s=PATIENCE_S):
    "The next line that a process says; one that is silent for so long is killed, and has said nothing."
    late = threading.Timer(timeout_s, process.kill)
    late.daemon = True
    late.start()
    try:
        return process.stdout.readline()
    finally:
        late.cancel()
