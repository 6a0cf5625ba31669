"""The worker's line to its runner: a ZeroMQ DEALER. Queries in, replies and heartbeats out.

ZeroMQ's file descriptor is edge-triggered: it announces a change once, so after every send or
receive the socket is read until it has nothing left.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any, Final

import zmq

from shared import ipc
from shared.ipc import Counters, Launch, Mishap, Outcome, WorkerState
from shared.logs import get_logger
from worker.dispatch import Dispatcher
from worker.jobs import Answer, Job
from worker.results import encode_result, is_json

BATCH_BYTES: Final = 1 << 20
"""Answers that have so many bytes together are a message of their own: the runner takes no part of one."""


class Link:
    """One worker's connection to the runner. Also the source of the jobs that come by it.

    Args:
        launch: where the runner listens, and who this worker is.
        counters: sent with every status.
        on_drain: called when the runner says that nothing more will come, and whether a successor waits.
        on_go: called when the runner says that the predecessor has left, with what that remembered.
    """

    def __init__(
        self,
        launch: Launch,
        counters: Counters,
        on_drain: Callable[[bool], None],
        on_go: Callable[[bytes | None], None],
    ) -> None:
        self._launch = launch
        self._counters = counters
        self._on_drain = on_drain
        self._on_go = on_go
        self._dispatcher: Dispatcher | None = None
        self._jobs: dict[int, Job] = {}
        self._replies: list[tuple[int, int, bytes]] = []
        self._held: list[bytes] = []
        self._state: WorkerState = "starting"
        self._detail = ""
        self._told = b""
        self._flush_due = False
        self._log = get_logger("worker.link")

    def open(self) -> None:
        """Connect and say hello. Call it on the running event loop."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, self._launch.routing_id)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # bounded by what the runner has in flight
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.connect(self._launch.endpoint)
        self._loop = asyncio.get_running_loop()
        self._fd = int(self._socket.get(zmq.FD))
        self._loop.add_reader(self._fd, self._readable)
        self._send(ipc.Hello(self._launch.key, os.getpid()))
        self._send_status()

    def close(self) -> None:
        """Send what is left, for a second at the most, and let the socket go."""
        self._flush()
        self._loop.remove_reader(self._fd)
        self._socket.close()
        self._context.term()

    def serve(self, dispatcher: Dispatcher) -> None:
        """Take queries from now on, and have `dispatcher` answer them."""
        self._dispatcher = dispatcher
        self._readable()

    def tell(self, state: WorkerState, detail: str) -> None:
        """Report a change of state."""
        self._state, self._detail = state, detail
        if state == "stopped":
            self._flush()  # these are the last words, and the runner waits for no others
        if detail and state == "backoff":
            self._counters.connection_error = Mishap.now(detail)
        self._send_status()

    def tell_failed(self, reason: str) -> None:
        """Report that this worker cannot go on."""
        self._send(ipc.Failed(reason))

    def ask_for_drain(self) -> None:
        """Ask the runner to send nothing more, and the mark that says so."""
        self._send(ipc.DrainRequest())

    def ask_for_successor(self, reason: str) -> None:
        """Ask for another process to take this one's place."""
        self._send(ipc.RecycleRequest(reason))

    def leave_behind(self, memory: bytes) -> None:
        """Hand over what this worker remembers."""
        self._send(ipc.Legacy(memory))

    def beat(self) -> bool:
        """Send the heartbeat; return whether it tells anything new."""
        before = self._told
        self._send_status()
        return self._told != before

    # --- from the runner ---

    def _readable(self) -> None:
        if self._dispatcher is None:
            return  # the handler is not loaded yet; ZeroMQ keeps what has come
        jobs: list[Job] = []
        while True:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._take(ipc.decode_runner_message(data), jobs)
        if jobs:
            self._dispatcher.submit(jobs)
        if self._held:
            self._send_held()

    def _take(self, message: ipc.RunnerMessage, jobs: list[Job]) -> None:
        if isinstance(message, ipc.Queries):
            for sequence, query in message.items:
                job = Job(self, sequence, query)
                self._jobs[sequence] = job
                jobs.append(job)
        elif isinstance(message, ipc.Cancel):
            for sequence in message.sequences:
                if (cancelled := self._jobs.get(sequence)) is not None:
                    cancelled.cancelled = True
                    cancelled.body = ""  # it may wait for long yet, but not with its text
        elif isinstance(message, ipc.Drain):
            self._on_drain(message.hand_over)
        elif isinstance(message, ipc.Go):
            self._on_go(message.legacy)

    # --- to the runner ---

    def encode(self, result: Any) -> bytes:
        """Return a result as the JSON that the runner embeds; text that is JSON is embedded as such."""
        if type(result) is str and is_json(encoded := result.encode()):
            return encoded
        return encode_result(result)

    def answer(self, job: Job, answer: Answer) -> None:
        """Send an answer, together with whatever else this loop turn brings."""
        del self._jobs[job.ticket]
        outcome, payload = answer
        if outcome is Outcome.CANCELLED:
            return
        if outcome is not Outcome.RETURNED:
            self._counters.http[outcome] += 1
        self._replies.append((job.ticket, int(outcome), payload))
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def flush(self) -> None:
        """Send the answers that wait for the loop's next turn."""
        if self._flush_due:
            self._flush()

    def _flush(self) -> None:
        self._flush_due = False
        if not self._replies:
            return
        replies, self._replies = self._replies, []
        size = begin = 0
        for end, (_, _, payload) in enumerate(replies, 1):
            size += len(payload)
            if size >= BATCH_BYTES or end == len(replies):
                self._send(ipc.Replies(replies[begin:end]))
                size, begin = 0, end

    def _send_status(self) -> None:
        if self._dispatcher is not None:
            self._dispatcher.count()
            self._counters.in_flight_node = max(self._dispatcher.pending - len(self._jobs), 0)
        self._told = ipc.encode(ipc.Status(self._state, self._detail, self._counters))
        self._send_encoded(self._told)

    def _send(self, message: ipc.WorkerMessage) -> None:
        self._send_encoded(ipc.encode(message))

    def _send_encoded(self, data: bytes) -> None:
        self._held.append(data)
        self._send_held()

    def _send_held(self) -> None:
        # Without a high-water mark `send` does not refuse; should it, what is held goes in order later.
        sent = 0
        try:
            for data in self._held:
                self._socket.send(data, zmq.NOBLOCK)
                sent += 1
        except zmq.Again:
            pass
        del self._held[:sent]
        # A send may have used up the edge that announced something to read.
        if self._dispatcher is not None and int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._readable)
