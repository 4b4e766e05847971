"""Typed configuration: the schema, its rules and the YAML files that fill it."""

from conf.arguments import expand_arguments, expand_resume
from conf.compose import compose, to_config
from conf.schema import Config, ConfigError, register_schemas

__all__ = [
    "Config",
    "ConfigError",
    "compose",
    "expand_arguments",
    "expand_resume",
    "register_schemas",
    "to_config",
]
