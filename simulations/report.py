"""An experiment as one self-contained HTML file: tables, learning curves, heat map, bytes, epsilon against score."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from medfl.shared.files import write_whole
from medfl.simulations import examples
from medfl.simulations.config import SimulationSettings
from medfl.simulations.findings import best_at, findings
from medfl.simulations.pictures import Pictures, pictures
from medfl.simulations.results import Cell, Experiment

_INK = "#333333"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's own font
    "svg.hashsalt": "medfl",  # the same figure gives the same bytes
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
}


@dataclass(frozen=True)
class Line:
    """One row of the report's table."""

    method: str
    kind: str
    mean: str
    sites: list[tuple[str, bool]]  # score, and whether it is the site's best
    against: list[str]
    megabytes: str
    seconds: str
    backdoor: str


def write_report(experiment: Experiment, settings: SimulationSettings, *, command: str = "") -> Path:
    """Write ``report.html`` into the experiment's folder; nothing in it is loaded from elsewhere."""
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files("medfl.simulations").joinpath("report.html").read_text("utf-8")
    )
    page = template.render(
        experiment=experiment,
        study=settings.study,
        settings=settings,
        command=command,
        seeds=sorted({cell.seed for cell in experiment.cells}),
        references=references(experiment),
        titles=[experiment.title(site) for site in experiment.sites],
        backdoors=any(cell.backdoor is not None for cell in experiment.cells),
        pictures=_pictures(experiment, settings),
        lines=table(experiment),
        findings=findings(experiment),
        curves=_curves(experiment),
        heat_map=_heat_map(experiment),
        costs=_costs(experiment),
        privacy=_privacy(experiment),
    )
    path = experiment.folder / "report.html"
    write_whole(path, page.encode(), mode=0o644)
    return path


def references(experiment: Experiment) -> list[str]:
    """What methods are compared with, where it was run: FedAvg, each site alone, pooled."""
    return [name for name in ("fedavg", "alone", "pooled") if name in experiment.methods]


def table(experiment: Experiment) -> list[Line]:
    """Every method with its scores and its differences from the references, the kinds in order."""
    best = {site: best_at(experiment, experiment.methods, site) for site in experiment.sites}
    lines = []
    for kind in ("federated", "baseline", "trivial"):
        for method in experiment.methods_of(kind):
            cells = [cell for cell in experiment.cells if cell.method == method]
            at = {site: experiment.interval(method, site) for site in experiment.sites}
            sites = [(str(found), method == best[site] and not np.isnan(found.mean)) for site, found in at.items()]
            against = ["" if r == method else _difference(experiment, method, r) for r in references(experiment)]
            sent = max(cell.received_bytes for cell in cells) / 1e6
            spent = sum(cell.seconds for cell in cells) / len(cells)
            planted = [cell.backdoor for cell in cells if cell.backdoor is not None]
            lines.append(
                Line(
                    method,
                    kind,
                    str(experiment.interval(method)),
                    sites,
                    against,
                    f"{sent:.1f}" if sent else "",
                    f"{spent:.0f}" if spent else "",
                    f"{100 * sum(planted) / len(planted):.0f} %" if planted else "",
                )
            )
    return lines


def _pictures(experiment: Experiment, settings: SimulationSettings) -> Pictures | None:
    """Of the first seed: the best and the reference methods before the others."""
    if not settings.examples:
        return None
    federated = sorted(
        experiment.methods_of("federated"), key=lambda m: -np.nan_to_num(experiment.interval(m).mean, nan=-1.0)
    )
    order = dict.fromkeys(("alone", "pooled", *federated, *experiment.methods))
    folder = experiment.folder / f"seed-{settings.seeds[0]}" / "examples"
    return pictures(examples.load(folder, list(order)), list(order), settings.study.data.classes)


def _difference(experiment: Experiment, method: str, reference: str) -> str:
    found = experiment.compare(method, reference)
    if not found.pairs:
        return ""
    p = "" if np.isnan(found.p) else f", p {found.p:.2g}"
    return f"{found.difference:+.3f} ({found.better}/{found.sites} sites{p})"


def _curves(experiment: Experiment) -> str:
    methods = [m for m in experiment.methods if any(cell.curve for cell in experiment.cells if cell.method == m)]
    timed = [m for m in methods if any(cell.times for cell in experiment.cells if cell.method == m)]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(1, 2 if timed else 1, 1)
        by_time = figure.add_subplot(1, 2, 2, sharey=axes) if timed else None
        for number, method in enumerate(methods):
            runs = [dict(cell.curve) for cell in experiment.cells if cell.method == method and cell.curve]
            rounds = sorted(set.intersection(*(set(run) for run in runs)))
            scores = np.array([[run[r] for r in rounds] for run in runs])
            colour = matplotlib.colormaps["tab10"](number % 10)
            style = ("-", "--", ":")[number // 10 % 3]
            axes.plot(rounds, scores.mean(0), style, color=colour, label=method, linewidth=1.6)
            if len(runs) > 1 and len(methods) <= 6:  # more bands than that hide each other
                axes.fill_between(rounds, scores.min(0), scores.max(0), color=colour, alpha=0.12, linewidth=0)
            if by_time is not None and method in timed:
                cell = next(c for c in experiment.cells if c.method == method and c.times)
                ends = [cell.times[number - 1] for number, _ in cell.curve]
                by_time.plot(ends, [score for _, score in cell.curve], style, color=colour, linewidth=1.6)
        axes.set_xlabel("round")
        axes.set_ylabel(f"{experiment.metric}, all sites together")
        if by_time is not None:
            by_time.set_xlabel("time, in training times of a usual site")
            by_time.tick_params(labelleft=False)
        figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside right center")

    return _svg(draw, 8.4, 3.8) if methods else ""


def _heat_map(experiment: Experiment) -> str:
    scores = np.array([[experiment.mean(method, site) for site in experiment.sites] for method in experiment.methods])

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.imshow(scores, cmap="viridis", aspect="auto")
        middle = (np.nanmin(scores) + np.nanmax(scores)) / 2
        for (row, column), score in np.ndenumerate(scores):
            shade, words = "white" if score <= middle else "black", "no score" if np.isnan(score) else f"{score:.3f}"
            axes.text(column, row, words, ha="center", va="center", color=shade, fontsize=9)
        axes.set_xticks(range(len(experiment.sites)), [experiment.title(site) for site in experiment.sites])
        axes.set_yticks(range(len(experiment.methods)), experiment.methods)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if len(experiment.sites) > 8:
            axes.tick_params("x", rotation=60)

    if len(experiment.sites) > 40 or np.isnan(scores).all():
        return ""
    width = min(12.0, 2.2 + 0.95 * len(experiment.sites))
    return _svg(draw, width, 0.6 + 0.32 * len(experiment.methods))


def _costs(experiment: Experiment) -> str:
    methods = [m for m in experiment.methods_of("federated")]
    sent = [max(c.received_bytes for c in experiment.cells if c.method == m) / 1e6 for m in methods]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        bars = axes.barh(methods, sent, color="#4c78a8", height=0.6)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
        axes.invert_yaxis()
        axes.set_xlabel("megabytes of updates received by the coordinator, all rounds")

    return _svg(draw, 7.0, 0.8 + 0.3 * len(methods)) if any(sent) else ""


def _privacy(experiment: Experiment) -> str:
    cells = [cell for cell in experiment.cells if cell.epsilon]
    if len({cell.epsilon for cell in cells}) < 2:
        return ""
    unprotected = {
        c.method for c in experiment.cells if not c.epsilon and (c.kind == "federated" or c.method == "unprotected")
    }

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        epsilons = sorted({cell.epsilon for cell in cells if cell.epsilon})
        for site in experiment.sites:
            means = [_mean_of([c for c in cells if c.epsilon == e], site) for e in epsilons]
            if np.isnan(means).all():
                continue
            (line,) = axes.plot(epsilons, means, "o-", label=site, linewidth=1.5)
            free = _mean_of([c for c in experiment.cells if not c.epsilon and c.method in unprotected], site)
            if not np.isnan(free):
                axes.axhline(free, color=line.get_color(), linestyle="--", linewidth=1)
        axes.set_xscale("log")
        axes.set_xticks(epsilons, [f"{e:g}" for e in epsilons])
        axes.set_xlabel("epsilon")
        axes.set_ylabel(experiment.metric)
        if unprotected:
            axes.plot([], [], "--", color=_INK, linewidth=1, label="without privacy")
        axes.legend(frameon=False)

    return _svg(draw, 6.4, 3.4)


def _mean_of(cells: Sequence[Cell], site: str) -> float:
    """Of the scores there; NaN where there is none."""
    known = [cell.scores[site] for cell in cells if not np.isnan(cell.scores[site])]
    return statistics.fmean(known) if known else np.nan


def _svg(draw: Callable[[Figure], Any], width: float, height: float) -> str:
    """The figure as SVG markup for a page, ``width`` by ``height`` in inches, without date and doctype."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})  # type: ignore[no-untyped-call]
    markup = out.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", markup[markup.index("<svg") :], flags=re.DOTALL)
