"""Measures the method on the demo model, inside a real ComfyUI: every figure of the documents, by `python3 dev <name>`.

    commands.py      the command lines, told apart in one table; standard library only
    runner.py        processes, progress, JSON, Markdown, the tables in documents
    studio.py        the demo model in the host: the one loader, sampler and judge; narrow.py, its fast twin
    gate.py          how well the gate decides; diagram.py draws it, few_steps.py varies the schedule
    images.py        what the gate's image stage adds
    erasure.py       how well each of methods.py erases, in the resumable pieces of cells.py; attacks.py, what gets past
    training.py      adapters trained by both programs, by the official loop, and with parts of the recipe left out
    instant.py       erasure in closed form; start.py, closed form as a start for training
    cost.py          evaluations, time and memory
    calibration.py   writes the calibrations of the demo's erasure LoRAs
    policy/          graphs on a server with and without a policy

Every gate here is the pack's own, and every score is `unguide_bench.scores`'.
"""
