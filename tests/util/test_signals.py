"""Signals, sent to small programs that stop as train.py does."""

import signal
import subprocess
import sys
import textwrap

import pytest

START = """
import os, signal, time
from tutornet_sb.util import signals as stopping
stopping.install()
"""


def run(program, **options):
    """Run a program, and give its exit code and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", START + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )
    return done.returncode, done.stdout.split(), done.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_stops_at_once_where_nothing_is_to_be_finished(name):
    code, printed, error = run(
        f"""
        print("begun", flush=True)
        try:
            os.kill(os.getpid(), signal.{name})
            time.sleep(30)
        finally:
            print("tidied")
        """
    )
    assert (code, printed) == (75, ["begun", "tidied"])
    assert error == f"\n{name}: stopping. The same command resumes\n"


def test_a_block_is_finished_first():
    code, printed, error = run(
        """
        with stopping.finishing():
            with stopping.finishing():
                os.kill(os.getpid(), signal.SIGTERM)
            print(stopping.requested())
        print("never")
        """
    )
    assert (code, printed) == (75, ["True"])
    assert "SIGTERM: finishing the step and saving" in error


def test_a_block_may_be_left_where_it_asks():
    code, printed, _ = run(
        """
        with stopping.finishing():
            stopping.check()
            os.kill(os.getpid(), signal.SIGINT)
            print("asked")
            stopping.check()
            print("never")
        """
    )
    assert (code, printed) == (75, ["asked"])


@pytest.mark.parametrize(
    "second, code, printed",
    [("SIGTERM", 128 + signal.SIGTERM, []), ("SIGINT", 75, ["finished"])],
)
def test_a_second_signal_of_the_kind_stops_at_once(second, code, printed):
    # A launcher may hand on as SIGTERM what the process had as SIGINT.
    found = run(
        f"""
        with stopping.finishing():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.{second})
            print("finished")
        """
    )
    assert found[:2] == (code, printed)


def test_an_error_in_a_block_is_not_hidden_by_a_signal():
    code, _, error = run(
        """
        with stopping.finishing():
            os.kill(os.getpid(), signal.SIGTERM)
            raise ValueError("the disk is full")
        """
    )
    assert code == 1
    assert "ValueError: the disk is full" in error


@pytest.mark.parametrize("worker", [False, True])
def test_workers_of_a_loader_leave_it_to_their_parent(worker):
    code, printed, _ = run(
        f"""
        import sys
        read, write = os.pipe()
        child = os.fork()
        if not child:
            if {worker}:
                stopping.leave_to_parent(0)
            os.write(write, b"!")
            time.sleep(1)
            os.write(write, b"alive")
            time.sleep(30)
            os._exit(3)
        os.read(read, 1)
        os.kill(child, signal.SIGINT)
        os.kill(child, signal.SIGTERM)
        if {worker}:
            print(os.read(read, 5).decode())
            # A loader that gives its worker up
            os.kill(child, signal.SIGTERM)
        print(-os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert code == 0
    if worker:
        assert printed == ["alive", str(int(signal.SIGTERM))]
    else:
        assert printed in (["2"], ["15"])


def test_workers_do_not_outlive_their_parent():
    code, printed, _ = run(
        """
        import multiprocessing
        def work(ready):
            stopping.leave_to_parent()
            ready.set()
            time.sleep(50)
        fork = multiprocessing.get_context("fork")
        ready = fork.Event()
        fork.Process(target=work, args=[ready], daemon=True).start()
        ready.wait()
        print("begun", flush=True)
        raise stopping.Stopped
        """
    )
    assert (code, printed) == (75, ["begun"])
