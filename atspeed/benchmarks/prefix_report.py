"""A page about `bench prefix`: prefix.md, written from the result file alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from atspeed.benchmarks import markdown
from atspeed.benchmarks.markdown import figures, item_range, origin, table
from atspeed.benchmarks.prefix import Row, State, from_json
from atspeed.benchmarks.results import Result

PAGE = "prefix.md"
_TOKENS = ("prompt tokens", "computed", "from memory", "from Redis")
_COLUMNS = ("prefix", "p50 ms", *_TOKENS, "users", "over cold", "95 %")


def write(result: Result, folder: Path) -> Path:
    """Write the page; its path. Raises BenchmarkError when the result is another benchmark's."""
    return markdown.write(folder / PAGE, _page(result.header, from_json(result)))


def _page(header: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    asked, users = header["question"], rows[0].users
    yield from ("# What a cached prefix is worth", "")
    yield (
        f"A request's first pass of the {asked['role']} in one process, the prompt's last token and some nodes of the trie "
        "besides the root (0: as plain beam search begins), by what is kept of the prompt and where. "
        f"{users} users with {item_range(header['items'])}, of {header['histories']}; every user in every state before the next."
    )
    yield ""
    yield from origin(header, [("threads", str(asked["threads"]))])
    by_nodes = {nodes: {row.state: row for row in rows if row.nodes == nodes} for nodes in asked["nodes"]}
    yield from figures(figure for nodes, states in by_nodes.items() for figure in _figures(nodes, states))
    for nodes, states in by_nodes.items():
        yield from (f"## {nodes} nodes besides the root", "")
        yield from table(_COLUMNS, [_cells(row) for row in states.values()])
    largest = max(row.largest_difference for row in rows)
    yield f"Largest difference of a log-probability from the cold pass's: {largest:.1e}."


def _figures(nodes: int, rows: Mapping[str, Row]) -> Iterator[tuple[str, str]]:
    """Mean over users of cold over each."""
    always, measured, how = rows[State.REDIS], rows[State.MEASURED], f", {nodes} nodes"
    yield f"returning user with one new item against a cold prefix{how}", _times(rows[State.NEW_ITEM])
    yield f"all of the prompt in memory against a cold prefix{how}", _times(rows[State.MEMORY])
    yield f"all of the prompt in Redis, always read, against a cold prefix{how}", _times(always)
    yield (
        f"of these users, for how many Redis is read where measured costs decide{how}",
        f"{measured.redis_users} of {measured.users}",
    )
    yield f"their prefix, so decided, against a cold one{how}", _times(measured)


def _times(row: Row) -> str:
    return f"{row.speedup_vs_cold.value:.2f}x"


def _cells(row: Row) -> tuple[str, ...]:
    tokens = (row.prompt_tokens, row.computed_tokens, row.memory_tokens, row.redis_tokens)
    interval = f"{row.speedup_vs_cold.low:.2f} to {row.speedup_vs_cold.high:.2f}"
    return (
        row.state,
        f"{row.p50_ms:.2f}",
        *(f"{value:.1f}" for value in tokens),
        str(row.users),
        _times(row),
        interval,
    )
