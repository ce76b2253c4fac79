"""Heads that read the target's state after the prompt, in place of a draft's own.

NEZHA (arXiv 2511.18793) and EAGLE (arXiv 2401.15077) draft from this state. It is known after the target's pass over the prompt,
so a list takes two target passes at least: one over the prompt, and one over the plan. The first codes are then the target's own.
The drafter runs in torch and is compared by its passes only; no service has it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from atspeed.benchmarks.histories import prompt_tokens
from atspeed.benchmarks.results import BenchmarkError, Columns
from atspeed.engine.arrays import Float32, Int64
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.model.pass_stats import PassStats
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.beams import Beams
from atspeed.engine.search.plan import Plan, PlanSize, Proposal, free_nodes
from atspeed.engine.search.scoring import Evaluation, ScoringRule, best_children
from atspeed.engine.search.trie import ROOT, Pruning, Trie
from atspeed.training.comparison import Comparison, Variant
from atspeed.training.data import Dataset
from atspeed.training.draft_stages import DraftStages
from atspeed.training.level_heads import LevelHeadsConfig, LevelHeadsModel
from atspeed.training.models import SpelledModel
from atspeed.training.pipeline import TrainingRun
from atspeed.training.run import Folders
from atspeed.training.stages import key_of
from draft_service.drafter import Drafted, DraftRequest
from draft_service.level_heads_drafter import HeadsEvaluation
from draft_service.plan_growth import PlanRules
from orchestrator.planning.sized_draft import NoDraft
from orchestrator.search.beam_loop import SearchResult, beam_search
from orchestrator.search.policies import Strict
from research.draft_kinds import TARGET_STATE, DraftKindsConfig
from research.eval_examples import HeldOutCase
from research.shared_tree_models import (
    SharedTreeDraft,
    SharedTreeEvaluator,
    SharedTreeTarget,
    load_decoder_of,
    prefix_cache,
    shared_evaluator,
)

NAME = TARGET_STATE


class TargetStateConfig(LevelHeadsConfig):  # type: ignore[no-untyped-call]
    """The config of `TargetStateModel`: it has no layers of its own.

    Attributes:
        target: the folder of the target's checkpoint.
        target_size: the size of the target's hidden states.
    """

    model_type = "target-state-heads"
    target: str = ""
    target_size: int = 0


class TargetStateModel(LevelHeadsModel):  # type: ignore[no-untyped-call]
    """Heads whose state is a projection of the target's. The target is no part of its weights, and is not trained."""

    config_class = TargetStateConfig

    def __init__(self, config: TargetStateConfig) -> None:
        super().__init__(config)
        self.project = nn.Linear(config.target_size, config.hidden_size, bias=False)
        self._targets: list[Any] = []  # torch does not register a module in a list
        self.post_init()  # type: ignore[no-untyped-call]

    def state(self, prompts: Tensor, **inputs: Any) -> Tensor:
        """Return the projected states of the target at every token, [b, s, H]."""
        if not self._targets:
            self._targets.append(SpelledModel.load(Path(self.config.target)).model)
        with torch.no_grad():
            hidden = self._targets[0].model(input_ids=prompts, use_cache=False, **inputs).last_hidden_state
        result: Tensor = self.model.norm(self.project(hidden))
        return result


AutoConfig.register(TargetStateConfig.model_type, TargetStateConfig)
AutoModelForCausalLM.register(TargetStateConfig, TargetStateModel)


def build(target: Path, catalogue: Catalogue, hidden: int, size: int, seed: int) -> SpelledModel:
    """Build untrained heads for a target, whose tokens they share. hidden, size: of the heads.

    Raises BenchmarkError for a target with an encoder, or with code tokens that do not follow each other.
    """
    trained = SpelledModel.load(target)
    tokens = trained.spelling.code_tokens
    if trained.model.config.is_encoder_decoder or tokens != tuple(range(tokens[0], tokens[0] + len(tokens))):
        raise BenchmarkError(f"--target-state: {target}: needs a decoder whose code tokens follow each other")
    config = TargetStateConfig(
        vocab_size=trained.spelling.vocab_size,
        hidden_size=hidden,
        intermediate_size=1,
        num_hidden_layers=0,
        num_attention_heads=1,
        tie_word_embeddings=True,
        pad_token_id=trained.spelling.pad_token,
        bos_token_id=None,
        eos_token_id=None,
        codebook_sizes=list(catalogue.trie.codebook_sizes),
        first_code=tokens[0],
        head_size=size,
        target=str(target),
        target_size=trained.model.config.hidden_size,
    )
    torch.manual_seed(seed)
    return SpelledModel(TargetStateModel(config), trained.spelling)


def train(
    variant: Variant,
    run_folder: Path,
    teacher: Path,
    data: tuple[Path | None, Dataset],
    catalogue: Catalogue,
    size: int,
) -> SpelledModel:
    """Train heads as a variant's draft is trained, or read them if they are finished.

    Args:
        variant: a draft of the comparison; its hidden size is that of the heads.
        run_folder: the run of the base recipe, with the target.
        teacher: the folder with the teacher's data.
        data: the folder that the recipe reads, and the data set.
        catalogue: the catalogue.
        size: the inner size of a head.
    """
    folder = run_folder / "drafts" / f"{NAME}-seed{variant.seed}"
    run = TrainingRun(
        variant.recipe, Folders(folder, run_folder, teacher, folder), *data, title=f"{NAME}-{variant.seed}"
    )
    stages = run.draft_stages(catalogue)
    if stages is None or stages.part.alignment is None or stages.part.shape is None:
        raise BenchmarkError(f"--target-state: {variant.name}: not a draft from scratch that is aligned")
    made = partial(
        build, run_folder / "target-checkpoint", catalogue, stages.part.shape.hidden_size, size, seed=variant.seed
    )
    objective = stages.objective(stages.part.alignment, stages.teacher(stages.part.alignment))
    start = _pretrained(stages, folder, size, made) if stages.part.pretraining else None
    key = key_of(stages.key, NAME, size)
    return stages.run.model(NAME, folder, stages.part, key, catalogue, start=start, build=made, **objective)


def _pretrained(stages: DraftStages, folder: Path, size: int, made: Any) -> SpelledModel:
    part = stages.part
    plain = part.model_copy(update={"schedule": part.pretraining, "alignment": None, "pretraining": None})
    key = key_of(stages.run.model_key(plain, stages.catalogue), stages.target_key, NAME, size)
    name = f"pretrained-{NAME}"
    return stages.run.model(name, folder, plain, key, stages.catalogue, seed=part.seed, build=made)


class TargetStateDrafter:
    """Plans below the first level by heads in torch."""

    def __init__(self, model: SpelledModel, trie: Trie, rule: ScoringRule) -> None:
        if not isinstance(model.model, TargetStateModel):
            raise TypeError("not heads on the target's state")
        self._model, self._trie, self._rule = model.model, trie, rule
        self._code_tokens = torch.tensor(model.spelling.code_tokens)
        free = free_nodes(trie, rule)
        self._rules = PlanRules(
            trie, free, bool(free[: trie.level_start[trie.levels]].any()), (1.0,) * (trie.levels - 1)
        )
        self._heads = HeadsEvaluation(trie, rule, self._score)

    async def plan(self, request: DraftRequest) -> Drafted:
        """Make a plan; an empty one below the root, as the state is not known before the target's pass."""
        if request.below.node[0] == ROOT:
            return Drafted(Plan.empty(request.below), PassStats(), 0)
        growth, selection = self._rules.growth(request), self._rules.selection(request)
        with torch.inference_mode():
            state = self._model.state(torch.from_numpy(request.prompt)[None])[0, -1].numpy()
            steps = growth.steps()
            try:
                nodes = next(steps)
                while True:
                    nodes = steps.send(self._heads.of(state, nodes, self._root(state, selection), selection))
            except StopIteration as end:
                return Drafted(end.value, PassStats(), 0)

    def _root(self, state: Float32, selection: Selection) -> Evaluation:
        logits = self._model.lm_head(torch.from_numpy(state))[None]
        total = logits.logsumexp(1).numpy()
        columns, root = logits[:, self._code_tokens].numpy(), np.array([ROOT])
        return best_children(
            self._trie, root, columns, total, rule=self._rule, pruning=selection.pruning, limit=selection.limit
        )

    def _score(self, state: Float32, path: Int64) -> tuple[Float32, Float32]:
        """Score the codes below paths; see `LevelHeadsDecoder.score`."""
        summed = self._model.embedded(self._code_tokens[torch.from_numpy(path)]).sum(1)
        logits = self._model.logits_of(path.shape[1], torch.from_numpy(state).expand(len(path), -1), summed)
        return logits.numpy(), logits.logsumexp(1).numpy()


@dataclass(frozen=True)
class TargetStateRow:
    """Strict lists of one K and plan size with heads on the target's state.

    Attributes:
        draft: its name, NAME/seedN.
        parameters: weights of the heads, their embeddings and the projection.
        k: K.
        nodes: nodes of the plan.
        target_passes_mean: passes of the target, with the one over the prompt alone.
        identical: lists that are the target's own.
        users: lists.
    """

    draft: str
    parameters: int
    k: int
    nodes: int
    target_passes_mean: float
    identical: int
    users: int


COLUMNS: Columns[TargetStateRow] = (
    ("draft", lambda row: row.draft),
    ("parameters", lambda row: f"{row.parameters:,}"),
    ("K", lambda row: str(row.k)),
    ("nodes", lambda row: str(row.nodes)),
    ("target passes", lambda row: f"{row.target_passes_mean:.2f}"),
    ("identical", lambda row: f"{row.identical} of {row.users}"),
)


def run(
    comparison: Comparison,
    run_folder: Path,
    data: tuple[Path | None, Dataset],
    bundle: Bundle,
    size: int,
    cases: Sequence[HeldOutCase],
    config: DraftKindsConfig,
) -> list[TargetStateRow]:
    """Train heads for each seed of a comparison, whose drafts are finished, and count the passes of their lists."""
    teacher, catalogue = run_folder if comparison.same_teacher else run_folder / "drafts", bundle.catalogue()
    sizes = list(product(config.widths, config.nodes))
    rows: list[TargetStateRow] = []
    for variant in {variant.seed: variant for variant in reversed(comparison.variants)}.values():
        model = train(variant, run_folder, teacher, data, catalogue, size)
        rows += count_passes(f"{NAME}/seed{variant.seed}", model, bundle, cases, sizes)
    return rows


def count_passes(
    name: str, model: SpelledModel, bundle: Bundle, cases: Sequence[HeldOutCase], sizes: Sequence[tuple[int, int]]
) -> list[TargetStateRow]:
    """Count target passes of strict lists. sizes: pairs of K and nodes. bundle: one with the target."""
    return asyncio.run(_counted(name, model, bundle, cases, sizes))


async def _counted(
    name: str, model: SpelledModel, bundle: Bundle, cases: Sequence[HeldOutCase], sizes: Sequence[tuple[int, int]]
) -> list[TargetStateRow]:
    catalogue, entry, rule = bundle.catalogue(), bundle.manifest.target, bundle.manifest.scoring_rule
    decoder, cache = load_decoder_of(bundle, "target", 1), prefix_cache(entry)
    # One for the searches without a draft and one for those with it, as in acceptance_search.py.
    alone, speculating = (shared_evaluator(decoder, entry, catalogue, rule, cache) for _ in range(2))
    drafter = TargetStateDrafter(model, catalogue.trie, rule)
    passes = {size: list[int]() for size in sizes}
    identical = dict.fromkeys(sizes, 0)
    for case in cases:
        prompt = prompt_tokens(catalogue, entry, case.history)
        for k, nodes in sorted(sizes, reverse=True):
            found, made = await _search(speculating, prompt, k, drafter, nodes)
            expected, _ = await _search(alone, prompt, k)
            passes[k, nodes].append(made)
            identical[k, nodes] += found.leaves.node.tolist() == expected.leaves.node.tolist()
    users = len(cases)
    return [
        TargetStateRow(name, model.parameters, *size, round(float(np.mean(passes[size])), 6), identical[size], users)
        for size in sizes
    ]


async def _search(
    evaluator: SharedTreeEvaluator, prompt: Int64, k: int, drafter: TargetStateDrafter | None = None, nodes: int = 1
) -> tuple[SearchResult, int]:
    """Search for one list. Returns it and the number of target passes."""
    policy, trie = Strict(BeamWidths.of(k)), evaluator.trie
    target = SharedTreeTarget(
        evaluator, prompt, Selection(Pruning.none(), policy.max_children or max(trie.codebook_sizes))
    )
    size = PlanSize(BeamWidths.of(k), width=nodes, max_nodes=nodes)
    request = DraftRequest(prompt, Beams.root(), size, Proposal.TOP, Pruning.none())
    draft = SharedTreeDraft(drafter, trie, request) if drafter else NoDraft()
    result = await beam_search(trie, evaluator.rule, policy, target, draft)
    return result, len(target.pass_levels)
