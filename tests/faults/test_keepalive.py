"""A grpc-js client that pings every 10 s while its stream is silent: no server sends it away.

Python clients hide what goes wrong here; gateways and service meshes do not.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from atspeed.local.stack import LocalStack
from tests.integration.test_reflection_clients import node_modules
from tests.serving import LIVENESS_SECONDS

__all__ = ["node_modules"]  # a fixture

PINGS = 4
SERVING = "0801"  # the message, in hexadecimal


@pytest.mark.long
def test_a_silent_stream_outlives_its_pings(node_modules: Path, stack: LocalStack) -> None:
    """Each service's, for four pings' time: one state, no end, no GOAWAY."""
    script = Path(__file__).with_name("grpc_js_stream.js")
    trace = {"GRPC_VERBOSITY": "DEBUG", "GRPC_TRACE": "transport,keepalive"}
    watched = [stack.orchestrators[0], stack.targets[0], stack.drafts[0]]
    clients = [
        subprocess.Popen(
            ["node", script, service.address, str(10 * PINGS + 5)],
            env={**os.environ, **trace, "NODE_PATH": str(node_modules)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for service in watched
    ]
    for client in clients:
        output, told = client.communicate(timeout=10 * PINGS + LIVENESS_SECONDS)
        assert json.loads(output) == {"states": [SERVING], "ended": False}
        assert told.count("Sending ping") >= PINGS - 1
        assert "goaway" not in told.lower()
