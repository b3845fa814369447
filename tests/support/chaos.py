"""A federation of real processes, any of which is killed every few seconds; what must hold then, counted.

python tests/support/chaos.py --kills 200 --seed 1

Processes are forked from one that has imported everything, so that a restart costs tenths of a second and not five
seconds of processor time; what runs in them are the commands, with a memory, files and connections of their own.

Each campaign runs three studies, one after the other, among five sites: SCAFFOLD in clear that needs all five, whose
model must be that of an undisturbed federation to the last bit; FedAvg under secure aggregation with three of five,
whose Dice must be near the undisturbed one; DP-SGD with three of five, whose ledgers are counted. A campaign is
undisturbed once, and disturbed until the kills are done. After each kill, the dead process's files are looked at.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command import Command
from consortium import write_pictures
from safetensors.numpy import load_file
from tiny import masks_study

from medfl.client.config import load_site
from medfl.client.decisions import Approval, approve
from medfl.server.checkpoint import _read as read_checkpoint
from medfl.shared.audit_log import audit_file
from medfl.shared.chain import inspect
from medfl.shared.files import write_whole
from medfl.shared.secagg.announcement import Purpose
from medfl.shared.study import Study
from medfl.simulations.demo import Places, read_rows, run_folder, set_up

SITES = ("first", "second", "third", "fourth", "fifth")
COORDINATOR = "coordinator"
TRAINED = re.compile(r"round \d+/\d+ trained: epsilon")
EXACT, SECURE, PRIVATE = "exact", "secure", "private"

_PICTURES = {"preprocessing": {"normalise": "scale_255", "size": [16, 16]}}
_MSA1 = {"mode": "msa1", "phase_deadline_s": 20}


def studies(rounds: int, *, seed: int = 0) -> dict[str, Study]:
    """The three studies of a campaign."""
    some = {"count": rounds, "minimum_sites": 3, "deadline_s": 60, "patience_s": 600, "evaluate_every": rounds}
    training = {"learning_rate": 0.02, "epochs": 2}
    return {
        EXACT: masks_study(
            name=EXACT,
            data=_PICTURES,
            training={"optimizer": "sgd", "learning_rate": 0.3, "epochs": 2},
            rounds={**some, "minimum_sites": 5},
            strategy={"name": "scaffold"},
            seed=seed,
        ),
        SECURE: masks_study(
            name=SECURE, data=_PICTURES, training=training, rounds=some, secure_aggregation=_MSA1, seed=seed
        ),
        PRIVATE: masks_study(
            name=PRIVATE,
            data=_PICTURES,
            training=training,
            rounds=some,
            privacy={"mode": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "steps_per_round": 2, "spare_rounds": 8 * rounds},
            seed=seed,
        ),
    }


def prepare(root: Path, chosen: list[Study]) -> Places:
    """Five hospitals and a coordinator that runs ``chosen`` one after the other."""
    places = Places(root, names=SITES)
    for number, name in enumerate(SITES):
        write_pictures(places.hospital(name) / "pictures", patients=16, size=16, seed=number)
    set_up(places, chosen[0])
    names = []
    for study in chosen:
        names.append(f"{study.name}.json")
        (places.coordinator / names[-1]).write_bytes(study.canonical())
    replace(places.coordinator / "consortium.yaml", r"studies: \[study.json\]", f"studies: [{', '.join(names)}]")
    for number, name in enumerate(SITES):
        secret = places.hospital(name) / "state" / "secret"  # it decides who is held out
        secret.unlink(missing_ok=True)
        write_whole(secret, bytes([number]) * 32)
        site = places.hospital(name) / "site.yaml"
        replace(site, r"  source: dicom\n  folder: dicom\n", "  source: table\n  file: pictures/sites.csv\n")
        ceilings = "  max_epsilon_per_study: 8\n  max_epsilon_total: 100\n  max_delta: 0.001\n"
        replace(site, r"policy:\n", f"policy:\n{ceilings}")
        replace(
            site,
            r"  require_secure_aggregation: \w+\n",
            "  require_secure_aggregation: false\n  release_site_metrics: true\n",
        )
        replace(site, r"min_patients: 8", "min_patients: 4")
        for study in chosen[1:]:
            approve(load_site(site), Approval(study=study.digest, by="the chaos suite"))
    return places


def replace(path: Path, pattern: str, by: str) -> None:
    """Replace the one match of ``pattern`` in a text file."""
    text, count = re.subn(pattern, lambda match: by, path.read_text("utf-8"))
    assert count == 1, f"{pattern} is {count} times in {path.name}"
    path.write_text(text, "utf-8")


@dataclass
class Found:
    """What campaigns showed. ``wrong`` must stay empty."""

    kills: Counter[str] = field(default_factory=Counter)
    looks: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    dice: dict[str, list[float]] = field(default_factory=dict)  # by study, of the disturbed campaigns
    undisturbed: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def check(self, holds: bool, otherwise: str) -> None:
        """Note what is wrong unless it ``holds``."""
        if not holds:
            self.wrong.append(otherwise)


class Disturbed:
    """One campaign: starts all, kills, looks at what the dead left, starts again, until the studies have ended."""

    def __init__(self, places: Places, chosen: list[Study], draw: random.Random, found: Found) -> None:
        self._places, self._chosen, self._draw, self._found = places, chosen, draw, found
        self._ledgers: dict[str, list[dict[str, Any]]] = {}
        self._audits: dict[str, int] = {}
        self._consumed: dict[str, dict[tuple[Any, ...], tuple[Any, ...]]] = {}
        self._deck: list[str] = []

    def run(self, *, pause_s: tuple[float, float] | None, limit_s: float, kills: int = 10**9) -> None:
        """Run the campaign; ``pause_s`` bounds the time between kills (None: nobody is killed), ``kills`` ends them."""
        began = time.monotonic()
        running = {name: self._start(name) for name in (*SITES, COORDINATOR)}
        try:
            next_kill = float("inf")
            while running[COORDINATOR].poll() is None:
                time.sleep(0.05)
                for name in SITES:
                    if (code := running[name].poll()) is not None:
                        self._found.wrong.append(f"{name} ended by itself with status {code}")
                        return
                if time.monotonic() > began + limit_s:
                    self._found.wrong.append(f"the studies did not end within {limit_s:.0f} s")
                    return
                if pause_s and next_kill == float("inf") and self._somebody_was_asked():
                    next_kill = time.monotonic() + self._draw.uniform(*pause_s)
                if pause_s and time.monotonic() > next_kill and kills > 0:
                    kills -= 1
                    self._kill(self._victim(), running)
                    next_kill = time.monotonic() + self._draw.uniform(*pause_s)
        finally:
            codes = {name: command.stop() for name, command in running.items()}
        self._found.check(not any(codes.values()), f"they ended with {codes}")
        self._found.seconds.append(time.monotonic() - began)
        self._look_at_coordinator()
        for name in SITES:
            self._look_at_site(name)
            self._count(name)
        self._look_at_logs()

    def _start(self, name: str) -> Command:
        if name == COORDINATOR:
            home = self._places.coordinator
            arguments = ["--config", str(home / "consortium.yaml")]
            return Command("medfl.server.cli", arguments, home / "medfl-server.log")
        home = self._places.hospital(name)
        return Command("medfl.client.cli", ["--site", str(home / "site.yaml")], home / "medfl-client.log")

    def _somebody_was_asked(self) -> bool:
        return any(audit_file(self._places.hospital(name) / "state").exists() for name in SITES)

    def _victim(self) -> str:
        """Drawn at random, and each once before any is drawn again."""
        if not self._deck:
            self._deck = self._draw.sample((*SITES, COORDINATOR), len(SITES) + 1)
        return self._deck.pop()

    def _kill(self, victim: str, running: dict[str, Command]) -> None:
        if running[victim].kill() == 0:  # it had just ended
            return
        self._found.kills[victim] += 1
        self._look_at_coordinator() if victim == COORDINATOR else self._look_at_site(victim)
        running[victim] = self._start(victim)

    def _look_at_coordinator(self) -> None:
        for study in self._chosen:
            for path in run_folder(self._places, study).glob("checkpoint*.safetensors"):
                self._found.looks["checkpoints"] += 1
                self._found.check(read_checkpoint(path) is not None, f"{path.name} of {study.name} is damaged")

    def _look_at_site(self, name: str) -> None:
        state = self._places.hospital(name) / "state"
        if (state / "ledger.jsonl").exists():
            self._found.looks["ledgers"] += 1
            seen = inspect(state / "ledger.jsonl")
            before = self._ledgers.get(name, [])
            self._found.check(seen.problem is None, f"ledger of {name}: {seen.problem}")
            self._found.check(seen.rows[: len(before)] == before, f"ledger of {name} lost rows")
            self._ledgers[name] = seen.rows
        if audit_file(state).exists():
            self._found.looks["audit logs"] += 1
            audit = inspect(audit_file(state))
            self._found.check(audit.problem is None, f"audit log of {name}: {audit.problem}")
            self._found.check(len(audit.rows) >= self._audits.get(name, 0), f"audit log of {name} lost rows")
            self._audits[name] = len(audit.rows)
        self._look_at_journal(name, state / "secagg" / "journal.sqlite")

    def _look_at_journal(self, name: str, path: Path) -> None:
        """A round, once consumed, stays so; one model is summed once, or again as the very same sum."""
        if not path.exists() or path.stat().st_size == 0:
            return
        self._found.looks["journals"] += 1
        with tempfile.TemporaryDirectory() as folder:  # a copy: opening it would finish or undo what was begun
            for part in path.parent.glob(f"{path.name}*"):
                shutil.copy(part, folder)
            database = sqlite3.connect(Path(folder) / path.name)
            try:
                columns = "study, purpose, round, model, survivors, contribution"
                rows = database.execute(f"SELECT {columns} FROM consumed").fetchall()
            except sqlite3.OperationalError:  # killed while it was first made
                rows = []
            finally:
                database.close()
        now = {tuple(row[:3]): tuple(row[3:]) for row in rows}
        before = self._consumed.get(name, {})
        self._found.check(before.items() <= now.items(), f"journal of {name} lost or changed a consumed round")
        self._consumed[name] = now
        sums: dict[tuple[Any, ...], set[tuple[Any, ...]]] = {}
        for row in rows:
            # Patient numbers are summed again when a site joins, from the very same contributions.
            same = row[5:] if row[1] == Purpose.SETUP else row[4:]
            sums.setdefault((row[0], row[1], row[3]), set()).add(tuple(same))
        self._found.check(all(len(same) == 1 for same in sums.values()), f"journal of {name}: a model summed twice")

    def _count(self, name: str) -> None:
        """Each training that was told of is charged, each update that was released has its own charge before it."""
        home = self._places.hospital(name)
        rows = self._ledgers.get(name, [])
        charged: set[str] = set()
        for row in rows:
            if row["kind"] == "charge":
                charged.add(row["training"])
            if row["kind"] == "release":
                self._found.looks["releases"] += 1
                self._found.check(row["training"] in charged, f"ledger of {name}: released before it was charged")
        trained = len(TRAINED.findall((home / "medfl-client.log").read_text("utf-8", "replace")))
        self._found.looks["private trainings"] += trained
        self._found.check(len(charged) >= trained, f"ledger of {name}: {trained} trainings, {len(charged)} charges")
        prices = [row["epsilon_total"] for row in inspect(audit_file(home / "state")).rows if row.get("epsilon_total")]
        self._found.check(prices == sorted(prices), f"audit log of {name}: what was spent became less")

    def _look_at_logs(self) -> None:
        for path in [self._places.coordinator / "medfl-server.log", *self._places.root.rglob("medfl-client.log")]:
            text = path.read_text("utf-8", "replace")
            self._found.check("damaged" not in text, f"{path.name} tells of damage")
            self._found.check("Traceback" not in text and "unexpected" not in text, f"{path.name} tells of a bug")


def ended(places: Places, study: Study, found: Found) -> None:
    """Whether ``study`` ended as it should."""
    path = run_folder(places, study) / "ending.json"
    found.check(path.exists(), f"study {study.name} has no ending")
    if path.exists():
        ending = json.loads(path.read_text())
        found.check((ending["ending"], ending["round"]) == ("done", study.rounds.count), f"{study.name}: {ending}")


def last_dice(places: Places, study: Study) -> float:
    """Of the last round, summed over all sites' held-out patients."""
    return float(read_rows(run_folder(places, study) / "metrics.jsonl")[-1]["scores"]["dice"])


def same_bits(one: Path, other: Path) -> bool:
    """Whether two model files hold the same tensors to the last bit."""
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def campaigns(
    root: Path, *, kills: int, at_once: int, seed: int, rounds: int, pause_s: tuple[float, float], limit_s: float
) -> Found:
    """Campaigns until there were ``kills`` kills, ``at_once`` in each, all with the same studies, after one without."""
    found, draw = Found(), random.Random(seed)
    chosen = studies(rounds)
    quiet = prepare(root / "undisturbed", list(chosen.values()))
    Disturbed(quiet, list(chosen.values()), draw, found).run(pause_s=None, limit_s=limit_s)
    for study in chosen.values():
        ended(quiet, study, found)
    found.undisturbed = {name: last_dice(quiet, chosen[name]) for name in (EXACT, SECURE)}
    print(f"undisturbed: {found.seconds[-1]:.0f} s, Dice {found.undisturbed}", flush=True)
    number = 0
    while sum(found.kills.values()) < kills:
        number += 1
        places = prepare(root / f"campaign-{number}", list(chosen.values()))
        before = sum(found.kills.values())
        Disturbed(places, list(chosen.values()), draw, found).run(
            pause_s=pause_s, limit_s=limit_s, kills=min(at_once, kills - before)
        )
        for study in chosen.values():
            ended(places, study, found)
        model = "model.safetensors"
        found.check(
            same_bits(run_folder(places, chosen[EXACT]) / model, run_folder(quiet, chosen[EXACT]) / model),
            "the model that all five sites make is another than the undisturbed one",
        )
        for name in (EXACT, SECURE):
            found.dice.setdefault(name, []).append(last_dice(places, chosen[name]))
        print(
            f"campaign {number}: {sum(found.kills.values()) - before} kills in {found.seconds[-1]:.0f} s, "
            f"Dice {', '.join(f'{name} {values[-1]:.3f}' for name, values in found.dice.items())}",
            flush=True,
        )
    for name, values in found.dice.items():
        spread = max(abs(value - found.undisturbed[name]) for value in values)
        found.check(spread < 0.05, f"{name}: Dice is {spread:.3f} from the undisturbed one")
    return found


def main() -> int:
    """Print what was found; the exit status says whether all of it held."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--kills", type=int, default=200)
    made.add_argument("--at-once", type=int, default=50, help="kills in one campaign; then its studies may end")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--rounds", type=int, default=8)
    made.add_argument(
        "--pause", type=float, nargs=2, default=(2.0, 8.0), metavar=("FROM", "TO"), help="s between kills"
    )
    made.add_argument("--limit", type=float, default=900.0, help="s for one campaign")
    made.add_argument("--keep", type=Path, help="a new folder for everything that is written; absent: a temporary one")
    options = made.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = campaigns(
            options.keep or Path(temporary),
            kills=options.kills,
            at_once=options.at_once,
            seed=options.seed,
            rounds=options.rounds,
            pause_s=tuple(options.pause),
            limit_s=options.limit,
        )
    print(f"{sum(found.kills.values())} kills: {dict(found.kills)}")
    print(f"looked at: {dict(found.looks)}")
    for name, values in found.dice.items():
        print(
            f"{name}: Dice undisturbed {found.undisturbed[name]:.4f}, disturbed {statistics.mean(values):.4f} {values}"
        )
    print("\n".join(f"WRONG: {line}" for line in found.wrong) or "nothing was wrong")
    return 1 if found.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
