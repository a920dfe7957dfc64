"""An engine that follows a script: deterministic text and routing from the prompt's ids, and faults on demand.

It stands in for vLLM only where the subject is what happens around an engine: dispatch, commits, deaths, scale. A fault
belongs to a token id: whichever prompt contains that id sets it off.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import ray
from numpy.typing import NDArray

import pipeline.consumers
from pipeline.engine import Completion, EngineInfo, Failure, MoeShape, Piece, Request, Sample, Timing, TokenLog
from pipeline.errors import RequestRefused
from pipeline.json_schemas import schema_text
from pipeline.meeting import Meeting
from tests.scripted_json import json_text

MOE = MoeShape(num_layers=2, num_experts=8, top_k=2)


@dataclass(frozen=True)
class ScriptedConfig:
    """Picklable; builds the engine in the replica's process.

    faults: {token id: action}, where an action is one of `crash` (SIGKILL to itself), `raise` (step raises), `hang`
    (step never returns), `error` (the request fails), `error_once` (fails once per process), `refuse` (add raises),
    `never` (the request never finishes; a streamed one gains a word a step), `zeros` (routing of silent zeros),
    `broken` (the last character is missing).
    """

    max_num_seqs: int = 64
    max_model_len: int = 32768
    steps_per_request: int = 1
    step_delay_s: float = 0.0
    start_delay_s: float = 0.0
    fail_start: str | None = None
    fail_follower: str | None = None
    moe: MoeShape | None = MOE
    random_routing: bool = False
    faults: dict[int, str] = field(default_factory=dict)
    journal: str | None = None
    """Directory in which each engine process logs the requests it starts, one line each."""
    finishes: str | None = None
    """Directory in which each engine process logs when it finished each request (seconds since the epoch), and where:
    `PID.times`, `PID.node`."""

    confidence: float = 1.0
    """By how much the logs of choices' probabilities are too large: 1 is honest, see `honest_logs`."""

    took_s: float = 0.0
    """What each request is said to have taken."""

    consumer_gone_s: float | None = None
    """Instead of `pipeline.consumers.CONSUMER_GONE_S`."""

    def build(self) -> ScriptedEngine:
        if self.consumer_gone_s is not None:
            pipeline.consumers.CONSUMER_GONE_S = self.consumer_gone_s
        if self.fail_start:
            raise RuntimeError(self.fail_start)
        time.sleep(self.start_delay_s)
        return ScriptedEngine(self)

    def lead(self, meeting: Meeting) -> ScriptedEngine:
        """As vLLM's: up when the parts on all other nodes have come to the meeting place."""
        with socket.create_server((meeting.address, meeting.port)) as server:
            server.settimeout(60)
            parts = [server.accept()[0] for _ in range(meeting.num_nodes - 1)]
        engine = self.build()
        engine.parts = parts
        return engine

    def follow(self, meeting: Meeting, node_rank: int) -> None:
        """Logs where it is as `PID.follower`; as vLLM's, it doesn't end by itself when the first node's part does."""
        if self.fail_follower:
            raise RuntimeError(self.fail_follower)
        if self.journal:
            with open(os.path.join(self.journal, f"{os.getpid()}.follower"), "w") as file:
                file.write(ray.get_runtime_context().get_node_id())
        deadline = time.monotonic() + 60
        while True:
            try:
                part = socket.create_connection((meeting.address, meeting.port), timeout=1)
                break
            except OSError:
                assert time.monotonic() < deadline, f"nobody listens at {meeting}"
                time.sleep(0.05)
        threading.Event().wait()
        part.close()


class ScriptedEngine:
    def __init__(self, config: ScriptedConfig) -> None:
        self.config = config
        self.info = EngineInfo(config.max_num_seqs, config.max_model_len, config.moe, {"scripted": "1"})
        self.parts: list[socket.socket] = []
        """Connections to its parts on other nodes."""
        self._running: dict[str, tuple[Request, int]] = {}
        self._seen: set[int] = set()
        self._streams: dict[str, list[Piece]] = {}
        """Of streamed requests, what is still to be told."""
        self._journal = None
        if config.journal:
            self._journal = open(  # noqa: SIM115  open as long as the process
                os.path.join(config.journal, f"{os.getpid()}.log"), "a", buffering=1
            )

        self._finishes = None
        if config.finishes:
            self._finishes = open(os.path.join(config.finishes, f"{os.getpid()}.times"), "a", buffering=1)  # noqa: SIM115
            with open(os.path.join(config.finishes, f"{os.getpid()}.node"), "w") as file:
                file.write(ray.get_runtime_context().get_node_id())

    @property
    def num_sequences(self) -> int:
        return sum(request.sampling.n for request, _ in self._running.values())

    def add(self, request: Request) -> None:
        if self._action(request) == "refuse":
            raise RequestRefused("refused by script")
        self._running[request.request_id] = (request, self.config.steps_per_request)

    def step(self) -> Sequence[Completion | Failure | Piece]:
        if self.config.step_delay_s and self._running:
            time.sleep(self.config.step_delay_s)
        done: list[Completion | Failure | Piece] = []
        for request_id, (request, left) in list(self._running.items())[: self.config.max_num_seqs]:
            if left == self.config.steps_per_request and self._journal:
                self._journal.write(",".join(map(str, request.prompt_token_ids[:64])) + "\n")
            action = self._action(request)
            self._misbehave(action)
            if action == "error" or (action == "error_once" and id_of(request) not in self._seen):
                self._seen.add(id_of(request))
                del self._running[request_id]
                done.append(Failure(request_id, "request_error", "failed by script"))
                continue
            if action == "never":
                done += [Piece(request_id, 0, "on ", 1)] if request.stream else []
                continue
            if left > 1:
                self._running[request_id] = (request, left - 1)
                continue
            if request.stream and (piece := self._next_piece(request)) is not None:
                done.append(piece)
                continue
            del self._running[request_id]
            whole = complete(request, self.config, zeros=action == "zeros")
            done.append(broken(whole) if action == "broken" else whole)
            if self._finishes:
                self._finishes.write(f"{time.time()}\n")
        return done

    def _next_piece(self, request: Request) -> Piece | None:
        """A word of each sample a step."""
        if request.request_id not in self._streams:
            self._streams[request.request_id] = pieces_of(request, complete(request, self.config))
        left = self._streams[request.request_id]
        if left:
            return left.pop(0)
        del self._streams[request.request_id]
        return None

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._running.pop(request_id, None)
            self._streams.pop(request_id, None)

    def close(self) -> None:
        self._running.clear()

    def _action(self, request: Request) -> str | None:
        if not self.config.faults:
            return None
        return next((self.config.faults[i] for i in request.prompt_token_ids if i in self.config.faults), None)

    def _misbehave(self, action: str | None) -> None:
        if action == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "hang":
            while True:
                time.sleep(3600)
        if action == "raise":
            raise RuntimeError("engine core died by script")


def id_of(request: Request) -> int:
    return hash(tuple(request.prompt_token_ids))


def complete(request: Request, config: ScriptedConfig, *, zeros: bool = False) -> Completion:
    if request.choices is not None:
        samples: tuple[Sample, ...] = (scripted_choice(request, config),)
    else:
        samples = tuple(scripted_sample(request, index, config, zeros=zeros) for index in range(request.sampling.n))
    return Completion(request.request_id, samples, 0, Timing(0.0, 0.0, config.took_s))


def broken(whole: Completion) -> Completion:
    return replace(whole, samples=tuple(replace(sample, text=sample.text[:-1]) for sample in whole.samples))


def pieces_of(request: Request, whole: Completion) -> list[Piece]:
    """Its samples word by word, by turns."""
    pieces = []
    for sample in whole.samples:
        words = sample.text.split(" ")
        texts = [word + " " * (number < len(words) - 1) for number, word in enumerate(words)]
        logs = sample.token_logs or ()
        pieces += [(n, Piece(request.request_id, sample.index, t, 1, logs[n : n + 1])) for n, t in enumerate(texts)]
    return [piece for _, piece in sorted(pieces, key=lambda pair: (pair[0], pair[1].index))]


def honest_logs(prompt_token_ids: Sequence[int], num_choices: int) -> list[float]:
    """Logs of the choices' true probabilities: a function of the prompt alone."""
    digest = hashlib.blake2b(np.asarray(prompt_token_ids, np.int32).tobytes()).digest()
    probabilities = np.random.default_rng(list(digest)).dirichlet(np.full(num_choices, 0.6))
    return [float(log) for log in np.log(np.maximum(probabilities, 1e-12))]


def scripted_choice(request: Request, config: ScriptedConfig) -> Sample:
    """The most probable choice, with routing as if it had been generated."""
    assert request.choices is not None
    choices = request.choices.choices
    logs = tuple(config.confidence * log for log in honest_logs(request.prompt_token_ids, len(choices)))
    best = choices[logs.index(max(logs))]
    digest = hashlib.blake2b(np.asarray(request.prompt_token_ids, np.int32).tobytes()).digest()
    routed = routing_of(digest, len(request.prompt_token_ids) + len(best) - 1, config)
    return Sample(0, "", best, "stop", None, max(logs), routed, choice_logs=logs)


def scripted_sample(request: Request, index: int, config: ScriptedConfig, *, zeros: bool = False) -> Sample:
    """Depends on prompt, sampling and seed alone, as a deterministic engine's would."""
    seed = (request.seed or 0) + index if request.sampling.temperature > 0 else 0
    prompt = np.asarray(request.prompt_token_ids, np.int32).tobytes()
    digest = hashlib.blake2b(prompt + seed.to_bytes(8, "little")).digest()
    length = 1 + digest[0] % 8
    limit = request.sampling.max_tokens
    truncated = length > limit
    token_ids = tuple(int(byte) for byte in digest[1 : 1 + min(length, limit)])
    text = " ".join(f"w{token}" for token in token_ids)
    if request.sampling.is_json:
        text, token_ids, truncated = scripted_json(request, digest)
    routed = routing_of(digest, len(request.prompt_token_ids) + len(token_ids) - 1, config, zeros=zeros)
    return Sample(
        index=index,
        text=text,
        token_ids=token_ids,
        finish_reason="length" if truncated else "stop",
        stop_reason=None,
        cumulative_logprob=-float(digest[2]) if request.sampling.logprob else None,
        routed_experts=routed,
        token_logs=None if request.num_top_logs is None else scripted_logs(token_ids, request.num_top_logs),
    )


def scripted_logs(token_ids: Sequence[int], num_top: int) -> tuple[TokenLog, ...]:
    """The generated token is always the likeliest, and others follow it at equal distances."""
    return tuple(
        TokenLog(f"w{token}", -0.5, tuple((f"w{token + rank}", -0.5 - rank) for rank in range(num_top)))
        for token in token_ids
    )


def scripted_json(request: Request, digest: bytes) -> tuple[str, tuple[int, ...], bool]:
    """JSON as asked, four bytes a token, and whether it was cut."""
    schema = request.sampling.json_schema
    text = json_text(schema_text(schema or {"type": "object"}), int.from_bytes(digest[:8], "little"))
    ids = tuple(text.encode()[::4])
    limit = request.sampling.max_tokens
    if len(ids) > limit:
        return text.encode()[: 4 * limit].decode(errors="ignore"), ids[:limit], True
    return text, ids, False


def routing_of(digest: bytes, tokens: int, config: ScriptedConfig, *, zeros: bool = False) -> NDArray[np.uint8] | None:
    """[tokens, layers, 2] expert ids that only the digest decides."""
    moe = config.moe
    if moe is None:
        return None
    # Two different experts for each (token, layer): a hash chooses the first, a non-zero offset the second.
    stream = np.resize(np.frombuffer(digest, np.uint8), tokens * moe.num_layers).astype(np.int64)
    stream = (stream + np.arange(stream.size) * 7) % 251
    first = stream % moe.num_experts
    second = (first + 1 + stream % (moe.num_experts - 1)) % moe.num_experts
    if config.random_routing:
        order = np.random.default_rng(list(digest)).random((tokens * moe.num_layers, moe.num_experts)).argsort()
        first, second = order[:, 0], order[:, 1]
    routed = np.stack([first, second], axis=-1).reshape(tokens, moe.num_layers, 2).astype(np.uint8)
    if zeros:
        routed[:] = 0
    return routed
