"""super-gradients' averages, over runmgr's: the mean of the best models, and an exponential one whose decay has a schedule.

Both hold their state in `average`, which belongs into the `state` of `Run.save` and `Run.restore`; nothing else is written.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, Protocol

from runmgr.errors import InvalidInput
from runmgr.worker import state as states
from runmgr.worker.accumulating import ExponentialAverage
from runmgr.worker.best import BestAverage

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor, nn

    from runmgr.disk.checkpoints import Mode

_logger = logging.getLogger("runmgr.average")


class ModelWeightAveraging:
    """The mean of the best models by `metric_to_watch`, as `runmgr.BestAverage` makes it.

    The members lie in the run's checkpoints, so `ckpt_dir` gets no file of snapshots; put `average` into the state that is
    saved, and a resumed run goes on with them. For that, `load_checkpoint=True`, it must be there before the restore: give
    `model`. Without it the first model to be averaged counts.
    """

    def __init__(
        self,
        ckpt_dir: str | os.PathLike[str] | None,
        greater_is_better: bool,
        metric_to_watch: str = "acc",
        load_checkpoint: bool = False,
        number_of_models_to_average: int = 10,
        *,
        model: nn.Module | None = None,
    ) -> None:
        if load_checkpoint and model is None:
            raise InvalidInput(
                "load_checkpoint=True needs model=…: then put `average` into the state that Run.restore fills, before training"
            )
        self.ckpt_dir = ckpt_dir
        self.metric_to_watch = metric_to_watch
        self.greater_is_better = greater_is_better
        self.number_of_models_to_average = number_of_models_to_average
        self._average: BestAverage | None = None
        if model is not None:
            self._bind(model)

    @property
    def average(self) -> BestAverage:
        """The average itself, for the state of `Run.save` and for `Run.save_average`."""
        if self._average is None:
            raise InvalidInput("there is no model to average yet; give model=… to ModelWeightAveraging")
        return self._average

    def update_snapshots_dict(
        self, model: nn.Module, validation_results_dict: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Take the model in if it is among the best, and describe the members. Every rank."""
        average = self._bind(model)
        if self.metric_to_watch not in validation_results_dict:
            raise InvalidInput(
                f"the validation results {sorted(validation_results_dict)} do not have {self.metric_to_watch!r}, which "
                f"metric_to_watch names"
            )
        average.update(float(validation_results_dict[self.metric_to_watch]))
        return average.describe()

    def get_average_model(
        self, model: nn.Module, validation_results_dict: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor] | None:
        """Return the state dict of the average, after an update if there are results. Every rank.

        None, with a warning, while no model with a finite metric has come.
        """
        average = self._bind(model)
        if validation_results_dict is not None:
            self.update_snapshots_dict(model, validation_results_dict)
        try:
            return average.averaged_state_dict()
        except InvalidInput as error:
            _logger.warning("there is no average model yet: %s", error)
            return None

    def cleanup(self) -> None:
        """Do nothing: there is no file of snapshots, and the members stay for a run that is continued."""

    def _bind(self, model: nn.Module) -> BestAverage:
        if self._average is None:
            mode: Mode = "max" if self.greater_is_better else "min"
            self._average = BestAverage(model, self.number_of_models_to_average, mode=mode)
        elif states.unwrap(model) is not self._average.model:
            raise InvalidInput("ModelWeightAveraging averages one model; this is another one")
        return self._average


class Decay(Protocol):
    """A schedule: the decay at a step, for the greatest one that is wanted."""

    def __call__(self, decay: float, step: int, total_steps: int) -> float:
        """Return the decay at `step` of `total_steps`."""
        ...


class ConstantDecay:
    """The same decay at all steps."""

    def __init__(self, **_options: Any) -> None:
        pass

    def __call__(self, decay: float, step: int, total_steps: int) -> float:  # noqa: ARG002  # as the others
        """Return `decay`."""
        return decay


class ThresholdDecay:
    """min(decay, (1 + step) / (10 + step)): the first steps are soon forgotten."""

    def __init__(self, **_options: Any) -> None:
        pass

    def __call__(self, decay: float, step: int, total_steps: int) -> float:  # noqa: ARG002  # as the others
        """Return the decay at `step`."""
        return min(decay, (1 + step) / (10 + step))


class ExpDecay:
    """decay · (1 - exp(-beta · step / total_steps)): it grows over the whole training, the faster the greater `beta`."""

    def __init__(self, beta: float = 15.0, **_options: Any) -> None:
        self.beta = beta

    def __call__(self, decay: float, step: int, total_steps: int) -> float:
        """Return the decay at `step` of `total_steps`."""
        return decay * -math.expm1(-self.beta * step / total_steps)


EMA_DECAY_FUNCTIONS: dict[str, type[Any]] = {"constant": ConstantDecay, "threshold": ThresholdDecay, "exp": ExpDecay}


class ModelEMA:
    """A `runmgr.ExponentialAverage` whose decay follows a schedule.

    Save it as `{"net": model, "ema_net": ema.average}`; validate inside `with ema.average.applied():`.
    """

    def __init__(self, model: nn.Module, decay: float, decay_function: Decay) -> None:
        self.average = ExponentialAverage(model, decay)
        self.decay = decay
        self.decay_function = decay_function

    @classmethod
    def from_params(cls, model: nn.Module, decay_type: str = "exp", decay: float = 0.9999, **options: Any) -> ModelEMA:
        """Make one from `ema_params`; `decay_type` is a key of EMA_DECAY_FUNCTIONS, which may be added to."""
        if decay_type not in EMA_DECAY_FUNCTIONS:
            raise InvalidInput(f"decay_type={decay_type!r} must be one of {', '.join(map(repr, EMA_DECAY_FUNCTIONS))}")
        return cls(model, decay, EMA_DECAY_FUNCTIONS[decay_type](**options))

    def update(self, model: nn.Module, step: int, total_steps: int) -> None:
        """Move the average towards the model, with the decay of `step`. Every rank."""
        if states.unwrap(model) is not self.average.model:
            raise InvalidInput("ModelEMA averages one model; this is another one")
        decay = float(self.decay_function(self.decay, step, total_steps))
        if not 0 <= decay < 1:
            raise InvalidInput(
                f"the schedule gives decay {decay!r} at step {step!r}; it must be at least 0 and below 1"
            )
        self.average.decay = decay
        self.average.update()
