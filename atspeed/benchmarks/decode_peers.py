"""Other engines of `bench decode`: Hugging Face `generate` and onnxruntime-genai.

Both run the checkpoint that the bundle's target was exported from, one user at a time. onnxruntime-genai cannot search a trie
with more than one beam (docs/log.md), so its beam search is measured without a trie: a lower bound of its time. It computes
as many passes of as many beams, and chooses among all tokens where a constrained search would look at few.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from atspeed.benchmarks.decode_rows import HUGGING_FACE, ListSample
from atspeed.benchmarks.generate_reference import Reference
from atspeed.benchmarks.histories import History
from atspeed.benchmarks.results import BenchmarkError
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.prompts import prompts_of


class HuggingFace:
    """Constrained beam search with `prefix_allowed_tokens_fn`, see `atspeed.benchmarks.parity`.

    An int8 target is another model than the checkpoint that it was exported from, so its lists are not compared.
    """

    engine = HUGGING_FACE
    mode = "constrained"
    max_beams = math.inf

    def __init__(self, bundle: Bundle, model: PreTrainedModel, *, threads: int) -> None:
        torch.set_num_threads(threads)
        self._reference = Reference(bundle, model)
        self._levels = bundle.catalogue().trie.levels
        self._same_model = bundle.manifest.target.precision != "int8"
        where = f"{threads} threads" if model.device.type == "cpu" else torch.cuda.get_device_name(model.device)
        self.about = f"generate, num_beams = K, prefix_allowed_tokens_fn, {model.dtype}, {where}".replace("torch.", "")

    def measure(self, history: History, k: int) -> ListSample:
        """Measure one list. The conversion of paths to items is not in its time."""
        prompts = torch.tensor([self._reference.prompt(history)])
        begun = time.perf_counter()
        [paths] = self._reference.generate(prompts, k)
        elapsed = time.perf_counter() - begun
        items = self._reference.items(paths, k) if self._same_model else None
        return ListSample(1e3 * elapsed, items, self._levels, prompt_tokens=prompts.shape[1])


class GenAi:
    """Beam search over all tokens. folder: a model that `built_for_genai` wrote."""

    engine = "onnxruntime-genai"
    mode = "unconstrained"
    max_beams = 32.0  # the library refuses more

    def __init__(self, bundle: Bundle, folder: Path, *, threads: int) -> None:
        self._genai = _library()
        self._catalogue = bundle.catalogue()
        self._prompts = prompts_of(bundle, "target", self._catalogue)
        self._levels = self._catalogue.trie.levels
        self._model = self._genai.Model(str(folder))
        self.about = (
            f"{version('onnxruntime-genai')}, beam search without the trie, num_beams = K, float32, {threads} threads"
        )

    def measure(self, history: History, k: int) -> ListSample:
        """Measure K paths. Their tokens need not be items."""
        tokens = self._prompts.tokens(self._catalogue.find(history))
        prompt = tokens.astype(np.int32)[None]
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(
            num_beams=k,
            num_return_sequences=k,
            max_length=prompt.shape[1] + self._levels,
            min_length=prompt.shape[1] + self._levels,  # no path ends early: all have L codes
            length_penalty=0.0,
            early_stopping=False,
            do_sample=False,
            # Built from a checkpoint, it has that one's defaults.
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            diversity_penalty=0.0,
            temperature=1.0,
        )
        begun = time.perf_counter()
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(prompt)
        for _ in range(self._levels):
            generator.generate_next_token()
        found = [generator.get_sequence(index) for index in range(k)]
        elapsed = time.perf_counter() - begun
        if any(len(path) != prompt.shape[1] + self._levels for path in found):
            raise BenchmarkError("onnxruntime-genai ended a path before its last level")
        return ListSample(1e3 * elapsed, None, self._levels, prompt_tokens=prompt.shape[1])


def _library() -> Any:
    import onnxruntime_genai

    return onnxruntime_genai


@contextmanager
def built_for_genai(checkpoint: Path, folder: Path, *, threads: int) -> Iterator[Path]:
    """Export a checkpoint with onnxruntime-genai's own model builder into `folder`, which is removed afterwards."""
    _library()
    source, built = folder / "checkpoint", folder / "model"
    try:
        shutil.copytree(
            checkpoint,
            source,
            ignore=shutil.ignore_patterns("generation_config.json"),
            copy_function=lambda path, link: Path(link).symlink_to(Path(path).resolve()),
        )
        vocab_size = json.loads((source / "config.json").read_text())["vocab_size"]
        _write_tokenizer(source, vocab_size)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(built)]
        command += ["-p", "fp32", "-e", "cpu", "-c", str(folder / "cache")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own interpreter
        if done.returncode:
            raise BenchmarkError(f"onnxruntime-genai's builder failed: {done.stderr.strip().rpartition(chr(10))[2]}")
        _configure(built / "genai_config.json", threads)
        yield built
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_tokenizer(checkpoint: Path, vocab_size: int) -> None:
    """Write the tokenizer that the builder requires. It is not used: prompts are token ids."""
    words = models.WordLevel({f"<{token}>": token for token in range(vocab_size)}, unk_token="<0>")  # noqa: S106 - a token
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=Tokenizer(words), unk_token="<0>", eos_token="<0>").save_pretrained(checkpoint)  # noqa: S106


def _configure(path: Path, threads: int) -> None:
    """Set the number of threads to that of the other engines."""
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config))
