"""`atspeed bench report`: the page of a result file."""

from __future__ import annotations

from atspeed.cli.bench.options import OutFolder, ResultFile, write_report

_PAGES = {
    "decode": "atspeed.benchmarks.decode_report",
    "http": "atspeed.benchmarks.http_calls",
    "load": "atspeed.benchmarks.load_report",
    "overhead": "atspeed.benchmarks.overhead",
    "prefix": "atspeed.benchmarks.prefix",
    "scaling": "atspeed.benchmarks.scaling_report",
}
"""The module that writes a result's page, by the `benchmark` of its header."""


def bench_report(
    result: ResultFile,
    folder: OutFolder,
) -> None:
    """Write the page of a measurement from its result file."""
    write_report(result, folder, _PAGES)
