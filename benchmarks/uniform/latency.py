"""What uniform structure gains: dense, uniform and heterogeneous models timed in turn.

python benchmarks/latency.py                                   something useful in minutes
python benchmarks/latency.py --model smollm2-135m --sparsity 0.2,0.5 --regimes prefill,decode
python benchmarks/latency.py --compare before.jsonl after.jsonl
python benchmarks/latency.py --profile --model wide-1024       where a prefill's time goes
python benchmarks/latency.py --doc docs/uniform.md --from rows.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.harness import NOISE_LIMIT, Parser, fix_threads, noise, show, write_rows
from benchmarks.harness.rows import MEASURED
from benchmarks.uniform import breakdown, estimate, verdicts
from benchmarks.uniform.page import render
from benchmarks.uniform.plots import draw
from benchmarks.uniform.regimes import MODES, REGIMES
from benchmarks.uniform.shapes import NAMES, cost_of, named_config
from benchmarks.uniform.sweep import Plan, groups, needed_bytes, sweep
from benchmarks.uniform.variants import VARIANTS, widths_of

IGNORED = (*MEASURED, *verdicts.DERIVED)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def listed(
    kind: Callable[[str], Any], among: tuple[str, ...] | None = None
) -> Callable[[str], Any]:
    """An argparse type: values separated by commas, each of `kind`, and one of `among`."""

    def parse(text: str) -> tuple[Any, ...]:
        try:
            values = tuple(kind(part.strip()) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} given; expected one or more {kind.__name__} separated by commas"
            ) from None
        for value in values:
            if among and value not in among:
                raise argparse.ArgumentTypeError(
                    f"{value!r} is unknown; expected some of {', '.join(among)}"
                )
            if not isinstance(value, str) and value <= 0:
                raise argparse.ArgumentTypeError(f"{value} given; expected a number above 0")
        return values

    return parse


def parser() -> Parser:
    """The command line."""
    p = Parser(
        prog="latency.py",
        description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(rounds=None)
    p.add_argument("--model", type=listed(str), help=f"{', '.join(NAMES)}, or folders")
    p.add_argument("--sparsity", type=listed(float), help="shares of the layers' weights, e.g. 0.5")
    p.add_argument("--variants", type=listed(str, VARIANTS), help=", ".join(VARIANTS))
    p.add_argument("--regimes", type=listed(str, REGIMES), help=", ".join(REGIMES))
    p.add_argument("--modes", type=listed(str, MODES), help=", ".join(MODES))
    p.add_argument("--batch", type=listed(int), help="batches of prefill and training")
    p.add_argument("--length", type=listed(int), help="lengths of prefill and training")
    p.add_argument("--decode-batch", type=listed(int), help="batches of decode")
    p.add_argument("--context", type=listed(int), help="tokens in the KV cache of decode")
    p.add_argument("--multiple-of", type=int, help="FFN widths are multiples of it")
    p.add_argument("--dtype", choices=DTYPES, help="default float32 on a CPU, bfloat16 on a GPU")
    p.add_argument("--seconds", type=float, help="most seconds a case is timed")
    p.add_argument("--no-structure", action="store_true", help="times only, no structural facts")
    p.add_argument("--out", type=Path, help="default runs/latency-<date>")
    p.add_argument("--dry-run", action="store_true", help="shapes and cases, nothing measured")
    p.add_argument("--profile", action="store_true", help="parts of one prefill, nothing else")
    p.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two rows files")
    p.add_argument("--doc", type=Path, help="page whose tables are filled in from --from")
    p.add_argument("--from", dest="source", type=Path, nargs="+", help="rows files for --doc")
    return p


def plans_of(args: argparse.Namespace) -> list[Plan]:
    """What the arguments ask for; without a model, cases that suit the device."""
    gpu = args.device.startswith("cuda")
    given = {
        "sparsities": args.sparsity,
        "variants": args.variants,
        "regimes": args.regimes,
        "modes": args.modes,
        "batches": args.batch,
        "lengths": args.length,
        "decode_batches": args.decode_batch,
        "contexts": args.context,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "train_rounds": args.rounds,
        "train_seconds": args.seconds,
        "multiple_of": args.multiple_of,
    }
    common = {
        "device": args.device,
        "seed": args.seed,
        "dtype": DTYPES[args.dtype or ("bfloat16" if gpu else "float32")],
        "structure": not args.no_structure,
        "variants": VARIANTS,
        "regimes": REGIMES,
    }
    if gpu:
        sizes = {
            "batches": (1, 8),
            "lengths": (512, 2048),
            "decode_batches": (1, 4, 16, 64),
            "contexts": (1024,),
            "modes": ("eager", "regional", "cudagraph"),
            "rounds": 20,
        }
        presets = [{"models": ("llama-3.2-1b", "llama-7b"), **sizes}]
    else:
        wide = {
            "models": ("wide-1024",),
            "regimes": ("prefill", "decode"),
            "lengths": (128,),
            "decode_batches": (1, 8),
            "seconds": 3.0,
            "load": False,
        }
        step = {**wide, "regimes": ("train",), "sparsities": (0.5,), "lengths": (64,)}
        step |= {"variants": ("dense", "uniform", "compresso"), "structure": False}
        step["train_seconds"] = 15.0
        compiled = {
            "models": ("tiny",),
            "sparsities": (0.5,),
            "regimes": ("prefill",),
            "modes": ("eager", "regional"),
            "lengths": (128,),
        }
        presets = [wide, step, compiled]
    chosen = {key: value for key, value in given.items() if value is not None}
    if args.model:
        presets = [{**presets[0], "models": args.model, "regimes": REGIMES, "load": True}]
    return [Plan(**{**common, **preset, **chosen}) for preset in presets]


def check_arguments(p: Parser, args: argparse.Namespace) -> None:
    """Refuse, in one line, bad arguments that argparse does not notice."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        p.error(f"--device {args.device}: torch sees no GPU here; use --device cpu")
    for value in args.sparsity or ():
        if not 0 < value < 1:
            p.error(f"--sparsity {value}: expected a number between 0 and 1, like 0.5")
    if (args.doc is None) != (args.source is None):
        p.error("--doc and --from go together: the page, and the rows files it is filled from")
    for path in (*(args.compare or ()), *(args.source or ())):
        if not path.is_file():
            p.error(f"{path}: no such file; expected rows that a run wrote (rows.jsonl)")
    if args.out and args.out.exists() and any(args.out.iterdir()):
        p.error(f"--out {args.out}: exists and is not empty; choose another")


def dry_run(plans: list[Plan]) -> None:
    """Print the shapes and the number of cases of each plan."""
    for plan in plans:
        for name in plan.models:
            config = named_config(name)
            for sparsity in plan.sparsities:
                rows = []
                widths = widths_of(config, sparsity, plan.multiple_of, plan.seed)
                costs = {v: cost_of(config, w) for v, w in widths.items()}
                for variant in plan.variants:
                    w, cost = widths[variant], costs[variant]
                    rows.append(
                        {
                            "variant": variant,
                            "heads": span(w.heads),
                            "kv_heads": span(w.kv_heads),
                            "ffn": span(w.ffn),
                            "M parameters": round(cost.parameters / 1e6, 2),
                            "M in layers": round(cost.layer_parameters / 1e6, 2),
                            "distinct layers": w.distinct_layers,
                        }
                    )
                need = needed_bytes(plan, [costs[v] for v in plan.variants]) / 2**30
                fits = "" if groups(plan, costs) else ", too large for this device: skipped"
                print(f"\n{name}, sparsity {sparsity:g}, {need:.2f} GiB{fits}")
                print(show(rows, rows[0]))
        print(f"\ncases per model and sparsity: {len(plan.cases())}")
        for case in plan.cases():
            print("  {} {} batch {} length {}".format(*case))


def span(values: tuple[int, ...]) -> str:
    """`16`, or `2..27` where layers differ."""
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)}..{max(values)}"


def collect(plans: list[Plan], rows: list[dict[str, Any]]) -> None:
    """Run the plans into `rows`, with a progress bar, or plain lines where there is no terminal."""
    steps = sum(len(p.models) * len(p.sparsities) * len(p.cases()) for p in plans)
    seen: set[tuple[Any, ...]] = set()
    plain = not sys.stderr.isatty()
    with tqdm(total=steps, unit="case", disable=plain) as bar:
        for plan in plans:
            for row in sweep(plan):
                rows.append(row)
                keys = ("model", "sparsity", "regime", "mode", "batch", "length")
                case = tuple(row.get(key) for key in keys)
                if row["op"] != "latency" or case in seen:
                    continue
                seen.add(case)
                text = " ".join(str(part) for part in case if part is not None)
                bar.set_postfix_str(text)
                bar.update(1 if row.get("regime") else len(plan.cases()))
                if plain:
                    print(f"{len(seen)}/{steps} {text}", file=sys.stderr)


def quieten() -> None:
    """Keep transformers' and PEFT's notices about models built on purpose out of the tables."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    p = parser()
    args = p.parse_args(argv)
    check_arguments(p, args)
    if args.compare:
        print(verdicts.compare(*args.compare))
        return 0
    if args.doc:
        render(args.doc, args.source)
        return 0
    fix_threads(args.threads)
    quieten()
    plans = plans_of(args)
    rows: list[dict[str, Any]] = []
    try:
        for plan in plans:
            for name in plan.models:
                for sparsity in plan.sparsities:
                    widths_of(named_config(name), sparsity, plan.multiple_of, plan.seed)
    except (ValueError, RuntimeError) as error:
        p.error(" ".join(str(error).split()))
    if args.dry_run:
        dry_run(plans)
        return 0
    if args.profile:
        plan = dataclasses.replace(plans[0], rounds=args.rounds or 20)
        rows = list(breakdown.profile(plan, args.variants or ("dense", "uniform")))
        if args.rows:
            rows = write_rows(args.rows, rows, overwrite=args.overwrite, ignore=IGNORED)
        print(breakdown.report(rows))
        return 0
    a = torch.randn(512, 512, device=args.device)
    apart = noise(lambda: a @ a, device=args.device)
    if apart > NOISE_LIMIT:
        print(
            f"a matrix product against itself differs by {apart:.1%}, more than {NOISE_LIMIT:.0%}: "
            "this machine is too noisy; noisy rows are marked and give no ratio",
            file=sys.stderr,
        )
    status = 0
    speed = estimate.speeds(args.device, plans[0].dtype)
    minutes = sum(estimate.seconds(plan, speed) for plan in plans) / 60
    print(f"about {minutes:.1f} minutes, up to thrice that where it is noisy", file=sys.stderr)
    try:
        collect(plans, rows)
    except KeyboardInterrupt:
        status = 130
        print("interrupted; the cases measured so far are kept", file=sys.stderr)
    except RuntimeError as error:
        status = 1
        print(f"latency.py: {' '.join(str(error).split())}", file=sys.stderr)
    if not rows:
        return status
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    out = args.out or Path("runs") / f"latency-{stamp}"
    rows = write_rows(out / "rows.jsonl", rows)
    if args.rows:
        write_rows(args.rows, rows, overwrite=args.overwrite, ignore=IGNORED)
    print(verdicts.report(rows))
    pictures = draw(rows, out)
    print(f"\nrows: {out / 'rows.jsonl'}")
    print("plots:", ", ".join(str(path) for path in pictures) or "none")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
