"""FLAC, OGG and MP3 files -> samples, in a TensorFlow graph, by tensorflow-io.

Its operators are loaded with `import tensorflow_io`, and a server needs them as well as the export:
TF Serving's published binaries have not. Its last release runs beside TensorFlow 2.16
(requirements-tfio.txt). Its decoders do not say a file's rate, so that is read from the file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_io as tfio

from mt3_keras.graph_audio import MOST_SECONDS, decode_wav, to_mono

FULL_SCALE = 2**15
# Of MPEG-1, 2 and 2.5 by the two bits of a frame's header; 0 is none.
_MP3_RATES_HZ = {
    3: (44_100, 48_000, 32_000),
    2: (22_050, 24_000, 16_000),
    0: (11_025, 12_000, 8_000),
}
_ID3_HEAD = 10  # bytes before a tag


def decode_audio(contents: Any, most_seconds: int = MOST_SECONDS) -> Any:
    """The content of a FLAC (16 bits), OGG Vorbis, MP3 or WAV file -> float32 [n], 16 kHz mono.

    Any rate and any number of channels, whose mean is taken; a file without the head of another
    kind is taken for MP3.

    Args:
      contents: string scalar.
      most_seconds: that the recording may last.

    Raises:
      InvalidArgumentError: it is no such file, or too long.
    """
    head = tf.strings.substr(contents, 0, 4)
    return tf.case(
        [
            (head == b"RIFF", lambda: decode_wav(contents, most_seconds)),
            (head == b"fLaC", lambda: to_mono(*_decode_flac(contents), most_seconds)),
            (head == b"OggS", lambda: to_mono(*_decode_vorbis(contents), most_seconds)),
        ],
        default=lambda: to_mono(*_decode_mp3(contents), most_seconds),
    )


def _decode_flac(contents: Any) -> tuple[Any, Any]:
    """The head's 20 bits of rate, 3 of channels and 5 of the width of a sample begin at byte 18."""
    head = _bytes(contents, 18, 4)
    rate = 4096 * head[0] + 16 * head[1] + head[2] // 16
    bits = 16 * (head[2] % 2) + head[3] // 16 + 1
    with tf.control_dependencies(
        [tf.debugging.Assert(tf.equal(bits, 16), ["a FLAC file must have 16 bits: got ", bits])]
    ):
        channels = tfio.audio.decode_flac(contents, dtype=tf.int16)
    return tf.cast(channels, tf.float32) / FULL_SCALE, rate


def _decode_vorbis(contents: Any) -> tuple[Any, Any]:
    head = _bytes(contents, 40, 3)  # in the first page, the lowest byte first
    rate = head[0] + 2**8 * head[1] + 2**16 * head[2]
    return tfio.audio.decode_vorbis(contents), rate


def _decode_mp3(contents: Any) -> tuple[Any, Any]:
    return tfio.audio.decode_mp3(contents), _mp3_rate(contents)


def _mp3_rate(contents: Any) -> Any:
    """Of the first frame after a tag, int32; 0 where there is none."""
    size = _bytes(contents, 6, 4)  # of the tag, 7 bits of each byte
    size = 2**21 * size[0] + 2**14 * size[1] + 2**7 * size[2] + size[3]
    start = tf.where(tf.strings.substr(contents, 0, 3) == b"ID3", size + _ID3_HEAD, 0)
    number = tf.strings.length(contents)
    found = tf.io.decode_raw(
        tf.strings.substr(contents, tf.minimum(start, number), 2**16), tf.uint8
    )
    found = tf.cast(tf.pad(found, [(0, 3)]), tf.int32)
    first, second, third = found[:-2], found[1:-1], found[2:]
    version, layer, place = second // 8 % 4, second // 2 % 4, third // 4 % 4
    is_frame = (first == 255) & (second // 32 == 7) & (layer != 0) & (version != 1) & (place != 3)
    rates = np.zeros((4, 4), np.int32)
    for row, known in _MP3_RATES_HZ.items():
        rates[row, :3] = known
    rates = tf.gather_nd(tf.constant(rates), tf.stack([version, place], axis=1))
    rates = tf.boolean_mask(rates, is_frame)
    return tf.concat([rates, [0]], axis=0)[0]


def _bytes(contents: Any, first: int, number: int) -> Any:
    """Some bytes of a file as int32; zeros past its end."""
    length = tf.strings.length(contents)
    part = tf.strings.substr(contents, tf.minimum(first, length), number)
    values = tf.cast(tf.io.decode_raw(part, tf.uint8), tf.int32)
    return tf.pad(values, [(0, number - tf.size(values))])
