"""Training data that lives in the device's memory, where the batches are cut too.

A GPU trains a detector like `small` faster than the processor beside it makes batches. So pieces
are sent there once, audio as int16 and targets as int8, 1.2 MB for 16 seconds, and every batch is
cut from them by the device itself. For JAX, one device and detectors: tokens are encoded by the
host (`pipeline`).

Shape letters: B rows of a batch, M pieces mixed in a row, S samples, F frames, N columns.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from mt3_keras.data.pipeline import NAMED_NOTES
from mt3_keras.data.records import PIECE_SAMPLES, Record, Records
from mt3_keras.data.rolls import name_targets, roll_targets
from mt3_keras.models.config import HEADS, NUM_PITCHES, DetectorConfig

Packed = dict[str, NDArray[Any]]

BLOCK_PIECES = 512  # cut from at a time, so that their samples can be counted in 32 bits


def pack_records(sets: Sequence[Records], config: DetectorConfig) -> Iterator[Packed]:
    """All pieces of some prepared data sets, in random order; RecordsError if one is damaged."""
    places = [(records, index) for records in sets for index in range(len(records))]
    for i in np.random.default_rng(0).permutation(len(places)):
        records, index = places[i]
        yield pack_record(records[index], config)


def pack_record(record: Record, config: DetectorConfig) -> Packed:
    """A piece and its targets in little space.

    Returns:
      "samples" int16 [lead + hop * F + overhang], zeros after the piece; "num_frames" int32; an
      int8 roll [F, N] by head (`rolls.roll_targets`), and "programs" int8 [F, NUM_PITCHES, 2],
      those of the notes that begin in a cell (`rolls.name_targets`), -1 elsewhere.
    """
    spectrogram = config.spectrogram
    hop = spectrogram.hop_samples
    samples = record.samples(
        -spectrogram.lead_samples, record.num_samples + spectrogram.overhang_samples
    )
    pcm = np.round(np.clip(samples, -1, 1) * (2**15 - 1)).astype(np.int16)
    piece_frames, num_frames = PIECE_SAMPLES // hop, record.num_samples // hop
    space = spectrogram.lead_samples + piece_frames * hop + spectrogram.overhang_samples
    place = {"first_frame": record.first_sample // hop, "num_frames": num_frames}
    rate = spectrogram.frames_per_second
    named = name_targets(
        record.notes,
        **place,
        max_notes=max(1, len(record.notes)),
        frames_per_second=rate,
        rng=np.random.default_rng(0),
    )
    programs = np.full((piece_frames, NUM_PITCHES, 2), -1, np.int8)
    is_note = named["programs"][:, 0] >= 0
    programs[tuple(named["cells"][is_note].T)] = named["programs"][is_note]
    return {
        "samples": np.pad(pcm, (0, space - len(pcm))),
        "num_frames": np.array(num_frames, np.int32),
        **roll_targets(record.notes, **place, window_frames=piece_frames, frames_per_second=rate),
        "programs": programs,
    }


class ResidentBatches:
    """Endless batches of random chunks as of `pipeline.TrainingBatches`, but on the device.

    Chunks are `window_frames` long, all of them inside their piece.

    Every batch is a function of the seed, its number and the pieces. Its rows are cut from one
    block of them, at random places and levels; those of several are mixed as in `pipeline`.

    Args:
      pieces: what `pack_record` gave. Those that do not fill a block are left out, unless all fit
        in one.
      config: of the network.
      batch_size: B.
      num_mixed: M; each row sums 1 to so many pieces.
      max_attenuation_db: each row is made fainter by 0 to so much.
      data: what the pieces are, by which a state is known to be of the same.

    Raises:
      ValueError: there are no pieces.
    """

    def __init__(
        self,
        pieces: Iterable[Packed],
        config: DetectorConfig,
        batch_size: int,
        *,
        seed: int = 0,
        num_mixed: int = 1,
        max_attenuation_db: float = 0.0,
        data: Any = None,
    ) -> None:
        settings = (batch_size, num_mixed, max_attenuation_db)
        self._cut = jax.jit(functools.partial(_cut, config, *settings))
        described = repr((config, seed, settings, data))
        self._fingerprint = hashlib.sha256(described.encode()).hexdigest()[:16]
        self._seed, self._count = seed, 0
        self._blocks: list[Packed] = []
        pieces = iter(pieces)
        while block := list(itertools.islice(pieces, BLOCK_PIECES)):
            if len(block) == BLOCK_PIECES or not self._blocks:
                self._blocks.append(jax.device_put(_stack(block)))
        if not self._blocks:
            raise ValueError("there are no pieces to train on")

    def __next__(self) -> dict[str, Any]:
        chance = np.random.default_rng((self._seed, self._count))
        block = self._blocks[chance.integers(len(self._blocks))]
        key = jax.random.key(int(chance.integers(2**32)))
        self._count += 1
        return dict(self._cut(block, key))

    def get_state(self) -> dict[str, Any]:
        """Where the stream is; JSON can hold it."""
        return {"num_batches": self._count, "fingerprint": self._fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a state; ValueError if it is of another configuration."""
        if state.get("fingerprint") != self._fingerprint:
            raise ValueError("the state is of a stream of other data or settings")
        self._count = state["num_batches"]


def _stack(pieces: Sequence[Packed]) -> Packed:
    return {name: np.stack([piece[name] for piece in pieces]) for name in pieces[0]}


def _cut(
    config: DetectorConfig,
    batch_size: int,
    num_mixed: int,
    max_attenuation_db: float,
    block: Mapping[str, Any],
    key: Any,
) -> dict[str, Any]:
    num_frames, hop = config.window_frames, config.spectrogram.hop_samples
    piece_key, start_key, count_key, gain_key, name_key = jax.random.split(key, 5)
    shape = (batch_size, num_mixed)
    piece_BM = jax.random.randint(piece_key, shape, 0, len(block["num_frames"]))
    last_BM = jnp.maximum(block["num_frames"][piece_BM] - num_frames, 0)
    start_BM = jax.random.randint(start_key, shape, 0, last_BM + 1)
    count_B = jax.random.randint(count_key, (batch_size,), 1, num_mixed + 1)
    mixed_BM = jnp.arange(num_mixed)[None, :] < count_B[:, None]
    gain_B = 10 ** (-jax.random.uniform(gain_key, (batch_size,)) * (max_attenuation_db / 20))

    def cut(name: str, start_BM: Any, length: int) -> Any:
        def one(piece: Any, start: Any) -> Any:
            array = block[name]
            first = (piece, start, *[0] * (array.ndim - 2))
            return jax.lax.dynamic_slice(array, first, (1, length, *array.shape[2:]))[0]

        return jax.vmap(jax.vmap(one))(piece_BM, start_BM)

    def merge(name: str) -> Any:
        """The highest of all pieces of a row."""
        roll_BMFN = cut(name, start_BM, num_frames)
        kept = mixed_BM.reshape(*shape, *[1] * (roll_BMFN.ndim - 2))
        return jnp.max(jnp.where(kept, roll_BMFN, jnp.int8(-1)), axis=1)

    samples_BMS = cut("samples", start_BM * hop, config.input_samples).astype(jnp.float32) / 2**15
    samples_BS = jnp.sum(samples_BMS * mixed_BM[:, :, None], axis=1)
    if num_mixed > 1:
        peak_B = jnp.max(jnp.abs(samples_BS), axis=1)
        samples_BS = samples_BS / jnp.where(peak_B > 0, peak_B, 1)[:, None]
    length_BM = jnp.minimum(block["num_frames"][piece_BM] - start_BM, num_frames)
    length_B = jnp.max(jnp.where(mixed_BM, length_BM, 0), axis=1)
    is_real_BF1 = (jnp.arange(num_frames) < length_B[:, None])[:, :, None]
    programs_BFN2 = jnp.where(is_real_BF1[..., None], merge("programs"), jnp.int8(-1))
    cells_BK2, named_BK2 = _draw_notes(programs_BFN2, name_key)
    return {
        "samples": samples_BS * gain_B[:, None],
        **{head: jnp.where(is_real_BF1, merge(head), jnp.int8(-1)) for head in HEADS},
        "cells": cells_BK2,
        "programs": named_BK2,
    }


def _draw_notes(programs_BFN2: Any, key: Any) -> tuple[Any, Any]:
    """As `rolls.name_targets`: cells of some notes, and their programs."""
    flat = programs_BFN2.reshape(len(programs_BFN2), -1, 2)
    is_note = flat[..., 0] >= 0
    chance = jnp.where(is_note, 1 + jax.random.uniform(key, is_note.shape), 0)
    _, place = jax.lax.top_k(chance, NAMED_NOTES)
    named = jnp.take_along_axis(flat, place[..., None], axis=1).astype(jnp.int32)
    cells = jnp.stack([place // NUM_PITCHES, place % NUM_PITCHES], axis=-1)
    return jnp.where(named[..., :1] >= 0, cells, -1), named
