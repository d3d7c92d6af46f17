"""A model server for tests and benchmarks: TF Serving's two interfaces over `tf.saved_model.load`.

    python -I tests/serving_stand_in.py --model_base_path=OUT/saved_model/mt3 --model_name=mt3

Prints its two ports as JSON and serves until its standard input ends. It imports nothing of this
project. It stands in for the server on the wire only: scheduling, batching and loading are not its.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import http.server
import json
import os
import pathlib
import re
import sys
import threading

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

NO_LIMIT = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
CODES = {
    "NOT_FOUND": (grpc.StatusCode.NOT_FOUND, 404),
    "INVALID_ARGUMENT": (grpc.StatusCode.INVALID_ARGUMENT, 400),
    "UNAVAILABLE": (grpc.StatusCode.UNAVAILABLE, 503),
}


class RefusedError(Exception):
    """A request that gets an error for an answer: one of `CODES`, and why."""


class Model:
    """The newest version of a model; `num_threads` requests at work, `num_waiting` in line."""

    def __init__(self, folder: pathlib.Path, name: str, num_threads: int, num_waiting: int) -> None:
        self.version = max(int(f.name) for f in folder.iterdir() if f.name.isdecimal())
        self.name = name
        self.signatures = tf.saved_model.load(str(folder / str(self.version))).signatures
        self._admitted = threading.Semaphore(num_threads + num_waiting)
        self._threads = threading.Semaphore(num_threads)

    def check(self, name: str, version: int | None) -> None:
        if name != self.name or version not in (None, self.version):
            raise RefusedError("NOT_FOUND", f"Servable not found for request: {name}")

    def predict(self, signature: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        function = self.signatures.get(signature or "serving_default")
        if function is None:
            raise RefusedError("INVALID_ARGUMENT", f"Serving signature name: {signature} not found")
        specs = function.structured_input_signature[1]
        if specs.keys() != arrays.keys():
            raise RefusedError("INVALID_ARGUMENT", f"input keys must be {sorted(specs)}")
        for name, spec in specs.items():
            if arrays[name].dtype != spec.dtype.as_numpy_dtype:
                raise RefusedError("INVALID_ARGUMENT", f"{name} must be {spec.dtype.name}")
        if not self._admitted.acquire(blocking=False):
            raise RefusedError("UNAVAILABLE", "The batch scheduling queue is full")
        try:
            with self._threads:
                found = function(**{name: tf.constant(array) for name, array in arrays.items()})
            return {name: tensor.numpy() for name, tensor in found.items()}
        except (tf.errors.OpError, ValueError, TypeError) as error:
            raise RefusedError("INVALID_ARGUMENT", str(error)) from error
        finally:
            self._admitted.release()


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, model: Model) -> None:
        self._model = model

    def Predict(self, request, context):  # noqa: N802 - the service's own name
        spec = request.model_spec
        try:
            self._model.check(spec.name, spec.version.value if spec.HasField("version") else None)
            try:
                arrays = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
            except (ValueError, TypeError) as error:
                raise RefusedError("INVALID_ARGUMENT", f"not a tensor: {error}") from error
            found = self._model.predict(spec.signature_name, arrays)
        except RefusedError as refused:
            code, reason = refused.args
            context.abort(CODES[code][0], reason)
        answer = predict_pb2.PredictResponse()
        answer.model_spec.name = spec.name
        answer.model_spec.version.value = self._model.version
        for name, array in found.items():
            answer.outputs[name].CopyFrom(tf.make_tensor_proto(array))
        return answer


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, model: Model) -> None:
        self._model = model

    def GetModelStatus(self, request, context):  # noqa: N802 - the service's own name
        status = get_model_status_pb2.ModelVersionStatus(
            version=self._model.version, state=get_model_status_pb2.ModelVersionStatus.AVAILABLE
        )
        return get_model_status_pb2.GetModelStatusResponse(model_version_status=[status])


class Rest(http.server.BaseHTTPRequestHandler):
    model: Model
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            self._answer(200, self._predict(body))
        except RefusedError as refused:
            code, reason = refused.args
            self._answer(CODES[code][1], {"error": reason})

    def _predict(self, body: bytes) -> dict:
        path = re.fullmatch(r"/v1/models/([^/:]+)(?:/versions/(\d+))?:predict", self.path)
        if not path:
            raise RefusedError("NOT_FOUND", "Malformed request: POST " + self.path)
        self.model.check(path[1], int(path[2]) if path[2] else None)
        try:
            request = json.loads(body)
            signature = request.get("signature_name", "serving_default")
            by_row = "instances" in request
            inputs = request["instances" if by_row else "inputs"]
            specs = self.model.signatures[signature].structured_input_signature[1]
            if by_row:
                inputs = {name: [row[name] for row in inputs] for name in specs}
            arrays = {
                name: np.array(decode_bytes(values), specs[name].dtype.as_numpy_dtype)
                for name, values in inputs.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RefusedError("INVALID_ARGUMENT", f"JSON Parse error: {error!r}") from error
        found = {n: to_json(a) for n, a in self.model.predict(signature, arrays).items()}
        if not by_row:
            return {"outputs": found}
        rows = zip(*found.values(), strict=True)
        return {"predictions": [dict(zip(found, row, strict=True)) for row in rows]}

    def _answer(self, code: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


def decode_bytes(values):
    """TF Serving's JSON: {"b64": text} stands for bytes."""
    if isinstance(values, list):
        return [decode_bytes(value) for value in values]
    if isinstance(values, dict):
        return base64.b64decode(values["b64"], validate=True)
    return values


def to_json(array):
    """As TF Serving writes numbers: no more digits of a float32 than it has."""
    return (array.astype(str).astype(float) if array.dtype == np.float32 else array).tolist()


class RestServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_base_path", type=pathlib.Path, required=True)
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--num_batch_threads", type=int, default=2)
    parser.add_argument("--max_enqueued_batches", type=int, default=256)
    arguments = parser.parse_args()
    model = Model(
        arguments.model_base_path,
        arguments.model_name,
        arguments.num_batch_threads,
        arguments.max_enqueued_batches,
    )
    pool = concurrent.futures.ThreadPoolExecutor(512)
    server = grpc.server(pool, options=NO_LIMIT)
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        PredictionService(model), server
    )
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(model), server)
    grpc_port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    rest = RestServer(("127.0.0.1", 0), type("Bound", (Rest,), {"model": model}))
    threading.Thread(target=rest.serve_forever, daemon=True).start()
    print(json.dumps({"grpc": grpc_port, "rest": rest.server_port}), flush=True)
    sys.stdin.read()
    server.stop(None)


if __name__ == "__main__":
    main()
