"""Opens the web page, which transcribes in the browser.

`make web` builds the folder. Only this machine can reach the page, and it needs no network: the
recordings stay in the browser. Ctrl-C ends it.
"""

from __future__ import annotations

import functools
import http.server
import os
import pathlib
import sys
import webbrowser
from typing import Any

from absl import flags

from mt3_keras.cli.command_line import Command, Flags, UsageError
from mt3_keras.process import Terminated

HOST = "127.0.0.1"


class PageServer(http.server.ThreadingHTTPServer):
    """Serves a folder on this machine alone.

    Args:
      folder: of the page.
      port: 0 picks a free one, `server_port` says which.

    Raises:
      OSError: the port is in use.
    """

    daemon_threads = True
    allow_reuse_address = sys.platform != "win32"  # there, it would share the port with others

    def __init__(self, folder: pathlib.Path, port: int) -> None:
        handler = functools.partial(_Handler, directory=os.fspath(folder))
        super().__init__((HOST, port), handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of browsers that leave while they are answered, as they do."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """What to type into a browser."""
        return f"http://{HOST}:{self.server_port}/"


class _Handler(http.server.SimpleHTTPRequestHandler):
    # Not asked of the operating system, whose tables may lack or mistake them.
    extensions_map = {  # noqa: RUF012
        "": "application/octet-stream",
        ".css": "text/css",
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript",
        ".json": "application/json",
        ".md": "text/plain; charset=utf-8",
        ".svg": "image/svg+xml",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")  # a page that was built anew is shown anew
        super().end_headers()

    def list_directory(self, path: Any) -> None:  # noqa: ARG002 - of the class above
        self.send_error(http.HTTPStatus.NOT_FOUND)

    def log_message(self, *_: Any) -> None:
        """Says nothing: who asked for what is nobody's concern."""


def _define_flags(add: Flags) -> None:
    add.text("folder", "build/web", "Folder of the page.")
    add.count("port", 8017, "Port on this machine; 0 picks a free one.", least=0, most=65535)
    add.switch("browser", True, "Open the page in the browser.")


def _serve(values: flags.FlagValues, _: list[str]) -> int:
    folder = pathlib.Path(values.folder)
    if not (folder / "index.html").is_file() or not (folder / "model/model.json").is_file():
        raise UsageError(f"{folder}: holds no page; build it with make web, or name its --folder")
    try:
        server = PageServer(folder, values.port)
    except OSError as error:
        raise UsageError(
            f"port {values.port} cannot be used ({error.strerror}): choose another --port, or 0"
        ) from error
    with server:
        print(f"{server.address} shows the page until Ctrl-C", flush=True)
        if values.browser and _has_screen():
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except Terminated:
            raise
        except KeyboardInterrupt:
            print()
    return 0


def _has_screen() -> bool:
    """Whether a browser would have a window; one for terminals would take this one's place."""
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


COMMAND = Command("[FLAGS]", __doc__, _define_flags, _serve)
