"""What a report says of privacy: who has spent most, what that assumes, and what else leaves a site."""

import json
from pathlib import Path

from rich.console import Console
from tiny import masks_study

from medfl.client.releases import told
from medfl.simulations.cli import print_table
from medfl.simulations.federation import permissive_policy
from medfl.simulations.findings import findings, promises
from medfl.simulations.results import Cell, Experiment

SCORES = {"north": 0.5, "south": 0.7}


def experiment(*cells: Cell) -> Experiment:
    return Experiment("dice", cells, Path("nowhere"), 1.0)


def test_spends_are_added_up_for_who_was_treated_everywhere() -> None:
    study = masks_study(privacy={"mode": "dp-sgd", "epsilon": 8, "delta": 1e-2})
    leaves = told(study, permissive_policy(study))
    private = Cell("fedavg", 0, SCORES, spent={"north": [1.0, 2.5], "south": [1.0, 3.25]}, leaves=leaves)
    spent, others = promises(experiment(private))
    assert "epsilon 3.25 is the most that a site has spent" in spent
    assert "no patient was treated at two of these sites" in spent
    assert "whoever was at all of them has spent 5.75" in spent
    assert "noised: update of the trained weights" in others
    assert "planned: buffers and weights that are not trained, weight in the mean" in others
    assert "training loss" not in others  # it stays at the site
    assert set(promises(experiment(private))) < set(findings(experiment(private)))


def test_nothing_is_promised_where_nothing_is_protected() -> None:
    assert promises(experiment(Cell("fedavg", 0, SCORES))) == []


def test_scores_that_rest_on_few_patients_are_said_to() -> None:
    few = Experiment("dice", (Cell("fedavg", 0, SCORES),), Path("nowhere"), 1.0, scored={"north": 2, "south": 5})
    said = "Few patients are held out at north (2): a difference there may be the difference of one patient."
    assert said in findings(few)
    assert not any("Few patients" in sentence for sentence in findings(experiment(Cell("fedavg", 0, SCORES))))


def test_what_is_left_out_is_said_and_kept_with_the_results(tmp_path: Path) -> None:
    left_out = {"south": {"opted out": 1, "no label": 3}}
    found = Experiment("dice", (Cell("fedavg", 0, SCORES),), tmp_path, 1.0, left_out=left_out)
    assert "Left out at south: no label (3), opted out (1)." in findings(found)
    found.save(study="none")
    assert json.loads((tmp_path / "results.json").read_bytes())["left_out"] == left_out


def test_a_table_of_many_sites_reads_at_80_columns(tmp_path: Path) -> None:
    sites = {f"hospital-{number}": 0.1 + number / 100 for number in range(9)}
    cells = (Cell("geometric-median", 0, sites), Cell("alone", 0, dict.fromkeys(sites, 0.5), "baseline"))
    console = Console(record=True, width=80)
    print_table(console, Experiment("dice", cells, tmp_path, 1.0, held_out=("hospital-8",)))
    said = console.export_text()
    assert "\u2026" not in said  # nothing is cut off
    for number in range(9):
        assert f"0.1{number}0" in said
        assert f"hospital-{number}" in said
    assert max(len(line) for line in said.splitlines()) <= 80
