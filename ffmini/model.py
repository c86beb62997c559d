"""The public face: load a model, turn prompts into text, whole or piece by piece."""

from __future__ import annotations

import re
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from . import gpu
from .checkpoint import resolve_model
from .config import GenerationDefaults, ModelConfig, load_config, load_generation_defaults
from .convert import pack_checkpoint
from .cpu import CPUDecoder
from .engine import Decoder, Engine
from .errors import BusyError, CheckpointError, DeviceError, UnsupportedError
from .generation import Completion, Run
from .layout import FORMATS
from .options import OptionsDict, resolve_options, split_options
from .packing import PackedModel, is_packed, read_packed, weights_digest
from .passes import check_kv_dtype
from .resources import resource_dir
from .snapshot import read_snapshot, write_snapshot
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

Prompt = str | Sequence[int] | np.ndarray  # text, or token ids [n]

DEFAULT_MAX_SEQ_LEN = 4096
MAX_BATCH_SIZE = 16


class _OpenStream(ABC):
    """What the streams of one and of several prompts have in common."""

    def __init__(self, model: Model, runs: Sequence[Run]) -> None:
        self._model = model  # not its decoder: a stream that is kept must not keep the weights
        self._runs = runs
        self._left = {run: i for i, run in enumerate(runs) if run.goes_on}
        self._pieces: deque[tuple[int, str]] = deque()  # not yet given out, with the number of the prompt

    @property
    def is_open(self) -> bool:
        """Whether more text may come from the model, which is busy until then."""
        return bool(self._left)

    def close(self) -> None:
        """Give the model back; the rest of the text is never made."""
        self._left.clear()
        self._pieces.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self) -> tuple[int, str]:
        """The next piece and the number of its prompt; StopIteration if there is none."""
        with self._model._lock:
            while not self._pieces and self._left:
                try:
                    news = self._model._require_loaded().step()
                except BaseException:  # Ctrl-C too leaves the model usable
                    self.close()
                    raise
                for run, piece in news:
                    index = self._left.get(run)
                    if index is None:  # closed by another thread
                        continue
                    if piece:
                        self._pieces.append((index, piece))
                    if not run.goes_on:
                        self._left.pop(run, None)
                        self._note_finish(index)
            if not self._pieces:
                raise StopIteration
            return self._pieces.popleft()

    @abstractmethod
    def _note_finish(self, index: int) -> None:
        """Keep the result of prompt number `index`, which has ended."""


class Stream(_OpenStream, Iterator[str]):
    """The text of one generation piece by piece, each piece valid UTF-8 and not empty.

    The model is busy until the stream is exhausted, closed (`close`, or a with block), interrupted, or
    no longer referred to. `completion` is the whole result once the stream is exhausted, None before.
    """

    def __init__(self, model: Model, run: Run) -> None:
        self.completion: Completion | None = None
        super().__init__(model, [run])
        if not run.goes_on:
            self._note_finish(0)

    def __next__(self) -> str:
        try:
            return self._next()[1]
        except StopIteration:
            error, self._runs[0].error = self._runs[0].error, None  # raised once
            if error is not None:
                raise error from None
            raise

    def __enter__(self) -> Stream:
        return self

    def _note_finish(self, index: int) -> None:
        if self._runs[0].error is None:
            self.completion = self._runs[0].completion()


class BatchStream(_OpenStream, Iterator[tuple[int, str]]):
    """The texts of several prompts as they come: (number of the prompt, piece), no piece empty.

    As a Stream it keeps the model busy. `completions` holds the results of those that have finished, None for
    the others, also for those that were closed.
    """

    def __init__(self, model: Model, runs: Sequence[Run]) -> None:
        self.completions: list[Completion | None] = [None] * len(runs)
        super().__init__(model, runs)
        for i, run in enumerate(runs):
            if not run.goes_on:
                self._note_finish(i)

    def close(self, index: int | None = None) -> None:
        """End the text of prompt number `index`, so that a waiting one takes its place; or, without, all."""
        if index is None:
            super().close()
            return
        run = self._runs[index]
        with self._model._lock:
            self._pieces = deque(item for item in self._pieces if self._runs[item[0]] is not run)
            if self._left.pop(run, None) is not None and self._model._engine is not None:
                self._model._engine.drop(run)

    def __next__(self) -> tuple[int, str]:
        return self._next()

    def __enter__(self) -> BatchStream:
        return self

    def _note_finish(self, index: int) -> None:
        self.completions[index] = self._runs[index].completion()


class Model:
    """A loaded model.

    Calls from several threads wait for each other; while a stream is open they raise BusyError. A context
    manager: leaving the block closes the model. The options of generate, stream and chat are the
    fields of `ffmini.options.GenerationOptions` as keywords, with the aliases max_tokens and repeat_penalty.
    Those that sampling needs default to the model's generation_config.json, or to greedy decoding.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        defaults: GenerationDefaults,
        dtype: str,
        weights: str | None = None,
    ) -> None:
        """Use `ffmini.load`; this puts together parts that are loaded already. `weights`: their digest."""
        self.config: ModelConfig = decoder.config
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.device: str = decoder.device
        self.max_seq_len: int = decoder.max_seq_len
        self.max_batch_size: int = decoder.num_slots
        self.kv_dtype: str = decoder.kv_dtype
        self._decoder: Decoder | None = decoder
        self._engine: Engine | None = Engine(decoder)
        self._defaults = defaults
        self._weights = weights
        self._lock = threading.Lock()
        self._stream: weakref.ref[Stream | BatchStream] | None = None

    @overload
    def generate(self, prompt: Prompt, **options: Unpack[OptionsDict]) -> Completion: ...

    @overload
    def generate(self, prompt: Sequence[Prompt], **options: Any) -> list[Completion]: ...

    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Completion | list[Completion]:
        """Continue `prompt`: text, or token ids that are taken as they are (no BOS is added).

        A list of prompts gives a list of Completions, each what its prompt gives alone with the same seed:
        max_batch_size (see load) of them are under way together, the others take the places of those that
        end. An option may then be a list or tuple of one value per prompt; stop and stop_token_ids, which
        may be lists themselves, are that if there is a list or tuple in them.

        Raises TypeError for an unknown option, ValueError for a bad one, for an empty prompt, for ids
        outside the vocabulary and for a prompt longer than the context, BusyError while a stream is open,
        GenerationError if a pass fails; in a list the Completion of that prompt says so instead. DeviceError
        if the GPU's kernel has to be compiled for so many rows and can't be.
        """
        is_batch = _is_batch(prompt)
        runs = self._runs(prompt if is_batch else [prompt], options, is_batch)
        with self._lock:
            engine = self._require_free()
            engine.start(runs, ahead=True)
            try:
                while engine.busy:
                    engine.step()
            finally:
                engine.stop()
        if is_batch:
            return [run.completion() for run in runs]
        if runs[0].error is not None:
            raise runs[0].error
        return runs[0].completion()

    @overload
    def stream(self, prompt: Prompt, **options: Unpack[OptionsDict]) -> Stream: ...

    @overload
    def stream(self, prompt: Sequence[Prompt], **options: Any) -> BatchStream: ...

    def stream(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Stream | BatchStream:
        """Like `generate`, but an iterator over pieces of the text, for a list of prompts over (i, piece).

        Errors in the arguments raise at once.
        """
        is_batch = _is_batch(prompt)
        runs = self._runs(prompt if is_batch else [prompt], options, is_batch)
        with self._lock:
            engine = self._require_free()
            engine.start(runs, ahead=False)  # a reader that pauses would keep a pass waiting
            stream = BatchStream(self, runs) if is_batch else Stream(self, runs[0])
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
            return self._require_free().logits(ids)

    def save_cache(self, path: str | Path) -> int:
        """Write the keys and values of the last sequence to a safetensors file; returns how many tokens'.

        `load_cache` gives them to a model of the same weights and kv_dtype, on any device. The file is there
        whole or not at all. Raises ValueError if nothing has been computed, BusyError while a stream is open,
        OSError.
        """
        with self._lock:
            snapshot = self._require_free().read_slot()
        if snapshot is None:
            raise ValueError("keys and values of a sequence expected, nothing has been computed yet")
        write_snapshot(Path(path), snapshot, self._cache_origin(), self.kv_dtype)
        return len(snapshot.tokens)

    def load_cache(self, path: str | Path) -> int:
        """Read what `save_cache` wrote, so that prompts that begin with its tokens need not compute them.

        Returns how many tokens those are. Raises CheckpointError if the file is damaged, comes from other
        weights, has another kv_dtype or does not fit max_seq_len, BusyError while a stream is open.
        """
        with self._lock:
            engine = self._require_free()
            origin = self._cache_origin(), self.kv_dtype
            snapshot = read_snapshot(Path(path), *origin, self.config, self.max_seq_len)
            try:
                engine.write_slot(snapshot)
            except ValueError as error:
                raise CheckpointError(f"{path}: {error}") from None
        return len(snapshot.tokens)

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
            decoder, self._decoder, self._engine = self._decoder, None, None
            if decoder is not None:
                decoder.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cache_origin(self) -> str:
        """What keys and values depend on besides their tokens."""
        if self._weights is None:
            raise ValueError("a model made by ffmini.load expected: this one's weights are not known")
        if self.config.rope.type == "dynamic":  # its base depends on the context
            return f"{self._weights} with max_seq_len {self.max_seq_len}"
        return self._weights

    def _runs(self, prompts: Sequence[Prompt], options: Mapping[str, Any], is_batch: bool) -> list[Run]:
        """A run for each of the prompts; called by what the user calls, which warnings are to name."""
        each = split_options(options, len(prompts)) if is_batch else [options]
        runs = []
        for prompt, given in zip(prompts, each, strict=True):
            ids = self._prompt_ids(prompt)
            resolved = resolve_options(self._defaults, given, self.config.vocab_size)
            runs.append(Run(ids, resolved, self.config, self.tokenizer, self.max_seq_len))
        return runs

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

    def _require_loaded(self) -> Engine:
        if self._engine is None:
            raise ValueError("the model is closed")
        return self._engine

    def _require_free(self) -> Engine:
        engine = self._require_loaded()
        stream = None if self._stream is None else self._stream()
        if stream is not None and stream.is_open:
            raise BusyError("a stream of this model is still open: exhaust it or call its close() first")
        return engine


def _is_batch(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is a list of prompts, not one."""
    return isinstance(prompt, (list, tuple)) and any(
        isinstance(item, (str, list, tuple, np.ndarray)) for item in prompt
    )


def load(
    path: str | Path | None = None,
    device: str = "auto",
    dtype: str | None = None,
    max_seq_len: int | None = None,
    max_batch_size: int = 1,
    kv_dtype: str = "bf16",
) -> Model:
    """Load a model from a Hugging Face or packed directory or, as "org/name", from the Hugging Face cache.

    path: None for the bundled model.
    device: "cpu", "cuda", "cuda:N", or "auto": the GPU if one is usable, and on stderr why if not.
    dtype: "bf16" (a Hugging Face directory's default), "int8" or "int4"; a packed directory has its own.
    max_seq_len: tokens of context to make room for; by default 4096 or the model's limit if that is less.
    max_batch_size: how many sequences to make room for, of max_seq_len tokens each, 1 to 16.
    kv_dtype: how keys and values are kept, "bf16" or "int8" (codes with a scale per head and position).

    Raises CheckpointError for damaged or missing files, UnsupportedError for a model that ffmini can't run,
    DeviceError for a GPU that can't be used, MemoryBudgetError if it doesn't fit, ValueError for arguments.
    """
    if dtype is not None and dtype not in FORMATS:
        raise ValueError(f"dtype must be one of {', '.join(FORMATS)}, not {dtype!r}")
    check_batch_size(max_batch_size)
    check_kv_dtype(kv_dtype)
    ordinal = choose_device(device)
    directory = bundled_model_path() if path is None else resolve_model(path)
    config = load_config(directory)
    max_seq_len = context_length(config, max_seq_len)
    tokenizer = Tokenizer(directory)
    defaults = load_generation_defaults(directory)
    packed = load_packed(directory, dtype)
    decoder = make_decoder(packed, ordinal, max_seq_len, max_batch_size, kv_dtype)
    slots = "" if max_batch_size == 1 else f"{max_batch_size} slots of "
    cache = gpu.kv_cache_bytes(config, max_batch_size * max_seq_len, kv_dtype)
    _say(
        f"{directory.name} ({packed.format}) on {decoder.device}, {slots}context {max_seq_len}, "
        f"KV cache {cache / 2**20:.1f} MiB in {kv_dtype}"
    )
    return Model(decoder, tokenizer, defaults, packed.format, weights_digest(packed))


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


def make_decoder(
    packed: PackedModel, ordinal: int | None, max_seq_len: int, num_slots: int = 1, kv_dtype: str = "bf16"
) -> Decoder:
    """The decoder for `packed` on GPU number `ordinal`, or on the CPU for None."""
    if ordinal is None:
        return CPUDecoder(packed, max_seq_len, num_slots, kv_dtype=kv_dtype)
    return gpu.GPUDecoder(packed, max_seq_len, ordinal, num_slots=num_slots, kv_dtype=kv_dtype)


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


def check_batch_size(size: int) -> None:
    """Raise ValueError unless so many sequences can be made room for."""
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_BATCH_SIZE:
        raise ValueError(f"max_batch_size must be an integer from 1 to {MAX_BATCH_SIZE}, not {size!r}")


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
        done = _last_model[1].generate(prompt, **options)
    if not isinstance(done, Completion):
        raise ValueError("one prompt expected, found a list: Model.generate takes several")
    return done.text
