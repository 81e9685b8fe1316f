"""Options of an experiment as they are typed on a command line.

SpeechBrain joins them to one YAML text, in which ``runs/lr=1`` becomes
``runs/lr 1`` and ``run #2`` becomes ``run``. Here each option is read alone.
"""

import contextlib
import io
import json
import sys

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from speechbrain.utils.distributed import ddp_init_group
from speechbrain.utils.run_opts import RunOptions

from tutornet_sb.util.errors import SettingError

# Options of SpeechBrain's short trial runs, whose stages would look finished
NOT_OFFERED = "debug_batches", "debug_epochs", "debug_persistently", "test_only"


class Options(RunOptions):
    """SpeechBrain's options, which leave all others as they were typed."""

    @staticmethod
    def _convert_to_yaml(overrides):
        return overrides


def parse_command_line(words):
    """Read a command line and join the other processes, if there are any.

    Returns the main file, SpeechBrain's options and a dict of all others.
    """
    if not sys.stderr.isatty():
        # In a file each state of a bar would stay.
        words = [*words, "--noprogressbar"]
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            main_file, run_opts, typed = Options.from_command_line_args(words)
    except SystemExit as stop:
        # Of --help
        if not stop.code:
            raise
        raise SettingError(
            messages.getvalue().strip().rpartition("error: ")[2]
            + ", see --help for the options"
        ) from None
    for name in NOT_OFFERED:
        if getattr(run_opts, name) != getattr(type(run_opts), name):
            raise SettingError(
                f"--{name} is not offered: a run of few batches would look "
                "like a finished one. Give a small corpus instead"
            )
    ddp_init_group(run_opts)
    return main_file, run_opts, read_options(typed)


def read_options(words):
    """Read ``--KEY VALUE``, ``--KEY=VALUE`` and ``--KEY.INNER VALUE``.

    Example
    -------
    >>> read_options(["--lr", "0.1", "--results_folder=runs/lr=1 #2"])
    {'lr': 0.1, 'results_folder': 'runs/lr=1 #2'}
    >>> read_options(["--teacher.source", "me/model"])
    {'teacher.source': 'me/model'}
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
                "that has braces, blanks or #"
            ) from None
    return values


def read_value(text):
    """Read one value: numbers, lists and so on as in YAML, others as typed.

    Raises ruamel.yaml's YAMLError for a list or a mapping that does not end.

    Example
    -------
    >>> read_value("0.5"), read_value("[rkd, ctc]"), read_value("null")
    (0.5, ['rkd', 'ctc'], None)
    >>> read_value("run #2: a=b")
    'run #2: a=b'
    """
    is_flow = text.startswith(("[", "{"))
    is_quoted = text.startswith(('"', "'", "!"))
    # In YAML the rest would be a comment.
    if not (is_flow or is_quoted) and " #" in f" {text}":
        return text
    try:
        value = YAML().load(text)
    except YAMLError:
        if is_flow:
            raise
        return text
    if is_flow or is_quoted or isinstance(value, bool | int | float | None):
        return value
    return text


def write_value(value):
    """Write a value such that :func:`read_value` returns it.

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
