"""Prepared records -> batches of chunks and their targets, for TensorFlow and JAX alike.

As in the original (MT3 paper, section 4.3; facts: its pre-processing of training examples) each
record gives one random chunk as long as a segment of the model: its start is uniform over all that
leave at least one frame, the chunk is clipped to the piece, and the targets are those of a segment
that begins there: tokens for an `MT3Backbone`, rolls for a `NoteDetector`. Chunks with too many
tokens are drawn anew and counted; the original stops.

Order and content depend only on the configuration and the place in the stream, not on processes or
threads. So a state is a number of batches, and batches of `num_shards` hosts put side by side are
those of a single host (with buckets, only the same chunks).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from numpy.typing import NDArray

from mt3_keras.codec import Codec
from mt3_keras.data.mixture import EXPONENT, mixture_rates
from mt3_keras.data.records import (
    MARGIN_SAMPLES,
    PIECE_SAMPLES,
    Record,
    Records,
    find_records,
)
from mt3_keras.data.rolls import name_targets, roll_targets
from mt3_keras.models.config import DetectorConfig, ModelConfig, TokenConfig
from mt3_keras.note_encoder import encode_segments, mix_segments, notes_to_events
from mt3_keras.notes import Note, join_times, map_program, trim_overlaps
from mt3_keras.segments import check_context

Batch = dict[str, NDArray]
ENDLESS = 2**40  # records; Grain's own endless length overflows when it is cut into batches
NAMED_NOTES = 32  # of a chunk, whose names a detector learns
MAX_DRAWS = 8  # of a chunk whose targets are too long, before the row is left without targets


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """What to feed a model with.

    Attributes:
      data: folders of prepared data sets (`train.prepare`), which are mixed; what several folders
        hold of one data set is put together.
      split: of each data set.
      mixture_exponent: see `mixture.mixture_rates`.
      seed: two streams are the same if their configurations are.
      shard_index: which of `num_shards` hosts this is; each gets other rows.
      num_workers: processes that make batches; 0 makes them in this one.
      context: what lies around a chunk's samples: "segment" zeros, "full" the audio that does.
      target_tokens: length of the targets, EOS included; 0 takes the model's `max_tokens`.
      buckets: shorter lengths that a batch may have if all its targets fit; batches are then
        sorted by length within `window_batches` of them, and these put in random order.
      num_mixed: sum the audio of 1 to so many chunks, each number equally often, and merge their
        targets (the augmentation of the original's ISMIR 2022 recipe, with 8).
      join_seconds: above 0, what happens within so long of each other is encoded as one moment
        (`notes.join_times`), and unisons of programs that the granularity maps to one as one note:
        fewer tokens, in an order that the sound determines. 0 encodes as the original does.
      max_attenuation_db: each row is made fainter by 0 to so much, so that recordings of any level
        are transcribed alike.
    """

    data: tuple[str, ...]
    split: str = "train"
    mixture_exponent: float = EXPONENT
    seed: int = 0
    shard_index: int = 0
    num_shards: int = 1
    num_workers: int = 0
    context: str = "segment"
    target_tokens: int = 0
    buckets: tuple[int, ...] = ()
    window_batches: int = 6
    num_mixed: int = 1
    join_seconds: float = 0.0
    max_attenuation_db: float = 0.0

    def __post_init__(self) -> None:
        check_context(self.context)
        if not 0 <= self.shard_index < self.num_shards:
            raise ValueError(
                f"shard_index must be 0 to num_shards - 1: got {self.shard_index} of"
                f" {self.num_shards}"
            )
        for name in ("num_mixed", "window_batches"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive: got {getattr(self, name)}")
        if not 0 <= self.join_seconds <= 0.05:
            raise ValueError(f"join_seconds must be 0 to 0.05: got {self.join_seconds}")
        if not 0 <= self.max_attenuation_db <= 60:
            raise ValueError(f"max_attenuation_db must be 0 to 60: got {self.max_attenuation_db}")
        if self.num_workers < 0 or self.target_tokens < 0 or min(self.buckets, default=1) < 1:
            raise ValueError(
                "num_workers, target_tokens and buckets must not be negative:"
                f" got {self.num_workers}, {self.target_tokens} and {self.buckets}"
            )


class TrainingBatches(Iterator[Batch]):
    """An endless stream of batches of chunks and their targets.

    Each holds "samples" float32 [B, *samples_shape]; for a token network "num_frames" int32 [B],
    "decoder_tokens" and "targets" int32 [B, L], or [B, G, L] of several decoders; for a detector
    rolls int8 [B, F, N] (`HEADS`), "cells" and "programs" int32 [B, K, 2] of some notes
    (`rolls.name_targets`).

    Args:
      config: what is fed.
      model_config: of the network.
      batch_size: rows of each batch on this host.
      find: finds the records of (folders, split, tracks).

    Attributes:
      num_too_long: chunks drawn anew so far because they had too many tokens.

    Raises:
      RecordsError: prepared data is missing or damaged (also on iteration).
      ValueError: a setting is out of range.
    """

    def __init__(
        self,
        config: PipelineConfig,
        model_config: ModelConfig,
        batch_size: int,
        find: Callable[..., Sequence[Records]] = find_records,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive: got {batch_size}")
        sets = find(config.data, config.split, model_config.tracks_in)
        self._window = config.window_batches if config.buckets else 1
        self._dataset = _to_windows(sets, config, model_config, batch_size, self._window)
        self._num_workers = config.num_workers
        same = dataclasses.replace(config, data=(), num_workers=0, shard_index=0)
        described = repr((same, model_config, batch_size, [s.summary["shards"] for s in sets]))
        self._fingerprint = hashlib.sha256(described.encode()).hexdigest()[:16]
        self.num_too_long = 0
        self._num_batches = 0
        self._ready: list[tuple[Batch, int]] = []
        self._windows: Any = None

    def __next__(self) -> Batch:
        if not self._ready:
            if self._windows is None:
                self._windows = self._open(self._num_batches // self._window)
            self._ready = next(self._windows)[self._num_batches % self._window :]
        batch, num_too_long = self._ready.pop(0)
        self._num_batches += 1
        self.num_too_long += num_too_long
        return batch

    def _open(self, first_window: int) -> Any:
        # Grain's defaults, 16 threads and 500 elements ahead, are for small elements.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        dataset = self._dataset[first_window:].to_iter_dataset(options)
        if self._num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's workers read flags of its own.
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=1)
            )
        return iter(dataset)

    def get_state(self) -> dict[str, Any]:
        """Where the stream is; JSON can hold it, and the number of workers may differ later."""
        return {
            "num_batches": self._num_batches,
            "num_too_long": self.num_too_long,
            "fingerprint": self._fingerprint,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a state; ValueError if it is of other data or another configuration."""
        if state.get("fingerprint") != self._fingerprint:
            raise ValueError(
                "the state is of a stream of other data or settings; continue with those it was"
                " made with, or start a new run"
            )
        if state["num_batches"] != self._num_batches:
            self.close()
        self._num_batches, self.num_too_long = state["num_batches"], state["num_too_long"]

    def close(self) -> None:
        """Ends worker processes; iterating on starts them again."""
        if self._windows is not None:
            self._windows.close()
        self._windows, self._ready = None, []


def _to_windows(
    sets: Sequence[Records],
    config: PipelineConfig,
    model_config: ModelConfig,
    batch_size: int,
    window: int,
) -> Any:
    """A Grain data set whose elements are lists of `window` batches."""
    parts: dict[str, list[tuple[int, int]]] = {}  # data set -> its (place in sets, length)
    for i, records in enumerate(sets):
        parts.setdefault(records.name, []).append((i, len(records)))
    counts = {name: sum(length for _, length in own) for name, own in parts.items()}
    rates = mixture_rates(counts, exponent=config.mixture_exponent)
    drawn = [name for name, rate in rates.items() if rate > 0]
    streams = [
        grain.MapDataset.range(counts[name])
        .shuffle(seed=config.seed)
        .repeat(ENDLESS // counts[name] + 1)
        .map(functools.partial(_to_place, parts[name]))
        for name in drawn
    ]
    mixed = grain.MapDataset.mix(streams, [rates[name] for name in drawn])
    make = ChunkMaker(sets, config, model_config)
    lengths = (*sorted(n for n in config.buckets if n < make.target_tokens), make.target_tokens)
    return (
        mixed.batch(config.num_mixed, batch_fn=list)
        .random_map(make.draw, seed=config.seed + 1)
        .batch(batch_size * window, batch_fn=list)
        .random_map(functools.partial(_to_batches, window, lengths), seed=config.seed + 2)
        .slice(slice(config.shard_index, None, config.num_shards))
    )


def _to_place(parts: Sequence[tuple[int, int]], index: int) -> tuple[int, int]:
    for records, length in parts:
        if index < length:
            return records, index
        index -= length
    raise IndexError(index)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A row of a batch, with the targets of its network alone.

    Attributes:
      tokens: of each decoder, ending in EOS; empty where there is nothing to learn from.
      rolls: head -> int8 [F, N], and the "cells" and "programs" of some notes.
      num_too_long: draws before it that were given up.
    """

    samples: NDArray[np.float32]
    num_frames: int
    tokens: list[list[int]]
    rolls: Batch
    num_too_long: int = 0

    @property
    def num_tokens(self) -> int:
        """Of the longest sequence."""
        return max(map(len, self.tokens), default=0)


class ChunkMaker:
    """Cuts chunks out of records and writes their targets."""

    def __init__(
        self, sets: Sequence[Records], config: PipelineConfig, model_config: ModelConfig
    ) -> None:
        self.hop_samples = model_config.spectrogram.hop_samples
        if PIECE_SAMPLES % self.hop_samples:
            raise ValueError(
                f"hop_samples must divide the pieces' {PIECE_SAMPLES}: got {self.hop_samples}"
            )
        spectrogram = model_config.spectrogram
        if max(spectrogram.lead_samples, spectrogram.overhang_samples) > MARGIN_SAMPLES:
            raise ValueError(
                f"windows must not reach more than {MARGIN_SAMPLES} samples beyond their hop:"
                f" got window_samples {spectrogram.window_samples}"
            )
        self.target_tokens = 0
        if isinstance(model_config, TokenConfig):
            self.target_tokens = config.target_tokens or model_config.network.max_tokens
            self._codec = Codec(model_config.vocabulary.num_velocity_bins)
        self.chunk_frames = model_config.window_frames
        self._sets = sets
        self._config = config
        self._model_config = model_config

    def draw(self, places: Sequence[tuple[int, int]], chance: np.random.Generator) -> Chunk:
        """A random chunk of a record, or a mix of those of the first few of several."""
        num_mixed = int(chance.integers(1, len(places) + 1))
        records = [self._sets[dataset][index] for dataset, index in places[:num_mixed]]
        for num_too_long in range(MAX_DRAWS):
            starts = [self._draw_start(record, chance) for record in records]
            chunk = self.chunk(records, starts)
            if chunk.num_tokens <= self.target_tokens:
                gain = 10 ** (-chance.uniform(0, self._config.max_attenuation_db) / 20)
                samples = chunk.samples * np.float32(gain)
                return dataclasses.replace(chunk, samples=samples, num_too_long=num_too_long)
        nothing: list[list[int]] = [[] for _ in chunk.tokens]
        return dataclasses.replace(chunk, tokens=nothing, num_too_long=MAX_DRAWS)

    def chunk(self, records: Sequence[Record], starts: Sequence[int]) -> Chunk:
        """The sum of the chunks of some records, each from its own frame on."""
        cuts = [self._cut(*place) for place in zip(records, starts, strict=True)]
        samples = cuts[0].samples
        if self._config.num_mixed > 1:
            samples = np.sum([cut.samples for cut in cuts], axis=0)
            samples = samples / (np.abs(samples).max() or np.float32(1))
        num_frames = max(cut.num_frames for cut in cuts)
        if isinstance(self._model_config, TokenConfig):
            parts = zip(*(cut.tokens for cut in cuts), strict=True)
            tokens = [mix_segments(part, self._codec) for part in parts]
            return Chunk(samples, num_frames, tokens, {})
        names = ("cells", "programs")
        rolls = {
            head: np.maximum.reduce([cut.rolls[head] for cut in cuts])
            for head in cuts[0].rolls
            if head not in names
        }
        both = {name: np.concatenate([cut.rolls[name] for cut in cuts]) for name in names if rolls}
        if both:
            first = np.argsort(both["programs"][:, 0] < 0, kind="stable")[:NAMED_NOTES]
            both = {name: rows[first] for name, rows in both.items()}
        return Chunk(samples, num_frames, [], rolls | both)

    def num_frames(self, record: Record) -> int:
        """Frames of a piece; like the original's, an example ends with one more than it fills."""
        return record.num_samples // self.hop_samples + record.is_last

    def _draw_start(self, record: Record, chance: np.random.Generator) -> int:
        return int(chance.integers(1 - self.chunk_frames, self.num_frames(record)))

    def _cut(self, record: Record, start: int) -> Chunk:
        """A chunk clipped to the piece; its tokens are still to be mixed."""
        total = self.num_frames(record)
        first, end = max(0, start), min(total, start + self.chunk_frames)
        return Chunk(
            self._cut_samples(record, first, end),
            end - first,
            self._cut_tokens(record, first, end, is_end=record.is_last and end == total),
            self._cut_rolls(record, first, end),
        )

    def _cut_samples(self, record: Record, first: int, end: int) -> NDArray[np.float32]:
        """With "full" what the windows of the chunk's frames reach, and nothing beyond."""
        spectrogram = self._model_config.spectrogram
        lead, overhang = spectrogram.lead_samples, spectrogram.overhang_samples
        given = (lead, overhang) if self._config.context == "full" else (0, 0)
        read = record.track_samples if self._model_config.tracks_in else record.samples
        samples = read(first * self.hop_samples - given[0], end * self.hop_samples + given[1])
        before = lead - given[0]
        after = self._model_config.input_samples - before - samples.shape[-1]
        return np.pad(samples, [(0, 0)] * (samples.ndim - 1) + [(before, after)])

    def _seconds(self, record: Record, frame: int) -> float:
        frames_per_second = self._model_config.spectrogram.frames_per_second
        return (record.first_sample // self.hop_samples + frame) / frames_per_second

    def _cut_tokens(self, record: Record, first: int, end: int, is_end: bool) -> list[list[int]]:
        """The tokens of each decoder, of its own notes."""
        config = self._model_config
        if not isinstance(config, TokenConfig):
            return []
        vocabulary = config.vocabulary
        parts: list[list[Note]] = [[] for _ in range(config.num_decoders)]
        for note in self._token_notes(record, vocabulary.granularity):
            parts[config.decoder_of(note.program, note.is_drum)].append(note)
        return [
            encode_segments(
                notes_to_events(notes, self._codec),
                self._codec,
                [self._seconds(record, first)],
                end=None if is_end else self._seconds(record, end),
                last_step=round(record.last_event * self._codec.steps_per_second),
                ties=vocabulary.ties,
                granularity=vocabulary.granularity,
                to_mix=True,
            )[0]
            for notes in parts
        ]

    def _token_notes(self, record: Record, granularity: str) -> list[Note]:
        """The notes as the tokens say them."""
        if not self._config.join_seconds:
            return record.notes
        mapped = [n._replace(program=map_program(n.program, granularity)) for n in record.notes]
        return trim_overlaps(join_times(mapped, self._config.join_seconds))

    def _cut_rolls(self, record: Record, first: int, end: int) -> Batch:
        if not isinstance(self._model_config, DetectorConfig):
            return {}
        excerpt = (record.notes, record.first_sample // self.hop_samples + first)
        rate = self._model_config.spectrogram.frames_per_second
        rolls = roll_targets(
            *excerpt,
            num_frames=end - first,
            window_frames=self.chunk_frames,
            frames_per_second=rate,
        )
        return rolls | name_targets(
            *excerpt,
            num_frames=end - first,
            max_notes=NAMED_NOTES,
            frames_per_second=rate,
            rng=np.random.default_rng(excerpt[1] + self.chunk_frames),
        )


def _to_batches(
    num_batches: int, lengths: Sequence[int], chunks: list[Chunk], chance: np.random.Generator
) -> list[tuple[Batch, int]]:
    """Chunks -> batches, each with how many were drawn anew for it."""
    if num_batches > 1:
        chunks = sorted(chunks, key=lambda chunk: chunk.num_tokens)
    size = len(chunks) // num_batches
    parts = [chunks[i : i + size] for i in range(0, len(chunks), size)]
    return [
        (_to_batch(parts[i], lengths), sum(chunk.num_too_long for chunk in parts[i]))
        for i in chance.permutation(num_batches)
    ]


def _to_batch(chunks: Sequence[Chunk], lengths: Sequence[int]) -> Batch:
    """Chunks -> a batch, its targets of the shortest length that holds them all; 0 is none."""
    batch = {
        "samples": np.stack([chunk.samples for chunk in chunks]),
        **{name: np.stack([c.rolls[name] for c in chunks]) for name in chunks[0].rolls},
    }
    if not max(lengths):
        return batch
    longest = max(chunk.num_tokens for chunk in chunks)
    length = next(length for length in lengths if length >= longest)
    rows = [row for chunk in chunks for row in chunk.tokens]
    padded = np.zeros((len(rows), length), np.int32)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    decoders = len(chunks[0].tokens)
    targets = padded if decoders == 1 else padded.reshape(len(chunks), decoders, length)
    shifted = np.roll(targets, 1, axis=-1)
    shifted[..., 0] = 0
    num_frames = np.array([chunk.num_frames for chunk in chunks], np.int32)
    return batch | {"num_frames": num_frames, "decoder_tokens": shifted, "targets": targets}
