"""A sweep from its start, or from where it was left, to its end."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitfleet.configs.sweeps.sweep import PlannedRun, Sweep, with_seed
from bitfleet.launch.sweep.outcomes import Outcome, read_outcomes, sentence_of, write_outcomes
from bitfleet.launch.sweep.pool import Ended, Job, run_jobs
from bitfleet.launch.sweep.table import HOW, JSON, flatten, write_question, write_table
from bitfleet.launch.text import clock
from bitfleet.trainer.config import to_dict
from bitfleet.trainer.metrics import read_metrics
from bitfleet.trainer.ranks.exit_codes import REQUEUE
from bitfleet.trainer.run.files import lock_run
from bitfleet.trainer.run.folder import CONFIG, read_config

MAX_FAILURES = 2
"""A run that fails so often is given up; one that was given up gets one more attempt when the sweep is started again."""


def run_sweep(
    sweep: Sweep,
    runs: Sequence[PlannedRun],
    folder: Path,
    command: Callable[[PlannedRun], tuple[str, ...]],
    places: Sequence[Mapping[str, str]],
    options: Sequence[str] = (),
) -> int:
    """Run what is not finished of `runs`; the table in `folder` is renewed after each, and keeps the rows of earlier seeds.

    Args:
        sweep: the sweep.
        runs: its runs.
        folder: its folder.
        command: of a run.
        places: how many at once, and what each place adds to the environment.
        options: of all runs, for sweep.json.

    Returns:
        Exit code: 0 when all are finished, 1 when any has failed, 75 when it or a run was asked to stop.

    Raises:
        ValueError: another sweep is at work in `folder`, or a run in it has another configuration.
    """
    with lock_run(folder, "--output"):
        shown = with_earlier_seeds(runs, folder)
        check_folders(shown)
        progress = _Progress(sweep, runs, shown, folder)
        write_question(folder, sweep, options, shown)
        progress.write()
        jobs = [Job(run.name, command(run), folder / "logs" / f"{run.name}.log") for run in progress.unfinished()]
        was_asked = run_jobs(jobs, places, progress.ended)
        return progress.close(was_asked)


def with_earlier_seeds(runs: Sequence[PlannedRun], folder: Path) -> list[PlannedRun]:
    """`runs`, after the same points with the seeds that the sweep in `folder` has begun before.

    Raises:
        ValueError: its sweep.json is damaged.
    """
    file = folder / JSON
    try:
        before = [int(seed) for seed in json.loads(file.read_bytes())["seeds"]] if file.is_file() else []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: delete it, and pass all seeds of the sweep with --seeds") from error
    seeds = dict.fromkeys(run.config.seed for run in runs)
    points = [run for run in runs if run.config.seed == runs[0].config.seed]
    planned = {seed: [with_seed(run, seed) for run in points] for seed in (*before, *seeds)}
    return [
        run
        for seed, each in planned.items()
        if seed in seeds or any((run.path / CONFIG).is_file() for run in each)
        for run in each
    ]


def check_folders(runs: Sequence[PlannedRun]) -> None:
    """Raise ValueError where the folder of a run holds one of another configuration."""
    for run in runs:
        if not (run.path / CONFIG).is_file():
            continue
        before, now = flatten(to_dict(read_config(run.path))), flatten(to_dict(run.config))
        if now["engine.precision"] == "auto":  # a run that is continued keeps what its device chose
            now["engine.precision"] = before["engine.precision"]
        # The rule first: with another one, other fields are there.
        for field in sorted({*before, *now} - set(HOW), key=lambda name: (name != "optim.rule", name)):
            if before.get(field) != now.get(field):
                raise ValueError(
                    f"{run.path} holds a run whose {field} is {before.get(field)}, and this sweep wants {now.get(field)}: pass "
                    f"another --output, or move that folder away"
                )


def _is_there(run: Path) -> bool:
    """Whether the folder of a run holds a result."""
    return (run / CONFIG).is_file() and bool(_validations(run))


def _validations(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run) if line["kind"] == "validation"]


class _Progress:
    """What has become of the runs so far; remembered, written into the table and said after each."""

    def __init__(self, sweep: Sweep, runs: Sequence[PlannedRun], shown: Sequence[PlannedRun], folder: Path) -> None:
        self._sweep, self._runs, self._folder = sweep, runs, folder
        self._shown = shown
        """In the table: also runs that are not asked for now, of other seeds."""
        self._paths = {run.name: run.path for run in runs}
        self._before = read_outcomes(folder)
        for run in shown:  # what was removed since is done again
            if self._before.get(run.name, Outcome()).status == "finished" and not _is_there(run.path):
                self._before[run.name] = Outcome()
        self.outcomes = {run.name: self._before.get(run.name, Outcome()) for run in runs}
        self._attempts: dict[str, int] = {
            name: MAX_FAILURES - 1 if outcome.status == "failed" else 0 for name, outcome in self.outcomes.items()
        }
        self._begun, self._num_before = time.monotonic(), self._count("finished")
        if self._num_before:
            print(f"{self._num_before} of {len(runs)} runs are finished already", flush=True)

    def unfinished(self) -> list[PlannedRun]:
        """The runs to be started."""
        return [run for run in self._runs if self.outcomes[run.name].status != "finished"]

    def write(self) -> None:
        """Renew the table."""
        write_table(self._folder, self._sweep, self._shown, self._before | self.outcomes)

    def ended(self, ended: Ended) -> bool:
        """Note how a run has ended; whether it shall be tried again."""
        name, before = ended.job.name, self.outcomes[ended.job.name]
        outcome = dataclasses.replace(before, seconds=before.seconds + ended.seconds)
        again = False
        if ended.code == 0 and _is_there(self._paths[name]):
            outcome = dataclasses.replace(outcome, status="finished", error="")
        elif ended.stopped or ended.code == REQUEUE:
            outcome = dataclasses.replace(outcome, status="pending")
        else:
            self._attempts[name] += 1
            again = self._attempts[name] < MAX_FAILURES
            outcome = dataclasses.replace(
                outcome, status="pending" if again else "failed", failures=before.failures + 1, error=sentence_of(ended)
            )
        self.outcomes[name] = outcome
        write_outcomes(self._folder, self._before | self.outcomes)
        self.write()
        print(self._line(name, ended, again), flush=True)
        return again

    def _line(self, name: str, ended: Ended, again: bool) -> str:
        outcome = self.outcomes[name]
        finished, failed = self._count("finished"), self._count("failed")
        head = f"[{finished + failed} of {len(self._runs)}] {name}"
        if again:
            return f"{head}: failed, will be tried again: {outcome.error}"
        if outcome.status == "failed":
            return f"{head}: FAILED: {outcome.error}"
        if outcome.status == "pending":
            return f"{head}: stopped; the same command continues it"
        done = finished - self._num_before
        left = len(self._runs) - finished - failed
        seconds = (time.monotonic() - self._begun) / done * left
        top1 = _validations(self._paths[name])[-1]["top1"]
        return f"{head}: top-1 {top1:.2%} in {ended.seconds:.0f} s; ETA {clock(seconds)}"

    def _count(self, status: str) -> int:
        return sum(outcome.status == status for outcome in self.outcomes.values())

    def close(self, was_asked: bool) -> int:
        """Say what there is; the exit code of the sweep."""
        failed = [name for name, outcome in self.outcomes.items() if outcome.status == "failed"]
        pending = self._count("pending")
        print(
            f"{self._count('finished')} finished, {len(failed)} failed, {pending} to be done, in "
            f"{clock(time.monotonic() - self._begun)}; {self._folder / 'sweep.csv'}"
        )
        for name in failed:
            print(f"  {name}: {self.outcomes[name].error} (log: {self._folder / 'logs' / name}.log)")
        if was_asked or pending:
            print(f"exit code {REQUEUE}: the same command continues the sweep", flush=True)
            return REQUEUE
        return 1 if failed else 0
