"""Counts where the host would wait for a GPU, on any device.

Operations whose result or shape the host has to read, and methods that hand a tensor's numbers to Python.
What an operator of ``trainer.kernels.ops`` does inside is not seen: that is another thing on each device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READING = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::item",
        "aten::is_nonzero",
        "aten::equal",
        "aten::nonzero",
        "aten::argwhere",
        "aten::masked_select",
        "aten::_unique2",
        "aten::unique_dim",
        "aten::unique_consecutive",
        "aten::bincount",
        "aten::repeat_interleave",  # of a tensor of counts: their sum is the result's length
    }
)
"""Operations that read values on the host, or whose result's shape depends on them."""

INDEXING = frozenset({"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"})
"""Operations that look for the places of a mask, if they get one."""

METHODS = ("tolist", "numpy", "cpu", "__array__")
"""Ways to Python's numbers that run no operation on a CPU."""


class _Operations(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back as what it does to the local tensor
        name = func._schema.name
        if name in READING or (name in INDEXING and _has_mask(args[1])):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in tree_leaves(indices))


@contextmanager
def host_waits() -> Iterator[Counter[str]]:
    """Count by name what happens inside; the counter is complete at the end."""
    found: Counter[str] = Counter()

    def counted(owner: Any, name: str, instead: Callable[..., Any] | None = None) -> Any:
        function = instead or getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return function(*args, **kwargs)

        return mock.patch.object(owner, name, call)

    with ExitStack() as stack:
        for name in METHODS:
            stack.enter_context(counted(Tensor, name))
        stack.enter_context(counted(torch.cuda, "synchronize", lambda *_: None))
        stack.enter_context(_Operations(found))
        yield found
