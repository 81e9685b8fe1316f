"""Values of an experiment as they are typed on a command line.

SpeechBrain joins them to one YAML text, in which ``runs/lr=1`` becomes
``runs/lr 1`` and ``run #2`` becomes ``run``. Here each option is read alone.
"""

import contextlib
import json

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from speechbrain.utils.run_opts import RunOptions

from tutornet_sb.util.errors import SettingError

# Takes the place of #, which would begin a comment in YAML.
_HASH = "\ue000"


class Options(RunOptions):
    """SpeechBrain's options, which leave all others as they were typed.

    Example
    -------
    >>> words = ["rkd.yaml", "--device", "cpu", "--seed=2"]
    >>> Options.from_command_line_args(words)[2]
    ['--seed=2']
    """

    @staticmethod
    def _convert_to_yaml(overrides):
        return overrides


def read_options(words):
    """Read the options that SpeechBrain has left.

    Arguments
    ---------
    words : list of str
        ``--KEY VALUE`` and ``--KEY=VALUE``.

    Returns
    -------
    dict
        Value of each key.

    Raises
    ------
    SettingError
        If an option is given twice, a word belongs to none, or a list or a
        mapping does not end.

    Example
    -------
    >>> read_options(["--lr", "0.1", "--results_folder=runs/lr=1 #2"])
    {'lr': 0.1, 'results_folder': 'runs/lr=1 #2'}
    """
    typed = {}
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            if key in typed:
                raise SettingError(f"--{key}: give each option once")
            typed[key] = [value] if equals else []
        elif typed:
            typed[key].append(word)
        else:
            raise SettingError(f"{word}: options begin with --, as in --seed 2")
    values = {}
    for key, parts in typed.items():
        text = " ".join(parts)
        try:
            values[key] = read_value(text)
        except YAMLError as error:
            raise SettingError(
                f"--{key}: {text}: {error.problem or error}: quote a value "
                "that has braces or blanks"
            ) from None
    return values


def read_value(text):
    """Read one value: numbers, lists and so on as in YAML, others as typed.

    Arguments
    ---------
    text : str
        What was typed.

    Returns
    -------
    object
        Of YAML's types.

    Raises
    ------
    ruamel.yaml.error.YAMLError
        If a list or a mapping does not end.

    Example
    -------
    >>> read_value("0.5"), read_value("[rkd, ctc]"), read_value("null")
    (0.5, ['rkd', 'ctc'], None)
    >>> read_value("run #2: a=b")
    'run #2: a=b'
    """
    is_flow = text.startswith(("[", "{"))
    try:
        value = YAML().load(text.replace("#", _HASH))
    except YAMLError:
        if is_flow:
            raise
        return text
    is_quoted = text.startswith(('"', "'", "!"))
    if is_flow or is_quoted or isinstance(value, bool | int | float | None):
        return _with_hashes(value)
    return text


def write_value(value):
    """Write a value such that :func:`read_value` gives it back.

    Arguments
    ---------
    value : object
        Of JSON's types.

    Returns
    -------
    str
        A text as it is where that can be.

    Example
    -------
    >>> write_value("run #2"), write_value("2"), write_value([1, "a"])
    ('run #2', '"2"', '[1, "a"]')
    """
    if isinstance(value, str):
        with contextlib.suppress(YAMLError):
            if read_value(value) == value:
                return value
    # JSON is YAML too.
    return json.dumps(value, ensure_ascii=False)


def _with_hashes(value):
    """Put # back into all texts of a YAML tree."""
    if isinstance(value, str):
        return value.replace(_HASH, "#")
    if hasattr(value, "items"):
        for key in list(value):
            item = _with_hashes(value.pop(key))
            value[_with_hashes(key)] = item
    elif isinstance(value, list):
        value[:] = [_with_hashes(item) for item in value]
    elif hasattr(value, "value"):
        # A text with a tag
        value.value = _with_hashes(value.value)
    return value
