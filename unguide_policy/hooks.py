"""The two functions of the host that the policy wraps, once, and the health route.

comfy.samplers.CFGGuider.sample          every sampler node and guider passes it: the run is guarded here
comfy.model_base.BaseModel.apply_model   every prediction passes it: refused unless its run was guarded
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import comfy.model_base
import comfy.samplers
from aiohttp import web
from server import PromptServer

from .guard import Guard
from .refusal import PACK, without_our_frames

ROUTE = "/unguide/policy"

SIGNATURES = {
    "CFGGuider.sample": "self noise latent_image sampler sigmas denoise_mask callback disable_pbar seed",
    "BaseModel.apply_model": "self x t c_concat c_crossattn control transformer_options kwargs",
}
"""The parameters that the hooks know."""

NOWHERE = "<server>"
"""The file that tracebacks name for a hook."""


def arm(guard: Guard) -> None:
    """Wrap the two functions. Raises: RuntimeError if one has other parameters than known."""
    sample = _known(comfy.samplers.CFGGuider.sample)
    apply_model = _known(comfy.model_base.BaseModel.apply_model)

    @functools.wraps(sample)
    def guarded_sample(self: Any, noise: Any, latent_image: Any, sampler: Any, *args: Any, **kwargs: Any) -> Any:
        images = len(noise.unbind()[0]) if noise.is_nested else len(noise)
        try:
            with guard.over(self, sampler, images):
                return sample(self, noise, latent_image, sampler, *args, **kwargs)
        except Exception as error:
            raise without_our_frames(error)  # noqa: B904  (the same error)

    @functools.wraps(apply_model)
    def guarded_apply_model(self: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        options = kwargs["transformer_options"] if "transformer_options" in kwargs else dict(enumerate(args)).get(3)
        guard.check(options or {}, len(x))
        return apply_model(self, x, t, *args, **kwargs)

    comfy.samplers.CFGGuider.sample = _anonymous(guarded_sample)
    comfy.model_base.BaseModel.apply_model = _anonymous(guarded_apply_model)


def add_route(guard: Guard) -> None:
    """Add the health route: 200 while both hooks are where `arm` has put them, else 503."""
    hooks = comfy.samplers.CFGGuider.sample, comfy.model_base.BaseModel.apply_model

    @PromptServer.instance.routes.get(ROUTE)
    async def health(request: web.Request) -> web.Response:
        armed = (comfy.samplers.CFGGuider.sample, comfy.model_base.BaseModel.apply_model) == hooks
        return web.json_response(status(guard, armed), status=200 if armed else 503)


def status(guard: Guard, armed: bool) -> dict[str, Any]:
    """Return what the health route answers; details only where clients may know them."""
    policy = guard.policy
    answer: dict[str, Any] = {"armed": armed, "version": _version()}
    if policy.tell_clients:
        answer["models"] = {
            name: {"weights": m.weights, "adapters": list(m.adapters)} for name, m in policy.models.items()
        }
        answer["adapters"] = {name: {"sha256": a.sha256, "concept": a.concept} for name, a in policy.adapters.items()}
    return answer


def _known(function: Callable[..., Any]) -> Callable[..., Any]:
    found = " ".join(inspect.signature(function).parameters)
    expected = SIGNATURES[function.__qualname__]
    if found != expected:
        raise RuntimeError(
            f"this ComfyUI's {function.__qualname__} takes ({found}), and the policy knows ({expected}); use a tested "
            "version of ComfyUI, or a newer one of this pack"
        )
    return function


def _anonymous(function: Any) -> FunctionType:
    """The function with a code object that names no file."""
    function.__code__ = function.__code__.replace(co_filename=NOWHERE)
    return function


def _version() -> str:
    found = re.search(r'^version = "(.+)"$', Path(PACK, "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else "unknown"
