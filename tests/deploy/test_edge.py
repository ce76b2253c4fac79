"""The Envoy before the orchestrators, as it is configured and composed; tests/integration/test_envoy.py runs it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from atspeed.v1 import recommendation_pb2 as pb
from tests.composed import ROOT, SECURE_FILES, Service, compose

ENVOYS = ("envoy.yaml", "envoy.secure.yaml")


@pytest.mark.parametrize("profile", ["http", "edge"])
def test_envoy_stands_before_the_orchestrators_where_it_is_asked_for(profile: str) -> None:
    config = compose("--profile", "cpu", "--profile", profile, PORT="50051-50053")
    edge, orchestrator = config["services"]["edge"], config["services"]["orchestrator"]
    assert (edge["ports"][0]["host_ip"], edge["ports"][0]["published"], edge["ports"][0]["target"]) == (
        "127.0.0.1",
        "50050",
        50050,
    )
    assert set(edge["networks"]) == set(orchestrator["networks"])
    assert (edge["read_only"], edge["cap_drop"], edge["user"]) == (True, ["ALL"], "101:101")
    assert orchestrator["ports"][0]["published"] == "50051-50053"  # one for each replica
    (mount,) = edge["volumes"]
    assert (Path(mount["source"]), mount["read_only"]) == (ROOT / "deploy" / "envoy", True)
    assert_reads_what_is_there(edge)
    assert edge["depends_on"]["orchestrator"]["condition"] == "service_healthy"


@pytest.mark.parametrize(("files", "suffix"), [((), ""), (SECURE_FILES, ".secure")])
def test_the_console_is_an_edge_for_people_on_this_host(files: tuple[str, ...], suffix: str) -> None:
    """Its Envoy is the edge's, with routes for the page's files, all of which it mounts."""
    assert "console" not in compose("--profile", "cpu", "--profile", "http")["services"]
    config = compose(*files, "--profile", "cpu", "--profile", "console")
    assert "edge" not in config["services"]
    console = config["services"]["console"]
    assert [(port["host_ip"], port["published"]) for port in console["ports"]] == [("127.0.0.1", "50080")]
    assert (console["read_only"], console["cap_drop"], console["user"]) == (True, ["ALL"], "101:101")
    assert console["command"][-1] == f"/etc/envoy/envoy.console{suffix}.yaml"
    (page,) = [Path(mount["source"]) for mount in console["volumes"] if mount["target"] == "/etc/console"]
    with_page, without = (routes_of(f"envoy{variant}{suffix}.yaml") for variant in (".console", ""))
    own = [route for route in with_page if route not in without]
    assert without == [route for route in with_page if route not in own]
    assert {route["match"]["path"].removeprefix("/console").removeprefix("/") for route in own} == {
        "",
        *(file.name for file in page.iterdir() if file.suffix in {".css", ".js"}),
    }
    for route in own[1:]:
        assert (page / Path(route["direct_response"]["body"]["filename"]).name).is_file()


def routes_of(name: str) -> list[dict[str, Any]]:
    """The routes of a configuration, in their order."""
    (listener,) = yaml.safe_load((ROOT / "deploy" / "envoy" / name).read_text())["static_resources"]["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    routes: list[dict[str, Any]] = manager["route_config"]["virtual_hosts"][0]["routes"]
    return routes


def hosts_of(edge: Service) -> list[list[str]]:
    """The domains of each virtual host that a service's configuration has."""
    text = (ROOT / "deploy" / "envoy" / edge["command"][-1].removeprefix("/etc/envoy/")).read_text()
    (listener,) = yaml.safe_load(text)["static_resources"]["listeners"]
    config = listener["filter_chains"][0]["filters"][0]["typed_config"]["route_config"]
    assert config["ignore_port_in_host_matching"] is True
    return [host["domains"] for host in config["virtual_hosts"]]


@pytest.mark.parametrize("service", ["edge", "console"])
def test_without_tokens_only_names_of_this_host_are_answered(service: str) -> None:
    """A page could point any other name at this host, and would then be of the same origin."""
    named, others = hosts_of(
        compose("--profile", "cpu", "--profile", "http", "--profile", "console")["services"][service]
    )
    assert set(named) == {"localhost", "127.0.0.1", "[::1]", "edge", "console"}
    assert others == ["*"]
    secure = compose(*SECURE_FILES, "--profile", "cpu", "--profile", "http", "--profile", "console")["services"]
    assert hosts_of(secure[service]) == [["*"]]


def test_any_name_is_answered_where_that_is_said() -> None:
    assert hosts_of(compose("--profile", "cpu", "--profile", "http", EDGE_CONFIG="envoy.yaml")["services"]["edge"]) == [
        ["*"]
    ]


def assert_reads_what_is_there(edge: Service) -> None:
    """Its configuration, and the files that this one names, are in the folder that it mounts."""
    name = edge["command"][-1].removeprefix("/etc/envoy/")
    text = (ROOT / "deploy" / "envoy" / name).read_text()
    read = {name, *re.findall(r"/etc/envoy/([\w.]+)", text)}
    assert read == {name, "contract.pb", "openapi.json"}
    assert read <= {file.name for file in (ROOT / "deploy" / "envoy").iterdir()}


def test_the_edge_takes_no_replica_away_for_its_answers() -> None:
    """To Envoy, UNIMPLEMENTED and DEADLINE_EXCEEDED are server errors, and a client brings these about alone."""
    (cluster,) = yaml.safe_load((ROOT / "deploy" / "envoy" / ENVOYS[0]).read_text())["static_resources"]["clusters"]
    detection = cluster["outlier_detection"]
    assert detection["split_external_local_origin_errors"] is True
    assert detection["enforcing_consecutive_5xx"] == detection["enforcing_success_rate"] == 0
    assert detection["enforcing_consecutive_gateway_failure"] == 0
    assert detection["enforcing_failure_percentage"] == 0
    assert detection["consecutive_local_origin_failure"] > 0
    assert detection["enforcing_failure_percentage_local_origin"] == 100


def without_tls(part: Any) -> Any:
    """A part of Envoy's configuration with its transport sockets taken out."""
    if isinstance(part, dict):
        return {name: without_tls(value) for name, value in part.items() if name != "transport_socket"}
    return [without_tls(value) for value in part] if isinstance(part, list) else part


def test_a_secured_edge_is_the_same_with_tls_on_both_sides() -> None:
    plain, secure = (yaml.safe_load((ROOT / "deploy" / "envoy" / name).read_text()) for name in ENVOYS)
    assert without_tls(secure) == plain
    (chain,), (cluster,) = (
        secure["static_resources"]["listeners"][0]["filter_chains"],
        secure["static_resources"]["clusters"],
    )
    assert chain["transport_socket"]["typed_config"]["@type"].endswith(".DownstreamTlsContext")
    upstream = cluster["transport_socket"]["typed_config"]["common_tls_context"]["validation_context"]
    assert upstream["trusted_ca"] == {"filename": "/secrets/ca.crt"}
    edge = compose(*SECURE_FILES, "--profile", "edge")["services"]["edge"]
    assert {mount["target"] for mount in edge["volumes"]} == {"/etc/envoy", "/secrets"}
    assert edge["command"][-1] == f"/etc/envoy/{ENVOYS[1]}"
    assert_reads_what_is_there(edge)


@pytest.mark.parametrize("name", [*ENVOYS, "envoy.local.yaml", "envoy.console.yaml", "envoy.console.secure.yaml"])
def test_events_are_repeated_only_where_no_replica_has_seen_them(name: str) -> None:
    """Every method that adds events has a route before that of the methods that may be repeated."""
    methods = [one.name for one in pb.DESCRIPTOR.services_by_name["RecommendationService"].methods]
    adding = {method for method in methods if method.startswith("RecordEvents")}
    assert adding == {"RecordEvents", "RecordEventsBatch"}
    for method in methods:
        retries = set(
            first_route(name, f"/atspeed.v1.RecommendationService/{method}")["retry_policy"]["retry_on"].split(",")
        )
        seen = retries - {"connect-failure", "refused-stream"}
        assert seen == (set() if method in adding else {"reset", "unavailable", "cancelled"})


def first_route(name: str, path: str) -> dict[str, Any]:
    """The action of the first route that a path takes."""
    for route in routes_of(name):
        match = route["match"]
        if "headers" in match:  # a mistake in a header
            continue
        if match.get("path") == path or path.startswith(match.get("prefix", "\0")):
            found: dict[str, Any] = route["route"]
            return found
    raise AssertionError(path)
