# SPDX-License-Identifier: Apache-2.0
"""One line for each argument that is out of its range."""

__all__ = ["check_range"]


def check_range(is_right: bool, name: str, range_: str, value: object) -> None:
    """Refuse a value that is out of its range.

    Args:
        is_right (bool): Whether it is in it. A comparison with NaN is not true, so ask for what is right.
        name (str): Name of the argument.
        range_ (str): Which values are right, as "positive".
        value (object): What was given.

    Raises:
        ValueError: If it is not right.

    Example:
        >>> check_range(-1 > 0, "delta", "positive", -1)
        Traceback (most recent call last):
            ...
        ValueError: delta must be positive, got -1
    """
    if not is_right:
        msg = f"{name} must be {range_}, got {value}"
        raise ValueError(msg)
