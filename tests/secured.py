"""Services with certificates and tokens, and calls of their methods by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import grpc
from google.protobuf.descriptor import MethodDescriptor

from atspeed.local.certificates import LocalCertificates
from atspeed.local.stack import LocalStack
from atspeed.security.tls import ClientTls, WatchedPems
from atspeed.security.tokens import hash_token
from atspeed.v1 import draft_pb2, recommendation_pb2, target_pb2
from tests.serving import LIVENESS_SECONDS

CONTRACT = (recommendation_pb2.DESCRIPTOR, draft_pb2.DESCRIPTOR, target_pb2.DESCRIPTOR)


def rpcs() -> list[MethodDescriptor]:
    """Every method of every service of the contract."""
    services = [service for file in CONTRACT for service in file.services_by_name.values()]
    return [method for service in services for method in service.methods]


def path_of(method: MethodDescriptor) -> str:
    """Its name on the wire."""
    return f"/{method.containing_service.full_name}/{method.name}"


def write_tokens(path: Path, tokens: Mapping[str, str]) -> None:
    """A file of tokens `hush-NAME` by name; the value is what follows the hash in TOML."""
    entries = (f'[{name}]\nsha256 = "{hash_token(f"hush-{name}")}"\n{rest}\n' for name, rest in tokens.items())
    replaced = path.with_suffix(".new")
    replaced.write_text("\n".join(entries))
    replaced.replace(path)


def bearer(name: str | None) -> tuple[tuple[str, str | bytes], ...]:
    """The metadata of a call with the token of that name."""
    return () if name is None else (("authorization", f"Bearer hush-{name}"),)


def secured_stack(
    bundle: Path,
    certificates: LocalCertificates,
    folder: Path,
    *,
    redis_url: str = "",
    targets: int = 1,
    flags_of_orchestrator: Mapping[str, object] | None = None,
) -> LocalStack:
    """Mutual TLS everywhere, tokens everywhere: public ones in public.toml, `orchestrator` in models.toml."""
    write_tokens(folder / "models.toml", {"orchestrator": 'scopes = ["service"]', "read": 'scopes = ["read"]'})
    (folder / "model-token").write_text("hush-orchestrator\n")
    flags = {name: dict(settings) for name, settings in certificates.flags.items()}
    for name in ("draft", "target"):
        flags[name] |= {"tokens-file": folder / "models.toml"}
    flags["target"] |= {"threads": 1}
    flags["orchestrator"] |= {
        "tls-client-ca": certificates.ca,
        "tokens-file": folder / "public.toml",
        "model-token-file": folder / "model-token",
        "draft-timeout-seconds": 30,
        **(flags_of_orchestrator or {}),
    }
    return LocalStack(bundle, redis_url=redis_url, targets=targets, log_folder=folder, flags=flags)


def channel(address: str, tls: ClientTls | None) -> grpc.Channel:
    """A blocking channel."""
    if tls is None:
        return grpc.insecure_channel(address)
    credentials = WatchedPems(tls.files).current.channel_credentials()
    return grpc.secure_channel(address, credentials, options=tls.options)


def outcome(
    on: grpc.Channel, method: MethodDescriptor, message: bytes = b"", metadata: tuple[tuple[str, str | bytes], ...] = ()
) -> grpc.StatusCode:
    """How a call with one message, as bytes, ends."""
    path, options = path_of(method), {"timeout": LIVENESS_SECONDS, "metadata": metadata}
    sent: Iterator[bytes] | bytes = iter([message]) if method.client_streaming else message
    kinds = {
        (False, False): on.unary_unary,
        (False, True): on.unary_stream,
        (True, False): on.stream_unary,
        (True, True): on.stream_stream,
    }
    try:
        reply = kinds[method.client_streaming, method.server_streaming](path)(sent, **options)  # type: ignore[operator]
        if method.server_streaming:
            list(reply)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK
