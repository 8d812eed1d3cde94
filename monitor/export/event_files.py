"""The rows of a run as TensorBoard's event files: a folder for the run and one for each SAE.

TensorBoard draws the tags of its folders over each other: `training/fvu` of all SAEs is one chart. Steps are tokens
trained; the wall time is when it was reported or measured.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from monitor.export.errors import missing_extra
from monitor.export.records import OnProgress, Record, Records

RUN_FOLDER = "run"


def write_tensorboard(records: Records, folder: Path, on_progress: OnProgress) -> list[Path]:
    """Writes folder/run and folder/SAE. Returns `folder`. Raises ExportError where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise missing_extra("TensorBoard", "tensorboard", "tensorboard") from None
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(SummaryWriter(str(folder / _folder_name(name, records.saes))))
            for name in (None, *records.saes)
        }
        for record in records.rows(on_progress):
            for tag, value in scalars(record):
                writers[record.sae].add_scalar(tag, value, record.tokens, record.time)
    return [folder]


def scalars(record: Record) -> list[tuple[str, float]]:
    """(tag, value) of the numbers of a row; text, such as the state of the run, is left out."""
    return [
        (f"{record.table}/{name.replace('.', '/')}", float(value))
        for name, value in record.values.items()
        if not isinstance(value, str)
    ]


def _folder_name(sae: str | None, saes: tuple[str, ...]) -> str:
    """The SAE's own name; the run's folder steps aside where an SAE is called so."""
    if sae is not None:
        return sae
    name = RUN_FOLDER
    while name in saes:
        name += "_"
    return name
