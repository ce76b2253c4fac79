"""The commands of `atspeed`.

up                                the services on this machine       recommend, record, history, forget, info   call a service
certificates, token               for TLS and for callers            catalogue update, encode    other items, same models
consume-events                    events from Kafka, extra `kafka`
bundle inspect, bundle verify     what a bundle holds                batch                   lists for a file of users
train, export, base                                                                          extra `train`
import, distill                   a checkpoint as a bundle, a draft for a bundle's target            extra `train`
bench ..., inflate                measurements                       atspeed/cli/bench/, atspeed/cli/inflate.py
plan                              replicas and memory for a rate

An expected failure prints one line. `atspeed/cli/failures.py` has the exit codes.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from atspeed.cli.commands import Commands, DeferredCommand

app = Commands(
    DeferredCommand("up", "atspeed.cli.up:up", "Run all services on this machine until Ctrl-C."),
    DeferredCommand("recommend", "atspeed.cli.calls:recommend", "Recommend items to a user, or for a history."),
    DeferredCommand(
        "record",
        "atspeed.cli.calls:record",
        "Append items to a user's history. Ids that the catalogue does not know are stored too.",
    ),
    DeferredCommand("history", "atspeed.cli.calls:history", "Print a user's stored items, oldest first, one per line."),
    DeferredCommand("forget", "atspeed.cli.calls:forget", "Erase a user's history."),
    DeferredCommand(
        "info",
        "atspeed.cli.calls:info",
        "Print versions, limits and the state of the services as JSON, with or without --json.",
    ),
    DeferredCommand(
        "batch",
        "atspeed.cli.batch:batch",
        "Write the lists of all users of a file, by a bundle in this process or by a service at batch priority.",
    ),
    DeferredCommand(
        "distill",
        "atspeed.cli.distill:distill",
        "Train a draft for the target of a bundle, and write a bundle with both. The target stays as it is.",
    ),
    DeferredCommand(
        "inflate",
        "atspeed.cli.inflate:inflate",
        "Inflate the models of a bundle: the same lists at the cost of a larger model. Writes OUT/bundle and its checkpoints.",
    ),
    DeferredCommand(
        "certificates",
        "atspeed.cli.security:certificates",
        "Write throwaway certificates of a throwaway CA, one folder per service, to try TLS. Not for production.",
    ),
    DeferredCommand(
        "token",
        "atspeed.cli.security:token",
        "Make a token. Prints it on standard output, once, and its entry for the service's tokens file on standard error.",
    ),
    DeferredCommand("plan", "atspeed.cli.plan:plan", "Plan replicas, cores, memory and Redis for a rate and a p99."),
    DeferredCommand(
        "import",
        "atspeed.cli.import_checkpoint:import_checkpoint",
        "Import a checkpoint of a generative recommender as a bundle without a draft.",
    ),
    DeferredCommand(
        "consume-events",
        "atspeed.cli.consume_events:consume_events",
        "Record the events of a Kafka topic, each at least once and none twice, until SIGTERM or Ctrl-C.",
    ),
    DeferredCommand("train", "atspeed.cli.train:train", "Train a recipe's target and draft and write the bundle."),
    DeferredCommand("base", "atspeed.cli.train:base", "Fetch a pretrained model for a recipe's `base`."),
    DeferredCommand(
        "export", "atspeed.cli.train:export", "Export one model of a checkpoint, and check the export against it."
    ),
    DeferredCommand("bundle", "atspeed.cli.bundle:bundle_commands", "Inspect, verify, sign, push and pull a bundle."),
    DeferredCommand("catalogue", "atspeed.cli.catalogue:catalogue_commands", "Change the items of a bundle."),
    DeferredCommand("bench", "atspeed.cli.bench.main:bench_commands", "Measure and check."),
    pretty_exceptions_show_locals=False,
    add_completion=True,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"atspeed {version('atspeed-serving')}")
        raise typer.Exit


@app.callback()
def atspeed(
    _shown: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Speculative beam decoding for generative recommendation."""


if __name__ == "__main__":
    sys.exit(app())
