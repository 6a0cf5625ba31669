"""The soak, for as long as a test run can spare; `scripts/soak.sh MINUTES` is the long one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.chaos.soak import Counts
from tests.cluster import ROOT

SECONDS = float(os.environ.get("EM_SOAK_SECONDS", "12"))


@pytest.mark.timeout(SECONDS + 100)
def test_soak_loses_nothing_and_leaves_nothing_over() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.chaos.soak", "--seconds", str(SECONDS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS + 90,
    )
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "nothing lost, nothing wrong, nothing left over" in ended.stdout
    assert "FAILED" not in ended.stdout


def test_soak_script_explains_itself() -> None:
    script = ROOT / "scripts" / "soak.sh"
    told = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=10)
    assert (told.returncode, told.stdout.split()[:2]) == (0, ["usage:", "scripts/soak.sh"])
    for arguments in ([], ["soon"], ["-1"]):
        refused = subprocess.run([script, *arguments], capture_output=True, text=True, timeout=10)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "MINUTES" in refused.stderr


@pytest.mark.parametrize(
    ("answers", "what"),
    [
        ([(1, 0.0, 0.1), (2, 0.2, 0.3), (2, 0.4, 0.5)], "gave 2 twice"),
        ([(5, 0.0, 0.1), (3, 0.2, 0.3)], "gave 3 after 5"),
        ([(2, 0.0, 0.2), (1, 0.1, 0.3)], ""),  # asked at the same time: either may be the first
        ([(1, 0.0, 0.1), (4, 0.2, 0.3), (9, 0.4, 0.5)], ""),  # a count whose answer died with its worker
    ],
)
def test_soak_sees_a_count_that_is_given_twice_or_forgotten(answers: list[tuple[int, float, float]], what: str) -> None:
    counts = Counts()
    for count, sent_s, came_s in answers:
        counts.take("w", count, sent_s, came_s)
    assert (what in " ".join(counts.broken)) if what else not counts.broken
