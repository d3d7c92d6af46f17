"""Segments spread over threads, each with a network of its own."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from mt3_keras.outputs import Output
from mt3_keras.segments import AudioSegment


class Jobs:
    """Segments that wait for a thread, and outputs that wait for the caller."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[int, AudioSegment] | None] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[tuple[int, Output] | Exception] = queue.SimpleQueue()
        self._over = threading.Event()

    def add(self, number: int, segment: AudioSegment) -> None:
        """Has a segment wait for a thread."""
        self._waiting.put((number, segment))

    def take(self, *, block: bool) -> tuple[int, AudioSegment] | None:
        """The next segment; None if there is none, or none will come."""
        try:
            waited = self._waiting.get(block=block)
        except queue.Empty:
            return None
        return None if self.are_over() else waited

    def finish(self, number: int, output: Output) -> None:
        """Hands a segment's output to the caller."""
        self._finished.put((number, output))

    def fail(self, error: Exception) -> None:
        """Has the caller's `next_finished` raise an error of a thread."""
        self._finished.put(error)

    def next_finished(self) -> tuple[int, Output]:
        """Waits for the next output; raises what a thread raised."""
        found = self._finished.get()
        if isinstance(found, Exception):
            raise found
        return found

    def end(self, num_threads: int) -> None:
        """Wakes all threads, for which no segments will come."""
        self._over.set()
        for _ in range(num_threads):
            self._waiting.put(None)

    def are_over(self) -> bool:
        """Whether `end` was called."""
        return self._over.is_set()


def run_in_threads(
    segments: Iterable[AudioSegment], works: Sequence[Callable[[Jobs], None]], num_ahead: int
) -> Iterator[tuple[int, Output]]:
    """Runs every work in a thread of its own and yields (index, output) as segments finish.

    Args:
      segments: drawn as they are needed.
      works: each takes segments from the jobs, and finishes them, until none will come.
      num_ahead: segments at most that are under way or wait.
    """
    numbered, jobs = enumerate(segments), Jobs()
    threads = [threading.Thread(target=_work, args=(work, jobs)) for work in works]
    for thread in threads:
        thread.start()
    try:
        num_running, is_last = 0, False
        while num_running or not is_last:
            taken = list(itertools.islice(numbered, num_ahead - num_running))
            is_last = is_last or not taken
            for number, segment in taken:
                jobs.add(number, segment)
            num_running += len(taken)
            if num_running:
                found = jobs.next_finished()
                num_running -= 1
                yield found
    finally:
        jobs.end(len(threads))
        for thread in threads:
            thread.join()


def _work(work: Callable[[Jobs], None], jobs: Jobs) -> None:
    try:
        work(jobs)
    except Exception as error:
        jobs.fail(error)
