"""The Python API: what `from cifar_ignite import ...` gives, in any order of imports, and what its functions return."""

import ast
import gc
import inspect
import itertools
import logging
import math
import os
import signal
import subprocess
import sys
import threading

import pandas as pd
import pytest
import torch
from PIL import Image

import cifar_ignite
from cifar_ignite import (
    InputError,
    TrainingError,
    TrainingInterrupted,
    evaluate,
    export,
    load_config,
    load_dataset,
    load_model,
    predict,
    train,
)
from cifar_ignite.checkpointing.io import load_checkpoint
from tests.helpers import REPOSITORY, snapshot
from tests.helpers.runs import call_at_iteration, send_signal

pytestmark = pytest.mark.usefixtures("blank_figures")
COMMANDS = ("train", "evaluate", "predict", "export")


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- Names --------------------------------------------------------------------------------------------------------


def test_all_names_are_importable_and_documented():
    for name in cifar_ignite.__all__:
        value = getattr(cifar_ignite, name)
        assert not inspect.ismodule(value), name
        assert name == "BatchTransform" or value.__doc__, name
    assert set(cifar_ignite.__all__) <= set(dir(cifar_ignite))


def test_names_for_type_checkers_are_those_at_run_time():
    tree = ast.parse((REPOSITORY / "cifar_ignite" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {(node.module, alias.name) for node in block.body for alias in node.names}
    assert typed == {(module, name) for name, module in cifar_ignite._MODULES.items()}


def test_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="no_such_name"):
        cifar_ignite.no_such_name  # noqa: B018
    with pytest.raises(ImportError, match="no_such_name"):
        from cifar_ignite import no_such_name  # noqa: F401


# Each order in a forked process, in which only this package is not imported yet.
ORDERS = """
import os, sys, importlib
STATEMENTS = {statements!r}
import ignite.distributed, ignite.handlers, ignite.metrics, pandas, pydantic, torch.export, torchvision.transforms.v2
import PIL.Image, jinja2, matplotlib.figure, torch.utils.flop_counter
assert "cifar_ignite" not in sys.modules
def check(statements):
    for statement in statements:
        exec(statement, {{}})
    import cifar_ignite
    for name in {commands!r}:
        module = importlib.import_module("cifar_ignite." + name)
        assert getattr(cifar_ignite, name) is getattr(module, name), (statements, name)
        assert type(module).__name__ == "module"
for order in {orders!r}:
    pid = os.fork()
    if not pid:
        status = 1
        try:
            check([STATEMENTS[index] for index in order])
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, order
"""
STATEMENTS = (
    "from cifar_ignite import train, evaluate, predict, export; assert all(map(callable, (train, evaluate, predict)))",
    "import cifar_ignite.train, cifar_ignite.export; assert callable(cifar_ignite.train)",
    "from cifar_ignite.evaluate import evaluate; assert callable(evaluate)",
    "from cifar_ignite.cli import main; assert main(['schema']) == 0",
)


def test_commands_are_functions_after_any_order_of_imports():
    orders = list(itertools.permutations(range(len(STATEMENTS)), 2))
    run_python(ORDERS.format(statements=STATEMENTS, commands=COMMANDS, orders=orders))


def test_package_and_options_do_not_import_torch():
    code = (
        "import sys, cifar_ignite\nfrom cifar_ignite import load_config\nfrom cifar_ignite.cli import create_parser\n"
    )
    assert run_python(code + "load_config('demo'); create_parser(); print('torch' in sys.modules)") == "False\n"


# --- train --------------------------------------------------------------------------------------------------------


def test_train_returns_run_directory_best_model_and_history(tiny_config):
    result = train(tiny_config())
    table = pd.read_csv(result.run_dir / "logs" / "metrics.csv")
    pd.testing.assert_frame_equal(result.history, table)
    assert result.best_model.parent == result.run_dir / "checkpoints"
    best = load_checkpoint(result.best_model)["record"]
    assert (best.epoch, best.val_acc) == (table["val_acc"].idxmax() + 1, result.best_val_acc)
    assert "epoch 2/2" in (result.run_dir / "logs" / "training.log").read_text()


def test_train_returns_the_same_for_a_complete_run_and_more_for_a_longer_one(tiny_config):
    first = train(tiny_config())
    again = train(tiny_config(), resume=first.run_dir)
    assert (again.run_dir, again.best_model) == (first.run_dir, first.best_model)
    pd.testing.assert_frame_equal(again.history, first.history)
    longer = train(tiny_config(), resume="latest", overrides=["train.epochs=3"])
    assert longer.run_dir == first.run_dir
    pd.testing.assert_frame_equal(longer.history[:2], first.history)
    assert longer.history["epoch"].tolist() == [1, 2, 3]


def test_train_without_validation_returns_nan_and_the_last_model(tiny_config):
    result = train(tiny_config(data={"val_size": 0}), overrides=["train.epochs=1"])
    assert math.isnan(result.best_val_acc)
    assert result.history.dtypes["val_acc"] == "float64"
    assert load_checkpoint(result.best_model)["record"].epoch == 1


def open_files(directory):
    """Return the files below a directory that this process has open."""
    paths = (os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
    return [path for path in paths if path.startswith(str(directory))]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no list of open files")
def test_repeated_and_interrupted_runs_leave_nothing_behind(tiny_config, tmp_path):
    """No open file, log handler, level or signal handler, without waiting for the garbage collector."""

    def state():
        loggers = [logging.getLogger(name) for name in ("cifar_ignite", "ignite", None)]
        handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
        return [(logger.level, list(logger.handlers)) for logger in loggers], handlers, open_files(tmp_path)

    before = state()
    gc.disable()
    try:
        interrupt = call_at_iteration(6, lambda: send_signal(signal.SIGINT))
        with pytest.raises(TrainingInterrupted, match="stopped by SIGINT after epoch 1, iteration 6"):
            train(tiny_config(), attach=interrupt)
        assert state() == before
        assert train(tiny_config(), resume="latest").history["epoch"].tolist() == [1, 2]
        assert state() == before
    finally:
        gc.enable()


def test_train_in_a_thread_leaves_signals_alone(tiny_config):
    before, results = signal.getsignal(signal.SIGINT), []

    def run():
        check = call_at_iteration(1, lambda: results.append(signal.getsignal(signal.SIGINT)))
        results.append(train(tiny_config(train={"epochs": 1}), attach=check))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    handler, result = results
    assert handler == before
    assert result.best_model.exists()


# --- The other functions ------------------------------------------------------------------------------------------


def test_trained_model_gives_the_same_predictions_everywhere(tiny_config, tmp_path):
    config = tiny_config()
    result = train(config)
    overrides = [f"output_dir={config.output_dir}", "precision=fp32", "device=cpu"]
    evaluation = evaluate(str(result.best_model), overrides=overrides)
    details = evaluation.result.predictions
    assert evaluation.summary["accuracy"] == (details["true"] == details["predicted"]).mean()
    assert "predictions.csv" in {path.name for path in evaluation.directory.iterdir()}

    model, images = load_model(result.best_model, overrides), load_dataset(config.data, train=False).images
    expected = torch.tensor(details[list(model.class_names)].to_numpy())
    with torch.inference_mode():
        assert torch.allclose((model(images).double() / model.temperature).softmax(1), expected, atol=1e-5)

    path = tmp_path / "image.png"
    Image.fromarray(images[3].permute(1, 2, 0).numpy()).save(path)
    predictions = predict(path, result.best_model, overrides=overrides)
    assert predictions.table["predicted"].tolist() == [details["predicted"][3]]
    assert pd.read_csv(predictions.path)["file"].tolist() == [str(path)]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda best: predict([], best), "paths"),
        (lambda best: predict("", best), "paths"),
        (lambda best: predict([""], best), "paths"),
        (lambda best: predict(".", best, tta="flips"), "tta"),
        (lambda best: evaluate(best, tta="flips"), "tta"),
        (lambda best: evaluate(best, tta=""), "tta"),
        (lambda best: evaluate(best, model_name="xx"), "model_name"),
        (lambda best: predict(".", best, model_name="xx"), "model_name"),
        (lambda best: export(best, model_name="xx"), "model_name"),
        (lambda best: evaluate(""), "checkpoint"),
        (lambda best: load_model(""), "source"),
        (lambda best: evaluate(model_name=""), "model_name"),
        (lambda best: evaluate(best, test_file=""), "test_file"),
        (lambda best: train(load_config("demo"), resume=""), "resume"),
    ],
)
def test_invalid_argument_is_refused_by_its_name(trained_run, tmp_path, call, name):
    (best,) = (trained_run / "checkpoints").glob("*.pth")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=rf"^{name}: "):
        call(best)
    assert snapshot(tmp_path) == before


def test_invalid_input_and_failed_runs_raise(tiny_config, tmp_path, capfd):
    with pytest.raises(InputError, match="did you mean se_fast"):
        load_config("se_fats")
    with pytest.raises(InputError, match=r"optimizer\.lr"):
        train(tiny_config(), overrides=["optimizer.lr=-1"])
    with pytest.raises(InputError, match="no best model"):
        evaluate(overrides=[f"output_dir={tmp_path}"])
    with pytest.raises(TrainingError, match="not finite"):
        train(tiny_config(optimizer={"lr": 1e30}, train={"epochs": 30}))
    assert capfd.readouterr() == ("", "")
