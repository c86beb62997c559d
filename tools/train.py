"""Train the bundled model: a small Llama on public-domain fairy tales, with its own byte-level BPE tokenizer.

    python tools/train.py --data fairy_tales.txt --out models/tales-7m --minutes 4

One book is held out of everything; its perplexity is printed at the end. The output directory is a
Hugging Face checkpoint: model.safetensors in bf16, its configs and the tokenizer.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

HELD_OUT = "The Orange Fairy Book"  # how the first line of the held-out book begins
VALIDATION_EVERY = 50  # every 50th tale of the other books picks the best checkpoint and is not trained on
BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 0, 1
MAX_BYTES = 16_000_000
WARMUP_STEPS = 100
RESERVE_SECONDS = 30  # of the time limit, for what follows training
CONTEXT = 1024
CONFIG = {
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
GENERATION = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, **SAMPLING)
ROMAN_OR_NUMBER = re.compile(r"[IVXLC\d]+\.?")


# --- text and tokens


def read_books(path: Path) -> tuple[list[list[str]], str]:
    """The training books as lists of paragraphs, and the held-out book as one text."""
    books = [book.strip("\n") for book in path.read_text(encoding="utf-8").split("\n\n")]
    held_out = [book for book in books if book.startswith(HELD_OUT)]
    if len(held_out) != 1:
        raise SystemExit(f"{path}: expected one book that begins with {HELD_OUT!r}, found {len(held_out)}")
    return [book.split("\n") for book in books if book is not held_out[0]], held_out[0]


def is_heading(line: str, following: str) -> bool:
    """True for the title of a tale or chapter: short, in capitals or title case, before running text."""
    if len(line) > 80 or len(following) < 120 or ROMAN_OR_NUMBER.fullmatch(line):
        return False
    if line.isupper():
        return True
    words = [word.strip("'\"(") for word in line.split() if len(word) > 3]
    return bool(words) and line[-1] not in ".,;:!?'\"-" and all(word[:1].isupper() for word in words)


def split_tales(books: list[list[str]]) -> list[str]:
    """Cut every book before each heading; a piece is a heading and the paragraphs up to the next one."""
    tales: list[list[str]] = []
    for book in books:
        tales.append([])
        for line, following in zip(book, [*book[1:], ""], strict=True):
            if is_heading(line, following) and tales[-1]:
                tales.append([])
            tales[-1].append(line)
    return ["\n".join(tale) for tale in tales]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of CONFIG's vocab_size entries; encode() puts BOS first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def encode_tales(tokenizer: Tokenizer, tales: list[str]) -> tuple[Tensor, Tensor]:
    """All tales in one stream, EOS after each (int64 [n]), and where the text below each title starts."""
    ids: list[int] = []
    starts: list[int] = []
    newline = tokenizer.token_to_id("Ċ")
    for tale in tokenizer.encode_batch(tales, add_special_tokens=False):
        starts.append(len(ids) + (tale.ids.index(newline) + 1 if newline in tale.ids else 0))
        ids += [*tale.ids, EOS_ID]
    return torch.tensor(ids), torch.tensor(starts)


# --- model


def make_model(dropout: float) -> LlamaForCausalLM:
    """A fresh float32 model; dropout acts on the embedding, attention weights and both residual branches."""
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attention_dropout=dropout))
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(lambda m, _, output: F.dropout(output, dropout, m.training))
        if name.endswith(("o_proj", "down_proj")):  # what all layers add stays small
            module.weight.data *= (2 * CONFIG["num_hidden_layers"]) ** -0.5
    return model


def logits_of(model: LlamaForCausalLM, targets: Tensor) -> Tensor:
    """Logits [batch, time, vocab_size] that predict targets, int64 [batch, time], after a BOS."""
    inputs = F.pad(targets[:, :-1], (1, 0), value=BOS_ID)
    return model(input_ids=inputs, use_cache=False).logits


# --- training


def epoch_starts(length: int, openings: Tensor) -> Tensor:
    """Where the windows of one epoch start, shuffled: a stream of that length cut at a random offset,
    and a share of the tales' openings, so that a text right after BOS is often the beginning of a tale."""
    last = length - CONTEXT
    cuts = torch.arange(int(torch.randint(CONTEXT, ())), last + 1, CONTEXT)
    openings = openings[openings <= last]
    openings = openings[torch.randperm(len(openings))[: len(cuts) // 8]]
    starts = torch.cat((cuts, openings))
    return starts[torch.randperm(len(starts))]


@torch.no_grad()
def negative_log_likelihood(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """Sum of -ln p over all tokens, int64 [n], in windows of the full context that advance by half of it.

    Each window begins with BOS. A token counts once: after the first window with at least half a context.
    """
    model.eval()
    half = CONTEXT // 2
    windows = max(0, math.ceil((len(tokens) - CONTEXT) / half)) + 1
    padded = F.pad(tokens, (0, (windows + 1) * half - len(tokens)), value=EOS_ID)
    batches = padded.unfold(0, CONTEXT, half).split(16)  # [windows, CONTEXT] in all
    losses = torch.cat([F.cross_entropy(logits_of(model, b).mT, b, reduction="none") for b in batches])
    counted = torch.cat((losses[0, :half], losses[:, half:].flatten()))[: len(tokens)]
    return float(counted.double().sum())


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.AdamW, targets: Tensor, rate: float) -> Tensor:
    """One update on windows of tokens, int64 [batch, CONTEXT], in mixed precision; returns the loss."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(targets.device.type, torch.bfloat16):
        logits = logits_of(model, targets)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def train(
    model: LlamaForCausalLM, stream: Tensor, openings: Tensor, validation: Tensor, args: argparse.Namespace
) -> None:
    """Train until --epochs, --steps or the time limit is reached; leave the best weights on validation.

    The cosine schedule follows the used share of the steps or of the time, so it ends at zero in every case.
    """
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=args.device == "cuda")
    window = torch.arange(CONTEXT, device=stream.device)
    starts = epoch_starts(len(stream), openings)
    epoch = len(starts) // args.batch
    steps = args.steps or args.epochs * epoch
    best, best_state, position, step, progress = math.inf, {}, 0, 0, 0.0
    while progress < 1.0:
        if position + args.batch > len(starts):
            starts, position = epoch_starts(len(stream), openings), 0
        batch = starts[position : position + args.batch].to(stream.device)
        rate = args.lr * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * progress))
        loss = train_step(model, optimizer, stream[batch[:, None] + window], rate)
        position, step = position + args.batch, step + 1
        progress = max(step / steps, (time.monotonic() - args.begin) / (60 * args.minutes - RESERVE_SECONDS))
        if step % epoch == 0 or progress >= 1.0:
            value = negative_log_likelihood(model, validation) / len(validation)
            clock = f"step {step}/{steps}, {time.monotonic() - args.begin:.0f} s"
            print(f"{clock}: train {loss:.4f}, validation {value:.4f}", flush=True)
            if value < best:
                best, best_state = value, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)


# --- results


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json and tokenizer_config.json."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_model(model: LlamaForCausalLM, out: Path) -> None:
    """model.safetensors in bf16, config.json, generation_config.json; the model itself is spent by this."""
    model.config.attention_dropout = 0.0
    model.generation_config = GENERATION
    model.to(torch.bfloat16).save_pretrained(out)
    size = (out / "model.safetensors").stat().st_size
    print(f"{out / 'model.safetensors'}: {model.num_parameters() / 1e6:.2f} M parameters, {size} bytes")
    if size > MAX_BYTES:
        raise SystemExit(f"{out / 'model.safetensors'}: expected at most {MAX_BYTES} bytes, found {size}")


def report(tokenizer: Tokenizer, held_out: str, args: argparse.Namespace) -> None:
    """Print the score of the saved weights on the held-out book, computed in float32, and three samples."""
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device)
    ids = torch.tensor(tokenizer.encode(held_out, add_special_tokens=False).ids, device=args.device)
    nats, size = negative_log_likelihood(model, ids), len(held_out.encode())
    print(f"{HELD_OUT} (held out): {len(ids)} tokens, {size} bytes")
    bits = nats / math.log(2) / size
    print(f"perplexity {math.exp(nats / len(ids)):.3f} per token, {bits:.4f} bits per byte")
    prompt = torch.tensor([tokenizer.encode("Once upon a time").ids] * 3, device=args.device)
    mask = torch.ones_like(prompt)
    for tokens in model.generate(prompt, attention_mask=mask, max_new_tokens=250, pad_token_id=EOS_ID):
        print("---\n" + tokenizer.decode(tokens.tolist()))


def parse_args() -> argparse.Namespace:
    """Options; begin is the time at which the limit of --minutes starts to count."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    option = parser.add_argument
    option("--data", type=Path, required=True, help="books separated by blank lines, one paragraph a line")
    option("--out", type=Path, required=True, help="directory for the checkpoint")
    option("--tokenizer", type=Path, help="use this tokenizer.json; otherwise train one")
    option("--minutes", type=float, default=4.0, help="limit for the whole run, evaluation included")
    option("--epochs", type=int, default=30)
    option("--steps", type=int, help="instead of --epochs; 0 stops after the tokenizer and config.json")
    option("--batch", type=int, default=16, help="windows of the full context in a step")
    option("--lr", type=float, default=2e-3, help="peak learning rate")
    option("--weight-decay", type=float, default=0.1)
    option("--dropout", type=float, default=0.2)
    option("--seed", type=int, default=1)
    option("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args(namespace=argparse.Namespace(begin=time.monotonic()))


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    books, held_out = read_books(args.data)
    tales = split_tales(books)
    tokenizer = Tokenizer.from_file(str(args.tokenizer)) if args.tokenizer else train_tokenizer(tales)
    args.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, args.out)
    if args.steps == 0:
        LlamaConfig(**CONFIG, dtype="bfloat16").save_pretrained(args.out)
        GENERATION.save_pretrained(args.out)
        return
    stream, openings = encode_tales(tokenizer, [t for i, t in enumerate(tales) if i % VALIDATION_EVERY])
    validation, _ = encode_tales(tokenizer, tales[::VALIDATION_EVERY])
    print(f"{len(tales)} tales: {len(stream)} tokens to train on, {len(validation)} for validation")
    model = make_model(args.dropout).to(args.device)
    train(model, stream.to(args.device), openings, validation.to(args.device), args)
    save_model(model, args.out)
    report(tokenizer, held_out, args)
    print(f"done in {time.monotonic() - args.begin:.0f} s")


if __name__ == "__main__":
    main()
