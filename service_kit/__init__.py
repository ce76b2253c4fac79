"""What the three servers share: settings, errors and their statuses, logs, health, draining, channels.

settings.py        one declaration per setting: flags, environment variables, --help and docs/settings.md
settings_docs.py   writes docs/settings.md
errors.py          the exceptions of a call, and the status that each becomes
interceptor.py     around every call: request id, bound on calls, errors to statuses, one log line
admission.py       how much inference runs at once, who waits, who is refused
health.py          grpc.health.v1, which lets go of its watchers when the server drains
server.py          builds, runs and drains a grpc.aio server
event_loop.py      what it runs on
tls.py             certificates that may be replaced while the process runs
tokens.py          bearer tokens by their hashes; auth.py asks for them, scopes.py says which method needs what
rotating_channel.py  a channel that follows its certificates and its token
channels.py        channels to other services: addresses, load balancing, health, retries
healthcheck.py     `python -m service_kit.healthcheck`, for container health checks
observing.py       the outermost interceptor: spans of calls, and counts of them
metrics.py         metrics declared as data, their HTTP port
metrics_docs.py    writes docs/metrics.md
tracing.py         spans, off by default; otel.py makes them with OpenTelemetry
logs.py            structlog on stderr, JSON or for people
quiet_grpc.py      gRPC writes no lines of its own between them
wire.py            protobuf messages to arrays and domain types, and back
bundle_watch.py    follows the bundle that the settings name, and has another one taken up
served_models.py   the two model services: the versions of a bundle's model, side by side; model_settings.py their settings
weights.py         what versions with the same weights share: these, and what is cached of prompts
observed_model.py  a model, measured and traced; model_metrics.py declares what is measured
versions.py        the versions that a server has now, for its health
"""
