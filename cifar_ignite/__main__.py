"""The command line: parse, call, turn errors into one clear line.

Exit status: 0 done, 1 the run failed, 2 bad input, 130 interrupted (SIGINT), 143 terminated (SIGTERM).
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cifar_ignite.config import InputError, RunFailedError, describe_schema, load_config, telling_of_memory
from cifar_ignite.launch import is_first_on_machine, read_launch

# torch takes seconds to import; `--help` and a wrong option should not wait for it, so commands import what they call.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = create_parser().parse_args(arguments)
    console = logging.StreamHandler(sys.stdout)
    console.handleError = lambda record: None  # type: ignore[method-assign]  # a closed stdout ends no run
    package = logging.getLogger("cifar_ignite")
    package.setLevel(logging.INFO)
    # Ignite logs each exception that passes through an engine; we print it once, below.
    logging.getLogger("ignite").addHandler(logging.NullHandler())
    try:
        launch = read_launch()
        if launch and launch.rank:  # of several processes, the first one tells
            console.setLevel(logging.CRITICAL)
        package.addHandler(console)
        with telling_of_memory():
            options.command(options)
    except (InputError, RunFailedError) as error:
        status = _fail(error.status, error, tell=error.is_first)
        if isinstance(error, RunFailedError) and error.is_lost:
            # On the way out torch would wait for what it has begun with a process that is gone.
            _flush_stdout()
            os._exit(status)
        return status
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        return _fail(
            1,
            f"torch and torchvision are no pair ({error}): install both by one command from one index, "
            "pip install --force-reinstall torch torchvision",
        )
    except KeyboardInterrupt:  # outside of training, which has its own way to stop
        return _fail(130, "interrupted")
    finally:
        package.removeHandler(console)
        _flush_stdout()
    return 0


def _flush_stdout() -> None:
    """Nobody may be reading any more (`| head`); without this, Python complains of it while it exits."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _fail(status: int, message: object, tell: bool | None = None) -> int:
    """One line on stderr, by one of several processes: the first to fail, or where that is not known, the first."""
    if is_first_on_machine() if tell is None else tell:
        print(f"cifar_ignite: {' '.join(str(message).splitlines())}", file=sys.stderr, flush=True)
    return status


class _Parser(argparse.ArgumentParser):
    """A wrong option is bad input like any other: one line, status 2."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(2, f"{message} (see {self.prog} --help)"))


def create_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="cifar_ignite", description="Train CIFAR-10 ResNets on PyTorch-Ignite.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="train a model, or go on training it", allow_abbrev=False)
    command.add_argument("--config", type=Path, required=True, metavar="FILE", help="JSON configuration of the run")
    command.add_argument(
        "--resume",
        metavar="latest|PATH",
        help="continue the newest run of the experiment, a run folder, or a training state (checkpoints/*.pt)",
    )
    command.add_argument(
        "--allow-changes", action="store_true", help="resume under the configuration given now, whatever it changes"
    )
    _add_overrides(command)
    command.set_defaults(command=_train)

    command = commands.add_parser("evaluate", help="predict the test set with a trained model", allow_abbrev=False)
    _add_trained(command)
    command.add_argument(
        "--test-file", type=Path, metavar="PATH", help="unlabelled competition pickle, in place of the test set"
    )
    _add_tta(command, "also evaluate")
    _add_overrides(command)
    command.set_defaults(command=_evaluate)

    command = commands.add_parser("predict", help="say what is in pictures of your own", allow_abbrev=False)
    command.add_argument("images", type=Path, nargs="+", metavar="PATH", help="a picture, or a folder of pictures")
    _add_trained(command)
    _add_tta(command, "predict by")
    _add_overrides(command)
    command.set_defaults(command=_predict)

    command = commands.add_parser(
        "export",
        help="write a trained model for use elsewhere: torch.export, and ONNX if installed",
        allow_abbrev=False,
    )
    _add_trained(command)
    _add_overrides(command)
    command.set_defaults(command=_export)

    command = commands.add_parser("compare", help="a table and a picture of all runs", allow_abbrev=False)
    _add_overrides(command)
    command.set_defaults(command=_compare)

    command = commands.add_parser("doctor", help="check installation, device, data and disk", allow_abbrev=False)
    _add_overrides(command)
    command.set_defaults(command=_doctor)

    command = commands.add_parser(
        "models", help="list the models with parameters and multiply-adds", allow_abbrev=False
    )
    command.set_defaults(command=_models)

    command = commands.add_parser("schema", help="print the JSON schema of configurations", allow_abbrev=False)
    command.set_defaults(command=_schema)
    return parser


def _add_trained(command: argparse.ArgumentParser) -> None:
    which = command.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", type=Path, metavar="PATH", help="a checkpoint (default: the newest best model)")
    which.add_argument("--model", metavar="NAME", help="the best model of this experiment")


def _add_tta(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument(
        "--tta",
        choices=("flip", "shift"),
        help=f"{what} the mean over views of each image: mirrored, or mirrored and moved by one pixel",
    )


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        help="override one key of the configuration, for example optimizer.lr=0.1; may be repeated",
    )


def _train(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    from cifar_ignite.train import train

    train(config, options.resume, options.overrides, options.allow_changes)


def _evaluate(options: argparse.Namespace) -> None:
    from cifar_ignite.evaluate import evaluate

    evaluate(options.checkpoint, options.model, options.test_file, options.overrides, options.tta)


def _predict(options: argparse.Namespace) -> None:
    from cifar_ignite.predict import predict

    predict(options.images, options.checkpoint, options.model, options.overrides, options.tta)


def _export(options: argparse.Namespace) -> None:
    from cifar_ignite.export import export

    export(options.checkpoint, options.model, options.overrides)


def _compare(options: argparse.Namespace) -> None:
    from cifar_ignite.compare import compare

    compare(options.overrides)


def _doctor(options: argparse.Namespace) -> None:
    from cifar_ignite.doctor import diagnose

    diagnose(options.overrides)


def _models(options: argparse.Namespace) -> None:
    from cifar_ignite.models import describe_models

    print(describe_models())


def _schema(options: argparse.Namespace) -> None:
    print(json.dumps(describe_schema(), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
