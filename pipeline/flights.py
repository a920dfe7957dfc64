"""What is in flight at which replica, and what becomes of it: sent, answered, moved, taken back, lost with its replica.

Puts the dispatch board's decisions into practice over a `FleetLink`, and what the link hears into the board. Knows
requests as (shard token, position) and leaves shards to `OpenShards`. Invariant: a request id is in flight at one
replica at most, and an answer to any other id is no longer of interest. A row has one such id, and a second one while
it is begun once more at a faster replica; that one is unknown to the board.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from pipeline.backups import Backup, Backups
from pipeline.balance import choose_backups, choose_recall, slow_places
from pipeline.dispatch import Assignment, DispatchBoard
from pipeline.engine import Request, plain_ids
from pipeline.errors import NodeLost, ReplicaDied, ReplicaUnreachable, RequestRefused
from pipeline.fleet_link import FleetLink
from pipeline.fresh_rows import prompt_bytes
from pipeline.fruitless_losses import FruitlessLosses
from pipeline.live_replica import RECALL_PATIENCE_S, LiveReplica
from pipeline.membership import RETIRED, Departure, Member
from pipeline.outcomes import Key, OpenShard, OpenShards, Outcome
from pipeline.replica_answers import RETURNED, Poll, RowResult, failed, returned

WINDOW_FACTOR = 2
"""Rows with or on the way to a replica, per sequence its engine can run at once: it never waits for us."""
RECALL_INTERVAL_S = 0.2
"""Least time between two looks at whether rows should be called back from a slow replica."""
BACKUP_INTERVAL_S = 1.0
"""Least time between two looks at whether rows should be begun once more."""
BROKEN_OFF = "its replica was lost after the answer had begun"
BLAMELESS = frozenset({RETIRED, NodeLost.kind, ReplicaUnreachable.kind})
"""Ends of a replica that no row of its can have brought about."""


class Flights:
    """All rows of open shards that wait for a replica or are with one; the listener of its own `FleetLink`."""

    def __init__(
        self, fleet: Any, shards: OpenShards, *, max_attempts: int, hang_timeout_s: float, begins_at_once: bool
    ) -> None:
        """With `begins_at_once` no request waits at one replica while another could begin it, and each in its turn."""
        self._shards = shards
        self._link = FleetLink(fleet, self, hang_timeout_s=hang_timeout_s)
        self._board: DispatchBoard[Key] = DispatchBoard(max_attempts=max_attempts)
        self._max_attempts = max_attempts
        self._begins_at_once = begins_at_once
        self._members: dict[str, LiveReplica] = {}
        self._sent: dict[str, Key] = {}
        self._num_sent = 0
        self._balanced_at = -math.inf
        self._backed_up_at = -math.inf
        self._backups = Backups()
        self._losses = FruitlessLosses()
        self._proven: Request | None = None
        """One that was answered, to be asked again when engines die and nothing gets done."""
        self._proof_id: str | None = None
        """As what it is with a replica now."""

    @property
    def num_in_flight(self) -> int:
        """Rows that are with replicas now."""
        return len(self._sent)

    @property
    def num_replicas(self) -> int:
        """Replicas that take work now."""
        return len(self._members)

    @property
    def num_seqs(self) -> int:
        """Sequences that their engines run at once."""
        return sum(live.member.info.max_num_seqs for live in self._members.values())

    def replica_loads(self) -> dict[str, tuple[int, int]]:
        """Requests that each replica was last seen running, and with waiting, everybody's."""
        return {name: (live.num_running, live.num_waiting) for name, live in self._members.items()}

    def start(self) -> None:
        """Look for replicas, if it doesn't yet."""
        self._link.start()

    @property
    def num_unfinished(self) -> int:
        """Rows without an outcome."""
        return self._board.num_unfinished

    @property
    def wants_more(self) -> bool:
        """Whether with more rows waiting more of those that begin alike would meet."""
        return self._board.wants_more

    def add(self, keys: Sequence[Key]) -> None:
        """Have these rows done."""
        self._queue(keys)
        self.send_all()

    def go_in_order(self) -> None:
        """Send the oldest rows first from now on, whatever they begin with: the oldest shards are to finish soon."""
        self._board.go_in_order()
        self.send_all()

    def send_all(self) -> None:
        """Send what can be sent now."""
        self._board.held = self._losses.in_doubt and self._proven is not None and self._board.has_suspects
        if self._board.held:
            self._ask_for_proof()
        while (assignment := self._board.next_assignment()) is not None:
            self._send(assignment)

    def forget(self, keys: Sequence[Key]) -> None:
        """Take rows off the board; others that waited for theirs go there instead, at the next occasion."""
        self._board.discard(keys)
        self._queue(self._shards.forget(keys))

    def withdraw(self, shard: OpenShard) -> None:
        """Nobody waits for the shard any more: have replicas forget what they have of it."""
        for name, live in self._members.items():
            sent = ((request_id, self._sent.get(request_id)) for request_id in live.sent)
            mine = [request_id for request_id, key in sent if key is not None and key[0] == shard.token]
            for request_id in mine:
                live.sent.discard(request_id)
                self._board.finished(name, self._sent.pop(request_id))
                self._end_backup_of(request_id)
            if mine:
                self._link.abort(live.member, mine)
        self.forget(shard.keys)
        self.send_all()

    def cancel_all(self) -> None:
        """Have replicas forget everything."""
        for live in self._members.values():
            self._link.cancel(live.member)
            for request_id in live.sent:
                self._sent.pop(request_id, None)
            live.sent.clear()
        self._backups.clear()

    def joined(self, member: Member) -> None:
        """See `Listener`."""
        self._members[member.replica] = LiveReplica(member)
        self._board.replica_up(member.replica, window=WINDOW_FACTOR * member.info.max_num_seqs)
        self.send_all()

    def leaving(self, replica: str) -> None:
        """See `Listener`."""
        self._board.drain(replica)

    def lost(self, replica: str, why: Departure) -> None:
        """Take back what a lost replica had; its rows are charged with an attempt if they may be what killed it."""
        live = self._members.pop(replica)
        if self._proof_id in live.sent:
            self._proof_id = None
        rows_to_blame = why.kind not in BLAMELESS
        if live.sent and rows_to_blame and not live.in_company:
            self._losses.add(time.monotonic())
        verdict = self._losses.verdict(why.message)
        if verdict is not None:
            self.failed(verdict)
        for request_id in live.sent:
            key = self._sent.pop(request_id, None)
            self._backups.ended(request_id, again=not rows_to_blame)
            self._end_backup_of(request_id)
            if key is not None and self._shards.is_streamed(key):
                attempt = self._board.finished(replica, key)
                self._shards.settle(key, Outcome(failed("", why.kind, BROKEN_OFF), attempt or 1))
        # What rows fail by says something of rows: one that ten nodes went away with has crashed an engine.
        kind = why.kind if rows_to_blame else ReplicaDied.kind
        for lost in self._board.replica_down(replica, kind, rows_to_blame=rows_to_blame, in_company=live.in_company):
            message = f"attempt {lost.attempts} of {self._max_attempts}, the last one, ended in {why.kind}"
            self._shards.settle(lost.key, Outcome(failed("", kind, message), lost.attempts))
        if self._board.has_suspects:  # each is to run in the company that the board knows of
            for original_id in self._backups.originals():
                self._end_backup_of(original_id)
        self.send_all()

    def polled(self, replica: str, poll: Poll) -> None:
        """See `Listener`."""
        live = self._members.get(replica)
        if live is None:
            return
        live.in_company = poll.in_company
        for piece in poll.pieces:
            if piece.request_id in self._sent:
                self._shards.pass_on(self._sent[piece.request_id], piece)
        results = poll.results
        if poll.is_first and live.knows_us:  # we were silent for so long that it gave up what it had of us
            told = {result.request_id for result in results}
            results += tuple(returned(request_id) for request_id in live.sent - told)
        live.knows_us = True
        self._receive(live, results, poll)

    def has_work(self, replica: str) -> bool:
        """See `Listener`."""
        live = self._members.get(replica)
        return live is not None and bool(live.sent)

    def failed(self, message: str) -> None:
        """See `Listener`."""
        self._link.end()
        self._shards.fail(message)

    def _queue(self, keys: Sequence[Key]) -> None:
        # Somebody waits for each of an endpoint's: there, rows that begin alike could keep another waiting for ever.
        requests = [] if self._begins_at_once else [self._shards.request(key) for key in keys]
        self._board.add_rows(keys, [prompt_bytes(one.prompt_token_ids) if one else b"" for one in requests] or None)

    def _send(self, assignment: Assignment[Key]) -> None:
        live = self._members[assignment.replica]
        requests = []
        for key in assignment.keys:
            request = self._shards.request(key)
            if request is None:  # dropped while it waited for another attempt
                self._board.finished(assignment.replica, key)
                continue
            self._shards.note_begun(key)
            self._num_sent += 1
            # Names the attempt, not the row: a late answer to an earlier attempt can't be taken for this one's.
            request_id = f"{self._link.consumer}/{self._num_sent}"
            self._sent[request_id] = key
            live.sent.add(request_id)
            requests.append(replace(request, request_id=request_id))
        if requests:
            self._link.submit(live.member, requests)

    def _ask_for_proof(self) -> None:
        """Have an engine do again what one has done before: if that ends it too, no row is to blame."""
        staying = [live for name, live in self._members.items() if not self._board.is_leaving(name)]
        if self._proof_id is not None or self._proven is None or not staying:
            return
        live = min(staying, key=lambda each: len(each.sent))
        self._num_sent += 1
        self._proof_id = f"{self._link.consumer}/{self._num_sent}"
        live.sent.add(self._proof_id)
        self._link.submit(live.member, [replace(self._proven, request_id=self._proof_id)])

    def _take_proof(self, live: LiveReplica, result: RowResult) -> None:
        self._proof_id = None
        live.sent.discard(result.request_id)
        if result.failure is None or result.failure.kind != RETURNED:
            self._losses.proven()

    def _receive(self, live: LiveReplica, results: Sequence[RowResult], poll: Poll) -> None:
        had_work, num_done = bool(live.sent), 0
        for result in results:
            if result.request_id == self._proof_id:
                self._take_proof(live, result)
            was_returned = result.failure is not None and result.failure.kind == RETURNED
            backup = self._backups.ended(result.request_id, again=was_returned)
            if backup is not None:
                num_done += self._take_backup(live, backup, result)
            key = self._sent.pop(result.request_id, None)
            if key is not None:
                live.sent.discard(result.request_id)
                self._end_backup_of(result.request_id)
                num_done += self._take(live, key, result)
        live.note_load(poll.num_running, poll.num_waiting)
        now = time.monotonic()
        if had_work:
            live.speed.add(num_done, now - live.met_at)
        live.met_at = now
        self.send_all()
        self._balance(now)

    def _take(self, live: LiveReplica, key: Key, result: RowResult) -> bool:
        """Take in one answer; returns whether the engine has done something for it."""
        replica, failure = live.member.replica, result.failure
        is_streamed = self._shards.is_streamed(key)
        if failure is not None and failure.kind == RETURNED and not is_streamed:
            live.recalled_at = -math.inf
            self._board.returned(replica, key)
            return False
        self._losses.row_finished()
        if failure is None:
            if self._proven is None and not is_streamed and (request := self._shards.request(key)) is not None:
                # A copy of its ids: they are a view of the whole shard's.
                self._proven = replace(request, prompt_token_ids=plain_ids(request.prompt_token_ids))
            live.note_pace(result)
            attempt = self._board.finished(replica, key)
            if attempt is not None:
                self._shards.settle(key, Outcome(result, attempt))
        else:
            final = failure.kind == RequestRefused.kind or is_streamed
            lost = self._board.request_failed(replica, key, failure.kind, final=final)
            if lost is not None:
                self._shards.settle(key, Outcome(result, lost.attempts))
        return True

    def _balance(self, now: float) -> None:
        """When nothing waits any more, let the fast take over what the slow haven't begun, and then what they have."""
        if self._board.num_waiting or now - self._balanced_at < RECALL_INTERVAL_S or len(self._members) < 2:
            return
        self._balanced_at = now
        loads = {name: live.load(now) for name, live in self._members.items() if self._board.takes_work(name)}
        recall = choose_recall(loads, at_once=self._begins_at_once)
        if recall is not None:
            live = self._members[recall.replica]
            live.recalled_at = now
            self._link.recall(live.member, recall.count)
        elif self._may_back_up(now):
            self._backed_up_at = now
            self._back_up()

    def _may_back_up(self, now: float) -> bool:
        """Not where somebody may have been told a part of the first answer; nor while rows are on their way back."""
        if self._begins_at_once or self._max_attempts == 1 or now - self._backed_up_at < BACKUP_INTERVAL_S:
            return False
        return all(now - live.recalled_at >= RECALL_PATIENCE_S for live in self._members.values())

    def _back_up(self) -> None:
        """Begin the oldest rows of slow replicas once more at faster ones that have sequences free.

        With a lower priority, so that no row goes to wait behind one that is being done already.
        """
        places = {
            name: live.place if self._board.takes_work(name) else replace(live.place, free=0)
            for name, live in self._members.items()
            if not self._board.is_reserved(name)
        }
        requests: dict[str, list[Request]] = defaultdict(list)
        for original_id, giver, receiver in choose_backups(self._may_have_backups(slow_places(places)), places):
            key = self._sent[original_id]
            request = self._shards.request(key)
            if request is not None and request.sampling.n == 1:
                self._num_sent += 1
                request_id = f"{self._link.consumer}/{self._num_sent}"
                self._backups.add(Backup(key, original_id, giver, request_id, receiver))
                self._members[receiver].sent.add(request_id)
                requests[receiver].append(replace(request, request_id=request_id, priority=request.priority + 1))
        for receiver, batch in requests.items():
            self._link.submit(self._members[receiver].member, batch)

    def _may_have_backups(self, givers: Sequence[str]) -> Iterator[tuple[int, str, str]]:
        """Requests in flight at these replicas that have hurt no engine: age (the n-th that was sent), id, replica."""
        for name in givers:
            for request_id in self._members[name].sent:
                key = self._sent.get(request_id)
                if key is not None and self._backups.may_have(request_id) and self._board.is_blameless(name, key):
                    yield int(request_id.rpartition("/")[2]), request_id, name

    def _take_backup(self, live: LiveReplica, backup: Backup, result: RowResult) -> bool:
        """Take in what became of a backup; returns whether the engine has done something for it."""
        live.sent.discard(backup.request_id)
        if result.failure is not None:
            return result.failure.kind != RETURNED
        live.note_pace(result)
        self._losses.row_finished()
        giver = self._members[backup.giver]
        giver.sent.discard(backup.original_id)
        self._sent.pop(backup.original_id)
        self._backups.original_ended(backup.original_id)
        self._link.abort(giver.member, [backup.original_id])
        attempt = self._board.finished(backup.giver, backup.key)
        if attempt is not None:
            self._shards.settle(backup.key, Outcome(result, attempt))
        return True

    def _end_backup_of(self, original_id: str) -> None:
        """Have a row's second replica forget it, if it has one."""
        backup = self._backups.original_ended(original_id)
        live = self._members.get(backup.receiver) if backup else None
        if backup and live:
            live.sent.discard(backup.request_id)
            self._link.abort(live.member, [backup.request_id])
