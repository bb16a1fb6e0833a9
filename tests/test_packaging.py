"""The installed package: configurations by name in any directory, and bounded dependencies."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers import REPOSITORY
from tests.helpers.runs import set_options

PYPROJECT = (REPOSITORY / "pyproject.toml").read_text()


@pytest.fixture
def installed(tmp_path):
    """A function that runs Python in an empty directory, with the package as a wheel installs it."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    ((source, target),) = re.findall(r'^sources = { (\w+) = "([\w/]+)" }$', PYPROJECT, re.MULTILINE)
    for name in re.findall(r'"(\w+)"', re.search(r"^only-include = \[(.*)\]$", PYPROJECT, re.MULTILINE)[1]):
        shutil.copytree(REPOSITORY / name, site / (target if name == source else name))
    # An editable installation, of which this is not one, is found through a file in site-packages.
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def run(*words):
        words = [sys.executable, *map(str, words)]
        done = subprocess.run(words, cwd=empty, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    assert run("-c", "import cifar_ignite; print(cifar_ignite.__file__)")[1].startswith(str(site))
    return run


def test_installed_package_trains_shipped_configuration_in_empty_directory(installed, tmp_path):
    sizes = {"data.synthetic.train_size": 80, "data.val_size": 20, "model.width": 2, "train.epochs": 1}
    status, out, err = installed("-m", "cifar_ignite", "train", "--config", "demo", *set_options(sizes))
    assert (status, err) == (0, "")
    assert 'experiment="demo"' in out
    assert (tmp_path / "empty" / "outputs" / "best_models" / "demo_best.pth").exists()


def test_installed_package_refuses_unknown_configuration_with_the_shipped_names(installed):
    status, _, err = installed("-m", "cifar_ignite", "train", "--config", "se_fats")
    assert status == 2
    assert "se_fats: cannot read the configuration" in err
    assert "did you mean se_fast? Shipped: demo, hybrid, hybrid_best, " in err
    assert err.count("\n") == 1


def test_every_dependency_has_a_lower_and_an_upper_bound():
    """Which .github/workflows/weekly.yml removes by a regular expression."""
    project = PYPROJECT.partition("[project.scripts]")[0]
    names = re.findall(r'"([\w-]+)>=[\d.]+,<[\d.]+"', project)
    lists = re.findall(r"^(?:dependencies|\w+) = \[(.*?)\]$", project.partition("dynamic")[2], re.MULTILINE | re.DOTALL)
    listed = [re.match(r"[\w-]+", word)[0] for text in lists for word in re.findall(r'"([^"]+)"', text)]
    assert set(listed) - {"LICENSE", "version", "cifar-ignite"} == set(names)
    expression = re.search(r"sed -i -E 's/(.*)/\\1\"/g'", (REPOSITORY / ".github/workflows/weekly.yml").read_text())[1]
    unbounded = re.sub(expression, r'\1"', PYPROJECT)
    assert "<" not in unbounded.partition("[project.scripts]")[0]
