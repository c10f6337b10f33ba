"""Several ranks end as one: what stops a rank is said once, in one line with its number, and stops them all.

A rank that fails leaves a note in the store of the process group. A rank that dies can leave none, but the
system closes its connections: each rank waits on one to the next rank of a ring, and leaves the note for it.
All ranks look for a note each second. A rank that finds one leaves by itself if its collective fails, as
those of gloo do, and is ended if it does not, as those of NCCL wait for the lost rank.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from drcnn.errors import DrcnnError, RankStopped, TrainingError

_NOTE = "note"
_POLL, _GRACE = 1.0, 10.0  # seconds
_CONNECTION = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out")


class RankWatch:
    """Watches the other ranks from two threads, from its construction to :meth:`leave`.

    Args:
        store (dist.Store): the one that the process group was made with.
        limit (timedelta): how long a collective waits for a rank, for the message.
    """

    def __init__(self, store: dist.Store, limit: timedelta) -> None:
        self.rank, self.ranks, self.limit = dist.get_rank(), dist.get_world_size(), limit
        self._node = os.environ.get("GROUP_RANK", socket.gethostname())
        self._store = dist.PrefixStore("drcnn", store)
        self._store.set(f"name/{self.rank}", f"{socket.gethostname()}, pid {os.getpid()}")
        self._next = (self.rank + 1) % self.ranks
        self._next_name = self._name(self._next)
        self._ring = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        self._leaving, self._knows, self._told, self._out = (threading.Event() for _ in range(4))
        tasks = (self._hold_on, self._look)
        self._threads = [threading.Thread(target=t, name=f"ranks{t.__name__}", daemon=True) for t in tasks]
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Ends the watch once every rank has come here."""
        self._leaving.set()
        with contextlib.suppress(RuntimeError):  # a rank that dies now has done its work
            dist.barrier(group=self._ring)
        self._part()

    def explain(self, error: Exception) -> Exception:
        """Lets the other ranks know of an error of this one, and returns what to raise instead of it.

        Args:
            error: what ended the work of this rank.

        Returns:
            Exception: the error with this rank's number; or :class:`RankStopped`, where another rank's line
            says what happened.
        """
        self._out.set()
        found = self._explained(error)
        self._know()
        self._outlive_the_others()
        self._leaving.set()
        self._part()
        return found

    def _explained(self, error: Exception) -> Exception:
        text, own = str(error), isinstance(error, DrcnnError)
        if not own and any(word in text.lower() for word in _CONNECTION):
            self._store_quietly(f"here/{self.rank}")
            if self._note_comes():
                return RankStopped("")
            if "timed out" in text.lower():
                error, text, own = self._roll_call(), "", True
        line = f"rank {self.rank} of {self.ranks}: {text or error}"
        if not self._leave_note(line if own else f"{line} ({type(error).__name__})"):
            return RankStopped("")
        return type(error)(line) if own else error

    def _part(self) -> None:
        """Says goodbye along the ring and ends the threads: one that waits while Python ends aborts it."""
        with contextlib.suppress(RuntimeError):  # the other end of the connection is gone
            dist.send(torch.zeros(1), dst=(self.rank - 1) % self.ranks, group=self._ring)
        for thread in self._threads:
            thread.join(_GRACE)

    def _name(self, rank: int) -> str:
        return f"rank {rank} of {self.ranks} ({self._store.get(f'name/{rank}').decode()})"

    def _store_quietly(self, key: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set(key, "")

    def _leave_note(self, line: str) -> bool:
        """Leaves a note for the others unless there is one; tells whether there was none."""
        mine = f"{self.rank}\n{self._node}\n{line}"
        try:
            return self._store.compare_set(_NOTE, "", mine).decode() == mine
        except RuntimeError:  # the store went with rank 0
            return True

    def _know(self) -> None:
        """Speaks of nothing from here on: there is a note, and its author says it."""
        self._knows.set()
        self._store_quietly(f"heard/{self.rank}")

    def _outlive_the_others(self) -> None:
        """Lets the others read the note, as the store may be that of rank 0."""
        keys = [f"heard/{rank}" for rank in range(self.ranks)]
        end = time.monotonic() + _GRACE
        with contextlib.suppress(RuntimeError):
            while self.rank == 0 and time.monotonic() < end and not self._store.check(keys):
                time.sleep(0.1)

    def _note_comes(self) -> bool:
        """Waits for a note, which may come later than the failure of a collective; tells whether it came."""
        end = time.monotonic() + _GRACE
        while time.monotonic() < end and not self._told.wait(0.1):
            with contextlib.suppress(RuntimeError):
                if self._store.check([_NOTE]):
                    return self._told.wait(2 * _POLL) or True
        return self._told.is_set()

    def _roll_call(self) -> TrainingError:
        """Finds out which ranks did not come to a collective; the others are here by now."""
        away = [rank for rank in range(self.ranks) if not self._store.check([f"here/{rank}"])]
        return TrainingError(
            f"waited {self.limit.total_seconds() / 60:g} minutes (train.rank_timeout) in vain for "
            f"{', '.join(map(self._name, away)) or 'the network'}; see what it does, or wait longer"
        )

    def _hold_on(self) -> None:
        """Waits for the next rank to leave. If it dies, leaves a note and says so."""
        with contextlib.suppress(RuntimeError):
            dist.recv(torch.zeros(1), src=self._next, group=self._ring)
            return
        if self._leaving.is_set() or self._knows.is_set():
            return
        line = f"{self._next_name} died without a word; was it killed, or out of memory? The other ranks stop"
        if self._leave_note(line):
            self._end(line)

    def _look(self) -> None:
        """Looks for a note of another rank, and says it where that rank's own words are not seen."""
        while not self._leaving.wait(_POLL):
            try:
                if not self._store.check([_NOTE]):
                    continue
                rank, node, line = self._store.get(_NOTE).decode().split("\n", 2)
            except RuntimeError:  # the store went with rank 0, of which its neighbour tells
                rank, node, line = "0", self._node, ""
            self._know()
            if not self._leaving.is_set() and int(rank) != self.rank:
                elsewhere = node != self._node and os.environ.get("LOCAL_RANK", "0") == "0"
                self._end(line if elsewhere else "")
            return

    def _end(self, line: str) -> None:
        """Ends this rank, from outside if it does not get out of its collective."""
        if line:
            print(f"error: {line}", file=sys.stderr, flush=True)
        self._told.set()
        if not self._out.wait(_GRACE):
            os._exit(2)
