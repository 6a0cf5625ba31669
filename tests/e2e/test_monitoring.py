"""What `deploy/` has for Prometheus and Grafana: every name and every expression is one that there is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from disco import NodeSettings, serve
from runner.metrics import Own, Sample, exposition
from shared.ipc import Counters
from tests.cluster import ROOT, agent, cluster
from tests.unit.test_status import row

DASHBOARD = ROOT / "deploy" / "grafana-dashboard.json"
VARIABLES = {"$__rate_interval": "5m", "$__range": "3h", "$instance": ".*", "$agent": ".*"}
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool")


def promtool(*arguments: str | Path, text: str = "") -> str:
    assert PROMTOOL is not None
    found = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, input=text, timeout=60)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout + found.stderr


def known() -> set[str]:
    """The names of all series that `GET /metrics` has."""
    exposed = exposition([Sample(row(pid=os.getpid()), Counters(), {}, 0, 0.0, {}, {})], Own({}, 0)).decode()
    return set(re.findall(r"^(\w+)", exposed, re.MULTILINE))


def named(text: str) -> set[str]:
    """The metrics that a text names; a counter's or a histogram's parts by their own names."""
    return set(re.findall(r"\b(?:em_runner|process)_\w+", text))


def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text())


def expressions() -> Iterator[tuple[str, str]]:
    """Every PromQL expression of the dashboard, with what it is for, and values in place of variables."""
    board = dashboard()
    found = [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel.get("targets", ())]
    found += [(each["name"], each["expr"]) for each in board["annotations"]["list"] if "expr" in each]
    for title, expression in found:
        for name, value in VARIABLES.items():
            expression = expression.replace(name, value)
        yield title, expression


@pytest.mark.parametrize("file", ["README.md", "alerts.yml", "grafana-dashboard.json"])
def test_metrics_that_are_named_are_there(file: str) -> None:
    found = named((ROOT / "deploy" / file).read_text()) - {"process_"}
    assert found
    for name in found:
        assert name in known() or f"{name}_count" in known(), f"{file} names {name}"


@pytest.mark.parametrize("file", ["README.md", "grafana-dashboard.json"])
def test_every_metric_of_ours_is_told_of(file: str) -> None:
    found = named((ROOT / "deploy" / file).read_text())
    ours = {re.sub("_(bucket|sum|count)$", "", name) for name in known() if name.startswith("em_runner_")}
    missing = {name for name in ours if not any(each.startswith(name) for each in found)}
    assert missing == set()


def test_dashboard_is_one_that_any_grafana_takes() -> None:
    board = dashboard()
    assert board["schemaVersion"] >= 39
    assert board["id"] is None
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert {"instance", "agent"} <= set(variables)
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} lies on another one"
        assert at["x"] + at["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"], panel["title"]
            assert panel["targets"], panel["title"]
            for part in (panel, *panel["targets"]):
                assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
    text = DASHBOARD.read_text()
    used = set(re.findall(r"\$\{?(\w+)\}?", re.sub(r"\$__\w+", "", text)))
    assert used == set(variables)
    assert "localhost" not in text
    assert "http" not in re.sub(r'http[" ]|HTTP', "", text)


@needs_promtool
def test_expressions_of_the_dashboard_are_promql(tmp_path: Path) -> None:
    found = list(expressions())
    assert len(found) > 20
    assert not [expression for _, expression in found if "$" in expression]
    rules = [{"record": f"r{number}", "expr": expression} for number, (_, expression) in enumerate(found)]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # which is YAML, too
    assert f"{len(found)} rules found" in promtool("check", "rules", file)


@needs_promtool
def test_alert_rules_are_some_that_prometheus_takes() -> None:
    assert "8 rules found" in promtool("check", "rules", ROOT / "deploy" / "alerts.yml")


@needs_promtool
def test_alerts_fire_when_they_should_and_not_before() -> None:
    stories = ROOT / "tests" / "e2e" / "alerts_test.yml"
    assert "SUCCESS" in promtool("test", "rules", stories)
    alerts = set(re.findall(r"alert: (\w+)", (ROOT / "deploy" / "alerts.yml").read_text()))
    told = set(re.findall(r"alertname: (\w+)\n\s+exp_alerts", stories.read_text()))
    assert told == alerts, "each fires in one of the stories"


@pytest.mark.anyio
@needs_promtool
async def test_metrics_of_a_running_cluster_are_named_as_prometheus_would_have_them(
    tmp_path: Path, anyio_backend: object
) -> None:
    async with serve(NodeSettings(port=0)) as node, cluster(tmp_path, agent("a", [node.url])) as running:
        await running.wait_ready()
        await running.ask("x")
        exposed = (await running.http.get("/metrics")).text
        assert "em_runner_queries_total{" in exposed
        assert promtool("check", "metrics", text=exposed) == ""
