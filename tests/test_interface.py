"""The three faces of a verb: Python, the command line (exit codes, streams, JSON) and the magic (variables, cells, completion)."""

import inspect
import json
import os
import subprocess
import sys

import pandas as pd
import pytest
from projects import SMALL, shop  # noqa: F401

import mlops_nb as mlops
from mlops_nb.core.errors import Conflict, GateFailed, Invalid, NotFound, RunFailed, Unavailable, Untrusted
from mlops_nb.core.report import Report
from mlops_nb.interface.cli import Usage, main, verb_parser
from mlops_nb.interface.verbs import VERBS, kind_of

FRAME = pd.DataFrame({"item": ["mug", "tray", "mug"], "sold": [3, 5, 8]})


def mlops_command(*words: str, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "mlops_nb", *words], capture_output=True, text=True, timeout=600, **options)


# -- the table --------------------------------------------------------------------------------------

@pytest.mark.parametrize("verb", VERBS.values(), ids=lambda verb: verb.name)
def test_every_verb_exists_with_help_for_each_argument(verb):
    assert callable(verb.function) and verb.function.__doc__
    assert [argument.name for argument in verb.arguments if not argument.help] == []
    assert not any(argument.kind == "object" and argument.positional for argument in verb.arguments[1:]), "only the first argument may be any object"
    assert verb.example.split()[:2] == ["mlops", verb.name]
    assert set(verb.completes) <= {argument.name for argument in verb.arguments}


@pytest.mark.parametrize("verb", VERBS.values(), ids=lambda verb: verb.name)
def test_help_shows_an_example_that_parses(verb, capsys):
    import shlex

    assert main([verb.name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert verb.example in out and err == ""
    verb_parser(verb).parse_args(shlex.split(verb.example)[2:])


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_is_an_attribute_whatever_was_imported_before(name):
    code = (f"import mlops_nb, inspect, importlib\nbefore = inspect.signature(getattr(mlops_nb, {name!r}))\n"
            f"for floor in ('validate', 'monitor', 'serve', 'deploy'): importlib.import_module(f'mlops_nb.{{floor}}')\n"
            f"from mlops_nb.interface.verbs import VERBS\n"
            f"assert callable(getattr(mlops_nb, {name!r})) and inspect.signature(getattr(mlops_nb, {name!r})) == before == inspect.signature(VERBS[{name!r}].function)")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize("name", ["output", "deployment", "load_model", "attach"])
def test_what_a_notebook_needs_beside_the_verbs(name):
    assert callable(getattr(mlops, name)) and name in dir(mlops)


def test_the_package_lists_its_verbs():
    assert set(VERBS) <= set(dir(mlops))
    with pytest.raises(AttributeError, match="has no attribute 'sav'"):
        mlops.sav


def test_kinds_are_read_from_annotations_of_both_sorts():
    assert [kind_of(one) for one in ("str", str, "list[str] | None", "dict[str, str] | None", "Model | str", object, "float | None")] == \
        ["str", "str", "list", "dict", "object", "object", "float"]


# -- the command line ---------------------------------------------------------------------------------

def test_results_on_stdout_messages_on_stderr(shop):
    FRAME.to_parquet("sales.parquet")
    done = mlops_command("--project", str(shop), "save", "sales.parquet", "sales", "-m", "first", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["name"], facts["version"], facts["message"]) == ("sales", 1, "first")
    wrong = mlops_command("--project", str(shop), "load", "sale@1")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith("mlops: ") and "sales" in wrong.stderr and wrong.stderr.count("\n") == 1


@pytest.mark.parametrize("line, what, params", [
    ("x.ipynb -p C=0.5 k=10", "x.ipynb", {"C": "0.5", "k": "10"}), ("-p C=0.5 k=10 x.ipynb", "x.ipynb", {"C": "0.5", "k": "10"}), ("-p C=0.5 -p k=10 x.ipynb", "x.ipynb", {"C": "0.5", "k": "10"}),
    ("--params=C=0.5 k=10 x.ipynb", "x.ipynb", {"C": "0.5", "k": "10"}), ("-p=C=0.5 k=10 --resources x.ipynb", "x.ipynb", None), ("-p C=a=b data/week=3/x.ipynb", "data/week=3/x.ipynb", {"C": "a=b"}),
    ("-p C=0.5 -- week=3.ipynb", "week=3.ipynb", {"C": "0.5"}), ("-p C=0.5 ./week=3.ipynb", "./week=3.ipynb", {"C": "0.5"}), ("-p a/b=1 x.ipynb", "x.ipynb", {"a/b": "1"}),
    ("-p C= k=-1 x.ipynb", "x.ipynb", {"C": "", "k": "-1"}), ("x.ipynb", "x.ipynb", {}), ("-p 'intended use=shop pages' 'limits=few' x", "x", {"intended use": "shop pages", "limits": "few"})])
def test_one_flag_takes_all_pairs_that_follow(line, what, params):
    import shlex

    parser = verb_parser(VERBS["run"])
    if params is None:
        with pytest.raises(Usage):
            parser.parse_args(shlex.split(line))
        return
    options = parser.parse_args(shlex.split(line))
    assert options.what == what and dict(pair for pairs in options.params or [] for pair in pairs) == params


def test_pairs_reach_their_verb(monkeypatch):
    from mlops_nb.deploy import deployments
    from mlops_nb.interface.cli import call

    calls = []
    monkeypatch.setattr(deployments, "traffic", lambda name, split, *, shadow="", why="": calls.append((name, split, shadow)))
    monkeypatch.setattr(deployments, "deploy", lambda model, **more: calls.append((model, more["traffic"], more["autoscale"], more["replicas"])))
    for verb, line in (("traffic", "shop champion=90 challenger=10 --shadow 3"), ("traffic", "--shadow 3 shop champion=90 challenger=10"),
                       ("deploy", "--traffic champion=90 challenger=10 --autoscale min=1 max=3 shop@champion"), ("deploy", "shop@champion --traffic champion=90 --replicas 2 --traffic challenger=10")):
        parser = verb_parser(VERBS[verb])
        call(VERBS[verb], parser.parse_args(line.split()))
    split = {"champion": "90", "challenger": "10"}
    assert calls == [("shop", split, "3")] * 2 + [("shop@champion", split, {"min": "1", "max": "3"}, 0), ("shop@champion", split, None, 2)]


@pytest.mark.parametrize("words, sentence", [
    (["stauts"], "did you mean status"),
    (["status", "--verbose"], "unrecognized arguments: --verbose; see `mlops status --help`"),
    (["save", "x.parquet"], "the following arguments are required: name"),
    (["monitor"], "required: name"),
    (["run", "x", "-p", "C"], "'C' is not KEY=VALUE"),
    (["run", "x", "-p", "C=1", "k"], "unrecognized arguments: k"),
    (["run", "-p", "x"], "'x' is not KEY=VALUE"),
    (["run", "x", "-p"], "argument --params/-p: expected one argument"),
    (["traffic", "shop"], "the following arguments are required: KEY=VALUE"),
    (["traffic", "shop", "champion=50", "champion=50"], "split names 'champion' twice"),
    (["serve", "m", "--port", "high"], "'high' is not a whole number"),
    (["--projekt", "x", "status"], "unknown option '--projekt'"),
    (["--project"], "--project needs a folder"),
    (["init", "--nam", "x"], "unrecognized arguments: --nam"),
    (["load", "no/such"], "is not an address"),
    (["load", "orders@3"], "orders"),
])
def test_a_mistake_is_one_line_and_exit_code_2(words, sentence, shop, capsys, monkeypatch):
    monkeypatch.chdir(shop)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert sentence in err and out == "" and err.count("\n") == 1


def test_outside_a_project_every_verb_says_how_to_make_one(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLOPS_PROJECT", raising=False)
    monkeypatch.chdir(tmp_path)
    for words in (["status"], ["log", "orders"], ["models"], ["runs"], ["deployments"], ["promote", "m@1"]):
        assert main(words) == 2
        assert "make one with `mlops init`" in capsys.readouterr().err


@pytest.mark.parametrize("error, code", [(Invalid("x"), 2), (NotFound("x"), 2), (Conflict("x"), 2), (Untrusted("x"), 2), (Unavailable("x"), 2),
                                         (GateFailed("x"), 1), (RunFailed("x"), 1), (KeyboardInterrupt(), 130)])
def test_each_error_has_its_exit_code(error, code, monkeypatch, capsys):
    import mlops_nb.interface.status as status_module

    def fails(folder: str = "") -> None:
        raise error
    monkeypatch.setattr(status_module, "status", fails)
    assert main(["status"]) == code
    assert capsys.readouterr().err.startswith("mlops: ")


def test_a_failed_gate_prints_its_report_and_exits_1(shop, capsys, monkeypatch):
    monkeypatch.chdir(shop)
    mlops.save(FRAME.assign(gap=[None, None, 1.0]), "sales")
    (shop / "settings.ini").write_text("[project]\nname = shop\n[gates]\ncheck.missing = 2%\n")
    assert main(["check", "sales@1"]) == 1
    out, err = capsys.readouterr()
    assert "missing" in out and "report: " in err
    assert main(["check", "sales@1", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_a_closed_pipe_is_no_error(shop):
    done = subprocess.run(f"{sys.executable} -m mlops_nb --help | head -1", shell=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("usage: mlops") and done.stderr == ""


# -- the magic ------------------------------------------------------------------------------------------

@pytest.fixture
def ip(shop, monkeypatch):
    from IPython.testing.globalipapp import start_ipython
    from IPython import get_ipython

    monkeypatch.chdir(shop)
    shell = get_ipython() or start_ipython()
    shell.run_line_magic("load_ext", "mlops_nb")
    yield shell
    shell.run_line_magic("unload_ext", "mlops_nb")
    shell.reset(new_session=False)


def test_a_variable_is_the_object_itself(ip):
    ip.user_ns.update(orders=FRAME, note="it's the first")
    saved = ip.run_line_magic("mlops", 'save $orders sales -m "{note.upper()} $note"')
    assert saved.version == 1 and saved.message == "IT'S THE FIRST it's the first"
    pd.testing.assert_frame_equal(ip.run_line_magic("mlops", "load sales@1"), FRAME)
    assert ip.run_line_magic("mlops", "save {orders.head(2)} sales").rows == 2
    assert ip.run_line_magic("mlops", "save $orders sales -m 'costs $5 {x}'").message in ("costs $5 {x}", "IT'S THE FIRST it's the first")


def test_a_flag_takes_several_pairs_and_a_dict_is_one_too(ip, monkeypatch):
    from mlops_nb.deploy import deployments

    calls = []
    monkeypatch.setattr(deployments, "deploy", lambda model, **more: calls.append((model, more["traffic"])))
    monkeypatch.setattr(deployments, "traffic", lambda name, split, *, shadow="", why="": calls.append((name, split)))
    ip.user_ns.update(share=10, split={"champion": 90, "challenger": 10})
    for line in ("deploy --traffic champion={100 - share} challenger=$share shop@champion", "deploy shop@champion --traffic $split", "traffic shop $split", "deploy --traffic $split 3=0 shop@champion"):
        ip.run_line_magic("mlops", line)
    assert calls == [("shop@champion", {"champion": "90", "challenger": "10"}), ("shop@champion", ip.user_ns["split"]), ("shop", ip.user_ns["split"]), ("shop@champion", {**ip.user_ns["split"], "3": "0"})]


def test_the_cell_is_the_data(ip):
    ip.user_ns["orders"] = FRAME
    saved = ip.run_cell_magic("mlops", "save sales", "few = orders.head(2)\nfew")
    assert saved.rows == 2 and "few" in ip.user_ns
    assert isinstance(ip.run_cell_magic("mlops", "check", "orders"), Report)


def test_mistakes_are_usage_errors(ip):
    from IPython.core.error import UsageError

    for line, sentence in {"stauts": "did you mean status", "save $nowhere sales": r"\$nowhere cannot be evaluated", "init --nmae x": "unrecognized arguments",
                           'save "orders': "close the quote", "save {1 / 0} x": "ZeroDivisionError"}.items():
        with pytest.raises(UsageError, match=sentence):
            ip.run_line_magic("mlops", line)
    for line, cell, sentence in (("promote x", "1", "takes no cell"), ("save x", "y = 1", "must end with the data")):
        with pytest.raises(UsageError, match=sentence):
            ip.run_cell_magic("mlops", line, cell)
    with pytest.raises(NameError):
        ip.run_cell_magic("mlops", "save x", "not_defined")


def test_an_error_shows_one_line_in_a_notebook(ip, capsys):
    ip.run_cell("%mlops load nothing@1")
    shown = capsys.readouterr()
    assert "NotFound" in shown.out + shown.err and "Traceback" not in shown.out + shown.err


def test_help_is_the_command_lines(ip, capsys):
    assert ip.run_line_magic("mlops", "save --help") is None
    assert "%mlops save orders.parquet orders" in capsys.readouterr().out
    ip.run_line_magic("mlops", "")
    assert "%mlops VERB --help" in capsys.readouterr().out


def test_completion_of_verbs_flags_and_names(ip):
    mlops.save(FRAME, "orders"), mlops.save(FRAME, "returns")

    def complete(line: str) -> list[str]:
        return ip.complete(line, cursor_pos=len(line))[1]
    from mlops_nb.interface.magics import candidates

    assert candidates("%mlops de") == ["deploy", "deployments"]
    assert candidates("%mlops save x orders --m") == ["--message"]
    assert candidates("%mlops load ") == ["orders", "returns"]
    assert candidates("%mlops load re") == ["returns"]
    assert candidates("%mlops monitor recommender --reference o") == ["orders"]
    assert candidates("%mlops nonsense ") == []
    ip.Completer.use_jedi = False
    assert "orders" in complete("%mlops load or") and "status" in complete("%mlops stat")


def test_unloading_takes_everything_back(ip):
    ip.run_line_magic("unload_ext", "mlops_nb")
    assert "mlops" not in ip.magics_manager.magics["line"]
    ip.run_line_magic("load_ext", "mlops_nb")


def test_stdlib_names_stay_ipythons(ip):
    assert ip.magics_manager.magics["line"]["run"].__func__.__module__.startswith("IPython")


def test_a_usage_error_is_not_a_system_exit():
    with pytest.raises(Usage):
        verb_parser(VERBS["save"]).parse_args([])
    assert inspect.signature(mlops.save).parameters["name"].kind.name == "POSITIONAL_OR_KEYWORD"
    assert os.environ.get("MLOPS_STEP_FOLDER") is None
