"""A work tree with its settings: opens what stages need, by name.

This file is long because everything that any stage is given is opened here, and nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline.layout import Layout
from pipeline.settings import load_params, store_folder
from stages.check import Survey, read_sources, reads_texts
from stages.models.config import NAMED, own_prompts, prompts_by_role, undecided, with_prompts
from stages.models.folder import find_model
from stages.models.lineage import leaves_teacher_space, prompts_read, read_lineage
from stages.outcome import log, write_json
from stages.params import (
    FINETUNED,
    MODEL_NAME,
    START_FOLDER,
    TEACHER,
    EmbedParams,
    ExportParams,
    Params,
    RecipeParams,
    Sections,
    SettingsError,
    StartParams,
    neighbours_wanted,
    students_behind_prompts,
)
from stages.reading.files import located
from storage import regular
from storage.caches import Caches
from storage.corpus import Corpus
from storage.embeddings import Embeddings, fingerprints
from storage.errors import DamagedError, MissingError, TeachonceError, shown
from storage.journal import Journal, Ledger
from storage.manifest import Kind, Manifest, fingerprint
from storage.mixes import Mixes
from storage.negatives import Negatives, parent_of
from storage.readings import Readings
from storage.remote import Remote
from storage.roles import ROLES, Role
from storage.split import Split
from storage.store import Store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stages.measuring.loss import Comparison
    from stages.measuring.metrics import EvaluatedModel
    from stages.models.encoder import Encoder
    from stages.models.forms import OpenForm
    from stages.teaching.api import ApiTeacher
    from stages.teaching.api_texts import TextCounter
    from stages.teaching.interface import Encode, Engine

HELDOUT_COMPARED = 256
"""Held-out texts on which a format of an export is compared with its student."""


class Workspace:
    """The folder `root`, which has params.yaml.

    Raises:
        SettingsError: lists all that is wrong in params.yaml.
    """

    def __init__(self, root: Path) -> None:
        self.at = Layout(root)
        self.params: Params = load_params(self.at.params)
        log.debug("settings: %s", self.at.params)

    @cached_property
    def store(self) -> Store:
        """The store: $TEACHONCE_STORE, or the setting, relative to the work tree."""
        folder = store_folder(self.params.store, self.at.root)
        log.debug("store: %s", folder)
        return Store(folder)

    def remote(self) -> Remote | None:
        """The remote of the settings, if they name one.

        Raises:
            RemoteError: no such folder, or a kind of URL that is not known.
        """
        setting = self.params.remote
        if setting is None:
            return None
        if "://" not in setting:
            setting = str(located(setting, self.at.root, "remote").resolve())
        return Remote(setting)

    def needed_remote(self) -> Remote:
        """The remote, for commands that need one."""
        remote = self.remote()
        if remote is None:
            raise SettingsError(
                self.at.params.name, [("remote", "null; name s3://bucket/folder, or a folder")]
            )
        return remote

    def manifests(self) -> dict[Path, Manifest]:
        """The manifests in the work tree that name an object, by their files.

        Raises:
            MissingError: there is none.
        """
        manifests = {
            path: manifest
            for kind, path in self.at.manifests.items()
            if path.exists() and (manifest := self.manifest(kind)).objects
        }
        if not manifests:
            raise MissingError(
                self.at.corpus, "not there", "run `teachonce shard`, or `git pull` the manifests"
            )
        return manifests

    def manifest(self, kind: Kind) -> Manifest:
        """A manifest of the work tree; its ref in the store is renewed.

        Raises:
            MissingError, DamagedError, StorageError: as `Manifest.load`.
        """
        return _renewed(self.at.manifests[kind], kind, self.store)

    def manifest_if_any(self, kind: Kind) -> Manifest | None:
        """As `manifest`; None in a work tree older than manifests of that kind."""
        return self.manifest(kind) if self.at.manifests[kind].exists() else None

    def renew(self) -> None:
        """Renew the refs of this work tree's manifests in the store, as far as they can be read."""
        renew(self.at, self.store)

    def corpus(self) -> Corpus:
        """The texts."""
        return Corpus(self.store, self.manifest("corpus"))

    def embeddings(self, corpus: Corpus | None = None) -> Embeddings:
        """The teacher's vectors; those of `corpus`, where it is open already."""
        return Embeddings(self.store, self.manifest("embeddings"), corpus or self.corpus())

    def split(self, corpus: Corpus | None = None) -> Split:
        """Which rows are for what; those of `corpus`, where it is open already."""
        return Split.load(self.at.split, corpus or self.corpus())

    def negatives(self, embeddings: Embeddings, split: Split, corpus: Corpus) -> Negatives:
        """The mined neighbours, which must be those of these vectors and this split."""
        parent = parent_of(embeddings.manifest, split)
        return Negatives(self.store, self.manifest("negatives"), corpus, mined_from=parent)

    def mixes(self, corpus: Corpus) -> Mixes:
        """The teacher's vectors of mixes.

        Raises:
            MissingError: embed made none.
        """
        manifest = self.manifest("mixes")
        if not manifest.objects:
            raise MissingError(
                self.at.mixes,
                "names no mixes",
                "set embed.mixes to 0.5, say, and run `teachonce embed`",
            )
        return Mixes(self.store, manifest, corpus)

    def readings(self, corpus: Corpus) -> Readings | None:
        """The readings of texts; None where there are none."""
        manifest = self.manifest_if_any("readings")
        return Readings(self.store, manifest, corpus) if manifest and manifest.objects else None

    def needed_readings(self, corpus: Corpus) -> Readings:
        """The readings of texts, for a recipe that reads them.

        Raises:
            MissingError: there are none.
        """
        readings = self.readings(corpus)
        if readings is None:
            raise MissingError(
                self.at.readings,
                "names no readings",
                "name files of them in distill.readings, and run `teachonce shard`",
            )
        return readings

    def caches(
        self,
        *,
        with_negatives: bool,
        with_mixes: bool = False,
        with_readings: bool = False,
        with_labels: bool = False,
    ) -> Caches:
        """What a student learns from; neighbours, mixes and so on only for those that read them."""
        corpus = self.corpus()
        embeddings, split = self.embeddings(corpus), self.split(corpus)
        negatives = self.negatives(embeddings, split, corpus) if with_negatives else None
        mixes = self.mixes(corpus) if with_mixes else None
        readings = self.needed_readings(corpus) if with_readings else None
        labelled = self._labelled_rows(corpus, split) if with_labels else None
        return Caches(corpus, embeddings, negatives, split, self.store, mixes, readings, labelled)

    def _labelled_rows(self, corpus: Corpus, split: Split) -> NDArray[np.int64]:
        from stages.learning.labelled_rows import labelled_rows, learned_triplets

        return labelled_rows(learned_triplets(self.params.finetune, self.at.root), corpus, split)

    def evaluation_texts(self) -> Iterator[str]:
        """Every text that a model will be judged on."""
        from stages.reading import evaluation_sets

        sts, retrieval = evaluation_sets.read_sets(self.params.evaluate, self.at.root)
        return evaluation_sets.evaluation_texts(sts.values(), retrieval.values())

    def teacher(self) -> tuple[dict[str, str], Callable[[], Encode] | None]:
        """The hashes of the teacher's files, and how to load it; None where it is not on this machine.

        Raises:
            SettingsError: it is neither here nor in the committed data/sources.json.
        """
        params = self.params.embed
        survey = Survey(
            self._read_by_the_teacher,
            root=self.at.root,
            raw=self.at.raw,
            memory=self.at.hashes,
            committed=read_sources(self.at.sources),
        )
        files = survey.teacher(params)["files"]
        if survey.problems:
            raise SettingsError(self.at.params.name, survey.problems)
        if params.api_model is not None:
            return files, self.load_teacher
        try:
            self._teacher_folder()
        except MissingError:
            return files, None
        return files, self.load_teacher

    @property
    def _read_by_the_teacher(self) -> Sections:
        """The settings that name texts."""
        params = self.params
        return {"shard": params.shard, "distill": params.distill, "evaluate": params.evaluate}

    def embed_params(self, corpus: Corpus) -> EmbedParams:
        """The settings `embed`, with the model's own prompts for the roles of a corpus in them.

        Where the teacher is on another machine, its prompts are those that `check` noted there.
        """
        params = self.params.embed
        if params.is_imported or corpus.roles == ("text",):
            return params
        if params.api_model is not None:
            return with_prompts(params, {})
        try:
            own: Mapping[str, str] = own_prompts(self._teacher_folder(), "embed.teacher")
        except MissingError:
            own = read_sources(self.at.sources).get("teacher", {}).get("prompts", {})
        return with_prompts(params, own)

    def load_teacher(self) -> Encode:
        """The teacher, ready to encode; also in a worker of another process or machine."""
        if self.params.embed.api_model is not None:
            return self.api_teacher(journal=self.journal)
        return self.encoder(TEACHER).as_teacher()

    @cached_property
    def journal(self) -> Journal | None:
        """Where the answers of an API are kept until their shard is published; None for other teachers."""
        return None if self.params.embed.api_model is None else Journal(self.store.root)

    def api_teacher(self, *, for_sets: bool = False, journal: Journal | None = None) -> ApiTeacher:
        """The teacher behind an API, ready to be asked.

        Args:
            for_sets: Whether it is to read texts of evaluation sets, to `evaluate.max_tokens`.
            journal: Keeps its answers; None where they are kept otherwise, or not at all.

        Raises:
            TeachonceError: the key is not in the environment, or the tokenizer is not on this machine.
        """
        from stages.embed import recipe
        from stages.teaching.api import ApiTeacher, ReadAs
        from stages.teaching.api_budget import Purse
        from stages.teaching.api_server import Server

        params = self.params.embed
        model, api = params.api_model, params.api
        assert model is not None
        ledger = Ledger(self.store.root, model)
        purse = Purse(ledger, price=api.price_per_million_tokens, budget=api.budget)
        teachers = fingerprints(recipe(params, self.teacher()[0], ROLES))
        input_types = api.input_type.of(ROLES)
        roles = {
            role: ReadAs(teacher, params.prompts.of(role), input_types.get(role))
            for role, teacher in teachers.items()
        }
        return ApiTeacher(
            Server(model, api, purse), self.text_counter(for_sets=for_sets), roles, journal
        )

    def loader_of(self, name: str) -> Callable[..., EvaluatedModel]:
        """Returns what loads a model to be evaluated; a model that does not exist is an error at once.

        Raises:
            MissingError: it is not made yet.
        """
        if name == TEACHER and self.params.embed.api_model is not None:
            return self.api_teacher
        self.model_folder(name)
        return partial(self.encoder, name)

    def text_counter(self, *, for_sets: bool = False) -> TextCounter:
        """What counts and cuts the texts of a teacher behind an API.

        Raises:
            TeachonceError: the tokenizer is not on this machine, or cannot be read.
        """
        from stages.teaching.api_texts import TextCounter, load_tokenizer

        params = self.params.embed
        longest = (self.params.evaluate.max_tokens if for_sets else None) or params.max_tokens
        return TextCounter(load_tokenizer(params.api.tokenizer, self.at.root), longest)

    def engine(self) -> Engine:
        """Where the teacher runs."""
        from pipeline.workers.engine import engine_of

        return engine_of(self.params)

    def __getstate__(self) -> dict[str, Any]:
        """What goes to a worker: the settings, nothing that was opened here."""
        return {"at": self.at, "params": self.params}

    def adopt_teacher(self, files: dict[str, str]) -> None:
        """Note in data/sources.json which imported vectors are the teacher, where `check` keeps them."""
        params = self.params.embed
        entry = {"declared": {"name": params.teacher, "revision": params.revision}, "files": files}
        write_json(self.at.sources, {**read_sources(self.at.sources), "teacher": entry})

    def named(self, section: str, name: str) -> Any:  # noqa: ANN401 - the class of the section
        """The entry `name` of a section of named entries."""
        entries = getattr(self.params, section)
        if name not in entries:
            raise TeachonceError(
                f"{section}.{shown(name)}",
                "not in params.yaml",
                f"choose one of {', '.join(sorted(entries)) or 'none yet'}, or add it there",
            )
        return entries[name]

    def start_source(self, name: str) -> tuple[Path, str | None]:
        """The folder of the model that a start is made of, or like, and the pooling in the settings."""
        params = self.named("starts", name)
        if params.model == TEACHER:
            return self._teacher_folder(), self.params.embed.pooling
        folder = find_model(
            params.model,
            revision=None,
            root=self.at.root,
            address=f"starts.{name}.{params.named_in}",
            pooling=params.pooling,
        )
        return folder, params.pooling

    def start_made_from(self, name: str) -> str | None:
        """The fingerprint of what a start is made from; None if `check` has not noted its model yet."""
        from stages.start import recipe

        params: StartParams = self.named("starts", name)
        from_teacher = params.model == TEACHER
        noted = read_sources(self.at.sources).get("starts", {}).get(name, {})
        model = self.params.embed.teacher if from_teacher else params.model
        if not noted.get("files") or noted.get("declared", {}).get("name") != model:
            return None
        try:
            caches = self.caches(with_negatives=False) if params.chooses_layers else None
        except TeachonceError:
            return None
        made_from = recipe(
            params,
            pooling=self.params.embed.pooling if from_teacher else params.pooling,
            files=noted["files"],
            corpus=self.corpus() if params.reads_corpus else None,
            caches=caches,
        )
        return fingerprint(made_from)

    def student(self, name: str, recipe: str | None, start: str | None) -> tuple[RecipeParams, str]:
        """The recipe and the name of the start of a student.

        Raises:
            SettingsError: the recipe reads more neighbours than `mine` keeps.
        """
        declared = self.params.students.get(name)
        if declared is None and (recipe is None or start is None):
            self.named("students", name)
        recipe_name = recipe or (declared.recipe if declared else "")
        start_name = start or (declared.start if declared else "")
        self.named("starts", start_name)
        params: RecipeParams = self.named("recipes", recipe_name)
        if wrong := neighbours_wanted(recipe_name, params, self.params.mine.neighbours):
            raise SettingsError(self.at.params.name, wrong)
        if name in {TEACHER, START_FOLDER, *self.params.starts}:
            raise TeachonceError(name, "the name is taken", "choose another")
        _check_name(name)
        return params, start_name

    def model_folder(self, name: str) -> Path:
        """The folder of the teacher, a start or a student.

        Raises:
            MissingError: it is not made yet.
        """
        if name == TEACHER:
            return self._teacher_folder()
        _check_name(name)
        if name in self.params.starts:
            folder, command = self.at.start(name), "start"
        else:
            folder = self.at.model(name)
            command = "finetune" if name.endswith(FINETUNED) else "distill"
        if not (folder / "modules.json").is_file():
            who = shown(name.removesuffix(FINETUNED))
            raise MissingError(
                folder, "no such model", f"run `teachonce {command} {who}`, or `dvc repro`"
            )
        return folder

    def encoder(self, name: str, *, for_sets: bool = False) -> Encoder:
        """The teacher, a start or a student, ready to encode corpus rows, or texts of evaluation sets."""
        return self.load_encoder(
            self.model_folder(name), is_teacher=name == TEACHER, for_sets=for_sets
        )

    def exported(self) -> Path:
        """The folder that `export` left.

        Raises:
            MissingError: there is none.
        """
        if not (self.at.export / "modules.json").is_file():
            raise MissingError(
                self.at.export, "nothing exported", "run `teachonce export`, or `dvc repro`"
            )
        return self.at.export

    def load_encoder(self, folder: Path, *, is_teacher: bool, for_sets: bool = False) -> Encoder:
        """A model ready to encode; all read the same number of tokens at the same precision.

        A start or a student that has not so many positions reads as many as it has. Texts `for_sets` are
        read to `evaluate.max_tokens`, by the teacher, too; one that embeds in windows reads all of a text
        there, as it did for its cache.

        The prompts and the width of the settings are the teacher's; a student reads the prompts that it was
        trained with, which lie in its folder, and a start reads every text as it is.

        Raises:
            TeachonceError: the teacher leaves something undecided.
        """
        from stages.models.devices import pick_device
        from stages.models.encoder import Encoder
        from stages.models.processor import cpu_flags, slow_precision

        params = self.params.embed
        device = pick_device(self.params.device)
        slow = slow_precision(params.precision, cpu_flags()) if device.type == "cpu" else None
        if slow is not None:
            log.warning(slow)
        asked = reads_texts(self._read_by_the_teacher)
        for error in undecided(folder, params, reads_texts=asked) if is_teacher else ():
            raise error
        in_windows = params.long_texts == "windows" and is_teacher
        reads_more = for_sets and not in_windows
        return Encoder(
            folder,
            device=device,
            precision=params.precision,
            max_tokens=self.params.evaluate.max_tokens if reads_more else params.max_tokens,
            or_fewer=reads_more or not is_teacher,
            in_windows=in_windows,
            batch_tokens=None if params.batch_tokens == "auto" else params.batch_tokens,
            prompts=self._prompts(folder) if is_teacher else prompts_read(read_lineage(folder)),
            dim=params.dim if is_teacher else None,
            pooling=params.pooling if is_teacher else None,
            trust_remote_code=params.trust_remote_code,
        )

    def students(self) -> list[str]:
        """The trained models that params.yaml names, each finetuned one after the student it came from."""
        finetuned = set(self.params.finetune.students)
        return [
            model
            for name in self.params.students
            for model in (name, *([f"{name}{FINETUNED}"] if name in finetuned else []))
        ]

    def made_of(self) -> dict[str, str]:
        """Start or student of params.yaml -> what it is made of, in a few words."""
        descriptions = {}
        for name, start in self.params.starts.items():
            what = self._layers_of(name, start)
            if start.kind == "static":
                what = "a table of tokens"
            read = "" if start.passes is None else f", read {start.passes} times"
            kept = "" if start.vocabulary is None else ", fewer tokens"
            narrow = ", narrower" if start.is_narrow else ""
            of = f"like {start.model}, drawn at random" if start.is_random else f"of {start.model}"
            descriptions[name] = f"{what} {of}{read}{narrow}{kept}"
        for name, student in self.params.students.items():
            layers = descriptions.get(student.start, "no such start")
            descriptions[name] = f"recipe {student.recipe}, start {student.start} ({layers})"
        finetuned = {
            f"{n}{FINETUNED}": f"{n}, then labelled rows" for n in self.params.finetune.students
        }
        return descriptions | finetuned

    def _layers_of(self, name: str, start: StartParams) -> str:
        if start.layers is None:
            return "all layers"
        layers: Any = start.layers
        if start.is_random:
            return f"{layers} layers"
        if isinstance(layers, int):  # which, was found out when it was made
            chosen = read_sources(self.at.start_facts(name)).get("layers")
            if not isinstance(chosen, list):
                return f"the best {layers} layers"
            return f"layers {', '.join(map(str, chosen))}, the best {layers},"
        return f"layers {', '.join(map(str, layers))}"

    def lineage(self, name: str) -> dict[str, Any]:
        """What a student was made of."""
        return read_lineage(self.model_folder(name))

    def is_in_teachers_space(self, name: str) -> bool:
        """Whether a model's vectors can be compared with those of this teacher."""
        if name == TEACHER:
            return False
        lineage = self.lineage(name)
        learned_from = lineage.get("teacher", {}).get("fingerprint")
        return learned_from == self.teacher_fingerprint() and not leaves_teacher_space(lineage)

    def widths(self, name: str) -> tuple[int, ...]:
        """How many first values of a student's vectors are to serve alone, too (Matryoshka).

        A finetuned student has those of the student it was made from.
        """
        # A teacher may be an exported student; that is cut by `embed.dim` alone.
        recipe = {} if name == TEACHER else self.lineage(name).get("recipe", {})
        return tuple(recipe.get("widths", ()))

    def export_params(self, name: str | None) -> ExportParams:
        """The settings of an export: of the model that they name, or of another."""
        params = self.params.export
        if name is None:
            return params
        return ExportParams.model_validate(params.model_dump() | {"model": name, "also": ()})

    def comparison(self, params: ExportParams) -> Comparison:
        """How the formats of an export are measured: by `evaluate`, with the same settings and texts."""
        from stages.measuring.loss import Comparison

        return Comparison(
            evaluate=partial(self._evaluated_form, params), heldout=self._some_heldout
        )

    def _evaluated_form(self, params: ExportParams, name: str, form: OpenForm) -> dict[str, Any]:
        """The metrics of a form of a model, which `evaluate` writes into files of its own."""
        from stages.evaluate import run

        rows_limit, sets_limit = self.params.embed.max_tokens, self.params.evaluate.max_tokens
        judged_by = self.judged_by(params.model)
        if params.space == "student" and self.lineage(params.model).get("projection"):
            judged_by["in_teachers_space"] = False  # the export leaves the projection out
        with TemporaryDirectory() as scratch:
            outcome = run(
                self.params.evaluate,
                name=name,
                load=lambda *, for_sets: form(sets_limit if for_sets else rows_limit),
                out=Path(scratch) / "metrics.json",
                details=Path(scratch) / "details.json",
                **judged_by,
            )
        return dict(outcome.facts)

    def judged_by(self, model: str) -> dict[str, Any]:
        """What `stages.evaluate.run` takes beside a model to be evaluated, and where to write."""
        corpus = self.corpus()
        return {
            "corpus": corpus,
            "embeddings": self.embeddings(corpus),
            "split": self.split(corpus),
            "readings": self.readings(corpus),
            "root": self.at.root,
            "documents": self.at.documents,
            "in_teachers_space": self.is_in_teachers_space(model),
            "widths": self.widths(model),
        }

    def _some_heldout(self) -> list[str]:
        """Texts that are held out, evenly over the corpus; none if it holds none out."""
        from stages.vectors import evenly

        corpus = self.corpus()
        rows = self.split(corpus).heldout_rows(corpus)
        return corpus.take(evenly(rows, min(HELDOUT_COMPARED, len(rows)))) if len(rows) else []

    def metrics(self, model: str) -> dict[str, Any]:
        """One model's metrics."""
        return _read_json(self.at.metrics(model), f"teachonce evaluate {model}")

    def facts(self) -> dict[str, str]:
        """Where all students come from, for people: label -> text."""
        ledger = _read_json(self.at.stage_facts("shard"), "teachonce shard")
        rejected = [f"{count:,} {rule}" for rule, count in ledger["rejected"].items() if count]
        readings = ledger.get("readings", {}).get("kept", 0)
        return {
            "teacher": self.params.embed.teacher,
            "corpus": f"{ledger['kept']:,} texts of {ledger['read']:,} read"
            + (f" (rejected: {', '.join(rejected)})" if rejected else "")
            + (f", {ledger['added']:,} added by {readings:,} readings" if readings else ""),
            "tokens read of a text": str(self.params.embed.max_tokens)
            + (" at once, all in windows" if self.params.embed.long_texts == "windows" else "")
            + (" (by the teacher: unknown)" if self.params.embed.is_imported else ""),
            "prompts": self._prompts_phrase(),
            "teacher's vectors": f"{self._values_phrase()}, kept as {self.params.embed.storage}",
        }

    def _prompts_phrase(self) -> str:
        if self.params.embed.is_imported:
            return "the teacher's is unknown; students read texts as they are"
        own = read_sources(self.at.sources).get("teacher", {}).get("prompts", {})
        prompts = prompts_by_role(self.params.embed.prompts, own)
        by_prompt: dict[str, list[str]] = {}
        for role, prompt in prompts.items():
            by_prompt.setdefault(prompt.text, []).append(NAMED[role])
        if list(by_prompt) == [""]:
            return "none"
        reading = ", ".join(
            f"{shown(repr(prompt)) if prompt else 'nothing'} before "
            + ("every text" if len(by_prompt) == 1 else " and ".join(before))
            for prompt, before in by_prompt.items()
        )
        behind = students_behind_prompts(self.params.students, self.params.recipes)
        if not behind:
            return f"the teacher reads {reading}; students read texts as they are"
        others = "" if len(behind) == len(self.params.students) else ", others texts as they are"
        return f"the teacher reads {reading}; {', '.join(behind)} read the same{others}"

    def _prompts(self, folder: Path) -> dict[Role, str]:
        """What the teacher in a folder reads before the texts of each role."""
        prompts = prompts_by_role(self.params.embed.prompts, own_prompts(folder, "embed.teacher"))
        return {role: prompt.text for role, prompt in prompts.items()}

    def _values_phrase(self) -> str:
        dim = self.params.embed.dim
        return "all values" if dim is None else f"their first {dim} values"

    def teacher_fingerprint(self) -> str:
        """The name of the teacher's vectors in the store."""
        return fingerprint(self.manifest("embeddings").recipe)

    def _teacher_folder(self) -> Path:
        params = self.params.embed
        return find_model(
            params.teacher,
            revision=params.revision,
            root=self.at.root,
            address="embed.teacher",
            pooling=params.pooling,
        )


def renew(at: Layout, store: Store) -> None:
    """Renew the refs of a work tree's manifests in a store, as far as they can be read."""
    with suppress(TeachonceError):
        for kind, path in at.manifests.items():
            with suppress(TeachonceError):
                _renewed(path, kind, store)


def _renewed(path: Path, kind: Kind, store: Store) -> Manifest:
    manifest = Manifest.load(path, kind)
    manifest.renew(path, store)
    return manifest


def _read_json(path: Path, command: str) -> dict[str, Any]:
    """A small file that a stage left."""
    cure = f"run `{command}`"
    try:
        content = json.loads(regular.content(path))
    except FileNotFoundError:
        raise MissingError(path, "not there", cure) from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, "no JSON", cure) from error
    if not isinstance(content, dict):
        raise DamagedError(path, "no JSON object", cure)
    return content


def _check_name(name: str) -> None:
    """A model's name becomes a folder and files, so nothing else may be spelled in it."""
    if not re.fullmatch(MODEL_NAME, name):
        raise TeachonceError(
            shown(name), "no name of a model", "use lower case letters, digits, - and _"
        )
