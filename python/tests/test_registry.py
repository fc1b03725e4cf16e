"""What the broker lists and runs beside files, from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import luna_broker
import pytest
import torch
from conftest import eventually
from safetensors.torch import load_file


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
