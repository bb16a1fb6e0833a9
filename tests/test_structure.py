"""Limits on the size of functions and files, and no private names of other libraries."""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

PACKAGES = ("cifar_ignite", "benchmarks")
MAX_FUNCTION_LINES = 50  # without the docstring
MAX_PARAMETERS = 5
MAX_FILE_LINES = 300
# Private names that have no public equivalent; the code gives the reason and the versions it was checked with.
ALLOWED_PRIVATE_NAMES = {
    # No public operator copies a list of tensors, or returns their norms, in one kernel launch.
    ("cifar_ignite/training/muon.py", "torch._foreach_copy_"),
    ("cifar_ignite/training/muon.py", "torch._foreach_norm"),
    # torch 2.11 lacks the public torch.cpu.get_capabilities.
    ("cifar_ignite/training/device.py", "torch.cpu._is_avx512_bf16_supported"),
    ("cifar_ignite/training/device.py", "torch.cpu._is_amx_tile_supported"),
}


def line_count(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def check_function_sizes(source: str) -> Iterator[str]:
    """Yield one line per function, nested ones included, that is too long or has too many parameters."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = line_count(node) - (line_count(node.body[0]) if ast.get_docstring(node) else 0)
        if lines > MAX_FUNCTION_LINES:
            yield f"{node.name} has {lines} lines"
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        parameters = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
        if len(parameters) > MAX_PARAMETERS:
            yield f"{node.name} has {len(parameters)} parameters"


def check_file_size(source: str) -> Iterator[str]:
    """Yield a line if the file is too long."""
    if (lines := len(source.splitlines())) > MAX_FILE_LINES:
        yield f"the file has {lines} lines"


def is_third_party(module: str) -> bool:
    return module.split(".")[0] not in {*sys.stdlib_module_names, *PACKAGES, ""}


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def imports_in(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """Yield (local name, dotted name that it stands for, dotted name that is imported) of all absolute imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                yield (alias.asname, alias.name, alias.name) if alias.asname else (top, top, alias.name)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield alias.asname or alias.name, name, name


def private_names(source: str) -> Iterator[str]:
    """Yield the dotted private names of other libraries: imported ones, and attributes of what is imported."""
    tree, full_names = ast.parse(source), {}
    for local, full_name, imported in imports_in(tree):
        if is_third_party(imported):
            full_names[local] = full_name
            if any(is_private(part) for part in imported.split(".")):
                yield imported
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            local, *parts = ast.unparse(node).split(".")
            if local in full_names:
                yield ".".join([full_names[local], *parts])


def check_tree(root: Path, check: Callable[[str], Iterator[str]]) -> list[tuple[str, str]]:
    """Return (file, finding) for all Python files of the packages below `root`."""
    return [
        (str(path.relative_to(root)), finding)
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
        for finding in check(path.read_text())
    ]


def test_functions_are_short_and_have_few_parameters():
    assert check_tree(REPOSITORY, check_function_sizes) == []


def test_files_are_short():
    assert check_tree(REPOSITORY, check_file_size) == []


def test_private_names_of_libraries_are_the_allowed_ones():
    assert set(check_tree(REPOSITORY, private_names)) == ALLOWED_PRIVATE_NAMES


# --- The checks themselves ----------------------------------------------------------------------------------------


def function_of(lines: int) -> str:
    """Return the source of a decorated function with this many lines, inside a class."""
    return "class C:\n    @d\n    def f(self):\n" + "        pass\n" * (lines - 1)


def test_check_notices_long_function():
    assert list(check_function_sizes(function_of(50))) == []
    assert list(check_function_sizes(function_of(51))) == ["f has 51 lines"]


def test_check_does_not_count_docstring():
    source = 'def f():\n    """' + "line\n" * 40 + '    """\n' + "    pass\n" * 49
    assert list(check_function_sizes(source)) == []
    assert list(check_function_sizes(source + "    pass\n")) == ["f has 51 lines"]


def test_check_notices_long_nested_and_async_functions():
    nested = "def outer():\n    async def inner():\n" + "        pass\n" * 50
    assert list(check_function_sizes(nested)) == ["outer has 52 lines", "inner has 51 lines"]


@pytest.mark.parametrize(
    ("signature", "findings"),
    [
        ("a, b, c, d, e", []),
        ("self, a, b, c, d, e", []),
        ("cls, a, b, c, d, e, *args, **kwargs", []),
        ("a, b, /, c, d, *, e, f", ["f has 6 parameters"]),
        ("a, b, c, d, e, f=1", ["f has 6 parameters"]),
    ],
)
def test_check_counts_parameters(signature, findings):
    assert list(check_function_sizes(f"def f({signature}): pass")) == findings


def test_check_notices_long_file():
    assert list(check_file_size("pass\n" * 300)) == []
    assert list(check_file_size("pass\n" * 301)) == ["the file has 301 lines"]


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch\ntorch._C._jit()", ["torch._C._jit", "torch._C"]),
        ("import torch.distributed as dist\ndist._get_default_store()", ["torch.distributed._get_default_store"]),
        ("import torch.cpu\ntorch.cpu._is_amx_tile_supported()", ["torch.cpu._is_amx_tile_supported"]),
        ("from torch import nn\nnn._reduction", ["torch.nn._reduction"]),
        ("from torch._dynamo import reset", ["torch._dynamo.reset"]),
        ("from ignite.metrics import Metric as M\nM._Metric__key", ["ignite.metrics.Metric._Metric__key"]),
        ("def f():\n    import numpy as np\n    np._core", ["numpy._core"]),
        ("import torch\ntorch.__version__", []),
        ("import os\nos._exit(1)", []),
        ("from cifar_ignite import doctor\ndoctor._x", []),
        ("class C:\n    def f(self):\n        self._x", []),
    ],
)
def test_check_notices_private_names(source, names):
    assert list(private_names(source)) == names


def test_check_reads_all_files_of_packages(tmp_path):
    for name in ("cifar_ignite/deep/er/a.py", "benchmarks/b.py", "tests/c.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("pass\n" * 301)
    found = check_tree(tmp_path, check_file_size)
    assert [name for name, _ in found] == ["cifar_ignite/deep/er/a.py", "benchmarks/b.py"]
