"""Text to token ids and back: tokenizer.json, streaming, chat templates."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import tokenizers

from .config import read_json, refuse_lfs_pointer, regular_file_size, shorten
from .errors import CheckpointError, UnsupportedError

MAX_TOKENIZER_BYTES = 256 * 2**20
_MIN_JINJA = (3, 1, 5)  # older sandboxes are known to leak
_CONTEXT_TOKENS = 8  # of the prompt, before a stream: more than enough for one character and its neighbours
_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not UTF-8, a partial character included


class Tokenizer:
    """The tokenizer of a Hugging Face directory: tokenizer.json and, if present, tokenizer_config.json."""

    def __init__(self, directory: Path) -> None:
        """Read the files in `directory`; CheckpointError names one that is missing or damaged."""
        self._directory = directory
        self._file = directory / "tokenizer.json"
        self._backend = _load_backend(self._file)
        config_file = directory / "tokenizer_config.json"
        config = read_json(config_file) if _is_there(config_file) else {}
        self.special_tokens = _special_tokens(config, config_file)
        self._chat_template = _find_chat_template(directory, config, config_file)
        bos = self.special_tokens.get("bos_token")
        self.bos_token_id: int | None = None if bos is None else self._backend.token_to_id(bos)
        # Also the trial that a damaged post-processor does not survive.
        prefix = self._guard(self._backend.encode, "a").ids[:1]
        self._adds_bos = bool(config.get("add_bos_token")) and prefix != [self.bos_token_id]
        if self._adds_bos and self.bos_token_id is None:
            raise CheckpointError(
                f"{config_file}: add_bos_token is true, but bos_token {shorten(bos)} is no token"
            )

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the tokenizer knows, added ones included; the model's may be larger."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with BOS and the like where the model wants them unless told otherwise."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text is not valid Unicode: lone surrogate at character {error.start}"
            ) from None
        ids = self._guard(self._backend.encode, text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self._adds_bos:
            return [self.bos_token_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token `ids`: U+FFFD for bytes that are not UTF-8, nothing for ids that are no token."""
        return self._guard(self._backend.decode, ids, skip_special_tokens=skip_special_tokens)

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """A TextStream for tokens that follow those of `prompt`."""
        return TextStream(self, prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of `messages` up to where the assistant's answer begins."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """What the chat template makes of `messages`, dicts with "role" and "content".

        Raises UnsupportedError if the model has no template or jinja2 is missing, ValueError for messages
        that are malformed or that the template refuses, CheckpointError for a template that is damaged.
        """
        messages = _plain_messages(messages)
        if self._chat_template is None:
            raise UnsupportedError(
                f"{self._directory}: the model has no chat template (neither chat_template.jinja nor "
                "chat_template in tokenizer_config.json); give it a plain prompt with generate"
            )
        source, template = self._chat_template
        return _render(source, template, {**self.special_tokens, "messages": messages})

    def _guard(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return _guard(self._file, function, *args, **kwargs)


class TextStream:
    """Turns tokens into text piece by piece; a character whose bytes are not all there yet is held back.

    The pieces and the final `flush` add up to what the tokens add to the text of the prompt: unlike
    `decode` of the new tokens alone, that keeps the space at which a SentencePiece text begins.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-_CONTEXT_TOKENS:])  # tokens already shown, then those held back
        self._shown = tokenizer.decode(self._window)
        self._held = len(self._window)  # where in the window the held-back tokens begin

    def push(self, token: int) -> str:
        """Text that `token` completes, often just its own, "" if its last character is still partial."""
        self._window.append(token)
        text = self._new_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._window = self._window[self._held :]
        self._held = len(self._window)
        self._shown = self._tokenizer.decode(self._window)
        return text

    def flush(self) -> str:
        """The text of what is still held back, U+FFFD for incomplete characters; ends the stream."""
        text = self._new_text()
        self._window, self._shown, self._held = [], "", 0
        return text

    def _new_text(self) -> str:
        text = self._tokenizer.decode(self._window)
        if text.startswith(self._shown):
            return text[len(self._shown) :]
        # The prompt ends inside a character; or a bad byte follows, for which a byte-fallback decoder turns
        # the whole run of bytes into U+FFFD. What was shown stays; the new tokens are read on their own.
        return self._tokenizer.decode(self._window[self._held :])


def _guard(file: Path, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the tokenizers library; what it raises, a Rust panic (no Exception) included, names `file`."""
    try:
        return function(*args, **kwargs)
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{file}: damaged or not a tokenizer: {reason}") from None
        raise


def _load_backend(file: Path) -> tokenizers.Tokenizer:
    size = regular_file_size(file)
    if size > MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"{file}: expected at most {MAX_TOKENIZER_BYTES} bytes, found {size}")
    data = _read(file)
    refuse_lfs_pointer(file, data)
    backend = _guard(file, tokenizers.Tokenizer.from_buffer, data)
    # Settings of somebody's training run; they would cut or lengthen prompts silently.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _is_there(file: Path) -> bool:
    """Whether there is a `file`, a broken link included: that one is an error, not the absence of a file."""
    return file.exists() or file.is_symlink()


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: expected a readable file, found: {error.strerror}") from None


def _special_tokens(config: Mapping[str, Any], file: Path) -> dict[str, str]:
    """bos_token, eos_token and so on of tokenizer_config.json, each a string or a dict with its content."""
    tokens = {}
    for name, value in config.items():
        if not name.endswith("_token") or isinstance(value, bool) or value is None:
            continue
        content = value.get("content") if isinstance(value, dict) else value
        if not isinstance(content, str):
            raise CheckpointError(
                f"{file}: {name}: expected a string or a dict with content, found {shorten(value)}"
            )
        tokens[name] = content
    return tokens


def _find_chat_template(
    directory: Path, config: Mapping[str, Any], config_file: Path
) -> tuple[Path, str] | None:
    """The chat template and the file that it comes from; None if the model has none."""
    file = directory / "chat_template.jinja"
    if _is_there(file):
        data = _read(file)
        refuse_lfs_pointer(file, data)
        try:
            return file, data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: expected UTF-8, found byte 0x{data[error.start]:02x}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        if "default" not in named:
            raise CheckpointError(
                f"{config_file}: chat_template: expected one named 'default', found {list(named)}"
            )
        template = named["default"]
    if template is None:
        return None
    if not isinstance(template, str):
        found = type(template).__name__
        raise CheckpointError(f"{config_file}: chat_template: expected a string, found {found}")
    return config_file, template


def _plain_messages(messages: Any) -> list[dict[str, Any]]:
    """A copy of `messages` in plain JSON types: a template must not get hold of anything with methods."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError('messages must be a non-empty list of dicts with "role" and "content"')
    for i, message in enumerate(messages):
        if (
            not isinstance(message, Mapping)
            or not isinstance(message.get("role"), str)
            or "content" not in message
        ):
            raise ValueError(f'messages[{i}] must be a dict with "role" and "content", not {message!r}')
    try:
        return json.loads(json.dumps([dict(message) for message in messages]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"messages must hold strings, numbers, lists and dicts only: {error}") from None


def _render(source: Path, template: str, variables: Mapping[str, Any]) -> str:
    """`template`, read from `source`, rendered in jinja2's sandbox as Hugging Face does."""
    jinja2 = _import_jinja()
    try:
        compiled = _environment(jinja2).from_string(template)
    except jinja2.TemplateError as error:
        raise CheckpointError(
            f"{source}: chat template does not parse: {' '.join(str(error).split())}"
        ) from None
    try:
        return compiled.render(add_generation_prompt=True, tools=None, documents=None, **variables)
    except Exception as error:  # a template is a program and can fail in any way
        raise ValueError(
            f"{source}: chat template refused the messages: {' '.join(str(error).split())}"
        ) from None


def _import_jinja() -> Any:
    """The jinja2 module with its sandbox and extensions; UnsupportedError if it is missing or too old."""
    try:
        import jinja2.ext
        import jinja2.sandbox

        found = metadata.version("jinja2")
    except ImportError:
        found = "none"
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:3])
    if numbers < _MIN_JINJA:
        wanted = ".".join(map(str, _MIN_JINJA))
        raise UnsupportedError(
            f"chat needs jinja2 {wanted} or newer, found {found}: pip install 'ffmini[chat]'"
        )
    return jinja2


def _environment(jinja2: Any) -> Any:
    """A sandboxed environment that renders templates as Hugging Face does."""

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks text to train on; for rendering it is as if it were not there."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Unlike jinja2's own, this one does not escape for HTML.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
