"""That tests of the simulated pass can fail: each of many mistakes in its source is found, all lines run."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from comparison import flat, query, same_bits
from sim.apart import NOT_FOUND, search
from sim.driver import NoTokenError, SimDecoder, SimError
from sim.mutations import (
    Change,
    Edit,
    barrier_change,
    change,
    count_barriers,
    find_barriers,
    mutable_source,
    place_after,
    sources_of,
    vote_change,
)
from sim_cases import DEEP, LARGE_SHARED_LIMIT, MAX_SEQ_LEN, Case, case_tokens, make_packer
from sim_passes import BULK, COPY, INT8_KV_BUILD, deep_logits, fill_cache, lost_hand_overs, lost_packets

from ffmini.candidates import Draw
from ffmini.errors import GenerationError
from ffmini.packing import PackedModel
from ffmini.passes import Work

SEEDS = (*range(4), 28, 56, 13)  # 28: some copies land late, 56: all of them; 13: a block adds up late


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], PackedModel]:
    return make_packer(lambda: tmp_path_factory.mktemp("checkpoint"))


STREAM = functools.partial(Edit, "stream.cuh")
EXCHANGE = functools.partial(Edit, "exchange.cuh")
CANDIDATES = functools.partial(Edit, "candidates.cuh")
ITEMS = functools.partial(Edit, "items.cuh")
ARITHMETIC = functools.partial(Edit, "arithmetic.cuh")
VECTORS = functools.partial(Edit, "vectors.cuh")
MATVEC = functools.partial(Edit, "matvec.cuh")
PASS = functools.partial(Edit, "ffmini.cu")
INPUT = functools.partial(Edit, "input.cuh")
BLOCK = functools.partial(Edit, "block.cuh")
ACTIVATIONS = functools.partial(Edit, "activations.cuh")
ATTENTION = functools.partial(Edit, "attention.cuh")
# Builds besides BULK and COPY.
ONE_ROW, WHOLE, OWN_TURNS, OWN_ROWS = "one row", "whole tiles", "turns of segments", "rows of a segment"
ONE_WHOLE, WIDE_GRID, DRAWING = "whole tiles of one row", "blocks without a tile", "tokens drawn"
STORE = "store_relaxed_128(packet, make_uint4(x, y, z, tag))"
LOAD = "load_relaxed_128(at(i))"
MISSING = "packet[i].w != tag"
AWAIT = "await_copy(&oldest_->full, parity_)"
ARRIVE = "mbarrier_arrive(&oldest_->empty)"
PLANES = "plane_offset(column % 2, 0, block.lane() % 4)"
EXPECT = "mbarrier_arrive_expect(full, cursor.bytes())"
TILE_STEP, GRID = "partition_.tile_step()", "static_cast<int>(gridDim.x)"
EACH_PART = "for (int part = 0; part < M::PARTS"
FIRST_TAG = "block.args.pass * (NUM_LAYERS + 1)"
PRODUCTS_SENT = "FLOAT_PACKETS, tile, sum, tag"

# Each mistake: the build in which it must be found, and the edits that make it.
MUTATIONS: dict[str, tuple[str, list[Edit]]] = {
    # The order of the stream.
    "tail fetched as a whole slot": (
        BULK,
        [STREAM("slots_left_ == 1 ? last_bytes_ : slot_bytes_", "slot_bytes_")],
    ),
    # The ring that bulk copies fill: who empties it,
    "bulk copy not waited for": (BULK, [STREAM(AWAIT, "void()")]),
    "parity of a full slot not flipped": (BULK, [STREAM("parity_ ^= 1", "parity_")]),
    "emptying wraps a slot early": (BULK, [STREAM("head_ == SLOTS", "head_ == SLOTS - 1")]),
    "emptying wraps a slot late": (BULK, [STREAM("head_ == SLOTS", "head_ == SLOTS + 1")]),
    "slot given back before it is read": (
        BULK,
        [
            STREAM(AWAIT, f"({AWAIT}, threadIdx.x % 32 == 0 ? {ARRIVE} : void())"),
            STREAM(ARRIVE, "void()"),
        ],
    ),
    "slot given back twice": (BULK, [STREAM(ARRIVE, f"({ARRIVE}, {ARRIVE})")]),
    "slot never given back": (BULK, [STREAM(ARRIVE, "void()")]),
    # ... who fills it,
    "full slot filled": (BULK, [STREAM("mbarrier_test(&barriers[tail].empty, tail_parity)", "true")]),
    "parity of an empty slot not flipped": (BULK, [STREAM("tail_parity ^= 1", "tail_parity")]),
    "slots not empty at first": (BULK, [STREAM("1", "0", "tail_parity = 1,")]),
    "parity of a copy under way not flipped": (BULK, [STREAM("oldest_parity ^= 1", "oldest_parity")]),
    "filling wraps a slot early": (BULK, [STREAM("++tail == SLOTS", "++tail == SLOTS - 1")]),
    "filling wraps a slot late": (BULK, [STREAM("++tail == SLOTS", "++tail == SLOTS + 1")]),
    "too few bytes announced": (
        BULK,
        [STREAM(EXPECT, "mbarrier_arrive_expect(full, cursor.bytes() - 16)")],
    ),
    "too many bytes announced": (
        BULK,
        [STREAM(EXPECT, "mbarrier_arrive_expect(full, cursor.bytes() + 16)")],
    ),
    "bytes not announced": (BULK, [STREAM(EXPECT, "mbarrier_arrive(full)")]),
    # ... and what they meet at.
    "a full slot awaits two arrivals": (BULK, [STREAM("1", "2", "mbarrier_init(&slot.full, 1)")]),
    "an empty slot awaits two arrivals": (BULK, [STREAM("1", "2", "mbarrier_init(&slot.empty, 1)")]),
    # The ring that each warp fills itself.
    "copy not waited for": (COPY, [STREAM("copy_async_wait<SLOTS - 1>()", "copy_async_wait<SLOTS>()")]),
    "copies never closed": (
        COPY,
        [STREAM("copy_async_commit()", "void()", "copy_async_commit();\n        tail_ = next(tail_)")],
    ),
    "no group for a slot that stays empty": (
        COPY,
        [STREAM("copy_async_commit()", "void()", "} else {\n            copy_async_commit()")],
    ),
    "ring wraps a slot early": (COPY, [STREAM("slot + 1 == SLOTS", "slot + 2 == SLOTS")]),
    "ring wraps a slot late": (COPY, [STREAM("slot + 1 == SLOTS", "slot == SLOTS")]),
    "a slot more in flight than there is": (COPY, [STREAM("SLOTS", "SLOTS + 1", "empty_ = SLOTS;")]),
    "no fetch over the border of a stage": (
        COPY,
        [Edit("matvec.cuh", "block.stream.refill()", "void()")],
    ),
    "no fetch over the border of an item": (
        COPY,
        [
            ATTENTION("block.stream.refill()", "void()", within)
            for within in (
                "keys.read(block, slots, 0);\n    block.stream.refill()",
                "block.stream.refill();\n            values.read",
                "append_to_cache(block, item, layer);\n    block.stream.refill()",
            )
        ],
    ),
    # The exchange.
    "store torn": (
        BULK,
        [
            EXCHANGE(
                STORE,
                "(store_relaxed_32(&packet->x, x), store_relaxed_32(&packet->y, y), "
                "store_relaxed_32(&packet->z, z), store_relaxed_32(&packet->w, tag))",
            )
        ],
    ),
    "load torn": (
        BULK,
        [
            EXCHANGE(
                LOAD,
                f"uint4{{{', '.join(f'load_relaxed_32(&{LOAD[17:-1]}->{word})' for word in 'xyzw')}}}",
            )
        ],
    ),
    "published without a tag": (BULK, [EXCHANGE(STORE, STORE.replace("tag", "0"))]),
    "tag not compared": (BULK, [EXCHANGE(MISSING, "false")]),
    "any tag taken": (BULK, [EXCHANGE(MISSING, MISSING.replace("!= tag", "== 0"))]),
    "only the first packet of a batch awaited": (BULK, [EXCHANGE(MISSING, f"i == 0 && {MISSING}")]),
    # The partial softmaxes alone are in one place in all layers.
    "tag without the layer": (BULK, [EXCHANGE("static_cast<uint32_t>(layer)", "0u")]),
    "tag without the pass": (BULK, [EXCHANGE("args.pass * (NUM_LAYERS + 1)", "(NUM_LAYERS + 1)")]),
    "partials of all splits in one place": (
        BULK,
        [ATTENTION("item.split", "0", "MAX_SPLITS + item.split")],
    ),
    # Parts of an input, which blocks share out: who has which,
    "groups of the same size": (
        BULK,
        [
            STREAM(
                "(blocks - first_part_ + part_step_ - 1) / part_step_",
                "(blocks + part_step_ - 1) / part_step_",
            )
        ],
    ),
    "a group's tiles all from the first on": (BULK, [STREAM("block / part_step_", "0")]),
    "a part's tiles as the grid's": (BULK, [MATVEC(TILE_STEP, GRID, f"own_tile * {TILE_STEP}")]),
    "a part's tiles as the grid's in the stream": (BULK, [STREAM(TILE_STEP, GRID, f"unit_ * {TILE_STEP}")]),
    "the next part instead of the group's": (
        BULK,
        [STREAM("partition_.part_step()", "1", "part_begin_ += partition_.part_step()")],
    ),
    "the last part as long as the others in the stream": (
        BULK,
        [STREAM("min_of(shape.held_segments, shape.segments - part_begin_)", "shape.held_segments")],
    ),
    "the last part as long as the others": (
        BULK,
        [MATVEC("min_of(M::IN_PART, M::SEGMENTS - part_ * M::IN_PART)", "M::IN_PART")],
    ),
    "slots of the first part": (BULK, [MATVEC("part_ * M::IN_PART", "0", "(M::SPLIT ? part_ * M::IN_PART")]),
    "a part never multiplied": (
        BULK,
        [
            MATVEC(
                "part_ + partition_.part_step() >= M::PARTS", "part_ + partition_.part_step() >= M::PARTS - 1"
            )
        ],
    ),
    # ... what a block receives of it,
    "packets of the first part": (
        BULK,
        [INPUT("first_run * Runs::PACKETS", "0", "+ first_run * Runs::PACKETS;")],
    ),
    "a part begins with a head": (BULK, [INPUT("first_run * Runs::LENGTH - begin", "0")]),
    "what is before a part kept": (BULK, [INPUT("k + 2 * w >= 0", "true")]),
    "what is behind a part kept": (BULK, [INPUT("k + 2 * w < M::HELD_K", "true")]),
    "what is behind the input counts": (
        BULK,
        [INPUT("end", "M::HELD_K", "align_activations<M, WHOLE>(block, end)")],
    ),
    "the first packets twice": (BULK, [INPUT("block.warp() % ROW_WARPS * 32", "0")]),
    # ... and what it makes of the products.
    "a part not added": (BULK, [PASS("part < M::PARTS", "part < M::PARTS - 1", f"{EACH_PART}; ++part")]),
    "parts added from the last on": (
        BULK,
        [
            PASS("part % 2 * 8", "(M::PARTS - 1 - part) % 2 * 8", "base + part % 2 * 8"),
            PASS("part / 2", "(M::PARTS - 1 - part) / 2", "packet[part / 2]"),
        ],
    ),
    "another part's products": (BULK, [PASS("part * M::TILES", "0", "of_tile + part * M::TILES")]),
    "another row's products": (BULK, [PASS("row", "0", "products + row * M::PARTS")]),
    "another tile's products": (
        BULK,
        [PASS("own_tile * gridDim.x", "0u", "of_row + (blockIdx.x + own_tile * gridDim.x)")],
    ),
    "products of all parts in one place": (BULK, [PASS("products.part()", "0", "partial + products.part()")]),
    "products under another layer's tag": (BULK, [PASS("tag", FIRST_TAG, PRODUCTS_SENT)]),
    "products of all layers under one tag": (
        BULK,
        [PASS("tag", FIRST_TAG, PRODUCTS_SENT), PASS("tag", FIRST_TAG, "(block, update(), partial, tag,")],
    ),
    "products under any tag": (
        BULK,
        [PASS("tag", "load_relaxed_128(at(0)).w", "await_packets(patience, tag, at, packet))) arrived")],
    ),
    "one buffer for all rounds": (BULK, [MATVEC("parity ^= 1", "parity")]),
    # Sums that go on in the next round, and parts where a block holds all of them.
    "parts added together": (ONE_ROW, [MATVEC("before += sum, sum = 0.0f", "0.0f")]),
    "a sum begins anew in each round": (ONE_ROW, [MATVEC("begin > tile_begin", "false")]),
    "the sum before last goes on": (ONE_ROW, [MATVEC("parity", "(parity ^ 1)", "sum = carry[parity *")]),
    "complete parts left behind": (
        ONE_ROW,
        [MATVEC("before", "start(tile, row, valid)", "UNIT_SUMS] = before")],
    ),
    "a part ends with the round": (
        ONE_ROW,
        [MATVEC("in_tile == part * M::IN_PART", "(in_tile == part * M::IN_PART || unit == begin)")],
    ),
    "no bias": (ONE_ROW, [PASS("bias != nullptr && k < HIDDEN_SIZE", "false")]),
    # Candidates.
    "candidates without a tag": (
        BULK,
        [CANDIDATES("block.args.pass", "0u", "__float_as_uint(logit_of(entry)), block.args.pass")],
    ),
    "header without a tag": (
        BULK,
        [CANDIDATES("args.pass", "0u", "__float_as_uint(total), args.pass")],
    ),
    "queried logits without a tag": (
        BULK,
        [CANDIDATES("args.pass", "0u", "__float_as_uint(logit), args.pass")],
    ),
    "a mark replaces others": (
        BULK,
        [
            CANDIDATES(
                "set_bits_shared(marks + own / 32, 1u << own % 32)", "void(marks[own / 32] = 1u << own % 32)"
            )
        ],
    ),
    "a token of another rank": (BULK, [CANDIDATES("rank == least", "true")]),
    "sums of warps not rescaled": (BULK, [CANDIDATES("share.sum * scale", "share.sum")]),
    "sums of blocks not rescaled": (
        BULK,
        [CANDIDATES("rescale(entries[i], row.first, inverse_temperature)", "1.0f")],
    ),
    "a list's end does not bound the others": (
        BULK,
        [CANDIDATES("index % LISTED == LISTED - 1", "false")],
    ),
    "cut lists taken for all": (
        BULK,
        [CANDIDATES("listed == static_cast<float>(VOCAB_SIZE - num_queried)", "true")],
    ),
    "exact entries in one place": (
        BULK,
        [CANDIDATES("fetch_add_shared(s.held + place[i], 1)", "(s.held[place[i]] += 1, 0u)")],
    ),
    "a bucket that begins where it ends": (BULK, [CANDIDATES("end - held", "end")]),
    "buckets of the warps before not counted": (BULK, [CANDIDATES("other < warp", "other < 0")]),
    "entries not sorted in a bucket": (BULK, [CANDIDATES("other < end", "other < begin")]),
    "the buckets of the row before": (
        BULK,
        [CANDIDATES("s.held[block.thread] = 0", "s.held[block.thread] += 0")],
    ),
    # The token that a pass draws.
    "any drawn token taken": (BULK, [CANDIDATES("static_cast<uint32_t>(drawn) == args.pass", "true")]),
    "drawn for itself": (DRAWING, [CANDIDATES("(args.pass + 1) & 1", "args.pass & 1")]),
    "drawn for any pass": (DRAWING, [CANDIDATES("args.pass + 1", "args.pass", "joined(args.pass + 1,")]),
    "another one given than told": (
        DRAWING,
        [CANDIDATES("token", "token ^ 1", "static_cast<uint32_t>(token));")],
    ),
    "the end given on": (DRAWING, [CANDIDATES("token == draw.ends[i]", "false")]),
    "drawn beside what is queried": (DRAWING, [CANDIDATES("num_queried == 0", "true")]),
    "sums of the lanes before left out": (
        DRAWING,
        [CANDIDATES("block.lane() > 0 ? before : 0.0f", "0.0f * before")],
    ),
    "more than top_k": (DRAWING, [CANDIDATES("min_of(draw.top_k, listed)", "listed")]),
    "less than top_k": (DRAWING, [CANDIDATES("draw.top_k == weights.count", "true")]),
    "top_p of all where top_k is": (
        DRAWING,
        [CANDIDATES("draw.top_k > 0 ? weights.sum(block, left) : total", "total")],
    ),
    "top_p without the last": (DRAWING, [CANDIDATES("min_of(below + 1, left)", "min_of(below, left)")]),
    "top_p not decided": (DRAWING, [CANDIDATES("decided || below < left", "true")]),
    "no min_p": (DRAWING, [CANDIDATES("weights.of[i] >= draw.min_p", "true")]),
    "min_p not decided": (DRAWING, [CANDIDATES("decided || likely < left", "true")]),
    "drawn from more than are left": (
        DRAWING,
        [CANDIDATES("left", "listed", "draw.uniform * weights.sum(block, left)")],
    ),
    "mail not handed on": (BULK, [CANDIDATES("publish(packet, mail, 0, 0, tag)", "void()")]),
    "mail handed on empty": (
        BULK,
        [CANDIDATES("publish(packet, mail, 0, 0, tag)", "publish(packet, 0, 0, 0, tag)")],
    ),
    "queried ids without the appended one": (
        BULK,
        [CANDIDATES("block.args.num_queried[row] + appends(block, row)", "block.args.num_queried[row]")],
    ),
    "token not appended": (
        BULK,
        [CANDIDATES("blockIdx.x == 0 && block.thread == 0", "false")],
    ),
    # What is a row's own.
    "one list of queried ids": (BULK, [CANDIDATES("list * MAX_QUERIED", "0 * list")]),
    "another row's list": (BULK, [CANDIDATES("(1u << row) - 1", "(2u << row) - 1")]),
    "marks of all rows in one place": (BULK, [CANDIDATES("row * MARK_WORDS", "0 * row")]),
    "as many ids as the first row": (
        BULK,
        [
            CANDIDATES(
                "block.args.num_queried[row]",
                "block.args.num_queried[0]",
                "known = block.args.num_queried[row]",
            )
        ],
    ),
    "all rows append": (BULK, [CANDIDATES("block.args.append >> row", "block.args.append >> 7")]),
    "another row's token appended": (
        BULK,
        [CANDIDATES("token_of(block, row)", "token_of(block, 0)", "= token_of(block, row);\n        }")],
    ),
    "another row's token queried": (
        BULK,
        [CANDIDATES("token_of(block, row)", "token_of(block, 0)", "list[i] : token_of(block, row)")],
    ),
    "rows of all slots in one": (
        BULK,
        [ITEMS("args.rows[first_row - 1].slot == args.rows[row].slot", "true")],
    ),
    "items of all slots in one": (
        BULK,
        [ITEMS("args.rows[end].slot == args.rows[first].slot", "true")],
    ),
    "items of the next slot": (
        BULK,
        [ITEMS("index >= table_.before[kind_][other]", "index > table_.before[kind_][other]")],
    ),
    "every row begins a slot's items": (BULK, [ITEMS("NO_SLOT", "0", "before[kind][own] = NO_SLOT")]),
    "one row in every slot": (BULK, [ITEMS("slot.end - row", "1")]),
    "one slot in the cache": (BULK, [ITEMS("args.rows[row].slot", "0", "+ args.rows[row].slot")]),
    "the first row's splits for all": (
        BULK,
        [Edit("ffmini.cu", "items.splits(item.row) == 1", "items.splits(0) == 1")],
    ),
    "a finished row merged": (BULK, [Edit("ffmini.cu", "items.splits(row) == 1", "false")]),
    # Whole tiles: the stream,
    "a tile's segments shared out too": (WHOLE, [STREAM("unit_ < partition_.whole_tiles()", "false")]),
    "a tile for every other warp": (WHOLE, [STREAM("unit_ += WARPS", "unit_ += 2 * WARPS")]),
    "whole tiles fetched once more": (
        WHOLE,
        [
            STREAM(
                "unit_ = partition_.whole_tiles()",
                "unit_ = 0",
                "unit_ = partition_.whole_tiles(), segment_ =",
            )
        ],
    ),
    # ... and their sums.
    "the last segment for the tile": (WHOLE, [MATVEC("segment == 0 ? sum : own[place] + sum", "sum")]),
    "another warp's sums": (WHOLE, [MATVEC("ROUND<M> + block.warp()", "ROUND<M>")]),
    "whole tiles once more": (
        WHOLE,
        [MATVEC("whole_tiles() * segments()", "0", "first = whole_tiles() * segments()")],
    ),
    # Lanes and memory.
    "half a warp does not shuffle": (
        ONE_ROW,
        [Edit("block.cuh", "first < jobs", "first + block.lane() / 16 < jobs")],
    ),
    "read beyond shared memory": (
        BULK,
        [Edit("matvec.cuh", PLANES, f"{PLANES} + (1 << 18)")],
    ),
    # Integers.
    "high bytes cut, not rounded": (
        BULK,
        [ARITHMETIC("fmaf(even, factor, ROUNDER + 128)", "fmaf(even, factor, ROUNDER)")],
    ),
    "one plane twice": (BULK, [Edit("matvec.cuh", PLANES, PLANES.replace("column % 2", "0"))]),
    "a segment's power of two too large": (BULK, [ARITHMETIC("(largest + 1) >> 7", "largest >> 7")]),
    "another segment's power of two": (
        BULK,
        [Edit("matvec.cuh", "row * SEGMENT_STRIDE + segment", "row * SEGMENT_STRIDE")],
    ),
    "the first segment for every warp": (
        ONE_ROW,
        [MATVEC("M::turn(block.warp())", "0", "input_, M::turn(block.warp()) % M::HELD_SEGMENTS")],
    ),
    "segments of a batch in one place": (BULK, [ACTIVATIONS("i * STEP", "0", "high + i * STEP")]),
    # Slots taken ahead.
    "the first one for all": (ONE_ROW, [MATVEC("taken_[i]", "taken_[0]", "add(taken_[i], i)")]),
    "those of the same segment": (
        ONE_WHOLE,
        [MATVEC("SAME_SEGMENT<M> ? segment : unit % segments()", "segment")],
    ),
    "those of a whole tile's same segment": (
        ONE_WHOLE,
        [MATVEC("!last ? segment + 1 : (more ? 0 : first_segment(block))", "segment")],
    ),
    # Segments of a warp's own: which they are,
    "the rest's first segment for all": (OWN_TURNS, [BLOCK("turn % PERIOD", "0")]),
    "the rest not received": (OWN_TURNS, [BLOCK("M::turn(block.warp()) < OWN_TILES * REST", "false")]),
    "other rings for the stream": (OWN_TURNS, [STREAM("warp_ - shape.first_warp", "warp_")]),
    "the rest where its segment would be": (
        OWN_TURNS,
        [MATVEC("WHOLE + M::turn(block.warp())", "segment")],
    ),
    # ... how they come,
    "packets of the first piece": (OWN_TURNS, [INPUT("i / PERIOD * SHIFT", "0")]),
    "rows of the first piece": (OWN_ROWS, [INPUT("i / PERIOD * SHIFT", "0")]),
    "packets behind the row": (
        OWN_TURNS,
        [INPUT("segment * PACKETS + index < Runs::ROW_PACKETS", "true")],
    ),
    "elements behind the row": (
        OWN_ROWS,
        [ACTIVATIONS("segment * SEGMENT + 8 * lane < end", "true")],
    ),
    "what one is worth in the first row": (OWN_ROWS, [ACTIVATIONS("(first + i) * PLACE_STEP", "0")]),
    # ... and what becomes of them.
    "a group's sum in another": (OWN_ROWS, [MATVEC("(64 * i + 32) / M::GROUP", "64 * i / M::GROUP")]),
    "the first row's angles": (BULK, [PASS("block.args.rows[own / HALF]", "block.args.rows[0]")]),
    "the first row's scale": (OWN_ROWS, [PASS("(2 * block.warp() + block.lane() / 16) % ROWS", "0")]),
    "squares in another order": (OWN_ROWS, [ARITHMETIC("tile / LANES % (32 / LANES)", "0")]),
    "one place for the sums of two rounds": (OWN_ROWS, [MATVEC("OWN_TURNS * parity", "0")]),
    "one place for the sums of two units": (OWN_ROWS, [MATVEC("piece / 8 * (ACTIVATION_STRIDE / 2)", "0")]),
    # Keys and values.
    "keys as values are rotated": (
        BULK,
        [VECTORS("rotated(piece, turn, KEY_ROTATION)", "rotated(piece, turn, 1)")],
    ),
    "what the row does not see is not hidden": (BULK, [VECTORS("loaded[0] & seen", "loaded[0]")]),
    "the largest of a lane for all": (INT8_KV_BUILD, [ARITHMETIC("warp_max(largest)", "largest")]),
    "codes of another scale": (INT8_KV_BUILD, [ARITHMETIC("1.0f / 127", "1.0f / 128")]),
    "a key without its scale": (INT8_KV_BUILD, [VECTORS("scale(key) * SCORE_SCALE", "SCORE_SCALE")]),
    "one scale for two values": (INT8_KV_BUILD, [VECTORS("scales[1]", "scales[0]", "* scales[1]")]),
    "another key's scale": (INT8_KV_BUILD, [VECTORS("4 * column(c)", "column(c)")]),
    "weights of what the row does not see": (
        INT8_KV_BUILD,
        [VECTORS("pack_bf16x2(low, high) & seen", "pack_bf16x2(low, high)")],
    ),
    "codes without a sign": (INT8_KV_BUILD, [VECTORS("(bytes & 0x00800080) | 0xc300c300", "0xc300c300")]),
    "even codes twice": (INT8_KV_BUILD, [VECTORS("codes >> 8", "codes")]),
    "every dimension for another": (
        INT8_KV_BUILD,
        [VECTORS("lane / 4 * 2", "lane / 4")],
    ),
    "the scale not appended": (
        INT8_KV_BUILD,
        [ATTENTION("i < VECTOR_DATA", "i < HEAD_DIM")],
    ),
    # Attention.
    "a key from the cache that has just come": (
        BULK,
        [ATTENTION("slots.is_fresh(own)", "false", "if (slots.is_fresh(own)) load")],
    ),
    "a value from the cache that has just come": (
        BULK,
        [ATTENTION("slots.is_fresh(own)", "false", "if (slots.is_fresh(own)) value")],
    ),
    "the first of the pass's own rows for all": (BULK, [ATTENTION("position - item_.fresh", "0")]),
    "the keys as values": (BULK, [ATTENTION("kind == KEY ? 0 : NUM_KV_HEADS", "0")]),
    "the first half of a value twice": (BULK, [ATTENTION("2 * load + octet", "2 * load + octet % 2")]),
    "no zeros that make up fours": (BULK, [ATTENTION("round_up(item.end_tile(), 4)", "item.end_tile()")]),
    "a sum of a warp without a tile": (
        BULK,
        [ATTENTION("0.0f", "1.0f", "s.tile_sum[block.lane() / 4 * WARPS + block.warp()] = 0.0f")],
    ),
    "four tiles for all": (BULK, [ATTENTION("tile < end", "tile < first + 4")]),
    "one head's probabilities for two": (BULK, [ATTENTION("(2 * pair + odd) * WARPS", "2 * pair * WARPS")]),
    "the other head's output": (ONE_ROW, [ATTENTION("odd ? sum.x : sum.y", "odd ? sum.y : sum.x")]),
}
# The same where a wait gives up.
LEAVING: dict[str, tuple[str, list[Edit]]] = {
    "fetching goes on": (BULK, [STREAM("load_relaxed_shared(&state.abandoned) != 0", "false")]),
    "fetching does not hear of it": (BULK, [STREAM("store_relaxed_shared(&state_.abandoned, 1)", "void()")]),
    "copies left under way": (COPY, [STREAM("copy_async_wait<0>()", "void()")]),
    "any mail taken": (BULK, [CANDIDATES("static_cast<uint32_t>(mail) == args.pass", "true")]),
    "a token awaited for ever": (BULK, [CANDIDATES("global_timer_ns() < deadline", "true")]),
    "leave not handed on": (
        BULK,
        [
            CANDIDATES(
                "publish(packet, mail, 0, 0, tag)",
                "mail == MAIL_LEAVE ? void() : publish(packet, mail, 0, 0, tag)",
            )
        ],
    ),
}

SOURCES = sources_of("ffmini.cu")
BARRIERS = find_barriers(SOURCES)
VOTES = [place for place, match in BARRIERS.items() if match["vote"] is not None]
# Barriers whose lack no schedule shows: the file, the end of what stands before one, and why.
UNSEEN = [
    # The greatest of the lanes' values makes them meet too.
    ("activations.cuh", "warp_max(largest_bits(pairs_[i]));\n"),
    # fetch() has one before it starts copies, wait() has one before the cursor is looked at again.
    ("stream.cuh", "if (!all_have(result)) return;\n"),
]


SEEN = [place for place in BARRIERS if place not in {place_after(SOURCES, *barrier) for barrier in UNSEEN}]

# Those of Products::run_whole_tiles().
WHOLE_BARRIERS = {
    place
    for place, match in BARRIERS.items()
    if place.startswith("matvec.cuh")
    and "run_whole_tiles(Block&" in SOURCES["matvec.cuh"][: match.start()]
    and "Of what the block holds." in SOURCES["matvec.cuh"][match.start() :]
}

# Those of receive_own(), and the one after which Products::run() knows whether all has come.
OWN_BARRIERS = {
    place
    for place, match in BARRIERS.items()
    if (
        place.startswith("input.cuh")
        and "receive_own(Block&" in SOURCES["input.cuh"][: match.start()]
        and "receive_together(Block&" in SOURCES["input.cuh"][match.start() :]
    )
    or (place.startswith("matvec.cuh") and match["vote"] is not None)
}

# Before a slot is given back: where it is read in the midst of products these make the lanes meet, too.
RELEASE_BARRIER = place_after(SOURCES, "stream.cuh", "const bool served = all_have(result);\n")

# Before the logits are listed: another one stands there if the warps have the lm_head's input in registers.
LOGITS_BARRIER = place_after(SOURCES, "candidates.cuh", "return args.candidates + row * RESULT_PACKETS; };\n")

# Blocks that have a tile of qkv_proj meet there again before attention rotates anything.
ANGLES_BARRIER = place_after(SOURCES, "ffmini.cu", "angles.keep(block);\n")

# Every mistake that the builds of mutable_source() can make.
MISTAKES: dict[str, list[Change]] = {
    **{name: [change(SOURCES, edit) for edit in edits] for name, (_, edits) in (MUTATIONS | LEAVING).items()},
    **{place: [barrier_change(place, match)] for place, match in BARRIERS.items()},
    **{f"vote {place}": [vote_change(place, BARRIERS[place])] for place in VOTES},
}


def ring_of(place: str) -> str:
    """The build that has the code of `place`."""
    if place in WHOLE_BARRIERS or place == LOGITS_BARRIER:
        return WHOLE
    if place in OWN_BARRIERS:
        return OWN_ROWS
    if place == RELEASE_BARRIER:
        return ONE_ROW
    if place == ANGLES_BARRIER:
        return WIDE_GRID
    at, text = BARRIERS[place].start(), SOURCES["stream.cuh"]
    copies = range(text.index("class CopyRing"), text.index("struct BulkState"))
    return COPY if place.startswith("stream.cuh") and at in copies else BULK


class Mutable:
    """A build with switches, what it must compute and whether it does.

    Its model has more dimensions to a head than one sweep adds up and than one warp merges, more units than
    a round, an o_proj of whose input a part covers attention's keys and values, and odd numbers of tiles for
    a block: else some barriers guard nothing. Its rings have more than one slot. o_proj's input has three
    parts, which end within heads, down_proj's two, less than there are blocks; the last ones are shorter.
    """

    CASE = Case(
        "qwen3",
        "int8",
        changes={
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "head_dim": 96,
            "intermediate_size": 1100,
            "vocab_size": 64,
        },
    )
    PART_SEGMENTS = 4
    SHARED_LIMIT = 128 * 1024
    QUERIED = np.arange(0, 64, dtype=np.int32)[np.arange(64) % 3 > 0]  # marked by two warps
    FEW = np.arange(0, 64, 12)  # others that one block lists
    SPLIT_PARTS = False  # besides those that have to be
    HANDS_OVER = True  # tokens and candidates, in results()
    BLOCKS, BUILT_FOR = (1, 3), 1  # of grids, and of the smallest one that the build serves
    SEEDS: tuple[int, ...] = SEEDS

    def __init__(self, packed: PackedModel, cuda: Path, ring: str) -> None:
        self.tokens = case_tokens(packed, self.CASE.rows + 1)
        options = {"rows": self.CASE.rows, "shared_limit": self.SHARED_LIMIT}
        options |= {"num_slots": 2, "kv_dtype": "int8" if ring == INT8_KV_BUILD else "bf16"}
        options |= {"part_segments": self.PART_SEGMENTS, "bulk_copies": ring != COPY}
        options |= {"built_for": self.BUILT_FOR, "split_parts": self.SPLIT_PARTS}
        self.decoder = SimDecoder(packed, MAX_SEQ_LEN, cuda=cuda, **options)
        exact = SimDecoder(packed, MAX_SEQ_LEN, **options)
        self.expected = {}
        for exact.blocks in self.BLOCKS:  # as many candidates as blocks have room for
            self.expected[exact.blocks] = list(self.results(exact))

    def results(self, decoder: SimDecoder) -> Iterator[np.ndarray]:
        """Of a pass that sees one block of positions, one whose token comes by mail, three that see three.

        The first pass leaves out some of the candidates, the second none. The first and the last one have
        rows of two slots; what the first one's two wanted rows are asked for differs.
        """
        rows = self.CASE.rows
        works = [Work(1, self.tokens[:3], 0, ()), Work(0, self.tokens[3:rows], 0, ())]
        queries = {0: query(self.QUERIED, 1 / 0.8), rows - 1: query(self.QUERIED[::2])}
        for said in decoder.ask_rows(works, queries, appended=[rows - 1]).values():
            yield flat(said)
        known = decoder._queried_ids[1, : len(self.QUERIED[::2]) + 1]
        mailbox = decoder.next_mail(int(self.tokens[rows]))
        known = np.union1d(known, np.setdiff1d(np.arange(64), self.FEW))
        yield flat(decoder.listed(self.tokens[rows:], rows - 3, known, {0: 1.0}, mailbox=mailbox)[0])
        yield deep_logits(decoder, self.tokens, rows)
        works = [Work(0, self.tokens[2:4], DEEP, ()), Work(1, self.tokens[:2], 7, ())]
        yield decoder.launch(works, [1, 2])

    def start(self, name: str | None, seed: int) -> None:
        """Like a new decoder, with the mistake `name`."""
        decoder = self.decoder
        decoder.set_word("sim_mutation", -1 if name is None else list(MISTAKES).index(name))
        decoder.reset()
        decoder.seed, decoder.blocks = seed, self.BLOCKS[seed % 2]

    def is_wrong(self, name: str | None, seed: int) -> bool:
        """Whether the passes give other results or an error."""
        self.start(name, seed)
        try:
            expected = self.expected[self.decoder.blocks]
            return not all(map(same_bits, self.results(self.decoder), expected))
        except (SimError, GenerationError, NoTokenError, ValueError):
            return True

    def is_ever_wrong(self, name: str | None) -> bool:
        return any(self.is_wrong(name, seed) for seed in self.SEEDS)

    def leaves(self, name: str | None, lost: int, blocks: int) -> bool:
        """Whether all blocks leave the pass when a packet got lost and a wait gives up."""
        self.start(name, 0)
        self.decoder.blocks = blocks
        self.decoder.lost_packet, self.decoder.give_up = lost, True
        try:
            list(self.results(self.decoder))
        except (SimError, GenerationError) as raised:
            return "a wait gave up" in str(raised)
        finally:
            self.decoder.lost_packet, self.decoder.give_up = None, False
        return False

    def leaves_without_token(self, name: str | None) -> bool:
        """Whether all blocks leave a pass when the mailbox keeps the mail of the one before."""
        self.start(name, 1)
        self.decoder.give_up = True
        stale = self.decoder.next_mail(int(self.tokens[0])) - 1
        try:
            self.decoder.listed(self.tokens[:1], 0, self.QUERIED, {0: 1.0}, mailbox=stale)
        except (SimError, GenerationError, NoTokenError) as raised:
            return isinstance(raised, NoTokenError)
        finally:
            self.decoder.give_up = False
        return False


class WholeTiles(Mutable):
    """Two rows; down_proj has two parts of 44 tiles, all whole for one block, a few left over for two."""

    CASE = Case(
        "llama2",
        "int8",
        rows=2,
        changes={
            "hidden_size": 696,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "intermediate_size": 900,
            "vocab_size": 64,
        },
    )
    PART_SEGMENTS = 2

    def results(self, decoder: SimDecoder) -> Iterator[np.ndarray]:
        """And the squares of the residual stream, as OneRow's; and candidates."""
        yield deep_logits(decoder, self.tokens[:2], 2)
        yield decoder.stages()[-1]["hidden_squares"]
        yield flat(decoder.listed(self.tokens[:2], 0, self.QUERIED, {1: 1.0})[1])


class OneWhole(WholeTiles):
    """The same of one row, whose slots are taken ahead."""

    CASE = dataclasses.replace(WholeTiles.CASE, rows=1)
    SPLIT_PARTS = True

    def results(self, decoder: SimDecoder) -> Iterator[np.ndarray]:
        yield deep_logits(decoder, self.tokens[:1], 1)
        yield decoder.stages()[-1]["hidden_squares"]


class OneRow(Mutable):
    """The build for one row: down_proj's input has three parts, and some of its tiles go over two rounds.

    Of qkv_proj's, gate_up_proj's and the lm_head's two segments a warp takes one.
    """

    CASE = Case(
        "llama_biases",
        "int8",
        rows=1,
        changes={"hidden_size": 424, "head_dim": 32, "intermediate_size": 2800, "vocab_size": 64},
    )

    def results(self, decoder: SimDecoder) -> Iterator[np.ndarray]:
        """And the squares of the residual stream: roundings to bf16 hide the last bits of its sums."""
        yield deep_logits(decoder, self.tokens[:1], 1)
        yield decoder.forward(self.tokens[:1], 70, "all")  # one block of positions: nothing is merged
        yield decoder.stages()[-1]["hidden_squares"]


class OwnTurns(Mutable):
    """One row of whose down_proj's 40 segments a warp has two in turns, and one with another warp."""

    CASE = Case(
        "llama2",
        "int4",
        64,
        rows=1,
        changes={
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "intermediate_size": 10200,
            "vocab_size": 64,
            "num_hidden_layers": 2,
        },
    )
    HANDS_OVER = False

    def results(self, decoder: SimDecoder) -> Iterator[np.ndarray]:
        """And the squares of the residual stream, as OneRow's."""
        yield deep_logits(decoder, self.tokens[:1], 1)
        yield decoder.stages()[-1]["hidden_squares"]


class OwnRows(OwnTurns):
    """Rows of which each warp has a segment, the last not whole; the lm_head's units take rounds."""

    CASE = Case(
        "llama2",
        "int4",
        32,
        changes={
            "hidden_size": 4024,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "intermediate_size": 72,
            "vocab_size": 500,
            "num_hidden_layers": 2,
        },
    )
    SHARED_LIMIT = 227 * 1024
    BLOCKS, BUILT_FOR = (3, 5), 3

    def results(self, decoder: SimDecoder) -> Iterator[np.ndarray]:
        yield deep_logits(decoder, self.tokens[:8], 8)
        yield decoder.stages()[-1]["hidden_squares"]


class WideGrid(OwnTurns):
    """More blocks than qkv_proj has tiles: some that have an item of attention have none.

    In one of them a warp that keeps angles stands still while the grid goes through qkv_proj.
    """

    CASE = Case(
        "llama2",
        changes={
            "hidden_size": 32,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "intermediate_size": 72,
            "vocab_size": 64,
            "num_hidden_layers": 2,
        },
    )
    BLOCKS, BUILT_FOR = (6, 5), 5
    SEEDS = (0, 15, 52, 206)  # 15, 52, 206: such a warp is starved

    def results(self, decoder: SimDecoder) -> Iterator[np.ndarray]:
        yield deep_logits(decoder, self.tokens[:8], 8)


class Drawing(WideGrid):
    """Passes that draw tokens, of candidates that more than a lane of a warp has."""

    CASE = dataclasses.replace(
        WideGrid.CASE, changes=WideGrid.CASE.changes | {"vocab_size": 544, "num_hidden_layers": 1}
    )
    BLOCKS, BUILT_FOR = (34, 20), 20
    SEEDS = (0, 1)
    DRAWS = (
        Draw(0.6, 1.0, 0.0, 20, ()),
        Draw(0.9, 0.8, 0.0, 20, ()),
        Draw(0.3, 1.0, 0.0, 500, ()),
        Draw(0.9, 0.3, 0.0, 0, ()),
        Draw(0.9, 1.0, 0.5, 0, ()),
        Draw(0.5, 0.9999, 0.0, 0, ()),
        Draw(0.5, 1.0, 1e-9, 0, ()),
    )

    def results(self, decoder: SimDecoder) -> Iterator[np.ndarray]:
        """Also: one of the drawn tokens ends the text, and something is queried."""
        token, none = self.tokens[:1], np.zeros(0, np.int32)
        for draw in self.DRAWS:
            drawn = self.draw(decoder, none, draw)
            yield drawn
            if drawn[0] >= 0:
                yield flat(decoder.listed(token, 1, none, {0: 3.0}, mailbox=0)[0])
        end = int(self.draw(decoder, none, self.DRAWS[0]).item())
        yield self.draw(decoder, none, self.DRAWS[0]._replace(end_token_ids=(1, 2, 3, end)))
        yield self.draw(decoder, np.array([5]), self.DRAWS[0])

    def draw(self, decoder: SimDecoder, ids: np.ndarray, how: Draw) -> np.ndarray:
        decoder.listed(self.tokens[:1], 0, ids, {0: 3.0}, draw=how)
        drawn = decoder.drawn()
        return np.array([-1 if drawn is None else drawn], np.float32)


@pytest.fixture(scope="module")
def mutable(
    pack: Callable[[Case], PackedModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Mutable]:
    """The mutable build with a ring or for one row, made once."""
    cuda = mutable_source(tmp_path_factory.mktemp("mutable") / "cuda", SOURCES, MISTAKES)

    @functools.cache
    def make(name: str) -> Mutable:
        kinds = {
            ONE_ROW: OneRow,
            WHOLE: WholeTiles,
            ONE_WHOLE: OneWhole,
            OWN_TURNS: OwnTurns,
            OWN_ROWS: OwnRows,
            WIDE_GRID: WideGrid,
            DRAWING: Drawing,
        }
        kind = kinds.get(name, Mutable)
        return kind(pack(kind.CASE), cuda, name if kind is Mutable else BULK)

    return make


@pytest.mark.parametrize(
    "ring", [BULK, COPY, INT8_KV_BUILD, ONE_ROW, WHOLE, ONE_WHOLE, OWN_TURNS, OWN_ROWS, WIDE_GRID, DRAWING]
)
def test_no_mutation_is_right(mutable: Callable[[str], Mutable], ring: str) -> None:
    """In a child too, where mistakes are tried."""
    build = mutable(ring)
    assert search(lambda: build.is_ever_wrong(None)) == NOT_FOUND


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(mutable: Callable[[str], Mutable], name: str) -> None:
    """A mistake gives other logits, or an error, under one of a few seeds."""
    build = mutable(MUTATIONS[name][0])
    assert search(lambda: build.is_ever_wrong(name)) != NOT_FOUND


@pytest.mark.parametrize("place", SEEN)
def test_a_barrier_less_is_found(mutable: Callable[[str], Mutable], place: str) -> None:
    build = mutable(ring_of(place))
    assert search(lambda: build.is_ever_wrong(place)) != NOT_FOUND


def leaves_always(build: Mutable, name: str | None) -> bool:
    blocks = build.BLOCKS[0]
    left = all(build.leaves(name, lost, blocks) for lost in lost_packets(build.decoder).values())
    if not build.HANDS_OVER:
        return left
    left = left and all(
        build.leaves(name, lost, blocks=3) for lost in lost_hand_overs(build.decoder).values()
    )
    return left and build.leaves_without_token(name)


@pytest.mark.parametrize("ring", [BULK, COPY, OWN_ROWS])
def test_no_mutation_leaves(mutable: Callable[[str], Mutable], ring: str) -> None:
    assert leaves_always(mutable(ring), None)


@pytest.mark.parametrize("name", [*LEAVING, *(f"vote {place}" for place in VOTES)])
def test_a_bad_leave_is_found(mutable: Callable[[str], Mutable], name: str) -> None:
    """Where a part of the block does not hear that a wait gave up, the block does not leave as one."""
    build = mutable(LEAVING[name][0] if name in LEAVING else ring_of(name.removeprefix("vote ")))
    assert search(lambda: not leaves_always(build, name)) != NOT_FOUND


def test_all_barriers_are_mutated() -> None:
    """None is written in a way that the sweep does not see."""
    assert count_barriers(SOURCES) == len(BARRIERS) == len(SEEN) + len(UNSEEN)


COVERED = {  # together these run every line
    "biases, parts, batches of packets, given up": (
        BULK,
        Case(
            "llama_biases",
            "int4",
            32,
            rows=8,
            blocks=1,
            changes={
                "hidden_size": 528,
                "num_attention_heads": 8,
                "num_key_value_heads": 1,
                "head_dim": 80,
                "intermediate_size": 400,
            },
        ),
    ),
    "tied bf16, given up": (COPY, Case("smollm2", "bf16", rows=2, blocks=2)),
    "tied int8, norm of q and k, given up": (
        BULK,
        Case("qwen3", "int8", rows=4, changes={"intermediate_size": 1100}),
    ),
    "windows, int8 keys and values": (COPY, Case("qwen2", "int4", rows=1, changes={"head_dim": 32})),
    "sums carried over rounds, all parts in a block, given up": (BULK, OneRow.CASE),
    "segments of a warp's own, given up": (BULK, OwnTurns.CASE),
    "the same in bf16": (COPY, dataclasses.replace(OwnTurns.CASE, dtype="bf16")),
    "rows of a warp's own segment, given up": (BULK, dataclasses.replace(OwnRows.CASE, rows=2)),
}
COVERED_PARTS = {
    "biases, parts, batches of packets, given up": 1,
    "sums carried over rounds, all parts in a block, given up": 4,
}


def run_all(decoder: SimDecoder, tokens: np.ndarray, gives_up: bool) -> None:
    """Passes of all kinds; if `gives_up`, those too that end in an error, each in its place."""
    for seed in (0, 28):  # all copies late, some of them
        decoder.seed = seed
        deep_logits(decoder, tokens, decoder.rows)
    decoder.forward(tokens, 0, "none")
    decoder.finish_rows(np.ones((1, decoder.config.hidden_size), np.float32))
    if decoder.rows > 1:
        decoder.launch([Work(1, tokens[:1], 0, ()), Work(0, tokens[1:2], DEEP, ())], [0])
    fill_cache(decoder, MAX_SEQ_LEN - 1)
    decoder.launch([Work(0, tokens[:1], MAX_SEQ_LEN - 1, ())], [0])  # the cache ends within a tile
    decoder.listed(tokens, 0, [3, 7], {0: 1.0}, append=True)
    mailbox = decoder.next_mail(int(tokens[0]), append=True)
    decoder.listed(tokens[:1], 0, [3, 7], {0: 1.0}, mailbox=mailbox)
    for top_k in (500, 1):  # more than are listed, and one, which the pass behind gets
        decoder.listed(tokens[:1], 0, [], {0: 1.0}, draw=Draw(0.5, 0.9, 0.0, top_k, ()))
    decoder.listed(tokens[:1], 1, [], {0: 1.0}, mailbox=0)
    if not gives_up:
        return
    decoder.give_up = True
    with pytest.raises(NoTokenError):
        decoder.listed(tokens[:1], 0, [3, 7], {0: 1.0}, mailbox=mailbox)
    for lost in lost_packets(decoder).values():
        decoder.lost_packet = lost
        with pytest.raises(GenerationError, match="a wait gave up"):
            deep_logits(decoder, tokens, decoder.rows)
    decoder.lost_packet = None
    decoder._arrays["norm"][...] = 3e38
    with pytest.raises(GenerationError, match="non-finite"):
        deep_logits(decoder, tokens, decoder.rows)


def test_every_line_runs(pack: Callable[[Case], PackedModel]) -> None:
    """gcov finds no line of cuda/ that runs nowhere: not the pauses, not a single wait that gives up."""
    counts: dict[tuple[str, int], int] = {}
    for name, (ring, case) in COVERED.items():
        packed = pack(case)
        options = {"test_pauses": True, "stage_times": True, "coverage": True}
        options["shared_limit"] = LARGE_SHARED_LIMIT  # eight rows of all tiles in one block need it
        decoder = SimDecoder(
            packed,
            MAX_SEQ_LEN,
            rows=case.rows,
            blocks=case.blocks,
            bulk_copies=ring == BULK,
            part_segments=COVERED_PARTS.get(name),
            kv_dtype="int8" if "int8 keys" in name else "bf16",
            num_slots=2,
            **options,
        )
        run_all(decoder, case_tokens(packed, case.rows), name.endswith("given up"))
        for file, lines in decoder.coverage().items():
            for line, count in lines.items():
                counts[file, line] = max(counts.get((file, line), 0), count)
    assert {file for file, _ in counts} == SOURCES.keys()
    # A template that no build uses has no lines to gcov.
    wanted = (
        "copy_async|copy_bulk|mbarrier|global_timer_ns|_threads<|carry\\[.?parity|before \\+=|await_packet\\("
    )
    pattern = re.compile(f"^ .*({wanted})")
    used = [
        (name, i)
        for name, text in SOURCES.items()
        for i, line in enumerate(text.splitlines(), 1)
        if pattern.match(line)
    ]
    assert [place for place in used if place not in counts] == []
    assert sorted(place for place, count in counts.items() if count == 0) == []
