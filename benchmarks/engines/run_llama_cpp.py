"""llama.cpp through its C interface: runs in an environment of its own, see `__main__.py`."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import xllamacpp.xllamacpp
from llama_cpp_py_sync._cffi_bindings import get_ffi

from benchmarks.engines.turns import Clock, take_turns

# One wheel has the library, for older Linux systems too; the other, the declarations beside it.
ffi = get_ffi()
lib = ffi.dlopen(xllamacpp.xllamacpp.__file__)
F32, F16 = 0, 1
messages: list[str] = []


@ffi.callback("void(enum ggml_log_level, const char *, void *)")
def _log(level: int, text: Any, _: Any) -> None:
    if level == 4:
        messages.append(ffi.string(text).decode(errors="replace").strip())


class Model:
    """One GGUF file, loaded; its KV cache in float32 (`exact`) or float16."""

    def __init__(self, path: str, threads: int, *, exact: bool) -> None:
        messages.clear()
        settings = lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(path.encode(), settings)
        if self.model == ffi.NULL:
            raise RuntimeError(messages[0] if messages else "llama.cpp gave no reason")
        settings = lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = F32 if exact else F16
        settings.flash_attn_type = 0
        self.context = lib.llama_init_from_model(self.model, settings)
        if self.context == ffi.NULL:
            raise RuntimeError(messages[0] if messages else "llama.cpp made no context")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def close(self) -> None:
        """Free what llama.cpp holds."""
        lib.llama_free(self.context)
        lib.llama_model_free(self.model)

    def forget(self) -> None:
        """Empty the KV cache."""
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)

    def feed(self, tokens: list[int], start: int, *, every: bool = False) -> np.ndarray:
        """Logits (1, V) after the last of `tokens`, which lie from `start` on; or after `every`."""
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, start + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = every or i == len(tokens) - 1
            if code := lib.llama_decode(self.context, batch):
                raise RuntimeError(f"llama_decode gave {code}")
            at = range(len(tokens)) if every else (len(tokens) - 1,)
            size = 4 * self.vocabulary
            rows = [ffi.buffer(lib.llama_get_logits_ith(self.context, i), size) for i in at]
            return np.stack([np.frombuffer(row, np.float32) for row in rows])
        finally:
            lib.llama_batch_free(batch)


def check_declarations() -> None:
    """Refuse to run where the declarations are not those of the library."""
    defaults = lib.llama_context_default_params()
    seen = [defaults.n_ctx, defaults.n_batch, defaults.n_ubatch, defaults.type_k, defaults.type_v]
    if seen != [512, 2048, 512, F16, F16] or not lib.llama_model_default_params().use_extra_bufts:
        raise SystemExit(f"llama.cpp's declarations are not its library's: defaults read {seen}")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def compare(path: str, reference: str, threads: int) -> dict[str, Any]:
    """Greedy tokens and all log-probabilities, decoded token by token after each prompt.

    The engine is fed the reference's tokens, so that a difference counts once.
    """
    model = Model(path, threads, exact=True)
    asked = np.load(reference)
    same, total, largest = 0, 0, 0.0
    parts = (asked[key] for key in ("tokens", "prompt", "logprobs"))
    for row, prompt, expected in zip(*parts, strict=True):
        tokens = [int(token) for token in row if token >= 0]
        model.forget()
        said = [model.feed(tokens[:prompt], 0)]
        said += [model.feed([tokens[at]], at) for at in range(prompt, len(tokens) - 1)]
        logprobs = log_softmax(np.concatenate(said))[:, : expected.shape[1]]
        same += int((logprobs.argmax(-1) == tokens[prompt:]).sum())
        total += len(tokens) - int(prompt)
        largest = max(largest, float(np.abs(logprobs - expected).max()))
    model.close()
    return {"same_tokens": same, "tokens": total, "logprob_difference": largest}


def perplexity(path: str, windows: str, threads: int) -> dict[str, Any]:
    """exp of the mean loss over windows of tokens (N, T), saved by numpy."""
    model = Model(path, threads, exact=True)
    loss, count = 0.0, 0
    for window in np.load(windows):
        model.forget()
        logprobs = log_softmax(model.feed(window.tolist(), 0, every=True)[:-1])
        loss -= float(logprobs[np.arange(len(window) - 1), window[1:]].sum())
        count += len(window) - 1
    model.close()
    return {"ppl": float(np.exp(loss / count)), "ppl_tokens": count}


def race(
    paths: dict[str, str], threads: int, prefill: int, decode: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Tokens a second of every model; the KV cache in float16."""
    models = {name: Model(path, threads, exact=False) for name, path in paths.items()}

    def once(name: str, clock: Clock) -> tuple[float, float]:
        model = models[name]
        model.forget()
        begin = clock()
        model.feed([100 + i for i in range(prefill)], 0)
        middle = clock()
        for i in range(decode):
            model.feed([200 + i], prefill + i)
        return prefill / (middle - begin), decode / (clock() - middle)

    return take_turns(models, rounds, threads, once)


def load(path: str, threads: int) -> dict[str, Any]:
    """Nothing beyond that it loads."""
    Model(path, threads, exact=True).close()
    return {}


TASKS = {"load": load, "compare": compare, "perplexity": perplexity, "race": race}


def main() -> None:
    """Tasks come as JSON lines on stdin, `{task, name, arguments}`; an answer for each goes out."""
    check_declarations()
    lib.llama_log_set(_log, ffi.NULL)
    lib.llama_backend_init()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            done = {"done": TASKS[asked["task"]](**asked["arguments"])}
        except RuntimeError as error:
            done = {"error": str(error)}
        print("ROW" + json.dumps({"name": asked["name"]} | done), flush=True)


if __name__ == "__main__":
    main()
