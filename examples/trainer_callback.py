"""MaskPrune as a callback of your Trainer: python examples/trainer_callback.py MODEL TEXT OUT."""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import maskprune as mp

source, text, out, steps = sys.argv[1], sys.argv[2], sys.argv[3], int((sys.argv[4:] or [300])[0])
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(source)
ids = tokenizer(open(text).read()).input_ids
rows = [ids[i : i + 128] for i in range(0, len(ids) - 127, 128)]

masks = mp.attach_masks(model)
solver = mp.Minimax(masks, mp.Budget(model, sparsity=0.2), total_steps=steps)
weights = [p for name, p in model.named_parameters() if "maskprune" not in name]
optimizer = torch.optim.AdamW(
    [
        {"params": weights, "lr": 1e-5},
        {"params": masks.parameters(), "lr": 1e-2, "weight_decay": 0.0},
    ]
)
Trainer(
    model=model,
    args=TrainingArguments(
        out + ".run",
        max_steps=steps,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        lr_scheduler_type="linear",
    ),  # fmt: skip
    train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
    optimizers=(optimizer, None),
    callbacks=[mp.PruneCallback(solver)],
).train()

print("largest pruned mask before the cut:", solver.finish())
mp.export(model, masks).save_pretrained(out)
tokenizer.save_pretrained(out)
