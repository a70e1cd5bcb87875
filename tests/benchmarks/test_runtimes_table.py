"""The verdict on a runtime in the table of runtimes."""

from __future__ import annotations

from benchmarks.runtimes_table import verdict


def test_a_verdict_is_the_largest_error_or_what_is_wrong_or_refused():
    assert verdict({"steps full": 2e-7, "chunk denoise": 9e-7}, 1e-4) == "9e-07"
    assert verdict({"steps full": "unknown op", "chunk denoise": "opset"}, 1e-4) == "refused"
    assert verdict({"steps full": 2e-7, "chunk denoise": 0.12, "carry route": "no"}, 1e-4) == (
        "**wrong: chunk denoise (1e-01)**; refused: carry route"
    )
