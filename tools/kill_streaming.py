"""Kill a streaming export at random moments; what is left must never look finished.

python tools/kill_streaming.py --kills 50

After every kill the output is missing or whole; a run over the leftovers succeeds, with the bytes
of an export that nobody killed, and leaves nothing beside it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from maskprune.streaming.export import export_checkpoint
from maskprune.structured.masks import attach_masks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from models import randomise, tiny_model  # noqa: E402

SIZES = dict(vocab_size=4096, hidden_size=512, intermediate_size=2048, num_hidden_layers=12)


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def listed(folder: Path) -> set[str]:
    """What lies in a folder beside the lock of a killed process, which holds nobody up."""
    return {name for name in os.listdir(folder) if not name.endswith(".lock")}


def export_in_child(source: Path, masks: Path, out: Path, overwrite: bool) -> int:
    """Process id of a forked child that exports and exits with 0."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(2)
        export_checkpoint(
            source, masks, out, max_shard_size="20MB", overwrite=overwrite, progress=False
        )
        status = 0
    finally:
        os._exit(status)


def require(holds: bool, what: str) -> None:
    if not holds:
        sys.exit(f"kill_streaming: {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    # A second thread here would leave the forked children's OpenMP without its team.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, masks_file, out = folder / "source", folder / "masks", folder / "out"
        model = tiny_model("llama", dtype=torch.bfloat16, **SIZES)
        model.save_pretrained(source, max_shard_size="30MB")
        randomise(attach_masks(model), 1, 700).save(masks_file)
        del model
        started = time.monotonic()
        _, status = os.waitpid(export_in_child(source, masks_file, out, False), 0)
        duration = time.monotonic() - started
        require(status == 0, f"an export that nobody killed failed with {status}")
        whole, names = contents(out), listed(folder)
        unfinished = 0
        for kill in range(args.kills):
            overwrite = kill % 2 == 1
            if not overwrite and out.exists():
                shutil.rmtree(out)
            child = export_in_child(source, masks_file, out, overwrite)
            time.sleep(random.uniform(0, duration))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            unfinished += listed(folder) != names
            require(not out.exists() or contents(out) == whole, f"kill {kill} left a part")
            child = export_in_child(source, masks_file, out, True)
            _, status = os.waitpid(child, 0)
            require(status == 0, f"the run after kill {kill} failed with {status}")
            require(contents(out) == whole, f"the run after kill {kill} wrote other bytes")
            require(listed(folder) == names, f"kill {kill} left {os.listdir(folder)}")
    print(f"{args.kills} kills within {duration:.2f} s, {unfinished} of them before the end: ok")


if __name__ == "__main__":
    main()
