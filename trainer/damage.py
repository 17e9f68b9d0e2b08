"""Rows that were left out of the loss because their data are damaged, counted exactly over all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data.batch import Batch, Damage
from parallel.collectives import Agreement
from parallel.mesh import Mesh


class DamageCount:
    """Rows left out by chunk; the totals are part of a checkpoint, so that they are those of its steps.

    Args:
        mesh: tensor-parallel ranks hold the same rows, one of them counts.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._counts = mesh.tp_rank == 0
        self._own: Counter[Damage] = Counter()
        self._total: Counter[Damage] = Counter()

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches, counted as they pass."""
        for batch in batches:
            self.add(batch)
            yield batch

    def add(self, batch: Batch) -> None:
        """Count a batch of this rank."""
        if self._counts:
            self._own.update(damage for _, damage in batch.damaged)

    def gather(self, agreement: Agreement) -> list[dict[str, Any]]:
        """Join the counts of all ranks; a collective.

        Returns:
            What an event says of each chunk that lost rows since the last call: ``split``, ``chunk``,
            ``error``, and ``rows``, all that it has lost.
        """
        new = sum(agreement.gather(self._own), Counter[Damage]())
        self._own = Counter()
        self._total += new
        return [{**damage._asdict(), "rows": self._total[damage]} for damage in sorted(new)]

    def state_dict(self) -> list[dict[str, Any]]:
        """What a checkpoint keeps, the same on all ranks; :meth:`gather` comes before."""
        return [{**damage._asdict(), "rows": rows} for damage, rows in sorted(self._total.items())]

    def load_state_dict(self, state: Iterable[Mapping[str, Any]]) -> None:
        """Continue from :meth:`state_dict`."""
        self._own = Counter()
        self._total = Counter(
            {Damage(entry["split"], entry["chunk"], entry["error"]): entry["rows"] for entry in state}
        )
