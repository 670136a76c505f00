"""Signals, really sent: at random moments, at every single instruction, in critical sections, twice and thrice."""

from __future__ import annotations

import dis
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from esrl.errors import Interrupted
from esrl.training import interrupts as module
from esrl.training.interrupts import Interrupts


@pytest.fixture
def outside() -> Iterator[list[int]]:
    """Handlers that stand in for those of the user's program; the list holds the signals that reached them."""
    reached: list[int] = []

    def note(number: int, _: object) -> None:
        reached.append(number)

    previous = {number: signal.signal(number, note) for number in module.SIGNALS}
    yield reached
    assert all(signal.getsignal(number) is note for number in module.SIGNALS)  # restored, in every test
    for number, handler in previous.items():
        signal.signal(number, handler)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_hung_call_is_left_at_once(outside, number, code):
    threading.Timer(0.05, send, [number]).start()
    start = time.monotonic()
    with pytest.raises(Interrupted) as caught, Interrupts() as interrupts:
        try:
            time.sleep(30)
        except Exception:  # noqa: BLE001 - what a reward function may well contain
            pytest.fail("swallowed")
    assert time.monotonic() - start < 5
    assert caught.value.signum == number and caught.value.exit_code == code
    assert interrupts.pending == number
    assert outside == []


def test_a_critical_section_is_finished_first_and_the_first_signal_counts(outside):
    done = []
    with pytest.raises(Interrupted) as caught, Interrupts() as interrupts:
        with interrupts.critical():
            send(signal.SIGTERM, signal.SIGINT)
            with interrupts.critical():
                done.append("inner")
            done.append("outer")  # the end of an inner section is none
        done.append("never")
    assert done == ["inner", "outer"]
    assert caught.value.signum == signal.SIGTERM


def test_after_the_first_interruption_the_state_is_saved_in_peace(outside, capfd):
    saved = []
    with Interrupts() as interrupts:
        try:
            send(signal.SIGINT)
        except Interrupted:
            send(signal.SIGINT)
            assert capfd.readouterr().err == ""
            with interrupts.critical():
                send(signal.SIGTERM)  # the third
                saved.append("state")
            saved.append("model")
            send(signal.SIGTERM)
    assert saved == ["state", "model"]
    assert interrupts.pending == signal.SIGINT
    assert capfd.readouterr().err == "esrl: saving is in progress; the run stops when it is done.\n"
    assert outside == []


def test_deferred_signals_are_only_noted(outside):
    with Interrupts(deferred=True) as interrupts:
        assert interrupts.pending is None
        send(signal.SIGTERM)
        with interrupts.critical():
            send(signal.SIGINT)
        assert interrupts.pending == signal.SIGTERM
    assert interrupts.pending == signal.SIGTERM


def test_an_error_in_a_critical_section_goes_first(outside):
    with pytest.raises(OSError, match="disk full"), Interrupts() as interrupts, interrupts.critical():
        send(signal.SIGINT)
        raise OSError("disk full")
    assert interrupts.pending == signal.SIGINT


def test_handlers_are_back_after_an_error(outside):
    with pytest.raises(ZeroDivisionError), Interrupts():
        _ = 1 / 0
    send(signal.SIGINT, signal.SIGTERM)
    assert outside == [signal.SIGINT, signal.SIGTERM]


def test_no_handler_in_another_thread(outside):
    during: list[bool] = []

    def work() -> None:
        before = signal.getsignal(signal.SIGINT)
        with Interrupts() as interrupts, interrupts.critical():
            during.append(signal.getsignal(signal.SIGINT) is before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert during == [True]


def test_a_forked_worker_can_be_terminated(outside):
    with Interrupts() as interrupts, interrupts.critical():
        pid = os.fork()
        if pid == 0:
            try:
                time.sleep(30)
            finally:
                os._exit(1)
        time.sleep(0.05)
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    assert interrupts.pending is None


def test_random_moments_never_cut_a_critical_section(outside):
    rng = random.Random(1)
    for _ in range(60):
        first = second = 0
        # up to three signals, from another thread, while the main thread computes
        delays = sorted(rng.uniform(0, 0.004) for _ in range(rng.randint(1, 3)))
        numbers = [rng.choice(module.SIGNALS) for _ in delays]

        def fire(delays: list[float] = delays, numbers: list[int] = numbers) -> None:
            for delay, number in zip(delays, numbers, strict=True):
                time.sleep(delay)
                send(number)

        thread = threading.Thread(target=fire)
        with Interrupts() as interrupts:
            try:
                thread.start()
                while True:
                    with interrupts.critical():
                        first += 1
                        _ = sum(range(50))
                        second += 1
                    _ = sum(range(50))
            except Interrupted as caught:
                # of signals that are pending together, Python handles the lowest number first
                assert caught.signum in numbers
            thread.join()
        assert first == second
    assert outside == []


def block(work: list[str]) -> None:
    with Interrupts() as interrupts:
        body(interrupts, work)


def body(interrupts: Interrupts, work: list[str]) -> None:
    with interrupts.critical():
        work.append("begun")
        work.append("ended")
    work.append("after")


METHODS = (*vars(Interrupts).values(), *vars(module._Critical).values())
TRACED = {body.__code__, *(method.__code__ for method in METHODS if hasattr(method, "__code__"))}


def interrupt_block_at(instruction: int) -> tuple[list[str], bool, bool]:
    """What ``block`` did, whether it got as far as the instruction, whether it raised ``Interrupted``.

    Python calls a handler between two instructions, with the frame they belong to; so does this tracer, at the n-th
    instruction of the body and of the methods that enter and leave it. Left out is what no ``try`` can cover and where
    Python does not look for signals: a return, and the loading of the arguments for ``__exit__``.
    """
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code not in TRACED:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and not dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN"):
            count += 1
            if count == instruction + 1:
                signal.getsignal(signal.SIGINT)(signal.SIGINT, frame)
        return trace

    work: list[str] = []
    raised = False
    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        block(work)
    except Interrupted:
        raised = True
    finally:
        sys.settrace(previous)
    return work, count > instruction, raised


def test_a_signal_at_every_instruction_is_raised_once_and_cuts_nothing(outside):
    raised_after = set()
    for instruction in range(2000):
        outside.clear()
        work, sent, raised = interrupt_block_at(instruction)
        assert all(signal.getsignal(number).__name__ == "note" for number in module.SIGNALS), instruction
        if not sent:
            break
        assert work in ([], ["begun", "ended"], ["begun", "ended", "after"])
        # ours or the user's handler, never both, never neither
        assert (raised, outside) in ((True, []), (False, [signal.SIGINT])), instruction
        if raised:
            raised_after.add(len(work))
    assert 100 < instruction < 1999  # the block has some hundred instructions, and all were tried
    assert raised_after == {0, 2, 3}
