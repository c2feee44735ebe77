"""What a 2:4 mask is: of every 4 consecutive weights along the input dimension, 2 are kept.

Letters: W (O, I) a weight, m (O, I) its mask, True = kept; a group is 4 neighbours in a row of W.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from maskprune.files import own_file, replace_file
from maskprune.hf.families import family_of, layers_of, linear_names, stock_model

Linear = nn.Linear | Conv1D

FORMAT = "maskprune-two-four-masks"
FORMAT_VERSION = "1"
MASKS_FILE = "two_four.safetensors"

# (6, 4) bool: the ways to keep 2 of 4, in MaskLLM's order (arXiv 2409.17481).
CANDIDATES = torch.tensor(
    [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]]
).bool()
_NO_CANDIDATE = 255
# The codes that three base-6 digits in a byte can have.
_CODES = 6**3


def prunable(model: nn.Module) -> dict[str, Linear]:
    """The linears inside the transformer blocks, in the order in which a forward runs them.

    Embeddings, norms and the output layer are left alone. Inside a PEFT wrapper these are the base
    layers, under the names that they have in the stock model.

    Returns:
        `nn.Linear` by qualified name, or GPT-2's `Conv1D`, whose weight is (in, out).

    Raises:
        ValueError: a family that is not in the table, a quantized weight, or an input width that
            4 does not divide.
    """
    base = stock_model(model)
    family = family_of(base.config)
    linears = {}
    for index, layer in enumerate(layers_of(base)):
        for path in linear_names(layer, family):
            name = f"{family.layers}.{index}.{path}"
            named = layer.get_submodule(path)
            module = cast(Linear, getattr(named, "base_layer", named))
            if not module.weight.is_floating_point():
                raise ValueError(
                    f"{name} has a weight of {module.weight.dtype}; expected floating point; load "
                    "the model without quantization"
                )
            width = oriented(module).shape[1]
            if width % 4:
                raise ValueError(
                    f"{name} has {width} inputs; expected a multiple of 4; this model has no 2:4 "
                    "pattern"
                )
            linears[name] = module
    return linears


def oriented(module: Linear) -> torch.Tensor:
    """The weight of a linear or of GPT-2's `Conv1D` as a (out, in) view."""
    return module.weight if isinstance(module, nn.Linear) else module.weight.T


def hard_mask(scores: torch.Tensor) -> torch.Tensor:
    """Keep the 2 largest scores of every 4 along the input; of equal scores the first.

    Args:
        scores: (O, I), any real dtype, infinities allowed.

    Returns:
        (O, I) bool with exactly 2 kept in each group.

    Raises:
        ValueError: 4 does not divide I, or a score is NaN.
    """
    s = _groups(scores, "hard_mask").unbind(-1)
    if scores.is_floating_point() and bool(scores.isnan().any()):
        raise ValueError("hard_mask: scores hold NaN; expected numbers that can be ordered")
    # How many of the other three come before each; a sort of 4 costs ten times as much.
    before = [torch.zeros_like(s[0], dtype=torch.uint8) for _ in s]
    for i, j in combinations(range(4), 2):
        first = s[i] >= s[j]
        before[j] += first
        before[i] += ~first
    return (torch.stack(before, -1) < 2).flatten(-2)


def is_two_four(weight: torch.Tensor) -> bool:
    """Whether every group of a (O, I) weight has at most 2 nonzeros; False unless 4 divides I."""
    if weight.shape[-1] % 4:
        return False
    return not bool((_groups(weight, "is_two_four").count_nonzero(-1) > 2).any())


def candidate_of(mask: torch.Tensor) -> torch.Tensor:
    """Which row of `CANDIDATES` each group of a mask is; the inverse of `mask_of`.

    Args:
        mask: (O, I) bool.

    Returns:
        (O, I / 4) uint8 in 0..5.

    Raises:
        TypeError: not a bool tensor.
        ValueError: 4 does not divide I, or a group does not keep exactly 2.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"candidate_of: the mask is {mask.dtype}; expected torch.bool, True = kept")
    index_of = torch.full((16,), _NO_CANDIDATE, dtype=torch.uint8)
    index_of[_as_number(CANDIDATES)] = torch.arange(6, dtype=torch.uint8)
    index = index_of.to(mask.device)[_as_number(_groups(mask, "candidate_of"))]
    wrong = int((index == _NO_CANDIDATE).sum())
    if wrong:
        raise ValueError(
            f"candidate_of: {wrong} of {index.numel()} groups do not keep exactly 2 of 4; expected "
            "a 2:4 mask, as `hard_mask` makes it"
        )
    return index


def mask_of(candidates: torch.Tensor) -> torch.Tensor:
    """(O, G) indices 0..5 into `CANDIDATES` to the (O, 4 G) bool mask."""
    return CANDIDATES.to(candidates.device)[candidates.int()].flatten(-2)


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Three groups to a byte, c_0 + 6 c_1 + 36 c_2, rows one after the other: 0.667 bits a weight.

    Args:
        mask: (O, I) bool, exactly 2 kept in each group.

    Returns:
        (ceil(O I / 12),) uint8 below 216; groups missing from the last byte count as 0.

    Raises:
        ValueError, TypeError: as `candidate_of`.
    """
    c = candidate_of(mask).flatten()
    c = nn.functional.pad(c, (0, -c.numel() % 3)).view(-1, 3)
    return c[:, 0] + 6 * c[:, 1] + 36 * c[:, 2]


def unpack(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The inverse of `pack`.

    Args:
        packed: (B,) uint8.
        shape: (O, I).

    Returns:
        (O, I) bool.

    Raises:
        ValueError: another number of bytes than the shape needs, or a byte that `pack` never
            writes.
    """
    rows, width = shape
    groups = rows * (width // 4)
    needed = -(-groups // 3)
    if width % 4 or packed.dtype != torch.uint8 or packed.shape != (needed,):
        raise ValueError(
            f"unpack: {packed.dtype} {tuple(packed.shape)} for a mask of {(rows, width)}; expected "
            f"torch.uint8 ({needed},) and a width that 4 divides; the masks are damaged"
        )
    c = torch.stack([packed % 6, packed // 6 % 6, packed // 36], -1).flatten()
    if bool((packed >= _CODES).any()) or bool(c[groups:].any()):
        raise ValueError(
            f"unpack: a byte is {int(packed.max())} or names groups beyond the last; expected "
            f"bytes below {_CODES}; the masks are damaged"
        )
    return mask_of(c[:groups].view(rows, width // 4))


def save_masks(
    path: str | Path, masks: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write masks as safetensors, one packed tensor per module; the file is whole or not there.

    Args:
        masks: (O, I) bool by module name.
        metadata: strings; at least `source_model` and `method`.

    Raises:
        ValueError: a mask that is not 2:4, or metadata that the file cannot hold.
    """
    from safetensors.torch import save

    own = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "shapes": json.dumps({name: list(mask.shape) for name, mask in masks.items()}),
    }
    texts = all(isinstance(text, str) for pair in metadata.items() for text in pair)
    if not texts or not {"source_model", "method"} <= set(metadata) or set(own) & set(metadata):
        raise ValueError(
            f"save_masks: metadata is {dict(metadata)}; expected strings, `source_model` and "
            f"`method` among them, and none of {', '.join(own)}"
        )
    tensors = {name: pack(mask).cpu() for name, mask in masks.items()}
    replace_file(Path(path), save(tensors, metadata=own | dict(metadata)))


def _file(path: str | Path) -> Path:
    path = Path(path)
    return own_file(path, MASKS_FILE) if path.is_dir() else path


def load_masks(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a file that `save_masks` wrote.

    Args:
        path: the file, or a folder that `maskprune sparsify` wrote.

    Returns:
        (O, I) bool masks by module name, in the order in which they were saved, and the metadata.

    Raises:
        ValueError: no such file, not a 2:4 masks file of this format, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    path = _file(path)
    if not path.is_file():
        raise ValueError(f"masks file {path} does not exist; expected what `save_masks` wrote")
    try:
        with safe_open(path, framework="pt") as file:
            meta = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None
    if meta.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not a file of 2:4 masks; expected what `save_masks` wrote")
    version = meta.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}; this maskprune reads {FORMAT_VERSION}; install "
            "the version that wrote it"
        )
    shapes = _read_shapes(meta.pop("shapes", ""))
    if set(shapes) != set(tensors):
        raise ValueError(
            f"{path}: its header does not say the shape of each mask; the file is damaged, save "
            "the masks again"
        )
    masks = {}
    for name, shape in shapes.items():
        try:
            masks[name] = unpack(tensors[name], shape)
        except ValueError as error:
            raise ValueError(f"{path}, {name}: {error}; save them again") from None
    return masks, meta


def is_masks_file(path: str | Path) -> bool:
    """Whether the header of a file, or of a folder's masks file, says that `save_masks` wrote it.

    False where it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(_file(path), framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Set every weight that its mask leaves out to +0.0, in place.

    Args:
        masks: (O, I) bool for each module of `prunable(model)`, by name.

    Raises:
        ValueError: names or shapes that are not the model's; the model is then left as it is.
    """
    linears = prunable(model)
    strange = sorted(set(masks) ^ set(linears))
    if strange:
        raise ValueError(
            f"apply_masks: {len(masks)} masks for {len(linears)} linears, and {strange[0]} is in "
            "one only; use masks that were made for this model"
        )
    for name, module in linears.items():
        m, W = masks[name], oriented(module)
        if m.shape != W.shape or m.dtype != torch.bool:
            raise ValueError(
                f"apply_masks: the mask of {name} is {m.dtype} {tuple(m.shape)}; expected "
                f"torch.bool {tuple(W.shape)}; use masks that were made for this model"
            )
    for name, module in linears.items():
        # Not a product: a negative weight times 0 is -0.0, which some readers take for nonzero.
        W = oriented(module)
        W.masked_fill_(~masks[name].to(W.device), 0.0)


def _groups(values: torch.Tensor, caller: str) -> torch.Tensor:
    """(O, I) as (O, I / 4, 4)."""
    if values.dim() != 2 or values.shape[1] % 4:
        raise ValueError(
            f"{caller}: shape {tuple(values.shape)}; expected (out, in) with an input width that 4 "
            "divides"
        )
    return values.reshape(values.shape[0], values.shape[1] // 4, 4)


def _as_number(groups: torch.Tensor) -> torch.Tensor:
    """(..., 4) bool to 0..15, the first of 4 as the highest bit."""
    a, b, c, d = groups.byte().unbind(-1)
    return (8 * a + 4 * b + 2 * c + d).int()


def _read_shapes(text: str) -> dict[str, list[int]]:
    """Shapes by module name; empty where the text does not hold them."""
    try:
        shapes = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(shapes, dict):
        return {}
    for shape in shapes.values():
        if not isinstance(shape, list) or len(shape) != 2:
            return {}
        # Bounded, so that no file can overflow torch's sizes.
        if not all(type(size) is int and 0 <= size < 2**31 for size in shape):
            return {}
    return shapes
