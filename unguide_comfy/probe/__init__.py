"""What predictions say about a prompt: statistics, what they are compared with, and decisions."""
