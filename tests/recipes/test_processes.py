"""train.py under torchrun, on the CPU."""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import write_minilibri
from speechbrain.dataio.dataio import read_audio
from speechbrain.decoders.ctc import ctc_greedy_decode

from tutornet_sb.inference.scores import score
from tutornet_sb.networks import runs
from tutornet_sb.targets.store import TargetStore

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[2] / "recipes" / "LibriSpeech" / "TutorNet"
SPLITS = ["dev-clean", "test-clean", "test-other"]
STUDENT = Path("results") / "small" / "rkd+skd_lstm_by_jasper_dr" / "1234"
OPTIONS = {
    "data_folder": "mini libri",
    "corpus_yaml": "hparams/corpora/small.yaml",
    # Some batches for each
    "corpus_overrides": "{teacher_epochs: 1, epochs: 2, batch_seconds: 4}",
    "student_overrides": "{channels: 16, hidden_size: 16}",
    "rkd.share": 0.5,
    "distributed_backend": "gloo",
    "device": "cpu",
}
# Before train.py, in each process: what it writes, and what it has found
WATCH = """
import atexit, importlib.util, json, os, pathlib, signal, sys, time
import torch
from tutornet_sb.targets.extraction import weights_hash
from tutornet_sb.training.stages import STAGES
rank, here = int(os.environ["RANK"]), os.getcwd()
_, kill, kill_rank, kill_count, *sys.argv = sys.argv
written, found = [], []
def note(path):
    if isinstance(path, (str, bytes, os.PathLike)):
        path = os.path.abspath(os.fsdecode(path))
        if path.startswith(here):
            written.append(os.path.relpath(path, here))
def watch(event, args):
    if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
        note(args[0])
    elif event in ("os.rename", "os.remove", "os.truncate"):
        note(args[event == "os.rename"])
sys.addaudithook(watch)
save = torch.save
def noted_save(content, path, *args, **kwargs):
    # It opens files itself, unseen.
    note(path)
    save(content, path, *args, **kwargs)
torch.save = noted_save
spec = importlib.util.spec_from_file_location("recipe", sys.argv[0])
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)
evaluate = recipe.evaluate
def watched(stage, figures, experiment, *rest):
    evaluate(stage, figures, experiment, *rest)
    known = figures["splits"], figures["best"]
    weights = weights_hash(experiment.student)
    found.append(json.dumps([stage.name, weights, *known]))
recipe.evaluate = watched
@atexit.register
def tell():
    path = pathlib.Path(here).parent / f"{os.path.basename(here)} {rank}.json"
    path.write_text(json.dumps({"written": written, "found": found}))
calls = []
def dying(function):
    def call(*args, **kwargs):
        calls.append(1)
        if [rank, len(calls)] == [int(kill_rank), int(kill_count)]:
            pathlib.Path("killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
if kill != "nobody":
    owner, name = kill.split(".")
    if owner in STAGES:
        owner = STAGES[owner].brain
    else:
        owner = importlib.import_module(f"tutornet_sb.training.{owner}")
    setattr(owner, name, dying(getattr(owner, name)))
recipe.main()
"""


def words_of(file="rkd_lstm.yaml", **options):
    words = [str(RECIPE / "train.py"), str(RECIPE / "hparams" / file)]
    words += ["--noprogressbar"]
    for key, value in (OPTIONS | options).items():
        if value is not None:
            words += [f"--{key}", str(value)]
    return words


def launch(folder, words, *launcher):
    """Start torchrun, or a process alone without anything for it."""
    start = [sys.executable]
    if launcher:
        start += ["-m", "torch.distributed.run", *launcher]
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(
            [*start, *words], cwd=folder, stdout=log, stderr=log
        )


def finish(process, limit=300):
    try:
        return process.wait(limit)
    finally:
        process.kill()


TWO = "--standalone", "--nproc_per_node=2"


def torchrun(folder, kill="nobody", rank=0, count=0, **options):
    """Run train.py in two processes, of which one may be killed."""
    watch = folder.parent / "watch.py"
    watch.write_text(WATCH)
    words = [str(watch), kill, str(rank), str(count), *words_of(**options)]
    return finish(launch(folder, words, *TWO))


def said(folder):
    return (folder / "log.txt").read_text()


def told(folder):
    """What each process has noted."""
    return [
        json.loads(folder.with_name(f"{folder.name} {rank}.json").read_text())
        for rank in (0, 1)
    ]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder in which two processes have done all there is to do."""
    folder = tmp_path_factory.mktemp("two") / "work"
    folder.mkdir()
    write_minilibri(folder / "mini libri")
    code = torchrun(folder, targets="store", **{"store.folder": "store"})
    assert code == 0, said(folder)[-3000:]
    return folder


@pytest.fixture
def copied(work, tmp_path):
    """A copy with the teacher alone."""
    folder = tmp_path / "copy"
    shutil.copytree(work, folder)
    shutil.rmtree(folder / STUDENT)
    (folder / "log.txt").unlink()
    return folder


def test_one_process_writes(work):
    main, other = (set(one["written"]) for one in told(work))
    # Each fills its own shards of the store.
    assert other and all(
        path.startswith(str(Path("store") / "shards")) for path in other
    )
    assert not main & other
    wanted = [runs.RESULTS, runs.WEIGHTS, runs.MODEL_YAML]
    assert main >= {str(STUDENT / name) for name in wanted}
    store = TargetStore(work / "store")
    assert store.check() == []


def test_all_processes_end_each_stage_alike(work):
    main, other = (one["found"] for one in told(work))
    assert main == other
    assert [json.loads(text)[0] for text in main] == ["ctc", "rkd", "skd"]


def test_results_are_written_and_shown_once(work):
    assert said(work).count("The run is in") == 1
    results = runs.read_results(work / STUDENT)
    assert results["stages"].keys() == {"rkd", "skd"}
    for stage in results["stages"].values():
        assert stage["processes"] == 2 and set(stage["splits"]) == set(SPLITS)


@pytest.mark.parametrize("split", SPLITS)
def test_the_error_rate_is_that_of_the_whole_set_by_one_process(work, split):
    model, tokenizer = runs.load_run(work / STUDENT)
    model.eval()
    references, hypotheses = {}, {}
    for path in sorted((work / "mini libri" / split).rglob("*.trans.txt")):
        for line in path.read_text().splitlines():
            key, references[key] = line.split(maxsplit=1)
            wav = read_audio(str(path.with_name(f"{key}.flac")))
            with torch.no_grad():
                logits = model(wav.unsqueeze(0), torch.ones(1)).logits
            ids = ctc_greedy_decode(logits, torch.ones(1), blank_id=0)
            hypotheses[key] = " ".join(tokenizer.decode(ids)[0].split())
    found = runs.read_results(work / STUDENT)["stages"]["skd"]["splits"][split]
    assert found == score(references, hypotheses)


# ----------------------------------------------------------------- more of them


@pytest.mark.parametrize(
    "options",
    [
        {"file": "rkd_lstm.yaml"},
        {"file": "pseudo_lstm.yaml", "min_confidence": 0},
        {"file": "skd_lstm.yaml", "grad_accumulation_factor": 2},
        {"stages": "[rkd, ctc]", "rkd.head_frames": 0}
        | {"student_yaml": "hparams/models/transformer.yaml"}
        | {"student_overrides": "{}"},
        {"file": "rkd_lstm_streaming.yaml", "decoding.beam_size": 4},
    ],
    ids=lambda options: "_".join(map(str, options)),
)
def test_every_stage_runs_in_two_processes(copied, options):
    code = torchrun(copied, output_folder="run", **options)
    assert code == 0, said(copied)[-3000:]
    main, other = told(copied)
    assert other["written"] == [] and main["found"] == other["found"]
    results = runs.read_results(copied / "run")
    for stage in results["stages"].values():
        assert set(stage["splits"]) == set(SPLITS)


LONGER = {
    "corpus_overrides": "{teacher_epochs: 1, epochs: 4, batch_seconds: 3}",
    "ckpt_interval_steps": 1,
    "ckpt_interval_minutes": 0,
    "output_folder": "run",
    # Trained by larger batches
    "teacher.folder": "results/small/teacher_jasper_dr/1234",
}


def survivors(folder):
    """Processes that work in a folder still."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder:
                found.append(process.name)
        except OSError:
            # It has just ended.
            continue
    return found


@pytest.mark.parametrize(
    "kill, rank, count",
    [
        ("rkd.on_fit_batch_end", 1, 3),
        ("skd.on_fit_batch_end", 0, 2),
        ("skd.evaluate_batch", 1, 1),
        # While the others wait
        ("offline.fit_head", 0, 1),
        ("evaluation.write_alignments", 0, 2),
    ],
)
def test_a_killed_process_ends_all_and_the_same_command_goes_on(
    copied, kill, rank, count
):
    code = torchrun(copied, kill, rank, count, **LONGER)
    ended = time.time()
    assert code not in (0, None) and not survivors(copied.resolve())
    assert ended - float((copied / "killed").read_text()) < 60
    log = said(copied)
    # Nothing is said of lost connections besides.
    assert "Signal 9 (SIGKILL) received" in log and "gloo" not in log
    assert f"rank      : {rank} " in log[log.index("Root Cause") :]
    assert not runs.is_finished(copied / "run")
    if kill == "rkd.on_fit_batch_end":
        # Within an epoch, with a checkpoint
        alone = launch(copied, words_of(**LONGER))
        assert finish(alone) != 0
        assert "begun with processes: 2, and now it is 1" in said(copied)
    assert torchrun(copied, **LONGER) == 0, said(copied)[-3000:]
    results = runs.read_results(copied / "run")
    assert set(results["stages"]["skd"]["splits"]) == set(SPLITS)


@pytest.mark.parametrize(
    "options, message",
    [
        # In all processes, in the main one, in another one
        ({"skd.loss": "l3"}, "skd.loss must be"),
        ({"data_folder": "nowhere"}, "nowhere"),
        ({"batch_seconds": 1000}, "2 processes are too many for the"),
    ],
)
def test_an_error_is_told_once_and_ends_all(copied, options, message):
    code = torchrun(copied, output_folder="run", **options)
    assert code == 1
    assert not survivors(copied.resolve())
    log = said(copied)
    assert log.count("train.py: ") == 1
    assert message in log


# ----------------------------------------------------------------- two machines


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def two_machines(folders, words):
    """An agent of torchrun for each machine, with a process each."""
    port, agents = free_port(), []
    for number, folder in enumerate(folders):
        launcher = [
            "--nnodes=2",
            f"--node_rank={number}",
            "--nproc_per_node=1",
            "--rdzv_id=tutornet",
            "--rdzv_backend=c10d",
            f"--rdzv_endpoint=127.0.0.1:{port}",
        ]
        agents.append(launch(folder, words, *launcher))
    return agents


def test_two_machines_make_one_run(copied):
    agents = two_machines([copied, copied], words_of(output_folder="run"))
    assert [finish(agent) for agent in agents] == [0, 0], said(copied)[-3000:]
    results = runs.read_results(copied / "run")
    assert results["stages"]["skd"]["processes"] == 2
    assert said(copied).count("The run is in") == 1


def test_a_process_killed_on_one_machine_ends_both(copied):
    watch = copied.parent / "watch.py"
    watch.write_text(WATCH)
    words = [str(watch), "rkd.on_fit_batch_end", "1", "2"]
    agents = two_machines([copied, copied], words + words_of(**LONGER))
    assert all(finish(agent) for agent in agents)
    assert time.time() - float((copied / "killed").read_text()) < 60
    assert not survivors(copied.resolve())
    agents = two_machines([copied, copied], words_of(**LONGER))
    assert [finish(agent) for agent in agents] == [0, 0], said(copied)[-3000:]
    assert runs.is_finished(copied / "run")


def test_machines_that_share_no_folder_are_told_so(copied, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(copied, other)
    words = words_of(output_folder="run")
    agents = two_machines([copied, other], words)
    assert all(finish(agent) for agent in agents)
    for folder in copied, other:
        assert "does not see run/hyperparams.yaml" in said(folder)


def test_two_processes_fill_a_store(copied):
    words = ["-m", "tutornet_sb.cli", "targets", *words_of()[1:]]
    words += ["--to", "a store"]
    assert finish(launch(copied, words, *TWO)) == 0, said(copied)[-3000:]
    assert said(copied).count("a store holds") == 1
    store = TargetStore(copied / "a store")
    # Two for the training set, two for the development set
    assert len(store._shards) == 4 and store.check() == []
