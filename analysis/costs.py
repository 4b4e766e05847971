"""What a member's model costs, counted on the model that its configuration builds."""

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from conf.schema import ConfigError, ModelConfig
from data import build
from training.model import build_model
from training.trained import data_config


@dataclass(frozen=True)
class Cost:
    """Size of a model, and work for one image of the sweep's size.

    Attributes:
        parameters: Trainable numbers.
        flops: Of a forward pass, a multiply-add counted once, as papers do.
    """

    parameters: int
    flops: int


def count(config: dict[str, Any]) -> Cost:
    """Build the model of a run's configuration and count it.

    Args:
        config: What the run's `config.yaml` says. Its data must be on this machine: the model has
            their channels and classes.

    Raises:
        ConfigError: The data are not here, or the model cannot be built.
    """
    return _count(json.dumps(config["model"]), json.dumps(config["data"]))


@cache
def _count(model_text: str, data_text: str) -> Cost:
    data = build(data_config(json.loads(data_text)))
    try:
        settings = ModelConfig(**json.loads(model_text))
    except TypeError as error:  # a run of another version
        raise ConfigError(f"model must have the settings of this version: {error}") from error
    if settings.name.startswith("focal_"):
        settings.attention_backend = "reference"  # plain products, on shapes alone
    model = build_model(settings, data, seed=0).eval()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    images = torch.empty(1, data.in_chans, data.img_size, data.img_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.to("meta")(images)
    return Cost(parameters, counter.get_total_flops() // 2)
