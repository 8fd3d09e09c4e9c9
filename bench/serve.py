"""Requests per second and latency of examples/serve.py under load, with a captured network and with PyTorch's own forward.

Each server is a process of its own. Clients, threads of this process, post one image again and again, each as soon as it has
its answer. Rounds take turns between the servers. First both must give the same answer.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import torch

from ghostfused.cli import inputs
from ghostfused.cli.inputs import BadInput

from . import cases, measure
from .cases import ROOT
from .console import milliseconds, table
from .engines import missing
from .environment import title
from .results import Writer

EXECUTIONS = {"eager": ["--unfused"], "ghostfused_capture": []}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="ghostnet_100", help="timm's name, default ghostnet_100")
    parser.add_argument("--size", type=inputs.positive, default=224)
    parser.add_argument(
        "--clients", default="1,8", metavar="N,N", type=inputs.several(inputs.positive), help="at once, default 1,8"
    )
    parser.add_argument("--rounds", type=inputs.positive, default=5, help="of each server, default 5")
    parser.add_argument("--seconds", type=inputs.amount, default=3.0, help="of a round, default 3")
    measure.add_device_arguments(parser)


class Server:
    """A server that is up."""

    def __init__(self, process: subprocess.Popen, port: int):
        self.process, self.port = process, port

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)


@contextlib.contextmanager
def server(arguments: list[str], seconds: float = 300) -> Iterator[Server]:
    """examples/serve.py with ``arguments``, on a free port.

    Raises:
        RuntimeError: it ended, or took longer than ``seconds`` to come up; the message has its last lines.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), "--port", str(port), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process,
    ):
        try:
            end = time.monotonic() + seconds
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"{' '.join(command)}: it didn't come up\n{log.read()[-2000:]}")
                time.sleep(0.1)
            yield Server(process, port)
        finally:
            process.terminate()


def photo() -> bytes:
    """A JPEG of 320 × 256 that is no flat area."""
    from PIL import Image

    noise = torch.randint(0, 255, (16, 20, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(noise.numpy()).resize((320, 256)).save(file, "JPEG")
    return file.getvalue()


def post(connection: http.client.HTTPConnection, body: bytes) -> tuple[int, dict]:
    """The status and the JSON of the answer."""
    connection.request("POST", "/classify", body)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def load(server: Server, clients: int, body: bytes, seconds: float) -> tuple[list[float], float]:
    """Milliseconds of each request of so many clients, and how long all took."""
    times: list[float] = []
    failed: list[object] = []
    end = time.perf_counter() + seconds

    def client() -> None:
        with contextlib.closing(server.connect()) as connection:
            while (start := time.perf_counter()) < end and not failed:
                try:
                    status, answer = post(connection, body)
                except Exception as error:
                    failed.append(error)
                    return
                times.append((time.perf_counter() - start) * 1e3)
                if status != 200:
                    failed.append(answer)

    start = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise RuntimeError(f"a request failed: {failed[0]}")
    return times, time.perf_counter() - start


def differs(answers: list[dict]) -> str | None:
    """What the servers disagree on, beyond rounding."""
    first, other = (dict(zip(a["classes"], a["scores"], strict=True)) for a in answers)
    same = first.keys() == other.keys() and all(math.isclose(first[c], other[c], rel_tol=1e-3) for c in first)
    return None if same else f"expected one answer of both servers, got {answers[0]} and {answers[1]}"


def main(options: argparse.Namespace) -> int:
    """requests per second and latency of a server under load, with a captured network and without"""
    device = measure.set_device(options, only="cpu")
    if reason := missing("starlette", "uvicorn", "timm", "PIL"):
        raise BadInput(reason)
    cases.networks(f"timm:{options.model}", options.size)
    body, shown = photo(), []
    common = ["--model", options.model, "--size", str(options.size), "--workers", str(torch.get_num_threads())]
    with Writer(options.output, device) as writer, contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(server([*common, *more])) for name, more in EXECUTIONS.items()}
        answers = []
        for each in servers.values():
            with contextlib.closing(each.connect()) as connection:
                answers.append(post(connection, body)[1])
        if wrong := differs(answers):
            raise RuntimeError(wrong)
        for clients in options.clients:
            rounds: dict[str, list[tuple[list[float], float]]] = {name: [] for name in servers}
            for each in servers.values():
                load(each, clients, body, options.seconds / 4)
            for number in range(options.rounds):
                for name in servers if number % 2 == 0 else reversed(servers):
                    rounds[name].append(load(servers[name], clients, body, options.seconds))
            for name, measured in rounds.items():
                every = sorted(t for times, _ in measured for t in times)
                rates = [round(len(times) / took, 2) for times, took in measured]
                row = {
                    "kind": "serve", "name": f"timm:{options.model}", "size": options.size, "execution": name,
                    "threads": torch.get_num_threads(), "clients": clients, "requests": len(every), "rates": rates,
                    "requests_per_second": round(statistics.median(rates), 2), "p50_ms": round(statistics.median(every), 3),
                    "p99_ms": round(every[len(every) * 99 // 100], 3),
                }  # fmt: skip
                writer.write(row)
                shown.append([
                    str(clients), name, f"{row['requests_per_second']:.1f}", f"{min(rates):.1f} to {max(rates):.1f}",
                    milliseconds(row["p50_ms"]), milliseconds(row["p99_ms"]),
                ])  # fmt: skip
    heading = f"timm:{options.model} at {options.size}² behind HTTP; {title(writer.environment)}"
    table(heading, ["clients", "execution", "requests/s", "of rounds", "p50", "p99"], shown)
    return 0
