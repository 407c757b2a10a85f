"""What a pass will take before it is begun: time and space, from a sample of the corpus on this machine.

No stage of DVC: nothing is made, and nothing depends on what it says. It may look into the stages that it
plans, and runs their own code on a sample: the teacher, a student's steps, the tiles of mining. What it
says is sorted by how it is known: counted, measured here, or extrapolated from both.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stages import embed, mine
from stages.mining import filters
from stages.outcome import Outcome, clock, log, seconds_of
from stages.params import FINETUNED, TEACHER, FinetuneParams, MineParams, Params, RecipeParams
from stages.teaching.interface import TeacherOutput
from stages.teaching.sharing import TRANSFERS
from storage import embeddings, negatives
from storage.caches import Caches
from storage.column import KeyIndex, text_keys_of
from storage.corpus import Corpus, put_texts, text_key
from storage.embeddings import Embeddings, put_vectors, vectors_of
from storage.errors import DamagedError, MissingError, TeachonceError
from storage.manifest import Kind, Manifest, fingerprint
from storage.negatives import Negatives, put_negatives
from storage.remote import Remote
from storage.split import Split
from storage.store import Object, Store

if TYPE_CHECKING:
    import torch

SAMPLE_TEXTS = 16_384
FIRST_TEXTS = 4  # of the first call; a teacher may need seconds for each
CALLS = 8  # a call of the teacher takes about so much of the time that is given
WARM_STEPS = 2
MOST_STEPS = 50
FILTERED_ROWS = 2048
INDEX_ROWS = (4096, 16_384)  # an approximate index grows with its rows by more than their number
PARENT = "plan"  # of what a sample's student reads
CHARACTERS = 4  # of a token, in most languages that are written in letters
SPEED_READINGS = 8  # of the texts whose speed is measured, with the fixed workload
SPEED_SECONDS = 20.0  # but no more than this
OBJECT_BYTES = 1100  # of an Arrow file beside its rows


@dataclass(frozen=True)
class Load:
    """Texts that a model has to read.

    Args:
        texts: How many.
        characters: Of all of them, as far as they are read.
    """

    texts: int
    characters: int

    @classmethod
    def of(cls, texts: Iterable[str], max_tokens: int) -> Load:
        """Of texts that are cut at `max_tokens`, each taken for `CHARACTERS` long."""
        sizes = [min(len(text), CHARACTERS * max_tokens) for text in texts]
        return cls(len(sizes), sum(sizes))


@dataclass(frozen=True)
class Labelled:
    """What a finetuning has to read.

    Args:
        rows: Learned from.
        learned: Their texts.
        judged: The texts that are read at each evaluation.
    """

    rows: int
    learned: Load
    judged: Load


class Teacher(Protocol):
    """What is asked of a teacher."""

    device: str
    max_tokens: int
    in_windows: bool

    def lengths(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """(n,) tokens of n texts before cutting."""

    def encode_counted(self, texts: Sequence[str]) -> TeacherOutput:
        """Vectors of n texts, with counts."""


def run(
    params: Params,
    *,
    files: Mapping[str, str],
    corpus: Corpus,
    store: Store,
    remote: Remote | None,
    load_teacher: Callable[[], Teacher] | None,
    starts: Mapping[str, Path | None],
    labelled: Labelled | None,
    evaluation: Load | None,
    seconds: float,
    seed: int,
) -> Outcome:
    """Say what embed, mine, distill, finetune and evaluate will take here.

    Args:
        params: All settings.
        files: Name -> sha256 of the teacher's files.
        corpus: The texts.
        store: What it has of the teacher's vectors is not counted.
        remote: The same.
        load_teacher: Called once, and only if a text is not known; None if the teacher is not here.
        starts: Student -> the folder of its start; None where there is none yet.
        labelled: What students are finetuned on; None if none is, or it is not known.
        evaluation: The texts of all evaluation sets; None if they are not known.
        seconds: To measure the teacher; a student gets half of it. More where one call takes longer.
        seed: Of the sample.

    Raises:
        MissingError: texts are to be embedded, and there is no teacher to be measured.
        TeachonceError: what is to be planned cannot be done with these settings.
        RemoteError: the remote cannot be asked.
    """
    teacher = fingerprint(embed.recipe(params.embed, files))
    keys = embed.keys_of(teacher, corpus)
    lacking = lacking_shards(keys, store, remote)
    older = sorted(set(store.keys(f"vectors/{teacher}")) - set(keys)) if params.embed.reuse else []
    rows = unknown_rows(corpus, lacking, store, older)
    of_shards = sum(corpus.objects[shard].rows for shard in lacking)
    counted = {
        "texts": corpus.rows,
        "shards": len(keys),
        "shards_to_embed": len(lacking),
        "texts_to_embed": len(rows),
        "texts_to_reuse": of_shards - len(rows),
    }
    log.info("plan: %s of %s texts are to embed", f"{len(rows):,}", f"{corpus.rows:,}")
    measured: dict[str, Any] = {}
    extrapolated: dict[str, Any] = {"embed": {"tokens": 0, "seconds": 0.0}}
    if len(rows):
        at, vectors = teacher_rate(
            _loader(load_teacher, lacking),
            corpus.take(draw(rows, SAMPLE_TEXTS, seed=seed, in_order=False)),
            most=max(1, of_shards // len(lacking)),
            seconds=seconds,
        )
        measured["teacher"] = asdict(at)
        tokens = round(at.tokens_per_text * len(rows))
        extrapolated["embed"] = {
            "tokens": tokens,
            "seconds": at.load_seconds + tokens / at.tokens_per_second,
        }
    else:
        vectors = _vectors_known(store, remote, keys)
    dim = vectors.shape[1]
    extrapolated["embed"]["bytes"] = (
        of_shards * embeddings.row_bytes(dim, params.embed.storage) + len(lacking) * OBJECT_BYTES
    )

    from stages.models.devices import pick_device

    device = pick_device(params.device)
    extrapolated["mine"] = {
        "seconds": mining_seconds(
            params.mine,
            rows=_train_rows(params, corpus.rows),
            sample=vectors,
            itemsize=embeddings.as_read(_unit_vectors(1, 1), params.embed.storage).itemsize,
            device=device,
        ),
        "bytes": corpus.rows * negatives.row_bytes(params.mine.neighbours)
        + len(keys) * OBJECT_BYTES,
    }
    texts = corpus.take(draw(np.arange(corpus.rows), SAMPLE_TEXTS, seed=seed, in_order=True))
    measured["students"], extrapolated["students"] = {}, {}
    with tempfile.TemporaryDirectory(prefix="teachonce-plan-") as scratch:
        for name, start in starts.items():
            if start is None:
                continue
            recipe = params.recipes[params.students[name].recipe]
            caches = sampled_caches(
                params, texts, rows=corpus.rows, dim=dim, store=Store(Path(scratch)), recipe=recipe
            )
            steps = _steps(recipe, _train_rows(params, corpus.rows))
            pace = training_pace(
                recipe,
                start=start,
                caches=caches,
                device=device,
                steps=steps,
                seconds=seconds / 2,
                trust_remote_code=params.embed.trust_remote_code,
            )
            measured["students"][name] = {
                **asdict(pace),
                "steps_per_hour": 3600 / pace.step_seconds,
            }
            extrapolated["students"][name] = {
                "steps": steps,
                "seconds": pace.token_seconds * corpus.rows / len(texts)
                + steps * pace.step_seconds
                + (1 + math.ceil(steps / recipe.evaluate_every)) * pace.evaluation_seconds,
            }
    usual = Load.of(texts, params.embed.max_tokens)
    extrapolated["finetune"] = {
        name: _finetuning(params.finetune, labelled, measured["students"][name], recipe, usual)
        for name, recipe in recipes_of(params, params.finetune.students).items()
        if labelled is not None and name in measured["students"]
    }
    extrapolated["evaluate"] = (
        {}
        if evaluation is None
        else {
            model: _evaluating(seconds_a_text, evaluation, usual, params, corpus.rows)
            for model, seconds_a_text in _paces(params, measured).items()
        }
    )
    total = sum(
        found["seconds"]
        for found in (
            *(extrapolated[stage] for stage in ("embed", "mine")),
            *(
                part
                for stage in ("students", "finetune", "evaluate")
                for part in extrapolated[stage].values()
            ),
        )
    )
    return Outcome(
        stage="plan",
        made=store.root,
        summary=f"about {clock(total)} in all on this machine as busy as it is now; nothing was written",
        facts={
            "counted": counted,
            "measured": measured,
            "extrapolated": extrapolated,
            "starts_missing": {
                name: params.students[name].start for name, start in starts.items() if start is None
            },
        },
    )


def recipes_of(params: Params, students: Sequence[str]) -> dict[str, RecipeParams]:
    """Student -> recipe, for those that params.yaml names."""
    return {
        name: params.recipes[params.students[name].recipe]
        for name in students
        if name in params.students
    }


def _finetuning(
    params: FinetuneParams,
    labelled: Labelled,
    pace: Mapping[str, Any],
    recipe: RecipeParams,
    usual: Load,
) -> dict[str, Any]:
    """Steps and seconds of a finetuning: each as long as a step of distill, by the characters it reads."""
    a_text = usual.characters / usual.texts
    steps = _steps_of(params.epochs, params.batch_size, labelled.rows)
    read = min(params.batch_size, labelled.rows) * labelled.learned.characters / labelled.rows
    read += params.distill_rows * a_text if params.distill_weight else 0.0
    evaluations = 1 + math.ceil(steps / params.evaluate_every)
    of_texts = labelled.judged.characters / a_text * _seconds_a_text(pace)
    step_seconds = pace["step_seconds"] * read / (recipe.batch_size * a_text)
    return {"steps": steps, "seconds": steps * step_seconds + evaluations * of_texts}


def _evaluating(
    seconds_a_text: float, evaluation: Load, usual: Load, params: Params, rows: int
) -> dict[str, float]:
    """Seconds to read the evaluation sets and the rows held out, and to measure the speed."""
    texts = evaluation.characters / (usual.characters / usual.texts)
    texts += rows - _train_rows(params, rows)
    speed = min(SPEED_READINGS * params.evaluate.speed_texts * seconds_a_text, SPEED_SECONDS)
    return {"seconds": texts * seconds_a_text + speed}


def _paces(params: Params, measured: Mapping[str, Any]) -> dict[str, float]:
    """Model -> seconds that it takes to read a text of the corpus, for all that were measured."""
    students = {name: _seconds_a_text(pace) for name, pace in measured["students"].items()}
    of_teacher = (
        {TEACHER: 1 / measured["teacher"]["texts_per_second"]} if "teacher" in measured else {}
    )
    # A start is as large as its students.
    starts = {params.students[name].start: pace for name, pace in students.items()}
    finetuned = {
        f"{name}{FINETUNED}": students[name]
        for name in params.finetune.students
        if name in students
    }
    return of_teacher | starts | students | finetuned


def _seconds_a_text(pace: Mapping[str, Any]) -> float:
    seconds: float = pace["evaluation_seconds"] / pace["evaluated"]
    return seconds


def lacking_shards(keys: Sequence[str], store: Store, remote: Remote | None) -> list[int]:
    """Which shards neither the store nor the remote has. Headers are read, no values.

    Raises:
        DamagedError, StorageError: of the store.
        RemoteError: the remote cannot be asked.
    """

    def has(place: Store | Remote, key: str) -> bool:
        try:
            return (place.header(key) if isinstance(place, Store) else place.find(key)) is not None
        except MissingError:
            return False
        except DamagedError:
            if isinstance(place, Store):
                raise
            return False  # embed does not take it either

    lacking = [shard for shard, key in enumerate(keys) if not has(store, key)]
    if remote is None:
        return lacking
    with ThreadPoolExecutor(TRANSFERS) as pool:
        there = list(pool.map(lambda shard: has(remote, keys[shard]), lacking))
    return [shard for shard, found in zip(lacking, there, strict=True) if not found]


def unknown_rows(
    corpus: Corpus, shards: Sequence[int], store: Store, older: Sequence[str]
) -> NDArray[np.int64]:
    """(n,) ids of the rows of `shards` whose texts stand in none of the `older` vectors, ascending."""
    if not shards:
        return np.empty(0, np.int64)
    rows = np.concatenate([np.arange(*corpus.starts[shard : shard + 2]) for shard in shards])
    if not older:
        return rows
    index = KeyIndex(corpus.text_keys_in(shards))
    known = np.zeros(len(rows), bool)
    for key in older:
        try:
            places = index.places(text_keys_of(store.glance(key)))
        except TeachonceError:
            continue  # embed takes nothing from it either, and says why
        known[places[places >= 0]] = True
    return rows[~known]


def draw(rows: NDArray[np.int64], count: int, *, seed: int, in_order: bool) -> NDArray[np.int64]:
    """At most `count` distinct of (n,) rows, all alike likely; ascending, or in a random order."""
    chosen = np.random.default_rng(seed).permutation(rows)[:count]
    return np.sort(chosen) if in_order else chosen


@dataclass(frozen=True)
class TeacherRate:
    """What a teacher does with a sample.

    Args:
        device: Where, by name.
        dim: Values of a vector.
        max_tokens: Longer texts are cut, or read in windows.
        texts: In the sample; all of them were tokenised.
        tokens_per_text: Read.
        truncated: Share of the texts that are longer, 0 to 1.
        load_seconds: Until it was there, imports included.
        encoded: Texts that were encoded while the clock ran, after a warm-up.
        seconds: What that took.
        tokens_per_second: Of these texts.
        texts_per_second: Of these texts.
    """

    device: str
    dim: int
    max_tokens: int
    texts: int
    tokens_per_text: float
    truncated: float
    load_seconds: float
    encoded: int
    seconds: float
    tokens_per_second: float
    texts_per_second: float


def teacher_rate(
    load_teacher: Callable[[], Teacher], texts: Sequence[str], *, most: int, seconds: float
) -> tuple[TeacherRate, NDArray[np.float32]]:
    """Load a teacher and measure it; also the vectors that it made, one or more.

    Calls are as large as a shard, or smaller where time is short: texts of a call are sorted by length
    and cut into batches, so small calls are slower. Whatever is encoded to find that size is the warm-up.

    Args:
        load_teacher: Called once.
        texts: The sample in random order, one or more.
        most: Texts of a call.
        seconds: To encode; the last call may go beyond.
    """
    started = time.perf_counter()
    teacher = load_teacher()
    load_seconds = time.perf_counter() - started
    lengths = teacher.lengths(texts)
    cut = np.minimum(lengths, teacher.max_tokens)
    read = lengths if teacher.in_windows else cut
    most = min(most, len(texts))
    size = min(FIRST_TEXTS, most)
    while (
        seconds_of(partial(teacher.encode_counted, texts[:size])) < seconds / CALLS and size < most
    ):
        size = min(2 * size, most)
    log.info("plan: measuring the teacher, %s texts a call", f"{size:,}")
    tokens = encoded = 0
    parts = []
    taken = 0.0
    while taken < seconds and encoded < len(texts):
        some = texts[encoded : encoded + size]
        started = time.perf_counter()
        made = teacher.encode_counted(some)
        taken += time.perf_counter() - started
        tokens, encoded = tokens + made.tokens, encoded + len(some)
        parts.append(made.vectors)
    vectors = np.concatenate(parts)
    rate = TeacherRate(
        device=teacher.device,
        dim=vectors.shape[1],
        max_tokens=teacher.max_tokens,
        texts=len(texts),
        tokens_per_text=float(read.mean()),
        truncated=float((lengths > cut).mean()),
        load_seconds=load_seconds,
        encoded=encoded,
        seconds=taken,
        tokens_per_second=tokens / taken,
        texts_per_second=encoded / taken,
    )
    return rate, vectors


def mining_seconds(
    params: MineParams,
    *,
    rows: int,
    sample: NDArray[np.floating],
    itemsize: int,
    device: torch.device,
) -> float:
    """Seconds to search all of `rows` rows and to filter what is found.

    Exact search is extrapolated from a sample as mining itself does it, an approximate index from two
    small ones of random vectors, which knows nothing of a cache that is too small: rather too little.

    Args:
        params: Of the stage.
        rows: How many take part.
        sample: (m, dim) vectors of the teacher; where they are few, random ones stand for them.
        itemsize: Bytes of a value as it is stored.
        device: As in the settings.
    """
    import torch

    from stages.mining.self_join import flat_cost, join_cost, sample_rows_for

    if not rows:
        return 0.0
    dim = sample.shape[1]
    index = mine.resolve(params, rows=rows, dim=dim, device=device)
    k = min(params.range_max + 1, rows)
    filtering = rows * _filtering_seconds(params, k)
    where = device if device.type in mine.EXACT_ROWS else torch.device("cpu")
    if len(sample) < sample_rows_for(k, where):
        sample = _unit_vectors(sample_rows_for(k, where), dim)
    if index is not None:
        tried = flat_cost(sample, k, where).seconds_for(rows, asked=min(rows, mine.RECALL_ROWS))
        return filtering + tried + rows * _index_seconds(index, rows=rows, k=k, dim=dim)
    started = time.perf_counter()
    flat = flat_cost(sample, k, where).seconds_for(rows, asked=rows)
    memory = params.memory_mb << 20
    if not mine.may_join(rows, k, dim, itemsize=itemsize, memory=memory, device=where):
        return filtering + flat
    join = join_cost(sample, k, where).seconds_for(rows)
    estimating = time.perf_counter() - started  # mining does it, too, before it chooses
    return filtering + estimating + min(join, flat)


def _filtering_seconds(params: MineParams, k: int) -> float:
    """Seconds a row to choose negatives among k neighbours."""
    found = np.random.default_rng(0).integers(FILTERED_ROWS, size=(FILTERED_ROWS, k))
    cosines = np.full(found.shape, 0.5, np.float32)
    own = np.arange(FILTERED_ROWS)
    text_keys = np.random.default_rng(0).bytes(16 * FILTERED_ROWS)

    def choose() -> None:
        rejected = filters.reject(
            params, found, cosines, own=own, text_keys=np.frombuffer(text_keys, "V16")
        )
        allowed = ~np.logical_or.reduce(list(rejected.values()))
        filters.keep_first(found, cosines, allowed, params.neighbours)

    return min(seconds_of(choose) for _ in range(3)) / FILTERED_ROWS


def _index_seconds(index: Mapping[str, Any], *, rows: int, k: int, dim: int) -> float:
    """Seconds a row to build an approximate index and to ask it: a line through two over log(rows)."""
    from stages.mining.faiss_search import ApproximateSearch

    vectors = _unit_vectors(max(INDEX_ROWS), dim)
    per_row = []
    for count in INDEX_ROWS:

        def build_and_ask(count: int = count) -> None:
            search = ApproximateSearch(lambda ids: vectors[ids], count, min(k, count), index=index)
            search.nearest(np.arange(count))

        per_row.append(seconds_of(build_and_ask) / count)
    slope = max(0.0, (per_row[1] - per_row[0]) / math.log(INDEX_ROWS[1] / INDEX_ROWS[0]))
    return per_row[1] + slope * math.log(max(1.0, rows / INDEX_ROWS[1]))


def sampled_caches(
    params: Params, texts: Sequence[str], *, rows: int, dim: int, store: Store, recipe: RecipeParams
) -> Caches:
    """Caches as a student will find them, but of a sample and with random vectors and neighbours.

    Args:
        params: All settings.
        texts: Some of the corpus, in its order.
        rows: Of the whole corpus: as many rows are held out here as are looked at there.
        dim: Of a vector.
        store: A store for nothing else.
        recipe: Whether there are neighbours.
    """
    from stages.vectors import MOST_ROWS

    count = len(texts)
    objects = [put_texts(store, [(text, text_key(text)) for text in texts])]
    corpus = Corpus(store, _manifest("corpus", objects))
    text_keys = text_keys_of(corpus.batch(0))
    entry = put_vectors(
        store,
        embed.keys_of(fingerprint({}), corpus)[0],
        vectors=_unit_vectors(count, dim),
        text_keys=text_keys,
        storage=params.embed.storage,
        facts={},
    )
    vectors = Embeddings(store, _manifest("embeddings", [entry]), corpus)
    looked_at = min(MOST_ROWS, rows * params.split.heldout)
    split = Split(
        corpus=corpus.manifest.content, heldout=min(0.5, looked_at / count), evaluation=()
    )
    mined = None
    if recipe.reads_neighbours:
        shape = (count, params.mine.neighbours)
        entry = put_negatives(
            store,
            f"negatives/{fingerprint({'parent': PARENT})}/000000.arrow",
            neighbours=np.random.default_rng(0).integers(count, size=shape),
            scores=np.zeros(shape, np.float32),
            text_keys=text_keys,
            facts={},
        )
        manifest = _manifest("negatives", [entry])
        mined = Negatives(store, manifest, corpus, mined_from=PARENT)
    return Caches(corpus, vectors, mined, split, store)


@dataclass(frozen=True)
class Pace:
    """What a student does with a sample.

    Args:
        steps: Taken while the clock ran, after a warm-up.
        step_seconds: Of one.
        evaluation_seconds: Of one.
        evaluated: Texts that one reads.
        token_seconds: To make the token ids of the sample; next to nothing if another student has them.
    """

    steps: int
    step_seconds: float
    evaluation_seconds: float
    evaluated: int
    token_seconds: float


def training_pace(
    params: RecipeParams,
    *,
    start: Path,
    caches: Caches,
    device: torch.device,
    steps: int,
    seconds: float,
    trust_remote_code: bool = False,
) -> Pace:
    """Take some of the first steps of a student.

    Args:
        params: Recipe.
        start: Folder of the start.
        caches: What is learned from.
        device: Where.
        steps: Of the whole run.
        seconds: To take steps; the last may go beyond.
        trust_remote_code: Whether code in the folder of the start may run.
    """
    import torch

    from stages.distill import prepare
    from stages.learning.loop import make_optimizer, take_step
    from stages.learning.token_rows import token_rows
    from stages.models.devices import pick_precision
    from stages.models.loading import load_model

    params = params.model_copy(update={"precision": pick_precision(params.precision, device)})
    trusted = trust_remote_code
    tokenizer = load_model(start, device=device, trust_remote_code=trusted).tokenizer
    token_seconds = seconds_of(
        lambda: token_rows(
            tokenizer,
            start,
            corpus=caches.corpus,
            store=caches.store,
            max_tokens=params.max_tokens,
        )
    )
    lesson = prepare(params, start=start, caches=caches, device=device, trust_remote_code=trusted)
    work, optimizer = lesson.setup(), make_optimizer(lesson, params)
    batches = work.batches(0)
    taken: list[float] = []

    def step() -> None:
        number = len(taken)
        take_step(lesson, optimizer, work, batches[number % len(batches)], number, steps, params)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    while len(taken) < WARM_STEPS + MOST_STEPS:
        taken.append(seconds_of(step))
        if len(taken) > WARM_STEPS and sum(taken[WARM_STEPS:]) > seconds:
            break
    lesson.eval()
    return Pace(
        steps=len(taken) - WARM_STEPS,
        step_seconds=float(np.mean(taken[WARM_STEPS:])),
        evaluation_seconds=seconds_of(work.score),
        evaluated=len(lesson.heldout),
        token_seconds=token_seconds,
    )


def _loader(load_teacher: Callable[[], Teacher] | None, shards: list[int]) -> Callable[[], Teacher]:
    if load_teacher is None:
        raise MissingError(
            "embed.teacher",
            f"{len(shards)} shards are to embed and the teacher is not on this machine, so it cannot be "
            "measured",
            "run `teachonce plan` where the teacher is",
        )
    return load_teacher


def _vectors_known(
    store: Store, remote: Remote | None, keys: Sequence[str]
) -> NDArray[np.floating]:
    """(m, dim) vectors of a shard that is there."""
    for key in keys:
        try:
            return vectors_of(store.glance(key))
        except MissingError:
            continue
    raise MissingError(
        "plan", "all vectors are on the remote", "run `teachonce embed`, which takes them, first"
    )


def _train_rows(params: Params, rows: int) -> int:
    """How many rows train: those found in evaluation sets are few."""
    return round(rows * (1 - params.split.heldout))


def _steps(params: RecipeParams, rows: int) -> int:
    return _steps_of(params.epochs, params.batch_size, rows)


def _steps_of(epochs: int, batch_size: int, rows: int) -> int:
    return epochs * max(1, rows // min(batch_size, max(rows, 1)))


def _manifest(kind: Kind, objects: Sequence[Object]) -> Manifest:
    return Manifest(kind=kind, recipe={}, parent=PARENT, objects=tuple(objects))


def _unit_vectors(rows: int, dim: int) -> NDArray[np.float32]:
    vectors = np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors
