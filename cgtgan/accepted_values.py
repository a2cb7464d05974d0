"""What a setting accepts: a check, and how a field of `config.py` carries it. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field
from typing import Any

from cgtgan.errors import InputError

Check = tuple[str, Callable[[Any], bool]]  # the accepted values in words, and whether a value is one of them


def setting(default: Any, check: Check) -> Any:
    """A dataclass field with its check. null is not checked: whether it is allowed is in the type."""
    return field(default=default, metadata={"check": check})


def one_of(*options: str) -> Check:
    return "one of " + ", ".join(options), lambda v: v in options


def is_device(value: str) -> bool:
    """Raises `InputError` for Apple's `mps`, which names no wrong value but a device that is not supported."""
    if value.partition(":")[0] == "mps":
        raise InputError(f"device={value} is refused: its numbers were never compared with the CPU's; set device=cpu")
    return value in ("auto", "cpu", "cuda") or (value.startswith("cuda:") and value[5:].isdigit())


def is_web_address(value: str) -> bool:
    return value.startswith(("http://", "https://"))


def is_temperature(value: Any) -> bool:
    several = value if isinstance(value, list) and value else [value]
    return all(isinstance(t, int | float) and not isinstance(t, bool) and 0 < t < math.inf for t in several)


POSITIVE: Check = ("a number above 0", lambda v: v > 0)
NOT_NEGATIVE: Check = ("0 or more", lambda v: v >= 0)
AT_LEAST_1: Check = ("1 or more", lambda v: v >= 1)
AT_LEAST_2: Check = ("2 or more", lambda v: v >= 2)
SHARE: Check = ("between 0 and 1", lambda v: 0 <= v <= 1)
# pretrained: the language model's own; corpus: byte-level BPE trained on the corpus; folder: vocab.json and merges.txt
TOKENIZER: Check = ("pretrained, corpus or a folder", bool)
# bf16 is autocast. auto: bf16 on a GPU that has it, else float32; native: bf16 on a CPU that has it too
PRECISION = one_of("auto", "native", "float32", "bf16")
