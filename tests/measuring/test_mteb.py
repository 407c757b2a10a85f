"""Tasks of mteb on local data: the scores are ours, and what is done is not done again.

The tests marked `slow` need the extra `mteb`; they are skipped where it is not installed.
"""

import json
import sys

import numpy as np
import pytest
import torch

from stages.measuring import mteb_tasks
from stages.measuring.metrics import retrieval_scores
from stages.models.encoder import Encoder
from stages.models.loading import load_model
from stages.reading.evaluation_sets import RetrievalSet, read_sts
from stages.vectors import nearest, sts_correlation
from storage.errors import DamagedError, MissingError, TeachonceError
from storage.roles import ROLES
from tests.conftest import sentences

CPU = torch.device("cpu")


class Counting(Encoder):
    """An encoder that counts what it was asked."""

    texts_seen = 0

    def encode(self, texts, *, role="text"):
        self.texts_seen += len(texts)
        return super().encode(texts, role=role)


class Broken(Encoder):
    """A model whose training went wrong: each vector is the same number again and again."""

    number = float("nan")

    def encode(self, texts, *, role="text"):
        return np.full_like(super().encode(texts, role=role), self.number)


@pytest.fixture(scope="module")
def mteb():
    return pytest.importorskip("mteb")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """40 pairs with 6 different scores, as a file of ours."""
    path = tmp_path_factory.mktemp("sts") / "pairs.tsv"
    texts = sentences(80, seed=5)
    scores = np.random.default_rng(5).integers(0, 6, size=40)
    path.write_text(
        "".join(
            f"{score}\t{first}\t{second}\n"
            for score, first, second in zip(scores, texts[:40], texts[40:], strict=True)
        )
    )
    return read_sts([path])


def sts_task(name, parts, *, splits=("test",), modalities=("text",), public=True, there=True):
    """A task of mteb.

    Args:
        name: The name it is known by.
        parts: Subset -> pairs, used for each split.
        splits: Names of splits.
        modalities: What it says that it reads.
        public: Whether anybody may have its data.
        there: Whether the hub admits that it has the data.
    """
    from datasets import Dataset
    from datasets.exceptions import DatasetNotFoundError
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    alone = list(parts) == ["default"]

    class Local(AbsTaskSTS):
        metadata = TaskMetadata(
            name=name,
            description="Pairs made of words.",
            dataset={"path": "nobody/pairs", "revision": "1"},
            type="STS",
            modalities=list(modalities),
            is_public=public,
            eval_splits=list(splits),
            eval_langs=["eng-Latn"] if alone else {part: ["eng-Latn"] for part in parts},
            main_score="cosine_spearman",
        )

        def load_data(self, **others):
            if not there:
                raise DatasetNotFoundError("Dataset 'nobody/pairs' doesn't exist on the Hub")
            self.dataset = {
                part: {
                    split: Dataset.from_dict(
                        {"sentence1": of.first, "sentence2": of.second, "score": of.scores}
                    )
                    for split in splits
                }
                for part, of in parts.items()
            }
            self.data_loaded = True

    return Local()


def task_of_tasks(name, tasks):
    """The mean over `tasks`, as CQADupstackRetrieval is over its forums."""
    from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

    class Local(AbsTaskAggregate):
        metadata = AggregateTaskMetadata(
            name=name,
            description="Tasks.",
            tasks=tasks,
            type="STS",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="cosine_spearman",
        )

    return Local()


def retrieval_task(asked):
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="LocalSearch",
            description="Documents made of words.",
            dataset={"path": "nobody/documents", "revision": "1"},
            type="Retrieval",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, **others):
            documents = {"id": asked.document_ids, "text": asked.documents}
            queries = {"id": asked.query_ids, "text": asked.queries}
            self.dataset = {
                "default": {
                    "test": {
                        "corpus": Dataset.from_dict(documents),
                        "queries": Dataset.from_dict(queries),
                        "relevant_docs": asked.relevant,
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    return Local()


def part_of(pairs, begin, end):
    return type(pairs)(pairs.scores[begin:end], pairs.first[begin:end], pairs.second[begin:end])


def ours(encoder, pairs):
    return sts_correlation(encoder.encode(pairs.first), encoder.encode(pairs.second), pairs.scores)


def score(tasks, folder, encoder, out):
    return mteb_tasks.run(tasks, name="kd", folder=folder, load_encoder=lambda: encoder, out=out)


def message(error, tasks, folder, encoder, out):
    with pytest.raises(error) as caught:
        score(tasks, folder, encoder, out)
    assert type(caught.value) is error
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prompts": dict.fromkeys(ROLES, "amber basin: ")},
        {"max_tokens": 8},
        {"precision": "bf16"},
    ],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_an_sts_task_scores_as_our_own_evaluation(mteb, tiny_model, pairs, tmp_path, settings):
    encoder = Encoder(tiny_model, device=CPU, **settings)
    outcome = score(
        [sts_task("Pairs", {"default": pairs})], tiny_model, encoder, tmp_path / "a.json"
    )
    expected = ours(encoder, pairs)
    assert outcome.facts == {
        "mteb.Pairs": pytest.approx(expected, abs=1e-4),
        "mteb.average": outcome.facts["mteb.Pairs"],
        "mteb_version": mteb.__version__,
    }
    assert json.loads((tmp_path / "a.json").read_bytes()) == outcome.facts
    assert outcome.summary == f"kd: mteb Pairs {expected:.2f}"
    if settings:
        plain = ours(Encoder(tiny_model, device=CPU), pairs)
        assert abs(plain - expected) > 0.01, (
            "the setting makes no difference, so this shows nothing"
        )


@pytest.mark.slow
def test_a_search_task_scores_as_our_own_with_the_prompt_of_the_settings(
    mteb, tiny_model, tmp_path
):
    model = load_model(tiny_model, device=CPU)
    model.prompts = {"query": "amber: ", "document": "basin cedar: "}
    model.save(str(tmp_path / "prompted"), create_model_card=False)
    encoder = Encoder(tmp_path / "prompted", device=CPU, prompts=dict.fromkeys(ROLES, "cedar: "))
    texts = sentences(90, seed=3)
    asked = RetrievalSet(
        document_ids=[f"d{i}" for i in range(60)],
        documents=texts[:60],
        query_ids=[f"q{i}" for i in range(30)],
        queries=texts[60:],
        relevant={f"q{i}": {f"d{i}": 2, f"d{i + 30}": 1} for i in range(30)},
    )

    def expected(encoder):
        queries = encoder.encode(asked.queries, role="query")
        documents = encoder.encode(asked.documents, role="document")
        return 100 * retrieval_scores(nearest(queries, documents, 100), asked)["ndcg@10"].mean()

    outcome = score(
        [retrieval_task(asked)], tmp_path / "prompted", encoder, tmp_path / "reports/a.json"
    )
    right = expected(encoder)
    assert outcome.facts["mteb.LocalSearch"] == pytest.approx(right, abs=1e-3)
    assert abs(expected(Encoder(tmp_path / "prompted", device=CPU)) - right) > 0.01


@pytest.mark.slow
def test_splits_and_subsets_stand_beside_their_mean(mteb, tiny_model, pairs, tmp_path):
    encoder = Encoder(tiny_model, device=CPU)
    early, late = part_of(pairs, 0, 20), part_of(pairs, 20, 40)
    tasks = [
        sts_task("Many", {"en": early, "old": late}, splits=["dev", "test"]),
        sts_task("One", {"default": late}, splits=["dev", "test"]),
        task_of_tasks(
            "Both", [sts_task("Early", {"default": early}), sts_task("Late", {"default": late})]
        ),
        sts_task("One", {"default": late}, splits=["dev", "test"]),
    ]
    outcome = score(tasks, tiny_model, encoder, tmp_path / "a.json")
    one, two = ours(encoder, early), ours(encoder, late)
    facts = {key: value for key, value in outcome.facts.items() if key != "mteb_version"}
    assert facts == pytest.approx(
        {
            "mteb.Many": (one + two) / 2,
            "mteb.Many.dev.en": one,
            "mteb.Many.dev.old": two,
            "mteb.Many.test.en": one,
            "mteb.Many.test.old": two,
            "mteb.One": two,
            "mteb.One.dev": two,
            "mteb.One.test": two,
            "mteb.Both": (one + two) / 2,
            "mteb.average": (one + two + two) / 3,
        },
        abs=2e-4,
    )
    average = facts["mteb.average"]
    assert outcome.summary == (
        f"kd: mteb Many {(one + two) / 2:.2f}, One {two:.2f}, Both {(one + two) / 2:.2f}, "
        f"average {average:.2f}"
    )


@pytest.mark.slow
def test_a_task_that_is_done_is_not_run_again(mteb, tiny_model, pairs, tmp_path):
    out = tmp_path / "kd.json"
    halves = {"en": part_of(pairs, 0, 20), "old": part_of(pairs, 20, 40)}
    tasks = [sts_task("First", {"default": pairs}), sts_task("Second", halves)]

    def seen(tasks, **settings):
        encoder = Counting(tiny_model, device=CPU, **settings)
        score(tasks, tiny_model, encoder, out)
        return encoder.texts_seen

    assert seen(tasks[:1]) == 80
    assert seen(tasks) == 80
    whole = out.read_bytes()
    out.unlink()
    assert seen(tasks) == 0
    assert out.read_bytes() == whole
    # Anything that a score is made from makes other scores.
    for other in ({"prompts": {"query": "amber: "}}, {"max_tokens": 9}, {"precision": "bf16"}):
        assert seen(tasks[:1], **other) == 80
    assert seen(tasks, batch_tokens=64) == 0

    results = sorted((tmp_path / "kd/results/teachonce__kd").glob("*/First.json"))
    assert len(results) == 4
    full = [json.loads(path.read_bytes())["scores"]["test"][0] for path in results]
    for scores in full:
        # The first by our own measure of likeness, the second by mteb's, which is the main score.
        assert scores["spearman"] == pytest.approx(scores["cosine_spearman"], abs=1e-4)
        assert scores["main_score"] == scores["cosine_spearman"] != 0


@pytest.mark.slow
def test_other_weights_of_the_same_name_are_another_model(mteb, tiny_model, pairs, tmp_path):
    other = load_model(tiny_model, device=CPU)
    with torch.no_grad():
        next(iter(other.parameters())).mul_(1.5)
    other.save(str(tmp_path / "other"), create_model_card=False)
    tasks = [sts_task("Pairs", {"default": pairs})]
    for folder in (tiny_model, tmp_path / "other"):
        encoder = Counting(folder, device=CPU)
        score(tasks, folder, encoder, tmp_path / "kd.json")
        assert encoder.texts_seen == 80


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("STSBENCHMARK", "choose STSBenchmark or"),
        ("Banking77Clasification", "choose Banking77Classification"),
        ("\x1b[31mqqqqqqqq", "choose a name from `mteb available-tasks`"),
    ],
)
def test_an_unknown_task_is_named_with_those_near_it(mteb, tiny_model, tmp_path, name, cure):
    said = message(TeachonceError, [name], tiny_model, None, tmp_path / "a.json")
    shown = name.replace("\x1b", "\\x1b")
    assert said.startswith(
        f"--mteb {shown}: mteb {mteb.__version__} has no such task\n  cure: {cure}"
    )


@pytest.mark.slow
def test_a_task_on_more_than_texts_is_refused(mteb, tiny_model, pairs, tmp_path):
    task = sts_task("Seen", {"default": pairs}, modalities=["text", "image", "audio"])
    assert message(TeachonceError, [task], tiny_model, None, tmp_path / "a.json") == (
        "--mteb Seen: it reads audio, image, not only texts\n  cure: choose a task on texts"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "data"),
    [
        ("STS12", "mteb/sts12-sts"),
        ("NFCorpus", "mteb/nfcorpus"),
        ("CQADupstackRetrieval", "mteb/CQADupstackAndroidRetrieval"),  # made of tasks
    ],
)
def test_data_out_of_reach_is_named(mteb, tiny_model, tmp_path, monkeypatch, task, data):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "empty")
    encoder = Encoder(tiny_model, device=CPU)
    assert message(MissingError, [task], tiny_model, encoder, tmp_path / "a.json") == (
        f"mteb task {task}: its data cannot be loaded: Couldn't reach '{data}' on the Hub "
        "(OfflineModeIsEnabled)\n"
        "  cure: run this where the hub can be reached, without HF_HUB_OFFLINE; later runs there find "
        "the data in the hub's cache ($HF_HOME, ~/.cache/huggingface), which may be copied"
    )
    assert not (tmp_path / "a.json").exists()


@pytest.mark.slow
def test_data_that_is_not_for_everybody_is_missed_aloud(mteb, tiny_model, pairs, tmp_path):
    task = sts_task("Secret", {"default": pairs}, public=False, there=False)
    said = message(
        MissingError, [task], tiny_model, Encoder(tiny_model, device=CPU), tmp_path / "a"
    )
    assert said.startswith(
        "mteb task Secret: its data cannot be loaded: Dataset 'nobody/pairs' doesn't exist on the Hub\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("nested", [False, True])
def test_an_error_after_loading_is_not_blamed_on_the_data(
    mteb, tiny_model, pairs, tmp_path, nested
):
    class Full(Encoder):
        def encode(self, texts, *, role="text"):
            raise RuntimeError("out of memory")

    task = sts_task("Pairs", {"default": pairs})
    if nested:
        task = task_of_tasks("Many", [task])
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        score([task], tiny_model, Full(tiny_model, device=CPU), tmp_path / "a.json")


@pytest.mark.slow
def test_a_broken_model_is_named(mteb, tiny_model, pairs, tmp_path):
    encoder, task = Broken(tiny_model, device=CPU), sts_task("Pairs", {"default": pairs})
    assert message(TeachonceError, [task], tiny_model, encoder, tmp_path / "a.json") == (
        f"kd: 40 of 40 vectors have NaN or Inf, the first that of {pairs.first[0]!r}\n"
        "  cure: train it again with a smaller learning_rate or with precision: fp32"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:An input array is constant"
)  # scipy's, of what the test is about
def test_a_model_that_gives_one_vector_is_named(mteb, tiny_model, pairs, tmp_path):
    encoder, task = Broken(tiny_model, device=CPU), sts_task("Pairs", {"default": pairs})
    encoder.number = 0.5
    assert message(TeachonceError, [task], tiny_model, encoder, tmp_path / "a.json") == (
        "kd: mteb's main score on Pairs is nan: a correlation with values all alike\n"
        "  cure: train it again with a smaller learning_rate: it gives all texts the same vector"
    )
    assert not (tmp_path / "a.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("left", ["", '{"task_na'])
def test_a_result_cut_off_by_a_kill_is_named(mteb, tiny_model, pairs, tmp_path, left):
    encoder, task = Encoder(tiny_model, device=CPU), sts_task("Pairs", {"default": pairs})
    score([task], tiny_model, encoder, tmp_path / "a.json")
    (result,) = tmp_path.glob("a/results/*/*/Pairs.json")
    result.write_text(left)
    assert message(DamagedError, [task], tiny_model, encoder, tmp_path / "a.json") == (
        f"{result}: not a whole result of mteb\n  cure: remove it and run the command again"
    )


def test_without_the_extra_its_installation_is_named(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    said = message(TeachonceError, ["STS12"], tiny_model, None, tmp_path / "a.json")
    assert said.startswith("--mteb: mteb cannot be imported: ")
    assert said.endswith('\n  cure: run `pip install "teachonce[mteb]"`')
