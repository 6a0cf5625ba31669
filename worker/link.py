"""The worker's link to its runner: a ZeroMQ DEALER. Queries arrive, replies and status leave.

ZeroMQ's file descriptor is edge-triggered: it announces a change only once. So after each receive
and each send, the socket is read until it is empty.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

import zmq

from shared import ipc
from shared.ipc import Counters, LastError, Launch, Outcome, WorkerState
from worker.dispatching.jobs import CANCELLED, Answer, Job, TracedJob
from worker.dispatching.results import encode_result, is_json

_BATCH_BYTES: Final = 1 << 20
"""The size at which replies are sent as one message.

ZeroMQ delivers only whole messages, so the first reply in a larger one would wait for the last.
"""

_ERROR_INTERVAL_S: Final = 1.0
"""The shortest time between two statuses that report an error."""

_LINGER_MS: Final = 1000
"""How long `close` waits for the runner to read the last messages."""


class Link:
    """One worker's connection to the runner, and the source of the jobs that arrive over it.

    A reply is an answer with the sequence number of its query.

    Args:
        launch: where the runner listens, and which worker this is.
        on_drain: called when the runner will send no more queries. The argument says whether a
            successor waits for the memory.
        on_promote: called with the predecessor's memory when the predecessor has exited.
    """

    def __init__(
        self,
        launch: Launch,
        on_drain: Callable[[bool], None],
        on_promote: Callable[[bytes | None], None],
    ) -> None:
        self._launch = launch
        self._on_drain = on_drain
        self._on_promote = on_promote
        self._submit: Callable[[Sequence[Job]], None] | None = None
        self._read_counters: Callable[[], Counters] = Counters
        self._answer_counts = [0] * len(Outcome)
        self._connection_error: LastError | None = None
        self._jobs: dict[int, Job] = {}
        self._replies: list[tuple[int, Outcome, bytes]] = []
        self._state: WorkerState = "starting"
        self._reason = ""
        self._last_status = b""
        self._error_timer: asyncio.TimerHandle | None = None
        self._error_due_s = 0.0

    def open(self) -> None:
        """Connect and introduce this worker. Call it on the running event loop."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, self._launch.routing_id)
        # There is no high-water mark, so a send never blocks and never fails. The runner limits the
        # queries in flight, and with them what can wait here.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.connect(self._launch.endpoint)
        self._loop = asyncio.get_running_loop()
        self._fd = int(self._socket.get(zmq.FD))
        self._loop.add_reader(self._fd, self._read)
        hello = ipc.Hello(self._launch.key)
        self.send(hello)
        self.send_status()

    def close(self) -> None:
        """Send what is left, and close the socket. Wait for the runner for a second at most."""
        self.send_answers()
        if self._error_timer is not None:
            self._error_timer.cancel()
        self._loop.remove_reader(self._fd)
        self._socket.close()
        self._context.term()

    def serve(
        self,
        submit: Callable[[Sequence[Job]], None],
        read_counters: Callable[[], Counters],
    ) -> None:
        """Start to read the runner's messages, queries among them.

        Args:
            submit: gets the jobs. Each is answered by `answer`.
            read_counters: returns what the other parts of the worker count, for each status.
        """
        self._submit = submit
        self._read_counters = read_counters
        self._read()

    # --- to the runner ---

    def report_state(
        self,
        state: WorkerState,
        reason: str,
    ) -> None:
        """Report a change of state."""
        self._state = state
        self._reason = reason
        if state == "stopped":
            # The replies go first, because the runner reads nothing from this worker after this
            # state.
            self.send_answers()
        if state == "backoff":
            self._connection_error = LastError.now(reason)
        self.send_status()

    def send_status(self) -> bool:
        """Send the state and the counters, also as a heartbeat. Return whether they changed."""
        status = ipc.encode(
            ipc.Status(
                self._state,
                self._reason,
                self.all_counters(),
            )
        )
        changed = status != self._last_status
        self._last_status = status
        self._send_encoded(status)
        return changed

    def report_error(self) -> None:
        """Send the status, which has the handler's last error, before the next heartbeat.

        If this process is killed soon after the error, the runner knows the error.
        """
        # A handler may fail ten thousand times per second. The first failure is sent in the loop's
        # next turn, with its answer. One status after the interval is enough for the next ones,
        # because it has the last error of all.
        if self._error_timer is None:
            due_s = max(self._error_due_s, self._loop.time())
            self._error_due_s = due_s + _ERROR_INTERVAL_S
            self._error_timer = self._loop.call_at(due_s, self._send_error)

    def _send_error(self) -> None:
        self._error_timer = None
        self.send_status()

    def send(self, message: ipc.WorkerMessage) -> None:
        """Send a message now. Replies that wait for the loop's next turn are sent after it."""
        self._send_encoded(ipc.encode(message))

    def all_counters(self) -> Counters:
        """Return what all parts of this worker have counted."""
        counters = self._read_counters()
        counters.direct_answers = self._answer_counts
        # The dispatcher counts the jobs of all sources.
        counters.in_flight_node -= len(self._jobs)
        counters.connection_error = self._connection_error
        return counters

    # --- the source of its jobs ---

    def encode(self, result: Any) -> bytes:
        """Return a result as the JSON that the runner embeds.

        A `str` that is valid JSON is embedded as it is, not as a JSON string.
        """
        if type(result) is str:
            encoded = result.encode()
            if is_json(encoded):
                return encoded
        return encode_result(result)

    def answer(self, job: Job, answer: Answer) -> None:
        """Send an answer, together with the others of this turn of the loop."""
        del self._jobs[job.ticket]
        outcome, payload = answer
        if outcome is Outcome.CANCELLED:
            return
        # Another worker will answer a query that was given back, and count it.
        if outcome is not Outcome.GIVEN_BACK:
            self._answer_counts[outcome] += 1
        # All replies of one turn of the loop are one message, so that a burst costs one send.
        if not self._replies:
            self._loop.call_soon(self.send_answers)
        reply = (job.ticket, outcome, payload)
        self._replies.append(reply)

    def send_answers(self) -> None:
        """Send the answers that wait for the loop's next turn."""
        replies, self._replies = self._replies, []
        size = start = 0
        for end, (_, _, payload) in enumerate(replies, 1):
            size += len(payload)
            if size >= _BATCH_BYTES or end == len(replies):
                batch = replies[start:end]
                self.send(ipc.Replies(batch))
                size = 0
                start = end

    # --- the socket ---

    def _read(self) -> None:
        if self._submit is None:
            return  # the handler is not set up yet; ZeroMQ keeps the messages until `serve`
        jobs: list[Job] = []
        while True:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            message = ipc.decode_runner_message(data)
            jobs += self._on_message(message)
        if jobs:
            self._submit(jobs)

    def _on_message(self, message: ipc.RunnerMessage) -> Sequence[Job]:
        """Act on one message, and return the jobs in it."""
        jobs: Sequence[Job] = ()
        match message:
            case ipc.Queries(items, traces) if traces:
                jobs = [
                    TracedJob(self, sequence, query, trace)
                    for (sequence, query), trace in zip(items, traces, strict=True)
                ]
            case ipc.Queries(items):
                jobs = [Job(self, sequence, query) for sequence, query in items]
            case ipc.Cancel(sequences):
                self._cancel(sequences)
            case ipc.Drain(hand_over):
                self._on_drain(hand_over)
            case ipc.Promote(memory):
                self._on_promote(memory)
        # Before the next message is read, because that may cancel one of these jobs.
        for job in jobs:
            self._jobs[job.ticket] = job
        return jobs

    def _cancel(self, sequences: Sequence[int]) -> None:
        for sequence in sequences:
            job = self._jobs.get(sequence)
            if job is not None:
                job.skipped_as = CANCELLED
                # A job may wait long in the queue. Clients that disconnect must not fill this
                # process's memory with their texts. `skipped_as` is set first: a handler's thread
                # reads the text first and then `skipped_as`. So if it sees an empty text, it also
                # sees that the query is cancelled, and does not run it.
                job.body = ""

    def _send_encoded(self, data: bytes) -> None:
        self._socket.send(data, zmq.NOBLOCK)
        # A send may consume the edge that announced a message.
        events = int(self._socket.get(zmq.EVENTS))
        if self._submit is not None and events & zmq.POLLIN:
            self._loop.call_soon(self._read)
