"""MaskPrune in a PyTorch loop of your own: python examples/bare_loop.py MODEL TEXT OUT."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import maskprune as mp

source, text, out, steps = sys.argv[1], sys.argv[2], sys.argv[3], int((sys.argv[4:] or [300])[0])
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(source)
tokens = torch.tensor(tokenizer(open(text).read()).input_ids)
blocks = tokens[: len(tokens) // 128 * 128].view(-1, 128)

masks = mp.attach_masks(model)
solver = mp.Minimax(masks, mp.Budget(model, sparsity=0.2), total_steps=steps)
optimizer = torch.optim.AdamW(
    [
        {"params": [p for n, p in model.named_parameters() if "maskprune" not in n], "lr": 1e-5},
        {"params": masks.parameters(), "lr": 1e-2, "weight_decay": 0.0},
    ]
)
for step in range(steps):
    batch = blocks[torch.arange(step * 2, step * 2 + 2) % len(blocks)]
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    optimizer.param_groups[1]["lr"] = 1e-2 * min(1.0, (1 - step / steps) / 0.1)
    optimizer.step()
    optimizer.zero_grad()
    solver.step()
    if step % 20 == 0:
        print(f"step {step} loss {loss.item():.3f} R {solver.read()['R']:.3f}")

print("largest pruned mask before the cut:", solver.finish())
mp.export(model, masks).save_pretrained(out)
tokenizer.save_pretrained(out)
