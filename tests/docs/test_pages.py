"""Every page of the documentation does what it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import Reader
from tests.support import PROJECT

PAGES = sorted(
    page
    for folder in ("start", "how-to")
    for page in (PROJECT / "docs" / folder).glob("*.md")
    if "```" in page.read_text()
)
#: Pages that name the tests of what they say.
NAMING = [PROJECT / "docs" / "patterns.md", PROJECT / "docs" / "explanation" / "path.md"]


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    person = Reader(tmp_path)
    yield person
    person.leave()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_does_what_it_says(page: Path, reader: Reader) -> None:
    assert reader.follow(page)


@pytest.mark.parametrize("page", NAMING, ids=lambda page: page.stem)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"`((?:[a-z_]+/)+test_[a-z_]+)`", page.read_text()))

    assert [each for each in sorted(named) if not (PROJECT / "tests" / f"{each}.py").exists()] == []
    assert named
