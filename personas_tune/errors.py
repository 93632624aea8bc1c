"""One error tree for everything that a user can cause.

Each error is one line: where it happened, what is wrong there, what would work. Recipes and the
console script print that line and exit with status 2; a traceback means a bug of ours.
"""

from collections.abc import Sequence


class PersonasTuneError(Exception):
    """A mistake that the user can mend, told in one line.

    Args:
        what: What is wrong, with the offending value.
        where: The file (and row), config key or user that it is about.
        remedy: What would work, ideally a command or a setting.

    Attributes:
        exit_status: What the process ends with.

    Example:
        >>> print(DataError("rating 7.0 is above the scale 1-5", where="ratings.csv row 12",
        ...                 remedy="mend the row or set data.rating_scale.max=7"))
        ratings.csv row 12: rating 7.0 is above the scale 1-5; mend the row or set data.rating_scale.max=7
    """

    exit_status = 2

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        line = what if where is None else f"{where}: {what}"
        line = line if remedy is None else f"{line}; {remedy}"
        super().__init__(" ".join(line.split()))

    @property
    def lines(self) -> list[str]:
        """The message as lines, one a mistake."""
        return [str(self)]


class SeveralErrors(PersonasTuneError):  # noqa: N818
    """Several mistakes found in one go, each told in its own line."""

    def __init__(self, errors: Sequence[PersonasTuneError]) -> None:
        super().__init__(f"{len(errors)} mistakes")
        self.errors = list(errors)

    @property
    def lines(self) -> list[str]:
        """The messages, one a mistake."""
        return [line for error in self.errors for line in error.lines]

    def __str__(self) -> str:
        return "\n".join(self.lines)


class ConfigError(PersonasTuneError):
    """A config key that is unknown, missing or has an unusable value."""


class MissingInputError(PersonasTuneError):
    """A file that an earlier stage, a download or the user has to provide is not there."""


class DataError(PersonasTuneError):
    """A log, its metadata or an imported table that can't be used as it is."""


class DistillError(PersonasTuneError):
    """Profiles or memories that can't be written or imported."""


class ServerError(PersonasTuneError):
    """A language model server that can't be used: no key, no quota, no such model, no answer."""


class JournalError(PersonasTuneError):
    """A journal of paid answers that is in use, damaged or foreign."""


class BudgetError(PersonasTuneError):
    """The sum set for paid calls is spent."""


class Interrupted(PersonasTuneError):  # noqa: N818
    """The user stopped the run; whatever had been asked was waited for and kept.

    Args:
        signal_number: The signal that stopped it.
        what: What was finished and what is left.
    """

    def __init__(self, signal_number: int, what: str) -> None:
        super().__init__(what, where="interrupted", remedy="run the same command to go on")
        self.exit_status = 128 + signal_number


class ProcessError(PersonasTuneError):
    """Another process of the run that can't be reached any more."""


class OtherProcessFailed(PersonasTuneError):  # noqa: N818
    """Another process has failed, and has said why."""

    def __init__(self, exit_status: int = 2) -> None:
        super().__init__("another process failed")
        self.exit_status = exit_status

    @property
    def lines(self) -> list[str]:
        """None: it was said once."""
        return []


class ClusteringError(PersonasTuneError):
    """Users that can't be grouped as asked."""


class RetrievalError(PersonasTuneError):
    """Vectors that can't be searched."""


class PromptError(PersonasTuneError):
    """A sample that can't be put into words within the model's context."""


class AdapterError(PersonasTuneError):
    """An adapter that doesn't fit the base model or is used out of turn."""


class CheckpointError(PersonasTuneError):
    """A base checkpoint or adapter file that is missing, damaged or foreign."""


class EvaluationError(PersonasTuneError):
    """Predictions that can't be measured."""


def raise_together(errors: Sequence[PersonasTuneError]) -> None:
    """Raise all collected errors at once; do nothing when there are none.

    Raises:
        PersonasTuneError: The only error, as it is.
        SeveralErrors: All of them, when there are more.
    """
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise SeveralErrors(errors)
