"""Lists of a corpus that has grown: those of before, with what the new rows change in them.

Lists name rows by id and stand under the hash of all vectors, so a corpus that grows by one text has none.
But what a rule says of a pair depends on the pair alone. A row's candidates are ranked, the first
`range_max + 1` are its window, and its list is the first in the window that no rule rejects. Rows that
came push others back, and rows that left (of a pool) let others in; who came or left and is farther than
all that a list depends on changes nothing. Each list stands with what each rule rejected in its window.
Together with the pairs of the row and those who came, that says what mining anew would find, or that it
cannot be said. Then the row is searched again.

The earlier lists are found by the manifests that the store knows. They belong to this corpus if their
parent is the hash of earlier vectors and of this split without the new rows. Where a text is gone, or texts
are in another order, or the split is another, all lists are made anew. So are those of an approximate
index: what it would have missed, nobody knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.mining.cosines import close_pairs, first_of_each
from stages.mining.filters import RULES, Lists
from stages.outcome import log
from stages.params import MineParams
from storage.column import KeyIndex
from storage.corpus import Corpus, shard_digest
from storage.embeddings import Embeddings
from storage.errors import TeachonceError
from storage.holders import REFS
from storage.manifest import Kind, Manifest
from storage.negatives import NONE, Negatives, parent_of
from storage.split import Split
from storage.store import Store
from storage.upkeep.inventory import read_refs

MOST_CHANGED = 0.25
"""Share of rows that are new, above which all lists are made anew: merging saves little then."""

ROWS_AT_ONCE = 8192  # whose earlier lists are read together
UNLIMITED = -2.0  # below every cosine

UnitOf = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""(m,) row ids -> (m, dim) float32 vectors of unit length."""


@dataclass(frozen=True)
class Earlier:
    """Lists of the same recipe for a corpus of which every text may be in this one, too.

    Args:
        corpus: The corpus of that time.
        split: Its split.
        lists: Its lists.
        new_ids: (earlier rows,) int64 the ids of its rows now, ascending, -1 for texts that are gone.
        old_ids: (rows,) int64 the ids that rows had then, -1 for new texts.
    """

    corpus: Corpus
    split: Split
    lists: Negatives
    new_ids: NDArray[np.int64]
    old_ids: NDArray[np.int64]


def find_earlier(
    recipe: Mapping[str, Any], corpus: Corpus, embeddings: Embeddings, split: Split, store: Store
) -> Earlier | None:
    """Returns the largest earlier lists that can be merged, None if the store knows none.

    Args:
        recipe: The recipe of the lists.
        corpus: The corpus as it is now.
        embeddings: Its vectors.
        split: Its split.
        store: The store.
    """
    if not (store.root / REFS).is_dir():
        return None
    known: dict[Kind, dict[str, Manifest]] = {"corpus": {}, "embeddings": {}, "negatives": {}}
    for ref in read_refs(store.root)[0]:
        if ref.manifest.kind in known:
            known[ref.manifest.kind][ref.manifest_digest] = ref.manifest
    of_recipe = [made for made in known["negatives"].values() if made.recipe == recipe]
    vectors = [
        made
        for made in known["embeddings"].values()
        if made.recipe == embeddings.manifest.recipe and made.content != embeddings.manifest.content
    ]
    for lists in sorted(of_recipe, key=lambda made: -made.rows):
        for texts, made in _made_of(lists, known["corpus"].values(), vectors):
            try:
                earlier = _matched(store, (texts, made, lists), corpus, embeddings, split)
                if earlier is not None and earlier.lists.have_counts:
                    return earlier
            except TeachonceError as error:
                log.info("mine: earlier lists cannot be read: %s", error)
    return None


def _made_of(
    lists: Manifest, corpora: Iterable[Manifest], vectors: Iterable[Manifest]
) -> Iterator[tuple[Manifest, Manifest]]:
    """Yield the manifests of texts and vectors with as many rows as the lists, shard by shard."""
    rows = [entry.rows for entry in lists.objects]
    for texts in corpora:
        if [entry.rows for entry in texts.objects] == rows:
            digests = [shard_digest(entry) for entry in texts.objects]
            for made in vectors:
                if [shard_digest(entry) for entry in made.objects] == digests:
                    yield texts, made


def _matched(
    store: Store,
    manifests: tuple[Manifest, Manifest, Manifest],
    corpus: Corpus,
    embeddings: Embeddings,
    split: Split,
) -> Earlier | None:
    """Returns lists with the ids of their rows, None if they are of another split, order or vectors."""
    texts, vectors, lists = manifests
    before = Corpus(store, texts)
    new_ids = KeyIndex(corpus.text_keys).places(before.text_keys)
    there = np.flatnonzero(new_ids >= 0)
    # Of equal cosines the lower id comes first, so the order must have stayed; this also refuses a text
    # that stands twice in a corpus.
    if not len(there) or (np.diff(new_ids[there]) <= 0).any():
        return None
    old_ids = np.full(corpus.rows, -1, np.int64)
    old_ids[new_ids[there]] = there
    found = old_ids[list(split.evaluation)]
    its_split = Split(
        corpus=texts.content,
        heldout=split.heldout,
        evaluation=tuple(found[found >= 0].tolist()),
    )
    if lists.parent != parent_of(vectors, its_split):
        return None
    if not _are_equal(Embeddings(store, vectors, before), embeddings, new_ids):
        log.info("mine: the vectors of earlier texts are others now, so all lists are made anew")
        return None
    return Earlier(
        before,
        its_split,
        Negatives(store, lists, before, mined_from=lists.parent),
        new_ids,
        old_ids,
    )


def _are_equal(before: Embeddings, now: Embeddings, new_ids: NDArray[np.int64]) -> bool:
    """Whether all rows that are still there have the same vectors; objects in common are not read."""
    in_common = {entry.key: entry.sha256 for entry in now.objects}
    for shard, entry in enumerate(before.objects):
        if in_common.get(entry.key) == entry.sha256:
            continue
        rows = np.arange(before.starts[shard], before.starts[shard + 1])
        rows = rows[new_ids[rows] >= 0]
        for first in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[first : first + ROWS_AT_ONCE]
            if not np.array_equal(before.rows_of(part), now.rows_of(new_ids[part])):
                return False
    return True


@dataclass(frozen=True)
class Merged:
    """Lists of n rows, as far as they follow from earlier ones.

    Args:
        is_known: (n,) False for rows that must be searched.
        lists: The lists of n rows.
        merged: Number of known lists that are others than before.
    """

    is_known: NDArray[np.bool_]
    lists: Lists
    merged: int


class Growth:
    """Merges earlier lists with the rows that came.

    Args:
        params: The settings `mine`.
        earlier: The earlier lists.
        among: (m,) ids of the rows that may be found now, ascending.
        among_before: (l,) ids that those who could be found then have now, ascending.
        text_keys: (rows,) V16 text keys of the corpus.
        unit_of: Returns the vectors of rows.
    """

    def __init__(
        self,
        params: MineParams,
        earlier: Earlier,
        *,
        among: NDArray[np.int64],
        among_before: NDArray[np.int64],
        text_keys: NDArray[np.bytes_],
        unit_of: UnitOf,
    ) -> None:
        self.params, self.earlier, self.text_keys, self.unit_of = (
            params,
            earlier,
            text_keys,
            unit_of,
        )
        self.among, self.window = among, params.range_max + 1
        self.came = np.setdiff1d(among, among_before, assume_unique=True)
        self.left = np.setdiff1d(among_before, among, assume_unique=True)
        self.changed = np.concatenate([self.came, self.left])

    def lists(self, rows: NDArray[np.int64]) -> Merged:
        """Returns what is known of the lists of (n,) rows."""
        is_known, merged = np.zeros(len(rows), bool), 0
        lists = Lists.empty(len(rows), self.params.neighbours)
        for first in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[first : first + ROWS_AT_ONCE]
            places = np.flatnonzero(self.earlier.old_ids[part] >= 0)
            some = self._lists(part[places])
            is_known[first + places] = some.is_known
            lists.put(first + places, some.lists)
            merged += some.merged
        return Merged(is_known, lists, merged)

    def _lists(self, rows: NDArray[np.int64]) -> Merged:
        """As `lists`, of rows that had one.

        It is long because it goes through the rules in their order: what a list depends on, what came near
        enough, and what follows for the list and the counts.
        """
        params, old = self.params, self.earlier.old_ids[rows]
        ids, scores = self.earlier.lists.rows_of(old)
        rejected = self.earlier.lists.rejected_of(old)
        ids = np.where(ids == NONE, NONE, self.earlier.new_ids[ids])
        itself, same, above, below, early = rejected.T
        kept = (ids != NONE).sum(axis=1)
        is_full = kept == params.neighbours
        # A list that is neither full nor ends at min_score ends at the end of its window.
        is_known = (kept > 0) & (early == params.range_min) & (same == 0)
        keys = self.text_keys.view("S16")
        is_known &= (itself == np.isin(rows, self.among)) & ~np.isin(keys[rows], keys[self.changed])
        # Where a window reaches below min_score, how many it has above is known and counts. Where somebody
        # left, the window may reach below it now.
        lowest = UNLIMITED if params.min_score is None else params.min_score
        last = scores[np.arange(len(rows)), np.maximum(kept, 1) - 1]
        reaches_lowest = (below > 0) | (params.min_score is not None and len(self.left) > 0)
        limits = np.where(reaches_lowest, np.float32(lowest), last)
        asked = np.flatnonzero(is_known)
        pairs = close_pairs(self.unit_of(rows[asked]), limits[asked], self.unit_of, self.changed)
        at, others, cosines = asked[pairs[0]], pairs[1], pairs[2]
        is_known[at[np.isin(others, self.left)]] = False
        is_above = cosines > params.max_score
        if params.range_min:  # the nearest that are skipped are not in the list
            is_known[at[~is_above & (cosines >= scores[at, 0])]] = False
        came = np.bincount(at, minlength=len(rows))
        came_above = np.bincount(at[is_above], minlength=len(rows))
        # Of a full list, what comes before it pushes its last out of the window. A short one is all that
        # its window has above min_score, so whoever comes takes a place from what is below it, if any is.
        spare = np.where(is_full, self.window - (itself + above + early + kept), below)
        is_known &= np.where(is_full, came_above, came) <= spare
        rejected[:, RULES.index("above_max_score")] += came_above
        rejected[:, RULES.index("below_min_score")] = np.maximum(below - came, 0)
        joins = ~is_above & is_known[at]
        touched = np.unique(at[joins])
        of_touched, places = np.nonzero(ids[touched] != NONE)
        held = touched[of_touched]
        new_ids, new_scores = first_of_each(
            np.full(len(touched), NONE),  # no row is in its own list
            np.searchsorted(touched, np.concatenate([held, at[joins]])),
            np.concatenate([ids[held, places], others[joins]]),
            np.concatenate([scores[held, places], cosines[joins]]),
            params.neighbours,
        )
        merged = int((ids[touched] != new_ids).any(axis=1).sum())
        ids[touched], scores[touched] = new_ids, new_scores
        return Merged(is_known, Lists(ids, scores, rejected), merged)


def growth_of(
    params: MineParams,
    earlier: Earlier,
    *,
    asking: NDArray[np.int64],
    among: NDArray[np.int64],
    old_among: NDArray[np.int64],
    text_keys: NDArray[np.bytes_],
    unit_of: UnitOf,
) -> Growth | None:
    """Returns what merges the lists of some rows, None if they are better made anew.

    Args:
        params: The settings `mine`.
        earlier: The earlier lists.
        asking: (n,) ids of the rows that have lists.
        among: (m,) ids of the rows that may be found.
        old_among: (l,) the earlier ids of the rows that could be found then.
        text_keys: (rows,) V16 text keys of the corpus.
        unit_of: Returns the vectors of rows.
    """
    among_before = earlier.new_ids[old_among]
    is_gone = (among_before < 0).any()
    # A window that held all rows is a larger one now.
    was_whole = min(len(old_among), len(among)) <= params.range_max
    if is_gone or was_whole:
        return None
    growth = Growth(
        params,
        earlier,
        among=among,
        among_before=among_before,
        text_keys=text_keys,
        unit_of=unit_of,
    )
    new = int((earlier.old_ids[asking] < 0).sum())
    if new > MOST_CHANGED * len(asking) or len(growth.changed) > MOST_CHANGED * len(among):
        return None
    return growth
