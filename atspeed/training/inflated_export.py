"""Inflates the target of a bundle from its exported weights, in numpy.

It needs no checkpoint and no torch. The graph of the larger model is given, as the exporter writes it for the shape
(atspeed/training/graph_of_shape.py); it has no weights. They are computed from those of the bundle
(atspeed/training/inflation.py) and written where the graph expects them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from atspeed.engine.arrays import Float32
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.bundle_files import sha256_of
from atspeed.engine.bundle.manifest import ModelEntry, fingerprint, link_files, write_manifest
from atspeed.engine.bundle.model_files import ModelFiles
from atspeed.engine.model.onnx_bytes import ELEMENT_TYPES, StoredWeight, stored_weights
from atspeed.training.inflation import InflatedWeights, InflationError, ModelShape

_GRAPH, _DATA = "target/model.onnx", "target/model.onnx.data"
_PARTS = ("norm", "qkv", "o", "norm", "gate_up", "down")  # weights of a layer, in the order of the graph


def inflate_export(bundle: Bundle, graph: Path, shape: ModelShape, out: Path, *, label: str, seed: int = 1) -> Path:
    """Write a bundle whose target has this shape and computes what the bundle's target computes. It appears in one step.

    Args:
        bundle: the trained bundle; its target is a Llama in float32 with ordered sums and one table for embedding and head.
        graph: the larger model's graph.
        shape: the sizes of the larger model, with the trained vocabulary.
        out: the folder of the new bundle; what is there is replaced.
        label: the suffix of the bundle's name.
        seed: of the random weights.

    Raises InflationError when target, shape and graph do not fit each other.
    """
    manifest, trained = bundle.manifest, bundle.manifest.target
    if (trained.architecture, trained.precision, trained.ordered_sums) != ("llama", "float32", True):
        raise InflationError(f"{bundle.root}: its target is no Llama in float32 with ordered sums")
    weights = _Exported.read(bundle)
    inflated = InflatedWeights(weights.by_name(), weights.shape, shape, epsilon=1.0, seed=seed)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    kept = {name: digest for name, digest in manifest.files.items() if not name.startswith("target/")}
    link_files(bundle.root, kept, partial)
    (partial / "target").mkdir()
    content = graph.read_bytes()
    (partial / _GRAPH).write_bytes(content)
    parameters = _write_weights(partial / _DATA, graph, stored_weights(content), _exported(inflated, weights.rotation))
    files = kept | {name: sha256_of(partial, name) for name in (_GRAPH, _DATA)}
    write_manifest(
        partial,
        manifest.model_copy(
            update={
                "name": f"{manifest.name}-inflated-{label}",
                "target": _entry(trained, shape, parameters, fingerprint(files, "target")),
                "files": files,
            }
        ),
    )
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out


class _Exported:
    """The weights of a bundle's target.

    Attributes:
        shape: the sizes of the target.
        rotation: the frequencies of the rotary embedding, [head_dim / 2].
    """

    def __init__(self, entry: ModelEntry, arrays: Sequence[Float32]) -> None:
        if len(arrays) != 3 + len(_PARTS) * entry.layers:
            raise InflationError(
                f"{entry.path}: {len(arrays)} weights, not those of a Llama whose head is its embedding"
            )
        self._embedding, self.rotation, *layers, self._norm = arrays
        self._layers = [layers[start : start + len(_PARTS)] for start in range(0, len(layers), len(_PARTS))]
        _, _, output, _, _, down = self._layers[0]
        self.shape = ModelShape(
            layers=entry.layers,
            hidden=self._embedding.shape[1],
            intermediate=down.shape[0],
            heads=output.shape[0] // entry.head_dim,
            kv_heads=entry.kv_heads,
            head_dim=entry.head_dim,
            vocab_size=entry.vocab_size,
        )

    @classmethod
    def read(cls, bundle: Bundle) -> _Exported:
        """Read the weights in the order of the graph. Raises BundleError for damaged files."""
        files = bundle.model_files(bundle.model("target").path, verified=True)
        return cls(bundle.model("target"), list(_arrays(files)))

    def by_name(self) -> dict[str, Float32]:
        """Return the weights by the names of Hugging Face's Llama."""
        head, key = self.shape.heads * self.shape.head_dim, self.shape.kv_heads * self.shape.head_dim
        named = {
            "model.embed_tokens.weight": self._embedding,
            "lm_head.weight": self._embedding,
            "model.norm.weight": self._norm,
        }
        for index, (before, qkv, output, after, gate_up, down) in enumerate(self._layers):
            query, keys, values = np.split(qkv.T, (head, head + key))
            gate, up = np.split(gate_up.T, 2)
            parts = {
                "input_layernorm": before,
                "self_attn.q_proj": query,
                "self_attn.k_proj": keys,
                "self_attn.v_proj": values,
                "self_attn.o_proj": output.T,
                "post_attention_layernorm": after,
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": down.T,
            }
            named |= {f"model.layers.{index}.{name}.weight": weight for name, weight in parts.items()}
        return named


def _arrays(files: ModelFiles) -> Iterator[Float32]:
    (data,) = files.weights.values()
    for weight in stored_weights(files.graph):
        yield np.frombuffer(data, np.float32, weight.length // 4, weight.offset).reshape(weight.shape)


def _exported(inflated: InflatedWeights, rotation: Float32) -> Iterator[Float32]:
    """Yield the weights in the order of the larger graph, as it multiplies them."""
    shards = list(inflated.shards())
    others = shards.pop()
    yield others["model.embed_tokens.weight"]
    yield _frequencies(rotation, inflated.shape.head_dim // 2)
    for index, shard in enumerate(shards):
        by_part = {name.split(".")[-2]: weight for name, weight in shard.items()}
        yield by_part["input_layernorm"]
        yield np.concatenate([by_part[name] for name in ("q_proj", "k_proj", "v_proj")]).T
        yield by_part["o_proj"].T
        yield by_part["post_attention_layernorm"]
        yield np.concatenate([by_part[name] for name in ("gate_proj", "up_proj")]).T
        yield by_part["down_proj"].T
        shards[index] = {}
    yield others["model.norm.weight"]
    yield others["lm_head.weight"]


def _frequencies(trained: Float32, count: int) -> Float32:
    """Return the frequencies of larger heads: the trained ones, bit for bit, and others in geometric steps between them."""
    step = count // len(trained)
    spread = np.exp(np.interp(np.arange(count) / step, np.arange(len(trained)), np.log(trained.astype(np.float64))))
    frequencies = spread.astype(np.float32)
    frequencies[::step] = trained
    return frequencies


def _write_weights(path: Path, graph: Path, places: Sequence[StoredWeight], weights: Iterator[Float32]) -> int:
    """Write each weight at its place. Returns the number of parameters: all but the frequencies, the second weight."""
    parameters = 0
    with path.open("wb") as file:
        for place, (index, weight) in zip(places, enumerate(weights), strict=True):
            if (place.shape, place.element_type) != (weight.shape, ELEMENT_TYPES["float32"]):
                raise InflationError(f"{graph}: {place.name} is {list(place.shape)}, the weight {list(weight.shape)}")
            file.seek(place.offset)
            file.write(np.ascontiguousarray(weight).data)
            parameters += weight.size if index != 1 else 0
    return parameters


def _entry(trained: ModelEntry, shape: ModelShape, parameters: int, fingerprint_: str) -> ModelEntry:
    return trained.model_copy(
        update={
            "parameters": parameters,
            "layers": shape.layers,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "fingerprint": fingerprint_,
            "inflated_from": trained.parameters,
            "device_graph": None,
        }
    )
