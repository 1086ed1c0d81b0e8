"""From the one name that a pass is asked for to a scheme for each linear that it takes. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kompressor_worker.architectures import text_config
from kompressor_worker.errors import UserError
from kompressor_worker.formats.gguf_mixes import MIXES, types_of
from kompressor_worker.formats.targets import matches
from kompressor_worker.layout import LinearLayout, ModelLayout
from kompressor_worker.passes.linear_params import fitted, scheme_in_groups, scheme_named
from kompressor_worker.passes.shapes import check_shapes
from kompressor_worker.schemes import SCHEMES, Scheme

ENDS = "Q6_K"
"""As llama.cpp's mixes have the head."""


def asked_schemes(
    layout: ModelLayout, linears: Sequence[LinearLayout], name: str, group_size: int | None, asked_by: str
) -> dict[str, Scheme]:
    """By linear's name: the scheme of this name; in a GGUF file the types of the mix of this name, or what llama.cpp takes where rows are
    no whole blocks of them. Raises UserError where a linear cannot be stored so."""
    mix = MIXES.get(name)
    if mix is None or layout.file_format != "gguf":
        if name not in SCHEMES:
            raise UserError(f"{asked_by}: {name} is a mix of GGUF types; set output.format gguf, or choose a scheme such as W4A16")
        scheme = scheme_in_groups(name, group_size, asked_by)
        check_shapes(layout, linears, scheme)
        return {linear.name: scheme for linear in linears}
    if group_size is not None:
        raise UserError(f"{asked_by}: groupSize {group_size} with scheme {name}, whose groups are fixed; leave groupSize out")
    config = text_config(layout.config)
    types = types_of(mix, linears, config, layout.tied_embeddings, int(config["num_hidden_layers"]))
    schemes = {linear.name: fitted(scheme_named(types[linear.name], "gguf"), linear.shape[1]) for linear in linears}
    for linear in linears:
        check_shapes(layout, [linear], schemes[linear.name])
    return schemes


def ends_of(layout: ModelLayout, taken: Collection[str], ignore: Sequence[str]) -> dict[str, Scheme]:
    """The schemes of embeddings and head in a GGUF file, for a pass that chooses those of the blocks alone."""
    ends = [linear for linear in layout.linears() if linear.kind in ("embedding", "head") and linear.name not in taken]
    wanted = [linear for linear in ends if not any(matches(pattern, linear.name) for pattern in ignore)]
    return {linear.name: fitted(scheme_named(ENDS, layout.file_format), linear.shape[1]) for linear in wanted}
