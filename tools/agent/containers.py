"""Starting one container: image, environment, mounts, process; where it fails, the kubelet's reason for waiting."""

from dataclasses import replace
from pathlib import Path

from agent import memory
from agent.client import Object
from agent.context import Context
from agent.contract import MemoryLimit, Mount
from agent.environment import ConfigError, environment
from agent.images import Image, ImageError
from agent.lookups import lookup_in
from agent.names import HOSTS
from agent.processes import TERMINATION_LOG, CommandMissing, memory_limit, process_spec, service_environment
from agent.records import Container
from agent.runs import Run
from agent.volumes import container_mounts

_CONFIG_RETRY_SECONDS = 1.0
_FLIP_SECONDS = 0.5


def start(context: Context, pod: Object, container: Container, places: dict[str, Path], gpus: list[str], now: float) -> None:
    """Leaves `container` with a new run, or waiting with a reason and the time of the next try."""
    emit = context.events.pod
    if container.waiting and container.waiting[0] == "ErrImagePull" and container.tries:
        # The kubelet's next look, before the back-off is over.
        message = f'Back-off pulling image "{container.spec["image"]}": ErrImagePull: {container.waiting[1]}'
        container.waiting = ("ImagePullBackOff", message)
        container.retry_at = now + context.backoff.delay(container.tries) - _FLIP_SECONDS
        emit(pod, "Normal", "BackOff", f'Back-off pulling image "{container.spec["image"]}"')
        return
    try:
        image = context.images.find(container.spec["image"], container.spec.get("imagePullPolicy", "IfNotPresent"))
        _launch(context, pod, container, image, places, gpus)
    except ImageError as error:
        container.tries += 1
        pause = _FLIP_SECONDS if error.reason == "ErrImagePull" else _CONFIG_RETRY_SECONDS
        container.waiting, container.retry_at = (error.reason, str(error)), now + pause
        emit(pod, "Warning", "Failed", f'Failed to pull image "{container.spec["image"]}": {error}')
        emit(pod, "Warning", "Failed", f"Error: {error.reason}")
    except ConfigError as error:
        container.waiting, container.retry_at = ("CreateContainerConfigError", str(error)), now + _CONFIG_RETRY_SECONDS
        emit(pod, "Warning", "Failed", f"Error: {error}")
    except (CommandMissing, OSError) as error:
        container.waiting, container.retry_at = ("CreateContainerError", str(error)), now + _CONFIG_RETRY_SECONDS
        emit(pod, "Warning", "Failed", f"Error: {error}")


def _launch(context: Context, pod: Object, container: Container, image: Image, places: dict[str, Path], gpus: list[str]) -> None:
    spec, facts = container.spec, context.facts
    lookup = lookup_in(context.client, pod["metadata"]["namespace"])
    env = environment(pod, spec, service_environment(facts), facts.allocatable, lookup)
    mounts = container_mounts(spec, places, env)
    hosts = context.root / "pods" / pod["metadata"]["uid"] / HOSTS
    if hosts.exists():  # rewritten as other pods come and go
        mounts.append(Mount(str(hosts), "/etc/hosts"))
    log_mount = Mount("", spec.get("terminationMessagePath") or TERMINATION_LOG)
    lent = gpus if context.gpus is not None else None
    # Everything that can be wrong with the spec is known before a folder or a cgroup is made for it.
    trial = process_spec(pod, spec, image, env, [*mounts, log_mount], lent, passages(image), MemoryLimit(), facts)
    folder = container.next_folder()
    message_file = folder / "termination-log"
    message_file.touch()
    message_file.chmod(0o666)
    name = f"node-agent-{pod['metadata']['uid']}-{container.name}-{folder.name}"
    limit = memory.prepare(*context.memory, name, memory_limit(spec))
    placed = [Mount(str(message_file), mount.target) if mount is log_mount else mount for mount in trial.mounts]
    run = Run.start(folder, replace(trial, mounts=placed, memory=limit), context.leash)
    container.begin(run)
    context.events.pod(pod, "Normal", "Pulled", f'Container image "{image.name}" already present on machine')
    if run.running:
        context.events.pod(pod, "Normal", "Created", f"Created container: {container.name}")
        context.events.pod(pod, "Normal", "Started", f"Started container {container.name}")
    else:
        context.events.pod(pod, "Warning", "Failed", f"Error: {run.state.message}")


def passages(image: Image) -> list[str]:
    """Folders on the way to an image's programs, which another user than root must be able to pass through.

    A virtual environment's Python is a link, often to somewhere under a home folder that is closed to others.
    """
    if image.root != "/":
        return []
    programs = [Path(folder) for folder in image.path]
    programs += [folder / name for folder in programs for name in ("python", "python3") if (folder / name).exists()]
    return sorted({str(up) for program in programs for path in (program, program.resolve()) for up in path.parents} - {"/"})
