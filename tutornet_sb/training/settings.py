"""Settings of an experiment: read, and checked before anything is made.

HyperPyYAML looks at the keys at the top of a file alone, and at a value only
when it is used, which may be after days of training.
"""

import inspect
import os
import pydoc
import re
from typing import Annotated, Any

from hyperpyyaml import load_hyperpyyaml, resolve_references
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
)
from ruamel.yaml import YAML
from speechbrain.utils.run_opts import RunOptions

from tutornet_sb.corpora.minilibri import make_minilibri
from tutornet_sb.distillation.frame_weighting import FRAME_WEIGHTINGS
from tutornet_sb.distillation.intermediate import read_intermediate
from tutornet_sb.distillation.losses import SOFTMAX_LOSSES
from tutornet_sb.distillation.pairs import read_pairs
from tutornet_sb.targets.encodings import HIDDEN, POSTERIORS
from tutornet_sb.teachers.sources import KINDS
from tutornet_sb.training.stages import find_stages
from tutornet_sb.util.composition import (
    dump,
    find_references,
    is_mapping,
    list_keys,
    read_comments,
    read_files,
    read_merged,
    tag_of,
)
from tutornet_sb.util.errors import SettingError, explain, nearest, one_line
from tutornet_sb.util.mappings import nest
from tutornet_sb.util.options import write_value

HELP = """  --debug  show the traceback of an error, before its line
Exit codes: 0 done, 1 unforeseen error, 2 bad input or command line, 75 stopped
by a signal (the same command resumes).

Options of SpeechBrain:"""
CALLS = "!new:", "!name:", "!apply:", "!applyref:"
# Keys of values that may begin with ~, the user's home
PATH = re.compile("(^|_)(folder|yaml|main_file|source|path)$")

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
Index = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Counts = Annotated[list[Count], Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def one_of(registry):
    """Make a text type of the names that a registry has when it is read."""

    def check(name):
        if name not in registry:
            *names, last = map(repr, registry)
            hint = nearest(name, registry)
            raise SettingError(
                f"must be {', '.join(names)} or {last}, got {name!r}"
                + (f"; {hint}" if hint.endswith("?") else "")
            )
        return name

    return Annotated[str, AfterValidator(check)]


def _check_tables(value):
    texts = value if isinstance(value, list) else [value]
    if value is not None and not (
        texts and all(isinstance(text, str) and text for text in texts)
    ):
        raise SettingError(
            f"must be a file, a list of files, or null, got {value!r}"
        )


def _check_pairs(value):
    # A number of pairs is of layers that are looked for.
    if type(value) is not int or value < 1:
        read_pairs(value)


def _check_minilibri(value):
    if value is not None:
        arguments = {"folder": None, **value}
        check_arguments(make_minilibri, arguments, "corpus.minilibri")


Tables = Annotated[Any, AfterValidator(_check_tables)]


class Group(BaseModel):
    """Values that belong together."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class CorpusSettings(Group):
    """Values of a corpus file."""

    name: Text
    data_folder: Text | None
    minilibri: Annotated[dict | None, AfterValidator(_check_minilibri)]
    train_splits: Texts | None
    valid_splits: Texts | None
    test_splits: Texts | None
    untranscribed_splits: list[Text]
    tokenizer_type: one_of(["char", "bpe", "unigram"])
    vocab_size: Annotated[int, Field(ge=2)] | None
    model_size: Text
    teacher_epochs: Count
    teacher_speeds: Counts | None
    epochs: Count
    batch_seconds: Positive
    num_buckets: Count
    lr: Positive
    num_workers: Index
    license: Text | None
    language: Text | None
    synthetic: bool


class UtteranceSettings(Group):
    """Which utterances of a corpus are used."""

    transcribed_share: Share
    max_skipped: Share
    max_seconds: Positive


class AugmentationSettings(BaseModel):
    """How training utterances are changed; the other values are calls."""

    speeds: Counts | None


class TeacherSettings(Group):
    """The teacher."""

    yaml: Text
    main_file: Text
    size: Text
    folder: Text | None
    source: Text | None
    revision: Text | None
    kind: one_of(KINDS) | None
    trust_remote_code: bool


class StoreSettings(Group):
    """How targets are stored."""

    folder: Text | None
    posteriors: one_of(POSTERIORS)
    top_k: Count
    hidden: one_of(HIDDEN)
    code_bytes: Count


class RKDSettings(Group):
    """Representation-level distillation."""

    share: Share
    pairs: Annotated[Any, AfterValidator(_check_pairs)]
    frame_weighting: one_of(FRAME_WEIGHTINGS) | None
    projector_hidden: Count | None
    head_frames: Index


class SKDSettings(Group):
    """Softmax-level distillation."""

    loss: one_of(SOFTMAX_LOSSES)
    temperature: Positive
    tolerance: Index
    selection: Index | None
    weight: NotNegative
    weight_final: NotNegative
    ctc_weight: NotNegative


class DecodingSettings(Group):
    """Decoding by beam search."""

    beam_size: Count | None
    kenlm_model_path: Text | None


class Settings(BaseModel):
    """Values of the recipe's base.yaml, except what its calls make."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    seed: Index
    stages: Annotated[list[str], AfterValidator(find_stages)]
    role: one_of(["teacher", "baseline", "student"]) | None
    recipe_folder: Text
    corpus_yaml: Text
    corpus_overrides: dict
    corpus: CorpusSettings
    student_yaml: Text
    student_size: Text
    student_overrides: dict
    data_folder: Text | None
    train_csv: Tables
    valid_csv: Tables
    test_csv: Tables
    utterances: UtteranceSettings
    results_folder: Text
    corpus_folder: Text
    output_folder: Text
    continue_anyway: bool
    baseline_folder: Text
    compute_matched_to: Texts | None
    teacher: TeacherSettings
    targets: one_of(["online", "store"])
    store: StoreSettings
    epochs: Count
    batch_seconds: Positive
    num_buckets: Count
    num_workers: Index
    ckpt_interval_minutes: NotNegative
    avg_checkpoints: Count
    lr: Positive
    weight_decay: NotNegative
    max_grad_norm: Positive
    augmentation: AugmentationSettings
    delay: NotNegative
    rkd: RKDSettings
    skd: SKDSettings
    intermediate: Annotated[Any, AfterValidator(read_intermediate)]
    min_confidence: Share
    decoding: DecodingSettings


def load_experiment(path, overrides, recipe):
    """Read an experiment, check its values, and make what it describes.

    Arguments and errors are those of :func:`resolve_experiment`. Returns the
    text of that and the dict of its values.
    """
    text = resolve_experiment(path, overrides, recipe)
    try:
        return text, load_hyperpyyaml(text)
    except SettingError:
        raise
    # Of values that somebody made up, all kinds of errors
    except Exception as error:
        raise SettingError(f"{path}: {one_line(error)}") from error


def resolve_experiment(path, overrides, recipe):
    """Read an experiment and check its values, but make and run nothing.

    The modules that its tags name are imported.

    Arguments
    ---------
    path : str or pathlib.Path
        Main file.
    overrides : dict
        Values that replace those of the file.
    recipe : pathlib.Path
        Folder, whose base.yaml gives a value for every key there is.

    Returns
    -------
    str
        HyperPyYAML text with all references resolved.

    Raises
    ------
    SettingError
        With all that is wrong with the values in ``faults``.
    """
    base = recipe / "hparams" / "base.yaml"
    content, known, faults = read_merged(path), read_merged(base), []
    overrides = overrides | {"recipe_folder": str(recipe)}
    _expand_home(content)
    _expand_home(overrides)
    missing = [key for key in known if key not in content]
    if missing:
        raise SettingError(
            f"{path} gives no value for {', '.join(missing[:5])}: let it "
            "extend base.yaml"
        )
    used = {*known, *find_references(content)}
    for key in content:
        if key not in used:
            file = [file for file, values in read_files(path) if key in values]
            faults.append(
                f"{file[-1]}: {base} has no key '{key}', and nothing refers to "
                f"it; {nearest(key, known)}"
            )
    usable = {}
    for key, value in nest(overrides).items():
        found = list(_find_unknown("--", key, value, content, known))
        faults += found
        if not found:
            usable[key] = value
    # It reads files that are swapped by name: of values that somebody made up,
    # all kinds of errors.
    try:
        text = resolve_references(dump(content), usable).read()
        tree = YAML().load(text)
    except Exception as error:
        faults += getattr(error, "faults", [f"{path}: {one_line(error)}"])
        tree = _without_tags(content | usable)
    faults += check_values(Settings, tree, tree.get("corpus_yaml"))
    faults += find_call_faults(tree)
    if faults:
        raise SettingError(*faults)
    return text


def _without_tags(tree):
    return {
        key: _without_tags(value) if hasattr(value, "items") else value
        for key, value in tree.items()
        if not tag_of(value)
    }


def _find_unknown(prefix, key, value, content, known):
    """Faults of an option that names no value, or a part of a single one."""
    option, old = f"{prefix}{key}", content.get(key)
    # Others are open: arguments of calls, overrides of a file.
    is_group = is_mapping(old) and known.get(key)
    if key not in content:
        names = [*list_keys(content), *RunOptions.__dataclass_fields__]
        yield f"{option}: there is no such value; {nearest(key, names)}"
    elif hasattr(value, "items") and not hasattr(old, "items"):
        yield (
            f"{option} must be a single value or a list, got the mapping "
            f"{dict(value)}"
        )
    elif is_group and not hasattr(value, "items"):
        yield f"{option} has several values: {', '.join(map(str, old))}"
    elif is_group:
        for name, inner in value.items():
            yield from _find_unknown(f"{option}.", name, inner, old, known[key])


def _expand_home(values):
    """Replace ~ at the beginning of paths, as a shell does before a space."""
    for key, value in values.items():
        if is_mapping(value):
            _expand_home(value)
        elif PATH.search(key.split(".")[-1]) and isinstance(value, str):
            values[key] = os.path.expanduser(value)


# Pydantic's words, and those of the recipe
WORDS = {
    r"^(Input|List|String) should": "must",
    " after validation, not 0": "",
    "a valid dictionary": 'a mapping such as "{KEY: VALUE}"',
    "a valid boolean": "True or False",
    "a valid string": "a text, in quotes if it looks like a number",
    "a valid integer": "a whole number",
    "a valid ": "a ",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than 0": "a positive number",
}


def check_values(model, values, corpus_file=None):
    """Faults of values by a pydantic model, a line each; some may be missing.

    Example
    -------
    >>> check_values(Settings, {"lr": "fast", "epochs": 0})
    ['epochs must be at least 1, got 0', "lr must be a number, got 'fast'"]
    """
    try:
        model.model_validate(values)
    except ValidationError as error:
        return [
            _describe(fault, corpus_file)
            for fault in error.errors(include_url=False)
            # Others are of a file whose references cannot be resolved.
            if fault["type"] != "missing" or fault["loc"][:-1] == ("corpus",)
        ]
    return []


def _describe(fault, corpus_file):
    """A fault found by pydantic in one line."""
    kind, value, context = fault["type"], fault["input"], fault.get("ctx", {})
    path = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}"
        for part in fault["loc"]
    ).removeprefix(".")
    if kind == "value_error":
        text = one_line(context["error"])
        return f"{path} {text}" if text.startswith("must") else text
    if kind == "missing":
        return f"{path}: {corpus_file} gives no value for it"
    if kind == "extra_forbidden":
        group, name = fault["loc"]
        known = Settings.model_fields[group].annotation.model_fields
        where = f"{corpus_file} gives" if group == "corpus" else "this is"
        return (
            f"{path}: {where} a value that {group} does not have; "
            + nearest(name, known)
        )
    text = fault["msg"]
    for theirs, ours in WORDS.items():
        text = re.sub(theirs, ours, text)
    shown = repr(list(value) if isinstance(value, list) else value)
    return f"{path} {text}, got {shown}"


def find_call_faults(node, path=""):
    """Faults of calls in a resolved YAML tree: no such callable or argument.

    Example
    -------
    >>> text = "layer: !new:torch.nn.Linear {in_features: 2, out_featurs: 3}"
    >>> print(*find_call_faults(YAML().load(text)))
    layer.out_featurs: torch.nn.Linear takes no such argument; did you mean \
out_features?
    """
    kind, _, name = (tag_of(node) or "").partition(":")
    if f"{kind}:" in CALLS:
        try:
            called = _locate(name, path)
            check_arguments(called, node, path, name, kind != "!name")
        except SettingError as error:
            yield str(error)
    if hasattr(node, "items"):
        for key, value in node.items():
            yield from find_call_faults(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from find_call_faults(value, f"{path}[{index}]")


def check_arguments(called, arguments, path, name=None, is_call=True):
    """Raise SettingError if a callable does not take arguments.

    These are by name (a mapping) or in order (a list); those without a default
    may be left out where it is no call yet. Callables without a signature are
    passed over.
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


def describe_options(base):
    """Options of a recipe, in the order of its files: (name, default, help).

    The help is the comment above a key. What calls make are no options.
    """
    comments = {}
    for path, _ in read_files(base):
        comments |= read_comments(path)
    return [
        (name, default, comments.get(name, ""))
        for name, default in _list_options(read_merged(base))
    ]


def _list_options(values, prefix=""):
    for key, value in values.items():
        if (tag_of(value) or "!ref") != "!ref":
            continue
        if hasattr(value, "items") and value:
            yield from _list_options(value, f"{prefix}{key}.")
        else:
            yield prefix + key, write_value(getattr(value, "value", value))


def print_options(base):
    """Print a recipe's options, a line each: name, short help, default."""
    options = describe_options(base)
    print("Options of this recipe (MAIN_FILE --NAME VALUE ...):")
    width = max(len(name) for name, _, _ in options)
    for name, default, text in options:
        first = text.partition(". ")[0].rstrip(".")
        print(f"  --{name:{width}}  {first}{' ' * bool(first)}[{default}]")
    print(HELP)
