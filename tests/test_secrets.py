"""Secrets do not reach a file: every form they take, every place of a notebook, and what must stay readable."""

import base64
import html
import io
import json
import random
from urllib.parse import quote, quote_plus

import nbformat
import pytest
from mlops_nb.core.secrets import Redactor, forms_of, hidden_parameters, is_secret, secrets_in, secrets_of, worth_hiding
from mlops_nb.core.settings import read_settings

SECRET = "pa\"ss'w&rd/ü\\+" + "7"  # everything that some notation must escape
KEY = "-----BEGIN KEY-----\n" + "\n".join("MIIEvQ" + str(n) * 40 for n in range(5)) + "\n-----END KEY-----"


@pytest.mark.parametrize("name", ["TOKEN", "DB_PASS", "GITHUB_TOKEN", "GH_PAT", "DB_PASSWORD", "PGPASSWORD", "MYSQL_PWD", "SSHPASS", "API_KEY", "OPENAI_API_KEY", "apiKey", "AWS_SECRET_ACCESS_KEY",
                                  "AWS_ACCESS_KEY_ID", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS_TOKEN", "SENTRY_DSN", "REDISCLI_AUTH", "slack-token", "smtp.password",
                                  "SLACK_WEBHOOK_URL", "private_key", "dbPassword", "PASSWORD2", "SECRET_KEY_BASE", "client_secret", "CREDENTIALS"])
def test_names_of_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize("name", ["PWD", "OLDPWD", "TOKENIZERS_PARALLELISM", "pad_token", "eos_token", "AUTHOR", "author_id", "keyboard", "KEY", "sort_key", "monkey", "PATH", "SSH_AUTH_SOCK",
                                  "SECRET_NAME", "TOKEN_FILE", "compass", "passenger_id", "pass_rate", "min_pass_rate", "max_tokens", "dsname", "C", "weeks", "primary_key", "MLOPS_DEPLOY_SHOP_TOKEN_ENV", "patch"])
def test_names_that_are_none(name):
    assert not is_secret(name)


def test_the_environment_is_searched_by_name_by_settings_and_by_form():
    settings = read_settings("[project]\nname = shop\n[deploy.shop]\ntoken_env = SHOP_DOOR\n", environment={})
    environment = {"SHOP_DOOR": "sesame-open", "A_TOKEN": "token-of-a", "API_TOKENS": "one-token,two", "PLAIN": "value", "QUEUE": "amqp://me:p%40ssw0rd@host/x", "EMPTY_TOKEN": "",
                   "STORAGE_KEY": "a1B2" * 6, "SORT_KEY": "customer and time of day"}
    assert secrets_of(environment, settings) == {"SHOP_DOOR": "sesame-open", "A_TOKEN": "token-of-a", "API_TOKENS": "one-token,two", "STORAGE_KEY": "a1B2" * 6,
                                                 "QUEUE password": "p@ssw0rd"}
    assert "SHOP_DOOR" not in secrets_of(environment)


@pytest.mark.parametrize("value", ["", "true", "abc", "localhost", "Password", "123456", "aaaaaaaa", "/", "~", "/usr", "default", "-----"])
def test_what_hides_nothing_is_left_alone(value):
    assert not worth_hiding(value)
    assert Redactor({"A_TOKEN": value}).text(f"it says {value} here") == f"it says {value} here"


def test_a_path_that_exists_is_no_secret_and_one_that_does_not_may_be(tmp_path):
    (tmp_path / "agent.sock").write_text("")
    assert not worth_hiding(str(tmp_path / "agent.sock"))
    assert worth_hiding("/wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")


@pytest.mark.parametrize("write", [
    str, lambda s: quote(s, safe=""), quote, quote_plus, lambda s: json.dumps({"a": s}), lambda s: json.dumps({"a": s}, ensure_ascii=False), lambda s: repr({"a": s}), lambda s: repr(s.encode()),
    html.escape, lambda s: html.escape(s, quote=False), lambda s: html.escape(json.dumps(s)), lambda s: base64.b64encode(s.encode()).decode(),
    *[lambda s, n=n: base64.b64encode(b"u" * n + b":" + s.encode() + b"!" * n).decode() for n in range(4)],
    lambda s: base64.urlsafe_b64encode(b"user:" + s.encode()).decode(), lambda s: f"postgresql://u:{quote(s, safe='')}@h/db"])
@pytest.mark.parametrize("secret", [SECRET, "plain-secret-1", "ünïcödé-sécret", "x" * 30 + "y" * 40, "q>>>>???~~~~zz"])
def test_every_form_is_found(secret, write):
    written = write(secret)
    cleaned = Redactor({"DB_PASSWORD": secret}).text(f"before {written} after")
    assert "‹DB_PASSWORD›" in cleaned and cleaned.startswith("before ") and cleaned.endswith(" after")
    assert secret not in cleaned and not any(form in cleaned for form in forms_of(secret))


def test_random_secrets_in_random_texts_do_not_survive():
    for seed in range(200):
        rng = random.Random(seed)
        alphabet = [chr(n) for n in range(33, 127)] + list("äéß漢€")
        secrets = {f"S{n}_TOKEN": "".join(rng.choices(alphabet, k=rng.randint(8, 40))) for n in range(4)}
        redactor = Redactor(secrets)
        text = "".join(rng.choice([rng.choice(list(secrets.values())), "".join(rng.choices(alphabet, k=rng.randint(0, 9))), "\n"]) for _ in range(40))
        assert not any(value in redactor.text(text) for value in secrets.values())
        assert redactor.text(redactor.text(text)) == redactor.text(text)


def test_a_secret_inside_a_longer_one():
    redactor = Redactor({"SHORT_TOKEN": "abcdef12", "LONG_TOKEN": "xx-abcdef12-yy"})
    assert redactor.text("xx-abcdef12-yy abcdef12") == "‹LONG_TOKEN› ‹SHORT_TOKEN›"


def test_a_key_of_several_lines_is_found_line_by_line():
    text = Redactor({"PRIVATE_KEY": KEY}).text(json.dumps({"key": KEY}) + "\n" + KEY.replace("\n", "\n    "))
    assert "MIIEvQ" not in text


@pytest.mark.parametrize("url, cleaned", [
    ("mysql://root:hunter@db/x", "mysql://root:‹password›@db/x"), ("redis://:hunter@q:6379/0", "redis://:‹password›@q:6379/0"), ("http://host:8080/a@b", "http://host:8080/a@b"),
    ("https://a.org/x:y", "https://a.org/x:y"), ("pg://{user}:{password}@h", "pg://{user}:{password}@h"), ("pg://u:***@h", "pg://u:***@h"), ("pg://u:‹X›@h", "pg://u:‹X›@h"),
    ("s3://bucket/key", "s3://bucket/key"), ("two a://b:cc@d e://f:gg@h", "two a://b:‹password›@d e://f:‹password›@h")])
def test_a_url_shows_no_password_even_one_that_nobody_named(url, cleaned):
    assert Redactor({}).text(url) == cleaned


def test_colours_do_not_hide_a_secret():
    assert Redactor({"A_TOKEN": "hunter-2-go"}).text("\x1b[33m'hunter\x1b[39m-2\x1b[1m-go'\x1b[0m x") == "'‹A_TOKEN›' x"
    assert Redactor({"A_TOKEN": "hunter-2-go"}).text("\x1b[33mgreen\x1b[0m") == "\x1b[33mgreen\x1b[0m"


@pytest.mark.parametrize("value, cleaned", [
    ({"password": "a"}, {"password": "‹password›"}), ({"password": ""}, {"password": ""}), ({"password": None}, {"password": None}), ({"password": 1234}, {"password": "‹password›"}),
    ({"use_token": True}, {"use_token": True}), ({"max_tokens": 512, "token": 7}, {"max_tokens": 512, "token": 7}), ({"token": "x"}, {"token": "‹token›"}),
    ({"a": [{"api_key": "k", "b": (1, "hunter-2-go")}]}, {"a": [{"api_key": "‹api_key›", "b": [1, "‹S›"]}]}), ({"credentials": {"user": "u"}}, {"credentials": "‹credentials›"}),
    (3.5, 3.5), (None, None), ("hunter-2-go", "‹S›"), ({1: "hunter-2-go"}, {1: "‹S›"})])
def test_values(value, cleaned):
    assert Redactor({"S": "hunter-2-go"}).value(value) == cleaned


def test_parameters_that_are_secrets():
    assert secrets_in({"password": "abc", "C": 1, "api_key": "k", "token": "", "auth": {"a": 1}}) == {"password": "abc", "api_key": "k"}


@pytest.mark.parametrize("source, cleaned", [
    ("password = 'a'", "password = '‹password›'"), ("a = 1\nb_token: str = \"é\" # c\nc = 2", "a = 1\nb_token: str = '‹b_token›' # c\nc = 2"), ("password = None\ntoken = ''", "password = None\ntoken = ''"),
    ("password = (\n  'a'\n  'b'\n)\nx = 1", "password = (\n  '‹password›'\n)\nx = 1"), ("api_key = vault.read('x')", "api_key = '‹api_key›'"), ("x = 'ü'; password = 'a'; y = 2", "x = 'ü'; password = '‹password›'; y = 2"),
    ("%magic\npassword = 'a'", "%magic\npassword = '‹password›'"), ("weeks = 4", "weeks = 4"), ("", ""), ("password = {'a': 'b'}", "password = '‹password›'")])
def test_the_cell_of_parameters(source, cleaned):
    assert hidden_parameters(source) == cleaned


def notebook_with(secret: str) -> dict:
    "A notebook that leaks wherever a notebook can."
    v4 = nbformat.v4
    shown = {"text/plain": repr(secret), "text/html": f"<b>{html.escape(secret)}</b>", "application/json": {"deep": [{"er": secret}]}, "text/markdown": f"`{secret}`",
             "image/png": base64.b64encode(b"\x89PNG " + secret.encode()).decode(), "application/vnd.vega+json": {"data": {"url": f"http://u:{quote(secret, safe='')}@h"}}}
    code = v4.new_code_cell(f"connect({secret!r})", outputs=[
        v4.new_output("stream", name="stdout", text=f"a\n{secret}\nb"), v4.new_output("display_data", data=shown, metadata={"text/html": {"title": secret}}),
        v4.new_output("execute_result", data={"text/plain": secret}, execution_count=1), v4.new_output("error", ename="E", evalue=secret, traceback=["a", f"\x1b[31m{secret}\x1b[0m"])])
    return v4.new_notebook(cells=[v4.new_markdown_cell(f"the password is {secret}", attachments={"a.txt": {"text/plain": secret}}), code, v4.new_raw_cell(secret)], metadata={"papermill": {
        "parameters": {"pin_password": "12", "C": 1}, "exception": secret, "environment_variables": {"A": secret}}})


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("secret", [SECRET, "plain-secret-1"])
def test_nothing_of_a_notebook_is_forgotten(secret, on_disk):
    notebook = notebook_with(secret)
    if on_disk:  # texts as lists of lines
        notebook = json.loads(nbformat.writes(notebook))
    cleaned = Redactor({"DB_PASSWORD": secret}).notebook(notebook)
    assert cleaned is notebook
    written = json.dumps(cleaned, ensure_ascii=False)
    assert not any(form in written for form in forms_of(secret))
    assert written.count("‹DB_PASSWORD›") >= 16 and cleaned["metadata"]["papermill"]["parameters"] == {"pin_password": "‹pin_password›", "C": 1}
    nbformat.validate(nbformat.reads(json.dumps(cleaned), as_version=4))


def test_a_notebook_without_secrets_stays_as_it_is():
    notebook = json.loads(nbformat.writes(notebook_with("harmless")))
    notebook["metadata"]["papermill"]["parameters"].pop("pin_password")
    for cell in notebook["cells"]:
        for shown in cell.get("outputs", []):
            shown.get("data", {}).pop("application/vnd.vega+json", None)
    before = json.dumps(notebook)
    assert json.dumps(Redactor({"A_TOKEN": "something-else"}).notebook(notebook)) == before


def test_short_parameters_are_hidden_in_both_cells_of_parameters():
    v4 = nbformat.v4
    cells = [v4.new_code_cell("password = 'ab'\nC = 1", metadata={"tags": [tag]}) for tag in ("parameters", "injected-parameters", "other")]
    done = [cell.source for cell in Redactor({}).notebook(v4.new_notebook(cells=cells)).cells]
    assert done == ["password = '‹password›'\nC = 1"] * 2 + ["password = 'ab'\nC = 1"]


@pytest.mark.parametrize("seed", range(40))
def test_a_stream_gives_nothing_away_however_it_is_cut(seed):
    rng = random.Random(seed)
    secrets = {"A_TOKEN": "aXaXaXbb", "B_TOKEN": "bb-aXaX-long-one", "PRIVATE_KEY": KEY, "C_TOKEN": "zz://q:pp"}
    text = "".join(rng.choice([*secrets.values(), "aXaX", "bb", "\n", "a line\n", "x\r", "http://u:geheim99@h ", KEY[:30]]) for _ in range(60))
    stream = Redactor(secrets).stream(io.StringIO())
    rest = text
    while rest:
        cut = rng.randint(1, 12)
        assert stream.write(rest[:cut]) == len(rest[:cut])
        rest = rest[cut:]
        if rng.random() < 0.2:
            stream.flush()
    stream.close()
    assert not any(value in stream.target.getvalue() for value in ("aXaXaXbb", "bb-aXaX-long-one", "zz://q:pp", "geheim99", *KEY.split("\n")[1:-1]))


def test_a_stream_keeps_what_is_no_secret_and_does_not_wait_for_more():
    stream = Redactor({"A_TOKEN": "hunter-2-go"}).stream(io.StringIO())
    stream.write("10 % \r")
    assert stream.target.getvalue() == "10 % \r"
    stream.write("20 % hunter-")
    assert stream.target.getvalue() == "10 % \r20 % "
    stream.write("green\n")
    assert stream.target.getvalue() == "10 % \r20 % hunter-green\n"


def test_a_log_is_rewritten_byte_for_byte_but_for_the_secret(tmp_path):
    secret, junk = "hunter-2-go", bytes(random.Random(1).randbytes(300_000)) + b"\xff\xfe\r\n\r"
    log = tmp_path / "step.log"
    log.write_bytes(junk + secret.encode() * 3 + junk)
    assert Redactor({"A_TOKEN": secret}).file(log).read_bytes() == junk + "‹A_TOKEN›".encode() * 3 + junk
    assert [path.name for path in tmp_path.iterdir()] == ["step.log"]


def test_a_secret_on_the_border_of_two_pieces_of_a_log(tmp_path):
    log = tmp_path / "step.log"
    log.write_text("x" * ((1 << 20) - 4) + "hunter-2-go" + "y" * 100)
    assert "hunter" not in Redactor({"A_TOKEN": "hunter-2-go"}).file(log).read_text()
