"""docker-compose.yml and what is laid over it: what runs, who reaches whom, and with which rights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from atspeed.configuration.settings_docs import SERVICES, load
from atspeed.security.tokens import hash_token
from tests.composed import ROOT, SCRIPTS, SECURE_FILES, Service, compose
from tests.containers import parsed

PORTS = {"draft": 50053, "target": 50052, "orchestrator": 50051}
WEIGHTS_OF_7B = 13_500_000_000  # bytes, in float16
VARIANTS = {"cpu": {"draft", "target"}, "gpu": {"draft-gpu", "target-gpu"}}


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def profile(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def config(profile: str) -> dict[str, Any]:
    return compose(*([] if profile == "cpu" else ["--profile", profile]))


@pytest.fixture(scope="module")
def services(config: dict[str, Any]) -> dict[str, Service]:
    return {str(name): service for name, service in config["services"].items()}


@pytest.fixture(scope="module")
def ours(services: dict[str, Service]) -> dict[str, Service]:
    """The project's own services by role: `target` for both of its variants."""
    return {name.removesuffix("-gpu"): service for name, service in services.items() if name != "redis"}


# Topology


def test_one_variant_of_each_service_runs(services: dict[str, Service], profile: str) -> None:
    assert set(services) == {"redis", "orchestrator"} | VARIANTS[profile]


def test_the_variable_selects_the_profile_too() -> None:
    assert set(compose(COMPOSE_PROFILES="gpu")["services"]) == {"redis", "orchestrator"} | VARIANTS["gpu"]


def test_only_the_orchestrator_is_published_and_on_this_host_only(services: dict[str, Service]) -> None:
    published = {name: service["ports"] for name, service in services.items() if service.get("ports")}
    assert set(published) == {"orchestrator"}
    (port,) = published["orchestrator"]
    assert (port["host_ip"], port["published"], port["target"]) == ("127.0.0.1", "50051", 50051)


def test_models_and_redis_are_on_a_network_without_a_way_out(
    config: dict[str, Any], services: dict[str, Service]
) -> None:
    assert config["networks"]["inside"]["internal"] is True
    outside = {name for name, service in services.items() if set(service["networks"]) != {"inside"}}
    assert outside == {"orchestrator"}


def test_replicas_can_be_added(services: dict[str, Service]) -> None:
    """A fixed name or host port would allow one container only."""
    for name, service in services.items():
        assert "container_name" not in service
        assert name == "orchestrator" or not service.get("ports")


def test_the_orchestrator_finds_all_replicas_by_name(ours: dict[str, Service]) -> None:
    environment = ours["orchestrator"]["environment"]
    for role in ("target", "draft"):
        assert environment[f"ATSPEED_ORCHESTRATOR_{role.upper()}"] == f"dns:///{role}:{PORTS[role]}"
        assert ours[role]["networks"]["inside"]["aliases"] == [role]


def test_everyone_waits_only_for_those_who_are_there(services: dict[str, Service]) -> None:
    waits = services["orchestrator"]["depends_on"]
    required = {name for name, how in waits.items() if how["required"]}
    assert required <= set(services)
    assert set(waits) - required == VARIANTS["cpu"] | VARIANTS["gpu"]
    assert {how["condition"] for how in waits.values()} == {"service_healthy"}


def test_gpus_are_reserved_in_the_gpu_profile_alone(ours: dict[str, Service], profile: str) -> None:
    for role, service in ours.items():
        devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
        on_gpu = profile == "gpu" and role != "orchestrator"
        assert [device["capabilities"] for device in devices] == ([["gpu"]] if on_gpu else [])
        assert service["build"]["args"] == {"EXTRA": "gpu" if on_gpu else "cpu"}
        assert service["image"] == f"atspeed-serving:{'gpu' if on_gpu else 'cpu'}"
        provider = service["environment"].get(f"ATSPEED_{role.upper()}_PROVIDER", "cpu")
        assert provider == ("cuda" if on_gpu else "cpu")


def test_a_target_on_the_gpu_has_time_and_memory_for_its_weights(ours: dict[str, Service], profile: str) -> None:
    """13 GB of weights: twice in memory while they load, beside the prefix cache; minutes from a slow disk."""
    if profile == "cpu":
        return
    target = ours["target"]
    kept = int(target["environment"]["ATSPEED_TARGET_KV_MEMORY_MB"]) << 20
    assert int(target["mem_limit"]) > kept + 2 * WEIGHTS_OF_7B
    assert target["healthcheck"]["start_period"] == "15m0s"
    assert target["healthcheck"]["interval"] == ours["orchestrator"]["healthcheck"]["interval"]


def assert_starts_on(services: dict[str, Service]) -> None:
    """A service refuses to start on a variable that it does not know; OpenTelemetry reads OTEL_* by itself."""
    for settings in map(load, SERVICES):
        prefix = settings.model_config["env_prefix"]
        variables = {
            name for name in services[settings.service]["environment"] if not name.startswith(("OTEL_", "CUDA_"))
        }
        fields = {variable.removeprefix(prefix).lower() for variable in variables}
        assert fields <= set(settings.model_fields)
        required = {field for field, info in settings.model_fields.items() if info.is_required()}
        assert required <= fields


def test_every_variable_is_a_setting(ours: dict[str, Service]) -> None:
    assert_starts_on(ours)


def test_each_service_listens_where_its_health_check_and_its_peers_look(ours: dict[str, Service]) -> None:
    for role, service in ours.items():
        environment, port = service["environment"], PORTS[role]
        assert environment[f"ATSPEED_{role.upper()}_HOST"] == "0.0.0.0"  # noqa: S104
        assert environment[f"ATSPEED_{role.upper()}_PORT"] == str(port)
        assert service["healthcheck"]["test"] == ["CMD", "python", "-m", "atspeed.rpc.healthcheck", f"127.0.0.1:{port}"]


# What watches


@pytest.fixture(scope="module")
def watching() -> dict[str, Service]:
    """Return the services that the profile adds."""
    added = compose("--profile", "cpu", "--profile", "observability")["services"]
    return {name: service for name, service in added.items() if name not in compose()["services"]}


def test_what_watches_has_no_rights_that_it_does_not_need(watching: dict[str, Service]) -> None:
    assert set(watching) == {"prometheus", "grafana", "jaeger"}
    for service in watching.values():
        assert service["user"].split(":")[0] not in {"", "0", "root"}
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert {port["host_ip"] for port in service["ports"]} == {"127.0.0.1"}
        for mount in service.get("volumes", ()):
            assert mount["type"] == "volume" or (mount["read_only"] and Path(mount["source"]).is_dir())


def test_prometheus_scrapes_the_port_that_every_service_opens(ours: dict[str, Service]) -> None:
    jobs = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    (discovered,) = ({job["job_name"]: job["dns_sd_configs"][0] for job in jobs},)
    assert set(discovered) == {*ours, "events"}
    assert f"--metrics-port={discovered['events']['port']}" in events()["command"]
    for role, service in ours.items():
        prefix = f"ATSPEED_{role.upper()}"
        assert service["environment"][f"{prefix}_METRICS_HOST"] == "0.0.0.0"  # noqa: S104
        assert service["environment"][f"{prefix}_METRICS_PORT"] == str(discovered[role]["port"])
        assert discovered[role]["names"] == [role]


def test_traces_go_to_jaeger_where_they_are_asked_for(ours: dict[str, Service]) -> None:
    traced = compose("--profile", "cpu", "--profile", "observability", TRACING="true")["services"]
    for role, service in ours.items():
        assert service["environment"][f"ATSPEED_{role.upper()}_TRACING"] == "false"
        assert traced[role]["environment"][f"ATSPEED_{role.upper()}_TRACING"] == "true"
        assert traced[role]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://jaeger:4317"


# The consumer of events


def events(*files: str, **variables: str) -> Service:
    """The service that the profile adds."""
    config = compose(*files, "--profile", "cpu", "--profile", "events", **variables)["services"]
    service: Service = config["events"]
    return service


def test_events_are_consumed_by_a_command_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line parses the container's arguments and variables, as the container's entry point passes them on."""
    for service in (events(KAFKA_BROKERS="a:1,b:2"), events(*SECURE_FILES, KAFKA_BROKERS="a:1,b:2")):
        given = parsed(service["command"], service["environment"], monkeypatch)
        assert (given["brokers"], given["topic"], given["group"]) == ("a:1,b:2", "events", "atspeed")
        assert (given["address"], given["kafka_config"]) == ("dns:///orchestrator:50051", None)
        port = given["health"].rpartition(":")[2]
        assert service["healthcheck"]["test"][-1] == f"127.0.0.1:{port}"


def test_the_consumer_reaches_brokers_outside_and_sees_its_own_secrets_alone() -> None:
    plain, secure = events(), events(*SECURE_FILES, SECRETS="./mine")
    assert set(plain["networks"]) == {"inside", "outside"}
    assert "ports" not in plain
    assert not plain.get("volumes")
    assert secrets_of(secure) == ROOT / "mine" / "events"
    assert secure["environment"]["ATSPEED_TOKEN_FILE"] == "/secrets/token"
    assert (plain["read_only"], plain["cap_drop"], plain["user"]) == (True, ["ALL"], "10001:10001")


def test_what_freshness_says_makes_all_that_a_secured_consumer_reads(tmp_path: Path) -> None:
    (tmp_path / "secrets" / "orchestrator").mkdir(parents=True)
    for file in ("ca.crt", "orchestrator/tokens.toml"):
        (tmp_path / "secrets" / file).write_text("", encoding="utf-8")
    page = (ROOT / "docs" / "freshness.md").read_text(encoding="utf-8")
    commands = [line for line in page.partition("```bash\n")[2].partition("```")[0].splitlines() if "sudo" not in line]
    environment = {**os.environ, "PATH": f"{SCRIPTS}:{os.environ['PATH']}"}
    subprocess.run(
        ["bash", "-euc", "\n".join(commands)], cwd=tmp_path, env=environment, check=True, capture_output=True
    )
    given = events(*SECURE_FILES)["environment"].values()
    read = {value.removeprefix("/secrets/") for value in given if value.startswith("/secrets/")}
    assert {file.name for file in (tmp_path / "secrets" / "events").iterdir()} == read
    tokens = tomllib.loads((tmp_path / "secrets" / "orchestrator" / "tokens.toml").read_text())
    shown = (tmp_path / "secrets" / "events" / "token").read_text().strip()
    assert (tokens["events"]["sha256"], set(tokens["events"]["scopes"])) == (hash_token(shown), {"read", "write"})


# Rights


def test_containers_have_no_rights_that_they_do_not_need(services: dict[str, Service]) -> None:
    for service in services.values():
        assert service["user"].split(":")[0] not in {"", "0", "root"}
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert "cap_add" not in service
        assert "privileged" not in service
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["pids_limit"] > 0
        assert [entry.split(":")[0] for entry in service["tmpfs"]] == ["/tmp"]  # noqa: S108
        assert "healthcheck" in service


def test_the_bundle_is_mounted_read_only(ours: dict[str, Service]) -> None:
    for role, service in ours.items():
        (mount,) = service["volumes"]
        assert (mount["target"], mount["read_only"]) == ("/bundle", True)
        assert mount["source"].endswith("/bundles/movielens-100k")
        assert service["environment"][f"ATSPEED_{role.upper()}_BUNDLE"] == "/bundle"


def test_another_bundle_can_be_served() -> None:
    (mount,) = compose(BUNDLE="./bundles/other")["services"]["target"]["volumes"]
    assert mount["source"].endswith("/bundles/other")


def test_a_service_has_longer_to_stop_than_it_drains(ours: dict[str, Service]) -> None:
    for service in ours.values():
        assert service["stop_grace_period"] == "30s"  # drain_seconds is 20


# Redis


def options(service: Service) -> dict[str, str]:
    arguments = service["command"][1:]
    return dict(zip(arguments[::2], arguments[1::2], strict=True))


def test_redis_keeps_histories_and_lets_cache_entries_go(services: dict[str, Service]) -> None:
    chosen = options(services["redis"])
    assert chosen["--maxmemory-policy"] == "volatile-lru"
    assert chosen["--maxmemory"] == "1gb"
    assert chosen["--appendonly"] == "yes"
    assert [(mount["type"], mount["target"]) for mount in services["redis"]["volumes"]] == [("volume", "/data")]


@pytest.mark.parametrize(
    ("variables", "url"), [({}, "redis://redis:6379/0"), ({"REDIS_PASSWORD": "p-1"}, "redis://:p-1@redis:6379/0")]
)
def test_the_password_reaches_both_sides(variables: dict[str, str], url: str) -> None:
    services = compose(**variables)["services"]
    password = variables.get("REDIS_PASSWORD", "")
    assert options(services["redis"])["--requirepass"] == password
    assert services["redis"]["environment"]["REDISCLI_AUTH"] == password
    for role in PORTS:
        assert services[role]["environment"][f"ATSPEED_{role.upper()}_REDIS_URL"] == url


# docker-compose.secure.yml


@pytest.fixture(scope="module")
def secured(profile: str) -> dict[str, Service]:
    services = compose(*SECURE_FILES, "--profile", profile, SECRETS="./mine", REDIS_PASSWORD="p")["services"]
    return {str(name).removesuffix("-gpu"): service for name, service in services.items()}


def test_secured_services_speak_tls_and_want_tokens(secured: dict[str, Service]) -> None:
    for role in PORTS:
        given, check = secured[role]["environment"], secured[role]["healthcheck"]["test"]
        of = f"ATSPEED_{role.upper()}_"
        assert given[f"{of}INSECURE"] == "false"
        assert given[f"{of}TLS_CERTIFICATE"] == "/secrets/tls.crt"
        assert given[f"{of}REDIS_URL"] == "rediss://:p@redis:6379/0"
        assert given[f"{of}TOKENS_FILE"]
        assert (f"{of}TLS_CLIENT_CA" in given) is (role != "orchestrator")
        assert f"--server-name={role}" in check
        assert ("--key=/secrets/tls.key" in check) is (role != "orchestrator")


def secrets_of(service: Service) -> Path:
    """The folder of this host that a service finds under /secrets."""
    (mount,) = [mount for mount in service["volumes"] if mount["target"].startswith("/secrets")]
    assert (mount["target"], mount["read_only"]) == ("/secrets", True)
    return Path(mount["source"])


def test_a_secured_service_sees_its_own_secrets_alone(secured: dict[str, Service]) -> None:
    assert {name: secrets_of(service) for name, service in secured.items()} == {
        name: ROOT / "mine" / name for name in ("redis", *PORTS)
    }


@pytest.fixture(scope="session")
def secure_it() -> str:
    """The commands of "Secure it" in docs/operations.md."""
    section = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").partition("## Secure it")[2]
    return section.partition("```bash\n")[2].partition("```")[0]


@pytest.fixture(scope="session")
def made_secrets(secure_it: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that they make, but for those that need root and Docker; these are checked against who runs what."""
    folder = tmp_path_factory.mktemp("secure-it")
    ours = [line for line in secure_it.splitlines() if not line.startswith(("sudo", "docker"))]
    environment = {**os.environ, "PATH": f"{SCRIPTS}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", "\n".join(ours)], cwd=folder, env=environment, check=True, capture_output=True)
    return folder / "secrets"


def test_what_operations_says_makes_all_that_a_secured_service_reads(
    secured: dict[str, Service], secure_it: str, made_secrets: Path
) -> None:
    edge = compose(*SECURE_FILES, "--profile", "edge", SECRETS="./mine")["services"]["edge"]
    envoy = (ROOT / "deploy" / "envoy" / "envoy.secure.yaml").read_text(encoding="utf-8")
    for name, service in {**secured, "edge": edge | {"reads": envoy}}.items():
        told = json.dumps([service.get(part) for part in ("command", "environment", "healthcheck", "reads")])
        read = set(re.findall(r"/secrets/([\w.-]+)", told))
        assert {"ca.crt", "tls.crt", "tls.key"} <= read
        assert {file.name for file in (made_secrets / name).iterdir()} == read
        assert re.search(rf"^sudo chown -R {service['user']} .*secrets/{name}\b", secure_it, re.MULTILINE)


def test_what_operations_says_makes_secrets_that_others_cannot_read(made_secrets: Path) -> None:
    names = {path.parent.name: path for path in made_secrets.glob("*/tls.key")}
    assert names
    assert all(path.stat().st_mode & 0o077 == 0 for path in names.values())
    tokens = tomllib.loads((made_secrets / "target" / "model-tokens.toml").read_text())
    shown = (made_secrets / "orchestrator" / "model-token").read_text().strip()
    assert (tokens["orchestrator"]["sha256"], tokens["orchestrator"]["scopes"]) == (hash_token(shown), ["service"])


def test_secured_services_have_only_settings_that_there_are(secured: dict[str, Service]) -> None:
    assert_starts_on(secured)


def test_a_secured_redis_has_no_other_port(secured: dict[str, Service], services: dict[str, Service]) -> None:
    chosen, usual = options(secured["redis"]), options(services["redis"])
    assert (chosen.pop("--port"), chosen.pop("--tls-port")) == ("0", "6379")
    assert {name for name in chosen if name.startswith("--tls")} == {
        "--tls-ca-cert-file",
        "--tls-cert-file",
        "--tls-key-file",
    }
    assert {name: value for name, value in chosen.items() if "tls" not in name} == usual | {"--requirepass": "p"}


# docker-compose.canary.yml


def test_with_a_canary_all_follow_two_links_in_one_folder(profile: str) -> None:
    files = ("-f", "docker-compose.yml", "-f", "deploy/docker-compose.canary.yml")
    services = compose(*files, "--profile", profile, BUNDLE="./mine", CANARY_SHARE="0.05")["services"]
    named = {str(name).removesuffix("-gpu"): service for name, service in services.items()}
    assert_starts_on(named)
    for role in PORTS:
        given, of = named[role]["environment"], f"ATSPEED_{role.upper()}_"
        assert (given[f"{of}BUNDLE"], given[f"{of}CANARY_BUNDLE"]) == ("/bundle/stable", "/bundle/canary")
        (mount,) = [mount for mount in named[role]["volumes"] if mount["target"].startswith("/bundle")]
        assert (mount["source"], mount["target"], mount["read_only"]) == (str(ROOT / "mine"), "/bundle", True)
    assert named["orchestrator"]["environment"]["ATSPEED_ORCHESTRATOR_CANARY_SHARE"] == "0.05"


# docker-compose.mps.yml


def test_draft_and_target_are_clients_of_one_daemon_on_one_gpu() -> None:
    files = ("-f", "docker-compose.yml", "-f", "deploy/docker-compose.mps.yml")
    config = compose(*files, "--profile", "gpu", GPU="2", DRAFT_SHARE="20")
    services = config["services"]
    assert_starts_on({str(name).removesuffix("-gpu"): service for name, service in services.items()})
    daemon = services["mps"]
    for name in ("draft-gpu", "target-gpu"):
        client = services[name]
        assert client["ipc"] == "service:mps"
        assert client["user"] == daemon["user"]
        assert "mps" in client["depends_on"]
        for part in (daemon, client):
            (device,) = part["deploy"]["resources"]["reservations"]["devices"]
            assert device["device_ids"] == ["2"]
            pipes = [mount["target"] for mount in part["volumes"] if mount.get("source") == "mps"]
            assert pipes == [part["environment"]["CUDA_MPS_PIPE_DIRECTORY"]]
    limits = services["draft-gpu"]["environment"]
    assert limits["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "20"
    assert limits["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=8192M"
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in services["target-gpu"]["environment"]
