"""Kernels of our own: ready and ended without polling, limited in what they print, the same as a person's in magics, plots and widgets."""

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes of ours are forked")

from nbclient import NotebookClient  # noqa: E402
from nbclient.exceptions import CellExecutionError, DeadKernelError  # noqa: E402
from nbformat.v4 import new_code_cell, new_notebook  # noqa: E402

from mlops_nb.pipeline import kernels  # noqa: E402


class Ran:
    "What became of some cells."

    def __init__(self, manager, cells, error):
        self.manager, self.cells, self.error = manager, cells, error
        self.usage = manager.provisioner.usage

    def text(self, index=-1):
        return "".join(output.get("text") or output.get("evalue") or output["data"]["text/plain"] for output in self.cells[index].outputs)


def clean():
    "This environment as a user's: ipykernel looks whether it is tested by pytest, and tests may run inside a step."
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MLOPS_RUN", "MLOPS_STEP"))}


def run(*sources, environment=None, folder=".", tags=None, first=0, **how):
    "Run cells as the engine does: nbclient with our manager, each cell announced with its index, tags and digest."
    sockets = tempfile.mkdtemp(prefix="mlops-t-")
    manager = kernels.kernel_manager(sockets, **{"warm": False} | how)
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])

    class Client(NotebookClient):
        async def async_execute_cell(self, cell, cell_index, **more):
            at = first + cell_index
            self.kc.cell = {"index": at, "tags": (tags or {}).get(at, []), "digest": f"digest {at}"}
            return await super().async_execute_cell(cell, cell_index, **more)

    error = None
    try:
        asyncio.run(Client(notebook, km=manager).async_execute(env=clean() | (environment or {}), cwd=str(folder), cleanup_kc=True))
    except (CellExecutionError, DeadKernelError) as caught:
        error = caught
    finally:
        shutil.rmtree(sockets)
    return Ran(manager, notebook.cells, error)


def test_a_kernel_is_this_interpreter_in_its_folder_with_its_environment(tmp_path):
    ran = run("import sys, os\nsys.executable", "os.getcwd()", "os.environ['COLOUR'], __name__", folder=tmp_path, environment={"COLOUR": "red"})
    assert ran.text(0) == repr(sys.executable)
    assert ran.text(1) == repr(str(tmp_path))
    assert ran.text(2) == "('red', '__main__')"
    assert ran.usage.code == 0 and ran.usage.cpu_s > 0 and ran.usage.peak_mb > 20


@pytest.mark.parametrize(("code", "number"), [("import os; os.kill(os.getpid(), 9)", signal.SIGKILL), ("import os; os.kill(os.getpid(), 11)", signal.SIGSEGV)])
def test_how_a_kernel_died_is_known(code, number):
    ran = run(code)
    assert isinstance(ran.error, DeadKernelError)
    assert ran.usage.code == -number


def test_a_kernel_that_dies_before_it_is_ready_is_noticed_at_once():
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="died"):
        run_with_broken_kernel()
    assert time.monotonic() - began < 300  # the limit, which is what it would take without


def run_with_broken_kernel():
    async def start():
        with tempfile.TemporaryDirectory(prefix="mlops-t-") as sockets:
            manager = kernels.kernel_manager(sockets, warm=False)
            await manager.start_kernel(env={**clean(), "MLOPS_OUTPUT_LIMIT_MB": "no number"}, stderr=os.open(os.devnull, os.O_WRONLY))
            client = manager.client()
            client.start_channels()
            try:
                await client.wait_for_ready(timeout=300)
            finally:
                client.stop_channels()
                await manager.shutdown_kernel(now=True)

    asyncio.run(start())


def test_what_a_batch_needs_of_ipython_works(tmp_path):
    ran = run(
        "%load_ext mlops_nb", "%%time\nx = 1", "import matplotlib.pyplot as plt\nplt.plot([1, 2]);", "%matplotlib inline\nplt.plot([1, 2]);",
        "from IPython.display import display, HTML\ndisplay(HTML('<b>x</b>'))", "import ipywidgets\nipywidgets.IntSlider(3)", "!echo from the shell",
        "import asyncio\nawait asyncio.sleep(0)\n'awaited'", "import subprocess\nsubprocess.run(['echo', 'from a child'])", "input('?')", folder=tmp_path)
    assert "image/png" in ran.cells[2].outputs[-1].data and "image/png" in ran.cells[3].outputs[-1].data
    assert ran.cells[4].outputs[0].data["text/html"] == "<b>x</b>"
    assert "application/vnd.jupyter.widget-view+json" in ran.cells[5].outputs[0].data
    assert "from the shell" in ran.text(6) and ran.text(7) == "'awaited'"
    assert any("from a child" in output.get("text", "") for output in ran.cells[8].outputs)
    assert "StdinNotImplementedError" in str(ran.error)


def test_a_persons_start_up_files_do_not_reach_a_run(tmp_path):
    startup = tmp_path / "profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("secret_helper = 1")
    (tmp_path / "profile_default/ipython_config.py").write_text("c.InteractiveShellApp.exec_lines = ['another_helper = 1']")
    ran = run("'secret_helper' in globals(), 'another_helper' in globals()", environment={"IPYTHONDIR": str(tmp_path)})
    assert ran.text() == "(False, False)"
    assert not (tmp_path / "profile_default/history.sqlite").exists()


@pytest.mark.parametrize("code", ["for _ in range(1_000_000):\n    print('x' * 1000)", "print('x' * 1_000_000_000)", "import sys\nsys.stderr.write('x' * 1_000_000_000);",
                                  "import os\nfor _ in range(5000):\n    os.write(1, b'x' * 1000)"])
def test_a_cell_that_prints_without_end_is_cut_off_in_the_kernel(code):
    ran = run(code, "print('next')", environment={"MLOPS_OUTPUT_LIMIT_MB": "1"})
    said = "".join(output.text for output in ran.cells[0].outputs)
    assert 999_000 <= said.count("x") <= 1_000_000
    assert said.count("printed more than 1 MB") == 1
    assert ran.text(1) == "next\n"


def test_what_was_registered_for_the_end_is_run_and_nothing_is_left_over(tmp_path):
    run(f"import atexit, pathlib\natexit.register(pathlib.Path({str(tmp_path / 'ended')!r}).touch)")
    assert (tmp_path / "ended").exists()


def test_a_running_cell_can_be_interrupted():
    async def interrupted():
        with tempfile.TemporaryDirectory(prefix="mlops-t-") as sockets:
            manager = kernels.kernel_manager(sockets, warm=False)
            await manager.start_kernel(env=clean())
            client = manager.client()
            client.start_channels()
            await client.wait_for_ready(timeout=300)
            client.execute("import time\nprint('begun')\ntime.sleep(600)")
            while (await client.iopub_channel.get_msg(timeout=300))["msg_type"] != "stream":
                pass
            await manager.interrupt_kernel()
            while (reply := await client.shell_channel.get_msg(timeout=300))["msg_type"] != "execute_reply":
                pass
            await manager.shutdown_kernel()
            client.stop_channels()
            return reply["content"]["ename"], manager.provisioner.usage.code

    assert asyncio.run(interrupted()) == ("KeyboardInterrupt", 0)


def test_two_may_wait_for_one_kernel_and_one_may_give_up():
    async def waited():
        with tempfile.TemporaryDirectory(prefix="mlops-t-") as sockets:
            manager = kernels.kernel_manager(sockets, warm=False)
            await manager.start_kernel(env=clean())
            first, second = (asyncio.ensure_future(manager.provisioner.wait()) for _ in range(2))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(manager.provisioner.wait(), 0.05)
            await manager.provisioner.kill()
            ended = await asyncio.wait_for(asyncio.gather(first, second), 300)
            await manager.cleanup_resources()
            return ended

    assert asyncio.run(waited()) == [-9, -9]
