"""A real S3 server (moto's) behind a proxy that fails like a busy object store: 503 SlowDown, connections cut."""

from __future__ import annotations

import contextlib
import http.client
import logging
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ..patience import PATIENCE

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


class FaultyProxy(ThreadingHTTPServer):
    """Forwards to ``port``. ``faults``: probability of each kind of fault; ``seen``: how often it happened."""

    daemon_threads = True

    def __init__(self, port: int, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.random = port, random.Random(seed)
        self.faults: dict[str, float] = {}
        self.seen: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def draw(self) -> str:
        """The fate of a request."""
        at = self.random.random()
        for fault, probability in self.faults.items():
            at -= probability
            if at < 0:
                self.seen[fault] += 1
                return fault
        self.seen["forwarded"] += 1
        return "forwarded"

    def handle_error(self, request: object, client_address: object) -> None:
        """Cut connections are what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _serve(self) -> None:
        fate = self.server.draw()
        length = int(self.headers.get("Content-Length") or 0)
        if fate == "cut request":  # half of an upload arrives, and is never heard of again
            self.rfile.read(length // 2)
            return self._cut()
        body = self._body(length)
        if fate == "503":
            return self._answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=PATIENCE)
        headers = {
            name: value for name, value in self.headers.items() if name.lower() not in ("transfer-encoding", "expect")
        }
        connection.request(self.command, self.path, body=body, headers=headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        self._answer(answer.status, answer.getheaders(), data, cut=fate == "cut answer")
        return None

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _body(self, length: int) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(length)
        data = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        length = {name.lower(): value for name, value in headers}.get("content-length", str(len(data)))
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *arguments: object) -> None:
        """Silent."""


@contextlib.contextmanager
def faulty_store(seed: int = 0) -> Iterator[FaultyProxy]:
    """moto's server and the proxy before it, without faults at first."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    proxy = FaultyProxy(moto.get_host_and_port()[1], seed)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        moto.stop()
