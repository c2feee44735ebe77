"""MaskLLM in a PyTorch loop of your own: python examples/two_four_loop.py MODEL TEXT OUT."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskprune.two_four import apply_masks, attach_two_four, one_shot_masks

source, text, out, steps = sys.argv[1], sys.argv[2], sys.argv[3], int((sys.argv[4:] or [300])[0])
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(source)
tokens = torch.tensor(tokenizer(open(text).read()).input_ids)
blocks = tokens[: len(tokens) // 128 * 128].view(-1, 128)

masks = attach_two_four(model, prior=one_shot_masks(model, "wanda", blocks[:16]))
optimizer = torch.optim.AdamW(masks.parameters(), lr=5e-3, betas=(0.9, 0.95), eps=1e-5)
for step in range(steps):
    done = step / steps
    masks.schedule(kappa=100 + 400 * done, tau=2 - 1.95 * done)
    masks.draw(step)  # fresh noise for this forward
    batch = blocks[torch.arange(step * 2, step * 2 + 2) % len(blocks)]
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    kept, _ = masks.kept_norms()
    (loss - 1500 * (1 - done) * kept / masks.dense_norm()).backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step} loss {loss.item():.3f} max p {masks.statistics()['max_prob']:.3f}")

chosen = masks.choice()
masks.detach()
apply_masks(model, chosen)
model.save_pretrained(out)
tokenizer.save_pretrained(out)
