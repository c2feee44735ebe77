"""The mask parameters, and how they attach to a model and detach from it.

`FFN(x) = (act(gate) * up * m_ffn) W_down` and `MHA(x) = sum over heads of m_head * head`, the
printed forward of MaskPrune (arXiv 2502.14008, section 3.1). The gradient of a mask does not
vanish with the mask, so a pruned unit can come back.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from maskprune.files import own_file, replace_file
from maskprune.hf.families import (
    FAMILIES,
    Family,
    attention_output,
    family_of,
    ffn_output,
    get_submodule,
    layers_of,
    require_causal_lm,
)
from maskprune.hf.shape import Shape, shape_of
from maskprune.structured.cuts import mask_rows, query_head_mask
from maskprune.structured.fused_ffn import fuse_ffn, unfusable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


FORMAT_VERSION = "1"
MASKS_FILE = "masks.safetensors"


class Masks(nn.Module):
    """The masks of a model, one contiguous float32 parameter per kind, so one launch serves all.

    They stay float32 when the model is cast. A deep copy of a masked model has its own masks (its
    submodule `maskprune`), and masked models can be pickled.

    Args:
        shape: of the dense model.
        head_unit: `kv_group` or `query_head`.
        family: the model type, a key of `FAMILIES`.
        source: name or path of the model, for the masks file.

    Attributes:
        head: (L, G) for `kv_group`, (L * G, q) for `query_head`; (0, 0) where the family keeps its
            heads. In [0, 1], starting at 1.
        ffn: (L, F), likewise.
        enabled: False lets the model compute without masks.
    """

    head: nn.Parameter
    ffn: nn.Parameter

    def __init__(self, shape: Shape, head_unit: str, family: str, source: str = "") -> None:
        super().__init__()
        self.shape = shape
        self.head_unit = head_unit
        self.family = family
        self.source = source
        self.enabled = True
        rows, units = mask_rows(shape, head_unit)
        if not FAMILIES[family].prunes_heads:
            rows = units = 0
        self.head = nn.Parameter(torch.ones(rows, units, dtype=torch.float32))
        self.ffn = nn.Parameter(torch.ones(shape.layers, shape.ffn, dtype=torch.float32))
        self._undo: list[Callable[[], None]] = []
        self._hooked: list[tuple[nn.Module, Callable[[], nn.Module]]] = []

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Masks:
        # The solver works in float32: `model.to(torch.bfloat16)` moves the masks, no more.
        def keep_dtype(t: torch.Tensor) -> torch.Tensor:
            out = fn(t)
            return out if out.dtype == t.dtype else t.to(out.device)

        super()._apply(keep_dtype, recurse)
        return self

    def layer_head(self, layer: int) -> torch.Tensor:
        """(H,) the mask of each query head of one layer, differentiable."""
        shape = self.shape
        if self.head_unit == "kv_group":
            return self.head[layer].repeat_interleave(shape.heads // shape.kv_heads)
        return self.head[layer * shape.kv_heads : (layer + 1) * shape.kv_heads].flatten()

    def query_heads(self) -> torch.Tensor | None:
        """(L, H) the mask of every query head; None where the family keeps its heads."""
        if not self.head.numel():
            return None
        return query_head_mask(self.head.detach(), self.shape, self.head_unit)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within the context the model computes without masks, as the teacher."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def detach(self) -> None:
        """Restore the model: remove the hooks and the parameters."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._hooked.clear()

    def require_outermost(self) -> None:
        """Refuse masks that an adapter added later has wrapped.

        Raises:
            RuntimeError: the adapter's path would run beside the mask, not under it.
        """
        for module, current in self._hooked:
            if current() is not module:
                raise RuntimeError(
                    "an adapter was added after the masks, so its path is not masked; call "
                    "get_peft_model first and attach_masks after it"
                )

    def save(self, path: str | Path) -> None:
        """Write `head` and `ffn` as safetensors with what is needed to apply them elsewhere."""
        from safetensors.torch import save

        tensors = {
            name: getattr(self, name).detach().float().cpu().contiguous()
            for name in ("head", "ffn")
        }
        replace_file(Path(path), save(tensors, metadata=self.metadata()))

    def metadata(self) -> dict[str, str]:
        """The header of the masks file; safetensors allows strings only."""
        return {
            "format": "maskprune-masks",
            "format_version": FORMAT_VERSION,
            "head_unit": self.head_unit,
            "family": self.family,
            "source_model": self.source,
            "shape": json.dumps(vars(self.shape)),
        }


def load_masks(path: str | Path) -> Masks:
    """Read a masks file that `Masks.save` wrote; attach it with `attach_masks(model, masks=...)`.

    Args:
        path: the file, or a folder that `maskprune prune` wrote.

    Raises:
        ValueError: no such file, or not a masks file of this format.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_dir():
        path = own_file(path, MASKS_FILE)
    if not path.is_file():
        raise ValueError(f"masks file {path} does not exist; expected what `maskprune prune` wrote")
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None
    if meta.get("format") != "maskprune-masks" or set(tensors) != {"head", "ffn"}:
        raise ValueError(
            f"{path} is not a masks file: it holds {sorted(tensors)}; expected `head` and `ffn` "
            "as `maskprune prune` writes them"
        )
    if meta.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {meta.get('format_version')}; this maskprune reads "
            f"{FORMAT_VERSION}; install the version that wrote it"
        )
    try:
        shape = Shape(**json.loads(meta["shape"]))
        masks = Masks(shape, meta["head_unit"], meta["family"], meta.get("source_model", ""))
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"{path}: its header does not give a known family, head unit and shape ({error!r}); "
            "the file is damaged, use the one that `maskprune prune` wrote"
        ) from None
    for name, value in tensors.items():
        parameter = getattr(masks, name)
        if parameter.shape != value.shape or value.dtype != torch.float32:
            raise ValueError(
                f"{path}: `{name}` is {value.dtype} {tuple(value.shape)}; its own header says "
                f"float32 {tuple(parameter.shape)}; the file is damaged"
            )
        parameter.data.copy_(value)
    return masks


def require_same_model(masks: Masks, config: PreTrainedConfig, name: str) -> None:
    """Refuse masks of another family or shape than the config's.

    Args:
        name: what the error calls the model.

    Raises:
        ValueError: the family or the shape differs.
    """
    shape, family = shape_of(config), family_of(config).model_type
    if masks.shape != shape or masks.family != family:
        raise ValueError(
            f"the masks are of a {masks.family} with {masks.shape}; {name} is a {family} with "
            f"{shape}; use the masks that were trained on this model"
        )


def attach_masks(
    model: nn.Module,
    head_unit: str = "kv_group",
    *,
    masks: Masks | None = None,
    fused: bool | None = None,
) -> Masks:
    """Put masks on every head and FFN unit of a model of a known family.

    With all masks at 1 the logits equal the original's, bit for bit in float32. Attach after
    `get_peft_model`, else the adapter's path would not be masked, and before `torch.compile`, else
    the compiled forward would not see them.

    Args:
        model: transformers causal LM, or a PEFT model around one. Gains a submodule `maskprune`,
            which `masks.detach()` removes.
        head_unit: `kv_group` or `query_head`; ignored when `masks` are given.
        masks: attach these (from `load_masks`) instead of new ones at 1.
        fused: run the FFN activation and its mask as one operation; None fuses on CUDA.

    Returns:
        Masks, on the model's device.

    Raises:
        TypeError: not a transformers causal LM.
        ValueError: unknown family, unknown unit, or masks of another shape or family.
        RuntimeError: the model has masks already, of any kind, or is compiled.
    """
    base = require_causal_lm(model)
    family, shape = family_of(base.config), shape_of(base.config)
    if hasattr(base, "maskprune"):
        raise RuntimeError("the model has masks already; call their detach() first")
    for module in model.modules():
        if is_parametrized(module):
            raise RuntimeError(
                "the model's weights are parametrized, as attach_two_four does; take that off "
                "first: masks.detach()"
            )
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise RuntimeError(
                "the model is compiled, and a compiled forward does not see masks that come "
                "later; call attach_masks first and torch.compile after it"
            )
    device = next(base.parameters()).device
    if masks is None:
        source = getattr(base.config, "_name_or_path", "")
        masks = Masks(shape, head_unit, family.model_type, source)
    else:
        require_same_model(masks, base.config, "the model")
    base.maskprune = masks.to(device)
    masks._undo.append(partial(delattr, base, "maskprune"))
    fuse = (device.type == "cuda" if fused is None else fused) and family.gated
    try:
        for index, layer in enumerate(layers_of(base)):
            _attach_layer(masks, index, layer, family, fuse, required=bool(fused))
    except BaseException:
        masks.detach()
        raise
    return masks


def _attach_layer(
    masks: Masks, index: int, layer: nn.Module, family: Family, fuse: bool, required: bool
) -> None:
    undo = masks._undo
    if masks.head.numel():
        module = attention_output(layer, family)
        undo.append(module.register_forward_pre_hook(partial(_scale_heads, masks, index)).remove)
        masks._hooked.append((module, partial(attention_output, layer, family)))
    module = ffn_output(layer, family)
    masks._hooked.append((module, partial(ffn_output, layer, family)))
    mlp = get_submodule(layer, family.ffn)
    # An FFN that cannot be fused keeps the hook, or is refused where `fused=True` asked for it.
    if fuse and (required or not unfusable(mlp, family.activation)):
        undo.append(fuse_ffn(mlp, family.activation, partial(_ffn_mask, masks, index)))
    else:
        undo.append(module.register_forward_pre_hook(partial(_scale_units, masks, index)).remove)


# Bound to the masks with `partial`, not as closures, so that a deep copy of the model uses its own
# masks and the model can be pickled.
def _ffn_mask(masks: Masks, layer: int) -> torch.Tensor | None:
    return masks.ffn[layer] if masks.enabled else None


def is_of_masks(hook: Any) -> bool:
    """Whether a hook of a module is the one that scales the inputs of W_down or W_O."""
    return getattr(hook, "func", None) in (_scale_units, _scale_heads)


def _scale_units(
    masks: Masks, layer: int, module: nn.Module, args: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...] | None:
    if not masks.enabled:
        return None
    return (args[0] * masks.ffn[layer].to(args[0].dtype), *args[1:])


def _scale_heads(
    masks: Masks, layer: int, module: nn.Module, args: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...] | None:
    if not masks.enabled:
        return None
    x, m = args[0], masks.layer_head(layer)
    if x.is_cuda:
        from maskprune import ops

        return (ops.scale_heads(x, m), *args[1:])
    scaled = x.unflatten(-1, (m.numel(), -1)) * m.to(x.dtype)[:, None]
    return (scaled.flatten(-2), *args[1:])
