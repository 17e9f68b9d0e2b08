"""Folders that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.files import make_folder


def test_a_folder_appears_with_everything_in_it(tmp_path: Path) -> None:
    """Catches a folder that is visible before it is complete, and leftovers of a killed process."""
    target = tmp_path / "new" / "folder"
    target.parent.mkdir()
    (target.parent / ".folder.tmp").mkdir()
    (target.parent / ".folder.tmp" / "old").write_text("of a process that was killed")

    def fill(folder: Path) -> None:
        assert not target.exists() and not list(folder.iterdir())
        (folder / "a").write_text("a")

    make_folder(target, fill)
    assert [path.name for path in target.parent.iterdir()] == ["folder"]
    assert [path.read_text() for path in target.iterdir()] == ["a"]


def test_nothing_is_left_of_a_folder_that_fails(tmp_path: Path) -> None:
    """Catches half a folder after an error or Ctrl-C."""

    def fill(folder: Path) -> None:
        (folder / "a").write_text("a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_folder(tmp_path / "folder", fill)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder", "broken link"])
def test_what_exists_is_never_touched(kind: str, tmp_path: Path) -> None:
    """Catches an export over somebody's files, an empty folder and a dangling link included."""
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("mine")
    elif kind == "folder":
        target.mkdir()
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="exists already"):
        make_folder(target, lambda folder: (folder / "a").write_text("a"))
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert kind != "file" or target.read_text() == "mine"
