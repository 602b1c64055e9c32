"""The method of UnGuide (arXiv 2508.05755) in plain torch. Does not import ComfyUI, diffusers or peft.

Import the module you need, such as ``from unguide_core.guidance import blend``; the package itself loads nothing.

    guidance.py    blending of base and adapted predictions; classifier-free guidance
    objective.py   what an erasure adapter is trained towards
    schedule.py    noise schedules and the deterministic denoising loop
    probe/         is the erased concept in this prompt? statistics, decision, calibration
    training/      prompts, layers, recipes and the training loop
    adapter/       low-rank layers, the adapter's metadata (its card), file formats
    formats.py     short name of adapter/formats
"""
