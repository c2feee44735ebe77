"""Peak memory of a pruning run, phase by phase: what each holds at its highest, in resident set.

    python -m benchmarks.quality.memory -- smollm2-135m --sparsity 0.2 --seq-len 512 --batch-size 1
    python -m benchmarks.quality.memory --demo

Runs `maskprune prune` with what follows `--`, or the demo, in this process, for a few steps, and
writes a row per phase and one of the whole. A phase's peak includes what was there before it. Linux
only: the kernel counts.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import environment, fix_threads, show, write_rows
from benchmarks.harness.memory import restart_peak, status_kib

# Phase: module and names of the functions that are it.
PHASES = {
    "load": ("maskprune.hf.load", "load_model"),
    "tokenise": ("maskprune.training.data", "token_blocks"),
    "ranking": ("maskprune.structured.saliency", "one_shot", "warm_start"),
    "compensation": ("maskprune.structured.compensation", "compensate"),
    "export": ("maskprune.structured.export", "export"),
    "write": ("maskprune.hf.checkpoint_files", "save_stock"),
    "proof": ("maskprune.hf.equality", "compare_logits"),
}
COLUMNS = ("run", "phase", "peak_rss_gb", "before_gb", "seconds")


class Phases:
    """Peak resident set and seconds of phases, which may lie in one another."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self.open: list[str] = []
        self.highest = 0.0

    def _note(self) -> None:
        """What was held since the last note is the innermost open phase's."""
        peak = status_kib("VmHWM") * 1024 / 1e9
        self.highest = max(self.highest, peak)
        if self.open:
            phase = self.found[self.open[-1]]
            phase["peak_rss_gb"] = max(phase["peak_rss_gb"], peak)
        restart_peak()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs within as `name`."""
        self._note()
        before = status_kib("VmRSS") * 1024 / 1e9
        row = {"peak_rss_gb": 0.0, "before_gb": before, "seconds": 0.0}
        self.found.setdefault(name, row)
        self.open.append(name)
        began = time.monotonic()
        try:
            yield
        finally:
            self._note()
            self.found[name]["seconds"] += time.monotonic() - began
            self.open.pop()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as the phase `name`."""

        @functools.wraps(function)
        def counted(*arguments: Any, **keywords: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **keywords)

        return counted


@contextlib.contextmanager
def counted_phases() -> Iterator[Phases]:
    """The functions of `PHASES`, wherever they were imported to, and Trainer's loop count."""
    from transformers import Trainer

    phases = Phases()
    with contextlib.ExitStack() as undo:

        def replace(owner: Any, name: str, new: Any) -> None:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, new)

        for module in ("commands.prune", "commands.demo", "structured.prune"):
            importlib.import_module(f"maskprune.{module}")
        functions = [
            (phase, getattr(importlib.import_module(module), name))
            for phase, (module, *names) in PHASES.items()
            for name in names
        ]
        for phase, function in functions:
            counted = phases.wrap(phase, function)
            for owner in [m for n, m in sys.modules.items() if n.startswith("maskprune")]:
                for attribute, value in list(vars(owner).items()):
                    if value is function:
                        replace(owner, attribute, counted)
        replace(Trainer, "train", phases.wrap("training", Trainer.train))
        yield phases


def measure(arguments: list[str] | None, steps: int) -> dict[str, dict[str, float]]:
    """The phases of `maskprune prune arguments`, or of the demo where None, in order of time."""
    from maskprune.cli import main as maskprune
    from maskprune.commands.demo import main as demo

    with counted_phases() as phases, tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out")
        restart_peak()
        began = time.monotonic()
        if arguments is None:
            code = demo(["-o", out, "--steps", str(steps)])
        else:
            code = maskprune(["prune", *arguments, "--steps", str(steps), "-o", out])
        seconds = time.monotonic() - began
        phases._note()
    if code:
        raise SystemExit(code)
    whole = {"peak_rss_gb": phases.highest, "before_gb": 0.0, "seconds": seconds}
    return phases.found | {"all": whole}


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", action="store_true", help="the demo, not a prune of arguments")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("arguments", nargs="*", help="of maskprune prune, after --")
    args = parser.parse_args(given)
    fix_threads(args.threads)
    if args.demo == bool(args.arguments):
        parser.error("expected --demo, or -- and the arguments of maskprune prune")
    found = measure(None if args.demo else args.arguments, args.steps)
    run = "demo" if args.demo else f"prune {' '.join(args.arguments)}"
    rows = [
        {
            "op": "memory",
            "provider": "maskprune",
            "run": f"{run} --steps {args.steps}",
            "phase": phase,
            **{key: round(value, 3) for key, value in numbers.items()},
        }
        | environment("cpu", 0)
        for phase, numbers in found.items()
    ]
    print(show(rows, COLUMNS))
    if args.rows:
        measured = ("id", "date", "commit", "peak_rss_gb", "before_gb", "seconds")
        write_rows(args.rows, rows, overwrite=args.overwrite, ignore=measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
