"""What every command says: nothing of a stranger's acts on a terminal, and a program reads one object."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from pipeline import cli, printing
from stages.outcome import Outcome
from stages.reporting.table import table
from stages.reporting.templating import fenced
from storage.corpus import put_texts, text_key
from storage.errors import DamagedError
from storage.store import Store
from tests.conftest import shipped_settings

ROOT = Path(__file__).parents[2]
HOSTILE = "\x1b[31mred\x07\u202eevil\u2066\u200f\u2028\x9b2J"
SAFE = "\\x1b[31mred\\x07\\u202eevil\\u2066\\u200f\\u2028\\x9b2J"

ACTING = set(HOSTILE) - set("[31mredevil2J")


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    """Types a command in a folder with the shipped settings; gives exit code, stdout and stderr."""
    settings = shipped_settings()
    settings["docs"]["packages"] = []
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEACHONCE_STORE", str(tmp_path / "store"))
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)

    def typed(*words):
        monkeypatch.setattr(sys, "argv", ["teachonce", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return typed


def test_what_is_printed_and_logged_goes_through_one_door(capsys, monkeypatch):
    printing.show(Outcome("embed", Path(HOSTILE), f"{HOSTILE}\nerror: none"), as_json=False)
    printing.show_lines(Outcome("ls", "", HOSTILE), [f"ref {HOSTILE}\nref b"], as_json=False)
    printing.say(HOSTILE, err=True)
    said = capsys.readouterr()
    assert said.out == (
        f"embed: {SAFE}\\nerror: none\n  -> {SAFE}\n  next: {printing.NEXT['embed']}\n"
        f"ref {SAFE}\\nref b\nls: {SAFE}\n"
    )
    assert said.err == SAFE + "\n"
    record = logging.LogRecord("teachonce", logging.INFO, "", 0, "read %s", (HOSTILE,), None)
    assert printing.LogLine("%(message)s").format(record) == f"read {SAFE}"
    source = "".join(path.read_text() for path in sorted((ROOT / "pipeline").rglob("*.py")))
    assert source.count("typer.echo(") == 1


def test_the_table_and_the_card_have_doors_of_their_own():
    from rich.console import Console

    sets = {f"sts.{HOSTILE}.spearman": 0.5, "sts.average": 50.0, "device": HOSTILE}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(
        table({"models": {"teacher": sets, HOSTILE: sets}}, students=[HOSTILE], width=200)
    )
    printed = console.file.getvalue()
    assert SAFE in printed and not ACTING & set(printed)
    block = fenced({"prompt": HOSTILE, "plain": "Zürich"})
    assert not ACTING & set(block)
    assert yaml.safe_load(block.strip("`").removeprefix("yaml"))["prompt"] == HOSTILE
    assert "Zürich" in fenced({"plain": "Zürich"})


@pytest.mark.parametrize(
    "words",
    [
        ["start", HOSTILE],
        ["distill", HOSTILE],
        ["finetune", HOSTILE],
        ["evaluate", HOSTILE],
        ["search", "a query", "--model", HOSTILE],
        ["report", HOSTILE],
        ["embed", "--shards", HOSTILE],
        ["gc", "--forget", HOSTILE],
        ["gc", "--grace", HOSTILE],
        ["diff", HOSTILE, HOSTILE],
        ["import", HOSTILE, HOSTILE],
        ["join", HOSTILE],
        ["init", HOSTILE],
        ["-C", HOSTILE, "check"],
        [HOSTILE],
    ],
)
def test_no_word_of_a_command_line_reaches_the_terminal_as_it_is(shell, words):
    code, out, err = shell(*words)
    assert (code == 0) == (words[0] == "init")
    assert not ACTING & set(out + err)


@pytest.mark.parametrize(
    "change",
    [
        {"embed": {"teacher": f"./{HOSTILE}"}},
        {"embed": {"prompt": HOSTILE}},
        {"shard": {"sources": [f"./{HOSTILE}*.txt"]}},
        {"evaluate": {"sts": {HOSTILE: f"./{HOSTILE}"}}},
        {"finetune": {"triplets": [HOSTILE]}},
        {"starts": {HOSTILE: {"from": HOSTILE}}},
        {"report": {"rank_by": HOSTILE}},
        {"remote": f"./{HOSTILE}"},
        {HOSTILE: HOSTILE},
    ],
    ids=lambda change: ascii(next(iter(change)))[:10],
)
def test_no_setting_reaches_the_terminal_as_it_is(shell, tmp_path, change):
    settings = yaml.safe_load((tmp_path / "params.yaml").read_text())
    for name, value in change.items():
        settings[name] = settings.get(name, {}) | value if isinstance(value, dict) else value
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    for command in ("check", "shard", "push", "ls"):
        code, out, err = shell(command)
        assert code, command
        assert not ACTING & set(out + err), command


def test_an_error_is_one_json_object_too(shell, tmp_path):
    code, out, err = shell("split", "--json")
    assert code == 3
    assert json.loads(out) == {
        "error": "not there",
        "place": str(tmp_path / "data/corpus.json"),
        "cure": json.loads(out)["cure"],
    }
    assert err.startswith(f"error: {tmp_path}/data/corpus.json: not there\n  cure: run")
    assert shell("split")[1] == ""


def test_what_was_done_and_what_ended_it_are_one_json_object(capsys):
    failure = DamagedError("a", "is damaged", "run b")
    with pytest.raises(typer.Exit) as ended:
        printing.show(Outcome("repair", Path("store"), "1 moved", {"n": 1}), True, failure)
    assert ended.value.exit_code == 3
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["facts"], found["error"], found["place"], found["cure"]) == (
        {"n": 1},
        "is damaged",
        "a",
        "run b",
    )
    assert said.err == "error: a: is damaged\n  cure: run b\n"
    with pytest.raises(DamagedError):
        printing.show(Outcome("repair", Path("store"), "1 moved"), False, failure)


def test_a_command_runs_in_another_folder(shell, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, out, _ = shell("-C", "..", "init", "project")
    assert (code, out.splitlines()[1]) == (0, "  -> project")
    assert (tmp_path / "project/params.yaml").is_file()
    code, _, err = shell("-C", "nowhere", "ls")
    assert code == 1 and "nowhere: going there failed: No such file or directory" in err


def test_a_store_is_looked_after_from_anywhere(shell, tmp_path, monkeypatch):
    store = tmp_path / "some store"
    put_texts(Store(store), [("a", text_key("a"))])
    (store / "refs").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert shell("ls")[0] == 1  # no params.yaml
    for words in (["ls"], ["gc"], ["verify"]):
        code, out, err = shell(*words, "--store", "../some store")
        assert (code, err) == (0, ""), words
        assert "0 objects of 0 manifests: all well" in out or " 1 " in out, words
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_stdout_that_is_full_is_told(shell, monkeypatch):
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        monkeypatch.setattr(sys, "stdout", full)
        code, _, err = shell("init", "project", "--json")
    assert code == 1
    assert err.startswith("error: stdout: writing failed: No space left on device\n  cure: free ")


def test_the_version_is_that_of_the_package(shell):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert shell("--version") == (0, f"teachonce {project['version']}\n", "")


def test_v_logs_each_step(shell, tmp_path, monkeypatch):
    """What is printed stays the same, and a key in the headers of a library's request is not logged."""
    (tmp_path / "a.txt").write_text("This is a text.\nAnother text is here.\n")
    settings = yaml.safe_load((tmp_path / "params.yaml").read_text())
    settings["shard"]["sources"] = ["a.txt"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    library = logging.getLogger("a library")
    calls = {("-v", "shard"): True, ("shard", "-v"): True, ("shard", "--verbose"): True}
    for words, is_logged in {**calls, ("shard",): False}.items():
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        code, out, err = shell(*words)
        assert (code, out.splitlines()[1]) == (0, "  -> data/corpus.json")
        assert (f"settings: {tmp_path}/params.yaml" in err) == is_logged
        assert (f"store: {tmp_path}/store" in err) == is_logged
        assert (".arrow: mapped, 2 rows" in err) == is_logged
        assert library.isEnabledFor(logging.INFO) == is_logged
        assert not library.isEnabledFor(logging.DEBUG)


@pytest.mark.parametrize("kind", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands(kind):
    environment = {**os.environ, "_TEACHONCE_COMPLETE": f"complete_{kind}"}
    environment |= {"COMP_WORDS": "teachonce em", "COMP_CWORD": "1"}
    environment |= {
        "_TYPER_COMPLETE_ARGS": "teachonce em",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    code = "import sys; sys.argv[0] = 'teachonce'; from pipeline.cli import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    offered = set(re.findall(r"\w+", run.stdout)) & {"embed", "mine", "shard", "gc"}
    assert (offered, run.stderr) == ({"embed"}, "")
