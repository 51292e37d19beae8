"""Build the documentation site from the notebooks and `_quarto.yml`: with Quarto when it is installed, otherwise with Zensical.

Both routes prepare a notebook in the same way (`prepare.py`) and give pages the same addresses. The Zensical route works without
a network and makes a site that asks no other host for anything. It builds into a temporary folder and renames it at the end,
so that a failed build leaves the old site as it was.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import chdir
from dataclasses import dataclass, field
from functools import cache
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from fastcore.nbio import read_nb
from prepare import Prepared, fence, outside_code

CALLOUTS = {"note": "note", "tip": "tip", "warning": "warning", "caution": "danger", "important": "info"}
EXTENSIONS = ("admonition attr_list def_list footnotes md_in_html tables pymdownx.details pymdownx.inlinehilite pymdownx.superfences "
              "pymdownx.highlight").split()
FEATURES = ["content.code.copy", "navigation.footer", "navigation.indexes", "navigation.path", "navigation.top", "search.highlight", "toc.follow"]
PALETTE = [
    {"media": "(prefers-color-scheme)", "toggle": {"icon": "lucide/sun-moon", "name": "Light"}},
    {"media": "(prefers-color-scheme: light)", "scheme": "default", "toggle": {"icon": "lucide/sun", "name": "Dark"}},
    {"media": "(prefers-color-scheme: dark)", "scheme": "slate", "toggle": {"icon": "lucide/moon", "name": "As the system"}},
]


@dataclass
class Page:
    "One page: its address without an ending, its title, its Markdown and the HTML that is put in after the Markdown is done."

    path: str  # relative to nbs/, without the ending, such as core/report
    title: str = ""
    parts: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)

    def hold(self, html: str) -> str:
        "A place for HTML that Markdown must not touch."
        self.held.append(html)
        return f'<div class="nb-output" data-held="{len(self.held) - 1}"></div>'


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def output(page: Page, out: dict) -> str:
    "A cell's output in the richest form that needs no kernel."
    data = out.get("data", {})
    for kind in ("text/html", "image/svg+xml"):
        if kind in data:
            return page.hold(joined(data[kind]))
    if "image/png" in data:
        return page.hold(f'<img alt="" src="data:image/png;base64,{joined(data["image/png"]).strip()}">')
    if "text/markdown" in data:
        return joined(data["text/markdown"])
    text = f"{out['ename']}: {out['evalue']}" if out["output_type"] == "error" else joined(out.get("text") or data.get("text/plain", ""))
    return page.hold(f"<pre>{escape(text.rstrip())}</pre>") if text.strip() else ""


def callout(match: re.Match) -> str:
    "A Quarto callout as an admonition."
    kind, options, body = match.groups()
    heading = re.match(r"\s*#+ ([^\n]+)\n", body)
    named = re.search(r'title="([^"]*)"', options)
    title = named.group(1) if named else heading.group(1) if heading else kind.capitalize()
    text = body[heading.end() :] if heading and not named else body
    mark = "???" if 'collapse="true"' in options else "!!!"
    return f'{mark} {CALLOUTS.get(kind, "note")} "{title}"\n\n' + "\n".join(f"    {line}" if line else "" for line in text.strip().splitlines()) + "\n"


def prepare_text(page: Page, text: str) -> str:
    "Callouts, and links between notebooks as links between pages."
    up = "../" * page.path.count("/")

    def change(part: str) -> str:
        part = re.sub(r"(?ms)^:::+ *\{\.callout-(\w+)([^}]*)\}\n(.*?)^:::+ *$", callout, part)
        part = re.sub(r"(\]\((?![a-z]+:)[^)\s]*?)\.ipynb(?=[#)])", r"\1.html", part)
        return re.sub(r"\]\(/(?=[^)\s]*\.html)", f"]({up}", part)

    return outside_code(change, text)


def read_page(notebook: Path, nbs: Path) -> Page:
    "A notebook as a page."
    try:
        nb = read_nb(notebook)
        Prepared()(nb)
    except (ValueError, KeyError, SyntaxError) as error:
        raise SystemExit(f"docs: {notebook} cannot be read as a notebook: {error}") from None
    page = Page(notebook.relative_to(nbs).with_suffix("").as_posix())
    about = getattr(nb, "frontmatter_", {})
    page.title = str(about.get("title") or notebook.stem)
    page.parts += [f"# {page.title}", *([f"{about['description']}\n{{: .lead }}"] if about.get("description") else [])]
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            page.parts.append(prepare_text(page, cell.source))
        elif cell.cell_type == "code":
            code = "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith("#|"))
            if code.strip() and not re.search(r"#\|\s*echo:\s*false", cell.source):
                page.parts.append(fence(code, cell.metadata.get("language", "python")))
            page.parts += filter(None, (output(page, out) for out in cell.get("outputs", [])))
    return page


def sidebar(contents: list, pages: dict[str, Page], missing: list[str]) -> list[dict]:
    "Quarto's sidebar as Zensical's navigation; what is not there yet is left out and listed in `missing`."
    items = []
    for one in contents:
        one = {"href": one} if isinstance(one, str) else one
        if "contents" in one:
            if inner := sidebar(one["contents"], pages, missing):
                items.append({one["section"]: inner})
        elif page := pages.pop(one["href"].removesuffix(".ipynb"), None):
            items.append({one.get("text") or page.title: f"{page.path}.md"})
        else:
            missing.append(one["href"])
    return items


def write_sources(pages: dict[str, Page], nbs: Path, to: Path) -> None:
    "The Markdown of every page, and the pictures and the style sheet beside the notebooks."
    for page in pages.values():
        path = to / f"{page.path}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"---\ntitle: {json.dumps(page.title)}\n---\n\n" + "\n\n".join(page.parts) + "\n", encoding="utf-8")
    for path in nbs.rglob("*"):
        if path.suffix in (".css", ".svg", ".png") and not path.relative_to(nbs).parts[0].startswith((".", "_")):
            (to / path.relative_to(nbs)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to / path.relative_to(nbs))


def zensical(title: str, nav: list[dict], folder: Path) -> None:
    "Build folder/docs into folder/site. The configuration is JSON, which is YAML."
    config = {
        "site_name": title, "docs_dir": "docs", "site_dir": "site", "use_directory_urls": False, "nav": nav, "extra_css": ["styles.css"],
        "theme": {"font": False, "features": FEATURES, "palette": PALETTE, "icon": {"logo": "lucide/notebook-tabs"}},
        "markdown_extensions": [*EXTENSIONS, {"toc": {"permalink": True, "toc_depth": 3}}],
    }
    (folder / "mkdocs.yml").write_text(json.dumps(config))
    done = subprocess.run([sys.executable, "-m", "zensical", "build"], cwd=folder, capture_output=True, text=True)
    if done.returncode or not (folder / "site").is_dir():
        raise SystemExit(f"docs: Zensical could not build the pages:\n{done.stdout}{done.stderr}")


def put_back(page: Page, site: Path) -> None:
    "Put the held HTML into the built page, each piece exactly once."
    path = site / f"{page.path}.html"
    text, n = re.subn(r'<div class="nb-output" data-held="(\d+)"></div>', lambda m: f'<div class="nb-output">{page.held[int(m[1])]}</div>',
                      path.read_text(encoding="utf-8"))
    if n != len(page.held):
        raise SystemExit(f"docs: {page.path}: {len(page.held)} outputs, of which {n} have a place on the built page.")
    path.write_text(text, encoding="utf-8")


class Anchors(HTMLParser):
    "The names a built page defines, what it links to, and what it would load from another host."

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names, self.links, self.foreign = {""}, set(), set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.names |= {found.get("id") or "", found.get("name") or ""}
        if tag == "a" and found.get("href"):
            self.links.add(found["href"])
        loaded = found.get("src") or (found.get("href") if tag == "link" else "") or ""
        if re.match(r"(https?:)?//", loaded):
            self.foreign.add(loaded)


def link_faults(site: Path) -> list[str]:
    "Links to a page or an anchor that does not exist, and anything that another host would have to deliver."
    anchors = cache(lambda path: Anchors(path.read_text(encoding="utf-8")))
    faults = []
    for path in sorted(set(site.rglob("*.html")) - {site / "404.html"}):
        here = path.relative_to(site).as_posix()
        faults += [f"{here} loads {url} from another host" for url in sorted(anchors(path).foreign)]
        for link in sorted(anchors(path).links):
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path.resolve()
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                faults.append(f"{here} links to {link}, which does not exist")
            elif target.suffix == ".html" and unquote(url.fragment) not in anchors(target).names:
                faults.append(f"{here} links to {link}, but that page has no such heading")
    return faults


def replace(old: Path, new: Path, aside: Path) -> None:
    "Put the new folder where the old one was; the old one goes only when the new one is there."
    if old.exists():
        old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        if aside.exists():
            aside.rename(old)
        raise


def build(project: Path, to: Path) -> list[str]:
    "Build the site with Zensical into `to`; returns what a reader would miss."
    website = yaml.safe_load((project / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    nbs = project / "nbs"
    found = sorted(path for path in nbs.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in path.relative_to(nbs).parts))
    pages = {page.path: page for page in (read_page(path, nbs) for path in found)}
    missing, left = [], dict(pages)
    nav = sidebar(website["sidebar"]["contents"], left, missing)
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".docs-", dir=to.parent) as work:
        folder = Path(work).resolve()
        write_sources(pages, nbs, folder / "docs")
        zensical(website["title"], nav, folder)
        for page in pages.values():
            put_back(page, folder / "site")
        faults = [f"the sidebar of _quarto.yml lists {href}, which does not exist" for href in missing]
        faults += [f"{path}.ipynb is not in the sidebar of _quarto.yml" for path in left] + link_faults(folder / "site")
        replace(to, folder / "site", folder / "old")
    return faults


def quarto() -> list[str]:
    "`nbdev-docs`, with our preparation of a notebook, into the folder that pyproject.toml names; returns what a reader would miss."
    from nbdev import serve
    from nbdev.quarto import nbdev_docs

    serve.FilterDefaults = Prepared
    nbdev_docs(n_workers=1)
    return link_faults(Path("_docs"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--project", type=Path, default=Path(__file__).resolve().parent.parent, help="the folder that holds _quarto.yml")
    parser.add_argument("--to", type=Path, default=Path("_docs"), help="where Zensical's site goes")
    parser.add_argument("--with", dest="tool", choices=("quarto", "zensical"), default="quarto" if shutil.which("quarto") else "zensical")
    parser.add_argument("--strict", action="store_true", help="fail when a page or a link is missing")
    options = parser.parse_args()
    if not (options.project / "_quarto.yml").is_file():
        raise SystemExit(f"docs: {options.project} holds no _quarto.yml; give the project's folder with --project.")
    with chdir(options.project):
        faults = quarto() if options.tool == "quarto" else build(Path.cwd(), Path.cwd() / options.to)
    for fault in faults:
        print(f"docs: {fault}", file=sys.stderr)
    if faults and options.strict:
        raise SystemExit(f"docs: {len(faults)} faults; the site is in {options.to}.")
    print(f"docs: {options.to}/index.html")


if __name__ == "__main__":
    main()
