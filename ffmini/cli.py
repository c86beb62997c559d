"""The command `ffmini`: text on stdout, everything else on stderr; a failure is one line and a status."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, TextIO

from . import __version__, bench, convert, info
from .errors import FFMiniError, UnsupportedError
from .layout import FORMATS
from .model import Completion, Model, Prompt, choose_device, load, load_packed
from .shapes import SHAPES

CHAT_HELP = "/help this list   /reset forget the conversation   /stats tokens and speed   /exit leave"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C)."""
    warnings.showwarning = _show_warning
    try:
        args = make_parser().parse_args(argv)
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader left; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except (FFMiniError, OSError, ValueError, TypeError) as error:
        say(f"error: {' '.join(str(error).split())}")
        return 1


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run` to the function that takes its arguments."""
    parser = argparse.ArgumentParser(prog="ffmini", description="One language model, fast, without PyTorch.")
    parser.add_argument("--version", action="version", version=f"ffmini {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    generate = commands.add_parser("generate", help="continue a prompt")
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help='the text to continue; "-": from stdin')
    generate.add_argument("-f", "--file", metavar="FILE", help="read the prompt from FILE")
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    _add_model(generate)
    _add_sampling(generate)
    generate.set_defaults(run=run_generate)

    chat = commands.add_parser("chat", help="talk to a model that has a chat template")
    _add_model(chat)
    _add_sampling(chat)
    chat.set_defaults(run=run_chat)

    facts = commands.add_parser("info", help="what this machine has, and what a model needs")
    _add_model(facts)
    facts.set_defaults(run=run_info)

    _add_bench(commands)
    convert.add_parser(commands)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", help="directory, or org/name in the Hugging Face cache")
    parser.add_argument("--dtype", choices=FORMATS, help="format of the projections (default: bf16)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--max-seq-len", type=int, metavar="N", help="tokens of context to make room for")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--max-new-tokens", type=int, metavar="N", help="default: 256")
    parser.add_argument("-t", "--temperature", type=float, metavar="T", help="0: greedy")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--min-p", type=float, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, metavar="X")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before TEXT; may be repeated")
    parser.add_argument("--system", metavar="TEXT", help="a system message; needs a chat template")


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("bench", help="measure speed, or the perplexity of a text")
    _add_model(parser)
    parser.add_argument("--random", choices=SHAPES, help="a known shape with random weights")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=512, metavar="N", help="0: leave out")
    parser.add_argument("-n", "--generate-tokens", type=int, default=128, metavar="N", help="0: leave out")
    parser.add_argument("-d", "--depth", type=int, default=0, metavar="N", help="random K and V before it")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N")
    parser.add_argument("--json", metavar="FILE", help='write the records to FILE; "-": to stdout')
    parser.add_argument("--perplexity", metavar="FILE", help="score a UTF-8 text instead")
    parser.set_defaults(run=run_bench)


# ---- generate and chat ----


def run_generate(args: argparse.Namespace) -> int:
    """`ffmini generate`: the continuation as it comes, or one JSON object."""
    text = _read_prompt(args)
    with _load(args) as model:
        prompt: Prompt = text
        if args.system is not None:
            prompt = model.encode_chat(_messages(args.system, [("user", text)]))
        options = _options(args)
        if args.json:
            completion = model.generate(prompt, **options)
            about = {"model": args.model, "dtype": model.dtype, "device": model.device}
            print(json.dumps(about | dataclasses.asdict(completion)))
        else:
            completion = _show(model, prompt, options)
            print()
    say(_speeds(completion))
    return 0


def run_chat(args: argparse.Namespace) -> int:
    """`ffmini chat`: reads lines from stdin until /exit or its end."""
    with _load(args) as model:
        model.encode_chat(_messages(args.system, [("user", "")]))  # a model that can't chat is refused now
        say(CHAT_HELP)
        turns: list[tuple[str, str]] = []
        last: Completion | None = None
        while (line := _read_line()) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                turns, last = [], None
                say("the conversation is forgotten")
            elif line == "/stats":
                say("no answer yet" if last is None else _speeds(last))
            elif line.startswith("/"):
                say(CHAT_HELP)
            elif line:
                last = _answer(model, args, turns, line) or last
    return 0


def _answer(
    model: Model, args: argparse.Namespace, turns: list[tuple[str, str]], line: str
) -> Completion | None:
    """Stream the answer to `line` and append both to `turns`; None if Ctrl-C stopped it."""
    asked = [*turns, ("user", line)]
    try:
        stream = model.stream(model.encode_chat(_messages(args.system, asked)), **_options(args))
    except ValueError as error:  # such as a conversation longer than the context: /reset helps
        say(f"error: {error}")
        return None
    pieces = []
    try:
        with stream:
            for piece in stream:
                pieces.append(piece)
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        say("(stopped)")
    print(flush=True)
    turns[:] = [*asked, ("assistant", "".join(pieces))]
    if stream.completion is not None:
        say(_speeds(stream.completion))
    return stream.completion


def _show(model: Model, prompt: Prompt, options: dict[str, Any]) -> Completion:
    with model.stream(prompt, **options) as stream:
        for piece in stream:
            print(piece, end="", flush=True)
    assert stream.completion is not None
    return stream.completion


def _read_prompt(args: argparse.Namespace) -> str:
    if (args.prompt is None) == (args.file is None):
        raise ValueError("one prompt expected: PROMPT, - for stdin, or -f FILE")
    if args.file is not None:
        return bench.read_text(args.file)
    return _decode(sys.stdin) if args.prompt == "-" else args.prompt


def _decode(stdin: TextIO) -> str:
    try:
        return stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin: UTF-8 text expected, found {error.reason} at byte {error.start}") from error


def _read_line() -> str | None:
    """The next line, stripped; None at the end of stdin. Ctrl-C at the prompt only says how to leave."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            say("(/exit or Ctrl-D leaves)")
            continue
        return line.strip() if line else None


def _messages(system: str | None, turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": role, "content": content} for role, content in turns]


def _options(args: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
    return {name: getattr(args, name) for name in names}


def _load(args: argparse.Namespace) -> Model:
    return load(args.model, device=args.device, dtype=args.dtype, max_seq_len=args.max_seq_len)


def _speeds(completion: Completion) -> str:
    usage, timings = completion.usage, completion.timings
    return (
        f"prompt {usage.prompt_tokens} tokens, {timings.prompt_tokens_per_second:.1f} tokens/s; "
        f"generation {usage.completion_tokens} tokens, {timings.generation_tokens_per_second:.1f} tokens/s; "
        f"seed {completion.seed}, finished by {completion.finish_reason}"
    )


# ---- info and bench ----


def run_info(args: argparse.Namespace) -> int:
    """`ffmini info`: the machine, and with -m the model."""
    lines = info.device_lines()
    if args.model is not None:
        lines += info.model_lines(args.model, args.dtype, args.max_seq_len, args.device)
    print("\n".join([f"ffmini           {__version__}", *lines]))
    return 0


def run_bench(args: argparse.Namespace) -> int:
    """`ffmini bench`: a line per test, or perplexity and bits per byte."""
    if args.perplexity is not None:
        if args.random is not None:
            raise UnsupportedError("--perplexity needs a trained model, found --random")
        text = bench.read_text(args.perplexity)
        with _load(args) as model:
            per_token, bits = bench.perplexity(model, text)
        print(f"perplexity {per_token:.3f} per token, {bits:.4f} bits per byte")
        return 0
    if min(args.prompt_tokens, args.generate_tokens, args.depth, args.repetitions - 1) < 0:
        raise ValueError("-p, -n and -d must be at least 0, -r at least 1")
    ordinal = choose_device(args.device)
    if args.random is not None:
        shape, packed = args.random, bench.random_model(args.random, args.dtype or "bf16")
    else:
        directory = bench.model_directory(args.model)
        shape, packed = directory.name, load_packed(directory, args.dtype)
    records = []
    for record in bench.measure(
        packed,
        shape,
        ordinal,
        prompt=args.prompt_tokens,
        generate=args.generate_tokens,
        depth=args.depth,
        repetitions=args.repetitions,
    ):
        records.append(record)
        print(bench.line(record), file=sys.stderr if args.json == "-" else sys.stdout, flush=True)
    if args.json is not None:
        bench.write_json(args.json, records)
    return 0


def say(text: str) -> None:
    """One line on stderr."""
    print(f"ffmini: {text}", file=sys.stderr, flush=True)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {message}")
