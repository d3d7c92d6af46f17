"""Frozen descriptions of a model: its spectrogram, its vocabulary, its network.

They are stored beside the weights (`config.json`) so that weights describe themselves. A field's
name is the flag's name is the JSON key. The defaults are those of the paper's MT3.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

SAMPLE_RATE_HZ = 16_000


@dataclasses.dataclass(frozen=True)
class SpectrogramConfig:
    """Log-mel front end (MT3 paper, section 3.2).

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
        for name in ("hop_samples", "window_samples", "num_mels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive: got {getattr(self, name)}")

    @property
    def frames_per_second(self) -> float:
        return SAMPLE_RATE_HZ / self.hop_samples

    @property
    def overhang_samples(self) -> int:
        """Samples that the last frame's window reaches past the end of its own hop."""
        return max(0, self.window_samples - self.hop_samples)


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
    """Sizes of the T5 encoder-decoder.

    Attributes:
      vocabulary_rows: rows of the token embedding, the vocabulary padded to a multiple of 128.
      segment_frames: spectrogram frames the encoder sees at once.
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
        for field in dataclasses.fields(self):
            if field.name != "dropout" and getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be positive: got {getattr(self, field.name)}")
        if self.width % 2:
            raise ValueError(f"width must be even, half sines and half cosines: got {self.width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1): got {self.dropout}")


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
        parts = {}
        for field in dataclasses.fields(cls):
            part = type(field.default)
            given = values.get(field.name, {})
            known = {f.name for f in dataclasses.fields(part)}
            if unknown := sorted(set(given) - known):
                raise ValueError(f"unknown {field.name} settings: {', '.join(unknown)}")
            parts[field.name] = part(**given)
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
CONFIGS = {"mt3": MT3, "ismir2021": ISMIR2021, "tiny": TINY}
