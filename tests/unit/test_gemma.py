"""Gemma 3 as the text encoder: the same whichever version of transformers builds it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.ltx2.components import Ledger
from i2v_lab.pipeline.ltx2.gemma import gemma_key_ops, ltx_core_fits
from i2v_lab.pipeline.ltx2.weights import skeleton_weights, synthetic_weights
from i2v_lab.request import Quantization

CPU = torch.device("cpu")
PROMPT = "waves roll in below the lighthouse"
# Hidden states with transformers 4.57.6: `python tests/unit/test_gemma.py` rewrites it.
REFERENCE = Path(__file__).with_name("gemma_hidden_states.json")
POSITIONS = (-1, -12, -34, -100, -700)  # the prompt's tokens come last; before them is padding
BFLOAT16_EPS = 2**-8


def deep(architecture: Architecture) -> Architecture:
    """With layers of both kinds of attention, and a sliding window that is shorter than the 1,024 tokens."""
    text = {**architecture.gemma["text_config"], "num_hidden_layers": 7, "sliding_window": 256}
    return replace(architecture, name="deep", gemma={**architecture.gemma, "text_config": text})


def hidden_states(architecture: Architecture) -> list[list[list[float]]]:
    """Of each layer, the first 16 numbers at each of ``POSITIONS``."""
    encoder = Ledger(synthetic_weights(deep(architecture)), CPU, Quantization.BF16).text_encoder()
    with torch.no_grad():
        states, mask = encoder.encode(PROMPT)
    assert mask.sum() == len(PROMPT)
    return [[state[0, position, :16].tolist() for position in POSITIONS] for state in states]


@pytest.fixture(scope="module")
def encoder(tiny):
    return Ledger(skeleton_weights(deep(tiny.architecture)), CPU, Quantization.BF16).text_encoder()


def test_hidden_states_are_those_of_transformers_4_57_within_bfloat16_rounding(tiny):
    expected = torch.tensor(json.loads(REFERENCE.read_text()))
    found = torch.tensor(hidden_states(tiny.architecture))
    assert found.shape == expected.shape == (8, len(POSITIONS), 16)
    assert torch.allclose(found, expected, rtol=2 * BFLOAT16_EPS, atol=2 * BFLOAT16_EPS * expected.std().item())


def test_rotary_frequencies_are_those_of_gemma_3(encoder):
    pairs = torch.arange(0, 16, 2) / 16  # of the tiny model's heads, 16 wide
    local, distant = 10_000**-pairs, 1_000_000**-pairs / 8
    language = encoder.model.model.language_model
    buffers = {name: value for name, value in language.named_buffers() if name.endswith("inv_freq")}
    if ltx_core_fits():
        sliding, full = buffers["rotary_emb_local.inv_freq"], buffers["rotary_emb.inv_freq"]
    else:
        sliding = buffers["rotary_emb.sliding_attention_inv_freq"]
        full = buffers["rotary_emb.full_attention_inv_freq"]
    assert torch.allclose(sliding, local)
    assert torch.allclose(full, distant)


def test_the_embedding_scale_and_the_patch_positions_are_set(encoder):
    buffers = {name.rpartition(".")[2]: value for name, value in encoder.named_buffers()}
    assert buffers["embed_scale"].item() == 8.0  # the root of 64
    assert buffers["position_ids"].tolist() == [[0, 1, 2, 3]]  # of 2 x 2 patches
    assert {value.device for value in buffers.values()} == {CPU}


def test_no_buffer_is_left_on_the_meta_device_nor_taken_from_a_file(encoder):
    assert not [name for name, value in encoder.named_buffers() if value.is_meta]
    assert not {name for name, _ in encoder.named_buffers()} & encoder.state_dict().keys()


def test_every_key_of_a_published_file_has_its_place(tiny, encoder):
    keys = [key for path in tiny.gemma_shards for key in load_file(path)]
    towers = [key for key in keys if key.startswith("vision_tower.")]
    assert towers
    assert all(key.startswith("vision_tower.vision_model.") for key in towers)  # as google/gemma-3-12b-it has them
    assert {gemma_key_ops().apply_to_key(key) for key in keys} <= encoder.state_dict().keys()


if __name__ == "__main__":
    from i2v_lab.pipeline.contract.architectures import load_architecture

    REFERENCE.write_text(json.dumps(hidden_states(load_architecture("ltx-2.3-tiny"))) + "\n")
