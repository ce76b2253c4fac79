"""Checkpoints that are exported: one of each kind that the graph expresses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from atspeed.engine.bundle.manifest import Precision
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.training.export import MODEL_FILE, export_decoder
from tests.bundles import random_model

VOCAB = 97
CODES = tuple(range(40, 90))
# Weights of the size that training leaves: wide enough to tell right from wrong, narrow enough for 8 bits to be near.
CALM = {"initializer_range": 0.15}
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8")

CHECKPOINTS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "one head per key": ("llama", {"num_key_value_heads": 4}),
    "one key for all heads": ("llama", {"num_key_value_heads": 1}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "head_dim": ("llama", {"head_dim": 20}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    # Its attention_scaling is not 1.
    "yarn rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "phi3": ("phi3", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    # A window that no sequence can reach changes nothing.
    "idle window": ("qwen2", {"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 0}),
    "qwen3": ("qwen3", {}),
    "qwen3 biases, tied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
}


def checkpoint(name: str = "llama", **overrides: object) -> PreTrainedModel:
    """A tiny checkpoint whose norms and biases are random too: ones and zeros would hide a missing one."""
    architecture, shape = CHECKPOINTS[name]
    model = random_model(architecture, VOCAB, seed=5, **{**CALM, **shape, **overrides})
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def exported(model: PreTrainedModel, folder: Path, precision: Precision = "float32") -> Decoder:
    export_decoder(model, folder, code_tokens=CODES, precision=precision)
    return Decoder(folder / MODEL_FILE, RuntimeOptions())


def round_to_8_bits(model: PreTrainedModel) -> None:
    """Weights of every matrix to 7 bits by row, inputs of every product to 8 bits by token, in place; of table and head to 14
    and 16.
    """

    def in_steps(values: torch.Tensor, steps: int) -> torch.Tensor:
        step = values.abs().amax(-1, keepdim=True).clamp_min(1e-30) / steps
        return (values / step).round() * step

    head: Any = model.lm_head
    with torch.no_grad():
        for name, part in model.named_modules():
            if name.endswith("relative_attention_bias"):  # of a T5, in float32
                continue
            if isinstance(part, torch.nn.Embedding) or (part is head and not model.config.tie_word_embeddings):
                part.weight.copy_(in_steps(part.weight, 63 * 126))
            elif isinstance(part, torch.nn.Linear) and part is not head:
                part.weight.copy_(in_steps(part.weight, 63))
                part.register_forward_pre_hook(lambda _, inputs: in_steps(inputs[0], 127))
    head.register_forward_pre_hook(lambda _, inputs: in_steps(inputs[0], 127 * 254))
