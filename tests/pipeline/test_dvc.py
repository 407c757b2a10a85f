"""`dvc repro` as a person lives with it: what runs again and what never does.

Real DVC and Git repositories, real `teachonce` commands in processes of their own. One project is
reproduced in full; each story begins with a copy of it, its store and its DVC cache.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from storage.probe import PROBE_DIGEST
from tests.conftest import HashTeacher, make_tiny_model, sentences, shipped_settings

# A full run starts 18 processes that load torch: minutes on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
TEXTS = 4000
ROWS_PER_SHARD = 64
ALL = {
    *(
        "check",
        "docs",
        "shard",
        "split",
        "embed",
        "start@half",
        "mine",
        "neighbours",
        "distill@kd",
        "distill@ckd",
        "finetune@kd",
    ),
    *("evaluate_teacher", "evaluate_start@half", "evaluate@kd", "evaluate@ckd"),
    *("evaluate_finetuned@kd", "export", "report"),
}
# What follows from the recipe of the student that is finetuned and exported.
OF_KD = {"check", "distill@kd", "finetune@kd", "evaluate@kd", "evaluate_finetuned@kd"} | {
    *("export", "report")
}
EMBEDDED = re.compile(r"^embed: .* \d+ embedded \(([\d,]+) texts\)", re.MULTILINE)


@dataclass
class Ended:
    """A command that has ended."""

    code: int
    output: str
    seconds: float

    @property
    def ran(self):
        return set(re.findall(r"^Running stage '(.+?)'", self.output, re.MULTILINE))

    @property
    def skipped(self):
        return set(re.findall(r"^Stage '(.+?)' didn't change, skipping", self.output, re.MULTILINE))

    @property
    def texts_embedded(self):
        """Texts that the command embed, which ran, gave to the teacher."""
        return int(EMBEDDED.search(self.output)[1].replace(",", ""))


@dataclass
class Project:
    """A folder with a params.yaml, a Git and a DVC repository; its store lies beside it."""

    root: Path
    store: Path
    code: Path | None = None  # where teachonce is imported from, if not from this repository
    tools: Path = Path(sys.executable).parent  # where commands are looked for first

    @property
    def params(self):
        return yaml.safe_load((self.root / "params.yaml").read_text())

    @property
    def manifest(self):
        return (self.root / "data/embeddings.json").read_bytes()

    def set(self, **changes):
        """Change settings: `set(recipes__kd__seed=1)`."""
        params = self.params
        for address, value in changes.items():
            *path, last = address.split("__")
            section = params
            for name in path:
                section = section[name]
            section[last] = value
        (self.root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    def popen(self, *words, log):
        """A command as a process that can be killed; it prints into the file `log`."""
        tools = [str(self.tools), str(Path(sys.executable).parent), os.environ["PATH"]]
        settled = {
            "PATH": os.pathsep.join(tools),
            "DVC_SITE_CACHE_DIR": str(self.root.parent / "site"),
            "DVC_NO_ANALYTICS": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        if self.code is not None:
            settled["PYTHONPATH"] = str(self.code)
        environment = {k: v for k, v in os.environ.items() if k != "TEACHONCE_STORE"} | settled
        for role in ("AUTHOR", "COMMITTER"):
            environment |= {f"GIT_{role}_NAME": "Tester", f"GIT_{role}_EMAIL": "tester@localhost"}
        with log.open("wb") as file:
            return subprocess.Popen(
                words, cwd=self.root, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    def attempt(self, *words):
        """A command that may fail; stdout and stderr together."""
        log = self.root.parent / f"{self.root.name}.log"
        started = time.monotonic()
        code = self.popen(*words, log=log).wait(timeout=600)
        return Ended(code, log.read_text(), time.monotonic() - started)

    def run(self, *words):
        """A command that must not fail."""
        ended = self.attempt(*words)
        assert ended.code == 0, f"{' '.join(words)}\n{ended.output}"
        return ended

    def repro(self, *words):
        return self.run("dvc", "repro", *words)

    def vectors(self):
        """Each shard of vectors in the store: its key -> who that file is and when it was written."""
        found = {}
        for path in (self.store / "vectors").rglob("*.arrow"):
            if path.stem == PROBE_DIGEST:
                continue  # the probe texts' record: no shard of a corpus
            status = path.stat()
            found[path.relative_to(self.store).as_posix()] = status.st_ino, status.st_mtime_ns
        return found

    def copy(self, folder, **changes):
        """The same project with a store of its own, elsewhere."""
        shutil.copytree(self.root, folder / "project", symlinks=True)
        shutil.copytree(self.store, folder / "store")
        project = Project(folder / "project", folder / "store")
        project.set(store=str(project.store), **changes)
        return project


def settings(folder, teacher):
    """The shipped params.yaml, fitted to a small corpus and a tiny teacher."""
    params = shipped_settings()
    params |= {
        "store": str(folder / "store"),
        "device": "cpu",
        "starts": {"half": {"from": "teacher", "layers": [0, 3]}},
    }
    params["docs"]["packages"] = []
    params["shard"] |= {"sources": ["texts/*.txt"], "rows_per_shard": ROWS_PER_SHARD}
    params["embed"] |= {"teacher": str(teacher), "max_tokens": 16}
    # A teacher with random weights finds all texts alike.
    params["mine"] |= {"max_score": 1.0}
    params["evaluate"] |= {"sts": {"pairs": "sts.tsv"}, "retrieval": {}, "speed_texts": 32}
    params["finetune"] |= {"triplets": ["pairs.tsv"]}
    for recipe in (*params["recipes"].values(), params["finetune"]):
        recipe |= {"batch_size": 32, "max_tokens": 16, "evaluate_every": 40}
    for recipe in params["recipes"].values():
        for objective in recipe["objectives"]:
            objective |= {"queue": 256} if "queue" in objective else {}
    return params


def new_project(folder, teacher, *, texts=TEXTS):
    project = Project(folder / "project", folder / "store")
    (project.root / ".dvc").mkdir(parents=True)
    for name in ("dvc.yaml", ".dvcignore", ".dvc/config"):
        shutil.copy(ROOT / name, project.root / name)
    (project.root / ".gitignore").write_text("work/\n")
    furnish(project, folder, teacher, texts=texts)
    project.run("git", "init", "-q", "-b", "main")
    return project


def furnish(project, folder, teacher, *, texts=TEXTS):
    """Settings and files of one's own for a project."""
    (project.root / "texts").mkdir()
    text = yaml.safe_dump(settings(folder, teacher), sort_keys=False)
    (project.root / "params.yaml").write_text(text)
    write(project.root / "texts/m.txt", sentences(texts))
    pairs = sentences(80, seed=7)
    scores = np.random.default_rng(7).integers(0, 6, 40)
    write(
        project.root / "sts.tsv",
        [f"{s}\t{a}\t{b}" for s, a, b in zip(scores, pairs[:40], pairs[40:], strict=True)],
    )
    anchors = sentences(300, seed=8)
    write(project.root / "pairs.tsv", [f"{text}\t{text[: len(text) // 2]}" for text in anchors])


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher):
    """The project after its one full run; look, and work on a copy."""
    project = new_project(tmp_path_factory.mktemp("finished"), teacher)
    ended = project.repro()
    assert ended.ran == ALL
    assert ended.texts_embedded == TEXTS
    print(f"\nfull run: {ended.seconds:.0f} s, {len(project.vectors())} shards")
    return project


@pytest.fixture
def project(finished, tmp_path):
    return finished.copy(tmp_path)


# --- what runs again


def test_a_second_run_only_checks(project):
    ended = project.repro()
    assert ended.ran == {"check"}
    assert ended.skipped == ALL - {"check"}


def test_comments_and_speed_settings_compute_nothing(project):
    """Another store, too: the copy's `store` is not the one that was reproduced."""
    path = project.root / "params.yaml"
    path.write_text(f"# a remark\n{path.read_text()}")
    assert project.repro().ran == {"check"}
    vectors, manifest = project.vectors(), project.manifest
    project.set(embed__batch_tokens=512, mine__memory_mb=256, device="auto", tracker="tensorboard")
    ended = project.repro()
    print(f"\nspeed settings changed: {sorted(ended.ran)} ran")
    assert ended.ran == {"check"}
    assert (project.vectors(), project.manifest) == (vectors, manifest)


def test_one_recipe_trains_one_student(project):
    other = (project.root / "models/ckd/model.safetensors").read_bytes()
    ours = (project.root / "models/kd/model.safetensors").read_bytes()
    project.set(recipes__kd__learning_rate=1e-3, recipes__kd__widths=[16])
    ended = project.repro()
    print(f"\none recipe changed: {ended.seconds:.0f} s")
    assert ended.ran == OF_KD
    reported = json.loads((project.root / "reports/metrics.json").read_bytes())["models"]
    cut = {name for name, metrics in reported.items() if "widths.16.sts.pairs" in metrics}
    assert cut == {"kd", "kd-finetuned"}
    assert ended.skipped == ALL - ended.ran
    assert (project.root / "models/ckd/model.safetensors").read_bytes() == other
    assert (project.root / "models/kd/model.safetensors").read_bytes() != ours


def test_mining_anew_retrains_only_who_reads_neighbours(project):
    weights = {name: project.root / f"models/{name}/model.safetensors" for name in ("kd", "ckd")}
    before = {name: path.read_bytes() for name, path in weights.items()}
    project.set(mine__range_min=1)
    ended = project.repro()
    assert ended.ran == {
        *("check", "mine", "neighbours", "distill@ckd", "evaluate@ckd", "report"),
    }
    assert weights["kd"].read_bytes() == before["kd"]
    assert weights["ckd"].read_bytes() != before["ckd"]

    # A recipe that begins to read some, and one that is new.
    params = project.params
    params["recipes"]["new"] = params["recipes"]["ckd"]
    params["students"]["new"] = {"recipe": "new", "start": "half"}
    params["recipes"]["kd"]["objectives"] = params["recipes"]["kd_ckd"]["objectives"]
    (project.root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    ended = project.repro("distill")
    assert ended.ran == {"check", "neighbours", "distill@kd", "distill@new"}
    project.set(mine__range_min=2)
    ended = project.repro("distill")
    assert ended.ran == {
        *("check", "mine", "neighbours", "distill@kd", "distill@ckd", "distill@new"),
    }


def test_a_teacher_that_comes_back_finds_its_vectors(project, teacher, tmp_path):
    vectors, manifest = project.vectors(), project.manifest
    other = make_tiny_model(tmp_path / "other", seed=1)
    project.set(embed__teacher=str(other))
    ended = project.repro("embed")
    assert ended.ran == {"check", "embed"}
    assert ended.texts_embedded == TEXTS
    both = project.vectors()
    assert len(both) == 2 * len(vectors)
    assert project.manifest != manifest

    project.set(embed__teacher=str(teacher))
    ended = project.repro("embed")
    assert ended.texts_embedded == 0
    assert project.vectors() == both
    assert vectors.items() <= both.items()
    assert project.manifest == manifest
    assert project.repro("mine").ran == {"check"}


def test_growth_embeds_the_new_texts_only(project):
    """DVC itself sees no new file under a glob: `check` does."""
    new = sentences(TEXTS + TEXTS // 5 + 1, seed=0)[TEXTS:]
    tenth = TEXTS // 10
    texts = project.root / "texts"
    shares = {}

    def grow(name, change):
        change()
        ended = project.repro("embed")
        assert ended.ran == {"check", "shard", "embed"}
        shares[name] = ended.texts_embedded / TEXTS

    grow("a tenth at the end", lambda: write(texts / "z.txt", new[:tenth]))
    grow("a tenth at the front", lambda: write(texts / "a.txt", new[tenth : 2 * tenth]))
    lines = (texts / "m.txt").read_text().splitlines()
    grow("one text removed", lambda: write(texts / "m.txt", lines[:1234] + lines[1235:]))
    print("\n" + ", ".join(f"{name}: {share:.1%} embedded" for name, share in shares.items()))
    ledger = json.loads((project.root / "reports/stages/shard.json").read_bytes())
    assert ledger["kept"] == TEXTS + 2 * tenth - 1
    # What stands in a shard that grew or shrank is copied from the old one.
    assert list(shares.values()) == [tenth / TEXTS, tenth / TEXTS, 0]


def test_imported_vectors_stand_in_for_a_teacher(tmp_path, teacher):
    """From vectors that somebody made to a measured student; no file of a teacher is looked at."""
    project = Project(tmp_path / "project", tmp_path / "store")
    (project.root / ".dvc").mkdir(parents=True)
    for name in ("dvc.yaml", ".dvcignore", ".dvc/config"):
        shutil.copy(ROOT / name, project.root / name)
    (project.root / ".gitignore").write_text("work/\n")
    furnish(project, tmp_path, "imported:abroad", texts=600)
    shutil.copytree(teacher, project.root / "small")
    project.set(starts__half={"from": "./small", "layers": [0, 3]})
    project.run("git", "init", "-q", "-b", "main")
    texts = sentences(600)
    elsewhere = HashTeacher(dim=24)
    np.save(project.root / "vectors.npy", np.stack([elsewhere.vector(text) for text in texts]))
    project.run("teachonce", "shard")
    project.run("teachonce", "import", "vectors.npy", "texts/m.txt")
    (project.root / "vectors.npy").unlink()
    vectors, manifest = project.vectors(), project.manifest

    ended = project.repro()
    assert ended.ran == ALL
    assert ended.texts_embedded == 0
    assert (project.vectors(), project.manifest) == (vectors, manifest)
    report = json.loads((project.root / "reports/metrics.json").read_bytes())["models"]
    assert report["teacher"] == {}
    assert {"sts.average", "fidelity.spearman"} <= set(report["kd"]) == set(report["half"])
    assert "unknown" in (project.root / "reports/index.html").read_text()
    assert project.repro().ran == {"check"}
    said = project.run("teachonce", "search", sentences(1)[0]).output
    assert len(said.splitlines()) == 5


# --- power cuts


@pytest.fixture(scope="module")
def unembedded(finished, tmp_path_factory):
    """A project whose teacher pass is still to come, and slow: hardly a text fits into a batch."""
    project = finished.copy(tmp_path_factory.mktemp("unembedded"), embed__batch_tokens=16)
    shutil.rmtree(project.store / "vectors")
    for name in ("data/embeddings.json", "reports/stages/embed.json"):
        (project.root / name).unlink()
    return project


@pytest.fixture(scope="module")
def whole(unembedded, tmp_path_factory):
    """The manifest of a pass that nobody interrupted, in another store."""
    project = unembedded.copy(tmp_path_factory.mktemp("whole"))
    ended = project.run("teachonce", "embed")
    print(f"\nwhole pass: {ended.seconds:.1f} s")
    return project.manifest


def processes(root, *words):
    """Ids of the processes that run `words` in the folder `root`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().split(b"\0")[:-1]
            here = (process / "cwd").readlink() == root
        except OSError:
            continue
        ours = [Path(os.fsdecode(word)).name for word in line[-len(words) :]]
        if here and ours == list(words):
            found.append(int(process.name))
    return found


def wait_until(true, *, seconds=500):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def test_kill_9_of_embed_loses_no_finished_shard(unembedded, whole, tmp_path):
    project = unembedded.copy(tmp_path)
    process = project.popen("teachonce", "embed", log=tmp_path / "killed.log")
    wait_until(lambda: len(project.vectors()) >= 10)
    process.kill()
    process.wait()
    done = project.vectors()
    ended = project.run("teachonce", "embed")
    assert f" {len(done)} found in the store" in ended.output
    assert_resumed(project, done, ended, whole)


def test_kill_9_of_embed_under_dvc(unembedded, whole, tmp_path):
    project = unembedded.copy(tmp_path)
    dvc = project.popen("dvc", "repro", "embed", log=tmp_path / "killed.log")
    wait_until(lambda: len(project.vectors()) >= 10)
    [child] = processes(project.root, "teachonce", "embed")
    kill(child)
    assert dvc.wait(timeout=60) != 0
    done = project.vectors()
    ended = project.repro("embed")
    assert ended.ran == {"check", "embed"}
    assert_resumed(project, done, ended, whole)


def test_kill_9_of_dvc_while_embed_goes_on(unembedded, whole, tmp_path):
    """The orphan and its successor work on the same shards; each shard is published once."""
    project = unembedded.copy(tmp_path)
    dvc = project.popen("dvc", "repro", "embed", log=tmp_path / "killed.log")
    wait_until(lambda: len(project.vectors()) >= 5)
    [orphan] = processes(project.root, "teachonce", "embed")
    dvc.kill()
    dvc.wait()
    done = project.vectors()
    second = project.popen("dvc", "repro", "embed", log=tmp_path / "second.log")
    assert orphan in processes(project.root, "teachonce", "embed")
    wait_until(lambda: len(processes(project.root, "teachonce", "embed")) != 1)
    together = len(processes(project.root, "teachonce", "embed")) == 2
    later = project.vectors()
    code = second.wait(timeout=120)
    output = (tmp_path / "second.log").read_text()
    assert code == 0, output
    wait_until(lambda: not processes(project.root, "teachonce", "embed"))
    print(f"\n{len(done)} shards when dvc died; orphan and successor together: {together}")
    assert_resumed(project, done | later, Ended(code, output, 0), whole)
    assert project.repro("embed").ran == {"check"}


def assert_resumed(project, done, ended, whole):
    """What was finished is the same file still, and the end is that of a pass nobody interrupted."""
    shards = project.vectors()
    left = [path for path in project.store.rglob("*") if path.name.endswith(".tmp")]
    print(
        f"\n{len(done)} of {len(shards)} shards were finished; {ended.texts_embedded} of {TEXTS} "
        f"texts embedded afterwards; {len(left)} scratch files left"
    )
    assert 0 < len(done) < len(shards), "killed at a moment that shows nothing"
    assert done.items() <= shards.items()
    assert project.manifest == whole


# --- what the store lost


def test_a_lost_shard_comes_back_with_the_command_that_the_message_names(project):
    """DVC compares manifests, which are as they were: nothing but the message leads out of here."""
    vectors, manifest = project.vectors(), project.manifest
    lost = min(vectors)
    (project.store / lost).unlink()
    project.set(recipes__kd__learning_rate=1e-3)
    ended = project.attempt("dvc", "repro", "distill@kd")
    assert ended.code != 0
    assert f"{lost}: not in the store" in ended.output
    cure = re.search(r"^  cure: [^`]*`(.+?)`", ended.output, re.MULTILINE)[1]
    print(f"\na shard is lost; the cure is {cure}")
    project.run(*cure.split())
    assert project.vectors().keys() == vectors.keys()
    assert project.manifest == manifest
    assert project.repro("distill@kd").ran == {"check", "distill@kd"}


# --- other places


def test_a_fresh_clone_trains_one_student_and_needs_no_teacher(project, teacher, tmp_path):
    """Two boxes: what is committed and pushed stands, and only the student that changed is made."""
    project.run("dvc", "remote", "add", "--default", "box", str(tmp_path / "remote"))
    assert project.repro().ran == {"check"}
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message", "all of it")
    project.run("dvc", "push")
    project.run("git", "clone", "--quiet", ".", str(tmp_path / "clone"))
    vectors = project.vectors()

    clone = Project(tmp_path / "clone", project.store)
    clone.set(recipes__ckd__learning_rate=1e-3)
    away = teacher.rename(teacher.with_name("away"))
    try:
        ended = clone.repro("--pull", "--allow-missing")
    finally:
        away.rename(teacher)
    print(f"\nfresh clone without the teacher: {ended.seconds:.0f} s, {sorted(ended.ran)} ran")
    assert ended.ran == {"check", "distill@ckd", "evaluate@ckd", "report"}
    assert ended.skipped == ALL - ended.ran
    assert "what is committed stands" in ended.output
    assert clone.manifest == project.manifest
    assert project.vectors() == vectors
    made = json.loads((clone.root / "reports/metrics.json").read_bytes())["models"]
    before = json.loads((project.root / "reports/metrics.json").read_bytes())["models"]
    assert {name for name in made if made[name] != before[name]} == {"ckd"}


def test_an_experiment_in_a_temporary_folder_embeds_nothing(project):
    """And what the stages leave is what `dvc metrics` and `dvc plots` can read."""
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message", "all of it")
    vectors = project.vectors()
    ended = project.run(
        *("dvc", "exp", "run", "--temp", "--name", "faster"),
        *("--set-param", "recipes.kd.learning_rate=0.001"),
    )
    print(f"\nexperiment: {ended.seconds:.0f} s, {sorted(ended.ran)} ran")
    assert ended.ran == OF_KD
    assert project.vectors() == vectors

    shown = json.loads(project.run("dvc", "metrics", "show", "--json").output)[""]["data"]
    report = json.loads((project.root / "reports/metrics.json").read_bytes())
    for model, found in report["models"].items():
        assert shown[f"reports/metrics/{model}.json"]["data"] == found
    assert "reports/metrics.json" not in shown
    assert shown["reports/stages/embed.json"]["data"]["texts"] == TEXTS
    diff = json.loads(project.run("dvc", "metrics", "diff", "--json", "HEAD", "faster").output)
    assert diff["reports/metrics/kd.json"]["fidelity.spearman"]["diff"] != 0
    assert "reports/metrics/ckd.json" not in diff
    for words in (["show"], ["diff", "HEAD", "faster"]):
        drawn = project.run("dvc", "plots", *words, "--json").output
        assert "reports/curves/kd.csv" in drawn
        assert "agreement" in drawn


# --- what a person gets wrong


def test_everything_wrong_is_listed_before_anything_runs(project, teacher, tmp_path):
    cut = shutil.copytree(teacher, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    params = project.params
    params["mine"]["neighbors"] = params["mine"].pop("neighbours")
    params["recipes"]["kd"]["batch_size"] = 1
    params["shard"]["sources"].append("texts/absent.txt")
    params["finetune"]["fields"] = ["anchor"]
    params["embed"]["teacher"] = str(cut)
    (project.root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    wrong = {
        "mine.neighbours": "is missing",
        "mine.neighbors": "did you mean neighbours?",
        "recipes.kd.batch_size": "greater than or equal to 2",
        "shard.sources": "texts/absent.txt",
        "finetune.fields": "at least 3 items",
        "embed.teacher": "model.safetensors is no whole safetensors file",
    }
    for words in (["teachonce", "check"], ["dvc", "repro"]):
        ended = project.attempt(*words)
        print(f"\n{' '.join(words)}: code {ended.code}, {ended.seconds:.1f} s\n{ended.output}")
        assert ended.code != 0
        assert "Traceback" not in ended.output
        for address, problem in wrong.items():
            assert re.search(rf"{re.escape(address)}.*{re.escape(problem)}", ended.output), address
        assert ended.ran <= {"check"}
    assert project.attempt("teachonce", "check").code == 1
