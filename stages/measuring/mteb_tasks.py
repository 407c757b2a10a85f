"""Model -> scores on tasks of mteb, by mteb's own loaders, protocol and formulas.

Not a stage of dvc.yaml: the data sets come from a model hub, or from its cache on this machine, so no
file of the project says what they are; mteb pins a revision of each. The model reads them as in all our
evaluation: the teacher behind the prompts of the settings, a student behind those that it was trained with,
a start without any. Other prompts that a model keeps for roles or for single tasks of mteb are not used. On
the same texts mteb and `evaluate` agree: all-MiniLM-L6-v2 has 72.3676 on STS12 by both.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stages.measuring.metrics import check_finite
from stages.models.folder import file_hashes, sha256_of
from stages.outcome import Fact, Outcome, log, write_json
from storage.errors import DamagedError, MissingError, TeachonceError, first_line, shown
from storage.store import canonical_json

if TYPE_CHECKING:
    from mteb import AbsTask

    from stages.models.encoder import Encoder
    from storage.roles import Role

VERSION = 2  # raise it when a code change alters the scores of the same model

INSTALL = 'run `pip install "teachonce[mteb]"`'
SUGGESTIONS = 3


def run(
    tasks: Sequence[str | AbsTask],
    *,
    name: str,
    folder: Path,
    load_encoder: Callable[[], Encoder],
    out: Path,
) -> Outcome:
    """Score the model `name` on tasks of mteb; write flat scores x 100 to `out`.

    `mteb.TASK` is the task's main score, the mean over its splits and subsets, which stand beside it as
    `mteb.TASK.SPLIT.SUBSET` if there are several; `mteb.average` is the mean over `tasks`. mteb's full
    results stand below the folder `out` without its suffix, by a digest of everything that they were made
    from: a task that is there is not run again, so a killed run goes on.

    Args:
        tasks: At least one; names that mteb knows, or task objects for local data. An object is identified
            by the name in its metadata alone: give other data another name.
        name: Name of the model.
        folder: Folder of the model.
        load_encoder: Loads that model; called after all task names were checked.
        out: JSON file to write.

    Raises:
        TeachonceError: mteb is not installed, has no such task, the task reads more than texts, or the
            model gives NaN or Inf.
        MissingError: the data set of a task is neither here nor can it be fetched.
        DamagedError: a result of an earlier run cannot be read.
    """
    mteb = _mteb()
    chosen = {task.metadata.name: task for task in _task_objects(mteb, tasks)}
    model = _MtebModel(name, folder, load_encoder(), mteb.__version__)
    cache = mteb.ResultCache(out.with_suffix(""))
    scores: dict[str, dict[str, float]] = {}
    for key, task in chosen.items():
        log.info("evaluate: %s, mteb %s", name, key)
        scores[key] = _parts(_result(mteb, model, task, cache))
    facts = {**_flat(name, scores), "mteb_version": mteb.__version__}
    write_json(out, facts)
    return Outcome("evaluate", out, _summary(name, facts, chosen), facts)


class _MtebModel:
    """Our encoder behind mteb's `EncoderProtocol`: batching and prompts stay ours."""

    def __init__(self, name: str, folder: Path, encoder: Encoder, mteb_version: str) -> None:
        from mteb.models.model_meta import ModelMeta

        self.name, self.encoder = name, encoder
        made_from = {
            "version": VERSION,
            "mteb": mteb_version,
            "files": file_hashes(folder, address=name, sha256=sha256_of),
            "max_tokens": encoder.max_tokens,
            "precision": encoder.precision,
            "prompt": encoder.prompt,
            # Only if they differ, so that results of before there were roles keep their place.
            **({"prompts": encoder.prompts} if len(set(encoder.prompts.values())) > 1 else {}),
        }
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": f"teachonce/{name}",
                "revision": hashlib.sha256(canonical_json(made_from)).hexdigest()[:40],
                "n_parameters": encoder.parameters,
            }
        )

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        prompt_type: Any = None,  # noqa: ANN401 - mteb's PromptType
        **_: Any,  # noqa: ANN401 - which task it is and how to batch it: nothing to us
    ) -> NDArray[np.float32]:
        """(n, dim) vectors of the n texts in all batches of `inputs`.

        Raises:
            TeachonceError: a vector has NaN or Inf; in most formulas it would become a traceback.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        role: Role = "text" if prompt_type is None else prompt_type.value
        vectors = self.encoder.encode(texts, role=role)
        check_finite(self.name, vectors, texts)
        return vectors

    def similarity(self, first: Any, second: Any) -> Any:  # noqa: ANN401 - arrays or tensors
        """(n, m) cosines of (n, dim) and (m, dim) vectors."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(first, second)

    def similarity_pairwise(self, first: Any, second: Any) -> Any:  # noqa: ANN401 - as above
        """(n,) cosines of two times (n, dim) vectors."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(first, second)


def _mteb() -> Any:  # noqa: ANN401 - the module, which need not be installed
    try:
        import mteb
    except ImportError as error:
        raise TeachonceError(
            "--mteb", f"mteb cannot be imported: {shown(error)}", INSTALL
        ) from None
    return mteb


def _task_objects(mteb: Any, tasks: Sequence[str | AbsTask]) -> list[AbsTask]:  # noqa: ANN401 - the module
    """Returns the tasks as objects; raises for a task that reads more than texts."""
    objects = [_named(mteb, task) if isinstance(task, str) else task for task in tasks]
    for task in objects:
        others = sorted(set(task.metadata.modalities) - {"text"})
        if others:
            raise TeachonceError(
                f"--mteb {task.metadata.name}",
                f"it reads {', '.join(others)}, not only texts",
                "choose a task on texts",
            )
    return objects


def _named(mteb: Any, name: str) -> AbsTask:  # noqa: ANN401 - the module
    try:
        task: AbsTask = mteb.get_task(name)
    except KeyError:
        # mteb's own suggestion is blind to case, the commonest mistake: STSbenchmark for STSBenchmark.
        everything = mteb.get_tasks(exclude_superseded=False, exclude_private=False)
        names = {task.metadata.name.casefold(): task.metadata.name for task in everything}
        near = difflib.get_close_matches(name.casefold(), names, n=SUGGESTIONS)
        raise TeachonceError(
            f"--mteb {shown(name)}",
            f"mteb {mteb.__version__} has no such task",
            f"choose {' or '.join(names[key] for key in near)}"
            if near
            else "choose a name from `mteb available-tasks`",
        ) from None
    return task


def _result(mteb: Any, model: _MtebModel, task: AbsTask, cache: Any) -> Any:  # noqa: ANN401 - of mteb
    """The result of one task, from an earlier run if there is one."""
    meta, key = model.mteb_model_meta, task.metadata.name
    try:
        cache.load_task_result(key, meta)
    except ValueError as error:  # no JSON, or not the JSON of a result
        path = cache.get_task_result_path(model_name=meta, task_name=key)
        raise DamagedError(
            path, "not a whole result of mteb", "remove it and run the command again"
        ) from error
    try:
        # Data that is missing is an error for tasks of private data too; by default they would be skipped.
        done = mteb.evaluate(
            model, task, cache=cache, show_progress_bar=False, co2_tracker=False, public_only=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        # A task made of tasks loads their data, not its own.
        parts: Sequence[AbsTask] = getattr(task.metadata, "tasks", [task])
        if any(part.data_loaded for part in parts):
            raise
        raise MissingError(
            f"mteb task {key}",
            f"its data cannot be loaded: {first_line(error)}",
            "run this where the hub can be reached, without HF_HUB_OFFLINE; later runs there find the "
            "data in the hub's cache ($HF_HOME, ~/.cache/huggingface), which may be copied",
        ) from error
    return done.task_results[0]


def _parts(result: Any) -> dict[str, float]:  # noqa: ANN401 - a TaskResult of mteb
    """Split and subset -> main score x 100; four decimals, since mteb's files keep no more."""
    return {
        split if entry["hf_subset"] == "default" else f"{split}.{entry['hf_subset']}": round(
            100 * float(entry["main_score"]), 4
        )
        for split, entries in result.scores.items()
        for entry in entries
    }


def _flat(name: str, scores: Mapping[str, Mapping[str, float]]) -> dict[str, Fact]:
    """All scores by flat keys."""
    facts: dict[str, Fact] = {}
    means: list[float] = []
    for task, parts in scores.items():
        means.append(round(statistics.fmean(parts.values()), 4))
        if not math.isfinite(means[-1]):
            raise TeachonceError(
                name,
                f"mteb's main score on {task} is {means[-1]}: a correlation with values all alike",
                "train it again with a smaller learning_rate: it gives all texts the same vector",
            )
        facts[f"mteb.{task}"] = means[-1]
        if len(parts) > 1:
            facts |= {f"mteb.{task}.{part}": score for part, score in parts.items()}
    facts["mteb.average"] = round(statistics.fmean(means), 4)
    return facts


def _summary(name: str, facts: Mapping[str, Fact], tasks: Iterable[str]) -> str:
    scores = [f"{task} {facts[f'mteb.{task}']:.2f}" for task in tasks]
    if len(scores) > 1:
        scores.append(f"average {facts['mteb.average']:.2f}")
    return f"{name}: mteb {', '.join(scores)}"
