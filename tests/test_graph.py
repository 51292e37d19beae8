"""What a notebook takes, what a pipeline file may say, and every mistake in it: all found without running anything."""

import json
import math
import os
import re
from datetime import date, datetime
from pathlib import Path

import nbformat
import numpy as np
import pytest

from mlops_nb.core.errors import Invalid, NotFound, Unavailable
from mlops_nb.pipeline.diagram import diagram, outline
from mlops_nb.pipeline.graph import Pipeline, PipelineStep, check_parameters, find, known_values, pipelines_in, references, resolved
from mlops_nb.pipeline.signature import Parameter, arguments, as_json, help_of, signature
from mlops_nb.pipeline.steps import owner_of

NOTEBOOKS = Path(__file__).parent / "notebooks"


def notebook(path, *cells):
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(made, path)
    return path


@pytest.fixture
def shop(tmp_path, monkeypatch):
    "A folder with three notebooks, its name chosen to be awkward."
    folder = tmp_path / "the shop {é}"
    folder.mkdir()
    notebook(folder / "add.ipynb", "a: int = 1\nb: float = 2.0")
    notebook(folder / "train.ipynb", "C: float = 1.0\npenalty: Literal['l1', 'l2'] = 'l2'\ndata = 'orders'\nname = 'model'")
    notebook(folder / "gate.ipynb", "share: float = 0.5\nmodels: list = []")
    monkeypatch.chdir(folder)
    return folder


def read(folder, text, name="", file="pipeline.toml"):
    (folder / file).write_text(text, encoding="utf-8")
    return Pipeline.read(folder / file, name)


def step(name, notebook="add.ipynb", **more):
    return "\n".join(["[[step]]", f'name = "{name}"', f'notebook = "{notebook}"', *(f"{key} = {value}" for key, value in more.items()), ""])


# --- signatures -----------------------------------------------------------------------------------------------------------------------


def test_a_signature_is_read_and_never_executed(tmp_path):
    path = notebook(tmp_path / "a.ipynb", """%matplotlib inline
from typing import Literal
open("executed", "w")
# how strong
# the penalty is
C: float = 1.0
names: list[str] = ["a"]  # which ones

# not about kind

kind: Literal["x", "y"] = "x"
start = make_date()  # when
a = b = 3
worst = float("nan")
limit: "int | None" = None
C: float = 2.0  # strength""")
    found = {one.name: (one.annotation, one.default, one.help) for one in signature(path)}
    assert found == {"C": ("float", "2.0", "strength"), "names": ("list[str]", "['a']", "which ones"), "kind": ("Literal['x', 'y']", "'x'", ""),
                     "start": ("", "make_date()", "when"), "worst": ("float", "float('nan')", ""), "limit": ("'int | None'", "None", "")}
    assert not Path("executed").exists()
    rows = help_of(path).facts["parameters"]
    assert rows[1] == {"name": "names", "type": "list[str]", "default": "['a']", "help": "which ones"} and rows[3]["type"] == "any"


def test_lines_of_comment_above_a_parameter_are_its_help(tmp_path):
    assert signature(notebook(tmp_path / "a.ipynb", "# how strong\n# the penalty is\nC: float = 1.0"))[0].help == "how strong the penalty is"


def test_a_notebook_without_the_tag_takes_nothing_and_says_how_to_set_it(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("C = 1")]), tmp_path / "plain.ipynb")
    assert signature(tmp_path / "plain.ipynb") == [] and "set the tag" in str(help_of(tmp_path / "plain.ipynb"))
    with pytest.raises(Invalid, match=r"^plain\.ipynb has no parameter 'C'; there are none yet\. Its signature: it has no cell tagged 'parameters'\.$"):
        arguments([], {"C": 1}, notebook="plain.ipynb")


ACCEPTED = [
    ("v = 1.5", "0.5", 0.5), ("v = 1.5", "1e-7", 1e-7), ("v = 1.5", "3", 3.0), ("v = 1", "10", 10), ("v = 1", "3.0", 3), ("v = True", "false", False), ("v = True", "0", False),
    ("v = ''", "10", "10"), ("v = ''", "'quoted'", "'quoted'"), ("v = ''", "None", "None"), ("v = ''", "", ""), ("v: str | None = None", "None", None),
    ("v: str | None = None", "x", "x"), ("v: list[int] = []", "1,2", [1, 2]), ("v: list[str] = []", "1,2", ["1", "2"]), ("v: list[str] = []", "a", ["a"]),
    ("v: dict[str, float] = {}", '{"a": 1}', {"a": 1.0}), ("v = {}", '{"a": [true, null]}', {"a": [True, None]}), ("v = None", "5", 5), ("v = None", "x y", "x y"),
    ("v: Literal['a', 'b'] = 'a'", "b", "b"), ("v: Literal[1, 2] = 1", "2", 2), ("v: pd.Timestamp = None", "2011-12-01", "2011-12-01"), ("v = None", "b'bytes'", "b'bytes'"),
    ("v: Union[int, str] = 1", "x", "x"), ("v: typing.Optional[int] = 1", "None", None), ("v: Annotated[int, 'weeks'] = 1", "2", 2), ("v: 'int |' = 1", "anything", "anything"),
    ("v: Literal[A, B] = A", "x", "x"), ("v: tuple[int, ...] = ()", "1, 2", [1, 2]), ("v = (1, 2)", "(3, 4)", [3, 4]), ("v: set[str] = set()", "a,b", ["a", "b"]),
    ("v: Mapping[str, int] = {}", "{'a': 1}", {"a": 1}), ("v = float('inf')", "-inf", -math.inf), ("v: list[float] = []", "inf,1", [math.inf, 1.0]), ("v: bool | int = 1", "7", 7),
    ("v: date = None", date(2011, 12, 1), "2011-12-01"), ("v = ''", datetime(2011, 12, 1, 8), "2011-12-01T08:00:00"), ("v = ''", Path("a") / "b", str(Path("a") / "b")),
    ("v = 1.0", np.float32(0.5), 0.5), ("v = 1", np.int64(3), 3), ("v = []", (1, (2, 3)), [1, [2, 3]]), ("v = ''", "é中😀\0\x1b\n\"'\\", "é中😀\0\x1b\n\"'\\"),
]
REFUSED = [
    ("v: Optional[int] = 3", "none"), ("v = 1", "0.5"), ("v = 1", "a week"), ("v = 1.5", ""), ("v = True", "maybe"), ("v: Literal['a', 'b'] = 'a'", "c"), ("v: list[int] = []", "a,b"),
    ("v = {}", "[1]"), ("v = {}", "{1: 2}"), ("v = 1", "true"), ("v = 1.0", "True"), ("v = 1", True), ("v: list[int] = []", "[1, true]"), ("v: dict[int, float] = {}", "{1: 2}"),
    ("v: tuple[int, int] = (1, 2)", "1,b"), ("v = None", object()), ("v = None", [object()]), ("v = ''", "\ud800"), ("v = None", {"a": ["\udcff"]}), ("v = None", 10**5000), ("v = None", {1: 2}),
]


@pytest.mark.parametrize(("declared", "given", "value"), ACCEPTED, ids=range(len(ACCEPTED)))
def test_a_value_becomes_the_type_of_the_parameter(tmp_path, declared, given, value):
    found = arguments(signature(notebook(tmp_path / "a.ipynb", declared)), {"v": given})["v"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("declared", "given"), REFUSED, ids=range(len(REFUSED)))
def test_a_value_that_does_not_fit_is_refused_with_the_signature(tmp_path, declared, given):
    with pytest.raises(Invalid, match=r"a\.ipynb: v = .* does not fit; expected .* Its signature: a\.ipynb\(v") as caught:
        arguments(signature(notebook(tmp_path / "a.ipynb", declared)), {"v": given}, notebook="a.ipynb")
    str(caught.value).encode()


@pytest.mark.parametrize("value", [given for _, _, given in ACCEPTED] + [math.nan, -0.0, 1e-300, 10**30, {"a'\"\\": [None, True, {"\n": math.inf}]}, "{braces} and '''triple'''", ["\0\x1b\t\r"]],
                         ids=lambda value: ascii(value)[:30])
def test_an_accepted_value_comes_back_from_the_cell_that_papermill_writes(value):
    from papermill.translators import PythonTranslator

    given = arguments([Parameter("v", "", "None", "", object)], {"v": value})["v"] if not isinstance(value, str) else value
    names: dict = {}
    exec(PythonTranslator.codify({"v": given}), names)
    assert repr(names["v"]) == repr(given)


def test_a_value_that_holds_itself_is_refused():
    endless: list = []
    endless.append(endless)
    with pytest.raises(Invalid, match="does not fit"):
        arguments([Parameter("v", "list", "[]", "", list)], {"v": endless})


def test_an_unknown_parameter_is_refused_with_the_signature():
    with pytest.raises(Invalid, match=r"add\.ipynb has no parameter 'c'; .* add\.ipynb\(a: int = 1, b: float = 2\.0\)"):
        arguments(signature(NOTEBOOKS / "add.ipynb"), {"c": "1"}, notebook="add.ipynb")


@pytest.mark.parametrize(("content", "error", "says"), [
    ("{", Invalid, "damaged"), ('{"worksheets": []}', Invalid, "format 4"), ("[]", Invalid, "format 4"), ('{"cells": [1]}', Invalid, "format 4"), ('{"cells": [{}]}', Invalid, "format 4"),
    ('{"cells": [], "metadata": {"kernelspec": {"language": "R"}}}', Unavailable, "written in R"),
    ('{"cells": [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "C = = 1"}]}', Invalid, "cannot be read"),
    ('{"cells": [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "C = \\u0000"}]}', Invalid, "cannot be read"),
])
def test_a_file_that_is_no_usable_notebook_is_named(tmp_path, content, error, says):
    (tmp_path / "bad.ipynb").write_text(content)
    with pytest.raises(error, match=says):
        signature(tmp_path / "bad.ipynb")


def test_a_missing_notebook_says_which_there_are():
    with pytest.raises(NotFound, match="did you mean add.ipynb"):
        signature(NOTEBOOKS / "ad.ipynb")


# --- references -----------------------------------------------------------------------------------------------------------------------


def test_references_keep_the_type_and_doubled_braces_are_plain():
    values = {"a.x": [1, 2], "n": 3, "t[C=0.1,p=l1].m": "M"}
    assert resolved({"whole": "{a.x}", "part": ["n={n}"], "plain": "{{n}}", "empty": "", "number": 1.5, "one": "{t[C=0.1,p=l1].m}"}, values) == {
        "whole": [1, 2], "part": ["n=3"], "plain": "{n}", "empty": "", "number": 1.5, "one": "M"}
    assert list(references({"one": "{a.x} and {n}", "two": ["{{no}}"]})) == ["a.x", "n"]


@pytest.mark.parametrize(("reference", "owner"), [("a.x", "a"), ("weeks", ""), ("a.b.c", "a"), ("validate.ndcg@10", "validate"), ("t[C=0.1].m", "t[C=0.1]"), ("t[p=a.b].m.n", "t[p=a.b]")])
def test_whose_result_a_reference_takes(reference, owner):
    assert owner_of(reference) == owner


# --- the file -------------------------------------------------------------------------------------------------------------------------

GOOD = """[pipeline]
name = "two"
on_failure = "notify-send failed"
[params]
start = 3
[[step]]
name = "second"
notebook = "gate.ipynb"
params = { share = "{first.total}" }
[[step]]
name = "first"
notebook = "add.ipynb"
params = { a = "{start}" }
retries = 3
retry_delay_s = 0.5
timeout_s = 60
cache = false
gates = { total = 1, missing = "<= 1%" }
resources = { cpus = 0.5, memory_gb = 2, gpus = 1 }
on_failure = ["echo", "https://example.org/hook"]
"""


def test_everything_a_step_can_say_is_read(shop):
    found = read(shop, GOOD)
    first = found.steps[0]
    assert (found.name, found.params, found.on_failure) == ("two", {"start": 3}, ("notify-send failed",))
    assert (first.name, first.notebook, first.retries, first.retry_delay_s, first.timeout_s, first.cache) == ("first", shop.resolve() / "add.ipynb", 3, 0.5, 60, False)
    assert (first.gates, first.resources, first.on_failure) == ({"total": 1, "missing": "<= 1%"}, {"cpus": 0.5, "memory_gb": 2, "gpus": 1}, ("echo", "https://example.org/hook"))
    second = found.steps[1]
    assert (second.retries, second.timeout_s, second.cache, second.gates, second.resources, second.on_failure, second.after) == (0, 0, True, {}, {}, (), ("first",))


def test_steps_come_after_those_they_refer_to_and_otherwise_as_written(shop):
    assert [one.name for one in read(shop, GOOD).steps] == ["first", "second"]
    text = "".join(step(name, needs=needs) for name, needs in (("a", []), ("b", ["a"]), ("c", []), ("d", ["b", "c"])))
    assert [one.name for one in read(shop, text).steps] == ["a", "b", "c", "d"]


FIRST = 'name = "first"'


@pytest.mark.parametrize(("right", "wrong", "error", "says"), [
    ("start = 3", "start =", Invalid, "pipeline.toml cannot be read: Invalid value (at line 5, column 8)."),
    (FIRST, 'name = "second"', Invalid, "pipeline.toml: there are two steps 'second' (capitals do not tell folders apart everywhere); give one of them another name."),
    (FIRST, 'name = "Second"', Invalid, "pipeline.toml: there are two steps 'second'"),
    (FIRST, 'nam = "first"', Invalid, "pipeline.toml, step 2 has no key 'nam'; did you mean name?"),
    (FIRST, 'name = "fi/rst"', Invalid, "pipeline.toml: 'fi/rst' cannot name a step; expected letters, digits, '_' or '-'."),
    (FIRST, 'name = "first[a=1]"', Invalid, "cannot name a step"), (FIRST, "name = 1", Invalid, "step 1: name = 1 is not valid; expected text."),
    ("retries = 3", "retrys = 3", Invalid, "pipeline.toml, step first has no key 'retrys'; did you mean retries or retry_delay_s?"),
    ("retries = 3", "retries = -1", Invalid, "pipeline.toml, step first: retries = -1 is not valid; expected a whole number, 0 or more."),
    ("retries = 3", "retries = 1.5", Invalid, "expected a whole number"), ("retries = 3", "retries = true", Invalid, "expected a whole number"),
    ("retries = 3\n", "", Invalid, "retry_delay_s has no effect without retries; add retries = 1 or more, or remove it."),
    ("retry_delay_s = 0.5", "retry_delay_s = nan", Invalid, "retry_delay_s = nan is not valid; expected a number, 0 or more."),
    ("timeout_s = 60", "timeout_s = -1", Invalid, "timeout_s = -1 is not valid; expected a number, 0 or more."),
    ("timeout_s = 60", "timeout_s = inf", Invalid, "timeout_s = inf is not valid"), ("timeout_s = 60", 'timeout_s = "1h"', Invalid, "timeout_s = '1h' is not valid"),
    ("cache = false", "cache = 1", Invalid, "cache = 1 is not valid; expected true or false."), ("cache = false", 'cache = "no"', Invalid, "expected true or false"),
    ('"<= 1%"', '"about 1%"', Invalid, "pipeline.toml, step first: the gate missing = 'about 1%' is not valid; expected a number or a comparison such as 0.34, 2% or '> 0'."),
    ("total = 1", "total = true", Invalid, "the gate total = True is not valid"), ("total = 1", "total = nan", Invalid, "the gate total = nan is not valid"),
    ("total = 1", "total = [1]", Invalid, "the gate total = [1] is not valid"), ("total = 1", "total.min = 1", Invalid, "the gate total = {'min': 1} is not valid"),
    ("memory_gb", "memory", Invalid, "pipeline.toml, step first, resources has no key 'memory'; did you mean memory_gb?"),
    ("cpus = 0.5", 'cpus = "2"', Invalid, "resources: cpus = '2' is not valid; expected a number, 0 or more."), ("gpus = 1", "gpus = 0.5", Invalid, "expected a whole number"),
    ("memory_gb = 2", "memory_gb = -2", Invalid, "memory_gb = -2 is not valid"),
    ('on_failure = ["echo"', "on_failure = [1", Invalid, "pipeline.toml, step first: on_failure = [1, 'https://example.org/hook'] is not valid; expected a list of texts, none of them empty."),
    ('on_failure = "notify-send failed"', 'on_failure = ""', Invalid, "pipeline.toml: on_failure = '' is not valid"), ('on_failure = "notify-send failed"', "on_failure = 3", Invalid, "on_failure = 3 is not valid"),
    ("[pipeline]", "[pipelin]", Invalid, "pipeline.toml has no key 'pipelin'; did you mean pipeline?"), ('name = "two"', 'nam = "two"', Invalid, "pipeline.toml, [pipeline] has no key 'nam'; did you mean name?"),
    ("[pipeline]", "[pipelines.a]", Invalid, "pipeline.toml holds both one pipeline and [pipelines]; expected [[step]] at the top"),
    (FIRST, f'{FIRST}\nneeds = ["zero"]', Invalid, "pipeline.toml: step first waits for 'zero', which is no step; there are: first, second."),
    (FIRST, f'{FIRST}\nneeds = ["secnd"]', Invalid, "did you mean second?"), (FIRST, f'{FIRST}\nneeds = "zero"', Invalid, "needs = 'zero' is not valid; expected a list."),
    (FIRST, f"{FIRST}\nneeds = [1]", Invalid, "needs = [1] is not valid; expected a list of texts"),
    (FIRST, f'{FIRST}\nneeds = ["second"]', Invalid, "pipeline.toml: the steps wait for each other in a circle: second → first → second; remove one of these needs."),
    (FIRST, f'{FIRST}\nneeds = ["first"]', Invalid, "in a circle: first → first;"),
    ('notebook = "add.ipynb"\n', "", Invalid, "pipeline.toml: step first lacks 'notebook'; add it."), ('notebook = "add.ipynb"', "notebook = []", Invalid, "notebook = [] is not valid; expected text."),
    ("add.ipynb", "ad.ipynb", NotFound, "pipeline.toml, step first: there is no notebook"), ("add.ipynb", "", NotFound, "there is no notebook"),
    ("{start}", "{stat}", Invalid, "pipeline.toml: step first refers to {stat}, which is neither in [params] nor a step's result; did you mean start?"),
    ("{start}", "{start", Invalid, "pipeline.toml, step first: '{start' has a brace too many or too few"), ("{start}", "{}", Invalid, "'{}' formats nothing; expected a plain reference like {prepare.data}."),
    ("{start}", "{start:>3}", Invalid, "'{start:>3}' formats start; expected a plain reference like {start}."), ("{start}", "{start!r}", Invalid, "expected a plain reference"),
    ("{start}", "7", Invalid, 'pipeline.toml: [params] start is used by no step; refer to it as "{start}" or remove it.'),
    ("start = 3", "start = 'x'", Invalid, "pipeline.toml, step first: add.ipynb: a = 'x' does not fit; expected int. Its signature: add.ipynb(a: int = 1, b: float = 2.0)."),
    ("a = ", "c = ", Invalid, "pipeline.toml, step first: add.ipynb has no parameter 'c'; there are: a, b. Its signature: add.ipynb(a: int = 1, b: float = 2.0)."),
    ("{first.total}", "{frist.total}", Invalid, "pipeline.toml: step second refers to a result of 'frist', which is no step; did you mean first?"),
    ('share = "{first', 'shar = "{first', Invalid, "step second: gate.ipynb has no parameter 'shar'; did you mean share?"),
    ("{first.total}", "many", Invalid, "pipeline.toml, step second: gate.ipynb: share = 'many' does not fit"),
])
def test_every_mistake_in_a_file_is_one_sentence(shop, right, wrong, error, says):
    assert right in GOOD
    with pytest.raises(error) as caught:
        read(shop, GOOD.replace(right, wrong, 1))
    assert says in str(caught.value)


@pytest.mark.parametrize(("text", "says"), [
    ("", "pipeline.toml has no steps; expected at least one [[step]]"), ("step = []", "has no steps"), ("step = [1]", "has no steps"), ("[step]\nname = 'a'", "step = {'name': 'a'} is not valid; expected a list."),
    ("[pipelines]\na = 1", "pipeline.toml: 'a' in [pipelines] is not valid"), ("[pipelines.a]", "pipeline.toml:a has no steps"), ("[pipelines.'a b']", "'a b' in [pipelines] is not valid"),
    ("[pipelines.a]\nname = 'x'", "pipeline.toml, [pipelines.a] has no key 'name'"), ("pipelines = 1", "pipelines = 1 is not valid; expected a table."),
    ("\udcff", "cannot be read"),
])
def test_a_file_without_a_pipeline_says_what_is_expected(shop, text, says):
    (shop / "pipeline.toml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(Invalid, match=re.escape(says)):
        Pipeline.read("pipeline.toml")


def test_a_file_that_is_not_there_or_cannot_be_read(shop):
    with pytest.raises(NotFound, match="there is no .*nothing.toml; expected a pipeline.toml"):
        Pipeline.read("nothing.toml")
    with pytest.raises(NotFound, match="expected a pipeline.toml"):
        Pipeline.read(shop)


def test_a_long_circle_is_named_in_short(shop):
    text = "".join(step(f"s{i}", needs=[f"s{(i + 1) % 300}"]) for i in range(300))
    with pytest.raises(Invalid, match="in a circle") as caught:
        read(shop, text)
    assert len(str(caught.value)) < 250 and "…" in str(caught.value)


def test_dates_of_toml_are_handed_on_as_text(shop):
    notebook(shop / "when.ipynb", "day: date = None\nspan: list = []\ntext = ''")
    found = read(shop, '[params]\nday = 2011-12-01\n' + step("a", "when.ipynb", params='{ day = "{day}", span = [2011-12-01, 2011-12-01T08:00:00Z], text = "from {day}" }'))
    assert known_values(found.steps[0], found.params) == {"day": "2011-12-01", "span": ["2011-12-01", "2011-12-01T08:00:00+00:00"], "text": "from 2011-12-01"}
    json.dumps([dict(found.params), dict(found.steps[0].params)])


def test_the_pause_between_attempts_doubles_and_spreads():
    one = PipelineStep("a", Path(), retries=3, retry_delay_s=4)
    for attempt, expected in ((1, 4), (2, 8), (3, 16), (50, 600)):
        pauses = [one.pause_s(attempt) for _ in range(200)]
        assert expected * 0.5 <= min(pauses) < expected * 0.8 and expected * 1.2 < max(pauses) <= expected * 1.5
    assert PipelineStep("a", Path(), retry_delay_s=0).pause_s(2) == 0


# --- sweeps ---------------------------------------------------------------------------------------------------------------------------

SWEEP = step("prepare") + step("train", "train.ipynb", matrix='{ C = [0.1, 1], penalty = ["l1", "l2"] }', params='{ data = "{prepare.total}", name = "model-{C}-{{x}}" }') \
    + step("pick", "gate.ipynb", params='{ models = "{train.model}", share = "{train[C=0.1,penalty=l2].score}" }')
ONE_OF_IT = ', share = "{train[C=0.1,penalty=l2].score}"'
MEMBERS = ["train[C=0.1,penalty=l1]", "train[C=0.1,penalty=l2]", "train[C=1,penalty=l1]", "train[C=1,penalty=l2]"]


def test_a_sweep_is_one_step_for_each_combination(shop):
    found = read(shop, SWEEP)
    assert [one.name for one in found.steps] == ["prepare", *MEMBERS, "pick"]
    assert [one.slug for one in found.steps][1:3] == ["train-C=0.1-penalty=l1", "train-C=0.1-penalty=l2"]
    assert found.steps[1].after == ("prepare",) and found.steps[-1].after == tuple(MEMBERS)
    assert known_values(found.steps[2], {"prepare.total": 7}) == {"data": 7, "name": "model-0.1-{x}", "C": 0.1, "penalty": "l2"}


def test_the_whole_sweep_hands_on_a_list_in_order_once_all_are_known(shop):
    pick = read(shop, SWEEP).steps[-1]
    some = {f"{name}.model": f"m@{i}" for i, name in enumerate(MEMBERS)}
    assert set(pick.references) == {*some, "train[C=0.1,penalty=l2].score"}
    assert known_values(pick, {**some, "train[C=0.1,penalty=l2].score": 0.5}) == {"models": ["m@0", "m@1", "m@2", "m@3"], "share": 0.5}
    del some["train[C=1,penalty=l1].model"]
    assert known_values(pick, some) == {}


def test_needs_may_name_a_sweep_or_one_of_it_and_so_may_a_choice_of_steps(shop):
    found = read(shop, SWEEP + step("all", needs='["train"]') + step("one", needs='["train[C=1,penalty=l1]"]'))
    after = {one.name: one.after for one in found.steps}
    assert after["all"] == tuple(MEMBERS) and after["one"] == ("train[C=1,penalty=l1]",)
    assert [one.name for one in found.only(["train"])] == MEMBERS and [one.name for one in found.only(["train[C=1,penalty=l1]", "prepare"])] == ["prepare", "train[C=1,penalty=l1]"]
    assert found.only([]) == found.steps
    with pytest.raises(NotFound, match="has no step 'trian'; did you mean train"):
        found.only(["trian"])


@pytest.mark.parametrize(("right", "wrong", "says"), [
    ("[0.1, 1]", "[]", "pipeline.toml, step train: matrix C = [] is not valid; expected a list of values, such as [0.1, 1, 10]."), ("[0.1, 1]", "1", "matrix C = 1 is not valid"),
    ("[0.1, 1]", "[1, 1]", "pipeline.toml, step train: matrix C has 1 twice; remove one of them."), ("[0.1, 1]", '[1, "1"]', "matrix C has 1 twice"),
    ("[0.1, 1]", '["low", 1]', "step train[C=low,penalty=l1]: train.ipynb: C = 'low' does not fit; expected float."), ('"l2"] }', '"l3"] }', "penalty = 'l3' does not fit"),
    ("penalty = [", "solver = [", "train.ipynb has no parameter 'solver'"), ('{ data = ', '{ C = 3, data = ', "C is both in params and in the matrix"),
    ("[0.1, 1]", json.dumps(list(range(5001))), "pipeline.toml, step train: its matrix makes 10,002 steps; expected at most 10,000, so leave out values or split it."),
    ("[0.1, 1]", json.dumps(list(range(5000))), "pipeline.toml: the sweeps make 10,002 steps; expected at most 10,000"),
    ("matrix = {", 'needs = ["train"]\nmatrix = {', "in a circle"), ("matrix = {", "matrix = [", "cannot be read"), ("{C}-", "{D}-", "refers to {D}, which is neither"),
    ("{train[C=0.1,", "{train[C=0.2,", "refers to a result of 'train[C=0.2,penalty=l2]', which is no step; did you mean train[C=0.1,penalty=l2]"),
], ids=range(14))
def test_every_mistake_in_a_sweep_is_one_sentence(shop, right, wrong, says):
    text = SWEEP if right in ONE_OF_IT else SWEEP.replace(ONE_OF_IT, "")
    assert right in text
    with pytest.raises(Invalid) as caught:
        read(shop, text.replace(right, wrong, 1))
    assert says in str(caught.value)


def test_values_of_a_sweep_are_never_taken_for_references_and_name_their_folders_apart(shop):
    values = ["a", "A", "a/b", "a.b", "{prepare.total}", "{", "x,C=1", "", " ", "é", "e", "..", "a\nb", "x" * 300, "x" * 301, "CON:1", "-1", "--"]
    found = read(shop, step("train", "train.ipynb", matrix=f"{{ data = {json.dumps(values)}, C = [-1, 1e-7, 2] }}"))
    assert [known_values(one, {})["data"] for one in found.steps[::3]] == values and len({one.name for one in found.steps}) == 54
    slugs = [one.slug for one in found.steps]
    assert len({slug.casefold() for slug in slugs}) == 54
    for slug in slugs:
        assert re.fullmatch(r"[A-Za-z0-9_.=-]{1,100}", slug) and not slug.endswith("."), "a name on every file system"
        (shop / slug).mkdir()
    assert all("\n" not in one.name for one in found.steps)


def test_a_sweep_shadows_a_parameter_of_the_pipeline_of_the_same_name(shop):
    found = read(shop, "[params]\nC = 5.0\n" + step("plain", "train.ipynb", params='{ C = "{C}" }') + step("many", "train.ipynb", matrix="{ C = [1, 2] }", params='{ name = "m{C}" }'))
    assert [known_values(one, found.params) for one in found.steps] == [{"C": 5.0}, {"name": "m1", "C": 1}, {"name": "m2", "C": 2}]


# --- several pipelines, and finding one -----------------------------------------------------------------------------------------------

SEVERAL = """[params]
start = 3
weeks = 2
[pipelines.train]
on_failure = "echo"
params = { weeks = 4 }
[[pipelines.train.step]]
name = "a"
notebook = "add.ipynb"
params = { a = "{start}", b = "{weeks}" }
[[pipelines.score.step]]
name = "b"
notebook = "add.ipynb"
params = { a = "{weeks}" }
"""


def test_a_file_holds_several_pipelines_that_share_parameters(shop):
    train, score = read(shop, SEVERAL, "train"), read(shop, SEVERAL, "score")
    assert pipelines_in("pipeline.toml") == ["train", "score"]
    assert (train.name, train.params, train.on_failure, score.params) == ("train", {"start": 3, "weeks": 4}, ("echo",), {"weeks": 2})
    with pytest.raises(Invalid, match=re.escape("pipeline.toml holds several pipelines; say which one: pipeline.toml:train, pipeline.toml:score.")):
        Pipeline.read("pipeline.toml")
    with pytest.raises(NotFound, match="pipeline.toml has no pipeline 'scroe'; did you mean score?"):
        Pipeline.read("pipeline.toml", "scroe")
    with pytest.raises(Invalid, match=r"pipeline\.toml: \[params\] start is used by no pipeline"):
        read(shop, SEVERAL.replace("{start}", "1"), "train")
    with pytest.raises(Invalid, match=r"pipeline\.toml:train: step a refers to \{starts\}"):
        read(shop, SEVERAL.replace("{start}", "{starts}").replace("start = 3\n", ""), "train")


def test_one_pipeline_is_named_by_the_file_or_by_its_folder(shop):
    (shop / "pipeline.toml").write_text(GOOD)
    (shop / "bare.toml").write_text(step("a"))
    assert pipelines_in("pipeline.toml") == ["two"] and pipelines_in("bare.toml") == [shop.name] and Pipeline.read("bare.toml").name == shop.name


def test_a_pipeline_is_found_by_file_folder_or_name(shop, tmp_path, monkeypatch):
    (shop / "pipeline.toml").write_text(GOOD)
    (shop / "both.toml").write_text(SEVERAL)
    (shop / "other.toml").write_text("[tool]\nstep = 1\n")
    (shop / "broken.toml").write_text("[[[")
    (shop / "pyproject.toml").write_text("[[step]]\n")
    here, both = shop.resolve() / "pipeline.toml", shop.resolve() / "both.toml"
    for where in (shop, tmp_path):
        monkeypatch.chdir(where)
        for what, found in {"pipeline.toml": (here, ""), "pipeline.toml:two": (here, "two"), "two": (here, "two"), "both.toml": (both, ""), "both.toml:score": (both, "score"), "train": (both, "train"),
                            str(shop): (here, ""), f"{shop}:two": (here, "two"), shop / "both.toml": (both, "")}.items():
            assert find(what, shop) == found
    assert find(".", shop) == (here, ""), "the project's own, where the working directory has none"
    with pytest.raises(NotFound, match="there is no pipeline 'tow' here; expected a pipeline.toml, a folder that holds one, or a pipeline's name: did you mean two?"):
        find("tow", shop)
    (shop / "third.toml").write_text(SEVERAL)
    with pytest.raises(Invalid, match="both.toml and third.toml both hold a pipeline 'train'; say which one, such as both.toml:train."):
        find("train", shop)
    (shop / "pipeline.toml").write_text(SEVERAL)
    assert find("train", shop) == (here, "train"), "pipeline.toml comes first"
    for what in ("nothing.toml", "a/b", "", "settings.ini"):
        with pytest.raises(NotFound):
            find(what, tmp_path / "elsewhere")


def test_a_file_that_cannot_be_opened_says_so(shop):
    if os.name != "posix" or os.geteuid() == 0:
        pytest.skip("the administrator can read every file")
    (shop / "pipeline.toml").write_text(GOOD)
    (shop / "pipeline.toml").chmod(0)
    with pytest.raises(Unavailable, match="cannot be read"):
        Pipeline.read("pipeline.toml")


# --- large graphs ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", [lambda i: [f"s{i - 1}"] if i else [], lambda i: ["s0"] if i else [], lambda i: [f"s{j}" for j in range(i // 40 * 40 - 40, i // 40 * 40)] if i >= 40 else []],
                         ids=["chain", "fan", "layers"])
def test_a_thousand_steps_are_read_ordered_and_drawn(shop, needs):
    found = read(shop, "".join(step(f"s{i}", needs=json.dumps(needs(i)), params=f"{{ a = {i} }}") for i in reversed(range(1000))))
    place = {one.name: i for i, one in enumerate(found.steps)}
    assert len(place) == 1000 and all(place[before] < place[one.name] for one in found.steps for before in one.after)
    check_parameters(found, {})
    drawn, text = diagram(found, dict.fromkeys(place, "cached")), outline(found, dict.fromkeys(place, "cached"), dict.fromkeys(place, "unchanged"))
    assert len(drawn) < 20_000 and len(text.splitlines()) <= 26 and text.startswith(f"{found.name}: 1,000 steps, 1000 cached")


# --- drawings -------------------------------------------------------------------------------------------------------------------------


def of(needs):
    return Pipeline("<two>", Path("p.toml"), {}, tuple(PipelineStep(name, Path(f"{name.partition('[')[0]}.ipynb"), tuple(after)) for name, after in needs.items()))


def test_a_drawing_has_every_step_once_and_escapes_names():
    drawn = diagram(of({"first": [], "second": ["first"]}), {"first": "passed", "second": "failed"}, {"second": "a < b & c"})
    assert drawn.count("<rect") == 2 and drawn.count("<path") == 1 and re.search(r"✓</tspan> first", drawn) and re.search(r"✗</tspan> second", drawn)
    assert "<two>" not in drawn and "a &lt; b &amp; c" in drawn


def test_lines_pass_beside_boxes_and_implied_needs_are_left_out():
    drawn = diagram(of({"a": [], "z": [], "b": ["a"], "d": ["z"], "c": ["a", "d"], "e": ["a", "c"]}))
    edges = [tuple(map(float, re.fullmatch(r"M([\d.]+) ([\d.]+)C.* ([\d.]+) ([\d.]+)", path).groups())) for path in re.findall(r'<path d="([^"]*)"', drawn)]
    boxes = [tuple(map(float, found)) for found in re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', drawn)]
    assert len(edges) == 7, "a–b, z–d, d–c, c–e, and a–c in three pieces; a–e is implied"
    for x, y, to_x, to_y in edges:
        middle = ((x + to_x) / 2, (y + to_y) / 2)
        assert not any(left < middle[0] < left + width and top < middle[1] < top + height for left, top, width, height in boxes)


def test_the_outline_says_what_would_happen_and_why():
    text = outline(of({"prepare": [], "check": ["prepare"], "train": ["check", "prepare"]}), {"prepare": "would run", "check": "cached"}, {"prepare": "orders@4 replaced orders@3"})
    assert text.splitlines() == ["<two>: 3 steps, 1 cached, 1 would run", "1 ┌ prepare             ▷ would run: orders@4 replaced orders@3", "2 ├ check    ← prepare  = cached", "3 └ train    ← check"]
    assert outline(of({"one": []})) == "<two>: 1 step\n1 ─ one"


def test_a_sweep_is_one_word_among_the_needs(shop):
    assert str(read(shop, SWEEP)).splitlines()[-1].rstrip() == "3 └ pick                     ← train[…] ×4"


def test_many_steps_are_counted_and_the_failed_ones_named():
    many = of({"prepare": [], **{f"train[seed={i}]": ["prepare"] for i in range(400)}, **{f"week[i={i}]": [f"week[i={i - 1}]" if i else "train[seed=3]"] for i in range(90)}})
    verdicts = {one.name: "failed" if "=13]" in one.name else "passed" for one in many.steps}
    text, drawn = outline(many, verdicts), diagram(many, verdicts)
    assert text.splitlines() == ["<two>: 491 steps, 489 passed, 2 failed (train[seed=13], week[i=13])", "   1 ┌ 1 step     prepare.ipynb     1 passed",
                                 "   2 ├ 400 steps  train.ipynb ×400  399 passed, 1 failed (train[seed=13])", "3–92 └ 90 steps   week.ipynb ×90    89 passed, 1 failed (week[i=13])"]
    assert "layers 3–92" in drawn and "400 steps" in drawn and drawn.count("<rect") == 5


def test_as_json_leaves_what_it_does_not_know():
    thing = object()
    assert as_json([thing, {"a": (1,)}]) == [thing, {"a": [1]}]
