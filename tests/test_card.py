"""What would break for somebody who reads a card: a figure that is not the recorded one, a command that does not fit, a gap that goes unseen."""

import json
import re
import shlex

import numpy as np
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from mlops_nb.core.errors import Invalid, NotFound
from mlops_nb.core.report import Report, all_checks
from mlops_nb.data.store import save
from mlops_nb.model.card import ASKED, UNWRITTEN, architecture, card, importance, request_of
from mlops_nb.model.registry import attach, attached, promote, register
from models import customers, database, shop  # noqa: F401

FRAME, BOUGHT = customers()
NUMBERS = FRAME[["value", "pieces"]].fillna(0)


def pipeline(estimator):
    columns = ColumnTransformer([("numbers", SimpleImputer(strategy="median"), ["value", "pieces"]), ("words", OneHotEncoder(), ["country", "channel"])])
    return make_pipeline(columns, estimator)


@pytest.fixture
def buys(shop):  # noqa: F811
    """Two versions of a model, the second one validated and champion."""
    estimator = pipeline(LogisticRegression(C=0.3)).fit(FRAME, BOUGHT)
    for n in (2, 3, 4):
        save(FRAME.head(n), "customers")
    for _ in range(2):
        made = register(estimator, "buys", params={"C": 0.3}, metrics={"auc": 0.812}, data=["customers@3"], example=FRAME)
    promote("buys@1")
    promote("buys@2")
    attach("buys@2", "validation", {"title": "Validation", "summary": "Good enough.", "holdout": "customers@4", "passed": False, "auc": 0.797,
                                    "checks": [{"name": "auc", "passed": False, "value": 0.797, "expected": ">= 0.9"}],
                                    "slices": {"country": [{"group": "France", "auc": 0.78, "rows": 40}], "gates": [{"name": "gap", "passed": True, "value": 0.01}]},
                                    "plot": {"plot": "intervals", "title": "gain over the champion", "x": ["auc"], "y": [0.01], "low": [-0.01], "high": [0.03]}})
    return made


def test_every_section_of_mitchell_et_al_is_there(buys):
    # Mitchell et al. 2019, Model Cards for Model Reporting, figure 1
    wanted = ["model details", "intended use", "factors", "metrics", "evaluation data", "training data", "quantitative analyses", "ethical considerations",
              "caveats and recommendations"]
    facts = card("buys").facts
    assert set(wanted) | {"architecture", "feature importance", "tuning", "runbook", "inputs"} <= set(facts)


def test_it_quotes_what_was_recorded(buys, shop):  # noqa: F811
    text = card("buys@champion").markdown()
    for recorded in ("buys@2", "champion", "customers@3", "customers@4", "0.812", "0.797", ">= 0.9", "France", "LogisticRegression", "C=0.3", buys.digest[:12], "Good enough."):
        assert recorded in text, recorded
    assert (shop / ".mlops/reports/card-buys@2.md").read_text() == text
    page = (shop / ".mlops/reports/card-buys@2.html").read_text()
    assert "gain over the champion" in page and page.count("<svg") == 2 and not re.search(r"(src|href)=.?https?:", page)


def test_a_card_quotes_a_failed_gate_and_does_not_fail_itself(buys, tmp_path, monkeypatch):
    for name, value in {"MLOPS_STEP_FOLDER": tmp_path / "step", "MLOPS_STEP": "document", "MLOPS_RUN": "r1"}.items():
        monkeypatch.setenv(name, str(value))
    (tmp_path / "step").mkdir()
    report = card("buys@2")
    assert not report.judges and not list(all_checks(report.facts)), "a card gives no verdict of its own"
    assert report.facts["quantitative analyses"]["gates"][0]["held"] == "NO"
    assert {path.name for path in (tmp_path / "step").iterdir()} == {"card-buys@2.html", "card-buys@2.json", "card-buys@2.md", "models_used.jsonl"}


def test_what_nobody_wrote_is_marked_and_what_somebody_wrote_stays(buys, tmp_path):
    first = card("buys", about={"Intended_Use": "Mail to likely buyers.", "owner": "ann@example.org"}, to=str(tmp_path / "docs"))
    assert first.facts["intended use"]["intended use"] == ["Mail to likely buyers."]
    assert first.facts["intended use"]["users"][0].startswith(UNWRITTEN) and UNWRITTEN in first.facts["summary"]
    again = card("buys", about={"caveats": "One year only."})
    assert again.facts["intended use"]["intended use"] == ["Mail to likely buyers."] and again.facts["caveats and recommendations"] == ["One year only."]
    assert "intended use" not in again.facts["still to be written"][0] and "users" in again.facts["still to be written"][0]
    done = card("buys", about={name: "Written." for name in ASKED})
    assert UNWRITTEN not in done.markdown() and "still to be written" not in done.facts
    assert UNWRITTEN in card("buys@1").markdown(), "another version is another card"
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == ["card.html", "card.md"]
    assert attached("buys@2", "card")["about"]["owner"] == "Written."


def test_the_runbook_fits_this_model(buys):
    steps = card("buys@2").facts["runbook"]
    commands = [row["command"] for rows in steps.values() for row in rows if "command" in row]
    for command in ("mlops promote buys@2", "mlops deploy buys@champion", "mlops monitor buys --reference customers@3", "mlops promote buys@1",
                    "mlops validate buys@challenger customers@4"):
        assert command in commands
    curl = next(shlex.split(command) for command in commands if command.startswith("curl"))
    sent = json.loads(curl[curl.index("-d") + 1])
    assert set(sent["dataframe_records"][0]) == set(FRAME.columns)


def test_every_mlops_command_of_the_runbook_parses(buys):
    cli = pytest.importorskip("mlops_nb.interface.cli")
    verbs = pytest.importorskip("mlops_nb.interface.verbs").VERBS
    for rows in card("buys@2").facts["runbook"].values():
        for row in rows:
            if row.get("command", "").startswith("mlops "):
                verb, *rest = shlex.split(row["command"])[1:]
                assert verb in verbs, row["command"]
                cli.verb_parser(verbs[verb]).parse_args(rest)


def test_the_first_version_has_nothing_to_go_back_to(shop):  # noqa: F811
    register(LogisticRegression().fit(NUMBERS, BOUGHT), "lonely")
    book = card("lonely").facts["runbook"]
    assert [row["command"] for row in book["go back"]] == ["mlops undeploy lonely"]


def test_a_bare_record_makes_an_honest_card(shop):  # noqa: F811
    register(LogisticRegression().fit(NUMBERS.to_numpy(), BOUGHT), "bare", alias="")
    text = card("bare").markdown()
    for gap in ("No metrics were recorded", "No data versions were recorded", "No parameters were recorded", "Not validated yet: mlops validate bare@1", "Not recorded; register it with an example"):
        assert gap in text, gap


def test_importance_is_what_the_model_says():
    forest = pipeline(RandomForestClassifier(10, random_state=0)).fit(FRAME, BOUGHT)
    shown = importance(forest)
    names = [name.split("__")[-1] for name in forest[:-1].get_feature_names_out()]
    expected = sorted(zip(forest[-1].feature_importances_, names), reverse=True)
    assert [(row["feature"], list(row.values())[1]) for row in shown["figures"]] == [(name, value) for value, name in expected]
    search = GridSearchCV(pipeline(LogisticRegression()), {"logisticregression__C": [0.1, 1]}, cv=3).fit(FRAME, BOUGHT)
    best = search.best_estimator_
    assert dict(list(row.values())[:2] for row in importance(search)["figures"]) == dict(zip([n.split("__")[-1] for n in best[:-1].get_feature_names_out()], best[-1].coef_[0]))
    assert importance(forest, {"value": 0.3, "pieces": 0.5})["picture"]["x"] == ["pieces", "value"]
    assert "does not say which features matter" in importance(HistGradientBoostingClassifier(max_iter=2).fit(NUMBERS, BOUGHT))["not measured"]
    many = LogisticRegression(C=0.05).fit(np.random.default_rng(0).random((90, 30)), np.arange(90) % 3)
    assert len(importance(many)["picture"]["x"]) == 15


def test_the_architecture_names_every_part():
    search = GridSearchCV(pipeline(LogisticRegression(C=2)), {"logisticregression__C": [0.1, 1]}, cv=3)
    parts = list(architecture(search))
    assert [part["class"] for part in parts] == ["GridSearchCV", "Pipeline", "ColumnTransformer", "SimpleImputer", "OneHotEncoder", "LogisticRegression"]
    assert parts[3]["chosen"] == "strategy=median" and parts[3]["columns"] == "value, pieces" and parts[5]["chosen"] == "C=2"
    assert parts[3]["step"] == "model › estimator › columntransformer › numbers"


@pytest.mark.parametrize(("call", "error", "says"), [
    (lambda: card("nothing"), NotFound, r"there is no model 'nothing'; there are: buys\."),
    (lambda: card(LogisticRegression()), Invalid, "a card describes a registered model, and this is a LogisticRegression"),
    (lambda: card("buys", about={"intended usage": "x"}), Invalid, "no section 'intended usage'; did you mean intended use?"),
])
def test_mistakes_get_one_sentence(buys, call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_the_request_is_what_the_server_expects(buys):
    sent = json.loads(request_of(buys))["dataframe_records"][0]
    assert sent == {"value": 1.0, "pieces": 1.0, "country": "text", "channel": "text"}
    assert isinstance(card(buys), Report)
