"""An inflated model computes what the trained one computes, to the last digits, whatever the shapes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from atspeed.benchmarks.histories import prompt_tokens
from atspeed.benchmarks.provenance import provenance
from atspeed.cli.main import app
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import Role, hash_files, write_manifest
from atspeed.engine.bundle.prompt import PromptTemplate
from atspeed.engine.errors import BundleError
from atspeed.engine.model.tree_session import Selection
from atspeed.engine.search.scoring import Evaluation
from atspeed.engine.search.trie import ROOT, Pruning
from atspeed.training import inflated_bundles, inflation
from atspeed.training.inflated_bundles import Inflation, inflate_bundle
from atspeed.training.inflated_checkpoints import shape_of, write_inflated
from atspeed.training.inflation import SHAPES, InflationError, ModelShape
from atspeed.training.parity import RandomTree, checkpoint_outputs
from atspeed.training.pretrained import load_checkpoint
from atspeed.training.sequences import Spelling
from research.shared_tree_models import load_decoder_of, prefix_cache, shared_evaluator
from tests.bundles import TestBundle, random_history, random_model, write_run
from tests.catalogues import random_catalogue

pytestmark = pytest.mark.usefixtures("one_torch_thread")

VOCAB = 60
CODES = tuple(range(3, VOCAB))
PROMPT = PromptTemplate(prefix=(1,), suffix=(2,), max_items=8, drop_block=1)

# 48 hidden dimensions, 4 heads of 12 dimensions on 2 keys, 2 layers
TRAINED: dict[str, dict[str, object]] = {
    "a key for two heads": {},
    "a key for each head": {"num_key_value_heads": 4},
    "one key": {"num_key_value_heads": 1},
    "tied, another base": {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "rms_norm_eps": 1e-5,
    },
}
LARGER: dict[str, ModelShape] = {
    "same heads": ModelShape(2, 64, 64, heads=4, kv_heads=4, head_dim=12),
    "keys of one head": ModelShape(3, 90, 70, heads=6, kv_heads=6, head_dim=12, vocab_size=61),
    "keys of four heads": ModelShape(4, 64, 100, heads=16, kv_heads=4, head_dim=24, vocab_size=150),
    "a third of the rotations": ModelShape(2, 56, 64, heads=8, kv_heads=4, head_dim=36),
}


def trained_model(**overrides: object) -> PreTrainedModel:
    """A tiny Llama of trained size of weights, its norms random too."""
    model = random_model("llama", VOCAB, seed=5, initializer_range=0.15, **overrides)
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def inflated(model: PreTrainedModel, shape: ModelShape, folder: Path) -> PreTrainedModel:
    spelling = Spelling(code_tokens=CODES, prompt=PROMPT, pad_token=0, vocab_size=VOCAB)
    write_inflated(model, spelling, shape, folder, dtype=torch.float32, seed=3)
    return load_checkpoint(folder)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("larger", LARGER)
def test_logits_and_their_sum_over_the_vocabulary_are_the_same(trained: str, larger: str, tmp_path: Path) -> None:
    """In float64 too, where a difference would not be rounding: the weights themselves were rounded once, to float32."""
    model = trained_model(**TRAINED[trained])
    large = inflated(model, LARGER[larger], tmp_path)
    assert shape_of(large.config) == replace(LARGER[larger], vocab_size=LARGER[larger].vocab_size or VOCAB)
    tree = RandomTree.grow(np.random.default_rng(7), VOCAB, prefix=30, nodes=30)
    expected = checkpoint_outputs(model, tree, CODES)
    assert np.ptp(expected) > 3  # not a model to which everything is alike
    np.testing.assert_allclose(checkpoint_outputs(large, tree, CODES), expected, atol=1e-4)
    chain = torch.from_numpy(tree.tokens[None, : tree.prefix])
    with torch.inference_mode():
        exact, found = model.double()(chain).logits, large.double()(chain).logits
    torch.testing.assert_close(found[..., :VOCAB], exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logsumexp(-1), exact.logsumexp(-1), rtol=0, atol=1e-5)


def test_added_weights_are_not_zero(tmp_path: Path) -> None:
    """Zeros might be cheaper to multiply by. Only what writes to the residual stream has to be 0."""
    large = inflated(trained_model(), LARGER["keys of four heads"], tmp_path)
    weights = dict(large.named_parameters())
    assert len(weights) == 3 + 4 * 9
    for name, weight in weights.items():
        zeros = float((weight == 0).float().mean())
        if "o_proj" in name or "down_proj" in name:
            assert zeros > 0.5
        elif "norm" not in name and "embed" not in name:
            assert zeros < 0.2  # half of a trained head's queries, in a head of twice its size


@pytest.mark.parametrize(
    ("overrides", "shape", "message"),
    [
        ({}, {"layers": 1}, "layers: 1, the model needs 2"),
        ({}, {"hidden": 47}, "hidden: 47, the model needs 48"),
        ({}, {"hidden": 48, "vocab_size": 61}, "hidden: 48, the model needs 49"),
        ({}, {"vocab_size": 59}, "vocab_size: 59, the model needs 60"),
        ({}, {"head_dim": 16}, "head_dim: 16, must be a multiple of the model's 12"),
        ({}, {"kv_heads": 3}, "heads: 4, must be a multiple of kv_heads, 3"),
        ({"num_key_value_heads": 1}, {"kv_heads": 2, "heads": 2}, "heads: 2, the model needs 4"),
        ({}, {"kv_heads": 8, "heads": 8, "head_dim": 12, "intermediate": 63}, "intermediate: 63, the model needs 64"),
        ({"attention_bias": True}, {}, "config.attention_bias: a model with biases"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, {}, "rope_type: 'linear'"),
    ],
)
def test_size_that_does_not_fit_is_refused_by_name(
    overrides: dict[str, object], shape: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InflationError, match=message):
        inflated(trained_model(**overrides), replace(LARGER["same heads"], **shape), tmp_path)


def test_split_groups_need_more_kv_heads(tmp_path: Path) -> None:
    """Three heads on each of two keys, two heads per key in the shape: each key has to stand there twice."""
    model = trained_model(num_attention_heads=6, num_key_value_heads=2, head_dim=12)
    with pytest.raises(InflationError, match="kv_heads: 3, but 2 of 3 heads each need 4 of 2 heads each"):
        inflated(model, ModelShape(2, 72, 64, heads=6, kv_heads=3, head_dim=12), tmp_path)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_other_architectures_are_refused(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(InflationError, match="only llama"):
        inflated(random_model(architecture, VOCAB, seed=1), LARGER["same heads"], tmp_path)


def test_shapes_have_the_sizes_of_their_names() -> None:
    """Layers and both ends of the vocabulary, by hand."""
    counted = {name: round(_parameters(shape) / 1e6) for name, shape in SHAPES.items()}
    assert counted == {"8m": 7, "68m": 68, "85m": 85, "0.5b": 440, "1.7b": 2032, "7b": 6738}


def _parameters(shape: ModelShape) -> int:
    head, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = shape.hidden * (2 * head + 2 * key + 3 * shape.intermediate)
    return shape.layers * layer + 2 * shape.hidden * (shape.vocab_size or 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TestBundle:
    """A bundle beside its checkpoints, as training leaves them, with a draft of another kind."""
    made = write_run(tmp_path_factory.mktemp("run"), random_catalogue(300, (16, 12, 10), seed=3), seed=5)
    draft = made.bundle.model("draft").model_copy(update={"draft_kind": "other"})
    write_manifest(made.root, made.bundle.manifest.model_copy(update={"draft": draft}))
    return replace(made, bundle=Bundle(made.root))


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {
        **SHAPES,
        "85m": ModelShape(3, 96, 128, heads=8, kv_heads=4, head_dim=24, vocab_size=100),
        "8m": ModelShape(2, 64, 64, heads=4, kv_heads=4, head_dim=12),
    }
    monkeypatch.setattr(inflation, "SHAPES", shapes)


@pytest.mark.usefixtures("small_shapes")
async def test_a_bundle_is_inflated_from_the_command_line(run: TestBundle, tmp_path: Path) -> None:
    """The bundle verifies, describes itself, and evaluates the whole upper trie as the trained one does."""
    command = ["inflate", str(run.root), str(tmp_path / "out"), "--shape", "85m", "--draft-shape", "8m"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    bundle = Bundle(Path(result.stdout.strip()))
    bundle.verify()
    manifest, trained = bundle.manifest, run.bundle.manifest
    assert manifest.name == "random-inflated-85m-8m"
    assert (manifest.catalogue_version, manifest.scoring_rule) == (trained.catalogue_version, trained.scoring_rule)
    roles: tuple[Role, ...] = ("target", "draft")
    for role in roles:
        small, large = trained.models[role], manifest.models[role]
        assert large.inflated_from == small.parameters < large.parameters
        assert (large.code_tokens, large.prompt) == (small.code_tokens, small.prompt)
        assert large.draft_kind == small.draft_kind
        assert (tmp_path / "out" / f"{role}-checkpoint" / "config.json").exists()
        small_evaluation, large_evaluation = [await _upper_trie(one, role) for one in (run.bundle, bundle)]
        assert [node for node, _ in small_evaluation.items()] == [node for node, _ in large_evaluation.items()]
        for (_, expected), (_, found) in zip(small_evaluation.items(), large_evaluation.items(), strict=True):
            # Near-ties of a wide random model may swap; by node they are compared.
            order, other = np.argsort(expected.node), np.argsort(found.node)
            np.testing.assert_array_equal(found.node[other], expected.node[order])
            np.testing.assert_allclose(found.logp[other], expected.logp[order], atol=1e-3)
    assert provenance(bundle)["bundle"]["inflated_from"] == {
        role: trained.models[role].parameters for role in ("target", "draft")
    }
    shown = CliRunner().invoke(app, ["bundle", "inspect", str(bundle.root)])
    assert "inflated from" in shown.stdout


async def _upper_trie(bundle: Bundle, role: Role) -> Evaluation:
    """All children of the root and of level 1, after some history."""
    catalogue, entry = bundle.catalogue(), bundle.manifest.models[role]
    decoder = load_decoder_of(bundle, role, 1)
    evaluator = shared_evaluator(decoder, entry, catalogue, bundle.manifest.scoring_rule, prefix_cache(entry))
    history = catalogue.find(random_history(catalogue, 6, seed=9))
    tree = await evaluator.open(prompt_tokens(catalogue, entry, history.tolist()))
    nodes = np.concatenate([[ROOT], catalogue.trie.children(ROOT)])
    evaluation, _ = await evaluator.evaluate(tree, nodes, Selection(Pruning.none(), limit=16))
    await evaluator.close()
    return evaluation


@pytest.mark.usefixtures("small_shapes")
def test_the_draft_is_kept_unless_a_shape_is_given(run: TestBundle, tmp_path: Path) -> None:
    shape = inflation.SHAPES["85m"]
    inflations: dict[Role, Inflation] = {"target": Inflation(run.root.parent / "target-checkpoint", shape)}
    folder = inflate_bundle(run.bundle, tmp_path, inflations, label="x", precision="float16", seed=1)
    bundle = Bundle(folder)
    bundle.verify()
    assert bundle.manifest.draft == run.bundle.manifest.draft
    assert bundle.manifest.target.precision == "float16"
    assert json.loads((tmp_path / "target-checkpoint" / "config.json").read_text())["dtype"] == "float16"
    with pytest.raises(InflationError, match="already inflated"):
        inflate_bundle(bundle, tmp_path, inflations, label="x", precision="float32", seed=1)


def test_another_checkpoint_is_refused(run: TestBundle, tmp_path: Path) -> None:
    """The draft has the target's shape here: only what it computes tells them apart."""
    inflations: dict[Role, Inflation] = {
        "target": Inflation(run.root.parent / "draft-checkpoint", LARGER["same heads"])
    }
    with pytest.raises(InflationError, match="differs from"):
        inflate_bundle(run.bundle, tmp_path, inflations, label="x", precision="float32", seed=1)


@pytest.mark.parametrize("inside", ["..", ".", "deeper"])
def test_a_folder_in_which_the_source_lies_is_refused(run: TestBundle, inside: str) -> None:
    inflations: dict[Role, Inflation] = {
        "target": Inflation(run.root.parent / "target-checkpoint", LARGER["same heads"])
    }
    before = hash_files(run.root.parent)
    with pytest.raises(InflationError, match="would overwrite or corrupt"):
        inflate_bundle(run.bundle, run.root / inside, inflations, label="x", precision="float32", seed=1)
    assert hash_files(run.root.parent) == before


def test_an_inflation_that_computes_something_else_leaves_no_bundle(
    run: TestBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in the inflation: the export alone is right, so only the comparison with the trained model finds it."""

    def wrong(model: PreTrainedModel, *arguments: object, **more: object) -> None:
        torch.manual_seed(1)
        other = random_model("llama", model.config.vocab_size, seed=99, head_dim=12)
        write_inflated(other, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(inflated_bundles, "write_inflated", wrong)
    inflations: dict[Role, Inflation] = {
        "target": Inflation(run.root.parent / "target-checkpoint", LARGER["same heads"])
    }
    with pytest.raises(InflationError, match="differs from"):
        inflate_bundle(run.bundle, tmp_path, inflations, label="x", precision="float32", seed=1)
    with pytest.raises(BundleError):
        Bundle(tmp_path / "bundle")
