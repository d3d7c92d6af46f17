"""What plays each note that the detector finds, and whether it is one.

Shape letters: B batch, T frames, P steps of the body, N pitches, C channels, K notes.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from mt3_keras.models.config import NUM_CLASSES, NUM_PITCHES, PROGRAMS_PER_CLASS, BodyConfig
from mt3_keras.models.detector_layers import (
    INPUT_SCALE,
    batch_norm,
    convolution_along_time,
    rectified_dense,
)
from mt3_keras.models.layers import Attention, Configured, Logits, rms_norm

# Frames before and from an onset on, and the pitches whose harmonics are compared: the note's own,
# and those of which the first harmonic is its third and fourth.
FRAMES = (4, 28)
INTERVALS = (0, 19, 24)
STEPS = (0, 3, 8)  # from an onset on, at which the features of the body are seen
PERIODS = 2.0 ** np.arange(3, 10)  # frames, of the sinusoids that tell when a note begins
LEAST_CHANCE = 0.12  # of an onset that others are compared with
UNHEARD = -1e9  # added to the score of those below


@keras.saving.register_keras_serializable(package="mt3_keras")
class SecondLook(Configured):
    """A second look at each note found: whether it is one, and what plays it.

    It looks at the harmonics of the note's pitch for half a second around its onset, at those of
    two pitches above it for harmonics up to the 28th, at the pitch itself, and at the features of
    `DetectorBody`, which know what belongs to other notes. Then the notes are compared with each
    other: those of one instrument sound alike, and begin together or follow each other; and what
    is a harmonic of one note is not another.

    Call arguments:
      harmonics: float32 [B, T, NUM_PITCHES, C] of `spectrogram.Harmonics`.
      features: [B, P, NUM_PITCHES, F], the body's of the same frames.
      cells: int32 [B, K, 2], frame and pitch column (from 0) of each note's onset.
      chances: float32 [B, K], of each onset by the body; 0 of what is none.

    Returns:
      A dict of float32 logits: "class" [B, K, NUM_CLASSES], "program" [B, K, NUM_CLASSES,
      PROGRAMS_PER_CLASS] within each class, and "note" [B, K], that it is a note.
    """

    config_type = BodyConfig
    config: BodyConfig

    def __init__(self, config: BodyConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        net = self.config
        width, policy = net.look_width, self.dtype_policy
        self.spectrum = rectified_dense(width // 2, "spectrum", policy)
        self.course = [
            convolution_along_time(
                width, 5 if i == 0 else 3, f"course_{i}", policy, strides=2, activation="relu"
            )
            for i in range(4)
        ]
        self.norms = [batch_norm(f"norm_{i}", policy) for i in range(4)]
        self.hidden = rectified_dense(width, "hidden", policy)
        self.dropout = keras.layers.Dropout(net.dropout, dtype=policy, name="dropout")
        self.pitches = keras.layers.Embedding(NUM_PITCHES, width, dtype=policy, name="pitches")
        self.context = rectified_dense(width, "context", policy)
        self.times = keras.layers.Dense(width, use_bias=False, dtype=policy, name="times")
        self.comparisons = [
            Comparison(net, dtype=policy, name=f"comparison_{i}")
            for i in range(net.look_comparisons)
        ]
        self.classes = Logits(NUM_CLASSES, dtype=policy, name="classes")
        self.programs = Logits(NUM_CLASSES * PROGRAMS_PER_CLASS, dtype=policy, name="programs")
        self.notes = Logits(1, dtype=policy, name="notes")

    def build(
        self,
        harmonics_shape: Any,
        features_shape: Any = None,
        cells_shape: Any = None,
        chances_shape: Any = None,
    ) -> None:
        width, frames = self.config.look_width, sum(FRAMES)
        self.context.build((None, len(STEPS) * self.config.num_features))
        self.spectrum.build((None, frames, len(INTERVALS) * harmonics_shape[-1]))
        for i, (course, norm) in enumerate(zip(self.course, self.norms, strict=True)):
            course.build((None, frames // 2**i, width // 2 if i == 0 else width))
            norm.build((None, frames // 2 ** (i + 1), width))
        self.pitches.build(())
        self.hidden.build((None, (frames // 16 + 2) * width))
        self.times.build((None, None, 2 * len(PERIODS) + 1))
        for comparison in self.comparisons:
            comparison.build((None, None, width))
        self.classes.build((None, width))
        self.programs.build((None, width))
        self.notes.build((None, width))

    def call(
        self, harmonics: Any, features: Any, cells: Any, chances: Any, training: Any = None
    ) -> dict[str, Any]:
        num_notes = ops.shape(cells)[1]
        context = self.context(self._gather_features(features, cells))
        columns = self.pitches(ops.reshape(cells[..., 1], (-1,)))
        x = self._listen(self._gather(harmonics, cells), columns, context, training)
        x = ops.reshape(x, (-1, num_notes, self.config.look_width))
        x = self._compare(x, cells[..., 0], chances, training)
        programs = (-1, num_notes, NUM_CLASSES, PROGRAMS_PER_CLASS)
        return {
            "class": self.classes(x),
            "program": ops.reshape(self.programs(x), programs),
            "note": self.notes(x)[..., 0],
        }

    def _gather_features(self, features: Any, cells: Any) -> Any:
        """Features at the onsets and a little later, [B * K, steps * F]."""
        num_steps, channels = ops.shape(features)[1], features.shape[-1]
        steps = ops.cast(cells[..., :1], "int32") // self.config.frames_per_step
        steps = ops.minimum(steps + np.array(STEPS), num_steps - 1)
        rows = ops.arange(ops.shape(cells)[0])[:, None, None] * num_steps
        flat = (rows + steps) * NUM_PITCHES + ops.cast(cells[..., 1:], "int32")
        found = ops.take(ops.reshape(features, (-1, channels)), flat, axis=0)
        return ops.reshape(found, (-1, len(STEPS) * channels))

    def _gather(self, harmonics: Any, cells: Any) -> Any:
        """Harmonics around the onsets, [B * K, frames, intervals * C]; 0 beyond the edges."""
        before, after = FRAMES
        channels = harmonics.shape[-1]
        padded = ops.pad(harmonics, ((0, 0), (before, after), (0, max(INTERVALS)), (0, 0)))
        num_frames, num_columns = ops.shape(padded)[1], NUM_PITCHES + max(INTERVALS)
        frames = ops.cast(cells[..., 0, None, None], "int32") + np.arange(before + after)[:, None]
        columns = ops.cast(cells[..., 1, None, None], "int32") + np.array(INTERVALS)
        rows = ops.arange(ops.shape(cells)[0])[:, None, None, None] * num_frames
        flat = (rows + frames) * num_columns + columns  # [B, K, frames, intervals]
        looks = ops.take(ops.reshape(padded, (-1, channels)), flat, axis=0)
        return ops.reshape(looks, (-1, before + after, len(INTERVALS) * channels))

    def _listen(self, looks: Any, columns: Any, context: Any, training: Any = None) -> Any:
        """Each note by itself: looks of `_gather`, the rest [B * K, C] each -> [B * K, width]."""
        own = looks[..., : looks.shape[-1] // len(INTERVALS)]
        x = looks - ops.mean(own, axis=(1, 2), keepdims=True)
        x = self.spectrum(ops.cast(x, self.compute_dtype) * (2 * INPUT_SCALE))
        for course, norm in zip(self.course, self.norms, strict=True):
            x = norm(course(x), training=training)
        flat = ops.reshape(x, (-1, x.shape[1] * x.shape[2]))
        return self.hidden(ops.concatenate([flat, columns, context], axis=-1))

    def _compare(self, x: Any, frames: Any, chances: Any, training: Any = None) -> Any:
        """Notes [B, K, width] beside each other."""
        turns = ops.cast(frames[..., None], "float32") * (2 * np.pi / PERIODS).astype("float32")
        odds = ops.log(ops.maximum(chances, 0.01) / ops.maximum(1 - chances, 0.01))[..., None]
        x = x + self.times(ops.concatenate([ops.sin(turns), ops.cos(turns), odds], axis=-1))
        is_own = ops.eye(ops.shape(x)[1], dtype="bool")
        is_heard = ops.logical_or(is_own, (chances >= LEAST_CHANCE)[:, None])  # [B, K, K]
        bias = ops.where(is_heard, 0.0, UNHEARD)[:, None]
        for comparison in self.comparisons:
            x = comparison(x, bias, training=training)
        return self.dropout(x, training=training)


@keras.saving.register_keras_serializable(package="mt3_keras")
class Comparison(Configured):
    """Attention among notes [B, K, width] and a hidden layer for each; `bias` as of `Attention`."""

    config_type = BodyConfig
    config: BodyConfig

    def __init__(self, config: BodyConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        width, heads, policy = self.config.look_width, self.config.look_heads, self.dtype_policy
        self.norms = [rms_norm(f"norm_{i}", policy) for i in range(2)]
        self.attention = Attention(width, heads, width // heads, dtype=policy, name="attention")
        self.wide = rectified_dense(2 * width, "wide", policy)
        self.narrow = keras.layers.Dense(
            width, kernel_initializer="zeros", dtype=policy, name="narrow"
        )

    def build(self, x_shape: Any, bias_shape: Any = None) -> None:
        for part in (*self.norms, self.attention, self.wide):
            part.build(x_shape)
        self.narrow.build((*x_shape[:-1], 2 * x_shape[-1]))

    def call(self, x: Any, bias: Any, training: Any = None) -> Any:
        x = x + self.attention(self.norms[0](x), bias=bias, training=training)
        return x + self.narrow(self.wide(self.norms[1](x)))
