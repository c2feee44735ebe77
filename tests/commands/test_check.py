"""`maskprune check`: what it proves of a result, and what it finds wrong."""

from __future__ import annotations

import json
import shutil

import pytest
from checkpoints_on_disk import PRUNE, write_checkpoint

from maskprune.cli import main


def test_check_proves_it_equal_to_the_masked_model(pruned, place, capsys):
    code = main(
        [
            "check",
            str(pruned),
            "--against",
            str(place / "model"),
            "--masks",
            str(pruned / "maskprune" / "masks.safetensors"),
            "--targets",
            "gguf,tp=2",
        ]
    )
    out = capsys.readouterr().out
    assert code == 0, out
    assert "equals the masked model" in out and "needs no remote code" in out


def test_check_takes_the_masks_that_are_in_the_checkpoint(pruned, place, capsys):
    assert main(["check", str(pruned), "--against", str(place / "model")]) == 0
    assert f"masks of {pruned / 'maskprune' / 'masks.safetensors'}" in capsys.readouterr().out


def test_prune_trains_weights_and_check_says_what_the_cut_was_compared_at(place, tmp_path, capsys):
    model, out = str(place / "model"), tmp_path / "out"
    at = PRUNE.index("--lora-r")
    settings = PRUNE[:at] + PRUNE[at + 2 :]
    settings = [*settings, "--train", "weights", "--data", str(place / "text.jsonl")]
    assert main(["prune", model, "-o", str(out), *settings]) == 0
    said = capsys.readouterr()
    assert "before its weights were trained" in said.out
    assert "Writing model shards" not in said.err
    record = json.loads((out / "maskprune" / "maskprune.json").read_text())
    assert record["settings"]["train"] == "weights"
    assert record["logits_masked_against_exported"]["relative"] < 1e-4
    assert not (out / "maskprune" / "adapter").exists()
    assert "before the training of its weights" in (out / "README.md").read_text()
    assert main(["check", str(out), "--against", model, "--masks", str(out)]) == 0
    said = capsys.readouterr().out
    assert "its weights were trained after the cut" in said
    assert f"token embeddings and output head are those of {model}, bit for bit" in said
    other = tmp_path / "other"
    write_checkpoint(other, seed=1, num_hidden_layers=3)
    assert main(["check", str(out), "--against", str(other)]) == 1
    assert f"FAIL  token embeddings or output head are not those of {other}" in (
        capsys.readouterr().out
    )
    assert main(["check", str(out), "--against", str(tmp_path / "none")]) == 2
    masks = str(out / "maskprune" / "masks.safetensors")
    again = [model, "--masks", masks, "--adapter", str(out), "-o", str(tmp_path / "again")]
    assert main(["export", *again]) == 2
    said = capsys.readouterr().err
    assert "a run with --train weights keeps none" in said and "copy that" in said
    assert not (tmp_path / "again").exists()
    assert main(["export", model, "--masks", str(out), "-o", str(tmp_path / "again")]) == 0
    assert "the run trained its weights, which are not in its masks" in capsys.readouterr().err


def test_check_finds_a_checkpoint_that_is_not_equal(pruned, place, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(pruned, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0] *= 2
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert main(["check", str(copy), "--against", str(place / "model")]) == 1
    assert "FAIL  differs from the masked model" in capsys.readouterr().out


def test_check_without_any_masks_says_so(pruned, place, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(pruned, copy, ignore=shutil.ignore_patterns("maskprune"))
    assert main(["check", str(copy), "--against", str(place / "model")]) == 1
    said = capsys.readouterr().out
    assert "without masks (give those of the run with --masks)" in said
    assert "the masked model" not in said


def test_check_finds_weights_that_are_not_the_models(pruned, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(pruned, copy)
    shutil.copy(pruned / "maskprune" / "masks.safetensors", copy)
    assert main(["check", str(copy)]) == 1
    assert "FAIL  tensors that are not the model's: masks.safetensors" in capsys.readouterr().out


def test_check_notes_what_a_checkpoint_of_transformers_5_lacks_for_4(
    place, pruned, tmp_path, capsys
):
    assert main(["check", str(place / "model")]) == 0
    said = capsys.readouterr().out
    assert "note  config.json has no rope_theta" in said and "transformers before 5.0" in said

    copy = tmp_path / "copy"
    shutil.copytree(pruned, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    assert main(["check", str(copy)]) == 1
    assert "FAIL  config.json contradicts itself: rope_theta 7.0 where" in capsys.readouterr().out
    config.pop("rope_theta")
    (copy / "config.json").write_text(json.dumps(config))
    assert main(["check", str(copy)]) == 1
    assert "FAIL  config.json has no rope_theta" in capsys.readouterr().out


def test_folders_of_older_versions_are_read(pruned, place, tmp_path, capsys):
    old = tmp_path / "old"
    shutil.copytree(pruned, old)
    for path in (old / "maskprune").iterdir():
        path.rename(old / path.name)
    (old / "maskprune").rmdir()
    against = ["--against", str(place / "model")]
    assert main(["check", str(old), *against]) == 1
    said = capsys.readouterr().out
    assert "equals the masked model" in said and said.count("FAIL") == 1
    assert main(["check", str(pruned), *against, "--masks", str(old)]) == 0
    assert main(["report", str(old)]) == 0
    assert "FFN width" in (old / "report.html").read_text()
    weights = []
    for run in (old, pruned):
        out = tmp_path / f"of-{run.name}"
        export = ["export", str(place / "model"), "--masks", str(run), "--adapter", str(run)]
        assert main([*export, "-o", str(out)]) == 0
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_check_against_a_model_of_another_size_says_so(pruned, capsys):
    assert main(["check", str(pruned), "--against", str(pruned)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "does not fit" in said and len(said) < 300


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("given", ["", "maskprune/masks.safetensors"])
def test_an_export_of_a_run_is_proven_with_its_adapter_or_without(
    place, pruned, tmp_path, capsys, merged, given
):
    out, masks = tmp_path / "exported", str(pruned / given)
    files = [str(place / "model"), "--masks", masks, "-o", str(out)]
    assert main(["export", *files, *(["--adapter", str(pruned)] if merged else [])]) == 0
    assert (f"to merge it: --adapter {pruned}" in capsys.readouterr().err) is not merged
    against = ["--against", str(place / "model"), "--masks", masks]
    assert main(["check", str(out), *against]) == 0
    said = capsys.readouterr().out
    assert (f"and adapter of {pruned / 'maskprune' / 'adapter'}" in said) is merged
    assert ("is not in it; export --adapter merges it" in said) is not merged


def test_a_broken_record_is_named(place, pruned, tmp_path, capsys):
    again = tmp_path / "again"
    shutil.copytree(pruned, again)
    (again / "maskprune" / "maskprune.json").write_text("{")
    assert main(["check", str(again), "--against", str(place / "model")]) == 2
    assert "maskprune.json is broken JSON" in capsys.readouterr().err


def test_a_head_bias_that_one_model_alone_has_is_seen(monkeypatch):
    from models import tiny_model

    from maskprune.commands import check

    model, origin = tiny_model("phi"), tiny_model("phi")
    monkeypatch.setattr("maskprune.hf.load.load_model", lambda *_, **__: (origin, None))
    for bias, good in ((origin.lm_head.bias, True), (None, False)):
        origin.lm_head.bias = bias
        findings = check.Findings()
        check._check_frozen(model, "x", findings)
        assert bool(findings.good) is good and bool(findings.bad) is not good
