"""Dashboard and alert rules: of metrics that exist, valid for Prometheus's own tool, and explained to operators."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from atspeed.observability.metrics import Declared
from atspeed.observability.metrics_docs import declared
from orchestrator.settings import OrchestratorSettings
from tests.observed import DASHBOARD, panels

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
EVERYWHERE = {"job", "instance", "le"}
FROM_LIBRARIES = {"process_resident_memory_bytes", "up"}

METRICS: dict[str, Declared] = {metric.name: metric for metrics in declared().values() for metric in metrics}


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def queries() -> Iterator[str]:
    yield from (rule["expr"] for rule in alerts().values())
    yield from (query for panel in panels() for query in panel.queries)


def selectors(query: str) -> Iterator[tuple[str, str]]:
    """Names of series and what stands in braces behind them."""
    yield from re.findall(r"\b(atspeed_\w+|process_\w+|up)\b(?:\{([^}]*)\})?", query)


def family(series: str) -> str:
    """The metric that a series belongs to."""
    name = re.sub(r"_(bucket|sum|count)$", "", series)
    return name if name in METRICS and METRICS[name].kind == "histogram" else series


@pytest.mark.parametrize("query", sorted(set(queries())))
def test_a_query_asks_for_metrics_and_labels_that_exist(query: str) -> None:
    found = list(selectors(query))
    assert found
    for series, where in found:
        metric = METRICS.get(family(series))
        assert metric is not None or series in FROM_LIBRARIES
        labels = set(re.findall(r"(\w+)\s*[=!]~?", where))
        assert labels <= EVERYWHERE | set(metric.labels if metric else ())
    grouped = {
        label.strip() for names in re.findall(r"(?:by|ignoring) \(([^)]*)\)", query) for label in names.split(",")
    }
    known = {label for series, _ in found if (metric := METRICS.get(family(series))) for label in metric.labels}
    assert grouped <= EVERYWHERE | known


def test_a_counter_is_only_asked_for_its_rate() -> None:
    """A gauge with the seconds for which a process has run."""
    for query in queries():
        for series, _ in selectors(query):
            metric = METRICS.get(family(series))
            if metric and metric.kind in {"counter", "histogram"}:
                assert re.search(rf"(rate|increase)\({series}\b", query), query


def test_names_follow_the_conventions() -> None:
    assert len(METRICS) == len({name for name in METRICS if re.fullmatch(r"atspeed_[a-z_]+", name)})
    for name, metric in METRICS.items():
        assert name.endswith("_total") is (metric.kind == "counter")
        assert metric.meaning.endswith(".")


def test_every_alert_is_explained_and_tried() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    tried = (PROMETHEUS / "alerts_test.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| <a id=\"\w+\"></a>`(Atspeed\w+)` \|", page, re.MULTILINE)) == sorted(alerts())
    for name, rule in alerts().items():
        assert f'alertname="{name}"' in tried
        assert rule["labels"]["severity"] in {"warning", "critical"}
        address, _, place = rule["annotations"]["runbook_url"].partition("#")
        assert address == "{{ $externalLabels.runbooks }}/operations.md"
        assert place == name.lower()
        assert page.count(f'<a id="{place}"></a>') == 1


def test_no_panel_lies_on_another_and_all_ask_the_source_that_is_provisioned() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    wide = max(panel["gridPos"]["x"] + panel["gridPos"]["w"] for panel in dashboard["panels"])
    assert wide <= 24
    provisioned = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/sources.yaml").read_text())
    sources = {one["uid"]: one["type"] for one in provisioned["datasources"]}
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "datasource":
            assert sources[variable["current"]["value"]] == variable["query"]
    asked = {panel["datasource"]["uid"] for panel in dashboard["panels"] if panel["type"] != "row"}
    assert asked == {"${datasource}"}


def test_every_variable_is_used_and_every_used_one_is_there() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    there = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            for series, where in selectors(target["expr"]):
                metric = METRICS.get(family(series))
                used = set(re.findall(r'(\w+)=~"\$\1"', where))
                assert used | {"job"} >= {"job", "instance"}, target["expr"]
                assert ("track" in used) or "track" not in (metric.labels if metric else ()) or "track=" in where
    texts = json.dumps(dashboard["panels"]) + json.dumps(dashboard["links"])
    own = {"__rate_interval", "__value", "__from", "__to"}
    assert set(re.findall(r"\$\{?(\w+)", texts)) - own == there


def test_headlines_turn_red_where_their_alerts_fire_and_lead_to_their_runbooks() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    stats = [one for one in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"] if one["type"] == "stat"]
    assert len(stats) == 6
    for stat in stats:
        colours = [step["color"] for step in stat["fieldConfig"]["defaults"]["thresholds"]["steps"]]
        assert colours == ["green", "yellow", "red"][: len(colours)]
        for link in stat["links"]:
            assert f'<a id="{link["url"].partition("#")[2]}"></a>' in page
            if len(colours) == 3:
                red = stat["fieldConfig"]["defaults"]["thresholds"]["steps"][-1]["value"]
                assert re.search(rf"> {red:g}$", alerts()[link["title"]]["expr"].strip())


def test_latencies_lead_to_traces_that_took_as_long() -> None:
    """The link holds JSON that Grafana's explorer reads, about the service as the spans name it."""
    graphs = [one for one in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"] if one["type"] == "timeseries"]
    links = [link for graph in graphs for link in graph["fieldConfig"]["defaults"]["links"]]
    assert len(links) == 2
    for link in links:
        (pane,) = json.loads(link["url"].partition("panes=")[2]).values()
        (query,) = pane["queries"]
        assert query["service"] == OrchestratorSettings.service
        assert pane["datasource"] == query["datasource"]["uid"] == "${traces}"


def test_in_a_cluster_too_the_jobs_are_those_that_the_rules_ask_for() -> None:
    (job,) = yaml.safe_load((PROMETHEUS / "kubernetes.yml").read_text(encoding="utf-8"))["scrape_configs"]
    labels = {rule["target_label"]: rule["source_labels"] for rule in job["relabel_configs"] if "target_label" in rule}
    assert labels["job"] == ["__meta_kubernetes_pod_label_app_kubernetes_io_name"]
    kept = {rule["source_labels"][0]: rule["regex"] for rule in job["relabel_configs"] if rule.get("action") == "keep"}
    asked = {
        name for query in queries() for names in re.findall(r'job=~?"([^"]+)"', query) for name in names.split("|")
    }
    for name in asked:
        text = (ROOT / "deploy" / "kubernetes" / "base" / f"{name}.yaml").read_text(encoding="utf-8")
        template = next(yaml.safe_load_all(text))["spec"]["template"]
        assert template["metadata"]["labels"] == {"app.kubernetes.io/name": name}
        assert template["metadata"]["annotations"]["prometheus.io/scrape"] == "true"
        assert "metrics" in {port["name"] for port in template["spec"]["containers"][0]["ports"]}
    assert kept["__meta_kubernetes_pod_container_port_name"] == "metrics"


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the folder, with addresses for discovery in Kubernetes, which Debian's Prometheus is built without."""
    copy = shutil.copytree(PROMETHEUS, tmp_path_factory.mktemp("prometheus") / "files")
    cluster = yaml.safe_load((copy / "kubernetes.yml").read_text(encoding="utf-8"))
    for job in cluster["scrape_configs"]:
        assert job.pop("kubernetes_sd_configs") == [{"role": "pod", "namespaces": {"names": ["atspeed"]}}]
        job["static_configs"] = [{"targets": ["127.0.0.1:9464"]}]
    (copy / "kubernetes.yml").write_text(yaml.safe_dump(cluster), encoding="utf-8")
    return copy


@pytest.mark.parametrize(
    "check",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "config", "kubernetes.yml"],
        ["test", "rules", "alerts_test.yml"],
    ],
)
def test_prometheus_takes_the_files_and_the_alerts_fire_when_they_must(checked: Path, check: list[str]) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    done = subprocess.run([promtool, *check], cwd=checked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
