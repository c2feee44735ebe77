"""What both training loops share: data, Trainer, losses, checkpoints, progress."""
