"""The losses of a draft, as pure functions on logits.

| loss             | function                | at the prefixes of         | source                                          |
|------------------|-------------------------|----------------------------|-------------------------------------------------|
| cross-entropy    | `path_cross_entropy`    | the gold item              |                                                 |
| seq-kd           | `path_cross_entropy`    | the target's beams         | Kim and Rush 2016, arXiv 1606.07947, sequence-level |
| word-kd          | `forward_kl`            | the gold item              | the same, word-level                            |
| tvd-kd           | `total_variation`       | the gold item              | Wen et al. 2023, arXiv 2307.15190, TVD          |
| atspeed-r        | `total_variation`       | the target's beams         | arXiv 2410.05165, AtSpeed-R                     |
| atspeed-s        | `top_k_reverse_kl`      | the target's beams         | arXiv 2410.05165, AtSpeed-S                     |
| level-kd         | `forward_kl`            | whole levels, see below    | this project                                    |
| coverage         | `coverage`              | whole levels, see below    | this project                                    |

A whole level is one row: all children of the target's beams of a level, with their cumulative scores, which a beam search
compares. The other losses do not compare the children of one prefix with those of another.

Shapes: n = prefixes ("positions"), c = most children of any of them, V = whole vocabulary. draft, target: float [n, c],
logits up to a constant per row; allowed: bool [n, c], the columns that are children in the catalogue, at least one per row.
The other columns may hold any finite number. p = softmax of the target and q = softmax of the draft over the allowed. The
target is always detached: only the draft has gradients. All results are means over the positions, in nats (total variation:
0 to 1).
"""

from __future__ import annotations

from torch import Tensor, inf

TOP = 20  # K of AtSpeed-S; a recipe's `beams` replaces it


def path_cross_entropy(logits: Tensor, row: Tensor, token: Tensor, scored: Tensor) -> Tensor:
    """Mean negative log-likelihood per token of whole code paths, softmax over the whole vocabulary.

        L = - mean_paths mean_l log q(token_l | prefix_l)

    With the gold item's path it is the plain cross-entropy. With the target's beams it is SeqKD with equal weights
    (arXiv 1606.07947, "Sequence-Level Knowledge Distillation"). No term is detached.

    Args:
        logits: float [b, m, V], of m prefixes per prompt.
        row: int64 [b, P, L], the prefix before each code of a path.
        token: int64 [b, P, L], that code's token.
        scored: bool [b, P, L], True for the codes that count; at least one. A missing path has none.
    """
    # The logits of the prefixes, and the tokens that follow them: one row per code.
    kept = scored.flatten(1)
    chosen = logits.gather(1, row.flatten(1).unsqueeze(-1).expand(-1, -1, logits.shape[-1]))[kept]
    wanted = token.flatten(1)[kept]
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

    1 - L is the chance that speculative sampling accepts a code drawn from q. Where q = p the subgradient is 0.
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
    """AtSpeed-S: reverse KL on the draft's own best `top` codes I, and a term for the density of q in them.

        L = mean_pos sum_I q_i (log q_i - log p_i)  +  density * mean_pos p_last * (- sum_I q_i log q_i)

    `last` is the lowest q of I (p of the draft's K-th code). With fewer than `top` allowed codes, I holds all of them.
    Source: arXiv 2410.05165, alignment under strict top-K verification, and `loss_strict` in the authors' code/model.py.
    Detached: p. The choice of I is discrete and has no gradient.

    Args:
        draft: float [n, c], the draft's logits.
        target: float [n, c], the target's.
        allowed: bool [n, c], the columns that are children.
        top: K, the size of I.
        density: the weight of the density term.
        renormalise: a temperature T, by which p_I and q_I become softmax(p_I / T) and softmax(q_I / T), of the probabilities
            themselves, as the authors' code does under `constrained_softmax`. None: no change.
    """
    # I: the draft's best codes. Fewer than `top` allowed codes leave columns that are not `kept`.
    log_q, best = _log_softmax(draft, allowed).topk(min(top, draft.shape[-1]), dim=-1)
    log_p = _log_softmax(target.detach(), allowed).gather(-1, best)
    kept = allowed.gather(-1, best)
    if renormalise is not None:
        log_p, log_q = (_log_softmax(logp.exp() / renormalise, kept) for logp in (log_p, log_q))
    q, finite_log_q = log_q.exp(), _zeroed(log_q, kept)
    divergence = (q * (finite_log_q - _zeroed(log_p, kept))).sum(-1)
    # p of the last code of I that is allowed.
    last = log_p.exp().gather(-1, kept.sum(-1, keepdim=True) - 1).squeeze(-1)
    return (divergence - density * last * (q * finite_log_q).sum(-1)).mean()


def coverage(draft: Tensor, wanted: Tensor, allowed: Tensor, *, budget: int, margin: float) -> Tensor:
    """Hinge loss of the target's beams of a level against the draft's best `budget` nodes. A loss of this project.

        L = mean_rows mean_wanted max(0, margin + threshold - draft_v)

    With w wanted nodes, the threshold is the (budget - w + 1)-th best score of the others: the first that takes a wanted
    one's place. A row with fewer others has no loss. The threshold is not detached: its node is pushed down as a missed beam
    is pushed up. The target's probabilities are not used.

    Args:
        draft: float [n, c], cumulative scores of a level.
        wanted: bool [n, c], the target's beams, 1 to `budget` of them per row.
        allowed: bool [n, c], the columns that are children.
        budget: the number of nodes that the draft may plan on the level.
        margin: the wanted distance above the threshold, nats.
    """
    # The best scores of the nodes that are not wanted, and the number of them that a plan still has room for.
    others = draft.masked_fill(~allowed | wanted, -inf).topk(min(budget, draft.shape[-1]), dim=-1).values
    allowance = budget - wanted.sum(-1, keepdim=True)
    limited = (allowed & ~wanted).sum(-1, keepdim=True) > allowance
    threshold = others.gather(-1, allowance.clamp(max=others.shape[-1] - 1)).masked_fill(~limited, 0.0)
    missing = (margin + threshold - draft).clamp(min=0).masked_fill(~(wanted & limited), 0.0)
    return (missing.sum(-1) / wanted.sum(-1)).mean()


def _log_softmax(logits: Tensor, allowed: Tensor) -> Tensor:
    """Log-softmax over the allowed columns; -inf in the others. [n, c]"""
    return logits.masked_fill(~allowed, -inf).log_softmax(-1)


def _zeroed(log_probability: Tensor, allowed: Tensor) -> Tensor:
    """Replace -inf by 0, so that 0 * log 0 is 0, also in the gradient. [n, c]"""
    return log_probability.masked_fill(~allowed, 0.0)
