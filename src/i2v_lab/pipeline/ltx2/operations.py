"""LTX-2's encoding, upsampling and decoding: ltx-core's operations on built components."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ltx_core.model.audio_vae import decode_audio as _decode_audio
from ltx_core.model.upsampler import upsample_video as _upsample_video
from ltx_core.model.video_vae import SpatialTilingConfig, TemporalTilingConfig, TilingConfig
from ltx_core.model.video_vae import decode_video as _decode_video
from ltx_core.types import Audio
from ltx_pipelines.utils.constants import DEFAULT_IMAGE_CRF
from ltx_pipelines.utils.media_io import normalize_latent, preprocess, resize_and_center_crop

from i2v_lab.events import EventSink
from i2v_lab.memory_policy import Technique, Techniques
from i2v_lab.pipeline.contract.prompt_length import note_dropped_tokens
from i2v_lab.pipeline.contract.random_tensors import DTYPE
from i2v_lab.pipeline.ltx2.memory import in_place_decode
from i2v_lab.pipeline.ltx2.sampling import Contexts
from i2v_lab.request import Tiling, VideoShape


def note_cut_prompts(text_encoder: Any, prompts: Mapping[str, str], emit: EventSink) -> None:
    """Report prompts of more tokens than Gemma is given.

    Args:
        text_encoder: From the ledger.
        prompts: By the name of their field.
        emit: Gets a note for each that is cut.
    """
    tokenizer = text_encoder.tokenizer  # ltx-core's, around that of transformers
    for topic, prompt in prompts.items():
        note_dropped_tokens(emit, tokenizer.tokenizer, topic, prompt, tokenizer.max_length)


def run_text_encoder(text_encoder: Any, prompts: Sequence[str]) -> list[Any]:
    """Gemma's hidden states of all layers and the attention mask for each prompt, padded to 1,024 tokens."""
    return [text_encoder.encode(prompt) for prompt in prompts]


def run_embeddings_processor(processor: Any, hidden: Sequence[Any]) -> list[Contexts]:
    """Hidden states to transformer contexts."""
    outputs = [processor.process_hidden_states(states, mask) for states, mask in hidden]
    return [Contexts(output.video_encoding, output.audio_encoding) for output in outputs]


def encode_still(video_encoder: Any, pixels: np.ndarray, shape: VideoShape, device: torch.device) -> torch.Tensor:
    """The still's latent, the image compressed, resized and cropped as upstream does.

    Args:
        video_encoder: From the ledger.
        pixels: ``(H, W, 3)``, uint8.
        shape: The stage's video in pixels.
        device: Where the encoder is.

    Returns:
        ``(1, 128, 1, H', W')``, bfloat16.
    """
    compressed = preprocess(image=pixels, crf=DEFAULT_IMAGE_CRF)
    image = torch.tensor(compressed, dtype=torch.float32, device=device)  # (H, W, 3)
    image = normalize_latent(resize_and_center_crop(image, shape.height, shape.width), device, DTYPE)
    latent: torch.Tensor = video_encoder(image)  # (1, 3, 1, height, width) -> (1, 128, 1, H', W')
    return latent


def upsample_video(latent: torch.Tensor, video_encoder: Any, upsampler: Any) -> torch.Tensor:
    """The video latent ``(1, 128, F', H', W')`` at twice the height and width."""
    upsampled: torch.Tensor = _upsample_video(latent=latent, video_encoder=video_encoder, upsampler=upsampler)
    return upsampled


def decode_audio(latent: torch.Tensor, audio_decoder: Any, vocoder: Any) -> Audio:
    """The audio latent ``(1, 8, T', 16)`` to a stereo waveform ``(2, samples)``, float32."""
    return _decode_audio(latent, audio_decoder, vocoder)


def tiling_config(tiling: Tiling | None) -> TilingConfig | None:
    """A tiling as ltx-core's own configuration."""
    if tiling is None:
        return None
    return TilingConfig(
        SpatialTilingConfig(tiling.tile_px, tiling.tile_overlap_px),
        TemporalTilingConfig(tiling.tile_frames, tiling.tile_overlap_frames),
    )


def decode_video(
    latent: torch.Tensor,
    video_decoder: Any,
    tiling: Tiling | None,
    generator: torch.Generator,
    techniques: Techniques = frozenset(),
) -> Iterator[torch.Tensor]:
    """Decode the video lazily, one chunk for each temporal tile.

    Args:
        latent: ``(1, 128, F', H', W')``, bfloat16.
        video_decoder: From the ledger.
        tiling: The decoder's tiles; ``None`` decodes the latent at once.
        generator: For the decoder's noise.
        techniques: With ``blend_in_place``, tiles are blended in one buffer.

    Returns:
        An iterator over chunks ``(F, H, W, 3)``, uint8, each decoded when it is asked for.
    """
    decode = in_place_decode.decode_video if Technique.BLEND_IN_PLACE in techniques else _decode_video
    chunks: Iterator[torch.Tensor] = decode(latent, video_decoder, tiling_config(tiling), generator)
    return chunks
