"""How often something may happen, decided by code that is told the time."""

from __future__ import annotations


class Bucket:
    """A token bucket: `per_s` admissions a second, and as many at once after a quiet second."""

    def __init__(self, per_s: float | None) -> None:
        """Start full. `per_s` None admits everything."""
        self._per_s = per_s
        self._size = max(1.0, per_s or 0.0)
        self._left = self._size
        self._updated_s: float | None = None

    def admit(self, now_s: float) -> bool:
        """Return whether one more may pass at `now_s`, seconds of any monotonic clock."""
        if self._per_s is None:
            return True
        if self._updated_s is not None:
            self._left = min(self._size, self._left + (now_s - self._updated_s) * self._per_s)
        self._updated_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Throttle:
    """At most `limit` admissions in each window of `window_s` seconds; the rest are counted."""

    def __init__(self, limit: int, window_s: float) -> None:
        self._limit = limit
        self._window_s = window_s
        self._window_start_s: float | None = None
        self._admitted = 0
        self._suppressed = 0

    def admit(self, now_s: float) -> int | None:
        """Return how many were held back since the last admission, or None to hold this one back too."""
        if self._window_start_s is None or now_s - self._window_start_s >= self._window_s:
            self._window_start_s = now_s
            self._admitted = 0
        if self._admitted >= self._limit:
            self._suppressed += 1
            return None
        self._admitted += 1
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed
