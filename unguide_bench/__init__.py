"""Measures erasure: judged pictures to scores, on the demo model and on real ones through a ComfyUI server.

It knows neither comfy nor the pack's nodes; what it needs beyond the standard library and numpy is the extra `bench`.
"""
