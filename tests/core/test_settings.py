from __future__ import annotations

import traceback
from contextlib import suppress
from dataclasses import fields
from typing import Any

import pytest
from celery import Celery
from celery.app import defaults

from celery_eda import EDA
from celery_eda.core import settings
from celery_eda.core.settings import Settings
from celery_eda.errors import ConfigurationError, UnknownSetting, UnsafeSetting

settings.register()


def of(**conf: Any) -> Settings:
    """The settings of an app with this configuration."""
    app = Celery(set_as_current=False)
    app.conf.update(conf)
    return Settings.of(app.conf)


def of_command_line(*arguments: str) -> Settings:
    """The settings of an app whose worker was started with these arguments."""
    app = Celery(set_as_current=False)
    app.config_from_cmdline(list(arguments), "worker")
    return Settings.of(app.conf)


def test_an_app_that_sets_nothing_has_the_defaults() -> None:
    assert of() == Settings()


@pytest.mark.parametrize(
    "url", ["postgresql+psycopg://u:s3cr3t@h/x", "postgresql://u:s3cr3t@h:port/x", "s3cr3t"]
)
def test_no_text_shows_the_address_of_the_database(url: str) -> None:
    app = Celery("quiet", broker="memory://")
    app.conf.eda_database_url = url
    eda = EDA(app)

    with suppress(ConfigurationError):
        _ = eda.databases.url
    assert "s3cr3t" not in repr(eda.service.settings)
    if url != "postgresql+psycopg://u:s3cr3t@h/x":
        with pytest.raises(ConfigurationError) as refusal:
            _ = eda.databases.url
        lines = traceback.format_exception(refusal.type, refusal.value, refusal.tb)
        assert "s3cr3t" not in "".join(lines)


def test_workers_show_nobody_the_password_of_a_database_that_is_the_broker() -> None:
    app = Celery("quiet", broker="eda+postgresql+psycopg://u:s3cr3t@h/x")
    EDA(app)

    with app.connection_for_read() as connection:
        assert "s3cr3t" not in str({**connection.info(), "password": ""})


def test_every_setting_has_a_line_of_documentation() -> None:
    for setting in fields(Settings):
        assert setting.metadata["doc"].endswith(".")


def test_every_default_is_known_to_celery() -> None:
    app = Celery(set_as_current=False)

    assert app.conf.eda_relay_batch == Settings().relay_batch
    assert set(defaults.NAMESPACES["eda"]) == {setting.name for setting in fields(Settings)}


def test_a_setting_is_read_from_the_app() -> None:
    assert of(eda_relay_batch=7).relay_batch == 7


def test_settings_are_read_through_a_namespace() -> None:
    app = Celery(set_as_current=False)
    app.config_from_object({"SHOP_EDA_RELAY_BATCH": 7, "SHOP_TIMEZONE": "UTC"}, namespace="SHOP")

    assert Settings.of(app.conf).relay_batch == 7


def test_settings_are_read_from_the_worker_s_command_line() -> None:
    read = of_command_line(
        "eda.relay_batch=7", "eda_relay_poll=0.5", "eda.embedded_relay=no", "eda.outside=raise"
    )

    assert (read.relay_batch, read.relay_poll, read.embedded_relay, read.outside) == (
        7,
        0.5,
        False,
        "raise",
    )


def test_a_pattern_on_the_command_line_is_one_pattern() -> None:
    assert of_command_line("eda.tasks=orders.*").tasks == ("orders.*",)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("relay_batch", "7", 7),
        ("relay_poll", "0.5", 0.5),
        ("embedded_relay", "false", False),
        ("embedded_relay", "1", True),
        ("tasks", "orders.*", ("orders.*",)),
        ("outside", "store", "store"),
    ],
)
def test_text_is_converted_since_environments_hold_only_text(
    key: str, text: str, value: object
) -> None:
    assert getattr(of(**{f"eda_{key}": text}), key) == value


def test_a_whole_number_is_good_for_seconds() -> None:
    assert of(eda_relay_poll=2).relay_poll == 2.0


def test_a_list_of_patterns_is_kept_as_a_tuple() -> None:
    assert of(eda_tasks=["orders.*", "mail.send"]).tasks == ("orders.*", "mail.send")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("eda_relay_btch", "eda_relay_batch"),
        ("eda_database_uri", "eda_database_url"),
        ("eda_task", "eda_tasks"),
    ],
)
def test_a_misspelt_setting_is_refused_with_what_was_meant(key: str, meant: str) -> None:
    with pytest.raises(UnknownSetting, match=rf"'{key}'.*Did you mean {meant}\?"):
        of(**{key: 1})


def test_a_misspelt_setting_is_found_through_a_namespace() -> None:
    app = Celery(set_as_current=False)
    app.config_from_object({"SHOP_EDA_RELAY_BTCH": 7}, namespace="SHOP")

    with pytest.raises(UnknownSetting, match=r"SHOP_EDA_RELAY_BTCH.*eda_relay_batch"):
        Settings.of(app.conf)


def test_an_app_configured_before_the_settings_were_known_has_the_defaults() -> None:
    app = Celery(set_as_current=False)
    assert app.conf.timezone is None  # reading loads the configuration
    for setting in fields(Settings):
        del app.conf.defaults[-1][f"eda_{setting.name}"]

    assert Settings.of(app.conf) == Settings()


def test_a_setting_that_resembles_none_is_refused_with_the_list_of_all() -> None:
    with pytest.raises(UnknownSetting) as refusal:
        of(eda_zzz=1)

    assert "Did you mean" not in str(refusal.value)
    assert "eda_claim_timeout" in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eda_relay_batch", "many"),
        ("eda_relay_batch", 1.5),
        ("eda_relay_batch", True),
        ("eda_relay_batch", None),
        ("eda_relay_batch", 0),
        ("eda_relay_poll", -1),
        ("eda_relay_poll", float("nan")),
        ("eda_claim_timeout", float("inf")),
        ("eda_embedded_relay", "perhaps"),
        ("eda_embedded_relay", 1),
        ("eda_table_prefix", 7),
        ("eda_outside", "sometimes"),
        ("eda_max_attempts", 0),
    ],
)
def test_a_value_of_the_wrong_type_or_size_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"^{key} must be "):
        of(**{key: value})


@pytest.mark.parametrize("claim_timeout", [15, 20])
def test_a_claim_that_ends_before_the_confirms_come_is_refused_with_the_remedy(
    claim_timeout: float,
) -> None:
    with pytest.raises(UnsafeSetting, match=r"sent twice\. Raise eda_claim_timeout\."):
        of(eda_claim_timeout=claim_timeout, eda_publish_timeout=20)


def test_a_broker_that_would_give_up_before_the_worker_does_is_refused() -> None:
    with pytest.raises(UnsafeSetting, match="Raise eda_delivery_limit"):
        of(eda_delivery_limit=5, eda_max_deliveries=5)


# ── retention ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "conf",
    [
        {},
        {"eda_inbox_retention": None},
        {"eda_inbox_retention": 20 * 300 + 24 * 3600},
        {"eda_inbox_retention": 3600 + 3600, "eda_redelivery_horizon": 3600,
         "eda_max_attempts": 12, "eda_retry_delay_max": 300},
        {"eda_dead_letter_retention": 0},
        {"eda_dead_letter_retention": None, "eda_audit_retention": None},
        {"eda_dead_letter_retention": 7200, "eda_audit_retention": 7200},
        {"broker_transport_options": {"visibility_timeout": 86400}},
        {"broker_transport_options": None},
    ],
)  # fmt: skip
def test_what_is_remembered_for_long_enough_is_accepted(conf: dict[str, Any]) -> None:
    of(**conf)


@pytest.mark.parametrize(
    "conf",
    [
        {"eda_inbox_retention": 0},
        {"eda_inbox_retention": 20 * 300 + 24 * 3600 - 1},
        {"eda_redelivery_horizon": 14 * 24 * 3600},
        {"eda_max_attempts": 5000},
        {"eda_retry_delay_max": 24 * 3600},
    ],
)
def test_an_inbox_that_forgets_before_the_last_copy_has_come_is_refused(
    conf: dict[str, Any],
) -> None:
    with pytest.raises(UnsafeSetting, match=r"once more\. Raise eda_inbox_retention\."):
        of(**conf)


@pytest.mark.parametrize(
    "conf",
    [
        {"eda_audit_retention": 0},
        {"eda_audit_retention": 90 * 24 * 3600 - 1},
        {"eda_dead_letter_retention": None},
    ],
)
def test_an_audit_that_forgets_before_its_dead_letter_goes_is_refused(conf: dict[str, Any]) -> None:
    with pytest.raises(UnsafeSetting, match=r"Raise eda_audit_retention\."):
        of(**conf)


def test_a_horizon_below_the_visibility_timeout_is_refused() -> None:
    with pytest.raises(UnsafeSetting, match=r"visibility_timeout.*Raise eda_redelivery_horizon\."):
        of(broker_transport_options={"visibility_timeout": 24 * 3600 + 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eda_inbox_retention", -1),
        ("eda_inbox_retention", "long"),
        ("eda_redelivery_horizon", None),
        ("eda_redelivery_horizon", 3599),
        ("eda_housekeeping_interval", 0),
    ],
)
def test_a_retention_of_the_wrong_type_or_size_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"^{key} must be "):
        of(**{key: value})
