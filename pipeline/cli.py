"""The commands, in the order of the pipeline. Each reads settings, opens inputs, runs a stage, prints.

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
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from storage.errors import TeachonceError

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
    from stages.distill import run
    from stages.learning.encoder import pick_device

    here = workspace()
    params, start_name = here.student(name, recipe, start)
    show(
        run(
            params,
            name=name,
            start=here.model_folder(start_name),
            caches=here.caches(params),
            device=pick_device(here.params.device),
            work=here.at.work,
            out=here.at.model(name),
            curve=here.at.curve(name),
            training=here.at.training(name),
        ),
        as_json,
    )


@app.command()
def evaluate(model: str, as_json: Json = False) -> None:
    """Measure MODEL: `teacher`, a start, a student, or any folder under models/."""
    from stages.evaluate import run

    here = workspace()
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
        ),
        as_json,
    )


@app.command()
def report(
    models: Annotated[list[str] | None, typer.Argument(help="Further models, by name.")] = None,
    as_json: Json = False,
) -> None:
    """Gather the metrics of the models that params.yaml names, and print them as a table."""
    from stages.report import run, table

    here = workspace()
    params = here.params
    students = [*params.students, *(models or [])]
    outcome = run(
        ["teacher", *params.starts, *students],
        students=students,
        metrics=here.at.metrics,
        out=here.at.report,
    )
    if not as_json:
        from rich.console import Console

        console = Console()
        console.print(table(outcome.facts, students=students, width=console.width))
    show(outcome, as_json)


def workspace() -> Workspace:
    """The folder the command was typed in."""
    from pipeline.workspace import Workspace

    return Workspace(Path.cwd())


def show(outcome: Outcome, as_json: bool) -> None:
    """Print what a stage did: a sentence for a person or JSON for a program."""
    made = outcome.made
    place = made.relative_to(Path.cwd()) if made.is_relative_to(Path.cwd()) else made
    if as_json:
        typer.echo(json.dumps({**asdict(outcome), "made": str(place)}, default=str))
        return
    typer.echo(f"{outcome.stage}: {outcome.summary}\n  -> {place}")


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
