"""Passes of the simulated kernel under many schedules: the same bits, and words of what never comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from comparison import flat, same_bits
from sim.driver import EVENTS, NoTokenError, SimDecoder, SimError
from sim_cases import DEEP, MAX_SEQ_LEN, Case, case_tokens, make_packer
from sim_passes import deep_logits, fill_cache, lost_hand_overs, lost_packets

from ffmini.candidates import Draw
from ffmini.errors import GenerationError
from ffmini.kernel import MAIL_LEAVE
from ffmini.packing import PackedModel

SEEDS = range(1, 201)
ONE_LAYER = Case("llama2", "int4", 32, changes={"num_hidden_layers": 1, "vocab_size": 67})
# With one segment to a part: three of o_proj's input, two of down_proj's.
IN_PARTS = Case(
    "llama2",
    changes={"vocab_size": 64, "head_dim": 80, "num_attention_heads": 8, "intermediate_size": 300},
)
# Of down_proj's 40 segments a warp has two to itself and one with another warp; one of o_proj's three.
OWN = Case(
    "llama2",
    "int4",
    64,
    changes={
        "hidden_size": 32,
        "head_dim": 128,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "intermediate_size": 10200,
        "vocab_size": 64,
    },
)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], PackedModel]:
    return make_packer(lambda: tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("bulk_copies", [True, False])
def test_schedules(pack: Callable[[Case], PackedModel], bulk_copies: bool) -> None:
    """200 seeds: lanes in any order, blocks and warps starved, stores and copies late."""
    packed = pack(Case("llama2", "int4", 32, changes={"vocab_size": 64}))
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=1, bulk_copies=bulk_copies)
    tokens = case_tokens(packed, 1)
    expected = deep_logits(decoder, tokens, 1)
    seen = dict.fromkeys(EVENTS, 0)  # in how many seeds
    for seed in SEEDS:
        decoder.seed, decoder.blocks = seed, 7 if seed % 20 == 0 else 2 + seed % 2
        assert same_bits(decoder.forward(tokens, DEEP, "all"), expected), f"seed {seed}"
        events = decoder.events()
        if events["async copies at once"] > 0:
            events["async copies as late as allowed"] = 0  # some were not
        seen = {name: count + (events[name] > 0) for name, count in seen.items()}
    assert min(seen.values()) >= 50, seen


@pytest.mark.parametrize("bulk_copies", [True, False])
def test_parts_under_schedules(pack: Callable[[Case], PackedModel], bulk_copies: bool) -> None:
    """Blocks that have different parts of an input, in grids with fewer and with more of them than parts."""
    packed = pack(IN_PARTS)
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=2, part_segments=1, bulk_copies=bulk_copies)
    tokens = case_tokens(packed, 2)
    expected = deep_logits(decoder, tokens, 2)
    for seed in SEEDS[::2]:
        decoder.seed, decoder.blocks = seed, 1 + seed // 2 % 5
        assert same_bits(decoder.forward(tokens, DEEP, "all"), expected), f"seed {seed}"


@pytest.mark.parametrize(
    ("dtype", "built_for", "bulk_copies"),
    [("int4", 1, True), ("int4", 2, False), ("bf16", 1, False), ("bf16", 2, True)],
)
def test_own_segments_under_schedules(
    pack: Callable[[Case], PackedModel], dtype: str, built_for: int, bulk_copies: bool
) -> None:
    """Warps that receive what they multiply, of down_proj if a block has two tiles, of o_proj if one."""
    packed = pack(dataclasses.replace(OWN, dtype=dtype))
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=1, built_for=built_for, bulk_copies=bulk_copies)
    tokens = case_tokens(packed, 1)
    decoder.blocks = built_for
    expected = deep_logits(decoder, tokens, 1)
    for seed in SEEDS[::4]:
        decoder.seed, decoder.blocks = seed, built_for + seed // 4 % 3
        assert same_bits(decoder.forward(tokens, DEEP, "all"), expected), f"seed {seed}"


def test_packets_held_back(pack: Callable[[Case], PackedModel]) -> None:
    """The test build with pauses computes the same, under as many seeds."""
    packed = pack(ONE_LAYER)
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=1)
    pausing = SimDecoder(packed, MAX_SEQ_LEN, rows=1, test_pauses=True)
    tokens = case_tokens(packed, 1)
    expected = deep_logits(decoder, tokens, 1)
    fill_cache(pausing)
    for seed in SEEDS:
        pausing.seed, pausing.blocks = seed, 2 + seed % 2
        assert same_bits(pausing.forward(tokens, DEEP, "all"), expected), f"seed {seed}"


LOST = {  # where a packet gets lost: in which layers the pass may end
    "layer 1 hidden": (1,),
    "layer 1 qkv": (1,),
    "layer 1 attention": (1,),
    "layer 1 mid_hidden": (1,),
    "layer 1 activation": (1,),
    "last hidden": (2,),
    "partial": (0,),
    "partial vector": (0,),
    "o product": (0,),
    "down product": (0, 1),  # blocks that do not miss it wait for the next layer
    "layer 1 activation, awaited by one warp": (1,),
}


@pytest.mark.parametrize("stage", LOST)
def test_a_lost_packet(pack: Callable[[Case], PackedModel], stage: str) -> None:
    """A deadlock is reported; where time passes the kernel gives up, says where and stays usable."""
    packed, options = pack(Case("llama2", changes={"vocab_size": 64})), {"rows": 1}
    if stage.endswith("product"):
        packed, options = pack(IN_PARTS), {"rows": 2, "part_segments": 1}
    if stage.endswith("one warp"):
        packed = pack(OWN)
    decoders = [SimDecoder(packed, MAX_SEQ_LEN, bulk_copies=bulk, **options) for bulk in (True, False)]
    tokens = case_tokens(packed, 1)
    expected, other = (deep_logits(decoder, tokens, 1) for decoder in decoders)
    assert same_bits(expected, other)
    place = lost_packets(decoders[0])[stage.partition(",")[0]]
    for seed in SEEDS[:100]:  # all combinations of policies
        decoder = decoders[seed // 2 % 2]
        decoder.seed, decoder.blocks, decoder.lost_packet = seed, 2 + seed % 2, place
        decoder.give_up = seed % 2 == 0
        if decoder.give_up:
            with pytest.raises(GenerationError, match="a wait gave up"):
                decoder.forward(tokens, DEEP)
            assert decoder.status["stage"] // 8 in LOST[stage]
        else:
            with pytest.raises(SimError, match=r"deadlock: .*exchange.cuh:\d+ for exchange \("):
                decoder.forward(tokens, DEEP)
        if seed % 20 == 0:
            decoder.lost_packet = None
            assert same_bits(decoder.forward(tokens, DEEP), expected)


@pytest.mark.parametrize("build", ["bulk ring", "copy ring", "packets held back"])
def test_same_candidates(pack: Callable[[Case], PackedModel], build: str) -> None:
    """Whatever the schedule is, and whether the token was known at the launch; its mail may append it."""
    packed = pack(ONE_LAYER)
    options = {"bulk_copies": build != "copy ring", "test_pauses": build == "packets held back"}
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=1, **options)
    tokens, ids = case_tokens(packed, 1), np.arange(3, 50, 2, dtype=np.int32)
    token = int(tokens[0])
    ids = ids[ids != token]
    expected = decoder.listed(tokens, 0, ids, {0: 1.5})[0]
    appended = decoder.listed(tokens, 0, np.append(ids, np.int32(token)), {0: 1.5})[0]
    for seed in SEEDS[::3]:
        decoder.seed, append = seed, seed % 2 == 0
        mailbox = decoder.next_mail(token, append) if seed % 4 < 2 else None
        decoder._queried_ids[...] = -1
        found = decoder.listed(tokens, 0, ids, {0: 1.5}, append, mailbox)[0]
        assert same_bits(flat(found), flat(appended if append else expected)), f"seed {seed}"
        assert decoder._queried_ids[0, len(ids)] == (token if append else -1)


@pytest.mark.parametrize("bulk_copies", [True, False])
def test_a_drawn_token(pack: Callable[[Case], PackedModel], bulk_copies: bool) -> None:
    """The pass behind has it, whatever the schedule is; no other pass takes it for its own."""
    packed = pack(ONE_LAYER)
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=1, bulk_copies=bulk_copies)
    tokens, none = case_tokens(packed, 1), np.zeros(0, np.int32)
    drawn = {}
    for seed in SEEDS[::5]:
        decoder.seed, decoder.blocks = seed, 2 + seed % 2
        asked = Draw(0.25 * (seed % 4), 1.0, 0.0, 5, ())
        decoder.listed(tokens, 0, none, {0: 1.0}, draw=asked)
        token = decoder.drawn()
        found = decoder.listed(tokens, 1, none, {0: 1.5}, mailbox=0)[0]
        assert decoder.drawn() is None and token == drawn.setdefault(asked, token)
        expected = decoder.listed(np.array([token]), 1, none, {0: 1.5})[0]
        assert same_bits(flat(found), flat(expected)), f"seed {seed}"
        for between in (0, 1):
            decoder.listed(tokens, 0, none, {0: 1.0}, draw=asked if between else None)
            for _ in range(between):
                decoder.listed(tokens, 0, none, {0: 1.0})
            with pytest.raises(SimError, match=r"deadlock: .*candidates.cuh:\d+ for host memory"):
                decoder.listed(tokens, 1, none, {0: 1.0}, mailbox=0)
    assert len(set(drawn.values())) > 2


@pytest.mark.parametrize("bulk_copies", [True, False])
def test_no_token(pack: Callable[[Case], PackedModel], bulk_copies: bool) -> None:
    """A pass that gets none leaves quietly, when it is told to and when time has passed."""
    packed = pack(ONE_LAYER)
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=1, bulk_copies=bulk_copies)
    tokens = case_tokens(packed, 1)
    expected = decoder.listed(tokens, 0, np.array([5]), {0: 1.0})[0]
    for seed in SEEDS[::5]:
        decoder.seed, decoder.blocks = seed, 2 + seed % 2
        with pytest.raises(SimError, match="results are missing"):
            decoder.listed(tokens, 0, [5], {0: 1.0}, mailbox=decoder.next_mail(MAIL_LEAVE))
        assert decoder.status["gave_up"] == 0 and decoder.status["no_token"] < decoder._pass
        stale = decoder.next_mail(int(tokens[0])) - 1
        with pytest.raises(SimError, match=r"deadlock: .*candidates.cuh:\d+ for host memory"):
            decoder.listed(tokens, 0, [5], {0: 1.0}, mailbox=stale)
        decoder.give_up = True
        with pytest.raises(NoTokenError):
            decoder.listed(tokens, 0, [5], {0: 1.0}, mailbox=stale + 1)
        assert decoder.status["gave_up"] == 0
        decoder.give_up, decoder.blocks = False, 3
        assert same_bits(flat(decoder.listed(tokens, 0, [5], {0: 1.0})[0]), flat(expected))


@pytest.mark.parametrize("lost, layer", [("token", 0), ("list", 1), ("end of a list", 1)])
def test_a_lost_hand_over(pack: Callable[[Case], PackedModel], lost: str, layer: int) -> None:
    """As any lost packet: the pass ends with an error that says where, also if the token came in time."""
    packed = pack(ONE_LAYER)
    decoder, tokens = SimDecoder(packed, MAX_SEQ_LEN, rows=1), case_tokens(packed, 1)
    expected = decoder.listed(tokens, 0, [5], {0: 1.0})[0]
    place = lost_hand_overs(decoder)[lost]
    for seed in SEEDS[::10]:
        decoder.seed, decoder.blocks, decoder.lost_packet = seed, 2 + seed % 2, place
        with pytest.raises(SimError, match=r"deadlock: .*exchange.cuh:\d+ for exchange \("):
            decoder.listed(tokens, 0, [5], {0: 1.0}, mailbox=decoder.next_mail(int(tokens[0])))
        decoder.give_up = True
        with pytest.raises(GenerationError, match="a wait gave up"):
            decoder.listed(tokens, 0, [5], {0: 1.0}, mailbox=decoder.next_mail(int(tokens[0])))
        assert decoder.status["stage"] // 8 == layer  # block 0 has its token and waits for what comes next
        assert decoder.status["stage"] % 8 == 6 or lost == "token"
        decoder.give_up, decoder.lost_packet, decoder.blocks = False, None, 3
        assert same_bits(flat(decoder.listed(tokens, 0, [5], {0: 1.0})[0]), flat(expected))
