"""Components of deploy/kubernetes above its overlays: bundles by URL, signatures, the Prometheus Operator, KEDA."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from atspeed.rollout.bundle_opening import bundle_sources
from tests.deploy.test_dashboards_and_alerts import METRICS, selectors
from tests.kubernetes_manifests import (
    PORTS,
    Manifest,
    above,
    built,
    containers,
    of_kind,
    pods,
    settings_of,
)

OVERLAYS = ("cpu", "gpu", "cpu-secure", "gpu-secure")
FROM_OPERATORS = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=OVERLAYS)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """An overlay with bundles by URL, signed."""
    folder = tmp_path_factory.mktemp(request.param)
    return above(folder, request.param, ["bundle-url", "signed-bundles"])


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """An overlay with the objects of two operators."""
    return above(tmp_path_factory.mktemp("operators"), "cpu", ["monitoring", "keda"])


def test_everything_is_valid(stored: list[Manifest], watched: list[Manifest]) -> None:
    for manifest in (*stored, *watched):
        if manifest["kind"] not in FROM_OPERATORS:
            kubernetes_validate.validate(manifest, "1.34", strict=True)
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "atspeed"
            assert manifest["metadata"]["labels"]["app.kubernetes.io/part-of"] == "atspeed"


def test_a_pod_has_a_cache_for_bundles_in_place_of_the_volume(stored: list[Manifest]) -> None:
    policy = of_kind(stored, "NetworkPolicy")["bundle-url"]["spec"]
    assert policy["egress"] == [{"ports": [{"port": 443, "protocol": "TCP"}]}]
    assert set(policy["podSelector"]["matchExpressions"][0]["values"]) == set(PORTS)
    for name, pod in pods(stored).items():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert "bundle" not in volumes
        assert "emptyDir" in volumes["cache"]
        container = containers(stored)[name]
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        assert set(mounts) == set(volumes)
        data = of_kind(stored, "ConfigMap")[f"atspeed-{name}"]["data"]
        prefix = settings_of(name).model_config["env_prefix"]
        assert data[f"{prefix}BUNDLE_CACHE"] == mounts["cache"]["mountPath"]
        assert "readOnly" not in mounts["cache"]
        key = Path(data[f"{prefix}BUNDLE_PUBLIC_KEY"])
        assert (str(key.parent), mounts["bundle-key"]["readOnly"]) == (mounts["bundle-key"]["mountPath"], True)
        assert volumes["bundle-key"]["configMap"] == {"name": "atspeed-bundle-key"}
        assert {"secretRef": {"name": "atspeed-store", "optional": True}} in container["envFrom"]


def test_a_first_fetch_has_time(stored: list[Manifest]) -> None:
    for name, deployment in of_kind(stored, "Deployment").items():
        probe = containers(stored)[name]["startupProbe"]
        patience = probe["periodSeconds"] * probe["failureThreshold"]
        assert 900 <= patience < deployment["spec"]["progressDeadlineSeconds"]


def test_services_take_the_settings(stored: list[Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Settings of an overlay with a URL, here of a store in memory."""
    key = tmp_path / "bundle.pub"
    command = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]
    private = subprocess.run(command, check=True, capture_output=True).stdout
    key.write_bytes(
        subprocess.run(["openssl", "pkey", "-pubout"], input=private, check=True, capture_output=True).stdout
    )
    for name in PORTS:
        with monkeypatch.context() as patch:
            for variable, value in of_kind(stored, "ConfigMap")[f"atspeed-{name}"]["data"].items():
                if "_BUNDLE" in variable or variable == "ATSPEED_ORCHESTRATOR_TARGET":
                    text = value.replace("s3://BUCKET", "memory://bucket").replace("/bundle-key", str(tmp_path))
                    patch.setenv(variable, text)
            settings = settings_of(name).load([])
            (source,) = bundle_sources(settings).values()
            assert source.place == "memory://bucket/current"
            assert source.look() is None


def test_every_bundle_setting_of_an_overlay_can_be_a_url(tmp_path: Path) -> None:
    """The overlay of docs/artefacts.md."""
    text = (ROOT / "docs" / "artefacts.md").read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
    own = yaml.safe_load(text)
    folder = tmp_path / "overlays" / "mine"
    folder.mkdir(parents=True)
    names = [Path(component).name for component in own["components"]]
    (overlay,) = [Path(resource).name for resource in own["resources"]]
    found = above(folder, overlay, names, patches=own["patches"])
    for name, manifest in of_kind(found, "ConfigMap").items():
        role = name.removeprefix("atspeed-").upper()
        assert manifest["data"][f"ATSPEED_{role}_BUNDLE"] == "s3://models/current"


def test_the_operator_scrapes_each_service_under_the_name_of_its_job(watched: list[Manifest]) -> None:
    (monitor,) = of_kind(watched, "ServiceMonitor").values()
    spec = monitor["spec"]
    (chosen,) = spec["selector"]["matchExpressions"]
    for name, service in of_kind(watched, "Service").items():
        assert service["metadata"]["labels"][chosen["key"]] == name
        assert name in chosen["values"]
        assert spec["jobLabel"] == chosen["key"]
        ports = {port["name"]: port for port in service["spec"]["ports"]}
        (endpoint,) = spec["endpoints"]
        assert ports[endpoint["port"]]["targetPort"] in {port["name"] for port in containers(watched)[name]["ports"]}


def test_the_operator_gets_the_alert_rules_as_they_are(watched: list[Manifest], tmp_path: Path) -> None:
    (rules,) = of_kind(watched, "PrometheusRule").values()
    ours = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
    assert rules["spec"] == ours
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules["spec"]), encoding="utf-8")
    done = subprocess.run([promtool, "check", "rules", "rules.yml"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_keda_scales_by_the_same_metrics_within_the_same_bounds(watched: list[Manifest], tmp_path: Path) -> None:
    base = built(ROOT / "deploy" / "kubernetes" / "overlays" / "cpu")
    assert not of_kind(watched, "HorizontalPodAutoscaler")
    scalers = {name: found["spec"] for name, found in of_kind(base, "HorizontalPodAutoscaler").items()}
    groups = []
    for name, scaled in of_kind(watched, "ScaledObject").items():
        spec, scaler = scaled["spec"], scalers.pop(name)
        assert spec["scaleTargetRef"] == {"name": scaler["scaleTargetRef"]["name"]}
        assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (scaler["minReplicas"], scaler["maxReplicas"])
        assert spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == scaler["behavior"]
        (trigger,) = spec["triggers"]
        (metric,) = (found["pods"] for found in scaler["metrics"])
        assert trigger["metricType"] == metric["target"]["type"]
        assert trigger["metadata"]["threshold"] == metric["target"]["averageValue"]
        ((series, where),) = selectors(trigger["metadata"]["query"])
        assert (series, where) == (metric["metric"]["name"], f'job="{name}"')
        assert series in METRICS
        groups.append({"name": name, "rules": [{"record": f"{name}:scaled", "expr": trigger["metadata"]["query"]}]})
    assert not scalers
    if promtool := shutil.which("promtool"):
        (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": groups}), encoding="utf-8")
        subprocess.run([promtool, "check", "rules", "rules.yml"], cwd=tmp_path, capture_output=True, check=True)
