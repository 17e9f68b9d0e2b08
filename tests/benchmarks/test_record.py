"""Records appear whole, replace nothing and say how to measure again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.record import Transcript, command_line, write_record


def _write(root: Path, results: object = 1.5) -> Path:
    return write_record(
        "theme-1", command="python -m x", config={"seed": 0}, results=results, log="line\n", root=root
    )


def test_a_record_holds_all_that_is_needed_to_measure_again(tmp_path: Path) -> None:
    """Catches a record without command, versions, hardware or commit."""
    path = _write(tmp_path)
    body = json.loads((path / "record.json").read_text())
    assert body["command"] == "python -m x"
    assert body["config"] == {"seed": 0}
    assert body["results"] == 1.5
    assert body["versions"]["torch"].startswith("2.")
    assert body["hardware"]["cores"] >= 1
    assert body["git_commit"]
    assert (path / "log.txt").read_text() == "line\n"
    assert path.name == f"{body['time'][:10]}_theme-1_{body['hardware']['name']}"


def test_a_second_record_of_the_day_replaces_nothing(tmp_path: Path) -> None:
    """Catches an earlier measurement that is overwritten."""
    first, second = _write(tmp_path, 1), _write(tmp_path, 2)
    assert second.name == f"{first.name}_2"
    assert json.loads((first / "record.json").read_text())["results"] == 1


@pytest.mark.parametrize("results", [float("nan"), object()])
def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path: Path, results: object) -> None:
    """Catches half a record, and numbers that JSON does not have."""
    with pytest.raises((ValueError, TypeError)):
        _write(tmp_path, results)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a record without its log."""

    def no_log(path: Path, text: str) -> None:
        if path.name == "log.txt":
            raise OSError(28, "No space left on device", str(path))
        path.write_text(text)

    monkeypatch.setattr("benchmarks.record.replace_text", no_log)
    with pytest.raises(OSError, match="No space left"):
        _write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_theme_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    """Catches a record elsewhere."""
    with pytest.raises(ValueError, match=r"theme='\.\./x' must be lower-case"):
        write_record("../x", command="", config={}, results=0, log="", root=tmp_path)


def test_the_transcript_keeps_what_is_printed_without_paths(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a log that names this machine's folders."""
    transcript = Transcript({"/tmp/secret": "LAB"})
    transcript.say("wrote /tmp/secret/file")
    transcript.say()
    assert transcript.text == capsys.readouterr().out == "wrote LAB/file\n\n"


def test_the_command_can_be_typed() -> None:
    """Catches a command line with an interpreter's or a script's path."""
    assert command_line("benchmarks.x", ["--kills", "3"]) == "python -m benchmarks.x --kills 3"
