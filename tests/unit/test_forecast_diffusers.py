"""Pipelines of diffusers as they are, under a forecast: called whole, their schedulers, their ways to offload."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from PIL import Image

from i2v_lab.errors import ForecastError
from i2v_lab.profiling.fake.forecast import forecast, forecasting
from i2v_lab.profiling.records import ModuleRecord

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of torch, for NumPy
STILL = Image.new("RGB", (32, 32), (200, 100, 50))


def clip(width: int, size: int) -> Any:
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": size, "patch_size": size // 4}
    config = transformers.CLIPVisionConfig(hidden_size=width, projection_dim=width, intermediate_size=16, **heads)
    return transformers.CLIPVisionModelWithProjection(config).eval()


def wan() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        image_encoder=clip(4, 32),
        image_processor=transformers.CLIPImageProcessor(crop_size=32, size=32),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=36,
            out_channels=16,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
            image_dim=4,
        ),
    )
    embeds = torch.zeros(1, 8, 32)
    call = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds, "height": 32, "width": 32, "num_frames": 9}
    return pipe, {"image": STILL, "num_inference_steps": 2, **call}


def cogvideox() -> tuple[Any, dict[str, Any]]:
    blocks = {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4}
    pipe = diffusers.CogVideoXImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=diffusers.AutoencoderKLCogVideoX(
            **blocks, block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=8,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=32,
            num_layers=2,
            sample_width=4,
            sample_height=4,
            sample_frames=9,
            max_text_seq_length=8,
            use_rotary_positional_embeddings=True,
            use_learned_positional_embeddings=True,
        ),
    )
    embeds = torch.zeros(1, 8, 32)
    call = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds, "height": 32, "width": 32, "num_frames": 9}
    return pipe, {"image": STILL, "num_inference_steps": 2, **call}


def svd() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.StableVideoDiffusionPipeline(
        image_encoder=clip(32, 224),
        feature_extractor=transformers.CLIPImageProcessor(crop_size=32, size=32),
        vae=diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            interpolation_type="linear",
            prediction_type="v_prediction",
            sigma_max=700,
            sigma_min=0.002,
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
        ),
        unet=diffusers.UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=32,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=32,
            num_attention_heads=8,
            projection_class_embeddings_input_dim=96,
            addition_time_embed_dim=32,
        ),
    )
    return pipe, {"image": STILL, "height": 32, "width": 32, "num_frames": 2, "num_inference_steps": 2}


PIPELINES = {"wan": wan, "cogvideox": cogvideox, "svd": svd}


def modules(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: each for name, each in pipe.components.items() if isinstance(each, torch.nn.Module)}


def weight_bytes(pipe: Any) -> int:
    return sum(t.nbytes for m in modules(pipe).values() for t in (*m.parameters(), *m.buffers()))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_forecast_by_a_call_of_it(name):
    pipe, call = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    found = forecast(pipe, device="cuda", **call)
    assert found.peak.start_bytes >= weight_bytes(pipe)
    assert found.peak.peak_bytes > found.peak.start_bytes
    held = {record.module.split(".")[0] for record in found.records if isinstance(record, ModuleRecord)}
    assert set(modules(pipe)) <= held
    assert {each.operator for each in found.assumptions} == {"torch.Tensor.numpy"}  # for the pictures
    assert "diffusers" in found.assumptions[0].place
    for module in modules(pipe).values():
        assert {type(t) for t in module.parameters()} == {torch.nn.Parameter}
        assert {t.device.type for t in module.parameters()} == {"cpu"}
    assert pipe.scheduler.num_inference_steps is None


def test_a_pipeline_is_loaded_from_its_files_within_a_forecast(tmp_path):
    pipe = svd()[0]
    small = {"image_encoder": pipe.image_encoder, "feature_extractor": pipe.feature_extractor, "vae": pipe.vae}
    for name, part in small.items():
        part.save_pretrained(tmp_path / name)
    expected = sum(p.numel() * 2 for name in ("image_encoder", "vae") for p in small[name].parameters())
    with torch.no_grad(), forecasting("cuda") as profiler, profiler.phase("load"):
        vae = diffusers.AutoencoderKLTemporalDecoder.from_pretrained(tmp_path / "vae", torch_dtype=torch.bfloat16)
        encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(
            tmp_path / "image_encoder", dtype=torch.bfloat16
        )
        assert profiler.allocated_bytes() == 0
        vae.to("cuda")
        encoder.to("cuda")
        weights = sum(p.nbytes for model in (vae, encoder) for p in model.parameters())
        ids = encoder.vision_model.embeddings.position_ids.nbytes
        assert profiler.allocated_bytes() == weights + ids == expected + ids
    assert type(next(small["vae"].parameters())) is torch.nn.Parameter


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_files_of_safetensors_are_read_as_fakes_on_their_device(device, tmp_path):
    import safetensors
    import safetensors.torch

    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"few": torch.arange(6.0).view(2, 3), "many": torch.zeros(100, 100)}, path)
    with forecasting("cuda") as profiler, profiler.phase("read"):
        loaded = safetensors.torch.load_file(path, device=device)
        with safetensors.safe_open(path, "pt", device=device) as file:
            part = file.get_slice("many")[:10]
            assert (sorted(file.keys()), file.get_slice("many").get_shape()) == (["few", "many"], [100, 100])
        assert {t.device.type for t in (part, *loaded.values())} == {device}
        assert loaded["few"].sum().item() == 15
        loaded["many"] += 1
        on_card = sum(t.nbytes for t in (part, *loaded.values())) if device == "cuda" else 0
        assert profiler.allocated_bytes() == on_card
    assert safetensors.torch.load_file(path)["few"].tolist() == [[0, 1, 2], [3, 4, 5]]


class Holder:
    def __init__(self, model: torch.nn.Module, **attributes: Any) -> None:
        self.parts = {"model": [model]}
        self.same = model
        self.__dict__.update(attributes)

    def double(self, x: torch.Tensor) -> torch.Tensor:
        return self.same(self.parts["model"][0](x))

    __call__ = double


def test_any_object_that_holds_modules_and_its_methods_are_forecast():
    model = torch.nn.Linear(64, 64)
    holder, x = Holder(model, sigmas=torch.ones(3)), torch.zeros(4, 64)
    runs = {
        "object": (holder, x),
        "method": (holder.double, x),
        "partial": (functools.partial(holder, x),),
        "argument": (lambda inner, x: inner(x), holder, x),
    }
    peaks = {name: forecast(*args).peak.peak_bytes for name, args in runs.items()}
    weights = 4 * (64 * 64 + 64)
    assert set(peaks.values()) == {weights + 3 * x.nbytes}
    assert forecast(model.forward, x, device="cpu").peak.peak_bytes == weights + 2 * x.nbytes
    assert type(holder.same.weight) is torch.nn.Parameter


class Rotated(torch.nn.Module):
    """Keeps frequencies beside its parameters and buffers, as diffusers' rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = torch.polar(torch.ones(64), torch.arange(64.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.frequencies.real.to(x.device)


def test_tensors_beside_parameters_and_buffers_are_copied_with_their_values():
    model, x = Rotated(), torch.ones(4, 64)
    expected = x.nbytes * 2 + 64 * 4
    assert forecast(model, x).peak.peak_bytes == forecast(Holder(torch.nn.Sequential(model)).same, x).peak.peak_bytes
    assert forecast(model, x).peak.peak_bytes == expected
    holder = Holder(model, sizes=torch.tensor([2, 3]))

    def repeated(held: Holder, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(held.sizes[1].item(), 1)

    assert forecast(repeated, holder, x).peak.peak_bytes == 4 * x.nbytes
    assert type(model.frequencies) is torch.Tensor


def test_an_object_that_cannot_be_copied_is_refused_before_it_runs():
    holder = Holder(torch.nn.Linear(2, 2), open=(i for i in range(3)))
    with pytest.raises(ForecastError) as caught:
        forecast(holder, torch.zeros(1, 2))
    assert caught.value.fields == {"cause": "cannot be copied", "kind": "Holder"}
    with pytest.raises(ForecastError) as caught:
        forecast(lambda: Holder(torch.nn.Linear(2, 2)))
    assert caught.value.fields["cause"] == "nothing allocated"


SCHEDULERS = (
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1, "use_lu_lambdas": True}),
    ("CogVideoXDDIMScheduler", {"rescale_betas_zero_snr": True}),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    ("PNDMScheduler", {}),
)


@pytest.mark.parametrize("home", ["cuda", "cpu"])
def test_the_values_of_a_schedulers_steps_are_those_of_a_real_one(home):
    def steps(name: str, config: dict[str, Any], device: str) -> list[float]:
        scheduler = getattr(diffusers, name)(**config)
        scheduler.set_timesteps(4, device=device, **({"mu": 1.0} if "use_dynamic_shifting" in config else {}))
        sample = torch.zeros(1, 4, 8, 8, device=device)
        for t in scheduler.timesteps:
            sample = scheduler.step(sample, t, sample, return_dict=False)[0]
        sigmas = getattr(scheduler, "sigmas", torch.zeros(0))
        return [t.item() for t in (*scheduler.timesteps, *sigmas)]

    with forecasting("cuda", assume="nothing"), torch.device(home):
        found = [steps(name, config, "cuda") for name, config in SCHEDULERS]
    assert found == [steps(name, config, "cpu") for name, config in SCHEDULERS]


# --- Offloading -------------------------------------------------------------------------------------------------------


def _group(pipe: Any, **options: Any) -> None:
    pipe.enable_group_offload(onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), **options)


def _layerwise(pipe: Any) -> None:
    pipe.to("cuda")
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


BLOCKS = {"offload_type": "block_level", "num_blocks_per_group": 1}
OFFLOADS = {
    "layerwise": ("svd", _layerwise),
    "model": ("svd", lambda pipe: pipe.enable_model_cpu_offload()),
    "sequential": ("wan", lambda pipe: pipe.enable_sequential_cpu_offload()),
    "leaf and stream": ("cogvideox", functools.partial(_group, offload_type="leaf_level", use_stream=True)),
    "block": ("wan", functools.partial(_group, **BLOCKS, exclude_modules=["vae"])),
}


@pytest.mark.parametrize("offload", OFFLOADS)
def test_every_way_to_offload_runs(offload):
    name, enable = OFFLOADS[offload]
    with torch.no_grad(), forecasting("cuda", assume="nothing") as profiler:
        pipe, call = PIPELINES[name]()
        pipe.set_progress_bar_config(disable=True)
        enable(pipe)
        with profiler.phase("call"):
            call = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in call.items()}
            pipe(**call, output_type="latent")
    resident = profiler.peak.start_bytes
    assert resident < weight_bytes(pipe) / 2 if offload != "layerwise" else weight_bytes(pipe) / 2 < resident
    assert profiler.peak.peak_bytes > resident


@pytest.mark.parametrize("use_stream", [False, True])
def test_an_autoencoder_offloaded_by_blocks_fails_as_on_a_card(use_stream):
    with torch.no_grad(), pytest.raises(RuntimeError, match="same device"), forecasting("cuda"):
        pipe, call = cogvideox()
        _group(pipe, **BLOCKS, use_stream=use_stream)
        pipe(**{key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in call.items()})


WIDE, NARROW = 4 * (64 * 256 + 256), 4 * (256 * 64 + 64)  # bytes of two layers
ROWS_OF_64, ROWS_OF_256 = 4 * 4 * 64, 4 * 4 * 256


def _two_layers() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)).eval()


def _sequentially() -> torch.nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(_two_layers(), execution_device="cuda:0")


def _by_group(**options: Any) -> torch.nn.Module:
    from diffusers.hooks import apply_group_offloading

    model = torch.nn.ModuleList([_two_layers()])[0]
    apply_group_offloading(model, torch.device("cuda"), torch.device("cpu"), **options)
    return model


ONE_AT_A_TIME = max(WIDE + ROWS_OF_64 + ROWS_OF_256, NARROW + 2 * ROWS_OF_64 + ROWS_OF_256)


@pytest.mark.parametrize(
    ("build", "peak_bytes"),
    [
        (_sequentially, ONE_AT_A_TIME),
        (functools.partial(_by_group, offload_type="leaf_level"), ONE_AT_A_TIME),
        (  # the first call finds the order, the second fetches a layer ahead
            functools.partial(_by_group, offload_type="leaf_level", use_stream=True),
            WIDE + NARROW + ROWS_OF_64 + ROWS_OF_256,
        ),
    ],
)
def test_offloaded_layers_are_counted_to_the_byte(build, peak_bytes):
    with torch.no_grad(), forecasting("cuda") as profiler:
        model = build()
        with profiler.phase("first"):
            model(torch.zeros(4, 64, device="cuda"))
        with profiler.phase("second"):
            model(torch.zeros(4, 64, device="cuda"))
    second = profiler.phases[1]
    assert (profiler.phases[0].start_bytes, second.peak_bytes) == (0, peak_bytes)
    assert second.end_bytes in (0, WIDE)  # a stream has fetched the first layer of a next call


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:Accessing the data pointer of FakeTensor")
def test_offloading_to_files_is_refused(tmp_path):
    with torch.no_grad(), pytest.raises(ForecastError) as caught, forecasting("cuda"):
        _by_group(offload_type="leaf_level", offload_to_disk_path=str(tmp_path))(torch.zeros(4, 64, device="cuda"))
    assert caught.value.fields["operator"] == "safetensors.torch.serialize_file"
    assert "group_offloading.py" in caught.value.fields["place"]


def test_hooks_of_a_pipeline_that_is_passed_are_refused():
    pipe, call = svd()
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ForecastError) as caught:
        forecast(pipe, **call)
    fields = caught.value.fields
    assert (fields["cause"], fields["module"]) == ("hooks", "UNetSpatioTemporalConditionModel")
