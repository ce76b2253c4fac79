"""Contract of the device graph: one pass over token trees, KV in a paged pool.

`atspeed.training.device_graph` writes the graph, the runtime of a device loads it. It is a file beside the host's graph and
shares its weights. Every layer has one pool of keys and one of values, [slots, kv_heads * head_dim], for all requests.
A pass scatters the keys and values of its new tokens into the pool, in place, and gathers those of each tree by a slot table.
So no request has memory of its own, a shared prefix is a shared run of slots, and every pointer stays the same for a CUDA
graph. T is the precision: float32, float16 or bfloat16.

A batch row is one tree. The `capacity` places of a row are its tokens in the order of computation: the prompt, then nodes.

| input           | type  | axes                         |                                                              |
|-----------------|-------|------------------------------|--------------------------------------------------------------|
| input_ids       | int64 | batch, new                   | token ids                                                    |
| position_ids    | int64 | batch, new                   | depth of each token, counted from the root                   |
| write_slots     | int64 | batch, new                   | the slot that takes the token's key and value                |
| slot_table      | int32 | batch, capacity              | the slot of each place; ZERO_SLOT where there is no token    |
| prefix_lengths  | int64 | batch, new                   | n: the token sees the places 0 .. n - 1                      |
| ancestors       | int32 | batch, new, depth            | further places that it sees                                  |
| out_index       | int64 | rows                         | into the flattened batch x new tokens                        |
| key_pool.{i}    | T     | slots, kv_heads * head_dim   | keys of layer i, after the rotary embedding                  |
| value_pool.{i}  | T     | slots, kv_heads * head_dim   | values of layer i                                            |

| output              | type    | axes                       |                                                              |
|---------------------|---------|----------------------------|--------------------------------------------------------------|
| code_logp           | float32 | rows, C                    | head "vocab": log-softmax over the vocabulary, at the codes  |
| code_logits         | float32 | rows, C                    | head "codes", in place of code_logp: logits of the codes     |
| key_pool_out.{i}    | T       | slots, kv_heads * head_dim | bound to the memory of key_pool.{i}: else the pool is copied |
| value_pool_out.{i}  | T       | slots, kv_heads * head_dim | bound to the memory of value_pool.{i}                        |

What the caller keeps:

- `capacity` is a multiple of CAPACITY_STEP, so that attention is one fused kernel for every pass.
- The new tokens' slots are in the slot table too: attention reads them there.
- A prompt token at place p has prefix length p + 1; a node has the prompt's length, and its ancestors are the places of its
  evaluated ancestors and its own. Spare entries of `ancestors` repeat a place that the token sees anyway, such as place 0.
- ZERO_SLOT holds zeros and is never written. SCRATCH_SLOT is written by padding and is in no table. Attention multiplies
  masked values by 0, so all that a table names must be finite.
- A padding token repeats all values of its row's first token but its slot, which is SCRATCH_SLOT. The tokens of
  a padding row see place 0 alone, and all places of that row are ZERO_SLOT.
"""

from __future__ import annotations

from collections.abc import Sequence

from atspeed.engine.bundle.manifest import Head
from atspeed.engine.model.decoder import TensorSpec

DEVICE_FILE = "device.onnx"
"""The device graph's file, in the folder of the host's graph."""
ZERO_SLOT = 0
SCRATCH_SLOT = 1
FREE_SLOTS_FROM = 2
"""The first slot that a token may have."""
CAPACITY_STEP = 8

SCORES: dict[Head, str] = {"vocab": "code_logp", "codes": "code_logits"}
"""The output that holds the scores of the code tokens."""


def pool_names(layers: int, *, out: bool = False) -> list[tuple[str, str]]:
    """Return the (key, value) pool names of each layer. out: those of the outputs."""
    end = "_out" if out else ""
    return [(f"key_pool{end}.{layer}", f"value_pool{end}.{layer}") for layer in range(layers)]


def device_inputs(layers: int, kv_heads: int, head_dim: int, dtype: str) -> dict[str, TensorSpec]:
    """Return the inputs of a device graph that computes in `dtype`, in order."""
    return {
        "input_ids": TensorSpec("int64", ("batch", "new")),
        "position_ids": TensorSpec("int64", ("batch", "new")),
        "write_slots": TensorSpec("int64", ("batch", "new")),
        "slot_table": TensorSpec("int32", ("batch", "capacity")),
        "prefix_lengths": TensorSpec("int64", ("batch", "new")),
        "ancestors": TensorSpec("int32", ("batch", "new", "depth")),
        "out_index": TensorSpec("int64", ("rows",)),
        **_pools(pool_names(layers), kv_heads * head_dim, dtype),
    }


def device_outputs(
    layers: int, kv_heads: int, head_dim: int, dtype: str, columns: int, head: Head
) -> dict[str, TensorSpec]:
    """Return the outputs of a device graph with `columns` code tokens, in order."""
    return {
        SCORES[head]: TensorSpec("float32", ("rows", columns)),
        **_pools(pool_names(layers, out=True), kv_heads * head_dim, dtype),
    }


def _pools(names: Sequence[tuple[str, str]], width: int, dtype: str) -> dict[str, TensorSpec]:
    return {name: TensorSpec(dtype, ("slots", width)) for pair in names for name in pair}
