"""Which options there are and which go together: what is true of an `Options` wherever it came from."""

from __future__ import annotations

import math

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.options import MODES, PREDICTIONS, STATE_DTYPES, TRUNKS, Options
from dcconvert.passes.modules.routers import CARRY_ROUTERS, CHUNK_ROUTERS, OWN
from dcconvert.passes.planning.layout import PACKINGS
from dcconvert.passes.planning.planners import DECHUNKS


def check_options(options: Options) -> None:
    """UsageError for options that do not exist, are out of range or do not go together."""
    mode, trunk, dechunk = options.mode, options.trunk, options.dechunk
    if mode not in MODES:
        raise UsageError(f"unknown mode '{mode}': choose one of {', '.join(MODES)}")
    if trunk not in TRUNKS or dechunk not in DECHUNKS:
        raise UsageError(
            f"trunk '{trunk}', dechunk '{dechunk}': there are {', '.join(TRUNKS)} and {', '.join(DECHUNKS)}"
        )
    routers = CARRY_ROUTERS if mode == "carry" else CHUNK_ROUTERS
    if options.router not in (*routers, OWN):
        raise UsageError(f"mode {mode} has no router '{options.router}': choose one of {', '.join(routers)}")
    if options.packing not in PACKINGS:
        raise UsageError(f"unknown packing '{options.packing}': choose one of {', '.join(PACKINGS)}")
    if options.state_dtype not in STATE_DTYPES:
        raise UsageError(f"unknown state dtype '{options.state_dtype}': choose one of {', '.join(STATE_DTYPES)}")
    if options.prediction not in PREDICTIONS:
        raise UsageError(f"unknown prediction '{options.prediction}': a model predicts eps or flow")
    check_numbers(options)
    check_together(options)


def check_numbers(options: Options) -> None:
    if min(options.head_blocks, options.tail_blocks) < 0 or min(options.members, options.neighbours) < 1:
        raise UsageError("head and tail blocks must not be negative, members and neighbours at least 1")
    if not (0 < options.fewest <= 1 and 0 < options.guard < math.inf):
        raise UsageError(f"fewest {options.fewest:g}, guard {options.guard:g}: above 0, and fewest at most 1")


def check_together(options: Options) -> None:
    mode, trunk = options.mode, options.trunk
    if mode == "chunk" and options.state_dtype != "model":
        raise UsageError("mode chunk has no state whose precision could be chosen: leave --state out")
    if mode != "chunk" and (trunk != "plain" or options.dechunk != "gaussian"):
        raise UsageError(f"mode {mode} has only the plain trunk: use mode chunk")
    if (mode != "chunk" or trunk != "plain") and options.packing != "rows":
        which = f"mode {mode}" if mode != "chunk" else f"trunk {trunk}"
        raise UsageError(f"{which} needs one sample a row: use packing rows")
    if (trunk != "plain" or options.dechunk != "gaussian") and options.router == "merge":
        raise UsageError("token merging has the plain trunk and dechunk: choose another router")
    if trunk == "patch-sizes" and options.head_blocks + options.tail_blocks:
        raise UsageError("all blocks run in the patch size of the step: leave out --head-blocks and --tail-blocks")
