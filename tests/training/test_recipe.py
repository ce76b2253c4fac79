"""Recipes: the ones that come with the project are valid; errors name the file and the key."""

from pathlib import Path

import pytest

from atspeed.training.errors import RecipeError
from atspeed.training.recipe import read_recipe

RUNS = Path(__file__).parents[2] / "runs"
TINY = (RUNS / "tiny.toml").read_text()
COMPARISONS = ("-losses", "-drafts")
RECIPES = sorted(path for path in RUNS.glob("*.toml") if not path.stem.endswith(COMPARISONS))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_named_after_their_file(path: Path) -> None:
    assert read_recipe(path).name == path.stem


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("epochs = 8", "epochs = 0", r"target.schedule.epochs: Input should be greater than 0"),
        ("epochs = 8", "epochs = 8\nepoch = 8", r"target.schedule.epoch: Extra inputs are not permitted"),
        ("drop_block = 2", "drop_block = 9", r"prompt: Value error, drop_block: 9 is larger than max_items, 8"),
        ('source = "synthetic"', 'source = "kaggle"', r"data: Input tag 'kaggle'"),
        ('rule = "vocab"', 'rule = "word"', r"scoring_rule: Input should be 'vocab', 'trie' or 'codes'"),
        ("heads = 2", "heads = 3", r"hidden_size: 32 is not a multiple of heads, 3"),
        (
            "[draft.shape]",
            '[draft.base]\nfolder = "x"\n[draft.shape]',
            r"draft: Value error, give either `shape` or `base`",
        ),
        ("[data]", "[data", r"tiny.toml: "),
        ("[data]", f"seed = {2**31}\n[data]", r"seed: Input should be less than or equal to 2147483647"),
        ("epochs = 8", f"epochs = {'9' * 5000}", r"tiny.toml: Exceeds the limit"),
        ("[data]", f"x = {'[' * 5000}\n[data]", r"tiny.toml: maximum recursion depth exceeded"),
    ],
)
def test_errors_name_file_and_key(tmp_path: Path, old: str, new: str, problem: str) -> None:
    assert old in TINY
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.replace(old, new, 1))
    with pytest.raises(RecipeError, match=problem) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)


def test_missing_recipe_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        read_recipe(tmp_path / "none.toml")


def test_an_option_that_is_not_used_is_not_written(tmp_path: Path) -> None:
    """The hash of a stage covers the recipe as it is written: a new option at its default must not train a run again."""
    plain = read_recipe(RUNS / "tiny.toml").target.model_dump(mode="json")
    assert {"dropout"}.isdisjoint(plain["shape"])
    assert {"gradient_accumulation", "mixed_precision"}.isdisjoint(plain["schedule"])
    path = tmp_path / "tiny.toml"
    path.write_text(
        TINY.replace("kv_heads = 1", "kv_heads = 1\ndropout = 0.1", 1).replace(
            "epochs = 8", 'epochs = 8\nmixed_precision = "bf16"\ngradient_accumulation = 1', 1
        )
    )
    written = read_recipe(path).target.model_dump(mode="json")
    assert written["shape"] == plain["shape"] | {"dropout": 0.1}
    assert written["schedule"] == plain["schedule"] | {"mixed_precision": "bf16"}


def test_a_recipe_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_bytes(b"\xef\xbb\xbf" + TINY.encode())
    assert read_recipe(tmp_path / "tiny.toml") == read_recipe(RUNS / "tiny.toml")
