"""MLflow's own command line and client, with our plug-in."""

import json
import os
import subprocess
import sys

import pytest
from test_deploy import ROWS, registered, shop  # noqa: F401

from mlops_nb.core.errors import Invalid, MlopsError, NotFound
from mlops_nb.deploy.deployments import deployment
from mlops_nb.deploy.mlflow_plugin import Client, address_of, settings_of, target_help

pytestmark = pytest.mark.skipif(os.name != "posix", reason="local deployments hand over ports as POSIX systems do")


@pytest.fixture
def mlflow(shop, tmp_path):  # noqa: F811
    "MLflow as a person calls it, with the plug-in's metadata where pip would have put it."
    about = tmp_path / "site" / "plugin_of_mlops_nb-0.1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-mlops-nb\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text("[mlflow.deployments]\nmlops_nb = mlops_nb.deploy.mlflow_plugin\n")
    path = os.pathsep.join([str(about.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "MLFLOW_DISABLE_TELEMETRY": "true"}

    def run(*words, code=0):
        said = subprocess.run([sys.executable, *words], cwd=shop, env=environment, capture_output=True, text=True, timeout=900)
        assert said.returncode == code, said.stdout + said.stderr
        return said.stdout + said.stderr

    return run


def test_a_deployment_lives_its_whole_life_by_mlflows_command_line(shop, mlflow, tmp_path):  # noqa: F811
    from mlops_nb.model.registry import promote

    promote("large@1")
    assert "mlops_nb deployment shop is created" in mlflow("-m", "mlflow", "deployments", "create", "-t", "mlops_nb", "-m", "models:/large@champion", "--name", "shop", "-C", "to=local", "-C", "why=a try")
    assert deployment("shop").history[0]["why"] == "a try" and deployment("shop").predict(ROWS) == [1, 1]
    rows, answers = tmp_path / "rows.json", tmp_path / "answers.json"
    rows.write_text(ROWS.to_json(orient="records"))
    mlflow("-m", "mlflow", "deployments", "predict", "-t", "mlops_nb", "--name", "shop", "-I", str(rows), "-O", str(answers))
    assert json.loads(answers.read_text()) == {"predictions": [1, 1]}
    assert "is updated" in mlflow("-m", "mlflow", "deployments", "update", "-t", "mlops_nb", "-m", "models:/large/2", "--name", "shop")
    code = ("from mlflow.deployments import get_deploy_client as get; client = get('mlops_nb'); import pandas as pd\n"
            "print([(one['name'], one['model']) for one in client.list_deployments()], client.get_deployment('shop')['state'], client.predict('shop', pd.DataFrame({'pieces': [1], 'price': [2.0]})).get_predictions('ndarray'))")
    assert mlflow("-c", code).strip().endswith("[('shop', 'large@2')] running [2]")
    assert "is deleted" in mlflow("-m", "mlflow", "deployments", "delete", "-t", "mlops_nb", "--name", "shop")
    assert Client("mlops_nb").list_deployments() == [] and deployment("shop").status()["state"] == "stopped"


def test_mlflow_shows_our_help(mlflow):
    said = mlflow("-m", "mlflow", "deployments", "help", "-t", "mlops_nb")
    assert target_help().splitlines()[0] in said and "-C traffic=" in said


@pytest.mark.parametrize("uri, address", [("models:/large/3", "large@3"), ("models:/large@champion", "large@champion"), ("models:/large", "large"), ("models:/large/latest", "large"),
                                          ("models:/large/3/", "large@3"), ("large@champion", "large@champion")])
def test_addresses(uri, address):
    assert address_of(uri) == address


@pytest.mark.parametrize("uri", ["runs:/1234/model", "s3://bucket/model", "./model", "models:/a/b/c"])
def test_a_model_outside_the_registry_is_refused(uri):
    with pytest.raises(Invalid, match="register"):
        address_of(uri)


@pytest.mark.parametrize("config, words", [({"replica": "2"}, "expected one of to, traffic"), ({"traffic": "champion"}, "champion=90"), ({"port": "http"}, "a port"), ({"force": "perhaps"}, "yes or no"), ({"autoscale": "min=few"}, "min=1")])
def test_settings_are_checked(config, words):
    with pytest.raises(Invalid, match=words):
        settings_of(config)


def test_what_is_not_there(shop):  # noqa: F811
    client = Client("mlops_nb")
    client.delete_deployment("large")
    for call in (lambda: client.get_deployment("large"), lambda: client.predict("large", ROWS), lambda: client.update_deployment("large", "models:/large/1"), lambda: client.create_deployment("shop", "models:/small/1")):
        with pytest.raises(NotFound):
            call()
    with pytest.raises(MlopsError, match="does not exist yet"):
        client.create_deployment("shop", "models:/large/1", config={"to": "sagemaker"})
