"""Each loss against the formula written out in loops: values and gradients, in float64, on random logits and masks."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atspeed.training.losses import coverage, forward_kl, path_cross_entropy, top_k_reverse_kl, total_variation

Rows = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    """Logits of draft and target, and a mask with at least one column per row; random, so without ties."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 9)))
    scale = draw(st.sampled_from([0.3, 1.0, 6.0]))
    draft, target = (scale * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    allowed = torch.rand(*shape, generator=generator) < draw(st.sampled_from([0.3, 0.8, 1.0]))
    allowed[torch.arange(shape[0]), torch.randint(shape[1], (shape[0],), generator=generator)] = True
    return draft, target, allowed


def softmax(values: list[Tensor]) -> list[Tensor]:
    total = sum((value.exp() for value in values), start=torch.zeros((), dtype=torch.float64))
    return [value.exp() / total for value in values]


def distributions(given: Rows, row: int, temperature: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """p and q of a row, over its allowed columns only."""
    draft, target, allowed = given
    columns = [column for column in range(allowed.shape[1]) if allowed[row, column]]
    p = softmax([target[row, column].detach() / temperature for column in columns])
    return p, softmax([draft[row, column] / temperature for column in columns])


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum() / len(values)


def plain_forward_kl(given: Rows, temperature: float) -> Tensor:
    result = []
    for row in range(len(given[0])):
        p, q = distributions(given, row, temperature)
        result.append(sum((a * (a.log() - b.log()) for a, b in zip(p, q, strict=True)), start=torch.zeros(())))
    return mean(result)


def plain_total_variation(given: Rows, temperature: float) -> Tensor:
    result = []
    for row in range(len(given[0])):
        p, q = distributions(given, row, temperature)
        result.append(sum(((b - a).abs() for a, b in zip(p, q, strict=True)), start=torch.zeros(())) / 2)
    return mean(result)


def plain_top_k_reverse_kl(given: Rows, top: int, density: float, renormalise: float | None) -> Tensor:
    result = []
    for row in range(len(given[0])):
        p, q = distributions(given, row)
        best = sorted(range(len(q)), key=lambda index: -q[index].item())[:top]
        p, q = [p[index] for index in best], [q[index] for index in best]
        if renormalise is not None:
            p, q = softmax([value / renormalise for value in p]), softmax([value / renormalise for value in q])
        divergence, entropy = torch.zeros(()), torch.zeros(())
        for a, b in zip(p, q, strict=True):
            divergence = divergence + b * (b.log() - a.log())
            entropy = entropy - b * b.log()
        result.append(divergence + density * p[-1] * entropy)
    return mean(result)


def check(given: Rows, fast: Loss, slow: Callable[[Rows], Tensor]) -> None:
    """Same value, same gradient of the draft, none of the target. 1e-9: float64 rounding of a few dozen operations."""
    results = [_value_and_gradient(fast, given), _value_and_gradient(lambda *rows: slow(rows), given)]
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9, check_dtype=False)


def _value_and_gradient(loss: Loss, given: Rows) -> tuple[Tensor, Tensor]:
    draft, target, allowed = given[0].clone().requires_grad_(), given[1].clone().requires_grad_(), given[2]
    value = loss(draft, target, allowed)
    value.backward()  # type: ignore[no-untyped-call] # torch's own
    assert draft.grad is not None
    assert target.grad is None
    return value.detach(), draft.grad


@settings(max_examples=60, deadline=None)
@given(rows(), st.sampled_from([0.5, 1.0, 3.0]))
def test_forward_kl(given: Rows, temperature: float) -> None:
    check(
        given,
        lambda *args: forward_kl(*args, temperature=temperature),
        lambda rows: plain_forward_kl(rows, temperature),
    )


@settings(max_examples=60, deadline=None)
@given(rows(), st.sampled_from([0.5, 1.0, 3.0]))
def test_total_variation(given: Rows, temperature: float) -> None:
    """A row with one allowed code has q = p = 1, where the absolute value has no derivative: 0 in both."""
    check(
        given,
        lambda *args: total_variation(*args, temperature=temperature),
        lambda rows: plain_total_variation(rows, temperature),
    )


@settings(max_examples=100, deadline=None)
@given(rows(), st.integers(1, 10), st.sampled_from([0.0, 1.0, 2.5]), st.sampled_from([None, 0.1, 1.0]))
def test_top_k_reverse_kl(given: Rows, top: int, density: float, renormalise: float | None) -> None:
    check(
        given,
        lambda *args: top_k_reverse_kl(*args, top=top, density=density, renormalise=renormalise),
        lambda rows: plain_top_k_reverse_kl(rows, top, density, renormalise),
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_path_cross_entropy(seed: int, batch: int, paths: int, length: int) -> None:
    prefixes, vocabulary = 5, 7
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, prefixes, vocabulary, generator=generator, dtype=torch.float64).requires_grad_()
    row = torch.randint(prefixes, (batch, paths, length), generator=generator)
    token = torch.randint(vocabulary, (batch, paths, length), generator=generator)
    scored = torch.rand(batch, paths, length, generator=generator) < 0.7
    scored[0, 0, 0] = True
    terms = []
    for prompt in range(batch):
        for path in range(paths):
            for place in range(length):
                if not scored[prompt, path, place]:
                    continue
                q = softmax(list(logits[prompt, row[prompt, path, place]]))
                terms.append(-q[int(token[prompt, path, place])].log())
    expected, found = mean(terms), path_cross_entropy(logits, row, token, scored)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(rows(), st.integers(0, 100), st.integers(0, 4), st.sampled_from([0.0, 0.5, 2.0]))
def test_coverage(given: Rows, seed: int, spare: int, margin: float) -> None:
    """The threshold by sorting; the wanted ones are drawn from the allowed."""
    allowed = given[2]
    wanted = allowed & (torch.rand(allowed.shape, generator=torch.Generator().manual_seed(seed)) < 0.4)
    wanted[torch.arange(len(allowed)), allowed.int().argmax(1)] = True
    budget = int(wanted.sum(1).max()) + spare

    def fast(draft: Tensor, _: Tensor, allowed: Tensor) -> Tensor:
        return coverage(draft, wanted, allowed, budget=budget, margin=margin)

    def slow(given: Rows) -> Tensor:
        draft, _, allowed = given
        result = []
        for row in range(len(draft)):
            inside = [c for c in range(draft.shape[1]) if wanted[row, c]]
            others = [c for c in range(draft.shape[1]) if allowed[row, c] and not wanted[row, c]]
            others.sort(key=lambda column: -draft[row, column].item())
            total = draft[row].sum() * 0
            if len(others) > budget - len(inside):
                threshold = draft[row, others[budget - len(inside)]]
                gaps = [margin + threshold - draft[row, column] for column in inside]
                total = total + sum((gap for gap in gaps if gap.item() > 0), start=torch.zeros(())) / len(inside)
            result.append(total)
        return mean(result)

    check(given, fast, slow)


def test_coverage_is_zero_exactly_when_all_beams_are_in_the_budget() -> None:
    """Scores 5, 4, 3, 2 with the second and the third wanted: both are among the best three, not among the best two."""
    draft, wanted = torch.tensor([[5.0, 4.0, 3.0, 2.0]]), torch.tensor([[False, True, True, False]])
    allowed = torch.ones_like(wanted)
    assert coverage(draft, wanted, allowed, budget=3, margin=0.0).item() == 0.0
    assert coverage(draft, wanted, allowed, budget=2, margin=0.0).item() == (1 + 2) / 2
    assert coverage(draft, wanted, allowed, budget=4, margin=9.0).item() == 0.0


@pytest.mark.parametrize(
    "loss",
    [forward_kl, total_variation, lambda *args: top_k_reverse_kl(*args, density=0.0)],
    ids=["forward", "variation", "reverse"],
)
def test_draft_equal_to_the_target_has_no_loss(loss: Loss) -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shifted = logits + torch.arange(4.0)[:, None]  # logits count up to a constant per row
    assert loss(shifted, logits, torch.ones(4, 6, dtype=torch.bool)).item() == pytest.approx(0.0, abs=1e-12)


def test_atspeed_s_by_hand() -> None:
    """q = (3/4, 1/4), p = (1/2, 1/2): the divergence, and half the draft's entropy, for the second code's p is 1/2."""
    draft, target = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    found = top_k_reverse_kl(draft, target, torch.ones(1, 2, dtype=torch.bool)).item()
    assert found == pytest.approx((math.log(2) - entropy) + 0.5 * entropy, abs=1e-6)
