"""Training an erasure adapter. Importing the package itself loads nothing.

prompts.py   which prompts are erased, mapped to a reference and kept (does not import torch)
layers.py    which layers are trained (does not import torch)
recipe.py    how: the recipe and the presets
rollout.py   sampled trajectories and their latents
trainer.py   the training loop
finish.py    calibrates what was trained
"""
