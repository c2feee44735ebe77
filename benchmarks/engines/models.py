"""The checkpoints that every engine is given, and what transformers computes on them.

A small random model of each family for each head unit, pruned at random; the demo model dense and
pruned, at random too where it was not trained (for speed only shapes count); and, of the demo
model, what heterogeneous pruning leaves: other widths in every layer, or zeros in the dense shape.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.uniform.variants import Masks, cut, draw_masks, widths_of
from maskprune.hf.checkpoint_files import copy_side_files, save_stock
from maskprune.hf.demo_model import demo_model_dir
from maskprune.hf.engines import verdict
from maskprune.hf.families import (
    FAMILIES,
    decoder_of,
    family_of,
    get_submodule,
    kv_heads,
    layers_of,
)
from maskprune.hf.load import load_model
from maskprune.hf.pruned_config import takes_heads
from maskprune.hf.shape import shape_of
from maskprune.structured.export import export
from maskprune.structured.masks import attach_masks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
from models import tiny_config  # noqa: E402

Described = dict[str, Any]
VOCAB = 512
# No two of these and VOCAB are equal: ONNX Runtime GenAI errs where FFN and vocabulary are.
HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, FFN = 256, 8, 4, 32, 640
FFN_LEFT = 448
NEW_TOKENS = 32
PROMPTS = (
    "The quick brown fox jumps over the lazy dog and",
    "In the beginning of the century, people who lived by the sea",
    "def fibonacci(n):\n    ",
    "Water boils at one hundred degrees because",
)
# llama.cpp's converter looks for these in GLM-4's vocabulary.
GLM_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
BIASED_LLAMA = "llama with biases"
EVERY_FAMILY = (*FAMILIES, BIASED_LLAMA)
DEMO_FFN = 1088


def small_config(family: str) -> Any:
    """2 layers or a few more, hidden 256, 8 heads of 32 in 4 groups, a vocabulary of 512."""
    biased = family == BIASED_LLAMA
    family = "llama" if biased else family
    changes: dict[str, Any] = dict(vocab_size=VOCAB)
    # As published: engines that read no FFN width take this one.
    derived = ("gpt2", "gpt_bigcode", "gptj", "gpt_neox", "phi")
    ffn = 4 * HIDDEN if family in derived else FFN
    if family in ("gpt2", "gpt_bigcode", "gptj"):
        changes |= dict(n_embd=HIDDEN, n_head=HEADS, n_inner=ffn, n_positions=512)
        if family == "gpt2":
            changes |= dict(n_ctx=512)
        if family == "gptj":
            changes |= dict(rotary_dim=16)
    elif family == "gpt_neo":
        changes |= dict(hidden_size=HIDDEN, num_heads=HEADS, intermediate_size=FFN)
        changes |= dict(max_position_embeddings=512, window_size=256)
    else:
        changes |= dict(hidden_size=HIDDEN, num_attention_heads=HEADS, max_position_embeddings=512)
        if family == "opt":
            changes |= dict(ffn_dim=FFN, word_embed_proj_dim=HIDDEN)
        else:
            changes |= dict(intermediate_size=ffn)
            # Published Phi models have as many KV heads as heads, and llama.cpp runs no others.
            groups = HEADS if family == "phi" else KV_HEADS
            if family != "gpt_neox":
                changes |= dict(num_key_value_heads=groups)
    if hasattr(tiny_config(family).get_text_config(), "head_dim"):
        changes["head_dim"] = HEAD_SIZE
    if family in ("gemma2", "gemma3_text", "gemma3", "vaultgemma"):
        changes |= dict(query_pre_attn_scalar=HEAD_SIZE, sliding_window=256)
    # Fields of these families that engines read; transformers does not need them.
    if family == "cohere2":
        changes |= dict(rotary_pct=1.0)
    if family == "apertus":
        changes |= dict(mlp_bias=False, post_norm=False, qk_norm=True)
    if family == "exaone4":
        # The smaller published one; of the larger one llama.cpp knows the pattern by its 64 layers.
        changes |= dict(sliding_window=None, sliding_window_pattern=None, head_dim=HEAD_SIZE)
        changes |= dict(layer_types=["full_attention"] * 2)
    # As many layers as the pattern of sliding and full attention has.
    if layers := {"gemma3": 6, "gemma3_text": 6, "cohere2": 4, "olmo3": 4}.get(family):
        changes |= dict(num_hidden_layers=layers)
    if biased:
        changes["attention_bias"] = True
    if family == "qwen3_5_text":
        changes |= dict(linear_key_head_dim=32, linear_value_head_dim=32, num_hidden_layers=4)
        changes |= dict(layer_types=[*["linear_attention"] * 3, "full_attention"])
    if family == "phi3":
        changes |= dict(original_max_position_embeddings=512)
    config = tiny_config(family, **changes)
    if family == "gemma3":
        config.vocab_size = VOCAB
    return config


def random_model(config: Any, seed: int = 0) -> Any:
    """A model whose logits depend on every weight: biases and norms are random too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                # Norms of these families count from 0.
                whole = any(part in config.model_type for part in ("gemma", "nemotron", "qwen3_5"))
                start = ("norm" in name or "ln_" in name) and "bias" not in name and not whole
                p.copy_(torch.randn_like(p) * 0.1 + start)
            else:
                p.mul_(10.0 if "embed" in name or "wte" in name or p is head else 4.0)
        if "gemma" in config.model_type:
            # They multiply embeddings by 16 and tie them: a token would predict itself.
            head.mul_(0.02)
            get_submodule(decoder_of(model), family_of(config).tail[0]).weight.fill_(60.0)
    return model.eval()


def prune_at_random(model: Any, head_unit: str, heads: int, ffn: int, *, seed: int = 0) -> Any:
    """`model` without `heads` head units of each row, with FFN width `ffn`; random masks folded."""
    masks = attach_masks(model, head_unit, fused=False)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mask, gone in ((masks.head, heads), (masks.ffn, masks.ffn.shape[1] - ffn)):
            if mask.numel():
                mask.copy_(torch.rand(mask.shape, generator=draw) * 0.2 + 0.8)
                least = torch.rand(mask.shape, generator=draw).argsort(dim=1)[:, :gone]
                mask.scatter_(1, least, 0.0)
    small = export(model, masks)
    masks.detach()
    return small


def small_models(family: str, engines: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(head unit, pruned model) of a family.

    `dense` is the model that is pruned; a fault of an engine shows there too. `ffn`, all heads
    left, where heads stay, change the class, or an engine refuses fewer.
    """
    config = small_config(family)
    model = random_model(config)
    yield "dense", model
    if family_of(config).prunes_heads:
        per_group = HEADS // kv_heads(config)
        # As few as leave a count that a stock class takes.
        gone = next(g for g in range(1, HEADS) if takes_heads(config, HEADS - g * per_group))
        small = prune_at_random(model, "kv_group", gone, FFN_LEFT)
        yield "kv_group", small
        if per_group > 1:
            yield "query_head", prune_at_random(model, "query_head", 1, FFN_LEFT)
        said = [verdict(small.config, engine) for engine in engines]
        refused = any(v is None or v.answer in ("refused", "unknown") for v in said)
        if small.config.model_type == config.model_type and not refused:
            return
    yield "ffn", prune_at_random(model, "kv_group", 0, FFN_LEFT)


def write_small(
    root: Path, families: Sequence[str], engines: Sequence[str]
) -> dict[str, Described]:
    """Write the small models under `root`, with what transformers computes; by name."""
    described = {}
    for family in families:
        for unit, small in small_models(family, engines):
            name = f"{family} {unit}"
            described[name] = _write(root, name, small, None, family=family, head_unit=unit)
    return described


def write_demo(root: Path, pruned: Path | None) -> dict[str, Described]:
    """The demo model dense, pruned (`pruned`, else at random in that shape), and at half its size.

    At half its size, from the same weights: uniform; heterogeneous, other widths in every layer;
    and the same units as zeros in the dense shape. The last two have the uniform one's cost.
    """
    source = demo_model_dir()
    dense, _ = load_model(source, dtype="float32")
    facts: dict[str, Any] = {"family": "llama", "head_unit": "kv_group"}
    described = {"dense": _write(root, "dense", dense, source, **facts)}
    if pruned:
        described["pruned"] = _write(root, "pruned", load_model(pruned)[0].float(), pruned, **facts)
    else:
        small = prune_at_random(dense, "kv_group", 0, DEMO_FFN)
        described["pruned"] = _write(root, "pruned", small, source, **facts)
    described["pruned"] |= {"trained": pruned is not None}
    widths = widths_of(dense.config, 0.5)
    masks = {name: draw_masks(dense.config, widths[name]) for name in ("uniform", "compresso")}
    uniform = cut(dense, widths["uniform"], masks["uniform"])
    described["uniform 50 %"] = _write(root, "uniform 50 %", uniform, source, **facts)
    shapes = cut(dense, widths["compresso"], masks["compresso"])
    folder = root / "shapes-50-%"
    shutil.copytree(root / "dense" / "model", folder / "model", dirs_exist_ok=True)
    weights = {k: v.contiguous() for k, v in shapes.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    described["shapes 50 %"] = facts | {
        "class": "llama",
        "shape": f"{widths['compresso'].distinct_layers} layer shapes",
        "folder": str(folder),
        "heterogeneous": "shapes",
    }
    zeros = with_zeros(dense, masks["compresso"])
    described["zeros 50 %"] = _write(root, "zeros 50 %", zeros, source, **facts)
    described["zeros 50 %"]["heterogeneous"] = "zeros"
    return described


def load_config(folder: str) -> Any:
    """The config of a checkpoint that was written here."""
    return AutoConfig.from_pretrained(Path(folder) / "model")


@torch.no_grad()
def with_zeros(dense: Any, masks: Masks) -> Any:
    """A copy of the model whose pruned units have zeros for weights."""
    model = copy.deepcopy(dense)
    size = shape_of(model.config).head_dim
    for layer, (heads, units) in zip(layers_of(model), masks, strict=True):
        layer.self_attn.o_proj.weight *= heads.repeat_interleave(size)
        layer.self_attn.q_proj.weight *= heads.repeat_interleave(size)[:, None]
        layer.mlp.down_proj.weight *= units
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            part.weight *= units[:, None]
    return model


def _write(root: Path, name: str, model: Any, tokenizer: Path | None, **facts: Any) -> Described:
    folder = root / name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "model").mkdir(parents=True)
    save_stock(model, folder / "model")
    if tokenizer:
        copy_side_files(tokenizer, folder / "model")
    else:
        write_vocabulary(folder / "model")
    np.savez(folder / "reference.npz", **reference(model, folder / "model"))
    facts |= {"class": model.config.model_type, "shape": str(shape_of(model.config))}
    return facts | {"folder": str(folder), "reference": str(folder / "reference.npz")}


@torch.no_grad()
def reference(model: Any, folder: Path) -> dict[str, np.ndarray]:
    """Prompts with 32 greedy tokens after each, and the log-probabilities at those tokens.

    Returns `tokens` (P, T) int32, padded with -1; `prompt` (P,), the prompts' lengths; `logprobs`
    (P, 32, V) float32, those from which each greedy token was taken.
    """
    if (folder / "tokenizer.model").exists():
        prompts = [[3 + byte for byte in text.encode()][:24] for text in PROMPTS]
    else:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    rows, logprobs = [], []
    with _endless(model):
        for prompt in prompts:
            out = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )[0]
            logits = model(out[None, :-1]).logits[0, len(prompt) - 1 :]
            rows.append(out.tolist())
            logprobs.append(logits.double().log_softmax(-1).float().numpy())
    longest = max(map(len, rows))
    return {
        "tokens": np.array([row + [-1] * (longest - len(row)) for row in rows], np.int32),
        "prompt": np.array([len(prompt) for prompt in prompts], np.int32),
        "logprobs": np.stack(logprobs),
    }


@contextlib.contextmanager
def _endless(model: Any) -> Iterator[None]:
    """No token ends a text."""
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None
    try:
        yield
    finally:
        model.generation_config.eos_token_id = before


def write_vocabulary(folder: Path) -> None:
    """512 tokens as byte-level BPE and as SentencePiece, of which converters read either.

    What the tokens spell does not matter: engines are given token ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", *GLM_TOKENS]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = [a + b for a in letters[:32] for b in letters[:8]][: VOCAB - len(special) - 256]
    pieces = [*special, *letters, *joined]
    bpe = models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, [(word[0], word[1:]) for word in joined]
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (folder / "merges.txt").write_text("".join(f"{word[0]} {word[1:]}\n" for word in joined))
    _write_sentencepiece(folder / "tokenizer.model")


def _write_sentencepiece(path: Path) -> None:
    # sentencepiece_model.proto: ModelProto.pieces = 1 of piece = 1, score = 2, type = 3
    # (UNKNOWN 2, CONTROL 3, BYTE 6, NORMAL 1), trainer_spec = 2 of model_type = 3 (BPE 2)
    # and byte_fallback = 35.
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{b:02X}>", 6) for b in range(256))]
    pieces += [(f"piece{i}", 1) for i in range(VOCAB - len(pieces))]
    content = b""
    for piece, kind in pieces:
        one = b"\x0a" + bytes([len(piece)]) + piece.encode() + b"\x15" + bytes(4)
        one += b"\x18" + bytes([kind])
        content += b"\x0a" + bytes([len(one)]) + one
    path.write_bytes(content + b"\x12\x05\x18\x02\x98\x02\x01")
