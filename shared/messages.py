"""Everything that crosses between coordinator and site: what is asked, what is answered, and how both are read.

Whatever does not parse is a ProtocolError, never a KeyError.
"""

from __future__ import annotations

from medfl.shared.fields import (
    PROTOCOL,
    TENSOR,
    Log,
    outcome,
    pack,
    protocol_of,
    unpack,
)
from medfl.shared.replies import (
    NO_INITIAL_WEIGHTS,
    UNKNOWN_STUDY,
    EvaluateReply,
    Failure,
    HeadsReply,
    OfferAccepted,
    Ready,
    SecureReply,
    TrainReply,
)
from medfl.shared.requests import (
    HeadsRequest,
    Kind,
    ModelRequest,
    SecureRequest,
    StudyOffer,
    WeightRequest,
    request_config,
    tell_counted,
    written_as,
)

__all__ = [
    "NO_INITIAL_WEIGHTS",
    "PROTOCOL",
    "TENSOR",
    "UNKNOWN_STUDY",
    "EvaluateReply",
    "Failure",
    "HeadsReply",
    "HeadsRequest",
    "Kind",
    "Log",
    "ModelRequest",
    "OfferAccepted",
    "Ready",
    "SecureReply",
    "SecureRequest",
    "StudyOffer",
    "TrainReply",
    "WeightRequest",
    "outcome",
    "pack",
    "protocol_of",
    "request_config",
    "tell_counted",
    "unpack",
    "written_as",
]
