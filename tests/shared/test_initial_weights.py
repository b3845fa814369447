"""Initial weights are the file that the study names, fit its network, and nothing else gets in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from tiny import classes_study
from torch import Tensor, nn

from medfl.shared.algorithms.travel import build_study_network
from medfl.shared.errors import ConfigError
from medfl.shared.initial_weights import digest_of, load_initial, read_initial
from medfl.shared.study import Study


def given(fill: float = 0.5) -> dict[str, Tensor]:
    network = build_study_network(classes_study())
    return {name: torch.full_like(tensor, fill) for name, tensor in network.state_dict().items()}


def test_the_network_of_a_study_begins_with_the_file_it_names() -> None:
    content = save(given(0.25))
    network = build_study_network(classes_study(initial_weights=digest_of(content)), content)
    assert all(bool((tensor == 0.25).all()) for tensor in network.state_dict().values())


@pytest.mark.parametrize("content", [None, save(given(0.75))], ids=["none", "another"])
def test_any_other_file_is_refused(content: bytes | None) -> None:
    study = classes_study(initial_weights=digest_of(save(given(0.25))))
    with pytest.raises(ConfigError, match="begins with weights of its own"):
        build_study_network(study, content)


def test_a_study_without_initial_weights_keeps_the_digest_it_had() -> None:
    study = classes_study()
    assert "initial_weights" not in study.canonical().decode()
    assert Study.from_canonical(study.canonical(), digest=study.digest) == study


@pytest.mark.parametrize("name", ["f" * 63, "F" * 64, "../weights.safetensors"])
def test_a_study_names_them_by_a_digest_and_never_by_a_path(name: str) -> None:
    with pytest.raises(ValueError, match="initial_weights"):
        classes_study(initial_weights=name)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_is_read(precision: torch.dtype) -> None:
    network = build_study_network(classes_study())
    load_initial(save({name: tensor.to(precision) for name, tensor in given(0.5).items()}), network)
    assert all(tensor.dtype == torch.float32 and bool((tensor == 0.5).all()) for tensor in network.parameters())


def broken(kind: str) -> bytes:
    tensors = given()
    name = next(iter(tensors))
    match kind:
        case "lacking":
            del tensors[name]
        case "unknown":
            tensors["other.weight"] = torch.zeros(2)
        case "shape":
            tensors[name] = torch.zeros(3, 3)
        case "infinite":
            tensors[name][0, 0] = torch.inf
        case "no file":
            return b"PK\x03\x04 a pickle, perhaps"
    return save(tensors)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("lacking", "lack 1 tensors"),
        ("unknown", "hold other.weight"),
        ("shape", r"\[3, 3\], and the study's network has \[2, 16\]"),
        ("infinite", "not finite"),
        ("no file", "no safetensors file"),
    ],
)
def test_what_does_not_fit_is_named_and_the_network_left_as_it_was(kind: str, said: str) -> None:
    network = build_study_network(classes_study())
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ConfigError, match=said):
        load_initial(broken(kind), network)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_initial(tmp_path / "none.safetensors")


def test_integer_buffers_are_left_as_the_network_has_them() -> None:
    network = nn.BatchNorm1d(2)
    content = save({name: torch.ones_like(tensor) for name, tensor in network.state_dict().items()})
    load_initial(content, network)
    assert int(network.num_batches_tracked) == 0  # type: ignore[arg-type]
    assert network.running_mean is not None
    assert network.running_mean.tolist() == [1, 1]
