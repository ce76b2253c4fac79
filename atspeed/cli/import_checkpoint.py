"""`atspeed import`: a checkpoint that exists, served as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from atspeed.cli.options import AsJson, named_values, optional, print_result, warn
from atspeed.engine.bundle.manifest import NAME_PATTERN, ModelEntry, Precision
from atspeed.engine.search.scoring import ScoringRule

MAX_ITEMS = 100_000  # of a history; catches typing errors


Checkpoint = Annotated[
    Path, typer.Argument(help="Folder of a Hugging Face checkpoint with its tokenizer.", exists=True, file_okay=False)
]
Index = Annotated[
    Path,
    typer.Option(
        help="Codes of the items: index.json, id2sid.json, info/*.txt, sid2pid.json.", exists=True, dir_okay=False
    ),
]
Prompt = Annotated[
    str,
    typer.Option(
        help="A layout (lc-rec, minionerec, mimigenrec, openonerec, letter-tiger), or a file: the text with {history}."
    ),
]
Histories = Annotated[
    Path,
    typer.Option(help="Histories whose prompts are compared: .csv, .jsonl, inter.json.", exists=True, dir_okay=False),
]
Out = Annotated[Path, typer.Option(help="Folder for the bundle. It must not exist.", file_okay=False)]
ItemFile = Annotated[
    Path | None, typer.Option(help="Items with the fields that the prompt holds.", exists=True, dir_okay=False)
]
Items = Annotated[
    Path | None,
    typer.Option(
        help="Items to serve, with the fields that the prompt holds; by default all of the index.",
        exists=True,
        dir_okay=False,
    ),
]
WeightFormat = Annotated[Precision, typer.Option(help="Number format of the weights.")]
Rule = Annotated[ScoringRule, typer.Option(help="Tokens over which a code's log-probability is normalised.")]
Separator = Annotated[
    str | None, typer.Option(help="Text between two items; the layout's by default. \\n is a line feed.")
]
ItemText = Annotated[
    str | None,
    typer.Option(
        help="Text of an item with {item} for its codes, {number} and fields of --items, such as '{number}. {title}'."
    ),
]
UserFieldsFile = Annotated[
    Path | None,
    typer.Option(
        help="Users with the fields that the prompt holds, such as {age}: .jsonl, or .json by user.",
        exists=True,
        dir_okay=False,
    ),
]
UserDefaults = Annotated[
    list[str] | None,
    typer.Option("--user-default", help="NAME=VALUE: the value of a user's field for requests that do not name it."),
]
Tail = Annotated[
    str | None,
    typer.Option(help="Text that is scored behind the codes, such as '\\n{eos}'; the layout's by default."),
]
NoTail = Annotated[bool, typer.Option("--no-tail", help="Score the codes only.")]
MaxItems = Annotated[
    int | None, typer.Option(min=1, max=MAX_ITEMS, help="Newest items in a prompt; the layout's by default.")
]
UnequalPaths = Annotated[
    bool, typer.Option("--unequal-paths", help="Allow items with more or fewer codes than others.")
]
ItemsPerPath = Annotated[
    int | None, typer.Option(min=1, max=MAX_ITEMS, help="Most items of one code path in a list; all by default.")
]
Popularity = Annotated[
    str | None,
    typer.Option(
        help="Order of the items of one path: a file of items and counts, or a column of --items or of the index."
    ),
]
Adapter = Annotated[
    Path | None, typer.Option(help="Folder of a LoRA adapter, merged into CHECKPOINT.", exists=True, file_okay=False)
]
Base = Annotated[
    Path | None,
    typer.Option(help="Folder of the base to which CHECKPOINT is added as a delta.", exists=True, file_okay=False),
]
SaveCheckpoint = Annotated[
    Path | None, typer.Option(help="Folder for the model as it was exported, with its tokenizer.", file_okay=False)
]
Name = Annotated[str | None, typer.Option(help="Name of the bundle; by default that of OUT.")]


def import_checkpoint(
    checkpoint: Checkpoint,
    index: Index,
    prompt: Prompt,
    histories: Histories,
    out: Out,
    items: Items = None,
    user_fields: UserFieldsFile = None,
    user_default: UserDefaults = None,
    precision: WeightFormat = "float32",
    scoring_rule: Rule = ScoringRule.VOCAB,
    separator: Separator = None,
    item: ItemText = None,
    tail: Tail = None,
    no_tail: NoTail = False,
    max_items: MaxItems = None,
    unequal_paths: UnequalPaths = False,
    items_per_path: ItemsPerPath = None,
    popularity: Popularity = None,
    adapter: Adapter = None,
    base: Base = None,
    save_checkpoint: SaveCheckpoint = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Import a checkpoint of a generative recommender as a bundle without a draft.

    Every history is rendered by the checkpoint's own tokenizer and compared, token by token, with the prompt that the bundle
    serves.
    """
    if no_tail and tail is not None:
        raise typer.BadParameter("--tail and --no-tail: give only one of them")
    importing, layouts = optional("atspeed.importing.bundle"), optional("atspeed.importing.layouts")
    reading = optional("atspeed.importing.reading")
    optional("transformers.utils.logging").disable_progress_bar()
    changes = layout_changes(separator=separator, item=item, tail="" if no_tail else tail, max_items=max_items)
    if user_default:
        changes["user_defaults"] = named_values("--user-default", user_default)
    layout = layouts.read_layout(prompt, changes)
    if any("\r" in segment for segment in layout.segments):
        warn(f"{prompt}: its lines end with carriage returns, which are part of the prompt")
    source = optional("atspeed.importing.checkpoint").Source(checkpoint, adapter=adapter, base=base)
    read, manifest = importing.import_checkpoint(
        reading.ImportFiles(source, index, histories, items=items, popularity=popularity, user_fields=user_fields),
        reading.ImportChoices(
            name=_name(name or out.resolve().name),
            layout=layout,
            layout_name=prompt if prompt in layouts.LAYOUTS else Path(prompt).name,
            precision=precision,
            scoring_rule=scoring_rule,
            unequal_paths=unequal_paths,
            items_per_path=items_per_path,
        ),
        out,
        save_checkpoint=save_checkpoint,
    )
    fields = {"bundle": out, "version": manifest.version, "items": read.catalogue.items, "prompts_equal": read.prompts}
    print_result(f"{out}: {_summary(read, manifest.target)}", fields, as_json=as_json)


def _summary(read: Any, target: ModelEntry) -> str:
    """Describe an imported bundle. read: what was read and compared, `ReadFiles` of atspeed/importing/reading.py."""
    tail = f"then {' '.join(map(repr, read.tail))}" if read.tail else "no tail"
    unserved = f"; {read.unserved:,} of them hold items that are not served" if read.unserved else ""
    return (
        f"{target.architecture}, {target.parameters:,} parameters, {read.catalogue.items:,} items, "
        f"{read.catalogue.trie.levels - len(read.tail)} codes, {tail}; prompts equal the tokenizer's on "
        f"{read.prompts:,} of {read.prompts:,} histories{unserved}"
    )


def _name(name: str) -> str:
    if not re.match(NAME_PATTERN, name):
        raise typer.BadParameter(f"--name: {name[:60]!r} is not made of lower-case letters, digits, '.', '_' and '-'")
    return name


def layout_changes(**given: str | int | None) -> dict[str, Any]:
    """Return the given fields of a layout, texts with their line feeds and tabs."""
    return {
        field: value.replace("\\n", "\n").replace("\\t", "\t") if isinstance(value, str) else value
        for field, value in given.items()
        if value is not None
    }
