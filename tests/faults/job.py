"""Train as launch/train.py, with one fault that the environment variable BITFLEET_FAULT describes.

BITFLEET_FAULT is a JSON object: "rank" that does "action" when "point" is reached in or after
"step". Points are the methods of a save ("write_tensors:before", "commit:after", ...), "step"
(before it), "backward" (after one of its two), "validation" (before it). BITFLEET_PROGRESS is a
file into which rank 0 writes the number of steps done; the time of the fault goes into a file next
to it. BITFLEET_STEP_SECONDS slows every step down.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfleet.launch.train import main
from bitfleet.trainer import train_step
from bitfleet.trainer import trainer as loop
from bitfleet.trainer.checkpoint.saver import Saver
from bitfleet.trainer.run.stop import StopWatcher, launcher_processes
from bitfleet.trainer.trainer import Trainer

SAVE_POINTS = ("begin", "write_tensors", "hash_files", "write_meta", "commit", "prune")
FAULT: dict[str, Any] = json.loads(os.environ.get("BITFLEET_FAULT", "{}"))
IS_HERE = FAULT.get("rank") == int(os.environ.get("RANK", "-1"))
step_now = 0


def act(trainer: Trainer | None = None) -> None:
    """Do the action of the fault, once."""
    action, FAULT["action"] = FAULT["action"], "none"
    if action != "none":
        Path(os.environ["BITFLEET_PROGRESS"] + ".fault").write_text(str(time.monotonic()))
    launcher = launcher_processes()
    targets = {"self": os.getpid(), "agent": launcher[0], "runner": launcher[-1]}
    kind, _, target = action.partition(":")
    if kind in ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1") and target in targets:
        os.kill(targets[target], getattr(signal, kind))
    elif action == "SIGKILL:all":
        os.killpg(0, signal.SIGKILL)
    elif action == "STOP file":
        assert trainer is not None
        (trainer.folder.path / "STOP").touch()
    elif action == "nan":
        assert trainer is not None
        spoil(trainer)
    elif action == "raise":
        raise RuntimeError("an error that nobody expects")
    elif action == "out of memory":
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ... 1 MiB is free. And so on"
        )
    elif action.startswith("fill:"):
        with Path(target, "filler").open("wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 12))
                    file.flush()
            except OSError:
                pass
    elif action.startswith("read-only:"):
        assert os.system(f"mount -o remount,bind,ro {target}") == 0
    else:
        assert action == "none", action


def spoil(trainer: Trainer) -> None:
    """Make one gradient of this rank NaN in the next backward pass."""
    parameter = dict(trainer.model.named_parameters())["blocks.2.conv.weight"]

    def on_gradient(gradient: Tensor) -> Tensor:
        handle.remove()
        return torch.full_like(gradient, float("nan"))

    handle = parameter.register_hook(on_gradient)


def around(name: str) -> None:
    """Call `reach` before and after a method of the saver."""
    method: Callable[..., Any] = getattr(Saver, name)

    def wrapped(self: Saver, *args: Any) -> Any:
        reach(f"{name}:before")
        result = method(self, *args)
        reach(f"{name}:after")
        return result

    setattr(Saver, name, wrapped)


def reach(point: str, trainer: Trainer | None = None) -> None:
    if IS_HERE and FAULT.get("point") == point and step_now >= FAULT["step"]:
        act(trainer)


def watch_backward_and_validation() -> None:
    backward, validate = train_step.backward, loop.validate

    def watched_backward(*args: Any) -> None:
        backward(*args)
        reach("backward")

    def watched_validate(*args: Any) -> Any:
        reach("validation")
        return validate(*args)

    train_step.backward, loop.validate = watched_backward, watched_validate


def watch_steps() -> None:
    method = Trainer.train_step

    def watched_step(self: Trainer) -> None:
        global step_now
        step_now = self.step
        reach("step", self)
        time.sleep(float(os.environ.get("BITFLEET_STEP_SECONDS", "0")))
        method(self)
        if self.ranks.is_main and "BITFLEET_PROGRESS" in os.environ:
            Path(os.environ["BITFLEET_PROGRESS"]).write_text(str(self.step))

    Trainer.train_step = watched_step  # type: ignore[method-assign]


def set_clock_back(seconds: float) -> None:
    real = time.time
    time.time = lambda: real() - seconds


if __name__ == "__main__":
    for point in SAVE_POINTS:
        around(point)
    watch_steps()
    watch_backward_and_validation()
    StopWatcher.__init__.__globals__["FILE_SECONDS"] = 0.0
    StopWatcher.__init__.__globals__["AGREE_SECONDS"] = 0.1  # the run has 30 steps of 40 ms
    if "clock_back" in FAULT:
        set_clock_back(FAULT["clock_back"])
    main()
