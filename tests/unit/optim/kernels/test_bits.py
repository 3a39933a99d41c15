import numpy as np
import pytest
import torch

from bitfleet.optim.kernels import bits as bits_module
from bitfleet.optim.kernels import kernels
from bitfleet.optim.kernels.bits import pack_signs, popcount, unpack_changed, unpack_signs

TYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(params=["kernel", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations, the kernel on several threads whatever the size."""
    if request.param == "torch":
        monkeypatch.setattr(bits_module, "kernel_library", lambda: None)
    elif kernels.kernel_library() is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(bits_module, "num_threads", lambda numel: 3)
    return str(request.param)


def signs(numel: int) -> torch.Tensor:
    return torch.randint(0, 2, (numel,), generator=torch.Generator().manual_seed(numel)).double() * 2 - 1


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("numel", [0, 8, 24, 64, 1000, 40_000])
def test_round_trip(numel: int, dtype: torch.dtype) -> None:
    weights = signs(numel).to(dtype)
    bits = pack_signs(weights)
    assert bits.tolist() == np.packbits(weights.float().numpy() > 0, bitorder="little").tolist()
    out = torch.full((numel,), 7, dtype=dtype)
    assert unpack_signs(bits, out) is out
    assert torch.equal(out, weights)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", TYPES)
def test_least_significant_bit_first(dtype: torch.dtype) -> None:
    for i in range(80):
        weights = -torch.ones(80, dtype=dtype)
        weights[i] = 1
        bits = pack_signs(weights)
        assert bits[i // 8] == 1 << i % 8
        assert bits.sum() == 1 << i % 8
        assert torch.equal(unpack_signs(bits, torch.empty_like(weights)), weights)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", TYPES)
def test_values_that_are_not_signs(dtype: torch.dtype) -> None:
    weights = torch.tensor([0.0, -0.0, 1e-38, -1e-38, float("inf"), -float("inf"), float("nan"), 3.0], dtype=dtype)
    assert pack_signs(weights).item() == 0b10010111


@pytest.mark.usefixtures("path")
def test_slices_of_larger_buffers() -> None:
    weights, bits, out = signs(1003).float(), torch.zeros(131, dtype=torch.uint8), torch.zeros(1003)
    part = bits[3:128]
    assert pack_signs(weights[3:], part) is part
    unpack_signs(part, out[1:1001])
    assert torch.equal(out[1:1001], weights[3:])
    assert not out[0]
    assert not out[1001:].any()
    assert not bits[:3].any()
    assert not bits[128:].any()


def test_bad_tensors() -> None:
    with pytest.raises(ValueError, match="weights .*multiple of 8"):
        pack_signs(torch.ones(9))
    with pytest.raises(ValueError, match=r"weights .*\[4, 4\]"):
        pack_signs(torch.ones(4, 4))
    with pytest.raises(ValueError, match="out "):
        unpack_signs(torch.zeros(2, dtype=torch.uint8), torch.ones(32)[::2])
    with pytest.raises(ValueError, match="out "):
        unpack_signs(torch.zeros(2, dtype=torch.uint8), torch.ones(16, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"bits .*\[2\].* torch.uint8"):
        unpack_signs(torch.zeros(3, dtype=torch.uint8), torch.ones(16))
    with pytest.raises(ValueError, match="bits .*meta, weights .*cpu"):
        pack_signs(torch.ones(16), torch.zeros(2, dtype=torch.uint8, device="meta"))


@pytest.mark.parametrize("numel", [0, 1, 8, 767, 8000])
def test_popcount_counts_every_bit(numel: int) -> None:
    """Also of a view, and of words whose highest bit is set."""
    packed = np.random.default_rng(0).integers(0, 256, 16 + numel, dtype=np.uint8)
    packed[16:24], packed[24:32] = 255, 0
    assert int(popcount(torch.from_numpy(packed)[16:])) == int(np.unpackbits(packed[16:]).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("numel", [8, 56, 64, 72, 1000, 600_000])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3])
def test_only_what_changed_is_written(numel: int, share: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(numel)
    before = torch.randn(numel, generator=generator).sign().to(dtype)
    after = torch.where(torch.rand(numel, generator=generator) < share, -before, before)
    bits = pack_signs(after)
    changed = pack_signs(before) ^ bits
    assert torch.equal(unpack_changed(changed, bits, before), after)
    if dtype != torch.float64:  # which has no kernel: all is written
        untouched = torch.full((numel,), 7.0, dtype=dtype)
        unpack_changed(torch.zeros_like(changed), bits, untouched)
        assert (untouched == 7.0).all()
    with pytest.raises(ValueError, match="bits .*contiguous"):
        unpack_changed(changed[:-1], bits, before)
