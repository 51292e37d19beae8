"""Schedules: when they are due, on every clock there is, and what is kept of them."""

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from cronsim import CronSim

from mlops_nb.core.errors import Conflict, Invalid, NotFound, Unavailable
from mlops_nb.core.settings import init
from mlops_nb.interface.cli import main
from mlops_nb.pipeline import schedules as module
from mlops_nb.pipeline.calendar import Cron, filled, latest, times, zone
from mlops_nb.pipeline.schedules import Schedule, keep, named, past, schedule, schedules, store

NOTEBOOKS = Path(__file__).parent / "notebooks"
START = datetime(2026, 1, 31, 22, 57, tzinfo=UTC)


def first(text, count=40, after=START, timezone="UTC"):
    return list(islice(times(Cron.parse(text), after, timezone=timezone), count))


def by_cronsim(text, count=40, after=START, timezone="UTC"):
    "The same times by cronsim (BSD), which follows Debian's cron."
    return [due.astimezone(UTC) for due in islice(CronSim(text, after.astimezone(ZoneInfo(timezone)) if timezone != "UTC" else after), count)]


EXPRESSIONS = ["0 6 * * 1", "0 6 * * 0", "0 6 * * 7", "0 6 * * 1-5", "0 6 * * sun", "30 4 1,15 * 5", "*/15 * * * *", "5-59/10 */6 * * *", "0 0 29 2 *", "0 0 31 * *", "0 0 1 1 *",
               "0 12 * jan,jul mon-fri", "0 0 13 * 5", "0 0 */2 * 1", "0 0 1 * */2", "15 10 * * 6,0", "0 22 * 2-11/3 2-4/2", "1,2,59 23 31 12 *", "0 9 1-7 * 1", "0 0 * * 5-7", "7 7 7 7 7"]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_times_are_those_of_cronsim(text):
    assert first(text) == by_cronsim(text)


def random_expression(dice):
    def field(low, high, star=0.4):
        if dice.random() < star:
            return "*" if dice.random() < 0.6 else f"*/{dice.randint(2, max(high // 2, 3))}"
        terms = []
        for _ in range(dice.randint(1, 3)):
            a, b = sorted(dice.sample(range(low, high + 1), 2))
            terms.append(dice.choice([str(a), f"{a}-{b}", f"{a}-{b}/{dice.randint(1, 4)}"]))
        return ",".join(terms)
    return " ".join([field(0, 59), field(0, 23), field(1, 28), field(1, 12), field(0, 7)])


def test_times_of_random_expressions_are_those_of_cronsim():
    dice = random.Random(4)
    for _ in range(250):
        text = random_expression(dice)
        assert first(text, 12) == by_cronsim(text, 12), text


@pytest.mark.parametrize("timezone", ["Europe/Paris", "America/New_York", "Australia/Lord_Howe", "America/Sao_Paulo", "Asia/Kathmandu", "Pacific/Apia"])
@pytest.mark.parametrize("text", ["30 2 * * *", "0,30 1,2,3 * * *", "0 0 * * *", "*/20 * * * *", "15 1-4 * * 0", "59 23 28-31 * *"])
def test_times_through_a_year_of_summer_time_are_those_of_cronsim(text, timezone):
    after = datetime(2010, 12, 31, 12, tzinfo=UTC)  # in this year Samoa left out a whole day
    ours = list(times(Cron.parse(text), after, timezone=timezone, until=datetime(2012, 1, 2, tzinfo=UTC)))
    theirs = [due for due in by_cronsim(text, len(ours) + 400, after, timezone) if due <= ours[-1]]
    assert ours == list(dict.fromkeys(theirs))  # cronsim repeats the end of a gap for each time that fell into it


def test_what_is_due_in_the_missing_and_in_the_doubled_hour_runs_once():
    paris = ZoneInfo("Europe/Paris")
    for day, at in (("2026-03-29", "03:00"), ("2026-10-25", "02:30")):
        begin = datetime.fromisoformat(f"{day}T00:00").replace(tzinfo=paris)
        due = list(times(Cron.parse("30 2 * * *"), begin, timezone="Europe/Paris", until=begin + timedelta(hours=23)))
        assert [f"{one.astimezone(paris):%H:%M}" for one in due] == [at]
        quarters = list(times(Cron.parse("*/15 * * * *"), begin, timezone="Europe/Paris", until=begin + timedelta(hours=12)))
        assert {later - earlier for earlier, later in zip(quarters, quarters[1:])} == {timedelta(minutes=15)}
    assert [f"{due.astimezone(paris):%H:%M}" for due in first("0 */2 * * *", 13, datetime(2026, 10, 24, 22, 0, tzinfo=UTC), "Europe/Paris")[:3]] == ["02:00", "04:00", "06:00"]


def test_the_two_mondays_of_cron_and_apscheduler_are_one():
    assert {due.weekday() for due in first("0 6 * * 1")} == {0}
    assert {due.weekday() for due in first("0 6 * * 0") + first("0 6 * * 7")} == {6}
    assert Cron.parse("0 6 * * fri-sun").weekdays == (0, 5, 6) and Cron.parse("0 6 * * 5-7").weekdays == (0, 5, 6)
    assert {(due.day, due.weekday()) for due in first("0 0 13 * 5", 60)} >= {(13, 2), (6, 4)}, "the 13th, and every Friday"


@pytest.mark.parametrize("text, wrong", [
    ("", "0 fields"), ("0 6 * *", "4 fields"), ("0 0 6 * * 1", "6 fields: seconds"), ("60 * * * *", "minute 60 is not between 0 and 59"), ("0 24 * * *", "hour 24"),
    ("0 0 0 * *", "day of month 0"), ("0 0 32 * *", "day of month 32"), ("0 0 * 13 *", "month 13"), ("0 0 * * 8", "weekday 8 is not between 0 and 7"), ("0 0 31 2 *", "never comes"),
    ("0 0 31 4,6 */2", "never comes"), ("*/0 * * * *", "empty range"), ("30-10 * * * *", "empty range"), ("0 0 * * mo", "weekday 'mo' is no number and none of sun, mon"),
    ("*-5 * * * *", "cannot be read"), ("0 0 L * *", "day of month 'L'"), ("a b c d e", "minute 'a'"), ("-1 * * * *", "cannot be read"), ("1, * * * *", "cannot be read"),
    ("@reboot", "1 field;"), ("٣ * * * *", "no number"), ("0 0 * * 1#2", "cannot be read"), ("1/2/3 * * * *", "cannot be read")])
def test_an_expression_is_refused_with_the_field_that_is_wrong(text, wrong):
    with pytest.raises(Invalid, match="is not a cron expression") as caught:
        Cron.parse(text)
    assert wrong in str(caught.value) and "expected minute, hour, day of month" in str(caught.value)


@pytest.mark.parametrize("name, text", [("@hourly", "0 * * * *"), ("@daily", "0 0 * * *"), ("@midnight", "0 0 * * *"), ("@weekly", "0 0 * * 0"), ("@Monthly", "0 0 1 * *"), ("@yearly", "0 0 1 1 *")])
def test_shorthands(name, text):
    assert Cron.parse(name) == Cron.parse(text)


def test_the_last_time_before_a_moment():
    before = datetime(2026, 11, 23, 14, 3, tzinfo=UTC)
    for text in EXPRESSIONS:
        found = latest(Cron.parse(text), before)
        assert found <= before and next(times(Cron.parse(text), found)) > before, text
    assert latest(Cron.parse("0 6 * * 1"), datetime(2026, 11, 23, 6, tzinfo=UTC)) == datetime(2026, 11, 23, 6, tzinfo=UTC)


@pytest.mark.parametrize("name", ["Europe/Pariss", "Mars", "", "../../etc/passwd", "Europe", "CET+1"])
def test_a_zone_that_is_none(name):
    with pytest.raises(Invalid, match="is not a time zone"):
        zone(name)


DUE = datetime(2027, 1, 1, 23, 30, tzinfo=UTC)  # in Paris it is half past midnight of Saturday, 2 January, in ISO week 53 of 2026


@pytest.mark.parametrize("value, expected", [
    ("{week}", "2026-W53"), ("{due:%G-W%V}", "2026-W53"), ("{today}", "2027-01-02"), ("{yesterday}", "2027-01-01"), ("{month}", "2027-01"), ("{month-1mo}", "2026-12"),
    ("{due}", "2027-01-02T00:30:00+01:00"), ("{due-7d:%Y-%m-%d}", "2026-12-26"), ("{due-12h:%H}", "12"), ("{due+2w:%d.%m.}", "16.01."), ("{due-1y:%Y}", "2026"),
    ("a {today} b {week}", "a 2027-01-02 b 2026-W53"), ("{{plain}}", "{plain}"), ("no braces", "no braces"), ("{data}", "orders@3"), (7, 7), ("", ""), ("{due:%H:%M}", "00:30")])
def test_dates_in_parameters(value, expected):
    assert filled({"p": value}, DUE, timezone="Europe/Paris", facts={"data": "orders@3"}) == {"p": expected}


def test_months_are_as_long_as_they_are():
    assert filled({"p": "{due-1mo:%Y-%m-%d}"}, datetime(2026, 3, 31, tzinfo=UTC)) == {"p": "2026-02-28"}
    assert filled({"p": "{due-1y:%Y-%m-%d}"}, datetime(2028, 2, 29, tzinfo=UTC)) == {"p": "2027-02-28"}
    assert filled({"p": "{due-1h:%H:%M %Z}"}, datetime(2026, 3, 29, 1, 30, tzinfo=UTC), timezone="Europe/Paris") == {"p": "01:30 CET"}


@pytest.mark.parametrize("value", ["{weak}", "{due", "due}", "{}", "{due:.2f}", "{due:%Q}", "{due-7}", "{due-7x}", "{due!r}", "{0}", "{due.year}", "{due:%}", '{"a": 1}', "{data}", "{due-99999y}"])
def test_a_date_that_cannot_be_filled_in(value):
    with pytest.raises(Invalid, match="the parameter week=.* cannot be filled in"):
        filled({"week": value}, DUE)


@pytest.fixture
def shop(tmp_path, monkeypatch):
    "A project in which it is noon on Friday, 20 November 2026."
    folder = tmp_path / "the shop"
    shutil.copytree(NOTEBOOKS, folder)
    init(folder, name="shop")
    monkeypatch.chdir(folder)
    for name in ("MLOPS_TRIGGER", "MLOPS_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "now", lambda: datetime(2026, 11, 20, 12, tzinfo=UTC))
    return folder


def mlops(capsys, *words):
    code = main(["schedule", *words])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_the_life_of_a_schedule_on_the_command_line(shop, capsys):
    code, said = mlops(capsys)
    assert code == 0 and "Nothing is scheduled" in said and "mlops schedule add" in said
    code, said = mlops(capsys, "add", "add.ipynb", "--cron", "0 6 * * 1", "--timezone", "Europe/Paris", "-p", "a={due:%V}", "-p", "b=2.5", "--name", "weekly")
    assert code == 0 and "Mon 2026-11-23 06:00 CET" in said and "Mon 2026-12-21 06:00 CET" in said and said.count("06:00 CET") == 5 and " 48 " in said
    code, said = mlops(capsys)
    assert "weekly" in said and "Mon 2026-11-23 06:00 CET" in said and "No scheduler is running" in said
    assert "Mon 2026-11-30" in mlops(capsys, "next", "weekly")[1] and "Mon 2026-11-30" in mlops(capsys, "next")[1]
    assert "Nothing has been due yet" in mlops(capsys, "history")[1]
    assert "paused" in mlops(capsys, "pause", "weekly")[1] and "active" in mlops(capsys, "resume", "weekly")[1]
    assert json.loads(mlops(capsys, "show", "weekly", "--json")[1])["when"] == "0 6 * * 1 (Europe/Paris)"
    assert mlops(capsys, "run", "--once")[0] == 0
    assert mlops(capsys, "remove", "weekly")[0] == 0 and not schedules()


@pytest.mark.parametrize("words, wrong", [
    (["lisst"], "did you mean list?"), (["show", "weekli"], "did you mean weekly?"), (["show"], "which schedule? there are: weekly."), (["add", "nothing.ipynb", "--cron", "@daily"], "nothing.ipynb"),
    (["add", "add.ipynb"], "never due"), (["add", "add.ipynb", "--cron", "0 25 * * *"], "hour 25"), (["add", "add.ipynb", "--cron", "@daily", "--timezone", "Paris"], "is not a time zone"),
    (["add", "add.ipynb", "--cron", "@daily", "-p", "c=1"], "has no parameter 'c'"), (["add", "add.ipynb", "--cron", "@daily", "-p", "a=many"], "a"), (["add", "add.ipynb", "--cron", "@daily", "-p", "a={weak}"], "did you mean week?"),
    (["add", "add.ipynb", "--cron", "@daily", "--misfire", "later"], "expected skip (what was missed"), (["add", "add.ipynb", "--cron", "@daily", "--overlap", "no"], "expected skip (a time"),
    (["add", "add.ipynb", "--cron", "@daily", "--name", "a b"], "cannot name a schedule"), (["add", "add.ipynb", "--cron", "@daily", "--name", "weekly"], "already"), (["add", "add.ipynb", "--on-data", "orders"], "no data set 'orders'"),
    (["add", "add.ipynb", "--on-alert", "recommender:loud"], "names no alerts"), (["add", "add.ipynb", "--cron", "@daily", "--start", "tomorrow"], "is not a date"), (["add", "add.ipynb", "--cron", "@daily", "--grace-s", "-1"], "0 or more"),
    (["backfill", "weekly"], "needs a schedule with --cron and the first day"), (["export", "weekly", "--to", "jenkins"], "jenkins")])
def test_a_mistake_is_one_sentence_and_nothing_is_kept(shop, capsys, words, wrong):
    keep(Schedule("weekly", "add.ipynb", "0 6 * * 1"))
    code, said = mlops(capsys, *words)
    assert code == 2 and wrong in said and "Traceback" not in said, said
    assert [one.name for one in schedules()] == ["weekly"] and not schedules()[0].broken


def test_a_pipeline_gives_its_name_and_the_setting_its_zone(shop):
    (shop / "settings.ini").write_text("[project]\nname = shop\n[schedule]\ntimezone = Asia/Tokyo\n")
    (shop / "train").mkdir()
    shutil.copy("add.ipynb", "train")
    (shop / "train" / "pipeline.toml").write_text('[params]\na = 1\n[[step]]\nname = "sum"\nnotebook = "add.ipynb"\nparams = { a = "{a}" }\n')
    one = schedule("add", "train", cron="@daily", params={"a": "{due:%d}"}, start="2026-12-01", end="2026-12-02")
    assert (one.name, one.source, one.timezone) == ("train", "train/pipeline.toml", "Asia/Tokyo")
    assert [row["due"] for row in one.upcoming()] == ["Tue 2026-12-01 00:00 JST", "Wed 2026-12-02 00:00 JST"]
    assert one.start == "2026-11-30T15:00:00Z" and one.end == "2026-12-02T14:59:59Z"


@pytest.mark.parametrize("to", ["cron", "systemd", "kubernetes", "airflow", "github"])
def test_export(shop, capsys, to):
    keep(Schedule("weekly", "add.ipynb", "0 6 * * 1", "Europe/Paris", {"a": "{due:%V}"}))
    code, said = mlops(capsys, "export", "weekly", "--to", to)
    assert code == 0 and "weekly" in said


def test_once_runs_for_the_last_time_it_was_due(shop, monkeypatch):
    asked = {}
    monkeypatch.setattr("mlops_nb.pipeline.runs.run", lambda what, **more: asked.update(what=what, trigger=os.environ["MLOPS_TRIGGER"], **more))
    schedule("once", "add.ipynb", name="weekly", cron="50 23 * * 5", timezone="Europe/Paris", params={"a": "{today}"})
    assert asked["params"] == {"a": "2026-11-13"} and asked["trigger"] == "schedule:weekly@2026-11-13T22:50:00Z" and asked["overlap"] == "wait"
    schedule("once", "add.ipynb", name="weekly", cron="50 23 * * 5", params={"a": "{today}"}, due="2026-10-02T23:50:00+00:00")
    assert asked["params"] == {"a": "2026-10-02"} and "MLOPS_TRIGGER" not in os.environ or not os.environ["MLOPS_TRIGGER"]


def test_a_store_that_is_damaged_or_newer_is_named(shop):
    keep(Schedule("weekly", "add.ipynb", "0 6 * * 1"))
    file = Path(".mlops/schedule.db")
    good = file.read_bytes()
    with sqlite3.connect(file) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(Invalid, match="newer mlops_nb"):
        schedules()
    file.write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(Invalid, match="damaged .*restore it from a backup"):
        schedules()
    file.write_bytes(good[:4096] + b"\0" * (len(good) - 4096))
    with pytest.raises(Invalid, match="damaged"):
        schedules()
    file.unlink()
    file.mkdir()
    with pytest.raises(Unavailable, match="cannot be used"):
        schedules()


def test_a_transaction_that_fails_leaves_nothing_behind(shop):
    keep(Schedule("weekly", "add.ipynb", "0 6 * * 1"))
    with pytest.raises(ZeroDivisionError):
        with store() as db:
            db.execute("DELETE FROM schedules")
            1 / 0
    assert named("weekly").cron == "0 6 * * 1"
    with pytest.raises(NotFound, match="did you mean weekly"):
        named("weekli")
    with pytest.raises(Conflict, match="already"):
        keep(Schedule("weekly", "add.ipynb", "@daily"))


def test_eight_processes_add_at_once_and_none_is_lost(shop):
    code = "import sys; from mlops_nb.pipeline.schedules import Schedule, keep; keep(Schedule(sys.argv[1], 'add.ipynb', '@daily'))"
    writers = [subprocess.Popen([sys.executable, "-c", code, f"s{i}"]) for i in range(8)]
    assert [writer.wait(600) for writer in writers] == [0] * 8 and len(schedules()) == 8


def test_nothing_big_is_imported_to_look_at_schedules(shop):
    code = "import sys, mlops_nb.pipeline.schedules as s, mlops_nb.pipeline.daemon; s.schedule(); print([m for m in ('pandas', 'numpy', 'papermill', 'mlflow', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout == "[]\n"
