"""Measures erasure: judged images to scores, on the demo model and on real ones through a ComfyUI server.

It does not import comfy or the pack's nodes; what it needs beyond the standard library and numpy is the extra `bench`.

    scores.py       judged images to Acc_e, Acc_s, Acc_g, H_o
    report.py       the page and its summary; figures.py has its plots
    api.py          the client of ComfyUI's API (standard library only)
    prompts.py      prompt files
    methods.py      the methods that are compared, and their settings
    graphs.py       the workflow of each
    generator.py    one server
    cluster.py      many servers, on Ray
    folder.py       a run's folder, from which it resumes
    generating.py   generates what is missing of a run
    judges/         what judges images; panel.py asks those that are wanted; labels.py has their words
    judging.py      a run's folder to results; tables.py shows them
    export.py       images for other tools
    technique.py    UnGuide for eval-unlearn
    suites.py       published protocols by name, with others' rows; published.py reads and verifies their files
    protocol.py     runs one
    reproduce.py    the script of the paper's experiment
    cli.py          the command line of `python -m unguide_bench`
"""
