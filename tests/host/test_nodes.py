"""The nodes' schemas: what a person sees, and that its widgets start from the settings' own defaults."""

from __future__ import annotations

import ast
import dataclasses
from types import SimpleNamespace

import pytest

from tests.conftest import awaited, load_pack, pack_module
from tests.host.conftest import settings

IDS = {
    f"UnGuide{name}"
    for name in (
        "EraseConcept",
        "LoadErasureLora",
        "Calibrate",
        "Probe",
        "Model",
        "Sampler",
        "Settings",
        "TrainErasureLora",
        "SaveErasureLora",
        "DemoModel",
    )
}


@pytest.fixture(scope="module")
def schemas():
    async def listed():
        extension = await load_pack().comfy_entrypoint()
        return [node.GET_SCHEMA() for node in await extension.get_node_list()]

    return {schema.node_id: schema for schema in awaited(listed())}


def test_the_ids_are_the_documented_ones(schemas):
    assert set(schemas) == IDS
    assert {schema.category for schema in schemas.values()} == {"UnGuide"}


def test_every_node_input_and_output_explains_itself(schemas):
    for schema in schemas.values():
        assert schema.description
        for part in (*schema.inputs, *schema.outputs):
            assert part.tooltip, f"{schema.node_id}: {part}"


UNSET = ("seed", "text_clears")
"""Settings that no user chooses: the second is the server policy's."""


def test_the_settings_widgets_start_from_the_settings_defaults_and_leave_none_out(schemas):
    fields = {field.name: field.default for field in dataclasses.fields(settings()) if field.name not in UNSET}
    inputs = schemas["UnGuideSettings"].inputs
    assert {part.id for part in inputs} == set(fields)
    widgets = {part.id: part.default for part in inputs if part.id != "neutral"}
    assert widgets == {**{name: fields[name] for name in widgets}, "threshold": ""}
    node = pack_module("nodes.settings").UnGuideSettings
    assert node.execute(**widgets)[0] == settings()


def test_a_threshold_is_a_number_or_nothing():
    node = pack_module("nodes.settings").UnGuideSettings
    assert node.execute(threshold=" 0.25 ")[0] == settings(threshold=0.25)
    assert node.execute(threshold=" ")[0] == settings()
    with pytest.raises(ValueError, match=r"threshold is 'low'; expected a number such as 0\.5, or nothing"):
        node.execute(threshold="low")


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("UnGuideModel", ["model", "erasure_lora", "settings", "decision"]),
        ("UnGuideProbe", ["model", "erasure_lora", "positive", "negative", "latent_image", "cfg", "seed", "settings"]),
    ],
)
def test_what_decides_comes_on_one_wire(schemas, node, inputs):
    assert [part.id for part in schemas[node].inputs] == inputs
    assert [part.id for part in schemas[node].inputs if part.optional] == inputs[inputs.index("settings") :]


def test_the_samplers_inputs_are_ksamplers_in_its_order_and_two_wires(schemas):
    import nodes

    expected = [*nodes.KSampler.INPUT_TYPES()["required"], "erasure_lora", "settings"]
    assert [part.id for part in schemas["UnGuideSampler"].inputs] == expected


def test_a_renamed_node_is_known_to_the_hosts_manager_of_replacements(monkeypatch):
    """With the entry that the module shows as an example: none has been needed yet."""
    import server
    from app.node_replace_manager import NodeReplaceManager

    replacements = pack_module("nodes.replacements")
    manager = NodeReplaceManager()
    monkeypatch.setattr(server.PromptServer, "instance", SimpleNamespace(node_replace_manager=manager), raising=False)
    example = ast.literal_eval(replacements.__doc__[replacements.__doc__.index("{") :].strip())
    awaited(replacements.register([example]))
    (entry,) = manager.get_replacement("UnGuideOldName")
    assert entry.as_dict() == example
