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
    CorpusError,
    find_librispeech,
    prepare_librispeech,
)
from tutornet_sb.util import signals

__all__ = ["CorpusError", "find_librispeech", "prepare_librispeech"]


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="One manifest CSV a split, and one of what was skipped."
    )
    parser.add_argument(
        "data_folder",
        metavar="DATA_FOLDER",
        help="LibriSpeech, or its parent folder",
    )
    parser.add_argument(
        "--save_folder", default="manifests", help="default: %(default)s"
    )
    parser.add_argument(
        "--splits",
        nargs="+",
        metavar="SPLIT",
        help="default: the standard splits that are there",
    )
    parser.add_argument(
        "--untranscribed",
        nargs="+",
        metavar="SPLIT",
        help="splits prepared without their transcripts",
    )
    parser.add_argument(
        "--sample_rate",
        type=int,
        default=16000,
        help="in Hz, what audio will be converted to; default: %(default)s",
    )
    parser.add_argument(
        "--max_skipped",
        type=float,
        default=0.01,
        help="greatest part of a split to skip; default: %(default)s",
    )
    parser.add_argument(
        "--max_seconds",
        type=float,
        default=120.0,
        help="longest utterance; default: %(default)s",
    )
    parser.add_argument("--workers", type=int, help="threads")
    return parser.parse_args()


if __name__ == "__main__":
    signals.install()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with failing_in_one_line("librispeech_prepare.py"):
        for manifest in prepare_librispeech(**vars(parse_arguments())).values():
            print(manifest)
