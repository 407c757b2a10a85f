"""Threads make what is needed next, no more than that, and end with whoever asks."""

import threading

import pytest

from stages.learning.ahead import ahead


def threads_of_it():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_made_comes_in_order_and_no_more_is_begun_than_the_threads(threads):
    drawn, most, asked = [], [], 0
    for asked, number in enumerate(
        ahead(lambda item: item**2, map(noted(drawn), range(20)), threads=threads)
    ):
        assert number == asked**2
        most.append(len(drawn) - asked)
    assert asked == 19
    assert max(most) == threads + 1
    assert not threads_of_it()


def noted(drawn):
    def note(item):
        drawn.append(item)
        return item

    return note


def test_an_error_comes_in_its_turn_and_ends_the_threads():
    begun = []

    def make(item):
        begun.append(item)
        if item == 2:
            raise ValueError("of 2")
        return item

    made = ahead(make, range(100), threads=2)
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(ValueError, match="of 2"):
        next(made)
    assert len(begun) <= 5
    assert not threads_of_it()


def test_who_stops_asking_ends_the_threads():
    begun, made_one = [], threading.Event()

    def make(item):
        begun.append(item)
        made_one.set()
        return item

    made = ahead(make, range(100))
    next(made)
    made_one.wait()
    made.close()  # as an exception in the loop around it does
    assert len(begun) <= 2
    assert not threads_of_it()
