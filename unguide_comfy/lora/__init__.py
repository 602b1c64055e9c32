"""Erasure LoRAs: a file becomes low-rank layers on a model's modules, and back."""
