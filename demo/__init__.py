"""The embedded demo model: a tiny SD 1.5 that generates ten classes and ten scenes as emoji-like images."""
