"""``medfl-sim``: a researcher's simulation from one file, and the demonstration."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from medfl.shared.command import parser, run

if TYPE_CHECKING:
    from medfl.shared.loading import LoadingBar
    from medfl.simulations.config import SimulationSettings
    from medfl.simulations.results import Experiment

_EXAMPLES = """\
  medfl-sim --config configs/lungs.yaml       two hospitals' chest X-rays
  medfl-sim --config configs/vessels_strategies.yaml --sweep
                                              compare algorithms; started again,
                                              it goes on where it stopped
  medfl-sim --config my.yaml --check          look at the file and the data only
  medfl-sim demo --output runs/demo           four hospitals as real processes
  medfl-sim audit --help                      attack private training"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``medfl-sim``; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["audit"]:
        from medfl.simulations.audit_command import main as audit

        return audit(given[1:])
    options = _parse(given)
    return run("medfl-sim", lambda: _work(options))


def _parse(arguments: list[str]) -> argparse.Namespace:
    made = parser("medfl-sim", "Simulate a federation of hospitals on this machine.", _EXAMPLES)
    made.add_argument("command", nargs="?", choices=("demo",), help="demo: a whole federation on phantom patients")
    made.add_argument("--config", type=Path, metavar="FILE", help="the simulation, as YAML")
    made.add_argument("--check", action="store_true", help="validate the file and read the data, train nothing")
    made.add_argument("--sweep", action="store_true", help="run every variant of the file; goes on where it stopped")
    made.add_argument("--output", type=Path, metavar="FOLDER", help="where results go (default: as the file says)")
    options = made.parse_args(arguments)
    if options.command is None and options.config is None:
        made.error("give --config FILE, or the command demo")
    return options


def _work(options: argparse.Namespace) -> int:
    from medfl.shared.logs import set_up_logs

    set_up_logs(json_lines=options.log_format == "json", verbose=options.verbose, file=options.log_file)
    if options.command == "demo":
        from medfl.simulations.demo import run_demo

        return run_demo(options.output or Path("runs/demo"))
    return _simulate(options)


def _simulate(options: argparse.Namespace) -> int:
    import medfl.shared.environment  # noqa: F401 - before flwr

    # isort: split
    from rich.console import Console

    from medfl.server.console import reporter_for
    from medfl.shared.config import load_settings
    from medfl.shared.loading import LoadingBar
    from medfl.shared.logs import quiet_libraries
    from medfl.simulations.config import SimulationSettings
    from medfl.simulations.experiment import SweepFailed, run_experiment

    settings = load_settings(options.config, SimulationSettings)
    if options.output is not None:
        settings = settings.model_copy(update={"output": options.output})
    console = Console()
    with LoadingBar(console) as loading:
        if options.check:
            quiet_libraries()
            for line in _checked(settings, loading):
                console.print(line, highlight=False, markup=False)
            console.print("all is well: run the same command without --check")
            return 0
        failed: SweepFailed | None = None
        try:
            experiment = run_experiment(settings, sweep=options.sweep, reporter=reporter_for(console), loading=loading)
        except SweepFailed as error:
            failed, experiment = error, error.experiment
        except KeyboardInterrupt:
            if options.sweep:
                console.print("\nwhat is finished stays: the same command goes on from there")
            raise
    print_table(console, experiment)
    print_spend(console, experiment)
    print_attacks(console, experiment)
    _write_report(console, experiment, settings, options)
    console.print(f"{experiment.seconds:.0f} s; everything is in {experiment.folder}")
    if failed is not None:
        raise failed
    return 0


def _checked(settings: SimulationSettings, loading: LoadingBar) -> Iterator[str]:
    """What the data of each seed are, in lines; of seeds after the first, what is another.

    Raises:
        DataError: they cannot be used, and for which seed.
    """
    from medfl.shared.errors import DataError
    from medfl.simulations.experiment import choose_device
    from medfl.simulations.sites import load_sites, patients_of

    device, first = choose_device(settings.device), dict[str, str]()
    for seed in settings.seeds:
        left_out: list[str] = []
        study = settings.study.model_copy(update={"seed": seed})
        try:
            sites = load_sites(settings, study, device, loading, tell=left_out.append)
        except DataError as error:
            raise DataError(f"seed {seed}: {error}") from None
        counts = {
            name: f"{patients_of(data)} patients, {sum(len(part) for part in data.splits.values())} images"
            for name, data in sites.items()
        }
        if not first:
            yield from (f"{name}: {said}" for name, said in counts.items())
        yield from (
            f"{name} with seed {seed}: {said}" for name, said in counts.items() if first.get(name, said) != said
        )
        yield from left_out
        first = first or counts


def _write_report(
    console: Console, experiment: Experiment, settings: SimulationSettings, options: argparse.Namespace
) -> None:
    try:
        from medfl.simulations.report import write_report
    except ImportError:
        console.print("no report.html: pip install 'medfl[report]' brings what it needs")
        return
    command = f"medfl-sim --config {options.config}{' --sweep' if options.sweep else ''}"
    write_report(experiment, settings, command=command)


def print_spend(console: Console, experiment: Experiment) -> None:
    """Privacy spent at each site after each round, for every private method, and what that assumes."""
    from medfl.simulations.findings import promises

    for cell in experiment.cells:
        for site, spent in cell.spent.items():
            rounds = " ".join(f"{epsilon:.2f}" for epsilon in spent)
            console.print(f"epsilon at {site} by round ({cell.method}, seed {cell.seed}): {rounds}", highlight=False)
    for promise in promises(experiment):
        console.print(promise, highlight=False)


def print_attacks(console: Console, experiment: Experiment) -> None:
    """How often a planted mark works, and what a curious coordinator finds, for every method that was run with one."""
    from medfl.simulations.findings import reconstructions

    for sentence in reconstructions(experiment):
        console.print(sentence, highlight=False)
    for cell in experiment.cells:
        if cell.backdoor is not None:
            console.print(
                f"the backdoor works on {100 * cell.backdoor:.0f} % of what it is meant for "
                f"({cell.method}, seed {cell.seed})",
                highlight=False,
            )


def print_table(console: Console, experiment: Experiment) -> None:
    """Mean over seeds of methods by sites, with intervals; best of each site in bold; as many tables as it takes."""
    from rich.table import Table

    best = {  # -1 stands for no score, which is NaN
        site: max(value if (value := experiment.mean(method, site)) >= 0 else -1 for method in experiment.methods)
        for site in experiment.sites
    }
    for number, sites in enumerate(_beside_each_other(experiment, console.width)):
        title = f"{experiment.metric} on held-out patients" if number == 0 else None
        table = Table(title=title, title_justify="left")
        table.add_column("method", no_wrap=True)
        for site in sites:
            table.add_column(experiment.title(site), justify="right", no_wrap=True)
        for method in experiment.methods:
            cells = []
            for site in sites:
                text = str(experiment.interval(method, site))
                cells.append(f"[bold]{text}[/bold]" if experiment.mean(method, site) == best[site] else text)
            table.add_row(method, *cells)
        console.print(table)


def _beside_each_other(experiment: Experiment, width: int) -> list[list[str]]:
    """The sites, in groups that fit beside the methods' names; one site at least in each."""
    groups: list[list[str]] = [[]]
    names = free = width - max(len(name) for name in ("method", *experiment.methods)) - 4
    for site in experiment.sites:
        scores = (str(experiment.interval(method, site)) for method in experiment.methods)
        takes = 3 + max(len(text) for text in (experiment.title(site), *scores))
        if groups[-1] and takes > free:
            groups.append([])
            free = names
        groups[-1].append(site)
        free -= takes
    return groups


if TYPE_CHECKING:
    from rich.console import Console

if __name__ == "__main__":
    sys.exit(main())
