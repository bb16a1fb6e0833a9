"""The Python API: what `from cifar_ignite import ...` gives, in any order of imports, and what its functions return."""

import ast
import inspect
import itertools
import subprocess
import sys

import pytest

import cifar_ignite
from tests.helpers import REPOSITORY

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
