"""The utterances of an experiment: found, split, and checked for CTC."""

import hashlib
import logging
import math
from pathlib import Path
from typing import NamedTuple

import torch

from tutornet_sb.corpora import minilibri
from tutornet_sb.corpora.librispeech import (
    find_librispeech,
    prepare_librispeech,
    read_manifest,
)
from tutornet_sb.corpora.tables import KINDS, name_tables, prepare_tables
from tutornet_sb.corpora.tokenizer import pieces, train_tokenizer
from tutornet_sb.distillation.losses import frames_needed
from tutornet_sb.distillation.taps import trying_out
from tutornet_sb.util.errors import InputError, SettingError
from tutornet_sb.util.processes import run_on_main

logger = logging.getLogger(__name__)


class Corpus(NamedTuple):
    """Manifests and tokenizer of a corpus, and its utterances by id."""

    # Paths by split
    manifests: dict
    # Lists of splits: train, valid, test, untranscribed
    splits: dict
    tokenizer_file: Path
    # A sentencepiece.SentencePieceProcessor
    tokenizer: object
    transcribed: dict
    # Their transcripts are not looked at.
    untranscribed: dict
    valid: dict
    # By split
    scored: dict

    @property
    def train(self):
        """All training utterances."""
        return self.transcribed | self.untranscribed


def prepare_corpus(settings):
    """Prepare the corpus that the settings name and read its utterances."""
    if any(settings[f"{kind}_csv"] for kind in KINDS):
        root, manifests, splits = _prepare_tables(settings)
    else:
        root, manifests, splits = _prepare_folder(settings)
    symbols = settings["symbols"]
    kind = settings["corpus"]["tokenizer_type"]
    file = Path(settings["corpus_folder"]) / f"{kind}_{symbols['count']}.model"
    tokenizer = run_on_main(
        train_tokenizer,
        [
            [manifests[split] for split in splits["train"]],
            file,
            kind,
            symbols["count"],
            symbols["letters"],
        ],
    )

    corpus = read_corpus(settings, root, manifests, splits, file, tokenizer)
    _check_letters(corpus, settings["utterances"]["max_skipped"])
    return corpus


def read_corpus(settings, root, manifests, splits, tokenizer_file, tokenizer):
    """Read the manifests of a corpus that is prepared, a ``Corpus``."""

    def read(names, speeds=(100,)):
        return _read_manifests({n: manifests[n] for n in names}, root, speeds)

    speeds = settings["augmentation"]["speeds"] or [100]
    train = read(splits["train"], speeds)
    silent = read(splits["untranscribed"], speeds)
    silent |= keep_share(train, settings["utterances"]["transcribed_share"])
    for key in silent:
        silent[key] |= {"transcribed": False}
    return Corpus(
        manifests,
        splits,
        tokenizer_file,
        tokenizer,
        train,
        silent,
        read(splits["valid"]),
        {name: read([name]) for name in [*splits["valid"], *splits["test"]]},
    )


def _limits(settings):
    return {
        "sample_rate": settings["student"]["model"].features.sample_rate,
        "max_skipped": settings["utterances"]["max_skipped"],
        "max_seconds": settings["utterances"]["max_seconds"],
    }


def _prepare_folder(settings):
    """Find or make a corpus in LibriSpeech layout.

    Returns its folder, the manifests, and the names of the splits by kind.
    """
    corpus, folder = settings["corpus"], settings["data_folder"]
    if folder is None and corpus["minilibri"] is None:
        raise SettingError(
            f"the corpus '{corpus['name']}' is not embedded: give its folder "
            "by --data_folder /path/to/LibriSpeech"
        )
    if folder is None:
        folder = minilibri.find_folder(corpus)
        values = {**corpus["minilibri"], "folder": folder}
        run_on_main(minilibri.make_minilibri, [], values)
    splits = {kind: corpus[f"{kind}_splits"] for kind in KINDS}
    named = None
    if None not in splits.values():
        named = list(dict.fromkeys(sum(map(list, splits.values()), [])))
    untranscribed = list(corpus["untranscribed_splits"])
    manifests = run_on_main(
        prepare_librispeech,
        [folder, Path(settings["corpus_folder"]) / "manifests"],
        {"splits": named, "untranscribed": untranscribed} | _limits(settings),
    )
    root = find_librispeech(folder)
    for kind, prefix in KINDS.items():
        if splits[kind] is None:
            splits[kind] = [
                name
                for name in manifests
                if name.startswith(prefix) and name not in untranscribed
            ]
        if not splits[kind]:
            raise InputError(
                f"{root} has no {prefix} split among {', '.join(manifests)}"
            )
        both = [name for name in splits[kind] if name in untranscribed]
        if both:
            raise InputError(
                f"corpus '{corpus['name']}': {both[0]} stands in "
                f"{kind}_splits and in untranscribed_splits"
            )
    return root, manifests, splits | {"untranscribed": untranscribed}


def _prepare_tables(settings):
    """Prepare a corpus in tables."""
    recipe = settings["recipe_folder"]
    tables = {
        kind: name_tables(kind, settings[f"{kind}_csv"], recipe)
        for kind in KINDS
    }
    missing = [f"--{kind}_csv FILE" for kind in KINDS if not tables[kind]]
    if missing:
        raise SettingError(
            "a corpus in tables has one for training, one to select by and one "
            f"to test on: give {' and '.join(missing)} too"
        )
    embedded = settings["corpus"]["minilibri"] is not None
    if embedded or settings["data_folder"] is not None:
        raise SettingError(
            "--train_csv and a folder of recordings are two corpora: leave out "
            "--data_folder, and give --corpus_yaml hparams/corpora/own.yaml"
        )
    root, manifests = run_on_main(
        prepare_tables,
        [
            tables["train"] | tables["valid"] | tables["test"],
            Path(settings["corpus_folder"]) / "manifests",
        ],
        _limits(settings),
    )
    splits = {kind: list(named) for kind, named in tables.items()}
    return root, manifests, splits | {"untranscribed": []}


def _read_manifests(manifests, root, speeds):
    found = {}
    for split, manifest in manifests.items():
        for key, item in read_manifest(manifest, root).items():
            if key in found:
                raise InputError(
                    f"utterance {key} is in {found[key]['split']} and in "
                    f"{split}: utterances that are used together need unique "
                    "ids"
                )
            found[key] = item | {
                "split": split,
                "transcribed": True,
                "speeds": speeds,
            }
    return found


def keep_share(items, share):
    """Keep a share of the items, at least one, and return the others.

    By hashes of their ids, so that it is the same in all runs, and a smaller
    share is part of a larger one.
    """

    def place(key):
        return hashlib.sha256(key.encode()).digest(), key

    kept = max(1, round(share * len(items)))
    return {key: items.pop(key) for key in sorted(items, key=place)[kept:]}


def _check_letters(corpus, max_skipped):
    """Refuse transcripts in other letters than the tokenizer's.

    A small training set may lack a letter of a test set, but hardly of most of
    its transcripts.
    """
    tokenizer = corpus.tokenizer
    letters = {" ", *"".join(pieces(tokenizer))}
    parts = [("the training set", corpus.transcribed, max_skipped)]
    for split, items in corpus.scored.items():
        parts.append((split, items, max(max_skipped, 0.5)))
    for name, items, limit in parts:
        foreign = {
            key: strange
            for key, item in items.items()
            if (strange := set(item["wrd"]) - letters)
            # The tokenizer may normalise letters.
            and tokenizer.unk_id() in tokenizer.encode(item["wrd"])
        }
        if len(foreign) > limit * len(items):
            found = sorted(set().union(*foreign.values()))
            raise InputError(
                f"{name}: {len(foreign)} of {len(items)} transcripts have "
                f"letters that the tokenizer lacks ({' '.join(found[:20])}), "
                f"the first is that of {next(iter(foreign))}. Write them in "
                "its letters (of the same case, numbers in words), raise "
                "max_skipped, and such letters are left out, or train on an "
                "alphabet of the corpus' own (docs/own_corpus.md)"
            )


def check_longest(corpus, models, slowest=100):
    """Refuse utterances longer than a Transformer's table of positions.

    ``models`` are by the name that errors use, ``slowest`` is in percent.
    """
    seconds = {
        key: 100 * float(item["duration"]) / speed
        for items, speed in (
            (corpus.train, slowest),
            *((items, 100) for items in corpus.scored.values()),
        )
        for key, item in items.items()
    }
    longest = max(seconds, key=seconds.get)
    for name, model in models.items():
        frames = getattr(model.encoder, "max_length", math.inf)
        most = frames * model.frame_period
        if seconds[longest] > most:
            raise InputError(
                f"utterance {longest} has {seconds[longest]:.1f} s, and the "
                f"{name} can encode {most:.1f} s: raise max_length of its "
                "network, or lower max_seconds"
            )


def symbols_of(ids, tokenizer):
    """Leave out unknown symbols, whose index is that of the blank."""
    return [index for index in ids if index != tokenizer.unk_id()]


def _measure_frames(student):
    """Samples a frame of a student, and frames it has beside those."""
    hop, probe = round(student.frame_period * student.features.sample_rate), 100
    with trying_out(student) as device:
        wavs = torch.zeros(1, probe * hop, device=device)
        found = student(wavs, torch.ones(1, device=device)).lengths.item()
    return hop, found - probe


def fit_for_ctc(items, tokenizer, student, listing):
    """Leave out speeds at which an utterance has too few frames for CTC.

    Where no speed is left, the utterance is left out. The file ``listing``
    then names them.
    """
    fitting, short, unknown = {}, [], []
    hop, more = _measure_frames(student)
    for key, item in items.items():
        ids = tokenizer.encode(item["wrd"])
        symbols = symbols_of(ids, tokenizer)
        if len(symbols) < len(ids):
            unknown.append(key)
        needed = frames_needed(symbols)
        samples = round(float(item["duration"]) * student.features.sample_rate)
        # As many as the resampler makes of them
        frames = {
            speed: math.ceil(100 * samples / speed) // hop + more
            for speed in item["speeds"]
        }
        speeds = [s for s in item["speeds"] if frames[s] >= needed]
        left_out = [str(s) for s in item["speeds"] if s not in speeds]
        if not speeds:
            short.append(key)
            continue
        if left_out:
            short.append(f"{key} at {', '.join(left_out)} % of its speed")
        fitting[key] = item | {"speeds": speeds}
    if short:
        run_on_main(listing.write_text, ["\n".join(short) + "\n"])
        logger.warning(
            "%d of %d training utterances have fewer frames than their "
            "transcript needs and are left out, and %d at some of their "
            "speeds: %s; see %s",
            len(items) - len(fitting),
            len(items),
            len(short) - len(items) + len(fitting),
            "; ".join(short[:5]) + ("; ..." if short[5:] else ""),
            listing,
        )
    if unknown:
        logger.warning(
            "%d training transcripts have letters outside the vocabulary, "
            "which are left out; the first is that of %s",
            len(unknown),
            unknown[0],
        )
    return fitting
