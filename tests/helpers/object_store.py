"""A local S3-compatible server (moto) with injected faults: 5xx responses, truncated bodies, lost and slow responses.

Run as a program, it serves one bucket, `store`, and prints its address.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import boto3
import httpx
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

BUCKET = "store"
SLOW_SECONDS = 0.25
KEYS = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1"}
UNAVAILABLE = b"<Error><Code>ServiceUnavailable</Code><Message>try again</Message></Error>"
BROKEN = b"<Error><Code>InternalError</Code><Message>try again</Message></Error>"

Environment = dict[str, Any]
Start = Callable[..., Any]


@dataclass
class BadLine:
    """WSGI middleware that injects faults, each with a probability per request; `seen` counts requests and faults."""

    app: Callable[[Environment, Start], Iterable[bytes]]
    unavailable: float = 0.0
    """503 without handling the request."""
    lost: float = 0.0
    """The request is carried out, but the client gets a 500."""
    truncated: float = 0.0
    """Only half of the body, with the header of the whole."""
    slow: float = 0.0
    """Response delayed by `SLOW_SECONDS`."""
    seen: collections.Counter[str] = field(default_factory=collections.Counter)
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    one_at_a_time: Any = field(default_factory=threading.Lock)

    def __call__(self, environment: Environment, start: Start) -> Iterable[bytes]:
        with self.one_at_a_time:  # like S3: a conditional write is atomic
            self.seen["requests"] += 1
            unavailable, lost, truncated, slow = (
                self._happens(name) for name in ("unavailable", "lost", "truncated", "slow")
            )
            if unavailable:
                environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
                return _answer(start, "503 Service Unavailable", UNAVAILABLE)
            status, headers, body = self._carry_out(environment)
            is_read = environment["REQUEST_METHOD"] == "GET" and status.startswith("2") and len(body) > 1
            self.seen["carried out"] += 1
            for name, happens in (("lost", lost), ("truncated", truncated and is_read), ("slow", slow)):
                self.seen[name] += bool(happens)
        if slow:
            threading.Event().wait(SLOW_SECONDS)  # not time.sleep, which tests may patch
        if lost:
            return _answer(start, "500 Internal Server Error", BROKEN)
        start(status, headers)
        return [body[: len(body) // 2] if truncated and is_read else body]

    def _happens(self, name: str) -> bool:
        happens = self.chance.random() < getattr(self, name)
        self.seen["unavailable"] += happens and name == "unavailable"
        return happens

    def _carry_out(self, environment: Environment) -> tuple[str, list[tuple[str, str]], bytes]:
        heard: list[Any] = []
        body = b"".join(self.app(environment, lambda status, headers, *_: heard.extend((status, headers))))
        once = {name.lower(): (name, value) for name, value in heard[1]}  # moto sends some headers twice
        return heard[0], list(once.values()), body


class _Quiet(MotoRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        """Print nothing."""


@contextlib.contextmanager
def object_store(**faults: float) -> Iterator[tuple[str, BadLine]]:
    """Serve an empty bucket on a free local port; yield the server's URL and the middleware."""
    line = BadLine(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, line, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        _make_bucket(url)
        for name, chance in faults.items():
            setattr(line, name, chance)
        yield url, line
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def at(url: str) -> dict[str, str]:
    """Return the environment variables with which s3fs uses the server."""
    return {**KEYS, "AWS_ENDPOINT_URL": url}


def _make_bucket(url: str) -> None:
    httpx.post(f"{url}/moto-api/reset").raise_for_status()
    keys = {"aws_access_key_id": "nobody", "aws_secret_access_key": "nothing", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=url, **keys)
    client.create_bucket(Bucket=BUCKET)
    client.close()


def _answer(start: Start, status: str, body: bytes) -> Iterable[bytes]:
    start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


if __name__ == "__main__":
    with object_store(**{name: float(value) for name, value in (pair.split("=") for pair in sys.argv[1:])}) as (url, _):
        print(url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        os._exit(0)
