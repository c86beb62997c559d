"""GPUDecoder's side of passes that leave candidates, with a thread in the place of the device."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from comparison import ask, check_candidates, query
from sim_cases import Case, pack_case

from ffmini import gpu
from ffmini.candidates import MAX_QUERIED, Candidates, Draw, Query, summarise
from ffmini.errors import DeviceError, GenerationError, MemoryBudgetError
from ffmini.kernel import (
    AWAITED,
    CHUNK_ROWS,
    DRAW,
    MAIL_APPEND,
    MAIL_LEAVE,
    MAX_ROWS,
    NO_DRAW,
    PANEL_ROWS,
    PASS_ARGS,
    chunk_scratch_bound,
    draw_args,
    product_bytes,
)
from ffmini.launch import ChunkBuild, PassBuild
from ffmini.layout import VectorLayout
from ffmini.numerics import join_vectors, quantize_vectors
from ffmini.options import GenerationOptions
from ffmini.passes import Work
from ffmini.results import HostMemory
from ffmini.sampler import Ranking, Sampler, draw, survivors

VOCAB, LISTED, MAX_SEQ_LEN, SLOTS = 300, 60, 40, 3


def logits_of_pass(token: int, position: int, slot: int = 0) -> np.ndarray:
    """What the model of these tests says of `token` at `position`: float32 [VOCAB], some of them equal."""
    values = np.random.default_rng([token, position, slot]).standard_normal(VOCAB) * 3
    return (values.round(1) + 0.0).astype(np.float32)


def list_candidates(logits: np.ndarray, ids: np.ndarray, inverse_temperature: float, packets: Any) -> int:
    """Fills a row's `packets` as the device does, but for the tags; how many there are."""
    others = np.setdiff1d(np.arange(len(logits)), ids)
    listed = others[np.lexsort((others, -logits[others]))][:LISTED]
    total = np.exp((logits[others] - logits[listed[0]]) * inverse_temperature).sum()
    split = 1 + len(ids)
    end = split + len(listed)
    packets["id"][0], packets["about"][0], packets["value"][0] = len(listed), 0, total
    packets["value"][1:split] = logits[ids]
    packets["id"][split:end], packets["value"][split:end] = listed, logits[listed]
    return end


def draw_place(packets: Any, asked: Any, inverse_temperature: float) -> int | None:
    """The place among a row's candidates of the token that the device draws as it is `asked`, DRAW []."""
    if asked["top_k"] == NO_DRAW:
        return None
    options: Any = SimpleNamespace(**{name: asked[name].item() for name in ("top_k", "top_p", "min_p")})
    end = 1 + min(options.top_k or LISTED, packets["id"][0])
    ranking = Ranking(packets["id"][1:end], packets["value"][1:end], False)
    reached = survivors(ranking, options, np.array(inverse_temperature), packets["value"][0])
    place = None if reached is None else draw(reached, asked["uniform"].item())
    return None if place is None or ranking.ids[place] in asked["ends"] else place


class Device(threading.Thread):
    """Runs passes one after the other, as they were launched."""

    def __init__(self, host: HostMemory) -> None:
        super().__init__(daemon=True)
        self.host, self.ids, self.queue = host, np.zeros((MAX_ROWS, MAX_QUERIED), np.int32), Queue()
        self.log: list[tuple[int, str]] = []  # of each pass: its first position, how it went
        self.passes: list[np.ndarray] = []  # their arguments
        self.trouble: str | None = None  # of the next pass
        self.troubles: dict[int, str] = {}  # of the next pass at a position
        self.mail = (0, 0)  # from pass to pass: the number of the one that gets it, its token
        self.wrong_draws: set[int] = set()  # positions whose next tokens are not drawn right
        self.ended: set[int] = set()
        self.logits: list[np.ndarray] = []  # of the last pass's rows

    def run(self) -> None:
        while (args := self.queue.get()) is not None:
            self.passes.append(args)
            outcome = self.run_pass(args)
            self.log.append((int(args["rows"]["position"][0]), outcome))
            self.ended.add(int(args["pass"]))
            self.queue.task_done()

    def run_pass(self, args: np.ndarray) -> str:
        number, row = int(args["pass"]), int(args["num_rows"]) - 1
        token, append, outcome = int(args["rows"]["token"][row]), int(args["append"]), "plain"
        if token == AWAITED and self.mail[0] == number:
            token, outcome = self.mail[1], "drawn"
        elif token == AWAITED:
            outcome = "awaited"
            end = time.perf_counter() + 1e-9 * float(args["token_limit_ns"])
            while (mail := int(self.host.mailbox[0])) & 0xFFFFFFFF != number:
                if time.perf_counter() > end:
                    self.host.status["no_token"] = number
                    return "no token"
                time.sleep(1e-4)
            token, append = (mail >> 32) % MAIL_APPEND, mail >> 63
            if token == MAIL_LEAVE:
                return "left"
        position = int(args["rows"]["position"][row])
        trouble = self.troubles.pop(position, None)
        if trouble is None:
            trouble, self.trouble = self.trouble, None
        if trouble == "gave up":
            self.host.status["stage"], self.host.status["gave_up"] = 8, number
        if trouble is not None and trouble != "non-finite":
            return trouble
        self.logits = [self.logits_of_row(args, i, token) for i in range(row + 1)]
        if trouble == "non-finite":
            self.logits[row][7] = np.nan
            self.host.status["non_finite"] = number
        if args["candidates"]:
            self.leave_candidates(args, token, append)
        return outcome

    def logits_of_row(self, args: np.ndarray, row: int, awaited: int) -> np.ndarray:
        token, position, slot = (int(x) for x in args["rows"][row])
        return logits_of_pass(awaited if token == AWAITED else token, position, slot)

    def leave_candidates(self, args: np.ndarray, token: int, append: int) -> None:
        """Of the wanted rows, each with its list; `token` is the last row's, `append` a bit for each row."""
        rows = [row for row in range(MAX_ROWS) if int(args["logits_rows"]) >> row & 1]
        for place, row in enumerate(rows):
            known, appends = int(args["num_queried"][row]), append >> row & 1
            if appends:
                own = int(args["rows"]["token"][row])
                self.ids[place, known] = token if own == AWAITED else own
            results = self.host.results[self.host.addresses.index(args["candidates"])]
            said = np.zeros_like(results[row])
            ids = self.ids[place, : known + appends]
            temperature = float(args["inverse_temperature"][row])
            count = list_candidates(self.logits[row], ids, temperature, said)
            drawn = draw_place(said, args["draw"], temperature)
            if drawn is not None and np.isfinite(said["value"][:count]).all():
                drawn += int(args["rows"]["position"][row]) in self.wrong_draws
                said["about"][0] |= 2 * (drawn + 1)
                self.mail = int(args["pass"]) + 1, int(said["id"][1 + drawn])
            said["tag"] = int(args["pass"])
            for end in (1, count // 2, count):  # the header may overtake what it announces
                results[row, :end] = said[:end]
                time.sleep(1e-4)


class HostSide(gpu.GPUDecoder):
    """GPUDecoder whose passes run on a Device."""

    def __init__(self, token_seconds: float = 1.0) -> None:
        self.config: Any = SimpleNamespace(vocab_size=VOCAB, num_layers=2)
        self.max_seq_len, self.num_slots, self.device = MAX_SEQ_LEN, SLOTS, "cuda:0"
        self.loaded: list[str] = []  # in what order the builds were
        self._defines = {rows: {"ROWS": str(rows)} for rows in (1, 4)}
        self._builds, self._chunk_defines, self._chunk = {}, None, None
        self.max_rows = 4
        self._pass = self._checked = self._listed = 0
        self._gave_up: Any = np.zeros(1, np.uint32)
        self._waiting = self._delivered = None
        self._mail: Any = np.zeros(2, np.uint64)
        self._closed = False
        self._begun, self._abandoned = None, False
        self._lists = [gpu._List() for _ in range(MAX_ROWS)]
        self._host = HostMemory(np.zeros(HostMemory.nbytes(4), np.uint8), 4)
        self._set_args(np.zeros((), PASS_ARGS))
        self._args["spin_limit_ns"], self._args["token_limit_ns"] = 10**9, int(token_seconds * 1e9)
        self.fake = Device(self._host)
        self._device_ids: Any = IdsOnDevice(self.fake)
        self._ends = [SimpleNamespace(ptr=i, record=lambda: None) for i in range(2)]
        stream = SimpleNamespace(synchronize=self.fake.queue.join)
        runtime = SimpleNamespace(eventQuery=self.query, CUDARuntimeError=RuntimeError)
        driver = SimpleNamespace(ctxGetCurrent=lambda: 0, CUDADriverError=RuntimeError)
        self._cupy: Any = SimpleNamespace(
            cuda=SimpleNamespace(get_current_stream=lambda: stream, runtime=runtime, driver=driver)
        )
        self._ordinal, self._context = 0, 0
        self.launched: dict[int, int] = {}  # of each event, the pass that it was recorded behind
        self.fake.start()

    def _load(self, kind: type, defines: dict[str, str]) -> Any:
        if kind is ChunkBuild:
            self.loaded.append("chunk")
            return FakeChunk()
        self.loaded.append(f"{defines['ROWS']} rows")
        packets = SimpleNamespace(fill=lambda value: None, data=SimpleNamespace(ptr=0))
        return SimpleNamespace(exchange=packets)

    def query(self, event: int) -> int:
        return 0 if self.launched[event] in self.fake.ended else gpu.NOT_READY

    def _submit(self, build: Any) -> None:
        number = int(self._args["pass"])
        self.launched[number % 2] = number
        self.fake.queue.put(self._args.copy())

    def _logits_of(self, number: int) -> Any:
        return SimpleNamespace(data=SimpleNamespace(ptr=1000 + number % 2))

    def finish(self, wanted: int = 0) -> np.ndarray:
        self._check_status()
        return self.fake.logits[-1][None].copy() if wanted else np.zeros((0, VOCAB), np.float32)

    def outcomes(self) -> list[tuple[int, str]]:
        """How the passes went so far."""
        self.settle()
        self.fake.queue.join()
        return self.fake.log


class IdsOnDevice:
    """The array of queried ids, which can be set after the passes that were launched before."""

    def __init__(self, device: Device) -> None:
        self.device, self.uploads = device, 0

    def __getitem__(self, key: tuple[int, slice]) -> SimpleNamespace:
        return SimpleNamespace(set=lambda ids: self.write(key, ids))

    def write(self, key: tuple[int, slice], ids: np.ndarray) -> None:
        self.device.queue.join()
        self.device.ids[key] = ids
        self.uploads += 1


def check(found: Candidates, token: int, position: int, asked: Query, slot: int = 0) -> None:
    """`found` is what the pass of `token` at `position` says; its logits are not fetched from a device."""
    logits = logits_of_pass(token, position, slot)
    found = found._replace(fetch=logits.copy)
    check_candidates(found, logits, asked.token_ids, float(1 / asked.inverse_temperature))


def test_tokens_one_after_the_other() -> None:
    """Each token goes to the pass that waits for it, and joins the queried ids; none waits at the end."""
    decoder, ids = HostSide(), [3, 5]
    check(ask(decoder, np.arange(1, 7), 0, query(ids), ahead=True), 6, 5, query(ids))
    for position in range(6, MAX_SEQ_LEN):
        token = 7 * position
        if token not in ids and position % 3:
            ids.append(token)
        found = ask(decoder, np.array([token]), position, query(ids), ahead=True)
        check(found, token, position, query(ids))
    assert decoder._waiting is None
    plain = [(0, "plain"), (4, "plain")]
    assert decoder.outcomes() == plain + [(position, "awaited") for position in range(6, MAX_SEQ_LEN)]
    assert decoder._device_ids.uploads == 1


class FakeChunk:
    """Notes the chunks that it is to run: slot, first position, tokens."""

    def __init__(self) -> None:
        self.ran: list[tuple[int, int, list[int]]] = []
        self.args: dict[str, Any] = {}

    def run(self, cupy: Any, number: int, slot: int, start: int, tokens: np.ndarray) -> None:
        self.ran.append((slot, start, tokens.tolist()))

    def residual(self, row: int) -> int:
        return 1000 + row


def chunked() -> tuple[HostSide, FakeChunk]:
    decoder = HostSide()
    decoder._chunk_defines = {}
    return decoder, decoder._chunk_build()  # type: ignore[return-value]


def test_builds_are_loaded_when_they_are_needed() -> None:
    """Each once: tokens one by one, a short prompt, tokens of several slots, a long prompt."""
    decoder, asked = HostSide(), query([3])
    decoder._chunk_defines = {}
    expected: list[str] = []
    works = [Work(slot, np.array([slot]), 5, (asked,)) for slot in range(SLOTS)]
    for call, build in (
        (lambda: ask(decoder, np.array([4]), 0, asked, ahead=True), "1 rows"),
        (lambda: ask(decoder, np.arange(3), 0, asked, ahead=True), "4 rows"),
        (lambda: run(decoder, works), None),
        (lambda: ask(decoder, np.arange(20), 0, asked, ahead=True), "chunk"),
        (lambda: decoder.forward(np.arange(20), 3), None),
    ):
        expected += [] if build is None else [build]
        for _ in range(2):
            call()
            assert decoder.loaded == expected
    assert decoder._chunk.args["num_slots"] == decoder._args["num_slots"]


def test_a_build_that_cannot_be_loaded() -> None:
    """The call ends with what it says; others go on, and so does the same one when there is room."""
    decoder, load = HostSide(), HostSide._load
    ask(decoder, np.array([4]), 0, query([1]), ahead=True)

    def fail(kind: type, defines: dict[str, str]) -> None:
        raise MemoryBudgetError("5 MiB of scratch needed, 2 MiB free")

    decoder._load = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(MemoryBudgetError, match="5 MiB of scratch needed"):
        ask(decoder, np.arange(3), 1, query([1]))
    check(ask(decoder, np.array([6]), 1, query([1])), 6, 1, query([1]))
    decoder._load = functools.partial(load, decoder)  # type: ignore[method-assign]
    check(ask(decoder, np.arange(3), 1, query([1])), 2, 3, query([1]))


class Loading:
    """What the constructor needs of CuPy, with so much memory free; which builds it makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.made: list[str] = []
        cupy = MagicMock()
        properties = {"multiProcessorCount": 132, "sharedMemPerBlockOptin": 232_448, "major": 9, "minor": 0}
        cupy.cuda.runtime.getDeviceProperties.return_value = properties
        monkeypatch.setattr(gpu, "why_unusable", lambda ordinal: None)
        monkeypatch.setattr(gpu, "import_cupy", lambda: cupy)
        monkeypatch.setattr(gpu, "memory_bandwidth", lambda ordinal: 4e12)
        monkeypatch.setattr(gpu, "free_memory", lambda ordinal: free)
        monkeypatch.setattr(gpu, "PassBuild", self.make)
        monkeypatch.setattr(gpu, "ChunkBuild", lambda *_: pytest.fail("the chunk is compiled"))
        monkeypatch.setattr(gpu.GPUDecoder, "_upload", lambda *_: None)

    def make(self, cupy: Any, defines: dict[str, str], *launch: Any) -> SimpleNamespace:
        self.made.append(defines["ROWS"])
        return SimpleNamespace(rows=int(defines["ROWS"]), scratch_bytes=1 << 20)


def test_loading_makes_one_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And checks that there is memory for all that may come; down_proj's input has two parts."""
    packed = pack_case(tmp_path / "model", Case("llama2", "int4", changes={"intermediate_size": 2304}))
    loading = Loading(monkeypatch, 2**30)
    assert gpu.GPUDecoder(packed, 64).max_rows == 8
    assert loading.made == ["1"]
    needed = packed.nbytes + gpu.kv_cache_bytes(packed.config, 64)
    needed += (
        (9 << 20)
        + 2 * 4 * 8 * packed.config.vocab_size
        + chunk_scratch_bound(packed.config, packed.layouts, 64)
    )
    products = product_bytes(packed.layouts, 8)
    assert products == 96 * 8 * 2 * packed.layouts["down_proj"].tiles
    needed += products
    Loading(monkeypatch, needed)
    gpu.GPUDecoder(packed, 64)
    Loading(monkeypatch, needed - 1)
    with pytest.raises(MemoryBudgetError, match=r"scratch \d+ MiB needed, \d+ MiB free"):
        gpu.GPUDecoder(packed, 64)


def test_no_memory_for_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """That others have taken since the model was loaded: one line says how much there is."""
    decoder = decoder_on(Cuda(1, 101))
    cuda: Any = decoder._cupy.cuda
    cuda.memory = SimpleNamespace(OutOfMemoryError=MemoryError)
    cuda.using_allocator = lambda _: contextlib.nullcontext()
    decoder.device, decoder._pool, decoder._launch_sizes = "cuda:1", MagicMock(), ()
    build = MagicMock(scratch_bytes=5 << 20)
    build.allocate.side_effect = MemoryError
    monkeypatch.setattr(gpu, "free_memory", lambda ordinal: 3 << 20)
    with pytest.raises(MemoryBudgetError) as raised:
        decoder._load(lambda *_: build, {})  # type: ignore[arg-type]
    assert str(raised.value) == "cuda:1: 5 MiB of scratch needed, 3 MiB free"


def test_a_long_prompt_goes_in_a_chunk() -> None:
    """With its queried rows, which a pass only finishes; the next token is a pass of its own again."""
    decoder, chunk = chunked()
    tokens = np.arange(1, 21)
    asked = query([3])
    check(ask(decoder, tokens, 0, asked, ahead=True), 20, 19, asked)
    check(ask(decoder, np.array([33]), 20, asked, ahead=True), 33, 20, asked)
    assert chunk.ran == [(0, 0, tokens.tolist())]
    assert decoder.outcomes() == [(19, "plain"), (20, "awaited"), (21, "left")]
    assert [int(args["residual"]) for args in decoder.fake.passes] == [1019, 0, 0]
    assert [int(args["num_rows"]) for args in decoder.fake.passes] == [1, 1, 1]


def test_short_prompts_go_in_passes() -> None:
    decoder, chunk = chunked()
    check(ask(decoder, np.arange(8), 0, query([]), ahead=False), 7, 7, query([]))
    assert chunk.ran == [] and len(decoder.outcomes()) == 2


def test_long_prompts_of_several_slots() -> None:
    """Their rows that are not queried go in chunks, the others together in a pass."""
    decoder, chunk = chunked()
    works = [Work(0, np.arange(12), 5, (query([]),)), Work(2, np.arange(3), 0, (query([]),))]
    decoder.begin(works)
    first, second = decoder.candidates()
    check(first[0], 11, 16, query([]), 0)
    check(second[0], 2, 2, query([]), 2)
    assert chunk.ran == [(0, 5, list(range(9)))] or chunk.ran == [(0, 5, list(range(11)))]
    assert all(int(args["residual"]) == 0 for args in decoder.fake.passes)


@pytest.mark.parametrize("count", [9, 128, 129, 512, 513, 700, 1024, 1025, 2049, 5000])
def test_chunks_are_even(count: int) -> None:
    """All rows in their order, at most CHUNK_ROWS together, whole panels but the last; none has few rows."""
    decoder, _ = chunked()
    tokens = np.arange(count)
    parts = list(decoder._chunks(Work(1, tokens, 7, ())))
    assert np.array_equal(np.concatenate([part.tokens for part in parts]), tokens)
    sizes = [len(part.tokens) for part in parts]
    assert [part.start for part in parts] == [7 + sum(sizes[:i]) for i in range(len(sizes))]
    assert len(parts) == -(-count // CHUNK_ROWS) and max(sizes) <= CHUNK_ROWS
    assert all(size % PANEL_ROWS == 0 for size in sizes[:-1])
    assert len(parts) == 1 or min(sizes) > PANEL_ROWS


@pytest.mark.parametrize("ahead", [True, False])
def test_other_calls_than_the_awaited_one(ahead: bool) -> None:
    """Another position, temperature, number of tokens or set of ids: the waiting pass leaves."""
    decoder = HostSide()
    calls = [(5, query([])), (6, query([], 0.5)), (5, query([], 0.5)), (6, query([9, 8], 0.5))]
    calls += [(7, query([8], 0.5)), (8, query([8, 8 + 50], 0.5))]
    for position, asked in calls:
        check(
            ask(decoder, np.array([position + 50]), position, asked, ahead),
            position + 50,
            position,
            asked,
        )
    check(ask(decoder, np.array([1, 2]), 9, query([]), ahead), 2, 10, query([]))
    outcomes = [outcome for _, outcome in decoder.outcomes()]
    assert outcomes.count("awaited") == ahead and outcomes.count("left") == 6 * ahead


def test_a_token_delivered_before_it_is_asked_for() -> None:
    """It goes to the pass at once, a new id with it; the next begin() takes that pass."""
    decoder, ids = HostSide(), [3]
    ask(decoder, np.array([1]), 0, query(ids), ahead=True)
    for position, token in enumerate((7, 7, 9), 1):
        ids = ids if token in ids else [*ids, token]
        asked = query(ids)
        decoder.deliver(token, asked)
        assert decoder._waiting is None
        wait_for(lambda position=position: (position, "awaited") in decoder.fake.log)
        check(ask(decoder, np.array([token]), position, asked, ahead=True), token, position, asked)
    assert decoder.outcomes() == [(0, "plain"), (1, "awaited"), (2, "awaited"), (3, "awaited"), (4, "left")]


DELIVERED = query([3, 7])
IN_VAIN = {
    "another token": (np.array([8]), 1, DELIVERED),
    "another position": (np.array([7]), 2, DELIVERED),
    "another query": (np.array([7]), 1, query([3])),
    "two tokens": (np.array([7, 8]), 1, DELIVERED),
}


@pytest.mark.parametrize("name", IN_VAIN)
def test_a_token_delivered_in_vain(name: str) -> None:
    """Something else is asked for, and said."""
    decoder = HostSide()
    ask(decoder, np.array([1]), 0, query([3]), ahead=True)
    decoder.deliver(7, DELIVERED)
    tokens, start, asked = IN_VAIN[name]
    last = start + len(tokens) - 1
    check(ask(decoder, tokens, start, asked, ahead=True), int(tokens[-1]), last, asked)
    check(ask(decoder, np.array([5]), last + 1, asked), 5, last + 1, asked)
    assert [outcome for _, outcome in decoder.outcomes()] == ["plain", "awaited", "plain", "awaited"]


def test_a_token_delivered_in_vain_and_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass has left and has not added the id to those that it was asked for: the next one gets all."""
    decoder, can_answer = HostSide(token_seconds=0.3), gpu.GPUDecoder._can_answer

    def answer_late(*args: Any) -> bool:
        result = can_answer(*args)
        decoder.fake.queue.join()
        return result

    ask(decoder, np.array([1]), 0, query([3]), ahead=True)
    with monkeypatch.context() as patch:
        patch.setattr(gpu.GPUDecoder, "_can_answer", answer_late)
        decoder.deliver(7, DELIVERED)
    assert decoder._delivered is not None
    check(ask(decoder, np.array([8]), 1, DELIVERED), 8, 1, DELIVERED)
    assert decoder.outcomes() == [(0, "plain"), (1, "no token"), (1, "plain")]


def test_a_token_delivered_before_its_time() -> None:
    """Nobody has seen what the pass before says: it gets none, as that pass's own mail may be unread."""
    decoder, asked = HostSide(), query([3])
    decoder.begin([Work(0, np.array([1]), 0, (asked,))], ahead=True)
    decoder.deliver(7, asked)
    assert decoder._delivered is None
    [[found]] = decoder.candidates()
    check(found, 1, 0, asked)
    check(ask(decoder, np.array([8]), 1, asked), 8, 1, asked)


@pytest.mark.parametrize("after", ["forward", "settle"])
def test_a_token_delivered_at_the_end(after: str) -> None:
    """Nobody asks for what its pass says, whose logits are not those of the pass before."""
    decoder = HostSide()
    first = ask(decoder, np.array([1]), 0, query([3]), ahead=True)
    decoder.deliver(7, query([3]))
    with pytest.raises(ValueError, match="an earlier one asked for"):
        first.fetch()
    if after == "forward":
        assert np.array_equal(decoder.forward(np.array([9]), 1)[0], logits_of_pass(9, 1))
    else:
        decoder.settle()
        assert decoder.fake.log == [(0, "plain"), (1, "awaited")]
    check(ask(decoder, np.array([5]), 3, query([1])), 5, 3, query([1]))


def test_a_token_that_no_pass_waits_for() -> None:
    """None does, or one for another temperature; what cannot be a token is left to begin()."""
    decoder = HostSide()
    decoder.deliver(7, query([3]))
    ask(decoder, np.array([1]), 0, query([3]), ahead=True)
    for token, asked in ((7, query([3], 0.5)), (VOCAB, query([3])), (-1, query([3]))):
        decoder.deliver(token, asked)
        assert decoder._waiting is not None
    with pytest.raises(ValueError, match=r"queried ids must be in \[0, 300\)"):
        decoder.deliver(7, query([VOCAB]))
    check(ask(decoder, np.array([5]), 1, query([3])), 5, 1, query([3]))
    assert decoder.outcomes() == [(0, "plain"), (1, "left"), (1, "plain")]


def wait_for(happens: Callable[[], bool]) -> None:
    end = time.perf_counter() + 5
    while not happens():
        assert time.perf_counter() < end
        time.sleep(1e-3)


@pytest.mark.parametrize("tokens", [[[9]], [[9, 9]], [VOCAB], [-1], [9.0], [True]], ids=str)
def test_what_cannot_be_the_awaited_token(tokens: list[Any]) -> None:
    """It is refused, and the pass waits on."""
    decoder, asked = HostSide(), query([3])
    ask(decoder, np.array([1]), 0, asked, ahead=True)
    with pytest.raises(ValueError, match="token ids"):
        decoder.begin([Work(0, np.array(tokens), 1, (asked,))], ahead=True)
    check(ask(decoder, np.array([7]), 1, asked), 7, 1, asked)
    assert decoder.outcomes() == [(0, "plain"), (1, "awaited")]


@contextlib.contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, name: str, after: bool) -> Iterator[None]:
    """What runs here ends in an interrupt before or after this method of a decoder."""
    inner = getattr(gpu.GPUDecoder, name)

    def interrupt(*args: Any) -> None:
        if after:
            inner(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gpu.GPUDecoder, name, interrupt)
        yield


@pytest.mark.parametrize("name", ["deliver", "_can_answer", "_ask", "_start", "_await_results"])
def test_an_interrupt(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Wherever it comes on a token's way to its pass, before or after: what is asked next is right.

    The token would join the queried ids.
    """
    for after in (False, True):
        decoder, asked = HostSide(), query([3, 7])
        ask(decoder, np.array([1]), 0, query([3]), ahead=True)
        with interrupted(monkeypatch, name, after):
            ask(decoder, np.array([7]), 1, asked, ahead=True)
        for token in (8, 9):
            check(ask(decoder, np.array([token]), token - 6, asked, ahead=True), token, token - 6, asked)
        assert decoder._waiting is not None
        decoder.settle()


def test_a_late_token() -> None:
    """The waiting pass has left when the token comes, or just before: the pass is launched again."""
    decoder = HostSide(token_seconds=0.1)
    for position in range(8):
        found = ask(decoder, np.array([position]), position, query([1]), ahead=True)
        check(found, position, position, query([1]))
        time.sleep((0, 0.099, 0.101, 0.2)[position % 4])
    assert {outcome for _, outcome in decoder.outcomes()} >= {"plain", "awaited", "no token"}


def test_a_pass_that_lost_its_token_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delivered when the pass has already left: no error, and its ids are as asked."""
    decoder = HostSide(token_seconds=0.0)
    ask(decoder, np.array([4]), 0, query([1]), ahead=True)
    decoder.fake.queue.join()
    no_token, decoder._host.status["no_token"] = decoder._host.status["no_token"].copy(), 0

    def show(event: int) -> int:
        decoder._host.status["no_token"] = no_token
        return gpu.NOT_READY

    monkeypatch.setattr(decoder._cupy.cuda.runtime, "eventQuery", show)
    asked = query([1, 6])
    check(ask(decoder, np.array([6]), 1, asked, ahead=True), 6, 1, asked)


def test_plain_passes_between() -> None:
    """forward() and settle() make a waiting pass leave; an answer's logits are not those of a later pass."""
    decoder = HostSide()
    first = ask(decoder, np.array([4]), 0, query([1]), ahead=True)
    assert np.array_equal(decoder.forward(np.array([9]), 1)[0], logits_of_pass(9, 1))
    with pytest.raises(ValueError, match="an earlier one asked for"):
        first.fetch()
    ask(decoder, np.array([4]), 2, query([1]), ahead=True)
    decoder.settle()
    decoder.settle()
    check(ask(decoder, np.array([5]), 3, query([1])), 5, 3, query([1]))
    assert [outcome for _, outcome in decoder.outcomes()] == [
        "plain",
        "left",
        "plain",
        "plain",
        "left",
        "plain",
    ]


@pytest.mark.parametrize(
    ("trouble", "error", "match"),
    [
        ("gave up", GenerationError, "gave up after 1 s: layer 1, norm_qkv"),
        ("ended", DeviceError, "left no results"),
    ],
)
@pytest.mark.parametrize("awaited", [True, False])
def test_trouble(trouble: str, error: type[Exception], match: str, awaited: bool) -> None:
    """Nothing hangs; the decoder goes on afterwards, as do passes that were queued by launch()."""
    decoder = HostSide()
    ask(decoder, np.array([4]), 0, query([1]), ahead=awaited)
    decoder.fake.trouble = trouble
    with pytest.raises(error, match=match):
        ask(decoder, np.array([6]), 1, query([1, 6]), ahead=True)
    decoder.launch(1, np.array([6]), 1, 0)
    check(ask(decoder, np.array([6]), 1, query([1, 6]), ahead=True), 6, 1, query([1, 6]))


def run(decoder: gpu.GPUDecoder, works: list[Work], ahead: bool = False) -> list[list[Candidates]]:
    """What `works` say, checked."""
    decoder.begin(works, ahead)
    said = decoder.candidates()
    assert [len(of_work) for of_work in said] == [len(work.queries) for work in works]
    for work, of_work in zip(works, said, strict=True):
        first = len(work.tokens) - len(of_work)
        for i, (found, asked) in enumerate(zip(of_work, work.queries, strict=True), first):
            check(found, int(work.tokens[i]), work.start + i, asked, work.slot)
    return said


def test_works_of_several_slots() -> None:
    """A token of each, drafts of some, prompts beside them; every row with its own ids."""
    decoder = HostSide()
    ids = [[1, 2], [], [7, 3, 5]]
    for position in range(5, 20, 3):
        for slot in range(SLOTS):
            ids[slot] = [*ids[slot], 100 + 3 * position + slot]
        works = [Work(slot, np.array([ids[slot][-1]]), position, (query(ids[slot]),)) for slot in (2, 0, 1)]
        run(decoder, works)
    assert decoder._device_ids.uploads == 2  # then each pass appends its tokens
    drafts = [Work(1, np.arange(3), 21, (query([1]), query([2, 4], 0.5), query([])))]
    run(decoder, [*drafts, Work(0, np.array([9]), 22, (query([8]),))])
    asked = query([1, 32]), query([2, 4, 31], 0.5), query([32])  # the device has all but the last of each
    run(decoder, [Work(1, np.arange(30, 33), 22, asked)])
    assert decoder._device_ids.uploads == 7
    run(decoder, [Work(2, np.arange(6), 21, ()), Work(0, np.array([9]), 23, (query([8]),))])
    run(decoder, [Work(0, np.arange(3), 24, (query([8]),)), Work(1, np.array([4]), 24, (query([6]),))])
    assert {outcome for _, outcome in decoder.outcomes()} == {"plain"}


@pytest.mark.parametrize(
    ("lengths", "passes"),  # tokens, queries of each slot's work; rows of each slot in each pass
    [
        ([(5, 1)], [[(0, 4)], [(0, 1)]]),
        ([(6, 1)], [[(0, 4)], [(0, 2)]]),
        ([(4, 1)], [[(0, 4)]]),
        ([(2, 1), (1, 1), (1, 1)], [[(0, 2), (1, 1), (2, 1)]]),
        ([(7, 1), (1, 1)], [[(0, 4)], [(0, 3), (1, 1)]]),
        ([(7, 1), (2, 2)], [[(0, 4)], [(0, 2)], [(0, 1), (1, 2)]]),
        ([(7, 1), (6, 1), (1, 1)], [[(0, 4)], [(0, 2), (1, 2)], [(1, 2)], [(0, 1), (1, 2), (2, 1)]]),
        ([(3, 0), (6, 2), (1, 0)], [[(0, 3), (1, 1)], [(1, 3)], [(1, 2), (2, 1)]]),
        ([(3, 0), (6, 0)], [[(0, 3), (1, 1)], [(1, 4)], [(1, 1)]]),
    ],
)
def test_rows_in_passes(lengths: list[tuple[int, int]], passes: list[list[tuple[int, int]]]) -> None:
    decoder = HostSide()
    works = [
        Work(slot, np.arange(count) + 10 * slot, 3 * slot, (query([slot]),) * queries)
        for slot, (count, queries) in enumerate(lengths)
    ]
    run(decoder, works)
    decoder.outcomes()
    run_rows = [args["rows"][: int(args["num_rows"])] for args in decoder.fake.passes]
    assert [list(Counter(rows["slot"].tolist()).items()) for rows in run_rows] == passes
    every = np.concatenate(run_rows)
    for work in works:
        rows = every[every["slot"] == work.slot]
        assert np.array_equal(rows["token"], work.tokens)
        assert np.array_equal(rows["position"], work.start + np.arange(len(work.tokens)))


def test_a_row_that_is_not_finite() -> None:
    """It says so; the others count, and so do later passes."""
    decoder = HostSide()
    for trouble in ("non-finite", None):
        decoder.fake.trouble = trouble
        works = [Work(slot, np.array([3 + slot]), 6, (query([slot, 7]),)) for slot in range(SLOTS)]
        decoder.begin(works)
        *others, (last,) = decoder.candidates()
        assert last.finite == (trouble is None)
        for slot, (found,) in enumerate(others):
            check(found, 3 + slot, 6, query([slot, 7]), slot)
    assert np.array_equal(decoder.forward(np.array([9]), 1)[0], logits_of_pass(9, 1))


def test_a_pass_that_waits_for_another_slot() -> None:
    """It leaves, as it does when several works come."""
    decoder = HostSide()
    one = [Work(1, np.array([4]), 5, (query([2]),))]
    run(decoder, one, ahead=True)
    run(decoder, [Work(1, np.array([6]), 6, (query([2]),))], ahead=True)
    run(decoder, [Work(0, np.array([6]), 7, (query([2]),))], ahead=True)
    run(decoder, [Work(0, np.array([6]), 8, (query([2]),)), Work(1, np.array([6]), 7, (query([2]),))])
    outcomes = [outcome for _, outcome in decoder.outcomes()]
    assert outcomes == ["plain", "awaited", "left", "plain", "left", "plain"]


def test_an_append_that_nobody_asked_about() -> None:
    """settle() before candidates(): the token may have joined the ids or not, so they are sent again."""
    decoder = HostSide(token_seconds=0.0)
    run(decoder, [Work(0, np.array([4]), 0, (query([1]),))], ahead=True)
    decoder.fake.queue.join()  # the waiting pass has left
    decoder._host.status["no_token"] = 0  # and the host does not see it yet
    decoder.begin([Work(0, np.array([6]), 1, (query([1, 6]),))])
    decoder.settle()
    decoder._host.status["no_token"] = decoder._pass
    run(decoder, [Work(0, np.array([7]), 2, (query([1, 6]),))])


def test_bad_works() -> None:
    decoder = HostSide()
    one = (query([]),)
    token = np.array([1])
    for works, ahead, match in [
        ([Work(3, token, 0, one)], False, "slot 3 asked for, 0 to 2 exist"),
        ([Work(0, token, 0, one), Work(0, token, 1, one)], False, r"distinct slots expected, found \[0, 0\]"),
        ([Work(0, token, 0, one * 2)], False, "2 rows queried, there are 1"),
        ([Work(0, np.arange(5), 0, one * 5)], False, "at most 4 rows can be queried together, found 5"),
        ([Work(0, token, 0, one), Work(1, token, 0, ())], True, "found 2 works of 1 queries"),
        ([Work(0, token, 0, ())], True, "found 1 works of 0 queries"),
        ([Work(1, token, MAX_SEQ_LEN, one)], False, "positions 40 to 40 asked for"),
        ([Work(1, np.array([VOCAB]), 0, one)], False, "token ids must be in"),
    ]:
        with pytest.raises(ValueError, match=match):
            decoder.begin(works, ahead)
    with pytest.raises(ValueError, match="slot 3 asked for"):
        decoder.forward(token, 0, slot=3)
    with pytest.raises(ValueError, match="none was started"):
        decoder.candidates()
    assert decoder.outcomes() == []


SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top_k": {"temperature": 0.9, "top_k": 20},
    "top_k and top_p": {"temperature": 1.5, "top_k": 50, "top_p": 0.8},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "min_p": {"temperature": 1.2, "min_p": 0.1, "top_p": 0.95},
}


class Drawing:
    """A text of `decoder`, token by token as generate() makes it, and what it must be."""

    def __init__(self, decoder: HostSide, **options: Any) -> None:
        self.decoder, self.position, self.token = decoder, 0, 4
        self.sampler, self.exact = (
            Sampler(GenerationOptions(seed=3, **options), np.zeros(1, np.int64), (), VOCAB) for _ in range(2)
        )

    def begin(self) -> None:
        work = Work(0, np.array([self.token]), self.position, (self.sampler.query(),))
        self.decoder.begin([work], ahead=True, draws=self.sampler.draws())

    def take(self) -> None:
        """The next token; what it is drawn from and itself are checked."""
        [[found]] = self.decoder.candidates()
        check(found, self.token, self.position, self.sampler.query())
        logits = logits_of_pass(self.token, self.position)
        token = self.sampler.sample(found._replace(fetch=logits.copy))[0]
        assert token == self.exact.sample(summarise(logits, self.exact.query()))[0]
        self.token, self.position = token, self.position + 1
        self.decoder.deliver(token, self.sampler.query())

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.begin()
            self.take()


@pytest.mark.parametrize("name", SAMPLINGS)
def test_tokens_that_the_device_draws(name: str) -> None:
    """No pass waits for the host, which sends no mail; the text is as ever."""
    decoder = HostSide()
    Drawing(decoder, **SAMPLINGS[name]).step(20)
    assert decoder.outcomes() == [(0, "plain"), *((position, "drawn") for position in range(1, 21))]
    assert int(decoder._host.mailbox[0]) == 0


def test_a_host_that_is_late() -> None:
    """The pass behind is done before the results of the one before it are read: both are there."""
    decoder = HostSide()
    text = Drawing(decoder, **SAMPLINGS["top_p"])
    for _ in range(5):
        text.begin()
        decoder.fake.queue.join()
        text.take()
    passes = decoder.fake.passes
    assert all(int(args["logits"]) == 1000 + int(args["pass"]) % 2 for args in passes)
    assert decoder.fake.log == [(0, "plain"), *((position, "drawn") for position in range(1, 6))]


def test_a_token_that_is_drawn_wrong() -> None:
    """Its pass is in vain, another one gets the right token, and those behind are drawn again."""
    decoder = HostSide()
    decoder.fake.wrong_draws = {2, 4}
    Drawing(decoder, **SAMPLINGS["top_k"]).step(7)
    positions = [0, 1, 2, 3, 3, 4, 5, 5, 6, 7]
    outcomes = dict.fromkeys(positions, "drawn") | {0: "plain"}
    expected = [(position, outcomes[position]) for position in positions]
    expected[4] = (3, "plain")
    expected[7] = (5, "plain")
    assert decoder.outcomes() == expected


def test_a_token_that_cannot_be_drawn() -> None:
    """More tokens count than are listed: the host sends it."""
    decoder = HostSide()
    Drawing(decoder, temperature=1.0, top_k=LISTED + 1).step(5)
    awaited = [(position, "awaited") for position in range(1, 6)]
    assert decoder.outcomes() == [(0, "plain"), *awaited]


def test_draws_are_followed_by_something_else() -> None:
    """A query for ids, another slot: the pass that has got a token is in vain."""
    decoder = HostSide()
    text = Drawing(decoder, **SAMPLINGS["top_k"])
    text.step(3)
    check(ask(decoder, np.array([text.token]), 3, query([5])), text.token, 3, query([5]))
    text.position = 4
    text.step(2)
    text.begin()
    [[found]] = decoder.candidates()
    drawn = text.sampler.sample(found)[0]
    asked = query([drawn], 0.9)
    check(ask(decoder, np.array([drawn]), 7, asked, ahead=True), drawn, 7, asked)
    text.position = 8
    text.step(1)
    text.begin()
    decoder.candidates()
    run(decoder, [Work(1, np.array([6]), 7, (query([2]),))], ahead=True)
    run(decoder, [Work(1, np.array([7]), 8, (query([2, 7]),))])


@pytest.mark.parametrize("trouble", ["non-finite", "gave up"])
def test_trouble_of_a_pass_in_vain(trouble: str) -> None:
    """Is nobody's: the text has ended, and others go on."""
    decoder = HostSide()
    text = Drawing(decoder, **SAMPLINGS["top_k"])
    text.step(3)
    decoder.fake.troubles[4] = trouble
    text.begin()
    decoder.candidates()
    assert np.array_equal(decoder.forward(np.array([9]), 1)[0], logits_of_pass(9, 1))
    assert decoder.fake.troubles == {}
    check(ask(decoder, np.array([7]), 1, query([3])), 7, 1, query([3]))


def test_no_pass_follows_the_end() -> None:
    """The device does not give on a token that ends the text: the pass behind waits, and leaves."""
    plain = Drawing(HostSide(), **SAMPLINGS["top_p"])
    plain.step(4)
    decoder = HostSide()
    text = Drawing(decoder, **SAMPLINGS["top_p"], stop_token_ids=(1, plain.token, 2))
    text.step(3)
    text.begin()
    [[found]] = decoder.candidates()
    assert text.sampler.sample(found)[0] == plain.token
    outcomes = [(position, "drawn") for position in range(1, 4)]
    assert decoder.outcomes() == [(0, "plain"), *outcomes, (4, "left")]


@pytest.mark.parametrize("length", [3, 20])
def test_draws_behind_a_prompt(length: int) -> None:
    """In a pass of several rows, or a chunk: its last row's token is drawn too."""
    decoder, _ = chunked()
    text, prompt = Drawing(decoder, **SAMPLINGS["top_k"]), np.arange(1, length + 1)
    text.token, text.position = length, length - 1
    decoder.begin([Work(0, prompt, 0, (text.sampler.query(),))], ahead=True, draws=text.sampler.draws())
    text.take()
    text.step(3)
    outcomes = [outcome for _, outcome in decoder.outcomes()]
    assert outcomes == ["plain"] + ["drawn"] * 4


@pytest.mark.parametrize("name", ["deliver", "_can_answer", "_start", "_list", "_await_results", "_assemble"])
def test_an_interrupt_among_draws(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Wherever it comes, the next text is right from its first token on."""
    for after in (False, True):
        decoder = HostSide()
        text = Drawing(decoder, **SAMPLINGS["top_k"])
        text.step(2)
        with interrupted(monkeypatch, name, after):
            text.step()
        Drawing(decoder, **SAMPLINGS["top_p"]).step(4)
        decoder.settle()


def test_draws_when_the_numbers_begin_again() -> None:
    decoder = HostSide()
    decoder._pass = decoder._checked = decoder._last_number - 6
    Drawing(decoder, **SAMPLINGS["top_k"]).step(12)
    assert decoder._pass < 12 and decoder.outcomes().count((7, "drawn")) == 1


def test_the_ends_of_a_text_on_the_device() -> None:
    """As many as it has room for; what is left of that is no token."""
    for ends, expected in (((), [-1] * 4), ((7,), [7, -1, -1, -1]), ((1, 2, 3, 4, 5), [1, 2, 3, 4])):
        args = np.array(draw_args(Draw(0.5, 0.25, 0.125, 7, ends)), DRAW)
        assert [args[name].item() for name in ("uniform", "top_p", "min_p", "top_k")] == [0.5, 0.25, 0.125, 7]
        assert args["ends"].tolist() == expected


def test_bad_draws() -> None:
    decoder, draws = HostSide(), (Draw(0.5, 1.0, 0.0, 1, ()),) * 2
    for ahead, ids in ((False, []), (True, [3])):
        with pytest.raises(ValueError, match="draws: a pass ahead of a query without ids expected"):
            decoder.begin([Work(0, np.array([1]), 0, (query(ids),))], ahead, draws)
    assert decoder.outcomes() == []


class HeldCache(np.ndarray):
    """An array as CuPy's, on the device."""

    def get(self) -> np.ndarray:
        assert self.flags.c_contiguous
        return np.array(self)

    def set(self, source: np.ndarray) -> None:
        assert self.flags.c_contiguous and self.shape == source.shape
        self[...] = source


def test_the_cache_of_a_slot() -> None:
    """What is written is read, from its slot, and lies where the kernel looks for it."""
    decoder = HostSide()
    decoder.config.num_kv_heads, decoder._vector_layout = 3, VectorLayout(80, "bf16")
    shape = (2, SLOTS, 3, MAX_SEQ_LEN, 80)
    decoder.key_cache, decoder.value_cache = (np.zeros(shape, np.uint16).view(HeldCache) for _ in range(2))
    keys, values = np.random.default_rng(0).integers(0, 0x7F80, (2, 2, 3, 17, 80), np.uint16)
    decoder.write_cache(1, keys, values)
    for cache, vectors, rotation in ((decoder.key_cache, keys, 4), (decoder.value_cache, values, 1)):
        assert not cache[:, [0, 2]].any() and not cache[:, :, :, 17:].any()
        for position, d in itertools.product(range(17), range(80)):  # rotated() of cuda/vectors.cuh
            place = (d // 8 + rotation * position) % 10 * 8 + d % 8
            assert np.array_equal(cache[:, 1, :, position, place], vectors[:, :, position, d])
    for count in (0, 9, 17):
        for found, expected in zip(decoder.read_cache(1, count), (keys, values), strict=True):
            assert found.dtype == np.uint16 and np.array_equal(found, expected[:, :, :count])
    with pytest.raises(ValueError, match="slot 3 asked for"):
        decoder.read_cache(3, 1)
    with pytest.raises(ValueError, match="41 positions asked for, a slot has 40"):
        decoder.read_cache(0, 41)
    with pytest.raises(ValueError, match=r"uint16 \[2, 3, n, 80\] expected, found float32"):
        decoder.write_cache(0, keys, values.astype(np.float32))


def test_the_cache_of_a_slot_in_int8() -> None:
    """Codes and scale lie where the kernel looks for them, the rest is padding."""
    decoder = HostSide()
    decoder.config.num_kv_heads, decoder._vector_layout = 3, VectorLayout(80, "int8")
    shape = (2, SLOTS, 3, MAX_SEQ_LEN, 96)
    decoder.key_cache, decoder.value_cache = (np.zeros(shape, np.uint8).view(HeldCache) for _ in range(2))
    rows = np.random.default_rng(0).standard_normal((2, 2, 3, 17, 80), np.float32)
    keys, values = (join_vectors(*quantize_vectors(x)) for x in rows)
    decoder.write_cache(1, keys, values)
    for cache, vectors in ((decoder.key_cache, keys), (decoder.value_cache, values)):
        assert not cache[:, [0, 2]].any() and not cache[:, :, :, 17:].any() and not cache[..., 84:].any()
        assert np.array_equal(cache[:, 1, :, :17, :84], vectors)
    for found, expected in zip(decoder.read_cache(1, 9), (keys, values), strict=True):
        assert found.dtype == np.uint8 and np.array_equal(found, expected[:, :, :9])
    with pytest.raises(ValueError, match=r"uint8 \[2, 3, n, 84\] expected, found uint16 \[2, 3, 17, 84\]"):
        decoder.write_cache(0, keys, values.astype(np.uint16))


def test_the_numbers_run_out() -> None:
    decoder = HostSide()
    last = (2**32 - 1 - 2) // 3
    decoder._pass = decoder._checked = last - 9
    for position in range(20):
        found = ask(decoder, np.array([position]), position, query([]), ahead=True)
        check(found, position, position, query([]))
    assert decoder._pass < 30


def test_bad_queries() -> None:
    decoder = HostSide()
    with pytest.raises(ValueError, match=r"queried ids must be in \[0, 300\), found 2 to 300"):
        ask(decoder, np.array([1]), 0, query([2, 300]))
    with pytest.raises(ValueError, match=r"expected at most 1024 queried ids \[n\], found \[1025\]"):
        ask(decoder, np.array([1]), 0, query(list(range(1025))))


class Cuda:
    """What a launch needs of cupy.cuda: which device is current, and a driver that notes what it is asked."""

    def __init__(self, device: int, context: int) -> None:
        self.device, self.context = device, context
        self.error: Exception | None = None
        self.launched: list[tuple[int, ...]] = []
        self.runtime = SimpleNamespace(
            CUDARuntimeError=ZeroDivisionError, getDevice=lambda: self.device, setDevice=self.set_device
        )
        self.driver = SimpleNamespace(
            CUDADriverError=ArithmeticError,
            ctxGetCurrent=lambda: self.context,
            launchCooperativeKernel=self.launch,
        )

    def set_device(self, device: int) -> None:
        self.device, self.context = device, 100 + device

    def get_current_stream(self) -> SimpleNamespace:
        return SimpleNamespace(ptr=10 * self.device)

    def launch(self, *given: int) -> None:
        if self.error is not None:
            raise self.error
        self.launched.append(given)


def decoder_on(cuda: Cuda) -> gpu.GPUDecoder:
    """A decoder of GPU 1 that can do no more than launch."""
    decoder = gpu.GPUDecoder.__new__(gpu.GPUDecoder)
    decoder._cupy, decoder._ordinal, decoder._context = SimpleNamespace(cuda=cuda), 1, 101
    build: Any = PassBuild.__new__(PassBuild)
    build._function, build.blocks, build.threads, build.shared_bytes = 7, 5, 640, 99
    build.exchange = SimpleNamespace(data=SimpleNamespace(ptr=8))
    decoder._builds = {4: build}
    decoder._logits = [SimpleNamespace(data=SimpleNamespace(ptr=ptr)) for ptr in (600, 700)]
    decoder._set_args(np.zeros((), PASS_ARGS))
    return decoder


@pytest.mark.parametrize(("device", "context"), [(1, 101), (0, 100), (0, 0)])
def test_a_launch_is_on_the_decoders_device(device: int, context: int) -> None:
    """Also if another device is the current one, as it is again afterwards, or the thread has used none."""
    cuda = Cuda(device, context)
    decoder = decoder_on(cuda)
    decoder._launch(3, 4, [Work(0, np.array([11, 12]), 20, ()), Work(2, np.array([13]), 7, ())], 2)
    ((*shape, params),) = cuda.launched
    assert shape == [7, 5, 1, 1, 640, 1, 1, 99, 10] and cuda.device == device
    pointer = ctypes.c_uint64.from_address(params).value
    args = np.frombuffer(ctypes.string_at(pointer, PASS_ARGS.itemsize), PASS_ARGS)[0]
    assert (args["pass"], args["exchange"], args["num_rows"], args["logits_rows"]) == (3, 8, 3, 2)
    assert args["logits"] == 700
    assert args["rows"][:3].tolist() == [(11, 20, 0), (12, 21, 0), (13, 7, 2)]


def test_a_launch_that_fails() -> None:
    cuda = Cuda(0, 100)
    cuda.error = ArithmeticError("out of order")
    with pytest.raises(DeviceError, match=r"cuda:1: a pass failed \(out of order\); load the model again"):
        decoder_on(cuda)._launch(1, 4, [Work(0, np.array([1]), 0, ())], 1)
    assert cuda.device == 0
