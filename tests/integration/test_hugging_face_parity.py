"""Lists through the real services equal those of Hugging Face `generate`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from atspeed.benchmarks.generate_reference import Reference
from atspeed.benchmarks.histories import choose_histories
from atspeed.benchmarks.parity import MODES, WIDTHS, run
from atspeed.benchmarks.results import BenchmarkError
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.search.scoring import ScoringRule
from atspeed.training.pretrained import load_checkpoint
from tests.bundles import shared_tokens, write_bundle
from tests.catalogues import random_catalogue, tailed_catalogue

USERS = 12


@pytest.mark.parametrize(
    ("architecture", "draft"), [("llama", ""), ("qwen2", ""), ("qwen3", ""), ("t5", ""), ("t5", "llama")]
)
async def test_lists_equal_generate(architecture: str, draft: str, tmp_path: Path) -> None:
    """Target-only and strict, every K: the same items in the same order, with the same scores."""
    catalogue = random_catalogue(300, (16, 12, 10), seed=3)
    made = write_bundle(tmp_path, catalogue, architecture=architecture, draft_architecture=draft, seed=5)
    rows = await run(made.root, made.target, choose_histories(catalogue, None, USERS, seed=7))
    assert [(row.k, row.mode) for row in rows] == [(k, mode) for k in WIDTHS for mode in MODES]
    assert [row.different for row in rows] == [0] * len(rows)
    assert all(row.identical + row.near_ties == USERS for row in rows)
    assert max(row.largest_score_gap for row in rows) < 1e-3
    # Not by searching alike: strict took fewer passes somewhere.
    passes = {(row.k, row.mode): row.target_passes_mean for row in rows}
    assert any(passes[k, "strict"] < passes[k, "target-only"] for k in WIDTHS)


async def test_list_ends_where_paths_end(tmp_path: Path) -> None:
    """`generate` pads its beams with masked ones; the list ends where the catalogue does."""
    catalogue = random_catalogue(6, (4, 3, 3), seed=1)
    made = write_bundle(tmp_path, catalogue)
    rows = await run(made.root, made.target, choose_histories(catalogue, None, 3, seed=1), widths=[20])
    assert [row.different for row in rows] == [0, 0]


# What instruction-tuned checkpoints carry, and what a search over items would be changed by most.
DEFAULTS = {"repetition_penalty": 1.8, "do_sample": True, "temperature": 0.3, "top_k": 3, "no_repeat_ngram_size": 1}


@pytest.mark.parametrize("saved", [True, False])
async def test_generation_defaults_of_a_checkpoint_change_no_list(
    saved: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`generate` takes whatever its caller leaves unset from the checkpoint. Histories repeat items, so a penalty would tell."""
    catalogue = random_catalogue(60, (6, 5, 4), seed=3)
    made = write_bundle(tmp_path / "bundle", catalogue, seed=5)
    model = made.target
    for name, value in (DEFAULTS | {"eos_token_id": 7}).items():
        setattr(model.generation_config, name, value)
    if saved:
        model.save_pretrained(tmp_path / "checkpoint")
        model = load_checkpoint(tmp_path / "checkpoint")
    rows = await run(made.root, model, choose_histories(catalogue, None, USERS, seed=7), widths=[1, 10])
    assert [row.different for row in rows] == [0] * len(rows)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "generation defaults" in line]
    for name, value in DEFAULTS.items():
        assert f"{name}={value}" in said


@pytest.mark.parametrize("architecture", ["llama", "t5"])
async def test_a_tail_that_prompts_do_not_spell_is_scored(architecture: str, tmp_path: Path) -> None:
    """Every path ends in one token more than prompts hold, as in checkpoints that were trained to write a line break."""
    paths = random_catalogue(200, (12, 10, 8), seed=3)
    ids = [paths.id_of(item) for item in range(paths.items)]
    codes = np.pad(paths.codes, ((0, 0), (0, 1)))
    catalogue = Catalogue.build(ids, codes, (12, 10, 8, 1), tail_start=(12, 10, 8, 0))
    made = write_bundle(tmp_path, catalogue, architecture=architecture, seed=5)
    histories = choose_histories(catalogue, None, USERS, seed=7)
    rows = await run(made.root, made.target, histories, widths=[1, 10])
    assert [row.different for row in rows] == [0] * len(rows)
    assert max(row.largest_score_gap for row in rows) < 1e-3
    entry = made.bundle.manifest.target
    tail = entry.code_tokens[-1]
    reference = Reference(made.bundle, made.target)
    prompts = [reference.prompt(history) for history in histories]
    assert all(tail not in prompt for prompt in prompts)
    (beams,) = reference.generate(torch.tensor(prompts[:1]), 10)
    assert {path[-1] for path, _ in beams} == {tail}


@pytest.mark.parametrize(
    ("rule", "architecture"), [*((rule, "llama") for rule in ScoringRule), (ScoringRule.CODES, "t5")]
)
async def test_paths_of_unequal_lengths_and_shared_tokens_under_every_rule(
    rule: ScoringRule, architecture: str, tmp_path: Path
) -> None:
    """Items of a path stand in the order of their ranks, and the bundle lists two of them at most."""
    catalogue = tailed_catalogue(150, (8, 7, 6), seed=3)
    made = write_bundle(
        tmp_path,
        catalogue,
        rule=rule,
        architecture=architecture,
        seed=5,
        code_tokens=shared_tokens(catalogue),
        items_per_path=2,
    )
    rows = await run(made.root, made.target, choose_histories(catalogue, None, USERS, seed=7), widths=[1, 10])
    assert [row.different for row in rows] == [0] * len(rows)
    assert max(row.largest_score_gap for row in rows) < 1e-3


def test_other_checkpoint_is_refused(tmp_path: Path) -> None:
    """A checkpoint of another shape is not the one that the bundle was exported from."""
    made = write_bundle(tmp_path / "one", random_catalogue(20, (4, 4), seed=1))
    other = write_bundle(tmp_path / "other", random_catalogue(20, (8, 4), seed=1))
    with pytest.raises(BenchmarkError, match="not the one"):
        Reference(made.bundle, other.target)
