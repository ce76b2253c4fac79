"""deploy/kubernetes with TLS and tokens: its pods start and are probed, with what Secrets and cert-manager give them."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from atspeed.configuration.settings import ServiceSettings
from atspeed.local.certificates import LocalCertificates
from atspeed.rpc.server import Registration, running
from atspeed.security.tls import TlsFiles
from atspeed.security.tokens import hash_token
from tests.kubernetes_manifests import (
    FOLDER,
    PORTS,
    ROOT,
    SERVICE_NAMES,
    Manifest,
    built,
    containers,
    of_kind,
    pods,
    settings_of,
)


@pytest.fixture(scope="module")
def secure() -> list[Manifest]:
    return built(FOLDER / "overlays" / "cpu-secure")


@pytest.fixture(scope="module")
def plain() -> list[Manifest]:
    return built(FOLDER / "overlays" / "cpu")


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Content of the Secrets: a folder for each by its name and a file for each of its keys."""
    root = tmp_path_factory.mktemp("secrets")
    made = LocalCertificates(root / "made")
    for name in PORTS:
        shutil.copytree(made.folder / name, root / f"{name}-tls")
    for name, keys in {
        "atspeed-redis": {"ca.crt": made.ca.read_text(), "url": "rediss://redis:6379/0"},
        "orchestrator-tokens": {"tokens.toml": entry("shop", "read"), "model-token": "orchestrator's"},
        "model-tokens": {"model-tokens.toml": entry("orchestrator", "service")},
    }.items():
        (root / name).mkdir()
        for key, value in keys.items():
            (root / name / key).write_text(value)
    return root


def entry(name: str, scope: str) -> str:
    return f'[{name}]\nsha256 = "{hash_token(name)}"\nscopes = ["{scope}"]\n'


def mounted(manifests: list[Manifest], service: str, secrets: Path, folder: Path) -> Path:
    """Folder that has the content of the pod's folder under /secrets."""
    pod = pods(manifests)[service]
    (volume,) = (found["projected"] for found in pod["volumes"] if found["name"] == "secrets")
    (mount,) = (found for found in pod["containers"][0]["volumeMounts"] if found["name"] == "secrets")
    assert mount == {"name": "secrets", "mountPath": "/secrets", "readOnly": True}, "a subPath would never be renewed"
    for source in (found["secret"] for found in volume["sources"]):
        own = {path.name: path.name for path in (secrets / source["name"]).iterdir()}
        for key, path in {item["key"]: item["path"] for item in source.get("items", ())}.items() or own.items():
            shutil.copy(secrets / source["name"] / key, folder / path)
    return folder


def secured(manifests: list[Manifest], service: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ServiceSettings:
    """The settings that the pod's process gets, with `folder` in place of /secrets."""
    data = of_kind(manifests, "ConfigMap")[f"atspeed-{service}"]["data"]
    (url,) = containers(manifests)[service]["env"]
    assert url["valueFrom"]["secretKeyRef"] == {"name": "atspeed-redis", "key": "url", "optional": False}
    bundle = folder / "bundle"
    bundle.mkdir()
    for name, value in {**data, url["name"]: "rediss://redis:6379/0"}.items():
        monkeypatch.setenv(name, value.replace("/secrets/", f"{folder}/").replace("/bundle", str(bundle)))
    return settings_of(service).load([])


@pytest.mark.parametrize("service", PORTS)
async def test_secured_pods_start_and_their_probes_get_in(
    secure: list[Manifest], service: str, secrets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with the settings, certificates and tokens of the pod is asked by the pod's own commands."""
    folder = mounted(secure, service, secrets, tmp_path)
    settings = secured(secure, service, folder, monkeypatch)
    assert settings.server_tls == TlsFiles(
        folder / "tls.crt", folder / "tls.key", None if service == "orchestrator" else folder / "ca.crt"
    )
    assert settings.redis_tls.ca == folder / "redis-ca.crt"
    assert settings.tokens_file
    assert not settings.insecure
    local = settings.model_copy(update={"host": "127.0.0.1", "port": 0, "metrics_port": None})
    async with running(local, [Registration(SERVICE_NAMES[service], lambda server: None)]) as server:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = containers(secure)[service][probe]
            assert set(asked).isdisjoint({"grpc", "httpGet", "tcpSocket"})
            python, *command = (part.replace("/secrets/", f"{folder}/") for part in asked["exec"]["command"])
            assert python == "python"
            assert f"127.0.0.1:{PORTS[service]}" in command
            assert (f"--service={SERVICE_NAMES[service]}" in command) is (probe == "readinessProbe")
            here = [part.replace(f"127.0.0.1:{PORTS[service]}", server.address) for part in command]
            done = await asyncio.to_thread(
                subprocess.run, [sys.executable, *here], cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert (done.returncode, done.stdout) == (0, "SERVING\n"), done.stderr


def test_secured_pods_are_set_up_as_secured_containers_are(secure: list[Manifest], plain: list[Manifest]) -> None:
    """The settings are those of docker-compose.secure.yml, but for a Secret with Redis's URL and a CA of its own."""
    composed = yaml.safe_load((ROOT / "deploy" / "docker-compose.secure.yml").read_text())["services"]
    for name in PORTS:
        expected = {key: value for key, value in composed[name]["environment"].items() if "REDIS_URL" not in key}
        expected[f"ATSPEED_{name.upper()}_REDIS_CA"] = "/secrets/redis-ca.crt"
        data, before = (of_kind(found, "ConfigMap")[f"atspeed-{name}"]["data"] for found in (secure, plain))
        assert {key: value for key, value in data.items() if before.get(key) != value} == expected


def test_nothing_says_that_secured_ports_are_plain(secure: list[Manifest]) -> None:
    for service in of_kind(secure, "Service").values():
        assert "appProtocol" not in service["spec"]["ports"][0]


def test_cert_manager_issues_what_is_mounted_under_the_names_that_callers_ask_for(secure: list[Manifest]) -> None:
    """cert-manager's own schemas are not checked."""
    found = built(FOLDER / "cert-manager")
    (issuer,) = of_kind(found, "Issuer")
    issued = {name: certificate["spec"] for name, certificate in of_kind(found, "Certificate").items()}
    assert set(issued) == {*PORTS, "edge"}
    envoys = issued.pop("edge")  # tests/deploy/test_kubernetes_http.py has its volume
    assert (envoys["secretName"], set(envoys["usages"])) == ("edge-tls", {"server auth", "client auth"})
    assert "edge" in envoys["dnsNames"]
    for name, certificate in issued.items():
        assert certificate["issuerRef"] == {"name": issuer, "kind": "Issuer"}
        assert name in certificate["dnsNames"]
        assert set(certificate["usages"]) == {"server auth", "client auth"}
        (volume,) = (one["projected"] for one in pods(secure)[name]["volumes"] if one["name"] == "secrets")
        assert {"secret": {"name": certificate["secretName"]}} in volume["sources"]
