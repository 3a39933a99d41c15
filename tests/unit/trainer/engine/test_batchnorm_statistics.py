import pytest
import torch
from torch import Tensor, nn

from bitfleet.models import BatchNorm
from bitfleet.trainer.engine.batchnorm_statistics import RunningStatistics


def network() -> nn.Sequential:
    torch.manual_seed(0)
    norms = BatchNorm(4, momentum=0.99, eps=1e-3), BatchNorm(3, momentum=0.9, eps=1e-3)
    model = nn.Sequential(nn.Conv2d(3, 4, 2), norms[0], nn.Dropout(0.9), nn.Flatten(), nn.Linear(36, 3), norms[1])
    return model.double()


def images(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2)]


@pytest.mark.usefixtures("process_group")
def test_precise_statistics_are_means_over_the_batches_of_the_present_weights() -> None:
    model = network()
    statistics = RunningStatistics(model, 2)
    steps = [images(number) for number in range(3)]
    model(steps[0][0])  # of other weights
    with torch.no_grad():
        model[0].weight.neg_()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    outputs = [model[0](batch) for step in steps for batch in step]
    means = torch.stack([output.mean((0, 2, 3)) for output in outputs])
    variances = torch.stack([output.transpose(0, 1).flatten(1).var(1) for output in outputs])
    with statistics.precise(model, steps, model):
        assert model.training
        assert torch.allclose(model[1].running_mean, means.mean(0))
        assert torch.allclose(model[1].running_var, variances.mean(0))  # Keras' variance of images is unbiased
        rows = [
            model[4](((output - mean[:, None, None]) / (biased + 1e-3).sqrt()[:, None, None]).flatten(1))
            for output, mean, biased in zip(outputs, means, variances * 44 / 45, strict=True)
        ]  # without dropout
        assert torch.allclose(model[5].running_mean, torch.stack([row.mean(0) for row in rows]).mean(0))
        biased = torch.stack([row.var(0, correction=0) for row in rows])
        assert torch.allclose(model[5].running_var, biased.mean(0))
    after = model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert (model[1].momentum, model[5].momentum) == (0.01, 0.1)


def test_without_images_or_batch_normalization_nothing_changes() -> None:
    model = network()
    with RunningStatistics(model, 1).precise(model, [], model):
        assert torch.equal(model[1].running_mean, torch.zeros(4))
    plain = nn.Sequential(nn.Linear(2, 2))
    with RunningStatistics(plain, 1).precise(plain, [[torch.ones(1, 2)]], pytest.fail):
        pass


def test_no_statistics_lie_where_the_network_is() -> None:
    """Ranks exchange them, and NCCL takes no CPU tensor."""
    statistics = RunningStatistics(nn.Linear(2, 2, device="meta"), 1)
    assert statistics._read().device.type == "meta"
