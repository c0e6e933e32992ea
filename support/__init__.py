"""What the scripts lean on and no experiment changes."""
