"""`atspeed bench`: measurements and checks of a served system."""

from __future__ import annotations

from atspeed.cli.commands import Commands, DeferredCommand

bench_commands = Commands(
    DeferredCommand(
        "parity",
        "atspeed.cli.bench.parity:bench_parity",
        "Compare lists with Hugging Face generate; exits with 1 if one differs beyond near-ties.",
    ),
    DeferredCommand(
        "lossless",
        "atspeed.cli.bench.lossless:bench_lossless",
        "Compare strict with target-only under exclusions; exits with 1 if a list differs or a path is invalid.",
    ),
    DeferredCommand(
        "invariance",
        "atspeed.cli.bench.invariance:bench_invariance",
        "Compare nodes of random token trees in shared passes and alone, bit for bit; exits with 1 if one differs.",
    ),
    DeferredCommand(
        "decode",
        "atspeed.cli.bench.speed:bench_decode",
        "Measure the time of a list by mode, K and prefix, and of other engines; exits with 1 if a list differs.",
    ),
    DeferredCommand(
        "overhead",
        "atspeed.cli.bench.speed:bench_overhead",
        "Measure what gRPC, orchestrator and Redis add to the models' time, for returning users.",
    ),
    DeferredCommand(
        "http",
        "atspeed.cli.bench.speed:bench_http",
        "Measure a list over HTTP/JSON by Envoy (extra `http`) beside the same list over gRPC.",
    ),
    DeferredCommand(
        "prefix",
        "atspeed.cli.bench.speed:bench_prefix",
        "Measure a request's first pass with its prompt cold, in memory or in Redis; exits with 1 if evaluations differ.",
    ),
    DeferredCommand(
        "events",
        "atspeed.cli.bench.speed:bench_events",
        "Measure how many events a second one orchestrator records, one by one and in batches.",
    ),
    DeferredCommand(
        "batch",
        "atspeed.cli.bench.speed:bench_batch",
        "Measure the lists a second of `atspeed batch` beside the bare searches of the same models.",
    ),
    DeferredCommand(
        "ray",
        "atspeed.cli.bench.speed:bench_ray",
        "Measure the lists a second of a Ray Data job (extra `ray`) by its number of workers.",
    ),
    DeferredCommand(
        "load",
        "atspeed.cli.bench.load:bench_load",
        "Measure latency and goodput of the real services at rising rates, target-only and strict.",
    ),
    DeferredCommand(
        "scaling",
        "atspeed.cli.bench.load:bench_scaling",
        "Measure load time, memory and selection by catalogue size, and searches by beams and prompt length.",
    ),
    DeferredCommand(
        "gpu",
        "atspeed.cli.bench.gpu:bench_gpu",
        "Check and measure passes on a GPU that is there for minutes; a run that is cut leaves a result.",
    ),
    DeferredCommand(
        "gpu-lists",
        "atspeed.cli.bench.gpu:bench_gpu_lists",
        "Measure lists on a GPU, with a trained draft and at the size of large models. It takes an hour; `gpu` takes minutes.",
    ),
    DeferredCommand(
        "report", "atspeed.cli.bench.report:bench_report", "Write the page of a measurement from its result file."
    ),
    help="Measure and check.",
)
