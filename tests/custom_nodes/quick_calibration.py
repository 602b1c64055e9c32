"""Loaded by the tests' server after the pack: a calibration takes few images, of few steps, and fewer noise levels."""

import sys

NODE_CLASS_MAPPINGS = {}
FEW = {
    "probe.image": {"CONCEPT_IMAGES": 8, "OTHER_IMAGES": 8, "STEPS": 2},
    "probe.calibrate": {"PROBED_STEPS": (1, 2)},
}

for part, values in FEW.items():
    (module,) = [module for name, module in sys.modules.items() if name.endswith(f"unguide.unguide_comfy.{part}")]
    for name, value in values.items():
        getattr(module, name)
        setattr(module, name, value)
