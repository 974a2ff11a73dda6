"""SIGTERM to the main script alone, as a container's runtime sends it, with a stand-in for Python and torchrun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# As torchrun it starts a rank that takes a while to save at SIGTERM, and ends with the status that STATUS names.
PYTHON = f"""#!{sys.executable}
import os, signal, subprocess, sys, time
words = sys.argv[1:]
if words[:2] == ["-c", "import torch; print(torch.cuda.device_count())"]:
    print(0)
elif words[:1] == ["-c"]:
    sys.executable = __file__
    exec(words[1])
elif words[:2] == ["-m", "torch.distributed.run"]:
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    assert os.environ["PET_SIGNALS_TO_HANDLE"] == "SIGINT,SIGHUP,SIGQUIT"
    sys.exit(subprocess.run([sys.executable, __file__, "rank"]).returncode)
elif words == ["rank"]:
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    print("training", flush=True)
    while not asked:
        time.sleep(0.01)
    time.sleep(1)
    print("saved", flush=True)
    sys.exit(int(os.environ["STATUS"]))
elif words and words[0].endswith("plot_run.py"):
    print("drawn", flush=True)
"""


@pytest.mark.parametrize("status", [0, 1])
def test_the_ranks_save_and_the_script_ends_with_their_status(tmp_path, status):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = os.environ | {"MOM_PYTHON": str(python), "STATUS": str(status), "OUT": str(tmp_path / "out")}
    environment |= {"DATA_PATH": "data", "TOKENIZER": "tokenizer"}
    command = ["bash", ROOT / "examples/pretrain_mom_a100.sh"]
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, start_new_session=True
    ) as script:
        try:
            assert "training\n" in iter(script.stdout.readline, "")
            time.sleep(0.2)
            script.send_signal(signal.SIGTERM)
            output = script.communicate(timeout=60)[0]
        finally:
            os.killpg(script.pid, signal.SIGKILL) if script.poll() is None else None
    assert script.returncode == status and "saved" in output and "drawn" not in output
    assert ("stopped by SIGTERM: run again to resume" in output) == (status == 0)
