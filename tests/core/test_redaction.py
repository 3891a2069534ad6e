"""Planted secrets are not found again; what is no secret stays."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from celery_eda.core import redaction
from celery_eda.core.redaction import HIDDEN, is_secret, redact, secrets_of

PLANTED = "hunter2-Zq9"


@pytest.mark.parametrize(
    "text",
    [
        f"cannot reach postgresql://shop:{PLANTED}@db:5432/shop",
        f"amqps://u:{PLANTED}@h//, redis://:{PLANTED}@h/0",
        f"mysql+pymysql://u:p@{PLANTED}@h/shop",
        f"password={PLANTED}",
        f"user=shop password='{PLANTED} with blanks' host=db",
        f"Passwd : {PLANTED}",
        f'{{"password": "{PLANTED}\\" more"}}',
        f"{{'db_password': '{PLANTED}'}}",
        f"DB_PASSWORD={PLANTED};x=1",
        f"?token={PLANTED}&page=2",
        f"access_token={PLANTED}",
        f"api_key={PLANTED}",
        f"apiKey: {PLANTED}",
        f"client_secret={PLANTED}",
        f"secret_key={PLANTED}",
        f"Authorization: Bearer {PLANTED}",
        f"Authorization: Basic {PLANTED}==",
        f"Authorization: AWS4 Credential=me, Signature={PLANTED}",
        f"{{'Authorization': 'Digest {PLANTED}'}}",
        f"sent with Bearer {PLANTED}",
        f"[SQL: INSERT INTO cards VALUES (?)]\n[parameters: ('{PLANTED}', 7)]",
        f"cookie: {PLANTED}",
        f"clientSecret: {PLANTED}",
        f"PGPASSWORD={PLANTED}",
        f"dbPass={PLANTED}",
        f"password='{PLANTED}",
        f'{{"authorization": "Bearer {PLANTED}',
        f"private-key={PLANTED}",
    ],
)
def test_a_planted_secret_is_not_found_again(text: str) -> None:
    redacted = redact(text)

    assert PLANTED not in redacted
    assert HIDDEN in redacted


@pytest.mark.parametrize(
    "text",
    [
        "no such card: 7",
        "postgresql://db:5432/shop refused",
        "KeyError: 'monkey'",
        "turkey=7, key=42, author=me",
        "the passenger: A. Turing",
        "http://example.org/a:b",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_what_stands_around_a_secret_stays() -> None:
    text = f"postgresql://shop:{PLANTED}@db/shop, token={PLANTED}, {{'Authorization': '{PLANTED}'}}"

    assert redact(text) == (
        f"postgresql://shop:{HIDDEN}@db/shop, token={HIDDEN}, {{'Authorization': {HIDDEN}}}"
    )


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *[(name, True) for name in ("password", "db_password", "apiKey", "api-key", "Token")],
        *[(name, True) for name in ("clientSecret", "secrets", "auth", "card_number", "cvv2")],
        *[
            (name, False)
            for name in ("key", "author", "compass", "monkey", "number", "", "x" * 999)
        ],
    ],
)
def test_a_name_says_whether_its_value_is_secret(name: str, secret: bool) -> None:
    assert is_secret(name) == secret


def test_secret_arguments_are_found_at_any_depth() -> None:
    arguments: dict[str, Any] = {
        "order": 7,
        "card": {"cvc": 123456, "holder": "Ada"},
        "users": [{"password": "deep-secret"}, {"name": "Bob"}],
        "tokens": ["first-token", "second-token"],
        "secret": None,
        "pwd": "abc",
    }

    found = secrets_of(arguments)

    assert set(found) == {"123456", "deep-secret", "first-token", "second-token"}


def test_a_secret_argument_is_hidden_wherever_it_is_quoted() -> None:
    secret = 'it\'s\na "ü" secret'
    found = secrets_of({"password": secret})

    text = redact(f"{secret} {secret!r} said {ValueError(secret)!r}", found)

    assert "secret" not in text.replace(HIDDEN, "")


def test_arguments_nested_deeper_than_the_stack_do_no_harm() -> None:
    nested: Any = {"password": "deep-secret"}
    for _ in range(100_000):
        nested = [nested]

    assert secrets_of({"x": nested, "password": "flat-secret"}) == ["flat-secret"]


@pytest.mark.timeout(60)  # a repetition without a bound would take for ever
@pytest.mark.parametrize(
    "hostile",
    ["a." * 10**6, "password=" * 10**5, "://" * 10**5, "a://:" * 10**5, "password='" * 10**5,
     "\\" * 10**6, "password=\"" + "\\" * 10**6, "[parameters: " * 10**5, "authorization:" * 10**5,
     "x-" * 10**6, "bearer " * 10**5],
    ids=range(11),
)  # fmt: skip
def test_no_text_takes_long(hostile: str) -> None:
    assert len(redact(hostile)) <= len(hostile)


@pytest.fixture
def lines() -> Any:
    """What a logger of ours has printed, line by line."""
    log = redaction.logger("celery_eda.tested")
    printed: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: printed.append(handler.format(record))  # type: ignore[method-assign]
    log.addHandler(handler)
    yield printed
    log.removeHandler(handler)


def test_a_log_line_and_its_traceback_hold_no_secret(lines: list[str]) -> None:
    log = redaction.logger("celery_eda.tested")
    try:
        raise ValueError(f"password={PLANTED}")
    except ValueError as error:
        log.exception("failed with %r", error)

    (line,) = lines
    assert PLANTED not in line
    assert "ValueError" in line
    assert "test_redaction.py" in line


def test_a_record_without_a_secret_stays_as_it_is(
    lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    log, arguments = redaction.logger("celery_eda.tested"), ("charge", 7)
    try:
        raise ValueError("no such card")
    except ValueError:
        log.exception("%s[%s] has failed", *arguments)

    (record,) = caplog.records
    assert (record.msg, record.args) == ("%s[%s] has failed", arguments)
    assert lines[0].startswith("charge[7] has failed\nTraceback")


def test_only_the_part_of_a_record_that_holds_a_secret_is_changed(
    caplog: pytest.LogCaptureFixture, lines: list[str]
) -> None:
    try:
        raise ValueError(f"password={PLANTED}")
    except ValueError:
        redaction.logger("celery_eda.tested").exception("%s has failed", "charge")

    (record,) = caplog.records
    assert (record.msg, record.args) == ("%s has failed", ("charge",))
    assert PLANTED not in lines[0]


def test_a_log_line_with_wrong_arguments_is_still_printed(lines: list[str]) -> None:
    redaction.logger("celery_eda.tested").warning("%d failed: password=" + PLANTED, "seven")

    assert lines == [f"%d failed: password={HIDDEN}"]


def test_a_logger_is_given_its_filter_once() -> None:
    filters = redaction.logger("celery_eda.tested").filters

    assert redaction.logger("celery_eda.tested").filters == filters
    assert len(filters) == 1
