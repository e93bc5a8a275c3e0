"""Rules that settings keep; errors name the setting, its value and the rule."""

import math
from collections.abc import Callable
from typing import Any

Rule = tuple[Callable[[Any], bool], str]

AT_LEAST_1: Rule = lambda value: value >= 1, "be at least 1"
POSITIVE: Rule = lambda value: 0 < value < math.inf, "be above 0"
NOT_NEGATIVE: Rule = lambda value: 0 <= value < math.inf, "not be negative"
SHARE: Rule = lambda value: 0 <= value < 1, "be at least 0 and less than 1"
ALL_AT_LEAST_1: Rule = (
    lambda values: all(value >= 1 for value in values),
    "hold numbers of at least 1",
)
ALL_POSITIVE: Rule = (
    lambda values: bool(values) and all(0 < value < math.inf for value in values),
    "hold at least one number, each above 0",
)


def check(valid: bool, message: str) -> None:
    """Raise ValueError unless `valid`."""
    if not valid:
        raise ValueError(message)


def check_settings(settings: Any, rule: Rule, *names: str) -> None:
    """Raise ValueError for the first of these attributes that breaks the rule."""
    holds, text = rule
    for name in names:
        value = getattr(settings, name)
        check(holds(value), f"{name} is {value}; it must {text}.")
