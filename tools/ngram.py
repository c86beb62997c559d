"""What the bundled model has to beat: an interpolated n-gram model with modified Kneser-Ney smoothing.

    python tools/ngram.py --data fairy_tales.txt --tokenizer models/tales-7m/tokenizer.json

It sees the same tokens of the same books as tools/train.py (its validation tales included) and prints
perplexity and bits per byte on the same held-out book.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from train import CONFIG, EOS_ID, encode_tales, read_books, split_tales

BITS = 12  # of one token in the integer code of an n-gram: five of them fit into an int64


@dataclass(frozen=True)
class Order:
    """One order's part of the model; codes are ascending int64, the first token in the highest bits."""

    ngrams: np.ndarray  # [n] codes of the n-grams seen
    discounted: np.ndarray  # [n] (count - discount) / total count of the context
    contexts: np.ndarray  # [m] codes of the n-grams without their last token
    backoff: np.ndarray  # [m] the share of probability that goes to the next lower order


def ngram_codes(tokens: np.ndarray, order: int) -> np.ndarray:
    """Codes of all n-grams of a token sequence, int64 [len(tokens) - order + 1]."""
    codes = np.zeros(len(tokens) - order + 1, dtype=np.int64)
    for i in range(order):
        codes = codes << BITS | tokens[i : len(tokens) - order + 1 + i]
    return codes


def discounts(counts: np.ndarray) -> np.ndarray:
    """Chen and Goodman's discounts for counts of 0, 1, 2 and at least 3."""
    n1, n2, n3, n4 = (int((counts == i).sum()) for i in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    return np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])


def make_order(ngrams: np.ndarray, counts: np.ndarray) -> Order:
    """Discounted probabilities and back-off weights from the counts of one order's n-grams."""
    discount = discounts(counts)[np.minimum(counts, 3)]
    contexts, first, group = np.unique(ngrams >> BITS, return_index=True, return_inverse=True)
    totals = np.add.reduceat(counts, first)
    backoff = np.add.reduceat(discount, first) / totals
    return Order(ngrams, (counts - discount) / totals[group], contexts, backoff)


def build(tokens: np.ndarray, order: int) -> list[Order]:
    """Orders 1 to order; below the highest, an n-gram counts once for each different token before it."""
    ngrams, counts = np.unique(ngram_codes(tokens, order), return_counts=True)
    orders = [make_order(ngrams, counts)]
    for n in range(order - 1, 0, -1):
        ngrams, counts = np.unique(ngrams & ((1 << BITS * n) - 1), return_counts=True)
        orders.append(make_order(ngrams, counts))
    return orders[::-1]


def lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, missing: float) -> np.ndarray:
    """values at the ascending keys equal to wanted, and missing elsewhere."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], missing)


def probabilities(orders: list[Order], tokens: np.ndarray) -> np.ndarray:
    """p(token | the tokens before it), float64, for all but the first len(orders) - 1 tokens."""
    count = len(tokens) - len(orders) + 1
    result = np.full(count, 1.0 / CONFIG["vocab_size"])
    for n, order in enumerate(orders, start=1):
        codes = ngram_codes(tokens, n)[-count:]
        share = lookup(order.contexts, order.backoff, codes >> BITS, missing=1.0)
        result = lookup(order.ngrams, order.discounted, codes, missing=0.0) + share * result
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the text file given to tools/train.py")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json of the bundled model")
    parser.add_argument("--order", type=int, choices=range(2, 6), default=5)
    args = parser.parse_args()
    books, held_out = read_books(args.data)
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    stream, _ = encode_tales(tokenizer, split_tales(books))
    orders = build(stream.numpy(), args.order)
    ids = tokenizer.encode(held_out, add_special_tokens=False).ids
    history = [EOS_ID] * (args.order - 1)  # a book begins where a tale has ended
    nats = -float(np.log(probabilities(orders, np.array(history + ids))).sum())
    print(
        f"{args.order}-gram of {len(stream)} tokens: {', '.join(str(len(o.ngrams)) for o in orders)} n-grams"
    )
    print(f"held out: {len(ids)} tokens, {len(held_out.encode())} bytes")
    bits = nats / math.log(2) / len(held_out.encode())
    print(f"perplexity {math.exp(nats / len(ids)):.3f} per token, {bits:.4f} bits per byte")


if __name__ == "__main__":
    main()
