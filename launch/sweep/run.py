"""Run a sweep: keep finished runs, continue stopped ones, retry failed ones, and write the table
after each."""

import dataclasses
import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from bitfleet.configs.sweeps.sweep import PlannedRun, Sweep, with_seed
from bitfleet.launch.sweep.pool import Ended, Job, run_jobs
from bitfleet.launch.sweep.table import (
    HOW,
    JSON,
    Outcome,
    flatten,
    read_outcomes,
    write_outcomes,
    write_question,
    write_table,
)
from bitfleet.launch.text import clock
from bitfleet.trainer.config import read_config, to_dict
from bitfleet.trainer.metrics import read_metrics
from bitfleet.trainer.ranks.exit_codes import REQUEUE, error_sentences
from bitfleet.trainer.run.files import lock_run
from bitfleet.trainer.run.folder import CONFIG, read_facts

MAX_FAILURES = 2
"""Failures after which a run is given up; when the sweep is started again, it gets one more
attempt."""


def run_sweep(
    sweep: Sweep,
    runs: Sequence[PlannedRun],
    folder: Path,
    command: Callable[[PlannedRun], tuple[str, ...]],
    places: Sequence[Mapping[str, str]],
    options: Sequence[str] = (),
    ranks: int = 1,
) -> int:
    """Run the unfinished `runs` and return the exit code of the sweep; rows of earlier seeds stay
    in the table.

    Args:
        sweep: the sweep.
        runs: its runs.
        folder: its folder.
        command: returns the command line of a run.
        places: environment variables that each place adds; one run at a time per place.
        options: options of all runs, for sweep.json.
        ranks: number of ranks of each run.

    Returns:
        0 if all are finished, 1 if any has failed, 75 if the sweep or a run was asked to stop.

    Raises:
        ValueError: another sweep uses `folder`, or a run in it has another configuration.
    """
    with lock_run(folder, "--output"):
        shown = with_earlier_seeds(runs, folder)
        check_folders(shown, ranks)
        progress = _Progress(sweep, runs, shown, folder, len(places))
        write_question(folder, sweep, options, shown)
        progress.write()
        jobs = [Job(run.name, command(run), folder / "logs" / f"{run.name}.log") for run in progress.unfinished()]
        if jobs:  # the first result may take hours
            print(f"{len(jobs)} to be done; what they print: {folder / 'logs'}", flush=True)
        was_asked = run_jobs(jobs, places, progress.ended)
        return progress.close(was_asked)


def with_earlier_seeds(runs: Sequence[PlannedRun], folder: Path) -> list[PlannedRun]:
    """Return the same points with the seeds that the sweep in `folder` started earlier, then
    `runs`.

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


def check_folders(runs: Sequence[PlannedRun], ranks: int = 1) -> None:
    """Raise ValueError if the folder of a run holds a run of another configuration, or if new runs
    on `ranks` ranks would have another number of replicas."""
    starts_some = not all((run.path / CONFIG).is_file() for run in runs)
    for run in runs:
        if not (run.path / CONFIG).is_file():
            continue
        before, now = flatten(to_dict(read_config(run.path))), flatten(to_dict(run.config))
        if now["engine.precision"] == "auto":  # a continued run keeps the choice of its device
            now["engine.precision"] = before["engine.precision"]
        replicas = read_facts(run.path).get("num_replicas", before["num_replicas"])
        if starts_some and run.config.num_replicas is None and replicas not in (None, ranks):
            raise ValueError(
                f"{run.path} holds a run of {replicas} replicas, and those that --ranks {ranks} starts would have "
                f"{ranks}: pass --ranks {replicas}, or another --output"
            )
        # The rule first: another one has other fields.
        for field in sorted({*before, *now} - HOW, key=lambda name: (name != "optim.rule", name)):
            if before.get(field) != now.get(field):
                raise ValueError(
                    f"{run.path} holds a run whose {field} is {before.get(field)}, "
                    f"and this sweep wants {now.get(field)}: pass another --output, or move that folder away"
                )


def sentence_of(ended: Ended) -> str:
    """Return the reason of a failure: the error line of the run, else its exit code and last
    line."""
    if sentences := error_sentences(ended.output):
        return sentences[-1].strip()
    reason = f"it left with exit code {ended.code}"
    if ended.code < 0:
        reason = f"it was killed by {signal.Signals(-ended.code).name}"
    elif ended.code == 0:
        reason += ", but there is no validation in its folder"
    lines = [line.strip() for line in ended.output.splitlines() if line.strip()]
    return f"{reason}; the last line of {ended.job.log} is {lines[-1] if lines else 'missing'!r}"


def _top1(run: Path) -> float | None:
    """Return the last top-1 in the folder of a run; None if it holds no result."""
    validations = [line for line in read_metrics(run) if line["kind"] == "validation"]
    return validations[-1]["top1"] if validations and (run / CONFIG).is_file() else None


class _Progress:
    """Outcomes of the runs so far: stored, written into the table and printed after each run."""

    def __init__(
        self, sweep: Sweep, runs: Sequence[PlannedRun], shown: Sequence[PlannedRun], folder: Path, num_places: int
    ) -> None:
        self._sweep, self._folder, self._num_places = sweep, folder, num_places
        self._shown = shown
        """Runs in the table, with those of earlier seeds."""
        self._runs = {run.name: run for run in runs}
        self._new = {run.name for run in runs if not (run.path / CONFIG).is_file()}
        """Runs that this call starts; one that is there already may be collected in seconds."""
        self._outcomes = dict.fromkeys(self._runs, Outcome()) | read_outcomes(folder)
        for run in shown:  # a result that was removed since is computed again
            if self._outcomes.get(run.name, Outcome()).status == "finished" and _top1(run.path) is None:
                self._outcomes[run.name] = Outcome()
        self._attempts = {
            name: MAX_FAILURES - 1 if self._outcomes[name].status == "failed" else 0 for name in self._runs
        }
        self._start_time = time.monotonic()
        if num_before := len(self._having("finished")):
            print(f"{num_before} of {len(runs)} runs are finished already", flush=True)

    def unfinished(self) -> list[PlannedRun]:
        """Return the runs to be started."""
        return [run for name, run in self._runs.items() if self._outcomes[name].status != "finished"]

    def write(self) -> None:
        """Write the table again."""
        write_table(self._folder, self._sweep, self._shown, self._outcomes)

    def ended(self, ended: Ended) -> bool:
        """Store the outcome of a run; return True if it should be tried again."""
        name, before = ended.job.name, self._outcomes[ended.job.name]
        outcome = dataclasses.replace(before, seconds=before.seconds + ended.seconds)
        again = False
        if ended.code == 0 and _top1(self._runs[name].path) is not None:
            outcome = dataclasses.replace(outcome, status="finished", error="")
        elif ended.code == REQUEUE or (ended.stopped and not error_sentences(ended.output)):
            outcome = dataclasses.replace(outcome, status="pending")
        else:
            self._attempts[name] += 1
            again = self._attempts[name] < MAX_FAILURES
            status: Literal["pending", "failed"] = "pending" if again else "failed"
            error = sentence_of(ended)
            outcome = dataclasses.replace(outcome, status=status, failures=before.failures + 1, error=error)
        self._outcomes[name] = outcome
        write_outcomes(self._folder, self._outcomes)
        self.write()
        print(self._line(name, ended, again), flush=True)
        return again

    def _line(self, name: str, ended: Ended, again: bool) -> str:
        outcome, finished = self._outcomes[name], self._having("finished")
        num_ended = len(finished) + len(self._having("failed"))
        head = f"[{num_ended} of {len(self._runs)}] {name}"
        if again:
            return f"{head}: failed, will be tried again: {outcome.error}"
        if outcome.status == "failed":
            return f"{head}: FAILED: {outcome.error}"
        if outcome.status == "pending":
            return f"{head}: stopped; the same command continues it"
        line = f"{head}: top-1 {_top1(self._runs[name].path):.2%} in {ended.seconds:.0f} s"
        seconds = [self._outcomes[each].seconds for each in finished if each in self._new]
        if not seconds:
            return line
        num_left = len(self._runs) - num_ended
        return f"{line}; ETA {clock(sum(seconds) / len(seconds) * num_left / self._num_places)}"

    def _having(self, status: str) -> list[str]:
        return [name for name in self._runs if self._outcomes[name].status == status]

    def close(self, was_asked: bool) -> int:
        """Print a summary and return the exit code of the sweep."""
        finished, failed, pending = map(self._having, ("finished", "failed", "pending"))
        print(
            f"{len(finished)} finished, {len(failed)} failed, {len(pending)} to be done, in "
            f"{clock(time.monotonic() - self._start_time)}; {self._folder / 'sweep.csv'}"
        )
        for name in failed:
            print(f"  {name}: {self._outcomes[name].error} (log: {self._folder / 'logs' / name}.log)")
        if was_asked or pending:
            print(f"exit code {REQUEUE}: the same command continues the sweep", flush=True)
            return REQUEUE
        return 1 if failed else 0
