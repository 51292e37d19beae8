"""A notebook made ready for the documentation: reference entries read from its source, backticked names as links.

nbdev would import the module, run the cells that hold imports and ask each object about itself. Here nothing runs: the
signature that a reader sees is the one that the author wrote, comments and all, and a page is prepared in milliseconds.
"""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from fastcore.nbio import mk_cell
from nbdev import processors as steps
from nbdev.config import get_config

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
EXPORTS = {"export", "exports", "exporti"}


def fence(code: str, language: str = "python") -> str:
    "A fenced block that the code cannot end by itself."
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`{3,}", code)), default=0))
    return f"{ticks}{language}\n{code.rstrip()}\n{ticks}"


def prose(docstring: str) -> str:
    "A docstring as Markdown: `<` outside backticks is a character, not a tag."
    parts = re.split(r"(`[^`]*`)", docstring)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def is_public_field(node: ast.stmt) -> bool:
    "Whether a statement in a class sets an attribute that a user may read."
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return any(isinstance(one, ast.Name) and not one.id.startswith("_") for one in targets)


def signature(node: ast.stmt, lines: list[str]) -> str:
    "The lines of a definition up to its body; of a class the public fields too."
    first = min(one.lineno for one in [node, *node.decorator_list])
    head = lines[first - 1 : max(node.body[0].lineno - 1, node.lineno)]
    if node.body[0].lineno == node.lineno:  # body on the same line
        head[-1] = lines[node.lineno - 1][: node.body[0].col_offset].rstrip()
    if isinstance(node, ast.ClassDef):
        head += [line for one in node.body if is_public_field(one) for line in lines[one.lineno - 1 : one.end_lineno]]
    indent = len(head[0]) - len(head[0].lstrip())
    return "\n".join(line[indent:] for line in head).rstrip()


def entry(node: ast.stmt, lines: list[str], owner: str = "") -> Iterator[str]:
    "Heading with its anchor, signature and docstring; for a class its public methods as well."
    name = f"{owner}.{node.name}" if owner else node.name
    yield f"{'####' if owner else '###'} {name} {{#{name.lower()} .api}}"
    yield fence(signature(node, lines))
    yield prose(ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            if isinstance(method, DEFINITIONS) and not method.name.startswith("_"):
                yield from entry(method, lines, name)


def reference(source: str, public: bool) -> str:
    "What the page says in place of an exported cell: an entry per public name, and the source, folded."
    source = "\n".join(line for line in source.splitlines() if not line.startswith("#|"))
    defined = [node for node in ast.parse(source).body if isinstance(node, DEFINITIONS)]
    parts = [part for node in defined if public and not node.name.startswith("_") for part in entry(node, source.splitlines())]
    if defined:
        names = ", ".join(f"<code>{node.name}</code>" for node in defined)
        parts.append(f'<details class="source" markdown="1">\n<summary>Source of {names}</summary>\n\n{fence(source)}\n\n</details>')
    return "\n\n".join(part for part in parts if part)


class Reference(steps.Processor):
    "Puts the reference entries after the exported cells."

    def begin(self) -> None:
        for i in reversed(range(len(self.nb.cells))):
            cell = self.nb.cells[i]
            kinds = EXPORTS & set(cell.directives_)
            if cell.cell_type == "code" and kinds and "hide" not in cell.directives_:
                if text := reference(cell.source, public=kinds != {"exporti"}):
                    self.nb.cells.insert(i + 1, mk_cell(text, "markdown"))


@cache
def public_names(module: Path) -> set[str]:
    "What a generated module lists in `__all__`."
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


@cache
def api(library: Path) -> dict[str, str]:
    "Address by name for all that is documented: `save`, `Report.save`, `mlops_nb.core.report.Report`; a name used twice has none."
    links: dict[str, str] = {}
    twice = set()
    index = library / "_modidx.py"
    for module, names in (runpy.run_path(str(index))["d"]["syms"] if index.exists() else {}).items():
        for full, (address, file) in names.items():
            name = full.removeprefix(f"{module}.")
            if name.split(".")[0] not in public_names(library.parent / file) or any(part.startswith("_") for part in name.split(".")):
                continue
            twice |= {name} & links.keys()
            links |= {full: f"/{address}", name: f"/{address}"}
    return {name: address for name, address in links.items() if name not in twice}


def link_names(cell: object) -> None:
    "Links backticked names of the library to their reference entries."
    if cell.cell_type != "markdown":
        return
    links = api(get_config().lib_path)

    def link(match: re.Match) -> str:
        address = links.get(match[1].removesuffix("()"))
        return f"[{match[0]}]({address})" if address else match[0]

    cell.source = outside_code(lambda text: re.sub(r"(?<![\[`])`([\w.]+(?:\(\))?)`(?![\]`])", link, text), cell.source)


def outside_code(change: Callable[[str], str], text: str) -> str:
    "Change the text, but not its fenced code."
    parts = re.split(r"(?ms)(^(`{3,})[^\n]*\n.*?^\2[ ]*$)", text)
    return "".join(part if i % 3 == 1 else change(part) for i, part in enumerate(parts) if i % 3 != 2)


class Prepared(steps.FilterDefaults):
    "nbdev's own preparation of a notebook with our reference and links, and with the sentences after the title kept."

    def base_procs(self) -> list:
        ours = {steps.add_show_docs: Reference, steps.add_links: link_names}
        left_out = (steps.clean_show_doc, steps.exec_show_docs, steps.insert_warning)
        return [ours.get(step, step) for step in super().base_procs() if step not in left_out]

    def __call__(self, nb: object) -> None:
        opening = nb.cells[0]
        if head := re.match(r"\s*#\s[^\n]*\n+(>[^\n]*\n?)*", opening.source + "\n"):
            rest = opening.source[head.end() :].strip()
            opening.source = head.group().strip()
            if rest:
                nb.cells.insert(1, mk_cell(rest, "markdown"))
        super().__call__(nb)
