"""Exported schedules: each is read by the tool it is for, is due when ours is, and hands over the very same words.

`python tests/test_exports.py --install` makes the environments of Airflow 2 and 3 (below .venv) and installs Debian's cron; what is absent is skipped.
"""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from zoneinfo import ZoneInfo

import nbformat
import pytest
import yaml
from patience import until
from cronsim import CronSim

from mlops_nb.core.errors import Invalid, NotFound, Unavailable
from mlops_nb.core.settings import init
from mlops_nb.interface.cli import verb_parser
from mlops_nb.interface.verbs import VERBS
from mlops_nb.pipeline.calendar import Cron, times
from mlops_nb.pipeline.exports import TOOLS, Task, calendar_events, command, differences, export, plain_cron, task_of, written
from mlops_nb.pipeline.schedules import Schedule

AIRFLOW = {"2.10": ["apache-airflow==2.10.5"], "3": ["apache-airflow==3.3.2", "apache-airflow-providers-standard==1.21.0"]}
ENVIRONMENTS = Path(__file__).parent.parent / ".venv" / "airflow"
NASTY = {"note": "it's 5% of ${{ secrets.X }} {{ ds }} $(HOME) $HOME \"q\" `id` ; & | > * # ñ", "until": "{due:%Y-%m-%d}", "week": "{week}", "empty": ""}
AFTER = datetime(2026, 11, 23, 5, 0, tzinfo=timezone.utc)
CASES = [  # cron, zone
    ("30 6 * * 1", "Europe/Paris"), ("30 6 * * mon-fri", "America/New_York"), ("*/15 8-18 * * *", "UTC"), ("5/20 * * * *", "UTC"), ("0 6 1 * 1", "Asia/Kolkata"), ("0 0 */10 1,7 *", "UTC"),
    ("15 23 * jan-mar fri-7", "Asia/Tokyo"), ("0 12 29 2 *", "UTC"), ("59 23 31 * *", "Europe/Berlin"), ("0 4 1-7,15 * 0,3", "America/Sao_Paulo"), ("@weekly", "Europe/Paris"),
    ("0 9-17/4 * 2-12/3 2,4-6", "Australia/Sydney"), ("0 4 28-31 3,10 *", "Europe/Paris"),
]


def task(cron="30 6 * * mon-fri", zone="Europe/Paris", **facts):
    values = {"folder": "/srv/the shop", "program": "/srv/the shop/.venv/bin/mlops", "params": NASTY, "since": "2026-11-23", **facts}
    return Task(values.pop("name", "weekly"), "pipeline.toml:train", cron, zone, **values)


def ours(cron, zone, after=AFTER):
    return [due.astimezone(timezone.utc) for due in islice(times(Cron.parse(cron), after, timezone=zone), 5)]


def only(files):
    (text,) = files.values()
    return text


@pytest.fixture
def stub(tmp_path):
    "A folder whose program `mlops` writes down the words it is called with, one file a call."
    folder = tmp_path / "the shop"
    (folder / ".mlops").mkdir(parents=True)
    program = folder / "mlops"
    program.write_text(f"#!{sys.executable}\nimport json, os, sys, time\nopen('called.%d' % os.getpid(), 'w').write(json.dumps(sys.argv[1:]))\ntime.sleep(float(os.environ.get('SLOW', 0)))\n")
    program.chmod(0o755)
    return folder


def called(folder):
    return [json.loads(path.read_text()) for path in folder.glob("called.*")]


# --- when -----------------------------------------------------------------------------------------------------------------------------


def by_cronsim(cron, zone):
    "The next times by cronsim (BSD), which follows Debian's cron."
    return [due.astimezone(timezone.utc) for due in islice(CronSim(cron, AFTER.astimezone(ZoneInfo(zone))), 5)]


@pytest.mark.parametrize("cron, zone", CASES)
def test_cron_kubernetes_and_github_are_due_when_we_are(cron, zone):
    table = only(written(task(cron, zone), "cron"))
    job = yaml.safe_load(only(written(task(cron, zone), "kubernetes")))["spec"]
    found = {(re.search("^CRON_TZ=(.*)$", table, re.M)[1], " ".join(table.splitlines()[-1].split()[:5])), (job["timeZone"], job["schedule"])}
    if cron != "5/20 * * * *":
        flow = yaml.load(only(written(task(cron, zone), "github")), yaml.BaseLoader)["on"]["schedule"][0]
        found.add((flow["timezone"], flow["cron"]))
    assert {one[0] for one in found} == {zone}
    assert not re.search("[a-z@7]", " ".join(line for _, line in found if "7" not in line.split()[1] + line.split()[2] + line.split()[3])), "names, shorthands and a 7 for Sunday are not read everywhere"
    for place, line in found:
        assert by_cronsim(line, place) == ours(cron, zone)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
@pytest.mark.parametrize("cron, zone", [*CASES, ("0 6 */2 * 1", "UTC"), ("0 6 1-31/2 * 1", "UTC")])
def test_a_systemd_timer_elapses_when_we_are_due(cron, zone):
    events = calendar_events(cron, zone)
    assert events == re.findall("^OnCalendar=(.*)$", written(task(cron, zone), "systemd")["mlops-weekly.timer"], re.M)
    said = subprocess.run(["systemd-analyze", "calendar", "--iterations=5", f"--base-time={AFTER:%Y-%m-%d %H:%M:%S} UTC", *events], capture_output=True, text=True, check=True, env={**os.environ, "TZ": "UTC", "LC_ALL": "C"}, timeout=300)
    found = {datetime.strptime(one, "%Y-%m-%d %H:%M:%S").replace(tzinfo=timezone.utc) for one in re.findall(r"(?:elapse|Iter\. #\d+): \w+ (\S+ \S+) UTC", said.stdout)}
    assert sorted(found)[:5] == ours(cron, zone)


def test_cron_takes_a_star_with_a_step_for_both_where_others_take_it_for_either():
    assert by_cronsim(" ".join(only(written(task("0 6 */2 * 1", "UTC"), "cron")).splitlines()[-1].split()[:5]), "UTC") == ours("0 6 */2 * 1", "UTC")
    for to in ("kubernetes", "airflow", "github"):
        with pytest.raises(Invalid, match=r"'0 6 \*/2 \* 1' means a day on which both fields hold.*systemd or cron"):
            written(task("0 6 */2 * 1"), to)


def test_what_was_written_plainly_stays_as_it_was():
    for cron in ("30 6 * * 1-5", "*/15 8-18 * * *", "0 0 1,15 * *", "0 9-17/4 * * 0"):
        assert plain_cron(cron) == cron
    assert plain_cron("30 6 * * 5-7") == "30 6 * * 0,5-6"


# --- read by the tool itself ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("crontab"), reason="the Debian package cron is not here")
@pytest.mark.parametrize("cron, zone", CASES)
def test_crontab_reads_it(cron, zone, tmp_path):
    file = tmp_path / "table"
    option = "-T" if "-T" in subprocess.run(["crontab", "-h"], capture_output=True, text=True, timeout=300).stderr else "-n"
    for text, good in ((only(written(task(cron, zone), "cron")), True), (only(written(task(cron, zone), "cron")).replace(plain_cron(cron), "61 6 * * 1"), False)):
        file.write_text(text)
        done = subprocess.run(["crontab", option, str(file)], capture_output=True, text=True, timeout=300)
        assert (done.returncode == 0) is good, done.stderr


@pytest.fixture
def units(stub, tmp_path, monkeypatch):
    folder = tmp_path / "units"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    export(task(folder=str(stub), program=str(stub / "mlops"), misfire="skip"), "systemd", folder)
    return folder


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
def test_systemd_verifies_the_units(units):
    check = lambda: subprocess.run(["systemd-analyze", "verify", "--man=no", "--user", *map(str, sorted(units.iterdir()))], capture_output=True, text=True, timeout=300)
    assert (check().returncode, check().stderr) == (0, "")
    timer = units / "mlops-weekly.timer"
    assert "Persistent=false" in timer.read_text()
    timer.write_text(timer.read_text().replace("06:30", "25:30"))
    assert "Failed to parse calendar specification" in check().stderr


@pytest.mark.skipif(not Path("/lib/systemd/systemd").exists(), reason="systemd is not here")
def test_systemd_runs_our_words_in_our_folder(units, stub, tmp_path):
    "systemd's own reading of the unit, as `systemd --test` dumps it; it refuses to do so for root."
    if os.getuid() == 0:
        for folder in (tmp_path, *tmp_path.parents[:3]):
            folder.chmod(folder.stat().st_mode | 0o055)
    done = subprocess.run(["/lib/systemd/systemd", "--user", "--test", "--unit=mlops-weekly.service"], capture_output=True, text=True, user=65534 if os.getuid() == 0 else None,
                          env={**os.environ, "SYSTEMD_UNIT_PATH": f"{units}:", "SYSTEMD_LOG_TARGET": "console", "XDG_RUNTIME_DIR": "/tmp", "LC_ALL": "C.UTF-8"}, timeout=300)
    if "Unit mlops-weekly.service" not in done.stdout:
        pytest.skip(f"systemd --test does not run here: {done.stderr[-200:]}")
    unit = done.stdout.split("-> Unit mlops-weekly.service:")[1].split("-> Unit ")[0]
    line = re.search("Command Line: (.*)", unit)[1]
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True, timeout=300).stdout.split("\0")[:-1]
    assert [word.replace("$$", "$") for word in words] == command(task(folder=str(stub), program=str(stub / "mlops")))
    assert re.search("WorkingDirectory: (.*)", unit)[1] == str(stub)
    assert re.search("KillSignal: (.*)", unit)[1] == "SIGINT"


@pytest.mark.parametrize("asked, spec", [
    ({}, {"concurrencyPolicy": "Forbid", "startingDeadlineSeconds": 86400}), ({"overlap": "together"}, {"concurrencyPolicy": "Allow"}), ({"overlap": "wait"}, {"concurrencyPolicy": "Forbid"}),
    ({"misfire": "skip"}, {"startingDeadlineSeconds": 300}), ({"misfire": "skip", "grace_s": 5}, {"startingDeadlineSeconds": 60}), ({"secrets": ("AWS_ACCESS_KEY_ID",)}, {}),
])
def test_kubernetes_takes_the_job(asked, spec):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    job = yaml.safe_load(only(written(task(**asked), "kubernetes")))
    kubernetes_validate.validate(job, "1.29", strict=True)  # timeZone is stable since 1.27
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**job, "spec": {**job["spec"], "timezone": "UTC"}}, "1.29", strict=True)
    assert spec.items() <= job["spec"].items()
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["containers"][0]["envFrom"][0]["secretRef"]["optional"] is ("secrets" not in asked)
    words = [*pod["containers"][0]["command"], *pod["containers"][0]["args"]]
    assert [re.sub(r"\$\$\(", "$(", word) for word in words] == command(task(program="mlops"))  # $$( is how the API writes $(


def test_a_long_name_still_names_a_cron_job():
    job = yaml.safe_load(only(written(task(name="The Weekly_retraining.of the recommender " * 3), "kubernetes")))
    assert re.fullmatch("[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?", job["metadata"]["name"])


@pytest.mark.parametrize("asked", [{}, {"remote": True, "secrets": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "within": "shop"}, {"overlap": "together"}])
def test_github_takes_the_workflow(asked, tmp_path):
    pytest.importorskip("check_jsonschema")
    (path,) = export(task(**asked), "github", tmp_path).facts["files"]
    check = lambda: subprocess.run([sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", path], capture_output=True, text=True, timeout=300)
    done = check()
    assert done.returncode == 0, done.stdout
    flow = yaml.load(Path(path).read_text(), yaml.BaseLoader)
    assert flow["permissions"] == {"contents": "read"} and ("concurrency" in flow) is (asked.get("overlap") != "together")
    runs = [step["run"] for step in flow["jobs"]["run"]["steps"] if "run" in step]
    assert [one for one in runs if one in ("mlops pull", "mlops push")] == (["mlops pull", "mlops push"] if "remote" in asked else [])
    assert flow["jobs"]["run"].get("env", {}) == {name: f"${{{{ secrets.{name} }}}}" for name in asked.get("secrets", ())}
    Path(path).write_text(Path(path).read_text().replace("timezone:", "timeZone:"))
    assert check().returncode == 1


def test_github_does_not_run_more_often_than_every_five_minutes():
    for cron in ("* * * * *", "*/4 * * * *", "58,2 * * * *", "58 23,0 * * *"):
        if cron == "58 23,0 * * *":
            written(task(cron), "github")
        else:
            with pytest.raises(Invalid, match="more often than every five minutes"):
                written(task(cron), "github")


# --- the words that arrive ------------------------------------------------------------------------------------------------------------


def in_cron(text, folder, **environment):
    "What cron does with the last line of a table: everything after five fields, \\% for %, to /bin/sh in the home folder."
    line = text.splitlines()[-1].split(None, 5)[5]
    assert not re.search(r"(?<!\\)%", line)
    path = re.search("^PATH=(.*)$", text, re.M)[1]
    return subprocess.Popen(["/bin/sh", "-c", line.replace("\\%", "%")], cwd="/", env={"HOME": "/", "PATH": path, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("overlap", ["skip", "wait", "together"])
def test_cron_hands_over_our_words(stub, overlap):
    one = task(folder=str(stub), program=str(stub / "mlops"), overlap=overlap)
    done = in_cron(only(written(one, "cron")), stub)
    assert (done.communicate(timeout=120)[0], done.returncode) == ("", 0)
    assert called(stub) == [command(one)[1:]]


@pytest.mark.skipif(not shutil.which("flock"), reason="flock is not here")
@pytest.mark.parametrize("overlap, runs", [("skip", 1), ("wait", 2), ("together", 2)])
def test_cron_treats_an_overlapping_run_as_asked(stub, overlap, runs):
    text = only(written(task(folder=str(stub), program=str(stub / "mlops"), overlap=overlap), "cron"))
    first = in_cron(text, stub, SLOW="1.5")
    until(lambda: called(stub), process=first)
    second = in_cron(text, stub)
    assert second.wait(300) == 0
    assert (first.poll() is None) is (overlap != "wait"), "only a waiting run ends after the first"
    assert first.wait(300) == 0 and len(called(stub)) == runs


def test_github_hands_over_our_words(stub):
    flow = yaml.load(only(written(task(), "github")), yaml.BaseLoader)
    (script,) = [step["run"] for step in flow["jobs"]["run"]["steps"] if step.get("name") == "Run"]
    constant = r"\$\{\{\s*'([^']*)'\s*\}\}"  # GitHub's expressions may be constants, and nothing of ours may be another one
    assert "${{" not in re.sub(constant, "", script)
    script = re.sub(constant, r"\1", script)
    subprocess.run(["bash", "-e", "-c", script], cwd=stub, check=True, env={"PATH": f"{stub}:/usr/bin:/bin"}, timeout=300)
    assert called(stub) == [command(task())[1:]]


@pytest.mark.parametrize("params, why", [({"a": "two\nlines"}, "no line break"), ({"a": "back\\slash"}, "no backslash"), ({"a": "x" * 1000}, "1,000 characters")])
def test_what_a_crontab_cannot_hold_is_said(params, why):
    with pytest.raises(Invalid, match=f"{why}.*use systemd"):
        written(task(params=params), "cron")


# --- Airflow, in environments of its own ----------------------------------------------------------------------------------------------

DAGS = """
import json, sys, pendulum
try:
    from airflow.dag_processing.dagbag import DagBag
    bag = DagBag(sys.argv[1])
except ImportError:
    from airflow.models.dagbag import DagBag
    bag = DagBag(sys.argv[1], include_examples=False)
from airflow.timetables.base import DataInterval, TimeRestriction
found = {}
for name, dag in bag.dags.items():
    last, times, after = pendulum.parse(sys.argv[2]), [], pendulum.parse(sys.argv[2])
    for _ in range(5):
        last = dag.timetable.next_dagrun_info(last_automated_data_interval=DataInterval.exact(last), restriction=TimeRestriction(None, None, True)).run_after
        times.append(last.isoformat())
    class Run:
        logical_date, run_after = (None, after) if name.endswith("by-hand") else (after, None)
    task = dag.task_dict["run"]
    task.render_template_fields({"dag_run": Run, "dag": dag, "task": task, "params": {}, **dag.user_defined_macros})
    found[name] = {"times": times, "bash": task.bash_command, "cwd": task.cwd, "catchup": dag.catchup, "active": dag.max_active_runs, "ends": dag.end_date and dag.end_date.isoformat()}
print("FOUND" + json.dumps({"errors": bag.import_errors, "dags": found}))
"""
CRONS = {f"case {number}": case for number, case in enumerate(CASES)}


@functools.cache
def dags(version, folder):
    "What an Airflow makes of all our files in one go."
    python = ENVIRONMENTS / version / "bin" / "python"
    if not python.exists():
        pytest.skip(f"Airflow {version} is not here; `python tests/test_exports.py --install` makes its environment")
    for name, (cron, zone) in CRONS.items():
        export(task(cron, zone, name=name), "airflow", folder)
    for name, facts in (("all", {"misfire": "all", "overlap": "together", "until": "2027-01-31"}), ("by-hand", {})):
        export(task(name=name, **facts), "airflow", folder)
    done = subprocess.run([str(python), "-c", DAGS, str(folder), AFTER.isoformat()], capture_output=True, text=True,
                          env={"PATH": os.environ["PATH"], "HOME": str(folder), "AIRFLOW_HOME": str(folder.parent / f"airflow {version}"), "AIRFLOW__CORE__LOAD_EXAMPLES": "False", "AIRFLOW__CORE__UNIT_TEST_MODE": "False"}, timeout=300)
    assert "FOUND" in done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout.split("FOUND")[1])


@pytest.mark.parametrize("version", AIRFLOW)
def test_airflow_reads_the_file_and_is_due_when_we_are(version, tmp_path_factory, stub):
    found = dags(version, tmp_path_factory.mktemp("dags"))
    assert found["errors"] == {}
    for name, (cron, zone) in CRONS.items():
        one = found["dags"][f"mlops-{name.replace(' ', '-')}"]
        assert [datetime.fromisoformat(due).astimezone(timezone.utc) for due in one["times"]] == ours(cron, zone), cron
        assert (one["catchup"], one["active"], one["ends"], one["cwd"]) == (False, 1, None, "/srv/the shop")
    one = found["dags"]["mlops-all"]
    assert (one["catchup"], one["active"]) == (True, 16) and datetime.fromisoformat(one["ends"]) > datetime(2027, 1, 31, 22, tzinfo=timezone.utc)
    for name in ("all", "by-hand"):
        arrived = shlex.split(found["dags"][f"mlops-{name}"]["bash"])
        assert arrived == [*command(task(name=name)), "--due", "2026-11-23T05:00:00+00:00"]


# --- from a project -------------------------------------------------------------------------------------------------------------------


def schedule(**facts):
    return Schedule(**{"name": "weekly", "source": "pipeline.toml", "cron": "0 6 * * 1", "timezone": "Europe/Paris", "params": {"week": "{week}", "k": 3}, **facts})


def test_our_command_line_understands_what_the_tools_run():
    options = verb_parser(VERBS["schedule"]).parse_args([*command(task())[2:], "--due", "2026-11-23T05:00:00+00:00"])
    assert (options.action, options.what, options.name, options.cron, options.timezone) == ("once", "pipeline.toml:train", "weekly", "30 6 * * mon-fri", "Europe/Paris")
    assert dict(pair for pairs in options.params for pair in pairs) == NASTY and options.due == "2026-11-23T05:00:00+00:00"


def test_a_schedule_of_a_project_knows_the_rest(tmp_path, monkeypatch):
    (tmp_path / "code" / ".git").mkdir(parents=True)
    folder = init(str(tmp_path / "code" / "shop"), name="shop").folder
    (folder / "settings.ini").write_text("[project]\nname = shop\n\n[data]\nremote = s3://bucket/shop\n")
    monkeypatch.chdir(folder)
    one = task_of(schedule(start="2026-12-01T05:00:00Z"))
    assert (one.folder, one.within, one.remote, one.since) == (str(folder), "shop", True, "2026-12-01")
    assert command(one)[1:] == ["schedule", "once", "pipeline.toml", "--name", "weekly", "--cron", "0 6 * * 1", "--timezone", "Europe/Paris", "-p", "week={week}", "-p", "k=3"]
    assert export(schedule(), "github").facts["files"] == [str(tmp_path / "code/.github/workflows/mlops-weekly.yml")]
    assert [Path(path).relative_to(folder).as_posix() for path in export(schedule(), "systemd").facts["files"]] == ["schedules/mlops-weekly.service", "schedules/mlops-weekly.timer"]


PROGRAM = """#!{python}
import sys
from mlops_nb.interface.cli import main
sys.exit(main())
"""


@pytest.mark.skipif(not shutil.which("flock"), reason="flock is not here")
def test_a_crontab_line_runs_the_notebook_for_the_time_it_was_due(tmp_path, monkeypatch):
    folder = init(str(tmp_path / "the shop"), name="shop").folder
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("week = ''\nday = ''\nnote = ''", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell("import mlops_nb\nmlops_nb.output(week=week, day=day, note=note)")])
    nbformat.write(book, folder / "train.ipynb")
    program = folder / "mlops"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.chdir(folder)
    one = task_of(schedule(source="train.ipynb", params={"week": "{week}", "day": "{due:%a %H:%M}", "note": "5% it's"}))
    done = in_cron(only(written(replace(one, program=str(program)), "cron")), folder, MLOPS_WARM="0", MLOPS_TRACKING_RUNS="false")
    assert (done.communicate(timeout=120)[0], done.returncode) == ("", 0), (folder / ".mlops" / "mlops-weekly.log").read_text()
    (file,) = folder.glob(".mlops/runs/*/run.json")
    record = json.loads(file.read_text())
    due = datetime.fromisoformat(record["trigger"].removeprefix("schedule:weekly@").replace("Z", "+00:00")).astimezone(ZoneInfo("Europe/Paris"))
    assert f"{due:%a %H:%M}" == "Mon 06:00"
    assert record["steps"][0]["outputs"] == {"week": f"{due:%G-W%V}", "day": "Mon 06:00", "note": "5% it's"}


def test_what_cannot_be_exported_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(init(str(tmp_path), name="shop").folder)
    for wrong, to, kind, message in [
        (schedule(cron="", on_data="orders"), "cron", Invalid, "runs on new data orders.*only schedules with --cron"), (schedule(params={"version": "{data}"}), "airflow", Invalid, "only our own scheduler knows"),
        (schedule(source="/elsewhere/pipeline.toml"), "github", Invalid, "outside the project"), (schedule(), "systmd", NotFound, "did you mean systemd?"),
        (schedule(overlap="queue"), "cron", Invalid, "overlap = 'queue' is not valid; expected skip, wait, together"),
    ]:
        with pytest.raises(kind, match=message):
            export(wrong, to)
    assert not (tmp_path / "schedules").exists()


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_a_folder_that_cannot_be_written_is_said_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Unavailable, match="a file stands where a folder was expected"):
        export(task(), "systemd", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


def test_every_tool_says_where_it_differs():
    for to in TOOLS:
        for misfire in ("skip", "once", "all"):
            for overlap in ("skip", "wait", "together"):
                assert all(isinstance(one, str) for one in differences(task(misfire=misfire, overlap=overlap), to))
    assert differences(task(zone="UTC", misfire="once"), "systemd") == []
    assert differences(task(zone="UTC", misfire="all", until="2027-01-31"), "airflow") == ["a run that falls due during another waits for it"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
def test_systemd_leaves_out_a_time_that_the_clocks_leave_out_as_we_say():
    "On 28 March 2027 Paris has no 2:30."
    said = subprocess.run(["systemd-analyze", "calendar", "--base-time=2027-03-27 12:00:00 UTC", *calendar_events("30 2 * * *", "Europe/Paris")], capture_output=True, text=True, check=True, env={**os.environ, "TZ": "UTC", "LC_ALL": "C"}, timeout=300)
    assert "2027-03-29 00:30:00 UTC" in said.stdout
    assert ours("30 2 * * *", "Europe/Paris", datetime(2027, 3, 27, 12, tzinfo=timezone.utc))[0] == datetime(2027, 3, 28, 1, 0, tzinfo=timezone.utc)
    assert any("leave out in spring" in one for one in differences(task("30 2 * * *"), "systemd"))


def install():
    "The environments of Airflow, and Debian's cron where apt is there and we may use it."
    from shutil import which

    for version, packages in AIRFLOW.items():
        place = ENVIRONMENTS / version
        if not (place / "bin" / "airflow").exists():
            print(f"installing Airflow {version} into {place} …")
            subprocess.run([sys.executable, "-m", "venv", *(["--without-pip"] if which("uv") else []), str(place)], check=True, timeout=300)
            pip = ["uv", "pip", "install", "--quiet", "--python", str(place / "bin" / "python")] if which("uv") else [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet"]
            subprocess.run([*pip, *packages], check=False, timeout=300)
    if not which("crontab") and which("apt-get") and os.getuid() == 0:
        subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", "cron"], check=False, stdout=subprocess.DEVNULL, timeout=300)


if __name__ == "__main__" and "--install" in sys.argv:
    install()
