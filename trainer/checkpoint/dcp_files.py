"""Files of torch.distributed.checkpoint: written with a record of their names, read without running code.

The library unpickles ``.metadata`` and every non-tensor item without restriction, so a planted file
would run its own code. Here the metadata passes an allow-list, and items ``weights_only=True``.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from trainer.checkpoint.store import CheckpointError


class RecordingWriter(FileSystemWriter):
    """Writes into a fresh directory and remembers which files this rank made; the store fsyncs them."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, sync_files=False, overwrite=False)
        self._recording = _RecordingFileSystem()
        self.fs = self._recording

    @property
    def written(self) -> set[str]:
        """Names of the files that this rank wrote."""
        return self._recording.written

    def storage_meta(self) -> StorageMeta:
        """As the base class, without the path of the directory: it is renamed, and a machine's own."""
        return StorageMeta(save_id=self.save_id)


class _RecordingFileSystem(FileSystem):
    def __init__(self) -> None:
        self.written: set[str] = set()

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if mode != "rb":
            self.written.add(Path(path).name)
        with super().create_stream(path, mode) as stream:
            yield stream

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.written.discard(Path(path).name)
        self.written.add(Path(new_path).name)


class SafeReader(FileSystemReader):
    """Reads a checkpoint directory; its ``.metadata`` can name only the library's own records."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Unpickle ``.metadata`` through the allow-list.

        Raises:
            CheckpointError: It holds something else, or refers to a file outside its directory.
        """
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except OSError:
            raise
        except Exception as error:  # whatever a damaged or hostile pickle makes the unpickler raise
            raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path}: holds a {type(metadata).__name__}, not a checkpoint's metadata")
        for location in (metadata.storage_data or {}).values():
            if Path(location.relative_path).name != location.relative_path:
                raise CheckpointError(f"{path}: refers to {location.relative_path!r} outside its directory")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


_METADATA_GLOBALS = frozenset(
    {
        "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
        "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
        "torch.distributed.checkpoint.metadata.Metadata",
        "torch.distributed.checkpoint.metadata.MetadataIndex",
        "torch.distributed.checkpoint.metadata.StorageMeta",
        "torch.distributed.checkpoint.metadata.TensorProperties",
        "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.serialization._get_layout",
        "torch.Size",
    }
)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or f"{module}.{name}" in _METADATA_GLOBALS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"refers to {module}.{name}, which a checkpoint may not contain")


class SafeLoadPlanner(DefaultLoadPlanner):
    """Loads in place; items that are not tensors may hold plain values only, and names must match.

    Args:
        partial_state: The state dict asks for a part of what the checkpoint holds.
    """

    def __init__(self, *, partial_state: bool) -> None:
        super().__init__()
        self._partial_state = partial_state

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """As the base class, and refuse names that only one side has.

        Raises:
            CheckpointError: Names are missing from the checkpoint or, unless ``partial_state``, unknown here.
        """
        super().set_up_planner(state_dict, metadata, is_coordinator)
        assert metadata is not None
        stored, wanted = metadata.state_dict_metadata.keys(), self.state_dict.keys()
        missing, unknown = sorted(wanted - stored), sorted(stored - wanted)
        if missing or (unknown and not self._partial_state):
            raise CheckpointError(
                f"the checkpoint is of another model or optimizer: it lacks {missing[:3]} "
                f"({len(missing)} in all) and holds {unknown[:3]} ({len(unknown)} in all) besides"
            )

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load one non-tensor item with ``weights_only=True``."""
        # The base class unpickles without restriction: hand it bytes that were written just now.
        harmless = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), harmless)
        harmless.seek(0)
        super().load_bytes(read_item, harmless)
