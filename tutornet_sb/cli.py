"""The ``tutornet`` command."""

from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Annotated

import typer
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tutornet_sb import runs
from tutornet_sb.composition import include
from tutornet_sb.distillation.taps import list_layers
from tutornet_sb.networks.acoustic_model import AcousticModel
from tutornet_sb.publishing.export import FOREIGN_CLASS
from tutornet_sb.publishing.export import export as export_run
from tutornet_sb.reporting.compare import insert, table

app = typer.Typer(
    help="Tools around TutorNet runs; the recipe's train.py trains.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def tutornet():
    """Tools around TutorNet runs."""


@app.command()
def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUNS...", help="Output folders of train.py."),
    ],
    into: Annotated[
        Path | None,
        typer.Option(
            help="Write the table into this Markdown file too, between the "
            "lines '<!-- NAME -->' and '<!-- end NAME -->'."
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(help="NAME of the place in that file.")
    ] = "results",
):
    """Lay runs out in a table; runs that differ in their seed share a row."""
    try:
        text = table(folders)
        if into is not None:
            insert(into, name, text)
    except (OSError, ValueError) as error:
        typer.echo(f"tutornet compare: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(text)


@app.command()
def layers(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL_YAML|RUN",
            help="A network's YAML file, or an output folder of train.py. "
            "Either can run code: give only what you trust.",
        ),
    ],
    size: Annotated[
        str,
        typer.Option(help="Size of the network, of those in its YAML file."),
    ] = "full",
):
    """List the layers of a model, and which of them can be paired.

    Shapes are those of the layers' outputs; frames lie so many ms apart.
    """
    with _failing_in_one_line("layers"):
        if not model.is_dir():
            network = _build(model, size)
        elif size == "full":
            network, _ = runs.load_run(model)
        else:
            raise ValueError("--size is for a YAML file: a run has its own")
        lines = _lay_out(list_layers(network))
    typer.echo("\n".join(lines))


@app.command()
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
):
    """Write a run as a model that SpeechBrain loads without this package.

    LSTM and GRU networks over log-mel features become stock parts, for
    EncoderASR; other networks take their source with them, for foreign_class.
    """
    with _failing_in_one_line("export"):
        config = export_run(run, folder, foreign, onnx, int8, sherpa, data)
    name = config["load_with"]
    module, _, called = name.rpartition(".")
    if name != FOREIGN_CLASS:
        # A method
        module, _, cls = module.rpartition(".")
        called = f"{cls}.{called}"
    typer.echo(f"{folder} holds {config['name']}. To load it:")
    typer.echo(f"    from {module} import {called.partition('.')[0]}")
    typer.echo(f"    model = {called}(source={str(folder)!r})")
    for form in ("onnx", "sherpa"):
        if form in config:
            typer.echo("\n".join(_say_form(form, config[form])))


def _say_form(form, known):
    """Where another form of the model is, and how it did."""
    yield f"{known['model']}, for {known.get('recognizer', 'onnxruntime')}"
    if "max_difference" in known and known["checked_on"] is None:
        yield "    compared on noise alone: the run's corpus is not there"
    for split, scores in known["scores"].items():
        rates = ", ".join(
            f"{name} {wer:.2f} %" for name, wer in scores["wer"].items()
        )
        same = ", ".join(
            f"{name} {count}" for name, count in scores["same"].items()
        )
        yield f"    WER on {split}: {rates}"
        yield f"    the same transcript in {scores['utterances']}: {same}"


@contextmanager
def _failing_in_one_line(command):
    """Name what is wrong with a model instead of showing a traceback."""
    try:
        yield
    # The last three are what comes of a network that cannot be built.
    except (
        OSError,
        ValueError,
        YAMLError,
        ImportError,
        TypeError,
        RuntimeError,
    ) as error:
        reason = " ".join(str(error).split())
        typer.echo(f"tutornet {command}: {reason}", err=True)
        raise typer.Exit(1) from None


def _build(path, size):
    """Make a network with random weights."""
    text = StringIO()
    YAML().dump(include(path, ".", size), text)
    network = load_hyperpyyaml(text.getvalue()).get("model")
    if not isinstance(network, AcousticModel):
        raise ValueError(f"{path} has no AcousticModel under the key 'model'")
    return network


def _lay_out(layers):
    """Lines of a table, with the layer that is tapped by default."""
    rows = [["layer", "type", "output", "frame (ms)", "parameters", "tap"]]
    for layer in layers:
        period, tap = layer.frame_period, "yes" if layer.tap else ""
        if tap and layer.path == "encoder":
            tap = "default"
        rows.append(
            [
                layer.path,
                layer.kind,
                _shape(layer.shape) if layer.shape else "-",
                f"{1000 * period:g}" if period else "-",
                f"{layer.parameters:,}",
                tap,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _shape(shape):
    return f"({', '.join(map(str, shape))})"


if __name__ == "__main__":
    app()
