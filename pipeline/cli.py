"""The commands: the pipeline in its order, then what looks after the store.

Each reads settings, opens inputs, runs a stage, prints. The file is long because it is a flat list:
a command is its help and its wiring, and whoever looks for one finds it here.

There are no flags for settings: params.yaml holds them all, and `dvc exp run -S embed.max_tokens=64`
changes one and records it. Heavy imports stand inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from pipeline.printing import LogLine, as_json_object, place_of, say, show, show_lines
from storage import durable
from storage.errors import DamagedError, MissingError, TeachonceError, shown

if TYPE_CHECKING:
    from pipeline.workspace import Workspace
    from storage.corpus import ShardSlice


class Commands(TyperGroup):
    """The commands; -v may also stand behind one of them, where its help does not list it."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - what typer passes on
        super().__init__(**settings)
        verbose = copy.copy(next(option for option in self.params if option.name == "verbose"))
        verbose.hidden = True  # type: ignore[attr-defined]  # an option has it, an argument does not
        for command in self.commands.values():
            command.params.append(verbose)


app = typer.Typer(
    name="teachonce",
    cls=Commands,
    help="Run the teacher once. Train students from its memory for as long as you like.\n\n"
    "Run these in a folder that has a params.yaml; `teachonce init` makes one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

STAGES = "The pipeline, in its order; `dvc repro` runs what is not up to date"
STORE = "The store"
NEW = "A new project"
Shards = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Only the I-th of N shares, and no manifest, as in a Slurm array; "
        "a last run without it writes the manifest.",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result, or the error, as one JSON object on stdout."),
]
StorePath = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="PATH",
        help="The store in PATH, from anywhere: no params.yaml is needed.",
    ),
]
log = logging.getLogger("teachonce")

SIGNALS = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}
PATIENCE = 4.0
"""Seconds from a signal to the end, whatever a transfer to a dead remote still waits for."""


def _print_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        from importlib.metadata import version

        say(f"teachonce {version('teachonce')}")
        raise typer.Exit


def _log_each_step(wanted: bool) -> None:
    """Log as much as -v says."""
    if wanted:
        # Not libraries' own debugging: some log the headers of a request, and keys stand there.
        logging.getLogger().setLevel(logging.INFO)
        log.setLevel(logging.DEBUG)


@app.callback()
def before_each(
    folder: Annotated[
        Path | None,
        typer.Option(
            "-C",
            metavar="DIR",
            help="Run as if in DIR; relative paths, also of the command line, are relative to it.",
        ),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            callback=_log_each_step,
            expose_value=False,
            help="Log each step on stderr, also what libraries log. May stand behind the command, too.",
        ),
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Go to the folder of -C, before the command."""
    if folder is not None:
        with durable.named(folder, "going there"):
            os.chdir(folder)


@app.command(rich_help_panel=STAGES)
def check(
    read_data: Annotated[
        bool, typer.Option("--read-data", help="Hash every file anew, whatever is remembered.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check settings, sources and models; list all that is wrong. A second.

    Reads: params.yaml; names and hashes of the files and models that it names.

    Leaves: data/sources.json, data/versions.yaml: what the later stages
    compare.

    Example: teachonce check
    """
    from pipeline.layout import Layout
    from pipeline.settings import examine
    from stages.check import run
    from stages.models.processor import cpu_flags, may_have_gpu

    at = Layout(Path.cwd())
    content, problems, sections = examine(at.params)
    is_here = isinstance(content, dict) and content.get("engine") != "ray"
    device = content.get("device") if isinstance(content, dict) else None
    on_cpu = is_here and (device == "cpu" or (device == "auto" and not may_have_gpu()))
    show(
        run(
            problems,
            sections,
            root=at.root,
            raw=at.raw,
            memory=at.hashes,
            corpus=at.corpus,
            out=at.sources,
            versions=at.versions,
            read_data=read_data,
            flags=cpu_flags() if on_cpu else (),
        ),
        as_json,
    )


@app.command(rich_help_panel=STAGES)
def docs(as_json: Json = False) -> None:
    """Write the demo's texts: the documentation of installed packages.

    Reads: the sources of the packages that `docs.packages` names.

    Leaves: data/raw (texts, labelled pairs, a retrieval test),
    reports/stages/docs.json.

    Example: teachonce docs
    """
    from stages.docs import run

    here = workspace()
    show(run(here.params.docs, out=here.at.raw, facts=here.at.stage_facts("docs")), as_json)


@app.command(rich_help_panel=STAGES)
def shard(as_json: Json = False) -> None:
    """Clean the corpus and cut it into text shards.

    Reads: the files of `shard.sources`, such as data/raw, and of
    `distill.readings`.

    Leaves: text shards in the store; data/corpus.json, which names them;
    data/readings.json, which names those of readings (none without such
    files); reports/stages/shard.json.

    Example: teachonce shard
    """
    from stages.shard import run

    here = workspace()
    show(
        run(
            here.params.shard,
            root=here.at.root,
            store=here.store,
            out=here.at.corpus,
            facts=here.at.stage_facts("shard"),
            distill=here.params.distill,
            readings=here.at.readings,
        ),
        as_json,
    )


@app.command(rich_help_panel=STAGES)
def split(as_json: Json = False) -> None:
    """Hold rows out, and find those that stand in evaluation sets.

    Reads: data/corpus.json, data/readings.json, the sets of `evaluate`, such as
    those in data/raw.

    Leaves: data/split.json, reports/stages/split.json.

    Example: teachonce split
    """
    from stages.split import run

    here = workspace()
    corpus = here.corpus()
    show(
        run(
            here.params.split,
            corpus=corpus,
            readings=here.readings(corpus),
            evaluation=here.evaluation_texts(),
            out=here.at.split,
            facts=here.at.stage_facts("split"),
        ),
        as_json,
    )


@app.command(rich_help_panel=STAGES)
def embed(shards: Shards = None, as_json: Json = False) -> None:
    """Run the teacher over the shards that the store lacks. Safe to interrupt.

    Reads: data/corpus.json, the teacher.

    Leaves: vectors in the store; data/embeddings.json, which names them;
    data/mixes.json, which names those of mixes (none if embed.mixes is 0);
    reports/stages/embed.json.

    Example: teachonce embed --shards 1/8
    """
    from stages.embed import run

    share = None if shards is None else _share(shards)
    here = workspace()
    files, load_teacher = here.teacher()
    corpus = here.corpus()
    show(
        run(
            here.embed_params(corpus),
            files=files,
            corpus=corpus,
            store=here.store,
            remote=here.remote(),
            load_teacher=load_teacher,
            out=here.at.embeddings,
            facts=here.at.stage_facts("embed"),
            mixes=here.at.mixes,
            engine=here.engine(),
            share=share,
            journal=here.journal,
        ),
        as_json,
    )


@app.command(rich_help_panel=STAGES)
def start(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name of `starts` in params.yaml.")],
    as_json: Json = False,
) -> None:
    """Make a student before training: NAME of params.yaml's `starts`.

    Reads: the teacher, or the model that the start is made from; for a start
    that depends on texts of the corpus also data/corpus.json. To choose
    layers, and to say how far it agrees with the teacher: data/corpus.json,
    data/embeddings.json, data/split.json.

    Leaves: models/start/NAME, reports/starts/NAME.json.

    Example: teachonce start half
    """
    from stages.models.devices import pick_device
    from stages.start import as_it_is, chosen_layers, measure, run

    here = workspace()
    caches = partial(here.caches, with_negatives=False)
    params, out = here.named("starts", name), here.at.start(name)
    record, made_from = here.at.start_facts(name), here.start_made_from(name)
    try:
        folder, pooling = here.start_source(name)
    except MissingError:
        existing = as_it_is(name, folder=out, record=record, made_from=made_from)
        if existing is None:
            raise
        outcome = existing
    else:
        outcome = run(
            params,
            name=name,
            folder=folder,
            pooling=pooling,
            trust_remote_code=here.params.embed.trust_remote_code,
            corpus=here.corpus,
            choose=partial(
                chosen_layers,
                name,
                caches,
                max_tokens=here.params.embed.max_tokens,
                device=pick_device(here.params.device),
            ),
            out=out,
        )
    show(
        measure(
            outcome,
            name=name,
            load=partial(here.encoder, name),
            caches=caches,
            record=record,
            made_from=made_from,
        ),
        as_json,
    )


@app.command(rich_help_panel=STAGES)
def mine(shards: Shards = None, as_json: Json = False) -> None:
    """Find each row's hard negatives among the teacher's vectors. Safe to interrupt.

    Reads: data/corpus.json, data/embeddings.json, data/split.json.

    Leaves: neighbours in the store; data/negatives.json, which names them;
    reports/stages/mine.json.

    Example: teachonce mine --shards 1/8
    """
    from stages.mine import run
    from stages.models.devices import pick_device

    share = None if shards is None else _share(shards)
    here = workspace()
    show(
        run(
            here.params.mine,
            corpus=here.corpus(),
            embeddings=here.embeddings(),
            split=here.split(),
            store=here.store,
            device=pick_device(here.params.device),
            out=here.at.negatives,
            facts=here.at.stage_facts("mine"),
            share=share,
        ),
        as_json,
    )


@app.command(rich_help_panel=STAGES)
def neighbours(as_json: Json = False) -> None:
    """Write which mined neighbours, mixes, readings and labels each recipe reads. DVC compares these files.

    No stage reads them.

    Reads: data/negatives.json, data/mixes.json, data/readings.json; for a
    recipe that reads labels also the files of `finetune.triplets`, such as
    those in data/raw.

    Leaves: data/neighbours.

    Example: teachonce neighbours
    """
    from stages.learning.labelled_rows import learned_triplets
    from stages.neighbours import run

    here = workspace()
    recipes, negatives = here.params.recipes, here.manifest("negatives")
    outcome = run(
        recipes,
        negatives=negatives,
        mixes=here.manifest_if_any("mixes"),
        readings=here.manifest_if_any("readings"),
        labelled=partial(learned_triplets, here.params.finetune, here.at.root),
        out=here.at.neighbours,
    )
    show(outcome, as_json)


@app.command(rich_help_panel=STAGES)
def distill(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A name of `students`, or any other with --recipe and --start."
        ),
    ],
    recipe: Annotated[
        str | None, typer.Option(help="A name of `recipes`, in place of the student's own.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="A name of `starts`, in place of the student's own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train the student NAME from the caches. Safe to interrupt.

    Its recipe and start stand in params.yaml's `students`; for any other name, give both.

    Reads: data/corpus.json, data/embeddings.json, data/split.json,
    models/start/START; the recipe's neighbours, mixes, readings and labelled
    triplets, which data/neighbours tells DVC.

    Leaves: models/NAME, reports/training/NAME.json, reports/curves/NAME.csv.

    Example: teachonce distill tiny-ckd --recipe ckd --start half
    """
    from stages.distill import run
    from stages.learning.ranks import is_first, joined
    from stages.learning.trackers import tracking

    here = workspace()
    params, start_name = here.student(name, recipe, start)
    with (
        joined(here.params.device) as device,
        tracking(here.params.tracker, name, here.at.tracking) as track,
    ):
        outcome = run(
            params,
            name=name,
            start=here.model_folder(start_name),
            caches=here.caches(
                with_negatives=params.reads_neighbours,
                with_mixes=params.reads_mixes,
                with_readings=params.readings > 0,
                with_labels=params.reads_labels,
            ),
            device=device,
            work=here.at.work,
            out=here.at.model(name),
            curve=here.at.curve(name),
            training=here.at.training(name),
            track=track,
            trust_remote_code=here.params.embed.trust_remote_code,
        )
        if is_first():
            show(outcome, as_json)


@app.command(rich_help_panel=STAGES)
def finetune(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A student that `distill` has trained.")
    ],
    as_json: Json = False,
) -> None:
    """Train the student NAME on labelled pairs or triplets. Safe to interrupt.

    What comes of it is NAME-finetuned.

    Reads: models/NAME, the files of `finetune.triplets`, such as those in
    data/raw; with a distill_weight also data/corpus.json, data/embeddings.json,
    data/split.json.

    Leaves: models/NAME-finetuned, reports/training/NAME-finetuned.json,
    reports/curves/NAME-finetuned.csv.

    Example: teachonce finetune kd
    """
    from stages.finetune import run
    from stages.learning.ranks import is_first, joined
    from stages.learning.trackers import tracking
    from stages.params import FINETUNED
    from stages.reading.evaluation_sets import evaluation_keys

    here = workspace()
    params, finetuned = here.params.finetune, f"{name}{FINETUNED}"
    with (
        joined(here.params.device) as device,
        tracking(here.params.tracker, finetuned, here.at.tracking) as track,
    ):
        outcome = run(
            params,
            name=finetuned,
            student=here.model_folder(name),
            root=here.at.root,
            evaluation={key for text in here.evaluation_texts() for key in evaluation_keys(text)},
            caches=here.caches(with_negatives=False) if params.distill_weight else None,
            device=device,
            work=here.at.work,
            out=here.at.model(finetuned),
            curve=here.at.curve(finetuned),
            training=here.at.training(finetuned),
            track=track,
            trust_remote_code=here.params.embed.trust_remote_code,
        )
        if is_first():
            show(outcome, as_json)


@app.command(rich_help_panel=STAGES)
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="`teacher`, a start, a student, NAME-finetuned, or any folder under models/.",
        ),
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option("--mteb", help="A task of mteb instead of our sets; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure MODEL: `teacher`, a start, a student, or any folder under models/.

    Reads: models/MODEL or models/start/MODEL, the sets of `evaluate`, such as
    those in data/raw; data/corpus.json, data/readings.json,
    data/embeddings.json, data/split.json; of students also data/documents.

    Leaves: reports/metrics/MODEL.json, reports/details/MODEL.json; of the
    teacher also data/documents; with --mteb reports/mteb/MODEL.json.

    Example: teachonce evaluate kd
    """
    here = workspace()
    if tasks:
        from stages.measuring.mteb_tasks import run as run_mteb

        show(
            run_mteb(
                tasks,
                name=model,
                folder=here.model_folder(model),
                load_encoder=lambda: here.encoder(model, for_sets=True),
                out=here.at.mteb(model),
            ),
            as_json,
        )
        return
    from stages.evaluate import run, run_imported
    from stages.params import TEACHER

    if model == TEACHER and here.params.embed.is_imported:
        outcome = run_imported(
            out=here.at.metrics(model), details=here.at.details(model), documents=here.at.documents
        )
        show(outcome, as_json)
        return
    show(
        run(
            here.params.evaluate,
            name=model,
            load=here.loader_of(model),
            out=here.at.metrics(model),
            details=here.at.details(model),
            **here.judged_by(model),
        ),
        as_json,
    )


@app.command(rich_help_panel=STAGES)
def export(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A student to export to exports/NAME; without it, `export.model` to export.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a student for anyone who has sentence-transformers, in the formats that `export.formats` names.

    Formats beside the first are measured as `evaluate` measures the student.

    Reads: models/NAME, its reports/metrics and the teacher's,
    reports/stages/shard.json; where formats are measured also the sets of
    `evaluate`, such as those in data/raw, data/corpus.json,
    data/readings.json, data/embeddings.json, data/split.json, data/documents.

    Leaves: export, or exports/NAME; reports/exports/NAME.json.

    Example: teachonce export kd
    """
    from stages.export import run
    from stages.params import TEACHER

    here = workspace()
    params = here.export_params(name)
    show(
        run(
            params,
            folder=here.model_folder(params.model),
            lineage=here.lineage(params.model),
            metrics={model: here.metrics(model) for model in (TEACHER, params.model)},
            facts=here.facts(),
            out=here.at.export if name is None else here.at.exported(name),
            results=here.at.formats(params.model),
            comparison=here.comparison(params),
            trust_remote_code=here.params.embed.trust_remote_code,
        ),
        as_json,
    )


@app.command(rich_help_panel=STAGES)
def report(
    models: Annotated[list[str] | None, typer.Argument(help="Further models, by name.")] = None,
    as_json: Json = False,
) -> None:
    """Gather the metrics of the models that params.yaml names: a table here, and a page to open.

    Reads: reports/metrics, reports/details, reports/curves, reports/training,
    reports/starts, reports/stages, reports/exports, data/embeddings.json.

    Leaves: reports/metrics.json, reports/index.html.

    Example: teachonce report kd-finetuned
    """
    from stages.params import TEACHER
    from stages.report import run
    from stages.reporting.table import table

    here = workspace()
    students = [*here.students(), *(models or [])]
    outcome = run(
        [TEACHER, *here.params.starts, *students],
        students=students,
        metrics=here.at.metrics,
        details=here.at.details,
        curve=here.at.curve,
        training=here.at.training,
        exports=here.at.formats,
        facts={
            "project": here.at.project,
            **here.facts(),
            "teacher's fingerprint": here.teacher_fingerprint(),
        },
        rank_by=here.params.report.rank_by,
        choose=here.params.report.choose,
        made_of=here.made_of(),
        out=here.at.report,
        page=here.at.page,
    )
    if as_json:
        show(outcome, as_json)
        return
    from rich.console import Console

    # The sentence of the outcome stands below the table already.
    console = Console()
    params = here.params.report
    console.print(
        table(
            outcome.facts,
            students=students,
            width=console.width,
            rank_by=params.rank_by,
            choose=params.choose,
        )
    )
    say(f"  -> {place_of(outcome.made)}")


@app.command(rich_help_panel=STAGES)
def plan(
    seconds: Annotated[
        float,
        typer.Option(min=0.1, help="To measure the teacher; every other measurement has half."),
    ] = 20.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample.")] = 0,
    as_json: Json = False,
) -> None:
    """Say what embed, mine, distill, finetune and evaluate will take here: a sample is measured.

    Example: teachonce plan --seconds 60
    """
    from pipeline.commands.plan import run
    from pipeline.commands.plan_table import lines

    outcome = run(workspace(), seconds=seconds, seed=seed)
    show_lines(outcome, lines(outcome.facts), as_json)


@app.command(rich_help_panel=STAGES)
def search(
    query: Annotated[str, typer.Argument(help="What you look for; `-` reads one query a line.")],
    model: Annotated[
        str | None, typer.Option(help="A student; without it, the exported model.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many texts.")] = 5,
    as_json: Json = False,
) -> None:
    """Search the corpus: a student reads QUERY and looks among the teacher's cached vectors.

    With `-` each line of stdin is answered before the next is read: the texts and
    an empty line, or, with --json, an object on a line. Empty lines are passed
    over.

    Example: teachonce search "read a table from a text file" --model kd
    """
    from stages.measuring.search import QueryEncoder, run
    from stages.params import TEACHER

    here = workspace()
    ends = ExitStack()
    if model == TEACHER and here.params.embed.api_model is not None:
        folder = Path(here.params.embed.teacher)
        encoder: QueryEncoder = ends.enter_context(closing(here.api_teacher()))
    else:
        folder = here.exported() if model is None else here.model_folder(model)
        encoder = here.load_encoder(folder, is_teacher=model == TEACHER)
    answer = partial(
        run,
        model=folder,
        encoder=encoder,
        corpus=here.corpus(),
        embeddings=here.embeddings(),
        count=count,
    )
    with ends:
        for asked in _lines_of_stdin() if query == "-" else [query]:
            outcome = answer(asked)
            if as_json:
                show(outcome, as_json)
                continue
            for hit in outcome.facts["hits"]:
                say(f"{hit['cosine']:.3f}  {shown(hit['text'])}")
            if query == "-":
                say("")


@app.command(rich_help_panel=STORE)
def verify(
    read_data: Annotated[
        bool, typer.Option("--read-data", help="Read every value and compare its sha256.")
    ] = False,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Read this many objects, chosen at random.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the choice, to make it again.")] = None,
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Check that the store has what the manifests here name, whole. Without options, headers only.

    With --store, what all refs in it name.

    Example: teachonce verify --sample 100
    """
    from pipeline.commands.verify import check_sound, lines, run, run_all

    if seed is not None and sample is None:
        raise typer.BadParameter("--seed chooses nothing without --sample")
    examine = partial(run, workspace()) if store is None else partial(run_all, store.resolve())
    outcome = examine(read_data=read_data, sample=sample, seed=seed)
    failure = None
    try:
        check_sound(outcome)
    except DamagedError as error:
        failure = error
    show_lines(outcome, lines(outcome.facts), as_json, failure)


@app.command(rich_help_panel=STORE)
def repair(as_json: Json = False) -> None:
    """Move what is damaged into quarantine; make exactly that, and what is missing, again.

    Example: teachonce repair
    """
    from pipeline.commands.repair import run

    outcome, failure = run(workspace())
    show(outcome, as_json, failure)


@app.command(rich_help_panel=STORE)
def ls(store: StorePath = None, as_json: Json = False) -> None:
    """List what is in the store, for which teacher, how large, and whose manifests need it.

    Example: teachonce ls --store ~/.cache/teachonce
    """
    from pipeline.commands.ls import lines, run

    outcome = run(_store_in_use(store))
    show_lines(outcome, lines(outcome.facts), as_json)


@app.command(rich_help_panel=STORE)
def diff(
    a: Annotated[Path, typer.Argument(help="A manifest, such as data/embeddings.json.")],
    b: Annotated[Path, typer.Argument(help="Another of the same kind.")],
    as_json: Json = False,
) -> None:
    """Say in which settings and shards two manifests differ; exit code 1 if they do.

    Example: teachonce diff data/embeddings.json ../other/data/embeddings.json
    """
    from pipeline.commands.diff import lines, run

    outcome = run(a, b)
    show_lines(outcome, lines(outcome.facts), as_json)
    if not outcome.facts["equal"]:
        raise typer.Exit(1)


@app.command(rich_help_panel=STORE)
def gc(
    delete: Annotated[
        bool, typer.Option("--delete", help="Do it; without, only say what would go.")
    ] = False,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Also what `repair` moved away.")
    ] = False,
    forget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REF",
            help="Remove a ref first, as `ls` names it: one holder of one manifest. May be repeated.",
        ),
    ] = None,
    forget_gone: Annotated[
        bool,
        typer.Option(
            "--forget-gone",
            help="Remove the refs of holders whose folder on this machine is gone, such as those of "
            "`dvc exp run --temp`. (Not while a disk is not mounted.)",
        ),
    ] = False,
    grace: Annotated[
        float,
        typer.Option(
            min=0, metavar="DAYS", help="Spare a folder with an unnamed object this young."
        ),
    ] = 14.0,
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Delete objects that no ref in the store names. A dry run, unless told to.

    Example: teachonce gc --grace 30 --delete
    """
    from pipeline.commands.gc import lines, run

    outcome = run(
        # Nobody should delete what the very folder needs in which he types this.
        _store_in_use(store),
        delete=delete,
        quarantine=quarantine,
        forget=forget or (),
        forget_gone=forget_gone,
        grace_days=grace,
    )
    show_lines(outcome, lines(outcome.facts), as_json)


@app.command(rich_help_panel=STORE)
def push(as_json: Json = False) -> None:
    """Send what the manifests name to the remote: objects first, then who names them.

    Example: teachonce push
    """
    from pipeline.commands.transfer import push as run

    here = workspace()
    remote = here.needed_remote()
    show(run(here.manifests(), store=here.store, remote=remote), as_json)


@app.command(rich_help_panel=STORE)
def pull(as_json: Json = False) -> None:
    """Bring what the manifests name from the remote into the store; each object is checked.

    Example: teachonce pull
    """
    from pipeline.commands.transfer import pull as run

    here = workspace()
    remote = here.needed_remote()
    show(run(here.manifests(), store=here.store, remote=remote), as_json)


@app.command("import", rich_help_panel=STORE)
def import_(
    vectors: Annotated[Path, typer.Argument(help="A .npy file of shape (texts, dim).")],
    texts: Annotated[Path, typer.Argument(help="Their texts in the same order, as for `shard`.")],
    as_json: Json = False,
) -> None:
    """Take vectors you have already instead of a teacher's: embed.teacher: imported:NAME.

    Example: teachonce import vectors.npy texts.jsonl
    """
    from pipeline.commands.import_vectors import run

    show(run(workspace(), vectors, texts), as_json)


@app.command(rich_help_panel=STORE)
def join(
    manifests: Annotated[
        list[Path], typer.Argument(help="Of embeddings of this corpus, two or more.")
    ],
    as_json: Json = False,
) -> None:
    """Make one teacher of several: their vectors side by side. embed.teacher: imported:NAME.

    Example: teachonce join small/embeddings.json large/embeddings.json
    """
    from pipeline.commands.import_vectors import join as run

    show(run(workspace(), manifests), as_json)


@app.command(rich_help_panel=NEW)
def init(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")], as_json: Json = False
) -> None:
    """Make a folder in which `dvc init && dvc repro` works: settings, stages, a short README.

    Example: teachonce init my-project
    """
    from pipeline.commands.init import run

    show(run(folder.resolve()), as_json)


def workspace() -> Workspace:
    """The folder the command was typed in."""
    from pipeline.workspace import Workspace

    return Workspace(Path.cwd())


def _lines_of_stdin() -> Iterator[str]:
    """Yield each line of stdin that is not empty, as soon as it arrives."""
    for line in sys.stdin.buffer:
        if text := line.decode(errors="replace").strip():
            yield text


def _store_in_use(store: Path | None) -> Path:
    """The root of a store, or of that of params.yaml; renews the refs of the manifests here."""
    from pipeline.layout import Layout
    from pipeline.workspace import renew
    from storage.store import Store

    opened = workspace().store if store is None else Store(store.resolve())
    renew(Layout(Path.cwd()), opened)
    return opened.root


def _share(text: str) -> ShardSlice:
    """The share that I/N means."""
    from storage.corpus import ShardSlice

    numbers = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if numbers is None or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise typer.BadParameter(
            f"{shown(text)}: I/N is wanted, with I from 1 to N, such as 1/8", param_hint="--shards"
        )
    return ShardSlice(int(numbers[1]), int(numbers[2]))


def main() -> None:
    """Entry point: run a command; a person's mistake ends in two lines, not in a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that this terminal's locale has not, or a name that is no UTF-8, ends no command.
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogLine("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    log.setLevel(logging.INFO)
    # Other people's deprecations are for developers; the tests turn them into errors.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Threads that wait for each other sleep: waiting in a loop, they take the cores of whatever else runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for number in SIGNALS:
        signal.signal(number, _leave)
    try:
        app()
    except TeachonceError as error:
        # A stdout that could not be written to takes no object either.
        if "--json" in sys.argv and error.where != "stdout":
            say(json.dumps(as_json_object(error)))
        say(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code not in {code for _, code in SIGNALS.values()}:
            raise
        # What had to be cleaned up is; taking torch down in good order takes seconds more.
        sys.stdout.flush()
        os._exit(int(end.code))


def _leave(signum: int, frame: Any) -> NoReturn:  # noqa: ANN401 - a frame object
    """Leave on Ctrl-C and on SIGTERM alike; scratch files are removed on the way out."""
    word, code = SIGNALS[signal.Signals(signum)]
    at_last = threading.Timer(PATIENCE, os._exit, [code])
    at_last.daemon = True
    at_last.start()
    again = "dvc repro" if "DVC_STAGE" in os.environ else shlex.join(["teachonce", *sys.argv[1:]])
    say(f"{word}: what is finished is kept; `{again}` goes on from there", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
