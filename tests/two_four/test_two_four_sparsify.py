"""Learning 2:4 masks: better than the prior, repeatable, resumable, loud when it fails."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from models import VOCAB, tiny_model
from torch.nn import functional

from maskprune.config import SparsifyConfig
from maskprune.two_four.one_shot import one_shot_masks
from maskprune.two_four.patterns import apply_masks, is_two_four, oriented, prunable
from maskprune.two_four.sparsify import SparsifyTrainer, sparsify

learning = sys.modules[SparsifyTrainer.__module__]

QUICK = dict(
    steps=24,
    batch_size=4,
    seq_len=16,
    calibration_blocks=8,
    logging_steps=4,
    autocast="none",
    prior="wanda",
    learning_rate=5e-3,
)


def data(n: int = 40) -> torch.Tensor:
    return torch.randint(3, VOCAB, (n, 16), generator=torch.Generator().manual_seed(1))


def run(tmp_path=None, family="llama", resume=False, **changes):
    config = SparsifyConfig(**(QUICK | changes))
    model = tiny_model(family)
    return sparsify(model, None, data(), config, run_dir=tmp_path, resume=resume, quiet=True)


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_the_head_computes_in_the_type_of_the_run(autocast, monkeypatch):
    seen, honest = [], learning.hidden_cross_entropy

    def watched(*args):
        seen.append(torch.is_autocast_enabled("cpu"))
        return honest(*args)

    monkeypatch.setattr(learning, "hidden_cross_entropy", watched)
    run(autocast=autocast)
    assert len(seen) == QUICK["steps"] and set(seen) == {autocast == "bfloat16"}


def test_a_float16_model_takes_one_shot_masks_but_learns_none():
    model = tiny_model("llama", dtype=torch.float16)
    with pytest.raises(ValueError, match="in float16.*--dtype bfloat16 or float32"):
        sparsify(model, None, data(), SparsifyConfig(**QUICK), quiet=True)
    config = SparsifyConfig(**(QUICK | {"method": "magnitude"}))
    assert is_sparse(sparsify(model, None, None, config, quiet=True).model)


def test_checkpoints_that_will_not_fit_are_refused_before_the_prior(tmp_path):
    sizes = []

    def full(folder, size, what):
        sizes.append(size)
        raise ValueError("no space")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maskprune.training.checkpoints.require_space", full)
        patch.setattr("maskprune.two_four.sparsify.find_prior", None)
        with pytest.raises(ValueError, match="no space"):
            run(tmp_path)
    # Three checkpoints of logits with two averages each, six float32 a group of four weights.
    weights = sum(m.weight.numel() for m in prunable(tiny_model("llama")).values())
    assert sizes == [3 * 3 * 6 * 4 * weights // 4]


@torch.no_grad()
def lm_loss(model) -> float:
    ids = data()
    logits = model(input_ids=ids).logits
    return float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def is_sparse(model) -> bool:
    return all(is_two_four(oriented(m)) for m in prunable(model).values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3", "gpt2", "opt"])
def test_the_result_is_two_four_stock_and_equal_to_the_masked_model(family):
    result = run(family=family)
    original, after = tiny_model(family).state_dict(), result.model.state_dict()
    assert is_sparse(result.model) and result.difference.largest == 0
    assert set(original) == set(after)
    names = {f"{name}.weight" for name in result.masks}
    for name, value in after.items():
        kept = value if name not in names else torch.where(value == 0, original[name], value)
        assert torch.equal(kept, original[name]), f"{name}: a weight that stays has changed"
    assert all(p.requires_grad for p in result.model.parameters())
    zeros = torch.cat([after[n][after[n] == 0] for n in names])
    assert not torch.signbit(zeros).any(), "-0.0 is not zero to every kernel"


def test_learning_beats_its_prior_on_what_it_learned_from():
    model = tiny_model("llama")
    apply_masks(model, one_shot_masks(model, "wanda", data()[:8]))
    learned = run(steps=100, regulariser_weight=0)
    assert lm_loss(learned.model) < lm_loss(model) - 0.1
    assert learned.trace[-1]["max_prob"] > 0.95
    assert learned.trace[-1]["changed"] < 0.01


def test_the_regulariser_keeps_larger_weights():
    norms = [
        run(prior="none", regulariser=kind, regulariser_weight=weight).trace[-1]["kept_norm"]
        for kind, weight in (("relative", 0), ("relative", 100.0), ("sum", 1.0))
    ]
    assert norms[1] > norms[0] + 0.01 and norms[2] > norms[0] + 0.01


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_one_shot_methods_are_the_functions_of_that_name(method):
    result, model = run(method=method), tiny_model("llama")
    wanted = one_shot_masks(model, method, data()[:8])
    assert all(torch.equal(result.masks[n], wanted[n]) for n in wanted)
    assert is_sparse(result.model) and result.steps == 0 and result.difference is None


def test_sparsegpt_may_update_the_weights_that_stay():
    plain, updated = run(method="sparsegpt"), run(method="sparsegpt", update_weights=True)
    assert is_sparse(updated.model)
    a, b = plain.model.state_dict(), updated.model.state_dict()
    assert any(not torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    "changes",
    [
        dict(prior="none"),
        dict(gradient_accumulation=4),
        dict(gradient_checkpointing=True, loss="kl"),
        dict(autocast="bfloat16"),
        dict(weight_decay=0.0),
    ],
    ids=lambda c: "-".join(map(str, c)),
)
def test_every_way_of_learning_ends_two_four(changes):
    result = run(**changes)
    assert is_sparse(result.model) and result.difference.largest == 0


def test_runs_repeat_and_resume_to_the_bit(tmp_path):
    # Without a prior the choices move to the end, so that `changed` has something to compare.
    ways = dict(save_steps=12, prior="none")
    whole, again = run(tmp_path / "whole", **ways), run(tmp_path / "again", **ways)
    assert whole.trace[-3]["step"] == 16 and whole.trace[-3]["changed"] > 0
    assert all(torch.equal(whole.masks[n], again.masks[n]) for n in whole.masks)
    shutil.rmtree(tmp_path / "again" / "checkpoint-24")
    (tmp_path / "again" / "checkpoint-24").mkdir()
    resumed = run(tmp_path / "again", resume=True, **ways)
    assert all(torch.equal(whole.masks[n], resumed.masks[n]) for n in whole.masks)
    keys = ("step", "loss", "max_prob", "changed", "kappa", "tau", "lr")

    def rows(result):
        return [{k: row[k] for k in keys} for row in result.trace]

    assert rows(whole) == rows(again) == rows(resumed)
    lines = (tmp_path / "again" / "trace.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [r["step"] for r in whole.trace]


def test_a_checkpoint_holds_logits_and_no_weights(tmp_path):
    run(tmp_path, save_steps=12)
    from safetensors import safe_open

    with safe_open(tmp_path / "checkpoint-12" / "logits.safetensors", "pt") as file:
        assert set(file.keys()) == set(prunable(tiny_model("llama")))
    assert not list(tmp_path.glob("checkpoint-*/model*.safetensors"))


def test_gradient_accumulation_draws_a_sample_for_each_micro_batch(monkeypatch):
    drawn = []
    from maskprune.two_four.masks import TwoFourMasks

    draw = TwoFourMasks.draw
    monkeypatch.setattr(TwoFourMasks, "draw", lambda self, n: (drawn.append(n), draw(self, n))[1])
    run(steps=20, gradient_accumulation=2)
    assert drawn == list(range(40))


def test_the_schedules_run_from_start_to_end():
    trace = run(kappa_start=10.0, kappa_end=58.0, tau_start=2.4, tau_end=1e-9, steps=24).trace
    assert trace[0]["kappa"] == 10.0 and trace[0]["tau"] == pytest.approx(2.4)
    assert trace[-1]["kappa"] == pytest.approx(56.0) and trace[-1]["tau"] == pytest.approx(0.1)
    assert trace[0]["lr"] > 0.9 * 5e-3 and trace[-1]["lr"] == pytest.approx(5e-4)


def test_a_nan_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    forward = SparsifyTrainer.compute_loss

    def broken(self, *args, **kw):
        loss = forward(self, *args, **kw)
        if self.state.global_step == 15:
            self.last_loss["loss"] = loss.detach() * float("nan")
        return loss

    monkeypatch.setattr(SparsifyTrainer, "compute_loss", broken)
    with pytest.raises(FloatingPointError, match="at step 16"):
        run(tmp_path, save_steps=8)
    assert (tmp_path / "checkpoint-8" / "complete.json").is_file()


def test_a_failed_run_takes_its_masks_off(monkeypatch):
    model = tiny_model("llama")
    config = SparsifyConfig(**(QUICK | dict(batch_size=64)))
    with pytest.raises(ValueError, match="one batch needs"):
        sparsify(model, None, data(), config, quiet=True)
    assert all("parametrizations" not in name for name in model.state_dict())


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(method="maskprune"), "expected one of maskllm, sparsegpt, wanda, magnitude"),
        (dict(prior="flap"), "or a masks file or output folder"),
        (dict(update_weights=True), "update_weights is for --method sparsegpt"),
        (dict(tau_end=0.0), "tau_end is 0.0; expected a number above 0"),
        (dict(steps=5), "steps is 5; expected at least 20"),
        (dict(batch_size=4, gradient_accumulation=3), "does not divide batch_size"),
        (dict(regulariser="l2"), "expected one of relative, sum"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        SparsifyConfig(**(QUICK | changes))
