"""deploy/kubernetes with Envoy: the components `http` and `http-secure` above our overlays, and their routes' own schemas."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests import fetched
from tests.composed import compose
from tests.kubernetes_manifests import FOLDER, ROOT, Manifest, built, containers, of_kind, pods

ENVOY = ROOT / "deploy" / "envoy"
GATEWAY = "gateway.networking.k8s.io"
OVERLAYS = {"cpu": "http", "gpu": "http", "cpu-secure": "http-secure", "gpu-secure": "http-secure"}
PLAIN_AND_SECURE = [("cpu", "envoy.yaml", "HTTP"), ("cpu-secure", "envoy.secure.yaml", "HTTPS")]

# Prints what is wrong with each object of a list, by the models that are made of the published CRDs.
_VALIDATE = """
for (const object of JSON.parse(process.argv[1])) {
  const kind = await import(`@kubernetes-models/gateway-api/${object.apiVersion}/${object.kind}`);
  new kind[object.kind](object).validate();
}
"""


def above(folder: Path, overlay: str, component: str) -> list[Manifest]:
    """Objects of an overlay of one's own: one of ours with a component."""
    own: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(FOLDER / "overlays" / overlay, folder)],
        "components": [os.path.relpath(FOLDER / "components" / component, folder)],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    return built(folder)


@pytest.fixture(scope="module")
def overlays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Manifest]]:
    """Each of our overlays with its component."""
    return {
        overlay: above(tmp_path_factory.mktemp(overlay), overlay, component) for overlay, component in OVERLAYS.items()
    }


def of_gateway(manifests: list[Manifest]) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["apiVersion"].startswith(GATEWAY)]


def gateway_problems(objects: list[Manifest]) -> str:
    """Faults that the Gateway API's schemas find; empty without one."""
    command = ["node", "--input-type=module", "--eval", _VALIDATE, json.dumps(objects)]
    folder = fetched.node_modules().parent  # from where its imports are looked for
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stderr


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_is_valid_and_in_one_namespace(overlays: dict[str, list[Manifest]], overlay: str) -> None:
    for manifest in overlays[overlay]:
        if not manifest["apiVersion"].startswith(GATEWAY):
            kubernetes_validate.validate(manifest, "1.34", strict=True)
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "atspeed"
            assert manifest["metadata"]["labels"]["app.kubernetes.io/part-of"] == "atspeed"


def test_routes_are_valid(overlays: dict[str, list[Manifest]]) -> None:
    routes = of_gateway(overlays["cpu-secure"])
    assert {route["kind"] for route in routes} == {"HTTPRoute", "BackendTLSPolicy"}
    assert gateway_problems(routes) == ""


def test_a_wrong_route_would_be_found(overlays: dict[str, list[Manifest]]) -> None:
    (route,) = of_gateway(overlays["cpu"])
    route = json.loads(json.dumps(route))
    route["spec"]["rules"][0]["matches"][0]["path"]["type"] = "Prefix"
    assert "type" in gateway_problems([route])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_route_leads_to_envoys_port(overlays: dict[str, list[Manifest]], overlay: str) -> None:
    found = overlays[overlay]
    (route,) = of_kind(found, "HTTPRoute").values()
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    service = of_kind(found, "Service")[backend["name"]]["spec"]
    (port,) = service["ports"]
    assert port["port"] == backend["port"] == 50050
    assert (port["appProtocol"] == "https") is overlay.endswith("secure")
    labels = of_kind(found, "Deployment")["edge"]["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    assert containers(found)["edge"]["ports"] == [{"name": port["targetPort"], "containerPort": 50050}]


@pytest.mark.parametrize(("overlay", "name", "scheme"), PLAIN_AND_SECURE)
def test_the_pod_reads_what_is_mounted(
    overlays: dict[str, list[Manifest]], overlay: str, name: str, scheme: str
) -> None:
    """The configuration is the deployed one, byte for byte, and its probe speaks what the port speaks."""
    found = overlays[overlay]
    pod, container = pods(found)["edge"], containers(found)["edge"]
    assert f"/etc/envoy/{name}" in container["args"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["configuration"] == "/etc/envoy"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    held = of_kind(found, "ConfigMap")[volumes["configuration"]["configMap"]["name"]]
    for file, text in held["data"].items():
        assert text == (ENVOY / file).read_text()
    assert base64.b64decode(held["binaryData"]["contract.pb"]) == (ENVOY / "contract.pb").read_bytes()
    assert {*held["data"], *held["binaryData"]} >= {name, "contract.pb", "openapi.json"}
    assert container["readinessProbe"]["httpGet"].get("scheme", "HTTP") == scheme
    assert container["readinessProbe"]["httpGet"]["path"] == "/healthz"
    if scheme == "HTTPS":
        assert mounts["secrets"] == "/secrets"
        assert volumes["secrets"]["secret"]["secretName"] == "edge-tls"


def test_the_image_is_that_of_compose(overlays: dict[str, list[Manifest]]) -> None:
    image = compose("--profile", "cpu", "--profile", "http")["services"]["edge"]["image"]
    assert containers(overlays["cpu"])["edge"]["image"] == image


def test_envoy_has_no_rights_that_it_does_not_need(overlays: dict[str, list[Manifest]]) -> None:
    """The namespace admits restricted pods alone; only the gateway's namespace reaches it, and it the orchestrators alone."""
    pod, container = pods(overlays["cpu"])["edge"], containers(overlays["cpu"])["edge"]
    assert (pod["automountServiceAccountToken"], pod["securityContext"]["runAsNonRoot"]) == (False, True)
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    rights = container["securityContext"]
    assert (rights["readOnlyRootFilesystem"], rights["allowPrivilegeEscalation"]) == (True, False)
    assert rights["capabilities"] == {"drop": ["ALL"]}
    assert container["lifecycle"]["preStop"]["sleep"]["seconds"] < pod["terminationGracePeriodSeconds"]
    policies = {name: found["spec"] for name, found in of_kind(overlays["cpu"], "NetworkPolicy").items()}
    (way_in,), (way_out,) = policies["edge"]["ingress"], policies["edge"]["egress"]
    assert way_in["from"] == [{"namespaceSelector": {"matchLabels": {"atspeed-client": "true"}}}]
    assert way_out["to"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "orchestrator"}}}]
    (to_orchestrator,) = policies["edge-to-orchestrator"]["ingress"]
    assert to_orchestrator["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "edge"}}}]
