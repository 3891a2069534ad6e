"""What a retry policy says, without a message."""

from __future__ import annotations

import pytest

from celery_eda import RetryPolicy
from celery_eda.errors import ConfigurationError


def waits(policy: RetryPolicy, error: Exception) -> list[float]:
    """The waits before each further attempt, until it gives up."""
    delays: list[float] = []
    while (delay := policy(len(delays) + 1, error)) is not None:
        delays.append(delay)
    return delays


def test_a_policy_allows_as_many_attempts_as_it_says_the_first_included() -> None:
    assert len(waits(RetryPolicy(attempts=5), OSError())) == 4


def test_the_waits_double_up_to_the_longest_and_keep_half_of_it() -> None:
    policy = RetryPolicy(attempts=8, first=1, longest=10)

    for full, delay in zip([1, 2, 4, 8, 10, 10, 10], waits(policy, OSError()), strict=True):
        assert full / 2 <= delay <= full


def test_only_what_is_named_is_tried_again_with_its_subclasses() -> None:
    policy = RetryPolicy(on=(ConnectionError, LookupError))

    assert policy(1, ConnectionResetError()) is not None
    assert policy(1, KeyError()) is not None
    assert policy(1, ValueError()) is None


def test_an_exception_to_the_rule_is_never_tried_again() -> None:
    policy = RetryPolicy(on=(OSError,), never=(FileNotFoundError,))

    assert policy(1, OSError()) is not None
    assert policy(1, FileNotFoundError()) is None


@pytest.mark.parametrize(
    "numbers", [{"attempts": 0}, {"first": -1.0}, {"first": 10.0, "longest": 5.0}]
)
def test_a_policy_that_makes_no_sense_is_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="RetryPolicy"):
        RetryPolicy(**numbers)  # type: ignore[arg-type]
