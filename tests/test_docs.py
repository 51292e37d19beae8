"""The documentation site: complete, faithful to the notebooks, and without a request to any other host."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from browser import chromium, page  # noqa: F401  fixtures

ROOT = Path(__file__).parent.parent
REPORT = """<div class="mlops-report"><style>
.mlops-report b{color:inherit}

.mlops-report td > b{font-weight:600}
</style><p>2 * 3 * 4 _is_ 24</p>

    <p>indented like code</p>

<svg viewBox="0 0 9 9" role="img"><path d="M0 0

h9" stroke="currentColor"/></svg></div>"""
LIBRARY = '''#| export
from __future__ import annotations


def settle(
    amount: Money,  # what is owed
    *,
    currency: str = "GBP",  # three letters
) -> Money:  # what is left
    "Settle an account; an address is `name` or <hash prefix>."
    return amount


class Account:
    """Money, and `settle` for it."""

    owner: str = ""
    _secret = 1

    def close(self) -> None:
        "Close it."

    def _hidden(self) -> None: ...'''


def cell(source: str, *outputs: dict) -> dict:
    kind = "markdown" if source.startswith("@") else "code"
    more = {} if kind == "markdown" else {"outputs": list(outputs), "execution_count": None}
    return {"cell_type": kind, "id": f"c{abs(hash(source)) % 10**8}", "metadata": {}, "source": source.removeprefix("@"), **more}


def shown(**data: str) -> dict:
    return {"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": {kind.replace("_", "/"): text for kind, text in data.items()}}


def write_notebook(path: Path, *cells: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


def write_project(folder: Path, *cells: dict, contents: tuple = ("index.ipynb", "shop/account.ipynb")) -> Path:
    "A project with a front page and one module, `account`."
    write_notebook(folder / "nbs/index.ipynb", cell("@# Shop\n\n> A shop.\n\nThe [account](shop/account.ipynb#settle), and `settle`."))
    write_notebook(folder / "nbs/shop/account.ipynb", cell("@# Account\n\n> Who owes what.\n\nA shop must know: really."),
                   cell("#| default_exp shop.account"), cell(LIBRARY), *cells)
    (folder / "shop/shop").mkdir(parents=True)
    (folder / "shop/shop/account.py").write_text("__all__ = ['settle', 'Account']\n")
    names = {f"shop.shop.account.{name}": (f"shop/account.html#{name.lower()}", "shop/shop/account.py") for name in ("settle", "Account", "Account.close")}
    (folder / "shop/_modidx.py").write_text(f"d = {{'settings': {{}}, 'syms': {{'shop.shop.account': {names}}}}}")
    (folder / "pyproject.toml").write_text('[project]\nname = "shop"\n[tool.nbdev]\nnbs_path = "nbs"\nlib_path = "shop"\ndoc_path = "_docs"\ncustom_sidebar = true\n')
    (folder / "_quarto.yml").write_text(json.dumps({"project": {"type": "website"}, "website": {"title": "Shop", "sidebar": {"contents": list(contents)}}}))
    (folder / "nbs/styles.css").write_text("")
    return folder


def docs(project: Path, *options: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "tools/docs.py", "--project", project, *options], capture_output=True, text=True, env={**os.environ, **env}, timeout=1200)


def built(project: Path, *options: str) -> str:
    "The account's page."
    done = docs(project, "--with", "zensical", "--strict", *options)
    assert done.returncode == 0, done.stderr
    return (project / "_docs/shop/account.html").read_text()


def test_outputs_arrive_as_they_are(tmp_path):
    text = built(write_project(tmp_path, cell("report", shown(text_html=REPORT, text_plain="a report")), cell("1 < 2", shown(text_plain="True <b>")),
                               cell("picture", shown(**{"image_svg+xml": "<svg><!-- one --></svg>"})),
                               cell("%%bash\nfalse", {"output_type": "stream", "name": "stderr", "text": "no <such> thing\n"})))
    assert f'<div class="nb-output">{REPORT}</div>' in text, "blank lines, stars and indents must not become Markdown"
    assert "<pre>True &lt;b&gt;</pre>" in text and "<svg><!-- one --></svg>" in text and "no &lt;such&gt; thing" in text
    assert "a report" not in text, "the richest form is enough"


def test_the_reference_is_what_the_author_wrote(tmp_path):
    text = built(write_project(tmp_path))
    code = re.sub(r"<[^>]+>", "", text)
    assert 'id="settle"' in text and 'id="account.close"' in text and "account._hidden" not in text
    assert "amount: Money,  # what is owed" in code, "an annotation that exists only for type checkers is shown, not evaluated"
    assert "&lt;hash prefix&gt;" in text, "angle brackets in a docstring are text"
    assert re.search(r'<a href="[^"]*#settle"><code>settle</code></a> for it', text), "a name in backticks leads to its entry"
    assert "owner: str" in code.split("Source of")[1] and "_secret" not in code.split("Source of")[0]
    assert "A shop must know: really." in text, "the sentences after the title stay"


def test_callouts_and_code_that_holds_fences(tmp_path):
    text = built(write_project(tmp_path, cell("@::: {.callout-tip}\n## Small shops\nUse `settle`.\n:::"), cell('page = """\n```python\n[x](y.ipynb)\n```\n"""')))
    assert re.search(r'class="admonition tip".*?Small shops.*?#settle', text, re.DOTALL)
    assert "[x](y.ipynb)" in re.sub(r"<[^>]+>", "", text), "code is not rewritten"


@pytest.mark.parametrize("cells, contents, fault", [
    ([cell("@See [the till](till.ipynb).")], ("index.ipynb", "shop/account.ipynb"), "shop/account.html links to till.html, which does not exist"),
    ([cell("@See [paying](#paying).")], ("index.ipynb", "shop/account.ipynb"), "links to #paying, but that page has no such heading"),
    ([], ("index.ipynb", "shop/account.ipynb", "shop/till.ipynb"), "the sidebar of _quarto.yml lists shop/till.ipynb, which does not exist"),
    ([], ("index.ipynb",), "shop/account.ipynb is not in the sidebar"),
    ([cell("logo", shown(text_html='<img src="https://example.com/logo.png">'))], ("index.ipynb", "shop/account.ipynb"),
     "shop/account.html loads https://example.com/logo.png from another host"),
], ids=["dead link", "dead anchor", "missing page", "unlisted page", "foreign picture"])
def test_strict_names_what_a_reader_would_miss(tmp_path, cells, contents, fault):
    project = write_project(tmp_path, *cells, contents=contents)
    strict = docs(project, "--with", "zensical", "--strict")
    assert strict.returncode == 1 and fault in strict.stderr
    assert (project / "_docs/index.html").is_file(), "the rest can be read all the same"


@pytest.mark.parametrize("fault", ["builder", "notebook", "code"])
def test_a_failed_build_leaves_the_old_site(tmp_path, fault):
    project = write_project(tmp_path / "project")
    before = built(project)
    broken = tmp_path / "broken"
    if fault == "builder":
        (broken / "zensical").mkdir(parents=True)
        (broken / "zensical/__init__.py").touch()
        (broken / "zensical/__main__.py").write_text("raise SystemExit('no builder today')")
        expected = "no builder today"
    else:
        text = '{"cells": [' if fault == "notebook" else json.dumps({"cells": [cell("@# Till"), cell("#| export\ndef till(:")], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
        (project / "nbs/till.ipynb").write_text(text)
        expected = "till.ipynb cannot be read as a notebook"
    done = docs(project, "--with", "zensical", PYTHONPATH=str(broken))
    assert done.returncode == 1 and expected in done.stderr and "Traceback" not in done.stderr
    assert (project / "_docs/shop/account.html").read_text() == before
    assert {path.name for path in project.iterdir()} == {"_docs", "_quarto.yml", "nbs", "pyproject.toml", "shop"}, "nothing is left behind"


def test_quarto_gets_the_same_pages(tmp_path):
    "With `quarto` on the PATH nbdev-docs runs it; a stand-in shows what it would be given."
    project = write_project(tmp_path / "project")
    (project / "nbs/_quarto.yml").symlink_to("../_quarto.yml")
    stand_in = tmp_path / "bin/quarto"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\nset -e; mkdir -p _docs; cp shop/account.ipynb styles.css _docs/\n')
    stand_in.chmod(0o755)
    done = docs(project, PATH=f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    texts = ["".join(one["source"]) for one in json.loads((project / "_docs/account.ipynb").read_text())["cells"]]
    assert any("### settle {#settle .api}" in text and "# what is owed" in text for text in texts)
    assert any("A shop must know: really." in text for text in texts)


def test_both_builders_read_one_configuration():
    link = ROOT / "nbs/_quarto.yml"
    assert link.is_symlink() and link.resolve() == (ROOT / "_quarto.yml").resolve(), "nbdev writes its default where the link is missing"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> tuple[Path, str]:
    "This project's own site, and what its build said."
    to = tmp_path_factory.mktemp("docs") / "site"
    done = docs(ROOT, "--with", "zensical", "--to", str(to))
    assert done.returncode == 0, done.stderr
    return to, done.stderr


@pytest.fixture(scope="module")
def address(site) -> str:
    "The site on a free port of this machine."
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(site[0])))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_our_own_site_misses_nothing(site):
    assert site[1] == "", "pages, links and anchors are all there"


@pytest.mark.browser
def test_a_reader_searches_a_verb_and_reads_its_reference(address, page):  # noqa: F811
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.goto(f"{address}/explanations/glossary.html")
    page.get_by_role("button", name="Search").click()
    page.get_by_role("combobox", name="Search").fill("save")
    found = page.locator("a[href*='data/store.html']").filter(has_text="def save(").first
    found.click()
    page.wait_for_url("**/data/store.html*#save")
    assert page.locator("h3#save").inner_text().startswith("save")
    assert page.get_by_text("def save(").first.is_visible()
    elsewhere = [url for url in asked if not url.startswith((f"{address}/", "data:", "blob:"))]
    assert elsewhere == [] and said == [] and page.faults == []


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes_and_on_a_telephone(address, chromium, scheme):  # noqa: F811
    context = chromium.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    try:
        page = context.new_page()
        for path in ("explanations/architecture.html", "core/report.html"):
            page.goto(f"{address}/{path}")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wide code scrolls in its own box"
            brightness = [sum(map(int, re.findall(r"\d+", page.evaluate(f"getComputedStyle({what}).{one}"))[:3])) for what, one in
                          (("document.body", "backgroundColor"), ("document.querySelector('.nb-output')", "color"))]
            assert (brightness[0] > 600 > brightness[1] + 200) if scheme == "light" else (brightness[0] < 200 < brightness[1] - 200)
    finally:
        context.close()
