"""Optional packages: which extra of the package brings them, and whether Keras can run.

`pip install .` installs what `small` needs on LiteRT. Everything else is optional; a missing
package is reported in one line with the command that installs it, before any work.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import sys
from typing import Any

# Extra of pyproject.toml -> the names under which its packages are imported.
PACKAGES = {
    "keras": ("keras", "keras_hub", "tensorflow", "h5py", "msgpack", "litert_quantizer"),
    "archives": ("apache_beam", "dask", "distributed", "pyarrow"),
    "spark": ("pandas", "pyarrow", "pyspark"),
    "train": (
        *("array_record", "grain", "pedalboard", "pyroomacoustics", "scipy"),
        *("tensorboardX", "yaml"),
    ),
    "serving": ("grpc", "tensorflow_serving"),
    "score": ("verovio", "cairosvg", "pypdf"),
}
# Packages that need an environment of their own -> the requirements file that makes it.
APART = {"tensorflow_io": "requirements-tfio.txt"}
BACKENDS = ("tensorflow", "jax")  # of Keras, that this project runs on


class MissingPackageError(ValueError):
    """An optional package is missing; one line that says how to install it."""


def require(*packages: str) -> None:
    """Checks that optional packages are installed, without importing them.

    Args:
      *packages: names as in an import statement, all of them in `PACKAGES` or `APART`.

    Raises:
      MissingPackageError: one of them is missing.
    """
    for package in packages:
        if not _is_installed(package):
            raise _missing(package)


def explain_import_error(error: ImportError) -> MissingPackageError | None:
    """The error to show for a failed import; None if it is not of an optional package."""
    package = (error.name or "").partition(".")[0]
    is_optional = package in APART or any(package in found for found in PACKAGES.values())
    return _missing(package) if is_optional and not _is_installed(package) else None


def require_keras() -> None:
    """Checks that Keras and the backend that it would choose are installed.

    Raises:
      MissingPackageError: Keras, KerasHub or TensorFlow is missing.
      ValueError: a setting (KERAS_BACKEND, keras.json), perhaps another project's, asks for a
        backend that cannot run here.
    """
    require("keras", "keras_hub")
    backend, setting = _find_backend()
    if backend in BACKENDS and _is_installed(backend):
        return
    if setting is None:
        raise _missing("tensorflow")
    state = "is not installed" if backend in BACKENDS else "is not supported"
    raise ValueError(
        f"{setting} asks Keras for {backend}, which {state} here: "
        "set KERAS_BACKEND=tensorflow or KERAS_BACKEND=jax"
    )


def can_run_keras() -> bool:
    """Whether `require_keras` finds nothing to complain of."""
    try:
        require_keras()
    except ValueError:
        return False
    return True


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _missing(package: str) -> MissingPackageError:
    if file := APART.get(package):
        cure = f"pip install -r {file}, in an environment of its own"
        return MissingPackageError(f"the package {package} is missing: {cure}")
    extra = next(extra for extra, packages in PACKAGES.items() if package in packages)
    return MissingPackageError(
        f"the package {package} is missing: pip install 'mt3-keras[{extra}]'"
    )


def _find_backend() -> tuple[str, str | None]:
    """The backend that Keras would choose, and the setting that says so (None: the default)."""
    if loaded := sys.modules.get("keras"):
        return loaded.config.backend(), "this process"
    if backend := os.environ.get("KERAS_BACKEND"):
        return backend, f"KERAS_BACKEND={backend}"
    path = pathlib.Path(os.environ.get("KERAS_HOME") or pathlib.Path("~/.keras").expanduser())
    path /= "keras.json"
    try:
        settings: Any = json.loads(path.read_text())
        backend = settings.get("backend")
    except (OSError, ValueError, AttributeError):  # no such file, or one that Keras ignores
        backend = None
    return (backend, str(path)) if backend else (BACKENDS[0], None)
