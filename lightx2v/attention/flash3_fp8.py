"""Flash3Fp8: FlashAttention 3 with products in FP8, for H100 and H200: package `fa3-fwd`. Not exact."""

from dataclasses import dataclass

from torch import Tensor

from . import flash3
from .fp8 import CentredFp8, Fp8
from .fp8_inputs import add_mean, rows_to_fp8, values_to_fp8


@dataclass(frozen=True, slots=True)
class Flash3Fp8:
    """Called like every attention, it makes its FP8 inputs itself. The network makes them in one pass with norm and
    position instead, and calls `attend`."""

    kernel: flash3.Flash3

    def __call__(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        return self.attend(rows_to_fp8(q_BLNH), rows_to_fp8(k_BLNH, centre=True), values_to_fp8(v_BLNH)).to(
            q_BLNH.dtype
        )

    def attend(self, q: Fp8, k: Fp8, v: CentredFp8) -> Tensor:
        """The outputs (B, L, N, H) in the kernel's dtype, bf16."""
        out_BLNH = self.kernel(
            q.values, k.values, v.values, q_descale=q.scale_BN, k_descale=k.scale_BN, v_descale=v.scale_BN
        )
        return add_mean(out_BLNH, v.lacking_BNH)


def load() -> Flash3Fp8:
    return Flash3Fp8(flash3.kernel())
