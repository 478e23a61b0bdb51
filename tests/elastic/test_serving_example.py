"""examples/elastic_serving.py: ranks are killed and join while it serves."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_serves_to_the_end(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "elastic_serving.py"), "--seconds", "8"]
    command += ["--png", str(tmp_path / "run.png")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    assert ended.stdout.count("kill\n") == 2 and ended.stdout.count("join\n") == 2
    assert int(re.search(r"(\d+) tokens served, 4 events", ended.stdout)[1]) > 0
    assert (tmp_path / "run.png").stat().st_size > 1000
