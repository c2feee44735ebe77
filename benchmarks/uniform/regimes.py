"""One call of each regime (prefill, decode, LoRA training step) in each mode of running it."""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import StaticCache

from benchmarks.harness.machine import sync
from maskprune.hf.families import layers_of

REGIMES = ("prefill", "decode", "train")
MODES = ("eager", "compile", "regional", "cudagraph")


def nothing() -> None:
    """What a runner does before or after when there is nothing to do."""


@dataclass
class Runner:
    """A model made ready for one regime: `call` is timed, `before` runs untimed ahead of it."""

    call: Callable[[], Any]
    before: Callable[[], None] = nothing
    after: Callable[[], None] = nothing
    compile_s: float | None = None
    graphs: int | None = None


def tokens_for(model: nn.Module, batch: int, length: int, seed: int) -> torch.Tensor:
    """(batch, length) random token ids on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    return tokens.to(model.device)


def own_code(function: Any, tag: str) -> Any:
    """A copy of a function with its own code object.

    torch.compile keeps its compiled graphs by code object. Variants timed in one process would
    share one list of them, and each would pay for walking past the others'.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{tag}")
    copied = types.FunctionType(
        code, function.__globals__, code.co_name, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def prefill(model: nn.Module, batch: int, length: int, seed: int) -> Runner:
    """The whole prompt in one forward, logits of its last token, as an engine does it."""
    ids = tokens_for(model, batch, length, seed)
    return Runner(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1).logits)


def decode(model: nn.Module, batch: int, context: int, seed: int) -> Runner:
    """One token for each sequence against a static KV cache of `context` random tokens."""
    ids = tokens_for(model, batch, 1, seed)
    cache = StaticCache(config=model.config, max_cache_len=context + 1)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for layer in cache.layers:
        layer.keys.normal_(generator=generator)
        layer.values.normal_(generator=generator)

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)

    def step() -> torch.Tensor:
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits

    return Runner(step, before=rewind)


def train(model: nn.Module, batch: int, length: int, seed: int) -> Runner:
    """Forward, backward and AdamW step of LoRA (r 8 on q and v), the base frozen."""
    from peft import LoraConfig, get_peft_model

    ids = tokens_for(model, batch, length, seed)
    torch.manual_seed(seed)
    lora = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)

    def step() -> torch.Tensor:
        with torch.enable_grad():
            loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def restore() -> None:
        adapted.unload()
        model.__dict__.pop("peft_config", None)
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    return Runner(step, after=restore)


def regional(model: nn.Module, tag: str) -> Callable[[], None]:
    """Compile each block alone, all from one code object; returns the function that undoes it."""
    layers = layers_of(model)
    shared = own_code(type(layers[0]).forward, tag)
    for layer in layers:
        layer.forward = torch.compile(types.MethodType(shared, layer), dynamic=False)

    def undo() -> None:
        for layer in layers:
            del layer.forward

    return undo


@functools.cache
def start_compiler() -> None:
    """Compile something small once, so that the first variant does not pay for the start."""
    x = torch.ones(8, 8)
    torch.compile(lambda x: torch.nn.functional.silu(x @ x))(x)


def captured(runner: Runner) -> Runner:
    """The same call as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            runner.before()
            runner.call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    runner.before()
    start = time.perf_counter()
    with torch.cuda.graph(graph):
        output = runner.call()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start

    def replay() -> Any:
        graph.replay()
        return output

    return Runner(replay, runner.before, runner.after, compile_s=seconds, graphs=1)


def prepare(
    model: nn.Module, regime: str, mode: str, batch: int, length: int, *, tag: str, seed: int = 0
) -> Runner:
    """The runner of one variant in one regime and mode, compiled and checked against eager.

    Raises:
        RuntimeError: the mode does not serve this regime or device, or its output is not eager's.
    """
    device = model.device.type
    if mode == "cudagraph" and (device != "cuda" or regime == "train"):
        raise RuntimeError(
            f"CUDA graphs serve prefill and decode on a GPU, not {regime} on {device}"
        )
    runner = {"prefill": prefill, "decode": decode, "train": train}[regime](
        model, batch, length, seed
    )
    if mode == "eager":
        return runner
    runner.before()
    expected = runner.call().clone()
    if mode == "cudagraph":
        result = captured(runner)
    else:
        import torch._dynamo as dynamo
        import torch._inductor.config as inductor

        start_compiler()
        limit = 4 * len(layers_of(model)) + 64
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, limit)
        dynamo.config.accumulated_recompile_limit = 1 << 14
        counters = dynamo.utils.counters["stats"]
        graphs = counters["unique_graphs"]
        undo, call = nothing, runner.call
        if mode == "compile":
            call = torch.compile(own_code(runner.call, tag), dynamic=False)
        else:
            undo = regional(model, tag)
        runner.before()
        # What an earlier run left on disk must not shorten the compile time.
        with inductor.patch(force_disable_caches=True):
            start = time.perf_counter()
            call()
            sync(device)
            seconds = time.perf_counter() - start
        after = runner.after

        def restore() -> None:
            undo()
            after()

        result = Runner(call, runner.before, restore, seconds, counters["unique_graphs"] - graphs)
    result.before()
    output = result.call()
    if regime != "train" and not close(output, expected):
        result.after()
        raise RuntimeError(f"{mode} gives other logits than eager")
    return result


def close(output: torch.Tensor, expected: torch.Tensor) -> bool:
    """Largest difference within 1e-3 (float32) or 5e-2 (16 bit) of the largest logit."""
    limit = 1e-3 if expected.dtype == torch.float32 else 5e-2
    output, expected = output.float(), expected.float()
    return bool((output - expected).abs().max() <= limit * expected.abs().max())


@torch.no_grad()
def cache_difference(model: nn.Module, seed: int = 0) -> float:
    """Largest logit difference of a step with a static cache and a forward without, relative."""
    ids = tokens_for(model, 2, 12, seed)
    cache = StaticCache(config=model.config, max_cache_len=12)
    model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
    cached = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    expected = model(input_ids=ids, use_cache=False).logits[:, -1]
    return float((cached - expected).abs().max().float() / expected.abs().max().float())
