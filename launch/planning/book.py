"""Bytes that are alive at the moments of a step (torch-free)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Moment:
    """What is alive at one moment of a step."""

    name: str
    parts: Mapping[str, int]
    """Bytes of tensors by what they are."""
    workspace: int = 0
    """Bytes that a GPU's kernels allocate inside one operation, and of work on another stream; no tensor
    of this moment shows them."""
    offloaded: Mapping[str, int] = field(default_factory=dict)
    """Bytes of tensors in the host's memory, one rank's."""

    @property
    def tensors(self) -> int:
        """Bytes of all tensors of the GPU."""
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        """Bytes of tensors and workspace."""
        return self.tensors + self.workspace


class Book:
    """Bytes alive by part, and the moments noted so far.

    Args:
        offloaded: parts that lie in the host's memory.
    """

    def __init__(self, offloaded: Iterable[str] = ()) -> None:
        self.moments: list[Moment] = []
        self._offloaded = frozenset(offloaded)
        self._held: Counter[str] = Counter()
        self._beside = 0

    def hold(self, **parts: int) -> None:
        """Tensors that live on; underscores in a name stand for spaces."""
        self._held.update({name.replace("_", " "): size for name, size in parts.items()})

    def drop(self, *names: str) -> None:
        """Tensors that end."""
        for name in names:
            del self._held[name.replace("_", " ")]

    def run_beside(self) -> None:
        """What the moments so far needed beyond what lives on may now be alive at any other moment."""
        lasting = sum(size for name, size in self._held.items() if name not in self._offloaded)
        self._beside = max(moment.total for moment in self.moments) - lasting

    def note(self, moment: str, workspace: int = 0, **temporaries: int) -> None:
        """A moment at which ``temporaries`` are alive too."""
        parts = self._held + Counter({name.replace("_", " "): size for name, size in temporaries.items()})
        host = {name: parts.pop(name) for name in self._offloaded & parts.keys()}
        self.moments.append(Moment(moment, dict(parts), workspace + self._beside, host))
