"""MaskPrune in a DDP loop of your own: torchrun --nproc_per_node N ddp_loop.py MODEL TEXT OUT."""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

import maskprune as mp

source, text, out, steps = sys.argv[1], sys.argv[2], sys.argv[3], int((sys.argv[4:] or [300])[0])
dist.init_process_group()  # NCCL on GPUs, gloo on the CPU
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else "cpu"
rank, world = dist.get_rank(), dist.get_world_size()
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device)
tokenizer = AutoTokenizer.from_pretrained(source)
tokens = torch.tensor(tokenizer(open(text).read()).input_ids, device=device)
blocks = tokens[: len(tokens) // 128 * 128].view(-1, 128)

masks = mp.attach_masks(model)  # before DDP, which averages the masks' gradient with the others
solver = mp.Minimax(masks, mp.Budget(model, sparsity=0.2), total_steps=steps)
weights = [p for name, p in model.named_parameters() if "maskprune" not in name]
optimizer = torch.optim.AdamW(
    [
        {"params": weights, "lr": 1e-5},
        {"params": masks.parameters(), "lr": 1e-2, "weight_decay": 0.0},
    ]
)
wrapped = DistributedDataParallel(model)
for step in range(steps):
    batch = blocks[(torch.arange(2) + 2 * (step * world + rank)) % len(blocks)]
    loss = wrapped(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    optimizer.param_groups[1]["lr"] = 1e-2 * min(1.0, (1 - step / steps) / 0.1)
    optimizer.step()
    optimizer.zero_grad()
    solver.step()  # the same on every rank, so nothing is sent
solver.finish()
if rank == 0:
    mp.export(model, masks).save_pretrained(out)
    tokenizer.save_pretrained(out)
dist.destroy_process_group()
