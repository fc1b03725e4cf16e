"""What the broker lists and runs beside files, from Python."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import luna_broker
import pytest
import torch
from conftest import eventually
from safetensors.torch import load_file

GOLDEN = Path(os.environ.get("LUNA_BROKER_GOLDEN", ""))

golden = pytest.mark.skipif(
    not (GOLDEN / "unet").is_dir(), reason="LUNA_BROKER_GOLDEN names no folder with what `make golden` makes"
)


def listed(client: Any, name: str) -> list[dict[str, Any]]:
    return [model for model in client.models() if model["name"] == name]


def test_a_published_set_is_run_as_its_file_is(broker: Any, client: Any, constructed_vae: str) -> None:
    with luna_broker.connect(broker.address) as publisher:
        publisher.publish("a merged vae", load_file(constructed_vae))
    vae = client.vae("a merged vae")
    latent = torch.rand(1, vae.info["latent_channels"], 8, 8)
    assert torch.equal(vae.decode(latent), client.vae(constructed_vae).decode(latent))
    assert [model["loaded"] for model in listed(client, "a merged vae")] == [True]
    client.unload("a merged vae")
    with pytest.raises(luna_broker.ModelNotFound):
        client.vae("a merged vae")


@golden
def test_a_published_unet_takes_the_step_that_its_file_takes(broker: Any, client: Any) -> None:
    path = GOLDEN / "unet" / "sdxl.bare.safetensors"
    with luna_broker.connect(broker.address) as publisher:
        publisher.publish("a merged unet", load_file(path))
    case = load_file(GOLDEN / "unet" / "sdxl.io.safetensors")
    inputs = {name: case[f"plain.{name}"] for name in ("x", "timesteps", "context", "y")}
    step = client.unet("a merged unet")(**inputs)
    assert torch.equal(step, client.unet(path)(**inputs))
    assert (step - case["plain.out"]).abs().max() <= 2e-5
    client.unload("a merged unet")


@golden
def test_text_encoders_published_one_by_one_are_a_set(broker: Any, client: Any) -> None:
    paths = [GOLDEN / "clip" / f"words.{kind}.safetensors" for kind in "lg"]
    with luna_broker.connect(broker.address) as publisher:
        for name, path in zip(("an own l", "an own g"), paths, strict=True):
            publisher.publish(name, load_file(path))
    cond, pooled = client.clip("an own g", "an own l").encode("a photo of a cat")
    expected = client.clip(*paths).encode("a photo of a cat")
    assert torch.equal(cond, expected[0])
    assert torch.equal(pooled, expected[1])
    assert [model["loaded"] for model in listed(client, "an own g + an own l")] == [True]
    client.unload("an own l")
    with pytest.raises(luna_broker.ModelNotFound, match="an own l"):
        client.clip("an own l", "an own g")
    client.unload("an own g")


def test_a_registered_model_is_listed_until_its_session_ends(broker: Any, client: Any) -> None:
    with luna_broker.connect(broker.address, name="worker") as worker:
        worker.register("depth", {"service": "unet", "family": "controlnet", "bytes": 5, "device": torch.device("cpu")})
        (found,) = listed(client, "depth")
        assert (found["bytes"], found["device"], found["family"]) == (5, "cpu", "controlnet")
        assert found["registered_by"] is not None
    eventually(lambda: not listed(client, "depth"), "the model is gone with its session")


@pytest.mark.parametrize("info", [{}, {"service": "oven"}, {"service": "vae", "colour": "blue"}])
def test_what_is_registered_says_what_it_does_and_nothing_unknown(client: Any, info: dict[str, Any]) -> None:
    with pytest.raises(luna_broker.ConfigurationError, match="service|oven|colour"):
        client.register("model", info)


def test_models_of_comfyuis_folders_have_their_names(start_broker: Any, constructed_vae: str, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "vae" / "sub"
    folder.mkdir(parents=True)
    (folder / "own.safetensors").symlink_to(constructed_vae)
    paths = tmp_path / "extra_model_paths.yaml"
    paths.write_text("comfyui:\n  base_path: models\n  vae: vae/\n")
    with luna_broker.connect(start_broker("--comfyui-paths", str(paths)).address) as client:
        assert client.vae("sub/own.safetensors").info["service"] == "vae"


def test_services_may_have_brokers_of_their_own(start_broker: Any, constructed_vae: str) -> None:
    vae, unet = start_broker("--services", "vae"), start_broker("--services", "unet")
    each = {"vae": vae.address, "unet": unet.address}
    for address in (each, f"vae={vae.address},unet={unet.address}"):
        with luna_broker.connect(address) as client:
            client.load(constructed_vae)
            assert client.vae(constructed_vae).info["loaded"]
            assert [lane["service"] for lane in client.of("unet").status()["lanes"]] == ["unet"]
            with pytest.raises(luna_broker.Unsupported, match="not served here, only unet"):
                client.of("unet").vae(constructed_vae)
            client.unload(constructed_vae)
    with luna_broker.connect({"unet": unet.address}) as client:
        with pytest.raises(luna_broker.Unsupported, match="no broker was named"):
            client.vae(constructed_vae)
        with pytest.raises(luna_broker.ConfigurationError, match="oven"):
            client.of("oven")
    with pytest.raises(luna_broker.ConfigurationError, match="oven"):
        luna_broker.connect({"oven": unet.address})


def test_the_environment_may_name_a_broker_for_each_service(
    start_broker: Any, constructed_vae: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = start_broker("--services", "vae")
    monkeypatch.setenv("LUNA_BROKER", f"vae={broker.address}")
    with luna_broker.connect() as client:
        assert client.vae(constructed_vae).info["service"] == "vae"
