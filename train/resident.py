"""Training data that lives in the device's memory, where the batches are cut too.

A GPU trains a detector like `small` faster than the processor beside it makes batches. So pieces
are sent there once, audio as int16 and targets as bits, 0.9 MB for 16 seconds, and every batch is
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

from mt3_keras.data.records import PIECE_SAMPLES, Record, Records
from mt3_keras.data.rolls import BIT_HEADS, PITCH_HEADS, Packed, pack
from mt3_keras.models.config import HEADS, NUM_CLASSES, DetectorConfig

BLOCK_PIECES = 512  # cut from at a time, so that their samples can be counted in 32 bits


def pack_records(sets: Sequence[Records], config: DetectorConfig) -> Iterator[Packed]:
    """All pieces of some prepared data sets, in random order; RecordsError if one is damaged."""
    places = [(records, index) for records in sets for index in range(len(records))]
    for i in np.random.default_rng(0).permutation(len(places)):
        records, index = places[i]
        yield pack_record(records[index], config)


def pack_record(record: Record, config: DetectorConfig) -> Packed:
    """A record as `rolls.pack` makes it."""
    spectrogram = config.spectrogram
    hop = spectrogram.hop_samples
    return pack(
        record.samples(
            -spectrogram.lead_samples, record.num_samples + spectrogram.overhang_samples
        ),
        record.notes,
        config,
        piece_frames=PIECE_SAMPLES // hop,
        num_frames=record.num_samples // hop,
        first_frame=record.first_sample // hop,
    )


class ResidentBatches:
    """Endless batches of random chunks as of `pipeline.training_batches`, but on the device.

    Chunks are `segment_frames` long, all of them inside their piece.

    Every batch is a function of the seed, its number and the pieces. Its rows are cut from one
    block of them, at random places and levels; those of several are mixed as in `pipeline`.

    Args:
      pieces: what `pack` gave. Those that do not fill a block are left out, unless all fit in one.
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
    num_frames, hop = config.network.segment_frames, config.spectrogram.hop_samples
    piece_key, start_key, count_key, gain_key = jax.random.split(key, 4)
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

    def merge(roll_BMFN: Any) -> Any:
        """Bits: those of all pieces of a row."""
        kept = jnp.where(mixed_BM[:, :, None, None], roll_BMFN, 0)
        return functools.reduce(jnp.bitwise_or, [kept[:, i] for i in range(num_mixed)])

    samples_BMS = cut("samples", start_BM * hop, config.input_samples).astype(jnp.float32) / 2**15
    samples_BS = jnp.sum(samples_BMS * mixed_BM[:, :, None], axis=1)
    if num_mixed > 1:
        peak_B = jnp.max(jnp.abs(samples_BS), axis=1)
        samples_BS = samples_BS / jnp.where(peak_B > 0, peak_B, 1)[:, None]
    pitches = merge(cut("pitches", start_BM, num_frames))
    classes = merge(cut("classes", start_BM, num_frames))
    class_bits = (classes[..., None] >> jnp.arange(NUM_CLASSES, dtype=jnp.uint16)) & 1
    strength = jnp.where(mixed_BM[:, :, None, None], cut("strength", start_BM, num_frames), -1)
    rolls = {head: (pitches >> i) & 1 for i, head in enumerate(PITCH_HEADS)}
    rolls |= {
        head: jnp.unpackbits(merge(cut(head, start_BM, num_frames)), axis=-1) for head in BIT_HEADS
    }
    rolls["strength"] = jnp.max(strength, axis=1)
    class_roll = jnp.where(classes[..., None] > 0, class_bits.astype(jnp.int8), jnp.int8(-1))
    rolls["class"] = class_roll.reshape(batch_size, num_frames, HEADS["class"])
    length_BM = jnp.minimum(block["num_frames"][piece_BM] - start_BM, num_frames)
    length_B = jnp.max(jnp.where(mixed_BM, length_BM, 0), axis=1)
    is_real_BF1 = (jnp.arange(num_frames) < length_B[:, None])[:, :, None]
    return {
        "samples": samples_BS * gain_B[:, None],
        **{
            head: jnp.where(is_real_BF1, rolls[head].astype(jnp.int8), jnp.int8(-1))
            for head in HEADS
        },
    }
