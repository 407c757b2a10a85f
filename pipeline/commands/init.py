"""`teachonce init`: a folder in which `dvc init && dvc repro` works, for people who installed the package.

Its params.yaml and dvc.yaml are those of the repository itself. They depend on no source file: a stage
runs again when its settings or its VERSION change, not when a comment in the code does.
"""

from __future__ import annotations

from pathlib import Path

from stages.outcome import Outcome
from storage import durable
from storage.errors import MissingError, TeachonceError

HERE = Path(__file__).parents[1]  # pipeline/

# Manifests, metrics and curves are committed: they are what lets a clone skip the teacher pass.
# A killed writer leaves its scratch file (`.name.….tmp`) beside what it was writing. DVC ignores its
# outputs itself, but takes that back when a stage after them fails: `git add -A` would commit weights.
GITIGNORE = "/work/\n.venv/\n.*.tmp\n/data/raw\n/data/documents\n/models\n/export\n/exports\n"
DVCIGNORE = "work/\n.venv/\n__pycache__/\n"
README = """\
# A teachonce project

1. `params.yaml` has every setting. The shipped ones are a demo (extra `demo`): put your files into
   `shard.sources`, your model into `embed.teacher`, and set `docs.packages: []`.
2. `teachonce check` lists all that is wrong. `git init && dvc init` once, then `dvc repro`.
3. `reports/index.html` says what each student keeps of its teacher; `export/` is the one to serve.
4. Commit `params.yaml`, `dvc.yaml`, `dvc.lock`, `data/*.json`, `data/neighbours/`, `data/versions.yaml`
   and `reports/`: then a clone on the same store skips what is done (`dvc repro --pull --allow-missing`).
5. One recipe changed and recorded: `dvc exp run -S recipes.kd.learning_rate=1e-4`.

`teachonce --help` lists the commands. The teacher's vectors lie in `~/.cache/teachonce` unless
`store` or `$TEACHONCE_STORE` says otherwise.
"""


def run(folder: Path) -> Outcome:
    """Write the files of a new project into `folder`, which is made if need be.

    Raises:
        TeachonceError: one of the files is there already; nothing is written then.
    """
    files = {
        "params.yaml": template("params.yaml"),
        "dvc.yaml": template("dvc.yaml"),
        ".gitignore": GITIGNORE.encode(),
        ".dvcignore": DVCIGNORE.encode(),
        "README.md": README.encode(),
    }
    existing = [name for name in files if (folder / name).exists()]
    if existing:
        raise TeachonceError(
            folder,
            f"has {', '.join(existing)} already",
            "name a new folder, or move the files away: nothing here is overwritten",
        )
    for name, content in files.items():
        durable.replace(folder / name, content)
    return Outcome(
        stage="init",
        made=folder,
        summary=f"a new project of {len(files)} files",
        facts={"files": list(files)},
    )


def template(name: str) -> bytes:
    """The repository's params.yaml or dvc.yaml: in a wheel beside this module, in a clone at its top.

    Raises:
        MissingError: the package was put together without it.
    """
    for path in (HERE / "template" / name, HERE.parent / name):
        if path.is_file():
            return path.read_bytes()
    raise MissingError(
        HERE / "template" / name, "not in this installation", "install teachonce again"
    )
