"""The command line: what goes to stdout, what to stderr, exit statuses, Ctrl-C, and a chat on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_model import CONFIG, ORDER, write_tokenizer
from tiny import tiny_tensors, write_safetensors

import ffmini
from ffmini import generation, info
from ffmini.cli import main
from ffmini.convert import convert, pack_checkpoint
from ffmini.model import Model, load

ROOT = Path(__file__).parent.parent
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
COMMAND = [sys.executable, "-m", "ffmini"]


def write_model(directory: Path, **tokenizer_config: Any) -> Path:
    """A checkpoint that never ends a text and whose most likely tokens are ASCII: they show at once."""
    directory.mkdir()
    config = {**CONFIG, "attention_bias": False, "eos_token_id": None, "max_position_embeddings": 16384}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = tiny_tensors(config)
    silent = [token for token in range(CONFIG["vocab_size"]) if token >= len(ORDER) or ORDER[token] > "~"]
    tensors["model.embed_tokens.weight"][silent] = 0
    write_safetensors(directory / "model.safetensors", tensors)
    write_tokenizer(directory, **tokenizer_config)
    return directory


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template."""
    return write_model(tmp_path_factory.mktemp("plain") / "plain")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one."""
    return write_model(tmp_path_factory.mktemp("talker") / "talker", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def model(talker: Path) -> Model:
    return load(talker, device="cpu", max_seq_len=512)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run main() in this process: (exit status, stdout, stderr)."""

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in argv])
        except SystemExit as stop:  # argparse's
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


def errors(err: str) -> list[str]:
    """The lines of stderr but those that tell of loading."""
    return [line for line in err.splitlines() if " on cpu, context " not in line]


# ---- generate ------------------------------------------------------------------------------------------


def test_generate_prints_the_continuation(run, model, talker):
    status, out, err = run("generate", "hello", "-m", talker, "--device", "cpu", "-n", 20)
    assert (status, out) == (0, model.generate("hello", max_new_tokens=20).text + "\n")
    assert re.search(
        r"prompt: 5 tokens, \d+\.\d tokens/s; generation: 20 tokens, \d+\.\d tokens/s", errors(err)[0]
    )
    assert len(errors(err)) == 1


def test_prompt_from_stdin_and_from_a_file(run, model, talker, tmp_path, monkeypatch):
    text = "Grüße,\nzwei Zeilen"
    expected = model.generate(text, max_new_tokens=8).text + "\n"
    (tmp_path / "prompt.txt").write_text(text + "\n", encoding="utf-8")
    common = ("-m", talker, "--device", "cpu", "-n", 8)
    assert run("generate", "-f", tmp_path / "prompt.txt", *common)[:2] == (0, expected)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((text + "\n").encode())))
    assert run("generate", "-", *common)[:2] == (0, expected)


def test_options_reach_the_sampler(run, model, talker):
    options = {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "min_p": 0.001, "repetition_penalty": 1.2}
    expected = model.generate("hello", seed=3, max_new_tokens=24, **options)
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    argv = ("generate", "hello", "-m", talker, "--device", "cpu", "-n", 24, "--seed", 3, *arguments)
    assert run(*argv)[1] == expected.text + "\n"
    stop = expected.text[10:12]
    cut = expected.text[: expected.text.index(stop)]
    assert run(*argv, "--stop", "never in it", "--stop", stop)[1] == cut + "\n"
    assert run(*argv, "--seed", 4)[1] != expected.text + "\n"


def test_prompt_lookup_reaches_the_run_and_changes_no_text(run, talker, monkeypatch):
    limits = []
    make = generation.PromptLookup
    monkeypatch.setattr(
        generation, "PromptLookup", lambda tokens, most: limits.append(most) or make(tokens, most)
    )
    argv = ("generate", "hello hello hello", "-m", talker, "--device", "cpu", "-n", 24, "--seed", 3)
    assert run(*argv, "--prompt-lookup", 5)[1] == run(*argv)[1]
    assert limits == [5]


def test_json_is_one_object(run, model, talker):
    status, out, err = run(
        *("generate", "hello", "-m", talker, "--device", "cpu", "-n", 6, "--json"),
        *("--dtype", "int8", "--kv-dtype", "int8"),
    )
    found = json.loads(out)
    assert status == 0 and len(errors(err)) == 1
    assert (found["model"], found["dtype"], found["kv_dtype"]) == (str(talker), "int8", "int8")
    assert found["device"] == "cpu"
    assert (found["finish_reason"], len(found["tokens"])) == ("length", 6)
    assert model.decode(found["tokens"]) == found["text"]
    assert found["usage"] == dict(prompt_tokens=5, completion_tokens=6, total_tokens=11, cached_tokens=0)
    assert found["timings"]["generation_tokens_per_second"] > 0 and found["seed"] >= 0


def test_system_message_goes_through_the_template(run, model, talker):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    expected = model.chat(messages, max_new_tokens=9).text
    argv = ("generate", "hello", "-m", talker, "--device", "cpu", "-n", 9, "--system", "be brief")
    assert run(*argv)[:2] == (0, expected + "\n")


def test_bundled_model_is_the_default(run):
    status, out, err = run("generate", "Once upon a time", "--device", "cpu", "-n", 5, "--seed", 1)
    assert status == 0 and out.strip() and "tales-7m (bf16)" in err


def test_a_warning_is_one_line(run, talker):
    status, _, err = run("generate", "hello", "-m", talker, "--device", "cpu", "-n", 2, "--top-k", 5)
    assert status == 0
    assert (
        errors(err)[0] == "ffmini: top_k: no effect, this model's default is greedy; give a temperature too"
    )


def test_version(run):
    assert run("--version")[:2] == (0, f"ffmini {ffmini.__version__}\n")


# ---- failures: one line, a status, nothing on stdout ---------------------------------------------------

ON_CPU = ["-m", "MODEL", "--device", "cpu"]  # MODEL: one without a chat template
FAILURES = {
    "no model": (["generate", "x", "-m", "/nowhere/at/all", "--device", "cpu"], 1, "/nowhere/at/all"),
    "bad option": (["generate", "x", *ON_CPU, "--top-k", "-3"], 1, "top_k must be"),
    "bad number": (["generate", "x", "--top-k", "three"], 2, "--top-k"),
    "no prompt": (["generate", *ON_CPU], 1, "expected a prompt"),
    "two prompts": (["generate", "x", "-f", "y"], 1, "expected a prompt"),
    "empty prompt": (["generate", "", *ON_CPU], 1, "the prompt is empty"),
    "no such file": (["generate", "-f", "/nowhere.txt"], 1, "/nowhere.txt: No such file"),
    "not UTF-8": (["generate", "-f", sys.executable], 1, "expected UTF-8, found byte"),
    "lone surrogate": (["generate", "a\udcff", *ON_CPU], 1, "lone surrogate"),
    "bad context": (["generate", "x", *ON_CPU, "--max-seq-len", "0"], 1, "max_seq_len must be"),
    "long prompt": (["generate", "xyz", *ON_CPU, "--max-seq-len", "2"], 1, "the prompt has 3 tokens"),
    "bad device": (["generate", "x", "--device", "gpu"], 1, "device must be"),
    "no such GPU": (["generate", "x", "--device", "cuda:99"], 1, "cuda:99"),
    "no template": (["chat", *ON_CPU], 1, "the model has no chat template"),
    "no template for --system": (["generate", "x", "--system", "y", *ON_CPU], 1, "no chat template"),
    "no command": ([], 2, "COMMAND"),
    "unknown command": (["generat"], 2, "generat"),
    "convert": (["convert", "/nowhere", "/nowhere2", "--dtype", "int4"], 1, "/nowhere"),
    "info": (["info", "-m", "/nowhere", "--device", "cpu"], 1, "/nowhere"),
    "idle bench": (["bench", *ON_CPU, "-p", "0", "-n", "0"], 1, "nothing to measure"),
    "deep bench": (["bench", *ON_CPU, "-d", "16000"], 1, "the tests need 16512 positions"),
    "negative bench": (["bench", "-d", "-1"], 2, "expected numbers such as"),
    "no repetition": (["bench", "-r", "0"], 2, "expected a number of at least 1"),
    "random and scored": (["bench", "--random", "qwen3-0.6b", "--perplexity", "x"], 1, "random weights"),
    "random and a model": (["bench", "--random", "qwen3-0.6b", "-m", "x"], 2, "not allowed with"),
    "nothing to score": (["bench", *ON_CPU, "--perplexity", os.devnull], 1, "needs a BOS token"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_line(run, plain, name):
    argv, expected_status, words = FAILURES[name]
    status, out, err = run(*(plain if argument == "MODEL" else argument for argument in argv))
    assert (status, out) == (expected_status, "")
    assert len(errors(err)) == 1 and errors(err)[0].startswith("ffmini")
    assert words in errors(err)[0]


def test_chat_without_jinja2_says_what_to_do(run, talker, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setitem(sys.modules, "jinja2.ext", None)
    status, out, err = run("chat", "-m", talker, "--device", "cpu")
    assert (status, out) == (1, "")
    assert "pip install 'ffmini[chat]'" in err and len(err.splitlines()) == 1


# ---- processes: pipes, signals, terminals --------------------------------------------------------------


def start(*argv: object, **options: Any) -> subprocess.Popen[bytes]:
    """`python -m ffmini` with pipes."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [*COMMAND, *map(str, argv)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **(pipes | options))


def test_ctrl_c_ends_generate(talker):
    process = start("generate", "hello", "-m", talker, "--device", "cpu", "-n", 16000, "--max-seq-len", 16384)
    assert process.stdout.read(5)  # the text comes while it is made
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors(err.decode()) == ["ffmini: interrupted"]


def test_a_reader_that_leaves_is_no_error(talker):
    process = start("generate", "hello", "-m", talker, "--device", "cpu", "-n", 16000, "--max-seq-len", 16384)
    assert process.stdout.read(5)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(timeout=60) == 141
    assert errors(err) == []


def test_a_full_disk_is_one_line(talker):
    with open("/dev/full", "wb") as full:
        process = start("generate", "hello", "-m", talker, "--device", "cpu", "-n", 3, stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors(err.decode()) == ["ffmini: [Errno 28] No space left on device"]


def answers(model: Model, *texts: str, system: str | None = None, **options: Any) -> list[str]:
    """What a chat answers to `texts`, one after the other."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    made = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        made.append(model.chat(messages, **options).text)
        messages.append({"role": "assistant", "content": made[-1]})
    return made


def test_chat_by_lines(run, model, talker, monkeypatch):
    lines = "hello\n\n/stats\nand then?\n/reset\nhello\n/nonsense x\n/help\n/stats\n/exit\nnot read\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    argv = ("chat", "-m", talker, "--device", "cpu", "-n", 12, "--system", "be kind", "--max-seq-len", 512)
    status, out, err = run(*argv)
    first, second = answers(model, "hello", "and then?", system="be kind", max_new_tokens=12)
    assert first != second
    assert (status, out) == (0, f"{first}\n{second}\n{first}\n")
    lines = errors(err)
    speeds = [line for line in lines if line.startswith("prompt: ")]
    assert len(speeds) == 3 and all("generation: 12 tokens" in line for line in speeds)
    assert all(re.match(r"prompt: \d+ tokens \(\d\d+ known\), ", line) for line in speeds[1:])
    context = len(
        model.encode_chat([{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}])
    )
    stats = [line for line in lines if line.startswith("context: ")]
    assert [line.split(";")[0] for line in stats] == [f"context: {context + 12} of 512 tokens"] * 2
    assert "(new conversation)" in lines and "/nonsense: no such command; /help lists them" in lines
    assert any(line.startswith("/reset  forget") for line in lines)


def test_chat_ends_with_its_input_and_survives_errors(run, model, talker, monkeypatch):
    lines = "/stats\n" + "x" * 100 + "\nhi\n"  # the second line is longer than the context
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    status, out, err = run("chat", "-m", talker, "--device", "cpu", "-n", 4, "--max-seq-len", 40)
    assert (status, out) == (0, answers(model, "hi", max_new_tokens=4)[0] + "\n")
    assert errors(err)[:2] == [
        "no answer yet",
        "ffmini: the prompt has 117 tokens, the context (max_seq_len) 40",
    ]


def test_ctrl_c_stops_the_answer_not_the_chat(talker):
    argv = ("chat", "-m", talker, "--device", "cpu", "-n", 16000, "--max-seq-len", 16384)
    process = start(*argv)
    out, seen = process.stdout.fileno(), b""
    for _ in range(2):
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert os.read(out, 5)
        process.send_signal(signal.SIGINT)
        seen = b""
        while b"leaves)\n" not in seen:
            assert select.select([process.stderr], [], [], 60)[0], seen
            seen += os.read(process.stderr.fileno(), 4096)
        while select.select([out], [], [], 0)[0]:  # what the stopped answer has left
            assert os.read(out, 1 << 16)
    _, rest = process.communicate(b"/stats\n", timeout=60)
    assert process.returncode == 0
    assert rest.decode().splitlines() == ["no answer yet"]


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *argv: object) -> None:
        self.seen = ""
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
            os.execve(sys.executable, [*COMMAND, *map(str, argv)], environment)

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, pattern: str, typing: str = "") -> None:
        """Read until `pattern` has come since the last call; `typing` is typed again every second until then.

        A Ctrl-C that falls between the prompt and the wait for a key shows only at the next key.
        """
        since, deadline = "", time.monotonic() + 60
        while re.search(pattern, since, re.DOTALL) is None:
            assert time.monotonic() < deadline, f"{pattern!r} did not come after {self.seen + since!r}"
            if select.select([self._terminal], [], [], 1)[0]:
                since += os.read(self._terminal, 4096).decode(errors="replace")
            else:
                self.type(typing)
        self.seen += since

    def close(self) -> int:
        """The exit status."""
        try:
            while os.read(self._terminal, 4096):
                pass
        except OSError:  # Linux says EIO when the other side has closed
            pass
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_chat_on_a_terminal(talker):
    argv = ("chat", "-m", talker, "--device", "cpu", "-n", 16000, "--max-seq-len", 16384)
    terminal = Terminal(*argv)
    terminal.wait_for("> ")
    assert "/help lists the commands" in terminal.seen
    terminal.type("hello\n")
    terminal.wait_for("hello\r\n.{20}")  # in the middle of the answer
    terminal.type("\x03")
    terminal.wait_for(r"\(/exit leaves\)\r\n> ")
    terminal.type("half a line")
    terminal.wait_for("half a line")
    terminal.type("\x03")
    terminal.wait_for(r"\(/exit leaves\)\r\n> ", typing="\x03")
    terminal.type("/stats\n")
    terminal.wait_for("no answer yet\r\n> ")  # an interrupted answer has no figures
    terminal.type("\x04")
    assert terminal.close() == 0
    assert "Traceback" not in terminal.seen


# ---- info ----------------------------------------------------------------------------------------------


def test_info_names_the_machine(run):
    status, out, err = run("info")
    assert (status, err) == (0, "")
    assert out.startswith(f"ffmini  {ffmini.__version__}, Python 3.")
    assert re.search(r"^CPU     \S.* GiB of memory available$", out, re.MULTILINE)
    assert re.search(r"^(GPU     not usable: \S.*|cuda:0  \S.*sm_\d+.*free)$", out, re.MULTILINE)


def test_info_without_cupy_says_how_to_get_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    status, out, _ = run("info")
    assert status == 0
    assert "GPU     not usable: CuPy is not usable" in out and "ffmini[cuda13]" in out


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_info_counts_what_is_stored(run, talker, tmp_path, dtype):
    packed = pack_checkpoint(talker, dtype, progress=False)
    parts = info.model_parts(packed.config, packed.layouts)
    assert sum(part.nbytes for part in parts) == packed.nbytes
    by_name = {part.name: part for part in parts}
    assert by_name["lm_head"].nbytes == packed.lm_head.nbytes
    assert by_name["down_proj"].nbytes == sum(layer.down_proj.nbytes for layer in packed.layers)
    assert by_name["embed_tokens"].format == "tied"
    assert by_name["qkv_proj"].weights == 2 * 64 * 32
    argv = ("info", "--device", "cpu", "-m")
    status, from_config, _ = run(*argv, talker, "--dtype", dtype)
    convert(talker, tmp_path / "packed", dtype, progress=False)
    assert status == 0
    tables = [out[out.index("part ") :] for out in (from_config, run(*argv, tmp_path / "packed")[1])]
    assert tables[0].splitlines()[:-1] == tables[1].splitlines()[:-1]
    assert f"{packed.nbytes:,}" in tables[0]
    assert "KV cache: 128 bytes per token in bf16" in tables[0]  # 2 * 2 layers * 2 heads * 8 * 2 bytes


def test_info_counts_int8_keys_and_values(run, talker):
    """Eight codes, a scale of four bytes and four of padding; on the CPU nine floats."""
    argv = ("info", "--device", "cpu", "-m", talker, "--max-seq-len", 4096, "--kv-dtype", "int8")
    status, out, _ = run(*argv)
    assert status == 0 and "KV cache: 128 bytes per token in int8" in out
    assert "+ 1.1 MiB of KV cache for 4096 tokens on the CPU, in float32" in out
    status, _, err = run("info", "-m", talker, "--kv-dtype", "int4")
    assert status == 2 and "invalid choice: 'int4'" in err


def test_info_needs_no_weights(run, talker, tmp_path):
    (tmp_path / "config.json").write_bytes((talker / "config.json").read_bytes())
    status, out, _ = run("info", "--device", "cpu", "-m", tmp_path, "--max-seq-len", 100)
    assert status == 0 and "for 100 tokens on the CPU" in out and out.rstrip().endswith("fits")


def test_info_counts_slots(run, talker):
    status, out, _ = run(
        "info", "--device", "cpu", "-m", talker, "--max-seq-len", 4096, "--max-batch-size", 3
    )
    assert status == 0 and "3.0 MiB of KV cache for 3 sequences of 4096 tokens" in out
    status, _, err = run("info", "--device", "cpu", "-m", talker, "--max-batch-size", 17)
    assert status == 1 and "max_batch_size must be an integer from 1 to 16, not 17" in err


def test_info_compares_with_what_is_free(run, talker, monkeypatch):
    monkeypatch.setattr(info, "available_memory", lambda: 1000)
    status, out, _ = run("info", "--device", "cpu", "-m", talker)
    assert status == 0 and out.rstrip().endswith("does not fit")


def test_info_alone_shows_the_bundled_model(run):
    status, out, _ = run("info", "--device", "cpu", "-m")
    assert status == 0 and "tales-7m" in out


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_needed_memory_is_float32_on_the_cpu(talker, dtype):
    packed = pack_checkpoint(talker, dtype, 32, progress=False)
    # Columns of each row in memory: whole groups, 128 of the lm_head, and a scale (and a zero) for each.
    extra, head_cols = {"bf16": (0, 32), "int8": (1, 128 + 1), "int4": (2, 128 + 1)}[dtype]
    wide = 48 if dtype == "bf16" else 2 * (32 + extra)
    weights = CONFIG["vocab_size"] * head_cols + packed.norm.size
    weights += 2 * ((64 + 32 + 96) * (32 + extra) + 32 * wide + packed.layers[0].vectors.size)
    parts = info.model_parts(packed.config, packed.layouts)
    assert sum(part.nbytes_on_cpu for part in parts) == 4 * weights
    line = info.needed_line(packed.config, parts, 4096, None)
    assert line.startswith(f"needs {4 * weights / 2**20:.1f} MiB of weights + 1.0 MiB of KV cache")
    line = info.needed_line(packed.config, parts, 4096, None, slots=3)
    assert "+ 3.0 MiB of KV cache for 3 sequences of 4096 tokens on the CPU" in line
