"""The memory of teacher and alignment over a catalogue of a million items, in a process of its own."""

import json
import subprocess
import sys

import pytest

# A table of nodes by codes takes 4 GiB for each level of this catalogue.
PROGRAM = """
import json, resource, sys, tempfile
from pathlib import Path

import numpy as np
import torch

from atspeed.engine.bundle.catalogue import Catalogue
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.search.scoring import ScoringRule
from atspeed.training.alignment_batches import AlignmentBatches
from atspeed.training.sequences import Sequencer, Spelling
from atspeed.training.teacher import Teacher, TrainingPrompts, write_teacher_data
from tests.bundles import random_model

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
rng, sizes = np.random.default_rng(1), (256, 256, 256, 256)
codes = rng.integers(256, size=(1_000_000, 4), dtype=np.int32)
ids = np.char.add("i", np.arange(1_000_000).astype("U7")).astype("S8")
catalogue = Catalogue.build(ids, codes, sizes)
del ids, codes
spelling = Spelling(code_tokens=tuple(range(3, 1027)), prompt=PromptTemplate(prefix=(1,)), pad_token=0, vocab_size=1027)
sequencer = Sequencer.of(spelling, catalogue, False)
before = peak()
histories = [rng.integers(1_000_000, size=5) for _ in range(32)]
prompts = TrainingPrompts.draw(histories, allow_empty=False, limit=128, seed=1)
model = random_model("llama", 1027, 1, hidden_size=16, intermediate_size=16)
with tempfile.TemporaryDirectory() as folder:
    for rule in ScoringRule:
        teacher = Teacher(model, sequencer, catalogue, rule, beams=20)
        write_teacher_data(teacher, prompts, Path(folder, rule))
        batches = AlignmentBatches(Path(folder, rule), prompts, sequencer, catalogue.trie, batch_size=32, seed=1)
        nodes = sum(int(batch.levels[2].allowed.sum()) for batch in batches(0))
print(json.dumps({"nodes": catalogue.trie.nodes, "before": before, "after": peak(), "children": nodes}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is in kilobytes on Linux only")
def test_a_million_items_fit_into_a_small_machine() -> None:
    """Well below 4 GiB in all; the work itself takes no more for the catalogue's size than a few arrays of its nodes."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["nodes"] > 2_000_000
    assert found["children"] > 0
    assert found["after"] < 2 * 2**30
    assert found["after"] - found["before"] < 2**29
