"""What `import hf_compress` costs on top of the two imports that registering its loader needs.

python scripts/benchmark_import.py
"""

import statistics
import subprocess
import sys

RUNS = 7
CODE = (
    "import torch, transformers.quantizers, time; start = time.perf_counter(); import hf_compress; "
    "print(time.perf_counter() - start)"
)


def main():
    seconds = [float(subprocess.check_output([sys.executable, "-c", CODE])) for _ in range(RUNS)]
    spread = f"median of {RUNS} fresh processes, {min(seconds):.3f} to {max(seconds):.3f}"
    print(f"import hf_compress: {statistics.median(seconds):.3f} s on top of torch, transformers.quantizers ({spread})")


if __name__ == "__main__":
    main()
