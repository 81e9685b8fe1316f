"""The ``tutornet`` command.

Its commands import what they need themselves: torch takes seconds, which help
and tab completion have not.
"""

import importlib.util
import json
import os
import shutil
import sys
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from io import StringIO
from pathlib import Path
from typing import Annotated

import typer

from tutornet_sb import __version__
from tutornet_sb.util import signals
from tutornet_sb.util.environment import check_torchaudio, require
from tutornet_sb.util.errors import (
    BAD_INPUT,
    InputError,
    MissingFileError,
    failing_in_one_line,
    one_line,
)

app = typer.Typer(
    help="Tools around TutorNet runs; the recipe's train.py trains. Exit "
    "codes: 0 done, 1 unexpected error, 2 bad input or command line, 75 "
    "stopped by a signal.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Rich would take most of the time of --help.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Whether the command that runs shows tracebacks
_DEBUG = ContextVar("debug", default=False)

License = Annotated[
    str | None,
    typer.Option(
        help="Licence of the model as the hub calls it, such as cc-by-4.0. It "
        "follows from the corpus for LibriSpeech (cc-by-4.0) and MiniLibri "
        "(apache-2.0)."
    ),
]
Language = Annotated[
    str | None,
    typer.Option(
        help="Language of the speech, such as en. It follows from the corpus "
        "for LibriSpeech and MiniLibri."
    ),
]


def _show_version(wanted):
    if wanted:
        typer.echo(f"tutornet {__version__}")
        raise typer.Exit


@app.callback()
def tutornet(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", help="Show the traceback of an error, before its line."
        ),
    ] = False,
):
    """Tools around TutorNet runs."""
    _DEBUG.set(debug)


@app.command()
def compare(
    what: Annotated[
        list[Path],
        typer.Argument(
            metavar="PLAN|RUNS...",
            help="A plan (YAML) of runs, which are made first, or output "
            "folders of train.py. A plan's recipe can run code: give only what "
            "you trust.",
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write results.csv, report.md and report.html there, and of a "
            "plan the small files of its runs. Of a plan, by default, "
            "the folder report beside its runs.",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs of a plan at a time, one thread each; by default as "
            "many as there are processors, and one on a GPU.",
        ),
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CORPUS",
            help="Only this corpus of a plan. Can be given several times.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CORPUS=FOLDER",
            help="Where a corpus of a plan lies. Can be given several times.",
        ),
    ] = None,
    finished: Annotated[
        bool,
        typer.Option(
            "--finished",
            help="Make no run of a plan: report on those that are finished, "
            "while others may go on.",
        ),
    ] = False,
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
    """Lay runs out in a table, and report on them; or make them by a plan.

    Runs that differ in their seed share a row. What is finished of a plan is
    reused, and what was stopped continues. If a run fails the others go on,
    and the exit code is 1.
    """
    failed = 0
    is_plan = len(what) == 1 and what[0].suffix in (".yaml", ".yml")
    extras = ["experiments"] if is_plan or to is not None else []
    with _command("compare", *extras):
        from tutornet_sb.experiments.compare import insert, short_table, table

        if is_plan:
            plan = _read_plan(what[0], corpus, data or [])
            folders, failed = _carry_out(plan, to, jobs, finished)
            if not folders:
                remedy = "mend what failed, and give the same command again"
                if not failed:
                    remedy = f"`tutornet compare {what[0]}` makes the runs"
                _say(f"no run is finished, so no report is written: {remedy}")
        elif jobs is not None or corpus or data or finished:
            raise InputError(
                "--jobs, --corpus, --data and --finished are for a plan, a "
                ".yaml file"
            )
        else:
            # What the runs of a plan print lies beside their folders.
            folders = [path for path in what if path.suffix != ".log"]
            # A run that cannot be read is found before the report is written.
            table(folders)
            if to is not None:
                from tutornet_sb.experiments.report import write_report

                write_report(folders, to, "Comparison of runs", _say)
                _say(f"the report is {to / 'report.html'}")
        text = short_table(folders) if folders else ""
        if into is not None and folders:
            insert(into, name, table(folders))
    if folders:
        typer.echo(text)
    if failed:
        raise typer.Exit(1)


def _read_plan(path, corpora, data):
    """Read a plan for the corpora that are wanted, from where they lie."""
    from tutornet_sb.experiments.plan import read_plan

    pairs = [word.partition("=") for word in data]
    if not all(folder for _, _, folder in pairs):
        raise InputError(f"--data {' '.join(data)}: must be CORPUS=FOLDER")
    data = {name: folder for name, _, folder in pairs}
    return read_plan(path, data, corpora or None)


def _carry_out(plan, to, jobs, finished):
    """Make the runs of a plan, unless it is for the finished ones, and report.

    Returns the folders with the small files of its finished runs, and how many
    failed.
    """
    import torch

    from tutornet_sb.experiments.jobs import find_finished, run_jobs
    from tutornet_sb.experiments.report import copy_small_files, write_report

    signals.install()
    to = plan.results / "report" if to is None else to
    if jobs is None:
        jobs = 1 if torch.cuda.is_available() else os.cpu_count()
    if finished:
        outcomes = find_finished(plan.jobs, plan.recipe)
        _say(f"{len(outcomes)} of {len(plan.jobs)} runs are finished")
    else:
        outcomes = run_jobs(plan.jobs, plan.recipe, jobs)
    failures = [outcome for outcome in outcomes if outcome.reason]
    made = {outcome.job.folder for outcome in outcomes if not outcome.reason}
    folders = [
        plan.recipe / job.folder for job in plan.jobs if job.folder in made
    ]
    copies = []
    if folders:
        write_report(folders, to, plan.title, _say)
        for folder in folders:
            copies.append(to / "runs" / folder.relative_to(plan.results))
            copy_small_files(folder, copies[-1])
        _say(f"the report is {to / 'report.html'}")
    if failures:
        _say(f"{len(failures)} of {len(outcomes)} runs are missing:")
    for outcome in failures:
        _say(f"{outcome.job.folder} {outcome.state}: {outcome.reason}")
    return copies, len(failures)


def _say(text):
    typer.echo(f"tutornet compare: {text}", err=True)


@app.command()
def layers(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL_YAML|RUN",
            help="A network's YAML file, which can run code: give only what "
            "you trust. Or an output folder of train.py.",
        ),
    ],
    size: Annotated[
        str,
        typer.Option(help="Size of the network, of those in its YAML file."),
    ] = "full",
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Load a run of other parts than the recipe's networks have, "
            "which can run any code.",
        ),
    ] = False,
):
    """List the layers of a model, and which of them can be paired.

    Shapes are those of the layers' outputs; frames lie so many ms apart.
    """
    with _command("layers"):
        from tutornet_sb.distillation.taps import list_layers
        from tutornet_sb.networks import runs

        if not model.is_dir():
            network = _build(model, size)
        elif size == "full":
            network, _ = runs.load_run(model, trust_remote_code)
        else:
            raise InputError("--size is for a YAML file: a run has its own")
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
    license: License = None,
    language: Language = None,
):
    """Write a run as a model that SpeechBrain loads without this package.

    Offline LSTM and GRU networks over log-mel features become stock parts, for
    EncoderASR; other networks take their source with them, for foreign_class.
    """
    extras = ["export"] if onnx or int8 or sherpa else []
    with _command("export", *extras):
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
    for form in ("onnx", "sherpa"):
        if form in config:
            typer.echo("\n".join(_say_form(form, config[form])))


def _say_form(form, known):
    """Where another form of the model is, and how it did."""
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


@app.command()
def transcribe(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A run, a folder by `tutornet export`, an id on the Hugging "
            "Face hub (owner/name), or an ONNX file.",
        ),
    ],
    audio: Annotated[
        list[Path],
        typer.Argument(
            metavar="AUDIO...",
            help="Audio files, and folders of them with their subfolders.",
        ),
    ],
    revision: Annotated[
        str | None,
        typer.Option(help="Commit, tag or branch of a hub id."),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Load a model that is described by a hyperparams.yaml, or a "
            "run of other parts than the recipe's networks have; either can "
            "run any code.",
        ),
    ] = False,
    json_lines: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print a JSON object a line: file, text, duration (seconds), "
            "confidence, and words with start, end and confidence.",
        ),
    ] = False,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Listen as to a microphone, by a streaming student: what is "
            "heard so far is shown in a terminal.",
        ),
    ] = False,
    lm: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Decode by beam search with this KenLM file (.arpa or .bin).",
        ),
    ] = None,
    beam_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Decode by beam search of this size (with --lm: 100)."
        ),
    ] = None,
    score: Annotated[
        Path | None,
        typer.Option(
            metavar="REF",
            help="Print WER and CER by these transcripts: a file of lines 'ID "
            "TEXT', or a folder with *.trans.txt as LibriSpeech has. The id of "
            "an audio file is its name without the ending.",
        ),
    ] = None,
    batch_seconds: Annotated[
        float, typer.Option(help="Audio encoded at a time (seconds).")
    ] = 60.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the transcripts into this file instead."
        ),
    ] = None,
):
    """Transcribe audio files: a line 'FILE TEXT' each, parted by a tab.

    Any format that soundfile reads, any sample rate, any number of channels,
    any length. A file that cannot be transcribed is named on standard error,
    and the exit code is then 2; the others are done all the same.
    """
    extras = ["export"] if model.endswith(".onnx") else []
    with _command("transcribe", *extras), ExitStack() as stack:
        from tqdm import tqdm

        from tutornet_sb.inference import transcription
        from tutornet_sb.inference.recogniser import load_recogniser

        files = transcription.find_audio(audio)
        references = None
        if score is not None:
            references = transcription.read_references(score)
            _check_ids(files)
        recogniser = load_recogniser(model, revision, trust_remote_code, device)
        searcher = None
        if lm is not None or beam_size is not None:
            searcher = transcription.make_searcher(
                recogniser, beam_size or 100, lm
            )
        write = typer.echo
        if output is not None:
            if output.resolve() in [file.resolve() for file in files]:
                raise InputError(f"{output} is one of the audio files")
            to = stack.enter_context(open(output, "w", encoding="utf-8"))

            def write(line):
                # Whoever looks on, or stops it, has what is done.
                print(line, file=to, flush=True)

        # Not in files and pipes; of a stream, it is what is heard so far.
        bar = stack.enter_context(
            tqdm(
                total=None if stream else transcription.count_seconds(files),
                unit="s",
                bar_format="{desc}" if stream else _BAR,
                disable=None,
                leave=False,
            )
        )

        def advance(seconds):
            # Headers may promise too little, and a bar ends at its total.
            bar.update(min(seconds, bar.total - bar.n))

        def show(text):
            # The last line of it
            width = shutil.get_terminal_size().columns
            bar.set_description_str(text[1 - width :])

        texts, failed = {}, 0
        for result in transcription.transcribe(
            recogniser,
            files,
            batch_seconds,
            searcher,
            stream,
            on_audio=None if bar.disable or stream else advance,
            on_partial=None if bar.disable else show,
        ):
            # The bar makes way, and what is said now need not stand there too.
            if stream:
                bar.set_description_str("")
            with tqdm.external_write_mode(file=sys.stderr):
                if isinstance(result, transcription.Failure):
                    failed += 1
                    typer.echo(
                        f"tutornet transcribe: {result.file}: {result.reason}",
                        err=True,
                    )
                    continue
                texts[Path(result.file).stem] = result.text
                write(
                    _as_json(result)
                    if json_lines
                    else f"{result.file}\t{result.text}"
                )
        bar.close()
        if references is not None:
            _report(texts, references, score, json_lines)
    if failed:
        typer.echo(
            f"tutornet transcribe: {failed} of {len(files)} files could not be "
            "transcribed",
            err=True,
        )
        raise typer.Exit(BAD_INPUT)


_BAR = "{percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} s of audio, {remaining}"


def _check_ids(files):
    known = {}
    for file in files:
        other = known.setdefault(file.stem, file)
        if other != file:
            raise InputError(
                f"{other} and {file} have the same id, {file.stem}: score them "
                "one by one"
            )


def _as_json(transcript):
    content = transcript._asdict() | {
        "duration": round(transcript.duration, 3),
        "confidence": round(transcript.confidence, 4),
        "words": [
            {
                "word": word.word,
                "start": round(word.start, 3),
                "end": round(word.end, 3),
                "confidence": round(word.confidence, 4),
            }
            for word in transcript.words
        ],
    }
    return json.dumps(content, ensure_ascii=False)


def _report(texts, references, path, json_lines):
    """Print the scores of what was transcribed and has a reference."""
    from tutornet_sb.inference.scores import score as score_transcripts

    scored = {key: texts[key] for key in texts if key in references}
    if len(scored) < len(texts):
        typer.echo(
            f"tutornet transcribe: {len(texts) - len(scored)} of {len(texts)} "
            f"transcripts have no reference in {path} and are not scored",
            err=True,
        )
    if not scored:
        raise InputError(f"no file has a reference in {path}")
    figures = score_transcripts(
        {key: references[key] for key in scored}, scored
    )
    if json_lines:
        typer.echo(json.dumps(figures))
        return
    typer.echo(
        f"WER {figures['wer']:.2f} %, CER {figures['cer']:.2f} % "
        f"({figures['utterances']} utterances, {figures['words']} words)"
    )


@app.command()
def publish(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Written by tutornet export."),
    ],
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Repository on the hub, OWNER/MODEL; made if there is none.",
        ),
    ],
    private: Annotated[
        bool,
        typer.Option("--private", help="Make it for its owner alone."),
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="BRANCH",
            help="Branch instead of the main one; made if there is none.",
        ),
    ] = None,
    license: License = None,
    language: Language = None,
    message: Annotated[
        str | None, typer.Option(help="Message of the commit.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List what would go; send nothing."),
    ] = False,
):
    """Put an exported model on the Hugging Face hub, in one commit.

    README.md, the model card, is written from config.json each time. The token
    is the one that `hf auth login` or HF_TOKEN has set. HF_ENDPOINT names
    another hub.
    """
    with _command("publish"):
        from tutornet_sb.publishing import hub

        if dry_run:
            upload = hub.prepare(
                folder, name, private, revision, license, language
            )
        else:
            upload, commit, changed = hub.publish(
                folder, name, private, revision, license, language, message
            )
    sizes = upload.sizes
    if dry_run:
        typer.echo(f"To {upload.url}, branch {upload.branch}, would go:")
        width = len(f"{sum(sizes.values()):,}")
        for path, size in sizes.items():
            typer.echo(f"    {size:{width},}  {path}")
    else:
        state = "holds now" if changed else "held all this already"
        typer.echo(f"{upload.url} {state}, commit {commit}:")
    typer.echo(f"{len(sizes)} files, {sum(sizes.values()):,} bytes")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def targets(
    context: typer.Context,
    to: Annotated[
        Path, typer.Option(metavar="FOLDER", help="The target store.")
    ],
    hparams: Annotated[
        Path | None,
        typer.Argument(
            metavar="HPARAMS",
            help="Main YAML file of a recipe, followed by options as for its "
            "train.py. Both can run code: give only what you trust.",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Read all of the store, and fill nothing."
        ),
    ] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Fill again what is damaged or missing."),
    ] = False,
):
    """Keep what a teacher says about a corpus, for runs with --targets store.

    What is in the store already is left alone; a call after a stopped one goes
    on. Under torchrun each process takes a part.
    """
    with _command("targets"), ExitStack() as stack:
        from speechbrain.utils.distributed import if_main_process

        from tutornet_sb.targets.extraction import repair_store
        from tutornet_sb.util import processes

        stack.enter_context(processes.ending_together())
        if check and repair:
            raise InputError("give --check or --repair, not both")
        if check:
            _check_store(to)
            return
        if hparams is None:
            raise InputError("HPARAMS is missing: it says who the teacher is")
        signals.install()
        recipe = _load_recipe(hparams)
        file, options, overrides = recipe.parse([str(hparams), *context.args])
        if repair:
            damaged = processes.run_on_main(repair_store, [to])
            _show_damage(damaged if if_main_process() else [])
        store = recipe.fill(
            file, options, overrides | {"store_folder": str(to)}
        )
        if if_main_process():
            size = sum(path.stat().st_size for path in to.rglob("*")) / 1e6
            typer.echo(f"{to} holds {len(store)} utterances, {size:.1f} MB")


def _check_store(folder):
    from tutornet_sb.targets.store import TargetStore

    store = TargetStore(folder, partial=True)
    damaged = store.check()
    _show_damage(damaged)
    if damaged:
        raise InputError(
            f"{len(damaged)} shards of {folder} are damaged: the same command "
            "with HPARAMS and --repair fills them again"
        )
    typer.echo(f"{folder} holds {len(store)} utterances, all sound")


def _show_damage(damaged):
    for damage in damaged:
        typer.echo(str(damage))
        for key in damage.keys:
            typer.echo(f"    {key}")


def _load_recipe(hparams):
    """Load the train.py that a main YAML file belongs to."""
    for folder in (hparams.parent, hparams.resolve().parent.parent):
        if (folder / "train.py").is_file():
            break
    else:
        raise MissingFileError(
            f"there is no train.py beside {hparams} or above it"
        )
    spec = importlib.util.spec_from_file_location("recipe", folder / "train.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


@contextmanager
def _command(name, *extras):
    """Show an error of a command as one line, and a signal too."""
    with failing_in_one_line(f"tutornet {name}", _DEBUG.get()):
        require(*extras)
        signals.install(resumes=False)
        check_torchaudio()
        yield


def _build(path, size):
    """Make a network with random weights."""
    from hyperpyyaml import load_hyperpyyaml
    from ruamel.yaml import YAML

    from tutornet_sb.networks.acoustic_model import AcousticModel
    from tutornet_sb.training.settings import check_calls
    from tutornet_sb.util.composition import include

    content, text = include(path, ".", size), StringIO()
    check_calls(content)
    YAML().dump(content, text)
    try:
        network = load_hyperpyyaml(text.getvalue()).get("model")
    # Of values that somebody made up, all kinds of errors
    except Exception as error:
        raise InputError(f"{path}: {one_line(error)}") from error
    if not isinstance(network, AcousticModel):
        raise InputError(f"{path} has no AcousticModel under the key 'model'")
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
