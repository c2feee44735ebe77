"""The files around the weights of a stock checkpoint: config, generation config, tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from maskprune.files import JsonObject, replace_file, write_json
from maskprune.hf.families import text_config
from maskprune.hf.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "USE_POLICY.md", "NOTICE")


def stock_config(config: PreTrainedConfig) -> JsonObject:
    """The content of config.json, such that transformers 4 and 5 read the same model.

    transformers 5 writes `rope_parameters` and `dtype`; 4 reads `rope_theta`, `rope_scaling`,
    `partial_rotary_factor` (GPT-NeoX: `rotary_pct`, `rotary_emb_base`) and `torch_dtype`, and falls
    back silently to a wrong rope where they are missing. Engines read the older ones too.
    """
    content: JsonObject = json.loads(config.to_json_string(use_diff=True))
    content["model_type"] = config.model_type
    for part, described in ((text_config(config), content.get("text_config")), (config, content)):
        if described is not None:
            _write_twice(described, part)
    return content


def _write_twice(content: JsonObject, config: PreTrainedConfig) -> None:
    """Add the fields that transformers 4 reads beside those of transformers 5."""
    if getattr(config, "head_dim", None):
        content["head_dim"] = config.head_dim
    if content.get("dtype"):
        content["torch_dtype"] = content["dtype"]
    rope = content.get("rope_parameters")
    if rope and "full_attention" in rope:
        content["rope_theta"] = rope["full_attention"]["rope_theta"]
        content["rope_scaling"] = _rope_scaling(rope["full_attention"])
        local = rope.get("sliding_attention", {}).get("rope_theta")
        if local is not None:
            content["rope_local_base_freq"] = local
    elif rope:
        content["rope_theta"] = rope.get("rope_theta", 10000.0)
        content["rope_scaling"] = _rope_scaling(rope)
        if "partial_rotary_factor" in rope:
            content["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if config.model_type == "gpt_neox":
            content["rotary_pct"] = rope.get("partial_rotary_factor", 1.0)
            content["rotary_emb_base"] = content["rope_theta"]


def _rope_scaling(rope: JsonObject) -> JsonObject | None:
    if rope.get("rope_type", "default") == "default":
        return None
    return {key: value for key, value in rope.items() if key != "rope_theta"}


def copy_side_files(source: Path, out: Path) -> bool:
    """Copy tokenizer and licence files as they are; returns whether there was a tokenizer."""
    for name in (*TOKENIZER_FILES, *LICENSE_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    return (out / "tokenizer_config.json").is_file() and (
        (out / "tokenizer.json").is_file()
        or (out / "tokenizer.model").is_file()
        or (out / "vocab.json").is_file()
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Save a tokenizer that has no files of its own so that transformers 4 loads it too."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    content = json.loads(path.read_text())
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only"):
        content.pop(key, None)
    write_json(path, content)


def write_stock_files(
    out: Path,
    config: PreTrainedConfig,
    *,
    source: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: GenerationConfig | None = None,
    model_card: str | None = None,
) -> None:
    """Write everything but the weights of a stock checkpoint into the folder `out`.

    Args:
        out: an existing folder, normally one that `new_folder` yields.
        config: the target config (from `target_config`), with `architectures` set.
        source: the folder of the original model; its tokenizer and licence are copied verbatim.
        tokenizer: saved where `source` has none.
        generation_config: written as it is; where None, `source`'s file is copied.
        model_card: the text of README.md.
    """
    write_json(out / "config.json", stock_config(config))
    if generation_config is not None:
        generation_config.save_pretrained(out)
    elif source is not None and (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", out / "generation_config.json")
    copied = source is not None and source.is_dir() and copy_side_files(source, out)
    if not copied and tokenizer is not None:
        save_tokenizer(tokenizer, out)
    if model_card is not None:
        replace_file(out / "README.md", model_card)


def save_stock(
    small: PreTrainedModel,
    out: Path,
    *,
    source: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model_card: str | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write `small` into the folder `out` as a checkpoint that transformers 4 and 5 load."""
    with quiet_transformers():
        small.save_pretrained(out, max_shard_size=max_shard_size)
    write_stock_files(
        out,
        small.config,
        source=source,
        tokenizer=tokenizer,
        generation_config=small.generation_config,
        model_card=model_card,
    )
