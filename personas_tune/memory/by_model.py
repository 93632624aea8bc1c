"""The ``openai`` distiller: every user reflected on by a language model, every paid answer kept."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from personas_tune.errors import DistillError, PersonasTuneError, raise_together
from personas_tune.llm.calls import Chain
from personas_tune.llm.journal import Journal, Total
from personas_tune.llm.replay import finished_chains
from personas_tune.llm.settings import ServerSettings, access_to
from personas_tune.memory.reflection import ReflectionSettings, reflect_on
from personas_tune.memory.stream import count_train_rows, stream_histories
from personas_tune.memory.tables import Reflected, write_distilled

NAME = "openai"
MAX_NAMED = 20  # incomplete users in messages
LONGEST_PROFILE = 400  # words, about 550 tokens; schema.py knows it too
WORDS_PER_TOKEN_OF_CONTEXT = 1 / 8


@dataclass(frozen=True)
class Sources:
    """The tables that ``persona_prepare`` wrote."""

    interactions: Path
    items: Path
    users: Path

    def chains(self, settings: ReflectionSettings) -> Iterator[tuple[str, Chain[Reflected]]]:
        """Each user's distillation by user id, made as they are asked for."""
        for history in stream_histories(self.interactions, self.items, self.users):
            yield history.user_id, reflect_on(history, settings)


@dataclass(frozen=True)
class BatchSettings:
    """How the Batch API is used.

    Args:
        folder: Where request files lie until their answers are in the journal.
        poll_s: Seconds between two looks at the batches under way.
    """

    folder: Path
    poll_s: float


@dataclass(frozen=True)
class ModelReport:
    """What came of a run.

    Args:
        left_out: Users without texts, and why.
        n_profiles: Rows written.
        n_memories: Rows written.
        totals: What the journal holds for the model, earlier runs included.
    """

    left_out: Mapping[str, str]
    n_profiles: int
    n_memories: int
    totals: list[Total]


def profile_words_for(context: int | None) -> int:
    """How long a profile may be so that it takes about a sixth of a base model's context.

    Args:
        context: The base's, in tokens; None if it isn't known.

    Example:
        >>> profile_words_for(4096), profile_words_for(1024)
        (400, 128)
    """
    if context is None:
        return LONGEST_PROFILE
    return max(20, min(LONGEST_PROFILE, int(context * WORDS_PER_TOKEN_OF_CONTEXT)))


def distill_by_model(
    sources: Sources,
    settings: ReflectionSettings,
    server: ServerSettings,
    journal_path: Path,
    *,
    max_tries: int,
    max_incomplete: int,
    batches: BatchSettings | None,
    profiles: Path,
    memories: Path,
) -> ModelReport:
    """Ask for whatever the journal lacks, then write both tables from the journal.

    Args:
        sources: The cohort.
        settings: What is asked.
        server: Who is asked.
        journal_path: Where answers are kept.
        max_tries: Answers asked for before a call, and with it the user, is given up.
        max_incomplete: Users that may be left out.
        batches: Use the Batch API; None for calls that are answered at once.
        profiles: Where the profiles go.
        memories: Where the memories go.

    Raises:
        DistillError: For each user that stays incomplete, when there are more than ``max_incomplete``.
        ServerError: If the server can't be used.
        BudgetError: If the budget is spent.
        JournalError: If another run uses the journal.
        Interrupted: If the user stopped the run.
    """
    if not journal_path.exists():
        access_to(server)  # begin no journal for a server that can't be asked
    with Journal.open(journal_path) as journal:
        left_out = _ask(sources, settings, server, journal, max_tries=max_tries, batches=batches)
        _refuse_incomplete(left_out, max_incomplete, journal_path)
        finished = finished_chains(sources.chains(settings), journal, leave_out=left_out)
        n_profiles, n_memories = write_distilled(finished, profiles, memories, NAME)
        return ModelReport(left_out, n_profiles, n_memories, journal.totals(settings.model))


def report_lines(report: ModelReport, server: ServerSettings) -> list[str]:
    """What was asked and left out, a line each."""
    counts = {
        status: sum(t.n for t in report.totals if t.status == status) for status in ("answered", "failed", "lost")
    }
    n_in = sum(total.usage.input_tokens for total in report.totals)
    n_out = sum(total.usage.output_tokens for total in report.totals)
    cost = ""
    if server.prices is not None:
        cost = f", {sum(server.prices.cost_usd(total.usage, total.via) for total in report.totals):.2f} USD"
    lines = [
        f"the journal holds {counts['answered']} answers of {server.model} ({counts['failed']} calls failed, "
        f"{counts['lost']} were lost on the way): {n_in} tokens in, {n_out} out{cost}"
    ]
    return lines + [f"user {user_id} left out: {why}" for user_id, why in report.left_out.items()]


def _ask(
    sources: Sources,
    settings: ReflectionSettings,
    server: ServerSettings,
    journal: Journal,
    *,
    max_tries: int,
    batches: BatchSettings | None,
) -> dict[str, str]:
    if batches is not None:
        from personas_tune.llm.batches import run_batches

        return run_batches(
            lambda: sources.chains(settings),
            journal=journal,
            server=server,
            max_tries=max_tries,
            folder=batches.folder,
            poll_s=batches.poll_s,
        )
    from personas_tune.llm.batches import refuse_open_batches
    from personas_tune.llm.online import run_online

    refuse_open_batches(journal)
    n_train = count_train_rows(sources.users)
    return run_online(
        sources.chains(settings),
        journal=journal,
        server=server,
        max_tries=max_tries,
        n_calls=int((-(-n_train // settings.batch_size)).sum()),
        what="distill",
    )


def _refuse_incomplete(left_out: Mapping[str, str], max_incomplete: int, journal_path: Path) -> None:
    if len(left_out) <= max_incomplete:
        return
    errors: list[PersonasTuneError] = [
        DistillError(why, where=f"user {user_id}") for user_id, why in list(left_out.items())[:MAX_NAMED]
    ]
    more = f", {len(left_out) - MAX_NAMED} of them not named here" if len(left_out) > MAX_NAMED else ""
    what = f"{len(left_out)} users are incomplete{more}; every answer is kept in {journal_path}"
    remedy = (
        f"run the same command to ask again for these, or leave them out with distill.max_incomplete={len(left_out)}"
    )
    raise_together([*errors, DistillError(what, remedy=remedy)])
