"""The transformer without wasted activations: ltx-core's modules and weights, called over chunks of tokens.

What ltx-core keeps for every token of a latent and need not:

- Modulations (scale, shift, gate). They follow from a token's timestep, of which an image-to-video request has two:
  that of the still's tokens, which are clean, and that of all others. Here they are kept once for each.
- The feed-forward's hidden layer, four times as wide as a token: here for one chunk of tokens at a time.
- Queries, attention outputs and modulated inputs: likewise. Keys and values, which every query needs, are kept whole.

Sums into the hidden state are made in place. The order of roundings is ltx-core's throughout.
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
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import gelu

from i2v_lab.pipeline.ltx2.memory.lean_attention import ChunkedQuery, Source, at, dense, keys_and_values
from i2v_lab.pipeline.ltx2.memory.token_chunks import Bounds, Chunk, Chunks, add, chunks_of, expanded, multiply, whole

CHUNK_TOKENS = 8192  # enough to keep a GPU busy; some 0.6 GiB in the feed-forward of the 22B
# Rows of the matrix products that modulations come from, repeated: with two alone cuBLAS takes other kernels than for
# ltx-core's one a token, which round otherwise. From 512 on an H100 takes those, and latents are equal bit for bit.
MODULATION_ROWS = 1024
# Up to here ltx-core's own forward wastes less than 0.3 GiB, and the launches of more kernels would cost time.
SMALL_TOKENS = 4096


class LeanModel(LTXModel):
    """ltx-core's transformer, for one request at a time.

    Attributes:
        still_tokens: How many of a video's tokens, which come first, belong to the still.
        chunk_tokens: How many it works on at a time, at most.
    """

    still_tokens = 0
    chunk_tokens = sys.maxsize
    _checked: tuple[Bounds, Bounds] | None = None

    def forward(
        self, video: Modality, audio: Modality, perturbations: BatchedPerturbationConfig | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Velocities of video and audio, as ltx-core's own ``forward``.

        Which it is for few tokens.

        Raises:
            ValueError: The first pass over this many tokens has more timesteps than these two.
        """
        if video.latent.shape[1] <= SMALL_TOKENS:
            velocities: tuple[torch.Tensor, torch.Tensor] = super().forward(video, audio, perturbations)
            return velocities
        video_bounds = (0, self.still_tokens, video.latent.shape[1])
        audio_bounds = (0, audio.latent.shape[1])
        if self._checked != (video_bounds, audio_bounds):  # once a stage: the answer stops the device's queue
            _check_timesteps(video.timesteps, video_bounds)
            _check_timesteps(audio.timesteps, audio_bounds)
            self._checked = (video_bounds, audio_bounds)
        few = (
            replace(video, timesteps=_few(video.timesteps, video_bounds)),
            replace(audio, timesteps=_few(audio.timesteps, audio_bounds)),
        )
        video_args = _cut(self.video_args_preprocessor.prepare(*few), video_bounds)
        audio_args = _cut(self.audio_args_preprocessor.prepare(*reversed(few)), audio_bounds)
        video_chunks = chunks_of(video_bounds, self.chunk_tokens)
        audio_chunks = chunks_of(audio_bounds, self.chunk_tokens)
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
        return self._read_out(video_args, video_chunks, video_head), self._read_out(
            audio_args, audio_chunks, audio_head
        )

    def _read_out(self, args: TransformerArgs, chunks: Chunks, head: tuple[Any, Any, Any]) -> torch.Tensor:
        parts = [
            self._process_output(*head, args.x[:, chunk.span], expanded(args.embedded_timestep, chunk))
            for chunk in chunks
        ]
        return torch.cat(parts, dim=1)


class LeanBlock(BasicAVTransformerBlock):
    """One of its blocks. Called with chunks, it updates its arguments' hidden states in place, and returns them."""

    def forward(
        self,
        video: TransformerArgs,
        audio: TransformerArgs,
        perturbations: BatchedPerturbationConfig | None = None,
        video_chunks: Chunks = (),
        audio_chunks: Chunks = (),
    ) -> tuple[TransformerArgs, TransformerArgs]:
        """Attention of each modality to itself, to the prompt and to the other one, and the feed-forwards."""
        if not video_chunks:
            plain: tuple[TransformerArgs, TransformerArgs] = super().forward(video, audio, perturbations)
            return plain
        perturbations = perturbations or BatchedPerturbationConfig.empty(video.x.shape[0])

        def skips(kind: PerturbationType) -> bool:  # a batch is one request: all of it is perturbed, or nothing
            return bool(perturbations.all_in_batch(kind, self.idx))

        if video.enabled:
            passed = skips(PerturbationType.SKIP_VIDEO_SELF_ATTN)
            self._attend_to_itself(video, video_chunks, self.attn1, self.scale_shift_table, passed)
            tables = (self.scale_shift_table, self.prompt_scale_shift_table)
            self._attend_to_prompt(video, video_chunks, self.attn2, *tables)
        if audio.enabled:
            passed = skips(PerturbationType.SKIP_AUDIO_SELF_ATTN)
            self._attend_to_itself(audio, audio_chunks, self.audio_attn1, self.audio_scale_shift_table, passed)
            tables = (self.audio_scale_shift_table, self.audio_prompt_scale_shift_table)
            self._attend_to_prompt(audio, audio_chunks, self.audio_attn2, *tables)
        self._attend_to_each_other(
            video,
            audio,
            video_chunks,
            audio_chunks,
            video_listens=video.enabled and not skips(PerturbationType.SKIP_A2V_CROSS_ATTN),
            audio_watches=audio.enabled and not skips(PerturbationType.SKIP_V2A_CROSS_ATTN),
        )
        if video.enabled:
            self._feed_forward(video, video_chunks, self.ff, self.scale_shift_table)
        if audio.enabled:
            self._feed_forward(audio, audio_chunks, self.audio_ff, self.audio_scale_shift_table)
        return video, audio

    def _attend_to_itself(
        self, args: TransformerArgs, chunks: Chunks, attn: Attention, table: torch.Tensor, passed: bool
    ) -> None:
        shift, scale, gate = self.get_ada_values(table, 1, args.timesteps, slice(0, 3))
        modulated = self._modulated(args.x, scale, shift)
        if len(chunks) == 1:
            modulated = cache(modulated)  # it is asked for twice
        pe = args.positional_embeddings
        keys, values = keys_and_values(attn, modulated, chunks, pe, with_keys=not passed)
        query = ChunkedQuery(attn, args.x.dtype)
        for chunk in chunks:
            taken = values[:, chunk.span] if passed else None
            attended = query(modulated(chunk), keys, values, at(pe, chunk), passed=taken)
            args.x[:, chunk.span].add_(multiply(attended, gate, chunk))

    def _attend_to_prompt(
        self, args: TransformerArgs, chunks: Chunks, attn: Attention, table: torch.Tensor, prompt_table: torch.Tensor
    ) -> None:
        shift, scale, gate = self.get_ada_values(table, 1, args.timesteps, slice(6, 9))
        prompt_shift, prompt_scale = self.get_ada_values(prompt_table, 1, args.prompt_timestep, slice(None))
        context = args.context * (1 + prompt_scale) + prompt_shift
        keys, values = keys_and_values(attn, lambda chunk: context[:, chunk.span], whole(context.shape[1]), None)
        modulated = self._modulated(args.x, scale, shift)
        query = ChunkedQuery(attn, args.x.dtype)
        for chunk in chunks:
            attended = query(modulated(chunk), keys, values, None)
            args.x[:, chunk.span].add_(multiply(attended, gate, chunk))

    def _attend_to_each_other(
        self,
        video: TransformerArgs,
        audio: TransformerArgs,
        video_chunks: Chunks,
        audio_chunks: Chunks,
        *,
        video_listens: bool,
        audio_watches: bool,
    ) -> None:
        video_pe, audio_pe = video.cross_positional_embeddings, audio.cross_positional_embeddings
        video_table, audio_table = self.scale_shift_table_a2v_ca_video, self.scale_shift_table_a2v_ca_audio
        attn = self.video_to_audio_attn
        if audio_watches:  # keys and values first: they are of the video as it was before it listened
            scale, shift, _ = self._cross_values(video_table, video, slice(2, 4))
            watched = keys_and_values(attn, self._modulated(video.x, scale, shift), video_chunks, video_pe)
        if video_listens:
            scale, shift, _ = self._cross_values(audio_table, audio, slice(0, 2))
            heard = self._modulated(audio.x, scale, shift)
            sound = keys_and_values(self.audio_to_video_attn, heard, audio_chunks, audio_pe)
            scale, shift, gate = self._cross_values(video_table, video, slice(0, 2))
            listening = self._modulated(video.x, scale, shift)
            query = ChunkedQuery(self.audio_to_video_attn, video.x.dtype)
            for chunk in video_chunks:
                attended = query(listening(chunk), *sound, at(video_pe, chunk))
                video.x[:, chunk.span].add_(attended.mul_(gate))
        if audio_watches:
            scale, shift, gate = self._cross_values(audio_table, audio, slice(2, 4))
            watching = self._modulated(audio.x, scale, shift)
            query = ChunkedQuery(attn, audio.x.dtype)
            for chunk in audio_chunks:
                attended = query(watching(chunk), *watched, at(audio_pe, chunk))
                audio.x[:, chunk.span].add_(attended.mul_(gate))

    def _cross_values(self, table: torch.Tensor, args: TransformerArgs, indices: slice) -> tuple[torch.Tensor, ...]:
        values: tuple[torch.Tensor, ...] = self.get_av_ca_ada_values(
            table, 1, args.cross_scale_shift_timestep, args.cross_gate_timestep, indices
        )
        return values

    def _feed_forward(self, args: TransformerArgs, chunks: Chunks, ff: Any, table: torch.Tensor) -> None:
        shift, scale, gate = self.get_ada_values(table, 1, args.timesteps, slice(3, 6))
        modulated = self._modulated(args.x, scale, shift)
        widen, narrow = dense(ff.net[0].proj, args.x.dtype), dense(ff.net[2], args.x.dtype)
        for chunk in chunks:
            hidden = gelu(widen(modulated(chunk)), approximate="tanh")
            args.x[:, chunk.span].add_(multiply(narrow(hidden), gate, chunk))
            del hidden

    def _modulated(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> Source:
        factor = 1 + scale

        def modulated(chunk: Chunk) -> torch.Tensor:
            normed = rms_norm(x[:, chunk.span], eps=self.norm_eps)
            return add(multiply(normed, factor, chunk), shift, chunk)

        return modulated


# --- Timesteps --------------------------------------------------------------------------------------------------------


def _check_timesteps(timesteps: torch.Tensor, bounds: Bounds) -> None:
    if isinstance(timesteps, FakeTensor):  # a forecast has no values to look at
        return
    for start, stop in pairwise(bounds):
        if not bool((timesteps[:, start:stop] == timesteps[:, start : start + 1]).all()):
            raise ValueError(f"tokens {start} to {stop} have several timesteps; the lean transformer takes one each")


def _few(timesteps: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    """One timestep for each stretch between two bounds, and the last one again: ``(1, rows, ...)``."""
    rows = min(bounds[-1], MODULATION_ROWS)
    starts = [min(start, bounds[-1] - 1) for start in bounds[:-1]]
    first = [timesteps[:, start : start + 1] for start in starts]
    return torch.cat([*first, first[-1].expand(-1, max(0, rows - len(first)), *timesteps.shape[2:])], dim=1)


def _cut(args: TransformerArgs, bounds: Bounds) -> TransformerArgs:
    """Prepared arguments with what belongs to the timesteps kept once for each."""
    stretches = len(bounds) - 1
    few = (args.timesteps, args.embedded_timestep)
    timesteps, embedded = (values[:, :stretches].clone() for values in few)
    return replace(args, timesteps=timesteps, embedded_timestep=embedded)


# --- As ltx-core's builders take it -----------------------------------------------------------------------------------


def _make_lean(model: Any) -> Any:
    model.__class__ = LeanModel
    for block in model.transformer_blocks:
        block.__class__ = LeanBlock
    return model


def _by_chunks(model: Any) -> Any:
    model.chunk_tokens = CHUNK_TOKENS
    return model


SHARED_MODULATIONS = ModuleOps(
    name="shared_modulations", matcher=lambda model: isinstance(model, LTXModel), mutator=_make_lean
)
TOKEN_CHUNKS = ModuleOps(name="token_chunks", matcher=lambda model: isinstance(model, LeanModel), mutator=_by_chunks)
