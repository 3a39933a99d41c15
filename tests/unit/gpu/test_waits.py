import _thread
import threading
import traceback
import warnings
from traceback import FrameSummary

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.gpu.waits import PageableCopies, host_waits, place_of

CPU = torch.device("cpu")


def test_place_is_the_innermost_line_of_bitfleet() -> None:
    stack = [
        FrameSummary("/x/src/bitfleet/launch/train.py", 3, "train", line="trainer.train()"),
        FrameSummary("/x/src/bitfleet/trainer/trainer.py", 140, "step", line="facts.tolist()"),
        FrameSummary("/usr/lib/python3.12/site-packages/torch/_tensor.py", 7, "tolist", line="..."),
    ]
    assert place_of(stack) == "trainer/trainer.py:140 facts.tolist()"
    deepspeed = FrameSummary("/usr/site-packages/deepspeed/utils/timer.py", 238, "start", line="synchronize()")
    assert place_of([*stack, deepspeed]) == "deepspeed/utils/timer.py:238 synchronize()"
    assert place_of(traceback.extract_stack()[-1:]) == "elsewhere"


def test_waits_for_the_device_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: None)
    before = torch.cuda.synchronize
    done = threading.Event()

    def from_torch() -> None:
        torch.cuda.synchronize()
        done.set()

    with host_waits(CPU) as waits:
        torch.cuda.synchronize()
        torch.cuda.synchronize(0)
        loader = threading.Thread(target=torch.cuda.synchronize)
        loader.start()
        loader.join()
        _thread.start_new_thread(from_torch, ())  # as the threads of autograd, which Python did not make
        assert done.wait(10)
        torch.cuda.Event.synchronize(object())  # type: ignore[arg-type]
    assert sum(waits.syncs.values()) == 3
    assert sum(waits.events.values()) == 1
    assert torch.cuda.synchronize is before


def test_torchs_warnings_of_synchronisation_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode is set on the way in and taken back on the way out; other warnings are nobody's
    synchronisation."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with host_waits(torch.device("cuda", 0)) as waits:
        for message in ("called a synchronizing CUDA operation", "called a synchronizing CUDA operation", "other"):
            warnings.warn(message, UserWarning, stacklevel=1)
    assert modes == ["warn", "default"]
    assert dict(waits.syncs) == {"elsewhere": 2}
    assert not waits.events


def test_pageable_copies_are_counted() -> None:
    with FakeTensorMode():
        host = torch.ones(5)
        with PageableCopies() as copies:
            there = host.to("cuda")
            there.cpu()
            torch.empty(5).copy_(there)
            host.to(torch.float64)
            there.to(torch.float64)
            there.copy_(there.clone())
    assert sum(copies.places.values()) == 3
