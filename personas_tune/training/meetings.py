"""Taking the steps of a training beside other processes: reports, checkpoints and the end are common."""

from collections import ChainMap
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

from personas_tune.processes import Processes
from personas_tune.training.fit import AdapterJob, StepReport, TrainingSettings
from personas_tune.training.schedule import Progress
from personas_tune.training.sets import AdapterPlan
from personas_tune.training.stopping import StopRequest
from personas_tune.training.teams import Place, Team


def course_of(
    plans: Sequence[AdapterPlan],
    places: Sequence[Place],
    jobs: Sequence[AdapterJob],
    settings: TrainingSettings,
    processes: Processes,
) -> list[list[Progress]]:
    """How far each team is, by adapter; every process calls it with its jobs."""
    done = ChainMap(*processes.gather({job.adapter: job.steps_done for job in jobs}))
    return [
        [settings.progress(len(plans[index].rows), done[plans[index].adapter]) for index in place.adapters]
        for place in places
    ]


def steps_taken(jobs: Sequence[AdapterJob], team: Team, processes: Processes) -> int:
    """Steps that all processes have taken; every process calls it with its jobs."""
    return sum(processes.gather(sum(job.steps_done for job in jobs) if team.leads else 0))


@dataclass(frozen=True)
class Meetings:
    """What the processes of a run do together while each takes its own steps.

    Args:
        processes: All of them.
        team: Those that this one shares its adapters with.
        stop: Whether this one was told to end.
        listen: Gets every process's reports, in the first one.
        save: Writes a checkpoint of what all of them have; every process calls it.
    """

    processes: Processes
    team: Team
    stop: StopRequest
    listen: Callable[[StepReport], None]
    save: Callable[[], None]

    def follow(self, steps: Iterator[StepReport], due: Container[int]) -> int | None:
        """Take all steps. Between two of them, and never within one, checkpoints are written.

        Args:
            steps: This process's.
            due: After which of them a checkpoint is due; the same for all teams.

        Returns:
            The signal that ended the run before its time, or None.
        """
        for turn, report in enumerate(steps, start=1):
            self._tell(report)
            signal = self._signal()
            if signal is not None or turn in due:
                signal, _ = self._meet(signal, finished=False)
            if signal is not None:
                return signal
        while True:  # whoever is done still has its part of the checkpoints to come
            signal, all_finished = self._meet(None, finished=True)
            if all_finished or signal is not None:
                return signal

    def _tell(self, report: StepReport) -> None:
        if self.processes.is_first:
            self.listen(report)
        elif self.team.leads:
            self.processes.tell_first(report)

    def _hear(self) -> None:
        if self.stop.signal_number is not None:
            self.processes.ask_to_stop(self.stop.signal_number)
        if self.processes.is_first:
            for report in self.processes.told():
                self.listen(report)

    def _signal(self) -> int | None:
        """The signal to end by, the same in all processes of a team: they go on together or stop together."""
        self._hear()
        return self.team.follow_leader(self.processes.asked_to_stop() or self.stop.signal_number)

    def _meet(self, signal: int | None, *, finished: bool) -> tuple[int | None, bool]:
        """Wait for all processes. Unless every one has finished, they write a checkpoint."""
        self._hear()
        said = self.processes.gather((signal, finished), meanwhile=self._hear)
        self._hear()
        signals = [each for each, _ in said if each is not None]
        all_finished = all(each for _, each in said)
        if not all_finished:
            self.save()
        return (signals[0] if signals else None), all_finished
