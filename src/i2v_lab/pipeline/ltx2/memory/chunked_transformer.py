"""The transformer with smaller activations: ltx-core's modules and weights, called over chunks of tokens.

What ltx-core allocates for every token of a latent, and this module does not:

- Modulations (scale, shift, gate). They are functions of a token's timestep, of which an image-to-video request has
  two: that of the still's tokens, which carry no noise, and that of all others. Here they are stored once for each.
- The feed-forward's hidden layer, four times as wide as a token: here for one chunk of tokens at a time.
- Queries, attention outputs and modulated inputs: likewise. Keys and values, which every query reads, are stored whole.

Residuals are added to the hidden state in place. The order of roundings is ltx-core's, so latents are bit-identical.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from ltx_core.guidance.perturbations import BatchedPerturbationConfig, PerturbationType
from ltx_core.loader.module_ops import ModuleOps
from ltx_core.model.transformer.attention import Attention
from ltx_core.model.transformer.modality import Modality
from ltx_core.model.transformer.model import LTXModel
from ltx_core.model.transformer.transformer import BasicAVTransformerBlock
from ltx_core.model.transformer.transformer_args import TransformerArgs
from ltx_core.utils import rms_norm
from torch.nn.functional import gelu

from i2v_lab.pipeline.ltx2.memory.chunked_attention import (
    ChunkInput,
    QueryAttention,
    cast_linear,
    chunk_pe,
    keys_and_values,
)
from i2v_lab.pipeline.ltx2.memory.token_chunks import (
    Bounds,
    Chunk,
    Chunks,
    add_,
    expanded,
    multiply_,
    single_chunk,
    split_tokens,
)
from i2v_lab.torch_compat import FakeTensor

CHUNK_TOKENS = 8192  # enough to saturate a GPU; some 0.6 GiB in the feed-forward of the 22B
# Rows of the matrix products that compute modulations, padded by repetition: for two rows cuBLAS selects other kernels
# than for ltx-core's one row a token, with other roundings. From 512 rows on, the same kernels run on an H100, and
# latents are bit-identical.
MODULATION_ROWS = 1024
# Up to this many tokens ltx-core's own forward takes less than 0.3 GiB more, and more kernel launches would cost time.
SMALL_TOKENS = 4096


class ChunkedTransformer(LTXModel):
    """ltx-core's transformer over chunks of tokens, for a batch of one request.

    Attributes:
        still_tokens: Number of tokens of the still, the first ones of the video.
        chunk_tokens: The most tokens that are processed at a time.
    """

    still_tokens = 0
    chunk_tokens = sys.maxsize
    _checked: tuple[Bounds, Bounds] | None = None

    def forward(
        self, video: Modality, audio: Modality, perturbations: BatchedPerturbationConfig | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Velocities of video and audio, equal to those of ltx-core's own ``forward``.

        ltx-core's own runs for at most :data:`SMALL_TOKENS` video tokens.

        Args:
            video: Latent ``(1, tokens, 128)``, with a timestep for each token and the prompt's context.
            audio: Likewise.
            perturbations: Attention that guidance skips.

        Returns:
            ``(1, tokens, 128)`` each.

        Raises:
            ValueError: Tokens of the still, or the others, have several timesteps; checked in a stage's first pass.
        """
        if video.latent.shape[1] <= SMALL_TOKENS:
            velocities: tuple[torch.Tensor, torch.Tensor] = super().forward(video, audio, perturbations)
            return velocities
        video_bounds = (0, self.still_tokens, video.latent.shape[1])
        audio_bounds = (0, audio.latent.shape[1])
        if self._checked != (
            video_bounds,
            audio_bounds,
        ):  # once a stage: it waits for the device
            _check_timesteps(video.timesteps, video_bounds)
            _check_timesteps(audio.timesteps, audio_bounds)
            self._checked = (video_bounds, audio_bounds)
        distinct = (
            replace(video, timesteps=_distinct_timesteps(video.timesteps, video_bounds)),
            replace(audio, timesteps=_distinct_timesteps(audio.timesteps, audio_bounds)),
        )
        video_args = _without_padding(self.video_args_preprocessor.prepare(*distinct), video_bounds)
        audio_args = _without_padding(self.audio_args_preprocessor.prepare(*reversed(distinct)), audio_bounds)
        video_chunks = split_tokens(video_bounds, self.chunk_tokens)
        audio_chunks = split_tokens(audio_bounds, self.chunk_tokens)
        for block in self.transformer_blocks:
            video_args, audio_args = block(
                video=video_args,
                audio=audio_args,
                perturbations=perturbations,
                video_chunks=video_chunks,
                audio_chunks=audio_chunks,
            )
        video_head = (self.scale_shift_table, self.norm_out, self.proj_out)
        audio_head = (self.audio_scale_shift_table, self.audio_norm_out, self.audio_proj_out)
        return (
            self._project_out(video_args, video_chunks, video_head),
            self._project_out(audio_args, audio_chunks, audio_head),
        )

    def _project_out(self, args: TransformerArgs, chunks: Chunks, head: tuple[Any, Any, Any]) -> torch.Tensor:
        parts = [
            self._process_output(*head, args.x[:, chunk.span], expanded(args.embedded_timestep, chunk))
            for chunk in chunks
        ]
        return torch.cat(parts, dim=1)


class ChunkedBlock(BasicAVTransformerBlock):
    """ltx-core's transformer block over chunks of tokens."""

    def forward(
        self,
        video: TransformerArgs,
        audio: TransformerArgs,
        perturbations: BatchedPerturbationConfig | None = None,
        video_chunks: Chunks = (),
        audio_chunks: Chunks = (),
    ) -> tuple[TransformerArgs, TransformerArgs]:
        """Self-attention, prompt cross-attention, audio-video cross-attention and feed-forward, in ltx-core's order.

        Args:
            video: Hidden states ``(1, tokens, width)`` with modulations for each timestep; updated in place.
            audio: Likewise.
            perturbations: Attention that guidance skips.
            video_chunks: All video tokens; without, ltx-core's own ``forward`` runs.
            audio_chunks: All audio tokens.

        Returns:
            ``video`` and ``audio``.
        """
        if not video_chunks:
            plain: tuple[TransformerArgs, TransformerArgs] = super().forward(video, audio, perturbations)
            return plain
        perturbations = perturbations or BatchedPerturbationConfig.empty(video.x.shape[0])

        def skips(kind: PerturbationType) -> bool:  # the batch is one request
            return bool(perturbations.all_in_batch(kind, self.idx))

        if video.enabled:
            skipped = skips(PerturbationType.SKIP_VIDEO_SELF_ATTN)
            self._self_attention(video, video_chunks, self.attn1, self.scale_shift_table, skipped)
            tables = (self.scale_shift_table, self.prompt_scale_shift_table)
            self._prompt_cross_attention(video, video_chunks, self.attn2, *tables)
        if audio.enabled:
            skipped = skips(PerturbationType.SKIP_AUDIO_SELF_ATTN)
            self._self_attention(audio, audio_chunks, self.audio_attn1, self.audio_scale_shift_table, skipped)
            tables = (self.audio_scale_shift_table, self.audio_prompt_scale_shift_table)
            self._prompt_cross_attention(audio, audio_chunks, self.audio_attn2, *tables)
        self._audio_video_cross_attention(
            video,
            audio,
            video_chunks,
            audio_chunks,
            a2v_enabled=video.enabled and not skips(PerturbationType.SKIP_A2V_CROSS_ATTN),
            v2a_enabled=audio.enabled and not skips(PerturbationType.SKIP_V2A_CROSS_ATTN),
        )
        if video.enabled:
            self._feed_forward(video, video_chunks, self.ff, self.scale_shift_table)
        if audio.enabled:
            self._feed_forward(audio, audio_chunks, self.audio_ff, self.audio_scale_shift_table)
        return video, audio

    def _self_attention(
        self, args: TransformerArgs, chunks: Chunks, attn: Attention, table: torch.Tensor, skipped: bool
    ) -> None:
        shift, scale, gate = self.get_ada_values(table, 1, args.timesteps, slice(0, 3))
        modulated = self._modulated(args.x, scale, shift)
        if len(chunks) == 1:
            modulated = cache(modulated)  # keys and values and the query share it
        pe = args.positional_embeddings
        keys, values = keys_and_values(attn, modulated, chunks, pe, with_keys=not skipped)
        attention = QueryAttention(attn, args.x.dtype)
        for chunk in chunks:
            replacement = values[:, chunk.span] if skipped else None
            attended = attention(modulated(chunk), keys, values, chunk_pe(pe, chunk), replacement=replacement)
            args.x[:, chunk.span].add_(multiply_(attended, gate, chunk))

    def _prompt_cross_attention(
        self, args: TransformerArgs, chunks: Chunks, attn: Attention, table: torch.Tensor, prompt_table: torch.Tensor
    ) -> None:
        shift, scale, gate = self.get_ada_values(table, 1, args.timesteps, slice(6, 9))
        prompt_shift, prompt_scale = self.get_ada_values(prompt_table, 1, args.prompt_timestep, slice(None))
        context = args.context * (1 + prompt_scale) + prompt_shift
        keys, values = keys_and_values(attn, lambda chunk: context[:, chunk.span], single_chunk(context.shape[1]), None)
        modulated = self._modulated(args.x, scale, shift)
        attention = QueryAttention(attn, args.x.dtype)
        for chunk in chunks:
            attended = attention(modulated(chunk), keys, values, None)
            args.x[:, chunk.span].add_(multiply_(attended, gate, chunk))

    def _audio_video_cross_attention(
        self,
        video: TransformerArgs,
        audio: TransformerArgs,
        video_chunks: Chunks,
        audio_chunks: Chunks,
        *,
        a2v_enabled: bool,
        v2a_enabled: bool,
    ) -> None:
        video_pe, audio_pe = video.cross_positional_embeddings, audio.cross_positional_embeddings
        video_table, audio_table = self.scale_shift_table_a2v_ca_video, self.scale_shift_table_a2v_ca_audio
        attn = self.video_to_audio_attn
        if v2a_enabled:  # keys and values first: those of the video before the attention to audio is added to it
            scale, shift, _ = self._cross_values(video_table, video, slice(2, 4))
            video_kv = keys_and_values(attn, self._modulated(video.x, scale, shift), video_chunks, video_pe)
        if a2v_enabled:
            scale, shift, _ = self._cross_values(audio_table, audio, slice(0, 2))
            source = self._modulated(audio.x, scale, shift)
            audio_kv = keys_and_values(self.audio_to_video_attn, source, audio_chunks, audio_pe)
            scale, shift, gate = self._cross_values(video_table, video, slice(0, 2))
            modulated_video = self._modulated(video.x, scale, shift)
            attention = QueryAttention(self.audio_to_video_attn, video.x.dtype)
            for chunk in video_chunks:
                attended = attention(modulated_video(chunk), *audio_kv, chunk_pe(video_pe, chunk))
                video.x[:, chunk.span].add_(attended.mul_(gate))
        if v2a_enabled:
            scale, shift, gate = self._cross_values(audio_table, audio, slice(2, 4))
            modulated_audio = self._modulated(audio.x, scale, shift)
            attention = QueryAttention(attn, audio.x.dtype)
            for chunk in audio_chunks:
                attended = attention(modulated_audio(chunk), *video_kv, chunk_pe(audio_pe, chunk))
                audio.x[:, chunk.span].add_(attended.mul_(gate))

    def _cross_values(self, table: torch.Tensor, args: TransformerArgs, indices: slice) -> tuple[torch.Tensor, ...]:
        values: tuple[torch.Tensor, ...] = self.get_av_ca_ada_values(
            table, 1, args.cross_scale_shift_timestep, args.cross_gate_timestep, indices
        )
        return values

    def _feed_forward(self, args: TransformerArgs, chunks: Chunks, ff: Any, table: torch.Tensor) -> None:
        shift, scale, gate = self.get_ada_values(table, 1, args.timesteps, slice(3, 6))
        modulated = self._modulated(args.x, scale, shift)
        project_in, project_out = cast_linear(ff.net[0].proj, args.x.dtype), cast_linear(ff.net[2], args.x.dtype)
        for chunk in chunks:
            hidden = gelu(project_in(modulated(chunk)), approximate="tanh")  # (1, chunk tokens, 4 * width)
            args.x[:, chunk.span].add_(multiply_(project_out(hidden), gate, chunk))
            del hidden

    def _modulated(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> ChunkInput:
        factor = 1 + scale

        def modulated(chunk: Chunk) -> torch.Tensor:
            normed = rms_norm(x[:, chunk.span], eps=self.norm_eps)
            return add_(multiply_(normed, factor, chunk), shift, chunk)

        return modulated


# --- Timesteps --------------------------------------------------------------------------------------------------------


def _check_timesteps(timesteps: torch.Tensor, bounds: Bounds) -> None:
    if isinstance(timesteps, FakeTensor):  # a forecast has no values to check
        return
    for start, stop in pairwise(bounds):
        if not bool((timesteps[:, start:stop] == timesteps[:, start : start + 1]).all()):
            raise ValueError(f"tokens {start} to {stop} have several timesteps; the chunked transformer takes one")


def _distinct_timesteps(timesteps: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    """The timestep of each range between two bounds, padded to ``(1, MODULATION_ROWS, ...)`` with the last one."""
    rows = min(bounds[-1], MODULATION_ROWS)
    starts = [min(start, bounds[-1] - 1) for start in bounds[:-1]]
    first = [timesteps[:, start : start + 1] for start in starts]
    return torch.cat([*first, first[-1].expand(-1, max(0, rows - len(first)), *timesteps.shape[2:])], dim=1)


def _without_padding(args: TransformerArgs, bounds: Bounds) -> TransformerArgs:
    """Prepared arguments with modulations of the distinct timesteps only."""
    count = len(bounds) - 1
    padded = (args.timesteps, args.embedded_timestep)
    timesteps, embedded = (values[:, :count].clone() for values in padded)
    return replace(args, timesteps=timesteps, embedded_timestep=embedded)


# --- Module operations for ltx-core's builders ------------------------------------------------------------------------


def _use_chunked_classes(model: Any) -> Any:
    model.__class__ = ChunkedTransformer
    for block in model.transformer_blocks:
        block.__class__ = ChunkedBlock
    return model


SHARED_MODULATIONS = ModuleOps(
    name="shared_modulations", matcher=lambda model: isinstance(model, LTXModel), mutator=_use_chunked_classes
)


def token_chunks(chunk_tokens: int | None) -> ModuleOps:
    """The operation that has a transformer with shared modulations process so many tokens at a time."""

    def set_chunk_tokens(model: Any) -> Any:
        model.chunk_tokens = chunk_tokens or CHUNK_TOKENS
        return model

    return ModuleOps(
        name="token_chunks", matcher=lambda model: isinstance(model, ChunkedTransformer), mutator=set_chunk_tokens
    )
