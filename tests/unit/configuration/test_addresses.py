"""Settings that hold an address or a URL: what would fail, or be ignored, at the first call is refused at start."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from atspeed.engine.kv.redis_client import connect
from atspeed.engine.kv.redis_url import check_redis_url
from atspeed.errors import StartupError
from atspeed.observability.otlp_variables import check_otlp_variables
from atspeed.rpc.addresses import target_uri
from atspeed.security.tls import TlsError
from orchestrator.settings import OrchestratorSettings
from target_service.settings import TargetSettings

BAD_URLS = {
    "redis://:Secret#1@127.0.0.1:6379/0": "%23",
    "redis://:Secret/1@127.0.0.1:6379/0": "%2F",
    "redis://:Secret?1@127.0.0.1:6379/0": "%3F",
    "redis://:Secret[1@127.0.0.1:6379/0": "[ and ]",
    "redis://:Secret 1@127.0.0.1:6379/0": "spaces",
    "redis://:Secret%ff@127.0.0.1:6379/0": "UTF-8",
    "Redis://:Secret@127.0.0.1:6379/0": "redis://",
    "http://:Secret@127.0.0.1:6379/0": "redis://",
    "127.0.0.1:6379": "redis://",
    "redis://": "host",
    "redis://:Secret@/0": "host",
    "redis://:Secret@:6379/0": "host",
    "redis://:Secret@a..b:6379": "host",
    "redis://:Secret@a,b:6379": "host",
    "redis://:Secret@999.0.0.1:6379": "host",
    "redis://:Secret@[::1:6379": "[ and ]",
    "redis://:Secret@::1:6379": "host",
    "redis://:Secret@cache:0": "port",
    "redis://:Secret@cache:": "port",
    "redis://:Secret@cache:70000": "port",
    "redis://:Secret@cache:-1": "port",
    "redis://:Secret@cache:port": "port",
    "redis://:Secret@cache/zero": "database",
    "redis://:Secret@cache/-1": "database",
    "redis://:Secret@cache/1/2": "database",
    "redis://:Secret@cache/99999999999": "database",
    "redis://:Secret@cache?db=": "database",
    "redis://:Secret@cache?db=x": "database",
    "redis://:Secret@cache/1?db=2": "twice",
    "redis://:Secret@cache?db=1&db=2": "each once",
    "redis://:Secret@cache?Secret=1": "no other",
    "redis://:Secret@cache?Secret": "no other",
    "redis://:Secret@cache?retry_on_timeout=true": "no other",
    "redis://:Secret@cache?decode_responses=true": "no other",
    "redis://:Secret@cache?max_connections=1": "no other",
    "redis://:Secret@cache?socket_timeout=Secret": "no other",
    "rediss://:Secret@cache?ssl_cert_reqs=none": "no other",
    "redis://:Secret@cache?protocol=4": "protocol",
    "redis://:Secret@cache?protocol=": "protocol",
    "unix://": "absolute path",
    "unix://Secret/redis.sock": "absolute path",
    "unix:///" + "Secret" * 20: "107 bytes",
    "unix:///redis.sock?db=x": "database",
    "unix:///redis.sock?path=Secret": "no other",
}
GOOD_URLS = [
    "redis://cache",
    "redis://cache/",
    "redis://cache:6379/15",
    "redis://:a%23b%2Fc%3Fd%40e@cache:6379/0",
    "redis://user:p@ss@cache:6379/0",
    "redis://user@cache",
    "rediss://cache.example.com:6380/0",
    "redis://[::1]:6379/0",
    "redis://redis_1.internal-net:6379",
    "redis://cache?db=3&protocol=2",
    "unix:///run/redis.sock",
    "unix://user:password@/run/redis.sock?db=2",
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_url_that_names_no_redis_is_refused_in_one_line_without_its_secret(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for service in (TargetSettings, OrchestratorSettings):
        with pytest.raises(SystemExit) as caught:
            service.load(
                [f"--bundle={tmp_path}", f"--redis-url={url}", *(["--target=t:1"] * (service.service[0] == "o"))]
            )
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{service.service}: --redis-url (ATSPEED_{service.service.upper()}_REDIS_URL): ")
        assert BAD_URLS[url] in line
        assert "Secret" not in line


@pytest.mark.parametrize(
    "url", ["redis://:Secret\n@cache", "redis://cache/0\n", "redis://:Sec\tret@cache", "redis://ca\x00che"]
)
def test_a_url_from_a_file_with_more_than_the_url_in_it_is_refused(url: str, tmp_path: Path) -> None:
    """A parser of URLs drops such characters without a word."""
    with pytest.raises(ValidationError, match="line ends or control characters"):
        TargetSettings(bundle=tmp_path, redis_url=SecretStr(url))


@pytest.mark.parametrize("url", GOOD_URLS)
def test_valid_redis_url_is_kept(url: str, tmp_path: Path) -> None:
    assert check_redis_url(url) == url
    assert TargetSettings.load([f"--bundle={tmp_path}", f"--redis-url={url}"]).redis_url.get_secret_value() == url
    connect(url, timeout_seconds=1.0)


@pytest.mark.parametrize(
    "address",
    [
        "dns:",
        "dns:///",
        "dns:///target",
        "dns:///target:",
        "dns:///target:99999",
        "dns:///two words:1",
        "dns://8.8.8.8/target:1",
        "dns://target:1",
        "ipv4:",
        "ipv4:127.0.0.1",
        "ipv4:target:1",
        "ipv4:127.0.0.1:1,",
        "ipv4:[::1]:1",
        "ipv6:::1",
        "ipv6:127.0.0.1:1",
        "unix:",
        "unix://folder/socket",
        "unix:/" + "x" * 107,
        "two words:1",
        "http://target:1",
        "::1:50052",
        "[target]:1",
        "a..b:1",
        "127.1:5",
    ],
)
def test_invalid_grpc_address_is_refused_at_start(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"PORT|socket"):
        target_uri(address)
    with pytest.raises(SystemExit) as caught:
        OrchestratorSettings.load([f"--bundle={tmp_path}", "--target=t:1", f"--draft={address}"])
    assert caught.value.code == 2
    assert "--draft (ATSPEED_ORCHESTRATOR_DRAFT): " in capsys.readouterr().err


@pytest.mark.parametrize(
    "address",
    [
        "dns:target:1",
        "dns:///[::1]:1",
        "dns://8.8.8.8:53/target:1",
        "ipv4:127.0.0.1:1,127.0.0.2:1",
        "ipv6:[::1]:1",
        "unix:a",
    ],
)
def test_valid_grpc_address_is_kept(address: str) -> None:
    assert target_uri(address) == address


@pytest.mark.parametrize("name", ["two words", "a..b", "target:1", "http://target"])
def test_a_name_that_no_certificate_has_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ca = tmp_path / "ca.pem"
    ca.touch()
    with pytest.raises(SystemExit) as caught:
        OrchestratorSettings.load([f"--bundle={tmp_path}", "--target=t:1", f"--model-ca={ca}", f"--target-name={name}"])
    assert caught.value.code == 2
    assert "--target-name (ATSPEED_ORCHESTRATOR_TARGET_NAME): " in capsys.readouterr().err


def test_a_ca_of_redis_that_is_none_is_named_before_redis_is_asked(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("no certificate")
    settings = TargetSettings(bundle=tmp_path, redis_url=SecretStr("rediss://cache"), redis_ca=ca)
    with pytest.raises(TlsError, match=r"--redis-ca \(ATSPEED_TARGET_REDIS_CA\).*ca\.pem"):
        _ = settings.redis_tls


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", ""),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:port"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://two words:4317"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://user:Secret@collector:4317"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "htp://collector:4317"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "collector"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "-1"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zip"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere/ca.pem"),
    ],
)
def test_invalid_exporter_variable_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StartupError, match=f"^{name}: must be") as refusal:
        check_otlp_variables()
    assert "Secret" not in str(refusal.value)


@pytest.mark.parametrize(
    "endpoint", ["http://jaeger:4317", "https://otel.example.com", "collector:4317", "http://[::1]:4317/v1/traces"]
)
def test_valid_exporter_endpoint_is_accepted(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    check_otlp_variables()
