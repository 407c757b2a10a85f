"""Everything that can be known before anything is computed: settings, sources, models.

DVC sees neither a misspelt setting nor a new file under a glob. This stage always runs, takes about a
second, lists all that is wrong at once, and leaves hashes of what comes from outside (data/sources.json)
and the VERSION of each stage (data/versions.yaml); the other stages name these as their parameters.

This file is long because all questions go to one survey, which hashes each file once for all of them.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec

from stages.models.abilities import (
    check_code,
    check_drawable,
    check_embedding_of,
    check_exportable,
    check_layers_of,
    check_length_of,
    check_mixable,
    check_passes_of,
    check_static_of,
    check_trainable,
    check_vocabulary_of,
    is_static,
    width_of,
)
from stages.models.config import (
    NAMED,
    check_one_model,
    decided_pooling,
    own_prompts,
    prompts_by_role,
    undecided,
)
from stages.models.folder import file_hashes, find_model, find_tokenizer, is_same_model, sha256_of
from stages.models.processor import slow_precision
from stages.models.widths import check_narrow_of
from stages.outcome import Outcome, log, write_json
from stages.params import (
    FINETUNED,
    NO_READINGS,
    TEACHER,
    DistillParams,
    EmbedParams,
    EvaluateParams,
    FinetuneParams,
    Problem,
    Section,
    Sections,
    SettingsError,
    ShardParams,
    StartParams,
    check_recipe_widths,
    larger_queues,
    larger_shards,
    roles_of_corpus,
    students_behind_prompts,
)
from stages.preflight import absent_packages, api_notes, check_heldout, check_labels, other_fields
from stages.reading import corpus_files, evaluation_sets
from stages.reading.files import located, reading
from stages.reading.lines import check_start
from stages.reading.packages import package_versions
from stages.reading.readings import SETTING, reading_files
from stages.reading.readings import look_at as look_at_readings
from stages.reading.triplets import look_at, triplet_files
from storage import durable, regular
from storage.errors import MissingError, TeachonceError, as_utf8, shown
from storage.manifest import Manifest
from storage.roles import Role

COARSE_STEP = 10_000_000
COARSE_TIME = 3_000_000_000
"""In ns. A time that is a multiple of the first is of a coarse clock, which moves on within the second."""

VERSIONED = (
    "docs",
    "shard",
    "split",
    "embed",
    "start",
    "mine",
    "neighbours",
    "distill",
    "finetune",
    "evaluate",
    "export",
    "report",
)

P = ParamSpec("P")

Entry = dict[str, Any]
"""What a stage reads from outside: `declared` (the settings that name it) and `files` (their hashes)."""


def run(
    problems: Sequence[Problem],
    sections: Sections,
    *,
    root: Path,
    raw: Path,
    memory: Path,
    corpus: Path,
    out: Path,
    versions: Path,
    read_data: bool = False,
    flags: Collection[str] = (),
) -> Outcome:
    """Look at everything and write the two files.

    Args:
        problems: Problems of params.yaml itself.
        sections: The sections that are right.
        root: The work tree.
        raw: Output folder of `docs`; files below it are its outputs, not sources.
        memory: Hashes remembered by path and identity.
        corpus: data/corpus.json; it need not be there yet.
        out: data/sources.json.
        versions: data/versions.yaml.
        read_data: Hash every file anew, whatever is remembered.
        flags: Feature flags of this machine's processor, if the teacher runs on it.

    Raises:
        SettingsError: lists everything wrong.
    """
    survey = Survey(
        sections,
        root=root,
        raw=raw,
        memory=memory,
        committed=read_sources(out),
        read_data=read_data,
    )
    sources = survey.sources()
    problems = [*problems, *survey.problems]
    if problems:
        raise SettingsError("params.yaml", problems)
    for note in _notes_of_corpus(sections, corpus):
        log.info("check: %s", note)
    prompts = _prompt_notes(sections["embed"], survey.own_prompts)
    for role, prompt in prompts.items():
        log.info("check: before %s the teacher reads %s", NAMED[role], prompt)
    for note in _student_notes(sections, survey.own_prompts, is_told=bool(prompts)):
        log.info("check: %s", note)
    embed = sections["embed"]
    slow = slow_precision(embed.precision, flags) if embed.api_model is None else None
    for note in [slow] if slow is not None else api_notes(embed, os.environ):
        log.warning("check: %s", note)
    write_json(out, sources)
    lines = [f"{stage}: {version_of(stage)}" for stage in VERSIONED]
    durable.replace(versions, ("\n".join(lines) + "\n").encode())
    entries = [*sources.values(), *sources.get("evaluation", {}).values()]
    files = sum(len(entry["files"]) for entry in entries if "files" in entry)
    return Outcome(
        stage="check",
        made=out,
        summary=f"settings are right; {files} files of sources, evaluation sets and the teacher are there",
        facts={"files": files, "prompts": prompts},
    )


def reads_texts(sections: Mapping[str, Any]) -> bool:
    """Whether the teacher reads texts of the role `text`: of the corpus, or of STS sets."""
    return "text" in roles_of_corpus(sections) or bool(getattr(sections.get("evaluate"), "sts", ()))


def _prompt_notes(params: EmbedParams, own: Mapping[str, str]) -> dict[Role, str]:
    """What the teacher reads before the texts of each role, and what says so; empty if that is nothing."""
    if params.is_imported:
        return {}
    prompts = prompts_by_role(params.prompts, own)
    notes: dict[Role, str] = {
        role: f"{shown(repr(prompt.text)) if prompt.text else 'nothing'} ({prompt.origin})"
        for role, prompt in prompts.items()
    }
    return notes if own or any(prompt.text for prompt in prompts.values()) else {}


def _student_notes(sections: Sections, own: Mapping[str, str], *, is_told: bool) -> Iterator[str]:
    """Yield what students read, where that is not plain: with prompts, or with roles.

    `is_told` says whether the log says what the teacher reads; `own` are the teacher's own prompts.
    """
    students, roles = sections["students"], roles_of_corpus(sections)
    prompts = prompts_by_role(sections["embed"].prompts, own)
    behind = students_behind_prompts(students, sections["recipes"])
    without = [name for name in students if name not in behind]
    if behind and not any(prompts[role].text for role in roles):
        yield "prompts: teacher is the same as none, since the teacher reads none before the corpus's texts"
    elif behind:
        yield f"students that read the same (prompts: teacher): {', '.join(behind)}"
    if without and is_told and (behind or roles != ("text",)):
        who = f"students {', '.join(without)}" if behind else "students"
        yield f"{who} read all of these as they are, and learn one vector for each text"


class Survey:
    """Examines what the settings name, and collects all problems instead of stopping at the first.

    Args:
        sections: The sections of params.yaml that could be read.
        root: The work tree.
        raw: Output folder of `docs`.
        memory: Hashes remembered by path and identity.
        committed: The data/sources.json that is there; what is not on this machine is taken from it,
            as long as the settings that name it are the same.
        read_data: Hash every file anew.
    """

    def __init__(
        self,
        sections: Sections,
        *,
        root: Path,
        raw: Path,
        memory: Path,
        committed: Mapping[str, Any],
        read_data: bool = False,
    ) -> None:
        self.sections, self.root, self.raw, self.committed = sections, root, raw, committed
        self.sha256 = RememberedHashes(memory, read_data=read_data)
        self.problems: list[Problem] = []
        self.own_prompts: Mapping[str, str] = {}

    def sources(self) -> dict[str, Any]:
        """One entry for each stage that reads something from outside."""
        sections = self.sections
        entries: dict[str, Any] = {}
        if self._can_read("docs", "packages"):
            packages = sections["docs"].packages
            declared, look = {"packages": list(packages)}, partial(package_versions, packages)
            entries["docs"] = self._entry("docs", declared, look)
        if self._can_read("shard", "sources", "field"):
            entries["shard"] = self._shard(sections["shard"])
        if self._can_read("evaluate", "sts", "retrieval"):
            entries["evaluation"] = self._evaluation(sections["evaluate"])
        if self._can_read("finetune", "triplets", "dev"):
            entries["finetune"] = self._finetune(sections["finetune"])
        if self._can_read("embed", "teacher"):
            teacher = entries["teacher"] = self.teacher(sections["embed"])
            # Starts read texts as they are, whatever prompts the model has.
            cut_from_teacher = {key: teacher[key] for key in ("declared", "files")}
            entries["starts"] = {
                name: cut_from_teacher if start.model == TEACHER else self._start(name, start)
                for name, start in sections.get("starts", {}).items()
            }
        # Not the recipes themselves, so that the stage of that name runs only when one begins to read any.
        recipes = sections.get("recipes", {})
        entries["neighbours"] = {name: recipe.reads_neighbours for name, recipe in recipes.items()}
        entries["mixes"] = {name: recipe.reads_mixes for name, recipe in recipes.items()}
        entries["readings"] = {name: recipe.readings > 0 for name, recipe in recipes.items()}
        entries["labelled"] = {name: recipe.reads_labels for name, recipe in recipes.items()}
        for error in absent_packages(sections):
            self._report(error)
        self.sha256.save()
        return entries

    def teacher(self, params: EmbedParams) -> Entry:
        """The teacher's entry; its files may come from the committed one."""
        revision = getattr(params, "revision", None)
        declared = {"name": params.teacher, "revision": revision}
        if params.is_imported:
            return self._imported(declared)
        if params.api_model is not None:
            return self._behind_api(params, params.api_model)
        committed = self.committed.get("teacher", {})
        self.own_prompts = committed.get("prompts", {})  # of a teacher on another machine
        entry = self._entry("teacher", declared, lambda: self._teacher_files(params, revision))
        prompts = getattr(params, "prompts", None)
        # Only where a prompt is the model's own to say.
        if prompts is not None and None in (prompts.query, prompts.document) and self.own_prompts:
            entry["prompts"] = dict(self.own_prompts)
        return entry

    def _teacher_files(self, params: EmbedParams, revision: str | None) -> dict[str, str]:
        """The hashes of its files; all that it leaves undecided is reported."""
        address = "embed.teacher"
        folder = find_model(
            params.teacher,
            revision=revision,
            root=self.root,
            address=address,
            pooling=getattr(params, "pooling", None),
        )
        self.own_prompts = own_prompts(folder, address)
        files = self._model_files(folder, address, self.committed.get("teacher", {}), params)
        trusted = bool(getattr(params, "trust_remote_code", False))
        self._ask(check_code, folder, trusted=trusted, address=address)
        for error in undecided(folder, params, reads_texts=reads_texts(self.sections)):
            self._report(error)
        if hasattr(params, "max_tokens"):
            at, who = "embed.max_tokens", "the teacher"
            self._ask(check_length_of, folder, params.max_tokens, address=at, who=who)
        self._ask(self._ask_widths, folder, params)
        if getattr(params, "mixes", 0):
            self._ask(check_mixable, folder, address="embed.mixes")
        for name, start in self.sections.get("starts", {}).items():
            if start.model == TEACHER:
                self._ask_of_start(name, start, folder)
        return files

    def _ask_widths(self, folder: Path, params: EmbedParams) -> None:
        """Whether the teacher's vectors have as many values as are to be kept of them."""
        width, dim = width_of(folder, "embed.teacher"), getattr(params, "dim", None)
        if width is not None and dim is not None and dim > width:
            problem = f"{dim}, but the vectors of the model in {folder} have {width} values"
            cure = f"set it to {width} or less, or to null for all of them"
            self._report(TeachonceError("embed.dim", problem, cure))
        dim = dim or width
        used = {student.recipe for student in self.sections.get("students", {}).values()}
        for name, recipe in self.sections.get("recipes", {}).items():
            if name in used and dim is not None:
                self._ask(check_recipe_widths, recipe.widths, dim, recipe=name)

    def _ask_of_start(self, name: str, start: StartParams, folder: Path) -> None:
        """Whether a start can be made of a model, and its students be trained and exported."""
        address, who = f"starts.{name}.{start.named_in}", f"the start {name}"
        if not self._ask(check_one_model, folder, address=address):
            return
        if start.is_random and not self._ask(check_drawable, folder, address=address):
            return
        self._ask_layers(name, start, folder)
        students = {
            student: params.recipe
            for student, params in self.sections.get("students", {}).items()
            if params.start == name
        }
        if not students:
            return
        self._ask(check_trainable, folder, address=address)
        if start.kind == "static" or is_static(folder, address):
            self._ask_of_static_students(students)
        else:
            self._ask_of_recipes(set(students.values()), folder, address, who)
        if start.kind == "static":  # made here, of modules that all versions know
            return
        if self._can_read("finetune", "students", "max_tokens"):
            finetune = self.sections["finetune"]
            if set(students) & set(finetune.students):
                at = "finetune.max_tokens"
                self._ask(check_length_of, folder, finetune.max_tokens, address=at, who=who)
        self._ask_exportable(students, folder)

    def _ask_exportable(self, students: Collection[str], folder: Path) -> None:
        """Whether those students of a start that are exported can be."""
        export = self.sections.get("export")
        named = {"export.model": getattr(export, "model", "")}
        named |= {f"export.also.{i}": name for i, name in enumerate(getattr(export, "also", ()))}
        for address, name in named.items():
            if name.removesuffix(FINETUNED) in students:
                self._ask(check_exportable, folder, address=address)

    def _ask_of_static_students(self, students: Mapping[str, str]) -> None:
        """Whether students without a transformer are asked for what only a transformer can do."""
        recipes = self.sections.get("recipes", {})
        for student, recipe in students.items():
            if recipe in recipes and recipes[recipe].reads_mixes:
                problem = (
                    f"{recipe} reads mixes, and a static start has no transformer to mix inputs of"
                )
                cure = "take a recipe without `mixes`"
                self._report(TeachonceError(f"students.{student}.recipe", problem, cure))

    def _ask_layers(self, name: str, start: StartParams, folder: Path) -> None:
        """Whether a start can have the layers and tokens that it asks for, and its layers share weights."""
        at = f"starts.{name}"
        if start.layers is not None:
            self._ask(check_layers_of, folder, start.layers, address=f"{at}.layers")
        if start.passes is not None:
            self._ask(check_passes_of, folder, address=f"{at}.passes")
        if start.kind == "static" and start.hidden is not None:
            is_random = start.is_random
            self._ask(check_static_of, folder, start.hidden, address=at, is_random=is_random)
        if start.is_narrow:
            self._ask(check_narrow_of, folder, start, address=at)
        if start.embedding is not None:
            widths = start.embedding, start.hidden
            self._ask(check_embedding_of, folder, *widths, address=f"{at}.embedding")
        if start.vocabulary is not None:
            wanted = start.vocabulary if isinstance(start.vocabulary, int) else None
            self._ask(check_vocabulary_of, folder, wanted, address=f"{at}.vocabulary")

    def _ask_of_recipes(self, names: set[str], folder: Path, address: str, who: str) -> None:
        """Whether a start can read what the recipes of its students give it to read."""
        recipes = self.sections.get("recipes", {})
        for name in sorted(names & set(recipes)):
            at, wanted = f"recipes.{name}.max_tokens", recipes[name].max_tokens
            self._ask(check_length_of, folder, wanted, address=at, who=who)
            if recipes[name].reads_mixes:
                self._ask(check_mixable, folder, address=address)

    def _model_files(
        self, folder: Path, address: str, committed: Entry, embed: object
    ) -> dict[str, str]:
        """The hashes of a model's files, or the committed ones, where these are of the same model."""
        trust = bool(getattr(embed, "trust_remote_code", False))
        files = file_hashes(folder, address=address, sha256=self.sha256, trust_remote_code=trust)
        before = committed.get("files")
        if isinstance(before, dict) and is_same_model(
            folder, files, before, trust_remote_code=trust
        ):
            return before
        return files

    def _ask(self, question: Callable[P, object], *args: P.args, **settings: P.kwargs) -> bool:
        """Call a check; report what is wrong, and go on. Returns whether all is right."""
        try:
            question(*args, **settings)
        except TeachonceError as error:
            self._report(error)
            return False
        return True

    def _imported(self, declared: Mapping[str, Any]) -> Entry:
        """What `teachonce import` left: the vectors it read need not be on this machine."""
        committed: Entry = self.committed.get("teacher", {})
        if committed.get("files") and committed.get("declared") == declared:
            return committed
        self._report(
            MissingError(
                "embed.teacher",
                f"nothing was imported as {shown(declared['name'])}",
                "run `teachonce shard`, then `teachonce import VECTORS.npy TEXTS`",
            )
        )
        return {"declared": dict(declared), "files": {}}

    def _behind_api(self, params: EmbedParams, model: str) -> Entry:
        """The name of a model behind an API, and the hash of the tokenizer that cuts its texts."""
        tokenizer = getattr(getattr(params, "api", None), "tokenizer", None)

        def look() -> dict[str, str]:
            files = {"api": model}
            if tokenizer is not None:
                file = find_tokenizer(tokenizer, root=self.root, address="embed.api.tokenizer")
                files[file.name] = self.sha256(file)
            return files

        return self._entry("teacher", {"name": params.teacher, "tokenizer": tokenizer}, look)

    def _start(self, name: str, params: StartParams) -> Entry:
        """The entry of a start from a model of its own."""
        committed = self.committed.get("starts", {}).get(name, {})

        def files() -> dict[str, str]:
            address, pooling = f"starts.{name}.{params.named_in}", params.pooling
            folder = find_model(
                params.model, revision=None, root=self.root, address=address, pooling=pooling
            )
            files = self._model_files(folder, address, committed, self.sections.get("embed"))
            trusted = bool(getattr(self.sections.get("embed"), "trust_remote_code", False))
            self._ask(check_code, folder, trusted=trusted, address=address)
            self._ask(decided_pooling, folder, pooling, address=f"starts.{name}.pooling")
            self._ask_of_start(name, params, folder)
            return files

        return self._entry("starts", {"name": params.model}, files, committed=committed)

    def _shard(self, params: ShardParams) -> Entry:
        distill = self.sections.get("distill", NO_READINGS)
        distill = distill if hasattr(distill, "readings") else NO_READINGS
        declared = {"sources": _dumped(params.sources), "field": params.field}
        if distill.readings:
            declared["readings"] = _dumped(distill.readings)
        address = "shard.sources"
        patterns = [glob if isinstance(glob, str) else glob.files for glob in params.sources]
        outside = [glob for glob in patterns if not self._is_made_here(glob, address)]
        all_outside = len(outside) == len(patterns)
        self.problems += other_fields(self.sections, texts=not all_outside, pairs=False)

        def look() -> list[Path]:
            files = corpus_files.source_files(outside, self.root) if outside else []
            files += self._readings(distill)
            lengths = self._can_read("shard", "min_chars", "max_chars") and not distill.readings
            if all_outside and lengths and self._can_read("split", "heldout"):
                heldout = self.sections["split"].heldout
                if self.sections.get("students"):
                    self._ask(check_heldout, params, heldout, self.root)
            return files

        return self._entry("shard", declared, partial(self._hashed, look))

    def _readings(self, distill: DistillParams) -> list[Path]:
        """The files of readings that `docs` does not make, each looked at."""
        named = [source for role in distill.roles for source in distill.readings_of(role)]
        outside = [source for source in named if not self._is_made_here(source.files, SETTING)]
        files = reading_files(outside, self.root)
        for path in files:
            self._ask(look_at_readings, path)
        return files

    def _evaluation(self, params: EvaluateParams) -> dict[str, Entry]:
        """An entry for each evaluation set that is not made by `docs`."""
        looks: dict[str, tuple[str, Callable[[], list[Path]]]] = {}
        for name, pattern in params.sts.items():
            looks[f"sts.{name}"] = (
                pattern,
                partial(evaluation_sets.sts_files, pattern, self.root, f"evaluate.sts.{name}"),
            )
        for name, setting in params.retrieval.items():
            looks[f"retrieval.{name}"] = setting, partial(self._beir_files, setting, name)
        committed = self.committed.get("evaluation", {})
        return {
            key: self._entry(
                key,
                {"is": setting},
                partial(self._hashed, partial(_lines_of, look)),
                committed=committed.get(key, {}),
            )
            for key, (setting, look) in looks.items()
            if not self._is_made_here(setting, f"evaluate.{key}")
        }

    def _beir_files(self, setting: str, name: str) -> list[Path]:
        return evaluation_sets.beir_files(
            evaluation_sets.beir_folder(setting, self.root, name), name
        )

    def _finetune(self, params: FinetuneParams) -> Entry:
        # Where nobody is finetuned, nothing is read, so nothing need be there.
        students = getattr(params, "students", ()) or self._students_that_read_labels()
        triplets = [
            pattern
            for pattern in (params.triplets if students else ())
            if not self._is_made_here(pattern, "finetune.triplets")
        ]
        dev = params.dev if students else None
        can_look = hasattr(params, "fields")
        made_here = len(triplets) < len(params.triplets) and bool(students)
        self.problems += other_fields(self.sections, texts=False, pairs=made_here)
        can_count = can_look and hasattr(params, "heldout") and not made_here

        def look() -> list[Path]:
            address = "finetune.dev"
            judged = (
                _lines_of(partial(evaluation_sets.sts_files, dev, self.root, address))
                if dev
                else []
            )
            labelled = triplet_files(triplets, self.root)
            looks = [self._ask(look_at, path, params.fields) for path in labelled if can_look]
            if all(looks) and can_count:
                self._ask(check_labels, params, labelled, self.root)
            return [*labelled, *judged]

        declared = {"triplets": list(params.triplets), "dev": params.dev}
        return self._entry("finetune", declared, partial(self._hashed, look))

    def _students_that_read_labels(self) -> list[str]:
        recipes = self.sections.get("recipes", {})
        return [
            name
            for name, student in self.sections.get("students", {}).items()
            if student.recipe in recipes and recipes[student.recipe].reads_labels
        ]

    def _hashed(self, look: Callable[[], list[Path]]) -> list[list[str]]:
        return [[as_utf8(path.name), self.sha256(path)] for path in look()]

    def _is_made_here(self, pattern: str, address: str) -> bool:
        """Whether a pattern names outputs of `docs`, which DVC itself follows."""
        try:
            if not located(pattern, self.root, address).is_relative_to(self.raw):
                return False
        except MissingError:  # whoever looks for the files says so
            return False
        if self._can_read("docs", "packages") and not self.sections["docs"].packages:
            self.problems.append(
                (
                    address,
                    f"{pattern} is made by the stage docs, and docs.packages names no package\n"
                    "    cure: name files of your own, or packages",
                )
            )
        return True

    def _can_read(self, section: str, *settings: str) -> bool:
        """Whether these settings of a section are right, whatever is wrong beside them."""
        params = self.sections.get(section)
        return params is not None and all(hasattr(params, setting) for setting in settings)

    def _entry(
        self,
        name: str,
        declared: Mapping[str, Any],
        look: Callable[[], Any],
        *,
        committed: Mapping[str, Any] | None = None,
    ) -> Entry:
        """Hash files; for those not on this machine the committed entry of the same settings stands."""
        committed = self.committed.get(name, {}) if committed is None else committed
        try:
            return {"declared": dict(declared), "files": look()}
        except TeachonceError as error:
            is_same = committed.get("files") and committed.get("declared") == declared
            if isinstance(error, MissingError) and is_same:
                log.info("check: %s: %s; what is committed stands", error.where, error.problem)
                return {"declared": dict(declared), "files": committed["files"]}
            self._report(error)
        return {"declared": dict(declared), "files": {}}

    def _report(self, error: TeachonceError) -> None:
        problem = error.where, f"{error.problem}\n    cure: {error.cure}"
        if problem not in self.problems:
            self.problems.append(problem)


def _dumped(named: Sequence[str | Section]) -> list[Any]:
    """Globs, and mappings with a glob, as they stand in params.yaml."""
    return [source if isinstance(source, str) else source.model_dump() for source in named]


def _lines_of(look: Callable[[], list[Path]]) -> list[Path]:
    """The files of an evaluation set; raises TeachonceError for one that is not UTF-8 with line feeds."""
    paths = look()
    for path in paths:
        with reading(path, "fetch or make the file again"):
            check_start(path)
    return paths


class RememberedHashes:
    """The sha256 of files, remembered by path and identity (see `durable.identity`).

    Args:
        memory: A JSON file; losing it costs time, nothing else.
        read_data: Hash every file anew, and log where what is remembered was wrong.
    """

    def __init__(self, memory: Path, *, read_data: bool = False) -> None:
        self.memory, self.read_data = memory, read_data
        self.remembered = read_sources(memory)

    def __call__(self, path: Path) -> str:
        """The sha256 of a file, as hex."""
        with durable.named(path, "reading"):
            return self._hash(path)

    def _hash(self, path: Path) -> str:
        status = path.stat()
        before = [*durable.identity(status)]
        # FAT counts time in steps of up to two seconds: within one, a file may change and keep its time.
        unsettled = (
            status.st_ctime_ns % COARSE_STEP == 0
            and abs(time.time_ns() - status.st_ctime_ns) < COARSE_TIME
        )
        entry = self.remembered.get(as_utf8(path), [])
        remembered = isinstance(entry, list) and entry[:-1] == before
        if remembered and not self.read_data:
            return str(entry[-1])
        sha256 = sha256_of(path)
        if remembered and entry[-1] != sha256:
            log.warning("check: %s: other bytes, though no time of it changed", path)
        # What was written to meanwhile is hashed again next time.
        if [*durable.identity(path.stat())] == before and not unsettled:
            self.remembered[as_utf8(path)] = [*before, sha256]
        return sha256

    def save(self) -> None:
        """Write the memory for the next run."""
        write_json(self.memory, self.remembered)


def _notes_of_corpus(sections: Sections, corpus: Path) -> list[str]:
    """Too many shards, and queues in use that are not smaller than the corpus, once that has been cut."""
    try:
        manifest = Manifest.load(corpus, "corpus")
    except TeachonceError:
        return []
    note = larger_shards(sections["shard"], rows=manifest.rows, shards=len(manifest.objects))
    rows = round(manifest.rows * (1 - sections["split"].heldout))
    names = {student.recipe for student in sections["students"].values()}
    return ([] if note is None else [note]) + [
        f"recipes.{name}: {note}"
        for name in sorted(names)
        for note in larger_queues(sections["recipes"][name], rows)
    ]


def read_sources(path: Path) -> dict[str, Any]:
    """A JSON object that `check` left, such as data/sources.json; empty if it cannot be read."""
    try:
        content = json.loads(regular.content(path))
    except (OSError, ValueError, RecursionError, TeachonceError):
        return {}
    return content if isinstance(content, dict) else {}


def version_of(stage: str) -> int:
    """The VERSION of a stage, read from its source: importing it would take torch along."""
    spec = importlib.util.find_spec(f"stages.{stage}")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"stages.{stage}")
    for node in ast.parse(Path(spec.origin).read_bytes()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VERSION":
            return int(ast.literal_eval(node.value))
    raise AttributeError(f"stages.{stage} has no VERSION")
