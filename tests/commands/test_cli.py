"""The commands as a user types them: the whole job end to end, and every way to get it wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints_on_disk import PRUNE, strange_tensors, write_checkpoint, write_text

from maskprune.cli import COMMANDS, main


def test_prune_shows_its_own_progress_and_no_other_bars_or_warnings(pruned, place):
    starts = {line.split()[0] for line in (place / "said.txt").read_text().splitlines()}
    assert starts == {"the", "ranking", "batch", "step", "compensating"}


def test_prune_writes_a_stock_checkpoint_and_its_record(pruned):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(pruned)
    record = json.loads((pruned / "maskprune" / "maskprune.json").read_text())
    assert record["shape"]["ffn"] == model.config.intermediate_size < 24
    assert record["logits_masked_against_exported"]["relative"] < 1e-4
    assert record["settings"]["seed"] == 0 and "torch" in record["versions"]
    assert len(AutoTokenizer.from_pretrained(pruned)("w1 w2").input_ids) == 2
    rows = [
        json.loads(line) for line in (pruned / "maskprune" / "trace.jsonl").read_text().splitlines()
    ]
    assert rows[-1]["R"] <= rows[-1]["R_star"] + 1e-6
    assert not (pruned.parent / "out.run").exists()
    assert "library_name: transformers" in (pruned / "README.md").read_text()


def test_text_that_the_model_writes_is_named_on_the_card_and_not_kept(place, tmp_path, capfd):
    files = [str(place / "model"), "--data", str(place / "text.jsonl"), "-o", str(tmp_path / "x")]
    assert main(["prune", *files, *PRUNE, "--self-text", "0.25"]) == 0
    assert "writing text of its own" in capfd.readouterr().err
    assert (
        "25% of the text was written by the original model"
        in (tmp_path / "x" / "README.md").read_text()
    )
    assert not list(tmp_path.rglob("self_text*"))


def test_every_safetensors_file_at_the_top_of_a_result_is_the_models(pruned, place, tmp_path):
    again = tmp_path / "again"
    export = ["export", str(place / "model"), "--masks", str(pruned), "-o", str(again)]
    assert main([*export, "--max-shard-size", "10KB"]) == 0
    for result in (pruned, again):
        assert strange_tensors(result) == set()


def test_export_from_the_masks_file_writes_the_same_weights(pruned, place, tmp_path):
    from safetensors.torch import load_file

    code = main(
        [
            "export",
            str(place / "model"),
            "--masks",
            str(pruned / "maskprune" / "masks.safetensors"),
            "--adapter",
            str(pruned / "maskprune" / "adapter"),
            "-o",
            str(tmp_path / "again"),
        ]
    )
    assert code == 0
    ours = load_file(tmp_path / "again" / "model.safetensors")
    theirs = load_file(pruned / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_eval_and_report_read_the_result(pruned, place, capsys):
    assert main(["eval", str(pruned), "--ppl", str(place / "text.jsonl"), "--seq-len", "16"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"]["ppl"] > 1
    assert main(["report", str(pruned)]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()


def test_plan_and_dry_run_write_nothing(place, capsys, tmp_path):
    assert main(["plan", str(place / "model"), "--sparsity", "0.3", "--multiple_of", "4"]) == 0
    shown = capsys.readouterr().out
    assert "FFN width" in shown and "config class" in shown
    assert main(["prune", str(place / "model"), *PRUNE, "--dry-run"]) == 0
    assert capsys.readouterr().out == shown
    assert not list(tmp_path.iterdir())


def test_a_recipe_gives_the_flags_and_flags_win(place, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sparsity: 0.1\nmultiple-of: 4\n")
    assert main(["plan", str(place / "model"), f"--config={recipe}", "--sparsity", "0.3"]) == 0
    capsys.readouterr()
    assert main(["plan", str(place / "model"), "--config", str(recipe), "--sparsity", "0.3"]) == 0
    by_recipe = capsys.readouterr().out
    assert main(["plan", str(place / "model"), "--sparsity", "0.3", "--multiple_of", "4"]) == 0
    assert capsys.readouterr().out == by_recipe


def test_a_switch_wins_over_the_recipe(tmp_path):
    from maskprune.cli import parse
    from maskprune.config import PruneConfig, PruneFiles

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sparsity: 0.1\ncompensate: true\n")
    for flags, expected in (([], True), (["--no-compensate"], False)):
        _, settings = parse(
            "prune", [PruneFiles, PruneConfig], ["m", f"--config={recipe}", *flags], ""
        )
        assert settings.compensate is expected


def test_a_recipe_may_name_everything_and_hold_lists(tmp_path):
    from maskprune.cli import parse
    from maskprune.config import PruneConfig, PruneFiles

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: m\noutput: o\nsparsity: 0.1\nlora-targets: [q_proj, v_proj]\ntargets: null\n"
        "resume: true\nsteps: 30\nepochs: 2\n"
    )
    files, settings = parse("prune", [PruneFiles, PruneConfig], ["--config", str(recipe)], "")
    assert (files.model, files.output, files.resume) == ("m", "o", True)
    assert settings.lora_targets == "q_proj,v_proj" and settings.targets is None
    assert (settings.sparsity, settings.steps, settings.epochs) == (0.1, 30, 2.0)
    flags = ["other", "--config", str(recipe), "-o", "p", "--steps", "40"]
    files, settings = parse("prune", [PruneFiles, PruneConfig], flags, "")
    assert (files.model, files.output, settings.steps) == ("other", "p", 40)


@pytest.mark.parametrize(
    "more, recipe, said",
    [
        (["--sparsity", "abc"], "", "--sparsity: invalid float value: 'abc'"),
        ([], "steps: many", "--steps: invalid int value: 'many'"),
        ([], "steps: [1, 2]", "--steps: invalid int value: '1,2'"),
        ([], "steps: {a: 1}", "steps is a mapping; expected one value"),
        (["--stepz", "3"], "", "unknown arguments: --stepz 3"),
        (["--config"], "", "expected one argument"),
    ],
)
def test_a_bad_value_is_one_line(more, recipe, said, place, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(recipe)
    arguments = ["plan", str(place / "model"), "--config", str(tmp_path / "recipe.yaml")]
    command = "prune" if "steps" in recipe else "plan"
    assert main([command, *arguments[1:], *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_bounds_of_settings_are_checked_at_once():
    from maskprune.config import PruneConfig, SparsifyConfig

    for settings, message in (
        (dict(alpha=-1.0), "alpha is -1.0; expected at least 0"),
        (dict(seed=-1), "seed is -1; expected at least 0"),
        (dict(warmup=2.0), "warmup is 2.0"),
        (dict(lora_alpha=0), "lora_alpha is 0"),
        (dict(batch_size=3, gradient_accumulation=2), "does not divide batch_size 3"),
    ):
        with pytest.raises(ValueError, match=message):
            PruneConfig(sparsity=0.2, **settings)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        SparsifyConfig(max_tokens=0)


def test_help_imports_no_torch():
    code = (
        "import sys, contextlib\nfrom maskprune.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['prune', '--help'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--sparsity" in done.stdout


def test_info_names_each_backend(capsys):
    assert main(["info"]) == 0
    assert {"backend cpp", "backend triton"} <= {
        line[:14].strip() for line in capsys.readouterr().out.splitlines()
    }


def test_an_interrupted_run_is_not_overwritten_by_a_new_one(place, tmp_path, capsys):
    (tmp_path / "x.run" / "checkpoint-8").mkdir(parents=True)
    (tmp_path / "x.run" / "checkpoint-8" / "complete.json").write_text("{}")
    (tmp_path / "x.run" / "settings.json").write_text("{}")
    arguments = ["prune", str(place / "model"), "-o", str(tmp_path / "x"), *PRUNE]
    assert main([*arguments, "--data", str(place / "text.jsonl")]) == 2
    assert "continue it with --resume" in capsys.readouterr().err


def _bad(place: Path) -> dict[str, tuple[list[str], str]]:
    model, text = str(place / "model"), str(place / "text.jsonl")
    data = ["--data", text]
    (place / "empty.jsonl").write_text("")
    (place / "no_text.jsonl").write_text('{"words": "w1"}\n')
    (place / "short.txt").write_text("w1 w2 w3")
    (place / "keys.yaml").write_text("sparsty: 0.2\n")
    (place / "full").mkdir(exist_ok=True)
    (place / "full" / "file").write_text("x")
    return {
        "no such model": (
            ["/nowhere/at/all", *PRUNE, *data],
            "no config could be read|not a folder",
        ),
        "sparsity 0": ([model, *PRUNE, *data, "--sparsity", "0"], "sparsity is 0.0"),
        "sparsity out of reach": ([model, *PRUNE, *data, "--sparsity", "0.97"], "is not reachable"),
        "too few steps": ([model, *PRUNE, *data, "--steps", "3"], "steps is 3; expected at least"),
        "missing data": ([model, *PRUNE, "--data", "gone.jsonl"], "gone.jsonl"),
        "empty data": ([model, *PRUNE, "--data", str(place / "empty.jsonl")], "empty"),
        "no text key": ([model, *PRUNE, "--data", str(place / "no_text.jsonl")], "text"),
        "short data": ([model, *PRUNE, "--data", str(place / "short.txt")], "tokens"),
        "output exists": ([model, *PRUNE, *data, "-o", str(place / "full")], "not empty"),
        "unknown key": (
            [model, *PRUNE, "--config", str(place / "keys.yaml")],
            "unknown keys spars",
        ),
        "nothing to resume": ([model, *PRUNE, *data, "--resume"], "no run in progress"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "no such model",
        "sparsity 0",
        "sparsity out of reach",
        "too few steps",
        "missing data",
        "empty data",
        "no text key",
        "short data",
        "output exists",
        "unknown key",
        "nothing to resume",
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(case, place, tmp_path, capsys):
    import re

    arguments, message = _bad(place)[case]
    if "-o" not in arguments:
        arguments = [*arguments, "-o", str(tmp_path / "new")]
    assert main(["prune", *arguments]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("maskprune")]
    assert len(err) == 1 and re.search(message, err[0]), err
    assert not list(tmp_path.iterdir())


def test_a_model_without_tokenizer_and_pickled_weights_are_refused(place, tmp_path, capsys):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(place / "model", bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    data = ["--data", str(place / "text.jsonl"), "-o", str(tmp_path / "new")]
    assert main(["prune", str(bare), *PRUNE, *data]) == 2
    assert "tokenizer" in capsys.readouterr().err
    (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    assert main(["prune", str(bare), *PRUNE, *data]) == 2
    assert "safetensors" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_unknown_command_lists_those_there_are(capsys):
    assert main(["prun"]) == 2
    err = capsys.readouterr().err
    assert all(name in err for name in COMMANDS)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 4 GiB."
        ),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes."),
        MemoryError(),
    ],
)
def test_out_of_memory_is_one_line(error, monkeypatch, capsys):
    def fail(argv):
        raise error

    monkeypatch.setitem(COMMANDS, "prune", fail)
    assert main(["prune"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("maskprune prune: out of memory (") and said.count("\n") == 1
    assert "--batch-size" in said and "total capacity" not in said


@pytest.mark.parametrize("family", ["gemma3", "gpt_neo"])
def test_a_multimodal_model_and_one_with_few_positions_are_pruned_and_checked(family, tmp_path):
    write_text(tmp_path / "text.jsonl")
    model = write_checkpoint(tmp_path / "model", family)
    out, text = str(tmp_path / "out"), str(tmp_path / "text.jsonl")
    options = [*PRUNE, "--sparsity", "0.2", "--data", text]
    assert main(["prune", str(model), "-o", out, *options]) == 0
    masks = f"{out}/maskprune/masks.safetensors"
    assert main(["check", out, "--against", str(model), "--masks", masks]) == 0
    dense = ["sparsify", str(model), "-o", str(tmp_path / "sparse"), "--method", "wanda"]
    assert main([*dense, "--data", text, "--seq-len", "16"]) == 0
