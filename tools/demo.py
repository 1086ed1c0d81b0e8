"""`make demo`: from nothing to a compressed model on a real control plane, each step printed with its time.

Runs on a bare Python: it makes the virtual environment and finds or builds the control plane at the same time; while the latter still
builds, the main job already runs once without a cluster. The steps themselves are in demo_steps.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from setup import ROOT, VENV, cache_directory, make_environment, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave cluster, S3 server and result in place; prints how to use and end them")
    options = parser.parse_args()
    began = time.monotonic()
    steps = [str(VENV / "bin" / "python"), str(ROOT / "tools" / "demo_steps.py")]
    log = cache_directory() / "binaries.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"==> finding or building the control plane in the background ({log})", flush=True)
    with log.open("w") as output:
        # Behind everything else, so that a newcomer sees a result soon.
        command = ["nice", sys.executable, str(ROOT / "tools" / "binaries.py")]
        builder = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            make_environment(VENV, ROOT / "locks" / "dev.lock", project=True)
            if builder.poll() is None:
                subprocess.run([*steps, "local"], check=True)
                with step("the control plane (7 minutes the first time on 2 cores, then cached)"):
                    builder.wait()
        finally:
            builder.terminate()
    if builder.wait():
        sys.exit(f"the control plane could not be found or built:\n{log.read_text()[-2000:]}")
    if subprocess.run([*steps, "cluster", *(["--keep"] if options.keep else [])], check=False).returncode:
        sys.exit("the demo did not end well, see above")
    print(f"\nAll of it: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
