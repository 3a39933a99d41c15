"""`bitfleet data teach` with a shard per micro-batch, to be killed between two."""

from bitfleet.launch.data.command import data
from bitfleet.launch.job import command_line, run
from bitfleet.trainer.distillation import cache

cache.SHARD_BYTES = 1

if __name__ == "__main__":
    run(lambda: data(["teach", *command_line()]))
