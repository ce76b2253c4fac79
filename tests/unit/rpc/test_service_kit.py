"""What the servers share, without a server."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import grpc
import pytest
import structlog
from pydantic import Field, ValidationError
from pydantic_settings import SettingsConfigDict

from atspeed import errors
from atspeed.configuration import settings_docs
from atspeed.configuration.settings import Port, ServiceSettings, address
from atspeed.engine import errors as engine_errors
from atspeed.errors import InvalidArgumentError, ServiceError
from atspeed.observability import logs
from atspeed.rpc import grpc_status
from atspeed.rpc.channels import KEY_HEADER, channel_options, service_config, target_uri
from atspeed.rpc.grpc_status import MAX_DETAILS, call_status
from atspeed.rpc.server import server_options


class ToySettings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="TEST_TOY_")
    service: ClassVar[str] = "toy"

    port: Port = 50052
    tenths: float = Field(default=0.5, gt=0, le=1)
    """Part of a whole
    | so to say.
    """
    mode: Literal["fast", "safe"] = "safe"
    """How."""
    limit: int | None = Field(default=None, ge=1)
    """Most; not set means no limit."""
    warm: bool = True
    """Whether to warm up."""


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which bad settings end."""
    with pytest.raises(SystemExit) as caught:
        ToySettings.load(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


# Settings


def test_flags_win_over_variables_and_variables_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TOY_PORT", "1234")
    monkeypatch.setenv("TEST_TOY_MAX_CONCURRENT_CALLS", "7")
    monkeypatch.setenv("TEST_TOY_LOG_LEVEL", "")
    toy = ToySettings.load(["--bundle", str(tmp_path), "--max-concurrent-calls", "8", "--no-warm"])
    assert (toy.port, toy.max_concurrent_calls, toy.log_level, toy.warm) == (1234, 8, "info", False)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--port", "65536"], "--port (TEST_TOY_PORT): "),
        (["--port", "-1"], "--port (TEST_TOY_PORT): "),
        (["--tenths", "0"], "--tenths (TEST_TOY_TENTHS): "),
        (["--drain-seconds", "nan"], "--drain-seconds (TEST_TOY_DRAIN_SECONDS): "),
        (["--mode", "slow"], "--mode (TEST_TOY_MODE): "),
        (["--bundle", "/nowhere"], "--bundle (TEST_TOY_BUNDLE): "),
        ([], "--bundle (TEST_TOY_BUNDLE): "),
        (["--prot", "1"], "unrecognized arguments: --prot 1"),
        (["--port"], "argument --port: expected one argument"),
    ],
)
def test_a_bad_flag_is_named(capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    line = refused(capsys, *arguments)
    assert line.startswith("toy: ")
    assert named in line


def test_a_bad_variable_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_TOY_TENTHS", "many")
    assert "--tenths (TEST_TOY_TENTHS): " in refused(capsys, "--bundle", str(tmp_path))


def test_a_misspelt_variable_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_TOY_TENTH", "1")
    assert refused(capsys, "--bundle", str(tmp_path)) == "toy: no such setting: TEST_TOY_TENTH"


def test_all_bad_values_are_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "--port", "x", "--mode", "slow")
    assert "TEST_TOY_PORT" in line
    assert "TEST_TOY_MODE" in line


def test_a_password_is_shown_nowhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    toy = ToySettings.load(["--bundle", str(tmp_path), "--redis-url", "redis://:hidden@cache"])
    assert toy.redis_url.get_secret_value() == "redis://:hidden@cache"
    assert "hidden" not in f"{toy!r} {toy} {toy.model_dump(mode='json')}"
    assert "hidden" not in refused(capsys, "--bundle", str(tmp_path), "--redis-url", "http://:hidden@cache")


def test_settings_do_not_change(tmp_path: Path) -> None:
    toy = ToySettings(bundle=tmp_path)
    with pytest.raises(ValidationError):
        toy.port = 1


def test_help_names_flags_variables_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        ToySettings.load(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Part of a whole | so to say. (default: 0.5) [env: TEST_TOY_TENTHS]" in text


@pytest.mark.parametrize(
    ("host", "joined"), [("127.0.0.1", "127.0.0.1:1"), ("::", "[::]:1"), ("localhost", "localhost:1")]
)
def test_address(host: str, joined: str) -> None:
    assert address(host, 1) == joined


# docs/settings.md


def test_settings_page_has_a_row_for_every_setting() -> None:
    rows = [line for line in settings_docs.page([ToySettings]).splitlines() if line.startswith("| `--")]
    assert len(rows) == len(ToySettings.model_fields)
    assert "| `--tenths` | `TEST_TOY_TENTHS` | `0.5` | number, > 0, ≤ 1 | Part of a whole \\| so to say. |" in rows
    assert "| `--mode` | `TEST_TOY_MODE` | `safe` | `fast`, `safe` | How. |" in rows
    assert "| `--limit` | `TEST_TOY_LIMIT` |  | integer, ≥ 1 | Most; not set means no limit. |" in rows
    assert any(
        row.startswith("| `--bundle` | `TEST_TOY_BUNDLE` | required | directory | Directory of the bundle")
        for row in rows
    )


@pytest.mark.parametrize("service", settings_docs.SERVICES)
def test_every_setting_says_what_it_is(service: str) -> None:
    fields = settings_docs.load(service).model_fields
    assert [field for field, declared in fields.items() if not declared.description] == []


def test_settings_page_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, services = tmp_path / "settings.md", [f"{__name__}:ToySettings"]
    assert settings_docs.main(["--check"], path, services) == 1
    assert settings_docs.main([], path, services) == 0
    assert settings_docs.main(["--check"], path, services) == 0
    path.write_text(path.read_text(encoding="utf-8") + "by hand\n", encoding="utf-8")
    assert settings_docs.main(["--check"], path, services) == 1
    assert "make settings-docs" in capsys.readouterr().err


# Errors


def exceptions_of(module: Any) -> dict[str, type[Exception]]:
    found = inspect.getmembers(module, inspect.isclass)
    return {name: kind for name, kind in found if issubclass(kind, Exception) and kind.__module__ == module.__name__}


@pytest.mark.parametrize("module", [errors, engine_errors])
def test_the_tree_of_exceptions_in_the_docstring_is_complete(module: Any) -> None:
    drawn: dict[str, str | None] = {}
    branch: list[str] = []
    for line in (module.__doc__ or "").splitlines():
        if match := re.match(r"(?:    )?((?:\|   )*)(\+-- )?(\w+Error)\b", line):
            depth = len(match[1]) // 4 + bool(match[2])
            drawn[match[3]] = branch[depth - 1] if depth else None
            branch[depth:] = [match[3]]
    defined = exceptions_of(module)
    parents = {name: kind.__bases__[0].__name__ for name, kind in defined.items()}
    assert drawn == {name: parent if parent in defined else None for name, parent in parents.items()}


def test_every_leaf_has_a_status_of_its_own() -> None:
    leaves = [
        kind for kind in exceptions_of(errors).values() if issubclass(kind, ServiceError) and not kind.__subclasses__()
    ]
    codes = [kind.code for kind in leaves]
    assert len(set(codes)) == len(codes)
    assert not {grpc.StatusCode.UNKNOWN, grpc.StatusCode.OK, grpc.StatusCode.INTERNAL} & set(codes)


@pytest.mark.parametrize("kind", exceptions_of(engine_errors).values(), ids=lambda kind: kind.__name__)
def test_engine_errors_have_a_status(kind: type[Exception]) -> None:
    status = call_status(kind("private"))
    if kind in (engine_errors.PromptError, engine_errors.CapacityError):
        assert status == grpc_status.CallStatus(grpc.StatusCode.INVALID_ARGUMENT, "private")
    elif kind is engine_errors.OverloadedError:
        assert status == grpc_status.CallStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, "private")
    else:
        assert status.code is grpc.StatusCode.INTERNAL
        assert re.fullmatch("internal error [0-9a-f]{12}", status.details)


def test_details_stay_small_enough_for_a_trailer() -> None:
    assert len(call_status(InvalidArgumentError("item_ids", "é" * 10_000)).details) == MAX_DETAILS


# Channels


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ("localhost:50051", "dns:///localhost:50051"),
        ("target:50052", "dns:///target:50052"),
        ("dns:///target:50052", "dns:///target:50052"),
        ("dns:target:50052", "dns:target:50052"),
        ("dns://10.0.0.1:53/target:50052", "dns://10.0.0.1:53/target:50052"),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", "ipv4:127.0.0.1:1,127.0.0.1:2"),
        ("ipv6:[::1]:1", "ipv6:[::1]:1"),
        ("my_service-1.local:1", "dns:///my_service-1.local:1"),
        ("unix:/run/target.sock", "unix:/run/target.sock"),
        ("127.0.0.1:50052", "ipv4:127.0.0.1:50052"),
        ("127.0.0.1:5001, 127.0.0.1:5002", "ipv4:127.0.0.1:5001,127.0.0.1:5002"),
        ("[::1]:5001,[::1]:5002", "ipv6:[::1]:5001,[::1]:5002"),
    ],
)
def test_addresses(given: str, target: str) -> None:
    assert target_uri(given) == target


@pytest.mark.parametrize(
    "given",
    [
        *("", "target", "target:", ":50052", "target:0", "target:65536", "target:１２", f"target:{'9' * 5000}"),
        *("a:1,b:2", "127.0.0.1:1,", "127.0.0.1:1,[::1]:2", "[::1:1", "a b:1", "a\n:1", "a\0b:1", "http://a:1", "-a:1"),
        *("dns:", "dns:///", "dns:///a:99999", "dns:///a b:1", "ipv4:", "ipv4:a:1", "ipv4:[::1]:1", "ipv6:127.0.0.1:1"),
        *("ipv4:127.0.0.1:1,zz", "unix:", "unix:a\nb"),
    ],
)
def test_bad_addresses(given: str) -> None:
    with pytest.raises(ValueError, match=r"HOST:PORT|IP:PORT|mixed|names no address"):
        target_uri(given)


def test_service_config() -> None:
    config = service_config("a.B", ["Get"])
    assert config["healthCheckConfig"] == {"serviceName": "a.B"}
    assert config["loadBalancingConfig"] == [{"round_robin": {}}]
    assert "methodConfig" not in service_config("a.B", [])
    policies: Any = service_config("a.B", [], by_key=True)["loadBalancingConfig"]
    assert policies[0]["ring_hash_experimental"]["requestHashHeader"] == KEY_HEADER
    assert policies[1:] == [{"round_robin": {}}]
    options = dict(channel_options("a.B", ["Get"], 70_000))
    assert json.loads(str(options["grpc.service_config"])) == config
    assert options["grpc.max_receive_message_length"] == 70_000


def test_a_client_never_pings_more_often_than_a_server_allows(tmp_path: Path) -> None:
    server = dict(server_options(ToySettings(bundle=tmp_path)))
    client = dict(channel_options("a.B", [], 70_000))
    assert server["grpc.http2.min_ping_interval_without_data_ms"] <= int(client["grpc.keepalive_time_ms"])


# Logs


@pytest.fixture
def captured(capsys: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    handlers, level = logging.root.handlers[:], logging.root.level
    logging.root.handlers[:] = []
    yield capsys
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()
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


@pytest.mark.parametrize("offered", [None, "", "two words", "a" * 65, "line\nbreak"])
def test_a_request_id_that_is_not_plain_is_replaced(captured: pytest.CaptureFixture[str], offered: str | None) -> None:
    assert re.fullmatch("[0-9a-f]{16}", logs.bind_request_id(offered))
    assert logs.request_metadata() != ()
