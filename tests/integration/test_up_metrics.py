"""`atspeed up --metrics` with a real Prometheus, and `atspeed up` whose callers need tokens, as real processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from atspeed.local.free_ports import PortTakenError, free_port
from atspeed.local.prometheus import LocalPrometheus, prometheus_binary
from atspeed_client import CallError, Client
from tests.bundles import TestBundle, write_bundle
from tests.catalogues import random_catalogue
from tests.command_line import ROOT, one_line, read_line, run, started
from tests.issuer import AUDIENCE, ISSUER, TokenIssuer
from tests.observed import scrape_port
from tests.secured import write_tokens
from tests.serving import LIVENESS_SECONDS, until


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TestBundle:
    return write_bundle(tmp_path_factory.mktemp("up") / "bundle", random_catalogue(200, (12, 10, 8), seed=2))


def served(process: subprocess.Popen[str]) -> str:
    """The address of the orchestrator, from the first line."""
    found = re.search(r"is served at (\S+)", read_line(process))
    assert found
    return found[1]


def told(process: subprocess.Popen[str]) -> list[str]:
    """The lines on standard error up to the hint."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "try: atspeed info" in line:
            break
    return lines


def first_of(count: int) -> int:
    """The first of some free ports in a row, below those that the system gives to connections."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000, count):
        with contextlib.suppress(PortTakenError):
            for place in range(count):
                free_port(port + place, "a test")
            return port
    raise AssertionError("no ports are free")


def asked(address: str, path: str, **parameters: str) -> Any:
    """Return Prometheus's answer."""
    url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=LIVENESS_SECONDS) as reply:
        return json.load(reply)["data"]


needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (Debian package prometheus)"
)


@needs_prometheus
def test_prometheus_starts_where_the_environment_names_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    binary = prometheus_binary()
    assert binary
    with LocalPrometheus(binary, {}, tmp_path / "prometheus.log") as running:
        assert running.running


@needs_prometheus
def test_prometheus_collects_from_all_services_with_the_rules_of_deploy(made: TestBundle, tmp_path: Path) -> None:
    options = ["--bundle", made.root, "--targets", 2, "--drafts", 0, "--port", 0, "--metrics", 0]
    with started(*options, "--log-folder", tmp_path) as process:
        served(process)
        found = re.search(r"Prometheus is at http://(\S+)", read_line(process))
        assert found
        until(lambda: len(asked(found[1], "query", query="up == 1")["result"]) == 3)
        jobs = [one["metric"]["job"] for one in asked(found[1], "query", query="up")["result"]]
        assert sorted(jobs) == ["orchestrator", "target", "target"]
        groups = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))["groups"]
        loaded = {rule["name"] for group in asked(found[1], "rules")["groups"] for rule in group["rules"]}
        assert loaded == {rule["alert"] for group in groups for rule in group["rules"]}
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0
    with pytest.raises(OSError, match="refused"):
        asked(found[1], "rules")


def test_without_prometheus_the_ports_follow_the_one_that_is_named(made: TestBundle, tmp_path: Path) -> None:
    port = first_of(3)
    options = ["--bundle", made.root, "--drafts", 0, "--port", 0, "--metrics", port]
    with started(*options, path=tmp_path) as process:
        served(process)
        lines = "".join(told(process))
        ports = [int(found) for found in re.findall(r"metrics http://127\.0\.0\.1:(\d+)/metrics", lines)]
        assert all("atspeed_calls_in_flight" in scrape_port(one).text for one in ports)
    assert "warning: no prometheus on the PATH" in lines
    assert ports == [port + 1, port + 2]


def test_a_port_of_the_metrics_that_is_taken_or_too_large_is_said_first(made: TestBundle) -> None:
    options = ["up", "--bundle", made.root, "--drafts", 0, "--port", 0, "--metrics"]
    assert "65536: is no port" in one_line(run(*options, 65534))
    port = first_of(3)
    with socket.create_server(("127.0.0.1", port + 2)):
        assert f"127.0.0.1:{port + 2}: cannot listen for the metrics of a service" in one_line(run(*options, port))


def test_tokens_of_a_file_and_of_an_issuer_open_the_services(made: TestBundle, tmp_path: Path) -> None:
    issuer = TokenIssuer()
    write_tokens(tmp_path / "tokens.toml", {"me": 'scopes = ["read"]\nrequests_per_second = 0.001\nburst = 2'})
    (tmp_path / "keys.json").write_text(issuer.key_set())
    jwt = ["--jwt-keys", tmp_path / "keys.json", "--jwt-issuer", ISSUER, "--jwt-audience", AUDIENCE]
    options = ["--bundle", made.root, "--drafts", 0, "--port", 0, "--tokens-file", tmp_path / "tokens.toml", *jwt]
    history = made.bundle.catalogue().id_of(0)
    with started(*options) as process:
        address = served(process)
        assert "--token TOKEN" in told(process)[-1]
        for token in (None, "hush-other"):
            with Client(address, token=token) as client, pytest.raises(CallError) as refused:
                client.info()
            assert refused.value.reason == "UNAUTHENTICATED"
        for token in ("hush-me", issuer.token()):
            with Client(address, token=token, timeout_seconds=60) as client:
                assert client.recommend(history=[history], k=1).items
        with Client(address, token="hush-me") as client:
            client.info()
            with pytest.raises(CallError) as refused:
                client.info()
        assert refused.value.reason == "QUOTA_EXCEEDED"


def test_mistakes_about_tokens_are_said_before_anything_starts(made: TestBundle, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[me]\nscopes = 1\n")
    bad = run("up", "--bundle", made.root, "--tokens-file", tmp_path / "bad.toml")
    assert bad.exit_code == 2
    assert "bad.toml: invalid: me.sha256, me.scopes" in " ".join(bad.output.split())
    half = run("up", "--bundle", made.root, "--jwt-keys", "keys.json", "--jwt-issuer", ISSUER)
    assert half.exit_code == 2
    assert "--jwt-keys, --jwt-issuer, --jwt-audience must be given together" in " ".join(half.output.split())


def test_a_port_of_prometheus_that_is_taken_is_said_before_anything_starts(made: TestBundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = one_line(run("up", "--bundle", made.root, "--metrics", port))
    assert f"127.0.0.1:{port}: cannot listen for Prometheus: Address already in use" in said
