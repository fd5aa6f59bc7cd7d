"""Ablation of LDDU, row by row as in Table 3 of the paper (arXiv 2502.13954).

    python examples/lddu_ablation.py --data FILE --seeds 0 1 2               # the paper's model, less one part a row
    python examples/lddu_ablation.py --data FILE --seeds 0 1 2 --model ours --output runs/ours  # with our defaults
    python examples/lddu_ablation.py --data FILE --arms full "(4) w/o queue" # some rows

Every row is a run of `lddu_full.py` for several seeds; what is finished is not repeated, and a failing row does not
stop the others (`sweep.py`). It writes every run (`runs.json`, `runs.csv`), and mean and standard deviation over seeds
beside the paper's figures (`ablation.md`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

try:
    from . import lddu_full
    from .sweep import Row, Run, add_arguments, check_arguments, sweep, table
except ImportError:  # run as a script
    import lddu_full  # type: ignore[no-redef]
    from sweep import Row, Run, add_arguments, check_arguments, sweep, table  # type: ignore[no-redef]

WITHOUT_QUERIES = "(1) w/o label queries"


class Ablation(NamedTuple):
    """A row of Table 3."""

    options: str  # what it changes, as options of lddu_full.py
    paper: str = "-"  # micro F1 that the paper gives for CMU-MOSEI, aligned


# The paper calls row 5 "w/o variance mu" and row 6 "w/o center sigma"; here the words hold, not the symbols. It has two
# rows (12). Rows 8 to 10 have 0.581, 0.584 and a value between, in an order that we do not know.
ARMS: dict[str, Ablation] = {
    "full": Ablation("", "0.587"),
    WITHOUT_QUERIES: Ablation(""),
    "(2) w/o L_dir": Ablation("--dir-weight 0"),
    "(3) w/o L_scl": Ablation("--scl-weight 0"),
    "(4) w/o queue": Ablation("--queue-size 0", "0.578"),
    "(5) w/o variance in L_scl": Ablation("--embedding mean"),
    "(6) w/o center in L_scl": Ablation("--embedding std"),
    "(7) w/o L_ocl": Ablation("--ocl-weight 0", "0.580"),
    "(8) only Corr(S,R)": Ablation("--pairs SR", "0.581 to 0.584"),
    "(9) only Corr(D,R)": Ablation("--pairs DR", "0.581 to 0.584"),
    "(10) only Corr(D,S)": Ablation("--pairs DS", "0.581 to 0.584"),
    "(11) w/o mean branch": Ablation("--gate std"),
    "(12) w/o std branch": Ablation("--gate mean"),
}
MODELS = {
    "paper": "--size within --combine concat --embedding both --anchors present --ordinality raw --pairs SR+DR "
    "--targets sample --ocl-weight 0.1 --scl-weight 0.8 "
    "--modality-weight 0 --kl-weight 0 --std-branch shapes",
    "ours": "",
}
COLUMNS = ("Acc", "P", "R", "miF1", "mAP", "Brier", "ECE", "rho")


class AttentionPooling(nn.Module):
    """Row 1: steps are weighted by an MLP that no label has a say in, and a linear layer answers for all labels.

    It takes the place of :class:`uncertainty_mm.EmotionQueryAttention`, with the same inputs and outputs.
    """

    def __init__(
        self, modality_dims: Mapping[str, int], label_embedding: nn.Embedding, out_dim: int
    ) -> None:
        super().__init__()
        self.label_embedding = label_embedding  # scales and shifts the answers, see LDDU
        size = label_embedding.num_embeddings * out_dim
        self.score = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1))
                for name, dim in modality_dims.items()
            }
        )
        self.answer = nn.ModuleDict(
            {name: nn.Linear(dim, size) for name, dim in modality_dims.items()}
        )

    def missing(self, features: Mapping[str, Tensor], padding_mask: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([padding_mask[name].all(1) for name in self.score], dim=1)

    def forward(self, features: Mapping[str, Tensor], padding_mask: Mapping[str, Tensor]) -> Tensor:
        answers = []
        for name, score in self.score.items():
            x, mask = features[name], padding_mask[name].unsqueeze(2)
            scores = score(x).float().masked_fill(mask, -torch.inf)
            weights = scores.softmax(dim=1).masked_fill(mask, 0)  # 0 / 0 of a missing modality too
            answers.append(self.answer[name]((weights * x).sum(1)))
        shape = (self.label_embedding.num_embeddings, -1)
        return torch.stack(answers, dim=1).unflatten(2, shape)  # (B, M, Q, out_dim)


class WithoutQueries(lddu_full.LDDU):
    """LDDU whose labels do not look for themselves."""

    def __init__(self, modality_dims: Mapping[str, int], *args: Any, **options: Any) -> None:
        super().__init__(modality_dims, *args, **options)
        dims = dict.fromkeys(modality_dims, options["hidden_dim"])
        self.attention = AttentionPooling(
            dims, self.attention.label_embedding, self.attention.out_dim
        )


class LitWithoutQueries(lddu_full.LitLDDU):
    """Trains row 1."""

    network = WithoutQueries


def work(run: Run) -> dict[str, float]:
    """Trains one row with one seed."""
    args = run.args
    options = ["--accelerator cpu", MODELS[args.model], args.options, f"--seed {run.seed}"]
    if args.epochs:
        options.append(f"--epochs {args.epochs}")
    options.append(ARMS[run.arm].options)  # last: what the row is about holds
    where = ["--data", str(run.file), "--output", str(run.folder)]
    arguments = lddu_full.parse(["train", *" ".join(options).split(), *where])
    lit = LitWithoutQueries if run.arm == WITHOUT_QUERIES else lddu_full.LitLDDU
    return lddu_full.train(arguments, lit)["test"]


def report(rows: Sequence[Row]) -> str:
    """Markdown, a table a data set: mean and standard deviation over seeds, and the paper's micro F1."""
    paper = {"paper: miF1": {arm: ablation.paper for arm, ablation in ARMS.items()}}
    lines = []
    for name in dict.fromkeys(row["data"] for row in rows):
        here = [row for row in rows if row["data"] == name]
        lines += [f"{name}:", "", *table(here, COLUMNS, paper), ""]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = lddu_full.Parser(description="Table 3 of the paper on your data.")
    add_arguments(parser, list(ARMS), "runs/ablation")
    parser.add_argument(
        "--model", choices=list(MODELS), default="paper", help="what rows are removed from"
    )
    parser.add_argument("--epochs", type=int, help="default: that of lddu_full.py")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if not args.data:
        parser.error("--data is needed")
    with lddu_full.ending_in_one_line():
        check_arguments(parser, args)
        rows, failed = sweep(work, args.data, args)
        lddu_full.write_text(args.output / "ablation.md", report(rows))
    print(report(rows))
    if failed:
        sys.exit(f"{failed} runs failed")


if __name__ == "__main__":
    main()
