"""What training makes small, and the figures that are logged.

Shape letters: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from mt3_keras.codec import EOS, PAD, Codec
from mt3_keras.data.rolls import CERTAIN
from mt3_keras.models.config import NUM_CLASSES, PROGRAMS_PER_CLASS, TokenConfig
from mt3_keras.models.detector import ONSET_REACH, NoteDetector, at_cells, highest_near
from train.strategy import ReplicaModel, sum_over_replicas

if TYPE_CHECKING:
    from mt3_keras.models.token_backbone import TokenBackbone

# Each part of a transcription and the event types that say it; the end of a segment goes with the
# tie, since both say what the segment is, not what sounds.
PARTS: dict[str, tuple[str, ...]] = {
    "timing": ("shift",),
    "pitch": ("pitch",),
    "instrument": ("program", "drum"),
    "velocity": ("velocity",),
    "tie": ("tie",),
}


@dataclasses.dataclass(frozen=True)
class TokenObjective:
    """The loss of a token network.

    Attributes:
      normalize: what the sum over the batch's tokens is divided by: its "tokens", its "examples",
        or nothing ("sum", as in the original).
      z_loss, label_smoothing: see `token_cross_entropy`.
      part_weights: part of `PARTS` -> weight of its tokens; 1 if not named.
    """

    normalize: Literal["tokens", "examples", "sum"] = "tokens"
    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    part_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.part_weights) - set(PARTS)):
            raise ValueError(f"part_weights must name parts of {list(PARTS)}: got {unknown}")


@dataclasses.dataclass(frozen=True)
class HeadLoss:
    """Binary cross-entropy of one of a detector's rolls.

    Attributes:
      name: of the batch's target, a number from 0 to `largest_target`; what is below 0 does not
        count. The model's output, logits of the same shape, is f"{name}_logits".
      positive_weight: how much more a 1 counts than a 0.
      weight: of this loss in the sum.
      largest_target: the target that stands for 1.
    """

    name: str
    positive_weight: float = 1.0
    weight: float = 1.0
    largest_target: float = 1.0


# What a 1 counts in a roll, where a 0 counts 1: the emptier the roll, the more. Strengths are
# judged where onsets are, and so are not mostly 0.
POSITIVE_WEIGHTS = {"onset": 4.0, "unison": 3.0, "offset": 2.0, "frame": 1.2, "drum": 3.0}
NAMES = "names"  # among the heads, the programs of notes
NOTES = "notes"  # whether the onsets found are notes
NUM_FOUND = 64  # of the likeliest onsets, which are judged so
NAME_REACH = 2  # frames from an onset found to that of the note whose name it is to bear
NAME_SMOOTHING = 0.05  # of the classes' targets
PROGRAM_WEIGHT = 0.3  # of the program within its class, beside the class
BALANCE = 0.7  # a class with n of a batch's notes weighs n ** -BALANCE a note


def token_parts(config: TokenConfig) -> NDArray[np.int32]:
    """Token -> index of its part in `PARTS`, int32 [V]; -1 for padding and unused ids."""
    codec = Codec(config.vocabulary.num_velocity_bins)
    parts = np.full(config.network.vocabulary_rows, -1, np.int32)
    for i, event_types in enumerate(PARTS.values()):
        for event_type in event_types:
            first, last = codec.token_range(event_type)
            parts[first : last + 1] = i
    parts[EOS] = list(PARTS).index("tie")
    return parts


def token_cross_entropy(
    logits: Any, targets: Any, *, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Any, Any, Any]:
    """T5X's loss of each token.

    Args:
      logits: float [B, L, V].
      targets: int [B, L].
      z_loss: weight of the squared logarithm of the softmax's normaliser, which keeps it near 1.
      label_smoothing: probability spread evenly over the other V - 1 tokens. The entropy of the
        smoothed targets is subtracted, so that a perfect prediction costs nothing.

    Returns:
      The loss, the plain cross-entropy in nats, and 1 where the target is the likeliest token, else
      0; all float32 [B, L], padding included.
    """
    logits = ops.cast(logits, "float32")
    log_z_BL = ops.logsumexp(logits, axis=-1)
    # On a CPU this product and its gradient take less time than picking single scores.
    right_BL = ops.sum(logits * ops.one_hot(targets, logits.shape[-1], dtype="float32"), axis=-1)
    plain_BL = log_z_BL - right_BL
    loss_BL = plain_BL + z_loss * ops.square(log_z_BL)
    if label_smoothing:
        num_others = logits.shape[-1] - 1
        sure, other = 1.0 - label_smoothing, label_smoothing / num_others
        mean_BL = (ops.sum(logits, axis=-1) - right_BL) / num_others
        entropy = -sure * math.log(sure) - label_smoothing * math.log(other)
        loss_BL = loss_BL + label_smoothing * (right_BL - mean_BL) - entropy
    is_best_BL = ops.cast(right_BL >= ops.max(logits, axis=-1), "float32")
    return loss_BL, plain_BL, is_best_BL


def head_cross_entropy(
    logits: Any, targets: Any, positive_weight: float = 1.0, largest_target: float = 1.0
) -> Any:
    """Mean binary cross-entropy over the targets that are not below 0, a scalar.

    `largest_target` stands for 1.
    """
    logits, targets = ops.cast(logits, "float32"), ops.cast(targets, "float32") / largest_target
    counts = ops.cast(targets >= 0, "float32")
    targets = ops.maximum(targets, 0.0)
    loss = positive_weight * targets * ops.softplus(-logits) + (1 - targets) * ops.softplus(logits)
    return ops.sum(loss * counts) / ops.maximum(ops.sum(counts), 1.0)


def name_loss(class_logits: Any, program_logits: Any, programs: Any) -> Any:
    """Cross-entropy of the classes of notes and of the programs within them, a scalar.

    Classes that are rare in the batch weigh more.

    Args:
      class_logits: float [B, K, NUM_CLASSES].
      program_logits: float [B, K, NUM_CLASSES, PROGRAMS_PER_CLASS].
      programs: int [B, K, 2] of `rolls.name_targets`: both of a unison count half; rows of -1
        nothing.
    """
    is_note = ops.cast(programs[..., 0] >= 0, "float32")
    programs = ops.maximum(programs, 0)
    classes = ops.one_hot(programs // PROGRAMS_PER_CLASS, NUM_CLASSES, dtype="float32")
    right = ops.mean(classes, axis=-2)
    smooth = (1 - NAME_SMOOTHING) * right + NAME_SMOOTHING / NUM_CLASSES
    class_loss = -ops.sum(smooth * ops.log_softmax(class_logits), axis=-1)
    within = ops.one_hot(programs % PROGRAMS_PER_CLASS, PROGRAMS_PER_CLASS, dtype="float32")
    both = classes[..., None] * within[..., None, :]  # [B, K, 2, classes, programs]
    program_loss = -ops.sum(ops.mean(both, axis=-3) * ops.log_softmax(program_logits), (-2, -1))
    counts = sum_over_replicas(ops.sum(is_note[..., None] * right, axis=(0, 1)))
    weights = ops.maximum(counts, 1.0) ** -BALANCE
    note_weights = is_note * ops.sum(right * weights, axis=-1)
    loss = ops.sum(note_weights * (class_loss + PROGRAM_WEIGHT * program_loss))
    return loss / ops.maximum(ops.sum(note_weights), 1e-6)


def note_targets(onsets: Any, cells: Any) -> Any:
    """Which cells are notes: 1 near a true onset, else 0; -1 of what is no cell or not known.

    Args:
      onsets: int [B, T, N], the targets of a roll: `CERTAIN` where a note begins, below 0 unknown.
      cells: int [B, K, 2]; rows of -1 are none.
    """
    near = highest_near(ops.cast(onsets, "float32"), ONSET_REACH)
    highest = at_cells(near, ops.maximum(cells, 0))
    known = ops.logical_and(cells[..., 0] >= 0, highest >= 0)
    return ops.where(known, ops.cast(highest >= CERTAIN, "float32"), -1.0)


def programs_near(cells: Any, note_cells: Any, programs: Any) -> Any:
    """The programs that onsets found are to be named by: of the nearest note of their pitch.

    Args:
      cells: int [B, F, 2], frame and column of each onset; rows of -1 are none.
      note_cells: int [B, K, 2], the "cells" of `rolls.name_targets`.
      programs: int [B, K, 2], its "programs".

    Returns:
      int [B, F, 2]; -1 where no note begins within `NAME_REACH` frames.
    """
    by = ops.abs(cells[:, :, None] - note_cells[:, None])  # [B, F, K, 2]
    is_like = ops.logical_and(by[..., 1] == 0, note_cells[:, None, :, 0] >= 0)
    frames = ops.where(is_like, by[..., 0], NAME_REACH + 1)
    near = ops.take_along_axis(programs, ops.argmin(frames, axis=-1)[..., None], axis=1)
    is_near = ops.min(frames, axis=-1, keepdims=True) <= NAME_REACH
    return ops.where(is_near, near, -1)


class TokenTraining(ReplicaModel):
    """A token network with its objective, to be compiled with an optimizer alone, for `fit`.

    Takes batches (inputs, targets): the inputs are the backbone's, the targets {"targets": int32
    [B, L], or [B, G, L] of several decoders, padded with 0}. Several devices that share a batch
    come to the loss that one device with the whole batch has.

    Logs, all but the first unweighted means over the tokens concerned: "loss", the objective;
    "token_loss" and "<part>_loss", cross-entropy in nats; "accuracy", the share of tokens that are
    the likeliest; "num_tokens", their number so far.
    """

    def __init__(self, backbone: TokenBackbone, objective: TokenObjective, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.backbone = backbone
        self.objective = objective
        self._token_parts = token_parts(backbone.model_config)
        weights = [objective.part_weights.get(part, 1.0) for part in PARTS]
        self._part_weights = np.array([*weights, 1.0], np.float32)  # the last: no part, index -1
        self.means = {n: keras.metrics.Mean(name=f"{n}_loss") for n in ("token", *PARTS)}
        self.accuracy = keras.metrics.Mean(name="accuracy")
        self.num_tokens = keras.metrics.Sum(name="num_tokens")
        self.built = True

    def call(self, inputs: Any, training: Any = None) -> Any:
        return self.backbone.forward(inputs, training=training)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: Any = True,
    ) -> Any:
        objective, targets = self.objective, y["targets"]
        loss_BL, plain_BL, is_best_BL = token_cross_entropy(
            y_pred,
            targets,
            z_loss=objective.z_loss,
            label_smoothing=objective.label_smoothing,
        )
        is_token_BL = ops.cast(targets != PAD, "float32")
        parts_BL = ops.take(self._token_parts, targets, axis=0)
        self.num_tokens.update_state(is_token_BL)
        self.accuracy.update_state(is_best_BL, is_token_BL)
        self.means["token"].update_state(plain_BL, is_token_BL)
        for i, part in enumerate(PARTS):
            self.means[part].update_state(plain_BL, ops.cast(parts_BL == i, "float32"))
        weights_BL = is_token_BL
        if objective.part_weights:
            index_BL = ops.where(parts_BL < 0, len(PARTS), parts_BL)
            weights_BL = weights_BL * ops.take(self._part_weights, index_BL, axis=0)
        loss = ops.sum(loss_BL * weights_BL)
        if objective.normalize == "tokens":
            loss /= ops.maximum(sum_over_replicas(ops.sum(weights_BL)), 1.0)
        elif objective.normalize == "examples":
            loss /= sum_over_replicas(ops.cast(ops.shape(targets)[0], "float32"))
        return loss


class RollTraining(ReplicaModel):
    """A `NoteDetector` with its losses, to be compiled with an optimizer alone, for `fit`.

    Takes batches (inputs, targets): the inputs are the backbone's, the targets an entry for each
    head (see `HeadLoss`) and "programs" of the notes at the inputs' "cells". The second look is
    trained on these and on the likeliest onsets found, or with `found_alone` on the latter. Logs
    "loss", the weighted sum, and "<head>_loss", each by itself.
    """

    def __init__(
        self,
        backbone: NoteDetector,
        heads: tuple[HeadLoss, ...],
        found_alone: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.backbone = backbone
        self.heads = heads
        is_second_look = any(head.name in (NAMES, NOTES) for head in heads)
        self._found_alone = found_alone and is_second_look
        self._num_found = NUM_FOUND if is_second_look else 0
        self.means = {head.name: keras.metrics.Mean(name=f"{head.name}_loss") for head in heads}
        self.built = True

    def call(self, inputs: Any, training: Any = None) -> Any:
        if self._found_alone:
            inputs = {**inputs, "cells": inputs["cells"][:, :0]}
        return self.backbone.forward(inputs, training=training, num_found=self._num_found)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: Any = True,
    ) -> Any:
        num_replicas = sum_over_replicas(ops.ones(()))
        loss = 0.0
        for head in self.heads:
            if head.name == NAMES:
                programs, own = y["programs"], slice(None)
                if self._found_alone:
                    programs = programs_near(y_pred["cells"], x["cells"], programs)
                else:
                    own = slice(programs.shape[1])  # the notes given come first
                logits = (y_pred["class_logits"][:, own], y_pred["program_logits"][:, own])
                head_loss = name_loss(*logits, programs)
            elif head.name == NOTES:
                targets = note_targets(y["onset"], y_pred["cells"])
                head_loss = head_cross_entropy(y_pred["note_logits"], targets)
            else:
                head_loss = head_cross_entropy(
                    y_pred[f"{head.name}_logits"],
                    y[head.name],
                    head.positive_weight,
                    head.largest_target,
                )
            self.means[head.name].update_state(head_loss)
            loss += head.weight * head_loss / num_replicas
        return loss


TrainingModel = TokenTraining | RollTraining
