"""The command `bitfleet`."""

import sys

from bitfleet.launch.environment import run

COMMANDS = {
    "train": "train a run on one rank; `bitfleet train --config NAME --help` lists its options",
    "launch": "start a run on all ranks and nodes, or print how SLURM, torchrun, ... do; `bitfleet launch --help`",
    "evaluate": "print top-1 and top-5 of a run over every validation image",
    "data": "prepare, verify, resize and compare images; `bitfleet data --help`",
    "checkpoint": "inspect, verify and compare checkpoints, write the model alone; `bitfleet checkpoint --help`",
    "doctor": "say whether a run would work here, and on these ranks; `bitfleet doctor --help`",
    "plan": "predict step time, images/s and hours on a cluster, and what binds; `bitfleet plan --help`",
    "bench": "measure bitfleet against bare loops; `bitfleet bench --help` lists the benchmarks",
    "report": "turn sweeps and runs into one HTML page with pictures; `bitfleet report --help`",
    "configs": "list the configurations that --config knows",
}


def usage() -> str:
    """The text of --help."""
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
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank=")]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    command, *rest = arguments
    if command == "train":
        from bitfleet.launch.train import train

        train(rest, prog="bitfleet train")
    elif command == "launch":
        from bitfleet.launch.launch import launch

        launch(rest)
    elif command == "evaluate":
        from bitfleet.launch.evaluate import evaluate

        evaluate(rest, prog="bitfleet evaluate")
    elif command == "data":
        from bitfleet.launch.data import data

        data(rest)
    elif command == "checkpoint":
        from bitfleet.launch.checkpoint import checkpoint

        checkpoint(rest)
    elif command == "doctor":
        from bitfleet.launch.doctor import doctor

        doctor(rest)
    elif command == "plan":
        from bitfleet.launch.plan import plan

        plan(rest)
    elif command == "bench":
        from bitfleet.launch.bench import bench

        bench(rest)
    elif command == "report":
        from bitfleet.launch.report import report

        report(rest)
    elif command == "configs":
        from bitfleet.configs import available

        print("\n".join(available()))
    else:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no command {command!r}; did you mean `bitfleet {near}`?")


def main() -> None:
    """Entry point of the command."""
    run(dispatch)


if __name__ == "__main__":
    main()
