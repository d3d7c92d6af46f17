"""A signature that takes files in the place of samples, so that a request is a file as it is.

Stands before any signature that takes "audio":

    endpoints["serving_bytes"] = from_bytes(served.transcribe, decode_wav)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from mt3_keras.models.config import SAMPLE_RATE_HZ
from mt3_keras.wav import to_wav

Tensors = dict[str, Any]


def from_bytes(
    transcribe: Callable[[Any], Tensors], decode: Callable[[Any], Any]
) -> tuple[Callable[[Any], Tensors], list[Any]]:
    """A signature that takes files in the place of samples.

    Args:
      transcribe: of "audio", float32 [B, n], 16 kHz mono.
      decode: of a file's content: `graph_audio.decode_wav`, or `graph_codecs.decode_audio`.

    Returns:
      A function of "audio_bytes", string [B], to what `transcribe` gives, and the specs of its
      argument. Shorter recordings are filled up with zeros.
    """

    def serve(audio_bytes: Any) -> Tensors:
        spec = tf.RaggedTensorSpec([None], tf.float32, ragged_rank=0)
        rows = tf.map_fn(decode, audio_bytes, fn_output_signature=spec)
        return transcribe(rows.to_tensor())

    return serve, [tf.TensorSpec([None], tf.string, "audio_bytes")]


def example_bytes(seconds: float = 0.1) -> dict[str, Any]:
    """A small input of such a signature: one file."""
    samples = np.random.default_rng(0).normal(0, 0.01, round(seconds * SAMPLE_RATE_HZ))
    return {"audio_bytes": np.array([to_wav(samples.astype(np.float32))], object)}
