import pytest
import torch

from bitfleet.models.bits import pack_bits, unpack_bits


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 63, 64, 65, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_of_any_length(numel: int, dtype: torch.dtype) -> None:
    flags = torch.rand(numel) < 0.5
    bits, layout = pack_bits(flags)
    assert bits.dtype == torch.uint8
    assert bits.numel() == (numel + 7) // 8
    values = unpack_bits(bits, layout, low=-1.0, high=1.0, dtype=dtype)
    assert values.dtype == dtype
    assert torch.equal(values, torch.where(flags, 1.0, -1.0).to(dtype))


def test_every_byte_least_significant_bit_first() -> None:
    flags = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1 == 1
    bits, _ = pack_bits(flags)
    assert bits.tolist() == list(range(256))


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (4, 16, 8, 8), (1, 1, 3, 3), (3, 5, 1, 1)])
def test_channels_last_keeps_its_strides(shape: tuple[int, ...]) -> None:
    flags = (torch.rand(shape) < 0.5).to(memory_format=torch.channels_last)
    values = unpack_bits(*pack_bits(flags), low=0.0, high=1.0, dtype=torch.float32)
    assert values.stride() == flags.stride()
    assert torch.equal(values, flags.float())


def test_strided_and_unaligned_views() -> None:
    storage = torch.rand(200) < 0.5
    for flags in (storage[3:131], storage[:128].view(8, 16).t(), storage[::2]):
        values = unpack_bits(*pack_bits(flags), low=0.0, high=1.0, dtype=torch.float32)
        assert torch.equal(values, flags.float())
