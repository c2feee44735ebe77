"""What a person sees of a long run: a bar with the numbers that matter, or plain lines."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm


def note(text: str, quiet: bool) -> None:
    """What takes its time outside the steps, on a line that leaves the bar whole."""
    if not quiet:
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


class Progress:
    """The latest numbers and the time left.

    A bar where standard error is a terminal, a line per logged row where it is not.
    """

    def __init__(
        self, total_steps: int, done: int = 0, quiet: bool = False, unit: str = "step"
    ) -> None:
        self.total, self.first, self.started = total_steps, done, time.monotonic()
        self.quiet, self.unit = quiet, unit
        self.bar: Any = None
        if not quiet and sys.stderr.isatty():
            self.bar = tqdm(
                total=total_steps, initial=done, desc="maskprune", unit=unit, dynamic_ncols=True
            )

    def advance(self) -> None:
        """One optimizer step is done."""
        if self.bar is not None:
            self.bar.update()

    def show(self, done: int, text: str) -> None:
        """The latest numbers, after `done` steps."""
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif not self.quiet:
            per_step = (time.monotonic() - self.started) / max(1, done - self.first)
            seconds = int((self.total - done) * per_step)
            left = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
            line = " ".join(
                filter(None, (f"{self.unit} {done}/{self.total}", text, f"left {left}"))
            )
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.close()
