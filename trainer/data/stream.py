"""Say what decides the pixels of the training stream."""

import json
from typing import Any

from pydantic import TypeAdapter

from bitfleet.trainer.data.config import DataConfig
from bitfleet.trainer.data.loaders import decoder_of
from bitfleet.trainer.run.roles import fields_with_role


def stream_settings(config: DataConfig, device_type: str) -> dict[str, Any]:
    """Return what decides the training images besides seed and lists: name -> JSON value.

    Args:
        config: its `loader` and `device` become the decoder and where it decodes.
        device_type: of the device of the model, "cpu" or "cuda".
    """
    fields: dict[str, Any] = json.loads(TypeAdapter(DataConfig).dump_json(config))
    others = fields_with_role(DataConfig, "host", "machine", "execution")
    on_gpu = device_type == "cuda" and config.loader == "dali" and config.device != "cpu"
    decoding = {"loader": decoder_of(config), "device": "gpu" if on_gpu else "cpu"}
    return {name: value for name, value in fields.items() if name not in others} | decoding
