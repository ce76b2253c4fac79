"""The batched trie beam search against the plainest one: every path read whole by the model, one at a time."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.search.scoring import ScoringRule
from atspeed.engine.search.trie import Pruning
from atspeed.training.beams import BeamSearch, batches_of_equal_length
from atspeed.training.sequences import Spelling
from tests.bundles import random_model

SIZES = (3, 5, 4)
VOCABULARY = 2 + sum(SIZES) + 3
RNG = np.random.default_rng(5)
PATHS = np.array([path for path in itertools.product(*map(range, SIZES)) if RNG.random() < 0.4])
CATALOGUE = Catalogue.build([str(index) for index in range(len(PATHS))], PATHS, SIZES)
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


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model("llama", VOCABULARY, 1, hidden_size=16, intermediate_size=32)


@torch.inference_mode()
def naive(
    model: PreTrainedModel, prompt: npt.NDArray[np.int64], rule: ScoringRule, width: int, live: set[int]
) -> list[list[tuple[int, float]]]:
    """Beam search with one whole forward pass per beam, over the paths of the `live` nodes: (node, score) per level."""
    beams = [(0, 0.0)]
    levels = []
    for _ in range(TRIE.levels):
        found = []
        for node, score in beams:
            columns = [int(TRIE.column(np.array([ancestor]))[0]) for ancestor in _ancestors(node)]
            tokens = [*prompt.tolist(), *(SPELLING.code_tokens[column] for column in columns)]
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1].double()
            children = TRIE.children(node)
            child_logits = logits[[SPELLING.code_tokens[int(column)] for column in TRIE.column(children)]]
            normaliser = {
                ScoringRule.VOCAB: logits,
                ScoringRule.TRIE: child_logits,
                ScoringRule.CODES: logits[list(SPELLING.code_tokens)],
            }
            logp = child_logits - normaliser[rule].logsumexp(0)
            found += [
                (int(child), score + float(value))
                for child, value in zip(children, logp, strict=True)
                if int(child) in live
            ]
        beams = sorted(found, key=lambda beam: (-beam[1], beam[0]))[:width]
        levels.append(beams)
    return levels


def _ancestors(node: int) -> list[int]:
    """From level 1 down to the node itself."""
    chain = []
    while node:
        chain.append(node)
        node = int(TRIE.parent[node])
    return chain[::-1]


def check(model: PreTrainedModel, rule: ScoringRule, width: int, prunings: list[Pruning] | None = None) -> None:
    beams = BeamSearch(model, SPELLING, TRIE, rule, width)(PROMPTS, prunings)
    for row, prompt in enumerate(PROMPTS):
        live = _live(prunings[row]) if prunings else set(range(TRIE.nodes))
        for level, expected in enumerate(naive(model, prompt, rule, width, live)):
            nodes = beams.node[level][row]
            assert nodes[nodes >= 0].tolist() == [node for node, _ in expected]
            scores = beams.score[level][row][nodes >= 0].numpy()
            np.testing.assert_allclose(scores, [score for _, score in expected], atol=1e-4)


def _live(pruning: Pruning) -> set[int]:
    cut = set(pruning.cut.tolist())
    return {node for node in range(TRIE.nodes) if cut.isdisjoint({0, *_ancestors(node)})}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("width", [1, 2, 4, 100])
def test_beams_equal_those_of_one_pass_per_beam(model: PreTrainedModel, rule: ScoringRule, width: int) -> None:
    """Width 100 holds every path, so that the result is the ranking of the whole catalogue."""
    check(model, rule, width)


@pytest.mark.parametrize("rule", RULES)
def test_excluded_items_are_never_found_and_change_no_score(model: PreTrainedModel, rule: ScoringRule) -> None:
    prunings = [CATALOGUE.pruning(excluded=np.arange(0, CATALOGUE.items, step)) for step in (1 + 1, 3, 5, 7)]
    check(model, rule, 4, prunings)


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
