"""The command line: parse, call, turn errors into one line.

Exit status: 0 success, 1 the run failed, 2 invalid input, 130 interrupted (SIGINT), 143 terminated (SIGTERM).
"""

import argparse
import contextlib
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from cifar_ignite.config_io import load_config
from cifar_ignite.distributed.env import dist_env_from_environ, is_local_primary
from cifar_ignite.errors import (
    InputError,
    TrainingError,
    first_line,
    translate_missing_operators,
    translate_oom_errors,
)


def main(arguments: Sequence[str] | None = None, **extra: Any) -> int:
    """Run one command and return the exit status; `extra` are arguments of its function that have no option."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?"
    console = logging.StreamHandler(sys.stdout)
    console.handleError = lambda record: None  # type: ignore[method-assign]  # a closed stdout does not end a run
    package = logging.getLogger("cifar_ignite")
    level = package.level
    try:
        options = create_parser().parse_args(arguments)
        package.setLevel(logging.INFO)
        package.addHandler(console)
        return _run(console, **vars(options), **extra)
    finally:
        package.removeHandler(console)
        package.setLevel(level)
        _flush("stdout")
        _flush("stderr")


def _run(console: logging.Handler, **options: Any) -> int:
    """Run a command and return the exit status; print an error as one line."""
    try:
        if not dist_env_from_environ().is_primary:
            console.setLevel(logging.CRITICAL)
        with translate_oom_errors(), translate_missing_operators():
            _call(**options)
    except (InputError, TrainingError) as error:
        status = _fail(error.status, error, should_report=error.should_report)
        if isinstance(error, TrainingError) and error.peer_lost:
            # At exit, torch would wait for collectives that it has started with a rank that is gone.
            _flush("stdout")
            os._exit(status)
        return status
    except OSError as error:
        return _fail(1, f"{error.filename or type(error).__name__}: {error.strerror or first_line(error)}")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        return _fail(
            1,
            f"torch and torchvision are incompatible ({error}): install both with one command from one index, "
            "pip install --force-reinstall torch torchvision",
        )
    except KeyboardInterrupt:  # outside of training, which handles signals itself
        return _fail(130, "interrupted")
    return 0


def _call(function: str, **arguments: Any) -> None:
    """Import a function by its dotted name, call it with the parsed options, and print the text that it returns.

    torch takes seconds to import: --help and a wrong option do not wait for it.
    """
    if "config" in arguments:
        arguments["config"] = load_config(arguments["config"], arguments["overrides"])
    module, _, name = function.rpartition(".")
    result = getattr(importlib.import_module(module), name)(**arguments)
    if isinstance(result, str):
        _print_result(result)


def _print_result(text: str) -> None:
    """Print a result; `| head` may close stdout early.

    Raises:
        TrainingError: If stdout cannot be written, for example because it is a file on a full disk.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        pass
    except OSError as error:
        raise TrainingError(f"cannot write to stdout: {error.strerror}") from None


def _flush(name: str) -> None:
    """Flush stdout or stderr; if that fails, replace it, because Python would complain at exit."""
    try:
        getattr(sys, name).flush()
    except (OSError, ValueError, AttributeError):
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _fail(status: int, message: object, should_report: bool | None = None) -> int:
    """Print one line on stderr, on one rank per machine unless the ranks agreed on one, and return `status`."""
    if is_local_primary() if should_report is None else should_report:
        with contextlib.suppress(OSError, ValueError):  # stderr is closed, or a file on a full disk
            print(f"cifar_ignite: {' '.join(str(message).splitlines())}", file=sys.stderr, flush=True)
    return status


# --- The parser ---------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser that reports a wrong option as any other invalid input: one line, status 2."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(2, f"{message} (see {self.prog} --help)"))


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; an option is named as the parameter of the function that it is passed to."""
    parser = _Parser(
        prog="cifar_ignite", description="Train image-classification ResNets on PyTorch-Ignite.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: str, help_text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        command.set_defaults(function=f"cifar_ignite.{function}")
        return command

    _add_train_options(add("train", "train.train", "train a model, or resume a run"))
    _add_evaluate_options(add("evaluate", "evaluate.evaluate", "predict the test set with a trained model"))
    _add_predict_options(add("predict", "predict.predict", "classify your own images"))
    export = add("export", "export.export", "write a trained model as a torch.export program, and as ONNX if installed")
    _add_model_options(export)
    _add_overrides(export)
    _add_overrides(add("compare", "compare.compare", "compare all runs in a table and a figure"))
    _add_overrides(add("doctor", "doctor.run_checks", "check installation, device, data and disk"))
    _add_overrides(add("data", "inspect_data.inspect_data", "count the images per class and draw samples of them"))
    add("models", "list_models.list_models", "list the models with parameters and multiply-adds")
    add("schema", "config_io.format_config_schema", "print the JSON schema of configuration files")
    add("config-reference", "config_io.format_config_reference", "print a table of all configuration keys")
    return parser


# A path with `~` expanded, as not every shell does after the `=` of a variable of make. The functions of the commands
# refuse an empty one, which `Path` would turn into the current directory.
_path = os.path.expanduser


def _add_train_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config",
        type=_path,
        required=True,
        metavar="NAME|FILE",
        help="shipped configuration, for example se_fast, or a JSON file",
    )
    command.add_argument(
        "--resume",
        type=_path,
        metavar="latest|PATH",
        help="resume the latest run of the experiment, a run directory, its checkpoints directory, or a file in there",
    )
    command.add_argument(
        "--allow-changes", action="store_true", help="resume with the given configuration, whatever it changes"
    )
    _add_overrides(command)


def _add_evaluate_options(command: argparse.ArgumentParser) -> None:
    _add_model_options(command)
    command.add_argument(
        "--test-file", type=_path, metavar="PATH", help="unlabeled competition pickle instead of the test set"
    )
    _add_tta(command, "also evaluate")
    _add_overrides(command)


def _add_predict_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("paths", type=_path, nargs="+", metavar="PATH", help="an image, or a directory of images")
    _add_model_options(command)
    _add_tta(command, "predict with")
    _add_overrides(command)


def _add_model_options(command: argparse.ArgumentParser) -> None:
    group = command.add_mutually_exclusive_group()
    group.add_argument("--checkpoint", type=_path, metavar="PATH", help="checkpoint (default: the latest best model)")
    group.add_argument("--model", dest="model_name", metavar="NAME", help="best model of this experiment")


def _add_tta(command: argparse.ArgumentParser, verb: str) -> None:
    command.add_argument(
        "--tta",
        choices=("flip", "shift"),
        help=f"{verb} the mean over views of each image: flipped, or flipped and shifted by one pixel",
    )


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        help="override one configuration key, for example optimizer.lr=0.1; may be repeated",
    )
