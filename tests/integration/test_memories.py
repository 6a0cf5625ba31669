"""A memory belongs to an agent at a node: it stays there, whatever becomes of the list of nodes."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import anyio
import pytest

from disco import Node
from tests.cluster import Cluster, agent, cluster, until
from tests.integration.test_reload import configure, reload
from worker.disk_memory import DiskMemory

pytestmark = pytest.mark.anyio
KINDS = pytest.mark.parametrize("kind", ["ram", "disk"])


async def remembered(running: Cluster, node: Node) -> int:
    """Return how many queries the worker of a node had been asked before this one."""
    (row,) = [row for row in (await running.rows()).values() if row["node"] == node.url.removesuffix("/ws")]
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


async def come_to(running: Cluster, folder: Path, agents: str) -> None:
    configure(folder, agents)
    done = await reload(running)
    assert done.returncode == 0, done.stderr
    await running.wait_ready()


@KINDS
async def test_no_node_gets_anothers_memory_when_one_is_taken_out_and_put_back(
    tmp_path: Path, node: Node, other_node: Node, kind: str
) -> None:
    async with cluster(tmp_path, count(kind, node, other_node)) as running:
        await both_ready(running)
        await ask(running, "count_server", 3)
        await ask(running, "count_server_2", 1)
        await come_to(running, tmp_path, count(kind, other_node))
        assert await remembered(running, other_node) == (1 if kind == "disk" else 0)
        await come_to(running, tmp_path, count(kind, node, other_node))
        await both_ready(running)
        assert await remembered(running, other_node) == (2 if kind == "disk" else 0)
        assert await remembered(running, node) == (3 if kind == "disk" else 0)
        said = [line["why"] for line in running.events("memory_not_handed_over")]
        assert len(said) == (2 if kind == "ram" else 0)
        assert all("has another worker now" in why for why in said)


@KINDS
async def test_nodes_that_change_places_get_nobody_elses_memory(
    tmp_path: Path, kind: str, node: Node, other_node: Node
) -> None:
    async with cluster(tmp_path, count(kind, node, other_node)) as running:
        await both_ready(running)
        await ask(running, "count_server", 3)
        await ask(running, "count_server_2", 1)
        await come_to(running, tmp_path, count(kind, other_node, node))
        await both_ready(running)
        assert await remembered(running, node) == (3 if kind == "disk" else 0)
        assert await remembered(running, other_node) == (1 if kind == "disk" else 0)


SLOW_TO_LEAVE = """
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


async def test_memory_on_disk_is_never_open_in_two_processes(tmp_path: Path, node: Node, other_node: Node) -> None:
    async with cluster(
        tmp_path,
        count("disk", node, other_node),
        handlers=SLOW_TO_LEAVE,
        runner='log_level = "debug"',
        supervision="shutdown_timeout_ms = 20000",
    ) as running:
        await both_ready(running)
        await ask(running, "count_server_2", 1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(running.ask, "slow", worker="count_server_2"))
            await until((tmp_path / "began").exists, "it is at it")
            configure(tmp_path, count("disk", other_node), runner='log_level = "debug"')
            running.process.send_signal(signal.SIGHUP)
            await until(lambda: running.events("memory_awaited"), "the one that has the node from now on waits")
            (tmp_path / "go").touch()
        await running.wait_ready()
        assert await remembered(running, other_node) == 2, "what was answered last is there, too"


@KINDS
async def test_memory_goes_along_to_a_node_that_takes_the_place_of_another(
    tmp_path: Path, node: Node, other_node: Node, kind: str
) -> None:
    async with cluster(tmp_path, count(kind, node)) as running:
        await running.wait_ready()
        await ask(running, "count_server", 2)
        await come_to(running, tmp_path, count(kind, other_node))
        assert await remembered(running, other_node) == 2


async def test_new_node_at_the_head_of_the_list_begins_with_nothing(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    async with cluster(tmp_path, count("disk", node)) as running:
        await running.wait_ready()
        await ask(running, "count_server", 2)
        await come_to(running, tmp_path, count("disk", other_node, node))
        await both_ready(running)
        assert await remembered(running, other_node) == 0
        assert await remembered(running, node) == 2
        assert not running.events("memory_begins"), "there is none that nobody has"


async def test_memory_on_disk_is_its_nodes_after_a_restart_with_another_list(
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


async def test_memory_of_a_node_that_an_agent_has_no_more_is_told_of_at_the_start(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    async with cluster(tmp_path, count("disk", node)) as running:
        await running.wait_ready()
        await ask(running, "count_server", 2)
        await running.stop()
    async with cluster(tmp_path, count("disk", other_node)) as running:
        await running.wait_ready()
        (begins,) = running.events("memory_begins")
        assert begins["files"] == [f"count@127.0.0.1_{other_node.port}.sqlite"]
        assert begins["others"] == [f"count@127.0.0.1_{node.port}.sqlite"]
        await running.stop()
    folder = tmp_path / "state" / "memory"
    for file in folder.glob(f"*_{other_node.port}.sqlite*"):
        file.unlink()
    (folder / begins["others"][0]).rename(folder / begins["files"][0])
    async with cluster(tmp_path, count("disk", other_node)) as running:
        await running.wait_ready()
        assert await remembered(running, other_node) == 2, "as the log says"


async def test_file_that_is_still_named_by_its_worker_is_found(tmp_path: Path, node: Node) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    former = DiskMemory(tmp_path / "state" / "memory" / "count_server.sqlite")
    former.open()
    former.checkout()
    former.commit({"count": 7})
    former.flush()
    former.close()
    async with cluster(tmp_path, count("disk", node)) as running:
        await running.wait_ready()
        assert await remembered(running, node) == 7
        assert len(running.events("memory_renamed")) == 1
