"""The tokenizer: BOS rules, streaming, chat templates, damaged files."""

import json
import sys
from importlib import metadata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from ffmini.errors import CheckpointError, UnsupportedError
from ffmini.tokenizer import Tokenizer

SAMPLE = "Once upon a time there was a king, naïve but 😀 happy. The king’s daughter said: 日本語!"


def byte_level():
    """A byte-level BPE as GPT-2's and Llama 3's; <s> is 0, </s> is 1."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([SAMPLE] * 3, trainer)
    return backend


def sentencepiece():
    """A BPE with byte fallback as Llama 2's: words begin with U+2581, other characters are bytes <0xNN>."""
    words = ["\u2581there", "\u2581time", "\u2581", *"abcdefghij"]
    tokens = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    vocab = {token: i for i, token in enumerate(tokens)}
    letters = sorted(set("there") | set("time"))
    for token in letters:
        vocab.setdefault(token, len(vocab))
    merges = []
    for word in ("\u2581there", "\u2581time"):
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocab.setdefault(word[:end], len(vocab))
    backend = Backend(models.BPE(vocab, list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>"])
    return backend


def write(directory, backend, **config):
    backend.save(str(directory / "tokenizer.json"))
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return write(tmp_path_factory.mktemp("bpe"), byte_level())


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    return write(tmp_path_factory.mktemp("spm"), sentencepiece())


def streamed(tokenizer, ids, prompt=()):
    stream = tokenizer.stream(prompt)
    return [stream.push(token) for token in ids] + [stream.flush()]


# ---- encode and decode ---------------------------------------------------------------------------------


def test_text_survives_the_round_trip(bpe, spm):
    assert bpe.decode(bpe.encode(SAMPLE)) == SAMPLE
    assert spm.decode(spm.encode("time there é")) == "time there é"
    assert len(bpe.encode(SAMPLE)) < len(SAMPLE.encode())


def test_special_tokens_are_left_out_of_the_text_unless_asked_for(bpe):
    ids = [0, *bpe.encode("king"), 1]
    assert bpe.decode(ids) == "king"
    assert bpe.decode(ids, skip_special_tokens=False) == "<s>king</s>"


def with_bos(backend):
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


@pytest.mark.parametrize("bos", ["<s>", {"__type": "AddedToken", "content": "<s>", "lstrip": False}])
@pytest.mark.parametrize("post_processor", [False, True])
@pytest.mark.parametrize("add_bos_token", [False, True])
def test_bos_comes_once_if_either_file_asks_for_it(tmp_path, bos, post_processor, add_bos_token):
    backend = with_bos(byte_level()) if post_processor else byte_level()
    tokenizer = write(tmp_path, backend, bos_token=bos, add_bos_token=add_bos_token)
    plain = tokenizer.encode("a king", add_special_tokens=False)
    assert plain[0] != 0
    assert tokenizer.encode("a king") == ([0, *plain] if post_processor or add_bos_token else plain)
    assert tokenizer.bos_token_id == 0


def test_add_bos_token_needs_a_bos_token(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"tokenizer_config\.json: add_bos_token is true, but bos_token"
    ):
        write(tmp_path, byte_level(), add_bos_token=True, bos_token="<nope>")


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = write(tmp_path, backend)
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE
    assert len(tokenizer.encode("k")) == 1


def test_a_lone_surrogate_is_refused(bpe):
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        bpe.encode("a\ud800")


# ---- streaming -----------------------------------------------------------------------------------------


def test_a_character_comes_out_when_its_last_byte_is_in(bpe, spm):
    for tokenizer in (bpe, spm):
        ids = [i for c in "😀é" for i in tokenizer.encode(c)]
        pieces = streamed(tokenizer, ids)
        assert "\ufffd" not in "".join(pieces)
        assert [p for p in pieces if p.strip()] == ["😀", "é"]


@settings(max_examples=60)
@given(st.text(max_size=30))
def test_the_pieces_of_any_text_add_up_and_none_is_partial(bpe, spm, text):
    for tokenizer in (bpe, spm):
        ids = tokenizer.encode(text)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        if "\ufffd" not in text:
            assert all("\ufffd" not in piece for piece in pieces)


@settings(max_examples=100)
@given(st.data())
def test_any_tokens_of_a_byte_level_bpe_add_up_to_their_decoding(bpe, data):
    ids = data.draw(st.lists(st.integers(0, bpe.vocab_size - 1), max_size=30))
    prompt = data.draw(st.sampled_from([[], bpe.encode("a king 😀")]))
    assert "".join(streamed(bpe, ids, prompt)) == bpe.decode(ids)


def test_an_incomplete_character_at_the_end_becomes_the_replacement_character(bpe):
    ids = bpe.encode("a") + bpe.encode("\U0001f40b")
    pieces = streamed(bpe, ids[:-1])
    assert pieces[0] == "a" and pieces[-1] == "\ufffd"
    assert "".join(pieces) == bpe.decode(ids[:-1])


def test_the_space_before_the_first_new_word_is_kept(spm):
    prompt, ids = spm.encode("time"), spm.encode("there")
    assert spm.decode(ids) == "there"
    assert "".join(streamed(spm, ids)) == "there"
    assert "".join(streamed(spm, ids, prompt)) == " there"


def test_new_tokens_are_read_on_their_own_if_the_prompt_ends_inside_a_character(bpe):
    ids = bpe.encode("\U0001f40b")
    assert "".join(streamed(bpe, [*ids[2:], *bpe.encode("a")], ids[:2])) == bpe.decode(ids[2:]) + "a"


def test_a_prompt_may_end_in_a_replacement_character(bpe, spm):
    for tokenizer in (bpe, spm):
        assert (
            "".join(streamed(tokenizer, tokenizer.encode("time"), tokenizer.encode("\ufffd"))).strip()
            == "time"
        )


def test_what_was_shown_stays_when_a_bad_byte_spoils_the_run(spm):
    bytes_of = {b: 2 + b for b in range(256)}
    ids = [bytes_of[b] for b in "é".encode()] + [bytes_of[0xFF]]
    assert spm.decode(ids) == "\ufffd" * 3
    assert streamed(spm, ids) == ["", "é", "", "\ufffd"]


# ---- chat ----------------------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}\n"
    "    {% if not message['content'] %}\n"
    "        {% continue %}\n"
    "    {% endif %}\n"
    "{{ bos_token if loop.first }}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MESSAGES = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi <b> & 'é'"}]


def chat_tokenizer(directory, template, **config):
    return write(directory, with_bos(byte_level()), chat_template=template, bos_token="<s>", **config)


def test_a_chat_is_rendered_as_hugging_face_does_and_has_one_bos(tmp_path):
    template = CHATML.replace("{{ bos_token if loop.first }}", "{{ bos_token if loop.index == 2 }}")
    tokenizer = chat_tokenizer(tmp_path, template, eos_token={"content": "</s>"})
    assert tokenizer.render_chat(MESSAGES) == "<s><|user|>Hi <b> & 'é'</s>\n<|assistant|>"
    ids = tokenizer.encode_chat(MESSAGES)
    assert ids.count(0) == 1 and ids[0] == 0 and ids.count(1) == 1


def test_the_things_that_templates_rely_on(tmp_path):
    template = (
        "{{ messages | tojson }}|{{ messages[0] | tojson(indent=1) }}|"
        "{{ strftime_now('%Y') | length }}|{{ tools is none }}|"
        "{% generation %}{{ messages[0].content }}{% endgeneration %}|"
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    )
    rendered = chat_tokenizer(tmp_path, template).render_chat([{"role": "user", "content": "<é>"}])
    message = '{\n "role": "user",\n "content": "<é>"\n}'
    assert rendered == f'[{{"role": "user", "content": "<é>"}}]|{message}|4|True|<é>|01'


def test_the_jinja_file_wins(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    assert chat_tokenizer(tmp_path, "config").render_chat([{"role": "user", "content": "x"}]) == "file x"


def test_of_several_named_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert chat_tokenizer(tmp_path, named).render_chat(MESSAGES) == "d"
    with pytest.raises(CheckpointError, match="expected one named 'default', found \\['tool_use'\\]"):
        chat_tokenizer(tmp_path, named[:1])


def test_a_model_without_a_template_is_refused(bpe):
    with pytest.raises(UnsupportedError, match="has no chat template") as error:
        bpe.encode_chat(MESSAGES)
    assert "\n" not in str(error.value)


def test_a_template_can_refuse_messages(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, "{{ raise_exception('roles must\nalternate') }}")
    with pytest.raises(ValueError, match="chat template refused the messages: roles must alternate"):
        tokenizer.render_chat(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ range(999999999) }}",
        "{{ nothing.of.the.kind }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(tmp_path, template):
    with pytest.raises(ValueError, match="refused the messages") as error:
        chat_tokenizer(tmp_path, template).render_chat(MESSAGES)
    assert "\n" not in str(error.value)


def test_a_template_that_does_not_parse_names_its_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat template does not parse"):
        chat_tokenizer(tmp_path, "{% if %}").render_chat(MESSAGES)


@pytest.mark.parametrize(
    "messages",
    [
        "hi",
        [],
        {},
        None,
        ["hi"],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": object()}],
    ],
)
def test_malformed_messages_are_refused(tmp_path, messages):
    with pytest.raises(ValueError, match="messages"):
        chat_tokenizer(tmp_path, CHATML).render_chat(messages)


def test_jinja2_missing_or_old_is_one_line_that_says_what_to_install(tmp_path, monkeypatch):
    tokenizer = chat_tokenizer(tmp_path, CHATML)
    monkeypatch.setattr(metadata, "version", lambda name: "3.1.4")
    with pytest.raises(UnsupportedError, match=r"newer, found 3\.1\.4: pip install 'ffmini\[chat\]'"):
        tokenizer.render_chat(MESSAGES)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setitem(sys.modules, "jinja2.ext", None)
    with pytest.raises(UnsupportedError, match=r"found none: pip install 'ffmini\[chat\]'"):
        tokenizer.render_chat(MESSAGES)


# ---- damaged files -------------------------------------------------------------------------------------


def damaged(change):
    raw = json.loads(with_bos(byte_level()).to_str())
    change(raw)
    return json.dumps(raw)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        damaged(lambda raw: raw["model"].update(type="Nope")),
        damaged(lambda raw: raw["model"].update(merges=["zz qq"])),
        damaged(lambda raw: raw.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
        damaged(lambda raw: raw["post_processor"].update(special_tokens={})),
    ],
    ids=["empty", "no model", "array", "lfs", "model type", "merges", "normalizer", "post-processor"],
)
def test_a_damaged_tokenizer_is_one_line_naming_the_file(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: ") as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected a file, found none"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "config, key",
    [
        ({"bos_token": 5}, "bos_token"),
        ({"eos_token": {"id": 1}}, "eos_token"),
        ({"chat_template": 5}, "chat_template"),
    ],
)
def test_a_damaged_config_names_file_and_key(tmp_path, config, key):
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {key}"):
        write(tmp_path, byte_level(), **config)


def test_a_broken_link_is_not_taken_for_a_missing_file(tmp_path):
    (tmp_path / "chat_template.jinja").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: expected a readable file"):
        write(tmp_path, byte_level())


def test_a_template_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: expected UTF-8"):
        write(tmp_path, byte_level())
