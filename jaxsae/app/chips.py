"""What chips do at best: rates that a plan and a run are compared with."""

from typing import Any, NamedTuple


class Chip(NamedTuple):
    """A TPU chip.

    Attributes:
      kind: as JAX names it.
      flops: bfloat16 operations per second.
      memory: bytes.
      bandwidth: bytes per second, of its memory.
      network: bytes per second, of all its links to other chips.
      price: US dollars per hour, on demand in us-central or us-east, in 2025.

    Source: https://cloud.google.com/tpu/docs.
    """

    kind: str
    flops: float
    memory: int
    bandwidth: float
    network: float
    price: float


CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32 << 30, 1228e9, 300e9, 3.22),
    "v5e": Chip("TPU v5 lite", 197e12, 16 << 30, 819e9, 200e9, 1.20),
    "v5p": Chip("TPU v5", 459e12, 95 << 30, 2765e9, 600e9, 4.20),
    "v6e": Chip("TPU v6 lite", 918e12, 32 << 30, 1640e9, 448e9, 2.70),
}
# bfloat16, without sparsity, of NVIDIA's data sheets.
_GPUS = {"NVIDIA A100": 312e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}


def peak_flops(device: Any) -> float | None:
    """The bfloat16 operations per second of a device at best; None if they are not known, as for CPUs.

    Args:
      device: of `jax.devices()`.

    Example:
      >>> import jax
      >>> peak_flops(jax.devices("cpu")[0]) is None
      True
    """
    kind = device.device_kind
    known = {chip.kind: chip.flops for chip in CHIPS.values()}
    return known.get(kind) or next((flops for name, flops in _GPUS.items() if kind.startswith(name)), None)
