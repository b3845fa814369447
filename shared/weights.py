"""A network's exchanged tensors as one flat float32 vector, and back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medfl.shared.errors import ProtocolError

if TYPE_CHECKING:
    import torch
    from torch import nn

Flat = NDArray[np.float32]
"""All exchanged tensors of a model, flattened in C order and concatenated in the order of its layout."""


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors that travel, in the order in which they stand in the flat vector.

    Integer buffers (such as batch norm's count of batches) have no meaningful mean and stay where they are.
    """

    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, network: nn.Module, *, keep: Callable[[str], bool] = lambda name: True) -> Layout:
        """Layout of the floating-point state of ``network`` for which ``keep(name)`` holds, in state-dict order."""
        return cls(
            tuple(
                (name, tuple(tensor.shape))
                for name, tensor in network.state_dict().items()
                if tensor.is_floating_point() and keep(name)
            )
        )

    @cached_property
    def length(self) -> int:
        """Number of values in the flat vector."""
        return sum(prod(shape) for _, shape in self.tensors)

    @property
    def digest(self) -> bytes:
        """SHA-256 over names and shapes: equal layouts only have equal digests."""
        return hashlib.sha256(repr(self.tensors).encode()).digest()

    def pick(self, state: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The tensors of ``state`` (a network's ``state_dict()``, which shares memory with it) in this order."""
        return [state[name] for name, _ in self.tensors]

    def flatten(self, state: Mapping[str, torch.Tensor]) -> Flat:
        """Copy the tensors of ``state`` into a new vector of float32 on the CPU."""
        return joined(self.pick(state))

    def load(self, vector: Flat, network: nn.Module) -> None:
        """Copy ``vector`` into ``network`` in place, on whatever device it is.

        Raises:
            ProtocolError: the vector has another length than this layout or holds a value that is not finite.
        """
        self.check(vector)
        spread(vector, self.pick(network.state_dict()))

    def check(self, vector: Flat) -> None:
        """Raise ProtocolError unless ``vector`` is float32, one-dimensional, of this length and finite."""
        if vector.dtype != np.float32 or vector.shape != (self.length,):
            raise ProtocolError(
                f"weights do not fit the study's network: expected float32[{self.length}], "
                f"got {vector.dtype}{list(vector.shape)}: check that both sides run the same release"
            )
        if not np.isfinite(vector).all():
            raise ProtocolError("weights hold values that are not finite: the sender's training diverged")


def joined(tensors: Sequence[torch.Tensor]) -> Flat:
    """Copy ``tensors`` one after the other into a new vector of float32 on the CPU."""
    import torch

    if not tensors:
        return np.zeros(0, np.float32)
    vector: Flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).to("cpu", torch.float32).numpy()
    return vector


def spread(vector: Flat, tensors: Sequence[torch.Tensor]) -> None:
    """Copy ``vector`` into ``tensors`` in place: the inverse of :func:`joined`."""
    import torch

    if not tensors:
        return
    source = torch.from_numpy(vector if vector.flags.writeable else vector.copy()).to(tensors[0].device)
    with torch.no_grad():
        start = 0
        for tensor in tensors:
            end = start + tensor.numel()
            tensor.copy_(source[start:end].view_as(tensor))
            start = end


def weights_digest(vector: Flat) -> str:
    """SHA-256 of the vector's bytes, hexadecimal: names one model among all rounds."""
    return hashlib.sha256(np.ascontiguousarray(vector).data).hexdigest()
