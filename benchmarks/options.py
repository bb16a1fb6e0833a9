"""Options, output files and error handling that the benchmarks share."""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

from cifar_ignite.errors import InputError, TrainingError
from cifar_ignite.files import atomic_write, write_text


def create_parser(name: str, description: str | None, config: str) -> argparse.ArgumentParser:
    """Return a parser with --config, --set (stored as `overrides`) and --out.

    Args:
        name: Name of the benchmark's module.
        description: Docstring of the module; its first line is shown.
        config: Default configuration.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=first_line(description))
    parser.add_argument("--config", default=config, help="name or file of a configuration (default: %(default)s)")
    add_overrides(parser)
    parser.add_argument("--out", type=Path, help="output files, FILE.json etc. (default: in a temporary directory)")
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add --set, stored as `overrides`."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        help="override one configuration key; may be repeated",
    )


def first_line(docstring: str | None) -> str:
    """Return the first line of a docstring, which `python -OO` removes."""
    return (docstring or "").partition("\n")[0]


@contextlib.contextmanager
def exit_on_error(name: str) -> Iterator[None]:
    """Print an error as one line on stderr, "name: message", and exit with its status.

    It is 2 if a file cannot be used, 1 if a process of the benchmark failed, and 130 after SIGINT.
    """
    try:
        yield
    except OSError as error:
        print(f"{name}: {error.filename or type(error).__name__}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except (InputError, TrainingError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(error.status)
    except (BrokenExecutor, subprocess.CalledProcessError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


def check_counts(**counts: int) -> None:
    """Raise an `InputError` if the value of an option is less than 1."""
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"--{name} {count}: use at least 1")


def create_out(out: Path | None, name: str) -> Path:
    """Return the path of the output files without ".json", in an existing directory; None is a temporary one."""
    out = out or Path(tempfile.mkdtemp()) / name
    out = out.with_name(out.name.removesuffix(".json"))
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def write_json(out: Path, result: dict[str, Any]) -> Path:
    """Write or replace {out}.json atomically, and return its path."""
    path = out.with_name(f"{out.name}.json")
    with atomic_write(path) as temp_path:
        write_text(temp_path, json.dumps(result, indent=2) + "\n")
    return path
