"""A process that runs checks: reads their names from standard input, and writes lines of JSON to standard output.

    python -m mom_layers.selftest.worker PLAN

Input: {"check": name, "what": "errors" or "times"}, or {"what": "speeds"}. Output: {"line": ...} for every task, then
{"done": true}, with "restart" where the device takes no more work. Whatever else prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from mom_layers.selftest.cases import check_task, time_task
from mom_layers.selftest.plan import Plan


def device_is_well(device: str) -> bool:
    """False where an earlier kernel left the device in an error that every later call meets again."""
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False


def run_check(plan: Plan, checks, name: str, what: str, say) -> None:
    """Runs the tasks of a check, and says the line of each."""
    setting = plan.setting
    for task in checks[name](setting):
        if what == "errors":
            line = check_task(task, setting)
        else:
            from mom_layers.selftest.speed import milliseconds

            line = time_task(task, milliseconds)
        say({"line": line.as_dict()})
        if not device_is_well(setting.device):
            break


def main() -> int:
    # Standard output is the parent's; what compilers and libraries print goes to the log.
    to_parent = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # A container may allow TF32 for PyTorch's own float32 products, which the bounds do not.
    torch.set_float32_matmul_precision("highest")
    plan = Plan.from_json(sys.argv[1])
    checks = plan.checks()

    def say(message: dict) -> None:
        to_parent.write(json.dumps(message) + "\n")

    for words in sys.stdin:
        asked = json.loads(words)
        if asked["what"] == "speeds":
            from mom_layers.selftest.speed import card_speeds

            say({"speeds": card_speeds(plan.setting.dtype)})
        else:
            run_check(plan, checks, asked["check"], asked["what"], say)
        well = device_is_well(plan.device)
        say({"done": True, "restart": not well})
        if not well:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
