"""A range server on the loopback, with the faults that real ones have, which counts what it sends."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer(ThreadingHTTPServer):
    """Serves the files of `folder`. `faults` are used up one by one, by the requests whose path holds their words:

    `status N` answers so; `short N` sends N bytes of the body and hangs up; `stall N` sends N bytes and then nothing;
    `changed` answers with another ETag; `whole` ignores the range.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: list[tuple[str, str]] = []  # (words in the path, fault)
        self.always: dict[str, str] = {}  # fault of every request whose path holds these words
        self.sent: Counter[str] = Counter()  # bytes of bodies, by path
        self.requests: list[tuple[str, int, int]] = []  # path, first byte, byte after the last
        self.released = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault_of(self, path: str) -> tuple[str, int]:
        with self.lock:
            due = [entry for entry in self.faults if entry[0] in path]
            if due:
                self.faults.remove(due[0])
            fault = next((fault for words, fault in [*due, *self.always.items()] if words in path), "")
        name, _, size = fault.partition(" ")
        return name, int(size or 0)


@contextmanager
def serving(folder: Path) -> Iterator[RangeServer]:
    server = RangeServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms for an acknowledgement
    server: RangeServer

    def do_GET(self) -> None:
        fault, number = self.server.fault_of(self.path)
        path = self.server.folder / self.path.lstrip("/").partition("?")[0]
        if fault == "status" or not path.is_file():
            self.send_error(number or 404)
            return
        data = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        etag = hashlib.sha256(data).hexdigest()[:16] + ("-new" if fault == "changed" else "")
        if found is None or fault == "whole":
            begin, end = 0, len(data)
            self.send_response(200)
        elif not data:
            self.send_response(416)
            self.send_header("Content-Range", "bytes */0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        else:
            begin, end = int(found[1]), min(int(found[2]) + 1, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        body = data[begin:end]
        if fault in ("short", "stall"):
            body = body[:number]
        with self.server.lock:  # before the client gets the answer
            self.server.sent[self.path] += len(body)
            self.server.requests.append((self.path, begin, begin + len(body)))
        self.send_header("Content-Length", str(end - begin))
        self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        self.wfile.write(body)
        if fault == "stall":
            self.wfile.flush()
            self.server.released.wait(30)
        if fault in ("short", "stall"):
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass
