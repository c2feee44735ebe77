"""vLLM on a CPU: runs in an environment of its own, see `__main__.py`."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams
from vllm.model_executor.models import registry

from benchmarks.engines.turns import Clock, take_turns

LONGEST = 256
KV_CACHE = 64 << 20


def engine(folder: str, dtype: str) -> LLM:
    """A model that is given token ids and asked for them, one sequence at a time."""
    return LLM(
        model=folder,
        dtype=dtype,
        max_model_len=LONGEST,
        max_num_seqs=1,
        max_logprobs=-1,
        kv_cache_memory_bytes=KV_CACHE,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )


def greedy(model: LLM, tokens: list[int], new: int, *, scored: bool = False) -> Any:
    """What vLLM writes after `tokens`; `scored`, with the log-probabilities of the vocabulary."""
    settings = SamplingParams(
        temperature=0, max_tokens=new, ignore_eos=True, detokenize=False,
        logprobs=-1 if scored else None, flat_logprobs=scored,
    )  # fmt: skip
    return model.generate({"prompt_token_ids": tokens}, settings, use_tqdm=False)[0].outputs[0]


def load(folder: str) -> dict[str, Any]:
    """Nothing beyond that it loads."""
    return {"runs_as": runs_as(engine(folder, "float32"))}


def runs_as(model: LLM) -> str:
    """The class that vLLM chose; a name that begins with Transformers is its general backend."""
    return str(model.llm_engine.model_config.architecture)


def compare(folder: str, reference: str) -> dict[str, Any]:
    """Greedy tokens and all log-probabilities, decoded token by token after each prompt.

    Where the engine chooses another token it goes on from the reference's, so that a difference
    counts once.
    """
    model = engine(folder, "float32")
    asked = np.load(reference)
    same, total, largest = 0, 0, 0.0
    for row, prompt, expected in zip(
        *(asked[key] for key in ("tokens", "prompt", "logprobs")), strict=True
    ):
        tokens = [int(token) for token in row if token >= 0]
        at = int(prompt)
        total += len(tokens) - at
        while at < len(tokens):
            out = greedy(model, tokens[:at], len(tokens) - at, scored=True)
            flat = out.logprobs
            for token, begin, end in zip(
                out.token_ids, flat.start_indices, flat.end_indices, strict=True
            ):
                ids = np.array(flat.token_ids[begin:end])
                known = ids < expected.shape[1]
                found = np.array(flat.logprobs[begin:end])[known]
                off = np.abs(found - expected[at - int(prompt)][ids[known]]).max()
                largest = max(largest, float(off))
                same += token == tokens[at]
                at += 1
                if token != tokens[at - 1]:
                    break
    return {"runs_as": runs_as(model), "same_tokens": same, "tokens": total} | {
        "logprob_difference": largest
    }


def race(
    paths: dict[str, str], threads: int, prefill: int, decode: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Tokens a second of every model in bfloat16."""
    models = {name: engine(path, "bfloat16") for name, path in paths.items()}
    prompt = [100 + i for i in range(prefill)]

    def once(name: str, clock: Clock) -> tuple[float, float]:
        begin = clock()
        greedy(models[name], prompt, 1)
        middle = clock()
        greedy(models[name], prompt, 1 + decode)
        first = middle - begin
        return prefill / first, decode / (clock() - middle - first)

    return take_turns(models, rounds, threads, once)


TASKS = {"load": load, "compare": compare, "race": race}


def main() -> None:
    """Tasks come as JSON lines on stdin, `{task, name, arguments}`; an answer for each goes out.

    Each in a child: a model that fails to load leaves its process unusable. So vLLM need not start
    another one, which imports it anew, to look at the model's class.
    """
    registry._run_in_subprocess = lambda look: look()
    for line in sys.stdin.readlines():
        asked = json.loads(line)
        if child := os.fork():
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status:
                answer(asked["name"], {"error": f"vLLM's process ended with status {status}"})
            continue
        try:
            done = {"done": TASKS[asked["task"]](**asked["arguments"])}
        except Exception as error:
            done = {"error": f"{type(error).__name__}: {error}"}
        answer(asked["name"], done)
        os._exit(0)


def answer(name: str, done: dict[str, Any]) -> None:
    """One line on stdout, on a line of its own whatever vLLM printed."""
    print("\nROW" + json.dumps({"name": name} | done), flush=True)


if __name__ == "__main__":
    main()
