"""What goes into an image, what must not, and that it is enough: the entry point runs in a clean environment."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import skops.io
from models import database, new_shop, shop  # noqa: F401 (fixtures)
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from mlops_nb.core.errors import Conflict, Invalid, NotFound, Unavailable
from mlops_nb.deploy.context import CMD, ENTRYPOINT, build_context, checked, dockerfile, inspected, read_context
from mlops_nb.deploy.requirements import modules_in, needed, our_wheel, packed, pinned, repacked, requirements_of, serving, without_index
from mlops_nb.model.registry import register
from mlops_nb.monitor.predictions import PredictionLog
from mlops_nb.serve.bundle import write_bundle

ROWS = pd.DataFrame({"pieces": [2.0, 30.0, 8.0, 1.0], "price": [1.5, 3.75, 2.0, 9.0]})
BASE = "python:3.11.7-slim"


def bundle_of(shop, model, name="large", target=(3.0, 112.5, 16.0, 9.0), trust=None):
    return write_bundle(register(model.fit(ROWS, target), name, example=ROWS.head(2), **({"trust": trust} if trust else {})), shop / f"bundle-{name}")


@pytest.fixture
def bundle(shop):
    return bundle_of(shop, make_pipeline(StandardScaler(), LinearRegression()))


def test_the_closure_is_that_of_an_independent_resolver():
    "pip's own: an installation into an empty target, planned but not carried out, would pull the same names (pip inspect's view: metadata of what is installed)."
    from importlib.metadata import distribution

    found = pinned(["scikit-learn", "pandas", "skops"])
    assert {"numpy", "scipy", "joblib", "threadpoolctl", "python-dateutil", "six", "packaging"} <= set(found)  # the Requires-Dist lines of these three, November 2026
    assert all(distribution(name).version == version for name, version in found.items()) and list(found) == sorted(found)
    assert not {"pytest", "matplotlib", "pyarrow", "colorama", "tzdata"} & set(found)  # extras and other platforms


@pytest.mark.skipif(not shutil.which("uv") and not (Path(sys.executable).parent / "uv").exists(), reason="needs uv")
def test_uv_finds_the_pins_consistent(tmp_path):
    uv = shutil.which("uv") or str(Path(sys.executable).parent / "uv")
    pins = tmp_path / "requirements.txt"
    pins.write_text("".join(f"{name}=={version}\n" for name, version in pinned(serving()).items()))
    out = subprocess.run([uv, "pip", "compile", "-q", "--no-header", "--no-annotate", "--python-platform", "linux", "--python", sys.executable, str(pins)], capture_output=True, text=True, timeout=120)
    if out.returncode and "error sending request" in out.stderr:
        pytest.skip("no package index")
    assert out.returncode == 0, out.stderr
    assert set(out.stdout.split()) == set(pins.read_text().split())  # nothing is missing, nothing is left over


def test_extras_and_markers_are_followed():
    assert set(pinned(["fsspec[s3]"])) > {"s3fs", *pinned(["fsspec"])}


def test_modules_of_a_model_are_those_it_names():
    model = make_pipeline(FunctionTransformer(np.log1p), RandomForestClassifier(2)).fit(ROWS, [0, 1, 0, 1])
    assert modules_in(skops.io.dumps(model)) == ["numpy", "sklearn"]
    for content in (b"", b"\x80\x04K\x01.", packed({"other.txt": b""}), packed({"schema.json": b"{"})):
        with pytest.raises(Invalid, match="skops"):
            modules_in(content)


def test_a_projects_modules_come_with_all_that_they_import(tmp_path, monkeypatch):
    files = {"shop_steps/__init__.py": "from .rows import Rows", "shop_steps/rows.py": "import yaml\nimport shop_tables\ntry:\n    import not_there_at_all\nexcept ImportError:\n    pass",
             "shop_steps/codes.json": "{}", "shop_steps/notes.ipynb": "{}", "shop_steps/.env": "X=1", "shop_tables.py": "def late():\n    import tqdm", "unused.py": ""}
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    distributions, found = needed(["shop_steps", "sklearn", "json", "mlops_nb"], tmp_path)
    assert list(found) == ["shop_steps/__init__.py", "shop_steps/codes.json", "shop_steps/rows.py", "shop_tables.py"]
    assert {"scikit-learn", "PyYAML", "tqdm"} == set(distributions) and all(file.is_file() for file in found.values())
    (tmp_path / "numpy").mkdir()  # a folder with data, not a module
    assert needed(["numpy"], tmp_path) == (["numpy"], {})


def test_packages_elsewhere_on_the_path_are_no_modules_of_the_project(tmp_path, monkeypatch):
    "Such as those of `pip install --user`, or a folder on PYTHONPATH."
    for path, text in {"shopkit/__init__.py": "", "shop_kit-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: shop-kit\nVersion: 1.0\n", "shop_kit-1.0.dist-info/RECORD": "shopkit/__init__.py,,\n"}.items():
        (tmp_path / "elsewhere" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "elsewhere" / path).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    (tmp_path / "shop").mkdir()
    assert needed(["shopkit"], tmp_path / "shop") == (["shop-kit"], {})


def test_a_file_that_this_python_cannot_read_imports_nothing(tmp_path):
    (tmp_path / "shop_steps").mkdir()
    for name, content in {"__init__.py": b"import yaml", "template.py": b"{% if x %}", "latin.py": b"# coding: latin-1\nimport tqdm\nNAME = '\xe4'", "broken.py": b"NAME = '\xe4'"}.items():
        (tmp_path / "shop_steps" / name).write_bytes(content)
    assert set(needed(["shop_steps"], tmp_path)[0]) == {"PyYAML", "tqdm"}


def test_our_wheel_installs_and_holds_no_panel():
    name, content = our_wheel()
    wheel = zipfile.ZipFile(BytesIO(content))
    names = wheel.namelist()
    assert wheel.testzip() is None and name.endswith("-py3-none-any.whl") and "mlops_nb/serve/protocol.py" in names
    assert not [path for path in names if "labextension" in path or "__pycache__" in path or "node_modules" in path] and names == sorted(names)
    recorded = {line.split(",")[0] for line in wheel.read(next(path for path in names if path.endswith("RECORD"))).decode().splitlines()}
    assert recorded == set(names)


def test_what_no_index_has_is_packed_again(tmp_path):
    name, content = repacked("iniconfig")
    (tmp_path / name).write_bytes(content)
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / name)!r}); import iniconfig; print(iniconfig.__file__)"], capture_output=True, text=True, check=True)
    assert name in done.stdout and requirements_of(tmp_path / name) == [] and not without_index("iniconfig")
    if without_index("mlops_nb"):  # installed to be edited: its dist-info holds no code
        with pytest.raises(Unavailable, match="build a wheel"):
            repacked("mlops_nb")
    with pytest.raises(Unavailable, match="not installed here"):
        repacked("a-package-that-nobody-wrote")


def test_written_twice_it_is_the_same_to_the_byte(shop, bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    first = build_context(bundle.folder, tmp_path / "one", base=BASE)
    os.utime(bundle.folder / "model.json", (1, 1))
    monkeypatch.chdir(tmp_path)
    second = build_context(bundle.folder, tmp_path / "two", base=BASE)
    read = lambda place: {file.relative_to(place).as_posix(): (file.read_bytes(), int(file.stat().st_mtime), oct(file.stat().st_mode)) for file in place.rglob("*") if file.is_file()}
    assert read(first.folder) == read(second.folder) and first.image == second.image and len(read(first.folder)) == 7
    assert {mtime for _, mtime, _ in read(first.folder).values()} == {1700000000}
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "soon")
    with pytest.raises(Invalid, match="git log"):
        build_context(bundle.folder, tmp_path / "three")


def test_another_model_is_another_image_and_replaces_the_folder(shop, bundle, tmp_path):
    first = build_context(bundle.folder, tmp_path / "image", base=BASE)
    other = bundle_of(shop, make_pipeline(StandardScaler(), LinearRegression(fit_intercept=False)))
    second = build_context(other.folder, tmp_path / "image", base=BASE)
    assert second.models == ("large@2",) and second.image != first.image and second.image.startswith("mlops-large:2-")
    assert read_context(tmp_path / "image").digest == second.digest and not list(tmp_path.glob(".image*"))
    assert {path.split("/")[1] for path in second.files if path.startswith("models/")} == {"large-2"}


def test_a_folder_of_somebody_else_is_left_alone(shop, bundle, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("three years")
    with pytest.raises(Conflict, match="other files"):
        build_context(bundle.folder, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "three years"
    with pytest.raises(NotFound):
        read_context(tmp_path / "mine")


SECRET = "p4ss/w0rd+Zq81=x"


@pytest.mark.parametrize("source", ["KEY = 'fine'\n# {secret}", "HOST = 'db'\nAPI_TOKEN = 'abcdef123456'", "URL = 'postgresql://ann:hunter22@db/shop'", "ROWS = '{home}/rows.csv'", "ROWS = '{shop}/rows.csv'"])
def test_a_projects_module_with_a_secret_or_a_path_is_refused(shop, tmp_path, monkeypatch, source):
    monkeypatch.setenv("SHOP_PASSWORD", SECRET)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    text = source.format(secret=SECRET, home=tmp_path / "home", shop=shop) if "{" in source else source
    (shop / "shop_step.py").write_text(f"from sklearn.preprocessing import FunctionTransformer\nclass Step(FunctionTransformer): ...\n{text}\n")
    monkeypatch.syspath_prepend(str(shop))
    sys.modules.pop("shop_step", None)
    from shop_step import Step

    bundle = bundle_of(shop, make_pipeline(Step(), LinearRegression()), trust=["shop_step.Step"])
    with pytest.raises(Invalid, match="code/shop_step.py"):
        build_context(bundle.folder, tmp_path / "image")
    assert not (tmp_path / "image").exists()
    (shop / "shop_step.py").write_text("from sklearn.preprocessing import FunctionTransformer\nclass Step(FunctionTransformer): ...\n")
    context = build_context(bundle.folder, tmp_path / "image", base=BASE)
    assert (context.folder / "code/shop_step.py").exists() and "PYTHONPATH" in (context.folder / "Dockerfile").read_text() and "COPY code" in (context.folder / "Dockerfile").read_text()
    sys.modules.pop("shop_step", None)


def test_a_secret_inside_a_model_or_a_wheel_is_found(shop, tmp_path, monkeypatch):
    monkeypatch.setenv("SHOP_PASSWORD", SECRET)
    for name, content in (("model.skops", json.dumps({"note": SECRET}).encode()), ("x.npy", b"\x93NUMPY\0" + SECRET.encode())):
        with pytest.raises(Invalid, match="SHOP_PASSWORD"):
            inspected("models/m-1/model.skops", packed({"schema.json": b"{}", name: content}))
    assert inspected("models/m-1/model.skops", packed({"schema.json": b"{}"}))
    assert SECRET not in json.dumps(dict(os.environ) | {"SHOP_PASSWORD": ""})


def test_no_secret_no_host_and_no_path_of_the_environment_is_in_any_file(shop, bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", f"https://ann:{SECRET}@packages.example/simple")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    context = build_context(bundle.folder, tmp_path / "image", extras=[], user=True)
    for path in context.files:
        content = (context.folder / path).read_bytes()
        parts = [zipfile.ZipFile(BytesIO(content)).read(name) for name in zipfile.ZipFile(BytesIO(content)).namelist()] if path.endswith((".whl", ".skops")) else [content]
        for part in parts:
            assert SECRET.encode() not in part and b"wJalrXUtnFEMI" not in part and b"packages.example" not in part
            assert path.endswith(".whl") or not [one for one in (str(Path.home()), str(shop), str(tmp_path), sys.prefix) if len(one) > 5 and one.encode() in part]
    lines = (context.folder / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.]+", line) for line in lines) and not {"mlops-nb", "mlflow", "jupyterlab", "pytest"} & {line.split("==")[0] for line in lines}


def test_the_dockerfile_keeps_the_contracts():
    "SageMaker: exec-form entry point, `serve`, no USER, its two labels; the issue: non-root, healthcheck, no curl."
    text = dockerfile(["m@1"], base=BASE)
    assert f"ENTRYPOINT {json.dumps(list(ENTRYPOINT))}\nCMD {json.dumps(list(CMD))}" in text and "\nEXPOSE 8080\n" in text and "\nUSER" not in text and "curl" not in text
    assert 'com.amazonaws.sagemaker.capabilities.accept-bind-to-port="true"' in text and 'com.amazonaws.sagemaker.capabilities.multi-models="true"' in text
    assert "\nUSER 10001:10001\n" in dockerfile(["m@1"], base=BASE, user=True)
    probe = json.loads(re.search(r"HEALTHCHECK .* CMD (.*)", text)[1])
    assert probe[:2] == ["python", "-c"] and ast.parse(probe[2])


def test_where_packages_come_from_is_the_builders_own(monkeypatch):
    first, last = dockerfile(["m@1"], base=BASE).split("\n\nFROM")
    assert [line for line in first.splitlines() if line.startswith("ARG")] == ["ARG PIP_INDEX_URL", "ARG PIP_EXTRA_INDEX_URL", "ARG PIP_TRUSTED_HOST"] and "ARG" not in last


def test_lightgbm_finds_an_openmp_in_a_slim_image(shop, bundle, tmp_path):
    "Its wheel expects libgomp.so.1 of the system; those of scikit-learn and XGBoost bring theirs."
    lightgbm = pytest.importorskip("lightgbm")
    light = bundle_of(shop, lightgbm.LGBMRegressor(n_estimators=2, min_child_samples=1, verbose=-1), "light", [3.0, 112.5, 16.0, 9.0], trust=["collections.OrderedDict", "lightgbm.basic.Booster", "lightgbm.sklearn.LGBMRegressor"])
    text = (build_context(light.folder, tmp_path / "light", base=BASE).folder / "Dockerfile").read_text()
    assert "scikit_learn.libs/libgomp-" in text and 'LD_LIBRARY_PATH="/opt/venv/lib"' in text and "apt-get" not in text
    context = build_context(bundle.folder, tmp_path / "plain", base=f"python@sha256:{'0' * 64}", user=True)
    assert "libgomp" not in (file := context.folder / "Dockerfile").read_text()
    file.write_text(dockerfile(["light@1"], base=context.base, user=True, openmp=True))
    assert [one["finding"] for one in checked(context) if one["level"] != "info"] == ["this file is not as it was written; write the context again"]  # hadolint has nothing to say


def levels(findings, *levels):
    return [one for one in findings if one["level"] in levels]


def test_a_fresh_context_has_nothing_to_mend_also_for_hadolint(shop, bundle, tmp_path):
    context = build_context(bundle.folder, tmp_path / "image", base=f"python@sha256:{'0' * 64}", user=True)
    assert levels(checked(context), "error", "warning") == []
    known = [one["finding"].split(",")[0] for one in checked(build_context(bundle.folder, tmp_path / "image", base=BASE))]
    assert known == ["the image does not leave root by itself", *["the base image is named by its tag"] * 2]


@pytest.mark.parametrize("path, old, new, finding", [
    ("Dockerfile", BASE, "python:latest", "no fixed version"), ("Dockerfile", BASE, "python", "no fixed version"), ("Dockerfile", "COPY models", "ADD models", "COPY does not"),
    ("Dockerfile", 'CMD ["serve"]', "CMD serve", "SIGTERM"), ("Dockerfile", "EXPOSE 8080", "USER root", "as root"), ("Dockerfile", "HEALTHCHECK", "# HEALTHCHECK", "whether the server answers"),
    ("Dockerfile", "EXPOSE 8080", "ENV API_TOKEN=abc", "stays in the image"), ("Dockerfile", "--no-deps -r", "--no-deps --index-url https://packages.example -r", "stays in the image"),
    ("requirements.txt", "==", ">=", "not pinned"), ("requirements.txt", "pandas==", "pandas==9+cpu\nold==", "public indexes"), ("models/large-1/model.json", '"large"', '"small"', "not as it was written")])
def test_what_was_edited_is_found(shop, bundle, tmp_path, path, old, new, finding):
    context = build_context(bundle.folder, tmp_path / "image", base=BASE, user=True)
    file = context.folder / path
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    assert any(finding in one["finding"] for one in levels(checked(context.folder), "error", "warning")), checked(context.folder)


def test_a_secret_that_came_later_and_missing_files_are_found(shop, bundle, tmp_path, monkeypatch):
    context = build_context(bundle.folder, tmp_path / "image", base=BASE)
    monkeypatch.setenv("SHOP_PASSWORD", SECRET)
    (context.folder / ".env").write_text(f"SHOP_PASSWORD={SECRET}\n")
    (context.folder / "models/large-1/model.json").unlink()
    found = {(one["where"], one["finding"].split(";")[0]) for one in levels(checked(context), "error", "warning")}
    assert {(".env", "this file was not written by us"), ("models/large-1/model.json", "this file is missing")} <= found and any(where == ".env" and "SHOP_PASSWORD" in text for where, text in found)
    assert "**/.*" in (context.folder / ".dockerignore").read_text()  # it would not reach the engine either


def test_words_for_what_is_asked_wrongly(shop, bundle, tmp_path):
    with pytest.raises(Invalid, match="grpc"):
        build_context(bundle.folder, tmp_path / "image", extras=["gpu"])
    with pytest.raises(Invalid, match="wheel"):
        build_context(bundle.folder, tmp_path / "image", wheels=[tmp_path / "none.whl"])
    with pytest.raises(NotFound):
        build_context(tmp_path / "nothing", tmp_path / "image")


UV = shutil.which("uv") or (str(Path(sys.executable).parent / "uv") if (Path(sys.executable).parent / "uv").exists() else "")
FORBIDDEN = ("mlflow", "jupyterlab", "IPython", "papermill", "matplotlib", "pyarrow", "pytest", "sqlalchemy", "requests")


def environment_of(context, folder: Path) -> Path:
    "What the Dockerfile's first stage does, in a virtual environment: exactly requirements.txt, then the wheels without their dependencies."
    venv, python = folder / "venv", folder / "venv" / "bin" / "python"
    run = lambda *words: subprocess.run(words, check=True, capture_output=True, text=True, timeout=280)
    install = [UV, "pip", "install", "-q", "--python", str(python)] if UV else [str(python), "-m", "pip", "install", "-q"]
    run(UV, "venv", "-q", "--python", sys.executable, str(venv)) if UV else run(sys.executable, "-m", "venv", str(venv))
    run(*install, "--no-deps", "-r", str(context.folder / "requirements.txt"))
    run(*install, "--no-deps", *map(str, sorted((context.folder / "wheels").glob("*.whl"))))
    run(str(python), "-m", "compileall", "-qq", "--invalidation-mode", "unchecked-hash", str(venv / "lib"))
    return python


@pytest.fixture(scope="module")
def image(tmp_path_factory, database):
    "A context whose model has a class of the project, and the environment that its Dockerfile describes."
    from mlops_nb.core.settings import in_project

    folder = tmp_path_factory.mktemp("image")
    shop, before = new_shop(folder / "shop", database), list(sys.path)
    (shop / "shop_steps.py").write_text("import numpy as np\nfrom sklearn.base import BaseEstimator, TransformerMixin\n\nclass Logged(TransformerMixin, BaseEstimator):\n"
                                        "    def fit(self, rows, y=None):\n        self.fitted_ = True\n        return self\n    def transform(self, rows):\n        return np.log1p(np.asarray(rows, dtype=float))\n")
    sys.path.insert(0, str(shop))
    try:
        from shop_steps import Logged

        with in_project(shop):
            for scale in (1, 10):
                bundle = bundle_of(shop, make_pipeline(Logged(), StandardScaler(), LinearRegression()), "large", [scale * one for one in (3.0, 112.5, 16.0, 9.0)], trust=["shop_steps.Logged"])
                shutil.copytree(bundle.folder, folder / "models" / f"large-{bundle.version}")
            context = build_context(folder / "models", folder / "context", base=BASE)
            expected = [float(make_pipeline(Logged(), StandardScaler(), LinearRegression()).fit(ROWS, [3.0, 112.5, 16.0, 9.0]).predict(ROWS)[0]) * scale for scale in (1, 10)]
    finally:
        sys.path[:] = before
        sys.modules.pop("shop_steps", None)
    try:
        python = environment_of(context, folder)
    except subprocess.CalledProcessError as error:
        if "error sending request" in error.stderr or "Could not fetch" in error.stderr or "No matching distribution" in error.stderr:
            pytest.skip(f"no package index: {error.stderr[-200:]}")
        raise AssertionError(error.stderr) from error
    return context, python, expected


def started(context, python, tmp_path, **environment):
    "The Dockerfile's ENTRYPOINT and CMD with its ENV, where the image's folders are those of the context."
    text = (context.folder / "Dockerfile").read_text()
    entry, command = (json.loads(re.search(rf"(?m)^{word} (\[.*\])$", text)[1]) for word in ("ENTRYPOINT", "CMD"))
    given = dict(re.findall(r'(\w+)="([^"]*)"', re.search(r"(?ms)^ENV (.*?)\n(?=COPY)", text)[1]))
    given = {name: value.replace("/opt/mlops", str(context.folder)).replace("/opt/venv", str(python.parents[1])).replace("$PATH", "/usr/bin:/bin") for name, value in given.items()}
    (tmp_path / "root").mkdir()
    log = open(tmp_path / "log", "w")
    process = subprocess.Popen([str(python), *entry[1:], *command], cwd=tmp_path / "root", env={**given, "HOME": str(tmp_path / "root"), "TMPDIR": str(tmp_path / "root"), **environment},
                               stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    log.close()
    return process, given


def free():
    from mlops_nb.deploy.engine import free_port

    return free_port("127.0.0.1")


def got(url, body=None, patience_s=300, process=None, **headers):
    "Status and body, asked again until somebody answers, or the process that should has ended."
    import time
    from urllib.error import HTTPError, URLError
    from urllib.request import ProxyHandler, Request, build_opener

    latest = time.monotonic() + patience_s
    while True:
        try:
            with build_opener(ProxyHandler({})).open(Request(url, body, headers), timeout=20) as answer:
                return answer.status, answer.read()
        except HTTPError as error:
            return error.code, error.read()
        except (URLError, OSError):
            if time.monotonic() > latest or process and process.poll() is not None:
                raise
            time.sleep(0.1)


ROW = json.dumps({"instances": [[2.0, 1.5]]}).encode()
PLACES = {
    "docker": ({"MLOPS_TOKEN": "t0ken-of-the-test-1234567890", "MLOPS_PORT": "{port}", "MLOPS_HOST": "127.0.0.1", "MLOPS_PREDICTIONS": "{log}", "MLOPS_RATE_PER_S": "1000", "MLOPS_ORIGINS": "https://shop.example"}, "/ping", "/invocations", ROW, {"Authorization": "Bearer t0ken-of-the-test-1234567890"}),
    "sagemaker": ({"SAGEMAKER_BIND_TO_PORT": "{port}", "MLOPS_AUTH": "platform", "MLOPS_HOST": "127.0.0.1"}, "/ping", "/invocations", b"2.0,1.5\n", {"Content-Type": "text/csv", "Accept": "application/json"}),
    "vertex": ({"AIP_HTTP_PORT": "{port}", "AIP_HEALTH_ROUTE": "/alive", "AIP_PREDICT_ROUTE": "/v1/predict", "AIP_STORAGE_URI": "", "MLOPS_AUTH": "platform", "MLOPS_HOST": "127.0.0.1"}, "/alive", "/v1/predict", ROW, {}),
}


@pytest.mark.skipif(os.name != "posix", reason="images are Linux's")
@pytest.mark.parametrize("place", PLACES)
def test_the_entry_point_answers_in_a_clean_environment(image, tmp_path, place):
    "The proof of the image's content: nothing is installed but what the context names, and it answers as SageMaker, Vertex AI and docker ask."
    context, python, expected = image
    environment, ping, predict, body, headers = PLACES[place]
    port, log = free(), tmp_path / "predictions"
    log.mkdir()
    process, given = started(context, python, tmp_path, MLOPS_WORKERS="1", **{name: value.format(port=port, log=log) for name, value in environment.items()})
    try:
        try:
            assert got(f"http://127.0.0.1:{port}{ping}", process=process)[0] == 200
        except OSError:
            raise AssertionError((tmp_path / "log").read_text()) from None
        status, answer = got(f"http://127.0.0.1:{port}{predict}", body, **{"Content-Type": "application/json", **headers})
        assert status == 200, (answer, (tmp_path / "log").read_text())
        assert float(re.search(rb"-?\d+\.\d+(e-?\d+)?", answer)[0]) == pytest.approx(expected[1])  # the newest of the two versions inside
        probe = json.loads(re.search(r"HEALTHCHECK .* CMD (.*)", (context.folder / "Dockerfile").read_text())[1])
        health = {**given, **{name: value.format(port=port, log=log) for name, value in environment.items()}}
        assert subprocess.run([str(python), *probe[1:]], env=health, capture_output=True, timeout=120).returncode == 0
        if place == "docker":
            assert got(f"http://127.0.0.1:{port}{predict}", body, **{"Content-Type": "application/json"})[0] == 401
        process.terminate()  # what SageMaker and docker stop send
        assert process.wait(120) == 0, (tmp_path / "log").read_text()
        assert subprocess.run([str(python), *probe[1:]], env=health, capture_output=True, timeout=120).returncode != 0
        assert list(PredictionLog(log).read()["prediction"]) == ([pytest.approx(expected[1])] if place == "docker" else [])  # what writes them down is in the image
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.skipif(os.name != "posix", reason="images are Linux's")
def test_the_environment_holds_nothing_else(image):
    context, python, _ = image
    code = "import importlib.metadata as m, json; print(json.dumps(sorted(d.metadata['Name'].lower().replace('_', '-').replace('.', '-') for d in m.distributions())))"
    there = set(json.loads(subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, check=True).stdout)) - {"pip", "setuptools"}
    assert there == {name.replace("_", "-").replace(".", "-") for name in context.packages} | {"mlops-nb"}
    code = f"import importlib.util as u; print([n for n in {FORBIDDEN!r} if u.find_spec(n)])"
    assert subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    if UV:
        done = subprocess.run([UV, "pip", "check", "--python", str(python)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr  # the closure is complete for an independent reader of the metadata
    assert "code/shop_steps.py" in context.files and "MLOPS_TOKEN" not in (context.folder / "Dockerfile").read_text()


@pytest.mark.skipif(os.name != "posix", reason="images are Linux's")
def test_what_is_missing_is_said_in_a_sentence(image, tmp_path):
    context, python, _ = image
    process, _ = started(context, python, tmp_path, MLOPS_WORKERS="1", MLOPS_PORT=str(free()), MLOPS_HOST="127.0.0.1")
    assert process.wait(60) == 2
    assert "MLOPS_TOKEN" in (tmp_path / "log").read_text() and "Traceback" not in (tmp_path / "log").read_text()
