"""Hugging Face `generate` over the catalogue of a bundle.

`generate` runs with num_beams = num_return_sequences = K, log-softmax over the whole vocabulary, and children restricted by the
logits processor of `prefix_allowed_tokens_fn`. That is the scoring rule `vocab`. For the other rules our subclass of the
processor normalises the scores again. All paths have L places, so a length penalty has no effect: after the end of a shorter
path, one token stands for the ended place and scores 0.

Where fewer than K paths exist, `generate` fills its beams with masked ones, whose score is below -1e8; they are left out.
Users are batched by prompt length, so that no prompt needs padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from transformers import GenerationConfig, LogitsProcessorList, PrefixConstrainedLogitsProcessor, PreTrainedModel

from atspeed.benchmarks.histories import History, user_fields
from atspeed.benchmarks.results import BenchmarkError
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.manifest import ModelEntry
from atspeed.engine.bundle.prompts import prompts_of
from atspeed.engine.search.list_comparison import RankedList
from atspeed.engine.search.scoring import ScoringRule
from atspeed.training.decoder_graph import DecoderShape
from atspeed.training.generation import drop_generation_defaults

REFERENCE = "Hugging Face generate"
Render = Callable[[History], Sequence[int]]
"""The token ids of a history's prompt."""
_Tokens = tuple[int, ...]
_MASKED = -1e8  # generate's scores of masked beams are near -1e9
_BEAMS_AT_ONCE = 320  # bounds the memory of a batch


class Reference:
    """Hugging Face `generate` over a bundle's catalogue. Raises BenchmarkError if the bundle is not the checkpoint's."""

    def __init__(self, bundle: Bundle, model: PreTrainedModel, render: Render | None = None) -> None:
        entry, shape = bundle.manifest.target, DecoderShape.of(model)
        if (shape.vocab_size, shape.layers) != (entry.vocab_size, entry.layers):
            raise BenchmarkError("the checkpoint is not the one that the bundle's target was exported from")
        self._model: Any = model  # transformers' type of `generate` has lost its self
        drop_generation_defaults(model, "Hugging Face generate")
        self._entry = entry
        self._render = render
        self._items_per_path = bundle.manifest.items_per_path
        self._catalogue = bundle.catalogue()
        self._prompts = prompts_of(bundle, "target", self._catalogue)
        self._rule = bundle.manifest.scoring_rule
        self._tries = _TokenTries.of(self._catalogue, entry)

    def lists(self, histories: Sequence[History], k: int, progress: Progress) -> list[RankedList]:
        """Return the K best paths of each history, as items."""
        return [self.items(user, k) for user in self._searched(histories, k, progress)]

    def bfloat16_different(
        self, histories: Sequence[History], lists: Sequence[RankedList], k: int, progress: Progress
    ) -> int:
        """Count the lists that differ when the checkpoint runs in bfloat16. lists: those in float32."""
        return sum(
            self.items(user, k).items != expected.items
            for user, expected in zip(
                self._searched(histories, k, progress, model=self._in_bfloat16), lists, strict=True
            )
        )

    def illegal_items(self, histories: Sequence[History], k: int, progress: Progress) -> int | None:
        """Count the paths of no item that appear when each level allows all of its codes; None for unequal lengths."""
        if self._tries.ended:
            return None
        found = self._searched(histories, k, progress, tries=self._tries.by_level())
        return sum(path not in self._tries.items for user in found for path, score in user if score >= _MASKED)

    @cached_property
    def _in_bfloat16(self) -> Any:
        return copy.deepcopy(self._model).to(torch.bfloat16)

    def _searched(
        self, histories: Sequence[History], k: int, progress: Progress, **search: Any
    ) -> list[list[tuple[_Tokens, float]]]:
        """Return the paths and scores of each history. search: further arguments of `generate`."""
        prompts = [self.prompt(history) for history in histories]
        task = progress.add_task(f"Hugging Face generate, K = {k}", total=len(prompts))
        found: dict[int, list[tuple[_Tokens, float]]] = {}
        for batch in _batches([len(prompt) for prompt in prompts], max(1, _BEAMS_AT_ONCE // k)):
            found.update(
                zip(batch, self.generate(torch.tensor([prompts[index] for index in batch]), k, **search), strict=True)
            )
            progress.advance(task, len(batch))
        progress.remove_task(task)
        return [found[index] for index in range(len(prompts))]

    def prompt(self, history: History) -> list[int]:
        """Return the tokens of the prompt that `generate` reads."""
        return self.bundle_prompt(history) if self._render is None else list(self._render(history))

    def bundle_prompt(self, history: History) -> list[int]:
        """Return the prompt's tokens, as serving builds them."""
        fields = user_fields(self._prompts.template, history)
        tokens: list[int] = self._prompts.tokens(self._catalogue.find(history), fields).tolist()
        return tokens

    def generate(
        self, prompts: torch.Tensor, k: int, *, model: Any = None, tries: _TokenTries | None = None
    ) -> list[list[tuple[_Tokens, float]]]:
        """Return each user's paths (as code tokens) and scores, best first.

        Args:
            prompts: int64 [users, prompt].
            k: the beam width.
            model: another form of the checkpoint.
            tries: another constraint than the catalogue's trie.
        """
        model = self._model if model is None else model
        prompts, encoder = prompts.to(model.device), self._entry.encoder
        length = 1 if encoder else prompts.shape[1]  # of what generate returns before the codes
        levels = self._catalogue.trie.levels
        with torch.inference_mode():
            output = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                generation_config=_settings(k, levels, encoder.decoder_start if encoder else None),
                logits_processor=LogitsProcessorList([_Scores(tries or self._tries, self._rule, length, k)]),
            )
        paths = [tuple(row) for row in output.sequences[:, length:].tolist()]
        scores = (
            output.sequences_scores.tolist() if k > 1 else _greedy_scores(output.scores, output.sequences[:, length:])
        )
        ranked = list(zip(paths, scores, strict=True))
        return [ranked[start : start + k] for start in range(0, len(ranked), k)]

    def items(self, ranked: Sequence[tuple[tuple[int, ...], float]], k: int) -> RankedList:
        """Convert paths to items. Items of one path are adjacent and in the catalogue's order, as in the contract."""
        found: list[tuple[str, float]] = []
        for path, score in ranked:
            if score < _MASKED:
                continue
            found += [(self._catalogue.id_of(item), score) for item in self._tries.items[path][: self._items_per_path]]
        return RankedList(tuple(item for item, _ in found[:k]), tuple(score for _, score in found[:k]))


def _settings(k: int, levels: int, decoder_start: int | None) -> GenerationConfig:
    """Return the settings of a beam search of width k; for width 1 those of greedy search, which has no beam settings."""
    beams = {"num_beams": k, "num_return_sequences": k, "length_penalty": 0.0, "early_stopping": False} if k > 1 else {}
    return GenerationConfig(  # type: ignore[no-untyped-call] # transformers'
        max_new_tokens=levels,
        do_sample=False,
        pad_token_id=0,
        decoder_start_token_id=decoder_start,
        return_dict_in_generate=True,
        output_scores=True,
        **beams,
    )


def _greedy_scores(scores: Sequence[torch.Tensor], tokens: torch.Tensor) -> list[float]:
    """Return each path's score, which greedy search does not report.

    scores: L times float [users, V], as the processor left them. tokens: int64 [users, L].
    """
    chosen = [level.gather(1, tokens[:, index : index + 1])[:, 0] for index, level in enumerate(scores)]
    sums: list[float] = torch.stack(chosen).sum(dim=0).tolist()
    return sums


@dataclass(frozen=True)
class _TokenTries:
    """The catalogue over tokens, built from the item table and independent of the engine's trie.

    Attributes:
        children: the allowed tokens after each prefix of tokens.
        ended: the prefixes at which a path has ended; the token `nowhere` follows.
        items: the items of each whole path.
        codes: the distinct code tokens.
        nowhere: the token of places without a code, and below masked beams, where generate requires some token.
    """

    children: dict[_Tokens, list[int]]
    ended: set[_Tokens]
    items: dict[_Tokens, list[int]]
    codes: list[int]
    nowhere: int

    @classmethod
    def of(cls, catalogue: Catalogue, entry: ModelEntry) -> _TokenTries:
        nowhere = entry.code_tokens[0]
        tokens = np.asarray(entry.code_tokens)[catalogue.codes + catalogue.trie.codebook_offset]
        paths = np.where(catalogue.codes < 0, nowhere, tokens).tolist()
        following, ended, items = dict[_Tokens, set[int]](), set[_Tokens](), dict[_Tokens, list[int]]()
        for item, (path, codes) in enumerate(zip(paths, catalogue.codes.tolist(), strict=True)):
            items.setdefault(tuple(path), []).append(item)
            for level, (token, code) in enumerate(zip(path, codes, strict=True)):
                following.setdefault(tuple(path[:level]), set()).add(token)
                if code < 0:
                    ended.add(tuple(path[:level]))
        children = {prefix: sorted(allowed) for prefix, allowed in following.items()}
        return cls(children, ended, items, sorted(set(entry.code_tokens)), nowhere)

    def allowed(self, path: _Tokens) -> list[int]:
        """Return the tokens that may follow a prefix."""
        return self.children.get(path, [self.nowhere])

    def by_level(self) -> _TokenTries:
        """Return the looser constraint of some authors: each level allows all of its codes, whatever stands before."""
        levels: dict[int, set[int]] = {}
        for path, tokens in self.children.items():
            levels.setdefault(len(path), set()).update(tokens)
        return _LevelSets(self.children, self.ended, self.items, self.codes, self.nowhere, levels)


@dataclass(frozen=True)
class _LevelSets(_TokenTries):
    """Allowed tokens per level. levels: by the number of codes before."""

    levels: dict[int, set[int]]

    def allowed(self, path: _Tokens) -> list[int]:
        return sorted(self.levels[len(path)])


class _Scores(PrefixConstrainedLogitsProcessor):
    """Scores of the allowed tokens under a rule. prompt: the length of the prompts."""

    def __init__(self, tries: _TokenTries, rule: ScoringRule, prompt: int, k: int) -> None:
        super().__init__(lambda _, row: tries.allowed(tuple(row[prompt:].tolist())), k)
        self._tries, self._rule, self._prompt, self._greedy = tries, rule, prompt, k == 1

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._rule is ScoringRule.CODES:
            scores = scores - scores[:, self._tries.codes].logsumexp(-1, keepdim=True)
        elif self._greedy:  # beam search passes log-probabilities, greedy search logits
            scores = scores.log_softmax(-1)
        masked: torch.Tensor = super().__call__(input_ids, scores)
        if self._rule is ScoringRule.TRIE:
            masked = masked.log_softmax(-1)
        if self._tries.ended:
            paths = enumerate(input_ids[:, self._prompt :].tolist())
            masked[[row for row, path in paths if tuple(path) in self._tries.ended], self._tries.nowhere] = 0.0
        return masked


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield batches of at most `size` indices of equal length."""
    for length in sorted(set(lengths)):
        group = [index for index, other in enumerate(lengths) if other == length]
        yield from (group[start : start + size] for start in range(0, len(group), size))
