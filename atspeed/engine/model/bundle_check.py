"""Whether services can serve a bundle: its files, its catalogue, its graphs, and a pass over every token that a request can hold.

A token whose pass gives NaN or an infinity spoils every request of that pass: what attention masks is multiplied by 0, and
0 x NaN is NaN. Such a token may be rare, so each one is tried.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from atspeed.engine.arrays import Float32, Int64
from atspeed.engine.bundle.manifest import ROLES, Bundle
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.errors import BundleError
from atspeed.engine.model.decoder import Decoder, RuntimeOptions, load_decoder

_TOGETHER = 64  # tokens of a pass: more would be no faster, and a large vocabulary has a logit of each for each


def verify_bundle(root: Path, *, passes: bool = True) -> Bundle:
    """Read all of a bundle as services do. Raises BundleError or CatalogueError at the first part that they would refuse.

    passes: whether every token is tried too.
    """
    bundle = Bundle(root)
    bundle.verify()
    bundle.catalogue()
    for role in ROLES:
        if role in bundle.manifest.models:
            decoder = load_decoder(bundle, role, RuntimeOptions(intra_op_threads=os.cpu_count() or 1))
            if passes:
                entry = bundle.model(role)
                check_finite(decoder, entry.code_tokens, entry.prompt)
    return bundle


def check_finite(decoder: Decoder, code_tokens: Sequence[int], prompt: PromptTemplate | None = None) -> None:
    """Run every code token, and every token of the prompt, once. Raises BundleError naming one whose pass is not finite."""
    before = np.asarray(prompt.prefix if prompt else (), dtype=np.int64)
    around = (*prompt.separator, *prompt.suffix) if prompt else ()
    _Passes(decoder, code_tokens, before[:0]).check(np.unique(before))
    _Passes(decoder, code_tokens, before).check(
        np.asarray(list(dict.fromkeys((*around, *code_tokens))), dtype=np.int64)
    )


@dataclass(frozen=True)
class _Outputs:
    """Of tokens side by side. logits: [n, C]. finite: whether all outputs are, keys and values included."""

    logits: Float32
    finite: bool
    inner: bool
    """Whether keys and values are finite."""


@dataclass(frozen=True)
class _Passes:
    """Passes over tokens that each see `before` and themselves."""

    decoder: Decoder
    code_tokens: Sequence[int]
    before: Int64

    def check(self, tokens: Int64) -> None:
        """Raise BundleError when the pass of one of them is not finite."""
        for start in range(0, len(tokens), _TOGETHER):
            group = tokens[start : start + _TOGETHER]
            if not self._run(group).finite:
                self._refuse(self._culprit(group))

    def _culprit(self, tokens: Int64) -> int:
        """The first whose own pass is not finite. In a shared pass it spoils the others."""
        while len(tokens) > 1:
            half = tokens[: len(tokens) // 2]
            tokens = tokens[len(half) :] if self._run(half).finite else half
        return int(tokens[0])

    def _refuse(self, token: int) -> NoReturn:
        found = self._run(np.array([token]))
        bad = np.flatnonzero(~np.isfinite(found.logits[0]))
        other = self.code_tokens[-1 if self.code_tokens[0] == token else 0]
        if found.inner and 0 < len(bad) < self.decoder.columns:
            column = int(bad[0])
            problem = (
                f"{self._name(self.code_tokens[column])}: its logit is {found.logits[0, column]}, whatever is asked"
            )
        elif found.inner and not len(bad):
            problem = f"log_normalizer after {self._name(token)}: not finite, though the logit of every code is"
        elif other != token and not self._run(np.array([other])).finite:
            problem = (
                f"{self._name(token)}, {self._name(other)}: nan or inf in the pass of each; what they share is at fault"
            )
        else:
            problem = f"{self._name(token)}: nan or inf in its pass"
        raise BundleError(f"{self.decoder.path}: {problem}")

    def _name(self, token: int) -> str:
        known = {code: column for column, code in enumerate(self.code_tokens)}
        return f"token {token}" + (f" (code column {known[token]})" if token in known else "")

    def _run(self, tokens: Int64) -> _Outputs:
        prompt, count = len(self.before), len(tokens)
        visible = np.zeros((prompt + count, prompt + count), dtype=bool)
        visible[:, :prompt] = np.tri(prompt + count, prompt, dtype=bool)
        visible[prompt:, prompt:] = np.eye(count, dtype=bool)
        positions = np.minimum(np.arange(prompt + count), prompt)
        kv = self.decoder.empty_kv(prompt + count)
        rows = np.arange(prompt, prompt + count)
        every = np.concatenate([self.before, tokens])
        logits, normalizer = self.decoder.run(every, positions, visible, kv[:, :, :0], rows, kv)
        inner = bool(np.isfinite(kv).all())
        return _Outputs(logits, inner and bool(np.isfinite(logits).all() and np.isfinite(normalizer).all()), inner)
