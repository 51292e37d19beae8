"""Pods as real server processes, with the environment and the mounts that the manifests give them: a canary that one pod withdraws, and the predictions that all of them write down.

The cluster is `fake_kubernetes`; here we play the kubelet: volumes are folders, a ConfigMap is swapped through its link `..data`, the log is what the process writes."""

import base64
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from fake_kubernetes import FakeKubernetes
from test_image import Container

from mlops_nb.core.settings import in_project, init
from mlops_nb.deploy import kubernetes
from mlops_nb.deploy.cluster import Cluster
from mlops_nb.deploy.deployments import deploy, deployment, undeploy
from mlops_nb.deploy.tokens import token_of
from mlops_nb.serve.plan_copy import SAID

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the workers of an image are forked")
SECTION = """
[deploy.shop]
target = kubernetes
image = registry.example/shop/all:1
namespace = shop
predictions_claim = shop-predictions
canary_latency_ratio = 50
"""


def until(happened, *, patience_s=300):
    "What `happened` gives once it gives something."
    latest = time.monotonic() + patience_s
    while time.monotonic() < latest:
        if found := happened():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A project with two versions of a model that say different things, and a bundle of each."
    import pandas as pd
    from sklearn.dummy import DummyRegressor

    from mlops_nb.model.registry import promote, register
    from mlops_nb.serve.bundle import write_bundle

    folder, rows = tmp_path_factory.mktemp("made"), pd.DataFrame({"pieces": [2, 30], "price": [1.5, 3.75]})
    init(str(folder / "project"), name="shop")
    with in_project(folder / "project"):
        for constant in (1, 2):
            model = register(DummyRegressor(strategy="constant", constant=constant).fit(rows, [0, 1]), "shop", example=rows)
            write_bundle(model, folder / "models" / f"shop-{constant}")
        promote("shop@1", "champion")
    with open(folder / "project" / "settings.ini", "a") as file:
        file.write(SECTION)
    return folder


@pytest.fixture
def cluster(made, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("MLOPS_", "KUBE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLOPS_HOME", str(tmp_path / "home"))
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    with in_project(tmp_path / "project"), FakeKubernetes(tmp_path) as fake:
        monkeypatch.setenv("KUBECONFIG", str(fake.kubeconfig()))
        monkeypatch.setattr(Cluster, "pause_s", 0.01)
        monkeypatch.setattr(kubernetes.TARGET, "look_s", 1)
        yield fake


class Pod:
    "One pod of the cluster, run here."

    def __init__(self, fake: FakeKubernetes, name: str, folder: Path):
        self.fake, self.name, self.folder = fake, name, folder / name
        spec = fake.get("Pod", name)["spec"]
        server = spec["containers"][0]
        known = {"metadata.name": name}
        environ = {one["name"]: one["value"] if "value" in one else known[one["valueFrom"]["fieldRef"]["fieldPath"]] for one in server["env"]}
        volumes = {one["name"]: one for one in spec["volumes"]}
        self.folder.mkdir()
        for mount in server["volumeMounts"]:
            self.mount(mount, volumes[mount["name"]], folder / "volumes", environ)
        here = {key: str(self.folder) + value if value.startswith(("/etc/", "/var/")) else value for key, value in environ.items() if key != "HOME"}
        self.running = Container(folder / f"{name}.log", MLOPS_MODELS=str(folder.parent / "models"), HOSTNAME=name, TMPDIR=str(self.folder / "tmp"), **here)
        self.door = {"Authorization": f"Bearer {token_of('shop')}"}

    def mount(self, mount: dict, volume: dict, volumes: Path, environ: dict) -> None:
        place = self.folder / mount["mountPath"].lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if "configMap" in volume:
            self.config = volume["configMap"]["name"], place
            place.mkdir()
            self.swap()
        elif "secret" in volume:
            place.mkdir()
            for key, value in self.fake.get("Secret", volume["secret"]["secretName"])["data"].items():
                (place / key).write_bytes(base64.b64decode(value))
                (place / key).chmod(0o400)  # ours; the kubelet's is root's and readable for the pod's group
        elif "persistentVolumeClaim" in volume:
            path = mount["subPathExpr"]
            for key, value in environ.items():
                path = path.replace(f"$({key})", value)
            (kept := volumes / volume["persistentVolumeClaim"]["claimName"] / path).mkdir(parents=True)
            place.symlink_to(kept)
        else:
            place.mkdir()

    def swap(self) -> None:
        "Bring the ConfigMap as the cluster has it now, as the kubelet does: all files at once, and nobody else writes there."
        name, place = self.config
        new = place / f"..{len(list(place.iterdir()))}-{time.monotonic_ns()}"
        new.mkdir()
        for key, text in self.fake.get("ConfigMap", name)["data"].items():
            (new / key).write_text(text)
            (new / key).chmod(0o444)
            if not (place / key).is_symlink():
                (place / key).symlink_to(f"..data/{key}")
        (place / "..turning").symlink_to(new.name)
        os.replace(place / "..turning", place / "..data")

    def traffic(self) -> dict:
        return self.running.client.get("/version", headers=self.door).json()["models"][0]["traffic"]

    def ask(self) -> dict:
        return self.running.client.post("/predict", json=[{"pieces": 3, "price": 2.0}], headers=self.door).raise_for_status().json()

    def say(self) -> None:
        "Let the cluster have this pod's log."
        self.fake.logs[self.name] = Path(self.running.log).read_text()


@pytest.fixture
def pods(cluster, tmp_path):
    "The pods of a deployment that gives a fifth of the requests to version 2."
    deploy("shop@champion", traffic={"champion": 80, "2": 20}, replicas=2, why="try 2")
    (tmp_path / "pods").mkdir()
    running = []
    try:
        for name in cluster.names("Pod"):
            running.append(Pod(cluster, name, tmp_path / "pods"))
    except BaseException:
        for one in running:
            one.running.stop()
        raise
    yield running
    for one in running:
        one.running.__exit__()


def deployed_plan(fake):
    return json.loads(fake.get("ConfigMap", "shop-plan")["data"]["plan.json"])["models"][0]


SHARED, ALONE = {"1": 80, "2": 20}, {"1": 100}


def test_what_one_pod_withdraws_is_withdrawn_for_all(cluster, pods):
    from mlops_nb.monitor.alerts import recent

    first, second = pods
    assert deployed_plan(cluster)["traffic"] == SHARED and deployed_plan(cluster)["canary"]["latency_ratio"] == 50
    assert first.traffic() == second.traffic() == SHARED
    for one in pods:
        one.say()
    assert deployment("shop").status()["traffic"] == {"champion": 80, "2": 20} and not recent()

    def withdrawn() -> bool:
        for _ in range(50):
            first.ask()
        return first.traffic() == ALONE

    until(withdrawn)  # at once, and by itself: nobody was asked
    assert {first.ask()["model"] for _ in range(20)} == {"shop@1"} and second.traffic() == SHARED and deployed_plan(cluster)["traffic"] == SHARED
    until(lambda: SAID.search(Path(first.running.log).read_text()))
    first.say()
    status, generation = deployment("shop").status(), cluster.get("Deployment", "shop")["metadata"]["generation"]
    assert status["traffic"] == {"champion": 100} and "shop@2 predicts something else than 1" in status["withdrawn"] and "said by 1 pod" in status["withdrawn"]
    assert deployed_plan(cluster)["traffic"] == ALONE and generation == cluster.get("Deployment", "shop")["metadata"]["generation"], "no pod is restarted for it"
    last = deployment("shop").history[-1]
    assert (last["by"], last["traffic"], last["why"]) == ("canary", {"champion": 100}, status["withdrawn"])
    assert kubernetes.revisions(kubernetes.artifacts_of("shop", "kubernetes"))[-1]["by"] == "canary"
    assert [one["subject"] for one in recent()] == ["shop"] and "a canary of shop was withdrawn" in recent()[0]["message"]
    for one in pods:
        one.swap()
    until(lambda: second.traffic() == ALONE)
    assert deployment("shop").status()["revision"] == status["revision"] and len(recent()) == 1, "what pods said about the plan before counts no more"
    deployment("shop").traffic({"champion": 80, "2": 20}, why="once more")  # whoever insists is heard: the cluster's word is the newer one
    for one in pods:
        one.swap()
    until(lambda: first.traffic() == second.traffic() == SHARED)
    undeploy("shop")


def test_each_pod_writes_its_predictions_and_all_are_read(cluster, pods, tmp_path):
    from mlops_nb.monitor.predictions import predictions_of

    deployment("shop").traffic({"champion": 100}, why="alone").shadow("2", why="what would it say?")
    for one in pods:
        one.swap()
    for one in pods:
        until(lambda one=one: one.running.client.get("/version", headers=one.door).json()["models"][0]["shadow"] == "2")
        for _ in range(5):
            one.ask()
    mounted = tmp_path / "project" / ".mlops" / "predictions"
    mounted.symlink_to(tmp_path / "pods" / "volumes" / "shop-predictions")
    until(lambda: [len(predictions_of(name).read()) for name in ("shop", "shop.shadow")] == [10, 10])
    assert sorted(one.name for one in (mounted / "shop").iterdir()) == sorted(one.name for one in pods)
    assert [set(predictions_of(name).read()["model"]) for name in ("shop", "shop.shadow")] == [{"shop@1"}, {"shop@2"}]
    assert predictions_of("shop").read(until="2011-01-01").empty and len(predictions_of("shop").days()) in (1, 2)
