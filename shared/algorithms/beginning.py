"""What a study begins with: its first model, and the layout of what travels.

PyTorch and MONAI take 300 MB of memory. A coordinator needs them for the first model only: a process of its own makes
it and ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

import medfl.shared.environment  # noqa: F401 - before torch
from medfl.shared.command import run
from medfl.shared.errors import ConfigError, MedFLError
from medfl.shared.files import write_whole
from medfl.shared.lifeline import with_lifeline
from medfl.shared.study import Study
from medfl.shared.weights import Flat, Layout, weights_digest


class Killed(MedFLError):
    """The process that makes the first model was killed: nothing is wrong with the study, and it may be tried again."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """The weights of a study's first model, which its seed or a file decides, and how they are laid out."""

    layout: Layout
    weights: Flat


def begin(study: Study, initial: bytes | None = None) -> Beginning:
    """Make the first model here, of ``initial`` weights where the study names some.

    Raises:
        ConfigError: the study's strategy or its initial weights do not fit its network.
    """
    from medfl.shared.algorithms.travel import build_study_network, layouts

    network = build_study_network(study, initial)
    layout, _ = layouts(study, network)
    return Beginning(layout, layout.flatten(network.state_dict()))


def begin_apart(study: Study, initial: bytes | None = None) -> Beginning:
    """As :func:`begin`, in a process of its own: this one never imports PyTorch.

    Raises:
        ConfigError: the study's strategy or initial weights do not fit its network. Killed: the process was.
            MedFLError: it failed.
    """
    return _parse(_made_apart(study, initial), study)


def begin_once(study: Study, path: Path, initial: bytes | None = None) -> Beginning:
    """As :func:`begin_apart`, kept at ``path``: a coordinator that is started again need not wait for PyTorch.

    Raises:
        ConfigError, Killed, MedFLError: as :func:`begin_apart`.
    """
    with suppress(OSError, SafetensorError, ValueError, KeyError):  # there is none yet, or it is damaged
        return _parse(path.read_bytes(), study)
    content = _made_apart(study, initial)
    with suppress(OSError):  # a full disk costs the next start some seconds
        write_whole(path, content)
    return _parse(content, study)


def _made_apart(study: Study, initial: bytes | None) -> bytes:
    canonical = study.canonical()
    command = with_lifeline("medfl.shared.algorithms.beginning", study.digest, str(len(canonical)))
    made = subprocess.run(
        command,
        input=canonical + (initial or b""),
        capture_output=True,
        check=False,
        start_new_session=True,  # Ctrl-C is for the coordinator
    )
    if made.returncode < 0:
        raise Killed(
            f"study {study.name}: the process that makes its first model was killed (signal {-made.returncode}): "
            "look whether memory ran out (dmesg)"
        )
    if made.returncode:
        said = made.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        kind = ConfigError if made.returncode == ConfigError.exit_status else MedFLError
        raise kind(f"study {study.name}: its first model cannot be built: {said[-1]}")
    return made.stdout


def _parse(content: bytes, study: Study) -> Beginning:
    """Raises ValueError, KeyError or SafetensorError where ``content`` is not the whole first model of ``study``."""
    from safetensors.numpy import load

    about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    weights: Flat = load(content)["weights"]
    if about["study"] != study.digest or about["weights"] != weights_digest(weights):
        raise ValueError("the first model is damaged, or another study's")
    layout = Layout(tuple((name, tuple(shape)) for name, shape in json.loads(about["layout"])))
    return Beginning(layout, weights)


def _in_bytes(made: Beginning, study: Study) -> bytes:
    from safetensors.numpy import save

    layout = json.dumps(made.layout.tensors)
    about = {"study": study.digest, "layout": layout, "weights": weights_digest(made.weights)}
    return save({"weights": made.weights}, about)


def main(digest: str, length: int) -> int:
    """The process: a study's canonical form of ``length`` bytes, and the file of its initial weights where it names
    one, come in on standard input; safetensors go out on standard output.
    """
    out, sys.stdout = sys.stdout.buffer, sys.stderr  # whatever a library prints is no part of the model
    study = Study.from_canonical(sys.stdin.buffer.read(length), digest=digest)
    out.write(_in_bytes(begin(study, sys.stdin.buffer.read() or None), study))
    out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(run("first model", lambda: main(sys.argv[1], int(sys.argv[2]))))
