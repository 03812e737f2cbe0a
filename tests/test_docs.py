"""What README and docs promise is there: the files, the tests, the targets and the recipes that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "BENCHMARKS.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTS = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@each_page
def test_the_tests_that_it_names_exist(page: Path) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text()):
        homes = [
            str(path.relative_to(ROOT)) for path in TESTS if re.search(rf"^def {name}\(", TESTS[path], re.MULTILINE)
        ]
        assert file in homes, f"{page.name}: {file} has no {name}; it stands in {homes}"


@each_page
def test_its_links_lead_somewhere(page: Path) -> None:
    """A heading after ``#`` too, as GitHub spells it."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = link.partition("#")
        if "://" in path:
            continue
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in {re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in headings}


@each_page
def test_the_targets_of_make_that_it_names_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^|`|\$ |; do )make ([a-z-]+)", page.read_text(), re.MULTILINE)
    assert set(named) <= targets, set(named) - targets


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1100


@each_page
def test_prose_fits_a_terminal(page: Path) -> None:
    """Rows of tables and badges of images may be longer."""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        assert len(line) <= 120 or line.startswith(("|", "!")), f"{page.name}:{number}: {len(line)} characters"
