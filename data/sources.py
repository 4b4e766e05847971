"""From a data configuration to the source that reads it."""

from collections.abc import Callable
from typing import Any

from conf.schema import (
    DataConfig,
    DigitsConfig,
    HuggingFaceConfig,
    ImageFolderConfig,
    LampsConfig,
    SyntheticConfig,
    TorchvisionConfig,
    WebDatasetConfig,
)
from data.base import ImageData
from data.digits import build_digits
from data.huggingface import build_huggingface
from data.imagefolder import build_imagefolder
from data.lamps import build_lamps
from data.synthetic import build_synthetic
from data.torchvision_sets import build_torchvision
from data.webdataset import build_webdataset

BUILDERS: dict[type[DataConfig], Callable[[Any], ImageData]] = {
    DigitsConfig: build_digits,
    HuggingFaceConfig: build_huggingface,
    ImageFolderConfig: build_imagefolder,
    LampsConfig: build_lamps,
    SyntheticConfig: build_synthetic,
    TorchvisionConfig: build_torchvision,
    WebDatasetConfig: build_webdataset,
}


def build(config: DataConfig) -> ImageData:
    """Open the data source that the type of `config` names.

    Raises:
        ConfigError: The source cannot be read as configured.
        TypeError: No source belongs to this type.
    """
    if type(config) not in BUILDERS:
        known = ", ".join(kind.__name__ for kind in BUILDERS)
        raise TypeError(f"config must be one of {known}, got {type(config).__name__}")
    return BUILDERS[type(config)](config)
