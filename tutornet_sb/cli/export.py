"""``tutornet export``: a run as a model that needs no part of this package."""

from pathlib import Path
from typing import Annotated

import typer

from tutornet_sb.cli.common import Language, License, running


def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="An output folder of train.py. It can run code: give only "
            "what you trust.",
        ),
    ],
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Folder to write; an earlier export there is replaced, with "
            "all that it holds.",
        ),
    ],
    foreign: Annotated[
        bool,
        typer.Option(
            "--foreign",
            help="Write a network of stock parts as the others are, with its "
            "source: exact in padded batches too.",
        ),
    ] = False,
    onnx: Annotated[
        bool,
        typer.Option(
            "--onnx",
            help="Also an ONNX graph, from waveform to log-probabilities, and "
            "a script that transcribes by it without torch.",
        ),
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="That, and the graph in int8.")
    ] = False,
    sherpa: Annotated[
        bool,
        typer.Option("--sherpa", help="Also the files that sherpa-onnx loads."),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            help="LibriSpeech folder whose test set these are compared on; "
            "by default that of the run."
        ),
    ] = None,
    license: License = None,
    language: Language = None,
):
    """Write a run as a model that SpeechBrain loads without this package.

    Offline LSTM and GRU networks over log-mel features become stock parts, for
    EncoderASR; other networks take their source with them, for foreign_class.
    """
    extras = ["export"] if onnx or int8 or sherpa else []
    with running("export", *extras):
        from tutornet_sb.publishing.export import export as export_run
        from tutornet_sb.publishing.model_card import loading_lines

        config = export_run(
            run,
            folder,
            foreign=foreign,
            onnx=onnx,
            int8=int8,
            sherpa=sherpa,
            data=data,
            license=license,
            language=language,
        )
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
