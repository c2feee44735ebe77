"""The command line: one sub-command per job, errors in one line, exit code 2 for bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from maskprune.config import (
    CheckConfig,
    ConvertConfig,
    EvalConfig,
    ExportConfig,
    PlanConfig,
    PruneConfig,
    PruneFiles,
    ReportConfig,
    RunFiles,
    SparsifyConfig,
    SparsifyFiles,
)
from maskprune.version import __version__

if TYPE_CHECKING:
    import argparse

USAGE = f"""maskprune {__version__}: structured pruning to a stock, uniform, proven checkpoint

usage: maskprune COMMAND ... ; maskprune COMMAND --help shows its flags

  info                                  backends, versions, devices
  plan   MODEL --sparsity 0.2           the shape to come, without training
  prune  MODEL -o OUT --sparsity 0.2    fewer heads and FFN units, as a stock checkpoint
  sparsify MODEL -o OUT                 2:4: two of every four weights at zero, masks learned
  export MODEL --masks FILE -o OUT      fold masks into a checkpoint on disk, streaming
  convert DIR -o FILE.gguf              one file for llama.cpp, quantised or not
  check  DIR                            is it stock, who loads it, does it equal its origin
  eval   MODEL --ppl FILE --tasks NAMES perplexity and lm-eval tasks
  report RUN                            the run's plots and tables as one page
"""


def parse(command: str, kinds: Sequence[Any], argv: Sequence[str], doc: str) -> list[Any]:
    """One instance per dataclass in `kinds`, from flags and an optional `--config recipe.yaml`.

    Flags override the recipe. The first field of the first kind is the positional argument.
    Unknown flags and keys are errors.
    """
    import argparse

    from transformers.hf_argparser import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(f"{message}; maskprune {command} --help shows the flags")

    parser = Parser(list(kinds), prog=f"maskprune {command}", description=doc, allow_abbrev=False)
    recipe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipe.error = parser.error  # type: ignore[method-assign]
    for each in (recipe, parser):
        each.add_argument("--config", help="YAML file with the same keys; flags override it.")
    path, arguments = recipe.parse_known_args(argv)
    if path.config is not None:
        _set_defaults(parser, _read_recipe(path.config, kinds))
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, f"--{dataclasses.fields(kinds[0])[0].name}")
    given, rest = parser.parse_known_args(arguments)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return [
        kind(**{field.name: getattr(given, field.name) for field in dataclasses.fields(kind)})
        for kind in kinds
    ]


def _set_defaults(parser: argparse.ArgumentParser, recipe: dict[str, object]) -> None:
    """Make a recipe's values the parser's defaults; a list becomes comma-separated text."""
    for key, value in recipe.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        parser.set_defaults(**{key: text})
    for action in parser._actions:
        if action.dest in recipe:
            action.required = False


def _read_recipe(path: str, kinds: Sequence[type]) -> dict[str, object]:
    import yaml

    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(
            f"recipe {path} could not be read ({str(error).partition(chr(10))[0]})"
        ) from None
    if not isinstance(recipe, dict):
        raise ValueError(
            f"recipe {path} is not a mapping of settings; expected lines like steps: 300"
        )
    known = {f.name for kind in kinds for f in dataclasses.fields(kind)}
    recipe = {str(key).replace("-", "_"): value for key, value in recipe.items()}
    if unknown := sorted(set(recipe) - known):
        raise ValueError(
            f"recipe {path} has unknown keys {', '.join(unknown)}; known are "
            f"{', '.join(sorted(known))}"
        )
    if nested := [key for key, value in recipe.items() if isinstance(value, dict)]:
        raise ValueError(f"recipe {path}: {nested[0]} is a mapping; expected one value")
    return {key: value for key, value in recipe.items() if value is not None}


def info(argv: Sequence[str]) -> int:
    """`maskprune info`."""
    import torch

    from maskprune.commands.record import versions
    from maskprune.ops.backend import unavailable

    for name, version in versions().items():
        print(f"{name:14} {version}")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    print(f"{'device':14} {torch.cuda.get_device_name() if cuda else 'cpu'}")
    print(f"{'threads':14} {torch.get_num_threads()}")
    for backend, where in (("cpp", torch.device("cpu")), ("triton", device)):
        print(f"{'backend ' + backend:14} {unavailable(backend, where) or 'available'}")
    return 0


def plan(argv: Sequence[str]) -> int:
    """`maskprune plan`."""
    (settings,) = parse("plan", [PlanConfig], argv, "The shape to come, from config.json alone.")
    from maskprune.commands.run_folder import read_config
    from maskprune.structured.budget import Budget
    from maskprune.structured.plan import plan as make
    from maskprune.structured.plan import render

    config = read_config(settings.model)
    if not settings.two_four:
        print(render(make(config, Budget.of(config, settings), settings.targets)))
    if settings.gpus is not None:
        from maskprune.training.memory_plan import load_of, render_memory

        load, memory = load_of(settings), settings.gpu_memory
        print(render_memory(config, load, settings.gpus, memory, settings.shard))
    return 0


def prune(argv: Sequence[str]) -> int:
    """`maskprune prune`."""
    files, settings = parse(
        "prune", [PruneFiles, PruneConfig], argv, "Learn the masks and write a stock checkpoint."
    )
    if not files.dry_run:
        _require_output(files)
    from maskprune.commands.prune import plan_prune, run_prune
    from maskprune.structured.plan import render
    from maskprune.training.allocator import return_freed_memory

    return_freed_memory()

    if files.dry_run:
        _tell(render(plan_prune(files.model, settings)))
    elif record := run_prune(files, settings):
        _tell(record.summary)
    return 0


def _require_output(files: RunFiles) -> None:
    if files.output is None:
        raise ValueError("no output folder is given; pass -o OUT")


def sparsify(argv: Sequence[str]) -> int:
    """`maskprune sparsify`."""
    files, settings = parse(
        "sparsify",
        [SparsifyFiles, SparsifyConfig],
        argv,
        "Learn 2:4 masks (MaskLLM), or choose them at once, and write a stock checkpoint.",
    )
    _require_output(files)
    from maskprune.commands.sparsify import run_sparsify
    from maskprune.training.allocator import return_freed_memory

    return_freed_memory()

    if record := run_sparsify(files, settings):
        _tell(record.summary)
    return 0


def export(argv: Sequence[str]) -> int:
    """`maskprune export`."""
    (settings,) = parse("export", [ExportConfig], argv, "Fold masks into a checkpoint on disk.")
    from maskprune.commands.record import left_out
    from maskprune.streaming.export import export_checkpoint

    options = dataclasses.asdict(settings)
    done = export_checkpoint(
        options.pop("model"), options.pop("masks"), options.pop("output"), **options
    )
    print(done)
    if settings.adapter is None and (note := left_out(settings.masks)):
        print(f"note: {note}", file=sys.stderr)
    return 0


def convert(argv: Sequence[str]) -> int:
    """`maskprune convert`."""
    (settings,) = parse(
        "convert", [ConvertConfig], argv, "A checkpoint folder to one GGUF file for llama.cpp."
    )
    from maskprune.commands.convert import convert as run

    options = dataclasses.asdict(settings)
    print(run(options.pop("folder"), options.pop("output"), **options))
    return 0


def check(argv: Sequence[str]) -> int:
    """`maskprune check`; exit code 1 where a check fails."""
    (settings,) = parse("check", [CheckConfig], argv, "Is this folder a stock checkpoint?")
    from maskprune.commands.check import check as run

    findings = run(
        settings.folder,
        against=settings.against,
        masks_file=settings.masks,
        targets=settings.targets,
    )
    for mark, lines in (("ok  ", findings.good), ("note", findings.notes), ("FAIL", findings.bad)):
        for line in lines:
            print(f"{mark}  {line}")
    return 1 if findings.bad else 0


def evaluate(argv: Sequence[str]) -> int:
    """`maskprune eval`."""
    (settings,) = parse("eval", [EvalConfig], argv, "Perplexity by windows, and lm-eval tasks.")
    import json

    from maskprune.commands.evaluate import evaluate as run

    print(json.dumps(run(settings), indent=2))
    return 0


def report(argv: Sequence[str]) -> int:
    """`maskprune report`."""
    (settings,) = parse("report", [ReportConfig], argv, "The run's plots and tables.")
    from maskprune.commands.report import report as run

    print(run(settings.run))
    return 0


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _tell(text: str, to: TextIO | None = None) -> None:
    """Print `text`; of several processes only rank 0 does."""
    if _processes() == 1 or os.environ.get("RANK", "0") == "0":
        print(text, file=to)


def _together() -> contextlib.AbstractContextManager[None]:
    """Under torchrun one process reports an error and all end; else torch is not loaded for it."""
    if _processes() == 1:
        return contextlib.nullcontext()
    from maskprune.training.distributed import session

    return session()


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "info": info,
    "plan": plan,
    "prune": prune,
    "sparsify": sparsify,
    "export": export,
    "convert": convert,
    "check": check,
    "eval": evaluate,
    "report": report,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; bad input is one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"maskprune: no command {name!r}; expected {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        with _together():
            return COMMANDS[name](rest)
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError and not known:
            raise
        text = " ".join(str(error).split())
        if known or "can't allocate memory" in text:
            reason = ". ".join(text.split(". ")[:2]) or "of the host"
            text = (
                f"out of memory ({reason}); ask for less at once with --batch-size, --seq-len or "
                "--gradient-checkpointing"
            )
        print(f"maskprune {name}: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        # A run says whether it can go on, see `training.interrupt`.
        _tell(f"maskprune {name}: {str(stop) or 'interrupted'}", sys.stderr)
        return 128 + getattr(stop, "signum", signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
