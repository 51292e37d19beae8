"""A deployment on a cluster, from the first apply to the end of it, and everything that goes wrong on the way. The cluster is `fake_kubernetes`, over HTTPS."""

import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from fake_kubernetes import FakeKubernetes

from mlops_nb.core.errors import Conflict, Invalid, NotFound, Unavailable
from mlops_nb.core.settings import in_project, init
from mlops_nb.deploy import kserve, kubernetes
from mlops_nb.deploy.cluster import Cluster, access
from mlops_nb.deploy.manifests import Arm, Workload, objects
from mlops_nb.deploy.rollout import rollout
from mlops_nb.deploy.targets import Wanted

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the tests of the cluster run where its operators do")
IMAGE = "registry.example/shop/{model}:{version}"
QUICK = {"timeout_s": 120, "patience_s": 0.2, "look_s": 1}


@pytest.fixture
def shop(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("MLOPS_", "KUBE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLOPS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    init(str(tmp_path / "shop"), name="shop")
    with in_project(tmp_path / "shop"):
        yield tmp_path / "shop"


@pytest.fixture
def cluster(shop, tmp_path, monkeypatch):
    with FakeKubernetes(tmp_path) as fake:
        monkeypatch.setenv("KUBECONFIG", str(fake.kubeconfig()))
        monkeypatch.setattr(Cluster, "pause_s", 0.01)
        yield fake


@pytest.fixture
def registry(monkeypatch):
    "Versions 1 to 6, champion and challenger among them."
    from mlops_nb.model import registry

    aliases = {"champion": 3, "challenger": 4}
    monkeypatch.setattr(registry, "model", lambda address: version(int(aliases.get(ref := str(address).partition("@")[2], ref))))
    return aliases


def version(number):
    return SimpleNamespace(name="recommender", version=number, address=f"recommender@{number}", digest=f"{number}" * 64, aliases=["champion"] if number == 3 else [])


def wanted(number=3, name="recommender", **more):
    options = {"image": IMAGE, **more.pop("options", {})}
    versions = {"champion": version(3), "challenger": version(4), **{f"{one}": version(one) for one in range(1, 7)}}
    return Wanted(name, f"recommender@{number}", version(number), replicas=more.pop("replicas", 2), versions=versions, options=options, **more)


def target(**more):
    return kubernetes.Kubernetes(**{**QUICK, **more})


def apply(one, number=3, before=None, **more):
    return {**(before or {}), "name": more.get("name", "recommender"), "by": "kim", "why": more.get("why", ""), **one.apply(wanted(number, **more), before)}


def kept(record):
    "The same record, written down as the verbs do."
    from mlops_nb.deploy.targets import recorded, write_record

    write_record(recorded(None, {**record, "target": "kubernetes"}, why="first"))
    return record


def image(fake, name="recommender"):
    return fake.get("Deployment", name)["spec"]["template"]["spec"]["containers"][0]["image"]


# --- the first deployment, and the same again
def test_a_deployment_is_applied_and_awaited(cluster):
    record = apply(target())
    assert record["applied"] and record["namespace"] == "shop" and record["context"] == "test" and record["url"] == "http://recommender.shop.svc"
    live = cluster.get("Deployment", "recommender")
    assert live["status"]["availableReplicas"] == 2 and image(cluster) == "registry.example/shop/recommender:3"
    assert {kind for kind in ("ServiceAccount", "ConfigMap", "NetworkPolicy", "Service", "Deployment", "PodDisruptionBudget", "Secret") if cluster.names(kind)} == {
        "ServiceAccount", "ConfigMap", "NetworkPolicy", "Service", "Deployment", "PodDisruptionBudget", "Secret"}
    status = target().status(record)
    assert (status["state"], status["replicas"], status["model"]) == ("running", "2 of 2", "recommender@3")


def test_the_same_again_changes_nothing(cluster):
    record = apply(target())
    before = {name: cluster.get("Deployment", "recommender")["metadata"][name] for name in ("resourceVersion", "generation")}
    pods = cluster.names("Pod")
    again = apply(target(), before=record)
    assert {name: cluster.get("Deployment", "recommender")["metadata"][name] for name in before} == before
    assert cluster.names("Pod") == pods and again["revision"] == record["revision"]


def test_only_digests_of_tokens_go_to_the_cluster(cluster):
    from base64 import b64decode

    from mlops_nb.deploy.tokens import token_of

    apply(target())
    secret = json.dumps([b64decode(one).decode() for one in cluster.get("Secret", "recommender-tokens")["data"].values()])
    assert "owner" in secret and token_of("recommender") not in secret
    assert all(token_of("recommender") not in json.dumps(one) for one in cluster.objects.values())


def test_a_rotated_token_reaches_the_cluster_and_no_pod_is_restarted(cluster):
    from mlops_nb.deploy import tokens

    record = kept(apply(target()))
    before, pods = cluster.get("Secret", "recommender-tokens")["data"], cluster.names("Pod")
    tokens.tokens("recommender", add="kim")
    plan = {one.what: one for one in target().plan(wanted(), record)}
    assert plan["Secret recommender-tokens"].action == "update" and plan["Secret recommender-tokens"].detail == ""
    apply(target(), before=record)
    assert cluster.get("Secret", "recommender-tokens")["data"] != before and cluster.names("Pod") == pods


def test_a_plan_touches_nothing_and_says_what_would_change(cluster):
    plan = target().plan(wanted(), None)
    assert {one.action for one in plan} == {"keep", "create"} and not any("Secret" in one.what for one in plan) and plan[0].what == "context test" and not cluster.names("Deployment")
    record = apply(target())
    assert {one.action for one in target().plan(wanted(), record)} == {"keep"}
    changes = {one.what: one for one in target().plan(wanted(4, replicas=3), record)}
    assert "recommender:3 -> registry.example/shop/recommender:4" in changes["Deployment recommender"].detail and "replicas 2 -> 3" in changes["Deployment recommender"].detail
    assert changes["Service recommender"].action == "keep" and image(cluster).endswith(":3")


def test_a_new_version_takes_over_without_a_gap(cluster):
    record = apply(target(), replicas=3)
    apply(target(), 4, before=record, replicas=3)
    assert image(cluster).endswith(":4") and cluster.lowest["recommender"] >= 3
    assert all(one["spec"]["containers"][0]["image"].endswith(":4") for one in cluster.objects.values() if one["kind"] == "Pod")


# --- when it does not come up
@pytest.mark.parametrize("how, said", [("pull", r"cannot be pulled \(ImagePullBackOff.*recommender:4"), ("crash", r"ends again and again \(CrashLoopBackOff: exit code 137, OOMKilled"),
                                       ("homeless", r"no node takes it \(0/3 nodes are available"), ("unready", r"its probe fails \(Readiness probe failed: HTTP probe failed with statuscode: 503")])
def test_a_version_that_does_not_come_up_is_taken_back_with_the_reason(cluster, how, said):
    record = apply(target())
    cluster.images = {":4": how}
    with pytest.raises(Unavailable, match=rf"recommender does not get ready: .*{said}.*; what ran before was put back and keeps answering\."):
        apply(target(timeout_s=8), 4, before=record)
    assert image(cluster).endswith(":3") and cluster.lowest["recommender"] == 2
    rollout(Cluster(access(), namespace="shop"), "recommender", **QUICK)
    assert target().status(record)["state"] == "running"
    failed = json.loads((target_folder(record) / "failed.json").read_text())
    assert "does not get ready" in failed["error"] and failed["objects"]


def target_folder(record):
    from pathlib import Path

    return Path(record["manifests"])


def test_a_first_version_that_does_not_come_up_leaves_nothing(cluster):
    cluster.images = {":3": "pull"}
    with pytest.raises(Unavailable, match="what had been made for it was removed again"):
        apply(target())
    assert not [kind for kind, _, _ in cluster.objects if kind != "Event"]


def test_a_quota_is_named(cluster):
    record = apply(target())
    cluster.quota = 2
    with pytest.raises(Unavailable, match="pods cannot be made .*exceeded quota: small"):
        apply(target(), 4, before=record)
    assert image(cluster).endswith(":3")


def test_the_clusters_own_deadline_ends_the_wait(cluster):
    record = apply(target())
    cluster.images, cluster.deadline = {":4": "unready"}, 5
    with pytest.raises(Unavailable, match="its probe fails"):
        apply(target(timeout_s=300), 4, before=record)


def test_a_registry_that_stumbles_is_borne(cluster):
    "The image comes after all: patience is longer than the trouble."
    record = apply(target())
    cluster.images = {":4": "pull"}
    import threading

    timer = threading.Timer(0.6, lambda: (cluster.images.clear(), [cluster.put(key, one, gone=True) for key, one in cluster.pods("shop", "recommender").items() if one["spec"]["containers"][0]["image"].endswith(":4")]))
    timer.start()
    apply(target(timeout_s=300, patience_s=200), 4, before=record)
    timer.join()
    assert image(cluster).endswith(":4")


def test_a_status_names_the_trouble_of_later(cluster):
    record = apply(target())
    cluster.images = {":3": "crash"}
    for key, one in list(cluster.pods("shop", "recommender").items()):
        cluster.put(key, one, gone=True)
    for _ in range(2400):
        status = target().status(record)
        if status["state"] == "failing" and "CrashLoop" in status["trouble"]:
            break
        import time

        time.sleep(0.05)
    assert "CrashLoopBackOff" in status["trouble"]


def test_what_another_machine_deployed_survives_our_failure(cluster, tmp_path):
    "This project has never deployed here: it has no revision to go back to, and the objects are there all the same."
    apply(target())
    init(str(tmp_path / "second"), name="shop")
    cluster.images = {":4": "crash"}
    with in_project(tmp_path / "second"):
        with pytest.raises(Unavailable, match="what ran before was put back"):
            apply(target(), 4)
    assert image(cluster).endswith(":3") and cluster.lowest["recommender"] == 2
    rollout(Cluster(access(), namespace="shop"), "recommender", **QUICK)
    cluster.images = {}
    with in_project(tmp_path / "second"):
        apply(target(), 5)
    assert image(cluster).endswith(":5")


def test_an_interrupted_rollout_is_taken_back(cluster, monkeypatch):
    record = apply(target())
    one = target()
    monkeypatch.setattr(one, "ready", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), raising=False)
    with pytest.raises(KeyboardInterrupt):
        apply(one, 4, before=record)
    assert image(cluster).endswith(":3") and kubernetes.revisions(target_folder(record))[-1]["number"] == record["revision"]


def test_when_going_back_fails_too_it_is_said(cluster, monkeypatch):
    record = apply(target())
    one = target()

    def lost(*_):
        cluster.tokens = set()
        raise Unavailable("recommender does not get ready: a reason.")

    monkeypatch.setattr(one, "ready", lost, raising=False)
    with pytest.raises(Unavailable, match=r"a reason; going back failed as well \(.*401.*\): look at the cluster\."):
        apply(one, 4, before=record)


# --- others on the same cluster
def test_somebody_elses_change_is_a_conflict_until_one_insists(cluster):
    record = apply(target())
    cluster.edit("Deployment", "recommender", ("spec", "template", "spec", "containers", '[name="server"]', "image"), "registry.example/shop/recommender:hotfix")
    with pytest.raises(Conflict, match='kubectl-edit'):
        apply(target(), 4, before=record)
    assert image(cluster).endswith(":hotfix")
    apply(target(), 4, before=record, force=True)
    assert image(cluster).endswith(":4")


def test_fields_of_others_stay(cluster):
    record = apply(target())
    cluster.edit("Deployment", "recommender", ("metadata", "annotations"), {"team": "blue"})
    apply(target(), 4, before=record)
    assert cluster.get("Deployment", "recommender")["metadata"]["annotations"] == {"team": "blue"}


def test_an_object_of_somebody_else_is_left_alone(cluster):
    cluster.put(("Service", "shop", "recommender"), {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "recommender", "labels": {"app": "theirs"}}, "spec": {}})
    with pytest.raises(Conflict, match="Service recommender in namespace shop was not made by mlops_nb"):
        apply(target())
    assert cluster.names("Deployment") == [] and cluster.get("Service", "recommender")["spec"] == {}


def test_a_forbidden_kind_stops_before_anything_is_touched(cluster):
    cluster.forbidden = {("patch", "networkpolicies")}
    with pytest.raises(Unavailable, match=r"forbids NetworkPolicy recommender \(403\).*cannot patch resource.*ask its administrator"):
        apply(target())
    assert not cluster.objects


def test_without_the_gateway_api_the_message_says_so(cluster):
    cluster.absent = {"HTTPRoute"}
    with pytest.raises(NotFound, match="does not know the Gateway API"):
        apply(target(), options={"gateway": "edge/public"})


def test_a_namespace_that_is_not_there(cluster):
    with pytest.raises(NotFound, match='namespaces "nowhere" not found'):
        apply(target(), options={"namespace": "nowhere"})


# --- versions side by side
GATEWAY = {"gateway": "edge/public", "hostname": "shop.example"}


def backends(fake):
    rule = fake.get("HTTPRoute", "recommender")["spec"]["rules"][0]
    return {one["name"]: one["weight"] for one in rule["backendRefs"]}


def test_a_gateway_splits_between_deployments(cluster, registry):
    record = apply(target(), options=GATEWAY)
    assert backends(cluster) == {"recommender-v3": 100} and record["url"] == "https://shop.example"
    record |= target().apply(wanted(3, traffic={"champion": 90, "challenger": 10}, options=GATEWAY), record)
    assert backends(cluster) == {"recommender-v3": 90, "recommender-v4": 10} and cluster.names("Deployment") == ["recommender-v3", "recommender-v4"]
    record |= target().traffic(record, {"champion": 40, "challenger": 60})
    assert backends(cluster) == {"recommender-v3": 40, "recommender-v4": 60} and record["model"] == "recommender@4"
    record |= target().traffic(record, {"challenger": 100})
    assert backends(cluster) == {"recommender-v4": 100} and cluster.names("Deployment") == ["recommender-v4"] and cluster.lowest["recommender-v4"] == 2


def test_a_version_that_is_not_there_yet_is_started_before_it_gets_traffic(cluster, registry, shop, monkeypatch):
    record = apply(target(), options=GATEWAY)
    monkeypatch.setattr(kubernetes, "project", lambda: SimpleNamespace(settings=SimpleNamespace(deploy={"recommender": SimpleNamespace(image=IMAGE)})))
    order = []
    monkeypatch.setattr(Cluster, "apply", lambda self, thing, real=Cluster.apply, **how: (how.get("dry_run") or order.append((thing["kind"], cluster.get("Deployment", "recommender-v4") or {})), real(self, thing, **how))[1])
    target().traffic(record, {"champion": 80, "challenger": 20})
    routed = next(there for kind, there in order if kind == "HTTPRoute")
    assert routed["status"]["availableReplicas"] == 2 and backends(cluster) == {"recommender-v3": 80, "recommender-v4": 20}


def test_an_alias_that_has_moved_means_the_new_version(cluster, registry, monkeypatch):
    record = apply(target(), options=GATEWAY)
    monkeypatch.setattr(kubernetes, "project", lambda: SimpleNamespace(settings=SimpleNamespace(deploy={"recommender": SimpleNamespace(image=IMAGE)})))
    registry["champion"] = 6
    record |= target().traffic(record, {"champion": 75, "3": 25})
    assert backends(cluster) == {"recommender-v6": 75, "recommender-v3": 25} and record["model"] == "recommender@6"


def test_a_canary_that_does_not_come_up_gets_no_traffic(cluster, registry):
    record = apply(target(), options=GATEWAY)
    cluster.images = {":4": "crash"}
    with pytest.raises(Unavailable, match="recommender-v4 does not get ready"):
        target().apply(wanted(3, traffic={"champion": 90, "challenger": 10}, options=GATEWAY), record)
    assert backends(cluster) == {"recommender-v3": 100} and cluster.names("Deployment") == ["recommender-v3"]


def test_a_shadow_is_a_mirror(cluster, registry):
    record = apply(target(), options=GATEWAY, shadow="5")
    rule = cluster.get("HTTPRoute", "recommender")["spec"]["rules"][0]
    assert rule["filters"] == [{"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "recommender-v5", "port": 80}}}] and cluster.names("Deployment") == ["recommender-v3", "recommender-v5"]
    record |= target().shadow(record, "5", 25)
    assert cluster.get("HTTPRoute", "recommender")["spec"]["rules"][0]["filters"][0]["requestMirror"]["percent"] == 25
    with pytest.raises(Invalid, match="answers requests already"):
        target().shadow(record, "3")
    target().shadow(record, "")
    assert "filters" not in cluster.get("HTTPRoute", "recommender")["spec"]["rules"][0] and cluster.names("Deployment") == ["recommender-v3"]


@pytest.mark.parametrize("gateway, said", [("public", r"does not take the route \(no Gateway is called public\)"), ("nowhere", "no Gateway called nowhere has taken up the route")])
def test_a_gateway_that_says_no_is_heard(cluster, gateway, said):
    cluster.gateways = set()
    with pytest.raises(Unavailable, match=said):
        apply(target(), options={"gateway": f"edge/{gateway}"})
    assert not cluster.names("Deployment") and not cluster.names("HTTPRoute")


def test_one_server_splits_by_its_plan(cluster, registry):
    every = {"image": "registry.example/shop/all:2026-11"}
    record = apply(target(), options=every, traffic={"champion": 90, "challenger": 10})
    before, pods = cluster.get("Deployment", "recommender")["metadata"]["generation"], cluster.names("Pod")
    plan = lambda: json.loads(cluster.get("ConfigMap", "recommender-plan")["data"]["plan.json"])["models"][0]
    assert plan()["traffic"] == {"3": 90, "4": 10}
    record |= target().traffic(record, {"champion": 50, "challenger": 50})
    record |= target().shadow(record, "5", 10)
    assert plan()["traffic"] == {"3": 50, "4": 50} and (plan()["shadow"], plan()["shadow_percent"]) == ("5", 10)
    assert cluster.get("Deployment", "recommender")["metadata"]["generation"] == before and cluster.names("Pod") == pods  # no pod was restarted
    record |= target().rollback(record)
    assert plan()["shadow"] == "" and plan()["traffic"] == {"3": 50, "4": 50}
    record |= target().rollback(record)
    assert plan()["traffic"] == {"3": 90, "4": 10} and record["traffic"] == {"champion": 90, "challenger": 10}


def test_one_image_of_one_version_cannot_split(cluster):
    with pytest.raises(Invalid, match=r"holds one version, and 2 are to answer; set gateway"):
        apply(target(), traffic={"champion": 90, "challenger": 10})
    assert not cluster.objects


def plan_of(fake):
    return json.loads(fake.get("ConfigMap", "recommender-plan")["data"]["plan.json"])["models"][0]


def test_the_settings_of_a_canary_reach_the_pods(cluster):
    from mlops_nb.core.settings import DeploySection

    for section, bands in ((DeploySection(canary_error_rate=0.2, canary_drift_psi=1.5), {"error_rate": 0.2, "latency_ratio": 1.5, "drift_psi": 1.5}), (DeploySection(canary=False), {"off": True})):
        record = apply(target(), section=section, options={"image": "registry.example/shop/all:1", "key": "CustomerID"}, traffic={"champion": 90, "challenger": 10})
        assert (plan_of(cluster)["canary"], plan_of(cluster)["key"]) == (bands, "CustomerID")
        assert "is not kept, as predictions_claim names no volume" in record["note"]


@pytest.mark.parametrize("options, by", [({"gateway": "edge/public"}, "the Gateway edge/public splits"), ({"mode": "standard"}, "KServe splits")])
def test_a_key_is_refused_where_nobody_keeps_to_it(cluster, options, by):
    with pytest.raises(Invalid, match=rf"key = 'CustomerID' of 'recommender' cannot be kept to, as {by} requests without reading their columns; take key out"):
        apply(serving() if "mode" in options else target(), options={**options, "key": "CustomerID"})
    assert not cluster.objects


EVERY = {"image": "registry.example/shop/all:1"}


@pytest.fixture
def watched(cluster):
    "A deployment whose pods hold three versions, and what one of them says."
    from mlops_nb.serve.plan_copy import mark_of

    record = kept(apply(target(), options=EVERY, traffic={"champion": 70, "challenger": 20, "5": 10}))
    mark = mark_of(cluster.get("ConfigMap", "recommender-plan")["data"]["plan.json"].encode())

    def say(*versions, mark=mark, pods=1):
        for pod in cluster.names("Pod")[:pods]:
            cluster.logs[pod] += "".join(f"2026-11-24 09:00:00,000 WARNING mlops_nb.serve: plan {mark}: recommender@{one} is withdrawn: recommender@{one} fails too often.\n" for one in versions)

    return record, say


def record_now():
    from mlops_nb.deploy.targets import record_of

    return record_of("recommender")


def test_several_versions_are_withdrawn_in_one_revision_and_a_rollback_brings_them_back(cluster, watched):
    record, say = watched
    say("4", pods=2)
    say("5", "4")
    status = target().status(record)
    assert status["traffic"] == {"champion": 100} and plan_of(cluster)["traffic"] == {"3": 100} and status["revision"] == record["revision"] + 1
    assert status["withdrawn"] == "recommender@4 fails too often; said by 2 pods. recommender@5 fails too often; said by 1 pod."
    last = record_now()["history"][-1]
    assert (last["by"], last["why"], last["model"]) == ("canary", status["withdrawn"], "recommender@3") and "'champion': 100" in last["changes"][0]
    again = target().status(record_now())
    assert (again["revision"], len(record_now()["history"])) == (status["revision"], 2)
    back = {**record_now(), **target().rollback({**record_now(), "by": "kim"})}
    assert plan_of(cluster)["traffic"] == {"3": 70, "4": 20, "5": 10} and "withdrawn" not in kubernetes.revisions(target_folder(back))[-1]


def test_what_is_said_of_another_plan_or_of_the_main_version_counts_for_nothing(cluster, watched):
    record, say = watched
    say("4", mark="0123456789ab")
    say("3", "9")  # the main version, and one that is not there
    cluster.logs[cluster.names("Pod")[0]] += "a client wrote: recommender@4 is withdrawn\n"
    status = target().status(record)
    assert status["traffic"] == {"champion": 70, "challenger": 20, "5": 10} and status["revision"] == record["revision"] and len(record_now()["history"]) == 1


def test_a_status_stands_without_the_right_to_read_logs_and_says_when_nothing_may_be_changed(cluster, watched):
    record, say = watched
    say("4")
    cluster.forbidden = {("list", "pods")}
    assert target().status(record)["traffic"]["challenger"] == 20
    cluster.forbidden = {("patch", "configmaps")}
    status = target().status(record)
    assert (status["state"], status["traffic"]["challenger"]) == ("running", 20)
    assert status["withdrawn"].startswith("recommender@4 fails too often; said by 1 pod. Taking it from all pods failed: ") and "403" in status["withdrawn"]
    cluster.forbidden = set()
    assert target().status(record)["traffic"] == {"champion": 90, "5": 10}


def test_two_who_look_at_once_write_one_revision(cluster, watched):
    from concurrent.futures import ThreadPoolExecutor

    from mlops_nb.core.settings import project

    record, say = watched
    say("4")
    place = project().folder

    def look(_):
        with in_project(place):
            return target().status(record)["traffic"]

    with ThreadPoolExecutor(4) as pool:
        seen = [each.result(timeout=300) for each in [pool.submit(look, i) for i in range(4)]]
    assert seen == [{"champion": 90, "5": 10}] * 4 and len(record_now()["history"]) == 2


# --- back, up, down, away
def test_rollback_brings_the_objects_of_before_and_goes_further_back(cluster):
    record = None
    for number in (1, 2, 3):
        record = apply(target(), number, before=record)
    record |= target().rollback(record)
    assert image(cluster).endswith(":2") and record["model"] == "recommender@2"
    record |= target().rollback(record)
    assert image(cluster).endswith(":1")
    with pytest.raises(NotFound, match="no earlier revision"):
        target().rollback(record)
    record = apply(target(), 5, before=record)
    record |= target().rollback(record)
    assert image(cluster).endswith(":1")
    history = [(one["number"], one["like"], one["by"]) for one in kubernetes.revisions(target_folder(record))]
    assert history == [(1, 1, history[0][2]), (2, 2, history[0][2]), (3, 3, history[0][2]), (4, 2, "kim"), (5, 1, "kim"), (6, 6, history[0][2]), (7, 1, "kim")]


def test_rollback_wins_over_a_change_by_hand(cluster):
    record = apply(target(), 2)
    record = apply(target(), 3, before=record)
    cluster.edit("Deployment", "recommender", ("spec", "template", "spec", "containers", '[name="server"]', "image"), "registry.example/shop/recommender:hotfix")
    target().rollback(record)
    assert image(cluster).endswith(":2")


def test_scale_up_and_down(cluster):
    record = apply(target())
    cluster.requests.clear()
    record |= target().scale(record, replicas=4)
    assert cluster.get("Deployment", "recommender")["status"]["availableReplicas"] == 4 and record["replicas"] == 4
    assert ("PATCH", "/apis/apps/v1/namespaces/shop/deployments/recommender/scale") in [(how, path) for how, path, _ in cluster.requests]
    record |= target().scale(record, replicas=1)  # our own earlier change is no conflict
    assert cluster.get("Deployment", "recommender")["status"]["replicas"] == 1
    assert target().status(record)["replicas"] == "1 of 1"


def test_an_autoscaler_takes_over_without_a_dip_and_gives_back(cluster):
    record = apply(target(), replicas=4)
    record |= target().scale(record, autoscale={"min": 3, "max": 8, "cpu": 50})
    live = cluster.get("Deployment", "recommender")
    assert live["spec"]["replicas"] == 4 and cluster.lowest["recommender"] == 4 and cluster.names("HorizontalPodAutoscaler") == ["recommender"]
    cluster.scale(("Deployment", "shop", "recommender"), 7, "kube-controller-manager")
    record = apply(target(), 4, before=record, autoscale={"min": 3, "max": 8, "cpu": 50})
    assert cluster.get("Deployment", "recommender")["spec"]["replicas"] == 7  # what the autoscaler chose stays
    record |= target().scale(record, replicas=2)
    assert cluster.get("Deployment", "recommender")["spec"]["replicas"] == 2 and not cluster.names("HorizontalPodAutoscaler")


def test_logs_name_their_pods(cluster):
    record = apply(target())
    lines = target().logs(record, 10).splitlines()
    assert [line.split(" | ")[1] for line in lines] == ["hello from registry.example/shop/recommender:3"] * 2 and {line.split(" | ")[0] for line in lines} == set(cluster.names("Pod"))


def test_delete_takes_ours_and_nothing_else(cluster):
    record = apply(target())
    other = apply(target(), name="other")
    cluster.put(("ConfigMap", "shop", "theirs"), {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "theirs"}})
    target().delete(record)
    target().delete(record)  # again is no error
    assert {one.action for one in target().plan(wanted(), {**record, "stopped_at": "2026-11-23T00:00:00Z"})} == {"keep", "create"}
    cluster.images = {":4": "crash"}
    with pytest.raises(Unavailable, match="what had been made for it was removed again"):
        apply(target(), 4)  # what was deleted does not come back by a failure
    left = {(kind, name) for kind, _, name in cluster.objects if kind not in ("Pod", "Event")}
    assert ("ConfigMap", "theirs") in left and ("Deployment", "other") in left and not [name for kind, name in left if name.startswith("recommender")]
    assert target().status(other)["state"] == "running" 


# --- the way to the cluster
def test_broken_connections_are_tried_again(cluster):
    cluster.drops = [("before", "PATCH", "deployments"), ("after", "PATCH", "deployments"), ("after", "PATCH", "services"), ("before", "GET", "deployments"), ("after", "GET", "services")]
    record = apply(target())
    assert not cluster.drops and target().status(record)["state"] == "running"


def test_a_watch_that_breaks_or_is_too_old_is_begun_anew(cluster):
    record = apply(target())
    cluster.oldest = 10**9
    record = apply(target(), 4, before=record)
    cluster.oldest = 0
    assert image(cluster).endswith(":4")
    apply(target(), 5, before=record)
    assert image(cluster).endswith(":5")


def test_expired_and_renewed_tokens(cluster, monkeypatch, tmp_path):
    file = tmp_path / "token"
    file.write_text("old-secret-token")
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig({"tokenFile": str(file)})))
    with pytest.raises(Unavailable, match=r"does not accept these credentials \(401\); log in again") as caught:
        apply(target())
    assert "old-secret" not in str(caught.value) and "old-secret" not in repr(access())
    file.write_text("good-token\n")
    record = apply(target())
    cluster.tokens = {"newer"}
    one = Cluster(access(), namespace="shop")
    cluster.tokens = {"good-token"}
    assert one.get("Deployment", "recommender")
    cluster.tokens = {"newer"}
    file.write_text("newer")
    assert one.get("Deployment", "recommender") and record  # the token was read again
    one.close()


def plug(tmp_path, body, **facts):
    program = tmp_path / "plug"
    program.write_text(f"#!{sys.executable}\n" + textwrap.dedent(body))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "./plug", "args": ["a b", "$(id)"], "env": [{"name": "WHO", "value": "kim"}], "interactiveMode": "Never", **facts}}


def test_a_credential_plug_in_is_run_without_a_shell(cluster, monkeypatch, tmp_path):
    user = plug(tmp_path, """
        import json, os, sys
        assert sys.argv[1:] == ["a b", "$(id)"] and os.environ["WHO"] == "kim" and not sys.stdin.read()
        asked = json.loads(os.environ["KUBERNETES_EXEC_INFO"])
        assert asked["spec"]["interactive"] is False
        print(json.dumps({"apiVersion": asked["apiVersion"], "kind": "ExecCredential", "status": {"token": "good-token"}}))
    """)
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(user)))
    assert apply(target())["applied"]


@pytest.mark.parametrize("body, said", [("import sys; sys.stderr.write('hunter2'); print('hunter2'); sys.exit(3)", "ended with 3; log in"), ("print('hunter2')", "gave no credentials"), ("import time; time.sleep(600)", "did not answer within")])
def test_a_credential_plug_in_that_fails(cluster, monkeypatch, tmp_path, body, said):
    from mlops_nb.deploy import cluster as module

    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(plug(tmp_path, body))))
    monkeypatch.setattr(module, "plugged", lambda way, real=module.plugged: real(way, timeout_s=1.5 if "sleep" in body else 120))
    with pytest.raises(Unavailable, match=said) as caught:
        apply(target())
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("user, said", [({"exec": {"command": "no-such-program-here"}}, "cannot be started"), ({"exec": {"command": "true", "interactiveMode": "Always"}}, "must ask a person"),
                                        ({"auth-provider": {"name": "gcp"}}, "removed from Kubernetes in 1.26"), ({"username": "kim", "password": "hunter2"}, "passwords were removed"),
                                        ({"client-certificate": "/nowhere.pem", "client-key": "/nowhere.key"}, "cannot be read"), ({"client-certificate-data": "aHVudGVyMg==", "client-key-data": "aHVudGVyMg=="}, "cannot be read; expected PEM")])
def test_credentials_that_cannot_be_used(cluster, monkeypatch, user, said):
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(user)))
    with pytest.raises((Unavailable, Invalid), match=said) as caught:
        apply(target())
    assert "hunter2" not in str(caught.value)


def test_inside_a_pod_its_own_account_is_used(cluster, monkeypatch, tmp_path):
    from mlops_nb.deploy import cluster as module

    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setattr(module, "MOUNTED", tmp_path)
    for name, text in (("token", "good-token"), ("namespace", "shop"), ("ca.crt", cluster.authority.cert_pem.bytes().decode())):
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", cluster.url.rpartition(":")[2])
    record = apply(target())
    assert record["context"] == "in-cluster" and target().status(record)["state"] == "running"


def test_a_client_certificate_opens(cluster, monkeypatch, tmp_path):
    issued = cluster.authority.issue_cert("kim")
    (tmp_path / "kim.pem").write_bytes(issued.cert_chain_pems[0].bytes())
    (tmp_path / "kim.key").write_bytes(issued.private_key_pem.bytes())
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig({"client-certificate": "kim.pem", "client-key": "kim.key"})))  # relative to the kubeconfig
    assert apply(target())["applied"]


def test_another_authority_is_not_believed(cluster, monkeypatch, tmp_path):
    import base64

    import trustme

    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(**{"certificate-authority-data": base64.b64encode(trustme.CA().cert_pem.bytes()).decode()})))
    with pytest.raises(Unavailable, match="its certificate is not the one the kubeconfig trusts"):
        apply(target())
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(**{"insecure-skip-tls-verify": True})))
    with pytest.raises(Unavailable, match="asks not to check"):
        apply(target())
    assert not cluster.requests


def test_nobody_at_home(shop, tmp_path, monkeypatch):
    with FakeKubernetes(tmp_path) as fake:
        monkeypatch.setenv("KUBECONFIG", str(fake.kubeconfig()))
    monkeypatch.setattr(Cluster, "pause_s", 0.01)
    with pytest.raises(Unavailable, match=r"cannot be reached at https://127\.0\.0\.1"):
        apply(target())


def test_kubeconfigs_are_merged_and_the_first_wins(shop, tmp_path, monkeypatch):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    context = lambda name, **more: {"name": name, "context": {"cluster": name, "user": name, **more}}
    entry = lambda name, server: {"contexts": [context(name, namespace=f"{name}-{server[-1]}")], "clusters": [{"name": name, "cluster": {"server": server}}], "users": [{"name": name, "user": {}}]}
    first.write_text(yaml.safe_dump({**entry("blue", "https://one"), "current-context": ""}))
    both = entry("green", "https://two")
    again = entry("blue", "https://three")
    second.write_text(yaml.safe_dump({"current-context": "green", **{key: both[key] + again[key] for key in both}}))
    monkeypatch.setenv("KUBECONFIG", f"{first}{os.pathsep}{tmp_path / 'missing'}{os.pathsep}{second}")
    assert access().server == "https://two" and access("blue").server == "https://one" and access("blue").namespace == "blue-e"
    with pytest.raises(NotFound, match="has no context 'grene'; did you mean green"):
        access("grene")
    second.write_text("clusters: [1, 2")
    with pytest.raises(Invalid, match="is no kubeconfig"):
        access()


# --- without a cluster
def test_without_a_kubeconfig_the_files_are_written_and_the_record_says_what_to_run(shop):
    record = apply(target(), options={"namespace": "shop"})
    assert not record["applied"] and record["context"] == ""
    first, second = record["commands"]
    assert first.startswith("kubectl create secret generic recommender-tokens --namespace shop --from-file=tokens.json=")
    assert os.path.exists(first.partition("tokens.json=")[2].partition(" --dry-run")[0].strip("'"))
    assert second.startswith("kubectl apply -k ") and os.path.exists(os.path.join(second.removeprefix("kubectl apply -k ").strip("'"), "kustomization.yaml"))
    plan = target().plan(wanted(4, options={"namespace": "shop"}), record)
    assert [one.what for one in plan if one.action == "update"] == ["ConfigMap recommender-plan", "Deployment recommender"] and plan[-1].action == "run"
    record = apply(target(), 4, before=record, options={"namespace": "shop"})
    record |= target().rollback(record)
    assert "recommender:3" in (target_folder(record) / "base/deployment.yaml").read_text()
    assert target().status(record)["state"] == "written, not applied"
    with pytest.raises(NotFound, match="only been written"):
        target().logs(record, 10)
    target().delete(record)


def test_context_none_keeps_away_from_the_cluster(cluster):
    record = apply(target(), options={"context": "none"})
    assert not record["applied"] and not cluster.requests


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kubectl_sees_what_we_made(cluster, monkeypatch):
    "The fake is believed by the real client, as far as that goes."
    record = apply(target())
    out = subprocess.run(["kubectl", "get", "--raw", f"/apis/apps/v1/namespaces/{record['namespace']}/deployments/recommender"], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout)["status"]["availableReplicas"] == 2


# --- server-side apply as the fake does it: by the documented rules
def test_the_fakes_apply_follows_the_rules(cluster):
    one = Cluster(access(), namespace="shop")
    thing = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "data": {"a": "1", "b": "2"}}
    one.apply(thing)
    one.apply({**thing, "data": {"c": "3"}}, manager="other")  # others' fields stand beside ours
    one.apply({**thing, "data": {"a": "1"}})  # what we no longer say goes
    assert cluster.get("ConfigMap", "x")["data"] == {"a": "1", "c": "3"}
    with pytest.raises(Conflict, match='conflict with "other"'):
        one.apply({**thing, "data": {"a": "1", "c": "4"}})
    one.apply({**thing, "data": {"a": "1", "c": "3"}})  # the same value is shared
    one.apply(thing, manager="other")
    assert cluster.get("ConfigMap", "x")["data"] == {"a": "1", "b": "2", "c": "3"}
    stale = {**thing, "metadata": {"name": "x", "resourceVersion": "1"}}
    with pytest.raises(Conflict, match="has been modified"):
        one.apply(stale)
    before = cluster.get("ConfigMap", "x")
    one.apply({**thing, "data": {"z": "9"}}, dry_run=True)
    assert cluster.get("ConfigMap", "x") == before
    with pytest.raises(Invalid, match="refused Deployment x"):
        one.apply({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}, "spec": {"replica": 2}})
    one.close()


# --- KServe
def serving(**more):
    return kserve.KServe(**{**QUICK, **more})


def test_kserve_runs_a_canary_promotes_it_and_goes_back(cluster, registry, monkeypatch):
    record = apply(serving(), options={"mode": "standard"})
    assert record["url"] == "http://recommender.shop.example.com" and serving().status(record)["state"] == "running"
    record |= serving().apply(wanted(3, traffic={"champion": 90, "challenger": 10}, replicas=4), record)
    spec = lambda: cluster.get("InferenceService", "recommender")["spec"]
    assert spec()["predictor"]["name"] == "v3" and [(one["predictor"]["name"], one["trafficPercent"], one["predictor"]["minReplicas"]) for one in spec()["canary"]] == [("v4", 10, 1)]
    record |= serving().traffic(record, {"challenger": 100})
    assert spec()["predictor"]["name"] == "v4" and "canary" not in spec() and record["model"] == "recommender@4"
    record |= serving().rollback(record)
    assert spec()["predictor"]["name"] == "v3" and spec()["canary"][0]["trafficPercent"] == 10
    serving().delete(record)
    assert not cluster.names("InferenceService") and not cluster.names("Pod")


def test_a_kserve_canary_that_crashes_is_taken_back(cluster, registry):
    record = apply(serving())
    cluster.images = {":4": "crash"}
    with pytest.raises(Unavailable, match="recommender does not get ready: its container ends again and again .*put back"):
        serving().apply(wanted(3, traffic={"champion": 90, "challenger": 10}), record)
    assert "canary" not in cluster.get("InferenceService", "recommender")["spec"]


def test_knative_sends_the_rest_to_what_ran_before(cluster, registry):
    options = {"mode": "knative"}
    with pytest.raises(Invalid, match="deploy recommender@3 alone first"):
        apply(serving(), options=options, traffic={"champion": 90, "challenger": 10})
    record = apply(serving(), options=options)
    record |= serving().apply(wanted(3, traffic={"champion": 90, "challenger": 10}, options=options), record)
    predictor = cluster.get("InferenceService", "recommender")["spec"]["predictor"]
    assert predictor["canaryTrafficPercent"] == 10 and predictor["containers"][0]["image"].endswith(":4")
    record |= serving().rollback(record)
    predictor = cluster.get("InferenceService", "recommender")["spec"]["predictor"]
    assert "canaryTrafficPercent" not in predictor and predictor["containers"][0]["image"].endswith(":3")


def test_kserve_scales_by_bounds(cluster):
    record = apply(serving())
    record |= serving().scale(record, autoscale={"min": 2, "max": 6, "cpu": 50})
    predictor = cluster.get("InferenceService", "recommender")["spec"]["predictor"]
    assert (predictor["minReplicas"], predictor["maxReplicas"], predictor["scaleMetric"], predictor["scaleTarget"]) == (2, 6, "cpu", 50)
    with pytest.raises(Invalid, match="take cpu, or mode = knative"):
        serving().scale(record, autoscale={"max": 6, "requests_per_s": 50})


def test_knative_has_no_folder_for_each_pod(cluster):
    record = apply(serving(), options={"predictions_claim": "shop"})
    inside = cluster.get("InferenceService", "recommender")["spec"]["predictor"]
    assert {"name": "predictions", "mountPath": "/var/mlops/predictions", "subPathExpr": "recommender/$(POD_NAME)"} in inside["containers"][0]["volumeMounts"] and record["note"] == ""
    with pytest.raises(Invalid, match="predictions_claim = 'shop' needs a folder for each pod.*mode = standard"):
        apply(serving(), options={"predictions_claim": "shop", "mode": "knative"})


def test_without_kserve_the_message_says_so(cluster):
    cluster.absent = {"InferenceService"}
    with pytest.raises(NotFound, match="does not know KServe"):
        apply(serving())


def test_a_workload_survives_its_revision():
    workload = Workload("recommender", "recommender", (Arm("champion", "3", "x:3"),), shadow=Arm("5", "5", "x:5", 20), autoscale={"max": 3}, callers=("a",))
    from dataclasses import asdict

    back = kubernetes.restored(json.loads(json.dumps(asdict(workload))))
    assert back == workload and objects(replace(back, gateway="g"))


# --- the verbs, whole: settings, registry, record, history
@pytest.fixture(scope="session")
def large(tmp_path_factory):
    "A project with three versions of a model, and the settings of a deployment on a cluster."
    import pandas as pd
    from sklearn.dummy import DummyRegressor

    from mlops_nb.model.registry import promote, register

    folder, rows = tmp_path_factory.mktemp("template") / "shop", pd.DataFrame({"pieces": [2, 30], "price": [1.5, 3.75]})
    init(str(folder), name="shop")
    with in_project(folder):
        for constant in (1, 2, 3):
            register(DummyRegressor(strategy="constant", constant=constant).fit(rows, [0, 1]), "large", example=rows)
        promote("large@1", "champion")
    with open(folder / "settings.ini", "a") as file:
        file.write("\n[deploy.large]\ntarget = kubernetes\nimage = registry.example/shop/{model}:{version}\ngateway = edge/public\nhostname = shop.example\nnamespace = shop\n")
    return folder


def settings_know_kubernetes():
    from mlops_nb.core.settings import DeploySection

    return "image" in DeploySection.model_fields


@pytest.mark.skipif(not settings_know_kubernetes(), reason="[deploy.NAME] has no image yet")
def test_the_verbs_of_a_deployment(large, tmp_path, cluster, monkeypatch):
    from mlops_nb.deploy.deployments import deploy, deployment, deployments, undeploy

    shutil.copytree(large, tmp_path / "copy")
    monkeypatch.setattr(kubernetes.TARGET, "look_s", 1)
    monkeypatch.setattr(kubernetes.TARGET, "patience_s", 0.2)
    with in_project(tmp_path / "copy"):
        report = deploy("large@champion", dry_run=True)
        assert "nothing has been touched" in report.facts["summary"] and not cluster.names("Deployment")
        deploy("large@champion", why="first")
        assert "nothing to change" in deploy("large@champion").summary
        one = deployment("large").traffic({"champion": 90, "3": 10}, why="try 3")
        assert cluster.names("Deployment") == ["large-v1", "large-v3"] and one.url == "https://shop.example"
        cluster.images = {":2": "crash"}
        with pytest.raises(Unavailable, match="large-v2 does not get ready.*keeps answering"):
            deploy("large@2", why="worse")
        assert cluster.names("Deployment") == ["large-v1", "large-v3"]
        one = one.rollback(why="enough")
        assert cluster.names("Deployment") == ["large-v1"] and one.status()["state"] == "running"
        one.scale(3)
        assert cluster.get("Deployment", "large-v1")["spec"]["replicas"] == 3 and "hello from" in one.logs(5)
        assert [entry["why"] for entry in one.history][:2] == ["first", "try 3"] and all(entry["by"] for entry in one.history)
        undeploy("large")
        assert not cluster.names("Deployment") and not cluster.names("Pod") and "stopped" in str(deployments().facts)
