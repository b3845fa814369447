"""The weights a study begins with instead of its seed's: a safetensors file, named in the study by its SHA-256."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from medfl.shared.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

MAX_BYTES = 2**31

_shelf: dict[str, bytes] = {}


def digest_of(content: bytes) -> str:
    """What a study's ``initial_weights`` names the file by; ``sha256sum FILE`` prints the same."""
    return hashlib.sha256(content).hexdigest()


def read_initial(path: Path) -> bytes:
    """The file's bytes. Raises ConfigError when it cannot be read or is larger than 2 GiB."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: initial weights have at most {MAX_BYTES >> 30} GiB")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): it should hold initial weights") from None


def shelve(content: bytes) -> None:
    """Let every network that this process builds find ``content`` by its digest: for simulations, which build many."""
    _shelf[digest_of(content)] = content


def shelved(digest: str | None) -> bytes | None:
    """The file of that digest on this process's shelf, if any."""
    return None if digest is None else _shelf.get(digest)


def load_initial(content: bytes, network: nn.Module) -> None:
    """Copy the tensors of a safetensors file into ``network``, in place. Nothing in such a file is executed.

    Raises:
        ConfigError: it is no safetensors file, its tensors are not the network's by name and shape, or a value is not
            finite.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        given = load(content)
    except (SafetensorError, ValueError, KeyError):
        raise ConfigError("the initial weights are no safetensors file: save them with safetensors.torch") from None
    wanted = {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    if lacking := sorted(set(wanted) - set(given)):
        raise ConfigError(f"the initial weights lack {len(lacking)} tensors of the study's network, first {lacking[0]}")
    for name, tensor in wanted.items():
        if given[name].shape != tensor.shape:
            raise ConfigError(
                f"the initial weights hold {name} as {list(given[name].shape)}, and the study's network has "
                f"{list(tensor.shape)}: choose the network and the classes that they were trained with"
            )
        if not bool(torch.isfinite(given[name]).all()):
            raise ConfigError(f"the initial weights hold values that are not finite, in {name}")
    if unknown := sorted(set(given) - set(network.state_dict())):
        raise ConfigError(f"the initial weights hold {unknown[0]}, which the study's network has not")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(given[name])  # from any precision
