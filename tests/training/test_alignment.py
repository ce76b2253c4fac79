"""Batches of prompts and trees against the shards they come from, and the losses picked from them."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.search.scoring import ScoringRule
from atspeed.training.alignment import AlignmentObjective, level_rows
from atspeed.training.alignment_batches import AlignmentBatch, AlignmentBatches, _Group
from atspeed.training.recipe import Alignment, AlignmentLoss
from atspeed.training.sequences import Batch, Sequencer, Spelling
from atspeed.training.teacher import Teacher, TeacherShard, TrainingPrompts, tree_nodes, write_teacher_data
from atspeed.training.trainer import cross_entropy
from tests.bundles import random_model

LOSSES: tuple[AlignmentLoss, ...] = get_args(AlignmentLoss)
RNG = np.random.default_rng(4)
SIZES = (3, 4, 5)
PATHS = np.unique(RNG.integers(SIZES, size=(30, 3)), axis=0)
CATALOGUE = Catalogue.build([f"i{index}" for index in range(len(PATHS))], PATHS, SIZES)
TRIE = CATALOGUE.trie
PROMPT = PromptTemplate(prefix=(1,), max_items=4, drop_block=2)
TARGET_SPELLING = Spelling(code_tokens=tuple(range(13, 1, -1)), prompt=PROMPT, pad_token=0, vocab_size=16)
DRAFT_SPELLING = Spelling(code_tokens=tuple(range(4, 16)), prompt=PROMPT, pad_token=0, vocab_size=16)
HISTORIES = [RNG.integers(len(PATHS), size=length) for length in (7, 1, 3, 5)]
PROMPTS = TrainingPrompts.draw(HISTORIES, allow_empty=True, limit=100, seed=1)


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def model(seed: int) -> PreTrainedModel:
    return random_model(
        "llama", 16, seed, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )


def sequencer(spelling: Spelling) -> Sequencer:
    return Sequencer.of(spelling, CATALOGUE, predict_first=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher data in four shards."""
    made = tmp_path_factory.mktemp("teacher")
    teacher = Teacher(model(1), sequencer(TARGET_SPELLING), CATALOGUE, ScoringRule.VOCAB, beams=4)
    write_teacher_data(teacher, PROMPTS, made, shard=5)
    return made


def batches(folder: Path, spelling: Spelling = DRAFT_SPELLING, size: int = 3) -> AlignmentBatches:
    return AlignmentBatches(folder, PROMPTS, sequencer(spelling), TRIE, size, seed=1)


def draft_logits(draft: PreTrainedModel, batch: AlignmentBatch) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = draft(**batch.inputs(torch.float32), use_cache=False).logits
    return logits


def objective(**settings: Any) -> AlignmentObjective:
    return AlignmentObjective(Alignment(**settings), ScoringRule.VOCAB)


def test_an_epoch_holds_every_prompt_once(folder: Path) -> None:
    """Prompts are told apart by the gold item and the prompt's tokens; the epoch's order is its own."""

    def prompts(epoch: int) -> list[tuple[int, ...]]:
        return [
            (*tokens[tokens > 0].tolist(), *gold)
            for batch in batches(folder)(epoch)
            for tokens, gold in zip(
                batch.trees.tokens[:, : 1 - batch.trees.nodes], batch.gold.token[:, 0].tolist(), strict=True
            )
        ]

    spelled = sequencer(DRAFT_SPELLING)
    expected = [
        (*spelled.prompt(PROMPTS.history(row)).tolist(), *spelled.item_tokens[PROMPTS.gold(row)].tolist())
        for row in range(len(PROMPTS))
    ]
    assert sorted(prompts(0)) == sorted(expected)
    assert prompts(0) == prompts(0) != prompts(1)
    assert len(batches(folder)(0)) == 7  # shards of 5, 5, 5 and 1 prompts, in batches of 3
    assert len(batches(folder)(0)[2:4]) == 2


def test_batch_holds_the_values_of_its_shard(folder: Path) -> None:
    """Written out node by node, in the draft's spelling, which is not the target's."""
    made = batches(folder)
    for group in made._groups(0, np.random.default_rng(0)):
        batch, shard = made._batch(group), TeacherShard.load(folder / "000000000.safetensors")
        for row, place in enumerate(group.places.tolist()):
            nodes = tree_nodes(TRIE, shard.beams[[place]], shard.gold[[place]])[0].tolist()
            told = iter(shard.logp[shard.start[place] : shard.start[place + 1]].tolist())
            prefixes = [TRIE.path(int(shard.gold[place]))[:depth] for depth in range(3)]
            for depth, level in enumerate(batch.levels):
                here = [at for at, node in enumerate(nodes) if TRIE.depth(np.array([node]))[0] == depth]
                assert level.row[row, : len(here)].tolist() == here
                for slot, at in enumerate(here):
                    children, kept = TRIE.children(nodes[at]), level.allowed[row, slot]
                    assert kept.sum() == len(children)
                    expected = [DRAFT_SPELLING.code_tokens[int(column)] for column in TRIE.column(children)]
                    assert level.token[row, slot][kept].tolist() == expected
                    assert level.target[row, slot][kept].tolist() == [next(told) for _ in children]
                    wanted = [child in shard.beams[place, depth] for child in children]
                    assert level.wanted[row, slot][kept].tolist() == wanted
                    assert bool(level.on_beam[row, slot]) == (nodes[at] == 0 or nodes[at] in shard.beams[place, :-1])
                    assert bool(level.on_gold[row, slot]) == (TRIE.path(nodes[at]) in prefixes)
                assert not level.ended.any()
                for part in (level.allowed, level.wanted, level.on_beam, level.on_gold):
                    assert not part[row, len(here) :].any()
            assert next(told, None) is None
            for path, leaf in enumerate(shard.beams[place, -1].tolist()):
                assert batch.beams.scored[row, path].tolist() == [leaf >= 0] * 3
                found = [TRIE.path(nodes[at]) for at in batch.beams.row[row, path].tolist()]
                assert leaf < 0 or found == [TRIE.path(leaf)[:depth] for depth in range(3)]


def test_alignment_without_a_loss_is_the_cross_entropy_of_the_next_item(folder: Path) -> None:
    """The same number as from whole sequences, prompt and item, the way a draft without alignment is trained."""
    draft, made, spelled = model(2), batches(folder), sequencer(DRAFT_SPELLING)
    for group in made._groups(1, np.random.default_rng(0)):
        batch = made._batch(group)
        rows = [made._shards[1][0][place] for place in group.places]
        whole = Batch.of([spelled.last_of(PROMPTS.history(row), PROMPTS.gold(row)) for row in rows], 0)
        with torch.inference_mode():
            expected = cross_entropy(draft(input_ids=whole.tokens).logits, whole)
        found = objective()(draft_logits(draft, batch), batch)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss not in ("seq-kd", "coverage")])
def test_draft_equal_to_the_target_has_no_alignment_loss(folder: Path, loss: AlignmentLoss) -> None:
    """Up to float16 on disk; atspeed-s without its density term, which is no distance. Another model has some loss."""
    asked = objective(loss=loss, density=0.0, beams=4)
    for batch in batches(folder, TARGET_SPELLING)(0):
        assert asked.alignment(draft_logits(model(1), batch), batch).item() == pytest.approx(0.0, abs=2e-3)
        assert asked.alignment(draft_logits(model(2), batch), batch).item() > 0.02


def test_total_loss_is_the_weighted_sum(folder: Path) -> None:
    batch = batches(folder)(0)[0]
    logits = draft_logits(model(2), batch)
    gold = objective()(logits, batch)
    for loss in LOSSES:
        asked = objective(loss=loss, weight=0.25)
        expected = 0.75 * gold + 0.25 * asked.alignment(logits, batch)
        torch.testing.assert_close(asked(logits, batch), expected)


def test_padding_changes_nothing(folder: Path) -> None:
    """Prompts one by one and all together: the mean over the positions weighs each prompt by its positions."""
    asked, draft, made = objective(loss="atspeed-s", beams=4), model(2), batches(folder)
    together = made._batch(_Group(0, np.arange(5)))
    alone = [made._batch(_Group(0, np.array([place]))) for place in range(5)]
    assert len({one.trees.tokens.shape for one in alone}) > 1
    weights = [sum(int(level.on_beam.sum()) for level in one.levels) for one in alone]
    values = [asked.alignment(draft_logits(draft, one), one).item() for one in alone]
    found = asked.alignment(draft_logits(draft, together), together).item()
    assert found == pytest.approx(np.average(values, weights=weights), abs=1e-5)


def test_batch_moves_to_a_device_completely(folder: Path) -> None:
    moved = batches(folder)(0)[0].to(torch.device("meta"))
    tensors = (moved.trees.sees, moved.gold.row, *(level.token for level in moved.levels))
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize("rule", list(ScoringRule))
def test_a_level_is_all_children_of_the_targets_beams_with_their_whole_scores(
    folder: Path, tmp_path: Path, rule: ScoringRule
) -> None:
    """Against whole passes, path by path; the target's are as exact as three float16 numbers together, 2e-2."""
    if rule is ScoringRule.CODES:  # the others renormalise what is there
        teacher = Teacher(model(1), sequencer(TARGET_SPELLING), CATALOGUE, rule, beams=4)
        write_teacher_data(teacher, PROMPTS, folder := tmp_path, shard=5)
    draft, target, made = model(2), model(1), batches(folder, TARGET_SPELLING)
    shard = TeacherShard.load(folder / "000000000.safetensors")
    batch = made._batch(_Group(0, np.arange(5)))
    rows = level_rows(draft_logits(draft, batch), batch, rule)
    assert len(rows) == 2
    for level in range(2):
        for place in range(5):
            prompt = made.sequencer.prompt(PROMPTS.history(place))
            beams = [node for node in shard.beams[place, level - 1].tolist() if node >= 0] if level else [0]
            children = sorted(int(child) for beam in beams for child in TRIE.children(beam))
            row = rows[level]
            kept = row.allowed[place]
            wanted = [child in shard.beams[place, level] for child in children]
            assert row.wanted[place][kept].tolist() == wanted
            for scores, asked, tolerance in ((row.draft, draft, 1e-4), (row.target, target, 2e-2)):
                expected = [path_score(asked, prompt.tolist(), child, rule) for child in children]
                np.testing.assert_allclose(scores[place][kept].numpy(), expected, atol=tolerance)
    assert not any((row.wanted & ~row.allowed).any() for row in rows)


@torch.inference_mode()
def path_score(asked: PreTrainedModel, prompt: list[int], node: int, rule: ScoringRule) -> float:
    """Summed log-probability of a node's path after a prompt, one whole pass."""
    path = TRIE.path(node)
    tokens = [TARGET_SPELLING.code_tokens[int(TRIE.codebook_offset[level]) + code] for level, code in enumerate(path)]
    logits = asked(input_ids=torch.tensor([prompt + tokens])).logits[0].double()
    total = 0.0
    for level in range(len(path)):
        at = logits[len(prompt) - 1 + level]
        above = TRIE.find(path[:level])
        assert above is not None
        siblings = [TARGET_SPELLING.code_tokens[int(column)] for column in TRIE.column(TRIE.children(above))]
        normaliser = {"vocab": at, "trie": at[siblings], "codes": at[list(TARGET_SPELLING.code_tokens)]}[rule]
        total += float(at[tokens[level]] - normaliser.logsumexp(0))
    return total


@pytest.mark.parametrize("loss", [*LOSSES, None])
def test_places_after_the_end_of_a_path_count_in_no_loss(tmp_path: Path, loss: AlignmentLoss | None) -> None:
    """The same paths with an ended level behind them; whole levels are then one more, so they are compared apart."""
    ended = Catalogue.build(
        [CATALOGUE.id_of(item) for item in range(CATALOGUE.items)],
        np.column_stack([CATALOGUE.codes, np.full(CATALOGUE.items, -1)]),
        (*SIZES, 1),
    )
    found = []
    for catalogue, folder in ((CATALOGUE, tmp_path / "whole"), (ended, tmp_path / "ended")):
        extra = catalogue.trie.columns - TRIE.columns
        spelling = TARGET_SPELLING.model_copy(update={"code_tokens": (*TARGET_SPELLING.code_tokens, *[14] * extra)})
        spelled = Sequencer.of(spelling, catalogue, predict_first=True)
        write_teacher_data(Teacher(model(1), spelled, catalogue, ScoringRule.VOCAB, beams=4), PROMPTS, folder)
        made = AlignmentBatches(folder, PROMPTS, spelled, catalogue.trie, 16, seed=1)
        batch = made._batch(_Group(0, np.arange(len(PROMPTS))))
        logits = draft_logits(model(2), batch)
        if loss in {"level-kd", "coverage"}:
            rows = level_rows(logits, batch, ScoringRule.VOCAB)[:2]
            found.append(torch.cat([part[row.allowed] for row in rows for part in (row.draft, row.target, row.wanted)]))
        else:
            found.append(objective(loss=loss, beams=4)(logits, batch))
    torch.testing.assert_close(*found)


def test_ended_paths_keep_their_scores(tmp_path: Path) -> None:
    """A level of ended and of real places: the draft's and the target's score of an ended one is that of its path."""
    paths = np.array([(0, -1, -1), (1, 0, -1), (1, 1, 0), (1, 1, 2), (2, 3, 4)])
    catalogue = Catalogue.build(list("abcde"), paths, SIZES)
    spelled = Sequencer.of(TARGET_SPELLING, catalogue, predict_first=True)
    prompts = TrainingPrompts.draw([np.arange(5)], allow_empty=True, limit=9, seed=1)
    write_teacher_data(Teacher(model(1), spelled, catalogue, ScoringRule.VOCAB, beams=5), prompts, tmp_path)
    batch = AlignmentBatches(tmp_path, prompts, spelled, catalogue.trie, 9, seed=1)(0)[0]
    first, second = level_rows(draft_logits(model(2), batch), batch, ScoringRule.VOCAB)
    for one, two in ((first.draft, second.draft), (first.target, second.target)):
        # The first child of the second level is the ended place below the first node of the first level.
        torch.testing.assert_close(two[:, 0], one[:, 0])
    assert batch.levels[1].ended.tolist() == [[True, False, False]] * 5
    assert batch.beams.scored.sum().item() == 5 * int((paths >= 0).sum())
