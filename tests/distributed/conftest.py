"""Collect on_ranks/ only inside of a job."""

import os

collect_ignore = [] if "WORLD_SIZE" in os.environ else ["on_ranks"]
