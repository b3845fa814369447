"""What a site holds for secure sums: update, weight and scores, each encoded as its study says and not otherwise."""

from __future__ import annotations

from medfl.client.secagg.contribution import NO_MODEL, Contribution
from medfl.client.secagg.session import SecureSite
from medfl.shared.errors import ProtocolError
from medfl.shared.messages import ModelRequest, Ready, TrainReply
from medfl.shared.metrics import EXAMPLES, LOSS, Tally, tally_names
from medfl.shared.privacy.noised_encoding import check_room_for_noise
from medfl.shared.privacy.settings import ClientLevel, NoPrivacy
from medfl.shared.secagg.announcement import Purpose
from medfl.shared.secagg.encoding import Encoding
from medfl.shared.secagg.reasons import Reason
from medfl.shared.secagg.rings import Ring
from medfl.shared.study import Study
from medfl.shared.weights import weights_digest


class Participant:
    """Turns results into contributions. An encoding is the coordinator's, but what it may name is the study's."""

    def __init__(self, secure: SecureSite) -> None:
        self.secure = secure

    @property
    def smallest_sum(self) -> int:
        """Fewer sites than this are never in an opened sum with this one."""
        return self.secure.smallest_sum

    def hold_weight(self, study: Study, encoding: bytes, weight: int) -> Ready:
        """Hold ``weight`` for the sum of all weights. Raises ProtocolError for an encoding that asks for more."""
        parsed = Encoding.parse(encoding)
        _expect(parsed, ring=Ring.BITS_32, names=(), length=0)
        self._hold(study, Purpose.SETUP, NO_MODEL, parsed, weight=weight)
        return Ready()

    def hold_update(self, study: Study, request: ModelRequest, result: TrainReply, *, sent: str) -> Ready:
        """Hold a trained update. Under differential privacy every site weighs the same; nothing exact goes along.

        ``sent``: digest of the whole vector that was received, of which ``request`` holds the model.
        """
        parsed = Encoding.parse(request.encoding)
        plain = isinstance(study.privacy, NoPrivacy)
        names = (LOSS, EXAMPLES) if plain else tuple(result.tally)
        _expect(parsed, ring=Ring(study.secure_aggregation.ring_bits), names=names, length=result.update.size)
        if isinstance(study.privacy, ClientLevel):
            check_room_for_noise(parsed, study.privacy)
        self.secure.hold(
            Contribution(
                study=bytes.fromhex(study.digest),
                purpose=Purpose.TRAIN,
                model=bytes.fromhex(weights_digest(request.weights)),
                encoding=parsed,
                weight=result.examples if plain else 1,
                vector=result.update,
                scalars={name: result.tally[name] for name in names},
                training=request.round,
                sent=bytes.fromhex(sent),
            )
        )
        return Ready()

    def hold_scores(self, study: Study, request: ModelRequest, tally: Tally) -> Ready:
        """Hold the sums of scores on held-out patients."""
        parsed = Encoding.parse(request.encoding)
        names = tally_names(study.scoring, study.data.classes)
        _expect(parsed, ring=Ring.BITS_32, names=names, length=0)
        model = bytes.fromhex(weights_digest(request.weights))
        scores = {name: tally[name] for name in names}
        self._hold(study, Purpose.EVALUATE, model, parsed, weight=1, scalars=scores, training=request.round)
        return Ready()

    def _hold(
        self,
        study: Study,
        purpose: Purpose,
        model: bytes,
        encoding: Encoding,
        *,
        weight: int,
        scalars: Tally | None = None,
        training: int = 0,
    ) -> None:
        digest = bytes.fromhex(study.digest)
        self.secure.hold(
            Contribution(digest, purpose, model, encoding, weight, scalars=scalars or {}, training=training, sent=model)
        )


def _expect(encoding: Encoding, *, ring: Ring, names: tuple[str, ...], length: int) -> None:
    if (encoding.ring, encoding.scalars, encoding.length) != (ring, names, length):
        raise ProtocolError(
            "the coordinator asks for another encoding than the study's: both must run releases that agree on it",
            reason=Reason.OTHER_ENCODING,
        )
