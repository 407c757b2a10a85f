"""A project from Python: what its stages left, by row id, as arrays, datasets and models.

`import teachonce` re-exports what stands here. Nothing heavy is imported at the top: pyarrow comes with
the first project that is opened, torch with the first dataset or model.

This file is long because every public method has its shapes, errors and an example in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.by_row import Ids, NeighbourLists, Roles, Texts, Vectors, row_ids
from storage.errors import MissingError, TeachonceError, shown
from storage.roles import Role

if TYPE_CHECKING:
    import datasets
    from sentence_transformers import SentenceTransformer

    from pipeline.workspace import Workspace
    from stages.learning.row_datasets import CachedRows
    from stages.params import Params
    from stages.teaching.interface import Encode
    from storage.corpus import Corpus
    from storage.embeddings import Embeddings
    from storage.negatives import Negatives
    from storage.split import Split

Part = Literal["train", "heldout", "evaluation", "all"]
"""What rows are for: training; measuring agreement with the teacher; found in an evaluation set; every
row."""


def open(path: str | Path) -> Project:
    """Open a project: a folder in which the stages ran, or in which they are to run.

    Nothing is read but params.yaml. Texts, vectors and models are opened when they are first asked for.

    Args:
        path: The folder that has a params.yaml, or that file.

    Returns:
        The project.

    Raises:
        MissingError: There is no params.yaml.
        SettingsError: Lists all that is wrong in params.yaml.

    Examples:
        >>> project = teachonce.open("~/my-project")
        >>> len(project.texts)
        20000
    """
    return Project(path)


class Project:
    """What the stages of a project left, by row id.

    A row id is the place of a text in the corpus: row 5 has the text `texts[5]`, the teacher's vector
    `vectors[5]` and the mined neighbours `neighbours[5]`. Files are memory-mapped, and each is checked
    against the sha256 of its manifest when it is first mapped.

    A project keeps what it opened. Open it again after a stage ran.

    Args:
        path: The folder that has a params.yaml, or that file.

    Raises:
        MissingError: There is no params.yaml.
        SettingsError: Lists all that is wrong in params.yaml.

    Examples:
        >>> project = teachonce.open("path/to/project")
        >>> project.texts[5]
        'Ember garden needle oyster.'
        >>> project.texts[project.neighbours[5].ids]
        ['Ember garden needle.', 'Garden oyster silver.']
    """

    def __init__(self, path: str | Path) -> None:
        self._workspace = _workspace(Path(path).expanduser().resolve())

    def __getstate__(self) -> dict[str, Any]:
        """Returns what is pickled: all but the teacher, which another process loads when it needs it."""
        return {name: value for name, value in vars(self).items() if name != "teacher"}

    def __repr__(self) -> str:
        return f"teachonce.open({str(self.root)!r})"

    @property
    def root(self) -> Path:
        """The folder that has params.yaml, as an absolute path."""
        return self._workspace.at.root

    @property
    def params(self) -> Params:
        """The settings of params.yaml, such as `project.params.embed.teacher`."""
        return self._workspace.params

    @cached_property
    def texts(self) -> Texts:
        """The texts of the corpus, by row id.

        Raises:
            MissingError: `shard` did not run yet.
            DamagedError: data/corpus.json is not what `shard` left.

        Examples:
            >>> project.texts[5]
            'Ember garden needle oyster.'
            >>> project.texts[5:7]
            ['Ember garden needle oyster.', 'Silver tunnel.']
        """
        return Texts(self._corpus)

    @cached_property
    def roles(self) -> Roles:
        """The roles of the texts, by row id; "text" for all of a corpus that names no others.

        Raises:
            MissingError: `shard` did not run yet.
            DamagedError: data/corpus.json is not what `shard` left.

        Examples:
            >>> project.roles[5]
            'query'
            >>> project.teacher.encode(project.texts[5], project.roles[5])
        """
        return Roles(self._corpus)

    @cached_property
    def vectors(self) -> Vectors:
        """The teacher's vectors, by row id: float32, whatever type they are stored in.

        Raises:
            MissingError: `embed` did not run yet.
            DamagedError: data/embeddings.json is not what `embed` left, or is that of another corpus.

        Examples:
            >>> project.vectors[[5, 9]].shape
            (2, 384)
        """
        return Vectors(self._embeddings)

    @cached_property
    def neighbours(self) -> NeighbourLists:
        """The mined neighbours of each row, by row id: hard negatives for a contrastive loss.

        Rows that are not for training have empty lists, and stand in none.

        Raises:
            MissingError: `mine` did not run yet.
            DamagedError: data/negatives.json is not what `mine` left, or was mined from other vectors.

        Examples:
            >>> ids, scores = project.neighbours[5]
            >>> project.texts[ids[0]], scores[0]
            ('Ember garden needle.', 0.873)
        """
        return NeighbourLists(self._negatives)

    def rows(self, part: Part = "train") -> NDArray[np.int64]:
        """The ids of the rows that are for something.

        Args:
            part: "train": what a student may learn from. "heldout": kept from training, to measure
                agreement with the teacher. "evaluation": found in an evaluation set. "all": every row. A
                row is in exactly one of the first three.

        Returns:
            (n,) int64 row ids, ascending.

        Raises:
            MissingError: `shard` did not run yet; or `split`, which "all" does not ask for.
            TeachonceError: There is no such part.

        Examples:
            >>> held_out = project.rows("heldout")
            >>> project.vectors[held_out].shape
            (600, 384)
        """
        if part == "all":
            return np.arange(self._corpus.rows)
        if part == "train":
            return self._split.train_rows(self._corpus)
        if part == "heldout":
            return self._split.heldout_rows(self._corpus)
        if part == "evaluation":
            return np.array(self._split.evaluation, np.int64)
        raise TeachonceError(
            f"rows({shown(repr(part))})", "no such part", "say train, heldout, evaluation or all"
        )

    def dataset(self, rows: Part | Ids = "train", *, neighbours: bool = True) -> CachedRows:
        """Rows as a map-style dataset for a training loop of your own in PyTorch.

        An item is a dict: `id` (the row id), `text`, `vector` (dim,) float32, `neighbours` (k,) int64 and
        `scores` (k,) float32; k is `mine.neighbours`, and shorter lists end in id -1 and score 0. Of a
        corpus with roles, `role` stands beside `text`. The
        workers of a `DataLoader`, forked or spawned, read the same files; spawned ones map and check them
        anew.

        Args:
            rows: Which rows, in which order: a part, as in `rows()`, or row ids. Without it, those for
                training: a student that learns from the others cannot be measured by them.
            neighbours: False leaves `neighbours` and `scores` out, so that `mine` need not have run.

        Returns:
            A `torch.utils.data.Dataset`.

        Raises:
            MissingError: A stage did not run yet.
            RowError: An id of no row.

        Examples:
            >>> loader = DataLoader(project.dataset(), batch_size=64, shuffle=True, num_workers=2)
            >>> next(iter(loader))["vector"].shape
            torch.Size([64, 384])
        """
        from stages.learning.row_datasets import CachedRows

        return CachedRows(
            self._corpus, self._embeddings, self._negatives if neighbours else None, self._ids(rows)
        )

    def to_datasets(self, rows: Part | Ids = "train", *, negatives: int = 0) -> datasets.Dataset:
        """Rows as a `datasets.Dataset` that `SentenceTransformerTrainer` takes as it is.

        Columns: `id` (the row id), `role` if the corpus has other roles than `text`, `text`, and `label`
        (dim,) float32, the teacher's vector. With
        `negatives`, also `negative_1`, `negative_2` and so on: the texts of the nearest mined neighbours,
        nearest first. The trainer would read `id` and `role` as texts, so the dataset's format hides them:
        `dataset[0]` has the other columns, `dataset.with_format(None)["id"]` has the ids.

        Vectors stored as float32 stay in their files; of other types all are held in memory as float32.

        Args:
            rows: Which rows, in which order: a part, as in `rows()`, or row ids. Without it, those for
                training: a student that learns from the others cannot be measured by them.
            negatives: Texts of neighbours a row, 0 to `mine.neighbours`. Rows that have fewer are left out.

        Returns:
            The dataset: for `MSELoss` without negatives. With them, `remove_columns("label")` suits losses
            that compare texts alone.

        Raises:
            MissingError: A stage did not run yet.
            RowError: An id of no row.
            TeachonceError: More negatives than were mined, or fewer than none.

        Examples:
            >>> student = SentenceTransformer("path/to/a/student")
            >>> trainer = SentenceTransformerTrainer(
            ...     model=student, train_dataset=project.to_datasets(), loss=MSELoss(student)
            ... )
            >>> trainer.train()
        """
        from stages.learning.row_datasets import to_datasets

        return to_datasets(
            self._corpus,
            self._embeddings,
            self._negatives if negatives else None,
            self._ids(rows),
            negatives=negatives,
        )

    @cached_property
    def teacher(self) -> TeacherModel:
        """The teacher, which reads texts exactly as `embed` does; loaded when it is first asked for.

        Raises:
            MissingError: The teacher is not on this machine.
            TeachonceError: The teacher cannot be loaded, or leaves something undecided.

        Examples:
            >>> project.teacher.encode(["A text.", "Another one."]).shape
            (2, 384)
        """
        return TeacherModel(self._workspace.load_teacher())

    def student(self, name: str) -> SentenceTransformer:
        """A trained model, or a start, as `sentence-transformers` loads it, on the device of params.yaml.

        Args:
            name: A name of `students`, such as "kd"; "kd-finetuned" after `finetune`; or a name of
                `starts`. A folder of models/ need not be named in params.yaml.

        Returns:
            The model in float32, in evaluation mode.

        Raises:
            MissingError: There is no such model yet; the error says which command makes it.
            TeachonceError: The model cannot be loaded.

        Examples:
            >>> project.student("kd").encode(["A text."]).shape
            (1, 384)

            A student with `prompts: teacher` reads queries and documents each behind their prompt:

            >>> project.student("kd").encode_query(["What is asked?"]).shape
            (1, 384)
        """
        from stages.models.devices import pick_device
        from stages.models.loading import load_model
        from stages.params import TEACHER

        if name == TEACHER:
            raise TeachonceError(TEACHER, "is no student", "use `project.teacher`")
        return load_model(
            self._workspace.model_folder(name),
            device=pick_device(self.params.device),
            trust_remote_code=self.params.embed.trust_remote_code,
        ).eval()

    @cached_property
    def _corpus(self) -> Corpus:
        return self._workspace.corpus()

    @cached_property
    def _embeddings(self) -> Embeddings:
        return self._workspace.embeddings(self._corpus)

    @cached_property
    def _negatives(self) -> Negatives:
        return self._workspace.negatives(self._embeddings, self._split, self._corpus)

    @cached_property
    def _split(self) -> Split:
        return self._workspace.split(self._corpus)

    def _ids(self, rows: Part | Ids) -> NDArray[np.int64]:
        """(n,) row ids of a part, or those that are given."""
        if isinstance(rows, str):
            return self.rows(rows)
        return np.atleast_1d(row_ids(rows, self._corpus.rows, "rows"))


class TeacherModel:
    """The teacher of a project: prompts, length, pooling and width are those of `embed`.

    Examples:
        >>> cached = project.vectors[5]
        >>> abs(project.teacher.encode(project.texts[5]) - cached).max() < 1e-6
        True
    """

    def __init__(self, encode: Encode) -> None:
        self._encode = encode

    def encode(self, texts: str | Sequence[str], role: Role = "text") -> NDArray[np.float32]:
        """The vectors that `embed` would store of these texts, before it rounds them to `embed.storage`.

        Args:
            texts: One text, or several.
            role: What they are for the teacher: "text", "query" or "document"; it decides the prompt.

        Returns:
            (dim,) float32 of one text, (n, dim) of several, in their order.

        Raises:
            TeachonceError: The device has no memory for a text.

        Examples:
            >>> project.teacher.encode(["A text.", "Another one."]).shape
            (2, 384)
        """
        if isinstance(texts, str):
            vector: NDArray[np.float32] = self._encode([texts], role).vectors[0]
            return vector
        return self._encode(list(texts), role).vectors


def _workspace(path: Path) -> Workspace:
    """The workspace of a folder, or of the params.yaml in it."""
    from pipeline.workspace import Workspace

    root = path.parent if path.name == "params.yaml" else path
    if not (root / "params.yaml").is_file():
        raise MissingError(
            path,
            "no project: there is no params.yaml",
            "open the folder that has one, or make one with `teachonce init FOLDER`",
        )
    return Workspace(root)
