"""What is wrong in the input is named in one line, with what to do about it.

Each case spoils a small world (a corpus, a finished teacher, a run whose first
stage is finished, a filled target store), gives a command, and looks at the
exit code, at standard error and at what was there before.
"""

import importlib.util
import io
import json
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
from huggingface_hub import constants
from small_runs import (
    BLOCKS,
    RATE,
    WAV2VEC2_SYMBOLS,
    save_wav2vec2,
    write_corpus,
    write_run,
)

from tutornet_sb import cli
from tutornet_sb.distillation import frame_weighting
from tutornet_sb.inference import transcription
from tutornet_sb.networks import runs
from tutornet_sb.publishing import export as exporting
from tutornet_sb.targets.header import HEADER
from tutornet_sb.training import evaluation, experiment
from tutornet_sb.training.experiment import Experiment
from tutornet_sb.training.teacher import teacher_folder
from tutornet_sb.util import signals
from tutornet_sb.util.errors import (
    InputError,
    SettingError,
    failing_in_one_line,
)
from tutornet_sb.util.options import parse_command_line

RECIPE = Path(__file__).parents[2] / "recipes" / "LibriSpeech" / "TutorNet"
HPARAMS = RECIPE / "hparams"
SPLITS = "dev-clean", "test-clean", "train-clean-100"
TRAIN = Path("corpus") / "train-clean-100" / "1" / "2"
DEV = Path("corpus") / "dev-clean" / "1" / "0"
FIRST = "1-2-0000"
# A port of this machine that nobody listens to
NOWHERE = "http://127.0.0.1:9"


def words_for_train(file="rkd_lstm.yaml", words=(), **options):
    """A command line of train.py; an option of None is left out."""
    options = {
        "data_folder": "corpus",
        "corpus_yaml": "hparams/corpora/small.yaml",
        "corpus_overrides": "{epochs: 2}",
        "student_overrides": "{channels: 4, hidden_size: 4, n_mels: 16}",
        "rkd.share": 0.5,
        "rkd.head_frames": 50,
        "teacher.folder": "teacher",
        "output_folder": "new",
    } | options
    file = Path(file) if Path(file).is_file() else HPARAMS / file
    line = [str(file), "--noprogressbar", *words]
    for key, value in options.items():
        if value is not None:
            line += [f"--{key}", str(value)]
    return line


STORED = {"targets": "store", "store.folder": "store", "store.code_bytes": 2}


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe", RECIPE / "train.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def hasten(patch):
    """Do without the list of all packages that a run leaves behind."""
    patch.setattr(sb.utils.logger, "get_environment_description", lambda: "")


@contextmanager
def tidying(patch):
    """Undo what a run changes in this process."""
    hasten(patch)
    logger = logging.getLogger()
    before, level = logger.handlers[:], logger.level
    patch.setattr(sys, "excepthook", sys.excepthook)
    patch.setattr(logging, "raiseExceptions", True)
    yield
    for handler in logger.handlers:
        if handler not in before:
            handler.close()
    logger.handlers[:] = before
    logger.setLevel(level)


@pytest.fixture
def tidy(monkeypatch):
    with tidying(monkeypatch):
        yield


@pytest.fixture(scope="module")
def world(recipe, tmp_path_factory):
    """A corpus, a teacher, a run stopped after its first stage, a store."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch, tidying(patch):
        patch.chdir(folder)
        patch.setattr(sys, "stdout", io.StringIO())
        write_corpus(Path("corpus"), SPLITS, count=4)
        values = {"blocks": BLOCKS, "encoder_size": 8}
        write_run(Path("teacher"), "jasper_dr", values)
        for options in ({"output_folder": "run"}, STORED):
            recipe.run(*recipe.parse_command_line(words_for_train(**options)))
    shutil.rmtree(folder / "new")
    shutil.rmtree(folder / "run" / "stages" / "skd")
    for name in (runs.RESULTS, runs.WEIGHTS):
        (folder / "run" / name).unlink()
    return folder


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A copy of that world to spoil, and the working folder."""
    shutil.copytree(world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


# --------------------------------------------------------------- ways to spoil


def copying(source, copy):
    """Make a function that copies one of the recipe's files with a mistake."""

    def replacing(old, new):
        def spoil(patch):
            path = HPARAMS / source
            start = f"extends: {path.parent}/"
            text = path.read_text().replace("extends: ", start)
            assert old in text
            Path(copy).write_text(text.replace(old, new, 1))

        return spoil

    return replacing


network = copying("models/lstm.yaml", "student.yaml")
corpus_file = copying("corpora/own.yaml", "corpus.yaml")


def main_file(text, extends=HPARAMS / "rkd_lstm.yaml"):
    def spoil(patch):
        start = f"extends: {extends}\n".encode() if extends else b""
        Path("main.yaml").write_bytes(
            start + (text if isinstance(text, bytes) else text.encode())
        )

    return spoil


def file(name, change):
    """Change the bytes of a file."""

    def spoil(patch):
        path = Path(name)
        path.write_bytes(change(path.read_bytes()))

    return spoil


audio = partial(file, TRAIN / f"{FIRST}.flac")


def sound(wave, rate=RATE, **options):
    """Take another waveform for the first utterance."""

    def change(_):
        file = io.BytesIO()
        soundfile.write(file, wave, rate, **{"format": "FLAC"} | options)
        return file.getvalue()

    return audio(change)


def say_ten_hours(content):
    """Let STREAMINFO promise ten hours, in the low 32 of its 36 bits."""
    return content[:22] + (36000 * RATE).to_bytes(4, "big") + content[26:]


def transcripts(change, folder=TRAIN):
    """Change each line of a chapter's transcripts."""

    def spoil(patch):
        (path,) = folder.glob("*.trans.txt")
        lines = [change(line) for line in path.read_bytes().splitlines()]
        path.write_bytes(b"\n".join(lines) + b"\n")

    return spoil


def first(change):
    """Change the text of the first utterance alone."""
    return transcripts(
        lambda line: change(line) if line.startswith(FIRST.encode()) else line
    )


def texts(change):
    """Change the text of every utterance."""

    def apply(line):
        key, _, text = line.partition(b" ")
        return key + b" " + change(text)

    return transcripts(apply)


def header(*path, value):
    """Change what a target store says of itself."""

    def spoil(patch):
        name = Path("store") / HEADER
        content = json.loads(name.read_text())
        inner = content["what"]
        for key in path[:-1]:
            inner = inner[key]
        assert inner[path[-1]] != value
        inner[path[-1]] = value
        name.write_text(json.dumps(content))

    return spoil


def weights(change):
    """Change the weights of the teacher."""

    def spoil(patch):
        path = Path("teacher") / runs.WEIGHTS
        torch.save(change(torch.load(path)), path)

    return spoil


class Attack:
    """Runs a command when it is unpickled without care."""

    def __reduce__(self):
        return os.system, ("touch attacked",)


def attack(patch):
    with open(Path("teacher") / runs.WEIGHTS, "wb") as file:
        pickle.dump({"encoder": Attack()}, file)


def flip(name, position):
    """Change one byte of each file of a name."""

    def spoil(patch):
        paths = sorted(Path("store").rglob(name))
        assert paths
        for path in paths:
            content = bytearray(path.read_bytes())
            content[position] ^= 255
            path.write_bytes(content)

    return spoil


class Without:
    """A machine on which some packages are not installed."""

    def __init__(self, names):
        self.names, self.finders = names, sys.meta_path[:]

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return None
        found = (f.find_spec(name, path, target) for f in self.finders)
        return next((spec for spec in found if spec is not None), None)


EXPORT = "export", "teacher", "exported"
COMPARE = "compare", "teacher"


def without(*names):
    def spoil(patch):
        for module in list(sys.modules):
            # What has imported it has to import it again.
            ours = module.startswith("tutornet_sb.networks.huggingface")
            if module.partition(".")[0] in names or ours:
                patch.delitem(sys.modules, module)
        patch.setattr(sys, "meta_path", [Without(names)])

    return spoil


def offline(patch):
    patch.setattr(constants, "ENDPOINT", NOWHERE)


def full_log(patch):
    """The log of the first stage is on a disk without room."""
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is not there")
    Path("new/stages/rkd").mkdir(parents=True)
    Path("new/stages/rkd/train_log.txt").symlink_to("/dev/full")


def full_disk(patch):
    """A disk that is full when the second stage saves."""
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is not there")
    save = torch.save

    def no_room(content, path, *args, **kwargs):
        place = "/dev/full" if "/stages/skd/" in str(path) else path
        save(content, place, *args, **kwargs)

    patch.setattr(torch, "save", no_room)


def a_file(name):
    return lambda patch: Path(name).write_text("not a folder\n")


# ------------------------------------------------------------------- the cases


class Case(NamedTuple):
    """One mistake."""

    name: str
    # What the line must say, a regular expression or several
    said: object
    # Of train.py
    options: dict = {}
    # Called in the world with a MonkeyPatch
    spoil: object = None
    # Of tutornet, instead of train.py
    command: list = None
    # Whether nothing may have been written
    is_early: bool = False


def yaml(name, said, spoil=None, **options):
    """A mistake in the values: found before anything is made."""
    return Case(name, said, options, spoil, is_early=True)


def own(name, said, spoil, **options):
    """A mistake in a network's file of the user's own."""
    options = {"student_yaml": "student.yaml"} | options
    return yaml(name, said, spoil, **options)


def data(name, said, spoil, **options):
    """A mistake in the corpus."""
    return Case(name, said, options, spoil)


def table(name, said, change=None, **options):
    """A mistake in a corpus that lies in tables."""
    tables = {f"{kind}_csv": f"{kind}.csv" for kind in TABLES}
    options = {"data_folder": None} | tables | options

    def spoil(patch):
        for kind, split in TABLES.items():
            write_table(Path(f"{kind}.csv"), split)
        if change is not None:
            path = Path("train.csv")
            path.write_bytes(change(path.read_bytes()))

    return Case(name, said, options, spoil)


TABLES = {"train": SPLITS[2], "valid": SPLITS[0], "test": SPLITS[1]}


def write_table(path, split):
    """Name the recordings of a split, and what is spoken in them."""
    lines = ["path,text"]
    for listing in sorted(Path("corpus", split).rglob("*.trans.txt")):
        for line in listing.read_text().splitlines():
            key, _, text = line.partition(" ")
            lines.append(f"{listing.parent / key}.flac,{text}")
    path.write_text("\n".join(lines) + "\n")


def stored(name, said, spoil=None, **options):
    """A store that is not the one wanted."""
    return Case(name, said, STORED | options, spoil)


CASES = {
    "values": [
        yaml("misspelt", ["--epcohs", "did you mean epochs"], epcohs=3),
        yaml(
            "of SpeechBrain, misspelt",
            ["--presision", "did you mean precision"],
            presision="bf16",
        ),
        yaml("given twice", "give each option once", words=["--seed=1"] * 2),
        yaml("not quoted", ["--lr: {", "quote a value"], lr="{"),
        yaml(
            "without dashes", ["seed", "options begin with --"], words=["seed"]
        ),
        yaml("not a choice", ["--precision", "'fp7'"], precision="fp7"),
        yaml(
            "not offered", ["--debug_batches", "not offered"], debug_batches=3
        ),
        yaml(
            "a word",
            "epochs must be a whole number, got 'three'",
            epochs="three",
        ),
        yaml("no number", "lr must be a number, got 'fast'", lr="fast"),
        yaml(
            "negative",
            "batch_seconds must be a positive number, got -1",
            batch_seconds=-1,
        ),
        yaml(
            "no whole number",
            "num_workers must be a whole number, got 1.5",
            num_workers=1.5,
        ),
        yaml(
            "not true",
            "teacher.trust_remote_code must be True or False, got 'yes'",
            **{"teacher.trust_remote_code": "yes"},
        ),
        yaml("no list", "stages must be a list, got 'skd'", stages="skd"),
        yaml(
            "a mapping",
            "--lr must be a single value .*got the mapping",
            lr="{a: 1}",
        ),
        yaml(
            "unknown stage",
            "stages: .*among ctc, rkd, skd, pseudo",
            stages="[rkd, sdk]",
        ),
        yaml("no epochs left", "rkd.share 1.0 of 2", **{"rkd.share": 1.0}),
        yaml(
            "too few epochs for two stages",
            "rkd.share 0.25 of 2 .*: give --rkd.share 0.5 and --epochs 2",
            **{"rkd.share": 0.25},
        ),
        yaml(
            "unknown loss",
            "skd.loss must be 'l2', 'kl' or 'guided', got 'l3'",
            **{"skd.loss": "l3"},
        ),
        yaml(
            "unknown weighting",
            "rkd.frame_weighting must be .*did you mean nonblank",
            **{"rkd.frame_weighting": "non_blank"},
        ),
        yaml(
            "unknown encoding",
            "store.posteriors must be .*did you mean topk",
            **{"store.posteriors": "top_k"},
        ),
        yaml(
            "unknown source", "targets must be .*mean store", targets="stored"
        ),
        yaml(
            "unknown kind",
            "teacher.kind must be .*mean ctc",
            **{"teacher.kind": "CTC"},
        ),
        yaml(
            "learns nothing",
            ["ctc_weight .* both 0", "--skd.weight_final 1"],
            **{"skd.ctc_weight": 0},
        ),
        yaml(
            "loss that has no such value",
            "the guided loss .* takes no temperature",
            **{"skd.loss": "guided"},
            **{"skd.temperature": 2},
        ),
        yaml(
            "key of a pair",
            r"pairs\[0\] must be a mapping such as .*techer",
            **{"rkd.pairs": "[{techer: encoder, student: encoder}]"},
        ),
        yaml(
            "no pair",
            ["pairs must be a whole number from 1 up, or a list", "got 0"],
            **{"rkd.pairs": "0"},
        ),
        yaml(
            "unknown layer of the student",
            ["student has no layer 'encoder.cnv'", "encoder.conv"],
            **{"rkd.pairs": "[{teacher: encoder, student: encoder.cnv}]"},
        ),
        yaml(
            "layer of other frames",
            ["student's layer 'features.fbank", "cannot be tapped"],
            **{
                "rkd.pairs": "[{teacher: encoder, "
                "student: features.fbank.compute_STFT}]"
            },
        ),
        yaml(
            "key of an intermediate head",
            r"intermediate\[0\] must be a mapping such as {student: .*teacher",
            intermediate="[{teacher: encoder}]",
        ),
        yaml(
            "unknown layer with an intermediate head",
            ["student has no layer 'encoder.cnv'", "encoder.conv"],
            intermediate="[{student: encoder.cnv}]",
        ),
        Case(
            "unknown layer of a teacher to come",
            ["teacher has no layer 'encoder.blok.1'", r"encoder.blocks.1"],
            {
                "rkd.pairs": "[{teacher: encoder.blok.1, student: encoder}]",
                "teacher.folder": "to come",
            },
        ),
        Case(
            "unknown layer of the teacher",
            ["teacher has no layer 'encoder.blok.1'", r"encoder.blocks.1"],
            {"rkd.pairs": "[{teacher: encoder.blok.1, student: encoder}]"},
        ),
        Case(
            "more codes than dimensions",
            ["code_bytes must be 1 to 6", "layer encoder"],
            {"targets": "store", "store.code_bytes": 9},
        ),
        yaml(
            "language model is missing",
            "no language model at lm.arpa",
            **{"decoding.beam_size": 5},
            **{"decoding.kenlm_model_path": "lm.arpa"},
        ),
        yaml(
            "language model without a search",
            "give --decoding.beam_size",
            **{"decoding.kenlm_model_path": "lm.arpa"},
        ),
        yaml(
            "argument of an object",
            r"opt_class\.learning_rate: torch.optim.AdamW takes no such",
            opt_class="{learning_rate: 3}",
        ),
        yaml(
            "size of a corpus",
            r"corpus\.minilibri\.train_minuts: .*mean train_minutes",
            corpus_yaml="hparams/corpora/mini.yaml",
            corpus_overrides="{minilibri: {train_minuts: 1}}",
        ),
        yaml(
            "of another student",
            [r"jasper_mini\.yaml .*'hidden_size'", "mean encoder_size"],
            student_yaml="hparams/models/jasper_mini.yaml",
            student_overrides="{hidden_size: 3}",
        ),
        yaml(
            "of a student, misspelt",
            [r"lstm\.yaml .*'chanels'", "mean channels"],
            student_overrides="{chanels: 16}",
        ),
        yaml(
            "overrides that are none",
            "overrides of .*lstm.yaml must be a mapping such as .*'channels'",
            student_overrides="channels",
        ),
        yaml(
            "of a corpus, misspelt",
            [r"small\.yaml .*'epoch'", "mean epochs"],
            corpus_overrides="{epoch: 1}",
        ),
        yaml(
            "unknown size",
            [r"lstm\.yaml has no size 'smal'", "mean small"],
            student_size="smal",
        ),
    ],
    "files": [
        yaml(
            "missing", [r"rkd_lsmt\.yaml", "mean .*lstm"], file="rkd_lsmt.yaml"
        ),
        yaml(
            "missing student",
            [r"no YAML file .*models/lsmt\.yaml", r"mean lstm\.yaml"],
            student_yaml="hparams/models/lsmt.yaml",
        ),
        yaml(
            "missing corpus",
            [r"corpora/smal\.yaml", r"mean small\.yaml"],
            corpus_yaml="hparams/corpora/smal.yaml",
        ),
        yaml(
            "extends a missing one",
            r"main\.yaml extends .*bse\.yaml, which is missing",
            main_file("", extends="bse.yaml"),
            file="main.yaml",
        ),
        yaml(
            "misspelt key",
            [r"main\.yaml: .*'batch_secnds'", "mean batch_seconds"],
            main_file("batch_secnds: 3\n"),
            file="main.yaml",
        ),
        yaml(
            "misspelt mapping",
            [r"main\.yaml: .*'student_override'", "mean student_overrides"],
            main_file("student_override: {channels: 3}\n"),
            file="main.yaml",
        ),
        yaml(
            "no YAML",
            r"main\.yaml is no valid YAML: line 3",
            main_file("lr: 0.1\nepochs: [3\n"),
            file="main.yaml",
        ),
        yaml(
            "not UTF-8",
            r"main\.yaml is not UTF-8",
            main_file(b"method: \xff\n"),
            file="main.yaml",
        ),
        yaml(
            "extends nothing",
            [r"main\.yaml gives no value for", "extend base.yaml"],
            main_file(
                "".join(
                    f"{key}: {{}}\n"
                    for key in (
                        "data_folder",
                        "corpus_yaml",
                        "corpus_overrides",
                        "student_overrides",
                        "rkd_share",
                        "head_frames",
                        "teacher_folder",
                        "output_folder",
                        "recipe_folder",
                    )
                ),
                extends=None,
            ),
            file="main.yaml",
        ),
        yaml(
            "corpus with a value too many",
            r"corpus\.learning_rate: corpus\.yaml",
            corpus_file("name: own", "name: own\nlearning_rate: 1"),
            corpus_yaml="corpus.yaml",
        ),
        yaml(
            "corpus with a value too few",
            r"main.*|rkd_lstm\.yaml.*corpus\[tokenizer_type\]",
            corpus_file("tokenizer_type: char\n", ""),
            corpus_yaml="corpus.yaml",
        ),
        own(
            "student is no YAML",
            r"student\.yaml is no valid YAML: line 7",
            network("n_mels: 64", "n_mels: [64"),
        ),
        own(
            "misspelt value of a student",
            r"student\.yaml: nothing refers to the key 'hiden_size'",
            network("cell: lstm", "hiden_size: 9\ncell: lstm"),
        ),
        own(
            "misspelt value of a size",
            r"student\.yaml: small has no key 'hiden_size'",
            network("    hidden_size: 96", "    hiden_size: 96"),
        ),
        own(
            "misspelt argument",
            [
                r"student\.model\.encoder\.hiden_size: .*RecurrentEncoder",
                "did you mean hidden_size",
            ],
            network("        hidden_size:", "        hiden_size:"),
        ),
        own(
            "argument missing",
            r"student\.model\.encoder: .*missing .*'hidden_size'",
            network("        hidden_size: !ref <hidden_size>\n", ""),
        ),
        own(
            "misspelt class",
            [r"student\.model\.encoder: there is no", "mean RecurrentEncoder"],
            network("RecurrentEncoder", "RecurentEncoder"),
        ),
        own(
            "unknown reference",
            [r'"hidden_sizes" is not valid'],
            network("!ref <hidden_size>", "!ref <hidden_sizes>"),
        ),
        own(
            "no model",
            r"student\.yaml has no AcousticModel under the key 'model'",
            network("model: !new", "network: !new"),
        ),
        own(
            "sizes that do not match",
            ["network cannot encode", "sizes"],
            network("<hidden_size> * <directions>", "<hidden_size>"),
        ),
    ],
    "audio": [
        data("empty", ["empty audio file", FIRST], audio(lambda _: b"")),
        data(
            "header alone",
            [f"utterance {FIRST}: .*{FIRST}.flac cannot be read", "Repair"],
            audio(lambda content: content[:100]),
        ),
        data(
            "truncated",
            [f"utterance {FIRST}: .*{FIRST}.flac cannot be read", "Repair"],
            audio(lambda content: content[: len(content) // 2]),
        ),
        data(
            "truncated, read by another process",
            [f"utterance {FIRST}: .*{FIRST}.flac cannot be read", "Repair"],
            audio(lambda content: content[: len(content) // 2]),
            num_workers=1,
        ),
        data(
            "truncated between two stages",
            [f"utterance {FIRST}: .*{FIRST}.flac cannot be read", "stays"],
            audio(lambda content: content[: len(content) // 2]),
            output_folder="run",
        ),
        data(
            "not finite",
            [f"utterance {FIRST}: .*not finite", "Repair"],
            sound([0.1, np.nan] * 5000, format="WAV", subtype="FLOAT"),
        ),
        data("4 kHz", ["4000 Hz outside", FIRST], sound(np.ones(2000), 4000)),
        data(
            "longer than a Transformer's table of positions",
            f"utterance {FIRST} has 3.0 s, and the student can encode 2.4 s",
            sound(np.sin(np.arange(3 * RATE))),
            student_yaml="hparams/models/transformer.yaml",
            student_overrides="{max_length: 120}",
        ),
        data("one sample", ["shorter than 0.04 s", FIRST], sound(np.ones(1))),
        data(
            "ten hours",
            ["longer than max_seconds", FIRST],
            audio(say_ten_hours),
        ),
        data(
            "no audio", ["unreadable audio", FIRST], audio(lambda _: b"x" * 99)
        ),
        data(
            "missing",
            ["transcript without audio", FIRST, "max_skipped"],
            lambda patch: (TRAIN / f"{FIRST}.flac").unlink(),
        ),
        Case(
            "truncated, to be transcribed",
            f"{FIRST}.flac: it cannot be read as audio",
            spoil=audio(lambda content: content[: len(content) // 2]),
            command=["transcribe", "teacher", str(TRAIN / f"{FIRST}.flac")],
        ),
    ],
    "text": [
        data(
            "lower case",
            ["4 of 4 transcripts .*e h o", FIRST, "same case"],
            texts(bytes.lower),
        ),
        data(
            "digits",
            ["4 of 4 transcripts .*1", FIRST, "numbers in words"],
            texts(lambda text: text.replace(b"ONE", b"1")),
        ),
        data(
            "outside the vocabulary",
            ["1 of 4 transcripts .*É", FIRST, "max_skipped"],
            first(lambda line: line + " CAFÉ".encode()),
        ),
        data(
            "lower case in the development set",
            ["dev-clean: 4 of 4 transcripts", "1-0-0000"],
            transcripts(lambda line: line[:8] + line[8:].lower(), folder=DEV),
        ),
        data(
            "not UTF-8",
            ["transcript not UTF-8", FIRST, "Repair"],
            first(lambda line: line + b" CAF\xc9"),
        ),
        data(
            "empty",
            ["empty transcript", FIRST, "Repair"],
            first(lambda line: FIRST.encode()),
        ),
        data(
            "duplicate",
            ["duplicate id", FIRST, "Repair"],
            first(lambda line: line + b"\n" + line),
        ),
        data(
            "longer than its frames",
            "stage skd: no training utterance is left",
            texts(lambda text: b"ANTIDISESTABLISHMENTARIANISM " * 9),
            file="skd_lstm.yaml",
        ),
        data(
            "others than before",
            ["run holds another experiment", "sha256", "continue_anyway"],
            texts(lambda text: text + b" ONE"),
            output_folder="run",
        ),
        data(
            "of another chapter",
            ["id of another chapter", FIRST, "Repair"],
            first(lambda line: b"9" + line[1:]),
        ),
    ],
    "tables": [
        table("missing", r"none\.csv: No such file", train_csv="none.csv"),
        table(
            "none to select by",
            "give --valid_csv FILE and --test_csv FILE too",
            valid_csv=None,
            test_csv=None,
        ),
        table(
            "besides a folder",
            "two corpora: leave out --data_folder",
            data_folder="corpus",
        ),
        table(
            "besides an embedded corpus",
            "two corpora: .* --corpus_yaml hparams/corpora/own.yaml",
            corpus_yaml="hparams/corpora/mini.yaml",
        ),
        table(
            "two of a name",
            r"train\.csv and corpus/\.\./train\.csv have the same name",
            train_csv="[train.csv, corpus/../train.csv]",
        ),
        table(
            "no columns",
            [r"train\.csv: its first line must name", "'path;text'"],
            lambda content: content.replace(b",", b";"),
        ),
        table(
            "no audio",
            ["train: 1 of 4 .*no such audio file", "gone", "max_skipped"],
            lambda content: content.replace(FIRST.encode(), b"gone"),
        ),
        table(
            "row cut short",
            ["train: 1 of 5 .*1 columns instead of 2", "line 6"],
            lambda content: content + b"corpus/x.flac\n",
        ),
        table(
            "other letters",
            ["1 of 4 transcripts .*ß", "own_corpus.md"],
            lambda content: content.replace(b"ONE\n", "GROß\n".encode(), 1),
        ),
        yaml(
            "pieces without a number",
            "corpus.vocab_size: a bpe tokenizer needs a number",
            corpus_overrides="{tokenizer_type: bpe, vocab_size: null}",
        ),
        yaml(
            "alphabet of no corpus",
            ["gives no vocab_size", "--train_csv FILE or --data_folder"],
            data_folder=None,
            corpus_yaml="hparams/corpora/own.yaml",
        ),
        yaml("number", "train_csv must be a file, a list .*got 3", train_csv=3),
    ],
    "checkpoints": [
        Case(
            "of another architecture",
            "teacher/model.ckpt holds the weights of another network",
            spoil=weights(lambda _: torch.nn.Linear(2, 2).state_dict()),
        ),
        Case(
            "of other sizes",
            "teacher/model.ckpt .*another shape: head.weight",
            spoil=weights(
                lambda state: state | {"head.weight": torch.zeros(3, 3)}
            ),
        ),
        Case(
            "truncated",
            ["teacher/model.ckpt cannot be read", "cut short"],
            spoil=file(
                "teacher/model.ckpt",
                lambda content: content[: -len(content) // 2],
            ),
        ),
        Case(
            "with code in it",
            "teacher/model.ckpt cannot be read as model weights",
            spoil=attack,
        ),
        Case(
            "of another vocabulary",
            ["teacher teacher", "corpus small", "cannot|symbols"],
            {
                "corpus_overrides": "{epochs: 2, tokenizer_type: bpe, "
                "vocab_size: 11}"
            },
        ),
        Case(
            "no model",
            "teacher/model.yaml is no valid YAML|model.yaml.*line",
            spoil=file("teacher/model.yaml", lambda content: content + b"a: ["),
        ),
        Case(
            "truncated, to be transcribed by",
            ["teacher/model.ckpt cannot be read", "cut short"],
            spoil=file("teacher/model.ckpt", lambda content: content[:999]),
            command=["transcribe", "teacher", str(TRAIN)],
        ),
        Case(
            "with code in it, to be exported",
            "teacher/model.ckpt cannot be read as model weights",
            spoil=attack,
            command=["export", "teacher", "exported"],
        ),
        Case(
            "unfinished, to be exported",
            "run holds no finished run of train.py",
            command=["export", "run", "exported"],
        ),
    ],
    "store": [
        stored(
            "teacher's weights",
            ["store holds other targets", "weights is ", "delete that one"],
            weights(
                lambda state: state | {"head.bias": state["head.bias"] + 1}
            ),
        ),
        stored(
            "layer",
            [
                "store holds other targets",
                "taps is {'encoder.blocks.1': 6, 'encoder': 8}",
                "'head': 29",
            ],
            **{"rkd.pairs": "[{teacher: head, student: encoder}]"},
            **{"store.hidden": "rq"},
        ),
        stored(
            "features",
            ["store holds other targets", "hop_samples is 80", "160"],
            header("teacher", "features", "hop_samples", value=80),
        ),
        stored(
            "frame period",
            ["store holds other targets", "frame_period is 0.04", "0.02"],
            header("frame_period", value=0.04),
        ),
        stored(
            "vocabulary",
            ["store holds other targets", "symbols"],
            header("vocabulary", "symbols", value=["a"] * 29),
        ),
        stored(
            "map",
            ["store holds other targets", "map\\[0\\] is 1"],
            header("vocabulary", "map", value=[1]),
        ),
        stored(
            "encoding",
            ["store holds other targets", "posteriors is topk", "fp16"],
            **{"store.posteriors": "fp16"},
        ),
        stored(
            "bytes",
            ["store holds other targets", "code_bytes is 2", "now it is 4"],
            **{"store.code_bytes": 4},
        ),
        stored(
            "format",
            ["store of format 99", "fill it again"],
            header("format", value=99),
        ),
        stored(
            "damaged header",
            [f"store/{HEADER} is damaged", "fill it again"],
            file(f"store/{HEADER}", lambda content: content[:99]),
        ),
        stored(
            "damaged end of a shard",
            [r"\.shard", "damaged", "--repair"],
            flip("*.shard", -1),
        ),
        stored(
            "damaged utterance",
            [
                r"\.shard is damaged: the targets of train-clean-100/1-2",
                "--repair",
            ],
            flip("*.shard", 60),
        ),
        stored(
            "damaged codebooks",
            ["store/codebooks", "missing or damaged", "fill it again"],
            flip("codebooks*", 5),
        ),
        stored(
            "length of the audio",
            f"utterance train-clean-100/{FIRST}: the teacher received 6400",
            sound(np.ones(7000)),
        ),
        stored(
            "no store",
            ["other", "no target store", "choose another folder"],
            lambda patch: (Path("other").mkdir(), a_file("other/file")(patch)),
            **{"store.folder": "other"},
        ),
        Case(
            "nothing there to check",
            "x holds no target store",
            command=["targets", "--to", "x", "--check"],
        ),
        Case(
            "damage, found by a check",
            ["shards of store are damaged", "--repair"],
            spoil=flip("*.shard", 60),
            command=["targets", "--to", "store", "--check"],
        ),
        Case(
            "main file in no recipe",
            "nowhere.yaml lies in no recipe",
            command=["targets", "nowhere.yaml", "--to", "x"],
        ),
        Case(
            "no main file",
            "HPARAMS is missing",
            command=["targets", "--to", "x"],
        ),
        Case(
            "check and repair",
            "not both",
            command=["targets", "--to", "x", "--check", "--repair"],
        ),
        Case(
            "no teacher",
            ["method ctc uses no targets of a teacher", "rkd or skd"],
            command=["targets", str(HPARAMS / "ctc_lstm.yaml"), "--to", "x"],
        ),
        Case(
            "nothing there to repair",
            "x holds no target store",
            command=[
                *("targets", str(HPARAMS / "skd_lstm.yaml")),
                *("--to=x", "--repair"),
            ],
        ),
    ],
    "environment": [
        data(
            "output in a file",
            ["output folder file/new cannot be written", "--output_folder"],
            a_file("file"),
            output_folder="file/new",
        ),
        data(
            "output where nobody may write",
            ["/proc/new cannot be written to", "--output_folder"],
            None,
            output_folder="/proc/new",
        ),
        data(
            "no space for a log",
            ["no space is left", "stays", "same command again"],
            full_log,
        ),
        data(
            "no space for a checkpoint",
            ["no space is left to write to", "stay", "again"],
            full_disk,
            output_folder="run",
        ),
        Case(
            "no space for transcripts",
            ["no space is left", "same command again"],
            command=[
                *("transcribe", "teacher", str(TRAIN / f"{FIRST}.flac")),
                *("--output", "/dev/full"),
            ],
        ),
        data(
            "no network",
            ["hub id", "hub cannot be reached", "owner/model"],
            offline,
            **{"teacher.source": "owner/model"},
        ),
        Case(
            "no network, for a model",
            ["owner/model", "cannot be reached|cannot be loaded"],
            spoil=offline,
            command=["transcribe", "owner/model", str(TRAIN)],
        ),
        data(
            "no language model's package",
            "not installed: pip install kenlm",
            lambda patch: (without("kenlm")(patch), a_file("lm.arpa")(patch)),
            **{"decoding.beam_size": 5},
            **{"decoding.kenlm_model_path": "lm.arpa"},
        ),
        data(
            "no transformers",
            "transformers .*: pip install 'tutornet-sb\\[huggingface\\]'",
            without("transformers"),
            student_yaml="hparams/models/wav2vec2.yaml",
            student_overrides=None,
        ),
        *(
            Case(
                f"{command[0]} without {package}",
                f"{package} .*: pip install 'tutornet-sb\\[{extra}\\]'",
                spoil=without(package),
                command=command,
                is_early=True,
            )
            for package, extra, command in (
                ("sherpa_onnx", "export", [*EXPORT, "--sherpa"]),
                ("onnxruntime", "export", [*EXPORT, "--int8"]),
                ("onnx", "export", [*EXPORT, "--onnx"]),
                ("onnxruntime", "export", ["transcribe", "m.onnx", "a.wav"]),
                ("matplotlib", "experiments", [*COMPARE, "--to", "report"]),
            )
        ),
        data("no corpus", "no folder .*nowhere", None, data_folder="nowhere"),
        data(
            "no corpus named",
            ["corpus 'small' is not embedded", "--data_folder"],
            None,
            data_folder=None,
        ),
        data(
            "no development set",
            ["no dev split among", "test-clean"],
            lambda patch: shutil.rmtree(DEV.parents[1]),
        ),
    ],
}
# Found by the same code as others of their groups
SLOW = {
    "audio": ("no audio", "header alone"),
    "text": ("not UTF-8", "empty", "of another chapter"),
    "checkpoints": ("of other sizes", "truncated"),
    "store": ("features", "frame period", "vocabulary", "map", "bytes"),
}
TABLE = [
    pytest.param(
        case,
        id=f"{group}: {case.name}",
        marks=pytest.mark.slow if case.name in SLOW.get(group, ()) else (),
    )
    for group, cases in CASES.items()
    for case in cases
]
# What a stopped run may have changed of what was there
MAY_CHANGE = re.compile(r"log\.txt|env\.log|train\.py|manifests/|\.lock")


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and os.access(path, os.R_OK)
        if not path.is_symlink()
    }


def run(case, recipe, monkeypatch):
    """Run the command of a case in this process."""
    if case.command is None:
        command = ["train.py", *words_for_train(**case.options)]
        monkeypatch.setattr(sys, "argv", command)
        recipe.main()
    else:
        cli.app(case.command)


@pytest.mark.parametrize("case", TABLE)
def test_a_mistake_is_one_line(case, recipe, place, tidy, monkeypatch, capsys):
    if case.spoil is not None:
        case.spoil(monkeypatch)
    before = contents(place)
    with pytest.raises(SystemExit) as stop:
        run(case, recipe, monkeypatch)
    monkeypatch.undo()
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert stop.value.code == 2, lines[-1]
    program = f"tutornet {case.command[0]}" if case.command else "train.py"
    spoken = [line for line in lines if line.startswith(f"{program}: ")]
    assert "Traceback" not in said.err + said.out
    for part in [case.said] if isinstance(case.said, str) else case.said:
        assert re.search(part, spoken[0]), (part, spoken[0])
    after = contents(place)
    for name, content in before.items():
        if not MAY_CHANGE.search(name):
            assert after[name] == content, name
    if case.is_early:
        assert after.keys() == before.keys()
    assert not (place / "attacked").exists()


# ------------------------------------------------- before the first long step


def spend_no_time(recipe, monkeypatch):
    """Let a run that prepares, trains or scores anything fail otherwise."""

    def spend(*_):
        raise AssertionError("too late")

    for name in ("prepare_corpus", "train"):
        monkeypatch.setattr(recipe, name, spend)


def load(words):
    """The experiment of a command line of train.py."""
    file, _, options = parse_command_line(words)
    return Experiment.load(file, options, RECIPE)


def say(recipe, monkeypatch, capsys, **options):
    """The line of an error that train.py ends in."""
    words = words_for_train(**options)
    assert stop_code(recipe, monkeypatch, words) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def headless(place):
    """A teacher without a CTC head."""
    save_wav2vec2(place / "ctc", WAV2VEC2_SYMBOLS)
    config = json.loads((place / "ctc" / "config.json").read_text())
    config["architectures"] = ["Wav2Vec2Model"]
    (place / "ctc" / "config.json").write_text(json.dumps(config))
    return {"teacher.source": "ctc", "teacher.folder": None}


@pytest.mark.parametrize(
    "method, options, said",
    [
        ("skd", {}, "stage skd has no posteriors to learn from"),
        ("rkd+skd", {}, "stage skd has no posteriors"),
        ("pseudo", {}, "stage pseudo has no transcripts to learn from"),
        ("rkd+pseudo", {}, "stage pseudo has no transcripts"),
        (
            "rkd+ctc",
            {"rkd.frame_weighting": "nonblank"},
            "no CTC head, whose posteriors frame weighting nonblank needs",
        ),
    ],
)
def test_what_the_stages_need_of_a_teacher(
    recipe, headless, tidy, monkeypatch, capsys, method, options, said
):
    spend_no_time(recipe, monkeypatch)
    stages = f"[{method.replace('+', ', ')}]"
    options = headless | options | {"stages": stages}
    line = say(recipe, monkeypatch, capsys, **options)
    assert line.startswith("train.py: teacher ctc has no CTC head")
    assert said in line


def test_a_teacher_without_a_head_teaches_by_energy_in_the_same_folder(
    recipe, headless, tidy, monkeypatch, capsys
):
    """The command that was refused does not keep its folder."""
    options = headless | {"stages": "[rkd, ctc]"}
    wrong = options | {"rkd.frame_weighting": "nonblank"}
    say(recipe, monkeypatch, capsys, **wrong)
    # Measured of that teacher, maybe
    left = Path("new") / "stages" / "rkd" / "left.json"
    left.parent.mkdir(parents=True)
    left.touch()
    log = Path("new") / "log.txt"
    assert "frame_weighting" not in log.read_text().partition("Stopped by")[0]
    weights = []
    energy = frame_weighting.energy
    monkeypatch.setitem(
        frame_weighting.FRAME_WEIGHTINGS,
        "energy",
        lambda *_: weights.append(energy(*_)) or weights[-1],
    )
    recipe.run(*recipe.parse_command_line(words_for_train(**options)))
    assert "is energy: teacher ctc has no CTC head" in log.read_text()
    assert weights and not left.exists()
    stages = runs.read_results("new")["stages"]
    assert list(stages) == ["rkd", "ctc"]
    # In the model card too
    told = exporting._training(Path("new"), runs.read_results("new"))["stages"]
    assert stages["rkd"]["frame_weighting"] == "energy"
    assert told["rkd"]["rkd.frame_weighting"] == "energy"


def test_the_package_of_the_codebooks_is_there(
    recipe, place, tidy, monkeypatch, capsys
):
    spend_no_time(recipe, monkeypatch)
    without("faiss")(monkeypatch)
    options = {"targets": "store", "store.code_bytes": 2}
    line = say(recipe, monkeypatch, capsys, **options)
    assert "faiss is needed and not installed" in line
    assert not Path("new").exists()


@pytest.mark.parametrize("change", ["option", "corpus", "language model"])
def test_what_is_wrong_is_told_before_a_missing_teacher_is_trained(
    recipe, place, tidy, monkeypatch, capsys, change
):
    monkeypatch.setattr(recipe, "train", lambda *_: 1 / 0)
    options = {"teacher.folder": None, "output_folder": "run"}
    # As if it had been made so
    path = Path("run") / runs.HYPERPARAMS
    words = words_for_train(**options)
    path.write_text(load(words).text)
    if change == "option":
        options["lr"] = 0.5
        said = "run holds another experiment: there lr is 0.003, and now it is"
    elif change == "corpus":
        texts(lambda text: text + b" ONE")(monkeypatch)
        said = "run holds another experiment: .*sha256"
    else:
        a_file("lm.arpa")(monkeypatch)
        monkeypatch.setattr(
            experiment, "check_language_model", lambda path: None
        )
        monkeypatch.setattr(evaluation, "CTCBeamSearcher", broken_searcher)
        options |= {
            "decoding.beam_size": 5,
            "decoding.kenlm_model_path": "lm.arpa",
        }
        said = "lm.arpa is no language model"
    line = say(recipe, monkeypatch, capsys, **options)
    assert re.search(said, line)


def broken_searcher(kenlm_model_path, **_):
    raise InputError(f"{kenlm_model_path} is no language model")


def test_a_teacher_of_another_size_has_a_folder_of_its_own(place):
    def read(**options):
        options = {"teacher.folder": None, "output_folder": None} | options
        words = words_for_train(**options)
        settings = load(words).settings
        return settings["output_folder"], teacher_folder(settings)

    start = "results/small/rkd+skd_lstm_by_"
    found = {
        "jasper_dr": read(),
        "jasper_dr_full": read(**{"teacher.size": "full"}),
        "quartznet": read(**{"teacher.yaml": "hparams/models/quartznet.yaml"}),
    }
    for name, (output, teacher) in found.items():
        assert output == f"{start}{name}/1234"
        assert teacher == f"results/small/teacher_{name}/1234"
    sources = [
        {"teacher.source": "facebook/wav2vec2-base-960h"},
        {"teacher.source": "facebook/wav2vec2-base-960h"}
        | {"teacher.revision": "main"},
        {"teacher.source": "someone/wav2vec2-base-960h"},
        {"teacher.source": "facebook/wav2vec2-base-960h"}
        | {"teacher.kind": "encoder"},
    ]
    outputs = {read(**source)[0] for source in sources}
    assert len(outputs) == 4
    for output in outputs:
        assert output.startswith(f"{start}wav2vec2-base-960h-")
    folder = "results/other/teacher_jasper_dr/3"
    output, teacher = read(**{"teacher.folder": folder})
    assert output.startswith(f"{start}jasper_dr-") and teacher == folder
    output, _ = read(file="ctc_lstm.yaml", **{"teacher.size": "full"})
    assert output == "results/small/ctc_lstm/1234"


def test_paths_are_as_they_were_typed(place, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = words_for_train(
        output_folder=None,
        results_folder="~/runs/lr=1 #2",
        corpus_overrides="{name: 'a=b #3', epochs: 2}",
        **{"teacher.folder": None},
    )
    words = [*words, "--store.folder=~/x=1"]
    settings = load(words).settings
    root = "/home/me/runs/lr=1 #2/a=b #3"
    name = "rkd+skd_lstm_by_jasper_dr"
    assert settings["output_folder"] == f"{root}/{name}/1234"
    assert settings["store"]["folder"] == "/home/me/x=1"
    # From a file too
    main_file("results_folder: ~/there\n")(monkeypatch)
    words = words_for_train(file="main.yaml", output_folder=None)
    settings = load(words).settings
    assert settings["corpus_folder"] == "/home/me/there/small"


@pytest.mark.parametrize(
    "command, where, name",
    [
        (["transcribe", "teacher", str(TRAIN)], transcription, "find_audio"),
        (["layers", "teacher"], runs, "load_run"),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_in_one_line(
    place, monkeypatch, capfd, command, where, name, number
):
    kept = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(where, name, lambda *_: os.kill(os.getpid(), number))
    try:
        with pytest.raises(SystemExit) as stop:
            cli.app(command)
    finally:
        for one, handler in kept.items():
            signal.signal(one, handler)
    assert stop.value.code == signals.EXIT_CODE
    assert capfd.readouterr().err.strip() == (
        f"{number.name}: stopping. The same command starts again"
    )


# --------------------------------------------------- what all of them rest upon


def stop_code(recipe, monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as stop:
        recipe.main()
    return stop.value.code


def test_an_unforeseen_error_leaves_its_traceback_in_the_log(
    recipe, place, tidy, monkeypatch, capsys
):
    monkeypatch.setattr(recipe, "training_items", lambda *_: 1 / 0)
    assert stop_code(recipe, monkeypatch, words_for_train()) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    log = place / "new" / "log.txt"
    assert said.err.strip().splitlines()[-1] == (
        "train.py: ZeroDivisionError: division by zero. This was not foreseen: "
        f"the traceback is in {log}"
    )
    assert "lambda *_: 1 / 0" in log.read_text()


def test_debug_shows_the_traceback_too(
    recipe, place, tidy, monkeypatch, capsys
):
    words = words_for_train(lr="fast", words=["--debug"])
    assert stop_code(recipe, monkeypatch, words) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and "resolve_experiment" in said
    assert said.strip().splitlines()[-1].startswith("train.py: lr must be")
    with pytest.raises(SystemExit) as stop:
        cli.app(["--debug", "compare", "nowhere"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and "tutornet compare: nowhere holds" in said


def test_the_help_says_what_debug_means_here(recipe, monkeypatch, capsys):
    assert stop_code(recipe, monkeypatch, ["--help"]) == 0
    assert "show the traceback of an error" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error, said",
    [
        (SettingError("lr is fast"), ""),
        (InputError("a.flac is empty"), "[rank: 1] x: a.flac is empty\n"),
    ],
)
def test_what_every_process_finds_is_said_by_the_main_one(
    error, said, monkeypatch, capsys
):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop, failing_in_one_line("x"):
        raise error
    assert stop.value.code == 2
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "program, words, said",
    [
        ("train.py", words_for_train(epcohs=3), "did you mean epochs?"),
        pytest.param(
            "tutornet layers",
            [str(HPARAMS / "models" / "lsmt.yaml")],
            "did you mean lstm.yaml?",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_from_a_shell(program, words, said, tmp_path):
    start = [RECIPE / "train.py"]
    if program != "train.py":
        start = ["-m", "tutornet_sb.cli", *program.split()[1:]]
    done = subprocess.run(
        [sys.executable, *map(str, start), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"{program}: ") and line.endswith(said)
    assert "Traceback" not in done.stderr + done.stdout
    assert not list(tmp_path.iterdir())
