"""The page to try a model, in a real chromium against a real server: it asks, shows, copies and escapes, and talks to nobody else."""

import base64
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pandas as pd
import pytest
from browser import chromium, faint_texts, page  # noqa: F401 (fixtures)
from running import TOKEN, running
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OrdinalEncoder

from mlops_nb.serve.inputs import columns_of
from mlops_nb.serve.page import page as html_of

pytestmark = [pytest.mark.browser]
EVIL = "</script><img src=x onerror=alert(1)>\"'&{{7*7}}\u2028"
PASSWORD = "Basic " + base64.b64encode(f"anybody:{TOKEN}".encode()).decode()


class Evil:
    "A model whose answer, like its column, is HTML."

    def predict(self, rows, note: str = "<b>x</b>"):
        return ["<img src=x onerror=alert(2)>"] * len(rows)


class Shop:
    "A ranker."

    def predict(self, rows, *, k: int = 10, new_only: bool = False):
        return [["tea", "cup"][:k]] * len(rows)


def models() -> dict:
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"pieces": rng.integers(1, 30, 400), "price": rng.gamma(2, 2, 400), "country": rng.choice(["France", "Spain"], 400), "gift": rng.random(400) < 0.5})
    y = np.where(X["pieces"] * X["price"] > 60, "large", np.where(X["country"] == "France", "near", "far"))
    made = make_pipeline(make_column_transformer((OrdinalEncoder(), ["country"]), ("passthrough", ["pieces", "price", "gift"])), HistGradientBoostingClassifier(max_iter=20, random_state=0))
    kinds = {"pieces": "long", "price": "double", "country": "string", "gift": "boolean"}
    line = LinearRegression().fit(X[["price"]], X["pieces"])
    return {"orders": (made.fit(X, y), kinds, [{"pieces": 6, "price": 2.5, "country": "France", "gift": True}]), "evil": (Evil(), {EVIL: "string"}, [{EVIL: "<i>it's</i>"}]),
            "shop": (Shop(), {"user": "long"}, [{"user": 7}]), "line": (line, {"price": "double"}, [{"price": 1.5}])}


@pytest.fixture(scope="module")
def url():
    with running(models()) as address:
        yield address


def opened(page, url):  # noqa: F811
    "The page, as a browser gets it after its own question for a password; everything it asked for is kept."
    page.asked, page.dialogs = [], []
    page.on("request", lambda request: page.asked.append(request))
    page.on("dialog", lambda dialog: (page.dialogs.append(dialog.message), dialog.dismiss()))
    page.route(f"{url}/", lambda route: route.continue_(headers={**route.request.headers, "authorization": PASSWORD}))
    page.goto(f"{url}/")
    page.fill("#token", TOKEN)


def asked_for(page):  # noqa: F811
    page.click("#go")
    page.wait_for_selector("#go:enabled")
    return page.locator("#answer")


def test_it_is_there_for_whoever_has_the_token_with_a_strict_policy(url):
    assert httpx.get(f"{url}/", timeout=120).status_code == 401
    got = httpx.get(f"{url}/", headers={"Authorization": PASSWORD}, timeout=120)
    assert got.status_code == 200 and got.headers["content-type"].startswith("text/html")
    policy = dict(part.split(" ", 1) for part in got.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'" and not {"unsafe-inline", "unsafe-eval"} & set(got.headers["content-security-policy"].split("'"))
    assert "http://" not in got.text and "https://" not in got.text and " onclick" not in got.text and " style=" not in got.text


def test_a_row_is_asked_and_explained(page, url):  # noqa: F811
    opened(page, url)
    assert page.title() == "orders 1" and page.locator("tbody tr").count() == 4
    page.get_by_label("price, row 1").fill("20")
    page.check("#explain")
    answer = asked_for(page)
    direct = httpx.post(f"{url}/models/orders/predict?explain=true", json=[{"pieces": 6, "price": 20, "country": "France", "gift": True}], headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120).json()["records"][0]
    assert answer.locator(".value").inner_text() == direct["prediction"]
    strongest = max(direct["explanation"]["contributions"].items(), key=lambda one: abs(one[1]))
    assert answer.locator(".bars .name").first.inner_text().startswith(f"{strongest[0]} = ") and answer.locator(".bars i").count() == 4
    widths = [box["width"] for box in map(lambda one: one.bounding_box(), answer.locator(".bars i").all())]
    assert widths[0] == max(widths) > 20
    many = page.evaluate("() => reasons({explains: 'x', base: 0, output: 30, contributions: Object.fromEntries([...Array(30)].map((_, i) => ['f' + i, 1]))}, null).innerText")
    assert "19 others together" in many and "+19" in many  # what is not shown is summed, so that the bars still add up
    assert not page.faults and not page.dialogs


def test_rows_are_added_and_gaps_sent_as_null(page, url):  # noqa: F811
    opened(page, url)
    page.click("#add")
    page.get_by_label("price, row 2").fill("")
    page.get_by_label("gift, row 2").select_option("false")
    page.fill("#top", "2")
    answer = asked_for(page)
    sent = json.loads(next(one for one in page.asked if one.method == "POST").post_data)
    assert sent == {"records": [{"pieces": 6, "price": 2.5, "country": "France", "gift": True}, {"pieces": 6, "price": None, "country": "France", "gift": False}]}
    assert answer.locator(".result").count() == 2 and answer.locator(".result").first.locator(".bars .name").count() == 2
    page.get_by_label("pieces, row 1").fill("two")
    assert "row 0, column 'pieces': expected an integer, got a string" in asked_for(page).inner_text()
    page.click("#remove")
    assert page.locator("thead th").count() == 2


def test_the_token_is_neither_stored_nor_in_an_address(page, url):  # noqa: F811
    opened(page, url)
    asked_for(page)
    posts = [one for one in page.asked if one.method == "POST"]
    assert posts and all(one.headers["authorization"] == f"Bearer {TOKEN}" for one in posts)
    assert all(TOKEN not in one.url and one.url.startswith((url, "data:")) for one in page.asked)
    assert page.evaluate("() => [localStorage.length, sessionStorage.length, document.cookie, location.href]") == [0, 0, "", f"{url}/"]
    assert TOKEN not in page.content()
    page.fill("#token", "wrong")
    assert "token" in asked_for(page).inner_text() and page.evaluate("() => document.activeElement.id") == "token"
    page.fill("#token", "schlüssel…")
    assert "character" in asked_for(page).inner_text()


def test_what_a_model_says_is_text(page, url):  # noqa: F811
    opened(page, url)
    page.select_option("#model", label="evil")
    assert page.locator("tbody th").first.inner_text().startswith(EVIL[:30]) and page.locator("input[data-param]").get_attribute("placeholder") == "<b>x</b>"
    answer = asked_for(page)
    assert answer.locator(".value").inner_text() == "<img src=x onerror=alert(2)>" and page.locator("img").count() == 0
    assert page.evaluate("() => [...document.scripts].length") == 2
    assert not page.dialogs and not page.faults


@pytest.mark.parametrize("name", ["orders", "evil"])
def test_the_programs_do_what_the_page_does(page, url, name):  # noqa: F811
    opened(page, url)
    page.select_option("#model", label=name)
    expected = httpx.post(f"{url}/models/{name}/predict", json=[dict(models()[name][2][0])], headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120).json()
    env = {**os.environ, "MLOPS_TOKEN": TOKEN}
    words = shlex.split(page.locator("#curl").inner_text().replace("\\\n", " "))
    assert words[0] == "curl" and words[1] == f"{url}/models/{name}/predict" and json.loads(words[-1]) == {"records": [models()[name][2][0]]}
    said = subprocess.run([sys.executable, "-c", page.locator("#python").inner_text()], env=env, capture_output=True, text=True, check=True, timeout=120).stdout
    assert said.strip() == str(expected["records"])


def test_a_ranker_and_a_model_without_classes_offer_what_they_can(page, url):  # noqa: F811
    opened(page, url)
    page.select_option("#model", label="shop")
    assert not page.is_visible("#explain") and page.is_visible("#top") and page.get_by_label("new_only").is_visible()
    assert asked_for(page).locator("ol li").all_inner_texts() == ["tea", "cup"]
    page.get_by_label("k", exact=True).fill("1")
    assert asked_for(page).locator("ol li").all_inner_texts() == ["tea"]
    page.select_option("#model", label="line")
    assert page.is_visible("#explain") and not page.is_visible("#top") and page.locator("[data-param]").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_reads_in_light_and_dark_and_by_keyboard(chromium, url, scheme, tmp_path):  # noqa: F811
    context = chromium.new_context(viewport={"width": 420, "height": 900}, color_scheme=scheme)
    page = context.new_page()  # noqa: F811
    page.faults = []
    opened(page, url)
    page.check("#explain")
    page.focus("#token")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".result .bars")
    page.wait_for_selector("#go:enabled")
    assert faint_texts(page, "body") == []
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), "a narrow screen does not scroll sideways"
    unlabelled = "() => [...document.querySelectorAll('input,select,textarea,button')].filter(one => !one.ariaLabel && !one.labels?.length && !one.textContent.trim()).length"
    assert page.evaluate(unlabelled) == 0
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.id || document.activeElement.dataset?.column || document.activeElement.tagName"))
    assert {"go", "token", "explain", "pieces", "gift", "add", "curl", "model"} <= reached
    page.screenshot(path=Path(os.environ.get("SCREENSHOTS", tmp_path)) / f"page_{scheme}.png", full_page=True)
    context.close()


def test_a_model_without_columns_is_asked_in_json(page, tmp_path):  # noqa: F811
    class Any:
        def predict(self, rows):
            return list(range(len(rows)))

    with running({"free": (Any(), None, None)}) as address:
        opened(page, address)
        page.fill("#free", '[{"a": 1}, {"a": 2}]')
        assert asked_for(page).locator(".value").all_inner_texts() == ["0", "1"]
        page.fill("#free", "[{")
        assert "JSON" in asked_for(page).inner_text()


def test_a_server_without_models_has_a_page_too(page):  # noqa: F811
    page.set_content(html_of([])[0])
    assert page.locator("h1").inner_text() == "No model is served"
    one = SimpleNamespace(name="x", version="1", digest="", estimator=Shop(), example={}, columns=columns_of([{"name": "n", "type": "long", "required": False}]))
    assert '"gap":true' in html_of([one])[0]
