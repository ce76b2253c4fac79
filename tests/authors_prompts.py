"""Prompts as the authors' own evaluation code makes them, independent of this project's layouts.

The texts are written out again here, in the form that the code of each project has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Paths = Mapping[str, Sequence[str]]


def lc_rec(tokenizer: Any, paths: Paths, history: Sequence[str]) -> list[int]:
    """One string."""
    inters = ", ".join("".join(paths[item]) for item in history[-20:])
    instruction = (
        f"The user has interacted with items {inters} in chronological order. "
        "Can you predict the next possible item that the user may expect?"
    )
    text = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{instruction}\n\n### Response:"
    )
    tokens: list[int] = tokenizer(text)["input_ids"]
    return tokens


def minionerec(tokenizer: Any, paths: Paths, history: Sequence[str]) -> list[int]:
    """Two strings, tokenised apart; the histories of its data hold at most ten items."""
    instruction = """Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request. 

### Instruction:
Can you predict the next possible item that the user may expect?

"""  # noqa: E501, W291 - the authors' text
    spelled = ""
    for place, item in enumerate(history[-10:]):
        spelled += ("" if place == 0 else ", ") + "".join(paths[item])
    asked = (
        "Can you predict the next possible item the user may expect, given the following chronological interaction "
        f"history: {spelled}"
    )
    prompt = f"""### User Input: 
{asked}

### Response:\n"""  # noqa: W291 - the authors' text
    return _bare(tokenizer, instruction, bos=True) + _bare(tokenizer, prompt, bos=False)


def _bare(tokenizer: Any, text: str, *, bos: bool) -> list[int]:
    """MiniOneRec's `Tokenizer.encode`."""
    tokens: list[int] = tokenizer.encode(text)
    while tokens[0] == tokenizer.bos_token_id:
        tokens = tokens[1:]
    while tokens[-1] == tokenizer.eos_token_id:
        tokens = tokens[:-1]
    return [tokenizer.bos_token_id, *tokens] if bos and tokenizer.bos_token_id is not None else tokens


def mimigenrec(tokenizer: Any, paths: Paths, history: Sequence[str]) -> list[int]:
    """The chat template of Qwen2.5."""
    inters = ", ".join("".join(paths[item]) for item in history[-10:])
    messages = [
        (
            "system",
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.",
        ),
        (
            "user",
            "Can you predict the next possible item that the user may expect?\n\n"
            "Can you predict the next possible item the user may expect, given the following chronological interaction "
            f"history: {inters}",
        ),
    ]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    tokens: list[int] = tokenizer(f"{text}<|im_start|>assistant\n")["input_ids"]
    return tokens


def letter_tiger(tokenizer: Any, paths: Paths, history: Sequence[str]) -> list[int]:
    """The encoder's prompt: no text and no separator; the tokenizer ends it."""
    tokens: list[int] = tokenizer("".join("".join(paths[item]) for item in history[-20:]))["input_ids"]
    return tokens


def openonerec(tokenizer: Any, paths: Paths, history: Sequence[str]) -> list[int]:
    """Qwen3's chat template with `enable_thinking=False` and the soft switch, then the prompt token."""
    query = "".join(f"<|sid_begin|>{''.join(paths[item])}<|sid_end|>" for item in history[-512:])
    system = "你是一个智能推荐助手，能够根据用户的浏览历史预测用户可能感兴趣的下一个内容。"
    user = f"根据以下用户浏览记录，请预测用户接下来可能观看的内容：\n{query}"
    text = f"<|im_start|>system\n{system}<|im_end|>\n" + f"<|im_start|>user\n{user}/no_think<|im_end|>\n"
    text += "<|im_start|>assistant\n" + "<think>\n\n</think>\n\n"
    tokens: list[int] = tokenizer(f"{text}<|sid_begin|>")["input_ids"]
    return tokens


PROMPTS: dict[str, Callable[[Any, Paths, Sequence[str]], list[int]]] = {
    "lc-rec": lc_rec,
    "letter-tiger": letter_tiger,
    "mimigenrec": mimigenrec,
    "minionerec": minionerec,
    "openonerec": openonerec,
}


def tokens_of_tail(layout: str, tokenizer: Any) -> list[int]:
    """The tokens that the authors score behind the codes."""
    line: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"] if layout == "minionerec" else []
    return [*line, *([] if layout == "openonerec" else [tokenizer.eos_token_id])]
