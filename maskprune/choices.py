"""The choices that settings allow, and the bounds that a class shares with its settings.

Imports nothing heavy: the command line reads them before torch is loaded.
"""

from __future__ import annotations

HEAD_UNITS = ("kv_group", "query_head")
ARCH_FALLBACKS = ("mistral", "divisor", "error")
MODES = ("minimax", "scheduled")
WARM_STARTS = ("none", "wanda-sp", "taylor")
# Each optimizer of the masks and its default rate.
MASK_RATES = {"adam-mini": 0.2, "adam": 2e-3}
TRAINED = ("adapters", "weights")
ONE_SHOT = ("wanda-sp", "taylor", "random")
TWO_FOUR_ONE_SHOT = ("sparsegpt", "wanda", "magnitude")
KL_DIRECTIONS = ("teacher_student", "student_teacher")

LEAST_STEPS = 20
LARGEST_REACH = 0.9


def require_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError where `value` is none of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")


def require_choices(config: object, **choices: tuple[str, ...]) -> None:
    """`require_choice` of several attributes of `config`."""
    for name, allowed in choices.items():
        require_choice(name, getattr(config, name), allowed)


def require_least(config: object, **least: int) -> None:
    """Raise ValueError where an attribute is below its bound, or NaN; None passes."""
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and not value >= low:
            raise ValueError(f"{name} is {value}; expected at least {low}")


def require_positive(config: object, *names: str) -> None:
    """Raise ValueError where an attribute is not above 0; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}; expected a number above 0")


def require_reach(reach: float) -> None:
    """Raise ValueError where `reach` is not a share of a run that leaves enough steps after it."""
    if not 0 < reach <= LARGEST_REACH:
        raise ValueError(f"reach is {reach}; expected a share of the run in (0, {LARGEST_REACH}]")
