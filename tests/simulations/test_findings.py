"""What a report says of privacy: who has spent most, what that assumes, and what else leaves a site."""

import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from small_simulation import simulation
from tiny import masks_study

from medfl.client.releases import told
from medfl.simulations import load_simulation
from medfl.simulations.cli import print_table
from medfl.simulations.federation import permissive_policy
from medfl.simulations.findings import findings, promises
from medfl.simulations.report import table, write_report
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


NAN = math.nan


def with_a_site_without_lesions(folder: Path) -> Experiment:
    """At c nobody has a score; b can be scored with seed 0 only."""
    scores = {"fedavg": [(0.6, 0.3), (0.8, NAN)], "alone": [(0.5, 0.4), (0.5, NAN)], "best threshold": [(0, 0), (0, 1)]}
    kinds = {"fedavg": "federated", "alone": "baseline", "best threshold": "trivial"}
    cells = [
        Cell(method, seed, {"a": a, "b": b, "c": NAN}, kinds[method])
        for method, seeds in scores.items()
        for seed, (a, b) in enumerate(seeds)
    ]
    return Experiment("dice", tuple(cells), folder, 1.0)


def test_a_site_without_a_score_is_left_out_of_means_and_sentences(tmp_path: Path) -> None:
    found = with_a_site_without_lesions(tmp_path)
    assert found.mean("fedavg", "b") == 0.3
    assert found.interval("fedavg").mean == pytest.approx((0.45 + 0.8) / 2)  # a and b, then a alone
    assert found.interval("best threshold").mean == 0  # over the same: its 1 at b has nothing to stand beside
    assert math.isnan(found.mean("fedavg", "c"))
    said = findings(found)
    assert "a: the best federated method (fedavg) gains 0.200 over training alone." in said
    assert "No method has a score at b (seed 1), c: every mean is over what is left." in said
    worst = "No method is as good as training alone everywhere. fedavg comes nearest, and loses at b (by 0.100)."
    assert worst in said
    assert not any("nan" in sentence for sentence in said)


def test_a_method_that_fails_at_a_site_others_can_be_scored_at_has_no_mean(tmp_path: Path) -> None:
    cells = (
        Cell("fedavg", 0, {"a": 0.6, "b": NAN}),
        Cell("alone", 0, {"a": 0.5, "b": 0.4}, "baseline"),
        Cell("pooled", 0, {"a": 0.7, "b": 0.5}, "baseline"),
    )
    found = Experiment("dice", cells, tmp_path, 1.0)
    assert str(found.interval("fedavg")) == "no score"
    said = findings(found)
    assert said[0] == "Highest mean over sites: pooled (0.600)."
    assert "No method is as good as training alone everywhere." in said
    assert not any("nan" in sentence for sentence in said)


def test_results_are_json_and_no_score_is_null(tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    with_a_site_without_lesions(tmp_path).save(study="none")
    content = json.loads((tmp_path / "results.json").read_bytes(), parse_constant=refuse)
    assert content["mean"]["fedavg"] == {"a": pytest.approx(0.7), "b": 0.3, "c": None}

    cell = Cell("fedavg", 0, {"a": 0.5, "b": NAN}, curve=[(1, 0.25), (2, NAN)])
    cell.save(tmp_path / "cell.json", "digest")
    json.loads((tmp_path / "cell.json").read_bytes(), parse_constant=refuse)
    again = Cell.load(tmp_path / "cell.json", "digest")
    assert again is not None
    assert repr((again.scores, again.curve)) == repr((cell.scores, cell.curve))  # NaN is not equal to itself


def test_differences_say_how_many_sites_they_compare(tmp_path: Path) -> None:
    cells = (
        Cell("fedavg", 0, {"a": 0.7, "b": 0.3, "c": NAN, "d": 0.9}),
        Cell("alone", 0, {"a": 0.5, "b": 0.4, "c": NAN, "d": 0.2}, "baseline"),
    )
    found = Experiment("dice", cells, tmp_path, 1.0, held_out=("d",))
    line = table(found)[0]
    assert line.against[1] == "+0.050 (1/2 sites)"
    assert line.sites[2] == ("no score", False)


def test_a_report_with_a_site_without_a_score_is_drawn_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    cells = [Cell("alone", 0, {"a": 0.5, "c": NAN}, "baseline"), Cell("free", 0, {"a": 0.7, "c": NAN})]
    cells += [Cell(f"eps{e}", 0, {"a": e / 10, "c": NAN}, epsilon=e) for e in (1.0, 4.0)]
    page = write_report(
        Experiment("dice", tuple(cells), tmp_path, 1.0), load_simulation(simulation(tmp_path))
    ).read_text()
    assert "nan" not in page[page.index("What it says") :]
    assert [str(warning.message) for warning in recwarn] == []


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
