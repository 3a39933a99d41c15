"""Run the example of docs/."""

import re

from tests.conftest import HANGS, finish, start_python


def test_sharded_optimizer_in_a_loop_without_bitfleet() -> None:
    script = "docs/examples/sharded_optimizer.py"
    done = finish(start_python(script, num_ranks=2, OMP_NUM_THREADS="1"), [script], HANGS)
    assert done.returncode == 0, done.stdout
    accuracies = [int(percent) for percent in re.findall(r"accuracy (\d+)%", done.stdout)]
    assert len(accuracies) == 3
    assert accuracies[-1] >= 80
