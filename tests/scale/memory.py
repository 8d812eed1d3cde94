"""Host memory of publishing one SAE beyond what the process holds at rest, in slabs.

python -m tests.scale.memory --latents 524288 --width 1024
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from producer.common.formatting import format_bytes
from trainer.parallel.ranks import ALONE
from trainer.saes import registry
from trainer.saes.folding import InputTransform
from trainer.saes.settings import SaeSettings
from trainer.saes.writing import SIZE_LIMITS, SaeFiles
from trainer.snapshot import WEIGHTS

SELFTEST_CANDIDATES = 1024


@dataclass(frozen=True)
class PublishingMemory:
    """Sizes in bytes."""

    latents: int
    width: int
    file: int
    resting: int
    peak: int
    slab: int
    seconds: float

    @property
    def slabs(self) -> float:
        """The peak above resting."""
        return (self.peak - self.resting) / self.slab


def measure(latents: int, width: int, folder: Path) -> PublishingMemory:
    """Publishes a TopK SAE of random weights into `folder` and watches the process."""
    settings = SaeSettings.of(name="s", architecture="topk", d_sae=latents, k=32)
    generator = torch.Generator().manual_seed(0)
    sae = registry.get("topk")(settings, (width,), None, ALONE)
    for name in ("W_enc", "W_dec"):
        sae.parameters[name].normal_(generator=generator)
    ones = torch.ones(width)
    files = SaeFiles(sae, InputTransform(ones, ones), torch.full((latents,), 0.01), {})
    x = torch.randn(SELFTEST_CANDIDATES, width, generator=generator)
    resting = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    begin = time.monotonic()
    files.write(folder / "s", x)
    seconds = time.monotonic() - begin
    slab = min(latents, SIZE_LIMITS.slab_latents) * width * 4
    size = (folder / "s" / WEIGHTS).stat().st_size
    return PublishingMemory(latents, width, size, resting, _status("VmHWM"), slab, seconds)


def _status(key: str) -> int:
    """A number of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=65_536)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.latents, options.width, Path(folder))
    if options.json:
        print(json.dumps(asdict(result) | {"slabs": result.slabs}))
        return
    print(
        f"{result.latents:,} latents, d {result.width}: a file of {format_bytes(result.file)}, {result.seconds:.0f} s; "
        f"resting {format_bytes(result.resting)}, peak {format_bytes(result.peak)}, "
        f"that is {result.slabs:.2f} slabs of {format_bytes(result.slab)} above"
    )


if __name__ == "__main__":
    main()
