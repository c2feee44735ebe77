"""Does a checkpoint read the same in transformers 4 and in the version installed?

    python tools/cross_version.py CHECKPOINT [--version 4.57.6]

Installs the other version into a temporary folder, runs the same tokens through both, and fails
on any difference of token ids or of logits beyond 1e-5 of the largest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
ids = AutoTokenizer.from_pretrained(folder)("The Moon is far from here. " * 20).input_ids
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits
torch.save({"ids": ids, "logits": logits, "version": transformers.__version__}, out)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--version", default="4.57.6")
    args = parser.parse_args()
    import torch

    found = []
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--target", str(site), "--no-deps",
             f"transformers=={args.version}", "tokenizers<0.23", "huggingface_hub<1.0"],
            check=True,
        )  # fmt: skip
        for path in ("", str(site)):
            out = Path(folder) / f"{len(found)}.pt"
            subprocess.run(
                [sys.executable, "-c", RUN, str(args.checkpoint), str(out)],
                env=os.environ | {"PYTHONPATH": path},
                check=True,
            )
            found.append(torch.load(out, weights_only=True))
    now, then = found
    gap = float((now["logits"] - then["logits"]).abs().max() / now["logits"].abs().max())
    same = now["ids"] == then["ids"]
    print(f"{now['version']} and {then['version']}: ids equal {same}, logits apart {gap:.1e}")
    return 0 if same and gap <= 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
