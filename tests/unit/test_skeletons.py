"""Modules built on the meta device without computing values: the same as ltx-core builds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ltx_core.model.audio_vae import vocoder

from i2v_lab.pipeline.ltx2.components import Ledger
from i2v_lab.pipeline.ltx2.layout import gemma_dimensions
from i2v_lab.request import Quantization


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder_builder",
        "transformer_builder",
        "vae_decoder_builder",
        "embeddings_processor_builder",
        "upsampler_builder",
        "audio_decoder_builder",
        "vocoder_builder",
    ],
)
def test_they_have_the_parameters_and_buffers_of_ltx_cores_own(tiny, name, monkeypatch):
    computed = []
    original = vocoder.kaiser_sinc_filter1d

    def noting(*args, **arguments):
        computed.append((args, tuple(sorted(arguments.items()))))
        return original(*args, **arguments)

    monkeypatch.setattr(vocoder, "kaiser_sinc_filter1d", noting)
    builder = getattr(Ledger(tiny, torch.device("cpu"), Quantization.FP8_CAST), name)
    own = replace(builder, model_class_configurator=builder.model_class_configurator.configurator)
    with gemma_dimensions(tiny.architecture.gemma):
        module = builder.meta_model(builder.model_config(), ())
        assert len(computed) == len(set(computed))  # each of the vocoder's filters once
        expected = own.meta_model(own.model_config(), ())
    for parts in ("named_parameters", "named_buffers"):
        found, wanted = (dict(getattr(one, parts)(remove_duplicate=False)) for one in (module, expected))
        assert list(found) == list(wanted)
        for key, value in wanted.items():
            assert (found[key].shape, found[key].dtype, found[key].device) == (value.shape, value.dtype, value.device)
    assert [type(part) for part in module.modules()] == [type(part) for part in expected.modules()]
