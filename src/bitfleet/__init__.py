"""Train binarized neural networks with optimizers that flip bits instead of latent weights."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("bitfleet")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
