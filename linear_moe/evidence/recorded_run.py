"""Runs `linear_moe.pretrain`, and writes what it prints of every log interval as a JSON line too.

    python -m linear_moe.evidence.recorded_run HISTORY.jsonl <arguments of linear_moe.pretrain>

A line has the step and, of a log interval, seconds on the training clock, tokens a second, mean loss, and every layer's
load and routing entropy; of a validation, its loss.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import torch

from linear_moe.entry.machine import prepare_machine


def main() -> None:
    history = Path(sys.argv.pop(1))
    prepare_machine()  # before Megatron is imported
    from linear_moe.watching import reporter

    class RecordingReporter(reporter.WholeLineReporter):
        """Writes every printed interval to the history."""

        def print_line(self, settings, call: dict, now: float) -> None:
            interval = self.since_line
            line = {"step": call["iteration"], "seconds": now} | interval.speed(now, settings.world_size)
            line |= {"loss": interval.mean_losses().get("lm loss")}
            if torch.cuda.is_available():
                line["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            routing = interval.routing_report()
            if routing is not None:
                line |= {"load": routing["load"], "entropy": routing["entropy"]}
            self.record(line)
            super().print_line(settings, call, now)

        def print_rank_last(self, print_rank_last, message) -> None:
            found = re.search(r"validation loss at iteration (\d+) .*lm loss value: (\S+)", str(message))
            if found:
                self.record({"step": int(found[1]), "validation": float(found[2])})
            super().print_rank_last(print_rank_last, message)

        def record(self, line: dict) -> None:
            if torch.distributed.get_rank() < torch.distributed.get_world_size() - 1:
                return  # the last rank reports
            with history.open("a") as file:
                file.write(json.dumps(line) + "\n")

    reporter.WholeLineReporter = RecordingReporter
    runpy.run_module("linear_moe.pretrain", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
