"""Addresses of channels, and gRPC's configuration of clients and servers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atspeed.configuration.settings import ServiceSettings
from atspeed.rpc.addresses import target_uri
from atspeed.rpc.channels import KEY_HEADER, channel_options, service_config
from atspeed.rpc.server import server_options


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
    server = dict(server_options(ServiceSettings(bundle=tmp_path)))
    client = dict(channel_options("a.B", [], 70_000))
    assert server["grpc.http2.min_ping_interval_without_data_ms"] <= int(client["grpc.keepalive_time_ms"])
