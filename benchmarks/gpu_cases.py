"""Parts of `benchmarks.gpu` that need torch alone: parity, latency and memory, forms of attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dcconvert
from benchmarks.common import SIZES, random_dit
from benchmarks.gpu_backend import OriginalRuntime, Steps, TorchRuntime
from dcconvert.api import Converted
from dcconvert.export.checks.flops import converted_bytes, converted_gmacs, count_bytes, original_gmacs
from dcconvert.export.checks.latency import interleaved, spread
from dcconvert.models.dit import DiT
from dcconvert.models.example_inputs import dit_inputs
from dcconvert.passes.methods import method_of
from dcconvert.passes.planning.chunk_plan import Planner
from dcconvert.passes.rewrite.retarget import in_place

FORMS = {
    "carry": method_of("carry"),
    "chunk": method_of("chunk"),
    "chunk, varlen": method_of("chunk", packing="varlen"),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Relative error of the whole output in the Euclidean norm, against the original in the same precision when everything
# is kept, and against the converted model in float32 on the CPU when the same tokens are dropped.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 6e-2}
MEGABYTE = 1e6


@dataclass(frozen=True)
class Case:
    """What is measured: a DiT with patch 2 at a resolution in pixels, converted in one of FORMS."""

    size: str
    pixels: int
    form: str

    @property
    def model(self) -> str:
        return f"DiT-{self.size}/2"


@dataclass
class Models:
    """Converted models of random weights, made in float32 on `made_on` and moved to the device, where they stay."""

    device: torch.device
    ratios: Sequence[float]
    made_on: torch.device
    depth: int = 0  # blocks, 0 for those of the published size
    flop_ratios: dict[tuple[Case, float], float] = field(default_factory=dict)
    forms: Sequence[str] = tuple(FORMS)
    _known: dict[tuple[str, int, str], tuple[DiT, dict[str, Converted], Steps]] = field(default_factory=dict)

    def get(self, case: Case, dtype: str) -> tuple[DiT, Converted]:
        """The original and the model of a case on the device; all forms share the weights."""
        key = (case.size, case.pixels, dtype)
        dit, models, _ = self.all_forms(key)
        return dit, models[case.form]

    def steps(self, case: Case, dtype: str) -> tuple[DiT, Steps]:
        """The original and its full and skip steps on the device."""
        dit, _, steps = self.all_forms((case.size, case.pixels, dtype))
        return dit, steps

    def all_forms(self, key: tuple[str, int, str]) -> tuple[DiT, dict[str, Converted], Steps]:
        """Everything is made before anything is moved, because the weights are shared."""
        size, pixels, dtype = key
        if key not in self._known:
            for known in [k for k in self._known if k[:2] != key[:2]]:
                del self._known[known]  # cases come model by model
            dit = random_dit(size, 2, pixels, depth=self.depth).to(self.made_on)
            made = {form: self.converted(Case(size, pixels, form), dit) for form in self.forms}
            steps = Steps.of(dit)
            there = {form: model.to(self.device, DTYPES[dtype]) for form, model in made.items()}
            self._known[key] = dit, there, steps.moved(self.device, DTYPES[dtype])
        return self._known[key]

    def seconds(self, case: Case, dtype: str) -> float:
        """What making the model is likely to take, if it is not there yet."""
        if self.depth or (case.size, case.pixels, dtype) in self._known:
            return 0.0
        seconds = (100.0 if case.size == "XL" else 30.0) * (2 if case.pixels > 256 else 1)
        return seconds if self.made_on.type == "cpu" else seconds / 3

    def converted(self, case: Case, dit: DiT) -> Converted:
        model = dcconvert.convert(dit, 4, options=FORMS[case.form])
        missing = [ratio for ratio in self.ratios if (case, ratio) not in self.flop_ratios]
        inputs = model.spec.example(2)
        whole = original_gmacs(model, inputs) if missing else 0.0
        for ratio in missing:
            gmacs = converted_gmacs(model, inputs, kept_tokens(model, ratio))
            self.flop_ratios[case, ratio] = round(whole / gmacs, 3)
        if case.form == "carry":
            in_place(model.denoise_graph)
        return model


def kept_tokens(model: Converted, ratio: float) -> int:
    return max(1, round(model.spec.tokens / ratio))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def named_inputs(dit: DiT, batch: int, dtype: str, device: torch.device) -> dict[str, Tensor]:
    x, t, y = (value.to(device) for value in dit_inputs(dit, batch))
    return {"x": x.to(DTYPES[dtype]), "t": t, "y": y}


# Parity


def parity(models: Models, size: str, pixels: int, form: str, batch: int = 3) -> dict[str, Any]:
    """Errors of a converted model on the device in every precision: everything kept, and a quarter kept.

    Weights are such that the blocks matter ("dropping_changes": by how much dropping three quarters of the tokens
    changes the output), and the order of the tokens is fixed beforehand, so that rounding changes no choice.
    "original_rounding" is what the precision does to the original itself.
    """
    dit = random_dit(size, 2, pixels, depth=models.depth, std=telling_std(size)).to(models.made_on)
    router = "age" if form == "carry" else "pool"
    model = dcconvert.convert(dit, 4, options=replace(FORMS[form], router=router))
    inputs = named_inputs(dit, batch, "fp32", torch.device("cpu"))
    wanted, wanted_original = parity_outputs(model.cpu(), inputs)
    precisions = {}
    for name, dtype in DTYPES.items():  # each from the one before it, which holds its values but for a rare rounding
        there = {key: value.to(models.device) for key, value in inputs.items()}
        there["x"] = there["x"].to(dtype)
        found, found_original = parity_outputs(model.to(models.device, dtype), there)
        errors = {
            "all_kept_error": relative(found[0], found_original[0]),
            "quarter_kept_error": relative(found[1], wanted[1]),
        }
        within = max(errors.values()) <= TOLERANCES[name]
        rounding = relative(found_original[0], wanted_original[0])
        precisions[name] = {**errors, "original_rounding": rounding, "tolerance": TOLERANCES[name], "within": within}
    return {"dropping_changes": relative(wanted[1], wanted_original[1]), "precisions": precisions}


def telling_std(size: str) -> float:
    """A standard deviation of weights with which the blocks of a random model change the output a lot."""
    return 1.5 * SIZES[size][1] ** -0.5


def parity_outputs(model: Converted, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs with all tokens kept, then with a quarter at a lower noise level; and the original's for both."""
    run, counts = model.start(len(inputs["x"])), [model.spec.tokens, kept_tokens(model, 4)]
    found, originals = [], []
    with torch.inference_mode():
        for step, kept in enumerate(counts):
            given = {**inputs, "t": inputs["t"] * (1 - 0.1 * step)}
            found.append(run.step(given, np.full(len(inputs["x"]), kept))[0])
            originals.append(model.original(*given.values()))
    return found, originals


def relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return float((found - wanted).norm() / wanted.norm())


# Latency and memory


def latency(
    models: Models, case: Case, dtype: str, batch: int, ratio: float, runtime: str, runs: int
) -> dict[str, Any]:
    """One step, route, plan and denoise, in turns with the original in the same runtime, precision and batch."""
    dit, model = models.get(case, dtype)
    device = models.device
    inputs = named_inputs(dit, batch, dtype, device)
    counts = np.full(batch, kept_tokens(model, ratio))
    original = OriginalRuntime(model, runtime)
    run, plans, noise = TorchRuntime(model, "eager").start(batch), [], [1.0]

    def converted_step() -> None:
        noise[0] -= 1e-3
        run.step({**inputs, "t": torch.full_like(inputs["t"], 1000 * noise[0])}, counts)
        plans.append(run.last_times.plan if run.last_times else 0.0)
        wait(device)

    def original_step() -> None:
        original(inputs)
        wait(device)

    with torch.inference_mode() if "compiled" not in runtime else torch.no_grad():
        converted_step()  # of a run of mode carry the first step computes everything; it needs no other runtime
        run.runtime = TorchRuntime(model, runtime)
        calls = {"original": original_step, "converted": converted_step}
        times = interleaved(calls, runs, warm_up=3)
        memory = {} if runtime.endswith("CUDA graph") else peaks(calls, model, batch, device)
    speedup = float(np.median(times["original"]) / np.median(times["converted"]))
    flop_ratio = models.flop_ratios[case, ratio]
    whole = count_bytes(model.original_graph, tuple(inputs[name] for name in model.spec.inputs))
    part = converted_bytes(model, inputs, int(counts[0]))
    return {
        "tokens": model.spec.tokens,
        "kept": int(counts[0]),
        "original_ms": spread(times["original"]),
        "converted_ms": spread(times["converted"]),
        "plan_ms": round(float(np.median(plans)) * 1e3, 3),
        "speedup": round(speedup, 3),
        "flop_ratio": flop_ratio,
        "efficiency": round(speedup / flop_ratio, 3),
        "state_mb": round(model.spec.state_bytes * batch / MEGABYTE, 1),
        "bytes": {"original": asdict(whole), "converted": asdict(part)},
        **memory,
    }


def peaks(
    calls: dict[str, Callable[[], Any]], model: Converted, batch: int, device: torch.device
) -> dict[str, float | None]:
    """The most memory that tensors take in a step, in MB: weights, what the step works on, and the state of a run.

    Of captured graphs the allocator does not know it, and of a CPU neither: None.
    """
    weights = sum(t.numel() * t.element_size() for t in model.original_graph.state_dict().values())
    resident = {"original": weights, "converted": weights + model.spec.state_bytes * batch}
    found: dict[str, float | None] = {}
    for name, call in calls.items():
        if device.type != "cuda":
            found[f"{name}_peak_mb"] = None
            continue
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        worked = torch.cuda.max_memory_allocated(device) - before
        found[f"{name}_peak_mb"] = round((resident[name] + worked) / MEGABYTE, 1)
    return found


# Forms of attention


def attention_forms(
    size: str, counts: Sequence[int], tokens: int, dtype: str, device: torch.device, runs: int
) -> dict[str, Any]:
    """From packed queries, keys and values [G, L, 3D] to packed results [G, L, D], four ways to keep samples apart."""
    _, width, heads = SIZES[size]
    side = round(tokens**0.5)
    keep = np.arange(tokens) < np.asarray(counts)[:, None]
    plan = Planner((side, side), members=1, neighbours=1).plan(keep)
    arrays = {name: torch.from_numpy(a).to(device) for name, a in plan.arrays().items()}
    tiles, tile = plan.packed_index.shape
    torch.manual_seed(0)
    qkv = torch.randn(tiles, tile, 3 * width).to(device, DTYPES[dtype])
    segment = torch.searchsorted(arrays["cu_seqlens"], torch.arange(tiles * tile, device=device), right=True)[None]
    scale, ops = (width // heads) ** -0.5, torch.ops.dcconvert

    def split(x: Tensor) -> tuple[Tensor, ...]:
        return x.view(*x.shape[:2], 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)

    def joined(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def rows(attend: Callable[..., Tensor]) -> Tensor:
        q, k, v = split(ops.gather_tokens(qkv, arrays["grid_index"]))
        return ops.gather_tokens(joined(attend(q, k, v)), arrays["packed_index"])

    def varlen() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in split(qkv))
        return ops.varlen_attention(q, k, v, arrays["cu_seqlens"], max(counts), scale).flatten(2)

    forms: dict[str, Callable[[], Tensor]] = {
        "rows with lengths": lambda: rows(lambda q, k, v: ops.padded_attention(q, k, v, arrays["row_lengths"], scale)),
        "block mask": lambda: joined(ops.segment_attention(*split(qkv.flatten(0, 1)[None]), segment, scale)).view(
            tiles, tile, width
        ),
        "varlen": varlen,
    }
    if len(set(counts)) == 1:
        attend = torch.nn.functional.scaled_dot_product_attention
        forms["rows without a mask"] = lambda: rows(lambda q, k, v: attend(q, k, v, scale=scale))
    with torch.inference_mode():
        kept = torch.from_numpy(np.unique(plan.grid_index)).to(device)
        results = {name: form().flatten(0, 1)[kept] for name, form in forms.items()}
        wanted = results["rows with lengths"]
        times = interleaved({name: synchronised(form, device) for name, form in forms.items()}, runs, warm_up=3)
    return {
        "counts": list(map(int, counts)),
        "ms": {name: spread(seconds) for name, seconds in times.items()},
        "error": {name: relative(found, wanted) for name, found in results.items()},
        "tolerance": TOLERANCES[dtype],
    }


def synchronised(call: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    def both() -> None:
        call()
        wait(device)

    return both
