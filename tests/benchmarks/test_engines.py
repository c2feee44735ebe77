"""The engines' benchmark: its models, its verdicts, and the page made from its rows."""

from __future__ import annotations

import json
import os
import select
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.engines import scripted
from benchmarks.engines.__main__ import agrees, contradiction
from benchmarks.engines.environments import ENVIRONMENTS, MARKER, Environment, ready
from benchmarks.engines.following import follow, go_along, log_softmax
from benchmarks.engines.models import NEW_TOKENS, write_small
from benchmarks.engines.page import PAGES, render, summary
from benchmarks.engines.runner import answers, stream
from benchmarks.engines.scripted import Scripted
from benchmarks.engines.vllm_cpu import short
from benchmarks.harness import read_rows
from maskprune.hf.load import load_model

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "benchmarks" / "results" / "engines.jsonl"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_pages_are_made_from_the_committed_rows(page):
    page = ROOT / page
    assert render(page, read_rows(ROWS)) == page.read_text(), "run `make docs`"


def test_an_engine_is_summed_up_over_its_pruned_models():
    common = {"engine": "mlx", "what": "agreement", "date": "2026-01-01", "packages": "mlx==1 x"}
    ran = common | {"loads": True, "same_tokens": 127, "tokens": 128}
    refused = common | {"loads": False}
    rows = [
        (ran, "llama", "kv_group"),
        (ran, "llama", "query_head"),
        (refused, "opt", "ffn"),
        (ran, "opt", "dense"),
    ]
    table = summary(
        [row | {"family": f, "head_unit": u, "model": f"{f} {u}"} for row, f, u in rows]
    )
    assert table.splitlines()[2:] == ["| mlx | `mlx==1` | 1 of 2 | 2 of 3 | 254 of 256 |"]


def test_rows_say_what_the_table_promises():
    rows = [row for row in read_rows(ROWS) if row["what"] == "agreement"]
    assert not [wrong for row in rows if (wrong := contradiction(row))]


ROW = {"engine": "x", "model": "m", "loads": True, "same_tokens": 128, "tokens": 128}
ROW |= {"logprob_difference": 1e-5}


@pytest.mark.parametrize(
    ("changes", "expected", "wrong"),
    [
        ({}, "loads", None),
        ({"loads": False, "error": "no"}, "refused", None),
        ({"logprob_difference": 8.0}, "refused", None),
        ({}, "refused", "said to be refused and runs"),
        ({}, "unknown", "has no line"),
        ({"same_tokens": 90}, "loads", "90 of 128 tokens"),
        ({"logprob_difference": 0.5}, "slower", "promised and does not run"),
        ({"loads": False, "error": "no such class"}, "loads", "does not run: no such class"),
    ],
)
def test_what_an_engine_does_is_held_against_the_table(changes, expected, wrong):
    row = ROW | changes | {"expected": expected}
    found = contradiction(row)
    assert (found is None) if wrong is None else wrong in found
    assert agrees(ROW)


@torch.no_grad()
def test_small_models_are_written_with_what_transformers_computes(tmp_path):
    described = write_small(tmp_path, ["qwen2"], ["llama.cpp"])
    # Head-pruned Qwen2 changes its class; its own is tried dense and with the FFN alone.
    assert {name: facts["class"] for name, facts in described.items()} == {
        "qwen2 dense": "qwen2",
        "qwen2 kv_group": "seed_oss",
        "qwen2 query_head": "llama",
        "qwen2 ffn": "qwen2",
    }
    facts = described["qwen2 kv_group"]
    model, tokenizer = load_model(Path(facts["folder"]) / "model", dtype="float32")
    assert len(tokenizer) == model.config.vocab_size
    said = np.load(facts["reference"])
    assert said["logprobs"].shape[1:] == (NEW_TOKENS, model.config.vocab_size)
    parts = (said[key] for key in ("tokens", "prompt", "logprobs"))
    for row, prompt, logprobs in zip(*parts, strict=True):
        tokens = row[row >= 0]
        assert len(tokens) == prompt + NEW_TOKENS
        assert (logprobs.argmax(-1) == tokens[prompt:]).all()
        logits = model(torch.from_numpy(tokens[:prompt].astype(np.int64))[None]).logits[0, -1]
        torch.testing.assert_close(logits.log_softmax(-1), torch.from_numpy(logprobs[0]))


def test_an_engine_is_followed_token_by_token(tmp_path):
    """A counter: after token t it gives t + 1, and once something else."""
    vocab, path = 16, tmp_path / "reference.npz"

    def logits(token: int) -> np.ndarray:
        return np.eye(vocab, dtype=np.float32)[token] * 5

    tokens = np.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, -1]], np.int32)
    expected = [[log_softmax(logits(t)) for t in ts] for ts in ([4, 5, 6], [9, 10, 11])]
    np.savez(path, tokens=tokens, prompt=[3, 2], logprobs=np.float32(expected))
    fed: list[tuple[list[int], int]] = []

    def feed(given: list[int], start: int) -> np.ndarray:
        fed.append((given, start))
        return logits(13 if given == [9] else given[-1] + 1)

    found = follow(str(path), feed)
    assert fed[:3] == [([1, 2, 3], 0), ([4], 3), ([5], 4)] and fed[3] == ([7, 8], 0)
    assert (found["same_tokens"], found["tokens"]) == (5, 6)
    assert found["logprob_difference"] == pytest.approx(5, abs=1e-4)

    def write(given: list[int], new: int) -> list[tuple[int, np.ndarray]]:
        said = [13 if given == [7, 8] and i == 1 else given[-1] + 1 + i for i in range(new)]
        return [(token, logits(token)) for token in said]

    assert go_along(str(path), write) == found

    assert follow(str(path), lambda *_: np.full(vocab, np.nan))["logprob_difference"] == np.inf


def test_an_engine_is_given_folders_and_its_message_names_none(tmp_path, monkeypatch):
    def run(python, script, tasks, timeout, settings):
        assert script == "run_x.py" and settings["OMP_NUM_THREADS"] == "3"
        assert [task["task"] for task in tasks] == ["compare", "load"]
        yield "a", {"done": {"same_tokens": 1, "tokens": 1, "logprob_difference": 0.0}}
        yield "b", {"error": f"{tmp_path}/b/model is\nnot known"}

    monkeypatch.setattr(scripted, "stream", run)
    monkeypatch.setitem(ENVIRONMENTS, "x", Environment(("x==1",)))
    facts = {n: {"family": "llama", "folder": str(tmp_path / n)} for n in "abc"}
    facts["a"]["reference"], facts["c"]["family"] = "r.npz", "gemma3"
    engine = Scripted("x", left_out=("gemma3",))
    one, other = engine.small(Path(sys.executable), facts, tmp_path, 3)
    assert one["loads"] and one["packages"] == "x==1"
    assert not other["loads"] and other["error"] == "model is not known"


def test_a_script_that_dies_takes_one_task_with_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    task = json.loads(line)\n"
        "    if task['name'] == 'b': sys.exit('out of luck')\n"
        "    print('ROW' + json.dumps({'name': task['name'], 'done': {}}), flush=True)\n"
    )
    found = answers(Path(sys.executable), str(script), [{"name": n} for n in "abc"], 60)
    assert found["a"] == found["c"] == {"done": {}}
    assert "out of luck" in found["b"]["error"]
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ntime.sleep(60)\n")
    found = answers(Path(sys.executable), str(slow), [{"name": "a"}], 0.5)
    assert "no answer within" in found["a"]["error"]


def test_answers_come_one_by_one_and_a_script_that_is_left_is_ended_with_its_children(tmp_path):
    script, alive = tmp_path / "script.py", tmp_path / "alive"
    os.mkfifo(alive)
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    script.write_text(
        "import json, os, sys, time\n"
        "held = os.open(os.environ['ALIVE'], os.O_WRONLY)\n"
        "name = json.loads(sys.stdin.readline())['name']\n"
        "if os.fork(): print('ROW' + json.dumps({'name': name, 'done': {}}), flush=True)\n"
        "time.sleep(60)\n"
    )
    tasks = [{"name": n} for n in "ab"]
    coming = stream(Path(sys.executable), str(script), tasks, 60, {"ALIVE": str(alive)})
    assert next(coming) == ("a", {"done": {}})
    coming.close()
    # The end of the file: nobody holds it open any more.
    assert select.select([reader], [], [], 10)[0] and os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "ValidationError: 1 validation error for ModelConfig\n  Value error, Model "
            "architectures ['X'] are not supported. [type=value_error, input_value=1]\n  more",
            "Model architectures ['X'] are not supported.",
        ),
        ("RuntimeError: start (0) +\n length", "RuntimeError: start (0) + length"),
    ],
)
def test_what_vllm_says_is_one_line(error, said):
    assert short(error) == said


def test_an_environment_that_pip_cannot_make_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match="pip install failed: .*xllamacpp"):
        ready("llama.cpp", tmp_path / "engines")
    assert not (tmp_path / "engines" / "llama.cpp").exists()


def test_an_environment_is_made_anew_where_its_packages_changed(tmp_path, monkeypatch):
    from benchmarks.engines import environments

    calls: list[tuple[str, ...]] = []

    def run(*command: str) -> None:
        calls.append(command)
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True)
            (Path(command[-1]) / "bin" / "python").touch()

    monkeypatch.setattr(environments, "_run", run)
    monkeypatch.setitem(ENVIRONMENTS, "x", environments.Environment(("a==1",), remove=("b",)))
    python = ready("x", tmp_path)
    assert [c[2:4] for c in calls] == [("venv", str(tmp_path / "x")), ("pip", "install"),
                                       ("pip", "uninstall")]  # fmt: skip
    assert ready("x", tmp_path) == python and len(calls) == 3
    assert "a==1" in (tmp_path / "x" / MARKER).read_text()
    monkeypatch.setitem(ENVIRONMENTS, "x", environments.Environment(("a==2",)))
    ready("x", tmp_path)
    assert len(calls) == 5


def test_every_row_is_of_a_known_kind():
    for row in read_rows(ROWS):
        assert row["what"] in ("agreement", "speed", "quality"), json.dumps(row)
