"""An engine that follows a script: deterministic text and routing from the prompt's ids, and faults on demand.

It stands in for vLLM only where the subject is what happens around an engine: dispatch, commits, deaths, scale. A fault
belongs to a token id: whichever prompt contains that id sets it off.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.engine import Completion, EngineInfo, Failure, MoeShape, Request, Sample, Timing
from pipeline.errors import RequestRefused

MOE = MoeShape(num_layers=2, num_experts=8, top_k=2)


@dataclass(frozen=True)
class ScriptedConfig:
    """Picklable; builds the engine in the replica's process.

    faults: {token id: action}, where an action is one of `crash` (SIGKILL to itself), `raise` (step raises), `hang`
    (step never returns), `error` (the request fails), `error_once` (fails once per process), `refuse` (add raises),
    `never` (the request never finishes), `zeros` (routing of silent zeros).
    """

    max_num_seqs: int = 64
    max_model_len: int = 32768
    steps_per_request: int = 1
    step_delay_s: float = 0.0
    start_delay_s: float = 0.0
    fail_start: str | None = None
    moe: MoeShape | None = MOE
    random_routing: bool = False
    faults: dict[int, str] = field(default_factory=dict)
    journal: str | None = None
    """Directory in which each engine process logs the requests it starts, one line each."""

    def build(self) -> ScriptedEngine:
        if self.fail_start:
            raise RuntimeError(self.fail_start)
        time.sleep(self.start_delay_s)
        return ScriptedEngine(self)


class ScriptedEngine:
    def __init__(self, config: ScriptedConfig) -> None:
        self.config = config
        self.info = EngineInfo(config.max_num_seqs, config.max_model_len, config.moe, {"scripted": "1"})
        self._running: dict[str, tuple[Request, int]] = {}
        self._seen: set[int] = set()
        self._journal = None
        if config.journal:
            self._journal = open(  # noqa: SIM115  open as long as the process
                os.path.join(config.journal, f"{os.getpid()}.log"), "a", buffering=1
            )

    def add(self, request: Request) -> None:
        if self._action(request) == "refuse":
            raise RequestRefused("refused by script")
        self._running[request.request_id] = (request, self.config.steps_per_request)

    def step(self) -> Sequence[Completion | Failure]:
        if self.config.step_delay_s and self._running:
            time.sleep(self.config.step_delay_s)
        done: list[Completion | Failure] = []
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
                continue
            if left > 1:
                self._running[request_id] = (request, left - 1)
                continue
            del self._running[request_id]
            done.append(complete(request, self.config, zeros=action == "zeros"))
        return done

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._running.pop(request_id, None)

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
    samples = tuple(scripted_sample(request, index, config, zeros=zeros) for index in range(request.sampling.n))
    return Completion(request.request_id, samples, 0, Timing(0.0, 0.0, 0.0))


def scripted_sample(request: Request, index: int, config: ScriptedConfig, *, zeros: bool = False) -> Sample:
    """Depends on prompt, sampling and seed alone, as a deterministic engine's would."""
    seed = (request.seed or 0) + index if request.sampling.temperature > 0 else 0
    prompt = np.asarray(request.prompt_token_ids, np.int32).tobytes()
    digest = hashlib.blake2b(prompt + seed.to_bytes(8, "little")).digest()
    length = 1 + digest[0] % 8
    limit = request.sampling.max_tokens
    truncated = length > limit
    token_ids = tuple(int(byte) for byte in digest[1 : 1 + min(length, limit)])
    routed, moe = None, config.moe
    if moe is not None:
        tokens = len(request.prompt_token_ids) + len(token_ids) - 1
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
    return Sample(
        index=index,
        text=" ".join(f"w{token}" for token in token_ids),
        token_ids=token_ids,
        finish_reason="length" if truncated else "stop",
        stop_reason=None,
        cumulative_logprob=-float(digest[2]) if request.sampling.logprob else None,
        routed_experts=routed,
    )
