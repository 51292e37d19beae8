"""monitoring: the log of predictions and the alerts under crashes and concurrency, and the verdict on drift, quality and performance."""

import json
import multiprocessing
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest
from patience import finished

from mlops_nb.core.errors import GateFailed, Invalid, NotFound, Unavailable
from mlops_nb.core.settings import in_project
from mlops_nb.monitor.alerts import alert, alerts, recent, tail
from mlops_nb.monitor.monitoring import monitor, watch
from mlops_nb.monitor.performance import METRICS, judged_periods, mean_units, units_of
from mlops_nb.monitor.predictions import PredictionLog, append_lines, predictions_of
from projects import SMALL, shop  # noqa: F401


@pytest.fixture
def inside(shop):
    with in_project(shop):
        yield shop


# -- the log of predictions ------------------------------------------------------------------------

def write_many(folder, worker):
    log = PredictionLog(folder)
    for i in range(60):
        log.record([{"worker": worker, "i": i, "text": "x" * 3000}] * 3, [i] * 3, model="m@1", request=f"{worker}-{i}", at="2026-01-05T10:00:00")


def test_processes_and_threads_do_not_mix_their_lines(tmp_path):
    workers = [multiprocessing.get_context("spawn").Process(target=write_many, args=(tmp_path, n), daemon=True) for n in range(3)]
    threads = [threading.Thread(target=write_many, args=(tmp_path, n), daemon=True) for n in range(3, 6)]
    for one in workers + threads:
        one.start()
    finished(workers + threads)
    frame = PredictionLog(tmp_path).read()
    assert len(frame) == 6 * 60 * 3 and frame.attrs["damaged"] == 0
    assert (frame.groupby("request").size() == 3).all() and (frame.text.str.len() == 3000).all()


def test_a_killed_writer_costs_at_most_its_last_line(tmp_path):
    code = f"from mlops_nb.monitor.predictions import PredictionLog\nlog, i = PredictionLog({str(tmp_path)!r}), 0\nwhile True:\n    log.record([{{'i': i}}], [i], model='m@1', at='2026-01-05'); i += 1"
    child = subprocess.Popen([sys.executable, "-c", code])
    file = tmp_path / "2026-01-05.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (file.exists() and file.stat().st_size > 5000):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait(120)
    with file.open("r+b") as torn:  # and a machine that died in the middle of a line
        torn.truncate(file.stat().st_size - 20)
    log = PredictionLog(tmp_path)
    log.record([{"i": -1}], [-1], model="m@1", at="2026-01-05")
    frame = log.read()
    assert frame.attrs["damaged"] == 1 and frame.i.iloc[-1] == -1
    assert frame.i.iloc[:-1].tolist() == list(range(len(frame) - 1))


def test_a_full_disk_says_so_and_what_was_written_stays(tmp_path):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    code = (f"from mlops_nb.monitor.predictions import PredictionLog\nlog = PredictionLog({str(tmp_path)!r})\nlog.record([{{'a': 1}}], [1], model='m@1', at='2026-01-05')\n"
            "log.record([{'a': 'x' * 9000}], [2], model='m@1', at='2026-01-05')")
    assert subprocess.run([sys.executable, "-c", code], preexec_fn=limited, capture_output=True, timeout=300).returncode != 0
    frame = PredictionLog(tmp_path).read()
    assert frame.prediction.tolist() == [1] and frame.attrs["damaged"] == 1


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Unavailable, match="a file stands where a folder was expected"):
        PredictionLog(tmp_path / "file").record([{"a": 1}], [1], model="m@1")


@pytest.mark.parametrize("rows, answers, expected", [
    (pd.DataFrame({"a": [1, 2], "when": pd.to_datetime(["2026-01-01", None])}), np.array([0.5, np.nan]), [0.5, None]),
    ([{"a": np.int64(1), "b": None}, {"a": np.float32(2), "c": pd.NA}], pd.Series(["x", "y"]), ["x", "y"]),
    (np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([["i", "j"], ["k", None]], dtype=object), [["i", "j"], ["k", None]]),
    ([{"at": "mine", "prediction": 3}, {"model": "also mine"}], [1, 2], [1, 2]),
])
def test_rows_and_answers_of_every_kind_come_back(tmp_path, rows, answers, expected):
    log = PredictionLog(tmp_path)
    assert log.record(rows, answers, model="m@1", request="r") == 2
    frame = log.read()
    assert [None if not isinstance(one, list) and pd.isna(one) else one for one in frame.prediction] == expected
    assert list(frame.columns[:3]) == ["at", "request", "model"] and frame.columns[-1] == "prediction" and (frame.model == "m@1").all()


def test_since_is_in_and_until_is_out_across_days_and_zones(tmp_path):
    log = PredictionLog(tmp_path)
    for at in ("2026-01-04T23:59:59", "2026-01-05T00:30:00+01:00", "2026-01-05T12:00:00", "2026-01-06T00:00:00"):
        log.record([{"at_given": at}], [0], model="m@1", at=at)
    assert log.days() == ["2026-01-04", "2026-01-05", "2026-01-06"]
    assert len(log.read()) == 4 and log.read()["at"].is_monotonic_increasing
    assert log.read("2026-01-05", "2026-01-06").at_given.tolist() == ["2026-01-05T12:00:00"]
    assert log.read(since="2026-01-04T23:59:59").at_given.tolist()[0] == "2026-01-04T23:59:59"
    assert len(log.read(until="2026-01-05T00:00:00")) == 2


def test_an_empty_log_is_an_empty_frame(tmp_path):
    frame = PredictionLog(tmp_path / "none").read()
    assert list(frame.columns) == ["at", "request", "model", "prediction"] and not len(frame)


def test_predictions_are_for_their_owner_only(inside):
    log = predictions_of("recommender")
    log.record([{"customer": 1}], [1], model="m@1", at="2026-01-05")
    assert oct((log.folder / "2026-01-05.jsonl").stat().st_mode)[-3:] == "600" and log.folder.is_relative_to(inside)
    with pytest.raises(Invalid, match="plain deployment was expected"):
        predictions_of("recommender@3")
    with pytest.raises(Invalid, match="is not an address"):
        predictions_of("../../elsewhere")


# -- alerts ----------------------------------------------------------------------------------------

def test_alerts_come_back_newest_first_in_one_line_each(inside):
    for i in range(30):
        alert(f"number {i}\nwith a second line", subject="a" if i % 3 else "b")
    assert [one["message"] for one in recent(2)] == ["number 29 with a second line", "number 28 with a second line"]
    assert [one["message"].split()[1] for one in recent(2, subject="b")] == ["27", "24"]
    assert len(alerts(limit=5).facts["alerts"]) == 5 and "5 warning" in alerts(limit=5).facts["summary"]
    assert len((inside / ".mlops/alerts.jsonl").read_text().split("\n")) >= 30


def test_a_torn_alert_is_skipped(inside):
    alert("whole")
    with (inside / ".mlops/alerts.jsonl").open("ab") as file:
        file.write(b'{"at": "2026-01-01T00:00:00+00:00", "mess')
    alert("after")
    assert [one["message"] for one in recent()] == ["after", "whole"]


def test_the_tail_is_the_tail_at_every_length(tmp_path):
    file = tmp_path / "a.jsonl"
    append_lines(file, [json.dumps({"i": i, "pad": "x" * (i * 37 % 900)}).encode() for i in range(400)])
    for limit in (1, 7, 100, 399, 400, 1000):
        assert [row["i"] for row in tail(file, limit)] == list(range(399, max(-1, 399 - limit), -1))
    assert tail(tmp_path / "none.jsonl", 3) == []


def test_no_alerts_and_wrong_alerts(inside):
    assert alerts().facts["summary"] == "No alerts yet."
    for call, words in [(lambda: alert("x", severity="bad"), "info, warning, critical"), (lambda: alert("  "), "needs a message"), (lambda: alerts(limit=0), "1 or more")]:
        with pytest.raises(Invalid, match=words):
            call()


def test_alerts_are_light_to_ask_for():
    code = "import sys, mlops_nb.monitor.alerts; print([one for one in ('pandas', 'numpy', 'scipy', 'mlflow') if one in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300).stdout.strip() == "[]"


# -- the verdict -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def months():
    orders = pd.read_parquet(SMALL)[["Quantity", "UnitPrice", "Country", "InvoiceDate"]]
    return {month: lines.drop(columns="InvoiceDate") for month, lines in orders.groupby(orders.InvoiceDate.dt.strftime("%Y-%m"))}


def test_calm_data_raise_no_alert(inside, months):
    half = np.random.default_rng(0).random(len(months["2011-05"])) < 0.5
    report = watch("shop", months["2011-05"][half], months["2011-05"][~half])
    assert report.passed and report.facts["deviations"] == 0 and recent() == []
    assert (inside / ".mlops/reports/monitor-shop.html").exists() and json.loads((inside / ".mlops/reports/monitor-shop.json").read_text())["passed"]


@pytest.mark.parametrize("broken, part, words", [
    (lambda frame: frame.assign(UnitPrice=frame.UnitPrice * 2), "drift", "UnitPrice"),
    (lambda frame: frame.assign(Country=frame.Country.mask(frame.index % 5 == 0)), "data quality", "Country: missing 0.0% → 20"),
    (lambda frame: frame.assign(Country=frame.Country.mask(frame.index % 5 == 0, "Atlantis")), "data quality", "Atlantis"),
    (lambda frame: frame.drop(columns="UnitPrice"), "data quality", "column UnitPrice is missing"),
    (lambda frame: frame.assign(UnitPrice="12 pounds"), "data quality", "numbers in the reference, text now"),
    (lambda frame: frame.assign(Quantity=frame.Quantity.mask(frame.index % 7 == 0, 10**6)), "data quality", "outside what the reference holds"),
])
def test_each_fault_is_an_alert_in_its_part_and_no_failure(inside, months, broken, part, words):
    report = watch("shop", months["2011-04"], broken(months["2011-05"]))
    said = {check["name"]: check["message"] for check in report.facts["verdict"] if not check["passed"]}
    assert words in said[part] and report.passed
    assert any(one["subject"] == "shop" and words in one["message"] for one in recent())


def test_a_gate_turns_a_deviation_into_a_failure_and_stops_a_pipeline(inside, months, monkeypatch, tmp_path):
    shifted = months["2011-05"].assign(UnitPrice=months["2011-05"].UnitPrice * 2)
    with (inside / "settings.ini").open("a") as file:
        file.write("[gates]\nmonitor.psi = 0.25\nmonitor.performance_drop = <= 0.5\n")
    report = watch("shop", months["2011-04"], shifted)
    assert [check["name"] for check in report.failures] == ["psi"]
    assert any("no labels yet" in check["message"] for check in report.facts["gates"] if check["name"] == "performance_drop")
    monkeypatch.setenv("MLOPS_STEP_FOLDER", str(tmp_path / "step"))
    with pytest.raises(GateFailed, match="psi"):
        watch("shop", months["2011-04"], shifted)
    assert (tmp_path / "step/monitor-shop.html").exists(), "saved first, then raised"


def per_unit(rng, means, n=150):
    return pd.DataFrame([{"period": period, "value": value} for period, mean in means.items() for value in np.clip(rng.normal(mean, 0.15, n), 0, 1)])


def test_a_fall_in_performance_is_critical_and_names_the_week(inside, months):
    rng = np.random.default_rng(0)
    report = watch("shop", months["2011-04"], months["2011-05"], performance=per_unit(rng, {"W45": 0.38, "W46": 0.22, "W47": 0.37}), level=rng.normal(0.38, 0.15, 300), metric="ndcg@10")
    assert [row["period"] for row in report.facts["performance"]["periods"] if row["deviates"]] == ["W46"]
    assert recent()[0]["severity"] == "critical" and "in W46" in recent()[0]["message"] and report.facts["performance_drop"] > 0.3


def test_noise_in_performance_is_rarely_an_alarm():
    """200 draws from one distribution, alpha 0.05, every drop allowed to count: at most 18 alarms have a chance of 0.99 (scipy.stats.binom)."""
    rng, alarms = np.random.default_rng(0), 0
    for seed in range(200):
        rows = judged_periods({str(i): mean_units(rng.normal(0.4, 0.2, 80)) for i in range(3)}, mean_units(rng.normal(0.4, 0.2, 200)), higher=True, allowed=1e-9, alpha=0.05, n_boot=400, seed=seed)
        alarms += any(row["deviates"] for row in rows)
    assert alarms <= 18


def test_one_value_per_period_is_judged_by_its_size(inside, months):
    weeks = [{"period": "W45", "value": 10.0}, {"period": "W46", "value": 11.0}, {"period": "W47", "value": 15.0}]
    report = watch("shop", months["2011-04"], months["2011-05"], performance=weeks, metric="rmse")
    assert report.facts["performance"]["level"] == 10 and report.facts["performance_drop"] == pytest.approx(0.5), "the first period is the level; an error that rises is a drop"
    assert "rmse rose from 10 to 15 in W47" in recent()[0]["message"]


@pytest.mark.parametrize("metric", list(METRICS))
def test_metrics_from_labels_are_scikit_learns(metric):
    from sklearn import metrics as sk

    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300)
    frame = pd.DataFrame({"y": y, "p": np.where(rng.random(300) < 0.7, y, 1 - y)})
    theirs = {"accuracy": sk.accuracy_score, "precision": sk.precision_score, "recall": sk.recall_score, "f1": sk.f1_score, "mae": sk.mean_absolute_error, "rmse": sk.root_mean_squared_error}
    assert units_of(frame, "y", "p", metric).value == pytest.approx(theirs[metric](frame.y, frame.p))


def test_labels_that_come_later_are_joined_and_judged_by_week(inside):
    """A classifier that is right 90% of the time, then half of the time; every other label is still out."""
    rng = np.random.default_rng(0)
    log = predictions_of("returns")
    truth = rng.integers(0, 2, 1200)
    right = rng.random(1200) < np.where(np.arange(1200) < 600, 0.9, 0.5)
    answers = np.where(right, truth, 1 - truth)
    for i in range(0, 1200, 100):
        for j in range(i, i + 100):
            log.record([{"size": float(j % 7)}], [int(answers[j])], model="returns@1", request=str(j), at=f"2026-03-{2 + i // 100:02}T10:00:00")
    pd.DataFrame({"request": [str(j) for j in range(0, 1200, 2)], "returned": truth[::2]}).to_parquet(inside / "labels.parquet")
    pd.DataFrame({"size": np.arange(700) % 7.0}).to_parquet(inside / "train.parquet")
    report = monitor("returns", reference=str(inside / "train.parquet"), labels=str(inside / "labels.parquet"), target="returned", level=0.9, metric="accuracy")
    periods = {row["period"]: row for row in report.facts["performance"]["periods"]}
    assert report.facts["labelled"] == 0.5 and list(periods) == ["2026-W10", "2026-W11"]
    weeks = np.where(np.arange(1200) < 700, "2026-W10", "2026-W11")  # 2 to 8 March is a Monday to a Sunday
    for week, row in periods.items():
        assert row["value"] == pytest.approx(right[(weeks == week) & (np.arange(1200) % 2 == 0)].mean())
    assert periods["2026-W11"]["deviates"] and not periods["2026-W10"]["deviates"]


def test_the_verb_takes_addresses(inside, months):
    from mlops_nb.data.store import save

    save(months["2011-04"], "orders")
    save(months["2011-05"].assign(UnitPrice=months["2011-05"].UnitPrice * 2), "orders")
    assert monitor("shop", reference="orders@1", current="orders@2", columns=["UnitPrice"]).facts["drifted_columns"] == 1
    with pytest.raises(NotFound, match="there are: 1, 2"):
        monitor("shop", reference="orders@7", current="orders@2")


def test_mistakes_are_one_sentence(inside, months):
    april = months["2011-04"]
    scored = april.assign(y=1, prediction=1)
    for call, words in [(lambda: watch("a@1", april, april), "plain deployment was expected"), (lambda: watch("a", april, april, performance=[{"week": 1}]), "expected period and value"),
                        (lambda: watch("a", scored, scored, target="y", metric="auc"), "cannot be computed here"), (lambda: watch("a", april, scored, target="y"), "no level to compare"),
                        (lambda: watch("a", april, april, labels=scored, key="id", target="y"), "no column 'id'"),
                        (lambda: watch("a", april, april, gates={"drifted": 0}), "not measured; did you mean"),
                        (lambda: watch("a", scored, scored.assign(prediction=[1, 2, 3, 4] * (len(scored) // 4) + [1] * (len(scored) % 4)), target="y", metric="f1"), "f1 needs two classes")]:
        with pytest.raises(Invalid, match=words):
            call()
    with pytest.raises(NotFound, match="has no predictions; give current"):
        monitor("silent", reference=april)


def test_monitoring_twice_says_the_same(inside, months):
    once, again = (watch("shop", months["2011-04"], months["2011-11"]).facts for _ in range(2))
    assert once == again
