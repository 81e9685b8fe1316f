"""The `tutornet` command."""

import json

import pytest
from typer.testing import CliRunner

from tutornet_sb.cli import app
from tutornet_sb.reporting.compare import table

RESULTS = {
    "method": "rkd+skd",
    "corpus": "small",
    "student": "lstm",
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


def one_line(result):
    """The only line of standard error."""
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("tutornet compare: ")
    return line


def test_compare_prints_the_table(folder):
    result = invoke("compare", folder)
    assert result.exit_code == 0
    assert result.stdout == table([folder]) + "\n"
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
