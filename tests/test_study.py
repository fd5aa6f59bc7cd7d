"""The study of the uncertainty: what it measures and draws."""

import json

import numpy as np
import pytest
import torch

from examples_support import QUIET, TINY, need_extras, toy
from uncertainty_mm.data import SyntheticMMER, read

need_extras()
from uncertainty_mm.examples import sweep, uncertainty_study  # noqa: E402

pytestmark = QUIET
MEASURES = {
    *("miF1", "mAP", "Brier", "ECE", "ECE before", "AURC", "entropy ~ error", "std ~ error"),
    *("CV of std", "corruption AUROC", "attribution shift"),
}
OF_SYNTHETIC = {
    *(f"corruption AUROC, {name}" for name in ("text", "audio", "vision")),
    *("std ~ noise", "entropy ~ truth", "std ~ truth"),
}


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A study of one arm on synthetic data and on data that lack modalities, labels and have raters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "in_a_process", sweep.carry_out)
        folder = tmp_path_factory.mktemp("study")
        shares = np.random.default_rng(0).random((90, 3)).astype(np.float32)
        unknown = np.random.default_rng(1).random((90, 3)) < 0.1
        toy(folder / "toy.npz", label_shares=shares, unknown=unknown)
        command = ["--sizes", "48", "16", "24", "--data", str(folder / "toy.npz"), "--seeds", "0"]
        command += ["--arms", "default", "--jobs", "1", "--output", str(folder / "out")]
        uncertainty_study.main([*command, "--", *TINY])
        yield folder / "out"


def test_study_measures_and_draws(studied):
    synthetic, other = json.loads((studied / "runs.json").read_text())
    names = {"data", "arm", "seed", "options"}
    assert set(synthetic) == MEASURES | OF_SYNTHETIC | names
    of_other = {"corruption AUROC, a", "corruption AUROC, b", "entropy ~ raters", "std ~ raters"}
    assert set(other) == MEASURES | of_other | names
    for row in (synthetic, other):
        each = [row[key] for key in row if key.startswith("corruption AUROC, ")]
        assert row["corruption AUROC"] == min(each)
    rows = [synthetic, other]
    assert (studied / "study.md").read_text() == sweep.by_data(rows, uncertainty_study.tables)
    drawn = {path.stem for path in studied.glob("*.png")}
    both = {
        f"{name}_{kind}"
        for name in ("synthetic", "toy")
        for kind in ("reliability", "risk_coverage", "attribution")
    }
    assert drawn == both | {"synthetic_noise"}


def test_sizes_are_of_the_modalities_that_are_there(studied):
    folder = studied / "toy" / "default" / "0"
    model = uncertainty_study.LDDU.load(folder / "best.ckpt")
    data = sweep.data_of(folder).part("test")
    said = uncertainty_study.Answers(model, data)
    assert said.missing.any()
    assert torch.equal(said.sizes.isnan(), said.missing)
    alone = said.missing[:, 1]
    torch.testing.assert_close(said.total[alone], said.sizes[alone, 0])
    torch.testing.assert_close(said.total[~alone], said.sizes[~alone].square().mean(1).sqrt())
    known = ~data.unknown
    error = [
        (p - y)[here].abs().mean()
        for p, y, here in zip(said.probs, data.labels, known, strict=True)
    ]
    expected = torch.stack(error).nan_to_num(0)  # of a sample of which nothing is known
    torch.testing.assert_close(uncertainty_study.error_of(said, data), expected)


def test_every_arm_is_a_file_and_no_two_are_alike():
    texts = [path.read_text() for path in (sweep.CONFIGS / "study").glob("*.yaml")]
    assert len(set(texts)) == len(texts) == len(uncertainty_study.ARMS)
    assert next(iter(uncertainty_study.ARMS)) == "default"


def test_synthetic_file_holds_what_is_known(tmp_path):
    uncertainty_study.synthetic_file(tmp_path / "data.npz", (5, 3, 2))
    parts = read(tmp_path / "data.npz")
    assert [len(parts[part]) for part in ("train", "validation", "test")] == [5, 3, 2]
    world = SyntheticMMER()
    samples = world.sample(10, seed=1)
    posterior = world.posterior(samples)
    with np.load(tmp_path / "data.npz") as file:
        assert np.array_equal(file["posterior"], posterior.marginals)
    known = uncertainty_study.truth(tmp_path / "data.npz")
    assert torch.equal(known["noise"], samples.noise[-2:])
    assert torch.equal(known["posterior_entropy"], posterior.entropy[-2:])
    for name, features in samples.features.items():
        joined = torch.cat([part.features[name] for part in parts.values()])
        assert torch.equal(joined, features)
        padding = torch.cat([part.padding_mask[name] for part in parts.values()])
        assert torch.equal(padding, samples.padding_mask[name])
