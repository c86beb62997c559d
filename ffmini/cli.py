"""The command `ffmini`: text on stdout, everything else on stderr; a failure is one line and a status."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, bench, convert, info
from .checkpoint import resolve_model
from .errors import FFMiniError
from .model import Completion, Model, Stream, bundled_model_path, load
from .tokenizer import Tokenizer

with contextlib.suppress(ImportError):  # some builds of Python lack it: a line of a chat can't be edited then
    import readline  # noqa: F401

INTERRUPTED = 130  # 128 + SIGINT and 128 + SIGPIPE, as a shell reports them
BROKEN_PIPE = 141
OPTIONS = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop"),
    "prompt_lookup_num_tokens",
)
CHAT_HELP = """/help   this text
/reset  forget the conversation
/stats  tokens and speed of the last answer
/exit   leave, as the end of input (Ctrl-D) does
Ctrl-C stops an answer."""


class _Parser(argparse.ArgumentParser):
    """Refuses arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_error(text: object) -> None:
    _say(f"ffmini: {' '.join(str(text).splitlines())}")


# ---- generate ------------------------------------------------------------------------------------------


def _add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of everything that makes text; what is left out is up to the model."""
    parser.add_argument("-m", "--model", help="model directory or org/name (default: the bundled model)")
    info.add_model_arguments(parser)
    parser.add_argument("-n", "--max-new-tokens", type=int, metavar="N", help="at most (default: 256)")
    parser.add_argument("-t", "--temperature", type=float, metavar="T", help="0: the most likely token")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely; 0: all")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the top share P; 1: all")
    parser.add_argument("--min-p", type=float, metavar="P", help="drop what is P times less likely; 0: none")
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help="1: none")
    parser.add_argument("--seed", type=int, metavar="S", help="of the random numbers (default: drawn)")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before TEXT; may be repeated")
    parser.add_argument(
        "--prompt-lookup",
        dest="prompt_lookup_num_tokens",
        type=int,
        metavar="N",
        help="guess up to N tokens from earlier text: the same text, faster where it repeats itself",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message; takes a model with a chat template")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of Model.stream; None where the model's default is meant."""
    return {name: getattr(args, name) for name in OPTIONS}


def _read_prompt(args: argparse.Namespace) -> str:
    """The prompt of `generate`; a file or stdin loses the newline that ends its last line."""
    if (args.prompt is None) == (args.file is None):
        raise ValueError("expected a prompt, - for stdin or -f FILE, and one of them only")
    if args.file is None and args.prompt != "-":
        return args.prompt
    name, data = ("stdin", sys.stdin.buffer.read()) if args.file is None else _read_file(args.file)
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8, found byte 0x{data[error.start]:02x}") from None


def _read_file(file: Path) -> tuple[str, bytes]:
    return str(file), file.read_bytes()


def _load(args: argparse.Namespace, messages: Sequence[dict[str, str]]) -> Model:
    """The model; one that can't take `messages` is refused before its weights are loaded."""
    if messages:
        directory = bundled_model_path() if args.model is None else resolve_model(args.model)
        Tokenizer(directory).render_chat(messages)
    return load(args.model, args.device, args.dtype, args.max_seq_len, kv_dtype=args.kv_dtype)


def _summary(completion: Completion) -> str:
    """Counts and speeds of one answer."""
    usage, timings = completion.usage, completion.timings
    cached = f" ({usage.cached_tokens} known)" if usage.cached_tokens else ""
    return (
        f"prompt: {usage.prompt_tokens} tokens{cached}, {timings.prompt_tokens_per_second:.1f} tokens/s; "
        f"generation: {usage.completion_tokens} tokens, {timings.generation_tokens_per_second:.1f} tokens/s; "
        f"end: {completion.finish_reason}; seed: {completion.seed}"
    )


def run_generate(args: argparse.Namespace) -> int:
    """Print the continuation of a prompt on stdout, piece by piece or as one JSON object."""
    prompt = _read_prompt(args)
    messages = _messages(args.system, {"role": "user", "content": prompt}) if args.system is not None else []
    with _load(args, messages) as model:
        stream = model.stream(model.encode_chat(messages) if messages else prompt, **_options(args))
        for piece in stream:
            if not args.json:
                _write(piece)
        completion = _finished(stream)
        if args.json:
            facts = {"model": args.model or bundled_model_path().name, "dtype": model.dtype}
            facts |= {"kv_dtype": model.kv_dtype, "device": model.device}
            result = asdict(completion)
            del result["logprobs"]  # no argument asks for them
            _write(json.dumps({**facts, **result}, ensure_ascii=False, indent=1))
        _write("\n")
        _say(_summary(completion))
    return 0


def _messages(system: str | None, *others: dict[str, str]) -> list[dict[str, str]]:
    """Messages that begin with the system's, if there is one."""
    return [*([] if system is None else [{"role": "system", "content": system}]), *others]


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _finished(stream: Stream) -> Completion:
    assert stream.completion is not None  # the loop over it has ended
    return stream.completion


# ---- chat ----------------------------------------------------------------------------------------------


class Chat:
    """A conversation on the terminal, or by lines of stdin."""

    def __init__(self, model: Model, system: str | None, options: dict[str, Any]) -> None:
        self._model = model
        self._options = options
        self._first = _messages(system)
        self._messages = list(self._first)
        self._last: Completion | None = None

    def loop(self) -> None:
        """Answer line after line until the end of input or /exit. Ctrl-C ends an answer, or a line."""
        while True:
            try:
                line = _read_line()
                if line is None or line == "/exit":
                    return
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._answer(line)
            except KeyboardInterrupt:
                _say("\n(/exit leaves)")
            except (FFMiniError, ValueError) as error:
                _say_error(error)

    def _command(self, line: str) -> None:
        if line == "/help":
            _say(CHAT_HELP)
        elif line == "/reset":
            self._messages, self._last = list(self._first), None
            _say("(new conversation)")
        elif line == "/stats":
            _say(self._stats())
        else:
            _say(f"{line.split()[0]}: no such command; /help lists them")

    def _stats(self) -> str:
        if self._last is None:
            return "no answer yet"
        used = f"context: {self._last.usage.total_tokens} of {self._model.max_seq_len} tokens"
        return f"{used}; {_summary(self._last)}"

    def _answer(self, text: str) -> None:
        """Stream the answer to `text`. What an interrupted answer has shown stays in the history."""
        messages = [*self._messages, {"role": "user", "content": text}]
        shown: list[str] = []
        try:
            with self._model.stream(self._model.encode_chat(messages), **self._options) as stream:
                for piece in stream:
                    shown.append(piece)
                    _write(piece)
            self._last = _finished(stream)
            _write("\n")
            _say(_summary(self._last))
        finally:
            if shown:
                self._messages = [*messages, {"role": "assistant", "content": "".join(shown)}]


def _read_line() -> str | None:
    """The next line without spaces round it, None at the end of input; a terminal gets a prompt."""
    interactive = sys.stdin.isatty()
    prompt = "> " if interactive else ""
    if interactive and not sys.stdout.isatty():  # stdout is for the text, and input() would write to it
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt).strip()
    except EOFError:
        return None


def run_chat(args: argparse.Namespace) -> int:
    """Talk until the end of input."""
    with _load(args, _messages(args.system, {"role": "user", "content": "hello"})) as model:
        if sys.stdin.isatty():
            _say("/help lists the commands")
        Chat(model, args.system, _options(args)).loop()
    return 0


# ---- the command ---------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """The parser of `ffmini`; each command leaves the function that runs it in `run`."""
    parser = _Parser(prog="ffmini", description="Language models on one GPU, without PyTorch.")
    parser.add_argument("--version", action="version", version=f"ffmini {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    description = "Continue a prompt. The text goes to stdout, its figures to stderr."
    generate = commands.add_parser("generate", help="continue a prompt", description=description)
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help="text, or - to read it from stdin")
    generate.add_argument("-f", "--file", type=Path, metavar="FILE", help="read the prompt from a file")
    _add_generation_arguments(generate)
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    generate.set_defaults(run=run_generate)
    description = "Talk to a model that has a chat template.\n\n" + CHAT_HELP
    chat = commands.add_parser(
        "chat",
        help="talk to a model",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_generation_arguments(chat)
    chat.set_defaults(run=run_chat)
    info.add_parser(commands)
    bench.add_parser(commands)
    convert.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's arguments) asks for; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character still gets the rest
    args = make_parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _say_error(message)
            status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        status = BROKEN_PIPE
    except KeyboardInterrupt:
        _say_error("interrupted")
        status = INTERRUPTED
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        _say_error(f"{error.filename}: {error.strerror}" if named else error)
        status = 1
    except (FFMiniError, ValueError, TypeError, MemoryError) as error:
        _say_error(error)
        status = 1
    _drop_unwritten()
    return status


def _drop_unwritten() -> None:
    """Point stdout to nowhere if what it still holds can't be written: Python would complain at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
