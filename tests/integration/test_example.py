"""The example of docs/ does what it says."""

import re

from tests.conftest import BIN, free_port, run_command


def test_sharded_optimizer_in_a_loop_of_ones_own() -> None:
    launcher = [BIN / "torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = run_command([*launcher, "docs/examples/sharded_optimizer.py"], timeout=60)
    assert done.returncode == 0, done.stdout
    accuracies = [int(percent) for percent in re.findall(r"accuracy (\d+)%", done.stdout)]
    assert len(accuracies) == 3
    assert accuracies[-1] >= 80
