// What the page adds to UnGuide's nodes. Everything works without it: it shows, and decides nothing.
//
// 1. The verdict of a run as a coloured badge on UnGuide Sampler, UnGuide and Stability Probe.
// 2. Advanced inputs fold away in the classic canvas too, as Nodes 2.0 does by itself.
// 3. Wires of erasure LoRAs have a colour of their own, and Load Erasure LoRA is suggested first for them.
// 4. A template opens in the view that it was saved with, in which its texts can be read.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const WIRE = "ERASURE_LORA";
const WIRE_COLOUR = "#e879a6";
const LOADER = "UnGuideLoadErasureLora";
const JUDGING = ["UnGuideSampler", "UnGuideModel", "UnGuideProbe"];
const OURS = /^UnGuide/;

// background and ink by kind of verdict; the contrast is at least 4.5 : 1
const BADGES = {
  erased: ["#b3261e", "#ffffff"],
  untouched: ["#1f6f43", "#ffffff"],
  unsure: ["#f0b429", "#1f2328"],
  waiting: ["#4b5563", "#ffffff"],
};

// ---------------------------------------------------------------- the verdict

function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part)) ?? graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node;
}

function addVerdict(node) {
  if (!node.addDOMWidget) return;
  const element = document.createElement("div");
  Object.assign(element.style, {
    boxSizing: "border-box", borderRadius: "8px", padding: "0 10px", font: "600 13px/20px sans-serif", maxHeight: "20px",
    textAlign: "center", whiteSpace: "nowrap", overflow: "hidden", textOverflow: "ellipsis", display: "none",
  });
  const height = () => (element.textContent ? 28 : 0);
  const widget = node.addDOMWidget("verdict", "unguide_verdict", element, {
    serialize: false, hideOnZoom: false, hideInPanel: true, margin: 4, getMinHeight: height, getMaxHeight: height,
    getValue: () => element.textContent, setValue() {},
  });
  widget.serialize = false;
}

function showVerdict(id, { kind, text }) {
  const node = nodeOf(id);
  const element = node?.widgets?.find((widget) => widget.name === "verdict" && widget.type === "unguide_verdict")?.element;
  if (!element) return;
  const [background, color] = BADGES[kind] ?? BADGES.waiting;
  Object.assign(element.style, { background, color, display: "block" });
  Object.assign(element.dataset, { unguideVerdict: kind });
  element.textContent = element.title = text;
  withoutText(node);
  node.setDirtyCanvas?.(true, true);
}

// The host writes the same line into a box on the node, for pages without this file.
function withoutText(node) {
  const index = node.widgets?.findIndex((widget) => widget.name === "$$node-text-preview") ?? -1;
  if (index < 0) return;
  node.widgets[index].onRemove?.();
  node.widgets.splice(index, 1);
}

api.addEventListener("unguide.verdict", ({ detail }) => showVerdict(detail.node, detail));
api.addEventListener("executed", ({ detail }) => {
  const [verdict] = detail.output?.unguide_verdict ?? [];
  if (verdict) showVerdict(detail.display_node ?? detail.node, verdict);
});

// ---------------------------------------------------------------- advanced inputs

const words = { showAdvanced: "Show advanced", hideAdvanced: "Hide advanced" };

// The host translates nodes and inputs; the button is ours.
async function translate() {
  const language = app.extensionManager?.setting?.get("Comfy.Locale");
  const answer = language && language !== "en" ? await api.fetchApi("/i18n") : null;
  if (answer?.ok) Object.assign(words, (await answer.json())[language]?.unguide);
}

function isLinked(node, widget) {
  return node.inputs?.some((slot) => slot.widget?.name === widget.name && slot.link != null) ?? false;
}

// The host hides a widget that is advanced, but keeps its place, and sets the flag only in the widget's options.
function foldAdvanced(node) {
  const advanced = node.widgets?.filter((widget) => widget.options?.advanced) ?? [];
  if (!advanced.length || !node.isWidgetVisible || !node.getLayoutWidgets || !node.toggleAdvanced) return;
  for (const widget of advanced) {
    Object.defineProperty(widget, "advanced", { configurable: true, get: () => !isLinked(node, widget) });
  }
  const layout = node.getLayoutWidgets;
  node.getLayoutWidgets = function () {
    return layout.call(this).filter((widget) => !widget.advanced || this.showAdvanced);
  };
  const button = node.addWidget("button", "show_advanced", null, () => toggle(node), { canvasOnly: true, serialize: false });
  button.serialize = false;
  const label = () => (node.showAdvanced ? words.hideAdvanced : words.showAdvanced);
  Object.defineProperty(button, "label", { configurable: true, get: label, set() {} });
  node.setSize([node.size[0], node.computeSize()[1]]);
}

function toggle(node) {
  node.toggleAdvanced();
  if (!node.showAdvanced) node.setSize([node.size[0], node.computeSize()[1]]);
}

// ---------------------------------------------------------------- wires

// A colour palette knows the host's own wires only, and empties the colours of all others when it is loaded.
function colourWires() {
  for (const colours of [app.canvas?.default_connection_color_byType, globalThis.LGraphCanvas?.link_type_colors]) {
    if (colours) Object.defineProperty(colours, WIRE, { enumerable: true, configurable: true, get: () => WIRE_COLOUR, set() {} });
  }
  document.documentElement.style.setProperty(`--color-datatype-${WIRE}`, WIRE_COLOUR);
}

function suggestLoader() {
  const suggested = globalThis.LiteGraph?.slot_types_default_in;
  if (suggested) suggested[WIRE] = [LOADER, ...(suggested[WIRE] ?? []).filter((name) => name !== LOADER)];
}

// ---------------------------------------------------------------- the view

// The host shows a template so small that the classic canvas leaves its texts out, and passes over the saved view.
function showSavedView() {
  const { ds, canvas } = app.canvas ?? {};
  const { _nodes: nodes = [], extra } = app.rootGraph ?? app.graph ?? {};
  const saved = extra?.ds;
  if (!ds || !(saved?.scale > ds.scale) || !nodes.some((node) => OURS.test(node.comfyClass ?? ""))) return;
  const room = [canvas.clientWidth, canvas.clientHeight];
  const isInside = (node, axis) => {
    const near = (node.pos[axis] + saved.offset[axis]) * saved.scale;
    return near >= 0 && near + node.size[axis] * saved.scale <= room[axis];
  };
  if (!nodes.every((node) => isInside(node, 0) && isInside(node, 1))) return;
  ds.scale = saved.scale;
  ds.offset = [...saved.offset];
  app.canvas.setDirty(true, true);
}

app.registerExtension({
  name: "unguideconcepterasure.page",
  nodeCreated(node) {
    if (!OURS.test(node.comfyClass ?? "")) return;
    foldAdvanced(node);
    if (JUDGING.includes(node.comfyClass)) addVerdict(node);
  },
  afterConfigureGraph() {
    colourWires();
    showSavedView();
  },
  async setup() {
    suggestLoader();
    colourWires();
    await translate().catch(() => {});
    app.ui?.settings?.addEventListener?.("Comfy.ColorPalette.change", () => setTimeout(colourWires));
  },
});
