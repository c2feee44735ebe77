"""Bytes that training takes on each device, from config.json alone; the formulas of docs/scale.md.

Legend: n devices, each with the whole model or, sharded, with its part of the blocks - T tokens of
one device's micro-batch - c bytes of a computed number - d hidden size, q = H d_h, k = G d_h, F FFN
width, V vocabulary, L layers - P parameters - A adapter parameters - S weights under 2:4 masks -
C weights that are trained after the cut, E the rest of the student that holds them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import nn
from transformers import PreTrainedConfig

from maskprune.config import PlanConfig, PruneConfig, SparsifyConfig
from maskprune.hf.families import attention_output, family_of, ffn_output, layers_of, text_config
from maskprune.hf.shape import shape_of

# Of a device's memory; the rest is the context, the library's workspaces and what lies between.
USABLE = 0.9


@dataclass(frozen=True)
class Load:
    """What is trained, and how: `--two-four`, adapters and masks, or weights (`train`), of which
    `sparsity` are gone; under which settings."""

    two_four: bool = False
    train: str = "adapters"
    sparsity: float | None = None
    batch_size: int = 16
    gradient_accumulation: int = 1
    seq_len: int = 512
    lora_r: int = 8
    output_r: int = 128
    gradient_checkpointing: bool = False
    optimizer_bits: int = 32
    sharded: bool = False
    computed: int = 2


def load_of(settings: PruneConfig | SparsifyConfig | PlanConfig) -> Load:
    """The part of a command's settings that memory depends on."""
    known = {f.name: getattr(settings, f.name) for f in fields(Load) if hasattr(settings, f.name)}
    if isinstance(settings, (PruneConfig, PlanConfig)) and settings.sparsity is None:
        # Of a split by hand, the least that goes of either kind.
        known["sparsity"] = min(settings.head_sparsity or 0.0, settings.ffn_sparsity or 0.0)
    return Load(**({"two_four": isinstance(settings, SparsifyConfig)} | known))


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype of the weights that a transformers config describes."""
    dtype = getattr(config, "dtype", None) or torch.float32
    found: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return found


def memory_parts(config: PreTrainedConfig, load: Load, gpus: int) -> dict[str, int]:
    """Bytes on each of `gpus` devices, by part; what every step holds at its fullest.

    Args:
        config: a transformers config of a known family; its dtype is that of the weights.

    Raises:
        ValueError: a micro-batch that the devices do not divide.
    """
    from transformers import AutoModelForCausalLM

    micro = load.batch_size // load.gradient_accumulation
    if micro % gpus:
        raise ValueError(
            f"{load.batch_size} sequences in {load.gradient_accumulation} micro-batches do not "
            f"divide over {gpus} devices; choose a --batch-size that is a multiple of "
            f"{load.gradient_accumulation * gpus}"
        )
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    family, shape, text = family_of(config), shape_of(config), text_config(config)
    size = stored_dtype(config).itemsize
    T, c, d, F, L = (
        micro // gpus * load.seq_len,
        load.computed,
        text.hidden_size,
        shape.ffn,
        shape.layers,
    )
    q, k, V = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, text.vocab_size
    A = S = r_in = r_out = blocks = of_blocks = 0
    for block in layers_of(model):
        count = sum(p.numel() for p in block.parameters())
        of_blocks, blocks = of_blocks + count, blocks + count * size
        outputs = [ffn_output(block, family)]
        if family.prunes_heads:
            outputs.append(attention_output(block, family))
        for module in block.modules():
            weight: torch.Tensor | None = getattr(module, "weight", None)
            if weight is None or weight.dim() != 2:
                continue
            r = load.output_r if module in outputs else load.lora_r
            A += r * sum(weight.shape)
            S += weight.numel()
            r_in, r_out = (r_in, r_out + r) if module in outputs else (r_in + r, r_out)
    r_layer = (r_in + r_out) // L
    P = sum(p.numel() for p in model.parameters())
    cut = load.train == "weights" and not load.two_four
    C = round((1 - (load.sparsity or 0)) * of_blocks)
    trained = C if cut else 6 * S // 4 if load.two_four else A
    # Inputs of both norms (in float32), of the linears, of attention, of the FFN's product, masks.
    if load.two_four:
        layer = T * (2 * 4 * d + c * (2 * d + 3 * q + 2 * k + 4 * F)) + c * S // L
    else:
        r = 0 if cut else r_layer
        layer = T * (2 * 4 * d + c * (2 * d + 4 * q + 2 * k + 5 * F + r))
    kept = layer + L * T * d * c if load.gradient_checkpointing else L * layer
    weights = P * size
    n = gpus if load.sharded else 1
    gathered = 0
    if n > 1:
        # FSDP2: this block, the next one, and the buffer that it is copied out of; of this one the
        # gradient, twice more in the order in which it is sent.
        gathered = 3 * (blocks + 4 * trained + 4 * trained) // L
    masks = 0 if load.two_four else 16 * L * (shape.ffn + family.prunes_heads * shape.kv_heads)
    return {
        "weights": weights - blocks + blocks // n,
        _trained_part(load): 4 * trained // n,
        "their gradient": 4 * trained // n,
        "their moments": load.optimizer_bits // 4 * trained // n,
        "buckets that DDP sends": 4 * trained if gpus > n else 0,
        "gathered blocks": gathered,
        **({"rest of the student": 4 * (P - of_blocks)} if cut else {}),
        **({"their copies in bfloat16": c * trained} if cut and c < 4 else {}),
        "masks, gradient, moments": masks,
        "activations": kept,
        # Of the language model's loss or of the KL: logits, float32 log-softmax, gradient.
        "logits of the vocabulary": T * V * (2 * c + 4) + (0 if load.two_four else T * V * c),
    }


def _trained_part(load: Load) -> str:
    if load.two_four:
        return "logits of 2:4 masks"
    return "weights in training" if load.train == "weights" else "adapters"


def largest_micro_batch(config: PreTrainedConfig, load: Load, gpus: int, room: float) -> int | None:
    """Most sequences of a device's micro-batch that fit `room` bytes; None where not one does."""

    def fits(n: int) -> bool:
        one = replace(load, batch_size=n * gpus, gradient_accumulation=1)
        return sum(memory_parts(config, one, gpus).values()) <= room

    per_device = load.batch_size // gpus
    return next((n for n in range(per_device, 0, -1) if per_device % n == 0 and fits(n)), None)


def does_not_fit(config: PreTrainedConfig, load: Load, gpus: int, memory: float) -> bool:
    """Whether a run takes more than what of `memory` bytes is counted on, on each device."""
    return sum(memory_parts(config, load, gpus).values()) > USABLE * memory


def render_memory(
    config: PreTrainedConfig, load: Load, gpus: int, gpu_memory: float, shard: str = "auto"
) -> str:
    """The parts as text, whether they fit, and what would.

    Args:
        gpu_memory: GB of one device.
        shard: `none`, `full`, or `auto`: full where the whole model on each does not fit.
    """
    ways = {"none": [False], "full": [True], "auto": [False, True]}[shard]
    if load.train == "weights":
        ways = [False]
    memory = gpu_memory * 1e9
    tried = [replace(load, sharded=sharded and gpus > 1) for sharded in ways]
    chosen = next((way for way in tried if not does_not_fit(config, way, gpus, memory)), tried[-1])
    parts, room = memory_parts(config, chosen, gpus), USABLE * memory
    total = sum(parts.values())
    lines = [f"memory of each of {gpus} devices in training, GB"]
    lines += [f"  {name:26}{value / 1e9:10.3f}" for name, value in parts.items()]
    lines.append(f"  {'together':26}{total / 1e9:10.3f}")
    held = "each holds its part of the blocks (--shard full)"
    lines.append(
        f"{'fits' if total <= room else 'does not fit'} {gpu_memory:g} GB, of which "
        f"{room / 1e9:.1f} are counted on; "
        + (held if chosen.sharded else "every device holds the whole model")
    )
    least = _least_devices(config, load, ways, room)
    if least is not None:
        lines.append(f"least number of devices: {least}")
    if total > room:
        most = largest_micro_batch(config, chosen, gpus, room) if load.batch_size % gpus == 0 else 0
        if most:
            steps = load.batch_size // (gpus * most)
            lines.append(f"on {gpus} devices it fits with --gradient-accumulation {steps}")
        elif not load.gradient_checkpointing:
            lines.append("try --gradient-checkpointing")
    if least is None:
        last = [*parts][-1]
        states = sum(v for name, v in parts.items() if name not in ("activations", last))
        lines.append(
            f"no number of devices up to --batch-size is enough: on {gpus}, what each must hold "
            f"whatever the batch is {states / 1e9:.3g} GB, and one sequence more"
        )
    return "\n".join(lines)


def _least_devices(
    config: PreTrainedConfig, load: Load, ways: list[bool], room: float
) -> str | None:
    """The smallest number of devices on which a run fits, and how; None where there is none."""
    for n in (n for n in range(1, load.batch_size + 1) if load.batch_size % n == 0):
        for sharded in ways if n > 1 else [False]:
            most = largest_micro_batch(config, replace(load, sharded=sharded), n, room)
            if most is not None:
                how = " --shard full and" if sharded else ""
                steps = load.batch_size // (n * most)
                return f"{n}, with{how} --gradient-accumulation {steps} or more"
    return None
