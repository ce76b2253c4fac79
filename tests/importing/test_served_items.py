"""Some items of an index are served, and histories with others are counted."""

from __future__ import annotations

import json
from pathlib import Path

from atspeed.engine.bundle.bundle import Bundle
from tests.checkpoints import make_checkpoint, random_paths
from tests.command_line import run


def test_histories_with_an_item_that_is_not_served_are_counted(tmp_path: Path) -> None:
    """Their prompts are compared with all items, and serving leaves out those that it does not know."""
    made = make_checkpoint(tmp_path, random_paths(20, 3), users=2)
    served = sorted(made.paths)[:12]
    (tmp_path / "items.txt").write_text("\n".join(served))
    histories = [served[:3], [*served[:2], sorted(made.paths)[15]], served[5:6]]
    (tmp_path / "some.jsonl").write_text("\n".join(json.dumps({"items": history}) for history in histories))
    done = run(
        "import", made.folder, "--index", made.index, "--prompt", "minionerec", "--histories", tmp_path / "some.jsonl",
        "--items", tmp_path / "items.txt", "--out", tmp_path / "bundle",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "on 3 of 3 histories; 1 of them hold items that are not served" in " ".join(done.output.split())
    catalogue = Bundle(tmp_path / "bundle").catalogue()
    assert catalogue.known_ids() == set(served)
