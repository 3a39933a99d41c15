"""The flip journal of a small optimizer on one rank: every step's weights, what kills and disks do
to it, and its commands."""

import dataclasses
import errno
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bitfleet.configs import load_config
from bitfleet.launch.journal import tools as journal_tools
from bitfleet.launch.journal.command import journal
from bitfleet.launch.journal.reader import covered, part_of, read_parts, weights_after
from bitfleet.optim import Bop, ShardedOptimizer
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.tensors import tensors_to_save, unpacked
from bitfleet.trainer.config import to_dict
from bitfleet.trainer.journal import writer as journal_writer
from bitfleet.trainer.journal.format import FOLDER, FRAME_BYTES, SIGNS
from bitfleet.trainer.journal.writer import JournalWriter, open_journal
from bitfleet.trainer.ranks.collectives import Ranks
from bitfleet.trainer.run.folder import write_config

pytestmark = pytest.mark.usefixtures("process_group")
ALONE = Ranks(0, 1, 0, 1)
SHAPES = {"a": (10, 13), "b": (300, 70), "c": (5,)}


class Loop:
    """Three binary parameters in two buckets whose gradients are random; keeps the weights after
    every step."""

    def __init__(self, *, defers: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.params = {name: nn.Parameter(self._random(shape).sign()) for name, shape in SHAPES.items()}
        self.model = nn.ParameterDict(self.params)
        for param in self.params.values():
            param.binary = True  # type: ignore[attr-defined]
        group = {"params": list(self.params.values()), "param_names": list(self.params)}
        self.sharded = ShardedOptimizer(Bop([group], gamma=0.05, threshold=0.02), bucket_numel=21_100, defers=defers)
        assert len(self.sharded.buckets) == 2
        self.weights = {0: self.copy()}

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def copy(self) -> dict[str, Tensor]:
        return {name: param.detach().clone() for name, param in self.params.items()}

    def steps(self, count: int, *, skip: tuple[int, ...] = ()) -> None:
        """Make steps; in those of the numbers `skip` a gradient is not finite."""
        for _ in range(count):
            scale = float("nan") if self.sharded.num_steps + 1 in skip else 1.0
            loss = sum((param * self._random(SHAPES[name]) * scale).sum() for name, param in self.params.items())
            assert isinstance(loss, Tensor)
            loss.backward()
            self.sharded.step()
            self.weights[self.sharded.num_steps] = self.copy()

    def go_back(self, step: int) -> None:
        """As a resumed run does."""
        for name, param in self.params.items():
            param.data.copy_(self.weights[step][name])
        self.sharded.load_steps(self.sharded.steps(), step, 0)


@pytest.fixture
def loop(request: pytest.FixtureRequest) -> Iterator[Loop]:
    made = Loop(defers=getattr(request, "param", False))
    yield made
    made.sharded.close()


@pytest.fixture(autouse=True)
def signs_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_writer, "SIGNS_EVERY", 5)


def start(run: Path, loop: Loop, *, enabled: bool = True) -> JournalWriter:
    opened = open_journal(enabled, run, ALONE, loop.sharded)
    assert opened is not None
    return opened


def assert_same(run: Path, loop: Loop, steps: range) -> None:
    for step in steps:
        bits, shapes = weights_after(run, step)
        assert shapes == {name: list(shape) for name, shape in SHAPES.items()}
        for name, mine in bits.items():
            assert torch.equal(unpacked(mine, shapes[name]), loop.weights[step][name]), (step, name)


@pytest.mark.parametrize("loop", [False, True], indirect=True, ids=["waits", "defers"])
def test_every_step_comes_back(tmp_path: Path, loop: Loop) -> None:
    """Also the first weights, and steps that were skipped: in a row, and the last before a
    flush."""
    writer = start(tmp_path, loop)
    loop.steps(50, skip=(3, 4, 10))
    writer.flush()
    loop.steps(2, skip=(51, 52))
    writer.close()
    assert loop.sharded.num_skipped_steps == 5
    assert not loop.sharded.observers
    assert_same(tmp_path, loop, range(53))
    (part,) = read_parts(tmp_path)
    frames = part.files[0].frames
    assert len([frame for frame in frames if frame.kind == SIGNS]) > 2  # reading begins in the middle as well
    differing = sum(
        int((loop.weights[step][name] != loop.weights[step - 1][name]).sum())
        for step in range(1, 53)
        for name in SHAPES
    )
    assert sum(frame.num_flips for frame in frames) == differing > 0
    text = journal_tools.info(tmp_path)
    assert "steps 0 to 52" in text
    assert "21,135 binary weights; 5 steps skipped" in text
    assert f"{differing / 52:,.1f}" in text.splitlines()[-3]


def test_next_part_takes_over(tmp_path: Path, loop: Loop) -> None:
    """Resumed at 20, gone back to 5 (its checkpoint was damaged), continued without a journal, and
    with one again."""
    for begin, end in ((0, 23), (20, 30), (5, 12)):
        loop.go_back(begin)
        writer = start(tmp_path, loop)
        loop.steps(end - begin)
        writer.close()
    assert_same(tmp_path, loop, range(13))
    with pytest.raises(ValueError, match="step 13.*0 to 12"):
        weights_after(tmp_path, 13)
    assert open_journal(False, tmp_path, ALONE, loop.sharded) is None
    loop.steps(3)
    writer = start(tmp_path, loop)
    loop.steps(2)
    writer.close()
    assert covered(read_parts(tmp_path)) == "0 to 12, 15 to 17"
    assert_same(tmp_path, loop, range(13))
    assert_same(tmp_path, loop, range(15, 18))
    assert "none from 12 on" in journal_tools.info(tmp_path)
    assert open_journal(False, tmp_path / "other", ALONE, loop.sharded) is None
    assert not (tmp_path / "other").exists()


def test_a_step_that_was_skipped_is_made_again(tmp_path: Path, loop: Loop) -> None:
    """As after a stop at a gradient that is not finite: the new part counts, whether the old one
    tells of the step or not."""
    for begin, told in ((0, True), (5, False)):
        writer = start(tmp_path, loop)
        loop.steps(6, skip=(begin + 6,))
        loop.sharded.num_steps -= not told
        writer.close()
        assert read_parts(tmp_path)[-1].last_step == begin + 5 + told
        loop.go_back(begin + 5)
    writer = start(tmp_path, loop)
    loop.steps(3)
    writer.close()
    assert any((loop.weights[11][name] != loop.weights[10][name]).any() for name in SHAPES)
    assert covered(read_parts(tmp_path)) == "0 to 13"
    assert not any(part.gap for part in read_parts(tmp_path))
    assert_same(tmp_path, loop, range(14))
    assert "; 0 steps skipped" in journal_tools.info(tmp_path)


def test_cut_off_and_damaged_files(tmp_path: Path, loop: Loop) -> None:
    """A kill cuts the last frame off; anything else is damage and named, and what lies before or
    behind it is still read."""
    writer = start(tmp_path, loop)
    loop.steps(40)
    writer.close()
    (part,) = read_parts(tmp_path)
    (path,), frames = [file.path for file in part.files], part.files[0].frames
    whole = path.read_bytes()
    at = {frame.step: frame for frame in frames if frame.kind != SIGNS}
    for cut in (at[40].offset + at[40].length - 1, at[40].offset - 3, at[40].offset - FRAME_BYTES):
        path.write_bytes(whole[:cut])
        assert_same(tmp_path, loop, range(38, 40))
        (part,) = read_parts(tmp_path)
        assert (part.last_step, part.gap) == (39, "")
    signs = next(frame for frame in frames if frame.kind == SIGNS and 0 < frame.step < 40)
    path.write_bytes(changed(whole, at[signs.step - 1].offset))
    with pytest.raises(ValueError, match=f"damaged.* step {signs.step - 1} "):
        weights_after(tmp_path, signs.step - 1)
    assert_same(tmp_path, loop, range(signs.step, 41))
    path.write_bytes(changed(whole, at[20].offset - FRAME_BYTES))
    assert_same(tmp_path, loop, range(20))
    with pytest.raises(ValueError, match=r"step 25.* 0 to 19 \(.* damaged at byte .*step 19"):
        weights_after(tmp_path, 25)
    path.write_bytes(whole[: at[20].offset - FRAME_BYTES] + whole[at[20].offset + at[20].length :])
    with pytest.raises(ValueError, match="step 21 .*step 20"):
        weights_after(tmp_path, 25)
    path.rename(path.with_name(path.name.replace("rank-00000-of-00001", "rank-00001-of-00003")))
    with pytest.raises(ValueError, match="part 1 .*rank 0, 2 of 3"):
        weights_after(tmp_path, 25)
    with pytest.raises(ValueError, match="other has no flip journal.*--journal.enabled True"):
        read_parts(tmp_path / "other")


def changed(content: bytes, byte: int) -> bytes:
    return content[:byte] + bytes([content[byte] ^ 1]) + content[byte + 1 :]


def test_missing_part_of_a_later_start_does_not_hide_the_others(tmp_path: Path, loop: Loop) -> None:
    writer = start(tmp_path, loop)
    loop.steps(5)
    writer.close()
    (tmp_path / FOLDER / "part-0002-step-00000004-rank-00001-of-00002.journal").touch()
    parts = read_parts(tmp_path)
    assert_same(tmp_path, loop, range(5))
    with pytest.raises(ValueError, match=r"step 5.* 0 to 4 \(part 2 .*rank 0 of 2"):
        part_of(parts, 5)
    with pytest.raises(ValueError, match="part 2 "):
        journal_tools.verified(tmp_path)


class FullDisk(io.RawIOBase):
    """A file that takes no more."""

    def write(self, _: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk(tmp_path: Path, loop: Loop) -> None:
    writer = start(tmp_path, loop)
    loop.steps(3)
    writer.flush()
    writer._file.close()
    writer._file = FullDisk()  # type: ignore[assignment]
    sentence = "rank-00000-of-00001.journal .*No space left on device"
    with pytest.raises(ValueError, match=sentence):
        loop.steps(200)
    with pytest.raises(ValueError, match=sentence):
        writer.close()
    assert_same(tmp_path, loop, range(4))
    shutil.rmtree(tmp_path / FOLDER)
    (tmp_path / FOLDER).touch()
    with pytest.raises(ValueError, match="journal .*File exists"):
        start(tmp_path, loop)


def test_mark_of_the_end_that_cannot_be_written(tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_journal(False, tmp_path, ALONE, loop.sharded) is None  # there is no journal to be marked
    start(tmp_path, loop).close()

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(ValueError, match="journal: No space left on device"):
        open_journal(False, tmp_path, ALONE, loop.sharded)


def test_verify_finds_a_flipped_bit(tmp_path: Path, loop: Loop) -> None:
    def save(step: int) -> None:
        tensors = tensors_to_save(loop.model, loop.sharded, ALONE)
        checkpoint_tensors.write(tensors, tmp_path / "checkpoints" / f"step-{step:08d}", None)

    writer = start(tmp_path, loop)
    loop.steps(4)
    save(4)
    loop.steps(36)
    save(40)
    writer.close()
    save(99)
    lines = journal_tools.verified(tmp_path).splitlines()
    assert [line.rsplit("/", 1)[-1] for line in lines[:3]] == [
        "step-00000004: the same bits",
        "step-00000040: the same bits",
        "step-00000099: the journal does not have its step",
    ]
    assert lines[3] == "every frame of 40 steps is as it was written"
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000040")
    loop.params["b"].data[1, 5] *= -1
    loop.sharded.read_weights()
    save(40)
    value = int(loop.weights[40]["b"][1, 5])
    with pytest.raises(ValueError, match=f"bits.b .*element 75: {value} and {-value} "):
        journal_tools.verified(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"steps \[\].* 0 to 40"):
        journal_tools.verified(tmp_path)


def test_without_bits_there_is_no_journal(tmp_path: Path) -> None:
    param = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="journal.enabled is True.*bits"):
        open_journal(True, tmp_path, ALONE, torch.optim.SGD([param], lr=0.1))
    assert not (tmp_path / FOLDER).exists()


def test_commands(tmp_path: Path, loop: Loop, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    write_config(run, to_dict(dataclasses.replace(load_config("fashion_quickstart"), run_dir=run)), {})
    writer = start(run, loop)
    loop.steps(6)
    writer.close()
    journal(["weights", str(run), "--step", "4"])
    assert "3 binary tensors" in capsys.readouterr().out
    for name, mine in load_file(run / "weights-00000004.safetensors").items():
        assert torch.equal(mine, loop.weights[4][name])
    out = tmp_path / "packed.safetensors"
    journal(["weights", str(run), "--step=0", "--packed", "--output", str(out)])
    packed = load_file(out)
    assert packed.keys() == {"bits.a", "bits.b", "bits.c"}
    assert torch.equal(unpacked(packed["bits.b"], SHAPES["b"]), loop.weights[0]["b"])
    length = int.from_bytes(out.read_bytes()[:8], "little")
    assert json.loads(out.read_bytes()[8 : 8 + length])["__metadata__"]["step"] == "0"
    journal(["info", str(run)])
    assert "steps 0 to 6" in capsys.readouterr().out
    for arguments, sentence in (
        (["weigths", "RUN"], "'weigths' .*weights, info, verify"),
        (["weights", "RUN"], "--step"),
        (["weights", "RUN", "--step", "x"], "--step.*'x'"),
        (["info", "RUN", "--step"], "no option --step"),
        (["verify"], "Folder of the run"),
        (["verify", "RUN", "OTHER"], "'OTHER'"),
        (["weights", str(run), "--step", "1", "--output", str(tmp_path / "x.bin")], "x.safetensors.*x.bin"),
        (["weights", str(run), "--step", "7"], "step 7.*0 to 6"),
        (["weights", str(run), "--step", "-1"], "step -1.*0 to 6"),
    ):
        with pytest.raises(ValueError, match=sentence):
            journal(arguments)
    with pytest.raises(SystemExit) as leaving:
        journal(["--help"])
    assert not leaving.value.code
    assert "usage: bitfleet journal" in capsys.readouterr().out
