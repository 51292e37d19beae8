"""What the browser tests share: chromium, a JupyterLab of one's own, and how to read a page.

`python tests/browser.py --install` installs chromium from Debian's packages where it is missing.
In a test module: `from browser import chromium, jupyter_lab, page`, then ask for the fixtures `page` and start `jupyter_lab(...)`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlops_nb.deploy.engine import free_port

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
PACKAGES = ("chromium", "fonts-dejavu-core")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
).split()
TOKEN = "browser-test"


def chromium_path() -> str:
    "The browser: `$CHROMIUM`, or the first one on the PATH; otherwise an error that names the package."
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not path:
        raise FileNotFoundError(f"The browser tests need chromium: `apt-get install {' '.join(PACKAGES)}`, or set CHROMIUM to a browser's path.")
    return path


def install_chromium() -> None:
    "Install it from Debian's packages when it is missing and we may; otherwise say which package to install."
    try:
        chromium_path()
    except FileNotFoundError as missing:
        may = os.geteuid() == 0 and shutil.which("apt-get")
        if not may:
            raise SystemExit(str(missing)) from None
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
            if subprocess.run(["apt-get", *command], env=quiet, stdout=subprocess.DEVNULL).returncode:
                raise SystemExit(f"`apt-get {' '.join(command)}` failed. {missing}") from None


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    "A headless chromium for the module's tests; it ends with the module, because playwright keeps an event loop running."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    "A fresh page; `page.faults` collects uncaught errors of its scripts."
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60_000)  # a wait ends as soon as it can; this is for machines with much else to do
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    yield page
    context.close()


@dataclass
class Lab:
    "A running JupyterLab."

    url: str
    log: Path

    def open(self, page: Any, path: str = "lab") -> None:
        "Open it in the page and wait until it is there."
        page.goto(f"{self.url}/{path}?token={TOKEN}&reset")
        page.wait_for_selector("#jupyterlab-splash", state="detached")
        page.wait_for_selector(".jp-SideBar.jp-mod-left")

    def execute(self, page: Any, command: str, **args: Any) -> None:
        "Execute one of JupyterLab's commands, and wait until it is done or for a minute: some never end when a kernel goes meanwhile."
        script = "([id, args]) => Promise.race([window.jupyterapp.commands.execute(id, args).then(() => null), new Promise(end => setTimeout(end, 60000))])"
        page.evaluate(script, [command, args])


@contextmanager
def jupyter_lab(
    root: Path,  # the folder to serve
    home: Path,  # an empty folder for everything a user's home would hold
    *,
    config: str = "",  # Python, run in the server as its configuration file
    env: dict[str, str] | None = None,  # added to the server's environment
    timeout_s: float = 300,  # how long it may take to start
) -> Iterator[Lab]:
    "Start JupyterLab on a free port with a home of its own; stop it, kernels and all, at the end."
    folders = {
        "HOME": home,
        "IPYTHONDIR": home / "ipython",
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_DATA_DIR": home / "data",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
    }
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    news = folders["JUPYTERLAB_SETTINGS_DIR"] / "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    news.parent.mkdir(parents=True, exist_ok=True)
    news.write_text('{"fetchNews": "false"}')
    (folders["JUPYTER_CONFIG_DIR"] / "jupyter_server_config.py").write_text(config)
    port = free_port("127.0.0.1")
    log = home / "jupyter.log"
    options = [
        "--no-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={TOKEN}",
        "--allow-root",
        f"--ServerApp.root_dir={root}",
        "--LabApp.extension_manager=readonly",
        "--LabApp.expose_app_in_browser=True",
    ]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("JUPYTER")}
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            cwd=root,
            env={**clean, **{key: str(folder) for key, folder in folders.items()}, **(env or {})},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        lab = Lab(f"http://127.0.0.1:{port}", log)
        wait_for(f"{lab.url}/api/status?token={TOKEN}", server, log, timeout_s)
        yield lab
    finally:
        stop(server)


def wait_for(url: str, server: subprocess.Popen, log: Path, timeout_s: float) -> None:
    "Wait until the server answers; its log is the message when it does not."
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-4000:]}")


def stop(server: subprocess.Popen) -> None:
    "End the server and whatever it started."
    try:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(60)
    except ProcessLookupError:
        server.wait(60)


FAINT = """
(selector) => {
  const parse = css => { const n = css.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] === undefined ? 1 : n[3]]; };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const background = node => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]);
  };
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const found = [];
  for (const node of document.querySelectorAll(selector + ', ' + selector + ' *')) {
    const text = [...node.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join('').trim();
    if (!text || !node.checkVisibility()) continue;
    const under = background(node), [a, b] = [light(over(parse(getComputedStyle(node).color), under)), light(under)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${text.slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return found;
}
"""


def faint_texts(page: Any, selector: str) -> list[str]:
    "The texts below `selector` whose contrast is under 4.5 to 1, WCAG 2.1's level AA (success criterion 1.4.3)."
    return page.evaluate(FAINT, selector)


if __name__ == "__main__":
    if sys.argv[1:] == ["--install"]:
        install_chromium()
    print(chromium_path())
