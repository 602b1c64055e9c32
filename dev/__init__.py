"""Sets up a real ComfyUI with this pack and runs it: `python3 dev <command>`, standard library only.

    host.py         a ComfyUI: the user's own (COMFYUI_PATH) or the pinned one, fetched and verified
    environment.py  its virtual environment
    workspace.py    its base directory: the link to this pack, the demo's models
    prepare.py      the three above, in order, under a lock: arguments -> Host
    server.py       one running ComfyUI server; supervise.py makes sure that it dies with whoever started it
    api.py          the server's HTTP API
    pip.py          pip as a subprocess, its failures as one sentence
    cache.py        the cache folder: stamps, lock, free space
    report.py       what a person sees: progress lines, and errors of one sentence
    pack.py         the pack inside a ComfyUI of this very process
    inside.py       runs a module of this repository in the host's python, where Pillow and torch are
    commands/       one module a command

It knows nothing of the pack's method, and the pack knows nothing of it. What measures the method is `experiments`,
whose command lines appear here.
"""
