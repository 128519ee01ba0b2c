"""ltx-video's synthetic weights: random tensors in the real layout, and the T5 folder that goes with them."""

from __future__ import annotations

import io
import json
import string
from pathlib import Path

import sentencepiece
import torch

from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.synthetic import SyntheticWeights, config_metadata
from i2v_lab.pipeline.ltx_video.layout import FILES, file_layout


def metadata(architecture: Architecture, file: str) -> dict[str, str]:
    """A weight file's safetensors metadata, as the real files carry it."""
    return config_metadata({"checkpoint": architecture.config, "upsampler": architecture.upsampler}.get(file))


def write_t5_folder(architecture: Architecture, folder: Path) -> None:
    """Write what a T5 folder holds besides its weights: configuration, and a tokenizer that knows all ASCII characters.

    As in every LTX-Video prompt, encoding pads to 256 tokens, so memory is that of the real vocabulary's tokenizer.

    Args:
        architecture: Whose T5.
        folder: The folder of weights; T5's is ``t5`` in it.
    """
    folder = folder / "t5"
    (folder / "text_encoder").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    config = {"architectures": ["T5EncoderModel"], "model_type": "t5", **architecture.text_encoder}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["waves roll in below the lighthouse", "a tower against the evening sky"] * 10),
        model_writer=model,
        model_type="char",
        vocab_size=300,
        hard_vocab_limit=False,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=3,
    )
    (folder / "tokenizer" / "spiece.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "T5Tokenizer", "legacy": True, "extra_ids": 100, "model_max_length": 512}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


SYNTHETIC = SyntheticWeights(
    package="ltx-video",
    files=FILES,
    layout=file_layout,
    metadata=metadata,
    write_tokenizer=write_t5_folder,
    source=__file__,
    dtypes={"upsampler": torch.float32},
)
