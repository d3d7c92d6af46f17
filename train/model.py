"""The network of a run with its objective and optimizer, as its settings say."""

from __future__ import annotations

import dataclasses
import re
import sys

import keras

from mt3_keras.models.config import HEADS
from mt3_keras.models.loading import load_model
from mt3_keras.models.mt3 import MT3Backbone
from train.config import RunConfig, RunError
from train.objective import PARTS, HeadLoss, Objective, TrainingModel
from train.optimizers import Schedule, make_optimizer
from train.strategy import mend_gradients

# The losses are means over rolls, and the emptier a roll the smaller its mean.
HEAD_WEIGHTS = {
    "onset": 5.0,
    "offset": 5.0,
    "frame": 1.0,
    "drum": 20.0,
    "program": 0.5,
    "strength": 0.2,
    "class": 1.0,
}


def make_model(config: RunConfig, num_replicas: int = 1) -> TrainingModel:
    """The network with its weights, objective and optimizer, compiled for `fit`.

    Raises:
      ValueError: the network or its first weights cannot be had.
    """
    backbone = _make_backbone(config)
    if config.lora_rank:
        backbone.enable_lora(config.lora_rank)
    if config.freeze:
        _freeze(backbone, config.freeze)
    objective = make_objective(config, has_heads=backbone.model_config.network.heads)
    if not config.token_weight:
        for part in (backbone.decoder, backbone.heads.feedback):
            if part is not None:
                part.trainable = False
    model = TrainingModel(backbone, objective)
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
    # `fit` would put the averages in the place of the weights that training goes on with.
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


def make_objective(config: RunConfig, *, has_heads: bool = False) -> Objective:
    """The losses that a run asks for, those of the encoder's heads if the network has them."""
    weights = {part: getattr(config, f"{part}_weight") for part in PARTS}
    return Objective(
        normalize=config.normalize,
        z_loss=config.z_loss,
        label_smoothing=config.label_smoothing,
        part_weights=weights if any(weight != 1 for weight in weights.values()) else {},
        token_weight=config.token_weight,
        heads=tuple(_head_loss(name, config) for name in (HEADS if has_heads else ())),
    )


def _head_loss(name: str, config: RunConfig) -> HeadLoss:
    weight = HEAD_WEIGHTS[name] * config.head_weight
    positive_weight = 1.0 if name in ("strength", "class") else config.head_positive_weight
    return HeadLoss(name, positive_weight, weight, 127 if name == "strength" else 1)


def _make_backbone(config: RunConfig) -> MT3Backbone:
    model_config = config.model_config()
    start = load_model(config.init_from) if config.init_from else None
    if start is not None:
        model_config = model_config or start.model_config
    if model_config is None:
        raise RunError("--model or --init_from is needed: the network to train")
    if config.dropout >= 0:
        network = dataclasses.replace(model_config.network, dropout=config.dropout)
        model_config = dataclasses.replace(model_config, network=network)
    if start is not None and model_config == start.model_config:
        return start
    backbone = MT3Backbone(**model_config.to_dict())
    if start is not None:
        _copy_weights(start, backbone, config.init_from)
    return backbone


def _copy_weights(start: MT3Backbone, backbone: MT3Backbone, name: str) -> None:
    """Parts that only the new network has stay as they are, those that only the old has are lost.

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


def _freeze(backbone: MT3Backbone, pattern: str) -> None:
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
    if backbone.model_config.spectrogram.front_end == "harmonic":
        stem = backbone.stem
        for norm in (*stem.norms, *(block.norm for block in stem.blocks)):
            if not norm.trainable_variables:
                norm.trainable = False  # or its averages would follow the data all the same
