"""Trains the network that finds beats and bars in notes, on MIDI files.

A file is taken if its onsets lie on subdivisions of its beats, which excludes performances recorded
at a tempo that means nothing. Examples are varied as transcription varies them: notes are missing,
added, late, of other velocities, and drums of another file play along.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from numpy.typing import NDArray

from mt3_keras.beat_tracker import (
    DILATIONS,
    FRAMES_PER_SECOND,
    KERNEL_SIZE,
    NUM_CHANNELS,
    NUM_FEATURES,
    note_features,
    to_array,
)
from mt3_keras.beats import Beats
from mt3_keras.cli.command_line import Command, Flags, UsageError, run
from mt3_keras.files import replacing
from mt3_keras.midi import MidiError, read_instruments
from mt3_keras.notes import apply_sustain
from mt3_keras.synth.synthetic import split_of
from mt3_keras.tempo import read_beats

SECONDS, BATCH_SIZE = 30, 16
PEAK_RATE, WARMUP_UPDATES = 4e-3, 100
POSITIVE_WEIGHTS = (2.0, 5.0)  # added to that of a frame, where a beat or a downbeat is
MIN_ONSETS, LEAST_COHERENCE = 30, 0.4
SLOWEST, FASTEST = 50, 220  # beats a minute; other rates are halved or doubled


class Piece(NamedTuple):
    """The notes of a file, [n, 6], and its beats; numbers 0 where bars are not known."""

    notes: NDArray[np.float64]
    times: NDArray[np.float64]
    numbers: NDArray[np.int64]


def read_piece(path: pathlib.Path) -> Piece | None:
    """A MIDI file's notes and beats; None if its tempo map is not that of its music."""
    try:
        beats = read_beats(path)
        parts = read_instruments(path)
    except MidiError:
        return None
    notes = to_array(n for part in parts for n in apply_sustain(part.notes, part.pedal))
    if beats is None or len(notes) < MIN_ONSETS or notes[:, 0].max() < SECONDS / 3:
        return None
    positions = beats.positions(notes[:, 0])
    if max(coherence(positions, parts) for parts in (3, 4, 6)) < LEAST_COHERENCE:
        return None
    return Piece(notes, *normal_rate(beats))


def coherence(positions: NDArray[np.float64], parts: int) -> float:
    """From 0 to 1: how well positions in beats fall on `parts` equal parts of a beat."""
    return float(abs(np.exp(2j * np.pi * parts * positions).mean()))


def normal_rate(beats: Beats) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Times and numbers of beats at a rate between `SLOWEST` and `FASTEST`.

    Beats that are too fast are halved, where bars allow it; those too slow doubled. Bars of one
    beat are no bars.
    """
    times, numbers = np.array(beats.times), np.array(beats.numbers)
    if beats.beats_per_bar < 2:
        numbers = np.zeros_like(numbers)
    rate = 60 / np.median(np.diff(times))
    if rate < SLOWEST:
        halves = (times[:-1] + times[1:]) / 2
        times = np.sort(np.concatenate([times, halves]))
        numbers = np.repeat(numbers, 2)[:-1]
        numbers[::2] = np.where(numbers[::2], 2 * numbers[::2] - 1, 0)
        numbers[1::2] = np.where(numbers[1::2], 2 * numbers[1::2], 0)
    elif rate > FASTEST and beats.beats_per_bar % 2 == 0:
        first = 0 if numbers[0] == 0 else int(numbers[0] % 2 == 0)
        times, numbers = times[first::2], (numbers[first::2] + 1) // 2
    return times, numbers


def vary(piece: Piece, drums: Sequence[Piece], rng: np.random.Generator) -> tuple[Piece, float]:
    """A piece as a transcription might have it, and the factor by which it is slower."""
    notes = piece.notes.copy()
    if drums and not notes[:, 5].any() and rng.random() < 0.4:
        notes = np.concatenate(
            [notes, play_along(piece, drums[int(rng.integers(len(drums)))], rng)]
        )
    if rng.random() < 0.15 and not notes[:, 5].all():
        notes = notes[notes[:, 5] == 0]
    programs = np.unique(notes[:, 4] + 128 * notes[:, 5])
    if len(programs) > 2:  # some parts are not there
        kept = programs[rng.random(len(programs)) > 0.2 * rng.random()]
        notes = notes[np.isin(notes[:, 4] + 128 * notes[:, 5], kept)]
    notes = notes[rng.random(len(notes)) > 0.4 * rng.random() ** 2]
    copied = notes[rng.random(len(notes)) < 0.15 * rng.random() ** 2]  # octaves, second strikes
    copied[:, 2] += np.where(copied[:, 5] > 0, 0, rng.choice([-12, 0, 12, 19], len(copied)))
    copied[:, 0] += rng.choice([0, 0, 0.13, 0.29], len(copied))
    notes = np.concatenate([notes, copied])
    notes[:, 2] += np.where(notes[:, 5] > 0, 0, rng.integers(-6, 7))
    notes[:, 0] += rng.normal(0, 0.012 * rng.random(), len(notes))
    lengths = np.maximum(notes[:, 1] - notes[:, 0], 0.02) * rng.uniform(0.5, 1.2)
    notes[:, 1] = notes[:, 0] + lengths * np.exp(rng.normal(0, 0.3, len(notes)))
    flatness = rng.random()
    notes[:, 3] = notes[:, 3] * (1 - flatness) + rng.uniform(60, 110) * flatness
    notes[:, 3] = np.clip(notes[:, 3] + rng.normal(0, 8, len(notes)), 1, 127)
    rate = 60 / np.median(np.diff(piece.times))
    low, high = max(0.7, rate / FASTEST), min(1.4, rate / SLOWEST)
    slower = float(np.exp(rng.uniform(np.log(low), np.log(high)))) if low < high else 1.0
    return piece._replace(notes=notes), slower


def play_along(piece: Piece, drums: Piece, rng: np.random.Generator) -> NDArray[np.float64]:
    """The notes of a drum file of four beats a bar, moved to the beats of a piece with bars.

    In bars of three beats the fourth of the drums is left out. Of other pieces nothing plays.
    """
    per_bar = int(piece.numbers.max())
    starts = np.flatnonzero(piece.numbers == 1)
    if per_bar not in (2, 3, 4) or len(starts) < 4:
        return np.zeros((0, 6))
    numbers = np.arange(len(drums.times))
    onsets = np.interp(drums.notes[:, 0], drums.times, numbers)
    bars, beats = np.divmod(onsets, 4)
    kept = beats < (3 if per_bar == 3 else 4)
    places = bars * (3 if per_bar == 3 else 4) + beats + starts[rng.integers(0, len(starts) // 2)]
    kept &= places < len(piece.times) - 1
    played = drums.notes[kept].copy()
    played[:, 0] = np.interp(places[kept], np.arange(len(piece.times)), piece.times)
    played[:, 1] = played[:, 0] + 0.05
    return played


def cut(
    piece: Piece, slower: float, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A random excerpt: features [T, NUM_FEATURES]; targets [T, 2], -1 where bars are not known."""
    length = SECONDS / slower
    start = rng.uniform(-1.0, max(0.0, piece.times[-1] - length))
    notes = piece.notes[(piece.notes[:, 0] >= start) & (piece.notes[:, 0] < start + length)].copy()
    notes[:, :2] = (notes[:, :2] - start) * slower
    num_frames = SECONDS * FRAMES_PER_SECOND
    targets = np.zeros((num_frames, 2), np.float32)
    inside = (piece.times >= start) & (piece.times < start + length - 0.02)
    frames = np.rint((piece.times[inside] - start) * slower * FRAMES_PER_SECOND).astype(int)
    numbers = piece.numbers[inside]
    for column, these in ((0, frames), (1, frames[numbers == 1])):
        for offset, value in ((-1, 0.5), (1, 0.5), (0, 1.0)):
            targets[np.clip(these + offset, 0, num_frames - 1), column] = value
    if not (piece.numbers > 0).all() or piece.numbers.max() < 2:
        targets[:, 1] = -1
    return note_features(notes, num_frames), targets


def batches(
    folders: Sequence[Sequence[Piece]], batch_size: int, seed: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Endless batches: features [B, T, NUM_FEATURES] and targets [B, T, 2].

    A folder of n pieces is drawn in proportion to the root of n.
    """
    rng = np.random.default_rng(seed)
    shares = np.array([len(folder) for folder in folders]) ** 0.5
    drums = [p for f in folders for p in f if p.notes[:, 5].all() and p.numbers.max() == 4]
    while True:
        examples = []
        for index in rng.choice(len(folders), batch_size, p=shares / shares.sum()):
            folder = folders[int(index)]
            piece = folder[int(rng.integers(len(folder)))]
            examples.append(cut(*vary(piece, drums, rng), rng))
        features, targets = zip(*examples, strict=True)
        yield np.stack(features), np.stack(targets)


def make_network() -> Any:
    """The network of `mt3_keras.beat_tracker.beat_logits`."""
    import keras

    features = keras.Input((None, NUM_FEATURES))
    hidden = keras.layers.Dense(NUM_CHANNELS, name="input")(features)
    for number, dilation in enumerate(DILATIONS):
        convolution = keras.layers.Conv1D(
            NUM_CHANNELS,
            KERNEL_SIZE,
            padding="same",
            dilation_rate=dilation,
            activation="relu",
            name=f"convolution_{number}",
        )
        hidden = hidden + convolution(hidden)
    return keras.Model(features, keras.layers.Dense(2, name="output")(hidden))


def loss(targets: Any, logits: Any) -> Any:
    """Cross entropy of frames, positives weighed by their rarity; targets below 0 do not count."""
    from keras import ops

    known = ops.cast(targets >= 0, "float32")
    wanted = ops.maximum(targets, 0.0)
    weights = known * (1 + wanted * ops.convert_to_tensor(POSITIVE_WEIGHTS))
    log_odds = ops.relu(logits) - logits * wanted + ops.softplus(-ops.abs(logits))
    return ops.sum(weights * log_odds, axis=(1, 2)) / (SECONDS * FRAMES_PER_SECOND)


def read_folders(root: pathlib.Path, left_out: Sequence[str], split: str) -> list[list[Piece]]:
    """The pieces of each folder in `root` that can be used, of one split."""
    folders = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if folder.name in left_out:
            continue
        paths = [path for path in sorted(folder.rglob("*.mid*")) if split_of(path.name) == split]
        pieces = [piece for path in paths if (piece := read_piece(path))]
        print(f"{folder.name}: {len(pieces)} of {len(paths)} files can be used")
        folders += [pieces] if pieces else []
    if not folders:
        raise UsageError(f"{root}: no folder with MIDI files whose beats are the music's")
    return folders


def save_weights(network: Any, path: str) -> None:
    """Writes a network as `mt3_keras.beat_tracker` reads it, in half precision."""
    arrays: dict[str, Any] = {}
    for layer in network.layers:
        if layer.weights:
            kind, _, number = layer.name.partition("_")
            names = ("kernel", "bias")
            keys = [f"{n}_{number}" if kind == "convolution" else f"{kind}_{n}" for n in names]
            arrays |= dict(zip(keys, layer.get_weights(), strict=True))
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **{name: array.astype(np.float16) for name, array in arrays.items()})


def _define_flags(add: Flags) -> None:
    add.text("midi", None, "Folder of folders of MIDI files.")
    add.names("leave_out", [], "Names of folders whose beats are known to be wrong.")
    add.text("output", None, "The file of weights to write.")
    add.count("updates", 1200, "Updates of the weights.")
    add.count("seed", 1, "Of the examples.", least=0)


def _train(values: flags.FlagValues, _: list[str]) -> None:
    if not values.midi or not values.output:
        raise UsageError("--midi and --output are both needed")
    import keras

    root = pathlib.Path(values.midi)
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    examples = batches(read_folders(root, values.leave_out, "train"), BATCH_SIZE, values.seed)
    keras.utils.set_random_seed(values.seed)
    network = make_network()
    rate = keras.optimizers.schedules.CosineDecay(
        PEAK_RATE / 20,
        max(values.updates - WARMUP_UPDATES, 1),
        warmup_target=PEAK_RATE,
        warmup_steps=WARMUP_UPDATES,
    )
    optimizer = keras.optimizers.AdamW(rate, weight_decay=1e-3, clipnorm=1.0)
    network.compile(optimizer, loss=loss)
    losses = []
    for update in range(1, values.updates + 1):
        losses.append(float(network.train_on_batch(*next(examples))))
        if update % 100 == 0 or update == values.updates:
            print(f"update {update}: loss {np.mean(losses[-100:]):.3f}", flush=True)
    save_weights(network, values.output)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    usage = "--midi=DIR --output=FILE [FLAGS]"
    return run("train.beats", Command(usage, __doc__, _define_flags, _train), argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
