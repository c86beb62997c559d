"""Kernels with mistakes run in a child process: what comes of it is heard, what it writes is its own."""

from __future__ import annotations

import ctypes
import os
import signal
import time

import pytest
from sim.apart import FOUND, NOT_FOUND, search
from sim.driver import guarded_array


def fails() -> bool:
    raise AssertionError("not as expected")


@pytest.mark.parametrize("found, said", [(True, FOUND), (False, NOT_FOUND)])
def test_what_is_found(found: bool, said: str) -> None:
    assert search(lambda: found) == said


def test_a_child_that_dies() -> None:
    assert search(lambda: os.kill(os.getpid(), signal.SIGABRT)) == "died of SIGABRT"
    assert search(lambda: bool(ctypes.string_at(8))) == "died of SIGSEGV"


def test_a_child_that_fails() -> None:
    with pytest.raises(RuntimeError, match="AssertionError: not as expected"):
        search(fails)
    with pytest.raises(RuntimeError, match="said nothing, exit status 3"):
        search(lambda: os._exit(3))


def test_a_child_that_does_not_end() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"did not end in 0\.2 s"):
        search(lambda: bool(time.sleep(60)), seconds=0.2)
    assert time.monotonic() - began < 30


def test_what_a_child_writes_is_its_own() -> None:
    array = guarded_array((3,), "<u4")

    def write() -> bool:
        array[...] = 7
        return bool((array == 7).all())

    assert search(write) == FOUND
    assert (array == 0xFFFFFFFF).all()
