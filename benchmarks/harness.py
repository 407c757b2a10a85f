"""What the scripts here share: their texts, their ratios, and the commit that was measured."""

import statistics
import subprocess
from itertools import islice
from pathlib import Path

from stages.reading.corpus_files import read

ROOT = Path(__file__).parent.parent


def some_texts(source, rows):
    """The first `rows` texts of a corpus file."""
    items = read(Path(source), "text")
    # What is no text is why a line has none.
    return list(islice((item for item in items if isinstance(item, str)), rows))


def ratio(peer, ours):
    """The median and the range of the ratios within the rounds."""
    ratios = sorted(a / b for a, b in zip(peer, ours, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def megabytes(entry):
    """Megabytes of this process by an entry of /proc/self/status.

    VmRSS is its memory now, VmHWM the most it had, RssAnon its memory now without mapped files. Not
    ru_maxrss of `resource`: a process begins with its parent's.
    """
    status = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith(f"{entry}:"))
    return int(line.split()[1]) / 1024


def commit():
    """The commit of this work tree, abbreviated; empty outside of Git."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip()
