"""Lists and scores of a checkpoint by Hugging Face alone: the reference of imported bundles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from atspeed.engine.search.list_comparison import RankedList
from tests.checkpoints import MadeCheckpoint


def generated(made: MadeCheckpoint, prompt: Sequence[int], tail: Sequence[int], k: int) -> RankedList:
    """The list of `generate`: children restricted to the tokens of items and their tail."""
    whole: dict[tuple[int, ...], list[str]] = {}
    children: dict[tuple[int, ...], set[int]] = {}
    for item, names in made.paths.items():
        path = (*made.tokenizer.convert_tokens_to_ids(names), *tail)
        whole.setdefault(path, []).append(item)
        for length, token in enumerate(path):
            children.setdefault(path[:length], set()).add(token)
    levels = len(next(iter(whole)))
    beams = {"num_beams": k, "num_return_sequences": k, "length_penalty": 0.0} if k > 1 else {}
    model: Any = made.model
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    start = 1 if model.config.is_encoder_decoder else len(prompt)
    output = model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=levels,
            do_sample=False,
            pad_token_id=0,
            decoder_start_token_id=model.config.decoder_start_token_id if model.config.is_encoder_decoder else None,
            return_dict_in_generate=True,
            output_scores=True,
            **beams,
        ),
        prefix_allowed_tokens_fn=lambda _, row: sorted(children.get(tuple(row[start:].tolist()), {0})),
    )
    # generate fills its beams with impossible ones where fewer paths exist
    paths = [tuple(row) for row in output.sequences[:, start:].tolist() if tuple(row) in whole]
    scores = path_scores(model, prompt, paths)
    found = [(item, score) for path, score in zip(paths, scores, strict=True) for item in whole[path]]
    return RankedList(tuple(item for item, _ in found[:k]), tuple(score for _, score in found[:k]))


def path_score(model: Any, prompt: Sequence[int], path: Sequence[int]) -> float:
    """The log-probability of a path behind a prompt, over the whole vocabulary."""
    return path_scores(model, prompt, [path])[0]


@torch.inference_mode()
def path_scores(model: Any, prompt: Sequence[int], paths: Sequence[Sequence[int]]) -> list[float]:
    """The log-probabilities of paths of one length behind a prompt, over the whole vocabulary, by one pass of all."""
    before = torch.tensor([list(prompt)] * len(paths))
    codes = torch.tensor([list(path) for path in paths])
    if model.config.is_encoder_decoder:
        start = torch.full((len(paths), 1), model.config.decoder_start_token_id)
        output = model(input_ids=before, decoder_input_ids=torch.cat([start, codes[:, :-1]], dim=1))
    else:
        output = model(torch.cat([before, codes[:, :-1]], dim=1))
    logp = output.logits[:, -codes.shape[1] :].log_softmax(-1)
    scores: list[float] = logp.gather(2, codes[:, :, None]).double().sum(dim=(1, 2)).tolist()
    return scores
