"""What streaming adds to a forward besides the copies (hooks, views, bookkeeping), as a share of the run. CPU only.

    python -m benchmarks.offload_cpu [--dim 256] [--layers 8] [--side 32] [--repeats 7]

The CPU is both host and device, so a copy is a memcpy in turn; on a GPU it runs during the computation. Copies and
bookkeeping are therefore timed separately. The claim: bookkeeping is below 1 % of a forward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lightx2v.models.dit import DiTConfig, WanDiT
from lightx2v.offload.device_copies import HostCopies, Slot
from lightx2v.offload.weight_streamer import StreamedModule, WeightStreamer


class TimedCopies(HostCopies):
    """Add up the seconds of the copies."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self.bytes = 0.0, 0

    def synchronize(self, mark: object) -> None:
        started = time.perf_counter()
        super().synchronize(mark)
        self.seconds += time.perf_counter() - started

    def load(self, slot: Slot, source: Tensor) -> object:
        self.bytes += len(source)
        return super().load(slot, source)


def median(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--side", type=int, default=32, help="latent height and width; 5 latent frames")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    config = DiTConfig(
        dim=args.dim,
        ffn_dim=args.dim * 27 // 10,
        num_heads=max(1, args.dim // 64),
        num_layers=args.layers,
        text_dim=128,
    )
    torch.manual_seed(0)
    dit = WanDiT(config).eval().requires_grad_(False)
    latents = torch.randn(16, 5, args.side, args.side)
    context = torch.randn(40, 128)

    def forward() -> list[Tensor]:
        with torch.inference_mode():
            return dit(latents, 900.0, [dit.encode_text(context)])

    plain = median(forward, args.repeats)
    expected = forward()[0]
    tokens = 5 * (args.side // 2) ** 2
    print(f"{args.layers} blocks of width {args.dim}, {tokens} tokens; on the device: {plain * 1e3:.1f} ms a forward")
    print(f"{'resident blocks':<16} {'ms':>8} {'copies ms':>10} {'MB copied':>10} {'bookkeeping ms':>15} {'share':>7}")
    for resident in (args.layers, args.layers // 2, 0):
        copies = TimedCopies()
        streamer = WeightStreamer(
            {"dit": StreamedModule(module=dit, blocks=list(dit.blocks))}, copies, torch.device("cpu"), resident=resident
        )

        def streamed(streamer: WeightStreamer = streamer) -> list[Tensor]:
            with streamer.use("dit"):
                return forward()

        inside: list[tuple[float, float, float]] = []
        out = streamed()[0]
        for _ in range(args.repeats):
            copies.seconds, copies.bytes = 0.0, 0
            started = time.perf_counter()
            out = streamed()[0]
            inside.append((time.perf_counter() - started, copies.seconds, copies.bytes))
        assert torch.equal(out, expected), "streaming must not change a bit"
        total, copying, size = (statistics.median(column) for column in zip(*inside, strict=True))
        book = bookkeeping(streamer, copies, args.repeats)
        print(
            f"{resident:<16} {total * 1e3:>8.1f} {copying * 1e3:>10.2f} {size / 1e6:>10.1f} {book * 1e3:>15.3f} "
            f"{book / plain:>7.2%}"
        )
        with streamer.edit():  # the weights come back for the next row
            state = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
        streamer.close()
        dit.load_state_dict(state, assign=True)
        dit.requires_grad_(False)


def bookkeeping(streamer: WeightStreamer, copies: TimedCopies, repeats: int) -> float:
    """Seconds of one forward's hooks without the copies and without the computation."""

    def visits() -> None:
        with streamer.use("dit"):
            for index in range(streamer.blocks):
                streamer.before("dit", index)
                streamer.after("dit", index)

    visits()
    times = []
    for _ in range(4 * repeats):
        copies.seconds = 0.0
        started = time.perf_counter()
        visits()
        times.append(time.perf_counter() - started - copies.seconds)
    return statistics.median(times)


if __name__ == "__main__":
    main()
