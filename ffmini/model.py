"""The public face: load a model, turn prompts into text, whole or piece by piece."""

from __future__ import annotations

import re
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from . import gpu
from .candidates import Query
from .checkpoint import resolve_model
from .config import GenerationDefaults, ModelConfig, load_config, load_generation_defaults
from .convert import pack_checkpoint
from .cpu import CPUDecoder
from .errors import BusyError, DeviceError, GenerationError, UnsupportedError
from .layout import FORMATS
from .options import GenerationOptions, OptionsDict, resolve_options
from .packing import PackedModel, is_packed, read_packed
from .passes import Work
from .resources import resource_dir
from .sampler import Sampler, TokenLogprobs
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

Decoder = CPUDecoder | gpu.GPUDecoder
Prompt = str | Sequence[int] | np.ndarray  # text, or token ids [n]

DEFAULT_MAX_SEQ_LEN = 4096
PROMPT_CHUNK = 512  # rows per call of the decoder, between which Ctrl-C is noticed


@dataclass(frozen=True)
class Usage:
    """How many tokens went in and came out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True)
class Timings:
    """Wall time inside ffmini. The prompt's pass yields the first token, so the rate counts the others."""

    prompt_seconds: float
    prompt_tokens_per_second: float
    generation_seconds: float
    generation_tokens_per_second: float  # 0 if there is no second token


@dataclass(frozen=True)
class Completion:
    """What a model made of a prompt."""

    text: str  # what the new tokens add to the prompt: no special tokens, cut before a stop string
    tokens: list[int]  # all new tokens, those of a stop string and the one that ended the text included
    finish_reason: str  # "stop": EOS, stop_token_ids, stop string; "length": max_new_tokens or a full context
    usage: Usage
    timings: Timings
    logprobs: list[TokenLogprobs] | None  # one per new token, if asked for
    seed: int  # gives the same text again on the same device and build


class StopFilter:
    """Cuts text before the stop string that is complete first, however the text comes in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._stops = stops
        self._held = ""  # could be the beginning of a stop string

    def push(self, piece: str) -> str:
        """The text that can be shown now that `piece` has come; nothing more once `stopped` is set."""
        self._held += piece
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        cut = min(found)[1] if found else len(self._held) - self._partial()
        shown, self._held = self._held[:cut], "" if found else self._held[cut:]
        return shown

    def flush(self) -> str:
        """The text that was held back in vain."""
        shown, self._held = self._held, ""
        return shown

    def _partial(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


class _Run:
    """One generation under way: the loop of pass, sample, decode, taken one token at a time."""

    def __init__(self, model: Model, prompt: np.ndarray, options: GenerationOptions, ahead: bool) -> None:
        """`ahead`: each step follows the one before at once, so passes may begin in advance."""
        self.finish_reason: str | None = None
        self._model = model  # not its decoder: a run that is kept must not keep the weights
        self._prompt = prompt
        self._ahead = ahead
        self._budget = min(options.max_new_tokens, model.max_seq_len - len(prompt))
        self._sampler = Sampler(options, prompt, model.config.eos_token_ids, model.config.vocab_size)
        self._pieces = model.tokenizer.stream(prompt.tolist())
        self._filter = StopFilter(options.stop)
        self._has_stops = len(options.stop) > 0
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None if options.logprobs is None else []
        self._text: list[str] = []
        self._begun = False  # whether the next token's pass is
        self._prompt_seconds = self._generation_seconds = 0.0
        if self._budget == 0:
            self.finish_reason = "length"

    def step(self) -> str:
        """Make one more token; returns the text that can be shown now. Not to be called after the finish."""
        began = perf_counter()
        if not self._begun:
            self._begin()
        [[said]] = self._model._decoder.candidates()
        if not said.finite:
            raise GenerationError("non-finite logits: finite numbers expected from every pass")
        token, logprobs = self._sampler.sample(said)
        self._begun = False
        if not self._tokens:
            self._prompt_seconds, began = perf_counter() - began, perf_counter()
        self._tokens.append(token)
        if self._surely_goes_on(token):
            self._begin()  # the text can wait while the pass runs
        if self._logprobs is not None and logprobs is not None:
            self._logprobs.append(logprobs)
        shown = self._show(token)
        self._text.append(shown)
        self._generation_seconds += perf_counter() - began
        return shown

    def completion(self) -> Completion:
        """The result; only after the finish."""
        assert self.finish_reason is not None
        prompt, new = len(self._prompt), len(self._tokens)
        timings = Timings(
            self._prompt_seconds,
            prompt / self._prompt_seconds if self._prompt_seconds else 0.0,
            self._generation_seconds,
            (new - 1) / self._generation_seconds if new > 1 else 0.0,
        )
        return Completion(
            text="".join(self._text),
            tokens=self._tokens,
            finish_reason=self.finish_reason,
            usage=Usage(prompt, new, prompt + new),
            timings=timings,
            logprobs=self._logprobs,
            seed=self._sampler.seed,
        )

    def _surely_goes_on(self, token: int) -> bool:
        """Whether another token follows `token` at once, whatever the text is."""
        ends = token in self._sampler.end_token_ids or len(self._tokens) == self._budget
        return self._ahead and not ends and not self._has_stops

    def _begin(self) -> None:
        """Start the passes of the prompt, or of the newest token, for the sampler's query."""
        decoder, query = self._model._decoder, self._sampler.query()
        prompt, new = len(self._prompt), len(self._tokens)
        ahead = self._ahead and new + 1 < self._budget
        if new == 0:
            _begin_prompt(decoder, self._prompt, query, ahead)
        else:
            decoder.begin([Work(0, np.array(self._tokens[-1:]), prompt + new - 1, (query,))], ahead)
        self._begun = True

    def _show(self, token: int) -> str:
        """Text that becomes visible with `token`; sets finish_reason if it is the last one."""
        ends = token in self._sampler.end_token_ids
        shown = "" if ends else self._filter.push(self._pieces.push(token))
        if not self._filter.stopped and (ends or len(self._tokens) == self._budget):
            shown += self._filter.push(self._pieces.flush())
            if not self._filter.stopped:
                shown += self._filter.flush()
                self.finish_reason = "stop" if ends else "length"
        if self._filter.stopped:
            self.finish_reason = "stop"
        return shown


class Stream(Iterator[str]):
    """The text of one generation piece by piece, each piece valid UTF-8 and not empty.

    The model is busy until the stream is exhausted, closed (`close`, or a with block), interrupted, or
    no longer referred to. `completion` is the whole result once the stream is exhausted, None before.
    """

    def __init__(self, model: Model, run: _Run) -> None:
        self.completion: Completion | None = None
        self._model = model
        self._run = run
        self._closed = False
        self._note_finish()

    @property
    def is_open(self) -> bool:
        """Whether more text may come."""
        return not self._closed

    def close(self) -> None:
        """Give the model back; the rest of the text is never made."""
        self._closed = True

    def __next__(self) -> str:
        with self._model._lock:
            while self.is_open:
                try:
                    self._model._require_loaded()
                    piece = self._run.step()
                except BaseException:  # Ctrl-C too leaves the model usable
                    self.close()
                    raise
                self._note_finish()
                if piece:
                    return piece
        raise StopIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _note_finish(self) -> None:
        if self._run.finish_reason is not None:
            self.completion = self._run.completion()
            self.close()


class Model:
    """A loaded model.

    Calls from several threads wait for each other; while a stream is open they raise BusyError. A context
    manager: leaving the block closes the model. The options of generate, stream and chat are the
    fields of `ffmini.options.GenerationOptions` as keywords, with the aliases max_tokens and repeat_penalty.
    Those that sampling needs default to the model's generation_config.json, or to greedy decoding.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, defaults: GenerationDefaults, dtype: str
    ) -> None:
        """Use `ffmini.load`; this puts together parts that are loaded already."""
        self.config: ModelConfig = decoder.config
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.device: str = decoder.device
        self.max_seq_len: int = decoder.max_seq_len
        self._decoder: Decoder | None = decoder
        self._defaults = defaults
        self._lock = threading.Lock()
        self._stream: weakref.ref[Stream] | None = None

    def generate(self, prompt: Prompt, **options: Unpack[OptionsDict]) -> Completion:
        """Continue `prompt`: text, or token ids that are taken as they are (no BOS is added).

        Raises TypeError for an unknown option, ValueError for a bad one, for an empty prompt, for ids
        outside the vocabulary and for a prompt longer than the context, BusyError while a stream is open,
        GenerationError if a pass fails.
        """
        ids, resolved = self._prompt_ids(prompt), self._resolve(options)
        with self._lock:
            self._require_free()
            run = _Run(self, ids, resolved, ahead=True)
            try:
                while run.finish_reason is None:
                    run.step()
            finally:
                self._decoder.settle()
        return run.completion()

    def stream(self, prompt: Prompt, **options: Unpack[OptionsDict]) -> Stream:
        """Like `generate`, but an iterator over pieces of the text; errors in the arguments raise at once."""
        ids, resolved = self._prompt_ids(prompt), self._resolve(options)
        with self._lock:
            self._require_free()
            # Not ahead: a reader that pauses would keep a pass waiting.
            stream = Stream(self, _Run(self, ids, resolved, ahead=False))
            self._stream = weakref.ref(stream)
        return stream

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[OptionsDict]) -> Completion:
        """The answer to `messages`, dicts with "role" ("system", "user" or "assistant") and "content".

        Raises, besides what `generate` raises, UnsupportedError if the model has no chat template or
        jinja2 is missing, and ValueError for messages that the template refuses.
        """
        return self.generate(self.encode_chat(messages), **options)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt that `chat` makes of `messages`, to be given to `generate` or `stream`."""
        return self.tokenizer.encode_chat(messages)

    def logits(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits (float32 [n, vocab_size]) after each of the ids `tokens` [n], 1 <= n <= max_seq_len."""
        ids = self._prompt_ids(self._checked_ids(tokens))
        with self._lock:
            self._require_free()
            out = np.empty((len(ids), self.config.vocab_size), np.float32)
            for start in range(0, len(ids), PROMPT_CHUNK):
                rows = slice(start, start + PROMPT_CHUNK)
                out[rows] = self._decoder.forward(ids[rows], start, "all")
        return out

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with BOS where the model wants it unless told otherwise."""
        return self.tokenizer.encode(text, add_special_tokens)

    def decode(self, tokens: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """Text of token ids, U+FFFD where bytes are not UTF-8; ValueError for ids not in the vocabulary."""
        return self.tokenizer.decode(self._checked_ids(tokens).tolist(), skip_special_tokens)

    def close(self) -> None:
        """Free the memory of weights and cache; an open stream raises at its next piece.

        Closing twice is fine.
        """
        with self._lock:
            decoder, self._decoder = self._decoder, None
            if decoder is not None:
                decoder.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _resolve(self, options: Mapping[str, Any]) -> GenerationOptions:
        return resolve_options(self._defaults, options, self.config.vocab_size)

    def _prompt_ids(self, prompt: Prompt) -> np.ndarray:
        """`prompt` as token ids [n], n from 1 to max_seq_len."""
        if isinstance(prompt, str):
            ids = self._checked_ids(self.encode(prompt) if prompt else [])
        else:
            ids = self._checked_ids(prompt)
        if len(ids) == 0:
            raise ValueError("the prompt is empty: expected at least one token")
        if len(ids) > self.max_seq_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, the context (max_seq_len) {self.max_seq_len}"
            )
        return ids

    def _checked_ids(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """`tokens` as int64 [n], each inside the vocabulary."""
        ids = np.asarray(tokens)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            found = f"{type(tokens).__name__} {ids.dtype}"
            raise ValueError(f"expected text or a flat list of token ids, found {found}")
        outside = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if outside.size:
            raise ValueError(f"token id {outside[0]} is outside the vocabulary of {self.config.vocab_size}")
        return ids.astype(np.int64)

    def _require_loaded(self) -> None:
        if self._decoder is None:
            raise ValueError("the model is closed")

    def _require_free(self) -> None:
        self._require_loaded()
        stream = None if self._stream is None else self._stream()
        if stream is not None and stream.is_open:
            raise BusyError("a stream of this model is still open: exhaust it or call its close() first")


def load(
    path: str | Path | None = None,
    device: str = "auto",
    dtype: str | None = None,
    max_seq_len: int | None = None,
) -> Model:
    """Load a model from a Hugging Face or packed directory or, as "org/name", from the Hugging Face cache.

    path: None for the bundled model.
    device: "cpu", "cuda", "cuda:N", or "auto": the GPU if one is usable, and on stderr why if not.
    dtype: "bf16" (a Hugging Face directory's default), "int8" or "int4"; a packed directory has its own.
    max_seq_len: tokens of context to make room for; by default 4096 or the model's limit if that is less.

    Raises CheckpointError for damaged or missing files, UnsupportedError for a model that ffmini can't run,
    DeviceError for a GPU that can't be used, MemoryBudgetError if it doesn't fit, ValueError for arguments.
    """
    if dtype is not None and dtype not in FORMATS:
        raise ValueError(f"dtype must be one of {', '.join(FORMATS)}, not {dtype!r}")
    ordinal = choose_device(device)
    directory = bundled_model_path() if path is None else resolve_model(path)
    config = load_config(directory)
    max_seq_len = context_length(config, max_seq_len)
    tokenizer = Tokenizer(directory)
    defaults = load_generation_defaults(directory)
    packed = load_packed(directory, dtype)
    decoder = make_decoder(packed, ordinal, max_seq_len)
    _say(
        f"{directory.name} ({packed.format}) on {decoder.device}, context {max_seq_len}, "
        f"KV cache {gpu.kv_cache_bytes(config, max_seq_len) / 2**20:.1f} MiB"
    )
    return Model(decoder, tokenizer, defaults, packed.format)


def bundled_model_path() -> Path:
    """The directory of the model that comes with ffmini."""
    models = sorted(file.parent for file in resource_dir("models").glob("*/config.json"))
    if len(models) != 1:
        raise UnsupportedError(f"{resource_dir('models')}: expected one bundled model, found {len(models)}")
    return models[0]


def context_limit(config: ModelConfig) -> int:
    """The longest context that `config` provides for, in tokens.

    Scaled rope stretches the length that the model was trained on; whether max_position_embeddings is the
    length before or after that depends on who wrote the file, so the larger one counts.
    """
    factor = config.rope.params.get("factor") or 1.0
    trained = config.rope.params.get("original_max_position_embeddings") or config.max_position_embeddings
    return max(config.max_position_embeddings, int(trained * factor))


def make_decoder(packed: PackedModel, ordinal: int | None, max_seq_len: int) -> Decoder:
    """The decoder for `packed` on GPU number `ordinal`, or on the CPU for None."""
    if ordinal is None:
        return CPUDecoder(packed, max_seq_len)
    return gpu.GPUDecoder(packed, max_seq_len, ordinal)


def choose_device(device: str) -> int | None:
    """The number of the GPU that `device` (see load) means, or None for the CPU.

    ValueError for another word, DeviceError for a GPU that was asked for and can't be used.
    """
    if device == "cpu":
        return None
    match = re.fullmatch(r"auto|cuda(?::(\d{1,3}))?", device)
    if match is None:
        raise ValueError(f'device must be "auto", "cpu", "cuda" or "cuda:N", not {device!r}')
    ordinal = int(match[1] or 0)
    reason = gpu.why_unusable(ordinal)
    if reason is None:
        return ordinal
    if device != "auto":
        raise DeviceError(f"device {device!r}: {reason}")
    _say(f"running on the CPU: {reason}")
    return None


def context_length(config: ModelConfig, asked: int | None) -> int:
    """Tokens of context to make room for: `asked`, or load's default; ValueError beyond the limit."""
    limit = context_limit(config)
    if asked is None:
        return min(DEFAULT_MAX_SEQ_LEN, limit)
    if isinstance(asked, bool) or not isinstance(asked, int) or not 1 <= asked <= limit:
        raise ValueError(f"max_seq_len must be an integer from 1 to the model's limit {limit}, not {asked!r}")
    return asked


def load_packed(directory: Path, dtype: str | None) -> PackedModel:
    """The weights of `directory`, mapped if it is packed, else packed in memory; dtype as in load."""
    if not is_packed(directory):
        return pack_checkpoint(directory, dtype or "bf16")
    packed = read_packed(directory)
    if dtype not in (None, packed.format):
        raise ValueError(
            f"{directory} is packed as {packed.format}; {dtype!r} has to be made from its original"
        )
    return packed


def _say(text: str) -> None:
    print(f"ffmini: {text}", file=sys.stderr, flush=True)


def _begin_prompt(decoder: Decoder, ids: np.ndarray, query: Query, ahead: bool) -> None:
    """Start the passes of the token ids `ids` [n], n > 0; the decoder's candidates() follow the last."""
    last = (len(ids) - 1) // PROMPT_CHUNK * PROMPT_CHUNK
    for start in range(0, last, PROMPT_CHUNK):
        decoder.forward(ids[start : start + PROMPT_CHUNK], start, "none")
    decoder.begin([Work(0, ids[last:], last, (query,))], ahead)


_last_lock = threading.Lock()
_last_model: tuple[Path, Model] | None = None


def generate(prompt: Prompt, model: str | Path | None = None, **options: Unpack[OptionsDict]) -> str:
    """The continuation of `prompt` by `model`, a path as in `load`; options as in Model.generate.

    The model stays loaded for the next call; asking for another one closes it. Calls wait for each other.
    """
    global _last_model
    directory = (bundled_model_path() if model is None else resolve_model(model)).resolve()
    with _last_lock:
        if _last_model is None or _last_model[0] != directory:
            if _last_model is not None:
                _last_model[1].close()
                _last_model = None
            _last_model = directory, load(directory)
        return _last_model[1].generate(prompt, **options).text
