"""Sparse prefill by SampleAttention in torch: the lists of a model that reads so.

Source: arXiv 2406.15486. In each head, a sample of the queries scores all keys. The keys that hold a share of the sampled
attention are kept for all queries, and beside them a window of the newest keys before each query. Only the pass over the prompt
is sparse; beams attend to all of it. Steps and shares are those of the paper; its kernels are not here, so this says nothing
about time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from atspeed.benchmarks.intervals import Interval, bootstrap
from atspeed.benchmarks.results import BenchmarkError, Columns
from atspeed.training.evaluate import EvalExample, ModelRecommender, Ranking
from research.eval_examples import quality

SAMPLED = 0.05  # share of the queries that score all keys
WINDOW = 0.08  # share of the prompt that each query sees before itself
CUTOFF = 10
_NAME = "sample-attention"
_BEAMS = 20


@dataclass
class SampleAttention:
    """Attention of a prompt through the chosen keys. share: of the sampled attention that the kept keys hold.

    Attributes:
        kept: kept pairs of query and key over all causal ones, of each layer and prompt.
        columns: kept keys of a head over all keys, of each layer and prompt; the window is not counted.
    """

    share: float
    kept: list[float] = field(default_factory=list)
    columns: list[float] = field(default_factory=list)

    def __call__(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """Return the mask of a prompt, bool [batch, heads, s, s], from queries and keys [batch, heads, s, head_dim]."""
        length = query.shape[2]
        causal = torch.ones((length, length), dtype=torch.bool).tril()
        rows = _sampled(length)
        scores = (query[:, :, rows] @ key.transpose(2, 3) * scaling).masked_fill(~causal[rows], -torch.inf)
        mass = scores.softmax(-1).sum(2)  # of each key, [batch, heads, s]
        ordered, places = mass.sort(descending=True)
        before = (ordered.cumsum(-1) - ordered) / ordered.sum(-1, keepdim=True)
        columns = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, places, before < self.share)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        near = distance < max(1, round(WINDOW * length))
        mask = (columns.unsqueeze(2) | near) & causal
        self.kept.append(float(mask.sum() / (causal.sum() * mask.shape[0] * mask.shape[1])))
        self.columns.append(float(columns.float().mean()))
        return mask


def _sampled(length: int) -> Tensor:
    """Return the places of the sampled queries, the last one among them."""
    count = max(1, round(SAMPLED * length))
    return torch.from_numpy(np.unique(np.linspace(length - 1, 0, count, endpoint=count > 1).round().astype(np.int64)))


@contextmanager
def sparse_prefill(model: Any, share: float) -> Iterator[SampleAttention]:
    """Let a model read prompts sparsely. Yields what counts the kept pairs."""
    sample = SampleAttention(share)

    def attend(_module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        if query.shape[2] > 1 and query.shape[2] == key.shape[2]:
            mask = sample(query, key, more["scaling"])
        found = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=more["scaling"])
        return found.transpose(1, 2).contiguous(), None

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield sample
    finally:
        model.set_attn_implementation(before)


@dataclass(frozen=True)
class SparseListsRow:
    """Lists after a sparse prefill beside exact ones, for users with long prompts.

    Attributes:
        share: share of the sampled attention that the kept keys hold; 1 for exact attention.
        users: users with prompts of `least_tokens` and more.
        prompt_tokens: mean over users.
        kept: kept pairs of query and key, of the causal ones.
        columns: kept keys of a head, without the window.
        identical: users whose first ten items are the exact list's, in its order.
        overlap: share of the first ten items that are the exact list's.
        recall: Recall@10.
        recall_less: Recall@10 less that of the exact lists, by user.
    """

    share: float
    least_tokens: int
    users: int
    prompt_tokens: float
    kept: float
    columns: float
    identical: int
    overlap: float
    recall: Interval
    recall_less: Interval


COLUMNS: Columns[SparseListsRow] = (
    ("share of attention", lambda row: "all (exact)" if row.share == 1 else f"{row.share:g}"),
    ("prompts of", lambda row: f"{row.least_tokens}+ tokens"),
    ("users", lambda row: str(row.users)),
    ("mean tokens", lambda row: f"{row.prompt_tokens:.0f}"),
    ("kept pairs", lambda row: f"{row.kept:.0%}"),
    ("kept keys", lambda row: f"{row.columns:.0%}"),
    ("identical first tens", lambda row: f"{row.identical}"),
    ("in common", lambda row: f"{row.overlap:.1%}"),
    ("Recall@10", lambda row: f"{row.recall.value:.4f} [{row.recall.low:.4f}, {row.recall.high:.4f}]"),
    (
        "less exact",
        lambda row: f"{row.recall_less.value:+.4f} [{row.recall_less.low:+.4f}, {row.recall_less.high:+.4f}]",
    ),
)


def run(
    recommender: ModelRecommender,
    examples: Sequence[EvalExample],
    shares: Sequence[float],
    least: Sequence[int],
    seed: int,
) -> list[SparseListsRow]:
    """Return a row for each least number of prompt tokens and each share, exact attention first."""
    lengths = [len(recommender.sequencer.prompt(example.history)) for example in examples]
    examples = [one for one, length in zip(examples, lengths, strict=True) if length >= min(least)]
    lengths = [length for length in lengths if length >= min(least)]
    if not lengths or max(lengths) < max(least):
        raise BenchmarkError(f"--users: none has a prompt of {max(least)} tokens")
    exact = recommender.rank(examples, beams=_BEAMS)
    found: dict[float, tuple[list[Ranking], list[float], list[float]]] = {
        1: (exact, [1.0] * len(exact), [1.0] * len(exact))
    }
    for share in shares:
        found[share] = _ranked(recommender, examples, share)
    rows = []
    for tokens in least:
        chosen = [place for place, length in enumerate(lengths) if length >= tokens]
        for share, (lists, kept, columns) in found.items():
            pairs = [(lists[at][:CUTOFF], exact[at][:CUTOFF]) for at in chosen]
            recall, reference = (
                np.array([quality(every[at], examples[at].targets, CUTOFF).recall for at in chosen])
                for every in (lists, exact)
            )
            rows.append(
                SparseListsRow(
                    share=share,
                    least_tokens=tokens,
                    users=len(chosen),
                    prompt_tokens=float(np.mean([lengths[at] for at in chosen])),
                    kept=float(np.mean([kept[at] for at in chosen])),
                    columns=float(np.mean([columns[at] for at in chosen])),
                    identical=sum(list(own) == list(right) for own, right in pairs),
                    overlap=float(np.mean([len(set(own) & set(right)) / CUTOFF for own, right in pairs])),
                    recall=bootstrap(recall.tolist(), seed=seed),
                    recall_less=bootstrap((recall - reference).tolist(), seed=seed),
                )
            )
    return rows


def _ranked(
    recommender: ModelRecommender, examples: Sequence[EvalExample], share: float
) -> tuple[list[Ranking], list[float], list[float]]:
    """Return the lists, and the means over layers of the kept pairs and keys, user by user."""
    lists, kept, columns = [], [], []
    for example in examples:
        with sparse_prefill(recommender.model, share) as sample:
            lists += recommender.rank([example], beams=_BEAMS)
        kept.append(float(np.mean(sample.kept)))
        columns.append(float(np.mean(sample.columns)))
    return lists, kept, columns
