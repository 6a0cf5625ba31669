"""One worker's processes: which one is current, how they start and end, what they count."""

from __future__ import annotations

import secrets
import time
from collections import Counter

import anyio

from runner.routing.router import Router
from runner.supervision._incarnation import Incarnation
from runner.supervision.fork_server import ForkServer
from runner.supervision.recent import Recent
from runner.supervision.restarts import Failure, FailureKind, ReplacementKind
from shared import ipc
from shared.config.load import WorkerSpec
from shared.errors import StartError
from shared.ipc import KEY_BYTES, Counters, LastError, Launch
from shared.logs.logger import Logger, get_logger


class _Record:
    """What is recorded of a worker at one node. At another node it has a new record.

    Attributes:
        ended: the counters of all processes that have ended.
        recent: the last five minutes.
        restarts, replacements: how many, by kind.
        last_failure: why the last process that ended unexpectedly did so.
    """

    def __init__(self) -> None:
        self.ended = Counters()
        self.recent = Recent(time.monotonic())
        self.restarts: Counter[FailureKind] = Counter()
        self.replacements: Counter[ReplacementKind] = Counter()
        self.last_failure: LastError | None = None


class Lineage:
    """One worker's processes: the current one, and perhaps one that starts in order to replace it.

    Attributes:
        spec: the spec of the next process.
        current: the process that gets the worker's queries; None while there is none.
        incarnation_count: how many processes were started.
        handler_version: how often the handler changed. A process that started before the last
            change is stale.
        record: what is recorded of the worker at its node.
        stopping: set when no process may be started any more.
        restart_now: set when a worker that waits for its restart should start at once.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        fork_server: ForkServer,
        router: Router,
    ) -> None:
        self.spec = spec
        self.current: Incarnation | None = None
        self.incarnation_count = 0
        self.handler_version = 0
        self.record = _Record()
        self.stopping = anyio.Event()
        self.restart_now = anyio.Event()
        self._fork_server = fork_server
        self._router = router
        self._incarnations: dict[int, Incarnation] = {}

    @property
    def log(self) -> Logger:
        """A logger that names the worker and its newest incarnation."""
        return get_logger().bind(
            worker=self.spec.name,
            agent=self.spec.agent.name,
            node=str(self.spec.node),
            incarnation=self.incarnation_count,
        )

    @property
    def counted(self) -> Counters:
        """Counters summed over the incarnations at the present node. They do not decrease."""
        counted = Counters()
        counted.add(self.record.ended)
        current = self.current
        if current is not None and self._is_counted(current):
            counted.add(current.counters)
            counted.in_flight_node = current.counters.in_flight_node
        return counted

    def _is_counted(self, incarnation: Incarnation) -> bool:
        """Return whether `counted` includes a process: it has the node that the worker has now."""
        return incarnation.launch.spec.node == self.spec.node

    def adopt(self, spec: WorkerSpec) -> None:
        """Use another spec from now on, with a new record if its node is another one."""
        # Metrics have the node as a label. The counts of one node must not appear at another.
        if spec.node != self.spec.node:
            self.record = _Record()
        self.spec = spec

    def is_stale(
        self,
        incarnation: Incarnation,
        spec: WorkerSpec,
    ) -> bool:
        """Return whether a process was started with another spec, or with an older handler."""
        has_other_spec = incarnation.launch.spec != spec
        return has_other_spec or incarnation.handler_version != self.handler_version

    async def fork(
        self,
        spec: WorkerSpec,
        *,
        standby: bool,
    ) -> Incarnation:
        """Start a process. On standby it loads its handler and then waits for its promotion.

        Raises:
            StartError: if no process can be started.
        """
        self.incarnation_count += 1
        launch = Launch(
            spec=spec,
            incarnation=self.incarnation_count,
            endpoint=self._router.endpoint,
            key=secrets.token_bytes(KEY_BYTES),
            standby=standby,
        )
        # Before the fork, so that the router already knows the process when it says hello.
        self._router.expect(launch, self.on_report)
        # Read before the fork: if the handler changes during it, the process may have loaded the
        # older code, and counts as stale.
        handler_version = self.handler_version
        try:
            process = await self._fork_server.spawn(launch)
        except StartError as exc:
            self._router.drop(launch, str(exc))
            raise
        incarnation = Incarnation(
            launch,
            process,
            self._router,
            handler_version,
        )
        self._incarnations[launch.incarnation] = incarnation
        incarnation.log.info("worker_started", pid=process.pid)
        # `kill` does not know a process that is still being forked.
        if self.stopping.is_set():
            process.kill()
        return incarnation

    async def reap(self, incarnation: Incarnation) -> Failure:
        """Release an ended process and answer its queries. Return why it ended."""
        number = incarnation.launch.incarnation
        self._incarnations.pop(number, None)
        # The counters move to the record, and the successor becomes current, without an `await`
        # between the two. So a reader of `counted` finds the counters exactly once, and a worker
        # that is replaced always has a process.
        if self._is_counted(incarnation):
            self.record.ended.add(incarnation.counters)
        if self.current is incarnation:
            self.current = incarnation.successor
        # Before the wait for the exit status: clients get their answers at once.
        reason = "the worker died"
        if incarnation.draining:
            reason = "the worker ended before it answered"
        self._router.drop(incarnation.launch, reason)
        # No one else has a reference to the process, so it is released even if this is cancelled.
        with anyio.CancelScope(shield=True):
            kind, reason = await incarnation.process.exit_failure()
        incarnation.process.release()
        ended = Failure(kind, f"the process ended: {reason}")
        return incarnation.failure or ended

    def kill(self, *, spared: tuple[Incarnation | None, ...] = ()) -> None:
        """Kill all processes but the spared ones."""
        running = list(self._incarnations.values())
        for incarnation in running:
            if incarnation not in spared:
                incarnation.kill()

    async def reap_all(self) -> None:
        """Kill and reap all remaining processes."""
        for incarnation in list(self._incarnations.values()):
            process = incarnation.process
            process.kill()
            await process.ended.wait()
            await self.reap(incarnation)

    def on_report(self, incarnation: int, message: ipc.Report) -> None:
        """Record what a process reports."""
        # A process that was reaped may still have messages in the socket.
        found = self._incarnations.get(incarnation)
        if found is not None:
            found.on_message(message)
