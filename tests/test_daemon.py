"""The scheduler: what is lost and what runs twice when it is killed at any point, doubled, put to sleep, or given a clock that jumps."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest

from mlops_nb.core.errors import Invalid
from mlops_nb.core.files import read_json, timestamp
from mlops_nb.core.settings import init
from mlops_nb.data.store import save
from mlops_nb.monitor.alerts import alert, log_file, recent
from mlops_nb.pipeline import daemon
from mlops_nb.pipeline.backfill import backfill
from mlops_nb.pipeline.daemon import Lease, Scheduler, run_schedules
from mlops_nb.pipeline.due import became_due, happened
from mlops_nb.pipeline.schedules import Schedule, keep, named, past, schedule, store

NOTEBOOKS = Path(__file__).parent / "notebooks"
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
RUN = """echo "$MLOPS_TRIGGER" >> ran.txt; id=$(date -u +%Y%m%d-%H%M%S)-$(printf %04x $(($$ % 65536))); mkdir -p .mlops/runs/$id
echo "{\\"id\\": \\"$id\\", \\"status\\": \\"passed\\", \\"trigger\\": \\"$MLOPS_TRIGGER\\", \\"started_at\\": \\"2026-11-20T12:00:00Z\\", \\"host\\": \\"$(hostname)\\", \\"pid\\": $$, \\"steps\\": []}" > .mlops/runs/$id/run.json
"""  # a run of which only the record is real


class Clock:
    def __init__(self, moment=NOON):
        self.moment = moment

    def __call__(self):
        return self.moment

    def on(self, **by):
        self.moment += timedelta(**by)


def shell(text):
    return lambda fire, one: ["/bin/sh", "-c", text]


@pytest.fixture
def shop(tmp_path, monkeypatch):
    "A project in which it is noon on Friday, 20 November 2026."
    folder = tmp_path / "the shop {é}"
    shutil.copytree(NOTEBOOKS, folder)
    init(folder, name="shop")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLOPS_PROGRESS", "0")
    for name in ("MLOPS_RUN", "MLOPS_STEP", "MLOPS_STEP_FOLDER", "MLOPS_TRIGGER", "MLOPS_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return folder


def put(name="nightly", cron="0 6 * * *", since=NOON, **more):
    "A schedule that nobody has looked at since some moment."
    one = keep(Schedule(name, "add.ipynb", cron, **more))
    with store() as db:
        db.execute("UPDATE schedules SET seen_until = ? WHERE name = ?", (timestamp(since), name))
    return named(one.name)


def scheduler(clock, text=RUN, **lease):
    return Scheduler(Lease(**lease), clock, shell(text))


def until_quiet(one, timeout_s=300):
    "Look until nothing is open any more."
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        one.tick()
        if not states("waiting", "claimed", "running"):
            return
        time.sleep(0.02)
    raise AssertionError(states())


def states(*wanted):
    with store() as db:
        rows = db.execute("SELECT schedule, due, state FROM fires ORDER BY due").fetchall()
    return [(row["schedule"], row["due"], row["state"]) for row in rows if not wanted or row["state"] in wanted]


def ran():
    return Counter(Path("ran.txt").read_text().split()) if Path("ran.txt").exists() else Counter()


KILLS = f"""
import itertools, os, signal, subprocess, sys, time, traceback
from datetime import datetime, timedelta
from contextlib import contextmanager
from mlops_nb.core.settings import in_project
from mlops_nb.pipeline import daemon, due, history, schedules
import apscheduler.triggers.cron, psutil
RUN = {RUN!r}
""" + """
def child(call):
    if pid := os.fork():
        return pid
    try:
        call()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def die_at(at):
    "SIGKILL at the so-manieth point: before and after each transaction that changes something is committed, and before and after a process is started."
    count = 0
    def point():
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
    real_store, real_start = schedules.store, subprocess.Popen
    @contextmanager
    def deadly_store():
        with real_store() as db:
            yield db
            if changed := db.total_changes:
                point()
        if changed:
            point()
    def deadly_start(*args, **kwargs):
        point()
        started = real_start(*args, **kwargs)
        point()
        return started
    schedules.store = daemon.store = deadly_store
    subprocess.Popen = deadly_start

def work(moment):
    one = daemon.Scheduler(daemon.Lease(), lambda: moment, lambda fire, one: ["/bin/sh", "-c", RUN])
    one.tick()
    while open_rows():
        time.sleep(0.05)
        one.tick()

def open_rows():
    with schedules.store() as db:
        return db.execute("SELECT count(*) FROM fires WHERE state IN ('waiting', 'claimed', 'running')").fetchone()[0]
"""


def script(folder, text, timeout=900):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLS + textwrap.dedent(text), str(folder)], capture_output=True, text=True, timeout=timeout, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_killed_at_any_point_it_loses_nothing_and_runs_nothing_twice(shop):
    put(since=NOON - timedelta(hours=6, seconds=1), cron="0,1 6 * * *", overlap="together")
    shutil.copy(".mlops/schedule.db", "fresh.db")
    points = script(shop, """
    moment = datetime.fromisoformat("2026-11-20T06:01:30+00:00")
    for at in itertools.count(1):
        os.replace(".mlops/schedule.db", "last.db")
        open(".mlops/schedule.db", "wb").write(open("fresh.db", "rb").read())
        subprocess.run(["rm", "-rf", ".mlops/runs", "ran.txt", ".mlops/schedules"])
        def doomed():
            die_at(at)
            work(moment)
        killed = ended(child(doomed))
        assert killed in (0, -signal.SIGKILL), killed
        assert ended(child(lambda: work(moment))) == 0
        ran = sorted(open("ran.txt").read().split())
        assert ran == ["schedule:nightly@2026-11-20T06:00:00Z", "schedule:nightly@2026-11-20T06:01:00Z"], (at, ran)
        with schedules.store() as db:
            assert [row["state"] for row in db.execute("SELECT * FROM fires")] == ["passed", "passed"], at
        if killed == 0:
            break
    print(at)
    """)
    assert int(points) > 14


def test_a_run_that_dies_before_it_began_is_started_again_and_one_that_had_begun_is_not(shop):
    put(since=NOON - timedelta(hours=7))
    one = scheduler(Clock(), f"echo x >> tries.txt; [ $(wc -l < tries.txt) -ge 3 ] || kill -9 $$; {RUN}")
    until_quiet(one)
    assert states() == [("nightly", "2026-11-20T06:00:00Z", "passed")] and len(Path("tries.txt").read_text()) == 6 and sum(ran().values()) == 1

    one.clock.on(days=1)
    one.command = shell("kill -9 $$")
    until_quiet(one)
    assert past()[0]["verdict"] == "died" and "3 times before the run began" in past()[0]["note"]
    assert recent(1)[0]["subject"] == "schedule nightly" and recent(1)[0]["severity"] == "critical"

    one.clock.on(days=1)
    one.command = shell(RUN.replace("passed", "running") + "kill -9 $$")
    until_quiet(one)
    assert past()[0]["verdict"] == "died" and past()[0]["run"] and set(ran().values()) == {1} and len(recent(10)) == 2


def test_a_run_that_fails_without_a_record_says_why(shop):
    put(since=NOON - timedelta(hours=7))
    until_quiet(scheduler(Clock(), "echo 'mlops: there is no notebook x.ipynb'; exit 2"))
    assert past()[0]["verdict"] == "failed" and past()[0]["note"] == "mlops: there is no notebook x.ipynb"
    assert "there is no notebook" in recent(1)[0]["message"]


DAEMON = """
import sys
from datetime import datetime, timedelta
from mlops_nb.pipeline.daemon import Lease, Scheduler, run_schedules
moment, lease_s, text = datetime.fromisoformat(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
run_schedules(scheduler=Scheduler(Lease(lease_s), lambda: moment, lambda fire, one: ["/bin/sh", "-c", text]))
"""


def process(moment=NOON, lease_s=30.0, text=RUN, log="daemon.log"):
    "A scheduler in a process of its own; what it says is in its log."
    with open(log, "w") as said:
        return subprocess.Popen([sys.executable, "-W", "ignore", "-c", DAEMON, moment.isoformat(), str(lease_s), text], stderr=said, env={**os.environ, "MLOPS_PROGRESS": "1"})


def wait_for(condition, timeout_s=300):
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, states()
        time.sleep(0.05)
    return found


def leader():
    with store() as db:
        row = db.execute("SELECT * FROM lease WHERE owner != ''").fetchone()
    return row and json.loads(row["process"])["pid"]


def test_two_schedulers_at_once_run_everything_once(shop):
    for name in "abc":
        put(name, "* 6 * * *", since=NOON - timedelta(hours=6, seconds=1), overlap="together")
    logs = [Path("one.log"), Path("other.log")]
    both = [process(NOON - timedelta(hours=5, minutes=56), log=log) for log in logs]
    try:
        wait_for(lambda: any("stands by" in log.read_text() for log in logs) and len(states("passed")) == 15)
        first = leader()
        next(one for one in both if one.pid == first).kill()
        wait_for(lambda: leader() not in (first, None))
    finally:
        for one in both:
            one.terminate()
            one.wait(120)
    assert len(ran()) == 15 and set(ran().values()) == {1} and len(states()) == 15
    assert sorted("stands by" in log.read_text() for log in logs) == [False, True]


def test_a_leader_that_hangs_is_replaced_and_does_nothing_when_it_wakes(shop):
    first = process(lease_s=3)
    wait_for(lambda: leader() == first.pid)
    first.send_signal(signal.SIGSTOP)
    second = process(lease_s=3)
    try:
        wait_for(lambda: leader() == second.pid)
        put(since=NOON - timedelta(hours=7))
        first.send_signal(signal.SIGCONT)
        wait_for(lambda: states("passed"))
        time.sleep(0.5)
        assert ran() == {"schedule:nightly@2026-11-20T06:00:00Z": 1}
    finally:
        for one in (first, second):
            one.kill()
            one.wait(120)


def test_the_fencing_number_stops_a_leader_that_does_not_know_yet(shop):
    put(since=NOON - timedelta(hours=7))
    clock = Clock()
    asleep, awake = scheduler(clock), scheduler(clock)
    assert asleep.lease.take()
    asleep.lease.release(), awake.lease.take()
    asleep.lease.take = lambda: True  # it believes it still leads
    assert asleep.tick() is None and states() == []
    until_quiet(awake)
    assert asleep.tick() is None and set(ran().values()) == {1}


def test_a_process_whose_claim_was_repeated_ends_quietly(shop):
    put(since=NOON - timedelta(hours=7))
    clock = Clock()
    slow = scheduler(clock)
    slow.lease.take(), slow.note_due(named("nightly"), clock())
    with store() as db:
        db.execute("UPDATE fires SET state = 'claimed', attempt = 1, fencing = 1")
    slow.lease.release()
    until_quiet(scheduler(clock))  # the claim has no process here: it is repeated as the second attempt
    late = subprocess.run([sys.executable, "-m", "mlops_nb.pipeline.daemon", str(shop), "nightly", "2026-11-20T06:00:00Z", "1", "/bin/sh", "-c", RUN], cwd=shop, timeout=300)
    assert late.returncode == 0 and set(ran().values()) == {1}


def test_sigterm_leaves_alone_what_runs_and_the_next_one_follows_it(shop):
    put(since=NOON - timedelta(hours=7))
    one = process(text=RUN.replace("passed", "running").replace("$(hostname)", "elsewhere") + "while [ ! -e go ]; do sleep 0.1; done; sed -i s/running/passed/ .mlops/runs/*/run.json")
    wait_for(ran)
    one.send_signal(signal.SIGTERM)
    assert one.wait(120) == 0 and leader() is None and states("running")
    after = scheduler(Clock(), "echo twice >> ran.txt")
    after.tick(), after.tick()
    assert states("running")
    Path("go").touch()
    until_quiet(after)
    assert past()[0]["verdict"] == "passed" and past()[0]["run"] and sum(ran().values()) == 1


def test_a_clock_set_back_runs_nothing_twice_and_loses_nothing(shop):
    put(cron="0 * * * *")
    clock = Clock()
    one = scheduler(clock)
    for step in (dict(hours=1), dict(hours=-3), dict(hours=1), dict(hours=1), dict(hours=1), dict(hours=1), dict(days=-20), dict(hours=1)):
        clock.on(**step)
        until_quiet(one)
    assert sorted(ran()) == sorted(f"schedule:nightly@2026-{text}:00:00Z" for text in ("11-20T13", "11-20T11", "11-20T12", "11-20T14", "10-31T15")), ran()
    assert set(ran().values()) == {1}


@pytest.mark.parametrize("misfire, runs, note", [("skip", [], "6 missed since"), ("once", ["20T06"], "6 missed since"), ("all", ["15T06", "16T06", "17T06", "18T06", "19T06", "20T06"], "")])
def test_a_clock_set_forward_is_a_misfire(shop, misfire, runs, note):
    put(misfire=misfire, since=NOON - timedelta(days=6))
    until_quiet(scheduler(Clock()))
    assert sorted(ran()) == [f"schedule:nightly@2026-11-{due}:00:00Z" for due in runs]
    assert note in past()[0]["note"]


def test_a_year_of_missed_minutes_is_one_run_or_none_and_all_of_them_come_in_parts():
    for misfire, many in (("skip", 1), ("once", 1), ("all", 100)):
        one = Schedule("often", "add.ipynb", "* * * * *", misfire=misfire, seen_until="2025-11-20T00:00:00Z", grace_s=0)
        rows, seen = became_due(one, NOON)
        assert len(rows) == many and (seen == NOON) == (misfire != "all")
        assert rows[-1].moment == (NOON if misfire != "all" else datetime(2025, 11, 20, 1, 40, tzinfo=UTC))


def test_a_long_past_is_made_up_in_parts_and_whole(shop, monkeypatch):
    monkeypatch.setattr("mlops_nb.pipeline.due.AT_ONCE", 3), monkeypatch.setattr(daemon, "AT_ONCE", 3)
    put(cron="0 * * * *", misfire="all", since=NOON - timedelta(hours=8))
    one = scheduler(Clock())
    one.tick(), one.tick(), one.tick()
    assert len(states()) <= 6
    until_quiet(one)
    assert sorted(ran()) == [f"schedule:nightly@2026-11-20T{hour:02}:00:00Z" for hour in range(5, 13)] and set(ran().values()) == {1}


def test_what_is_late_by_less_than_the_grace_was_not_missed():
    one = Schedule("often", "add.ipynb", "* * * * *", misfire="skip", seen_until=timestamp(NOON - timedelta(minutes=10)), grace_s=180)
    assert [due.state for due in became_due(one, NOON)[0]] == ["missed", "waiting", "waiting", "waiting"]


def test_start_and_end_bound_a_schedule():
    one = Schedule("x", "add.ipynb", "0 * * * *", start="2026-11-20T10:00:00Z", end="2026-11-20T11:00:00Z", seen_until="2026-11-19T00:00:00Z", misfire="all")
    assert [f"{due.moment:%H}" for due in became_due(one, NOON)[0]] == ["10", "11"]


@pytest.mark.parametrize("overlap, expected", [("skip", ["skipped"]), ("wait", ["waiting"]), ("together", ["running"])])
def test_a_time_that_comes_while_the_run_before_it_goes_on(shop, overlap, expected):
    put(cron="0 * * * *", overlap=overlap)
    clock = Clock()
    one = scheduler(clock, RUN + "while [ ! -e go ]; do sleep 0.1; done")
    clock.on(hours=1)
    one.tick()
    wait_for(lambda: sum(ran().values()) == 1)
    clock.on(hours=1)
    one.tick()
    if overlap == "together":
        wait_for(lambda: sum(ran().values()) == 2)
    assert [row["verdict"] for row in past()][:1] == expected
    Path("go").touch()
    until_quiet(one)
    assert sum(ran().values()) == (1 if overlap == "skip" else 2)


def test_one_bad_row_is_alerted_once_and_the_others_run(shop):
    for name, column, value in (("a", "cron", "0 6 * * mondays"), ("b", "timezone", "Mars"), ("c", "params", "{"), ("d", "seen_until", "yesterday"), ("e", "misfire", "twice"), ("f", "grace_s", "x"),
                                ("g", "params", '{"week": "{weak}"}'), ("h", "source", "")):
        put(name, since=NOON - timedelta(hours=7))
        with store() as db:
            db.execute(f"UPDATE schedules SET {column} = ? WHERE name = ?", (value, name))
    put(since=NOON - timedelta(hours=7))
    one = scheduler(Clock())
    until_quiet(one), one.tick()
    assert ran()["schedule:nightly@2026-11-20T06:00:00Z"] == 1 and set(ran()) <= {f"schedule:{name}@2026-11-20T06:00:00Z" for name in ("nightly", "h")}
    assert Counter(said["subject"] for said in recent(99)) == {f"schedule {name}": 1 for name in "abcdefg"}
    with store() as db:
        db.execute("UPDATE schedules SET cron = '0 6 * * *' WHERE name = 'a'")
    until_quiet(one)
    assert ran()["schedule:a@2026-11-20T06:00:00Z"] == 1


def test_new_versions_of_data_within_a_minute_start_one_run_with_the_newest(shop):
    for rows in (1, 2):
        save(pd.DataFrame({"x": range(rows)}), "orders")
    put(cron="", on_data="orders", params={"data": "{data}"})
    clock = Clock()
    one = scheduler(clock)
    one.tick()
    assert states() == []
    for rows in (3, 4, 5):
        save(pd.DataFrame({"x": range(rows)}), "orders")
        clock.on(seconds=10)
        one.tick()
    assert states() == []
    clock.on(seconds=60)
    until_quiet(one)
    clock.on(seconds=600)
    until_quiet(one)
    with store() as db:
        rows = db.execute("SELECT * FROM fires").fetchall()
    assert [(row["cause"], json.loads(row["params"])) for row in rows] == [("data orders@5", {"data": "orders@5"})]


def test_a_version_saved_during_the_run_is_not_forgotten(shop):
    save(pd.DataFrame({"x": [1]}), "orders")
    save(pd.DataFrame({"x": [1, 2]}), "orders:clean")
    put(cron="", on_data="orders:clean", debounce_s=0)
    one = scheduler(Clock(), RUN + "while [ ! -e go ]; do sleep 0.1; done")
    save(pd.DataFrame({"x": [1]}), "orders")  # the main line is not meant
    one.tick()
    assert states() == []
    save(pd.DataFrame({"x": [1, 2, 3]}), "orders:clean")
    one.tick()
    wait_for(ran)
    save(pd.DataFrame({"x": [1, 2, 3, 4]}), "orders:clean")
    one.tick(), one.tick()
    assert len(states()) == 1
    Path("go").touch()
    until_quiet(one), until_quiet(one)
    assert [row["cause"] for row in past()] == ["data orders:clean@3", "data orders:clean@2"]


def test_a_storm_of_alerts_starts_one_run_and_its_own_failure_no_other(shop):
    put("retrain", cron="", on_alert="any", debounce_s=30)
    clock = Clock()
    one = scheduler(clock, "echo '{\"at\": \"2026-11-20T12:00:00Z\", \"severity\": \"critical\", \"subject\": \"add\", \"message\": \"it failed\"}' >> .mlops/alerts.jsonl; exit 1")
    alert("nothing to worry about", severity="info", subject="recommender")
    one.tick()
    for i in range(50):
        alert(f"PSI {i}", subject="recommender")
        if i % 10 == 0:
            clock.on(seconds=5)
            one.tick()
    clock.on(seconds=30)
    until_quiet(one)
    for _ in range(5):
        clock.on(seconds=100)
        until_quiet(one)
    assert [row["verdict"] for row in past()] == ["failed"] and past()[0]["cause"].startswith("alert recommender: PSI 0")
    with log_file().open("a") as file:
        file.write('{"torn": \n[1]\n')
    alert("again", severity="critical", subject="orders")
    one.tick(), clock.on(seconds=31), until_quiet(one)
    assert len(past()) == 2


def test_half_a_line_of_the_log_of_alerts_is_read_when_it_is_whole(shop):
    one = put("retrain", cron="", on_alert="recommender", debounce_s=0)
    line = '{"at": "2026-11-20T12:00:00Z", "severity": "warning", "subject": "recommender", "message": "drift"}\n'
    log_file().write_text(line[:40])
    found, seen = happened(one, NOON, False)
    assert found == [] and seen["alerts"] == 0
    log_file().write_text(line)
    found, seen = happened(Schedule(**{**vars(one), "seen": seen}), NOON, False)
    assert len(found) == 1 and seen["alerts"] == len(line)
    log_file().write_text("")  # somebody cleaned up
    assert happened(Schedule(**{**vars(one), "seen": seen}), NOON, False)[1]["alerts"] == 0


def test_backfill_runs_each_time_that_has_not_run_in_order(shop):
    one = put(params={"week": "{today}"}, timezone="Europe/Paris")
    clock = Clock()
    work = scheduler(clock)
    with store() as db:
        db.execute("INSERT INTO fires (schedule, due, state, cause, params) VALUES ('nightly', '2026-11-03T05:00:00Z', 'passed', 'time', '{}'), ('nightly', '2026-11-04T05:00:00Z', 'missed', 'missed', '{}')")
    planned = backfill(one, "2026-11-02", "2026-11-05", dry_run=True, scheduler=work)
    assert [row["week"] for row in planned.facts["would run"]] == ["2026-11-02", "2026-11-04", "2026-11-05"] and not ran()
    done = backfill(one, "2026-11-02", "2026-11-05", scheduler=work)
    assert done.passed and [row["due"][:10] for row in done.facts["fires"]] == ["2026-11-02", "2026-11-04", "2026-11-05"]
    assert Path("ran.txt").read_text().split() == [f"schedule:nightly@2026-11-0{day}T05:00:00Z" for day in (2, 4, 5)]
    assert "has run" in backfill(one, "2026-11-02", "2026-11-05", scheduler=work).facts["summary"] and sum(ran().values()) == 3
    for start, end in (("", ""), ("last week", "")):
        with pytest.raises(Invalid):
            backfill(one, start, end)
    with pytest.raises(Invalid, match="more than 5,000 times"):
        backfill(put("often", "* * * * *"), "2026-01-01", scheduler=work)


def test_a_backfill_leaves_the_work_to_a_scheduler_that_runs(shop):
    one, leads = put(), process()
    try:
        wait_for(leader)
        done = backfill(one, "2026-11-19", "2026-11-20", scheduler=scheduler(Clock()))
        assert done.passed and len(done.facts["fires"]) == 2 and leader() == leads.pid and set(ran().values()) == {1}
    finally:
        leads.kill()
        leads.wait(120)


def test_ctrl_c_takes_back_what_a_backfill_has_not_begun(shop, monkeypatch):
    one, work = put(), scheduler(Clock(), RUN + "sleep 1")
    real = daemon.time.sleep
    monkeypatch.setattr(daemon.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt) if ran() else None)
    with pytest.raises(KeyboardInterrupt):
        backfill(one, "2026-11-10", "2026-11-20", scheduler=work)
    monkeypatch.setattr(daemon.time, "sleep", real)
    assert len(states()) == 1 and not states("waiting")


def test_removed_and_paused_schedules(shop):
    put("a", since=NOON - timedelta(hours=7)), put("b", since=NOON - timedelta(hours=7))
    one = scheduler(Clock(), RUN + "while [ ! -e go ]; do sleep 0.1; done")
    schedule("pause", "b")
    one.tick()
    wait_for(ran)
    schedule("remove", "a")
    Path("go").touch()
    until_quiet(one)
    assert states() == [("a", "2026-11-20T06:00:00Z", "passed")]
    schedule("resume", "b")
    until_quiet(one)
    assert len(states()) == 1, "what was due during the pause is not made up"


def test_a_tick_of_its_own_starts_a_real_run(shop):
    put(since=NOON - timedelta(hours=7), params={"b": "{due:%d}"})
    report = run_schedules(once=True, scheduler=Scheduler(clock=Clock()))
    assert report.facts["started"] == 1 and leader() is None
    until_quiet(Scheduler(clock=Clock()))
    fire = past()[0]
    assert fire["verdict"] == "passed", (fire, list(Path(".mlops/schedules").rglob("*.log"))[0].read_text())
    record = read_json(Path(f".mlops/runs/{fire['run']}/run.json"))
    assert record["trigger"] == "schedule:nightly@2026-11-20T06:00:00Z" and record["params"]["b"] in (20, "20") and record["source"] == "add.ipynb"


def test_a_machine_that_cannot_start_processes_is_tried_again(shop, monkeypatch):
    put(since=NOON - timedelta(hours=7))
    one, real = scheduler(Clock()), subprocess.Popen
    monkeypatch.setattr(daemon.subprocess, "Popen", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(12, "Cannot allocate memory")))
    one.tick()
    monkeypatch.setattr(daemon.subprocess, "Popen", real)
    until_quiet(one)
    assert [row["verdict"] for row in past()] == ["passed"] and set(ran().values()) == {1}


def test_settings_that_are_being_edited_do_not_end_it(shop):
    good = Path("settings.ini").read_text()
    one = process()
    try:
        wait_for(leader)
        Path("settings.ini").write_text("[project]\nname = shop\n[schedules]\n")
        wait_for(lambda: "unknown section [schedules]" in Path("daemon.log").read_text())
        Path("settings.ini").write_text(good)
        put(since=NOON - timedelta(hours=7))
        wait_for(lambda: states("passed"))
        assert one.poll() is None
    finally:
        one.kill()
        one.wait(120)


def test_a_run_on_another_machine_is_believed_until_its_record_says_otherwise(shop):
    put(since=NOON - timedelta(hours=7))
    one = scheduler(Clock())
    one.lease.take(), one.note_due(named("nightly"), NOON)
    with store() as db:
        db.execute("UPDATE fires SET state = 'running', attempt = 1, process = ?", (json.dumps({"host": "elsewhere", "pid": 1, "process_started": 0.0, "boot": "x"}),))
    one.tick(), one.tick()
    assert states("running") and not ran()
    folder = Path(".mlops/runs/20261120-060000-0001")
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"id": folder.name, "status": "failed", "trigger": "schedule:nightly@2026-11-20T06:00:00Z", "started_at": "2026-11-20T06:00:00Z", "steps": [], "problem": "no"}))
    until_quiet(one)
    assert past()[0]["verdict"] == "failed" and past()[0]["note"] == "no" and not recent(5)
