"""What a cluster is told: every object taken by the API's own schemas, in several versions, and the same objects from Kustomize and from the chart."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fake_kubernetes
import pytest
import yaml

from mlops_nb.core.errors import Invalid
from mlops_nb.deploy import kserve
from mlops_nb.deploy.manifests import Arm, Workload, chart, image_of, in_yaml, kustomize, label_of, objects, weights, write_manifests

ENVIRONMENT = Path(__file__).parent.parent / ".venv" / "kserve"
DIGEST = "@sha256:" + "ab" * 32
ONE = (Arm("champion", "3", "registry.example/shop/recommender:3"),)
TWO = (Arm("champion", "3", "registry.example/shop/recommender:3", 90), Arm("challenger", "4", "registry.example/shop/recommender:4", 10))
PLAN = json.dumps({"models": [{"model": "recommender", "traffic": {"3": 100}}]}) + "\n"
NASTY = json.dumps({"models": [{"model": "r", "key": "{{ .Values.x }} }} 'it''s' ‹x› ñ: - # *"}]}) + "\n"
WORKLOADS = {
    "plain": Workload("recommender", "recommender", ONE, plan=PLAN),
    "one replica": Workload("recommender", "recommender", ONE, plan=PLAN, replicas=1, workers=4, cpu=4.0, memory_gb=0.25),
    "autoscaled": Workload("recommender", "recommender", ONE, plan=PLAN, autoscale={"min": 2, "max": 9, "cpu": 55}),
    "by requests": Workload("recommender", "recommender", ONE, plan=PLAN, autoscale={"max": 9, "requests_per_s": 12.5}),
    "gateway": Workload("recommender", "recommender", TWO, gateway="edge/public", hostname="shop.example", callers=("reports", "edge")),
    "gateway, no namespace": Workload("recommender", "recommender", TWO, gateway="public", autoscale={"max": 3}),
    "shadow": Workload("recommender", "recommender", ONE, shadow=Arm("5", "5", "registry.example/shop/recommender:5", 20), gateway="edge/public"),
    "whole shadow": Workload("recommender", "recommender", ONE, shadow=Arm("5", "5", "registry.example/shop/recommender:5", 100), gateway="edge/public"),
    "half percents": Workload("recommender", "recommender", (replace(TWO[0], percent=99.5), replace(TWO[1], percent=0.5)), gateway="edge/public"),
    "digest and port": Workload("recommender", "recommender", (Arm("3", "3", f"registry.example:5000/recommender{DIGEST}"),), plan=PLAN, namespace="shop"),
    "predictions": Workload("recommender", "recommender", ONE, plan=PLAN, predictions="shop-predictions"),
    "predictions of a shadow": Workload("recommender", "recommender", TWO, shadow=Arm("5", "5", "registry.example/shop/recommender:5", 20), gateway="edge/public", predictions="shop-predictions"),
    "own secret": Workload("recommender", "recommender", ONE, plan=PLAN, secret="shop-tokens"),
    "longest name": Workload(label_of("x" * 99), "recommender", ONE, plan=PLAN),
    "nasty": Workload(label_of("Shop_EU.2"), "recommender", ONE, plan=NASTY),
}
KSERVE = {
    "predictions": Workload("recommender", "recommender", TWO, mode="standard", predictions="shop-predictions"),
    "alone": Workload("recommender", "recommender", ONE, mode="standard"), "canary": Workload("recommender", "recommender", TWO, mode="standard", replicas=4),
    "scaled": Workload("recommender", "recommender", TWO, mode="standard", autoscale={"min": 2, "max": 8, "cpu": 60}), "knative": Workload("recommender", "recommender", TWO, mode="knative"),
    "knative rps": Workload("recommender", "recommender", ONE, mode="knative", autoscale={"min": 1, "max": 8, "requests_per_s": 40}), "knative cpu": Workload("recommender", "recommender", ONE, mode="knative", autoscale={"max": 8, "cpu": 50}),
    "three": Workload("recommender", "recommender", (*TWO, Arm("dark", "5", "registry.example/shop/recommender:5", 0)), mode="standard")}


def identity(thing):
    return thing["kind"], thing["metadata"]["name"]


@pytest.mark.parametrize("version", ["1.30", "1.32", "1.35", "1.37"])
@pytest.mark.parametrize("which", WORKLOADS)
def test_the_cluster_takes_every_object(which, version):
    for thing in objects(WORKLOADS[which]):
        assert fake_kubernetes.problem(thing, version) == "", identity(thing)


@pytest.mark.parametrize("which", KSERVE)
def test_kserve_takes_its_object(which):
    for thing in kserve.objects(KSERVE[which]):
        assert fake_kubernetes.problem(thing) == "", json.dumps(thing)


def test_the_schemas_refuse_what_is_wrong():
    "The checks above mean something only if these fail."
    thing = lambda kind, which="gateway": next(one for one in json.loads(json.dumps(objects(WORKLOADS[which]))) if one["kind"] == kind)
    wrong = []
    for kind, break_it in (("Deployment", lambda one: one["spec"].update(replica=2)), ("Deployment", lambda one: one["spec"].update(replicas="2")), ("Deployment", lambda one: one["spec"]["template"]["spec"]["volumes"].clear()),
                           ("Deployment", lambda one: one["spec"]["template"]["metadata"]["labels"].clear()), ("Service", lambda one: one["spec"]["ports"][0].update(port="http")),
                           ("HTTPRoute", lambda one: one["spec"]["rules"][0]["backendRefs"][0].update(weight=0.5)), ("HTTPRoute", lambda one: one["spec"].update(hostname="x")), ("NetworkPolicy", lambda one: one["spec"].update(policyTypes="Ingress"))):
        one = thing(kind)
        break_it(one)
        wrong.append(fake_kubernetes.problem(one))
    service = json.loads(json.dumps(kserve.service(KSERVE["canary"])))
    for break_it in (lambda one: one["spec"]["canary"][0].update(trafficPercent=10.5), lambda one: one["spec"]["canary"][0]["predictor"].update(maxReplicas=3), lambda one: one["spec"]["predictor"].update(replicas=3),
                     lambda one: one["metadata"]["annotations"].clear(), lambda one: one["spec"]["canary"][0]["predictor"].update(name="v3")):
        one = json.loads(json.dumps(service))
        break_it(one)
        wrong.append(fake_kubernetes.problem(one))
    assert all(wrong), wrong


@pytest.mark.parametrize("which", WORKLOADS)
def test_a_pod_is_nobody_and_keeps_to_itself(which):
    for thing in (one for one in objects(WORKLOADS[which]) if one["kind"] == "Deployment"):
        pod = thing["spec"]["template"]["spec"]
        server = pod["containers"][0]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001 and pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert server["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        assert pod["automountServiceAccountToken"] is False and thing["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
        writable = [one["mountPath"] for one in server["volumeMounts"] if not one.get("readOnly")]
        assert writable[0] == "/tmp" and (len(writable) == 1 or WORKLOADS[which].predictions) and server["resources"]["limits"]["memory"] == server["resources"]["requests"]["memory"]
        # the pod lives longer than: being forgotten, then the drain
        assert pod["terminationGracePeriodSeconds"] > server["lifecycle"]["preStop"]["sleep"]["seconds"] + WORKLOADS[which].drain_s
        assert {server[key]["httpGet"]["path"] for key in ("startupProbe", "readinessProbe", "livenessProbe")} == {"/v2/health/ready", "/v2/health/live"}


def test_every_pod_has_a_folder_of_its_own_for_its_predictions_and_a_shadow_another():
    "Two mounts of one volume, by the pod's name; behind a Gateway a shadow is a pod like the others, and its answers must not pass for theirs."
    mounted = lambda which: [(thing["metadata"]["name"], [(one["mountPath"], one["subPathExpr"]) for one in server["volumeMounts"] if one["name"] == "predictions"])
                             for thing in objects(WORKLOADS[which]) if thing["kind"] == "Deployment" for server in thing["spec"]["template"]["spec"]["containers"]]
    assert mounted("predictions") == [("recommender", [("/var/mlops/predictions", "recommender/$(POD_NAME)"), ("/var/mlops/predictions.shadow", "recommender.shadow/$(POD_NAME)")])]
    assert mounted("predictions of a shadow") == [(f"recommender-v{version}", [("/var/mlops/predictions", f"{folder}/$(POD_NAME)")]) for version, folder in ((3, "recommender"), (4, "recommender"), (5, "recommender.shadow"))]
    server = next(one for one in objects(WORKLOADS["predictions"]) if one["kind"] == "Deployment")["spec"]["template"]["spec"]
    assert {"name": "MLOPS_PREDICTIONS", "value": "/var/mlops/predictions"} in (env := server["containers"][0]["env"]) and {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}} in env
    assert {"name": "predictions", "persistentVolumeClaim": {"claimName": "shop-predictions"}} in server["volumes"] and mounted("plain") == [("recommender", [])]


def test_no_token_is_in_any_file(tmp_path):
    "Only the name of the Secret is."
    write_manifests(WORKLOADS["plain"], tmp_path)
    text = "".join(path.read_text() for path in tmp_path.rglob("*.yaml"))
    assert "secretName: recommender-tokens" in text and "kind: Secret" not in text


@pytest.mark.parametrize("which", WORKLOADS)
def test_the_same_facts_give_the_same_files(which, tmp_path):
    first = {path.relative_to(tmp_path): path.read_bytes() for path in write_manifests(WORKLOADS[which], tmp_path)}
    assert {path.relative_to(tmp_path): path.read_bytes() for path in write_manifests(WORKLOADS[which], tmp_path)} == first
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*.yaml")} == set(first)
    for path, text in first.items():
        if path.parts[0] == "base" and path.name != "kustomization.yaml":
            assert in_yaml(yaml.safe_load(text)).encode() == text


def test_files_of_an_earlier_set_go_away(tmp_path):
    write_manifests(WORKLOADS["autoscaled"], tmp_path)
    assert (tmp_path / "base/horizontalpodautoscaler.yaml").exists()
    write_manifests(WORKLOADS["plain"], tmp_path)
    assert not list(tmp_path.rglob("*horizontalpodautoscaler*"))


def test_pods_change_when_they_must_and_only_then():
    template = lambda workload: next(one for one in objects(workload) if one["kind"] == "Deployment")["spec"]["template"]
    plain = WORKLOADS["plain"]
    same = [replace(plain, replicas=7), replace(plain, plan=NASTY), replace(plain, callers=("reports",)), replace(plain, autoscale={"max": 5})]
    other = [replace(plain, cpu=2.0), replace(plain, workers=2), replace(plain, secret="mine"), replace(plain, predictions="shop"), replace(plain, arms=(Arm("champion", "4", "registry.example/shop/recommender:4"),))]
    assert all(template(one) == template(plain) for one in same)
    marks = [template(one)["metadata"]["labels"]["mlops-nb/template"] for one in (plain, *other)]
    assert len(set(marks)) == len(marks)


def filled(text, values):
    "Helm's rendering, as far as our templates go; an expression it does not know fails."
    def value(found):
        path, _, quoted = found[1].partition(" | ")
        if path == '"{{"':
            return "{{"
        one = values
        for step in path.removeprefix(".Values.").split("."):
            one = one[step]
        assert quoted in ("", "quote")
        return json.dumps(one) if quoted else str(one)

    return re.sub(r"\{\{ (.*?) \}\}", value, text)


@pytest.mark.parametrize("which", WORKLOADS)
def test_the_chart_with_its_own_values_is_the_base(which):
    every = objects(WORKLOADS[which])
    texts = chart(WORKLOADS[which], every)
    values, about = yaml.safe_load(texts.pop("chart/values.yaml")), yaml.safe_load(texts.pop("chart/Chart.yaml"))
    assert about["apiVersion"] == "v2" and re.fullmatch(r"[a-z0-9-]+", about["name"])
    assert {identity(one): one for one in (yaml.safe_load(filled(text, values)) for text in texts.values())} == {identity(one): one for one in every}
    if any(one["kind"] == "Deployment" for one in every):
        assert values["images"] and values["cpu"] and values["memory"]


@pytest.mark.skipif(not shutil.which("helm"), reason="helm is not installed")
@pytest.mark.parametrize("which", WORKLOADS)
def test_helm_renders_the_chart(which, tmp_path):
    write_manifests(WORKLOADS[which], tmp_path)
    out = subprocess.run(["helm", "template", "x", str(tmp_path / "chart")], capture_output=True, text=True, check=True).stdout
    assert {identity(one): one for one in yaml.safe_load_all(out) if one} == {identity(one): one for one in objects(WORKLOADS[which])}


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
@pytest.mark.parametrize("which", WORKLOADS)
def test_kustomize_builds_the_overlay(which, tmp_path):
    workload = WORKLOADS[which]
    write_manifests(workload, tmp_path)
    out = subprocess.run(["kubectl", "kustomize", str(tmp_path / "overlays/production")], capture_output=True, text=True, check=True).stdout
    built = {identity(one): one for one in yaml.safe_load_all(out)}
    for thing in objects(workload):
        one = built.pop(identity(thing))
        assert one["metadata"].pop("namespace") == workload.namespace
        assert one == thing
    assert not built


@pytest.mark.parametrize("which", WORKLOADS)
def test_the_overlay_names_what_the_base_holds(which):
    workload, every = WORKLOADS[which], objects(WORKLOADS[which])
    texts = kustomize(workload, every)
    base, overlay = yaml.safe_load(texts["base/kustomization.yaml"]), yaml.safe_load(texts["overlays/production/kustomization.yaml"])
    assert {f"base/{name}" for name in base["resources"]} == {name for name in texts if name.startswith("base/")} - {"base/kustomization.yaml"}
    held = {one["metadata"]["name"] for one in every if one["kind"] == "Deployment"}
    assert {one["name"] for one in overlay.get("replicas", ())} <= held and overlay["namespace"] == workload.namespace
    images = {one["spec"]["template"]["spec"]["containers"][0]["image"].partition("@")[0].rpartition(":")[0] if "@" not in one["spec"]["template"]["spec"]["containers"][0]["image"]
              else one["spec"]["template"]["spec"]["containers"][0]["image"].partition("@")[0] for one in every if one["kind"] == "Deployment"}
    assert {one["name"] for one in overlay.get("images", ())} <= images


@pytest.mark.parametrize("name", ["recommender", "Shop_EU", "shop-eu", "3rd", "x" * 99, "a.b", "A", "-", "_", "ünïcode"])
def test_names_become_labels_and_stay_apart(name):
    label = label_of(name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", label) and len(label) <= 40
    others = ["Shop-EU", "shop_eu", "x" * 98, "a-b", "3RD"]
    assert label not in {label_of(one) for one in others if one != name}


@pytest.mark.parametrize("image", ["", "registry.example/x", "registry.example/x:latest", "registry.example/X:3", "a b:3", "x:3@sha256:12", "registry.example/x:"])
def test_an_image_must_be_pinned(image):
    with pytest.raises(Invalid, match=r"\[deploy\.shop\] image.*expected"):
        image_of(image, model="recommender", version="3", deployment="shop")


def test_weights_keep_the_proportion():
    for percents in itertools.chain([(90, 10), (100,), (99.5, 0.5), (0, 100), (33.34, 33.33, 33.33)]):
        made = weights(percents)
        assert all(isinstance(one, int) for one in made)
        assert [one / sum(made) for one in made] == pytest.approx([one / sum(percents) for one in percents])


# --- KServe's own models, in an environment of their own: `python tests/test_manifests.py --install`
ASK = """
import json, sys
from kserve import models
from kubernetes import client

def unknown(value, kind, path):
    kind = kind.replace("List[", "list[").replace("Dict[", "dict(")
    if kind.startswith("list["):
        return [one for i, item in enumerate(value) for one in unknown(item, kind[5:-1], f"{path}[{i}]")]
    if kind.startswith("dict("):
        return [] if isinstance(value, dict) else [f"{path} is {value!r}"]
    if kind in ("str", "int", "bool", "object", "ResourceQuantity", "float"):
        want = {"str": str, "int": int, "bool": bool, "float": (int, float)}.get(kind, object)
        return [] if isinstance(value, want) and not (kind == "int" and isinstance(value, bool)) else [f"{path} is {value!r}, expected {kind}"]
    kind = kind.replace("K8sIoApiAppsV1", "V1").replace("K8sIoApiCoreV1", "V1")
    model = getattr(models, kind, None) or getattr(client, kind, None)
    if model is None:
        return [f"{path} has the type {kind}, which nobody knows"] if kind not in ("IntOrString", "date", "datetime") else []
    if hasattr(model, "openapi_types"):
        names = {outside: model.openapi_types[inside] for inside, outside in model.attribute_map.items()}
        if not isinstance(value, dict):
            return [f"{path} is {value!r}"]
        return [one for key, item in value.items() for one in (unknown(item, names[key], f"{path}.{key}") if key in names else [f"{path}.{key} is unknown"])]
    return [f"{path} is of {kind}, which has no fields"]

asked = json.load(sys.stdin)
fields = models.V1beta1PredictorSpec
pod = set(client.V1PodSpec.attribute_map.values())
print(json.dumps({"unknown": [one for thing in asked for one in unknown(thing, "V1beta1InferenceService", "")], "predictor": sorted(set(fields.attribute_map.values()) - pod),
                  "service": sorted(models.V1beta1InferenceServiceSpec.attribute_map.values())}))
"""


@pytest.mark.skipif(not (ENVIRONMENT / "bin" / "python").exists(), reason="python tests/test_manifests.py --install makes KServe's environment")
def test_kserves_own_models_know_every_field():
    things = [kserve.service(one) for one in KSERVE.values()]
    done = subprocess.run([str(ENVIRONMENT / "bin" / "python"), "-c", ASK], input=json.dumps(things), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["unknown"] == []
    assert set(told["predictor"]) <= set(fake_kubernetes.PREDICTOR) and set(told["service"]) == fake_kubernetes.SERVICE
    broken = kserve.service(KSERVE["canary"])
    broken["spec"]["canary"][0]["percent"] = 3
    done = subprocess.run([str(ENVIRONMENT / "bin" / "python"), "-c", ASK], input=json.dumps([broken]), capture_output=True, text=True)
    assert "percent is unknown" in done.stdout


if __name__ == "__main__" and "--install" in sys.argv:
    uv = [shutil.which("uv") or str(Path(sys.executable).with_name("uv"))]
    subprocess.run([*uv, "venv", "-q", "--python", sys.executable, str(ENVIRONMENT)], check=True)
    subprocess.run([*uv, "pip", "install", "-q", "--python", str(ENVIRONMENT / "bin" / "python"), "kserve==0.21.0"], check=True)
