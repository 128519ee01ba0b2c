"""The transformer without wasted activations: ltx-core's modules and weights, called over chunks of tokens.

What ltx-core keeps for every token of a latent and need not:

- Modulations (scale, shift, gate). They follow from a token's timestep, of which an image-to-video request has two:
  that of the still's tokens, which are clean, and that of all others. Here they are computed once for each.
- The feed-forward's hidden layer, four times as wide as a token: here for one chunk of tokens at a time.
- Queries, attention outputs and modulated inputs: likewise. Keys and values, which every query needs, are kept whole.

Sums into the hidden state are made in place. The order of roundings is ltx-core's throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from ltx_core.guidance.perturbations import BatchedPerturbationConfig, PerturbationType
from ltx_core.loader.module_ops import ModuleOps
from ltx_core.model.transformer.attention import Attention
from ltx_core.model.transformer.modality import Modality
from ltx_core.model.transformer.model import LTXModel
from ltx_core.model.transformer.rope import apply_rotary_emb
from ltx_core.model.transformer.transformer import BasicAVTransformerBlock
from ltx_core.model.transformer.transformer_args import TransformerArgs
from ltx_core.utils import rms_norm
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import gelu, linear

CHUNK_TOKENS = 8192  # large enough to keep a GPU busy; some 0.6 GiB in the feed-forward of the 22B

Bounds = tuple[int, ...]  # tokens from one bound to the next have one timestep; from 0 to their number
Rows = tuple[tuple[int, int], ...]  # of a chunk's timesteps, in order: which, and how many tokens have it


class LeanModel(LTXModel):
    """ltx-core's transformer, for one request at a time.

    Attributes:
        still_tokens: How many of a video's tokens, which come first, belong to the still.
    """

    still_tokens = 0

    def forward(
        self, video: Modality, audio: Modality, perturbations: BatchedPerturbationConfig | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Velocities of video and audio, as ltx-core's own ``forward``."""
        video_bounds = (0, self.still_tokens, video.latent.shape[1])
        audio_bounds = (0, audio.latent.shape[1])
        video = replace(video, timesteps=_distinct(video.timesteps, video_bounds))
        audio = replace(audio, timesteps=_distinct(audio.timesteps, audio_bounds))
        video_args = self.video_args_preprocessor.prepare(video, audio)
        audio_args = self.audio_args_preprocessor.prepare(audio, video)
        for block in self.transformer_blocks:
            video_args, audio_args = block(
                video=video_args,
                audio=audio_args,
                perturbations=perturbations,
                video_bounds=video_bounds,
                audio_bounds=audio_bounds,
            )
        video_head = (self.scale_shift_table, self.norm_out, self.proj_out)
        audio_head = (self.audio_scale_shift_table, self.audio_norm_out, self.audio_proj_out)
        return self._read_out(video_args, video_bounds, video_head), self._read_out(
            audio_args, audio_bounds, audio_head
        )

    def _read_out(self, args: TransformerArgs, bounds: Bounds, head: tuple[Any, Any, Any]) -> torch.Tensor:
        parts = [
            self._process_output(*head, args.x[:, span], _of(args.embedded_timestep, rows))
            for span, rows in _spans(bounds)
        ]
        return torch.cat(parts, dim=1)


class LeanBlock(BasicAVTransformerBlock):
    """One of its blocks. The hidden states of its arguments are updated in place, and returned."""

    def forward(
        self,
        video: TransformerArgs,
        audio: TransformerArgs,
        perturbations: BatchedPerturbationConfig | None = None,
        video_bounds: Bounds = (),
        audio_bounds: Bounds = (),
    ) -> tuple[TransformerArgs, TransformerArgs]:
        """Attention of each modality to itself, to the prompt and to the other one, and the feed-forwards."""
        perturbations = perturbations or BatchedPerturbationConfig.empty(video.x.shape[0])

        def skips(kind: PerturbationType) -> bool:  # a batch is one request: all of it is perturbed, or nothing
            return bool(perturbations.all_in_batch(kind, self.idx))

        if video.enabled:
            passed = skips(PerturbationType.SKIP_VIDEO_SELF_ATTN)
            self._attend_to_itself(video, video_bounds, self.attn1, self.scale_shift_table, passed)
            tables = (self.scale_shift_table, self.prompt_scale_shift_table)
            self._attend_to_prompt(video, video_bounds, self.attn2, *tables)
        if audio.enabled:
            passed = skips(PerturbationType.SKIP_AUDIO_SELF_ATTN)
            self._attend_to_itself(audio, audio_bounds, self.audio_attn1, self.audio_scale_shift_table, passed)
            tables = (self.audio_scale_shift_table, self.audio_prompt_scale_shift_table)
            self._attend_to_prompt(audio, audio_bounds, self.audio_attn2, *tables)
        self._attend_to_each_other(
            video,
            audio,
            video_bounds,
            audio_bounds,
            video_listens=video.enabled and not skips(PerturbationType.SKIP_A2V_CROSS_ATTN),
            audio_watches=audio.enabled and not skips(PerturbationType.SKIP_V2A_CROSS_ATTN),
        )
        if video.enabled:
            self._feed_forward(video, video_bounds, self.ff, self.scale_shift_table)
        if audio.enabled:
            self._feed_forward(audio, audio_bounds, self.audio_ff, self.audio_scale_shift_table)
        return video, audio

    def _attend_to_itself(
        self, args: TransformerArgs, bounds: Bounds, attn: Attention, table: torch.Tensor, passed: bool
    ) -> None:
        shift, scale, gate = self.get_ada_values(table, 1, args.timesteps, slice(0, 3))
        modulated = partial(self._modulated, args.x, scale, shift)
        pe = args.positional_embeddings
        keys, values = _keys_and_values(attn, modulated, bounds, pe, with_keys=not passed)
        query = _Query(attn, args.x.dtype)
        for span, rows in _spans(bounds):
            taken = values[:, span] if passed else None
            attended = query(modulated(span, rows), keys, values, _at(pe, span), passed=taken)
            args.x[:, span].add_(attended.mul_(_of(gate, rows)))

    def _attend_to_prompt(
        self, args: TransformerArgs, bounds: Bounds, attn: Attention, table: torch.Tensor, prompt_table: torch.Tensor
    ) -> None:
        shift, scale, gate = self.get_ada_values(table, 1, args.timesteps, slice(6, 9))
        prompt_shift, prompt_scale = self.get_ada_values(prompt_table, 1, args.prompt_timestep, slice(None))
        context = args.context * (1 + prompt_scale) + prompt_shift
        keys, values = _keys_and_values(attn, lambda span, rows: context[:, span], (0, context.shape[1]), None)
        query = _Query(attn, args.x.dtype)
        for span, rows in _spans(bounds):
            attended = query(self._modulated(args.x, scale, shift, span, rows), keys, values, None)
            args.x[:, span].add_(attended.mul_(_of(gate, rows)))

    def _attend_to_each_other(
        self,
        video: TransformerArgs,
        audio: TransformerArgs,
        video_bounds: Bounds,
        audio_bounds: Bounds,
        *,
        video_listens: bool,
        audio_watches: bool,
    ) -> None:
        video_pe, audio_pe = video.cross_positional_embeddings, audio.cross_positional_embeddings
        video_table, audio_table = self.scale_shift_table_a2v_ca_video, self.scale_shift_table_a2v_ca_audio
        attn = self.video_to_audio_attn
        if audio_watches:  # keys and values first: they are of the video as it was before it listened
            scale, shift, _ = self._cross_values(video_table, video, slice(2, 4))
            seen = partial(self._modulated, video.x, scale, shift)
            watched = _keys_and_values(attn, seen, video_bounds, video_pe)
        if video_listens:
            scale, shift, _ = self._cross_values(audio_table, audio, slice(0, 2))
            heard = partial(self._modulated, audio.x, scale, shift)
            sound = _keys_and_values(self.audio_to_video_attn, heard, audio_bounds, audio_pe)
            scale, shift, gate = self._cross_values(video_table, video, slice(0, 2))
            query = _Query(self.audio_to_video_attn, video.x.dtype)
            for span, rows in _spans(video_bounds):
                normed = self._modulated(video.x, scale, shift, span, rows)
                video.x[:, span].add_(query(normed, *sound, _at(video_pe, span)).mul_(gate))
        if audio_watches:
            scale, shift, gate = self._cross_values(audio_table, audio, slice(2, 4))
            query = _Query(attn, audio.x.dtype)
            for span, rows in _spans(audio_bounds):
                normed = self._modulated(audio.x, scale, shift, span, rows)
                audio.x[:, span].add_(query(normed, *watched, _at(audio_pe, span)).mul_(gate))

    def _cross_values(self, table: torch.Tensor, args: TransformerArgs, indices: slice) -> tuple[torch.Tensor, ...]:
        values: tuple[torch.Tensor, ...] = self.get_av_ca_ada_values(
            table, 1, args.cross_scale_shift_timestep, args.cross_gate_timestep, indices
        )
        return values

    def _feed_forward(self, args: TransformerArgs, bounds: Bounds, ff: Any, table: torch.Tensor) -> None:
        shift, scale, gate = self.get_ada_values(table, 1, args.timesteps, slice(3, 6))
        widen, narrow = _dense(ff.net[0].proj, args.x.dtype), _dense(ff.net[2], args.x.dtype)
        for span, rows in _spans(bounds):
            hidden = gelu(widen(self._modulated(args.x, scale, shift, span, rows)), approximate="tanh")
            args.x[:, span].add_(narrow(hidden).mul_(_of(gate, rows)))

    def _modulated(
        self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, span: slice, rows: Rows
    ) -> torch.Tensor:
        return rms_norm(x[:, span], eps=self.norm_eps).mul_(1 + _of(scale, rows)).add_(_of(shift, rows))


# --- Attention over chunks --------------------------------------------------------------------------------------------


class _Query:
    """An attention's way from a chunk of queries to its output, with weights in the compute dtype for all chunks."""

    def __init__(self, attn: Attention, dtype: torch.dtype) -> None:
        self._attn = attn
        self._to_q, self._to_out = _dense(attn.to_q, dtype), _dense(attn.to_out[0], dtype)
        self._to_gates = _dense(attn.to_gate_logits, dtype) if attn.to_gate_logits is not None else None

    def __call__(
        self,
        x: torch.Tensor,
        keys: torch.Tensor | None,
        values: torch.Tensor,
        pe: Any,
        *,
        passed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The output for queries ``x``; ``passed`` stands for what attention would give, where it is switched off."""
        attn, out = self._attn, passed
        if out is None:
            q = attn.q_norm(self._to_q(x))
            q = q if pe is None else apply_rotary_emb(q, pe, attn.rope_type)
            out = attn.attention_function(q, keys, values, attn.heads, None)
            del q
        if self._to_gates is not None:
            gates = 2.0 * torch.sigmoid(self._to_gates(x))
            out = (out.unflatten(-1, (attn.heads, attn.dim_head)) * gates.unsqueeze(-1)).flatten(-2)
        return self._to_out(out)


def _keys_and_values(
    attn: Attention, source: Any, bounds: Bounds, pe: Any, *, with_keys: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Keys and values of all tokens, from ``source(span, rows)``, which gives those of one chunk."""
    parts = list(_spans(bounds))
    dtype = attn.k_norm.weight.dtype
    to_k, to_v = _dense(attn.to_k, dtype), _dense(attn.to_v, dtype)
    keys = values = None
    for span, rows in parts:
        x = source(span, rows)
        v = to_v(x)
        if values is None:
            values = v.new_empty(v.shape[0], bounds[-1], v.shape[2])
            keys = torch.empty_like(values) if with_keys else None
        values[:, span] = v
        del v
        if keys is not None:
            k = attn.k_norm(to_k(x))
            keys[:, span] = k if pe is None else apply_rotary_emb(k, _at(pe, span), attn.rope_type)
            del k
        del x
    assert values is not None
    return keys, values


def _dense(layer: torch.nn.Linear, dtype: torch.dtype) -> Any:
    """A layer with its weight in the compute dtype, cast once for all chunks as fp8-cast does in every call."""
    bias = layer.bias.to(dtype) if layer.bias is not None else None
    return partial(linear, weight=layer.weight.to(dtype), bias=bias)


def _at(pe: Any, span: slice) -> Any:
    """The rotary cosines and sines of a chunk of tokens: ``(1, heads, tokens, d)`` or ``(1, tokens, d)``."""
    return None if pe is None else tuple(part[..., span, :] for part in pe)


def _of(values: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The modulation of a chunk's tokens, ``(1, tokens, width)``; ``(1, 1, width)`` where they share one."""
    if values.shape[1] == 1:
        return values
    parts = [values[:, row : row + 1] for row, _ in rows]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.expand(-1, count, -1) for part, (_, count) in zip(parts, rows, strict=True)], dim=1)


def _spans(bounds: Bounds) -> Iterator[tuple[slice, Rows]]:
    """Chunks of tokens, each with the timesteps in it."""
    for first in range(0, bounds[-1], CHUNK_TOKENS):
        last = min(first + CHUNK_TOKENS, bounds[-1])
        counts = [(row, min(stop, last) - max(start, first)) for row, (start, stop) in enumerate(pairwise(bounds))]
        yield slice(first, last), tuple((row, count) for row, count in counts if count > 0)


def _distinct(timesteps: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    """One timestep for each stretch between two bounds: ``(1, tokens, ...)`` to ``(1, stretches, ...)``."""
    if not isinstance(timesteps, FakeTensor):  # a forecast has no values to look at
        for start, stop in pairwise(bounds):
            if not bool((timesteps[:, start:stop] == timesteps[:, start : start + 1]).all()):
                raise ValueError(
                    f"tokens {start} to {stop} have several timesteps; the lean transformer takes one each"
                )
    starts = [min(start, timesteps.shape[1] - 1) for start in bounds[:-1]]
    return torch.cat([timesteps[:, start : start + 1] for start in starts], dim=1)


# --- As ltx-core's builders take it -----------------------------------------------------------------------------------


def _make_lean(model: LTXModel) -> LTXModel:
    model.__class__ = LeanModel
    for block in model.transformer_blocks:
        block.__class__ = LeanBlock
    return model


LEAN_TRANSFORMER = ModuleOps(
    name="lean_transformer", matcher=lambda model: isinstance(model, LTXModel), mutator=_make_lean
)
