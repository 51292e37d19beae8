"""The side panel in a real JupyterLab: what a person sees, in both themes, by pointer and by keyboard."""

import json
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from browser import TOKEN, chromium, faint_texts, jupyter_lab, page  # noqa: F401 (fixtures)

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("lab")]  # one JupyterLab for the module

PANEL = "#mlops-status"
TAB = 'li.lm-TabBar-tab[data-id="mlops-status"]'

# Run in the server as its configuration: the status comes from facts.json in the folder, so that a test can change it.
STAND_IN = """
import json, sys, types
from pathlib import Path
from mlops_nb.core import errors
from mlops_nb.core.report import Report

def status(folder=None):
    file = Path(folder, "facts.json")
    if not file.exists():
        raise errors.NotFound("There is no settings.ini in this folder or above it; run `mlops init`.")
    facts = json.loads(file.read_text())
    if "raise" in facts:
        raise getattr(errors, facts["raise"])(facts["message"])
    return Report(facts)

stand = types.ModuleType("mlops_nb.interface.status")
stand.status = status
sys.modules[stand.__name__] = stand
"""

NOTHING = {"project": {"name": "recommender", "folder": "shop"}, "data": [], "models": [], "runs": [], "deployments": [], "alerts": []}
FACTS = {
    **NOTHING,
    "data": [
        {"name": "orders", "version": 3, "rows": 1067371, "columns": 8, "saved_at": "2026-11-02T07:00:00+00:00", "message": "weeks 1 to 53"},
        {"name": "customers", "version": 1, "rows": None, "columns": None, "saved_at": None, "message": None},
    ],
    "models": [
        {"name": "recommender", "version": 4, "aliases": {"champion": 3, "challenger": 4}, "run": "b41c0d1e9f2a4c55"},
        {"name": "returns", "version": 1, "aliases": {}, "run": None},
    ],
    "runs": [
        {"id": "2026-11-02-a1", "pipeline": "recommender", "status": "passed", "started_at": "2026-11-02T07:00:00+00:00", "seconds": 83.4},
        {"id": "2026-11-01-b7", "pipeline": "recommender", "status": "failed", "started_at": "2026-11-01T07:00:00+00:00", "seconds": 612.0},
    ],
    "deployments": [
        {"name": "recommender", "model": "recommender@3", "url": "http://127.0.0.1:8300", "state": "running"},
        {"name": "returns", "model": "returns@1", "url": None, "state": "died"},
    ],
    "alerts": [{"at": "2026-11-02T09:00:00+00:00", "severity": "warning", "message": "<b>recency</b> drifted: PSI 0.31 over the limit 0.2"}],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def lab(root, tmp_path_factory):
    with jupyter_lab(root, tmp_path_factory.mktemp("home"), config=STAND_IN) as lab:
        yield lab


@pytest.fixture
def facts(root):
    "Write what the status will say; without a call there is no project."
    file = root / "facts.json"
    yield lambda facts: file.write_text(json.dumps(facts))
    file.unlink(missing_ok=True)


@pytest.fixture
def picture(tmp_path, page):  # noqa: F811
    "Save a screenshot, to look at: in $SCREENSHOTS, otherwise in the test's folder."
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    return lambda name: page.screenshot(path=folder / f"{name}.png")


@pytest.fixture
def panel(lab, page):  # noqa: F811
    "JupyterLab open in the page, with the panel in front."

    def show():
        lab.open(page)
        page.click(TAB)
        page.wait_for_selector(f"{PANEL} .jp-mlops-View")
        return page.locator(PANEL)

    yield show
    assert not page.faults


def rows(panel, stage):
    "The rows of a stage as text, a space between the parts."
    texts = panel.locator(f'[data-stage="{stage}"] li').all_inner_texts()
    return [re.sub(r"\s+", " ", text).strip() for text in texts]


def test_each_stage_shows_its_newest_facts(panel, facts, page, picture):  # noqa: F811
    facts(FACTS)
    panel = panel()
    panel.get_by_role("heading", name="recommender").wait_for()
    picture("status-light")
    assert [re.sub(r"\s+", " ", text) for text in panel.locator("summary").all_inner_texts()] == [
        "Alerts 1", "Data 2", "Models 2", "Runs 2", "Deployments 2"
    ]  # fmt: skip
    orders, customers = rows(panel, "data")
    assert re.fullmatch(r"orders @3 1,067,371 rows · 8 columns · .+ · weeks 1 to 53", orders)
    assert customers == "customers @1"
    assert rows(panel, "models") == [
        "recommender ✓ champion @3 challenger @4 latest @4 · run b41c0d1e",
        "returns latest @1",
    ]
    passed, failed = rows(panel, "runs")
    assert re.fullmatch(r"recommender ✓ passed .+ · 83\.4 s", passed)
    assert re.fullmatch(r"recommender ✕ failed .+ · 10\.2 min", failed)
    assert rows(panel, "deployments") == ["recommender ✓ running recommender@3 · http://127.0.0.1:8300", "returns ✕ died returns@1"]
    (alert,) = rows(panel, "alerts")
    assert alert.startswith("<b>recency</b> drifted: PSI 0.31 over the limit 0.2 ! warning"), "text from a project is text, never HTML"


def test_refresh_shows_what_has_changed(panel, facts):
    facts(FACTS)
    panel = panel()
    panel.get_by_text("@3").first.wait_for()
    facts({**FACTS, "data": [{**FACTS["data"][0], "version": 4, "message": "one week more"}]})
    panel.get_by_role("button", name="Refresh").click()
    panel.get_by_text("one week more").wait_for()
    assert panel.locator('[data-stage="data"] li').count() == 1


def test_a_project_with_nothing_in_it_says_what_comes_next(panel, facts, picture):
    facts(NOTHING)
    panel = panel()
    panel.get_by_role("heading", name="recommender").wait_for()
    picture("status-nothing-yet")
    for verb in ("save", "register", "run", "deploy"):
        assert panel.get_by_text(f"mlops {verb}", exact=True).is_visible()


def test_no_project_says_how_to_start_one_and_a_refresh_finds_it(panel, facts, picture):
    panel = panel()
    panel.get_by_role("heading", name="No project here yet").wait_for()
    picture("no-project")
    assert panel.get_by_text("mlops init", exact=True).first.is_visible()
    facts(FACTS)
    panel.get_by_role("button", name="Refresh").click()
    panel.get_by_role("heading", name="recommender").wait_for()


def test_an_error_is_shown_in_its_own_words_and_goes_away(panel, facts, page, picture):  # noqa: F811
    message = "settings.ini, section [gates], key ndcg: 'high' is no number; give one such as 0.34."
    facts({"raise": "Invalid", "message": message})
    panel = panel()
    alert = panel.get_by_role("alert")
    alert.get_by_text(message).wait_for()
    picture("error")
    facts(FACTS)
    panel.get_by_role("button", name="Refresh").click()
    panel.get_by_role("heading", name="recommender").wait_for()
    assert alert.count() == 0


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("abort", "The Jupyter server does not answer"),
        ({"status": 404, "body": "<html>404</html>"}, "jupyter server extension enable mlops_nb"),
        ({"status": 403, "body": "{}"}, "signed out"),
        ({"status": 502, "body": "<html>"}, "502"),
        ({"status": 200, "body": "<html>a proxy's own page</html>"}, "cannot be read"),
        ({"status": 200, "body": '{"project": {"name": "half"}}'}, "half"),
    ],
    ids=["no server", "no extension", "signed out", "bad gateway", "not json", "half an answer"],
)
def test_a_server_that_fails_gets_a_sentence_too(panel, facts, page, fault, words):  # noqa: F811
    facts(FACTS)
    page.route("**/mlops/status*", lambda route: route.abort() if fault == "abort" else route.fulfill(**fault))
    panel = panel()
    panel.get_by_text(words).first.wait_for()


STATES = {
    "error": ({"raise": "Invalid", "message": "Set `ndcg` to a number."}, "The status cannot be shown"),
    "nothing": (NOTHING, "recommender"),
    "status": (FACTS, "recommender"),
}


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark", "JupyterLab Dark High Contrast"])
def test_every_text_is_readable_in_every_theme(panel, facts, lab, page, picture, theme):  # noqa: F811
    panel = panel()
    lab.execute(page, "apputils:change-theme", theme=theme)
    page.wait_for_function("theme => document.body.dataset.jpThemeName === theme", arg=theme)
    page.wait_for_function("() => getComputedStyle(document.body).getPropertyValue('--jp-ui-font-color2')")
    panel.get_by_role("heading", name="No project here yet").wait_for()
    assert faint_texts(page, f"{PANEL} .jp-mlops-View") == []
    for state, (answer, heading) in STATES.items():
        facts(answer)
        panel.get_by_role("button", name="Refresh").click()
        panel.locator('[aria-busy="false"]').get_by_role("heading", name=heading).first.wait_for()
        picture(f"{theme} {state}".lower().replace(" ", "-"))
        assert faint_texts(page, f"{PANEL} .jp-mlops-View") == [], state


def test_the_palette_opens_the_panel_and_the_keyboard_works_it(lab, facts, page):  # noqa: F811
    facts(FACTS)
    lab.open(page)
    assert not page.locator(PANEL).is_visible()
    page.keyboard.press("Control+Shift+C")
    page.locator(".lm-CommandPalette-input, .lm-CommandPalette-header input").first.fill("MLOps: show status")
    page.locator(".lm-CommandPalette-item", has_text="MLOps: show status").wait_for()
    page.keyboard.press("Enter")
    panel = page.locator(PANEL)
    panel.get_by_role("heading", name="recommender").wait_for()
    focused = "document.activeElement.closest('summary')?.innerText.trim()"
    for _ in range(12):
        if (page.evaluate(focused) or "").startswith("Alerts"):
            break
        page.keyboard.press("Tab")
    assert page.evaluate(focused).startswith("Alerts")
    page.keyboard.press("Enter")
    assert panel.locator('[data-stage="alerts"] li').first.is_hidden()
    page.keyboard.press("Tab")
    assert page.evaluate(focused).startswith("Data")


def choose_folder(lab, folder):
    "Set the setting as the settings editor does."
    url = f"{lab.url}/lab/api/settings/mlops-nb:plugin"
    body = json.dumps({"raw": json.dumps({"folder": folder})}).encode()
    request = urllib.request.Request(url, body, {"Authorization": f"token {TOKEN}"}, method="PUT")
    urllib.request.urlopen(request).close()


@pytest.mark.parametrize(
    ("folder", "heading"),
    [("shop", "the shop"), ("", "No project here yet"), ("../..", "The status cannot be shown")],
    ids=["a folder", "the root", "outside"],
)
def test_the_setting_chooses_the_project_below_the_root(lab, root, panel, folder, heading):
    shop = root / "shop"
    shop.mkdir(exist_ok=True)
    (shop / "facts.json").write_text(json.dumps({**NOTHING, "project": {"name": "the shop", "folder": "shop"}}))
    choose_folder(lab, folder)
    try:
        panel().get_by_role("heading", name=heading).wait_for()
    finally:
        choose_folder(lab, "")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "A real project that has been through every stage once: data, model, deployment, run, alert."
    import mlops_nb as mlops
    import nbformat
    import pandas as pd
    from mlops_nb.core.settings import init, in_project
    from mlops_nb.monitor.alerts import alert
    from sklearn.linear_model import LogisticRegression

    folder = tmp_path_factory.mktemp("real") / "shop"
    orders = pd.DataFrame({"price": [1.0, 2.0, 3.0, 4.0], "bought": [0, 0, 1, 1]})
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("MLOPS_")]:
            patch.delenv(name)
        patch.setenv("MLOPS_PROGRESS", "0")
        patch.setenv("MLOPS_HOME", str(folder.parent / "home"))
        init(str(folder), name="shop")
        note = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
        nbformat.write(note, folder / "prices.ipynb")
        with in_project(folder):
            mlops.save(orders, "orders", message="four orders")
            mlops.register(LogisticRegression().fit(orders[["price"]], orders["bought"]), "buyers")
            mlops.promote("buyers@1", "champion")
            alert("price drifted: PSI 0.31 over the limit 0.2", severity="warning", subject="buyers")
            mlops.run(str(folder / "prices.ipynb"))
            try:
                mlops.deploy("buyers@champion")
                yield folder
            finally:
                mlops.undeploy("buyers")


def declared():
    "The fields that `lab/src/status.ts` declares, by the key they stand under in the answer."
    source = (Path(__file__).parents[1] / "lab/src/status.ts").read_text()
    fields = {name: set(re.findall(r"^  (\w+):", body, re.M)) for name, body in re.findall(r"interface (\w+) {\n(.*?)\n}", source, re.S)}
    rows = re.findall(r"^  (\w+): (\w+)\[\];", source, re.M)
    return fields["IStatus"], {key: fields[kind] for key, kind in rows}


def test_a_real_project_is_shown_stage_by_stage_in_the_declared_form(shop, tmp_path, page, picture):  # noqa: F811
    with jupyter_lab(shop, tmp_path / "home") as lab:
        answer = json.load(urllib.request.urlopen(f"{lab.url}/mlops/status?token={TOKEN}"))
        keys, rows_of = declared()
        assert keys <= set(answer), "what the panel's types declare is in the answer"
        assert {key: fields - set(answer[key][0]) for key, fields in rows_of.items()} == {key: set() for key in rows_of}
        lab.open(page)
        page.click(TAB)
        panel = page.locator(PANEL)
        panel.get_by_role("heading", name="shop").wait_for()
        picture("real-project")
        assert rows(panel, "data")[0].startswith("orders @1 4 rows · 2 columns · ")
        assert "champion @1" in rows(panel, "models")[0]
        assert rows(panel, "runs")[0].startswith("prices ✓ passed")
        assert rows(panel, "deployments")[0].startswith("buyers ✓ running buyers@1 · http://127.0.0.1:")
        assert rows(panel, "alerts")[0].startswith("price drifted: PSI 0.31 over the limit 0.2 ! warning")
    assert not page.faults


def test_the_running_server_refuses_who_has_no_token(lab):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{lab.url}/mlops/status")
    assert refused.value.code == 403
    with pytest.raises(urllib.error.HTTPError) as missing:
        urllib.request.urlopen(f"{lab.url}/mlops/status?token={TOKEN}")
    assert missing.value.code == 404 and "mlops init" in json.load(missing.value)["error"]
