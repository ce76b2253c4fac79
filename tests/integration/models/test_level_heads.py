"""Plans of a draft with heads: strict lists stay the target's, in one draft pass, under every proposal and pruning."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import (
    LANGUAGE_MODEL,
    MANIFEST,
    fingerprint,
    hash_files,
    read_manifest,
    write_manifest,
)
from atspeed.engine.errors import BundleError
from atspeed.engine.model.bundle_check import verify_bundle
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import PlanSize, Proposal
from atspeed.engine.search.scoring import Perturbation, ScoringRule
from atspeed.engine.search.trie import Pruning
from atspeed.model_host.hosted_models import served_models
from atspeed.training.level_heads_export import HEADS_DATA_FILE
from draft_service.draft_kinds import drafter_of, make_drafter
from draft_service.drafter import Drafted, DraftRequest
from draft_service.language_model_drafter import LanguageModelDrafter
from draft_service.level_heads_drafter import LevelHeadsDrafter
from draft_service.settings import DraftSettings
from orchestrator.planning.sized_draft import NoDraft
from orchestrator.search.beam_loop import beam_search
from orchestrator.search.policies import ExactSampling, Policy, Strict
from tests.bundles import write_bundle
from tests.catalogues import random_catalogue, tailed_catalogue
from tests.oracles.models import ModelDraft, Models, ModelTarget

WIDTHS = BeamWidths.of(4)
NOISE = Perturbation(seed=3, temperature=0.8)
SIZE = PlanSize(WIDTHS, width=40, max_nodes=80)


@pytest.fixture(scope="module", params=list(ScoringRule))
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    catalogue = random_catalogue(60, (6, 5, 4, 4), seed=4)
    return Models.load(write_bundle(tmp_path_factory.mktemp("bundle"), catalogue, rule=request.param, draft_heads=True))


@asynccontextmanager
async def drafter(models: Models) -> AsyncIterator[LevelHeadsDrafter]:
    evaluator = models.evaluator("draft", memory_blocks=100)
    made = drafter_of(evaluator)
    assert isinstance(made, LevelHeadsDrafter)
    yield made
    await evaluator.close()


async def drafted(models: Models, request: DraftRequest) -> Drafted:
    async with drafter(models) as drafting:
        return await drafting.plan(request)


def asked(models: Models, proposal: Proposal = Proposal.TOP) -> DraftRequest:
    prompt = models.prompt(5, seed=1)
    return DraftRequest(prompt, Beams.root(), SIZE, proposal, Pruning.none(), noise=NOISE, with_evaluation=True)


@pytest.fixture(scope="module", params=list(ScoringRule))
def tailed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Paths of one to four codes, each with a tail."""
    catalogue = tailed_catalogue(60, (6, 5, 4, 4), seed=4)
    return Models.load(write_bundle(tmp_path_factory.mktemp("bundle"), catalogue, rule=request.param, draft_heads=True))


POLICIES = pytest.mark.parametrize(
    "policy", [Strict(WIDTHS), ExactSampling(WIDTHS, NOISE)], ids=lambda policy: policy.proposal
)


@POLICIES
async def test_lists_of_paths_of_unequal_lengths_are_the_targets_own(tailed: Models, policy: Policy) -> None:
    verify_bundle(tailed.bundle.root)
    await check_lists(tailed, policy)


@POLICIES
async def test_lists_are_the_targets_own(models: Models, policy: Policy) -> None:
    await check_lists(models, policy)


async def check_lists(models: Models, policy: Policy) -> None:
    """Passes and beams of the target alone, and with plans of which some miss and others do not."""
    trie = models.catalogue.trie
    saved = 0
    for seed, nodes in enumerate((4, 12, 40, 80)):
        target = models.evaluator("target")
        prompt = models.prompt(4, seed=seed)
        noise = policy.noise if policy.perturbed else None
        selection = Selection(Pruning.none(), policy.max_children or max(trie.codebook_sizes), noise)
        alone = await beam_search(trie, models.rule, policy, ModelTarget(target, prompt, selection), NoDraft())
        async with drafter(models) as drafting:
            size = PlanSize(WIDTHS, width=nodes, max_nodes=nodes)
            request = DraftRequest(prompt, Beams.root(), size, policy.proposal, Pruning.none(), noise)
            draft = ModelDraft(drafting, trie, request)
            found = await beam_search(trie, models.rule, policy, ModelTarget(target, prompt, selection), draft)
        await target.close()
        assert found.leaves.node.tolist() == alone.leaves.node.tolist()
        assert found.leaves.score.tolist() == alone.leaves.score.tolist()
        saved += alone.memo.passes - found.memo.passes
    assert saved > 0


async def test_plan_of_all_levels_takes_one_pass(models: Models) -> None:
    made = await drafted(models, asked(models))
    made.plan.check(models.catalogue.trie, limit=SIZE.max_nodes)
    assert set(models.catalogue.trie.depth(made.plan.node).tolist()) == {1, 2, 3}
    assert made.passes == 1
    assert made.cost.new_tokens == len(models.prompt(5, seed=1))


async def test_evaluation_below_beams_is_that_from_the_root(models: Models) -> None:
    """A plan below deeper beams takes one pass too, and gives the same children of the same nodes."""
    trie, request = models.catalogue.trie, asked(models)
    whole = (await drafted(models, request)).plan
    beams = whole.node[trie.depth(whole.node) == 2][:3]
    score = np.zeros(len(beams))
    below = await drafted(models, replace(request, below=Beams(beams, score, score, score)))
    assert below.passes == 1
    assert set(beams.tolist()) <= set(below.plan.evaluated)
    for node in set(below.plan.evaluated) & set(whole.evaluated):
        assert below.plan.evaluated[node].node.tolist() == whole.evaluated[node].node.tolist()
        assert np.allclose(below.plan.evaluated[node].logp, whole.evaluated[node].logp, atol=1e-5)


@pytest.mark.parametrize("proposal", Proposal)
async def test_pruned_nodes_are_not_proposed(models: Models, proposal: Proposal) -> None:
    request = asked(models, proposal)
    whole = (await drafted(models, request)).plan
    trie = models.catalogue.trie
    below_the_first = models.catalogue.codes[:, 0] == trie.code[whole.node[0]]
    cut = models.catalogue.pruning(excluded=np.flatnonzero(below_the_first))
    made = (await drafted(models, replace(request, pruning=cut))).plan
    made.check(trie, limit=SIZE.max_nodes)
    assert not cut.live(whole.node).all()
    assert cut.live(made.node).all()


async def test_plans_that_share_a_pass_are_those_made_alone(models: Models) -> None:
    """Each tree of a pass reads the state behind its own prompt, cached or not."""
    requests = [replace(asked(models), prompt=models.prompt(2 + seed, seed=seed)) for seed in range(6)]
    alone = [await drafted(models, request) for request in requests]
    async with drafter(models) as drafting:
        for _ in range(2):
            together = await asyncio.gather(*map(drafting.plan, requests))
            assert max(made.cost.batch_requests for made in together) > 1
            for made, expected in zip(together, alone, strict=True):
                assert made.plan.node.tolist() == expected.plan.node.tolist()
                assert np.allclose(made.plan.score, expected.plan.score, atol=1e-5)
        assert sum(made.cost.cached_tokens for made in together) > 0


async def test_request_for_no_level_takes_no_pass(models: Models) -> None:
    made = await drafted(models, replace(asked(models), size=PlanSize(WIDTHS, 1, 1, levels=0)))
    assert (made.passes, len(made.plan.node)) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"heads": ("draft/head1.onnx", "draft/head2.onnx")}, r"draft\.heads: 2 files for 4 levels"),
        ({"heads": ("draft/head2.onnx", "draft/head1.onnx", "draft/head3.onnx")}, r"head2\.onnx: input path: "),
        ({"heads": ()}, r"heads: 0 files, but draft_kind is level-heads"),
        ({"draft_kind": "language-model"}, r"heads: 3 files, but draft_kind is language-model"),
        ({"heads": ("target/head1.onnx",) * 3}, r"heads: not in the folder of draft/model\.onnx"),
        (
            {"architecture": "t5", "encoder": {"path": "draft/head1.onnx", "decoder_start": 0}},
            r"heads: they read the state of a decoder",
        ),
    ],
)
def test_wrong_heads_are_refused_by_name(
    models: Models, tmp_path: Path, changes: dict[str, object], problem: str
) -> None:
    root = tmp_path / "bundle"
    shutil.copytree(models.bundle.root, root)
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["draft"].update(changes)
    (root / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=problem):
        verify_bundle(root)


def test_scores_that_are_not_finite_are_refused_by_the_name_of_the_head(models: Models, tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    shutil.copytree(models.bundle.root, root)
    weights = np.fromfile(root / "draft" / HEADS_DATA_FILE, dtype=np.float32)
    weights[-len(weights) // 8 :] = np.nan  # of the last head
    weights.tofile(root / "draft" / HEADS_DATA_FILE)
    files = hash_files(root)
    manifest = read_manifest(root)
    assert manifest.draft is not None
    draft = manifest.draft.model_copy(update={"fingerprint": fingerprint(files, "draft")})
    write_manifest(root, manifest.model_copy(update={"draft": draft, "files": files}))
    with pytest.raises(BundleError, match=r"draft/head3\.onnx: nan or inf in its scores"):
        verify_bundle(root)
    broken = Models.load(replace(models.bundle, bundle=Bundle(root)))
    with pytest.raises(BundleError, match=r"draft/head3\.onnx: nan or inf in its scores"):
        drafter_of(broken.evaluator("draft"))
    verify_bundle(models.bundle.root)


async def test_a_bundle_with_the_heads_of_a_served_language_model_loads_them(models: Models, tmp_path: Path) -> None:
    """Both manifests name the same files, so they have one fingerprint."""
    root = models.bundle.root
    plain, manifest = tmp_path / "plain", read_manifest(root)
    shutil.copytree(root, plain)
    assert manifest.draft is not None
    draft = manifest.draft.model_copy(update={"heads": (), "draft_kind": LANGUAGE_MODEL})
    write_manifest(plain, manifest.model_copy(update={"draft": draft}))
    settings = DraftSettings(bundle=plain, threads=1, warm_up_seconds=0)
    async with served_models(settings, "draft", make_drafter) as hosted:
        assert isinstance(hosted.stable.worker, LanguageModelDrafter)
        await hosted.activate(Bundle(root))
        assert isinstance(hosted.stable.worker, LevelHeadsDrafter)


def test_heads_of_another_catalogue_are_refused(models: Models) -> None:
    other = random_catalogue(60, (6, 5, 4, 3), seed=4)
    evaluator = models.evaluator("draft")
    evaluator.trie = other.trie
    with pytest.raises(BundleError, match=r"draft\.heads: of \[5, 4, 4\] codes, but the catalogue has \[5, 4, 3\]"):
        drafter_of(evaluator)
