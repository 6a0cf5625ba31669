"""The files in `deploy/` for Prometheus and Grafana: their metrics, expressions and alerts."""

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

from disco import Node
from runner.supervision.sample import Sample
from runner.web.metrics import RunnerSample, exposition
from shared.ipc import Counters
from tests.cluster import ROOT, agent, cluster
from tests.unit.runner.commands.test_status import row

DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana-dashboard.json"
ALERTS = DEPLOY / "alerts.yml"
ALERT_TESTS = ROOT / "tests" / "e2e" / "alerts_test.yml"
VARIABLES = {"$__rate_interval": "5m", "$__range": "3h", "$instance": ".*", "$agent": ".*"}
WIDTH = 24  # of a dashboard, in cells of Grafana's grid
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool")


def promtool(*arguments: str | Path, text: str = "") -> str:
    """Run promtool with `text` as its input, and return its output."""
    assert PROMTOOL is not None
    command = [PROMTOOL, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, input=text, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def exposed_series() -> set[str]:
    """Return the names of all series in `GET /metrics`."""
    sample = Sample(row(pid=os.getpid()), Counters(), {}, 0, 0.0, {}, {})
    text = exposition([sample], RunnerSample({}, 0)).decode()
    return set(re.findall(r"^(\w+)", text, re.MULTILINE))


def mentioned_metrics(file: str) -> set[str]:
    """Return the metrics that a file in `deploy/` mentions."""
    names = re.findall(r"\b(?:em_runner|process)_\w+", (DEPLOY / file).read_text())
    return set(names) - {"process_"}


def expressions() -> Iterator[str]:
    """Yield the dashboard's PromQL expressions, with values in place of its variables."""
    dashboard = json.loads(DASHBOARD.read_text())
    targets = [each for panel in dashboard["panels"] for each in panel.get("targets", ())]
    annotations = [each for each in dashboard["annotations"]["list"] if "expr" in each]
    for each in (*targets, *annotations):
        expression = each["expr"]
        for name, value in VARIABLES.items():
            expression = expression.replace(name, value)
        yield expression


@pytest.mark.parametrize("file", ["README.md", "alerts.yml", "grafana-dashboard.json"])
def test_every_mentioned_metric_exists(file: str) -> None:
    mentioned = mentioned_metrics(file)
    assert mentioned
    series = exposed_series()
    # The series of a histogram have its name and a suffix.
    unknown = {name for name in mentioned if not {name, f"{name}_count"} & series}
    assert unknown == set()


@pytest.mark.parametrize("file", ["README.md", "grafana-dashboard.json"])
def test_every_metric_of_em_runner_is_mentioned(file: str) -> None:
    ours = [name for name in exposed_series() if name.startswith("em_runner_")]
    metrics = {re.sub("_(bucket|sum|count)$", "", name) for name in ours}
    mentioned = mentioned_metrics(file)
    missing = {
        metric for metric in metrics if not any(name.startswith(metric) for name in mentioned)
    }
    assert missing == set()


@pytest.fixture
def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text())


def test_dashboard_can_be_imported_into_any_grafana(dashboard: Any) -> None:
    assert dashboard["schemaVersion"] >= 39
    assert dashboard["id"] is None
    text = DASHBOARD.read_text()
    assert "localhost" not in text
    assert "http" not in re.sub(r'http[" ]|HTTP', "", text)


def test_dashboard_has_exactly_the_variables_that_it_uses(dashboard: Any) -> None:
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert {"instance", "agent"} <= set(variables)
    # The names with two underscores are Grafana's own.
    text = re.sub(r"\$__\w+", "", DASHBOARD.read_text())
    assert set(re.findall(r"\$\{?(\w+)\}?", text)) == set(variables)


def test_panels_of_the_dashboard_do_not_overlap(dashboard: Any) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    occupied: set[tuple[int, int]] = set()
    for panel in panels:
        position = panel["gridPos"]
        x, y = position["x"], position["y"]
        right, bottom = x + position["w"], y + position["h"]
        cells = {(column, line) for column in range(x, right) for line in range(y, bottom)}
        assert not cells & occupied, panel["title"]
        assert right <= WIDTH, panel["title"]
        occupied |= cells


def test_every_panel_of_the_dashboard_is_described_and_has_data(dashboard: Any) -> None:
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels:
        title = panel["title"]
        assert panel["description"], title
        assert panel["targets"], title
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == source, title


@needs_promtool
def test_expressions_of_the_dashboard_are_valid_promql(tmp_path: Path) -> None:
    found = list(expressions())
    assert len(found) > 20
    assert not [expression for expression in found if "$" in expression]
    rules = [
        {"record": f"r{number}", "expr": expression} for number, expression in enumerate(found)
    ]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(found)} rules found" in promtool("check", "rules", file)


@needs_promtool
def test_prometheus_accepts_the_alert_rules() -> None:
    assert "8 rules found" in promtool("check", "rules", ALERTS)


@needs_promtool
def test_alerts_fire_as_their_scenarios_expect() -> None:
    assert "SUCCESS" in promtool("test", "rules", ALERT_TESTS)


def test_every_alert_fires_in_a_scenario() -> None:
    alerts = re.findall(r"alert: (\w+)", ALERTS.read_text())
    firing = re.findall(r"alertname: (\w+)\n\s+exp_alerts", ALERT_TESTS.read_text())
    assert set(firing) == set(alerts)


@pytest.mark.anyio
@needs_promtool
async def test_metrics_of_a_runner_follow_the_conventions_of_prometheus(
    tmp_path: Path, node: Node
) -> None:
    async with cluster(tmp_path, agent("a", [node.url])) as running:
        await running.wait_ready()
        await running.ask("x")
        exposed = (await running.http.get("/metrics")).text
        assert "em_runner_queries_total{" in exposed
        assert promtool("check", "metrics", text=exposed) == ""
