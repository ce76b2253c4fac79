"""The `atspeed` command line.

up                                the services on this machine       recommend, record, history, forget, info   call a service
bundle inspect, bundle verify     what a bundle holds                train, export                              extra `train`
bench parity, bench lossless      measurements that check            (extra `train` for parity)

A failure that is foreseen prints one line and exits with code 1; a mistake in the command itself with code 2.
"""

from __future__ import annotations

import asyncio
import importlib
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType, ModuleType
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from rich.console import Console
from typer.core import TyperGroup

from benchmarks.errors import BenchmarkError
from client import display
from client.comparison import Verdict
from client.local_redis import LocalRedis, LocalRedisError
from client.local_stack import LocalStack, LocalStackError
from client.recommender import Mode, Options, RecommenderClient, RecommenderError
from engine.bundle import Bundle, read_manifest
from engine.errors import EngineError
from engine.scoring import ScoringRule
from service_kit.channels import target_uri
from training.errors import TrainingError

_Result = TypeVar("_Result")
_out, _err = Console(), Console(stderr=True)


class CommandError(Exception):
    """A command that cannot do what it was asked. The text is one line."""


_FORESEEN = (
    BenchmarkError,
    CommandError,
    EngineError,
    LocalRedisError,
    LocalStackError,
    RecommenderError,
    TrainingError,
)


class _Commands(TyperGroup):
    """Turns foreseen failures into a line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _FORESEEN as error:
            _err.print(f"atspeed: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Speculative beam decoding for generative recommendation.",
)
bundle_commands = typer.Typer(no_args_is_help=True, help="Look into a bundle.")
bench_commands = typer.Typer(no_args_is_help=True, help="Measure and check, through real services.")
app.add_typer(bundle_commands, name="bundle")
app.add_typer(bench_commands, name="bench")


def _address(value: str) -> str:
    try:
        target_uri(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return value


BundleFolder = Annotated[Path, typer.Option("--bundle", help="Directory of the bundle.")]
Address = Annotated[str, typer.Option(help="Where the service is.", envvar="ATSPEED_ADDRESS", callback=_address)]
Timeout = Annotated[float, typer.Option("--timeout", min=0.001, help="Deadline of the call, in seconds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the reply as JSON.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]
Histories = Annotated[
    Path | None, typer.Option("--histories", help="Lines of `user item item ...`; random histories without it.")
]
Users = Annotated[int, typer.Option(min=1, help="How many users.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
UserId = Annotated[str, typer.Argument(help="The user.")]
Tenant = Annotated[str, typer.Option(help="Whose user; tenants share neither histories nor cached states.")]
LOCAL = "127.0.0.1:50051"


@app.command()
def up(
    bundle: BundleFolder,
    targets: Annotated[int, typer.Option(min=1, help="Target replicas.")] = 1,
    drafts: Annotated[
        int | None, typer.Option(min=0, help="Draft replicas; by default 1 where the bundle has a draft.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 lets the system choose.")] = 50051,
    redis_url: Annotated[
        str | None,
        typer.Option(
            help="A running Redis; one is started without it. A URL with a password is best given by the variable: "
            "command lines are for all to see.",
            envvar="REDIS_URL",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which the Redis that is started keeps its data. Without it, recorded histories are in memory "
            "alone and gone when this ends.",
            file_okay=False,
        ),
    ] = None,
    log_folder: Annotated[Path | None, typer.Option(help="Keep the services' logs here.")] = None,
) -> None:
    """Run all services on this machine until Ctrl-C."""
    if redis_url and data:
        raise typer.BadParameter(
            "--data is for the Redis that is started without --redis-url (REDIS_URL); give one of them"
        )
    manifest = read_manifest(bundle)
    if drafts and manifest.draft is None:
        raise CommandError(f"{bundle}: the bundle has no draft model, use --drafts 0")
    drafts = (1 if manifest.draft else 0) if drafts is None else drafts
    if log_folder:
        log_folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as running:
        running.enter_context(_interruptible())
        try:
            kept = "in the Redis that you named"
            if not redis_url:
                redis_url = running.enter_context(LocalRedis(folder=data)).url
                kept = f"in {data}" if data else "in memory, gone when this ends; --data DIR keeps them"
            with _err.status("starting"):
                stack = running.enter_context(
                    LocalStack(
                        bundle, redis_url=redis_url, drafts=drafts, targets=targets, port=port, log_folder=log_folder
                    )
                )
            _announce(manifest.name, stack, kept)
            _watch(stack)
        except KeyboardInterrupt:
            _err.print("draining", highlight=False)


def _announce(name: str, stack: LocalStack, kept: str) -> None:
    _out.print(f"{name} is served at [bold]{stack.address}[/bold]", highlight=False, soft_wrap=True)
    for service in stack.services:
        number = service.process.pid if service.process else 0
        _err.print(f"  {service.module} {service.address}, process {number}", highlight=False, soft_wrap=True)
    _err.print(f"  histories are kept {kept}", highlight=False, markup=False, soft_wrap=True)
    _err.print(f"  try: atspeed info --address {stack.address}; Ctrl-C ends it", highlight=False, soft_wrap=True)


def _watch(stack: LocalStack) -> NoReturn:
    """Until a signal, or a service that ended by itself."""
    while True:
        for service in stack.services:
            if not service.running:
                raise CommandError(f"{service.module} at {service.address} ended by itself")
        time.sleep(0.3)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM is Ctrl-C, as a process manager expects; a second signal does not cut the draining short."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@app.command()
def recommend(
    user: Annotated[str | None, typer.Argument(help="A user with a stored history.")] = None,
    history: Annotated[
        str | None, typer.Option(help="Item ids, oldest first, with commas between; nothing is stored.")
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Items wanted.")] = 10,
    beam_width: Annotated[int, typer.Option(min=0, help="Beams searched; 0 means max(k, 20).")] = 0,
    mode: Annotated[Mode, typer.Option(help="How the list is made.")] = Mode.STRICT,
    tolerance: Annotated[float, typer.Option(min=0, help="Mode tolerance: largest score gap.")] = 0.0,
    temperature: Annotated[float | None, typer.Option(help="Sampling modes: temperature.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Sampling modes: seed.")] = None,
    exclude: Annotated[str, typer.Option(help="Item ids never to recommend, with commas between.")] = "",
    only: Annotated[str, typer.Option(help="Item ids to choose from, with commas between.")] = "",
    exclude_seen: Annotated[bool, typer.Option("--exclude-seen", help="Leave the history's items out.")] = False,
    tenant: Tenant = "",
    address: Address = LOCAL,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
) -> None:
    """The top items for a user, or for a history."""
    if (user is None) == (history is None):
        raise typer.BadParameter("give either a user or --history")
    options: Options = {
        "k": k,
        "beam_width": beam_width,
        "mode": mode,
        "tolerance": tolerance,
        "temperature": temperature,
        "seed": seed,
        "excluded": _ids(exclude),
        "allowed": _ids(only),
        "exclude_seen": exclude_seen,
        "tenant": tenant,
    }
    if history is not None:
        options["history"] = _ids(history)
    reply = _call(address, timeout, lambda client: client.recommend(user, **options))
    if as_json:
        return _print_json(reply)
    _out.print(display.recommendation_table(reply))
    _out.print(display.summary(reply), highlight=False, markup=False)
    return None


@app.command()
def record(
    user: UserId,
    items: Annotated[list[str], typer.Argument(help="Items, oldest first.")],
    tenant: Tenant = "",
    address: Address = LOCAL,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
) -> None:
    """Append items to a user's history."""
    reply = _call(address, timeout, lambda client: client.record(user, items, tenant=tenant))
    if as_json:
        return _print_json(reply)
    _out.print(f"{user}: {reply.history_length} items", highlight=False, markup=False)
    if reply.unknown_item_ids:
        _out.print(f"not in the catalogue: {', '.join(reply.unknown_item_ids)}", highlight=False, markup=False)
    return None


@app.command()
def history(user: UserId, tenant: Tenant = "", address: Address = LOCAL, timeout: Timeout = 10.0) -> None:
    """A user's stored items, oldest first, one a line."""
    for item in _call(address, timeout, lambda client: client.history(user, tenant=tenant)):
        print(item)


@app.command()
def forget(user: UserId, tenant: Tenant = "", address: Address = LOCAL, timeout: Timeout = 10.0) -> None:
    """Erase a user's history."""
    existed = _call(address, timeout, lambda client: client.forget(user, tenant=tenant))
    print("forgotten" if existed else "nothing was stored")


@app.command()
def info(address: Address = LOCAL, timeout: Timeout = 10.0) -> None:
    """Versions, limits and the state of the services, as JSON."""
    _print_json(_call(address, timeout, lambda client: client.info()))


@bundle_commands.command("inspect")
def bundle_inspect(folder: Annotated[Path, typer.Argument(help="The bundle.")], as_json: AsJson = False) -> None:
    """What a bundle holds."""
    bundle = Bundle(folder)
    if as_json:
        print(bundle.manifest.model_dump_json(indent=1))
        return
    catalogue = bundle.catalogue()
    _out.print(display.manifest_table(bundle.manifest, catalogue.items, len(catalogue.item_start) - 1))


@bundle_commands.command("verify")
def bundle_verify(folder: Annotated[Path, typer.Argument(help="The bundle.")]) -> None:
    """Compare every file with the manifest's hashes, and the catalogue with its version."""
    bundle = Bundle(folder)
    bundle.verify()
    bundle.catalogue()
    print(f"{folder}: {len(bundle.manifest.files)} files are as the manifest says, version {bundle.manifest.version}")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, see runs/.")],
    run_folder: Annotated[Path, typer.Option(help="Where the run is kept, and resumed from.")],
    data: Annotated[Path | None, typer.Option(help="The data that the recipe reads.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; all cores by default. Another number rounds differently.")
    ] = None,
) -> None:
    """Train a recipe's target and draft and write the bundle."""
    settings = _optional("training.recipe").read_recipe(recipe)
    run_folder.mkdir(parents=True, exist_ok=True)
    print(_optional("training.pipeline").train(settings, run_folder, data, threads=threads))


class PrecisionChoice(StrEnum):
    """Number format of exported weights."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8_WEIGHTS = "int8-weights"


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint: a local folder.")],
    out: Annotated[Path, typer.Argument(help="Folder for model.onnx and model.onnx.data.")],
    precision: Annotated[PrecisionChoice, typer.Option(help="Number format of the weights.")] = PrecisionChoice.FLOAT32,
    code_tokens: Annotated[
        str | None,
        typer.Option(help="First and last code token, FIRST:LAST; by default those of the checkpoint's spelling.json."),
    ] = None,
) -> None:
    """Export one model of a checkpoint, and check the export against it."""
    exporter = _optional("training.export")
    tokens = _code_tokens(checkpoint, code_tokens)
    report = exporter.export_decoder(
        exporter.load_checkpoint(checkpoint), out, code_tokens=tokens, precision=precision.value
    )
    print(
        f"{out}: {report.architecture}, {report.parameters:,} parameters, {report.precision}, "
        f"largest logit error {report.max_logit_error:.2g}"
    )


def _code_tokens(checkpoint: Path, given: str | None) -> list[int]:
    if given is None:
        sequences = _optional("training.sequences")
        if not (checkpoint / sequences.SPELLING).exists():
            raise CommandError(f"{checkpoint}: no {sequences.SPELLING}, give --code-tokens FIRST:LAST")
        return list(sequences.Spelling.load(checkpoint).code_tokens)
    first, colon, last = given.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise typer.BadParameter(f"--code-tokens: {given!r} is not FIRST:LAST")
    return list(range(int(first), int(last) + 1))


@bench_commands.command("parity")
def bench_parity(
    bundle: BundleFolder,
    checkpoint: Annotated[Path, typer.Option(help="The Hugging Face checkpoint that the target was exported from.")],
    users: Users = 200,
    histories: Histories = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
) -> None:
    """Our lists beside Hugging Face generate; exits with 1 when one differs beyond near-ties."""
    parity, exporter = _optional("benchmarks.parity"), _optional("training.export")
    _optional("transformers.utils.logging").disable_progress_bar()  # its bar for a load that takes a moment
    opened = Bundle(bundle)
    chosen = _histories(opened, histories, users, seed)
    rows = asyncio.run(parity.run(bundle, exporter.load_checkpoint(checkpoint), chosen))
    _report(parity, opened, rows, seed, json_file)
    if different := sum(row.different for row in rows):
        raise CommandError(f"{different} lists differ from Hugging Face generate beyond near-ties")


class RuleChoice(StrEnum):
    """Under which scoring rules to measure."""

    BUNDLE = "bundle"
    VOCAB = "vocab"
    TRIE = "trie"
    BOTH = "both"


@bench_commands.command("lossless")
def bench_lossless(
    bundle: BundleFolder,
    users: Users = 500,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Items wanted.")] = 20,
    excluded: Annotated[int, typer.Option(min=0, help="Items excluded per user.")] = 50,
    rule: Annotated[
        RuleChoice, typer.Option(help="Scoring rules; another than the bundle's on a copy.")
    ] = RuleChoice.BUNDLE,
    histories: Histories = None,
    seed: Seed = 1,
    json_file: JsonFile = None,
) -> None:
    """Strict beside target-only with excluded items; exits with 1 when a list differs or a path is invalid."""
    from benchmarks import lossless

    opened = Bundle(bundle)
    chosen = _histories(opened, histories, users, seed)
    question = lossless.Question(k=k, excluded=excluded, seed=seed)
    rows = asyncio.run(lossless.run(bundle, chosen, question, _rules(opened, rule)))
    _report(lossless, opened, rows, seed, json_file)
    if failures := sum(row.different + row.invalid_paths for row in rows):
        raise CommandError(f"{failures} lists differ beyond near-ties or paths are invalid")


def _rules(bundle: Bundle, choice: RuleChoice) -> list[ScoringRule]:
    if choice is RuleChoice.BOTH:
        return list(ScoringRule)
    return [bundle.manifest.scoring_rule if choice is RuleChoice.BUNDLE else ScoringRule(choice.value)]


def _histories(bundle: Bundle, path: Path | None, users: int, seed: int) -> list[tuple[str, ...]]:
    from benchmarks.histories import choose_histories

    return choose_histories(bundle.catalogue(), path, users, seed)


def _report(benchmark: ModuleType, bundle: Bundle, rows: Any, seed: int, json_file: Path | None) -> None:
    """The table, and the file where one is wanted."""
    from benchmarks.provenance import provenance
    from benchmarks.services import write_json

    _out.print(benchmark.table(rows))
    _out.print(f"identical to {benchmark.REFERENCE}: {_answer(rows)}", highlight=False)
    if json_file is not None:
        write_json(json_file, provenance(bundle, seed=seed), benchmark.to_json(rows))
        _err.print(f"written to {json_file}", highlight=False, soft_wrap=True)


def _answer(rows: Any) -> str:
    """Whether all lists are the reference's: yes, near-tie or NO, and how many are not."""
    counts = {
        Verdict.IDENTICAL: sum(row.identical for row in rows),
        Verdict.NEAR_TIE: sum(row.near_ties for row in rows),
        Verdict.DIFFERENT: sum(row.different for row in rows),
    }
    worst = Verdict.worst(verdict for verdict, count in counts.items() if count)
    return f"{worst.answer} ({', '.join(f'{count} {verdict}' for verdict, count in counts.items())})"


def _call(address: str, timeout: float, call: Callable[[RecommenderClient], Coroutine[Any, Any, _Result]]) -> _Result:
    async def connected() -> _Result:
        async with RecommenderClient(address, timeout_seconds=timeout) as client:
            return await call(client)

    return asyncio.run(connected())


def _print_json(message: Message) -> None:
    print(MessageToJson(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))


def _ids(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _optional(module: str) -> Any:
    """A module that needs torch and its kin. Raises CommandError naming the extra when they are not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        if package in {"benchmarks", "training", "engine", "client"}:
            raise
        raise CommandError(f"{package} is not installed: pip install 'atspeed-serving[train]'") from None


if __name__ == "__main__":
    sys.exit(app())
