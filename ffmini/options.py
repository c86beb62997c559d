"""The options of generate, stream and chat: their names, defaults, ranges and aliases, in one table."""

from __future__ import annotations

import difflib
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

from .config import GenerationDefaults

ALIASES = {"max_tokens": "max_new_tokens", "repeat_penalty": "repetition_penalty"}
MAX_BIAS = 1e6
_LISTS = ("stop", "stop_token_ids")  # whose values may be lists


@dataclass(frozen=True)
class GenerationOptions:
    """What one generation does, checked and complete; the defaults here are those of a model that names none.

    The logits of a step pass through these in order: repetition_penalty, presence_penalty,
    frequency_penalty, logit_bias, the ban on ending before min_new_tokens, temperature, top_k, top_p, min_p.
    """

    max_new_tokens: int = 256  # at most so many new tokens, the one that ends the text included
    min_new_tokens: int = 0  # until then EOS and stop_token_ids can't be chosen
    temperature: float = 0.0  # divides the logits; 0: greedy, the most likely token (lowest id of equals)
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the most likely tokens until their probability reaches top_p; 1: all
    min_p: float = 0.0  # keep tokens at least min_p times as likely as the most likely one; 0: all
    repetition_penalty: float = 1.0  # tokens of prompt and text: logit / penalty if positive, else * penalty
    presence_penalty: float = 0.0  # taken off the logit of every token that the new text has
    frequency_penalty: float = 0.0  # taken off once per occurrence in the new text
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit; -inf bans
    seed: int | None = None  # of the random numbers; None: drawn, and reported in the Completion
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    stop_token_ids: tuple[int, ...] = ()  # end the text like EOS
    ignore_eos: bool = False  # EOS is a token like any other
    prompt_lookup_num_tokens: int = 0  # guess up to so many tokens from earlier text; alters the speed alone
    logprobs: int | None = None  # report log-probabilities of the chosen token and of the n most likely


class OptionsDict(TypedDict, total=False):
    """The keyword arguments of generate, stream and chat for type checkers; None means the default."""

    max_new_tokens: int | None
    max_tokens: int | None
    min_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    repeat_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Iterable[str] | None
    stop_token_ids: int | Iterable[int] | None
    ignore_eos: bool | None
    prompt_lookup_num_tokens: int | None
    logprobs: int | None


def resolve_options(
    defaults: GenerationDefaults, given: Mapping[str, Any], vocab_size: int
) -> GenerationOptions:
    """The options of one call: `given` over the model's `defaults`; a value of None counts as not given.

    Raises TypeError for an unknown name (naming the nearest) and for an option given twice under two
    names, ValueError for a value of the wrong type or out of range.
    """
    values: dict[str, Any] = {
        "temperature": defaults.temperature,
        "top_k": defaults.top_k,
        "top_p": defaults.top_p,
        "min_p": defaults.min_p,
        "repetition_penalty": defaults.repetition_penalty,
    }
    asked = _canonical_names(given)
    values.update(asked)
    checked = {name: _CHECKS[name](name, value) for name, value in values.items()}
    options = GenerationOptions(**checked)
    _check_token_ids("stop_token_ids", options.stop_token_ids, vocab_size)
    _check_token_ids("logit_bias", options.logit_bias, vocab_size)
    if options.logprobs is not None and options.logprobs > vocab_size:
        raise ValueError(f"logprobs must be at most the vocab_size {vocab_size}, not {options.logprobs}")
    if options.min_new_tokens > options.max_new_tokens:
        found = f"{options.min_new_tokens} and {options.max_new_tokens}"
        raise ValueError(f"min_new_tokens must not exceed max_new_tokens, found {found}")
    idle = [name for name in ("top_k", "top_p", "min_p") if name in asked]
    if options.temperature == 0 and idle and "temperature" not in asked:
        warnings.warn(
            f"{', '.join(idle)}: no effect, this model's default is greedy; give a temperature too",
            stacklevel=4,
        )
    return options


def split_options(given: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """`given` for each of `count` prompts: a list or tuple holds one value per prompt, None for the default.

    stop and stop_token_ids may be lists themselves: one of them holds one value per prompt if there is a list
    or tuple in it. Anything else is for all prompts. ValueError for a list of another length.
    """
    split: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in given.items():
        is_list = isinstance(value, (list, tuple))
        if is_list and name in _LISTS:
            is_list = any(isinstance(item, (list, tuple)) for item in value)
        if is_list and len(value) != count:
            raise ValueError(
                f"{name}: a list of {count} values, one per prompt, expected, found {len(value)}"
            )
        for i, options in enumerate(split):
            options[name] = value[i] if is_list else value
    return split


def _canonical_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` without Nones and with aliases replaced."""
    known = [f.name for f in fields(GenerationOptions)]
    asked: dict[str, Any] = {}
    for name, value in given.items():
        canonical = ALIASES.get(name, name)
        if canonical not in known:
            nearest = difflib.get_close_matches(name, [*known, *ALIASES], n=1, cutoff=0.0)[0]
            raise TypeError(f"unknown option {name!r}; the nearest is {nearest!r}")
        if value is None:
            continue
        if canonical in asked:
            raise TypeError(f"{canonical} was given twice, once under an alias")
        asked[canonical] = value
    return asked


def _check_token_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name}: token id {token} is outside the vocabulary of {vocab_size}")


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _integer(low: int, high: float = math.inf) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if not _is_int(value) or not low <= value <= high:
            upto = "" if high == math.inf else f" and at most {high}"
            raise ValueError(f"{name} must be an integer of at least {low}{upto}, not {value!r}")
        return int(value)

    return check


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _number(low: float, high: float) -> Callable[[str, Any], float]:
    # The bounds keep float32 logits finite. A comparison with NaN is false, so NaN is refused too.
    def check(name: str, value: Any) -> float:
        if not _is_number(value) or not low <= value <= high:
            raise ValueError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
        return float(value)

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")
    return value


def _strings(name: str, value: Any) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, Iterable) or isinstance(items, bytes):
        raise ValueError(f"{name} must be a string or a list of strings, not {value!r}")
    items = tuple(items)
    for item in items:
        if not isinstance(item, str) or not item:
            raise ValueError(f"{name} must hold non-empty strings, not {item!r}")
    return items


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    items = (value,) if _is_int(value) else value
    if not isinstance(items, Iterable):
        raise ValueError(f"{name} must be a token id or a list of them, not {value!r}")
    items = tuple(items)
    for item in items:
        if not _is_int(item):
            raise ValueError(f"{name} must hold token ids, not {item!r}")
    return tuple(int(item) for item in items)


def _biases(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must map token ids to numbers, not {value!r}")
    for token, bias in value.items():
        if not _is_int(token):
            raise ValueError(f"{name} must have token ids as keys, not {token!r}")
        if not _is_number(bias) or not (abs(bias) <= MAX_BIAS or bias == -math.inf):
            expected = f"a number from -{MAX_BIAS:g} to {MAX_BIAS:g} or -inf"
            raise ValueError(f"{name}: the bias of token {token} must be {expected}, not {bias!r}")
    return {int(token): float(bias) for token, bias in value.items()}


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_new_tokens": _integer(1),
    "min_new_tokens": _integer(0),
    "temperature": _number(0, 1000),
    "top_k": _integer(0),
    "top_p": _number(0, 1),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.001, 1000),
    "presence_penalty": _number(-1000, 1000),
    "frequency_penalty": _number(-1000, 1000),
    "logit_bias": _biases,
    "seed": _integer(0, 2**64 - 1),
    "stop": _strings,
    "stop_token_ids": _token_ids,
    "ignore_eos": _flag,
    "prompt_lookup_num_tokens": _integer(0),
    "logprobs": _integer(0),
}
