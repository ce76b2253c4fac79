"""Loads the models of a bundle, and checks them against its manifest."""

from __future__ import annotations

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import MANIFEST, DeviceGraphEntry, Role
from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.errors import BundleError
from atspeed.engine.model.decoder import Decoder, RuntimeOptions, check_contract, graph_specs, open_session
from atspeed.engine.model.device_decoder import DeviceDecoder, KvShape, ModelDecoder
from atspeed.engine.model.device_graph import device_inputs, device_outputs
from atspeed.engine.model.encoder_decoder import EncoderDecoder
from atspeed.engine.model.level_heads import LevelHeadsDecoder
from atspeed.engine.search.scoring import ScoringRule


def load_decoder(bundle: Bundle, role: Role, options: RuntimeOptions, *, verified: bool = False) -> Decoder:
    """Load a bundle's decoder, with its encoder if it has one. verified: compare the loaded bytes with the manifest's hashes.

    Raises BundleError, naming the field, when a file cannot be loaded, when the graph contradicts the manifest, or when the
    provider cannot multiply 8-bit integers: onnxruntime would run those nodes on the CPU.
    """
    entry, path = bundle.model(role), bundle.model_path(role)
    _check_int8(bundle, role, options)
    files = bundle.model_files(entry.path, verified=verified)
    if entry.heads:
        heads = [bundle.model_files(name, verified=verified) for name in entry.heads]
        decoder: Decoder = LevelHeadsDecoder(path, options, files, heads)
    elif entry.encoder is None:
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
    entry = bundle.model(role)
    _check_int8(bundle, role, options)
    if entry.precision == "bfloat16" and options.provider == "cpu":
        raise BundleError(
            f"{bundle.root}/{MANIFEST}: {role}.precision: bfloat16 in pages is for a GPU; set kv_paged to never"
        )
    files = device_graph_files(bundle, role, verified=verified)
    shape = KvShape(entry.layers, entry.kv_heads, entry.head_dim)
    decoder = DeviceDecoder(files, options, shape, page_tokens=page_tokens, pool_bytes=pool_bytes)
    check_decoder(bundle, role, decoder)
    return decoder


def _check_int8(bundle: Bundle, role: Role, options: RuntimeOptions) -> None:
    if bundle.model(role).precision == "int8" and options.provider != "cpu":
        raise BundleError(
            f"{bundle.root}/{MANIFEST}: {role}.precision: int8 is for provider cpu, this is {options.provider}"
        )


def check_decoder(bundle: Bundle, role: Role, decoder: ModelDecoder) -> None:
    """Raise BundleError, naming the field, when the graph contradicts the manifest."""
    entry = bundle.model(role)
    on_device = isinstance(decoder, DeviceDecoder)
    columns = len(entry.code_tokens)
    for field, said, found in (
        ("layers", entry.layers, decoder.layers),
        ("kv_heads", entry.kv_heads, decoder.kv_heads),
        ("head_dim", entry.head_dim, decoder.head_dim),
        ("precision", entry.device_kv_dtype if on_device else entry.kv_dtype, decoder.kv_dtype),
        ("code_tokens", f"{columns} code columns", f"{decoder.columns} code columns"),
        (
            "ordered_sums",
            entry.ordered_sums,
            entry.ordered_sums if isinstance(decoder, DeviceDecoder) else decoder.ordered,
        ),
    ):
        if said != found:
            raise BundleError(f"{bundle.root}/{MANIFEST}: {role}.{field}: {said}, but {entry.path} has {found}")


def device_graph_files(bundle: Bundle, role: Role, *, verified: bool = False) -> ModelFiles:
    """Read a model's device graph and its weights. verified: compare the bytes with the manifest's hashes.

    Raises BundleError, naming the field, when the model has no device graph, or one whose head does not do for the scoring rule.
    """
    return bundle.model_files(device_graph_entry(bundle, role).path, verified=verified)


def device_graph_entry(bundle: Bundle, role: Role) -> DeviceGraphEntry:
    """Return the manifest's entry of a model's device graph. Raises as `device_graph_files`."""
    field, rule = f"{bundle.root}/{MANIFEST}: {role}.device_graph", bundle.manifest.scoring_rule
    entry = bundle.model(role)
    if entry.device_graph is None:
        reason = "export the model again, or set kv_paged to never"
        if entry.heads:
            reason = f"a draft of kind {entry.draft_kind} runs with kv_paged never"
        elif entry.precision == "int8" or entry.encoder:
            reason = f"a {entry.precision} {entry.architecture} runs with kv_paged never"
        raise BundleError(f"{field}: the bundle has none; {reason}")
    if rule is ScoringRule.VOCAB and entry.device_graph.head != "vocab":
        raise BundleError(f"{field}.head: {entry.device_graph.head}, but scoring_rule {rule} sums over the vocabulary")
    return entry.device_graph


def check_device_graph(bundle: Bundle, role: Role) -> None:
    """Load a model's device graph on the CPU and check it against the contract; nothing to do for a model without one.

    Not in bfloat16, for which the CPU has no kernels. Raises BundleError, naming the input or output that is wrong.
    """
    entry = bundle.model(role)
    if entry.device_graph is None:
        return
    files = device_graph_files(bundle, role)
    if entry.precision == "bfloat16":
        return
    inputs, outputs = graph_specs(open_session(files, RuntimeOptions()))
    sizes, columns = (entry.layers, entry.kv_heads, entry.head_dim, entry.precision), len(entry.code_tokens)
    check_contract(files.path, "input", inputs, device_inputs(*sizes))
    check_contract(files.path, "output", outputs, device_outputs(*sizes, columns, entry.device_graph.head))
