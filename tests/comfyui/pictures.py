"""Makes the example workflows' files and every picture of ComfyUI, with a real one, a real broker and a browser.

    COMFYUI_PATH=… LUNA_BROKER_BIN=… python tests/comfyui/pictures.py --chromium /usr/bin/chromium

Needs what the tests need, and playwright. Workflows are put together in the browser and saved as it saves them; weights
are random but for a VAE that is made from arithmetic, so that pictures show that it works and not what it can do.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import checkpoints
from comfy import ComfyUI
from conftest import MODELS, PACK, REPOSITORY
from graphs import Graph
from PIL import Image, ImageOps
from playwright.sync_api import Browser, Page, sync_playwright

import broker as brokers
from examples import CHECKPOINT, LORA, PICTURE, STYLE, TEXT_ENCODER, UNET, VAE, Example, examples

SIDEBAR_PICTURE = "sidebar"

WINDOW = {"width": 1500, "height": 900}
SMALL_WINDOW = {"width": 1500, "height": 760}
# What the window's bars take, and the sidebar beside them.
LEFT, TOP, BOTTOM, SIDEBAR = 60, 90, 70, 320
JPEG_QUALITY = 82
RUN_DEADLINE_MS = 300_000
# Until the frontend has drawn what it was told.
SETTLING_MS = 1500

LOAD = """
async ({name, graph, places, note, notePlace}) => {
  await app.loadApiJson(graph, name);
  const put = (node, [x, y, width, height]) => {
    node.pos = [x, y];
    const least = node.computeSize();
    node.setSize([Math.max(width, least[0]), Math.max(height, least[1])]);
  };
  for (const [id, place] of Object.entries(places)) put(app.graph.getNodeById(id), place);
  const widgets = app.graph.nodes.flatMap((node) => node.widgets ?? []);
  widgets.filter(({name}) => name === "control_after_generate").forEach((widget) => { widget.value = "fixed"; });
  const markdown = LiteGraph.createNode("MarkdownNote");
  app.graph.add(markdown);
  put(markdown, notePlace);
  markdown.widgets[0].value = note;
}
"""

# Settings that a workflow runs with for its picture, which takes no minutes then on a machine without a GPU.
SIDE = 256
QUICK = {"width": SIDE, "height": SIDE, "steps": 4}

SHORTEN = """
(quick) => {
  for (const widget of app.graph.nodes.flatMap((node) => node.widgets ?? [])) {
    if (widget.name in quick) widget.value = quick[widget.name];
  }
}
"""

SAVE = """
() => {
  const workflow = app.graph.serialize();
  workflow.extra = {};
  return workflow;
}
"""

# Where the nodes come to lie in the window, as close as they fit into a box; returns what of it they take.
FIT = """
({x, y, width, height}) => {
  const edges = app.graph.nodes.map((node) => {
    const [left, top, across, down] = node.getBounding();
    return [left, top, left + across, top + down];
  });
  const [left, top] = [0, 1].map((at) => Math.min(...edges.map((edge) => edge[at])) - 30);
  const [right, bottom] = [2, 3].map((at) => Math.max(...edges.map((edge) => edge[at])) + 15);
  const scale = Math.min(width / (right - left), height / (bottom - top), 1);
  const origin = app.canvas.canvas.getBoundingClientRect();
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [(x - origin.x) / scale - left, (y - origin.y) / scale - top];
  app.canvas.setDirty(true, true);
  return {x, y, width: (right - left) * scale, height: (bottom - top) * scale};
}
"""

RUN = """
() => new Promise((resolve, reject) => {
  const done = (event) => resolve(event.type);
  app.api.addEventListener("execution_success", done, {once: true});
  app.api.addEventListener("execution_error", (event) => reject(JSON.stringify(event.detail)), {once: true});
  app.queuePrompt(0);
})
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", help="the browser; without it the one that playwright has installed")
    parser.add_argument("--out", type=Path, default=PACK, help="where the folders of the pack are")
    parser.add_argument("--only", help="one of them: the name of an example, or sidebar")
    chosen = parser.parse_args()

    def wanted(name: str) -> bool:
        return chosen.only in (None, name)

    with tempfile.TemporaryDirectory(prefix="luna-") as folder:
        scratch = Path(folder)
        models = _models(scratch / "models")
        with (
            brokers.start(Path(os.environ["LUNA_BROKER_BIN"]), scratch / "broker.sock", models) as broker,
            _comfyui(scratch / "comfyui", models, broker.address) as comfyui,
            sync_playwright() as playwright,
        ):
            # As root, which containers have, there is no sandbox; pages are of this machine alone.
            browser = playwright.chromium.launch(executable_path=chosen.chromium, args=["--no-sandbox"])
            for example in (each for each in examples() if wanted(each.name)):
                with _page(browser, comfyui) as page:
                    _make(page, example, chosen.out / "example_workflows")
            if wanted(SIDEBAR_PICTURE):
                with _comfyui(scratch / "other", models, broker.address) as other, _page(browser, comfyui) as page:
                    other.run(_quick(examples()[0].graph)).ok()
                    _sidebar(page, examples()[0], chosen.out / "pictures")


@contextmanager
def _page(browser: Browser, comfyui: ComfyUI) -> Iterator[Page]:
    """A window of its own, without pictures of workflows before."""
    page = browser.new_page(viewport=WINDOW)
    page.set_default_timeout(RUN_DEADLINE_MS)
    page.goto(comfyui._url("/"))
    page.wait_for_function("window.app?.extensionManager && window.app.graph")
    page.wait_for_timeout(SETTLING_MS)
    yield page
    page.close()


def _models(folder: Path) -> Path:
    """The tests' models under the names that the examples use, with a VAE whose pictures are no noise."""
    import constructed
    from safetensors.torch import load_file, save_file

    tools = Path(os.environ.get("LUNA_BROKER_SHARED", REPOSITORY.parent / "shared")) / "tools"
    checkpoints.make(MODELS, tools)
    vae = constructed.checkpoint()
    state = load_file(MODELS / "checkpoints" / "small.safetensors")
    state |= {f"first_stage_model.{key}": tensor for key, tensor in vae.items()}
    for name in ("checkpoints", "diffusion_models", "text_encoders", "vae", "loras/styles", "embeddings"):
        (folder / name).mkdir(parents=True)
    save_file(state, folder / "checkpoints" / CHECKPOINT)
    save_file(vae, folder / "vae" / VAE)
    shutil.copy(MODELS / "diffusion_models" / "bare.safetensors", folder / "diffusion_models" / UNET)
    shutil.copy(MODELS / "text_encoders" / "clip_l.safetensors", folder / "text_encoders" / TEXT_ENCODER)
    shutil.copy(MODELS / "loras" / "lora.safetensors", folder / "loras" / LORA)
    shutil.copy(MODELS / "loras" / "second.safetensors", folder / "loras" / STYLE)
    return folder


def _comfyui(base: Path, models: Path, address: str) -> ComfyUI:
    checkout = Path(os.environ["COMFYUI_PATH"])
    environment = {"PYTHONPATH": str(REPOSITORY / "python"), "LUNA_BROKER": address, "OMP_WAIT_POLICY": "PASSIVE"}
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    comfyui = ComfyUI(checkout, python, base, models, {"luna-broker": PACK}, (), environment)
    # Of ComfyUI's own, which is large, the middle.
    with Image.open(checkout / "input" / PICTURE) as picture:
        ImageOps.fit(picture.convert("RGB"), (SIDE, SIDE)).save(comfyui.base / "input" / PICTURE)
    settings = comfyui.base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir()
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}))
    return comfyui


def _make(page: Page, example: Example, folder: Path) -> None:
    """A workflow's file, and its picture after it has run."""
    _load(page, example)
    workflow = page.evaluate(SAVE)
    page.evaluate(SHORTEN, QUICK)
    page.evaluate(RUN)
    clip = page.evaluate(FIT, _box(LEFT))
    page.wait_for_timeout(SETTLING_MS)
    folder.mkdir(exist_ok=True)
    (folder / f"{example.name}.json").write_text(json.dumps(workflow, indent=1) + "\n")
    _write(folder / f"{example.name}.jpg", page.screenshot(clip=clip))


def _sidebar(page: Page, example: Example, folder: Path) -> None:
    """The workflow beside the sidebar, of a broker that has more workers than this one."""
    _load(page, example)
    page.evaluate(SHORTEN, QUICK)
    page.evaluate(RUN)
    page.locator(".luna-broker-tab-button").click()
    page.locator(".luna-figures").wait_for()
    page.set_viewport_size(SMALL_WINDOW)
    page.evaluate(FIT, _box(LEFT + SIDEBAR))
    page.wait_for_timeout(SETTLING_MS)
    folder.mkdir(exist_ok=True)
    _write(folder / f"{SIDEBAR_PICTURE}.jpg", page.screenshot())


def _quick(graph: Graph) -> Graph:
    """A graph with the settings of pictures."""
    for node in graph.values():
        node["inputs"].update({name: value for name, value in QUICK.items() if name in node["inputs"]})
    return graph


def _box(left: int) -> dict[str, int]:
    return {"x": left, "y": TOP, "width": WINDOW["width"] - left - 10, "height": WINDOW["height"] - TOP - BOTTOM}


def _load(page: Page, example: Example) -> None:
    told = {"name": example.name, "graph": example.graph, "places": example.places}
    page.evaluate(LOAD, {**told, "note": example.note, "notePlace": example.note_place})


def _write(path: Path, png: bytes) -> None:
    Image.open(io.BytesIO(png)).convert("RGB").save(path, quality=JPEG_QUALITY, optimize=True)
    print(f"{path}: {path.stat().st_size // 1000} KB")


if __name__ == "__main__":
    main()
