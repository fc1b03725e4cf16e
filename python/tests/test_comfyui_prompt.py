"""LoRAs in prompts: what is taken out, what is left, and which file a name means. Needs no ComfyUI."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from luna_broker.comfyui.prompt import Lora, find, parse


@pytest.mark.parametrize(
    ("written", "lora"),
    [
        ("<lora:ink>", ("ink", 1.0, 1.0)),
        ("<lora:ink:0.8>", ("ink", 0.8, 0.8)),
        ("<lora:ink:0.8:0.6>", ("ink", 0.8, 0.6)),
        ("<lora:ink:-1:0>", ("ink", -1.0, 0.0)),
        ("<LoRA: ink wash : .5 >", ("ink wash", 0.5, 0.5)),
        ("<lora:styles/ink wash.safetensors:0.8>", ("styles/ink wash.safetensors", 0.8, 0.8)),
        (r"<lora:styles\ink:0.8>", (r"styles\ink", 0.8, 0.8)),
        (r"<lora:a\:b\>c:0.8>", ("a:b>c", 0.8, 0.8)),
        (r"<lora:styles\\ink>", (r"styles\ink", 1.0, 1.0)),
        ("<lora:ink.v2:0.8>", ("ink.v2", 0.8, 0.8)),
        ("<lora:2:3>", ("2", 3.0, 3.0)),
    ],
)
def test_a_lora_is_read_as_it_is_written(written: str, lora: tuple[str, float, float]) -> None:
    prompt = parse(written)
    assert prompt.loras == (Lora(*lora),)
    assert prompt.text == ""
    assert prompt.warnings == ()


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("a house", "a house"),
        ("", ""),
        ("a house <lora:x>", "a house"),
        ("a house, <lora:x>", "a house"),
        ("<lora:x>, a house", "a house"),
        ("<lora:x> a house", "a house"),
        ("a house, <lora:x:1>, by the sea", "a house, by the sea"),
        ("a house,<lora:x:1>,by the sea", "a house,by the sea"),
        ("a house <lora:x:1>, by the sea", "a house, by the sea"),
        ("a <lora:x:1> house", "a house"),
        ("a<lora:x:1>house", "ahouse"),
        ("a, <lora:x>, <lora:y>, b", "a, b"),
        ("a, <lora:x> <lora:y>", "a"),
        ("<lora:x><lora:y>", ""),
        ("a,\n<lora:x>\nb", "a,\n\nb"),
        ("a,\n<lora:x>, b", "a,\nb"),
        ("a  house,, (red:1.2) \\(not\\)", "a  house,, (red:1.2) \\(not\\)"),
    ],
)
def test_the_rest_of_a_prompt_keeps_no_trace_of_its_loras(written: str, text: str) -> None:
    assert parse(written).text == text


def test_loras_keep_their_order_and_may_come_twice() -> None:
    prompt = parse("<lora:b:0.1> a house <lora:a:0.2:0.3>, <lora:b:0.4>")
    assert prompt.loras == (Lora("b", 0.1, 0.1), Lora("a", 0.2, 0.3), Lora("b", 0.4, 0.4))


def test_an_escaped_lora_is_text() -> None:
    prompt = parse(r"say \<lora:ink:0.8> to <lora:wash>")
    assert prompt.text == "say <lora:ink:0.8> to"
    assert prompt.loras == (Lora("wash", 1.0, 1.0),)


@pytest.mark.parametrize("written", ["<lora:ink", "<lyco:ink>", "<lora>", "a < b > c", "<lora:a\nb>", "<lora:<b>"])
def test_what_is_no_lora_is_text(written: str) -> None:
    prompt = parse(written)
    assert (prompt.text, prompt.loras, prompt.warnings) == (written, (), ())


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("<lora:>", "no name"),
        ("<lora: :0.8>", "no name"),
        ("<lora:ink:strong>", "'strong' is no strength"),
        ("<lora:ink:>", "'' is no strength"),
        ("<lora:ink:nan>", "'nan' is no strength"),
        ("<lora:ink:0.8:inf>", "'inf' is no strength"),
        ("<lora:ink:1:2:3>", "two strengths, not for 3"),
    ],
)
def test_a_lora_that_cannot_be_read_is_skipped_and_told(written: str, reason: str) -> None:
    prompt = parse(f"a house, {written}, by the sea <lora:wash>")
    assert prompt.text == "a house, by the sea"
    assert prompt.loras == (Lora("wash", 1.0, 1.0),)
    (warning,) = prompt.warnings
    assert written in warning
    assert reason in warning


FILES = ["ink.safetensors", "styles/ink wash.safetensors", r"old\Wash.pt", "v1/film.safetensors", "v2/film.safetensors"]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ink", "ink.safetensors"),
        ("ink.safetensors", "ink.safetensors"),
        ("INK", "ink.safetensors"),
        ("styles/ink wash", "styles/ink wash.safetensors"),
        (r"styles\ink wash.safetensors", "styles/ink wash.safetensors"),
        ("ink wash", "styles/ink wash.safetensors"),
        ("old/Wash", r"old\Wash.pt"),
        ("wash", r"old\Wash.pt"),
        ("/v2/film", "v2/film.safetensors"),
    ],
)
def test_a_name_means_one_file(name: str, file: str) -> None:
    assert find(name, FILES) == file


def test_a_name_as_it_is_written_comes_before_other_readings() -> None:
    files = ["Ink.safetensors", "ink.safetensors", "sub/ink.safetensors"]
    assert find("ink", files) == "ink.safetensors"
    assert find("Ink", files) == "Ink.safetensors"


@pytest.mark.parametrize("name", ["film", "film.safetensors"])
def test_a_name_that_means_several_files_is_refused_with_their_names(name: str) -> None:
    with pytest.raises(LookupError, match=r"v1/film\.safetensors, v2/film\.safetensors"):
        find(name, FILES)


@pytest.mark.parametrize("name", ["ink.pt", "in", "styles/ink", "film.v1", ""])
def test_a_name_that_means_no_file_is_refused(name: str) -> None:
    with pytest.raises(LookupError, match="there is no LoRA"):
        find(name, FILES)


PIECES = st.sampled_from(["<lora:", ">", ":", "\\", "ink", "0.8", ",", " ", "\n", "<", "a house", "(red:1.2)"])


@given(st.lists(PIECES, max_size=12).map("".join))
def test_whatever_is_written_is_read(written: str) -> None:
    prompt = parse(written)
    read = len(prompt.loras) + len(prompt.warnings)
    assert read <= written.lower().count("<lora:")
    if not read:
        assert prompt.text.replace("\\", "") == written.replace("\\", "")


@given(
    st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), min_size=1).filter(str.strip),
    st.floats(-10, 10),
    st.floats(-10, 10),
)
def test_any_name_can_be_written(name: str, model: float, clip: float) -> None:
    escaped = name.replace("\\", "\\\\").replace(":", "\\:").replace(">", "\\>").replace("<", "\\<")
    prompt = parse(f"a house <lora:{escaped}:{model!r}:{clip!r}> by the sea")
    assert prompt.loras == (Lora(name.strip(), model, clip),)
    assert prompt.text == "a house by the sea"
