"""Cases that could end the process, or take its memory or its time, run in a child that is watched.

`python -m tests.faults.children FILE MODULE FUNCTION ARGUMENTS` runs a generator of a test module with
JSON arguments. It yields a name before each case, which is noted in FILE before the case is begun.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_MEGABYTES = 256
MOST_SECONDS = 2.0
SECONDS = 250


def watched(function, *arguments, timeout=SECONDS, seconds=MOST_SECONDS):
    """Run the cases of `function` in a child; fails if it died, or one took too much.

    Args:
        function: A generator of a test module. It yields a name before each case and raises if one went
            wrong. The first comes after it has imported what it needs.
        arguments: JSON values.
        timeout: Seconds for all cases.
        seconds: Of the processor, at most, for a case: others work on this machine, too.

    Returns:
        How often each name was yielded.
    """
    name = [function.__module__, function.__name__, json.dumps(arguments)]
    with tempfile.NamedTemporaryFile() as note:
        command = [sys.executable, "-m", "tests.faults.children", note.name, *name]
        path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        try:
            run = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=timeout,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path},
            )
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it hangs at {note.read()}") from None
        last = note.read().strip(b"\0").decode()
    assert run.returncode == 0, f"exit {run.returncode} at {last}: {run.stderr[-3000:]}"
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["megabytes"] <= MOST_MEGABYTES, found
    assert found["seconds"] <= seconds, found
    return found["cases"]


def main():
    note, module, name, arguments = sys.argv[1:]
    cases = getattr(importlib.import_module(module), name)(*json.loads(arguments))
    names, slowest = Counter(), (0.0, "")
    with Path(note).open("wb") as file:
        case = next(cases)
        Path("/proc/self/clear_refs").write_text("5")  # what was held before does not count
        before = memory()
        while case is not None:
            os.pwrite(file.fileno(), case.encode()[:200].ljust(200, b"\0"), 0)
            names[case.partition(":")[0]] += 1
            started = time.process_time()
            following = next(cases, None)
            slowest = max(slowest, (time.process_time() - started, case))
            case = following
    print(
        json.dumps(
            {
                "cases": names,
                "megabytes": memory() - before,
                "seconds": slowest[0],
                "slowest": slowest[1],
            }
        )
    )


def memory():
    """The megabytes that this process held at most since its peak was reset."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak[1]) >> 10


if __name__ == "__main__":
    main()
