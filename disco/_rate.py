"""Rate limits. The caller passes the time, so that tests need no clock."""

from __future__ import annotations


class TokenBucket:
    """Admits `per_s` events a second, and as many at once after a quiet second.

    Args:
        per_s: the rate; None admits every event.
    """

    def __init__(self, per_s: float | None) -> None:
        self._per_s = per_s
        # At least one event fits. Otherwise a bucket for 0.1 events a second would never admit one.
        self._size = max(1.0, per_s or 0.0)
        self._left = self._size
        self._updated_s = 0.0

    def admit(self, now_s: float) -> bool:
        """Count one event, and return whether the rate allows it.

        Args:
            now_s: seconds of a monotonic clock, not negative.
        """
        if self._per_s is None:
            return True
        refill = (now_s - self._updated_s) * self._per_s
        self._left = min(self._size, self._left + refill)
        self._updated_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True
