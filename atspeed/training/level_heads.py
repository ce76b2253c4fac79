"""A draft of one pass: a head per level reads the state after the prompt.

A small Llama reads the prompt. The head of level l reads the state after it and the codes of a path, and gives the next code:

    x = norm(state + down(silu(gate(z)) * up(z))),   z = [state, sum of the path's code embeddings]
    log q(code | prompt, path) = log-softmax over the codes of level l of x . embedding(code)

The first code comes from the language model itself, over the whole vocabulary. So one pass over the prompt serves all levels of a
plan. Heads are Medusa's (arXiv 2401.10774); heads that read the path are Hydra's and Chimera's (arXiv 2402.05109, 2402.15758).

Shapes: b prompts, s tokens, m nodes, H hidden, V vocabulary, L levels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

_ABSENT = -1e4  # the logit of a token that is no code of the level; its probability is 0 in float32


class LevelHeadsConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    """The config of `LevelHeadsModel`.

    Attributes:
        codebook_sizes: the number of codes of each level, [L].
        first_code: the token of the first code column; the columns follow each other.
        head_size: the inner size of a head.
    """

    model_type = "level-heads"
    codebook_sizes: list[int] | None = None
    first_code: int = 0
    head_size: int = 64


class LevelHead(nn.Module):
    """The head of one level."""

    def __init__(self, config: LevelHeadsConfig) -> None:
        super().__init__()
        self.of_state = nn.Linear(config.hidden_size, 2 * config.head_size, bias=False)
        self.of_path = nn.Linear(config.hidden_size, 2 * config.head_size, bias=False)
        self.down_proj = nn.Linear(config.head_size, config.hidden_size, bias=False)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, state: Tensor, path: Tensor) -> Tensor:
        """Return the vector that is multiplied with the embeddings of codes, [n, H].

        Args:
            state: float [n, H].
            path: float [n, H], the sum of the path's embeddings.
        """
        gate, up = (self.of_state(state) + self.of_path(path)).chunk(2, dim=-1)
        result: Tensor = self.norm(state + self.down_proj(functional.silu(gate) * up))
        return result


class Trunk(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """The Llama of a draft with heads, as it is exported: its graph also gives the state."""


class LevelHeadsModel(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """A Llama with a head for each level but the first."""

    config_class = LevelHeadsConfig

    def __init__(self, config: LevelHeadsConfig) -> None:
        super().__init__(config)
        self.sizes = list(config.codebook_sizes or ())
        self.path_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.heads = nn.ModuleList(LevelHead(config) for _ in self.sizes[1:])
        self.post_init()  # type: ignore[no-untyped-call]

    def trunk(self) -> Trunk:
        """Return the Llama alone, with the same weights."""
        values = self.config.to_dict()
        for name in ("model_type", "architectures", "codebook_sizes", "first_code", "head_size"):
            values.pop(name, None)
        alone = Trunk(LlamaConfig(**values))
        alone.load_state_dict({name: self.state_dict()[name] for name in alone.state_dict()})
        alone.train(self.training)
        return alone

    def head(self, level: int) -> LevelHead:
        """Return the head of a level; the second one is 1."""
        return cast("LevelHead", self.heads[level - 1])

    def tokens_of(self, level: int) -> slice:
        """Return the tokens of a level's codes."""
        first = self.config.first_code + sum(self.sizes[:level])
        return slice(first, first + self.sizes[level])

    def state(self, prompts: Tensor, **inputs: Any) -> Tensor:
        """Return the state at every token of prompts int64 [b, s], [b, s, H]."""
        result: Tensor = self.model(input_ids=prompts, use_cache=False, **inputs).last_hidden_state
        return result

    def embedded(self, tokens: Tensor) -> Tensor:
        """Return the summand of each token in the sum of a path, [..., H]."""
        result: Tensor = self.path_norm(self.model.embed_tokens(tokens))
        return result

    def logits_of(self, level: int, state: Tensor, path: Tensor) -> Tensor:
        """Return the logits of a level's codes, [n, codes], below paths of so many codes; see `LevelHead.forward`."""
        return functional.linear(self.head(level)(state, path), self.lm_head.weight[self.tokens_of(level)])

    def logits_at(self, depth: Tensor, state: Tensor, path: Tensor) -> Tensor:
        """Return logits float [n, V] of rows at different depths.

        Args:
            depth: int64 [n], the number of codes of each row's path, below L.
            state: float [n, H].
            path: float [n, H].
        """
        logits: Tensor = self.lm_head(state).float()
        for level in range(1, len(self.sizes)):
            rows = (depth == level).nonzero().squeeze(1)
            if len(rows):
                own = self.logits_of(level, state[rows], path[rows]).float()
                span = self.tokens_of(level)
                around = (span.start, logits.shape[1] - span.stop)
                logits = logits.index_copy(0, rows, functional.pad(own, around, value=_ABSENT))
        return logits

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        **_unread: object,
    ) -> CausalLMOutputWithPast:
        """Return logits: of every token of plain sequences, or of the nodes of prompts with trees.

        Args:
            input_ids: int64 [b, s], sequences, or [b, t], prompts with nodes below (prompt_trees.PromptTrees).
            attention_mask: None for sequences; float [b, 1, t, t] for trees, 0 where a token sees another.
            position_ids: int64 [b, t] for trees.
            logits_to_keep: m, the nodes of a tree; the first is the root, which is the prompt's last token.
            _unread: `use_cache`, which has no effect.
        """
        if attention_mask is None:
            logits = self._of_sequences(input_ids)
        else:
            logits = self._of_trees(input_ids, attention_mask, position_ids, logits_to_keep)
        return CausalLMOutputWithPast(logits=logits)

    def _of_sequences(self, tokens: Tensor) -> Tensor:
        """Return logits [b, s, V]. The level of the token that follows decides which head predicts it."""
        state, embedded = self.state(tokens), self.embedded(tokens)
        depth = functional.pad(self._levels[tokens[:, 1:]], (0, 1))
        place = torch.arange(tokens.shape[1], device=tokens.device)
        anchor = (place - depth).clamp(min=0)
        # A path's sum is a difference of running sums: after its last code and before its first one.
        total = embedded.float().cumsum(1)
        path = (total - total.gather(1, _wide(anchor, total))).to(embedded.dtype)
        rows = state.gather(1, _wide(anchor, state))
        return self.logits_at(depth.flatten(), rows.flatten(0, 1), path.flatten(0, 1)).view(*tokens.shape, -1)

    def _of_trees(self, tokens: Tensor, bias: Tensor, positions: Tensor | None, nodes: int) -> Tensor:
        """Return logits [b, m, V]. Only the prompts go through the Llama."""
        prompt = tokens.shape[1] - nodes + 1
        at = None if positions is None else positions[:, :prompt]
        state = self.state(tokens[:, :prompt], attention_mask=bias[:, :, :prompt, :prompt], position_ids=at)[:, -1]
        # Nodes below the root: each sees its ancestors and itself.
        sees = (bias[:, 0, prompt - 1 :, prompt:] == 0).to(state.dtype)
        path = sees @ self.embedded(tokens[:, prompt:]).to(state.dtype)
        rows = state.unsqueeze(1).expand(-1, nodes, -1)
        depth = sees.sum(-1).long().clamp(max=len(self.sizes) - 1)
        logits = self.logits_at(depth.flatten(), rows.flatten(0, 1), path.flatten(0, 1))
        return logits.view(len(tokens), nodes, -1)

    @property
    def _levels(self) -> Tensor:
        """Return the level of each token, int64 [V]; 0 for tokens that are no codes."""
        sizes = torch.tensor(self.sizes, device=self.device)
        levels = torch.arange(len(sizes), device=self.device).repeat_interleave(sizes)
        before = self.config.first_code
        return functional.pad(levels, (before, self.config.vocab_size - before - len(levels)))


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index.unsqueeze(-1).expand_as(like)


AutoConfig.register(LevelHeadsConfig.model_type, LevelHeadsConfig)
AutoModelForCausalLM.register(LevelHeadsConfig, LevelHeadsModel)
