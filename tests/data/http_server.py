"""A real HTTP server on loopback that serves a folder with byte ranges, and misbehaves when told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Behaviour:
    """What the server does to the next requests for ranges; whole files are always served well."""

    drop: int = 0
    """Connections that are closed without an answer."""
    truncate: int = 0
    """Answers that end in their middle."""
    refuse: list[int] = field(default_factory=list)
    """Status codes of the next answers."""
    stall_s: float = 0.0
    """Seconds before each answer."""
    ignore_ranges: bool = False
    """Send whole files."""
    requests: list[str] = field(default_factory=list)
    """Path and range of each request."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        how, wanted = self.server.behaviour, self.headers.get("Range")
        with self.server.lock:
            how.requests.append(f"{self.path} {wanted}")
            status = how.refuse.pop(0) if wanted and how.refuse else 200
            drop, truncate = bool(wanted and how.drop), bool(wanted and not how.drop and how.truncate)
            how.drop -= drop
            how.truncate -= truncate
        if wanted:
            time.sleep(how.stall_s)
        if drop:
            self.close_connection = True
            return
        path = self.server.folder / self.path.lstrip("/")
        if status != 200 or not path.is_file():
            self.send_error(status if status != 200 else 404)
            return
        data = path.read_bytes()
        if wanted and not how.ignore_ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            if int(first) >= len(data):
                self.send_error(416)
                return
            data, status = data[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if truncate else data)
        self.close_connection = truncate

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    folder: Path
    behaviour: Behaviour
    lock: threading.Lock


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, Behaviour]]:
    """Serve ``folder``; yields its URL and the switches."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.folder, server.behaviour, server.lock = folder, Behaviour(), threading.Lock()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.behaviour
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
