"""The command-line flags that every benchmark has."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

import torch


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with the flags every benchmark has; a bad argument is one line, exit 2."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        self.add_argument("--threads", type=int, help="CPU threads (default: all this process has)")
        self.add_argument("--seed", type=int, default=0)
        self.add_argument("--rounds", type=int, default=20, help="samples per provider")
        self.add_argument("--rows", type=Path, help="JSON lines file the rows are added to")
        self.add_argument("--overwrite", action="store_true", help="replace rows of equal cases")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")
