"""Models for other programs: what is written, what it says, and how it agrees with PyTorch."""

import importlib.util
import json
import math
import zipfile
from dataclasses import replace

import pytest
import torch

from bitflow_edu.io.files import BitflowError
from bitflow_edu.io.models import build
from bitflow_edu.lab import export
from bitflow_edu.lab.export import CHECKED, FORMATS, OPSET, TRACED, export_model
from bitflow_edu.reverse_model import ReverseModel, one_pass, sample_noise
from bitflow_edu.tarflow import TARFlow
from bitflow_edu.transformer import TransformerConfig
from conftest import small_flow, small_reverse

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
with_onnx = pytest.mark.skipif(bool(MISSING), reason=f"the extra export: {MISSING} not installed")
both = pytest.mark.parametrize("format", ["torch", pytest.param("onnx", marks=with_onnx)])


def flow(**kw):
    """F of four tokens and two blocks."""
    return small_flow(side=2, blocks=2, **kw)


def reverse(**kw):
    """A G that fits it."""
    return small_reverse(flow(), **kw)


def guided(**kw):
    """A G that takes w."""
    return reverse(max_guidance=2.0, **kw)


def run_torch(path):
    """A `.pt2` file as a user opens it."""
    return torch.export.load(path).module()


def run_onnx(path):
    """An `.onnx` file as a user opens it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*inputs):
        names = [port.name for port in session.get_inputs()]
        found = session.run(None, {k: t.numpy() for k, t in zip(names, inputs, strict=True)})
        found = tuple(map(torch.from_numpy, found))
        return found if len(found) > 1 else found[0]

    return run


def opened(path, format):
    """A file as a function of tensors."""
    return (run_onnx if format == "onnx" else run_torch)(str(path))


def written(model, folder, format, **kw):
    """A file that was written, and the function in it."""
    path = folder / f"model{FORMATS[format].suffix}"
    made = export_model(model, path, format, **kw)
    assert made.path == path and [p.name for p in folder.iterdir()] == [path.name]
    assert set(made.differences) == set(CHECKED) and TRACED not in CHECKED
    return made, opened(path, format)


def near(found, wanted):
    """Equal but for the last digits."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@both
def test_forward_with_its_states(tmp_path, format):
    F = flow(modern=True, channels=3)
    made, run = written(F, tmp_path, format, states=True)
    assert "states (N, 3, 4, 12)" in made.signature and made.rounding == 0
    for n in (1, 2, 7):
        x, c = torch.rand(n, 3, 4, 4) * 2 - 1, torch.arange(n) % 4 - 1
        z, logdet, states = run(x, c)
        with torch.no_grad():
            wanted = F(x, c)
        near(z, wanted.z)
        near(logdet, wanted.logdet)
        near(states, torch.stack(wanted.states, dim=1))


@both
@pytest.mark.parametrize("scale_token", [False, True])
def test_reverse_with_w_as_an_input(tmp_path, format, scale_token):
    G = guided(scale_token=scale_token)
    _, run = written(G, tmp_path, format)
    for n in (1, 4):
        z, c, w = sample_noise(G.cfg, n, seed=n), torch.arange(n) - 1, torch.linspace(0, 2, n)
        near(run(z, c, w), one_pass(G, z, c, w))


@both
def test_reverse_with_w_fixed(tmp_path, format):
    G, z, c = guided(), sample_noise(guided().cfg, 2), torch.tensor([2, -1])
    made, run = written(G, tmp_path, format, w=1.5)
    assert "w (N,)" not in made.signature
    near(run(z, c), one_pass(G, z, c, 1.5))
    assert not torch.allclose(run(z, c), one_pass(G, z, c, 0.0), atol=1e-3)


@pytest.mark.parametrize("kw", [dict(token_states=True), dict(denoise=False), dict(modern=False)])
def test_every_kind_of_reverse_model(tmp_path, kw):
    G = reverse(**kw)
    z, c = sample_noise(G.cfg, 2), torch.tensor([0, 1])
    near(written(G, tmp_path, "torch")[1](z, c), one_pass(G, z, c))


@both
def test_half_weights_are_stored_and_arithmetic_is_not_half(tmp_path, format):
    G = reverse()
    before = {k: v.clone() for k, v in G.state_dict().items()}
    made, run = written(G, tmp_path, format, half=True)
    assert 1e-6 < made.rounding < 0.1 and max(made.differences.values()) < 1e-5
    assert all(torch.equal(v, before[k]) for k, v in G.state_dict().items())
    z, c = sample_noise(G.cfg, 2), torch.tensor([0, 1])
    rounded = reverse()
    with torch.no_grad():
        for p in rounded.parameters():
            p.copy_(p.half().float())
    assert run(z, c).dtype == torch.float32
    near(run(z, c), one_pass(rounded, z, c))
    if format == "torch":
        stored = torch.export.load(str(made.path)).state_dict.values()
        assert {t.dtype for t in stored} == {torch.float16}


@with_onnx
def test_what_an_onnx_file_says(tmp_path):
    import onnx

    wide = TransformerConfig(width=64, num_layers=1, head_dim=16)
    G = build(ReverseModel, replace(guided().cfg, transformer=wide), 0)
    made, _ = written(G, tmp_path, "onnx", half=True)
    model = onnx.load(made.path)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import if not o.domain] == [("", OPSET)]
    axes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in [*model.graph.input, *model.graph.output]
    }
    assert axes == {"z": ["N", 4, 4], "c": ["N"], "w": ["N"], "image": ["N", 1, 4, 4]}
    assert all(v.doc_string for v in [*model.graph.input, *model.graph.output])
    said = {p.key: p.value for p in model.metadata_props}
    ports = {port["name"]: port for port in json.loads(said["inputs"])}
    assert "-1: none" in ports["c"]["meaning"] and ports["c"]["dtype"] == "int64"
    assert "0 (none) to 2" in ports["w"]["meaning"] and "float16" in said["weights"]
    large = [t for t in model.graph.initializer if math.prod(t.dims) > 10_000]
    assert large and {t.data_type for t in large} == {onnx.TensorProto.FLOAT16}
    assert str(export.__file__).encode() not in made.path.read_bytes(), "folders of this machine"


def test_what_a_torch_file_says(tmp_path):
    made, _ = written(flow(), tmp_path, "torch")
    more = {"bitflow.json": ""}
    torch.export.load(str(made.path), extra_files=more)
    said = json.loads(more["bitflow.json"])
    assert said["model"] == "F, data to noise" and said["weights"] == "float32"
    assert [p["name"] for p in json.loads(said["outputs"])] == ["z", "logdet"]
    archive = zipfile.ZipFile(made.path)
    assert not any(export.__file__.encode() in archive.read(name) for name in archive.namelist())


@both
def test_a_file_that_differs_is_not_left(tmp_path, format):
    with pytest.raises(BitflowError, match="differs from PyTorch"):
        export_model(reverse(), tmp_path / "g", format, tolerance=-1.0)
    assert not list(tmp_path.iterdir())


def test_differences_are_found():
    a = [torch.tensor([1.0, -200.0])]
    assert export.largest_difference([a[0] + 2], a) == pytest.approx(0.01)
    assert export.largest_difference([a[0][:1]], a) == float("inf")
    assert export.largest_difference([a[0] * float("nan")], a) == float("inf")


def test_the_model_stays_as_it_is(tmp_path):
    G = reverse().train()
    written(G, tmp_path, "torch")
    assert G.training and all(p.requires_grad for p in G.parameters())


def test_torch_exports_a_model_with_a_dynamic_batch():
    """Nothing in the models looks at values or fixes the number of images."""
    N = torch.export.Dim("N", min=1, max=2**31 - 1)
    F = flow()

    class LogProb(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.F = F

        def forward(self, x, c):
            return self.F.log_prob(x, c)

    x, c = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, -1])
    shapes = ({0: N}, {0: N})
    program = torch.export.export(LogProb(), (x, c), dynamic_shapes=shapes, strict=False)
    with torch.no_grad():
        near(program.module()(x[:2], c[:2]), F.log_prob(x[:2], c[:2]))


def broken(model, value):
    """The same model with one weight of this value."""
    with torch.no_grad():
        model.proj_in.weight[0, 0] = value
    return model


@pytest.mark.parametrize(
    "model, kw, words",
    [
        (flow(), dict(w=1.0), "takes no guidance scale"),
        (reverse(), dict(w=1.0), "takes no guidance scale"),
        (guided(), dict(w=3.0), "from 0 to 2"),
        (reverse(), dict(states=True), "states"),
        (reverse(), dict(format="tflite"), "tflite"),
        (torch.nn.Linear(2, 2), {}, "Linear"),
        (broken(reverse(), 1e6), dict(half=True), "proj_in.weight"),
        (broken(reverse(), float("nan")), {}, "not finite"),
    ],
)
def test_what_is_refused(tmp_path, model, kw, words):
    with pytest.raises(BitflowError, match=words):
        export_model(model, tmp_path / "m", **{"format": "torch", **kw})
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(export.importlib, "import_module", absent)
    with pytest.raises(BitflowError, match=r"onnx is missing.*bitflow_edu\[export\].*torch"):
        export_model(reverse(), tmp_path / "g.onnx")
    assert not list(tmp_path.iterdir())


def test_weights_beyond_one_onnx_file_are_refused():
    with torch.device("meta"):
        large = torch.nn.Linear(2**15, 2**14)
    with pytest.raises(BitflowError, match="2 GiB"):
        export.check_onnx_size(large)
    export.check_onnx_size(large.half())


def test_a_flow_behind_a_logit_is_refused(tmp_path):
    F = TARFlow(replace(flow().cfg, logit_alpha=0.05))
    with pytest.raises(BitflowError, match="logit"):
        export_model(F, tmp_path / "f", "torch")
