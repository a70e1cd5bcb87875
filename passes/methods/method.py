"""The definition of a method: how it rewrites a model, how many tokens its steps keep, and what users must know."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from torch import nn

from dcconvert.passes.frontend.canonicalise import Normalise
from dcconvert.passes.frontend.complex_to_real import RealNumbers
from dcconvert.passes.frontend.merged_batch import MergeLater
from dcconvert.passes.frontend.part_tokens import PartTokens
from dcconvert.passes.frontend.token_stream import FindTokenStream
from dcconvert.passes.frontend.write_attention import WriteAttention
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.pass_runner import Passes
from dcconvert.passes.ir.spec import DECHUNK
from dcconvert.passes.modules.routers import make_router
from dcconvert.passes.planning.chunk_plan import Planner
from dcconvert.passes.planning.schedule import Policy, Timetable
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.planning.token_history import Doubles, History
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.run import Run

Model = TypeVar("Model", bound=DynamicModel)

SAME_OPS: Passes = (
    Normalise(),  # one form for each op
    RealNumbers(),  # no complex numbers
    WriteAttention(),  # attention as one op
    MergeLater(),  # samples on an axis of their own
)
FRONTEND: Passes = (
    *SAME_OPS,
    FindTokenStream(),  # patchify, cut points, blocks, trunk
    PartTokens(),  # grid tokens and others in two values where the trunk begins and ends
)


@dataclass(frozen=True)
class Method:
    """A way to compute fewer tokens. A subclass is a method, its fields are its options, and an instance holds their
    values.

    Everything that differs between methods is defined by this class; no other code depends on a method's name. A new
    method is one file in `passes/methods`, a line in its registry, and a test (docs/adding_a_method.md).

    `head_blocks` and `tail_blocks` compute all tokens before and after the trunk (-1: the method's default). `router`
    scores the tokens ("": the first of `routers`). `seed` is used for random routers and new weights. Raises UsageError
    for options that are out of range.
    """

    head_blocks: int = -1
    tail_blocks: int = -1
    router: str = ""
    seed: int = 0

    # What it is.
    name: ClassVar[str]
    mode: ClassVar[str] = "chunk"  # one of MODES
    remembers: ClassVar[str] = ""  # what a run stores from earlier steps: "tokens", "updates" or nothing
    run: ClassVar[type[Run]] = Run  # how its steps are made
    title: ClassVar[str] = ""  # with the paper, for the help
    limits: ClassVar[tuple[str, ...]] = ()  # what a report says before its figures

    # How a model is rewritten.
    blocks: ClassVar[int] = 1  # head and tail blocks by default
    routers: ClassVar[tuple[str, ...]] = ()
    new_weights: ClassVar[str] = DECHUNK  # prefix of the weights that its trunk has besides the original's

    # How many tokens its steps keep.
    schedule: ClassVar[str] = "constant"
    schedules: ClassVar[tuple[str, ...]] = ()  # kinds of schedule that only this method has
    watches: ClassVar[bool] = False  # whether a run must store its last latents
    fixed_steps: ClassVar[bool] = False  # whether what was fitted holds for one sampler only

    # What can be done with it.
    drops_tokens: ClassVar[bool] = True  # steps compute some tokens of the grid, and which ones can be shown
    plain_plan: ClassVar[bool] = True  # a plan needs nothing but a schedule and scores [B, N]
    original_trunk: ClassVar[bool] = True  # the trunk returns what the original's returns if everything is kept

    # How it is trained.
    trains: ClassVar[tuple[str, ...]] = ("all",)
    learning_rate: ClassVar[float] = 3e-4
    learns_router: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("head_blocks", "tail_blocks"):
            if getattr(self, name) == -1:
                object.__setattr__(self, name, self.blocks)
        object.__setattr__(self, "router", self.router or self.routers[0])
        self.check()

    def check(self) -> None:
        """Raises UsageError for options that are out of range or conflict."""
        if min(self.head_blocks, self.tail_blocks) < 0:
            raise UsageError(
                f"head blocks ({self.head_blocks}) and tail blocks ({self.tail_blocks}) cannot be negative"
            )
        if self.router not in self.routers:
            raise UsageError(
                f"method {self.name} has no router '{self.router}': choose one of {', '.join(self.routers)}"
            )

    @classmethod
    def for_ratio(cls, ratio: float, **given: Any) -> Self:
        """The method with the given options, and with those that the ratio decides."""
        return cls(**given)

    def with_prediction(self, prediction: str) -> Self:
        """The same method for a model that predicts `eps` or `flow` ("": unknown), if that matters."""
        return self

    # What passes need to know.

    @property
    def row_packing(self) -> str:
        """How kept tokens are laid out in rows for attention: `rows`, `bins` or `varlen`."""
        return "rows"

    @property
    def by_values(self) -> bool:
        """Whether dechunk returns the trunk's values instead of adding its update."""
        return False

    @property
    def remembered_as(self) -> str:
        """The precision of a run's state, one of STATE_DTYPES."""
        return "model"

    @property
    def predicts(self) -> str:
        """What the model predicts: `eps`, `flow`, or "" if it is unknown or does not matter."""
        return ""

    @property
    def stateful(self) -> bool:
        """Whether the samples of a run have a state."""
        return bool(self.remembers)

    @property
    def keeps_original(self) -> bool:
        """Whether the model equals the original when every token is kept."""
        return True

    @property
    def frozen(self) -> tuple[str, ...]:
        """Prefixes of the names of weights that training does not change."""
        return ()

    def pipeline(self) -> Passes:
        """The passes, in order."""
        raise NotImplementedError

    def router_module(self, grid: tuple[int, int]) -> nn.Module:
        """The module that scores the tokens of an H x W grid."""
        return make_router(self.router, grid, self.seed)

    def planner(self, grid: tuple[int, int]) -> Planner:
        """The planner that lays out the kept tokens of an H x W grid."""
        raise NotImplementedError

    @classmethod
    def policy(cls, ratio: float) -> Policy:
        """How many tokens each step keeps unless the user chooses a schedule; 1/ratio of them on average."""
        return Policy(cls.schedule, ratio)

    def run_counts(self, planner: StepPlanner, taus: np.ndarray) -> np.ndarray:
        """Kept tokens per sample at every step of a run with these noise levels."""
        return planner.schedule.run_counts(taus, planner.spec.tokens)

    def found_counts(self, planner: StepPlanner, scores: np.ndarray, spread: np.ndarray | None) -> np.ndarray:
        """Kept tokens of each sample, if steps decide them, from scores [B, N] or from `ThirdDifference.spread`."""
        raise NotImplementedError

    def urgency(self, history: History, scores: np.ndarray, counts: np.ndarray, taus: Doubles) -> Doubles:
        """How urgently each token should be computed [B, N], for methods with a state."""
        raise NotImplementedError

    def finished(self, model: Model) -> Model:
        """The rewritten model with the method's additions."""
        return model

    def fitted(self, model: Model, runs: Any) -> Model:
        """The model fitted to its ratio on sampling runs (`methods.runs.Runs`), if steps decide their token counts."""
        return model

    # How it is trained.

    def training_ratios(self, schedule: Timetable) -> tuple[float, ...]:
        """The ratios to train for unless the user names some; one is drawn at every step."""
        return (schedule.ratio,)

    def training_counts(self, planner: StepPlanner, size: int, number: int) -> np.ndarray | None:
        """Kept tokens of the samples of the `number`-th training batch; None: by the schedule."""
        return None

    def unrounded(self, schedule: Timetable) -> Timetable:
        """The schedule without the rounding that static shapes need."""
        return schedule

    def as_dict(self) -> dict[str, Any]:
        """Name and options, as a bundle stores them."""
        return {"method": self.name, **asdict(self)}

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))
