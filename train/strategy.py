"""One device, several, or several machines: `tf.distribute` under Keras `fit`.

Four faults of Keras 3.15 under TensorFlow are mended here, and nowhere else:

- Before the first step `fit` draws a batch to learn its shapes. Under a strategy that batch is lost
  to training, and under `MultiWorkerMirroredStrategy` it fails. Our model is built already.
- Under `MultiWorkerMirroredStrategy` `fit` averages every figure of a step along its first axis,
  and figures have none. They are given one.
- Gradients are clipped on each device, before they are summed. They are summed before.
- Where a token occurs twice in a batch, Adam squares the two gradients of its embedding one by
  one, instead of their sum. Gradients are made dense.
"""

from __future__ import annotations

import contextlib
from typing import Any

import keras


def make_strategy(name: str) -> Any:
    """A `tf.distribute` strategy, or None for one device.

    Args:
      name: "one"; "mirrored", all GPUs of this machine (or, without one, its logical CPUs);
        "multiworker", the machines that the environment variable TF_CONFIG names; "tpu".

    Raises:
      ValueError: the backend is not TensorFlow, or there are no such devices.
    """
    if name == "one":
        return None
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"strategy must be one under KERAS_BACKEND={keras.backend.backend()}: got {name!r}"
        )
    import tensorflow as tf

    if name == "mirrored":
        kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
        return tf.distribute.MirroredStrategy(
            [device.name for device in tf.config.list_logical_devices(kind)]
        )
    if name == "multiworker":
        return tf.distribute.MultiWorkerMirroredStrategy()
    if name != "tpu":
        raise ValueError(f"strategy must be one, mirrored, multiworker or tpu: got {name!r}")
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver()
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, tf.errors.OpError) as error:
        raise ValueError("strategy tpu needs a TPU, named by TPU_NAME: found none") from error
    return tf.distribute.TPUStrategy(resolver)


def scope(strategy: Any) -> contextlib.AbstractContextManager[Any]:
    """Where variables must be made."""
    return strategy.scope() if strategy else contextlib.nullcontext()


def num_replicas(strategy: Any) -> int:
    """Devices that share a batch."""
    return strategy.num_replicas_in_sync if strategy else 1


def worker(strategy: Any) -> tuple[int, int]:
    """This process's number and how many there are."""
    resolver = strategy.cluster_resolver if strategy else None
    if not (resolver and resolver.cluster_spec().as_dict().get("worker")):
        return 0, 1
    cluster = resolver.cluster_spec().as_dict()
    is_worker = resolver.task_type == "worker"
    num_chiefs = len(cluster.get("chief", []))
    index = resolver.task_id + (num_chiefs if is_worker else 0)
    return index, num_chiefs + len(cluster["worker"])


def distribute(dataset: Any, strategy: Any, worker_batch_size: int) -> Any:
    """Shares out this process's batches, a `tf.data.Dataset`, to its devices."""
    if worker(strategy)[1] == 1:
        return dataset  # `fit` shares it out itself
    num_local = num_replicas(strategy) // worker(strategy)[1]
    if num_local > 1:
        dataset = dataset.rebatch(worker_batch_size // num_local)
    return strategy.distribute_datasets_from_function(lambda _: dataset)


def sum_over_replicas(x: Any) -> Any:
    """The sum of a scalar over all devices, known to each; inside a training step."""
    context = _replica_context()
    return x if context is None else context.all_reduce("SUM", x)


def _replica_context() -> Any:
    """TensorFlow's, if several devices are at work on the step being traced."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return context if context and context.num_replicas_in_sync > 1 else None


def mend_gradients(optimizer: keras.optimizers.Optimizer, *, sum_first: bool) -> None:
    """Makes gradients dense, and sums them over the devices before the optimizer clips them.

    Args:
      optimizer: its `apply` is replaced.
      sum_first: whether to sum. The optimizer sums over the devices once more, so it is given the
        sum divided by their number; the norm to clip at must be divided likewise.
    """
    apply = optimizer.apply

    def apply_mended(grads: Any, trainable_variables: Any = None) -> Any:
        if keras.backend.backend() == "tensorflow":
            grads = _mend(grads, _replica_context() if sum_first else None)
        return apply(grads, trainable_variables)

    optimizer.apply = apply_mended


def _mend(grads: Any, context: Any) -> list[Any]:
    import tensorflow as tf

    given = [tf.convert_to_tensor(g) for g in grads if g is not None]
    mended = iter(context.all_reduce("MEAN", given) if context and given else given)
    return [None if g is None else next(mended) for g in grads]


class ReplicaModel(keras.Model):
    """A Keras model that is built when it is made, and trains under every strategy."""

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Keras's hook under TensorFlow; there is nothing left to build."""

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        return _with_axis(super().train_step(*args, **kwargs))

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return _with_axis(super().test_step(*args, **kwargs))


def _with_axis(logs: Any) -> Any:
    if keras.backend.backend() != "tensorflow":
        return logs
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return logs
    return {name: tf.reshape(value, (1,)) for name, value in logs.items()}
