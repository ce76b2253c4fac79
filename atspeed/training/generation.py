"""Resets generation defaults of a checkpoint, such as a repetition penalty.

`generate` uses them for every argument that its caller leaves unset.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from transformers import GenerationConfig, PreTrainedModel

# Keys that every checkpoint has and that change no list of codes: transformers copies them from the model's config.
_USUAL = {
    "_from_model_config",
    "bos_token_id",
    "decoder_start_token_id",
    "eos_token_id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "transformers_version",
    "use_cache",
}


def drop_generation_defaults(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """Reset `model.generation_config`, so that it changes no list. Prints and returns the dropped values.

    name: the model's name in the message.
    """
    fresh: Any = GenerationConfig
    kept, usual = model.generation_config, fresh()
    model.generation_config = usual
    found = kept.to_dict()
    dropped = {
        key: value
        for key, value in found.items()
        if key not in _USUAL and value is not None and value != getattr(usual, key, None)
    }
    if dropped:
        values = ", ".join(f"{key}={value}" for key, value in sorted(dropped.items()))
        Console(stderr=True).print(
            f"{name}: generation defaults of the checkpoint are not used: {values}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    return dropped
