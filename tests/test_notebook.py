"""Notebooks: examples/quickstart.ipynb from start to end, and what a kernel does when it is interrupted."""

import os

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import REPOSITORY

QUICKSTART = REPOSITORY / "examples" / "quickstart.ipynb"
# Sizes in the notebook, and those of the test.
SMALLER = {
    '"data.synthetic.train_size=3000"': '"data.synthetic.train_size=300", "data.val_size=60", "train.epochs=2"',
    "test_size=500": "test_size=50",
    "model.width=8": "model.width=2",
    "train.epochs=6": "train.epochs=2",
}
INTERRUPTED = """
import signal
from ignite.engine import Events
config = load_config("demo", [*small, "train.epochs=9", "train.checkpoint_every=9"])
handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
def interrupt(state):  # with the signal that "Interrupt kernel" sends
    state.trainer.add_event_handler(Events.ITERATION_STARTED(once=3), lambda: signal.raise_signal(signal.SIGINT))
train(config, attach=interrupt)
"""
RESUMED = """
assert handlers == [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
def stop(state):
    state.trainer.add_event_handler(Events.EPOCH_COMPLETED, state.trainer.terminate)
print("epochs", len(train(config, resume="latest", attach=stop).history))
"""


def output_text(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Scratch directory of the kernel."""
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def cells(directory):
    """Executed cells by id: those of the notebook with smaller sizes, and, in the same kernel, an interrupted one."""
    notebook = nbformat.read(QUICKSTART, as_version=4)
    for cell in notebook.cells:
        for size, smaller in SMALLER.items():
            cell.source = cell.source.replace(size, smaller)
    tags = {"tags": ["raises-exception"]}
    notebook.cells += [
        nbformat.v4.new_code_cell(INTERRUPTED, id="interrupted", metadata=tags),
        nbformat.v4.new_code_cell(RESUMED, id="resumed"),
    ]
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join(paths))
        patched.setenv("OMP_NUM_THREADS", "1")
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(directory)}}).execute()
    return {cell.id: cell for cell in notebook.cells}


def test_quickstart_is_stored_without_outputs():
    cells = nbformat.read(QUICKSTART, as_version=4).cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code")
    source = "\n".join(cell.source for cell in cells)
    assert all(size in source for size in SMALLER)


def test_quickstart_runs_from_start_to_end(cells, directory):
    assert "epoch 2/2" in output_text(cells["train"])
    assert "TrainResult(run_dir=" in cells["train"].outputs[-1].data["text/plain"]
    assert "test accuracy " in output_text(cells["evaluate"])
    for name in ("history", "confusion", "batch"):
        assert any("image/png" in output.get("data", {}) for output in cells[name].outputs), name
    streams = {output.name for cell in cells.values() for output in cell.get("outputs", ()) if "name" in output}
    assert streams == {"stdout"}
    assert (directory / "outputs" / "best_models" / "tiny_cnn_best.pth").exists()


def test_interrupted_kernel_saves_checkpoint_and_survives(cells, directory):
    assert cells["interrupted"].outputs[-1].ename == "TrainingInterrupted"
    assert list((directory / "outputs").glob("training_runs/*/checkpoints/latest_000000003.pt"))
    assert "iteration 3, from " in output_text(cells["resumed"])
    assert "epochs 1\n" in output_text(cells["resumed"])
