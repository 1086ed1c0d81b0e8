"""A command inside a running container: exec probes and preStop hooks.

python -S -s -m agent.enter FOLDER COMMAND [ARGUMENT...]      (FOLDER is the run's; the exit code is the command's)
"""

import os
import sys
from pathlib import Path

from agent import kernel, memory, sandbox
from agent.contract import ProcessSpec, RunState


def main(folder: Path, argv: list[str]) -> int:
    spec, state = ProcessSpec.read(folder), RunState.read(folder)
    if state is None or state.exit_code is not None:
        print("the container is not running", file=sys.stderr)
        return 126
    memory.join(spec.memory)
    names = ("user", "pid", "uts", "ipc", "mnt") if spec.user_namespace else ("pid", "uts", "ipc", "mnt")
    for namespace in [os.open(f"/proc/{state.pid}/ns/{name}", os.O_RDONLY) for name in names]:
        kernel.setns(namespace)
    # Only children are in the new PID namespace; entering the mount namespace has moved root and working directory.
    child = os.fork()
    if child == 0:
        try:
            os.chdir(spec.cwd)
            sandbox.take_identity(spec)
            sandbox.execute(argv, spec.env)
        except (OSError, sandbox.CommandError) as error:
            print(error, file=sys.stderr)
        finally:
            os._exit(126)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
