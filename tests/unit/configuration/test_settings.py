"""Settings: flags, variables, defaults, messages for bad values, --help and docs/settings.md."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import Field, ValidationError
from pydantic_settings import SettingsConfigDict

from atspeed.configuration import settings_docs
from atspeed.configuration.settings import Port, ServiceSettings
from atspeed.engine.host_names import host_port


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
        (["--host=127.0.0.1\nb"], "--host (TEST_TOY_HOST): is neither an IP address nor a host name"),
        (["--metrics-host=a\nb"], "--metrics-host (TEST_TOY_METRICS_HOST): is neither"),
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
    assert host_port(host, 1) == joined


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


@pytest.mark.parametrize("service", settings_docs.SERVICES)
def test_essential_settings_exist_and_are_the_fewer_ones(service: str) -> None:
    settings = settings_docs.load(service)
    assert settings.essential <= set(settings.model_fields)
    assert 2 * len(settings.essential) < len(settings.model_fields)


def test_help_and_page_list_essential_settings_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ToySettings.load(["--help"])
    text = capsys.readouterr().out
    order = [
        text.index(part) for part in ("essential settings:", "\n  --bundle ", "advanced settings:", "\n  --tenths ")
    ]
    assert order == sorted(order)
    page = settings_docs.page([ToySettings])
    order = [page.index(part) for part in ("## Essential", "`--bundle`", "## Advanced", "`--tenths`")]
    assert order == sorted(order)
