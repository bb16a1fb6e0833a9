"""Notebooks: examples/quickstart.ipynb from start to end, and what a kernel does when it is interrupted."""

import os
import time

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

from tests.helpers import REPOSITORY

QUICKSTART = REPOSITORY / "examples" / "quickstart.ipynb"


@pytest.fixture(autouse=True)
def _kernel_environment(monkeypatch, tmp_path):
    """Kernels in a scratch directory, with this checkout and one thread."""
    monkeypatch.chdir(tmp_path)
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def output_text(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def test_quickstart_is_stored_without_outputs():
    cells = nbformat.read(QUICKSTART, as_version=4).cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code")


def test_quickstart_runs_from_start_to_end(tmp_path):
    notebook = nbformat.read(QUICKSTART, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = {cell.id: cell for cell in notebook.cells}
    assert "epoch 6/6" in output_text(cells["train"])
    assert "TrainResult(run_dir=" in cells["train"].outputs[-1].data["text/plain"]
    assert "test accuracy " in output_text(cells["evaluate"])
    for name in ("history", "confusion", "batch"):
        assert any("image/png" in output.get("data", {}) for output in cells[name].outputs), name
    streams = {output.name for cell in notebook.cells for output in cell.get("outputs", ()) if "name" in output}
    assert streams == {"stdout"}
    assert (tmp_path / "outputs" / "best_models" / "tiny_cnn_best.pth").exists()


TRAIN = """
from ignite.engine import Events
from cifar_ignite import load_config, train
sizes = {"synthetic.train_size": 200, "synthetic.test_size": 10, "val_size": 20, "batch_size": 20}
overrides = [f"data.{key}={value}" for key, value in sizes.items()]
config = load_config("demo", [*overrides, "model.width=2", "train.epochs=1000", "train.checkpoint_every=1000"])
handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
train(config, attach=lambda state: open("started", "w").close())
"""
AFTER = """
assert handlers == [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
def attach(state):
    state.trainer.add_event_handler(Events.EPOCH_COMPLETED, state.trainer.terminate)
result = train(config, resume="latest", attach=attach)
assert len(result.history) < 1000
"""


def test_interrupted_kernel_saves_checkpoint_and_survives(tmp_path):
    manager, client = start_new_kernel(cwd=str(tmp_path))
    try:
        # Otherwise the kernel may abort the next request as well, if it comes soon after the error.
        request = client.execute(f"import signal\n{TRAIN}", stop_on_error=False)
        deadline = time.monotonic() + 120
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=120)
        while reply["parent_header"]["msg_id"] != request:  # of an earlier request for information about the kernel
            reply = client.get_shell_msg(timeout=120)
        assert reply["content"]["ename"] == "TrainingInterrupted"
        assert list((tmp_path / "outputs").glob("training_runs/*/checkpoints/latest_*.pt"))
        reply = client.execute_interactive(AFTER, timeout=120, output_hook=lambda message: None)
        assert reply["content"]["status"] == "ok", reply["content"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
