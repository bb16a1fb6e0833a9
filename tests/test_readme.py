"""What the README says is true."""

import json
import re

from conftest import REPOSITORY

from cifar_ignite.config import Config, flatten

README = (REPOSITORY / "README.md").read_text()


def test_the_configuration_table_has_every_key_with_its_default():
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| `(.+?)` \|$", README, re.MULTILINE)
    assert {key: json.loads(default) for key, _, default in rows} == flatten(Config().model_dump(mode="json"))


def test_every_target_and_file_it_names_exists():
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (REPOSITORY / path).exists(), path


def test_every_test_that_the_table_of_faults_names_exists():
    sources = "".join(path.read_text() for path in (REPOSITORY / "tests").glob("test_*.py"))
    table = (REPOSITORY / "benchmarks" / "FAULTS.md").read_text()
    named = re.findall(r"`([a-z]+(?:_[a-z0-9]+){2,}_?…?)`", table)
    assert len(named) > 50
    for name in named:
        if not name.startswith(("save_", "train_", "test_")):
            assert re.search(rf"def test_{name.rstrip('…')}", sources), name


def test_nothing_was_left_to_be_filled_in():
    for path in [*REPOSITORY.glob("*.md"), *(REPOSITORY / "benchmarks").glob("*.md")]:
        assert "PLACEHOLDER" not in path.read_text(), path
