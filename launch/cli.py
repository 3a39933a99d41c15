"""The command `bitfleet`."""

import difflib
import importlib

from bitfleet.launch.job import command_line, run

COMMANDS = {
    "train": "train a run on one rank; `bitfleet train --config NAME --help` lists its options",
    "launch": "start a run on all ranks and nodes, or print how SLURM, torchrun, ... do; `bitfleet launch --help`",
    "sweep": "run a sweep of configs/sweeps/, or list them with their questions; `bitfleet sweep --help`",
    "reproduce": "run the paper's experiments and judge them against its numbers; `bitfleet reproduce --help`",
    "evaluate": "print top-1 and top-5 of a run over every validation image, in one precision or several",
    "export": "write the network of a run for devices, as bits, ONNX or C; `bitfleet export --help`",
    "run": "classify images with an exported network, or evaluate it; `bitfleet run --help`",
    "data": "prepare, verify, resize and compare images, write a teacher's logits; `bitfleet data --help`",
    "checkpoint": "inspect, verify and compare checkpoints, write the model alone; `bitfleet checkpoint --help`",
    "journal": "rebuild the binary weights of any step from a run's flip journal; `bitfleet journal --help`",
    "doctor": "say whether a run would work here, and on these ranks; `bitfleet doctor --help`",
    "plan": "predict step time, images/s and hours on a cluster, and what binds; `bitfleet plan --help`",
    "advise": "say what a run's hyperparameters will do, or after it what they did; `bitfleet advise --help`",
    "bench": "measure bitfleet against bare loops; `bitfleet bench --help` lists the benchmarks",
    "report": "turn sweeps and runs into one HTML page with pictures; `bitfleet report --help`",
    "track": "check entries of the track of update rules and rank them; `bitfleet track --help`",
    "configs": "list the configurations that --config knows",
}


def usage() -> str:
    """Return the text of --help."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        f"usage: bitfleet COMMAND ...\n\nTrain binarized neural networks.\n\n{lines}\n\n"
        "More than one rank: deepspeed --num_accelerators N launch/train.py --config NAME (or torchrun)."
    )


def dispatch() -> None:
    """Run the command that the command line names.

    Raises:
        ValueError: there is no such command.
    """
    arguments = command_line()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    command, *rest = arguments
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no command {command!r}; did you mean `bitfleet {near}`?")
    if command == "configs":
        if rest:
            raise ValueError(f"bitfleet configs takes no arguments, not {rest[0]!r}; it lists what --config knows")
        from bitfleet.configs import available

        print("\n".join(available()))
        return
    # A command is the function of its name, in the file or folder of its name, which is imported
    # only now: torch takes seconds.
    module = {"train": "train", "evaluate": "evaluate", "launch": "cluster.command"}.get(command, f"{command}.command")
    function = getattr(importlib.import_module(f"bitfleet.launch.{module}"), command)
    function(rest)


def main() -> None:
    """Entry point of the command."""
    run(dispatch)


if __name__ == "__main__":
    main()
