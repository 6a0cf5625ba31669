"""An agent with a memory. It counts its queries, and how often each word occurs in them.

Configure it with a memory:

    [[agent]]
    name = "counter"
    handler = "examples.counter:handle"
    memory = "ram"

`memory` is a dict. It is empty for a worker's first query. After that it is what the previous query
returned. A query that fails does not change it. Each worker has a separate memory, so an agent at
two nodes has two. Keep it small: em-runner copies it before each query, so that it can undo the
changes of a query that fails.
"""

from __future__ import annotations

from typing import Any

MAX_WORDS = 1000
"""The memory holds at most this many words. More new words are ignored, so its size is bounded."""


def handle(body: str, memory: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return how often each word of the query has occurred so far, and the updated memory."""
    queries = memory.get("queries", 0) + 1
    seen = memory.get("words", {})
    words = body.casefold().split()
    for word in words:
        if word in seen or len(seen) < MAX_WORDS:
            seen[word] = seen.get(word, 0) + 1
    counts = {word: seen[word] for word in words if word in seen}
    answer = {
        "type": "counter",
        "properties": {
            "title": f"query {queries}",
            "resume": ", ".join(f"{word}: {count}" for word, count in counts.items()),
            "queries": queries,
            "words": counts,
        },
    }
    return [answer], {"queries": queries, "words": seen}
