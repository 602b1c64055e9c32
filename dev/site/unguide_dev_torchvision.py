"""Lets a CUDA build of torchvision import beside a CPU build of torch; lives in the development environment only.

A finder at the front of `sys.meta_path` that waits for the first `import torchvision`, declares the two operators that
torchvision looks up while it is imported, and steps aside. It costs nothing in a program that never imports
torchvision. It does not implement the operators: calling `torchvision.ops.nms` still fails.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

OPERATORS = (
    ("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
    ("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
)


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Declares torchvision's operators when torchvision is about to be imported; finds no module itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            from torch import library

            for name, schema in OPERATORS:
                library.define(name, schema)
        return None


sys.meta_path.insert(0, DeclareOperators())
