"""A small kubelet: pods as processes, on a machine with no container engine.

client.py        the API server over HTTPS; objects are plain dicts
clock.py         Kubernetes timestamps
quantity.py      "1.5Gi" as a number, resourceFieldRef as text
fields.py        the downward API
environment.py   pure: pod and container -> environment, $(VAR) expansion
images.py        the image table: a name -> PATH, environment, root
contract.py      what the agent hands to a container's shim, and what the shim answers
processes.py     pure: pod and container -> what the shim runs
volumes.py       a pod's volumes as folders; storage.py: claims and host paths; tokens.py: service account tokens
payload.py       files swapped in at once, as the kubelet's atomic writer does
sandbox.py       inside the container: namespaces, user, command; rootfs.py: its root file system and mounts
kernel.py        the few system calls that Python 3.11 has no name for
memory.py        a limit by cgroup v1, cgroup v2 or polling
shim.py          one process a container: starts it, keeps its log, writes down how it ended
enter.py         a command inside a running container (exec probes, preStop)
runs.py          the agent's side of a shim; survives a restart of the agent
trees.py         removing what containers have written
lifecycle.py     pure: what to start, restart or wait for
status.py        pure: pod and runs -> status
containers.py    starting one container, with the kubelet's reasons where that fails
probes.py        readiness, liveness, startup
pod.py           one thread a pod: observe, decide, act, report
pods.py          list and watch; one worker a pod
node.py          the Node, its Lease, its heartbeat
names.py         pods of headless Services find one another: /etc/hosts in place of DNS
events.py        events, repeated ones counted
kubelet_api.py   /containerLogs for `kubectl logs`
logs.py          reading a container's log back
"""
