"""Runs a kernel with a mistake in a child of this process: it may write wherever its process may."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import select
import signal
import traceback
from collections.abc import Callable
from time import monotonic
from typing import NoReturn

FOUND, NOT_FOUND = "found", "not found"
SECONDS = 120.0  # many times what the slowest search takes on a busy machine


def search(is_found: Callable[[], bool], seconds: float = SECONDS) -> str:
    """What came of `is_found` in a child process: FOUND, NOT_FOUND or by which signal the child died.

    Its exceptions are a RuntimeError here, as is a child that says nothing; a TimeoutError one that does not
    end: a mistake that is found by nothing else has no place in a test.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(is_found, writer)
    os.close(writer)
    try:
        said = _read(reader, seconds)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(reader)
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"died of {signal.Signals(os.WTERMSIG(status)).name}"
    if said not in (FOUND, NOT_FOUND):
        raise RuntimeError(said or f"the child said nothing, exit status {os.WEXITSTATUS(status)}")
    return said


def _answer(is_found: Callable[[], bool], writer: int) -> NoReturn:
    """The child: it leaves without anything that its parent does at exit."""
    faulthandler.disable()  # how it died is said by its parent
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        said = FOUND if is_found() else NOT_FOUND
    except BaseException:
        said = traceback.format_exc()
    with contextlib.suppress(OSError):
        os.write(writer, said.encode()[-select.PIPE_BUF :])
    os._exit(0)


def _read(reader: int, seconds: float) -> str:
    """All that the child says until it leaves."""
    said, end = b"", monotonic() + seconds
    while select.select([reader], [], [], max(0.0, end - monotonic()))[0]:
        piece = os.read(reader, select.PIPE_BUF)
        if not piece:
            return said.decode(errors="replace")
        said += piece
    raise TimeoutError(f"a kernel with a mistake did not end in {seconds:g} s")
