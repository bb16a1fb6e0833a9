"""Imports between the packages of cifar_ignite run one way: from a layer to the layers below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

PACKAGE = "cifar_ignite"
# From top to bottom, as in the architecture. Modules of one layer do not import each other; inside a package they may.
LAYERS = (
    {"__init__", "__main__"},
    {"cli"},
    {"train", "evaluate", "predict", "export", "compare", "doctor", "inspect_data", "list_models"},
    {"evaluation"},
    {"training"},
    {"checkpointing"},
    {"distributed"},
    {"data"},
    {"augment"},
    {"models"},
    {"image_plots"},
    {"config_io", "plots"},
    {"config", "cuda_graphs", "figures"},
    {"config_fields"},
    {"files"},
    {"errors"},
)
LEVELS = {unit: level for level, layer in enumerate(LAYERS) for unit in layer}


def unit_of(path: Path, root: Path) -> str:
    """Return the package, or the module at the top, that a file belongs to."""
    return path.relative_to(root).parts[0].removesuffix(".py")


def imported_names(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of all imports, at any place in a module of `package`, and by `import_module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def check_imports(root: Path) -> list[str]:
    """Return one line per import that does not lead to a lower layer, and per file without a layer."""
    problems = []
    for path in sorted(root.rglob("*.py")):
        unit, where = unit_of(path, root), path.relative_to(root)
        if unit not in LEVELS:
            problems.append(f"{where}: {unit} is in no layer")
            continue
        package = ".".join([PACKAGE, *where.parent.parts])
        for line, name in imported_names(ast.parse(path.read_text()), package):
            top, *rest = name.split(".")
            if top != PACKAGE:
                continue
            is_module = rest and ((root / rest[0]).is_dir() or (root / f"{rest[0]}.py").exists())
            imported = rest[0] if is_module else "__init__"
            if imported != unit and LEVELS.get(imported, -1) <= LEVELS[unit]:
                problems.append(f"{where}:{line}: {unit} must not import {imported}")
    return problems


def test_imports_lead_to_lower_layers():
    assert check_imports(REPOSITORY / PACKAGE) == []


def test_layers_contain_existing_modules_only():
    root = REPOSITORY / PACKAGE
    assert {unit_of(path, root) for path in root.rglob("*.py")} == LEVELS.keys()


# --- The check itself ---------------------------------------------------------------------------------------------

SKELETON = ("__init__", "cli", "train", "evaluate", "data/__init__", "data/loaders", "data/seeding", "models/__init__",
            "models/resnet", "config_io", "plots", "errors")  # fmt: skip


@pytest.fixture
def root(tmp_path):
    """A package with empty modules."""
    for name in SKELETON:
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("module", "source", "imported"),
    [
        ("models/resnet", "from cifar_ignite.data.loaders import Shard", "data"),
        ("models/resnet", "from cifar_ignite.data import loaders", "data"),
        ("models/resnet", "from cifar_ignite import data", "data"),
        ("models/resnet", "import cifar_ignite.cli as cli", "cli"),
        ("models/resnet", "from ..data import loaders", "data"),
        ("models/resnet", "from .. import train", "train"),
        ("models/__init__", "from ..data.loaders import Shard", "data"),
        ("models/resnet", "def load():\n    from cifar_ignite.data import loaders", "data"),
        ("models/resnet", "if TYPE_CHECKING:\n    from cifar_ignite.data import loaders", "data"),
        ("models/resnet", "importlib.import_module('cifar_ignite.data')", "data"),
        ("evaluate", "from cifar_ignite.train import train", "train"),
        ("config_io", "from cifar_ignite import plots", "plots"),
        ("errors", "from cifar_ignite import __version__", "__init__"),
        ("errors", "import cifar_ignite", "__init__"),
    ],
)
def test_check_notices_forbidden_import(root, module, source, imported):
    path = root / f"{module}.py"
    path.write_text(source)
    line = source.count("\n") + 1
    unit = module.split("/")[0]
    assert check_imports(root) == [f"{path.relative_to(root)}:{line}: {unit} must not import {imported}"]


def test_check_notices_module_without_layer(root):
    (root / "helpers.py").write_text("")
    assert check_imports(root) == ["helpers.py: helpers is in no layer"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data/loaders", "from cifar_ignite.models.resnet import ResNet"),
        ("data/loaders", "from cifar_ignite.data.seeding import derive_seed"),
        ("data/loaders", "from .seeding import derive_seed"),
        ("data/__init__", "from . import loaders"),
        ("train", "from cifar_ignite import data, errors"),
        ("__init__", "from cifar_ignite.train import train"),
        ("errors", "import torch.data\nfrom evaluate import train"),
    ],
)
def test_check_accepts_allowed_import(root, module, source):
    (root / f"{module}.py").write_text(source)
    assert check_imports(root) == []
