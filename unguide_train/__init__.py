"""Training erasure LoRAs outside ComfyUI, with diffusers and peft: `python -m unguide_train --help`.

The recipes, the loop and the objective are `unguide_core`'s, the same as in the graph; nothing of the mathematics is
here. Needs the extra `train` (pip install comfyui-unguide[train]).

    config.py       what to train, from the command line or a YAML file
    model.py        checkpoints and diffusers folders of SD 1.x and SDXL; the adapter
    text.py         their text encoders: prompts to states
    checkpoint.py   an unfinished training on disk
    job.py          one concept, from start or checkpoint to its file
    cluster.py      many concepts on Ray
    cli.py          the command line
"""
