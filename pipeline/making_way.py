"""Whose request an engine gets next where a run and an endpoint share it: people don't wait for runs. Pure.

What is counted are sequences: a request with `n` samples takes as many as of them aren't done.

Guarantees:
- while people ask, runs have at most seven in eight of an engine's sequences; a request that needs more alone comes in
  when no other of a run is there.
- a run's request makes way at most `MAX_MADE_WAY` times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pipeline.engine import ONLINE_PRIORITY, EngineInfo, Request

ONLINE_MEMORY_S = 30.0
"""How long after the last request that somebody waits for the next one is expected."""
MAX_MADE_WAY = 2
"""How often a run's request makes way, and loses what it had generated; then it stays."""


def is_online(request: Request) -> bool:
    """Whether somebody waits for it."""
    return request.priority <= ONLINE_PRIORITY


def kept_free(info: EngineInfo, *, since_online_s: float) -> int:
    """Places that runs' requests leave free for those that somebody waits for, if there were any of late.

    Those ahead of the engine's sequences are among them: a run that fills those has filled all sequences before.
    """
    if since_online_s >= ONLINE_MEMORY_S or info.max_num_seqs == 1:
        return 0
    return max(1, info.max_num_seqs // 8) + info.lookahead


def may_begin(request: Request, *, free: int, kept: int, begun: Iterable[Request]) -> bool:
    """Whether the engine gets this request now, `free` places being left of which runs leave `kept`.

    One place is enough for many samples, or an engine would stand idle before a request of more than are left.
    """
    if is_online(request) or not kept:
        return free > 0
    if free - request.sampling.n >= kept:
        return True
    return free > kept and all(is_online(other) for other in begun)


def who_makes_way(begun: Iterable[Request], made_way: Mapping[str, int], *, num_wanted: int) -> list[Request]:
    """Runs' requests that free so many places, as far as they can.

    Args:
        begun: what the engine has, in the order in which those begun last go first.
        made_way: how often each has made way before.
        num_wanted: places, each for a sample.
    """
    gone: list[Request] = []
    for request in begun:
        if num_wanted <= 0:
            break
        if not is_online(request) and made_way.get(request.request_id, 0) < MAX_MADE_WAY:
            gone.append(request)
            num_wanted -= request.sampling.n
    return gone
