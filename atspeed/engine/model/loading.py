"""Loads the models of a bundle, and checks them against its manifest."""

from __future__ import annotations

from atspeed.engine.bundle.manifest import MANIFEST, Bundle, Role
from atspeed.engine.errors import BundleError
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.engine.model.encoder_decoder import EncoderDecoder


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


def check_decoder(bundle: Bundle, role: Role, decoder: Decoder) -> None:
    """Raise BundleError, naming the field, when the graph contradicts the manifest."""
    entry = bundle.model(role)
    columns = len(entry.code_tokens)
    for field, said, found in (
        ("layers", entry.layers, decoder.layers),
        ("kv_heads", entry.kv_heads, decoder.kv_heads),
        ("head_dim", entry.head_dim, decoder.head_dim),
        ("precision", entry.kv_dtype, decoder.dtype.name),
        ("code_tokens", f"{columns} code columns", f"{decoder.columns} code columns"),
        ("ordered_sums", entry.ordered_sums, decoder.ordered),
    ):
        if said != found:
            raise BundleError(f"{bundle.root}/{MANIFEST}: {role}.{field}: {said}, but {entry.path} has {found}")
