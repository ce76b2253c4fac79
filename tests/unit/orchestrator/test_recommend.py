"""Lists of catalogues with everything at once, from requests to items, against the naive search."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atspeed.engine.search.beam_widths import BeamWidths
from atspeed.engine.search.mode import Mode
from atspeed.engine.search.sampling import Stream, gumbel
from atspeed.engine.search.scoring import ScoringRule
from orchestrator.recommendation import RecommendParams
from tests.oracles.naive_search import naive_beam_search, naive_exact_sample
from tests.oracles.naive_trie import Path
from tests.oracles.served_tables import ask, expected, items_of, served, tailed
from tests.profiles import either


@settings(max_examples=either(20, 200))
@given(st.integers(0, 2**32 - 2), st.sampled_from(ScoringRule), st.sampled_from([None, 0.0, 0.7, 1.0]))
def test_lists_of_paths_with_everything_at_once_are_those_of_the_naive_search(
    seed: int, rule: ScoringRule, agreement: float | None
) -> None:
    """Strict, target-only and exact samples; asked for several times, since the prefetch learns from earlier requests."""
    rng = np.random.default_rng(seed)
    made, limit = tailed(rng), [None, 1, 2][rng.integers(3)]
    service, world, _ = served(made, rule, seed, limit, agreement, nodes=rng.choice([0.4, 1.0, 3.0]))
    widths = BeamWidths.of(*rng.integers(1, 7, rng.integers(1, made.naive.levels + 1)).tolist())
    ids = sorted(made.naive.items)
    excluded, allowed = (rng.permutation(ids)[: rng.integers(most)].tolist() for most in (4, len(ids)))
    params = RecommendParams(
        k=int(rng.integers(1, widths.at(made.naive.levels) + 1)),
        beam_widths=widths,
        history=rng.permutation(ids)[:3].tolist(),
        excluded=excluded,
        allowed=allowed if rng.random() < 0.3 else (),
        items_per_path=[None, None, 1, 3][rng.integers(4)],
    )

    def alive(path: Path) -> bool:
        return made.naive.alive(path, params.excluded, params.allowed or None)

    def noise(path: Path) -> float:
        node = np.array([made.naive.id_of[path]])
        return float(gumbel(seed, Stream.GUMBEL, service.catalogue.trie.path_hash(node))[0])

    strict = sample = list[tuple[Path, float]]()
    even = BeamWidths.of(widths.largest)
    if any(alive(path) for path in made.naive.items.values()):
        strict = naive_beam_search(made.naive, world.model, widths.listed, alive)[-1]
        sample = naive_exact_sample(made.naive, world.model, even.listed, alive, 0.8, noise)
    for mode in (Mode.TARGET_ONLY, Mode.STRICT, Mode.STRICT, Mode.TOLERANCE, Mode.STRICT):
        assert items_of(ask(service, replace(params, mode=mode))) == expected(made, strict, params, limit)
    drawn = replace(params, beam_widths=even, mode=Mode.EXACT_SAMPLING, seed=seed, temperature=0.8)
    assert items_of(ask(service, drawn)) == expected(made, sample, params, limit)
