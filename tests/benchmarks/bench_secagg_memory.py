"""The coordinator's memory during one secure sum over real TLS: 16 sites, 30 million parameters.

    python tests/benchmarks/bench_secagg_memory.py [--sites 16] [--length 30000000]

The coordinator is this process: Flower's link state, the store on disk, the sum. The sites share another process, and
one update. Printed is the largest resident size, of the whole process, and before the sum began.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import numpy as np
from certified import create_consortium
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, Message

from medfl.server.admission import Admission
from medfl.server.fleet_tls import TlsFiles
from medfl.server.link import Link, LinkSettings
from medfl.server.pace import Pace
from medfl.server.reporter import Silent
from medfl.server.secagg.outcome import SumPlan
from medfl.server.secagg.round import SecureRound
from medfl.server.secagg.store import FolderStore
from medfl.server.secure_exchange import GridExchange
from medfl.server.stage import Stages
from medfl.shared.certificates import SiteFiles
from medfl.shared.config import load_settings
from medfl.shared.messages import SecureReply, SecureRequest
from medfl.shared.secagg.announcement import Purpose
from medfl.shared.secagg.encoding import Encoding, Segment
from medfl.shared.secagg.exchange import PhaseRequest
from medfl.shared.secagg.rings import Ring
from medfl.shared.secagg.roster import Member, Roster, make_roster
from medfl.shared.study import Study

STUDY, MODEL = b"\x11" * 32, b"\x22" * 32
DEADLINE_S = 900.0


def key_of(site: int) -> Ed25519PrivateKey:
    """The same in both processes."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"site {site}".encode()).digest())


def roster_of(sites: int) -> Roster:
    """Sites 1 to ``sites``."""
    members = [Member(n, f"site-{n}", key_of(n).public_key().public_bytes_raw()) for n in range(1, sites + 1)]
    return make_roster("memory", 1, members, minimum_cohort=3)


def encoding_of(sites: int, length: int) -> Encoding:
    """Every site weighs 1."""
    return Encoding(Ring.BITS_32, (Segment(length, 1.0),), sites)


def resident_mib(which: str) -> float:
    """``VmRSS`` now, ``VmHWM`` at its largest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def sites_process(folder: Path, port: int, sites: int, length: int) -> None:
    """All sites, one thread each. Only here is anything of a site imported."""
    from federation import fleet_settings, let_in

    from medfl.client.node import Node, NodeSettings
    from medfl.client.secagg.contribution import Contribution
    from medfl.client.secagg.enrolment import Enrolment
    from medfl.client.secagg.journal import Journal
    from medfl.client.secagg.session import SecureSite

    update = np.random.default_rng(0).normal(0, 0.01, length).astype(np.float32)
    encoding, roster = encoding_of(sites, length), roster_of(sites)
    threads = []
    for number in range(1, sites + 1):
        site = SecureSite(Enrolment(number, key_of(number), roster), Journal(None), threads=1)
        site.hold(Contribution(STUDY, Purpose.TRAIN, MODEL, encoding, 1, update))

        def app(message: Message, context: Context, site: SecureSite = site) -> Message:
            request = SecureRequest.parse(message.content)
            reply = site.answer(request.phase, PhaseRequest(request.control))
            return Message(SecureReply(reply).record(), reply_to=message)

        name = f"site-{number}"
        settings = fleet_settings(SiteFiles(folder / "sites" / name), port)
        node = Node(NodeSettings(settings, folder / "state" / name), app, let_in)
        threads.append(threading.Thread(target=node.run, daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=16)
    parser.add_argument("--length", type=int, default=30_000_000)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.port is not None:
        sites_process(options.folder, options.port, options.sites, options.length)
        return
    names = [f"site-{number}" for number in range(1, options.sites + 1)]
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        consortium = create_consortium(folder, sites=names, hosts=["127.0.0.1"])
        files = TlsFiles(consortium.authority, consortium.certificate, consortium.key)
        settings = LinkSettings("127.0.0.1", 0, files, folder / "server")
        with Link(settings) as link:
            ids = link.enrol({name: consortium.sites[name].node_public_key.read_text() for name in names})
            command = [sys.executable, __file__, "--port", str(link.port), "--folder", str(folder)]
            command += ["--sites", str(options.sites), "--length", str(options.length)]
            child = subprocess.Popen(command)
            try:
                while link.online() != set(ids.values()):
                    time.sleep(0.2)
                measure(link, ids, folder, options.sites, options.length)
            finally:
                child.kill()
                child.wait()


def measure(link: Link, ids: dict[str, int], folder: Path, sites: int, length: int) -> None:
    """One sum."""
    study = load_settings(Path(__file__).parents[2] / "configs" / "study.yaml", Study)
    with link.run(None, name="memory", digest=STUDY.hex()) as run:

        class Everybody:
            def online(self) -> dict[int, str]:
                return {node: name for name, node in ids.items()}

            def enrolled(self) -> list[str]:
                return list(ids)

        stages = Stages(run.grid, Silent(), Event(), Pace(DEADLINE_S), Admission(study, run.grid, Everybody()))
        nodes = {number: ids[f"site-{number}"] for number in range(1, sites + 1)}
        plan = SumPlan(STUDY, Purpose.TRAIN, tuple(nodes), encoding_of(sites, length), MODEL)
        before, began = resident_mib("VmRSS"), time.monotonic()
        total = SecureRound(plan, roster=roster_of(sites), store=FolderStore(folder / "secagg")).run(
            GridExchange(stages, nodes, deadline_s=DEADLINE_S, vector_bytes=4 * length)
        )
        assert len(total.survivors) == sites
        print(
            f"{sites} sites, {length:,} parameters ({4 * length / 2**20:.0f} MiB a vector): largest resident size "
            f"{resident_mib('VmHWM'):.0f} MiB, {before:.0f} MiB before; {time.monotonic() - began:.0f} s"
        )


if __name__ == "__main__":
    main()
