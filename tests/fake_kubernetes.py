"""A Kubernetes API server for tests: HTTPS, server-side apply with field managers, controllers that roll out, get stuck or fail, watches, and everything that goes wrong.

Bodies are checked against the API's own schemas (kubernetes-validate, strict), HTTPRoutes against the Gateway API's fields (v1, standard channel with GEP-3171), InferenceServices against
the fields of KServe 0.21 and its webhook's rules; `test_manifests.py` holds those tables against the `kserve` package when it is there.
"""

import base64
import contextlib
import copy
import functools
import hashlib
import json
import re
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import jsonschema
import kubernetes_validate
import trustme
import yaml
from kubernetes_validate import utils

utils.schema_contents = functools.cache(utils.schema_contents)  # megabytes, read anew for every object otherwise
KINDS = {("api/v1", "pods"): "Pod", ("api/v1", "events"): "Event", ("api/v1", "services"): "Service", ("api/v1", "serviceaccounts"): "ServiceAccount", ("api/v1", "configmaps"): "ConfigMap",
         ("api/v1", "secrets"): "Secret", ("apis/apps/v1", "deployments"): "Deployment", ("apis/networking.k8s.io/v1", "networkpolicies"): "NetworkPolicy",
         ("apis/autoscaling/v2", "horizontalpodautoscalers"): "HorizontalPodAutoscaler", ("apis/policy/v1", "poddisruptionbudgets"): "PodDisruptionBudget",
         ("apis/gateway.networking.k8s.io/v1", "httproutes"): "HTTPRoute", ("apis/serving.kserve.io/v1beta1", "inferenceservices"): "InferenceService"}
LABEL = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
DNS = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


# --- what a body may say ----------------------------------------------------------------------------------------------------------------------------------------------
def strict(required=(), **fields):
    return {"type": "object", "properties": fields, "additionalProperties": False, "required": list(required)}


def many(items, most=16, least=0):
    return {"type": "array", "items": items, "maxItems": most, "minItems": least}


NAME, HOST = {"type": "string", "minLength": 1, "maxLength": 253}, {"type": "string", "maxLength": 253, "pattern": r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"}
NAMESPACE, PORT = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}, {"type": "integer", "minimum": 1, "maximum": 65535}
BACKEND = {"group": {"type": "string"}, "kind": {"type": "string"}, "name": NAME, "namespace": NAMESPACE, "port": PORT}
FRACTION = strict(["numerator"], numerator={"type": "integer", "minimum": 0}, denominator={"type": "integer", "minimum": 1})
MIRROR = {**strict(["backendRef"], backendRef=strict(["name"], **BACKEND), percent={"type": "integer", "minimum": 0, "maximum": 100}, fraction=FRACTION), "not": {"required": ["percent", "fraction"]}}
FILTER = strict(["type"], type={"enum": ["RequestMirror"]}, requestMirror=MIRROR)
MATCH = strict(path=strict(type={"enum": ["Exact", "PathPrefix", "RegularExpression"]}, value={"type": "string", "maxLength": 1024}))
RULE = strict(matches=many(MATCH, 64), filters=many(FILTER), backendRefs=many(strict(["name"], weight={"type": "integer", "minimum": 0, "maximum": 1000000}, filters=many(FILTER), **BACKEND)))
HTTPROUTE = strict(["apiVersion", "kind", "metadata", "spec"], apiVersion={"const": "gateway.networking.k8s.io/v1"}, kind={"const": "HTTPRoute"}, metadata={"type": "object"}, status={"type": "object"},
                   spec=strict(parentRefs=many(strict(["name"], **BACKEND, sectionName=NAME), 32), hostnames=many(HOST), rules=many(RULE, 16, 1)))
# KServe 0.21, kserve.models.V1beta1PredictorSpec: what it has beside a pod's fields; None where we use nothing of it
PREDICTOR = {"annotations": dict, "autoScaling": None, "batcher": None, "canaryTrafficPercent": int, "containerConcurrency": int, "deploymentStrategy": dict, "huggingface": None, "labels": dict, "lightgbm": None,
             "logger": None, "maxReplicas": int, "minReplicas": int, "model": None, "name": str, "onnx": None, "paddle": None, "pmml": None, "pytorch": None, "scaleMetric": str, "scaleMetricType": str,
             "scaleTarget": int, "sklearn": None, "storageContainerName": str, "storageUris": None, "tensorflow": None, "timeout": int, "triton": None, "workerSpec": None, "xgboost": None}
SERVICE = {"canary", "explainer", "predictor", "tracing", "transformer"}


def problem(thing, version="1.37"):
    """What the API server would say against an object; nothing when it takes it."""
    kind = thing.get("kind")
    try:
        if kind == "HTTPRoute":
            jsonschema.validate(thing, HTTPROUTE)
        elif kind == "InferenceService":
            return kserve_problem(thing, version)
        else:
            kubernetes_validate.validate(thing, version, strict=True)
    except jsonschema.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message[:200]}"
    return rule_problem(thing)


def rule_problem(thing):
    """The rules that a schema does not say."""
    name, spec = thing["metadata"]["name"], thing.get("spec", {})
    if not DNS.fullmatch(name) or len(name) > 63:
        return f"metadata.name: Invalid value: {name!r}: a DNS-1035 label"
    for key, value in thing["metadata"].get("labels", {}).items():
        if len(value) > 63 or not LABEL.fullmatch(value) or not re.fullmatch(r"([a-z0-9.-]+/)?[\w.-]{1,63}", key):
            return f"metadata.labels: Invalid value: {key}={value!r}"
    if thing["kind"] == "Deployment":
        labels, inside = spec["template"]["metadata"]["labels"], spec["template"]["spec"]
        if not set(spec["selector"]["matchLabels"].items()) <= set(labels.items()):
            return "spec.template.metadata.labels: Invalid value: `selector` does not match template `labels`"
        volumes = {one["name"] for one in inside.get("volumes", ())}
        for one in inside["containers"]:
            if missing := {mount["name"] for mount in one.get("volumeMounts", ())} - volumes:
                return f"spec.template.spec.containers[0].volumeMounts: Not found: {missing}"
            ports = {port["name"] for port in one.get("ports", ())}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                port = one.get(probe, {}).get("httpGet", {}).get("port", "http")
                if isinstance(port, str) and port not in ports:
                    return f"{probe}: no port is called {port}"
            if one.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0) >= inside.get("terminationGracePeriodSeconds", 30):
                return "lifecycle.preStop.sleep.seconds: must be less than terminationGracePeriodSeconds"
    if thing["kind"] == "HorizontalPodAutoscaler" and spec.get("minReplicas", 1) > spec["maxReplicas"]:
        return "spec.maxReplicas: Invalid value: must be greater than or equal to `minReplicas`"
    return ""


def kserve_problem(thing, version="1.37"):
    """An InferenceService against KServe's fields, the pod's schema and the webhook's rules (kserve 0.20: canaries)."""
    spec, mode = thing["spec"], thing["metadata"].get("annotations", {}).get("serving.kserve.io/deploymentMode")
    if set(thing) - {"apiVersion", "kind", "metadata", "spec", "status"} or set(spec) - SERVICE or thing["apiVersion"] != "serving.kserve.io/v1beta1":
        return f"unknown field among {sorted(set(thing) | set(spec))}"
    canaries = spec.get("canary", [])
    for one in canaries:
        if set(one) != {"trafficPercent", "predictor"} or type(one["trafficPercent"]) is not int or not 0 <= one["trafficPercent"] <= 100 or not one["predictor"].get("name"):
            return f"spec.canary: {one.get('trafficPercent')!r}, name {one.get('predictor', {}).get('name')!r}"
        if clash := set(one["predictor"]) & {"maxReplicas", "scaleMetric", "scaleTarget", "scaleMetricType", "autoScaling", "canaryTrafficPercent"}:
            return f"spec.canary: autoscaling fields {clash} are not allowed"
    names = [spec["predictor"].get("name"), *(one["predictor"]["name"] for one in canaries)]
    if canaries and (mode != "Standard" or len(set(names)) < len(names) or sum(one["trafficPercent"] for one in canaries) > 100):
        return "spec.canary: Standard mode only, unique names, at most 100 percent together"
    for one in (spec["predictor"], *(one["predictor"] for one in canaries)):
        own = {key: one[key] for key in one if key in PREDICTOR}
        for key, value in own.items():
            if PREDICTOR[key] is None or type(value) is not PREDICTOR[key]:
                return f"predictor.{key}: {value!r}"
        if own.get("scaleMetric", "cpu") not in (("cpu", "memory") if mode == "Standard" else ("cpu", "concurrency", "rps")):
            return f"[{own['scaleMetric']}] is not a supported metric"
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {key: value for key, value in one.items() if key not in PREDICTOR}}
        if told := problem(pod, version):
            return told
        if one["containers"][0]["name"] != "kserve-container" or {"name": "PROTOCOL", "value": "v2"} not in one["containers"][0]["env"]:
            return "the container or its protocol"
        if mode == "Knative" and (set(pod["spec"]) & {"terminationGracePeriodSeconds", "topologySpreadConstraints"} or "lifecycle" in one["containers"][0] or one["containers"][0]["ports"][0]["name"] != "http1"):
            return "must not set the field(s) that Knative keeps for itself"
    return "" if DNS.fullmatch(thing["metadata"]["name"]) else "the InferenceService's name"


# --- server-side apply ------------------------------------------------------------------------------------------------------------------------------------------------
KEYS = {"containers": ("name",), "env": ("name",), "volumes": ("name",), "volumeMounts": ("mountPath",), "ports": ("containerPort", "port", "protocol"), "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable")}


def named(field, one):
    return "[" + ",".join(f'{key}="{one[key]}"' for key in KEYS[field] if key in one) + "]"


def paths(value, path=()):
    """Every field an object sets: path -> value; items of lists that have keys are fields of their own."""
    if isinstance(value, dict) and (value or not path):
        for key, one in value.items():
            yield from paths(one, (*path, key))
    elif isinstance(value, list) and path and path[-1] in KEYS:
        for one in value:
            yield (*path, named(path[-1], one)), ...
            yield from paths(one, (*path, named(path[-1], one)))
    else:
        yield path, value


def merge(live, new, field=""):
    if isinstance(live, dict) and isinstance(new, dict):
        return {**live, **{key: merge(live.get(key), value, key) for key, value in new.items()}}
    if isinstance(live, list) and isinstance(new, list) and field in KEYS:
        there = {named(field, one): one for one in live}
        return list({**there, **{named(field, one): merge(there.get(named(field, one)), one) for one in new}}.values())
    return new


def without(value, path):
    if isinstance(value, list):
        return [kept for one in value if (kept := without(one, path[1:]) if named_any(one, path[0]) and len(path) > 1 else None if named_any(one, path[0]) else one) is not None]
    if isinstance(value, dict) and path[0] in value:
        if len(path) == 1:
            return {key: one for key, one in value.items() if key != path[0]}
        return {**value, path[0]: without(value[path[0]], path[1:])}
    return value


def named_any(one, label):
    return isinstance(one, dict) and any(label == "[" + ",".join(f'{key}="{one[key]}"' for key in keys if key in one) + "]" for keys in KEYS.values())


class Refused(Exception):
    def __init__(self, status, reason, message):
        self.status, self.body = status, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": reason, "message": message, "code": status}


class FakeKubernetes:
    """A cluster of one machine; `with FakeKubernetes(folder) as cluster: …`."""

    def __init__(self, folder, version="1.35"):
        self.folder, self.version = folder, version
        self.authority = trustme.CA()
        self.objects, self.managers, self.logs, self.ages, self.events, self.requests = {}, {}, {}, {}, [], []
        self.changed, self.number, self.oldest, self.running = threading.Condition(), 100, 0, True
        self.tokens, self.namespaces, self.gateways, self.absent = {"good-token"}, {"default", "shop"}, {"public"}, set()
        self.images, self.quota, self.forbidden, self.drops, self.lowest, self.deadline = {}, None, set(), [], {}, None

    def __enter__(self):
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert("127.0.0.1").configure_cert(tls)
        self.authority.configure_trust(tls)
        tls.verify_mode = ssl.CERT_OPTIONAL
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.fake, self.server.tls = self, tls
        self.url = f"https://127.0.0.1:{self.server.server_address[1]}"
        self.threads = [threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True), threading.Thread(target=self.control, daemon=True)]
        for one in self.threads:
            one.start()
        return self

    def __exit__(self, *_):
        self.running = False
        self.server.shutdown()
        self.server.server_close()
        for one in self.threads:
            one.join(5)

    def kubeconfig(self, user=None, **cluster):
        """A kubeconfig file for this cluster; the CA is inline unless told otherwise."""
        ca = base64.b64encode(self.authority.cert_pem.bytes()).decode()
        facts = {"apiVersion": "v1", "kind": "Config", "current-context": "test", "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u", "namespace": "shop"}}],
                 "clusters": [{"name": "c", "cluster": {"server": self.url, "certificate-authority-data": ca, **cluster}}], "users": [{"name": "u", "user": user if user is not None else {"token": "good-token"}}]}
        file = self.folder / f"kubeconfig-{len(list(self.folder.glob('kubeconfig-*')))}"
        file.write_text(yaml.safe_dump(facts))
        return file

    def get(self, kind, name, namespace="shop"):
        with self.changed:
            return copy.deepcopy(self.objects.get((kind, namespace, name)))

    def names(self, kind, namespace="shop"):
        with self.changed:
            return sorted(name for one, place, name in self.objects if (one, place) == (kind, namespace))

    # --- the store
    def put(self, key, thing, gone=False):
        """Keep an object, with its versions, and tell those who watch."""
        with self.changed:
            old = self.objects.get(key)
            bare = lambda one: {**one, "metadata": {name: value for name, value in one["metadata"].items() if name not in ("resourceVersion", "generation", "managedFields")}}
            if not gone and old and bare(old) == bare(thing):
                return old
            self.number += 1
            meta = {**thing["metadata"], "resourceVersion": str(self.number), "uid": (old or thing)["metadata"].get("uid", f"uid-{self.number}"), "creationTimestamp": "2026-11-23T00:00:00Z",
                    "generation": old["metadata"]["generation"] + (old.get("spec") != thing.get("spec")) if old else 1}
            thing = {**thing, "metadata": meta}
            self.objects.pop(key, None) if gone else self.objects.update({key: thing})
            self.events.append((self.number, "DELETED" if gone else "MODIFIED" if old else "ADDED", key, thing))
            self.changed.notify_all()
            return thing

    def edit(self, kind, name, path, value, manager="kubectl-edit", namespace="shop"):
        """Somebody else changes a field."""
        with self.changed:
            key = (kind, namespace, name)
            thing = copy.deepcopy(self.objects[key])
            place = thing
            for step in path[:-1]:
                place = next(one for one in place if named_any(one, step)) if isinstance(place, list) else place[step]
            place[path[-1]] = value
            self.claim(key, manager, "Update", {tuple(path)})
            self.put(key, thing)

    def claim(self, key, manager, operation, fields):
        owners = self.managers.setdefault(key, {})
        for who, owned in owners.items():
            if who != (manager, operation):
                owned -= fields
        owners.setdefault((manager, operation), set()).update(fields)

    def apply(self, key, body, manager, force, dry_run):
        """Server-side apply."""
        kind, namespace, name = key
        if body.get("kind") != kind or body["metadata"].get("name") != name or body["metadata"].get("namespace", namespace) != namespace:
            raise Refused(400, "BadRequest", "the name of the object does not match the name on the URL")
        live, new = copy.deepcopy(self.objects.get(key)), {path: value for path, value in paths(body) if path[0] not in ("apiVersion", "kind") and path[:2] not in (("metadata", "name"), ("metadata", "namespace"))}
        owners = copy.deepcopy(self.managers.get(key, {}))
        if live and body["metadata"].get("resourceVersion", live["metadata"]["resourceVersion"]) != live["metadata"]["resourceVersion"]:
            raise Refused(409, "Conflict", f'Operation cannot be fulfilled on "{name}": the object has been modified')
        there = dict(paths(live)) if live else {}
        clashes = {}
        for (who, how), owned in owners.items():
            if (who, how) != (manager, "Apply"):
                for path in owned & set(new):
                    if new[path] is not ... and there.get(path) != new[path]:
                        clashes.setdefault(who, []).append(path)
        if clashes and not force:
            told = "; ".join(f'conflict with "{who}" using {body["apiVersion"]}: ' + " ".join("." + ".".join(one).replace(".[", "[") for one in found) for who, found in clashes.items())
            raise Refused(409, "Conflict", f"Apply failed with {sum(map(len, clashes.values()))} conflict{'s' if len(clashes) > 1 else ''}: {told}")
        for owned in (owned for who, owned in owners.items() if who != (manager, "Apply")):
            owned -= {path for found in clashes.values() for path in found}
        mine = owners.get((manager, "Apply"), set())
        made = live or {"metadata": {}}
        for path in sorted(mine - set(new), key=len, reverse=True):
            if not any(path in owned for who, owned in owners.items() if who != (manager, "Apply")):
                made = without(made, path)
        made = merge(made, {**body, "metadata": {**body["metadata"], "namespace": namespace}})
        owners[(manager, "Apply")] = set(new)
        made = self.defaulted(made)
        bare = {**made, "metadata": {name: value for name, value in made["metadata"].items() if name not in ("managedFields",)}}
        if told := problem(bare, self.version):
            raise Refused(422, "Invalid", f'{kind} "{name}" is invalid: {told}')
        if live and kind == "Deployment" and live["spec"]["selector"] != made["spec"]["selector"]:
            raise Refused(422, "Invalid", f'Deployment.apps "{name}" is invalid: spec.selector: Invalid value: field is immutable')
        if dry_run:
            return made
        self.managers[key] = owners
        made["metadata"]["managedFields"] = [{"manager": who, "operation": how, "apiVersion": body["apiVersion"]} for who, how in owners]
        return self.put(key, made)

    @staticmethod
    def defaulted(thing):
        if thing["kind"] == "Deployment":
            thing["spec"].setdefault("replicas", 1)
        if thing["kind"] == "Secret" and "stringData" in thing:
            thing["data"] = {**thing.get("data", {}), **{key: base64.b64encode(value.encode()).decode() for key, value in thing.pop("stringData").items()}}
        return thing

    def scale(self, key, replicas, manager):
        thing = copy.deepcopy(self.objects[key])
        if thing["spec"]["replicas"] != replicas:
            thing["spec"]["replicas"] = replicas
            self.claim(key, manager, "Update", {("spec", "replicas")})
        return self.put(key, thing)

    # --- the controllers
    def control(self):
        while self.running:
            with self.changed:
                for key, thing in list(self.objects.items()):
                    if key in self.objects:
                        {"Deployment": self.roll, "HTTPRoute": self.route, "InferenceService": self.kserve, "HorizontalPodAutoscaler": self.autoscale}.get(key[0], lambda *_: None)(key, thing)
            time.sleep(0.02)

    def behaviour(self, image):
        return next((how for part, how in self.images.items() if part in image), "ok")

    def pod(self, namespace, owner, template, extra=None):
        """One more pod, as its image behaves."""
        image, how = template["spec"]["containers"][0]["image"], self.behaviour(template["spec"]["containers"][0]["image"])
        if self.quota is not None and len(self.names("Pod", namespace)) >= self.quota:
            return f'pods "{owner}-x" is forbidden: exceeded quota: small, requested: pods=1, used: pods={self.quota}, limited: pods={self.quota}'
        self.number += 1
        name = f"{owner}-{self.number}"
        states = {"pull": {"waiting": {"reason": "ImagePullBackOff", "message": f'Back-off pulling image "{image}"'}}, "crash": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed container"}}}
        status = {"name": "server", "image": image, "imageID": "", "ready": False, "restartCount": 0, "state": states.get(how, {"running": {}}), **({"lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}} if how == "crash" else {})}
        conditions = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available: 3 Insufficient memory."}] if how == "homeless" else [{"type": "PodScheduled", "status": "True"}]
        conditions.append({"type": "Ready", "status": "False"})
        self.logs[name] = f"hello from {image}\n" + ("Killed\n" if how == "crash" else "")
        self.put(("Pod", namespace, name), {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace, "labels": {**template["metadata"].get("labels", {}), **(extra or {}), "owner": owner}},
                                            "spec": template["spec"], "status": {"phase": "Pending" if how == "homeless" else "Running", "conditions": conditions, "containerStatuses": [] if how == "homeless" else [status]}})
        if how == "unready":
            self.put(("Event", namespace, f"{name}.e"), {"apiVersion": "v1", "kind": "Event", "metadata": {"name": f"{name}.e"}, "reason": "Unhealthy", "message": "Readiness probe failed: HTTP probe failed with statuscode: 503",
                                                         "involvedObject": {"kind": "Pod", "name": name}})
        return ""

    def wake(self, key):
        """A pod that was made a moment ago gets ready, if its image is one that does."""
        pod = copy.deepcopy(self.objects[key])
        if self.behaviour(pod["spec"]["containers"][0]["image"]) == "ok" and pod["status"]["conditions"][-1]["status"] != "True":
            pod["status"]["conditions"][-1]["status"] = "True"
            pod["status"]["containerStatuses"][0]["ready"] = True
            self.put(key, pod)

    def pods(self, namespace, owner):
        return {key: one for key, one in self.objects.items() if key[:2] == ("Pod", namespace) and one["metadata"]["labels"]["owner"] == owner}

    def roll(self, key, thing):
        """One step of a rolling update: one more at most, none less."""
        _, namespace, name = key
        template, wanted = thing["spec"]["template"], thing["spec"]["replicas"]
        mark = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:10]
        for one in list(self.pods(namespace, name)):
            self.wake(one)
        every = self.pods(namespace, name)
        new = {one: pod for one, pod in every.items() if pod["metadata"]["labels"]["pod-template-hash"] == mark}
        ready = {one for one, pod in every.items() if pod["status"]["conditions"][-1]["status"] == "True"}
        failed = ""
        if len(new) < wanted and len(every) <= wanted:
            failed = self.pod(namespace, name, template, {"pod-template-hash": mark})
        elif surplus := sorted(set(every) - set(new), key=lambda one: one in ready) or (sorted(new)[wanted:] if len(new) > wanted else []):
            if surplus[0] not in ready or len(ready) > wanted:
                self.put(surplus[0], every[surplus[0]], gone=True)
        every = self.pods(namespace, name)
        new = {one: pod for one, pod in every.items() if pod["metadata"]["labels"]["pod-template-hash"] == mark}
        up = [one for one, pod in every.items() if pod["status"]["conditions"][-1]["status"] == "True"]
        if len(up) >= wanted or name in self.lowest:
            self.lowest[name] = min(self.lowest.get(name, len(up)), len(up))
        age = self.ages.setdefault((key, mark), 0)
        self.ages[key, mark] += 1
        conditions = [{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"} if self.deadline and age > self.deadline else {"type": "Progressing", "status": "True", "reason": "ReplicaSetUpdated"}]
        conditions += [{"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": failed}] if failed else []
        status = {"observedGeneration": thing["metadata"]["generation"], "replicas": len(every), "updatedReplicas": len(new), "availableReplicas": len(up), "readyReplicas": len(up), "conditions": conditions}
        self.put(key, {**thing, "status": status})

    def autoscale(self, key, thing):
        target = ("Deployment", key[1], thing["spec"]["scaleTargetRef"]["name"])
        if target in self.objects and not thing["spec"]["minReplicas"] <= self.objects[target]["spec"]["replicas"] <= thing["spec"]["maxReplicas"]:
            self.scale(target, min(max(self.objects[target]["spec"]["replicas"], thing["spec"]["minReplicas"]), thing["spec"]["maxReplicas"]), "kube-controller-manager")

    def route(self, key, thing):
        parents = []
        for parent in thing["spec"]["parentRefs"]:
            known = parent["name"] in self.gateways
            lost = [one["name"] for rule in thing["spec"]["rules"] for one in rule["backendRefs"] if ("Service", key[1], one["name"]) not in self.objects]
            if parent["name"] == "nowhere":  # no controller answers for a Gateway that is not there
                continue
            seen = {"observedGeneration": thing["metadata"]["generation"]}
            parents.append({"parentRef": parent, "controllerName": "test.example/gateway", "conditions": [
                {**seen, "type": "Accepted", "status": str(known), "reason": "Accepted" if known else "NoMatchingParent", "message": "" if known else f"no Gateway is called {parent['name']}"},
                {**seen, "type": "ResolvedRefs", "status": str(not lost), "reason": "BackendNotFound" if lost else "ResolvedRefs", "message": f"Service {lost} not found" if lost else ""}]})
        self.put(key, {**thing, "status": {"parents": parents}})

    def kserve(self, key, thing):
        _, namespace, name = key
        pods, statuses = {}, []
        for part in (thing["spec"]["predictor"], *(one["predictor"] for one in thing["spec"].get("canary", ()))):
            template = {"metadata": {"labels": {"serving.kserve.io/inferenceservice": name}}, "spec": {"containers": part["containers"]}}
            mark = hashlib.sha256(json.dumps([template, part.get("name", "")], sort_keys=True).encode()).hexdigest()[:10]
            pods[mark] = part.get("minReplicas", 1)
            there = {one: pod for one, pod in self.pods(namespace, name).items() if pod["metadata"]["labels"]["mark"] == mark}
            if len(there) < pods[mark]:
                self.pod(namespace, name, template, {"mark": mark})
            for one in there:
                self.wake(one)
            statuses.append(len(there) >= pods[mark] and all(self.objects[one]["status"]["conditions"][-1]["status"] == "True" for one in there))
        if all(statuses):
            for one, pod in self.pods(namespace, name).items():
                if pod["metadata"]["labels"]["mark"] not in pods:
                    self.put(one, pod, gone=True)
        canaries = [{"name": one["predictor"]["name"], "ready": ready, "trafficPercent": one["trafficPercent"]} for one, ready in zip(thing["spec"].get("canary", ()), statuses[1:])]
        self.put(key, {**thing, "status": {"observedGeneration": thing["metadata"]["generation"], "url": f"http://{name}.{namespace}.example.com", "canaryStatuses": canaries,
                                           "conditions": [{"type": "Ready", "status": str(all(statuses))}, {"type": "PredictorReady", "status": str(statuses[0])}]}})


class Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def get_request(self):
        plain, address = super().get_request()
        plain.settimeout(20)
        return self.tls.wrap_socket(plain, server_side=True, do_handshake_on_connect=False), address

    def handle_error(self, request, client_address):
        pass  # a client that does not trust us, or went away


class Handler(BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", 65536  # one packet an answer

    def log_message(self, *_):
        pass

    def do(self):
        fake, parts = self.server.fake, urlsplit(self.path)
        asked = {key: values[0] for key, values in parse_qs(parts.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fake.requests.append((self.command, parts.path, asked))
        drop = next((one for one in fake.drops if one[1] == self.command and one[2] in parts.path), None)
        if drop:
            fake.drops.remove(drop)
            if drop[0] == "after":  # done, and the answer is lost
                with contextlib.suppress(Refused):
                    self.handled(fake, parts.path.strip("/"), asked, body)
            self.close_connection = True
            return
        try:
            status, answer = self.handled(fake, parts.path.strip("/"), asked, body)
        except Refused as refused:
            status, answer = refused.status, refused.body
        if answer is None:
            return
        data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PATCH = do_DELETE = do_POST = do_PUT = do

    def handled(self, fake, path, asked, body):
        if self.headers.get("Authorization", "").removeprefix("Bearer ") not in fake.tokens and not self.connection.getpeercert():
            raise Refused(401, "Unauthorized", "Unauthorized")
        found = re.fullmatch(r"(api/v1|apis/[^/]+/[^/]+)/namespaces/([^/]+)/([^/]+)(?:/([^/]+))?(?:/(log|scale))?", path)
        kind = KINDS.get((found[1], found[3])) if found else None
        if kind is None or kind in fake.absent:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        _, namespace, plural, name, under = found.groups()
        verb = {"GET": "get" if name else "list", "PATCH": "patch", "DELETE": "delete"}[self.command]
        if (verb, plural) in fake.forbidden:
            raise Refused(403, "Forbidden", f'{plural} "{name}" is forbidden: User "robot" cannot {verb} resource "{plural}" in the namespace "{namespace}"')
        if namespace not in fake.namespaces:
            raise Refused(404, "NotFound", f'namespaces "{namespace}" not found') if self.command == "PATCH" else Refused(404, "NotFound", f'{plural} "{name}" not found')
        key = (kind, namespace, name)
        if asked.get("watch"):
            return self.watch(fake, kind, namespace, asked)
        with fake.changed:
            if not name:
                return 200, {"items": self.chosen(fake, kind, namespace, asked), "metadata": {"resourceVersion": str(fake.number)}}
            if self.command == "PATCH" and under is None:
                return self.patch(fake, key, asked, body)
            if key not in fake.objects:
                raise Refused(404, "NotFound", f'{plural} "{name}" not found')
            if under == "log":
                return 200, "\n".join(fake.logs[name].splitlines()[-int(asked.get("tailLines", 1_000_000)):]) + "\n"
            if under == "scale":
                thing = fake.scale(key, json.loads(body)["spec"]["replicas"], asked["fieldManager"]) if self.command == "PATCH" else fake.objects[key]
                return 200, {"kind": "Scale", "spec": {"replicas": thing["spec"]["replicas"]}}
            if self.command == "DELETE":
                for one, pod in fake.pods(namespace, name).items() if kind in ("Deployment", "InferenceService") else ():
                    fake.put(one, pod, gone=True)
                fake.managers.pop(key, None)
                return 200, fake.put(key, fake.objects[key], gone=True)
            return 200, fake.objects[key]

    def patch(self, fake, key, asked, body):
        if self.headers["Content-Type"] != "application/apply-patch+yaml":
            raise Refused(415, "UnsupportedMediaType", "the body of the request was in an unknown format")
        if not asked.get("fieldManager"):
            raise Refused(400, "BadRequest", "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch")
        existed = key in fake.objects
        return 200 if existed else 201, fake.apply(key, yaml.safe_load(body), asked["fieldManager"], asked.get("force") == "true", asked.get("dryRun") == "All")

    @staticmethod
    def chosen(fake, kind, namespace, asked):
        labels = dict(one.split("=") for one in asked.get("labelSelector", "").split(",") if one)
        field, _, value = asked.get("fieldSelector", "").partition("=")
        return [one for (what, place, name), one in fake.objects.items() if (what, place) == (kind, namespace) and set(labels.items()) <= set(one["metadata"].get("labels", {}).items())
                and (not field or (one["involvedObject"]["name"] if field.startswith("involved") else name) == value)]

    def watch(self, fake, kind, namespace, asked):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        seen, until, name = int(asked["resourceVersion"]), time.monotonic() + float(asked.get("timeoutSeconds", 30)), asked["fieldSelector"].partition("=")[2]
        events = [{"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}}] if seen < fake.oldest else None
        while time.monotonic() < until and fake.running:
            if events is None:
                with fake.changed:
                    fresh = [(number, {"type": what, "object": thing}) for number, what, key, thing in fake.events if number > seen and key == (kind, namespace, name)]
                    if not fresh:
                        fake.changed.wait(0.05)
                        continue
                seen, events = fresh[-1][0], [event for _, event in fresh]
            for event in events:
                data = json.dumps(event).encode() + b"\n"
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
            events = None if events[0]["type"] != "ERROR" else []
            if events == []:
                break
        self.wfile.write(b"0\r\n\r\n")
        return 200, None
