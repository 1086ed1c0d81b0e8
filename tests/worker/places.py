"""An output on a folder, a claim or a real S3 server, opened by several workers."""

from __future__ import annotations

from dataclasses import dataclass, field

from kompressor_api.v1alpha1 import OutputSpec, SourceLocation
from kompressor_worker.storage import Output, Part, Source
from kompressor_worker.storage.locations import open_output, open_source

PART = 5 << 20


@dataclass
class Place:
    """One output, which several workers open."""

    uri: str
    environ: dict[str, str] = field(default_factory=dict)
    endpoint: str | None = None

    def output(self) -> Output:
        return open_output(OutputSpec(uri=self.uri, endpoint=self.endpoint), self.environ)

    def source(self) -> Source:
        return open_source(SourceLocation(uri=self.uri, endpoint=self.endpoint), self.environ)


def upload(output: Output, name: str, data: bytes, id: str | None = None, skip: tuple[Part, ...] = ()) -> tuple[str, list[Part]]:
    """Everything but the last step, in parts of PART bytes, each given in two chunks."""
    id = id or output.begin(name, len(data))
    parts, view = list(skip), memoryview(data)
    for number, offset in enumerate(range(0, len(data), PART), 1):
        if number > len(skip):
            piece = view[offset : offset + PART]
            parts.append(output.write_part(name, id, number, offset, [piece[:1000], piece[1000:]]))
    return id, parts


def publish(output: Output, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        output.complete(name, *upload(output, name, data))
    output.publish("config.json", b"{}")
    output.cleanup()
