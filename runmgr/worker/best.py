"""The average of a model's k best states, whose members are checkpoints that were written anyway."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from runmgr.disk.metrics import is_better
from runmgr.errors import CheckpointCorrupt, InvalidInput
from runmgr.worker.accumulating import ExponentialAverage
from runmgr.worker.averaging import Average, check_outlines, of_parts, wide
from runmgr.worker.fusing import ExactSum, copied_if_finite, copy_all, empty_parts
from runmgr.worker.members import Member, are_same_bits, same_bits
from runmgr.worker.staging import map_tensors
from runmgr.worker.state import module_state

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from runmgr.disk.checkpoints import Mode
    from runmgr.worker.averaging import Weights
    from runmgr.worker.sharding import Piece

_logger = logging.getLogger("runmgr.average")


class Held(NamedTuple):
    """How an average's members go into a checkpoint.

    The one with the number `shared` is what is saved there under `source_key`; those in memory only are in `weights`.
    """

    average: BestAverage
    source_key: str
    shared: int | None
    weights: dict[int, Weights]


class BestAverage(Average):
    """The mean of the `k` best states by a metric: `mode` "max" or "min" says which is better.

    Of a model, or of an `ExponentialAverage`, which then must be saved in the same `state`. Each rank copies its share of a
    state that enters, until the next save, whose bytes it then shares. Ties keep the older; a metric that is not finite, or
    weights that are not, never enter. Fewer than `k` members are averaged as they are.

    The sum, float64 and beside it what that rounds off, is made when the average is first asked for, and kept from then on:
    who enters is added, who leaves is subtracted. `Run.save_average` and a restore read all members again.
    """

    def __init__(self, model: nn.Module | ExponentialAverage, k: int = 10, *, mode: Mode = "max") -> None:
        self.faded = model if isinstance(model, ExponentialAverage) else None
        super().__init__(model.model if isinstance(model, ExponentialAverage) else model)
        if self.faded is not None:
            self._found = self.faded._source  # noqa: SLF001  # the same parts of the same model
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise InvalidInput(f"k={k!r} must be a whole number, at least 1")
        if mode not in {"max", "min"}:
            raise InvalidInput(f"mode={mode!r} must be 'max' or 'min'")
        self.k = k
        self.mode: Mode = mode
        self.members: list[Member] = []
        self._updates = 0
        self._spare: list[Tensor] = []
        self._sum: ExactSum | None = None

    @torch.no_grad()
    def update(self, metric: float) -> bool:
        """Take the present state in if it is among the best, and say whether it was. Every rank; rank 0's metric decides.

        The ranks exchange a few bytes. If the metric is too bad nothing else happens.
        """
        self._updates += 1
        metric = self._agreed_metric(float(metric))
        worst = self._worst() if len(self.members) == self.k else None
        if not math.isfinite(metric) or (worst is not None and not is_better(metric, worst.metric, self.mode)):
            return False
        copies, is_finite = self._copied()
        if not self._agree("look for NaN", all, lambda: is_finite):
            self._spare = copies
            return False
        entering = Member(metric, self._updates, copies, self._present_others())
        self._change_sum(entering, worst)
        if worst is not None:
            self._remove(worst)
        self.members.append(entering)
        return True

    def held_for(self, source_key: str) -> dict[str, Any]:
        """Return, as plain data, what rank 0 must know of this rank's members before a save, see `join`."""
        newest = max(self.members, key=lambda member: member.number, default=None)
        unchanged = None
        if source_key and newest is not None and newest.weights is not None and self._is_present(newest):
            unchanged = newest.number
        return {"outline": self.outline(), "unchanged": unchanged}

    def join(self, found: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what all ranks must know for a save: which member is what is saved, and which ones to gather. Rank 0 only."""
        shared = found[0]["unchanged"]
        if any(other["unchanged"] != shared for other in found):
            shared = None
        waiting = [member.number for member in self.members if member.weights is not None and member.number != shared]
        return {"shared": shared, "gather": waiting, "located": self._located()}

    def held(self, source_key: str, joined: Mapping[str, Any], *, keep: bool) -> Held:
        """Bring together what `join` said. Every rank; those that do not `keep` get nothing."""
        self._locate_like(joined["located"])
        weights = {}
        for number in joined["gather"]:
            (member,) = (member for member in self.members if member.number == number)
            weights[number] = self._gathered(member, keep=keep)
        return Held(self, source_key, joined["shared"], weights)

    def content(self, held: Held, object_name: str) -> dict[str, Any]:
        """Return what the checkpoint `object_name` says of the members: those in checkpoints by name, others whole."""
        return {
            "updates": self._updates,
            "members": [
                {
                    "metric": member.metric,
                    "number": member.number,
                    "object": object_name if member.number == held.shared else member.object_name,
                    "key": held.source_key if member.number == held.shared else member.key,
                    "weights": held.weights.get(member.number),
                }
                for member in self.members
            ],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the members: those in checkpoints by name, the others with their weights. Every rank; rank 0's is whole."""
        joined = self._agree("gather the members of an average", self.join, lambda: self.held_for(""))
        return self.content(self.held("", joined, keep=self._is_main), "")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; `locate` must follow when members lie in checkpoints (Run.restore does it). Every rank."""
        self._updates, self._sum = state["updates"], None
        self.members = []
        for entry in state["members"]:
            weights = entry["weights"]
            member = Member(entry["metric"], entry["number"], None, {}, entry["object"], entry["key"])
            if weights is not None:
                parts = self._source.parts_of(weights)
                member.weights = empty_parts(self._present(), [part.dtype for part in parts])
                copy_all(member.weights, parts)
                member.others = {key: map_tensors(weights[key], torch.clone) for key in self._other_keys()}
            self.members.append(member)
        while len(self.members) > self.k:  # it was saved with a greater k
            self.members.remove(self._worst())

    def locate(self, path_of: Callable[[str], Path]) -> None:
        """Say where the checkpoints lie that hold members; in a fork they have other names, which count from now on."""
        for member in self.members:
            if member.object_name is not None:
                member.path = path_of(member.object_name)
                member.object_name = member.path.name

    def lies_in(self, number: int, object_name: str, key: str, path: Path) -> None:
        """Let a member share the bytes of a checkpoint, which was saved with it, from now on."""
        for member in self.members:
            if member.number == number:
                member.object_name, member.key, member.path = object_name, key, path
                self._reuse(member)

    def whole(self, *, keep: bool) -> Weights:
        """Return the average for a file, from all members read again. Every rank."""
        self._sum = None
        found = super().whole(keep=keep)
        self._sum = None
        return found

    def describe(self) -> list[dict[str, Any]]:
        """Name the members, oldest first: metric and, once saved, the checkpoint object."""
        return [
            {"metric": member.metric, "checkpoint": member.object_name}
            for member in sorted(self.members, key=lambda member: member.number)
        ]

    def _agreed_metric(self, metric: float) -> float:
        """Return rank 0's, and hear from it which members lie in checkpoints by now."""
        told = self._agree("take in a metric", lambda found: [found[0], self._located()], lambda: metric)
        self._locate_like(told[1])
        return float(told[0])

    def _located(self) -> dict[str, list[str]]:
        """Return, as plain data, where members lie."""
        return {
            str(member.number): [member.object_name, member.key, str(member.path)]
            for member in self.members
            if member.object_name is not None and member.path is not None
        }

    def _locate_like(self, located: Mapping[str, list[str]]) -> None:
        for number, (object_name, key, path) in located.items():
            self.lies_in(int(number), object_name, key, Path(path))

    def _present(self) -> list[Tensor]:
        """Return this rank's part of what would enter now."""
        return self._source.views() if self.faded is None else self.faded.parts()

    def _present_others(self) -> Mapping[str, Any]:
        return self._source.others() if self.faded is None else self.faded._others  # noqa: SLF001  # as above

    def _is_present(self, member: Member) -> bool:
        others = self._present_others()
        return are_same_bits(member.weights or [], self._present()) and all(
            same_bits(value, others[key]) if isinstance(value, torch.Tensor) else value == others[key]
            for key, value in member.others.items()
        )

    def _copied(self) -> tuple[list[Tensor], bool]:
        present, (spare, self._spare) = self._present(), (self._spare, [])
        kinds = [(len(part), part.dtype) for part in present]
        if kinds != [(len(part), part.dtype) for part in spare]:
            spare = empty_parts(present, [part.dtype for part in present])
        return spare, copied_if_finite(spare, present)

    def _change_sum(self, entering: Member, leaving: Member | None) -> None:
        """Add and subtract; without a sum, or where the file of the one that leaves cannot be read, it is made when needed."""
        if self._sum is None:
            return
        try:
            if leaving is not None:
                self._sum.add(leaving.parts(self._source), sign=-1)
            self._sum.add(entering.parts(self._source))
        except (CheckpointCorrupt, OSError) as error:
            _logger.warning("the average will be made anew from all members: %s", error)
            self._sum = None

    def _remove(self, member: Member) -> None:
        self.members.remove(member)
        self._reuse(member)

    def _reuse(self, member: Member) -> None:
        """Keep a member's memory for the next one: on a CPU, touching fresh memory costs many times what a copy does."""
        if member.weights is not None:
            self._spare = [] if member.weights and member.weights[0].is_cuda else member.weights
            member.weights, member.others = None, {}

    def _worst(self) -> Member:
        """Return the member to leave first: the worst, among equals the newest."""
        worst = self.members[0]
        for member in self.members[1:]:
            if not is_better(member.metric, worst.metric, self.mode):
                worst = member
        return worst

    def _gathered(self, member: Member, *, keep: bool) -> Weights:
        """Return all of a member's weights, on the CPU of the ranks that `keep`. Every rank."""
        parts = member.weights or []
        found = self._whole(of_parts(parts), self._dtypes(), keep=keep)
        return found | map_tensors(member.others, lambda tensor: tensor.cpu()) if keep else {}

    def _dtypes(self) -> Mapping[str, torch.dtype]:
        """Return what the members' weights are made of."""
        if self.faded is not None:
            return self._source.dtypes
        return {key: tensor.dtype for key, tensor in module_state(self.model).items() if key in self._source.dtypes}

    def _check(self) -> None:
        if not self.members:
            raise InvalidInput("nothing to average: no update() with a finite metric so far")

    def _counts(self) -> list[Any]:
        return [self._updates, sorted(member.number for member in self.members)]

    def _meet(self, what: str) -> None:
        """Make the sum on every rank; a member that one of them cannot read, lost or damaged, leaves it, loudly."""

        def join(outlines: list[list[Any]]) -> dict[str, list[str]]:
            check_outlines(outlines)
            return self._located()

        def contribute() -> list[Any]:
            self._check()
            return self.outline()

        def first_of_each(found: list[dict[str, str]]) -> dict[str, str]:
            return {number: text for problems in reversed(found) for number, text in problems.items()}

        self._locate_like(self._agree(what, join, contribute))
        while problems := self._agree(what, first_of_each, self._make_sum):
            self._leave_out(problems)

    @torch.no_grad()
    def _make_sum(self) -> dict[str, str]:
        """Add up this rank's part of all members, unless that is done, and say which ones cannot be read and why."""
        if self._sum is not None:
            return {}
        own, layout = module_state(self.model), self._source.layout
        total = ExactSum(self._present(), [wide(own[layout.keys[piece.tensor]]) for piece in layout.mine])
        problems = {}
        for member in sorted(self.members, key=lambda member: member.number):
            try:
                total.add(member.parts(self._source))
            except (CheckpointCorrupt, OSError) as error:
                problems[str(member.number)] = str(error)
        self._sum = None if problems else total
        return problems

    def _leave_out(self, problems: Mapping[str, str]) -> None:
        self._sum = None
        for member in [member for member in self.members if str(member.number) in problems]:
            problem = problems[str(member.number)]
            self._remove(member)
            _logger.warning(
                "a member of the average (metric %g) is left out, %d stay: %s",
                member.metric,
                len(self.members),
                problem,
            )
            if not self.members:
                raise CheckpointCorrupt(
                    f"no member of the average is left: {problem}", path=str(member.path), reason=problem
                )

    def _fill(self, targets: list[Tensor], group: list[Piece]) -> None:
        assert self._sum is not None
        self._sum.mean_into(targets, group, len(self.members))

    def _newest_others(self) -> Mapping[str, Any]:
        newest = max(self.members, key=lambda member: member.number)
        return newest.newest_others(self._other_keys()) if self._is_main else {}

    def _other_keys(self) -> list[str]:
        return [key for key in module_state(self.model) if key not in self._source.dtypes]


def check_modes(state: Mapping[str, Any], mode: Mode) -> None:
    """Raise InvalidInput when a state's best average has another idea of better than the run."""
    for key, average in state.items():
        if isinstance(average, BestAverage) and average.mode != mode:
            raise InvalidInput(
                f"state[{key!r}] is a BestAverage with mode={average.mode!r}, but the run's mode is {mode!r}; "
                f"give both the same"
            )
