"""What each command does on disk."""
