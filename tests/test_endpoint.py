"""Versions that come and go while requests are answered: none fails, the bad ones stay outside, nothing is left behind."""

import asyncio
import gc
import threading
import weakref
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression

from mlops_nb.core.errors import Invalid, NotFound, Unavailable
from mlops_nb.core.settings import in_project, init
from mlops_nb.model.registry import promote, register
from serving import endpoint_of

from mlops_nb.serve.batching import Late, Queue
from mlops_nb.serve.endpoint import Endpoint, Limits, Refused
from mlops_nb.serve.inputs import columns_of
from mlops_nb.serve.journal import Entry, Journal
from mlops_nb.serve.plan import ModelPlan, Plan, planned
from mlops_nb.serve.protocol import from_records, named
from mlops_nb.serve.sources import BundleSource, RegistrySource, Version, tried
from models import database, new_shop  # noqa: F401

INPUTS = {"n": "long", "who": "string"}


class Tens:
    "Answers n + 10 × its version, and does what it is told on the way."

    def __init__(self, version, does=lambda rows: None):
        self.version, self.does = version, does

    def predict(self, rows, k: int = 1):
        self.does(rows)
        return (rows["n"] + 10 * self.version).to_numpy()


class Shelf:
    "A registry in memory: aliases, versions and what is wrong with them."

    def __init__(self, **aliases):
        self.aliases, self.changes, self.loads, self.wrong, self.columns, self.passed, self.does, self.made = aliases or {"champion": 1}, 0, [], {}, {}, {}, {}, weakref.WeakSet()

    def set(self, **aliases):
        self.aliases.update(aliases)
        self.changes += 1

    def resolve(self, name, selector):
        number = int(selector) if selector.isdigit() else self.aliases.get(selector)
        if isinstance(number, Exception):
            raise number
        if number is None:
            raise NotFound(f"there is no {name}@{selector}.")
        return Version(name, str(number), f"d{number}", columns_of(self.columns.get(number, INPUTS)), {"columns": ["n", "who"], "data": [[1, "a"]]} if number not in self.columns else None, self.passed.get(number))

    def load(self, version):
        number = int(version.version)
        self.loads.append(number)
        if number in self.wrong:
            raise self.wrong[number]
        model = Tens(number, self.does.get(number, lambda rows: None))
        self.made.add(model)
        return model

    def stamp(self):
        return self.changes


class Shop:
    "An endpoint with a plan that can be changed."

    def __init__(self, *plans, shelf=None, journal=None, **more):
        self.shelf, self.events, self.withdrawn = shelf or Shelf(), [], []
        self.plan = Plan(plans or (ModelPlan("m", {"champion": 100}),))
        self.endpoint = Endpoint(self.shelf, lambda: self.plan, journal, on_event=self.events.append, back_off=lambda *what: self.withdrawn.append(what), **more)
        self.endpoint.follow()

    def set(self, *plans):
        self.plan = Plan(plans, revision=self.plan.revision + 1)

    async def ask(self, n=1, who="a", **more):
        return await self.endpoint.predict(from_records([{"n": n, "who": who}], "records", {}), **more)

    def said(self):
        return [(event["event"], event["model"]) for event in self.events]


@asynccontextmanager
async def asked_all_the_time(shop, clients=8, **more):
    "Clients that ask one request after another; every answer has to be that of the version it names."
    done, answers = asyncio.Event(), []

    async def client(i):
        while not done.is_set():
            got = await shop.ask(i, who=str(i), request=f"{i}-{len(answers)}", **more)
            assert got.answers == [i + 10 * int(got.model.rpartition("@")[2])]
            answers.append(got.model)
            await asyncio.sleep(0)
    shop.endpoint.loop = asyncio.get_running_loop()
    tasks = [asyncio.ensure_future(client(i)) for i in range(clients)]
    await until(lambda: len(answers) > 20)
    yield answers
    done.set()
    await asyncio.gather(*tasks)


async def until(happened, timeout_s=120):
    async with asyncio.timeout(timeout_s):
        while not happened():
            await asyncio.sleep(0.005)


async def looked(shop):
    return await asyncio.to_thread(shop.endpoint.follow)


def run(test):
    return asyncio.run(asyncio.wait_for(test, 300))


# ---------------------------------------------------------------- swaps

def test_a_swap_under_requests_fails_none_and_changes_the_address_once():
    async def test():
        shop = Shop()
        async with asked_all_the_time(shop) as answers:
            for version in (2, 3, 4):
                seen = len(answers)
                shop.shelf.set(champion=version)
                assert await looked(shop)
                await until(lambda: f"m@{version}" in answers[seen:])
            assert not await looked(shop)
        changes = [b for a, b in zip(answers, answers[1:]) if a != b]
        assert changes == ["m@2", "m@3", "m@4"]
        assert shop.said() == [("serves", f"m@{version}") for version in (1, 2, 3, 4)] and [event["before"] for event in shop.events] == ["", "m@1", "m@2", "m@3"]
    run(test())


def test_who_asked_before_the_swap_is_answered_by_whom_he_asked():
    async def test():
        go, shop = threading.Event(), None
        shelf = Shelf()
        shop = Shop(shelf=shelf)
        shop.endpoint.loop = asyncio.get_running_loop()
        shop.endpoint.served().estimator.does = lambda rows: go.wait(300)
        old = asyncio.ensure_future(shop.ask(5))
        await asyncio.sleep(0.05)
        shelf.set(champion=2)
        await looked(shop)
        assert (await shop.ask(5)).answers == [25]
        go.set()
        assert (await old).model == "m@1" and (await old).answers == [15]
    run(test())


WRONG = {
    "its loading fails": (lambda shelf: shelf.wrong.update({2: Invalid("m@2 is damaged; register it again.")}), "damaged"),
    "its loading raises anything": (lambda shelf: shelf.wrong.update({2: ZeroDivisionError("SECRET")}), "ZeroDivisionError"),
    "it cannot predict its example": (lambda shelf: shelf.does.update({2: lambda rows: 1 / 0}), "cannot predict its own example"),
    "it needs another column": (lambda shelf: shelf.columns.update({2: {**INPUTS, "price": "double"}}), "'price'"),
    "it needs another column of any type": (lambda shelf: shelf.columns.update({2: {**INPUTS, "blob": "binary"}}), "'blob'"),
    "it needs another type": (lambda shelf: shelf.columns.update({2: {**INPUTS, "n": "string"}}), "'n'"),
    "it did not pass": (lambda shelf: shelf.passed.update({2: False}), "did not pass its validation"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_bad_version_is_refused_and_the_old_one_stays(what):
    async def test():
        shop = Shop()
        spoil, words = WRONG[what]
        spoil(shop.shelf)
        async with asked_all_the_time(shop) as answers:
            shop.shelf.set(champion=2)
            for _ in range(3):
                await looked(shop)
            reasons = " ".join(shop.endpoint.refused.values())
            assert words in reasons and "SECRET" not in reasons
            assert shop.said()[1:] == [("refused", shop.said()[1][1])] and len(shop.shelf.loads) <= 2
            shop.shelf.set(champion=3)
            await looked(shop)
            await until(lambda: answers[-1] == "m@3")
        assert set(answers) == {"m@1", "m@3"} and not shop.endpoint.refused
    run(test())


def test_a_refused_version_is_not_loaded_again_whenever_somebody_else_writes_to_the_registry():
    shop = Shop()
    shop.shelf.wrong[2] = Invalid("m@2 is damaged; register it again.")
    for _ in range(20):
        shop.shelf.set(champion=2)
        shop.endpoint.follow()
    assert shop.shelf.loads.count(2) == 1 and len(shop.events) == 2
    assert "damaged" in " ".join(shop.endpoint.refused.values())


def test_a_registry_that_does_not_answer_for_a_moment_is_asked_again():
    shop = Shop()
    shop.shelf.set(champion=Unavailable("the registry is locked; try again."))
    shop.endpoint.follow()
    assert "locked" in " ".join(shop.endpoint.refused.values()) and shop.endpoint.served().address == "m@1"
    shop.shelf.aliases["champion"] = 2  # and its stamp is the same
    shop.endpoint.again = 0  # the pause is over
    assert shop.endpoint.follow() and shop.endpoint.served().address == "m@2" and not shop.endpoint.refused


def test_a_challenger_that_is_gone_does_not_hold_the_champion_back():
    shelf = Shelf(champion=1, challenger=2)
    shop = Shop(ModelPlan("m", {"champion": 90, "challenger": 10}), shelf=shelf)
    shelf.aliases.pop("challenger")
    shelf.set(champion=3)
    shop.endpoint.follow()
    assert {selector: one.address for selector, one in shop.endpoint.placed["m"].served.items()} == {"champion": "m@3", "challenger": "m@2"}


def test_a_verdict_that_is_noted_later_loads_nothing_again():
    shop = Shop()
    before = shop.endpoint.served()
    for verdict in (True, False):
        shop.shelf.passed[1] = verdict
        shop.shelf.set()
        shop.endpoint.follow()
        assert shop.endpoint.served() is before and shop.shelf.loads == [1] and not shop.endpoint.refused


def test_the_first_look_says_what_is_wrong():
    shelf = Shelf()
    shelf.wrong[1] = Invalid("m@1 is damaged; register it again.")
    with pytest.raises(Invalid, match="damaged"):
        Shop(shelf=shelf)
    with pytest.raises(NotFound):
        Shop(ModelPlan("m", {"challenger": 100}))


# ---------------------------------------------------------------- plans

def test_plans_change_while_requests_go_on():
    async def test():
        shop = Shop(ModelPlan("m", {"champion": 100}), ModelPlan("other", {"2": 100}), shelf=Shelf(champion=1, challenger=2))
        async with asked_all_the_time(shop, model="m") as answers:
            for traffic in ({"champion": 50, "challenger": 50}, {"challenger": 100}, {"1": 30, "2": 30, "3": 40}, {"champion": 100}):
                seen = len(answers)
                shop.set(ModelPlan("m", traffic, canary={"off": True}), ModelPlan("other", {"2": 100}))
                await looked(shop)
                await until(lambda: len(answers) > seen + 100)
            shop.set(ModelPlan("m", {"champion": 100}))  # the other one is gone
            await looked(shop)
            assert shop.endpoint.models == ["m"]
            with pytest.raises(NotFound, match="no model 'other'"):
                await shop.ask(model="other")
        assert set(answers) == {"m@1", "m@2", "m@3"}
    run(test())


def test_several_models_the_first_answers_who_asks_for_none():
    async def test():
        shop = Shop(ModelPlan("a", {"1": 100}), ModelPlan("b", {"2": 100}))
        assert [(await shop.ask(model=name)).model for name in ("", "a", "b")] == ["a@1", "a@1", "b@2"]
        assert (await shop.ask(model="b", version="2")).answers == [21]
        for model, version, words in (("c", "", "a, b"), ("b", "7", "there is no version '7'"), ("x" * 5000, "", "there is no model")):
            with pytest.raises(NotFound, match=words) as found:
                await shop.ask(model=model, version=version)
            assert len(str(found.value)) < 300
    run(test())


def test_a_second_model_that_cannot_be_loaded_leaves_the_first_alone():
    shop = Shop(ModelPlan("a", {"1": 100}))
    shop.shelf.wrong[2] = OSError("disk")
    shop.set(ModelPlan("a", {"3": 100}), ModelPlan("b", {"2": 100}))
    shop.endpoint.follow()
    assert shop.endpoint.models == ["a"] and shop.endpoint.served().address == "a@3" and any(name.startswith("b") for name in shop.endpoint.refused)


def test_batching_can_be_forbidden_while_it_runs():
    shop = Shop()
    assert shop.endpoint.served().batcher.merge
    shop.set(ModelPlan("m", {"champion": 100}, batching=False))
    shop.endpoint.follow()
    assert not shop.endpoint.served().batcher.merge


def test_an_alias_that_is_not_followed_stays():
    shop = Shop(ModelPlan("m", {"champion": 100}, follow=False))
    shop.shelf.set(champion=2)
    shop.endpoint.follow()
    assert shop.endpoint.served().address == "m@1" and shop.shelf.loads == [1]


def test_a_rollback_brings_the_old_version_back():
    async def test():
        shop = Shop()
        for version, expected in ((2, 21), (1, 11)):
            shop.shelf.set(champion=version)
            await looked(shop)
            assert (await shop.ask()).answers == [expected]
    run(test())


# ---------------------------------------------------------------- arms, shadow, canary

def test_a_key_stays_with_its_arm_and_shares_are_kept():
    async def test():
        shop = Shop(ModelPlan("m", {"champion": 70, "challenger": 30}, key="who", canary={"off": True}), shelf=Shelf(champion=1, challenger=2))
        column = {who: {(await shop.ask(who=str(who), request=f"{who}{i}")).model for i in range(3)} for who in range(300)}
        header = {who: {(await shop.ask(who=f"other{i}", key=str(who))).model for i in range(3)} for who in range(300)}
        assert all(len(found) == 1 for found in column.values()) and column == header
        assert 60 <= sum("m@2" in found for found in column.values()) <= 120  # 90 expected, a deviation is 8
        rows = named(["who", "n"], [["7", 1], ["8", 1]], "split", {})
        assert {(await shop.endpoint.predict(rows)).model} == column[7]
        free = [(await shop.ask(request=f"r{i}")).model for i in range(20)]
        assert len(set(free)) == 1  # the column holds the same key
    run(test())


def entries_of(journal, seen):
    assert journal.close(120)
    return seen


@pytest.mark.parametrize("fault", ["none", "fails", "hangs", "has other columns"])
def test_a_shadow_never_slows_or_fails_a_request_and_is_only_in_the_journal(fault):
    async def test():
        seen, go, shelf = [], threading.Event(), Shelf(champion=1, challenger=2)
        if fault == "has other columns":
            shelf.columns[2] = {"price": "double"}
        journal = Journal(seen.extend, pause_s=0)
        shop = Shop(ModelPlan("m", {"champion": 100}, shadow="challenger"), shelf=shelf, journal=journal)
        if fault == "fails":
            shop.endpoint.served("m", "challenger").estimator.does = lambda rows: 1 / 0
        elif fault == "hangs":
            shop.endpoint.served("m", "challenger").estimator.does = lambda rows: go.wait(300)
        for i in range(30):
            assert (await shop.ask(i, request=str(i))).answers == [i + 10]
        go.set()
        shadow = shop.endpoint.served("m", "challenger").batcher
        await until(lambda: not shadow.busy)
        await until(lambda: journal.came == (60 if fault in ("none", "hangs") else 30))  # the last copy is put there just after its call
        entries = entries_of(journal, seen)
        assert [entry.request for entry in entries if not entry.shadow] == [str(i) for i in range(30)] and {entry.model for entry in entries if not entry.shadow} == {"m@1"}
        copies = [entry for entry in entries if entry.shadow]
        if fault in ("none", "hangs"):
            assert [(entry.request, entry.model, entry.arm, entry.answers) for entry in copies] == [(str(i), "m@2", "challenger", [i + 20]) for i in range(30)]
        else:
            assert not copies
    run(test())


def test_a_shadow_that_cannot_even_be_asked_is_nobodys_trouble():
    async def test():
        shop = Shop(ModelPlan("m", {"champion": 100}, shadow="challenger"), shelf=Shelf(champion=1, challenger=2))

        def ask(table, kind="predict"):
            raise OverflowError
        shop.endpoint.served("m", "challenger").ask = ask
        assert (await shop.ask(3)).answers == [13]
    run(test())


def test_a_canary_that_fails_is_withdrawn_and_asked_for_until_the_plan_says_so():
    async def test():
        shop = Shop(ModelPlan("m", {"champion": 50, "challenger": 50}), shelf=Shelf(champion=1, challenger=2))

        def fail(rows):
            raise RuntimeError("broken")
        shop.endpoint.served("m", "challenger").estimator.does = fail
        for i in range(400):
            try:
                await shop.ask(request=str(i))
            except RuntimeError:
                pass
            if i % 20 == 0:
                await looked(shop)
        assert shop.withdrawn and shop.withdrawn[0][:2] == ("m", "challenger") and "fails too often" in shop.withdrawn[0][2]
        assert sum(event["event"] == "withdrawn" for event in shop.events) == 1
        asked = len(shop.withdrawn)
        await looked(shop)
        assert len(shop.withdrawn) > asked  # the disk was full, the plan locked: it is asked for again
        shop.set(ModelPlan("m", {"champion": 100, "challenger": 0}))
        await looked(shop)
        asked = len(shop.withdrawn)
        await looked(shop)
        assert len(shop.withdrawn) == asked and {(await shop.ask(request=str(i))).model for i in range(50)} == {"m@1"}
    run(test())


def test_what_clients_do_wrong_is_not_held_against_a_version():
    async def test():
        shop = Shop(ModelPlan("m", {"champion": 50, "challenger": 50}), shelf=Shelf(champion=1, challenger=2))
        for i in range(200):
            with pytest.raises(Invalid):
                await shop.endpoint.predict(from_records([{"n": "x", "who": "a"}], "records", {}), request=str(i))
        await looked(shop)
        canary = shop.endpoint.placed["m"].canary
        assert all(tally.n == 0 for tally in canary.totals.values())
    run(test())


# ---------------------------------------------------------------- errors and memory

def test_errors_keep_what_clients_sent_to_themselves(caplog):
    async def test():
        shop = Shop()

        def fail(rows):
            raise ValueError(f"SECRET {rows}")
        shop.endpoint.served().estimator.does = fail
        with pytest.raises(Refused) as found:
            await shop.ask()
        assert "SECRET" not in str(found.value) + caplog.text and "test_endpoint.py" in caplog.text
        go, shop = threading.Event(), Shop(limits=Limits(queue=Queue(answer_s=0.2)))
        shop.endpoint.served().estimator.does = lambda rows: go.wait(300)
        with pytest.raises(Late):
            await shop.ask()
        go.set()
    run(test())


def test_two_hundred_swaps_leave_no_model_and_no_thread_behind():
    async def test():
        shop = Shop(ModelPlan("m", {"champion": 100}, shadow="challenger"), shelf=Shelf(champion=1, challenger=2))
        before = sum(thread.name == "predict" for thread in threading.enumerate())
        async with asked_all_the_time(shop, clients=4) as answers:
            for version in range(3, 203):
                seen = len(answers)
                shop.shelf.set(champion=version, challenger=version + 1000)
                await looked(shop)
                await until(lambda: len(answers) > seen + 4)
        await until(lambda: sum(thread.name == "predict" for thread in threading.enumerate()) <= before + 2)
        await until(lambda: (gc.collect(), len(shop.shelf.made) <= 3)[1])
        assert len(shop.shelf.loads) == 402
    run(test())


def test_a_request_that_waits_keeps_its_version_alive_and_no_longer():
    async def test():
        shop, go = Shop(), threading.Event()
        shop.endpoint.loop = asyncio.get_running_loop()
        old = shop.endpoint.served()
        old.estimator.does = lambda rows: go.wait(300)
        held = weakref.ref(old.estimator)
        coming = asyncio.ensure_future(shop.ask(1))
        await asyncio.sleep(0.05)
        del old
        shop.shelf.set(champion=2)
        await looked(shop)
        gc.collect()
        assert held() is not None
        go.set()
        assert (await coming).answers == [11]
        del coming
        await until(lambda: (gc.collect(), held() is None)[1])
    run(test())


# ---------------------------------------------------------------- journal

def entry(i, rows=1):
    return Entry(str(i), "m@1", ("n",), [(i,)] * rows, [i] * rows)


def test_a_slow_writer_gets_no_more_than_there_is_room_for():
    go, seen = threading.Event(), []

    def write(entries):
        assert go.wait(300)
        seen.extend(entries)
    journal = Journal(write, capacity=100, pause_s=0)
    taken = [journal.put(entry(i, 10)) for i in range(50)]
    assert sum(taken) == 11 and taken == sorted(taken, reverse=True) and journal.lost == 390
    go.set()
    assert journal.close(120) and [one.request for one in seen] == [str(i) for i in range(11)]


def test_a_writer_that_fails_is_asked_again_and_the_loss_counted(caplog):
    seen = []

    def write(entries):
        if not seen:
            seen.append(0)
            raise OSError("SECRET")
        seen.extend(entries)
    journal = Journal(write, pause_s=0)
    journal.put(entry(1, 3))
    for _ in range(12_000):
        if journal.written == 3:
            break
        threading.Event().wait(0.01)
    assert journal.lost == 3 and "SECRET" not in caplog.text and "OSError" in caplog.text
    journal.put(entry(2))
    assert journal.close(120) and seen[1:] == [entry(2)]


def test_closing_writes_all_that_waits_says_when_it_could_not_and_can_be_repeated():
    seen, go = [], threading.Event()
    journal = Journal(seen.extend, pause_s=0.01)
    assert Journal(seen.extend).close()
    for i in range(12_000):
        journal.put(entry(i))
    assert journal.close(120) and len(seen) == 12_000 and journal.close(120)
    stuck = Journal(lambda entries: go.wait(300), pause_s=0)
    stuck.put(entry(1))
    assert not stuck.close(0.1)
    go.set()


# ---------------------------------------------------------------- sources

class Frames:
    def __init__(self, answer):
        self.answer = answer

    def predict(self, frame):
        return self.answer(frame)


@pytest.mark.parametrize("answer, words", [(lambda frame: 1 / 0, "ZeroDivisionError"), (lambda frame: [1, 2, 3], "ValueError"), (lambda frame: None, "TypeError"), (lambda frame: frame["absent"], "KeyError")])
def test_a_trial_has_to_work_on_real_rows_only(answer, words):
    columns = columns_of(INPUTS)
    real = Version("m", "2", "d", columns, {"columns": ["who", "n"], "data": [["a", 1]]})
    with pytest.raises(Invalid, match=f"m@2 cannot predict its own example .{words}"):
        tried(real, Frames(answer))
    assert tried(replace(real, example=None), Frames(answer)) == []  # made-up rows prove nothing
    assert tried(Version("m", "2"), Frames(answer)) == []


def test_a_trial_gives_the_answers_about_the_example():
    version = Version("m", "2", "d", columns_of(INPUTS), {"columns": ["who", "n", "extra"], "data": [["a", 1, 0], ["b", 2, 0]]})
    assert tried(version, Frames(lambda frame: frame["n"] * np.float64(2))) == [2.0, 4.0]
    optional = replace(version, columns=columns_of([{"name": "n", "type": "long"}, {"name": "who", "type": "string", "required": False}]))
    with pytest.raises(Invalid, match="'who'"):  # clients were free to leave it out
        tried(version, Frames(lambda frame: frame["n"]), optional)


def test_a_bundle_never_changes(tmp_path):
    source = BundleSource(tmp_path)
    assert source.stamp() == source.stamp()
    with pytest.raises((NotFound, Invalid)):
        source.resolve("m", "champion")


def test_a_registry_is_followed_by_its_file(tmp_path):
    folder = init(str(tmp_path / "shop"), name="shop").folder
    source, file = RegistrySource(folder), folder / ".mlops" / "mlflow.db"
    file.parent.mkdir(exist_ok=True)
    stamps = [source.stamp()]
    for content in (b"1", b"22"):
        file.write_bytes(content)
        stamps.append(source.stamp())
    copy = file.with_name("copy")
    copy.write_bytes(b"33")
    copy.replace(file)
    stamps.append(source.stamp())
    file.unlink()
    assert source.stamp() == stamps[0] and len(set(stamps)) == 4 and not file.exists()


def test_a_registry_elsewhere_is_asked_again_and_again(tmp_path, monkeypatch):
    folder = init(str(tmp_path / "shop"), name="shop").folder
    with open(folder / "settings.ini", "a") as file:
        file.write("\n[tracking]\nuri = http://127.0.0.1:9\n")
    now = 1000.0
    monkeypatch.setattr("mlops_nb.serve.sources.time.monotonic", lambda: now)
    source = RegistrySource(folder)
    first = source.stamp()
    assert source.stamp() == first
    now += 10
    assert source.stamp() != first


def test_the_registry_of_a_project_promotes(tmp_path, database):  # noqa: F811
    with in_project(new_shop(tmp_path / "shop", database)):
        frame = pd.DataFrame({"x": [1.0, 2.0, 3.0]})
        for slope in (1, 2):
            register(LinearRegression().fit(frame, slope * frame["x"]), "line", example=frame)
        promote("line@1")
        endpoint = Endpoint(RegistrySource(tmp_path / "shop"), lambda: planned("line@champion"))
        endpoint.follow()
        assert endpoint.served().address == "line@1" and not endpoint.follow()
        promote("line@2")
        assert endpoint.follow() and endpoint.served().address == "line@2"
        assert asyncio.run(endpoint.predict(from_records([{"x": 4}], "records", {}))).answers == pytest.approx([8.0])
        file = tmp_path / "shop" / ".mlops" / "mlflow.db"
        kept = file.read_bytes()
        for spoiled in (b"not a database" * 100, b"", None):
            file.unlink() if spoiled is None else file.write_bytes(spoiled)
            endpoint.follow()
            assert endpoint.served().address == "line@2" and endpoint.refused
        file.write_bytes(kept)
        endpoint.follow()
        assert endpoint.served().address == "line@2" and not endpoint.refused


def test_a_plan_on_a_disk_that_is_only_read_does_not_stop_the_server(tmp_path):
    endpoint = endpoint_of(lambda rows: [1] * len(rows), [{"name": "pieces", "type": "long"}])
    endpoint.good, endpoint.memory = {}, tmp_path / "a file" / "plan.json.good"
    (tmp_path / "a file").write_text("not a folder")
    endpoint.remember()
    assert endpoint.good == {"shelf@3": "3"}


# ---------------------------------------------------------------- keys

def test_a_key_that_is_no_column_is_said_and_still_counts(caplog):
    "A customer's number is often no input of a model; a client sends it beside them, or as a header."
    async def test():
        shop = Shop(ModelPlan("m", {"champion": 50, "1": 50}, key="customer"), shelf=Shelf(champion=2))
        assert "m has no column 'customer' (n, who), so only requests that hold it beside them" in caplog.text
        got = [(await shop.endpoint.predict(from_records([{"n": 1, "who": "a", "customer": i % 8}], "records", {}), request=str(i))).model for i in range(80)]
        assert len(set(got)) == 2 and got == got[:8] * 10
        assert [(await shop.ask(key=str(i % 8), request=str(i))).model for i in range(80)] == got
        told = caplog.text.count("no column")
        shop.endpoint.follow()
        assert caplog.text.count("no column") == told
        shop.set(ModelPlan("m", {"champion": 50, "1": 50}, key="who"))
        shop.endpoint.follow()
        assert caplog.text.count("no column") == told
    run(test())


def test_a_model_of_text_that_was_recorded_otherwise_stays_loaded():
    "Its one column is made up when it is loaded; a look later nothing has changed."
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    endpoint = endpoint_of(make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(["late", "fine"], [0, 1]), [])
    served = endpoint.served()
    endpoint.seen = ()
    endpoint.follow()
    assert endpoint.served() is served and served.columns == columns_of([{"name": "text", "type": "string", "form": "series"}])
