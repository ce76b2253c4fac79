"""A draft with heads: its logits by hand, the same in sequences, trees and searches, and the way from a recipe to a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import LEVEL_HEADS
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.model.decoder import RuntimeOptions
from atspeed.engine.model.level_heads import head_file
from atspeed.engine.model.loading import load_decoder
from atspeed.engine.search.scoring import ScoringRule
from atspeed.engine.search.trie import ROOT
from atspeed.training.beams import BeamSearch
from atspeed.training.errors import ExportError, RecipeError
from atspeed.training.level_heads import LevelHeadsModel
from atspeed.training.level_heads_export import export_level_heads
from atspeed.training.pipeline import train
from atspeed.training.pretrained import load_checkpoint
from atspeed.training.prompt_trees import PromptTrees
from atspeed.training.recipe import Recipe, read_recipe
from atspeed.training.sequences import Spelling
from tests.bundles import BOS, SPECIALS, random_heads
from tests.catalogues import random_catalogue
from tests.recipes import short_recipe

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SIZES = (6, 5, 4)
CATALOGUE = random_catalogue(40, SIZES, seed=3)
SPELLING = Spelling(
    code_tokens=tuple(range(SPECIALS, SPECIALS + sum(SIZES))),
    prompt=PromptTemplate(prefix=(BOS,), max_items=8),
    pad_token=0,
    vocab_size=SPECIALS + sum(SIZES),
)
SECTION = """
[draft.heads]
size = 8

[draft.pretraining]
epochs = 1
batch_size = 16

[draft.alignment]
loss = "level-kd"
weight = 1.0
beams = 5
budget = 10
prompts = 100
"""


@pytest.fixture(scope="module")
def model() -> LevelHeadsModel:
    return random_heads(CATALOGUE, seed=1)


@torch.inference_mode()
def by_hand(model: LevelHeadsModel, prompt: list[int], path: list[int]) -> Tensor:
    """Log-probabilities of the next code's level, written out from the formula in the module's docstring."""
    state = model.model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
    if not path:
        first: Tensor = model.lm_head(state)
        return first.log_softmax(0)[SPECIALS : SPECIALS + SIZES[0]]
    head, level = model.head(len(path)), len(path)
    summed = torch.stack([model.path_norm(model.model.embed_tokens.weight[token]) for token in path]).sum(0)
    gate, up = (head.of_state.weight @ state + head.of_path.weight @ summed).chunk(2)
    normed = head.norm(state + head.down_proj.weight @ (functional.silu(gate) * up))
    start = SPECIALS + sum(SIZES[:level])
    logits: Tensor = model.lm_head.weight[start : start + SIZES[level]] @ normed
    return logits.log_softmax(0)


def of_level(logits: Tensor, level: int) -> Tensor:
    first = SPECIALS + sum(SIZES[:level])
    return logits.log_softmax(-1)[..., first : first + SIZES[level]]


def tokens(node: int) -> list[int]:
    """The tokens of a node's path."""
    trie, path = CATALOGUE.trie, []
    while node != ROOT:
        path.append(SPECIALS + int(trie.column(np.array([node]))[0]))
        node = int(trie.parent[node])
    return path[::-1]


def test_sequence_has_the_logits_of_every_prompt_in_it(model: LevelHeadsModel) -> None:
    """Each item of a sequence is predicted from the items before it, also after an item without its last code."""
    items = [tokens(int(leaf)) for leaf in CATALOGUE.trie.level_start[3] + np.array([0, 4, 9])]
    items[1] = items[1][:2]
    sequence = [BOS, *(token for item in items for token in item)]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([sequence])).logits[0]
    place = 0
    for count, item in enumerate(items):
        before = [BOS, *(token for earlier in items[:count] for token in earlier)]
        for level in range(len(item)):
            assert torch.allclose(of_level(logits[place], level), by_hand(model, before, item[:level]), atol=1e-4)
            place += 1


def test_tree_has_the_logits_of_every_path_alone(model: LevelHeadsModel) -> None:
    """Prompts of two lengths, and a tree with fewer nodes than the other."""
    prompts = [np.array([BOS, 3, 9, 14]), np.array([BOS])]
    trie = CATALOGUE.trie
    first = trie.children(ROOT)[:2]
    below = trie.children(int(first[0]))[:2]
    nodes = np.array([[ROOT, *first, *below], [ROOT, first[1], -1, -1, -1]])
    trees = PromptTrees.of(prompts, nodes, trie, SPELLING)
    with torch.inference_mode():
        logits = model(**trees.inputs(torch.float32)).logits
    for row, prompt in enumerate(prompts):
        for place, node in enumerate(nodes[row]):
            if node >= 0:
                path = tokens(int(node))
                expected = by_hand(model, prompt.tolist(), path)
                assert torch.allclose(of_level(logits[row, place], len(path)), expected, atol=1e-4)


def test_beam_search_scores_paths_by_the_heads(model: LevelHeadsModel) -> None:
    prompt = np.array([BOS, 3, 9, 14])
    found = BeamSearch(model, SPELLING, CATALOGUE.trie, ScoringRule.VOCAB, width=1000)(prompt[None])
    real = found.node[-1][0] >= 0
    for node, score in zip(found.node[-1][0][real].tolist(), found.score[-1][0][real].tolist(), strict=True):
        path = tokens(node)
        steps = [
            by_hand(model, prompt.tolist(), path[:level])[path[level] - SPECIALS - sum(SIZES[:level])]
            for level in range(3)
        ]
        assert score == pytest.approx(float(sum(steps)), abs=1e-3)
    assert int(real.sum()) == CATALOGUE.trie.level_start[4] - CATALOGUE.trie.level_start[3]


def test_checkpoint_is_the_same_model(model: LevelHeadsModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    read = load_checkpoint(tmp_path)
    assert isinstance(read, LevelHeadsModel)
    prompt = torch.tensor([[BOS, 3, 9, 14]])
    with torch.inference_mode():
        assert torch.equal(read(input_ids=prompt).logits, model(input_ids=prompt).logits)


def test_export_of_other_weights_is_refused(
    model: LevelHeadsModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that lacks the path is found by the comparison with the checkpoint."""
    embedded = LevelHeadsModel.embedded
    called = iter(range(2))

    def forgotten(draft: LevelHeadsModel, given: Tensor) -> Tensor:
        """Embed nothing while the graphs are written."""
        return embedded(draft, given) * (0 if next(called, None) is not None else 1)

    monkeypatch.setattr(LevelHeadsModel, "embedded", forgotten)
    with pytest.raises(ExportError, match=rf"{head_file(1)}: differs from its checkpoint"):
        export_level_heads(model, tmp_path, code_tokens=SPELLING.code_tokens)


def recipe(folder: Path, section: str) -> Recipe:
    path = folder / "tiny.toml"
    path.write_text(short_recipe(section))
    return read_recipe(path)


def test_recipe_trains_a_draft_with_heads_into_a_bundle(tmp_path: Path) -> None:
    bundle = Bundle(train(recipe(tmp_path, SECTION), tmp_path / "run", threads=1))
    bundle.verify()
    entry = bundle.model("draft")
    assert (entry.draft_kind, entry.heads) == (LEVEL_HEADS, ("draft/head1.onnx", "draft/head2.onnx"))
    assert entry.device_graph is None
    assert entry.plan_scale is not None
    checkpoint = load_checkpoint(tmp_path / "run" / "draft-checkpoint")
    assert entry.parameters == sum(parameter.numel() for parameter in checkpoint.parameters())
    load_decoder(bundle, "draft", RuntimeOptions())


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ("[draft.heads]\nsize = 0", "draft.heads.size"),
        (
            "[draft]\nprecision = 'int8'\n[draft.heads]\nsize = 8",
            "precision: a draft with heads is exported in float32",
        ),
    ],
)
def test_bad_heads_are_named(tmp_path: Path, section: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        recipe(tmp_path, section)
