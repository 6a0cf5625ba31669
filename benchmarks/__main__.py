"""Runs the benchmarks, writes the results, and compares them with the targets.

python -m benchmarks [--only ws,http] [--runs 5] [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path
from typing import Final

import msgspec

from benchmarks import endurance, fanout, http, isolation, mixed, plot, recovery, targets, ws
from benchmarks.measure import Figure, Results, machine, today, versions

SUITES: Final = {
    "ws": ws.run,
    "http": http.run,
    "mixed": mixed.run,
    "fanout": fanout.run,
    "recovery": recovery.run,
    "isolation": isolation.run,
    "endurance": endurance.run,
}
RESULTS: Final = Path(__file__).parent / "results"
README: Final = Path(__file__).parent / "README.md"
START_MARK: Final = "<!-- targets: written by scripts/bench.sh -->"
END_MARK: Final = "<!-- /targets -->"
NAME: Final = "results.json"
PARTIAL: Final = RESULTS / "partial"


def main() -> int:
    """Run the chosen suites. Return 1 if one of them failed, otherwise 0."""
    options = _options()
    found: list[Figure] = []
    failed = 0
    for name in options.only:
        began_s = time.monotonic()
        _report(f"{name}:")
        try:
            found += SUITES[name](options.runs, options.quick, _report)
        except Exception as exc:  # noqa: BLE001 - keep the figures of the other suites
            failed = 1
            _report(f"{name} failed: " + "".join(traceback.format_exception(exc)))
        _report(f"{name} took {time.monotonic() - began_s:.0f} s")
    if options.amend:
        measured = {each.suite for each in found}
        before = msgspec.json.decode((options.out / NAME).read_bytes(), type=Results)
        found = [each for each in before.figures if each.suite not in measured] + found
        found.sort(key=lambda each: list(SUITES).index(each.suite))
    results = Results(date=today(), machine=machine(), versions=versions(), figures=found)
    if failed and options.out == RESULTS:
        options.out = PARTIAL
    _write(results, options.out)
    print(targets.table(results))
    return failed


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench.sh", description="Measures em-runner and alternatives."
    )
    parser.add_argument(
        "--only",
        type=_suites,
        default=list(SUITES),
        metavar="SUITES",
        help=f"comma-separated names of suites: {', '.join(SUITES)}",
    )
    parser.add_argument(
        "--runs", type=int, default=5, help="how often to measure each system (default: 5)"
    )
    parser.add_argument("--quick", action="store_true", help="measure a few cases only")
    parser.add_argument(
        "--amend", action="store_true", help="keep the figures of the other suites in the folder"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="the folder for results.json, results.svg and results.md",
    )
    options = parser.parse_args()
    if options.out is None:
        # Only a complete run may replace the table in the README.
        whole = (
            (options.only == list(SUITES) or options.amend)
            and options.runs >= 5
            and not options.quick
        )
        options.out = RESULTS if whole else PARTIAL
    return options


def _suites(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := set(chosen) - set(SUITES):
        raise argparse.ArgumentTypeError(
            f"unknown suites: {', '.join(sorted(unknown))}; the suites are: {', '.join(SUITES)}"
        )
    return [name for name in SUITES if name in chosen]


def _write(results: Results, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
    text = f"{targets.table(results)}\n\n{targets.medians(results)}\n"
    (folder / "results.md").write_text(text)
    plot.draw(results, folder / "results.svg")
    if folder == RESULTS:
        text = README.read_text()
        before, _, rest = text.partition(START_MARK)
        _, _, after = rest.partition(END_MARK)
        README.write_text(f"{before}{START_MARK}\n{targets.table(results)}\n{END_MARK}{after}")
    _report(f"written to {folder}")


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
