"""A plan that is only read: its copy belongs to the canary until the mounted one changes, whoever looks first and whoever starts again."""

import json
import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlops_nb.serve import plan_copy
from mlops_nb.serve.plan import Watched, history, planned, read_plan, withdraw
from mlops_nb.serve.plan_copy import SAID, Copy, copied, mark_of, watched_in

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links, as the kubelet makes them")


@pytest.fixture
def mount(tmp_path):
    "Brings a plan as the kubelet does, and gives its path."
    place = tmp_path / "config"
    place.mkdir()

    def bring(traffic=None, text=""):
        new = place / f"..{len(list(place.iterdir()))}"
        new.mkdir()
        (new / "plan.json").write_text(text or json.dumps(planned("m", traffic=traffic, follow=False).facts))
        if not (place / "plan.json").is_symlink():
            (place / "plan.json").symlink_to("..data/plan.json")
        (place / "turning").symlink_to(new.name)
        os.replace(place / "turning", place / "..data")
        return place / "plan.json"

    return bring


def traffic(path):
    return dict(read_plan(path).of("m").traffic)


def test_only_a_plan_that_a_cluster_mounted_is_copied(mount, tmp_path):
    mounted, plain = mount({"1": 100}), tmp_path / "plan.json"
    order = {"plan": str(mounted), "metrics": str(tmp_path / "run" / "metrics"), "workers": 2}
    assert copied(order) == {**order, "plan": str(tmp_path / "run" / "plan.json"), "mounted": str(mounted)}
    assert copied({**order, "plan": str(plain)}) == {**order, "plan": str(plain)}
    assert copied({"plan": str(mounted)}) == {"plan": str(mounted)}, "without a folder of its own there is nowhere to copy to"
    assert type(watched_in({"plan": str(mounted)})) is Watched and type(watched_in(copied(order))) is Copy
    assert json.loads(json.dumps(copied(order))) == copied(order), "an order crosses processes as JSON"


def test_a_withdrawal_lasts_until_the_mounted_plan_is_another(mount, tmp_path):
    mounted, copy = mount({"1": 80, "2": 20}), tmp_path / "plan.json"
    first = Copy(mounted, copy)
    withdraw(copy, "m", "2", by="canary", why="slow.")
    assert first.changed() and dict(first.plan.of("m").traffic) == {"1": 100} and traffic(mounted) == {"1": 80, "2": 20}
    again = Copy(mounted, copy)  # a worker that was started again
    assert dict(again.plan.of("m").traffic) == {"1": 100} and not first.changed()
    mount({"1": 80, "2": 20})  # the kubelet writes it anew, and nothing is different
    assert not first.changed() and traffic(copy) == {"1": 100}
    mount({"1": 100})  # the cluster agrees
    assert not first.changed() and read_plan(copy).revision == 2
    mount({"1": 80, "2": 20})  # somebody insists
    assert first.changed() and again.changed() and traffic(copy) == {"1": 80, "2": 20}
    assert [one["by"] for one in history(copy)] == ["cluster", "canary", "cluster"]


def test_many_workers_take_it_over_once(mount, tmp_path, monkeypatch):
    writes, write = [], plan_copy.write_plan
    monkeypatch.setattr(plan_copy, "write_plan", lambda *args, **more: (writes.append(1), write(*args, **more))[1])
    mounted, copy = mount({"1": 100}), tmp_path / "plan.json"
    watched = [Copy(mounted, copy) for _ in range(6)]
    for round in range(1, 6):
        mount({"1": 100 - round, "2": round})
        threads = [threading.Thread(target=one.changed) for one in watched]
        for one in threads:
            one.start()
        for one in threads:
            one.join(120)
        assert not any(one.is_alive() for one in threads) and {one.plan.revision for one in watched} == {round + 1}
    assert len(writes) == 6


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"models": []}), json.dumps({"models": [{"model": "m", "traffic": {"1": 50}}]})])
def test_a_damaged_plan_leaves_the_last_one_in_force(mount, tmp_path, text):
    watched = Copy(mount({"1": 80, "2": 20}), tmp_path / "plan.json")
    mounted = mount(text=text)
    assert not watched.changed() and str(mounted) in watched.problem and dict(watched.plan.of("m").traffic) == {"1": 80, "2": 20}
    mount({"2": 100})
    assert watched.changed() and watched.problem == ""
    other = Copy(mount(text=text), tmp_path / "never" / "plan.json")
    assert other.plan is None and str(mounted) in other.problem


def test_a_plan_that_is_gone_for_a_moment_is_borne(mount, tmp_path):
    mounted = mount({"1": 80, "2": 20})
    watched = Copy(mounted, tmp_path / "plan.json")
    Path(mounted.parent / "..data").unlink()
    assert not watched.changed() and watched.problem and watched.plan.revision == 1
    mount({"1": 100})
    assert watched.changed() and not watched.problem


def test_what_was_withdrawn_is_said_at_once_and_again(mount, tmp_path, monkeypatch, caplog):
    now = [1000.0]
    monkeypatch.setattr(plan_copy, "time", SimpleNamespace(monotonic=lambda: now[0]))
    mounted, copy = mount({"1": 70, "2": 20, "3": 10}), tmp_path / "plan.json"
    with caplog.at_level(logging.WARNING, "mlops_nb.serve"):
        speaker, silent = Copy(mounted, copy, tells=True), Copy(mounted, copy)
        withdraw(copy, "m", "2", by="canary", why="m@2 is slow: @ twice as slow.")
        for _ in range(5):
            speaker.changed(), silent.changed()
        assert len(caplog.messages) == 1, "once, by one of them"
        now[0] += plan_copy.AGAIN_S
        withdraw(copy, "m", "3", by="canary", why="m@3 fails.")
        speaker.changed()
        found = [SAID.search(f"2026-11-24 09:00:00,000 WARNING mlops_nb.serve: {line}") for line in caplog.messages]
        assert [(one["model"], one["version"], one["why"]) for one in found] == [("m", "2", "m@2 is slow: @ twice as slow."), ("m", "2", "m@2 is slow: @ twice as slow."), ("m", "3", "m@3 fails.")]
        assert {one["mark"] for one in found} == {mark_of(mounted.read_bytes())}
        mount({"1": 60, "2": 40})
        now[0] += plan_copy.AGAIN_S
        speaker.changed()
        assert len(caplog.messages) == 3, "what was said of another plan is over"
