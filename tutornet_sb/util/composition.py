"""Experiments put together from several YAML files, one for each choice.

HyperPyYAML's own ``!include`` cannot be swapped from the command line without
losing the overrides that stand beside it, so files are put together here:
main files by :func:`read_experiment`, networks and corpora by :func:`include`
under the ``!applyref`` tag. Any of them may extend another file of its kind.
"""

import re
from io import StringIO
from pathlib import Path

from hyperpyyaml import resolve_references
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tutornet_sb.util.errors import (
    MissingFileError,
    SettingError,
    nearest,
    yaml_problem,
)

# Values of a network that need no reference
USED_BY_RECIPE = "name", "model"
# The key at the top that a reference starts from
REFERENCE = re.compile(r"<([^>\[.]+)")


def read_experiment(path):
    """Read a main YAML file onto the one it extends.

    A key of the main file takes the place of the same key in the file named by
    ``extends``, which lies beside it and may extend another.

    Arguments
    ---------
    path : str or pathlib.Path
        Main file, such as ``hparams/rkd_lstm.yaml``.

    Returns
    -------
    str
        HyperPyYAML text, to be given to ``load_hyperpyyaml``.

    Raises
    ------
    MissingFileError
        If the file or one that it extends is missing.
    SettingError
        If a file is not a mapping or no valid YAML, extends itself in the end,
        or gives a value that nothing uses.
    """
    yaml = YAML()
    text = StringIO()
    yaml.dump(_read_merged(path), text)
    return text.getvalue()


def include(path, folder, size="full", overrides=None, **fixed):
    """Read a network or a corpus so that the file can be swapped by name.

    Used as ``student: !applyref:tutornet_sb.util.composition.include``. The
    values at the top of the file are those of the full size; a mapping named as
    another size replaces some of them. The file may extend another, as main
    files do: it then needs to say only what differs.

    Arguments
    ---------
    path : str or pathlib.Path
        HyperPyYAML file, relative to the working folder or to ``folder``.
    folder : str or pathlib.Path
        Folder of the recipe.
    size : str
        ``full``, or the name of a mapping in the file.
    overrides : dict, optional
        Values that replace those of the file; a key must be in the file.
    **fixed
        The same, for values that the including file decides.

    Returns
    -------
    ruamel.yaml.comments.CommentedMap
        The file with its references resolved and its tags kept.

    Raises
    ------
    MissingFileError
        If there is no such file, or it extends one that is missing.
    SettingError
        If the file has no such size, or an override names no key of it, or for
        a reason that :func:`read_experiment` has too.

    Example
    -------
    >>> lstm = getfixture("tmp_path") / "lstm.yaml"
    >>> _ = lstm.write_text("{cells: 640, small: {cells: 96}}")
    >>> include(lstm, ".", "small")["cells"]
    96
    """
    found = Path(path)
    if not found.is_file():
        found = Path(folder) / path
    if not found.is_file():
        raise MissingFileError(
            f"{path} is neither in the working folder nor in {folder}"
            + _nearest_file(found)
        )
    yaml = YAML()
    content = _read_merged(found)
    sizes = find_sizes(content)
    for name in sizes:
        _refuse_unknown(content[name], content, f"{found}: {name}")
    if "model" in content:
        _refuse_unused(content, {*sizes, *USED_BY_RECIPE, *fixed}, found)
    values = {}
    if size != "full":
        if not hasattr(content.get(size), "items"):
            raise SettingError(
                f"{found} has no size '{size}', no such mapping; "
                + nearest(size, ["full", *sizes])
            )
        values.update(content[size])
    if not hasattr(overrides or {}, "items"):
        raise SettingError(
            f"what overrides the values of {found} must be a mapping such as "
            f'"{{{next(iter(content))}: VALUE}}", and is {overrides!r}'
        )
    values.update(overrides or {})
    values.update(fixed)
    _refuse_unknown(values, content, found)
    # A whole value is replaced, where HyperPyYAML's overrides would merge.
    content.update(values)
    text = StringIO()
    yaml.dump(content, text)
    return yaml.load(resolve_references(text.getvalue(), None, True))


def find_sizes(content):
    """Find the sizes of a network's file.

    Arguments
    ---------
    content : ruamel.yaml.comments.CommentedMap
        The file, its references not yet resolved.

    Returns
    -------
    list of str
        Names of the mappings at its top that nothing refers to. A file without
        a ``model``, such as a corpus, has none.

    Example
    -------
    >>> text = "{cells: 640, small: {cells: 96}, model: !new:torch.nn.ReLU {}}"
    >>> find_sizes(YAML().load(text))
    ['small']
    """
    if "model" not in content:
        return []
    used = find_references(content)
    return [
        key
        for key, value in content.items()
        if hasattr(value, "items") and not tag_of(value) and key not in used
    ]


def find_references(node):
    r"""Find what the references in a part of a YAML file name.

    Arguments
    ---------
    node : object
        Any part, its references not yet resolved.

    Returns
    -------
    set of str
        Keys at the top of the file.

    Example
    -------
    >>> node = YAML().load("a: !ref <b> * 2\nc: [x, !ref '<d[e]>']")
    >>> sorted(find_references(node))
    ['b', 'd']
    """
    if hasattr(node, "values"):
        return set().union(*map(find_references, node.values()))
    if isinstance(node, list):
        return set().union(*map(find_references, node))
    if tag_of(node) not in ("!ref", "!copy"):
        return set()
    return set(REFERENCE.findall(node.value))


def tag_of(node):
    """Give the tag of a part of a YAML file.

    Arguments
    ---------
    node : object
        Any part.

    Returns
    -------
    str or None
        Such as ``!ref``; None if it has none.
    """
    return getattr(getattr(node, "tag", None), "value", None)


def _refuse_unknown(values, content, where):
    for key in values:
        if key not in content:
            raise SettingError(
                f"{where} has no key '{key}' to override; "
                f"{nearest(key, content)} Correct it, or leave it out"
            )


def _read_merged(path):
    merged, seen = read_mapping(path), {Path(path).resolve()}
    # Which file gives each key that the last one of the chain may not have
    given = {}
    while "extends" in merged:
        base = Path(path).parent / str(merged.pop("extends"))
        if not base.is_file():
            raise MissingFileError(
                f"{path} extends {base}, which is missing{_nearest_file(base)}"
            )
        if base.resolve() in seen:
            raise SettingError(f"{path} extends {base}, which extends it")
        seen.add(base.resolve())
        given = dict.fromkeys(merged, path) | given
        path, extension = base, merged
        merged = read_mapping(base)
        given = {key: file for key, file in given.items() if key not in merged}
        for key, value in extension.items():
            merged[key] = value
    # A further size of a network is no mistake.
    used = {*find_references(merged), *find_sizes(merged)}
    for key in given:
        if key not in used:
            raise SettingError(
                f"{given[key]}: {path} has no key '{key}', and nothing refers "
                f"to it; {nearest(key, merged.keys() - given.keys())}"
            )
    return merged


def _refuse_unused(network, used, path):
    """Find values of a network that it does not use."""
    used = used | find_references(network)
    for key in network:
        if key not in used:
            raise SettingError(
                f"{path}: nothing refers to the key '{key}'; "
                + nearest(key, [other for other in network if other != key])
            )


def read_mapping(path):
    """Read a YAML file, its tags kept and its references not resolved.

    Arguments
    ---------
    path : str or pathlib.Path
        The file.

    Returns
    -------
    ruamel.yaml.comments.CommentedMap
        What it holds.

    Raises
    ------
    MissingFileError
        If there is no such file.
    SettingError
        If it is no valid YAML, or not a mapping.
    """
    if not Path(path).is_file():
        raise MissingFileError(
            f"no such YAML file: {path}{_nearest_file(path)}"
        )
    try:
        content = YAML().load(Path(path).read_text(encoding="utf-8"))
    except YAMLError as error:
        raise SettingError(
            f"{path} is no valid YAML: {yaml_problem(error)}"
        ) from None
    except RecursionError:
        raise SettingError(f"{path} is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise SettingError(
            f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8"
        ) from None
    if not hasattr(content, "items"):
        raise SettingError(f"{path} is not a mapping of names to values")
    return content


def _nearest_file(path):
    """Suggest one of the files beside a missing one."""
    path = Path(path)
    names = [file.name for file in path.parent.glob(f"*{path.suffix}")]
    return f"; {nearest(path.name, names)}" if names else ""
