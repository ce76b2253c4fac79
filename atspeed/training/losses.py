"""What a draft is trained by, as pure functions on logits. Method: aligning the draft.

| loss             | function                | at the prefixes of         | source                                          |
|------------------|-------------------------|----------------------------|-------------------------------------------------|
| cross-entropy    | `path_cross_entropy`    | the gold item              |                                                 |
| seq-kd           | `path_cross_entropy`    | the target's beams         | Kim and Rush 2016, arXiv 1606.07947, sequence-level |
| word-kd          | `forward_kl`            | the gold item              | the same, word-level                            |
| tvd-kd           | `total_variation`       | the gold item              | Wen et al. 2023, arXiv 2307.15190, TVD          |
| atspeed-r        | `total_variation`       | the target's beams         | arXiv 2410.05165, AtSpeed-R                     |
| atspeed-s        | `top_k_reverse_kl`      | the target's beams         | arXiv 2410.05165, AtSpeed-S                     |
| level-kd         | `forward_kl`            | whole levels, see below    | ours                                            |
| coverage         | `coverage`              | whole levels, see below    | ours                                            |

A whole level is one row: all children of the target's beams of a level, with their cumulative scores, which is what a beam
search compares. The losses above it know nothing of how the children of one prefix stand to those of another.

Shapes: n = prefixes ("positions"), c = most children of any of them, V = whole vocabulary. draft, target: float [n, c], logits
up to a constant per row; allowed: bool [n, c], which columns are children in the catalogue, at least one per row. The other
columns may hold anything finite. p = softmax of the target and q = softmax of the draft over the allowed. The target is
always detached: a gradient goes to the draft only. All results are means over the positions, in nats (total variation: 0 to 1).
"""

from __future__ import annotations

from torch import Tensor, inf

TOP = 20  # K of AtSpeed-S


def path_cross_entropy(logits: Tensor, row: Tensor, token: Tensor, valid: Tensor) -> Tensor:
    """Mean negative log-likelihood per token of whole code paths, softmax over the whole vocabulary.

        L = - mean_paths mean_l log q(token_l | prefix_l)

    logits: float [b, m, V], of m prefixes per prompt. row, token: int64 [b, P, L]: the prefix that stands before each code of
    a path, and that code's token. valid: bool [b, P], at least one. With the gold item's path it is the plain
    cross-entropy; with the target's beams SeqKD, all beams weighing the same (arXiv 1606.07947, "Sequence-Level
    Knowledge Distillation"). There is nothing to detach.
    """
    batch, _, length = row.shape
    chosen = logits.gather(1, row.reshape(batch, -1, 1).expand(-1, -1, logits.shape[-1]))[
        valid.repeat_interleave(length, 1)
    ]
    wanted = token.reshape(batch, -1)[valid.repeat_interleave(length, 1)]
    return -chosen.log_softmax(-1).gather(1, wanted.unsqueeze(1)).mean()


def forward_kl(draft: Tensor, target: Tensor, allowed: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Word-level distillation at the gold path's prefixes: KL(p || q).

        L = mean_pos sum_v p_v (log p_v - log q_v),   p, q = softmax(z / temperature)

    Source: arXiv 1606.07947, "Word-Level Knowledge Distillation" (there without the entropy of p, a constant). Detached: p.
    """
    log_p = _log_softmax(target.detach() / temperature, allowed)
    log_q = _log_softmax(draft / temperature, allowed)
    return (log_p.exp() * (_zeroed(log_p, allowed) - _zeroed(log_q, allowed))).sum(-1).mean()


def total_variation(draft: Tensor, target: Tensor, allowed: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Total variation distance: AtSpeed-R at the prefixes of the target's beams, TVD-KD at the gold path's.

        L = mean_pos 1/2 sum_v |q_v - p_v|,   p, q = softmax(z / temperature)

    1 - L is the chance that a code drawn from q is accepted by speculative sampling. Where q = p the subgradient is 0.
    Sources: arXiv 2410.05165, alignment under relaxed sampling verification (AtSpeed-R); arXiv 2307.15190, total variation
    distance (TVD-KD). Detached: p.
    """
    p = _log_softmax(target.detach() / temperature, allowed).exp()
    q = _log_softmax(draft / temperature, allowed).exp()
    return (q - p).abs().sum(-1).mean() / 2


def top_k_reverse_kl(
    draft: Tensor,
    target: Tensor,
    allowed: Tensor,
    *,
    top: int = TOP,
    density: float = 1.0,
    renormalise: float | None = None,
) -> Tensor:
    """AtSpeed-S: reverse KL on the draft's own best `top` codes I, and a term for how densely q lies in them.

        L = mean_pos sum_I q_i (log q_i - log p_i)  +  density * mean_pos p_last * (- sum_I q_i log q_i)

    `last` is the lowest q of I (p of the draft's K-th code); with fewer than `top` allowed codes I holds them all.
    renormalise: a temperature T; then p_I and q_I become softmax(p_I / T) and softmax(q_I / T), of the probabilities
    themselves, as the authors' code does under `constrained_softmax`. None: they are used as they are.
    Source: arXiv 2410.05165, alignment under strict top-K verification, and `loss_strict` in the authors' code/model.py.
    Detached: p. The choice of I is discrete and has no gradient.
    """
    log_q, best = _log_softmax(draft, allowed).topk(min(top, draft.shape[-1]), dim=-1)
    log_p = _log_softmax(target.detach(), allowed).gather(-1, best)
    kept = allowed.gather(-1, best)
    if renormalise is not None:
        log_p, log_q = (_log_softmax(logp.exp() / renormalise, kept) for logp in (log_p, log_q))
    q, finite_log_q = log_q.exp(), _zeroed(log_q, kept)
    divergence = (q * (finite_log_q - _zeroed(log_p, kept))).sum(-1)
    last = log_p.exp().gather(-1, kept.sum(-1, keepdim=True) - 1).squeeze(-1)
    return (divergence - density * last * (q * finite_log_q).sum(-1)).mean()


def coverage(draft: Tensor, wanted: Tensor, allowed: Tensor, *, budget: int, margin: float) -> Tensor:
    """How far the target's beams of a level are from being among the draft's best `budget` of it. Ours.

        L = mean_rows mean_wanted max(0, margin + threshold - draft_v)

    draft: cumulative scores of a level, [n, c]. wanted: bool [n, c], the target's beams, 1 to `budget` of them per row.
    threshold: with w of them wanted, the (budget - w + 1)-th best score of the others, the first that takes a wanted one's
    place; a row with fewer others has no loss. The threshold is not detached: what stands there is pushed down as a missed
    beam is pushed up. The target's probabilities are not used.
    """
    others = draft.masked_fill(~allowed | wanted, -inf).topk(min(budget, draft.shape[-1]), dim=-1).values
    allowance = budget - wanted.sum(-1, keepdim=True)
    limited = (allowed & ~wanted).sum(-1, keepdim=True) > allowance
    threshold = others.gather(-1, allowance.clamp(max=others.shape[-1] - 1)).masked_fill(~limited, 0.0)
    missing = (margin + threshold - draft).clamp(min=0).masked_fill(~(wanted & limited), 0.0)
    return (missing.sum(-1) / wanted.sum(-1)).mean()


def _log_softmax(logits: Tensor, allowed: Tensor) -> Tensor:
    """Over the allowed columns; -inf in the others. [n, c]"""
    return logits.masked_fill(~allowed, -inf).log_softmax(-1)


def _zeroed(log_probability: Tensor, allowed: Tensor) -> Tensor:
    """0 instead of -inf, so that 0 * log 0 is 0, in the gradient too. [n, c]"""
    return log_probability.masked_fill(~allowed, 0.0)
