"""The artifact on disk: schema, atomic writing, and the checks made before anything is loaded.

    build/
      manifest.json    schema version, model, target, decisions, caches, buckets, sha256 and size of every file
      plan/<entry>-<bucket>.json   launches with every argument resolved to a name or an offset
      kernels/         shared libraries, each with its source beside it
      weights/*.safetensors   one 1-D tensor a blob, in the kernel's layout, a multiple of 64 bytes each
      tokenizer/       tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json
      ir/NN-pass.qir   the graph after each pass
      report.json      what was decided and why
"""

from __future__ import annotations

from qcn_compile.artifact.disk import (
    FULL_HASH_LIMIT,
    check_ranks,
    file_sha256,
    read_manifest,
    read_plan,
    seal,
    write_json,
)
from qcn_compile.artifact.folder import alive, building, check_output
from qcn_compile.artifact.schema import (
    ALIGNMENT,
    FUSED,
    INPUTS,
    PEER_ROWS,
    SCHEMA,
    Arg,
    CacheSpec,
    Collective,
    Launch,
    Manifest,
    Plan,
    RankPart,
    Route,
)

__all__ = [
    "ALIGNMENT",
    "Arg",
    "CacheSpec",
    "Collective",
    "FULL_HASH_LIMIT",
    "FUSED",
    "INPUTS",
    "Launch",
    "Manifest",
    "PEER_ROWS",
    "Plan",
    "RankPart",
    "Route",
    "SCHEMA",
    "alive",
    "building",
    "check_output",
    "check_ranks",
    "file_sha256",
    "read_manifest",
    "read_plan",
    "seal",
    "write_json",
]
