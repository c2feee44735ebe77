"""What else uniform layers gain: measured where this machine can, computed where it cannot."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.uniform.shapes import Widths
from maskprune.hf.checkpoint_files import write_stock_files
from maskprune.hf.families import layers_of

TP_SIZES = (2, 4, 8)


def shares(units: int, ranks: int) -> int:
    """ceil(units / ranks): the fullest shard when units are dealt out whole."""
    return -(-units // ranks)


def tensor_parallel(widths: Widths, ranks: int) -> dict[str, Any]:
    """How evenly `ranks` share the layers, which synchronise after each attention and each FFN.

    imbalance = sum over the 2 L parts of the fullest shard's weights / sum of the mean shard's,
    KV groups and FFN units dealt out whole. undivided: layers where an engine that demands
    heads % ranks == 0, FFN % ranks == 0, and KV heads % ranks == 0 or ranks % KV heads == 0 stops.
    """
    fullest = mean = undivided = 0.0
    for h, g, f in zip(widths.heads, widths.kv_heads, widths.ffn, strict=True):
        group = 2 * widths.head_dim * (h // g + 1)
        fullest += group * shares(g, ranks) + 3 * shares(f, ranks)
        mean += (group * g + 3 * f) / ranks
        kv_fits = g % ranks == 0 or ranks % g == 0
        undivided += not (h % ranks == 0 and f % ranks == 0 and kv_fits)
    return {"imbalance": round(fullest / mean, 4), "undivided": int(undivided)}


def pipeline(widths: Widths, stages: int) -> dict[str, float] | None:
    """Fullest stage over mean stage, by weights: equal layer counts, and the best contiguous cut.

    None where there are fewer layers than stages.
    """
    d_h, count = widths.head_dim, len(widths.ffn)
    if count < stages:
        return None
    w = [
        2 * d_h * (h + g) + 3 * f
        for h, g, f in zip(widths.heads, widths.kv_heads, widths.ffn, strict=True)
    ]
    ends = [round(i * count / stages) for i in range(stages + 1)]
    equal = max(sum(w[a:b]) for a, b in zip(ends, ends[1:], strict=False))
    totals = [0]
    for weight in w:
        totals.append(totals[-1] + weight)
    best = [float(t) for t in totals]
    for stage in range(2, stages + 1):
        best = [
            min(max(best[j], totals[i] - totals[j]) for j in range(min(i, stage - 1), i + 1))
            for i in range(count + 1)
        ]
    mean = totals[-1] / stages
    return {"equal_count": round(equal / mean, 4), "best_cut": round(best[-1] / mean, 4)}


@torch.no_grad()
def one_block(model: nn.Module) -> dict[str, Any]:
    """Run the model through its first block alone, the L layers' weights stacked and fed in turn.

    The scan over layers of JAX and of captured blocks; needs every layer's weights alike.
    """
    layers = layers_of(model)
    states = [dict(layer.named_parameters()) for layer in layers]
    try:
        stacked = {name: torch.stack([s[name] for s in states]) for name in states[0]}
    except RuntimeError as error:
        return {"one_block": False, "why": str(error).split(", but")[0]}
    tokens = torch.arange(8, device=model.device)[None]
    expected = model(tokens, use_cache=False).logits
    taken = list(layers)
    try:
        for i in range(len(taken)):
            weights = {name: tensor[i] for name, tensor in stacked.items()}
            model.model.layers[i] = _Turn(taken[0], weights)
        logits = model(tokens, use_cache=False).logits
    finally:
        for i, layer in enumerate(taken):
            model.model.layers[i] = layer
    return {"one_block": bool(torch.allclose(logits, expected, rtol=1e-4, atol=1e-4))}


class _Turn(nn.Module):
    """One block called with the weights of another layer."""

    def __init__(self, block: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._call = (block, weights)

    def forward(self, *args: Any, **keywords: Any) -> Any:
        block, weights = self._call
        return torch.func.functional_call(block, weights, args, keywords)


@torch.no_grad()
def stock_load(model: nn.Module) -> dict[str, Any]:
    """Save, load with AutoModelForCausalLM and nothing else, compare logits; then the engines.

    A heterogeneous model is saved with the dense model's config: no stock Llama config holds widths
    by layer.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.config.architectures = [type(model).__name__]
        write_stock_files(folder, model.config, generation_config=model.generation_config)
        model.save_pretrained(folder / "weights")
        for file in (folder / "weights").glob("*.safetensors*"):
            shutil.move(file, folder / file.name)
        shutil.rmtree(folder / "weights")
        try:
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
        except (RuntimeError, ValueError) as error:
            return {"from_pretrained": False, "why": _first_line(error)}
        tokens = torch.arange(8)[None]
        expected = model(tokens.to(model.device), use_cache=False).logits.float().cpu()
        logits = loaded(tokens, use_cache=False).logits.float()
        apart = float((logits - expected).abs().max() / expected.abs().max())
        return {"from_pretrained": apart < 1e-3, "apart": apart, **engines(folder)}


def _first_line(error: Exception) -> str:
    lines = [
        line.strip() for line in str(error).splitlines() if "mismatch" in line or "size" in line
    ]
    return (lines or str(error).splitlines() or [type(error).__name__])[0][:160]


def engines(folder: Path) -> dict[str, Any]:
    """Whether vLLM and llama.cpp, where installed, load the folder; None where they are not."""
    converter = shutil.which("convert_hf_to_gguf.py")
    result: dict[str, Any] = {"vllm": None, "llama_cpp": None}
    if importlib.util.find_spec("vllm"):
        code = (
            "import sys, vllm; m = vllm.LLM(sys.argv[1], skip_tokenizer_init=True, "
            "max_model_len=64, enforce_eager=True); "
            "m.generate({'prompt_token_ids': [1, 2, 3]}, "
            "vllm.SamplingParams(max_tokens=1, detokenize=False))"
        )
        result["vllm"] = _succeeds(sys.executable, "-c", code, str(folder))
    if importlib.util.find_spec("llama_cpp") and converter:
        gguf = str(folder / "model.gguf")
        code = "import sys, llama_cpp; llama_cpp.Llama(sys.argv[1], n_ctx=64).eval([1, 2, 3])"
        result["llama_cpp"] = _succeeds(
            sys.executable, converter, str(folder), "--outfile", gguf
        ) and _succeeds(sys.executable, "-c", code, gguf)
    return result


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, timeout=600).returncode == 0


def structure_row(model: nn.Module, widths: Widths, load: bool) -> dict[str, Any]:
    """Every fact of this page about one variant, as one row's fields."""
    row: dict[str, Any] = {"distinct_layers": widths.distinct_layers}
    for ranks in TP_SIZES:
        split = tensor_parallel(widths, ranks)
        row[f"tp{ranks}_imbalance"] = split["imbalance"]
        row[f"tp{ranks}_undivided"] = split["undivided"]
        if stages := pipeline(widths, ranks):
            row[f"pp{ranks}_equal_count"] = stages["equal_count"]
            row[f"pp{ranks}_best_cut"] = stages["best_cut"]
    block = one_block(model)
    row["one_block"], row["one_block_why"] = block["one_block"], block.get("why")
    if load:
        loaded = stock_load(model)
        row |= {"from_pretrained_why" if k == "why" else k: v for k, v in loaded.items()}
    return row
