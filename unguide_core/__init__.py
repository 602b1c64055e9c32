"""The method of UnGuide (arXiv 2508.05755) in plain torch.

Knows no host program: nothing in here imports ComfyUI, diffusers or peft. Import the module you need, for instance
``from unguide_core.guidance import blend``; importing the package itself loads nothing.

    guidance.py     blend base and adapted predictions; classifier-free guidance
    probe.py        is the erased concept in this prompt? statistics and the decision
    adapter.py      low-rank layers, an adapter, its card
    card.py         what an adapter erases; readable without torch
    names.py        what layers are called, here and elsewhere
    formats/        the formats that adapters come in
    containers.py   the files that hold them, opened without running anything in them
    objective.py    what an erasure adapter is trained towards
    layers.py       which layers of a model are trained
    prompts.py      which prompts: erased, in their place, kept
    training.py     the recipes, the latents they train at, the training loop
    trajectory.py   noise schedules and the partial denoising loop
"""
