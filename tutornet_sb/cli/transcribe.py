"""``tutornet transcribe``: transcripts of audio files, and their scores."""

import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import typer
from typer import Argument, Option

from tutornet_sb.cli.common import TRUST_REMOTE_CODE, running
from tutornet_sb.util.errors import BAD_INPUT, InputError

BAR = "{percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} s of audio, {remaining}"


def transcribe(
    model: str = Argument(
        metavar="MODEL",
        help="A run, an exported folder, a hub id (owner/name), or an ONNX "
        "file.",
    ),
    audio: list[Path] = Argument(
        metavar="AUDIO...",
        help="Audio files, and folders of them with their subfolders.",
    ),
    revision: str | None = Option(
        None, help="Commit, tag or branch of a hub id."
    ),
    trust_remote_code: bool = TRUST_REMOTE_CODE,
    json_lines: bool = Option(
        False,
        "--json",
        help="Print JSON lines: file, text, duration (s), confidence, and "
        "words with start, end and confidence.",
    ),
    stream: bool = Option(
        False,
        "--stream",
        help="Process audio as from a microphone, by a streaming student.",
    ),
    lm: Path | None = Option(
        None, metavar="FILE", help="KenLM file for decoding by beam search."
    ),
    beam_size: int | None = Option(
        None, min=1, help="Decode by beam search of this size (with --lm: 100)."
    ),
    score: Path | None = Option(
        None,
        metavar="REF",
        help="Print WER and CER by these transcripts: lines 'ID TEXT', ID "
        "being a file name without its ending, or a folder of *.trans.txt.",
    ),
    batch_seconds: float = Option(
        60.0, help="Audio encoded at a time (seconds)."
    ),
    device: str = Option("cpu", help="cpu or cuda."),
    output: Path | None = Option(
        None,
        metavar="FILE",
        help="Write the transcripts into this file instead.",
    ),
):
    """Transcribe audio files: a line 'FILE TEXT' each, parted by a tab.

    Any format that soundfile reads, any sample rate, any number of channels,
    any length. A file that cannot be transcribed is named on standard error,
    and the exit code is then 2; the others are transcribed all the same.
    """
    extras = ["export"] if model.endswith(".onnx") else []
    with running("transcribe", *extras), ExitStack() as stack:
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
        to = sys.stdout
        if output is not None:
            if output.resolve() in [file.resolve() for file in files]:
                raise InputError(f"{output} is one of the audio files")
            to = stack.enter_context(open(output, "w", encoding="utf-8"))
        # Not in files and pipes; of a stream, it is the transcript so far.
        bar = stack.enter_context(
            tqdm(
                total=None if stream else transcription.count_seconds(files),
                unit="s",
                bar_format="{desc}" if stream else BAR,
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
            # The bar makes way, and so does what is final now.
            if stream:
                bar.set_description_str("")
            with tqdm.external_write_mode(file=sys.stderr):
                if isinstance(result, transcription.Failure):
                    failed += 1
                    _log(f"{result.file}: {result.reason}")
                    continue
                texts[Path(result.file).stem] = result.text
                # Complete lines, however it ends
                line = f"{result.file}\t{result.text}"
                line = _as_json(result) if json_lines else line
                print(line, file=to, flush=True)
        bar.close()
        if references is not None:
            _report(texts, references, score, json_lines)
    if failed:
        _log(f"{failed} of {len(files)} files could not be transcribed")
        raise typer.Exit(BAD_INPUT)


def _log(text):
    typer.echo(f"tutornet transcribe: {text}", err=True)


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
    """Print the scores of transcripts that have a reference."""
    from tutornet_sb.inference.scores import score

    scored = {key: texts[key] for key in texts if key in references}
    if len(scored) < len(texts):
        _log(
            f"{len(texts) - len(scored)} of {len(texts)} transcripts have no "
            f"reference in {path} and are not scored"
        )
    if not scored:
        raise InputError(f"no file has a reference in {path}")
    figures = score({key: references[key] for key in scored}, scored)
    if json_lines:
        typer.echo(json.dumps(figures))
        return
    typer.echo(
        f"WER {figures['wer']:.2f} %, CER {figures['cer']:.2f} % "
        f"({figures['utterances']} utterances, {figures['words']} words)"
    )
