"""What the coordinator accepts of a site's replies, phase by phase."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from secagg_world import Consortium, Stage

from medfl.server.secagg import advertise_keys, confirm_survivors, share_keys, unmask
from medfl.server.secagg.masked_input import MaskedSum, requests
from medfl.server.secagg.pending import PendingSum
from medfl.shared.errors import ProtocolError
from medfl.shared.secagg.exchange import Phase, PhaseReply
from medfl.shared.secagg.messages import MaskedHeader, Reveal, ShareDelivery
from medfl.shared.secagg.shamir import SHARE_BYTES


class Coordinator(Stage):
    """The coordinator's states for a stage."""

    def __init__(self, last: Phase | None, n: int = 4) -> None:
        super().__init__(Consortium(n), last)
        self.roster = self.world.roster
        if last:
            self.advertised = advertise_keys.KeysAdvertised(self.announcement, self.adverts)
        if hasattr(self, "shares"):
            self.shared = share_keys.KeysShared(self.advertised, self.shares)
            self.total = MaskedSum(self.shared, self.world.encoding, self.roster)
        if hasattr(self, "masked"):
            for site, reply in self.masked.items():
                self.total.add(site, reply)
            self.pending = PendingSum(
                self.announcement,
                self.world.encoding,
                self.key_list,
                {site: message.commitment for site, message in self.shares.items()},
                self.total.close(),
                self.total.vector,
                self.total.scalars,
            )


def flip(data: bytes, at: int = -1) -> PhaseReply:
    changed = bytearray(data)
    changed[at] ^= 1
    return PhaseReply(bytes(changed))


def test_keys_count_only_from_the_site_itself_for_this_attempt_with_its_signature() -> None:
    stage = Coordinator(Phase.ADVERTISE_KEYS)
    good = PhaseReply(stage.adverts[1].to_bytes())
    assert advertise_keys.accept(stage.announcement, stage.roster, 1, good) == stage.adverts[1]
    with pytest.raises(ProtocolError, match="another's name"):
        advertise_keys.accept(stage.announcement, stage.roster, 2, good)
    with pytest.raises(ProtocolError, match="not signed"):
        advertise_keys.accept(stage.announcement, stage.roster, 1, flip(good.control))
    with pytest.raises(ProtocolError, match="not signed"):
        advertise_keys.accept(stage.world.announcement(attempt=1), stage.roster, 1, good)


def test_shares_count_only_when_signed_and_for_every_other_site() -> None:
    stage = Coordinator(Phase.SHARE_KEYS)
    good = PhaseReply(stage.shares[1].to_bytes())
    assert share_keys.accept(stage.advertised, stage.roster, 1, good) == stage.shares[1]
    with pytest.raises(ProtocolError, match="not signed"):
        share_keys.accept(stage.advertised, stage.roster, 1, flip(good.control, at=40))
    with pytest.raises(ProtocolError, match="another's name"):
        share_keys.accept(stage.advertised, stage.roster, 2, good)
    unsigned = replace(stage.shares[1], sealed=stage.shares[1].sealed[:-1])
    payload = unsigned.signed(stage.context, stage.key_list.digest)
    few = replace(unsigned, signature=stage.world.keys[1].sign(payload))
    with pytest.raises(ProtocolError, match="one share for each other site"):
        share_keys.accept(stage.advertised, stage.roster, 1, PhaseReply(few.to_bytes()))


def test_each_site_is_handed_what_the_others_sealed_for_it() -> None:
    stage = Coordinator(Phase.SHARE_KEYS)
    sent = requests(stage.shared)
    assert {s: ShareDelivery.parse(request.control) for s, request in sent.items()} == stage.deliveries


def masked(stage: Stage, site: int = 1) -> PhaseReply:
    return stage.world.ask(site, Phase.MASKED_INPUT, stage.deliveries[site])


def test_a_masked_vector_is_added_once_and_only_as_signed() -> None:
    stage = Coordinator(Phase.SHARE_KEYS)
    good = masked(stage)
    assert good.vector is not None
    assert good.scalars is not None
    changed = good.vector.copy()
    changed[3] ^= 1
    numbers = good.scalars.copy()
    numbers[0] += np.uint64(1)
    for bad in (
        replace(good, vector=changed),
        replace(good, scalars=numbers),
        replace(good, vector=None),
        replace(good, scalars=None),
        replace(good, vector=good.vector[:-1]),
        replace(good, vector=good.vector.astype(np.uint64)),
        replace(good, scalars=good.scalars[:-1]),
        replace(good, scalars=good.scalars.astype(np.float64)),
    ):
        with pytest.raises(ProtocolError):
            stage.total.add(1, bad)
    with pytest.raises(ProtocolError):
        stage.total.add(2, good)
    assert not stage.total.vector.any()  # nothing of these was added
    stage.total.add(1, good)
    with pytest.raises(ProtocolError, match="twice"):
        stage.total.add(1, good)
    assert np.array_equal(stage.total.vector, good.vector)


def test_arrays_of_a_wrong_kind_are_thrown_away_although_their_site_has_signed_them() -> None:
    stage = Coordinator(Phase.SHARE_KEYS)
    good, header = masked(stage), MaskedHeader(1, stage.shared.sharers)
    vector, scalars = good.vector, good.scalars
    assert vector is not None
    assert scalars is not None
    for one, two in (
        (vector[:-1], scalars),
        (np.append(vector, vector), scalars),
        (vector[:1], scalars),  # which numpy would add to every value
        (vector.astype(np.float32), scalars),
        (vector.reshape(1, -1), scalars),
        (vector, scalars[:-1]),
        (vector, scalars[:1]),
        (vector, scalars.view(np.int64)),
        (vector, scalars.view(np.float64)),
    ):
        digest = hashlib.sha256(np.ascontiguousarray(one).data).digest()
        payload = header.signed(stage.context, stage.key_list.digest, digest, two.tobytes())
        signed = replace(header, signature=stage.world.keys[1].sign(payload))
        with pytest.raises(ProtocolError, match="must be"):
            stage.total.add(1, PhaseReply(signed.to_bytes(), one, two))
    assert not stage.total.vector.any()
    stage.total.add(1, good)


def test_a_vector_masked_over_other_sharers_is_thrown_away() -> None:
    stage = Coordinator(Phase.SHARE_KEYS)
    without_four = ShareDelivery(stage.context, stage.deliveries[1].sealed[:-1])
    with pytest.raises(ProtocolError, match="other sharers"):
        stage.total.add(1, stage.world.ask(1, Phase.MASKED_INPUT, without_four))


def test_a_late_vector_is_thrown_away_unread() -> None:
    stage = Coordinator(Phase.SHARE_KEYS)
    for site in (1, 2, 3):
        stage.total.add(site, masked(stage, site))
    assert stage.total.close() == (1, 2, 3)
    before = stage.total.vector.copy()
    with pytest.raises(ProtocolError, match="thrown away"):
        stage.total.add(4, masked(stage, 4))
    assert np.array_equal(stage.total.vector, before)


def test_a_confirmation_counts_only_from_the_site_itself_for_these_survivors() -> None:
    stage = Coordinator(Phase.CONFIRM_SURVIVORS)
    good = PhaseReply(stage.confirmations[1].to_bytes())
    assert confirm_survivors.accept(stage.pending, stage.roster, 1, good) == stage.confirmations[1]
    with pytest.raises(ProtocolError, match="another's name"):
        confirm_survivors.accept(stage.pending, stage.roster, 2, good)
    with pytest.raises(ProtocolError, match="not signed"):
        confirm_survivors.accept(replace(stage.pending, survivors=(1, 2, 3)), stage.roster, 1, good)


def test_a_reveal_counts_only_when_signed_with_one_share_for_each_sharer() -> None:
    stage = Coordinator(Phase.UNMASK)
    good = PhaseReply(stage.reveals[1].to_bytes())
    assert unmask.accept(stage.pending, stage.roster, 1, good) == stage.reveals[1]
    with pytest.raises(ProtocolError, match="not signed"):
        unmask.accept(stage.pending, stage.roster, 1, flip(good.control, at=10))
    with pytest.raises(ProtocolError, match="another's name"):
        unmask.accept(stage.pending, stage.roster, 2, good)
    few = replace(stage.reveals[1], shares=stage.reveals[1].shares[1:])
    signature = stage.world.keys[1].sign(few.signed(stage.context, stage.key_list.digest))
    with pytest.raises(ProtocolError, match="one share for each sharer"):
        unmask.accept(stage.pending, stage.roster, 1, PhaseReply(replace(few, signature=signature).to_bytes()))


def with_bad_share(reveal: Reveal, owner: int) -> Reveal:
    return replace(reveal, shares=tuple((s, bytes(SHARE_BYTES) if s == owner else share) for s, share in reveal.shares))


def test_a_site_whose_shares_do_not_open_its_commitment_is_named() -> None:
    stage = Coordinator(Phase.UNMASK)
    wrong = [with_bad_share(reveal, 3) for reveal in stage.reveals.values()]
    with pytest.raises(unmask.BadDealer) as bad:
        unmask.open_masks(stage.pending, wrong)
    assert bad.value.sites == (3,)


def test_a_drop_out_whose_shares_do_not_open_its_key_is_named() -> None:
    stage = Coordinator(Phase.UNMASK)
    dropped = replace(stage.pending, survivors=(1, 2, 3))  # its seed share is no share of its key
    with pytest.raises(unmask.BadDealer) as bad:
        unmask.open_masks(dropped, list(stage.reveals.values()))
    assert bad.value.sites == (4,)


@pytest.mark.parametrize("liar", [1, 2, 3, 4])
def test_one_wrong_share_does_no_harm_where_one_more_than_the_threshold_answered(liar: int) -> None:
    stage = Coordinator(Phase.UNMASK)  # 4 sites, threshold 3
    reveals = [with_bad_share(r, 2) if site == liar else r for site, r in stage.reveals.items()]
    assert unmask.open_masks(stage.pending, reveals) == unmask.open_masks(stage.pending, stage.reveals.values())
