"""Long recordings in sections, for several workers, and their notes: those of the whole recording.

A network predicts a segment from the samples in and around it. So a section is a run of segments
with the samples around them, and its outputs are the very ones that these segments have in the
whole recording. What goes from one segment to the next (notes that still sound, the instruments
of the piece) is the decoder's, which reads the outputs of all sections as those of one recording.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mt3_keras.models.config import SAMPLE_RATE_HZ, ModelConfig
from mt3_keras.outputs import Output, RollOutput, TokenOutput
from mt3_keras.segments import AudioSegment, cut_segments


class Section(NamedTuple):
    """A run of a recording's segments.

    Attributes:
      first: number of its first segment.
      num_segments: None is all to the end of the recording.
      num_before: segments that `samples` hold before the first.
      samples: float32 [n], 16 kHz mono.
    """

    first: int
    num_segments: int | None
    num_before: int
    samples: NDArray[np.float32]


def cut_sections(
    blocks: Iterable[NDArray[np.float32]], config: ModelConfig, seconds: float
) -> Iterator[Section]:
    """Cuts a recording where segments begin; holds one section and one block at a time.

    Args:
      blocks: float32 [n] of 16 kHz mono, any lengths.
      config: of the network.
      seconds: length of a section, about.
    """
    step = config.segment_samples
    size = max(1, round(seconds * SAMPLE_RATE_HZ / step))
    num_around = math.ceil(config.lead_samples / step)
    first = start = 0  # segments; that of `held` is `start`
    held = np.zeros(0, np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        while held.size >= (end := (first + size - start) * step + config.overhang_samples):
            yield Section(first, size, first - start, held[:end])
            first += size
            begin = max(0, first - num_around)
            held, start = held[(begin - start) * step :], begin
    yield Section(first, None, first - start, held)


def cut_section(section: Section, config: ModelConfig, context: str) -> Iterator[AudioSegment]:
    """The segments of a section, as `cut_segments` has them for the whole recording."""
    first, rate = section.num_before, config.spectrogram.frames_per_second
    end = None if section.num_segments is None else first + section.num_segments
    segments = itertools.islice(cut_segments([section.samples], config, context), first, end)
    for number, segment in enumerate(segments, section.first):
        yield segment._replace(start=number * config.network.segment_frames / rate)


def pack(outputs: Sequence[Output]) -> bytes:
    """The outputs of a section's segments, at least one, as the content of a file."""
    kind, content = type(outputs[0]), io.BytesIO()
    arrays = {}
    for name in kind._fields:
        column = [np.asarray(getattr(output, name)) for output in outputs]
        arrays[name] = np.concatenate(column)
        arrays[f"{name}_ends"] = np.cumsum([len(array) for array in column])
    np.savez(content, allow_pickle=False, **arrays)
    return content.getvalue()


def unpack(content: bytes) -> list[Output]:
    """What `pack` was given."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        is_tokens = "tokens" in arrays
        columns = [
            np.split(arrays[name], arrays[f"{name}_ends"][:-1])
            for name in (TokenOutput if is_tokens else RollOutput)._fields
        ]
    rows = zip(*columns, strict=True)
    if is_tokens:
        return [TokenOutput(tokens.tolist()) for (tokens,) in rows]
    return [RollOutput(*arrays) for arrays in rows]
