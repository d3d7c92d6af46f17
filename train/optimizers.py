"""Adafactor as in T5X, Adam, and their learning rates."""

from __future__ import annotations

from typing import Any, Literal

import keras
from keras import ops

MIN_FACTORED_SIZE = 128


@keras.saving.register_keras_serializable(package="mt3_keras")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then a constant or falling learning rate.

    "linear" and "cosine" reach zero at `steps`; "rsqrt" falls with the root of the step from the
    end of the warm-up (from step 1 without one).

    Args:
      peak: the largest learning rate.
      batches_per_update: `fit` counts batches, this schedule updates.
    """

    def __init__(
        self,
        peak: float,
        kind: Literal["constant", "linear", "cosine", "rsqrt"],
        *,
        warmup_steps: int = 0,
        steps: int = 1,
        batches_per_update: int = 1,
    ) -> None:
        self.peak, self.kind = peak, kind
        self.warmup_steps, self.steps = warmup_steps, steps
        self.batches_per_update = batches_per_update

    def __call__(self, batch: Any) -> Any:
        step = ops.cast(ops.floor_divide(batch, self.batches_per_update), "float32")
        warmth = ops.minimum(1.0, (step + 1.0) / max(self.warmup_steps, 1))
        done = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        done = ops.clip(done, 0.0, 1.0)
        if self.kind == "linear":
            decay = 1.0 - done
        elif self.kind == "cosine":
            decay = 0.5 + 0.5 * ops.cos(done * 3.141592653589793)
        elif self.kind == "rsqrt":
            first = float(max(self.warmup_steps, 1))
            decay = ops.sqrt(first / ops.maximum(step + 1.0, first))
        else:
            decay = 1.0
        return self.peak * warmth * decay

    def get_config(self) -> dict[str, Any]:
        names = ("peak", "kind", "warmup_steps", "steps", "batches_per_update")
        return {name: getattr(self, name) for name in names}


class _YoungAverage(keras.optimizers.Optimizer):
    """The average of the weights forgets the first ones sooner than its momentum says.

    As TensorFlow's `ExponentialMovingAverage` with `num_updates`: else the random weights of the
    beginning would weigh a third after a thousand steps of momentum 0.999.
    """

    def _update_model_variables_moving_average(self, trainable_variables: Any) -> None:
        if not self.use_ema:
            return
        step = ops.cast(self.iterations, "float32")
        momentum = ops.minimum(self.ema_momentum, (1 + step) / (10 + step))
        averages = self._model_variables_moving_average
        for variable, average in zip(trainable_variables, averages, strict=True):
            if average is not None:
                kept = ops.cast(momentum, variable.dtype)
                average.assign(kept * average + (1 - kept) * variable)


@keras.saving.register_keras_serializable(package="mt3_keras")
class Adafactor(_YoungAverage):
    """Adafactor (arXiv 1804.04235) with the settings of T5X, which trained MT3.

    Squared gradients of matrices with both sides of at least 128 are kept as their row and column
    means, all others whole; their averages decay by 1 - step^-0.8. The update is clipped to a
    root mean square of 1 and multiplied by that of the variable, at least 0.001. No momentum. The
    size of the loss does not matter.

    `keras.optimizers.Adafactor` differs: it factors every matrix and keeps the whole product
    besides, and it never lets the learning rate above 1 / sqrt(step).
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        *,
        decay_power: float = 0.8,
        min_scale: float = 1e-3,
        clip_threshold: float = 1.0,
        epsilon: float = 1e-30,
        name: str = "adafactor",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.decay_power, self.min_scale = decay_power, min_scale
        self.clip_threshold, self.epsilon = clip_threshold, epsilon

    def build(self, variables: Any) -> None:
        if self.built:
            return
        super().build(variables)
        self._means = [self._new_means(v) for v in variables]

    def _new_means(self, variable: Any) -> list[Any]:
        rows_and_columns = tuple(variable.shape)
        if len(rows_and_columns) == 2 and min(rows_and_columns) >= MIN_FACTORED_SIZE:
            return [
                self.add_variable((size,), name=f"{variable.name}_{side}")
                for size, side in zip(rows_and_columns, ("row", "column"), strict=True)
            ]
        return [self.add_variable_from_reference(variable, name="mean")]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        gradient = ops.cast(gradient, "float32")
        step = ops.cast(self.iterations, "float32") + 1.0
        kept = 1.0 - step**-self.decay_power
        squared = ops.square(gradient) + self.epsilon
        means = self._means[self._get_variable_index(variable)]
        if len(means) == 2:
            row, column = means
            self.assign(row, kept * row + (1.0 - kept) * ops.mean(squared, axis=1))
            self.assign(column, kept * column + (1.0 - kept) * ops.mean(squared, axis=0))
            update = gradient * ops.rsqrt(row / ops.mean(row))[:, None]
            update = update * ops.rsqrt(column)[None, :]
        else:
            (mean,) = means
            self.assign(mean, kept * mean + (1.0 - kept) * squared)
            update = gradient * ops.rsqrt(mean)
        update = update / ops.maximum(1.0, _rms(update) / self.clip_threshold)
        scale = ops.maximum(_rms(ops.convert_to_tensor(variable)), self.min_scale)
        self.assign_sub(variable, learning_rate * scale * update)

    def get_config(self) -> dict[str, Any]:
        names = ("decay_power", "min_scale", "clip_threshold", "epsilon")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def _rms(x: Any) -> Any:
    return ops.sqrt(ops.mean(ops.square(x)))


@keras.saving.register_keras_serializable(package="mt3_keras")
class Adam(_YoungAverage, keras.optimizers.Adam):
    """Keras's, with averaged weights that are of use from the start."""


def make_optimizer(
    name: Literal["adafactor", "adam"],
    schedule: Schedule,
    *,
    clip_norm: float = 0.0,
    ema: float = 0.0,
    num_replicas: int = 1,
) -> keras.optimizers.Optimizer:
    """An optimizer of the given name.

    Args:
      name: of the optimizer.
      schedule: of its rate.
      clip_norm: largest norm of all gradients together, 0 for none.
      ema: momentum of the averaged weights it keeps beside the weights, 0 for none.
      num_replicas: devices that share a batch (see `strategy.mend_gradients`).
    """
    parts = schedule.batches_per_update
    options: dict[str, Any] = {
        "learning_rate": schedule,
        "global_clipnorm": clip_norm / num_replicas if clip_norm else None,
        "gradient_accumulation_steps": parts if parts > 1 else None,
        "use_ema": ema > 0,
        # The average moves with every batch, also those that leave the weights as they are.
        "ema_momentum": ema ** (1 / parts) if ema else 0.99,
    }
    if name == "adam":
        return Adam(**options)
    return Adafactor(**options)
