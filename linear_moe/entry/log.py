"""The log of our packages on the screen, and its line about the machine."""

from __future__ import annotations

import logging
import os

from linear_moe.entry.machine import accelerated_parts

logger = logging.getLogger(__name__)
OUR_PACKAGES = ("linear_moe", "megatron_patches")


def show_log(*, megatron_too: bool = False) -> None:
    """Prints the log of our packages once, and not on every rank, whatever logging the script around them sets up.

    Args:
        megatron_too: also print the warnings of Megatron, as plain lines. Only our own entry asks for this: another
            script sets up Megatron's log by itself.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for package in OUR_PACKAGES:
        ours = logging.getLogger(package)
        ours.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
        ours.propagate = False
        ours.handlers = [handler]
    if megatron_too:
        logging.basicConfig(format="%(message)s")
        # This logger warns at every evaluation.
        logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)


def announce() -> None:
    """Logs in one line which accelerated parts were found and which are missing."""
    parts = accelerated_parts()
    found = ", ".join(f"{name} ({detail})" for name, detail in parts.items() if detail)
    missing = ", ".join(name for name, detail in parts.items() if not detail)
    logger.info("found: %s; not found: %s", found or "nothing", missing or "nothing")
