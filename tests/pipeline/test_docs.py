"""README and the pages of docs/: what they tell people to type exists, what they show is so, links lead on.

Each fenced block says what it is: `bash` and `console` are typed, `yaml` goes into params.yaml or is a
dvc.yaml, `python` is run in a project, `text` is output or a drawing.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.settings import load_params
from stages.params import Objective, Params
from tests.conftest import make_tiny_model, sentences, shipped_settings

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
# Of the shell and of other people: what these are told is theirs to know.
FOREIGN = {
    "git",
    "cd",
    "mkdir",
    "cp",
    "for",
    "do",
    "done",
    "break",
    "sbatch",
    "job=$",
    "tensorboard",
}
SHIPPED = yaml.safe_load((ROOT / "params.yaml").read_text())


def blocks(*languages):
    """(page, code) of each fenced block in one of these languages, in order."""
    return [
        pytest.param(code, id=f"{page}:{text[: found.start()].count(chr(10)) + 1}")
        for page, text in PAGES.items()
        for found in BLOCK.finditer(text)
        for language, code in [found.groups()]
        if language in languages
    ]


def prose(text):
    """A page without its blocks."""
    return BLOCK.sub("", text)


def inline():
    """(page, code) of each piece of code in a sentence or a cell."""
    return [(page, code) for page, text in PAGES.items() for code in INLINE.findall(prose(text))]


def generator():
    """docs/generate.py."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = generator()


@pytest.mark.parametrize("page", PAGES)
def test_each_block_says_what_it_is(page):
    fences = re.findall(r"^\s*```.*$", PAGES[page], re.MULTILINE)
    languages = [language for language, _ in BLOCK.findall(PAGES[page])]
    assert len(fences) == 2 * len(languages), "a block that is indented or not closed"
    assert set(languages) <= {"bash", "console", "python", "yaml", "text"}


def test_the_front_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 200


# What is typed


def typed(code):
    """The commands of a block: a list of words each."""
    lines = re.sub(r"\\\n", " ", code).splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    commands = [[]]
    for line in lines:
        words = shlex.shlex(line, posix=True, punctuation_chars="();&|")
        words.whitespace_split = True
        for word in words:
            if set(word) <= set("();&|"):
                commands.append([])
            else:
                commands[-1].append(word)
        commands.append([])
    return [command for command in commands if command]


def check_typed(words):
    program, *rest = words
    checks = {"teachonce": check_ours, "make": check_make, "dvc": check_dvc, "pip": check_pip}
    checks |= {"python": check_script, "pytest": check_pytest}
    if program == "$PROJECT":
        return
    if program in {"torchrun", "accelerate"}:
        check_ours(rest[rest.index("pipeline.cli") + 1 :])
    elif program in checks:
        checks[program](rest)
    else:
        assert program in FOREIGN, f"nobody checks {program}"
    if "--wrap" in rest:
        for command in typed(rest[rest.index("--wrap") + 1]):
            check_typed(command)


def check_ours(words, may_be_a_name=False):
    """It is a command with these arguments and options; a word that is not one ends in an error."""
    group = typer.main.get_command(app)
    known = {option for parameter in group.params for option in parameter.opts} | {"--help"}
    while words and words[0].startswith("-"):  # options before the command
        assert words[0] in known
        words = words[2:] if words[0] == "-C" else words[1:]
    if not words:
        return
    name, *rest = words
    assert name in group.commands, f"no command {name}"
    if rest or not may_be_a_name:
        group.commands[name].make_context(name, list(rest))


def check_make(words):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words) <= set(targets)


def check_dvc(words):
    for place, word in enumerate(words):
        if word == "-S":
            key, _, value = words[place + 1].partition("=")
            check_setting(key)
            assert yaml.safe_load(value) is not None
    if words[0] == "repro":
        stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
        assert {word for word in words[1:] if not word.startswith("-")} <= set(stages)


def check_pip(words):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


def check_script(words):
    source = (ROOT / words[0]).read_text()
    for word in words[1:]:
        assert not word.startswith("--") or f'"{word}"' in source, word


def check_pytest(words):
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert any(mark.startswith(words[words.index("-m") + 1]) for mark in markers["markers"])
    assert all((ROOT / word).exists() for word in words if "/" in word)


def check_setting(address):
    """It stands in params.yaml; a word in capitals stands for any name."""
    found = SHIPPED
    for part in address.split("."):
        if part.isupper():
            part = next(iter(found))
        may_be_left_out = {"pooling", "passes", "vocabulary", "hidden", "intermediate", "heads"}
        may_be_left_out |= {"like", "seed", "embedding"}
        if part in may_be_left_out and "from" in found:
            return
        assert isinstance(found, dict) and part in found, address
        found = found[part]


@pytest.mark.parametrize("code", blocks("bash", "console"))
def test_what_is_typed_exists(code):
    for command in typed(code):
        check_typed(command)


def test_commands_in_sentences_exist():
    looked = 0
    for _, code in inline():
        for command in (
            typed(code) if re.match(r"(teachonce|make|pytest|python|dvc) ", code) else []
        ):
            if len(command) > 1 and not command[1].isupper():
                if command[0] == "teachonce":
                    check_ours(command[1:], may_be_a_name=True)
                else:
                    check_typed(command)
                looked += 1
    assert looked > 20


def test_options_in_sentences_exist():
    """Of our commands, of the tests, or of a tool whose command it is."""
    commands = typer.main.get_command(app).commands.values()
    known = {word for command in commands for option in command.params for word in option.opts}
    known |= set(re.findall(r'"(--\w+)"', (ROOT / "tests/faults/conftest.py").read_text()))
    for page, code in inline():
        if code.startswith("--"):
            assert code.split()[0] in known, f"{page}: {code}"


def test_settings_in_sentences_are_settings():
    looked = 0
    for page, code in inline():
        if re.fullmatch(rf"({'|'.join(Params.model_fields)})(\.\w+)+", code):
            if code.split(".")[1] in {"VERSION", "md"}:
                continue
            check_setting(code)
            looked += 1
        elif found := re.fullmatch(r"([\w.]+): (.+)", code):
            name = found[1].split(".")[-1]
            assert f"{name}:" in (ROOT / "params.yaml").read_text(), f"{page}: {code}"
    assert looked > 30


@pytest.mark.parametrize("code", blocks("yaml"))
def test_what_goes_into_params_yaml_is_right(code, tmp_path):
    content = yaml.safe_load(code)
    if "stages" in content:  # a dvc.yaml
        for stage in content["stages"].values():
            words = stage.get("do", stage)["cmd"].replace("${key}", "kd").split()
            check_typed(words)
        return
    merged = shipped_settings()
    for name, section in content.items():
        merged[name] = merged[name] | section if isinstance(section, dict) else section
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(merged))
    load_params(tmp_path / "params.yaml")


def test_students_alone_depend_on_what_those_of_the_whole_project_do():
    """The dvc.yaml of another repository: mining anew retrains the same students as here."""
    [code] = [found.values[0] for found in blocks("yaml") if "\nstages:" in f"\n{found.values[0]}"]
    alone, whole = (
        yaml.safe_load(text)["stages"] for text in (code, (ROOT / "dvc.yaml").read_text())
    )
    assert alone["distill"]["do"]["deps"] == whole["distill"]["do"]["deps"]
    # It has no stage `docs`, so no labelled triplets but its own.
    assert [*alone["neighbours"]["deps"], "data/raw"] == whole["neighbours"]["deps"]
    assert alone.keys() == {"neighbours", "distill"}


# What is said


def test_files_named_on_the_pages_are_there():
    looked = 0
    tops = r"(pipeline|stages|storage|docs|tests|benchmarks|teachonce)"
    for page, code in inline():
        if re.fullmatch(rf"{tops}/[\w/.-]+", code):
            assert (ROOT / code).exists(), f"{page}: {code}"
            looked += 1
    assert looked > 20


def test_functions_named_on_the_pages_are_in_the_file_named_before_them():
    """`stages/x.py`, function `f`: a newcomer who looks for it finds it."""
    looked = 0
    named = re.compile(
        r"`((?:\w+/)+\w+\.py)`(?:(?!\.py`).)*?(?:function|class|method|type)s? `(\w+)`", re.DOTALL
    )
    for page, text in PAGES.items():
        for paragraph in prose(text).split("\n\n"):
            for file, name in named.findall(paragraph):
                source = (ROOT / file).read_text()
                assert re.search(rf"(def|class) {name}\b|^{name} =", source, re.M), (
                    page,
                    file,
                    name,
                )
                looked += 1
    assert looked >= 5


def test_names_of_the_code_on_the_pages_are_in_the_code():
    """Classes and constants; what other tools have stands on a page of its own."""
    source = "".join(
        path.read_text() for top in GENERATE.PACKAGES for path in (ROOT / top).rglob("*.py")
    )
    foreign = {"AWS_ENDPOINT_URL", "AutoModel", "EmbedDistillLoss"}
    known = set(re.findall(r"\w+", source)) | foreign
    looked = 0
    for page, code in inline():
        if re.fullmatch(r"[A-Z]+[a-z]+\w+|[A-Z]+_[A-Z_]+", code) and "coming-from" not in page:
            assert code in known, f"{page}: {code}"
            looked += 1
    assert looked > 10


def as_pattern(template):
    return ".*".join(map(re.escape, template.split("…")))


def test_the_errors_on_the_pages_are_those_of_the_code():
    raised = set(GENERATE.raised())
    assert len(raised) > 100
    page = PAGES["docs/troubleshooting.md"]
    shown = [code for language, code in BLOCK.findall(page) if code.startswith("error: ")]
    assert len(shown) >= 3
    for text in shown:
        assert any(
            re.fullmatch(
                f"error: .*: {as_pattern(problem)}\n  cure: {as_pattern(cure)}\n", text, re.DOTALL
            )
            for _, problem, cure in raised
        ), text
    quoted = re.findall(r'"([^"]+)"', " ".join(re.findall(r"^\*\*(.+?)\*\*", page, re.MULTILINE)))
    assert len(quoted) >= 15
    for words in quoted:
        pattern = as_pattern(" ".join(words.split()))
        assert any(re.search(pattern, f"{problem} {cure}") for _, problem, cure in raised), words


def figures(text):
    """The cells that begin with a digit, of each row of a table that has three of them or more."""
    for line in text.splitlines():
        cells = [cell.strip().replace("*", "") for cell in line.strip("|").split("|")]
        found = [cell for cell in cells if re.match(r"\d", cell)]
        if line.startswith("|") and len(found) >= 3:
            yield found


@pytest.mark.parametrize("page", ["README.md", "docs/students.md", "docs/results.md"])
def test_figures_are_those_that_the_benchmarks_printed(page):
    results = sorted((ROOT / "benchmarks/results").glob("*.md"))
    printed = [row for path in results for row in figures(path.read_text())]
    rows = list(figures(prose(PAGES[page])))
    assert len(rows) >= 5
    for row in rows:
        assert any(all(cell in " | ".join(there) for cell in row) for there in printed), row


def slug(heading):
    """The anchor that mkdocs gives a heading."""
    text = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page])):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(file.read_text()), re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_the_site_has_all_pages():
    config = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"^  - .+: (\w[\w-]*\.md)$", config, re.MULTILINE))
    assert listed == {page.removeprefix("docs/") for page in PAGES} - {"README.md"}


# What is generated


def test_generated_settings_are_all_settings_with_their_values():
    text = GENERATE.settings()
    for name, field in Params.model_fields.items():
        assert f"| `{name}` |" in text or f"\n## `{name}`\n" in text, name
        for key in getattr(field.annotation, "model_fields", {}):
            assert f"| `{key}` |" in text, (name, key)
    row = "| `rows_per_shard` | a whole number ≥ 16, ≤ 4,000,000 | `1024` |"
    assert row in text
    assert "| `neighbours` | a whole number > 0 | `16` |" in text
    assert "learning_rate: 2.0e-4" in text
    assert text.count("#### `") == len(get_args(get_args(Objective)[0]))


def test_generated_commands_are_all_commands_with_their_options():
    text = GENERATE.commands()
    for name, command in typer.main.get_command(app).commands.items():
        section = text.partition(f"### {name}\n")[2].partition("\n### ")[0]
        for parameter in command.params:
            if (
                parameter.param_type_name == "option"
                and not parameter.hidden
                and parameter.name != "help"
            ):
                assert f"`{parameter.opts[0]}`" in section, (name, parameter.name)
    assert "teachonce diff [OPTIONS] A B" in text
    examples = re.findall(r"^Example: (.+)$", text, re.MULTILINE)
    for example in examples:
        for words in typed(example):
            check_typed(words)
    assert len(examples) >= 12


def test_generated_modules_are_all_modules():
    text = GENERATE.modules()
    modules = [path for top in GENERATE.PACKAGES for path in (ROOT / top).rglob("*.py")]
    assert len(re.findall(r"^\| `", text, re.MULTILINE)) == sum(
        path.name != "__init__.py" for path in modules
    )
    assert "| `objectives.py` | " in text


@pytest.mark.parametrize(
    ("file", "link", "page"),
    [
        ("docs/store.md", "../EXPERIMENTS.md#x", "repository/EXPERIMENTS.md#x"),
        ("docs/store.md", "texts.md", "texts.md"),
        ("EXPERIMENTS.md", "docs/results.md#x", "../results.md#x"),
        ("EXPERIMENTS.md", "CHANGELOG.md", "CHANGELOG.md"),
        ("EXPERIMENTS.md", "benchmarks/results/a.md", "benchmarks/results/a.md"),
        ("benchmarks/results/a.md", "../../docs/results.md", "../../../results.md"),
        ("benchmarks/results/a.md", "b.md#x", "b.md#x"),
    ],
)
def test_a_link_to_a_file_leads_to_the_page_made_of_it(file, link, page):
    assert GENERATE.linked(f"[a]({link}), [b](https://x.org/a.md)", file) == (
        f"[a]({page}), [b](https://x.org/a.md)"
    )


def test_links_between_pages_of_the_site_lead_to_pages_of_the_site():
    """What `make docs` would warn of, without building the site."""
    files = [path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md")]
    for pattern in GENERATE.FROM_THE_CHECKOUT:
        files += [path.relative_to(ROOT) for path in ROOT.glob(pattern)]
    pages = {GENERATE._page(file.as_posix()) for file in files}
    count = 0
    for file in files:
        text = GENERATE.linked(prose((ROOT / file).read_text()), file.as_posix())
        folder = Path(GENERATE._page(file.as_posix())).parent
        for link in re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]+)?\)", text):
            assert os.path.normpath(folder / link) in pages, (file, link)
            count += 1
    assert count >= 40


@pytest.mark.slow
def test_the_site_loads_nothing_from_the_web(tmp_path):
    """`make docs` has no warning, and its pages are read, and searched, as files."""
    pytest.importorskip("mkdocs", reason="`make docs` installs it")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    ended = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        text = page.read_text()
        assert not re.search(r"<(script|img|iframe|source)[^>]* src=.?(https?:)?//", text), page
        assert not re.search(r"<link[^>]* href=.?(https?:)?//", text), page
        assert "iframe-worker.js" in text
        assert str(ROOT) not in text
    index = (tmp_path / "site/search/search_index.js").read_text()
    assert "DamagedError" in index
    assert "rows_per_shard" in index


# What runs


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A home with a small project, in which the commands of the first page have been typed."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "project"
    make_tiny_model(folder / "models/my-teacher")
    (folder / "texts").mkdir()
    lines = "".join(f'{{"text": "{text}"}}\n' for text in sentences(400))
    (folder / "texts/a.jsonl").write_text(lines)
    [own] = re.findall(
        r"project changes in `params.yaml`:\n\n```yaml\n(.*?)^```",
        PAGES["docs/index.md"],
        re.M | re.S,
    )
    settings = shipped_settings()
    for name, section in yaml.safe_load(own).items():
        settings[name] = settings[name] | section
    settings["starts"] = {"half": {"from": "teacher", "layers": [0, 2]}}
    settings["shard"] |= {"rows_per_shard": 64}
    settings["mine"] |= {"max_score": 1.0}
    (folder / "params.yaml").write_text(yaml.safe_dump(settings))
    commands = [
        words
        for param in blocks("bash")
        if param.id.startswith("docs/index.md")
        for words in typed(param.values[0])
        if words[0] == "teachonce" and words[1] != "init"
        # A small project finetunes no student.
        if not {"finetune", "kd-finetuned"} & set(words)
    ]
    assert ["teachonce", "distill", "kd"] in commands
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        try:
            for _, *words in commands:
                ended = CliRunner().invoke(app, ["-C", str(folder), *words])
                assert ended.exit_code == 0, (words, ended.output, ended.exception)
        finally:
            os.chdir(before)
    return folder


WITH_PYTHON = [page for page, text in PAGES.items() if "\n```python\n" in text]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_on_the_pages_runs(page, project, tmp_path):
    """All blocks of a page, one after another, as in one notebook."""
    code = "\n".join(code for language, code in BLOCK.findall(PAGES[page]) if language == "python")
    script = tmp_path / "page.py"
    script.write_text(code)
    environment = os.environ | {"HOME": str(project.parent), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
