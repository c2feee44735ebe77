"""What is known of Hugging Face models: families, shapes, configs, checkpoint files."""
