"""What an endpoint costs and carries, on real vLLM with the tiny Mixtral: start-up, overhead, a batch beside people.

    python -m tests.bench.serve_load --clients 64 --seconds 60 --rows 2000

Prints a table; exits with 1 when a request failed, a row of the batch is missing, or the batch makes people wait for
more than twice as long for the first token (95th percentile).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import ray

from pipeline.engine import ONLINE_PRIORITY, Request
from pipeline.model import fetch_model
from pipeline.settings import SamplingSettings
from pipeline.vllm_engine import VllmEngineConfig
from tests.endpoints import MODEL, Served, served
from tests.own_ray import own_ray
from tests.whole_runs import check_whole, spec_text, write_prompts

WINDOW_S = 5
MAX_RATIO = 2.0


@dataclass
class Figures:
    began: float = field(default_factory=time.monotonic)
    first_s: list[float] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    """When each of these was asked for."""
    failures: list[str] = field(default_factory=list)

    def percentile(self, percent: int) -> float:
        return statistics.quantiles(self.first_s, n=100)[percent - 1]

    def line(self) -> str:
        times = ", ".join(f"p{each} {self.percentile(each):.3f} s" for each in (50, 95))
        return f"{len(self.first_s)} answers, {len(self.failures)} failures, first token {times}"

    def course(self) -> str:
        """The 95th percentile of every five seconds: what the beginning of a batch does, and what its rows do."""
        windows: dict[int, list[float]] = {}
        for at_s, first_s in zip(self.at_s, self.first_s, strict=True):
            windows.setdefault(int(at_s // WINDOW_S), []).append(first_s)
        return " ".join(f"{sorted(windows[each])[int(len(windows[each]) * 0.95)]:.2f}" for each in sorted(windows))


async def client(url: str, number: int, ends_at: float, figures: Figures) -> None:
    async with httpx.AsyncClient(timeout=120) as http:
        turn = 0
        while time.monotonic() < ends_at:
            turn += 1
            chat = [{"role": "user", "content": f"client {number} asks for the {turn}th time"}]
            body = {"model": "tiny", "messages": chat, "max_tokens": 16, "stream": True}
            began, first = time.monotonic(), None
            text = b""
            try:
                async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
                    async for chunk in answer.aiter_bytes():
                        first = first or time.monotonic() - began
                        text += chunk
            except httpx.HTTPError as error:
                figures.failures.append(repr(error))
                continue
            if answer.status_code != 200 or not text.endswith(b"data: [DONE]\n\n") or first is None:
                figures.failures.append(f"{answer.status_code} {text[-200:]!r}")
            else:
                figures.first_s.append(first)
                figures.at_s.append(began - figures.began)


async def crowd(url: str, num_clients: int, ends_at: float, figures: Figures) -> None:
    await asyncio.gather(*(client(url, number, ends_at, figures) for number in range(num_clients)))


def load(url: str, num_clients: int, seconds: float) -> tuple[threading.Thread, Figures]:
    figures, ends_at = Figures(), time.monotonic() + seconds
    thread = threading.Thread(target=lambda: asyncio.run(crowd(url, num_clients, ends_at, figures)))
    thread.start()
    return thread, figures


def overhead(running: Served, count: int = 60) -> None:
    """One token, one client: over HTTP, and straight from the replica."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "temperature": 0}
    over_http, direct = [], []
    with httpx.Client(timeout=30) as http:
        for _ in range(count):
            began = time.monotonic()
            answer = http.post(f"{running.url}/v1/chat/completions", json=body)
            over_http.append(time.monotonic() - began)
            assert answer.status_code == 200, answer.text
    [member] = running.members().values()
    for number in range(count):
        sampling = SamplingSettings(max_tokens=1, temperature=0)
        request = Request(f"bench/{number}", [1, 733, 16289, 28793, 12014, 733], sampling, 1, priority=ONLINE_PRIORITY)
        began = time.monotonic()
        ray.get(member.handle.submit.remote([request]))
        assert ray.get(member.handle.poll.remote("bench", 10.0)).results
        direct.append(time.monotonic() - began)
    http_s, direct_s = statistics.median(over_http), statistics.median(direct)
    print(f"one token: over HTTP {http_s * 1e3:.1f} ms, straight from the replica {direct_s * 1e3:.1f} ms (medians)")
    print(f"overhead: {(http_s - direct_s) * 1e3:.1f} ms a request")


def first_answer(running: Served) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    began = time.monotonic()
    httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60).raise_for_status()
    print(f"from a warm fleet to the first answer: {running.started_s + time.monotonic() - began:.1f} s")


def batch(prompts: Path, output: Path) -> int:
    """`tramontane run` on the endpoint's fleet; returns its exit code."""
    spec = prompts.with_suffix(".yaml")
    changes = {"model": MODEL.model_dump(), "sampling": {"max_tokens": 32}, "fleet": {"attach": "tiny"}}
    spec.write_text(spec_text(prompts, output, **changes))
    command = [str(Path(sys.executable).with_name("tramontane")), "run", str(spec), "--quiet"]
    began = time.monotonic()
    done = subprocess.run([*command, "--ray", ray.get_runtime_context().gcs_address], check=False)
    print(f"the batch took {time.monotonic() - began:.1f} s, exit code {done.returncode}")
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rows", type=int, default=2000)
    options = parser.parse_args()
    files = fetch_model(MODEL)
    config = VllmEngineConfig(files.path, MODEL.dtype, MODEL.max_model_len, files.moe, on_cpu=True)
    with (
        own_ray(),
        served("tiny", config, moe=files.moe, max_waiting=1000) as running,
        tempfile.TemporaryDirectory() as f,
    ):
        first_answer(running)
        overhead(running)
        thread, alone = load(running.url, options.clients, options.seconds)
        thread.join()
        print(f"{options.clients} clients alone: {alone.line()}")
        path = write_prompts(Path(f) / "in.parquet", options.rows)
        thread, beside = load(running.url, options.clients, options.seconds)
        exit_code = batch(path, Path(f) / "out")
        thread.join()
        print(f"{options.clients} clients beside {options.rows} rows: {beside.line()}")
        print(f"p95 of each {WINDOW_S} s, alone: {alone.course()}; beside: {beside.course()}")
        ratio = beside.percentile(95) / alone.percentile(95)
        print(f"p95 beside the batch over p95 alone: {ratio:.2f}")
        check_whole(Path(f) / "out", options.rows)
        for failure in [*alone.failures, *beside.failures][:5]:
            print(failure)
        return 1 if alone.failures or beside.failures or exit_code or ratio > MAX_RATIO else 0


if __name__ == "__main__":
    raise SystemExit(main())
