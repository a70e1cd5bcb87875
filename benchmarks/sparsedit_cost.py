"""SparseDiT on DiT-XL/2: operations and tokens of our rewritten model, compared with those that the paper reports.

    python -m benchmarks.sparsedit_cost          # random weights; ten minutes and 12 GB

The paper's figures (arXiv 2412.06028, called FLOPs there) are GMACs of one forward pass for a range of pruning rates
r(t). Ours are counted on the rewritten graphs at 100 evenly spaced timesteps, each with the largest grid that r(t)
allows, and averaged; the steps with the most and the fewest tokens are reported as well.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.common import write_result
from dcconvert.api import convert_call
from dcconvert.export.checks.flops import converted_gmacs, original_gmacs
from dcconvert.models.dit import DiT, DiTConfig
from dcconvert.models.example_inputs import dit_inputs
from dcconvert.passes.methods import method_of
from dcconvert.passes.methods.sparsedit import WARM_END
from dcconvert.passes.planning.pooled_planner import PooledPlanner
from dcconvert.passes.planning.schedule import CURVE, Policy

XL = DiTConfig(depth=28, width=1152, heads=16, patch=2, image_size=32)
# Latent pixels per side, sides of the largest and smallest pooled grids, and the paper's GMACs. The paper gives rates
# r = 1 - side^2 / N to two digits: 0.44 to 0.61, 0.61 to 0.86, the same, 0.90 to 0.96.
PUBLISHED = ((32, 12, 10, 88.91), (32, 10, 6, 68.05), (64, 20, 12, 286.0), (64, 10, 6, 235.0))
STEPS = 100


def measured(size: int, most: int, fewest: int, published: float, config: DiTConfig = XL) -> dict[str, Any]:
    """One row: the rewritten model with a schedule between two pooled grids with `most` and `fewest` tokens per
    side."""
    low, high = (1 - (side * config.patch / size) ** 2 for side in (most, fewest))
    torch.manual_seed(0)
    model = DiT(replace(config, image_size=size)).eval()
    knots = ((0.0, 1 - low), (WARM_END, 1 - low), (1.0, 1 - high))
    taus = 1 - (np.arange(STEPS) + 0.5) / STEPS
    ratio = 1 / float(np.mean(np.interp(taus, *np.transpose(knots))))
    method = method_of("sparsedit", fewest=1 - high)
    converted = convert_call(
        model, ratio, example_inputs=dit_inputs(model, 2), schedule=Policy(CURVE, ratio, knots=knots), options=method
    )
    tokens = converted.spec.tokens
    planner = converted.planner.planner
    assert isinstance(planner, PooledPlanner)
    counts = planner.allowed(np.interp(taus, *np.transpose(knots)) * tokens + 1e-6)
    inputs = converted.spec.example(2)
    costs = {int(count): converted_gmacs(converted, inputs, int(count)) for count in np.unique(counts)}
    mean = float(np.mean([costs[int(count)] for count in counts]))
    return {
        "latent": size,
        "tokens": tokens,
        "r_min": low,
        "r_max": high,
        "original_gmacs": original_gmacs(converted, inputs),
        "gmacs": mean,
        "published": published,
        "difference": mean / published - 1,
        "mean_tokens": float(counts.mean()),
        "most": {"tokens": int(counts.max()), "gmacs": costs[int(counts.max())]},
        "fewest": {"tokens": int(counts.min()), "gmacs": costs[int(counts.min())]},
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    rows = []
    for case in PUBLISHED:
        rows.append(measured(*case))
        row = rows[-1]
        print(
            f"{row['latent'] * 8} px, r {row['r_min']:.2f}-{row['r_max']:.2f}: {row['gmacs']:.1f} GMACs "
            f"({row['fewest']['gmacs']:.1f} to {row['most']['gmacs']:.1f}), paper {row['published']}",
            flush=True,
        )
    print(f"Results: {write_result('sparsedit_cost', {'model': 'DiT-XL/2', 'steps': STEPS}, rows)}")


if __name__ == "__main__":
    main()
