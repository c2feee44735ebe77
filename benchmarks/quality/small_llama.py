"""Train a Llama of 1.3 million parameters on the demo's text: a real language model so small that
a pruning run of 8,750 steps fits into an hour of one core.

    python -m benchmarks.quality.small_llama -o ~/.cache/maskprune/small-llama

For questions of schedules and seeds that a larger model is too dear for. The recipe is kept here,
the weights are not: the same command makes them again (to the bit on the same machine).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from maskprune.commands.evaluate import perplexity
from maskprune.files import OWN_FOLDER, new_folder
from maskprune.hf.demo_model import cache_dir, demo_text
from maskprune.training.data import block_order, token_blocks
from maskprune.training.documents import documents

NAME = "small-llama"
VOCABULARY = 2048
EOS = "<|endoftext|>"


def folder() -> Path:
    """Where the other benchmarks look for the model."""
    return cache_dir() / NAME


def train_tokenizer(text: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2,048 tokens learned from the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(text), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def new_model(eos: int) -> LlamaForCausalLM:
    """Four layers of width 128, four heads of 32, FFN 512, tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=eos,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )


def train(
    model: LlamaForCausalLM, blocks: torch.Tensor, steps: int, batch: int, rate: float, seed: int
) -> None:
    """AdamW: 5 % warm-up, cosine to a tenth, weight decay 0.1 on matrices, gradients clipped."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.95),
    )
    warm_up = max(1, steps // 20)

    def share(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / (steps - warm_up))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    started = time.monotonic()
    for step, rows in enumerate(block_order(len(blocks), batch, steps, seed), start=1):
        ids = blocks[rows]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            speed = step * ids.numel() / (time.monotonic() - started)
            print(f"step {step} of {steps}: loss {loss.item():.3f}, {speed:.0f} tok/s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("-o", "--out", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    text, held_out = demo_text()
    tokenizer = train_tokenizer(text)
    blocks = token_blocks(text, tokenizer, args.seq_len, seed=args.seed)
    model = new_model(tokenizer.eos_token_id)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {blocks.numel():,} tokens of "
        f"text, {args.steps * args.batch_size * args.seq_len:,} to read",
        flush=True,
    )
    train(model, blocks, args.steps, args.batch_size, args.learning_rate, args.seed)
    found = perplexity(model.eval(), tokenizer, held_out, 256, limit=100)
    print(f"held-out perplexity {found['ppl']:.2f}")
    with new_folder(args.out or folder(), overwrite=True) as out:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        # With it, a list of the files is kept, by which the next call may replace them.
        (out / OWN_FOLDER).mkdir()
    return 0


if __name__ == "__main__":
    sys.exit(main())
