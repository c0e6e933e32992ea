"""What every script leans on and no experiment changes: files, checkpoints, processes, messages."""
