"""`teachonce ls`: what is in the store, for which teacher, how large, and whose manifests need it."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.check import read_sources
from stages.outcome import Facts, Outcome
from storage import holders
from storage.embeddings import fingerprints
from storage.errors import MissingError, TeachonceError, shown
from storage.probe import PROBE_DIGEST
from storage.upkeep.inventory import (
    SHOWN_DIGITS,
    File,
    Ref,
    orphans,
    read_refs,
    short_name,
    take_inventory,
)

KINDS = ("vectors", "mixes", "text", "readings", "tokens", "negatives")
"""Kinds of objects in the order in which they are listed."""

TOKENIZED = ("text/", "readings/")
"""Kinds of objects whose token ids have as many rows as they."""

LINES = 10  # of a kind; `--json` has all

# Settings that are shown beside the name of a teacher.
SHOWN_SETTINGS = (
    "prompt",
    "prompts",
    "input_types",
    "max_tokens",
    "precision",
    "storage",
    "dim",
    "mixes",
    "neighbours",
    "rows_per_shard",
)


def run(root: Path) -> Outcome:
    """List all objects of a store by kind and fingerprint, with the refs that keep them. Opens no object.

    Raises:
        MissingError: there is no store.
    """
    inventory = take_inventory(root)
    refs, unreadable = _refs_or_why_not(root)
    several = Counter(ref.manifest_digest for ref in refs)
    groups = list(_groups(inventory.objects, refs))
    size = sum(file.bytes for file in inventory.objects)
    cached_keys = {file.name for file in inventory.objects}
    unnamed, unnamed_bytes = (
        sum(g[count] for g in groups) for count in ("orphans", "orphan_bytes")
    )
    return Outcome(
        stage="ls",
        made=root,
        summary=(
            f"{len(inventory.objects):,} objects, {bytes_of(size)}, {len(refs)} refs"
            + (
                f"; no ref names {unnamed:,} of them, {bytes_of(unnamed_bytes)}: see `teachonce gc`"
                if unnamed
                else "; a ref names each of them"
            )
        ),
        facts={
            "groups": groups,
            "refs": {
                ref.name: {
                    **ref.made,
                    "maker": holders.maker_in(ref.made),
                    "seen": time.strftime("%Y-%m-%d", time.gmtime(ref.seen)),
                    "gone": ref.is_gone,
                    "forget": short_name(ref.full_name, alone=several[ref.manifest_digest] == 1),
                    "kind": ref.manifest.kind,
                    "rows": ref.manifest.rows,
                    "bytes": ref.manifest.size,
                    "missing": sum(entry.key not in cached_keys for entry in ref.manifest.objects),
                }
                for ref in refs
            },
            "unreadable": [
                {"where": e.where, "said": e.problem, "cure": e.cure} for e in unreadable
            ],
            "scratch": sizes_of(inventory.scratch),
            "answers": sizes_of(inventory.answers),
            "aside": sizes_of(inventory.aside),
            "quarantine": sizes_of(inventory.quarantine),
            "foreign": sizes_of(inventory.foreign),
        },
    )


def lines(facts: Facts) -> Iterator[str]:
    """Yield a table: a line for each kind and fingerprint, and below it the refs that keep it."""
    for group in facts["groups"]:
        name = f"{group['kind']} {group['fingerprint'][:SHOWN_DIGITS]}"
        rows = f"{group['rows']:,}" if group["rows"] is not None else "?"
        yield (
            f"{name:<19}{group['objects']:>8,} objects{rows:>14} rows{bytes_of(group['bytes']):>14}"
            + (f"  {shown(group['teacher'])}" if group["teacher"] else "")
        )
        if group["recipe"]:
            yield f"    {_recipe_line(group['recipe'])}"
        for name in group["refs"]:
            yield f"    {_ref_line(facts['refs'][name])}"
        if group["orphans"]:
            yield f"    {group['orphans']:,} named by no ref, {bytes_of(group['orphan_bytes'])}"
    used = {name for group in facts["groups"] for name in group["refs"]}
    yield from (_ref_line(ref) for name, ref in facts["refs"].items() if name not in used)
    for error in facts["unreadable"]:
        yield f"unreadable: {error['where']}: {error['said']}"
        yield f"  cure: {error['cure']}"
    yield from some(
        f"taken away by a gc that runs or was killed: {name}" for name in facts["aside"]
    )
    if facts["answers"]:
        size = bytes_of(sum(facts["answers"].values()))
        yield f"paid answers of an API, in no shard yet: {size}; `teachonce embed` uses them"
    yield from other_lines(facts)


def bytes_of(size: int) -> str:
    """Returns a size in MB for people; sizes above zero are shown as 0.01 MB at least."""
    return f"{max(size, 10_000 if size else 0) / 1e6:,.2f} MB"


def other_lines(facts: Facts) -> Iterator[str]:
    """Yield lines for files that no command deletes unasked."""
    yield from some(f"in quarantine: {shown(name)}" for name in facts["quarantine"])
    yield from some(f"foreign, never deleted: {shown(name)}" for name in facts["foreign"])


def some(lines: Iterable[str]) -> Iterator[str]:
    """Yield the first LINES lines, and the number of further ones."""
    all_lines = list(lines)
    yield from all_lines[:LINES]
    if len(all_lines) > LINES:
        yield f"... and {len(all_lines) - LINES:,} more like that (--json lists all)"


def sizes_of(files: Iterable[File]) -> dict[str, int]:
    """Returns the size in bytes of each file, by name."""
    return {file.name: file.bytes for file in files}


def _refs_or_why_not(root: Path) -> tuple[list[Ref], Sequence[TeachonceError]]:
    try:
        return read_refs(root)
    except MissingError as error:
        return [], [error]


def _groups(objects: Sequence[File], refs: Sequence[Ref]) -> Iterator[dict[str, Any]]:
    """Yield a group for each folder of objects, with the refs that keep any of them."""
    rows = {entry.key: entry.rows for ref in refs for entry in ref.manifest.objects}
    of_texts = {key.rpartition("/")[2]: n for key, n in rows.items() if key.startswith(TOKENIZED)}
    of_texts[f"{PROBE_DIGEST}.arrow"] = 0  # probe texts are rows of no corpus
    unnamed = set(orphans(objects, refs))
    used = {ref.name: _folders_of(ref, objects) for ref in refs}
    folders: dict[str, list[File]] = defaultdict(list)
    for file in objects:
        folders[file.folder].append(file)
    names = _teachers(refs)
    for folder, files in sorted(folders.items(), key=lambda item: _order(item[0])):
        kind, _, name = folder.partition("/")
        users = [ref for ref in refs if folder in used[ref.name]]
        counts = [rows.get(file.name, of_texts.get(file.name.rpartition("/")[2])) for file in files]
        yield {
            "kind": kind,
            "fingerprint": name,
            "teacher": names.get(name),
            "objects": len(files),
            "bytes": sum(file.bytes for file in files),
            "rows": None if None in counts else sum(n for n in counts if n is not None),
            "orphans": sum(file in unnamed for file in files),
            "orphan_bytes": sum(file.bytes for file in files if file in unnamed),
            "recipe": users[0].manifest.recipe if users and kind != "tokens" else None,
            "refs": [ref.name for ref in users],
        }


def _order(folder: str) -> tuple[int, str]:
    kind = folder.partition("/")[0]
    return (KINDS.index(kind) if kind in KINDS else len(KINDS)), folder


def _teachers(refs: Sequence[Ref]) -> dict[str, str]:
    """Returns fingerprint -> name of the teacher in params.yaml, for holders on this machine.

    Manifests do not hold the name, since a mirror is the same teacher; `check` writes it beside the
    manifest, with the hashes of the teacher's files.
    """
    teacher_names: dict[str, str] = {}
    for ref in refs:
        path = Path(os.fsdecode(ref.made.get("in", "").encode())) / "sources.json"
        files = ref.manifest.recipe.get("teacher")
        if ref.manifest.kind != "embeddings" or not files or ref.made.get("on") != platform.node():
            continue
        teacher = read_sources(path).get("teacher")
        if isinstance(teacher, dict) and teacher.get("files") == files:
            declared = teacher.get("declared")
            name = declared.get("name") if isinstance(declared, dict) else None
            if isinstance(name, str):
                teacher_names |= dict.fromkeys(fingerprints(ref.manifest.recipe).values(), name)
    return teacher_names


def _folders_of(ref: Ref, objects: Sequence[File]) -> set[str]:
    """Returns the folders in which a ref keeps objects."""
    others = set(orphans(objects, [ref]))
    return {file.folder for file in objects if file not in others}


def _recipe_line(recipe: Mapping[str, Any]) -> str:
    settings = [f"{name} {shown(repr(recipe[name]))}" for name in SHOWN_SETTINGS if name in recipe]
    files = recipe.get("teacher")
    if isinstance(files, Mapping):
        # Its weights tell teachers apart; the hashes of all its files are for `--json` and `diff`.
        settings += [
            f"{shown(name)} {str(sha)[:SHOWN_DIGITS]}"
            for name, sha in files.items()
            if name.endswith(".safetensors")
        ]
        if "imported" in files:
            settings.append(f"imported as {shown(repr(files['imported']))}")
    return ", ".join(settings) or "made with no settings"


def _ref_line(ref: Mapping[str, Any]) -> str:
    missing = f", {ref['missing']:,} of its objects MISSING" if ref["missing"] else ""
    gone = " (GONE)" if ref["gone"] else ""
    maker = (
        "" if holders.is_same(ref["maker"], ref) else f"; made by {holders.describe(ref['maker'])}"
    )
    return (
        f"ref {ref['forget']} {ref['kind']}: {holders.describe(ref)}{gone}, last used {ref['seen']}"
        f"{missing}{maker}"
    )
