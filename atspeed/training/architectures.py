"""Families of models that the graphs compute, and checks of a config against them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from atspeed.engine.bundle.manifest import Precision
from atspeed.training.decoder_graph import DecoderShape
from atspeed.training.errors import ExportError
from atspeed.training.t5_graph import ACTIVATIONS

ARCHITECTURES = ("gemma", "llama", "mistral", "phi3", "qwen2", "qwen3", "t5")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # the fields of Mixtral, Qwen and DeepSeek
STATIC_ROPE = ("default", "linear", "llama3", "yarn")

# The longest sequence of a T5 whose config has no n_positions: that of the original T5. Its position bias has no end.
_T5_POSITIONS = 512

STORED: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""The format of a precision's weights; int8 has codes."""


def check_architecture(config: Any) -> None:
    """Raise ExportError, naming the config field, when no graph would compute what a model of this config computes."""
    if any(getattr(config, field, None) for field in _EXPERTS):
        raise ExportError(f"config.model_type: {config.model_type!r} is a mixture of experts, which no graph computes")
    if config.model_type not in ARCHITECTURES:
        raise ExportError(f"config.model_type: {config.model_type!r}, supported are {', '.join(ARCHITECTURES)}")
    if config.model_type == "t5":
        _check_t5(config)
        return
    activation = "gelu_pytorch_tanh" if config.model_type == "gemma" else "silu"
    if config.hidden_act != activation:
        raise ExportError(f"config.hidden_act: {config.hidden_act!r}, supported is {activation!r}")
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in STATIC_ROPE:
        raise ExportError(f"config.rope_parameters.rope_type: {rope_type!r}, supported are {', '.join(STATIC_ROPE)}")
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError("config.rope_parameters.partial_rotary_factor: rotates a part of each head only")
    window = getattr(config, "sliding_window", None)
    # Mistral has no layer types: every layer slides. Llama has neither field.
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ("sliding_attention",))
    if window is not None and slides and window < config.max_position_embeddings:
        raise ExportError(f"config.sliding_window: {window}, attention must see the whole sequence")


def check_supported(model: PreTrainedModel) -> None:
    """Raise ExportError, naming the config field, when the graph would not compute what the model computes."""
    check_architecture(model.config)
    if (
        not model.config.is_encoder_decoder
        and 2 * len(model.model.rotary_emb.inv_freq) != DecoderShape.of(model).head_dim
    ):
        raise ExportError("config.rope_parameters: rotates a part of each head only")
    if model.dtype != torch.float32 or model.training:
        raise ExportError(f"model: must be float32 and in eval mode, is {model.dtype}, training={model.training}")


def _check_t5(config: Any) -> None:
    if not config.is_encoder_decoder:
        raise ExportError("config.is_encoder_decoder: false, a t5 needs its encoder and its decoder")
    if config.dense_act_fn not in ACTIVATIONS:
        raise ExportError(f"config.feed_forward_proj: {config.dense_act_fn!r}, supported are {', '.join(ACTIVATIONS)}")
    start = config.decoder_start_token_id
    if start is None or not 0 <= start < config.vocab_size:
        raise ExportError(
            f"config.decoder_start_token_id: {start}, must be a token of the vocabulary of {config.vocab_size}"
        )


def max_positions(config: Any) -> int:
    """Return the longest sequence of a model, prompt and codes together."""
    if config.is_encoder_decoder:
        return int(getattr(config, "n_positions", None) or _T5_POSITIONS)
    return int(config.max_position_embeddings)


def has_device_graph(config: Any, precision: Precision) -> bool:
    """Return whether a model of this config has a graph for devices; a T5 has none, and int8 is for CPUs."""
    return precision in STORED and not config.is_encoder_decoder


def decoder_start(model: PreTrainedModel) -> int | None:
    """Return the token that a decoder with an encoder begins with; None for a decoder alone."""
    return model.config.decoder_start_token_id if model.config.is_encoder_decoder else None
