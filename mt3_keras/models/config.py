"""Frozen descriptions of a model: its spectrogram, its vocabulary, its network.

They are stored beside the weights (`config.json`) so that weights describe themselves. A field's
name is the flag's name is the JSON key. The defaults are those of the paper's MT3.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

SAMPLE_RATE_HZ = 16_000
STEPS_PER_SECOND = 100  # the grid of the shift tokens

# Rolls that the encoder's heads predict for every frame, and their columns: see `heads`.
LOWEST_PITCH, NUM_PITCHES = 21, 88  # the piano's keys; other pitches have tokens only
NUM_CLASSES = 16  # of General MIDI, eight programs each
HEADS = {
    "onset": NUM_PITCHES,
    "offset": NUM_PITCHES,
    "frame": NUM_PITCHES,
    "drum": 128,
    "program": 128,
    "strength": NUM_PITCHES + 1,
    "class": NUM_PITCHES * NUM_CLASSES,
}
ENCODER_HEADS = {head: size for head, size in HEADS.items() if head != "class"}
METHODS = ("greedy", "beam1", "heads")  # of decoding, see `generation.Search`


@dataclasses.dataclass(frozen=True)
class SpectrogramConfig:
    """The spectrum that the network hears.

    Attributes:
      front_end: "mel", the log-mel spectrum of the MT3 paper (section 3.2), or "harmonic", two
        log-frequency spectra with the harmonics of each pitch side by side.
      hop_samples: distance between frames.
      window_samples: length of the periodic Hann window and of the Fourier transform; the longer
        one of "harmonic".
      short_window_samples: the second window of "harmonic".
      bins_per_octave: of "harmonic", from A0 up; a multiple of 12.
      num_mels: number of mel bands.
      fmin_hz: lower edge of the lowest band.
      fmax_hz: upper edge of the highest band. The original never sets it and gets its spectral
        library's default of 7600 Hz; 8000 Hz ruins the released weights.
      log_floor: "zero" replaces only magnitudes of exactly zero by 1e-5 before the logarithm (the
        original's code since 2022); "clamp" raises everything below 1e-5 to 1e-5 (the code at the
        time the released weights were trained).
    """

    front_end: str = "mel"
    hop_samples: int = 128
    window_samples: int = 2048
    short_window_samples: int = 1024
    bins_per_octave: int = 36
    num_mels: int = 512
    fmin_hz: float = 20.0
    fmax_hz: float = 7600.0
    log_floor: str = "zero"

    def __post_init__(self) -> None:
        if self.front_end not in ("mel", "harmonic"):
            raise ValueError(f"front_end must be 'mel' or 'harmonic': got {self.front_end!r}")
        if self.log_floor not in ("zero", "clamp"):
            raise ValueError(f"log_floor must be 'zero' or 'clamp': got {self.log_floor!r}")
        if not 0 <= self.fmin_hz < self.fmax_hz <= SAMPLE_RATE_HZ / 2:
            raise ValueError(
                f"need 0 <= fmin_hz < fmax_hz <= 8000: got {self.fmin_hz} and {self.fmax_hz}"
            )
        for name in ("hop_samples", "window_samples", "short_window_samples", "num_mels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive: got {getattr(self, name)}")
        if self.bins_per_octave < 12 or self.bins_per_octave % 12:
            raise ValueError(
                f"bins_per_octave must be a multiple of 12: got {self.bins_per_octave}"
            )
        if self.front_end == "harmonic" and not (
            self.hop_samples <= self.short_window_samples <= self.window_samples
        ):
            raise ValueError(
                "need hop_samples <= short_window_samples <= window_samples: got "
                f"{self.hop_samples}, {self.short_window_samples}, {self.window_samples}"
            )

    @property
    def frames_per_second(self) -> float:
        return SAMPLE_RATE_HZ / self.hop_samples

    @property
    def lead_samples(self) -> int:
        """Samples that the first frame's window reaches back before its own hop.

        0 for "mel", whose windows begin with their hop; those of "harmonic" are centred on it.
        """
        return 0 if self.front_end == "mel" else (self.window_samples - self.hop_samples) // 2

    @property
    def overhang_samples(self) -> int:
        """Samples that the last frame's window reaches past the end of its own hop."""
        return max(0, self.window_samples - self.hop_samples - self.lead_samples)


@dataclasses.dataclass(frozen=True)
class VocabularyConfig:
    """What the tokens can say (facts: `mt3_keras.codec`).

    Attributes:
      num_velocity_bins: 1 for mt3 (every note-on is velocity 127), 127 for ismir2021.
      ties: whether a segment begins with the list of notes still sounding.
      granularity: "full", "midi_class" or "flat": how programs were mapped in training.
    """

    num_velocity_bins: int = 1
    ties: bool = True
    granularity: str = "full"

    def __post_init__(self) -> None:
        if self.num_velocity_bins < 1:
            raise ValueError(f"num_velocity_bins must be positive: got {self.num_velocity_bins}")
        if self.granularity not in ("full", "midi_class", "flat"):
            raise ValueError(
                f"granularity must be full, midi_class or flat: got {self.granularity!r}"
            )


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the T5 encoder-decoder, and what it has beyond the paper's.

    Attributes:
      vocabulary_rows: rows of the token embedding, the vocabulary padded to a multiple of 128.
      segment_frames: spectrogram frames the encoder sees at once.
      max_tokens: longest token sequence of a segment, EOS included.
      frames_per_position: frames that make up one position of the encoder.
      stem_channels: of each convolution between the "harmonic" spectrum and the encoder.
      stem_blocks: residual blocks of two more such convolutions each, for a longer view in time.
      heads: the encoder predicts the rolls `HEADS` too.
      head_feedback: the encoder's output is given what its heads found.
      state_inputs: the decoder is told what its tokens imply: time, program, velocity, section.
      time_bias: the decoder looks at the encoder's output at the current time first.
      pointer: the heads' logits at the current time are added to the tokens' logits.
      ordered: with a pointer, pitches and drums of one moment, program and velocity rise, as they
        do in training with `join_seconds`.
      least_confidence: onsets of which the heads are less sure are no notes.
      sure_confidence: below 1 the heads decide, not the tokens: onsets of which they are at least
        so sure are notes, at first; then as the music goes (`note_rolls.Certainty`).
    """

    width: int = 512
    num_heads: int = 6
    head_width: int = 64
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    mlp_width: int = 1024
    vocabulary_rows: int = 1536
    segment_frames: int = 256
    max_tokens: int = 1024
    dropout: float = 0.1
    frames_per_position: int = 1
    stem_channels: int = 32
    stem_blocks: int = 0
    heads: bool = False
    head_feedback: bool = False
    state_inputs: bool = False
    time_bias: bool = False
    pointer: bool = False
    ordered: bool = False
    least_confidence: float = 0.0
    sure_confidence: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(field.default) is int and value < min(1, field.default):
                least = "positive" if field.default else "0 or more"
                raise ValueError(f"{field.name} must be {least}: got {value}")
        if self.segment_frames % self.frames_per_position:
            raise ValueError(
                "frames_per_position must divide segment_frames: got "
                f"{self.frames_per_position} and {self.segment_frames}"
            )
        for name in ("head_feedback", "pointer"):
            if getattr(self, name) and not self.heads:
                raise ValueError(f"{name} needs heads")
        if self.width % 2:
            raise ValueError(f"width must be even, half sines and half cosines: got {self.width}")
        for name in ("least_confidence", "sure_confidence"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1]: got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1): got {self.dropout}")

    def choose_method(self, method: str | None) -> str:
        """The way of decoding (see `generation.Search`); None is the network's own.

        Raises:
          ValueError: there is no such way, or not for this network.
        """
        heads_decide = self.heads and self.sure_confidence < 1
        method = method or ("heads" if heads_decide else "greedy")
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}: got {method!r}")
        if method == "heads" and not heads_decide:
            raise ValueError("method 'heads' is for networks whose heads decide, such as small")
        return method

    def hop_frames(self, method: str | None) -> int:
        """From the start of a segment to that of the next, by the way of decoding.

        The heads alone take so little that they hear every frame twice (see
        `note_rolls.Crossfade`).
        """
        if self.choose_method(method) == "heads":
            return max(1, self.segment_frames // 2)
        return self.segment_frames

    def token_limit(self, max_tokens: int | None) -> int:
        """The longest sequence a search may write; `max_tokens` of None is the network's own.

        Raises:
          ValueError: the network has fewer positions.
        """
        if max_tokens is None:
            return self.max_tokens
        if not 1 <= max_tokens <= self.max_tokens:
            raise ValueError(f"max_tokens must be 1 to {self.max_tokens}: got {max_tokens}")
        return max_tokens

    @property
    def num_positions(self) -> int:
        """Length of the encoder's output."""
        return self.segment_frames // self.frames_per_position


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that is needed to rebuild a model, but for its weights."""

    spectrogram: SpectrogramConfig = SpectrogramConfig()
    vocabulary: VocabularyConfig = VocabularyConfig()
    network: NetworkConfig = NetworkConfig()

    @property
    def segment_samples(self) -> int:
        return self.network.segment_frames * self.spectrogram.hop_samples

    @property
    def input_samples(self) -> int:
        """Samples the network hears for a segment: from `lead_samples` before its start on."""
        spectrogram = self.spectrogram
        return spectrogram.lead_samples + self.segment_samples + spectrogram.overhang_samples

    @property
    def max_step(self) -> int:
        """Latest time of an event in a segment, in steps: its last frame's may round up."""
        return math.ceil(self.segment_seconds * STEPS_PER_SECOND)

    @property
    def segment_seconds(self) -> float:
        return self.segment_samples / SAMPLE_RATE_HZ

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`; unknown keys raise, missing keys take the default.

        Raises:
          ValueError: a key is not a field, or a value is out of range.
        """
        types: dict[str, Any] = {
            "spectrogram": SpectrogramConfig,
            "vocabulary": VocabularyConfig,
            "network": NetworkConfig,
        }
        parts = {}
        for name, part in types.items():
            given = values.get(name, {})
            known = {field.name for field in dataclasses.fields(part)}
            if unknown := sorted(set(given) - known):
                raise ValueError(f"unknown {name} settings: {', '.join(unknown)}")
            parts[name] = part(**given)
        return cls(**parts)

    @classmethod
    def from_preset(cls, folder: str | pathlib.Path) -> ModelConfig:
        """Reads the model's description from a preset folder, without Keras.

        Raises:
          ValueError: the folder holds no readable `config.json` of an MT3Backbone.
        """
        path = pathlib.Path(folder) / "config.json"
        try:
            stored = json.loads(path.read_text())["config"]
            return cls.from_dict({f.name: stored[f.name] for f in dataclasses.fields(cls)})
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not the description of an MT3 model") from error


MT3 = ModelConfig()
ISMIR2021 = ModelConfig(
    vocabulary=VocabularyConfig(num_velocity_bins=127, ties=False, granularity="flat"),
    network=NetworkConfig(vocabulary_rows=1664, segment_frames=512),
)
TINY = ModelConfig(
    spectrogram=SpectrogramConfig(num_mels=64),
    network=NetworkConfig(
        width=64,
        num_heads=2,
        head_width=32,
        num_encoder_layers=2,
        num_decoder_layers=2,
        mlp_width=128,
        max_tokens=256,
    ),
)
SMALL = ModelConfig(
    spectrogram=SpectrogramConfig(front_end="harmonic", hop_samples=256, window_samples=4096),
    vocabulary=VocabularyConfig(granularity="midi_class"),
    network=NetworkConfig(
        width=320,
        num_heads=5,
        num_encoder_layers=4,
        num_decoder_layers=3,
        mlp_width=768,
        vocabulary_rows=1408,
        segment_frames=128,
        dropout=0.0,
        frames_per_position=2,
        stem_blocks=4,
        heads=True,
        state_inputs=True,
        time_bias=True,
        pointer=True,
        ordered=True,
        least_confidence=0.2,
        sure_confidence=0.45,
    ),
)
CONFIGS = {"mt3": MT3, "ismir2021": ISMIR2021, "tiny": TINY, "small": SMALL}
