"""The components `events` and `events-secure` of deploy/kubernetes: a consumer that starts with what it is given."""

from __future__ import annotations

from pathlib import Path

import kubernetes_validate
import pytest

from tests.containers import parsed
from tests.kubernetes_manifests import Manifest, above, containers, of_kind, pods

OVERLAYS = {"cpu": "events", "gpu": "events", "cpu-secure": "events-secure", "gpu-secure": "events-secure"}


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def found(overlay: str, tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    return above(tmp_path_factory.mktemp(overlay), overlay, [OVERLAYS[overlay]])


def test_everything_is_valid_and_in_one_namespace(found: list[Manifest]) -> None:
    for manifest in found:
        kubernetes_validate.validate(manifest, "1.34", strict=True)
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "atspeed"
            assert manifest["metadata"]["labels"]["app.kubernetes.io/part-of"] == "atspeed"


def test_the_command_takes_what_the_pod_has(
    found: list[Manifest], overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Secrets that the projected volume names lie where the variables say."""
    pod, container = pods(found)["events"], containers(found)["events"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == set(volumes)
    secured = overlay.endswith("secure")
    if secured:
        assert mounts["secrets"] == "/secrets"
        for source in volumes["secrets"]["projected"]["sources"]:
            for item in source["secret"]["items"]:
                (tmp_path / item["path"]).write_text("content")
    (source,) = container["envFrom"]
    data = of_kind(found, "ConfigMap")[source["configMapRef"]["name"]]["data"]
    given = parsed(container["args"], data, monkeypatch, tmp_path)
    assert given["address"] == "dns:///orchestrator:50051"
    assert (given["brokers"], given["topic"]) == ("BROKERS:9092", "events")
    assert (given["token_file"], given["ca"]) == (
        (tmp_path / "token", tmp_path / "ca.crt") if secured else (None, None)
    )
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert (given["health"], given["metrics_port"]) == (f"0.0.0.0:{ports['health']}", ports["metrics"])
    assert container["readinessProbe"]["grpc"]["port"] == ports["health"]


def test_only_the_orchestrators_and_brokers_are_within_reach(found: list[Manifest]) -> None:
    policies = {name: policy["spec"] for name, policy in of_kind(found, "NetworkPolicy").items()}
    service, brokers = policies["events"]["egress"]
    assert service["to"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "orchestrator"}}}]
    assert {port["port"] for port in brokers["ports"]} == {9092, 9093}
    (way_in,) = policies["events-to-orchestrator"]["ingress"]
    assert way_in["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "events"}}}]


def test_the_pod_has_no_rights_that_it_does_not_need(found: list[Manifest]) -> None:
    pod, container = pods(found)["events"], containers(found)["events"]
    assert (pod["automountServiceAccountToken"], pod["securityContext"]["runAsNonRoot"]) == (False, True)
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    rights = container["securityContext"]
    assert (rights["readOnlyRootFilesystem"], rights["allowPrivilegeEscalation"]) == (True, False)
    assert rights["capabilities"] == {"drop": ["ALL"]}


def test_all_components_fit_together(tmp_path: Path) -> None:
    """Each component patches only its own objects, whatever others add."""
    for overlay, components in (
        ("cpu", ["http", "events", "bundle-url", "signed-bundles", "monitoring", "keda"]),
        ("cpu-secure", ["http-secure", "events-secure", "canary", "monitoring"]),
    ):
        manifests = above(tmp_path, overlay, components)
        assert {"edge", "events", "orchestrator", "target", "draft"} == set(of_kind(manifests, "Deployment"))
        assert "bundle-key" not in {one["name"] for one in pods(manifests)["edge"]["volumes"]}
        for name, service in of_kind(manifests, "Service").items():
            named = {port["name"] for port in containers(manifests)[name]["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= named
