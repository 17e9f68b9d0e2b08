"""An HTTP server of byte ranges on loopback, in a process of its own: its CPU time is not the reader's."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

_RANGE = re.compile(r"bytes=(\d+)-(\d+)\Z")
START_TIMEOUT_S = 60


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, *args: object) -> None:
        self._folder = folder
        super().__init__(*args)  # type: ignore[arg-type]  # request, address and server

    def do_GET(self) -> None:
        path = self._folder / self.path.lstrip("/")
        if not path.is_file() or ".." in path.parts:
            self.send_error(404)
            return
        size = path.stat().st_size
        wanted = _RANGE.match(self.headers.get("Range", ""))
        first, last = (int(wanted[1]), min(int(wanted[2]), size - 1)) if wanted else (0, size - 1)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.flush()
        with open(path, "rb") as file:
            while first <= last:
                first += os.sendfile(self.connection.fileno(), file.fileno(), first, last + 1 - first)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _serve(folder: Path, ready: Connection) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, folder)) as server:
        server.daemon_threads = True
        ready.send(server.server_port)
        server.serve_forever()


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder and yield its URL; the process ends with the block.

    Raises:
        TimeoutError: it does not start.
    """
    context = multiprocessing.get_context("spawn")
    ready, child_end = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(folder, child_end), daemon=True)
    process.start()
    try:
        if not ready.poll(START_TIMEOUT_S):
            raise TimeoutError(f"no server after {START_TIMEOUT_S} s")
        yield f"http://127.0.0.1:{ready.recv()}"
    finally:
        process.terminate()
        process.join()
