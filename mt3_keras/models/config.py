"""Frozen descriptions of the networks: everything that their weights depend on.

One is stored beside the weights (`config.json`), so that weights describe themselves. A field's
name is the flag's name is the JSON key. The defaults are those of the paper's MT3 and of `small`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar, Self

from mt3_keras.tracks import Tracks

SAMPLE_RATE_HZ = 16_000
STEPS_PER_SECOND = 100  # the grid of the shift tokens

LOWEST_PITCH, NUM_PITCHES = 21, 88  # the piano's keys
LOWEST_DRUM, NUM_DRUMS = 35, 47  # the drum keys of General MIDI, 35 to 81
NUM_CLASSES = 16  # of General MIDI, eight programs each
# What the detector predicts for each pitch, and for each drum key and all of them (see `detector`).
PITCH_HEADS = ("onset", "unison", "offset", "frame", "strength")
HEADS = {
    **dict.fromkeys(PITCH_HEADS, NUM_PITCHES),
    "drum": NUM_DRUMS,
    "drum_strength": 1,
}
PROGRAMS_PER_CLASS = 8


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} must be positive: got {getattr(config, name)}")


def _check_sizes(config: Any) -> None:
    """Sizes are positive, a width is even and the dropout a rate."""
    sizes = [field.name for field in dataclasses.fields(config) if type(field.default) is int]
    _require_positive(config, *sizes)
    if getattr(config, "width", 0) % 2:
        raise ValueError(f"width must be even, half sines and half cosines: got {config.width}")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout must be in [0, 1): got {config.dropout}")


@dataclasses.dataclass(frozen=True)
class LogMelConfig:
    """The log-mel spectrum of the MT3 paper (section 3.2).

    Attributes:
      hop_samples: distance between frames.
      window_samples: length of the periodic Hann window and of the Fourier transform.
      num_mels: number of mel bands.
      fmin_hz: lower edge of the lowest band.
      fmax_hz: upper edge of the highest band. The original never sets it and gets its spectral
        library's default of 7600 Hz; 8000 Hz ruins the released weights.
      log_floor: "zero" replaces only magnitudes of exactly zero by 1e-5 before the logarithm (the
        original's code since 2022); "clamp" raises everything below 1e-5 to 1e-5 (the code at the
        time the released weights were trained).
    """

    hop_samples: int = 128
    window_samples: int = 2048
    num_mels: int = 512
    fmin_hz: float = 20.0
    fmax_hz: float = 7600.0
    log_floor: str = "zero"

    def __post_init__(self) -> None:
        if self.log_floor not in ("zero", "clamp"):
            raise ValueError(f"log_floor must be 'zero' or 'clamp': got {self.log_floor!r}")
        if not 0 <= self.fmin_hz < self.fmax_hz <= SAMPLE_RATE_HZ / 2:
            raise ValueError(
                f"need 0 <= fmin_hz < fmax_hz <= 8000: got {self.fmin_hz} and {self.fmax_hz}"
            )
        _require_positive(self, "hop_samples", "window_samples", "num_mels")

    @property
    def frames_per_second(self) -> float:
        return SAMPLE_RATE_HZ / self.hop_samples

    @property
    def lead_samples(self) -> int:
        """Samples that the first frame's window reaches back before its own hop: none."""
        return 0

    @property
    def overhang_samples(self) -> int:
        """Samples that the last frame's window reaches past the end of its own hop."""
        return max(0, self.window_samples - self.hop_samples)


@dataclasses.dataclass(frozen=True)
class HarmonicConfig:
    """Two log-frequency spectra with the harmonics of each pitch side by side.

    Attributes:
      hop_samples: distance between frames; windows are centred on their hop.
      window_samples: length of the window that resolves pitch.
      short_window_samples: length of the window that resolves time.
      bins_per_octave: from A0 up; a multiple of 12.
      fmax_hz: upper edge of the highest bin.
      harmonics: multiples of a pitch's frequency that are its channels.
      floor: amplitude, full scale 1, below which a partial counts for little. At 1e-4 what rooms,
        hum and codecs leave between the partials counts too.
    """

    hop_samples: int = 256
    window_samples: int = 4096
    short_window_samples: int = 1024
    bins_per_octave: int = 36
    fmax_hz: float = 7600.0
    harmonics: tuple[float, ...] = (0.5, 1, 2, 3, 4, 5, 6, 7)
    floor: float = 4e-4

    def __post_init__(self) -> None:
        object.__setattr__(self, "harmonics", tuple(self.harmonics))  # a list in JSON
        if not 0 < self.fmax_hz <= SAMPLE_RATE_HZ / 2:
            raise ValueError(f"need 0 < fmax_hz <= 8000: got {self.fmax_hz}")
        if self.bins_per_octave < 12 or self.bins_per_octave % 12:
            raise ValueError(
                f"bins_per_octave must be a multiple of 12: got {self.bins_per_octave}"
            )
        _require_positive(self, "hop_samples", "floor")
        if not self.hop_samples <= self.short_window_samples <= self.window_samples:
            raise ValueError(
                "need hop_samples <= short_window_samples <= window_samples: got "
                f"{self.hop_samples}, {self.short_window_samples}, {self.window_samples}"
            )
        if not self.harmonics or min(self.harmonics) <= 0:
            raise ValueError(f"harmonics must be positive: got {self.harmonics}")

    @property
    def frames_per_second(self) -> float:
        return SAMPLE_RATE_HZ / self.hop_samples

    @property
    def lead_samples(self) -> int:
        """Samples that the first frame's window reaches back before its own hop."""
        return (self.window_samples - self.hop_samples) // 2

    @property
    def overhang_samples(self) -> int:
        """Samples that the last frame's window reaches past the end of its own hop."""
        return self.window_samples - self.hop_samples - self.lead_samples

    @property
    def num_channels(self) -> int:
        """Channels of a pitch: windows, harmonics and the bins of a semitone."""
        return 2 * len(self.harmonics) * (self.bins_per_octave // 12)


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
        _require_positive(self, "num_velocity_bins")
        if self.granularity not in ("full", "midi_class", "flat"):
            raise ValueError(
                f"granularity must be full, midi_class or flat: got {self.granularity!r}"
            )


class TokenNetworkConfig:
    """What the sizes of every network that emits tokens have in common."""

    vocabulary_rows: int
    max_tokens: int

    def token_limit(self, max_tokens: int | None) -> int:
        """The longest sequence a search may emit; `max_tokens` of None is the network's own.

        Raises:
          ValueError: the network has fewer positions.
        """
        if max_tokens is None:
            return self.max_tokens
        if not 1 <= max_tokens <= self.max_tokens:
            raise ValueError(f"max_tokens must be 1 to {self.max_tokens}: got {max_tokens}")
        return max_tokens


@dataclasses.dataclass(frozen=True)
class T5Config(TokenNetworkConfig):
    """Sizes of the T5 encoder-decoder.

    Attributes:
      vocabulary_rows: rows of the token embedding, the vocabulary padded to a multiple of 128.
      segment_frames: spectrogram frames that the encoder is given at once.
      max_tokens: longest token sequence of a segment, EOS included.
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

    def __post_init__(self) -> None:
        _check_sizes(self)


@dataclasses.dataclass(frozen=True)
class TracksOutNetworkConfig(T5Config):
    """Sizes of a T5 with a decoder for each group of instruments.

    Attributes:
      tracks: the groups, by names that `Tracks` knows.
      own_decoders: each group's decoder has weights of its own; else all share theirs.
    """

    tracks: tuple[str, ...] = ("drums", "bass", "keys", "guitar", "other")
    own_decoders: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tracks", tuple(self.tracks))  # a list in JSON
        super().__post_init__()


@dataclasses.dataclass(frozen=True)
class TracksInNetworkConfig(T5Config):
    """Sizes of a T5 with an encoder for each track.

    Attributes:
      tracks: what they are, by names that `Tracks` knows.
      own_encoders: each track's encoder has weights of its own; else all share theirs.
    """

    tracks: tuple[str, ...] = ("drums", "bass", "vocals", "other")
    own_encoders: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tracks", tuple(self.tracks))  # a list in JSON
        super().__post_init__()
        Tracks(self.tracks)


@dataclasses.dataclass(frozen=True)
class RecurrentNetworkConfig(TokenNetworkConfig):
    """Sizes of the convolutional and recurrent encoder-decoder.

    Attributes:
      filters: of the first and of the second convolution over time.
      kernel_frames: that a convolution reaches over.
      pool_frames: of which the maximum is taken after each convolution; its square is a position.
      width: of positions and tokens, and units of the recurrent layers.
      num_encoder_layers: recurrent layers over time.
      causal: nothing of the encoder looks ahead; else its recurrent layers run both ways, with
        half of the units each.
      num_decoder_layers: recurrent layers over tokens, each followed by attention.
      num_heads, head_width: of the attention over the encoder's output.
      log_mel_mean, log_mel_deviation: of the spectrum, taken off before the first convolution.
      vocabulary_rows, segment_frames, max_tokens: as in `T5Config`.
    """

    filters: tuple[int, int] = (128, 64)
    kernel_frames: int = 3
    pool_frames: int = 2
    width: int = 512
    num_encoder_layers: int = 1
    causal: bool = False
    num_decoder_layers: int = 2
    num_heads: int = 8
    head_width: int = 64
    log_mel_mean: float = -5.0
    log_mel_deviation: float = 3.0
    vocabulary_rows: int = 1536
    segment_frames: int = 256
    max_tokens: int = 1024
    dropout: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "filters", tuple(self.filters))  # a list in JSON
        _check_sizes(self)
        if len(self.filters) != 2 or min(self.filters) <= 0:
            raise ValueError(f"filters must be two positive numbers: got {self.filters}")
        _require_positive(self, "log_mel_deviation")
        if self.segment_frames % self.pool_frames**2:
            raise ValueError(
                f"pool_frames, squared, must divide segment_frames ({self.segment_frames}): "
                f"got {self.pool_frames}"
            )

    @property
    def num_positions(self) -> int:
        """Length of the encoder's output."""
        return self.segment_frames // self.pool_frames**2


@dataclasses.dataclass(frozen=True)
class BodyConfig:
    """Sizes of the detector's layers and of what it sees at once.

    Attributes:
      spectrum_channels: that the harmonics of each pitch in each frame are reduced to.
      channels: of the convolutions.
      recurrent_width: units of the recurrent layer of each pitch, in each direction.
      directions: 2 to read time both ways, 1 to read it forwards alone.
      long_steps: steps that the longest convolution along time sees, half of them ahead.
      frames_per_step: frames that the first convolution joins; the rolls have all frames again.
      interval_channels: channels that are compared over all pitches.
      context_width: units of the recurrent layer of the whole frame, in each direction.
      frame_width: of what the whole frame is reduced to before that layer, once by way of the
        convolutions of the pitches and once directly.
      drum_width, drum_context_width: channels and units of the recurrent layer of `Drums`.
      look_width: channels of `SecondLook`.
      look_comparisons, look_heads: its layers that compare notes, and the heads of their attention.
      dropout: of its last hidden layer.
      segment_frames: whose notes are predicted at once.
      frames_before, frames_after: of the sound around them, in which notes may begin and end too.
      max_onsets, max_strokes: notes and drum strokes of a segment that are handed out, the
        likeliest ones.
    """

    spectrum_channels: int = 24
    channels: int = 32
    recurrent_width: int = 32
    directions: int = 2
    long_steps: int = 7
    frames_per_step: int = 2
    interval_channels: int = 16
    context_width: int = 96
    frame_width: int = 192
    drum_width: int = 192
    drum_context_width: int = 96
    look_width: int = 128
    look_comparisons: int = 3
    look_heads: int = 4
    dropout: float = 0.2
    segment_frames: int = 320
    frames_before: int = 48
    frames_after: int = 32
    max_onsets: int = 160
    max_strokes: int = 80

    def __post_init__(self) -> None:
        _check_sizes(self)
        for name in ("segment_frames", "frames_before", "frames_after"):
            if getattr(self, name) % self.frames_per_step:
                raise ValueError(
                    f"frames_per_step must divide {name}: got {self.frames_per_step} and"
                    f" {getattr(self, name)}"
                )
        if self.look_width % self.look_heads:
            raise ValueError(
                f"look_heads must divide look_width: got {self.look_heads} and {self.look_width}"
            )

    @property
    def window_frames(self) -> int:
        """Of a segment and those around it."""
        return self.frames_before + self.segment_frames + self.frames_after

    @property
    def num_features(self) -> int:
        """Of each pitch at each step, from which its notes are predicted."""
        return self.directions * self.recurrent_width + self.channels

    @property
    def output_shapes(self) -> dict[str, tuple[int, int]]:
        """Of what `NoteDetector.detect` gives of a segment, by name (see `outputs.RollOutput`)."""
        return {
            "onsets": (self.max_onsets, 5),
            "programs": (self.max_onsets, 128),
            "strokes": (self.max_strokes, 4),
            "ended": (self.segment_frames, NUM_PITCHES),
        }


class ModelConfig:
    """What the code around a network asks of its description, whichever network it is.

    `NETWORKS` are all there are. Each has a `spectrogram` and a `network`.
    """

    class_name: ClassVar[str]  # of the Keras class, in config.json
    spectrogram: Any
    network: Any

    @property
    def segment_samples(self) -> int:
        """Length of a segment."""
        samples: int = self.network.segment_frames * self.spectrogram.hop_samples
        return samples

    @property
    def window_frames(self) -> int:
        """Of a segment and those around it of which the network is given the sound."""
        frames: int = self.network.segment_frames
        return frames

    @property
    def lead_samples(self) -> int:
        """Samples before a segment that the network is given with it."""
        samples: int = self.spectrogram.lead_samples
        return samples

    @property
    def overhang_samples(self) -> int:
        """Samples after a segment that the network is given with it."""
        samples: int = self.spectrogram.overhang_samples
        return samples

    @property
    def input_samples(self) -> int:
        """Samples the network is given for a segment: from `lead_samples` before its start on."""
        return self.lead_samples + self.segment_samples + self.overhang_samples

    @property
    def tracks_in(self) -> tuple[str, ...]:
        """Names of the tracks that the network is given apart; none where it is given their mix."""
        return ()

    @property
    def samples_shape(self) -> tuple[int, ...]:
        """Of what the network is given for a segment: [input_samples] or [T, input_samples]."""
        return (*([len(self.tracks_in)] if self.tracks_in else []), self.input_samples)

    @property
    def segment_seconds(self) -> float:
        return self.segment_samples / SAMPLE_RATE_HZ

    @classmethod
    def from_parts(cls, **parts: Any) -> Self:
        """Of parts given as a dataclass, as a dict of its fields, or as None for the default."""

        def to_dict(part: Any) -> dict[str, Any]:
            return dataclasses.asdict(part) if dataclasses.is_dataclass(part) else dict(part or {})  # type: ignore[arg-type]

        return cls.from_dict({name: to_dict(part) for name, part in parts.items()})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`; missing keys take the default.

        Raises:
          ValueError: a key is not a field, or a value is out of range.
        """
        parts = {}
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            given: dict[str, Any] = values.get(field.name, {})
            part: Any = type(field.default)
            known = {inner.name for inner in dataclasses.fields(part)}
            if unknown := sorted(set(given) - known):
                raise ValueError(f"unknown {field.name} settings: {', '.join(unknown)}")
            parts[field.name] = part(**given)
        return cls(**parts)


@dataclasses.dataclass(frozen=True)
class TokenConfig(ModelConfig):
    """Description of a network that emits tokens."""

    spectrogram: LogMelConfig = LogMelConfig()
    vocabulary: VocabularyConfig = VocabularyConfig()
    network: Any = None

    @property
    def tracks_out(self) -> Tracks | None:
        """The groups of instruments that have a decoder each; None of one decoder for all."""
        return None

    @property
    def num_decoders(self) -> int:
        """Sequences of tokens for each segment."""
        return len(self.tracks_out.tracks) if self.tracks_out else 1

    def decoder_of(self, program: int, is_drum: bool) -> int:
        """The number of the decoder that emits an instrument's notes."""
        return self.tracks_out.owner(program, is_drum) if self.tracks_out else 0

    @property
    def max_step(self) -> int:
        """Latest time of an event in a segment, in steps: its last frame's may round up."""
        return math.ceil(self.segment_seconds * STEPS_PER_SECOND)


@dataclasses.dataclass(frozen=True)
class MT3Config(TokenConfig):
    """Description of an `MT3Backbone`."""

    class_name: ClassVar[str] = "MT3Backbone"

    network: T5Config = T5Config()


@dataclasses.dataclass(frozen=True)
class RecurrentConfig(TokenConfig):
    """Description of a `RecurrentBackbone`."""

    class_name: ClassVar[str] = "RecurrentBackbone"

    network: RecurrentNetworkConfig = RecurrentNetworkConfig()


@dataclasses.dataclass(frozen=True)
class TracksInConfig(TokenConfig):
    """Description of a `TracksInBackbone`."""

    class_name: ClassVar[str] = "TracksInBackbone"

    network: TracksInNetworkConfig = TracksInNetworkConfig()

    @property
    def tracks_in(self) -> tuple[str, ...]:
        return self.network.tracks


@dataclasses.dataclass(frozen=True)
class TracksOutConfig(TokenConfig):
    """Description of a `TracksOutBackbone`."""

    class_name: ClassVar[str] = "TracksOutBackbone"

    network: TracksOutNetworkConfig = TracksOutNetworkConfig()

    def __post_init__(self) -> None:
        _ = self.tracks_out  # refuses tracks that do not share out all instruments

    @functools.cached_property
    def tracks_out(self) -> Tracks:
        return Tracks(self.network.tracks, self.vocabulary.granularity)


@dataclasses.dataclass(frozen=True)
class DetectorConfig(ModelConfig):
    """Description of a `NoteDetector`."""

    class_name: ClassVar[str] = "NoteDetector"

    spectrogram: HarmonicConfig = HarmonicConfig()
    network: BodyConfig = BodyConfig()

    @property
    def window_frames(self) -> int:
        return self.network.window_frames

    def for_streams(self) -> DetectorConfig:
        """The same network on the small segments of a stream, from which it follows its state.

        What lies before a segment then serves the convolutions alone.
        """
        frames = {"segment_frames": 10, "frames_before": 6, "frames_after": 6}
        network = dataclasses.replace(self.network, **frames, max_onsets=16, max_strokes=16)
        return dataclasses.replace(self, network=network)

    @property
    def lead_samples(self) -> int:
        frames = self.network.frames_before
        return frames * self.spectrogram.hop_samples + self.spectrogram.lead_samples

    @property
    def overhang_samples(self) -> int:
        frames = self.network.frames_after
        return frames * self.spectrogram.hop_samples + self.spectrogram.overhang_samples


NETWORKS: tuple[type[ModelConfig], ...] = (
    MT3Config,
    RecurrentConfig,
    TracksInConfig,
    TracksOutConfig,
    DetectorConfig,
)


def config_from_dict(stored: dict[str, Any]) -> ModelConfig:
    """The description in the content of a `config.json`, of whichever network.

    Args:
      stored: "config", its parts, and "class_name", the network's class (MT3Backbone if absent).

    Raises:
      ValueError: it describes no network of this package; one line.
    """
    kinds = {kind.class_name: kind for kind in NETWORKS}
    name = stored.get("class_name", MT3Config.class_name)
    if name not in kinds:
        raise ValueError(f"class_name must be {' or '.join(kinds)}: got {name!r}")
    kind = kinds[name]
    parts = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    try:
        return kind.from_dict({part: stored["config"][part] for part in parts})
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the description of a {name}: {error!r}") from error


MT3 = MT3Config()
ISMIR2021 = MT3Config(
    vocabulary=VocabularyConfig(num_velocity_bins=127, ties=False, granularity="flat"),
    network=T5Config(vocabulary_rows=1664, segment_frames=512),
)
RECURRENT = RecurrentConfig()
SMALL = DetectorConfig()
CONFIGS: dict[str, ModelConfig] = {
    "mt3": MT3,
    "ismir2021": ISMIR2021,
    "recurrent": RECURRENT,
    "small": SMALL,
}
