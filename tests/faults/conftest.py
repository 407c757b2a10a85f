"""Counted faults: each test says how many it injected, and the run ends with the table of docs/store.md.

`make faults` runs these. `--times 10` injects ten times as many, `--table FILE` also writes the table.
Every draw is seeded, so a fault that was not survived can be had again.
"""

import json
import os
import tempfile
from pathlib import Path

import pytest

FAULT = "fault"


def pytest_addoption(parser):
    parser.addoption("--times", type=int, default=1, help="inject this many times as many faults")
    parser.addoption("--table", type=Path, help="write the table of counts to this file as well")


def pytest_collection_modifyitems(items, config):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.faults)
            item.add_marker(pytest.mark.timeout(300 * config.getoption("--times", default=1)))


@pytest.fixture
def times(request):
    """How many times the usual number of faults this run injects."""
    return request.config.getoption("--times", default=1)


@pytest.fixture
def room():
    """An empty folder, in memory where there is room: thousands of small files are written there.

    Another user may enter it, unlike `tmp_path`.
    """
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def count(request):
    """count("kill points", 300, "lost, unequal, redone"): what was injected and what never happened.

    Called after the assertions, so that a line stands in the table only for what was survived. Calls
    with the same name, in any test or worker process, are added up.
    """

    def add(what, injected, never):
        request.node.user_properties.append((FAULT, json.dumps([what, injected, never])))

    return add


def pytest_terminal_summary(terminalreporter, config):
    rows = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == FAULT and report.when == "call":
                what, injected, never = json.loads(value)
                rows[what, never] = rows.get((what, never), 0) + injected
    if not rows:
        return
    lines = ["| injected | times | none of them |", "|---|---|---|"]
    lines += [f"| {what} | {rows[what, never]:,} | {never} |" for what, never in sorted(rows)]
    terminalreporter.write_line("\n".join(lines))
    table = config.getoption("--table", default=None)
    if table:
        table.write_text("\n".join(lines) + "\n")
