"""Libraries that only some data sources need, imported when such a source is opened."""

import importlib
from types import ModuleType

from conf.schema import ConfigError


def require(module: str, source: str) -> ModuleType:
    """Import `module` for the data source `source`.

    Raises:
        ConfigError: It is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"data={source} needs the package {module.partition('.')[0]}, which cannot be imported "
            f'({error}); install it with: pip install -e ".[data]"'
        ) from error
