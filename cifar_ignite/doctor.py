"""The doctor command: one line per requirement of training, with the fix where one is not met.

Imports no library that may be broken before its check: this command has to work when others do not.
"""

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from packaging.requirements import Requirement

from cifar_ignite.config import Config
from cifar_ignite.config_io import parse_config
from cifar_ignite.errors import InputError, TrainingError, first_line
from cifar_ignite.files import path_exists

PACKAGES = ("ignite", "numpy", "pandas", "matplotlib", "tensorboardX", "tqdm", "pydantic", "jinja2", "PIL")
EXTRAS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "tensorboard": ("tensorboard",)}
# A full checkpoint with EMA weights is 34 MB: one every ten epochs, the latest two, the best model and its copy.
REQUIRED_GB = 2.0
# Directories below output_dir that commands write to.
OUTPUT_DIRS = ("training_runs", "best_models", "evaluations", "predictions", "exports", "")
REINSTALL_HINT = "install both with one command from one index: pip install --force-reinstall torch torchvision"
EARLIER_ERRORS_HINT = "fix the errors above first"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckResult:
    """Result of one check.

    Attributes:
        name: Name of the requirement.
        status: "ok"; "warning" if training works nevertheless; "error" if it will fail.
        message: What was found.
        hint: How to fix it; empty if there is nothing to fix.
    """

    name: str
    status: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.status:<7}  {self.name:<11}  {self.message}" + (f"; {self.hint}" if self.hint else "")


def run_checks(overrides: Sequence[str] = ()) -> None:
    """Run all checks and log one line for each.

    Args:
        overrides: Strings `section.key=value`; `data.root` and `output_dir` are used.

    Raises:
        TrainingError: If a check failed with status "error".
    """
    config = parse_config({}, "--set", overrides)
    checks: list[Callable[[], CheckResult]] = [
        check_python,
        check_torch_and_torchvision,
        check_packages,
        *(partial(check_extra, name) for name in EXTRAS),
        check_device,
        partial(check_dataset, config),
        partial(check_disk, config),
    ]
    num_errors = 0
    for check in checks:
        result = check()
        num_errors += result.status == "error"
        logger.info("%s", result)
    if num_errors:
        raise TrainingError(f"{num_errors} of {len(checks)} checks failed, see above")


# --- Installation -------------------------------------------------------------------------------------------------


def check_python() -> CheckResult:
    message = f"{platform.python_version()} in {sys.prefix}, {platform.system()} {platform.machine()}"
    return CheckResult("python", "ok", message)


def check_torch_and_torchvision() -> CheckResult:
    """Check that torchvision is built for the installed torch: for its version and its kind of accelerator."""
    versions = {}
    for name in ("torch", "torchvision"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return CheckResult("torch", "error", f"{name} is not installed", REINSTALL_HINT)
    message = " and ".join(f"{name} {version}" for name, version in versions.items())
    for requirement in map(Requirement, importlib.metadata.requires("torchvision") or ()):
        if requirement.name == "torch" and not requirement.specifier.contains(versions["torch"], prereleases=True):
            message += f" are incompatible (torchvision requires {requirement})"
            return CheckResult("torch", "error", message, REINSTALL_HINT)
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a missing operator, a library that does not load
        return CheckResult("torch", "error", f"{message} are incompatible ({first_line(error)})", REINSTALL_HINT)
    return CheckResult("torch", "ok", message)


def check_packages() -> CheckResult:
    versions = []
    for name in PACKAGES:
        try:
            if name == "matplotlib":
                importlib.import_module("cifar_ignite.plots")  # imports it whatever MPLBACKEND contains
            module = importlib.import_module(name)
        except Exception as error:  # a broken installation raises almost anything
            return CheckResult("packages", "error", f"{name}: {first_line(error)}", "pip install -e .")
        versions.append(f"{name} {module.__version__}")
    return CheckResult("packages", "ok", ", ".join(versions))


def check_extra(name: str) -> CheckResult:
    packages = EXTRAS[name]
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        hint = f"optional: pip install -e '.[{name}]'"
        return CheckResult(name, "warning", f"{', '.join(missing)} not installed", hint)
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    return CheckResult(name, "ok", versions)


# --- Machine ------------------------------------------------------------------------------------------------------


def check_device() -> CheckResult:
    """Check which device training would use, and its precision."""
    try:
        import torch

        from cifar_ignite.training.device import precision_name, select_device

        device = select_device("auto")
        precision = precision_name("auto", device)
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            memory = f"{free / 1e9:.0f} of {total / 1e9:.0f} GB free"
            return CheckResult("device", "ok", f"{torch.cuda.get_device_name()}, {memory}, {precision}")
        if device.type == "mps":
            memory = f"{torch.mps.recommended_max_memory() / 1e9:.0f} GB usable"
            return CheckResult("device", "ok", f"{torch.backends.mps.get_name()} (MPS), {memory}, {precision}")
        message = f"CPU, {torch.get_num_threads()} threads, {precision}"
        if torch.backends.mps.is_built():
            hint = "requires an Apple silicon Mac and a macOS version that this torch supports"
            return CheckResult("device", "warning", f"{message}; torch finds no Apple GPU", hint)
        if shutil.which("nvidia-smi"):
            hint = "check that nvidia-smi lists one, and its driver version"
            if not torch.version.cuda:  # as PyPI's torch for Windows
                hint = (
                    "install a torch and torchvision that are built with CUDA: https://pytorch.org/get-started/locally"
                )
            return CheckResult("device", "warning", f"{message}; torch finds no GPU", hint)
        return CheckResult("device", "ok", message)
    except Exception as error:  # caused by an error that an earlier check reported
        return CheckResult("device", "error", f"not usable ({first_line(error)})", EARLIER_ERRORS_HINT)


def check_dataset(config: Config) -> CheckResult:
    """Check that CIFAR-10 is found, by its md5 checksums, and that files that differ can be loaded."""
    try:
        from cifar_ignite.data import cifar10, cifar10_files
    except Exception as error:
        return CheckResult("data", "error", f"cannot be checked ({first_line(error)})", EARLIER_ERRORS_HINT)
    root = config.data.root
    try:
        directory = cifar10_files.find_cifar10(root)
        if not directory:
            return _check_installable(root)
        cifar10_files.check_complete(directory)
        mismatched = cifar10_files.mismatched_files(directory)
        for name in mismatched:
            cifar10.load_labeled_batch(directory / name)
    except InputError as error:
        return CheckResult("data", "error", first_line(error))
    if mismatched:
        message = f"{directory}: not the official files: {', '.join(mismatched)}"
        return CheckResult("data", "warning", message, "accuracies are not comparable to published ones")
    return CheckResult("data", "ok", f"{directory}: the official CIFAR-10 files")


def _check_installable(root: Path) -> CheckResult:
    """Check that the first training can unpack or download CIFAR-10.

    Raises:
        InputError: If something else is in the place of the files, or they cannot be written.
    """
    from cifar_ignite.data.cifar10_files import describe_contents, find_archive

    archive = find_archive(root)
    _write_probe_file(_existing_parent(archive.parent if archive else root))
    if archive:
        return CheckResult("data", "ok", f"{archive}: the official archive; unpacked by the first training")
    hint = "downloaded by the first training; or set DATA_DIR=, or train with DATA=synthetic"
    return CheckResult("data", "warning", f"no CIFAR-10 in {root} ({describe_contents(root)})", hint)


def check_disk(config: Config) -> CheckResult:
    """Check the free space, and with a probe file that the directories below `output_dir` can be written to."""
    try:
        directories = {_existing_parent(config.output_dir / name) for name in OUTPUT_DIRS}
        for directory in directories:
            _write_probe_file(directory)
    except InputError as error:
        return CheckResult("disk", "error", first_line(error), "choose another directory with OUTPUT_DIR=")
    free_gb = min(shutil.disk_usage(directory).free for directory in directories) / 1e9
    message = f"{free_gb:.1f} GB free for {config.output_dir}"
    if free_gb < REQUIRED_GB:
        hint = f"300 epochs need up to {REQUIRED_GB:.0f} GB: free some space, or set OUTPUT_DIR="
        return CheckResult("disk", "warning", message, hint)
    return CheckResult("disk", "ok", message)


def _write_probe_file(directory: Path) -> None:
    """Write a file to the disk and delete it.

    Raises:
        InputError: If it cannot be written.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".probe-") as file:
            file.write(b"probe")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"cannot write to {directory}: {error.strerror}") from None


def _existing_parent(path: Path) -> Path:
    """Return the path, or its nearest parent that exists; a link that leads nowhere exists."""
    path = path.absolute()
    while not path_exists(path) and not path.is_symlink():
        path = path.parent
    return path
