"""Prompts of every history of Amazon Office, in layouts of authors who evaluate on such data, and with numbered titles.

    ATSPEED_OFFICE=DIR pytest tests/importing/test_office_prompts.py -s

DIR holds items.jsonl (id, codes, title) and valid.jsonl, test.jsonl (history, target). The data may not be redistributed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atspeed.engine.bundle.prompts import Prompts
from atspeed.importing.checkpoint import Source
from atspeed.importing.layouts import LAYOUTS, PromptLayout
from atspeed.importing.reading import ImportChoices, ImportFiles, read_files
from tests.authors_prompts import PROMPTS
from tests.checkpoints import TEXT, make_checkpoint

FOLDER = os.environ.get("ATSPEED_OFFICE")


def numbered(
    tokenizer: Any, paths: Mapping[str, Sequence[str]], titles: Mapping[str, str], history: Sequence[str]
) -> list[int]:
    """A user's own text: numbered titles with their codes."""
    lines = (f"{place}. {titles[item]} {''.join(paths[item])}" for place, item in enumerate(history[-10:], start=1))
    tokens: list[int] = tokenizer("The user has bought:\n" + "\n".join(lines) + "\n\n### Response:\n")["input_ids"]
    return tokens


def titles_only(
    tokenizer: Any, paths: Mapping[str, Sequence[str]], titles: Mapping[str, str], history: Sequence[str]
) -> list[int]:
    """A user's own text: numbered titles without codes, whose ends a tokenizer may merge with the line feeds behind them."""
    lines = (f"{place}. {titles[item]}" for place, item in enumerate(history[-10:], start=1))
    tokens: list[int] = tokenizer("The user has bought:\n" + "\n".join(lines) + "\n\n### Response:\n")["input_ids"]
    return tokens


_NUMBERED: dict[str, Any] = {
    "segments": ("The user has bought:\n{history}\n\n### Response:\n",), "separator": "\n", "max_items": 10,
}  # fmt: skip
USERS_OWN = {
    "numbered": (numbered, PromptLayout(item="{number}. {title} {item}", **_NUMBERED)),
    "titles": (titles_only, PromptLayout(item="{number}. {title}", **_NUMBERED)),
}


@pytest.mark.skipif(FOLDER is None, reason="ATSPEED_OFFICE names no folder")
@pytest.mark.parametrize("tokenizer", ["bpe", "unigram"])
@pytest.mark.parametrize("layout", ["lc-rec", "minionerec", *USERS_OWN])
def test_every_prompt_is_the_authors(
    layout: str, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(FOLDER or "")
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    paths = {
        str(item["id"]): [f"<{'abc'[level]}_{code}>" for level, code in enumerate(item["codes"])] for item in items
    }
    titles = {str(item["id"]): item["title"] for item in items}
    # The tokenizers learn from titles, too, so that they merge their ends with line feeds.
    monkeypatch.setattr("tests.checkpoints.TEXT", [*TEXT, *(f"1. {title}\n\n" for title in titles.values())])
    made = make_checkpoint(tmp_path, paths, tokenizer=tokenizer, users=1, max_position_embeddings=16384)
    compared = 0
    for split in ("valid", "test"):
        own, form = USERS_OWN[layout] if layout in USERS_OWN else (None, LAYOUTS[layout])
        files = ImportFiles(
            Source(made.folder), made.index, folder / f"{split}.jsonl", folder / "items.jsonl" if own else None
        )
        read = read_files(files, ImportChoices("office", form, layout))
        histories = [json.loads(line)["history"] for line in files.histories.read_text().splitlines()]
        assert read.prompts == len(histories)  # the tokenizer's, through the layout
        prompts = Prompts(read.spelling.prompt, read.catalogue, np.asarray(read.spelling.code_tokens), read.texts)
        for history in (list(map(str, history)) for history in histories):
            tokens = prompts.tokens(read.catalogue.find(history)).tolist()
            if own:
                assert tokens == own(made.tokenizer, paths, titles, history)
            else:
                assert tokens == PROMPTS[layout](made.tokenizer, paths, history)  # the authors' own code
            compared += 1
        if read.texts is not None:
            ends = int((read.texts.inner.lengths != read.texts.last.lengths).sum())
            print(f"{layout}, {tokenizer}: {ends:,} texts have other lengths at the end of a history")  # noqa: T201
    print(f"{layout}, {tokenizer}: {compared:,} of {compared:,} prompts are the authors'")  # noqa: T201 - the count is the result
