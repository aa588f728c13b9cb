"""What the tests of the watchdog and of `verify` say, counted for the report."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as Tree
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


def by_pytest(size: int, *arguments: str) -> dict[str, Any]:
    """Run some tests, of which at least `size` must pass and none may fail or be skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", f"--junitxml={report}", *arguments]
        subprocess.run(command, cwd=TESTS.parent, capture_output=True, check=False)
        cases = Tree.parse(report).getroot().iter("testcase")
        found: Counter[str] = Counter()
        wrong = []
        for case in cases:
            bad = next((c.tag for c in case if c.tag in ("failure", "error", "skipped")), None)
            found[bad or "passed"] += 1
            if bad:
                wrong.append(f"{case.get('name')}: {bad}")
    return {**found, "wrong": wrong[:10], "ok": not wrong and found["passed"] >= size}


def mistakes(size: int) -> dict[str, Any]:
    return by_pytest(size, "tests/test_watchdog.py::test_planted_mistakes_are_named")


def healthy(size: int) -> dict[str, Any]:
    return by_pytest(size, "tests/test_watchdog.py::test_healthy_recipes_are_let_be")


def verified(size: int) -> dict[str, Any]:
    return by_pytest(size, "tests/test_verification.py", "-k", "every_method_in_new_processes or wrong_merge_is_caught")


SCENARIOS = [
    ("planted mistakes", mistakes, 10, 10, "caught at step 1 or 2"),
    ("healthy recipes", healthy, 20, 20, "no alarm"),
    (
        "verify",
        verified,
        20,
        20,
        "passes for every method x 3 families in new processes; a planted wrong merge is caught",
    ),
]
