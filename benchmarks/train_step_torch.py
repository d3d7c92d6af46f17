"""The networks of this project in plain PyTorch, and the time of their training step.

Run by `benchmarks.train_step`, in an environment that needs torch and numpy alone. REFERENCE is the
file it writes: network, weights, tables, a batch, and what Keras makes of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mt3_keras.codec import Codec
from mt3_keras.models.config import ENCODER_HEADS, HEADS, LOWEST_PITCH, NUM_PITCHES, ModelConfig

EMPTY, BACKWARDS = -4.0, -30.0  # logits of pitches off the piano, of shifts back in time
COURSE_STEP = 3
HARMONICS = (0.5, 1, 2, 3, 4, 5, 6, 7)
BATCH_NORM_EPSILON = 1e-3


class Network(torch.nn.Module):
    """As `MT3Backbone`, without dropout; parameters are named and shaped as its variables."""

    def __init__(self, config: ModelConfig, arrays: dict[str, Any], tables: dict[str, Any]) -> None:
        super().__init__()
        self.config, self.net = config, config.network
        self.w = {path: torch.tensor(array) for path, array in arrays.items()}
        for path, value in self.w.items():
            if value.ndim == 4:  # of a convolution
                value = value.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
            if "moving" not in path:
                value = torch.nn.Parameter(value)
                self.register_parameter(path, value)
            self.w[path] = value
        self.tables = {name: torch.tensor(array) for name, array in tables.items()}
        codec = Codec(config.vocabulary.num_velocity_bins)
        self.ranges = {
            kind: codec.token_range(kind)
            for kind in ("shift", "pitch", "velocity", "tie", "program", "drum")
        }

    def forward(self, samples: Any, num_frames: Any, tokens: Any) -> dict[str, Any]:
        with torch.autocast(samples.device.type, enabled=False):
            frames = self._log_mel(samples, num_frames)
            if self.config.spectrogram.front_end == "harmonic":
                frames = self._harmonics(samples)
        stem = None
        if frames.ndim == 4:
            frames, stem = self._stem(frames)
        encoded = self._encode(frames)
        outputs: dict[str, Any] = {}
        if self.net.heads:
            encoded, outputs = self._heads(encoded, stem)
        return {**outputs, "logits": self._decode(tokens, encoded, outputs)}

    # --- Front end ---

    def _magnitudes(self, samples: Any, length: int) -> Any:
        window = torch.hann_window(length, device=samples.device)
        frames = samples.unfold(1, length, self.config.spectrogram.hop_samples)
        return torch.fft.rfft(frames * window).abs()

    def _log_mel(self, samples: Any, num_frames: Any) -> Any:
        if "mel" not in self.tables:
            return None
        mel = self._magnitudes(samples, self.config.spectrogram.window_samples)
        mel = mel @ self.tables["mel"]
        log_mel = torch.log(torch.where(mel <= 0, 1e-5, mel))
        is_real = torch.arange(log_mel.shape[1], device=mel.device) < num_frames[:, None]
        return torch.where(is_real[:, :, None], log_mel, 0.0)

    def _harmonics(self, samples: Any) -> Any:
        config = self.config.spectrogram
        spectra = []
        for i, length in enumerate((config.window_samples, config.short_window_samples)):
            inset = (config.window_samples - length) // 2
            inner = samples[:, inset : samples.shape[1] - inset]
            spectra.append(self._magnitudes(inner, length) / (length / 4) @ self.tables[f"log_{i}"])
        width = config.bins_per_octave // 12
        first = [round(config.bins_per_octave * np.log2(h)) - width // 2 for h in HARMONICS]
        bins = np.array(first)[:, None] + np.arange(width)
        bins = (bins + np.arange(NUM_PITCHES)[:, None, None] * width).reshape(NUM_PITCHES, -1)
        num_bins = spectra[0].shape[-1]
        clipped = torch.tensor(np.where((bins >= 0) & (bins < num_bins), bins, num_bins))
        logs = [functional.pad(torch.log1p(s), (0, 1))[..., clipped] for s in spectra]
        return torch.cat(logs, dim=-1)

    def _stem(self, x_BTNC: Any) -> tuple[Any, Any]:
        """Features for the encoder; for the heads what the last convolution is given, and gives."""
        x = x_BTNC.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        for i in range(2):
            x = self._norm_maps(f"stem/norm_{i}", self._convolve(f"stem/convolution_{i}", x))
        for i in range(self.net.stem_blocks):
            path = f"stem/block_{i}"
            inner = self._convolve(f"{path}/inner", x, step=2**i)
            x = x + self._convolve(
                f"{path}/outer", self._norm_maps(f"{path}/norm", inner), bare=True
            )
        last = self._convolve("stem/convolution_2", x, stride=self.net.frames_per_position)
        last, x = (part.permute(0, 2, 3, 1) for part in (self._norm_maps("stem/norm_2", last), x))
        return last.flatten(2), (x, last, x_BTNC)

    def _convolve(
        self, path: str, x: Any, *, stride: int = 1, step: int = 1, bare: bool = False
    ) -> Any:
        # As TensorFlow's "same": what is odd of the padding goes to the end.
        total = 2 * step + 1 - stride if stride < 3 else 0
        x = functional.pad(x, (1, 1, total // 2, total - total // 2))
        kernel, bias = (self.w[f"{path}/{name}"] for name in ("kernel", "bias"))
        x = functional.conv2d(x, kernel, bias, (stride, 1), dilation=(step, 1))
        return x if bare else functional.relu(x)

    def _norm_maps(self, path: str, x: Any) -> Any:
        names = ("moving_mean", "moving_variance", "gamma", "beta")
        norm = [self.w[f"{path}/{name}"] for name in names]
        return functional.batch_norm(x, *norm, self.training, momentum=0.01, eps=BATCH_NORM_EPSILON)

    # --- Blocks ---

    def _norm(self, path: str, x: Any) -> Any:
        return functional.rms_norm(x, x.shape[-1:], self.w[f"{path}/scale"], 1e-6)

    def _attend(
        self, path: str, x: Any, memory: Any, bias: Any = None, causal: bool = False
    ) -> Any:
        def heads(part: str, source: Any) -> Any:
            projected = source @ self.w[f"{path}/{part}/kernel"]
            return projected.unflatten(-1, (self.net.num_heads, -1)).transpose(1, 2)

        q, k, v = heads("query", x), heads("key", memory), heads("value", memory)
        bias = None if bias is None else bias.to(q.dtype)
        attended = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=causal, scale=1.0
        )
        return attended.transpose(1, 2).flatten(2) @ self.w[f"{path}/out/kernel"]

    def _mlp(self, path: str, x: Any) -> Any:
        gate = functional.gelu(x @ self.w[f"{path}/wi_0/kernel"], approximate="tanh")
        return gate * (x @ self.w[f"{path}/wi_1/kernel"]) @ self.w[f"{path}/wo/kernel"]

    def _encode(self, frames: Any) -> Any:
        frames = frames.reshape(len(frames), self.net.num_positions, -1)
        x = frames @ self.w["encoder/projection/kernel"] + self.tables["encoder_positions"]
        for i in range(self.net.num_encoder_layers):
            path = f"encoder/layer_{i}"
            normed = self._norm(f"{path}/attention_norm", x)
            x = x + self._attend(f"{path}/attention", normed, normed)
            x = x + self._mlp(f"{path}/mlp", self._norm(f"{path}/mlp_norm", x))
        return self._norm("encoder/norm", x)

    def _heads(self, encoded: Any, stem: Any) -> tuple[Any, dict[str, Any]]:
        rolls = encoded @ self.w["heads/rolls/kernel"] + self.w["heads/rolls/bias"]
        rolls = rolls.reshape(len(rolls), self.net.segment_frames, -1)
        hidden = (encoded @ self.w["heads/class/context/kernel"])[:, :, None]
        hidden = hidden + self.w["heads/class/register"]
        if stem is not None:
            timbre, last, harmonics = stem
            stem_rolls = (timbre @ self.w["stem/rolls/kernel"]).transpose(2, 3).flatten(2)
            num_pitched = stem_rolls.shape[-1]
            pitched = rolls[..., :num_pitched] + stem_rolls
            pitched = pitched + self._mix_pitches(timbre, pitched)
            rolls = torch.cat([pitched, rolls[..., num_pitched:]], -1)
            hidden = hidden + last @ self.w["heads/class/timbre/kernel"]
            hidden = hidden + self._tell_spectrum(harmonics)
        classes = self._tell_classes(functional.relu(hidden)).flatten(2)
        classes = classes.repeat_interleave(self.net.frames_per_position, 1)
        if self.net.head_feedback:
            found = torch.sigmoid(rolls[..., : -HEADS["strength"]])
            found = found.reshape(len(rolls), self.net.num_positions, -1)
            encoded = encoded + found @ self.w["heads/feedback/kernel"]
        parts = (*rolls.split(list(ENCODER_HEADS.values()), dim=-1), classes)
        return encoded, {f"{head}_logits": p for head, p in zip(HEADS, parts, strict=True)}

    def _tell_spectrum(self, harmonics: Any) -> Any:
        path = "heads/class/spectrum_hidden"
        spectra = harmonics.unflatten(1, (-1, self.net.frames_per_position)).mean(2)
        spectra = spectra - spectra.mean(-1, keepdim=True)
        spectra = functional.relu(spectra @ self.w[f"{path}/kernel"] + self.w[f"{path}/bias"])
        return spectra @ self.w["heads/class/spectrum/kernel"]

    def _tell_classes(self, hidden: Any) -> Any:
        def w(name: str) -> Any:
            return self.w[f"heads/class/{name}"]

        kernel = w("course/kernel")
        reach = COURSE_STEP * (kernel.shape[2] // 2)
        course = functional.conv2d(
            hidden.permute(0, 3, 1, 2),
            kernel,
            w("course/bias"),
            padding=(reach, 0),
            dilation=(COURSE_STEP, 1),
        )
        course = functional.relu(course).permute(0, 2, 3, 1)
        return torch.cat([hidden, course], -1) @ w("logits/kernel") + w("logits/bias")

    def _mix_pitches(self, timbre: Any, logits: Any) -> Any:
        def w(name: str) -> Any:
            return self.w[f"heads/mixer/{name}"]

        found = torch.sigmoid(logits).unflatten(-1, (3, NUM_PITCHES)).transpose(2, 3)
        x = functional.relu(timbre @ w("timbre/kernel") + found @ w("found/kernel"))
        pitch = torch.arange(NUM_PITCHES, device=x.device)
        kernel = w("intervals")[:, pitch[:, None] - pitch + NUM_PITCHES - 1]
        mixed = torch.einsum("bfnc,cnm->bfmc", x, kernel)
        hidden = torch.cat([x, mixed], -1) @ w("hidden/kernel") + w("hidden/bias")
        added = functional.relu(hidden) @ w("logits/kernel") + w("logits/bias")
        return added.transpose(2, 3).flatten(2)

    # --- Decoder ---

    def _follow(self, tokens: Any) -> dict[str, Any]:
        """What the tokens so far imply [B, L]."""

        def values(kind: str) -> tuple[Any, Any]:
            first, last = self.ranges[kind]
            return (tokens >= first) & (tokens <= last), tokens - first

        def latest(kind: str, default: int) -> Any:
            is_kind, value = values(kind)
            places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
            place = torch.where(is_kind, places, 0).cummax(1).values
            return torch.where(place > 0, value.gather(1, (place - 1).clamp(min=0)), default)

        is_shift, steps = values("shift")
        total = torch.where(is_shift, steps, 0).cumsum(1)
        begins = is_shift & ~functional.pad(is_shift, (1, 0))[:, :-1]
        before = torch.where(begins, total - steps, 0).cummax(1).values
        vocabulary = self.config.vocabulary
        return {
            "time": total - before,
            "program": latest("program", -1 if vocabulary.granularity != "flat" else 0),
            "velocity": latest("velocity", -1),
            "section": (values("tie")[0].cumsum(1) > 0).long() if vocabulary.ties else None,
        }

    def _decode(self, tokens: Any, encoded: Any, rolls: dict[str, Any]) -> Any:
        x = self.w["decoder/embedding/embeddings"][tokens]
        x = x + self.tables["decoder_positions"][: tokens.shape[1]]
        uses_state = self.net.state_inputs or self.net.time_bias or self.net.pointer
        state = self._follow(tokens) if uses_state else {}
        if uses_state and state["section"] is None:
            state["section"] = torch.ones_like(tokens)
        if self.net.state_inputs:
            x = x + self._embed_state(state)
        place = None
        if self.net.time_bias:
            place = self.tables["places"][state["time"].clamp(max=len(self.tables["places"]) - 1)]
            x = x + encoded[torch.arange(len(x), device=x.device)[:, None], place]
        for i in range(self.net.num_decoder_layers):
            path = f"decoder/layer_{i}"
            normed = self._norm(f"{path}/self_norm", x)
            x = x + self._attend(f"{path}/self_attention", normed, normed, causal=True)
            bias = None if place is None else self._time_bias(path, place)
            normed = self._norm(f"{path}/cross_norm", x)
            x = x + self._attend(f"{path}/cross_attention", normed, encoded, bias)
            x = x + self._mlp(f"{path}/mlp", self._norm(f"{path}/mlp_norm", x))
        x = self._norm("decoder/norm", x)
        logits = x @ self.w["decoder/logits/kernel"]
        if self.net.pointer:
            logits = logits + self._point(x, tokens, state, encoded, rolls)
        return logits

    def _embed_state(self, state: dict[str, Any]) -> Any:
        tables = {n: self.w[f"decoder/state_inputs/{n}/embeddings"] for n in state}
        return (
            tables["time"][state["time"].clamp(max=len(tables["time"]) - 1)]
            + tables["program"][state["program"] + 1]
            + tables["velocity"][state["velocity"].clamp(-1, 1) + 1]
            + tables["section"][state["section"]]
        )

    def _time_bias(self, path: str, place_BL: Any) -> Any:
        positions = torch.arange(self.net.num_positions, device=place_BL.device)
        distances = positions[None, :] - positions[:, None] + self.net.num_positions - 1
        bias_HPT = self.w[f"{path}/time_bias/bias"][:, distances]
        return bias_HPT[:, place_BL].transpose(0, 1)

    def _point(
        self, x: Any, tokens: Any, state: dict[str, Any], encoded: Any, rolls: dict[str, Any]
    ) -> Any:
        def nearby(head: str) -> Any:
            roll = functional.max_pool1d(
                rolls[f"{head}_logits"].transpose(1, 2), 3, stride=1, padding=1
            ).transpose(1, 2)
            beyond = 128 - LOWEST_PITCH - NUM_PITCHES
            is_pitch = roll.shape[-1] == NUM_PITCHES
            return functional.pad(roll, (LOWEST_PITCH, beyond), value=EMPTY) if is_pitch else roll

        gains = x @ self.w["decoder/pointer/gains/kernel"] + self.w["decoder/pointer/gains/bias"]
        time = state["time"]
        frame = self.tables["frames"][time.clamp(max=len(self.tables["frames"]) - 1)]
        row = torch.arange(len(x), device=x.device)[:, None]
        onset, offset, drum, program = (
            nearby(head)[row, frame] for head in ("onset", "offset", "drum", "program")
        )
        is_on = (state["velocity"] > 0)[..., None]
        pitch = torch.where(is_on, gains[..., :1] * onset, gains[..., 1:2] * offset)
        ties = gains[..., 2:3] * nearby("frame")[:, :1]
        pitch = torch.where((state["section"] == 0)[..., None], ties, pitch)
        events = encoded @ self.w["decoder/pointer/shifts/kernel"]
        events = events + self.w["decoder/pointer/shifts/bias"]
        events = events.reshape(len(x), 2 * self.net.segment_frames, -1)[:, self.tables["steps"]]
        loudest = [rolls[f"{head}_logits"].amax(-1) for head in ("onset", "offset", "drum")]
        curves = torch.stack(loudest, dim=-1) @ self.w["decoder/pointer/curves/kernel"]
        curves = curves + self.w["decoder/pointer/curves/bias"]
        events = events + curves[:, self.tables["frames"]]
        quiet = functional.softplus(events).sum(-1)
        past = quiet.cumsum(1)
        following = torch.log((1 - torch.exp(-quiet)).clamp(min=1e-6)) - (past - quiet)
        shift = gains[..., 5:] @ torch.cat([events, following[..., None]], -1).transpose(1, 2)
        now = time.clamp(max=past.shape[1] - 1)
        shift = shift + gains[..., -1:] * past.gather(1, now)[..., None]
        steps = torch.arange(shift.shape[-1], device=x.device)
        shift = torch.where(steps <= time[..., None], BACKWARDS, shift)
        logits = shift.new_zeros(*x.shape[:2], self.net.vocabulary_rows)
        values = torch.arange(128, device=x.device)
        parts = {
            "shift": shift,
            "pitch": pitch,
            "drum": gains[..., 3:4] * drum,
            "program": gains[..., 4:5] * program,
        }
        for kind, part in parts.items():
            first = self.ranges[kind][0]
            if kind in ("pitch", "drum") and self.net.ordered:
                last = tokens[..., None] - first
                part = torch.where((values <= last) & (last < 128), BACKWARDS, part)
            logits[..., first : first + part.shape[-1]] = part.to(logits.dtype)
        return logits


def loss_of(outputs: dict[str, Any], batch: dict[str, Any], settings: dict[str, Any]) -> Any:
    """Token cross-entropy with z-loss, and the heads' binary cross-entropy."""
    logits, targets = outputs["logits"].float(), batch["targets"]
    is_token = targets != 0
    log_z = torch.logsumexp(logits, dim=-1)
    right = logits.gather(-1, targets[..., None])[..., 0]
    loss = (log_z - right + settings["z_loss"] * log_z**2)[is_token].sum() / is_token.sum()
    for head in settings["heads"]:
        targets = batch[head["name"]].float()
        loss = loss + head["weight"] * functional.binary_cross_entropy_with_logits(
            outputs[f"{head['name']}_logits"].float()[targets >= 0],
            targets[targets >= 0] / head["largest_target"],
            pos_weight=torch.tensor(head["positive_weight"]),
        )
    return loss


def matmul_speed(dtype: torch.dtype, device: str, size: int = 2048) -> float:
    """Floating-point operations per second of a large matrix product."""
    matrix = torch.randn(size, size, device=device, dtype=dtype) / size**0.5
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        (matrix @ matrix).sum().item()
        seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / min(seconds))


def measure(path: str, steps: int, dtype: str, device: str) -> dict[str, float]:
    """Compares with the reference, then times `steps` updates by Adam."""
    with np.load(path, allow_pickle=False) as file:
        parts: dict[str, dict[str, Any]] = {"weights": {}, "tables": {}, "batch": {}, "known": {}}
        for name in file.files:
            part, _, key = name.partition(":")
            parts[part][key] = file[name]
    known = parts["known"]
    config = ModelConfig.from_dict(json.loads(str(known["config"])))
    settings = json.loads(str(known["settings"]))
    torch.set_default_device(device)
    batch = {
        name: torch.tensor(array.astype(np.int64) if array.dtype.kind == "i" else array)
        for name, array in parts["batch"].items()
    }
    inputs = [batch[name] for name in ("samples", "num_frames", "decoder_tokens")]
    network = Network(config, parts["weights"], parts["tables"])
    expected = known["logits"]
    with torch.no_grad():
        logits = network.eval()(*inputs)["logits"].cpu().numpy()
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), settings["learning_rate"], eps=1e-7)
    is_mixed = dtype == "mixed_bfloat16"
    seconds, losses = [], []
    for _ in range(steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=is_mixed):
            outputs = network(*inputs)
        loss = loss_of(outputs, batch, settings)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), settings["clip_norm"])
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return {
        "difference": float((np.abs(logits - expected) / (1 + np.abs(expected))).max()),
        "loss": losses[0],
        "first step": seconds[0],
        "step": statistics.median(seconds[1:]),
        "peak": matmul_speed(torch.bfloat16 if is_mixed else torch.float32, device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(json.dumps(measure(arguments.reference, arguments.steps, arguments.dtype, device)))


if __name__ == "__main__":
    main()
