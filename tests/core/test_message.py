from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any
from uuid import UUID, uuid4

import pytest

from celery_eda.core.identity import Identity
from celery_eda.core.message import Encoded
from tests.support.letters import letter

ID = UUID("0191d1d0-7bdc-7000-8000-000000000001")


def test_the_next_attempt_is_the_next_revision_of_the_same_message() -> None:
    assert Identity(ID, 2).next == Identity(ID, 3)


def test_an_identity_survives_its_headers() -> None:
    identity = Identity(ID, 2)

    assert Identity.of_headers(identity.headers) == identity


def test_a_message_without_our_headers_has_no_identity_of_ours() -> None:
    assert Identity.of_headers({"id": str(ID), "task": "shop.charge"}) is None


def test_a_message_without_a_revision_is_the_first_one() -> None:
    assert Identity.of_headers({"eda_id": str(ID)}) == Identity(ID, 0)


@pytest.mark.parametrize(
    "headers",
    [
        {"eda_id": "no uuid"},
        {"eda_id": ""},
        {"eda_id": 7},
        {"eda_id": ["a"]},
        {"eda_id": {"a": 1}},
        {"eda_id": str(ID) * 1000},
        {"eda_id": str(ID), "eda_revision": "1"},
        {"eda_id": str(ID), "eda_revision": True},
        {"eda_id": str(ID), "eda_revision": 1.0},
        {"eda_id": str(ID), "eda_revision": None},
        {"eda_id": str(ID), "eda_revision": -1},
        {"eda_id": str(ID), "eda_revision": 2**31},
    ],
)
def test_forged_headers_are_told_from_missing_ones(headers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Identity.of_headers(headers)


def test_copies_of_a_foreign_message_have_the_same_identity() -> None:
    task_id = str(uuid4())

    assert Identity.of_foreign(task_id, 0, 0) == Identity.of_foreign(task_id, 0, 0)


def test_retries_and_replacements_that_reuse_a_task_id_are_told_apart() -> None:
    task_id = str(uuid4())
    first = Identity.of_foreign(task_id, 0, 0)

    assert Identity.of_foreign(task_id, 1, 0) == first.next
    assert Identity.of_foreign(task_id, 0, 1).id != first.id


def test_fresh_identities_are_uuids_of_version_7_that_grow_with_time() -> None:
    identities = [Identity.fresh() for _ in range(1000)]

    assert len({each.id for each in identities}) == 1000
    assert {(each.id.version, each.id.variant) for each in identities} == {
        (7, "specified in RFC 4122")
    }
    milliseconds = [each.id.int >> 80 for each in identities]
    assert milliseconds == sorted(milliseconds)


def test_an_identity_of_a_year_without_dates_has_no_time() -> None:
    forged = UUID(int=(2**48 - 1) << 80 | 0x7 << 76 | 0x2 << 62)

    assert forged.version == 7
    assert Identity(forged).published is None


def test_an_identity_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Identity(ID).revision = 1  # type: ignore[misc]


def test_a_message_that_is_made_of_another_has_not_its_encoding() -> None:
    sealed = letter().with_encoded(Encoded("headers", "properties", b"both"))
    body, headers = b"[]", {"id": "other"}

    made = [
        *(sealed.at(None), sealed.revised(), sealed.with_body(body, headers)),
        replace(sealed, headers=headers),
    ]

    assert sealed.envelope == b"both"
    assert [each.encoded for each in made] == [None] * 4
