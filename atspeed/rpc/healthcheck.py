"""Asks a server for its health.

    python -m atspeed.rpc.healthcheck HOST:PORT [--service NAME]

The exit code is 0 for SERVING, else 1. A server with TLS needs --ca, and one with mTLS also --certificate and --key.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2

from atspeed.security.tls import ClientTls, TlsError, TlsFiles, WatchedPems


def state(address: str, service: str = "", timeout_seconds: float = 3.0, tls: ClientTls | None = None) -> str:
    """Return the server's state, or the gRPC status of a failed call. Raises TlsError."""
    with _channel(address, tls) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = _check(channel)(request, timeout=timeout_seconds)
        except grpc.RpcError as error:
            return str(error.code().name)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def _channel(address: str, tls: ClientTls | None) -> grpc.Channel:
    options: list[tuple[str, str | int]] = [("grpc.enable_http_proxy", 0)]
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    credentials = WatchedPems(tls.files).current.channel_credentials()
    return grpc.secure_channel(address, credentials, options=options + tls.options)


def _check(
    channel: grpc.Channel,
) -> grpc.UnaryUnaryMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]:
    return channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the state. Returns 0 for SERVING."""
    parser = argparse.ArgumentParser(prog="healthcheck", description=__doc__)
    parser.add_argument("address", help="HOST:PORT of the server")
    parser.add_argument("--service", default="", help="full name of a service; the default is the whole server")
    parser.add_argument("--timeout-seconds", type=float, default=3.0)
    parser.add_argument("--ca", type=Path, help="CA of the server's certificate, PEM; plain text without it")
    parser.add_argument("--certificate", type=Path, help="client certificate for mTLS, PEM")
    parser.add_argument("--key", type=Path, help="key of the client certificate, PEM")
    parser.add_argument("--server-name", default="", help="name in the server's certificate, if not the address's")
    options = parser.parse_args(arguments)
    if options.ca is None and (options.certificate or options.key or options.server_name):
        parser.error("--certificate, --key and --server-name need --ca: without it the server is asked in plain text")
    tls = ClientTls(TlsFiles(options.certificate, options.key, options.ca), options.server_name) if options.ca else None
    try:
        found = state(options.address, options.service, options.timeout_seconds, tls)
    except TlsError as error:
        parser.error(str(error))
    sys.stdout.write(found + "\n")
    return 0 if found == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())
