"""Check that services can serve a bundle: files, catalogue, graphs, finite passes.

A token whose pass gives NaN or an infinity damages every co-batched request: attention multiplies masked values by 0, and
0 * NaN is NaN. Such a token may be rare, so every token that a request can hold is tried.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from atspeed.engine.arrays import Float32, Int64
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.item_texts import ItemTexts
from atspeed.engine.bundle.manifest import ROLES
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.bundle.prompts import texts_of
from atspeed.engine.errors import BundleError
from atspeed.engine.model.decoder import Decoder, RuntimeOptions
from atspeed.engine.model.encoder_decoder import EncoderDecoder
from atspeed.engine.model.level_heads import LevelHeadsDecoder
from atspeed.engine.model.loading import check_device_graph, load_decoder
from atspeed.engine.model.provider import Provider

# Tokens of a pass. More are not faster, and each has a logit for every code.
_TOKENS_PER_PASS = 64


def verify_bundle(root: Path, *, passes: bool = True, provider: Provider = "cpu") -> Bundle:
    """Read a bundle as services do. Raises BundleError or CatalogueError at the first part that they would refuse.

    passes: try every token too. provider: the hardware of the passes.
    """
    bundle = Bundle(root)
    bundle.verify()
    sizes = bundle.catalogue().trie.codebook_sizes
    for role in ROLES:
        if role in bundle.manifest.models:
            check_device_graph(bundle, role)
            decoder = load_decoder(bundle, role, RuntimeOptions(provider, os.cpu_count() or 1))
            if isinstance(decoder, LevelHeadsDecoder):
                decoder.check_codes(sizes[1:])
            if passes:
                entry = bundle.model(role)
                start = entry.encoder.decoder_start if entry.encoder else None
                texts = texts_of(bundle, role)
                check_finite(decoder, entry.code_tokens, entry.prompt, texts, decoder_start=start)
                if isinstance(decoder, LevelHeadsDecoder):
                    decoder.check_finite(sizes)
    return bundle


def check_finite(
    decoder: Decoder,
    code_tokens: Sequence[int],
    prompt: PromptTemplate | None = None,
    texts: ItemTexts | None = None,
    *,
    decoder_start: int | None = None,
) -> None:
    """Run every code token and every prompt token once. Raises BundleError naming one whose pass is not finite.

    texts: those of the items in prompts. decoder_start: the token that the decoder of an encoder-decoder model begins with.
    """
    before = np.asarray(prompt.prefix if prompt else (), dtype=np.int64)
    around = prompt.fixed_tokens[len(prompt.prefix) :] if prompt else ()
    written = texts.distinct().tolist() if texts else ()
    tokens = np.asarray(list(dict.fromkeys((*around, *code_tokens, *written))), dtype=np.int64)
    if isinstance(decoder, EncoderDecoder):
        _EncoderPasses(decoder, code_tokens, before[:0]).check(np.unique(np.append(before, tokens)))
        # The decoder reads no prompt: its first token takes the place of one.
        before, tokens, encoded = np.array([decoder_start]), np.unique(code_tokens), tokens[:1]
    else:
        encoded = tokens[:0]
    _Passes(decoder, code_tokens, before[:0], encoded).check(np.unique(before))
    _Passes(decoder, code_tokens, before, encoded).check(tokens)


@dataclass(frozen=True)
class _Outputs:
    """The output of a pass over n independent tokens.

    Attributes:
        logits: [n, C].
        finite: true if all outputs are finite, keys and values included.
        kv_finite: true if keys and values are finite.
    """

    logits: Float32
    finite: bool
    kv_finite: bool


@dataclass(frozen=True)
class _Passes:
    """Passes over tokens that each attend to `before` and to themselves; `encoded` is read by an encoder."""

    decoder: Decoder
    code_tokens: Sequence[int]
    before: Int64
    encoded: Int64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def check(self, tokens: Int64) -> None:
        """Raise BundleError when the pass of one of the tokens is not finite."""
        for start in range(0, len(tokens), _TOKENS_PER_PASS):
            group = tokens[start : start + _TOKENS_PER_PASS]
            if not self._run(group).finite:
                self._refuse(self._culprit(group))

    def _culprit(self, tokens: Int64) -> int:
        """Find a token whose own pass is not finite, by halving: in a shared pass it affects the others."""
        while len(tokens) > 1:
            half = tokens[: len(tokens) // 2]
            tokens = tokens[len(half) :] if self._run(half).finite else half
        return int(tokens[0])

    def _refuse(self, token: int) -> NoReturn:
        found = self._run(np.array([token]))
        bad = np.flatnonzero(~np.isfinite(found.logits[0]))
        other = self.code_tokens[-1 if self.code_tokens[0] == token else 0]
        if found.kv_finite and 0 < len(bad) < self.decoder.columns:
            column = int(bad[0])
            problem = (
                f"{self._name(self.code_tokens[column])}: its logit is {found.logits[0, column]} after every token"
            )
        elif found.kv_finite and not len(bad):
            problem = f"log_normalizer after {self._name(token)}: not finite, though the logit of every code is"
        elif other != token and not self._run(np.array([other])).finite:
            problem = f"{self._name(token)}, {self._name(other)}: nan or inf in the pass of each; the shared weights are at fault"
        else:
            problem = f"{self._name(token)}: nan or inf in its pass"
        raise BundleError(f"{self.decoder.path}: {problem}")

    def _name(self, token: int) -> str:
        known = {code: column for column, code in enumerate(self.code_tokens)}
        return f"token {token}" + (f" (code column {known[token]})" if token in known else "")

    def _run(self, tokens: Int64) -> _Outputs:
        encoded, prompt, count = len(self.encoded), len(self.before), len(tokens)
        visible = np.zeros((prompt + count, encoded + prompt + count), dtype=bool)
        visible[:, :encoded] = True
        # The prompt is causal; each token sees the whole prompt and itself.
        visible[:, encoded : encoded + prompt] = np.tri(prompt + count, prompt, dtype=bool)
        visible[prompt:, encoded + prompt :] = np.eye(count, dtype=bool)
        positions = np.minimum(np.arange(prompt + count), prompt)
        kv = self.decoder.empty_kv(encoded + prompt + count)
        if isinstance(self.decoder, EncoderDecoder):
            self.decoder.encode(self.encoded, kv[:, :, :encoded])
        rows = np.arange(prompt, prompt + count)
        every = np.concatenate([self.before, tokens])
        past, new_kv = kv[:, :, :encoded], kv[:, :, encoded:]
        logits, normalizer, *_ = self.decoder.run(every, positions, visible, past, rows, new_kv)
        kv_finite = bool(np.isfinite(kv).all())
        scores_finite = bool(np.isfinite(logits).all() and np.isfinite(normalizer).all())
        return _Outputs(logits, kv_finite and scores_finite, kv_finite)


class _EncoderPasses(_Passes):
    """Passes of an encoder over tokens that all attend to each other."""

    def _run(self, tokens: Int64) -> _Outputs:
        kv = self.decoder.empty_kv(len(tokens))
        if isinstance(self.decoder, EncoderDecoder):
            self.decoder.encode(tokens, kv)
        finite = bool(np.isfinite(kv).all())
        return _Outputs(np.zeros((len(tokens), self.decoder.columns), dtype=np.float32), finite, finite)
