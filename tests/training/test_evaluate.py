"""Measures by hand, baselines on a few users, and a model's ranking against that of all items scored one by one."""

import numpy as np
import pytest
import torch

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.search.scoring import ScoringRule
from atspeed.training.data import Case, CatalogueItem, Dataset, SplitName
from atspeed.training.evaluate import (
    EvalExample,
    ModelRecommender,
    agreement,
    eval_examples,
    item_knn,
    metrics,
    popularity,
    rank_by,
)
from atspeed.training.models import build_model
from atspeed.training.recipe import ModelRecipe, PromptWindow, Schedule, Shape
from atspeed.training.sequences import Sequencer

CODES = np.array([[0, 0], [0, 1], [0, 1], [1, 0], [1, 2], [2, 2]])
IDS = ["a", "b", "c", "d", "e", "f"]
CATALOGUE = Catalogue.build(IDS, CODES, [3, 3])


def question(history: str, targets: str) -> EvalExample:
    return EvalExample(CATALOGUE.find(list(history)), tuple(CATALOGUE.find(list(targets)).tolist()))


def dataset(train: dict[str, str], valid: dict[str, str] | None = None) -> Dataset:
    items = tuple(CatalogueItem(item) for item in IDS)
    split = {user: tuple(history) for user, history in (valid or {}).items()}
    return Dataset("made", "", items, {user: tuple(history) for user, history in train.items()}, split, {})


def test_measures_by_hand() -> None:
    """Ranking d, a, f: of the targets {a, f}, both are among the first 5, at places 2 and 3."""
    ranking = CATALOGUE.find(["d", "a", "f"]).tolist()
    found = metrics([ranking, []], [question("b", "af"), question("b", "c")])
    gain = (1 / np.log2(3) + 1 / np.log2(4)) / (1 + 1 / np.log2(3))
    assert found["recall@5"] == pytest.approx(1.0 / 2)
    assert found["ndcg@10"] == pytest.approx(gain / 2)


def test_more_targets_than_places() -> None:
    """ndcg is 1 when every place holds a target, recall is not."""
    found = metrics([list(range(5))], [EvalExample(np.array([9]), tuple(range(8)))])
    assert found["ndcg@5"] == pytest.approx(1.0)
    assert found["recall@5"] == pytest.approx(5 / 8)


@pytest.mark.parametrize("rule", list(ScoringRule))
@pytest.mark.parametrize("exclude_seen", [False, True])
def test_a_models_ranking_is_that_of_all_items(rule: ScoringRule, *, exclude_seen: bool) -> None:
    """Items b and c share a path: they score alike and stand in id order; with b seen, the path stays for c."""
    shape = Shape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1, tie_embeddings=False)
    spelled = build_model(
        ModelRecipe(shape=shape, schedule=Schedule(epochs=1)), CATALOGUE, PromptWindow(max_items=3), 1
    )
    torch.nn.init.normal_(spelled.model.lm_head.weight)
    sequencer = Sequencer.of(spelled.spelling, CATALOGUE, predict_first=True)
    asked = [question("bd", "c"), question("", "a"), question("abcde", "f")]
    rankings = ModelRecommender(spelled.model, sequencer, CATALOGUE, rule).rank(asked, exclude_seen=exclude_seen)
    for ranking, asking in zip(rankings, asked, strict=True):
        seen = set(asking.history.tolist()) if exclude_seen else set()
        scores = {item: _score(spelled.model, sequencer, asking, item, rule) for item in range(6) if item not in seen}
        assert list(ranking) == sorted(scores, key=lambda item: (-round(scores[item], 4), item))


@torch.inference_mode()
def _score(model: torch.nn.Module, sequencer: Sequencer, asking: EvalExample, item: int, rule: ScoringRule) -> float:
    """Summed log-probability of an item's codes, from one pass over prompt and codes."""
    example = sequencer.last_of(asking.history, item)
    logits = model(input_ids=torch.from_numpy(example.tokens)[None]).logits[0]
    total, path = 0.0, CATALOGUE.codes[item]
    for level in range(2):
        at = logits[len(example.tokens) - 3 + level].double()
        siblings = {int(codes[level]) for codes in CATALOGUE.codes if (codes[:level] == path[:level]).all()}
        tokens = [sequencer.spelling.code_tokens[3 * level + code] for code in siblings]
        codes = list(sequencer.spelling.code_tokens)
        among = {ScoringRule.VOCAB: at, ScoringRule.TRIE: at[tokens], ScoringRule.CODES: at[codes]}[rule]
        total += float(at[example.tokens[len(example.tokens) - 2 + level]] - among.logsumexp(0))
    return total


@pytest.mark.parametrize(("before", "order"), [("valid", "abcdef"), ("test", "cabdef")])
def test_popularity_counts_everything_before_a_split(before: SplitName, order: str) -> None:
    """c is the most popular by the validation split's two, which what is trained does not see."""
    scorer = popularity(dataset({"1": "aab", "2": "c"}, {"2": "cc"}), CATALOGUE, before=before)
    best = rank_by(scorer, [question("a", "b")], exclude_seen=False)[0]
    assert [CATALOGUE.id_of(item) for item in best] == list(order)


def test_item_knn_recommends_cooccurring_items() -> None:
    """d stands beside a in two histories, b in one; only the newest item of the question counts."""
    scorer = item_knn(dataset({"1": "ad", "2": "ad", "3": "ab", "4": "ef"}), CATALOGUE, recent=1)
    best = rank_by(scorer, [question("fa", "d")], exclude_seen=True)[0]
    assert [CATALOGUE.id_of(item) for item in best[:2]] == ["d", "b"]


@pytest.mark.parametrize(("before", "next_item"), [("valid", "b"), ("test", "d")])
def test_item_knn_uses_the_validation_split_only_on_request(before: SplitName, next_item: str) -> None:
    """The validation's users, one of them unknown before, put d beside a three times."""
    learnt = dataset({"1": "ab", "2": "a"}, {"2": "d", "3": "ad", "4": "da"})
    best = rank_by(item_knn(learnt, CATALOGUE, recent=1, before=before), [question("a", "b")], exclude_seen=True)[0]
    assert CATALOGUE.id_of(best[0]) == next_item


def test_examples_without_a_history_need_allow_empty() -> None:
    cases = [Case("1", (), ("a",)), Case("2", ("a",), ("b",)), Case("3", ("b",), ("c",))]
    assert len(eval_examples(cases, CATALOGUE, allow_empty=True, limit=9, seed=1)) == 3
    assert [q.targets for q in eval_examples(cases, CATALOGUE, allow_empty=False, limit=9, seed=1)] == [(1,), (2,)]
    assert len(eval_examples(cases, CATALOGUE, allow_empty=True, limit=2, seed=1)) == 2


def test_agreement_by_hand() -> None:
    """The first question's level 1 lacks node 2, so that its whole level 2 does not help; level 3 never counts."""
    target = [np.array([[1, 2], [1, 3]]), np.array([[5, 6], [5, -1]]), np.array([[9, 9], [9, 9]])]
    draft = [np.array([[1, 3, 4], [3, 2, 1]]), np.array([[6, 5, 7], [5, 6, 7]]), np.array([[1, 1, 1], [1, 1, 1]])]
    found = agreement(target, draft)
    assert (found["level1.covered"], found["level1.whole"]) == (0.75, 0.5)
    assert (found["level2.covered"], found["level2.whole"]) == (1.0, 1.0)
    assert found["accepted"] == 1.0
