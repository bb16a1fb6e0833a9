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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from cifar_ignite.config import Config
from cifar_ignite.config_io import parse_config
from cifar_ignite.errors import InputError, TrainingError, first_line
from cifar_ignite.files import path_exists

if TYPE_CHECKING:
    from cifar_ignite.data.cifar_files import OfficialFiles

PACKAGES = ("ignite", "numpy", "pandas", "matplotlib", "tensorboardX", "tqdm", "pydantic", "jinja2", "PIL")
EXTRAS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "tensorboard": ("tensorboard",)}
# A full checkpoint with EMA weights is 34 MB: one every ten epochs, the latest two, the best model and its copy.
REQUIRED_GB = 2.0
# Directories below output_dir that commands write to.
OUTPUT_DIRS = ("training_runs", "best_models", "evaluations", "predictions", "exports", "data", "")
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
        overrides: Strings `section.key=value`; the section `data` and `output_dir` are used.

    Raises:
        TrainingError: If a check failed with status "error".
    """
    config = parse_config({}, "--set", overrides)
    checks: list[Callable[[], CheckResult | list[CheckResult]]] = [
        check_python,
        check_torch_and_torchvision,
        check_packages,
        *(partial(check_extra, name) for name in EXTRAS),
        check_device,
        partial(check_dataset, config),
        partial(check_disk, config),
    ]
    results: list[CheckResult] = []
    for check in checks:
        found = check()
        for result in found if isinstance(found, list) else [found]:
            logger.info("%s", result)
            results.append(result)
    if num_errors := sum(result.status == "error" for result in results):
        raise TrainingError(f"{num_errors} of {len(results)} checks failed, see above")


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


def check_dataset(config: Config) -> list[CheckResult]:
    """Check that the configured dataset can be loaded; one result per finding."""
    try:
        from cifar_ignite.data.cifar10 import CIFAR10_FILES
        from cifar_ignite.data.cifar100 import CIFAR100_FILES
    except Exception as error:
        return [CheckResult("data", "error", f"cannot be checked ({first_line(error)})", EARLIER_ERRORS_HINT)]
    try:
        if files := {"cifar10": CIFAR10_FILES, "cifar100": CIFAR100_FILES}.get(config.data.dataset):
            return [_check_official_files(config, files)]
        return list(_check_loaded_dataset(config))
    except InputError as error:
        return [CheckResult("data", "error", first_line(error))]


def _check_official_files(config: Config, files: "OfficialFiles") -> CheckResult:
    """Check that the official files are found, by their md5 checksums, and that files that differ can be loaded.

    Raises:
        InputError: If training would fail.
    """
    from cifar_ignite.data import cifar_files
    from cifar_ignite.data.cifar_batches import load_labeled_batch

    root = config.data.root
    directory = cifar_files.find_files(files, root, files.all)
    if not directory:
        return _check_installable(files, root)
    cifar_files.check_complete(files, directory, files.all)
    if mismatched := cifar_files.mismatched_files(directory, files.all):
        num_classes = len(files.load_class_names(directory))
        for name in mismatched:
            if name not in files.meta_md5s:
                load_labeled_batch(directory / name, files.label_key, num_classes)
        message = f"{directory}: not the official files: {', '.join(mismatched)}"
        return CheckResult("data", "warning", message, "accuracies are not comparable to published ones")
    return CheckResult("data", "ok", f"{directory}: the official {files.title} files")


def _check_installable(files: "OfficialFiles", root: Path) -> CheckResult:
    """Check that the first training can unpack or download the official files.

    Raises:
        InputError: If something else is in the place of the files, or they cannot be written.
    """
    from cifar_ignite.data.cifar_files import describe_contents, find_archive

    archive = find_archive(files, root)
    _write_probe_file(_existing_parent(archive.parent if archive else root))
    if archive:
        return CheckResult("data", "ok", f"{archive}: the official archive; unpacked by the first training")
    hint = "downloaded by the first training; or set DATA_DIR=, or train with DATA=synthetic"
    return CheckResult("data", "warning", f"no {files.title} in {root} ({describe_contents(files, root)})", hint)


def _check_loaded_dataset(config: Config) -> Iterator[CheckResult]:
    """Load all splits of a dataset; yield what they contain, unreadable files, duplicates, and a missing test set.

    Raises:
        InputError: If training would fail.
    """
    from cifar_ignite.data.inspection import describe_duplicates, find_duplicates, inspect_dataset

    report = inspect_dataset(config.data)
    yield CheckResult("data", "ok", f"{config.data.dataset}: {report.describe()}")
    if len(report.sizes):
        yield CheckResult("sizes", "ok", report.describe_sizes(config.data.image_size))
    if report.missing_test:
        yield CheckResult("test", "warning", report.missing_test, "only evaluate needs a test set")
    if num_unreadable := {name: count for name, count in report.num_unreadable.items() if count}:
        message = "unreadable files, listed above: " + ", ".join(f"{n} of {name}" for name, n in num_unreadable.items())
        is_allowed = max(num_unreadable.values()) <= config.data.max_unreadable
        hint = f"remove them, or set data.max_unreadable={max(num_unreadable.values())}"
        yield CheckResult("files", "warning", message) if is_allowed else CheckResult("files", "error", message, hint)
    lines = list(describe_duplicates(find_duplicates(report.splits)))
    for line in lines:
        yield CheckResult("duplicates", "warning", line, "accuracies are too high if images leak between splits")
    if not lines:
        yield CheckResult("duplicates", "ok", "no image is in two splits, or has two labels")


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
