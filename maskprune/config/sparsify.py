"""The settings of `maskprune sparsify`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from maskprune.choices import (
    TWO_FOUR_ONE_SHOT,
    require_choices,
    require_least,
    require_positive,
)
from maskprune.config.run import RunConfig, setting


@dataclass(frozen=True)
class SparsifyConfig(RunConfig):
    """How to make a model 2:4 sparse; the defaults are MaskLLM's, fitted to the number of steps."""

    method: str = setting(
        "maskllm",
        "maskllm learns the masks; one-shot baselines: sparsegpt, wanda, magnitude.",
    )
    prior: str = setting(
        "sparsegpt",
        "What the learning starts from: sparsegpt, wanda, magnitude, none, or masks of a run.",
    )
    prior_strength: float = setting(
        8.0, "How far the prior moves the logits, in their standard deviations (the paper: 3)."
    )
    update_weights: bool = setting(
        False, "With --method sparsegpt: also adjust the weights that stay, as published."
    )
    calibration_blocks: int = setting(
        128, "Blocks of seq_len tokens that sparsegpt and wanda read."
    )
    learning_rate: float | None = setting(
        None,
        "Learning rate of the logits, by default 1 / steps, at most 5e-3; falls to a tenth by a"
        " cosine.",
    )
    weight_decay: float = setting(0.1, "AdamW's weight decay of the logits.")
    kappa_start: float = setting(100.0, "Scale of the logits in the softmax at the first step.")
    kappa_end: float = setting(500.0, "The same at the last step; linear between.")
    tau_start: float = setting(2.0, "Temperature of the softmax at the first step (the paper: 4).")
    tau_end: float = setting(0.05, "The same at the last step; linear between.")
    logit_std: float = setting(0.01, "Standard deviation of the logits before the prior.")
    loss: str = setting(
        "lm", "lm, the language-model loss; or kl, against the dense model: one more forward."
    )
    regulariser: str = setting(
        "relative",
        "Reward for large kept weights: relative (norms over the dense ones), or sum (the paper's "
        "sum of squares, which depends on the model's size).",
    )
    regulariser_weight: float | None = setting(
        None, "Weight of that reward at the first step, falling to 0; 1500 relative, 1e-5 sum."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choices(
            self,
            method=("maskllm", *TWO_FOUR_ONE_SHOT),
            loss=("lm", "kl"),
            regulariser=("relative", "sum"),
        )
        if self.prior not in (*TWO_FOUR_ONE_SHOT, "none") and not (
            self.prior.endswith(".safetensors") or os.path.isdir(self.prior)
        ):
            raise ValueError(
                f"prior is {self.prior!r}; expected sparsegpt, wanda, magnitude, none, or a masks "
                "file or output folder of another run"
            )
        if self.update_weights and self.method != "sparsegpt":
            raise ValueError(
                f"update_weights is for --method sparsegpt; {self.method} leaves the weights that "
                "stay as they are"
            )
        if self.shard == "full" and self.method != "maskllm":
            raise ValueError(
                f"shard is full, which spreads what is trained, and {self.method} trains nothing; "
                "use --shard none: the text is shared out among the processes anyway"
            )
        require_least(
            self,
            calibration_blocks=1,
            prior_strength=0,
            weight_decay=0,
            regulariser_weight=0,
        )
        require_positive(
            self,
            *("learning_rate", "kappa_start", "kappa_end", "tau_start", "tau_end", "logit_std"),
        )
