"""What config.json and generation_config.json say, read strictly: a ModelConfig or one line why not.

Both spellings are read: transformers 4 wrote rope_theta, rope_scaling and torch_dtype, transformers 5
writes rope_parameters and dtype. Shape keys are required; every other key that is left out takes the
default that its model type has in transformers, from the table DEFAULTS.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ffmini.errors import CheckpointError, UnsupportedError

HEAD_DIMS = (8, 16, 32, 48, 64, 80, 96, 128, 256)
MAX_GQA_RATIO = 16
MAX_JSON_BYTES = 64 << 20
LFS_MAGIC = b"version https://git-lfs.github.com/spec/"

# The values of keys that config.json leaves out, as transformers has them. num_key_value_heads and head_dim
# of None follow from the shape keys; keys that transformers does not read for a family change nothing here.
_COMMON_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "layer_types": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_QWEN_DEFAULTS: dict[str, Any] = _COMMON_DEFAULTS | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON_DEFAULTS
    | {
        "max_position_embeddings": 2048,
        "use_sliding_window": True,  # Llama has no windows: a model that asks for one is refused
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": _COMMON_DEFAULTS
    | {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": _QWEN_DEFAULTS,
    "qwen3": _QWEN_DEFAULTS | {"head_dim": 128},
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# The parameters of each rope type; a value is the default, and _REQUIRED says that there is none.
_REQUIRED = object()
_ROPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": _REQUIRED},
    "dynamic": {"factor": _REQUIRED},
    "llama3": {"factor": _REQUIRED, "low_freq_factor": _REQUIRED, "high_freq_factor": _REQUIRED},
    "yarn": {
        "factor": _REQUIRED,
        "attention_factor": None,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": None,
        "mscale_all_dim": None,
        "truncate": True,
    },
}
_ROPE_RANGES = {
    "factor": (1.0, 1e4),
    "low_freq_factor": (1e-3, 1e4),
    "high_freq_factor": (1e-3, 1e4),
    "attention_factor": (1e-3, 1e3),
    "beta_fast": (1e-3, 1e6),
    "beta_slow": (1e-3, 1e6),
    "mscale": (0.0, 1e3),
    "mscale_all_dim": (0.0, 1e3),
}
# Keys that may stand in any rope dictionary: read elsewhere, or without effect in transformers.
_ROPE_COMMON_KEYS = (
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "finetuned",
)

# The largest sizes that are taken seriously.
_MAX_POSITIONS = 1 << 27
_MAX_VOCAB = 1 << 22
_MAX_HEADS = 1024

# Keys that change what the model computes, with the values under which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (None, 1.0),
    "pretraining_tp": (None, 1),
    "quantization_config": (None,),
    "compression_config": (None,),
    "rope_interleaved": (None, False),
    "is_causal": (None, True),
    "use_bidirectional_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "dtype": (None, "bfloat16", "float16", "float32"),
    "torch_dtype": (None, "bfloat16", "float16", "float32"),
}


@dataclass(frozen=True)
class RopeConfig:
    """The rotary embedding: its base and how it is scaled.

    `params` has transformers' names, complete for the type: factor (linear, dynamic, llama3, yarn),
    original_max_position_embeddings (llama3, yarn), low_freq_factor and high_freq_factor (llama3),
    attention_factor, beta_fast, beta_slow, mscale, mscale_all_dim and truncate (yarn; attention_factor
    and the mscales may be None).
    """

    theta: float
    type: str
    params: Mapping[str, float | None]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model and everything else that its forward pass depends on."""

    model_type: str  # "llama" | "mistral" | "qwen2" | "qwen3"
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool  # of gate, up and down
    qk_norm: bool  # RMSNorm of every head's q and k before rope
    layer_windows: tuple[int, ...]  # per layer: 0 is full attention; W: position p sees (p - W, p]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def first_layers(self, count: int) -> ModelConfig:
        """The same model with its first `count` layers alone, 0 < count <= num_layers."""
        return replace(self, num_layers=count, layer_windows=self.layer_windows[:count])


@dataclass(frozen=True)
class GenerationDefaults:
    """How a model wants to be sampled; the defaults here are those of a model that does not say: greedy."""

    do_sample: bool = False
    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off


# ---- reading files --------------------------------------------------------------------------------------


def regular_file_size(path: Path) -> int:
    """The size in bytes of the regular file (or link to one) at `path`; CheckpointError if there is none."""
    try:
        info = path.stat()
    except FileNotFoundError:
        found = "a broken link" if path.is_symlink() else "none"
        raise CheckpointError(f"{path}: expected a file, found {found}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: expected a file, found: {error.strerror}") from None
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path}: expected a file, found something else")
    return info.st_size


def refuse_lfs_pointer(path: Path, head: bytes) -> None:
    """Raise CheckpointError if `head`, the beginning of a file, is that of a Git-LFS pointer."""
    if head.startswith(LFS_MAGIC):
        raise CheckpointError(
            f"{path}: expected the file itself, found a Git-LFS pointer; fetch it with: git lfs pull"
        )


def shorten(value: Any, limit: int = 80) -> str:
    """`value` as JSON-like text on one line of at most `limit` characters, for error messages."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def parse_json_object(data: bytes, source: str) -> dict[str, Any]:
    """The JSON object in `data`; CheckpointError if it is not strict UTF-8 JSON without duplicate keys."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{source}: expected UTF-8, found byte 0x{data[error.start]:02x} at {error.start}"
        ) from None
    except RecursionError:
        raise CheckpointError(f"{source}: expected JSON, found brackets nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{source}: expected JSON, found {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: expected a JSON object, found {shorten(value)}")
    return value


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {shorten(key)} twice")
        result[key] = value
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"the constant {name}, which JSON does not have")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`, read strictly.

    Raises CheckpointError if there is no such file, if it is larger than MAX_JSON_BYTES, a Git-LFS
    pointer, not UTF-8, not JSON, not an object, or has a key twice.
    """
    path = Path(path)
    size = regular_file_size(path)
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: expected at most {MAX_JSON_BYTES} bytes of JSON, found {size}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found: {error.strerror}") from None
    refuse_lfs_pointer(path, data)
    return parse_json_object(data, str(path))


# ---- typed access ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fields:
    """Typed access to a JSON object; errors name `source` and the key."""

    raw: Mapping[str, Any]
    source: str
    defaults: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """The value, or else its default; _REQUIRED if there is neither."""
        return self.raw.get(key, self.defaults.get(key, _REQUIRED))

    def error(self, key: str, expected: str) -> CheckpointError:
        value = self.get(key)
        found = "no such key" if value is _REQUIRED else shorten(value)
        return CheckpointError(f"{self.source}: {key}: expected {expected}, found {found}")

    def unsupported(self, key: str, expected: str, found: str | None = None) -> UnsupportedError:
        found = shorten(self.get(key)) if found is None else found
        return UnsupportedError(
            f"{self.source}: {key}: expected {expected}, found {found}, which is not supported"
        )

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.get(key)
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float) -> float:
        value = self.get(key)
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.error(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """Token ids from null, one id or a list of ids, each once."""
        value = self.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(i) is not int or not 0 <= i < vocab_size for i in ids):
            raise self.error(key, f"token ids from 0 to {vocab_size - 1}")
        return tuple(dict.fromkeys(ids))


# ---- config.json ----------------------------------------------------------------------------------------


def load_config(directory: Path) -> ModelConfig:
    """The model in `directory`: its config.json, with the EOS ids of generation_config.json if that has some.

    Raises CheckpointError if a file is missing, damaged or absurd, UnsupportedError if the model is not
    one that ffmini runs.
    """
    directory = Path(directory)
    path = directory / "config.json"
    config = parse_config(read_json(path), str(path))
    generation = _generation_fields(directory)
    if generation is None or generation.get("eos_token_id") is None:
        return config
    return replace(config, eos_token_ids=generation.token_ids("eos_token_id", config.vocab_size))


def parse_config(raw: dict[str, Any], source: str) -> ModelConfig:
    """The ModelConfig that the parsed config.json `raw` describes; `source` stands for the file in errors.

    Raises CheckpointError and UnsupportedError as load_config does.
    """
    model_type = _model_type(raw, source)
    fields = _Fields(raw, source, DEFAULTS[model_type])
    _refuse_unsupported(fields, model_type)
    vocab_size = fields.integer("vocab_size", 1, _MAX_VOCAB)
    num_layers = fields.integer("num_hidden_layers", 1, 1024)
    num_heads, num_kv_heads, head_dim = _heads(fields)
    attention_bias = fields.flag("attention_bias")
    bos = fields.token_ids("bos_token_id", vocab_size)
    if len(bos) > 1:
        raise fields.error("bos_token_id", "one token id")
    return ModelConfig(
        model_type=model_type,
        hidden_size=fields.integer("hidden_size", 1, 1 << 17),
        intermediate_size=fields.integer("intermediate_size", 1, 1 << 20),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_position_embeddings=fields.integer("max_position_embeddings", 1, _MAX_POSITIONS),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-12, 1e-1),
        rope=_rope(fields),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        # Qwen2 always has biases on q, k and v and never on o, whatever attention_bias says.
        qkv_bias=attention_bias or model_type == "qwen2",
        o_bias=attention_bias and model_type != "qwen2",
        mlp_bias=fields.flag("mlp_bias"),
        qk_norm=model_type == "qwen3",
        layer_windows=_layer_windows(fields, model_type, num_layers),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
    )


def _model_type(raw: Mapping[str, Any], source: str) -> str:
    """The family, from model_type or else from architectures; both must agree where both are given."""
    fields = _Fields(raw, source, {})
    architectures = raw.get("architectures")
    if architectures is None:
        architectures = []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise fields.error("architectures", "a list of names")
    by_architecture = {name.lower(): family for family, name in ARCHITECTURES.items()}
    supported = ", ".join(ARCHITECTURES)
    model_type = raw.get("model_type")
    if model_type is None:
        if not architectures:
            raise CheckpointError(f"{source}: model_type: expected one of {supported}, found no such key")
        model_type = by_architecture.get(architectures[0].lower())
        if model_type is None:
            raise fields.unsupported("architectures", f"one of {', '.join(ARCHITECTURES.values())}")
    if not isinstance(model_type, str):
        raise fields.error("model_type", f"one of {supported}")
    if model_type not in ARCHITECTURES:
        raise fields.unsupported("model_type", f"one of {supported}")
    if architectures and by_architecture.get(architectures[0].lower()) != model_type:
        raise fields.unsupported(
            "architectures", f"[{ARCHITECTURES[model_type]!r}] for model_type {model_type!r}"
        )
    return model_type


def _refuse_unsupported(fields: _Fields, model_type: str) -> None:
    """Raise UnsupportedError if a key asks for a computation that ffmini does not do."""
    for key, allowed in _NEUTRAL.items():
        if key in fields.raw and fields.raw[key] not in allowed:
            raise fields.unsupported(key, " or ".join(shorten(value) for value in allowed))
    if model_type == "mistral" and fields.flag("attention_bias"):
        raise fields.unsupported("attention_bias", "false for model_type 'mistral'")
    if model_type != "llama" and fields.flag("mlp_bias"):
        raise fields.unsupported("mlp_bias", f"false for model_type {model_type!r}")


def _heads(fields: _Fields) -> tuple[int, int, int]:
    """num_heads, num_kv_heads and head_dim."""
    num_heads = fields.integer("num_attention_heads", 1, _MAX_HEADS)
    num_kv_heads = num_heads
    if fields.get("num_key_value_heads") is not None:
        num_kv_heads = fields.integer("num_key_value_heads", 1, _MAX_HEADS)
    if num_heads % num_kv_heads != 0:
        raise fields.unsupported("num_key_value_heads", f"a divisor of num_attention_heads, {num_heads}")
    if num_heads // num_kv_heads > MAX_GQA_RATIO:
        at_least = -(-num_heads // MAX_GQA_RATIO)
        raise fields.unsupported(
            "num_key_value_heads", f"at least {at_least} for {num_heads} attention heads"
        )
    if fields.get("head_dim") is not None:
        head_dim = fields.integer("head_dim", 1, 1 << 16)
    else:
        hidden_size = fields.integer("hidden_size", 1, 1 << 17)
        if hidden_size % num_heads != 0:
            raise fields.error(
                "hidden_size", f"a multiple of num_attention_heads, {num_heads}, as head_dim is not given"
            )
        head_dim = hidden_size // num_heads
    if head_dim not in HEAD_DIMS:
        raise fields.unsupported("head_dim", f"one of {', '.join(map(str, HEAD_DIMS))}", str(head_dim))
    return num_heads, num_kv_heads, head_dim


def _layer_windows(fields: _Fields, model_type: str, num_layers: int) -> tuple[int, ...]:
    """The sliding window of each layer, 0 for full attention, as transformers decides it for each family.

    Qwen: layers from max_window_layers on if use_sliding_window, unless layer_types says it. Mistral: all
    layers if sliding_window is not null. Llama has none.
    """
    window, first = 0, 0
    switched_off = model_type != "mistral" and not fields.flag("use_sliding_window")
    if fields.get("sliding_window") is not None and not switched_off:
        window = fields.integer("sliding_window", 1, _MAX_POSITIONS)
    if model_type == "llama" and window:
        raise fields.unsupported("sliding_window", "null for model_type 'llama'")
    if model_type.startswith("qwen") and window:
        first = fields.integer("max_window_layers", 0, 1024)
    windows = tuple(window if layer >= first else 0 for layer in range(num_layers))

    layer_types = fields.get("layer_types")
    if layer_types is None:
        return windows
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise fields.error("layer_types", f"a list of {num_layers} names, one per layer")
    for name in layer_types:
        if name not in ("full_attention", "sliding_attention"):
            raise fields.unsupported("layer_types", "'full_attention' or 'sliding_attention'", shorten(name))
    if "sliding_attention" in layer_types and not window:
        raise fields.error("layer_types", "no 'sliding_attention', as no sliding window is in use")
    by_type = tuple(window if name == "sliding_attention" else 0 for name in layer_types)
    if not model_type.startswith("qwen") and by_type != windows:
        raise fields.unsupported(
            "layer_types", f"the same attention in every layer for model_type {model_type!r}"
        )
    return by_type


# ---- rope -----------------------------------------------------------------------------------------------


def _rope(fields: _Fields) -> RopeConfig:
    """The rotary embedding from either spelling; two spellings that contradict each other are refused."""
    found: list[tuple[str, RopeConfig]] = []
    for key in ("rope_parameters", "rope_scaling"):
        value = fields.raw.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise fields.error(key, "an object or null")
        found.append((key, _rope_from(fields, key, value)))
    if not found:
        return RopeConfig(_rope_theta(fields), "default", {})
    if len(found) == 2 and found[0][1] != found[1][1]:
        raise fields.error("rope_scaling", "the same as rope_parameters")
    return found[0][1]


def _rope_theta(fields: _Fields) -> float:
    return fields.number("rope_theta", 1.0 + 1e-3, 1e15)


def _rope_from(fields: _Fields, key: str, raw: dict[str, Any]) -> RopeConfig:
    """The RopeConfig of one dictionary, rope_parameters or rope_scaling, which stands under `key`."""
    for layer_type, value in raw.items():
        if isinstance(value, dict):
            raise fields.unsupported(key, "one rope for all layers", f"one for {shorten(layer_type)}")
    rope_type = _rope_type(_Fields(raw, f"{fields.source}: {key}", {}))
    outer_theta = _rope_theta(fields)
    defaults = {"rope_theta": outer_theta} | _ROPE_DEFAULTS[rope_type]
    rope = _Fields(raw, f"{fields.source}: {key}", defaults)
    for name in raw:
        if name not in _ROPE_DEFAULTS[rope_type] and name not in _ROPE_COMMON_KEYS:
            raise fields.unsupported(key, f"only keys of rope type {rope_type!r}", shorten(name))
    if raw.get("partial_rotary_factor") not in (None, 1.0):
        raise rope.unsupported("partial_rotary_factor", "1")
    theta = _rope_theta(rope)
    if "rope_theta" in fields.raw and outer_theta != theta:
        raise fields.error("rope_theta", f"{theta:g} as in {key}")
    params = {name: _rope_param(rope, name) for name in _ROPE_DEFAULTS[rope_type]}
    if rope_type in ("llama3", "yarn"):
        params["original_max_position_embeddings"] = _original_positions(fields, rope)
    for lower, upper in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if lower in params and not params[lower] < params[upper]:
            raise rope.error(upper, f"more than {lower}, {params[lower]:g}")
    return RopeConfig(theta, rope_type, params)


def _rope_type(rope: _Fields) -> str:
    """The value of rope_type, or of type as older configs call it."""
    names = [rope.raw[key] for key in ("rope_type", "type") if rope.raw.get(key) is not None]
    if len(names) == 2 and names[0] != names[1]:
        raise rope.error("type", f"the same as rope_type, {shorten(names[0])}")
    rope_type = names[0] if names else "default"
    if not isinstance(rope_type, str) or rope_type not in _ROPE_DEFAULTS:
        raise rope.unsupported("rope_type", f"one of {', '.join(_ROPE_DEFAULTS)}", shorten(rope_type))
    return rope_type


def _rope_param(rope: _Fields, name: str) -> float | None:
    """One scaling parameter; null counts as left out."""
    default = rope.defaults[name]
    if rope.raw.get(name) is None and default is not _REQUIRED:
        return default
    if name == "truncate":
        return rope.flag(name)
    return rope.number(name, *_ROPE_RANGES[name])


def _original_positions(fields: _Fields, rope: _Fields) -> int:
    """The context that the model was first trained for; the top level goes first, as in transformers."""
    for place in (fields, rope):
        if place.raw.get("original_max_position_embeddings") is not None:
            return place.integer("original_max_position_embeddings", 1, _MAX_POSITIONS)
    return fields.integer("max_position_embeddings", 1, _MAX_POSITIONS)


# ---- generation_config.json -----------------------------------------------------------------------------


def _generation_fields(directory: Path) -> _Fields | None:
    """generation_config.json of `directory`, nulls left out, with defaults; None if there is no such file."""
    path = Path(directory) / "generation_config.json"
    if not os.path.lexists(path):
        return None
    raw = {key: value for key, value in read_json(path).items() if value is not None}
    sampling = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
    greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    common = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": None}
    return _Fields(raw, str(path), common | (sampling if raw.get("do_sample") is True else greedy))


def load_generation_defaults(directory: Path) -> GenerationDefaults:
    """How the model in `directory` wants to be sampled, from its generation_config.json.

    Greedy if there is none, or if it does not say do_sample. Of a sampling model, keys that are left out
    have transformers' defaults (temperature 1, top_k 50). Raises CheckpointError for values out of range.
    """
    fields = _generation_fields(directory)
    if fields is None:
        return GenerationDefaults()
    do_sample = fields.flag("do_sample")
    temperature = fields.number("temperature", 0.0, 1e3)
    return GenerationDefaults(
        do_sample=do_sample,
        temperature=temperature if do_sample else 0.0,
        top_k=fields.integer("top_k", 0, _MAX_VOCAB),
        top_p=fields.number("top_p", 0.0, 1.0),
        min_p=fields.number("min_p", 0.0, 1.0),
        repetition_penalty=fields.number("repetition_penalty", 1e-3, 1e3),
    )
