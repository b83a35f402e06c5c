"""super-gradients' logger over an open run: TensorBoard, the run's log, files beside the checkpoints."""

from __future__ import annotations

import json
import numbers
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runmgr.disk import atomic, directory, provenance
from runmgr.errors import InvalidInput
from runmgr.worker import loadable, saving, writing

if TYPE_CHECKING:
    import os

    from torch import nn

    from runmgr.run import Run

_OWN_NAMES = re.compile(
    rf"{re.escape(directory.LATEST_NAME)}|{re.escape(directory.BEST_NAME)}|{re.escape(directory.AVERAGE_NAME)}"
    r"|ckpt_(epoch|step)_\d+\.pth|(run|config)\.json|log_.*|events\.out\.tfevents\..*"
)


class BaseSGLogger:
    """What super-gradients calls `sg_logger`, for an open run: `BaseSGLogger(run)`. Any rank may call; only rank 0 writes.

    Tags of scalars are written as super-gradients writes them, in lower case and with `_` for a space, so that curves of
    old and new runs lie in one chart. A subclass may add a tracking server of its own, as there.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.experiment_name = run.experiment_name
        self.tensorboard_writer = run.tensorboard

    def local_dir(self) -> str:
        """Return the run's directory."""
        return str(self.run.run_dir)

    def add(self, tag: str, obj: Any, global_step: int | None = None) -> None:
        """Add a number, a text or a mapping, each in its own way."""
        if isinstance(obj, str):
            self.add_text(tag, obj, global_step)
        elif isinstance(obj, numbers.Number):
            self.add_scalar(tag, obj, global_step)
        elif isinstance(obj, Mapping):
            self.add_config(tag, obj)
        else:
            raise InvalidInput(f"add({tag!r}) got a {type(obj).__name__}; use the add_… that is made for it")

    def add_config(self, tag: str, config: Any) -> None:
        """Write a configuration to TensorBoard and the log, with secrets masked."""
        if self.run.is_main:
            plain, _masked = provenance.masked(provenance.plain_config(config))
            text = json.dumps(plain, indent=4, ensure_ascii=False)
            self.tensorboard_writer.add_text(tag, f"```json\n{text}\n```")
            self.run.logger.info("%s:\n%s", tag, text)

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int | None = None) -> None:
        """Write one number to TensorBoard."""
        if self.run.is_main:
            ((tag, value),) = saving.plain_metrics({tag: scalar_value}).items()
            self.tensorboard_writer.add_scalar(_tag(tag), value, global_step)

    def add_scalars(self, tag_scalar_dict: Mapping[str, Any], global_step: int | None = None) -> None:
        """Write numbers to TensorBoard, each under its own tag, and as one line to the log."""
        if self.run.is_main:
            values = saving.plain_metrics(tag_scalar_dict)
            for tag, value in values.items():
                self.tensorboard_writer.add_scalar(_tag(tag), value, global_step)
            self.flush()
            shown = ", ".join(f"{tag}: {value:.6g}" for tag, value in values.items())
            self.run.logger.info("%s%s", "" if global_step is None else f"{global_step}: ", shown)

    def add_image(self, tag: str, image: Any, data_format: str = "CHW", global_step: int | None = None) -> None:
        """Write a picture (tensor, array or PIL image, whose format is known) to TensorBoard."""
        if hasattr(image, "getbands"):  # PIL's, without importing it
            import numpy as np

            image = np.asarray(image)
            data_format = "HWC" if image.ndim == 3 else "HW"
        self.tensorboard_writer.add_image(tag, image, global_step, dataformats=data_format)

    def add_images(self, tag: str, images: Any, data_format: str = "NCHW", global_step: int | None = None) -> None:
        """Write pictures of one size to TensorBoard."""
        self.tensorboard_writer.add_images(tag, images, global_step, dataformats=data_format)

    def add_video(self, tag: str, video: Any, global_step: int | None = None) -> None:
        """Write a video (T, C, H, W) or several (N, T, C, H, W) to TensorBoard, which needs the package moviepy."""
        self.tensorboard_writer.add_video(tag, video if video.ndim == 5 else video[None], global_step)

    def add_histogram(self, tag: str, values: Any, bins: str = "auto", global_step: int | None = None) -> None:
        """Write how values are distributed to TensorBoard."""
        self.tensorboard_writer.add_histogram(tag, values, global_step, bins=bins)

    def add_text(self, tag: str, text_string: str, global_step: int | None = None) -> None:
        """Write a text to TensorBoard."""
        self.tensorboard_writer.add_text(tag, text_string, global_step)

    def add_figure(self, tag: str, figure: Any, global_step: int | None = None) -> None:
        """Write a matplotlib figure to TensorBoard."""
        self.tensorboard_writer.add_figure(tag, figure, global_step)

    def add_model_graph(self, tag: str, model: nn.Module, dummy_input: Any) -> None:  # noqa: ARG002  # TensorBoard shows one
        """Write the model's graph to TensorBoard."""
        self.tensorboard_writer.add_graph(model, dummy_input)

    def add_checkpoint(self, tag: str | None, state_dict: Mapping[str, Any], global_step: int | None = None) -> None:
        """Write a file of tensors beside the run's own checkpoints, whole and durable; without a tag `ckpt_<step>.pth`.

        It is not counted, kept or restored with the others: for latest, best and epochs there is `Run.save`.
        """
        if tag is None and global_step is None:
            raise InvalidInput("add_checkpoint() needs a tag or global_step= for the file's name")
        name = str(tag) if tag is not None else f"ckpt_{global_step}"
        path = self._path_beside(name if name.endswith(".pth") else f"{name}.pth")
        if self.run.is_main:
            writing.write_file(loadable.loadable(state_dict, str(tag)), path)
            self.run.logger.info("saved %s", path)

    def add_file(self, file_name: str | os.PathLike[str]) -> None:
        """Copy a file into the run's directory, durably, in the place of one of the same name."""
        source = Path(file_name).absolute()
        path = self._path_beside(source.name)
        if self.run.is_main and source.parent.resolve() != self.run.run_dir.resolve():
            atomic.write_bytes(path, source.read_bytes())

    def upload(self) -> None:
        """Hand everything to the disk; nothing leaves it."""
        self.flush()

    def flush(self) -> None:
        """Hand what was added to the operating system."""
        self.tensorboard_writer.flush()

    def close(self) -> None:
        """Hand what was added to the operating system; the files are closed when the run ends."""
        self.flush()

    def _path_beside(self, name: str) -> Path:
        if _OWN_NAMES.fullmatch(name):
            raise InvalidInput(
                f"{name!r} is one of the run's own names; save checkpoints with Run.save, or take another name"
            )
        return self.run.path(name)


def _tag(tag: str) -> str:
    return tag.lower().replace(" ", "_")
