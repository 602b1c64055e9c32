"""When a gate decides, and what follows."""
