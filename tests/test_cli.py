"""The `tutornet` command."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references
from ruamel.yaml import YAML
from typer.testing import CliRunner

from tutornet_sb.cli import app
from tutornet_sb.corpora.tokenizer import train_tokenizer
from tutornet_sb.experiments.compare import short_table, table
from tutornet_sb.networks import runs

RESULTS = {
    "format": runs.FORMAT,
    "role": "student",
    "main_file": "rkd_lstm.yaml",
    "options": {},
    "compute_matched_to": None,
    "baseline": None,
    "method": "rkd+skd",
    "corpus": "small",
    "student": "lstm",
    "teacher": None,
    "seed": 1,
    "parameters": 445_085,
    "epochs": 40,
    "train_audio_seconds": 60.0,
    "train_seconds": 100.0,
    "real_time_factor": 0.0123,
    "stages": {
        "skd": {
            "splits": {
                "test-clean": {
                    "wer": 12.34,
                    "cer": 5.67,
                    "utterances": 3,
                    "words": 30,
                }
            }
        }
    },
}
DOCUMENT = """# Results

<!-- results -->
<!-- end results -->

<!-- other -->
stays
<!-- end other -->
The end.
"""


def invoke(*arguments):
    return CliRunner().invoke(app, [str(word) for word in arguments])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(json.dumps(RESULTS))
    return tmp_path / "run"


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(DOCUMENT)
    return path


def one_line(result, command="compare"):
    """The only line of standard error."""
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"tutornet {command}")
    return line


def test_compare_prints_the_table(folder):
    result = invoke("compare", folder)
    assert result.exit_code == 0
    assert result.stdout == short_table([folder]) + "\n"
    row = result.stdout.splitlines()[2]
    for value in ("lstm", "rkd+skd", "0.45", "0.012", "12.3 / 5.7"):
        assert f" {value} " in row


def test_the_table_goes_between_the_marks_of_its_name(folder, document):
    assert invoke("compare", folder, "--into", document).exit_code == 0
    expected = DOCUMENT.replace(
        "<!-- results -->\n", f"<!-- results -->\n{table([folder])}\n"
    )
    assert document.read_text() == expected


def test_inserting_again_changes_nothing(folder, document):
    invoke("compare", folder, "--into", document)
    once = document.read_text()
    invoke("compare", folder, "--into", document)
    assert document.read_text() == once


def test_an_older_table_is_replaced(folder, document):
    invoke("compare", folder, "--into", document, "--name", "other")
    text = document.read_text()
    assert "stays" not in text
    assert f"<!-- other -->\n{table([folder])}\n<!-- end other -->\n" in text
    assert "<!-- results -->\n<!-- end results -->\n" in text
    assert text.endswith("The end.\n")


@pytest.mark.parametrize(
    "text",
    [
        "no marks\n",
        "<!-- results -->\nno end\n",
        "<!-- end results -->\nthe wrong way round\n<!-- results -->\n",
    ],
)
def test_missing_marks_are_named_and_the_file_is_left_alone(
    folder, document, text
):
    document.write_text(text)
    line = one_line(invoke("compare", folder, "--into", document))
    assert "README.md" in line
    assert "<!-- results -->" in line and "<!-- end results -->" in line
    assert document.read_text() == text


def test_a_missing_document_is_named(folder, tmp_path):
    line = one_line(invoke("compare", folder, "--into", tmp_path / "none.md"))
    assert "none.md" in line


def test_a_folder_without_results_is_named(folder, tmp_path, document):
    nowhere = tmp_path / "nowhere"
    result = invoke("compare", folder, nowhere, "--into", document)
    assert "nowhere holds no results.json" in one_line(result)
    assert result.stdout == ""
    assert document.read_text() == DOCUMENT


def test_damaged_results_are_named(folder):
    (folder / "results.json").write_text('{"method": ')
    assert "results.json is damaged" in one_line(invoke("compare", folder))


def test_results_that_lack_a_figure_are_named(folder):
    incomplete = {k: v for k, v in RESULTS.items() if k != "parameters"}
    (folder / "results.json").write_text(json.dumps(incomplete))
    line = one_line(invoke("compare", folder))
    assert "results.json" in line and "parameters" in line


def test_compare_wants_at_least_one_run():
    assert invoke("compare").exit_code == 2


# ----------------------------------------------------------------------- layers

NETWORK = """
name: mini
output_size: 7
n_mels: 16
channels: 6
stride: 4
small: {channels: 4, stride: 2}
model: !new:tutornet_sb.networks.acoustic_model.AcousticModel
    features: !new:tutornet_sb.networks.acoustic_model.LogMelFeatures
        n_mels: !ref <n_mels>
    encoder: !new:tutornet_sb.networks.recurrent.RecurrentEncoder
        input_size: !ref <n_mels>
        channels: !ref <channels>
        hidden_size: 3
        layers: 1
        kernel_size: 5
        stride: !ref <stride>
    head: !new:torch.nn.Linear
        in_features: 6
        out_features: !ref <output_size>
"""


@pytest.fixture
def network(tmp_path):
    path = tmp_path / "mini.yaml"
    path.write_text(NETWORK)
    return path


def rows(result):
    """Columns of the table by layer; two blanks or more lie between them."""
    assert result.exit_code == 0, result.stderr
    lines = [re.split("  +", line) for line in result.stdout.splitlines()]
    assert lines[0] == [
        "layer",
        "type",
        "output",
        "frame (ms)",
        "parameters",
        "tap",
    ]
    return {line[0]: line[1:] for line in lines[1:]}


def test_layers_lists_the_layers_of_a_network(network):
    found = rows(invoke("layers", network))
    assert list(found)[0] == "features" and list(found)[-1] == "head"
    for path, row in {
        "features": ["LogMelFeatures", "(batch, frames, 16)", "10", "0"],
        "features.fbank.compute_deltas": ["Deltas", "-", "-", "0"],
        "encoder": [
            "RecurrentEncoder",
            "(batch, frames, 6)",
            "40",
            # Convolution, its normalisation, two LSTMs
            f"{16 * 6 * 5 + 2 * 6 + 2 * 4 * 3 * (6 + 3 + 2)}",
            "default",
        ],
        "encoder.conv": ["Conv1d", "(batch, 6, frames)", "40", "480", "yes"],
        "head": ["Linear", "(batch, frames, 7)", "40", "49", "yes"],
    }.items():
        assert found[path] == row


def test_layers_of_another_size(network):
    found = rows(invoke("layers", network, "--size", "small"))
    assert found["encoder.conv"][1:3] == ["(batch, 4, frames)", "20"]


def test_layers_of_a_finished_run(network, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    resolved = resolve_references(NETWORK).read()
    (folder / runs.MODEL_YAML).write_text(resolved)
    model = load_hyperpyyaml(NETWORK)["model"]
    torch.save(model.state_dict(), folder / runs.WEIGHTS)
    manifest = tmp_path / "train.csv"
    with open(manifest, "w", newline="") as file:
        csv.writer(file).writerows([["ID", "wrd"], ["a", "ONE TWO"]])
    train_tokenizer([manifest], folder / runs.TOKENIZER)
    (folder / runs.RESULTS).write_text("{}")
    whole = invoke("layers", network)
    assert invoke("layers", folder).stdout == whole.stdout != ""
    line = one_line(invoke("layers", folder, "--size", "small"), "layers")
    assert "--size" in line


def test_layers_of_what_is_no_network(network, folder, tmp_path):
    def refused(*arguments):
        return one_line(invoke("layers", *arguments), "layers")

    assert "no-such.yaml" in refused(tmp_path / "no-such.yaml")
    assert "no size 'medium'" in refused(network, "--size", "medium")
    assert "holds no finished run" in refused(folder)
    other = tmp_path / "other.yaml"
    other.write_text("name: other\n")
    assert "no AcousticModel under the key 'model'" in refused(other)
    other.write_text("name: [other\n")
    assert "other.yaml" in refused(other)
    other.write_text(NETWORK.replace("RecurrentEncoder", "Recurrent"))
    assert "Recurrent" in refused(other)
    other.write_text(NETWORK.replace("in_features: 6", "in_features: 5"))
    assert "shapes cannot be multiplied" in refused(other)


# ----------------------------------------------------------------------- config

RECIPE = Path(__file__).parents[1] / "recipes" / "LibriSpeech" / "TutorNet"
MAIN = RECIPE / "hparams" / "rkd_lstm.yaml"


@pytest.mark.parametrize("where", [RECIPE, MAIN, None])
def test_config_lists_networks_and_corpora(where, monkeypatch):
    monkeypatch.chdir(RECIPE)
    result = invoke("config", "ls", *([where] if where else []))
    assert result.exit_code == 0, result.stderr
    lines = [
        re.split("  +", line.strip()) for line in result.stdout.split("\n")
    ]
    assert ["lstm", "full 7,556,125, large 29,792,285, small 445,085"] in lines
    names = [line[0] for line in lines]
    for path in (RECIPE / "hparams").rglob("*/*.yaml"):
        assert path.stem in names
    assert any(line[0] == "small" and "layout" in line[1] for line in lines)


def test_config_ls_of_what_is_no_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "lies in no recipe" in one_line(invoke("config", "ls"), "config")
    result = invoke("config", "ls", tmp_path / "main.yaml")
    assert "lies in no recipe" in one_line(result, "config")


def test_config_shows_the_values_of_a_main_file():
    result = invoke("config", "show", MAIN, "--lr=0.5", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    values = YAML().load(result.stdout)
    assert "!ref" not in result.stdout
    assert values["lr"] == values["opt_class"]["lr"] == 0.5
    assert values["student"]["model"].tag.value.endswith("AcousticModel")
    assert values["stages"] == ["rkd", "skd"]
    line = one_line(invoke("config", "show", MAIN, "--lr=fast"), "config")
    assert line.endswith("config show: lr must be a number, got 'fast'")


def test_config_finds_all_faults():
    result = invoke("config", "validate", MAIN, "--lr", "0.1")
    assert result.exit_code == 0, result.stderr
    assert "no fault found" in result.stdout
    options = ["--lr=fast", "--epcohs=3", "--student_overrides.chanels", "4"]
    result = invoke("config", "validate", MAIN, *options)
    assert result.exit_code == 2 and result.stdout == ""
    start = "tutornet config validate: "
    lines = result.stderr.strip().splitlines()
    assert all(line.startswith(start) for line in lines)
    unknown, network, lr = [line.removeprefix(start) for line in lines]
    assert unknown.startswith("--epcohs") and unknown.endswith("mean epochs?")
    assert "lstm.yaml has no key 'chanels' to override" in network
    assert lr == "lr must be a number, got 'fast'"


@pytest.mark.parametrize(
    "options, said",
    [
        (["--lr", "{"], "--lr: {: .*quote a value"),
        (["--precision", "fp7"], "precision.*fp7"),
        # Of values that do not go together
        (
            ["--skd.ctc_weight", "0"],
            "skd.ctc_weight and skd.weight_final are both 0",
        ),
    ],
)
def test_config_validates_a_command_line_too(options, said):
    result = invoke("config", "validate", MAIN, *options)
    assert re.search(said, one_line(result, "config"))


def test_config_validates_a_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(RECIPE)
    result = invoke("config", "validate", "hparams/rkd_lsmt.yaml")
    assert "did you mean rkd_lstm.yaml?" in one_line(result, "config")
