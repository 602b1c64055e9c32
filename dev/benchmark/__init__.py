"""The erasure benchmark on the demo model, in a real ComfyUI: `python3 dev benchmark`.

`studio` generates and judges, `methods` are the ways to erase, `attacks` the ways around them, `cells` cuts the work
into resumable pieces, `main` runs them. Scores and reports are `unguide_bench`'s.
"""
