"""The teacher's beams and log-probabilities against whole passes, one path at a time; and a writing that was killed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import PreTrainedModel

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.search.scoring import ScoringRule
from atspeed.training.beams import BeamSearch
from atspeed.training.evaluate import ModelRecommender
from atspeed.training.prompt_trees import PromptTrees
from atspeed.training.sequences import Sequencer, Spelling
from atspeed.training.teacher import Teacher, TeacherShard, TrainingPrompts, shards, tree_nodes, write_teacher_data
from tests.bundles import random_model

RNG = np.random.default_rng(3)
SIZES = (3, 4, 5)
PATHS = np.unique(RNG.integers(SIZES, size=(30, 3)), axis=0)
CATALOGUE = Catalogue.build([f"i{index}" for index in range(len(PATHS))], PATHS, SIZES)
TRIE = CATALOGUE.trie
SPELLING = Spelling(
    code_tokens=tuple(RNG.permutation(np.arange(2, 2 + sum(SIZES))).tolist()),
    prompt=PromptTemplate(prefix=(1,), max_items=4, drop_block=2),
    pad_token=0,
    vocab_size=16,
)
SEQUENCER = Sequencer.of(SPELLING, CATALOGUE, predict_first=True)
HISTORIES = [RNG.integers(len(PATHS), size=length) for length in (7, 1, 3, 5)]


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model("llama", 16, 1, hidden_size=16, intermediate_size=32)


@pytest.fixture
def teacher(model: PreTrainedModel) -> Teacher:
    return Teacher(model, SEQUENCER, CATALOGUE, ScoringRule.VOCAB, beams=4)


def training_prompts(limit: int = 100) -> TrainingPrompts:
    return TrainingPrompts.draw(HISTORIES, allow_empty=True, limit=limit, seed=1)


@torch.inference_mode()
def logits_after(model: PreTrainedModel, prompt: npt.NDArray[np.int64], node: int) -> torch.Tensor:
    """One whole pass over a prompt and a node's path. [V]"""
    columns = [int(TRIE.codebook_offset[level]) + code for level, code in enumerate(TRIE.path(node))]
    tokens = [*prompt.tolist(), *(SPELLING.code_tokens[column] for column in columns)]
    found: torch.Tensor = model(input_ids=torch.tensor([tokens])).logits[0, -1]
    return found


def some_trees(prompts: TrainingPrompts) -> npt.NDArray[np.int64]:
    """Random beams and the gold leaves."""
    leaves = np.arange(*TRIE.level_start[-2:])
    beams = np.full((len(prompts), 3, 4), -1)
    for row in range(len(prompts)):
        paths = np.random.default_rng(row).choice(leaves, size=1 + row % 4, replace=False)
        beams[row, 2, : len(paths)] = paths
        beams[row, 1, : len(paths)] = TRIE.parent[paths]
        beams[row, 0, : len(paths)] = TRIE.parent[TRIE.parent[paths]]
    gold = CATALOGUE.leaf_of(np.array([prompts.gold(row) for row in range(len(prompts))]))
    return tree_nodes(TRIE, beams, gold)


def test_one_pass_over_prompts_of_all_lengths_is_one_pass_per_path(model: PreTrainedModel) -> None:
    """1e-4: float32 sums in another order."""
    prompts = training_prompts()
    nodes = some_trees(prompts)
    tokens = [SEQUENCER.prompt(prompts.history(row)) for row in range(len(prompts))]
    trees = PromptTrees.of(tokens, nodes, TRIE, SPELLING)
    with torch.inference_mode():
        together = model(**trees.inputs(torch.float32), use_cache=False).logits
    assert together.shape == (*nodes.shape, 16)
    for row, prompt in enumerate(tokens):
        for place, node in enumerate(nodes[row][nodes[row] >= 0].tolist()):
            torch.testing.assert_close(together[row, place], logits_after(model, prompt, node), rtol=0, atol=1e-4)


def test_a_node_needs_its_parent() -> None:
    orphan = np.array([[0, int(TRIE.level_start[2])]])
    with pytest.raises(ValueError, match="a node or its parent is missing"):
        PromptTrees.of([np.array([1])], orphan, TRIE, SPELLING)


def test_the_tree_is_every_prefix_of_beams_and_gold() -> None:
    leaves = np.arange(*TRIE.level_start[-2:])
    beams = np.array([[[-1, -1], [-1, -1], [-1, -1]], [[1, 2], [int(TRIE.level_start[2]), -1], [-1, -1]]])
    nodes = tree_nodes(TRIE, beams, leaves[[0, 0]])
    prefixes = {0, int(TRIE.parent[leaves[0]]), int(TRIE.parent[TRIE.parent[leaves[0]]])}
    assert nodes[0].tolist() == [*sorted(prefixes), *[-1] * (nodes.shape[1] - 3)]
    assert set(nodes[1].tolist()) == prefixes | {1, 2, int(TRIE.level_start[2])}


@pytest.mark.parametrize("of_draft", [False, True], ids=["own beams", "a draft's beams"])
def test_shard_holds_the_beams_and_the_log_probabilities_along_them(
    teacher: Teacher, model: PreTrainedModel, of_draft: bool
) -> None:
    """float16 keeps 11 bits: 5e-3 of log-probabilities down to -10. A draft has a spelling of its own."""
    prompts, searched, asked = training_prompts(), model, SEQUENCER
    if of_draft:
        searched = random_model("llama", 20, 2, hidden_size=16, intermediate_size=32)
        other = {"code_tokens": tuple(token + 3 for token in SPELLING.code_tokens), "vocab_size": 20}
        asked = Sequencer.of(SPELLING.model_copy(update=other), CATALOGUE, predict_first=True)
        teacher = replace(teacher, draft=ModelRecommender(searched, asked, CATALOGUE, ScoringRule.VOCAB))
    shard = teacher.shard(prompts, 0, len(prompts))
    search = BeamSearch(searched, asked.spelling, TRIE, ScoringRule.VOCAB, 4)
    nodes = tree_nodes(TRIE, shard.beams, shard.gold)
    for row in range(len(prompts)):
        prompt = SEQUENCER.prompt(prompts.history(row))
        for level, node in enumerate(search(asked.prompt(prompts.history(row))[None]).node):
            np.testing.assert_array_equal(shard.beams[row, level, : node.shape[1]], node[0].numpy())
        expected = []
        for node in nodes[row][nodes[row] >= 0].tolist():
            logp = logits_after(model, prompt, node).log_softmax(-1)
            expected += [float(logp[SPELLING.code_tokens[int(column)]]) for column in TRIE.column(TRIE.children(node))]
        found = shard.logp[shard.start[row] : shard.start[row + 1]]
        np.testing.assert_allclose(found.astype(np.float64), expected, atol=5e-3, rtol=1e-3)


def test_prompts_are_every_place_of_every_history() -> None:
    prompts = training_prompts()
    assert sorted(map(tuple, prompts.chosen.tolist())) == [(h, c) for h, n in enumerate((7, 1, 3, 5)) for c in range(n)]
    for row, (history, cut) in enumerate(prompts.chosen.tolist()):
        np.testing.assert_array_equal(prompts.history(row), HISTORIES[history][:cut])
        assert prompts.gold(row) == HISTORIES[history][cut]
    np.testing.assert_array_equal(training_prompts(6).chosen, prompts.chosen[:6])
    without_empty = TrainingPrompts.draw(HISTORIES, allow_empty=False, limit=100, seed=1)
    assert len(without_empty) == len(prompts) - len(HISTORIES)
    assert without_empty.chosen[:, 1].min() == 1


def test_killed_teacher_is_resumed_to_the_same_files(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the third shard is written: the first two stay untouched, no half shard is ever taken for a whole one."""
    prompts = training_prompts()
    write_teacher_data(teacher, prompts, tmp_path / "whole", shard=4)
    save = TeacherShard.save

    def dies(shard: TeacherShard, path: Path) -> None:
        if path.stem == "000000008":
            path.with_suffix(".partial").write_bytes(b"half")
            raise KeyboardInterrupt
        save(shard, path)

    with monkeypatch.context() as patch:
        patch.setattr(TeacherShard, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            write_teacher_data(teacher, prompts, tmp_path / "killed", shard=4)
    kept = {path: path.stat().st_mtime_ns for path in shards(tmp_path / "killed").values()}
    assert len(kept) == 2
    write_teacher_data(teacher, prompts, tmp_path / "killed", shard=4)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    whole, resumed = shards(tmp_path / "whole"), shards(tmp_path / "killed")
    assert list(whole) == list(resumed) == [0, 4, 8, 12]
    assert [path.read_bytes() for path in whole.values()] == [path.read_bytes() for path in resumed.values()]
    assert not list(tmp_path.rglob("*.partial"))
    assert [len(TeacherShard.load(path)) for path in whole.values()] == [4, 4, 4, 4]
