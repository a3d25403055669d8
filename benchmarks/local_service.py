"""A separate Prefect server and its workers on loopback, for benchmarks and tests of the automatic service."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import httpx

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 90.0
PASSWORD = ("crosscal", "on loopback")
WITH_PASSWORD = {name: ":".join(PASSWORD) for name in ("PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING")}
"""Environment of a server with an auth string, and of its clients, as the docs advise."""
R = TypeVar("R")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(look: Callable[[], R | None], seconds: float, *, every: float = 0.1) -> R:
    """Poll `look` and return its first truthy result; raise `TimeoutError` after `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = look()
        if found:
            return found
        time.sleep(every)
    raise TimeoutError(f"nothing after {seconds:g} s")


@contextmanager
def process(
    command: list[str], environment: Mapping[str, str], log: Path, cwd: Path = ROOT
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process in its own group, which is killed with all its children at the end."""
    with log.open("ab") as output:
        running = subprocess.Popen(
            command, cwd=cwd, env=dict(environment), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield running
    finally:
        kill(running)


def kill(running: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.wait()


def environment(folder: Path, port: int, **more: str) -> dict[str, str]:
    """Return the environment of server, workers and commands; commands find this checkout's programs."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    own = {
        "PATH": programs,
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **own, **more}


@contextmanager
def server(folder: Path, shared: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server, from when it answers; its database is under `folder` and is kept."""
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", shared["PREFECT_SERVER_API_PORT"]]
    with process(command, shared, folder / "server.log") as running:
        wait_for(lambda: is_healthy(shared["PREFECT_API_URL"]), START_SECONDS)
        yield running


def is_healthy(api_url: str) -> bool:
    try:
        return httpx.get(f"{api_url}/health", timeout=5).is_success
    except httpx.HTTPError:
        return False


def crosscal(shared: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "crosscal", *arguments]
    return subprocess.run(command, cwd=ROOT, env=dict(shared), capture_output=True, text=True, check=False)


def deploy(shared: Mapping[str, str], service: Path) -> dict[str, Any]:
    """Run `crosscal deploy` and return what it printed."""
    done = crosscal(shared, "deploy", str(service), "--json")
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


@contextmanager
def receiver() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Run a receiver of webhooks; yield its address and the list of messages posted so far."""
    received: list[dict[str, Any]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/secret", received
        listening.shutdown()


@contextmanager
def workers(folder: Path, shared: Mapping[str, str], commands: list[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run the workers whose shell commands `crosscal deploy` printed."""
    with ExitStack() as stack:
        logs = [folder / f"worker{number}.log" for number in range(len(commands))]
        yield [
            stack.enter_context(process(["bash", "-c", f"exec {command}"], shared, log))
            for command, log in zip(commands, logs, strict=True)
        ]
