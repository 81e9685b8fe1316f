"""``tutornet layers``: the layers of a network, and which can be paired."""

from pathlib import Path

import typer
from typer import Argument, Option

from tutornet_sb.cli.common import TRUST_REMOTE_CODE, running
from tutornet_sb.util.errors import InputError, SettingError, one_line


def layers(
    model: Path = Argument(
        metavar="MODEL_YAML|RUN",
        help="A run of train.py, or a network's YAML file, which can run "
        "code: give only what you trust.",
    ),
    size: str = Option(
        "full", help="Size of the network, of those in its YAML file."
    ),
    trust_remote_code: bool = TRUST_REMOTE_CODE,
):
    """List the layers of a model, and which of them can be paired.

    Shapes are those of the layers' outputs; the period of frames is in ms.
    """
    with running("layers"):
        from tutornet_sb.distillation.taps import list_layers
        from tutornet_sb.networks import runs

        if not model.is_dir():
            network = _build(model, size)
        elif size == "full":
            network, _ = runs.load_run(model, trust_remote_code)
        else:
            raise InputError("--size is for a YAML file: a run has its own")
        found = list_layers(network)
    rows = [["layer", "type", "output", "frame (ms)", "parameters", "tap"]]
    for layer in found:
        default = layer.tap and layer.path == "encoder"
        rows.append(
            [
                layer.path,
                layer.kind,
                f"({', '.join(map(str, layer.shape))})" if layer.shape else "-",
                f"{1000 * layer.frame_period:g}" if layer.frame_period else "-",
                f"{layer.parameters:,}",
                "default" if default else "yes" if layer.tap else "",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(map(str.ljust, row, widths)).rstrip())


def _build(path, size):
    """Make a network with random weights."""
    from hyperpyyaml import load_hyperpyyaml

    from tutornet_sb.networks.acoustic_model import AcousticModel
    from tutornet_sb.training.settings import find_call_faults
    from tutornet_sb.util.composition import dump, include

    content = include(path, ".", size)
    if faults := list(find_call_faults(content)):
        raise SettingError(*faults)
    try:
        network = load_hyperpyyaml(dump(content)).get("model")
    # Of values that somebody made up, all kinds of errors
    except Exception as error:
        raise InputError(f"{path}: {one_line(error)}") from error
    if not isinstance(network, AcousticModel):
        raise InputError(f"{path} has no AcousticModel under the key 'model'")
    return network
