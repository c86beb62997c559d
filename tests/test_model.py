"""The API on a scripted decoder, where every token is known beforehand, and once on a real one."""

import dataclasses
import gc
import itertools
import json
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import ffmini
from ffmini import engine as engine_module
from ffmini import gpu
from ffmini import model as model_module
from ffmini.candidates import summarise
from ffmini.config import GenerationDefaults, parse_config
from ffmini.convert import convert
from ffmini.errors import BusyError, CheckpointError, DeviceError, GenerationError, UnsupportedError
from ffmini.generation import StopFilter, Timings, Usage
from ffmini.model import Model, context_limit, load
from ffmini.passes import check_draws, check_works
from ffmini.tokenizer import Tokenizer

EOS = 256
VOCAB = 260  # 256 bytes, EOS and three ids that the tokenizer doesn't know
MAX_SEQ_LEN = 1200
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "tie_word_embeddings": True,
}
TENSORS = {
    "input_layernorm.weight": (32,),
    "post_attention_layernorm.weight": (32,),
    "self_attn.q_proj.weight": (32, 32),
    "self_attn.k_proj.weight": (16, 32),
    "self_attn.v_proj.weight": (16, 32),
    "self_attn.o_proj.weight": (32, 32),
    "mlp.gate_proj.weight": (48, 32),
    "mlp.up_proj.weight": (48, 32),
    "mlp.down_proj.weight": (32, 48),
}
ORDER = sorted(pre_tokenizers.ByteLevel.alphabet())


def write_tokenizer(directory, **config):
    """A tokenizer of single bytes, and </s>."""
    vocab = {token: i for i, token in enumerate(ORDER)}
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.save(str(directory / "tokenizer.json"))
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))


class ScriptedDecoder:
    """Whatever the prompt, the next tokens are those of the script; then EOS for ever."""

    device = "cpu"
    kv_dtype = "bf16"
    max_rows = 4

    def __init__(self, script, prompt_length=None, num_slots=1):
        self.num_slots = num_slots
        self._said = None
        self.config = parse_config(CONFIG, "config.json")
        self.max_seq_len = MAX_SEQ_LEN
        self.script = script
        self.prompt_length = prompt_length
        self.calls = []
        self.ahead = []  # of each call of candidates
        self.delivered = []
        self.settled = 0
        self.fail_at = {}
        self.closed = False
        self._inside = threading.Lock()

    def forward(self, tokens, start, logits="last", slot=0):
        assert not self.closed
        assert self._inside.acquire(blocking=False), "two passes at once"
        try:
            self.calls.append((tokens.tolist(), start, logits))
            time.sleep(0.0002)
            error = self.fail_at.pop(len(self.calls), None)
            if error is not None:
                raise error
            out = np.zeros((len(tokens), VOCAB), np.float32)
            for row in range(len(tokens)):
                out[row, self._next(start + row)] = 20
            return {"last": out[-1:], "all": out, "none": out[:0]}[logits]
        finally:
            self._inside.release()

    def begin(self, works, ahead=False, draws=None):
        self.ahead.append(ahead)
        check_draws(draws, works, ahead)
        assert self._said is None, "passes begun twice"
        check_works(works, ahead, self.num_slots, self.max_rows, MAX_SEQ_LEN, VOCAB)
        self._said = []
        try:
            for work in works:
                logits = self.forward(work.tokens, work.start, "all")
                asked = zip(logits[len(logits) - len(work.queries) :], work.queries, strict=True)
                self._said.append([summarise(row, query) for row, query in asked])
        except BaseException:
            self._said = None
            raise

    def deliver(self, token, query):
        self.delivered.append(token)

    def candidates(self):
        said, self._said = self._said, None
        assert said is not None, "nothing begun"
        return said

    def settle(self):
        self._said = None
        self.settled += 1

    def _next(self, position):
        if position + 1 < self.prompt_length:
            return 0
        at = position + 1 - self.prompt_length
        return self.script[at] if at < len(self.script) else EOS

    def close(self):
        self.closed = True


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    write_tokenizer(directory, chat_template=template)
    return Tokenizer(directory)


@pytest.fixture
def scripted(tokenizer):
    """A model that answers the prompt "go" (or another of `prompt_length` bytes) with `text`, then EOS."""

    def make(text, prompt_length=2, defaults=None):
        script = text if isinstance(text, list) else tokenizer.encode(text)
        defaults = defaults or GenerationDefaults()
        return Model(ScriptedDecoder(script, prompt_length), tokenizer, defaults, "bf16")

    return make


# ---- how a text ends -----------------------------------------------------------------------------------


def test_eos_ends_the_text(scripted):
    completion = scripted("hello").generate("go")
    assert (completion.text, completion.finish_reason) == ("hello", "stop")
    assert len(completion.tokens) == 6 and completion.tokens[-1] == EOS
    assert completion.usage == Usage(2, 6, 8)
    assert completion.logprobs is None


def test_max_new_tokens_ends_the_text(scripted):
    completion = scripted("hello").generate("go", max_tokens=3)
    assert (completion.text, completion.finish_reason, len(completion.tokens)) == ("hel", "length", 3)


def test_a_full_context_ends_the_text(scripted):
    prompt = "x" * (MAX_SEQ_LEN - 4)
    completion = scripted("hello" * 9, len(prompt)).generate(prompt)
    assert (completion.text, completion.finish_reason) == ("hell", "length")
    assert completion.usage.total_tokens == MAX_SEQ_LEN
    full = "x" * MAX_SEQ_LEN
    model = scripted("hello", len(full))
    assert model.generate(full).tokens == [] and model.generate(full).finish_reason == "length"
    stream = model.stream(full)
    assert list(stream) == [] and stream.completion.finish_reason == "length"


def test_stop_token_ids_end_the_text_without_being_in_it(scripted, tokenizer):
    completion = scripted("hello").generate("go", stop_token_ids=tokenizer.encode("l"))
    assert (completion.text, completion.finish_reason) == ("he", "stop")
    assert completion.tokens == tokenizer.encode("hel")


def test_ignore_eos(scripted, tokenizer):
    script = [*tokenizer.encode("he"), EOS, *tokenizer.encode("llo")]
    completion = scripted(script).generate("go", ignore_eos=True, max_new_tokens=5)
    assert (completion.text, completion.finish_reason) == ("hell", "length")


def test_min_new_tokens_keeps_the_text_going(scripted):
    completion = scripted("hi").generate("go", min_new_tokens=5)
    assert len(completion.tokens) == 6 and completion.text.startswith("hi")


@pytest.mark.parametrize(
    "stop, expected",
    [
        ("lo", "hel"),
        (["world", "o w"], "hell"),
        ("hello", ""),
        (["zz", "d!"], "hello worl"),
        ("nope", "hello world!"),
    ],
)
def test_stop_strings_are_cut_from_text_and_stream(scripted, stop, expected):
    model = scripted("hello world!")
    completion = model.generate("go", stop=stop)
    assert (completion.text, completion.finish_reason) == (expected, "stop")
    stream = model.stream("go", stop=stop)
    pieces = list(stream)
    assert "".join(pieces) == expected and all(pieces)
    same = {"timings": completion.timings, "seed": completion.seed, "usage": completion.usage}
    assert stream.completion.usage == dataclasses.replace(completion.usage, cached_tokens=1)
    assert dataclasses.replace(stream.completion, **same) == completion


def test_a_stop_string_that_length_cuts_short_is_shown(scripted):
    completion = scripted("hello").generate("go", stop="lox", max_new_tokens=5)
    assert (completion.text, completion.finish_reason) == ("hello", "length")


texts = st.text("abc", max_size=25)


@example("abc", ["abc", "b"], [])
@given(texts, st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 25)))
def test_the_stop_filter_does_not_depend_on_how_the_text_is_cut(text, stops, cuts):
    complete = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    expected = text
    if complete:
        head = text[: complete[0]]
        expected = head[: min(len(head) - len(stop) for stop in stops if head.endswith(stop))]
    stop_filter, shown = StopFilter(stops), ""
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    for first, last in itertools.pairwise(edges):
        shown += stop_filter.push(text[first:last])
        assert expected.startswith(shown)
        if stop_filter.stopped:
            break
    assert shown + stop_filter.flush() == expected
    assert stop_filter.stopped == bool(complete)


def test_the_stop_filter_holds_back_no_more_than_it_must():
    stop_filter = StopFilter(["\n\nUser:"])
    shown = [stop_filter.push(piece) for piece in ("one\n", "\nUse", "ful\n", "x")]
    assert shown == ["one", "", "\n\nUseful", "\nx"]


# ---- passes in advance ---------------------------------------------------------------------------------


def test_generate_goes_ahead_while_another_token_may_follow(scripted):
    model = scripted("hello")
    assert model.generate("go", max_new_tokens=3).text == "hel"
    assert (model._decoder.ahead, model._decoder.settled) == ([True, True, False], 1)
    model = scripted("hello")
    assert model.generate("go").text == "hello"  # which ends before the budget does
    assert (model._decoder.ahead, model._decoder.settled) == ([True] * 6, 1)


def test_a_token_goes_on_its_way_before_the_text_is_looked_at(scripted, tokenizer):
    """All but the last, also one that a stop string ends the text with; none where guesses may follow."""
    model = scripted("hello")
    ids = tokenizer.encode("hello")
    assert model.generate("go", max_new_tokens=3).text == "hel"
    assert model._decoder.delivered == ids[:2]
    model = scripted("hello")
    assert model.generate("go").text == "hello"
    assert model._decoder.delivered == ids
    model = scripted("hello")
    assert model.generate("go", stop="l").text == "he"
    assert model._decoder.delivered == ids[:3]
    model = scripted("hello")
    assert model.generate("go", prompt_lookup_num_tokens=4).text == "hello"
    assert model._decoder.delivered == []


def test_a_stream_never_goes_ahead(scripted):
    model = scripted("hello")
    assert "".join(model.stream("go")) == "hello"
    assert model._decoder.ahead == [False] * 6


@pytest.mark.parametrize("error", [KeyboardInterrupt(), GenerationError("non-finite logits")])
def test_a_failed_generation_settles_the_decoder(scripted, error):
    model = scripted("hello")
    model._decoder.fail_at = {3: error}
    with pytest.raises(type(error)):
        model.generate("go")
    assert model._decoder.settled == 1
    with pytest.raises(GenerationError, match="no token to choose"):
        model.generate("go", logit_bias=dict.fromkeys(range(VOCAB), -np.inf))
    assert model._decoder.settled == 2
    assert model.generate("go").text == "hello"


# ---- streams -------------------------------------------------------------------------------------------


def test_pieces_are_whole_characters(scripted):
    stream = scripted("a😀é").stream("go")
    assert list(stream) == ["a", "😀", "é"]
    assert stream.completion.text == "a😀é"


def test_a_character_cut_off_by_length_becomes_the_replacement_character(scripted):
    model = scripted("a😀")
    assert list(model.stream("go", max_new_tokens=3)) == ["a", "\ufffd"]
    assert model.generate("go", max_new_tokens=3).text == "a\ufffd"


def test_a_second_call_while_a_stream_is_open_raises(scripted):
    model = scripted("hello")
    stream = model.stream("go")
    for call in (model.generate, model.stream, model.logits):
        with pytest.raises(BusyError, match="a stream of this model is still open"):
            call([1])
    assert next(stream) == "h"
    with pytest.raises(BusyError):
        model.generate("go")
    stream.close()
    assert list(stream) == [] and stream.completion is None
    assert model.generate("go").text == "hello"


def test_a_stream_frees_the_model_with_its_last_token(scripted):
    model = scripted("hi")
    stream = model.stream("go", max_new_tokens=2)
    assert [next(stream), next(stream)] == ["h", "i"]
    assert model.generate("go").text == "hi"


def test_leaving_a_loop_or_a_block_frees_the_model(scripted):
    model = scripted("hello")
    for _ in model.stream("go"):
        break
    gc.collect()
    assert model.generate("go").text == "hello"
    with model.stream("go") as stream:
        next(stream)
    assert model.generate("go").text == "hello"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), GenerationError("non-finite logits")])
@pytest.mark.parametrize("call", [1, 3])
def test_an_interrupted_stream_leaves_the_model_usable(scripted, error, call):
    model = scripted("hello")
    model._decoder.fail_at = {call: error}
    stream = model.stream("go")
    with pytest.raises(type(error)):
        list(stream)
    assert not stream.is_open and stream.completion is None
    assert model.generate("go").text == "hello"


def test_arguments_of_a_stream_are_checked_at_once(scripted):
    model = scripted("hello")
    with pytest.raises(ValueError, match="empty"):
        model.stream("")
    with pytest.raises(TypeError, match="temperature"):
        model.stream("go", temprature=1)
    assert model.generate("go").text == "hello"


def test_threads_are_serialised(scripted):
    model = scripted("hello " * 10)
    texts = []
    threads = [threading.Thread(target=lambda: texts.append(model.generate("go").text)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["hello " * 10] * 4


# ---- prompts -------------------------------------------------------------------------------------------


def test_a_prompt_goes_through_in_chunks_and_each_token_once(scripted, tokenizer):
    prompt = tokenizer.encode("x" * 1100)
    model = scripted("hi", 1100)
    model.generate(prompt)
    calls = model._decoder.calls
    assert [(len(tokens), start, logits) for tokens, start, logits in calls] == [
        (512, 0, "none"),
        (512, 512, "none"),
        (76, 1024, "all"),
        (1, 1100, "all"),
        (1, 1101, "all"),
    ]
    assert [token for tokens, _, _ in calls for token in tokens] == [*prompt, *tokenizer.encode("hi")]


def test_token_ids_are_taken_as_they_are(scripted):
    for ids in ([5, EOS, 259], (5, EOS, 259), np.array([5, EOS, 259], np.uint16)):
        model = scripted("hi", 3)
        assert model.generate(ids).text == "hi"
        assert model._decoder.calls[-3][0] == [5, EOS, 259]


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([1, VOCAB], f"token id {VOCAB} is outside the vocabulary of {VOCAB}"),
        ([-1], "token id -1 is outside"),
        ([1.5], "flat list of token ids, found list float64"),
        ([True], "flat list of token ids"),
        (np.array([["a"]]), "flat list of token ids"),
        ([[[1]]], "flat list of token ids"),
        ([[1], 1], "flat list of token ids"),
        (["a", ""], "the prompt is empty"),
        (None, "flat list of token ids"),
        (
            "x" * (MAX_SEQ_LEN + 1),
            rf"has {MAX_SEQ_LEN + 1} tokens, the context \(max_seq_len\) {MAX_SEQ_LEN}",
        ),
    ],
)
def test_bad_prompts_are_refused(scripted, prompt, message):
    model = scripted("hello")
    with pytest.raises(ValueError, match=message):
        model.generate(prompt)
    assert model._decoder.calls == []


# ---- the rest of the API -------------------------------------------------------------------------------


def test_the_seed_is_reported_and_gives_the_same_text_again(scripted):
    defaults = GenerationDefaults(do_sample=True, temperature=30.0)
    model = scripted("hello", defaults=defaults)
    first = model.generate("go", max_new_tokens=40, ignore_eos=True)
    again = model.generate("go", max_new_tokens=40, ignore_eos=True, seed=first.seed)
    other = model.generate("go", max_new_tokens=40, ignore_eos=True, seed=first.seed + 1)
    assert again.tokens == first.tokens != other.tokens


def test_logprobs_come_one_per_token(scripted):
    completion = scripted("hi").generate("go", logprobs=2)
    assert [entry.token for entry in completion.logprobs] == completion.tokens
    for entry in completion.logprobs:
        assert len(entry.top) == 2 and max(entry.top.values()) == entry.logprob


def test_timings_are_of_the_work_not_of_the_reader(scripted, monkeypatch):
    now = itertools.count()  # every look at the clock takes a second
    monkeypatch.setattr(engine_module, "perf_counter", lambda: next(now))
    stream = scripted("hello").stream("go")
    for _ in stream:
        next(now)
    # The prompt and its sample, its text, then five steps.
    assert stream.completion.timings == Timings(1, 2 / 1, 6, 5 / 6)


def test_chat_renders_the_messages_and_answers(scripted, tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    model = scripted("hello", len("user:hi;"))
    assert model.chat(messages, max_new_tokens=4).text == "hell"
    assert model._decoder.calls[0][0] == model.encode_chat(messages) == tokenizer.encode("user:hi;")


def test_logits_of_every_position(scripted):
    model = scripted("hi", 600)
    logits = model.logits([1] * 602)
    assert logits.shape == (602, VOCAB) and logits.dtype == np.float32
    assert logits[599:].argmax(axis=1).tolist() == [*model.encode("hi"), EOS]
    assert [(start, kind) for _, start, kind in model._decoder.calls] == [(0, "all"), (512, "all")]
    with pytest.raises(ValueError, match="expected text or a flat list"):
        model.logits("text")


def test_encode_and_decode(scripted):
    model = scripted("")
    assert model.decode(model.encode("né")) == "né"
    assert model.decode(np.array([EOS])) == "" and model.decode([EOS], skip_special_tokens=False) == "</s>"
    assert model.decode([259]) == "" and model.decode([]) == ""
    with pytest.raises(ValueError, match="token id 260 is outside"):
        model.decode([VOCAB])


def test_a_closed_model_says_so(scripted):
    with scripted("hello") as model:
        decoder, stream = model._decoder, model.stream("go")
    assert decoder.closed
    model.close()
    with pytest.raises(ValueError, match="the model is closed"):
        next(stream)
    with pytest.raises(ValueError, match="the model is closed"):
        model.generate("go")


# ---- load ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Llama in Hugging Face's form."""
    directory = tmp_path_factory.mktemp("checkpoint")
    write_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    random = np.random.default_rng(1)
    shapes = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in TENSORS.items()}
    shapes |= {"model.embed_tokens.weight": (VOCAB, 32), "model.norm.weight": (32,)}
    tensors = {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_generate_is_the_argmax_of_logits(checkpoint):
    with load(checkpoint, device="cpu") as model:
        assert (model.dtype, model.device, model.max_seq_len) == ("bf16", "cpu", 128)
        prompt = model.encode("Once upon a time")
        tokens = model.generate(prompt, max_new_tokens=20, ignore_eos=True).tokens
        logits = model.logits([*prompt, *tokens])
    assert logits[len(prompt) - 1 : -1].argmax(axis=1).tolist() == tokens


def test_sampling_is_the_same_in_a_stream_and_after_other_calls(checkpoint):
    with load(checkpoint, device="cpu", dtype="int8", max_seq_len=64) as model:
        options = {"temperature": 1.0, "seed": 5, "max_new_tokens": 30, "ignore_eos": True}
        completion = model.generate("A king", **options)
        model.generate("another", max_new_tokens=3)
        stream = model.stream("A king", **options)
        assert "".join(stream) == completion.text and stream.completion.tokens == completion.tokens


def test_a_packed_directory_has_its_own_dtype(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "packed", "int4", progress=False)
    with load(tmp_path / "packed", device="cpu") as packed, load(checkpoint, "cpu", "int4") as made:
        assert packed.dtype == "int4"
        assert np.array_equal(packed.logits([1, 2, 3]), made.logits([1, 2, 3]))
    with pytest.raises(ValueError, match="is packed as int4; 'bf16' has to be made"):
        load(tmp_path / "packed", device="cpu", dtype="bf16")


def test_close_lets_go_of_the_weights(checkpoint):
    model = load(checkpoint, device="cpu")
    stream = model.stream("A king", max_new_tokens=3)
    next(stream)
    weights = weakref.ref(model._decoder)
    model.close()
    gc.collect()
    assert weights() is None


def test_auto_says_why_the_gpu_is_not_used(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "why_unusable", lambda ordinal=0: f"no GPU {ordinal} here")
    load(checkpoint).close()
    assert "ffmini: running on the CPU: no GPU 0 here\n" in capsys.readouterr().err
    with pytest.raises(DeviceError, match="device 'cuda:3': no GPU 3 here"):
        load(checkpoint, device="cuda:3")


def test_the_gpu_decoder_gets_the_ordinal(checkpoint, monkeypatch):
    made = []

    class Decoder(ScriptedDecoder):
        def __init__(self, packed, max_seq_len, ordinal, *, num_slots, kv_dtype):
            made.append((packed.format, max_seq_len, ordinal, num_slots, kv_dtype))
            super().__init__([], 2, num_slots)

    monkeypatch.setattr(gpu, "why_unusable", lambda ordinal=0: None)
    monkeypatch.setattr(gpu, "GPUDecoder", Decoder)
    for device in ("auto", "cuda", "cuda:2"):
        model = load(checkpoint, device, "int4", 99, max_batch_size=5, kv_dtype="int8")
        assert model.max_batch_size == 5
    assert made == [("int4", 99, ordinal, 5, "int8") for ordinal in (0, 0, 2)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"device": "gpu"}, "device must be"),
        ({"device": "cuda:x"}, "device must be"),
        ({"dtype": "fp16"}, "dtype must be one of bf16, int8, int4, not 'fp16'"),
        ({"max_seq_len": 129}, "from 1 to the model's limit 128, not 129"),
        ({"max_seq_len": 0}, "from 1 to the model's limit 128, not 0"),
        ({"max_seq_len": 8.0}, "must be an integer"),
        ({"max_batch_size": 0}, "max_batch_size must be an integer from 1 to 16, not 0"),
        ({"max_batch_size": 17}, "from 1 to 16, not 17"),
        ({"max_batch_size": True}, "from 1 to 16, not True"),
        ({"kv_dtype": "int4"}, "kv_dtype must be one of bf16, int8, not 'int4'"),
    ],
)
def test_bad_arguments_of_load(checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(checkpoint, **{"device": "cpu", **arguments})


def test_a_directory_that_is_no_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    "rope, limit",
    [
        (None, 128),
        ({"rope_type": "linear", "factor": 4.0}, 512),
        ({"rope_type": "dynamic", "factor": 2.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
    ],
)
def test_scaled_rope_lengthens_the_context(rope, limit):
    assert context_limit(parse_config({**CONFIG, "rope_scaling": rope}, "config.json")) == limit


# ---- ffmini.generate -----------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch, scripted):
    """Every model that ffmini.generate loads, by directory name; none is kept from other tests."""
    made = []

    def fake_load(directory):
        made.append((directory.name, scripted("hello")))
        return made[-1][1]

    monkeypatch.setattr(model_module, "load", fake_load)
    monkeypatch.setattr(model_module, "_last_model", None)
    return made


def test_generate_keeps_its_last_model(loads, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    for name in ("one", "one", "two", "two", "one"):
        assert ffmini.generate("go", model=tmp_path / name, max_new_tokens=4) == "hell"
    assert [name for name, _ in loads] == ["one", "two", "one"]
    assert [model._decoder is None for _, model in loads] == [True, True, False]


def test_generate_defaults_to_the_bundled_model(loads, tmp_path, monkeypatch):
    bundled = tmp_path / "models" / "tiny"
    bundled.mkdir(parents=True)
    monkeypatch.setattr(model_module, "resource_dir", lambda name: tmp_path / name)
    with pytest.raises(UnsupportedError, match="expected one bundled model, found 0"):
        ffmini.generate("go")
    (bundled / "config.json").write_text("{}")
    assert ffmini.generate("go") == "hello"
    assert [name for name, _ in loads] == ["tiny"]


def test_importing_ffmini_imports_neither_cupy_nor_jinja2():
    command = "import sys, ffmini; print(sorted({'cupy', 'jinja2', 'torch'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
