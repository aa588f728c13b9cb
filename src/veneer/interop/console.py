"""Keeps known messages off the console that libraries print when they are imported, and that concern no user."""

from __future__ import annotations

import logging
import re
import sys
import warnings

# DeepSpeed 0.19 calls it under ZeRO; torch 2.13 warns of each process.
_DEPRECATED = (
    "`torch.distributed.all_gather_into_tensor` is deprecated. Please use `torch.distributed.all_gather_single`"
)


def quiet_libraries() -> None:
    """Install a filter for each known message, by its logger and text; call it before the libraries are imported.

    Everything else that they log or warn of is shown.
    """
    for name, shows in _FILTERS.items():
        # The same function twice is one filter: logging compares them.
        logging.getLogger(name).addFilter(shows)
    warnings.filterwarnings("ignore", re.escape(_DEPRECATED), FutureWarning, r"torch\.distributed\.c10d_logger")


def _shows_torchao(record: logging.LogRecord) -> bool:
    # torchao's wheels hold CUDA kernels, which no CPU build of torch can load. With a CUDA build it is news.
    failed = re.match(r"Failed to load \S*/torchao/_C\w*\.\S*so: Could not load this library", record.getMessage())
    torch = sys.modules.get("torch")
    return not failed or torch is None or torch.version.cuda is not None


def _shows_pytree(record: logging.LogRecord) -> bool:
    # torchao 0.18, the newest, registers two Enums in a way that torch 2.13 deprecates.
    known = str(record.msg).startswith("%s is an Enum subclass and is now natively supported by torch.compile")
    of_torchao = isinstance(record.args, tuple) and any(_is_of(a, "torchao") for a in record.args)
    return not (known and of_torchao)


def _is_of(value: object, package: str) -> bool:
    return isinstance(value, type) and value.__module__.split(".")[0] == package


def _shows_bitsandbytes(record: logging.LogRecord) -> bool:
    # An optional package; bitsandbytes has kernels of its own.
    message = record.getMessage()
    return not message.startswith(
        "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'"
    )


def _shows_deepspeed(record: logging.LogRecord) -> bool:
    # If torch finds an accelerator and DeepSpeed does not, the user is to know.
    torch = sys.modules.get("torch")
    known = record.getMessage().startswith("Setting accelerator to CPU. If you have GPU or other accelerator")
    return not known or torch is None or torch.accelerator.is_available()


_FILTERS = {
    "torchao": _shows_torchao,
    "torch.utils._pytree": _shows_pytree,
    "bitsandbytes.backends.cpu.ops": _shows_bitsandbytes,
    "DeepSpeed": _shows_deepspeed,
}
