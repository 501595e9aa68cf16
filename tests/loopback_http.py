"""Servers on loopback that misbehave on demand: HTTP over a folder, with or without ranges, and a proxy that cuts what goes through it."""

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class FolderServer(ThreadingHTTPServer):
    """Serves ``folder``; what it does wrong are its attributes."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_address[1]}"
        self.ranges, self.cuts, self.cut_after, self.wait_s = True, 0, 0, 0.0
        """Answer ranges; so many answers end after so many bytes; wait before each piece."""
        self.sent: dict[str, int] = {}
        self.pages: dict[str, bytes] = {}
        """Paths that answer something else."""


class _Handler(BaseHTTPRequestHandler):
    server: FolderServer

    def do_GET(self) -> None:
        path = unquote(self.path).lstrip("/")
        file = self.server.folder / path
        if path not in self.server.pages and not file.is_file():
            return self.send_error(404)
        content = self.server.pages.get(path) or file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and self.server.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = len(content)
        if self.server.cuts and len(content) - start > self.server.cut_after:
            self.server.cuts -= 1
            end = start + self.server.cut_after
        for begin in range(start, end, 2**16):
            piece = content[begin : min(begin + 2**16, end)]
            time.sleep(self.server.wait_s)
            self.server.sent[path] = self.server.sent.get(path, 0) + len(piece)
            try:
                self.wfile.write(piece)
            except ConnectionError:  # the client was stopped
                return

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def folder_server(folder: Path) -> Iterator[FolderServer]:
    """For as long as a block runs."""
    with FolderServer(folder) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


class CuttingProxy:
    """Passes bytes on to a port of loopback, until ``budget`` of them have come back; from then on it resets every connection."""

    def __init__(self, port: int) -> None:
        self.port, self.budget, self.passed = port, float("inf"), 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listening.accept()
            if self.passed >= self.budget:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self.port))
            for source, sink, counted in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pass_on, args=(source, sink, counted), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while (piece := source.recv(2**14)) and (not counted or self.passed < self.budget):
                self.passed += len(piece) * counted
                sink.sendall(piece)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
                end.close()
