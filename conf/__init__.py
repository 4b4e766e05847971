"""Typed configuration: the schema, its rules and the YAML files that fill it."""

from conf.schema import Config, ConfigError, register_schemas
from conf.validation import validate


__all__ = ["Config", "ConfigError", "register_schemas", "validate"]
