"""masked_swiglu and scale_heads against torch, and a training step with masks against one without.

    python -m benchmarks.ops.masked_forward ops
    python -m benchmarks.ops.masked_forward train

`ops` times forward and backward apart, on CPU or CUDA sizes by the device; `eager` is the unfused
form that users write, `compiled` is torch.compile of it. GB/s count each tensor once (forward:
inputs and output; backward: gradient, inputs, gradients), `of_copy` is their share of the copy
bandwidth measured in the same run. `train` times one LoRA step of a random Llama: forward, loss,
backward, AdamW, and with masks also the minimax step. Its last two have half of the FFN units gone,
as after a one-shot choice: under masks that rest, and as `prune` trains, computing the rest alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.harness import Parser, copy_bandwidth, fix_threads, measure, show, write_rows
from maskprune import ops
from maskprune.structured.kept_units import compute_kept_units

Case = tuple[str, dict[str, int], tuple[torch.Tensor, ...], Callable[..., torch.Tensor], Any, int]
# (tokens, F) and (tokens, heads, head size); on CUDA the 7B, 70B and 405B shapes of LLaMA.
SWIGLU = {
    "cpu": ((2048, 1536), (512, 11008)),
    "cuda": ((8192, 11008), (8192, 28672), (8192, 53248)),
}
HEADS = {
    "cpu": ((2048, 9, 64), (2048, 32, 128)),
    "cuda": ((8192, 32, 128), (8192, 64, 128), (8192, 128, 128)),
}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
# Largest error over the largest value; eager bfloat16 rounds up to five times.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6 * 2.0**-8}
# Hidden size, layers, query heads, KV heads, FFN width, batch, tokens.
MODELS = {
    "cpu": {"SmolLM2-135M, 4 layers": (576, 4, 9, 3, 1536, 2, 256)},
    "cuda": {
        "SmolLM2-135M": (576, 30, 9, 3, 1536, 16, 512),
        "1B": (2048, 16, 32, 8, 8192, 4, 2048),
    },
}
OPS_COLUMNS = (
    *("op", "direction", "dtype", "size", "provider", "median_ms", "p10_ms", "p90_ms"),
    *("gb_s", "of_copy"),
)
TRAIN_COLUMNS = ("model", "provider", "median_ms", "p10_ms", "p90_ms", "over_lora")


KEPT_UNITS = "half gone, kept units alone"
HALF_GONE = ("half gone, under masks", KEPT_UNITS)


def eager_swiglu(gate: torch.Tensor, up: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (F.silu(gate) * up) * mask.to(gate.dtype)


def eager_heads(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x.unflatten(-1, (len(mask), -1)) * mask.to(x.dtype)[:, None]).flatten(-2)


def cases(kind: str, device: str, seed: int) -> list[Case]:
    """op, sizes, inputs with the mask last, eager form, fused op, tensors moved forward."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    every: list[Case] = []
    for dtype in DTYPES[kind]:
        for tokens, width in SWIGLU[kind]:
            pair = tuple(random(tokens, width, dtype=dtype) for _ in range(2))
            mask = torch.rand(width, generator=generator, device=device)
            sizes = {"T": tokens, "F": width}
            every.append(
                ("masked_swiglu", sizes, (*pair, mask), eager_swiglu, ops.masked_swiglu, 3)
            )
        for tokens, heads, size in HEADS[kind]:
            x = random(tokens, heads * size, dtype=dtype)
            mask = torch.rand(heads, generator=generator, device=device)
            sizes = {"T": tokens, "H": heads, "d_h": size}
            every.append(("scale_heads", sizes, (x, mask), eager_heads, ops.scale_heads, 2))
    return every


def op_rows(device: str, seed: int, rounds: int) -> list[dict[str, Any]]:
    """Forward and backward of both operations by every provider."""
    from torch._functorch import config

    # Backward is timed alone, again and again on one graph: its inputs must survive it.
    config.donated_buffer = False
    kind, copy, rows = device.split(":")[0], copy_bandwidth(device), []
    for op, sizes, inputs, eager, fused, moved in cases(kind, device, seed):
        functions = {"eager": eager, "compiled": torch.compile(eager), "fused": fused}
        dout = torch.randn_like(inputs[0])
        leaves = [x.requires_grad_() for x in inputs]
        doubles = [x.detach().double().requires_grad_() for x in inputs]
        exact = eager(*doubles)
        gradients = torch.autograd.grad(exact, doubles, dout.double())
        graphs = {name: function(*leaves) for name, function in functions.items()}

        def forward(function: Callable[..., torch.Tensor], leaves: Any = leaves) -> Any:
            with torch.no_grad():
                return (function(*leaves),)

        def backward(out: torch.Tensor, leaves: Any = leaves, dout: Any = dout) -> Any:
            return torch.autograd.grad(out, leaves, dout, retain_graph=True)

        directions: dict[str, tuple[dict[str, Callable[[], Any]], Any, int]] = {
            "forward": (
                {n: lambda f=f: forward(f) for n, f in functions.items()},
                (exact.detach(),),
                moved,
            ),
            "backward": (
                {n: lambda o=o: backward(o) for n, o in graphs.items()},
                gradients,
                2 * moved - 1,
            ),
        }
        for direction, (providers, expected, tensors) in directions.items():

            def check(
                name: str, output: Any, expected: Any = expected, dtype: torch.dtype = dout.dtype
            ) -> None:
                for got, want in zip(output, expected, strict=True):
                    error = ((got.double() - want).abs().max() / want.abs().max()).item()
                    assert error <= TOLERANCE[dtype], f"error {error:.3g}"

            x = inputs[0]
            timed = measure(
                op,
                providers,
                check=check,
                sizes={"direction": direction, "dtype": str(x.dtype)[6:], **sizes},
                bytes_moved=tensors * x.numel() * x.element_size(),
                device=device,
                seed=seed,
                rounds=rounds,
                warmup=1,
            )
            size = "x".join(map(str, sizes.values()))
            rows += [
                row | {"size": size, "copy_gb_s": copy, "of_copy": round(row["gb_s"] / copy, 3)}
                for row in timed
            ]
        torch._dynamo.reset()
    return rows


def step_of(
    name: str, shape: tuple[int, ...], device: str, seed: int
) -> Callable[[], torch.Tensor]:
    """One training step, as a function that returns its loss; lr 0 keeps the weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    import maskprune as mp
    from benchmarks.uniform.shapes import llama

    *dimensions, batch, length = shape
    torch.manual_seed(seed)
    config = llama(*dimensions, vocab_size=8192)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    stock = LlamaForCausalLM(config).to(device, dtype)
    model = get_peft_model(stock, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    solver = None
    if name in HALF_GONE:
        masks = mp.attach_masks(model, fused=device.startswith("cuda")).requires_grad_(False)
        masks.ffn[:, ::2] = 0.0
        if name == KEPT_UNITS:
            compute_kept_units(model, masks)
            assert all("forward" in vars(layer.mlp) for layer in stock.model.layers)
    elif name != "lora":
        masks = mp.attach_masks(model, fused=name == "masks, fused")
        solver = mp.Minimax(masks, mp.Budget(model, sparsity=0.5), total_steps=1000)
        trained += [masks.head, masks.ffn]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    ids = torch.randint(0, 8192, (batch, length), device=device)
    model.train()

    def step() -> torch.Tensor:
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if solver is not None:
            solver.step()
        return loss.detach()

    return step


def train_rows(device: str, seed: int, rounds: int) -> list[dict[str, Any]]:
    """A LoRA step without masks, with hooks, with the fused FFN, and with half of the FFN gone."""
    rows = []
    for model, shape in MODELS[device.split(":")[0]].items():
        names = ("lora", "masks, hook", "masks, fused", *HALF_GONE)
        providers = {name: step_of(name, shape, device, seed) for name in names}
        expected = [step_of(name, shape, device, seed)() for name in ("lora", HALF_GONE[0])]

        def check(name: str, loss: torch.Tensor, expected: Any = expected) -> None:
            of_name = expected[name in HALF_GONE]
            torch.testing.assert_close(loss, of_name, rtol=1e-2, atol=0.0)

        names = ("d", "L", "H", "G", "F", "batch", "tokens")
        timed = measure(
            "training step",
            providers,
            check=check,
            sizes={"model": model, **dict(zip(names, shape, strict=True))},
            device=device,
            seed=seed,
            rounds=rounds,
            warmup=2,
        )
        base = next(row["median_ms"] for row in timed if row["provider"] == "lora")
        rows += [row | {"over_lora": round(row["median_ms"] / base - 1, 4)} for row in timed]
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("ops", "train"))
    args = parser.parse_args(arguments)
    fix_threads(args.threads)
    run, columns = {"ops": (op_rows, OPS_COLUMNS), "train": (train_rows, TRAIN_COLUMNS)}[args.part]
    rows = run(args.device, args.seed, args.rounds)
    print(show(rows, columns))
    if args.rows:
        write_rows(args.rows, rows, overwrite=args.overwrite)
    return 0


if __name__ == "__main__":
    sys.exit(main())
