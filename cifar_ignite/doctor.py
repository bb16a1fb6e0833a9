"""Whether all is there that training needs: a line each, with the remedy where something is wrong.

Imports nothing that may be broken before it is asked for: this is what people run when nothing else does.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from packaging.requirements import Requirement

from cifar_ignite.config import Config, RunFailedError, parse_config

PACKAGES = ("ignite", "numpy", "pandas", "matplotlib", "tensorboardX", "tqdm", "pydantic", "jinja2", "PIL")
EXTRAS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "tensorboard": ("tensorboard",)}
# States are 34 MB each with averaged weights: one every ten epochs, the newest two, the best model and its copy.
NEEDED_GB = 2.0


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        what: was looked at.
        state: "ok"; "note", worth knowing, nothing is broken; "wrong", training will fail.
        told: what was found.
        remedy: what to do about it, if there is something to do.
    """

    what: str
    state: str
    told: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.state:<5}  {self.what:<11}  {self.told}" + (f"; {self.remedy}" if self.remedy else "")


def diagnose(overrides: Sequence[str] = ()) -> None:
    """Print a line for each thing that was looked at.

    Args:
        overrides: `section.key=value`, such as data.root and output_dir.

    Raises:
        RunFailedError: something is wrong that training would fail of.
    """
    config = parse_config({}, "--set", overrides)
    checks: list[Callable[[], Finding]] = [
        check_python,
        check_pair,
        check_packages,
        *(lambda name=name: check_extra(name) for name in EXTRAS),  # type: ignore[misc]
        check_device,
        lambda: check_data(config),
        lambda: check_disk(config),
    ]
    wrong = 0
    for check in checks:
        finding = check()
        wrong += finding.state == "wrong"
        print(finding, flush=True)
    if wrong:
        raise RunFailedError(f"{wrong} of {len(checks)} things are wrong, see above")


def check_python() -> Finding:
    told = f"{platform.python_version()} in {sys.prefix}, {platform.system()} {platform.machine()}"
    return Finding("python", "ok", told)


def check_pair() -> Finding:
    """torchvision is built against one version of torch and one kind of accelerator."""
    remedy = "install both by one command from one index: pip install --force-reinstall torch torchvision"
    versions = {}
    for name in ("torch", "torchvision"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return Finding("torch", "wrong", f"{name} is not installed", remedy)
    told = " and ".join(f"{name} {version}" for name, version in versions.items())
    for requirement in map(Requirement, importlib.metadata.requires("torchvision") or ()):
        if requirement.name == "torch" and not requirement.specifier.contains(versions["torch"], prereleases=True):
            return Finding("torch", "wrong", f"{told} are no pair: it wants {requirement}", remedy)
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a missing operator, a library that does not load
        return Finding("torch", "wrong", f"{told} do not work together ({_first_line(error)})", remedy)
    return Finding("torch", "ok", f"{told}, a pair that imports")


def check_packages() -> Finding:
    versions = []
    for name in PACKAGES:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # not only missing ones: whatever a broken installation raises
            return Finding("packages", "wrong", f"{name}: {_first_line(error)}", "pip install -e .")
        versions.append(f"{name} {module.__version__}")
    return Finding("packages", "ok", ", ".join(versions))


def check_extra(name: str) -> Finding:
    missing = [package for package in EXTRAS[name] if importlib.util.find_spec(package) is None]
    if missing:
        return Finding(
            name, "note", f"{', '.join(missing)} not installed", f"if you want it: pip install -e '.[{name}]'"
        )
    return Finding(
        name, "ok", ", ".join(f"{package} {importlib.metadata.version(package)}" for package in EXTRAS[name])
    )


def check_device() -> Finding:
    try:
        import torch

        from cifar_ignite.engines import select_device, select_precision

        device = select_device("auto")
        precision = str(select_precision("auto", device)).removeprefix("torch.")
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            name = torch.cuda.get_device_name()
            return Finding("device", "ok", f"{name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, {precision}")
        told = f"CPU, {torch.get_num_threads()} threads, {precision}"
        if torch.version.cuda and shutil.which("nvidia-smi"):
            return Finding("device", "note", f"{told}; torch finds no GPU", "does nvidia-smi name one and its driver?")
        return Finding("device", "ok", told)
    except Exception as error:  # of the pair above, if that is broken
        return Finding("device", "wrong", f"cannot be used ({_first_line(error)})", "mend the lines above first")


def check_data(config: Config) -> Finding:
    """The official files, by their md5 sums."""
    try:
        from torchvision.datasets import CIFAR10
    except Exception as error:
        return Finding("data", "wrong", f"cannot be checked ({_first_line(error)})", "mend the lines above first")
    folder = config.data.root / CIFAR10.base_folder
    if not folder.is_dir():
        remedy = "the first training downloads it, or DATA_DIR= names where it is, or train with DATA=synthetic"
        return Finding("data", "note", f"no CIFAR-10 at {folder}", remedy)
    sums = dict(CIFAR10.train_list + CIFAR10.test_list)
    if missing := [name for name in sums if not (folder / name).is_file()]:
        remedy = f"remove {folder} to have it downloaded anew"
        return Finding("data", "wrong", f"{folder} lacks {', '.join(missing)}", remedy)
    others = [
        name
        for name, official in sums.items()
        if hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest() != official
    ]
    if others:
        remedy = "accuracies are not comparable to published ones"
        return Finding("data", "note", f"{folder}: not the official files: {', '.join(others)}", remedy)
    return Finding("data", "ok", f"CIFAR-10 at {folder}, the official files")


def check_disk(config: Config) -> Finding:
    place = config.output_dir.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    told = f"{free:.1f} GB free for {config.output_dir}"
    if free < NEEDED_GB:
        return Finding("disk", "note", told, f"300 epochs take up to {NEEDED_GB:.0f} GB: make room, or OUTPUT_DIR=")
    return Finding("disk", "ok", told)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
