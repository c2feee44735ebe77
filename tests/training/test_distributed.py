"""Runs of several processes: the same model as one process trains, written once, ended together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from checkpoints_on_disk import write_checkpoint, write_text
from rank_jobs import (
    SHARDED,
    TWO_FOUR,
    WAYS,
    command,
    command_with_nan,
    prune_one,
    sparsify_in_eight_bits,
    sparsify_one,
    train_all,
    train_and_resume,
    train_on_four,
    train_on_one,
    train_sharded,
    trained,
    unfinished,
)
from ranks import launch, run_ranks, said, wait
from safetensors.torch import load_file

from maskprune.cli import main
from maskprune.training import interrupt
from maskprune.two_four.patterns import load_masks

# Largest difference of what one process and several train in 40 steps, by what it is.
TOLERANCE = {"masks": 1e-6, "adapters": 1e-5, "logits": 1e-4, "signal": 1e-3}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(folder, what one process trained)."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, train_all(folder)


def on_two(job, folder, alone):
    """(folder, what each of two ranks trained)."""
    run_ranks(2, job, folder, alone[0])
    return folder, [torch.load(folder / f"found.{r}") for r in range(2)]


@pytest.fixture(scope="module")
def whole(alone, tmp_path_factory):
    """Two ranks that hold the whole model each."""
    return on_two(train_and_resume, tmp_path_factory.mktemp("whole"), alone)


@pytest.fixture(scope="module")
def sharded(alone, tmp_path_factory):
    """Two ranks over which the model is spread."""
    return on_two(train_sharded, tmp_path_factory.mktemp("sharded"), alone)


@pytest.fixture(params=["whole", "sharded"])
def runs(request):
    return request.getfixturevalue(request.param)


def require_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        kind = "masks" if name in ("head", "ffn") else "adapters"
        if value.dtype == torch.bool:
            assert torch.equal(ours[name], value), name
            continue
        away = (ours[name] - value).abs().max().item() if value.numel() else 0.0
        assert away <= TOLERANCE.get(name.partition(" ")[0], TOLERANCE[kind]), (name, away)


def require_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_all_ranks_end_with_the_same_bits(runs):
    _, (first, second) = runs
    assert first.keys() == second.keys()
    for name in first:
        # The masks of sharded logits are rank 0's alone.
        common = {k: v for k, v in first[name].items() if k in second[name]}
        assert common
        require_same(common, second[name])


@pytest.mark.parametrize("way", [*WAYS, "maskllm", "sparsegpt", "wanda"])
def test_two_processes_train_what_one_does(whole, alone, way):
    require_close(whole[1][0][way], alone[1][way])


@pytest.mark.parametrize("way", [*SHARDED, "maskllm"])
def test_two_processes_that_share_the_model_train_what_one_does(sharded, alone, way):
    require_close(sharded[1][0][way], alone[1][way])


def test_a_run_goes_on_with_as_many_processes_to_the_bit(runs):
    _, (first, _) = runs
    require_same(first["2 to 2"], first["plain"])


def test_a_run_goes_on_with_more_or_fewer_processes(runs, alone, tmp_path):
    folder, (first, _) = runs
    require_close(first["1 to 2"], alone[1]["plain"])
    run = unfinished(folder / "plain", tmp_path / "again")
    require_close(trained(prune_one(run, resume=True, **WAYS["plain"])), alone[1]["plain"])


def test_sharded_two_four_goes_on_with_any_number_of_processes(sharded, alone, tmp_path):
    folder, (first, _) = sharded
    require_same(first["maskllm 2 to 2"], first["maskllm"])
    require_close(first["maskllm 1 to 2"], alone[1]["maskllm"])
    run = unfinished(folder / "maskllm", tmp_path / "again")
    require_close(sparsify_one("maskllm", run, resume=True, **TWO_FOUR), alone[1]["maskllm"])


def test_sharded_moments_of_eight_bits_go_on_to_the_bit(tmp_path):
    pytest.importorskip("torchao", exc_type=ImportError)
    run_ranks(2, sparsify_in_eight_bits, tmp_path)
    for r in range(2):
        found = torch.load(tmp_path / f"found.{r}")
        moments = [v for name, v in found["at once"].items() if name.startswith("exp_avg")]
        # Of the part that this rank holds; smaller parts stay in 32 bits.
        assert moments and all(codes.dtype == torch.uint8 for codes in moments)
        assert max(codes.numel() for codes in moments) == 6 * 128 * 128 // 4 // 2
        require_same(found["again"], found["at once"])


def test_the_masks_signal_is_that_of_one_process(runs, alone):
    signal = alone[1]["plain"]["signal"]
    assert signal.numel() > 4 and (signal > 0).any()
    torch.testing.assert_close(runs[1][0]["plain"]["signal"], signal, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_nan_on_one_rank_ends_all_in_a_line(place, shard):
    given = arguments(place, "--shard", shard)
    codes = wait(launch(2, command_with_nan, place / "ranks", given), place / "ranks", seconds=90)
    assert codes == [2, 2]
    lines = [ln for ln in said(place / "ranks").splitlines() if ln.startswith("maskprune prune:")]
    assert len(lines) == 1 and "the loss is nan at step 1" in lines[0]
    assert not list(place.glob("out*"))


def test_progress_is_shown_by_one_rank(runs):
    folder, _ = runs
    assert "step 40/40" in said(folder)
    assert not (folder / "err.1").read_text()


def test_four_processes_train_what_one_does(alone, tmp_path):
    run_ranks(4, train_on_four, tmp_path)
    ranks = [torch.load(tmp_path / f"found.{r}") for r in range(4)]
    for other in ranks:
        told, sent = other.pop("refused"), other.pop("sent")
        assert other.pop("room") == 1000, "the rank with the least room decides for all"
        require_same(other, ranks[0])
        assert "embed_tokens.weight differ between rank 0 and rank 1; give every" in told
        # What is trained, and before every forward the tables of the positions; not the model.
        of_run = sum(value.nbytes for name, value in other.items() if name != "signal")
        assert of_run <= sent < 2 * of_run
    require_close(ranks[0], alone[1]["hidden"])


def test_one_process_of_torchrun_is_no_group(alone, tmp_path):
    run_ranks(1, train_on_one, tmp_path)
    require_same(torch.load(tmp_path / "found"), alone[1]["hidden"])


def arguments(place, *more):
    settings = (
        "--sparsity 0.3 --steps 40 --batch-size 2 --seq-len 16 --multiple_of 4 --lora-r 2 "
        "--output-r 4 --warm-start-blocks 4 --autocast none --save-steps 10"
    ).split()
    paths = ["prune", str(place / "model"), "-o", str(place / "out")]
    return [*paths, "--data", str(place / "text.jsonl"), *settings, *more]


@pytest.fixture
def place(tmp_path):
    write_checkpoint(tmp_path / "model", num_hidden_layers=2)
    write_text(tmp_path / "text.jsonl")
    return tmp_path


@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_killed_rank_ends_the_others_in_a_line_and_the_run_goes_on_to_one_output(place, shard):
    processes = launch(2, command, place / "first", arguments(place, "--shard", shard))
    while not (place / "out.run" / "checkpoint-10" / "complete.json").exists():
        assert processes[0].is_alive(), said(place / "first")
        time.sleep(0.01)
    processes[1].kill()
    assert wait(processes, place / "first", seconds=60)[0] == 2
    line = said(place / "first").splitlines()[-1]
    assert line.startswith("maskprune prune: another process of this run is gone, so rank 0 of 2")
    assert not (place / "out").exists()

    again = arguments(place, "--shard", shard, "--resume")
    codes = wait(launch(2, command, place / "again", again), place / "again")
    assert codes == [0, 0], said(place / "again")
    assert said(place / "again", "out").count("stock LlamaForCausalLM in") == 1
    assert not (place / "again" / "out.1").read_text()
    assert not (place / "again" / "err.1").read_text()
    assert not (place / "out.run").exists()
    assert main(["check", str(place / "out"), "--against", str(place / "model")]) == 0


def sparsify_arguments(place, out, *more):
    settings = "--steps 20 --batch-size 2 --seq-len 16 --autocast none --calibration-blocks 4"
    paths = ["sparsify", str(place / "model"), "-o", str(place / out)]
    return [*paths, "--data", str(place / "text.jsonl"), *settings.split(), *more]


def test_sharded_sparsify_writes_what_one_process_does(place):
    assert main(sparsify_arguments(place, "alone")) == 0
    given = sparsify_arguments(place, "out", "--shard", "full", "--max_shard_size", "20KB")
    codes = wait(launch(2, command, place / "ranks", given), place / "ranks")
    assert codes == [0, 0], said(place / "ranks")
    alone, ours = (
        {k: v for file in (place / name).glob("*.safetensors") for k, v in load_file(file).items()}
        for name in ("alone", "out")
    )
    require_same(ours, alone)
    assert len(list((place / "out").glob("*.safetensors"))) > 1
    record = json.loads((place / "out" / "maskprune" / "maskprune.json").read_text())
    assert record["logits_masked_against_exported"]["largest"] == 0
    require_same(load_masks(place / "out")[0], load_masks(place / "alone")[0])


def test_what_cannot_be_sharded_is_told_before_training(place):
    write_checkpoint(place / "odd", num_hidden_layers=2, intermediate_size=20)
    given = sparsify_arguments(place, "out", "--shard", "full")
    given[1] = str(place / "odd")
    codes = wait(
        launch(3, command, place / "three", [*given, "--batch-size", "3"]), place / "three"
    )
    assert codes == [2, 2, 2]
    (line,) = [line for line in said(place / "three").splitlines() if "maskprune" in line]
    assert "q_proj has 32, which 3 processes do not divide" in line
    assert main(sparsify_arguments(place, "out", "--shard", "full", "--method", "wanda")) == 2
    assert not list(place.glob("out*"))


@pytest.mark.parametrize("ranks", [(0, 1, 0, 1), (1,)], ids=["all, twice", "one"])
def test_a_signal_stops_all_ranks_after_one_step_with_a_checkpoint(place, ranks):
    more = ("--steps", "4000", "--save-steps", "4000")
    processes = launch(2, command, place / "first", arguments(place, *more))
    while "step 20/" not in said(place / "first"):
        assert processes[0].is_alive(), said(place / "first")
        time.sleep(0.01)
    for number in ranks:
        os.kill(processes[number].pid, signal.SIGTERM)
    codes = wait(processes, place / "first", seconds=60)
    assert codes == [128 + signal.SIGTERM] * 2, said(place / "first")
    lines = [line for line in said(place / "first").splitlines() if line.startswith("maskprune")]
    assert len(lines) == 1 and "stopped by SIGTERM; " in lines[0], lines
    assert "is saved, continue from it with --resume" in lines[0]
    assert not (place / "first" / "err.1").read_text()
    (checkpoint,) = (place / "out.run").glob("checkpoint-*")
    assert (checkpoint / "complete.json").exists() and not (place / "out").exists()


def test_a_signal_that_comes_while_the_ranks_agree_is_told_at_the_next_step(monkeypatch):
    signals = interrupt._Signals()
    monkeypatch.setattr(interrupt.dist, "is_initialized", lambda: True)

    def all_reduce(told, *_, **__):
        signals.received = signal.SIGTERM

    monkeypatch.setattr(interrupt.dist, "all_reduce", all_reduce)
    assert not signals.agree()
    assert signals.agree() and signals.received == signal.SIGTERM


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--batch-size", "3"], "3 sequences each, which 2 processes do not divide"),
        (["--sparsity", "7"], "expected a number between 0 and 1"),
    ],
)
def test_bad_input_is_told_once_and_leaves_nothing(place, changes, told):
    codes = wait(launch(2, command, place / "ranks", arguments(place, *changes)), place / "ranks")
    assert codes == [2, 2]
    lines = [line for line in said(place / "ranks").splitlines() if "maskprune" in line]
    assert len(lines) == 1 and told in lines[0]
    assert not list(place.glob("out*"))


def test_python_m_maskprune_is_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "maskprune", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip()
