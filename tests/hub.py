"""A hub on this machine: real HTTP and real parquet, and every fault that a network has."""

import gzip
import json
import os
import random
import socket
import ssl
import struct
import threading
import time
from contextlib import contextmanager, redirect_stderr
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness import downloads
from harness.processes import UNFIT


def parquet(texts, column="text"):
    """The bytes of a parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({column: texts}), sink, compression="none", row_group_size=200)
    return sink.getvalue().to_pybytes()


def texts(first, count):
    """Different short texts, numbered."""
    words = "the river a lamp on an old stone bridge morning under no one quick letters winter slow".split()
    return [f"{n}: " + " ".join(random.Random(n).choices(words, k=30)) for n in range(first, first + count)]


def refusal(work, *arguments):
    """The one line that `work` ends the program with."""
    with pytest.raises(SystemExit) as ended, redirect_stderr(StringIO()) as told:
        result = work(*arguments)
        list(result or ())
    line = told.getvalue().removesuffix("\n") if ended.value.code == UNFIT else ended.value.code
    assert line.startswith("error: ") and "\n" not in line and line.isprintable()
    return line


@pytest.fixture(name="hub")
def hub_of_a_test(cache, tmp_path_factory, monkeypatch):
    """A hub that HF_ENDPOINT names, no waiting between attempts, and no login of whoever runs the tests."""
    foreign = ("HF_", "NETRC", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith(foreign)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setattr(downloads, "BACK_OFF", 0.0)
    hub = Hub()
    with serving(hub) as hub.address:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        yield hub


def leftovers(folder):
    return [path.name for path in folder.rglob("*") if ".part" in path.name]


class Hub:
    """What the server holds and what it has seen.

    `files`: path -> bytes. `faults`: path -> list of faults, one for each request until there are no
    more; a fault is a function of the handler that answers in place of `send_file`, a status, or None.
    `seen`: (path, headers, status) of each request.
    """

    def __init__(self):
        self.files, self.faults, self.seen = {}, {}, []
        self.barrier = None  # where set, a request waits there, to show how many come together


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        hub = self.server.hub
        queue = hub.faults.get(self.path, [])
        fault = queue.pop(0) if queue else None
        if hub.barrier:
            hub.barrier.wait(5)
        if callable(fault):
            fault(self)
        elif fault or self.path not in hub.files:
            self.send(fault or 404, b"no")
        else:
            self.send_file(hub.files[self.path])

    def send(self, status, body, length=None, close=False, **headers):
        self.server.hub.seen.append((self.path, dict(self.headers), status))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        self.close_connection = self.close_connection or close

    def send_file(self, body, upto=None):
        """All of it; `upto` closes the connection after so many bytes."""
        self.send(200, body[:upto], len(body), upto is not None)

    def reset(self):
        """End the connection as a crash does, with no farewell."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        self.wfile = self.rfile = open("/dev/null", "rb+", buffering=0)  # what the base class still flushes


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # connections break on purpose here


@contextmanager
def serving(hub, certificate=None):
    """Run `hub` on a free port, behind TLS where a file with key and certificate is given; gives its address."""
    server = Server(("127.0.0.1", 0), Handler)
    server.hub = hub
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http{'s' if certificate else ''}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# --- faults: what a request meets in place of its file ---------------------------------------------


def body_of(handler):
    return handler.server.hub.files[handler.path]


def reset(handler):
    handler.server.hub.seen.append((handler.path, dict(handler.headers), None))
    handler.reset()


def cut(handler):
    """A third of the file, then the connection ends."""
    handler.send_file(body_of(handler), upto=len(body_of(handler)) // 3)


def claims_less(handler):
    """The length says less than the file is: what arrives looks complete."""
    handler.send(200, body_of(handler)[:-200], close=True)


def no_length_cut(handler):
    """No length at all, as HTTP/1.0 does it, and half of the file."""
    handler.server.hub.seen.append((handler.path, dict(handler.headers), 200))
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(body_of(handler)[: len(body_of(handler)) // 2])
    handler.close_connection = True


def to(address):
    return lambda handler: handler.send(302, b"", Location=address + handler.path)


def busy(seconds):
    return lambda handler: handler.send(429, b"slow down", Retry_After=str(seconds))


def stall(seconds):
    """A third of the file, then nothing for a while, with the connection open."""

    def fault(handler):
        handler.send(200, body_of(handler)[: len(body_of(handler)) // 3], len(body_of(handler)))
        time.sleep(seconds)
        handler.close_connection = True

    return fault


def compressed(handler):
    """What a cache in between may do, although it was asked not to."""
    handler.send(200, gzip.compress(body_of(handler)), Content_Encoding="gzip")


def listing(*urls):
    return json.dumps({"default": {"train": list(urls)}}).encode()
