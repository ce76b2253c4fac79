"""checkov over what the overlays apply, the Dockerfile and the Compose files, and the list of what it may find."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests import fetched
from tests.kubernetes_manifests import FOLDER, ROOT, above

DEPLOY = ROOT / "deploy"
OVERLAYS = {
    "cpu": ["http", "events", "bundle-url", "signed-bundles", "monitoring", "keda"],
    "gpu": ["gpu-mps", "canary"],
    "cpu-secure": ["http-secure", "events-secure", "canary", "monitoring"],
    "gpu-secure": ["gpu-slices", "bundle-url"],
}
# Two faults that it must find: only then does a run without findings mean something.
WRONG = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "wrong", "namespace": "atspeed"},
    "spec": {
        "hostNetwork": True,
        "containers": [{"name": "a", "image": "a:1", "securityContext": {"privileged": True}}],
    },
}
FAULTS = {"CKV_K8S_16", "CKV_K8S_19"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Ids of all checks that failed, by file."""
    checkov, folder = fetched.checkov(), tmp_path_factory.mktemp("checked")
    for overlay, components in OVERLAYS.items():
        manifests = above(tmp_path_factory.mktemp(overlay), overlay, components)
        (folder / f"{overlay}.yaml").write_text(yaml.safe_dump_all(manifests), encoding="utf-8")
    (folder / "wrong.yaml").write_text(yaml.safe_dump(WRONG), encoding="utf-8")
    for file in (DEPLOY / "Dockerfile", ROOT / "docker-compose.yml", *DEPLOY.glob("docker-compose.*.yml")):
        shutil.copy(file, folder)
    kinds = yaml.safe_load((DEPLOY / "checkov.yaml").read_text(encoding="utf-8"))["framework"]
    command = [checkov, "--directory", str(folder), "--framework", *kinds, "--skip-download", "--compact", "-o", "json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "LOG_LEVEL": "ERROR"}
    )
    assert done.returncode == 1, done.stderr  # something was found
    reports = json.loads(done.stdout)
    by_file: dict[str, set[str]] = {f"/{path.name}": set() for path in folder.iterdir()}
    for report in reports if isinstance(reports, list) else [reports]:
        assert report["summary"]["parsing_errors"] == 0
        for check in report["results"]["failed_checks"]:
            by_file["/" + Path(check["repo_file_path"]).name].add(check["check_id"])
    return by_file


def test_nothing_is_found_but_what_stands_in_the_list(found: dict[str, set[str]]) -> None:
    listed = set(yaml.safe_load((DEPLOY / "checkov.yaml").read_text(encoding="utf-8"))["skip-check"])
    assert set.union(*(checks for file, checks in found.items() if file != "/wrong.yaml")) == listed


def test_a_wrong_pod_would_be_found(found: dict[str, set[str]]) -> None:
    assert found["/wrong.yaml"] >= FAULTS


def test_every_component_is_among_what_is_checked() -> None:
    there = {folder.name for folder in Path(FOLDER, "components").iterdir()}
    included = {"http": "http-secure", "events": "events-secure"}
    assert there == {component for components in OVERLAYS.values() for component in components} | {"secure"} | set(
        included
    )
