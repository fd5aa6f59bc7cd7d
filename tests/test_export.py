"""The page on serving and the example's model: torch.export and ONNX answer as torch does."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from cases import CASES, SMALL, Sizes, flattened, properties_of
from examples_support import need_extras
from pages import DOCS, blocks
from support import NO_EXPORT_OF_ANY_BATCH, TORCH_2_6, all_close, close
from uncertainty_mm import functional

pytestmark = pytest.mark.skipif(TORCH_2_6, reason=NO_EXPORT_OF_ANY_BATCH)
PAGE = DOCS / "howto" / "serve.md"
# What torch.onnx says of itself.
QUIET = [
    "ignore:.*The axis name. .* will not be used:UserWarning",
    "ignore:.*LeafSpec.*is deprecated:FutureWarning",
]
SIZES = [(3, 5, 7), (1, 9, 2), (32, 60, 40), (2, 1, 1)]  # batch, steps of text, steps of audio


@pytest.fixture(scope="module")
def page():
    """What the page defines."""
    names = {}
    for _, source in blocks(PAGE, "testcode"):
        exec(source, names)
    return names


def drawn(page, *sizes):
    """Inputs of the page, the first sample without any modality."""
    text, audio, text_padding, audio_padding = page["draw"](*sizes)
    text_padding[0] = audio_padding[0] = True
    return text, audio, text_padding, audio_padding


@pytest.mark.long
@pytest.mark.parametrize("combine", ["concat", "product"])
def test_exported_program_takes_any_sizes(page, combine):
    model = page["Served"]({"text": 8, "audio": 4}, combine=combine).eval()
    program = torch.export.export(model, page["inputs"], dynamic_shapes=page["shapes"]).module()
    for sizes in SIZES:
        inputs = drawn(page, *sizes)
        for actual, expected in zip(program(*inputs), model(*inputs), strict=True):
            close(actual, expected.detach())


@pytest.mark.long
@pytest.mark.parametrize("combine", ["concat", "product"])
@pytest.mark.filterwarnings(*QUIET)
def test_onnx_of_the_page_answers_as_torch(page, combine, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    model = page["Served"]({"text": 8, "audio": 4}, combine=combine).eval()
    names = page | {"model": model}
    for _, source in blocks(PAGE, "python"):
        exec(source, names)
    for sizes in SIZES:
        inputs = drawn(page, *sizes)
        for actual, expected in zip(names["serve"](*inputs), model(*inputs), strict=True):
            close(actual, expected.detach())


class Inspected(torch.nn.Module):
    """What the page does not serve: attention weights, and all that can be asked of a Gaussian."""

    def __init__(self):
        super().__init__()
        self.attention = CASES["EmotionQueryAttention"].build()
        self.decoupler = CASES["GaussianDecoupler"].build(normalize_mean=True)
        self.typicality = CASES["Typicality"].build()

    def forward(self, voice, face, voice_mask, face_mask):
        features = {"voice": voice, "face": face}
        padding_mask = {"voice": voice_mask, "face": face_mask}
        z, weights = self.attention(features, padding_mask, need_weights=True)
        missing = self.attention.missing(features, padding_mask)
        latent = self.decoupler(z, missing)
        embedding = functional.distribution_embedding(*latent)
        factor = self.typicality(features, padding_mask)
        grown = factor, latent.inflated(factor)
        return flattened([weights, latent, embedding, grown, properties_of(latent, missing)])


@pytest.mark.long
@pytest.mark.filterwarnings(*QUIET)
def test_onnx_of_what_else_is_asked_of_a_prediction(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, path = Inspected().eval(), tmp_path / "model.onnx"
    case = CASES["EmotionQueryAttention"]
    names = ["voice", "face", "voice_mask", "face_mask"]
    example = tuple(x.detach() for x in tree_leaves(case.inputs(0)))
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch, 1: torch.export.Dim(f"steps_{i % 2}")} for i in range(4))
    torch.onnx.export(
        model,
        example,
        path,
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=names,
        verbose=False,
    )
    session = runtime.InferenceSession(path)
    for sizes in (SMALL, Sizes(batch=1, steps=1), Sizes(batch=9, steps=30)):
        inputs = [x.detach() for x in tree_leaves(case.inputs(1, sizes=sizes))]
        arrays = [x.numpy() for x in inputs]
        outputs = session.run(None, dict(zip(names, arrays, strict=True)))
        wanted = [x.detach() for x in model(*inputs)]
        all_close(list(map(torch.from_numpy, outputs)), wanted, torch.float32)


@pytest.fixture(scope="module")
def lddu():
    """The model of the example, small."""
    need_extras()
    from uncertainty_mm.examples.lddu_full import LDDU

    options = {
        "encoder": {"hidden_dim": 16, "num_layers": 1, "num_heads": 2},
        "attention": {"out_dim": 8},
        "decoupler": {"latent_dim": 4},
        "contrastive": {"queue_size": 8},
    }
    steps = {"text": 60, "audio": 60}
    return LDDU({"text": 8, "audio": 4}, steps, ["x", "y", "z"], 10, **options).eval()


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, text, audio, text_padding, audio_padding):
        features = {"text": text, "audio": audio}
        padding = {"text": text_padding, "audio": audio_padding}
        return self.model(features, padding).logits


@pytest.mark.long
def test_model_of_the_example_exports(page, lddu):
    model = Logits(lddu).eval()
    example = tuple(x.nan_to_num() for x in page["inputs"])  # padding is computed, so it is finite
    # the model knows positions for 60 steps
    text, audio = (
        {0: page["batch"], 1: torch.export.Dim(f"{name}_steps", max=60)}
        for name in ("text", "audio")
    )
    shapes = (text, audio, text, audio)
    program = torch.export.export(model, example, dynamic_shapes=shapes).module()
    for sizes in SIZES:
        inputs = [x.nan_to_num() for x in drawn(page, *sizes)]
        close(program(*inputs), model(*inputs).detach())


@pytest.mark.long
@pytest.mark.filterwarnings(*QUIET)
def test_model_of_the_example_goes_to_onnx(page, lddu, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    model = Logits(lddu).eval()
    [(_, source)] = blocks(PAGE, "python")
    example = tuple(x.nan_to_num() for x in page["inputs"])
    names = page | {"model": model, "inputs": example}
    exec(source.replace(', "std_norm"', ""), names)  # it has one output
    for sizes in SIZES:
        inputs = [x.nan_to_num() for x in drawn(page, *sizes)]
        close(names["serve"](*inputs)[0], model(*inputs).detach())
