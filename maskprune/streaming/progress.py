"""Bytes done, speed and time left: a bar, or lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_EVERY_SECONDS = 10.0


class ByteProgress:
    """Context manager; `add(n)` after every `n` bytes. Silent unless `shown`."""

    def __init__(self, total: int, label: str, shown: bool = True) -> None:
        self.total, self.label, self.shown = total, label, shown
        self.done = 0
        self._bar: tqdm | None = None
        self._start = self._last = time.monotonic()

    def __enter__(self) -> ByteProgress:
        self._start = self._last = time.monotonic()
        if self.shown and sys.stderr.isatty():
            self._bar = tqdm(total=self.total, desc=self.label, unit="B", unit_scale=True)
        return self

    def add(self, n: int) -> None:
        """`n` more bytes are done."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        elif self.shown and time.monotonic() - self._last > LINE_EVERY_SECONDS:
            self._last = time.monotonic()
            self._line()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.shown and kind is None:
            self._line()

    def _line(self) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        speed = self.done / seconds
        left = (self.total - self.done) / speed if speed else float("inf")
        share = self.done / self.total if self.total else 1.0
        print(
            f"{self.label}: {share:.0%} of {self.total / 1e9:.2f} GB, {speed / 1e9:.2f} GB/s, "
            f"{left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
