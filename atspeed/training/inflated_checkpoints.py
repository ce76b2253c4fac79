"""Writes the checkpoint of an inflated model (atspeed/training/inflation.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedModel

from atspeed.engine.files.json_file import write_json
from atspeed.training.inflation import InflatedWeights, InflationError, ModelShape
from atspeed.training.sequences import Spelling


def write_inflated(
    model: PreTrainedModel, spelling: Spelling, shape: ModelShape, folder: Path, *, dtype: torch.dtype, seed: int
) -> None:
    """Write the inflated checkpoint with its spelling, one layer at a time, so that it is never in memory as a whole.

    Raises InflationError, naming the size or the config field, when the model does not fit into the shape.
    """
    inflation = inflation_of(model, shape, seed)
    folder.mkdir(parents=True, exist_ok=True)
    shards = inflation.shape.layers + 1
    places, size = {}, 0
    for number, weights in enumerate(inflation.shards(), start=1):
        name = f"model-{number:05}-of-{shards:05}.safetensors"
        stored = {key: torch.from_numpy(weight).to(dtype) for key, weight in weights.items()}
        save_file(stored, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(stored, name))
        size += sum(tensor.nbytes for tensor in stored.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places})
    config = inflated_config(model, inflation)
    config.dtype = dtype
    config.save_pretrained(folder)
    spelling.model_copy(update={"vocab_size": inflation.shape.vocab_size}).save(folder)


def inflation_of(model: PreTrainedModel, shape: ModelShape, seed: int) -> InflatedWeights:
    """Return the inflation of a model. Raises InflationError, naming the size or the config field."""
    config: Any = model.config
    _check_config(config)
    weights = {name: weight.detach().float().numpy() for name, weight in model.state_dict().items()}
    return InflatedWeights(weights, shape_of(config), shape, epsilon=config.rms_norm_eps, seed=seed)


def shape_of(config: Any) -> ModelShape:
    """Read the sizes of a checkpoint."""
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
    )


def inflated_config(model: PreTrainedModel, inflation: InflatedWeights) -> LlamaConfig:
    """Return the larger model's config."""
    small: Any = model.config
    large = inflation.shape
    config = LlamaConfig(
        vocab_size=large.vocab_size or small.vocab_size,
        hidden_size=large.hidden,
        intermediate_size=large.intermediate,
        num_hidden_layers=large.layers,
        num_attention_heads=large.heads,
        num_key_value_heads=large.kv_heads,
        head_dim=large.head_dim,
        max_position_embeddings=small.max_position_embeddings,
        rms_norm_eps=inflation.epsilon,
        rope_parameters=small.rope_parameters,
        tie_word_embeddings=False,  # the constant is in every row of the embedding, and in no old row of the head
        pad_token_id=small.pad_token_id,
        bos_token_id=small.bos_token_id,
        eos_token_id=small.eos_token_id,
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


def _check_config(config: Any) -> None:
    if config.model_type != "llama":
        raise InflationError(f"config.model_type: {config.model_type!r}, only llama can be inflated")
    if config.rope_parameters["rope_type"] != "default":
        raise InflationError(
            f"config.rope_parameters.rope_type: {config.rope_parameters['rope_type']!r}, not 'default'"
        )
    for field in ("attention_bias", "mlp_bias"):
        if getattr(config, field):
            raise InflationError(f"config.{field}: a model with biases cannot be inflated")
