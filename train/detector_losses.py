"""Losses of the convolutional-recurrent network (`mt3_keras.models.detector_body`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops
from numpy.typing import NDArray

from mt3_keras.data.detector_targets import CERTAIN
from mt3_keras.models.config import NUM_CLASSES
from mt3_keras.models.detector_body import PROGRAMS_PER_CLASS
from train.objective import HeadLoss

LOUDEST = 127
# Weights of positive targets and of the losses: an onset is one of thousands of cells.
ROLL_LOSSES = (
    HeadLoss("onset", 4.0, 10.0, CERTAIN),
    HeadLoss("unison", 3.0, 4.0, CERTAIN),
    HeadLoss("offset", 2.0, 4.0, CERTAIN),
    HeadLoss("frame", 1.2, 2.0, CERTAIN),
    HeadLoss("strength", 1.0, 0.3, LOUDEST),
    HeadLoss("drum", 3.0, 4.0, CERTAIN),
    HeadLoss("drum_strength", 1.0, 0.1, LOUDEST),
)
SMOOTHING = 0.05  # of the classes' targets
PROGRAM_WEIGHT = 0.3  # of the program within its class, beside the class
BALANCE = 0.7  # a class of n notes weighs n ** -BALANCE a note


def class_weights(num_notes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Notes of each class in the data -> weight of each, whose mean over the notes is 1."""
    weights = np.maximum(num_notes, 1).astype(np.float64) ** -BALANCE
    mean = np.sum(weights * num_notes) / max(int(np.sum(num_notes)), 1)
    return (weights / mean).astype(np.float32)


def name_loss(
    class_logits: Any, program_logits: Any, programs: Any, weights: NDArray[np.float32]
) -> Any:
    """Cross-entropy of the classes of notes and of the programs within them, a scalar.

    Args:
      class_logits: float [B, K, NUM_CLASSES].
      program_logits: float [B, K, NUM_CLASSES, PROGRAMS_PER_CLASS].
      programs: int [B, K, 2] of `name_targets`: both of a unison count half; rows of -1 nothing.
      weights: float [NUM_CLASSES] of `class_weights`.
    """
    is_note = ops.cast(programs[..., 0] >= 0, "float32")
    programs = ops.maximum(programs, 0)
    classes = ops.one_hot(programs // PROGRAMS_PER_CLASS, NUM_CLASSES, dtype="float32")
    right = ops.mean(classes, axis=-2)
    smooth = (1 - SMOOTHING) * right + SMOOTHING / NUM_CLASSES
    class_loss = -ops.sum(smooth * ops.log_softmax(class_logits), axis=-1)
    within = ops.one_hot(programs % PROGRAMS_PER_CLASS, PROGRAMS_PER_CLASS, dtype="float32")
    both = classes[..., None] * within[..., None, :]  # [B, K, 2, classes, programs]
    program_loss = -ops.sum(ops.mean(both, axis=-3) * ops.log_softmax(program_logits), (-2, -1))
    note_weights = is_note * ops.matmul(right, weights[:, None])[..., 0]
    loss = ops.sum(note_weights * (class_loss + PROGRAM_WEIGHT * program_loss))
    return loss / ops.maximum(ops.sum(note_weights), 1.0)
