"""Loads the models of a bundle, and checks them against its manifest."""

from __future__ import annotations

from pathlib import PurePosixPath

from atspeed.engine.bundle.manifest import MANIFEST, Bundle, Role
from atspeed.engine.errors import BundleError
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.engine.model.device_decoder import DeviceDecoder, KvShape
from atspeed.engine.model.device_graph import DEVICE_FILE
from atspeed.engine.model.encoder_decoder import EncoderDecoder
from atspeed.engine.search.scoring import ScoringRule


def load_decoder(bundle: Bundle, role: Role, options: RuntimeOptions, *, verified: bool = False) -> Decoder:
    """Load a bundle's decoder, with its encoder if it has one. verified: compare the loaded bytes with the manifest's hashes.

    Raises BundleError, naming the field, when a file cannot be loaded, when the graph contradicts the manifest, or when the
    provider cannot multiply 8-bit integers: onnxruntime would run those nodes on the CPU.
    """
    entry, path = bundle.model(role), bundle.model_path(role)
    if entry.precision == "int8" and options.provider != "cpu":
        raise BundleError(
            f"{bundle.root}/{MANIFEST}: {role}.precision: int8 is for provider cpu, this is {options.provider}"
        )
    files = bundle.model_files(entry.path, verified=verified)
    if entry.encoder is None:
        decoder = Decoder(path, options, files)
    else:
        decoder = EncoderDecoder(path, options, files, bundle.model_files(entry.encoder.path, verified=verified))
    check_decoder(bundle, role, decoder)
    return decoder


def load_device_decoder(
    bundle: Bundle,
    role: Role,
    options: RuntimeOptions,
    *,
    page_tokens: int,
    pool_bytes: int | None = None,
    verified: bool = False,
) -> DeviceDecoder:
    """Load a bundle's device graph, with pools of its keys and values on the options' provider.

    Raises BundleError, naming the field or the setting, when the bundle has none, when it contradicts the manifest or the scoring
    rule, or when the device has no room.

    Args:
        page_tokens: tokens of a page: those of a block of the prefix cache.
        pool_bytes: bytes of the pools; None for a share of what is free beside the weights.
        verified: compare the loaded bytes with the manifest's hashes.
    """
    entry, where = bundle.model(role), f"{bundle.root}/{MANIFEST}: {role}"
    if entry.encoder is not None:
        raise BundleError(f"{where}.encoder: a model with an encoder has no device graph; kv_paged never runs it")
    if entry.precision == "int8":
        raise BundleError(f"{where}.precision: int8 has no device graph; kv_paged never runs it on provider cpu")
    graph = str(PurePosixPath(entry.path).with_name(DEVICE_FILE))
    if not (bundle.root / graph).is_file():
        raise BundleError(f"{bundle.root}/{graph}: missing; export the model again, or set kv_paged to never")
    files = bundle.model_files(graph, verified=verified)
    shape = KvShape(entry.layers, entry.kv_heads, entry.head_dim)
    decoder = DeviceDecoder(
        bundle.root / graph, options, shape, page_tokens=page_tokens, pool_bytes=pool_bytes, files=files
    )
    check_decoder(bundle, role, decoder)
    return decoder


def check_decoder(bundle: Bundle, role: Role, decoder: Decoder | DeviceDecoder) -> None:
    """Raise BundleError, naming the field, when the graph contradicts the manifest."""
    entry = bundle.model(role)
    kv_dtype, found_dtype = entry.kv_dtype, decoder.dtype.name
    if isinstance(decoder, DeviceDecoder):
        kv_dtype, found_dtype = entry.device_kv_dtype, decoder.kv_dtype
        if decoder.head == "codes" and bundle.manifest.scoring_rule is ScoringRule.VOCAB:
            raise BundleError(f"{bundle.root}/{MANIFEST}: scoring_rule: vocab, but {decoder.path.name} has code rows alone")
    columns = len(entry.code_tokens)
    for field, said, found in (
        ("layers", entry.layers, decoder.layers),
        ("kv_heads", entry.kv_heads, decoder.kv_heads),
        ("head_dim", entry.head_dim, decoder.head_dim),
        ("precision", kv_dtype, found_dtype),
        ("code_tokens", f"{columns} code columns", f"{decoder.columns} code columns"),
    ):
        if said != found:
            raise BundleError(f"{bundle.root}/{MANIFEST}: {role}.{field}: {said}, but {entry.path} has {found}")
