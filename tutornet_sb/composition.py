"""Experiments put together from several YAML files, one for each choice.

HyperPyYAML's own ``!include`` cannot be swapped from the command line without
losing the overrides that stand beside it, so files are put together here:
main files by :func:`read_experiment`, networks and corpora by :func:`include`
under the ``!applyref`` tag. Any of them may extend another file of its kind.
"""

from io import StringIO
from pathlib import Path

from hyperpyyaml import resolve_references
from ruamel.yaml import YAML


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
    FileNotFoundError
        If the file or one that it extends is missing.
    ValueError
        If a file is not a mapping, or extends itself in the end.
    """
    yaml = YAML()
    text = StringIO()
    yaml.dump(_read_merged(yaml, path), text)
    return text.getvalue()


def include(path, folder, size="full", overrides=None, **fixed):
    """Read a network or a corpus so that the file can be swapped by name.

    Used as ``student: !applyref:tutornet_sb.composition.include``. The values
    at the top of the file are those of the full size; a mapping named as
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
    FileNotFoundError
        If there is no such file, or it extends one that is missing.
    ValueError
        If the file has no such size, or an override names no key of it, or it
        extends itself in the end.

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
        raise FileNotFoundError(
            f"{path} is neither in the working folder nor in {folder}"
        )
    yaml = YAML()
    content = _read_merged(yaml, found)
    values = {}
    if size != "full":
        if not hasattr(content.get(size), "items"):
            raise ValueError(f"{found} has no size '{size}', no such mapping")
        values.update(content[size])
    values.update(overrides or {})
    values.update(fixed)
    unknown = [key for key in values if key not in content]
    if unknown:
        raise ValueError(
            f"{found} has no key '{unknown[0]}' to override; it has "
            f"{', '.join(content)}"
        )
    # A whole value is replaced, where HyperPyYAML's overrides would merge.
    content.update(values)
    text = StringIO()
    yaml.dump(content, text)
    return yaml.load(resolve_references(text.getvalue(), None, True))


def _read_merged(yaml, path):
    merged, seen = _read_mapping(yaml, path), {Path(path).resolve()}
    while "extends" in merged:
        base = Path(path).parent / merged.pop("extends")
        if not base.is_file():
            raise FileNotFoundError(f"{path} extends {base}, which is missing")
        if base.resolve() in seen:
            raise ValueError(f"{path} extends {base}, which extends it")
        seen.add(base.resolve())
        path, extension = base, merged
        merged = _read_mapping(yaml, base)
        for key, value in extension.items():
            merged[key] = value
    return merged


def _read_mapping(yaml, path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such YAML file: {path}")
    with open(path, encoding="utf-8") as file:
        content = yaml.load(file)
    if not hasattr(content, "items"):
        raise ValueError(f"{path} is not a mapping of names to values")
    return content
