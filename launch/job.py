"""Ranks from the environment, and what happens to a job when one of them fails."""

import contextlib
import datetime
import errno
import io
import os
import random
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from bitfleet.launch.cluster.places import place_from, rank_of
from bitfleet.launch.home import have_home
from bitfleet.trainer.ranks.exit_codes import CRASH, USER_ERROR, error_line

if TYPE_CHECKING:  # torch takes seconds to import; a misspelt option should not wait for it
    import torch

    from bitfleet.trainer.config import TrainConfig
    from bitfleet.trainer.ranks.collectives import Ranks

FIRST_RANK_SPEAKS_SECONDS = 3.0
LOST_PEER_SECONDS = 25.0
"""Seconds that a rank whose collective failed waits for the reason; longer than the heartbeat waits
for a silent rank."""


def ranks_of_process() -> "Ranks":
    """Return the place of this process for any launcher; without a launcher it is a job of one
    rank.

    torch and DeepSpeed read the place from the environment, which is completed for them.

    Raises:
        ValueError: variables are missing or contradict each other.
    """
    from bitfleet.trainer.ranks.collectives import Ranks

    place = place_from(os.environ)
    ranks = Ranks(
        place.rank,
        place.world_size,
        place.local_rank,
        place.local_world_size,
        master_addr=place.master_addr,
        master_port=place.master_port or free_port(),
        launched=place.launcher not in ("alone", "by hand"),  # the shell that started it may close while it runs on
    )
    os.environ |= {
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.world_size),
        "LOCAL_RANK": str(ranks.local_rank),
        "LOCAL_WORLD_SIZE": str(ranks.local_world_size),
        "MASTER_ADDR": ranks.master_addr,
        "MASTER_PORT": str(ranks.master_port),
    }
    return ranks


def free_port() -> int:
    """Return a free TCP port of this machine that no other process gets by chance.

    It is bound seconds later, when torch is imported. Linux never assigns ports below 32768 by
    itself; those of launch/cluster/places.py and torch's own lie below 30000.
    """
    while True:
        port = random.SystemRandom().randrange(30_000, 32_768)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


def command_line() -> list[str]:
    """Return the words after the program's name, without the one that DeepSpeed's launcher adds."""
    return [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def is_main_rank() -> bool:
    """Return True if this process is rank 0 (or alone)."""
    return rank_of(os.environ) == 0


@contextlib.contextmanager
def job(device_name: str, config: "TrainConfig | None" = None) -> Iterator[tuple["Ranks", "torch.device"]]:
    """Join this process to its job as a rank; gives the ranks and the device, inside the process
    group.

    Args:
        device_name: "auto", "cpu" or "gpu".
        config: of the run, if there is one: it must be the same on every rank, and says precision,
            threads and timeout.

    Raises:
        ValueError: "gpu" without CUDA; a precision that the device does not have; a rank that does
            not come, or that differs from rank 0.
    """
    ranks = ranks_of_process()
    from bitfleet.trainer.engine.arithmetic import use_arithmetic
    from bitfleet.trainer.engine.config import EngineConfig
    from bitfleet.trainer.ranks.collectives import COLLECTIVE_TIMEOUT, choose_device, use_device
    from bitfleet.trainer.ranks.membership import membership
    from bitfleet.trainer.run.versions import versions

    device = choose_device(device_name, ranks)
    use_arithmetic(device, config.engine if config else EngineConfig())
    use_device(device, ranks, config.num_threads if config else None)
    timeout = datetime.timedelta(minutes=config.engine.collective_timeout_minutes) if config else COLLECTIVE_TIMEOUT
    with membership.join(ranks, device, versions(), same_on_all_hosts(config) if config else {}, timeout) as ranks:
        yield ranks, device


def same_on_all_hosts(config: "TrainConfig") -> dict[str, Any]:
    """Return `config` as JSON types, without the fields that may differ between hosts."""
    from bitfleet.trainer.config import TrainConfig, to_dict
    from bitfleet.trainer.run.roles import fields_with_role

    resolved = to_dict(config)
    for name in fields_with_role(TrainConfig, "host"):
        section, _, key = name.partition(".")
        del resolved[section][key]
    return resolved


class _Lasting(io.FileIO):
    """Output whose reader may end first: what is written after that is lost without an error."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            return len(data)


def _outlive_the_terminal() -> None:
    """Keep output from ending the process: a rank whose launcher or `tee` died still has to save,
    `| head` is not an error, and a path may have bytes that the terminal's encoding lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell
            continue
        stream.flush()
        lasting = io.BufferedWriter(_Lasting(stream.fileno(), "wb", closefd=False))
        errors = "backslashreplace" if stream.errors == "strict" else stream.errors
        setattr(sys, name, io.TextIOWrapper(lasting, stream.encoding, errors, line_buffering=True))


def run(main: Callable[[], None]) -> NoReturn:
    """Run `main` and exit.

    ValueError and FloatingPointError are reported in one line, with exit code 2; anything else with
    a traceback and 1. An error that is raised on every rank is printed by rank 0 only: the others
    wait until the launcher has ended them. An error of a single rank is printed by that rank. The
    process exits without waiting for peers, which may be stuck in a collective.
    """
    have_home(os.environ)
    threading.excepthook = _thread_failed
    _outlive_the_terminal()
    try:
        main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else USER_ERROR if leaving.code else 0
        if code and not is_main_rank():
            time.sleep(FIRST_RANK_SPEAKS_SECONDS)
        _leave(code)
    except KeyboardInterrupt:
        _leave(130)
    except BaseException as error:
        _fail(error)
    _leave(0)


def _fail(error: BaseException) -> NoReturn:
    error = _in_a_sentence(error)
    if isinstance(error, ValueError | FloatingPointError) or _is_refused_by_disk(error) or _is_disagreement(error):
        if not is_main_rank():
            _leave_with_others(FIRST_RANK_SPEAKS_SECONDS)
            _tell_others(USER_ERROR)
        message = " ".join(str(error).split())
        if os.environ.get("BITFLEET_DEBUG"):
            traceback.print_exception(error)
        print(error_line(message, _who()), file=sys.stderr, flush=True)
        if is_main_rank():
            _tell_others(USER_ERROR)
        _leave(USER_ERROR)
    from bitfleet.trainer.ranks.collectives import is_lost_peer
    from bitfleet.trainer.ranks.rendezvous import PeerFailed

    if isinstance(error, PeerFailed):
        _leave(error.code)
    if is_lost_peer(error):
        # Another rank prints the cause, if it is known.
        _leave_with_others(LOST_PEER_SECONDS)
        print(error_line(f"lost its peers: {error}", _who()), file=sys.stderr, flush=True)
    else:
        print(error_line(f"{type(error).__name__}: {error}", _who()), file=sys.stderr)
        traceback.print_exception(error)
    _tell_others(CRASH)
    _leave(CRASH)


def _who() -> str:
    """Return this rank, and its host if the job has several, for a message; "" for rank 0 of one
    host."""
    if _is_on_many_hosts():
        return f" (rank {rank_of(os.environ)} on {socket.gethostname()})"
    return "" if is_main_rank() else f" (rank {rank_of(os.environ)})"


def _is_on_many_hosts() -> bool:
    local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return local_size is not None and local_size != os.environ.get("WORLD_SIZE")


def _leave_with_others(seconds: float) -> None:
    """Exit silently if another rank fails within `seconds`, which prints why."""
    if "bitfleet.trainer.ranks.membership" not in sys.modules:
        time.sleep(seconds)
        return
    from bitfleet.trainer.ranks.membership import membership

    if (code := membership.others_failed(seconds)) is not None:
        _leave(code)


def _tell_others(code: int) -> None:
    """Tell the other ranks that this one fails, as the launcher of another host does not. Exit if
    one of them was first."""
    if "bitfleet.trainer.ranks.membership" not in sys.modules and not _is_on_many_hosts():
        return
    from bitfleet.trainer.ranks.membership import membership

    if membership.is_watched or _is_on_many_hosts():
        first = membership.leave(code, ranks_of_process())
        if first is not None:
            _leave(first)


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Stay silent on a full disk in TensorBoard's writer thread: it is raised again in the main
    thread, which reports it."""
    if failure.exc_value is None or not _is_refused_by_disk(failure.exc_value):
        threading.__excepthook__(failure)


def _in_a_sentence(error: BaseException) -> BaseException:
    """Return a ValueError if memory has run out, of a GPU or of the machine; every other error as
    it is."""
    if "torch" in sys.modules:
        from bitfleet.trainer.run.out_of_memory import is_out_of_memory, out_of_memory

        if is_out_of_memory(error):
            sentence = ValueError(
                f"{out_of_memory(error)}: use smaller batches, or more --num_replicas, or a machine or GPU that "
                "nothing else uses"
            )
            sentence.__cause__ = error
            return sentence
    return error


def _is_refused_by_disk(error: BaseException) -> bool:
    """Return True if a disk is full, over its quota, read-only or closed to this user: for the user
    to fix, and named in the message."""
    refusals = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
    return isinstance(error, OSError) and error.errno in refusals


def _is_disagreement(error: BaseException) -> bool:
    """Return True if the ranks found that their weights differ: the message is complete."""
    from bitfleet.optim.sharding.verify_weights import WeightsDiffer

    return isinstance(error, WeightsDiffer)


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    # Destructors of a process group or of DALI may wait for others indefinitely, and those of gloo
    # sometimes abort a process even though its group is destroyed ("terminate called without an
    # active exception"): a run that ended well must not end so.
    os._exit(code)
