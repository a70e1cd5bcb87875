"""A diffusers transformer in its pipeline: converted when it is called, with the call itself as the example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.runtime.infer_runs import FollowedRun
from dcconvert.passes.runtime.model import DynamicModel

EXAMPLE_BATCH = 2  # at least, so that the batch axis can be seen
REMEMBERED = 4  # conversions: what a pipeline calls in turn
# How far an image moves at most between two steps of a pipeline, relative to its norm: few steps make large ones, and
# two images of noise are 1.4 apart.
LIMIT = 1.2

Convert = Callable[..., DynamicModel]


def is_diffusers(module: nn.Module) -> bool:
    """Whether a module is one of diffusers' models, without importing it."""
    return any(cls.__module__.startswith("diffusers.") and cls.__name__ == "ModelMixin" for cls in type(module).__mro__)


class DropIn(nn.Module):
    """Replaces a diffusers transformer in a pipeline; attributes that it does not have are the original's.

    It is converted at the first call, and again at the first call with a new size (resolution, text length), type or
    device; the batch may change. The last few conversions are kept and share the original's weights. `undo` returns the
    original, which was not changed.

    Calls that belong to the same image (mode carry) are identified by `cache_context`, which pipelines set if they call
    the transformer twice per step, and otherwise as in `FollowedRun`.
    """

    def __init__(self, module: nn.Module, convert: Convert, timestep_scale: float | None = None) -> None:
        super().__init__()
        self.transformer = module
        self.timestep_scale = timestep_scale
        self._convert = convert
        self._models: dict[Any, DynamicModel] = {}
        self._runs: dict[Any, FollowedRun] = {}
        self._context = ""

    def __getattr__(self, name: str) -> Any:
        """The original's attributes, such as `config`, `dtype` and `device`, if they are not defined here."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("transformer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's call; `return_dict` gives what it gives there. Errors as `dcconvert.convert`."""
        given = self.named(args, kwargs)
        as_dict = given.pop("return_dict", True)
        model, run = self.model_for(given)
        inputs = model.flat_inputs((), {**given, "return_dict": False} if self.takes("return_dict") else given)
        outputs = run.step(inputs)
        found = pytree.tree_unflatten(outputs, pytree.treespec_loads(model.spec.out_spec))
        if not as_dict:
            return found
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=found[0])

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by name, without those that are None."""
        try:
            bound = inspect.signature(self.transformer.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise UsageError(
                f"{type(self.transformer).__name__} cannot be called with these arguments: {error}"
            ) from error
        return {name: value for name, value in bound.arguments.items() if value is not None}

    def takes(self, name: str) -> bool:
        return name in inspect.signature(self.transformer.forward).parameters

    def model_for(self, given: dict[str, Any]) -> tuple[DynamicModel, FollowedRun]:
        """The conversion for a call, made if it is the first of its kind, and the run that it may continue."""
        batch = batch_of(given)
        key = tuple((name, described(value, batch)) for name, value in given.items())
        if key not in self._models:
            model = self.converted(given, batch)
            while len(self._models) >= REMEMBERED:
                oldest = next(iter(self._models))
                del self._models[oldest]
                self._runs = {which: run for which, run in self._runs.items() if which[0] != oldest}
            self._models[key] = model
        run = self._runs.setdefault((key, self._context), FollowedRun(self._models[key], LIMIT))
        return self._models[key], run

    def converted(self, given: dict[str, Any], batch: int) -> DynamicModel:
        """A conversion with this call as its example."""
        example = {name: several(value, batch) for name, value in given.items()}
        if self.takes("return_dict"):
            example["return_dict"] = False
        scale = self.timestep_scale or scale_of(given.get("timestep"))
        return self._convert(self.transformer, example_inputs=example, timestep_scale=scale, grid=grid_of(given))

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Calls inside belong together, such as all those with the prompt, or all without."""
        before, self._context = self._context, name
        try:
            yield
        finally:
            self._context = before

    def forget(self) -> None:
        """Drop the state of runs and free its memory; the next call starts a new run."""
        for run in self._runs.values():
            run.forget()

    def undo(self) -> nn.Module:
        """The original transformer, as it was."""
        return self.transformer

    def summary(self) -> str:
        """What was converted so far, with a paragraph for every size."""
        name = type(self.transformer).__name__
        if not self._models:
            return f"{name}: will be converted when it is called"
        return "\n\n".join(f"{name}\n{model.summary()}" for model in self._models.values())

    def save(self, folder: str | Path, **options: Any) -> Path:
        """Write the conversion as a bundle, as `Converted.save` does; UsageError if there is not exactly one."""
        if len(self._models) != 1:
            raise UsageError(
                f"the model has {len(self._models)} conversions, one for each size of its calls, but "
                "a bundle holds one; "
                "call the pipeline with one size only, or convert with example_inputs"
            )
        [model] = self._models.values()
        saved = getattr(model, "save")(folder, **options)  # noqa: B009  (convert gives a Converted)
        return Path(saved)


def batch_of(given: Mapping[str, Any]) -> int:
    """The batch size of a call: that of its first tensor."""
    first = next((v for v in pytree.tree_leaves(given) if isinstance(v, Tensor) and v.ndim), None)
    if first is None:
        raise UsageError("the batch size is unknown, because the call has no tensor: pass one")
    return int(first.shape[0])


def described(value: Any, batch: int) -> Any:
    """The properties of an argument that must stay the same to reuse a conversion: all except values and batch size."""
    leaves, spec = pytree.tree_flatten(value)

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return repr(leaf)
        batched = leaf.ndim > 0 and leaf.shape[0] == batch
        return (batched, tuple(leaf.shape[batched:]), leaf.dtype, leaf.device)

    return (str(spec), tuple(map(of, leaves)))


def several(value: Any, batch: int) -> Any:
    """An argument for at least two samples: those of a single one repeated."""
    if batch >= EXAMPLE_BATCH:
        return value

    def repeated(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch:
            return leaf.repeat_interleave(EXAMPLE_BATCH, dim=0)
        return leaf

    return pytree.tree_map(repeated, value)


def scale_of(timestep: Any) -> float:
    """The timestep at pure noise: 1 for models that count from 0 to 1, as the first call of a pipeline shows."""
    counts_to_one = isinstance(timestep, Tensor) and timestep.is_floating_point() and bool((timestep <= 1).all())
    return 1.0 if counts_to_one else 1000.0


def grid_of(given: Mapping[str, Any]) -> tuple[int, int] | None:
    """The grid of tokens whose places are given as `img_ids` [N, 3] (FLUX); None without."""
    places = given.get("img_ids")
    if not isinstance(places, Tensor) or places.ndim != 2:
        return None
    height, width = (len(torch.unique(places[:, axis])) for axis in (1, 2))
    return (height, width) if height * width == len(places) else None
