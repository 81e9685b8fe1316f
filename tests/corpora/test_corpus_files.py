"""The corpus files of the recipe state what a model trained on them is."""

from pathlib import Path

import pytest

from tutornet_sb.util.composition import include

CORPORA = (
    Path(__file__).parents[2] / "recipes/LibriSpeech/TutorNet/hparams/corpora"
)
NAMES = sorted(path.stem for path in CORPORA.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_licence_language_and_origin(name):
    corpus = include(f"{name}.yaml", CORPORA)
    assert corpus["name"] == name
    assert corpus["language"] in ("en", None)
    assert corpus["synthetic"] is (corpus["minilibri"] is not None)


def test_the_licence_is_that_of_the_speech():
    licences = {
        name: include(f"{name}.yaml", CORPORA)["license"] for name in NAMES
    }
    assert licences == {
        "librispeech100": "cc-by-4.0",
        "librispeech960": "cc-by-4.0",
        "mini": "apache-2.0",
        "mini_20h": "apache-2.0",
        "own": None,
        "small": None,
    }
