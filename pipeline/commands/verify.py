"""`teachonce verify`: check that the store has the objects that this work tree's manifests name.

Exit code 3 means missing or damaged objects. Another copy is neither: it is intact, was made elsewhere from
the same sources, and differs in last bits; the stage that made the manifest adopts it when it runs.
"""

from __future__ import annotations

import random
import secrets
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline.layout import Layout
from pipeline.workspace import Workspace
from stages.outcome import Facts, Outcome, Progress
from storage.embeddings import fingerprints
from storage.errors import DamagedError, MissingError, TeachonceError
from storage.manifest import Kind, Manifest
from storage.probe import probe_key
from storage.store import Object, Store, remake_command
from storage.upkeep.examination import Finding, examine, tokens_of
from storage.upkeep.inventory import check_store, read_refs

Manifests = Mapping[Kind, Manifest]

STATES = {
    "manifest": "damaged manifests",
    "missing": "missing",
    "damaged": "damaged",
    "unreadable": "unreadable",
    "another copy": "other copies",
}
"""State of a problem -> its noun in the summary, worst first."""

REPAIR = "run `teachonce repair`"


def run(
    workspace: Workspace, *, read_data: bool, sample: int | None = None, seed: int | None = None
) -> Outcome:
    """Check every object that this work tree's manifests name, and the token ids of its texts.

    Args:
        workspace: The work tree with the manifests.
        read_data: Read every value and compare the sha256. Otherwise headers and sizes are compared,
            which takes a fraction of a millisecond an object, whatever its size.
        sample: Number of objects to read whole, chosen at random; of the others the header. None for no
            sample.
        seed: Seed of the choice; None draws one. The facts have it, so that the choice can be repeated.

    Raises:
        MissingError: there is no manifest, or no store.
    """
    workspace.renew()
    manifests, broken = manifests_of(workspace.at)
    return _examined(workspace.store, list(manifests.values()), broken, read_data, sample, seed)


def run_all(
    root: Path, *, read_data: bool, sample: int | None = None, seed: int | None = None
) -> Outcome:
    """Check every object that any ref of the store `root` names.

    Raises:
        MissingError: there is no store, or none with refs.
    """
    check_store(root)
    refs, broken = read_refs(root)
    manifests = {ref.manifest_digest: ref.manifest for ref in refs}
    return _examined(Store(root), list(manifests.values()), broken, read_data, sample, seed)


def _examined(
    store: Store,
    manifests: Sequence[Manifest],
    broken: Sequence[TeachonceError],
    read_data: bool,
    sample: int | None,
    seed: int | None,
) -> Outcome:
    entries = entries_of(store, manifests)
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    chosen = set(entries) if read_data else set()
    if sample is not None:
        chosen = set(random.Random(seed).sample(list(entries), min(sample, len(entries))))
    progress = Progress("verify", total=len(entries), unit="objects")
    findings: list[Finding] = []
    for key, named in entries.items():
        if finding := examine(store, key, named, read=key in chosen):
            findings.append(finding)
        progress.advance(1)
    problems = [
        {"where": error.where, "state": "manifest", "said": error.problem, "cure": error.cure}
        for error in broken
    ] + [_problem(store, finding) for finding in findings]
    counts = Counter(str(problem["state"]) for problem in problems)
    return Outcome(
        stage="verify",
        made=store.root,
        summary=(
            f"{len(entries):,} objects of {len(manifests)} manifests: {_counted(counts)}; "
            f"{_extent(len(chosen), len(entries))}"
            + (f" (seed {seed} chose them)" if sample is not None else "")
        ),
        facts={
            "objects": len(entries),
            "read": sorted(chosen),
            "seed": None if sample is None else seed,
            "sound": all(problem["state"] == "another copy" for problem in problems),
            "problems": problems,
        },
    )


def lines(facts: Facts) -> Iterator[str]:
    """Yield a line for each problem, and its cure unless `check_sound` names that one for all."""
    for problem in facts["problems"]:
        mark = "warning: another copy" if problem["state"] == "another copy" else problem["state"]
        yield f"{mark}: {problem['where']}: {problem['said']}"
        if problem["cure"] != REPAIR:
            yield f"  cure: {problem['cure']}"


def check_sound(outcome: Outcome) -> None:
    """Raise if `verify` found a fault.

    Raises:
        DamagedError: some object is missing, damaged or unreadable; has the counts and a cure.
    """
    if outcome.facts["sound"]:
        return
    faults = [p for p in outcome.facts["problems"] if p["state"] != "another copy"]
    cures = [fault["cure"] for fault in faults]
    counts = Counter(fault["state"] for fault in faults)
    raise DamagedError(outcome.made, _counted(counts), REPAIR if REPAIR in cures else cures[0])


def manifests_of(at: Layout) -> tuple[dict[Kind, Manifest], list[TeachonceError]]:
    """Returns the manifests of a work tree that name objects, and the errors of unreadable ones."""
    manifests: dict[Kind, Manifest] = {}
    broken: list[TeachonceError] = []
    for kind, path in at.manifests.items():
        try:
            manifest = Manifest.load(path, kind)
        except MissingError:
            continue
        except TeachonceError as error:
            broken.append(error)
        else:
            manifests |= {kind: manifest} if manifest.objects else {}
    if not manifests and not broken:
        raise MissingError(
            at.corpus.parent, "no manifest there, so nothing to look for", "run `teachonce shard`"
        )
    return manifests, broken


def entries_of(store: Store, manifests: Collection[Manifest]) -> dict[str, Object | None]:
    """Returns key -> object to examine; None for objects that no manifest names.

    The latter are token ids and the teacher's vectors of the probe texts, if they exist.
    """
    if not store.root.is_dir():
        # Not "everything is missing": an unmounted disk must not start a pass of the teacher.
        raise MissingError(
            store.root, "no store there", "mount it, or point `store` (or $TEACHONCE_STORE) to it"
        )
    entries: dict[str, Object | None] = {
        entry.key: entry for manifest in manifests for entry in manifest.objects
    }
    for manifest in manifests:
        if manifest.kind in {"corpus", "readings"}:
            entries |= dict.fromkeys(tokens_of(store, manifest.objects))
        if manifest.kind == "embeddings":
            probes = map(probe_key, fingerprints(manifest.recipe).values())
            entries |= {probe: None for probe in probes if store.path(probe).exists()}
    return entries


def _problem(store: Store, finding: Finding) -> dict[str, str]:
    cure = REPAIR
    if finding.state == "another copy":
        cure = f"{remake_command(finding.key)} to adopt the copy that is there, then `dvc repro`"
    if finding.state == "unreadable":
        cure = "give yourself permission to read it, or mend the disk, then verify again"
    return {**asdict(finding), "where": str(store.path(finding.key)), "cure": cure}


def _counted(counts: Mapping[str, int]) -> str:
    counts_by_state = [
        f"{counts[state]} {word}" for state, word in STATES.items() if counts.get(state)
    ]
    return ", ".join(counts_by_state) or "all well"


def _extent(read: int, objects: int) -> str:
    if not read:
        return "headers only, `--read-data` reads the values too"
    return "every value read" if read == objects else f"{read:,} read, of the others the headers"
