"""Experiments composed of several YAML files, one for each choice.

HyperPyYAML's ``!include`` cannot be swapped from the command line without
losing the overrides beside it, so files are composed here: main files by
:func:`read_experiment`, networks and corpora by :func:`include`. Either may
extend others: ``extends: base.yaml``, or a list, of which later files win; its
own keys win over all. Mappings without a tag are merged.
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
# A line between the sections of a file, and one with a key
RULE, KEY = re.compile(r"# ?[-#]{3}"), re.compile(r"( *)(\w+):")


def read_experiment(path):
    """Read a main file and those it extends; returns HyperPyYAML text."""
    return dump(read_merged(path))


def dump(content):
    """Write a YAML tree as text."""
    text = StringIO()
    YAML().dump(content, text)
    return text.getvalue()


def include(path, folder, size="full", overrides=None, **fixed):
    """Read a network or a corpus, whose file can be swapped by name.

    Arguments
    ---------
    path : str or pathlib.Path
        HyperPyYAML file, relative to the working folder or to ``folder``.
    folder : str or pathlib.Path
        That of the recipe.
    size : str
        ``full`` for the values at the top of the file, or the name of a mapping
        in it, which replaces some of them.
    overrides, **fixed
        Values of keys of the file, which replace them.

    Returns
    -------
    ruamel.yaml.comments.CommentedMap
        Its references are resolved and its tags kept.

    Example
    -------
    >>> lstm = getfixture("tmp_path") / "lstm.yaml"
    >>> _ = lstm.write_text("{cells: 640, small: {cells: 96}}")
    >>> include(lstm, ".", "small")["cells"]
    96
    """
    found = Path(path) if Path(path).is_file() else Path(folder) / path
    content = read_merged(found)
    sizes, faults = find_sizes(content), []
    for name in sizes:
        faults += _find_unknown(content[name], content, f"{found}: {name}")
    if "model" in content:
        used = {*sizes, *USED_BY_RECIPE, *fixed, *find_references(content)}
        faults += [
            f"{found}: nothing refers to the key '{key}'; "
            + nearest(key, [other for other in content if other != key])
            for key in content
            if key not in used
        ]
    values, overrides = {}, overrides or {}
    if size != "full":
        if not hasattr(content.get(size), "items"):
            raise SettingError(
                f"{found} has no size '{size}', no such mapping; "
                + nearest(size, ["full", *sizes])
            )
        values = content[size]
    if not hasattr(overrides, "items"):
        raise SettingError(
            f"overrides of {found} must be a mapping such as "
            f'"{{{next(iter(content))}: VALUE}}", got {overrides!r}'
        )
    values = {**values, **overrides, **fixed}
    faults += _find_unknown(values, content, found)
    if faults:
        raise SettingError(*faults)
    # A whole value is replaced, where HyperPyYAML's overrides would merge.
    content.update(values)
    return YAML().load(resolve_references(dump(content), None, True))


def _find_unknown(values, content, where):
    return [
        f"{where} has no key '{key}' to override; {nearest(key, content)} "
        "Correct it, or leave it out"
        for key in values
        if key not in content
    ]


def find_sizes(content):
    """Names of the sizes of a network: mappings that nothing refers to.

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
        if is_mapping(value) and key not in used
    ]


def find_references(node):
    r"""The set of top-level keys that references in a YAML tree start from.

    Example
    -------
    >>> node = YAML().load("a: !ref <b> * 2\nc: [x, !ref '<d[e]>']")
    >>> sorted(find_references(node))
    ['b', 'd']
    """
    if hasattr(node, "values"):
        node = list(node.values())
    if isinstance(node, list):
        return set().union(*map(find_references, node))
    if tag_of(node) not in ("!ref", "!copy"):
        return set()
    return set(REFERENCE.findall(node.value))


def tag_of(node):
    """Tag of a part of a YAML tree, such as ``!ref``, or None."""
    return getattr(getattr(node, "tag", None), "value", None)


def read_merged(path):
    """Read a YAML file merged with those it extends, tags kept."""
    (_, merged), *others = read_files(path)
    for _, content in others:
        _merge(merged, content)
    return merged


def _merge(merged, content):
    for key, value in content.items():
        if is_mapping(value) and is_mapping(merged.get(key)):
            _merge(merged[key], value)
        else:
            merged[key] = value


def is_mapping(node):
    """Whether a part of a YAML tree is a mapping of keys, and no call."""
    return hasattr(node, "items") and not tag_of(node)


def list_keys(content):
    """Keys of a YAML tree, and those within its mappings as GROUP.KEY."""
    return [*content] + [
        f"{group}.{key}"
        for group, inner in content.items()
        if is_mapping(inner)
        for key in inner
    ]


def read_files(path, above=()):
    """Read a YAML file and those it extends, which come first.

    Returns pairs of path and content. ``above`` are the files that extend it.
    """
    path, content = Path(path), read_mapping(path)
    above = {*above, path.resolve()}
    parents, files = content.pop("extends", []), []
    for parent in parents if isinstance(parents, list) else [parents]:
        base = path.parent / str(parent)
        if not base.is_file():
            raise MissingFileError(
                f"{path} extends {base}, which is missing{_nearest_file(base)}"
            )
        if base.resolve() in above:
            raise SettingError(f"{path} extends {base}, which extends it")
        files += read_files(base, above)
    return [*files, (path, content)]


def read_mapping(path):
    """Read a YAML file, which must be a mapping; tags are kept."""
    if not Path(path).is_file():
        raise MissingFileError(f"no YAML file {path}{_nearest_file(path)}")
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


def read_comments(path):
    r"""The comment right above each key of a YAML file, in one line, by path.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.yaml"
    >>> _ = path.write_text("# A file.\n\na:\n  # Learning\n  # rate\n  lr: 1")
    >>> read_comments(path)
    {'a.lr': 'Learning rate'}
    """
    comments, lines, outer = {}, [], []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("#"):
            lines.append(text.lstrip("# "))
            if RULE.match(text):
                lines.clear()
            continue
        if match := KEY.match(line):
            indent, key = len(match[1]), match[2]
            outer = [(i, k) for i, k in outer if i < indent] + [(indent, key)]
            if lines:
                comments[".".join(k for _, k in outer)] = " ".join(lines)
        lines = []
    return comments


def _nearest_file(path):
    """Suggest one of the files beside a missing one."""
    path = Path(path)
    names = [file.name for file in path.parent.glob(f"*{path.suffix}")]
    return f"; {nearest(path.name, names)}"
