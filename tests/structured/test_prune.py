"""The main job on tiny models: on budget, uniform, repeatable, resumable, loud when it fails."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from models import tiny_model, tokens
from short_runs import SHORT, data
from transformers import TrainerCallback

from maskprune.config import PruneConfig
from maskprune.hf.equality import compare_logits
from maskprune.structured.callbacks import KeptUnitsCallback
from maskprune.structured.prune import prune
from maskprune.structured.trainer import PruneTrainer
from maskprune.training import losses

QUICK = SHORT | dict(method="maskprune", lora_r=2)


def run(tmp_path=None, family="llama", resume=False, **changes):
    config = PruneConfig(**(QUICK | changes))
    model = tiny_model(family, num_hidden_layers=3)
    return prune(model, None, data(), config, run_dir=tmp_path, resume=resume, quiet=True)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3", "gpt2"])
def test_the_result_is_uniform_on_budget_and_equal_to_the_masked_model(family):
    # A quarter of this tiny GPT-2's weights is FFN, and its heads stay.
    result = run(family=family, sparsity=0.15 if family == "gpt2" else 0.3)
    budget, masks = result.budget, result.masks
    kept = (masks.ffn != 0).sum(1)
    assert (kept == result.shape.ffn).all()
    assert result.trace[-1]["R"] <= budget.R_star + 1e-6 and result.trace[-1]["locked"]
    # Pruned masks are cut where the shape locks, the last of them soon after they joined.
    assert 0 <= max(result.residuals.values()) < 1
    difference = compare_logits(result.masked_model, result.model, tokens())
    assert difference.relative < 1e-4 and difference.largest_logit > 0.1


def test_training_in_bfloat16_leaves_no_autocast_in_the_proof():
    result = run(autocast="bfloat16")
    difference = compare_logits(result.masked_model, result.model, tokens())
    assert difference.relative < 1e-4


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_the_head_computes_in_the_type_of_the_run(autocast, monkeypatch):
    seen, honest = [], losses.linear_distillation

    def watched(*args, **kw):
        seen.append(torch.is_autocast_enabled("cpu"))
        return honest(*args, **kw)

    monkeypatch.setattr(losses, "linear_distillation", watched)
    run(autocast=autocast)
    assert len(seen) == QUICK["steps"] and set(seen) == {autocast == "bfloat16"}


@pytest.mark.parametrize("targets", ["q_proj,down_proj", "q_proj,lm_head"])
def test_a_loss_that_needs_whole_logits_says_so_once(targets, capsys):
    model = tiny_model("llama", tie_word_embeddings=False)
    config = PruneConfig(**(QUICK | dict(lora_targets=targets, steps=20)))
    prune(model, None, data(), config)
    said = capsys.readouterr().err.count("the head is a Linear, adapted or quantised: the loss")
    assert said == ("lm_head" in targets)


@pytest.mark.parametrize(
    "changes",
    [
        dict(mode="scheduled"),
        dict(warm_start="none"),
        dict(warm_start="wanda-sp", head_unit="query_head"),
        dict(mask_optimizer="adam-mini"),
        dict(method="wanda-sp"),
        dict(method="taylor"),
        dict(sparsity=None, head_sparsity=0.5, ffn_sparsity=0.25),
        dict(alpha=0.1, gradient_checkpointing=True),
        dict(kl_direction="student_teacher", gradient_accumulation=2, lm_weight=0.3),
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_every_way_of_pruning_ends_uniform_and_on_budget(changes):
    result = run(**changes)
    assert (result.masks.ffn != 0).sum(1).unique().numel() == 1
    assert result.trace[-1]["R"] <= result.budget.R_star + 1e-6
    if changes.get("head_sparsity"):
        assert (result.shape.heads, result.shape.ffn) == (2, 16)


def test_a_model_in_float16_is_refused_with_what_to_use_instead():
    model = tiny_model("llama", dtype=torch.float16)
    with pytest.raises(ValueError, match="in float16.*--dtype bfloat16 or float32") as caught:
        prune(model, None, data(), PruneConfig(**QUICK), quiet=True)
    assert "\n" not in str(caught.value)
    assert not hasattr(model, "peft_config"), "refused after the adapters went on"


def test_the_same_seed_gives_the_same_masks_to_the_bit():
    a, b, c = run(), run(), run(seed=1)
    assert torch.equal(a.masks.ffn, b.masks.ffn) and torch.equal(a.masks.head, b.masks.head)
    # The masks of a run so short may well be the same; what was learned beside them is not.
    weights = [result.model.state_dict() for result in (a, b, c)]
    name = next(name for name in weights[0] if "down" in name)
    assert torch.equal(weights[0][name], weights[1][name])
    assert not torch.equal(weights[0][name], weights[2][name])


@pytest.mark.parametrize("method", ["maskprune", "taylor"])
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(tmp_path, method):
    whole = run(tmp_path / "whole", save_steps=12, method=method)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-24")
    again = run(tmp_path / "again", resume=True, save_steps=12, method=method)
    assert torch.equal(whole.masks.ffn, again.masks.ffn)
    assert torch.equal(whole.masks.head, again.masks.head)
    for (name, p), q in zip(
        whole.masked_model.named_parameters(), again.masked_model.parameters(), strict=True
    ):
        assert torch.equal(p, q), name
    ours = [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in again.trace]
    assert ours == [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in whole.trace]


def test_a_half_written_checkpoint_is_not_resumed_from(tmp_path):
    whole = run(tmp_path, save_steps=12)
    (tmp_path / "checkpoint-24" / "optimizer.pt").write_bytes(b"torn")
    again = run(tmp_path, resume=True, save_steps=12)
    assert torch.equal(whole.masks.ffn, again.masks.ffn)


def test_other_settings_are_refused_on_resume(tmp_path):
    run(tmp_path, save_steps=12)
    with pytest.raises(ValueError, match="other settings.*resume with those"):
        run(tmp_path, resume=True, save_steps=12, reach=0.5)


def test_a_nan_loss_stops_at_its_step_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    honest = PruneTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        loss = honest(self, *args, **kwargs)
        if self.state.global_step == 14:
            self.last_loss["loss"] = self.last_loss["loss"] * float("nan")
            return loss * float("nan")
        return loss

    monkeypatch.setattr(PruneTrainer, "compute_loss", poisoned)
    with pytest.raises(FloatingPointError, match="at step 15.*--resume"):
        run(tmp_path, save_steps=12)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-12"]


def test_the_trace_has_what_the_report_draws(tmp_path):
    result = run(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert rows == result.trace and [r["step"] for r in rows] == [1, 4, 8, 12, 16, 20, 24]
    assert {
        "R",
        "R_star",
        "y",
        "z",
        "r_head",
        "r_ffn",
        "residual_head",
        "residual_ffn",
        "width_spread",
        "loss",
        "kl",
        "layer",
        "tokens_per_s",
        "locked",
    } <= set(rows[0])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(sparsity=0.0), "sparsity is 0.0; expected a number between 0 and 1"),
        (dict(sparsity=1.5), "sparsity is 1.5"),
        (dict(sparsity=None), "no sparsity is given"),
        (dict(steps=5), "steps is 5; expected at least 20"),
        (dict(sparsity=0.98), "is not reachable.*the most is"),
        (dict(lm_weight=1.5), "lm_weight is 1.5; expected a share from 0 to 1"),
        (dict(lm_weight=float("nan")), "lm_weight is nan; expected at least 0"),
        (dict(alpha=float("nan")), "alpha is nan; expected at least 0"),
        (dict(mode="magic"), "mode is 'magic'; expected one of minimax, scheduled"),
        (dict(steps=None, epochs=0.5), "are 5 steps of 2; the schedule needs at least 20"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)


def test_the_compensation_runs_once_when_the_shape_is_final(monkeypatch):
    from maskprune.structured import prune as training

    calls, shared = [], []
    honest = training.compensate

    def counted(model, masks, kept, *rest, summed):
        calls.append([int((m == 0).sum()) for m in kept])
        shared.append(bool(summed))
        return honest(model, masks, kept, *rest, summed=summed)

    monkeypatch.setattr(training, "compensate", counted)
    result = run(reach=0.5)
    assert calls == [[int((m == 0).sum()) for m in (result.masks.head, result.masks.ffn)]]
    run(method="wanda-sp")
    assert len(calls) == 2
    assert shared == [False, True], "a ranking at once reads its text for the compensation too"
    run(compensate=False)
    assert len(calls) == 2


@pytest.mark.parametrize("killed", [7, 11, 15, 20])
def test_a_run_broken_before_or_after_the_compensation_resumes_to_the_bit(
    killed, tmp_path, monkeypatch
):
    settings = dict(reach=0.5, save_steps=4, output_r=4)
    whole = run(tmp_path / "whole", **settings)
    assert 7 < next(row["step"] for row in whole.trace if row["locked"]) < 20
    honest = PruneTrainer.compute_loss

    def broken(self, *args, **kwargs):
        if self.state.global_step == killed:
            raise InterruptedError
        return honest(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(PruneTrainer, "compute_loss", broken)
        run(tmp_path / "broken", **settings)
    again = run(tmp_path / "broken", resume=True, **settings)
    for (name, p), q in zip(
        whole.masked_model.named_parameters(), again.masked_model.parameters(), strict=True
    ):
        assert torch.equal(p, q), name


def ranks(result, name):
    return {
        module.lora_A["default"].weight.shape[0]
        for path, module in result.masked_model.named_modules()
        if path.endswith(name) and hasattr(module, "lora_A")
    }


@pytest.mark.parametrize(
    "targets", ["all-linear", "q_proj, down_proj", "q_proj,model.layers.0.mlp.down_proj"]
)
def test_the_output_adapters_have_their_rank_however_they_are_named(targets):
    result = run(lora_targets=targets, output_r=6)
    assert ranks(result, "down_proj") == {6} and ranks(result, "q_proj") == {2}


def test_where_heads_stay_their_output_has_the_common_rank():
    result = run(family="gpt2", sparsity=0.15, output_r=6)
    assert ranks(result, "attn.c_proj") == {2} and ranks(result, "mlp.c_proj") == {6}


def test_masks_settle_when_the_shape_locks_and_the_rate_warms_up_again(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            masks = next(m for n, m in kw["model"].named_modules() if n.endswith("maskprune"))
            rates = [group["lr"] for group in kw["optimizer"].param_groups]
            seen.append((masks.ffn.detach().clone(), *rates))

    config = PruneConfig(**(QUICK | dict(steps=60, logging_steps=1)))
    model = tiny_model("llama", num_hidden_layers=3)
    result = prune(model, None, data(), config, quiet=True, callbacks=[Watch()])
    lock = next(row["step"] for row in result.trace if row["locked"])
    assert lock < 30
    # The callbacks of the method run before: at the step of the lock the masks are settled.
    for ffn, _, mask_rate in seen[lock - 1 :]:
        assert torch.equal(ffn, seen[lock - 1][0]) and mask_rate == 0
    assert set(seen[-1][0].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(result.masks.ffn, seen[-1][0])
    # Three steps of warm-up, a twentieth of the run, then the linear fall.
    rates = [rate for _, rate, _ in seen]
    assert rates[lock - 1] < 0.5 * rates[lock + 2] < rates[lock - 2]
    assert rates[lock + 2] > rates[lock + 3] > rates[-1]


def test_the_random_baseline_prunes_other_units_for_another_seed():
    a, b, c = run(method="random"), run(method="random"), run(method="random", seed=1)
    assert torch.equal(a.masks.ffn, b.masks.ffn)
    assert not torch.equal(a.masks.ffn, c.masks.ffn)
    assert a.shape == c.shape and ((a.masks.ffn != 0).sum(1) == a.shape.ffn).all()


def test_the_trace_says_what_moved_and_how_clear_the_gradients_are():
    rows = run(steps=60).trace
    assert all(0 <= row["moved_ffn"] <= 1 for row in rows)
    assert all(row["signal_ffn"] > 0 for row in rows[1:])


def test_without_compensation_the_masks_train_on_as_the_papers_do():
    result = run(compensate=False, steps=60)
    kept = result.masks.ffn[result.masks.ffn > 0]
    assert (kept < 1).any() and max(result.residuals.values()) < 1e-2


@pytest.mark.parametrize(
    ("changes", "mini", "rate"),
    [
        (dict(), False, 2e-3),
        (dict(warm_start="none"), True, 0.2),
        (dict(warm_start="none", mask_optimizer="adam"), False, 2e-3),
        (dict(warm_start="none", mask_lr=1e-2), False, 1e-2),
        (dict(mask_optimizer="adam-mini", mask_lr=0.5), True, 0.5),
    ],
)
def test_the_masks_have_an_optimizer_and_a_rate_of_their_own(changes, mini, rate):
    found = {}

    class Look(TrainerCallback):
        def on_train_begin(self, *_, optimizer, **__):
            found["weights"], found["masks"] = optimizer.param_groups

    config = PruneConfig(**(QUICK | changes))
    prune(tiny_model("llama"), None, data(), config, quiet=True, callbacks=[Look()])
    assert (found["masks"].get("mini", False), found["masks"]["initial_lr"]) == (mini, rate)
    assert not found["weights"].get("mini")
    assert found["weights"]["initial_lr"] == QUICK["learning_rate"]


def test_an_unknown_optimizer_of_the_masks_is_refused():
    with pytest.raises(ValueError, match=r"mask_optimizer is 'sgd'; expected one of auto, adam"):
        PruneConfig(sparsity=0.3, mask_optimizer="sgd")


class WatchFFN(TrainerCallback):
    """Whether the first FFN had another forward at each step."""

    def __init__(self, mlp):
        self.mlp, self.replaced = mlp, []

    def on_step_end(self, *_, **__):
        self.replaced.append("forward" in vars(self.mlp))


@pytest.mark.parametrize(("method", "skips"), [("taylor", True), ("maskprune", False)])
def test_units_removed_at_once_are_not_computed_and_change_nothing(method, skips, monkeypatch):
    def trained():
        model = tiny_model("llama", num_hidden_layers=3)
        weights = {name: p.clone() for name, p in model.named_parameters()}
        watch = WatchFFN(model.model.layers[0].mlp)
        config = PruneConfig(**(QUICK | dict(method=method)))
        result = prune(model, None, data(), config, quiet=True, callbacks=[watch])
        assert "forward" not in vars(watch.mlp)
        for name, p in model.named_parameters():
            base = name.replace(".base_layer", "")
            assert base not in weights or torch.equal(p, weights[base]), name
        return result, watch

    result, watch = trained()
    assert watch.replaced == [skips] * QUICK["steps"]
    monkeypatch.setattr(KeptUnitsCallback, "on_train_begin", lambda *_, **__: None)
    under_masks, watch = trained()
    assert not any(watch.replaced)
    ids = tokens()
    torch.testing.assert_close(
        result.model(ids).logits, under_masks.model(ids).logits, rtol=1e-3, atol=1e-3
    )


def test_weights_are_in_their_order_again_after_a_run_that_failed():
    class Fails(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise KeyboardInterrupt

    model = tiny_model("llama")
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    config = PruneConfig(**(QUICK | dict(method="taylor")))
    with pytest.raises(KeyboardInterrupt):
        prune(model, None, data(), config, quiet=True, callbacks=[Fails()])
    assert torch.equal(model.model.layers[0].mlp.up_proj.base_layer.weight, before)


def test_by_default_units_are_removed_at_once_and_a_mask_setting_selects_learning(capsys):
    assert PruneConfig(sparsity=0.3).chooser == "taylor"
    settings = (dict(mask_lr=1e-2), dict(warm_start="none"), dict(reach=0.3))
    for setting in (*settings, dict(mask_optimizer="adam-mini")):
        assert PruneConfig(sparsity=0.3, **setting).chooser == "maskprune"
    assert PruneConfig(sparsity=0.3, method="wanda-sp", mask_lr=1e-2).chooser == "wanda-sp"
    ours, taylor = run(method="auto"), run(method="taylor")
    assert ours.trace[0]["locked"] and ours.trace[0]["R"] == ours.trace[-1]["R"]
    assert torch.equal(ours.masks.ffn, taylor.masks.ffn)
    ids = tokens()
    assert torch.equal(ours.model(ids).logits, taylor.model(ids).logits)
    config = PruneConfig(**(QUICK | dict(method="auto", steps=20)))
    prune(tiny_model("llama", num_hidden_layers=3), None, data(), config)
    assert capsys.readouterr().err.count("--method maskprune learns them") == 1
