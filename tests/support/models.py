"""Tiny random models of every family, for tests."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from maskprune.structured.masks import Masks

VOCAB = 64

# One family of each layout: where testing all of them would test the same code again.
KINDS = (
    "llama",
    "cohere",
    "gemma3",
    "phi3",
    "glm4",
    "nanochat",
    "qwen3_5_text",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "opt",
)


def tiny_config(family: str, **changes: Any) -> Any:
    """A config of `family`: 2 layers, hidden 32, 4 heads of 8 in 2 groups, FFN 24."""
    from transformers import CONFIG_MAPPING

    if family == "gemma3":
        return _tiny_gemma3(**changes)
    common: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    if family in ("gpt2", "gpt_bigcode", "gptj"):
        common |= dict(n_inner=24, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        common |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        if family == "gptj":
            common |= dict(rotary_dim=4, tie_word_embeddings=False)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            common.pop(name)
        common.pop("max_position_embeddings")
    elif family == "opt":
        common |= dict(ffn_dim=24, word_embed_proj_dim=32, dropout=0.0)
    elif family == "gpt_neo":
        common |= dict(intermediate_size=24, num_layers=2, num_heads=4, window_size=8)
        common |= dict(attention_types=[[["global", "local"], 1]])
        common |= dict(resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0)
        for name in ("num_hidden_layers", "num_attention_heads"):
            common.pop(name)
    else:
        common |= dict(intermediate_size=24)
        if family != "gpt_neox":
            common |= dict(num_key_value_heads=2)
    if "head_dim" in CONFIG_MAPPING[family].__annotations__:
        common["head_dim"] = 8
    if family in ("gemma2", "gemma3_text", "vaultgemma"):
        common |= dict(query_pre_attn_scalar=8, sliding_window=16)
    if family == "seed_oss":
        common |= dict(residual_dropout=0.0, attention_dropout=0.0)
    if family == "granite":
        common |= dict(logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=0.5)
    if family == "qwen3_5_text":
        common |= dict(layer_types=["linear_attention", "full_attention"])
        common |= dict(linear_key_head_dim=8, linear_value_head_dim=8)
        common |= dict(linear_num_key_heads=2, linear_num_value_heads=4)
    return CONFIG_MAPPING[family](**(common | changes))


def _tiny_gemma3(**changes: Any) -> Any:
    """Gemma 3 with its vision tower: one layer of hidden size 8 on a picture of 4 patches."""
    from transformers import CONFIG_MAPPING

    vision = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1)
    vision |= dict(num_attention_heads=2, image_size=28, patch_size=14)
    return CONFIG_MAPPING["gemma3"](
        text_config=tiny_config("gemma3_text", **changes).to_dict(),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=VOCAB - 1,
        boi_token_index=VOCAB - 2,
        eoi_token_index=VOCAB - 3,
    )


def tiny_model(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A random model of `family`; biases and norms are random too, so that none hides a bug."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.randn_like(p) * 0.1 + ("norm" in name or "ln_" in name))
            else:
                p.mul_(5.0)
    return model.eval()


def randomise(masks: Masks, head: int, ffn: int, seed: int = 0) -> Masks:
    """Set random values and prune `head` and `ffn` random units of every row."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m, n in ((masks.head, head), (masks.ffn, ffn)):
            if not m.numel():
                continue
            m.copy_((torch.rand(m.shape, generator=g) * 0.9 + 0.1).to(m.device))
            gone = torch.rand(m.shape, generator=g).argsort(dim=1)[:, :n]
            m.scatter_(1, gone.to(m.device), 0.0)
    return masks


def tokens(batch: int = 2, length: int = 20, seed: int = 0) -> torch.Tensor:
    """Random token ids (batch, length)."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
