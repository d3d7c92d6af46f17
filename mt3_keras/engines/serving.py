"""Networks on a model server: recordings there in requests, tokens or candidates back, notes here.

A long recording goes in several requests, cut where segments meet and each with the sound around
it, so that the outputs are those of the whole. Runs without Keras; REST without TensorFlow too.
"""

from __future__ import annotations

import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import http.client
import json
import math
import os
import pathlib
import random
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mt3_keras.files import open_regular
from mt3_keras.grammar import Rules
from mt3_keras.models.config import BodyConfig, DetectorConfig, ModelConfig, config_from_dict
from mt3_keras.note_rolls import RollDecoding
from mt3_keras.outputs import Output, RollOutput, join_sequences
from mt3_keras.quiet import quiet_stderr
from mt3_keras.recording import Recording, Transcription, make_decoder
from mt3_keras.wav import fits_wav, to_wav

Samples = NDArray[np.float32]
Answer = TypeVar("Answer")

LONGEST_PAUSE = 20.0  # seconds between two attempts
# Of an answer in JSON. A detector's takes about 4 characters for each of the 40,000 numbers of a
# segment of 65,536 samples, and spaces between them. Tokens take less.
_BYTES_A_SAMPLE, _MARGIN_BYTES = 64, 2**22
_MOST_BYTES = 2**28  # of an answer by gRPC, and numbers of a tensor


class ServingError(ValueError):
    """A server that gives no answer; one line that names it and the cure."""


class Unavailable(Exception):  # noqa: N818 - a state of the server, not a fault
    """No answer this time; worth another attempt."""


class Server(Protocol):
    """A way to reach a served model."""

    def predict(self, samples: Samples, seconds: float) -> list[Output]:
        """Samples [n] -> the outputs of their segments, in order.

        Raises:
          Unavailable: no answer within `seconds`, or the server is too busy or not there yet.
          ServingError: the server refuses.
        """


class Signatures(NamedTuple):
    """Names under which a served model gives the outputs of segments.

    Attributes:
      audio: of samples.
      audio_bytes: of WAV files; None where it takes none.
    """

    audio: str = "serving_default"
    audio_bytes: str | None = None


@dataclasses.dataclass(frozen=True)
class ServedConfig:
    """What a client must know of a served model.

    Attributes:
      model: its sizes and vocabulary.
      name: on the server.
      context, exact, rules: how its segments are cut and its outputs are read (see `Transcriber`).
      decoding: how a detector's rolls are read.
      signatures: that a client asks; None: of samples alone.
    """

    model: ModelConfig
    name: str
    context: str
    exact: bool = False
    rules: Rules | None = None
    decoding: RollDecoding | None = None
    signatures: Signatures | None = None

    @classmethod
    def read(cls, path: pathlib.Path) -> ServedConfig:
        """Reads `config.json`: itself, or of a version's folder, or of a model's newest version.

        Raises:
          ValueError: there is none, or it is not of a served model.
        """
        if path.is_dir() and not (path / "config.json").exists():
            versions = [folder for folder in path.iterdir() if folder.name.isdecimal()]
            path = max(versions, key=lambda folder: int(folder.name), default=path)
        file = path / "config.json" if path.is_dir() else path
        with open_regular(file, ServingError) as opened:
            text = opened.read(_MARGIN_BYTES)
        try:
            stored = json.loads(text)
            model, serving = config_from_dict(stored), stored["serving"]
            if model.tracks_in:
                raise ValueError("it is of a network of separated tracks, which no recording has")
            programs = serving["rules"]["programs"]
            rules = Rules(
                programs=None if programs is None else frozenset(programs),
                drums=serving["rules"]["drums"],
            )
            name, context, exact = serving["name"], serving["context"], serving["exact"]
            decoding = RollDecoding.read(file.parent)
            signatures = Signatures(**serving.get("signatures", {}))
            return cls(model, name, context, exact, rules, decoding, signatures)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file}: not written by export.main ({error}); see --help") from error


class Request(NamedTuple):
    """Part of a recording: the answer's segments from `skip` on, `num_segments` of them, count."""

    samples: Samples
    skip: int
    num_segments: int


def cut_requests(
    blocks: Iterable[NDArray[np.floating]],
    config: ModelConfig,
    context: str,
    num_segments: int,
) -> Iterator[Request]:
    """Cuts 16 kHz mono into requests of at most `num_segments` segments that count.

    Each also holds the sound that windows reach to beyond its segments, by which the server sees
    further segments; their outputs are discarded.
    """
    step = config.segment_samples
    overhang, lead = config.overhang_samples, config.lead_samples
    if context == "segment":
        overhang = lead = 0
    num_before = -(-lead // step)  # whole steps, so that segments begin where they do
    held, num_held, skip = [np.zeros(0, np.float32)], 0, 0
    for block in blocks:
        held.append(block.astype(np.float32, copy=False))
        num_held += block.size
        while num_held >= (length := (skip + num_segments) * step + overhang):
            joined = np.concatenate(held)
            yield Request(joined[:length], skip, num_segments)
            num_used = max(0, skip + num_segments - num_before)  # whole steps
            skip += num_segments - num_used
            held, num_held = [joined[num_used * step :]], num_held - num_used * step
    num_seen = num_held // step + 1
    yield Request(np.concatenate(held), skip, num_seen - skip)


class GrpcServer:
    """A model by gRPC, as TF Serving speaks it at port 8500.

    Args:
      address: HOST:PORT.
      model: its name on the server.
      signatures: that are asked: of WAV files, where there is one and 16 bits hold the samples.

    Raises:
      ServingError: packages are missing.
    """

    def __init__(self, address: str, model: str, signatures: Signatures | None = None) -> None:
        try:
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
            with quiet_stderr():  # importing TensorFlow's messages starts TensorFlow
                import grpc
                import tensorflow as tf
                from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
        except ImportError as error:
            raise ServingError(
                f"gRPC needs more packages ({error}): pip install 'mt3-keras[serving]', or give "
                "the server's http address"
            ) from error
        self._grpc, self._tf, self._request = grpc, tf, predict_pb2.PredictRequest
        self._address, self._model = address, model
        self._signatures = signatures or Signatures()
        limits = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", _MOST_BYTES),
        ]
        channel = grpc.insecure_channel(address, options=limits)
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

    def predict(self, samples: Samples, seconds: float) -> list[Output]:
        """See `Server`."""
        request = self._request()
        request.model_spec.name = self._model
        if self._signatures.audio_bytes and fits_wav(samples):
            request.model_spec.signature_name = self._signatures.audio_bytes
            contents = self._tf.make_tensor_proto([to_wav(samples)])
            request.inputs["audio_bytes"].CopyFrom(contents)
        else:
            request.model_spec.signature_name = self._signatures.audio
            request.inputs["audio"].CopyFrom(self._tf.make_tensor_proto(samples[None]))
        try:
            answer = self._stub.Predict(request, timeout=seconds)
        except self._grpc.RpcError as error:
            code, reason = error.code(), f"{error.code().name}: {error.details()}"
            codes = self._grpc.StatusCode
            if code in (codes.UNAVAILABLE, codes.DEADLINE_EXCEEDED, codes.RESOURCE_EXHAUSTED):
                raise Unavailable(reason) from error
            raise ServingError(_refusal(self._address, reason)) from error
        with _reading(self._address):
            tensors = dict(answer.outputs)
            for tensor in tensors.values():  # a small message may declare a large one
                if math.prod(axis.size for axis in tensor.tensor_shape.dim) > _MOST_BYTES:
                    raise ValueError("declares too large a tensor")
            found = {name: self._tf.make_ndarray(tensor) for name, tensor in tensors.items()}
            if "tokens" in found:
                found["tokens"] = found["tokens"].tolist()
            return _to_outputs(found)


class RestServer:
    """A model by REST, as TF Serving speaks it at port 8501; redirects are not followed.

    Args:
      address: http://HOST:PORT.
      model: its name on the server.
      signatures: as of `GrpcServer`.

    Raises:
      ServingError: the address is none.
    """

    def __init__(self, address: str, model: str, signatures: Signatures | None = None) -> None:
        self._address, self._signatures = address, signatures or Signatures()
        try:
            self._parts = urllib.parse.urlsplit(address)
            connect = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
            self._connect = functools.partial(
                connect[self._parts.scheme], self._parts.hostname or "", self._parts.port
            )
        except (ValueError, KeyError) as error:
            raise ServingError(
                f"{address}: is no address ({error}); give http://HOST:PORT as --server"
            ) from error
        self._path = urllib.parse.quote(
            f"{self._parts.path.rstrip('/')}/v1/models/{model}:predict", safe="/:%"
        )

    def predict(self, samples: Samples, seconds: float) -> list[Output]:
        """See `Server`."""
        signature = self._signatures.audio
        if self._signatures.audio_bytes and fits_wav(samples):
            signature = self._signatures.audio_bytes
            content = base64.b64encode(to_wav(samples)).decode()
            inputs = f'"audio_bytes":[{{"b64":"{content}"}}]'
        else:
            numbers = ",".join([f"{x:.9g}" for x in samples.tolist()])  # they tell float32 apart
            inputs = f'"audio":[[{numbers}]]'
        body = f'{{"signature_name":"{signature}","inputs":{{{inputs}}}}}'
        try:
            status, text = self._post(
                body.encode(), seconds, _MARGIN_BYTES + _BYTES_A_SAMPLE * samples.size
            )
        except (OSError, ValueError, http.client.HTTPException) as error:  # refused, timed out
            raise Unavailable(str(error) or type(error).__name__) from error
        if status in (429, 502, 503, 504):
            raise Unavailable(f"HTTP {status}: {_read_reason(text)}")
        if status != 200:
            raise ServingError(_refusal(self._address, f"HTTP {status}: {_read_reason(text)}"))
        with _reading(self._address):
            return _to_outputs(json.loads(text)["outputs"])

    def _post(self, body: bytes, seconds: float, most_bytes: int) -> tuple[int, bytes]:
        """Sends a request; the status and text of its answer, all within `seconds`."""
        end = time.monotonic() + seconds
        with contextlib.closing(self._connect(timeout=seconds)) as connection:
            connection.connect()
            # A read's time limit starts anew with each byte that drips in.
            timer = threading.Timer(end - time.monotonic(), _shut, [connection.sock])
            timer.daemon = True
            timer.start()
            try:
                headers = {"Content-Type": "application/json"}
                connection.request("POST", self._path, body, headers)
                with connection.getresponse() as answer:
                    return answer.status, self._read(answer, most_bytes)
            finally:
                timer.cancel()
                if time.monotonic() >= end:
                    raise TimeoutError("timed out")

    def _read(self, answer: http.client.HTTPResponse, most_bytes: int) -> bytes:
        text = bytearray()
        while part := answer.read(2**16):
            text += part
            if len(text) > most_bytes:
                raise ServingError(
                    f"{self._address}: its answer is longer than that of a transcription model;"
                    " check --server and --name"
                )
        if answer.length:  # cut short; read(n) does not mind
            raise http.client.IncompleteRead(bytes(text), answer.length)
        return bytes(text)


def _shut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed meanwhile
        connected.shutdown(socket.SHUT_RDWR)


def _read_reason(text: bytes) -> str:
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return text[:4096].decode(errors="replace")


def _refusal(address: str, reason: str) -> str:
    line = " ".join(reason.split())[:300]
    return f"{address}: the server refuses ({line}); check --name, --config and its version"


@contextlib.contextmanager
def _reading(address: str) -> Iterator[None]:
    try:
        yield
    except (
        *(LookupError, ValueError, OverflowError, TypeError, AttributeError),
        *(RecursionError, MemoryError),
    ) as error:
        reason = " ".join(repr(error).split())[:300]
        raise ServingError(
            f"{address}: answers, but not as a transcription model ({reason}); check --server"
            " and --name"
        ) from error


def _to_outputs(found: Mapping[str, Any]) -> list[Output]:
    """The outputs of the segments of the only recording of a request."""
    if "onsets" in found:
        arrays = [_to_floats(name, found[name][0]) for name in RollOutput._fields]
        return [RollOutput(*parts) for parts in zip(*arrays, strict=True)]
    segments = [
        row if row and type(row[0]) is list else [row]  # of several decoders, or of one
        for row in found["tokens"][0]
    ]
    if not all(type(token) is int for rows in segments for row in rows for token in row):
        raise TypeError("tokens must be integers")
    return [join_sequences(rows) for rows in segments]


_SHAPES = BodyConfig().output_shapes  # of which the last axis is every detector's


def _to_floats(name: str, segments: Any) -> NDArray[np.float32]:
    """A detector's output of all segments; probabilities come as whole numbers up to 255."""
    values = np.asarray(segments, np.float32)
    if values.ndim != 3 or values.shape[2] != _SHAPES[name][1] or not np.isfinite(values).all():
        raise ValueError(f"{name} of shape {values.shape}")
    return values / np.float32(255) if name in ("programs", "ended") else values


def call_patiently(
    call: Callable[[float], Answer],
    address: str,
    *,
    deadline: float,
    retries: int,
    pause: float = 0.5,
) -> Answer:
    """Calls call(deadline) until it answers, with pauses in between.

    They double, and vary, so that many clients do not return at once.

    Args:
      call: raises `Unavailable` where another attempt is worth while.
      address: of the server, as an error names it.
      deadline: seconds for each attempt.
      retries: attempts after the first.
      pause: seconds before the second attempt, about.

    Raises:
      ServingError: no attempt was answered.
    """
    for attempt in range(retries + 1):
        try:
            return call(deadline)
        except Unavailable as error:
            reason = " ".join(str(error).split())[:300]
        if attempt < retries:
            time.sleep(min(LONGEST_PAUSE, pause * 2**attempt) * random.uniform(0.5, 1.0))
    raise ServingError(
        f"{address}: no answer in {retries + 1} attempts of {deadline:g} s ({reason});"
        " is the server running and ready? A longer --deadline gives it more time"
    )


def transcribe(
    blocks: Iterable[NDArray[np.floating]],
    config: ServedConfig,
    predict: Callable[[Samples], list[Output]],
    *,
    num_segments: int = 15,
    parallel: int = 2,
) -> Transcription:
    """Transcribes 16 kHz mono of any length on a server, in bounded memory.

    Args:
      blocks: float [n], any lengths.
      config: of the served model.
      predict: see `Server.predict`.
      num_segments: segments of a request; one or two more go with it for the sound at its ends.
      parallel: requests under way at once.

    Raises:
      ServingError: the server gives no answer, or one for other audio.
    """
    model = config.model
    rate = model.spectrogram.frames_per_second
    num_samples = 0

    def count(blocks: Iterable[Any]) -> Iterator[Any]:
        nonlocal num_samples
        for block in blocks:
            num_samples += block.size
            yield block

    decoder = make_decoder(model, config.decoding, exact=config.exact, rules=config.rules)
    recording = Recording(decoder, model.network.segment_frames, rate)
    requests = cut_requests(count(blocks), model, config.context, num_segments)
    is_detector = isinstance(model, DetectorConfig)
    for index, output in enumerate(_answers(requests, predict, parallel)):
        if isinstance(output, RollOutput) != is_detector:
            raise ServingError("the server serves another model; give the --config of its own")
        collections.deque(recording.add(index, output), maxlen=0)
    duration = (num_samples // model.spectrogram.hop_samples + 1) / rate
    collections.deque(recording.end(duration), maxlen=0)
    return recording.finish(duration)


def _answers(
    requests: Iterable[Request], predict: Callable[[Samples], list[Output]], parallel: int
) -> Iterator[Output]:
    """Outputs of the segments in order; `parallel` requests are drawn and sent ahead."""
    waiting: collections.deque[tuple[Request, concurrent.futures.Future[list[Output]]]]
    waiting = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        try:
            for request in requests:
                if len(waiting) == parallel:
                    yield from _take(*waiting.popleft())
                waiting.append((request, pool.submit(predict, request.samples)))
            while waiting:
                yield from _take(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _take(request: Request, answer: concurrent.futures.Future[list[Output]]) -> list[Output]:
    outputs = answer.result()[request.skip : request.skip + request.num_segments]
    if len(outputs) != request.num_segments:
        raise ServingError(
            f"the server cuts segments of another length: wanted {request.num_segments}, got"
            f" {len(outputs)}; give the --config of the model it serves"
        )
    return outputs
