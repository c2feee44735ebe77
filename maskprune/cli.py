"""The command line: one sub-command per job, errors in one line, exit code 2 for bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from maskprune.config import (
    CheckConfig,
    EvalConfig,
    ExportConfig,
    PlanConfig,
    PruneConfig,
    PruneFiles,
    ReportConfig,
    SparsifyConfig,
    SparsifyFiles,
)
from maskprune.version import __version__

USAGE = f"""maskprune {__version__}: structured pruning to a stock, uniform, proven checkpoint

usage: maskprune COMMAND ... ; maskprune COMMAND --help shows its flags

  info                                  backends, versions, devices
  plan   MODEL --sparsity 0.2           the shape to come, without training
  prune  MODEL -o OUT --sparsity 0.2    learn the masks, write a stock checkpoint
  sparsify MODEL -o OUT                 2:4: two of every four weights at zero, masks learned
  export MODEL --masks FILE -o OUT      fold masks into a checkpoint on disk, streaming
  check  DIR                            is it stock, who loads it, does it equal its origin
  eval   MODEL --ppl FILE --tasks NAMES perplexity and lm-eval tasks
  report RUN                            the run's plots and tables as one page
"""


def parse(
    command: str, kinds: Sequence[Any], argv: Sequence[str], doc: str
) -> tuple[list[Any], dict[str, Any]]:
    """One dataclass per kind from flags and an optional `--config recipe.yaml`, flags first.

    The first field of the first kind is the positional argument. Unknown flags and keys are
    errors.
    """
    from transformers.hf_argparser import HfArgumentParser

    positional = dataclasses.fields(kinds[0])[0].name
    parser = HfArgumentParser(
        list(kinds), prog=f"maskprune {command}", description=doc, allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML file with the same keys; flags override it.")
    arguments, recipe = [], {}
    for a in argv:
        arguments += a.split("=", 1) if a.startswith("--config=") else [a]
    if "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 >= len(arguments):
            raise ValueError("--config needs a file; expected --config recipe.yaml")
        recipe = _read_recipe(arguments[at + 1], kinds)
        del arguments[at : at + 2]
    if arguments and not arguments[0].startswith("-"):
        arguments[:1] = [f"--{positional}", arguments[0]]
    given = {a.partition("=")[0] for a in arguments if a.startswith("-")}
    for key, value in recipe.items():
        dashed = key.replace("_", "-")
        names = {f"--{key}", f"--{dashed}", f"--no_{key}", f"--no-{dashed}"}
        if key == "output":
            names.add("-o")
        if not names & given and value is not None:
            arguments += [f"--{key}", str(value)]
    *values, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    values = [v for v in values if dataclasses.is_dataclass(v)]
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}; see maskprune {command} --help")
    return values, recipe


def _read_recipe(path: str, kinds: Sequence[type]) -> dict[str, Any]:
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
    return recipe


def info(argv: Sequence[str]) -> int:
    """`maskprune info`."""
    import torch

    from maskprune.commands.run_folder import versions
    from maskprune.ops.backend import unavailable

    for name, found in versions().items():
        print(f"{name:14} {found}")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    print(f"{'device':14} {torch.cuda.get_device_name() if cuda else 'cpu'}")
    print(f"{'threads':14} {torch.get_num_threads()}")
    for backend, where in (("cpp", torch.device("cpu")), ("triton", device)):
        print(f"{'backend ' + backend:14} {unavailable(backend, where) or 'available'}")
    return 0


def plan(argv: Sequence[str]) -> int:
    """`maskprune plan`."""
    (settings,), _ = parse("plan", [PlanConfig], argv, "The shape to come, from config.json alone.")
    from maskprune.commands.run_folder import read_config
    from maskprune.structured.budget import Budget
    from maskprune.structured.plan import plan as make
    from maskprune.structured.plan import render

    config = read_config(settings.model)
    if not settings.two_four:
        asked = ("sparsity", "head_sparsity", "ffn_sparsity", "head_unit", "multiple_of")
        options = {name: getattr(settings, name) for name in (*asked, "arch_fallback")}
        print(render(make(config, Budget(config, **options), settings.targets)))
    if settings.gpus is not None:
        from maskprune.training.memory_plan import Load, render_memory

        names = [f.name for f in dataclasses.fields(Load) if f.name != "computed"]
        load = Load(**{name: getattr(settings, name) for name in names})
        print(render_memory(config, load, settings.gpus, settings.gpu_memory))
    return 0


def prune(argv: Sequence[str]) -> int:
    """`maskprune prune`."""
    (files, settings), _ = parse(
        "prune", [PruneFiles, PruneConfig], argv, "Learn the masks and write a stock checkpoint."
    )
    if files.output is None and not files.dry_run:
        raise ValueError("no output folder is given; pass -o OUT, or --dry-run to see the plan")
    from maskprune.commands.prune import run_prune
    from maskprune.training.allocator import return_freed_memory

    return_freed_memory()

    _tell(
        run_prune(
            files.model,
            Path(files.output or "."),
            settings,
            data=files.data,
            resume=files.resume,
            overwrite=files.overwrite,
            dry_run=files.dry_run,
            max_shard_size=files.max_shard_size,
        )
    )
    return 0


def sparsify(argv: Sequence[str]) -> int:
    """`maskprune sparsify`."""
    (files, settings), _ = parse(
        "sparsify",
        [SparsifyFiles, SparsifyConfig],
        argv,
        "Learn 2:4 masks (MaskLLM), or choose them at once, and write a stock checkpoint.",
    )
    from maskprune.commands.sparsify import run_sparsify
    from maskprune.training.allocator import return_freed_memory

    return_freed_memory()

    _tell(
        run_sparsify(
            files.model,
            Path(files.output),
            settings,
            data=files.data,
            masks=files.masks,
            resume=files.resume,
            overwrite=files.overwrite,
            max_shard_size=files.max_shard_size,
        )
    )
    return 0


def export(argv: Sequence[str]) -> int:
    """`maskprune export`."""
    (settings,), _ = parse("export", [ExportConfig], argv, "Fold masks into a checkpoint on disk.")
    from maskprune.streaming.export import export_checkpoint

    options = dataclasses.asdict(settings)
    done = export_checkpoint(
        options.pop("model"), options.pop("masks"), options.pop("output"), **options
    )
    print(done)
    return 0


def check(argv: Sequence[str]) -> int:
    """`maskprune check`; exit code 1 where a check fails."""
    (settings,), _ = parse("check", [CheckConfig], argv, "Is this folder a stock checkpoint?")
    from maskprune.commands.check import check as run

    found = run(
        settings.folder,
        against=settings.against,
        masks_file=settings.masks,
        targets=settings.targets,
    )
    for mark, lines in (("ok  ", found.good), ("note", found.notes), ("FAIL", found.bad)):
        for line in lines:
            print(f"{mark}  {line}")
    return 1 if found.bad else 0


def evaluate(argv: Sequence[str]) -> int:
    """`maskprune eval`."""
    (settings,), _ = parse("eval", [EvalConfig], argv, "Perplexity by windows, and lm-eval tasks.")
    import json

    from maskprune.commands.evaluate import evaluate as run

    print(json.dumps(run(settings), indent=2))
    return 0


def report(argv: Sequence[str]) -> int:
    """`maskprune report`."""
    (settings,), _ = parse("report", [ReportConfig], argv, "The run's plots and tables.")
    from maskprune.commands.report import report as run

    print(run(settings.run))
    return 0


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _tell(text: str) -> None:
    """Print what a command says, once of all processes."""
    if _processes() == 1 or os.environ.get("RANK", "0") == "0":
        print(text)


def _together() -> contextlib.AbstractContextManager[None]:
    """Under torchrun one process tells an error, and all end; torch is not loaded for less."""
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
    except KeyboardInterrupt:
        print(
            f"maskprune {name}: interrupted; a pruning run continues with --resume",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
