"""`python -m bitfleet.launch COMMAND ...`: the command `bitfleet` for launchers of many ranks."""

from bitfleet.launch.cli import main

main()
