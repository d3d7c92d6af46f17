"""The detector: 16 kHz samples -> the notes of a segment, their instruments and ends.

`Harmonics` are the front end, `DetectorBody` and `Drums` predict rolls, `SecondLook` takes a second
look at the onsets found in them: is it a note, and what plays it. `NoteDetector.detect` also does
the first half of reading them, in the graph: it hands out the likeliest onsets and strokes. So a
phone, a page and a server read the same few numbers, and no rolls (`roll_decoder` is the second
half).

Frame i of a segment stands for the samples [i * hop, (i + 1) * hop) from its start.
"""

from __future__ import annotations

from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from mt3_keras.models.catalog import register_presets
from mt3_keras.models.config import (
    HEADS,
    LOWEST_DRUM,
    LOWEST_PITCH,
    NUM_PITCHES,
    BodyConfig,
    DetectorConfig,
    HarmonicConfig,
)
from mt3_keras.models.detector_body import DetectorBody
from mt3_keras.models.detector_drums import Drums
from mt3_keras.models.second_look import LEAST_CHANCE, SecondLook
from mt3_keras.models.spectrogram import Harmonics

Tensors = dict[str, Any]

ONSET_REACH, STROKE_REACH, END_REACH = 3, 2, 2  # frames around a peak that are lower
IMPOSSIBLE = -30.0  # logits
LOUDEST = 127  # MIDI velocity


@keras.saving.register_keras_serializable(package="mt3_keras")
class NoteDetector(keras_hub.models.Backbone):
    """Detects the notes and drum strokes of a segment and what plays them.

    Called with "samples" float32 [B, input_samples], 16 kHz mono from `lead_samples` before the
    segment on, and "cells" int32 [B, K, 2], frame and pitch column of notes to be named (rows of -1
    are no notes), it gives f"{head}_logits" [B, T, N] for each head of `config.HEADS`,
    "class_logits" [B, K, classes], "program_logits" [B, K, classes, programs of one] and
    "note_logits" [B, K], in the policy's compute dtype (`forward` gives them in float32). The T
    frames, of rolls and cells, are the segment and those around it.

    Args:
      spectrogram: of a `DetectorConfig`, or a dict of its fields.
      network: likewise.
      unroll: build the recurrent layers without a loop, for LiteRT and for training on a CPU.
      dtype: policy of the network; spectrum and logits are computed in float32 always.
    """

    def __init__(
        self,
        spectrogram: HarmonicConfig | dict[str, Any] | None = None,
        network: BodyConfig | dict[str, Any] | None = None,
        unroll: bool = False,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        config = DetectorConfig.from_parts(spectrogram=spectrogram, network=network)

        # === Layers ===
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        self.harmonics = Harmonics(config.spectrogram, dtype=policy, name="harmonics")
        self.body = DetectorBody(config.network, unroll, dtype=policy, name="body")
        self.drums = Drums(config.network, unroll, dtype=policy, name="drums")
        self.second_look = SecondLook(config.network, dtype=policy, name="second_look")

        # === Functional Model ===
        samples = keras.Input((config.input_samples,), dtype="float32", name="samples")
        cells = keras.Input((None, 2), dtype="int32", name="cells")
        outputs = self.forward({"samples": samples, "cells": cells})
        super().__init__(
            inputs={"samples": samples, "cells": cells},
            outputs={name: ops.cast(x, policy.compute_dtype) for name, x in outputs.items()},
            dtype=dtype,
            **kwargs,
        )

        # === Config ===
        self.model_config = config
        self.unroll = unroll

    def forward(self, inputs: Tensors, training: Any = None, num_found: int = 0) -> Tensors:
        """The outputs of a call, float32.

        With `num_found` that many of the likeliest onsets of the segment come after the cells
        given, and "cells" are all of them.
        """
        spectrum = self.harmonics.spectrum(inputs["samples"])
        harmonics = self.harmonics.stack(spectrum)
        rolls = self.body(harmonics, training=training) | self.drums(spectrum, training=training)
        cells = ops.cast(inputs["cells"], "int32")
        if num_found:
            _, found = self._find_onsets(rolls, self.model_config.network.frames_before)
            cells = ops.concatenate([cells, found[:, :num_found]], axis=1)
        known = ops.maximum(cells, 0)
        chances = ops.sigmoid(at_cells(rolls["onset"], known))
        chances = ops.where(cells[..., 0] >= 0, chances, 0.0)
        looked = self.second_look(harmonics, rolls["features"], known, chances, training=training)
        outputs = {head: rolls[head] for head in HEADS} | looked
        outputs = {f"{name}_logits": values for name, values in outputs.items()}
        return {**outputs, "cells": cells} if num_found else outputs

    def detect(self, samples: Any, state: Tensors | None = None) -> Tensors:
        """The notes and strokes that begin in a segment, and where notes end in it.

        Args:
          samples: float32 [B, input_samples].
          state: None, or what "state_pitches", ... were of the segment before, by name: then
            the frames before this one serve the convolutions alone, and notes are followed from
            segment to segment. Zeros begin a recording.

        Returns:
          float32 tensors. "onsets" [B, K, 5]: frame in the segment, MIDI pitch, probability,
          velocity and the probability of a unison; those of probability 0 are no onsets.
          "programs" [B, K, 128]: the probability of each General MIDI program. "strokes" [B, D, 4]:
          frame, MIDI key of the drum, probability, velocity. "ended" [B, F, N]: the probability
          that a note of the pitch that sounded before has ended. With a state also that at the
          segment's end.
        """
        net = self.model_config.network
        spectrum = self.harmonics.spectrum(samples)
        harmonics = self.harmonics.stack(spectrum)
        first, margin, before = net.frames_before, (0, 0), {}
        if state is not None:
            margin, before = (first // net.frames_per_step, 0), state
        notes = {name: before[name] for name in ("pitches", "context") if before}
        rolls = self.body(harmonics, notes or None, margin_steps=margin, training=False)
        drums = self.drums(spectrum, before.get("drums"), margin_steps=margin, training=False)
        if state is not None:
            harmonics, first = harmonics[:, first:], 0
        states = {**rolls.pop("states"), "drums": drums.pop("states")}
        rolls |= drums
        if first:
            rolls |= self._hide_before_start(rolls, samples, first)
        onsets, cells = self._find_onsets(rolls, first)
        looked = self.second_look(
            harmonics, rolls["features"], cells, onsets[..., 2], training=False
        )
        onsets = _judge_again(onsets, looked["note"])
        programs = ops.softmax(looked["class"])[..., None] * ops.softmax(looked["program"], axis=-1)
        found = {
            "onsets": onsets,
            "programs": ops.reshape(programs, (-1, net.max_onsets, 128)),
            "strokes": self._find_strokes(rolls, first),
            "ended": _own(_ended(rolls), first, net.segment_frames),
        }
        if state is not None:
            last = net.segment_frames // net.frames_per_step - 1
            found |= {f"state_{name}": values[:, last] for name, values in states.items()}
        return found

    def empty_state(self, batch_size: int) -> Tensors:
        """The state of `detect` before a recording."""
        net = self.model_config.network
        return {
            "pitches": ops.zeros((batch_size, NUM_PITCHES, net.recurrent_width)),
            "context": ops.zeros((batch_size, net.context_width)),
            "drums": ops.zeros((batch_size, net.drum_context_width)),
        }

    def _hide_before_start(self, rolls: Tensors, samples: Any, first: int) -> Tensors:
        """Rolls in which nothing begins before the recording does.

        What begins with the first sample is likeliest a frame early, in a frame that belongs to no
        segment: its peak is to be the first frame of the first segment.
        """
        lead = samples[:, : self.model_config.lead_samples]
        is_start = ops.max(ops.abs(lead), axis=1) == 0
        is_before = np.arange(self.model_config.window_frames) < first
        hidden = ops.logical_and(is_start[:, None, None], is_before[:, None])
        return {head: ops.where(hidden, IMPOSSIBLE, rolls[head]) for head in ("onset", "drum")}

    def _find_onsets(self, rolls: Tensors, first: int) -> tuple[Any, Any]:
        """The likeliest onsets of a segment, and the cells of the rolls in which they are."""
        net = self.model_config.network
        peaks = _own(_peaks(rolls["onset"], ONSET_REACH), first, net.segment_frames)
        chances, frames, columns = _likeliest(peaks, net.max_onsets)
        cells = ops.stack([frames + first, columns], axis=-1)
        strength, unison = (
            ops.sigmoid(at_cells(rolls[head], cells)) for head in ("strength", "unison")
        )
        numbers = [_float(frames), _float(columns + LOWEST_PITCH), chances]
        return ops.stack([*numbers, _velocity(strength), unison], axis=-1), cells

    def _find_strokes(self, rolls: Tensors, first: int) -> Any:
        net = self.model_config.network
        peaks = _own(_peaks(rolls["drum"], STROKE_REACH), first, net.segment_frames)
        chances, frames, columns = _likeliest(peaks, net.max_strokes)
        cells = ops.stack([frames + first, ops.zeros_like(columns)], axis=-1)
        strength = ops.sigmoid(at_cells(rolls["drum_strength"], cells))
        numbers = [_float(frames), _float(columns + LOWEST_DRUM), chances, _velocity(strength)]
        return ops.stack(numbers, axis=-1)

    def get_config(self) -> dict[str, Any]:
        own = {**self.model_config.to_dict(), "unroll": self.unroll}
        return {**super().get_config(), **own}


def highest_near(roll: Any, reach: int) -> Any:
    """The highest value within `reach` frames of each cell of rolls [B, T, N]."""
    size = (2 * reach + 1, 1)
    highest = ops.max_pool(
        roll[..., None], size, strides=1, padding="same", data_format="channels_last"
    )
    return highest[..., 0]


def at_cells(roll: Any, cells: Any) -> Any:
    """What rolls [B, T, N] hold at cells [B, K, 2], frames and columns."""
    num_columns = roll.shape[-1]
    flat = ops.reshape(roll, (-1, roll.shape[1] * num_columns))
    return ops.take_along_axis(flat, cells[..., 0] * num_columns + cells[..., 1], axis=1)


def _peaks(logits: Any, reach: int) -> Any:
    """Probabilities [B, T, N] of the cells that are the highest within `reach` frames, else 0."""
    return ops.where(logits >= highest_near(logits, reach), ops.sigmoid(logits), 0.0)


def _judge_again(onsets: Any, logits: Any) -> Any:
    """Onsets [B, K, 5] with the probabilities of a second look; what is unlikely has none."""
    chances = onsets[..., 2]
    chances = ops.where(chances >= LEAST_CHANCE, ops.sigmoid(logits), chances)
    return ops.concatenate([onsets[..., :2], chances[..., None], onsets[..., 3:]], axis=-1)


def _ended(rolls: Tensors) -> Any:
    """Where a note falls silent or is let go, [B, T, NUM_PITCHES]."""
    return ops.maximum(ops.sigmoid(-rolls["frame"]), _peaks(rolls["offset"], END_REACH))


def _own(roll: Any, first: int, num_frames: int) -> Any:
    return roll[:, first : first + num_frames]


def _likeliest(roll: Any, number: int) -> tuple[Any, Any, Any]:
    """The `number` highest cells of rolls [B, T, N]: values, frames and columns [B, number]."""
    num_columns = roll.shape[-1]
    number = min(number, roll.shape[1] * num_columns)
    values, places = ops.top_k(ops.reshape(roll, (-1, roll.shape[1] * num_columns)), number)
    places = ops.cast(places, "int32")
    return values, places // num_columns, places % num_columns


def _velocity(strength: Any) -> Any:
    return ops.clip(ops.round(LOUDEST * strength), 1, LOUDEST)


def _float(numbers: Any) -> Any:
    return ops.cast(numbers, "float32")


register_presets(NoteDetector)
