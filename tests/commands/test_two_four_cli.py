"""`maskprune sparsify` as a user types it: a stock 2:4 checkpoint, or one line of why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints_on_disk import strange_tensors, write_checkpoint, write_text

from maskprune.cli import main
from maskprune.commands.run_folder import read_config
from maskprune.commands.sparsify import device_of_blocks
from maskprune.config import SparsifyConfig
from maskprune.training import layer_by_layer
from maskprune.two_four.patterns import is_two_four, load_masks, oriented, prunable

LEARN = (
    "--steps 20 --batch-size 2 --seq-len 16 --calibration-blocks 4 --prior wanda --autocast none "
    "--save-steps 8 --logging-steps 5"
).split()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two_four")
    write_checkpoint(folder / "model")
    write_text(folder / "text.jsonl")
    return folder


def sparsify(place, out, *more) -> int:
    data = ["--data", str(place / "text.jsonl")]
    return main(["sparsify", str(place / "model"), "-o", str(out), *LEARN, *data, *more])


@pytest.fixture(scope="module")
def learned(place) -> Path:
    assert sparsify(place, place / "learned") == 0
    return place / "learned"


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_it_writes_a_stock_checkpoint_its_masks_and_its_record(learned):
    from transformers import AutoTokenizer

    model = load(learned)
    assert all(is_two_four(oriented(m)) for m in prunable(model).values())
    assert len(AutoTokenizer.from_pretrained(learned)("w1 w2").input_ids) == 2
    record = json.loads((learned / "maskprune/maskprune.json").read_text())
    assert record["format"] == "maskprune-two-four" and record["steps"] == 20
    assert record["settings"]["prior"] == "wanda" and "torch" in record["versions"]
    assert record["logits_masked_against_exported"]["largest"] == 0
    rows = [
        json.loads(line) for line in (learned / "maskprune/trace.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [1, 5, 10, 15, 20]
    masks, metadata = load_masks(learned / "maskprune/two_four.safetensors")
    for name, module in prunable(model).items():
        W = oriented(module)
        assert torch.equal(W.masked_fill(~masks[name], 0.0), W)
    assert metadata["method"] == "maskllm"
    assert not (learned.parent / "learned.run").exists()
    assert strange_tensors(learned) == set()
    card = (learned / "README.md").read_text()
    assert "2-4-sparsity" in card and "two of every four" in card and "whole heads" not in card


def test_the_report_shows_how_the_masks_settle(learned, place, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(learned, copy)
    assert main(["report", str(copy)]) == 0
    page = (copy / "report.html").read_text()
    assert "How the 2:4 masks settle" in page and "without the reward" in page
    assert sorted(p.stem for p in (copy / "report").glob("*.png")) == ["losses", "settling"]


def test_a_masks_file_is_applied_to_another_copy_of_the_model(learned, place, capsys):
    out = place / "applied"
    masks = ["--masks", str(learned)]
    assert main(["sparsify", str(place / "model"), "-o", str(out), *masks]) == 0
    ours, theirs = load(learned).state_dict(), load(out).state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert json.loads((out / "maskprune/maskprune.json").read_text())["method"] == "maskllm"


def test_masks_of_one_run_are_the_prior_of_another(learned, place, tmp_path):
    file = str(learned / "maskprune/two_four.safetensors")
    assert sparsify(place, tmp_path / "next", "--prior", file, "--learning-rate", "1e-9") == 0
    before, _ = load_masks(file)
    after, _ = load_masks(tmp_path / "next" / "maskprune/two_four.safetensors")
    same = torch.cat([(before[n] == after[n]).flatten() for n in before])
    assert float(same.double().mean()) > 0.9


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_one_shot_methods_write_the_same_kind_of_folder(method, place, tmp_path):
    more = ["--update-weights"] if method == "sparsegpt" else []
    assert sparsify(place, tmp_path / "out", "--method", method, *more) == 0
    model = load(tmp_path / "out")
    assert all(is_two_four(oriented(m)) for m in prunable(model).values())
    record = json.loads((tmp_path / "out" / "maskprune/maskprune.json").read_text())
    assert record["method"] == method and record["steps"] == 0
    assert not (tmp_path / "out" / "maskprune/trace.jsonl").exists()


def test_check_looks_for_the_zeros_where_the_weights_that_stay_were_adjusted(
    place, tmp_path, capsys
):
    out = tmp_path / "out"
    assert sparsify(place, out, "--method", "sparsegpt", "--update-weights") == 0
    against = ["--against", str(place / "model")]
    assert main(["check", str(out), *against]) == 0
    said = capsys.readouterr().out
    assert "SparseGPT adjusted the weights that stay" in said
    assert f"every weight that the masks of {out}" in said
    model = load(out)
    name, module = next(iter(prunable(model).items()))
    masks = load_masks(out)[0]
    with torch.no_grad():
        oriented(module)[~masks[name]] = 1.0
    model.save_pretrained(out)
    assert main(["check", str(out), *against]) == 1
    assert "FAIL  weights that the masks of" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_model_too_large_for_the_device_goes_there_block_by_block(
    method, place, tmp_path, monkeypatch, capsys
):
    """The CPU stands in for a GPU with a kilobyte free."""
    more = ["--method", method, *(["--update-weights"] if method == "sparsegpt" else [])]
    assert sparsify(place, tmp_path / "whole", *more) == 0
    assert "one by one" not in capsys.readouterr().err
    travelled, real = [], layer_by_layer.place
    monkeypatch.setattr(layer_by_layer, "place", lambda *a: (travelled.append(a), real(*a))[1])
    monkeypatch.setattr("maskprune.commands.sparsify.free_bytes", lambda device: 1000)
    assert sparsify(place, tmp_path / "parts", *more) == 0
    what = "is pruned there" if method == "magnitude" else "its blocks go there one by one"
    assert f"stays in the host's memory, and {what}" in capsys.readouterr().err
    assert bool(travelled) is (method != "magnitude")
    whole, parts = load(tmp_path / "whole").state_dict(), load(tmp_path / "parts").state_dict()
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_a_model_goes_block_by_block_where_it_and_its_proof_take_more_than_is_counted_on(
    place, monkeypatch
):
    config = read_config(str(place / "model"))
    weights = sum(p.nbytes for p in load(place / "model").parameters())
    widest = max(oriented(m).shape[1] for m in prunable(load(place / "model")).values())

    def goes(free, **settings):
        monkeypatch.setattr("maskprune.commands.sparsify.free_bytes", lambda device: free)
        return device_of_blocks(config, SparsifyConfig(device="cpu", **settings))

    for more, where in ((1, None), (-1, torch.device("cpu"))):
        assert goes((2 * weights + more) / 0.9, method="wanda") == where
        assert goes((weights + more) / 0.9, method="wanda", dtype="bfloat16") == where
        factors = 8 * 4 * widest**2
        beside = max(weights, factors)
        assert goes((weights + beside + more) / 0.9, method="sparsegpt") == where
        assert goes((weights + more) / 0.9, method="maskllm") is None


def test_check_sees_the_pattern_and_proves_it(learned, place, capsys):
    assert main(["check", str(learned)]) == 0
    assert "2:4 in every linear of its blocks" in capsys.readouterr().out
    main(["check", str(place / "model")])
    assert "2:4" not in capsys.readouterr().out
    file = str(learned / "maskprune/two_four.safetensors")
    against = ["--against", str(place / "model"), "--masks", file]
    assert main(["check", str(learned), *against]) == 0
    assert "equals the masked model" in capsys.readouterr().out
    assert main(["check", str(place / "model"), *against]) == 1


def test_resume_continues_a_run(place, tmp_path, monkeypatch, capsys):
    from maskprune.two_four.sparsify import SparsifyTrainer

    loss = SparsifyTrainer.compute_loss

    def killed(self, *args, **kw):
        if self.state.global_step == 12:
            raise KeyboardInterrupt
        return loss(self, *args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(SparsifyTrainer, "compute_loss", killed)
        assert sparsify(place, tmp_path / "out") == 130
    assert not (tmp_path / "out").exists()
    assert sparsify(place, tmp_path / "out") == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert sparsify(place, tmp_path / "out", "--resume", "--seed", "1") == 2
    assert "seed 0 -> 1" in capsys.readouterr().err
    write_text(tmp_path / "other.jsonl")
    other = ["--data", str(tmp_path / "other.jsonl")]
    assert sparsify(place, tmp_path / "out", "--resume", *other) == 2
    assert "data " in capsys.readouterr().err
    assert sparsify(place, tmp_path / "out", "--resume") == 0
    assert sparsify(place, tmp_path / "whole") == 0
    a, _ = load_masks(tmp_path / "out" / "maskprune/two_four.safetensors")
    b, _ = load_masks(tmp_path / "whole" / "maskprune/two_four.safetensors")
    assert all(torch.equal(a[n], b[n]) for n in b)


@pytest.mark.parametrize(
    "more, said",
    [
        (["--prior", "gone.safetensors"], "gone.safetensors"),
        (["--method", "flap"], "expected one of maskllm, sparsegpt, wanda, magnitude"),
        (["--update-weights"], "update_weights is for --method sparsegpt"),
        (["--masks", "gone.safetensors"], "gone.safetensors"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_nothing(more, said, place, tmp_path, capsys):
    assert sparsify(place, tmp_path / "out", *more) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert said in err[-1] and len(err) == 1
    assert not list(tmp_path.iterdir())


def test_bad_input_found_late_leaves_no_run_behind(learned, place, tmp_path, capsys):
    other = write_checkpoint(tmp_path / "other", intermediate_size=48)
    file, data = learned / "maskprune/two_four.safetensors", place / "text.jsonl"
    more = ["-o", str(tmp_path / "out"), *LEARN, "--data", str(data), "--prior", str(file)]
    assert main(["sparsify", str(other), *more]) == 2
    assert "use masks that were made on this model" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]


def test_a_folder_with_other_files_is_not_taken_for_a_run(place, tmp_path, capsys):
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "thesis.tex").write_text("years of work")
    assert sparsify(place, tmp_path / "out") == 2
    assert "holds other files" in capsys.readouterr().err
    assert sparsify(place, tmp_path / "out", "--resume") == 2
    assert "move that one away" in capsys.readouterr().err
    assert (tmp_path / "out.run" / "thesis.tex").read_text() == "years of work"


def test_magnitude_needs_no_text(place, tmp_path):
    out = tmp_path / "out"
    assert main(["sparsify", str(place / "model"), "-o", str(out), "--method", "magnitude"]) == 0
    assert json.loads((out / "maskprune/maskprune.json").read_text())["data"] is None


def test_an_output_folder_that_exists_is_refused_before_any_work(learned, place, capsys):
    assert sparsify(place, learned) == 2
    assert "exists and is not empty" in capsys.readouterr().err
