"""Signals, launchers and ranks: who ends, how quickly, and with which words."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastunlearn.errors import UserError
from fastunlearn.utils.processes import stop
from fastunlearn.utils.processes.ranks import check_port, run_ranks
from fastunlearn.utils.processes.relatives import launchers

ROOT = Path(__file__).resolve().parents[2]
PROLOGUE = f"""
import os, sys, time, signal, threading
sys.path.insert(0, {str(ROOT)!r})
from fastunlearn.utils.processes import stop
"""
DEFERRED = """
try:
    with stop.listening(), stop.between_updates():
        os.write(1, b"ready\\n")
        while not stop.requested():
            time.sleep(0.01)
        time.sleep(0.3)  # a checkpoint
        raise stop.Stopped(stop.requested(), "checkpoint-7")
except stop.Stopped as stopped:
    os.write(1, f"{stopped.saved}\\n".encode())
    sys.exit(stopped.status)
"""
IMMEDIATE = """
try:
    with stop.listening():
        os.write(1, b"ready\\n")
        time.sleep(60)
except stop.Stopped as stopped:
    sys.exit(stopped.status)
"""
STUCK = """
stop.BOUND_SECONDS = stop.UNWIND_SECONDS = 0.5
with stop.listening(), stop.between_updates():
    os.write(1, b"ready\\n")
    while True:
        time.sleep(0.01)
"""
TWICE = """
stop.SAME_SECONDS = 0.2
with stop.listening(), stop.between_updates():
    os.write(1, b"ready\\n")
    while True:
        time.sleep(0.01)
"""


def start(program: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROLOGUE + program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("program", "said"), [(DEFERRED, "checkpoint-7\n"), (IMMEDIATE, "")])
def test_a_signal_ends_with_its_status(number: int, program: str, said: str) -> None:
    process = start(program)
    process.send_signal(number)
    if program == DEFERRED:
        process.send_signal(signal.SIGTERM)  # that of the launcher, for the same reason
    out, err = process.communicate(timeout=30)
    # A process that was not on the processor in between gets both at once, and may hear of the later one first.
    statuses = {128 + number} | ({128 + signal.SIGTERM} if program == DEFERRED else set())
    assert (out, err) == (said, "") and process.returncode in statuses


def test_who_does_not_come_to_a_checkpoint_ends_all_the_same() -> None:
    process = start(STUCK)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and "stopped by force" in err


def test_a_second_signal_ends_at_once() -> None:
    process = start(TWICE)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130


LAUNCHED = """
import subprocess
subprocess.run([sys.executable, *sys.argv[1:]], env=os.environ | {"RANK": "0"})
"""


@pytest.mark.parametrize("levels", [1, 2])
def test_a_rank_ends_with_the_process_that_launched_it(levels: int, tmp_path: Path) -> None:
    """Also where another launcher stands in between, and stays."""
    launcher = tmp_path / "deepspeed"
    launcher.write_text(PROLOGUE + LAUNCHED)
    command = [sys.executable, *[str(launcher)] * levels, "-c", PROLOGUE + DEFERRED]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.kill()
    assert process.stdout.read() == "checkpoint-7\n"  # the pipe is the rank's now


def test_only_launchers_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert launchers() == []
    monkeypatch.setenv("RANK", "0")
    assert launchers()[0] == os.getppid()


def test_a_peer_that_dies_takes_the_others_along() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    process = start(f"""
stop.PEER_SECONDS = 0.2
with stop.listening(), stop.bound_to({{{child.pid}: "rank 1 (process {child.pid})"}}):
    os.write(1, b"ready\\n")
    time.sleep(60)
""")
    child.kill()
    child.wait()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1 and f"rank 1 (process {child.pid}) has died" in err


def test_a_peer_that_is_needed_no_longer_may_end() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    process = start(f"""
stop.PEER_SECONDS = 0.5
with stop.listening():
    with stop.bound_to({{{child.pid}: "rank 1"}}):
        os.kill({child.pid}, signal.SIGKILL)
        time.sleep(0.2)
    os.write(1, b"ready\\n")
    time.sleep(1)
sys.exit(7 if not stop.lost_peer() else 8)
""")
    assert process.wait(timeout=30) == 7
    child.wait()


RANK = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    print("the reason", file=sys.stderr, flush=True)
    {end}
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was killed by SIGKILL: the reason"),
        ("sys.exit(5)", 5, "ended with status 5: the reason"),
        ("sys.exit(2)", 2, ""),
    ],
)
def test_the_launcher_names_who_died_and_ends_the_others(
    end: str, status: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastunlearn.utils.processes.ranks.GRACE_SECONDS", 0.1)
    assert run_ranks(3, [sys.executable, "-c", RANK.format(end=end)]) == status
    err = capsys.readouterr().err
    assert "the reason" in err and ("error: rank 1 (process " in err) == bool(words) and words in err


def test_the_launcher_hands_signals_on(tmp_path: Path) -> None:
    ranks = f"""
from fastunlearn.utils.processes.ranks import run_ranks
sys.exit(run_ranks(2, [sys.executable, "-c", {PROLOGUE + DEFERRED!r}]))
"""
    command = [sys.executable, "-c", PROLOGUE + ranks]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (143, "checkpoint-7\n" * 2, "")


def test_ranks_have_all_that_a_launcher_gives_and_a_free_port(capfd: pytest.CaptureFixture[str]) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR")
    code = f"import os; place = ' '.join(os.environ[name] for name in {names}); port = int(os.environ['MASTER_PORT'])\n"
    code += "os.write(1, f'{place} {port > 0}\\n'.encode())"
    assert run_ranks(2, [sys.executable, "-c", code]) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["0 0 2 2 127.0.0.1 True", "1 1 2 2 127.0.0.1 True"]


def test_a_taken_port_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", port)
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError, match=f"MASTER_PORT: '{port}'.*--master_port N"):
            check_port()
        monkeypatch.setenv("RANK", "1")
        check_port()
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        check_port()
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    check_port()


def test_a_peer_is_named_also_where_the_other_thread_has_just_let_go_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def left_meanwhile(ready: list[int], *_: object) -> tuple[list[int], list[int], list[int]]:
        stop._state.peers = {}
        return ready, [], []

    monkeypatch.setattr(stop._state, "peers", {30: "rank 1"})
    monkeypatch.setattr(stop.select, "select", left_meanwhile)
    assert stop.lost_peer() == "rank 1"
