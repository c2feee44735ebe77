"""What a person sees of a long run: a bar with the numbers that matter, or plain lines."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm


def note(text: str, quiet: bool) -> None:
    """Print `text` on a line of its own that does not break the progress bar."""
    if not quiet:
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


# Called with (parts done, parts in all).
Report = Callable[[int, int], None]
# Least time between two lines where there is no terminal.
SECONDS_A_LINE = 10.0


@contextlib.contextmanager
def reporting(what: str, tokens: int, quiet: bool, unit: str = "batch") -> Iterator[Report]:
    """Show what is being done on how many tokens, then its progress and the time left.

    Yields the function that the work calls after each part. Shows nothing if `quiet`.
    """
    note(f"{what} on {tokens:,} tokens", quiet)
    began = said = time.monotonic()
    progress: Progress | None = None

    def report(done: int, total: int) -> None:
        nonlocal progress, said
        if progress is None:
            progress = Progress(total, quiet=quiet, unit=unit, name=what)
            progress.started = began
        progress.advance()
        if done == total or time.monotonic() - said >= SECONDS_A_LINE:
            said = time.monotonic()
            progress.show(done, "")

    try:
        yield report
    finally:
        if progress is not None:
            progress.close()


class Progress:
    """The latest numbers and the time left.

    A bar where standard error is a terminal, a line per logged row where it is not.
    """

    def __init__(
        self,
        total_steps: int,
        done: int = 0,
        quiet: bool = False,
        unit: str = "step",
        name: str = "maskprune",
    ) -> None:
        self.total, self.first, self.started = total_steps, done, time.monotonic()
        self.quiet, self.unit = quiet, unit
        self.bar: tqdm | None = None
        if not quiet and sys.stderr.isatty():
            self.bar = tqdm(
                total=total_steps, initial=done, desc=name, unit=unit, dynamic_ncols=True
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

    def skip(self, seconds: float) -> None:
        """Exclude `seconds` of other work than steps from the time left."""
        self.started += seconds
        if self.bar is not None:
            self.bar.start_t += seconds
            self.bar.last_print_t += seconds

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.close()
