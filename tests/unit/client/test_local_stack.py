"""LocalStack: in which order its processes end."""

from __future__ import annotations

from pathlib import Path

import pytest

from atspeed.local.stack import LocalStack, ServiceProcess


def test_services_drain_side_by_side_and_callers_before_the_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    monkeypatch.setattr(ServiceProcess, "terminate", lambda service: done.append(("asked", service.log.stem)))
    monkeypatch.setattr(ServiceProcess, "wait_stopped", lambda service: done.append(("waited for", service.log.stem)))
    LocalStack(tmp_path, drafts=1, targets=2, orchestrators=2, log_folder=tmp_path).stop()
    orchestrators, models = ["orchestrator-0", "orchestrator-1"], ["draft-0", "target-0", "target-1"]
    assert done == [
        (how, name) for group in (orchestrators, models) for how in ("asked", "waited for") for name in group
    ]
