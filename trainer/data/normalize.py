"""From the bytes that a loader gives to the numbers that a network gets, on the device."""

import functools

import torch


def normalize(images: torch.Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> torch.Tensor:
    """Return (images - mean) / std, on the device of the images.

    Args:
        images: uint8 or float32 [N, H, W, 3], on the scale 0..255; left as they are.
        mean: Of R, G, B on the scale 0..255.
        std: Of R, G, B on the scale 0..255.

    Returns:
        float32 [N, 3, H, W] in channels_last, which the NHWC images already are: one pass over the data to convert, no
        transposition.
    """
    mean_row, std_row = _channel_rows(mean, std, images.shape[2], images.device)
    num_images, height, width, _ = images.shape
    rows = images.view(num_images, height, width * 3)
    centred = rows - mean_row if images.is_floating_point() else rows.to(torch.float32).sub_(mean_row)
    return centred.div_(std_row).view(num_images, height, width, 3).permute(0, 3, 1, 2)


@functools.cache
def _channel_rows(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    # A whole row, because an inner loop over three channels is four times slower on the CPU. Kept, because making one on a
    # GPU waits for a copy. Made outside inference mode, since training uses them as well.
    with torch.inference_mode(False):
        return torch.tensor(mean * width, device=device), torch.tensor(std * width, device=device)
