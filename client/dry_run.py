"""``medfl-client --dry-run``: one training step on the site's own data, and exactly what would leave, by name."""

from __future__ import annotations

from math import prod

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import torch
from rich.console import Console
from rich.table import Table

from medfl.client.config import SiteSettings
from medfl.client.data.splits import Split
from medfl.client.runtime import load_data, site_device
from medfl.client.training.plain import train_plain
from medfl.client.workbench import make_bench
from medfl.shared.loading import LoadingBar
from medfl.shared.messages import TrainReply
from medfl.shared.metrics import EXAMPLES, LOSS
from medfl.shared.privacy.settings import NoPrivacy
from medfl.shared.study import Study


def dry_run(settings: SiteSettings, study: Study, console: Console) -> None:
    """Train one step of ``study`` and print what a round would send. Nothing is charged, recorded or sent.

    Raises:
        ConfigError, DataError, PolicyRefusal, TrainingError: what would keep the site from training.
    """
    settings.policy.permit(study)  # whether it is approved does not matter: this is how one decides
    device = site_device(settings)
    with LoadingBar(console) as loading:
        data = load_data(settings, study, device, loading).splits[Split.TRAIN]
    # Whatever weights it begins with, a study's update has the same form.
    bench = make_bench(study.model_copy(update={"initial_weights": None}), device)
    weights = bench.layout.flatten(bench.network.state_dict())
    one_step = study.model_copy(update={"training": study.training.model_copy(update={"steps": 1, "epochs": None})})
    with console.status("training one step"):
        tally = train_plain(bench.network, data, one_step, generator=torch.Generator(device).manual_seed(0))
    update = bench.update_from(weights)
    console.print(
        f"study {study.name}: one step on {int(tally[EXAMPLES])} images, loss {tally[LOSS] / tally[EXAMPLES]:.4f}"
    )
    private = not isinstance(study.privacy, NoPrivacy)
    released = tally if settings.policy.release_site_metrics and not private else {}
    console.print(_tensors(study, bench.layout.tensors))
    secure = study.secure_aggregation.mode != "none"
    console.print("With it, in every round:")
    for line in _numbers(TrainReply(update, 1 if private else len(data), released), secure=secure, private=private):
        console.print(f"  {line}", highlight=False)
    console.print("Nothing was sent.")


def _tensors(study: Study, tensors: tuple[tuple[str, tuple[int, ...]], ...]) -> Table:
    """Every tensor of the update. They travel as one flat vector, so that names and shapes stay here."""
    width = 4 if study.secure_aggregation.mode == "none" else study.secure_aggregation.ring_bits / 8
    form = "float32, as it is" if study.secure_aggregation.mode == "none" else "masked integers"
    table = Table(title=f"The update: one vector, {form}", title_justify="left")
    for heading in ("tensor", "shape", "bytes"):
        table.add_column(heading, justify="left" if heading == "tensor" else "right", overflow="fold")
    for name, shape in tensors:
        table.add_row(name, "x".join(map(str, shape)) or "1", f"{prod(shape) * width:,.0f}")
    table.add_section()
    table.add_row("all", "", f"{sum(prod(shape) for _, shape in tensors) * width:,.0f}")
    return table


def _numbers(reply: TrainReply, *, secure: bool, private: bool) -> list[str]:
    hidden = " (masked: only the sum over all sites is seen)" if secure else ""
    lines = [f"weight {reply.examples}{hidden}" if not private else "weight 1, the same at every site"]
    if secure and not private:
        lines.append(f"sum of losses, number of images seen{hidden}")
    lines += [f"{name} {value:.6g}" for name, value in reply.tally.items() if not secure]
    lines.append("protocol version, outcome, a random number: under 200 bytes")
    return lines
