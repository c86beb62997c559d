"""Mistakes in the sources of a kernel, each behind a switch of one build."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from ffmini.resources import resource_dir


class Edit(NamedTuple):
    """An expression of a file of cuda/ and what a careless change would make of it."""

    file: str
    old: str  # stands there once
    new: str
    within: str = ""  # or once in this, which stands there once


Change = tuple[str, int, int, str]  # file, start, end, what to put there
Sources = dict[str, str]  # file of cuda/ -> its text

# A barrier, alone or with a vote, or where some of a barrier's threads pass.
BARRIER = re.compile(
    r"__sync(?:threads|warp)\(\)|\bsync_threads<\w+>\(\)|\b(?:meet|pass)_threads<[\w /]+>\([^()]*\)"
    r"|\bsync_threads_or<(?P<threads>[\w +]+)>\((?P<vote>[^()]*)\)"
)


def sources_of(kernel: str) -> Sources:
    """A kernel's file and all that it includes, but for ptx.cuh."""
    found: Sources = {}
    names = [kernel]
    while names:
        if (name := names.pop()) not in found and name != "ptx.cuh":
            found[name] = (resource_dir("cuda") / name).read_text()
            names += re.findall(r'^#include "(.*)"', found[name], re.MULTILINE)
    return dict(sorted(found.items()))


def find_barriers(sources: Sources) -> dict[str, re.Match[str]]:
    """Each barrier of the sources, by its place: `file:line`."""
    return {
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}": match
        for name, text in sources.items()
        for match in BARRIER.finditer(text)
    }


def count_barriers(sources: Sources) -> int:
    """How many there are, in whatever way they are written."""
    code = "\n".join(re.sub("//.*", "", text) for text in sources.values())
    return len(re.findall(r"__sync|\b(?:sync|meet|pass)_threads", code))


def place_after(sources: Sources, name: str, text: str) -> str:
    """The place `file:line` of what stands behind `text` in a file."""
    before = sources[name].partition(text)[0]
    return f"{name}:{(before + text).count(chr(10)) + 1}"


def change(sources: Sources, edit: Edit) -> Change:
    text = sources[edit.file]
    within = edit.within or edit.old
    assert text.count(within) == within.count(edit.old) == 1, edit
    start = text.index(within) + within.index(edit.old)
    return edit.file, start, start + len(edit.old), edit.new


def barrier_change(place: str, barrier: re.Match[str]) -> Change:
    """No barrier; its lane's own vote is the result."""
    return place.partition(":")[0], *barrier.span(), barrier["vote"] or "void()"


def vote_change(place: str, barrier: re.Match[str]) -> Change:
    """A barrier whose threads do not hear of each other's votes."""
    alone = f"(sync_threads<{barrier['threads']}>(), {barrier['vote']})"
    return place.partition(":")[0], *barrier.span(), alone


def mutable_source(directory: Path, sources: Sources, mistakes: dict[str, list[Change]]) -> Path:
    """A copy of cuda/ in which setting sim_mutation to an index into `mistakes` makes that one mistake."""
    shutil.copytree(resource_dir("cuda"), directory)
    for name, source in sources.items():
        switches: dict[tuple[int, int], str] = {}
        for i, changes in enumerate(mistakes.values()):
            for _, start, end, new in (one for one in changes if one[0] == name):
                old = switches.get((start, end), source[start:end])
                switches[start, end] = f"(sim_mutation == {i} ? ({new}) : ({old}))"
        text, rest = "", 0
        for (start, end), switch in sorted(switches.items()):
            assert start >= rest, "two expressions overlap"
            text, rest = text + source[rest:start] + switch, end
        (directory / name).write_text(text + source[rest:])
    config = directory / "config.cuh"
    config.write_text('extern "C" { inline int sim_mutation = -1; }\n' + config.read_text())
    return directory
