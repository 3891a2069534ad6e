"""Every page of the documentation does what it says."""

from __future__ import annotations

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


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    person = Reader(tmp_path)
    yield person
    person.leave()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_does_what_it_says(page: Path, reader: Reader) -> None:
    assert reader.follow(page)
