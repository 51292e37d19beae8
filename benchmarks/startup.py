"""How long a person waits before anything happens: importing, loading the extension, asking for the status; against MLflow."""

import tempfile
from pathlib import Path

from benchmarks.measure import PYTHON, ROOT, compare, record

SHELL = "from IPython.testing.globalipapp import start_ipython; ip = start_ipython(); "


def main() -> None:
    bin = Path(PYTHON).parent
    nothing, shell = [PYTHON, "-c", "pass"], [PYTHON, "-c", SHELL]
    with tempfile.TemporaryDirectory() as folder:
        project = ROOT if (ROOT / ".mlops" / "mlflow.db").exists() else Path(folder)
        if project != ROOT:
            (project / "settings.ini").write_text("[project]\nname = empty\n")
        record("startup", [
            compare("import mlops_nb", [PYTHON, "-c", "import mlops_nb"], "import mlflow", [PYTHON, "-c", "import mlflow"], at_most=0.15, floor=nothing),
            compare("%load_ext mlops_nb", [PYTHON, "-c", SHELL + "ip.run_line_magic('load_ext', 'mlops_nb')"], "import mlflow",
                    [PYTHON, "-c", SHELL + "import mlflow"], at_most=0.25, floor=shell),
            compare("mlops status, whole process", [str(bin / "mlops"), "--project", str(project), "status"], "mlflow --version",
                    [str(bin / "mlflow"), "--version"], at_most=0.3),
        ])


if __name__ == "__main__":
    main()
