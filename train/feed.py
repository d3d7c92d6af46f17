"""Batches for `fit`, from a stream that can be taken up again at any of the last of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import keras
import numpy as np
from numpy.typing import NDArray

Batch = dict[str, NDArray[Any]]

INPUTS = ("samples", "cells", "num_frames", "decoder_tokens")
TOKENS = ("decoder_tokens", "targets")
NUM_STATES = 512  # batches that `fit` may have drawn and not used
NUM_PREFETCHED = 2


class Batches(Protocol):
    """An endless stream of batches that says and sets where it stands; the state is JSON."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class Feed:
    """Remembers where its stream stood before each of the last batches.

    `fit` draws ahead of what it trains on, so the stream's own state is never the one to save.

    Args:
      batches: the stream, standing where the run is resumed.
      start: batches used before.

    Attributes:
      first: the batch it begins with.
      error: what the stream raised, which TensorFlow hands on as an error of its own.
    """

    def __init__(self, batches: Batches, start: int = 0) -> None:
        self._batches = batches
        self._states = {start: batches.get_state()}
        self.first = next(batches)
        self.error: Exception | None = None
        self._start, self._place = start, start + 1
        self._states[self._place] = batches.get_state()
        self._lock = threading.Lock()
        self._reader = 0

    def state_at(self, num_batches: int) -> Any:
        """The stream's state after the first `num_batches`."""
        return self._states[num_batches]

    def read(self, start: int) -> Iterator[tuple[Batch, Batch]]:
        """Yields (inputs, targets) from batch `start` on; ends whatever was read before."""
        with self._lock:
            self._reader += 1
            reader, count = self._reader, start
            if start == self._start:
                count += 1
            if count != self._place:
                self._batches.set_state(self._states[count])
                self._place = count
        if start == self._start:
            yield to_fit(self.first)
        while True:
            with self._lock:  # `fit` may still be drawing for an earlier reader
                if reader != self._reader:
                    return
                try:
                    batch = next(self._batches)
                except Exception as error:
                    self.error = error
                    raise
                self._place += 1
                self._states[self._place] = self._batches.get_state()
                self._states.pop(self._place - NUM_STATES, None)
            yield to_fit(batch)


def to_fit(batch: Batch) -> tuple[Batch, Batch]:
    """A batch as inputs of the network and its targets."""
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    return inputs, {name: array for name, array in batch.items() if name not in inputs}


def training_dataset(feed: Feed, start: int, *, length_varies: bool = False) -> Any:
    """Batches from `start` on for `fit`: a `tf.data.Dataset` under TensorFlow, else a generator.

    Args:
      feed: where batches come from.
      start: number of the first batch.
      length_varies: whether batches have token sequences of different lengths.
    """
    if keras.backend.backend() != "tensorflow":
        return feed.read(start)
    return _tf_dataset(lambda: feed.read(start), feed.first, length_varies)


def validation_dataset(batches: Sequence[Batch]) -> Any:
    """The same batches again and again, for `fit`."""
    if keras.backend.backend() != "tensorflow":
        return _Repeated(batches)
    return _tf_dataset(lambda: map(to_fit, batches), batches[0])


def _tf_dataset(read: Any, example: Batch, length_varies: bool = False) -> Any:
    import tensorflow as tf

    def spec(name: str, array: NDArray[Any]) -> Any:
        shape: list[int | None] = list(array.shape)
        if length_varies and name in TOKENS:
            shape[-1] = None
        return tf.TensorSpec(shape, array.dtype)

    inputs, targets = to_fit(example)
    signature = tuple(
        {name: spec(name, np.asarray(array)) for name, array in part.items()}
        for part in (inputs, targets)
    )
    dataset = tf.data.Dataset.from_generator(read, output_signature=signature)
    return dataset.prefetch(NUM_PREFETCHED)


class _Repeated(keras.utils.PyDataset):
    def __init__(self, batches: Sequence[Batch]) -> None:
        super().__init__()
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> tuple[Batch, Batch]:
        return to_fit(self._batches[index])
