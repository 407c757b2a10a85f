"""Every setting, typed and bounded. The values stand in params.yaml and nowhere else.

A setting is either part of its stage's `recipe` (it changes the result by more than last bits) or only
decides where and how fast the work is done; the second kind is marked "speed only" here.

This file is long because it holds every setting of every stage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import parse_qsl, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    Tag,
    model_validator,
)

from storage.errors import TeachonceError
from storage.roles import ROLES, Role

MODEL_NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"
ModelName = Annotated[str, StringConstraints(pattern=MODEL_NAME)]
"""Lower case, digits, `_` and `-`: it becomes a folder, a file and the name of a DVC stage."""

Text = Annotated[str, StringConstraints(min_length=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
# Not below 0.001: the logit of a candidate that is left out is -10,000, far below all others.
Temperature = Annotated[float, Field(ge=0.001, le=10)]

LEAST_TEMPERATURE = 0.01
"""A learned temperature may not fall below this: logits of 100 x cosine, as in CLIP."""

PREFIXES = ("dataset:", "package:", "imported:", "api:")
"""Prefixes of values that are no plain path."""

REMOTE_URLS = ("s3", "s3a", "file", "memory")


def path_problem(value: str, no_url: str) -> str | None:
    """Returns why a value is no path on this machine; None if it may be one.

    `no_url` is the advice for a value that is a URL.
    """
    for prefix in PREFIXES:
        value = value.removeprefix(prefix)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", value):
        return f"a URL, where a path on this machine is wanted: {no_url}"
    if re.match(r"[A-Za-z]:\\", value):
        return "a path of Windows, where a path on this machine is wanted"
    if variable := re.search(r"\$(\w+|\{.*?\})|%\w+%", value):
        return f"{variable[0]} is not filled in here: write the path itself, or begin it with ~"
    if value != value.strip() or re.search(r"[\x00-\x1f\x7f]", value):
        return "a path with a blank at an end, or a control character in it"
    return None


def _remote_problem(value: str) -> str | None:
    scheme, slashes, rest = value.partition("://")
    if not slashes:
        return path_problem(value, "write two slashes, as in s3://bucket/folder")
    if scheme not in REMOTE_URLS:
        return f"{scheme}:// is no remote known here: name s3://bucket/folder, or a folder"
    if "::" in rest:
        return "a URL of one kind within another: name s3://bucket/folder, or a folder"
    if scheme == "file" and not rest.startswith("/"):
        return "a URL of a file has three slashes, as in file:///folder: write the folder alone"
    return path_problem(rest, "write the URL once")


def _refusing(problem: Callable[[str], str | None]) -> AfterValidator:
    def check(value: str) -> str:
        if wrong := problem(value):
            raise ValueError(wrong)
        return value

    return AfterValidator(check)


NO_STORE_URL = "a store is a folder; `remote` takes s3://bucket/folder"
StorePath = Annotated[Text, _refusing(lambda value: path_problem(value, NO_STORE_URL))]
RemotePlace = Annotated[Text, _refusing(_remote_problem)]
FilesPath = Annotated[
    Text, _refusing(lambda value: path_problem(value, "fetch the files, and name them here"))
]
ModelPlace = Annotated[
    Text,
    _refusing(
        lambda value: path_problem(
            value,
            "name a folder, or a hub name such as org/model; "
            "a model behind an API is api:MODEL, and its server stands in embed.api.url",
        )
    ),
]

Pooling = Literal["mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean"]
"""Pooling of token vectors to a text's vector, by the names of sentence-transformers."""

TEACHER = "teacher"
IMPORTED = "imported:"
API = "api:"
FINETUNED = "-finetuned"
START_FOLDER = "start"

LEAST_HELDOUT = 10
"""Smallest number of held-out rows that can score a student during training."""

DOCS_TEXT, DOCS_PAIR = "text", ("anchor", "positive")
"""Field names of the texts and pairs that the stage `docs` writes."""


class Section(BaseModel):
    """A mapping in params.yaml: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DocsParams(Section):
    """Installed packages -> English sentences of their documentation (the embedded default)."""

    packages: tuple[Text, ...]  # import names; none: the stage leaves empty files
    max_texts: PositiveInt
    heldout_pairs: PositiveInt  # summary/description pairs kept for the retrieval test


class ReadingsSource(Section):
    """Files whose texts are of one role."""

    files: FilesPath  # a glob
    role: Role  # what its texts are for the teacher


Named = TypeVar("Named", bound=ReadingsSource)


class SourceParams(ReadingsSource):
    """Corpus files whose texts are of one role; dataset:<name or folder>, too."""

    # As shard.field, which says it of the others; it may be left out.
    field: Text | None = None


def _of_role(role: Role, named: Iterable[str | Named], kind: type[Named]) -> list[Named]:
    """The sources whose texts are of a role, in order; a plain glob's are of the role `text`."""
    sources = [
        kind(files=source, role="text") if isinstance(source, str) else source for source in named
    ]
    return [source for source in sources if source.role == role]


_GLOB_OR_MAPPING = Discriminator(
    lambda value: "mapping" if isinstance(value, dict | ReadingsSource) else "glob"
)
Source = Annotated[
    Annotated[FilesPath, Tag("glob")] | Annotated[SourceParams, Tag("mapping")], _GLOB_OR_MAPPING
]
SourceOfReadings = Annotated[
    Annotated[FilesPath, Tag("glob")] | Annotated[ReadingsSource, Tag("mapping")], _GLOB_OR_MAPPING
]


class ShardParams(Section):
    """Corpus files -> text shards."""

    sources: Annotated[
        tuple[Source, ...], Field(min_length=1)
    ]  # globs, dataset:<name or folder>, or {files: one of these, role: query}
    field: Text  # which field or column holds the text, in files that have fields
    rows_per_shard: Annotated[int, Field(ge=16, le=4_000_000)]
    min_chars: PositiveInt
    max_chars: PositiveInt

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.max_chars < self.min_chars:
            raise ValueError(f"max_chars ({self.max_chars}) is below min_chars ({self.min_chars})")
        return self

    def sources_of(self, role: Role) -> list[SourceParams]:
        """The sources whose texts are of a role, in order; a plain glob's are of the role `text`."""
        return [
            source.model_copy(update={"field": source.field or self.field})
            for source in _of_role(role, self.sources, SourceParams)
        ]

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles of the sources, in the order in which their texts are read."""
        return tuple(role for role in ROLES if self.sources_of(role))


class SplitParams(Section):
    """Corpus -> the rows that are held out, found in evaluation sets, or trained on."""

    heldout: Annotated[float, Field(gt=0, le=0.5)]  # share of the rows, chosen by text key


class PromptsParams(Section):
    """What the teacher reads before a text, by the text's role."""

    text: str | None  # null: the model has no prompt of its own
    query: (
        str | None
    )  # null: the model's own for queries, or what stands before texts if it has none
    document: str | None  # null: likewise

    def of(self, role: Role) -> str:
        """The prompt of a role, where the model adds nothing of its own."""
        own: str | None = getattr(self, role)
        return (self.text or "") if own is None else own


def _url_problem(value: str) -> str | None:
    """Returns why a value is no address of a server, without the value, which may hold a key."""
    try:
        parts = urlsplit(value)
        is_address = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, among others
        is_address = False
    if not is_address:
        return "no address of a server, such as https://host/v1"
    if parts.username is not None or parts.password is not None:
        return (
            "an address with a name or a password in it: put the key into the variable of key_env"
        )
    if {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)} - {"api-version"}:
        return (
            "an address with more than api-version behind its ?: put the key into that of key_env"
        )
    return None


class InputTypeParams(Section):
    """What the field `input_type` says of the texts of each role; Cohere and Voyage have such a field."""

    text: Text | None  # null: no such field is sent
    query: Text | None
    document: Text | None

    def of(self, roles: Iterable[Role]) -> dict[Role, str]:
        """The field's value for those roles that have one."""
        values: dict[Role, str | None] = {role: getattr(self, role) for role in roles}
        return {role: value for role, value in values.items() if value is not None}


class ApiParams(Section):
    """A server that speaks OpenAI's /v1/embeddings. What changes no vector here is speed and money only."""

    url: Annotated[Text, _refusing(_url_problem)] | None  # null: the teacher is not behind an API
    key_env: (
        Annotated[str, StringConstraints(pattern=r"^[A-Z_][A-Z0-9_]{0,63}$")] | None
    )  # of the environment; null: the server asks for no key
    dimensions: PositiveInt | None  # asked of the model; null: as many as it has
    input_type: InputTypeParams
    tokenizer: ModelPlace | None  # that counts and cuts texts; null: none does
    batch_texts: Annotated[int, Field(ge=1, le=4096)]  # of a request, at most
    concurrency: Annotated[int, Field(ge=1, le=256)]  # requests at the same time
    requests_per_minute: PositiveFloat | None
    tokens_per_minute: PositiveFloat | None
    price_per_million_tokens: Annotated[float, Field(ge=0)] | None
    budget: PositiveFloat | None  # in the currency of the price
    timeout: PositiveFloat  # seconds, for a whole answer

    @model_validator(mode="after")
    def _priced(self) -> Self:
        if self.budget is not None and not self.price_per_million_tokens:
            raise ValueError(
                f"budget ({self.budget:g}) is money: write price_per_million_tokens beside it"
            )
        return self


class EmbedParams(Section):
    """Corpus -> the teacher's vectors."""

    teacher: (
        ModelPlace  # hub name, folder, package:<module>/<path>, imported:<any name>, or api:<model>
    )
    revision: Text | None  # of a hub name
    pooling: Pooling | None  # of a model without modules.json; null: that file decides
    prompts: PromptsParams
    similarity: (
        Literal["cosine"] | None
    )  # null: by cosine, as the model itself compares its vectors
    max_tokens: Annotated[int, Field(ge=4)]  # what is read of a text at once
    long_texts: Literal["cut", "windows"]  # a longer one: cut there, or the mean of windows
    precision: Literal["fp32", "bf16", "fp16"]
    storage: Literal["float16", "float32", "int8"]
    dim: PositiveInt | None  # how many first values of a vector are kept; null: all
    trust_remote_code: bool
    reuse: bool  # last bits only: copy vectors of texts that stand in older shards
    batch_tokens: PositiveInt | Literal["auto"]  # speed only
    mixes: Annotated[float, Field(ge=0, le=1)]  # of two texts, for each text; 0: none
    api: ApiParams  # only for a teacher behind an API

    @property
    def api_model(self) -> str | None:
        """The name of a model behind an API; None for any other teacher."""
        return self.teacher.removeprefix(API) if self.teacher.startswith(API) else None

    @property
    def is_imported(self) -> bool:
        """Whether the vectors come from `teachonce import`: their model, prompt and pooling are unknown."""
        return self.teacher.startswith(IMPORTED)


AMONG: dict[Role, Role] = {"text": "text", "query": "document", "document": "document"}
"""Which rows find which: a query's negatives are documents."""


class MineParams(Section):
    """Vectors -> hard negatives. Filters are named as in sentence-transformers' mine_hard_negatives."""

    neighbours: PositiveInt  # kept per row
    range_min: NonNegativeInt  # nearest neighbours skipped, after the filters below
    range_max: Annotated[int, Field(ge=1, le=65_534)]  # nearest neighbours looked at
    max_score: Cosine  # a neighbour above this is a near duplicate, not a negative
    min_score: Cosine | None
    index: Literal["auto", "flat", "ivf", "hnsw", "hnsw-sq8"]  # flat: exact
    min_recall: Annotated[
        float, Field(gt=0, le=1)
    ]  # an approximate index that finds less is refused
    memory_mb: Annotated[int, Field(ge=64)]  # speed only
    among: dict[Role, Role]  # role -> role of the rows that its rows find
    # Rows of each role that may be found, drawn at random; null: all.
    pool: Annotated[int, Field(ge=1000)] | None
    most_hours: PositiveFloat  # speed only: `auto` begins no exact search that would take longer

    @model_validator(mode="after")
    def _every_role(self) -> Self:
        if lacking := [role for role in ROLES if role not in self.among]:
            raise ValueError(f"among says nothing of {' and '.join(lacking)}")
        return self

    @model_validator(mode="after")
    def _pool_is_searched_exactly(self) -> Self:
        if self.pool is not None and self.index not in ("auto", "flat"):
            raise ValueError(
                f"a pool is searched exactly: set index to auto or flat, or pool to null ({self.index})"
            )
        return self

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.range_max < self.range_min + self.neighbours:
            raise ValueError(
                f"range_max ({self.range_max}) must be at least range_min + neighbours "
                f"({self.range_min} + {self.neighbours})"
            )
        return self


class VocabularyShare(Section):
    """The tokens that cover a share of the corpus."""

    keep: Annotated[float, Field(gt=0, le=1)]  # of all occurrences of tokens


Vocabulary = Annotated[
    Annotated[int, Field(strict=True, ge=1000), Tag("number")]
    | Annotated[VocabularyShare, Tag("mapping")],
    Discriminator(
        lambda value: "mapping" if isinstance(value, dict | VocabularyShare) else "number"
    ),
]


Layers = Annotated[
    Annotated[int, Field(strict=True, ge=1), Tag("number")]
    | Annotated[tuple[NonNegativeInt, ...], Field(min_length=1), Tag("list")],
    Discriminator(lambda value: "number" if isinstance(value, int) else "list"),
]


class StartParams(Section):
    """A student before training."""

    # `teacher`, or a model named as embed.teacher is; null: none, the weights are drawn at random
    from_: ModelPlace | None = Field(alias="from")
    # Those kept, in this order; or their number, then chosen by agreement; null: all.
    layers: Layers | None
    # With `from: null`: the model that gives kind, sizes and tokenizer. Left out: the teacher.
    like: ModelPlace | None = None
    # With `from: null`: the seed of the random weights. Left out: 0.
    seed: NonNegativeInt | None = None
    # As embed.pooling, for a start that is not made from the teacher; it may be left out.
    pooling: Pooling | None = None
    # How often the layers are run, with the same weights. Left out: once.
    passes: Annotated[int, Field(ge=2, le=8)] | None = None
    # static: a table of token vectors with `hidden` values each, and their mean. Left out: a transformer.
    kind: Literal["static"] | None = None
    # Values of a token between layers, or in a static table. Left out: as in the model.
    hidden: PositiveInt | None = None
    # Neurons of a layer. Left out: as in the model.
    intermediate: PositiveInt | None = None
    # Attention heads of a layer. Left out: as in the model.
    heads: PositiveInt | None = None
    # Columns of a smaller table of word embeddings, with a map to the model's width. Left out: one table.
    embedding: PositiveInt | None = None
    # Number of tokens kept, the most frequent, or {keep: share of the corpus to cover}. Left out: all.
    vocabulary: Vocabulary | None = None

    @property
    def is_random(self) -> bool:
        """Whether its weights are drawn at random; else they are made of a model's."""
        return self.from_ is None

    @property
    def model(self) -> str:
        """The model that it is made of, or like; `teacher`, or named as embed.teacher is."""
        return self.from_ or self.like or TEACHER

    @property
    def named_in(self) -> Literal["from", "like"]:
        """The setting that names this model."""
        return "like" if self.is_random else "from"

    @property
    def reads_corpus(self) -> bool:
        """Whether it depends on the corpus: how often tokens occur, or what a model makes of texts."""
        is_fitted = not self.is_random and (self.kind == "static" or self.is_narrow)
        return is_fitted or self.vocabulary is not None or self.embedding is not None

    @property
    def chooses_layers(self) -> bool:
        """Whether its layers are chosen by the teacher's vectors of rows held out."""
        return isinstance(self.layers, int) and not self.is_random

    @model_validator(mode="after")
    def _drawn_or_taken(self) -> Self:
        for name in ("like", "seed"):
            if not self.is_random and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is of a start that is drawn at random: set from: null, or take {name} away"
                )
        if self.is_random and isinstance(self.layers, tuple):
            raise ValueError(
                f"from: null draws all weights at random, so no layer is another's: set layers to their "
                f"number, as in {len(self.layers)}"
            )
        return self

    @model_validator(mode="after")
    def _static_has_a_width_and_no_layers(self) -> Self:
        if self.kind == "static" and self.hidden is None:
            raise ValueError("kind: static wants hidden, the width of its table")
        if self.kind == "static" and (self.intermediate is not None or self.heads is not None):
            raise ValueError("a static model has no layers: take intermediate and heads away")
        if self.kind == "static" and self.embedding is not None:
            raise ValueError("a static model's table has hidden columns: take embedding away")
        if self.kind == "static" and (self.layers is not None or self.passes is not None):
            raise ValueError("a static model has no layers: set layers: null, and take passes away")
        return self

    @property
    def is_narrow(self) -> bool:
        """Whether it is a transformer narrower than the one it is made of."""
        widths = (self.hidden, self.intermediate, self.heads)
        return self.kind is None and any(width is not None for width in widths)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if isinstance(self.layers, tuple) and len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers {list(self.layers)} names a layer twice")
        return self


def _as_list(value: object) -> object:
    """One glob is a list of one, and null an empty one."""
    return () if value is None else (value,) if isinstance(value, str | dict) else value


class DistillParams(Section):
    """What students read beside the corpus itself."""

    # Globs of files with a `text` and a `reading`, or {files: one of these, role: query}; null: none.
    readings: Annotated[tuple[SourceOfReadings, ...], BeforeValidator(_as_list)]

    def readings_of(self, role: Role) -> list[ReadingsSource]:
        """The entries whose texts are of a role, in order; a plain glob's are of the role `text`."""
        return _of_role(role, self.readings, ReadingsSource)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles of the texts, in the order in which a corpus has them."""
        return tuple(role for role in ROLES if self.readings_of(role))


NO_READINGS = DistillParams(readings=())


def roles_of_corpus(sections: Sections) -> tuple[Role, ...]:
    """The roles of the texts of `shard.sources` and `distill.readings`; `text` where they are not known."""
    parts = (sections.get("shard"), sections.get("distill"))
    named = {role for part in parts for role in getattr(part, "roles", ())}
    return tuple(role for role in ROLES if role in named) or ("text",)


class StudentParams(Section):
    """What `dvc repro` trains: a start and a recipe, by name."""

    recipe: ModelName
    start: ModelName


class BaseObjective(Section):
    """What every objective has."""

    weight: PositiveFloat

    @property
    def deleted(self) -> float:
        """Share of a text's tokens that the student does not see; the teacher has read them all."""
        return 0.0


class KdObjective(BaseObjective):
    """Mean squared error to the teacher's vector, or its variance."""

    name: Literal["kd"]
    centred: bool  # the mean error of a batch does not count: an offset of all texts is free


class MixesObjective(BaseObjective):
    """`kd` on mixes of two texts, whose input embeddings both teacher and student have mixed."""

    name: Literal["mixes"]
    centred: bool
    rows: Annotated[int, Field(ge=2)]  # mixes a step, beside the rows of the batch


class DiscoKdObjective(BaseObjective):
    """`kd` on raw vectors, exactly as in the paper: the student's may have any length."""

    name: Literal["disco_kd"]


class AmongOthers(BaseObjective):
    """An objective about the teacher's vectors of other rows."""

    queue: NonNegativeInt  # rows drawn from the cache, anew every 16 steps
    neighbours: NonNegativeInt  # mined neighbours per row of the batch


class CkdObjective(AmongOthers):
    """InfoNCE against the teacher's vectors of other rows."""

    name: Literal["ckd"]
    temperature: Temperature
    learnable_temperature: bool

    @model_validator(mode="after")
    def _begins_in_bounds(self) -> Self:
        _check_start(self.temperature, learnable=self.learnable_temperature)
        return self


def _check_start(temperature: float, *, learnable: bool) -> None:
    if learnable and temperature < LEAST_TEMPERATURE:
        raise ValueError(
            f"temperature {temperature:g}, but a learned one stays at {LEAST_TEMPERATURE} or above: "
            "raise it, or set learnable_temperature: false"
        )


class DiscoCkdObjective(BaseObjective):
    """`ckd` exactly as in the official code: 1 / temperature learned from e, rows of past steps."""

    name: Literal["disco_ckd"]
    queue: NonNegativeInt  # rows of the steps before this one, newest first


class RelationalObjective(AmongOthers):
    """The student's similarities to other rows, as a distribution, follow the teacher's."""

    name: Literal["relational"]
    temperature: Temperature  # of the student
    teacher_temperature: Temperature
    deleted_tokens: Share  # of what the student reads; the teacher has read all

    @property
    def deleted(self) -> float:  # noqa: D102 - as above
        return self.deleted_tokens


class SkewObjective(AmongOthers):
    """`relational` by a divergence that stays finite: one side is mixed with a little of the other."""

    name: Literal["skew"]
    temperature: Temperature
    teacher_temperature: Temperature
    alpha: Annotated[float, Field(gt=0, lt=1)]  # how much of the other is mixed in
    reverse: bool  # whether the student's distribution is the one that weighs


class SpeculativeObjective(AmongOthers):
    """`skew` among rows that the student proposes: those of a pool that it finds nearest.

    `neighbours` are those by which the teacher judges: it accepts a row that is as near as the last of
    them, and puts one of them in the place of another row.
    """

    name: Literal["speculative"]
    temperature: Temperature
    teacher_temperature: Temperature
    alpha: Annotated[float, Field(gt=0, lt=1)]
    neighbours: PositiveInt
    proposals: PositiveInt  # per row of the batch
    pool: PositiveInt  # training rows that the student reads to propose from
    refresh_every: PositiveInt  # steps after which the pool may be drawn and read anew
    threshold: Annotated[float, Field(ge=0, le=1)]  # initial probability of that, at such a step


class AdapterObjective(AmongOthers):
    """The student follows the teacher's vectors after a small module, trained with it, has moved them."""

    name: Literal["adapter"]
    temperature: Temperature
    teacher_temperature: Temperature
    rank: PositiveInt  # of the module
    anchor: Annotated[float, Field(ge=0)]  # weight of staying where the teacher is
    beta: Annotated[float, Field(ge=0)]  # weight of coming towards the student
    most_drift: Annotated[float, Field(gt=0, lt=1)]  # 1 - cosine that no vector exceeds


class DecoupledObjective(AmongOthers):
    """`relational` with separate terms for a row's own key and the rest, and for easy and hard rows."""

    name: Literal["decoupled"]
    temperature: Temperature
    teacher_temperature: Temperature
    alpha: Annotated[float, Field(ge=0, le=1)]  # weight of the easy half of a batch


class ComparativeObjective(BaseObjective):
    """Differences between the vectors of two rows point where the teacher's do."""

    name: Literal["comparative"]


class GramObjective(BaseObjective):
    """The similarities within a batch of the student's vectors are the teacher's."""

    name: Literal["gram"]
    temperature: Temperature | None  # null: squared differences; else of a softmax over each row


Objective = Annotated[
    KdObjective
    | MixesObjective
    | CkdObjective
    | DiscoKdObjective
    | DiscoCkdObjective
    | RelationalObjective
    | SkewObjective
    | DecoupledObjective
    | SpeculativeObjective
    | AdapterObjective
    | ComparativeObjective
    | GramObjective,
    Field(discriminator="name"),
]


class TrainingParams(Section):
    """What every training run has, whatever it learns from."""

    epochs: PositiveInt
    batch_size: Annotated[int, Field(ge=2)]
    learning_rate: PositiveFloat
    warmup: Share  # of all steps
    weight_decay: Annotated[float, Field(ge=0)]
    clip: PositiveFloat | None  # norm of the gradient
    dropout: bool  # false: the student is trained as it will be used, without dropout
    max_tokens: Annotated[int, Field(ge=4)]
    precision: Literal["auto", "fp32", "bf16"]  # auto: bf16 where the device multiplies it faster
    gradient_caching: bool  # true: read a batch twice, and keep only its vectors in between
    evaluate_every: PositiveInt  # steps
    patience: PositiveInt  # evaluations without a new best before the run stops
    seed: NonNegativeInt


class PretrainParams(Section):
    """What a student learns before the objectives: the teacher's predictions as classes (Pea-KD)."""

    share: Annotated[float, Field(gt=0, lt=1)]  # of all steps
    triplets: Literal[
        "mined", "labelled"
    ]  # a text and two of its neighbours; rows of finetune.triplets


class RecipeParams(TrainingParams):
    """Start + caches -> student."""

    projection: Literal["auto", "always"]  # auto: only where the widths differ
    widths: tuple[PositiveInt, ...]  # of the student's vector that serve alone, too (Matryoshka)
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)]
    # First steps on classes that the teacher's vectors give (see the recipe `warmup`); it may be left out.
    pretrain: PretrainParams | None = None
    # The prompts that students read: their teacher's, or none; it may be left out, and is then none.
    prompts: Literal["teacher", "none"] = "none"
    # Share of a batch's rows with readings that is read as one of them; it may be left out, and is then 0.
    readings: Annotated[float, Field(ge=0, le=1)] = 0.0

    @property
    def reads_neighbours(self) -> bool:
        """Whether it asks for mined neighbours."""
        mined = self.pretrain is not None and self.pretrain.triplets == "mined"
        return mined or any(
            isinstance(o, AmongOthers) and o.neighbours > 0 for o in self.objectives
        )

    @property
    def reads_labels(self) -> bool:
        """Whether it asks for labelled triplets."""
        return self.pretrain is not None and self.pretrain.triplets == "labelled"

    @property
    def reads_mixes(self) -> bool:
        """Whether it asks for the teacher's vectors of mixes."""
        return any(isinstance(o, MixesObjective) for o in self.objectives)


class FinetuneParams(TrainingParams):
    """Student + labelled pairs or triplets -> finetuned student (DisCo's second stage)."""

    students: tuple[ModelName, ...]  # whom `dvc repro` finetunes
    triplets: tuple[
        FilesPath, ...
    ]  # globs of .jsonl, .json, .tsv, .csv (each also .gz, .zst), .parquet
    fields: Annotated[
        tuple[Text, ...], Field(min_length=3, max_length=3)
    ]  # anchor, positive, negative; the last two also with numbers behind: negative_1
    temperature: Temperature
    learnable_temperature: bool
    dev: (
        FilesPath | None
    )  # glob of an STS file that picks the best weights; null: triplets held out
    heldout: Annotated[float, Field(gt=0, le=0.5)]  # share of the triplets held out if dev is null
    distill_weight: Annotated[float, Field(ge=0)]  # of a kd term on cached rows; 0: none
    distill_rows: PositiveInt  # cached rows a step

    @model_validator(mode="after")
    def _begins_in_bounds(self) -> Self:
        _check_start(self.temperature, learnable=self.learnable_temperature)
        if len(set(self.fields)) < len(self.fields):
            raise ValueError(f"fields {list(self.fields)} names a field twice")
        return self


class EvaluateParams(Section):
    """Model -> metrics."""

    sts: dict[Text, FilesPath]  # name -> glob of TSV files (score, sentence, sentence)
    retrieval: dict[Text, FilesPath]  # name -> folder in BEIR form
    max_tokens: (
        Annotated[int, Field(ge=4)] | None
    )  # of a text of these sets; null: each model's own
    ignore_identical_ids: bool  # a document with a query's own id is no result of it (BEIR's rule)
    speed_texts: PositiveInt  # texts encoded to measure sentences per second


ExportFormat = Literal[
    "safetensors", "safetensors-fp16", "onnx", "onnx-int8", "openvino-int8", "static-int8"
]
BASE_FORMATS: tuple[ExportFormat, ...] = ("safetensors", "safetensors-fp16")
"""What sentence-transformers loads; an export has one of them."""


def _one_base(formats: tuple[ExportFormat, ...]) -> tuple[ExportFormat, ...]:
    if len(set(formats)) < len(formats):
        raise ValueError("names a format twice")
    if len(set(BASE_FORMATS) & set(formats)) != 1:
        raise ValueError(f"must name one of {' and '.join(BASE_FORMATS)}, and not both")
    return formats


class ExportParams(Section):
    """A student -> a folder that sentence-transformers loads."""

    model: ModelName  # a student, or a finetuned one: NAME-finetuned
    also: tuple[ModelName, ...]  # further ones, each to exports/NAME
    space: Literal["student", "teacher"]  # teacher: keep the projection into the teacher's space
    # safetensors or safetensors-fp16, and any of the others.
    formats: Annotated[tuple[ExportFormat, ...], AfterValidator(_one_base)]
    max_loss: Share  # a format that loses more of the student's quality is not published

    @property
    def base(self) -> ExportFormat:
        """The format that sentence-transformers loads."""
        return next(name for name in self.formats if name in BASE_FORMATS)


def _as_share(value: float) -> float:
    if value > MOST_KEPT:
        raise ValueError("a share of the teacher's quality: 97 % is written 0.97")
    return value


MOST_KEPT = 2
"""A student that learned from labels may pass its teacher, but not so far."""


class ChooseParams(Section):
    """A bound within which the report names a student: one of these."""

    # Each may be left out, since only one is named.
    at_most_mb: PositiveFloat | None = None  # megabytes: the best student that is no larger
    # Share of the teacher's quality: the smallest student that keeps it.
    at_least: Annotated[PositiveFloat, AfterValidator(_as_share)] | None = None
    at_least_times_as_fast: PositiveFloat | None = None  # as the teacher: the best student that is

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError(f"takes one of {', '.join(type(self).model_fields)}")
        return self


class ReportParams(Section):
    """All models -> a table and a page."""

    rank_by: (
        Text | None
    )  # the metric whose highest value is the best student's; null: see params.yaml
    choose: ChooseParams | None  # within which bound a student is named; null: the best one is


class RayParams(Section):
    """Where Ray runs; speed only."""

    address: Text | None  # of a cluster; null: one of this machine alone, for this run
    num_gpus: Annotated[float, Field(ge=0)]  # that each worker takes; 0: it takes one CPU


class Params(Section):
    """All of params.yaml."""

    store: StorePath  # folder; $TEACHONCE_STORE wins
    remote: RemotePlace | None  # speed only: s3://bucket/folder, or a folder
    device: Text  # speed only: auto, cpu, cuda, cuda:1, mps
    engine: Literal["this_process", "local", "ray"]  # speed only: where the teacher runs
    workers: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"]  # speed only: of local and ray
    ray: RayParams
    tracker: Literal[
        "none", "tensorboard", "wandb", "mlflow"
    ]  # speed only: shows training's curves
    docs: DocsParams
    shard: ShardParams
    split: SplitParams
    embed: EmbedParams
    mine: MineParams
    starts: Annotated[dict[ModelName, StartParams], Field(min_length=1)]
    recipes: Annotated[dict[ModelName, RecipeParams], Field(min_length=1)]
    students: dict[ModelName, StudentParams]
    distill: DistillParams
    finetune: FinetuneParams
    evaluate: EvaluateParams
    export: ExportParams
    report: ReportParams


Sections = Mapping[str, Any]
"""The sections of params.yaml by name, as far as they could be read: a wrong setting is no attribute of
its section, a wrong entry not in its mapping."""

Problem = tuple[str, str]
"""Address of a setting, what is wrong with it."""


def students_behind_prompts(
    students: Mapping[str, StudentParams], recipes: Mapping[str, RecipeParams]
) -> list[str]:
    """Returns the students that read their teacher's prompts."""
    reading = {name for name, recipe in recipes.items() if recipe.prompts == "teacher"}
    return [name for name, student in students.items() if student.recipe in reading]


class SettingsError(TeachonceError):
    """Wrong settings: all of them, a line each."""

    def __init__(self, path: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = "".join(f"\n  {address}: {problem}" for address, problem in problems)
        super().__init__(
            path, f"{len(problems)} wrong{lines}", f"edit {path}, then run `teachonce check`"
        )


def contradictions(sections: Sections, names: Mapping[str, Collection[str]]) -> list[Problem]:
    """What is wrong between sections, in those that could be read.

    Names are all names of recipes, starts and students by section, wrong entries included.
    """
    return [
        *_unknown_names(sections.get("students", {}), names),
        *_collisions(names),
        *_unusable_set_names(sections.get("evaluate")),
        *_unknown_rank(sections.get("report"), sections.get("evaluate"), sections),
        *_unanswerable_choice(sections.get("report"), sections.get("embed")),
        *_too_few_neighbours(sections),
        *_unknown_students(sections.get("finetune"), sections.get("export"), names),
        *_starts_of_nobody(sections.get("starts", {}), sections.get("embed")),
        *_cut_imports(sections.get("embed")),
        *_unknown_prompts(sections.get("embed"), sections.get("recipes", {})),
        *_unreadable_mixes(sections.get("embed")),
        *_unmade(sections),
        *_not_of_an_api(sections),
        *_unusable_roles(sections.get("embed"), sections),
        *_two_poolings(sections.get("starts", {}), sections.get("embed")),
    ]


MANY_SHARDS, FEW_SHARDS = 2000, 400
"""A shard has a file of texts, of vectors, of tokens and of neighbours. Small ones save work when a run is
killed or the corpus grows; of more than the first number, the files themselves take longer."""


def larger_shards(params: ShardParams, *, rows: int, shards: int) -> str | None:
    """Returns what to say of a corpus of `rows` texts in too many shards; None if they are not."""
    if shards <= MANY_SHARDS:
        return None
    digits = 10 ** (len(str(rows // FEW_SHARDS)) - 1)
    wanted = -(-rows // (FEW_SHARDS * digits)) * digits
    return (
        f"shard.rows_per_shard: {params.rows_per_shard} cuts {rows:,} texts into {shards:,} shards, and "
        f"each is a file of every kind; {wanted} would make about {-(-rows // wanted)}. Then `embed` "
        "copies the vectors that the store has (embed.reuse), and `mine` begins anew"
    )


def larger_queues(recipe: RecipeParams, rows: int) -> list[str]:
    """Returns a note for each queue of a recipe that is not smaller than the number of training rows."""
    notes = []
    for objective in recipe.objectives:
        queue = getattr(objective, "queue", 0)
        if queue < rows:
            continue
        queue_note = f"{objective.name}: a queue of {queue:,}, and {rows:,} rows to train on"
        if isinstance(objective, DiscoCkdObjective):
            notes.append(
                f"{queue_note}: it holds a row once for each epoch that it reaches back to"
            )
        else:
            notes.append(f"{queue_note}: each step is compared with all of them, each once")
    return list(dict.fromkeys(notes))


def check_recipe_widths(widths: Sequence[int], dim: int, *, recipe: str) -> None:
    """Raise if a Matryoshka width of a recipe is not below `dim`, the width of the teacher's vectors."""
    for width in widths:
        if width >= dim:
            raise TeachonceError(
                f"recipes.{recipe}.widths",
                f"{width}, but the teacher's vectors have {dim} values, and all of them serve anyway",
                f"take it out, or set it to less than {dim}",
            )


def _unknown_names(
    students: Mapping[str, StudentParams], names: Mapping[str, Collection[str]]
) -> list[Problem]:
    wrong = []
    for name, student in students.items():
        for what in ("recipe", "start"):
            value, existing = getattr(student, what), names.get(f"{what}s", ())
            if value not in existing:
                wrong.append(
                    (
                        f"students.{name}.{what}",
                        f"no {what} named {value}; there are {sorted(existing)}",
                    )
                )
    return wrong


def _collisions(names: Mapping[str, Collection[str]]) -> list[Problem]:
    """Models share one folder of metrics, so a name may stand for one model only."""
    claims = [(name, f"starts.{name}") for name in names.get("starts", ())]
    for name in names.get("students", ()):
        claims += [(name, f"students.{name}"), (f"{name}{FINETUNED}", f"students.{name}")]
    taken = {TEACHER: "the teacher", START_FOLDER: "the folder of all starts"}
    wrong = []
    for model, address in claims:
        if model in taken:
            wrong.append((address, f"the name {model} is taken by {taken[model]}: choose another"))
        taken.setdefault(model, address)
    return wrong


def _unknown_students(
    finetune: FinetuneParams | None,
    export: ExportParams | None,
    names: Mapping[str, Collection[str]],
) -> list[Problem]:
    """`finetune` and `export` name students; what is exported must be made by `dvc repro`."""
    students = names.get("students", ())
    finetuned = getattr(finetune, "students", ())
    wrong = [
        (f"finetune.students.{place}", f"no student named {name}; there are {sorted(students)}")
        for place, name in enumerate(finetuned)
        if name not in students
    ]
    if finetuned and not getattr(finetune, "triplets", True):
        wrong.append(("finetune.triplets", "names no file, but finetune.students names students"))
    student_names = [*students, *(f"{name}{FINETUNED}" for name in finetuned)]
    exported = [("export.model", getattr(export, "model", None))]
    exported += [(f"export.also.{i}", name) for i, name in enumerate(getattr(export, "also", ()))]
    for place, (address, model) in enumerate(exported):
        if model is not None and model not in student_names:
            wrong.append((address, f"no student named {model}; there are {sorted(student_names)}"))
        elif model is not None and model in {earlier for _, earlier in exported[:place]}:
            wrong.append((address, f"{model} is exported already: take it away here"))
    return wrong


def _cut_imports(embed: EmbedParams | None) -> list[Problem]:
    dim = getattr(embed, "dim", None)
    if dim is None or not getattr(embed, "teacher", "").startswith(IMPORTED):
        return []
    return [("embed.dim", f"{dim}, but imported vectors are taken whole: set it to null")]


def _unknown_prompts(
    embed: EmbedParams | None, recipes: Mapping[str, RecipeParams]
) -> list[Problem]:
    if not getattr(embed, "teacher", "").startswith(IMPORTED):
        return []
    problem = (
        "teacher, but embed.teacher stands for imported vectors, and nothing says what stood before their "
        "texts: set it to none"
    )
    return [
        (f"recipes.{name}.prompts", problem)
        for name, recipe in recipes.items()
        if getattr(recipe, "prompts", None) == "teacher"
    ]


def _unreadable_mixes(embed: EmbedParams | None) -> list[Problem]:
    """A mix is no text: only a loaded transformer reads it, and all of it at once."""
    if not getattr(embed, "mixes", 0):
        return []
    if getattr(embed, "teacher", "").startswith(IMPORTED):
        return [
            ("embed.mixes", "imported vectors have no teacher that could read mixes: set it to 0")
        ]
    if getattr(embed, "long_texts", "cut") == "windows":
        return [
            (
                "embed.mixes",
                "mixes are read at once, not in windows: set it to 0, or long_texts: cut",
            )
        ]
    return []


def _unmade(sections: Sections) -> list[Problem]:
    """Recipes of students that read mixes, readings or labelled triplets where there are none."""
    recipes, wrong = sections.get("recipes", {}), []
    mixes = getattr(sections.get("embed"), "mixes", True)
    readings = getattr(sections.get("distill"), "readings", True)
    labels = getattr(sections.get("finetune"), "triplets", True)
    for name, student in sections.get("students", {}).items():
        recipe = recipes.get(student.recipe)
        if recipe is not None and recipe.reads_mixes and not mixes:
            problem = "reads mixes, and embed.mixes is 0: set that one to 0.5, say"
            wrong.append((f"students.{name}.recipe", f"{student.recipe} {problem}"))
        if recipe is not None and recipe.readings and not readings:
            problem = "reads readings, and distill.readings names none: name files there"
            wrong.append((f"students.{name}.recipe", f"{student.recipe} {problem}"))
        if recipe is not None and recipe.reads_labels and not labels:
            problem = "reads labelled triplets, and finetune.triplets names none: name files there"
            wrong.append((f"students.{name}.recipe", f"{student.recipe} {problem}"))
    return wrong


def _not_of_an_api(sections: Sections) -> list[Problem]:
    """What a teacher behind an API needs, and settings that it cannot have: the server decides these."""
    embed = sections.get("embed")
    teacher = getattr(embed, "teacher", "")
    if not teacher.startswith(API):
        return []
    wrong = []
    if not teacher.removeprefix(API):
        wrong.append(("embed.teacher", f"{API} names no model: write {API}MODEL"))
    if getattr(getattr(embed, "api", None), "url", "") is None:
        wrong.append(("embed.api.url", f"null, but {teacher} is behind an API: name its server"))
    engine = sections.get("engine", "this_process")
    if engine != "this_process":
        problem = "but a server reads the texts: set this_process, and embed.api.concurrency for"
        wrong.append(("engine", f"{engine}, {problem} more requests at the same time"))
    cures = {
        "revision": (None, "name the version in embed.teacher, if the server has several"),
        "pooling": (None, "the server pools: set it to null"),
        "dim": (None, "set it to null, and ask the model for fewer by embed.api.dimensions"),
        "long_texts": ("cut", "a server reads no windows: set it to cut"),
        "trust_remote_code": (False, "no code is loaded: set it to false"),
        "mixes": (0, "a server reads texts alone: set it to 0"),
    }
    for name, (only, cure) in cures.items():
        value = getattr(embed, name, only)
        if value != only:
            wrong.append((f"embed.{name}", f"{value}, but the teacher is behind an API: {cure}"))
    return wrong


def _unusable_roles(embed: EmbedParams | None, sections: Sections) -> list[Problem]:
    roles = sorted({*roles_of_corpus(sections)} - {"text"})
    if not roles:
        return []
    of_sources = {*getattr(sections.get("shard"), "roles", ())} - {"text"}
    wrong, address = [], "shard.sources" if of_sources else "distill.readings"
    if getattr(embed, "teacher", "").startswith(IMPORTED):
        problem = (
            f"roles ({', '.join(roles)}), but embed.teacher stands for imported vectors, and nothing says "
            "in which role a text of theirs was read: name the files without a role"
        )
        wrong.append((address, problem))
    if mixes := getattr(embed, "mixes", 0):
        problem = f"{mixes:g}, but {address} has roles ({', '.join(roles)}): set it to 0"
        wrong.append(("embed.mixes", problem))
    return wrong


def _starts_of_nobody(
    starts: Mapping[str, StartParams], embed: EmbedParams | None
) -> list[Problem]:
    """Imported vectors have no layers, and a server does not hand out its model's."""
    teacher = getattr(embed, "teacher", "")
    if not teacher.startswith((IMPORTED, API)):
        return []
    what = "imported vectors" if teacher.startswith(IMPORTED) else "a model behind an API"
    problems = {
        "from": f"teacher, but embed.teacher stands for {what}: name the model to start from",
        "like": f"that of the teacher, but embed.teacher stands for {what}: name a model in like",
    }
    return [
        (f"starts.{name}.{start.named_in}", problems[start.named_in])
        for name, start in starts.items()
        if start.model == TEACHER
    ]


def _two_poolings(starts: Mapping[str, StartParams], embed: EmbedParams | None) -> list[Problem]:
    """A start that is cut from the teacher is pooled as the teacher is."""
    return [
        (
            f"starts.{name}.pooling",
            f"{start.pooling}, but it is the teacher's: say it in embed.pooling",
        )
        for name, start in starts.items()
        if start.model == TEACHER and start.pooling not in {None, getattr(embed, "pooling", None)}
    ]


def _unusable_set_names(evaluate: EvaluateParams | None) -> list[Problem]:
    """Names of evaluation sets become parts of metric names, which are split at dots."""
    wrong = []
    for kind in ("sts", "retrieval"):
        for name in getattr(evaluate, kind, ()):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                wrong.append((f"evaluate.{kind}.{name}", "letters, digits, _ and - only"))
    if "average" in getattr(evaluate, "sts", ()):
        wrong.append(("evaluate.sts.average", "the name is taken by the average of all STS sets"))
    return wrong


def _unknown_rank(
    report: ReportParams | None, evaluate: EvaluateParams | None, sections: Sections
) -> list[Problem]:
    """`report.rank_by` names a metric of quality that `evaluate` leaves with these settings."""
    rank_by = getattr(report, "rank_by", None)
    sts, retrieval = getattr(evaluate, "sts", None), getattr(evaluate, "retrieval", None)
    if rank_by is None or sts is None or retrieval is None:
        return []
    measured = ["fidelity.spearman", "fidelity.top10_overlap"]
    if getattr(sections.get("distill"), "readings", ()):
        measured += [
            f"readings.{what}" for what in ("text_to_reading", "reading_to_text", "spearman")
        ]
    measured += [f"sts.{name}" for name in (*sts, "average")] if sts else []
    for kind in ("retrieval", "teacher_index"):
        for name in retrieval:
            measured += [f"{kind}.{name}.{what}" for what in ("ndcg@10", "mrr@10", "recall@100")]
    if rank_by in measured:
        return []
    return [("report.rank_by", f"{rank_by} is not measured; choose one of {', '.join(measured)}")]


def _unanswerable_choice(report: ReportParams | None, embed: EmbedParams | None) -> list[Problem]:
    """A student is compared with the teacher only by what was measured of the teacher."""
    choose, teacher = getattr(report, "choose", None), getattr(embed, "teacher", "")
    if choose is None or not teacher.startswith((IMPORTED, API)):
        return []
    if choose.at_least_times_as_fast is not None:
        why = "of a teacher that does not run here no speed is measured: take at_most_mb"
        return [("report.choose.at_least_times_as_fast", why)]
    if choose.at_least is not None and teacher.startswith(IMPORTED):
        why = "of imported vectors no quality is measured: take at_most_mb"
        return [("report.choose.at_least", why)]
    return []


def _too_few_neighbours(sections: Sections) -> list[Problem]:
    """Recipes of students that read more neighbours than `mine` keeps."""
    kept = getattr(sections.get("mine"), "neighbours", None)
    recipes = sections.get("recipes", {})
    names = {student.recipe for student in sections.get("students", {}).values()}
    return [
        problem
        for name in recipes
        if name in names and kept is not None
        for problem in neighbours_wanted(name, recipes[name], kept)
    ]


def neighbours_wanted(name: str, recipe: RecipeParams, kept: int) -> list[Problem]:
    """Returns each objective of a recipe that reads more than the `kept` neighbours of a row."""
    return [
        (
            f"recipes.{name}.objectives.{place}.neighbours",
            f"{wanted} wanted, but mine.neighbours keeps {kept}: raise that one",
        )
        for place, objective in enumerate(recipe.objectives)
        if (wanted := getattr(objective, "neighbours", 0)) > kept
    ]
