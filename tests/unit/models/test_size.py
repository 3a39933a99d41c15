from torch import nn

from bitfleet.models.size import layer_macs


def test_every_kind_of_convolution_counts() -> None:
    across, back = nn.Conv1d(3, 4, 5, bias=False), nn.ConvTranspose1d(4, 2, 3, stride=2, bias=False)
    assert layer_macs(nn.Sequential(across, back), (3, 20)) == {across: 4 * 16 * 3 * 5, back: 4 * 16 * 2 * 3}


def test_a_network_without_parameters_has_no_macs() -> None:
    assert layer_macs(nn.Flatten(), (3, 4, 4)) == {}
