"""Each agent has one memory per node. A change of the list of nodes does not mix them."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import anyio
import pytest

from disco import Node
from tests.cluster import Cluster, agent, cluster, until
from tests.integration.test_reload import configure, reload

pytestmark = pytest.mark.anyio
KINDS = pytest.mark.parametrize("kind", ["ram", "disk"])


async def remembered(running: Cluster, node: Node) -> int:
    """Return how many earlier queries the memory at a node has counted."""
    (row,) = [
        row
        for row in (await running.rows()).values()
        if row["node"] == node.url.removesuffix("/ws")
    ]
    results = await running.results("x", worker=row["name"])
    return int(results["properties"]["count"]) - 1


async def ask(running: Cluster, worker: str, times: int) -> None:
    for _ in range(times):
        await running.results("x", worker=worker)


def count(kind: str, *nodes: Node) -> str:
    return agent("count", [node.url for node in nodes], memory=kind)


async def both_ready(running: Cluster) -> None:
    for worker in ("count_server", "count_server_2"):
        await running.wait_state(worker, "ready")


async def apply(running: Cluster, folder: Path, agents: str) -> None:
    configure(folder, agents)
    done = await reload(running)
    assert done.returncode == 0, done.stderr
    await running.wait_ready()


@KINDS
async def test_removing_and_adding_a_node_mixes_no_memories(
    tmp_path: Path, node: Node, other_node: Node, kind: str
) -> None:
    async with cluster(tmp_path, count(kind, node, other_node)) as running:
        await both_ready(running)
        await ask(running, "count_server", 3)
        await ask(running, "count_server_2", 1)
        await apply(running, tmp_path, count(kind, other_node))
        assert await remembered(running, other_node) == (1 if kind == "disk" else 0)
        await apply(running, tmp_path, count(kind, node, other_node))
        await both_ready(running)
        assert await remembered(running, other_node) == (2 if kind == "disk" else 0)
        assert await remembered(running, node) == (3 if kind == "disk" else 0)
        lost = running.events("memory_not_handed_over")
        assert len(lost) == (2 if kind == "ram" else 0)


@pytest.mark.message_text
async def test_log_gives_the_reason_why_a_memory_is_lost(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    async with cluster(tmp_path, count("ram", node, other_node)) as running:
        await both_ready(running)
        await ask(running, "count_server", 1)
        await apply(running, tmp_path, count("ram", other_node))
        (line,) = running.events("memory_not_handed_over")
        assert "belongs to the worker's former node" in line["reason"]


@KINDS
async def test_nodes_that_swap_places_keep_their_memories(
    tmp_path: Path, kind: str, node: Node, other_node: Node
) -> None:
    async with cluster(tmp_path, count(kind, node, other_node)) as running:
        await both_ready(running)
        await ask(running, "count_server", 3)
        await ask(running, "count_server_2", 1)
        await apply(running, tmp_path, count(kind, other_node, node))
        await both_ready(running)
        assert await remembered(running, node) == (3 if kind == "disk" else 0)
        assert await remembered(running, other_node) == (1 if kind == "disk" else 0)


SLOW_HANDLER = """
import time
from pathlib import Path

def handle(body, memory):
    count = memory.get("count", 0) + 1
    if body == "slow":
        Path("began").touch()
        while not Path("go").exists():
            time.sleep(0.01)
    return {"type": "count", "properties": {"count": count}}, {"count": count}
"""


async def test_memory_on_disk_is_never_open_in_two_processes(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    options = {
        "runner": 'log_level = "debug"',
        "supervision": "shutdown_timeout_ms = 60000",
    }
    async with cluster(
        tmp_path, count("disk", node, other_node), handlers=SLOW_HANDLER, **options
    ) as running:
        await both_ready(running)
        await ask(running, "count_server_2", 1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(running.ask, "slow", worker="count_server_2"))
            await until((tmp_path / "began").exists, "the handler has started")
            configure(tmp_path, count("disk", other_node), **options)
            running.process.send_signal(signal.SIGHUP)
            await until(
                lambda: running.events("memory_awaited"),
                "the new worker of the node waits for the memory",
            )
            (tmp_path / "go").touch()
        await running.wait_ready()
        assert await remembered(running, other_node) == 2, "the last answer is counted, too"


@KINDS
async def test_memory_moves_to_the_node_that_replaces_its_node(
    tmp_path: Path, node: Node, other_node: Node, kind: str
) -> None:
    async with cluster(tmp_path, count(kind, node)) as running:
        await running.wait_ready()
        await ask(running, "count_server", 2)
        await apply(running, tmp_path, count(kind, other_node))
        assert await remembered(running, other_node) == 2


async def test_new_node_at_the_start_of_the_list_has_an_empty_memory(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    async with cluster(tmp_path, count("disk", node)) as running:
        await running.wait_ready()
        await ask(running, "count_server", 2)
        await apply(running, tmp_path, count("disk", other_node, node))
        await both_ready(running)
        assert await remembered(running, other_node) == 0
        assert await remembered(running, node) == 2
        assert not running.events("memory_starts_empty")


async def test_memory_on_disk_stays_with_its_node_after_a_restart(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    async with cluster(tmp_path, count("disk", node, other_node)) as running:
        await both_ready(running)
        await ask(running, "count_server", 3)
        await ask(running, "count_server_2", 1)
        await running.stop()
    async with cluster(tmp_path, count("disk", other_node, node)) as running:
        await both_ready(running)
        assert await remembered(running, node) == 3
        assert await remembered(running, other_node) == 1


async def test_start_logs_memories_of_removed_nodes(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    async with cluster(tmp_path, count("disk", node)) as running:
        await running.wait_ready()
        await ask(running, "count_server", 2)
        await running.stop()
    async with cluster(tmp_path, count("disk", other_node)) as running:
        await running.wait_ready()
        (begins,) = running.events("memory_starts_empty")
        assert begins["files"] == [f"count@127.0.0.1_{other_node.port}.sqlite"]
        assert begins["others"] == [f"count@127.0.0.1_{node.port}.sqlite"]
        await running.stop()
    folder = tmp_path / "state" / "memory"
    for file in folder.glob(f"*_{other_node.port}.sqlite*"):
        file.unlink()
    (folder / begins["others"][0]).rename(folder / begins["files"][0])
    async with cluster(tmp_path, count("disk", other_node)) as running:
        await running.wait_ready()
        assert await remembered(running, other_node) == 2, "the renamed file is used"
