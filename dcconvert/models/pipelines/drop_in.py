"""A diffusers transformer in its pipeline: converted when it is called, with the call itself as the example."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dcconvert.export.checks.flops import run_ratio
from dcconvert.models.pipelines.calls import Grid, batch_of, described, grid_of, scale_of, several
from dcconvert.models.pipelines.fingerprint import fingerprint
from dcconvert.models.pipelines.texts import Text, length_is_free, texts_of
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError
from dcconvert.passes.planning.schedule import Policy, noise_levels
from dcconvert.passes.runtime.infer_runs import FollowedRuns, Loop, last_loop, spent
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.threads import PerThread

REMEMBERED = 4  # conversions: what a pipeline calls in turn
# How far an image moves at most between two steps of a pipeline, relative to its norm: few steps make large ones, and
# two images of noise are 1.4 apart.
LIMIT = 1.2
HOOKS = ("_hf_hook", "_old_forward", "_diffusers_hook", "forward")  # of accelerate and diffusers: never the original's

Convert = Callable[..., DynamicModel]


def is_diffusers(module: nn.Module) -> bool:
    """Whether a module is one of diffusers' models, without importing it."""
    return any(cls.__module__.startswith("diffusers.") and cls.__name__ == "ModelMixin" for cls in type(module).__mro__)


class DropIn(nn.Module):
    """Replaces a diffusers transformer in a pipeline; attributes that it does not have are the original's.

    It is converted at the first call, and again at the first call with a new size (resolution, text length), type or
    device, and when the original changed: other modules, weights, adapters or settings (`fingerprint`). The batch may
    change. Texts of different lengths are filled up to the next of a few lengths, if the model masks them. The last few
    conversions are kept and share the original's weights. `undo` returns the original, which was not changed. Its class
    is the original's for all who ask, so that a pipeline saves the original, and manages its adapters.

    Calls that belong to the same image (modes steps and carry) are identified by `cache_context`, which pipelines set
    if they call the transformer twice per step, and otherwise as in `FollowedRuns`. Every thread has runs of its own.

    `steps`: of a sampling run, over which the ratio is a mean; it can be set at any time. `policy`: how such a run
    should spend its tokens, None where steps do not matter. `grid`: as in `dcconvert.convert`.
    """

    def __init__(
        self,
        module: nn.Module,
        convert: Convert,
        steps: int,
        policy: Policy | None = None,
        timestep_scale: float | None = None,
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        self.transformer = module
        self.timestep_scale, self.grid = timestep_scale, grid
        self.__dict__["__module__"] = type(module).__module__  # where pipelines look a class up by its name
        self._convert, self._steps, self._policy = convert, steps, policy
        self._start()

    def _start(self) -> None:
        self._models: dict[Any, DynamicModel] = {}
        self._runs: PerThread[FollowedRuns] = PerThread(FollowedRuns)
        self._lengths: dict[Any, set[int]] = {}  # of texts, in calls that are the same otherwise
        self._free: dict[Text, bool] = {}  # whether the model gives the same for a text that is filled up
        self._lock = threading.RLock()

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._modules["transformer"]) if "_modules" in vars(self) else DropIn

    def __getattr__(self, name: str) -> Any:
        """The original's attributes, such as `config`, `dtype` and `device`, if they are not defined here."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in HOOKS:
                raise
            return getattr(super().__getattr__("transformer"), name)

    def __reduce_ex__(self, _: Any) -> Any:
        return blank, (), {name: value for name, value in vars(self).items() if name not in OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has no conversions and no runs: it makes them when it is called."""
        super().__setstate__(state)
        self._start()

    @property
    def steps(self) -> int:
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        if type(steps) is not int or steps < 1:
            raise UsageError(f"{steps!r} sampling steps: give a whole number of at least 1")
        if self._policy is not None:
            self._policy.timetable(noise_levels(steps))  # errors before anything changes
        with self._lock:
            self._models = {key: model.with_steps(steps) for key, model in self._models.items()}
            self._steps = steps
            self.forget()

    @torch._disable_dynamo
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's call; `return_dict` gives what it gives there. Errors as `dcconvert.convert`."""
        hook = vars(self.transformer).get("_hf_hook")  # accelerate's, which brings the weights to the device
        if hook is None:
            return self._call(args, kwargs)
        args, kwargs = hook.pre_forward(self.transformer, *args, **kwargs)
        return hook.post_forward(self.transformer, self._call(args, kwargs))

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = self.named(args, kwargs)
        as_dict = given.pop("return_dict", True)
        with self._lock:
            model, given = self.model_and_call(given)
        inputs = model.flat_inputs((), {**given, "return_dict": False} if self.takes("return_dict") else given)
        outputs = self._runs.own.step(model, inputs, LIMIT)
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

    def model_and_call(self, given: dict[str, Any]) -> tuple[DynamicModel, dict[str, Any]]:
        """The conversion for a call, and the call as that takes it, with its texts filled up."""
        evened = self.evened(given)
        try:
            return self.model_for(evened), evened
        except UnsupportedModelError:
            if evened is given:
                raise
        self._free = dict.fromkeys(self._free, False)  # it cannot be converted with a mask
        return self.model_for(given), given

    def model_for(self, given: dict[str, Any]) -> DynamicModel:
        """The conversion for a call, made if it is the first of its kind."""
        batch = batch_of(given)
        call = tuple((name, described(value, batch)) for name, value in given.items())
        key = (fingerprint(self.transformer), call)
        model = self._models.pop(key, None) or self.converted(given, batch)
        while len(self._models) >= REMEMBERED:
            self._drop(next(iter(self._models)))
        self._models[key] = model  # the last one used is the last
        return model

    def evened(self, given: dict[str, Any]) -> dict[str, Any]:
        """The call with a text of a usual length, if calls differ in the length of their texts only."""
        batch = batch_of(given)
        for text in texts_of(self.transformer, given):
            rest = text.without_length(given, batch)
            lengths = self._lengths.setdefault(rest, set())
            lengths.add(given[text.name].shape[1])
            if len(lengths) == 1 or self._free.get(text) is False:
                continue
            if text not in self._free:
                self._free[text] = length_is_free(self.transformer, given, text)
            if self._free[text]:
                given = text.filled(given)
        return given

    def _drop(self, key: Any) -> None:
        model = self._models.pop(key)
        for runs in self._runs.all():
            runs.drop(model)

    def converted(self, given: dict[str, Any], batch: int) -> DynamicModel:
        """A conversion with this call as its example."""
        check_place(self.transformer, given)
        example = {name: several(value, batch) for name, value in given.items()}
        if self.takes("return_dict"):
            example["return_dict"] = False
        scale = self.timestep_scale or scale_of(given.get("timestep"))
        grid = self.grid or grid_of(given)
        return self._convert(
            self.transformer, example_inputs=example, timestep_scale=scale, grid=grid, steps=self._steps
        )

    @contextmanager
    def cache_context(self, name: str, step_index: int | None = None, **_: Any) -> Iterator[None]:
        """Calls inside belong together, such as all those with the prompt, or all without.

        Step 0 begins a new run; what else a pipeline says of the step is not needed.
        """
        runs = self._runs.own
        before, runs.context = runs.context, name
        if step_index == 0:
            runs.begin()
        try:
            yield
        finally:
            runs.context = before

    def forget(self) -> None:
        """Drop the state of runs in all threads and free its memory; the next call starts a new run."""
        for runs in self._runs.all():
            runs.forget()

    def undo(self) -> nn.Module:
        """The original transformer, as it was."""
        return self.transformer

    def summary(self) -> str:
        """What was converted so far, with a paragraph for every size, and what the last run computed."""
        name = type(self.transformer).__name__
        with self._lock:
            models = list(self._models.values())
        if not models:
            return f"{name}: will be converted when it is called"
        loop = last_loop(self._runs)
        last = [] if loop is None else [spent_line(models[-1], loop, self._steps)]
        return "\n\n".join([*(f"{name}\n{model.summary()}" for model in models), *last])

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


def spent_line(model: DynamicModel, loop: Loop, steps: int | None) -> str:
    """What a loop computed, of the tokens and of the whole model's operations."""
    whole = run_ratio(model, loop.kept(model.spec.tokens))
    return f"{spent(loop, model.schedule, steps)}; {whole:.3g}x fewer operations in the whole model"


OWN = ("_models", "_runs", "_lengths", "_free", "_lock")  # of one object: not copied


def blank() -> DropIn:
    """An empty object for copies and pickles."""
    return DropIn.__new__(DropIn)


def check_place(module: nn.Module, given: Mapping[str, Any]) -> None:
    """Raises UsageError for weights that are not where the inputs are."""
    inputs = {leaf.device for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor) and leaf.ndim}
    weights = {weight.device for weight in module.parameters()}
    if elsewhere := sorted(map(str, weights - inputs)):
        raise UsageError(
            f"weights of {type(module).__name__} are on {', '.join(elsewhere)}, but its inputs on "
            f"{', '.join(sorted(map(str, inputs)))}: sequential and group offloading move weights block by block, "
            "which a converted model cannot; use the pipeline's enable_model_cpu_offload instead"
        )
