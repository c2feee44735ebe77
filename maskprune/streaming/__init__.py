"""The export from checkpoint to checkpoint, block by block, without the model in memory."""
