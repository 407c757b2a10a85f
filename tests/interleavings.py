"""Several actors on one store, stepped one at a time: every order of their steps can be had, and had again.

An actor is a function in a thread of its own. It stops before each call of the operating system that reads
or changes a name others care for, until it is its turn. What is called is real, and so is the folder.
"""

import os
import random
import re
import threading

CALLS = ("open", "link", "rename", "unlink", "utime", "stat", "lstat", "listdir", "scandir")
SECONDS = 60


class Turns:
    """Lets actors go one step at a time while it is entered.

    Args:
        patch: A monkeypatch.
        shared: shared(actor, call, path) is true of the calls before which an actor stops.
        forbidden: Calls that are answered with "permission denied".
    """

    def __init__(self, patch, shared, forbidden=()):
        self.patch, self.shared, self.forbidden = patch, shared, forbidden
        self.mine = threading.local()
        self.changed = threading.Condition()

    def __enter__(self):
        for name in CALLS:
            self.patch.setattr(os, name, self._stopping(getattr(os, name), name))
        self.patch.setattr(os, "fsync", lambda descriptor: None)  # nobody loses power here
        return self

    def __exit__(self, *exception):
        self.patch.undo()

    def run(self, actors, choose):
        """Run actors to their ends: choose(the numbers of those that have not ended) goes next.

        Returns:
            What each returned, or the exception that it raised.
        """
        self.at_stop, self.turn = set(), None
        ended = [None] * len(actors)
        running = set(range(len(actors)))

        def play(number):
            self.mine.number = number
            try:
                ended[number] = actors[number]()
            except Exception as error:  # told by the test
                ended[number] = error
            with self.changed:
                running.discard(number)
                self.turn = None
                self.changed.notify_all()

        threads = [threading.Thread(target=play, args=[n], daemon=True) for n in running]
        for thread in threads:
            thread.start()
        while True:
            with self.changed:
                stopped = self.changed.wait_for(
                    lambda: self.turn is None and self.at_stop == running, SECONDS
                )
                assert stopped, "an actor waits for another"
                if not running:
                    break
                self.turn = choose(sorted(running))
                self.at_stop.discard(self.turn)
                self.changed.notify_all()
        for thread in threads:
            thread.join()
        return ended

    def _stop(self):
        number = self.mine.number
        with self.changed:
            self.at_stop.add(number)
            if self.turn == number:
                self.turn = None
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self.turn == number, SECONDS)

    def _stopping(self, call, name):
        def stopping(*arguments, **options):
            path = arguments[0] if arguments else "."
            if getattr(self.mine, "number", None) is not None:
                # Of two names it is the new one that others ask for.
                target = arguments[1] if name in ("link", "rename") else path
                if any(self.shared(self.mine.number, name, str(each)) for each in (target, path)):
                    self._stop()
            if name in self.forbidden:
                raise PermissionError(13, "Permission denied")
            return call(*arguments, **options)

        return stopping


def every_order():
    """One `choose` after the other, until all orders were had: depth first, by the last choice left.

    Yields:
        choose, for one run each; the run must have ended before the next is asked for.
    """
    path = []
    while True:
        taken = []

        def choose(running, taken=taken, path=path):
            place = path[len(taken)][0] if len(taken) < len(path) else 0
            taken.append((place, len(running)))
            return running[place]

        yield choose
        path = taken
        while path and path[-1][0] + 1 == path[-1][1]:
            path.pop()
        if not path:
            return
        path[-1] = (path[-1][0] + 1, path[-1][1])


def drawn_orders(seed, count):
    """So many `choose`, drawn by chance; each actor goes on for some steps as a rule, as in life."""
    draw = random.Random(seed)
    for _ in range(count):
        last = []
        stays = draw.choice([0.2, 0.5, 0.8])

        def choose(running, last=last, stays=stays):
            if not (last and last[0] in running and draw.random() < stays):
                last[:] = [draw.choice(running)]
            return last[0]

        yield choose


def names_of_objects_and_refs(root, *, gcs=()):
    """shared() for a store: calls at which the order between gc and others can matter.

    A gc (the actors `gcs`) lists a folder and asks for the time of each file. That is one step here: to all
    others it is the same whether they come before both or between the two.
    """
    folders = re.compile(rf"{re.escape(str(root))}/(text|vectors/\w+)")
    objects = re.compile(rf"{folders.pattern}/\.?\w{{40}}\.arrow[^/]*")
    scratch = re.compile(r".*\.\d+\.[0-9a-f]{8}\.tmp")
    refs, marks = f"{root}/refs", f"{root}/trash"

    def shared(actor, call, path):
        if actor in gcs and call in ("stat", "lstat"):
            return False
        if call == "utime":
            return True  # of a descriptor, which has no name
        if path.startswith(refs):
            # Read all at once, left, taken back.
            return (call == "listdir" and path == refs) or (
                call in ("link", "unlink") and not scratch.fullmatch(path)
            )
        if path == marks:
            return call == "listdir"
        if scratch.fullmatch(path):
            return False
        if call == "scandir":
            return folders.fullmatch(path) is not None
        return objects.fullmatch(path) is not None

    return shared
