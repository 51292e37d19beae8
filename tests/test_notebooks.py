"""The countable rules of a literate notebook: what a reader may expect of every page."""

import ast
import json
import os
import re
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path for folder in ("nbs", "examples") for path in (ROOT / folder).rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
MODULES = [path for path in NOTEBOOKS if "#| default_exp" in path.read_text(encoding="utf-8")]
LINK = re.compile(r"\]\(([^)#\s]+\.ipynb)(?:#[^)]*)?\)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def cells(path: Path, kind: str = "code") -> list[dict]:
    return [{**cell, "text": "".join(cell["source"])} for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def exported(cell: dict) -> bool:
    return cell["text"].lstrip().startswith("#| export")


def lesson(cell: dict) -> bool:
    return not cell["text"].lstrip().startswith("#|") and bool(cell["text"].strip())


def statements(cell: dict) -> list[ast.stmt]:
    return ast.parse(TransformerManager().transform_cell(cell["text"])).body


def is_import(node: ast.stmt) -> bool:
    guarded = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return guarded or isinstance(node, (ast.Import, ast.ImportFrom))


def only_imports(cell: dict) -> bool:
    return all(is_import(node) for node in statements(cell))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_it_opens_with_a_title_and_what_it_is_for(path):
    first = cells(path, "markdown")[0]["text"].splitlines()
    assert first[0].startswith("# ")
    assert any(line.startswith("> ") for line in first[:4]), "a '>' line says what the page is for"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_every_export_has_its_lesson(path):
    code = cells(path)
    exports = [cell for cell in code if exported(cell) and not only_imports(cell)]
    lessons = [cell for cell in code if lesson(cell) and not only_imports(cell)]
    public = [cell for cell in exports if re.match(r"#\| export\n", cell["text"]) and re.search(r"^(def|class) [a-z A-Z]", cell["text"], re.M)]
    assert len(lessons) >= len(public), f"{len(public)} public cells, {len(lessons)} lessons"
    assert max((len(cell["text"].splitlines()) for cell in exports), default=0) <= 60, "an exported cell over 60 lines teaches nothing"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_sit_in_cells_of_their_own(path):
    for cell in cells(path):
        if exported(cell) and not only_imports(cell):
            assert not any(is_import(node) for node in statements(cell)), cell["text"][:80]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_lesson_ends_in_a_value_and_shows_it(path):
    for cell in cells(path):
        if lesson(cell):
            assert not any(ast.unparse(node).startswith("print(") for node in statements(cell)), cell["text"][:80]
    assert any(cell["outputs"] for cell in cells(path)), "outputs are kept: a reader sees them without running"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_it_ends_with_how_it_fits(path):
    assert "## How it fits" in cells(path, "markdown")[-1]["text"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_links_lead_somewhere(path):
    for cell in cells(path, "markdown"):
        for target in LINK.findall(cell["text"]):
            assert "://" in target or (path.parent / target).resolve().exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_outputs_hold_no_machine(path):
    for cell in cells(path):
        text = json.dumps(cell["outputs"])
        assert not re.search(r"(?<![\w.])/(home|root|work|Users|private|var/folders)/|/tmp/(?!\W)\w{4,}", text), re.search(r"/(home|root|work|tmp)\S{0,60}", text)
        assert "Traceback (most recent call last)" not in text


def test_quarto_has_one_configuration():
    link = ROOT / "nbs" / "_quarto.yml"
    assert link.is_symlink() and os.readlink(link) == "../_quarto.yml"
