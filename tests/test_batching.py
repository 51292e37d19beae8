"""Requests that share a call: who is merged, who fails alone, who is sent away, and that nobody waits for ever."""

import asyncio
import gc
import random
import threading
import weakref
from types import SimpleNamespace

import pytest

from mlops_nb.serve.batching import STUCK, Batcher, Busy, Late, Pace, Queue

TIMEOUT_S = 30


def in_loop(test):
    "Run an async test in a loop of its own; what waits for ever fails."
    return asyncio.run(asyncio.wait_for(test, TIMEOUT_S))


class Gate:
    "A model whose calls are noted, and whose first calls wait until they are let through."

    def __init__(self, held=1):
        self.calls, self.held, self.entered, self.go = [], held, threading.Event(), threading.Event()

    def __call__(self, job, rows):
        self.calls.append((job, list(rows)))
        if len(self.calls) <= self.held:
            self.entered.set()
            assert self.go.wait(TIMEOUT_S)
        return [(job, row) for row in rows]


async def until(happened):
    async with asyncio.timeout(TIMEOUT_S):
        while not happened():
            await asyncio.sleep(0.005)


def predict_threads(*before):
    return [thread for thread in threading.enumerate() if thread.name == "predict" and thread.is_alive() and thread not in before]


async def first_in(batcher, gate, rows=("first",), job="a"):
    "A request whose call is going on."
    first = batcher.submit(list(rows), job)
    await until(gate.entered.is_set)
    return first


# ---------------------------------------------------------------- merging

def test_what_waits_is_answered_in_one_call_when_its_job_is_equal():
    async def test():
        gate = Gate()
        batcher = Batcher(gate)
        first = await first_in(batcher, gate)
        jobs = ["a", "a", "b", "b", "a", ("a",), ("a",)]
        asked = [batcher.submit([i, -i], job) for i, job in enumerate(jobs)]
        gate.go.set()
        assert await first == [("a", "first")]
        assert await asyncio.gather(*asked) == [[(job, i), (job, -i)] for i, job in enumerate(jobs)]
        assert [(job, len(rows)) for job, rows in gate.calls] == [("a", 1), ("a", 4), ("b", 4), ("a", 2), (("a",), 4)]
        assert batcher.waiting_rows == 0 and not batcher.busy
    in_loop(test())


def test_a_model_that_forbids_it_gets_one_request_a_call():
    async def test():
        gate = Gate()
        batcher = Batcher(gate, merge=False)
        first = await first_in(batcher, gate)
        asked = [batcher.submit([i], "a") for i in range(5)]
        gate.go.set()
        assert await asyncio.gather(first, *asked) == [[("a", row)] for row in ["first", *range(5)]]
        assert len(gate.calls) == 6
    in_loop(test())


def test_a_batch_ends_at_the_limit_and_a_larger_request_goes_alone():
    async def test():
        gate = Gate()
        batcher = Batcher(gate, pace=Pace(limit=8))
        first = await first_in(batcher, gate)
        batcher.pace.learned = lambda rows, seconds, queue, round_s: None  # held at 8
        sizes = [3, 5, 1, 20, 8, 1]
        asked = [batcher.submit([i] * size, "a") for i, size in enumerate(sizes)]
        gate.go.set()
        answers = await asyncio.gather(first, *asked)
        assert [len(answer) for answer in answers[1:]] == sizes
        assert [len(rows) for _, rows in gate.calls] == [1, 8, 1, 20, 8, 1]
    in_loop(test())


def test_each_request_gets_its_own_answers_under_random_traffic():
    async def test():
        rng = random.Random(5)

        def run(job, rows):
            if any(row < 0 for row in rows):
                raise ValueError("a negative row")
            return [(job, row * 2) for row in rows]

        batcher = Batcher(run, Queue(requests=10**6))

        async def client(n):
            for i in range(20):
                job, rows = rng.choice("abc"), [rng.randrange(1000) for _ in range(rng.randrange(1, 12))]
                bad = rng.random() < 0.1
                if bad:
                    rows[rng.randrange(len(rows))] = -1
                try:
                    assert await batcher.submit(rows, job) == [(job, row * 2) for row in rows] and not bad
                except ValueError:
                    assert bad
        await asyncio.gather(*map(client, range(40)))
        assert batcher.waiting_rows == 0 and not batcher.waiting and not batcher.busy
    in_loop(test())


# ---------------------------------------------------------------- faults

@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError, MemoryError, RecursionError, StopIteration, StopAsyncIteration, TimeoutError, OSError])
def test_no_error_of_a_request_reaches_another_or_stops_the_model(error):
    async def test():
        gate = Gate()

        def run(job, rows):
            if "bad" in rows:
                gate.calls.append((job, list(rows)))
                raise error("SECRET")
            return gate(job, rows)

        batcher = Batcher(run)
        first = await first_in(batcher, gate)
        asked = [batcher.submit(["bad" if i == 3 else i], "a") for i in range(16)]
        gate.go.set()
        got = await asyncio.gather(first, *asked, return_exceptions=True)
        assert isinstance(got[4], RuntimeError if error is StopIteration else error)  # a future cannot hold a StopIteration
        assert [one for one in got if not isinstance(one, Exception)] == [[("a", row)] for row in ["first", *range(3), *range(4, 16)]]
        assert await batcher.submit(["after"], "a") == [("a", "after")]
        assert len(gate.calls) <= 2 + 2 * 5 + 1  # halved to find one of 16, not asked sixteen times
    in_loop(test())


def test_somebody_who_counts_batches_cannot_stop_them():
    async def test():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        batcher = Batcher(lambda job, rows: rows, on_batch=lambda rows: 1 / 0)
        for i in range(3):
            assert await batcher.submit([i]) == [i]
    in_loop(test())


def test_batches_are_counted_by_their_rows():
    async def test():
        gate, seen = Gate(), []
        batcher = Batcher(gate, on_batch=seen.append)
        first = await first_in(batcher, gate)
        asked = [batcher.submit([i, i], "a") for i in range(4)]
        gate.go.set()
        await asyncio.gather(first, *asked)
        await until(lambda: len(seen) == 2)
        assert seen == [1, 8] and batcher.latest[2] == 8 and batcher.latest[0] <= batcher.latest[1]
    in_loop(test())


# ---------------------------------------------------------------- bounds

def test_over_the_bound_it_is_busy_at_once_and_says_when_to_come_again():
    async def test():
        gate = Gate()
        batcher = Batcher(gate, Queue(requests=4, soon_s=0.02), pace=Pace(row_s=1.0, limit=100))
        first = await first_in(batcher, gate)
        asked = [batcher.submit([i], "a") for i in range(4)]
        for _ in range(3):
            with pytest.raises(Busy, match="5 requests are being answered or wait already") as found:
                batcher.submit(["more"], "a")
            assert found.value.retry_after_s == 4
        assert len(batcher.waiting) == 4 and batcher.waiting_rows == 4
        gate.go.set()
        await asyncio.gather(first, *asked)
        assert await batcher.submit(["more"], "a") == [("a", "more")]
    in_loop(test())


def test_a_fast_model_may_have_more_waiting_up_to_a_number_of_rows():
    async def test():
        gate = Gate()
        batcher = Batcher(gate, Queue(requests=4, soon_s=0.02, rows=100), pace=Pace(row_s=1e-6, limit=10_000))
        first = await first_in(batcher, gate)
        asked = [batcher.submit([i] * 10, "a") for i in range(10)]
        with pytest.raises(Busy):
            batcher.submit([1], "a")
        gate.go.set()
        await asyncio.gather(first, *asked)
        huge = await batcher.submit(list(range(5000)), "a")  # alone it may be larger than the queue
        assert huge == [("a", i) for i in range(5000)]
    in_loop(test())


def test_clients_that_left_are_not_asked_about_and_free_their_place():
    async def test():
        gate = Gate()
        batcher = Batcher(gate)
        first = await first_in(batcher, gate)
        asked = [batcher.submit([i], "a") for i in range(6)]
        for one in asked[::2]:
            one.cancel()
        gate.go.set()
        assert await first == [("a", "first")]
        assert await asyncio.gather(*asked[1::2]) == [[("a", i)] for i in (1, 3, 5)]
        assert gate.calls[1:] == [("a", [1, 3, 5])] and batcher.waiting_rows == 0
    in_loop(test())


def test_a_client_that_leaves_during_its_call_harms_nobody():
    async def test():
        gate = Gate()
        batcher = Batcher(gate)
        first = await first_in(batcher, gate)
        later = batcher.submit(["later"], "a")
        first.cancel()
        gate.go.set()
        assert await later == [("a", "later")] and first.cancelled()
    in_loop(test())


# ---------------------------------------------------------------- deadlines

def test_a_call_that_does_not_return_is_given_up_and_the_next_one_answered():
    async def test():
        gate = Gate()
        before = predict_threads()
        batcher = Batcher(gate, Queue(answer_s=0.2))
        first = await first_in(batcher, gate)
        with pytest.raises(Late, match="did not answer within 0.2 s"):
            await first
        batcher.queue = Queue(answer_s=30)
        assert await batcher.submit(["next"], "a") == [("a", "next")]
        assert batcher.lost == 1 and not batcher.stuck
        gate.go.set()  # it comes back after all: its thread ends, and its late answer disturbs nobody
        await until(lambda: len(predict_threads(*before)) == 1)
        assert await batcher.submit(["again"], "a") == [("a", "again")]
        batcher.close(asyncio.get_running_loop())
        await until(lambda: not predict_threads(*before))
    in_loop(test())


def test_who_waited_too_long_is_told_and_the_model_is_not_asked():
    async def test():
        gate = Gate()
        batcher = Batcher(gate, Queue(answer_s=30))
        first = await first_in(batcher, gate)
        old, young = batcher.submit(["old"], "a"), batcher.submit(["young"], "a")
        batcher.waiting[0].since -= 31
        gate.go.set()
        assert await first and await young == [("a", "young")]
        with pytest.raises(Late, match="waited more than 30 s"):
            await old
        assert gate.calls[1:] == [("a", ["young"])]
    in_loop(test())


def test_after_some_lost_calls_it_is_stuck():
    async def test():
        gate, before = Gate(held=STUCK), predict_threads()
        batcher = Batcher(gate, Queue(answer_s=0.1))
        for i in range(STUCK):
            assert not batcher.stuck
            with pytest.raises(Late):
                await batcher.submit([i], "a")
        assert batcher.stuck and batcher.lost == STUCK
        gate.go.set()
        batcher.close(asyncio.get_running_loop())
        await until(lambda: not predict_threads(*before))
    in_loop(test())


# ---------------------------------------------------------------- the end

def test_closing_ends_the_thread_and_lets_go_of_the_model():
    async def test():
        gone, before = Gate(held=0), predict_threads()
        batcher, held = Batcher(gone), weakref.ref(gone)
        assert await batcher.submit([1], "a") == [("a", 1)]
        assert len(predict_threads(*before)) == 1
        batcher.close(asyncio.get_running_loop())
        await until(lambda: not predict_threads(*before))
        del gone, batcher
        await asyncio.sleep(0)
        gc.collect()
        assert held() is None
    in_loop(test())


def test_closing_while_busy_answers_what_waits_first():
    async def test():
        gate, before = Gate(), predict_threads()
        batcher = Batcher(gate, merge=False)
        first = await first_in(batcher, gate)
        asked = [batcher.submit([i], "a") for i in range(3)]
        batcher.close(asyncio.get_running_loop())
        gate.go.set()
        assert await asyncio.gather(first, *asked) == [[("a", row)] for row in ["first", 0, 1, 2]]
        await until(lambda: not predict_threads(*before))
    in_loop(test())


def test_a_latecomer_at_a_closed_one_is_answered_and_leaves_no_thread():
    async def test():
        before = predict_threads()
        batcher = Batcher(Gate(held=0))
        assert await batcher.submit([1], "a")
        batcher.close(asyncio.get_running_loop())
        assert await batcher.submit([2], "a") == [("a", 2)]  # the copy for a shadow that was swapped meanwhile
        await until(lambda: not predict_threads(*before))
    in_loop(test())


def test_one_event_loop_after_another():
    batcher = Batcher(lambda job, rows: [row + 1 for row in rows])

    async def ask(row):
        return await batcher.submit([row])
    assert [asyncio.run(ask(i)) for i in range(5)] == [[i + 1] for i in range(5)]


def test_nothing_of_a_request_is_kept_while_nobody_asks():
    class Row:
        pass

    async def test():
        batcher = Batcher(lambda job, rows: [0] * len(rows))
        rows = [Row() for _ in range(3)]
        held = [weakref.ref(row) for row in rows]
        asked = batcher.submit(rows)
        await asked
        del rows, asked
        await until(lambda: (gc.collect(), not any(one() for one in held))[1])
    in_loop(test())


# ---------------------------------------------------------------- the pace

def paced(cost_s, waiting, calls=200, seed=1, queue=Queue()):
    "The pace after some calls with so many rows waiting; costs vary by a tenth. Rows of the last calls, and rows a second."
    rng, pace, sizes, spent = random.Random(seed), Pace(), [], []
    for _ in range(calls):
        rows = min(pace.limit, waiting)
        seconds = cost_s(rows) * rng.uniform(0.9, 1.1)
        pace.learned(rows, seconds, queue)
        sizes.append(rows), spent.append(seconds)
    return SimpleNamespace(pace=pace, rows=max(sizes[-50:]), rows_s=sum(sizes[-50:]) / sum(spent[-50:]))


@pytest.mark.parametrize("row_s", [0.0001, 0.001, 0.002, 0.01])
def test_a_model_that_costs_by_the_row_gets_batches_within_the_time(row_s):
    found = paced(lambda rows: rows * row_s, 5000)
    assert 0.3 * 0.025 <= found.rows * row_s <= 1.3 * 0.025
    assert found.pace.row_s == pytest.approx(row_s, rel=0.1)


def test_a_model_that_costs_by_the_row_and_much_gets_one_at_a_time():
    assert paced(lambda rows: rows * 0.5, 5000).rows == 1


@pytest.mark.parametrize("call_s", [0.0005, 0.005, 0.03, 0.1, 1.0])
@pytest.mark.parametrize("waiting", [16, 200])
def test_a_model_that_costs_by_the_call_gets_all_that_wait(call_s, waiting):
    found = paced(lambda rows: call_s + rows * call_s / 10_000, waiting)
    assert found.rows == waiting and found.rows_s > 0.7 * waiting / call_s


def test_a_model_with_both_costs_is_not_asked_row_by_row():
    found = paced(lambda rows: 0.03 + 0.01 * rows, 200)
    assert found.rows_s > 2 * 1 / 0.04 and 0.03 + 0.01 * found.rows < 0.3


def test_a_model_that_becomes_slow_gets_smaller_batches_again():
    pace, queue = Pace(), Queue()
    for cost_s, low, high in ((0.0001, 80, 520), (0.002, 4, 26), (0.0001, 80, 520)):
        for _ in range(400):
            pace.learned(pace.limit, pace.limit * cost_s, queue)
        assert low <= pace.limit <= high


def test_the_pace_never_leaves_its_bounds():
    rng, pace, queue = random.Random(3), Pace(), Queue(batch_rows=500)
    for _ in range(5000):
        pace.learned(rng.choice([1, 2, 31, 500, 10_000]), rng.choice([0.0, 1e-9, 0.02, 3.0, 60.0]), queue)
        assert 1 <= pace.limit <= 500 and 0 <= pace.row_s <= 60


# ---------------------------------------------------------------- a crowd

def crowd_of(n, gate):
    "A batcher that answered a crowd at each of its last calls."
    batcher = Batcher(gate)
    batcher.crowds.extend([n] * 4)
    return batcher, [batcher.submit([i]) for i in range(n)]


def test_a_crowd_that_comes_back_is_waited_for_and_shares_its_call(monkeypatch):
    monkeypatch.setattr("mlops_nb.serve.batching.GATHER_S", 20)
    monkeypatch.setattr("mlops_nb.serve.batching.GATHER_CALLS", 10**9)

    async def test():
        gate = Gate(held=0)
        batcher, asked = crowd_of(6, gate)
        await asyncio.gather(*asked)
        asked = []
        for i in range(6):  # one after another, as clients do
            asked.append(batcher.submit([i]))
            await asyncio.sleep(0.01)
        await asyncio.gather(*asked)
        assert [len(rows) for _, rows in gate.calls] == [6, 6]
    in_loop(test())


def test_who_comes_back_alone_waits_a_moment_only_and_the_next_one_not_at_all(monkeypatch):
    monkeypatch.setattr("mlops_nb.serve.batching.GATHER_S", 0.2)
    monkeypatch.setattr("mlops_nb.serve.batching.GATHER_CALLS", 10**9)

    async def test():
        batcher, asked = crowd_of(4, Gate(held=0))
        await asyncio.gather(*asked)
        alone = batcher.submit(["alone"])
        assert batcher.gathering and not batcher.busy
        assert await alone == [(None, "alone")] and batcher.gathering is None  # the crowd is gone
        batcher.submit(["later"])
        assert batcher.busy
    in_loop(test())


def test_closing_while_a_crowd_is_waited_for_answers_who_is_there_and_ends_the_thread(monkeypatch):
    monkeypatch.setattr("mlops_nb.serve.batching.GATHER_S", 10**6)
    monkeypatch.setattr("mlops_nb.serve.batching.GATHER_CALLS", 10**9)

    async def test():
        before = predict_threads()
        batcher, asked = crowd_of(4, Gate(held=0))
        await asyncio.gather(*asked)
        early = batcher.submit(["early"])
        assert batcher.gathering
        batcher.close(asyncio.get_running_loop())
        assert await early == [(None, "early")]
        await until(lambda: not predict_threads(*before))
        assert await batcher.submit(["late"]) == [(None, "late")]
        await until(lambda: not predict_threads(*before))
    in_loop(test())


def test_a_call_that_is_full_waits_for_nobody(monkeypatch):
    monkeypatch.setattr("mlops_nb.serve.batching.GATHER_S", 10**6)
    monkeypatch.setattr("mlops_nb.serve.batching.GATHER_CALLS", 10**9)

    async def test():
        gate = Gate(held=0)
        batcher = Batcher(gate, pace=Pace(limit=8))
        batcher.crowds.extend([4, 4, 4, 4])
        batcher.pace.learned = lambda rows, seconds, queue, round_s: None  # held at 8
        await asyncio.gather(*(batcher.submit([i]) for i in range(4)))
        assert batcher.gathering
        assert len(await batcher.submit(list(range(8)))) == 8
    in_loop(test())


def test_a_burst_is_taken_and_a_crowd_that_stays_is_held_to_its_number():
    async def test():
        gate = Gate()
        batcher = Batcher(gate, Queue(requests=4, soon_s=1000, lasting_s=1000))
        first = await first_in(batcher, gate)
        burst = [batcher.submit([i]) for i in range(50)]  # nothing is known yet, so it is a burst
        gate.go.set()
        await asyncio.gather(first, *burst)
        assert batcher.crowd > 4
        gate.go.clear()
        gate.held, gate.calls = 1, []
        again = [batcher.submit([i]) for i in range(4)]
        await until(lambda: batcher.asked == 4)
        with pytest.raises(Busy, match="^4 requests"):  # though none of them waits
            batcher.submit(["one too many"])
        gate.go.set()
        assert len(await asyncio.gather(*again)) == 4
        batcher.crowd_at -= 1001  # long ago
        assert len(await asyncio.gather(*(batcher.submit([i]) for i in range(50)))) == 50
    in_loop(test())


def test_versions_are_compared_by_what_they_need_not_by_who_went_first():
    "Two versions in one process take turns at the processor, and the one with less traffic waits for the other more often than the other for it."
    batcher = Batcher(lambda job, rows: rows)
    assert batcher.comparable(0.010, 0.0099) == 0.0099
    assert batcher.comparable(0.030, 0.0100) == 0.0100  # the other's turn
    assert batcher.comparable(0.200, 0.0100) == 0.200  # nobody's turn takes so long
    remote = Batcher(lambda job, rows: rows)
    assert remote.comparable(0.030, 0.001) == 0.030  # it waits for something by itself


def test_what_a_call_took_is_known_without_the_waiting_before_it():
    async def test():
        gate = Gate()
        batcher = Batcher(gate)
        first = await first_in(batcher, gate)
        waiting = batcher.submit(["waits"], "a")
        await asyncio.sleep(1)
        gate.go.set()
        await first
        assert batcher.worked_s > 0.9  # the gate was closed for so long
        await waiting
        assert batcher.worked_s < 0.9
        batcher.close(asyncio.get_running_loop())
    in_loop(test())
