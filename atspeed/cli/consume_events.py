"""`atspeed consume-events`: users' events from Kafka into a running service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from atspeed.cli.connection import Connection, with_connection
from atspeed.cli.options import CommandError, optional
from atspeed.engine.files.lines import read_lines
from atspeed.observability import logs

_MOST_MESSAGES = 100_000
_OURS = ("bootstrap.servers", "group.id", "enable.auto.commit", "enable.auto.offset.store")

Brokers = Annotated[
    str, typer.Option(help="Kafka brokers, HOST:PORT,HOST:PORT.", envvar="ATSPEED_KAFKA_BROKERS", show_envvar=True)
]
Topic = Annotated[str, typer.Option(help="Topic of the events.", envvar="ATSPEED_KAFKA_TOPIC", show_envvar=True)]
Group = Annotated[str, typer.Option(help="Consumer group.", envvar="ATSPEED_KAFKA_GROUP", show_envvar=True)]
Form = Annotated[
    Literal["json", "protobuf"], typer.Option("--format", help="A message is a RecordEventsRequest in this format.")
]
DeadLetters = Annotated[
    str, typer.Option(help="Topic of messages that are never stored; the default is TOPIC.dead-letters.")
]
KafkaConfig = Annotated[
    Path | None,
    typer.Option(
        help="File of librdkafka's settings, NAME=VALUE per line, such as those of TLS and SASL.",
        envvar="ATSPEED_KAFKA_CONFIG",
        show_envvar=True,
        exists=True,
        dir_okay=False,
    ),
]
BatchMessages = Annotated[
    int, typer.Option(min=1, max=_MOST_MESSAGES, help="Most messages that are recorded and committed at once.")
]
MetricsPort = Annotated[
    int | None, typer.Option(min=0, max=65535, help="HTTP port of the Prometheus exporter; none without it.")
]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], typer.Option(help="Lowest level that is logged.")]


@with_connection
def consume_events(
    brokers: Brokers,
    topic: Topic = "events",
    group: Group = "atspeed",
    form: Form = "json",
    dead_letters: DeadLetters = "",
    kafka_config: KafkaConfig = None,
    batch_messages: BatchMessages = 1000,
    linger: Annotated[float, typer.Option(min=0.01, max=60, help="Longest wait for a full batch in seconds.")] = 0.2,
    health: Annotated[str, typer.Option(help="HOST:PORT of a gRPC health server; none without it.")] = "",
    metrics_port: MetricsPort = None,
    metrics_host: Annotated[str, typer.Option(help="Address of the Prometheus exporter.")] = "127.0.0.1",
    log_level: LogLevel = "info",
    *,
    connection: Connection,
) -> None:
    """Record the events of a Kafka topic, each at least once and none twice, until SIGTERM or Ctrl-C."""
    process = optional("atspeed.event_consumer.process")
    messages = optional("atspeed.event_consumer.messages")
    kafka = _settings(kafka_config) if kafka_config else {}
    with connection.client() as client:  # also proves the address before anything is read
        max_events = int(client.info().to_dict()["max_batch_events"])
    logs.configure("event-consumer", log_level, "json")
    options = process.ConsumerOptions(
        brokers=brokers,
        topic=topic,
        group=group,
        form=messages.MessageFormat(form),
        dead_letter_topic=dead_letters or f"{topic}.dead-letters",
        kafka=kafka,
        batch_messages=batch_messages,
        linger_seconds=linger,
        timeout_seconds=connection.timeout,
        max_events=max_events,
        health=health or None,
        metrics=None if metrics_port is None else (metrics_host, metrics_port),
    )
    try:
        process.consume(connection.endpoint(), options)
    except process.ConsumerStartError as error:
        raise CommandError(str(error)) from error


def _settings(path: Path) -> dict[str, str]:
    """Read librdkafka's settings. Lines that begin with # are comments. Raises CommandError naming the line."""
    settings: dict[str, str] = {}
    for number, line in read_lines(path):
        if line.lstrip().startswith("#"):
            continue
        name, separator, value = (part.strip() for part in line.partition("="))
        if not name or not separator:
            raise CommandError(f"{path}: line {number}: expected NAME=VALUE")
        if name in _OURS:
            raise CommandError(f"{path}: line {number}: {name} is set by the command")
        settings[name] = value
    return settings
