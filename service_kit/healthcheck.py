"""Ask a server's health: `python -m service_kit.healthcheck HOST:PORT [--service NAME]`. Exits 0 if SERVING, else 1."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2


def state(address: str, service: str = "", timeout_seconds: float = 3.0) -> str:
    """The state that the server gives, or the gRPC status that stands for no answer."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = _check(channel)(request, timeout=timeout_seconds)
        except grpc.RpcError as error:
            return str(error.code().name)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def _check(
    channel: grpc.Channel,
) -> grpc.UnaryUnaryMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]:
    return channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the state; 0 when it is SERVING."""
    parser = argparse.ArgumentParser(prog="healthcheck", description=__doc__)
    parser.add_argument("address", help="HOST:PORT of the server")
    parser.add_argument("--service", default="", help="full name of a service on it; empty asks for the whole server")
    parser.add_argument("--timeout-seconds", type=float, default=3.0)
    options = parser.parse_args(arguments)
    found = state(options.address, options.service, options.timeout_seconds)
    sys.stdout.write(found + "\n")
    return 0 if found == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())
