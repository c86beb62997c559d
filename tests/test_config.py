"""config.json and generation_config.json: both spellings, each family's defaults, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffmini.config import (
    DEFAULTS,
    HEAD_DIMS,
    GenerationDefaults,
    ModelConfig,
    RopeConfig,
    load_config,
    load_generation_defaults,
    parse_config,
    read_json,
)
from ffmini.errors import CheckpointError, FFMiniError, UnsupportedError

SHAPE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN_DEFAULTS = {
    "attention_factor": None,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
}


def parse(model_type: str = "llama", **changes: Any) -> ModelConfig:
    """The config of SHAPE with `changes`; a value of ... leaves the key out."""
    raw = {"model_type": model_type} | SHAPE | changes
    return parse_config({key: value for key, value in raw.items() if value is not ...}, "dir/config.json")


# ---- what is read ---------------------------------------------------------------------------------------


def test_a_whole_config() -> None:
    config = parse(
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling={"rope_type": "llama3"} | LLAMA3,
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009, 128001],
        torch_dtype="bfloat16",
        hidden_act="silu",
        pretraining_tp=1,
        attention_dropout=0.0,
    )
    assert config == ModelConfig(
        model_type="llama",
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=4,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope=RopeConfig(500000.0, "llama3", LLAMA3),
        tie_word_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        layer_windows=(0, 0, 0, 0),
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )


def test_first_layers_keep_their_windows() -> None:
    config = replace(parse("mistral"), layer_windows=(0, 7, 0, 9))
    assert config.first_layers(2) == replace(config, num_layers=2, layer_windows=(0, 7))


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        (
            "llama",
            {"num_kv_heads": 32, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_ids": (2,)},
        ),
        (
            "mistral",
            {
                "max_position_embeddings": 131072,
                "layer_windows": (4096,) * 4,
                "bos_token_id": 1,
                "eos_token_ids": (2,),
            },
        ),
        ("qwen2", {"num_kv_heads": 32, "max_position_embeddings": 32768, "qkv_bias": True}),
        ("qwen3", {"num_kv_heads": 32, "max_position_embeddings": 32768, "qk_norm": True, "head_dim": 128}),
    ],
)
def test_defaults_of_each_family(model_type: str, expected: dict[str, Any]) -> None:
    config = parse(model_type, num_key_value_heads=...)
    common = ModelConfig(
        model_type=model_type,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=4,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=0,
        rms_norm_eps=1e-6,
        rope=RopeConfig(10000.0, "default", {}),
        tie_word_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        layer_windows=(0, 0, 0, 0),
        bos_token_id=None,
        eos_token_ids=(),
    )
    assert config == replace(common, **expected)


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("llama", "LlamaForCausalLM"),
        ("llama", "LLaMAForCausalLM"),
        ("mistral", "MistralForCausalLM"),
        ("qwen2", "Qwen2ForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
    ],
)
def test_the_family_may_come_from_architectures(model_type: str, architecture: str) -> None:
    assert parse(..., architectures=[architecture]) == parse(model_type, architectures=[architecture])


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ({"rope_theta": 1e6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ({"rope_theta": 1e6, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 1000000}}),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
        ),
        (
            {"rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 4.0}},
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3},
        ),
        (
            {
                "rope_theta": 1e6,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
                "torch_dtype": "bfloat16",
            },
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e6,
                    "factor": 4.0,
                    "beta_fast": 32,
                    "beta_slow": None,
                    "original_max_position_embeddings": 32768,
                },
                "dtype": "bfloat16",
            },
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}},
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
                "rope_theta": 1e6,
            },
        ),
    ],
)
def test_both_spellings_say_the_same(older: dict[str, Any], newer: dict[str, Any]) -> None:
    assert parse(**older) == parse(**newer)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "linear", "factor": 2}, RopeConfig(1e4, "linear", {"factor": 2.0})),
        (
            {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 512},
            RopeConfig(1e4, "dynamic", {"factor": 4.0}),
        ),
        ({"type": "llama3"} | LLAMA3, RopeConfig(1e4, "llama3", LLAMA3)),
        (
            {"type": "yarn", "factor": 8.0},
            RopeConfig(
                1e4, "yarn", YARN_DEFAULTS | {"factor": 8.0, "original_max_position_embeddings": 2048}
            ),
        ),
        (
            {
                "rope_type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 1024,
                "attention_factor": 1.25,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "mscale": 0.7,
                "mscale_all_dim": 0.5,
                "truncate": False,
            },
            RopeConfig(
                1e4,
                "yarn",
                {
                    "factor": 40.0,
                    "original_max_position_embeddings": 1024,
                    "attention_factor": 1.25,
                    "beta_fast": 16.0,
                    "beta_slow": 2.0,
                    "mscale": 0.7,
                    "mscale_all_dim": 0.5,
                    "truncate": False,
                },
            ),
        ),
    ],
)
def test_rope_parameters_of_each_type(scaling: dict[str, Any], expected: RopeConfig) -> None:
    assert parse(rope_scaling=scaling).rope == expected


def test_original_positions_at_the_top_level_go_first() -> None:
    rope = parse(rope_scaling={"type": "llama3"} | LLAMA3, original_max_position_embeddings=4096).rope
    assert rope.params["original_max_position_embeddings"] == 4096


QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("llama", {"sliding_window": None}, (0, 0, 0, 0)),
        ("llama", {"sliding_window": 16, "use_sliding_window": False}, (0, 0, 0, 0)),
        ("mistral", {"sliding_window": 16}, (16, 16, 16, 16)),
        ("mistral", {"sliding_window": None}, (0, 0, 0, 0)),
        ("mistral", {"sliding_window": 16, "layer_types": ["sliding_attention"] * 4}, (16, 16, 16, 16)),
        ("qwen2", {"sliding_window": 16, "max_window_layers": 2}, (0, 0, 0, 0)),
        ("qwen2", QWEN_WINDOW, (0, 0, 16, 16)),
        ("qwen2", QWEN_WINDOW | {"max_window_layers": 0}, (16, 16, 16, 16)),
        ("qwen2", QWEN_WINDOW | {"max_window_layers": ...}, (0, 0, 0, 0)),  # the default is 28
        ("qwen2", QWEN_WINDOW | {"sliding_window": ...}, (0, 0, 4096, 4096)),
        ("qwen2", QWEN_WINDOW | {"sliding_window": None}, (0, 0, 0, 0)),
        ("qwen2", QWEN_WINDOW | {"layer_types": MIXED}, (16, 0, 0, 16)),
        ("qwen3", QWEN_WINDOW | {"layer_types": None}, (0, 0, 16, 16)),
        ("qwen3", QWEN_WINDOW | {"layer_types": ["full_attention"] * 4}, (0, 0, 0, 0)),
        ("qwen3", {"sliding_window": 16, "layer_types": ["full_attention"] * 4}, (0, 0, 0, 0)),
    ],
)
def test_windows_per_layer(model_type: str, changes: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert parse(model_type, **changes).layer_windows == expected


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("llama", {"attention_bias": True}, (True, True, False)),
        ("llama", {"mlp_bias": True}, (False, False, True)),
        ("qwen2", {"attention_bias": True}, (True, False, False)),
        ("qwen2", {"attention_bias": False}, (True, False, False)),
        ("qwen3", {"attention_bias": True}, (True, True, False)),
    ],
)
def test_biases(model_type: str, changes: dict[str, Any], expected: tuple[bool, ...]) -> None:
    config = parse(model_type, **changes)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == expected


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dim_is_given_or_derived(head_dim: int) -> None:
    assert parse(head_dim=head_dim).head_dim == head_dim
    assert parse(head_dim=None, hidden_size=32 * head_dim).head_dim == head_dim


@pytest.mark.parametrize("ratio", range(1, 17))
def test_gqa_ratios(ratio: int) -> None:
    config = parse(num_attention_heads=2 * ratio, num_key_value_heads=2, head_dim=64)
    assert config.num_heads // config.num_kv_heads == ratio


def test_no_kv_heads_means_as_many_as_heads() -> None:
    assert parse("mistral", num_key_value_heads=None).num_kv_heads == 32
    assert parse("mistral", num_key_value_heads=...).num_kv_heads == 8


@pytest.mark.parametrize(("value", "expected"), [(None, ()), (5, (5,)), ([], ()), ([5, 0, 5], (5, 0))])
def test_eos_is_a_list(value: Any, expected: tuple[int, ...]) -> None:
    assert parse(eos_token_id=value).eos_token_ids == expected


# ---- what is refused ------------------------------------------------------------------------------------

UNSUPPORTED: list[tuple[dict[str, Any], str, str]] = [
    ({"model_type": "gemma2"}, "model_type", "'gemma2'"),
    ({"model_type": ..., "architectures": ["OPTForCausalLM"]}, "architectures", "OPTForCausalLM"),
    (
        {"architectures": ["LlamaForSequenceClassification"]},
        "architectures",
        "LlamaForSequenceClassification",
    ),
    ({"architectures": ["Qwen2ForCausalLM"]}, "architectures", "Qwen2ForCausalLM"),
    ({"hidden_act": "gelu"}, "hidden_act", "'gelu'"),
    ({"hidden_act": None}, "hidden_act", "null"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor", "0.5"),
    ({"pretraining_tp": 2}, "pretraining_tp", "2"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config", "gptq"),
    ({"compression_config": {"format": "pack"}}, "compression_config", "pack"),
    ({"rope_interleaved": True}, "rope_interleaved", "true"),
    ({"is_causal": False}, "is_causal", "false"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention", "true"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder", "true"),
    ({"torch_dtype": "float64"}, "torch_dtype", "'float64'"),
    ({"dtype": "float8_e4m3fn"}, "dtype", "'float8_e4m3fn'"),
    ({"head_dim": 72}, "head_dim", "72"),
    ({"head_dim": 65}, "head_dim", "65"),
    ({"num_attention_heads": 4}, "num_key_value_heads", "8"),
    ({"num_key_value_heads": 5}, "num_key_value_heads", "5"),
    ({"num_key_value_heads": 1}, "num_key_value_heads", "1"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope_type", "'longrope'"),
    ({"rope_scaling": {"type": "su"}}, "rope_type", "'su'"),
    ({"rope_scaling": {"rope_type": "mrope"}}, "rope_type", "'mrope'"),
    ({"rope_scaling": {"rope_type": 3}}, "rope_type", "3"),
    ({"rope_scaling": {"type": "default", "mrope_section": [8, 12]}}, "rope_scaling", "'mrope_section'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}, "rope_scaling", "'mscale'"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters", "'full_attention'"),
    ({"sliding_window": 4096}, "sliding_window", "4096"),
    ({"model_type": "mistral", "attention_bias": True}, "attention_bias", "true"),
    ({"model_type": "mistral", "mlp_bias": True}, "mlp_bias", "true"),
    ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias", "true"),
    ({"model_type": "mistral", "sliding_window": 16, "layer_types": MIXED}, "layer_types", "full_attention"),
    ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 4}, "layer_types", "'linear_attention'"),
]

ABSURD: list[tuple[dict[str, Any], str, str]] = [
    *[
        ({key: value}, key, found)
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
        )
        for value, found in [
            (..., "no such key"),
            (0, "0"),
            (-8, "-8"),
            (8.0, "8.0"),
            (True, "true"),
            (10**30, "10000"),
        ]
    ],
    ({"model_type": ...}, "model_type", "no such key"),
    ({"model_type": 3}, "model_type", "3"),
    ({"architectures": "LlamaForCausalLM"}, "architectures", "'LlamaForCausalLM'"),
    ({"hidden_size": "2048"}, "hidden_size", "'2048'"),
    ({"hidden_size": 2049}, "hidden_size", "2049"),
    ({"num_key_value_heads": 0}, "num_key_value_heads", "0"),
    ({"head_dim": 0}, "head_dim", "0"),
    ({"head_dim": 64.0}, "head_dim", "64.0"),
    ({"max_position_embeddings": 0}, "max_position_embeddings", "0"),
    ({"max_position_embeddings": 1 << 40}, "max_position_embeddings", str(1 << 40)),
    ({"rms_norm_eps": 0}, "rms_norm_eps", "0"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps", "-1e-06"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps", "inf"),
    ({"rms_norm_eps": True}, "rms_norm_eps", "true"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps", "'1e-5'"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings", "1"),
    ({"attention_bias": "yes"}, "attention_bias", "'yes'"),
    ({"mlp_bias": None}, "mlp_bias", "null"),
    ({"bos_token_id": 128256}, "bos_token_id", "128256"),
    ({"bos_token_id": [1, 2]}, "bos_token_id", "[1, 2]"),
    ({"eos_token_id": -1}, "eos_token_id", "-1"),
    ({"eos_token_id": [2, 128256]}, "eos_token_id", "[2, 128256]"),
    ({"eos_token_id": [[2]]}, "eos_token_id", "[[2]]"),
    ({"eos_token_id": True}, "eos_token_id", "true"),
    ({"rope_theta": 0}, "rope_theta", "0"),
    ({"rope_theta": 1}, "rope_theta", "1"),
    ({"rope_theta": None}, "rope_theta", "null"),
    ({"rope_scaling": 2.0}, "rope_scaling", "2.0"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor", "no such key"),
    ({"rope_scaling": {"type": "linear", "factor": None}}, "rope_scaling: factor", "null"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling: factor", "0.5"),
    ({"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling: factor", "true"),
    ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor", "no such key"),
    ({"rope_scaling": {"type": "llama3"} | LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor", "1.0"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0.5}}, "beta_fast", "0.5"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate", "1"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}},
        "original_max_position_embeddings",
        "0",
    ),
    (
        {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
        "rope_scaling: type",
        "'linear'",
    ),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta", "10000"),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e4}},
        "rope_scaling",
        "linear",
    ),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window", "0"),
    ({"model_type": "mistral", "sliding_window": 4096.0}, "sliding_window", "4096.0"),
    ({"model_type": "qwen2", "use_sliding_window": "no"}, "use_sliding_window", "'no'"),
    ({"model_type": "qwen2"} | QWEN_WINDOW | {"max_window_layers": -1}, "max_window_layers", "-1"),
    ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types", "['full_attention']"),
    ({"model_type": "qwen2", "layer_types": "full"}, "layer_types", "'full'"),
    ({"model_type": "qwen2", "layer_types": MIXED}, "layer_types", "sliding_attention"),
]


@pytest.mark.parametrize(
    ("error", "changes", "key", "found"),
    [(UnsupportedError, *row) for row in UNSUPPORTED] + [(CheckpointError, *row) for row in ABSURD],
)
def test_refusals_name_key_expected_and_found(
    error: type[Exception], changes: dict[str, Any], key: str, found: str
) -> None:
    with pytest.raises((UnsupportedError, CheckpointError)) as caught:
        parse(**({"model_type": "llama"} | changes))
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.startswith("dir/config.json: ") and message.isprintable() and len(message) < 300
    before, after = message.split(", found ")
    assert f"{key}: expected " in before
    assert found in after


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["yarn", "full_attention", "x\ny"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["type", "rope_type", "factor", "rope_theta", "a\nb"]), inner)
    ),
    max_leaves=6,
)
KEYS = [*SHAPE, *DEFAULTS["qwen2"], "model_type", "architectures", "rope_scaling", "rope_parameters"]


@settings(max_examples=300, deadline=None)
@given(
    model_type=st.sampled_from(list(DEFAULTS)),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON_VALUES, min_size=1, max_size=3),
)
def test_any_values_give_a_config_or_one_line(model_type: str, changes: dict[str, Any]) -> None:
    try:
        config = parse(**({"model_type": model_type} | changes))
    except FFMiniError as error:
        assert str(error).isprintable() and ", found " in str(error)
    else:
        assert config.head_dim in HEAD_DIMS and len(config.layer_windows) == config.num_layers


# ---- files ----------------------------------------------------------------------------------------------


def write(directory: Path, generation: dict[str, Any] | None, **config: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"} | SHAPE | config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, (7,)),
        ({}, (7,)),
        ({"eos_token_id": None}, (7,)),
        ({"eos_token_id": 3}, (3,)),
        ({"eos_token_id": [3, 7, 3]}, (3, 7)),
    ],
)
def test_eos_of_generation_config_goes_first(
    generation: dict[str, Any] | None, expected: tuple[int, ...], tmp_path: Path
) -> None:
    assert load_config(write(tmp_path, generation, eos_token_id=7)).eos_token_ids == expected


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, GenerationDefaults()),
        ({}, GenerationDefaults()),
        ({"temperature": 0.6, "top_p": 0.9}, GenerationDefaults(top_p=0.9)),
        ({"do_sample": False, "temperature": 0.6}, GenerationDefaults()),
        ({"repetition_penalty": 1.05}, GenerationDefaults(repetition_penalty=1.05)),
        ({"do_sample": True}, GenerationDefaults(True, 1.0, 50, 1.0, 0.0, 1.0)),
        ({"do_sample": True, "top_k": None, "min_p": None}, GenerationDefaults(True, 1.0, 50, 1.0, 0.0, 1.0)),
        (
            {
                "do_sample": True,
                "temperature": 0.7,
                "top_k": 20,
                "top_p": 0.8,
                "min_p": 0.05,
                "repetition_penalty": 1.1,
            },
            GenerationDefaults(True, 0.7, 20, 0.8, 0.05, 1.1),
        ),
    ],
)
def test_generation_defaults(
    generation: dict[str, Any] | None, expected: GenerationDefaults, tmp_path: Path
) -> None:
    assert load_generation_defaults(write(tmp_path, generation)) == expected


def test_a_model_that_does_not_say_is_greedy() -> None:
    assert GenerationDefaults() == GenerationDefaults(False, 0.0, 0, 1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("generation", "found"),
    [
        ({"do_sample": 1}, "1"),
        ({"temperature": -0.5}, "-0.5"),
        ({"temperature": "hot"}, "'hot'"),
        ({"top_k": -1}, "-1"),
        ({"top_k": 5.0}, "5.0"),
        ({"top_p": 1.5}, "1.5"),
        ({"min_p": True}, "true"),
        ({"repetition_penalty": 0}, "0"),
    ],
)
def test_absurd_generation_defaults_are_refused(
    generation: dict[str, Any], found: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_generation_defaults(write(tmp_path, generation))
    (key,) = generation
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'generation_config.json'}: {key}: expected ")
    assert message.endswith(f", found {found}")


def test_eos_of_generation_config_must_be_in_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id: .* found 128256"):
        load_config(write(tmp_path, {"eos_token_id": 128256}))


def test_read_json_bounds_the_size(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(CheckpointError, match=rf"huge\.json: expected at most .*, found {1 << 40}"):
        read_json(path)


def test_read_json_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes('{"name": "Grüße", "n": [1, 2.5, null, true]}'.encode())
    assert read_json(path) == {"name": "Grüße", "n": [1, 2.5, None, True]}
