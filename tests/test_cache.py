"""What a step depends on: what must make it run again, what must not, and what a person is told."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from patience import finished, started
from IPython.core.inputtransformer2 import TransformerManager
from mlops_nb.core.errors import Invalid, NotFound
from mlops_nb.core.settings import init
from mlops_nb.core.step import note, notes
from mlops_nb.data.branches import rollback
from mlops_nb.data.store import as_frame, load, save
from mlops_nb.data.versions import place_of
from mlops_nb.pipeline import code
from mlops_nb.pipeline.cache import Earlier, Found, Present, because, changed_cells, completed, differences, find, packages_file
from mlops_nb.pipeline.code import cell_digests, code_digest, distributions, environment, files, libraries, project_modules, remembering
from mlops_nb.pipeline.flow import Decision, take_over


v4 = nbformat.v4
STEP = "train"


@pytest.fixture
def shop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("MLOPS_RUN", "MLOPS_STEP", "MLOPS_STEP_FOLDER", "MLOPS_PROJECT", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    code.SEEN.clear()
    return init(".", name="shop").folder


def notebook(path, *cells, parameters="", **metadata) -> Path:
    "A notebook; texts are code cells, pairs are (kind, text)."
    made = [v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})] if parameters else []
    made += [v4.new_code_cell(one) if isinstance(one, str) else getattr(v4, f"new_{one[0]}_cell")(one[1]) for one in cells]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(nbformat.writes(v4.new_notebook(cells=made, metadata=metadata)), encoding="utf-8")
    return path.resolve()


# What code means

SAME = [("x = 1", "x=1  # one"), ("x = 1", "\n\nx = 1\n\n\n"), ("x = 'a'", 'x = "a"'), ("f(a,\n  b)", "f(a, b)"), ("x = (1)", "x = 1"), ("plt.plot();", "plt.plot()"), ("x = 1_000", "x = 1000"),
        ("%matplotlib inline\nx = 1 # a", "%matplotlib inline\nx = 1"), ("!ls -l", "!ls -l  "), ("%%time\nx = 1", "%%time\nx  =  1 # b"), ("if a:\n  b", "if a:\n\n    b  # c"), ("# note", ""),
        ("y = !ls", "y  =  !ls"), ("data?", "data?  # x"[:5]), ("%%bash\nls", "%%bash\nls\n"), ("await f()", "await  f()"), ("x = 1\n%time f(x)  ", "x=1\n%time f(x)")]
DIFFERENT = [("x = 1", "x = 2"), ("x = 1", "x = 1.0"), ("x = 'a '", "x = 'a'"), ("!ls", "!ls -l"), ("%time f(1)", "%time f(2)"), ("%%time\nx = 1", "%%time\nx = 2"), ("%%time\nx = 1", "x = 1"),
             ("%%bash\nls # a", "%%bash\nls # b"), ("x = !ls", "y = !ls"), ("a?", "a??"), ("a; b", "b; a"), ("def f(", "def g("), ("x = True", "x = 1"), ("f(a=1)", "f(b=1)"),
             ("if a:\n    b\nc", "if a:\n    b\n    c"), ("s = '''a\n\nb'''", "s = '''a\nb'''"), ("%load_ext a", "%load_ext b"), ("s = '# a'", "s = '# b'"), ("x = '\ud800'", "x = '\ud801'")]


@pytest.mark.parametrize("one, other", SAME)
def test_cosmetic_edits_do_not_count(one, other, shop):
    assert code_digest(notebook("a.ipynb", one)) == code_digest(notebook("b.ipynb", other))


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_changes_of_meaning_count(one, other, shop):
    Path("a.py").write_text("")
    digests = []
    for text in (one, other):
        Path("a.ipynb").write_text(json.dumps({"cells": [{"cell_type": "code", "metadata": {}, "source": text}], "metadata": {}}))
        digests.append(code_digest("a.ipynb"))
    assert digests[0] != digests[1]


@pytest.mark.parametrize("source", ["%matplotlib inline\nimport a", "!ls\nx = !pwd\ny, z = !ls\nfor i in x:\n    !echo $i\n    %time f(i)", "data?\nf??\n?data\nx = 1", "a.b = %who_ls", "!pip install \\\n   pandas\nx = 1",
                                    "if True:\n    !ls\nelse:\n    %pwd"])
def test_ipython_s_own_lines_are_read_as_ipython_reads_them(source, shop):
    """Against IPython's TransformerManager: what is plain Python in a cell is plain Python to both, statement by statement."""
    def plain(text):
        tree = ast.parse(text)
        nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Assign, ast.Import, ast.For, ast.If, ast.Expr))]
        return [type(node).__name__ for node in nodes]
    ours, theirs = plain(code.as_python(source)), plain(TransformerManager().transform_cell(source))
    assert ours == theirs


def test_everything_but_code_may_change(shop):
    one = notebook("a.ipynb", ("markdown", "# A"), "x = 1", ("raw", "r"), "", "y = x", kernelspec={"name": "a", "display_name": "a", "language": "python"})
    content = json.loads(one.read_text())
    content["metadata"], content["cells"][0]["source"] = {"widgets": {}}, "# Another title"
    for number, cell in enumerate(content["cells"]):
        cell["id"], cell["metadata"] = f"new{number}", {"collapsed": True}
        if cell["cell_type"] == "code":
            cell |= {"execution_count": 9, "outputs": [{"output_type": "stream", "name": "stdout", "text": "out"}], "source": cell["source"].splitlines(keepends=True) if isinstance(cell["source"], str) else cell["source"]}
    content["cells"].insert(2, {"cell_type": "markdown", "metadata": {}, "source": "more"})
    content["cells"].append({"cell_type": "code", "metadata": {}, "source": "# to do", "outputs": [], "execution_count": None})
    Path("b.ipynb").write_text(json.dumps(content))
    assert code_digest(one) == code_digest("b.ipynb")
    assert [bool(digest) for digest in cell_digests("b.ipynb")] == [False, True, False, False, False, True, False]


def test_cells_count_in_their_order(shop):
    assert code_digest(notebook("a.ipynb", "a()", "b()")) != code_digest(notebook("b.ipynb", "b()", "a()"))


def test_defaults_of_parameters_are_values_and_not_code(shop):
    one, other = notebook("a.ipynb", "f(C)", parameters="C: float = 1.0  # how\nn = 3"), notebook("b.ipynb", "f(C)", parameters="C: float = 2.0\nn = 4  # many")
    assert code_digest(one) == code_digest(other) and cell_digests(one)[0] != cell_digests(other)[0]
    for changed in ("C: int = 1.0\nn = 3", "C: float = 1.0\nm = 3", "C: float = 1.0\nn = 3\nimport a", "C: float = 1.0"):
        assert code_digest(one) != code_digest(notebook("c.ipynb", "f(C)", parameters=changed))


@pytest.mark.parametrize("content, error", [("{", Invalid), ("[]", Invalid), ('{"cells": 3}', Invalid)])
def test_what_is_no_notebook_says_so(shop, content, error):
    Path("a.ipynb").write_text(content)
    with pytest.raises(error, match="a.ipynb"):
        code_digest("a.ipynb")
    with pytest.raises(NotFound, match="did you mean a.ipynb"):
        code_digest("aa.ipynb")


def test_a_user_s_code_says_nothing_on_our_screen(shop):
    notebook("a.ipynb", "x = '\\d'\n1 is 1")
    done = subprocess.run([sys.executable, "-c", "from mlops_nb.pipeline.code import code_digest; code_digest('a.ipynb')"], capture_output=True, text=True, check=True, timeout=300)
    assert done.stderr == "" and done.stdout == ""


def test_what_is_found_in_a_file_is_found_again_only_when_it_changed(shop, monkeypatch):
    path, read = notebook("a.ipynb", "x = 1"), []
    monkeypatch.setattr(code, "cells_of", lambda path, cells_of=code.cells_of: read.append(path) or cells_of(path))
    old = time.time() - 100
    monkeypatch.setattr(code, "RACY_NS", -10**18)  # as if it were written long ago
    first = code_digest(path)
    with remembering("memory.json"):
        assert [code_digest(path) for _ in range(3)] == [first] * 3 and len(read) == 1
    code.SEEN.clear()
    with remembering("memory.json"):
        assert code_digest(path) == first and len(read) == 1
        notebook("a.ipynb", "x = 2")
        os.utime(path, (old, old))
        assert code_digest(path) != first and len(read) == 2


def test_a_damaged_memory_is_forgotten(shop):
    Path("memory.json").write_text("{'")
    with remembering("memory.json"):
        code_digest(notebook("a.ipynb", "x = 1"))


def test_a_file_written_this_moment_is_read_again(shop):
    path = notebook("a.ipynb", "x = 1")
    for number in range(30):  # faster than a clock of a file system ticks
        path.write_text(path.read_text().replace(f"x = {number % 10}", f"x = {(number + 1) % 10}"))
        assert cell_digests(path) == cell_digests(notebook("b.ipynb", f"x = {(number + 1) % 10}"))


# What it imports

def package(folder, modules):
    for name, text in modules.items():
        path = Path(folder, f"{name}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize("cell, found", [
    ("import helpers", {"nbs/helpers.py"}), ("from helpers import f", {"nbs/helpers.py"}), ("import helpers as h, top", {"nbs/helpers.py", "top.py"}), ("import pkg", {"pkg/__init__.py"}),
    ("import pkg.a", {"pkg/__init__.py", "pkg/a.py", "pkg/b.py"}), ("from pkg import a", {"pkg/__init__.py", "pkg/a.py", "pkg/b.py"}), ("from pkg.a import b as c", {"pkg/__init__.py", "pkg/a.py", "pkg/b.py"}),
    ("from pkg import *", {"pkg/__init__.py"}), ("import pkg.sub.deep", {"pkg/__init__.py", "pkg/sub/__init__.py", "pkg/sub/deep.py", "pkg/b.py"}), ("import names.space.mod", {"names/space/mod.py"}),
    ("def f():\n    import helpers", {"nbs/helpers.py"}), ("try:\n    import top\nexcept ImportError:\n    pass", {"top.py"}), ("import importlib\nimportlib.import_module('pkg.b')", {"pkg/__init__.py", "pkg/b.py"}),
    ("__import__('top')", {"top.py"}), ("%run helpers.py", {"nbs/helpers.py"}), ("%run helpers", {"nbs/helpers.py"}), ("%run -i '../top.py'", {"top.py"}), ("%run other.ipynb", {"nbs/other.ipynb", "top.py"}),
    ("%load_ext top", {"top.py"}), ("%%time\nimport top", {"top.py"}), ("import ring_a", {"ring_a.py", "ring_b.py"}), ("import broken", {"broken.py"}), ("import pandas, os, nowhere", set()),
    ("import mlops_nb", set()), ("x = 1", set()), ("import top.attribute", {"top.py"}), ("%%bash\nimport top", {"top.py"})])
def test_modules_of_the_project_are_followed(shop, cell, found):
    package(".", {"top": "import json", "pkg/__init__": "", "pkg/a": "from . import b", "pkg/b": "", "pkg/sub/__init__": "", "pkg/sub/deep": "from ..b import x", "names/space/mod": "",
                  "ring_a": "import ring_b", "ring_b": "import ring_a", "broken": "def (", "nbs/helpers": "import numpy"})
    notebook("nbs/other.ipynb", "import top")
    assert set(project_modules(notebook("nbs/a.ipynb", cell), shop)) == found


def test_a_module_beside_the_notebook_comes_before_one_of_the_project(shop):
    package(".", {"helpers": "x = 1", "nbs/helpers": "x = 2"})
    assert set(project_modules(notebook("nbs/a.ipynb", "import helpers"), shop)) == {"nbs/helpers.py"}


def test_pythonpath_and_editable_folders_inside_the_project_are_searched(shop, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    site = tmp_path_factory.mktemp("venv") / "site-packages"
    package(".", {"lib/one": "", "src/two": "", "app/src/three/__init__": ""})
    package(elsewhere, {"four": ""})
    package(site, {"__editable___three_finder": f"from x import y\nMAPPING: dict[str, str] = {{'three': '{shop}/app/src/three'}}\nNAMESPACES = {{}}"})
    (site / "two.pth").write_text(f"{shop}/src\n# comment\nimport sys; sys.x = 1\n")
    (site / "__editable__.three.pth").write_text("import __editable___three_finder; __editable___three_finder.install()")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["lib", str(elsewhere)]))
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    path = notebook("nbs/a.ipynb", "import one, two, three, four")
    assert set(project_modules(path, shop)) == {"lib/one.py", "src/two.py", "app/src/three/__init__.py"}
    assert libraries(path, shop) == ["four"]


@pytest.mark.parametrize("text, counts", [("x = 1  # one", False), ("\n\nx=1", False), ("x = 2", True), ("x = 1\ny = 2", True)])
def test_a_module_counts_by_its_meaning(shop, text, counts):
    package(".", {"top": "x = 1"})
    path = notebook("a.ipynb", "import top")
    before = project_modules(path, shop)
    package(".", {"top": text})
    assert (project_modules(path, shop) != before) is counts


def test_libraries_are_those_outside_the_project_and_the_standard_library(shop):
    package(".", {"helpers": "import sklearn.linear_model\nimport helpers2", "helpers2": "from scipy import stats"})
    assert libraries(notebook("a.ipynb", "import os, pandas as pd\nfrom helpers import x", "%load_ext mlops_nb"), shop) == ["pandas", "mlops_nb", "sklearn", "scipy"]


# The files it names

@pytest.mark.parametrize("cell", ["pd.read_csv('data/a.csv')", "Path('data') / 'a.csv'", "x = folder / 'data' / 'a.csv'", "open(\"data/a.csv\")", "%%time\nf('data/a.csv')", "['data/a.csv']"])
def test_a_file_in_the_code_counts_by_its_content(shop, cell):
    Path("data").mkdir()
    Path("data/a.csv").write_text("1")
    path = notebook("a.ipynb", cell)
    before = files(path)
    assert before and all(name.endswith("a.csv") for name in before)
    Path("data/a.csv").write_text("2")
    assert files(path) != before


def test_a_file_in_a_parameter_counts(shop, tmp_path_factory):
    far = tmp_path_factory.mktemp("far") / "far.csv"
    far.write_text("1")
    Path("near").write_text("1")
    path = notebook("a.ipynb", "f('data', 'nothing.csv', '.', '', 'a\\0b.c')")
    assert set(files(path, {"a": str(far), "b": ["near", {"c": "no"}], "d": 3})) == {str(far), "near"}


def test_no_more_than_two_hundred_texts_are_looked_up(shop):
    Path("last.csv").write_text("")
    assert files(notebook("a.ipynb", *[f"f('f{n}.csv')" for n in range(200)], "f('last.csv')")) == {}


# Where it runs

def test_distributions_are_those_that_python_reports():
    """Against importlib.metadata, which opens every one of them."""
    from importlib.metadata import distributions as all_of
    theirs = {}
    for one in all_of(path=code.site_folders()):
        theirs.setdefault(one.name.replace("_", "-").lower().replace(".", "-"), one.version)
    ours = {name.replace(".", "-"): version for name, version in distributions().items()}
    assert ours == theirs


def test_another_version_of_a_package_is_another_environment(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    (site / "shop_prices-1.9.0.dist-info").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(site)])
    before = environment()
    assert distributions() == {"shop-prices": "1.9.0"} and environment() == before
    (site / "shop_prices-1.9.0.dist-info").rename(site / "shop_prices-1.9.1.dist-info")
    assert {name for name, value in environment().items() if value != before[name]} == {"packages"}


# What has changed, in words

def facts(**more):
    return {"cells": ["a", "", "b"], "code": "ab", "parameters": {"C": 1.0, "n": 3}, "modules": {"h.py": "1"}, "files": {}, "environment": {"python": "3.11.9", "machine": "L", "packages": "p"}, "mlops_nb": "1", **more}


@pytest.mark.parametrize("now, said", [
    ({}, []), ({"parameters": {"n": 3, "C": 0.5}}, ["C = 0.5 replaced 1.0"]), ({"parameters": {"C": 1.0}}, ["the parameter n is gone"]), ({"parameters": {"C": 1.0, "n": 3, "m": None}}, ["m is a new parameter"]),
    ({"parameters": {"C": "x" * 100, "n": 3}}, [f"C = {'x' * 59}… replaced 1.0"]), ({"parameters": {"C": True, "n": 3}}, ["C = true replaced 1.0"]), ({"parameters": {"C": 1, "n": 3}}, ["C = 1 replaced 1.0"]),
    ({"code": "x", "cells": ["a", "", "x"]}, ["cell 3 changed"]), ({"code": "x", "cells": ["x", "", "y"]}, ["cells 1, 3 changed"]), ({"code": "x", "cells": ["a", "c", "", "b"]}, ["cell 2 is new"]),
    ({"code": "x", "cells": ["a"]}, ["a cell was removed"]), ({"cells": ["", "a", "b"]}, []), ({"modules": {"h.py": "2"}}, ["h.py changed"]), ({"modules": {}}, ["h.py is no longer imported"]),
    ({"modules": {"h.py": "1", "g.py": "1"}}, ["g.py is imported now"]), ({"files": {"a.csv": "1"}}, ["a.csv is there now"]), ({"mlops_nb": "2"}, ["mlops_nb 2 replaced 1"]),
    ({"environment": {"python": "3.12.0", "machine": "L", "packages": "p"}, "cells": ["z"], "code": "z"}, ["Python 3.12.0 replaced 3.11.9"]),
    ({"environment": {"python": "3.11.9", "machine": "M", "packages": "p"}}, ["it runs on M instead of L"]),
    ({"environment": {"python": "3.11.9", "machine": "L", "packages": "q"}}, ["scikit-learn 1.9.1 replaced 1.9.0", "tqdm was installed", "dask was removed"]),
    ({"environment": {"python": "3.11.9", "machine": "L", "packages": "?"}}, ["the installed packages changed"])])
def test_differences_in_words(now, said):
    packages = {"p": {"scikit-learn": "1.9.0", "dask": "1"}, "q": {"scikit-learn": "1.9.1", "tqdm": "4"}}
    assert differences(facts(**now), facts(), packages=lambda digest: packages.get(digest, packages["p"])) == said


@pytest.mark.parametrize("now, before, after, said", [
    ({"a": "1"}, {"a": "1"}, {}, []), ({"a": "2"}, {"a": "1"}, {}, ["a changed"]), ({}, {"a": "1"}, {}, ["a is gone"]), ({"a": "2"}, {"a": "1"}, {"a": "2"}, []), ({"a": "1"}, {"a": "1"}, {"a": "2"}, []),
    ({"a": "3"}, {"a": "1"}, {"a": "2"}, ["a changed"]), ({"a": "2"}, {}, {"a": "2"}, []), ({"a": "3"}, {}, {"a": "2"}, ["a changed"]), ({}, {}, {"a": "2"}, ["a is gone"])])
def test_files_that_the_step_wrote_itself_do_not_count_against_it(now, before, after, said):
    assert differences(facts(files=now), facts(files=before, files_after=after)) == said


def test_another_path_is_one_difference_and_not_three():
    assert differences(facts(files={"b.csv": "2"}, parameters={"C": "b.csv", "n": 3}), facts(files={"a.csv": "1"}, parameters={"C": "a.csv", "n": 3})) == ["C = b.csv replaced a.csv"]


def test_many_packages_are_counted():
    said = differences(facts(environment={"python": "3.11.9", "machine": "L", "packages": "q"}), facts(), packages=lambda digest: {f"p{n}": digest for n in range(9)})
    assert said == ["p0 q replaced p", "p1 q replaced p", "p2 q replaced p", "6 other packages changed"]


@pytest.mark.parametrize("reasons, said", [(["a"], "re-runs because a"), (["a", "b"], "re-runs because a and b"), (["a", "b", "c"], "re-runs because a, b and c"), (list("abcdef"), "re-runs because a, b, c, d and 2 more")])
def test_reasons_as_a_sentence(reasons, said):
    assert because(reasons) == said


# Steps that ran

class Run:
    "A pipeline with one step, run by hand: what a runner does with the cache."

    def __init__(self, shop, monkeypatch, path):
        self.shop, self.monkeypatch, self.path, self.records = shop, monkeypatch, path, []

    def ask(self, step=STEP, **parameters) -> Found:
        present = Present(self.shop)
        return find(present, step, present.key(self.path, parameters), Earlier(iter(self.records), "pipeline.toml"))

    def go(self, work=lambda: None, verdict="passed", step=STEP, outputs=(), **parameters) -> str:
        number = f"20261123-0600{len(self.records):02}-0a1b"
        folder = self.shop / ".mlops/runs" / number / step
        folder.mkdir(parents=True)
        key = Present(self.shop).key(self.path, parameters)
        with self.monkeypatch.context() as patch:
            for name, value in {"MLOPS_RUN": number, "MLOPS_STEP": step, "MLOPS_STEP_FOLDER": str(folder)}.items():
                patch.setenv(name, value)
            work()
        if outputs:
            (folder / "outputs.json").write_text(json.dumps(outputs))
        row = {"step": step, "verdict": verdict, "outputs": dict(outputs), "key": completed(key, folder, self.path), "report": "", "executed": ""}
        self.records.insert(0, json.loads(json.dumps({"id": number, "source": "pipeline.toml", "status": verdict, "steps": [row]})))
        return number


@pytest.fixture
def one(shop, monkeypatch):
    return Run(shop, monkeypatch, notebook("train.ipynb", "f(C)", parameters="C = 1.0"))


def frame(n=3):
    return pd.DataFrame({"a": range(n)})


def taken_over(found):
    row = {"step": STEP}
    take_over(row, Decision(str(found), found.row, found.run))
    return row


def test_the_same_again_is_cached_and_linked(one):
    assert str(one.ask()) == "it has never run"
    number = one.go(outputs={"a": 1})
    found = one.ask()
    row = taken_over(found)
    assert found and found.run == number and row["cached_from"] == number and row["verdict"] == "cached" and row["outputs"] == {"a": 1}
    assert one.ask(C=1.0), "the default given is the default"
    assert one.ask(C=0.5).reasons == ("C = 0.5 replaced 1.0",)


def test_a_cached_row_leads_back_to_the_run_that_did_the_work(one):
    number = one.go(outputs={"a": 1})
    for later in range(3):
        row = taken_over(one.ask())
        one.records.insert(0, {"id": f"later{later}", "source": "pipeline.toml", "status": "passed", "steps": [row]})
        assert one.ask().run == number


def test_going_back_to_older_values_finds_the_older_run(one):
    first, second = one.go(C=0.1), one.go(C=0.2)
    assert one.ask(C=0.1).run == first and one.ask(C=0.2).run == second
    assert one.ask(C=0.3).reasons == ("C = 0.3 replaced 0.2",)


def test_the_nearest_run_that_passed_explains(one):
    one.go(C=0.1)
    one.go(C=0.2, verdict="failed")
    notebook("train.ipynb", "g(C)", parameters="C = 1.0")
    one.go(C=0.3)
    notebook("train.ipynb", "f(C)", parameters="C = 1.0")
    assert one.ask(C=0.2).reasons == ("the last run failed",)
    assert one.ask(C=0.4).reasons == ("C = 0.4 replaced 0.1",)


@pytest.mark.parametrize("verdict, said", [("failed", "the last run failed"), ("interrupted", "the last run was interrupted"), ("running", "the last run died")])
def test_what_did_not_finish_is_tried_again(one, verdict, said):
    one.go()
    one.go(verdict=verdict)
    one.records[0]["status"] = "died"
    assert one.ask().reasons == (said,)


@pytest.mark.parametrize("verdict", ["waiting", "skipped"])
def test_what_did_not_start_says_nothing(one, verdict):
    number = one.go()
    one.go(verdict=verdict)
    assert one.ask().run == number


def test_other_pipelines_and_runs_under_way_are_none_of_its_business(one):
    one.go()
    one.records[0]["source"] = "other.toml"
    assert one.ask().reasons == ("it has never run",)
    one.records[0] |= {"source": "pipeline.toml", "status": "running"}
    assert one.ask().reasons == ("it has never run",)


def test_old_records_without_facts_are_no_help(one):
    one.go()
    del one.records[0]["steps"][0]["key"]
    assert one.ask().reasons == ("its last run kept no facts",)


@pytest.mark.parametrize("what, said", [("train", "the folder of run {} is gone"), ("train/outputs.json", "the outputs of run {} are gone"), ("train/train.ipynb", "train.ipynb of run {} is gone")])
def test_results_that_are_gone_are_made_again(one, what, said):
    number = one.go(outputs={"a": 1})
    folder = one.shop / ".mlops/runs" / number
    (folder / "train/train.ipynb").write_text("")
    one.records[0]["steps"][0]["executed"] = f".mlops/runs/{number}/train/train.ipynb"
    assert one.ask()
    subprocess.run(["rm", "-r", str(folder / what)], check=True, timeout=300)
    assert one.ask().reasons == (said.format(number),)


def test_a_variant_of_a_sweep_has_its_own_folder_and_history(one):
    number = one.go(step="train-C=0.1", C=0.1)
    one.records[0]["steps"][0]["step"] = "train[C=0.1]"
    assert one.ask(step="train[C=0.1]", C=0.1).run == number
    assert one.ask(step="train[C=0.2]", C=0.2).reasons == ("it has never run",)


def test_only_as_many_records_are_read_as_are_needed(one):
    for _ in range(3):
        one.go()
    read = []
    earlier = Earlier((read.append(record["id"]) or record for record in one.records), "pipeline.toml")
    present = Present(one.shop)
    for _ in range(5):
        assert find(present, STEP, present.key(one.path), earlier)
    assert len(read) == 1
    assert not find(present, STEP, present.key(one.path, {"C": 3}), earlier) and len(read) == 3


def test_a_far_older_run_is_not_looked_for(one):
    for C in range(6):
        one.go(C=float(C))
    present = Present(one.shop)
    assert find(present, STEP, present.key(one.path, {"C": 0.0}), Earlier(iter(one.records), "pipeline.toml", limit=6))
    assert not find(present, STEP, present.key(one.path, {"C": 0.0}), Earlier(iter(one.records), "pipeline.toml", limit=5))


def test_secrets_are_compared_as_they_are_written(one):
    hide = lambda value: {name: "‹C›" if name == "C" else one for name, one in value.items()}  # noqa: E731
    assert Present(one.shop, redact=hide).key(one.path, {"C": "geheim"})["parameters"] == {"C": "‹C›"}


def test_what_was_installed_is_kept_to_be_named_later(one, monkeypatch):
    one.go()
    packages = one.records[0]["steps"][0]["key"]["environment"]["packages"]
    kept = packages_file(one.shop, packages)
    assert json.loads(kept.read_text()) == distributions()
    kept.write_text(json.dumps({**distributions(), "pandas": "1.0.0"}))
    kept.rename(packages_file(one.shop, "old"))
    one.records[0]["steps"][0]["key"]["environment"]["packages"] = "old"
    assert one.ask().reasons == (f"pandas {distributions()['pandas']} replaced 1.0.0",)
    packages_file(one.shop, "old").unlink()
    assert "changed" in str(one.ask())


# Data that came in and went out

@pytest.mark.parametrize("read, then, said", [
    (lambda: load("orders"), lambda: save(frame(5), "orders"), ["orders@2 replaced orders@1"]),
    (lambda: load("orders@1"), lambda: save(frame(5), "orders"), []),
    (lambda: as_frame("orders"), lambda: save(frame(5), "orders"), ["orders@2 replaced orders@1"]),
    (lambda: load("orders"), lambda: save(frame(5), "other"), []),
    (lambda: load("orders"), lambda: (save(frame(5), "orders"), rollback("orders@1")), []),
    (lambda: load("orders"), lambda: (place_of("orders") / "1.json").unlink(), ["orders is gone"]),
    (lambda: load("orders"), lambda: (place_of("orders") / "1.json").write_text("{"), ["orders cannot be looked up"])])
def test_data_that_were_loaded(one, read, then, said):
    save(frame(), "orders")
    one.go(read)
    assert one.ask()
    then()
    assert len(one.ask().reasons) == len(said) and all(reason.startswith(text) for reason, text in zip(one.ask().reasons, said))


def test_a_tag_that_moves(one):
    from mlops_nb.data.branches import tag
    save(frame(), "orders")
    save(frame(5), "orders")
    tag("orders@1", "good")
    one.go(lambda: load("orders@good"))
    assert one.ask()
    tag("orders@2", "good")
    assert one.ask().reasons == ("orders@2 replaced orders@1",)


def test_a_check_that_looks_its_address_up_first_depends_on_the_name(one):
    from mlops_nb.data.quality import check
    save(frame(40), "orders")
    one.go(lambda: check("orders"))
    assert {line["asked"] for line in one.records[0]["steps"][0]["key"]["inputs"]} == {"orders", "orders@1"}
    save(frame(50), "orders")
    assert one.ask().reasons == ("orders@2 replaced orders@1",)


def test_what_a_step_saves_is_no_reason_to_run_it_again(one):
    one.go(lambda: (save(frame(), "clean"), load("clean")))
    assert "inputs" not in one.records[0]["steps"][0]["key"] and one.ask()


def test_a_step_that_adds_to_its_own_input_is_not_run_for_ever(one):
    save(frame(), "orders")
    one.go(lambda: save(pd.concat([load("orders"), frame()], ignore_index=True), "orders"))
    assert one.ask()
    save(frame(9), "orders")
    assert one.ask().reasons == ("orders@3 replaced orders@1",)


def test_a_version_that_it_saved_must_still_be_there(one):
    one.go(lambda: save(frame(), "clean"))
    assert one.ask()
    (place_of("clean") / "1.json").unlink()
    assert one.ask().reasons == ("clean@1 is gone",)


def test_a_file_that_it_writes_over(one):
    one.path = notebook("train.ipynb", "open('out.csv', 'w')")
    one.go(lambda: Path("out.csv").write_text("1"))
    assert one.ask()
    Path("out.csv").write_text("2")
    assert one.ask().reasons == ("out.csv changed",)
    one.go(lambda: Path("out.csv").write_text("3"))
    assert one.ask()
    Path("out.csv").unlink()
    assert one.ask().reasons == ("out.csv is gone",)


def test_data_are_looked_up_once_per_plan(one, monkeypatch):
    from mlops_nb.data import versions
    save(frame(), "orders")
    one.go(lambda: load("orders"))
    asked = []
    monkeypatch.setattr(versions, "version", lambda address, version=versions.version: asked.append(address) or version(address))
    present = Present(one.shop)
    for _ in range(4):
        assert find(present, STEP, present.key(one.path), Earlier(iter(one.records), "pipeline.toml"))
    assert asked == ["orders"]


def test_models_that_were_used_and_made(one, monkeypatch):
    from mlops_nb.model.registry import load_model, model, promote, register
    from sklearn.linear_model import LogisticRegression

    def fit(): return LogisticRegression().fit([[0.0], [1.0]], [0, 1])
    register(fit(), "net")
    promote("net@1")
    number = one.go(lambda: load_model("net@champion"))
    key = one.records[0]["steps"][0]["key"]
    assert key["models_used"][0]["asked"] == "net@champion" and one.ask().run == number
    register(fit(), "net")
    assert one.ask()
    promote("net@2")
    assert one.ask() or one.ask().reasons == ("net@2 replaced net@1",)  # equal models have equal digests
    register(LogisticRegression(C=9.0).fit([[0.0], [2.0]], [0, 1]), "net")
    promote("net@3")
    assert one.ask().reasons == ("net@3 replaced net@1",)

    def judge():
        load_model("net@champion")
        register(LogisticRegression(C=5.0).fit([[0.0], [3.0]], [0, 1]), "net")
        promote("net@challenger")
    one.go(judge)
    key = one.records[0]["steps"][0]["key"]
    assert [line["address"] for line in key["models"]] == ["net@4"] and model("net@champion").version == 4
    assert one.ask(), "it moved the champion itself"


def test_notes_are_whole_lines_once_and_only_in_a_step(tmp_path, monkeypatch):
    note("inputs.jsonl", a=1)
    monkeypatch.setenv("MLOPS_STEP_FOLDER", str(tmp_path / "s"))
    for _ in range(3):
        note("inputs.jsonl", asked="orders", address="ö@1")
    note("inputs.jsonl", asked="x", when=pd.Timestamp("2026-01-01"))
    with open(tmp_path / "s/inputs.jsonl", "ab") as file:
        file.write(b'{"asked": "orders", "address": "\xc3\xb6@1"}\n[1]\n{"cut')
    assert notes(tmp_path / "s", "inputs.jsonl")[0] == {"asked": "orders", "address": "ö@1"} and len(notes(tmp_path / "s", "inputs.jsonl")) == 2
    assert notes(tmp_path, "nothing.jsonl") == []


def test_cells_that_changed():
    assert list(changed_cells(["a", "b", "c"], ["a", "x", "c", "d", "e"])) == ["cell 2 changed", "2 cells were removed"]
    assert list(changed_cells(["", "a", "n", "m"], ["a"])) == ["cells 3, 4 are new"]


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_text("{"), lambda path: path.write_text("")])
def test_a_notebook_that_is_deleted_or_broken_while_it_runs(one, harm):
    text = one.path.read_text()
    number = one.go(lambda: harm(one.path))
    one.path.write_text(text)
    assert one.ask().run == number


def test_a_notebook_that_is_edited_while_it_runs_runs_again(one):
    one.go(lambda: notebook("train.ipynb", "g(C)", parameters="C = 1.0"))
    assert one.ask().reasons == ("cell 2 changed",)


@pytest.mark.parametrize("content", ["[]", "{\"a\": 1}", "{\"a\": []}", "null"])
def test_a_memory_of_another_shape_is_forgotten(shop, content):
    Path("memory.json").write_text(content)
    with remembering("memory.json"):
        code_digest(notebook("a.ipynb", "x = 1"))


def test_a_memory_that_cannot_be_written_stops_nobody(shop, monkeypatch):
    monkeypatch.setattr(code, "RACY_NS", -10**18)
    Path("file").write_text("")
    with remembering("file/memory.json"):
        code_digest(notebook("a.ipynb", "x = 1"))


def test_files_may_be_read_while_the_memory_is_written(shop, monkeypatch):
    import threading
    monkeypatch.setattr(code, "RACY_NS", -10**18)
    stop = threading.Event()

    def reading():
        for number in range(20_000):
            code.SEEN[f"code {number}"] = [0, 0, 0, 0, {}]
            if stop.wait(0.0001 if number % 50 == 0 else 0):
                return
    threads = started(reading)
    try:
        for _ in range(5):
            with remembering("memory.json"):
                code_digest(notebook("a.ipynb", "x = 1"))
    finally:
        stop.set()
        finished(threads)
    assert "a.ipynb" in Path("memory.json").read_text()
