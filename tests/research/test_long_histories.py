"""Sparse prefill of the study of long histories: its masks, its lists, and the timed layer against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atspeed.engine.model.token_tree import TokenTree
from atspeed.training.decoder_graph import DecoderShape
from research import sparse_layer
from research.sample_attention import SampleAttention, sparse_prefill
from tests.bundles import random_model

SHAPE = DecoderShape(layers=1, heads=2, kv_heads=2, head_dim=4, hidden=8, vocab_size=10, norm_epsilon=1e-6)


@settings(max_examples=30)
@given(length=st.integers(2, 90), share=st.floats(0, 1), seed=st.integers(0, 5))
def test_kept_keys_hold_their_share_and_every_query_its_window(length: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn((2, 1, 3, length, 8), generator=generator)
    sample = SampleAttention(share)
    mask = sample(query, key, 8**-0.5)[0]
    rows, columns = np.tril_indices(length)
    assert not mask.numpy()[:, np.triu_indices(length, 1)[0], np.triu_indices(length, 1)[1]].any()
    near = rows - columns < max(1, round(0.08 * length))
    assert mask.numpy()[:, rows[near], columns[near]].all()
    assert sample.kept == [pytest.approx(mask.numpy()[:, rows, columns].mean())]
    # The sampled attention of the kept keys, by plain numpy: the last query alone where no more than one is sampled.
    if round(0.05 * length) <= 1:
        scores = (query[0, :, -1:] @ key[0].transpose(1, 2) * 8**-0.5).softmax(-1)[:, 0].numpy()
        held = (scores * mask[:, -1].numpy()).sum(-1)
        assert (held >= share - 1e-5).all()


def test_all_of_the_attention_is_exact_attention_and_less_is_not() -> None:
    model = random_model("llama", 30, 1)
    tokens = torch.randint(0, 30, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        exact = model(input_ids=tokens).logits
        with sparse_prefill(model, 1.1):
            same = model(input_ids=tokens).logits
        with sparse_prefill(model, 0.2) as sample:
            sparse = model(input_ids=tokens).logits
        after = model(input_ids=tokens).logits
    torch.testing.assert_close(same, exact, rtol=1e-4, atol=1e-4)
    assert max(sample.kept) < 1
    assert (sparse - exact).abs().max() > 1e-3
    assert torch.equal(after, exact)


@pytest.mark.parametrize("chosen", [1, 7, 30])
def test_timed_sparse_layer_attends_to_the_chosen_keys_and_the_window(chosen: int) -> None:
    rng, first, count, keys = np.random.default_rng(3), 30, 6, 40
    query = rng.standard_normal((2, count, 4), dtype=np.float32)
    key, value = rng.standard_normal((2, keys, 2, 4), dtype=np.float32)
    window = np.tri(count, keys - first, k=keys - first - count, dtype=bool)
    feeds: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": value,
        "bias": np.where(window, 0, np.finfo(np.float32).min).astype(np.float32),
        "sampled": np.array([count - 1, 2]),
        "chosen": np.array([chosen]),
        "first": np.array([first]),
    }
    [found] = sparse_layer._simple(SHAPE, "sparse").run(None, feeds)
    for head in range(2):
        scores = query[head] @ key[:, head].T / 2
        mass = _softmax(scores[[count - 1, 2], :first]).sum(0)
        seen = np.zeros((count, keys), dtype=bool)
        seen[:, np.argsort(-mass)[:chosen]] = True
        seen[:, first:] = window
        expected = _softmax(np.where(seen, scores, -np.inf)) @ value[:, head]
        np.testing.assert_allclose(found[head], expected, rtol=1e-4, atol=1e-5)


def test_part_of_a_prompt_sees_all_before_it() -> None:
    tree = TokenTree(np.arange(10), np.empty(0, dtype=np.float32), length=3)
    step: Any = tree.plan_prompt(4)
    assert step.tokens.tolist() == step.positions.tolist() == [3, 4, 5, 6]
    assert step.rows.tolist() == [3]
    assert [row.nonzero()[0].tolist() for row in step.visible] == [list(range(end)) for end in (4, 5, 6, 7)]
    assert not step.nodes.any()


def _softmax(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(shares / shares.sum(-1, keepdims=True))
