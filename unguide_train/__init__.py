"""Training erasure LoRAs outside ComfyUI, with diffusers and peft: `python -m unguide_train --help`.

Recipes, loop, objective and calibration are those of `unguide_core`, the same as in the graph. Needs the extra `train`
(pip install unguide[train]).

    config.py       what to train, from the command line or a YAML file
    model.py        SD 1.x and SDXL from checkpoint files and diffusers folders; the adapter
    text.py         their text encoders
    calibration.py  probes prompts for the calibration
    checkpoint.py   an unfinished training on disk
    job.py          trains one concept
    cluster.py      trains many concepts on Ray
    cli.py          the command line
"""
