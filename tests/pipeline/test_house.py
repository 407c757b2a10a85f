"""Pairs of files that must agree, and the commands as a person sees them."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import typer
import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.layout import Layout
from pipeline.settings import load_params
from stages import check, docs, embed, mine, shard, split
from stages.learning.objectives import Objectives
from stages.params import ChooseParams, Objective, Params, RecipeParams
from storage import errors
from tests.conftest import embed_params, shipped_settings

ROOT = Path(__file__).parents[2]
ROOMS = ("pipeline", "stages", "storage", "teachonce")
COMMANDS = [
    "check",
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
    "plan",
    "search",
    "verify",
    "repair",
    "ls",
    "diff",
    "gc",
    "push",
    "pull",
    "import",
    "join",
    "init",
]


@pytest.fixture(scope="module")
def stages():
    """dvc.yaml with the templates flattened: name -> stage."""
    found = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    return {name: stage.get("do", stage) for name, stage in found.items()}


def paths(entries):
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


def params_of(stage):
    """Setting names of a stage, and its keys in data/sources.json and data/versions.yaml."""
    own, outside = [], {}
    for entry in stage.get("params", []):
        if isinstance(entry, dict):
            outside |= entry
        else:
            own.append(entry)
    return own, outside


def test_each_stage_of_dvc_says_what_it_does_and_runs_one_command(stages):
    for name, stage in stages.items():
        assert stage["desc"], name
        assert re.fullmatch(
            r"teachonce \w+( (teacher|\$\{key\}|\$\{item\}(-finetuned)?))?", stage["cmd"]
        ), name
        assert stage["cmd"].split()[1] in COMMANDS


def test_dvc_and_the_layout_name_the_same_files(stages):
    at = Layout(Path())
    expected = {
        "check": [at.sources, at.versions],
        "docs": [at.raw, at.stage_facts("docs")],
        "shard": [at.corpus, at.readings, at.stage_facts("shard")],
        "split": [at.split, at.stage_facts("split")],
        "embed": [at.embeddings, at.mixes, at.stage_facts("embed")],
        "start": [at.start("${key}"), at.start_facts("${key}")],
        "mine": [at.negatives, at.stage_facts("mine")],
        "neighbours": [at.neighbours],
        "distill": [at.model("${key}"), at.training("${key}"), at.curve("${key}")],
        "finetune": [
            at.model("${item}-finetuned"),
            at.training("${item}-finetuned"),
            at.curve("${item}-finetuned"),
        ],
        "evaluate_teacher": [at.documents, at.details("teacher"), at.metrics("teacher")],
        "evaluate_start": [at.details("${key}"), at.metrics("${key}")],
        "evaluate": [at.details("${key}"), at.metrics("${key}")],
        "evaluate_finetuned": [at.details("${item}-finetuned"), at.metrics("${item}-finetuned")],
        "export": [at.export, at.formats("${export.model}")],
        "export_also": [at.exported("${item}"), at.formats("${item}")],
        "report": [at.report, at.page],
    }
    for name, stage in stages.items():
        made = [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]
        assert paths(made) == [str(path) for path in expected[name]], name


def test_dvc_names_the_settings_of_each_recipe_and_no_others(stages):
    """A setting that changes the result must re-run the stage; one that only sets the speed must not."""
    params = load_params(ROOT / "params.yaml")
    # Of last bits as of speed: `reuse` re-runs nothing. Whom to finetune is the loop over the stage itself.
    # `similarity` is a word that check asks for; all compare by cosine.
    speed_only = {
        "embed": {"batch_tokens", "reuse", "similarity", "api"},
        "mine": {"memory_mb", "most_hours"},
        "finetune": {"students", "evaluate.sts", "evaluate.retrieval"},
    }
    for section in ("embed", "mine", "finetune"):
        model = getattr(params, section)
        named = {key.removeprefix(f"{section}.") for key in params_of(stages[section])[0]}
        # Of a teacher behind an API; the tokenizer is hashed in data/sources.json.
        named -= {"api.dimensions", "api.input_type"}
        assert named - speed_only[section] == set(type(model).model_fields) - speed_only[section]
        assert not named & {"batch_tokens", "reuse", "memory_mb", "most_hours", "students"}
    for name, stage in stages.items():
        if name.startswith("evaluate"):
            assert "evaluate" in params_of(stage)[0], name
        if name == "start":
            assert "starts.${key}" in params_of(stage)[0]
    # Settings that a recipe leaves out (the field of a source) stand in data/sources.json.
    for name, recipe in [
        ("docs", docs.recipe(params.docs)),
        ("shard", shard.recipe(params.shard)),
        ("split", split.recipe(params.split)),
        ("mine", mine.recipe(params.mine)),
        ("embed", embed.recipe(embed_params(), {})),
    ]:
        settings = set(recipe) - {"version", "teacher"}
        # Of the role `text`; caches older than the other roles have it under this name.
        settings -= {"prompt"} if name == "embed" else set()
        assert settings <= set(type(getattr(params, name)).model_fields), name


def test_each_stage_names_its_version(stages):
    for name, stage in stages.items():
        if name == "check":
            continue
        _, outside = params_of(stage)
        version = next((one for one in ("evaluate", "export") if name.startswith(one)), name)
        # An export measures formats as `evaluate` would.
        also = ["evaluate"] if version == "export" else []
        assert outside["data/versions.yaml"] == [version, *also], name
        assert check.version_of(version) >= 1


def test_every_objective_of_the_settings_is_implemented():
    union = get_args(get_args(Objective)[0])
    names = {get_args(kind.model_fields["name"].annotation)[0] for kind in union}
    recipes = load_params(ROOT / "params.yaml").recipes.values()
    shipped = {objective.name for recipe in recipes for objective in recipe.objectives}
    assert names == shipped
    assert names <= set(load_params(ROOT / "params.yaml").recipes)
    for recipe in recipes:
        assert len(Objectives(recipe.objectives, dim=8).names) == len(recipe.objectives)


def test_the_readme_shows_the_tree_as_it_is():
    """Each folder has its line, and no line is about a folder that is gone."""
    tree = (ROOT / "README.md").read_text().rpartition("```text\npipeline/")[2].partition("```")[0]
    shown, inside = {"pipeline"}, "pipeline"
    for indent, name in re.findall(r"^( *)(\w+)/ ", tree, re.MULTILINE):
        inside = inside if indent else name
        shown.add(f"{inside}/{name}" if indent else name)
    rooms = {
        str(init.parent.relative_to(ROOT))
        for top in ROOMS
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert shown == rooms | {"docs", "tests", "benchmarks"}


def test_each_room_says_what_lives_there():
    for top in ROOMS:
        for init in (ROOT / top).rglob("__init__.py"):
            assert init.read_text().startswith('"""'), init


def test_each_class_has_a_name_of_its_own():
    places = {}
    for top in ("pipeline", "stages", "storage", "teachonce"):
        for path in sorted((ROOT / top).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_what_is_long_says_why():
    """A file of more than 350 lines, or a function of more than 60 beside its docstring."""
    silent = []
    for top in ("pipeline", "stages", "storage", "teachonce"):
        for path in (ROOT / top).rglob("*.py"):
            tree = ast.parse(path.read_text())
            for node in (tree, *ast.walk(tree)):
                if isinstance(node, ast.Module):
                    length, most = len(path.read_text().splitlines()), 350
                elif isinstance(node, ast.FunctionDef):
                    first = node.body[0]
                    told = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
                    length, most = node.end_lineno - node.lineno + 1 - told, 60
                else:
                    continue
                if length > most and "long because" not in (ast.get_docstring(node) or ""):
                    silent.append((str(path.relative_to(ROOT)), getattr(node, "name", ""), length))
    assert silent == []


def test_help_lists_the_commands_in_the_order_of_the_pipeline():
    result = CliRunner().invoke(app, ["--help"])
    found = [word for word in re.findall(r"│ (\w+) ", result.output) if word in COMMANDS]
    assert found == COMMANDS
    for command in COMMANDS:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def paragraphs(command):
    """The help of a command by what a paragraph begins with; the first begins with nothing."""
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", command.help)]
    return {key: part for part in parts for key in [part.partition(":")[0]]}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_each_argument_and_has_an_example_that_works(name):
    group = typer.main.get_command(app)
    command = group.commands[name]
    for parameter in [*group.params, *command.params]:
        assert parameter.help, f"{name}: {parameter.name}"
    program, *words = shlex.split(paragraphs(command)["Example"].removeprefix("Example: "))
    assert (program, words[0]) == ("teachonce", name)
    command.make_context(name, words[1:])  # raises for what it does not know
    # Lines of a paragraph are shown as they stand, so they have to fit into a terminal of 80 columns.
    for part in command.help.split("\n\n")[1:]:
        lines = part.strip().splitlines()
        assert len(lines) == 1 or max(map(len, lines)) <= 78, f"{name}: {part}"


def test_help_of_each_stage_says_what_dvc_says_that_it_reads_and_leaves(stages):
    commands = typer.main.get_command(app).commands
    for stage in stages.values():
        name, *model = stage["cmd"].split()[1:]
        said = paragraphs(commands[name])
        made = [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]
        for told, files in (("Reads", stage.get("deps", [])), ("Leaves", made)):
            for path in paths(files):
                words = {"${item}-finetuned": "NAME-finetuned", "${item.start}": "START"}
                words |= {"${key}": "NAME", "${item}": "NAME", "${export.model}": "NAME"}
                if name == "evaluate":
                    words = dict.fromkeys([*model, *words], "MODEL")
                for old, new in words.items():
                    path = path.replace(old, new)
                path = path.replace("data/neighbours/${item.recipe}.json", "data/neighbours")
                if name == "export" and path.startswith("reports/metrics/"):
                    path = "reports/metrics"
                assert re.search(rf"{re.escape(path)}(?![\w/-])", said[told]), (
                    f"{name} {told} {path}"
                )


def test_the_tree_of_errors_is_whole():
    bases = {"TeachonceError": "Exception"}
    for path in [path for top in ROOMS for path in (ROOT / top).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                bases[node.name] = ast.unparse(node.bases[0])
    told, above = {}, ["Exception"]
    for indent, name in re.findall(r"^( *)- (\w+)", errors.__doc__, re.MULTILINE):
        del above[1 + len(indent) // 2 :]
        told[name] = above[-1]
        above.append(name)
    assert told == bases
    codes = dict(re.findall(r"- (\w+): .*exit code (\d)$", errors.__doc__, re.MULTILINE))
    for name in vars(errors).keys() & bases:
        assert getattr(errors, name).exit_code == int(codes.get(name, 1)), name


def test_help_waits_for_nothing_heavy():
    code = "import sys, pipeline.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"pipeline", "typer"} <= set(run.stdout.split())
    heavy = {"torch", "transformers", "datasets", "numpy", "pyarrow", "pydantic", "yaml", "faiss"}
    assert not heavy & set(run.stdout.split())


def test_opening_lists_imports_no_torch():
    """The Python API says so of all that reads the store: here is what neighbours are opened by."""
    code = (
        "import sys; from types import SimpleNamespace as Of; import stages.mine; "
        "from storage.negatives import parent_of; "
        "parent_of(Of(content='a'), Of(content='b')); print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "stages.mine" in run.stdout.split()
    assert not {"torch", "faiss", "transformers"} & set(run.stdout.split())


def teachonce(folder, *words):
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *words], cwd=folder, capture_output=True, text=True
    )


def test_a_persons_mistake_ends_without_a_traceback(tmp_path):
    run = teachonce(tmp_path, "embed")
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr == (
        f"error: {tmp_path / 'params.yaml'}: not there\n"
        "  cure: run this in a folder that has a params.yaml\n"
    )
    assert teachonce(tmp_path, "embedd").returncode == 2


def test_a_stage_before_its_input_names_the_command_to_run(tmp_path):
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    run = teachonce(tmp_path, "split")
    assert run.returncode == 3
    assert run.stderr.endswith("data/corpus.json: not there\n  cure: run `teachonce shard`\n")
    run = teachonce(tmp_path, "distill", "kdd")
    assert run.returncode == 1
    assert "students.kdd: not in params.yaml" in run.stderr
    for name, said in (("../kd", "no name of a model"), ("half", "the name is taken")):
        run = teachonce(tmp_path, "distill", name, "--recipe", "kd", "--start", "half")
        assert (run.returncode, run.stderr.startswith(f"error: {name}: {said}")) == (1, True)
    run = teachonce(tmp_path, "evaluate", "kd")
    assert run.returncode == 3
    assert "no such model\n  cure: run `teachonce distill kd`" in run.stderr


def test_results_can_be_had_as_json(tmp_path):
    content = shipped_settings()
    content |= {"store": "store"}
    content["docs"]["packages"] = []
    content["shard"]["sources"] = ["a.txt"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "a.txt").write_text("This is a text.\nAnother text is here.\n\n")
    run = teachonce(tmp_path, "shard", "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["made"] == "data/corpus.json"
    assert (found["facts"]["read"], found["facts"]["kept"]) == (3, 2)


def test_every_setting_has_one_place():
    """No default hides in code: what params.yaml lacks is an error, not a guess."""
    for section in (Params, RecipeParams, *Params.__base__.__subclasses__()):
        for name, field in section.model_fields.items():
            # A key of entries that users write, which came later: their entries still load.
            optional = (section.__name__, name) in {
                *(
                    ("StartParams", name)
                    for name in (
                        *("pooling", "passes", "kind", "vocabulary"),
                        *("hidden", "intermediate", "heads", "like", "seed", "embedding"),
                    )
                ),
                *(("RecipeParams", name) for name in ("pretrain", "prompts", "readings")),
                *(("ChooseParams", name) for name in ChooseParams.model_fields),
                ("SourceParams", "field"),
            }
            assert field.is_required() != optional, f"{section.__name__}.{name} has a default"
