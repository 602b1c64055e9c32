"""Which model this is, its weights without patches, and functions that run on it once it is loaded."""
