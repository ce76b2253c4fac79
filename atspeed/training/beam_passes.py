"""Passes of a beam search in torch: the logits after each beam, level by level."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from atspeed.training.level_heads import LevelHeadsModel


class BeamPasses(Protocol):
    """The passes of one search. Each level's beams are the children of beams of the level before."""

    def first(self, prompts: Tensor) -> Tensor:
        """Read prompts of equal length, int64 [b, s]. Returns the logits after the root, [b, 1, V]."""

    def next(self, tokens: Tensor, parent: Tensor) -> Tensor:
        """Read the beams of a level. Returns the logits after each, [b, f, V].

        Args:
            tokens: int64 [b, f]. The last token of each beam.
            parent: int64 [b, f]. Its parent's place among the beams before.
        """


def beam_passes(model: PreTrainedModel) -> BeamPasses:
    """Return the passes of a model for one search."""
    if isinstance(model, LevelHeadsModel):
        return LevelHeadsPasses(model)
    return EncoderDecoderPasses(model) if model.config.is_encoder_decoder else DecoderPasses(model)


class DecoderPasses:
    """Passes of a decoder. Keys and values are kept, and each beam attends to the prompt and to its own ancestors."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model
        self._cache = DynamicCache(config=model.config)

    def first(self, prompts: Tensor) -> Tensor:
        """Read the prompts; see `BeamPasses`."""
        count, self._position = prompts.shape
        self._sees = torch.ones((count, 1, self._position), dtype=torch.bool, device=prompts.device)
        logits: Tensor = self._model(
            input_ids=prompts, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        ).logits
        return logits

    def next(self, tokens: Tensor, parent: Tensor) -> Tensor:
        """Read the beams of a level; see `BeamPasses`."""
        self._sees = sees = _seen_by_children(self._sees, parent)
        dtype = self._model.dtype
        bias = torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)
        positions = torch.full_like(tokens, self._position)
        self._position += 1
        logits: Tensor = self._model(
            input_ids=tokens,
            attention_mask=bias.unsqueeze(1),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        return logits


class LevelHeadsPasses:
    """Passes of a draft with heads. The prompt is read once; a beam has the sum of its path's embeddings."""

    def __init__(self, model: LevelHeadsModel) -> None:
        self._model = model

    def first(self, prompts: Tensor) -> Tensor:
        """Read the prompts; see `BeamPasses`."""
        self._state = self._model.state(prompts)[:, -1:]
        self._paths, self._depth = torch.zeros_like(self._state), 0
        logits: Tensor = self._model.lm_head(self._state)
        return logits

    def next(self, tokens: Tensor, parent: Tensor) -> Tensor:
        """Read the beams of a level; see `BeamPasses`."""
        above = self._paths.gather(1, parent.unsqueeze(-1).expand(-1, -1, self._paths.shape[2]))
        self._paths, self._depth = above + self._model.embedded(tokens), self._depth + 1
        depth = torch.full((tokens.numel(),), self._depth, device=tokens.device)
        states = self._state.expand_as(self._paths)
        logits = self._model.logits_at(depth, states.flatten(0, 1), self._paths.flatten(0, 1))
        return logits.view(*tokens.shape, -1)


class EncoderDecoderPasses:
    """Passes of a T5. The encoder reads the prompt once; the decoder reads each beam's whole path.

    Its position bias counts tokens by their order, so beams cannot share a row. Paths have few tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model

    def first(self, prompts: Tensor) -> Tensor:
        """Read the prompts; see `BeamPasses`."""
        self._encoded = self._model.encoder(input_ids=prompts).last_hidden_state
        start = self._model.config.decoder_start_token_id
        self._paths = torch.full((len(prompts), 1, 1), start, device=prompts.device)
        return self._logits()

    def next(self, tokens: Tensor, parent: Tensor) -> Tensor:
        """Read the beams of a level; see `BeamPasses`."""
        above = self._paths.gather(1, parent.unsqueeze(-1).expand(-1, -1, self._paths.shape[2]))
        self._paths = torch.cat([above, tokens.unsqueeze(-1)], dim=2)
        return self._logits()

    def _logits(self) -> Tensor:
        """Return the logits behind every path, [b, f, V]."""
        count, width, length = self._paths.shape
        hidden = self._encoded.repeat_interleave(width, dim=0)
        output = self._model.decoder(
            input_ids=self._paths.view(-1, length), encoder_hidden_states=hidden, use_cache=False
        )
        last = output.last_hidden_state[:, -1]
        if self._model.config.scale_decoder_outputs:
            last = last * self._model.config.d_model**-0.5
        logits: Tensor = self._model.lm_head(last).view(count, width, -1)
        return logits


def _seen_by_children(sees: Tensor, parent: Tensor) -> Tensor:
    """Extend the parents' masks to their children: bool [b, K, tokens]. A child also sees itself."""
    count, width = parent.shape
    # The parent's mask, and one new token per child that only the child itself sees.
    inherited = sees.gather(1, parent.unsqueeze(-1).expand(-1, -1, sees.shape[-1]))
    own = torch.eye(width, dtype=torch.bool, device=sees.device).expand(count, -1, -1)
    return torch.cat([inherited, own], dim=-1)
