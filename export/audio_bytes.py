"""WAV files -> samples, in the graph of a served model, so that a request is a file as it is.

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
LOWEST_RATE_HZ, HIGHEST_RATE_HZ = 1_000, 768_000
MOST_SECONDS = 600  # of a recording in one request, which bounds the server's memory


def from_bytes(
    transcribe: Callable[[Any], Tensors], decode: Callable[[Any], Any]
) -> tuple[Callable[[Any], Tensors], list[Any]]:
    """A signature that takes files in the place of samples.

    Args:
      transcribe: of "audio", float32 [B, n], 16 kHz mono.
      decode: of a file's content: `decode_wav`, or `encoded_audio.decode_audio`.

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


def decode_wav(contents: Any) -> Any:
    """The content of a WAV file, PCM of 16 bits -> float32 [n], 16 kHz mono.

    Any rate and any number of channels, whose mean is taken.

    Raises:
      InvalidArgumentError: it is no such file, or too long.
    """
    return to_mono(*tf.audio.decode_wav(contents))


def to_mono(channels: Any, rate: Any) -> Any:
    """Samples float32 [n, channels] at `rate`, an int32 scalar -> [m], 16 kHz mono.

    Raises:
      InvalidArgumentError: the rate is none, or the recording too long.
    """
    known = (rate >= LOWEST_RATE_HZ) & (rate <= HIGHEST_RATE_HZ)
    message = [f"rate must be {LOWEST_RATE_HZ} to {HIGHEST_RATE_HZ} Hz: got ", rate]
    with tf.control_dependencies([tf.debugging.Assert(known, message)]):
        rate = tf.identity(rate)
    with tf.control_dependencies([check_length(tf.shape(channels)[0], rate)]):
        mono = tf.reduce_mean(channels, axis=1)
    return tf.cond(rate == SAMPLE_RATE_HZ, lambda: mono, lambda: resample(mono, rate))


def check_length(num_samples: Any, rate: Any) -> Any:
    """An operation that fails where a recording is too long for one request."""
    seconds = num_samples // rate
    message = [
        f"a request holds at most {MOST_SECONDS} s of audio, this one ",
        seconds,
        " s: cut it, or leave that to `mt3 client`, which joins the notes again",
    ]
    return tf.debugging.Assert(num_samples <= MOST_SECONDS * rate, message)


def resample(samples: Any, rate: Any) -> Any:
    """Samples float32 [n] at `rate`, an int32 scalar -> [ceil(n * 16000 / rate)] at 16 kHz.

    By cutting the spectrum of the whole, or adding zeros to it. Zeros after the end keep it from
    running into the start, and make both lengths whole numbers.
    """
    num_samples = tf.size(samples)
    divisor = _greatest_common_divisor(rate, tf.constant(SAMPLE_RATE_HZ))
    old_step, new_step = rate // divisor, SAMPLE_RATE_HZ // divisor
    num_steps = (num_samples + rate // 10) // old_step + 1  # a tenth of a second more
    num_steps += num_steps % 2  # so that both lengths are even
    old_length, new_length = num_steps * old_step, num_steps * new_step
    padded = tf.pad(samples, [(0, old_length - num_samples)])
    spectrum = tf.signal.rfft(padded)[: new_length // 2 + 1]
    spectrum = tf.pad(spectrum, [(0, new_length // 2 + 1 - tf.size(spectrum))])
    scale = tf.cast(new_length, tf.float32) / tf.cast(old_length, tf.float32)
    resampled = scale * tf.signal.irfft(spectrum, [new_length])
    kept = tf.cast(num_samples, tf.int64) * SAMPLE_RATE_HZ
    kept = (kept + tf.cast(rate, tf.int64) - 1) // tf.cast(rate, tf.int64)
    return resampled[: tf.cast(kept, tf.int32)]


def _greatest_common_divisor(a: Any, b: Any) -> Any:
    return tf.while_loop(lambda _, b: b > 0, lambda a, b: (b, a % b), (a, b))[0]
