"""The settings of `maskprune prune`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from maskprune.choices import (
    KL_DIRECTIONS,
    MASK_RATES,
    MODES,
    ONE_SHOT,
    TRAINED,
    WARM_STARTS,
    require_choices,
    require_least,
    require_positive,
    require_reach,
)
from maskprune.config.run import BudgetConfig, RunConfig, setting

# Settings of adapters alone.
OF_ADAPTERS = ("lora_r", "lora_alpha", "lora_targets")
ADAPTER_RATE = 1e-3
# Times the hidden size.
WEIGHT_RATE = 0.15

# Settings of learned masks: giving one of them selects `maskprune` under `--method auto`.
OF_MASKS = ("mode", "warm_start", "reach", "eta1", "interval", "mask_lr", "mask_optimizer")


@dataclass(frozen=True)
class PruneConfig(RunConfig, BudgetConfig):
    """How to prune; the defaults need no tuning from 100 to 10,000 steps."""

    method: str = setting(
        "auto",
        "maskprune learns the masks; taylor, wanda-sp and random choose at once, then train the"
        " rest. auto is taylor, the best measured, or maskprune where a setting of masks is given.",
    )
    mode: str = setting(
        "minimax", "minimax learns the split; scheduled prunes heads and FFN in equal fractions."
    )
    warm_start: str = setting(
        "taylor", "Ranking that the masks start from: none (the paper), wanda-sp or taylor."
    )
    warm_start_blocks: int = setting(32, "Blocks of seq_len tokens that the ranking reads.")
    reach: float | None = setting(
        None,
        "Share of the steps after which the budget is reached; 0.1, or 0.6 without warm start.",
    )
    eta1: float | None = setting(None, "Decay rate of pruned masks at the first step.")
    interval: int | None = setting(
        None, "Steps between two prox calls on FFN masks, falling to 1; 10 from 2000 steps on."
    )
    train: str = setting(
        "adapters",
        "What a model whose units went at once is trained by: adapters, merged at the end; or"
        " weights, all of its blocks, cut before: takes the memory of full fine-tuning.",
    )
    learning_rate: float | None = setting(
        None,
        "Learning rate, 1e-3 for adapters, for weights 0.15 over the hidden size; falls linearly"
        " to 0.",
    )
    warmup: float = setting(0.03, "Share of the steps over which the learning rate rises.")
    mask_optimizer: str = setting(
        "auto",
        "adam, the paper's, moves each mask by up to the rate, whatever its gradient; adam-mini in"
        " proportion to the gradients. auto is adam-mini for masks that start at 1 without a rate"
        " given, else adam.",
    )
    mask_lr: float | None = setting(
        None,
        "Learning rate of the masks, 2e-3 with adam (the paper: 1e-2), 0.2 with adam-mini; falls"
        " linearly to 0 once the budget is reached.",
    )
    lora_r: int = setting(8, "Rank of the adapters.")
    output_r: int = setting(
        128, "Rank of the adapters of W_O and W_down where their inputs are pruned; scale 1."
    )
    compensate: bool = setting(
        True, "Start those adapters at the least-squares compensation once the shape is final."
    )
    compensation_tokens: int | None = setting(
        None, "Tokens that the compensation is fitted to; 32 per FFN unit of a layer by default."
    )
    refine_passes: int = setting(
        0,
        "After the compensation, passes over its text in which each block in turn learns to give"
        " the dense block's output.",
    )
    self_text: float = setting(
        0.0,
        "Share of the text that the dense model writes itself, before it is pruned; the rest is of"
        " DATA.",
    )
    lora_alpha: int = setting(8, "Scale of the adapters is lora_alpha / lora_r.")
    lora_targets: str = setting(
        "all-linear",
        "Modules with adapters, comma-separated, or all-linear; q_proj,v_proj are the paper's.",
    )
    alpha: float = setting(0.0, "Weight of the hidden-state loss; 0.04 is the ancestors'.")
    lm_weight: float = setting(
        0.3,
        "Share of the loss that is the cross entropy of the text's next tokens, up to 1; the rest"
        " is distillation.",
    )
    kl_direction: str = setting(
        "teacher_student", "teacher_student, or student_teacher as the paper prints it."
    )
    max_grad_norm: float = setting(1.0, "Clip of the gradient; that of masks is not clipped.")

    @property
    def mask_adam(self) -> str:
        """`mask_optimizer`, with auto decided."""
        if self.mask_optimizer != "auto":
            return self.mask_optimizer
        from_one = self.warm_start == "none" and self.mask_lr is None
        return "adam-mini" if from_one else "adam"

    @property
    def mask_rate(self) -> float:
        """`mask_lr`, or the default of the masks' optimizer."""
        return self.mask_lr or MASK_RATES[self.mask_adam]

    def rate(self, hidden_size: int) -> float:
        """`learning_rate`, or the default of what is trained."""
        of_train = {"adapters": ADAPTER_RATE, "weights": WEIGHT_RATE / hidden_size}
        return self.learning_rate or of_train[self.train]

    @property
    def chooser(self) -> str:
        """`method`, with auto decided."""
        if self.method != "auto":
            return self.method
        given = (getattr(self, f.name) != f.default for f in fields(self) if f.name in OF_MASKS)
        return "maskprune" if any(given) else "taylor"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choices(
            self,
            method=("auto", "maskprune", *ONE_SHOT),
            mode=MODES,
            warm_start=WARM_STARTS,
            mask_optimizer=("auto", *MASK_RATES),
            train=TRAINED,
            kl_direction=KL_DIRECTIONS,
        )
        require_least(
            self,
            warm_start_blocks=1,
            lora_r=1,
            lora_alpha=1,
            output_r=1,
            compensation_tokens=1,
            interval=1,
            refine_passes=0,
            alpha=0,
            lm_weight=0,
            warmup=0,
        )
        require_positive(self, "learning_rate", "mask_lr", "eta1", "max_grad_norm")
        if self.reach is not None:
            require_reach(self.reach)
        if self.lm_weight > 1:
            raise ValueError(f"lm_weight is {self.lm_weight}; expected a share from 0 to 1")
        if not 0 <= self.self_text < 1:
            raise ValueError(
                f"self_text is {self.self_text}; expected a share of the text from 0 up to, but "
                "not, 1"
            )
        if self.self_text and self.shard == "full":
            raise ValueError(
                f"self_text is {self.self_text}, which every process writes with the whole model, "
                "and shard is full; give --shard none, or --self-text 0"
            )
        if self.warmup > 1:
            raise ValueError(f"warmup is {self.warmup}; expected a share of the run up to 1")
        if self.refine_passes and not self.compensate:
            raise ValueError(
                f"refine_passes is {self.refine_passes} without the compensation, after which it "
                "comes; leave out one of the two"
            )
        if self.refine_passes and self.shard == "full":
            raise ValueError(
                f"refine_passes is {self.refine_passes}, in which every process holds whole blocks,"
                " and shard is full; give --shard none, or --refine-passes 0"
            )
        if self.train == "weights":
            self._require_trainable_weights()

    def _require_trainable_weights(self) -> None:
        if self.chooser == "maskprune":
            raise ValueError(
                "train is weights, of a model that is cut before it is trained, and learned masks "
                f"cut it at the end; choose at once, --method {', '.join(ONE_SHOT)}, or --train "
                "adapters"
            )
        if self.shard == "full":
            raise ValueError(
                "train is weights, which every process holds whole, and shard is full; give "
                "--shard none, or --train adapters"
            )
        defaults = {f.name: f.default for f in fields(self)}
        if given := [n for n in OF_ADAPTERS if getattr(self, n) != defaults[n]]:
            raise ValueError(
                f"train is weights, and {', '.join(given)} of adapters; leave out one of the two"
            )
