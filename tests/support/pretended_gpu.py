"""A GPU where there is none: tensors stay where they are, say that they lie on one, and are refused beside others.

One mode of PyTorch sees each call with the device it names, another each operation with its tensors. Where a tensor
lies is kept by its storage, so that views and what autograd saves agree. Kernels, streams and memory are not pretended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # the modes below bring it in, and it must not find what is patched
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")

# These take tensors of both; where the result lies, the first of them says.
_CROSSING = {"copy_", "index", "index_put", "index_put_", "_index_put_impl_"}
_KEEP_THEIR_DEVICE = {torch.device, torch._C._nn._parse_to, torch.is_autocast_enabled}
_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.tensor, torch.arange, torch.linspace}
_DRAWS = {torch.rand, torch.randn, torch.randint, torch.randperm}
_DRAWS_IN_PLACE = {Tensor.uniform_, Tensor.normal_, Tensor.random_, Tensor.bernoulli_}
_DEVICE, _IS_CUDA = Tensor.device.__get__, Tensor.is_cuda.__get__  # type: ignore[attr-defined]


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Operations]:
    """Inside, and in this thread, there is a device ``cuda``."""
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    stream = SimpleNamespace(wait_stream=nothing)
    on_cuda: dict[str, Callable[..., object]] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "current_stream": lambda *_: stream,
        "device": lambda *_: nullcontext(),
        "empty_cache": nothing,
        "get_rng_state": lambda *_: torch.zeros(1),
        "manual_seed": nothing,
        "mem_get_info": lambda *_: (10**11, 10**11),
        "set_rng_state": nothing,
        "Stream": lambda *_: stream,
        "stream": lambda *_: nullcontext(),
        "synchronize": nothing,
    }
    places = _Places()
    operations, calls, run_backward = Operations(places), _Calls(places), torch.autograd._engine_run_backward

    def pretending_backward(*arguments: Any, **more: Any) -> Any:
        with calls:  # it is called from within a call, where the mode is off
            return run_backward(*arguments, **more)

    with monkeypatch.context() as changes, operations, calls:
        for name, value in on_cuda.items():
            changes.setattr(torch.cuda, name, value)
        # of PyTorch with CUDA: its optimizers ask whether they are being captured into a graph
        changes.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)
        changes.setattr(torch, "Generator", _Generator)
        changes.setattr(Tensor, "record_stream", nothing)
        changes.setattr(torch.autograd, "_engine_run_backward", pretending_backward)
        yield operations


class _Places:
    """Which storages lie on the GPU."""

    def __init__(self) -> None:
        self._there: dict[int, StorageWeakRef] = {}  # a weak reference keeps its address from being used again

    def on_gpu(self, tensor: Tensor) -> bool:
        while is_functorch_wrapped_tensor(tensor):  # inside vmap and grad
            tensor = get_unwrapped(tensor)
        return tensor.untyped_storage()._cdata in self._there

    def put(self, tensor: Tensor, *, on_gpu: bool) -> None:
        storage = tensor.untyped_storage()
        if on_gpu:
            self._there[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        else:
            self._there.pop(storage._cdata, None)

    def of(self, tensor: Tensor) -> torch.device:
        return GPU if self.on_gpu(tensor) else CPU


class Operations(TorchDispatchMode):
    """Refuses tensors of two devices; results lie where their tensors lie. Numbers of no dimension go anywhere."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self._places = places
        self.looks = 0  # at a number on the GPU: each would wait for it

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        name = func.overloadpacket.__name__
        crossing = name in _CROSSING
        deciding = given[:1] if crossing else given
        on_gpu = any(self._places.on_gpu(tensor) for tensor in deciding)
        self.looks += on_gpu and name == "_local_scalar_dense"
        if on_gpu and not crossing and any(t.dim() and not self._places.on_gpu(t) for t in given):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
        results = func(*args, **(kwargs or {}))
        if on_gpu:
            for result in tree_leaves(results):
                if isinstance(result, Tensor):
                    self._places.put(result, on_gpu=True)
        return results


class _Calls(TorchFunctionMode):
    """Answers what a tensor is asked about its device, and takes devices out of calls."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self._places = places

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == _DEVICE:
            return self._places.of(args[0])
        if func == _IS_CUDA:
            return self._places.on_gpu(args[0])
        if func in (Tensor.numpy, Tensor.__array__) and self._places.on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is Tensor.pin_memory:
            if self._places.on_gpu(args[0]):
                raise RuntimeError("only dense CPU tensors can be pinned")
            return args[0].clone()
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, args, kwargs)
        if func in _KEEP_THEIR_DEVICE:
            return func(*args, **kwargs)
        target = _device_in([*args, *kwargs.values()])
        if (draws := kwargs.get("generator")) is not None and (func in _DRAWS or func in _DRAWS_IN_PLACE):
            where = (target or CPU) if func in _DRAWS else self._places.of(args[0])
            if draws.device.type != where.type:
                raise RuntimeError(f"Expected a '{where.type}' device type for generator")
        made = func(*_without_device(args), **{name: CPU if _is_device(v) else v for name, v in kwargs.items()})
        if target is not None and isinstance(made, Tensor):
            self._places.put(made, on_gpu=target.type == "cuda")
        return made

    def _moved(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        source: Tensor = args[0]
        others = [self._places.of(value) for value in args[1:] if isinstance(value, Tensor)]
        named = _device_in([*args, *kwargs.values()]) or (others or [self._places.of(source)])[0]
        target = {Tensor.cpu: CPU, Tensor.cuda: GPU}.get(func, named)
        result: Tensor = source
        if func is Tensor.to:
            result = func(*_without_device(args), **{name: v for name, v in kwargs.items() if not _is_device(v)})
        if self._places.of(source) != target:
            if result.untyped_storage()._cdata == source.untyped_storage()._cdata:
                result = source.clone()
            self._places.put(result, on_gpu=target == GPU)
        return result


def _is_device(value: object) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu"))


def _device_in(values: Sequence[Any]) -> torch.device | None:
    found = next((torch.device(value) for value in values if _is_device(value)), None)
    return GPU if found is not None and found.type == "cuda" else found


def _without_device(values: Sequence[Any]) -> list[Any]:
    return [CPU if _is_device(value) else value for value in values]


class _Generator(torch.Generator):
    """One that says it is on the device it was asked for. Its numbers are the processor's."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls)
        made._place = torch.device(device)
        return made

    _place: torch.device

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._place
