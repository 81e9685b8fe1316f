"""Stand-in: finds a recipe's train.py and calls its functions."""

import importlib.util
from pathlib import Path

from tutornet_sb.util.errors import SettingError


class Experiment:
    """The settings of an experiment."""

    @classmethod
    def load(cls, main_file, options, recipe=None):
        """Read an experiment and check all that can be checked at once."""
        recipe = find_recipe(main_file) if recipe is None else recipe
        return _load_recipe(recipe).read_hparams(main_file, options)


def find_recipe(main_file):
    """Find the recipe folder that a main file belongs to."""
    for folder in [*Path(main_file).resolve().parents, Path.cwd()]:
        if (folder / "hparams" / "base.yaml").is_file():
            return folder
    raise SettingError(
        f"{main_file} lies in no recipe: there is no hparams/base.yaml in a "
        "folder above it, nor in the working folder"
    )


def fill_targets_of(hparams_file, run_opts, overrides):
    """Fill the target store of an experiment; returns the store."""
    recipe = _load_recipe(find_recipe(hparams_file))
    return recipe.fill(hparams_file, run_opts, overrides)


def _load_recipe(folder):
    spec = importlib.util.spec_from_file_location("recipe", folder / "train.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe
