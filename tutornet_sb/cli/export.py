"""``tutornet export``: a run as a model that needs no part of this package."""

from pathlib import Path

import typer
from typer import Argument, Option

from tutornet_sb.cli.common import LANGUAGE, LICENSE, running


def export(
    run: Path = Argument(
        metavar="RUN",
        help="A run, which can run code: give only what you trust.",
    ),
    folder: Path = Argument(
        metavar="DIR",
        help="Folder to write; one that is there is replaced completely.",
    ),
    foreign: bool = Option(
        False,
        "--foreign",
        help="Export stock parts with their source too, as other networks "
        "are: exact in padded batches.",
    ),
    onnx: bool = Option(
        False,
        "--onnx",
        help="Also write an ONNX graph, waveform to log-probabilities, and "
        "a script that transcribes by it without torch.",
    ),
    int8: bool = Option(
        False, "--int8", help="As --onnx, and the graph in int8."
    ),
    sherpa: bool = Option(
        False, "--sherpa", help="Also write the files of sherpa-onnx."
    ),
    data: Path | None = Option(
        None, help="LibriSpeech folder to compare these on; else the run's."
    ),
    license: str | None = LICENSE,
    language: str | None = LANGUAGE,
):
    """Write a run as a model that SpeechBrain loads without this package.

    Offline LSTM and GRU networks over log-mel features become stock parts, for
    EncoderASR; other networks take their source with them, for foreign_class.
    """
    options = dict(locals())
    extras = ["export"] if onnx or int8 or sherpa else []
    with running("export", *extras):
        from tutornet_sb.publishing.export import export as export_run
        from tutornet_sb.publishing.model_card import loading_lines

        config = export_run(**options)
    typer.echo(f"{folder} holds {config['name']}. To load it:")
    for line in loading_lines(config, str(folder)):
        typer.echo(f"    {line}")
    for name in ("onnx", "sherpa"):
        if name in config:
            typer.echo("\n".join(_describe_format(config[name])))


def _describe_format(known):
    """Where the model is in another format, and its scores."""
    yield f"{known['model']}, for {known.get('recognizer', 'onnxruntime')}"
    if "max_difference" in known and known["checked_on"] is None:
        yield "    compared on noise alone: the run's corpus is not there"
    if int8 := known.get("int8"):
        yield (
            f"{int8['model']}: {int8['size_ratio']:.2f} of the size, "
            f"{int8['time_ratio']:.2f} of the time"
            if int8["model"]
            else f"    no int8 graph: {int8['reason']}"
        )
    for split, scores in known["scores"].items():
        rates = ", ".join(
            f"{name} {wer:.2f} %" for name, wer in scores["wer"].items()
        )
        same = ", ".join(
            f"{name} {count}" for name, count in scores["same"].items()
        )
        yield f"    WER on {split}: {rates}"
        yield f"    the same transcript in {scores['utterances']}: {same}"
