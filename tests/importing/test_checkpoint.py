"""Checkpoints of every usual form give the weights that transformers computes with; the others are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MT5Config

from atspeed.importing.checkpoint import Source
from atspeed.importing.errors import ImportingError
from atspeed.training.errors import ExportError, TrainingError
from atspeed.training.export import export_decoder
from atspeed.training.export_checks import check_parity
from tests.bundles import random_model

TOKENS = [3, 4, 5, 9]


def saved(folder: Path, architecture: str = "llama", seed: int = 1, **overrides: Any) -> Any:
    """A random model, written to a folder."""
    model = random_model(architecture, 40, seed, **overrides)
    model.save_pretrained(folder)
    return model


def loaded(source: Source) -> Any:
    return source.load(source.config().vocab_size)


@torch.inference_mode()
def imported(source: Source) -> Any:
    """The model, with its config read first as an import does."""
    source.config()
    return loaded(source)


def logits(model: Any) -> torch.Tensor:
    computed: torch.Tensor = model(torch.arange(1, 30)[None]).logits
    return computed


def edit_config(folder: Path, **fields: Any) -> None:
    """Write other fields into a checkpoint's config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )


@pytest.mark.parametrize("architecture", ["gemma", "llama", "mistral", "qwen2", "qwen3"])
def test_shards_in_bfloat16(architecture: str, tmp_path: Path) -> None:
    overrides = {"sliding_window": None} if architecture == "mistral" else {}
    model, expected = (random_model(architecture, 40, 1, **overrides) for _ in range(2))
    model.bfloat16().save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    expected.load_state_dict(model.state_dict())  # rounded; rotary frequencies stay as they were
    assert torch.equal(logits(loaded(Source(tmp_path))), logits(expected))


YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}
LLAMA3 = {"factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
@pytest.mark.parametrize("key", ["rope_type", "type", "rope_parameters"])
def test_rope_of_every_version(key: str, kind: str, tmp_path: Path) -> None:
    """transformers 4.4x wrote rope_scaling with `type` or `rope_type` beside rope_theta; 5 writes rope_parameters."""
    scaling = YARN if kind == "yarn" else LLAMA3
    whole = {"rope_type": kind, "rope_theta": 5000.0, **scaling}
    model = saved(tmp_path, rope_parameters=whole)
    plain = logits(random_model("llama", 40, 1, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}))
    if key != "rope_parameters":
        edit_config(tmp_path, rope_parameters=None, rope_scaling={key: kind, **scaling}, rope_theta=5000.0)
    found = loaded(Source(tmp_path))
    assert torch.equal(logits(found), logits(model))
    assert not torch.allclose(logits(found), plain, atol=1e-3)
    export_decoder(found, tmp_path / "onnx", code_tokens=TOKENS)  # which compares the graph with the model
    assert check_parity(found, tmp_path / "onnx" / "model.onnx", TOKENS, "float32") < 1e-3


def test_a_delta_is_added_to_its_base_in_its_own_format(tmp_path: Path) -> None:
    """The sum of LC-Rec's script: same shapes are summed in the delta's format; grown tables are whole in the delta."""
    base = random_model("llama", 30, 1).bfloat16()
    tuned = random_model("llama", 40, 2).bfloat16()
    base.save_pretrained(tmp_path / "base")
    delta, expected = tuned.state_dict(), {}
    for name, weight in base.state_dict().items():
        if weight.shape == delta[name].shape:
            delta[name] -= weight
        expected[name] = delta[name] + weight if weight.shape == delta[name].shape else delta[name]
    tuned.load_state_dict(delta)
    tuned.save_pretrained(tmp_path / "delta")
    # Older checkpoints hold tensors as torch.save wrote them; transformers reads them without unpickling code.
    (tmp_path / "delta" / "model.safetensors").unlink()
    torch.save(tuned.state_dict(), tmp_path / "delta" / "pytorch_model.bin")
    found = loaded(Source(tmp_path / "delta", base=tmp_path / "base"))
    for name, weight in found.state_dict().items():
        assert torch.equal(weight, expected[name].float()), name


def test_a_delta_without_its_base_is_refused(tmp_path: Path) -> None:
    model = random_model("llama", 40, 1)
    norms = {name: weight * 0.001 for name, weight in model.state_dict().items()}
    model.load_state_dict(norms)
    model.save_pretrained(tmp_path)
    with pytest.raises(ImportingError, match="its norm weights are near 0, as in a delta; give its base with --base"):
        loaded(Source(tmp_path))


def test_another_models_base_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "delta", num_hidden_layers=3)
    saved(tmp_path / "base")
    with pytest.raises(ImportingError, match=r"not the base of .*: it lacks model.layers.2"):
        loaded(Source(tmp_path / "delta", base=tmp_path / "base"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("grown", [False, True], ids=["LoRA", "LoRA and saved tables"])
def test_an_adapter_is_merged(grown: bool, tmp_path: Path) -> None:
    """The merged model computes what peft computes with the adapter beside the base."""
    peft = pytest.importorskip("peft")
    saved(tmp_path / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rows = 47 if grown else 40
    if grown:
        model.resize_token_embeddings(rows)
    tables = {"modules_to_save": ["embed_tokens", "lm_head"]} if grown else {}
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **tables))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.train(False)
    adapted.save_pretrained(tmp_path / "adapter")
    source = Source(tmp_path / "base", adapter=tmp_path / "adapter")
    assert source.rows(source.config(), range(40)) == rows
    found = source.load(rows)
    assert torch.allclose(logits(found), logits(adapted), atol=1e-4)
    base = Source(tmp_path / "base")
    assert not torch.allclose(logits(found)[..., :40], logits(loaded(base)), atol=1e-2)
    assert source.digest() != base.digest()
    with pytest.raises(ImportingError, match="a LoRA adapter without its base; give the base as the checkpoint"):
        Source(tmp_path / "adapter").config()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.parametrize(
    ("layers", "message"), [(1, "the adapter has no base_model"), (3, "the model has no base_model")]
)
def test_an_adapter_of_another_model_is_refused(layers: int, message: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    saved(tmp_path / "base", num_hidden_layers=2)
    saved(tmp_path / "other", num_hidden_layers=layers)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ImportingError, match=message):
        Source(tmp_path / "base", adapter=tmp_path / "adapter").load(40)


@pytest.mark.parametrize("content", ["[]", "{}"])
def test_an_adapter_config_of_another_shape_is_refused(content: str, tmp_path: Path) -> None:
    saved(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(content)
    with pytest.raises(ImportingError, match="peft_type None, only LORA adapters are merged"):
        Source(tmp_path / "base", adapter=tmp_path / "adapter").config()


def test_an_adapter_beside_a_checkpoint_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ImportingError, match=r"holds a checkpoint and adapter_config\.json; keep them in two folders"):
        Source(tmp_path).config()


def test_weights_that_the_config_has_no_place_for_are_refused(tmp_path: Path) -> None:
    """transformers would leave them out, and compute another model."""
    saved(tmp_path, num_hidden_layers=2)
    edit_config(tmp_path, num_hidden_layers=1)
    with pytest.raises(ExportError, match=r"config.json has no place for .*: model.layers.1.input_layernorm.weight"):
        loaded(Source(tmp_path))


def test_weights_beside_the_model_change_nothing(tmp_path: Path) -> None:
    saved(tmp_path)
    expected = logits(loaded(Source(tmp_path)))
    weights = load_file(tmp_path / "model.safetensors")
    beside = {"v_head.summary.weight": torch.ones(3), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    save_file(weights | beside, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(loaded(Source(tmp_path))), expected)


def test_a_base_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "delta")
    saved(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"weights missing from the checkpoint: model\.norm\.weight"):
        loaded(Source(tmp_path / "delta", base=tmp_path / "base"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "64"}, "config.json: .*hidden_size"),
        ({"vocab_size": "40"}, "config.json: .*vocab_size"),
        ({"vocab_size": 41}, "weights of another shape than in config.json: lm_head.weight, model.embed_tokens.weight"),
        ({"dtype": "float7"}, "float7"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "transformers cannot load it: .*GPTQ"),
        ({"num_attention_heads": 0}, "config.json: integer modulo by zero"),
    ],
)
def test_a_config_that_cannot_be_used_is_a_line(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    edit_config(tmp_path, **fields)
    with pytest.raises(TrainingError, match=message) as caught:
        imported(Source(tmp_path))
    assert "\n" not in str(caught.value)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"weight": Path("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ExportError, match="transformers cannot load it: Weights only load failed"):
        loaded(Source(tmp_path))


def test_another_kind_of_adapter_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    with pytest.raises(ImportingError, match="peft_type 'PROMPT_TUNING', only LORA adapters are merged"):
        Source(tmp_path / "base", adapter=tmp_path / "adapter").config()


def test_models_that_no_graph_computes_are_refused_by_name(tmp_path: Path) -> None:
    """From the config alone: nothing long has run."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    for config, message in (
        (MT5Config(), "config.model_type: 'mt5', supported are"),
        (MixtralConfig(num_hidden_layers=1), "config.model_type: 'mixtral' is a mixture of experts"),
    ):
        config.save_pretrained(tmp_path)
        with pytest.raises(ExportError, match=message):
            Source(tmp_path).config()


def test_a_window_that_slides_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "mistral", sliding_window=128)
    with pytest.raises(ExportError, match=r"config.sliding_window: 128, attention must see the whole sequence"):
        Source(tmp_path).config()


def test_folders_that_hold_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ImportingError, match=r"no config.json: not a Hugging Face checkpoint"):
        Source(tmp_path).config()
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ImportingError, match="no weights"):
        Source(tmp_path).config()
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(TrainingError, match="transformers cannot load it"):
        loaded(Source(tmp_path))
    with pytest.raises(ImportingError, match=r"no tokenizer, which is one of tokenizer\.json"):
        Source(tmp_path).tokenizer()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ImportingError, match="its tokenizer cannot be loaded"):
        Source(tmp_path).tokenizer()
