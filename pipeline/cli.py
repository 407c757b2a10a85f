"""The commands: the pipeline in its order, then what looks after the store.

Each reads settings, opens inputs, runs a stage, prints.

There are no flags for settings: params.yaml holds them all, and `dvc exp run -S embed.max_tokens=64`
changes one and records it. Heavy imports stand inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from storage.errors import TeachonceError, shown

if TYPE_CHECKING:
    from pipeline.workspace import Workspace
    from stages.outcome import Outcome

app = typer.Typer(
    name="teachonce",
    help="Run the teacher once. Train students from its memory for as long as you like.\n\n"
    "Run these in a folder that has a params.yaml, in this order, or `dvc repro` for all of them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
NEXT = {
    "check": "`dvc repro` for everything, or `teachonce shard`",
    "docs": "`teachonce shard`",
    "shard": "`teachonce split`",
    "split": "`teachonce embed`, where the teacher is",
    "embed": "`teachonce mine`; `teachonce start NAME`",
    "start": "`teachonce distill NAME`",
    "mine": "`teachonce distill NAME`",
    "distill": "`teachonce evaluate NAME`; `teachonce finetune NAME`",
    "finetune": "`teachonce evaluate NAME-finetuned`",
    "evaluate": "`teachonce report` when all models are measured",
    "export": '`teachonce search "what you look for"`',
    "push": "`git add -A && git commit && git push`: bytes before names",
    "pull": "`dvc repro --pull --allow-missing`",
    "init": "go there, `git init && dvc init`, edit params.yaml, `teachonce check`, `dvc repro`",
}
"""What a person who runs the stages by hand types after each."""

INTERRUPTED = 130
TERMINATED = 143


@app.command()
def check(as_json: Json = False) -> None:
    """Check settings, sources and models; list all that is wrong. A second."""
    from pipeline.layout import Layout
    from pipeline.settings import examine
    from stages.check import run

    at = Layout(Path.cwd())
    _, problems, sections = examine(at.params)
    show(
        run(
            problems,
            sections,
            root=at.root,
            raw=at.raw,
            memory=at.hashes,
            out=at.sources,
            versions=at.versions,
        ),
        as_json,
    )


@app.command()
def docs(as_json: Json = False) -> None:
    """Write the demo's texts: the documentation of installed packages."""
    from stages.docs import run

    here = workspace()
    show(run(here.params.docs, out=here.at.raw, facts=here.at.stage_facts("docs")), as_json)


@app.command()
def shard(as_json: Json = False) -> None:
    """Clean the corpus and cut it into text shards."""
    from stages.shard import run

    here = workspace()
    show(
        run(
            here.params.shard,
            root=here.at.root,
            store=here.store,
            out=here.at.corpus,
            facts=here.at.stage_facts("shard"),
        ),
        as_json,
    )


@app.command()
def split(as_json: Json = False) -> None:
    """Hold rows out, and find those that stand in evaluation sets."""
    from stages.split import run

    here = workspace()
    show(
        run(
            here.params.split,
            corpus=here.corpus(),
            evaluation=here.evaluation_texts(),
            out=here.at.split,
            facts=here.at.stage_facts("split"),
        ),
        as_json,
    )


@app.command()
def embed(as_json: Json = False) -> None:
    """Run the teacher over the shards that the store lacks. Safe to interrupt."""
    from stages.embed import run

    here = workspace()
    files, load_teacher = here.teacher()
    show(
        run(
            here.params.embed,
            files=files,
            corpus=here.corpus(),
            store=here.store,
            remote=here.remote(),
            load_teacher=load_teacher,
            out=here.at.embeddings,
            facts=here.at.stage_facts("embed"),
        ),
        as_json,
    )


@app.command()
def start(name: str, as_json: Json = False) -> None:
    """Make a student before training: NAME of params.yaml's `starts`."""
    from stages.start import run

    here = workspace()
    params = here.named("starts", name)
    show(
        run(
            params,
            name=name,
            folder=here.start_source(name),
            trust_remote_code=here.params.embed.trust_remote_code,
            out=here.at.start(name),
        ),
        as_json,
    )


@app.command()
def mine(as_json: Json = False) -> None:
    """Find each row's hard negatives among the teacher's vectors."""
    from stages.mine import run

    here = workspace()
    show(
        run(
            here.params.mine,
            corpus=here.corpus(),
            embeddings=here.embeddings(),
            split=here.split(),
            store=here.store,
            out=here.at.negatives,
            facts=here.at.stage_facts("mine"),
        ),
        as_json,
    )


@app.command()
def distill(
    name: str,
    recipe: Annotated[str | None, typer.Option(help="A name of `recipes`.")] = None,
    start: Annotated[str | None, typer.Option(help="A name of `starts`.")] = None,
    as_json: Json = False,
) -> None:
    """Train the student NAME from the caches. Safe to interrupt.

    Its recipe and start stand in params.yaml's `students`; for any other name, give both.
    """
    from stages.distill import needs_negatives, run
    from stages.learning.encoder import pick_device

    here = workspace()
    params, start_name = here.student(name, recipe, start)
    show(
        run(
            params,
            name=name,
            start=here.model_folder(start_name),
            caches=here.caches(with_negatives=needs_negatives(params)),
            device=pick_device(here.params.device),
            work=here.at.work,
            out=here.at.model(name),
            curve=here.at.curve(name),
            training=here.at.training(name),
        ),
        as_json,
    )


@app.command()
def finetune(name: str, as_json: Json = False) -> None:
    """Train the student NAME on labelled pairs or triplets. Safe to interrupt.

    What comes of it is NAME-finetuned.
    """
    from stages.benchmarks import evaluation_keys
    from stages.finetune import run
    from stages.learning.encoder import pick_device
    from stages.params import FINETUNED

    here = workspace()
    params, finetuned = here.params.finetune, f"{name}{FINETUNED}"
    show(
        run(
            params,
            name=finetuned,
            student=here.model_folder(name),
            root=here.at.root,
            evaluation={key for text in here.evaluation_texts() for key in evaluation_keys(text)},
            caches=here.caches(with_negatives=False) if params.distill_weight else None,
            device=pick_device(here.params.device),
            work=here.at.work,
            out=here.at.model(finetuned),
            curve=here.at.curve(finetuned),
            training=here.at.training(finetuned),
        ),
        as_json,
    )


@app.command()
def evaluate(
    model: str,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--mteb", help="A task of mteb instead of our sets; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure MODEL: `teacher`, a start, a student, or any folder under models/."""
    here = workspace()
    if tasks:
        from stages.mteb_tasks import run as run_mteb

        show(
            run_mteb(
                tasks,
                name=model,
                folder=here.model_folder(model),
                load_encoder=lambda: here.encoder(model),
                out=here.at.mteb(model),
            ),
            as_json,
        )
        return
    from stages.evaluate import run

    show(
        run(
            here.params.evaluate,
            name=model,
            encoder=here.encoder(model),
            corpus=here.corpus(),
            embeddings=here.embeddings(),
            split=here.split(),
            root=here.at.root,
            out=here.at.metrics(model),
            details=here.at.details(model),
        ),
        as_json,
    )


@app.command()
def export(as_json: Json = False) -> None:
    """Write the model that `export.model` names for anyone who has sentence-transformers."""
    from stages.export import run
    from stages.params import TEACHER

    here = workspace()
    name = here.params.export.model
    show(
        run(
            here.params.export,
            folder=here.model_folder(name),
            lineage=here.lineage(name),
            metrics={model: here.metrics(model) for model in (TEACHER, name)},
            facts=here.facts(),
            out=here.at.export,
        ),
        as_json,
    )


@app.command()
def report(
    models: Annotated[list[str] | None, typer.Argument(help="Further models, by name.")] = None,
    as_json: Json = False,
) -> None:
    """Gather the metrics of the models that params.yaml names: a table here, and a page to open."""
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
        facts={**here.facts(), "teacher's fingerprint": here.teacher_fingerprint()},
        out=here.at.report,
        page=here.at.page,
    )
    if as_json:
        show(outcome, as_json)
        return
    from rich.console import Console

    # The sentence of the outcome stands below the table already.
    console = Console()
    console.print(table(outcome.facts, students=students, width=console.width))
    typer.echo(f"  -> {_place(outcome.made)}")


@app.command()
def search(
    query: str,
    model: Annotated[
        str | None, typer.Option(help="A student; without it, the exported model.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many texts.")] = 5,
    as_json: Json = False,
) -> None:
    """Search the corpus: a student reads QUERY and looks among the teacher's cached vectors."""
    from stages.params import TEACHER
    from stages.search import run

    here = workspace()
    folder = here.exported() if model is None else here.model_folder(model)
    outcome = run(
        query,
        model=folder,
        encoder=here.load_encoder(folder, is_teacher=model == TEACHER),
        corpus=here.corpus(),
        embeddings=here.embeddings(),
        count=count,
    )
    if as_json:
        show(outcome, as_json)
        return
    for hit in outcome.facts["hits"]:
        typer.echo(f"{hit['cosine']:.3f}  {shown(hit['text'])}")


@app.command()
def verify(
    read_data: Annotated[
        bool, typer.Option("--read-data", help="Read every value and compare its sha256.")
    ] = False,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Read so many objects, chosen at random.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the choice, to make it again.")] = None,
    as_json: Json = False,
) -> None:
    """Check that the store has what the manifests here name, whole. Without options, headers only."""
    from pipeline.verify import check_sound, lines, run

    if seed is not None and sample is None:
        raise typer.BadParameter("--seed chooses nothing without --sample")
    outcome = run(workspace(), read_data=read_data, sample=sample, seed=seed)
    show_lines(outcome, lines(outcome.facts), as_json)
    check_sound(outcome)


@app.command()
def repair(as_json: Json = False) -> None:
    """Move what is damaged into quarantine; make exactly that, and what is missing, again."""
    from pipeline.repair import run

    show(run(workspace()), as_json)


@app.command()
def ls(as_json: Json = False) -> None:
    """List what is in the store, for which teacher, how large, and whose manifests need it."""
    from pipeline.ls import lines, run

    outcome = run(workspace().store.root)
    show_lines(outcome, lines(outcome.facts), as_json)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="A manifest, such as data/embeddings.json.")],
    b: Annotated[Path, typer.Argument(help="Another of the same kind.")],
    as_json: Json = False,
) -> None:
    """Say in which settings and shards two manifests differ; exit code 1 if they do."""
    from pipeline.diff import lines, run

    outcome = run(a, b)
    show_lines(outcome, lines(outcome.facts), as_json)
    if not outcome.facts["equal"]:
        raise typer.Exit(1)


@app.command()
def gc(
    delete: Annotated[
        bool, typer.Option("--delete", help="Do it; without, only say what would go.")
    ] = False,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Also what `repair` moved away.")
    ] = False,
    forget: Annotated[
        list[str] | None,
        typer.Option(metavar="REF", help="Remove a ref first; may be repeated."),
    ] = None,
    grace: Annotated[
        float, typer.Option(min=0, metavar="DAYS", help="Spare a folder that changed since.")
    ] = 1.0,
    as_json: Json = False,
) -> None:
    """Delete objects that no ref in the store names. A dry run, unless told to."""
    from pipeline.gc import lines, run

    outcome = run(
        workspace().store.root,
        delete=delete,
        quarantine=quarantine,
        forget=forget or (),
        grace_days=grace,
    )
    show_lines(outcome, lines(outcome.facts), as_json)


@app.command()
def push(as_json: Json = False) -> None:
    """Send what the manifests name to the remote: objects first, then who names them."""
    from stages.transfer import push as run

    here = workspace()
    remote = here.needed_remote()
    show(run(here.manifests(), store=here.store, remote=remote), as_json)


@app.command()
def pull(as_json: Json = False) -> None:
    """Bring what the manifests name from the remote into the store; each object is checked."""
    from stages.transfer import pull as run

    here = workspace()
    remote = here.needed_remote()
    show(run(here.manifests(), store=here.store, remote=remote), as_json)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")], as_json: Json = False
) -> None:
    """Make a folder in which `dvc init && dvc repro` works: settings, stages, a short README."""
    from pipeline.init import run

    show(run(folder.resolve()), as_json)


def workspace() -> Workspace:
    """The folder the command was typed in."""
    from pipeline.workspace import Workspace

    return Workspace(Path.cwd())


def show(outcome: Outcome, as_json: bool) -> None:
    """Print what a stage did, where it is and what comes next, or all of it as JSON for a program."""
    place = _place(outcome.made)
    if as_json:
        typer.echo(json.dumps({**asdict(outcome), "made": str(place)}, default=str))
        return
    typer.echo(f"{outcome.stage}: {outcome.summary}\n  -> {place}")
    # Under DVC it is DVC who knows what comes next.
    if outcome.stage in NEXT and "DVC_STAGE" not in os.environ:
        typer.echo(f"  next: {NEXT[outcome.stage]}")


def show_lines(outcome: Outcome, lines: Iterable[str], as_json: bool) -> None:
    """Print a listing and the sentence that sums it up, or all of it as JSON for a program."""
    if as_json:
        show(outcome, as_json)
        return
    for line in lines:
        typer.echo(line)
    typer.echo(f"{outcome.stage}: {outcome.summary}")


def _place(made: Path | str) -> Path | str:
    """A path as short as it can be said from here; a URL as it is."""
    if isinstance(made, str):
        return made
    return made.relative_to(Path.cwd()) if made.is_relative_to(Path.cwd()) else made


def main() -> None:
    """Entry point: run a command; a person's mistake ends in two lines, not in a traceback."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    logging.getLogger("teachonce").setLevel(logging.INFO)
    # Other people's deprecations are for developers; the tests turn them into errors.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except TeachonceError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted: what is finished is kept; run the same command to go on", err=True)
        sys.exit(INTERRUPTED)


def _terminated(signum: int, frame: Any) -> NoReturn:  # noqa: ANN401 - a frame object
    """Leave on SIGTERM as on Ctrl-C, so that scratch files are removed on the way out."""
    typer.echo("terminated: what is finished is kept; run the same command to go on", err=True)
    sys.exit(TERMINATED)


if __name__ == "__main__":
    main()
