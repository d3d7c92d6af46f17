"""The network of a run with its objective and optimizer, as its settings say."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import TYPE_CHECKING

import keras

from mt3_keras.data.rolls import CERTAIN
from mt3_keras.models.detector import LOUDEST, NoteDetector
from mt3_keras.models.loading import build_network, load_model
from train.config import RunConfig, RunError
from train.objective import (
    PARTS,
    POSITIVE_WEIGHTS,
    HeadLoss,
    RollTraining,
    TokenObjective,
    TokenTraining,
    TrainingModel,
)
from train.optimizers import Schedule, make_optimizer
from train.strategy import mend_gradients

if TYPE_CHECKING:
    from mt3_keras.models.loading import Backbone


def make_model(config: RunConfig, num_replicas: int = 1) -> TrainingModel:
    """The network with its weights, objective and optimizer, compiled for `fit`.

    Raises:
      ValueError: the network or its first weights cannot be had, or a setting is for another kind
        of network.
    """
    backbone = _make_backbone(config)
    config.check_network(backbone.model_config)
    if config.lora_rank:
        backbone.enable_lora(config.lora_rank)
    if config.freeze:
        _freeze(backbone, config.freeze)
    model: TrainingModel
    if isinstance(backbone, NoteDetector):
        found_alone = config.looked_at == "found"
        model = RollTraining(backbone, head_losses(config), found_alone)
    else:
        model = TokenTraining(backbone, token_objective(config))
    schedule = Schedule(
        config.learning_rate,
        config.schedule,
        warmup_steps=config.warmup_steps,
        steps=config.steps,
        batches_per_update=config.gradient_accumulation_steps,
    )
    optimizer = make_optimizer(
        config.optimizer,
        schedule,
        clip_norm=config.clip_norm,
        ema=config.ema,
        num_replicas=num_replicas,
    )
    # `fit` would put the averages in the place of the weights that training continues with.
    optimizer.finalize_variable_values = lambda variables: None
    mend_gradients(optimizer, sum_first=num_replicas > 1 and config.clip_norm > 0)
    optimizer.build(model.trainable_variables)
    model.compile(
        optimizer,
        jit_compile=_is_compiled(config),
        steps_per_execution=config.steps_per_execution,
    )
    return model


def _is_compiled(config: RunConfig) -> bool:
    if config.strategy in ("mirrored", "multiworker"):
        return False  # one XLA program cannot span several devices
    if config.jit_compile != "auto" or keras.backend.backend() != "tensorflow":
        return config.jit_compile != "off"
    import tensorflow as tf

    return len(tf.config.list_logical_devices()) > len(tf.config.list_logical_devices("CPU"))


def token_objective(config: RunConfig) -> TokenObjective:
    """The loss that a run asks for a token network."""
    weights = {part: getattr(config, f"{part}_weight") for part in PARTS}
    return TokenObjective(
        normalize=config.normalize,
        z_loss=config.z_loss,
        label_smoothing=config.label_smoothing,
        part_weights=weights if any(weight != 1 for weight in weights.values()) else {},
    )


def head_losses(config: RunConfig) -> tuple[HeadLoss, ...]:
    """The losses that a run asks for a detector."""

    def one(name: str, weight: float) -> HeadLoss:
        positive_weight, largest = POSITIVE_WEIGHTS.get(name), CERTAIN
        if positive_weight is None:
            return HeadLoss(name, 1.0, weight, LOUDEST)
        return HeadLoss(name, config.head_positive_weight * positive_weight, weight, largest)

    return tuple(one(name, weight) for name, weight in config.head_weight_of.items())


def _make_backbone(config: RunConfig) -> Backbone:
    model_config = config.model_config()
    start = load_model(config.init_from) if config.init_from else None
    # On a processor TensorFlow trains the steps in the graph three times as fast as its loop.
    unroll = keras.backend.backend() == "tensorflow" and not _is_compiled(config)
    if start is not None:
        model_config = model_config or start.model_config
    if model_config is None:
        raise RunError("--model or --init_from is needed: the network to train")
    if config.dropout >= 0:
        network = dataclasses.replace(model_config.network, dropout=config.dropout)
        parts = {**model_config.to_dict(), "network": dataclasses.asdict(network)}
        model_config = type(model_config).from_dict(parts)
    if start is not None and model_config == start.model_config and not unroll:
        return start
    backbone = build_network(model_config, unroll=unroll)
    if start is not None:
        _copy_weights(start, backbone, config.init_from)
    return backbone


def _copy_weights(start: Backbone, backbone: Backbone, name: str) -> None:
    """Parts that only the new network has stay as they are; those of the old alone are left out.

    Raises:
      RunError: a part of both is not of one shape, or there is none.
    """
    old = {v.path: v for v in start.weights}
    own = {v.path: v for v in backbone.weights}
    both = [path for path in own if path in old]
    if not both or any(old[path].shape != own[path].shape for path in both):
        raise RunError(f"--init_from={name}: its weights do not fit --model")
    for path in both:
        own[path].assign(old[path])
    for what, paths in (("untrained", own.keys() - both), ("left out", old.keys() - both)):
        if paths:
            parts = sorted({path.rpartition("/")[0] for path in paths})
            print(f"--init_from={name}: {what}: {', '.join(parts)}", file=sys.stderr)


def _freeze(backbone: Backbone, pattern: str) -> None:
    try:
        frozen = [v for v in backbone.trainable_variables if re.search(pattern, v.path)]
    except re.error as error:
        raise RunError(f"freeze must be a regular expression: {error}") from error
    if not frozen or len(frozen) == len(backbone.trainable_variables):
        example = backbone.trainable_variables[0].path
        share = "all" if frozen else "none"
        raise RunError(f"freeze={pattern!r} finds {share} of the variables, such as {example}")
    for variable in frozen:
        variable.trainable = False
    for layer in backbone._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization) and not layer.trainable_variables:
            layer.trainable = False  # or its averages would follow the data all the same
