"""What secure aggregation costs, beside what AES alone and what Flower's SecAgg+ functions cost in the same run.

    python tests/benchmarks/bench_secagg.py [--length 10000000] [--threads 1]

Seconds are processor seconds of one site, or of the coordinator. One site's full work is done on vectors of the full
length; the other sites only exchange keys, and the coordinator unmasks with the masks of a real sum of that many sites.
Flower's costs are those of its own functions for one mask, times the number of masks.
"""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "secagg"))

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    parameters_addition,
    parameters_mod,
    parameters_multiply,
)
from flwr.common.secure_aggregation.quantization import dequantize, quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from secagg_world import PHASES, Consortium, Stage

from medfl.server.secagg import masked_input, unmask
from medfl.server.secagg.advertise_keys import KeysAdvertised
from medfl.server.secagg.pending import PendingSum
from medfl.server.secagg.share_keys import KeysShared
from medfl.shared.secagg.encoding import Encoding, Segment, decode_mean
from medfl.shared.secagg.exchange import Phase
from medfl.shared.secagg.messages import Confirmation, ConfirmationList, Reveal, SurvivorList
from medfl.shared.secagg.prg import Mask, add_masks
from medfl.shared.secagg.rings import Ring
from medfl.shared.secagg.shamir import split

DROPPED = 0.2
FLOWER_RANGE = 1 << 32


def seconds(work: Callable[[], Any], repeat: int = 3) -> float:
    """Least processor time of ``repeat`` runs."""
    times = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def peak(work: Callable[[], Any]) -> int:
    """Most bytes allocated at once during ``work``."""
    tracemalloc.start()
    work()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def aes_seconds(size: int) -> float:
    """AES-256-CTR over ``size`` bytes in blocks that stay in the cache: what one mask costs at the very least."""
    zeros, target = bytes(1 << 18), bytearray(1 << 18)

    def run() -> None:
        stream = Cipher(algorithms.AES(bytes(32)), modes.CTR(bytes(16))).encryptor()
        for _ in range(size >> 18):
            stream.update_into(zeros, target)

    return seconds(run, 5)


@dataclass
class Flower:
    """Seconds of Flower's functions for one vector."""

    quantize: float
    mask: float
    decode: float

    @classmethod
    def measured(cls, length: int) -> Flower:
        """Quantize one update; make and add one mask; decode one sum."""
        update = [np.random.default_rng(0).normal(0, 0.01, length).astype(np.float32)]
        quantized = quantize(update, 8.0, 1 << 22)

        def start() -> None:
            factor_combine(1, quantize(parameters_multiply(update, 0.5), 8.0, 1 << 22))

        def mask() -> None:
            parameters_addition(quantized, pseudo_rand_gen(bytes(32), FLOWER_RANGE, [(length,)]))

        masked = pseudo_rand_gen(bytes(32), FLOWER_RANGE, [(length,)])

        def decode() -> None:
            dequantize(parameters_mod(masked, FLOWER_RANGE), 8.0, 1 << 22)

        return cls(seconds(start, 2), seconds(mask, 2), seconds(decode, 2))


def large(n: int, length: int, threads: int = 1) -> Consortium:
    """``n`` sites that all hold the same long update, so that it is in memory once."""
    world = Consortium(n, length=1, scalars=())
    world.encoding = Encoding(Ring.BITS_32, (Segment(length, 1.0),), world.encoding.reference)
    update = np.random.default_rng(0).normal(0, 0.01, length).astype(np.float32)
    world.hold(encoding=world.encoding, vector=update)
    world.sites[1]._threads = threads
    return world


def masked_sum(stage: Stage) -> masked_input.MaskedSum:
    """The coordinator's empty sum at the beginning of phase 3."""
    advertised = KeysAdvertised(stage.announcement, stage.adverts)
    return masked_input.MaskedSum(KeysShared(advertised, stage.shares), stage.world.encoding, stage.world.roster)


def small_phases(n: int) -> tuple[float, int, int]:
    """Seconds of one site among ``n`` in the four phases without a vector, and its control bytes up and down in all."""
    stage = Stage(Consortium(n, length=1), Phase.UNMASK)
    total = 0.0
    for steps, phase in enumerate(Phase):
        fresh = Stage(Consortium(n, length=1), PHASES[steps - 1] if steps else None)
        message = (
            fresh.announcement,
            getattr(fresh, "key_list", None),
            None,
            getattr(fresh, "survivor_list", None),
            getattr(fresh, "confirmation_list", None),
        )[steps]
        if message is not None:
            total += seconds(partial(fresh.world.ask, 1, phase, message), 1)
    sent = (stage.adverts[1], stage.shares[1], stage.headers[1], stage.confirmations[1], stage.reveals[1])
    got = (stage.announcement, stage.key_list, stage.deliveries[1], stage.survivor_list, stage.confirmation_list)
    return total, sum(len(m.to_bytes()) for m in sent), sum(len(m.to_bytes()) for m in got)


def client(n: int, length: int, threads: int) -> dict[str, float]:
    """One site's work among ``n``, what it sends and gets, and what its upload costs the coordinator."""
    small, up, down = small_phases(n)
    stage = Stage(large(n, length, threads), Phase.SHARE_KEYS)
    replies: list[Any] = []
    masking = seconds(lambda: replies.append(stage.world.ask(1, Phase.MASKED_INPUT, stage.deliveries[1])), 1)
    total = masked_sum(stage)
    return {
        "masking": masking,
        "total": small + masking,
        "wire": replies[0].vector.nbytes / length,
        "up": up,
        "down": down,
        "receiving": seconds(lambda: total.add(1, replies[0]), 1),
    }


def opened(n: int, dropped: int) -> tuple[float, list[Mask]]:
    """Seconds to open all secrets of a sum of ``n`` sites of which some dropped out, and the masks to take off."""
    world = Consortium(n, length=1)
    stage = Stage(world, Phase.MASKED_INPUT)
    survivors = world.ids[: n - dropped]
    told = SurvivorList(stage.context, survivors)
    confirmations = tuple(Confirmation.parse(world.ask(s, Phase.CONFIRM_SURVIVORS, told).control) for s in survivors)
    asked = ConfirmationList(stage.context, confirmations)
    reveals = [Reveal.parse(world.ask(s, Phase.UNMASK, asked).control) for s in survivors]
    pending = PendingSum(
        stage.announcement,
        world.encoding,
        stage.key_list,
        {site: shares.commitment for site, shares in stage.shares.items()},
        survivors,
        np.zeros(1, np.uint32),
        np.zeros(3, np.uint64),
    )
    return seconds(lambda: unmask.open_masks(pending, reveals), 1), unmask.open_masks(pending, reveals)


def server(masks: list[Mask], length: int, threads: int) -> float:
    """Take ``masks`` off a vector and decode it."""
    vector = np.zeros(length, np.uint32)
    encoding = Encoding(Ring.BITS_32, (Segment(length, 1.0),), 1)

    def run() -> None:
        add_masks(vector, masks, threads=threads)
        decode_mean(vector, encoding, weight=1.0, terms=256)  # so many that whatever the masks have left is in range

    return seconds(run, 1 if len(masks) > 100 else 2)


def memory(length: int) -> tuple[float, float]:
    """Extra memory as a share of the vector: of the site beside its masked one, of the coordinator beside its sum."""
    stage = Stage(large(4, length), Phase.SHARE_KEYS)
    replies: list[Any] = []
    size = 4 * length
    site = peak(lambda: replies.append(stage.world.ask(1, Phase.MASKED_INPUT, stage.deliveries[1]))) - size
    total = masked_sum(stage)

    def coordinator() -> None:
        total.add(1, replies[0])
        add_masks(total.vector, [Mask(bytes(32))] * 4)
        total.vector[:] = 0
        decode_mean(total.vector, stage.world.encoding, weight=1.0, terms=4)

    return site / size, peak(coordinator) / size


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=10_000_000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    length, threads = options.length, options.threads
    aes, flower = aes_seconds(4 * length), Flower.measured(length)
    print(f"{length:,} parameters, 32 bits, {threads} thread(s); AES-256-CTR over one vector: {aes * 1e3:.2f} ms")
    print(
        f"Flower, one vector: quantize {flower.quantize:.2f} s, one mask {flower.mask:.3f} s, "
        f"decode {flower.decode:.2f} s"
    )
    print(f"Shamir, one secret, 67 of 100: {seconds(lambda: split(bytes(32), 67, range(1, 101)), 20) * 1e3:.2f} ms\n")
    head = ("", "masks", "MedFL s", "AES alone s", "ratio", "Flower s", "faster")
    print("{:<44}{:>7}{:>10}{:>13}{:>8}{:>10}{:>8}".format(*head))

    def row(name: str, masks: int, ours: float, theirs: float) -> None:
        print(f"{name:<44}{masks:>7}{ours:>10.3f}{masks * aes:>13.3f}{ours / (masks * aes):>8.2f}"
              f"{theirs:>10.2f}{theirs / ours:>7.0f}x")  # fmt: skip

    notes = []
    for n in (16, 64):
        work = client(n, length, threads)
        row(f"site among {n}: all five phases", n, work["total"], flower.quantize + n * flower.mask)
        for dropped in (0, int(DROPPED * n)):
            opening, masks = opened(n, dropped)
            ours = opening + server(masks, length, threads)
            theirs = flower.decode + ((n - dropped) + dropped * (n - 1)) * flower.mask
            row(f"coordinator, {n} sites, {dropped} dropped: unmask", len(masks), ours, theirs)
        notes.append(
            f"{n} sites: {work['wire']:.2f} bytes a parameter; control per site {work['up']:,} bytes up, "
            f"{work['down']:,} down; masking alone {work['masking']:.3f} s; "
            f"coordinator per upload (verify and add) {work['receiving']:.3f} s"
        )
    site, coordinator = memory(length)
    print("\n" + "\n".join(notes))
    print(
        f"extra memory: site {site:.1%} of the vector beside the masked one, "
        f"coordinator {coordinator:.1%} beside the sum"
    )


if __name__ == "__main__":
    main()
