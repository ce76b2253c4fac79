"""From a checkpoint to a served bundle with a draft, by commands: import, distil, serve."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest

from atspeed.benchmarks.near_ties import compare
from atspeed.benchmarks.services import ServiceOptions, ask, progress_bar, services
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.search.list_comparison import RankedList
from atspeed.engine.search.mode import Mode
from atspeed_client import RecommendRequest
from tests.checkpoints import MadeCheckpoint, make_checkpoint, random_paths
from tests.command_line import one_line, run
from tests.serving import LIVENESS_SECONDS

ROOT = Path(__file__).parents[2]
RECIPE = """
[draft.shape]
hidden_size = 16
intermediate_size = 32
layers = 1
heads = 1
kv_heads = 1
[draft.schedule]
epochs = 3
batch_size = 16
learning_rate = 1e-2
[draft.alignment]
loss = "level-kd"
weight = 1.0
beams = 10
budget = 40
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeCheckpoint:
    """A checkpoint with its bundle and a recipe beside it."""
    folder = tmp_path_factory.mktemp("made")
    made = make_checkpoint(folder, random_paths(60, 3))
    files = ("--index", made.index, "--histories", made.histories, "--out", folder / "bundle")
    done = run("import", made.folder, "--prompt", "minionerec", *files)
    assert done.exit_code == 0, done.output
    (folder / "recipe.toml").write_text(RECIPE)
    return made


def command(made: MadeCheckpoint, out: Path) -> list[str]:
    folder = made.folder.parent
    options = {
        "--checkpoint": made.folder,
        "--histories": made.histories,
        "--recipe": folder / "recipe.toml",
        "--out": out,
        "--threads": 1,
    }
    return ["distill", str(folder / "bundle"), *(str(part) for option in options.items() for part in option)]


@pytest.fixture(scope="module")
def distilled(made: MadeCheckpoint) -> Path:
    """A new bundle, written in two calls."""
    out = made.folder.parent / "distilled"
    stopped = run(*command(made, out), "--minutes", 0)
    assert stopped.exit_code == 75
    assert "atspeed: paused: target is done; run the same command again to continue" in stopped.stderr
    done = run(*command(made, out))
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == str(out)
    return out


async def test_strict_lists_with_the_draft_are_those_of_the_target_alone(made: MadeCheckpoint, distilled: Path) -> None:
    """With a scored tail. The draft saves more passes than the target's own prefetch."""
    lists: dict[tuple[Path, Mode], list[RankedList]] = {}
    passes: dict[tuple[Path, Mode], int] = {}
    before = made.folder.parent / "bundle"
    for served in product((before, distilled), (Mode.TARGET_ONLY, Mode.STRICT)):
        bundle, mode = served
        async with services(bundle, ServiceOptions(planner="fixed")) as client:
            users = [(user, k) for user in made.users[:12] for k in (1, 10, 20)]
            requests = [RecommendRequest(history=user, k=k, beam_width=k, mode=mode) for user, k in users]
            with progress_bar() as progress:
                replies = await ask(client, requests, progress=progress, title="lists")
        lists[served] = [RankedList.of(reply.items) for reply in replies]
        passes[served] = sum(reply.statistics.target_passes for reply in replies)
    for found in lists.values():
        assert all(
            str(compare(*pair)) != "different" for pair in zip(found, lists[before, Mode.TARGET_ONLY], strict=True)
        )
    assert passes[distilled, Mode.TARGET_ONLY] == passes[before, Mode.TARGET_ONLY]
    assert passes[distilled, Mode.STRICT] < passes[before, Mode.STRICT] < passes[before, Mode.TARGET_ONLY]


def test_lists_of_the_new_bundle_are_those_of_generate(made: MadeCheckpoint, distilled: Path) -> None:
    options = ("--prompt", "minionerec", "--histories", made.histories, "--users", 6, "--no-counts", "-k", 10)
    done = run("bench", "parity", "--bundle", distilled, "--checkpoint", made.folder, *options)
    assert done.exit_code == 0, done.output


def test_a_t5_gets_a_draft(tmp_path: Path) -> None:
    """From a checkpoint with an encoder to a bundle with a draft, whose lists are those of generate."""
    made = make_checkpoint(tmp_path, random_paths(60, 3), architecture="t5", tokenizer="t5")
    files = ("--index", made.index, "--histories", made.histories, "--out", tmp_path / "bundle")
    assert run("import", made.folder, "--prompt", "letter-tiger", *files).exit_code == 0
    (tmp_path / "recipe.toml").write_text(RECIPE)
    done = run(*command(made, tmp_path / "distilled"))
    assert done.exit_code == 0, done.output
    assert Bundle(tmp_path / "distilled").manifest.draft is not None
    options = ("--prompt", "letter-tiger", "--histories", made.histories, "--users", 6, "--no-counts", "-k", 10)
    done = run("bench", "parity", "--bundle", tmp_path / "distilled", "--checkpoint", made.folder, *options)
    assert done.exit_code == 0, done.output


def test_a_killed_run_continues_to_the_same_bundle(made: MadeCheckpoint, distilled: Path, tmp_path: Path) -> None:
    """Killed while the draft is trained, by a signal that no process can catch."""
    out, training = tmp_path / "out", tmp_path / "out-run" / "draft-training"
    with subprocess.Popen(
        [sys.executable, "-m", "atspeed.cli.main", *command(made, out), "--checkpoint-minutes", "0"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        deadline = time.monotonic() + LIVENESS_SECONDS
        while not (training / "state.pt").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert (training / "state.pt").exists()
    assert not out.exists()
    done = run(*command(made, out))
    assert done.exit_code == 0, done.output
    assert Bundle(out).manifest.version == Bundle(distilled).manifest.version


def test_mistakes_are_one_line(made: MadeCheckpoint, distilled: Path, tmp_path: Path) -> None:
    """Another checkpoint, an unknown item, a folder in the way."""
    arguments = command(made, tmp_path / "out")
    other = make_checkpoint(tmp_path / "other", random_paths(60, 4), initializer_range=0.2)
    swapped = [str(other.folder) if part == str(made.folder) else part for part in arguments]
    assert "not the checkpoint that the target of" in one_line(run(*swapped))
    histories = tmp_path / "histories.txt"
    histories.write_text("u 1 2\nv nothing\n")
    swapped = [str(histories) if part == str(made.histories) else part for part in arguments]
    assert "histories.txt: line 2: item 'nothing' is not in" in one_line(run(*swapped))
    in_the_way = command(made, distilled)
    assert "exists, and is no bundle of the run" in one_line(run(*in_the_way, "--run-folder", tmp_path / "another"))
    assert not (tmp_path / "out").exists()
