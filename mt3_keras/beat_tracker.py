"""Notes -> beats and bars: a small convolutional network over time, and a state-space decoder.

The network (`train/beats.py` trains it) predicts of every 20 ms whether a beat or a downbeat is
there, from what begins, ends and sounds. The most probable sequence of beats and bars at a tempo
that changes slowly (Krebs, Boeck, Widmer: "An efficient state-space model for joint tempo and meter
tracking", ISMIR 2015) is found by the library `metricon`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mt3_keras.beats import Beats
from mt3_keras.notes import Note

Floats = NDArray[np.float32]
WEIGHTS = pathlib.Path(__file__).parent / "presets" / "beats" / "weights.npz"
FRAMES_PER_SECOND = 50
NUM_FEATURES = 15
NUM_CHANNELS, KERNEL_SIZE, DILATIONS = 32, 5, (1, 2, 4, 8, 16, 32, 64, 128, 256)
# General MIDI keys of a drum kit, in groups that play one part of the metre.
KIT = ((35, 36), (37, 38, 39, 40), (42, 44, 51, 53, 54, 59, 69, 70, 82), (46, 49, 52, 55, 57))
_REGISTERS = (48, 60, 72)  # lowest pitches of all registers but the first
_HARMONY_SECONDS = 0.6  # before and after a frame, between which harmony is compared


def note_features(notes: NDArray[np.float64], num_frames: int) -> Floats:
    """What happens in each frame of 20 ms: the network's input.

    Args:
      notes: [n, 6], fields of `Note`.
      num_frames: frames of the result; notes beyond are left out.

    Returns:
      [num_frames, NUM_FEATURES]: strengths of the onsets of each register and each group of drums,
      of long notes, of bass notes; ends; how far harmony changes; how many notes sound.
    """
    is_drum = notes[:, 5] > 0
    pitched, drums = notes[~is_drum], notes[is_drum]
    strengths = pitched[:, 3] / 127
    lengths = np.clip(pitched[:, 1] - pitched[:, 0], 0.02, 4.0)
    register = np.searchsorted(_REGISTERS, pitched[:, 2], "right")
    columns = [_impulses(pitched[:, 0], strengths, num_frames)]
    for number in range(len(_REGISTERS) + 1):
        mine = register == number
        columns.append(_impulses(pitched[mine, 0], strengths[mine], num_frames))
    columns.append(_impulses(pitched[:, 0], np.log2(1 + lengths / 0.25), num_frames))
    group = np.full(len(drums), len(KIT))
    for number, keys in enumerate(KIT):
        group[np.isin(drums[:, 2], keys)] = number
    for number in range(len(KIT) + 1):
        mine = group == number
        columns.append(_impulses(drums[mine, 0], drums[mine, 3] / 127, num_frames))
    columns.append(_impulses(pitched[:, 1], np.ones(len(pitched)), num_frames))
    rolls = _pitch_class_rolls(pitched, num_frames)
    columns.append(_harmony_changes(rolls))
    columns.append(rolls.sum(axis=1))
    columns.append(_impulses(*_bass_onsets(pitched), num_frames))
    return np.log1p(np.stack(columns, axis=1)).astype(np.float32)


def _impulses(
    times: NDArray[np.float64], strengths: NDArray[np.float64], num_frames: int
) -> NDArray[np.float64]:
    """[num_frames]: each strength shared between the two frames next to its time."""
    places = times * FRAMES_PER_SECOND
    frames = np.floor(places).astype(int)
    later = places - frames
    sums = np.zeros(num_frames + 2)
    np.add.at(sums, np.clip(frames, 0, num_frames), strengths * (1 - later))
    np.add.at(sums, np.clip(frames + 1, 0, num_frames), strengths * later)
    return sums[:num_frames]


def _pitch_class_rolls(pitched: NDArray[np.float64], num_frames: int) -> NDArray[np.float64]:
    """[num_frames, 12]: how many notes of each pitch class sound."""
    steps = np.zeros((num_frames + 1, 12))
    classes = pitched[:, 2].astype(int) % 12
    for column, sign in ((0, 1), (1, -1)):
        frames = np.clip(np.rint(pitched[:, column] * FRAMES_PER_SECOND), 0, num_frames)
        np.add.at(steps, (frames.astype(int), classes), sign)
    return np.maximum(np.cumsum(steps, axis=0)[:num_frames], 0)


def _harmony_changes(rolls: NDArray[np.float64]) -> NDArray[np.float64]:
    """[num_frames]: 1 - cosine between the pitch classes that sound before and after."""
    width = round(_HARMONY_SECONDS * FRAMES_PER_SECOND)
    sums = np.cumsum(np.pad(rolls, ((width + 1, width), (0, 0))), axis=0)
    around = sums[width:] - sums[:-width]
    before, after = around[: len(rolls)], around[width : width + len(rolls)]
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    return np.where(norms > 0, 1 - (before * after).sum(axis=1) / np.maximum(norms, 1e-9), 0.0)


def _bass_onsets(pitched: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Onsets and lengths of the notes below which none sounds when they begin."""
    order = np.lexsort((pitched[:, 2], pitched[:, 0]))
    found = []
    end, lowest = -1.0, 128.0
    for index in order:
        onset, offset, pitch = pitched[index, :3]
        if onset >= end - 0.05 or pitch <= lowest:
            found.append(index)
            end, lowest = offset, pitch
    kept = np.array(found, int)
    lengths = np.clip(pitched[kept, 1] - pitched[kept, 0], 0.02, 2.0)
    return pitched[kept, 0], np.sqrt(lengths)


@functools.cache
def _load_weights() -> dict[str, Floats]:
    with np.load(WEIGHTS, allow_pickle=False) as archive:
        return {name: archive[name].astype(np.float32) for name in archive.files}


def beat_logits(features: Floats) -> Floats:
    """Log odds of a beat and of a downbeat in each frame: [T, NUM_FEATURES] -> [T, 2]."""
    weights = _load_weights()
    hidden = features @ weights["input_kernel"] + weights["input_bias"]
    for number, dilation in enumerate(DILATIONS):
        reach = dilation * (KERNEL_SIZE // 2)
        padded = np.pad(hidden, ((reach, reach), (0, 0)))
        shifted = [padded[k * dilation :][: len(hidden)] for k in range(KERNEL_SIZE)]
        kernel = weights[f"kernel_{number}"].reshape(KERNEL_SIZE * NUM_CHANNELS, NUM_CHANNELS)
        hidden = hidden + np.maximum(
            np.concatenate(shifted, axis=1) @ kernel + weights[f"bias_{number}"], 0
        )
    return np.asarray(hidden @ weights["output_kernel"] + weights["output_bias"], np.float32)


def to_array(notes: Iterable[Note]) -> NDArray[np.float64]:
    """[n, 6], the fields of `Note`."""
    return np.array([tuple(map(float, note)) for note in notes], np.float64).reshape(-1, 6)


METERS = (3, 4)  # beats of a bar that are told apart; 2/4 is taken for 4/4
SLOWEST, FASTEST = 50.0, 215.0  # beats a minute
WINDOW_SECONDS, MARGIN_SECONDS = 600, 30  # parts of long pieces, and what is looked at around them
MAX_SNAP_SECONDS = 0.04  # from a frame that has a beat to the onsets that it is
LEAST_CONFIDENCE = 0.45
# Frames with a beat and a downbeat count so many times more in training than others: log odds are
# too high by the logarithm.
_BEAT_BIAS, _DOWNBEAT_BIAS = np.log(3.0), np.log(6.0)
# Of the mean log odds of beats: second and fourth ones below 0 that lag so far are none; two in a
# bar that lead so far are its beats, not three. Chosen on half of benchmarks.beats and plain bands.
_WEAK_LAG, _DOTTED_LEAD = 1.8, 1.2
_CONFIDENCE_BEATS = 8  # over which bars are compared with the next best ones


def track_beats(
    notes: Sequence[Note],
    *,
    beats_per_minute: float | None = None,
    least_confidence: float = LEAST_CONFIDENCE,
) -> Beats | None:
    """Finds the beats of a piece, and its bars.

    Args:
      notes: of the whole piece, as transcribed.
      beats_per_minute: a tempo that is known and constant; None finds tempo and its changes.
      least_confidence: of beats whose tempo is not known; those below it are none.

    Returns:
      The beats from before the first note to after the last, and the most probable bars. None
      where beats are not certain enough, unless a tempo was given.
    """
    array = to_array(notes)
    if not len(array):
        return None
    num_frames = int(np.ceil((array[:, 0].max() + 1.0) * FRAMES_PER_SECOND))
    logits = _logits(array, num_frames)
    if beats_per_minute is None:
        times = _most_probable(logits)
    else:
        times = _fit_constant(logits[:, 0], 60 / beats_per_minute)
    if len(times) < 2:
        return None
    at_beats = _near(logits, times)
    confidence = float(_logistic(at_beats[:, 0]).mean())
    if beats_per_minute is None and confidence < least_confidence:
        return None
    numbers, bar_confidence = _number_beats(at_beats)
    is_compound = False
    if beats_per_minute is None:
        if _has_weak_beats(at_beats[:, 0], numbers):
            times = times[numbers % 2 == 1]
            numbers, bar_confidence = _number_beats(_near(logits, times), (4,))
        elif dotted := _dotted_beats(times, numbers, logits):
            (times, numbers), is_compound = dotted, True
        times = _snap(times, array)
    beats = Beats(
        tuple(times.tolist()),
        tuple(numbers.tolist()),
        confidence=confidence,
        bar_confidence=bar_confidence,
    )
    is_compound = is_compound or _is_compound(beats.positions(array[:, 0]))
    return dataclasses.replace(beats, is_compound=is_compound)


def _logistic(log_odds: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-log_odds)), np.float32)


def _windows(num_frames: int) -> Iterator[tuple[int, int, int, int]]:
    """Parts of a long piece: first and last frame to look at, first and last frame to keep.

    They bound the memory that a piece of any length takes.
    """
    margin, size = MARGIN_SECONDS * FRAMES_PER_SECOND, WINDOW_SECONDS * FRAMES_PER_SECOND
    for first in range(0, num_frames, size):
        last = min(first + size, num_frames)
        yield max(0, first - margin), min(last + margin, num_frames), first, last


def _logits(notes: NDArray[np.float64], num_frames: int) -> Floats:
    """`beat_logits` of all frames."""
    parts = []
    for start, end, first, last in _windows(num_frames):
        onsets = notes[:, 0] * FRAMES_PER_SECOND
        near = notes[(onsets >= start) & (onsets < end)]
        near[:, :2] -= start / FRAMES_PER_SECOND
        logits = beat_logits(note_features(near, end - start))
        parts.append(logits[first - start : last - start])
    return np.concatenate(parts)


def _most_probable(logits: Floats) -> NDArray[np.float64]:
    """Times of the most probable beats, found together with bars of one metre."""
    import metricon

    tracker = metricon.DownbeatTracker(
        beats_per_bar=METERS, min_bpm=SLOWEST, max_bpm=FASTEST, fps=FRAMES_PER_SECOND
    )
    times: list[float] = []
    for start, end, first, last in _windows(len(logits)):
        chances = _logistic(logits[start:end])
        found = tracker.track(
            metricon.Activations.from_activations(chances[:, 0], chances[:, 1], FRAMES_PER_SECOND)
        )
        seconds = found.times + start / FRAMES_PER_SECOND
        seconds = seconds[(seconds >= first / FRAMES_PER_SECOND)]
        seconds = seconds[seconds < last / FRAMES_PER_SECOND]
        if times:  # at the seam no beat is there twice
            seconds = seconds[seconds > times[-1] + 30 / FASTEST]
        times += seconds.tolist()
    return np.array(times)


def _fit_constant(log_odds: Floats, period: float) -> NDArray[np.float64]:
    """Times of the beats of a constant tempo, where they are most probable."""
    chances = _logistic(log_odds)
    seconds = np.arange(len(chances)) / FRAMES_PER_SECOND

    def beats(phase: float) -> NDArray[np.float64]:
        return np.arange(phase, seconds[-1], period)

    return beats(
        max(np.arange(0, period, 0.005), key=lambda p: np.interp(beats(p), seconds, chances).mean())
    )


def _near(logits: Floats, times: NDArray[np.float64]) -> Floats:
    """[n, 2]: the highest log odds in the frame of each time or one beside it."""
    frames = np.rint(times * FRAMES_PER_SECOND).astype(int)
    around = np.clip(frames[:, None] + np.arange(-1, 2), 0, len(logits) - 1)
    return np.asarray(logits[around].max(axis=1))


def _number_beats(
    log_odds: Floats, meters: Sequence[int] = METERS
) -> tuple[NDArray[np.int64], float]:
    """Numbers of beats in their bars, and how certain they are.

    Args:
      log_odds: [n, 2], of a beat and a downbeat at each beat.
      meters: beats of a bar that are looked for.
    """
    import metricon

    downbeat = _logistic(log_odds[:, 1] - _DOWNBEAT_BIAS)
    share = downbeat / np.maximum(_logistic(log_odds[:, 0] - _BEAT_BIAS), downbeat + 1e-3)
    share = np.clip(share, 0.01, 0.99)  # of a downbeat, given that there is a beat
    number = np.arange(len(share))
    bars = metricon.track_bars(
        metricon.Activations.from_activations(share, share, FRAMES_PER_SECOND),
        number / FRAMES_PER_SECOND,
        beats_per_bar=meters,
        observation_weight=2,
    )
    starts = bars.numbers == 1

    def log_chance(begins: NDArray[np.bool_]) -> float:
        return float(np.log(np.where(begins, share, 1 - share)).mean())

    others = [(number - k) % meter == 0 for meter in METERS for k in range(meter)]
    others = [begins for begins in others if 2 * begins[starts].sum() < starts.sum()]
    lead = log_chance(starts) - max(map(log_chance, others), default=np.inf)
    return bars.numbers, float(1 - np.exp(-_CONFIDENCE_BEATS * max(lead, 0.0)))


def _has_weak_beats(log_odds: Floats, numbers: NDArray[np.int64]) -> bool:
    """Whether of bars of four the second and fourth beats are rather halves of slower beats."""
    if not _have_bars_of(4, numbers):
        return False
    weak = numbers % 2 == 0
    strong, between = log_odds[~weak].mean(), log_odds[weak].mean()
    return bool(between < 0 and strong - between > _WEAK_LAG)


def _dotted_beats(
    times: NDArray[np.float64], numbers: NDArray[np.int64], logits: Floats
) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
    """Two beats in each bar of three and their numbers, where these are more probable.

    The decoder knows no 6/8 and takes it for 3/4, whose bar lines are the same.

    Args:
      times: [n], of the beats found.
      numbers: [n], of each beat in its bar.
      logits: [T, 2], log odds of a beat and a downbeat in each frame.
    """
    if not _have_bars_of(3, numbers):
        return None
    count, halves = np.arange(len(times)), np.arange(-2, len(times))
    places = np.argmax(numbers == 1) + 1.5 * halves
    inside = (places >= 0) & (places <= len(times) - 1)
    dotted = np.interp(places[inside], count, times)
    dotted_numbers = halves[inside] % 2 + 1

    def strength(of: NDArray[np.float64]) -> float:
        return float(_near(logits, of)[:, 0].mean())

    lead = strength(dotted[dotted_numbers == 2]) - strength(times[numbers != 1])
    return (dotted, dotted_numbers) if lead > _DOTTED_LEAD else None


def _have_bars_of(per_bar: int, numbers: NDArray[np.int64]) -> bool:
    """Whether beats number two bars at least, and all of them have so many."""
    expected = (np.arange(len(numbers)) + numbers[0] - 1) % per_bar + 1
    return len(numbers) >= 2 * per_bar and bool(np.all(numbers == expected))


def _is_compound(positions: NDArray[np.float64]) -> bool:
    """Whether beats fall into three parts, of which second and third both have onsets."""
    parts = positions % 1
    second, third, half = ((np.abs(parts - p) < 0.08).sum() for p in (1 / 3, 2 / 3, 1 / 2))
    quarters = (np.abs(parts - 1 / 4) < 0.06).sum() + (np.abs(parts - 3 / 4) < 0.06).sum()
    return bool(min(second, third) > max(half, quarters, 2))


def _snap(times: NDArray[np.float64], notes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Moves each beat to the mean of the onsets around it, where there are any."""
    onsets = np.sort(notes[:, 0])
    first = np.searchsorted(onsets, times - MAX_SNAP_SECONDS)
    last = np.searchsorted(onsets, times + MAX_SNAP_SECONDS)
    sums = np.concatenate([[0.0], np.cumsum(onsets)])
    counts = last - first
    return np.where(counts > 0, (sums[last] - sums[first]) / np.maximum(counts, 1), times)
