"""The money for a teacher behind an API: what is spent in all runs, what may be spent, what is left."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from stages.teaching.interface import StoppedTeacherError
from storage.errors import StorageError
from storage.journal import Ledger

MILLION = 1_000_000


class BudgetError(StoppedTeacherError):
    """The next request could pass the budget."""


@dataclass
class Bill:
    """What a request took, in tokens; 0 as long as it is not known that the server has read it."""

    paid: int = 0


class Purse:
    """Pays for requests, as long as the budget has room for them. Safe to use from several threads.

    Args:
        ledger: Keeps what was paid by all runs.
        price: Of a million tokens; None if unknown.
        budget: In the currency of the price, for all runs; None for no limit.
    """

    def __init__(self, ledger: Ledger, *, price: float | None, budget: float | None) -> None:
        self.price, self.budget = price, budget
        self.paid = 0
        self._ledger = ledger
        self._reserved = 0
        self._changed = threading.Condition()

    @contextmanager
    def reserved(self, tokens: int) -> Iterator[Bill]:
        """Put money aside for a request of at most this many tokens; the bill says what it took.

        Waits for requests that are under way if it is not sure whether they leave enough.

        Raises:
            BudgetError: there is not enough.
            StoppedTeacherError: the disk refused to note what was paid.
        """
        with self._changed:
            while not self._is_enough_for(self._reserved + tokens):
                if not self._reserved:
                    raise self._spent(tokens)
                self._changed.wait()
            self._reserved += tokens
        bill = Bill()
        try:
            yield bill
        finally:
            with self._changed:
                self._reserved -= tokens
                self.paid += bill.paid
                try:
                    if bill.paid:
                        self._ledger.add(bill.paid)
                except StorageError as error:
                    raise StoppedTeacherError(error.where, error.problem, error.cure) from error
                finally:
                    self._changed.notify_all()

    def summary(self) -> str:
        """Returns what this run paid and what is left, as a sentence."""
        paid = f"{self.paid:,} tokens paid"
        if self.price is None:
            return paid
        paid += f", {self.cost(self.paid):.4f} by embed.api.price_per_million_tokens"
        if self.budget is None:
            return paid
        spent = self.cost(self._ledger.total())
        return f"{paid}; {spent:.4f} in all runs, {max(self.budget - spent, 0):.4f} of the budget is left"

    def cost(self, tokens: int) -> float:
        """Returns the price of this many tokens."""
        return tokens * (self.price or 0) / MILLION

    def _is_enough_for(self, tokens: int) -> bool:
        return self.budget is None or self.cost(self._ledger.total() + tokens) <= self.budget

    def _spent(self, tokens: int) -> BudgetError:
        spent = self._ledger.total()
        assert self.budget is not None
        left = max(self.budget - self.cost(spent), 0)
        return BudgetError(
            "embed.api.budget",
            f"{self.budget:g}, of which {self.cost(spent):.4f} is spent ({spent:,} tokens in all "
            f"runs of this model with this store) and {left:.4f} is left; "
            f"the next request of up to {tokens:,} tokens could pass it",
            "what was answered is kept: raise embed.api.budget, then `teachonce embed` asks for the rest",
        )
