"""Training sets, their speeds and shares, corpora, batches."""

import csv
import random
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from speechbrain.augment.time_domain import SpeedPerturb
from speechbrain.dataio.dataset import DynamicItemDataset

from tutornet_sb.corpora.tokenizer import train_tokenizer
from tutornet_sb.inference import speech as speech_of
from tutornet_sb.networks.acoustic_model import Encoding, LogMelFeatures
from tutornet_sb.training import corpus as corpora
from tutornet_sb.training import offline
from tutornet_sb.training.data import (
    make_batches,
    make_dataset,
    training_items,
)
from tutornet_sb.training.stages import STAGES
from tutornet_sb.util.composition import include, read_merged

RECIPE = Path(__file__).parents[2] / "recipes" / "LibriSpeech" / "TutorNet"


class Frames(torch.nn.Module):
    """All that a training set asks of a student: how many frames it has."""

    def __init__(self, frame_period):
        super().__init__()
        self.frame_period = frame_period
        self.features = LogMelFeatures()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, wavs, wav_lens):
        frames = round(wavs.shape[1] / 16000 / self.frame_period) + 1
        hidden = torch.zeros(1, frames, 1)
        return Encoding(hidden, hidden, torch.tensor([frames]))


@pytest.fixture
def datasets(tmp_path):
    """Data and training sets from transcripts and durations alone."""

    def make(
        rows,
        frame_period=0.02,
        untranscribed=(),
        speeds=None,
        ctc_weight=1.0,
        share=1.0,
        **changes,
    ):
        def write(path, rows):
            with open(path, "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["ID", "duration", "wav", "spk_id", "wrd"])
                for key, (seconds, text) in rows.items():
                    wav = f"$data_root/{key}.wav"
                    writer.writerow([key, seconds, wav, "s", text])
            return path

        manifests = {
            "train": write(tmp_path / "train.csv", rows),
            "more": write(
                tmp_path / "more.csv", {key: (1.0, "") for key in untranscribed}
            ),
        }
        model = tmp_path / "char.model"
        settings = {
            "augmentation": {"speeds": speeds},
            "seed": 1,
            "skd": {"ctc_weight": ctc_weight},
            "utterances": {"transcribed_share": share},
        } | changes
        splits = {"train": ["train"], "valid": ["train"], "test": ["train"]}
        splits["untranscribed"] = ["more"] if untranscribed else []
        tokenizer = train_tokenizer([manifests["train"]], model)
        data = corpora.read_corpus(
            settings, tmp_path, manifests, splits, model, tokenizer
        )
        experiment = SimpleNamespace(
            settings=settings,
            corpus=data,
            # At 0.02 s a frame, one more than the duration holds.
            student=Frames(frame_period),
            folder=tmp_path,
            teacher=None,
        )

        def training_set(stage, epochs=None):
            items = training_items(STAGES[stage], experiment)
            seconds = sum(float(item["duration"]) for item in items.values())
            return make_dataset(items, experiment, epochs=epochs), seconds

        experiment.make = lambda items: make_dataset(items, experiment)
        return experiment, training_set

    return make


def test_utterances_too_short_for_their_transcript_are_left_out(
    datasets, tmp_path
):
    # 0.1 s are six frames; with the space in front, ABCDE has six symbols.
    rows = {
        "fits": (0.1, "ABCDE"),
        "long": (0.1, "ABCDEF"),
        # A blank must stand between equal neighbours.
        "equal": (0.1, "ABCDD"),
        "equal-fits": (0.12, "ABCDD"),
    }
    experiment, training_set = datasets(rows)
    train, seconds = training_set("ctc")
    assert train.data_ids == ["fits", "equal-fits"]
    assert seconds == pytest.approx(0.22)
    listing = (tmp_path / "too_short_for_ctc.txt").read_text()
    assert listing.split() == ["long", "equal"]
    # What is scored is scored whole.
    assert len(experiment.corpus.valid) == 4
    assert len(experiment.corpus.scored["train"]) == 4


def test_speeds_at_which_an_utterance_is_too_short_are_left_out(
    datasets, tmp_path, caplog
):
    rows = {
        # With the space in front, as many symbols as frames at speed 100
        "just": (0.1, "ABCDE"),
        "never": (0.1, "ABCDEF"),
        "slow": (0.11, "ABCDEF"),
        "long": (9.0, "A"),
    }
    speeds = [100, 90, 101]
    experiment, training_set = datasets(rows, speeds=speeds)
    with caplog.at_level("WARNING"):
        train, seconds = training_set("ctc")
    fitting = {key: item["speeds"] for key, item in train.data.items()}
    # 0.11 s are 1760 samples, and at 90 % of the speed 1956: 6 + 1 frames.
    assert fitting == {"just": [100, 90], "slow": [90], "long": speeds}
    assert seconds == pytest.approx(9.21)
    listing = (tmp_path / "too_short_for_ctc.txt").read_text().splitlines()
    assert listing == [
        "just at 101 % of its speed",
        "never",
        "slow at 100, 101 % of its speed",
    ]
    assert (
        "1 of 4 training utterances have fewer frames than their transcript "
        "needs and are left out, and 2 at some of their speeds: just at 101 % "
        "of its speed; never; slow"
    ) in caplog.text
    # Without CTC all are used, at every speed.
    found, _ = training_set("rkd")
    assert {tuple(item["speeds"]) for item in found.data.values()} == {
        tuple(speeds)
    }
    assert len(found) == 4


@pytest.mark.parametrize("name", ["lstm", "jasper_mini", "conformer"])
def test_what_is_left_out_is_what_has_no_finite_loss(tmp_path, name):
    content = include(
        RECIPE / "hparams/models" / f"{name}.yaml", ".", "small", output_size=29
    )
    text = StringIO()
    YAML().dump(content, text)
    student = load_hyperpyyaml(text.getvalue())["model"].eval()
    manifest = tmp_path / "train.csv"
    manifest.write_text("wrd\nA\n")
    tokenizer = train_tokenizer([manifest], tmp_path / "char.model")
    speeds, drawn = [85, 100, 101, 115], random.Random(2)
    items = {}
    for index in range(12):
        samples = drawn.choice(
            [320 * 30, 640 * 20, drawn.randrange(6_000, 20_000)]
        )
        # As many symbols as frames, or nearly, and the space in front
        count = samples // 320 * 7 // 8 + drawn.randrange(-4, 3)
        items[f"u{index}"] = {
            "duration": samples / 16000,
            "wrd": ("ABCDEEF" * 10)[index : index + count],
            "speeds": speeds,
        }
    fitting = corpora.fit_for_ctc(
        items, tokenizer, student, tmp_path / "short.txt"
    )
    kept = {
        (key, speed)
        for key, item in fitting.items()
        for speed in item["speeds"]
    }
    finite = set()
    for key, item in items.items():
        wave = torch.randn(1, round(item["duration"] * 16000))
        tokens = torch.tensor(tokenizer.encode(item["wrd"]))
        for speed in speeds:
            changed = SpeedPerturb(16000, [speed])(wave)
            with torch.no_grad():
                logits = student(changed, torch.ones(1)).logits[0]
            loss = torch.nn.functional.ctc_loss(
                logits.log_softmax(-1),
                tokens,
                torch.tensor(len(logits)),
                torch.tensor(len(tokens)),
            )
            if loss.isfinite():
                finite.add((key, speed))
    assert kept == finite
    assert 9 < len(kept) < 39


def test_the_speed_of_an_utterance_follows_from_seed_epoch_and_id(
    datasets, tmp_path
):
    wave = 0.1 * torch.randn(1600, generator=torch.Generator().manual_seed(1))
    rows = {f"u{index}": (0.1, "ABCDE") for index in range(30)}
    for key in rows:
        soundfile.write(tmp_path / f"{key}.wav", wave.numpy(), 16000)
    speeds = [50, 80, 100, 125, 200]

    def drawn(epoch, **options):
        _, training_set = datasets(rows, speeds=speeds, **options)
        counter = SimpleNamespace(current=epoch)
        before = torch.random.get_rng_state()
        train, _ = training_set("ctc", counter)
        train.set_output_keys(["sig", "speed"])
        found = [(item["speed"], len(item["sig"])) for item in train]
        # The set draws from no generator that training draws from.
        assert torch.equal(before, torch.random.get_rng_state())
        return found

    first = drawn(1)
    assert drawn(1) == first and drawn(2) != first
    assert drawn(1, seed=2) != first
    # None at which six symbols do not fit in the frames of 20 ms, plus one
    expected = {50: 3200, 80: 2000, 100: 1600}
    assert dict(first) == expected
    keys = list(rows)
    assert [speed for speed, _ in first] == [
        random.Random(f"1 1 {key}").choice([50, 80, 100]) for key in keys
    ]


def test_a_store_is_filled_at_the_speeds_of_each_utterance(monkeypatch):
    keys = []

    def fill_store(folder, what, teacher, data, **options):
        keys.extend(data.data)
        assert {tuple(item["speeds"]) for item in data.data.values()} == {
            (int(key.partition("@")[2] or 100),) for key in data.data
        }

    monkeypatch.setattr(offline, "fill_store", fill_store)
    monkeypatch.setattr(offline, "teacher_taps", lambda pairs: ())
    monkeypatch.setattr(offline, "pieces", lambda tokenizer: [])
    for name in ("Teacher", "describe"):
        monkeypatch.setattr(offline, name, lambda *_: None)
    monkeypatch.setattr(
        offline,
        "make_dataset",
        lambda items, experiment: SimpleNamespace(data=items),
    )
    store = dict.fromkeys(("posteriors", "top_k", "hidden", "code_bytes"))
    settings = {"num_workers": 0, "batch_seconds": 9}
    settings["store"] = store | {"folder": "s"}
    experiment = SimpleNamespace(
        settings=settings,
        teacher=SimpleNamespace(model=None, source="teacher"),
        corpus=SimpleNamespace(
            tokenizer=None, valid={"a": {"split": "dev", "speeds": (100,)}}
        ),
        pairs=[],
        vocabulary=None,
    )
    train = {
        "a": {"split": "train", "speeds": [90, 100, 110]},
        "b": {"split": "train", "speeds": [90]},
    }
    offline.fill_targets(experiment, train, True, {})
    assert keys == [
        *("train/a@90", "train/b@90", "train/a", "train/a@110", "dev/a")
    ]


@pytest.mark.parametrize(
    "stage, weight, wanted",
    [
        ("ctc", 0.0, ["a"]),
        ("skd", 1.0, ["a", "b", "c"]),
        ("skd", 0.0, ["a", "b", "c"]),
        ("rkd", 1.0, ["a", "b", "c"]),
    ],
)
def test_audio_without_transcripts_is_heard_where_none_are_needed(
    datasets, stage, weight, wanted
):
    _, training_set = datasets(
        {"a": (9.0, "A")}, untranscribed=["b", "c"], ctc_weight=weight
    )
    train, seconds = training_set(stage)
    assert train.data_ids == wanted
    assert seconds == 9.0 + len(wanted) - 1
    known = {key: item["transcribed"] for key, item in train.data.items()}
    assert known == {key: key == "a" for key in wanted}


def test_of_a_share_the_transcripts_are_known(datasets):
    rows = {f"u{i}": (9.0, "A") for i in range(40)}
    kept = []
    for share in (0.0, 0.1, 0.25, 1.0):
        experiment, training_set = datasets(rows, share=share)
        assert (
            experiment.corpus.transcribed.keys()
            | experiment.corpus.untranscribed
            == rows.keys()
        )
        assert (
            not experiment.corpus.transcribed.keys()
            & experiment.corpus.untranscribed
        )
        assert training_set("ctc")[0].data_ids == list(
            experiment.corpus.transcribed
        )
        assert len(training_set("skd")[0]) == 40
        # What is scored keeps its transcripts.
        assert all(
            item["wrd"] == "A" for item in experiment.corpus.valid.values()
        )
        kept.append(set(experiment.corpus.transcribed))
    assert [len(keys) for keys in kept] == [1, 4, 10, 40]
    assert kept[0] < kept[1] < kept[2]


def test_a_corpus_of_too_short_utterances_is_an_error(datasets):
    _, training_set = datasets({"a": (0.1, "ABCDEF")})
    with pytest.raises(ValueError, match="ctc: no training utterance is left"):
        training_set("ctc")


def test_the_transcripts_to_learn_never_hold_the_blank(datasets):
    _, training_set = datasets({"a": (9.0, "CAFÉ NO 2"), "b": (9.0, "PLAIN")})
    train, _ = training_set("ctc")
    train.set_output_keys(["id", "tokens"])
    for item in train:
        assert 0 not in item["tokens"].tolist(), item["id"]


def test_teacher_and_student_hear_the_same_perturbed_speech(datasets, tmp_path):
    torch.manual_seed(0)
    wave = 0.1 * torch.randn(16000)
    for key in "ab":
        soundfile.write(tmp_path / f"{key}.wav", wave.numpy(), 16000)
    rows = {"a": (1.0, "ONE"), "b": (1.0, "TWO")}
    experiment, training_set = datasets(rows, speeds=[50])
    assert training_set("ctc")[0][0]["sig"].shape == (32000,)
    assert torch.allclose(
        experiment.make(experiment.corpus.valid)[0]["sig"], wave, atol=1e-4
    )
    _, training_set = datasets(rows)
    assert torch.allclose(training_set("ctc")[0][1]["sig"], wave, atol=1e-4)


@pytest.mark.parametrize(
    "told, folder",
    [({}, "data/MiniLibri"), ({"folder": "large"}, "large")],
)
def test_minilibris_of_two_sizes_stand_side_by_side(
    tmp_path, monkeypatch, told, folder
):
    monkeypatch.chdir(tmp_path)
    values = {
        "seed": 3,
        "train_minutes": 0.2,
        "dev_minutes": 0.1,
        "test_minutes": 0.1,
        "train_speakers": 2,
        "test_speakers": 1,
        **told,
    }
    corpus = read_merged(RECIPE / "hparams/corpora/mini.yaml")
    corpus["minilibri"] = values
    model = SimpleNamespace(features=SimpleNamespace(sample_rate=16000))
    found = corpora.prepare_corpus(
        {
            "corpus": corpus,
            "student": {"model": model},
            "data_folder": None,
            "train_csv": None,
            "valid_csv": None,
            "test_csv": None,
            "corpus_folder": "results/mini",
            "utterances": {
                "transcribed_share": 1.0,
                "max_skipped": 0.01,
                "max_seconds": 120,
            },
            "augmentation": {"speeds": None},
            "symbols": {"count": 29, "letters": None},
        }
    )
    item = next(iter(found.transcribed.values()))
    assert Path(item["wav"]).resolve().is_relative_to(tmp_path / folder)
    assert (tmp_path / folder / "minilibri.json").is_file()
    # Who comes later, for a report or an export, finds it there too.
    run = tmp_path / "run"
    run.mkdir()
    with open(run / "hyperparams.yaml", "w") as file:
        YAML().dump({"data_folder": None, "corpus": dict(corpus)}, file)
    results = {"splits": {"dev-clean": {}, "test-clean": {}}}
    speech = speech_of.find_speech(run, None, results, model, needed=True)
    assert speech.split == "test-clean"
    assert Path(speech.test[0].path).is_relative_to(tmp_path / folder)


@pytest.mark.parametrize("name", ["librispeech100", "librispeech960"])
def test_batches_of_librispeech_are_full_of_speech(name):
    corpus = read_merged(RECIPE / f"hparams/corpora/{name}.yaml")
    hparams = {key: corpus[key] for key in ("batch_seconds", "num_buckets")}
    # Half of them fill the 15 s that most of LibriSpeech was cut to.
    drawn = random.Random(0)
    seconds = [
        min(
            17.0,
            max(1.5, drawn.choice([drawn.gauss(15, 1), drawn.gauss(12, 4)])),
        )
        for _ in range(20000)
    ]
    items = {str(i): {"duration": s} for i, s in enumerate(seconds)}
    data = DynamicItemDataset(items, output_keys=["id"])
    sampler = make_batches(data, hparams | {"seed": 1}, shuffle=True)
    found = [[seconds[i] for i in batch] for batch in sampler]
    assert sorted(sum(found, [])) == sorted(seconds)
    memory = [len(batch) * max(batch) for batch in found]
    assert max(memory) <= corpus["batch_seconds"]
    mean = sum(map(sum, found)) / len(found)
    assert mean > 0.9 * corpus["batch_seconds"]
    assert sum(memory) < 1.05 * sum(seconds)
