"""What a check found: a table when everything holds, one sentence when something does not."""

from dataclasses import dataclass

__all__ = ["ExactnessError", "Outcome", "Report"]


class ExactnessError(AssertionError):
    """A part does not do what its mathematics says; the message names the check and gives the figures.

    Args:
        subject: What was checked.
        check: Name of the check that failed, as it stands in a :class:`Report`.
        finding: What was found, with figures.
    """

    def __init__(self, subject: str, check: str, finding: str) -> None:
        super().__init__(f"{subject} fails the check '{check}': {finding}")
        self.subject = subject
        self.check = check
        self.finding = finding


@dataclass(frozen=True)
class Outcome:
    """One check that passed, or that had nothing to look at.

    Args:
        check: Its name.
        detail: The figures, or why it did not apply.
        applied: False where the subject offers nothing for the check to look at, or it was skipped.
    """

    check: str
    detail: str
    applied: bool = True


@dataclass(frozen=True)
class Report:
    """The outcomes of all checks of one subject; ``str`` prints them as a table."""

    subject: str
    outcomes: tuple[Outcome, ...]

    @property
    def applied(self) -> tuple[str, ...]:
        """Names of the checks that looked at something."""
        return tuple(outcome.check for outcome in self.outcomes if outcome.applied)

    def __str__(self) -> str:
        width = max(len(outcome.check) for outcome in self.outcomes)
        rows = (
            f"{outcome.check:<{width}}  {'holds' if outcome.applied else '-':<5}  {outcome.detail}"
            for outcome in self.outcomes
        )
        return "\n".join((self.subject, *rows))
