"""Scripts of diffusers, as its documentation has them, forecast unchanged from folders of configuration alone."""

from __future__ import annotations

import builtins
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from script_folders import PIPELINES, build_directly, write_folder

from i2v_lab.errors import CheckpointError, ForecastError, RunnerUnavailable, ScriptError
from i2v_lab.pipeline.contract import runner
from i2v_lab.pipeline.contract.architectures import Architecture, load_architecture
from i2v_lab.pipeline.diffusers import configuration_folders
from i2v_lab.pipeline.diffusers.components import build, default_dtype
from i2v_lab.pipeline.diffusers.local_processors import stand_in_tokenizer
from i2v_lab.profiling.fake.forecast import forecasting
from i2v_lab.profiling.fake.workspaces import load_workspaces
from i2v_lab.profiling.records import Forecast
from i2v_lab.runs.forecast_script import forecast_script

pytestmark = pytest.mark.filterwarnings("ignore")  # a script's warnings are its own
WAN = """
import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
from diffusers.utils import export_to_video, load_image
from transformers import CLIPVisionModelWithProjection

model_id = "{folder}"
image_encoder = CLIPVisionModelWithProjection.from_pretrained(
    model_id, subfolder="image_encoder", torch_dtype=torch.float32
)
vae = AutoencoderKLWan.from_pretrained(model_id, subfolder="vae", torch_dtype=torch.float32)
pipe = WanImageToVideoPipeline.from_pretrained(
    model_id, vae=vae, image_encoder=image_encoder, torch_dtype=torch.bfloat16
)
"""
WAN_CALL = """
pipe.to("cuda")

image = load_image("https://huggingface.co/datasets/YiYiXu/testing-images/resolve/main/wan_i2v_input.JPG")
max_area = 64 * 64
aspect_ratio = image.height / image.width
mod_value = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1]
height = round(np.sqrt(max_area * aspect_ratio)) // mod_value * mod_value
width = round(np.sqrt(max_area / aspect_ratio)) // mod_value * mod_value
image = image.resize((width, height))
output = pipe(
    image=image, prompt="a wave", negative_prompt="bad", height=height, width=width, num_frames=9,
    num_inference_steps=3, guidance_scale=5.0,
).frames[0]
export_to_video(output, "output.mp4", fps=16)
"""
COGVIDEOX = """
import torch
from diffusers import CogVideoXImageToVideoPipeline
from diffusers.utils import export_to_video, load_image

pipe = CogVideoXImageToVideoPipeline.from_pretrained("{folder}", torch_dtype=torch.bfloat16)
"""
COGVIDEOX_CALL = """
pipe.enable_model_cpu_offload()
pipe.vae.enable_slicing()
pipe.vae.enable_tiling()
image = load_image("{still}")
video = pipe(
    image=image, prompt="a wave", guidance_scale=6, use_dynamic_cfg=True, num_inference_steps=3, num_frames=9,
    height=64, width=64, max_sequence_length=16, generator=torch.Generator("cuda").manual_seed(42),
)
export_to_video(video.frames[0], "output.mp4", fps=8)
"""
LTX = """
import torch
from diffusers import LTXImageToVideoPipeline
from diffusers.utils import export_to_video, load_image

pipe = LTXImageToVideoPipeline.from_pretrained("{folder}", dtype=torch.bfloat16)
"""
LTX_CALL = """
pipe.to("cuda")
pipe.transformer = torch.compile(pipe.transformer, mode="max-autotune")
image = load_image("{still}")
video = pipe(
    image=image, prompt="a wave", negative_prompt="worst quality", width=64, height=64, num_frames=9,
    num_inference_steps=3, max_sequence_length=16, decode_timestep=0.03, decode_noise_scale=0.025,
).frames[0]
export_to_video(video, "output.mp4", fps=24)
"""
SVD = """
import torch
from diffusers import StableVideoDiffusionPipeline
from diffusers.utils import load_image, export_to_video

pipe = StableVideoDiffusionPipeline.from_pretrained("{folder}", torch_dtype=torch.float16, variant="fp16")
"""
SVD_CALL = """
pipe.enable_model_cpu_offload()
image = load_image("{still}")
image = image.resize((64, 64))
generator = torch.manual_seed(42)
frames = pipe(
    image, height=64, width=64, num_frames=3, num_inference_steps=3, decode_chunk_size=2, generator=generator
).frames[0]
export_to_video(frames, "generated.mp4", fps=7)
"""
HUNYUAN = """
import torch
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from diffusers.utils import export_to_video

model_id = "{folder}"
transformer = HunyuanVideoTransformer3DModel.from_pretrained(
    model_id, subfolder="transformer", torch_dtype=torch.bfloat16
)
pipe = HunyuanVideoPipeline.from_pretrained(model_id, transformer=transformer, torch_dtype=torch.float16)
"""
HUNYUAN_CALL = """
pipe.vae.enable_tiling()
pipe.to("cuda")
output = pipe(
    prompt="a wave", height=16, width=16, num_frames=9, num_inference_steps=3, max_sequence_length=16,
    prompt_template={{"template": "{{}}", "crop_start": 0}},
).frames[0]
export_to_video(output, "output.mp4", fps=15)
"""
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
SCRIPTS: dict[str, tuple[str, str, dict[str, torch.dtype]]] = {
    "wan": (WAN, WAN_CALL, {"": BRAIN, "vae": FULL, "image_encoder": FULL}),
    "cogvideox": (COGVIDEOX, COGVIDEOX_CALL, {"": BRAIN}),
    "ltx": (LTX, LTX_CALL, {"": BRAIN}),
    "svd": (SVD, SVD_CALL, {"": HALF}),
    "hunyuan": (HUNYUAN, HUNYUAN_CALL, {"": HALF, "transformer": BRAIN}),
}
PHASES = {
    "wan": ["encode_prompt", "encode_image", "denoise_stage_1", "decode_video"],
    "cogvideox": ["encode_prompt", "encode_image", "denoise_stage_1", "decode_video"],
    "ltx": ["encode_prompt", "encode_image", "denoise_stage_1", "decode_video"],
    "svd": ["encode_image", "denoise_stage_1", "decode_video"],
    "hunyuan": ["encode_prompt", "denoise_stage_1", "decode_video"],
}


@pytest.fixture
def still(tmp_path: Path) -> Path:
    path = tmp_path / "still.png"
    Image.new("RGB", (64, 64), "teal").save(path)
    return path


def _script(tmp_path: Path, text: str, **names: Any) -> Path:
    script = tmp_path / "my_pipeline.py"
    script.write_text(text.format(**names) if names else text, encoding="utf-8")
    return script


def _forecast(tmp_path: Path, text: str, *arguments: str, **names: Any) -> Forecast:
    return forecast_script(_script(tmp_path, text, **names), arguments)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_script_of_the_documentation_takes_what_its_pipeline_takes_built_directly(
    name: str, tmp_path: Path, still: Path
) -> None:
    load, call, dtypes = SCRIPTS[name]
    call = call.replace("{{", "{").replace("}}", "}").replace("{still}", str(still))
    folder = write_folder(name, tmp_path / "model")
    found = _forecast(tmp_path, load.replace("{folder}", str(folder)) + call)

    unchanged = {"load_image": lambda image: Image.new("RGB", (960, 640)) if "://" in image else Image.open(image)}
    with forecasting("cuda", workspaces=load_workspaces()) as profiler, profiler.phase("call"):
        pipe = build_directly(name, dtypes, stand_in_tokenizer)
        exec(
            call.replace('torch.compile(pipe.transformer, mode="max-autotune")', "pipe.transformer"),
            {"pipe": pipe, "torch": torch, "np": np, "export_to_video": lambda *_, **__: None, **unchanged},
        )
    assert found.peak.peak_bytes == profiler.peak.peak_bytes
    assert [phase.phase for phase in found.phases] == PHASES[name]
    assert not (tmp_path / "output.mp4").exists()
    assert not Path("output.mp4").exists()


# --- What names resolve to --------------------------------------------------------------------------------------------


NAMED = """
import torch
from diffusers import LTXImageToVideoPipeline, LTXVideoTransformer3DModel, FlowMatchEulerDiscreteScheduler
from transformers import AutoTokenizer, T5EncoderModel

name = "Lightricks/Tiny"
transformer = LTXVideoTransformer3DModel.from_pretrained(name, subfolder="transformer", torch_dtype=torch.bfloat16)
encoder = T5EncoderModel.from_pretrained(name, subfolder="text_encoder", dtype=torch.float16)
scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(name, subfolder="scheduler")
assert len(AutoTokenizer.from_pretrained(name, subfolder="tokenizer")("a wave").input_ids) == 2
pipe = LTXImageToVideoPipeline.from_pretrained(name, transformer=transformer, text_encoder=encoder)
assert pipe.transformer is transformer and pipe.vae.dtype == torch.float32
pipe.to("cuda")
"""


def _bytes_on_the_card(*modules: torch.nn.Module) -> int:
    """Of parameters and buffers, each in blocks of 512 bytes, tied ones once."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(-(-t.nbytes // 512) * 512 for t in tensors.values())


@pytest.fixture
def named_bytes() -> int:
    pipe = build_directly("ltx", {"": FULL, "transformer": BRAIN, "text_encoder": HALF}, stand_in_tokenizer)
    for layer in pipe.text_encoder.encoder.block:  # T5 keeps these in float32 where the rest is in float16
        layer.layer[-1].DenseReluDense.wo.float()
    return _bytes_on_the_card(pipe.transformer, pipe.text_encoder, pipe.vae)


def test_a_name_resolves_to_the_cache_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named_bytes: int
) -> None:
    repository = tmp_path / "hub" / "models--Lightricks--Tiny"
    write_folder("ltx", repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert _forecast(tmp_path, NAMED).peak.peak_bytes == named_bytes
    revision = NAMED.replace('name, subfolder="scheduler"', 'name, subfolder="scheduler", revision="v2"')
    with pytest.raises(ForecastError) as caught:
        _forecast(tmp_path, revision)
    assert caught.value.fields["name"] == "Lightricks/Tiny"


def test_a_name_resolves_to_an_architecture_whose_repository_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named_bytes: int
) -> None:
    kind, parts = PIPELINES["ltx"]
    config = {name: {"_class_name": cls.__name__, **values} for name, (cls, values) in parts.items()}
    config["tokenizer"] = {"_class_name": "ByteTokenizer", "special": {"<pad>": 0}, "model_max_length": 128}
    tiny = Architecture(
        "tiny", "1", config, {}, runner="diffusers", pipeline=kind, repository=("Lightricks/Tiny", "Lightricks/Other")
    )
    monkeypatch.setattr(configuration_folders, "architecture_names", lambda: ["tiny"])
    monkeypatch.setattr(configuration_folders, "load_architecture", lambda name: tiny)
    found = _forecast(tmp_path, NAMED)
    assert found.peak.peak_bytes == named_bytes
    assert {each.operator for each in found.assumptions} == {"tokenizer of Lightricks/Tiny/tokenizer"}
    # As from a repository of one component; one whose pipeline has another class has none for it.
    alone = NAMED.replace('name, subfolder="transformer"', "name")
    assert _forecast(tmp_path, alone).peak.peak_bytes == named_bytes
    with pytest.raises(ForecastError) as caught:
        _forecast(tmp_path, "import diffusers\ndiffusers.WanPipeline.from_pretrained('lightricks/tiny')\n")
    assert (caught.value.fields["cause"], caught.value.fields["line"]) == ("no configuration", 2)


# --- Dtypes -----------------------------------------------------------------------------------------------------------

LOADED = """
import torch
from diffusers import AutoModel, DiffusionPipeline, WanTransformer3DModel
from transformers import UMT5EncoderModel

folder = "{folder}"
wan = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.bfloat16)
dtypes = {{name: parameter.dtype for name, parameter in wan.named_parameters()}}
assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
assert dtypes["blocks.0.scale_shift_table"] == dtypes["condition_embedder.time_embedder.linear_1.weight"]
assert dtypes["blocks.0.scale_shift_table"] == torch.float32
assert wan.rope.freqs_cos.dtype == {rope}
assert not wan.training and wan.device.type == "cpu"
assert WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").dtype == torch.float32
encoder = UMT5EncoderModel.from_pretrained(folder + "/text_encoder", torch_dtype="auto")
assert encoder.dtype == torch.float32 and encoder.shared.weight is encoder.encoder.embed_tokens.weight
half = UMT5EncoderModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float16, device_map="cuda")
assert half.encoder.block[0].layer[-1].DenseReluDense.wo.weight.dtype == torch.float32
assert half.dtype == torch.float16 and half.device.type == "cuda"
model, info = WanTransformer3DModel.from_pretrained(
    folder, subfolder="transformer", dtype=torch.float8_e4m3fn, device_map={{"": 0}}, output_loading_info=True
)
assert model.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn and info["missing_keys"] == []
half = {{"default": torch.float16}}
mapped = DiffusionPipeline.from_pretrained(folder, transformer=wan, dtype=half, device_map="cuda")
assert [part.device.type for part in (mapped.text_encoder, mapped.vae, mapped.transformer)] == ["cuda", "cuda", "cpu"]
assert [part.dtype for part in (mapped.text_encoder, mapped.vae)] == [torch.float16, torch.float16]
assert AutoModel.from_pretrained(folder, subfolder="vae").dtype == torch.float32
"""


def test_weights_have_the_dtypes_that_loading_gives_them(tmp_path: Path) -> None:
    folder = write_folder("wan", tmp_path / "model")
    with forecasting("cuda"):
        pipe = build_directly("wan", {"": BRAIN}, stand_in_tokenizer)
        rope = pipe.transformer.rope.freqs_cos.dtype
    _forecast(tmp_path, LOADED, folder=folder, rope=rope)


# --- What is refused --------------------------------------------------------------------------------------------------

IMPORTS = "import torch, diffusers, transformers\nx = torch.ones(4, device='cuda')\n"
REFUSED = {
    "diffusers.DiffusionPipeline.from_pretrained('some/model')": "no configuration",
    "diffusers.AutoencoderKLWan.from_pretrained('some/model', subfolder='vae')": "no configuration",
    "transformers.AutoModel.from_pretrained('some/model')": "no configuration",
    "transformers.AutoConfig.from_pretrained('some/model')": "no configuration",
    "transformers.CLIPProcessor.from_pretrained('some/model')": "no configuration",
    "diffusers.AutoPipelineForImage2Image.from_pretrained('some/model')": "no configuration",
    "diffusers.WanTransformer3DModel.from_single_file('https://huggingface.co/x.safetensors')": "no configuration",
    "diffusers.WanTransformer3DModel.from_single_file('x.gguf', config='some/model')": "no configuration",
    "diffusers.StableDiffusionXLPipeline.from_single_file('x.safetensors')": "no configuration",
    "diffusers.WanTransformer3DModel.from_pretrained({folder!r}, subfolder='transformer', device_map='auto')": (
        "decided by loading"
    ),
    "diffusers.WanTransformer3DModel.from_pretrained({folder!r}, subfolder='transformer', quantization_config="
    "{{'load_in_8bit': True}})": "decided by loading",
    "diffusers.WanTransformer3DModel.from_pretrained({folder!r}, subfolder='transformer', quantization_config="
    "diffusers.GGUFQuantizationConfig(compute_dtype=torch.bfloat16))": "decided by loading",
    "diffusers.WanTransformer3DModel.from_single_file('x.gguf', config={folder!r}, subfolder='transformer', "
    "quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.bfloat16))": "decided by loading",
    "diffusers.WanTransformer3DModel.from_pretrained({folder!r}, subfolder='transformer', quantization_config="
    "diffusers.TorchAoConfig(__import__('torchao.quantization').quantization.Int4WeightOnlyConfig()))": (
        "decided by loading"
    ),
    "diffusers.DiffusionPipeline.from_pretrained({folder!r}, quantization_config=diffusers.PipelineQuantizationConfig("
    "quant_mapping={{'transformer': diffusers.GGUFQuantizationConfig(compute_dtype=torch.bfloat16)}}))": (
        "decided by loading"
    ),
    "transformers.UMT5EncoderModel.from_pretrained({folder!r}, subfolder='text_encoder', quantization_config="
    "{{'quant_method': 'fp8'}})": "decided by loading",
    "diffusers.DiffusionPipeline.from_pretrained({folder!r}, custom_pipeline='some/code')": "decided by loading",
    "diffusers.DiffusionPipeline.from_pretrained({folder!r}, device_map='balanced')": "decided by loading",
    "diffusers.WanPipeline.lora_state_dict('some/lora')": "no weights",
    "__import__('huggingface_hub').hf_hub_download('some/model', 'config.json')": "no network",
    "diffusers.WanTransformer3DModel.from_pretrained({folder!r}, subfolder='transformer_2')": "no configuration",
    "transformers.UMT5EncoderModel.from_pretrained({folder!r}, subfolder='text_encoder_2')": "no configuration",
    "torch.load('weights.pt')": "pickle",
    "diffusers.utils.load_video('https://example.com/x.mp4')": "no network",
    "__import__('urllib.request').request.urlopen('http://example.com')": "no network",
    "__import__('os').fork()": "another process",
    "__import__('multiprocessing').Process().start()": "another process",
    "(lambda t: (t.start(), t.join()))(__import__('threading').Thread(target=lambda: x + 1))": "another thread",
    "torch.empty(int(torch.rand(1, device='cuda') * 9))": "data dependent",
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("line", REFUSED, ids=lambda line: line[:60])
def test_what_a_forecast_cannot_know_is_refused_with_its_line(
    line: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder = str(write_folder("wan", tmp_path / "model")) if "folder" in line else ""
    with pytest.raises(ForecastError) as caught:
        _forecast(tmp_path, IMPORTS + (line.format(folder=folder) if folder else line))
    error = caught.value
    assert error.fields["cause"] == REFUSED[line]
    assert error.fields["script"] == str(tmp_path / "my_pipeline.py")
    assert error.fields["line"] == 3
    assert "\n" not in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_folder_that_names_code_is_not_read(tmp_path: Path) -> None:
    folder = write_folder("wan", tmp_path / "model")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(CheckpointError) as caught:
        _forecast(tmp_path, IMPORTS + f"diffusers.DiffusionPipeline.from_pretrained({str(folder)!r})")
    assert caught.value.fields["fault"] == "code"
    assert caught.value.fields["line"] == 3


# --- Scripts as programs ----------------------------------------------------------------------------------------------

FAILING = {
    "a = 1\nb = a +\n": {"line": 2},
    "x = 1\n\ndef f():\n    return {}['key']\n\nf()\n": {"line": 4, "error": "KeyError"},
    "import json\njson.loads('{')\n": {"line": 2, "error": "JSONDecodeError"},
    "import sys\nsys.exit(3)\n": {"line": 2, "status": 3},
    "raise SystemExit('no card')\n": {"line": 1, "status": 1},
    "import argparse\np = argparse.ArgumentParser()\np.add_argument('--prompt', required=True)\np.parse_args()\n": {
        "line": 4,
        "status": 2,
    },
    "import missing_module_of_nobody\n": {"line": 1, "error": "ModuleNotFoundError"},
    "x = '\0'\n": {},
}


@pytest.mark.parametrize("text", FAILING)
def test_a_script_that_fails_is_one_line_with_its_own(text: str, tmp_path: Path) -> None:
    with pytest.raises(ScriptError) as caught:
        forecast_script(_script(tmp_path, text))
    error = caught.value
    assert error.exit_status == 1
    assert {name: error.fields[name] for name in FAILING[text]} == FAILING[text]
    assert "\n" not in str(error)
    assert pickle.loads(pickle.dumps(error)).fields == error.fields


@pytest.mark.parametrize("name", ["missing.py", "."])
def test_a_script_that_cannot_be_read_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ScriptError) as caught:
        forecast_script(tmp_path / name)
    assert caught.value.fields["script"] == str(tmp_path / name)


def test_a_script_needs_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    with pytest.raises(RunnerUnavailable) as caught:
        _forecast(tmp_path, "x = 1")
    assert caught.value.fields["pipeline"] == "diffusers"


@pytest.mark.parametrize("text", ["x = 1", "import torch\nx = torch.ones(1000)", "import sys\nsys.exit()"])
def test_a_script_that_puts_nothing_on_the_card_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ForecastError) as caught:
        _forecast(tmp_path, text)
    assert caught.value.fields["cause"] == "nothing allocated"


PROGRAM = """
import argparse
import sys
import torch
from neighbour import ROWS

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--columns", type=int, default=1)
    columns = parser.parse_args().columns
    weights = torch.empty(ROWS, columns, device="cuda")
    more = weights + 1
    del weights
    print("peak", torch.cuda.max_memory_allocated(), sys.argv[1:])

if __name__ == "__main__":
    main()
    sys.exit(0)
"""


def test_a_script_runs_as_a_program_with_its_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "neighbour.py").write_text("ROWS = 1024\n")
    before = list(sys.argv), list(sys.path), sys.modules["__main__"]
    found = _forecast(tmp_path, PROGRAM, "--columns", "256")
    sys.modules.pop("neighbour")
    assert (list(sys.argv), list(sys.path), sys.modules["__main__"]) == before
    assert found.peak.peak_bytes == 2 * 1024 * 256 * 4
    assert [phase.phase for phase in found.phases] == ["script"]
    output = capsys.readouterr()
    assert output.out == ""
    assert "peak 2097152 ['--columns', '256']" in output.err


WRITING = """
import torch
from PIL import Image
from diffusers import AutoencoderKLWan
from diffusers.utils import encode_video, export_to_gif, export_to_video
from safetensors.torch import save_file

x = torch.ones(4, 4, device="cuda")
picture = Image.new("RGB", (8, 8))
for _ in range(2):
    picture.save("{folder}/picture.png")
assert export_to_video([picture], "{folder}/video.mp4") == "{folder}/video.mp4"
export_to_gif([picture], "{folder}/video.gif")
torch.save(x, "{folder}/latents.pt")
save_file({{"x": x}}, "{folder}/latents.safetensors")
AutoencoderKLWan(base_dim=3, z_dim=4).save_pretrained("{folder}/vae")
model = torch.compile(torch.nn.Linear(4, 4, device="cuda"), mode="reduce-overhead")
model(x)

@torch.compile
def twice(x):
    return 2 * x

twice(x)
encode_video(torch.zeros(9, 8, 8, 3), fps=24, output_path="{folder}/video.mp4")
import numpy
numpy.save("{folder}/frames.npy", numpy.zeros(4))
import io
memory = io.BytesIO()
picture.save(memory, format="png")
assert memory.getvalue()
"""


def test_nothing_is_written_and_every_assumption_has_its_line(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    found = _forecast(tmp_path, WRITING, folder=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    places = {
        (each.operator.partition("(")[0], each.place.removeprefix("my_pipeline.py:"), each.count)
        for each in found.assumptions
    }
    assert places == {
        ("Image.save", "11", 2),
        ("export_to_video", "12", 1),
        ("export_to_gif", "13", 1),
        ("torch.save", "14", 1),
        ("save_file", "15", 1),
        ("save_pretrained", "16", 1),
        ("torch.compile of Linear", "17", 1),
        ("torch.compile of twice", "20", 1),
        ("encode_video", "25", 1),
        ("numpy.save", "27", 1),
    }


# --- Pipelines that are called often, and moved -----------------------------------------------------------------------

CALL = """pipe(
    image=image, prompt="a wave", width=64, height=64, num_frames=9, num_inference_steps={steps},
    max_sequence_length=16, output_type="latent",
)
"""
LOAD = """
import torch
from PIL import Image
from diffusers import LTXImageToVideoPipeline
image = Image.new("RGB", (64, 64))
pipe = LTXImageToVideoPipeline.from_pretrained("{folder}", dtype=torch.bfloat16)
"""
MOVES = {
    "model": "pipe.enable_model_cpu_offload()\n",
    "sequential": "pipe.enable_sequential_cpu_offload()\n",
    "group": "pipe.enable_group_offload(onload_device=torch.device('cuda'), offload_type='leaf_level')\n",
    "casting": "pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, "
    "compute_dtype=torch.bfloat16)\npipe.to('cuda')\n",
}


@pytest.mark.parametrize("move", MOVES)
def test_offloading_takes_what_it_takes_of_a_pipeline_built_directly(move: str, tmp_path: Path) -> None:
    folder = write_folder("ltx", tmp_path / "model")
    body = MOVES[move] + CALL.format(steps=3) * 2
    found = _forecast(tmp_path, LOAD.format(folder=folder) + body)
    with forecasting("cuda", workspaces=load_workspaces()) as profiler, profiler.phase("call"):
        pipe = build_directly("ltx", {"": BRAIN}, stand_in_tokenizer)
        exec(body, {"pipe": pipe, "torch": torch, "image": Image.new("RGB", (64, 64))})
    assert found.peak.peak_bytes == profiler.peak.peak_bytes
    assert [phase.phase for phase in found.phases].count("denoise_stage_1") == 2


QUANTIZED = {
    "none": "part = LTXVideoTransformer3DModel.from_pretrained(name, subfolder='transformer', "
    "torch_dtype=torch.bfloat16)",
    "component": "part = LTXVideoTransformer3DModel.from_pretrained(name, subfolder='transformer', "
    "torch_dtype=torch.bfloat16, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))",
    "pipeline": "part = LTXImageToVideoPipeline.from_pretrained(name, torch_dtype=torch.bfloat16, quantization_config="
    "PipelineQuantizationConfig(quant_mapping={'transformer': TorchAoConfig(Int8WeightOnlyConfig())})).transformer",
}


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a quantized one holds, or the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def test_weights_quantized_by_torchao_are_forecast(tmp_path: Path) -> None:
    """As many bytes as diffusers' own loader makes of the same weights."""
    from torchao.quantization import Int8WeightOnlyConfig  # slow to import

    folder = write_folder("ltx", tmp_path / "model")
    head = (
        "import torch\nfrom diffusers import LTXImageToVideoPipeline, LTXVideoTransformer3DModel, TorchAoConfig\n"
        "from diffusers import PipelineQuantizationConfig\nfrom torchao.quantization import Int8WeightOnlyConfig\n"
        f"name = {str(folder)!r}\n"
    )
    count = "\nend = torch.cuda.memory_allocated()\npart.to('cuda')\nprint(torch.cuda.memory_allocated() - end)"
    taken = {how: _forecast(tmp_path, head + line + count).peak.peak_bytes for how, line in QUANTIZED.items()}
    assert taken["component"] == taken["pipeline"] < taken["none"]

    model = build_directly("ltx", {"": BRAIN}, stand_in_tokenizer).transformer
    model.save_pretrained(folder / "transformer")
    config = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    loaded = type(model).from_pretrained(
        folder / "transformer", torch_dtype=torch.bfloat16, quantization_config=config, use_safetensors=True
    )
    tensors = [part for tensor in (*loaded.parameters(), *loaded.buffers()) for part in _parts(tensor)]
    assert taken["component"] == sum(-(-part.nbytes // 512) * 512 for part in tensors)


def test_equal_steps_are_executed_once_unless_a_hook_keeps_something(tmp_path: Path) -> None:
    folder = write_folder("ltx", tmp_path / "model")
    counted = """
calls = 0
def count(*_):
    global calls
    calls += 1
pipe.transformer.transformer_blocks[0].norm1.register_forward_hook(count)
pipe.to("cuda")
"""
    cache = """
from diffusers.hooks import HookRegistry, ModelHook
block = pipe.transformer.transformer_blocks[0]
HookRegistry.check_if_exists_or_initialize(block).register_hook(ModelHook(), "cache")
"""
    check = "assert calls {calls}, calls\n"
    text = LOAD.format(folder=folder) + counted + CALL.format(steps=10)
    _forecast(tmp_path, text + check.format(calls="< 4"))
    _forecast(
        tmp_path, LOAD.format(folder=folder) + cache + counted + CALL.format(steps=10) + check.format(calls="== 10")
    )


def test_a_block_that_changes_between_two_calls_is_executed_anew(tmp_path: Path) -> None:
    folder = write_folder("ltx", tmp_path / "model")
    changed = """
feed_forward = pipe.transformer.transformer_blocks[0].ff
class Larger(type(feed_forward)):
    def forward(self, x):
        larger = torch.empty(2**26, dtype=torch.uint8, device=x.device)
        return super().forward(x)
feed_forward.__class__ = Larger
"""
    text = LOAD.format(folder=folder) + 'pipe.to("cuda")\n' + CALL.format(steps=3) + changed + CALL.format(steps=3)
    first, second = [each for each in _forecast(tmp_path, text).phases if each.phase == "denoise_stage_1"]
    assert second.peak_bytes > first.peak_bytes + 2**25


def test_a_lora_is_read_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = {
        "transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 24, dtype=BRAIN),
        "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.ones(24, 4, dtype=BRAIN),
    }
    safetensors.torch.save_file(tensors, path)
    text = """
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file
name = dict(weight_name="lora.safetensors")  # which some versions want, offline
of_file, of_folder = (WanPipeline.lora_state_dict(each, **name) for each in ("{path}", "{folder}"))
for state in (of_file, of_folder, load_file("{path}")):
    assert {{key: (tuple(t.shape), t.dtype) for key, t in state.items()}} == {{
        "transformer.blocks.0.attn1.to_q.lora_A.weight": ((4, 24), torch.bfloat16),
        "transformer.blocks.0.attn1.to_q.lora_B.weight": ((24, 4), torch.bfloat16),
    }}
on_card = load_file("{path}", device="cuda")
"""
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / "lora.safetensors")
    found = _forecast(tmp_path, text, path=tmp_path / "folder" / "lora.safetensors", folder=tmp_path / "folder")
    assert found.peak.peak_bytes == 1024


def test_a_published_name_is_the_model_of_full_size(tmp_path: Path) -> None:
    text = """
import torch
from diffusers import StableVideoDiffusionPipeline
name = "stabilityai/stable-video-diffusion-img2vid-xt"
pipe = StableVideoDiffusionPipeline.from_pretrained(name, torch_dtype=torch.float16, variant="fp16").to("cuda")
assert sum(each.numel() for each in pipe.unet.parameters()) == 1_524_623_082
"""
    found = _forecast(tmp_path, text)
    architecture = load_architecture("svd-xt")
    with forecasting("cuda"), default_dtype(HALF):
        expected = _bytes_on_the_card(*(build(architecture, name) for name in ("unet", "vae", "image_encoder")))
    assert expected <= found.peak.peak_bytes < 1.01 * expected  # large blocks are not split for less than 1 MiB


DTYPES_OF = """
import torch, diffusers, transformers
found = {{}}
for part, name in {parts!r}.items():
    kind = getattr(diffusers, name, None) or getattr(transformers, name)
    for dtype in (None, torch.float16, torch.bfloat16):
        module = kind.from_pretrained("{folder}", subfolder=part, torch_dtype=dtype)
        tensors = {{**dict(module.named_parameters()), **dict(module.named_buffers())}}
        found[part, str(dtype)] = {{key: (str(each.dtype), tuple(each.shape)) for key, each in tensors.items()}}
"""


@pytest.mark.parametrize("name", PIPELINES)
def test_every_tensor_is_as_loading_its_weights_makes_it(name: str, tmp_path: Path) -> None:
    """Of the same folder, with weights in float32: by the libraries themselves, and in a forecast."""
    folder = write_folder(name, tmp_path / "model")
    pipe = build_directly(name, {"": FULL}, stand_in_tokenizer)
    modules = {part: each for part, each in pipe.components.items() if isinstance(each, torch.nn.Module)}
    for part, module in modules.items():
        module.save_pretrained(folder / part)
    names = {part: type(module).__name__ for part, module in modules.items()}
    text = DTYPES_OF.format(folder=folder, parts=names)
    loaded: dict[str, Any] = {}
    exec(text, loaded)
    keep = "on_card = torch.ones(1, device='cuda')\nimport builtins\nbuiltins.kept_by_a_test = found\n"
    _forecast(tmp_path, text + keep)
    assert builtins.__dict__.pop("kept_by_a_test") == loaded["found"]
