"""What a client of the serving app meets: the token, the protocol's forms, and a sentence for each mistake."""

import signal
import subprocess
import sys
import threading

import httpx
import numpy as np
import pandas as pd
import pytest
from starlette.testclient import TestClient

from mlops_nb.core.errors import Conflict, Invalid, NotFound
from mlops_nb.core.files import digest_of
from mlops_nb.serve.endpoint import Limits
from mlops_nb.serve.inputs import Inputs, columns_of
from mlops_nb.serve.plan import planned, read_plan, write_plan
from mlops_nb.serve.protocol import parse_csv, parse_json
from mlops_nb.serve.server import listen
from mlops_nb.serve.sources import Version
from mlops_nb.serve.workers import serve
from serving import TOKEN, asking_app, journal_of

INPUTS = [{"name": "pieces", "type": "long", "required": True}, {"name": "price", "type": "double", "required": True},
          {"name": "country", "type": "string", "required": True}, {"name": "gift", "type": "boolean", "required": False}]
ROW = {"pieces": 2, "price": 1.5, "country": "France"}


class Shelf:
    "A model whose answers can be worked out by hand, and which fails when told to."

    def predict(self, rows, k: int = 10, new_only: bool = False):
        if (rows["country"] == "ValueError").any():
            raise ValueError(f"SECRET {rows.to_dict()}")
        if (rows["country"] == "RuntimeError").any():
            raise RuntimeError(f"SECRET {rows.to_dict()}")
        return (rows["pieces"] * rows["price"]).to_numpy()


def client(predict=Shelf().predict, inputs=INPUTS, token=TOKEN, **more) -> TestClient:
    return TestClient(asking_app(predict, inputs, **more), headers={"Authorization": f"Bearer {token}"} if token else {})


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic " + TOKEN, TOKEN, f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}",
                                    "Bearer " + digest_of(TOKEN.encode())])
def test_no_route_answers_without_the_token(header):
    made = client(token="").app
    asking = TestClient(made)
    paths = [(method, route.path) for route in made.routes for method in route.methods] + [("GET", "/nowhere"), ("POST", "/v2/models")]
    assert {path for _, path in paths} > {"/ping", "/health", "/version", "/invocations", "/predict", "/", "/metrics", "/v2/models/{model}/infer", "/admin/traffic"}
    for method, path in paths:
        got = asking.request(method, path, headers={"Authorization": header} if header is not None else {})
        assert got.status_code == 401 and got.headers["www-authenticate"].startswith("Bearer"), (method, path)
    for path in ("/ping", "/health", "/version"):
        assert asking.get(path, headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200


def test_version_says_what_answers():
    assert client().get("/version").json().items() >= {"model": "shelf@3", "digest": "d1", "instance": "i1"}.items()


# the request forms of MLflow's documentation ("Local Inference Spec"), on columns of ours
FORMS = [
    {"dataframe_split": {"columns": ["pieces", "price", "country"], "data": [[2, 1.5, "France"], [3, 2, "Spain"]]}},
    {"dataframe_split": {"index": [7, 9], "columns": ["country", "price", "pieces"], "data": [["France", 1.5, 2], ["Spain", 2, 3]]}},
    {"dataframe_records": [ROW, {"pieces": 3, "price": 2, "country": "Spain", "extra": [1]}]},
    {"instances": [ROW, {"pieces": 3, "price": 2, "country": "Spain"}]},
    {"inputs": {"pieces": [2, 3], "price": [1.5, 2], "country": ["France", "Spain"]}},
    {"inputs": [ROW, {"pieces": 3.0, "price": 2, "country": "Spain"}], "params": {"k": 5}},
]


@pytest.mark.parametrize("body", FORMS)
def test_every_form_of_mlflow(body):
    got = client().post("/invocations", json=body, headers={"Content-Type": "application/json; charset=utf-8"})
    assert got.status_code == 200 and got.json() == {"predictions": [3.0, 6.0]}


def test_lists_without_names_are_taken_in_the_recorded_order():
    inputs = {"pieces": "long", "price": "double", "country": "string"}
    assert client(inputs=inputs).post("/invocations", json={"instances": [[2, 1.5, "France"]]}).json() == {"predictions": [3.0]}
    got = client(inputs=inputs).post("/invocations", json={"instances": [[2, 1.5]]})
    assert got.status_code == 422 and "2 values; expected 3" in got.json()["error"]


def test_mlflows_own_encoder_is_understood():
    from mlflow.utils.proto_json_utils import dump_input_data

    frame = pd.DataFrame([ROW, {"pieces": 3, "price": 2.0, "country": "Spain"}])
    headers = {"Content-Type": "application/json"}
    assert client().post("/invocations", content=dump_input_data(frame), headers=headers).json() == {"predictions": [3.0, 6.0]}
    assert client(lambda rows: rows.sum(axis=1), inputs=None).post("/invocations", content=dump_input_data(np.ones((2, 3))), headers=headers).json() == {"predictions": [3.0, 3.0]}


def test_csv():
    body = "country,pieces,price\nFrance,2,1.5\n\"Spain, south\",3,2\n"
    for kind in ("text/csv", "text/csv; charset=utf-8"):
        assert client().post("/invocations", content=body, headers={"Content-Type": kind}).json() == {"predictions": [3.0, 6.0]}


JSON = "application/json"
MALFORMED = [
    (b"", JSON, 400, "not JSON"), (b"{", JSON, 400, "not JSON"), (b"\xff\xfe", JSON, 400, "not JSON"), (b"[1]", JSON, 400, "list"), (b"null", JSON, 400, "null"), (b"NaN", JSON, 400, "not JSON"),
    (b"[" * 5000, JSON, 400, "not JSON"), (b"{}", JSON, 400, "exactly one"), (b'{"instances": []}', JSON, 400, "at least one"), (b'{"instances": 3}', JSON, 400, "list of rows"),
    (b'{"instances": [[1], [1, 2]]}', JSON, 400, "1 to 2 values"), (b'{"instances": [[1], {"a": 1}]}', JSON, 400, "mixes"), (b'{"instances": [1], "inputs": [1]}', JSON, 400, "exactly one"),
    (b'{"dataframe_split": {"columns": ["a"]}}', JSON, 400, "columns and data"), (b'{"dataframe_split": {"columns": ["a", "a"], "data": [[1, 2]]}}', JSON, 400, "different names"),
    (b'{"dataframe_split": {"columns": ["a"], "data": [[1, 2]]}}', JSON, 400, "row 0"), (b'{"dataframe_split": {"columns": [1], "data": [[1]]}}', JSON, 400, "names"),
    (b'{"dataframe_split": {"columns": ["a"], "data": [1]}}', JSON, 400, "list of values"), (b'{"inputs": {"a": [1], "b": [1, 2]}}', JSON, 400, "one length"), (b'{"inputs": {}}', JSON, 400, "one length"),
    (b'{"dataframe_records": [{}], "parms": {}}', JSON, 400, "'parms'"), (b'{"dataframe_records": [{"a": 1}], "params": [1]}', JSON, 400, "params"),
    (b'{"dataframe_records": [{"pieces": 2}]}', JSON, 422, "column 'price'"), (b'{"dataframe_records": [{}]}', JSON, 422, "column 'pieces'"),
    (b"pieces,price\n2\n", "text/csv", 400, "row 0"), (b"pieces", "text/csv", 400, "1 lines"), (b"", "text/csv", 400, "0 lines"), (b"\xff,\n1,2\n", "text/csv", 400, "UTF-8"),
    (b'a,b\n"1,2\n', "text/csv", 400, "CSV"), (b"a,a\n1,2\n", "text/csv", 400, "different names"), (b"pieces,price,country\nmany,1,x\n", "text/csv", 422, "'pieces'"),
    (b"pieces,price,country\n,1,x\n", "text/csv", 422, "got null"), (b"pieces,price,country\n" + b"9" * 5000 + b",1,x\n", "text/csv", 422, "'pieces'"),
    (b"{}", "", 415, "application/json"), (b"{}", "text/plain", 415, "text/plain"), (b"{}", "application/json; charset=latin-1", 415, "utf-8"), (b"a=1", "application/x-www-form-urlencoded", 415, "form"),
]


@pytest.mark.parametrize("body, kind, status, words", MALFORMED)
def test_a_bad_body_gets_a_4xx_and_a_sentence(body, kind, status, words):
    asking = client()
    got = asking.post("/invocations", content=body, headers={"Content-Type": kind} if kind else {})
    assert (got.status_code, list(got.json())) == (status, ["error", "request"]) and words in got.json()["error"]
    assert client().post("/predict", content=body, headers={"Content-Type": kind} if kind else {}).status_code in (400, 415, 422)
    assert asking.post("/predict", json=[ROW]).status_code == 200


WRONG = [("pieces", "2", "an integer, got a string"), ("pieces", 2.5, "an integer, got a number"), ("pieces", None, "an integer, got null"), ("pieces", True, "an integer, got true or false"),
         ("pieces", 2**63, "an integer"), ("pieces", [2], "an integer, got a list"), ("price", "1.5", "a number, got a string"), ("price", True, "a number, got true or false"),
         ("country", 5, "a string, got an integer"), ("country", {"code": "FR"}, "a string, got an object"), ("gift", 1, "true or false, got an integer")]


@pytest.mark.parametrize("column, value, words", WRONG)
def test_a_wrong_value_is_named_by_row_column_expected_and_got(column, value, words):
    seen = []
    got = client(lambda rows: seen.append(rows)).post("/invocations", json={"dataframe_records": [ROW | {"gift": False}, {**ROW, "gift": True, column: value}]})
    assert got.status_code == 422 and f"row 1, column {column!r}: expected {words}" in got.json()["error"]
    assert not any("France" in rows["country"].values for rows in seen)


def framed(table, columns):
    inputs = Inputs(columns)
    return inputs.frame(inputs.rows(table), inputs.named(table))


def test_types_arrive_as_they_were_in_training():
    frame = framed(parse_json(b'{"dataframe_records": [{"n": 1, "x": 1, "s": null, "t": "2011-11-09T10:00:00Z"}, {"n": 2.0, "x": null, "s": "a", "t": "2011-11-10"}]}'),
                     columns_of({"n": "long", "x": "double", "s": "string", "t": "datetime"}))
    assert frame["n"].dtype == "int64" and frame["x"].dtype == "float64" and frame["x"].isna().tolist() == [False, True] and frame["t"].dt.day.tolist() == [9, 10]
    with pytest.raises(Invalid, match="column 't'"):
        framed(parse_json(b'{"inputs": {"t": ["the ninth"]}}'), columns_of({"t": "datetime"}))
    text = framed(parse_csv(b"n,x,s,t\n1,,,2011-11-09\n", columns_of({"n": "long", "x": "double", "s": "string", "t": "datetime"})), columns_of({"n": "long", "x": "double", "s": "string"}))
    assert list(text) == ["n", "x", "s"] and text["x"].isna().all() and text["s"].isna().all()


@pytest.mark.parametrize("params, words", [({"K": 3}, "'K'"), ({"k": "3"}, "integer"), ({"k": True}, "integer"), ({"new_only": 1}, "true or false")])
def test_a_param_the_model_does_not_take_is_refused(params, words):
    got = client().post("/invocations", json={"instances": [ROW], "params": params})
    assert got.status_code == 422 and words in got.json()["error"]


def test_a_recommender_answers_k_items_a_row():
    def recommend(rows, k: int = 10, new_only: bool = False):
        answers = np.empty((len(rows), k), dtype=object)
        answers[:] = [[f"{user:g}-{rank}-{new_only}" for rank in range(k)] for user in rows["user"]]
        return answers

    asking = client(recommend, {"user": "double"})
    assert asking.post("/invocations", json={"instances": [{"user": 7}, {"user": 8}], "params": {"k": 2, "new_only": True}}).json() == {
        "predictions": [["7-0-True", "7-1-True"], ["8-0-True", "8-1-True"]]}
    assert len(asking.post("/predict", json={"records": [{"user": 7}], "params": {"k": 3}}).json()["records"][0]["prediction"]) == 3


@pytest.mark.parametrize("predictions, expected", [
    (pd.DataFrame({"p": [0.5], "label": ["a"]}), [{"p": 0.5, "label": "a"}]), (pd.Series([np.float32(1)]), [1.0]), (np.array([float("nan")]), [None]), ([float("inf")], [None]),
    (np.array([np.datetime64("2011-11-09T00:00:00", "us")], dtype=object), ["2011-11-09T00:00:00"]), ([pd.Timestamp("2011-11-09")], ["2011-11-09T00:00:00"]), ([pd.NA], [None]), (["é"], ["é"])])
def test_any_kind_of_prediction_becomes_json(predictions, expected):
    assert client(lambda rows: predictions).post("/invocations", json={"instances": [ROW]}).json() == {"predictions": expected}


@pytest.mark.parametrize("fault, status", [("ValueError", 422), ("RuntimeError", 500)])
def test_a_failing_model_tells_no_secret(fault, status, caplog):
    got = client().post("/invocations", json={"instances": [ROW | {"country": fault}]})
    assert got.status_code == status and fault in got.json()["error"]
    assert "SECRET" not in got.text + caplog.text and "Traceback" not in got.text and "test_serve.py" in caplog.text
    assert client(lambda rows: [1, 2]).post("/invocations", json={"instances": [ROW]}).status_code == 422


def test_too_much_is_refused_before_it_is_read():
    limits = Limits(body_bytes=1000, rows=3)
    assert client(limits=limits).post("/predict", json=[ROW] * 3).status_code == 200
    got = client(limits=limits).post("/predict", json=[ROW] * 4)
    assert got.status_code == 413 and "4 rows" in got.json()["error"]
    assert client(limits=limits).post("/predict", content=b" " * 1001, headers={"Content-Type": JSON}).status_code == 413
    assert client(limits=limits).post("/predict", content=iter([b" " * 600] * 2), headers={"Content-Type": JSON}).status_code == 413


def test_the_journal_gets_what_was_answered_and_cannot_fail_it():
    seen = []
    journal = journal_of(seen.extend)
    got = client(journal=journal).post("/predict", json=[ROW])
    assert journal.close()
    entry, = seen
    assert entry.rows == [(2, 1.5, "France", None)]  # the optional gift was left out
    assert entry.answers == [3.0] and entry.model == "shelf@3" and entry.request == got.headers["x-request-id"] and entry.names == ("pieces", "price", "country", "gift")
    broken = journal_of(lambda entries: 1 / 0)
    failing = client(journal=broken)
    assert failing.post("/predict", json=[ROW]).status_code == 200
    failing.post("/predict", json=[{}])
    assert broken.close() and failing.get("/health").json()["log_errors"] == 1


def test_the_event_loop_answers_while_a_model_thinks():
    thinking, go_on = threading.Event(), threading.Event()

    def slow(rows):
        thinking.set()
        assert go_on.wait(120)
        return [1]

    with client(slow) as asking:
        worker = threading.Thread(target=asking.post, args=("/predict",), kwargs={"json": [ROW]})
        worker.start()
        assert thinking.wait(120) and asking.get("/health").status_code == 200
        go_on.set()
        worker.join(120)


def test_serve_wants_a_token_and_a_free_port(monkeypatch):
    monkeypatch.delenv("MLOPS_TOKEN", raising=False)
    with pytest.raises(Invalid, match="export MLOPS_TOKEN="):
        serve("recommender@champion")
    monkeypatch.setenv("MLOPS_TOKEN", "secret")
    with pytest.raises(Invalid, match="MLOPS_TOKEN can be guessed, it has 6 characters; expected at least 16"):
        serve("recommender@champion")
    monkeypatch.setenv("MLOPS_TOKEN", TOKEN)
    with listen() as taken, pytest.raises(Conflict, match="taken by another process"):
        serve("recommender@champion", port=taken.getsockname()[1])
    for host, port in (("203.0.113.1", 0), ("127.0.0.1", 70_000), ("no such host", 0)):
        with pytest.raises(Invalid, match="cannot listen"):
            listen(host, port)


def test_a_foreground_server_answers_over_the_wire_and_leaves_politely(tmp_path):
    (tmp_path / "shop.py").write_text(f"""
from mlops_nb.core.files import digest_of
from mlops_nb.serve.plan import planned, write_plan
from mlops_nb.serve.server import listen
from mlops_nb.serve.sources import Version
from mlops_nb.serve.workers import answer_until_stopped

class Count:
    def predict(self, rows):
        return [len(rows)] * len(rows)
    def resolve(self, name, selector):
        return Version(name, "1")
    def load(self, version):
        return self
    def stamp(self):
        return 0

def source(order):
    return Count()

if __name__ == "__main__":
    write_plan("plan.json", planned("count@1"))
    port = listen()
    order = {{"plan": "plan.json", "source": "shop:source", "token_digests": [digest_of(b"{TOKEN}")]}}
    answer_until_stopped(order, port, 2, lambda: print(port.getsockname()[1], flush=True))
""")
    said = []
    process = subprocess.Popen([sys.executable, "shop.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        port = threading.Thread(target=lambda: said.append(process.stdout.readline()), daemon=True)
        port.start()
        port.join(120)
        url = f"http://127.0.0.1:{int(said[0])}"
        with httpx.Client(trust_env=False, timeout=120, headers={"Authorization": f"Bearer {TOKEN}"}) as asking:
            assert asking.post(f"{url}/predict", json=[{"a": 1}]).json()["records"] == [{"prediction": 1}]
            assert asking.post(f"{url}/predict", content=b"x" * 7_000_000, headers={"Content-Type": JSON}).status_code == 413
        process.send_signal(signal.SIGTERM)
        assert "Traceback" not in process.communicate(timeout=120)[1] and process.returncode == 0
    finally:
        process.kill()
        process.wait(120)


CLUMSY = [("POST", "/predict/", {}, 404, "no such route"), ("GET", "/v2/", {}, 404, "no such route"), ("POST", "/predict?explain", {}, 400, "explain is true or false"),
          ("POST", "/predict?=", {}, 400, "asks for ''"), ("GET", "/predict", {}, 405, "GET is not spoken on this route; expected POST"), ("DELETE", "/version", {}, 405, "expected GET, HEAD"),
          ("POST", "/predict", {"Content-Encoding": "gzip"}, 415, "compressed ('gzip')"), ("POST", "/predict", {"Content-Encoding": "Identity"}, 200, "")]


@pytest.mark.parametrize("method, path, headers, status, words", CLUMSY)
def test_a_clumsy_address_or_header_is_answered_with_a_sentence(method, path, headers, status, words):
    got = client().request(method, path, headers=headers, follow_redirects=False, **({"json": [ROW]} if method == "POST" else {}))
    assert got.status_code == status and words in got.json().get("error", ""), got.text


def test_one_row_without_its_list_is_told_what_is_missing():
    got = client().post("/predict", json=ROW)
    assert got.status_code == 400 and "the body is one object; send a list: [{…}]" in got.json()["error"]


class Versions(Shelf):
    "A source that knows three versions of one model."

    def resolve(self, name, selector):
        if selector not in ("3", "4", "champion"):
            raise NotFound(f"there is no {name}@{selector}")
        return Version(name, selector, "d1", columns_of(INPUTS))


@pytest.fixture
def ruling(tmp_path):
    "A client with the scope admin, and the plan file that it changes."
    asking, file = client(), tmp_path / "plan.json"
    write_plan(file, planned("shelf@3"), by="ana")
    asking.app.state.desk.plan_file, asking.app.state.desk.endpoint.source = file, Versions()
    return asking, file


def test_a_split_and_its_shadow_are_one_revision(ruling):
    asking, file = ruling
    got = asking.post("/admin/traffic", json={"traffic": {"champion": 90, "3": 10}, "shadow": "4", "shadow_percent": 25, "why": "a try"})
    assert got.status_code == 200 and got.json()["revision"] == 2 and got.json()["why"] == "a try"
    entry = read_plan(file).of("shelf")
    assert (entry.traffic, entry.shadow, entry.shadow_percent) == ({"champion": 90, "3": 10}, "4", 25) and got.json()["models"][0]["shadow"] == "4"
    assert asking.post("/admin/traffic", json={"traffic": {"champion": 50, "3": 50}}).json()["revision"] == 3
    assert (read_plan(file).of("shelf").shadow, read_plan(file).of("shelf").shadow_percent) == ("4", 25)  # left out, the shadow stays
    assert asking.post("/admin/traffic", json={"traffic": {"4": 100}}).json()["models"][0]["shadow"] == ""  # it answers itself now
    assert asking.post("/admin/rollback", json={}).json()["models"][0]["traffic"] == {"champion": 50, "3": 50}
    assert asking.post("/admin/traffic", json={"model": "shelf", "traffic": {"3": 100}, "shadow": "4"}).json()["models"][0]["shadow_percent"] == 100
    assert asking.post("/admin/traffic", json={"traffic": {"3": 100}, "shadow": ""}).json()["models"][0]["shadow"] == ""
    assert asking.post("/admin/shadow", json={"selector": "4", "percent": 5}).json()["models"][0]["shadow_percent"] == 5
    assert asking.post("/admin/shadow", json={}).json()["models"][0]["shadow"] == ""


REFUSED = [("traffic", {}, 422, "the traffic of shelf is None"), ("traffic", {"traffic": {"3": 60, "4": 60}}, 422, "sum to 120"), ("traffic", {"traffic": [3]}, 422, "percentages by version"),
           ("traffic", {"traffic": {"challengr": 100}}, 404, "shelf@challengr"), ("traffic", {"traffic": {"3": 100}, "shadow": "9"}, 404, "shelf@9"),
           ("traffic", {"traffic": {"3": 100}, "shadow": "3"}, 422, "already answers 100%"), ("traffic", {"traffic": {"3": 100}, "shadow": None}, 422, "shadow of shelf is None"),
           ("traffic", {"traffic": {"3": 100}, "shadow": "4", "shadow_percent": 0}, 422, "over 0 and up to 100"), ("traffic", {"traffic": {"3": 100}, "shadow_percent": 5}, 400, "expected both"),
           ("traffic", {"traffic": {"3": 100}, "shadow": {"a": 1}}, 422, "cannot name a version"), ("traffic", {"trafic": {"3": 100}}, 400, "shadow_percent, traffic, why"),
           ("traffic", {"model": 5, "traffic": {"3": 100}}, 400, "are text"), ("traffic", {"model": "shlef", "traffic": {"3": 100}}, 404, "shelf"), ("traffic", [], 400, "not an object"),
           ("traffic", {"traffic": {"4": 100}, "why": "x" * 2000}, 422, "too long"), ("shadow", {"selector": "9"}, 404, "shelf@9"), ("shadow", {"selector": None}, 422, "expected a version"),
           ("shadow", {"selector": "4", "percent": "all"}, 422, "'all'"), ("rollback", {}, 404, "no earlier plan"), ("rollback", {"traffic": {}}, 400, "model, why")]


@pytest.mark.parametrize("change, body, status, words", REFUSED)
def test_a_wrong_change_is_refused_and_nothing_changes(ruling, change, body, status, words):
    asking, file = ruling
    before = file.read_bytes()
    got = asking.post(f"/admin/{change}", json=body)
    assert got.status_code == status and words in got.json()["error"], got.text
    assert file.read_bytes() == before


def test_explain_and_top_come_together():
    from sklearn.linear_model import LogisticRegression

    rows = pd.DataFrame({"pieces": [1.0, 2, 3, 4], "price": [1.0, 2, 1, 2]})
    asking = client(LogisticRegression().fit(rows, [0, 0, 1, 1]), {"pieces": "double", "price": "double"})
    record, = asking.post("/predict?explain=true&top=2", json=[{"pieces": 3, "price": 1}]).json()["records"]
    assert set(record) == {"prediction", "top", "explanation"} and len(record["top"]) == 2 and set(record["explanation"]["contributions"]) == {"pieces", "price"}
