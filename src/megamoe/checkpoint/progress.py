# SPDX-License-Identifier: Apache-2.0
"""A line that says how far a long piece of work is."""

from __future__ import annotations

import sys
import threading
import time


class ProgressLine:
    """Bytes, rate and time left on standard error: in place on a terminal, else a line every ten seconds."""

    def __init__(self, label: str) -> None:
        """Start the clock."""
        self.label = label
        self.is_terminal = sys.stderr.isatty()
        self.started = time.monotonic()
        self._first: int | None = None
        self._next = self.started + (0.0 if self.is_terminal else 10.0)
        self._lock = threading.Lock()
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        """Show how far it is."""
        with self._lock:
            now = time.monotonic()
            self._first = done if self._first is None else self._first
            if now < self._next and done < total:
                return
            if done >= total and not (self.is_terminal or self._shown):
                return
            self._next = now + (0.2 if self.is_terminal else 10.0)
            rate = (done - self._first) / max(now - self.started, 1e-9)
            left = f"{_duration((total - done) / rate)} left" if rate > 0 else "time left unknown"
            text = (
                f"{self.label}: {done / 1e9:.2f} of {total / 1e9:.2f} GB ({100 * done / max(total, 1):.0f} %), "
                f"{rate / 1e9:.2f} GB/s, {left}"
            )
            self._shown = True
            print(
                f"\r\x1b[K{text}" if self.is_terminal else text, end="" if self.is_terminal else "\n", file=sys.stderr
            )
            sys.stderr.flush()

    def close(self) -> None:
        """End the line on a terminal."""
        if self.is_terminal and self._shown:
            print(file=sys.stderr)
            self._shown = False


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
