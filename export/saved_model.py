"""MT3Backbone -> SavedModel, warm-up requests and settings for TF Serving."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
from typing import Any

import keras
import tensorflow as tf

from export.served_model import ServedDetector, ServedModel
from mt3_keras.extras import require
from mt3_keras.files import replacing

Served = ServedModel | ServedDetector


def export_saved_model(
    served: Served,
    folder: pathlib.Path,
    *,
    name: str,
    exact: bool = False,
) -> pathlib.Path:
    """Writes a model as TF Serving's next version of it, which appears whole or not at all.

        FOLDER/NAME/VERSION/    saved_model.pb, variables, warm-up requests in assets.extra, and
                                config.json: the `ModelConfig` and how segments are cut and searched
        FOLDER/                 models.config, of all models there; files of server settings

    Signatures are those of `served.endpoints()`, "serving_default" the whole way from "audio" to
    tokens or notes, "serving_bytes" the same from WAV files; all tensors are named and all batches
    open.

    Args:
      served: the model and its search.
      folder: may hold other models and versions already.
      name: of the model, for the server: letters, digits, "_", "." and "-".
      exact: whether the notes are to be read as the original reads them (`Transcriber.exact`).

    Returns:
      The version's folder.

    Raises:
      ValueError: the name cannot be one, or packages are missing.
      OSError: the folder cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ValueError(f"name must be letters, digits, '_', '.' and '-': got {name!r}")
    if keras.backend.backend() != "tensorflow":
        raise ValueError("a SavedModel is written by TensorFlow: unset KERAS_BACKEND")
    versions = folder / name
    made = [path for path in (versions, folder) if not path.exists()]
    versions.mkdir(parents=True, exist_ok=True)
    version = max(_versions(versions), default=0) + 1
    partial = versions / f".{version}.part"  # no number, so the server does not look at it
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_graphs(served, partial)
        write_warmup(served, name, partial / "assets.extra" / "tf_serving_warmup_requests")
        description = _describe(served, name, exact)
        (partial / "config.json").write_text(json.dumps(description, indent=2) + "\n")
        if served.decoding is not None:
            (partial / "decoding.json").write_text(served.decoding.to_json())
        partial.rename(versions / str(version))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for path in made:
            path.rmdir()
        raise
    write_server_settings(folder)
    return versions / str(version)


def _versions(folder: pathlib.Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if re.fullmatch(r"[0-9]+", path.name)]


def _write_graphs(served: Served, folder: pathlib.Path) -> None:
    archive = keras.export.ExportArchive()
    for name, (function, inputs) in served.endpoints().items():
        archive.add_endpoint(name, function, inputs)
    archive.write_out(str(folder), verbose=False)


def _describe(served: Served, name: str, exact: bool) -> dict[str, Any]:
    """`config.json`: as in a preset folder, and what a client has to know besides."""
    rules = dataclasses.asdict(served.rules)
    if rules["programs"] is not None:
        rules["programs"] = sorted(rules["programs"])
    serving = {"name": name, "context": served.context, "exact": exact, "rules": rules}
    serving |= {"max_tokens": served.max_tokens, "batch_size": served.batch_size}
    serving["signatures"] = served.client_signatures._asdict()
    return {
        "class_name": served.config.class_name,
        "config": served.config.to_dict(),
        "serving": serving,
    }


def write_warmup(served: Served, name: str, path: pathlib.Path) -> None:
    """Writes a request for each signature, which the server runs before it says it is ready.

    Raises:
      MissingPackageError: `tensorflow-serving-api` is not installed.
    """
    require("tensorflow_serving")
    from tensorflow_serving.apis import prediction_log_pb2

    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature, inputs in served.example_inputs().items():
            log = prediction_log_pb2.PredictionLog()
            request = log.predict_log.request
            request.model_spec.name = name
            request.model_spec.signature_name = signature
            for key, value in inputs.items():
                request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
            writer.write(log.SerializeToString())


def write_server_settings(folder: pathlib.Path) -> None:
    """Writes `models.config` for all models in a folder, and `SETTINGS` where there are none.

    Paths in it are those of a container that has the folder as /models.
    """
    models = sorted(path.parent.parent.name for path in folder.glob("*/[0-9]*/saved_model.pb"))
    entries = "".join(
        f'  config {{ name: "{name}" base_path: "/models/{name}" model_platform: "tensorflow" }}\n'
        for name in dict.fromkeys(models)
    )
    with replacing(folder / "models.config") as temporary:
        temporary.write_text(f"model_config_list {{\n{entries}}}\n")
    for name, text in SETTINGS.items():
        if not (folder / name).exists():  # they are the owner's to change
            with replacing(folder / name) as temporary:
                temporary.write_text(text)


SETTINGS = {
    "monitoring.config": """\
prometheus_config { enable: true path: "/monitoring/prometheus/metrics" }
""",
    "batching_parameters.txt": """\
# CPU. A queue and no more: the segments of a request are a batch already, and recordings of
# different lengths cannot be joined without changing the outputs. With it the number of requests
# at work, and so the memory, stays bounded; what does not fit the queue is answered UNAVAILABLE,
# which clients try again. Requests of several recordings ([B, n], B > 1) need a larger
# max_batch_size.
max_batch_size { value: 1 }
batch_timeout_micros { value: 0 }
num_batch_threads { value: 2 }  # half the cores: each request uses several
max_enqueued_batches { value: 256 }
""",
    "batching_parameters_gpu.txt": """\
# GPU. Requests of equal length, as the client of this project makes of long files, run as one.
# Shorter ones beside them are lengthened with their own first sample: their answer then has more
# segments than they have audio for (leave them), and the last one may differ. Export with
# --batch_size=128 or so.
max_batch_size { value: 8 }
batch_timeout_micros { value: 5000 }
num_batch_threads { value: 2 }
max_enqueued_batches { value: 64 }
pad_variable_length_inputs: true
""",
}
