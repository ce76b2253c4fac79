"""Scales of plans, against the plans that the draft service really makes."""

from __future__ import annotations

import asyncio
from itertools import product

import numpy as np
import pytest

from atspeed.engine.arrays import Int64
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import PlanSize, Proposal, free_nodes
from atspeed.engine.search.scoring import ScoringRule
from atspeed.engine.search.trie import Pruning
from atspeed.training.calibration import Calibration, _plan
from atspeed.training.evaluate import EvalExample, ModelRecommender
from atspeed.training.sequences import Sequencer, Spelling
from draft_service.draft_kinds import drafter_of
from draft_service.drafter import DraftRequest
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue
from tests.oracles.models import Models

SIZES = (PlanSize(BeamWidths.of(3), 20, 20), PlanSize(BeamWidths.of(5), 40, 40), PlanSize(BeamWidths.of(2), 4, 12))
ASKED = [EvalExample(np.random.default_rng(seed).integers(0, 60, 1 + seed % 8), targets=(seed,)) for seed in range(24)]

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(
    scope="module",
    params=[(rule, False) for rule in ScoringRule] + [(ScoringRule.VOCAB, True)],
    ids=lambda kind: f"{kind}",
)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The draft is a language model, or one with heads."""
    catalogue, (rule, heads) = random_catalogue(60, (6, 5, 4, 4), seed=4), request.param
    folder = tmp_path_factory.mktemp("bundle")
    return Models.load(write_bundle(folder, catalogue, rule=rule, draft_noise=0.05, draft_heads=heads))


def recommender(models: Models, role: str) -> ModelRecommender:
    entry = models.bundle.bundle.model("draft")  # spelled as the target
    spelling = Spelling(code_tokens=entry.code_tokens, prompt=entry.prompt, pad_token=0, vocab_size=entry.vocab_size)
    sequencer = Sequencer.of(spelling, models.catalogue, predict_first=False)
    model = models.bundle.draft if role == "draft" else models.bundle.target
    return ModelRecommender(model, sequencer, models.catalogue, models.rule)


def planned(models: Models, question: EvalExample, size: PlanSize, scales: tuple[float, ...]) -> Int64:
    """By the draft service's drafter, on the exported model."""

    async def plan(evaluator: TreeEvaluator) -> Int64:
        evaluator.entry = evaluator.entry.model_copy(update={"plan_scale": scales})
        drafter = drafter_of(evaluator)
        prompt = recommender(models, "draft").sequencer.prompt(question.history)
        order = DraftRequest(prompt, Beams.root(), size, Proposal.TOP, Pruning.none())
        made = await drafter.plan(order)
        await evaluator.close()
        return made.plan.node

    return asyncio.run(plan(models.evaluator("draft")))


@pytest.mark.parametrize("size", SIZES)
def test_tried_plan_equals_the_served_plan(models: Models, size: PlanSize) -> None:
    draft = recommender(models, "draft")
    lists = draft.search(ASKED, beams=60)[:3]
    for row, question in enumerate(ASKED[:8]):
        scales = (1.0, 0.5 + row / 4, 2.0)
        served = planned(models, question, size, scales)
        tried = _plan(models.catalogue.trie, lists, row, size, scales, free_nodes(models.catalogue.trie, models.rule))
        assert set(served.tolist()) <= set(tried.tolist())
        free = set(tried.tolist()) - set(served.tolist())
        assert models.rule is ScoringRule.TRIE or not free
        assert all(models.catalogue.trie.child_count[node] <= 1 for node in free)


def test_chosen_scales_cover_the_most_requests(models: Models) -> None:
    """Counted from the drafter's plans; equally good ones may exist."""
    if models.rule is ScoringRule.TRIE:
        pytest.skip("free nodes are not in the drafter's plans; the rule is covered above")
    target, draft, size = recommender(models, "target"), recommender(models, "draft"), SIZES[0]
    found = Calibration((size,), width=60).scales(target, draft, ASKED)
    wanted = target.beams(ASKED, beams=size.beam_widths.largest)[:3]

    def whole(scales: tuple[float, ...]) -> int:
        plans = [planned(models, question, size, scales) for question in ASKED]
        beams = [np.concatenate([level[row] for level in wanted]) for row in range(len(ASKED))]
        return sum(set(own[own >= 0].tolist()) <= set(plan.tolist()) for own, plan in zip(beams, plans, strict=True))

    tried = [(1.0, second, second * third) for second, third in product((0.7, 1.0, 1.4), repeat=2)]
    assert whole(found) == max(map(whole, tried))
    assert 0 < whole(found) < len(ASKED)


def test_draft_equal_to_the_target_gets_scales_of_one(models: Models) -> None:
    target = recommender(models, "target")
    assert Calibration(SIZES[:2], width=60).scales(target, target, ASKED) == (1.0, 1.0, 1.0)
