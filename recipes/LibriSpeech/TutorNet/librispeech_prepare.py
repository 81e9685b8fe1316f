"""Prepare LibriSpeech, or a folder in its layout, as SpeechBrain manifests.

To run::

    python librispeech_prepare.py /path/to/LibriSpeech --save_folder manifests
"""

import argparse
import logging

from tutornet_sb.util.environment import check_torchaudio
from tutornet_sb.util.errors import failing_in_one_line

with failing_in_one_line("librispeech_prepare.py"):
    check_torchaudio()

from tutornet_sb.corpora.librispeech import (
    find_librispeech,
    prepare_librispeech,
)
from tutornet_sb.util import signals

__all__ = ["find_librispeech", "prepare_librispeech"]


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="One manifest CSV a split, and one of what was skipped."
    )
    add = parser.add_argument
    add("data_folder", metavar="DATA_FOLDER", help="LibriSpeech, or its parent")
    add("--save_folder", default="manifests", help="default: %(default)s")
    splits = {"nargs": "+", "metavar": "SPLIT"}
    add("--splits", **splits, help="default: the standard splits that exist")
    add(
        "--untranscribed",
        **splits,
        default=[],
        help="prepared without transcripts",
    )
    options = {
        "sample_rate": (16000, "in Hz, to which audio will be converted"),
        "max_skipped": (0.01, "greatest part of a split to skip"),
        "max_seconds": (120.0, "longest utterance"),
    }
    for name, (default, text) in options.items():
        add(
            f"--{name}",
            type=type(default),
            default=default,
            help=f"{text}; default: %(default)s",
        )
    return parser.parse_args()


if __name__ == "__main__":
    signals.install()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with failing_in_one_line("librispeech_prepare.py"):
        for manifest in prepare_librispeech(**vars(parse_arguments())).values():
            print(manifest)
