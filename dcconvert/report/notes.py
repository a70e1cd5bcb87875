"""Sentences that several reports and commands share."""

from __future__ import annotations

from collections.abc import Sequence


def state_note(bytes_a_sample: int, batches: Sequence[int]) -> str:
    """How much memory mode carry needs beside the model."""
    sizes = ", ".join(f"{bytes_a_sample * batch / 1e6:,.1f} MB at batch {batch}" for batch in batches)
    return f"State of a sampling run: {sizes}"
