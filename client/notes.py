"""What a site notes of a round for itself: a row of the study's ``metrics.jsonl``, and a line of the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from medfl.client.records import Records
from medfl.client.training.charged import PrivateRound
from medfl.shared.messages import ModelRequest
from medfl.shared.metrics import EXAMPLES, headline, read
from medfl.shared.study import Study
from medfl.shared.weights import weights_digest

log = logging.getLogger("medfl.site")


def note_spent(records: Records, study: Study, request: ModelRequest, private: PrivateRound, seconds: float) -> None:
    """A training under differential privacy: what is spent by now, and no score."""
    spent, plan = private.spent, private.plan
    row = {
        "round": request.round,
        "set": "train",
        "model": weights_digest(request.weights),
        "seconds": round(seconds, 3),
        "epsilon": spent.study,
        "epsilon_total": spent.total,
        "delta": plan.delta,
        "noise_multiplier": plan.noise_multiplier,
        "unit": plan.unit.value,
    }
    records.note(study.digest, row)
    log.info(
        "round %d/%d trained: epsilon %.3f of %g spent on this study by each %s, %.3f in total, %.1f s",
        request.round,
        study.rounds.count,
        spent.study,
        plan.epsilon,
        plan.unit.value,
        spent.total,
        seconds,
    )


def note_scores(
    records: Records, study: Study, request: ModelRequest, what: str, tally: Mapping[str, float], seconds: float
) -> None:
    """A training in clear, or a scoring: the sums and the scores that they make. ``what``: train, validation."""
    scores = read(tally)
    row = {"round": request.round, "set": what, "seconds": round(seconds, 3), "scores": scores, "tally": dict(tally)}
    row["model"] = weights_digest(request.weights)  # that was received: one of those that others have too
    records.note(study.digest, row)
    if not log.isEnabledFor(logging.INFO):
        return
    score = headline(scores)
    log.info(
        "round %d/%d %s: %d images, loss %.4f%s, %.1f s",
        request.round,
        study.rounds.count,
        what,
        tally[EXAMPLES],
        scores.get("loss", float("nan")),
        f", {score[0]} {score[1]:.3f}" if score else "",
        seconds,
    )
