"""Log lines: their form, errors without values, request ids."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextvars import copy_context

import pytest
import structlog

from atspeed.observability import logs


@pytest.fixture
def captured(capsys: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    handlers, level = logging.root.handlers[:], logging.root.level
    logging.root.handlers[:] = []
    yield capsys
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.contextvars.clear_contextvars()


def fail(password: str) -> None:
    raise RuntimeError(f"no luck number {len(password) - 1}")


@pytest.mark.parametrize("style", ["json", "console"])
@pytest.mark.parametrize("texts", [False, True])
def test_logs_show_where_an_error_arose_and_no_values(
    captured: pytest.CaptureFixture[str], style: logs.LogFormat, texts: bool
) -> None:
    logs.configure("toy", "info", style, error_texts=texts)
    try:
        fail("".join(["hid", "den"]))  # not in the source line that the traceback shows
    except RuntimeError as error:
        structlog.get_logger("a").error("failed", exc_info=error)
        logging.getLogger("b").error("failed too", exc_info=error)  # noqa: TRY400
    text = captured.readouterr().err
    assert text.count("RuntimeError: no luck number 5") == (2 if texts else 0)
    assert text.count(", in fail") == 2
    assert "hidden" not in text


def test_json_logs_are_one_object_a_line(captured: pytest.CaptureFixture[str]) -> None:
    logs.configure("toy", "info", "json")
    logs.bind_request_id("r-1")
    structlog.get_logger("a").debug("too fine")
    structlog.get_logger("a").info("two\nlines", number=1)
    logging.getLogger("b").warning("from %s", "logging")
    entries = [json.loads(line) for line in captured.readouterr().err.splitlines()]
    assert [(e["event"], e["level"]) for e in entries] == [("two\nlines", "info"), ("from logging", "warning")]
    assert all(entry["service"] == "toy" and entry["request_id"] == "r-1" for entry in entries)


def test_warnings_and_errors_of_a_call_say_from_where_it_came(captured: pytest.CaptureFixture[str]) -> None:
    logs.configure("toy", "info", "json")

    def write() -> None:
        logs.bind_peer(lambda: {"peer": "192.0.2.1:5"})
        for level in ("info", "warning", "error"):
            getattr(structlog.get_logger("a"), level)(level)

    copy_context().run(write)
    structlog.get_logger("a").error("outside")
    entries = [json.loads(line) for line in captured.readouterr().err.splitlines()]
    assert {entry["event"]: entry.get("peer") for entry in entries} == {
        "info": None,
        "warning": "192.0.2.1:5",
        "error": "192.0.2.1:5",
        "outside": None,
    }


@pytest.mark.parametrize("offered", [None, "", "two words", "a" * 65, "line\nbreak"])
def test_a_request_id_that_is_not_plain_is_replaced(captured: pytest.CaptureFixture[str], offered: str | None) -> None:
    assert re.fullmatch("[0-9a-f]{16}", logs.bind_request_id(offered))
    assert logs.request_metadata() != ()
