"""A command line for models made of parts, based on Lightning's: :func:`run_command_line`.

It needs the extra `examples`.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import numpy as np
import torch
import yaml
from jsonargparse import ActionConfigFile
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure

import uncertainty_mm
from uncertainty_mm import _bfloat16, plots
from uncertainty_mm._files import replacing
from uncertainty_mm.calibration import expected_threshold
from uncertainty_mm.lightning.callbacks import DeterministicDropout, FiniteGuard, History
from uncertainty_mm.lightning.checkpoints import (
    MovableCheckpoint,
    Patience,
    UsageError,
    WholeCheckpointIO,
    read_checkpoint,
)
from uncertainty_mm.lightning.data import MultimodalDataModule
from uncertainty_mm.lightning.module import MultilabelModule
from uncertainty_mm.lightning.predictions import PredictionWriter
from uncertainty_mm.metrics.functional import evaluate

SUBCOMMANDS = ("fit", "validate", "test", "predict")
# options that config.yaml leaves out
_OF_ONE_CALL = ("config", "ckpt_path", "output", "brief", "weights_only")
# options that a resumed run must have in common, in addition to the model, to be bit-identical
_OF_A_TRAINING = (
    "seed_everything",
    "data.batch_size",
    "data.drop_modality",
    "data.corrupt_modality",
    "data.max_train_samples",
    "trainer.precision",
    "trainer.accumulate_grad_batches",
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
)


class Parser(LightningArgumentParser):
    """Reports an error in the options in one line; --help lists all options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with exit code 2."""
        raise UsageError(f"{' '.join(str(message).split())} (see --help)")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with exit code 2 and one line if an option or a file cannot be used, or a disk is full."""
    try:
        yield
    except (UsageError, OSError, MisconfigurationException) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def _as_usage_errors() -> Iterator[None]:
    """Reports errors of constructors and readers as errors in the command."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(" ".join(str(error).split())) from error


def options_of(part: Callable[..., Any], fixed: Sequence[str] = ()) -> set[str]:
    """Names of the parameters of a part that users may set: those with a default that the model does not set."""
    parameters = inspect.signature(part).parameters.values()
    named = {each.name for each in parameters if each.default is not each.empty}
    return named - {"validate_args", "process_group", *fixed}


class _RunFolder(Callback):
    """Claims the folder of a run when the training starts, after everything that may fail before it."""

    def __init__(self, claim: Callable[[], Path]) -> None:
        self.claim = claim

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        claimed = self.claim() if trainer.is_global_zero else None
        folder: Any = trainer.strategy.broadcast(claimed)
        for each in trainer.callbacks:  # type: ignore[attr-defined] # set by a connector
            if isinstance(each, MovableCheckpoint):
                each.dirpath = str(folder)
            if isinstance(each, History):
                each.path = folder / "metrics.csv"


class ModelCLI(LightningCLI):
    """`LightningCLI` for a :class:`~uncertainty_mm.lightning.MultilabelModule` made of parts.

    The parts of the model (`model_class.parts`) have their options under their own names, `--model.fusion.dropout`.
    Sizes come from the data. `--config` takes files, and names of files in `configs`. An error in an option is reported
    in one line.
    """

    def __init__(
        self, model_class: type[MultilabelModule], configs: Path, arguments: list[str]
    ) -> None:
        self.kind = model_class
        self.configs = configs
        self.chosen = arguments[:1] if arguments[:1] and arguments[0] in SUBCOMMANDS else []
        self.folder: Path | None = None
        program, given = Path(sys.argv[0]).name, "[--config NAME | FILE] [options]"
        super().__init__(
            model_class,
            MultimodalDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={
                "description": f"{(inspect.getdoc(model_class) or '').splitlines()[0]} Without a subcommand: train "
                "and test. Subcommands, each with its --help: fit, validate, test, predict.",
                "allow_abbrev": False,
                "usage": f"{program} [fit | validate | test | predict] {given}",
                **{
                    name: {"allow_abbrev": False, "usage": f"{program} {name} {given}"}
                    for name in self.chosen
                },
            },
            args=arguments,
            run=bool(self.chosen),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # hyper-parameters are plain values
            trainer_defaults={
                "devices": 1,
                "max_epochs": 30,
                "gradient_clip_val": 1.0,
                "logger": False,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 1_000_000,  # once per epoch, so that the host does not wait
                "enable_model_summary": False,
                "use_distributed_sampler": False,  # the data module divides the samples
            },
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] # static there
        """Only the subcommand that was called, because making a parser takes time."""
        return {name: LightningCLI.subcommands()[name] for name in self.chosen}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose `--config` also takes the names of the bundled files."""
        configs = self.configs

        class NamedConfig(ActionConfigFile):
            @staticmethod
            def apply_config(parser: Any, cfg: Any, dest: str, value: Any) -> None:
                named = configs / f"{value}.yaml"
                path = str(named) if named.is_file() else value
                if not (Path(str(path)).is_file() or "\n" in str(path) or "{" in str(path)):
                    raise TypeError(
                        f"{value}: neither a file nor one of {', '.join(names_in(configs))}"
                    )
                ActionConfigFile.apply_config(parser, cfg, dest, path)

        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=NamedConfig,
            help=f"options from a file, or one of {', '.join(names_in(configs))}",
        )
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options of trainer, model, parts and data."""
        parser.add_lightning_class_args(L.Trainer, "trainer")
        parser.set_defaults({f"trainer.{name}": x for name, x in self.trainer_defaults.items()})
        model = self.kind
        sizes = ("modality_dims", "max_steps", "label_names", "num_train_samples")
        parser.add_class_arguments(model, "model", skip={*model.parts}, fail_untyped=False)
        parser.add_lightning_class_args(MultimodalDataModule, "data")
        parser.link_arguments("seed_everything", "data.seed")
        for name in sizes:
            if name in inspect.signature(model).parameters:
                parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        for name, part in model.parts.items():
            given = options_of(part, model.fixed.get(name, ()))
            every = inspect.signature(part).parameters.keys()
            parser.add_class_arguments(
                part, f"model.{name}", skip=every - given, instantiate=False, fail_untyped=False
            )
            defaults = model.defaults.get(name, {})
            parser.set_defaults(
                {f"model.{name}.{key}": x for key, x in defaults.items() if key in given}
            )
            if "max_batch_size" in given:
                # so that processes do not have to agree on it at every step
                parser.link_arguments("data.batch_size", f"model.{name}.max_batch_size")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks and the files of a run."""
        parser.add_lightning_class_args(Patience, "early_stopping")
        parser.set_defaults(
            {
                "early_stopping.monitor": "val/nll",
                "early_stopping.patience": 6,
            }
        )
        parser.add_lightning_class_args(FiniteGuard, "finite_guard")
        parser.add_argument(
            "--output",
            type=str | None,
            help="what is written: the folder of a run, which must not exist (default: runs/DATA-TIME); "
            "the file of `predict`, .csv or .npz (default: predictions.csv)",
        )
        if parser is self.parser:  # without a subcommand
            parser.add_argument("--ckpt_path", type=str | None, help="resume from this checkpoint")
            parser.add_argument(
                "--brief",
                type=bool,
                default=False,
                help="leave out the test by modality and the figure of the training",
            )

    def _set_seed(self) -> None:
        with _as_usage_errors():
            super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Takes no options from a checkpoint, because a resumed run reads them from its own config.yaml."""

    @property
    def options(self) -> Any:
        """The options of the subcommand, or of the program without one."""
        return self.config if self.subcommand is None else self.config[self.subcommand]

    @property
    def trains(self) -> bool:
        """Whether this is a training run."""
        return self.subcommand in (None, "fit")

    def instantiate_classes(self) -> None:
        """Makes data, model and trainer; parts of the model get their options as plain dicts."""
        self.given = self.config
        self.config = self.given.clone()
        options = self.options
        for name in self.kind.parts:
            given = options.model.get(name)  # None: the part has no options
            options.model[name] = {} if given is None else given.as_dict()
        checkpoint = options.ckpt_path
        if self.trains and not (options.trainer.max_epochs or 0) >= 1:
            raise UsageError(
                f"trainer.max_epochs must be at least 1, got {options.trainer.max_epochs}"
            )
        if not self.trains:
            for option, value in (("ckpt_path", checkpoint), ("data.path", options.data.path)):
                if value is None:
                    raise UsageError(f"{self.subcommand}: --{option} is needed")
        if checkpoint is not None:
            saved = read_checkpoint(checkpoint)["hyper_parameters"]
            if not self.trains and options.data.label_names is None:
                options.data.label_names = saved["label_names"]
        with _as_usage_errors():
            super().instantiate_classes()
            if checkpoint is not None and self.trains:
                self._check_resumable(Path(checkpoint))
            elif checkpoint is not None:
                self.model = self.kind.load(checkpoint)
                check_fits(self.datamodule, self.model.hparams)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Makes the trainer with all callbacks and plugins of a run."""
        options = self.options
        callbacks: list[Callback] = [DeterministicDropout()]
        if self.trains and not options.trainer.fast_dev_run:
            self._check_output()
            resumed = None if options.ckpt_path is None else Path(options.ckpt_path).parent
            self.folder = resumed  # a new one is claimed when the training starts
            callbacks += [
                _RunFolder(self._claim_folder),
                History(None if resumed is None else resumed / "metrics.csv"),
                MovableCheckpoint(
                    resumed,
                    "best",
                    monitor="val/chosen",
                    mode="max",  # a later step was chosen
                    enable_version_counter=False,
                ),
                MovableCheckpoint(
                    resumed, "last", save_on_train_epoch_end=True, enable_version_counter=False
                ),
            ]
        if self.subcommand == "predict":
            path = output_file(options)
            if not options.trainer.fast_dev_run:
                callbacks.append(PredictionWriter(path, self.kind.axes))
        if options.trainer.enable_progress_bar is not False:
            callbacks.append(TQDMProgressBar(refresh_rate=5))
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        config["callbacks"] = [*(config["callbacks"] or []), *callbacks]
        plugins = config["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        config["plugins"] = [*plugins, WholeCheckpointIO()]
        extra = [self._get(self.config_init, key) for key in ("early_stopping", "finite_guard")]
        trainer = self._instantiate_trainer(config, extra)
        half = trainer.precision.startswith("bf16") and isinstance(
            trainer.accelerator, CPUAccelerator
        )
        if half and not _bfloat16.is_native_or_warns():
            trainer.strategy.precision_plugin = Precision()
        if self.subcommand in ("test", "predict") and trainer.world_size > 1:
            raise UsageError(f"{self.subcommand}: --trainer.devices must be 1")
        return trainer

    def _check_output(self) -> None:
        """Raises UsageError if the folder given by --output cannot be used for this run."""
        output, checkpoint = self.options.output, self.options.ckpt_path
        if output is None:
            return
        if (
            checkpoint is None
            and not int(os.environ.get("LOCAL_RANK", 0))
            and Path(output).exists()
        ):
            last = Path(output) / "last.ckpt"
            hint = f"; to resume it, --ckpt_path {last}" if last.exists() else ""
            raise UsageError(
                f"--output {output}: exists already; a run never writes over another{hint}"
            )
        if checkpoint is not None and Path(output).resolve() != Path(checkpoint).parent.resolve():
            folder = Path(checkpoint).parent
            raise UsageError(f"--output {output}: a run resumes where its checkpoint is, {folder}")

    def _claim_folder(self) -> Path:
        """The folder of a run: that of the checkpoint to resume, or a new one."""
        if self.folder is not None:
            return self.folder
        output = self.options.output
        name = Path("runs") / f"{self.datamodule.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = name if output is None else Path(output)
        try:
            for attempt in count(1):
                try:
                    folder.mkdir(parents=True)
                    break
                except FileExistsError:
                    if output is not None:
                        raise
                    folder = name.with_name(f"{name.name}-{attempt}")
            write_text(folder / "config.yaml", self._saved_options())
            write_text(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"{folder}: cannot write there ({error.strerror})") from error
        self.folder = folder
        return folder

    def _saved_options(self) -> str:
        """All options as YAML, for `--config`."""
        given = self.given if self.subcommand is None else self.given[self.subcommand]
        text = self._parser(self.subcommand).dump(given, skip_none=False, skip_link_targets=True)
        options = yaml.safe_load(text)
        kept = {key: x for key, x in options.items() if key not in _OF_ONE_CALL}
        return str(yaml.safe_dump(kept, sort_keys=False))

    def _check_resumable(self, path: Path) -> None:
        """Raises UsageError unless the checkpoint belongs to the same training and something is left to do.

        For a run that ended between its last epoch and metrics.json, its last file, the evaluation is left.
        """
        checkpoint = read_checkpoint(path)
        if "epoch" not in checkpoint or "optimizer_states" not in checkpoint:
            raise UsageError(f"{path}: cannot resume, it has no state of a training")
        check_fits(self.datamodule, checkpoint["hyper_parameters"])
        before: dict[str, Any] = {}
        now: dict[str, Any] = {}
        config = path.with_name("config.yaml")
        if config.is_file():
            was, given = (
                _flat(yaml.safe_load(text)) for text in (config.read_text(), self._saved_options())
            )
            before |= {name: was[name] for name in _OF_A_TRAINING if name in was}
            now |= {name: given[name] for name in _OF_A_TRAINING if name in was}
        before |= _flat({"model": checkpoint["hyper_parameters"]})
        now |= _flat({"model": dict(self.model.hparams)})
        for name in before | now:
            # tuples are read from config.yaml as lists
            if json.dumps(before.get(name)) != json.dumps(now.get(name)):
                raise UsageError(
                    f"{path}: cannot resume, `{name}` is {now.get(name)} now and was {before.get(name)}"
                )
        done, epochs = checkpoint["epoch"] + 1, self.options.trainer.max_epochs
        complete = self.subcommand == "fit" or (path.parent / "metrics.json").exists()
        if done > epochs or (done == epochs and complete):
            raise UsageError(f"{path}: {done} epochs are done, trainer.max_epochs is {epochs}")
        stopped = any(x.get("stopped_epoch") for x in checkpoint.get("callbacks", {}).values())
        if stopped and complete:
            raise UsageError(f"{path}: stopped early after {done} epochs, nothing is left to do")

    def train_and_test(self) -> dict[str, Any]:
        """Trains, selects the checkpoint on the validation split, and evaluates it once on the test split."""
        start, options = time.perf_counter(), self.options
        data, trainer = self.datamodule, self.trainer
        for split in ("train", "validation", "test"):
            data.part(split)
        if trainer.is_global_zero:
            sizes = " + ".join(f"{len(part)} {split}" for split, part in data.parts.items())
            print(f"{data.name}: {sizes}; for training\n{data.part('train').summary()}", flush=True)
        trainer.fit(self.model, data, ckpt_path=options.ckpt_path)
        trainer.strategy.barrier()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # only the first process continues
        if not trainer.is_global_zero:
            return {}
        best = self.model
        if self.folder is not None:
            best = self.kind.load(self._callback(MovableCheckpoint).best_model_path)
        tester = L.Trainer(
            accelerator=options.trainer.accelerator,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            fast_dev_run=options.trainer.fast_dev_run,
            callbacks=[FiniteGuard()],
        )
        tester.validate(best, data, verbose=False)
        results: dict[str, Any] = {
            "data": data.name,
            "seed": options.seed_everything,
            "epochs": trainer.current_epoch,
            "skipped_batches": self._callback(FiniteGuard).skipped,
            "parameters": sum(parameter.numel() for parameter in best.parameters()),
            "threshold": [round(value, 2) for value in best.threshold.tolist()],
            **best.results,
        }
        best.by_modality = not options.brief
        tester.test(best, data, verbose=False)
        results |= best.results
        if data.bayes and not options.trainer.fast_dev_run:  # the best possible result
            per_label = best.hparams["thresholds"] == "label"
            threshold = expected_threshold(data.bayes["validation"], per_label=per_label)
            results["Bayes"] = evaluate(data.bayes["test"], data.part("test").labels, threshold)
        print_results(results)
        if self.folder is not None:
            self._write_results(results, best)
        results["seconds"] = round(time.perf_counter() - start, 1)
        print(
            f"\ncalibration and threshold {results['threshold']} from validation, {results['epochs']} epochs, "
            f"{results['seconds']:.0f} s, seed {results['seed']}"
        )
        if self.folder is not None:
            # the last file, whose presence marks a complete run
            write_text(self.folder / "metrics.json", json.dumps(results, indent=2) + "\n")
            print(
                f"{self.folder}/: {', '.join(sorted(path.name for path in self.folder.iterdir()))}"
            )
        return results

    def _write_results(self, results: dict[str, Any], best: MultilabelModule) -> None:
        """Writes the predictions of the test split, and a figure of the training unless the run is brief."""
        assert self.folder is not None
        test = self.datamodule.part("test")
        answers = {key: x for key, x in best.answers.items() if key not in ("labels", "unknown")}
        PredictionWriter(self.folder / "predictions.npz").write(answers, test, best.threshold)
        if self.options.brief:
            return
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        losses, scores, reliability = figure.subplots(1, 3)
        plots.training_curves(self._callback(History).rows, ax=[losses, scores])
        known = ~best.answers["unknown"]
        probs, labels = (x[known].unsqueeze(1) for x in (answers["probs"], best.answers["labels"]))
        plots.reliability_diagram(probs, labels, ["all labels, test split"], ax=[reliability])
        with replacing(self.folder / "training.png") as partial:
            figure.savefig(partial, dpi=120)

    def _callback(self, kind: type[Any]) -> Any:
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined] # set by a connector
        return next(each for each in callbacks if isinstance(each, kind))

    def after_validate(self) -> None:
        """Prints the table."""
        print_results(self.model.results)

    def after_test(self) -> None:
        """Prints the tables."""
        print_results(self.model.results)

    def after_predict(self) -> None:
        """Reports the file that was written."""
        if self.options.trainer.fast_dev_run:
            return
        thresholds = [round(value, 2) for value in self.model.threshold.tolist()]
        loader: Any = self.trainer.predict_dataloaders
        count = len(loader.dataset)
        print(
            f"{count} samples, thresholds {thresholds}: {self.options.output or 'predictions.csv'}"
        )


def output_file(options: Any) -> Path:
    """The file of `predict`, which must not exist, since nothing is overwritten."""
    path = Path(options.output or "predictions.csv")
    if path.suffix not in (".csv", ".npz"):
        raise UsageError(f"{path}: --output must end in .csv or .npz")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: --output must be a file in a folder that exists")
    if path.is_file() or path.is_dir() or path.is_symlink():
        raise UsageError(f"{path}: exists already; name another file by --output")
    if (
        options.data.path is not None
        and Path(options.data.path).resolve() in path.resolve().parents
    ):
        raise UsageError(f"{path}: --output would lie within the data")
    return path


def check_fits(data: MultimodalDataModule, hparams: Mapping[str, Any]) -> None:
    """Raises UsageError unless a model of these sizes can read the data; the order of names matters."""
    for what, wanted, received in (
        ("modalities and feature sizes", hparams["modality_dims"], data.modality_dims),
        ("labels", hparams["label_names"], data.label_names),
    ):
        if list(wanted) != list(received) or wanted != received:
            raise UsageError(
                f"{data.name}: {what} {received} are not those of the checkpoint, {wanted}"
            )
    for name, steps in hparams["max_steps"].items():
        for split, part in data.parts.items():
            if not part.padding_mask[name][:, steps:].all():  # only padding may be cut
                raise UsageError(
                    f"{data.name}: modality `{name}` has {part.steps[name]} steps in the {split} split, "
                    f"the checkpoint knows {steps}; cut longer sequences"
                )
            part.features[name] = part.features[name][:, :steps]
            part.padding_mask[name] = part.padding_mask[name][:, :steps]


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their names on the command line, `model.fusion.dropout`."""
    flat: dict[str, Any] = {}
    for name, x in options.items():
        flat |= _flat(x, f"{prefix}{name}.") if isinstance(x, Mapping) else {prefix + name: x}
    return flat


def names_in(configs: Path) -> list[str]:
    """Names of the bundled files of options."""
    return sorted(
        str(path.relative_to(configs).with_suffix("")) for path in configs.rglob("*.yaml")
    )


def environment() -> dict[str, Any]:
    """Versions and hardware of a run."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **{each.__name__: each.__version__ for each in (uncertainty_mm, torch, np, L)},
    }


def write_text(path: Path, text: str) -> None:
    """Writes a file completely or not at all."""
    with replacing(path) as partial:
        partial.write_text(text)


def print_results(results: Mapping[str, Any]) -> None:
    """Prints the tables of a validation, a test or a run."""
    rows = ("validation", "test", "uncalibrated", "Bayes")
    print_table({row: results[row] for row in rows if row in results})
    if "modalities" in results:
        print(
            "\ntest split, by the modalities that are there; uncertainty is the predictive entropy in nats"
        )
        print_table(results["modalities"], ("Acc", "miF1", "mAP", "Brier", "ECE", "uncertainty"))


def print_table(
    rows: Mapping[str, Mapping[str, float | None]], columns: Sequence[str] = ()
) -> None:
    """Prints a table with one column per measure."""
    columns = columns or list(next(iter(rows.values())))
    width = max(map(len, rows))
    widths = [max(8, len(column) + 2) for column in columns]
    cells = {"": list(columns)}
    for row, measures in rows.items():
        numbers = [measures[column] for column in columns]
        cells[row] = ["-" if x is None else f"{x:.3f}" for x in numbers]
    print()
    for row, texts in cells.items():
        line = "".join(f"{text:>{space}}" for text, space in zip(texts, widths, strict=True))
        print(f"{row:>{width}}{line}")


def quiet() -> None:
    """Silences Lightning's advice on workers and devices."""
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)


def run_command_line(
    model_class: type[MultilabelModule], configs: Path, arguments: Sequence[str] | None = None
) -> ModelCLI:
    """Runs a subcommand, or without one trains and tests.

    A resumed run starts from the options of its own config.yaml, and a run on the built-in data from the config
    `small`; options on the command line override both.

    Args:
        model_class: The model.
        configs: Folder with files of options, which `--config` takes by name.
        arguments: The command line; None for that of the program.
    """
    quiet()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    subcommand = [arguments.pop(0)] if arguments[:1] and arguments[0] in SUBCOMMANDS else []
    with one_line_errors():
        if subcommand in ([], ["fit"]):
            arguments = [*_configs_before(arguments), *arguments]
        cli = ModelCLI(model_class, configs, [*subcommand, *arguments])
        if not subcommand:
            cli.train_and_test()
    return cli


def _configs_before(arguments: Sequence[str]) -> list[str]:
    """Arguments for the file of options from which a resumed run, or one on the built-in data, starts."""
    given = {}
    for name, following in zip(arguments, [*arguments[1:], ""], strict=False):
        option, equals, value = name.partition("=")
        given[option] = value if equals else following
    if "--ckpt_path" in given:
        saved = Path(given["--ckpt_path"]).with_name("config.yaml")
        return ["--config", str(saved)] if saved.is_file() else []
    chosen = {"-c", "--config", "--data", "--data.path", "-h", "--help"} & given.keys()
    return [] if chosen else ["--config", "small"]
