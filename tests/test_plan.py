"""plan: what may be planned, changes that several people and processes make at once, the way back, and a file that is damaged while a server follows it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial

import pytest
from patience import finished, next_line, started, until

from mlops_nb.core.errors import Conflict, Invalid, MlopsError, NotFound
from mlops_nb.serve.plan import KEPT, ModelPlan, Plan, Watched, change, history, plan_from, planned, read_plan, rollback, shadow, split, withdraw, withdrawals, write_plan

BOTH = {"champion": 90, "challenger": 10}


@pytest.fixture
def file(tmp_path):
    write_plan(tmp_path / "plan.json", planned("recommender@champion", "churn@3"), by="ann")
    return tmp_path / "plan.json"


def shares(file, model="recommender"):
    return dict(read_plan(file).of(model).traffic)


# -- what may be planned ---------------------------------------------------------------------------

@pytest.mark.parametrize("fields, says", [
    ({"traffic": {}}, "expected percentages"), ({"traffic": None}, "expected percentages"), ({"traffic": [["champion", 100]]}, "expected percentages"),
    ({"traffic": {"champion": 90}}, "sum to 90"), ({"traffic": {"champion": 90, "challenger": 10.1}}, "sum to 100.1"),
    ({"traffic": {"champion": -10, "challenger": 110}}, "from 0 to 100"), ({"traffic": {"champion": "100"}}, "from 0 to 100"),
    ({"traffic": {"champion": True}}, "from 0 to 100"), ({"traffic": {"champion": float("nan")}}, "from 0 to 100"), ({"traffic": {"champion": float("inf")}}, "from 0 to 100"),
    ({"traffic": {"../champion": 100}}, "cannot name a version"), ({"traffic": {"": 100}}, "cannot name a version"), ({"traffic": {"a b": 100}}, "cannot name a version"),
    ({"traffic": {"3": 50, "03": 50}}, "name a version twice"), ({"traffic": {3: 50, "3": 50}}, "name a version twice"),
    ({"model": "recommender@3"}, "plain model"), ({"model": "a/b"}, "not an address"), ({"model": 3}, "model of"),
    ({"key": None}, "key of"), ({"key": 3}, "input column"), ({"follow": 1}, "true or false"), ({"batching": "no"}, "true or false"),
    ({"shadow": "champion"}, "already answers 100%"), ({"shadow": "x y"}, "cannot name"), ({"shadow_percent": 0}, "over 0"), ({"shadow_percent": 101}, "up to 100"),
    ({"shadow_percent": "20"}, "up to 100"), ({"canary": None}, "expected bands"), ({"canary": {"error_rat": 0.1}}, "did you mean error_rate"),
    ({"canary": {"error_rate": 0}}, "over 0 and under 1"), ({"canary": {"error_rate": "1%"}}, "over 0 and under 1"), ({"canary": {"latency_ratio": 1}}, "over 1"),
    ({"canary": {"off": 1}}, "true or false"), ({"canary": {"min_requests": float("nan")}}, "number of requests"),
])
def test_what_cannot_be_followed_is_refused_in_one_sentence(fields, says):
    with pytest.raises(Invalid, match=says) as raised:
        ModelPlan(**{"model": "recommender", "traffic": {"champion": 100}, **fields})
    assert "\n" not in str(raised.value) and str(raised.value).endswith((".", "?"))


def test_thirds_sum_to_a_hundred():
    assert sum(ModelPlan("m", {"1": 100 / 3, "2": 100 / 3, "3": 100 / 3}).traffic.values()) == pytest.approx(100)


def test_the_main_version_is_the_champion_while_it_has_a_share():
    assert ModelPlan("m", {"champion": 10, "challenger": 90}).main == "champion"
    assert ModelPlan("m", {"champion": 0, "challenger": 100}).main == "challenger"
    assert ModelPlan("m", {"3": 70, "4": 30}).main == "3"


def test_bands_are_watched_when_two_versions_have_traffic():
    assert ModelPlan("m", {"champion": 90, "challenger": 10}, canary={"drift_psi": 0.4}).bands["drift_psi"] == 0.4
    assert ModelPlan("m", {"champion": 90, "challenger": 10}).bands["error_rate"] == 0.01
    assert ModelPlan("m", {"champion": 100, "challenger": 0}).bands == {}
    assert ModelPlan("m", {"champion": 90, "challenger": 10}, canary={"off": True}).bands == {}


def test_a_first_plan_from_addresses():
    plan = planned("recommender@champion", "churn@3", key="CustomerID")
    assert [(one.model, dict(one.traffic), one.key) for one in plan.models] == [("recommender", {"champion": 100}, "CustomerID"), ("churn", {"3": 100}, "CustomerID")]
    assert dict(planned("recommender@champion", traffic=BOTH).models[0].traffic) == BOTH == dict(planned("recommender", traffic=BOTH).models[0].traffic)
    for addresses, more in [((), {}), (("a",), {}), (("a@1", "a@2"), {}), (("a@1", "b@1"), {"traffic": BOTH}), (("a@7",), {"traffic": BOTH}), (("a b@1",), {})]:
        with pytest.raises(Invalid):
            planned(*addresses, **more)


@pytest.mark.parametrize("content", [None, [], {}, {"models": {}}, {"models": []}, {"models": [3]}, {"models": [{"model": "m"}]}, {"models": [{"model": "m", "traffic": {"1": 100}, "surplus": 1}]},
                                     {"models": [{"model": "m", "traffic": {"1": 100}}] * 2}, {"models": [{"model": "m", "traffic": {"1": 100}}], "revision": "3"},
                                     {"models": [{"model": "m", "traffic": {"1": 100}}], "history": [3]}, {"models": [{"model": "m", "traffic": {"1": 100}}], "history": 3}])
def test_a_file_with_the_wrong_content_is_named(tmp_path, content):
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(Invalid, match="plan.json"):
        read_plan(tmp_path / "plan.json")


def test_a_plan_written_by_hand_needs_only_models(tmp_path):
    (tmp_path / "plan.json").write_text('{"models": [{"model": "m", "traffic": {"champion": 100}}]}')
    assert read_plan(tmp_path / "plan.json").revision == 0
    assert split(tmp_path / "plan.json", "m", BOTH).revision == 1
    assert dict(rollback(tmp_path / "plan.json", "m").of("m").traffic) == {"champion": 100}


def test_plain_values_go_round(file):
    split(file, "recommender", BOTH, by="ann", why="ä – first step")
    plan = read_plan(file)
    assert plan_from(json.loads(json.dumps(plan.facts))) == plan == read_plan(file)
    assert (plan.by, plan.why, plan.revision) == ("ann", "ä – first step", 2) and plan.at.endswith("Z")


# -- changes ---------------------------------------------------------------------------------------

def test_a_change_touches_its_model_and_its_fields_only(file):
    change(file, "recommender", key="CustomerID", canary={"error_rate": 0.05}, by="ann")
    split(file, "recommender", BOTH)
    entry = read_plan(file).of("recommender")
    assert (entry.key, entry.canary, dict(entry.traffic)) == ("CustomerID", {"error_rate": 0.05}, BOTH)
    assert shares(file, "churn") == {"3": 100}
    with pytest.raises(NotFound, match="did you mean recommender"):
        split(file, "recomender", BOTH)
    with pytest.raises(Invalid, match="no field 'trafic'"):
        change(file, "recommender", trafic=BOTH)


def test_asking_again_for_what_is_there_makes_no_revision(file):
    first = split(file, "recommender", BOTH)
    content = file.read_bytes()
    assert split(file, "recommender", {"challenger": 10, "champion": 90}, by="bob") == first
    assert file.read_bytes() == content


def test_a_shadow_that_gets_a_share_is_no_shadow_any_more(file):
    shadow(file, "recommender", "challenger", 20)
    entry = split(file, "recommender", BOTH).of("recommender")
    assert entry.shadow == "" and entry.selectors == ("challenger", "champion")
    with pytest.raises(Invalid, match="already answers 10%"):
        shadow(file, "recommender", "challenger")
    assert shadow(file, "recommender", "candidate").of("recommender").selectors == ("challenger", "champion", "candidate")


def test_one_rollback_undoes_a_split_and_its_shadow(file):
    shadow(file, "recommender", "challenger", 20)
    before = read_plan(file)
    both = split(file, "recommender", BOTH, shadow="candidate", by="ann")
    assert (both.revision, both.of("recommender").shadow, both.of("recommender").shadow_percent) == (before.revision + 1, "candidate", 100)
    assert rollback(file, "recommender").of("recommender") == before.of("recommender")
    assert split(file, "recommender", {"champion": 100}, shadow="").of("recommender").shadow == ""
    content = file.read_bytes()
    with pytest.raises(Invalid, match="already answers 10%"):
        split(file, "recommender", BOTH, shadow="challenger")
    assert file.read_bytes() == content


def test_a_model_is_added_and_a_bad_change_leaves_the_file_alone(file):
    assert [one.model for one in change(file, "sizes", traffic={"1": 100}).models] == ["recommender", "churn", "sizes"]
    content = file.read_bytes()
    for wrong in ({"champion": 50}, {"champion": 200}, {}):
        with pytest.raises(Invalid):
            split(file, "recommender", wrong)
    with pytest.raises(Invalid, match="too long"):
        split(file, "recommender", BOTH, why="x" * 2000)
    assert file.read_bytes() == content


def test_who_decided_for_an_older_revision_is_told(file):
    seen = read_plan(file).revision
    split(file, "churn", {"3": 50, "4": 50}, by="bob")
    for late in (lambda: split(file, "recommender", BOTH, expected_revision=seen), lambda: rollback(file, "churn", expected_revision=seen),
                 lambda: withdraw(file, "churn", "4", expected_revision=seen), lambda: write_plan(file, planned("m@1"), expected_revision=seen)):
        with pytest.raises(Conflict, match="revision 2 by bob, not at 1"):
            late()
    assert split(file, "recommender", BOTH, expected_revision=2).revision == 3


def test_the_same_decision_of_many_workers_is_made_once(file):
    "Eight workers see the new version fail; one writes, the others are told that somebody was first."
    split(file, "recommender", {"champion": 50, "challenger": 50})
    outcomes = []

    def worker():
        try:
            outcomes.append(withdraw(file, "recommender", "challenger", by="canary", expected_revision=2).revision)
        except Conflict:
            outcomes.append("late")

    finished(started(*[worker] * 8))
    assert sorted(map(str, outcomes)) == ["3"] + ["late"] * 7
    assert len(history(file)) == 3


def test_withdrawing_again_changes_nothing(file):
    split(file, "recommender", {"champion": 50, "challenger": 50})
    finished(started(*[partial(withdraw, file, "recommender", "challenger", by="canary", why="it fails")] * 8))
    assert [row["by"] for row in history(file)] == ["canary", history(file)[1]["by"], "ann"] and shares(file) == {"champion": 100}
    assert [(one["revision"], one["version"], one["by"], one["why"]) for one in withdrawals(file)] == [(3, "recommender@challenger", "canary", "it fails")]


def test_only_a_withdrawal_is_one_and_it_stays_one(file):
    split(file, "recommender", BOTH, by="canary", why="a person whose token is called so")
    withdraw(file, "recommender", "challenger", why="it fails")
    rollback(file, "recommender")
    split(file, "churn", {"3": 50, "4": 50})
    withdraw(file, "churn", "4", why="it is slow")
    assert [(one["revision"], one["version"], one["why"]) for one in withdrawals(file)] == [(3, "recommender@challenger", "it fails"), (6, "churn@4", "it is slow")]
    assert [one["version"] for one in withdrawals(file, since=3)] == ["churn@4"] and withdrawals(file, since=6) == []


def test_no_change_of_several_processes_is_lost(file):
    code = textwrap.dedent("""
        import sys
        from mlops_nb.serve.plan import change
        for i in range(10):
            change(sys.argv[1], f"m{sys.argv[2]}", traffic={str(i + 1): 100}, by=sys.argv[2])
    """)
    workers = [subprocess.Popen([sys.executable, "-c", code, str(file), str(i)]) for i in range(3)]
    assert [one.wait(timeout=600) for one in workers] == [0, 0, 0]
    assert read_plan(file).revision == 31 and {f"m{i}" for i in range(3)} < {one.model for one in read_plan(file).models}
    assert [row["revision"] for row in history(file)] == list(range(31, 0, -1))


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_writer_that_is_killed_leaves_a_whole_plan(file):
    code = textwrap.dedent("""
        import sys
        from mlops_nb.serve.plan import split
        print("ready", flush=True)
        while True:
            for share in range(1, 100):
                split(sys.argv[1], "recommender", {"champion": share, "challenger": 100 - share})
    """)
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE)
        assert next_line(writer)
        until(lambda: read_plan(file).revision % 20 == 19, process=writer)
        writer.send_signal(signal.SIGKILL)
        writer.wait(120)
        writer.stdout.close()
        assert sum(shares(file).values()) == 100
        assert split(file, "recommender", {"champion": 100}).revision > 1  # its lock is free again


# -- the way back ----------------------------------------------------------------------------------

def test_rollback_goes_back_and_further_back_and_is_itself_a_revision(file):
    steps = [{"champion": 100 - share, "challenger": share} for share in (5, 20, 50)]
    for step in steps:
        split(file, "recommender", step)
    assert [dict(rollback(file, "recommender").of("recommender").traffic) for _ in range(3)] == [steps[1], steps[0], {"champion": 100}]
    assert read_plan(file).revision == 7
    with pytest.raises(NotFound, match="no earlier plan for 'recommender'"):
        rollback(file, "recommender")
    split(file, "recommender", steps[2])
    assert dict(rollback(file, "recommender").of("recommender").traffic) == {"champion": 100}, "a change after a rollback is undone to where the rollback had led"


def test_rollback_leaves_the_other_models(file):
    split(file, "recommender", BOTH)
    split(file, "churn", {"3": 50, "4": 50})
    rollback(file, "recommender")
    assert (shares(file), shares(file, "churn")) == ({"champion": 100}, {"3": 50, "4": 50})
    rollback(file, "churn")
    assert shares(file, "churn") == {"3": 100}


def test_rollback_brings_back_every_field(file):
    change(file, "recommender", traffic=BOTH, key="CustomerID", canary={"off": True})
    assert rollback(file, "recommender").of("recommender") == ModelPlan("recommender", {"champion": 100})


def test_rollback_brings_back_a_model_that_was_dropped(file):
    plan = read_plan(file)
    write_plan(file, replace(plan, models=plan.models[:1]))
    assert shares(rollback(file, "churn") and file, "churn") == {"3": 100}
    with pytest.raises(NotFound, match="no earlier plan for 'nothing'"):
        rollback(file, "nothing")


def test_withdrawing_takes_everything_whatever_came_before(file):
    split(file, "recommender", {"champion": 90, "challenger": 10})
    split(file, "recommender", {"champion": 50, "challenger": 30, "candidate": 20})
    assert dict(withdraw(file, "recommender", "challenger").of("recommender").traffic) == {"candidate": 20, "champion": 80}
    assert dict(withdraw(file, "recommender", "champion").of("recommender").traffic) == {"candidate": 100}
    with pytest.raises(Conflict, match="only version with traffic"):
        withdraw(file, "recommender", "candidate")
    assert [dict(rollback(file, "recommender").of("recommender").traffic)["champion"] for _ in range(2)] == [80, 50]


def test_a_shadow_is_withdrawn_too(file):
    shadow(file, "recommender", "challenger")
    entry = withdraw(file, "recommender", "challenger").of("recommender")
    assert (entry.shadow, dict(entry.traffic)) == ("", {"champion": 100})


def test_the_history_is_bounded_and_says_what_changed(file):
    for share in range(1, KEPT + 10):
        split(file, "recommender", {"champion": 100 - share, "challenger": share}, by="ann", why=f"step {share}")
    rows = history(file)
    assert len(rows) == KEPT and rows[0]["revision"] == KEPT + 10
    assert (rows[0]["by"], rows[0]["why"], rows[0]["change"]) == ("ann", "step 59", "recommender: challenger 58%, champion 42% → challenger 59%, champion 41%")
    assert rows[-1]["change"] == "(what was before is not kept)"
    for _ in range(KEPT - 2):  # each of them pushes an old revision out, so the way back becomes shorter, but never wrong
        try:
            share = shares(file)["challenger"]
            assert dict(rollback(file, "recommender").of("recommender").traffic)["challenger"] == share - 1
        except NotFound:
            break
    assert share < 40


# -- following -------------------------------------------------------------------------------------

def test_a_follower_sees_each_change_once(file):
    watched = Watched(file)
    assert watched.plan.revision == 1 and not watched.changed()
    split(file, "recommender", BOTH)
    assert watched.changed() and watched.plan.revision == 2 and not watched.changed()
    os.utime(file, (1, 1))
    assert not watched.changed() and watched.problem == "", "touched, and still the same plan"


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-40]), lambda path: path.write_bytes(b""), lambda path: path.write_bytes(os.urandom(200)), lambda path: path.unlink(),
                                    lambda path: path.write_text('{"models": [{"model": "recommender", "traffic": {"champion": 60}}]}'), lambda path: (path.unlink(), path.mkdir())],
                         ids=["half", "empty", "noise", "gone", "invalid", "folder"])
def test_a_follower_keeps_the_last_good_plan(file, damage):
    split(file, "recommender", BOTH)
    good, watched = file.read_bytes(), Watched(file)
    damage(file)
    for _ in range(2):
        assert not watched.changed() and dict(watched.plan.of("recommender").traffic) == BOTH
        assert "revision 2 stays in force" in watched.problem and "plan.json" in watched.problem
    if file.is_dir():
        file.rmdir()
    file.write_bytes(good)
    assert not watched.changed() and watched.problem == "", "the same plan is back"
    split(file, "recommender", {"champion": 100})
    assert watched.changed()


def test_a_follower_waits_for_a_file_that_is_not_there_yet(tmp_path):
    watched = Watched(tmp_path / "plan.json")
    assert watched.plan is None and watched.problem.endswith("plan.json cannot be read (No such file or directory).")
    write_plan(tmp_path / "plan.json", planned("m@1"))
    assert watched.changed() and watched.plan.revision == 1


def test_two_writes_within_one_tick_of_the_clock_are_both_seen(file):
    watched = Watched(file)
    stat, content = file.stat(), file.read_text()
    changed = content.replace('"champion": 100', '"chompion": 100', 1)
    with open(file, "r+") as handle:  # in place and of the same length, as an editor on a coarse file system may
        handle.write(changed)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert watched.changed() and dict(watched.plan.of("recommender").traffic) == {"chompion": 100}


def test_a_plan_is_light():
    code = "import sys, mlops_nb.serve.plan; print([m for m in ('numpy', 'pandas', 'scipy', 'pydantic', 'mlflow', 'starlette') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout.strip() == "[]"


def test_every_error_is_ours(file):
    with pytest.raises(MlopsError):
        Plan(())


# -- since when ------------------------------------------------------------------------------------

def test_an_entry_begins_with_its_own_last_change(file):
    "What was seen of an earlier entry is not held against one that looks the same and began later."
    assert read_plan(file).since == {"recommender": 1, "churn": 1}
    split(file, "recommender", BOTH)
    change(file, "churn", key="CustomerID")
    assert read_plan(file).since == {"recommender": 2, "churn": 3}
    withdraw(file, "recommender", "challenger", by="canary")
    split(file, "recommender", BOTH)
    assert read_plan(file).since == {"recommender": 5, "churn": 3}
    split(file, "recommender", BOTH)  # changes nothing
    rollback(file, "churn")
    assert read_plan(file).since == {"recommender": 5, "churn": 6}
    change(file, "prices", traffic={"1": 100})
    assert read_plan(file).since == {"recommender": 5, "churn": 6, "prices": 7} and all("since" not in one for one in json.loads(file.read_text())["history"])


def test_a_plan_of_an_earlier_release_says_nothing_of_it(file):
    facts = json.loads(file.read_text())
    del facts["since"]
    file.write_text(json.dumps(facts))
    assert read_plan(file).since == {}
    split(file, "recommender", BOTH)
    assert read_plan(file).since == {"recommender": 2, "churn": 0}
