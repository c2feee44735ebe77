"""linear_kl against the KL of whole logits: time of forward and backward, and memory at the peak.

    python -m benchmarks.ops.linear_kl

From hidden states to their gradient, with the frozen head of SmolLM2-135M on a CPU, of Llama-3-8B
on a GPU. `whole` computes both models' logits and takes `token_kl` of them;
`autograd` is the definition in plain torch. Names with `+ lm` have 0.3 of next-token cross entropy
in the loss as well: `chunks + lm` is `linear_distillation`. `peak_mib` is what one call adds;
`of_whole` the median over rounds of a provider's time over that of `whole` in the same round.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from benchmarks.harness import (
    Parser,
    environment,
    fix_threads,
    interleaved,
    ratio,
    show,
    write_rows,
)
from benchmarks.harness.memory import peak_mib
from maskprune.ops import linear_distillation, linear_kl
from maskprune.ops.linear_kl import distillation_reference, reference
from maskprune.training.losses import token_kl

# Tokens, hidden size, vocabulary.
SIZES = {
    "cpu": ((512, 576, 49_152), (2048, 576, 49_152)),
    "cuda": ((8192, 4096, 128_256),),
}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
# Largest error of the gradient over its largest value, against `reference` in float32.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
COLUMNS = (
    *("tokens", "hidden", "vocabulary", "dtype", "provider"),
    *("median_ms", "p10_ms", "p90_ms", "of_whole", "peak_mib"),
)
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def whole(s: torch.Tensor, t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return token_kl(functional.linear(s, weight), functional.linear(t, weight))


LM_WEIGHT = 0.3


def targets(s: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(s), device=s.device)


def whole_lm(s: torch.Tensor, t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    z = functional.linear(s, weight)
    lm = functional.cross_entropy(z.float(), targets(s))
    return (1 - LM_WEIGHT) * token_kl(z, functional.linear(t, weight)) + LM_WEIGHT * lm


def reference_lm(s: torch.Tensor, t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return distillation_reference(s, t, weight, targets(s), LM_WEIGHT)[0]


def chunks_lm(s: torch.Tensor, t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return linear_distillation(s, t, weight, targets(s), LM_WEIGHT)[0]


# Each with its definition.
PROVIDERS: dict[str, tuple[Loss, Loss]] = {
    "whole": (whole, reference),
    "autograd": (reference, reference),
    "chunks": (linear_kl, reference),
    "whole + lm": (whole_lm, reference_lm),
    "chunks + lm": (chunks_lm, reference_lm),
}


def rows(
    device: str, seed: int, rounds: int, most: int, dtypes: tuple[torch.dtype, ...]
) -> list[dict[str, Any]]:
    """A row for every size of at most `most` tokens, dtype and provider."""
    kind, results = device.split(":")[0], []
    generator = torch.Generator(device).manual_seed(seed)
    sizes = [size for size in SIZES[kind] if size[0] <= most]
    for dtype in dtypes or DTYPES[kind]:
        for tokens, hidden, vocabulary in sizes:
            s = torch.randn(tokens, hidden, generator=generator, device=device).to(dtype)
            # Nearer, the gradient would be of the size of what bfloat16 rounds off the logits.
            t = s + 0.5 * torch.randn(tokens, hidden, generator=generator, device=device).to(dtype)
            W = torch.randn(vocabulary, hidden, generator=generator, device=device).to(dtype)
            W *= 2 / hidden**0.5
            s.requires_grad_()

            def call(loss: Loss, s: Any = s, t: Any = t, W: Any = W) -> list[torch.Tensor]:
                value = loss(s, t, W)
                return [value.detach(), *torch.autograd.grad(value, s)]

            few = slice(0, 64)
            exact = s.detach()[few].float().requires_grad_()
            for name, (loss, definition) in PROVIDERS.items():
                value = definition(exact, t[few].float(), W.float())
                (expected,) = torch.autograd.grad(value, exact)
                head = s.detach()[few].requires_grad_()
                got, gradient = call(loss, head, t[few])
                error = (gradient.float() - expected).abs().max() / expected.abs().max()
                assert abs(got / value - 1) < 0.05 and error < TOLERANCE[dtype], (name, error)
            del exact, value, expected
            calls = {name: lambda loss=loss: call(loss) for name, (loss, _) in PROVIDERS.items()}
            times = interleaved(calls, device=device, seed=seed, rounds=rounds, warmup=1)
            for name, provider in calls.items():
                peak = peak_mib(provider, device)
                results.append(
                    {
                        "op": "linear_kl",
                        "provider": name,
                        "tokens": tokens,
                        "hidden": hidden,
                        "vocabulary": vocabulary,
                        "dtype": str(dtype)[6:],
                        **times[name].row(),
                        "of_whole": round(ratio([times[name]], [times["whole"]]), 3),
                        "peak_mib": None if peak is None else round(peak, 1),
                        "checked": True,
                    }
                    | environment(device, seed)
                )
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=2**20, help="leave out sizes of more tokens")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="one of them only")
    args = parser.parse_args(arguments)
    fix_threads(args.threads)
    dtypes = (getattr(torch, args.dtype),) if args.dtype else ()
    results = rows(args.device, args.seed, args.rounds, args.most, dtypes)
    print(show(results, COLUMNS))
    if args.rows:
        ignore = ("id", "date", "commit", "of_whole", "peak_mib", "median_ms", "p10_ms", "p90_ms")
        write_rows(args.rows, results, overwrite=args.overwrite, ignore=ignore)
    return 0


if __name__ == "__main__":
    sys.exit(main())
