"""What a container does when it starts: which models it serves, whom it lets in, what it says when something is wrong; and the real process on each cloud's contract."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import httpx
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.tree import DecisionTreeRegressor

from mlops_nb.core.errors import Conflict, Invalid, NotFound, Untrusted
from mlops_nb.core.files import digest_of, write_json
from mlops_nb.core.settings import DeploySection
from mlops_nb.model.trust import model_bytes
from mlops_nb.monitor.predictions import PredictionLog
from mlops_nb.serve import image, workers
from mlops_nb.serve.image import bounds, cores, doors, main, models_of, order_of, remembered, variables_of, workers_of
from mlops_nb.serve.plan import read_plan
from mlops_nb.serve.platforms import platform_from

OWN = "the-token-of-the-tests"
SAGEMAKER, VERTEX, AZURE = {"SAGEMAKER_BIND_TO_PORT": "8080"}, {"AIP_HTTP_PORT": "8080"}, {"AZUREML_MODEL_DIR": "/nowhere"}


def put(folder, version=1, slope=2.0, name="double", tree=False):
    rows, values = [[0.0], [1.0], [2.0]], [0.0, slope, 2 * slope]
    content, types = model_bytes((DecisionTreeRegressor() if tree else LinearRegression()).fit(rows, values))
    folder.mkdir(parents=True)
    (folder / "model.skops").write_bytes(content)
    write_json(folder / "model.json", {"format": 1, "name": name, "version": version, "digest": digest_of(content), "kind": "", "inputs": [{"name": "x", "type": "double"}],
                                       "example": {"columns": ["x"], "data": [[1.0]]}, "trusted": types, "validation": "passed", "versions": {}})
    return folder


@pytest.fixture
def baked(tmp_path):
    put(tmp_path / "image" / "double-1")
    return tmp_path / "image"


# -- who may ask -------------------------------------------------------------------------------------------------------------------------
LET_IN = [
    ({"MLOPS_TOKEN": OWN}, {"token_digests": [digest_of(OWN.encode())], "tokens": None, "trusted_platform": False}),
    ({"MLOPS_AUTH": "token", "MLOPS_TOKEN": f" {OWN} "}, {"token_digests": [digest_of(OWN.encode())], "trusted_platform": False}),
    ({"MLOPS_AUTH": "platform", **SAGEMAKER}, {"token_digests": [], "trusted_platform": True}),
    ({"MLOPS_AUTH": "platform", **VERTEX}, {"trusted_platform": True}), ({"MLOPS_AUTH": "platform", **AZURE}, {"trusted_platform": True}),
    ({"MLOPS_AUTH": "platform", "MLOPS_TOKEN": OWN, **SAGEMAKER}, {"token_digests": [digest_of(OWN.encode())], "trusted_platform": True}),
    ({"MLOPS_AUTH": "token", "MLOPS_TOKEN": OWN, **AZURE}, {"trusted_platform": False}),
    ({"MLOPS_TOKENS": __file__}, {"tokens": __file__, "token_digests": []}),
]
SHUT = [
    ({}, "set MLOPS_TOKEN"), ({"MLOPS_TOKEN": "  "}, "set MLOPS_TOKEN"), ({"MLOPS_AUTH": "none"}, "expected token or platform"), ({"MLOPS_AUTH": "token"}, "set MLOPS_TOKEN"),
    ({"MLOPS_AUTH": "platform"}, "there is none here"), ({"MLOPS_AUTH": "platform", "MLOPS_TOKEN": OWN}, "there is none here"), ({"MLOPS_AUTH": "platform", "MLOPS_PLATFORM": "sagemaker"}, "there is none here"),
    ({"MLOPS_AUTH": "platform", "MLOPS_PLATFORM": "plain", **SAGEMAKER}, "there is none here"), ({"MLOPS_AUTH": "platform", "SAGEMAKER_BIND_TO_PORT": ""}, "there is none here"),
    ({"MLOPS_TOKEN": "secret"}, "can be guessed, it has 6 characters"), (SAGEMAKER, "set MLOPS_AUTH=platform"), ({**VERTEX, "MLOPS_TOKEN": OWN}, "set MLOPS_AUTH=platform"), ({"MLOPS_AUTH": "token", **AZURE}, "set MLOPS_TOKEN"), ({"MLOPS_TOKENS": "/no/such/file"}, "no such file"),
]


@pytest.mark.parametrize("environ, expected", LET_IN)
def test_who_is_let_in(environ, expected):
    found = doors(platform_from(environ), environ)
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("environ, words", SHUT)
def test_a_container_never_stands_open_by_accident(environ, words):
    with pytest.raises((Invalid, NotFound), match=words):
        doors(platform_from(environ), environ)


# -- which models ----------------------------------------------------------------------------------------------------------------------------
def test_what_the_platform_lays_down_goes_first(baked, tmp_path):
    laid = put(tmp_path / "azureml-models" / "double" / "7" / "bundle", version=7).parent
    environ = {"MLOPS_MODELS": str(baked), "AZUREML_MODEL_DIR": str(laid)}
    assert models_of(platform_from(environ), environ)[1][0].address == "double@7"
    for elsewhere in ({"AZUREML_MODEL_DIR": str(tmp_path / "missing")}, {"AIP_STORAGE_URI": "gs://shop/model"}, SAGEMAKER, {}):
        environ = {"MLOPS_MODELS": str(baked), **elsewhere}
        assert models_of(platform_from(environ), environ)[1][0].address == "double@1"


def test_a_laid_model_is_a_strangers(baked, tmp_path):
    laid = put(tmp_path / "laid", tree=True)
    environ = {"MLOPS_MODELS": str(baked), "AIP_STORAGE_URI": str(laid)}
    with pytest.raises(Untrusted, match="MLOPS_TRUST="):
        models_of(platform_from(environ), environ)
    environ["MLOPS_TRUST"] = f"0000000000000000, {digest_of((laid / 'model.skops').read_bytes())[:20]}"
    assert models_of(platform_from(environ), environ)[0] == laid
    shutil.copytree(laid, tmp_path / "other" / "double")  # the same file built into the image needs no word
    assert models_of(platform_from({}), {"MLOPS_MODELS": str(tmp_path / "other")})[1][0].trusted


def test_a_damaged_laid_model_is_not_passed_over(baked, tmp_path):
    laid = put(tmp_path / "laid")
    (laid / "model.json").write_text((laid / "model.json").read_text()[:50])
    environ = {"MLOPS_MODELS": str(baked), "AIP_STORAGE_URI": str(laid)}
    with pytest.raises(Invalid, match="is damaged"):
        models_of(platform_from(environ), environ)


def test_no_model_at_all(tmp_path):
    environ = {"MLOPS_MODELS": str(tmp_path / "none")}
    with pytest.raises(NotFound, match="this image holds no model in .*MLOPS_MODELS"):
        models_of(platform_from(environ), environ)
    with pytest.raises(NotFound, match="sagemaker laid none into"):
        models_of(platform_from(SAGEMAKER), {**environ, **SAGEMAKER})


# -- the order --------------------------------------------------------------------------------------------------------------------------------
def test_the_newest_version_answers_and_the_others_are_loaded(baked, tmp_path):
    put(baked / "double-10", version=10)
    put(baked / "double-9", version=9)
    put(baked / "triple", name="triple", slope=3.0)
    environ = {"MLOPS_MODELS": str(baked), "MLOPS_TOKEN": OWN}
    plan = read_plan(order_of(platform_from(environ), environ, tmp_path)["plan"])
    assert {one.model: dict(one.traffic) for one in plan.models} == {"double": {"1": 0, "9": 0, "10": 100}, "triple": {"1": 100}}


def test_the_order_says_what_the_environment_says(baked, tmp_path):
    environ = {"MLOPS_MODELS": str(baked), "MLOPS_TOKEN": OWN, "MLOPS_BODY_BYTES": "1000", "MLOPS_GRPC_PORT": "9001", "HOSTNAME": "pod-7", "MLOPS_WORKERS": "3"}
    order = order_of(platform_from(environ), environ, tmp_path)
    assert json.loads(json.dumps(order)) == order, "an order crosses processes as JSON"
    assert order["limits"] == {"body_bytes": 1000} and order["grpc"] == 9001 and order["instance"] == "pod-7" and order["open_health"] and "t" not in json.dumps(order["token_digests"])[:3]
    assert order["platform"]["name"] == "plain" and "source" not in order and workers_of(platform_from(environ), environ) == 3
    assert "MLOPS_TOKEN" not in json.dumps(order) and order["patience_s"] < platform_from(environ).stop_s


@pytest.mark.parametrize("section, expected", [
    ({}, {"rates": None, "cors": [], "access_log": None}),
    ({"rate_per_s": 0.5, "total_per_s": 1e7}, {"rates": {"per_s": 0.5, "total_per_s": 1e7}}), ({"total_per_s": 1 / 3}, {"rates": {"per_s": 0, "total_per_s": pytest.approx(1 / 3, rel=1e-14)}}),
    ({"origins": " https://a.example,https://b.example ,"}, {"cors": ["https://a.example", "https://b.example"]}),
    ({"access_log": "a.jsonl"}, {"access_log": {"path": "-", "payloads": False}}), ({"access_log": "a.jsonl", "payloads": True}, {"access_log": {"path": "-", "payloads": True}}), ({"payloads": True}, {"access_log": None})])
def test_a_section_of_the_settings_arrives_in_the_order(baked, tmp_path, section, expected):
    environ = {"MLOPS_MODELS": str(baked), "MLOPS_TOKEN": OWN, **variables_of(DeploySection(**section))}
    order = order_of(platform_from(environ), environ, tmp_path)
    assert {key: order[key] for key in expected} == expected and "journal" not in order


@pytest.mark.parametrize("environ, words", [({"MLOPS_RATE_PER_S": "fast"}, "MLOPS_RATE_PER_S is 'fast'"), ({"MLOPS_TOTAL_PER_S": "-1"}, "MLOPS_TOTAL_PER_S is '-1'"), ({"MLOPS_RATE_PER_S": "inf"}, "or 0 for no limit"), ({"MLOPS_RATE_PER_S": "nan"}, "or 0 for no limit"),
                                            ({"MLOPS_ORIGINS": "https://a.example/"}, "the origin"), ({"MLOPS_ORIGINS": "*"}, "the origin"), ({"MLOPS_PAYLOADS": "perhaps"}, "expected yes or no")])
def test_a_bound_that_is_none_is_refused(environ, words):
    with pytest.raises(Invalid, match=words):
        bounds(environ)


def test_a_log_folder_that_is_not_mounted_is_off_with_a_word(tmp_path, caplog):
    assert remembered({}) == {} and caplog.text == ""
    assert remembered({"MLOPS_PREDICTIONS": str(tmp_path / "none")}) == {} and "mount one" in caplog.text


def test_a_plan_that_is_given_is_followed(baked, tmp_path):
    environ = {"MLOPS_MODELS": str(baked), "MLOPS_TOKEN": OWN, "MLOPS_PLAN": str(tmp_path / "mine.json")}
    with pytest.raises(NotFound, match="no plan"):
        order_of(platform_from(environ), environ, tmp_path)
    write_json(tmp_path / "mine.json", {"models": [{"model": "double", "traffic": {"1": 100}, "shadow": ""}]})
    assert order_of(platform_from(environ), environ, tmp_path)["plan"] == environ["MLOPS_PLAN"]
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(Invalid, match="damaged"):
        order_of(platform_from(environ), environ, tmp_path)


def test_statuses_of_the_contract():
    from mlops_nb.serve.door import refusal
    from mlops_nb.serve.sagemaker import NoRoom, NotAcceptable

    assert refusal(NoRoom("no room.")).status == 507, "SageMaker unloads a model only when it hears 507"
    assert refusal(NotAcceptable("not spoken.")).status == 406
    assert [refusal(kind("x.")).status for kind in (Conflict, NotFound, Untrusted)] == [409, 404, 403]


def test_what_is_no_bundle_is_passed_over_with_a_word(baked, tmp_path, caplog):
    (tmp_path / "laid").mkdir()
    (tmp_path / "laid" / "MLmodel").write_text("flavors: {}")
    environ = {"MLOPS_MODELS": str(baked), "AZUREML_MODEL_DIR": str(tmp_path / "laid")}
    assert models_of(platform_from(environ), environ)[0] == baked
    assert "is no bundle" in caplog.text


def test_many_models_have_one_worker_and_a_catalogue(baked, tmp_path):
    environ = {"MLOPS_WORKERS": "4", "MLOPS_MODELS": str(baked), "MLOPS_AUTH": "platform", **SAGEMAKER, "SAGEMAKER_MULTI_MODEL": "true"}
    order = order_of(platform_from(environ), environ, tmp_path)
    assert order["source"] == "mlops_nb.serve.sagemaker:held" and order["root"] == "/opt/ml/models" and order["workers"] == 1
    assert 1 <= cores() <= (os.cpu_count() or 1)


def test_main_hands_the_order_to_the_workers(baked, monkeypatch, caplog):
    seen = {}

    def stub(order, port, count, said):
        seen.update(order=order, address=port.getsockname(), count=count)
        said()

    monkeypatch.setattr(workers, "answer_until_stopped", stub)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    port = free_port()
    assert main(["serve"], {"MLOPS_MODELS": str(baked), "MLOPS_TOKEN": OWN, "MLOPS_HOST": "127.0.0.1", "MLOPS_PORT": str(port), "MLOPS_WORKERS": "2"}) == 0
    assert seen["address"] == ("127.0.0.1", port) and seen["count"] == 2 and seen["order"]["bundle"] == str(baked)
    assert not Path(seen["order"]["plan"]).exists(), "what the server wrote is cleared away"


@pytest.mark.parametrize("argv, environ, words", [(["train"], {}, "does not train"), ([], {"MLOPS_PORT": "x"}, "MLOPS_PORT is 'x'"), ([], {}, "set MLOPS_TOKEN"),
                                                  ([], {"MLOPS_TOKEN": OWN, "MLOPS_MODELS": "/none"}, "holds no model"), ([], {"MLOPS_TOKEN": OWN, "MLOPS_WORKERS": "many"}, "MLOPS_WORKERS is 'many'")])
def test_main_says_what_is_wrong_and_ends_with_2(baked, argv, environ, words, caplog):
    assert main(argv, {"MLOPS_MODELS": str(baked), **environ}) == 2
    assert words in caplog.text and "Traceback" not in caplog.text


def test_a_taken_port_is_said(baked, caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environ = {"MLOPS_MODELS": str(baked), "MLOPS_TOKEN": OWN, "MLOPS_HOST": "127.0.0.1", "MLOPS_PORT": str(taken.getsockname()[1])}
        assert main([], environ) == 2 and "is taken by another process" in caplog.text
    assert issubclass(Conflict, Exception) and image.main is main


# -- the real process -----------------------------------------------------------------------------------------------------------------------
def free_port():
    from mlops_nb.deploy.engine import free_port

    return free_port("127.0.0.1")


class Container:
    "The entry point of an image, as a process."

    def __init__(self, log, port_name="MLOPS_PORT", ready="/ping", **environ):
        self.port, self.log = free_port(), log
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("MLOPS_", "SAGEMAKER_", "AIP_", "AZUREML_"))}
        with open(log, "wb") as out:
            self.process = subprocess.Popen([sys.executable, "-m", "mlops_nb.serve.image", "serve"], stderr=out, stdout=out,
                                            env={**clean, "MLOPS_HOST": "127.0.0.1", "MLOPS_WORKERS": "1", **environ, port_name: str(self.port)})
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=30)
        for _ in range(3000):
            try:
                if self.client.get(ready).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        self.stop()
        raise AssertionError(Path(log).read_text())

    def __enter__(self):
        return self

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def __exit__(self, *error):
        self.client.close()
        self.stop()


posix = pytest.mark.skipif(os.name != "posix", reason="the workers of an image are forked")


@posix
def test_docker_run_with_a_token(baked, tmp_path):
    with Container(tmp_path / "log", MLOPS_MODELS=str(baked), MLOPS_TOKEN=OWN) as one:
        body = {"instances": [{"x": 3.0}]}
        assert one.client.post("/invocations", json=body).status_code == 401
        assert one.client.post("/invocations", json=body, headers={"Authorization": f"Bearer {OWN}"}).json() == {"predictions": [pytest.approx(6.0)]}
        assert one.client.post("/score", json={"input_data": [[1.0]]}, headers={"Authorization": f"Bearer {OWN}"}).status_code == 404
        assert one.stop() == 0
    assert OWN not in (tmp_path / "log").read_text()


@posix
def test_predictions_are_written_down_and_a_disk_that_takes_none_stops_nothing(baked, tmp_path):
    log, door = PredictionLog(tmp_path / "predictions"), {"Authorization": f"Bearer {OWN}"}
    today = datetime.now(timezone.utc)
    blocked = [log.folder / f"{today + timedelta(days=one):%Y-%m-%d}.jsonl" for one in (0, 1)]
    for one in blocked:
        one.mkdir(parents=True)  # a fault that stops root, too
    with Container(tmp_path / "log", MLOPS_MODELS=str(baked), MLOPS_TOKEN=OWN, MLOPS_PREDICTIONS=str(log.folder)) as one:
        ask = lambda: one.client.post("/invocations", json={"instances": [{"x": 3.0}]}, headers=door).json()
        lost = lambda: one.client.get("/health", headers=door).json()["log_errors"]
        assert ask() == {"predictions": [pytest.approx(6.0)]}
        latest = time.monotonic() + 60
        while not lost() and time.monotonic() < latest:
            time.sleep(0.05)
        assert lost() == 1 and "1 answered rows were not written down" in (tmp_path / "log").read_text()
        for each in blocked:
            each.rmdir()
        assert ask() == {"predictions": [pytest.approx(6.0)]}
        assert one.stop() == 0
    found = log.read()
    assert found[["model", "x", "prediction"]].to_dict("records") == [{"model": "double@1", "x": 3.0, "prediction": pytest.approx(6.0)}]


@posix
def test_on_sagemaker(baked, tmp_path):
    with Container(tmp_path / "log", "SAGEMAKER_BIND_TO_PORT", MLOPS_MODELS=str(baked), MLOPS_AUTH="platform") as one:
        ask = lambda body, **headers: one.client.post("/invocations", content=body, headers={key.replace("_", "-"): value for key, value in headers.items()})
        assert [float(line) for line in ask(b"3\n4\n", content_type="text/csv", accept="text/csv").text.split()] == pytest.approx([6.0, 8.0])
        answer = ask(b'{"x": 3}\n', content_type="application/jsonlines", accept="application/jsonlines", x_amzn_sagemaker_custom_attributes="trace=1")
        assert json.loads(answer.text) == {"prediction": pytest.approx(6.0)} and answer.headers["content-type"] == "application/jsonlines" and answer.headers["x-amzn-sagemaker-custom-attributes"] == "trace=1"
        assert ask(b"[[3]]", content_type="application/json").json() == {"predictions": [pytest.approx(6.0)]}
        assert ask(b"3", content_type="text/csv", accept="image/png").status_code == 406
        assert ask(b"3,4", content_type="text/csv").status_code == 400 and ask(b"a", content_type="text/csv").status_code == 422 and ask(b"3", content_type="x/y").status_code == 415
        assert one.client.get("/execution-parameters").json()["BatchStrategy"] == "MULTI_RECORD"
        assert one.client.get("/admin/plan").status_code == 401, "the platform lets clients predict, not rule"
        assert one.stop() == 0


@posix
def test_on_vertex_ai(baked, tmp_path):
    route = "/v1/endpoints/7/deployedModels/9"
    with Container(tmp_path / "log", "AIP_HTTP_PORT", route, MLOPS_MODELS=str(baked), MLOPS_AUTH="platform", AIP_HEALTH_ROUTE=route, AIP_PREDICT_ROUTE=f"{route}:predict") as one:
        assert one.client.post(f"{route}:predict", json={"instances": [{"x": 3}, {"x": 4}]}).json() == {"predictions": pytest.approx([6.0, 8.0])}
        assert one.client.post(f"{route}:predict", json={"instances": [[3]], "parameters": {"k": 1}}).status_code == 422
        assert one.client.post(f"{route}:predict", json={"inputs": [[3]]}).status_code == 400


@posix
def test_on_vertex_ai_with_our_own_route_names(baked, tmp_path):
    "Whoever uploads a model may call its route /predict: there it speaks Vertex AI's body."
    with Container(tmp_path / "log", "AIP_HTTP_PORT", "/health", MLOPS_MODELS=str(baked), MLOPS_AUTH="platform", AIP_HEALTH_ROUTE="/health", AIP_PREDICT_ROUTE="/predict") as one:
        assert one.client.post("/predict", json={"instances": [{"x": 3}]}).json() == {"predictions": [pytest.approx(6.0)]}


@posix
def test_on_azure_ml(tmp_path):
    laid = put(tmp_path / "azureml-models" / "double" / "3", version=3)
    with Container(tmp_path / "log", MLOPS_AUTH="platform", AZUREML_MODEL_DIR=str(laid), ready="/health") as one:
        for given in ({"columns": ["x"], "data": [[3]], "index": [0]}, [{"x": 3}], [[3]], {"x": [3]}):
            assert one.client.post("/score", json={"input_data": given}).json() == [pytest.approx(6.0)]
        assert one.client.get("/version").json()["model"] == "double@3"


@posix
def test_many_models_behind_one_sagemaker_endpoint(baked, tmp_path):
    root = tmp_path / "ml" / "models"
    put(root / "4f1a" / "model", slope=5.0)
    put(root / "9c2e" / "model", slope=7.0, version=2)
    put(root / "bad" / "model")
    (root / "bad" / "model" / "model.skops").write_bytes(b"not a model")
    (root / "out").symlink_to(baked)
    environ = {"MLOPS_MODELS": str(baked), "MLOPS_AUTH": "platform", "SAGEMAKER_MULTI_MODEL": "true", "MLOPS_MODEL_ROOT": str(root)}
    with Container(tmp_path / "log", "SAGEMAKER_BIND_TO_PORT", **environ) as one:
        load = lambda name, folder="model": one.client.post("/models", json={"model_name": name, "url": str(root / name / folder)})
        ask = lambda name, value: one.client.post(f"/models/{name}/invoke", content=str(value), headers={"content-type": "text/csv", "x-amzn-sagemaker-target-model": f"{name}.tar.gz"})
        assert ask("4f1a", 1).status_code == 404 and one.client.get("/models").json() == {"models": []}
        assert load("4f1a").status_code == 200 and ask("4f1a", 3).json() == {"predictions": [pytest.approx(15.0)]}
        assert load("4f1a").status_code == 409
        assert load("9c2e").status_code == 200 and ask("9c2e", 3).json() == {"predictions": [pytest.approx(21.0)]}
        assert [name["modelName"] for name in one.client.get("/models").json()["models"]] == ["4f1a", "9c2e"]
        assert one.client.get("/models/9c2e").json() == {"modelName": "9c2e", "modelUrl": str(root / "9c2e" / "model")}
        assert load("bad").status_code == 403 and load("out", "double-1").status_code == 403 and load("gone").status_code == 404
        assert one.client.post("/models", content=b"{").status_code == 400
        assert one.client.delete("/models/4f1a").status_code == 200 and ask("4f1a", 3).status_code == 404 and one.client.delete("/models/4f1a").status_code == 404
        assert ask("9c2e", 1).status_code == 200 and load("4f1a").status_code == 200 and ask("4f1a", 1).json() == {"predictions": [pytest.approx(5.0)]}
        assert one.client.get("/ping").status_code == 200
