"""What a test asks of the machine that it runs on."""

import os
from pathlib import Path

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, or kills with SIGKILL: not on Windows")
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc: Linux alone has it")
