from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from pydantic import ValidationError
from tiny import classes_study, masks_study, site_data

from medfl.shared.errors import ConfigError
from medfl.shared.study import Study
from medfl.simulations.config import Attacker, Failures, SimulationSettings
from medfl.simulations.federation import Federation, federate
from medfl.simulations.ray_engine import federate_on_ray

SGD = {"optimizer": "sgd", "learning_rate": 0.05, "batch_size": 3, "steps": 4}
STUDY = classes_study(
    training=SGD,
    rounds={"count": 4, "minimum_sites": 2, "sites_per_round": 3, "patience_s": 250, "deadline_s": 250},
    strategy={"name": "scaffold"},
)
MISBEHAVIOUR: dict[str, Any] = {
    "failures": Failures(drop_out=0.2),
    "attackers": {"site-3": Attacker(kind="noise", scale=0.5)},
}


def told(done: Federation) -> dict[str, Any]:
    """All that must be the same on both engines."""
    return {
        "ending": done.result.ending.value,
        "weights": done.result.weights.tobytes().hex(),
        "kept": {name: own.tobytes().hex() for name, own in done.kept.items()},
        "rows": {
            name: [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
            for name, rows in done.site_rows.items()
        },
        "outcomes": [dict(sorted(report.outcomes.items())) for report in done.rounds],
    }


def sites() -> dict[str, Any]:
    return {f"site-{number}": site_data(STUDY, seed=number) for number in range(4)}


@pytest.mark.timeout(290)
def test_scaffold_with_failures_and_an_attacker_has_the_same_bits_in_two_processes_of_ray() -> None:
    # A program of its own, because Ray leaves much behind. What SCAFFOLD keeps at a site moves with the site.
    program = Path(__file__).resolve()
    paths = os.pathsep.join([str(program.parent), str(Path(tiny.__file__).parent)])
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    here = told(federate(STUDY, sites(), **MISBEHAVIOUR))
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(json.dumps(here))
    assert any(word == "no answer" for outcomes in here["outcomes"] for word in outcomes.values()), here["outcomes"]


@pytest.mark.parametrize(
    ("study", "what"),
    [
        (classes_study(secure_aggregation={"mode": "msa1"}), "secure_aggregation"),
        (masks_study(privacy={"mode": "dp-sgd", "epsilon": 8, "delta": 1e-5, "clip_norm": 1.0}), "privacy"),
    ],
    ids=["secure aggregation", "differential privacy"],
)
def test_what_must_stay_on_this_machine_is_refused_with_the_way_out(study: Study, what: str) -> None:
    with pytest.raises(ConfigError, match=f"{what} needs what stays on this machine: use engine: local"):
        federate_on_ray(study, {})


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"workers": 2}, "leave workers and at_once out"),
        ({"failures": {"deadline": 2.0}}, "no simulated clock"),
        ({"variants": {"safe": {"secure_aggregation": {"mode": "msa1"}}}}, "safe: engine: ray: secure_aggregation"),
    ],
    ids=["workers", "a deadline", "a variant"],
)
def test_a_file_that_asks_ray_for_what_it_cannot_is_refused(settings: dict[str, Any], what: str) -> None:
    names = [f"site-{number}" for number in range(4)]
    drawn = [{"name": name, "phantom": {"scanner": 0, "patients": 5}} for name in names]
    whole = {"study": STUDY.model_dump(mode="json"), "sites": drawn, "engine": "ray"}
    SimulationSettings.model_validate(whole)
    if "variants" in settings:
        whole["study"]["strategy"] = {"name": "fedavg"}
    with pytest.raises(ValidationError, match=what):
        SimulationSettings.model_validate(whole | settings)


if __name__ == "__main__":
    print(json.dumps(told(federate_on_ray(STUDY, sites(), cpus=2, **MISBEHAVIOUR))))
