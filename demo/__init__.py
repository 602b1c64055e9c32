"""The embedded demo model: a tiny SD 1.5 that draws ten classes and ten scenes as emoji-like pictures."""
