"""Show the progress of a run: a bar on a terminal, plain lines in a file."""

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 10.0
"""Seconds between two lines in a file."""


class Progress:
    """Shown by rank 0 only."""

    def __init__(self, *, start_step: int, num_steps: int, steps_per_epoch: int, visible: bool) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._num_steps = num_steps
        self._visible = visible
        self._start_step, self._start = start_step, time.monotonic()
        self._last_line = -LINE_SECONDS
        self._bar = tqdm(
            total=num_steps,
            initial=start_step,
            disable=not visible or not sys.stderr.isatty(),
            unit="step",
            dynamic_ncols=True,
            bar_format="{desc} |{bar}| step {n_fmt}/{total_fmt}{postfix} ETA {remaining}",
        )

    def update(
        self,
        step: int,
        *,
        loss: float | None,
        top1: float,
        images_per_second: float,
        flip_ratio: float | None,
        num_skipped: int = 0,
    ) -> None:
        """Show the state after `step` optimizer steps.

        Args:
            step: done so far.
            loss: mean since the last report; None where every step since then was skipped.
            top1: likewise.
            images_per_second: since the last report.
            flip_ratio: of the last step, if it is known.
            num_skipped: steps of the run that were skipped because a gradient was not finite.
        """
        num_epochs = -(-self._num_steps // self._steps_per_epoch)
        epoch = f"epoch {(step - 1) // self._steps_per_epoch + 1}/{num_epochs}"
        flips = "" if flip_ratio is None else f" flips {flip_ratio:.1e}"
        means = "no step made" if loss is None else f"loss {loss:.3f} top-1 {top1:.1%}"
        skipped = f" {num_skipped:,} skipped" if num_skipped else ""
        state = f"{means} {images_per_second:,.0f} images/s{flips}{skipped}"
        if not self._bar.disable:
            self._bar.set_description_str(epoch, refresh=False)
            self._bar.set_postfix_str(state, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._visible and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            seconds = (self._last_line - self._start) / max(step - self._start_step, 1) * (self._num_steps - step)
            eta = f"{int(seconds // 3600)}:{int(seconds // 60) % 60:02d}:{int(seconds) % 60:02d}"
            print(f"{epoch} step {step}/{self._num_steps} {state} ETA {eta}", flush=True)

    def say(self, text: str) -> None:
        """Print `text` above the bar."""
        if self._visible:
            tqdm.write(text)
            sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
