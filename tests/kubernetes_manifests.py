"""deploy/kubernetes as kubectl's kustomize builds it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from atspeed.configuration.settings import ServiceSettings
from atspeed.configuration.settings_docs import SERVICES, load
from tests import fetched

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "kubernetes"
PORTS = {"draft": 50053, "target": 50052, "orchestrator": 50051}
SERVICE_NAMES = {
    "draft": "atspeed.v1.DraftService",
    "target": "atspeed.v1.TargetService",
    "orchestrator": "atspeed.v1.RecommendationService",
}

Manifest = dict[str, Any]


def built(folder: Path) -> list[Manifest]:
    """All that a folder applies, by a kubectl that is never pointed at a cluster."""
    command = [fetched.kubectl(), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return list(yaml.safe_load_all(done.stdout))


def above(folder: Path, overlay: str, components: Sequence[str], **more: object) -> list[Manifest]:
    """Objects of an overlay of one's own in a folder: one of ours with components, and fields of its own."""
    own: dict[str, object] = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    own["resources"] = [os.path.relpath(FOLDER / "overlays" / overlay, folder)]
    own["components"] = [os.path.relpath(FOLDER / "components" / component, folder) for component in components]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(own | more), encoding="utf-8")
    return built(folder)


def of_kind(manifests: list[Manifest], kind: str) -> dict[str, Manifest]:
    return {manifest["metadata"]["name"]: manifest for manifest in manifests if manifest["kind"] == kind}


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The pod that each Deployment makes."""
    return {name: found["spec"]["template"]["spec"] for name, found in of_kind(manifests, "Deployment").items()}


def containers(manifests: list[Manifest]) -> dict[str, Manifest]:
    found = {}
    for name, pod in pods(manifests).items():
        (found[name],) = pod["containers"]
    return found


def settings_of(service: str) -> type[ServiceSettings]:
    (found,) = [settings for settings in map(load, SERVICES) if settings.service == service]
    return found
