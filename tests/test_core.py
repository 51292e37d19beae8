"""core: addresses, files, settings, gates, reports, under the conditions of a real disk."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from patience import next_line, until

from mlops_nb.core.address import Address, bare_name, pick
from mlops_nb.core.errors import Conflict, Invalid, NotFound, Unavailable
from mlops_nb.core.files import digest_of, locked, private_folder, read_json, write_atomic, write_json
from mlops_nb.core.gates import Gate, judge
from mlops_nb.core.plots import KINDS, draw
from mlops_nb.core.report import Report
from mlops_nb.core.settings import in_project, init, project, read_settings


@dataclass
class One:
    version: int
    digest: str
    aliases: tuple[str, ...] = ()


# -- addresses -----------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["", "@3", "orders@", "a/b", "../x", "a b", "orders@3@4", ".hidden", "-x", "a" * 101, "orders@../x", "o\nrders", "ordérs"])
def test_what_is_not_an_address_is_refused_in_one_sentence(text):
    with pytest.raises(Invalid, match="is not an address; expected"):
        Address.parse(text)


def test_an_address_reads_back():
    for text in ("orders", "orders@3", "recommender@champion", "a.b-c_d@9f2c41"):
        assert str(Address.parse(text)) == text


def test_pick_prefers_number_then_alias_then_hash_and_refuses_an_ambiguous_hash():
    versions = [One(1, "cafe11"), One(2, "beef22", ("cafe",)), One(10, "cafe33")]
    assert pick("m", versions).version == 10
    assert pick("m@2", versions).version == 2
    assert pick("m@cafe", versions).version == 2
    assert pick("m@cafe3", versions).version == 10
    with pytest.raises(Invalid, match="fits versions 1, 10"):
        pick("m@cafe", [One(1, "cafe11"), One(10, "cafe33")])
    with pytest.raises(NotFound, match="has no 'champion'; there are: 1, 10, 2, cafe"):
        pick("m@champion", versions)
    with pytest.raises(NotFound, match="no versions yet"):
        pick("m", [])
    with pytest.raises(Invalid, match="write 'm'"):
        bare_name("m@3")


# -- files ----------------------------------------------------------------------------------------

def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path):
    target = tmp_path / "facts.json"
    write_json(target, {"n": 0})
    code = (f"import itertools\nfrom mlops_nb.core.files import write_json\n"
            f"for n in itertools.count(1): write_json({str(target)!r}, {{'n': n, 'pad': 'x' * 200_000}})")
    for delay in (0.0, 0.01, 0.03, 0.05):
        process = subprocess.Popen([sys.executable, "-c", code])
        until(lambda: read_json(target)["n"] > 0, process=process)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait(120)
        facts = read_json(target)
        assert facts["n"] > 0 and len(facts["pad"]) == 200_000
        write_json(target, {"n": 0})


@pytest.fixture
def tiny_disk(tmp_path):
    """A real file system of 256 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, timeout=300).returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True, timeout=300)


def test_a_full_disk_is_one_sentence_and_harms_nothing(tiny_disk):
    write_json(tiny_disk / "facts.json", {"n": 1})
    with pytest.raises(Unavailable, match="the disk is full; free some space"):
        write_atomic(tiny_disk / "facts.json", b"x" * 1_000_000)
    assert read_json(tiny_disk / "facts.json") == {"n": 1}
    assert [path.name for path in tiny_disk.iterdir()] == ["facts.json"]


def test_a_read_only_disk_is_one_sentence(tiny_disk):
    write_json(tiny_disk / "facts.json", {"n": 1})
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True, timeout=300)
    with pytest.raises(Unavailable, match="read-only"):
        write_json(tiny_disk / "facts.json", {"n": 2})
    assert read_json(tiny_disk / "facts.json") == {"n": 1}


def test_a_file_in_the_place_of_a_folder_is_one_sentence(tmp_path):
    (tmp_path / ".mlops").write_text("")
    for act in (lambda: write_json(tmp_path / ".mlops" / "x.json", {}), lambda: locked(tmp_path / ".mlops" / "x.lock").__enter__()):
        with pytest.raises(Unavailable, match="a file stands where a folder was expected; move it away"):
            act()


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "run.json").write_text('{"n": 1')
    with pytest.raises(Invalid, match="run.json is damaged"):
        read_json(tmp_path / "run.json")


def test_a_lock_is_released_when_its_holder_is_killed(tmp_path):
    lock = tmp_path / "run.lock"
    code = f"import time\nfrom mlops_nb.core.files import locked\nwith locked({str(lock)!r}): print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert next_line(holder).strip() == "held"
    with pytest.raises(Conflict, match="somebody is here"), locked(lock, timeout_s=0, message="somebody is here"):
        pass
    holder.kill()
    holder.wait(120)
    with locked(lock, timeout_s=120):
        pass


def test_a_private_folder_is_made_closed_and_kept(tmp_path):
    before = os.umask(0)
    try:
        made = private_folder(tmp_path / "door", "we meet there")
    finally:
        os.umask(before)
    (made / "kept").write_text("")
    assert made.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in private_folder(made, "we meet there").iterdir()] == ["kept"]


def stranger(folder):
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)


@pytest.mark.parametrize("spoil, sentence", [
    (lambda folder: (folder.mkdir(), folder.chmod(0o750)), "is open to others; remove it, we meet there"),
    (lambda folder: (folder.mkdir(), folder.chmod(0o701)), "is open to others"),
    (lambda folder: ((folder.parent / "real").mkdir(mode=0o700), folder.symlink_to("real")), "belongs to somebody else or is open"),
    (lambda folder: folder.symlink_to("nowhere"), "a file stands where a folder was expected"),
    (lambda folder: folder.write_text(""), "a file stands where a folder was expected"),
    pytest.param(stranger, "belongs to somebody else", marks=pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="needs root, to become somebody else")),
], ids=["group", "others", "link", "dangling", "file", "stranger"])
def test_a_folder_that_is_not_private_is_not_used(tmp_path, spoil, sentence):
    spoil(tmp_path / "door")
    with pytest.raises(Unavailable, match=sentence):
        private_folder(tmp_path / "door", "we meet there")


def test_digest_is_blake3_of_the_reference_vector(tmp_path):
    # BLAKE3 team's test_vectors.json: input_len 0
    assert digest_of(b"") == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    (tmp_path / "big").write_bytes(bytes(3_000_001))
    assert digest_of(tmp_path / "big") == digest_of(bytes(3_000_001))


# -- settings -------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, sentence", [
    ("[project\nname = x", "cannot be read"),
    ("[project]\nname = x\nname = y", "cannot be read"),
    ("[tracking]\nuri = x", r"\[project\] lacks 'name'; add it"),
    ("[project]\nname = a b", r"\[project\] name = 'a b' is not valid; expected letters, digits"),
    ("[project]\nname = x\n[monitor]\npsi = high", r"\[monitor\] psi = 'high' is not valid; expected population stability index"),
    ("[project]\nname = x\n[monitor]\nalpha = 7", r"\[monitor\] alpha = '7' is not valid"),
    ("[project]\nname = x\n[trakcing]\nuri = x", r"unknown section \[trakcing\]; expected one of project"),
    ("[project]\nname = x\n[gates]\nndcg = 0.3", r"\[gates\] ndcg = '0.3' is not valid; expected a key like validate.accuracy"),
    ("[project]\nname = x\n[deploy.api]\nport = 99999", r"\[deploy.api\] port = '99999' is not valid"),
    ("[project]\nname = x\n[deploy.api]\npassword = s3cret", r"\[deploy.api\] has no setting 'password'"),
])
def test_a_wrong_setting_is_named_with_what_was_expected(text, sentence):
    with pytest.raises(Invalid, match=sentence) as error:
        read_settings(text, environment={})
    assert "\n" not in str(error.value) and "s3cret" not in str(error.value)


def test_the_environment_wins_and_is_validated():
    text = "[project]\nname = x\n[deploy.my-api]\nport = 1"
    assert read_settings(text, environment={"MLOPS_DEPLOY_MY_API_PORT": "8080"}).deploy["my-api"].port == 8080
    with pytest.raises(Invalid, match="uri = '' is not valid|psi = 'x' is not valid"):
        read_settings(text, environment={"MLOPS_MONITOR_PSI": "x"})


def test_a_project_is_found_from_below_and_foreign_settings_are_passed_over(tmp_path):
    init(str(tmp_path / "shop"))
    below = tmp_path / "shop" / "nbs" / "deep"
    below.mkdir(parents=True)
    (below / "settings.ini").write_text("[DEFAULT]\nlib_name = other\n")
    with in_project(below):
        assert project().name == "shop"
    with in_project(tmp_path), pytest.raises(NotFound, match="make one with `mlops init`"):
        project()
    with pytest.raises(Conflict, match="already describes the project 'shop'"):
        init(str(tmp_path / "shop"))


def test_init_keeps_what_another_tool_wrote(tmp_path):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = other\n")
    init(str(tmp_path), name="shop")
    assert (tmp_path / "settings.ini").read_text() == "[DEFAULT]\nlib_name = other\n\n[project]\nname = shop\n"


# -- gates ----------------------------------------------------------------------------------------

def test_gates_take_the_natural_direction_and_nan_never_passes():
    assert str(Gate.parse("accuracy", "0.8")) == "accuracy >= 0.8"
    assert str(Gate.parse("missing.CustomerID", "2 %")) == "missing.CustomerID <= 0.02"
    assert str(Gate.parse("rmse", 3)) == "rmse <= 3"
    assert not Gate.parse("accuracy", 0.5).holds(float("nan")) and not Gate.parse("missing", 0.5).holds(float("nan"))
    with pytest.raises(Invalid, match="expected a number or a comparison"):
        Gate.parse("accuracy", "high")
    with pytest.raises(Invalid, match="was not measured; did you mean accuracy"):
        judge({"acuracy": 0.5}, {"accuracy": 0.9})


# -- reports --------------------------------------------------------------------------------------

FACTS = {"title": "Sales <b>", "rows": 12345, "share": 0.12345, "nothing": None, "nan": float("nan"), "checks": [
    {"name": "missing", "passed": False, "value": 0.25, "expected": "<= 0.02"}, {"name": "note", "passed": False, "severity": "warning", "value": 1}],
    "rows by month": [{"month": "2011-01", "n": 3}, {"month": "2011-02", "n": 4}], "nested": {"deep": [1, 2], "checks": [{"name": "inner", "passed": True}]},
    "plot": {"plot": "bars", "title": "By <month>", "x": ["a", "b"], "y": {"n": [1, 2]}}}


def test_all_views_come_from_the_same_facts():
    report = Report(FACTS)
    assert not report.passed and [check["name"] for check in report.failures] == ["missing"]
    facts = json.loads(report.json())
    assert facts["passed"] is False and facts["nan"] is None and facts["rows"] == 12345
    for view in (report.text(), report.markdown()):
        assert "12,345" in view and "0.123" in view and "2011-02" in view and "fail" in view
    assert report._repr_mimebundle_()["text/plain"] == report.text()


def test_html_is_self_contained_and_escapes_the_data():
    page = Report(FACTS).page()
    assert "Sales &lt;b&gt;" in page and "<b>\"" not in page and "By <month>" not in page
    assert not re.search(r"(src|href)=|@import|url\((?!#)", re.sub(r'xlink:href="#|href="#', "", page))
    assert "color-scheme:light dark" in page and "<svg" in page


def test_a_report_without_checks_has_no_verdict():
    report = Report({"title": "Status", "data": []})
    assert report.passed and not report.judges and "passed" not in json.loads(report.json())
    assert "none" in report.text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_plot_is_the_same_bytes_each_time_and_takes_its_ink_from_the_page(kind):
    spec = {"plot": kind, "title": "t", "x": [0, 1, 2], "y": {"a": [1, 2], "b": [2, 1]}, "mark": 1}
    if kind == "lines":
        spec["y"] = {"a": [1, 2, 3]}
    if kind == "bars":
        spec["y"] = {"a": [1, 2, 3]}
    if kind == "intervals":
        spec |= {"y": [1, 2, 3], "low": [0, 1, 2], "high": [2, 3, 4]}
    assert draw(spec) == draw(spec)
    assert "currentColor" in draw(spec) and "#010203" not in draw(spec) and "<metadata" not in draw(spec)


def test_saving_a_report_picks_the_view_by_its_ending(tmp_path):
    report = Report(FACTS)
    assert report.save(tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert report.save(tmp_path / "r.md").read_text().startswith("# Sales")
    assert json.loads(report.save(tmp_path / "r.json").read_text())["rows"] == 12345


def test_progress_is_silent_where_nobody_looks(monkeypatch, capsys):
    from mlops_nb.core.progress import progress

    monkeypatch.setenv("MLOPS_PROGRESS", "0")
    assert list(progress(range(3), "x")) == [0, 1, 2]
    monkeypatch.setenv("MLOPS_PROGRESS", "1")
    assert list(progress(range(3), "resampling")) == [0, 1, 2]
    assert "resampling" in capsys.readouterr().err


def test_a_step_saves_its_report_before_it_raises(tmp_path, monkeypatch):
    from mlops_nb.core.errors import GateFailed
    from mlops_nb.core.step import Step, conclude, output

    for key, value in Step("r1", "check", Path(tmp_path)).environment.items():
        monkeypatch.setenv(key, value)
    assert output(rows=3) | output(more=4) == {"rows": 3, "more": 4}
    assert json.loads((tmp_path / "outputs.json").read_text()) == {"rows": 3, "more": 4}
    with pytest.raises(GateFailed, match="missing 0.25") as error:
        conclude(Report(FACTS), "check-orders@3")
    assert (tmp_path / "check-orders@3.html").exists() and error.value.report.saved.name == "check-orders@3.html"
    with pytest.raises(Invalid, match="cannot name a report"):
        conclude(Report(FACTS), "../escape")
    assert os.listdir(tmp_path.parent).count("escape.html") == 0


def test_an_untrusted_notebook_still_reads_well():
    """JupyterLab's sanitizer drops <style> and <svg> but keeps the words inside an <svg>: those have size 0."""
    html = Report(FACTS).html()
    assert re.findall(r'<div style="font-size:0"><svg', html) and html.count("<svg") == html.count('<div style="font-size:0"><svg')
    bare = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", html, flags=re.S)
    assert "12,345" in bare and "✗ fail" in bare and "By &lt;month&gt;" in bare


def test_a_digest_is_shown_short_and_kept_whole():
    report = Report({"digest": "6e650ce37f2732fcfdc2cab3f03851fec3addb343c739c93196e3c35752e0cf2"})
    assert "6e650ce37f27\n" in report.text() + "\n" and "e0cf2" not in report.text() and "e0cf2" in report.json()
