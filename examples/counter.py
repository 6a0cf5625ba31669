"""An agent that remembers: counts the queries it was asked, and how often each word came up in them.

Configure it with a memory, which is what this example is about:

    [[agent]]
    name = "counter"
    handler = "examples.counter:handle"
    memory = "ram"

`memory` is a dict: empty for a worker's first query, afterwards what the query before returned. A
query that fails leaves it as it was. Each worker has its own, so an agent at two nodes has two. Keep
it small: so that a failure can be undone, it is copied before each query.
"""

from __future__ import annotations

from typing import Any

MAX_WORDS = 1000
"""How many words are remembered; new ones after that are not, for a memory must not grow for ever."""


def handle(body: str, memory: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return how often each word of the query has been seen by now, and the counts for the next query."""
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
