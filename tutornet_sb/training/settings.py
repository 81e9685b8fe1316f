"""What the values of an experiment may be, checked before anything is made.

HyperPyYAML looks at the keys at the top of a file alone, and at a value only
when it is used, which may be after days of training.
"""

import inspect
import math
import os
import pydoc
from collections.abc import Callable
from io import StringIO
from typing import NamedTuple

from hyperpyyaml import load_hyperpyyaml, resolve_references
from ruamel.yaml import YAML
from speechbrain.utils.run_opts import RunOptions

from tutornet_sb.corpora.minilibri import make_minilibri
from tutornet_sb.distillation.frame_weighting import FRAME_WEIGHTINGS
from tutornet_sb.distillation.intermediate import read_intermediate
from tutornet_sb.distillation.pairs import read_pairs
from tutornet_sb.targets.encodings import HIDDEN, POSTERIORS
from tutornet_sb.teachers.sources import KINDS
from tutornet_sb.training.stages import STAGES
from tutornet_sb.util.composition import read_experiment, read_mapping, tag_of
from tutornet_sb.util.errors import SettingError, explain, nearest, one_line

CALLS = "!new:", "!name:", "!apply:", "!applyref:"


class Rule(NamedTuple):
    """What a value may be.

    Attributes
    ----------
    wanted : str
        In words.
    allows : callable
        Tells whether a value is such.
    names : tuple of str
        Those to choose from, if it is one.
    """

    wanted: str
    allows: Callable[[object], bool]
    names: tuple[str, ...] = ()


def number(wanted="a number", low=-math.inf, high=math.inf):
    """Make a rule of numbers from ``low`` to ``high``."""

    def allows(value):
        return (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and low <= value <= high
            and math.isfinite(value)
        )

    return Rule(wanted, allows)


def whole(low):
    """Make a rule of whole numbers from ``low`` up."""
    within = number(low=low)
    return Rule(
        f"a whole number from {low} up",
        lambda value: isinstance(value, int) and within.allows(value),
    )


def one_of(*names):
    """Make a rule of names."""
    return Rule(
        f"one of {', '.join(names)}",
        lambda value: isinstance(value, str) and value in names,
        names,
    )


def several(rule):
    """Make a rule of lists, not empty, of what another rule allows."""
    return Rule(
        f"a list, each {rule.wanted}",
        lambda value: (
            isinstance(value, list)
            and len(value) > 0
            and all(map(rule.allows, value))
        ),
    )


def maybe(rule):
    """Make a rule that allows null besides what another allows."""
    return Rule(
        f"{rule.wanted}, or null",
        lambda value: value is None or rule.allows(value),
        rule.names,
    )


TEXT = Rule(
    "a text, in quotes if it looks like a number",
    lambda value: isinstance(value, str) and value != "",
)
FLAG = Rule("True or False", lambda value: isinstance(value, bool))
MAPPING = Rule(
    'a mapping such as "{KEY: VALUE}"', lambda value: hasattr(value, "items")
)
# From the smallest float up: what must not be 0
POSITIVE = number("a number above 0", low=math.ulp(0.0))
NOT_NEGATIVE = number("a number from 0 up", low=0)
SHARE = number("a number from 0 to 1", low=0, high=1)
SPEEDS = maybe(several(whole(1)))
TABLES = Rule(
    "a file, a list of files, or null",
    lambda value: (
        value is None or TEXT.allows(value) or (several(TEXT).allows(value))
    ),
)
# Values of the recipe's base.yaml, what calls of it aside
RULES = {
    "seed": whole(0),
    "stages": several(one_of(*STAGES)),
    "role": maybe(one_of("teacher", "baseline", "student")),
    "compute_matched_to": maybe(several(TEXT)),
    "recipe_folder": TEXT,
    "corpus_yaml": TEXT,
    "corpus_overrides": MAPPING,
    "student_yaml": TEXT,
    "student_size": TEXT,
    "student_overrides": MAPPING,
    "data_folder": maybe(TEXT),
    "train_csv": TABLES,
    "valid_csv": TABLES,
    "test_csv": TABLES,
    "transcribed_share": SHARE,
    "max_skipped": SHARE,
    "max_seconds": POSITIVE,
    "results_folder": TEXT,
    "corpus_folder": TEXT,
    "output_folder": TEXT,
    "continue_anyway": FLAG,
    "baseline_folder": TEXT,
    "teacher_yaml": TEXT,
    "teacher_hparams": TEXT,
    "teacher_size": TEXT,
    "teacher_folder": maybe(TEXT),
    "teacher_source": maybe(TEXT),
    "teacher_revision": maybe(TEXT),
    "teacher_kind": maybe(one_of(*KINDS)),
    "trust_remote_code": FLAG,
    "targets": one_of("online", "store"),
    "store_folder": maybe(TEXT),
    "posterior_encoding": one_of(*POSTERIORS),
    "top_k": whole(1),
    "hidden_encoding": one_of(*HIDDEN),
    "code_bytes": whole(1),
    "epochs": whole(1),
    "rkd_share": SHARE,
    "batch_seconds": POSITIVE,
    "num_buckets": whole(1),
    "num_workers": whole(0),
    "ckpt_interval_minutes": NOT_NEGATIVE,
    "avg_checkpoints": whole(1),
    "lr": POSITIVE,
    "weight_decay": NOT_NEGATIVE,
    "max_grad_norm": POSITIVE,
    "speed_perturb": SPEEDS,
    "delay": NOT_NEGATIVE,
    "frame_weighting": maybe(one_of(*FRAME_WEIGHTINGS)),
    "projector_hidden": maybe(whole(1)),
    "head_frames": whole(0),
    "skd_weight": NOT_NEGATIVE,
    "skd_weight_final": NOT_NEGATIVE,
    "ctc_weight": NOT_NEGATIVE,
    "skd_loss": one_of("l2", "kl", "guided"),
    "temperature": POSITIVE,
    "skd_tolerance": whole(0),
    "skd_selection": maybe(whole(0)),
    "min_confidence": SHARE,
    "beam_size": maybe(whole(1)),
    "kenlm_model_path": maybe(TEXT),
    "rtf_utterances": whole(1),
}
# Those that may begin with ~, the user's home
PATHS = (
    "corpus_yaml",
    "student_yaml",
    "data_folder",
    "results_folder",
    "corpus_folder",
    "output_folder",
    "baseline_folder",
    "teacher_yaml",
    "teacher_hparams",
    "teacher_folder",
    "teacher_source",
    "store_folder",
    "kenlm_model_path",
)
# Values of a corpus
CORPUS_RULES = {
    "name": TEXT,
    "license": maybe(TEXT),
    "language": maybe(TEXT),
    "synthetic": FLAG,
    "data_folder": maybe(TEXT),
    "minilibri": maybe(MAPPING),
    "train_splits": maybe(several(TEXT)),
    "valid_splits": maybe(several(TEXT)),
    "test_splits": maybe(several(TEXT)),
    "untranscribed_splits": Rule(
        "a list of names of splits",
        lambda value: isinstance(value, list) and all(map(TEXT.allows, value)),
    ),
    "tokenizer_type": one_of("char", "bpe", "unigram"),
    "vocab_size": maybe(whole(2)),
    "teacher": TEXT,
    "teacher_speed_perturb": SPEEDS,
    "model_size": TEXT,
    "teacher_epochs": whole(1),
    "epochs": whole(1),
    "batch_seconds": POSITIVE,
    "num_buckets": whole(1),
    "lr": POSITIVE,
    "num_workers": whole(0),
}


def load_experiment(path, overrides, base):
    """Read an experiment, check its values, and make what it describes.

    Arguments
    ---------
    path : str or pathlib.Path
        Main file.
    overrides : dict
        Values that replace those of the file.
    base : str or pathlib.Path
        The file that gives a value for every key there is.

    Returns
    -------
    text : str
        HyperPyYAML text, its references not resolved.
    hparams : dict
        The values.

    Raises
    ------
    SettingError
        If a value is wrong, or what it describes cannot be made.
    """
    content = YAML().load(read_experiment(path))
    content.update(expand_home(dict(content)))
    text, known = StringIO(), read_mapping(base)
    YAML().dump(content, text)
    text = text.getvalue()
    for key, value in overrides.items():
        if key not in content:
            names = [*content, *RunOptions.__dataclass_fields__]
            raise SettingError(
                f"--{key}: neither {path} nor SpeechBrain has such a value; "
                + nearest(key, names)
            )
        if hasattr(value, "items") and not hasattr(content[key], "items"):
            raise SettingError(
                f"--{key}: {path} has a single value or a list there, and "
                f"{dict(value)} is a mapping"
            )
    # The first reads files that are swapped by name, the second makes networks
    # and losses: of values that somebody made up, all kinds of errors.
    try:
        resolved = resolve_references(text, overrides).read()
        check_settings(resolved, known, path)
        return text, load_hyperpyyaml(resolved)
    except SettingError:
        raise
    except Exception as error:
        raise SettingError(f"{path}: {one_line(error)}") from error


def expand_home(values):
    """Replace ~ at the beginning of paths, as a shell does before a space.

    Arguments
    ---------
    values : dict
        Values of an experiment, or some of them.

    Returns
    -------
    dict
        The same values, paths with the user's home.
    """
    return values | {
        key: os.path.expanduser(values[key])
        for key in PATHS
        if isinstance(values.get(key), str)
    }


def check_settings(resolved, known, file):
    """Check the values of an experiment.

    Nothing is made or run, but the modules that its tags name are imported.

    Arguments
    ---------
    resolved : str
        HyperPyYAML text whose references are resolved.
    known : list of str
        Keys that it must have, and may have besides those of its own file.
    file : str or pathlib.Path
        Its main file, for errors.

    Raises
    ------
    SettingError
        If a key is missing, a value is of a wrong kind, or a call names what
        is not there or gives it an argument that it does not take.
    """
    tree = YAML().load(resolved)
    missing = [key for key in known if key not in tree]
    if missing:
        raise SettingError(
            f"{file} gives no value for {', '.join(missing[:5])}: let it "
            "extend base.yaml"
        )
    check_values(tree, RULES)
    corpus = tree["corpus"]
    for key in corpus:
        if key not in CORPUS_RULES:
            raise SettingError(
                f"corpus.{key}: {tree['corpus_yaml']} gives a value that no "
                f"corpus has; {nearest(key, CORPUS_RULES)}"
            )
    check_values(corpus, CORPUS_RULES, "corpus.")
    if corpus["minilibri"] is not None:
        check_arguments(
            make_minilibri,
            {"folder": None, **corpus["minilibri"]},
            "corpus.minilibri",
        )
    # A number of pairs is of layers that are looked for.
    if not whole(1).allows(tree["pairs"]):
        read_pairs(tree["pairs"])
    read_intermediate(tree["intermediate"])
    check_calls(tree)


def check_values(values, rules, prefix=""):
    """Compare values with the rules for them.

    Arguments
    ---------
    values : dict
        By key.
    rules : dict of str to Rule
        By key; those of keys that are not there are passed over.
    prefix : str
        What the keys begin with in errors.

    Raises
    ------
    SettingError
        If a value is none that its rule allows.

    Example
    -------
    >>> check_values({"lr": "fast"}, RULES)
    Traceback (most recent call last):
    ...
    tutornet_sb.util.errors.SettingError: lr: must be a number above 0, and is \
'fast'
    """
    for key, rule in rules.items():
        if key in values and not rule.allows(values[key]):
            value = values[key]
            shown = repr(list(value) if isinstance(value, list) else value)
            hint = f"; {nearest(value, rule.names)}" if rule.names else ""
            raise SettingError(
                f"{prefix}{key}: must be {rule.wanted}, and is {shown}{hint}"
            )


def check_calls(node, path=""):
    """Compare the arguments of all calls in a YAML text with what is called.

    Arguments
    ---------
    node : object
        Any part of it, its references resolved.
    path : str
        Where that stands, such as ``student.model``.

    Raises
    ------
    SettingError
        If there is no such callable, or it takes no such argument.

    Example
    -------
    >>> text = "layer: !new:torch.nn.Linear {in_features: 2, out_featurs: 3}"
    >>> check_calls(YAML().load(text))
    Traceback (most recent call last):
    ...
    tutornet_sb.util.errors.SettingError: layer.out_featurs: torch.nn.Linear \
takes no such argument; did you mean out_features?
    """
    tag = tag_of(node) or ""
    kind, _, name = tag.partition(":")
    if f"{kind}:" in CALLS:
        is_call = kind != "!name"
        check_arguments(_locate(name, path), node, path, name, is_call)
    if hasattr(node, "items"):
        for key, value in node.items():
            check_calls(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            check_calls(value, f"{path}[{index}]")


def check_arguments(called, arguments, path, name=None, is_call=True):
    """Compare arguments with the parameters of what they are for.

    Arguments
    ---------
    called : callable
        Of any kind; those that tell nothing of their parameters are passed
        over.
    arguments : dict or list
        By name or in order.
    path : str
        Where they stand, for errors.
    name : str, optional
        What is called, for errors.
    is_call : bool
        Whether those without a default must all be there.

    Raises
    ------
    SettingError
        If it does not take them.
    """
    name = name or called.__name__
    try:
        signature = inspect.signature(called)
    except (ValueError, TypeError):
        return
    parameters = signature.parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    positional = list(arguments) if isinstance(arguments, list) else []
    named = dict(arguments) if hasattr(arguments, "items") else {}
    for key in named:
        if key not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise SettingError(
                f"{path}.{key}: {name} takes no such argument; "
                + nearest(key, parameters)
            )
    bind = signature.bind if is_call else signature.bind_partial
    try:
        bind(*positional, **named)
    except TypeError as error:
        raise SettingError(f"{path}: {name}: {error}") from None


def _locate(name, path):
    """Find what a tag names."""
    try:
        found = pydoc.locate(name)
    # Of a module that cannot be imported, whatever it raises
    except pydoc.ErrorDuringImport as error:
        raise SettingError(
            f"{path}: {name} cannot be imported: {explain(error.value)[0]}"
        ) from error
    if found is not None:
        return found
    parent, _, last = name.rpartition(".")
    inside = pydoc.locate(parent) if parent else None
    names = [name for name in dir(inside) if not name.startswith("_")]
    hint = f"; {nearest(last, names)}" if inside is not None else ""
    raise SettingError(f"{path}: there is no {name}{hint}")
