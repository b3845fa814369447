"""What a site's patients have spent, over its whole life, on its own disk: charged before anything is released.

One ledger for one cohort of patients. Studies, rounds, retrainings and restarts on the same patients all add up here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from medfl.shared.chain import Chain, Head, Role, Row, inspect
from medfl.shared.errors import BUDGET, PolicyRefusal
from medfl.shared.files import write_whole
from medfl.shared.privacy.accounting import SampledGaussian, check_delta, epsilon
from medfl.shared.privacy.plan import TrainingPlan
from medfl.shared.privacy.settings import Unit

MAX_ROUNDS_AHEAD = 10_000
LEDGER = Role(
    "ledger",
    "Nothing is trained until the newest backup of this folder is restored; keep the damaged files, they are evidence",
)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The site's policy: no message can raise these. ``delta`` is the one the total is reported at."""

    epsilon_per_study: float
    epsilon_total: float
    delta: float = 1e-5
    unit: Unit = Unit.PATIENT  # image: images of one patient are not added up


@dataclass(frozen=True, slots=True)
class Charge:
    """One training, or another noised release, before it happens.

    ``training`` names the attempt. The same charge again is free (the update is sent again); a new attempt at the
    same round is a new training and costs again, because its noise is new.
    """

    study: str  # digest
    round: int
    training: str
    cost: SampledGaussian
    what: str = "training"


@dataclass(frozen=True, slots=True)
class Spent:
    """Epsilon so far: of the study at the study's delta, of the cohort in total at the policy's."""

    study: float
    total: float


@dataclass(frozen=True, slots=True)
class Remaining:
    """What a site may read before it trains."""

    spent: Spent
    after_next_round: Spent
    rounds_left: int  # of this cost, until the study's or the site's ceiling; counted up to MAX_ROUNDS_AHEAD


def spent_in_total(path: Path, ceilings: Ceilings) -> float:
    """Epsilon over all studies by the ledger at ``path``, read beside the node that may be writing it.

    Raises:
        PolicyRefusal: reasons ``ledger damaged``, and ``ledger unwritable`` when it cannot be read.
    """
    try:
        found = inspect(path)
    except OSError as error:
        raise PolicyRefusal(
            f"{path} cannot be read ({error.strerror}): repair its permissions", reason="ledger unwritable"
        ) from None
    if found.problem is not None:
        raise PolicyRefusal(f"{path}: {found.problem}. {LEDGER.when_damaged}", reason="ledger damaged")
    costs = [SampledGaussian(**row["cost"]) for row in found.rows if row["kind"] == "charge"]
    return epsilon([_counted(cost, ceilings) for cost in costs], ceilings.delta)


class Ledger:
    """An open ledger. One process at a time; use it as a context manager, or call :meth:`close`.

    Raises:
        PolicyRefusal: reasons ``ledger busy``, ``ledger damaged``, ``ledger unwritable`` (see
            :class:`~medfl.shared.chain.Chain`), ``ledger restored`` when rows that the coordinator has
            countersigned are missing, and ``cohort`` when the file is another cohort's.
    """

    def __init__(
        self,
        path: Path,
        *,
        cohort: str,
        ceilings: Ceilings,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._ceilings, self._countersigned = ceilings, path.with_name(path.name + ".countersigned")
        self._path = path
        self._chain = Chain(path, LEDGER, clock=clock)
        try:
            if not self._chain.rows and not self._countersigned.exists():
                self._chain.append({"kind": "open", "cohort": cohort})
            self._check_countersigned()
            if self._chain.rows[0].get("cohort") != cohort:
                raise PolicyRefusal(
                    f"{path} belongs to another cohort of patients: give each cohort its own file", reason="cohort"
                )
            # Rounds of a study's plan that are known to fit below every ceiling: checking one takes 0.1 s, and a
            # charge should not. Only ever counted down; any charge that is not the plan's empties it.
            self._fitting: dict[str, int] = {}
        except BaseException:
            self._chain.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes use the file. Everything is durable already."""
        self._chain.close()

    @property
    def head(self) -> Head:
        """What the coordinator is asked to countersign after each round."""
        return self._chain.head

    def fix_plan(self, study: str, plan: TrainingPlan, *, patients: int) -> TrainingPlan:
        """Record ``plan`` for ``study``, or return the one recorded earlier: rate and noise never change in a study.

        Raises:
            ConfigError: the plan's delta is above one over ``patients``.
        """
        check_delta(plan.delta, patients)
        known = self.plan(study)
        if known is None:
            self._chain.append({"kind": "plan", "study": study, "plan": asdict(plan)})
        return known or plan

    def plan(self, study: str) -> TrainingPlan | None:
        """The plan recorded for ``study``, if any."""
        for row in self._rows("plan", study):
            return TrainingPlan(**{**row["plan"], "unit": Unit(row["plan"]["unit"])})
        return None

    def charge(self, charge: Charge) -> None:
        """Write ``charge`` durably. Only when this has returned may the training's result leave.

        Raises:
            PolicyRefusal: reason ``budget`` when a ceiling would be passed, ``plan`` when the study has no plan
                here or the cost is not its plan's, ``charge changed`` when this training was charged otherwise.
        """
        plan = self.plan(charge.study)
        if plan is None or (charge.what == "training" and charge.cost != plan.round_cost):
            raise PolicyRefusal(
                "the round's noise, sampling rate or steps are not those fixed for this study: submit a new study",
                reason="plan",
            )
        known = self._known(charge)
        if known is not None:
            if known["cost"] == asdict(charge.cost):
                return
            raise PolicyRefusal(
                f"training {charge.training} was charged with another cost: give each training its own name",
                reason="charge changed",
            )
        as_planned = charge.cost == plan.round_cost
        if not (as_planned and self._fitting.get(charge.study)) and not self._allows(charge.study, plan, charge.cost):
            after = self._spent_with(charge.study, plan, charge.cost)
            raise PolicyRefusal(
                f"round {charge.round} would bring this study to epsilon {after.study:.3f} (its promise "
                f"{plan.epsilon:g}, policy.max_epsilon_per_study {self._ceilings.epsilon_per_study:g}) and this site "
                f"to {after.total:.3f} (policy.max_epsilon_total {self._ceilings.epsilon_total:g}): "
                "this site takes no further part",
                reason=BUDGET,
            )
        self._chain.append({"kind": "charge", **asdict(charge)})
        left = self._fitting.get(charge.study, 0) - 1 if as_planned else 0
        self._fitting = {charge.study: max(left, 0)}

    def release(self, study: str, training: str, *, digest: str, size: int) -> None:
        """Record durably that the update ``digest`` of ``size`` bytes leaves under ``training``'s charge.

        The same update may leave any number of times; another one needs another training, charged for itself.

        Raises:
            PolicyRefusal: reason ``not charged``, or ``already released`` for another update.
        """
        if not any(row["training"] == training for row in self._rows("charge", study)):
            raise PolicyRefusal("an update may not leave before its training is charged", reason="not charged")
        for row in self._rows("release", study):
            if row["training"] == training:
                if row["digest"] == digest:
                    return
                raise PolicyRefusal(
                    f"training {training} has released another update already: train and charge anew",
                    reason="already released",
                )
        self._chain.append({"kind": "release", "study": study, "training": training, "digest": digest, "bytes": size})

    def permit_release(self, study: str) -> None:
        """Check once more, before an update of ``study`` leaves, that what was spent is below today's ceilings.

        Raises:
            PolicyRefusal: reason ``budget``: a ceiling was lowered since the training was charged.
        """
        plan = self.plan(study)
        spent = self._spent_with(study, plan)
        limit = (
            self._ceilings.epsilon_per_study if plan is None else min(plan.epsilon, self._ceilings.epsilon_per_study)
        )
        if spent.study > limit or spent.total > self._ceilings.epsilon_total:
            raise PolicyRefusal(
                f"epsilon {spent.study:.3f} is spent on this study and {spent.total:.3f} at this site, above "
                f"policy.max_epsilon_per_study {self._ceilings.epsilon_per_study:g} or policy.max_epsilon_total "
                f"{self._ceilings.epsilon_total:g}: the update stays here",
                reason=BUDGET,
            )

    def spent(self, study: str) -> Spent:
        """Epsilon spent so far; 0 of a study that has not trained."""
        return self._spent_with(study, self.plan(study))

    def remaining(self, study: str) -> Remaining:
        """What the study's next round costs, and how many rounds are left below every ceiling. Takes about a second.

        Raises:
            PolicyRefusal: reason ``plan`` when no plan is fixed for the study.
        """
        plan = self.plan(study)
        if plan is None:
            raise PolicyRefusal("no plan is fixed for this study yet", reason="plan")
        fits, beyond = 0, 1
        while beyond <= MAX_ROUNDS_AHEAD and self._allows(study, plan, plan.round_cost.times(beyond)):
            fits, beyond = beyond, beyond * 2
        while beyond - fits > 1 and fits < MAX_ROUNDS_AHEAD:
            middle = (fits + beyond) // 2
            if self._allows(study, plan, plan.round_cost.times(middle)):
                fits = middle
            else:
                beyond = middle
        self._fitting[study] = fits
        after = self._spent_with(study, plan, plan.round_cost)
        return Remaining(self.spent(study), after, min(fits, MAX_ROUNDS_AHEAD))

    def countersign(self, head: Head) -> None:
        """Keep ``head``, the coordinator's record of this ledger, after checking that this ledger still holds it.

        Raises:
            PolicyRefusal: reason ``ledger restored``: rows the coordinator has seen are not here.
        """
        self._refuse_unless_held(head)
        kept = self._kept_head()
        if kept is None or kept.rows < head.rows:
            write_whole(self._countersigned, json.dumps(asdict(head)).encode())

    def history(self, study: str | None = None) -> list[SampledGaussian]:
        """Everything charged, as the accountant takes it."""
        return [self._counted(SampledGaussian(**row["cost"])) for row in self._rows("charge", study)]

    def _rows(self, kind: str, study: str | None) -> Iterator[Row]:
        return (row for row in self._chain.rows if row["kind"] == kind and study in (None, row["study"]))

    def _known(self, charge: Charge) -> Row | None:
        for row in self._rows("charge", charge.study):
            if (row["round"], row["training"], row["what"]) == (charge.round, charge.training, charge.what):
                return row
        return None

    def _counted(self, cost: SampledGaussian) -> SampledGaussian:
        return _counted(cost, self._ceilings)

    def _spent_with(self, study: str, plan: TrainingPlan | None, *more: SampledGaussian) -> Spent:
        extra = [self._counted(cost) for cost in more]
        delta = self._ceilings.delta if plan is None else plan.delta
        return Spent(
            epsilon([*self.history(study), *extra], delta), epsilon([*self.history(), *extra], self._ceilings.delta)
        )

    def _allows(self, study: str, plan: TrainingPlan, cost: SampledGaussian) -> bool:
        after = self._spent_with(study, plan, cost)
        limit = min(plan.epsilon, self._ceilings.epsilon_per_study)
        return after.study <= limit and after.total <= self._ceilings.epsilon_total

    def _check_countersigned(self) -> None:
        kept = self._kept_head()
        if kept is not None:
            self._refuse_unless_held(kept)

    def _kept_head(self) -> Head | None:
        try:
            kept = json.loads(self._countersigned.read_bytes())
            return Head(int(kept["rows"]), str(kept["digest"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise PolicyRefusal(
                f"{self._countersigned} is not as it was written: restore the newest backup of this folder",
                reason="ledger damaged",
            ) from None

    def _refuse_unless_held(self, head: Head) -> None:
        if not self._chain.holds(head):
            raise PolicyRefusal(
                f"{self._path} lacks row {head.rows} as the coordinator has countersigned it: it is older than what "
                "was spent (a restored backup?). Restore the newest copy; training with this one would spend twice",
                reason="ledger restored",
            )


def _counted(cost: SampledGaussian, ceilings: Ceilings) -> SampledGaussian:
    return cost if ceilings.unit is Unit.PATIENT else replace(cost, images_per_patient=1)
