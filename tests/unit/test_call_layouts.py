"""``profile_call`` on pipelines that hold their components as other people's repositories do."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from i2v_lab import profile_call
from i2v_lab.errors import ProfilerError
from i2v_lab.profiling.components import find_modules, phase_of, role_of, snake_case
from i2v_lab.profiling.decoded import decoded_phase
from i2v_lab.profiling.records import PhaseRecord, StepRecord
from i2v_lab.runs.store import read_run

LATENT, STILL = torch.ones(1, 4, 1, 2, 2), torch.ones(1, 3, 1, 8, 8)


class Part(nn.Module):
    """Allocates this many KiB during a call, and nothing beyond it; a component of a pipeline, or part of one."""

    def __init__(self, kib: int, **parts: nn.Module) -> None:
        super().__init__()
        self.kib = kib
        self.weight = nn.Parameter(torch.zeros(1))
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        torch.zeros(self.kib, 256)
        return x


class WanModel(Part):
    def forward(self, x: Any, t: Any, context: Any) -> Any:
        return super().forward(x)


class AutoencoderKLTemporalDecoder(nn.Module):
    """The class says decoder, and encodes too; its first and last layers are called beside encoder and decoder."""

    def __init__(self, encode: int, decode: int) -> None:
        super().__init__()
        self.encoder, self.decoder = Part(encode), Part(decode)
        self.quant_conv, self.post_quant_conv = Part(encode + 1), Part(decode + 1)

    def encode(self, x: Any) -> Any:
        return self.quant_conv(self.encoder(x))

    def decode(self, x: Any) -> Any:
        return self.decoder(self.post_quant_conv(x))


Vae = AutoencoderKLTemporalDecoder


class Model:
    """Holds a module that it calls ``model``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: Any) -> Any:
        return self.model(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)


def _wan_2_1() -> Callable[[], Any]:
    class WanI2V:
        def __init__(self) -> None:
            self.text_encoder, self.vae = Model(Part(1)), Model(Vae(3, 6))
            self.clip, self.model = Model(Part(9, visual=Part(2), textual=Part(9))), Part(5)

        def generate(self) -> Any:
            self.text_encoder(0)
            self.clip.visual(STILL)
            self.vae.encode(STILL)
            for _ in range(2):
                self.model(LATENT)
            return self.vae.decode(LATENT)

    return WanI2V().generate


def _wan_2_2() -> Callable[[], Any]:
    class WanI2V:
        def __init__(self) -> None:
            self.text_encoder, self.vae = Model(Part(1)), Model(Vae(3, 6))
            self.low_noise_model, self.high_noise_model = Part(4), Part(5)

        def generate(self, frame_num: int = 5) -> Any:
            self.text_encoder(0)
            self.vae.encode(STILL)
            for step in range(4):
                (self.high_noise_model if step < 2 else self.low_noise_model)(LATENT)
            return self.vae.decode(LATENT)

    return functools.partial(WanI2V().generate, frame_num=9)


def _hunyuan_video() -> Callable[[], Any]:
    class HYVideoDiffusionTransformer(Part):
        pass

    class HunyuanVideoSampler:
        def __init__(self) -> None:
            self.vae, self.model = Vae(3, 6), HYVideoDiffusionTransformer(5)
            self.text_encoder, self.text_encoder_2 = Part(1, model=Part(1)), Part(2, model=Part(2))
            self.pipeline = SimpleNamespace(vae=self.vae, transformer=self.model)

        def predict(self) -> Any:
            self.pipeline.vae.encode(STILL)
            self.text_encoder(0)
            self.text_encoder_2.model(0)
            self.pipeline.transformer(LATENT)
            return self.pipeline.vae.decode(LATENT)

    return HunyuanVideoSampler().predict


def _sat() -> Callable[[], Any]:
    class SATVideoDiffusionEngine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Part(9, diffusion_model=Part(5))
            self.denoiser, self.first_stage_model = Part(9), Vae(3, 6)
            self.conditioner = Part(9, embedders=nn.ModuleList([Part(1)]))

        def sample(self) -> Any:
            self.conditioner.embedders[0](0)
            self.encode_first_stage(STILL)
            self.model.diffusion_model(LATENT)
            return self.first_stage_model.decode(LATENT)

        def encode_first_stage(self, x: Any) -> Any:
            return self.first_stage_model.encode(x)

    engine = SATVideoDiffusionEngine()
    return lambda: engine.sample()


def _open_sora() -> Callable[[], Any]:
    model, model_ae, model_t5, model_clip = Part(5), Vae(3, 6), Part(1), Part(2)

    def api_fn() -> Any:
        model_ae.encode(STILL)
        model_clip(model_t5(0))
        model(LATENT)
        return model_ae.decode(LATENT)

    return api_fn


def _mochi() -> Callable[[], Any]:
    class MochiSingleGPUPipeline:
        def __init__(self) -> None:
            self.text_encoder, self.dit, self.decoder = Part(1), Part(5), Part(6)

        def __call__(self) -> Any:
            self.text_encoder(0)
            self.dit(LATENT)
            return _decode_latents(self.decoder, LATENT)

    return MochiSingleGPUPipeline()


def _decode_latents(module: nn.Module, z: torch.Tensor) -> Any:
    return module(z)


def _diffsynth() -> Callable[[], Any]:
    class WanVideoPipeline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text_encoder, self.image_encoder, self.vae = Part(1), Part(9, model=Part(2)), Part(9, model=Vae(3, 6))
            self.dit, self.dit2 = (Part(9, text_embedding=Part(4), blocks=nn.ModuleList([Part(5)])) for _ in range(2))

        def __call__(self) -> Any:  # type: ignore[override]
            self.text_encoder(0)
            self.image_encoder.model(STILL)
            self.vae.model.encode(STILL)
            for dit in (self.dit, self.dit2):
                dit.text_embedding(LATENT)
                dit.blocks[0](LATENT)
            return self.vae.model.decode(LATENT)

    return WanVideoPipeline()


def _comfy() -> Callable[[], Any]:
    class Nodes:
        def __init__(self) -> None:
            self.model = Model(Part(9, diffusion_model=Part(5), model_sampling=nn.Identity()))
            self.clip = SimpleNamespace(cond_stage_model=Part(9, clip_l=Part(1)), patcher=Model(Part(9)))
            self.clip_vision = Model(Part(2))
            self.vae = SimpleNamespace(first_stage_model=Vae(3, 6))

        def sample(self) -> Any:
            self.clip.cond_stage_model.clip_l(0)
            self.clip_vision(STILL)
            self.vae.first_stage_model.encode(STILL)
            self.model.diffusion_model(LATENT)
            return self.vae.first_stage_model.decode(LATENT)

    return Nodes().sample


def _kohya() -> Callable[[], Any]:
    class PipelineLike:
        def __init__(self) -> None:
            self.text_encoders, self.clip_vision_model = [Part(1), Part(1)], Part(2)
            self.unet, self.vae = Part(5), Vae(3, 6)

        def __call__(self) -> Any:
            for text_encoder in self.text_encoders:
                text_encoder(0)
            self.clip_vision_model(STILL)
            self.vae.encode(STILL)
            self.unet(LATENT)
            return self.vae.decode(LATENT)

    return PipelineLike()


def _musubi() -> Callable[[], Any]:
    class XLMRobertaCLIP(Part):
        pass

    class UMT5(Part):
        pass

    class WanVAE_(Vae):  # noqa: N801
        pass

    def generate() -> Any:  # all are built when needed, so that only their classes say what they are
        UMT5(1)(0)
        clip = XLMRobertaCLIP(9, visual=Part(2))
        clip.visual(STILL)
        vae = WanVAE_(3, 6)
        vae.encode(STILL)
        WanModel(5)(LATENT, t=0, context=0)
        return vae.decode(LATENT)

    return generate


def _latent_diffusion() -> Callable[[], Any]:
    class LatentVisualDiffusion(nn.Module):
        """Is called as a module."""

        def __init__(self) -> None:
            super().__init__()
            self.model, self.first_stage_model = Part(9, diffusion_model=Part(5)), Vae(3, 6)
            self.cond_stage_model, self.image_encoder = Part(1), Part(2)

        def forward(self) -> Any:
            self.cond_stage_model(0)
            self.image_encoder(STILL)
            self.first_stage_model.encode(STILL)
            self.model.diffusion_model(LATENT)
            return self.first_stage_model.decode(LATENT)

    return LatentVisualDiffusion()


PROMPT, IMAGE, DENOISE, VIDEO = ("encode_prompt", 1), ("encode_image", 4), ("denoise_stage_1", 5), ("decode_video", 7)
LAYOUTS = {
    _wan_2_1: [PROMPT, IMAGE, DENOISE, VIDEO],
    _wan_2_2: [PROMPT, IMAGE, DENOISE, ("denoise_stage_2", 4), VIDEO],
    _hunyuan_video: [IMAGE, ("encode_prompt", 2), DENOISE, VIDEO],
    _sat: [PROMPT, IMAGE, DENOISE, VIDEO],
    _open_sora: [IMAGE, ("encode_prompt", 2), DENOISE, VIDEO],
    _mochi: [PROMPT, DENOISE, ("decode_video", 6)],
    _diffsynth: [PROMPT, IMAGE, DENOISE, ("denoise_stage_2", 5), VIDEO],
    _comfy: [PROMPT, IMAGE, DENOISE, VIDEO],
    _kohya: [PROMPT, IMAGE, DENOISE, VIDEO],
    _musubi: [PROMPT, IMAGE, DENOISE, VIDEO],
    _latent_diffusion: [PROMPT, IMAGE, DENOISE, VIDEO],
}


def _kib(call: Any) -> list[tuple[str, float]]:
    return [(phase.phase, (phase.peak_bytes - phase.start_bytes) / 1024) for phase in call.phases]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_each_component_is_charged_to_its_own_phase(layout):
    observed, made = _kib(profile_call(layout())), layout()
    assert [name for name, _ in observed] == [name for name, _ in LAYOUTS[layout]]
    assert [name for name, _ in _kib(profile_call(lambda: made()))] == [name for name, _ in LAYOUTS[layout]]
    kib = [kib for _, kib in observed]  # what is built during the call has weights of some bytes
    assert (kib if layout is not _musubi else [int(each) for each in kib]) == [kib for _, kib in LAYOUTS[layout]]


def test_a_component_that_no_rule_knows_is_a_phase_of_its_own():
    class Pipeline:
        def __init__(self) -> None:
            self.text_encoder, self.magic, self.transformer, self.vae = Part(1), Part(8), Part(5), Vae(3, 6)
            self.safety_checker, self.grain = Part(9), nn.Identity()
            self.scale = 3.0

        def __call__(self) -> Any:
            for component in (self.text_encoder, self.magic, self.transformer, self.magic):
                component(LATENT)
                nn.Identity()(LATENT)  # holds nothing and is not held: work as any other
            self.grain(LATENT)
            image = self.vae.decode(LATENT)
            return self.safety_checker(image)

    known = [PROMPT, ("magic", 8), DENOISE, ("magic", 8), ("grain", 0), VIDEO, ("safety_checker", 9)]
    assert _kib(profile_call(Pipeline())) == known
    layer = Part(4)
    assert _kib(profile_call(lambda: layer())) == [("layer", 4)]
    assert _kib(profile_call(layer)) == [("call", 4)]


def test_controlnets_belong_to_the_step_and_every_denoiser_is_a_stage():
    class Pipeline:
        def __init__(self) -> None:
            self.controlnet, self.guider, self.unet, self.refiner_unet = Part(2), Part(1), Part(5), Part(4)
            self.latent_upsampler = Part(3)

        def __call__(self) -> None:
            for _ in range(2):
                self.controlnet(LATENT)
                self.unet(LATENT)
                self.guider(LATENT)
            self.refiner_unet(LATENT)
            self.latent_upsampler(LATENT)
            self.unet(LATENT)

    call = profile_call(Pipeline())
    assert _kib(call) == [DENOISE, ("denoise_stage_2", 4), ("upsample_latent", 3), ("denoise_stage_3", 5)]
    steps = [(step.phase, step.step, step.steps) for step in call.records if isinstance(step, StepRecord)]
    names = ["denoise_stage_1", "denoise_stage_1", "denoise_stage_2", "denoise_stage_3"]
    assert steps == list(zip(names, [1, 2, 1, 1], [2, 2, 1, 1], strict=True))


def test_the_direction_of_an_autoencoder_is_told_by_method_part_picture_and_place():
    class Whole(Part):
        """Encodes or decodes when called."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            super().forward()
            return LATENT if x.shape[1] == 3 else STILL

    vae, whole, unet = Vae(3, 6), Part(4), Part(5)
    by_picture = Whole(7)

    def roundtrip(x: torch.Tensor) -> torch.Tensor:
        return vae.decode(vae.encode(x))

    assert _kib(profile_call(roundtrip, STILL)) == [("encode_image", 4), ("decode_video", 7)]
    held = SimpleNamespace(vae=by_picture)
    assert _kib(profile_call(lambda: held.vae(STILL))) == [("encode_image", 7)]
    assert _kib(profile_call(lambda: held.vae(LATENT))) == [("decode_video", 7)]
    pipeline = SimpleNamespace(vae=whole, unet=unet)
    assert _kib(profile_call(lambda: (pipeline.vae(LATENT), pipeline.unet(LATENT), pipeline.vae(LATENT)))) == [
        ("vae", 4),  # nothing says which
        DENOISE,
        ("decode_video", 4),
    ]


def test_what_wraps_a_component_is_named_by_it():
    class Net(Part):
        pass

    class WrappedDiT(Part):
        pass

    def built() -> None:
        nn.Sequential()  # says nothing, and has nothing
        for inner in (WrappedDiT(5), Net(5, module=WrappedDiT(5)), Net(5, _orig_mod=Net(5, module=WrappedDiT(5)))):
            Net(5, _fsdp_wrapped_module=inner)(LATENT)

    assert [(name, int(kib)) for name, kib in _kib(profile_call(built))] == [DENOISE]
    pipeline = SimpleNamespace(net=Part(5), encoder=Part(2), decoder=Part(6), t5=Part(1))
    run = profile_call(lambda: [part(LATENT) for part in (pipeline.t5, pipeline.net)])
    assert _kib(run) == [PROMPT, DENOISE]
    pipeline = SimpleNamespace(dit=Part(5), encoder=Part(2), decoder=Part(6), t5=Part(1))
    parts = (pipeline.t5, pipeline.encoder, pipeline.dit, pipeline.decoder)
    assert _kib(profile_call(lambda _: [part(LATENT) for part in parts], pipeline)) == [
        PROMPT,
        ("encode_image", 2),
        DENOISE,
        ("decode_video", 6),
    ]


def test_a_picture_is_neither_a_prompt_nor_a_latent():
    class Pipeline:
        def __init__(self) -> None:
            self.conditioner, self.latent_upsampler, self.upscaler = Part(2), Part(3), Part(4)

        def __call__(self) -> None:
            self.conditioner(STILL)
            self.conditioner(0)
            self.latent_upsampler(LATENT)
            self.upscaler(STILL)

    expected = [("encode_image", 2), ("encode_prompt", 2), ("upsample_latent", 3), ("upscaler", 4)]
    assert _kib(profile_call(Pipeline())) == expected


def test_an_asynchronous_pipeline_is_refused_before_it_runs():
    class Pipeline:
        async def __call__(self) -> None: ...

        async def stream(self) -> Any:
            yield 1

    for pipeline in (Pipeline(), Pipeline().stream, functools.partial(Pipeline().__call__)):
        with pytest.raises(ProfilerError) as refused:
            profile_call(pipeline)
        assert list(refused.value.fields) == ["pipeline"]
    assert profile_call(lambda: asyncio.run(Pipeline()())).result is None


def test_names_are_those_of_the_holders_and_of_words_of_mixed_case():
    names = [snake_case(name) for name in ("DiT", "UNet", "AsymmDiTJoint", "UNet3DConditionModel", "ControlNetModel")]
    assert names == ["dit", "unet", "asymm_dit_joint", "unet3d_condition_model", "controlnet_model"]
    assert [phase_of([name], [], "") for name in ("DiT", "UNet2DModel", "UNet", "MMDiT", "dit2", "ViT")] == [
        *("denoise" for _ in range(5)),
        None,
    ]
    held = SimpleNamespace(encoder=Part(1), decoder=Part(1))
    pipeline = SimpleNamespace(
        text_encoder=Model(Part(1)), vae=held, runner=SimpleNamespace(unet=Part(1)), text_to_video=Model(Part(1))
    )
    assert list(find_modules(pipeline)) == ["text_encoder", "vae_encoder", "vae_decoder", "unet", "model"]


# --- What the result says ---------------------------------------------------------------------------------------------


class Output(dict):
    """As those of diffusers: fields by key and by name."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.__dict__.update(fields)


def _makes(result: Any) -> Any:
    pipeline = SimpleNamespace(unet=Part(5), vae=Vae(3, 6))

    def run() -> Any:
        pipeline.vae.encode(STILL)
        pipeline.unet(LATENT)
        pipeline.vae.decode(LATENT)
        return result

    return run


def test_a_pipeline_whose_output_is_images_decodes_images(tmp_path):
    picture = Image.new("RGB", (8, 8))
    for result in (Output(images=[1, 2]), SimpleNamespace(image=1), picture, [picture], (torch.ones(1, 3, 8, 8),)):
        assert [name for name, _ in _kib(profile_call(_makes(result)))] == [
            "encode_image",
            "denoise_stage_1",
            "decode_image",
        ]
    for result in (Output(frames=[1]), [picture, picture], torch.ones(1, 3, 4, 8, 8), torch.ones(9, 3, 8, 8), None):
        assert profile_call(_makes(result)).phases[-1].phase == "decode_video"
    assert profile_call(_makes(Output(audios=[1]))).phases[-1].phase == "decode_audio"
    profile_call(_makes(Output(images=[])), run_dir=tmp_path / "run")
    assert [phase.phase for phase in read_run(tmp_path / "run").of(PhaseRecord)][-1] == "decode_image"


def test_a_pipeline_for_frames_makes_a_video_whatever_its_result_is_called():
    class TextToVideoZeroPipeline:
        def __call__(self) -> Any: ...

    def generate(frame_num: int = 5) -> Any: ...

    class Wan:
        def img2vid(self) -> Any: ...
        def image_to_image(self) -> Any: ...

    for pipeline in (TextToVideoZeroPipeline(), generate, functools.partial(generate, 3), Wan().img2vid):
        assert decoded_phase(pipeline, Output(images=[])) == "decode_video"
    assert decoded_phase(Wan().image_to_image) == "decode_image"


def test_the_names_of_components_in_one_word():
    phases = {
        "encode_prompt": ["textencoder", "TextEncoder", "llm", "T5", "umt5_xxl", "ByT5", "CLIP", "prompt_encoder"],
        "encode_image": ["img_encoder", "image_encoder", "clip_vision", "siglip", "feature_extractor", "vision_tower"],
        "denoise": [
            "mmdit",
            "MMDiT",
            "DiT",
            "UNet",
            "unet3d",
            "SdxlUNet2DConditionModel",
            "denoise_fn",
            "transformer3d",
        ],
        "upsample_latent": ["upsampler", "LatentUpsampler", "upscaler"],
        "decode_video": ["video_decoder", "vae_decoder", "VAEDecoder", "wanvae_decoder"],
        None: ["edit", "credit", "safety_checker", "model", "decoder", "text2video", "image_to_video"],
    }
    for phase, names in phases.items():
        assert {name: phase_of([name], [], "") for name in names} == dict.fromkeys(names, phase)
    assert phase_of(["diffusion_decoder", "LTX2VideoDiffusionDecoderModel"], [], "") == "decode_video"
    assert phase_of(["diffusion_model", "Net"], [], "") == "denoise"
    for name in ("VAE", "wanvae", "video_vae", "ae", "AutoEncoder", "movq"):
        assert role_of([name]) == "autoencoder"
    assert [role_of(["block"], package) for package in ("text2video", "text_to_image.a", "x.text", "text")] == [
        *(None, None),
        "encode_prompt",
        None,
    ]


def _clip_vision() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=224, patch_size=112, projection_dim=32))


def _svd() -> tuple[Any, dict[str, Any]]:
    import diffusers
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(crop_size={"height": 224, "width": 224}, size={"shortest_edge": 224})
    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=32,
        in_channels=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=8,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    )
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True)
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), latent_channels=4, layers_per_block=1
    )
    pipe = diffusers.StableVideoDiffusionPipeline(vae, _clip_vision(), unet, scheduler, processor)
    return pipe, {"image": Image.new("RGB", (32, 32)), "num_frames": 2, "num_inference_steps": 1, "height": 32}


def _wan_experts() -> tuple[Any, dict[str, Any]]:
    import diffusers

    def transformer() -> Any:
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=36,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=1,
        )

    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = diffusers.WanImageToVideoPipeline(
        None, None, vae, scheduler, None, None, transformer(), transformer(), boundary_ratio=0.9
    )
    embeds = {"prompt_embeds": torch.ones(1, 4, 32), "negative_prompt_embeds": torch.ones(1, 4, 32)}
    return pipe, {"image": Image.new("RGB", (16, 16)), "num_frames": 5, "num_inference_steps": 2, **embeds}


def _flux() -> tuple[Any, dict[str, Any]]:
    import diffusers

    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=1, latent_channels=1, shift_factor=0.1, scaling_factor=1.5
    )
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(scheduler, vae, None, None, None, None, transformer)
    embeds = {"prompt_embeds": torch.ones(1, 4, 32), "pooled_prompt_embeds": torch.ones(1, 32)}
    return pipe, {"height": 8, "width": 8, "num_inference_steps": 2, "return_dict": False, **embeds}


DIFFUSERS = {
    _svd: ["encode_image", "denoise_stage_1", "decode_video"],
    _wan_experts: ["encode_image", "denoise_stage_1", "denoise_stage_2", "decode_video"],
    _flux: ["denoise_stage_1", "decode_image"],
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("make", DIFFUSERS, ids=lambda make: make.__name__)
def test_pipelines_of_diffusers(make):
    pipe, arguments = make()
    pipe.set_progress_bar_config(disable=True)
    width = {"height": 16, "width": 16} if make is _wan_experts else {"width": arguments.get("width", 32)}
    call = profile_call(pipe, **{**arguments, **width, "output_type": "pt"})
    assert [phase.phase for phase in call.phases] == DIFFUSERS[make]
    assert {phase.saved_for_backward_bytes for phase in call.phases} == {0}
