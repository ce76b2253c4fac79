"""Bundles in which some tokens' embeddings are NaN: whatever pass reads one of them has no numbers in any row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from atspeed.engine.arrays import Int64
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import MANIFEST, Role, fingerprint, hash_files, read_manifest, write_manifest
from atspeed.engine.model.tree_evaluator import TreeEvaluator
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.search.trie import ROOT, Pruning
from tests.bundles import random_history
from tests.oracles.models import Models
from tests.serving import WINDOW


def corrupt(root: Path, role: Role, tokens: Iterable[int]) -> None:
    """Make these embeddings NaN, in a bundle that `write_bundle` has written: the manifest is that of the new files."""
    manifest = read_manifest(root)
    entry = manifest.models[role]
    graph = onnx.load(root / entry.path, load_external_data=False).graph
    places = [
        {part.key: part.value for part in tensor.external_data}
        for tensor in graph.initializer
        if len(tensor.dims) == 2 and tensor.dims[0] == entry.vocab_size
    ]
    first = min(places, key=lambda place: int(place["offset"]))  # before the head, as the graph reads it first
    data = (root / entry.path).parent / first["location"]
    width = int(first["length"]) // 4 // entry.vocab_size
    weights = np.memmap(data, np.float32, "r+", int(first["offset"]), (entry.vocab_size, width))
    weights[list(tokens)] = np.nan
    weights.flush()
    files = hash_files(root)
    assert MANIFEST not in files
    corrupted = entry.model_copy(update={"fingerprint": fingerprint(files, role)})
    write_manifest(root, manifest.model_copy(update={"files": files, role: corrupted}))
    Bundle(root).verify()


@dataclass(frozen=True)
class CorruptCode:
    """A code of the first level that lists of these histories do without, though it is next in line for them.

    token: of the target. histories: none holds the code.
    """

    token: int
    histories: Sequence[Sequence[str]]


async def next_in_line(models: Models, width: int, most: int, histories: int = 40) -> CorruptCode:
    """Return the random histories with a code that is among their best `most` and not among their best `width`."""
    catalogue, entry = models.catalogue, models.bundle.bundle.manifest.target
    wanted: dict[int, list[list[str]]] = {}
    evaluator = models.evaluator("target")
    for seed in range(histories):
        history = random_history(catalogue, 1 + seed % WINDOW, seed)
        codes = catalogue.codes[catalogue.find(history)]
        prompt = entry.prompt.tokens(list(np.array(entry.code_tokens)[codes + catalogue.trie.codebook_offset]))
        found = await root_evaluation(evaluator, prompt, most)
        for code in catalogue.trie.code[found.child[width:]].tolist():
            if code not in codes[:, 0]:
                wanted.setdefault(code, []).append(history)
    await evaluator.close()
    code = max(wanted, key=lambda code: len(wanted[code]))
    return CorruptCode(entry.code_tokens[code], wanted[code])


async def root_evaluation(evaluator: TreeEvaluator, prompt: Int64, limit: int) -> Evaluation:
    """Evaluate the root alone."""
    tree = await evaluator.open(prompt)
    try:
        found, _ = await evaluator.evaluate(tree, np.array([ROOT]), Selection(Pruning.none(), limit))
    finally:
        evaluator.end(tree)
    return found
