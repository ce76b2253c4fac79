"""Compares an exported decoder with its checkpoint, on random token trees.

The trees follow a cached prefix. The checkpoint reads prefix and tree at once, with an explicit mask and explicit positions.
The file reads the prefix in one pass and the tree in another, with the keys and values of the first: so the comparison
includes the cache.

With an encoder, the last token of the prefix is the decoder's first, and the encoder reads the others. The checkpoint then
reads each path alone: its position bias counts tokens by their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from atspeed.engine.model.decoder import Decoder
from atspeed.engine.model.encoder_decoder import EncoderDecoder

Outputs = npt.NDArray[np.float32]
"""[nodes + 1, C + 1]: code logits and log-normalizer of the prefix's last token and of every node of the tree."""


@dataclass(frozen=True)
class RandomTree:
    """A random token tree below a chain of `prefix` tokens.

    Attributes:
        prefix: the length of the chain.
        tokens: int64 [n].
        positions: int64 [n].
        visible: bool [n, n]. True where a token (row) sees another (column).
    """

    prefix: int
    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    visible: npt.NDArray[np.bool_]

    @classmethod
    def grow(cls, random: np.random.Generator, vocab_size: int, *, prefix: int = 12, nodes: int = 12) -> RandomTree:
        """Grow a tree of random shape and random tokens; `prefix` is at least 1."""
        total = prefix + nodes
        visible = np.eye(total, dtype=bool)
        for token in range(1, total):
            parent = token - 1 if token < prefix else random.integers(prefix - 1, token)
            visible[token] |= visible[parent]
        return cls(prefix, random.integers(0, vocab_size, total), visible.sum(axis=1) - 1, visible)

    @classmethod
    def chain(cls, tokens: npt.NDArray[np.int64]) -> RandomTree:
        """Return a prompt as a prefix with its last token below; at least two tokens."""
        count = len(tokens)
        return cls(count - 1, tokens, np.arange(count), np.tri(count, dtype=bool))

    def alone(self, node: int) -> RandomTree:
        """Return a node, by its place among the tokens, with only the prefix and its ancestors."""
        path = np.flatnonzero(self.visible[node])
        return RandomTree(self.prefix, self.tokens[path], self.positions[path], self.visible[np.ix_(path, path)])


def compare(
    model: PreTrainedModel,
    decoder: Decoder,
    code_tokens: Sequence[int],
    *,
    trees: int = 3,
    prompts: Sequence[npt.NDArray[np.int64]] = (),
) -> tuple[float, float]:
    """Return the largest absolute difference and the largest absolute value of all outputs; NaN if one is NaN.

    prompts: token ids that are tried as well.
    """
    grown = [_tree_of(model, seed) for seed in range(trees)]
    behind = [model.config.decoder_start_token_id, code_tokens[0]] if model.config.is_encoder_decoder else []
    grown += [RandomTree.chain(np.append(prompt, behind).astype(np.int64)) for prompt in prompts if len(prompt) > 1]
    expected = [checkpoint_outputs(model, tree, code_tokens) for tree in grown]
    return _difference(expected, [decoder_outputs(decoder, tree) for tree in grown])


def compare_checkpoints(
    model: PreTrainedModel, other: PreTrainedModel, code_tokens: Sequence[int], *, trees: int = 3
) -> tuple[float, float]:
    """Compare two checkpoints in the same way."""
    grown = [_tree_of(model, seed) for seed in range(trees)]
    outputs = ([checkpoint_outputs(each, tree, code_tokens) for tree in grown] for each in (model, other))
    return _difference(*outputs)


def _tree_of(model: PreTrainedModel, seed: int) -> RandomTree:
    tree = RandomTree.grow(np.random.default_rng(seed), model.config.vocab_size)
    if model.config.is_encoder_decoder:
        tree.tokens[tree.prefix - 1] = model.config.decoder_start_token_id
    return tree


def _difference(expected: Sequence[Outputs], found: Sequence[Outputs]) -> tuple[float, float]:
    reference = np.concatenate(expected)
    return float(np.abs(np.concatenate(found) - reference).max()), float(np.abs(reference).max())


def log_probabilities(outputs: Outputs) -> Outputs:
    """Return the log-probabilities of the code columns, [nodes + 1, C]."""
    result: Outputs = outputs[:, :-1] - outputs[:, -1:]
    return result


def checkpoint_outputs(model: PreTrainedModel, tree: RandomTree, code_tokens: Sequence[int]) -> Outputs:
    """Return the checkpoint's outputs, from one pass over prefix and tree."""
    logits = (_path_logits if model.config.is_encoder_decoder else _tree_logits)(model, tree)
    outputs: Outputs = torch.cat([logits[:, list(code_tokens)], logits.logsumexp(1, keepdim=True)], dim=1).numpy()
    return outputs


def _tree_logits(model: PreTrainedModel, tree: RandomTree) -> torch.Tensor:
    """Return the logits of a decoder, [nodes + 1, vocab]."""
    bias = torch.where(torch.from_numpy(tree.visible), 0.0, torch.finfo(model.dtype).min)
    tokens, positions = torch.from_numpy(tree.tokens), torch.from_numpy(tree.positions)
    with torch.inference_mode():
        result = model(
            input_ids=tokens[None].to(model.device),
            position_ids=positions[None].to(model.device),
            attention_mask=bias[None, None].to(model.device),
            use_cache=False,
        )
    logits: torch.Tensor = result.logits[0, tree.prefix - 1 :].cpu()
    return logits


def _path_logits(model: PreTrainedModel, tree: RandomTree) -> torch.Tensor:
    """Return the logits of an encoder-decoder model, [nodes + 1, vocab]."""
    encoded = tree.prefix - 1
    paths = [torch.from_numpy(tree.tokens[encoded:][row[encoded:]]) for row in tree.visible[encoded:]]
    ends = torch.tensor([len(path) - 1 for path in paths])
    prompt = torch.from_numpy(tree.tokens[:encoded]).expand(len(paths), -1)
    with torch.inference_mode():
        result = model(
            input_ids=prompt.to(model.device),
            decoder_input_ids=torch.nn.utils.rnn.pad_sequence(paths, batch_first=True).to(model.device),
            use_cache=False,
        )
    logits: torch.Tensor = result.logits.cpu()[torch.arange(len(paths)), ends]
    return logits


def decoder_outputs(decoder: Decoder, tree: RandomTree) -> Outputs:
    """Return the exported file's outputs, from a pass over the prefix and one over the tree."""
    kv = decoder.empty_kv(len(tree.tokens))
    encoded = 0
    if isinstance(decoder, EncoderDecoder):
        encoded = tree.prefix - 1
        decoder.encode(tree.tokens[:encoded], kv[:, :, :encoded])
    parts = []
    for start, end in ((encoded, tree.prefix), (tree.prefix, len(tree.tokens))):
        logits, log_normalizer, *_ = decoder.run(
            tree.tokens[start:end],
            tree.positions[start:end] - encoded,
            tree.visible[start:end, :end],
            kv[:, :, :start],
            np.arange(end - start) if start == tree.prefix else np.array([end - start - 1]),
            kv[:, :, start:end],
        )
        parts.append(np.column_stack([logits, log_normalizer]))
    return np.concatenate(parts)
