"""README and docs agree with the project."""

import re

import pytest

from tests.helpers import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])


def document_id(path):
    return str(path.relative_to(REPOSITORY))


def test_readme_has_at_most_160_lines():
    assert README.count("\n") <= 160


def test_readme_names_existing_make_targets_only():
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    assert len(targets) > 5
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_document_links_to_existing_files(path):
    for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_document_has_no_long_lines_outside_tables_and_code(path):
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    assert [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_table_of_faults_names_existing_tests():
    sources = "".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", (REPOSITORY / "docs" / "resuming.md").read_text()))
    assert len(named) > 50
    assert [name for name in named if f"def {name}(" not in sources] == []
