"""The batched trie beam search against the plainest one: every path read whole by the model, one at a time."""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.search.scoring import ScoringRule
from atspeed.engine.search.trie import Pruning, Trie
from atspeed.training.beams import BeamSearch, batches_of_equal_length, prompts_at_once
from atspeed.training.sequences import Spelling
from tests.bundles import random_model

SIZES = (3, 5, 4)
VOCABULARY = 2 + sum(SIZES) + 3
RNG = np.random.default_rng(5)
PATHS = np.array([path for path in itertools.product(*map(range, SIZES)) if RNG.random() < 0.4])
CATALOGUE = Catalogue.build([str(index) for index in range(len(PATHS))], PATHS, SIZES)
# One code, two codes, or all three; the ended places of a path have no token.
SHORTER = [path for path in itertools.product(*map(range, SIZES)) if path[0] < 2 and path[1] < 3]
UNEQUAL = np.array([(2, -1, -1), *((a, b, -1) for a in range(2) for b in (3, 4)), *SHORTER])
CATALOGUES = {
    "equal": CATALOGUE,
    "unequal": Catalogue.build([str(index) for index in range(len(UNEQUAL))], UNEQUAL, SIZES),
}
TRIE = CATALOGUE.trie
SPELLING = Spelling(
    code_tokens=tuple(RNG.permutation(np.arange(2, 2 + sum(SIZES))).tolist()),
    prompt=PromptTemplate(prefix=(1,)),
    pad_token=0,
    vocab_size=VOCABULARY,
)
PROMPTS = RNG.integers(1, VOCABULARY, size=(4, 7))
RULES = list(ScoringRule)


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module", params=["llama", "t5", "t5-scaled"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A decoder, and T5s with and without a scale before the head."""
    if request.param == "llama":
        return random_model("llama", VOCABULARY, 1, hidden_size=16, intermediate_size=32)
    return random_model("t5", VOCABULARY, 1, scale_decoder_outputs=request.param == "t5-scaled")


@torch.inference_mode()
def naive(
    model: PreTrainedModel, trie: Trie, prompt: npt.NDArray[np.int64], rule: ScoringRule, width: int, live: set[int]
) -> list[list[tuple[int, float]]]:
    """Beam search with one whole forward pass per beam, over the paths of the `live` nodes: (node, score) per level."""
    beams = [(0, 0.0)]
    levels = []
    for _ in range(trie.levels):
        found = []
        for node, score in beams:
            children = trie.children(node)
            if trie.code[children[0]] < 0:  # the path has ended
                found.append((int(children[0]), score))
                continue
            columns = [int(trie.column(np.array([ancestor]))[0]) for ancestor in _ancestors(trie, node)]
            tokens = [*prompt.tolist(), *(SPELLING.code_tokens[column] for column in columns)]
            logits = _logits(model, tokens, len(prompt))
            child_logits = logits[[SPELLING.code_tokens[int(column)] for column in trie.column(children)]]
            normaliser = {"vocab": logits, "trie": child_logits, "codes": logits[list(SPELLING.code_tokens)]}[rule]
            logp = child_logits - normaliser.logsumexp(0)
            found += [
                (int(child), score + float(value))
                for child, value in zip(children, logp, strict=True)
                if int(child) in live
            ]
        beams = sorted(found, key=lambda beam: (-beam[1], beam[0]))[:width]
        levels.append(beams)
    return levels


def _logits(model: Any, tokens: list[int], prompt: int) -> torch.Tensor:
    """The logits behind a prompt and a path, from one whole pass."""
    if not model.config.is_encoder_decoder:
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens])).logits[0, -1].double()
        return logits
    begun = [model.config.decoder_start_token_id, *tokens[prompt:]]
    logits = model(input_ids=torch.tensor([tokens[:prompt]]), decoder_input_ids=torch.tensor([begun])).logits
    return logits[0, -1].double()


def _ancestors(trie: Trie, node: int) -> list[int]:
    """From level 1 down to the node itself."""
    chain = []
    while node:
        chain.append(node)
        node = int(trie.parent[node])
    return chain[::-1]


def check(
    model: PreTrainedModel, trie: Trie, rule: ScoringRule, width: int, prunings: list[Pruning] | None = None
) -> None:
    beams = BeamSearch(model, SPELLING, trie, rule, width)(PROMPTS, prunings)
    for row, prompt in enumerate(PROMPTS):
        live = _live(trie, prunings[row]) if prunings else set(range(trie.nodes))
        for level, expected in enumerate(naive(model, trie, prompt, rule, width, live)):
            nodes = beams.node[level][row]
            assert nodes[nodes >= 0].tolist() == [node for node, _ in expected]
            scores = beams.score[level][row][nodes >= 0].numpy()
            np.testing.assert_allclose(scores, [score for _, score in expected], atol=1e-4)


def _live(trie: Trie, pruning: Pruning) -> set[int]:
    cut = set(pruning.cut.tolist())
    return {node for node in range(trie.nodes) if cut.isdisjoint({0, *_ancestors(trie, node)})}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("width", [1, 2, 4, 100])
@pytest.mark.parametrize("paths", CATALOGUES)
def test_beams_equal_those_of_one_pass_per_beam(
    model: PreTrainedModel, rule: ScoringRule, width: int, paths: str
) -> None:
    """Width 100 holds every path, so that the result is the ranking of the whole catalogue."""
    check(model, CATALOGUES[paths].trie, rule, width)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("paths", CATALOGUES)
def test_excluded_items_are_never_found_and_change_no_score(
    model: PreTrainedModel, rule: ScoringRule, paths: str
) -> None:
    catalogue = CATALOGUES[paths]
    prunings = [catalogue.pruning(excluded=np.arange(0, catalogue.items, step)) for step in (1 + 1, 3, 5, 7)]
    check(model, catalogue.trie, rule, 4, prunings)


def test_a_pass_holds_fewer_prompts_of_a_large_vocabulary() -> None:
    """A quarter of a gigabyte of logits; one prompt at least."""
    assert prompts_at_once(1_000, 20) == 64
    assert prompts_at_once(151_936, 20) == 21
    assert prompts_at_once(151_936, 4_096) == 1


def test_ties_go_to_the_smaller_path() -> None:
    """A model that finds everything equally likely ranks by code path."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    even = LlamaForCausalLM(config)
    torch.nn.init.zeros_(even.lm_head.weight)
    beams = BeamSearch(even, SPELLING, TRIE, ScoringRule.VOCAB, 6)(PROMPTS)
    assert beams.node[-1][0].tolist() == list(range(TRIE.nodes))[TRIE.level(TRIE.levels)][:6]


def test_batches_hold_one_length_and_every_prompt_once() -> None:
    prompts = [np.zeros(length, dtype=np.int64) for length in (3, 5, 3, 3, 5, 2)]
    groups = list(batches_of_equal_length(prompts, 2))
    assert sorted(itertools.chain(*groups)) == list(range(6))
    assert all(len(group) <= 2 and len({len(prompts[index]) for index in group}) == 1 for group in groups)
