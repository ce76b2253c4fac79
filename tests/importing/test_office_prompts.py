"""Prompts of every history of Amazon Office, in the two layouts whose authors evaluate on such data.

    ATSPEED_OFFICE=DIR pytest tests/importing/test_office_prompts.py -s

DIR holds items.jsonl (id, codes) and valid.jsonl, test.jsonl (history, target). The data may not be redistributed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from atspeed.importing.checkpoint import Source
from atspeed.importing.layouts import LAYOUTS
from atspeed.importing.reading import ImportChoices, ImportFiles, read_files
from tests.authors_prompts import PROMPTS
from tests.checkpoints import make_checkpoint

FOLDER = os.environ.get("ATSPEED_OFFICE")


@pytest.mark.skipif(FOLDER is None, reason="ATSPEED_OFFICE names no folder")
@pytest.mark.parametrize("tokenizer", ["bpe", "unigram"])
@pytest.mark.parametrize("layout", ["lc-rec", "minionerec"])
def test_every_prompt_is_the_authors(layout: str, tokenizer: str, tmp_path: Path) -> None:
    folder = Path(FOLDER or "")
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    paths = {
        str(item["id"]): [f"<{'abc'[level]}_{code}>" for level, code in enumerate(item["codes"])] for item in items
    }
    made = make_checkpoint(tmp_path, paths, tokenizer=tokenizer, users=1)
    compared = 0
    for split in ("valid", "test"):
        files = ImportFiles(Source(made.folder), made.index, folder / f"{split}.jsonl")
        read = read_files(files, ImportChoices("office", LAYOUTS[layout], layout))
        histories = [json.loads(line)["history"] for line in files.histories.read_text().splitlines()]
        assert read.prompts == len(histories)  # the tokenizer's, through the layout
        catalogue, template = read.catalogue, read.spelling.prompt
        for history in (list(map(str, history)) for history in histories):
            window = catalogue.find(history)[template.window_start(len(history)) :]
            tokens = template.tokens(catalogue.spelled_tokens(window, read.spelling.code_tokens))
            assert tokens.tolist() == PROMPTS[layout](made.tokenizer, paths, history)  # the authors' own code
            compared += 1
    print(f"{layout}, {tokenizer}: {compared:,} of {compared:,} prompts are the authors'")  # noqa: T201 - the count is the result
