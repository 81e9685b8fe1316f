"""Mappings in mappings, and the dotted keys of their values."""

from copy import copy

from tutornet_sb.util.errors import SettingError


def flatten(tree, prefix=""):
    """Dotted path -> value of mappings in mappings, without None.

    Example
    -------
    >>> flatten({"a": {"b": 1, "c": [2]}, "d": None})
    {'a.b': 1, 'a.c': [2]}
    """
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def nest(options):
    """Turn keys with dots into mappings in mappings.

    Example
    -------
    >>> nest({"lr": 0.1, "skd.loss": "kl", "skd.weight": 2})
    {'lr': 0.1, 'skd': {'loss': 'kl', 'weight': 2}}
    """
    values = {}
    for key, value in options.items():
        *outer, last = key.split(".")
        inner = values
        for name in outer:
            inner = inner.setdefault(name, {})
            if not hasattr(inner, "items"):
                break
        if not hasattr(inner, "items") or last in inner:
            raise SettingError(
                f"--{key}: two options give it a value, leave one out"
            )
        inner[last] = copy(value)
    return values
