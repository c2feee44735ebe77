"""A run's place on disk: what it may replace, who holds it, how it stops, what a resume may be."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import tmpfs
from checkpoints_on_disk import write_checkpoint, write_text

from maskprune.cli import main
from maskprune.files import locked, new_folder, output_folder, replace_file, require_new_folder

PRUNE = (
    "--sparsity 0.3 --steps 24 --batch-size 2 --seq-len 16 --multiple_of 4 --warm-start-blocks 4 "
    "--lora-r 2 --output-r 4 --autocast none --save-steps 8"
).split()
SPARSIFY = "--steps 20 --batch-size 2 --seq-len 16 --prior none --autocast none".split()


@pytest.fixture
def place(tmp_path) -> Path:
    write_checkpoint(tmp_path / "model")
    write_text(tmp_path / "text.jsonl")
    return tmp_path


def prune(place: Path, *more: str, out: str = "out") -> int:
    data = ["--data", str(place / "text.jsonl")]
    return main(["prune", str(place / "model"), "-o", str(place / out), *PRUNE, *data, *more])


def said(capsys) -> str:
    """The one line of an error."""
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("maskprune ")]
    assert len(lines) == 1, lines
    return lines[0]


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("command", ["prune", "sparsify", "export"])
def test_overwrite_never_removes_what_is_read_or_what_is_not_ours(command, place, capsys):
    (place / "mine").mkdir()
    (place / "mine" / "thesis.tex").write_text("years of work")
    shutil.copytree(place / "model", place / "mine" / "model")
    masks = place / "mine" / "masks.safetensors"
    masks.write_text("")
    more = {
        "prune": [*PRUNE, "--data", str(place / "text.jsonl")],
        "sparsify": [*SPARSIFY, "--data", str(place / "text.jsonl")],
        "export": ["--masks", str(masks)],
    }[command]
    model = place / "mine" / "model"
    for out in (model, place / "mine", place):
        before = sorted(p for p in place.rglob("*"))
        assert main([command, str(model), "-o", str(out), "--overwrite", *more]) == 2
        assert "which the run reads" in said(capsys)
        assert sorted(p for p in place.rglob("*")) == before
    (place / "other").mkdir()
    (place / "other" / "notes.txt").write_text("mine")
    assert main([command, str(model), "-o", str(place / "other"), "--overwrite", *more]) == 2
    assert "holds notes.txt" in said(capsys)
    assert listing(place / "other") == ["notes.txt"]


def test_overwrite_replaces_a_result_with_its_report(place):
    assert prune(place) == 0
    (place / "out" / "report").mkdir()
    for drawn in ("report.html", "report/losses.png"):
        (place / "out" / drawn).write_text("what `maskprune report` draws")
    assert prune(place, "--overwrite", "--seed", "1") == 0
    record = json.loads((place / "out" / "maskprune" / "maskprune.json").read_text())
    assert record["seed"] == 1 and not (place / "out" / "report.html").exists()
    assert listing(place) == ["model", "out", "text.jsonl"]


def test_files_are_as_readable_as_the_umask_says(place):
    before = os.umask(0o027)
    try:
        assert prune(place) == 0
        replace_file(place / "one.json", "{}")
    finally:
        os.umask(before)
    files = [p for p in (place / "out").rglob("*") if p.is_file()] + [place / "one.json"]
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o640}


def test_a_second_run_on_the_same_output_is_refused(place, capsys):
    start = "import sys; from maskprune.files import locked; from pathlib import Path\n"
    start += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", start, str(place / "out")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        assert prune(place) == 2
        assert "another maskprune is writing to" in said(capsys)
        child.kill()
    # The lock died with its process, though its file is still there.
    assert listing(place) == [".out.lock", "model", "text.jsonl"]
    with locked(place / "out"):
        pass
    assert listing(place) == ["model", "text.jsonl"]


def test_a_lock_removes_the_empty_folders_that_it_made(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a" / "b" / "out"):
        raise ZeroDivisionError
    assert listing(tmp_path) == []
    with locked(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "b" / "out").mkdir()
    assert listing(tmp_path / "a" / "b") == ["out"]


def test_an_output_link_is_followed_unless_it_leads_nowhere(place, capsys):
    (place / "nowhere").symlink_to(place / "gone")
    assert prune(place, out="nowhere") == 2
    assert "is a link to" in said(capsys) and not (place / "gone").exists()
    (place / "big_disk").mkdir()
    (place / "link").symlink_to(place / "big_disk")
    assert prune(place, out="link") == 0
    assert (place / "link").is_symlink()
    assert (place / "big_disk" / "config.json").is_file()


def test_places_that_cannot_be_an_output_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        output_folder(tmp_path / "file")
    with pytest.raises(ValueError, match="choose a folder whose parents are folders"):
        output_folder(tmp_path / "file" / "out")
    with pytest.raises(ValueError, match="is a mount point"):
        output_folder("/")
    assert output_folder(tmp_path / "a" / ".." / "b") == tmp_path / "b"


def test_a_read_only_place_is_found_before_any_work(place, capsys):
    with tmpfs(place / "read_only", "1m") as folder:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        assert prune(place, out="read_only/out") == 2
        assert "choose a folder that can be written" in said(capsys)
        found = ["eval", str(place / "none"), "--ppl", "x", "--json", str(folder / "x.json")]
        assert main(found) == 2
        assert "cannot be written; choose another file" in said(capsys)


def test_a_disk_without_space_is_found_before_any_work(place, capsys):
    with tmpfs(place / "small", "64k") as folder:
        assert prune(place, out="small/out") == 2
        assert "are free on the disk of" in said(capsys)
        assert listing(folder) == []


@pytest.mark.parametrize("when", ["at a checkpoint", "at the end"])
def test_a_disk_that_fills_up_is_one_line(when, place, capsys, monkeypatch):
    from maskprune.commands import prune as command

    save = command.save_proven

    def save_on_a_full_disk(model, folder, *args, **kw):
        with contextlib.suppress(OSError), (folder.parent / "ballast").open("wb", 0) as file:
            while file.write(b"x" * 4096):
                pass
        save(model, folder, *args, **kw)

    size = "100k"
    if when == "at the end":
        size = "4m"
        monkeypatch.setattr(command, "save_proven", save_on_a_full_disk)
    for module in ("training.checkpoints", "commands.prune"):
        monkeypatch.setattr(f"maskprune.{module}.require_space", lambda *_: None)
    with tmpfs(place / "small", size) as folder:
        assert prune(place, out="small/out") == 2
        line = said(capsys)
        assert "no space is left on the disk of" in line and "free some" in line
        assert ("continue with --resume" in line) == (when == "at the end")
        assert not (folder / "out").exists()
        if when == "at the end":
            (folder / "ballast").unlink()
            monkeypatch.undo()
            assert prune(place, "--resume", out="small/out") == 0


def run_until(appears: str, place: Path, signum: int, arguments: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a command that gets a signal once a path matches."""
    start = "import sys; from maskprune.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, *arguments]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(place.glob(appears)):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signum)
    _, err = child.communicate(timeout=120)
    return child.returncode, err


def test_sigterm_saves_a_checkpoint_from_which_the_run_resumes(place):
    steps = ["--steps", "60", "--save-steps", "1000", "--logging-steps", "1"]
    data = ["--data", str(place / "text.jsonl")]
    command = ["prune", str(place / "model"), "-o", str(place / "out"), *PRUNE, *data, *steps]
    code, err = run_until("out.run/trace.jsonl", place, signal.SIGTERM, command)
    assert code == 128 + signal.SIGTERM
    (line,) = [x for x in err.splitlines() if x.startswith("maskprune prune")]
    assert "stopped by SIGTERM" in line and "continue from it with --resume" in line
    assert listing(place) == ["model", "out.run", "text.jsonl"]
    assert prune(place, *steps, "--resume") == 0
    trace = (place / "out" / "maskprune" / "trace.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in trace] == list(range(1, 61))


def test_a_signal_before_training_leaves_nothing_and_promises_nothing(place, capsys, monkeypatch):
    def signalled(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr("maskprune.structured.prune.one_shot", signalled)
    assert prune(place) == 128 + signal.SIGTERM
    line = said(capsys)
    assert "nothing was kept" in line and "--resume" not in line
    assert listing(place) == ["model", "text.jsonl"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def stopped(place: Path, monkeypatch, step: int = 12) -> None:
    """A run that was interrupted after its first checkpoint."""
    from maskprune.structured.trainer import PruneTrainer

    loss = PruneTrainer.compute_loss

    def interrupted(self, *args, **kw):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return loss(self, *args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(PruneTrainer, "compute_loss", interrupted)
        assert prune(place) == 130


def test_what_a_resumed_run_may_and_may_not_change(place, capsys, monkeypatch):
    stopped(place, monkeypatch)
    assert "continue from it with --resume" in said(capsys)
    text = (place / "text.jsonl").read_text()
    write_text(place / "text.jsonl", documents=50)
    assert prune(place, "--resume") == 2
    assert "sha256 of the tokens read" in said(capsys)
    (place / "text.jsonl").write_text(text)
    assert prune(place, "--resume", "--lora-r", "4") == 2
    assert "lora_r 2 -> 4" in said(capsys)
    monkeypatch.chdir(place)
    relative = ["prune", "model", "-o", "out", *PRUNE, "--data", "text.jsonl", "--resume"]
    other = ["--save-steps", "3", "--logging-steps", "1", "--device", "cpu"]
    assert main([*relative, *other]) == 0
    assert listing(place) == ["model", "out", "text.jsonl"]


def test_a_run_from_before_a_setting_existed_keeps_what_it_did_then(place, capsys, monkeypatch):
    stopped(place, monkeypatch)
    said(capsys)
    settings = place / "out.run" / "settings.json"
    older = json.loads(settings.read_text())
    assert (
        older.pop("lm_weight") == 0.3
        and older.pop("refine_passes") == 0
        and older.pop("self_text") == 0
    )
    settings.write_text(json.dumps(older))
    assert prune(place, "--resume", "--refine-passes", "2") == 2
    assert "refine_passes 0 -> 2" in said(capsys)
    assert prune(place, "--resume") == 2
    assert "lm_weight 0.0 -> 0.3" in said(capsys)
    assert prune(place, "--resume", "--lm-weight", "0") == 0


def test_resume_without_a_whole_checkpoint_says_so(place, capsys, monkeypatch):
    stopped(place, monkeypatch)
    said(capsys)
    (place / "out.run" / "checkpoint-8" / "complete.json").unlink()
    assert prune(place, "--resume") == 2
    assert "has no whole checkpoint to continue from; start without --resume" in said(capsys)
    assert prune(place) == 0


def test_weights_that_are_not_finite_are_found_before_training(place, capsys):
    from safetensors.torch import load_file, save_file

    file = place / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    data = ["--data", str(place / "text.jsonl")]
    sparsify = ["sparsify", str(place / "model"), "-o", str(place / "out"), *SPARSIFY, *data]
    runs = (
        lambda: prune(place),
        lambda: main(sparsify),
        lambda: main([*sparsify, "--method", "magnitude"]),
    )
    for run in runs:
        assert run() == 2
        line = said(capsys)
        assert "layers.1.mlp.up_proj.weight holds NaN or infinite values as float32" in line
        assert listing(place) == ["model", "text.jsonl"]


def edit(place: Path, **changes) -> None:
    path = place / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_attention_heads=0), "no config could be read"),
        (dict(num_hidden_layers="three"), "num_hidden_layers"),
        (dict(num_key_value_heads=3), "heads that the KV heads divide"),
        (dict(quantization_config={"quant_method": "bitsandbytes"}), "is quantised (bitsandbytes)"),
        (dict(max_position_embeddings=8), "seq_len is 16; expected 2 up to the model's 8"),
    ],
)
def test_odd_configs_are_one_line(changes, message, place, capsys):
    edit(place, **changes)
    data = ["--data", str(place / "text.jsonl")]
    commands = [
        ["prune", str(place / "model"), "-o", str(place / "out"), *PRUNE, *data],
        ["sparsify", str(place / "model"), "-o", str(place / "out"), *SPARSIFY, *data],
    ]
    if "max_position_embeddings" not in changes:
        commands.append(["plan", str(place / "model"), "--sparsity", "0.3"])
    for command in commands:
        assert main(command) == 2
        line = said(capsys)
        assert message in line and len(line) < 400
    assert listing(place) == ["model", "text.jsonl"]


def test_a_tokenizer_of_another_model_is_refused(place, capsys):
    write_checkpoint(place / "small", vocab_size=40)
    data = ["--data", str(place / "text.jsonl")]
    for command in (["prune", *PRUNE], ["sparsify", *SPARSIFY]):
        name, *more = command
        assert main([name, str(place / "small"), "-o", str(place / "out"), *more, *data]) == 2
        assert "the model embeds 40 tokens" in said(capsys)
    ppl = ["--ppl", str(place / "text.jsonl"), "--seq-len", "16"]
    assert main(["eval", str(place / "small"), *ppl]) == 2
    assert "the model embeds 40 tokens" in said(capsys)
    assert listing(place) == ["model", "small", "text.jsonl"]


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("--max-shard-size", "5 potatoes", "max_shard_size is '5 potatoes'"),
        ("--output-r", "100000", "output_r is 100000; expected at most 128"),
        ("--lora-r", "129", "lora_r is 129; expected at most 128"),
        ("--device", "meta", "device is 'meta'; expected auto, cpu"),
        ("--device", "mps", "device is 'mps'; expected auto, cpu"),
        ("--device", "cuda:99", "device is 'cuda:99', but torch sees"),
    ],
)
def test_bad_values_are_refused_before_any_work(flag, value, message, place, capsys, monkeypatch):
    monkeypatch.setattr("maskprune.commands.prune.load_to_train", None)
    assert prune(place, flag, value) == 2
    assert message in said(capsys)
    assert listing(place) == ["model", "text.jsonl"]


@pytest.mark.parametrize("steps, reached", [("40", False), ("60", True)])
def test_a_schedule_that_ends_before_the_budget_is_refused(steps, reached, place, capsys):
    cold = ["--warm-start", "none", "--interval", "10", "--sparsity", "0.5", "--steps", steps]
    assert prune(place, *cold) == (0 if reached else 2)
    if not reached:
        assert "40 steps from --warm-start none end at R = " in said(capsys)
        assert listing(place) == ["model", "text.jsonl"]


def test_a_new_folder_lists_its_files(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "maskprune").mkdir()
        (folder / "maskprune" / "a").write_text("1")
    listed = json.loads((tmp_path / "out" / "maskprune" / "files.json").read_text())
    assert listed == ["maskprune/a", "maskprune/files.json"]
    require_new_folder(tmp_path / "out", True)
    with pytest.raises(ValueError, match="exists and is not empty"):
        require_new_folder(tmp_path / "out", False)
