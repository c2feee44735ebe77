"""gumbel_two_four against torch: the masked weight of a 2:4 sample, and the logits' gradient.

    python -m benchmarks.ops.two_four --rows benchmarks/results/two_four.jsonl

Forward and backward are timed apart. `eager` is MaskLLM's own order of steps, on its layout (one
row of six logits per group) with torch's generator for the noise; `definition` is the fused
operation's, noise included, step by step; `compiled` is torch.compile of that. GB/s count each
tensor once (forward: weight, logits, masked weight; backward: gradient, weight, logits, their
gradient), `of_copy` is their share of the copy bandwidth measured in the same run. `eager` draws
other noise, so its check is of norms, not of values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Parser, copy_bandwidth, fix_threads, measure, show, write_rows
from maskprune import ops
from maskprune.ops.gumbel_two_four import SLOTS, reference

# On a CPU SmolLM2's up_proj and a 7B's o_proj: the float64 check of larger ones takes much memory.
SHAPES = {"cpu": ((1536, 576), (4096, 4096)), "cuda": ((4096, 4096), (11008, 4096))}
DTYPES = (torch.bfloat16, torch.float32)
# Limit of one case's rounds; on a CPU the definition takes seconds a call.
MAX_SECONDS = 30.0
KAPPA, TAU = 100.0, 4.0
# Largest error over the largest value; every provider but `eager` rounds the result once.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7}
COLUMNS = (
    *("op", "direction", "dtype", "size", "provider", "median_ms", "p10_ms", "p90_ms"),
    *("gb_s", "of_copy"),
)
Result = tuple[torch.Tensor, torch.Tensor]


def eager_on(device: str) -> Callable[..., Result]:
    """MaskLLM's forward as its code has it: logits (groups, 6), Gumbel noise of torch."""
    candidates = torch.zeros(6, 4, device=device)
    for k, pair in enumerate(SLOTS):
        candidates[k, list(pair)] = 1.0

    def eager(W: torch.Tensor, gate: torch.Tensor, *scalars: torch.Tensor) -> Result:
        _, kappa, tau = scalars
        g = -torch.empty_like(gate).exponential_().log()
        p = torch.softmax((gate * kappa + g) / tau, -1)
        mask = (p @ candidates).view(W.shape)
        masked = W * mask.to(W.dtype)
        return masked, masked.float().square().sum()

    return eager


def rows(device: str, seed: int, rounds: int) -> list[dict[str, Any]]:
    """Forward and backward by every provider."""
    from torch._functorch import config

    # Backward is timed alone, again and again on one graph: its inputs must survive it.
    config.donated_buffer = False
    generator = torch.Generator(device).manual_seed(seed)
    copy, results = copy_bandwidth(device), []
    cases = [(shape, dtype) for shape in SHAPES[device.partition(":")[0]] for dtype in DTYPES]
    for (outputs, inputs), dtype in cases:
        W = torch.randn(outputs, inputs, generator=generator, device=device).to(dtype)
        dmasked = torch.randn(outputs, inputs, generator=generator, device=device).to(dtype)
        logits = 0.01 * torch.randn(6, outputs, inputs // 4, generator=generator, device=device)
        grads = (dmasked, torch.full((), 1e-3, device=device))
        scalars = [torch.tensor(v, device=device) for v in (seed, KAPPA, TAU)]
        planar = logits.clone().requires_grad_()
        grouped = logits.flatten(1).T.contiguous().requires_grad_()
        functions: dict[str, tuple[Callable[..., Result], torch.Tensor]] = {
            "eager": (eager_on(device), grouped),
            "definition": (reference, planar),
            "compiled": (torch.compile(reference), planar),
            "fused": (ops.gumbel_two_four, planar),
        }
        exact = logits.double().requires_grad_()
        wide = [s.double() if s.is_floating_point() else s for s in scalars]
        expected = reference(W.double(), exact, *wide)
        (gradient,) = torch.autograd.grad(expected, exact, [g.double() for g in grads])
        expected = tuple(x.detach() for x in expected)
        graphs = {n: f(W, leaf, *scalars) for n, (f, leaf) in functions.items()}

        def forward(
            function: Callable[..., Result],
            leaf: torch.Tensor,
            W: Any = W,
            scalars: Any = scalars,
        ) -> Result:
            with torch.no_grad():
                return function(W, leaf, *scalars)

        def backward(outputs: Result, leaf: torch.Tensor, grads: Any = grads) -> Any:
            return torch.autograd.grad(outputs, leaf, grads, retain_graph=True)

        logit_bytes, weight_bytes = 4 * logits.numel(), W.numel() * W.element_size()
        directions: dict[str, tuple[dict[str, Callable[[], Any]], Any, int]] = {
            "forward": (
                {n: lambda f=f, leaf=leaf: forward(f, leaf) for n, (f, leaf) in functions.items()},
                expected,
                2 * weight_bytes + logit_bytes,
            ),
            "backward": (
                {
                    n: lambda out=graphs[n], leaf=leaf: backward(out, leaf)
                    for n, (_, leaf) in functions.items()
                },
                (gradient,),
                2 * weight_bytes + 2 * logit_bytes,
            ),
        }
        for direction, (providers, wanted, moved) in directions.items():

            def check(name: str, output: Any, wanted: Any = wanted, dtype: Any = dtype) -> None:
                for got, want in zip(output, wanted, strict=True):
                    if name == "eager":
                        ratio = got.double().norm() / want.norm()
                        assert abs(ratio - 1) < 0.01, f"norm is {ratio:.3g} of the expected"
                    else:
                        error = ((got.double() - want).abs().max() / want.abs().max()).item()
                        assert error <= TOLERANCE[dtype], f"error {error:.3g}"

            sizes = {"direction": direction, "dtype": str(dtype)[6:], "O": outputs, "I": inputs}
            timed = measure(
                "gumbel_two_four",
                providers,
                check=check,
                sizes=sizes,
                bytes_moved=moved,
                device=device,
                seed=seed,
                rounds=rounds,
                warmup=1,
                max_seconds=MAX_SECONDS,
            )
            results += [
                row
                | {
                    "size": f"{outputs}x{inputs}",
                    "copy_gb_s": copy,
                    "of_copy": round(row["gb_s"] / copy, 3),
                }
                for row in timed
            ]
        torch._dynamo.reset()
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    args = parser.parse_args(arguments)
    fix_threads(args.threads)
    results = rows(args.device, args.seed, args.rounds)
    print(show(results, COLUMNS))
    if args.rows:
        write_rows(args.rows, results, overwrite=args.overwrite)
    return 0


if __name__ == "__main__":
    sys.exit(main())
