"""`atspeed plan`: replicas, memory and Redis for a rate and a p99.

`--check` prints the model beside a load result instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from atspeed.benchmarks.results import BenchmarkError, Result
from atspeed.capacity import roofline, sources
from atspeed.capacity.check import compare
from atspeed.capacity.errors import CapacityError
from atspeed.capacity.model import CapacityPlan, Costs, Way, make_plan
from atspeed.capacity.sizes import MIB, Sizes
from atspeed.capacity.sources import Question, Speculation
from atspeed.cli.options import MAX_THREADS, MAX_WIDTH, AsJson, CommandError, out
from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.manifest import Manifest
from atspeed.training.inflation import SHAPES

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_DEVICE_MS = 3.0  # draft and messages of a pass, as docs/roofline.py assumes
_DRAFT_MS = 4.0  # a plan of 60 nodes, draft of 0.36M: docs/log.md
_FILE = {"exists": True, "dir_okay": False}


@dataclass(frozen=True)
class _Asked:
    """The values of the options that sources need."""

    k: int
    prefix_hit: float
    acceptance: Path | None
    curve: Path | None
    device: str | None
    size: str | None
    draft_ms: float | None


Acceptance = Annotated[
    Path | None,
    typer.Option(
        help="Result of `research acceptance`: passes with a plan.  [default: the manifest's agreement]", **_FILE
    ),
]
Curve = Annotated[
    Path | None,
    typer.Option(
        help="Measured times: a result of bench load, bench decode or research precision, or a cost curve.", **_FILE
    ),
]
Size = Annotated[
    Literal["85m", "0.5b", "1.7b", "7b"] | None,
    typer.Option(help="With --device: as if the target had this size, in float16."),
]
Items = Annotated[int | None, typer.Option(min=1, max=10**9, help="Items of the catalogue.  [default: the bundle's]")]
PromptTokens = Annotated[
    int | None, typer.Option(min=1, max=100_000, help="Tokens of a prompt.  [default: a full one of the bundle]")
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, max=MAX_THREADS, help="CPU threads of a target's replica.  [default: those of the result, or 1]"
    ),
]
DraftMs = Annotated[
    float | None,
    typer.Option(min=0.01, max=1e5, help="Time of the draft for a plan, in ms.  [default: 4; 3 with --device]"),
]
OrchestratorMs = Annotated[float, typer.Option(min=0.1, max=1e4, help="CPU time of the orchestrator per list, in ms.")]
Check = Annotated[Path | None, typer.Option(help="Print the model beside this result of bench load; no plan.", **_FILE)]


def plan(
    bundle: Annotated[Path | None, typer.Argument(help="Folder of the bundle.", exists=True, file_okay=False)] = None,
    rate: Annotated[float | None, typer.Option(min=0.001, max=1e7, help="Lists per second.")] = None,
    p99: Annotated[float | None, typer.Option(min=0.1, max=1e6, help="p99 of a list, in ms.")] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=MAX_WIDTH, help="Beams and items.")] = 10,
    acceptance: Acceptance = None,
    curve: Curve = None,
    device: Annotated[Literal["h200"] | None, typer.Option(help="A GPU, by arithmetic (docs/gpu.md).")] = None,
    size: Size = None,
    items: Items = None,
    users: Annotated[int, typer.Option(min=0, max=10**10, help="Users with a stored history. 0: without Redis.")] = 0,
    history_items: Annotated[int, typer.Option(min=1, max=100_000, help="Events of a stored history.")] = 50,
    prefix_hit: Annotated[float, typer.Option(min=0, max=1, help="Share of prompt tokens whose KV is cached.")] = 0.0,
    prompt_tokens: PromptTokens = None,
    threads: Threads = None,
    draft_ms: DraftMs = None,
    orchestrator_ms: OrchestratorMs = Costs.orchestrator_ms,
    check: Check = None,
    as_json: AsJson = False,
) -> None:
    """Plan replicas, cores, memory and Redis for a rate and a p99.

    `docs/capacity.md` has the formulas, their limits and their errors against measurements.
    """
    costs = replace(Costs(), orchestrator_ms=orchestrator_ms)
    if check is not None:
        if bundle or rate or p99:
            raise typer.BadParameter("--check: stands without BUNDLE, --rate and --p99")
        _show_comparison(check, costs, as_json)
        return
    if bundle is None or rate is None or p99 is None:
        name = "BUNDLE" if bundle is None else "--rate" if rate is None else "--p99"
        raise typer.BadParameter(f"{name}: missing")
    asked = _Asked(k, prefix_hit, acceptance, curve, device, size, draft_ms)
    _check_options(asked)
    opened = Bundle(bundle)
    catalogue = opened.catalogue()
    if acceptance and opened.manifest.draft is None:
        raise typer.BadParameter("--acceptance: the bundle has no draft")
    levels = len(catalogue.trie.codebook_sizes)
    prompt = prompt_tokens or _prompt_tokens(opened.manifest, levels)
    ways = _ways(opened.manifest, levels, prompt, asked)
    costs = replace(costs, threads=threads or _threads(curve))
    sizes = replace(
        _sizes(opened.manifest, asked),
        items=items or catalogue.items,
        users=users,
        history_items=history_items,
        prompt_tokens=prompt,
        prefix_hit=prefix_hit,
    )
    _show(make_plan(rate, p99, ways, costs, sizes), _sources(asked, opened.manifest), as_json)


def _check_options(asked: _Asked) -> None:
    if (asked.curve is None) == (asked.device is None):
        raise typer.BadParameter("--curve or --device: give one, the time of the target's passes")
    if asked.size and not asked.device:
        raise typer.BadParameter("--size: needs --device")


def _ways(manifest: Manifest, levels: int, prompt: int, asked: _Asked) -> list[Way]:
    plan_ms = asked.draft_ms or (_DEVICE_MS if asked.device else _DRAFT_MS)
    computed = max(1.0, prompt * (1 - asked.prefix_hit))
    question = Question(asked.k, levels, computed, asked.prefix_hit, plan_ms)
    accepted = sources.accepted_by_agreement(manifest.provenance.metrics, asked.k, levels)
    if asked.acceptance:
        with _named(asked.acceptance):
            accepted = sources.accepted_by_rows(_result(asked.acceptance, "acceptance"), asked.k)
    if asked.curve:
        with _named(asked.curve):
            return _measured_ways(asked.curve, manifest, question, prompt, accepted)
    shape = SHAPES[asked.size] if asked.size else roofline.estimated_shape(manifest.target)
    return sources.curve_ways(sources.device_time(shape, roofline.kernels_of(asked.size), prompt), question, accepted)


def _measured_ways(
    path: Path, manifest: Manifest, question: Question, prompt: int, accepted: Sequence[Speculation]
) -> list[Way]:
    content = _object(path)
    if "header" not in content:
        curve = sources.curve_of(content)
        return sources.curve_ways(sources.host_time(curve, prompt - question.computed), question, accepted)
    result = _result(path, "load", "decode", "precision")
    match result.header["benchmark"]:
        case "load":
            return sources.load_ways(result, question.k)
        case "decode":
            return sources.decode_ways(result, question)
    curve = sources.precision_curve(result, manifest.target.precision)
    return sources.curve_ways(sources.host_time(curve, 0), question, accepted)


def _sizes(manifest: Manifest, asked: _Asked) -> Sizes:
    """Return the sizes of the models; of the target those of `--size`, where it is given."""
    from atspeed.model_host.settings import ModelSettings

    weights, kv = {"draft": 0.0}, {"draft": 0.0}  # a result file may have a draft where the bundle has none
    for role, model in manifest.models.items():
        weights[role] = float(model.parameters * _BYTES[model.precision])
        number = _BYTES[model.kv_dtype]
        kv[role] = float(2 * model.layers * model.kv_heads * model.head_dim * number)
    if asked.size:
        shape = SHAPES[asked.size]
        weights["target"] = roofline.read_bytes(shape)
        kv["target"] = 4.0 * shape.layers * shape.kv_heads * shape.head_dim
    fields = ModelSettings.model_fields
    kept = {name: fields[f"{name}_mb"].default * MIB for name in ("kv_memory", "batch_kv")}
    # On a device the KV of open lists is in its memory.
    return Sizes(weights, kv, items=1, open_streams=0 if asked.device else Sizes.open_streams, **kept)


def _prompt_tokens(manifest: Manifest, levels: int) -> int:
    """Return the tokens of a full prompt whose items are written as their codes."""
    prompt = manifest.target.prompt
    item = levels + len(prompt.separator)
    return max(1, len(prompt.prefix) + prompt.max_items * item + len(prompt.suffix))


def _threads(curve: Path | None) -> int:
    """Return the threads of the passes of a result file; 1 where it names none."""
    header = _object(curve).get("header", {}) if curve else {}
    asked = header.get("question")
    found = header.get("threads", asked.get("threads") if isinstance(asked, dict) else None)
    return found if isinstance(found, int) and 1 <= found <= MAX_THREADS else 1


def _sources(asked: _Asked, manifest: Manifest) -> list[str]:
    """Return a sentence on the origin of the times and of the passes, with the bundle where it is another one."""

    def named(path: Path) -> str:
        bundle = _object(path).get("header", {}).get("bundle")
        other = isinstance(bundle, dict) and bundle.get("version") != manifest.version
        return f"{path}" + (f", of another bundle: {bundle.get('name')}" if other else "")

    times = "arithmetic for an H200, not measured; expect 40 % either way"
    found = [f"times of passes: {times if asked.device else 'measured, ' + named(asked.curve or Path())}"]
    return [*found, f"passes with a plan: {named(asked.acceptance)}"] if asked.acceptance else found


def _object(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CommandError(f"{path}: not a JSON object")
    return content


def _result(path: Path, *benchmarks: str) -> Result:
    try:
        result = Result.read(path)
    except BenchmarkError as error:
        raise CommandError(str(error)) from error
    if result.header.get("benchmark") not in benchmarks:
        raise CommandError(f"{path}: a result of {result.header.get('benchmark')}, not of {' or '.join(benchmarks)}")
    return result


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let errors about a file's content name the file."""
    try:
        yield
    except CapacityError as error:
        raise CapacityError(f"{path}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CapacityError(f"{path}: a result file of another format: {error!r}") from error


def _show(found: CapacityPlan, origin: Sequence[str], as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(found) | {"origin": origin}, indent=1))
        return
    table = Table("service", "replicas", "cores", "memory GiB", "ms per list", "busy", "wait p99 ms", box=None)
    for each in found.stations:
        table.add_row(
            each.service,
            f"{each.replicas:,}",
            f"{each.cores:.1f}",
            f"{each.memory_gib:.1f}",
            f"{each.busy_ms:.2f}",
            f"{each.utilisation:.0%}",
            f"{each.wait_p99_ms:.1f}",
        )
    out.print(table)
    together = f", {found.lists_together} lists share a pass" if found.lists_together > 1 else ""
    print(f"mode: {found.way}, {found.passes:.2f} passes of the target{together}")
    print(f"latency: {found.latency_ms:.1f} ms without waiting, p99 at most {found.p99_ms:.1f} ms")
    if (redis := found.redis) is not None:
        print(
            f"Redis: {redis.memory_gib:,.1f} GiB (histories {redis.histories_gib:,.1f}, KV {redis.kv_gib:,.1f}), "
            f"{redis.megabytes_per_second:,.1f} MB/s, {redis.calls_per_second:,.0f} calls a second"
        )
    for limit in found.limits:
        print(f"limit: {limit}")
    for line in origin:
        print(line)


def _show_comparison(path: Path, costs: Costs, as_json: bool) -> None:
    with _named(path):
        rows = compare(_result(path, "load"), costs)
    if as_json:
        print(json.dumps([asdict(row) | {"error": row.error} for row in rows], indent=1))
        return
    table = Table("figure", "replicas", "offered 1/s", "predicted", "measured", "error", box=None)
    for row in rows:
        figure = "saturation, lists/s" if row.figure == "saturation" else "p99, ms"
        offered = "" if row.offered is None else f"{row.offered:.1f}"
        table.add_row(
            figure, str(row.replicas), offered, f"{row.predicted:.1f}", f"{row.measured:.1f}", f"{row.error:+.0%}"
        )
    out.print(table)
