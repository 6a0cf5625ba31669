"""A short soak test. `scripts/soak.sh MINUTES` is for long ones."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.chaos.soak import Counts
from tests.cluster import ROOT

SECONDS = float(os.environ.get("EM_SOAK_SECONDS", "12"))


@pytest.mark.timeout(SECONDS + 280)
def test_soak_loses_no_query_and_leaks_no_resource() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.soak", "--seconds", str(SECONDS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS + 250,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing lost, nothing wrong, no resource leaked" in done.stdout
    assert "FAILED" not in done.stdout


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "scripts" / "soak.sh"
    return subprocess.run([script, *arguments], capture_output=True, text=True, timeout=60)


def test_soak_script_prints_its_usage() -> None:
    done = run_script("--help")
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["usage:", "scripts/soak.sh"])


@pytest.mark.parametrize("arguments", [[], ["soon"], ["-1"]])
def test_soak_script_refuses_invalid_arguments(arguments: list[str]) -> None:
    done = run_script(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "MINUTES" in done.stderr


@pytest.mark.parametrize(
    ("responses", "violation"),
    [
        ([(1, 0.0, 0.1), (2, 0.2, 0.3), (2, 0.4, 0.5)], "gave 2 twice"),
        ([(5, 0.0, 0.1), (3, 0.2, 0.3)], "gave 3 after 5"),
    ],
    ids=["twice", "lower"],
)
def test_soak_reports_a_count_that_is_repeated_or_lower(
    responses: list[tuple[int, float, float]], violation: str
) -> None:
    counts = Counts()
    for count, sent_s, received_s in responses:
        counts.check("w", count, sent_s, received_s)
    assert f"w {violation}" in counts.violations


@pytest.mark.parametrize(
    "responses",
    [
        [(2, 0.0, 0.2), (1, 0.1, 0.3)],
        [(1, 0.0, 0.1), (4, 0.2, 0.3), (9, 0.4, 0.5)],
    ],
    ids=["queries that overlap", "counts of queries whose worker died"],
)
def test_soak_accepts_valid_counts(responses: list[tuple[int, float, float]]) -> None:
    counts = Counts()
    for count, sent_s, received_s in responses:
        counts.check("w", count, sent_s, received_s)
    assert not counts.violations
