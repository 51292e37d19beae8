"""The architecture, as a test: imports go down, big libraries have one door each, and importing the package is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mlops_nb"
ROWS = [{"core"}, {"data"}, {"model"}, {"validate", "monitor"}, {"serve"}, {"deploy"}, {"pipeline"}, {"interface"}]
FLOOR = {name: row for row, names in enumerate(ROWS) for name in names}
DOORS = {
    "mlflow": {"model/backend.py", "deploy/mlflow_plugin.py"},
    "papermill": {"pipeline/notebook.py"},
    "starlette": {"serve/app.py"},
    "granian": {"serve/server.py"},
    "matplotlib": {"core/plots.py"},
    "jupyter_server": {"interface/lab.py"},
    "tornado": {"interface/lab.py", "pipeline/kernels.py"},
    "jupyter_client": {"pipeline/kernels.py", "pipeline/live.py"},
    "apscheduler": {"pipeline/calendar.py"},
    "skops": {"model/trust.py"},
    "cleanlab": {"data/labels.py"},
    "deltalake": {"data/delta.py"},
    "fsspec": {"data/transfer.py"},
    "pandera": {"data/schema_formats.py"},
    "pyfastcdc": {"data/chunks.py"},
    "prometheus_client": {"serve/observe.py"},
    "grpc": {"serve/grpc.py"},
    "opentelemetry": {"serve/traces.py"},
    "uvloop": {"serve/workers.py"},
}
HEAVY = ("mlflow", "papermill", "sklearn", "pandas", "numpy", "starlette", "jupyter_server", "pyarrow", "matplotlib", "IPython", "pydantic")
EDGES = {"cli", "magics", "lab"}
MODULES = sorted(path for path in PACKAGE.glob("*/*.py") if path.parent.name in FLOOR)


def imports(path: Path) -> list[tuple[str, bool]]:
    """(absolute module name, whether it is imported when the module is) of every import statement."""
    found = []
    tree = ast.parse(path.read_text())
    for node in tree.body:  # what only a type checker reads is not imported
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            late = parent is not tree
            if isinstance(node, ast.Import):
                found += [(alias.name, not late) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = list(path.relative_to(ROOT).with_suffix("").parts[: -node.level]) if node.level else []
                found.append((".".join([*base, *([node.module] if node.module else [])]), not late))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_only_its_own_folder_or_a_lower_floor(path):
    here = path.parent.name
    for module, _ in imports(path):
        parts = module.split(".")
        if parts[0] != "mlops_nb" or len(parts) < 2 or parts[1] not in FLOOR:
            continue
        assert parts[1] == here or FLOOR[parts[1]] < FLOOR[here], f"{here}/{path.name} imports {module}: that is not below it"


def test_the_edges_do_not_import_each_other():
    allowed = {("magics", "cli")}  # one parser for both: the magic reads the command line's
    for path in MODULES:
        if path.parent.name == "interface" and path.stem in EDGES:
            for module, _ in imports(path):
                other = module.removeprefix("mlops_nb.interface.")
                assert other not in EDGES - {path.stem} or (path.stem, other) in allowed, f"{path.stem} imports {other}"


@pytest.mark.parametrize("library", DOORS)
def test_a_big_library_has_one_door(library):
    users = {f"{path.parent.name}/{path.name}" for path in MODULES for module, _ in imports(path) if module.split(".")[0] == library}
    assert users <= DOORS[library]
    assert users, f"nothing imports {library} any more: drop it from the dependencies and from this table"


def test_only_the_interface_knows_ipython():
    users = {path.parent.name for path in MODULES for module, _ in imports(path) if module.split(".")[0] == "IPython"}
    assert users <= {"interface"}


@pytest.mark.parametrize("statement", ["import mlops_nb", "import mlops_nb as m; m.init; m.save; m.status; m.deployments; dir(m)"])
def test_importing_the_package_is_light(statement):
    code = f"import sys; {statement}; print(' '.join(m for m in {HEAVY[:-1]!r} if m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout.split()
    assert out == []


def test_help_of_every_verb_is_light():
    code = (f"import sys, contextlib, io\nfrom mlops_nb.interface.cli import verb_parser\nfrom mlops_nb.interface.verbs import VERBS\n"
            f"for verb in VERBS.values(): verb_parser(verb).format_help()\nprint(' '.join(m for m in {HEAVY[:8]!r} if m in sys.modules))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout.split()
    assert out == []


def test_nothing_is_unpickled():
    "Except a notebook's state that this user has sealed with a key of their own."
    for path in MODULES:
        if path == PACKAGE / "pipeline" / "checkpoints.py":
            continue
        modules = {module.split(".")[0] for module, _ in imports(path)}
        assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_module_has_one_idea(path):
    assert len(path.read_text().splitlines()) <= 400, "over 400 lines: a second notebook"
