"""Trials of a fault, shown as they end, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Say = Callable[[str], None]


@dataclass(slots=True)
class Trials:
    """What was tried of one fault, and what came of it.

    Args:
        name: short name of the fault.
        say: receives one line per trial.
    """

    name: str
    say: Say
    tried: int = 0
    survived: int = 0
    problems: list[str] = field(default_factory=list)
    """Everything that went wrong, one line each."""
    lost: str = ""
    """Steps, files, processes, seconds: what the fault costs when it is survived."""
    seconds: float = 0.0

    def add(self, trial: str, problems: Iterable[str], note: str = "") -> None:
        """Count a trial; it is survived when there is no problem."""
        self.tried += 1
        self.survived += self._note(trial, list(problems), note)

    def check(self, what: str, problems: Iterable[str], note: str = "") -> None:
        """Note a check of several trials together, such as the losses of a run that was killed often."""
        self._note(what, list(problems), note)

    def _note(self, what: str, problems: Sequence[str], note: str) -> bool:
        self.problems += [f"{what}: {problem}" for problem in problems]
        shown = "; ".join(problems) if problems else note
        self.say(f"[{self.name}] {what}: {'FAIL' if problems else 'ok'}{'  ' + shown if shown else ''}")
        return not problems

    @property
    def passed(self) -> bool:
        """Whether something was tried and nothing went wrong."""
        return self.tried > 0 and not self.problems

    def to_json(self) -> dict[str, Any]:
        """The row as a record keeps it."""
        return {
            "fault": self.name,
            "tried": self.tried,
            "survived": self.survived,
            "lost": self.lost if self.passed else None,
            "seconds": round(self.seconds, 1),
            "passed": self.passed,
            "problems": self.problems,
        }


def markdown_table(rows: Iterable[tuple[str, Trials]]) -> str:
    """Format (fault in words, its trials) as a Markdown table."""
    lines = ["| fault | tried | survived | lost | verdict |", "|---|---|---|---|---|"]
    for title, trials in rows:
        verdict = "pass" if trials.passed else "**FAIL**"
        lost = trials.lost if trials.passed else f"{len(trials.problems)} problems, see below"
        cells = (title, str(trials.tried), str(trials.survived), lost, verdict)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
