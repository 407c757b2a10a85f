"""Push and pull of many small objects to a folder and from it: CPU seconds, at three sizes.

    python benchmarks/push.py [--objects 500 2000 8000]

Objects have two texts each. A push of what is there already is timed too. All folders are on one disk, and
each file is flushed to it, so the wall is that of the disk; the exponent is that of the CPU time.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

from pipeline.commands.transfer import pull, push
from storage.corpus import put_texts, text_key
from storage.manifest import Manifest
from storage.remote import Remote
from storage.store import Store


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--objects", type=int, nargs="+", default=[500, 2000, 8000])
    args = parser.parse_args()
    print("| objects | push: CPU s | wall s | again: CPU s | pull: CPU s |")
    print("|---|---|---|---|---|")
    taken = {count: times(count) for count in args.objects}
    for count, (first, again, back) in taken.items():
        print(f"| {count:,} | {first[0]:.1f} | {first[1]:.1f} | {again[0]:.1f} | {back[0]:.1f} |")
    least, most = args.objects[0], args.objects[-1]
    if least < most:
        exponents = [
            math.log(late[0] / early[0]) / math.log(most / least)
            for early, late in zip(taken[least], taken[most], strict=True)
        ]
        print("| exponent | {:.2f} | | {:.2f} | {:.2f} |".format(*exponents))


def times(count):
    """(CPU s, wall s) of a push, of the same again, and of a pull into an empty store."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "remote").mkdir()
        store = Store(root / "store")
        objects = []
        for number in range(count):
            texts = [f"text {number} a", f"text {number} b"]
            objects.append(put_texts(store, [(text, text_key(text)) for text in texts]))
        manifest = Manifest(kind="corpus", recipe={}, parent=None, objects=tuple(objects))
        manifests = {root / "corpus.json": manifest}
        manifest.save(root / "corpus.json", store)
        url = str(root / "remote")
        return (
            seconds_of(lambda: push(manifests, store=Store(root / "store"), remote=Remote(url))),
            seconds_of(lambda: push(manifests, store=Store(root / "store"), remote=Remote(url))),
            seconds_of(lambda: pull(manifests, store=Store(root / "other"), remote=Remote(url))),
        )


def seconds_of(call):
    """CPU and wall seconds of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


if __name__ == "__main__":
    main()
