"""What every script uses and no experiment changes: files, checkpoints, processes, messages."""
