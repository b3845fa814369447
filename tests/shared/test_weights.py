from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from medfl.shared.errors import ProtocolError
from medfl.shared.weights import Layout, weights_digest


def network() -> nn.Sequential:
    made = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    made.load_state_dict(
        {
            "0.weight": torch.tensor([1.0, 2.0]).view(2, 1, 1, 1),
            "0.bias": torch.tensor([3.0, 4.0]),
            "1.weight": torch.tensor([5.0, 6.0]),
            "1.bias": torch.tensor([7.0, 8.0]),
            "1.running_mean": torch.tensor([9.0, 10.0]),
            "1.running_var": torch.tensor([11.0, 12.0]),
            "1.num_batches_tracked": torch.tensor(99),
        }
    )
    return made


def test_the_vector_holds_all_floating_tensors_in_the_order_of_the_state() -> None:
    layout = Layout.of(network())
    assert [name for name, _ in layout.tensors] == [
        "0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"
    ]  # fmt: skip
    assert layout.tensors[0][1] == (2, 1, 1, 1)
    assert layout.length == 12
    assert layout.flatten(network().state_dict()).tolist() == list(range(1, 13))


def test_tensors_that_are_not_kept_are_left_out_and_left_alone() -> None:
    layout = Layout.of(network(), keep=lambda name: name.startswith("0."))
    assert layout.length == 4
    made = network()
    layout.load(np.array([-1, -2, -3, -4], np.float32), made)
    assert made[0].bias.tolist() == [-3.0, -4.0]  # type: ignore[union-attr, operator]
    assert made[1].weight.tolist() == [5.0, 6.0]  # type: ignore[union-attr, operator]


def test_what_was_flattened_loads_back_bit_for_bit_and_counts_of_batches_stay() -> None:
    layout, made = Layout.of(network()), network()
    vector = np.array([1e-45, -0.0, 1 / 3, 3e38, *range(8)], np.float32)
    layout.load(vector, made)
    assert layout.flatten(made.state_dict()).tobytes() == vector.tobytes()
    assert int(made.state_dict()["1.num_batches_tracked"]) == 99


def test_the_vector_is_a_copy_in_both_directions() -> None:
    layout, made = Layout.of(network()), network()
    vector = layout.flatten(made.state_dict())
    vector[:] = 0
    assert made.state_dict()["0.bias"].tolist() == [3.0, 4.0]
    layout.load(vector, made)
    vector[:] = 5
    assert made.state_dict()["0.bias"].tolist() == [0.0, 0.0]


def test_a_vector_that_cannot_be_written_to_loads_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    layout, made = Layout.of(network()), network()
    vector = np.zeros(12, np.float32)
    vector.flags.writeable = False
    layout.load(vector, made)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("vector", "words"),
    [
        (np.zeros(11, np.float32), r"expected float32\[12\], got float32\[11\]"),
        (np.zeros(13, np.float32), "float32"),
        (np.zeros((1, 12), np.float32), r"got float32\[1, 12\]"),
        (np.zeros(12, np.float64), "float64"),
        (np.array([np.nan] + [0] * 11, np.float32), "not finite"),
        (np.array([0] * 11 + [np.inf], np.float32), "not finite"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused_and_nothing_is_loaded(vector: np.ndarray, words: str) -> None:
    made = network()
    with pytest.raises(ProtocolError, match=words):
        Layout.of(made).load(vector, made)
    assert Layout.of(made).flatten(made.state_dict()).tolist() == list(range(1, 13))


def test_layouts_differ_by_name_and_by_shape() -> None:
    one = Layout((("a", (2, 3)),))
    others = [Layout((("b", (2, 3)),)), Layout((("a", (3, 2)),)), Layout((("a", (6,)),)), Layout(())]
    assert one.digest == Layout((("a", (2, 3)),)).digest
    assert len({layout.digest for layout in [one, *others]}) == 5
    assert Layout(()).length == 0


def test_a_scalar_tensor_is_one_value() -> None:
    assert Layout((("a", ()), ("b", (0, 5)))).length == 1


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=8))
def test_the_digest_of_weights_is_sha256_of_their_bytes(values: list[float]) -> None:
    vector = np.array(values, np.float32)
    assert weights_digest(vector) == hashlib.sha256(vector.tobytes()).hexdigest()
    assert weights_digest(np.repeat(vector, 2)[::2]) == weights_digest(vector)  # however it lies in memory
