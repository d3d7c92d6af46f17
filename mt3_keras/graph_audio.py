"""WAV files -> samples, in a TensorFlow graph: of a served model, or of training's input.

Other formats: `graph_codecs`.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from mt3_keras.models.config import SAMPLE_RATE_HZ

LOWEST_RATE_HZ, HIGHEST_RATE_HZ = 1_000, 768_000
MOST_SECONDS = 600  # of a recording in one request, which bounds the server's memory


def decode_wav(contents: Any, most_seconds: int = MOST_SECONDS) -> Any:
    """The content of a WAV file, PCM of 16 bits -> float32 [n], 16 kHz mono.

    Any rate and any number of channels, whose mean is taken.

    Args:
      contents: string scalar.
      most_seconds: that the recording may last.

    Raises:
      InvalidArgumentError: it is no such file, or too long.
    """
    channels, rate = tf.audio.decode_wav(contents)
    return to_mono(channels, rate, most_seconds)


def to_mono(channels: Any, rate: Any, most_seconds: int) -> Any:
    """Samples float32 [n, channels] at `rate`, an int32 scalar -> [m], 16 kHz mono.

    Raises:
      InvalidArgumentError: the rate is none, or the recording too long.
    """
    known = (rate >= LOWEST_RATE_HZ) & (rate <= HIGHEST_RATE_HZ)
    message = [f"rate must be {LOWEST_RATE_HZ} to {HIGHEST_RATE_HZ} Hz: got ", rate]
    with tf.control_dependencies([tf.debugging.Assert(known, message)]):
        rate = tf.identity(rate)
    with tf.control_dependencies([check_length(tf.shape(channels)[0], rate, most_seconds)]):
        mono = tf.reduce_mean(channels, axis=1)
    return tf.cond(rate == SAMPLE_RATE_HZ, lambda: mono, lambda: resample(mono, rate))


def check_length(num_samples: Any, rate: Any, most_seconds: int = MOST_SECONDS) -> Any:
    """An operation that fails where a recording is too long."""
    seconds = num_samples // rate
    message = [
        f"a recording may last {most_seconds} s here, this one lasts ",
        seconds,
        " s: cut it, or send it by `mt3 client`, which cuts it and joins the notes again",
    ]
    return tf.debugging.Assert(num_samples <= most_seconds * rate, message)


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
