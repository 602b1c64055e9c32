"""The nodes' schemas: what a person sees, and that widgets start from the settings' own defaults."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from tests.conftest import load_pack, pack_module

IDS = {
    f"UnGuide{name}"
    for name in (
        "LoadErasureLora",
        "Calibrate",
        "Probe",
        "Model",
        "Sampler",
        "TrainErasureLora",
        "SaveErasureLora",
    )
}


@pytest.fixture(scope="module")
def schemas():
    async def listed():
        extension = await load_pack().comfy_entrypoint()
        return [node.GET_SCHEMA() for node in await extension.get_node_list()]

    return {schema.node_id: schema for schema in asyncio.run(listed())}


def test_the_ids_are_the_documented_ones(schemas):
    assert set(schemas) == IDS
    assert {schema.category for schema in schemas.values()} == {"UnGuide"}


def test_every_node_input_and_output_explains_itself(schemas):
    for schema in schemas.values():
        assert schema.description
        for part in (*schema.inputs, *schema.outputs):
            assert part.tooltip, f"{schema.node_id}: {part}"


def test_widgets_start_from_the_settings_defaults(schemas):
    settings = pack_module("unguide_comfy.deciding").ProbeSettings()
    names = {field.name for field in dataclasses.fields(settings)}
    for schema in (schemas[name] for name in ("UnGuideProbe", "UnGuideModel", "UnGuideSampler")):
        widgets = {part.id: part.default for part in schema.inputs if part.id in names and part.id != "seed"}
        assert widgets == {name: getattr(settings, name) for name in widgets}
    assert {"repeats", "probe_steps", "weight_detected"} <= {part.id for part in schemas["UnGuideModel"].inputs}


def test_the_samplers_inputs_come_in_ksamplers_order(schemas):
    import nodes

    expected = list(nodes.KSampler.INPUT_TYPES()["required"])
    assert [part.id for part in schemas["UnGuideSampler"].inputs][: len(expected)] == expected
