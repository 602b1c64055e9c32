"""A server's own policy: erasure LoRAs that guard every image of a ComfyUI, whatever graph a client sends.

`install` is called by the pack's entry point. Without a policy file it changes nothing. See docs/policy.md.
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "UNGUIDE_POLICY"
"""Names the policy file; without it `<user directory>/__unguide/policy.yaml`, which no HTTP route of the host reads."""


def policy_file() -> Path | None:
    """Return the policy file that was asked for, whether it exists or not; None without a policy."""
    import folder_paths

    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named)
    protected = getattr(folder_paths, "get_system_user_directory", None)  # old hosts lack it
    usual = protected and Path(protected("unguide"), "policy.yaml")
    return usual if usual and os.path.lexists(usual) else None


def install() -> None:
    """Put the policy in force, if there is one.

    Raises: SystemExit, which passes the host's `except Exception` and ends the server, for anything that goes wrong.
    """
    file = None
    try:
        file = policy_file()
        if file is None:
            return
        _require_out_of_reach(file)
        from .guard import Guard
        from .hooks import add_route, arm
        from .policy import load

        guard = Guard(load(file))
        arm(guard)
        add_route(guard)
    except BaseException as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise SystemExit(f"UnGuide: this server does not start, because its policy {file} is refused: {said}") from None


def _require_out_of_reach(file: Path) -> None:
    """Raises: ValueError if the file is where clients read or write."""
    import folder_paths

    folders = folder_paths.get_input_directory(), folder_paths.get_output_directory()
    for folder in (*folders, folder_paths.get_temp_directory(), folder_paths.models_dir):
        if file.resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(f"clients can reach files in {folder}; move the policy's folder elsewhere")
