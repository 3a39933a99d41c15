"""DALI's graph: encoded images and windows in, uint8 images out."""

from typing import Any, NamedTuple

from bitfleet.trainer.data.dali_feed import Feed
from bitfleet.trainer.data.request import Geometry

_PREFETCH_DEPTH = 2
# DALI's defaults. The decoder allocates the first once and the second twice for each thread, so the largest image of a set, which
# may have 100 MB, must not set them: it is decoded all the same, into memory that grows then.
_MOST_DEVICE_PADDING, _MOST_HOST_PADDING = 16 << 20, 8 << 20
# First bytes of JPEG, PNG and RIFF (WebP), all that DALI reads as Pillow does, and the shape "as many as there are".
FIRST_BYTES, _AS_MANY = [0xFF, 0x89, ord("R")], -1


class Graph(NamedTuple):
    """What is done with an image."""

    geometry: Geometry
    """How a window of the image becomes the output."""
    image_size: int
    """Pixels, height and width of the output."""
    with_windows: bool
    """Windows are an input; without them whole images come out."""
    with_flips: bool
    """Flips are an input."""
    resizes: bool
    """DALI resizes, if the geometry has a resize."""
    largest_image_bytes: int
    """Height * width * 3 of the largest image: the most that the GPU decoder allocates at once."""
    fast_idct: bool
    """See DaliPipeline."""


def build_pipeline(graph: Graph, feed: Feed, batch_size: int, num_threads: int, device_index: int | None) -> Any:
    """Build the pipeline that reads `feed`; it decodes on the CPU if `device_index` is None."""
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_index,
        prefetch_queue_depth=_PREFETCH_DEPTH,
        exec_dynamic=True,
    )
    window_type = types.FLOAT if graph.geometry == "resize_crop" else types.INT32
    kinds = [(types.UINT8, 1)]
    kinds += [(window_type, 1), (window_type, 1)] * graph.with_windows + [(types.INT32, 0)] * graph.with_flips
    with pipeline:
        files, *others = fn.external_source(
            source=feed,
            num_outputs=len(kinds),
            batch=True,
            dtype=[dtype for dtype, _ in kinds],
            ndim=[ndim for _, ndim in kinds],
        )
        if not feed.reads:
            files = fn.io.file.read(files)
        images = _windows_of(graph, _parsed(files), others, device_index)
        if graph.with_flips:
            images = fn.flip(images, horizontal=others[-1])
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def _windows_of(graph: Graph, files: Any, others: list[Any], device_index: int | None) -> Any:
    """Decode `files`, and crop and resize as the geometry says."""
    from nvidia.dali import fn, types

    # Grey, CMYK and palette images become RGB. EXIF orientation is not applied, as in torchvision: the
    # heights and widths that the windows are made from are those of the stored pixels.
    decoding: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False, "device": "cpu"}
    if device_index is not None:
        decoding |= gpu_decoding(graph.largest_image_bytes)
    elif graph.fast_idct:
        decoding["use_fast_idct"] = True
    resizing: dict[str, Any] = {
        "size": [graph.image_size] * 2,
        "interp_type": types.INTERP_LINEAR,
        "antialias": True,
    }
    if graph.geometry in ("crop_resize", "crop_bicubic"):
        images = fn.decoders.image_slice(files, start=others[0], end=others[1], axes=[0, 1], **decoding)
    else:
        images = fn.decoders.image(files, **decoding)
    if graph.geometry == "crop_resize" and graph.resizes:
        images = fn.resize(images, **resizing)
    elif graph.geometry == "resize_crop" and graph.resizes:
        images = fn.resize(images, roi_start=others[0], roi_end=others[1], **resizing)
    elif graph.geometry == "crop":
        images = fn.slice(
            images, start=others[0], end=others[1], axes=[0, 1], out_of_bounds_policy="pad", fill_values=0
        )
    return images


def gpu_decoding(largest_image_bytes: int) -> dict[str, Any]:
    """Return the arguments of DALI's decoder that are for the GPU alone.

    Args:
        largest_image_bytes: Height * width * 3 of the largest image.
    """
    return {
        "device": "mixed",
        "device_memory_padding": min(largest_image_bytes, _MOST_DEVICE_PADDING),
        "host_memory_padding": min(largest_image_bytes, _MOST_HOST_PADDING),
        "jpeg_fancy_upsampling": True,  # as the CPU decoder does
    }


def _parsed(files: Any) -> Any:
    """The files, unchanged, once all of them have been parsed; an error here ends the batch.

    DALI 2.4's decoders cut a batch of 32 or more in parts; where a file in one part cannot be parsed, the threads that are at the
    others go on with memory that is freed, and the process may crash. What looks at headers alone waits for its threads. It
    takes 5 us per image, and 3 more to fail at what is neither JPEG, PNG nor WebP: of those DALI reads several to other colours
    than Pillow (decoding.py).
    """
    from nvidia.dali import fn, types

    # A zero of the shapes: the first byte has to wait for them. Nothing is copied.
    first_bytes = files[0:1] + 0 * fn.peek_image_shape(files)[0:1]
    shape = fn.lookup_table(
        first_bytes,
        keys=FIRST_BYTES,
        values=[_AS_MANY] * len(FIRST_BYTES),
        default_value=0,  # does not fit: a file has bytes
        dtype=types.INT32,
    )
    return fn.reshape(files, shape=shape)
