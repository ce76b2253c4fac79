"""deploy/kubernetes: built by kubectl's kustomize, checked against the published schemas, and against what the services are."""

from __future__ import annotations

from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from atspeed.engine.kv.memory_cache import KvLayout
from atspeed.model_host.model_metrics import WAITING
from atspeed.model_host.settings import ModelSettings
from atspeed.observability.admission_metrics import QUEUED
from tests.kubernetes_manifests import (
    FOLDER,
    PORTS,
    SERVICE_NAMES,
    Manifest,
    above,
    built,
    containers,
    of_kind,
    pods,
    settings_of,
)

WEIGHTS_OF_7B = 13_500_000_000  # bytes, in float16
MODULES = {"draft": "draft_service", "target": "target_service", "orchestrator": "orchestrator"}


@pytest.fixture(scope="session", params=["cpu", "gpu", "cpu-secure", "gpu-secure"])
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def manifests(overlay: str) -> list[Manifest]:
    """All that an overlay applies."""
    return built(FOLDER / "overlays" / overlay)


@pytest.fixture(scope="session")
def plain() -> list[Manifest]:
    return built(FOLDER / "overlays" / "cpu")


def test_everything_is_valid_and_in_one_namespace(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        kubernetes_validate.validate(manifest, "1.34", strict=True)
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "atspeed"
            assert manifest["metadata"]["labels"]["app.kubernetes.io/part-of"] == "atspeed"


def test_every_file_is_part_of_it() -> None:
    """A manifest that no kustomization names would be silently left out."""
    for found in FOLDER.rglob("kustomization.yaml"):
        says = yaml.safe_load(found.read_text())
        files = {*says.get("resources", ()), *(patch.get("path") for patch in says.get("patches", ()))}
        assert {path.name for path in found.parent.iterdir()} - {"kustomization.yaml"} <= files


def test_every_variable_is_a_setting(manifests: list[Manifest]) -> None:
    """A service refuses to start on a variable that it does not know, and on a value that it cannot have."""
    maps = of_kind(manifests, "ConfigMap")
    for name, container in containers(manifests).items():
        settings = settings_of(name)
        (source,) = container["envFrom"]
        variables = {
            **maps[source["configMapRef"]["name"]]["data"],
            **{variable["name"]: "" for variable in container["env"]},
        }
        prefix = settings.model_config["env_prefix"]
        fields = {variable.removeprefix(prefix).lower() for variable in variables}
        assert all(variable.startswith(prefix) for variable in variables)
        assert fields <= set(settings.model_fields)
        assert {field for field, info in settings.model_fields.items() if info.is_required()} <= fields
        assert variables[f"{prefix}PORT"] == str(PORTS[name])
        assert variables[f"{prefix}BUNDLE"] == "/bundle/stable"


def test_a_models_memory_is_well_below_the_limit_of_its_pod(manifests: list[Manifest]) -> None:
    """The default for open streams alone, 4 GiB, once reached a target's limit: it would have been killed under load."""
    maps = of_kind(manifests, "ConfigMap")
    for name in ("target", "draft"):
        data, prefix = maps[f"atspeed-{name}"]["data"], f"ATSPEED_{name.upper()}_"
        limit = containers(manifests)[name]["resources"]["limits"]["memory"]
        assert limit.endswith("Gi")
        kept = sum(int(data[prefix + setting]) for setting in ("KV_OPEN_MB", "KV_MEMORY_MB", "BATCH_KV_MB"))
        assert kept <= 0.6 * 1024 * int(limit.removesuffix("Gi")), "the rest is for weights, passes and Python"


def test_secrets_are_referred_to_and_not_there(manifests: list[Manifest]) -> None:
    assert not of_kind(manifests, "Secret")
    for container in containers(manifests).values():
        for variable in container["env"]:
            assert set(variable) == {"name", "valueFrom"}
            assert set(variable["valueFrom"]) == {"secretKeyRef"}


def test_probes_ask_the_port_and_the_service(plain: list[Manifest]) -> None:
    for name, container in containers(plain).items():
        assert container["args"] == [MODULES[name]]
        assert container["ports"][0] == {"name": "grpc", "containerPort": PORTS[name]}
        assert container["readinessProbe"]["grpc"] == {"port": PORTS[name], "service": SERVICE_NAMES[name]}
        for probe in ("startupProbe", "livenessProbe"):
            assert container[probe]["grpc"] == {"port": PORTS[name]}


def test_names_are_headless_and_lead_to_the_pods(manifests: list[Manifest]) -> None:
    """One address for a service would be one connection, and so one pod, for each client."""
    deployments = of_kind(manifests, "Deployment")
    for name, service in of_kind(manifests, "Service").items():
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["ports"][0]["port"] == PORTS[name]
        labels = deployments[name]["spec"]["template"]["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= labels.items()
    data = of_kind(manifests, "ConfigMap")["atspeed-orchestrator"]["data"]
    for role in ("target", "draft"):
        assert data[f"ATSPEED_ORCHESTRATOR_{role.upper()}"] == f"dns:///{role}:{PORTS[role]}"


def test_pods_have_no_rights_that_they_do_not_need(manifests: list[Manifest]) -> None:
    (namespace,) = of_kind(manifests, "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in pods(manifests).values():
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        rights = container["securityContext"]
        assert rights["readOnlyRootFilesystem"] is True
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}
        (bundle,) = [mount for mount in container["volumeMounts"] if mount["name"] == "bundle"]
        assert bundle["readOnly"] is True


def test_a_pod_takes_calls_until_callers_know_and_has_longer_to_stop_than_that_and_draining(
    manifests: list[Manifest],
) -> None:
    for name, pod in pods(manifests).items():
        (container,) = pod["containers"]
        pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert pause > 0
        drain = settings_of(name).model_fields["drain_seconds"].default
        assert pod["terminationGracePeriodSeconds"] >= pause + drain + 10


def test_each_service_scales_is_spread_and_is_never_drained_whole(manifests: list[Manifest]) -> None:
    for name in PORTS:
        scaler = of_kind(manifests, "HorizontalPodAutoscaler")[name]["spec"]
        assert scaler["scaleTargetRef"]["name"] == name
        assert scaler["minReplicas"] >= 2
        # A number beside an autoscaler's would undo it with every `kubectl apply`.
        assert "replicas" not in of_kind(manifests, "Deployment")[name]["spec"]
        budget = of_kind(manifests, "PodDisruptionBudget")[name]["spec"]
        assert budget["maxUnavailable"] == 1
        spread = pods(manifests)[name]["topologySpreadConstraints"]
        for constraint in (budget["selector"], *(one["labelSelector"] for one in spread)):
            assert constraint["matchLabels"] == {"app.kubernetes.io/name": name}


def limit(manifests: list[Manifest], service: str, name: str) -> int:
    """A setting as the manifests leave it."""
    data = of_kind(manifests, "ConfigMap")[f"atspeed-{service}"]["data"]
    return int(data.get(f"ATSPEED_{service.upper()}_{name.upper()}", settings_of(service).model_fields[name].default))


def batched(manifests: list[Manifest], model: str) -> int:
    """Requests of one shared pass, which depend on the model's device."""
    data = of_kind(manifests, "ConfigMap")[f"atspeed-{model}"]["data"]
    settings = settings_of(model).model_construct(provider=data.get(f"ATSPEED_{model.upper()}_PROVIDER", "cpu"))
    assert isinstance(settings, ModelSettings)
    assert f"ATSPEED_{model.upper()}_BATCH_REQUESTS" not in data
    return settings.batch_limits(KvLayout(1, 1, 1, "float16", 1)).requests


@pytest.mark.parametrize("model", ["target", "draft"])
def test_saturated_orchestrators_make_the_models_scale(manifests: list[Manifest], model: str) -> None:
    """From the fewest replicas to the most: each recommendation has one pass that runs or waits, at most."""
    scalers = {name: found["spec"] for name, found in of_kind(manifests, "HorizontalPodAutoscaler").items()}
    (metric,) = (found["pods"] for found in scalers[model]["metrics"])
    assert metric["metric"]["name"] == WAITING.name
    streams = limit(manifests, "orchestrator", "max_running")
    together = batched(manifests, model)
    for orchestrators, models in (
        (scalers["orchestrator"]["minReplicas"], scalers[model]["minReplicas"]),
        (scalers["orchestrator"]["maxReplicas"], scalers[model]["maxReplicas"] - 1),
    ):
        waiting = orchestrators * streams / models - together
        assert waiting > 1.1 * float(metric["target"]["averageValue"])  # closer than that, nothing is done


def test_more_requests_than_orchestrators_serve_make_them_scale(manifests: list[Manifest]) -> None:
    scaler = of_kind(manifests, "HorizontalPodAutoscaler")["orchestrator"]["spec"]
    (metric,) = (found["pods"] for found in scaler["metrics"])
    assert metric["metric"]["name"] == QUEUED.name
    assert limit(manifests, "orchestrator", "max_queued") > 1.1 * float(metric["target"]["averageValue"])


def test_spans_reach_a_collector_and_names_are_found_on_the_node_too(manifests: list[Manifest]) -> None:
    policies = {name: policy["spec"] for name, policy in of_kind(manifests, "NetworkPolicy").items()}
    (spans,) = policies["traces"]["egress"]
    assert spans["to"] == [{"namespaceSelector": {"matchLabels": {"atspeed-monitoring": "true"}}}]
    assert [port["port"] for port in spans["ports"]] == [4317]
    names = policies["names-and-redis"]["egress"][0]
    assert {"ipBlock": {"cidr": "169.254.20.10/32"}} in names["to"]


def test_only_who_needs_a_service_reaches_it(manifests: list[Manifest]) -> None:
    policies = {name: policy["spec"] for name, policy in of_kind(manifests, "NetworkPolicy").items()}
    assert policies["nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    (to_models,) = policies["models"]["ingress"]
    assert to_models["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "orchestrator"}}}]
    (outer,) = policies["orchestrator"]["ingress"]
    assert outer["from"] == [{"namespaceSelector": {"matchLabels": {"atspeed-client": "true"}}}]


def test_prometheus_finds_and_reaches_the_metrics(manifests: list[Manifest]) -> None:
    maps = of_kind(manifests, "ConfigMap")
    for name, deployment in of_kind(manifests, "Deployment").items():
        template, data = deployment["spec"]["template"], maps[f"atspeed-{name}"]["data"]
        port = data[f"ATSPEED_{name.upper()}_METRICS_PORT"]
        assert template["metadata"]["annotations"] == {"prometheus.io/scrape": "true", "prometheus.io/port": port}
        (container,) = template["spec"]["containers"]
        assert container["ports"][1] == {"name": "metrics", "containerPort": int(port)}
    policy = of_kind(manifests, "NetworkPolicy")["metrics"]["spec"]
    assert set(policy["podSelector"]["matchExpressions"][0]["values"]) == set(PORTS)
    assert policy["ingress"][0]["ports"] == [{"port": "metrics", "protocol": "TCP"}]


def test_gpus_are_asked_for_in_their_overlay_alone(manifests: list[Manifest], overlay: str) -> None:
    for name, container in containers(manifests).items():
        on_gpu = overlay.startswith("gpu") and name != "orchestrator"
        assert container["image"] == f"atspeed-serving:{'gpu' if on_gpu else 'cpu'}"
        assert container["resources"]["limits"].get("nvidia.com/gpu") == (1 if on_gpu else None)
        data = of_kind(manifests, "ConfigMap")[f"atspeed-{name}"]["data"]
        assert data.get(f"ATSPEED_{name.upper()}_PROVIDER") == ("cuda" if on_gpu else None)


def test_a_target_on_a_gpu_has_time_and_memory_for_its_weights(manifests: list[Manifest], overlay: str) -> None:
    """13 GB of weights: twice in memory while they load, beside the prefix cache; minutes from a slow volume."""
    if not overlay.startswith("gpu"):
        return
    container = containers(manifests)["target"]
    kept = limit(manifests, "target", "kv_memory_mb")
    gib = int(container["resources"]["limits"]["memory"].removesuffix("Gi"))
    assert gib * 2**30 > kept * 2**20 + 2 * WEIGHTS_OF_7B
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 900
    # The rollout must not be given up before the pod is.
    assert of_kind(manifests, "Deployment")["target"]["spec"]["progressDeadlineSeconds"] > 900


# components above overlays


@pytest.mark.parametrize("overlay_with_gpu", ["gpu", "gpu-secure"])
@pytest.mark.parametrize(
    ("component", "target", "draft"),
    [
        ("gpu-mps", "nvidia.com/gpu.shared", "nvidia.com/gpu.shared"),
        ("gpu-slices", "nvidia.com/mig-4g.71gb", "nvidia.com/mig-1g.18gb"),
    ],
)
def test_draft_and_target_can_share_a_gpu(
    component: str, target: str, draft: str, overlay_with_gpu: str, tmp_path: Path
) -> None:
    found = above(tmp_path, overlay_with_gpu, [component])
    for manifest in found:
        kubernetes_validate.validate(manifest, "1.34", strict=True)
    for name, asked in (("target", target), ("draft", draft)):
        limits = containers(found)[name]["resources"]["limits"]
        assert {kind: number for kind, number in limits.items() if kind.startswith("nvidia.com/")} == {asked: 1}


def test_with_the_canary_component_all_follow_two_links_in_the_volume(
    manifests: list[Manifest], overlay: str, tmp_path: Path
) -> None:
    for name, found in of_kind(above(tmp_path, overlay, ["canary"]), "ConfigMap").items():
        role = name.removeprefix("atspeed-")
        of, before = f"ATSPEED_{role.upper()}_", of_kind(manifests, "ConfigMap")[name]["data"]
        changed = {key: value for key, value in found["data"].items() if before.get(key) != value}
        expected = {f"{of}CANARY_BUNDLE": "/bundle/canary"}
        if role == "orchestrator":
            expected[f"{of}CANARY_SHARE"] = "0"
        else:  # of each bundle, so both together are what one had
            each = [f"{of}{setting}" for setting in ("KV_OPEN_MB", "BATCH_KV_MB")]
            expected |= {setting: str(int(before[setting]) // 2) for setting in each}
        assert changed == expected
        assert {key.removeprefix(of).lower() for key in changed} <= set(settings_of(role).model_fields)
