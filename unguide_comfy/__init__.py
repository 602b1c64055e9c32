"""UnGuide inside ComfyUI: the only code that touches `comfy.*`. The folders follow the way the data takes.

    model/    which model this is, and its weights without patches
    lora/     a file becomes low-rank layers on the model's modules
    blend/    base and adapted predictions of one denoising step, blended
    probe/    what the predictions say about a prompt: statistics and decisions
    report/   what the user sees
    gate/     when the gate decides, and what follows
    train/    an erasure LoRA trained on the model as it is loaded
    erase/    an erasure LoRA in closed form, without training

Each folder imports only from those above it.
"""
