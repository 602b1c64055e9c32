"""The erasure benchmark on the demo model, in a real ComfyUI: `python3 dev benchmark`.

`studio` draws and judges, `methods` names the ways to erase, `attacks` those around them, `cells` cuts the work into
resumable pieces, `main` runs them. Scores and reports are `unguide_bench`'s.
"""
