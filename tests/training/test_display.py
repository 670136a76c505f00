"""A run goes on when nobody reads what it says any more."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
from esrl.training.display import Display, say
for _ in range(3):
    say("a line")
with Display(2, None, True) as display:
    display._last_line = -1e9
    display.step(1, 1.0, {"seconds_total": 1.0})
    display.evaluation({"step": 1, "epoch": 0.5, "best": True, "dev_bleu": 3.0})
print("went on")
"""


def test_a_reader_of_standard_error_that_has_gone_ends_no_run():
    reader, writer = os.pipe()
    os.close(reader)
    call = [sys.executable, "-c", CODE]
    done = subprocess.run(call, stdout=subprocess.PIPE, stderr=writer, text=True, env=os.environ.copy(), check=False)
    os.close(writer)
    assert (done.returncode, done.stdout) == (0, "went on\n")
