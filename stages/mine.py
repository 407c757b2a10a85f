"""Mine hard negatives: for each training row, the rows most similar by the teacher's vectors.

Lists are exact unless an approximate index is asked for or the corpus is too large. Exact lists come from
one of two methods, whichever is estimated to be faster: a self-join, all lists at once
(mining/self_join.py), or FAISS, some query shards at a time against blocks of the corpus
(mining/faiss_search.py). With FAISS a shard's lists are published when they are finished, so a killed run
resumes; a self-join publishes at its end and starts over, so it is limited to EXACT_ROWS.

With `mine.pool` only so many rows can be found, drawn at random: the time grows with the number of rows,
not with its square. The 64 nearest of a pool of 1 % are about the 6,400 nearest of all, so they are still
hard, and fewer of them say the same as the row itself.

Exact lists are the same bits whichever way they are found (mining/cosines.py), so those of a corpus that
has grown are merged from earlier ones (mining/growth.py).

Held-out and evaluation rows neither get lists nor appear in any: their lists are empty.

This file is long because the stage and the miner share how shards are grouped, searched and published.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.mining.filters import RULES, Lists, keep_first, reject
from stages.outcome import Outcome, Progress, clock, is_noticeable, log, write_json
from stages.params import AMONG, MineParams
from storage import durable
from storage.column import matrix_of, text_keys_of
from storage.corpus import Corpus, ShardSlice
from storage.embeddings import Embeddings
from storage.errors import TeachonceError
from storage.manifest import Manifest, fingerprint
from storage.negatives import NONE, parent_of, put_negatives
from storage.roles import ROLES, Role
from storage.split import Split, drawn
from storage.store import Object, Store

if TYPE_CHECKING:
    import torch

    from stages.mining.cosines import IdsAndCosines
    from stages.mining.faiss_search import NearestRows
    from stages.mining.growth import Earlier, Growth
    from stages.mining.self_join import FlatCost, JoinCost, RowsOf

VERSION = 1

FEWEST_JOINED = 4096
"""With fewer rows FAISS is done before the two methods could be timed."""

EXACT_ROWS = {"cpu": 400_000, "cuda": 4_000_000}
"""Most rows that `auto` compares exactly, by device. On a CPU 100,000 rows take 32 CPU seconds
(benchmarks/mine.py), and time grows with the square. HNSW takes 1 to 2 ms a row and is faster from about
600,000 rows on; the limit is lower because a killed self-join starts over. The GPU's is not measured."""

AUTO = ("hnsw", "hnsw-sq8")
"""Approximate indexes in the order in which `auto` takes the first that fits into `memory_mb`. `hnsw` finds
a little more in the same time, in nearly three times the memory (benchmarks/mine_indexes.py)."""

LONGEST_JOIN = 128  # longest lists of a self-join
QUERY_ROWS = 8192  # rows searched together: 256 rows take FAISS as long as 1,500
MERGED_ROWS = 16 * QUERY_ROWS  # rows whose lists are merged together: those searched again are few
UNSURE_ROWS = 256  # compared with all rows at a time, since of equal cosines there may be very many
SPARE = 8  # candidates found beyond those looked at, to see which of nearly equal cosines belong to them
RECALL_ROWS = 1024  # rows in the sample that measures an approximate index's recall

SCORE_BINS = 2001  # of 0.001 cosine: bin 0 is -1, bin 2000 is 1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def recipe(params: MineParams, index: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the settings that change the lists; `memory_mb` only sets the size of a block.

    Args:
        params: The settings `mine`.
        index: What `resolve` returned; None for exact lists, which do not depend on the method.
    """
    settings: dict[str, Any] = {
        "version": VERSION,
        "neighbours": params.neighbours,
        "range_min": params.range_min,
        "range_max": params.range_max,
        "max_score": params.max_score,
        "min_score": params.min_score,
    }
    # Only if it is another, so that lists of before there were roles keep their fingerprints.
    if params.among != AMONG:
        settings["among"] = dict(params.among)
    if params.pool is not None:
        settings["pool"] = params.pool
    return settings if index is None else {**settings, "index": dict(index)}


def resolve(
    params: MineParams, *, rows: int, dim: int, device: torch.device
) -> dict[str, Any] | None:
    """Returns the settings of the index to use, or None for exact search; logs the reason.

    Args:
        params: The settings `mine`.
        rows: Number of training rows.
        dim: Width of the vectors.
        device: The device for exact search.

    Raises:
        TeachonceError: the approximate index that params name does not fit into `memory_mb`.
    """
    from stages.mining.faiss_search import index_bytes, index_settings

    if params.pool is not None:
        log.info("mine: index flat: a pool of %s rows is searched exactly", f"{params.pool:,}")
        return None
    if params.index == "flat":
        log.info("mine: index flat: as set")
        return None
    is_auto = params.index == "auto"
    limit = EXACT_ROWS.get(device.type, EXACT_ROWS["cpu"])
    reason = f"{rows:,} rows, up to {limit:,} are compared exactly on {device.type}"
    if is_auto and rows <= limit:
        log.info("mine: index flat: %s", reason)
        return None
    kinds = AUTO if is_auto else (params.index,)
    megabytes = {kind: index_bytes(kind, rows=rows, dim=dim) >> 20 for kind in kinds}
    for kind in kinds:
        if megabytes[kind] <= params.memory_mb:
            log.info("mine: index %s: %s", kind, reason if is_auto else "as set")
            return index_settings(kind, rows=rows, k=min(params.range_max + 1, rows))
    if is_auto:
        needs = f"{AUTO[-1]} needs {megabytes[AUTO[-1]]:,} MB"
        log.info("mine: index flat: %s, mine.memory_mb is %s", needs, f"{params.memory_mb:,}")
        return None
    needed = megabytes[params.index]
    smallest = index_bytes(AUTO[-1], rows=rows, dim=dim) >> 20
    smaller = f" {AUTO[-1]} ({smallest} MB), or" if smallest < needed else ""
    raise TeachonceError(
        "mine.memory_mb",
        f"is {params.memory_mb}, but {params.index} needs {needed} MB for {rows:,} rows",
        f"set it to {needed} or more, or set mine.index:{smaller} flat",
    )


class ExactCosts:
    """What exact search costs, by FAISS or a self-join; each is measured on a sample when first needed.

    Args:
        params: The settings `mine`.
        rows_of: (m,) numbers of vectors -> (m, dim) vectors as they are stored.
        count: Number of vectors that the sample is drawn from.
        device: The device of the search; another than a GPU of CUDA counts as a CPU.
    """

    def __init__(
        self, params: MineParams, rows_of: RowsOf, count: int, device: torch.device
    ) -> None:
        import torch

        from stages.mining.self_join import tile_on

        self.device = device if device.type in EXACT_ROWS else torch.device("cpu")
        self.rows_of, self.count, self.tile = rows_of, count, tile_on(self.device)
        self.k, self.memory = min(params.range_max + 1, count), params.memory_mb << 20
        self.params = params

    @cached_property
    def sample(self) -> NDArray[np.floating]:
        """(m, dim) some vectors, at most as many as a tile has rows."""
        draw = np.random.default_rng(0)
        return self.rows_of(draw.choice(self.count, min(self.count, self.tile), replace=False))

    @cached_property
    def flat(self) -> FlatCost:
        """What FAISS costs."""
        from stages.mining.self_join import flat_cost

        return flat_cost(self.sample, self.k, self.device)

    @cached_property
    def join(self) -> JoinCost:
        """What a self-join costs."""
        from stages.mining.self_join import join_cost

        return join_cost(self.sample, self.k, self.device)

    def join_for(self, rows: int, *, asked: int) -> JoinCost | None:
        """Returns the cost of a self-join where that is the way to `asked` lists of all rows, else None."""
        if not self._may_join(rows):
            return None
        # On a GPU the alternative may be FAISS on the CPU (if it was built without GPUs), so join always.
        is_faster = self.device.type == "cuda" or self.join.seconds_for(
            rows
        ) < self.flat.seconds_for(rows, asked=asked)
        return self.join if is_faster else None

    def seconds_for(self, rows: int) -> float:
        """Returns the seconds of the lists of all of `rows` rows, among the pool if there is one."""
        if self.params.pool is not None and self.params.pool < rows:
            return self.flat.seconds_for(self.params.pool, asked=rows)
        join = self.join_for(rows, asked=rows)
        return join.seconds_for(rows) if join else self.flat.seconds_for(rows, asked=rows)

    def _may_join(self, rows: int) -> bool:
        """Whether a self-join is possible within the limits of rows, list length and memory."""
        import torch

        from stages.mining.self_join import join_bytes

        on_gpu = self.device.type == "cuda"
        available = torch.cuda.mem_get_info(self.device)[0] if on_gpu else self.memory
        one = self.rows_of(np.zeros(1, np.int64))
        size = join_bytes(rows, self.k + SPARE, one.shape[1], one.itemsize, tile=self.tile)
        limits = FEWEST_JOINED <= rows <= EXACT_ROWS[self.device.type] and self.k <= LONGEST_JOIN
        return limits and size <= available


def with_resolved_index(params: MineParams, recipe_of_lists: Mapping[str, Any]) -> MineParams:
    """Returns `params` with `index: auto` replaced by the index of existing lists, on any device."""
    if params.index != "auto":
        return params
    return params.model_copy(
        update={"index": recipe_of_lists.get("index", {"name": "flat"})["name"]}
    )


def run(
    params: MineParams,
    *,
    corpus: Corpus,
    embeddings: Embeddings,
    split: Split,
    store: Store,
    device: torch.device,
    out: Path,
    facts: Path,
    share: ShardSlice | None = None,
) -> Outcome:
    """Mine the shards that the store lacks, then write the manifest of all of them.

    It is long because it reads in the order of the work: what there is, what is mined, what is said of it.

    Args:
        params: The settings `mine`.
        corpus: The corpus.
        embeddings: The teacher's vectors.
        split: Which rows take part.
        store: The store for the lists.
        device: The device for exact search.
        out: The manifest.
        facts: Counts of what was rejected, and quantiles of the scores.
        share: Mine only these shards, and write neither manifest nor counts; None for all.

    Raises:
        TeachonceError: FAISS is needed and not installed, an approximate index misses too much, or exact
            search that `auto` chose takes longer than `mine.most_hours`.
    """
    train = split.train_rows(corpus)
    asking = rows_of_roles(params, corpus, train)
    pools = pools_of(params, corpus, asking)
    index = resolve(params, rows=largest(pools), dim=embeddings.dim, device=device)
    negatives_recipe, parent = recipe(params, index), parent_of(embeddings.manifest, split)
    name = fingerprint({**negatives_recipe, "parent": parent})
    keys = [f"negatives/{name}/{shard:06}.arrow" for shard in range(len(corpus.objects))]
    published = {key: store.find(key) for key in keys}
    of_share = (share or ShardSlice(1, 1)).of(len(keys))
    todo = [shard for shard in of_share if published[keys[shard]] is None]
    log.info("mine: %d of %d shards are in the store", len(of_share) - len(todo), len(of_share))
    progress = Progress("mine", total=sum(corpus.objects[s].rows for s in todo), unit="rows")
    found: Counter[str] = Counter()
    earlier = _earlier(negatives_recipe, corpus, embeddings, split, store) if todo else None
    for role in dict.fromkeys(map(corpus.role_of, todo)):
        shards = [shard for shard in todo if corpus.role_of(shard) == role]
        among = pools[params.among[role]]
        miner = Miner(params, corpus=corpus, embeddings=embeddings, train=asking[role], among=among)
        miner.grow(earlier, role)
        # The settings of an index are those for so many rows.
        its_index = index if len(among) == largest(pools) else None
        search = miner.search(its_index, asked=miner.rows_to_search(shards), device=device)
        for group in miner.groups(shards):
            for shard, lists in zip(group, miner.mine(search, group), strict=True):
                published[keys[shard]] = _put(store, keys[shard], lists, corpus.batch(shard))
                progress.advance(corpus.objects[shard].rows)
        found += miner.found
    account = f"{len(todo)} shards mined, {len(of_share) - len(todo)} found in the store"
    account += _account_of(found)
    if share is not None:
        return Outcome(
            stage=f"mine --shards {share}",
            made=store.root / "negatives" / name,
            summary=f"{account}; no manifest yet: `teachonce mine` writes it when all {share.count} "
            "shares are done",
            facts={"share": str(share), "shards_mined": len(todo)},
        )
    objects = tuple(entry for entry in published.values() if entry is not None)
    manifest = Manifest(kind="negatives", recipe=negatives_recipe, parent=parent, objects=objects)
    counts = _counts(store, manifest, train_rows=len(train), neighbours=params.neighbours)
    if index is not None:
        check_recall(counts["recall"], params.min_recall, index)
    write_json(facts, counts)
    manifest.save(out, store)
    if index is not None:
        _remove_indexes(index, embeddings, pools)
    if is_noticeable(counts["short_lists"], len(train)):
        log.warning("mine: %s", short_lists_warning(counts, params))
    recall = "" if index is None else f"{index['name']} with recall {counts['recall']:.3f}; "
    return Outcome(
        stage="mine",
        made=out,
        summary=(
            f"{counts['negatives']:,} negatives for {len(train):,} rows ({counts['short_lists']:,} "
            f"lists are short); median cosine {counts['score_quantiles']['0.5']:.3f}; {recall}{account}"
        ),
        facts=counts,
    )


def _earlier(
    made_of: Mapping[str, Any],
    corpus: Corpus,
    embeddings: Embeddings,
    split: Split,
    store: Store,
) -> Earlier | None:
    """Returns earlier lists of the same recipe; None if there are none, or by an approximate index."""
    from stages.mining.growth import find_earlier

    if "index" in made_of:
        return None
    return find_earlier(made_of, corpus, embeddings, split, store)


def _remove_indexes(
    index: Mapping[str, Any], embeddings: Embeddings, pools: Mapping[Role, NDArray[np.int64]]
) -> None:
    """Remove the files of indexes once all lists are there; who has one mapped keeps it."""
    from stages.mining.faiss_search import file_of

    for among in pools.values():
        file = file_of(embeddings.store.root, index, embeddings.manifest.content, among)
        if file.exists():
            durable.remove(file)


def _account_of(found: Mapping[str, int]) -> str:
    """Returns what was done with earlier lists, as the end of a sentence."""
    if not found:
        return ""
    return (
        f"; of the earlier lists {found['kept']:,} kept and {found['merged']:,} merged, "
        f"{found['searched']:,} searched"
    )


def _put(store: Store, key: str, lists: ShardLists, texts: pa.RecordBatch) -> Object:
    return put_negatives(
        store,
        key,
        neighbours=lists.neighbours,
        scores=lists.scores,
        text_keys=text_keys_of(texts),
        facts=lists.facts,
        rejected=lists.rejected,
    )


def rows_of_roles(
    params: MineParams, corpus: Corpus, train: NDArray[np.int64]
) -> dict[Role, NDArray[np.int64]]:
    """Returns role -> (n,) ids of its training rows, ascending, for the roles of a corpus.

    Raises:
        TeachonceError: rows are to find rows of a role that none has.
    """
    of_role = {role: corpus.of_role(train, role) for role in ROLES}
    for role in corpus.roles:
        among = params.among[role]
        if len(of_role[role]) and not len(of_role[among]):
            raise TeachonceError(
                f"mine.among.{role}",
                f"{among}, but the corpus has no training rows of that role",
                f"name another role there, or files of the role {among} in shard.sources",
            )
    return of_role


def pools_of(
    params: MineParams, corpus: Corpus, of_role: Mapping[Role, NDArray[np.int64]]
) -> dict[Role, NDArray[np.int64]]:
    """Returns role -> (m,) ids of its rows that may be found, ascending: all, or `mine.pool` of them."""
    if params.pool is None:
        return dict(of_role)
    return {
        role: rows[drawn(corpus.text_keys[rows], params.pool)] for role, rows in of_role.items()
    }


def largest(pools: Mapping[Role, NDArray[np.int64]]) -> int:
    """Returns the number of rows of the largest pool."""
    return max(map(len, pools.values()))


def short_lists_warning(counts: Mapping[str, Any], params: MineParams) -> str:
    """Returns a warning: how many lists are too short, which rules rejected candidates, and cures."""
    rows, rejected = counts["rows"], counts["rejected"]
    reasons = [f"{rejected[rule]:,} {rule}" for rule in RULES[1:] if rejected[rule]]
    cures = [
        f"{verb} mine.{setting} ({getattr(params, setting)})"
        for verb, setting, helps in (
            ("raise", "max_score", params.max_score < 1 and rejected["above_max_score"]),
            ("lower", "min_score", rejected["below_min_score"]),
            ("lower", "range_min", rejected["before_range_min"]),
            # If some are below min_score, all farther rows are, so range_max does not help.
            ("raise", "range_max", params.range_max < rows - 1 and not rejected["below_min_score"]),
            ("lower", "neighbours", True),
        )
        if helps
    ]
    return (
        f"{counts['short_lists']:,} of {rows:,} lists have fewer than {params.neighbours} negatives"
        + (f"; of what was found, left out: {', '.join(reasons)}" if reasons else "")
        + f": {', or '.join(cures)}"
    )


def check_recall(
    recall: float,
    min_recall: float,
    index: Mapping[str, Any],
    exact_seconds: Callable[[], float] | None = None,
) -> None:
    """Refuse an approximate index that misses too many of the nearest rows.

    Args:
        recall: The share that it finds, 0 to 1.
        min_recall: The least share.
        index: What `resolve` returned.
        exact_seconds: Returns what exact search would take, for the cure; None where that is unknown.

    Raises:
        TeachonceError: the recall is below `min_recall`; names both values.
    """
    if recall < min_recall:
        takes = f", which takes about {clock(exact_seconds())} here" if exact_seconds else ""
        raise TeachonceError(
            "mine.min_recall",
            f"{index['name']} found {recall:.3f} of the nearest rows of a sample, {min_recall} are wanted",
            f"set mine.index: flat{takes} (or hnsw, if it was ivf), or lower mine.min_recall",
        )


@dataclass(frozen=True)
class ShardLists:
    """The negatives of one shard.

    Args:
        neighbours: (rows, neighbours) row ids, -1 for none.
        scores: (rows, neighbours) cosines, descending, 0 for none.
        facts: Counts for the header of its object.
        rejected: (rows, rules) what each rule rejected; None of approximate lists.
    """

    neighbours: NDArray[np.int64]
    scores: NDArray[np.float32]
    facts: dict[str, int]
    rejected: NDArray[np.uint16] | None


class Miner:
    """Searches the training rows block by block and filters the neighbours.

    `memory_mb` covers what is allocated here and by FAISS: vectors in float32, lists of candidates and
    masks of the filters, or all that a self-join holds. Mapped files of the store and the lists of the
    shards being mined (12 bytes for each entry) come on top. An approximate index is counted when it is
    chosen.

    Args:
        params: The settings `mine`.
        corpus: The corpus, for its text keys.
        embeddings: The teacher's vectors, of any length; they are compared by cosine.
        train: (n,) int64 ids of the training rows that have lists, ascending.
        among: (m,) int64 ids of the training rows that are in their lists, ascending; None for the same.
    """

    def __init__(
        self,
        params: MineParams,
        *,
        corpus: Corpus,
        embeddings: Embeddings,
        train: NDArray[np.int64],
        among: NDArray[np.int64] | None = None,
    ) -> None:
        self.params, self.corpus, self.embeddings, self.train = params, corpus, embeddings, train
        self.among = train if among is None else among
        # What a search knows by place: first the rows that are found, then those that ask, if others.
        self.is_among_itself = np.array_equal(self.among, train)
        self.known = train if self.is_among_itself else np.concatenate([self.among, train])
        self.first_asking = len(self.known) - len(train)
        self.k = min(params.range_max + 1, len(self.among))
        self.wide = min(self.k + SPARE, len(self.among))
        self.growth: Growth | None = None
        # Of rows with earlier lists and others: how many are kept, merged or searched.
        self.found: Counter[str] = Counter()
        # Sample rows of the recall measurement, and how many of their k nearest the index returned.
        self.recall_rows: NDArray[np.int64] | None = None
        self.recall_found = np.empty(0, np.int64)
        # A quarter each for a block of the corpus, for the next block being read, for queries with their
        # candidates (id, cosine, text key, masks of the filters: 64 bytes), and for FAISS itself.
        vector, quarter = embeddings.dim * 4, params.memory_mb << 18
        self.block_rows = max(1024, quarter // vector)
        self.query_rows = int(np.clip(quarter // (vector + 64 * self.wide), 64, QUERY_ROWS))

    def train_rows_of(self, shard: int) -> int:
        """Returns the number of training rows in a shard."""
        return len(self._places(shard))

    def groups(self, todo: Sequence[int]) -> list[list[int]]:
        """Group consecutive shards of `todo` to be searched together, up to about `query_rows` rows.

        Where earlier lists are merged, of more rows, of which few are searched.
        """
        groups: list[list[int]] = []
        rows_left = 0
        most = self.query_rows if self.growth is None else MERGED_ROWS
        for shard in todo:
            rows = self.train_rows_of(shard)
            if not groups or rows > rows_left:
                groups.append([])
                rows_left = most
            groups[-1].append(shard)
            rows_left -= rows
        return groups

    def grow(self, earlier: Earlier | None, role: Role) -> None:
        """Merge earlier lists from now on, if rows of a role have some and that is less work.

        Args:
            earlier: The earlier lists; None if there are none.
            role: The role of the rows that ask.
        """
        from stages.mining.growth import growth_of

        if earlier is None:
            return
        before = earlier.corpus
        asking = rows_of_roles(self.params, before, earlier.split.train_rows(before))
        self.growth = growth_of(
            self.params,
            earlier,
            asking=self.train,
            among=self.among,
            old_among=pools_of(self.params, before, asking)[self.params.among[role]],
            text_keys=self.corpus.text_keys,
            unit_of=self._unit,
        )

    def rows_to_search(self, shards: Sequence[int]) -> int:
        """Returns the number of rows of some shards without earlier lists."""
        if self.growth is None:
            return sum(self.train_rows_of(shard) for shard in shards)
        rows = [self.known[self._places(shard)] for shard in shards]
        return int((self.growth.earlier.old_ids[np.concatenate(rows)] < 0).sum())

    def search(
        self, index: Mapping[str, Any] | None, *, asked: int, device: torch.device
    ) -> NearestRows:
        """Returns the search to use for `asked` rows; measures the recall of an approximate index first.

        An index that finds too little looks at twice as many candidates, and so on, before it makes a list.

        Raises:
            TeachonceError: FAISS is needed and not installed, the index misses too much whatever it looks
                at, or `auto` would search exactly for longer than `mine.most_hours`.
        """
        from stages.mining.cosines import nearest_first
        from stages.mining.faiss_search import ApproximateSearch, file_of, hits_in

        rows = len(self.among)
        if self.growth is not None:
            self._check_hours(asked, device)
            return self.flat(device)
        if index is None or not asked:
            self._check_hours(asked, device)
            return self._exact(asked, device)
        file = file_of(
            self.embeddings.store.root, index, self.embeddings.manifest.content, self.among
        )
        search = ApproximateSearch(self.unit_rows, rows, self.k, index=index, file=file)
        draw = np.random.default_rng(0)
        asking = len(self.train)
        sample = np.sort(draw.choice(asking, min(asking, RECALL_ROWS), replace=False))
        sample += self.first_asking
        ids, cosines = self.flat(device).nearest(sample)
        exact = nearest_first(sample, (ids, cosines))
        exact = exact[0][:, : self.k], exact[1][:, : self.k]
        self.recall_rows, self.recall_found = sample, hits_in(search.nearest(sample), exact)
        while self._recall < self.params.min_recall and search.look_at_more():
            self.recall_found = hits_in(search.nearest(sample), exact)
        costs = ExactCosts(self.params, self.rows_of, rows, device)
        exact_seconds = partial(costs.seconds_for, rows)
        check_recall(self._recall, self.params.min_recall, index, exact_seconds)
        log.info(
            "mine: %s finds %.4f of what exact search finds, with %s",
            index["name"],
            self._recall,
            search.effort,
        )
        return search

    @property
    def _recall(self) -> float:
        """The share of the nearest rows of the sample that the index returned."""
        return float(self.recall_found.mean()) / self.k

    def _check_hours(self, asked: int, device: torch.device) -> None:
        """Refuse an exact search that `auto` chose and that would take longer than `mine.most_hours`."""
        from stages.mining.faiss_search import index_bytes

        rows, limit = len(self.among), EXACT_ROWS.get(device.type, EXACT_ROWS["cpu"])
        if self.params.index != "auto" or asked * rows <= limit**2:
            return
        costs = ExactCosts(self.params, self.rows_of, rows, device)
        hours = costs.flat.seconds_for(rows, asked=asked) / 3600
        most = self.params.most_hours
        if hours <= most:
            return
        pool = min(100_000, max(1, int(rows * most / hours / 1000)) * 1000)
        room = index_bytes(AUTO[-1], rows=rows, dim=self.embeddings.dim) >> 20
        raise TeachonceError(
            "mine.most_hours",
            f"is {most:g}, but exact search of {asked:,} rows among {rows:,} would take about {hours:,.0f} "
            "hours here",
            f"set mine.pool: {pool} (about {clock(3600 * hours * pool / rows)}), or mine.memory_mb: {room} "
            f"for {AUTO[-1]}, or begin it all the same with mine.index: flat",
        )

    def _exact(self, asked: int, device: torch.device) -> NearestRows:
        """Returns a finished self-join where it fits and is estimated to be faster, else FAISS search."""
        from stages.mining.self_join import SelfJoin

        if not asked or not self.is_among_itself:
            return self.flat(device)
        costs, rows = (
            ExactCosts(self.params, self.rows_of, len(self.train), device),
            len(self.train),
        )
        cost = costs.join_for(rows, asked=asked)
        if cost is None:
            return self.flat(costs.device)
        expected = ""
        if costs.device.type == "cpu":
            by_faiss = costs.flat.seconds_for(rows, asked=asked)
            expected = f", about {clock(cost.seconds_for(rows))} (FAISS: {clock(by_faiss)})"
        product = str(cost.product).removeprefix("torch.")
        log.info(
            "mine: a self-join in %s on %s%s; killed, it begins again",
            product,
            costs.device,
            expected,
        )
        join = SelfJoin(
            self.rows_of,
            rows,
            self.wide,
            device=costs.device,
            product=cost.product,
            tile=costs.tile,
        )
        progress = Progress("mine", total=join.steps, unit="tiles")
        for _ in join.run():
            progress.advance(1)
        return join

    def flat(self, device: torch.device) -> NearestRows:
        """Returns an exact search by FAISS, block by block."""
        from stages.mining.faiss_search import FlatSearch

        return FlatSearch(
            self.unit_rows, len(self.among), self.wide, block_rows=self.block_rows, device=device
        )

    def rows_of(self, places: NDArray[np.int64]) -> NDArray[np.floating]:
        """Returns (m, dim) stored vectors of training rows, by their place in `known`."""
        return self.embeddings.rows_of(self.known[places])

    def unit_rows(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """Returns (m, dim) float32 vectors of unit length of training rows, by their place in `known`."""
        return self._unit(self.known[places])

    def _unit(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """As `unit_rows`, by row id."""
        from stages.mining.cosines import lengths

        vectors = np.empty((len(rows), self.embeddings.dim), np.float32)
        for first in range(0, len(rows), 256):  # small blocks need little memory for intermediates
            block = self.embeddings.rows_of(rows[first : first + 256]).astype(
                np.float32, copy=False
            )
            vectors[first : first + 256] = block / lengths(block)
        return vectors

    def mine(self, search: NearestRows, shards: Sequence[int]) -> list[ShardLists]:
        """Search some shards together, and keep the neighbours that no rule rejects.

        Lists that follow from earlier ones are not searched.
        """
        places = np.concatenate([self._places(shard) for shard in shards])
        lists, todo = Lists.empty(len(places), self.params.neighbours), np.arange(len(places))
        if self.growth is not None:
            known = self.growth.lists(self.known[places])
            lists, todo = known.lists, np.flatnonzero(~known.is_known)
            kept = len(places) - len(todo) - known.merged
            self.found.update(kept=kept, merged=known.merged, searched=len(todo))
        for first in range(0, len(todo), self.query_rows):
            block = todo[first : first + self.query_rows]
            lists.put(block, self._searched(search, places[block]))
        ends = np.cumsum([self.train_rows_of(shard) for shard in shards])[:-1]
        columns = places, lists.neighbours, lists.scores, lists.rejected
        parts = (np.split(values, ends) for values in columns)
        return [
            self._of_shard(*part, is_exact=search.is_exact)
            for part in zip(shards, *parts, strict=True)
        ]

    def _searched(self, search: NearestRows, places: NDArray[np.int64]) -> Lists:
        """Returns the lists of some rows, by their places in `known`, searched."""
        from stages.mining.cosines import nearest_first

        own, found = self.known[places], search.nearest(places)
        found = np.where(found[0] >= 0, self.known[found[0]], NONE), found[1]
        if not search.is_exact:
            return self._filtered(own, found)
        found = nearest_first(own, found)
        lists = self._filtered(own, (found[0][:, : self.k], found[1][:, : self.k]))
        unsure = np.flatnonzero(self._are_unsure(lists, found[1]))
        for first in range(0, len(unsure), UNSURE_ROWS):
            some = unsure[first : first + UNSURE_ROWS]
            window = self._window(own[some], found[1][some, self.k - 1])
            lists.put(some, self._filtered(own[some], window))
        return lists

    def _filtered(self, own: NDArray[np.int64], found: IdsAndCosines) -> Lists:
        """Returns lists made of candidates in order: what no rule rejects, and what each rule rejected."""
        rejected = reject(self.params, *found, own=own, text_keys=self.corpus.text_keys)
        is_rejected = np.logical_or.reduce([found[0] == NONE, *rejected.values()])
        neighbours, scores = keep_first(*found, ~is_rejected, self.params.neighbours)
        counts = np.stack([rejected[rule].sum(axis=1) for rule in RULES], axis=1)
        return Lists(neighbours, scores, counts)

    def _are_unsure(self, lists: Lists, cosines: NDArray[np.float32]) -> NDArray[np.bool_]:
        """(m,) True for lists that depend on who takes the last places of the window, where that is open.

        What was not found has at most the cosine of the last that was, but for last bits. If that is not
        farther than the last of the window, it may belong there. Mostly it does not matter: the list was
        full before, or all that can stand there is rejected by one and the same rule.
        """
        from stages.mining.cosines import margin

        if self.wide == len(self.among):
            return np.zeros(len(cosines), bool)
        last = cosines[:, self.k - 1]
        most = cosines[:, -1] + 2 * np.float32(margin(self.embeddings.dim))
        lowest = -2.0 if self.params.min_score is None else self.params.min_score
        is_full_before = (lists.neighbours[:, -1] != NONE) & (last >= lowest)
        is_full_before &= lists.scores[:, -1] > most
        is_one_rule = (last > self.params.max_score) | (most < lowest)
        does_not_matter = (is_full_before | is_one_rule) & self._texts_differ
        is_unsure: NDArray[np.bool_] = (last <= most) & ~does_not_matter
        return is_unsure

    @cached_property
    def _texts_differ(self) -> bool:
        """Whether no text stands twice among the rows, as is so of every corpus that `shard` makes."""
        keys = self.corpus.text_keys[np.union1d(self.among, self.train)]
        return len(np.unique(keys.view("S16"))) == len(keys)

    def _window(self, own: NDArray[np.int64], last: NDArray[np.float32]) -> IdsAndCosines:
        """Returns the k candidates of (m,) rows in order, whose last has a cosine of `last` or more."""
        from stages.mining.cosines import close_pairs, first_of_each, margin

        limits = np.minimum(last, np.float32(1 - margin(self.embeddings.dim)))  # it has itself
        rows, ids, cosines = close_pairs(self._unit(own), limits, self._unit, self.among)
        return first_of_each(own, rows, ids, cosines, self.k)

    def _of_shard(
        self,
        shard: int,
        places: NDArray[np.int64],
        neighbours: NDArray[np.int64],
        scores: NDArray[np.float32],
        rejected_counts: NDArray[np.int64],
        *,
        is_exact: bool,
    ) -> ShardLists:
        """Returns the lists of a whole shard; rows that are not for training get empty ones."""
        rows = self.known[places] - self.corpus.starts[shard]
        shape = (self.corpus.objects[shard].rows, self.params.neighbours)
        all_neighbours, all_scores = np.full(shape, NONE, np.int64), np.zeros(shape, np.float32)
        all_neighbours[rows], all_scores[rows] = neighbours, scores
        all_rejected = np.zeros((shape[0], len(RULES)), np.uint16) if is_exact else None
        if all_rejected is not None:
            all_rejected[rows] = rejected_counts
        facts = {
            rule: int(count) for rule, count in zip(RULES, rejected_counts.sum(axis=0), strict=True)
        }
        facts["negatives"] = int((neighbours != NONE).sum())
        facts["short_lists"] = int((neighbours == NONE).any(axis=1).sum())
        if self.recall_rows is not None:
            tried = np.isin(self.recall_rows, places)
            facts["recall_wanted"] = int(tried.sum()) * self.k
            facts["recall_found"] = int(self.recall_found[tried].sum())
        return ShardLists(all_neighbours, all_scores, facts, all_rejected)

    def _places(self, shard: int) -> NDArray[np.int64]:
        """Returns the places in `known` of one shard's rows."""
        bounds = np.searchsorted(self.train, self.corpus.starts[shard : shard + 2])
        first, last = bounds + self.first_asking
        return np.arange(first, last)


def _counts(
    store: Store, manifest: Manifest, *, train_rows: int, neighbours: int
) -> dict[str, Any]:
    """Returns counts of rejections by rule and quantiles of the kept scores, over all shards."""
    total: Counter[str] = Counter()
    bins = np.zeros(SCORE_BINS, np.int64)
    for entry in manifest.objects:
        total.update(store.facts(entry.key))
        batch = store.open(entry)
        kept = matrix_of(batch, "scores")[matrix_of(batch, "neighbours") != NONE]
        places = np.clip(np.round((kept.astype(np.float64) + 1) * 1000), 0, SCORE_BINS - 1)
        bins += np.bincount(places.astype(np.int64), minlength=SCORE_BINS)
    below = np.cumsum(bins)
    quantiles = {
        str(q): round(float(np.searchsorted(below, q * below[-1])) / 1000 - 1, 3)
        if below[-1]
        else 0.0
        for q in QUANTILES
    }
    counts = {
        "rows": train_rows,
        "neighbours": neighbours,
        "negatives": total["negatives"],
        "short_lists": total["short_lists"],
        "rejected": {rule: total[rule] for rule in RULES},
        "score_quantiles": quantiles,
    }
    if "index" in manifest.recipe:  # an empty sample has recall 1
        counts["recall"] = round((total["recall_found"] or 1) / (total["recall_wanted"] or 1), 4)
    return counts
