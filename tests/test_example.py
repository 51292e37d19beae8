"""The founding example as a user runs it: the pipeline on the small set, twice, and its notebooks on the full set under nbval."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from projects import ROOT

NOTEBOOKS = sorted((ROOT / "examples" / "recommender").glob("0*.ipynb"))
MLOPS = [sys.executable, "-m", "mlops_nb"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A copy of the example in a project of its own; what it deploys is stopped at the end."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copy(ROOT / "settings.ini", folder)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLOPS_")}
    environment |= {"MLOPS_HOME": str(folder / "home"), "MLFLOW_DISABLE_TELEMETRY": "true"}
    yield folder, environment
    subprocess.run([*MLOPS, "undeploy", "recommender"], cwd=folder, env=environment, capture_output=True, timeout=1800)


def mlops(world: tuple, *words: str) -> tuple[int, dict, str]:
    folder, environment = world
    done = subprocess.run([*MLOPS, *words, "--json"], cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    return done.returncode, json.loads(done.stdout) if done.stdout.startswith("{") else {}, done.stderr


@pytest.fixture(scope="module")
def first(world):
    code, facts, err = mlops(world, "run", "examples/recommender", "-p", "orders=data/online_retail_small.parquet", "-p", "max_iter=60")
    assert code == 0, err
    return facts, err


def test_the_pipeline_shows_a_line_a_step_and_ends_with_a_table(first):
    facts, err = first
    steps = [row["step"] for row in facts["steps"]]
    assert steps == ["prepare", "check", "train", "validate", "document", "deploy", "monitor"]
    assert [line.split("]")[0] for line in err.splitlines() if line.startswith("[")][:7] == [f"[{i}/7" for i in range(1, 8)]
    assert all(row["verdict"] == "passed" and row["seconds"] > 0 and row["key_figures"] for row in facts["steps"])


def test_it_leaves_data_model_notebooks_reports_and_a_card(world, first):
    folder, environment = world
    code, status, _ = mlops(world, "status")
    assert {row["name"]: row["rows"] for row in status["data"]} == {"orders": 107_867, "history": 64_576, "holdout": 13_879}  # known figures of the set
    assert set(status["models"][0]["aliases"]) == {"champion", "challenger"}
    for row in first[0]["steps"]:
        assert (folder / row["report"]).suffix == ".html" and (folder / row["report"]).stat().st_size > 2000
    run = next((folder / ".mlops" / "runs").glob("*/run.json")).parent
    for path in NOTEBOOKS:
        copy = json.loads((run / path.stem.split("_")[1] / path.name).read_text())
        assert any(cell.get("outputs") for cell in copy["cells"]) and "injected-parameters" in str(copy["cells"])
    assert "Model card" in next(run.glob("document/card*.md")).read_text()
    with sqlite3.connect(folder / ".mlops" / "mlflow.db") as db:
        assert db.execute("SELECT count(*) FROM runs WHERE status = 'FINISHED'").fetchone()[0] >= 1


def test_the_gates_were_measured_against_baselines_in_both_protocols(world, first):
    folder, _ = world
    facts = json.loads(next((folder / ".mlops" / "runs").glob("*/validate/validate-recommender@1.json")).read_text())
    gates = {check["name"]: check for check in facts["checks"]}
    for name in ("gain ndcg@10", "gain ndcg@10 new"):
        assert gates[name]["passed"] and gates[name]["value"] > 0 and gates[name]["expected"] == "> 0"
    rules = {row["model"]: row["ndcg@10"] for row in facts["all items"]["models"]}
    assert rules["popularity, 28 days"] == pytest.approx(0.143854, abs=1e-6)  # the data's reference figures
    assert facts["ndcg@10"] > max(value for name, value in rules.items() if not name.startswith("recommender"))


def test_the_endpoint_answers_with_the_token_alone(world, first):
    url = next(row["url"] for row in mlops(world, "status")[1]["deployments"])
    assert httpx.post(f"{url}/invocations", json={"dataframe_records": [{"CustomerID": 12347}]}, timeout=120).status_code == 401
    code = ("import os; from mlops_nb.deploy.deployments import deployment; "
            "print(len(deployment('recommender').predict([{'CustomerID': 12347}], k=4)[0]))")
    folder, environment = world
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=1800).stdout.strip() == "4"


def test_no_secret_is_written_anywhere(world, first):
    folder, environment = world
    tokens = [path.read_text().strip() for path in Path(environment["MLOPS_HOME"]).rglob("*") if path.is_file()]
    assert tokens
    for path in (folder / ".mlops").rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".ipynb", ".html", ".log", ".md"):
            content = path.read_text(errors="replace")
            assert not any(token in content for token in tokens if len(token) > 15), path


def test_when_nothing_changed_only_what_looks_outside_runs(world, first):
    code, facts, err = mlops(world, "run", "examples/recommender", "-p", "orders=data/online_retail_small.parquet", "-p", "max_iter=60")
    assert code == 0, err
    assert {row["step"] for row in facts["steps"] if row["verdict"] == "passed"} == {"deploy", "monitor"}, facts["steps"]
    assert {row["verdict"] for row in facts["steps"]} == {"passed", "cached"}


def test_a_second_run_challenges_the_champion(world, first):
    model = mlops(world, "status")[1]["models"][0]
    champion, challenger = model["aliases"]["champion"], model["version"] + 1
    code, facts, err = mlops(world, "run", "examples/recommender", "-p", "orders=data/online_retail_small.parquet", "-p", "max_iter=80", "--force")
    assert code == 0, err
    folder, _ = world
    verdict = json.loads(next((folder / ".mlops" / "runs").glob(f"*/validate/validate-recommender@{challenger}.json")).read_text())
    assert verdict["champion"] == f"recommender@{champion}" and "gain over champion" in [check["name"] for check in verdict["checks"]]
    status = mlops(world, "status")[1]
    assert status["models"][0]["aliases"]["champion"] == challenger and status["deployments"][0]["model"] == f"recommender@{challenger}"
    assert {row["name"]: row["version"] for row in status["data"]} == {"orders": 1, "history": 1, "holdout": 1}, "the same data makes no new version"


@pytest.mark.parametrize("fault, sentence", [("column", "has no column CustomerID; it has "), ("corrupt", "is not a readable Parquet file"), ("cutoff", "choose a day inside 2010-12-01")])
def test_a_file_that_will_not_do_is_one_sentence_and_exit_code_2(world, first, fault, sentence):
    import pandas as pd

    folder, _ = world
    path = folder / "examples" / "recommender" / "data" / "other.parquet"
    orders = pd.read_parquet(path.with_name("online_retail_small.parquet"))
    (orders.rename(columns={"CustomerID": "customer"}) if fault == "column" else orders).to_parquet(path)
    if fault == "corrupt":
        path.write_bytes(path.read_bytes()[:50_000])
    before = mlops(world, "status")[1]["models"]
    code, _, err = mlops(world, "run", "examples/recommender", "-p", "orders=data/other.parquet", *(["-p", "cutoff=2031-01-01"] if fault == "cutoff" else []))
    assert code == 2 and sentence in err.splitlines()[-1] and "Traceback" not in err
    assert mlops(world, "status")[1]["models"] == before, "nothing that was saved is lost"


def test_a_failed_gate_stops_before_the_deployment(world, first):
    folder, environment = world
    before = mlops(world, "status")[1]
    challenger = before["models"][0]["version"] + 1
    path = folder / "examples" / "recommender" / "04_validate.ipynb"
    source = path.read_text()
    path.write_text(source.replace('\\"> 0\\"', '\\"> 0.9\\"'))
    try:
        code, facts, err = mlops(world, "run", "examples/recommender", "-p", "orders=data/online_retail_small.parquet", "-p", "max_iter=20")
    finally:
        path.write_text(source)
    assert code == 1 and "gain ndcg@10" in err and "> 0.9" in err
    after = mlops(world, "status")[1]
    assert after["deployments"] == before["deployments"] and after["models"][0]["aliases"]["champion"] == before["models"][0]["aliases"]["champion"]
    reports = list((folder / ".mlops" / "runs").glob(f"*/validate/validate-recommender@{challenger}.html"))
    assert len(reports) == 1, "the report is saved before the gate stops the run"


def test_the_notebooks_reproduce_their_outputs_on_the_full_set(tmp_path):
    """nbval, lax: every cell runs, and the cells marked NBVAL_CHECK_OUTPUT give what the committed notebook shows."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLOPS_", "PYTEST_"))}
    environment |= {"MLOPS_HOME": str(tmp_path / "home"), "MLOPS_PROGRESS": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
    names = [str(tmp_path / "examples" / "recommender" / path.name) for path in NOTEBOOKS]
    try:
        done = subprocess.run([sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-cell-timeout=600", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-x", *names],
                              cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    finally:
        subprocess.run([*MLOPS, "undeploy", "recommender"], cwd=tmp_path, env=environment, capture_output=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:]
    marked = sum("NBVAL_CHECK_OUTPUT" in "".join(cell["source"]) for path in NOTEBOOKS for cell in json.loads(path.read_text())["cells"])
    assert marked >= 7
