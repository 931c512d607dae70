"""Values that arguments of several verbs take."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """An argument that must be a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return value


def positive_number(text: str) -> float:
    """An argument that must be a number above 0, and a finite one."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value
