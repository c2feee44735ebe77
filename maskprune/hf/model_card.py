"""The model card of a pruned checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

from maskprune.files import JsonObject

SHAPE_ROWS = (
    ("layers", "layers"),
    ("heads", "query heads"),
    ("kv_heads", "KV heads"),
    ("head_dim", "head size"),
    ("ffn", "FFN width"),
    ("parameters", "parameters"),
    ("bytes", "bytes of weights"),
    ("kv_bytes_per_token", "KV cache bytes per token"),
)


def number(value: object) -> str:
    """A setting or size as people read it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def model_card(info: JsonObject) -> str:
    """README.md of a pruned checkpoint, with the header that the Hugging Face hub reads.

    Args:
        info: what is known of these keys; each part whose keys are missing is left out.
            base_model, license, language; method, pattern ("2:4"), sparsity, head_unit, steps,
            tokens, data, seed; dense, pruned: dicts with layers, heads, kv_heads, head_dim, ffn,
            parameters, bytes, kv_bytes_per_token; model_class and class_reason; difference: dict
            with largest, largest_logit, top1_agreement, tokens (masked against exported logits);
            trained_after_cut: whether the weights were trained between the two;
            perplexity: dict with data, seq_len, dense, pruned; tp: legal tensor-parallel sizes;
            limits: list of sentences; versions: dict.
    """
    import yaml

    base = str(info.get("base_model") or "")
    on_hub = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", base)) and not Path(base).exists()
    shown = f"[{base}](https://huggingface.co/{base})" if on_hub else (Path(base).name or "a model")
    header: JsonObject = {"base_model": base} if on_hub else {}
    header |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    kind = "2-4-sparsity" if info.get("pattern") else "structured-pruning"
    header["tags"] = ["maskprune", "pruned", kind]
    header |= {key: info[key] for key in ("license", "language") if info.get(key)}
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False).strip()}\n---",
        f"# {Path(base).name or 'Model'}, pruned",
        _card_summary(info, shown),
    ]
    dense, pruned = info.get("dense") or {}, info.get("pruned") or {}
    rows = [
        f"| {label} | {number(dense.get(key, ''))} | {number(pruned[key])} |"
        for key, label in SHAPE_ROWS
        if key in pruned
    ]
    if rows:
        parts.append("\n".join(["| | before | after |", "|---|---:|---:|", *rows]))
    parts += [
        "## Use",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH_OR_HUB_ID")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_HUB_ID")\n```',
        "No remote code, no custom class."
        + (f" {info['class_reason']}" if info.get("class_reason") else ""),
    ]
    if info.get("tp"):
        sizes = ", ".join(str(size) for size in info["tp"])
        parts.append(f"Tensor-parallel sizes that divide this shape: {sizes}.")
    parts += _card_made(info) + _card_proof(info)
    limits = list(info.get("limits") or [])
    limits.append(
        "Pruning removes ability as well as weights; evaluate on your own task before you rely on "
        "it. The biases and the licence of the base model stay."
    )
    parts += ["## Limits", "\n".join(f"* {limit}" for limit in limits)]
    return "\n\n".join(parts) + "\n"


def _card_summary(info: JsonObject, shown: str) -> str:
    if pattern := info.get("pattern"):
        return (
            f"{shown} with two of every four consecutive weights at zero ({pattern}) in every "
            "linear of its blocks. Shapes and files are as large as before: an ordinary "
            "checkpoint, faster only where the runtime skips the zeros."
        )
    share = info.get("sparsity")
    less = f" with {share:.0%} of its attention and FFN weights removed" if share else ""
    return (
        f"{shown}{less}: whole heads and FFN units, the same number in every layer, so this is an "
        "ordinary checkpoint of an ordinary class."
    )


def _card_made(info: JsonObject) -> list[str]:
    facts = [
        (label, number(info[key]))
        for key, label in (
            ("method", "method"),
            ("head_unit", "unit of head pruning"),
            ("steps", "training steps"),
            ("tokens", "training tokens"),
            ("data", "data"),
            ("seed", "seed"),
        )
        if info.get(key) is not None
    ]
    versions = info.get("versions") or {}
    if versions:
        facts.append(("versions", ", ".join(f"{name} {v}" for name, v in versions.items())))
    rows = "\n".join(f"| {label} | {value} |" for label, value in facts)
    return ["## How it was made", f"| | |\n|---|---|\n{rows}"] if facts else []


def _card_proof(info: JsonObject) -> list[str]:
    parts = []
    if difference := info.get("difference"):
        line = f"Largest difference {difference['largest']:.3g}"
        if "largest_logit" in difference:
            line += f" at a largest logit of {difference['largest_logit']:.4g}"
        if "tokens" in difference:
            line += f", over {difference['tokens']} tokens"
        if "top1_agreement" in difference:
            line += f"; the same most likely token in {difference['top1_agreement']:.2%} of them"
        compared = (
            "The masked model and the one cut from it, before the training of its weights,"
            if info.get("trained_after_cut")
            else "The masked model of the training run and this checkpoint, loaded again from its "
            "files,"
        )
        parts += ["## Proof", f"{compared} were given the same tokens. {line}."]
    if perplexity := info.get("perplexity"):
        window = f", windows of {perplexity['seq_len']}" if perplexity.get("seq_len") else ""
        parts += [
            "## Perplexity",
            f"On {perplexity.get('data', 'held-out text')}{window}: "
            f"{perplexity['dense']:.2f} before, {perplexity['pruned']:.2f} after.",
        ]
    return parts
