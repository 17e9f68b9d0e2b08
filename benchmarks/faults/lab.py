"""Where faults are tried: folders, random numbers, and the undisturbed runs to compare with."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.faults.ranks import train_to_end
from benchmarks.faults.world import TinyWorld, first_difference, logged_values, write_world
from trainer.config import RunConfig


class Lab:
    """Everything that a fault is given.

    Args:
        folder: an empty folder for all files.
        kills: how many processes to kill at random.
        seed: of everything random.
    """

    def __init__(self, folder: Path, *, kills: int, seed: int) -> None:
        self.folder, self.kills = folder, kills
        self._seed = seed
        self.world: TinyWorld = write_world(folder / "world")
        self._undisturbed: dict[str, list[dict[str, Any]]] = {}

    def room(self, name: str) -> Path:
        """Make a fresh folder."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def generator(self, name: str) -> random.Random:
        """Random numbers that depend on the seed and on who asks."""
        return random.Random(f"{self._seed}:{name}")

    def compare(self, config: RunConfig, world_size: int) -> list[str]:
        """Compare what a run logged with an undisturbed run of the same configuration, bitwise.

        Returns:
            The first difference in one line, or nothing.
        """
        expected = self.undisturbed(config, world_size)
        difference = first_difference(logged_values(Path(config.run.dir)), expected)
        return [difference] if difference else []

    def undisturbed(self, config: RunConfig, world_size: int) -> list[dict[str, Any]]:
        """What such a run logs when nothing happens to it and it saves at its end alone; trained once."""
        run_dir = self.folder / "undisturbed" / str(len(self._undisturbed))
        reference = replace(config, checkpoint=replace(config.checkpoint, every_steps=0))
        key = f"{world_size}:{reference}".replace(config.run.dir, "")
        if key not in self._undisturbed:
            train_to_end(self.world.moved(reference, run_dir), world_size)
            self._undisturbed[key] = logged_values(run_dir)
        return self._undisturbed[key]
