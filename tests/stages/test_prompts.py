"""Students that read their teacher's prompts: what they learn from, what is saved, and who reads it so."""

import json
import logging
from functools import cache

import numpy as np
import pytest
import torch

from stages import distill, export, finetune, start
from stages.finetune import FinetuneTask, Rehearsal
from stages.learning.batches import without_some
from stages.learning.judges import Labels, TripletJudge
from stages.learning.student import Student
from stages.learning.token_rows import prompts_of_teacher, token_rows
from stages.models.config import own_prompts, prompts_by_role
from stages.models.encoder import Encoder
from stages.models.lineage import prompts_read, read_lineage
from stages.models.loading import load_model
from stages.models.onnx import run_onnx
from stages.params import PromptsParams, StartParams
from stages.preflight import ONNX
from stages.reading.triplets import Triplet
from storage.caches import Caches
from storage.embeddings import Embeddings
from storage.errors import TeachonceError
from storage.roles import ROLES
from storage.split import Split
from tests.conftest import Place, embed_params, exporting, prompts, sentences
from tests.models.test_roles import TEACHERS, make_teacher
from tests.pipeline.test_upkeep import write_params
from tests.stages.test_distill import recipe
from tests.stages.test_finetune import settings

CPU = torch.device("cpu")
torch.set_num_threads(1)
LIMIT = 48
QUERIES, DOCUMENTS, PLAIN = sentences(40, seed=1), sentences(90, seed=2), sentences(30, seed=3)
BY_ROLE = {"query": QUERIES, "document": DOCUMENTS}


class World:
    """A corpus with roles, embedded by a tiny teacher of a family, and two of its layers as the start."""

    def __init__(self, place, name, texts=BY_ROLE, said=None):
        self.place, self.teacher = place, make_teacher(place.root, name)
        self.corpus = place.corpus(texts)
        said = said or prompts("")
        own = own_prompts(self.teacher, "embed.teacher")
        decided = prompts_by_role(PromptsParams(**said), own)
        self.prompts = {role: prompt.text for role, prompt in decided.items()}
        encoder = Encoder(self.teacher, device=CPU, max_tokens=LIMIT, prompts=self.prompts)
        params = embed_params(prompts=self.prompts, max_tokens=LIMIT)
        place.embed(self.corpus, encoder.as_teacher(), params=params)
        self.embeddings = Embeddings(place.store, place.embeddings, self.corpus)
        self.start = place.root / "start"
        cut = StartParams.model_validate({"from": "teacher", "layers": [0, 1]})
        start.run(cut, name="half", folder=self.teacher, trust_remote_code=False, out=self.start)
        split = Split(corpus=self.corpus.manifest.content, heldout=0.15, evaluation=())
        self.caches = Caches(self.corpus, self.embeddings, None, split, place.store)

    def task(self, **changes):
        params = recipe(max_tokens=LIMIT, prompts="teacher", **changes)
        return distill.prepare(params, start=self.start, caches=self.caches, device=CPU)

    def train(self, name="student", **changes):
        at = self.place.root
        distill.run(
            recipe(**{"epochs": 1, "max_tokens": LIMIT, "prompts": "teacher"} | changes),
            name=name,
            start=self.start,
            caches=self.caches,
            device=CPU,
            work=at / "work",
            out=at / name,
            curve=at / f"{name}.csv",
            training=at / f"{name}.json",
            track=lambda row: None,
        )
        return at / name

    def export(self, student, *formats):
        out, lineage = self.place.root / "export", read_lineage(student)
        how = exporting(out, *formats)
        self.exported = export.run(folder=student, lineage=lineage, metrics={}, facts={}, **how)
        return out


@pytest.fixture(scope="module")
def world_of(tmp_path_factory):
    """Family -> its World, made once; each test writes folders of its own into it."""
    return cache(lambda name: World(Place(tmp_path_factory.mktemp("world")), name))


@pytest.fixture
def e5(world_of):
    return world_of("E5")


def test_prompts_are_those_of_the_cache_and_of_texts_where_a_role_has_none():
    assert prompts_of_teacher({"prompts": {"query": "q: ", "document": ""}}) == {
        "text": "",
        "query": "q: ",
        "document": "",
    }
    both = {"prompts": {"text": "t: ", "query": "q: "}}
    assert prompts_of_teacher(both) == {"text": "t: ", "query": "q: ", "document": "t: "}
    assert prompts_of_teacher({"prompt": "t: "}) == dict.fromkeys(ROLES, "t: ")
    assert prompts_of_teacher({"prompt": ""}) == prompts_of_teacher({}) == {}
    with pytest.raises(TeachonceError, match="teacher, but the vectors were imported"):
        prompts_of_teacher({"model": "unknown", "prompt": "unknown"})


def test_a_recipe_without_prompts_has_the_fingerprint_of_before():
    assert "prompts" not in distill.recipe(recipe())
    assert distill.recipe(recipe(prompts="none")) == distill.recipe(recipe())
    assert distill.recipe(recipe(prompts="teacher"))["prompts"] == "teacher"


def test_token_ids_stand_behind_the_prompt_of_their_role_in_objects_of_their_own(world_of):
    world = world_of("BGE")  # an instruction before queries, nothing before documents
    model = load_model(world.start, device=CPU)
    how = {"corpus": world.corpus, "store": world.place.store, "max_tokens": LIMIT}
    plain = token_rows(model.tokenizer, world.start, **how)
    read = token_rows(model.tokenizer, world.start, **how, prompts=world.prompts)
    for tokens, before in ((plain, ""), (read, world.prompts["query"])):
        rows = [*(before + text for text in QUERIES), *DOCUMENTS]
        wanted = model.tokenizer(rows, truncation=True, max_length=LIMIT)["input_ids"]
        assert [row.tolist() for row in tokens.rows_of(np.arange(130))] == wanted
    keys = [[entry.key for entry in tokens.objects] for tokens in (plain, read)]
    same = [one == other for one, other in zip(*keys, strict=True)]
    roles = [world.corpus.role_of(shard) for shard in range(len(same))]
    assert same == [role == "document" for role in roles]
    in_prompt = model[0]._get_prompt_length(world.prompts["query"])
    assert in_prompt > 5
    counted = read.prompt_tokens(np.array([129, 0, 39, 40]))
    assert counted.tolist() == [0, in_prompt, in_prompt, 0]
    assert plain.prompt_tokens(np.arange(130)).tolist() == [0] * 130


QUICK = ("E5, prompt not pooled", "Qwen3")
FAMILIES = [
    *QUICK,
    *(pytest.param(name, marks=pytest.mark.slow) for name in sorted({*TEACHERS} - {*QUICK})),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_training_reads_as_the_teacher_does_with_roles_mixed_in_a_batch(world_of, name):
    world = world_of(name)
    task = world.task()
    encoder = Encoder(world.start, device=CPU, max_tokens=LIMIT, prompts=world.prompts)
    rows = np.random.default_rng(0).permutation(world.corpus.rows)[:60]
    roles, texts = world.corpus.roles_of(rows), world.corpus.take(rows)
    assert set(roles) == {"query", "document"}
    wanted = np.concatenate(
        [encoder([text], role).vectors for text, role in zip(texts, roles, strict=True)]
    )
    with torch.no_grad():
        read = task.encode(rows).numpy()
        assert np.abs(read - wanted).max() < 1e-5
        task.params = task.params.model_copy(update={"gradient_caching": True})
        assert np.abs(task.encode(rows).numpy() - wanted).max() < 1e-5
        task.student.packed = None
        assert np.abs(task.encode(rows).numpy() - wanted).max() < 1e-5
    plain = Encoder(world.start, device=CPU, max_tokens=LIMIT).encode(texts)
    changed = np.array([bool(world.prompts[role]) for role in roles])
    assert np.array_equal(np.abs(plain - read).max(axis=1) > 1e-4, changed)


def test_no_token_of_a_prompt_is_deleted():
    tokens = np.arange(50, dtype=np.int32)
    left = without_some(tokens, 0.9, np.random.default_rng(0), 7)
    assert left[:7].tolist() == list(range(7)) and left[-1] == 49 and len(left) < 30


@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_reads_queries_and_documents_as_the_student_did(world_of, name):
    from sentence_transformers import SentenceTransformer

    world = world_of(name)
    student = world.train()
    wanted = {role: prompt for role, prompt in world.prompts.items() if prompt}
    assert prompts_read(read_lineage(student)) == wanted
    ours = Encoder(student, device=CPU, max_tokens=LIMIT, prompts=wanted)
    rows = np.array([*range(10), *range(50, 60)])
    texts = world.corpus.take(rows)
    with torch.no_grad():
        task = world.task()
        task.student.load_state_dict(state_of(student, task.student))
        read = task.encode(rows).numpy()
    queries, documents = ours(texts, "query").vectors, ours(texts, "document").vectors
    assert np.abs(read - np.concatenate([queries[:10], documents[10:]])).max() < 1e-5
    assert np.abs(queries - documents).max() > 1e-3
    for folder in (student, world.export(student)):
        config = json.loads((folder / "config_sentence_transformers.json").read_text())
        assert config["prompts"] == {"query": "", "document": ""} | wanted
        assert config["default_prompt_name"] is None
        model = SentenceTransformer(str(folder), device="cpu")
        model.max_seq_length = LIMIT
        assert np.abs(model.encode_query(texts) - queries).max() < 1e-6
        assert np.abs(model.encode_document(texts) - documents).max() < 1e-6
        assert np.abs(model.encode(texts, prompt_name="query") - queries).max() < 1e-6
        assert np.abs(model.encode(texts) - ours(texts, "text").vectors).max() < 1e-6


def state_of(folder, student):
    """The weights of a saved student, as a student in training names them."""
    model = load_model(folder, device=CPU)
    saved = Student(model, teacher_dim=student.dim, unit_length=True, project=False, dropout=False)
    return saved.state_dict()


def test_a_corpus_of_texts_alone_with_a_prompt_has_it_before_everything(place):
    from sentence_transformers import SentenceTransformer

    world = World(place, "E5", PLAIN + DOCUMENTS, prompts("clue: "))
    out = world.export(world.train())
    config = json.loads((out / "config_sentence_transformers.json").read_text())
    assert config["prompts"] == dict.fromkeys(ROLES, "clue: ")
    assert config["default_prompt_name"] == "text"
    model = SentenceTransformer(str(out), device="cpu")
    wanted = model.encode(["clue: Amber basin."], prompt="")
    for encode in (model.encode, model.encode_query, model.encode_document):
        assert np.abs(encode(["Amber basin."]) - wanted).max() < 1e-6
    card = (out / "README.md").read_text()
    assert "- before every text: 'clue: '\n" in card
    assert 'vectors = model.encode(["One text."' in card


def test_without_any_prompt_teacher_is_the_same_as_none_and_says_so(place, caplog):
    world = World(place, "E5", PLAIN + DOCUMENTS, prompts("", "", ""))
    with caplog.at_level(logging.INFO):
        folders = [world.train(name, prompts=name) for name in ("none", "teacher")]
    assert "the teacher read no prompt, so prompts: teacher is the same as none" in caplog.text
    weights, config = (
        [(folder / file).read_bytes() for folder in folders]
        for file in ("model.safetensors", "config_sentence_transformers.json")
    )
    assert weights[0] == weights[1] and config[0] == config[1]
    assert "prompts" not in read_lineage(folders[1])


def test_prompts_change_what_a_student_learns_and_only_if_asked_for(e5):
    assert not np.array_equal(
        *(weights_of(e5.train(name, prompts=name)) for name in ("teacher", "none"))
    )
    assert prompts_read(read_lineage(e5.place.root / "none")) == {}
    out = e5.export(e5.place.root / "none")
    config = json.loads((out / "config_sentence_transformers.json").read_text())
    assert config["prompts"] == {"query": "", "document": ""}


def weights_of(folder):
    return np.frombuffer((folder / "model.safetensors").read_bytes(), np.uint8)


def test_a_prompt_that_leaves_no_room_for_a_text_is_refused(place):
    world = World(place, "BGE")
    with pytest.raises(
        TeachonceError, match=r"recipes\.\*\.max_tokens: 12, but special tokens and"
    ):
        world.train(max_tokens=12)


def test_the_card_says_which_call_to_use(world_of):
    world = world_of("Qwen3")
    card = (world.export(world.train()) / "README.md").read_text()
    assert (
        """\
queries = model.encode(["What is looked for?"], prompt_name="query")
documents = model.encode(["One text.", "And another one."], prompt_name="document")
```

The model reads what it read in training:

- before other texts: nothing
- before queries: 'Instruct: find the passage\\\\nQuery: '
- before documents: nothing

From sentence-transformers 5 on, `encode_query` and `encode_document` do the same as these two lines.
`encode` without a name puts nothing before a text.
Compare vectors by their cosine.
"""
        in card
    )


@pytest.mark.slow
def test_onnx_reads_the_text_behind_its_prompt(e5):
    student = e5.train()
    out = e5.export(student, "safetensors", "onnx")
    model = load_model(out, device=CPU)
    made = run_onnx(out / "onnx" / "model.onnx", model, [f"query: {text}" for text in QUERIES])
    assert np.abs(made - model.encode(QUERIES, prompt_name="query")).max() < 1e-5
    assert "Put the prompt before a text before you tokenise it." in (out / "README.md").read_text()


@pytest.mark.slow
def test_a_student_that_leaves_its_prompt_out_has_no_graph(world_of):
    for name in ONNX:
        pytest.importorskip(name)
    world = world_of("E5, prompt not pooled")
    out = world.export(world.train(), "safetensors", "onnx-int8")
    assert not (out / "onnx").exists()
    assert "without onnx-int8: its vectors leave out the tokens of its prompts" in (
        world.exported.summary
    )


def test_a_student_is_loaded_with_its_prompts_and_a_start_without(e5, tmp_path):
    from pipeline.workspace import Workspace

    write_params(tmp_path, embed__max_tokens=LIMIT)
    here = Workspace(tmp_path)
    wanted = {"text": "", "query": "query: ", "document": "passage: "}
    for folder in (student := e5.train("loaded"), e5.export(student)):
        assert here.load_encoder(folder, is_teacher=False).prompts == wanted
    assert here.load_encoder(e5.start, is_teacher=False).prompts == dict.fromkeys(ROLES, "")


def test_rows_say_their_roles_in_python(e5):
    from pipeline.by_row import Roles
    from stages.learning.row_datasets import CachedRows, to_datasets

    roles = Roles(e5.corpus)
    assert (roles[39], roles[40], roles[[129, 0]]) == ("query", "document", ["document", "query"])
    assert list(roles) == ["query"] * 40 + ["document"] * 90
    rows = np.array([41, 3])
    items = CachedRows(e5.corpus, e5.embeddings, None, rows)
    assert [(item["role"], item["text"]) for item in items] == [
        ("document", DOCUMENTS[1]),
        ("query", QUERIES[3]),
    ]
    table = to_datasets(e5.corpus, e5.embeddings, None, rows)
    assert list(table[0]) == ["text", "label"]
    whole = table.with_format(None)
    assert (whole["id"][:], whole["role"][:]) == ([41, 3], ["document", "query"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["E5", "Qwen3"])
def test_a_student_finds_what_its_teacher_finds_by_reading_its_prompts(place, name):
    from sentence_transformers import SentenceTransformer

    documents = sentences(500, seed=2)
    draw = np.random.default_rng(0)
    queries = [
        " ".join(draw.permutation(text[:-1].lower().split())[:4]) + "?" for text in documents[:300]
    ]
    world = World(place, name, {"query": queries, "document": documents})
    heldout = world.caches.split.heldout_rows(world.corpus)
    asked = world.corpus.take(world.corpus.of_role(heldout, "query"))
    teacher = Encoder(world.teacher, device=CPU, max_tokens=LIMIT, prompts=world.prompts)
    index = teacher.encode(documents, role="document")

    def first_ten(vectors, among):
        return np.argsort(-(vectors @ among.T), axis=1, kind="stable")[:, :10]

    wanted = first_ten(teacher.encode(asked, role="query"), index)
    shares = {}
    for setting in ("none", "teacher"):
        student = world.train(
            setting, prompts=setting, epochs=24, batch_size=32, learning_rate=1e-3
        )
        model = SentenceTransformer(str(world.export(student)), device="cpu")
        model.max_seq_length = LIMIT
        vectors, own = model.encode_query(asked), model.encode_document(documents)
        shares[setting] = [
            np.mean([len({*a} & {*b}) / 10 for a, b in zip(found, wanted, strict=True)])
            for found in (first_ten(vectors, index), first_ten(vectors, own))
        ]
    # In the teacher's index, and among its own documents.
    assert shares["teacher"][0] > shares["none"][0] + 0.03
    assert shares["teacher"][1] > shares["none"][1] + 0.03


# ---------------------------------------------------------------------------------------- finetuning

ROWS = [
    Triplet(text, DOCUMENTS[number], (DOCUMENTS[number + 40], QUERIES[(number + 1) % 40]))
    for number, text in enumerate(QUERIES)
]


def slow_loss(encoder, rows, scale=20):
    """InfoNCE over all keys of the batch, one vector at a time."""

    def vector(text, role):
        return encoder([text], role).vectors[0].astype(np.float64)

    keys = [text for row in rows for text in row.texts[1:]]
    total = 0.0
    for row in rows:
        query = vector(row.anchor, "query")
        positive = np.exp(scale * query @ vector(row.positive, "document"))
        others = [
            np.exp(scale * query @ vector(text, "document"))
            for text in keys
            if text not in (row.anchor, row.positive)
        ]
        total -= np.log(positive / (positive + sum(others)))
    return total / len(rows)


def finetune_task(world, memory=None, judge=None):
    model = load_model(world.start, device=CPU)
    student = Student(
        model,
        teacher_dim=32,
        unit_length=True,
        project=False,
        dropout=False,
        prompts=world.prompts,
    ).eval()
    return FinetuneTask(
        settings(max_tokens=LIMIT, distill_weight=0.0 if memory is None else 1.0),
        student=student,
        tokenizer=model.tokenizer,
        triplets=ROWS,
        judge=judge or TripletJudge(ROWS, apart=True),
        memory=memory,
        device=CPU,
    )


@pytest.mark.parametrize("name", ["E5", "E5, prompt not pooled"])
def test_anchors_are_read_as_queries_and_their_keys_as_documents(world_of, name):
    world = world_of(name)
    task = finetune_task(world)
    encoder = Encoder(world.start, device=CPU, max_tokens=LIMIT, prompts=world.prompts)
    with torch.no_grad():
        loss, _ = task.setup().loss(np.arange(8), 0)
        judged = task.setup().score()
    assert float(loss) == pytest.approx(slow_loss(encoder, ROWS[:8]), rel=1e-4)
    # Each query stands among the keys, too: read as a document it is another vector.
    judge = task.judge
    vectors = np.concatenate(
        [encoder.encode(texts, role=role) for role, texts in judge.texts_by_role.items()]
    )
    assert judge.texts == [*judge.texts_by_role["document"], *QUERIES]
    assert judged == pytest.approx(judge(vectors), abs=1e-6)
    keys, queries = judge.texts_by_role["document"], vectors[judge.keys :]
    reciprocal = []
    for place_of_row, row in enumerate(ROWS):
        rivals = [n for n, text in enumerate(keys) if text not in (row.anchor, row.positive)]
        cosines = vectors[: judge.keys] @ queries[place_of_row]
        better = (cosines[rivals] >= cosines[keys.index(row.positive)]).sum()
        reciprocal.append(1 / (1 + better))
    assert judged == pytest.approx(np.mean(reciprocal), abs=1e-6)


def test_rows_of_the_cache_are_rehearsed_in_their_roles(e5):
    params = settings(max_tokens=LIMIT, distill_weight=1.0)
    tokenizer = load_model(e5.start, device=CPU).tokenizer
    memory = Rehearsal(e5.caches, tokenizer, e5.start, params, e5.prompts)
    task = finetune_task(e5, memory)
    read, vectors = memory.draw(30, 4)
    with torch.no_grad():
        ours = task._encode(read).numpy()
        _, (_, kd) = task.setup().loss(np.arange(8), 4)
    assert kd > 0
    teacher = Encoder(e5.start, device=CPU, max_tokens=LIMIT, prompts=e5.prompts)
    every = np.concatenate([teacher.encode(texts, role=role) for role, texts in BY_ROLE.items()])
    cosines = ours @ every.T
    assert cosines.max(axis=1).min() > 1 - 1e-5
    rows = cosines.argmax(axis=1)
    assert len(set(e5.corpus.roles_of(rows))) == 2
    assert np.array_equal(e5.embeddings.rows_of(rows), vectors)


def test_a_finetuned_student_keeps_its_prompts(e5, tmp_path):
    student = e5.train()
    rows = [{"anchor": row.anchor, "positive": row.positive} for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    out = tmp_path / "student-finetuned"
    params = settings(max_tokens=LIMIT, distill_weight=1.0, epochs=1, heldout=0.3)
    finetune.run(
        params,
        name="student-finetuned",
        student=student,
        root=tmp_path,
        evaluation=(),
        caches=e5.caches,
        device=CPU,
        work=tmp_path / "work",
        out=out,
        curve=tmp_path / "curve.csv",
        training=tmp_path / "training.json",
        track=lambda row: None,
    )
    assert prompts_read(read_lineage(out)) == {"query": "query: ", "document": "passage: "}
    assert own_prompts(out, "out") == {"query": "query: ", "document": "passage: "}
    labels = Labels.read(params, tmp_path, (), apart=True)
    assert list(labels.judge.texts_by_role) == ["document", "query"]
