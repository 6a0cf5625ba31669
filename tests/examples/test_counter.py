"""The counting example."""

from __future__ import annotations

import pytest

from examples import counter

pytestmark = pytest.mark.anyio


async def test_counter_counts_queries_and_words_across_queries(ask):
    first, second = await ask("examples.counter:handle", "red fish", "blue Fish fish")
    assert first[0]["properties"]["words"] == {"red": 1, "fish": 1}
    assert second[0]["properties"]["words"] == {"blue": 1, "fish": 3}
    assert second[0]["properties"]["queries"] == 2


async def test_counter_without_memory_starts_again_for_each_query(ask):
    first, second = await ask("examples.counter:handle", "fish", "fish", memory="none")
    assert first == second


async def test_counter_remembers_a_bounded_number_of_words():
    memory: dict = {}
    text = " ".join(f"w{number}" for number in range(counter.MAX_WORDS + 50))
    for _ in range(2):
        _, memory = counter.handle(text, memory)
    assert len(memory["words"]) == counter.MAX_WORDS
    assert set(memory["words"].values()) == {2}


async def test_counter_answers_a_query_without_words(ask):
    [[answer]] = await ask("examples.counter:handle", "  ")
    assert answer["properties"] == {"title": "query 1", "resume": "", "queries": 1, "words": {}}
